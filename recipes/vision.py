"""Fine-tune an image classifier: phased unfreezing, a learning rate for each depth, exact resume.

Without --data it needs no network: a small network of bptools.nn learns half of scikit-learn's digits, then
adapts to the other half, inverted, with five labels a class. Everything is printed on a card at the end.

    uv run recipes/vision.py                                    the demonstration, under a minute on 2 cores
    uv run recipes/vision.py --compare                          bptools.nn beside torch.nn, same seeds
    uv run recipes/vision.py --data DIR --model resnet50 --weights DEFAULT
    uv run recipes/vision.py --data DIR --model resnet18 --weights FILE.pth --phases head:3 all:10@1e-4
    uv run recipes/vision.py --resume runs/vision/TIME          after Ctrl-C

DIR holds one folder of images for each class, or DIR/train and DIR/val (and DIR/test) do. With --data
some defaults differ: --data DIR --help shows the defaults for folders.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import tyro
from rich.console import Console

import bptools.nn
from bptools import finetune as ft

LAYERS = {"bptools": bptools.nn, "torch": torch.nn}
Dir = Annotated[str | None, tyro.conf.arg(metavar="DIR")]
Strategy = Literal["scratch", "head", "full", "discriminative"]
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
    strategy: Annotated[tuple[Strategy, ...], tyro.conf.arg(metavar="NAME ...")] = get_args(Strategy)
    """Runs: scratch (from random weights), head, full (one rate), discriminative (in phases, rates by depth)."""
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
    clip: float = 1.0
    """Largest gradient norm."""
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
    seed: int = 0
    """First seed; it draws the split, the weights and the order."""
    seeds: int = 5
    """Number of seeds."""
    workers: int = 0
    """Processes that load images."""
    device: str = "auto"
    """Such as cpu or cuda:0; auto: CUDA where there is one."""
    log_dir: Dir = None
    """Where checkpoints, TensorBoard's logs and the picture go; by default runs/vision/TIME."""
    resume: Dir = None
    """Folder of an interrupted job, to be continued exactly, with its own settings."""
    compare: bool = False
    """Do the demonstration with the layers of bptools and of torch in turn; compare accuracy and time."""


FOLDER_DEFAULTS = Config(model="resnet18", weights="auto", strategy=("discriminative",), epochs=10, seeds=1,
                         batch_size=32, lr=5e-4, lr_decay=0.8, patience=4, workers=2)  # fmt: skip


def resolve(cfg: Config) -> Config:
    """Refuse what cannot be, before any file is written, and replace every "auto" by what it means here."""
    ft.check_settings(cfg)
    cfg = replace(cfg, device=ft.resolve_device(cfg.device), weights=ft.resolve_weights(cfg.model, cfg.weights))
    log_dir = cfg.log_dir or time.strftime("runs/vision/%Y-%m-%d_%H-%M-%S")
    target = read_data(cfg, cfg.seed)[1]
    ft.check_model(build(cfg, len(target.classes), pretrained=True), target.train[0][0][None], cfg.phases)
    return replace(cfg, amp=ft.resolve_amp(cfg.amp, cfg.device), log_dir=log_dir)


def build(cfg: Config, classes: int, pretrained: bool) -> ft.Classifier:
    """Return the classifier of --model, with the weights of --weights if ``pretrained``."""
    weights = cfg.weights if pretrained else None
    if cfg.model == "small":
        return ft.small_classifier(LAYERS[cfg.layers], classes, grey=cfg.data is None, weights=weights)
    return ft.torchvision_classifier(cfg.model, classes, weights)


def read_data(cfg: Config, seed: int) -> tuple[ft.Splits | None, ft.Splits]:
    """Return the images to pretrain on (none with --data) and to adapt to."""
    if cfg.data is None:
        return ft.digits(seed, cfg.labels_per_class)
    size, mean, std = ft.input_format(cfg.model, cfg.weights)
    return None, ft.image_folder(cfg.data, cfg.size or size, mean, std, holdout=cfg.holdout, seed=seed)


def train(
    cfg: Config, name: str, seed: int, net: ft.Classifier, splits: ft.Splits, save: Callable[[dict], None],
    interrupt: ft.Interrupt | None, state: dict | None,
) -> dict | None:  # fmt: skip
    """Train through the phases, keep the best weights and test them; ``None`` if interrupted.

    ``save`` stores a snapshot of the run, and ``state`` is such a snapshot, of a run to be continued.
    """
    model, folder = net.model, Path(cfg.log_dir, f"seed{seed}", name)
    phases = ft.strategy_phases(name, 8 if name == "pretrain" else cfg.epochs, cfg.phases, cfg.lr_decay)
    depths = ft.parameter_depths(model, splits.train[0][0][None].to(cfg.device))
    optimizer = torch.optim.AdamW(ft.parameter_groups(model, depths, cfg.lr, cfg.weight_decay))
    loss = LAYERS[cfg.layers].CrossEntropyLoss()
    stepper = ft.Stepper(model, optimizer, loss, amp=cfg.amp, clip=cfg.clip, device=cfg.device)
    stopper = ft.EarlyStopping(cfg.patience)
    steps = math.ceil(math.ceil(len(splits.train) / cfg.batch_size) / cfg.accumulate)  # in an epoch
    samples = len(splits.train) * sum(phase.epochs for phase in phases)
    logged, bar = (state or {}).get("monitor"), sys.stdout.isatty()
    monitor = ft.Monitor(folder, f"seed {seed} {name}", samples, bar=bar, state=logged)
    first, first_epoch, skip, history, seconds = state["at"] if state else (0, 0, 0, [], 0.0)
    if state:
        model.load_state_dict(state["model"])
    begun = saved = time.perf_counter()

    def snapshot(*at: int) -> dict:
        return {
            "at": (*at, history, seconds + time.perf_counter() - begun), "model": model.state_dict(),
            "stepper": stepper.state_dict(), "stopper": stopper.state_dict(), "monitor": monitor.state_dict(),
            "random": ft.random_state(),
        }  # fmt: skip

    for p, phase in enumerate(phases[first:], first):
        ft.enter_phase(model, optimizer, phase, net.head)
        ft.check_optimizer(model, optimizer)
        stepper.schedule = ft.warmup_cosine(optimizer, steps * phase.epochs)
        stopper.start_phase()
        if state:
            stepper.load_state_dict(state["stepper"])
            stopper.load_state_dict(state["stopper"])
        for epoch in range(first_epoch, phase.epochs):
            ft.set_modes(model, frozen_dropout=cfg.frozen_dropout)
            if bar and epoch == 0 and seed == cfg.seed and name == cfg.strategy[-1]:
                console.print(ft.trainability_table(model, optimizer, f"{name}, phase {p + 1}: {phase}"))
            loader = ft.make_loader(splits.train, cfg.batch_size, seed=(seed, stopper.epoch), workers=cfg.workers)
            stream = ft.windows(loader, cfg.accumulate)
            for _ in range(skip):
                next(stream)  # learned from before the interruption
            if state:
                ft.set_random_state(state["random"])
            for window, batches in enumerate(stream, skip + 1):
                result = stepper.step(batches)
                monitor.step(result, optimizer.param_groups)
                if interrupt:
                    save(snapshot(p, epoch, window))
                    return monitor.close()
            first_epoch, skip, state = 0, 0, None
            val = ft.evaluate(model, splits.val, device=cfg.device, workers=cfg.workers)
            history.append({"train_loss": monitor.mean_loss(), "loss": val.loss, "accuracy": val.accuracy})
            monitor.epoch(optimizer.param_groups, **{"val/loss": val.loss, "val/accuracy": val.accuracy})
            if stopper.update(val.loss):
                ft.save_checkpoint(folder / "best.pt", {"model": model.state_dict(), "classes": splits.classes})
            if stopper.exhausted:
                break
            if time.perf_counter() - saved > 60 and epoch + 1 < phase.epochs:
                saved = time.perf_counter()
                save(snapshot(p, epoch + 1, 0))
    seconds += time.perf_counter() - begun
    ft.load_weights(model, folder / "best.pt")
    test = ft.evaluate(model, splits.test, device=cfg.device, workers=cfg.workers)
    monitor.finish(asdict(cfg) | {"strategy": name, "seed": seed}, test, splits.classes)
    return {"history": history, "reason": stopper.reason(), "seconds": seconds, **test._asdict()}


def run(
    cfg: Config, name: str, seed: int, source: ft.Splits | None, target: ft.Splits,
    save: Callable[[dict], None] = print, interrupt: ft.Interrupt | None = None, state: dict | None = None,
) -> dict | None:  # fmt: skip
    """Do one run, from building the model to the test images; ``None`` if interrupted."""
    torch.manual_seed(seed)
    if cfg.data is None:
        torch.set_num_threads(1)  # tensors this small gain little from more, and the bits are the same anywhere
    splits = source if name == "pretrain" else target
    net = build(cfg, len(splits.classes), pretrained=name not in ("pretrain", "scratch"))
    net.model.to(cfg.device)
    if source and name not in ("pretrain", "scratch"):
        ft.load_weights(net.model, Path(cfg.log_dir, f"seed{seed}", "pretrain", "best.pt"))
    if name != "zero-shot":
        return train(cfg, name, seed, net, splits, save, interrupt, state)
    result = {"history": [], "seconds": 0.0, "reason": "not trained", "accuracy": None}
    if net.new_head and not source:
        return result | {"reason": "n/a, the head is new"}
    return result | ft.evaluate(net.model, splits.test, device=cfg.device, workers=cfg.workers)._asdict()


def job(cfg: Config, done: dict, unfinished: dict) -> int:
    """Do all runs that are not ``done``, then print the card; return the exit status."""
    folder = ft.make_folder(cfg.log_dir, config=asdict(cfg))
    names = (*(() if cfg.data else ("pretrain",)), "zero-shot", *cfg.strategy)
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)

    def keep(key: str, state: dict | None) -> None:
        unfinished = {key: state} if state else {}
        ft.save_checkpoint(folder / "last.pt", {"config": asdict(cfg), "done": done, "unfinished": unfinished})

    with ft.Interrupt() as interrupt:
        for seed in seeds:
            source, target = read_data(cfg, seed)
            for key, name in ((f"{seed}/{name}", name) for name in names):
                if key in done:
                    continue
                result = run(cfg, name, seed, source, target, partial(keep, key), interrupt, unfinished.get(key))
                stop = bool(interrupt)
                if result:
                    done[key] = result
                    if result["history"] or stop:  # a folder without a trained run can be used again
                        keep(key, None)
                    console.print(f"seed {seed}  {ft.one_run(name, result)}")
                if stop:
                    console.print(f"saved; continue: uv run recipes/vision.py --resume {folder}", soft_wrap=True)
                    return 128 + interrupt.signal
    notes = [f"images: {target.sizes()}", *([f"pretraining, once a seed: {source.sizes()}"] if source else [])]
    runs = {name: [done[f"{seed}/{name}"] for seed in seeds] for name in ("zero-shot", *cfg.strategy)}
    ft.print_card(console, folder, f"{cfg.data or 'inverted digits'}, {cfg.model}", runs, target.classes, notes)
    return 0


def compare(cfg: Config) -> int:
    """Do the demonstration with both sets of layers, A B, B A, A B, ...; print accuracies and processor time."""
    ft.make_folder(cfg.log_dir, config=asdict(cfg))
    print(f"seed {cfg.seed} comes first to warm up, and is not counted", flush=True)
    names = ("pretrain", *cfg.strategy)
    seconds, accuracy = {"torch": [], "bptools": []}, {"torch": [], "bptools": []}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds + 1):
        for layers in list(seconds)[:: 1 if seed % 2 else -1]:
            one = replace(cfg, layers=layers, log_dir=f"{cfg.log_dir}/{layers}")
            begun = time.process_time()
            results = [run(one, name, seed, *read_data(cfg, seed)) for name in names]
            if seed == cfg.seed:
                continue
            seconds[layers].append(time.process_time() - begun)
            accuracy[layers].append({n: round(r["accuracy"], 2) for n, r in zip(names, results, strict=True)})
            print(f"seed {seed}  {layers:<8} {seconds[layers][-1]:6.2f} s  {accuracy[layers][-1]}", flush=True)
    ft.print_comparison(console, seconds, accuracy)
    return 0


def read_job(cfg: Config) -> tuple[Config, dict, dict]:
    """Return the settings, the finished and the unfinished runs of the job in --resume."""
    if replace(cfg, resume=None) != Config():
        raise ft.InputError("--resume goes on with the job's own settings; leave out the other options")
    state = ft.load_job(cfg.resume)
    return Config(**state["config"]), state["done"], state["unfinished"]


def main(args: Sequence[str] | None = None) -> int:
    """Read the command line and do the job; return the exit status."""
    args = sys.argv[1:] if args is None else args
    default = FOLDER_DEFAULTS if any(a.split("=")[0] == "--data" for a in args) else Config()
    cfg = tyro.cli(Config, prog="recipes/vision.py", description=__doc__, args=args, default=default)
    try:
        if cfg.resume:
            return job(*read_job(cfg))
        cfg = resolve(cfg)
        return compare(cfg) if cfg.compare else job(cfg, {}, {})
    except (ft.InputError, FloatingPointError) as error:
        print(f"error: {ft.one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
