"""The zoo: every twin is right, every broken Function is wrong in the way its title says, and in no other."""

import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bptools.check.zoo import ZOO, Defect, by_number, composition

EVERY = pytest.mark.parametrize("defect", ZOO, ids=lambda d: f"{d.number:02}-{d.name}")

# Broken Functions that an ordinary first backward in float64 gives away; the others pass it.
PLAINLY_WRONG = {12, 13, 26, 27, 29, 32, 34, 38}


def sample(defect, dtype=torch.float64, which=0, seed=0):
    """The arguments of one call."""
    return list(defect.samples("cpu", dtype, seed))[which][0]


def learned(args):
    return [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]


def outputs(f, args):
    """The outputs that are differentiated. The seed is for dropout."""
    torch.manual_seed(0)
    y = f(*args)
    return [t for t in (y if isinstance(y, tuple) else (y,)) if t.requires_grad]


def like(tensors, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(device=t.device, dtype=t.dtype)
        for t in tensors
    ]


def gradients(f, args, dys=None):
    ys = outputs(f, args)
    return torch.autograd.grad(ys, learned(args), like(ys) if dys is None else dys, allow_unused=True)


def second_gradients(f, args):
    ys = outputs(f, args)
    dys = [dy.requires_grad_() for dy in like(ys)]
    dxs = torch.autograd.grad(ys, learned(args), dys, create_graph=True)
    # None and zeros say the same of a gradient that does not depend on its input
    return torch.autograd.grad(dxs, learned(args) + dys, like(dxs, 2), materialize_grads=True)


def same(got, expected, tolerance=1e-12):
    """Equal to `tolerance` of the largest number, None where None."""
    for a, b in zip(got, expected, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if b.numel() and not (a - b).abs().max() <= tolerance * b.abs().max():
            return False
    return True


def right(defect, function, args, dys=None, tolerance=1e-12):
    """Whether the gradient is that of the reference."""
    return same(gradients(function.apply, args, dys), gradients(defect.reference, args, dys), tolerance)


def returned(function, args, needs):
    """What backward returns before the engine repairs it."""
    ctx = SimpleNamespace(needs_input_grad=needs)
    ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
    y = function.forward(*args)
    function.setup_context(ctx, args, y)
    return function.backward(ctx, *like([y]))


def raises(error, f, *args):
    try:
        f(*args)
    except error:
        return True
    return False


# Whether a Function has the defect: one predicate a number, true of the broken one and false of its twin.


def shows_expanded_gradient(defect, function):
    args = sample(defect)
    return not right(defect, function, args, [torch.tensor(0.3, dtype=torch.float64).expand(3, 5)])


def shows_packed_gradient(defect, function):
    wide = torch.full((3, 7), float("nan"), dtype=torch.float64)
    wide[:, :5] = like([wide[:, :5]])[0]
    return not right(defect, function, sample(defect), [wide[:, :5]])


def shows_packed_input(defect, function):
    (x,) = sample(defect)
    x = x.detach().t().requires_grad_()
    return not same([function.apply(x)], [defect.reference(x)])


def shows_expanded_input(defect, function):
    (x,) = sample(defect)
    row = x[:1].detach().requires_grad_()

    def expanded(f):
        return lambda row: f(row.expand(3, 5))

    return not same(gradients(expanded(function.apply), (row,)), gradients(expanded(defect.reference), (row,)))


def shows_size_zero(defect, function):
    x = torch.zeros(0, 5, requires_grad=True)
    assert function.apply(x).shape == (0, 5)
    return raises(ZeroDivisionError, gradients, function.apply, (x,))


def shows_unreduced_gradient(defect, function):
    x, w, b = sample(defect)
    assert right(defect, function, (x, w, b))
    return returned(function, (x, w, b), (True,) * 3)[2].shape != b.shape


def shows_gradient_dtype(defect, function):
    args = sample(defect, torch.float32)
    assert all(g.dtype == torch.float32 for g in gradients(function.apply, args))
    return any(g.dtype != torch.float32 for g in returned(function, args, (True,) * 3))


def shows_gradient_strides(defect, function):
    x, w, b = sample(defect)
    return returned(function, (x, w, b), (True,) * 3)[1].stride() != w.stride()


def shows_needs_wrong_index(defect, function):
    x, w, b = sample(defect)
    return not right(defect, function, (x, w.detach(), b))


def shows_needs_ignored(defect, function):
    return returned(function, sample(defect), (False, True, False))[0] is not None


def shows_unused_output(defect, function):
    (x,) = sample(defect)
    sine, _ = function.apply(x)
    return raises(AttributeError, torch.autograd.grad, sine.sum(), x)


def shows_none_gradient(defect, function):
    dx, dw = gradients(function.apply, sample(defect))
    assert dx is not None
    return dw is None


def shows_gradient_not_multiplied(defect, function):
    one, three = torch.ones(2, dtype=torch.float64) * torch.tensor([1, 3])
    assert right(defect, function, sample(defect), [one])
    return not right(defect, function, sample(defect), [three])


def shows_gradient_mutated(defect, function):
    dy = like([sample(defect)[0]])
    before = dy[0].clone()
    expected = gradients(defect.reference, sample(defect), [before])
    assert same(gradients(function.apply, sample(defect), dy), expected)
    return not torch.equal(dy[0], before)


def shows_input_mutated(defect, function):
    (x,) = sample(defect)
    before = x.detach().clone()
    assert same([function.apply(x)], [defect.reference(before)])
    return not torch.equal(x, before)


def shows_buffer_mutated(defect, function):
    x, running = sample(defect)
    before = running.clone()
    assert same([function.apply(x, running)], [defect.reference(x, before)])
    return not torch.equal(running, before)


def shows_output_not_marked(defect, function):
    return function.apply(*sample(defect))[1].requires_grad


def shows_shared_gradient(defect, function):
    dx, dz = returned(function, sample(defect), (True, True))
    return dx.data_ptr() == dz.data_ptr()


def shows_one_tensor_twice(defect, function):
    x, _ = sample(defect)
    dys = like([x])
    got, expected = (torch.autograd.grad(f(x, x), x, dys) for f in (function.apply, defect.reference))
    return not same(got, expected)


def shows_input_on_ctx(defect, function):
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        function.apply(*sample(defect))
    return not packed


def shows_output_on_ctx(defect, function):
    gc.collect()
    gc.disable()
    try:
        y = function.apply(*sample(defect))
        seen = weakref.ref(y)
        del y
        return seen() is not None
    finally:
        gc.enable()
        gc.collect()


def shows_saved_data(defect, function):
    (x,) = sample(defect)
    x = x * 1  # not a leaf, so that it may change in place
    y = function.apply(x)
    with torch.no_grad():
        x.neg_()
    return not raises(RuntimeError, y.sum().backward)


def shows_backward_with_state(defect, function):
    y = function.apply(*(args := sample(defect)))
    first, second = (torch.autograd.grad(y, learned(args), retain_graph=True) for _ in range(2))
    return not same(first, second)


def shows_wrong_second_derivative(defect, function):
    args = sample(defect)
    assert right(defect, function, args)
    return not same(second_gradients(function.apply, args), second_gradients(defect.reference, args))


def shows_non_deterministic(defect, function):
    args = sample(defect)
    assert right(defect, function, args, tolerance=1e-8)
    first, second = (gradients(function.apply, args)[0] for _ in range(2))
    return not torch.equal(first, second)


def shows_mask_not_saved(defect, function):
    return not right(defect, function, sample(defect))


def shows_state_on_class(defect, function):
    (x,), (other,) = sample(defect), sample(defect, seed=5)

    def interleaved(f):
        y = f(x)
        f(other)
        return torch.autograd.grad(y, x, like([y]))

    return not same(interleaved(function.apply), interleaved(defect.reference))


def shows_inner_downcast(defect, function):
    assert right(defect, function, sample(defect), tolerance=1e-6)
    return not right(defect, function, sample(defect), tolerance=1e-9)


def shows_dtype_branch(defect, function):
    assert right(defect, function, sample(defect))
    return not right(defect, function, sample(defect, torch.float32), tolerance=1e-3)


def shows_half_overflow(defect, function):
    (x,) = sample(defect, torch.float16)
    assert same([function.apply(x)], [defect.reference(x)], 1e-2)
    big = x.detach() * 1000
    return not same([function.apply(big)], [defect.reference(big)], 1e-2)


def shows_constant_off(defect, function):
    assert right(defect, function, sample(defect), tolerance=6e-4)
    return not right(defect, function, sample(defect), tolerance=4e-4)


def shows_small_values(defect, function):
    (x,) = sample(defect)
    return not right(defect, function, ((x.detach() * 1e-8).requires_grad_(),), tolerance=0.1)


def shows_one_element(defect, function):
    args = sample(defect)
    (got,), (expected,) = gradients(function.apply, args), gradients(defect.reference, args)
    wrong = ~torch.isclose(got, expected)
    assert wrong.numel() == 4096
    assert wrong.sum() <= 1
    return bool(wrong.any())


def shows_rare_branch(defect, function):
    (x,) = sample(defect)
    return not right(defect, function, ((x.detach() + 4).requires_grad_(),), tolerance=1e-6)


def shows_kink(defect, function):
    zero = torch.zeros(1, requires_grad=True)
    (slope,) = torch.autograd.grad(function.apply(zero), zero, torch.ones(1))
    return not 0.25 <= slope.item() <= 1


def shows_nan_at_zero(defect, function):
    x = torch.tensor([0.0, float("inf"), -float("inf"), 1.0], requires_grad=True)
    return bool(gradients(function.apply, (x,))[0].isnan().any())


def shows_complex_conjugate(defect, function):
    assert not list(defect.samples("cpu", torch.bfloat16, 0))
    return not right(defect, function, sample(defect))


def shows_jvp_factor(defect, function):
    (x,) = sample(defect)
    tangent = like([x])
    got, expected = (torch.func.jvp(f, (x.detach(),), tuple(tangent)) for f in (function.apply, defect.reference))
    return not same(got, expected)


def shows_vmap_dimension(defect, function):
    x, dim = sample(defect)
    batch = torch.stack([x.detach(), 2 * x.detach(), -x.detach()])
    loop = torch.stack([function.apply(one, dim) for one in batch])
    return not same([torch.func.vmap(function.apply, (0, None))(batch, dim)], [loop])


def shows_no_setup_context(defect, function):
    (x,) = sample(defect)
    return raises(RuntimeError, torch.func.grad(lambda x: function.apply(x).sum()), x.detach())


def shows_autocast(defect, function):
    args = sample(defect, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = function.apply(*args)
    assert y.dtype == torch.bfloat16
    return raises(RuntimeError, torch.autograd.grad, y, learned(args), like([y]))


def shows_compiled(defect, function):
    args = sample(defect)
    assert right(defect, function, args)
    compiled = torch.compile(lambda x: function.apply(x), fullgraph=True, backend="aot_eager")
    return not same(gradients(compiled, args), gradients(defect.reference, args))


def shows_cuda_graph(defect, function):
    """On a CPU by pretence: the warm-up saw a norm of 2, and a capture is under way."""
    (x,) = sample(defect)
    assert right(defect, function, (x,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composition, "capturing", lambda x: True)
        patch.setitem(composition.UnitCaptured.norms, x.shape, torch.tensor(2.0))
        return not same([function.apply(x)], [defect.reference(x)])


def shows_hooks_bypassed(defect, function):
    x, w, b = sample(defect)
    reduced = []
    w.register_post_accumulate_grad_hook(lambda w: reduced.append(w.grad is not None))
    y = function.apply(x, w, b)
    y.backward(*like([y]))
    assert same([x.grad, w.grad, b.grad], gradients(defect.reference, (x, w, b)))
    return reduced == [False]


SHOWS = {
    1: shows_expanded_gradient,
    2: shows_packed_gradient,
    3: shows_packed_input,
    4: shows_expanded_input,
    5: shows_size_zero,
    6: shows_unreduced_gradient,
    7: shows_gradient_dtype,
    8: shows_gradient_strides,
    9: shows_needs_wrong_index,
    10: shows_needs_ignored,
    11: shows_unused_output,
    12: shows_none_gradient,
    13: shows_gradient_not_multiplied,
    14: shows_gradient_mutated,
    15: shows_input_mutated,
    16: shows_buffer_mutated,
    17: shows_output_not_marked,
    18: shows_shared_gradient,
    19: shows_one_tensor_twice,
    20: shows_input_on_ctx,
    21: shows_output_on_ctx,
    22: shows_saved_data,
    23: shows_backward_with_state,
    24: shows_wrong_second_derivative,
    25: shows_wrong_second_derivative,
    26: shows_non_deterministic,
    27: shows_mask_not_saved,
    28: shows_state_on_class,
    29: shows_inner_downcast,
    30: shows_dtype_branch,
    31: shows_half_overflow,
    32: shows_constant_off,
    33: shows_small_values,
    34: shows_one_element,
    35: shows_rare_branch,
    36: shows_kink,
    37: shows_nan_at_zero,
    38: shows_complex_conjugate,
    39: shows_jvp_factor,
    40: shows_vmap_dimension,
    41: shows_no_setup_context,
    42: shows_autocast,
    43: shows_compiled,
    44: shows_cuda_graph,
    45: shows_hooks_bypassed,
}


def test_each_number_once():
    assert [d.number for d in ZOO] == list(range(1, 46)) == list(SHOWS)
    assert len({d.name for d in ZOO}) == len({d.title for d in ZOO}) == 45
    assert all(isinstance(d, Defect) and d.broken is not d.correct for d in ZOO)
    assert [d.number for d in ZOO if d.visible != "cpu"] == [44]
    assert by_number(7).number == 7
    with pytest.raises(KeyError, match="1 to 45; got 46"):
        by_number(46)


@EVERY
def test_broken_is_broken(defect):
    assert SHOWS[defect.number](defect, defect.broken)


@EVERY
def test_correct_is_not(defect):
    assert not SHOWS[defect.number](defect, defect.correct)


@EVERY
def test_broken_passes_otherwise(defect):
    """One defect each: the rest of a broken Function is right."""
    if defect.number in PLAINLY_WRONG:
        pytest.skip("an ordinary backward gives it away")
    for which in range(len(list(defect.samples("cpu", torch.float64, 0)))):
        args = sample(defect, which=which)
        reference = gradients(defect.reference, args)
        ys = outputs(defect.broken.apply, args)
        if defect.number == 17:  # the mask that should not require grad
            ys = ys[:1]
        for a in learned(args):
            a.grad = None
        torch.autograd.backward(ys, like(ys))
        assert same([a.grad for a in learned(args)], reference)
        assert same(ys[:1], outputs(defect.reference, sample(defect, which=which))[:1])


@EVERY
def test_samples(defect):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        first, again = (list(defect.samples("cpu", dtype, 3)) for _ in range(2))
        assert len(first) == len(again)
        for (args, kwargs), (args_again, _) in zip(first, again, strict=True):
            assert not kwargs
            assert learned(args)
            assert all(a.is_leaf and a.to(dtype).dtype == dtype for a in learned(args) if not a.is_complex())
            assert all(torch.equal(a, b) for a, b in zip(learned(args), learned(args_again), strict=True))
    assert not torch.equal(learned(sample(defect, seed=0))[0], learned(sample(defect, seed=1))[0])


@EVERY
def test_twin_value_and_gradients(defect):
    f = defect.correct.apply
    for args, _ in defect.samples("cpu", torch.float64, 0):
        assert same(outputs(f, args), outputs(defect.reference, args))
        assert right(defect, defect.correct, args)
        assert same(second_gradients(f, args), second_gradients(defect.reference, args))
        if sum(a.numel() for a in learned(args)) < 100:  # a full Jacobian of 4,096 inputs takes minutes

            def seeded(*args):
                return tuple(outputs(f, args))

            assert torch.autograd.gradcheck(seeded, args, check_batched_grad=True)
            assert torch.autograd.gradgradcheck(seeded, args, gen_non_contig_grad_outputs=True)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_twin_at_lower_precision(defect, dtype):
    """The error against float64 is at most twice torch's own, and a rounding."""
    for args, _ in defect.samples("cpu", dtype, 0):
        exact = [
            a.detach().to(torch.promote_types(a.dtype, torch.float64)).requires_grad_(a.requires_grad)
            if isinstance(a, torch.Tensor) and (a.is_floating_point() or a.is_complex())
            else a
            for a in args
        ]
        f = defect.correct.apply
        ours = [*outputs(f, args), *gradients(f, args)]
        torchs = [*outputs(defect.reference, args), *gradients(defect.reference, args)]
        truth = outputs(defect.reference, exact)
        # one grad_output for both precisions, or their difference would be taken for an error
        dys = [dy.to(t.dtype) for dy, t in zip(like(ours[: len(truth)]), truth, strict=True)]
        truth += gradients(defect.reference, exact, dys)
        for our, their, true in zip(ours, torchs, truth, strict=True):
            assert our.dtype == their.dtype
            error, allowed = (our - true).abs().max(), (their - true).abs().max()
            assert error <= 2 * allowed + torch.finfo(dtype).eps * true.abs().max()


@EVERY
def test_twin_in_any_layout(defect):
    """Slices, expanded tensors and nothing at all; the gradient comes contiguous."""

    def sliced(a):
        wide = torch.full((*a.shape, 2), float("nan"), dtype=a.dtype)
        wide[..., 0] = a.detach()
        return wide[..., 0].requires_grad_()

    def expanded(a):
        return a.detach()[:1].expand(a.shape).requires_grad_()

    def empty(a):  # 3 and 4 are sizes of features or rows in every sample
        return a.detach().new_zeros([0 if size in (3, 4, 64) else size for size in a.shape]).requires_grad_()

    for args, _ in defect.samples("cpu", torch.float64, 0):
        for variant in (sliced, expanded, empty):
            if variant is empty and defect.number in (16, 26):  # a buffer and indices have to fit
                continue
            varied = [variant(a) if isinstance(a, torch.Tensor) and a.requires_grad else a for a in args]
            assert right(defect, defect.correct, varied)
            assert all(g.is_contiguous() for g in gradients(defect.correct.apply, varied))


@EVERY
def test_twin_under_func(defect):
    """vmap of the call and of its gradient, over the first and over the last dimension, against a loop."""
    args = sample(defect)
    dims = [0 if isinstance(a, torch.Tensor) and a.is_floating_point() else None for a in args]
    if learned(args)[0].is_complex():
        dims = [0] * len(args)
    batch = [
        a if d is None else torch.stack([k * a.detach() for k in (1, 1.5, -2)])
        for a, d in zip(args, dims, strict=True)
    ]

    def first(*args):
        y = defect.correct.apply(*args)
        return y[0] if isinstance(y, tuple) else y

    def loss(*args):
        y = first(*args)
        return (y.abs() ** 2 * torch.arange(1, y.numel() + 1).view(y.shape)).sum()

    wrt = tuple(i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad)
    for f in (first, torch.func.grad(loss, wrt)):
        rows = []
        for k in range(3):
            torch.manual_seed(0)
            y = f(*(a if d is None else a[k] for a, d in zip(batch, dims, strict=True)))
            rows.append(y if isinstance(y, tuple) else (y,))
        loop = [torch.stack(row) for row in zip(*rows, strict=True)]
        for last in (False, True):
            moved = [a.movedim(0, -1) if last and d is not None else a for a, d in zip(batch, dims, strict=True)]
            in_dims = tuple(d if d is None or not last else -1 for d in dims)
            torch.manual_seed(0)
            got = torch.func.vmap(f, in_dims, randomness="same")(*moved)
            assert same(got if isinstance(got, tuple) else (got,), loop)


@EVERY
def test_twin_under_checkpoint_and_autocast(defect):
    for reentrant in (False, True):
        args = sample(defect)
        ys = outputs(lambda *args, r=reentrant: checkpoint(defect.correct.apply, *args, use_reentrant=r), args)
        torch.autograd.backward(ys, like(ys))
        assert same([a.grad for a in learned(args)], gradients(defect.reference, args))
    if defect.number == 38:  # autocast leaves complex numbers alone
        return
    for inside in (False, True):
        args = sample(defect, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            ours, torchs = outputs(defect.correct.apply, args), outputs(defect.reference, args)
            with torch.autocast("cpu", enabled=False) if not inside else contextlib.nullcontext():
                got = torch.autograd.grad(ours, learned(args), like(ours))
        expected = torch.autograd.grad(torchs, learned(args), like(torchs))
        assert [y.dtype for y in ours] == [y.dtype for y in torchs]
        assert same(got, expected, 2e-2)


@EVERY
def test_twin_compiles(defect):
    if defect.number == 39:
        pytest.skip("torch.compile refuses a Function that has a jvp")
    torch.compiler.reset()
    compiled = torch.compile(lambda *args: defect.correct.apply(*args), fullgraph=True, backend="aot_eager")
    args = sample(defect)
    assert same(outputs(compiled, args), outputs(defect.reference, args))
    assert same(gradients(compiled, args), gradients(defect.reference, args))


@EVERY
def test_twin_holds_nothing(defect):
    """No input is changed, and the output is freed with its last reference."""
    args = sample(defect)
    before = [a.detach().clone() for a in args if isinstance(a, torch.Tensor)]
    gc.collect()
    gc.disable()
    try:
        ys = outputs(defect.correct.apply, args)
        dys = like(ys)
        torch.autograd.grad(ys, learned(args), dys)
        seen = [weakref.ref(y) for y in ys]
        del ys
        assert all(ref() is None for ref in seen)
    finally:
        gc.enable()
    after = [a for a in args if isinstance(a, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["broken", "correct"])
def test_cuda_graph_replays_the_warm_up(kind):
    defect = by_number(44)
    function = getattr(defect, kind)
    x = torch.randn(3, 5, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function.apply(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = function.apply(x)
    graph.replay()
    assert same([y], [defect.reference(x)], 1e-6)
    x.mul_(3).add_(1)
    graph.replay()
    assert same([y], [defect.reference(x)], 1e-6) == (kind == "correct")
