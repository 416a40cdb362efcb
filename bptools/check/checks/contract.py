"""Whether the function keeps autograd's contract: masks, undefined gradients, what it returns and leaves alone."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from bptools.check import _tools
from bptools.check._check import Skipped, check, compare, fail, said
from bptools.check._subject import Point, same_numbers

MASKS = 32


@check([6, 7, 8], dtypes="each")
def raw_gradients(point: Point) -> None:
    """What backward returns has its input's shape, dtype, device and layout, without autograd's repairs."""
    _, dys, _got = point.plain()
    records = _tools.raw_gradients(point.call, point.inputs, dys)
    if not records:
        raise Skipped("there is no custom Function in its graph")
    for function, slots in records:
        for slot, (needed, gradient, like) in enumerate(slots):
            where = f"{function}.backward, gradient of argument {slot}"
            if not needed or not isinstance(gradient, Tensor):
                if gradient is not None and not needed:
                    _fail_raw(
                        point, f"{where}: computed for an input that needs none", slot, "None", "a tensor", "needs"
                    )
                continue
            shape, dtype, device, is_contiguous = like
            if tuple(gradient.shape) != shape:
                _fail_raw(
                    point,
                    f"{where}: not reduced to its input's shape; autograd sums it in silence",
                    slot,
                    str(shape),
                    str(tuple(gradient.shape)),
                    "shape",
                    "the dimensions that were broadcast in the forward are to be summed (sum_to_size)",
                )
            if gradient.dtype is not dtype:
                _fail_raw(
                    point,
                    f"{where}: in another dtype than its input; autograd casts it in silence",
                    slot,
                    str(dtype),
                    str(gradient.dtype),
                    "dtype",
                )
            if gradient.device != device:
                _fail_raw(point, f"{where}: on another device", slot, str(device), str(gradient.device), "device")
            if is_contiguous and gradient.layout is torch.strided and not _laid_out(gradient):
                _fail_raw(
                    point,
                    f"{where}: strides {gradient.stride()} for a contiguous input; it is copied once more",
                    slot,
                    "contiguous",
                    f"strides {gradient.stride()}",
                    "layout",
                    "return it contiguous",
                )


def _laid_out(gradient: Tensor) -> bool:
    """Contiguous, or expanded: what autograd copies anyway."""
    return gradient.is_contiguous() or 0 in gradient.stride()


def _fail_raw(point: Point, what: str, slot: int, expected: str, got: str, field: str, guess: str = "") -> None:
    fields = {
        "shape": ("like[0]", "tuple(gradient.shape)"),
        "dtype": ("like[1]", "gradient.dtype"),
        "device": ("like[2]", "gradient.device"),
        "layout": ("True", "gradient.is_contiguous() or 0 in gradient.stride()"),
        "needs": ("True", "gradient is None"),
    }
    right, found = fields[field]
    keep = "not needed" if field == "needs" else "needed and gradient is not None"
    fail(
        point,
        what,
        input=_slot_name(point, slot),
        expected=expected,
        got=got,
        guess=guess or None,
        how=f"""
        records = raw_gradients(call, inputs, dys)
        slots = [(gradient, like) for _, slots in records for needed, gradient, like in slots if {keep}]
        expected = [{right} for gradient, like in slots]
        got = [{found} for gradient, like in slots]
        """,
        uses=(_tools.function_nodes, _tools.metadata, _tools.raw_gradients),
        dys=point.plain()[1],
    )


def _slot_name(point: Point, slot: int) -> str | None:
    names, _ = point.subject.argument_names()
    return names[slot] if point.subject.kind == "Function" and slot < len(names) else None


@check([9, 10])
def masks(point: Point) -> None:
    """With inputs frozen the other gradients stay the same, and none is computed for the frozen ones."""
    _, dys, got = point.plain()
    count = len(point.inputs)
    if count < 2:
        raise Skipped("it has one differentiable input only")
    if 2**count - 2 <= MASKS:
        every = [m for m in itertools.product((True, False), repeat=count) if any(m) and not all(m)]
    else:  # all with one frozen, all with one left, and a few others; or some of these, for there may be many
        near = [[(i == j) is left for i in range(count)] for left in (False, True) for j in range(count)]
        chosen = torch.randperm(len(near), generator=point.generator())[:MASKS].tolist()
        others = torch.rand(max(0, MASKS - len(near)), count, generator=point.generator()) < 0.5
        every = [near[i] for i in sorted(chosen)] + [m for m in others.tolist() if any(m) and not all(m)]
    for mask in every:
        inputs = [_tools.leaf(x, m) for x, m in zip(point.inputs, mask, strict=True)]
        frozen = ", ".join(n for n, m in zip(point.names, mask, strict=True) if not m)
        outputs = _tools.run(point.call, inputs)
        kept = [k for k, i in enumerate(point.differentiable) if outputs[i].requires_grad]
        if not kept:
            fail(
                point,
                f"no output requires a gradient with {frozen} frozen",
                guess="an input that needs a gradient is not seen",
            )
        how = f"""
        expected = [g for g, m in zip(grads(call, inputs, dys), {mask}) if m]
        some = [leaf(x, m) for x, m in zip(inputs, {mask})]
        outputs = run(call, some)
        outputs = [outputs[i] for i in {[point.differentiable[k] for k in kept]}]
        got = pull(outputs, some, [dys[k] for k in {kept}])
        """
        if kept == list(range(len(dys))):  # else some output does not depend on what is left
            compare(
                point,
                [g for g, m in zip(got, mask, strict=True) if m],
                _tools.pull(outputs, inputs, dys),
                what=f"a gradient is another one with {frozen} frozen",
                labels=[n for n, m in zip(point.names, mask, strict=True) if m],
                how=how,
                uses=(_tools.leaf, _tools.exact_copy),
                guess="needs_input_grad is read at the wrong index",
                dys=dys,
            )
        for function, slots in _tools.raw_gradients(point.call, inputs, [dys[k] for k in kept]):
            for slot, (needed, gradient, _) in enumerate(slots):
                if not needed and isinstance(gradient, Tensor):
                    fail(
                        point,
                        f"{function}.backward computes a gradient for an input that is frozen "
                        f"(argument {slot}, with {frozen} frozen)",
                        input=_slot_name(point, slot),
                        expected="None",
                        got="a tensor",
                        guess="needs_input_grad is ignored, or read at the wrong index",
                        how=f"""
                        some = [leaf(x, m) for x, m in zip(inputs, {mask})]
                        records = raw_gradients(call, some, [dys[k] for k in {kept}])
                        expected = 0
                        got = sum(not needed and g is not None for _, slots in records for needed, g, _ in slots)
                        """,
                        uses=(
                            _tools.leaf,
                            _tools.exact_copy,
                            _tools.function_nodes,
                            _tools.metadata,
                            _tools.raw_gradients,
                        ),
                        dys=dys,
                    )


@check([11])
def unused_outputs(point: Point) -> None:
    """Outputs that nobody used, and undefined output gradients, are taken for zeros."""
    _outputs, dys, _ = point.plain()
    which = point.differentiable
    uses = (_tools.Swallow,)
    for only in range(len(which)) if len(which) > 1 else ():
        alone = [dy if k == only else torch.zeros_like(dy) for k, dy in enumerate(dys)]
        how = f"""
        alone = [dy if k == {only} else torch.zeros_like(dy) for k, dy in enumerate(dys)]
        expected = grads(call, inputs, alone)
        got = pull([run(call, inputs)[{which[only]}]], inputs, [dys[{only}]])
        """
        expected = _tools.grads(point.call, point.inputs, alone)
        used = _tools.run(point.call, point.inputs)[which[only]]
        got = _guarded(
            point, lambda used=used, dy=dys[only]: _tools.pull([used], point.inputs, [dy]), how, dys, which[only]
        )
        compare(
            point,
            expected,
            got,
            what=f"the gradients are others when only output {which[only]} is used",
            how=how,
            dys=dys,
        )
    y = _tools.run(point.call, point.inputs)[which[0]]
    how = f"""
    y = Swallow.apply(run(call, inputs)[{which[0]}])
    got = pull([y], inputs, [torch.ones_like(y)])
    expected = [torch.zeros_like(g) for g in got]
    """

    def swallowed() -> list[Tensor]:
        nothing = _tools.Swallow.apply(y)
        return _tools.pull([nothing], point.inputs, [torch.ones_like(nothing)])

    got = _guarded(point, swallowed, how, dys, which[0], uses)
    compare(
        point,
        [torch.zeros_like(g) for g in got],
        got,
        what="an undefined output gradient gives a gradient",
        how=how,
        uses=uses,
        dys=dys,
    )


def _guarded(point: Point, pull, how: str, dys, output: int, uses=()) -> list[Tensor]:
    try:
        return pull()
    except Exception as error:
        fail(
            point,
            "the backward does not take an undefined output gradient",
            output=output,
            expected="zeros, or None",
            got=said(error),
            guess="set_materialize_grads(False) is set, and None is not looked for",
            how=how,
            uses=uses,
            dys=dys,
        )


@check([14, 15, 16, 45])
def mutation(point: Point) -> None:
    """No argument and no output gradient is written to, and no `.grad` is set behind autograd's back."""
    own = point.copy()
    own.overwrites = False
    _, dys, _ = point.plain()
    dys = [dy.clone() for dy in dys]
    others = own.others
    if point.subject.kind == "module":  # its buffers are its own affair
        buffers = dict(point.subject.target.named_buffers())
        others = [(n, t) for n, t in others if n not in buffers]
    watched = [
        *((n, "input", x) for n, x in zip(own.names, own.inputs, strict=True)),
        *((n, "argument", t) for n, t in others),
        *((f"output gradient {k}", "dy", dy) for k, dy in enumerate(dys)),
    ]
    before = [(t.detach().clone(), t._version) for _, _, t in watched]
    outputs = _tools.run(own.bind(own.subject.call, fresh=False), own.inputs)
    stages = [("the forward", [(_differs(t, *b)) for (_, _, t), b in zip(watched, before, strict=True)])]
    _tools.pull(outputs, own.inputs, dys, copies=False)
    stages.append(("the backward", [(_differs(t, *b)) for (_, _, t), b in zip(watched, before, strict=True)]))
    for stage, changed in stages:
        for (name, kind, t), (old, _), difference in zip(watched, before, changed, strict=True):
            if difference:
                if kind == "dy":
                    guess = "an in-place operation on the incoming gradient, which belongs to the caller"
                else:
                    guess = "an in-place operation on an argument, without mark_dirty"
                fail(
                    point,
                    f"{stage} writes to {name}" + ("" if difference == "values" else ", if only the same numbers"),
                    input=None if kind == "dy" else name,
                    expected=_summary(old),
                    got=_summary(t),
                    guess=guess,
                    how="""
                    tensors = [*inputs, *others, *dys]
                    expected = [(t.detach().clone(), t._version) for t in tensors]
                    grads(direct, inputs, dys, copies=False)
                    got = [(t.detach(), t._version) for t in tensors]
                    """,
                    dys=dys,
                )
    for name, x in zip(own.names, own.inputs, strict=True):
        if x.grad is not None:
            fail(
                point,
                f"the backward writes {name}.grad itself",
                input=name,
                expected="autograd to accumulate what backward returns",
                got="a .grad that is set after torch.autograd.grad",
                guess="gradients are accumulated by hand: hooks, DDP and torch.autograd.grad never see them",
                how="""
                grads(call, inputs, dys)
                expected = [None for x in inputs]
                got = [x.grad for x in inputs]
                """,
                dys=dys,
            )


def _differs(t: Tensor, old: Tensor, version: int) -> str:
    if not same_numbers(t.detach(), old):
        return "values"
    return "version" if t._version != version else ""


def _summary(t: Tensor) -> str:
    numbers = t.detach().reshape(-1)[:3].tolist()
    return (
        "["
        + ", ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in numbers)
        + (", ...]" if t.numel() > 3 else "]")
    )


@check([17])
def non_differentiable(point: Point) -> None:
    """An output that has no derivative is marked as not differentiable."""
    _outputs, dys, _ = point.plain()
    which = point.differentiable
    if len(which) < 2:
        raise Skipped("it has one differentiable output only")
    fresh = _tools.run(point.call, point.inputs)
    for k, i in enumerate(which):
        custom = isinstance(fresh[i].grad_fn, torch.autograd.function.BackwardCFunction)
        if not custom or fresh[i].numel() == 0:
            continue
        for salt in range(3):
            alone = [
                dy if j == k else torch.zeros_like(dy)
                for j, dy in enumerate(point.random_like(dys, salt=200 + salt))
            ]
            if any(bool((g != 0).any()) for g in _tools.grads(point.call, point.inputs, alone)):
                break
        else:
            fail(
                point,
                f"output {i} requires a gradient, and no input ever gets one from it",
                output=i,
                expected="requires_grad False",
                got="requires_grad True",
                guess="ctx.mark_non_differentiable is missing",
                how=f"""
                y = run(call, inputs)[{i}]
                expected = "no requires_grad, or a gradient"
                some = y.requires_grad and any(bool((g != 0).any()) for g in pull([y], inputs, [dys[{k}]]))
                got = expected if some or not y.requires_grad else "requires_grad, and zeros for a gradient"
                """,
                dys=dys,
            )


@check([18])
def shared_gradients(point: Point) -> None:
    """No two inputs get one and the same tensor as their gradient."""
    _, dys, _ = point.plain()
    records = _tools.raw_gradients(point.call, point.inputs, dys)
    if not records:
        raise Skipped("there is no custom Function in its graph")
    if all(sum(needed for needed, _, _ in slots) < 2 for _, slots in records):
        raise Skipped("it has one differentiable input only")
    for function, slots in records:
        seen: dict[int, int] = {}
        for slot, (needed, gradient, _) in enumerate(slots):
            if not needed or not isinstance(gradient, Tensor) or gradient.numel() == 0:
                continue
            other = seen.setdefault(_tools.memory(gradient), slot)
            if other != slot:
                fail(
                    point,
                    f"{function}.backward returns the same memory as gradients of arguments {other} and {slot}",
                    input=_slot_name(point, slot),
                    expected="memory of its own",
                    got="shared memory",
                    guess="one tensor returned twice: a hook or an optimizer that writes to one writes to both",
                    how="""
                    records = raw_gradients(call, inputs, dys)
                    found = [[memory(g) for n, g, _ in s if n and g is not None and g.numel()] for _, s in records]
                    expected = [len(pointers) for pointers in found]
                    got = [len(set(pointers)) for pointers in found]
                    """,
                    uses=(_tools.function_nodes, _tools.metadata, _tools.raw_gradients, _tools.memory),
                    dys=dys,
                )


@check([19])
def same_tensor_twice(point: Point) -> None:
    """One tensor given as two arguments gets the sum of both gradients."""
    _, dys, _ = point.plain()
    alike = [
        (i, j)
        for i, j in itertools.combinations(range(len(point.inputs)), 2)
        if point.inputs[i].shape == point.inputs[j].shape and point.inputs[i].dtype is point.inputs[j].dtype
    ]
    if not alike:
        raise Skipped("no two inputs have the same shape")
    for i, j in alike[:6]:
        names = f"{point.names[i]} and {point.names[j]}"
        apart = [_tools.leaf(point.inputs[i] if k == j else x) for k, x in enumerate(point.inputs)]
        separate = _tools.grads(point.call, apart, dys)
        together = [_tools.leaf(x) for x in point.inputs]
        together[j] = together[i]
        outputs = [y for y in _tools.run(point.call, together) if y.requires_grad]
        got = torch.autograd.grad(outputs, together[i], dys, materialize_grads=True)[0]
        compare(
            point,
            [separate[i] + separate[j]],
            [got],
            what=f"the gradient is wrong when {names} are one tensor",
            labels=[names],
            how=f"""
            apart = [leaf(inputs[{i}] if k == {j} else x) for k, x in enumerate(inputs)]
            separate = grads(call, apart, dys)
            expected = [separate[{i}] + separate[{j}]]
            together = [leaf(x) for x in inputs]
            together[{j}] = together[{i}]
            outputs = [y for y in run(call, together) if y.requires_grad]
            got = list(torch.autograd.grad(outputs, together[{i}], dys, materialize_grads=True))
            """,
            uses=(_tools.leaf, _tools.exact_copy),
            dys=dys,
            guess="arguments are told apart by identity or address",
        )
