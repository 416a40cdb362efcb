"""Fine-tune an image classifier: phased unfreezing, a learning rate for each depth, exact resume.

Without --data it needs no network: a small network of bptools.nn learns half of scikit-learn's digits, then
adapts to the other half, inverted, with five labels a class. Everything is printed on a card at the end.

    uv run recipes/vision.py                                    the demonstration, under a minute on 2 cores
    uv run recipes/vision.py --compare                          bptools.nn beside torch.nn, same seeds
    uv run recipes/vision.py --positive 8                       find the eights, one in ten: a screening's report
    uv run recipes/vision.py --data DIR --model resnet50 --weights DEFAULT
    uv run recipes/vision.py --data DIR --model resnet18 --weights FILE.pth --phases head:3 all:10@1e-4
    uv run recipes/vision.py --data DIR --model vit_b_16 --weights DEFAULT --mix both --augment randaugment
    uv run recipes/vision.py --data DIR --model efficientnet_b0 --positive ill --balance weights --export both
    uv run recipes/vision.py --resume runs/vision/TIME          after Ctrl-C, a crash or kill -9
    uv run recipes/vision.py --verify                           prove these settings, and your edits, in seconds
    uv run torchrun --nproc-per-node 2 recipes/vision.py        several processes; --parallel fsdp shards the model

DIR holds one folder of images for each class, or DIR/train and DIR/val (and DIR/test) do. With --data
some defaults differ: --data DIR --help shows the defaults for folders; so does --positive 8 --help.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro
from sklearn.metrics import balanced_accuracy_score

import bptools.nn
from bptools import finetune as ft

LAYERS = {"bptools": bptools.nn, "torch": torch.nn}
Strategy = Literal["scratch", "head", "full", "discriminative", "lora"]


@dataclass(frozen=True)
class Config(ft.TransferSettings):
    """Settings of a job; the defaults are the demonstration's."""

    data: ft.Dir = None
    """Image folder; without it, scikit-learn's digits."""
    model: str = "small"
    """"small" (three convolutions) or any classifier of torchvision.models."""
    weights: Annotated[str | None, tyro.conf.arg(metavar="NAME|FILE")] = None
    """Torchvision's name of published weights, or a weights file; auto: DEFAULT, but None for "small"."""
    layers: Literal["bptools", "torch"] = "bptools"
    """Whose layers the small network and the loss are made of."""
    size: int = 0
    """Image height and width in pixels; 0: what the weights were trained at."""
    strategy: Annotated[tuple[Strategy, ...], tyro.conf.arg(metavar="NAME ...")] = get_args(Strategy)[:4]
    """Runs: scratch (from random weights), head, full (one rate), discriminative (in phases, rates by depth),
    lora (low-rank updates and the head; merged at the end)."""
    epochs: int = 60
    batch_size: int = 50
    lr: float = 3e-3
    patience: int = 20
    seeds: int = 5
    labels_per_class: int = 5
    """Labelled inverted digits of each class in the demonstration, 1 to 40."""
    holdout: float = 0.3
    """Share of a folder without train and val that is set aside, half to pick the epoch, half to test."""
    augment: Literal["none", "affine", "randaugment", "trivial", "auto"] = "none"
    """Random transformations of training images, beside the cropping and mirroring of folders."""
    erase: float = 0.0
    """Probability that a rectangle of a training image is erased."""
    mix: Literal["none", "mixup", "cutmix", "both"] = "none"
    """Mix each training image, and its label, with the one before it in the batch."""
    mix_alpha: float = 1.0
    """Shares of mixing are drawn from Beta(alpha, alpha)."""
    label_smoothing: float = 0.0
    """Share of each label that is spread evenly over the classes."""
    balance: Literal["none", "weights", "effective", "sampler", "focal"] = "none"
    """For classes of unequal size: weigh the loss by one over their size, or by one over their effective number;
    draw each equally often; or the focal loss."""
    positive: Annotated[str | None, tyro.conf.arg(metavar="CLASS")] = None
    """Tell this class from all others, and report as for a screening; of two classes, the second by default."""
    sensitivity: float = 0.95
    """Of two classes: the threshold is the highest that finds this share of validation's positive; 0: Youden's."""
    export: Literal["none", "torch", "onnx", "both"] = "none"
    """Write the last strategy's best model for torch.export or ONNX to LOG_DIR/export, and check it."""
    compare: bool = False
    """Do the demonstration with the layers of bptools and of torch in turn; compare accuracy and time."""


FOLDER_DEFAULTS = Config(model="resnet18", weights="auto", strategy=("discriminative",), epochs=10, seeds=1,
                         batch_size=32, lr=5e-4, lr_decay=0.8, patience=4, workers=2)  # fmt: skip
SCREENING = Config(strategy=("scratch", "full", "discriminative"), epochs=30, batch_size=16, seeds=3)
LIMITS = {
    "holdout": (0.001, 0.999), "size": (0, 10_000), "labels_per_class": (1, 40), "erase": (0, 1),
    "mix_alpha": (0.01, 100), "label_smoothing": (0, 0.999), "sensitivity": (0, 1),
}  # fmt: skip


def resolve(cfg: Config) -> Config:
    """Refuse what cannot be, before any file is written, and replace every "auto" by what it means here."""
    ft.check_settings(cfg, LIMITS)
    if cfg.compare and cfg.data:
        raise ft.InputError("--compare is about the demonstration; leave out --data")
    if cfg.data is None and (cfg.model != "small" or cfg.weights):
        option = f"--weights {cfg.weights}" if cfg.model == "small" else f"--model {cfg.model}"
        raise ft.InputError(f"{option}: name the images to train on with --data")
    if cfg.parallel == "fsdp" and "lora" in cfg.strategy:
        raise ft.InputError("--strategy lora: expected --parallel ddp or none, as adapters are small, got fsdp")
    if cfg.balance == "focal" and (cfg.mix != "none" or cfg.label_smoothing):
        raise ft.InputError("--balance focal: takes whole labels; leave out --mix and --label-smoothing")
    ft.check_export(cfg.export)
    cfg = replace(cfg, weights=ft.resolve_weights(cfg.model, cfg.weights))
    target = read_data(cfg, cfg.seed)[1]
    ft.check_model(build(cfg, len(target.classes), pretrained=True), target.train[0][0][None], cfg.phases)
    return cfg


def build(cfg: Config, classes: int, pretrained: bool) -> ft.Classifier:
    """Return the classifier of --model, with the weights of --weights if ``pretrained``."""
    weights = cfg.weights if pretrained else None
    if cfg.model == "small":
        return ft.small_classifier(LAYERS[cfg.layers], classes, grey=cfg.data is None, weights=weights)
    return ft.torchvision_classifier(
        cfg.model, classes, weights, cfg.size or ft.input_format(cfg.model, cfg.weights)[0]
    )


@lru_cache(1)
def read_data(cfg: Config, seed: int) -> tuple[ft.Splits | None, ft.Splits]:
    """Return the images to pretrain on (none with --data) and to adapt to."""
    options = {"positive": cfg.positive, "augment": cfg.augment, "erase": cfg.erase}
    if cfg.data is None:
        return ft.digits(seed, cfg.labels_per_class, **options)
    size, mean, std = ft.input_format(cfg.model, cfg.weights)
    return None, ft.image_folder(cfg.data, cfg.size or size, mean, std, holdout=cfg.holdout, seed=seed, **options)


def test(
    cfg: Config, on: Callable[..., ft.Evaluation], splits: ft.Splits
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the model comes to on the test data, ``on`` being what evaluates it, and pictures of it.

    Of two classes, threshold and temperature are those that suit the validation data.
    """
    result = on(splits.test)
    figures, pictures = result._asdict(), ft.image_figures(splits, result)
    figures["balanced_accuracy"] = 100 * balanced_accuracy_score(result.targets, result.predictions)
    if len(splits.classes) == 2:
        rule = ft.fit_rule(on(splits.val), cfg.sensitivity)
        figures |= asdict(rule) | ft.measures(result.targets, result.log_odds, rule)
        pictures |= ft.screening_figures(result, rule)
    return figures, pictures


def train(cfg: Config, parallel: ft.Parallel, name: str, seed: int, folder: Path, **options: Any) -> dict:
    """Do one run, from where it was interrupted if it was, and return what it came to.

    ``options`` are those of :class:`bptools.finetune.Run` which say when to stop and who looks on.
    """
    if cfg.data is None:
        torch.set_num_threads(1)  # tensors this small gain little from more, and the bits are the same anywhere
    source, target = read_data(cfg, seed)
    splits = source if name == "pretrain" else target
    fresh = name in ("pretrain", "scratch")
    net = build(cfg, len(splits.classes), pretrained=not fresh)
    if source and not fresh:
        fresh = ft.load_weights(net.model, folder.parent / "pretrain" / "best.pt", replaceable=[net.head])
        net = net._replace(new_head=bool(fresh))
    model = net.model.to(parallel.device)
    if name == "lora":
        model = ft.add_adapter(model, ft.Adapter(rank=cfg.rank), head=net.head)
    on = partial(ft.evaluate, model, device=parallel.device, workers=cfg.workers)
    if name == "zero-shot":
        known = test(cfg, on, splits)[0] if not net.new_head else {"accuracy": None, "auc": None}
        reason = "not trained" if known["accuracy"] is not None else "n/a, the head is new"
        return ft.not_trained(folder, reason, **known)

    epochs = 8 if name == "pretrain" else cfg.epochs
    phases = ft.strategy_phases(name, epochs, cfg.phases, cfg.lr_decay, frozen_dropout=cfg.frozen_dropout)
    depths = ft.parameter_depths(model, splits.train[0][0][None].to(parallel.device))
    labels, count = ft.labels_of(splits.train), len(splits.classes)
    loss = ft.balanced_loss(LAYERS[cfg.layers], cfg.balance, labels, count, cfg.label_smoothing)
    stepper = ft.make_stepper(cfg, model, ft.supervised(loss), depths, parallel)
    kept = {"head": net.head, "keep": {"classes": splits.classes}, "mix": ft.mixing(cfg.mix, cfg.mix_alpha, count)}
    kept["weights"] = ft.sample_weights(labels) if cfg.balance == "sampler" else None
    run = ft.make_run(cfg, folder, stepper, phases, splits.train, seed, **kept, **options)
    for _ in run.phases():
        for _ in run.epochs():
            for window in run.windows():
                run.step(window)
            with run.averaged():
                val = on(splits.val)
                run.validate(val.loss, accuracy=val.accuracy, **({"auc": ft.area(val)} if count == 2 else {}))
    run.load_best()
    if name == "lora" and parallel.main:
        ft.save_adapter(model, folder / "adapter")
        ft.export(model, folder / "merged")
    result, pictures = test(cfg, on, splits)
    metrics = {key: value for key, value in result.items() if isinstance(value, float)}
    run.monitor.finish(asdict(cfg) | {"strategy": name, "seed": seed}, metrics, pictures)
    return run.finish(result)


def before(cfg: Config, seed: int) -> tuple[str, ...]:
    """Return what others begin from: the demonstration's network has no published weights."""
    return () if cfg.data else ("pretrain",)


def card(cfg: Config, folder: Path, runs: dict[str, list]) -> None:
    """Print what all runs came to."""
    source, target = read_data(cfg, cfg.seed)
    notes = [f"images: {target.sizes()}", *([f"pretraining, once a seed: {source.sizes()}"] if source else [])]
    title, columns, options = f"{cfg.data or 'inverted digits'}, {cfg.model}", {}, {}
    counts = Counter(ft.labels_of(target.train)).values()
    if max(counts) > 1.5 * min(counts):
        columns = {"balanced %": ("balanced_accuracy", 1)}
    if len(target.classes) == 2:
        title += f": {target.classes[1]} or not"
        columns |= {"sens. %": ("sensitivity", 1), "spec. %": ("specificity", 1)}
        options = {"metric": ft.AUC, "panel": ft.roc_panel(runs)}
    if cfg.export != "none":
        notes += export(cfg, folder, runs[cfg.strategy[-1]], target)
    ft.print_card(RECIPE.console, folder, title, runs, target.classes, notes, columns=columns, **options)
    if len(target.classes) == 2:
        ft.print_screening(RECIPE.console, folder, title, runs, target.classes, cfg.sensitivity, seed=cfg.seed)


def export(cfg: Config, folder: Path, results: list[dict], target: ft.Splits) -> list[str]:
    """Write the model of the seed with the lowest validation loss for use elsewhere, and return notes."""
    seed = ft.best_seed(results)
    run = folder / f"seed{cfg.seed + seed}" / cfg.strategy[-1]
    net = build(cfg, len(target.classes), pretrained=False)
    ft.load_weights(net.model, run / ("merged/model.safetensors" if run.name == "lora" else "best.pt"))
    about = {"classes": target.classes, "preprocessing": target.preprocessing}
    about |= {key: results[seed][key] for key in ("threshold", "temperature") if key in results[seed]}
    images = torch.stack([target.test[i % len(target.test)][0] for i in range(5)])
    apart = ft.deploy(net.model, images, folder / "export", cfg.export, about)
    files = (
        f"{folder / 'export' / name} (outputs differ by {gap:.0e} of their norm)" for name, gap in apart.items()
    )
    return [f"exported, {run.name} of seed {cfg.seed + seed}: {file}" for file in files]


def compare(cfg: Config, parallel: ft.Parallel) -> int | None:
    """Do the demonstration with both sets of layers, A B, B A, A B, ...; print accuracies and processor time."""
    if not cfg.compare:
        return None
    if parallel.size > 1:
        raise ft.InputError(f"--compare: expected one process, got {parallel.size} from torchrun")
    ft.make_folder(cfg.log_dir, config=asdict(cfg))
    print(f"seed {cfg.seed} comes first to warm up, and is not counted", flush=True)
    names = ("pretrain", *cfg.strategy)
    seconds, accuracy = {"torch": [], "bptools": []}, {"torch": [], "bptools": []}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds + 1):
        for layers in list(seconds)[:: 1 if seed % 2 else -1]:
            one = replace(cfg, layers=layers, log_dir=f"{cfg.log_dir}/{layers}")
            begun = time.process_time()
            results = [RECIPE.run(one, parallel, name, seed) for name in names]
            if seed == cfg.seed:
                continue
            seconds[layers].append(time.process_time() - begun)
            accuracy[layers].append({n: round(r["accuracy"], 2) for n, r in zip(names, results, strict=True)})
            print(f"seed {seed}  {layers:<8} {seconds[layers][-1]:6.2f} s  {accuracy[layers][-1]}", flush=True)
    ft.print_comparison(RECIPE.console, seconds, accuracy)
    return 0


RECIPE = ft.Recipe(
    __file__, __doc__, Config(), resolve, train, card, before,
    also=lambda cfg: () if cfg.positive else ("zero-shot",),
    real={"--data": FOLDER_DEFAULTS, "--positive": SCREENING}, special=compare,
)  # fmt: skip


def main(args: Sequence[str] | None = None) -> int:
    """Read the command line and do the job; return the exit status."""
    return RECIPE.main(args)


if __name__ == "__main__":
    sys.exit(main())
