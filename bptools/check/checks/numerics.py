"""Whether the numbers are right: at the sample, at other magnitudes, at kinks, at the edges, in every dtype."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bptools.check import _diagnose, _script, _tools
from bptools.check._check import (
    Failed,
    Skipped,
    _excess,
    _gradient_floor,
    check,
    compare,
    describe,
    fail,
    said,
)
from bptools.check._numeric import derivative, double, inner, one_sided, step_of
from bptools.check._report import Failure
from bptools.check._subject import Point

DIRECTIONS = 3
COORDINATES = 1024  # an input of more elements is searched for its worst one by halving
SEARCHED = 32


# The truth ----------------------------------------------------------------------------------------------------


def judge(point: Point, what: str) -> None:
    """Raise Failed if the gradients at a point are wrong: against the reference, or else numerically."""
    if point.reference is not None:
        _against_reference(point, what)
    elif point.dtype not in (torch.float64, torch.complex128):
        raise Skipped("it does not take float64, so that a numerical derivative says too little; give a reference")
    else:
        _against_differences(point, what)


def true_gradients(point: Point) -> list[Tensor]:
    """The gradients of the reference (else of the subject itself) for the point's output gradients."""
    _, dys, _ = point.plain()
    outputs = [y for y in _tools.run(point.truth, point.inputs) if y.requires_grad]
    if [y.shape for y in outputs] != [dy.shape for dy in dys]:
        theirs, ours = [tuple(y.shape) for y in outputs], [tuple(dy.shape) for dy in dys]
        raise Skipped(f"the reference has differentiable outputs of shapes {theirs}, the function {ours}")
    return _tools.pull(outputs, point.inputs, [dy.to(y.dtype) for dy, y in zip(dys, outputs, strict=True)])


def _against_reference(point: Point, what: str) -> None:
    _, dys, got = point.plain()
    expected = [g.detach() for g in true_gradients(point)]
    settled = []
    # A gradient may be a difference of products of large inputs, of which rounding is left where it should vanish.
    largest = max((float(x.detach().abs().max()) for x in point.inputs if x.numel()), default=0.0)
    floor = 8 * torch.finfo(point.dtype).eps * largest**2 if largest > 1 else 0.0
    for k, (a, b) in enumerate(zip(expected, got, strict=True)):
        wrong = _excess(a, b, floor + _gradient_floor(a, dys))[0] & a.abs().isfinite()
        places = wrong.nonzero().tolist()
        at_kinks = torch.zeros_like(wrong)
        if places and len(places) <= COORDINATES and not a.is_complex() and a.dtype is torch.float64:
            for index in map(tuple, places):
                if bool(b[index].isfinite()) and _inside_kink(point, k, index, float(b[index]), point.truth):
                    at_kinks[index] = True
                else:
                    break
        settled.append(torch.where(at_kinks | ~a.abs().isfinite(), b, a))
    compare(
        point,
        settled,
        got,
        what=what,
        how="expected = grads(reference, inputs, dys)\ngot = grads(call, inputs, dys)",
        dys=dys,
        floor=floor,
        output=_guilty(point),
    )


def ask_elsewhere(point: Point) -> None:
    """Raise Skipped if the gradients are wrong at the sample itself: another place would only repeat it."""
    if point.wrong is None:
        point.wrong = _is_wrong(point if double(point.inputs[0]).dtype is point.dtype else point.to(torch.float64))
    if point.wrong:
        raise Skipped("it is wrong at the sample itself already: see `gradients` and `values`")


def _is_wrong(point: Point) -> bool:
    try:
        if point.reference is not None:
            values(point)
        judge(point, "")
    except Failed:
        return True
    except Exception:
        return False  # float64 is refused: nothing is known
    return False


def _guilty(point: Point) -> int | None:
    return point.differentiable[0] if len(point.differentiable) == 1 else None


def _terms(point: Point, k: int, direction: Tensor, call) -> Callable[[float], Tensor]:
    """The function t -> the terms of ⟨dys, outputs⟩, along a direction of input k."""
    dys = point.plain()[1]
    inputs = [x.detach() for x in point.inputs]

    def terms(t: float) -> Tensor:
        moved = [x + t * direction if i == k else x for i, x in enumerate(inputs)]
        return torch.cat(
            [(dy.conj() * y).real.flatten() for dy, y in zip(dys, point.values(moved, call), strict=True)]
        )

    return terms


def _loss(point: Point, k: int, direction: Tensor, call) -> Callable[[float], Tensor]:
    """The function t -> ⟨dys, outputs⟩ along a direction of input k."""
    terms = _terms(point, k, direction, call)
    return lambda t: terms(t).sum()


def _unit(x: Tensor, index: tuple[int, ...], value: complex = 1.0) -> Tensor:
    direction = torch.zeros_like(x)
    direction[index] = value
    return direction


def _inside_kink(point: Point, k: int, index: tuple[int, ...], claimed: float, call) -> bool:
    """Whether an element is at a kink, and the claimed derivative among those that may be given there."""
    x = point.inputs[k].detach()
    step = step_of(x)
    low, high, slack = _subderivatives(point, k, _unit(x, index, step), call, step)
    if not low < high:
        return False
    return low - slack <= claimed <= high + slack or _limit(point, k, index, 1.0, claimed)


def _limit(point: Point, k: int, index: tuple[int, ...], part: complex, claimed: float) -> bool:
    """Whether a derivative lies among those nearby: at a tie of several elements one may be taken for another."""
    around = []
    for salt in range(16):
        noise = point.random_like(point.inputs, salt=700 + salt)
        near = [x.detach() + 1e-5 * step_of(x) * n for x, n in zip(point.inputs, noise, strict=True)]
        found = _tools.grads(point.call, [x.requires_grad_() for x in near], point.plain()[1])[k][index]
        around.append(float(inner(found, torch.tensor(part, dtype=found.dtype))))
    slack = 1e-3 * max(map(abs, around))
    return min(around) - slack <= claimed <= max(around) + slack


def _subderivatives(point: Point, k: int, direction: Tensor, call, step: float) -> tuple[float, float, float]:
    """The interval of derivatives that may be given at a kink, and its slack; of no length where there is no kink.

    Each output has a derivative from the left and one from the right, and may take any between them.
    """
    terms = _terms(point, k, direction, call)
    left, right = (side / step for side in one_sided(terms))
    wider = [side / step for side in one_sided(terms, 1e-4)]
    size = float((left.abs() + right.abs()).sum())
    unsteady = float(((left - wider[0]).abs() + (right - wider[1]).abs()).sum())
    if not math.isfinite(size) or not unsteady <= 0.05 * size:  # rounding, not a kink
        return math.nan, math.nan, 0.0
    low, high = float(torch.minimum(left, right).sum()), float(torch.maximum(left, right).sum())
    return (low, high, 1e-3 * size) if high - low > 1e-3 * size else (low, low, 1e-3 * size)


def _against_differences(point: Point, what: str) -> None:
    """Directional differences in several directions of each input; element by element only where they disagree."""
    outputs, dys, got = point.plain()
    level = sum(
        float((dy.abs() * outputs[i].abs()).sum()) for dy, i in zip(dys, point.differentiable, strict=True)
    )
    noise = 64 * torch.finfo(torch.float64).eps * level / 1e-3
    for k, (x, g) in enumerate(zip(point.inputs, got, strict=True)):
        if x.numel() == 0:
            continue
        for salt in range(DIRECTIONS):
            step = step_of(x)
            u = point.random_like([x], salt=100 + salt)[0] * step
            found, doubt = derivative(_loss(point, k, u, point.call))
            size = float((g.abs() * u.abs()).sum())
            claimed = float(inner(g, u))
            clear = float(doubt) <= max(1e-6 * size, noise)
            if not (clear and abs(float(found) - claimed) <= 1e-7 * size + 5 * float(doubt)):
                _localise(point, k, what)
                break


def _localise(point: Point, k: int, what: str) -> None:
    """Look at single elements of input k; raise Failed at the worst wrong one. Kinks are no fault."""
    _, dys, all_got = point.plain()
    x, got = point.inputs[k].detach(), all_got[k].detach()
    elements = list(range(x.numel()))
    if x.numel() > COORDINATES:
        elements = _search(point, k)
    parts = (1.0, 1j) if x.is_complex() else (1.0,)
    expected, wrong, scale = (
        got.clone(),
        torch.zeros_like(got, dtype=torch.bool),
        float(got.abs().nan_to_num().max()),
    )
    kink = None
    step = step_of(x)
    for flat in elements:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), x.shape))
        for part in parts:
            along = _loss(point, k, _unit(x, index, part * step), point.call)
            number, doubt = (float(v) / step for v in derivative(along))
            claimed = float(inner(got[index], torch.tensor(part, dtype=got.dtype)))
            if abs(number - claimed) <= 1e-6 * abs(number) + 1e-9 * scale + 5 * doubt and doubt < 1e-3 * (
                abs(number) + scale + 1e-12
            ):
                continue
            low, high, slack = _subderivatives(point, k, _unit(x, index, part * step), point.call, step)
            if low < high:
                if low - slack <= claimed <= high + slack or _limit(point, k, index, part, claimed):
                    continue
                kink = kink or (index, low, high)
                number = low if abs(low - claimed) < abs(high - claimed) else high
            elif abs(number - claimed) <= 5 * doubt or doubt > 1e-2 * (abs(number) + scale):
                continue  # too rough here to tell
            expected[index] = expected[index] + (number - claimed) * part
            wrong[index] = True
    if not bool(wrong.any()):
        return
    worst = int(torch.where(wrong, (expected - got).abs().nan_to_num(nan=torch.inf), -1.0).argmax())
    index = kink[0] if kink else tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), x.shape))
    guess = _diagnose.guess(expected, got, point, k, (), dys)
    if point.random:
        guess = "it draws random numbers, and was compared at a fixed seed: no fault of a reparametrised gradient"
    shown = expected[index].item()
    if kink:
        guess = "the gradient at a kink lies outside the derivatives from the left and from the right"
        shown = f"between {min(kink[1:]):.9g} and {max(kink[1:]):.9g}"
        how = f"""
        loss = loss_at(call, inputs, dys, {point.differentiable}, {k}, {index})
        h = {1e-5 * step}
        sides = [float(loss(h) - loss(0.0)) / h, float(loss(0.0) - loss(-h)) / h]
        slack = 1e-3 * (abs(sides[0]) + abs(sides[1]))
        found = float(grads(call, inputs, dys)[{k}][{index}])
        expected = f"between {{min(sides)}} and {{max(sides)}}"
        got = expected if min(sides) - slack <= found <= max(sides) + slack else found
        """
        uses = (_tools.loss_at,)
    elif x.is_complex():
        how = f"""
        expected = [torch.tensor({_script._literal(expected[index].item())}, dtype=inputs[{k}].dtype)]
        got = [grads(call, inputs, dys)[{k}][{index}]]
        """
        uses = ()
    else:
        how = f"""
        loss = loss_at(call, inputs, dys, {point.differentiable}, {k}, {index})
        expected = [slope(loss, {1e-3 * step})]
        got = [grads(call, inputs, dys)[{k}][{index}]]
        """
        uses = (_tools.loss_at, _tools.slope)
    raise Failed(
        Failure(
            what=what,
            input=point.names[k],
            output=_guilty(point),
            index=index,
            expected=shown,
            got=got[index].item(),
            error=float((expected - got)[index].abs()),
            guess=guess,
            sample=describe(point),
            script=_script.write(point, what, how, uses, dys),
        )
    )


def _search(point: Point, k: int) -> list[int]:
    """The elements among which the largest error of a large input is: halving, towards the larger disagreement."""
    x, got = point.inputs[k].detach(), point.plain()[2][k]
    u = point.random_like([x], salt=7)[0] * step_of(x)
    low, high = 0, x.numel()

    def disagreement(a: int, b: int) -> float:
        part = torch.zeros_like(u)
        part.view(-1)[a:b] = u.reshape(-1)[a:b]
        found, _ = derivative(_loss(point, k, part, point.call))
        size = float((got.abs() * part.abs()).sum()) + 1e-300
        return abs(float(found) - float(inner(got, part))) / size**0.5

    while high - low > SEARCHED:
        middle = (low + high) // 2
        left, right = disagreement(low, middle), disagreement(middle, high)
        low, high = (low, middle) if left >= right else (middle, high)
    return list(range(low, high))


# Checks -------------------------------------------------------------------------------------------------------


@check([], dtypes="any")
def runs(point: Point) -> None:
    """Forward and backward go through."""
    point.plain()


@check([])
def values(point: Point) -> None:
    """The forward gives what the reference gives."""
    if point.reference is None:
        raise Skipped("no reference was given")
    outputs, _, _ = point.plain()
    expected = [y.detach() for y in _tools.run(point.truth, point.inputs)]
    if len(outputs) < len(expected):
        fail(
            point,
            "the function has fewer outputs than the reference",
            expected=f"{len(expected)} tensors",
            got=f"{len(outputs)}",
        )
    compare(
        point,
        expected,
        outputs[: len(expected)],
        what="the forward differs from the reference",
        labels="outputs",
        how="expected = [y.detach() for y in run(reference, inputs)]\n"
        "got = [y.detach() for y in run(call, inputs)]",
    )


@check([12, 13, 32, 34, 38])
def gradients(point: Point) -> None:
    """The gradients are right."""
    judge(point, "a gradient is wrong")


@check([13])
def linearity(point: Point) -> None:
    """The gradients are linear in the output gradient."""
    _, dys, got = point.plain()
    others = point.random_like(dys, salt=1)
    mixed = [2 * a - 3 * b for a, b in zip(dys, others, strict=True)]
    second = _tools.grads(point.call, point.inputs, others)
    third = _tools.grads(point.call, point.inputs, mixed)
    none = _tools.grads(point.call, point.inputs, [torch.zeros_like(dy) for dy in dys])
    compare(
        point,
        [2 * a - 3 * b for a, b in zip(got, second, strict=True)],
        third,
        what="the gradient is not linear in the output gradient",
        how="""
        others = [dy.flip(0) + 1 if dy.dim() else dy + 1 for dy in dys]
        pairs = zip(grads(call, inputs, dys), grads(call, inputs, others))
        expected = [2 * a - 3 * b for a, b in pairs]
        got = grads(call, inputs, [2 * a - 3 * b for a, b in zip(dys, others)])
        """,
        dys=dys,
    )
    compare(
        point,
        [torch.zeros_like(g) for g in none],
        none,
        what="the gradient of an output gradient of zeros is not zero",
        how="""
        got = grads(call, inputs, [torch.zeros_like(dy) for dy in dys])
        expected = [torch.zeros_like(g) for g in got]
        """,
        guess="the output gradient is not multiplied in everywhere",
    )


@check([29])
def precision(point: Point) -> None:
    """A float64 result has the digits of float64."""
    if point.dtype is not torch.float64:
        raise Skipped("the function does not take float64")
    outputs, dys, got = point.plain()
    how = """
    expected = "float64 numbers with float64's digits"
    outputs = [y.detach() for y in run(call, inputs)]
    found = [t for t in (*{which},) if t.dtype is torch.float64 and bool((t != t.round()).any())]
    rounded = [t for t in found if torch.equal(t.float().double(), t)]
    got = f"numbers that float32 holds exactly: {{rounded}}" if rounded else expected
    """
    guess = "something inside is computed in float32, whatever the dtype of the input"
    if not any(_fits_float32(x) for x in point.inputs):
        for i, y in zip(point.differentiable, (outputs[i] for i in point.differentiable), strict=True):
            if y.dtype is torch.float64 and _fits_float32(y):
                fail(
                    point,
                    "an output in float64 holds float32's digits only",
                    output=i,
                    guess=guess,
                    how=how.format(which="outputs"),
                )
    for name, g in zip(point.names, got, strict=True):
        if g.dtype is torch.float64 and _fits_float32(g):
            fail(
                point,
                "a gradient in float64 holds float32's digits only",
                input=name,
                guess=guess,
                how=how.format(which="grads(call, inputs, dys)"),
                dys=dys,
            )


def _fits_float32(t: Tensor) -> bool:
    """Whether all numbers are float32's, of those that are no halves of whole numbers, and there are such."""
    t = t.detach()
    odd = t[t.isfinite() & (2 * t != (2 * t).round())]
    return odd.numel() > 0 and torch.equal(odd.float().double(), odd)


@check([30], dtypes="low")
def dtypes(point: Point) -> None:
    """In a smaller dtype the error is no larger than the dtype excuses."""
    if point.reference is not None:  # else its own float64 is the truth
        ask_elsewhere(point)
    _within_rounding(point, "")


def _changed(point: Point, changed: list[Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    """The inputs with all of them changed, and, of few, with each alone; and which are changed, in words."""
    yield "the inputs are", changed
    if 1 < len(changed) <= 4:
        for only, name in enumerate(point.names):
            yield (
                f"{name} is",
                [c if k == only else x for k, (c, x) in enumerate(zip(changed, point.inputs, strict=True))],
            )


def _absurd(there: Point, here: Point) -> bool:
    """Whether the true gradients are so much larger than at the sample that an input has left its domain."""

    def size(point: Point) -> float:
        found = point.plain()[2] if point.reference is None else true_gradients(point)
        return max(map(_largest, found), default=0.0)

    return size(there) > 1e12 * max(size(here), 1.0)


@check([31], dtypes="low")
def overflow(point: Point) -> None:
    """In float16 nothing overflows on the way to a result that float16 can hold."""
    if point.dtype is not torch.float16:
        raise Skipped("asked in float16 only")
    if point.reference is not None:
        ask_elsewhere(point)
    tried = 0
    for scale in (30.0, 300.0, 3000.0):
        for which, inputs in _changed(point, [x.detach() * scale for x in point.inputs]):
            there = point.at(inputs)
            if all(bool(x.isfinite().all()) for x in there.inputs):
                _within_rounding(there, f", where {which} multiplied by {scale:g},")
                tried += 1
    if not tried:
        raise Skipped("the sample is too large to be multiplied")


def _within_rounding(point: Point, where: str) -> None:
    """Flash-attention's rule: an error of at most twice the reference's own in this dtype, plus rounding.

    Without a reference: of at most what rounding its inputs could do, several times over. What lies near the end
    of the dtype's range is left out. The truth is float64.
    """
    wide = point.to(torch.float64)
    outputs, dys, got = point.plain()
    wide_dys = [double(dy) for dy in dys]
    try:
        true = _both(wide, wide.truth, wide_dys)
    except Skipped:
        raise
    except Exception as error:
        raise Skipped(f"the truth needs float64, which is refused ({said(error)}); give a reference") from error
    found = [outputs[i] for i in point.differentiable] + got
    if [t.shape for t in found] != [t.shape for t in true]:
        raise Skipped("the reference has other outputs than the function")
    if point.reference is not None:
        theirs = _both(point, point.truth, dys)
        excused = [2 * _largest(a - t) for a, t in zip(theirs, true, strict=True)]
    else:
        excused = _excused(wide, wide_dys, true, point.dtype)
    info = torch.finfo(point.dtype)
    dtype = str(point.dtype).removeprefix("torch.")
    n = len(point.differentiable)
    labels = point.labels(point.differentiable)
    for k, (name, a, t, excuse) in enumerate(zip(labels, found, true, excused, strict=True)):
        representable = t.abs() <= info.max / 4
        allowed = excuse + info.eps * max(_largest(torch.where(representable, t, 0)), info.tiny)
        a = a.to(t.dtype)
        error = torch.where(representable, (a - t).abs(), 0).nan_to_num(nan=torch.inf)
        if not error.numel() or float(error.max()) <= allowed:
            continue
        overflown = _overflown(point) if where else ""
        if where and not overflown and bool(a.isfinite().all()):
            continue  # of few digits only, which `dtypes` asks about
        index = tuple(int(i) for i in torch.unravel_index(error.argmax(), a.shape))
        cause = _diagnose.guess(t, torch.where(error <= allowed, t, a), wide)
        if where or not bool(a.isfinite().all()):
            cause = f"an intermediate overflows{overflown}: compute it in float32"
        what = f"in {dtype}{where} the {name} is further from the truth than {dtype} excuses"
        fail(
            point,
            what,
            input=point.names[k - n] if k >= n else None,
            output=point.differentiable[k] if k < n else _guilty(point),
            index=index,
            expected=t[index].item(),
            got=a[index].item(),
            error=float(error[index]),
            allowed=allowed,
            guess=f"only in {dtype}: {cause or 'too many roundings, or a sum in too small a dtype'}",
            how=f"""
            outputs = [y for y in run(call, inputs) if y.requires_grad]
            found = ([y.detach() for y in outputs] + pull(outputs, inputs, dys))[{k}]
            true = {_script._tensor(t.contiguous())}  # in float64
            error = torch.where(true.abs() <= {info.max / 4}, (found.to(true.dtype) - true).abs(), 0)
            error = float(error.nan_to_num(nan=torch.inf).max())
            expected = "an error of at most {allowed!r}"
            got = expected if error <= {allowed!r} else f"an error of {{error}}"
            """,
            dys=dys,
        )


class _Overflow(TorchDispatchMode):
    """Remembers the first operation that makes infinity in float16 of finite numbers."""

    found = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.found and "log" not in str(func):  # log 0 is infinite and nothing overflows
            made = [t for t in _tools.tensors_in(result) if t.dtype is torch.float16]
            given = [t for t in _tools.tensors_in((args, kwargs)) if t.is_floating_point()]
            if given and any(bool(t.isinf().any()) for t in made) and all(bool(t.isfinite().all()) for t in given):
                self.found = f" ({func})"
        return result


def _overflown(point: Point) -> str:
    """The operation that overflows on the way, in words; nothing if none does."""
    with _Overflow() as mode:
        _tools.grads(point.call, point.inputs, point.plain()[1])
    return mode.found


def _largest(t: Tensor) -> float:
    return float(t.abs().nan_to_num(nan=torch.inf).max()) if t.numel() else 0.0


def _both(point: Point, call, dys: list[Tensor]) -> list[Tensor]:
    """Differentiable outputs and gradients together."""
    outputs = [y for y in _tools.run(call, point.inputs) if y.requires_grad]
    if len(outputs) != len(dys):
        raise Skipped("the reference has other outputs than the function")
    pairs = [dy.to(y.dtype) for dy, y in zip(dys, outputs, strict=True)]
    return [y.detach() for y in outputs] + _tools.pull(outputs, point.inputs, pairs)


def _excused(wide: Point, dys: list[Tensor], true: list[Tensor], dtype: torch.dtype) -> list[float]:
    """Without a peer to compare with: what rounding every input and output gradient could do, eight times over."""
    eps = torch.finfo(dtype).eps
    moved = [0.0] * len(true)
    for salt in range(3):
        noise = wide.random_like([*wide.inputs, *dys], salt=50 + salt)
        shaken = [(t.detach() * (1 + eps * n)) for t, n in zip((*wide.inputs, *dys), noise, strict=True)]
        inputs = [x.requires_grad_() for x in shaken[: len(wide.inputs)]]
        outputs = [y for y in _tools.run(wide.call, inputs) if y.requires_grad]
        again = [y.detach() for y in outputs] + _tools.pull(outputs, inputs, shaken[len(inputs) :])
        moved = [max(m, _largest(a - t)) for m, a, t in zip(moved, again, true, strict=True)]
    return [8 * m + 3 * eps * _largest(t) for m, t in zip(moved, true, strict=True)]


@check([33, 35])
def magnitudes(point: Point) -> None:
    """The gradients are right where the inputs are small, and where they are large."""
    if point.reference is None and point.dtype not in (torch.float64, torch.complex128):
        raise Skipped("it does not take float64, so that a numerical derivative says too little; give a reference")
    ask_elsewhere(point)
    tried = 0
    for scale in (1e-7, 1e-3, 8.0, 100.0):
        for which, inputs in _changed(point, [x.detach() * scale for x in point.inputs]):
            there = point.at(inputs, note=f"{which} × {scale:g}")
            if not _finite(there) or _absurd(there, point):
                continue
            tried += 1
            judge(there, f"a gradient is wrong where {which} multiplied by {scale:g}")
    if not tried:
        raise Skipped("no other magnitude has finite results")


def _finite(point: Point) -> bool:
    """Whether the true outputs are finite here; a domain error counts as no."""
    try:
        outputs, _, _ = point.plain()
        true = outputs if point.reference is None else _tools.run(point.truth, point.inputs)
        return all(bool(y.isfinite().all()) for y in true if y.is_floating_point() or y.is_complex())
    except (ValueError, IndexError, torch.linalg.LinAlgError):
        return False


@check([36])
def kinks(point: Point) -> None:
    """At zeros and ties the gradient lies between the derivatives from the left and from the right."""
    if point.dtype is not torch.float64:
        raise Skipped("asked in float64 only")
    ask_elsewhere(point)
    whole = [x.detach().round() for x in point.inputs]
    zeros = [torch.zeros_like(x) for x in point.inputs]
    tried = 0
    for numbers, words in ((whole, "whole numbers"), (zeros, "all zero")):
        for which, inputs in _changed(point, numbers):
            there = point.at(inputs, note=words)
            if not _finite(there) or sum(x.numel() for x in there.inputs) > COORDINATES:
                continue
            got = there.plain()[2]
            if not all(bool(g.isfinite().all()) for g in got):
                continue  # special_values asks about that
            tried += 1
            judge(there, f"a gradient is wrong where {which} {words}")
    if not tried:
        raise Skipped("zeros and ties have no finite result, or the sample is too large to look at every element")


@check([37])
def special_values(point: Point) -> None:
    """No NaN where the true gradient is finite: at 0, the smallest and the largest numbers, and infinity."""
    if point.dtype not in (torch.float32, torch.float64):
        raise Skipped("asked in float64 or float32 only")
    info = torch.finfo(point.dtype)
    specials = {
        "0": 0.0,
        "-0": -0.0,
        "the smallest normal number": info.tiny,
        "the smallest subnormal number": info.smallest_normal * info.eps,
        "the largest number": info.max,
        "inf": torch.inf,
        "-inf": -torch.inf,
    }
    for k, (name, x) in enumerate(zip(point.names, point.inputs, strict=True)):
        if x.numel() == 0 or not x.is_floating_point():
            continue
        flat = int(torch.randint(x.numel(), (), generator=point.generator(k)))
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), x.shape))
        for words, value in specials.items():
            changed = x.detach().clone()
            changed[index] = value
            there = point.at([changed if i == k else y for i, y in enumerate(point.inputs)])
            _finite_where_true(there, k, index, f"{name}[{', '.join(map(str, index))}] is {words}")


def _finite_where_true(point: Point, k: int, index: tuple[int, ...], where: str) -> None:
    try:
        outputs, dys, got = point.plain()
    except Exception:
        return  # it refuses this number
    if all(bool(g.isfinite().all()) for g in got):
        return
    if point.reference is not None:
        expected = true_gradients(point)
    else:
        value = float(point.inputs[k].detach()[index])
        if not all(bool(y.isfinite().all()) for y in outputs if y.is_floating_point()):
            return
        if abs(value) == torch.inf:
            expected = [torch.where(g.isnan(), 0, g) for g in got]
        elif abs(value) < 1 and point.dtype is torch.float64:
            expected = [torch.full_like(g, torch.inf) for g in got]
            unit = _unit(point.inputs[k].detach(), index)
            sides = [one_sided(_loss(point, k, unit, point.call), h) for h in (1e-5, 1e-6)]
            rough, fine = (torch.stack(pair) for pair in sides)
            if bool(torch.isfinite(fine).all()) and bool(((rough - fine).abs() <= 1e-2 * (1 + fine.abs())).all()):
                expected[k][index] = fine.mean()
        else:
            return
    small = abs(float(point.inputs[k].detach()[index])) < 1
    for i, (name, a, b) in enumerate(zip(point.names, expected, got, strict=True)):
        # Beside the largest number or infinity a product may overflow in one order and not in another, and in the
        # gradients of other inputs infinity meets the zeros of padding.
        if not small and i != k:
            continue
        bad = a.isfinite() & (~b.isfinite() if small else b.isnan())
        if bool(bad.any()):
            place = tuple(bad.nonzero()[0].tolist())
            fail(
                point,
                f"the gradient is not finite where {where}, and the true one is",
                input=name,
                index=place,
                expected=a[place].item(),
                got=b[place].item(),
                guess="0 is divided by 0 or multiplied by infinity on the way",
                how=f"""
                expected = True  # finite, as the true value {a[place].item()} is
                got = bool(grads(call, inputs, dys)[{point.names.index(name)}][{place}].isfinite())
                """,
                dys=dys,
            )


def slopes(point: Point, tangents: list[Tensor], call) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Numerical jvp: for each differentiable output its derivative along `tangents`, doubt, left and right one."""
    inputs = [x.detach() for x in point.inputs]

    def along(t: float, i: int) -> Tensor:
        y = point.values([x + t * v for x, v in zip(inputs, tangents, strict=True)], call)[i]
        return torch.view_as_real(y) if y.is_complex() else y

    found = []
    for i in range(len(point.differentiable)):
        f = functools.partial(along, i=i)
        found.append((*derivative(f), *one_sided(f)))
    return found
