"""The op core, on ops made for the purpose."""

from __future__ import annotations

import threading

import pytest
import torch

import bptools
from bptools.ops import _core
from bptools.ops._core import EVERY, Kernel, Op


@pytest.fixture
def declare(monkeypatch):
    """Declare ops that are forgotten after the test."""
    monkeypatch.setattr(_core, "_OPS", dict(_core._OPS))
    return Op


def polar_forward(r, angle, scale):
    """Two differentiable outputs and one that is not."""
    return scale * r * torch.cos(angle), scale * r * torch.sin(angle), r > 1


def polar_backward(dx, dy, r, angle, scale, needs=EVERY):
    dr = scale * (dx * torch.cos(angle) + dy * torch.sin(angle)) if "r" in needs else None
    dangle = scale * r * (dy * torch.cos(angle) - dx * torch.sin(angle)) if "angle" in needs else None
    return dr, dangle


@pytest.fixture
def polar(declare):
    return declare(polar_forward, polar_backward, outputs="x y far", grads="r angle")


def r_and_angle(dtype=torch.float64):
    r, angle = torch.rand(2, 5, dtype=dtype) + 0.5
    return r.requires_grad_(), angle.requires_grad_()


def test_several_outputs(polar):
    def both(r, angle):
        return polar(r, angle, 3.0)[:2]

    inputs = r_and_angle()
    assert torch.autograd.gradcheck(both, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(both, inputs, check_fwd_over_rev=True)
    assert not polar(*inputs, 3.0)[2].requires_grad
    # one output unused: its gradient arrives as zeros
    assert torch.autograd.gradcheck(lambda r, a: polar(r, a, 3.0)[1], inputs)


def test_a_backward_computes_only_what_is_wanted(declare):
    seen = []

    def product_forward(x, weight):
        return x * weight

    def product_backward(dy, x, weight, needs=EVERY):
        seen.append((set(needs), x is not None, weight is not None))
        return dy * weight if "x" in needs else None, dy * x if "weight" in needs else None

    keep = {"x": "weight", "weight": "x"}
    product = declare(product_forward, product_backward, outputs="y", grads="x weight", keep_for=keep)
    x, weight = torch.randn(2, 3).unbind()
    product(x.clone().requires_grad_(), weight).sum().backward()
    product(x, weight.clone().requires_grad_()).sum().backward()
    assert seen == [({"x"}, False, True), ({"weight"}, True, False)]


def test_a_gradient_is_reduced_to_its_input(declare):
    """A formula may leave broadcast dimensions in its gradient; the core, not the engine, takes them out."""

    def add_forward(x, other):
        return x + other

    def add_backward(dy, needs=EVERY):
        return dy, dy

    add = declare(add_forward, add_backward, outputs="y", grads="x other")
    x, other = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    y = add(x, other)
    node = y.grad_fn
    dx, dother = type(node)._forward_cls.backward(node, torch.ones(3, 4))[2:]
    assert dx.shape == (3, 4)
    assert dother.shape == (4,)
    assert torch.equal(dother, torch.full((4,), 3.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": "r angel"}, "polar: grads names angel; it may name r, angle, scale"),
        ({"outputs": "x far"}, "polar: backward names dy; it may name r, angle, scale, dx, needs"),
        ({"keep_for": {"far": "r"}}, "polar: keep_for names far; it may name r, angle, scale"),
        ({"residuals": lambda r, weight: r}, "polar: residuals names weight; it may name r, angle, scale"),
    ],
)
def test_a_wrong_declaration_fails_at_once(declare, change, message):
    with pytest.raises(ValueError, match=message):
        declare(polar_forward, polar_backward, **{"outputs": "x y far", "grads": "r angle", **change})


def test_two_ops_of_one_name_do_not_meet(declare):
    """As when a notebook's cell is run again with another formula."""

    def scale_by(factor):
        def scale_forward(x):
            return factor * x

        def scale_backward(dy, needs=EVERY):
            return (factor * dy,)

        return declare(scale_forward, scale_backward, outputs="y", grads="x")

    x = torch.ones(3, requires_grad=True)
    first, second = scale_by(2), scale_by(3)
    assert torch.autograd.grad(first(x).sum(), x)[0].tolist() == [2, 2, 2]
    assert torch.autograd.grad(second(x).sum(), x)[0].tolist() == [3, 3, 3]


def test_an_op_may_return_its_input(declare):
    def reverse_forward(x):
        return x

    def reverse_backward(dy, needs=EVERY):
        return (-dy,)

    reverse = declare(reverse_forward, reverse_backward, outputs="y", grads="x")
    x = torch.randn(3, requires_grad=True)
    assert torch.autograd.grad(reverse(x).sum(), x)[0].tolist() == [-1, -1, -1]
    assert torch.func.grad(lambda x: reverse(x).sum())(x.detach()).tolist() == [-1, -1, -1]
    assert torch.func.jvp(reverse, (x.detach(),), (torch.ones(3),))[1].tolist() == [-1, -1, -1]


def test_a_gradient_that_the_op_does_not_have_is_refused(declare):
    def gather_forward(index, x):  # the first argument need not be the differentiable one
        return x[index]

    def gather_backward(dy, index, x_shape, needs=EVERY):
        return (dy.new_zeros(x_shape).index_add(0, index, dy),)

    gather = declare(gather_forward, gather_backward, outputs="y", grads="x")
    x = torch.randn(3, dtype=torch.bfloat16, requires_grad=True)
    y = gather(torch.tensor([1, 1]), x)
    y.backward(torch.ones_like(y))
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert x.grad.tolist() == [0, 2, 0]
    with pytest.raises(TypeError, match="gather: index requires a gradient"):
        gather(torch.ones(2, requires_grad=True), x)


def test_a_backward_must_return_a_tuple(declare):
    def one_forward(x):
        return 2 * x

    def one_backward(dy, needs=EVERY):
        return 2 * dy

    one = declare(one_forward, one_backward, outputs="y", grads="x")
    with pytest.raises(TypeError, match="one: backward must return a tuple of gradients, got Tensor"):
        one(torch.ones(3, requires_grad=True)).sum().backward()


def test_half_precision_is_computed_in_float32(declare):
    dtypes = []

    def double_forward(x):
        dtypes.append(x.dtype)
        return 2 * x

    def double_backward(dy, x, needs=EVERY):
        dtypes.append(dy.dtype)
        return (2 * dy,)

    double = declare(double_forward, double_backward, outputs="y", grads="x")
    x = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    y = double(x)
    y.backward(torch.ones_like(y))
    assert dtypes == [torch.float32, torch.float32]
    assert y.dtype == x.grad.dtype == torch.bfloat16


# Tiers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiers(declare):
    """An op that leaves a trace of the tier in which it ran."""
    trace = []

    def plain_forward(x):
        return x.exp()

    def plain_backward(dy, y, needs=EVERY):
        if not torch.compiler.is_compiling():
            trace.append("formula")
        return (dy * y,)

    def kernel_backward(dy, y, needs):
        trace.append("kernel")
        return (dy * y,)

    def usable(x):
        return x.dim() == 1

    op = declare(
        plain_forward, plain_backward, outputs="y", grads="x", kernel=Kernel(torch.exp, kernel_backward, usable)
    )
    return op, trace


def test_auto_takes_the_kernel_where_it_is_usable(tiers):
    op, trace = tiers
    op(torch.randn(3, requires_grad=True)).sum().backward()
    op(torch.randn(3, 1, requires_grad=True)).sum().backward()
    assert trace == ["kernel", "formula"]


def test_the_backward_runs_in_the_tier_of_its_forward(tiers):
    op, trace = tiers
    with bptools.backend("formula"):
        inside = op(torch.randn(3, requires_grad=True))
    outside = op(torch.randn(3, requires_grad=True))
    inside.sum().backward()
    with bptools.backend("formula"):
        outside.sum().backward()
    assert trace == ["formula", "kernel"]


def test_double_backward_runs_the_formula(tiers):
    op, trace = tiers
    x = torch.randn(3, requires_grad=True)
    torch.autograd.grad(op(x).sum(), x, create_graph=True)
    assert trace == ["formula"]


@pytest.mark.slow
def test_the_fused_tier_compiles_the_formula(tiers):
    op, trace = tiers
    x = torch.randn(3, 7, requires_grad=True)
    with bptools.backend("fused"):
        y = op(x)
        y.backward(torch.full_like(y, 2))
        assert torch.func.grad(lambda x: op(x).sum())(x.detach()).shape == x.shape  # the plain formula
    torch.testing.assert_close(x.grad, 2 * x.exp())
    assert trace == ["formula"]


def test_backend_is_a_block_a_decorator_and_a_setting():
    current = _core._backend.get

    @bptools.backend("formula")
    def decorated():
        return current()

    assert (decorated(), current()) == ("formula", "auto")
    elsewhere = []

    def thread():
        bptools.backend("formula").set()
        elsewhere.append(current())

    worker = threading.Thread(target=thread)
    worker.start()
    worker.join()
    assert (elsewhere, current()) == (["formula"], "auto")


def test_a_decorated_function_runs_in_many_threads_at_once():
    inside, together = [], threading.Barrier(3)

    @bptools.backend("formula")
    def work():
        together.wait()
        inside.append(_core._backend.get())
        together.wait()

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert inside == ["formula"] * 3


@pytest.mark.parametrize("size", [16, 512])  # 512: where auto would take the fused formula
def test_fake_tensors_and_batched_gradients(size):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.randn(size, 512, requires_grad=True)
        y = bptools.functional.rms_norm(x, (512,))
        assert torch.autograd.grad(y, x, torch.ones_like(y))[0].shape == x.shape
    x = torch.randn(size, 512, requires_grad=True)
    y = bptools.functional.rms_norm(x, (512,))
    dys = torch.randn(2, *y.shape)
    batched = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(batched[1], torch.autograd.grad(y, x, dys[1])[0])


def test_backend_names_what_it_knows():
    with pytest.raises(ValueError, match="must be one of 'auto', 'formula', 'fused', got 'fast'"):
        bptools.backend("fast")


def test_fused_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(_core, "_can_fuse", lambda device: False)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler"):
        bptools.backend("fused")


# Autocast -----------------------------------------------------------------------------------------------------


def test_a_backward_under_autocast_is_not_cast_again():
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    y = bptools.functional.linear(x, w)
    expected = torch.autograd.grad(y, (x, w), torch.ones_like(y), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, (x, w), torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_transforms_over_an_inplace_op():
    x = torch.randn(3, 4)

    def loss(f):
        return lambda x: f(2 * x, inplace=True).pow(2).sum()

    ours, theirs = loss(bptools.functional.relu), loss(torch.nn.functional.relu)
    torch.testing.assert_close(torch.func.grad(ours)(x), torch.func.grad(theirs)(x))
    torch.testing.assert_close(torch.vmap(torch.func.grad(ours))(x), torch.vmap(torch.func.grad(theirs))(x))
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (x,)), torch.func.jvp(theirs, (x,), (x,)))
