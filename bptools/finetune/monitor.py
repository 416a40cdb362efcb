"""What a run shows while it trains: a progress bar and TensorBoard."""

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .card import confusion_figure
from .evaluation import Evaluation
from .stepper import StepResult

LAYOUT = "{desc} {percentage:3.0f}%|{bar}| "
RECENT = 0.9  # weight of the past in the speed and the wait that the bar shows
SUMS = ("steps", "samples", "loss", "clipped", "skipped")  # of an epoch


def peak_memory() -> float:
    """Return the most memory in MiB so far: tensors on CUDA where it is in use, else the process on the CPU."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def short_number(value: float) -> str:
    """Return ``"87"``, ``"1.2k"`` or ``"35k"``."""
    return f"{value:.0f}" if value < 1000 else tqdm.format_sizeof(value)


def group_names(groups: Sequence[dict]) -> list[str]:
    """Return a name for each optimizer group, by depth; groups without weight decay beside others say so."""
    depths = [group["depth"] for group in groups]
    return [
        f"depth {group['depth']:02d}"
        + (" no decay" if depths.count(group["depth"]) > 1 and not group.get("weight_decay") else "")
        for group in groups
    ]


class Monitor:
    """Progress bar and TensorBoard of one run; where a disk is full, it warns once and logs no more.

    Args:
        folder: Where TensorBoard's files go.
        title: Name of the run, shown before the bar.
        samples: Samples in the whole run, for the bar.
        bar: Whether to show the bar.
        unit: What a sample is, such as ``"img"``, ``"tok"`` or ``"seq"``.
        main: Whether this is the process that shows and logs; the others only keep the averages.
        state: What :meth:`state_dict` returned, on a resumed run.
    """

    def __init__(
        self, folder: Path, title: str, samples: int, *, bar: bool, unit: str = "img", main: bool = True,
        state: dict | None = None,
    ):  # fmt: skip
        state = state or {"step": 0, "seen": 0, "sums": dict.fromkeys(SUMS, 0.0), "last": {}}
        self.taken, self.seen, self.unit = state["step"], state["seen"], unit
        self.sums, self.last = dict(state["sums"]), dict(state["last"])
        self.recent = [0.0, 0.0, 0.0]  # seconds, samples, seconds of waiting
        self.then = time.perf_counter()
        self.bar = tqdm(
            total=samples, initial=self.seen, desc=title, leave=False, disable=not (bar and main),
            dynamic_ncols=True, bar_format=LAYOUT,
        )  # fmt: skip
        self.writer: SummaryWriter | None = None
        if main:
            self._try(lambda: self._open(folder))
        self._write(self.last)

    def _open(self, folder: Path) -> None:
        # The last step's scalars are purged and written again: the state may be older than they are.
        self.writer = SummaryWriter(str(folder), purge_step=max(1, self.taken))

    def _try(self, log: Callable[[], None]) -> None:
        try:
            log()
        except OSError as error:
            self.writer = None
            logging.getLogger("bptools.finetune").warning("TensorBoard's log ends here: %s", error)

    def _write(self, scalars: dict[str, float]) -> None:
        def log() -> None:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, self.taken)

        if self.writer:
            self._try(log)

    def state_dict(self) -> dict:
        """Return steps and samples so far, the sums of the epoch that has begun and the last step's scalars."""
        return {"step": self.taken, "seen": self.seen, "sums": dict(self.sums), "last": dict(self.last)}

    def step(self, result: StepResult, groups: Sequence[dict], *, wait: float = 0.0) -> None:
        """Show one optimizer step.

        Args:
            result: What the step did.
            groups: The optimizer's groups, with their depths.
            wait: Seconds that the step had to wait for its data.
        """
        now = time.perf_counter()
        self.recent = [
            RECENT * old + new
            for old, new in zip(self.recent, (now - self.then, result.samples, wait), strict=True)
        ]
        self.then = now
        self.taken += 1
        self.seen += result.samples
        new = (1, result.samples, result.loss * result.samples, float(result.clipped), float(result.skipped))
        for name, value in zip(SUMS, new, strict=True):
            self.sums[name] += value
        self.last = {"train/loss": result.loss, "train/gradient norm": result.norm}
        ratios = result.ratios
        for name, ratio in zip(group_names(groups), ratios, strict=False):
            self.last[f"update ratio/{name}"] = ratio
        self._write(self.last)
        seconds, samples, waited = self.recent
        lr = max(group["lr"] for group in groups)
        self.bar.bar_format = (  # tqdm's own postfix begins with a comma
            f"{LAYOUT}loss {result.loss:.3f} ({self.mean_loss():.3f}) "
            f"{short_number(samples / max(seconds, 1e-9))} {self.unit}/s lr {lr:.1e} "
            f"wait {100 * min(1.0, waited / max(seconds, 1e-9)):.0f}%"
        )
        self.bar.update(result.samples)

    def mean_loss(self) -> float:
        """Return the mean loss over the samples of this epoch so far."""
        return self.sums["loss"] / max(1, self.sums["samples"])

    def epoch(self, groups: Sequence[dict], **scalars: float) -> None:
        """Log the end of an epoch: ``scalars``, rates by depth, shares clipped and skipped, speed and memory."""
        steps, (seconds, samples, waited) = max(1, self.sums["steps"]), self.recent
        scalars["train/share clipped"] = self.sums["clipped"] / steps
        scalars["train/share skipped"] = self.sums["skipped"] / steps
        for group in groups:
            scalars[f"lr/depth {group['depth']:02d}"] = group["lr"]
        self.last |= scalars
        machine = {"memory/peak MiB": peak_memory()}  # not in the state, which is the same on any
        if seconds:
            machine[f"speed/{self.unit} per second"] = samples / seconds
            machine["speed/share waiting for data"] = waited / seconds
        self._write(scalars | machine)
        self.sums = dict.fromkeys(SUMS, 0.0)
        self.then = time.perf_counter()  # evaluation is not part of the next step

    def finish(
        self, settings: dict, test: Evaluation, classes: Sequence[str], mistakes: Figure | None = None
    ) -> None:
        """Log the settings, what the test came to, its confusion matrix and its mistakes; then close."""
        plain = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in settings.items()}
        metrics = {"test/accuracy": test.accuracy, "test/loss": test.loss}

        def log() -> None:
            self.writer.add_text("config", f"```json\n{json.dumps(settings, indent=2)}\n```")
            figure = confusion_figure(test.targets, test.predictions, classes)
            self.writer.add_figure("test/confusion matrix", figure, self.taken)
            if mistakes is not None:
                self.writer.add_figure("test/mistakes", mistakes, self.taken)
            self.writer.add_hparams(plain, metrics, run_name=".", global_step=self.taken)

        if self.writer:
            self._try(log)
        self.close()

    def close(self) -> None:
        """Close the bar and flush TensorBoard's files."""
        self.bar.close()
        if self.writer:
            self._try(self.writer.close)
