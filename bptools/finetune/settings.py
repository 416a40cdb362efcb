"""What the settings of a fine-tuning job may be."""

import math
from collections.abc import Sequence
from typing import Protocol

from .checkpoint import holds_run
from .errors import InputError, expect_positive
from .phases import parse_phases


class Settings(Protocol):
    """The settings of ``recipes/vision.py`` that :func:`check_settings` reads."""

    data: str | None
    model: str
    weights: str | None
    strategy: Sequence[str]
    phases: Sequence[str]
    log_dir: str | None
    compare: bool


LIMITS = {
    "lr": (0, 100), "lr_decay": (0, 100), "weight_decay": (0, 100), "holdout": (0.001, 0.999),
    "size": (0, math.inf), "patience": (0, math.inf), "workers": (0, math.inf), "seed": (0, 2**31),
    "labels_per_class": (1, 40), "ema": (0, 0.99999), "save_every": (0, math.inf),
}  # fmt: skip


def check_settings(settings: Settings) -> None:
    """Raise an :class:`InputError` for the first setting that is out of range or contradicts another one."""
    expect_positive(settings, "epochs batch_size accumulate lr lr_decay clip rank seeds")
    for name, (low, high) in LIMITS.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            wanted = f"{low} to {high}" if high < math.inf else f"{low} or more"
            raise InputError(f"--{name.replace('_', '-')}: expected {wanted}, got {value}")
    if settings.data == "":
        raise InputError("--data: expected a folder, got an empty name")
    if settings.compare and settings.data:
        raise InputError("--compare is about the demonstration; leave out --data")
    if settings.data is None and (settings.model != "small" or settings.weights):
        option = f"--weights {settings.weights}" if settings.model == "small" else f"--model {settings.model}"
        raise InputError(f"{option}: name the images to train on with --data")
    if not settings.strategy or len(set(settings.strategy)) < len(settings.strategy):
        raise InputError("--strategy: expected one name or more, each once")
    parse_phases(settings.phases)
    if settings.log_dir and holds_run(settings.log_dir):
        where = f"--log-dir {settings.log_dir}"
        raise InputError(f"{where} holds a job; continue it with --resume, or name another folder")
