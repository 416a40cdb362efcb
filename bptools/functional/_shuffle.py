"""Shuffles of places and channels."""

from __future__ import annotations

from torch import Tensor

from bptools.functional._checks import is_int, shape_of
from bptools.ops import shuffle as _shuffle


def pixel_shuffle(input: Tensor, upscale_factor: int) -> Tensor:
    """From r² channels one channel of r times as many rows and columns. Keeps nothing for backward.

    Args:
        input: (..., c r², height, width).
        upscale_factor: r.

    Returns:
        (..., c, height r, width r).

    Raises:
        ValueError: if shapes do not fit, or r is no positive int.
    """
    _check_factor("pixel_shuffle", "upscale_factor", upscale_factor)
    if input.dim() < 3 or input.shape[-3] % upscale_factor**2:
        raise ValueError(
            f"pixel_shuffle: input must have shape (..., c {upscale_factor}², height, width), "
            f"got {shape_of(input)}"
        )
    return _shuffle.pixel_shuffle(input, upscale_factor)


def pixel_unshuffle(input: Tensor, downscale_factor: int) -> Tensor:
    """The inverse of `pixel_shuffle`. Keeps nothing for backward.

    Args:
        input: (..., c, height r, width r).
        downscale_factor: r.

    Returns:
        (..., c r², height, width).

    Raises:
        ValueError: if shapes do not fit, or r is no positive int.
    """
    r = downscale_factor
    _check_factor("pixel_unshuffle", "downscale_factor", r)
    if input.dim() < 3 or input.shape[-2] % r or input.shape[-1] % r:
        raise ValueError(
            f"pixel_unshuffle: input must have shape (..., c, height {r}, width {r}), got {shape_of(input)}"
        )
    return _shuffle.pixel_unshuffle(input, r)


def channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """The first channel of each group, then the second of each, and so on. Keeps nothing for backward.

    Args:
        input: (n, channels, ...), of 3 dimensions or more.
        groups: into how many groups of neighbours the channels are cut.

    Returns:
        (n, channels, ...).

    Raises:
        ValueError: if shapes do not fit, or groups is no positive int.
    """
    _check_factor("channel_shuffle", "groups", groups)
    if input.dim() < 3 or input.shape[1] % groups:
        raise ValueError(
            f"channel_shuffle: input must have shape (n, channels, ...), of 3 dimensions or more and channels a "
            f"multiple of groups = {groups}, got {shape_of(input)}"
        )
    return _shuffle.channel_shuffle(input, groups)


def _check_factor(name: str, argument: str, value: int) -> None:
    if not is_int(value) or value < 1:
        raise ValueError(f"{name}: {argument} must be an int of at least 1, got {value!r}")
