"""Finding a learning rate: raise it from far too low to far too high, step by step, and watch the loss.

At first the loss stays, then it falls, and then it diverges. A rate that trains well lies on the slope. The search
takes real steps, and afterwards everything is as it was.

Sources: Smith, arXiv 1506.01186; the smoothing, the end and the suggestions follow fastai's ``lr_find``.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console

from .batches import Batch, windows
from .card import COLOURS
from .checkpoint import random_state, set_random_state
from .run import Run
from .stepper import Stepper


@dataclass(frozen=True)
class RateFinding:
    """What a search for a learning rate has seen.

    Attributes:
        rates: The largest group's rate at each step, in rising order; at least two.
        losses: The loss at each, before the step was taken.
        smoothed: Their exponential average.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]

    @property
    def steepest(self) -> float:
        """The rate at which the smoothed loss falls fastest, over the logarithm of the rate.

        The first tenth of the steps, averages of few losses, and what follows the minimum are left out.
        """
        smoothed, start = np.array(self.smoothed), len(self.smoothed) // 10
        end = start + max(2, smoothed[start:].argmin() + 1)
        return self.rates[start + np.gradient(smoothed[start:end], np.log(self.rates[start:end])).argmin()]

    @property
    def valley(self) -> float:
        """The rate in the middle of the longest stretch in which the smoothed loss keeps falling, by and large."""
        falls = np.ones(len(self.smoothed), dtype=int)  # length of the longest falling subsequence that ends here
        for i, loss in enumerate(self.smoothed):
            falls[i] += max((falls[j] for j in range(i) if self.smoothed[j] > loss), default=0)
        end = int(falls.argmax())
        return self.rates[end - int(falls[end]) // 2]

    @property
    def suggestion(self) -> float:
        """The geometric mean of :attr:`steepest` and :attr:`valley`.

        On scikit-learn's digits (a small network from scratch, a pretrained one, the head alone; AdamW and SGD)
        the best constant rate was about one to four times as high. It was up to 14 times as high as the valley,
        while the steepest point, as the average lags behind, was up to 6 times too high: near to divergence.
        """
        return math.sqrt(self.steepest * self.valley)

    def figure(self) -> Figure:
        """Return a figure of the loss over the rate, with the suggestion marked."""
        rates, smoothed, chosen = np.array(self.rates), np.array(self.smoothed), self.suggestion
        low, high = min(self.losses), smoothed[: smoothed.argmin() + 1].max()  # divergence goes out of the picture
        margin = 0.1 * (high - low or abs(low) or 1.0)
        height = np.interp(math.log(chosen), np.log(rates), smoothed)
        with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
            figure = Figure(figsize=(7.5, 4.5), layout="constrained")
            axes = figure.subplots()
            axes.scatter(rates, self.losses, s=10, alpha=0.3, lw=0, color=COLOURS[0], label="loss of each step")
            axes.plot(rates, smoothed, lw=2, color=COLOURS[0], label="smoothed")
            axes.axvline(chosen, lw=1, ls="--", color=COLOURS[1])
            axes.plot([chosen], [height], "o", ms=8, color=COLOURS[1], zorder=3)
            axes.annotate(
                f"suggestion {chosen:.1e}", (chosen, 0.98), (8, 0), xycoords=axes.get_xaxis_transform(),
                textcoords="offset points", va="top", color=COLOURS[1], fontweight="bold",
            )  # fmt: skip
            axes.set_xscale("log")
            axes.set_ylim(low - margin, high + 3 * margin)
            axes.set(xlabel="learning rate", ylabel="training loss")
            axes.set_title("Loss while the learning rate rises", loc="left", fontweight="bold")
            axes.grid(alpha=0.25)
            axes.legend(loc="lower left", frameon=False)
        return figure

    def save(self, path: str | Path) -> None:
        """Save the figure as a PNG file."""
        self.figure().savefig(path, dpi=110, format="png")


def lr_find(
    stepper: Stepper,
    windows: Iterable[Sequence[Batch]],
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.9,
    stop_factor: float = 4.0,
) -> RateFinding:
    """Raise the rate exponentially from ``low`` to ``high`` over ``steps`` steps, and return what the loss did.

    It ends early where the loss diverges or is not finite. Then weights, buffers, optimizer, scaler, schedule,
    averages and random states are as they were, to the bit; gradients are dropped.

    Args:
        stepper: Takes the steps, with its clipping and precision. Enter the phase first: what is frozen stays so.
        windows: Of batches; they are gone through again and again.
        low: The first rate, of the group with the largest ``initial_lr``; the others' are in proportion.
        high: The last one.
        steps: Most optimizer steps.
        smoothing: Share that the average of the loss keeps of itself at each step, in [0, 1).
        stop_factor: It has diverged where the average is so many times its lowest value.

    Raises:
        FloatingPointError: If the loss is not finite at the lowest rates already.
        ValueError: If an option is out of its range, or ``windows`` is empty or can be gone through only once.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"low, high: expected 0 < low < high, got {low} and {high}")
    if steps < 2:
        raise ValueError(f"steps: expected at least 2, got {steps}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: expected a share in [0, 1), got {smoothing}")
    if not stop_factor > 1:
        raise ValueError(f"stop_factor: expected more than 1, got {stop_factor}")
    rates, losses, smoothed = [], [], []
    average = 0.0
    with _rehearsal(stepper) as rehearsal:
        groups = rehearsal.optimizer.param_groups
        peaks = [group.get("initial_lr", group["lr"]) for group in groups]
        for rate, window in zip(np.geomspace(low, high, steps).tolist(), _cycle(windows), strict=False):
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = rate * peak / max(peaks)
            try:
                loss = rehearsal.step(window).loss
            except FloatingPointError:
                break
            if not math.isfinite(loss):  # under a scaler, which skips the step
                break
            average = smoothing * average + (1 - smoothing) * loss
            rates.append(rate)
            losses.append(loss)
            smoothed.append(average / (1 - smoothing ** len(rates)))
            best = min(smoothed)
            if smoothed[-1] > best + (stop_factor - 1) * abs(best):
                break
    if len(rates) < 2:
        raise FloatingPointError(f"the loss is not finite at a learning rate of {rate:.1e}")
    return RateFinding(tuple(rates), tuple(losses), tuple(smoothed))


@contextmanager
def _rehearsal(stepper: Stepper) -> Iterator[Stepper]:
    """Give a stepper of the same model and optimizer, and undo at the end whatever it did to them."""
    rehearsal = copy.copy(stepper)
    rehearsal.schedule, rehearsal.ema, rehearsal.ratios_every = None, None, 0
    rehearsal.scaler = copy.deepcopy(stepper.scaler)
    model, optimizer = stepper.model, stepper.optimizer
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    options = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    state, random = dict(optimizer.state), random_state()
    optimizer.state.update({p: copy.deepcopy(of_p) for p, of_p in state.items()})
    try:
        yield rehearsal
    finally:
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, before in weights.items():
                model.get_parameter(name).copy_(before)
            for name, before in buffers.items():
                model.get_buffer(name).copy_(before)
        for group, before in zip(optimizer.param_groups, options, strict=True):
            group.update(before)
        optimizer.state.clear()
        optimizer.state.update(state)
        set_random_state(random)


def _cycle(windows: Iterable[Sequence[Batch]]) -> Iterator[Sequence[Batch]]:
    while True:
        window = None
        for window in windows:
            yield window
        if window is None:
            raise ValueError("windows: expected one or more, that can be gone through again; there are none")


class RateFound(Exception):
    """The rate was searched for instead of training.

    Args:
        finding: What was seen.
        path: The picture of it.
    """

    def __init__(self, finding: RateFinding, path: Path):
        super().__init__(f"learning rate {finding.suggestion:.1e}: {path}")
        self.finding, self.path = finding, path


class RateFinder:
    """An observer of runs that searches for the rate of the first phase it sees of one run, and ends that.

    Args:
        name: Name of the run's folder; other runs are left alone.
        console: Where to print.
    """

    def __init__(self, name: str, console: Console):
        self.name, self.console = name, console

    def __call__(self, event: str, run: Run) -> None:
        """Search at the event ``"phase"``, print the suggestion, and save ``lr_find.png`` in the job's folder.

        Raises:
            RateFound: At the end of the search.
        """
        if event != "phase" or run.folder.name != self.name:
            return
        epochs = chain.from_iterable(windows(run.loader(epoch), run.accumulate) for epoch in count())
        finding = lr_find(run.stepper, epochs)
        path = run.folder.parents[1] / "lr_find.png"
        run.monitor.close()
        if run.parallel.main:
            finding.save(path)
            phase = f"phase {run.phase_index + 1} of {self.name}, {run.plan[run.phase_index]}"
            for line in (f"suggested learning rate: {finding.suggestion:.1e}", f"for {phase}; picture: {path}"):
                self.console.print(line, soft_wrap=True, markup=False, highlight=False)
        raise RateFound(finding, path)
