"""Whether the function reads tensors as they lie in memory: strided, offset, expanded, of size zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bptools.check import _tools
from bptools.check._check import Refused, Skipped, check, compare, fail
from bptools.check._subject import Point

LAYOUTS = (
    (_tools.padded, "a slice of a larger buffer"),
    (_tools.transposed, "transposed in memory"),
    (_tools.offset, "at an offset in its storage"),
)


@check([1, 2])
def grad_layouts(point: Point) -> None:
    """The gradients do not depend on how the output gradient lies in memory."""
    _, dys, got = point.plain()
    for change, words in LAYOUTS:
        _same_gradients(
            point,
            point.inputs,
            [change(dy) for dy in dys],
            got,
            f"a gradient is wrong when the output gradient is {words}",
            f"""
            expected = grads(call, inputs, dys)
            got = grads(call, inputs, [{change.__name__}(dy) for dy in dys])
            """,
            (change,),
            f"only when the output gradient is {words}: it is read as if it were contiguous",
            dys,
        )
    for expand, words in (
        (_tools.one_number_everywhere, "one number expanded (strides 0, as from y.sum())"),
        (_tools.first_row_everywhere, "one row expanded (stride 0)"),
    ):
        spread = [expand(dy) for dy in dys]
        name = expand.__name__
        _same_gradients(
            point,
            point.inputs,
            spread,
            _tools.grads(point.call, point.inputs, [_tools.contiguous(dy) for dy in spread]),
            f"a gradient is wrong when the output gradient is {words}",
            f"""
            expected = grads(call, inputs, [contiguous({name}(dy)) for dy in dys])
            got = grads(call, inputs, [{name}(dy) for dy in dys])
            """,
            (expand, _tools.contiguous),
            "only when the output gradient is expanded: it is read as if it were contiguous",
            dys,
        )


def _same_gradients(
    point: Point,
    inputs: Sequence[Tensor],
    dys: Sequence[Tensor],
    expected: Sequence[Tensor],
    what: str,
    how: str,
    uses: Sequence[Callable],
    guess: str,
    plain_dys: Sequence[Tensor],
) -> None:
    try:
        got = _tools.grads(point.call, inputs, dys)
    except Exception as error:
        fail(
            point,
            f"{what}: it raises",
            expected="gradients",
            got=f"{type(error).__name__}: {error}",
            guess=guess,
            how=how,
            uses=uses,
            dys=plain_dys,
        )
    compare(point, expected, got, what=what, how=how, uses=uses, guess=guess, dys=plain_dys)


@check([3, 4])
def input_layouts(point: Point) -> None:
    """Outputs and gradients do not depend on how the inputs lie in memory."""
    _, dys, _ = point.plain()
    changes = [*LAYOUTS, (_tools.first_row_everywhere, "expanded (stride 0)")]
    for change, words in changes:
        for k in [None, *(range(len(point.inputs)) if len(point.inputs) > 1 else ())]:
            laid = [change(x) if k in (None, i) else x.detach() for i, x in enumerate(point.inputs)]
            if all(
                a.stride() == x.stride() and a.storage_offset() == 0
                for a, x in zip(laid, point.inputs, strict=True)
            ):
                continue
            which = "an input is" if k is None else f"{point.names[k]} is"
            name = change.__name__
            chosen = "" if k is None else f" if i == {k} else x.detach()"
            how = f"""
            laid = [({name}(x){chosen}).requires_grad_() for i, x in enumerate(inputs)]
            full = [contiguous(x).requires_grad_() for x in laid]
            outputs, plain = run(call, laid), run(call, full)
            expected = [y.detach() for y in plain] + pull(plain, full, dys)
            got = [y.detach() for y in outputs] + pull(outputs, laid, dys)
            """
            uses = (change, _tools.contiguous)
            guess = f"only when {which} {words}: it is read as if it were contiguous"
            full = [_tools.contiguous(x).requires_grad_() for x in laid]
            laid = [x.requires_grad_() for x in laid]
            plain = _tools.run(point.call, full)
            truth = [y.detach() for y in plain] + _tools.pull(plain, full, dys)
            try:
                outputs = _tools.run(point.call, laid)
                found = [y.detach() for y in outputs] + _tools.pull(outputs, laid, dys)
            except Exception as error:
                fail(
                    point,
                    f"it raises when {which} {words}",
                    input=None if k is None else point.names[k],
                    expected="what contiguous inputs give",
                    got=f"{type(error).__name__}: {error}",
                    guess=guess,
                    how=how,
                    uses=uses,
                    dys=dys,
                )
            labels = [f"output {i}" for i in range(len(outputs))] + [f"gradient of {n}" for n in point.names]
            compare(
                point,
                truth,
                found,
                what=f"the result is wrong when {which} {words}",
                labels=labels,
                how=how,
                uses=uses,
                guess=guess,
                dys=dys,
            )


@check([5])
def empty(point: Point) -> None:
    """Tensors of size zero go through, forward and backward."""
    sizes = dict.fromkeys(x.shape[d] for x in point.inputs for d in range(x.dim()))
    tried, refusals = 0, []
    for size in sizes:
        for there in (shrunk(point, size, 0), shrunk(point, size, 0, constants=False)):
            if there is None or all(x.numel() for x in there.inputs):
                continue
            try:
                outputs = _tools.run(there.call, there.inputs)
            except Exception as error:
                if _reference_takes(there):
                    fail(
                        there,
                        f"the forward raises where a dimension of {size} is 0, and the reference takes it",
                        expected="a result",
                        got=f"{type(error).__name__}: {error}",
                        how="expected = 'a result'\nrun(call, inputs)\ngot = expected",
                    )
                refusals.append(f"{type(error).__name__}: {error}".splitlines()[0][:120])
                continue
            tried += 1
            dys = there.random_like([y for y in outputs if y.requires_grad])
            how = "got = grads(call, inputs, dys)\nexpected = [torch.zeros_like(x) for x in inputs]"
            try:
                got = _tools.pull(outputs, there.inputs, dys)
            except Exception as error:
                fail(
                    there,
                    f"the backward raises where a dimension of {size} is 0, and the forward does not",
                    expected="gradients",
                    got=f"{type(error).__name__}: {error}",
                    guess="a size is divided by, or inferred by view(-1)",
                    how=how,
                    dys=dys,
                )
            if there.reference is not None and _reference_takes(there):
                compare(
                    there,
                    [y.detach() for y in _tools.run(there.truth, there.inputs)][: len(outputs)],
                    [y.detach() for y in outputs],
                    what=f"the forward is wrong where a dimension of {size} is 0",
                    labels="outputs",
                    how="expected = [y.detach() for y in run(reference, inputs)]\n"
                    "got = [y.detach() for y in run(call, inputs)]",
                )
                compare(
                    there,
                    _tools.grads(there.truth, there.inputs, dys),
                    got,
                    what=f"a gradient is wrong where a dimension of {size} is 0",
                    how="expected = grads(reference, inputs, dys)\ngot = grads(call, inputs, dys)",
                    dys=dys,
                )
            break
    if not tried:
        if refusals:
            raise Refused(f"sizes of zero: {refusals[0]}")
        raise Skipped("the sample has no dimension that could be made empty")


def _reference_takes(point: Point) -> bool:
    if point.reference is None:
        return False
    try:
        outputs = _tools.run(point.truth, point.inputs)
        _tools.pull(outputs, point.inputs, [torch.ones_like(y) for y in outputs if y.requires_grad])
    except Exception:
        return False
    return True


def shrunk(point: Point, size: int, to: int, *, constants: bool = True) -> Point | None:
    """The point with every dimension of one size cut to another; with `constants`, numbers of that value too."""

    def cut(a: object) -> object:
        if isinstance(a, Tensor):
            requires_grad, a = a.requires_grad, a.detach()
            for d in range(a.dim()):
                if a.shape[d] == size:
                    a = a.narrow(d, 0, to)
            return a.clone().requires_grad_(requires_grad)
        if constants and type(a) is int and a == size:
            return to
        return a

    leaves = [cut(a) for a in point.leaves]
    if constants and all(a is b or isinstance(b, Tensor) for a, b in zip(leaves, point.leaves, strict=True)):
        return None  # no constant to change: the other way says it all
    return point.with_leaves(leaves, note=f"a dimension of {size} cut to {to}")
