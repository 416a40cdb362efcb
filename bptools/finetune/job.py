"""A recipe's job: the settings that all recipes share, its runs over seeds, and what its command line can ask for.

A recipe brings settings, data, models and its training loop. What surrounds a loop is here: a folder with the
resolved settings, runs that are done once and found again, seeds, ``--resume``, ``--verify``, ``--dry-run``,
``--lr-find``, processes of torchrun, signals, and the card at the end.
"""

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset

from bptools.optim import Lamb

from .batches import LossFn
from .card import ACCURACY, Metric, one_run
from .checkpoint import load_json, make_folder, save_json, set_seed
from .command import exit_status, load_config, restarted
from .data import make_loader
from .devices import resolve_amp, resolve_device
from .distributed import Parallel, job_time, parallel_from_env, speaks
from .ema import Ema
from .errors import InputError
from .interrupt import Interrupt
from .lr_search import RateFinder
from .phases import Phase, parameter_groups
from .report import trainability_report
from .run import Run, Stopped
from .stepper import Stepper
from .verify import dry_run, verify, verify_kind

Dir = Annotated[str | None, tyro.conf.arg(metavar="DIR")]
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "rmsprop": torch.optim.RMSprop,
    "lamb": Lamb,
}


@dataclass(frozen=True)
class Settings:
    """Settings that every recipe has; a recipe's own class adds its data, its model and its strategies."""

    epochs: int = 10
    """Most epochs of a run."""
    batch_size: int = 32
    """Samples per batch, of all processes together."""
    accumulate: int = 1
    """Batches per optimizer step."""
    optimizer: Literal["adamw", "adam", "sgd", "momentum", "rmsprop", "lamb"] = "adamw"
    """How gradients become updates; momentum is Nesterov's, of 0.9."""
    lr: float = 1e-3
    """Peak learning rate of the head."""
    weight_decay: float = 0.05
    """Decay of the weights, decoupled in adamw and lamb, else L2; none on norms, biases and what is frozen."""
    schedule: Literal["constant", "linear", "cosine", "one-cycle"] = "cosine"
    """How the rate goes within a phase, after a warm-up."""
    clip: float = 1.0
    """Largest gradient norm."""
    diagnose: bool = False
    """Log in TensorBoard, of each epoch's first step, how the gradient goes through the model, and dead units."""
    ema: float = 0.0
    """Decay of an average of the weights, which is validated, kept and tested in their place; 0: none."""
    lean: bool = False
    """Keep less for the backward pass, by bptools.lean(); the bits are the same."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision; auto: fp16 with a gradient scaler on CUDA, bf16 on a CPU that has kernels for it."""
    patience: int = 0
    """Epochs without a lower validation loss that end a phase; 0: never."""
    seed: int = 0
    """First seed; it draws the split, the weights and the order."""
    seeds: int = 3
    """Number of seeds."""
    workers: int = 0
    """Processes that load data."""
    device: str = "auto"
    """Such as cpu or cuda:0; auto: CUDA where there is one."""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """What processes of torchrun do; auto: ddp, each with the whole model."""
    save_every: float = 60.0
    """Seconds between two checkpoints."""
    log_dir: Dir = None
    """Where checkpoints, TensorBoard's logs and the picture go; by default runs/RECIPE/TIME."""
    resume: Dir = None
    """Folder of an interrupted job, to be continued exactly, with its own settings."""
    dry_run: bool = False
    """Do one batch of everything in a temporary folder, a checkpoint included."""
    verify: bool = False
    """Prove accumulation, resume, freezing and two processes on these settings; needs no network."""
    lr_find: bool = False
    """Raise the rate until the last strategy's first phase diverges, and save the picture of it."""


@dataclass(frozen=True)
class TransferSettings(Settings):
    """Settings of recipes that fine-tune in phases, with a rate for each depth."""

    phases: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PHASE ...")] = ()
    """Phases of "discriminative", as NAMES:EPOCHS or NAMES:EPOCHS@RATE with names joined by +; by default the
    head for a fifth of --epochs, then all."""
    lr_decay: float = 0.7
    """Factor on the rate for each layer nearer to the input, in "discriminative"."""
    frozen_dropout: bool = False
    """Keep dropout active in frozen layers."""
    rank: int = 8
    """Rank of the updates in "lora"."""


S = TypeVar("S", bound=Settings)
Train = Callable[..., Mapping[str, Any]]


def make_stepper(
    cfg: Settings,
    model: nn.Module,
    loss_fn: LossFn,
    depths: Mapping[str, int],
    parallel: Parallel,
    **options: Any,
) -> Stepper:
    """Return the stepper of ``cfg``: the model wrapped for its processes, an optimizer with a group per depth.

    Args:
        cfg: The settings.
        model: On ``parallel.device``.
        loss_fn: As :class:`bptools.finetune.Stepper` takes it.
        depths: Depth by parameter name, from :func:`bptools.optim.parameter_depths`.
        parallel: This process among those that train.
        options: More of the stepper's.
    """
    module = parallel.wrap(model)  # first, as FSDP puts other parameters in their place
    optimizer = OPTIMIZERS[cfg.optimizer](parameter_groups(model, depths, cfg.lr, cfg.weight_decay), lr=cfg.lr)
    kept = {"amp": cfg.amp, "clip": cfg.clip, "lean": cfg.lean, "ema": Ema(model, cfg.ema) if cfg.ema else None}
    return Stepper(
        model, optimizer, loss_fn, device=parallel.device, ratios_every=10, parallel=parallel, module=module,
        **kept | options,
    )  # fmt: skip


def make_run(
    cfg: Settings,
    folder: Path,
    stepper: Stepper,
    phases: Sequence[Phase],
    data: Dataset,
    seed: int,
    *,
    collate: Callable[[list], Any] | None = None,
    shuffle: bool = True,
    mix: Callable[[Tensor, Tensor], Any] | None = None,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> Run:
    """Return the run of ``cfg`` in ``folder``, over ``data`` in an order that ``seed`` and the epoch draw.

    Args:
        cfg: The settings.
        folder: Of the run; its name is that of the run.
        stepper: From :func:`make_stepper`.
        phases: What trains, in turn.
        data: Training samples.
        seed: Of this run.
        collate: Makes a batch of a list of samples; by default tensors are stacked.
        shuffle: Whether the order is drawn, in each epoch anew.
        mix: Mixes the samples of each batch, as :func:`bptools.finetune.make_loader` takes it.
        weights: How likely each sample is to be drawn; by default each comes once an epoch.
        options: More of :class:`bptools.finetune.Run`'s.
    """
    parallel = stepper.parallel

    def loader(epoch: int) -> Any:
        order = (seed, epoch) if shuffle else None
        return make_loader(
            data, cfg.batch_size, seed=order, workers=cfg.workers, parallel=parallel, collate=collate, mix=mix,
            weights=weights,
        )  # fmt: skip

    bar = sys.stdout.isatty() and parallel.main
    shown = {"title": f"seed {seed} {folder.name}", "items": len(data), "bar": bar}
    taken = {name: getattr(cfg, name) for name in ("accumulate", "schedule", "patience", "save_every", "diagnose")}
    return Run(folder, stepper, phases, loader, seed=seed, **shown | taken | options)


@dataclass(frozen=True)
class Recipe:
    """One recipe: its file, its settings, and the functions that do its work.

    Args:
        file: The recipe's ``__file__``; jobs go to ``runs/NAME/TIME``.
        doc: Its docstring, shown by ``--help``.
        settings: The defaults: those of the demonstration. They have a ``strategy``, names of runs.
        resolve: Refuses what cannot be, before any file is written, and replaces "auto" by what it means here.
        train: Does one run, from where it was interrupted if it was, and returns what it came to, as
            :meth:`Run.finish` does. Called with the settings, this process among those that train, the name of
            the run, its seed, its folder, and options to hand on to :class:`Run`.
        card: Prints what all runs came to; called with the settings, the job's folder, and the results by name
            of the run, one for each seed.
        before: Names of runs that others begin from, in a seed, and which no card shows.
        also: Names of runs on the card beside the strategies, first.
        real: Defaults that take the place of ``settings`` where an option is given, by option.
        metric: What runs are judged by.
        special: Does something else than the job where the settings ask for it, and returns the exit status;
            ``None`` where they do not.
        console: Where to print.
    """

    file: str
    doc: str
    settings: Settings
    resolve: Callable[[Any], Any]
    train: Train
    card: Callable[[Any, Path, dict[str, list]], None]
    before: Callable[[Any, int], Sequence[str]] = lambda cfg, seed: ()
    also: Callable[[Any], Sequence[str]] = lambda cfg: ()
    real: Mapping[str, Settings] = field(default_factory=dict)
    metric: Metric = ACCURACY
    special: Callable[[Any, Parallel], int | None] = lambda cfg, parallel: None
    console: Console = field(
        default_factory=lambda: Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    )

    @property
    def name(self) -> str:
        """The recipe's name."""
        return Path(self.file).stem

    def run(self, cfg: S, parallel: Parallel, name: str, seed: int, **options: Any) -> dict[str, Any]:
        """Do one run if it is not done yet, and return what it came to."""
        folder = Path(cfg.log_dir, f"seed{seed}", name)
        if (folder / "result.json").exists():
            return load_json(folder / "result.json")
        set_seed(seed)
        return dict(self.train(cfg, parallel, name, seed, folder, **options))

    def trial(self, cfg: S, parallel: Parallel, folder: Path, **options: Any) -> None:
        """Do the last strategy, and what it begins from, in ``folder``; ``options`` are :class:`Run`'s."""
        cfg = replace(cfg, log_dir=str(folder))
        for name in (*self.before(cfg, cfg.seed), cfg.strategy[-1]):
            self.run(cfg, parallel, name, cfg.seed, **options)

    def job(self, cfg: S, parallel: Parallel) -> int:
        """Do all runs that are not done yet, then print the card; return the exit status."""
        folder = make_folder(cfg.log_dir, config=asdict(cfg)) if parallel.main else Path(cfg.log_dir)
        shown = (*self.also(cfg), *cfg.strategy)
        seeds, done = range(cfg.seed, cfg.seed + cfg.seeds), {name: [] for name in shown}
        with Interrupt() as interrupt:
            for seed in seeds:
                for name in (*self.before(cfg, seed), *shown):
                    old = (folder / f"seed{seed}" / name / "result.json").exists()
                    result = self.run(cfg, parallel, name, seed, interrupt=interrupt, observe=self._report(cfg))
                    done.get(name, []).append(result)
                    if parallel.main and not old:
                        self.console.print(f"seed {seed}  {one_run(name, result, self.metric)}", markup=False)
                    if parallel.any(bool(interrupt)):
                        raise Stopped(interrupt.signal or signal.SIGTERM, folder)
        if parallel.main:
            self.card(cfg, folder, done)
        return 0

    def _report(self, cfg: S) -> Callable[[str, Run], None]:
        """Return an observer that prints, on a terminal, what the last strategy trains in each phase."""

        def observe(event: str, run: Run) -> None:
            if event == "phase" and run.parallel.main and run.bar and run.seed == cfg.seed:
                phase = run.plan[run.phase_index]
                if run.folder.name == cfg.strategy[-1]:
                    report = trainability_report(run.model, run.optimizer, phase, run.head, seed=run.seed)
                    self.console.print(report)

        return observe

    def start(self, cfg: S, args: Sequence[str]) -> int | None:
        """Do what the settings ask for; return the exit status."""
        resume = cfg.resume
        if resume:
            if replace(cfg, resume=None) != self.settings:
                raise InputError("--resume goes on with the job's own settings; leave out the other options")
            cfg = type(self.settings)(**load_config(resume) | {"log_dir": resume})
        cfg = replace(cfg, device=resolve_device(cfg.device))
        parallel = parallel_from_env(verify_kind(cfg.parallel) if cfg.verify else cfg.parallel, cfg.device)
        folder = cfg.log_dir or f"runs/{self.name}/{job_time(parallel)}"
        if restarted(folder):
            cfg = type(self.settings)(**load_config(folder))
        elif not resume:
            cfg = self.resolve(replace(cfg, amp=resolve_amp(cfg.amp, cfg.device)))
            cfg = replace(cfg, log_dir=folder)
        trial = partial(self.trial, cfg, parallel)
        if cfg.verify:
            return verify(trial, [self.file, *args], self.console, parallel)
        if cfg.dry_run:
            return dry_run(trial, self.console, parallel)
        if cfg.lr_find:
            return trial(Path(folder), observe=RateFinder(cfg.strategy[-1], self.console))
        status = self.special(cfg, parallel)
        return self.job(cfg, parallel) if status is None else status

    def main(self, args: Sequence[str] | None = None) -> int:
        """Read the command line and do the job; return the exit status."""
        args = list(sys.argv[1:] if args is None else args)
        given = {arg.split("=")[0] for arg in args}
        default = next((real for option, real in self.real.items() if option in given), self.settings)
        options = {"prog": f"recipes/{self.name}.py", "description": self.doc, "console_outputs": speaks()}
        cfg = tyro.cli(type(self.settings), args=args, default=default, **options)
        return exit_status(lambda: self.start(cfg, args))


def not_trained(folder: Path, reason: str, **figures: Any) -> dict[str, Any]:
    """Write the result of a run that trains nothing, such as a pretrained model as it is, and return it."""
    return save_json(folder / "result.json", {"history": [], "seconds": 0.0, "reason": reason, **figures})
