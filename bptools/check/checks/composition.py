"""Whether the function composes: twice differentiated, forwards, batched, cast, compiled, distributed."""

from __future__ import annotations

import itertools
import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bptools.check import _tools
from bptools.check._check import Failed, Refused, Skipped, check, compare, fail, said
from bptools.check._numeric import derivative, double, inner, step_of
from bptools.check._subject import Point
from bptools.check.checks.numerics import _both, _excused, _largest, slopes


def _speaks_of(error: BaseException, *words: str) -> bool:
    text = str(error).lower()
    return any(word in text for word in words)


@check([24, 25])
def double_backward(point: Point) -> None:
    """The gradient of the gradient is right, or refused."""
    if point.dtype not in (torch.float64, torch.complex128):
        raise Skipped("it does not take float64")
    _, dys, got = point.plain()
    if not point.finite:
        raise Skipped("the result is not finite here")
    inputs = [_tools.leaf(x) for x in point.inputs]
    moving = [dy.clone().requires_grad_() for dy in dys]
    outputs = _tools.run(point.call, inputs)
    try:
        first = _tools.pull(outputs, inputs, moving, create_graph=True)
    except (RuntimeError, NotImplementedError) as error:
        raise Refused(said(error)) from error
    with_history = [g.requires_grad for g in first]
    for name, g, has in zip(point.names, got, with_history, strict=True):
        if not has and bool((g != 0).any()):
            fail(
                point,
                f"the gradient of {name} cannot be differentiated again, and nothing says so",
                input=name,
                expected="a gradient with history, or an error",
                got="a gradient without history: its derivative counts as zero",
                guess="detach(), .data, numpy or no_grad in the backward, without once_differentiable",
                how=f"""
                moving = [dy.clone().requires_grad_() for dy in dys]
                first = pull(run(call, inputs), inputs, moving, create_graph=True)
                expected = True
                got = first[{point.names.index(name)}].requires_grad
                """,
                dys=dys,
            )
    weights = point.random_like(first, salt=300)
    variables = [*inputs, *moving]
    live = [(g, v) for g, v in zip(first, weights, strict=True) if g.requires_grad]
    if not live:
        return
    try:
        second = torch.autograd.grad(
            [g for g, _ in live], variables, [v for _, v in live], materialize_grads=True, retain_graph=True
        )
    except (RuntimeError, NotImplementedError) as error:
        raise Refused(said(error)) from error
    count = len(inputs)
    labels = [*point.names, *(f"output gradient {k}" for k in range(len(dys)))]
    expected = _true_second(point, variables, weights)
    how = f"""
    moving = [dy.clone().requires_grad_() for dy in dys]
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(k), dtype=x.dtype)
               for k, x in enumerate(inputs)]
    def second(inputs, moving):
        return pull(run(call, inputs), inputs, moving, create_graph=True)
    def weighted(found):
        return sum((g.conj() * w).sum().real for g, w in zip(found, weights))
    def loss_of(variables):
        found = second([x.detach().requires_grad_() for x in variables[:{count}]], variables[{count}:])
        return weighted([g.detach() for g in found])
    variables = [*inputs, *moving]
    got = list(torch.autograd.grad(weighted(second(inputs, moving)), variables, materialize_grads=True))
    expected = []
    for k, v in enumerate(variables):
        numbers = torch.zeros(v.numel(), dtype=v.dtype, device=v.device)
        size = float(v.detach().abs().square().mean().sqrt()) or 1.0
        for i in range(v.numel()):
            for part in (1.0, 1j) if v.is_complex() else (1.0,):
                def moved(t, k=k, i=i, part=part):
                    others = [u.detach().clone(memory_format=torch.contiguous_format) for u in variables]
                    others[k].view(-1)[i] += t * part
                    return loss_of(others)
                numbers[i] += slope(moved, 1e-3 * size) * part
        expected.append(numbers.view(v.shape))
    """
    against: Failed | None = None
    if expected is not None:
        try:
            compare(
                point,
                expected,
                [s.detach() for s in second],
                what="a second derivative is wrong",
                labels=labels,
                how=how,
                uses=(_tools.slope,),
                dys=dys,
                guess=_second_guess(expected, second),
            )
        except Failed as failed:
            against = failed  # unless it is right of its own gradient, which need not be the derivative (STE)
        else:
            return
    asked = 0
    for k, variable in enumerate(variables):
        if variable.numel() == 0:
            continue
        step = step_of(variable)
        for salt in range(2):
            u = point.random_like([variable], salt=310 + salt)[0] * step

            def loss(t: float, k=k, u=u) -> Tensor:
                moved = [v.detach() + t * u if i == k else v.detach() for i, v in enumerate(variables)]
                leaves = [x.requires_grad_() for x in moved[:count]]
                found = _tools.pull(_tools.run(point.call, leaves), leaves, moved[count:])
                return sum(inner(w, g) for w, g in zip(weights, found, strict=True))

            number, doubt = derivative(loss)
            claimed = float(inner(second[k].detach(), u))
            size = float((second[k].detach().abs() * u.abs()).sum())
            level = sum(float((w.abs() * g.abs()).sum()) for w, g in zip(weights, got, strict=True))
            if float(doubt) > max(1e-4 * max(size, abs(float(number))), 1e-9 * level):
                continue  # a kink of the first derivative: nothing to compare with
            asked += 1
            error, allowed = abs(float(number) - claimed), 1e-6 * size + 5 * float(doubt) + 1e-10 * level
            if error > allowed and against is not None:
                raise against
            if error > allowed:
                fail(
                    point,
                    "a second derivative is wrong",
                    input=labels[k],
                    expected=float(number),
                    got=claimed,
                    error=error,
                    allowed=allowed,
                    guess="double backward treats something computed in the forward as a constant",
                    how=how,
                    uses=(_tools.slope,),
                    dys=dys,
                )
    if against is not None and not asked:
        raise against
    if not asked and any(v.numel() for v in variables):
        raise Skipped("its gradient is too rough for a numerical derivative; give a reference")


def _true_second(point: Point, variables: list[Tensor], weights: list[Tensor]) -> list[Tensor] | None:
    """The reference's second derivatives; None without a reference that gives them."""
    if point.reference is None:
        return None
    inputs = [_tools.leaf(x) for x in point.inputs]
    moving = [v.detach().clone().requires_grad_() for v in variables[len(inputs) :]]
    try:
        outputs = [y for y in _tools.run(point.truth, inputs) if y.requires_grad]
        if len(outputs) != len(moving):
            return None
        first = torch.autograd.grad(outputs, inputs, moving, create_graph=True, materialize_grads=True)
        live = [(g, v) for g, v in zip(first, weights, strict=True) if g.requires_grad]
        every = [*inputs, *moving]
        if not live:
            return [torch.zeros_like(v) for v in every]
        return list(torch.autograd.grad([g for g, _ in live], every, [v for _, v in live], materialize_grads=True))
    except (RuntimeError, NotImplementedError):
        return None


def _second_guess(expected: list[Tensor], second) -> str | None:
    if any(bool((a != 0).any()) and not bool((b != 0).any()) for a, b in zip(expected, second, strict=True)):
        return "part of the second derivative is missing: something computed in the forward counts as a constant"
    return "double backward treats something computed in the forward as a constant"


@check([39])
def jvp(point: Point) -> None:
    """Forward mode gives J·v, and ⟨u, J·v⟩ = ⟨Jᵀ·u, v⟩."""
    if point.dtype not in (torch.float64, torch.complex128):
        raise Skipped("it does not take float64")
    _, dys, got = point.plain()
    if not point.finite:
        raise Skipped("the result is not finite here")
    every = point.random_like(point.inputs, salt=400)
    combinations = [every]
    if len(every) > 1:
        combinations += [
            [v if i == k else torch.zeros_like(v) for i, v in enumerate(every)] for k in range(len(every))
        ]
    for number, tangents in enumerate(combinations):
        which = "all inputs" if number == 0 else point.names[number - 1]
        try:
            moved = _forward_mode(point, tangents)
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            if isinstance(error, AttributeError) and not _speaks_of(error, "jvp"):
                raise
            raise Refused(said(error)) from error
        transposed = float(sum(inner(g, v) for g, v in zip(got, tangents, strict=True)))
        claimed = float(sum(inner(dy, m) for dy, m in zip(dys, moved, strict=True)))
        size = float(sum((g.abs() * v.abs()).sum() for g, v in zip(got, tangents, strict=True)))
        how = f"""
        from torch.autograd import forward_ad
        tangents = [torch.randn(x.shape, generator=torch.Generator().manual_seed(k), dtype=x.dtype)
                    for k, x in enumerate(inputs)]
        tangents = [t if {number} in (0, k + 1) else torch.zeros_like(t) for k, t in enumerate(tangents)]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x.detach(), t) for x, t in zip(inputs, tangents)]
            outputs = run(call, duals)
            moved = [forward_ad.unpack_dual(outputs[i]).tangent for i in {point.differentiable}]
            moved = [torch.zeros_like(dy) if m is None else m for m, dy in zip(moved, dys)]
        def inner(a, b):
            return sum((x.conj() * y).sum().real for x, y in zip(a, b))

        """
        agree = abs(transposed - claimed) <= 1e-7 * size + 1e-12 * abs(transposed)
        how += f"""
        def moving(t):
            outputs = run(call, [x.detach() + t * v for x, v in zip(inputs, tangents)])
            return inner(dys, [outputs[i].detach() for i in {point.differentiable}])

        got = [inner(dys, moved)]  # <u, J v>
        expected = [{"slope(moving, 1e-3)" if agree else "inner(grads(call, inputs, dys), tangents)"}]
        """
        for i, m, (true, doubt, left, right) in zip(
            point.differentiable, moved, slopes(point, tangents, point.call), strict=True
        ):
            m = torch.view_as_real(m) if m.is_complex() else m
            scale = float(true.abs().nan_to_num().max()) if true.numel() else 0.0
            close = (m - true).abs() <= 1e-6 * true.abs() + 1e-8 * scale + 5 * doubt
            slack = 1e-3 * (left.abs() + right.abs())
            low, high = torch.minimum(left, right) - slack, torch.maximum(left, right) + slack
            kink = (left - right).abs() > slack
            wrong = ~close & ~(kink & (low <= m) & (m <= high))
            if bool(wrong.any()):
                index = tuple(wrong.nonzero()[0].tolist())
                fail(
                    point,
                    f"forward mode is wrong along {which}",
                    output=i,
                    index=index,
                    expected=true[index].item(),
                    got=m[index].item(),
                    error=float((m - true)[index].abs()),
                    guess=None if agree else "jvp is not the transpose of backward: ⟨u, Jv⟩ ≠ ⟨Jᵀu, v⟩",
                    how=how,
                    uses=(_tools.slope,),
                    dys=dys,
                )
        if not agree:
            fail(
                point,
                f"forward mode along {which} is not the transpose of the backward",
                expected=transposed,
                got=claimed,
                error=abs(transposed - claimed),
                how=how,
                uses=(_tools.slope,),
                dys=dys,
            )


def _forward_mode(point: Point, tangents: list[Tensor]) -> list[Tensor]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.detach().clone(), v) for x, v in zip(point.inputs, tangents, strict=True)]
        outputs = _tools.run(point.call, duals)
        found = [forward_ad.unpack_dual(outputs[i]).tangent for i in point.differentiable]
        if point.subject.kind == "custom op" and all(t is None for t in found):
            raise Refused("torch.library drops the tangents of a custom op in silence: there is no forward mode")
        pairs = zip(found, point.differentiable, strict=True)
        return [torch.zeros_like(outputs[i]) if t is None else t.detach().clone() for t, i in pairs]


@check([41])
def func(point: Point) -> None:
    """torch.func takes it: vjp and grad give autograd's gradients."""
    _, dys, got = point.plain()
    which = point.differentiable
    inputs = [x.detach() for x in point.inputs]

    def chosen(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = _tools.run(point.call, inputs)
        return tuple(outputs[i] for i in which)

    how = f"""
    def chosen(*inputs):
        outputs = run(call, inputs)
        return tuple(outputs[i] for i in {which})

    expected = grads(call, inputs, dys)
    _, pull_back = torch.func.vjp(chosen, *[x.detach() for x in inputs])
    got = list(pull_back(tuple(dys)))
    """
    try:
        _, pull_back = torch.func.vjp(chosen, *inputs)
        found = pull_back(tuple(point.plain()[1]))
    except Exception as error:
        old_form = _speaks_of(error, "setup_context")
        fail(
            point,
            "torch.func refuses it" if old_form else "torch.func.vjp raises",
            expected="gradients",
            got=said(error),
            guess="write the forward without ctx, and a setup_context" if old_form else None,
            how=how,
            dys=dys,
        )
    compare(point, got, list(found), what="torch.func.vjp gives other gradients", how=how, dys=dys)


@check([40])
def vmap(point: Point) -> None:
    """Under torch.vmap it equals a loop, whichever inputs are batched, and so does its gradient."""
    _, dys, _ = point.plain()
    which = point.differentiable
    count = 3
    steps = point.random_like([torch.empty(count)], salt=500)[0].tolist()
    stacks = [
        torch.stack([x.detach() + (0 if n == 0 else s) * noise for n, s in enumerate(steps)])
        for x, noise in zip(point.inputs, point.random_like(point.inputs, salt=501), strict=True)
    ]

    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = _tools.run(point.call, inputs)
        return tuple(outputs[i] for i in which)

    def gradient(*inputs: Tensor) -> tuple[Tensor, ...]:
        _, pull_back = torch.func.vjp(forward, *inputs)
        return pull_back(tuple(dys))

    everything = tuple(0 for _ in stacks)
    single = [tuple(0 if j == k else None for j in range(len(stacks))) for k in range(len(stacks))]
    last = tuple(-1 for _ in stacks)
    choices = [everything, *(single if len(stacks) > 1 else ()), last]
    for words, function, dims in [
        *(("the forward", forward, d) for d in choices),
        *(("the gradient", gradient, d) for d in choices[:-1]),
    ]:
        batch = [stack[0] if d is None else stack.movedim(0, d) for stack, d in zip(stacks, dims, strict=True)]
        rows = [
            [stack[0] if d is None else stack[n] for stack, d in zip(stacks, dims, strict=True)]
            for n in range(count)
        ]
        try:
            found = torch.vmap(function, in_dims=dims, randomness="same")(*batch)
        except Exception as error:
            if _speaks_of(error, "vmap", "functorch", "setup_context", "batching rule"):
                raise Refused(said(error)) from error
            raise
        alone = [function(*row) for row in rows]
        expected = [torch.stack([row[k] for row in alone]) for k in range(len(found))]
        body = (
            "return tuple(outputs)"
            if words == "the forward"
            else "return torch.func.vjp(forward, *inputs)[1](tuple(dys))"
        )
        compare(
            point,
            [e.detach() for e in expected],
            [f.detach() for f in found],
            what=f"{words} under torch.vmap differs from a loop, with in_dims={dims}",
            labels=[f"output {i}" for i in which] if words == "the forward" else point.names,
            how=f"""
            def forward(*inputs):
                outputs = run(call, inputs)
                return tuple(outputs[i] for i in {which})

            def function(*inputs):
                outputs = forward(*inputs)
                {body}

            dims = {dims}
            stacks = [torch.stack([x.detach() * s for s in (1.0, -0.7, 1.9)]) for x in inputs]
            batch = [s[0] if d is None else s.movedim(0, d) for s, d in zip(stacks, dims)]
            rows = [[s[0] if d is None else s[n] for s, d in zip(stacks, dims)] for n in range(3)]
            got = list(torch.vmap(function, in_dims=dims, randomness="same")(*batch))
            alone = [function(*row) for row in rows]
            expected = [torch.stack([row[k] for row in alone]) for k in range(len(got))]
            """,
            dys=dys,
            guess="the vmap rule: wrong dimension, or an input that is not batched",
        )


@check([40])
def batched_gradients(point: Point) -> None:
    """torch.autograd.grad(is_grads_batched=True) equals one backward for each output gradient."""
    _, dys, _ = point.plain()
    several = [point.random_like(dys, salt=520 + n) for n in range(3)]
    stacks = [torch.stack(column) for column in zip(*several, strict=True)]
    how = """
    factors = (1.0, -0.7, 1.9)
    alone = [grads(call, inputs, [f * dy for dy in dys]) for f in factors]
    expected = [torch.stack(column) for column in zip(*alone)]
    stacks = [torch.stack([f * dy for f in factors]) for dy in dys]
    got = pull(run(call, inputs), inputs, stacks, is_grads_batched=True)
    """
    try:
        found = _tools.pull(_tools.run(point.call, point.inputs), point.inputs, stacks, is_grads_batched=True)
    except RuntimeError as error:
        if _speaks_of(error, "vmap", "functorch", "setup_context", "batching rule", "batched"):
            raise Refused(said(error)) from error
        raise
    rows = [_tools.grads(point.call, point.inputs, row) for row in several]
    compare(
        point,
        [torch.stack(column) for column in zip(*rows, strict=True)],
        found,
        what="the gradients of a batch of output gradients differ from a loop",
        how=how,
        dys=dys,
        guess="the backward does not treat the output gradient as a tensor like any other",
    )


@check([], default=False)
def hessian(point: Point) -> None:
    """torch.func.hessian, and jacrev over jacfwd, equal second derivatives taken one by one."""
    if point.dtype is not torch.float64:
        raise Skipped("asked in float64 only")
    if sum(x.numel() for x in point.inputs) > 256:
        raise Skipped("the sample has more than 256 elements")
    outputs, dys, _ = point.plain()
    if not all(t.numel() for t in (*point.inputs, *outputs)):
        raise Skipped("the sample is empty")
    inputs = tuple(x.detach() for x in point.inputs)
    every = tuple(range(len(inputs)))

    def loss_of(call):
        def loss(*inputs: Tensor) -> Tensor:
            outputs = _tools.run(call, inputs)
            chosen = [outputs[i] for i in point.differentiable]
            return sum((dy * y).pow(3).sum() for dy, y in zip(dys, chosen, strict=True))

        return loss

    true = torch.autograd.functional.hessian(loss_of(point.truth), inputs)
    for words, differentiate in (
        ("torch.func.hessian", lambda f: torch.func.hessian(f, every)),
        ("jacrev over jacfwd", lambda f: torch.func.jacrev(torch.func.jacfwd(f, every, randomness="same"), every)),
    ):
        try:
            found = differentiate(loss_of(point.call))(*inputs)
        except (RuntimeError, NotImplementedError) as error:
            raise Refused(said(error)) from error
        pairs = list(itertools.product(range(len(inputs)), repeat=2))
        compare(
            point,
            [true[i][j] for i, j in pairs],
            [found[i][j].detach() for i, j in pairs],
            what=f"{words} is wrong",
            labels=[f"({point.names[i]}, {point.names[j]})" for i, j in pairs],
            how="",
        )


@check([42], dtypes="low")
def autocast(point: Point) -> None:
    """Under torch.autocast forward and backward go through, with results as good as the lower dtype allows."""
    if point.dtype is not torch.float32:
        raise Skipped("asked in float32 only")
    lower = torch.bfloat16
    device = point.device.type
    wide = point.to(torch.float64)

    def cast(inside: bool, call) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        with torch.autocast(device, lower):
            outputs = _tools.run(call, point.inputs)
            chosen = [y for y in outputs if y.requires_grad]
            dys = point.random_like(chosen)
            if inside:
                return chosen, dys, _tools.pull(outputs, point.inputs, dys)
        return chosen, dys, _tools.pull(outputs, point.inputs, dys)

    for inside in (False, True):
        words = "within" if inside else "after"
        how = f"""
        def cast(inside):
            with torch.autocast("{device}", torch.bfloat16):
                outputs = run(call, inputs)
                random = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
                          for y in outputs if y.requires_grad]
                if inside:
                    return pull(outputs, inputs, random)
            return pull(outputs, inputs, random)

        expected = "gradients"
        found = cast({inside})
        got = expected
        plain = grads(call, inputs, dys)
        """
        try:
            outputs, dys, got = cast(inside, point.call)
        except Exception as error:
            if point.reference is not None:
                try:
                    cast(inside, point.truth)
                except Exception:
                    raise Skipped("the reference does not go through autocast either") from error
            fail(
                point,
                f"it raises under torch.autocast, with the backward {words} the block",
                expected="gradients",
                got=said(error),
                guess="custom_fwd and custom_bwd are missing: the backward meets two dtypes",
                how=how,
                dys=point.plain()[1],
            )
        wide_dys = [double(dy) for dy in dys]
        true = _both(wide, wide.truth, wide_dys)
        found = [y.detach() for y in outputs] + got
        if point.reference is not None:
            theirs, _, their_gradients = cast(inside, point.truth)
            peer = [*(y.detach() for y in theirs), *their_gradients]
            excused = [2 * _largest(a.to(t.dtype) - t) for a, t in zip(peer, true, strict=True)]
        else:
            excused = [0.0] * len(true)
        rough = _excused(wide, wide_dys, true, lower)
        labels = point.labels(point.differentiable)
        for name, a, t, excuse, rounding in zip(labels, found, true, excused, rough, strict=True):
            error = _largest(a.to(t.dtype) - t)
            allowed = max(excuse, rounding)
            if not error <= allowed:
                fail(
                    point,
                    f"under torch.autocast, with the backward {words} it, the {name} is too far from the truth",
                    expected=f"an error of at most {allowed:.2e}",
                    got=f"{error:.2e}",
                    error=error,
                    allowed=allowed,
                    guess="custom_fwd and custom_bwd are missing",
                )
    for name, x, g in zip(point.names, point.inputs, got, strict=True):
        if g.dtype is not x.dtype:
            fail(point, f"under autocast the gradient of {name} is in {g.dtype}", input=name)


@check([43])
def compiled(point: Point) -> None:
    """torch.compile(fullgraph=True) gives the same outputs and gradients."""
    _compile(point, dynamic=False)


@check([], default=False)
def compiled_dynamic(point: Point) -> None:
    """torch.compile(fullgraph=True, dynamic=True), with sizes as symbols, gives the same outputs and gradients."""
    _compile(point, dynamic=True)


def _compile(point: Point, *, dynamic: bool) -> None:
    import torch._dynamo

    outputs, dys, got = point.plain()
    call = point.bind(point.subject.call, fresh=False)
    torch._dynamo.reset()
    how = f"""
    expected = [y.detach() for y in run(call, inputs)] + grads(call, inputs, dys)
    outputs = run(torch.compile(call, fullgraph=True, backend="aot_eager", dynamic={dynamic}), inputs)
    got = [y.detach() for y in outputs] + pull(outputs, inputs, dys)
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = _tools.run(
                torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic), point.inputs
            )
            found = _tools.pull(again, point.inputs, dys)
    except Exception as error:
        if type(error).__module__.startswith("torch._dynamo") or _speaks_of(error, "dynamo", "torch.compile"):
            raise Refused(said(error)) from error
        fail(
            point,
            "it raises when compiled",
            expected="the same gradients",
            got=said(error),
            how=how,
            dys=dys,
        )
    finally:
        torch._dynamo.reset()
    labels = point.labels(range(len(outputs)))
    compare(
        point,
        [*outputs, *got],
        [*(y.detach() for y in again), *found],
        what="compiled it computes something else",
        labels=labels,
        how=how,
        dys=dys,
        guess="a branch that only the compiler takes, or a Python value that was constant while tracing",
    )


@check([44])
def cuda_graph(point: Point) -> None:
    """A captured CUDA graph, replayed with fresh inputs, gives their outputs and gradients."""
    if point.device.type != "cuda":
        raise Skipped("needs a CUDA device")
    _, dys, _ = point.plain()
    static = [_tools.leaf(x) for x in point.inputs]
    fresh = point.random_like(point.inputs, salt=600)
    call = point.bind(point.subject.call, fresh=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            _tools.pull(_tools.tensors_in(call(*static)), static, dys)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = _tools.tensors_in(call(*static))
            found = _tools.pull(outputs, static, dys)
    except RuntimeError as error:
        raise Refused(said(error)) from error
    with torch.no_grad():
        for x, numbers in zip(static, fresh, strict=True):
            x.copy_(numbers)
    graph.replay()
    torch.cuda.synchronize()
    compare(
        point,
        _tools.grads(point.call, [x.requires_grad_() for x in fresh], dys),
        [g.clone() for g in found],
        what="a replayed CUDA graph gives the gradients of other inputs",
        how="",
        guess="a number was read out while capturing (item, float, a Python branch)",
        dys=dys,
    )


@check([45], default=False)
def distributed(point: Point) -> None:
    """Under DistributedDataParallel, on one gloo rank, the parameters get the same gradients."""
    import torch.distributed as dist
    from torch import nn

    if not dist.is_available() or dist.is_initialized():
        raise Skipped("torch.distributed is not available, or in use")
    _, dys, got = point.plain()

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = nn.ParameterList([nn.Parameter(x.detach().clone()) for x in point.inputs])

        def forward(self) -> tuple[Tensor, ...]:
            outputs = _tools.run(point.call, list(self.held))
            return tuple(outputs[i] for i in point.differentiable)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            for view in (False, True):
                model = nn.parallel.DistributedDataParallel(Holder(), gradient_as_bucket_view=view)
                torch.autograd.backward(model(), point.plain()[1])
                found = [p.grad for p in model.module.held]
                missing = [n for n, g in zip(point.names, found, strict=True) if g is None]
                if missing:
                    fail(point, f"DDP sees no gradient for {', '.join(missing)}", input=missing[0])
                compare(point, got, found, what="DDP gives other gradients", how="", dys=dys)
    except Failed:
        raise
    except (RuntimeError, UserWarning) as error:
        fail(
            point,
            "DistributedDataParallel complains of its gradients",
            expected="gradients that match the parameters",
            got=said(error),
        )
    finally:
        dist.destroy_process_group()


@check([])
def opcheck(point: Point) -> None:
    """torch.library.opcheck finds no fault with the registration of a custom op."""
    if point.subject.kind != "custom op":
        raise Skipped("it is not a custom op")
    found = torch.library.opcheck(point.subject.target, point.args, point.kwargs, raise_exception=False)
    bad = {name: why for name, why in found.items() if why != "SUCCESS"}
    if bad:
        name, why = next(iter(bad.items()))
        fail(point, f"opcheck: {name}", expected="SUCCESS", got=said(why) if isinstance(why, Exception) else why)
