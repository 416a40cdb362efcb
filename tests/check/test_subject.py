"""Subjects and points: names of arguments, leaves in the layout of the sample, calls that keep to themselves."""

import functools

import pytest
import torch
from torch import nn

from bptools.check import _tools
from bptools.check._subject import Point, Subject, has_setup_context


def leaf(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


class New(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, *rest):
        return x * weight

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy * weight, dy * x


class Old(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x * weight


def plain(x, weight=2.0, *, bias=None):
    return x * weight


@pytest.mark.parametrize(
    ("target", "names", "starred"),
    [
        (New, ["x", "weight", "rest"], True),
        (Old, ["x", "weight"], False),
        (New.apply, ["x", "weight", "rest"], True),
        (plain, ["x", "weight"], False),
        (nn.Linear(2, 3), ["input"], False),
        (functools.partial(plain, weight=3.0), ["x"], False),
        (torch.add, [], False),
    ],
    ids=["Function", "old form", "apply", "function", "module", "partial", "builtin"],
)
def test_names_of_arguments(target, names, starred):
    assert Subject.of(target).argument_names() == (names, starred)


def test_the_form_that_torch_func_takes():
    assert has_setup_context(New)
    assert not has_setup_context(Old)


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "names"),
    [
        (plain, (leaf(2), leaf(2)), {}, ["x", "weight"]),
        (plain, (leaf(2),), {"weight": leaf(2), "bias": leaf(2)}, ["x", "weight", "bias"]),
        (plain, ([leaf(2), (leaf(2), leaf(2))], 2.0), {}, ["x[0]", "x[1]", "x[2]"]),
        (New, (leaf(2), leaf(2), leaf(2), leaf(2)), {}, ["x", "weight", "rest[0]", "rest[1]"]),
        (torch.add, (leaf(2), leaf(2)), {}, ["argument 0", "argument 1"]),
    ],
    ids=["positional", "keywords", "nested", "starred", "without signature"],
)
def test_names_of_inputs(target, args, kwargs, names):
    assert Point(Subject.of(target), args, kwargs).names == names


def test_only_what_requires_a_gradient_is_an_input():
    point = Point(Subject.of(plain), (leaf(2), torch.ones(2)), {"bias": None})
    assert point.names == ["x"]
    assert [name for name, _ in point.others] == ["weight"]


def layouts():
    x = torch.arange(24, dtype=torch.float64)
    yield "contiguous", x.view(4, 6)
    yield "transposed", x.view(4, 6).t()
    yield "every second", x.view(4, 6)[:, ::2]
    yield "at an offset", x[5:17].view(3, 4)
    yield "expanded", x[:6].expand(4, 6)
    yield "one number", x[0].expand(3)
    yield "scalar", x[3]
    yield "empty", x[:0].view(0, 3)
    yield "overlapping", x.as_strided((3, 4), (2, 1))
    yield "channels last", x.view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    yield "integers", torch.arange(6).view(2, 3).t()


@pytest.mark.parametrize(("words", "t"), list(layouts()), ids=[words for words, _ in layouts()])
def test_an_exact_copy_lies_in_memory_as_the_original(words, t):
    copy = _tools.exact_copy(t)
    assert torch.equal(copy, t)
    if t.numel():
        assert copy.stride() == t.stride()
        assert _tools.memory(copy) != _tools.memory(t)


def test_inputs_are_leaves_of_the_point_in_the_layout_of_the_sample():
    x = leaf(4, 6).detach().t().requires_grad_()
    point = Point(Subject.of(torch.sin), (x,))
    assert point.inputs[0].is_leaf
    assert point.inputs[0] is not x
    assert point.inputs[0].stride() == x.stride()


def test_calls_get_copies_of_the_other_arguments_unless_told_otherwise():
    def counting(x, count):
        count += 1
        return x * count

    count = torch.zeros(1)
    point = Point(Subject.of(counting), (leaf(2), count))
    point.call(*point.inputs)
    assert count.item() == 0
    point.bind(counting, fresh=False)(*point.inputs)
    assert count.item() == 1


def test_output_gradients_are_random_and_the_same_each_time():
    point = Point(Subject.of(torch.sin), (leaf(3, 4),), seed=5)
    again = Point(Subject.of(torch.sin), (leaf(3, 4),), seed=5)
    other = Point(Subject.of(torch.sin), (leaf(3, 4),), seed=6)
    dy = point.plain()[1][0]
    assert torch.equal(dy, again.plain()[1][0])
    assert not torch.equal(dy, other.plain()[1][0])
    assert dy.unique().numel() == dy.numel()


def test_a_point_in_another_dtype_has_the_rounded_numbers():
    point = Point(Subject.of(plain), (leaf(3), torch.arange(3)), {"bias": torch.ones(3, dtype=torch.complex128)})
    low = point.to(torch.float32)
    assert [a.dtype for a in low.leaves] == [torch.float32, torch.int64, torch.complex64]
    assert torch.equal(low.inputs[0], point.inputs[0].float())
    assert low.inputs[0].requires_grad


def test_a_point_elsewhere_has_its_own_label_and_numbers():
    point = Point(Subject.of(torch.sin), (leaf(3),), label="2")
    there = point.at([torch.zeros(3, dtype=torch.float64)], note="zeros")
    assert repr(there) == "sample 2, zeros"
    assert torch.equal(there.plain()[0][0], torch.zeros(3, dtype=torch.float64))
    assert not torch.equal(point.plain()[0][0], there.plain()[0][0])
