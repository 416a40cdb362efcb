"""Guesses at the cause of a wrong tensor, from the right one and the wrong one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bptools.check._numeric import double

if TYPE_CHECKING:
    from bptools.check._subject import Point

NAMED = {2.0: "2", 0.5: "1/2", -1.0: "-1", 4.0: "4", 0.25: "1/4"}


def guess(
    expected: Tensor,
    got: Tensor,
    point: Point | None = None,
    which: int | None = None,
    family: Sequence[Tensor] = (),
    dys: Sequence[Tensor] = (),
) -> str | None:
    """The likeliest cause, or None.

    Args:
        expected: the right tensor; NaN where it is not known.
        got: the wrong one, of the same shape.
        point: where they were computed.
        which: the position of the input whose gradient this is.
        family: the right gradients of all inputs.
        dys: the output gradients.
    """
    if got.numel() == 0:
        return None
    a, b = _wide(expected), _wide(got)
    known = a.isfinite()
    if not bool(known.any()):
        return None
    if bool(b[known].isnan().any()):
        return (
            "NaN where the true value is finite: an intermediate overflows, or 0 is divided by 0 or meets infinity"
        )
    if bool((b[known] == 0).all()) and not _near(a[known], torch.zeros_like(a[known])):
        return "no gradient at all: None, zeros, or a result without history is returned"
    if not bool(known.all()):
        a, b = a[known], b[known]
    ratio = _constant_ratio(a, b)
    if ratio is not None:
        return _about_ratio(ratio, point, which)
    error = float((a - b).abs().max() / a.abs().max().clamp_min(1e-300))
    if got.dtype is torch.float64 and 1e-9 < error < 1e-5:
        return "an error of the size of float32's rounding: something inside is computed in float32"
    if _near(a, b):
        return None
    if a.dim() >= 2 and a.shape[-1] == a.shape[-2] and _near(a.mT, b):
        return "transposed: it equals the expected one with its last two dimensions swapped"
    if a.is_complex() and _near(a.conj(), b):
        return "a complex conjugate is missing"
    for k, other in enumerate(family):
        if (
            k != which
            and other.shape == got.shape
            and not _near(a, _wide(other))
            and _near(_wide(other), _wide(got))
        ):
            name = point.names[k] if point is not None else f"input {k}"
            return f"gradients in the wrong order: this is the one of {name}"
    for dy in dys:
        if dy.shape == got.shape and dy.numel() > 1:
            if _near(_wide(dy) * b, a):
                return "the output gradient is not multiplied in"
            if _near(_wide(dy), b):
                return "the output gradient is passed on as it is: the local derivative is not multiplied in"
    wrong = ~_close(a, b)
    share = float(wrong.float().mean())
    if a.dim() == expected.dim() and a.numel() > 8 and 0 < share <= 0.1:
        return _about_places(a, b, wrong, point, which)
    if a.numel() > 2 and not a.is_complex() and _near(a.flatten().sort().values, b.flatten().sort().values):
        return "the right numbers in the wrong places"
    if a.numel() > 2:
        shift = b - a
        if _near(shift, shift.flatten()[0].expand_as(shift)):
            return f"off by a constant: {_short(shift.flatten()[0])} is added everywhere"
    if _near(a.abs(), b.abs()):
        if a.is_complex():
            return "the magnitudes are right and the phases are not: a complex conjugate is missing on a factor"
        return "the sign is wrong for some elements, the magnitude right"
    return None


def _about_ratio(ratio: float, point: Point | None, which: int | None) -> str:
    if abs(ratio + 1) < 1e-6:
        return "the sign is wrong: got = -1 × expected"
    text = next((words for value, words in NAMED.items() if abs(ratio - value) < 1e-6 * abs(value)), None)
    said = f"a constant factor: got = {text or f'{ratio:.6g}'} × expected"
    if point is not None:
        sizes = {
            n: s for n, t in zip(point.names, point.inputs, strict=True) for s in (t.numel(), *t.shape) if s > 1
        }
        for name, size in sizes.items():
            if abs(ratio - size) < 1e-6 * size or abs(ratio * size - 1) < 1e-6:
                return f"{said}; {size} is a size of {name}: a mean for a sum, or the other way round"
    if abs(ratio - 1) < 1e-2:
        said += "; a constant in the formula is rounded or approximated"
    return said


def _about_places(a: Tensor, b: Tensor, wrong: Tensor, point: Point | None, which: int | None) -> str:
    count = int(wrong.sum())
    index = [tuple(i) for i in wrong.nonzero().tolist()]
    if count == 1:
        last = index[0] == tuple(s - 1 for s in a.shape)
        return f"one element of {a.numel()} is wrong{', the last: a loop or tile ends too early' if last else ''}"
    said = f"{count} elements of {a.numel()} are wrong"
    if point is not None and which is not None and point.inputs[which].shape == a.shape:
        x = point.inputs[which].detach()
        if not x.is_complex():
            x = x.double()
            for name, size in (("large", x.abs()), ("small", -x.abs()), ("positive", x), ("negative", -x)):
                if float(size[wrong].min()) > float(size[~wrong].max()):
                    return f"{said}, those where {point.names[which]} is {name}: a branch"
    for axis in range(a.dim()):
        places = {i[axis] for i in index}
        if len(places) == 1 and a.shape[axis] > 1:
            return f"{said}, all at position {places.pop()} of dimension {axis}"
    return said


def _wide(t: Tensor) -> Tensor:
    return double(t.detach())


def _close(a: Tensor, b: Tensor) -> Tensor:
    scale = a.abs().max()
    return (a - b).abs() <= 1e-6 * a.abs() + 1e-8 * scale


def _near(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(_close(a, b).all())


def _constant_ratio(a: Tensor, b: Tensor) -> float | None:
    if a.is_complex() or a.numel() < 2:
        return None
    clear = a.abs() > 1e-6 * a.abs().max()
    if int(clear.sum()) < 2:
        return None
    ratios = b[clear] / a[clear]
    middle = float(ratios.median())
    if abs(middle) < 1e-6 or abs(middle - 1) < 1e-9:
        return None
    steady = bool(((ratios - middle).abs() <= min(1e-6 * abs(middle), 0.01 * abs(middle - 1))).all())
    return middle if steady and _near(a * middle, b) else None


def _short(value: Tensor) -> str:
    return f"{value.item():.6g}"
