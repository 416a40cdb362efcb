"""Whether the function reads tensors as they lie in memory: strided, offset, expanded, of size zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from bptools.check import _tools
from bptools.check._check import Refused, Skipped, check, compare, fail, said
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
            got=said(error),
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
    if point.random:
        raise Skipped("it draws random numbers, and may draw them in the order of the memory")
    # One row everywhere is where a variance is zero: what is left of a difference there is rounding, amplified.
    level = 1e-10 * max(
        (float(t.detach().abs().nan_to_num().max()) for t in (*point.inputs, *dys) if t.numel()), default=0
    )
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
            try:
                plain = _tools.run(point.call, full)
            except Exception:
                continue  # one row everywhere may be outside its domain, as a singular matrix is
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
                    got=said(error),
                    guess=guess,
                    how=how,
                    uses=uses,
                    dys=dys,
                )
            labels = point.labels(range(len(outputs)))
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
                floor=level if change is _tools.first_row_everywhere else 0.0,
            )


@check([5])
def empty(point: Point) -> None:
    """Tensors of size zero go through, forward and backward."""
    if not all(x.numel() for x in point.inputs):
        raise Skipped("the sample is empty itself")
    refusals, tried = [], False
    for size in dict.fromkeys(s for x in point.inputs for s in x.shape):
        if any(t.dim() and size not in t.shape for _, t in point.others):
            continue  # it may hold indices into what would be cut, which some kernels do not look at
        there = shrunk(point, size, 0, constants=False)
        try:
            outputs = _tools.run(there.call, there.inputs)
        except Exception as error:
            refusals.append(said(error))
            continue
        dys = there.random_like([y for y in outputs if y.requires_grad])
        truth = _reference_result(there, dys)
        try:
            got = _tools.pull(outputs, there.inputs, dys)
        except Exception as error:
            if there.reference is not None and truth is None:
                refusals.append(said(error))
                continue
            fail(
                there,
                f"the backward raises where a dimension of {size} is 0, and the forward does not",
                expected="gradients",
                got=said(error),
                guess="a size is divided by, or inferred by view(-1)",
                how="got = grads(call, inputs, dys)\nexpected = [torch.zeros_like(x) for x in inputs]",
                dys=dys,
            )
        tried = True
        if truth is not None:
            values, gradients = truth
            compare(
                there,
                values,
                [y.detach() for y in outputs][: len(values)],
                what=f"the forward is wrong where a dimension of {size} is 0",
                labels="outputs",
                how="expected = [y.detach() for y in run(reference, inputs)]\n"
                "got = [y.detach() for y in run(call, inputs)]",
            )
            compare(
                there,
                gradients,
                got,
                what=f"a gradient is wrong where a dimension of {size} is 0",
                how="expected = grads(reference, inputs, dys)\ngot = grads(call, inputs, dys)",
                dys=dys,
            )
    if not tried:
        if refusals:
            raise Refused(f"sizes of zero: {refusals[0]}")
        raise Skipped("the sample has no dimension that could be made empty")


def _reference_result(point: Point, dys: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]] | None:
    """The reference's outputs and gradients; None without a reference that takes this."""
    if point.reference is None:
        return None
    try:
        outputs = _tools.run(point.truth, point.inputs)
        return [y.detach() for y in outputs], _tools.pull(outputs, point.inputs, dys)
    except Exception:
        return None


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
