"""Fine-tune an image classifier: phased unfreezing, a learning rate for each depth, exact resume.

Without --data it needs no network: a small network of bptools.nn learns half of scikit-learn's digits, then
adapts to the other half, inverted, with five labels a class. Everything is printed on a card at the end.

    uv run recipes/vision.py                                    the demonstration, under a minute on 2 cores
    uv run recipes/vision.py --compare                          bptools.nn beside torch.nn, same seeds
    uv run recipes/vision.py --data DIR --model resnet50 --weights DEFAULT
    uv run recipes/vision.py --data DIR --model resnet18 --weights FILE.pth --phases head:3 all:10@1e-4
    uv run recipes/vision.py --resume runs/vision/TIME          after Ctrl-C, a crash or kill -9
    uv run recipes/vision.py --verify                           prove these settings, and your edits, in seconds
    uv run torchrun --nproc-per-node 2 recipes/vision.py        several processes; --parallel fsdp shards the model

DIR holds one folder of images for each class, or DIR/train and DIR/val (and DIR/test) do. With --data
some defaults differ: --data DIR --help shows the defaults for folders.
"""

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro
from rich.console import Console

import bptools.nn
from bptools import finetune as ft

LAYERS = {"bptools": bptools.nn, "torch": torch.nn}
Dir = Annotated[str | None, tyro.conf.arg(metavar="DIR")]
Strategy = Literal["scratch", "head", "full", "discriminative", "lora"]
console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)


@dataclass(frozen=True)
class Config:
    """Settings of a job; the defaults are the demonstration's."""

    data: Dir = None
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
    phases: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PHASE ...")] = ()
    """Phases of "discriminative", as NAMES:EPOCHS or NAMES:EPOCHS@RATE with names joined by +; by default the
    head for a fifth of --epochs, then all."""
    epochs: int = 60
    """Most epochs of a run."""
    batch_size: int = 50
    """Images per batch."""
    accumulate: int = 1
    """Batches per optimizer step."""
    lr: float = 3e-3
    """Peak learning rate of the head."""
    lr_decay: float = 0.7
    """Factor on the rate for each layer nearer to the input, in "discriminative"."""
    weight_decay: float = 0.05
    """AdamW's decay; none on norms, biases and whatever is frozen."""
    schedule: Literal["constant", "linear", "cosine", "one-cycle"] = "cosine"
    """How the rate goes within a phase, after a warm-up."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.0
    """Decay of an average of the weights, which is validated, kept and tested in their place; 0: none."""
    lean: bool = False
    """Keep less for the backward pass, by bptools.lean(); the bits are the same."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision; auto: fp16 with a gradient scaler on CUDA, bf16 on a CPU that has kernels for it."""
    patience: int = 20
    """Epochs without a lower validation loss that end a phase; 0: never."""
    frozen_dropout: bool = False
    """Keep dropout active in frozen layers."""
    labels_per_class: int = 5
    """Labelled inverted digits of each class in the demonstration, 1 to 40."""
    holdout: float = 0.3
    """Share of a folder without train and val that is set aside, half to pick the epoch, half to test."""
    rank: int = 8
    """Rank of the updates in "lora"."""
    seed: int = 0
    """First seed; it draws the split, the weights and the order."""
    seeds: int = 5
    """Number of seeds."""
    workers: int = 0
    """Processes that load images."""
    device: str = "auto"
    """Such as cpu or cuda:0; auto: CUDA where there is one."""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """What processes of torchrun do; auto: ddp, each with the whole model. --batch-size is of all together."""
    save_every: float = 60.0
    """Seconds between two checkpoints."""
    log_dir: Dir = None
    """Where checkpoints, TensorBoard's logs and the picture go; by default runs/vision/TIME."""
    resume: Dir = None
    """Folder of an interrupted job, to be continued exactly, with its own settings."""
    dry_run: bool = False
    """Do one batch of everything in a temporary folder, a checkpoint included."""
    verify: bool = False
    """Prove accumulation, resume, freezing and two processes on these settings; needs no network."""
    lr_find: bool = False
    """Raise the rate until the last strategy's first phase diverges, and save the picture of it."""
    compare: bool = False
    """Do the demonstration with the layers of bptools and of torch in turn; compare accuracy and time."""


FOLDER_DEFAULTS = Config(model="resnet18", weights="auto", strategy=("discriminative",), epochs=10, seeds=1,
                         batch_size=32, lr=5e-4, lr_decay=0.8, patience=4, workers=2)  # fmt: skip


def resolve(cfg: Config) -> Config:
    """Refuse what cannot be, before any file is written, and replace every "auto" by what it means here."""
    ft.check_settings(cfg)
    cfg = replace(cfg, weights=ft.resolve_weights(cfg.model, cfg.weights), amp=ft.resolve_amp(cfg.amp, cfg.device))
    target = read_data(cfg, cfg.seed)[1]
    ft.check_model(build(cfg, len(target.classes), pretrained=True), target.train[0][0][None], cfg.phases)
    return cfg


def build(cfg: Config, classes: int, pretrained: bool) -> ft.Classifier:
    """Return the classifier of --model, with the weights of --weights if ``pretrained``."""
    weights = cfg.weights if pretrained else None
    if cfg.model == "small":
        return ft.small_classifier(LAYERS[cfg.layers], classes, grey=cfg.data is None, weights=weights)
    return ft.torchvision_classifier(cfg.model, classes, weights)


@lru_cache(1)
def read_data(cfg: Config, seed: int) -> tuple[ft.Splits | None, ft.Splits]:
    """Return the images to pretrain on (none with --data) and to adapt to."""
    if cfg.data is None:
        return ft.digits(seed, cfg.labels_per_class)
    size, mean, std = ft.input_format(cfg.model, cfg.weights)
    return None, ft.image_folder(cfg.data, cfg.size or size, mean, std, holdout=cfg.holdout, seed=seed)


def train(cfg: Config, parallel: ft.Parallel, name: str, seed: int, **options: Any) -> dict[str, Any]:
    """Do one run, from where it was interrupted if it was, and return what it came to.

    ``options`` are those of :class:`bptools.finetune.Run` which say when to stop and who looks on.
    """
    folder = Path(cfg.log_dir, f"seed{seed}", name)
    if (folder / "result.json").exists():
        return ft.load_json(folder / "result.json")
    ft.set_seed(seed)
    if cfg.data is None:
        torch.set_num_threads(1)  # tensors this small gain little from more, and the bits are the same anywhere
    source, target = read_data(cfg, seed)
    splits = source if name == "pretrain" else target
    fresh = name in ("pretrain", "scratch")
    net = build(cfg, len(splits.classes), pretrained=not fresh)
    if source and not fresh:
        ft.load_weights(net.model, folder.parent / "pretrain" / "best.pt")
    model = net.model.to(parallel.device)
    if name == "lora":
        model = ft.add_adapter(model, ft.Adapter(rank=cfg.rank), head=net.head)
    test = partial(ft.evaluate, model, splits.test, device=parallel.device, workers=cfg.workers)
    if name == "zero-shot":
        known = test()._asdict() if source or not net.new_head else {"accuracy": None}
        reason = "not trained" if known["accuracy"] is not None else "n/a, the head is new"
        return ft.save_json(folder / "result.json", {"history": [], "seconds": 0.0, "reason": reason, **known})

    epochs = 8 if name == "pretrain" else cfg.epochs
    phases = ft.strategy_phases(name, epochs, cfg.phases, cfg.lr_decay, frozen_dropout=cfg.frozen_dropout)
    depths = ft.parameter_depths(model, splits.train[0][0][None].to(parallel.device))
    module = parallel.wrap(model)
    optimizer = torch.optim.AdamW(ft.parameter_groups(model, depths, cfg.lr, cfg.weight_decay))
    loss = ft.supervised(LAYERS[cfg.layers].CrossEntropyLoss())
    ema = ft.Ema(model, cfg.ema) if cfg.ema else None
    stepper = ft.Stepper(
        model, optimizer, loss, amp=cfg.amp, clip=cfg.clip, device=parallel.device, ema=ema, lean=cfg.lean,
        ratios_every=10, parallel=parallel, module=module,
    )  # fmt: skip
    bar = sys.stdout.isatty() and parallel.main
    run = ft.Run(
        folder, stepper, phases, lambda epoch: ft.make_loader(
            splits.train, cfg.batch_size, seed=(seed, epoch), workers=cfg.workers, parallel=parallel
        ),
        head=net.head, accumulate=cfg.accumulate, schedule=cfg.schedule, patience=cfg.patience, seed=seed,
        title=f"seed {seed} {name}", items=len(splits.train), bar=bar, keep={"classes": splits.classes},
        save_every=cfg.save_every, **options,
    )  # fmt: skip
    for phase in run.phases():
        if bar and seed == cfg.seed and name == cfg.strategy[-1]:
            console.print(ft.trainability_report(model, optimizer, phase, net.head, seed=seed))
        for _ in run.epochs():
            for window in run.windows():
                run.step(window)
            with run.averaged():
                val = ft.evaluate(model, splits.val, device=parallel.device, workers=cfg.workers)
                run.validate(val.loss, accuracy=val.accuracy)
    run.load_best()
    if name == "lora" and parallel.main:
        ft.save_adapter(model, folder / "adapter")
        ft.export(model, folder / "merged")
    result = test()
    run.monitor.finish(asdict(cfg) | {"strategy": name, "seed": seed}, result, splits)
    return run.finish(result._asdict())


def trial(cfg: Config, parallel: ft.Parallel, folder: Path, **options: Any) -> None:
    """Do the last strategy, and what it takes, in ``folder``; ``options`` are as for :func:`train`."""
    cfg = replace(cfg, log_dir=str(folder))
    for name in (*(() if cfg.data else ("pretrain",)), cfg.strategy[-1]):
        train(cfg, parallel, name, cfg.seed, **options)


def job(cfg: Config, parallel: ft.Parallel) -> int:
    """Do all runs that are not done yet, then print the card; return the exit status."""
    folder = ft.make_folder(cfg.log_dir, config=asdict(cfg)) if parallel.main else Path(cfg.log_dir)
    names = (*(() if cfg.data else ("pretrain",)), "zero-shot", *cfg.strategy)
    seeds, done = range(cfg.seed, cfg.seed + cfg.seeds), {}
    with ft.Interrupt() as interrupt:
        for seed in seeds:
            for name in names:
                old = (folder / f"seed{seed}" / name / "result.json").exists()
                done[seed, name] = result = train(cfg, parallel, name, seed, interrupt=interrupt)
                if parallel.main and not old:
                    console.print(f"seed {seed}  {ft.one_run(name, result)}")
                if parallel.any(bool(interrupt)):
                    raise ft.Stopped(interrupt.signal or signal.SIGTERM, folder)
    if parallel.main:
        source, target = read_data(cfg, cfg.seed)
        notes = [f"images: {target.sizes()}", *([f"pretraining, once a seed: {source.sizes()}"] if source else [])]
        runs = {name: [done[seed, name] for seed in seeds] for name in ("zero-shot", *cfg.strategy)}
        title = f"{cfg.data or 'inverted digits'}, {cfg.model}"
        ft.print_card(console, folder, title, runs, target.classes, notes)
    return 0


def compare(cfg: Config, parallel: ft.Parallel) -> int:
    """Do the demonstration with both sets of layers, A B, B A, A B, ...; print accuracies and processor time."""
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
            results = [train(one, parallel, name, seed) for name in names]
            if seed == cfg.seed:
                continue
            seconds[layers].append(time.process_time() - begun)
            accuracy[layers].append({n: round(r["accuracy"], 2) for n, r in zip(names, results, strict=True)})
            print(f"seed {seed}  {layers:<8} {seconds[layers][-1]:6.2f} s  {accuracy[layers][-1]}", flush=True)
    ft.print_comparison(console, seconds, accuracy)
    return 0


def start(cfg: Config, args: Sequence[str]) -> int | None:
    """Do what the settings ask for; return the exit status."""
    resume = cfg.resume
    if resume:
        if replace(cfg, resume=None) != Config():
            raise ft.InputError("--resume goes on with the job's own settings; leave out the other options")
        cfg = Config(**ft.load_config(resume) | {"log_dir": resume})
    cfg = replace(cfg, device=ft.resolve_device(cfg.device))
    parallel = ft.parallel_from_env(ft.verify_kind(cfg.parallel) if cfg.verify else cfg.parallel, cfg.device)
    if parallel.kind == "fsdp" and "lora" in cfg.strategy:
        raise ft.InputError("--strategy lora: expected --parallel ddp or none, as adapters are small, got fsdp")
    folder = cfg.log_dir or f"runs/vision/{ft.job_time(parallel)}"
    if ft.restarted(folder):
        cfg = Config(**ft.load_config(folder))
    elif not resume:
        cfg = replace(resolve(cfg), log_dir=folder)
    if cfg.verify:
        return ft.verify(partial(trial, cfg, parallel), [__file__, *args], console, parallel)
    if cfg.dry_run:
        return ft.dry_run(partial(trial, cfg, parallel), console, parallel)
    if cfg.lr_find:
        return trial(cfg, parallel, Path(folder), observe=ft.RateFinder(cfg.strategy[-1], console))
    return compare(cfg, parallel) if cfg.compare else job(cfg, parallel)


def main(args: Sequence[str] | None = None) -> int:
    """Read the command line and do the job; return the exit status."""
    args = list(sys.argv[1:] if args is None else args)
    default = FOLDER_DEFAULTS if any(a.split("=")[0] == "--data" for a in args) else Config()
    options = {"prog": "recipes/vision.py", "description": __doc__, "console_outputs": ft.speaks()}
    cfg = tyro.cli(Config, args=args, default=default, **options)
    return ft.exit_status(lambda: start(cfg, args))


if __name__ == "__main__":
    sys.exit(main())
