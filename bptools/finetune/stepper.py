"""One optimizer step, done right: accumulate, unscale, clip, step, schedule.

A step takes a *window* of batches and treats it as one large batch, over all processes: each batch's mean loss is
weighed by its share of the window's items (samples, or tokens that count), so unequal batches and a short last
window give the gradient of the whole. The mean of the batches' means does not: with 500, 20, 20 and 20 tokens its
gradient is more than twice too long.

A step that cannot be taken leaves weights, optimizer and running statistics as they were. One that does not fit in
memory is taken in smaller pieces.
"""

import logging
import math
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LRScheduler

from bptools import memory
from bptools.diagnose import GradientFlow, NonFiniteError, detect_nonfinite
from bptools.optim import StepInBackward

from .batches import Batch, LossFn, count_samples, split_batch, to_device
from .devices import AMP_DTYPES, resolve_amp
from .distributed import Parallel
from .ema import Ema
from .errors import InputError, one_line
from .norms import Movement, clip_gradients, number
from .rewind import Rewind

LOG = logging.getLogger("bptools.finetune")
LONE = Parallel()
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "ALLOC_FAILED")  # CPU, Windows, CUDA's libraries
LEAST_SCALE = 2.0**-10  # a gradient that overflows at that is not finite at any


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        loss: Mean loss over the window's items, in all processes.
        norm: Norm of the gradient before clipping; NaN where the step was taken within the backward pass, as there
            is no whole gradient then.
        clipped: Share of the gradient that was clipped, 0 to 1: all of it or nothing by norm, the share of its
            elements by value, of the units (rows, channels) where it is adaptive.
        skipped: Whether the scaler skipped the step because a gradient was not finite.
        samples: Items in the window, in all processes.
        ratios: For each parameter group the norm of the update over that of the weights, 0 where nothing trains;
            empty if it was not measured.
    """

    loss: float
    norm: float
    clipped: float
    skipped: bool
    samples: int
    ratios: tuple[float, ...] = ()


class Stepper:
    """Owns the order of an optimizer step, with its gradient scaler and schedule.

    Args:
        model: The model, on ``device``.
        optimizer: Steps the model's parameters.
        loss_fn: Called under autocast with what to call in the model's place and a batch on ``device``; returns
            the *mean* loss over the batch's items. :func:`supervised` makes one.
        count: Returns the number of items of a batch; see :func:`count_samples` and :func:`count_tokens`.
        amp: ``"bf16"``, ``"fp16"`` (with a gradient scaler) or ``"off"``.
        clip: The limit of clipping, or ``None`` for no clipping.
        clip_by: What is limited: ``"norm"``, the norm of the whole gradient; ``"value"``, each element;
            ``"adaptive"``, the norm of each unit's gradient as a part of its weights' norm.
        clip_exclude: Parameters whose gradients clipping leaves as they are; adaptive clipping is not for the last
            layer's.
        device: Where batches are moved before they are used.
        ema: Updated after each step that was not skipped.
        lean: Keep less for the backward pass, by :func:`bptools.lean`.
        in_backward: Step each parameter within the backward pass and free its gradient, by
            :class:`bptools.optim.StepInBackward`. Windows are then of one batch.
        ratios_every: Measure the ratio of update and weights on each step that is a multiple of this; 0 for never.
        parallel: The processes that take each step together, each with its own part of each batch.
        module: What is called in the model's place: what ``parallel.wrap(model)`` returned, before the optimizer
            was made; by default the model.

    Attributes:
        model: The model itself.
        module: What is called.
        schedule: Stepped after each step that the scaler did not skip; set one for each phase.
        most: The most samples that are passed through at once, since more did not fit in memory; ``None`` before.

    Raises:
        ValueError: If an option is none of these or contradicts another.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn,
        *,
        count: Callable[[Batch], int] = count_samples,
        amp: str = "off",
        clip: float | None = None,
        clip_by: str = "norm",
        clip_exclude: Iterable[nn.Parameter] = (),
        device: torch.device | str = "cpu",
        ema: Ema | None = None,
        lean: bool = False,
        in_backward: bool = False,
        ratios_every: int = 0,
        parallel: Parallel = LONE,
        module: nn.Module | None = None,
    ):
        if clip is not None and not clip > 0:
            raise ValueError(f"clip: expected a positive number or None, got {clip}")
        if clip_by not in ("norm", "value", "adaptive"):
            raise ValueError(f"clip_by: expected one of norm, value, adaptive, got {clip_by!r}")
        if ratios_every < 0:
            raise ValueError(f"ratios_every: expected 0 or more steps, got {ratios_every}")
        if parallel.size > 1 and module is None:
            raise ValueError(
                f"module: expected what parallel.wrap returned, for {parallel.size} processes, got none"
            )
        self.device = torch.device(device)
        self.amp = resolve_amp(amp, self.device)
        for name, parameter in model.named_parameters():
            if self.amp == "fp16" and parameter.requires_grad and parameter.dtype == torch.float16:
                raise ValueError(f"model: expected float32 weights under fp16, got float16 in {name!r}")
        fused = lean and any(group.get("fused") for group in optimizer.param_groups)
        contradictions = (
            (clip is not None, f"clip={clip}, which needs the whole gradient"),
            (self.amp == "fp16", "amp='fp16', whose scaler may skip the step afterwards"),
            (parallel.size > 1, f"{parallel.size} processes, whose gradients are exchanged first"),
            (fused, "lean with a fused optimizer, which changes weights unseen"),
        )
        for wrong, what in contradictions:
            if in_backward and wrong:
                raise ValueError(f"in_backward: cannot be had with {what}")
        self.model, self.optimizer, self.loss_fn, self.count = model, optimizer, loss_fn, count
        self.clip, self.clip_by, self.clip_exclude = clip, clip_by, {id(p) for p in clip_exclude}
        self.ema, self.ratios_every, self.parallel = ema, ratios_every, parallel
        self.module = model if module is None else module
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")
        self.schedule: LRScheduler | None = None
        self.most: int | None = None
        self.steps = 0
        self._lean = memory.lean if lean else nullcontext
        self._in_backward = StepInBackward(optimizer) if in_backward else None

    def backward(self, window: Sequence[Batch]) -> float:
        """Make the gradient of the mean loss of ``window``, times the scaler's scale, and return the loss.

        Raises:
            ValueError: If no item of the window counts.
            InputError: As :meth:`step` does.
        """
        return self._gradient(window, self._total(window), Rewind(self.model, self.device))

    def autocast(self) -> torch.autocast:
        """Return the autocast context of this precision; a context without effect when it is off."""
        return torch.autocast(self.device.type, AMP_DTYPES[self.amp], enabled=self.amp != "off")

    def rewrap(self) -> None:
        """Have the other processes know what trains, after ``requires_grad`` changed."""
        self.module = self.parallel.rewrap(self.module)

    def step(self, window: Sequence[Batch], watch: GradientFlow | None = None) -> StepResult:
        """Take one optimizer step on all the batches of ``window``.

        Where it runs out of memory, half as many samples are passed through at once, from here on, and the same
        step is taken; a warning is logged. Batch norm then normalises with fewer samples.

        Args:
            window: Batches that count as one.
            watch: Sees the passes, and the gradient before it is clipped.

        Raises:
            FloatingPointError: If the gradient is not finite and no scaler is there to skip the step, or it has
                skipped dozens in a row. It names the operation that made the first NaN or infinity, which a second
                pass finds. Weights, optimizer, running statistics and random state are as before.
                Within the backward pass only the loss can be looked at.
            InputError: If one sample by itself does not fit in memory; or a batch, where the step cannot be taken
                again: within the backward pass, and with other processes, which wait for this one.
            ValueError: If no item of the window counts, or it has several batches where ``in_backward``.
        """
        if self._in_backward and len(window) != 1:
            raise ValueError(f"window: expected one batch, as in_backward steps on each, got {len(window)}")
        if self._in_backward and watch:
            raise ValueError("watch: cannot be had with in_backward, which frees the gradients to be watched")
        total = self._total(window)
        measured = self.ratios_every and (self.steps + 1) % self.ratios_every == 0
        movement = Movement(self.optimizer) if measured else None
        rewind = Rewind(self.model, self.device)
        try:
            with watch or nullcontext():
                loss = self._gradient(window, total, rewind)
                if watch:
                    watch.scale = self.scaler.get_scale()
            norm, clipped, skipped = self._update(loss)
        except (FloatingPointError, InputError) as error:
            rewind.buffers()
            rewind.random()
            if isinstance(error, FloatingPointError) and (origin := self._origin(window, total, rewind)):
                raise FloatingPointError(f"{error}; {origin}") from error
            raise
        self.steps += 1
        if skipped:
            rewind.buffers()
        else:
            if self.schedule is not None:
                self.schedule.step()
            if self.ema is not None:
                self.ema.update(self.model)
        ratios = movement.ratios() if movement else ()
        return StepResult(loss, norm, clipped, skipped, int(total), ratios)

    def _total(self, window: Sequence[Batch]) -> float:
        """Count the items of ``window`` in all processes."""
        (total,) = self.parallel.sum([sum(map(self.count, window))])
        if not total:
            raise ValueError(f"window: expected items that count, got none in {len(window)} batches")
        return total

    def _gradient(self, window: Sequence[Batch], total: float, rewind: Rewind) -> float:
        """Make the gradient of the window's mean loss, in pieces that fit in memory; return the loss."""
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                loss = self._accumulate([p for batch in window for p in split_batch(batch, self.most)], total)
                return self.parallel.sum([float(loss)])[0]
            except RuntimeError as error:
                if not (isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in OUT_OF_MEMORY)):
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold what was computed so far
                largest = max(map(count_samples, window))
                self._halve(largest if self.most is None else min(largest, self.most), error)
            rewind.buffers()
            rewind.random()

    def _accumulate(self, pieces: Sequence[Batch], total: float) -> float | Tensor:
        """Add up the gradients of ``pieces``; return their part of the mean loss, still on the device."""
        others = self.parallel.size > 1  # who wait for each of this process's parts
        counted = [(piece, count) for piece in pieces if (count := self.count(piece)) or others]
        loss_sum = 0.0
        for i, (piece, count) in enumerate(counted, 1):
            with self.parallel.accumulating(self.module, last=i == len(counted)):
                with self.autocast(), self._lean():
                    loss = self.loss_fn(self.module, to_device(piece, self.device))
                loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
                if not count:
                    loss = loss.nan_to_num(0.0, 0.0, 0.0)  # the mean of nothing, whose gradient is 0 then
                loss_sum += loss.detach() * (count / total)
                self._backward(loss * (count / total * self.parallel.size))  # DDP and FSDP average
        return loss_sum

    def _origin(self, window: Sequence[Batch], total: float, rewind: Rewind) -> str:
        """Say where the first value that is not finite is made, by passing ``window`` through once more."""
        if self._in_backward or self.parallel.size > 1:  # weights would be stepped, or others be waited for
            return ""
        words = ""
        try:
            with detect_nonfinite() as seen:
                self._accumulate([p for batch in window for p in split_batch(batch, self.most)], total)
            words = f"first infinity: {seen.infinity.brief}" if seen.infinity else ""
        except NonFiniteError as error:
            words = f"first NaN: {error.origin.brief}"
            words += f"; last infinity before it: {error.infinity.brief}" if error.infinity else ""
        except Exception:  # whatever it is, the first error is the one to be told
            LOG.debug("where the first value that is not finite is made cannot be told", exc_info=True)
        self.optimizer.zero_grad(set_to_none=True)
        rewind.buffers()
        rewind.random()
        return words

    def _backward(self, loss: Tensor) -> None:
        if not self._in_backward:
            self.scaler.scale(loss).backward()
            return
        if not loss.isfinite():
            raise FloatingPointError(f"loss is {loss.item()}; the step was not taken. Lower the learning rate")
        with self._in_backward:
            loss.backward()

    def _halve(self, samples: int, error: RuntimeError) -> None:
        """Have half of the ``samples`` that were too many be the most."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        reason = f"does not fit in memory ({one_line(error)})"
        if samples == 1:
            raise InputError(f"--batch-size: one sample by itself {reason}") from error
        if self._in_backward or self.parallel.size > 1:
            raise InputError(f"--batch-size: a batch of {samples} {reason}; choose a smaller one") from error
        self.most = (samples + 1) // 2
        normed = any(isinstance(m, _BatchNorm) and m.training for m in self.model.modules())
        note = "; batch norm sees no more either" if normed else ""
        LOG.warning("out of memory: micro-batches are cut in %d samples or less from here on%s", self.most, note)

    def _update(self, loss: float) -> tuple[float, float, bool]:
        """Unscale, clip and step; return the norm before clipping, the share clipped, whether it was skipped."""
        if self._in_backward:
            return math.nan, 0.0, False
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        total_norm = get_total_norm([p.grad for p in parameters])
        norm, scale = number(total_norm), self.scaler.get_scale()
        finite = not self.parallel.any(not math.isfinite(norm + loss))
        if not finite and (not self.scaler.is_enabled() or scale < LEAST_SCALE):
            what = f"gradient norm is {norm} at loss {loss:.4g}"
            raise FloatingPointError(f"{what}; the step was not taken. Lower the learning rate or clip")
        clipped = 0.0
        if finite and self.clip is not None:
            chosen = [p for p in parameters if id(p) not in self.clip_exclude]
            clipped = clip_gradients(chosen, self.clip, self.clip_by, total_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm, clipped, self.scaler.get_scale() < scale

    def state_dict(self) -> dict:
        """Return the states of scaler and schedule, and the counts; optimizer and averages have their own."""
        return {
            "scaler": self.scaler.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "steps": self.steps,
            "most": self.most,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned; enter the phase and set its schedule first."""
        self.scaler.load_state_dict(state["scaler"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.steps, self.most = state["steps"], state["most"]
