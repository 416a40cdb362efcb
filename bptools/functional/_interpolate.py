"""Interpolation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bptools.functional._checks import per_dimension, shape_of
from bptools.functional._pooling import adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d
from bptools.ops import interpolate as _interpolate

# mode -> what the op calls it, and of how many spatial dimensions it is.
_MODES = {
    "nearest": ("nearest", (1, 2, 3)),
    "nearest-exact": ("nearest-exact", (1, 2, 3)),
    "linear": ("linear", (1,)),
    "bilinear": ("linear", (2,)),
    "trilinear": ("linear", (3,)),
    "bicubic": ("cubic", (2,)),
    "lanczos": ("lanczos", (2,)),
    "area": ("area", (1, 2, 3)),
}
_SMOOTH = ("bilinear", "bicubic", "lanczos")  # what antialias is for


def interpolate(
    input: Tensor,
    size: int | None = None,
    scale_factor: list[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """An image of another size. Keeps nothing for backward.

    Args:
        input: (n, c, *size) of 1, 2 or 3 spatial dimensions.
        size: the new sizes: one number for all, or one for each dimension.
        scale_factor: or how many times the old sizes they are, rounded down: one number, or one for each.
        mode: `"nearest"`, `"nearest-exact"` and `"area"` (the average over what an output covers) of 1, 2 or 3
            dimensions; `"linear"` of 1; `"bilinear"`, `"bicubic"` and `"lanczos"` of 2; `"trilinear"` of 3.
        align_corners: of linear and cubic modes: whether the centres of the outermost places coincide, instead of
            their outer edges.
        recompute_scale_factor: whether to go by the ratio of the rounded sizes, instead of `scale_factor`.
        antialias: of `"bilinear"`, `"bicubic"` and (always) `"lanczos"`: whether a smaller image is made of all
            places of the larger one.

    Returns:
        (n, c, *size), the new one.

    Raises:
        ValueError: if shapes or numbers do not fit.
    """
    _check(input, mode, align_corners, antialias)
    out, scales = _sizes(input, size, scale_factor, recompute_scale_factor or mode == "area")
    if size is not None and recompute_scale_factor:
        raise ValueError(f"interpolate: recompute_scale_factor must not come with size, got size {size!r}")
    if 0 in shape_of(input)[1:] or min(out) < 1:
        raise ValueError(
            f"interpolate: only n may be zero of input {shape_of(input)} and the new sizes, got {out}"
        )
    if mode == "area":
        return _area(input, out)
    return _interpolate.interpolate(input, out, _MODES[mode][0], bool(align_corners), scales, bool(antialias))


def _check(input: Tensor, mode: str, align_corners: bool | None, antialias: bool) -> None:
    dims = input.dim() - 2
    if mode not in _MODES or dims not in _MODES[mode][1]:
        known = [m for m, (_, of) in _MODES.items() if dims in of or dims not in (1, 2, 3)]
        raise ValueError(
            f"interpolate: mode must be one of {', '.join(map(repr, known))} for an input (n, c, *size) of shape "
            f"{shape_of(input)}, got {mode!r}"
        )
    if align_corners is not None and mode in ("nearest", "nearest-exact", "area"):
        raise ValueError(f"interpolate: align_corners must be None where mode is {mode!r}, got {align_corners!r}")
    if align_corners and mode == "lanczos":
        raise ValueError(
            f"interpolate: align_corners must be False where mode is 'lanczos', got {align_corners!r}"
        )
    if mode == "lanczos" and not antialias:
        raise ValueError(f"interpolate: antialias must be True where mode is 'lanczos', got {antialias!r}")
    if antialias and mode not in _SMOOTH:
        raise ValueError(
            f"interpolate: antialias must be False where mode is none of {', '.join(map(repr, _SMOOTH))}, "
            f"got {antialias!r} with mode {mode!r}"
        )


def _sizes(
    input: Tensor,
    size: int | Sequence[int] | None,
    scale_factor: float | Sequence[float] | None,
    recompute: bool | None,
) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
    """The new size of each dimension, and the scale that it goes by, if not the ratio of the sizes."""
    dims = input.dim() - 2
    if (size is None) == (scale_factor is None):
        raise ValueError(f"interpolate: size must be given, or scale_factor, got {size!r} and {scale_factor!r}")
    if size is not None:
        return per_dimension("interpolate", "size", size, dims, least=1), (None,) * dims
    factors = tuple(scale_factor) if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * dims
    if len(factors) != dims or not all(isinstance(f, (int, float)) and f > 0 for f in factors):
        raise ValueError(
            f"interpolate: scale_factor must be a positive number, or {dims} of them, got {scale_factor!r}"
        )
    factors = tuple({f: f}[f] for f in factors)  # which makes constants of what Dynamo takes for symbols
    out = tuple(torch.sym_int(i * f) for i, f in zip(shape_of(input)[2:], factors, strict=True))
    return out, (None,) * dims if recompute else tuple(map(float, factors))


def _area(x: Tensor, out: tuple[int, ...]) -> Tensor:
    """x (n, c, *size) -> (n, c, *out): the averages over the parts of a grid."""
    pool = (adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d)[len(out) - 1]
    return pool(x, out)
