"""Padding."""

from __future__ import annotations

from torch import Tensor

from bptools.functional._checks import is_int, shape_of
from bptools.ops import pad as _pad

_MODES = ("constant", "reflect", "replicate", "circular")


def pad(input: Tensor, pad: list[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """More places at either end of the last dimensions, or fewer. Keeps nothing for backward.

    Args:
        input: (..., *size). Padded with a constant it may hold integers or booleans, too.
        pad: how many places before and after the last dimension, then those of the dimension before it, and so on.
            Negative numbers crop.
        mode: `"constant"`, of any number of dimensions. Or of the last 1, 2 or 3 dimensions of an input
            (n, c, *size), or the same without n: `"reflect"` mirrors the input at its first and last place,
            `"replicate"` repeats these, `"circular"` repeats the whole.
        value: of the new places where they are constant; 0, if None.

    Returns:
        (..., *out), each size greater by what was added to it.

    Raises:
        ValueError: if shapes or numbers do not fit.
    """
    dims, size = len(pad) // 2, shape_of(input)
    if len(pad) % 2 or dims > len(size) or not all(map(is_int, pad)):
        raise ValueError(
            f"pad: pad must be a pair of ints for each of the last dimensions of input {size}, got {pad!r}"
        )
    if mode not in _MODES:
        raise ValueError(f"pad: mode must be one of {', '.join(map(repr, _MODES))}, got {mode!r}")
    sides = [(size[-d - 1], pad[2 * d], pad[2 * d + 1]) for d in range(dims)]
    if any(i + min(before, 0) + min(after, 0) < 0 for i, before, after in sides):
        raise ValueError(f"pad: pad must not crop more than there is of input {size}, got {tuple(pad)}")
    if mode == "constant":
        value = 0 if value is None else value
        if input.is_floating_point() or input.is_complex():  # of which the op refuses the latter
            return _pad.constant_pad(input, tuple(pad), value)
        return _pad.constant_pad.forward(input, pad, value)  # integers have no gradient
    if value:
        raise ValueError(f"pad: value must be None where mode is {mode!r}, got {value}")
    if dims not in (1, 2, 3) or len(size) - dims not in (1, 2) or 0 in size[-dims - 1 :]:
        raise ValueError(
            "pad: input must have shape (n, c, *size), or the same without n, with the 1, 2 or 3 sizes that pad "
            f"{tuple(pad)} is for, and only n may be zero, got {size} where mode is {mode!r}"
        )
    if mode == "reflect" and any(max(before, after) >= i for i, before, after in sides):
        raise ValueError(f"pad: pad must be smaller than the sizes that it reflects, got {tuple(pad)} for {size}")
    if mode == "circular" and any(max(b, a) > i + min(b, 0) + min(a, 0) for i, b, a in sides):
        raise ValueError(f"pad: pad must be at most what comes round again, got {tuple(pad)} for {size}")
    if any(i + before + after < int(mode != "circular") for i, before, after in sides):
        raise ValueError(
            f"pad: pad must leave some of the input where mode is {mode!r}, got {tuple(pad)} for {size}"
        )
    anyhow = mode == "circular" or (mode == "reflect" and dims == 3)  # torch's autocast lets these be
    op = _pad.repeating_pad if anyhow else _pad.repeating_pad_in_float32
    return op(input, tuple(pad), mode)
