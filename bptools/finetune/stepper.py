"""One optimizer step, done right: accumulate, unscale, clip, step, schedule.

A step takes a *window* of batches and treats it as one large batch: each batch's mean loss is weighed by its
share of the window's samples, so unequal batches and a short last window give the gradient of the whole.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LRScheduler

from .errors import InputError

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Batch = tuple[Tensor, Tensor]


def resolve_amp(amp: str, device: torch.device | str) -> str:
    """Return ``amp``, with ``"auto"`` replaced by what the device does fast.

    That is fp16 on CUDA; bf16 on a CPU for which oneDNN has bf16 kernels (AVX-512 and up; elsewhere torch falls
    back on loops that took five times float32's time here); and off on other CPUs.

    Raises:
        ValueError: If ``amp`` is not ``"auto"``, ``"bf16"``, ``"fp16"`` or ``"off"``.
    """
    if amp == "auto":
        if torch.device(device).type == "cuda":
            return "fp16"
        fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return "bf16" if fast else "off"
    if amp not in AMP_DTYPES:
        raise ValueError(f"amp: expected one of auto, bf16, fp16, off, got {amp!r}")
    return amp


def resolve_device(device: str) -> str:
    """Return ``device``, with ``"auto"`` replaced by CUDA where there is one and the CPU elsewhere.

    Raises:
        InputError: If there is no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # the meta device fails here
    except (RuntimeError, AssertionError) as error:
        sentence = str(error).splitlines()[0].split(". ")[0]
        raise InputError(f"--device {device}: {textwrap.shorten(sentence, 120)}") from error
    return device


def windows(batches: Iterable[Batch], accumulate: int) -> Iterator[list[Batch]]:
    """Yield lists of ``accumulate`` batches; the last list may be shorter, and is neither padded nor dropped."""
    if accumulate < 1:
        raise ValueError(f"accumulate: expected at least 1, got {accumulate}")
    window: list[Batch] = []
    for batch in batches:
        window.append(batch)
        if len(window) == accumulate:
            yield window
            window = []
    if window:
        yield window


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        loss: Mean loss over the window's samples, unscaled.
        norm: Norm of the gradient before clipping.
        clipped: Whether the gradient was scaled down.
        skipped: Whether the scaler skipped the step because a gradient was not finite.
        samples: Samples in the window.
    """

    loss: float
    norm: float
    clipped: bool
    skipped: bool
    samples: int


class Stepper:
    """Owns the order of an optimizer step, with its gradient scaler and schedule.

    Args:
        model: Maps inputs ``(n, ...)`` to outputs ``(n, classes)``.
        optimizer: Steps the model's parameters.
        loss_fn: Maps float32 outputs and targets ``(n,)`` to the *mean* loss of the batch.
        amp: ``"bf16"``, ``"fp16"`` (with a gradient scaler) or ``"off"``.
        clip: Largest gradient norm, or ``None`` for no clipping.
        device: Where batches are moved before they are used.

    Attributes:
        schedule: Stepped after each step that the scaler did not skip; set one for each phase.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        *,
        amp: str = "off",
        clip: float | None = None,
        device: torch.device | str = "cpu",
    ):
        if clip is not None and not clip > 0:
            raise ValueError(f"clip: expected a positive norm or None, got {clip}")
        self.device = torch.device(device)
        self.amp = resolve_amp(amp, self.device)
        for name, parameter in model.named_parameters():
            if self.amp == "fp16" and parameter.dtype == torch.float16:
                raise ValueError(f"model: expected float32 weights under fp16, got float16 in {name!r}")
        self.model, self.optimizer, self.loss_fn, self.clip = model, optimizer, loss_fn, clip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")
        self.schedule: LRScheduler | None = None

    def autocast(self) -> torch.autocast:
        """Return the autocast context of this precision; a context without effect when it is off."""
        return torch.autocast(self.device.type, AMP_DTYPES[self.amp], enabled=self.amp != "off")

    def step(self, window: Sequence[Batch]) -> StepResult:
        """Take one optimizer step on all the batches of ``window``.

        Raises:
            FloatingPointError: If the gradient is not finite and no scaler is there to skip the step. The
                weights are as before.
        """
        total = sum(len(targets) for _, targets in window)
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = 0.0
        for inputs, targets in window:
            inputs = inputs.to(self.device, non_blocking=True)
            targets = targets.to(self.device, non_blocking=True)
            with self.autocast():
                outputs = self.model(inputs)
            loss = self.loss_fn(outputs.float(), targets) * (len(targets) / total)
            self.scaler.scale(loss).backward()
            loss_sum += loss.detach()  # stays on the device: one synchronisation a step, below

        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters])
        loss_value, norm_value = float(loss_sum), float(norm)
        finite = math.isfinite(norm_value)
        if not finite and not self.scaler.is_enabled():
            raise FloatingPointError(
                f"gradient norm is {norm_value} at loss {loss_value:.4g}; the step was not taken. "
                "Lower the learning rate or clip"
            )
        clipped = self.clip is not None and finite and norm_value > self.clip
        if clipped:
            clip_grads_with_norm_(parameters, self.clip, norm)

        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        skipped = self.scaler.get_scale() < scale
        if self.schedule is not None and not skipped:
            self.schedule.step()
        return StepResult(loss_value, norm_value, clipped, skipped, total)

    def state_dict(self) -> dict:
        """Return the states of optimizer, scaler and schedule."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned; enter the phase and set its schedule first."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
