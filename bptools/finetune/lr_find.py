"""Search for a learning rate: raise it from step to step and watch the loss (Smith 2015, arXiv 1506.01186).

The suggestions are fastai's. The search leaves no trace: the model, the optimizer, the gradient scaler, the
averages and the random states are afterwards as they were.
"""

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from .stepper import Batch, Stepper


@dataclass(frozen=True)
class LrFinding:
    """What a search saw.

    Attributes:
        rates: Rate of the fastest group at each step.
        losses: Loss of each step's window, before the step.
        smoothed: Their running average.
        steepest: Rate at which the smoothed loss falls fastest over the logarithm of the rate.
        minimum: A tenth of the rate at which the smoothed loss is lowest.
        valley: Rate halfway through the longest fall of the smoothed loss.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    steepest: float
    minimum: float
    valley: float

    @property
    def suggestion(self) -> float:
        """The rate to train at: the valley, which depends least on single points."""
        return self.valley

    def figure(self) -> Figure:
        """Return the loss over the rate, with the suggestion marked."""
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.rates, self.losses, ".", color="#0072B2", alpha=0.25, label="loss of each step")
        axes.plot(self.rates, self.smoothed, color="#0072B2", lw=2, label="smoothed")
        height = self.smoothed[self.rates.index(self.suggestion)]
        label = f"suggestion {self.suggestion:.1e}"
        axes.axvline(self.suggestion, color="#D55E00", lw=1, ls="--")
        axes.plot([self.suggestion], [height], "o", color="#D55E00", label=label)
        low, high = min(self.losses), max(self.smoothed[0], *self.smoothed[: int(0.9 * len(self.smoothed)) + 1])
        room = 0.15 * (high - low) or 1.0
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(low - room, high + 2 * room))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        axes.legend(frameon=False, loc="best")
        return figure

    def save(self, path: Path | str) -> None:
        """Save the figure as a PNG."""
        self.figure().savefig(path, format="png", dpi=110)


@contextmanager
def _untouched(stepper: Stepper) -> Iterator[None]:
    """Put back, at the end, whatever steps may change."""
    model, optimizer = stepper.model, stepper.optimizer
    tensors = [(t, t.detach().clone()) for t in chain(model.parameters(), model.buffers())]
    states = {parameter: copy.deepcopy(state) for parameter, state in optimizer.state.items()}
    groups = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    scaler = copy.deepcopy(stepper.scaler.state_dict())
    schedule, ema = stepper.schedule, getattr(stepper, "ema", None)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    randoms = torch.get_rng_state(), np.random.get_state(), random.getstate()
    stepper.schedule = stepper.ema = None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in tensors:
                tensor.copy_(before)
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        optimizer.state.update(states)
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            for key in group.keys() - before.keys() - {"params"}:
                del group[key]
            group.update(before)
        stepper.scaler.load_state_dict(scaler)
        stepper.schedule, stepper.ema = schedule, ema
        torch.set_rng_state(randoms[0])
        np.random.set_state(randoms[1])
        random.setstate(randoms[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _shares(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return each group's own rate over the largest rate of a group that trains."""
    own = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    trains = [any(p.requires_grad for p in group["params"]) for group in optimizer.param_groups]
    top = max((lr for lr, train in zip(own, trains, strict=True) if train), default=0.0)
    if not top > 0:
        raise ValueError("stepper: expected a group that trains at a rate above 0, got none")
    return [lr / top for lr in own]


def _valley(losses: Sequence[float]) -> int:
    """Return the middle of the longest decreasing subsequence, as fastai's ``valley`` does."""
    lengths, end = [1] * len(losses), 0
    for i in range(1, len(losses)):
        lengths[i] = 1 + max((lengths[j] for j in range(i) if losses[i] < losses[j]), default=0)
        if lengths[i] > lengths[end]:
            end = i
    start = max(0, end - lengths[end])
    third = (end - start) / 3
    return start + int(third) + int(third / 2)


def lr_find(
    stepper: Stepper,
    windows: Iterable[Sequence[Batch]],
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.9,
    stop_factor: float = 4.0,
) -> LrFinding:
    """Train for up to ``steps`` steps at rates from ``low`` to ``high``, then put everything back.

    Each group's rate stays in proportion to its own ``initial_lr``; the rates reported are those of the fastest
    group that trains. The search ends early when the smoothed loss exceeds ``stop_factor`` times its lowest value,
    or when the loss or the gradient is not finite.

    Args:
        stepper: What is to be trained, in the mode in which it will be.
        windows: Windows of batches, as :meth:`Stepper.step` takes them; repeated if fewer than ``steps``.
        low: First rate, above 0.
        high: Last rate, above ``low``.
        steps: Most steps, 3 or more.
        smoothing: Weight of the past in the running average of the loss, in [0, 1).
        stop_factor: Above 1.

    Raises:
        ValueError: If an argument is out of range or ``windows`` is empty.
        FloatingPointError: If training diverges within the first three steps.
    """
    if not 0 < low < high:
        raise ValueError(f"low, high: expected 0 < low < high, got {low} and {high}")
    if steps < 3:
        raise ValueError(f"steps: expected at least 3, got {steps}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: expected a weight in [0, 1), got {smoothing}")
    if not stop_factor > 1:
        raise ValueError(f"stop_factor: expected more than 1, got {stop_factor}")
    shares = _shares(stepper.optimizer)
    rates, losses, smoothed, average = [], [], [], 0.0
    with _untouched(stepper):
        for i, window in enumerate(islice(cycle(windows), steps)):
            rate = low * (high / low) ** (i / (steps - 1))
            for group, share in zip(stepper.optimizer.param_groups, shares, strict=True):
                group["lr"] = rate * share
            try:
                loss = stepper.step(window).loss
            except FloatingPointError:
                break
            if not np.isfinite(loss):
                break
            average = smoothing * average + (1 - smoothing) * loss
            rates.append(rate)
            losses.append(loss)
            smoothed.append(average / (1 - smoothing ** (i + 1)))
            best = min(smoothed)
            if smoothed[-1] > best + (stop_factor - 1) * abs(best):
                break
        else:
            if not rates:
                raise ValueError("windows: expected at least one window of batches, got none")
    if len(rates) < 3:
        raise FloatingPointError(f"lr_find: training diverged in the first three steps, at a rate of {low:.1e}")
    slopes = np.diff(smoothed) / np.diff(np.log(rates))
    return LrFinding(
        rates,
        losses,
        smoothed,
        steepest=rates[int(slopes.argmin())],
        minimum=rates[int(np.argmin(smoothed))] / 10,
        valley=rates[_valley(smoothed)],
    )
