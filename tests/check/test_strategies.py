"""The strategies draw what they say; the property finds defects of the zoo, makes them small, spares the twins."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from bptools.check.strategies import (
    LAYOUTS,
    MAGNITUDES,
    NUMBERS,
    Call,
    calls,
    indices,
    layouts,
    masks,
    same_gradients,
    shapes,
    tensors,
)
from bptools.check.zoo import by_number

# The first call of an op is slow; to explain a failure, which no test here asks for, is slower.
HOW = settings(
    max_examples=100,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow],
)


pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(strategy: st.SearchStrategy, how: settings = HOW) -> list[Any]:
    """What hypothesis draws of a strategy."""
    found = []
    how(given(strategy)(lambda value: found.append(value)))()
    return found


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


# The strategies -----------------------------------------------------------------------------------------------


def test_shapes_keep_their_bounds():
    found = drawn(shapes(1, 3, min_side=0, max_side=4))
    assert {len(shape) for shape in found} == {1, 2, 3}
    assert {side for shape in found for side in shape} == {0, 1, 2, 3, 4}
    assert find(shapes(2, 4, min_side=3), lambda shape: True, settings=HOW) == (3, 3)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 2, 3), (2, 2, 2, 2, 3)])
def test_every_layout_appears(shape):
    found = {(t.stride(), t.storage_offset()) for t in drawn(tensors(shape))}
    expected = {(t.stride(), t.storage_offset()) for t in (lay(torch.zeros(shape)) for lay in LAYOUTS.values())}
    assert found == expected
    assert len(found) == len(LAYOUTS) - (len(shape) == 2)


def test_channels_last_needs_space():
    assert "channels last" not in drawn(layouts(3))
    assert set(drawn(layouts())) == set(drawn(layouts(4))) == set(LAYOUTS)


def test_what_a_layout_skips_is_nan():
    for name in ("padded", "offset"):
        t = find(tensors((2, 3), layout=name), lambda t: True, settings=HOW)
        storage = torch.tensor([], dtype=t.dtype).set_(t.detach().untyped_storage())
        assert storage.isnan().sum() == storage.numel() - t.numel() > 0
        assert bool(t.isfinite().all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 2, 3, 3)])
def test_empty_tensors_and_scalars_have_every_layout(layout, shape):
    (t, *_) = drawn(tensors(shape, layout=layout), settings(HOW, max_examples=1))
    assert t.shape == shape
    assert t.is_leaf
    assert t.requires_grad


def test_magnitudes_and_numbers():
    sizes = [float(t.abs().max()) for t in drawn(tensors((20,), requires_grad=False))]
    for magnitude in MAGNITUDES:
        assert any(0.5 * magnitude < size < 10 * magnitude for size in sizes)
    for t in drawn(tensors((20,), magnitude=2.0, numbers="whole", requires_grad=False)):
        assert torch.equal(t, 2 * (t / 2).round())
    assert all(bool((t > 0).all()) for t in drawn(tensors(numbers="positive")))
    assert not any(bool(t.any()) for t in drawn(tensors(numbers="zeros")))
    assert set(NUMBERS) == {"normal", "whole", "positive", "zeros"}


def test_arguments_may_be_strategies():
    dtypes = st.sampled_from([torch.float64, torch.float32, torch.complex128])
    found = drawn(tensors(shapes(2, 2), dtypes, st.just("padded"), st.just(1.0), requires_grad=st.booleans()))
    assert {t.dtype for t in found} == {torch.float64, torch.float32, torch.complex128}
    assert {t.requires_grad for t in found} == {True, False}
    assert all(t.stride(-1) == 2 for t in found)


def test_indices():
    found = drawn(indices(3, shapes(1, 2)))
    assert {int(i) for t in found for i in t.flatten()} == {0, 1, 2}
    assert {t.dtype for t in drawn(indices(2, (2, 3), torch.bool))} == {torch.bool}
    assert len({t.stride() for t in drawn(indices(2, (2, 3), torch.bool))}) > 3


def test_masks_are_every_subset_but_none():
    assert set(drawn(masks(3))) == {
        (a, b, c) for a in (True, False) for b in (True, False) for c in (True, False) if a or b or c
    }
    assert find(masks(3), lambda mask: True, settings=HOW) == (True, True, True)
    assert set(drawn(masks(1))) == {(True,)}


def test_calls_draw_what_is_nested_and_leave_constants_alone():
    strategy = calls(tensors((2,)), [tensors((3,)), 7], None, eps=1e-5, flag=st.booleans())
    found = drawn(strategy)
    for call in found:
        first, (second, seven), none = call.args
        assert (first.shape, second.shape, seven, none, call.kwargs["eps"]) == ((2,), (3,), 7, None, 1e-5)
        assert first.requires_grad or second.requires_grad
    assert {call.kwargs["flag"] for call in found} == {True, False}
    assert {call.dy for call in found} == set(LAYOUTS)


def test_reproducible():
    strategy = shapes().flatmap(lambda shape: calls(tensors(shape), indices(4, shape)))
    again = [[repr(call), [t.tolist() for t in call.args]] for call in drawn(strategy)]
    assert again == [[repr(call), [t.tolist() for t in call.args]] for call in drawn(strategy)]
    state = torch.get_rng_state()
    drawn(strategy)
    same_gradients(torch.sin, torch.sin, Call((x(3),)))
    assert torch.equal(torch.get_rng_state(), state), "torch's own random state was moved"


def test_a_call_says_its_layout():
    call = Call((x(2, 3).mT, 4), {"index": torch.tensor([1, 2])[1:]}, "padded")
    assert repr(call) == "Call(float64(3, 2) strides (1, 3) with gradient, 4, index=int64(1,) offset 1; dy padded)"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: shapes(3, 2), ValueError, "min_dims must be at least 0 and at most max_dims, got 3 and 2"),
        (lambda: shapes(min_side=-1), ValueError, "min_side must be at least 0"),
        (lambda: masks(0), ValueError, "masks: n must be at least 1, got 0"),
        (lambda: tensors(layout="wide"), ValueError, "layout must be one of contiguous, .*, got 'wide'"),
        (lambda: tensors(numbers="odd"), ValueError, "numbers must be one of normal, .*, got 'odd'"),
        (lambda: tensors(magnitude=0), ValueError, "magnitude must be positive, got 0"),
        (lambda: tensors(dtype=torch.int64), TypeError, "dtype must be floating or complex, got torch.int64"),
        (lambda: indices(0), ValueError, "indices: high must be at least 1, got 0"),
        (lambda: indices(2, layout="wide"), ValueError, "indices: layout must be one of contiguous"),
        (lambda: drawn(tensors(layout=st.just("wide"))), ValueError, "layout must be one of contiguous"),
        (lambda: drawn(calls(3)), ValueError, "an argument must be a tensor that requires a gradient, got none"),
        (
            lambda: same_gradients(torch.nn.Linear(2, 2), torch.sin, Call((x(2),))),
            TypeError,
            "fn must be an autograd.Function, its apply or a function, got a module",
        ),
        (
            lambda: same_gradients(torch.sign, torch.sign, Call((x(3).detach(),))),
            ValueError,
            "an output of fn must require a gradient, none does",
        ),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_without_hypothesis(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "bptools.check.strategies")
    with pytest.raises(ImportError, match="pip install hypothesis"):
        import bptools.check.strategies  # noqa: F401


# The property -------------------------------------------------------------------------------------------------


@st.composite
def matrices(draw):
    n, i, o = (draw(st.integers(1, 4)) for _ in range(3))
    return draw(calls(tensors((n, i)), tensors((o, i)), tensors((o,))))


KINKS = st.sampled_from(["normal", "whole", "zeros"])
PAIRS = shapes().flatmap(lambda shape: calls(tensors(shape), tensors(shape)))
LEARNED: dict[int, tuple[st.SearchStrategy[Call], Callable[[Call], bool]]] = {
    # defect: what it is called with, and what is left of that when it is found
    1: (PAIRS, lambda call: call.dy in ("expanded", "one number")),
    2: (calls(tensors()), lambda call: call.dy not in ("contiguous", "offset")),
    3: (calls(tensors()), lambda call: not call.args[0].is_contiguous()),
    4: (calls(tensors()), lambda call: 0 in call.args[0].stride()),
    9: (matrices(), lambda call: [a.requires_grad for a in call.args][1:] == [False, True]),
    33: (calls(tensors()), lambda call: float(call.args[0].detach().norm()) < 1e-6),
    35: (calls(tensors()), lambda call: float(call.args[0].detach().max()) > 4),
    36: (calls(tensors(numbers=KINKS)), lambda call: bool((call.args[0] == 0).any())),
}


@pytest.mark.parametrize("number", LEARNED)
def test_a_defect_is_found_and_made_small(number):
    defect, (strategy, what_is_left) = by_number(number), LEARNED[number]
    tried = []

    @HOW
    @given(strategy)
    def property(call):
        tried.append(call)
        same_gradients(defect.broken, defect.reference, call)

    with pytest.raises(
        AssertionError, match=rf"(?s)^{defect.broken.__name__}: .* expected .*, got .*\n  at Call"
    ) as caught:
        property()
    assert f"call={tried[-1]!r}" in "".join(caught.value.__notes__), "hypothesis does not say which call it was"
    smallest = tried[-1]  # the one that hypothesis reports
    assert what_is_left(smallest)
    assert max(a.numel() for a in smallest.args) <= 2
    assert max(a.dim() for a in smallest.args) <= (2 if number == 9 else 1)


@pytest.mark.parametrize("number", LEARNED)
def test_the_twin_passes(number):
    defect, (strategy, _) = by_number(number), LEARNED[number]
    HOW(given(strategy)(lambda call: same_gradients(defect.correct, defect.reference, call)))()


class WritesInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(scale)
        return x * scale

    @staticmethod
    def backward(ctx, dy):
        (scale,) = ctx.saved_tensors
        dx = dy * scale
        scale.mul_(2)
        return dx, None


class WritesGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return dy.mul_(x.exp())


def test_what_is_written_to_is_named():
    with pytest.raises(AssertionError, match=r"(?s)writes to what it is given.*input scale\[\d\]"):
        same_gradients(WritesInput, torch.mul, Call((x(3), x(3).detach())))
    with pytest.raises(AssertionError, match=r"(?s)writes to what it is given.*output gradient 0"):
        same_gradients(WritesGradient, torch.exp, Call((x(3),)))


def test_the_place_is_named():
    def off(x):
        return torch.cat([x[:4].sin(), x[4:].sin().detach() + 0 * x[4:]])

    message = (
        r"^off: a gradient differs from the reference\n  input x\[4\]; .* expected -0\.\d+, got 0; .*\n  at Call"
    )
    with pytest.raises(AssertionError, match=message):
        same_gradients(off, torch.sin, Call((x(5),)))
    with pytest.raises(AssertionError, match=r"the forward differs from the reference\n  output 0\[\d\]"):
        same_gradients(torch.sin, torch.cos, Call((x(5),)))
    with pytest.raises(AssertionError, match="the forward differs from the reference: output 0 has another shape"):
        same_gradients(torch.sum, torch.sin, Call((x(5),)))


def test_a_kink_and_rounding_are_no_faults():
    def relu_right(x):
        return torch.where(x >= 0, x, 0)

    same_gradients(relu_right, torch.relu, Call((torch.zeros(3, dtype=torch.float64, requires_grad=True),)))

    def naive_softmax(x):
        return (e := (x - x.detach().max()).exp()) / e.sum()

    for magnitude in MAGNITUDES:
        scaled = (magnitude * x(5)).detach().requires_grad_()
        same_gradients(naive_softmax, lambda x: torch.softmax(x, 0), Call((scaled,), dy="expanded"))
