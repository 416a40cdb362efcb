"""What the settings of a fine-tuning job may be."""

import math
from collections.abc import Mapping
from typing import Any

from .checkpoint import holds_run
from .errors import InputError, expect_positive
from .phases import parse_phases

POSITIVE = ("epochs", "batch_size", "accumulate", "lr", "lr_decay", "clip", "rank", "seeds")
LIMITS = {
    "lr": (0, 100), "lr_decay": (0, 100), "weight_decay": (0, 100), "patience": (0, math.inf),
    "workers": (0, math.inf), "seed": (0, 2**31), "ema": (0, 0.99999), "save_every": (0, math.inf),
}  # fmt: skip


def check_settings(settings: Any, limits: Mapping[str, tuple[float, float]] | None = None) -> None:
    """Raise an :class:`InputError` for the first setting that is out of range or contradicts another one.

    Args:
        settings: A recipe's; what it lacks is not looked at.
        limits: Lowest and highest value of more of its settings, by name.
    """
    expect_positive(settings, " ".join(name for name in POSITIVE if hasattr(settings, name)))
    for name, (low, high) in {**LIMITS, **(limits or {})}.items():
        value = getattr(settings, name, low)
        if not low <= value <= high:
            wanted = f"{low} to {high}" if high < math.inf else f"{low} or more"
            raise InputError(f"--{name.replace('_', '-')}: expected {wanted}, got {value}")
    if getattr(settings, "data", None) == "":
        raise InputError("--data: expected a file or folder, got an empty name")
    strategy = settings.strategy
    if not strategy or len(set(strategy)) < len(strategy):
        raise InputError("--strategy: expected one name or more, each once")
    if parse_phases(getattr(settings, "phases", ())) and "discriminative" not in strategy:
        raise InputError(f"--phases: those of --strategy discriminative, got --strategy {' '.join(strategy)}")
    if getattr(settings, "diagnose", False) and settings.parallel == "fsdp":
        raise InputError("--diagnose: takes whole weights; --parallel ddp or none, got fsdp")
    if settings.log_dir and holds_run(settings.log_dir):
        where = f"--log-dir {settings.log_dir}"
        raise InputError(f"{where} holds a job; continue it with --resume, or name another folder")
