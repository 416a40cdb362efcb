"""The contract that every op keeps, run over the table: one harness, one test for each capability."""

from __future__ import annotations

import gc
import itertools
import weakref
from contextlib import nullcontext

import pytest
import torch
from table import CAPABILITIES, CASES, Case, Maker
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import bptools
from bptools.ops import _core

TIERS = ("formula", "auto")
CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # float64


# Helpers ------------------------------------------------------------------------------------------------------


def cases(capability: str, tiers: tuple[str, ...] = TIERS):
    """Parametrise a test over the cases (and tiers) in which a capability is claimed."""
    chosen = [c for c in CASES if not c.only or capability in c.only]
    parameters = [pytest.param(c, t, id=f"{c}-{t}") for c in chosen for t in tiers]
    return pytest.mark.parametrize(("case", "tier"), parameters)


@pytest.fixture(autouse=True)
def _capability(request, record_property):
    """Runs a contract test in its tier, and reports to the support matrix what it has shown."""
    if "case" not in request.fixturenames:
        yield
        return
    case, capability = request.getfixturevalue("case"), request.node.originalname.removeprefix("test_")
    verdict, note = "yes", ""
    if capability in case.raises:
        kind, pattern = case.raises[capability]
        verdict, note = "raises", f'{case.id}: {kind.__name__}, "{pattern}"'
    record_property("support", [case.op, capability, verdict, note])
    with bptools.backend(request.getfixturevalue("tier")):
        yield


def expected(case: Case, capability: str):
    """A context that passes, or that demands the error which the case declares for this capability."""
    if capability in case.raises:
        kind, pattern = case.raises[capability]
        return pytest.raises(kind, match=pattern)
    return nullcontext()


class Call:
    """A call of a case's function with tensors made afresh: `inputs` are the differentiable ones, in order."""

    def __init__(self, case: Case, whose: str = "ours", dtype=torch.float64, seed: int = 0) -> None:
        self.f = case.function(whose)
        self.args, self.kwargs = case.make(Maker(dtype, seed))
        self.inputs = [a for a in (*self.args, *self.kwargs.values()) if differentiable(a)]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The result with `inputs` in the place of the differentiable arguments."""
        given = iter(inputs or self.inputs)
        args = [next(given) if differentiable(a) else a for a in self.args]
        kwargs = {k: next(given) if differentiable(a) else a for k, a in self.kwargs.items()}
        return self.f(*args, **kwargs)


def differentiable(a) -> bool:
    return isinstance(a, Tensor) and a.requires_grad


def like(y: Tensor, seed: int = 1) -> Tensor:
    """A random output gradient: never ones, which hide what is not multiplied by it."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)


def grads(call: Call, inputs=None, dy=None, **kwargs):
    inputs = call.inputs if inputs is None else inputs
    y = call(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    found = torch.autograd.grad(y, wanted, like(y) if dy is None else dy, **kwargs)
    return y, found


def assert_close(ours, theirs, **tolerance) -> None:
    torch.testing.assert_close(ours, theirs, **(tolerance or CLOSE), equal_nan=True)


# The contract -------------------------------------------------------------------------------------------------


@cases("values")
def test_values(case, tier):
    ours, theirs = grads(Call(case)), grads(Call(case, "theirs"))
    assert_close(ours[0], theirs[0])
    assert_close(ours[1], theirs[1])
    for g, x in zip(ours[1], Call(case).inputs, strict=True):
        assert g.is_contiguous() or g.stride() == x.stride(), "a gradient has other strides than its parameter"


@cases("gradcheck")
def test_gradcheck(case, tier):
    call = Call(case)
    with expected(case, "gradcheck"):
        assert gradcheck(call, call.inputs, check_forward_ad=True, check_batched_grad=True, nondet_tol=0.0)


@cases("gradgradcheck", ("auto",))
def test_gradgradcheck(case, tier):
    call = Call(case)
    with expected(case, "gradgradcheck"):
        assert gradgradcheck(call, call.inputs, check_fwd_over_rev=True, nondet_tol=0.0)


@cases("layouts")
def test_layouts(case, tier):
    call = Call(case)
    y, truth = grads(call)
    dy = like(y)

    def strided(t):  # every second element of a buffer of NaN
        buffer = torch.full((*t.shape, 2), torch.nan, dtype=t.dtype)
        buffer[..., 0] = t.detach()
        return buffer[..., 0].requires_grad_(t.requires_grad)

    def transposed(t):
        return t.detach().mT.contiguous().mT.requires_grad_(t.requires_grad) if t.dim() > 1 else t

    for change in (strided, transposed):
        again = grads(call, [change(x) for x in call.inputs], change(dy))
        assert_close(again[0], y)
        assert_close(again[1], truth)

    # expanded inputs and an expanded output gradient, against the same numbers laid out in full
    spread = [x.detach()[:1].expand(x.shape) if x.dim() and len(x) else x.detach() for x in call.inputs]
    spread_dy = dy.flatten()[:1].sum().expand(dy.shape)
    expanded = grads(call, [x.requires_grad_() for x in spread], spread_dy)
    full = grads(call, [x.detach().contiguous().requires_grad_() for x in spread], spread_dy.contiguous())
    assert_close(expanded[0], full[0])
    assert_close(expanded[1], full[1])


@cases("masks")
def test_masks(case, tier, monkeypatch):
    call = Call(case)
    _, truth = grads(call)
    returned, computed = [], _core.Op.compute_backward

    def spy(op, tier, named, needs):
        found = computed(op, tier, named, needs)
        returned.append((op, needs, found))
        return found

    monkeypatch.setattr(_core.Op, "compute_backward", spy)
    everything = kept_bytes(call, call.inputs)
    for mask in itertools.product((True, False), repeat=len(call.inputs)):
        if not any(mask):
            continue
        inputs = [x.detach().requires_grad_(m) for x, m in zip(call.inputs, mask, strict=True)]
        found = iter(grads(call, inputs)[1])
        for x, g in zip(inputs, truth, strict=True):
            if x.requires_grad:
                assert_close(next(found), g)
        assert kept_bytes(call, inputs) <= everything
    for op, needs, found in returned:
        for name, g in zip(op.grads, found, strict=True):
            assert (g is not None) == (name in needs), f"{op.name}: {name} with {set(needs)} wanted"
    with torch.no_grad():
        assert kept_bytes(call, call.inputs) == 0


def kept_bytes(call: Call, inputs) -> int:
    """Bytes that a call keeps for its backward, beside its own inputs."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(*inputs)
    own = {x.untyped_storage().data_ptr() for x in inputs if not x.requires_grad}
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@cases("half")
def test_half(case, tier, dtype):
    """Flash-attention's rule: against a float64 truth, our error is at most twice torch's own, plus rounding."""
    ours, theirs, truth = Call(case, dtype=dtype), Call(case, "theirs", dtype), Call(case, "theirs")
    inputs = [x.detach().double().requires_grad_() for x in ours.inputs]
    true_y = truth(*inputs)
    dy = like(true_y).to(dtype)
    true_grads = torch.autograd.grad(true_y, inputs, dy.double())
    y, found = grads(ours, dy=dy)
    their_y, their_found = grads(theirs, dy=dy)
    for a, b, t in zip((y, *found), (their_y, *their_found), (true_y, *true_grads), strict=True):
        assert a.dtype == b.dtype
        error, allowed = (a - t).abs().max(), 2 * (b - t).abs().max()
        floor = torch.finfo(dtype).eps * max(t.abs().max(), torch.finfo(dtype).tiny)
        assert error <= allowed + floor, f"error {error:.2e}, allowed {allowed + floor:.2e}"


@cases("autocast", ("auto",))
def test_autocast(case, tier):
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = Call(case, dtype=dtype), Call(case, "theirs", dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y, found = grads(ours)
            their_y, their_found = grads(theirs, dy=like(y).to(y.dtype))
        assert y.dtype == their_y.dtype
        assert [g.dtype for g in found] == [g.dtype for g in their_found]
        assert_close(y, their_y, rtol=2e-2, atol=2e-2)
        assert_close(found, their_found, rtol=5e-2, atol=5e-2)


@cases("jvp")
def test_jvp(case, tier):
    ours, theirs = Call(case), Call(case, "theirs")
    primals = tuple(x.detach() for x in ours.inputs)
    directions = tuple(like(x, seed=i) for i, x in enumerate(primals))
    with expected(case, "jvp"):
        assert_close(torch.func.jvp(ours, primals, directions), torch.func.jvp(theirs, primals, directions))


@cases("vmap")
def test_vmap(case, tier):
    calls = [Call(case, seed=seed) for seed in range(3)]
    batch = [torch.stack([x.detach() for x in xs]) for xs in zip(*(c.inputs for c in calls), strict=True)]
    call = calls[0]
    randomness = "same" if case.random else "error"
    dy = like(call())

    def gradient(*inputs):
        y, pull = torch.func.vjp(call, *inputs)
        return y, pull(dy)

    def rows(f):
        return [f(*(x[i] for x in batch)) for i in range(len(calls))]

    with expected(case, "vmap"):
        y, found = torch.vmap(gradient, randomness=randomness)(*batch)
        for i, (row, row_found) in enumerate(rows(gradient)):
            assert_close(y[i], row)
            assert_close([g[i] for g in found], list(row_found))
        # only one of the inputs batched, the others shared
        for k in range(len(batch)):
            dims = tuple(0 if j == k else None for j in range(len(batch)))
            inputs = [x if j == k else x[0] for j, x in enumerate(batch)]
            y = torch.vmap(call, in_dims=dims, randomness=randomness)(*inputs)
            for i in range(len(calls)):
                assert_close(y[i], call(*(x[i] if j == k else x[0] for j, x in enumerate(batch))))


@cases("func", ("auto",))
def test_func(case, tier):
    ours, theirs = Call(case), Call(case, "theirs")
    primals = tuple(x.detach() for x in ours.inputs)
    every = tuple(range(len(primals)))

    def loss(call):
        return lambda *inputs: call(*inputs).pow(3).sum()

    # The oracle differentiates torch's function twice without vmap: torch's own torch.func.hessian of layer_norm
    # is wrong in its (weight, input) block, on torch 2.10 and 2.15 alike.
    first = torch.autograd.functional.jacobian(loss(theirs), primals)
    second = torch.autograd.functional.hessian(loss(theirs), primals)
    with expected(case, "func"):
        assert_close(torch.func.grad(loss(ours), every)(*primals), first)
        assert_close(torch.func.hessian(loss(ours), every)(*primals), second)
        forward_first = torch.func.jacfwd(loss(ours), every, randomness="same")
        assert_close(torch.func.jacrev(forward_first, every)(*primals), second)


@cases("compile", ("auto",))
def test_compile(case, tier):
    call = Call(case, dtype=torch.float32)
    y, truth = grads(call)
    for dynamic in (False, True):  # sizes as constants, and as symbols
        torch._dynamo.reset()
        compiled = torch.compile(case.plain("ours"), fullgraph=True, backend="aot_eager", dynamic=dynamic)
        torch.manual_seed(0)
        with expected(case, "compile"):
            again = compiled(*call.args, **call.kwargs)
            assert_close(again, y, rtol=1e-4, atol=1e-5)
            found = torch.autograd.grad(again, call.inputs, like(y))
            assert_close(found, truth, rtol=1e-4, atol=1e-5)


ONE_AN_OP = {c.op: c for c in reversed(CASES) if not c.random}.values()


@pytest.mark.slow
@pytest.mark.parametrize(("case", "tier"), [pytest.param(c, "fused", id=str(c)) for c in ONE_AN_OP])
def test_fused(case, tier):
    """The formula, compiled by Inductor, equals the formula. No column of the matrix: compiling takes its time."""
    call = Call(case, dtype=torch.float32)
    y, found = grads(call)
    with bptools.backend("formula"):
        expected_y, expected_found = grads(call)
    assert_close(y, expected_y, rtol=1e-4, atol=1e-5)
    assert_close(found, expected_found, rtol=1e-4, atol=1e-5)


@cases("hygiene")
def test_hygiene(case, tier):
    call = Call(case)
    tensors = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, Tensor)]
    before = [(t.clone(), t._version) for t in tensors]
    y = call()
    dy = like(y)
    dy_before = dy.clone()
    first = torch.autograd.grad(y, call.inputs, dy, retain_graph=True)
    twice = torch.autograd.grad(y, call.inputs, 2 * dy, retain_graph=True)
    assert_close(twice, tuple(2 * g for g in first))  # linear in dy, and a second backward sees the same state
    for t, (copy, version) in zip(tensors, before, strict=True):
        assert t._version == version, "an argument was written to"
        assert torch.equal(t, copy)
    assert torch.equal(dy, dy_before), "the incoming gradient was written to"
    assert len({g.untyped_storage().data_ptr() for g in first if g.numel()}) == sum(g.numel() > 0 for g in first)

    gone = weakref.ref(y)
    del y
    gc.disable()
    try:
        assert gone() is None, "the output outlives its last user: it is part of a reference cycle"
    finally:
        gc.enable()

    for reentrant in (False, True):
        y = checkpoint(call, *call.inputs, use_reentrant=reentrant)
        for x in call.inputs:
            x.grad = None
        y.backward(dy)
        assert_close([x.grad for x in call.inputs], list(first))

    undefined = torch.autograd.grad(_Swallow.apply(call()), call.inputs, torch.tensor(1.0), allow_unused=True)
    assert all(g is None for g in undefined), "an undefined output gradient must give undefined gradients"


class _Swallow(torch.autograd.Function):
    """Takes a tensor and gives it no gradient."""

    @staticmethod
    def forward(ctx, x):
        return torch.tensor(0.0)

    @staticmethod
    def backward(ctx, dy):
        return None


def test_capabilities_are_tests(request):
    """Every column of the support matrix is a test of this file, so that no cell can be filled without one."""
    here = {name.removeprefix("test_") for name in vars(request.module) if name.startswith("test_")}
    assert set(CAPABILITIES) <= here
