"""What a check is, the registry of all checks, and the comparison that they share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from bptools.check import _diagnose, _script
from bptools.check._report import Failure
from bptools.check._subject import Point


class Failed(Exception):
    """The function is wrong."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.what)
        self.failure = failure


class Skipped(Exception):
    """The check does not apply here."""


class Refused(Exception):
    """The function says itself that it does not do this."""


@dataclass(frozen=True)
class Check:
    """One question asked of a function.

    Attributes:
        name: as it stands in reports, `checks=` and `expect=`.
        run: takes a point and raises Failed, Skipped or Refused, or returns: it passed.
        title: what is asked, in one line.
        finds: the numbers of the defects in the zoo that this check is there for.
        dtypes: "base": asked once, in the widest dtype that the function takes; "each": in every dtype of the
            audit that is no wider; "low": in the narrower ones; "any": in every dtype of the audit.
        default: whether it belongs to the default audit.
    """

    name: str
    run: Callable[[Point], None]
    title: str
    finds: tuple[int, ...]
    dtypes: str
    default: bool


CHECKS: dict[str, Check] = {}


def check(finds: Sequence[int], *, dtypes: str = "base", default: bool = True) -> Callable[..., Any]:
    """Register a check under the name of its function; the first line of its docstring is its title."""

    def register(run: Callable[[Point], None]) -> Callable[[Point], None]:
        title = (run.__doc__ or "").strip().splitlines()[0].rstrip(".")
        CHECKS[run.__name__] = Check(run.__name__, run, title, tuple(finds), dtypes, default)
        return run

    return register


def load_checks() -> dict[str, Check]:
    """All checks, in the order in which an audit asks them."""
    families = [
        f"bptools.check.checks.{name}" for name in ("numerics", "contract", "layout", "state", "composition")
    ]
    for family in families:
        importlib.import_module(family)
    ordered = sorted(CHECKS.values(), key=lambda check: families.index(check.run.__module__))
    return {check.name: check for check in ordered}


# Comparing ----------------------------------------------------------------------------------------------------


def tolerances(dtype: torch.dtype) -> tuple[float, float]:
    """Relative and absolute tolerance of what is equal but for the order of a sum.

    The latter is a share of a tensor's largest number. They follow from the dtype's rounding alone: 7e-8 and 4e-10
    in float64.
    """
    eps = torch.finfo(dtype).eps
    return 5 * eps**0.5, eps**0.6


def compare(
    point: Point,
    expected: Sequence[Tensor],
    got: Sequence[Tensor],
    *,
    what: str,
    labels: Sequence[str] | str = "inputs",
    how: str,
    uses: Sequence[Callable[..., Any]] = (),
    guess: str | None = None,
    floor: float = 0.0,
    dys: Sequence[Tensor] = (),
    output: int | None = None,
) -> None:
    """Raise Failed where two lists of tensors differ, with the case made out.

    Args:
        point: where this was computed.
        expected: the right tensors.
        got: the tensors that came, pairwise.
        what: the finding in one sentence.
        labels: "inputs" if the tensors are gradients of the point's inputs, "outputs" if they are its outputs, or
            their names.
        how: Python code that computes `expected` and `got` from `call`, `inputs` and `dys`, for the script.
        uses: functions of _tools that `how` calls.
        guess: at the cause; if there is none, one is made from the numbers.
        floor: what counts as nothing, beside the largest number that is expected.
        dys: the output gradients, for the guess and the floor.
        output: the position of the output whose gradient was pulled back, if it is one.
    """
    worst: tuple[float, int, tuple[int, ...], float, float] | None = None
    for k, (a, b) in enumerate(zip(expected, got, strict=True)):
        name = _label(point, labels, k)
        if a.shape != b.shape:
            fail(
                point,
                f"{what}: {name} has another shape",
                expected=str(tuple(a.shape)),
                got=str(tuple(b.shape)),
                how=how,
                uses=uses,
                guess=guess,
            )
        wrong, excess, allowed = _excess(a, b, floor + _gradient_floor(a, dys))
        if bool(wrong.any()):
            flat = int(torch.where(wrong, excess, -1.0).argmax())
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), a.shape))
            ratio = float(excess.flatten()[flat])
            if worst is None or ratio > worst[0]:
                worst = (ratio, k, index, float(_distance(a, b).flatten()[flat]), float(allowed.flatten()[flat]))
    if worst is None:
        return
    _, k, index, error, allowed_there = worst
    a, b = expected[k], got[k]
    is_input = labels == "inputs"
    raise Failed(
        Failure(
            what=what,
            input=_label(point, labels, k) if labels != "outputs" else None,
            output=k if labels == "outputs" else output,
            index=index,
            expected=a[index].item(),
            got=b[index].item(),
            error=error,
            allowed=allowed_there,
            guess=guess or _diagnose.guess(a, b, point, k if is_input else None, expected, dys),
            sample=describe(point),
            script=_script.write(point, what, how, uses, dys),
        )
    )


def fail(
    point: Point,
    what: str,
    *,
    how: str = "",
    uses: Sequence[Callable[..., Any]] = (),
    dys: Sequence[Tensor] = (),
    **details: Any,
) -> NoReturn:
    """Raise Failed for a finding that is no difference of two tensors."""
    script = _script.write(point, what, how, uses, dys) if how else None
    raise Failed(Failure(what=what, sample=describe(point), script=script, **details))


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs() if a.is_floating_point() or a.is_complex() else (a.double() - b.double()).abs()


def _excess(a: Tensor, b: Tensor, floor: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Where two tensors differ, by how many times what is allowed, and what is allowed."""
    if not (a.is_floating_point() or a.is_complex()):
        wrong = a != b
        return wrong, wrong.double(), torch.zeros_like(wrong, dtype=torch.float64)
    b = b.to(a.dtype)
    finite = a.abs().isfinite()
    scale = a.abs()[finite].max() if bool(finite.any()) else a.new_zeros(()).abs()
    dtype = scale.dtype
    rtol, share = tolerances(dtype)
    allowed = rtol * torch.where(finite, a.abs(), 0) + share * scale + floor + torch.finfo(dtype).tiny
    error = (a - b).abs()
    same = (a == b) | (a.isnan() & b.isnan())
    wrong = ~same & ~(error <= allowed)
    return wrong, torch.nan_to_num(error / allowed, nan=torch.inf, posinf=torch.inf), allowed


def _gradient_floor(a: Tensor, dys: Sequence[Tensor]) -> float:
    """Rounding of the output gradients: what is left where a gradient is zero by cancellation."""
    if not dys or not (a.is_floating_point() or a.is_complex()):
        return 0.0
    sizes = [float(dy.abs().max()) for dy in dys if dy.numel()]
    return 8 * torch.finfo(a.dtype).eps * max(sizes, default=0.0)


def _label(point: Point, labels: Sequence[str] | str, k: int) -> str:
    if labels == "inputs":
        return f"{point.names[k]}"
    if labels == "outputs":
        return f"output {k}"
    return labels[k]


def said(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: " + (str(error).strip().splitlines() or [""])[0][:200]


def describe(point: Point) -> str:
    """The sample's arguments in one line: shapes and dtypes of tensors, constants as they are."""
    words = []
    for name, value in zip(point.leaf_names, point.leaves, strict=True):
        if isinstance(value, Tensor):
            dense = value.is_contiguous() or value.numel() == 0
            layout = "" if dense else f" strides {value.stride()}"
            dtype = str(value.dtype).removeprefix("torch.")
            words.append(f"{name} {dtype}{tuple(value.shape)}{layout}")
        else:
            words.append(f"{name}={value!r}")
    return ", ".join(words)
