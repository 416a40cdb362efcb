"""What a run shows while it trains: a line with a progress bar, and TensorBoard.

A resumed run's curves go on as if nothing had happened. A killed process may have logged more than it saved, and
TensorBoard can forget whole steps only. So what was logged at the saved step is saved too: everything from that
step on is forgotten, and it is written again.
"""

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary
from tqdm import tqdm

from bptools.diagnose import GradientFlow

from .stepper import StepResult

logger = logging.getLogger("bptools.finetune")
ROOM = 30  # columns without which the line does not show the time
SUMS = ("loss", "items", "steps", "clipped", "skipped")  # over the epoch; loss times items


class _Events:
    """A file of TensorBoard's; if it cannot be written, a warning says so and nothing more is written.

    torch's SummaryWriter writes in a thread: on a full disk that one dies with a traceback, and every later call
    raises, ``close`` too.

    Args:
        folder: Where the file goes; ``None`` for no file.
        step: What files in this folder say of this step and later ones is forgotten.
    """

    def __init__(self, folder: Path | None, step: int):
        self._file = None
        if folder is None:
            return
        with self._careful():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / f"events.out.tfevents.{time.time_ns()}", "wb")  # noqa: SIM115
            self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    @contextmanager
    def _careful(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.warning("TensorBoard's file cannot be written, training goes on without it: %s", error)
            self._forget()

    def _forget(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()

    __del__ = _forget

    def _write(self, event: Event) -> None:
        if self._file is not None:
            event.wall_time = time.time()
            with self._careful():
                self._records.write(event.SerializeToString())

    def add(self, step: int, *summaries: Summary) -> None:
        for one in summaries:
            self._write(Event(step=step, summary=one))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.add(step, Summary(value=[Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]))

    def figure(self, step: int, tag: str, figure: Figure) -> None:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        self.add(step, summary.image(tag, np.asarray(canvas.buffer_rgba())[..., :3], dataformats="HWC"))

    def flush(self) -> None:
        if self._file is not None:
            with self._careful():
                self._file.flush()

    def close(self) -> None:
        self.flush()
        self._forget()


class _Bar(tqdm):
    """A line as timm prints it. The bar takes the room that is left, so that the line never wraps."""

    figures: Mapping[str, float] = {}

    @property
    def format_dict(self) -> dict[str, Any]:
        known = super().format_dict
        line = "{desc} {percentage:3.0f}%|{bar}|" if known["total"] else "{desc} {n_fmt}{unit}"
        if self.figures:
            line += " loss {loss:.3f} ({mean:.3f}) {rate_noinv_fmt} lr {lr:.1e} wait {wait:.0%}"
        if (known["ncols"] or 0) - len(self.desc) - 57 >= ROOM:
            line += " [{elapsed}<{remaining}]" if known["total"] else " [{elapsed}]"
        return {**known, **self.figures, "bar_format": line}


def _peak_memory() -> float:
    """Return the peak memory in MiB: of tensors on a GPU since the last call, else of the process so far."""
    if not torch.cuda.is_initialized():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    devices = range(torch.cuda.device_count())
    peak = max(map(torch.cuda.max_memory_allocated, devices)) / 2**20
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    return peak


class Monitor:
    """Progress bar and TensorBoard of one run. If TensorBoard's file cannot be written, a warning says so once.

    Args:
        folder: Where TensorBoard's files go.
        title: Name of the run, shown before the bar.
        items: Items in the whole run, for the bar; ``None`` if that is not known.
        unit: What they are called.
        bar: Whether to show the bar.
        main: Whether this process is the one that shows and writes; others only keep count.
        state: What :meth:`state_dict` returned, on a resumed run.
    """

    def __init__(
        self,
        folder: Path,
        title: str,
        items: int | None,
        *,
        unit: str = "img",
        bar: bool,
        main: bool = True,
        state: dict | None = None,
    ):
        state = state or {"step": 0, "seen": 0, "sums": dict.fromkeys(SUMS, 0.0), "logged": {}, "wait": {}}
        self.taken, self.seen, self.unit = state["step"], state["seen"], unit
        self._sums, self._logged = dict(state["sums"]), dict(state["logged"])
        self._measured = {"wait": 0.0, "seconds": 0.0, "logged": {}, **state["wait"]}
        self._events = _Events(folder if main else None, self.taken)
        self._bar = _Bar(
            total=items, initial=self.seen, desc=title, unit=f" {unit}", unit_scale=True, leave=False,
            dynamic_ncols=True, mininterval=0.25, disable=not (bar and main),
        )  # fmt: skip
        self._before = time.perf_counter()
        if again := self._logged | self._measured["logged"]:
            self._events.scalars(self.taken, again)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, the sums of the epoch that has begun, and what was logged at the step of now.

        Also sees to it that everything up to now is in TensorBoard's file. What was measured of time and memory,
        and so differs from run to run, is under ``"wait"``.
        """
        self._events.flush()
        measured = {**self._measured, "logged": dict(self._measured["logged"])}
        counts = {"step": self.taken, "seen": self.seen}
        return {**counts, "sums": dict(self._sums), "logged": dict(self._logged), "wait": measured}

    def step(self, result: StepResult, groups: Sequence[dict], *, wait: float = 0.0) -> None:
        """Log one optimizer step, and show it in the bar.

        Args:
            result: What the step did.
            groups: The optimizer's, each with ``lr``, ``depth`` and ``decays``.
            wait: Seconds that the step waited for its data.
        """
        now = time.perf_counter()
        seconds, self._before = now - self._before, now
        self.taken += 1
        self.seen += result.samples
        finite = math.isfinite(result.loss)  # it may not be in a step that the scaler skipped
        added = (result.loss * result.samples if finite else 0.0, result.samples if finite else 0, 1)
        for name, value in zip(SUMS, (*added, result.clipped, result.skipped), strict=True):
            self._sums[name] += value
        self._measured["wait"] += wait
        self._measured["seconds"] += seconds
        self._measured["logged"] = {}

        self._logged = {"train/loss": result.loss}
        if not math.isnan(result.norm):
            self._logged["train/gradient norm"] = result.norm
        if result.ratios:
            for group, ratio in zip(groups, result.ratios, strict=True):
                if group["decays"] and ratio:  # biases begin at 0, where the ratio says nothing
                    self._logged[f"update ratio/depth {group['depth']:02d}"] = ratio
        self._events.scalars(self.taken, self._logged)
        lr = max(group["lr"] for group in groups)
        share = min(1.0, wait / seconds) if seconds else 0.0
        self._bar.figures = {"loss": result.loss, "mean": self.mean_loss(), "lr": lr, "wait": share}
        self._bar.update(result.samples)

    def flow(self, flow: GradientFlow) -> None:
        """Log what :func:`bptools.diagnose.gradient_flow` saw of the last step."""
        scalars = flow.scalars()
        self._logged |= scalars
        self._events.scalars(self.taken, scalars)
        self._events.figure(self.taken, "gradient flow", flow.figure())

    def mean_loss(self) -> float:
        """Return the mean loss over the items of this epoch so far."""
        return self._sums["loss"] / max(1, self._sums["items"])

    def epoch(self, groups: Sequence[dict], **scalars: float) -> None:
        """Log the end of an epoch: ``scalars``, its means, the rate of each depth, speed and peak memory."""
        steps, seconds = max(1, self._sums["steps"]), max(1e-9, self._measured["seconds"])
        figures = {
            "train/mean loss": self.mean_loss(),
            "train/share clipped": self._sums["clipped"] / steps,
            "train/share skipped": self._sums["skipped"] / steps,
            **{f"lr/depth {group['depth']:02d}": group["lr"] for group in groups},
            **scalars,
        }
        measured = {
            f"speed/{self.unit} per second": self._sums["items"] / seconds,
            "speed/share waiting for data": self._measured["wait"] / seconds,
            "memory/peak MiB": _peak_memory(),
        }
        self._events.scalars(self.taken, figures | measured)
        self._events.flush()
        self._logged |= figures
        self._measured = {"wait": 0.0, "seconds": 0.0, "logged": measured}
        self._sums = dict.fromkeys(SUMS, 0.0)
        self._before = time.perf_counter()  # the validation was no training

    def finish(
        self, settings: dict, metrics: Mapping[str, float], figures: Mapping[str, Figure], **texts: str
    ) -> None:
        """Log the settings and what the test came to, in figures and pictures; then close.

        Args:
            settings: Of the run.
            metrics: What was measured on the test data, by name.
            figures: Pictures of it, such as :func:`bptools.finetune.image_figures` makes, by name.
            texts: Words in Markdown, such as samples of what a model writes, by name.
        """
        plain = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in settings.items()}
        metrics = {f"test/{name}": value for name, value in metrics.items()}
        config = f"```json\n{json.dumps(settings, indent=2, default=str)}\n```"
        self._events.add(self.taken, summary.text("config", config), *summary.hparams(plain, metrics))
        self._events.scalars(self.taken, metrics)
        for name, figure in figures.items():
            self._events.figure(self.taken, f"test/{name}", figure)
        self._events.add(self.taken, *(summary.text(f"test/{name}", text) for name, text in texts.items()))
        self.close()

    def clear(self) -> None:
        """Take the bar off the screen, for something else to be printed; the next step shows it again."""
        self._bar.clear()

    def close(self) -> None:
        """Close the bar and TensorBoard's file."""
        self._bar.close()
        self._events.close()
