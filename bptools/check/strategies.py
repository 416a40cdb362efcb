"""Hypothesis strategies for anybody's autograd.Function: shape, memory layout, mask and magnitude are drawn.

A tensor's numbers come from a drawn seed, so that hypothesis shrinks the shape, the layout and the magnitude, and
not thousands of floats. `calls` draws the arguments of a function; `same_gradients` is the property: the function
gives the outputs and the gradients of a reference, and leaves its arguments alone.

    from hypothesis import given
    from bptools.check.strategies import calls, same_gradients, shapes, tensors

    @given(shapes(min_side=0).flatmap(lambda shape: calls(tensors(shape), tensors(shape))))
    def test_scale(call):
        same_gradients(Scale, torch.mul, call)

Needs hypothesis: `pip install hypothesis`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from bptools.check import _tools
from bptools.check._check import Failed, Skipped, compare
from bptools.check._subject import Point, Subject
from bptools.check.checks import numerics

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("bptools.check.strategies needs hypothesis: pip install hypothesis") from error

__all__ = [
    "LAYOUTS",
    "MAGNITUDES",
    "NUMBERS",
    "Call",
    "calls",
    "indices",
    "layouts",
    "masks",
    "same_gradients",
    "shapes",
    "tensors",
]


def _channels_last(t: Tensor) -> Tensor:
    """The channels beside each other in memory, where there are two or three dimensions of space."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.detach().clone(memory_format=formats.get(t.dim(), torch.contiguous_format))


# The first of each is what hypothesis shrinks to.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _tools.contiguous,
    "transposed": _tools.transposed,
    "padded": _tools.padded,
    "offset": _tools.offset,
    "expanded": _tools.first_row_everywhere,
    "one number": _tools.one_number_everywhere,
    "channels last": _channels_last,
}
"""How a tensor lies in memory; the two that expand also change its numbers. What is skipped over is NaN."""

MAGNITUDES = (1.0, 1e-3, 30.0, 1e-7, 1e3)
"""What numbers are multiplied by."""

NUMBERS: dict[str, Callable[[tuple[int, ...], torch.dtype, torch.Generator], Tensor]] = {
    "normal": lambda shape, dtype, generator: torch.randn(shape, dtype=dtype, generator=generator),
    "whole": lambda shape, dtype, generator: torch.randn(shape, dtype=dtype, generator=generator).round(),
    "zeros": lambda shape, dtype, generator: torch.zeros(shape, dtype=dtype),
    "positive": lambda shape, dtype, generator: torch.rand(shape, dtype=dtype, generator=generator) + 0.5,
}
"""What numbers are before that: "whole" ones, of which many are equal or 0, and "zeros" are there for kinks."""

ROUNDING = 1e4  # roundings of the largest number that came in, where a true gradient of 0 is a sum that cancels


# Strategies ---------------------------------------------------------------------------------------------------


def shapes(
    min_dims: int = 1, max_dims: int = 3, min_side: int = 1, max_side: int = 5
) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes.

    Args:
        min_dims: the least number of dimensions.
        max_dims: the largest number of dimensions.
        min_side: the least size of a dimension; 0 for empty tensors too.
        max_side: the largest size of a dimension.

    Raises:
        ValueError: if there is no such shape.
    """
    for words, low, high in (("dims", min_dims, max_dims), ("side", min_side, max_side)):
        if not 0 <= low <= high:
            raise ValueError(
                f"shapes: min_{words} must be at least 0 and at most max_{words}, got {low} and {high}"
            )
    return st.lists(st.integers(min_side, max_side), min_size=min_dims, max_size=max_dims).map(tuple)


def layouts(dims: int | None = None) -> st.SearchStrategy[str]:
    """Names of LAYOUTS, for a tensor of so many dimensions; any of them, if None."""
    return st.sampled_from([name for name in LAYOUTS if name != "channels last" or dims in (None, 4, 5)])


def masks(n: int) -> st.SearchStrategy[tuple[bool, ...]]:
    """Which of n inputs require a gradient: all, or fewer, but never none.

    Raises:
        ValueError: if n is not positive.
    """
    if n < 1:
        raise ValueError(f"masks: n must be at least 1, got {n}")
    return st.integers(0, 2**n - 2).map(lambda frozen: tuple(not frozen >> i & 1 for i in range(n)))


def tensors(
    shape: tuple[int, ...] | st.SearchStrategy[tuple[int, ...]] | None = None,
    dtype: torch.dtype | st.SearchStrategy[torch.dtype] = torch.float64,
    layout: str | st.SearchStrategy[str] | None = None,
    magnitude: float | st.SearchStrategy[float] | None = None,
    numbers: str | st.SearchStrategy[str] = "normal",
    requires_grad: bool | st.SearchStrategy[bool] = True,
) -> st.SearchStrategy[Tensor]:
    """Tensors of floating or complex numbers. Each argument is a value, or a strategy of values.

    Args:
        shape: (...); None for `shapes()`.
        dtype: the numbers are drawn in double precision and rounded to it.
        layout: a name of LAYOUTS; None for any that suits the number of dimensions.
        magnitude: what the numbers are multiplied by, positive; None for any of MAGNITUDES.
        numbers: a name of NUMBERS.
        requires_grad: of the tensor. `calls` freezes some of those that do.

    Raises:
        ValueError: if a name is not known, or magnitude not positive.
        TypeError: if dtype is not floating or complex.

    Example:
        >>> tensors((3, 5), layout="padded", magnitude=1.0).example().stride()
        (10, 2)
    """
    _check("tensors", dtype=dtype, layout=layout, magnitude=magnitude, numbers=numbers)
    magnitude = st.sampled_from(MAGNITUDES) if magnitude is None else magnitude
    return _tensors(shapes() if shape is None else shape, dtype, layout, magnitude, numbers, requires_grad)


@st.composite
def _tensors(draw, shape, dtype, layout, magnitude, numbers, requires_grad):
    shape = _drawn(draw, shape)
    dtype, magnitude, numbers = (_drawn(draw, a) for a in (dtype, magnitude, numbers))
    layout = draw(layouts(len(shape))) if layout is None else _drawn(draw, layout)
    _check("tensors", dtype=dtype, layout=layout, magnitude=magnitude, numbers=numbers)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    t = (magnitude * NUMBERS[numbers](shape, wide, _generator(draw))).to(dtype)
    return LAYOUTS[layout](t).requires_grad_(_drawn(draw, requires_grad))


def indices(
    high: int,
    shape: tuple[int, ...] | st.SearchStrategy[tuple[int, ...]] | None = None,
    dtype: torch.dtype | st.SearchStrategy[torch.dtype] = torch.int64,
    layout: str | st.SearchStrategy[str] | None = None,
) -> st.SearchStrategy[Tensor]:
    """Tensors of the integers from 0 to high - 1; with `high=2` and torch.bool, of booleans.

    Args:
        high: of the integers, not included.
        shape: (...); None for `shapes()`.
        dtype: an integer dtype, or torch.bool.
        layout: a name of LAYOUTS; None for any that suits the number of dimensions.

    Raises:
        ValueError: if layout is not known, or high not positive.
    """
    if high < 1:
        raise ValueError(f"indices: high must be at least 1, got {high}")
    _check("indices", layout=layout)
    return _indices(high, shapes() if shape is None else shape, dtype, layout)


@st.composite
def _indices(draw, high, shape, dtype, layout):
    shape, dtype = _drawn(draw, shape), _drawn(draw, dtype)
    layout = draw(layouts(len(shape))) if layout is None else _drawn(draw, layout)
    _check("indices", layout=layout)
    return LAYOUTS[layout](torch.randint(high, shape, generator=_generator(draw)).to(dtype))


@dataclass(frozen=True, repr=False)
class Call:
    """The arguments of a function, and how the gradients of its outputs lie in memory.

    Attributes:
        args, kwargs: the arguments. The tensors among them that require a gradient are differentiated.
        dy: a name of LAYOUTS.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dy: str = "contiguous"

    def __repr__(self) -> str:
        words = [_show(a) for a in self.args] + [f"{name}={_show(a)}" for name, a in self.kwargs.items()]
        return f"Call({', '.join(words)}; dy {self.dy})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would print the numbers of the tensors, and not their layout


def calls(*args: Any, **kwargs: Any) -> st.SearchStrategy[Call]:
    """Calls of a function: any of its tensors frozen, but never all, and output gradients in any layout.

    Args:
        *args: the positional arguments: strategies, constants, or lists, tuples and dicts of these. Sizes that
            have to agree are drawn first, by `flatmap` as in the example, or in a strategy that is `composite`.
        **kwargs: the named ones.

    Raises:
        ValueError: if what is drawn holds no tensor that requires a gradient.

    Example:
        >>> pairs = shapes(2, 2).flatmap(lambda s: calls(tensors(s), tensors(s[1:]), eps=1e-5))
    """
    return _calls(args, kwargs)


@st.composite
def _calls(draw, args, kwargs):
    leaves, spec = tree_flatten((args, kwargs))
    leaves = [_drawn(draw, a) for a in leaves]
    places = [i for i, a in enumerate(leaves) if isinstance(a, Tensor) and a.requires_grad]
    if not places:
        raise ValueError("calls: an argument must be a tensor that requires a gradient, got none")
    for i, wanted in zip(places, draw(masks(len(places))), strict=True):
        leaves[i] = leaves[i].detach().requires_grad_(wanted)
    args, kwargs = tree_unflatten(leaves, spec)
    return Call(args, kwargs, draw(layouts()))


def _drawn(draw: Callable[..., Any], a: Any) -> Any:
    return draw(a) if isinstance(a, st.SearchStrategy) else a


def _generator(draw: Callable[..., Any]) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 2**16 - 1)))


def _check(
    name: str, *, dtype: Any = None, layout: Any = None, magnitude: Any = None, numbers: Any = None
) -> None:
    """Check the values among the arguments; what a strategy draws is checked when it is drawn."""
    for argument, value, known in (("layout", layout, LAYOUTS), ("numbers", numbers, NUMBERS)):
        if isinstance(value, str) and value not in known:
            raise ValueError(f"{name}: {argument} must be one of {', '.join(known)}, got {value!r}")
    if isinstance(magnitude, int | float) and not magnitude > 0:
        raise ValueError(f"{name}: magnitude must be positive, got {magnitude}")
    if isinstance(dtype, torch.dtype) and not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"{name}: dtype must be floating or complex, got {dtype}; integers are drawn by indices")


def _show(a: Any) -> str:
    if not isinstance(a, Tensor):
        return repr(a)
    dtype = str(a.dtype).removeprefix("torch.")
    layout = "" if a.is_contiguous() else f" strides {a.stride()}"
    offset = f" offset {a.storage_offset()}" if a.storage_offset() else ""
    return f"{dtype}{tuple(a.shape)}{layout}{offset}{' with gradient' if a.requires_grad else ''}"


# The property -------------------------------------------------------------------------------------------------


def same_gradients(fn: Any, reference: Callable[..., Any], call: Call) -> None:
    """Hold a differentiable function to a reference, at one call.

    Outputs and gradients, for random output gradients, are those of the reference; arguments and output gradients
    are as before. Equal means: but for rounding, 7e-8 of a number and 4e-10 of the largest in float64, or what the
    reference itself gives or takes where its inputs are off by their last digit, or, where a sum cancels, 2e-12 of
    the largest output gradient, times the largest argument if that is more than 1. At a kink any number from the
    left derivative to the right one is right. Where the reference's gradient is not finite, any is.

    Args:
        fn: an autograd.Function, its `apply`, or a function.
        reference: a plain differentiable function of the same arguments that is right. It gets them contiguous.
        call: the arguments, as `calls` draws them, or `Call(args, kwargs)`. In float64, or the tolerance is
            float32's (1.7e-3); for half precision there is `check_function`.

    Raises:
        AssertionError: if they differ: which output or input, at which index, what was expected and what came.
        ValueError: if no output of fn requires a gradient.
        TypeError: if fn is not one of the above.

    Example:
        >>> x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        >>> same_gradients(torch.tanh, lambda x: 2 * torch.sigmoid(2 * x) - 1, Call((x,), dy="padded"))
    """
    subject = Subject.of(fn)
    if subject.kind == "module":
        raise TypeError("same_gradients: fn must be an autograd.Function, its apply or a function, got a module")
    point = _Laid(subject, call, reference)
    with torch.random.fork_rng(devices=[]):
        try:
            point.plain()
            try:
                numerics.values(point)
                numerics.judge(point, "a gradient differs from the reference")
            except Failed:
                if not _only_rounding(point):
                    raise
        except Failed as failed:
            failed.failure.sample = None  # `call` says it better
            said = "\n  ".join([*failed.failure.lines(), f"at {call!r}"])
            raise AssertionError(f"{subject.name}: {said}") from None
        except Skipped as skipped:
            raise AssertionError(f"{subject.name}: {skipped}\n  at {call!r}") from None


class _Laid(Point):
    """A point whose plain run is at the very arguments, and with output gradients in a layout of their own."""

    def __init__(self, subject: Subject, call: Call, reference: Callable[..., Any]) -> None:
        super().__init__(subject, call.args, call.kwargs, reference=_in_full(reference))
        self.inputs = [self.leaves[i].detach().requires_grad_() for i in self.places]
        self.lay = LAYOUTS[call.dy]

    def plain(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The same, and Failed is raised if forward or backward write to what they are given."""
        if self._plain is not None:
            return self._plain
        pairs = zip(self.leaf_names, self.leaves, strict=True)
        given = [(name, a.detach()) for name, a in pairs if isinstance(a, Tensor)]
        before = [_tools.exact_copy(a) for _, a in given]
        outputs = _tools.run(self.bind(self.subject.call, fresh=False), self.inputs)
        self.differentiable = [i for i, y in enumerate(outputs) if y.requires_grad]
        if not self.differentiable:
            raise ValueError("same_gradients: an output of fn must require a gradient, none does")
        dys = [self.lay(dy) for dy in self.random_like([outputs[i] for i in self.differentiable])]
        given += [(f"output gradient {i}", dy) for i, dy in zip(self.differentiable, dys, strict=True)]
        before += [_tools.exact_copy(dy) for dy in dys]
        found = _tools.pull(outputs, self.inputs, dys, copies=False)
        self._plain = [y.detach() for y in outputs], dys, [g.detach() for g in found]
        compare(
            self,
            [_comparable(a) for a in before],
            [_comparable(a) for _, a in given],
            what="forward or backward writes to what it is given",
            labels=[name for name, _ in given],
            how="",
        )
        return self._plain


def _in_full(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference of contiguous arguments and output gradients: some of torch's own ops misread others."""

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, Tensor.contiguous, (args, kwargs))
        result = reference(*args, **kwargs)
        for y in _tools.tensors_in(result):
            if y.requires_grad:
                y.register_hook(Tensor.contiguous)
        return result

    return call


def _comparable(a: Tensor) -> Tensor:
    return a.byte() if a.dtype is torch.bool else a


def _only_rounding(point: _Laid) -> bool:
    """Whether the function is no further off than the reference moves where its inputs do by a last digit."""
    outputs, dys, got = point.plain()
    truth = Point(Subject.of(point.reference), point.args, point.kwargs)
    if [y.shape for y in truth.plain()[0]] != [y.shape for y in outputs]:
        return False
    true = numerics._both(truth, truth.call, dys)
    excused = numerics._excused(truth, dys, true, point.dtype)
    numbers = [
        a.detach() for a in point.leaves if isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex())
    ]
    level = max(1.0, *map(numerics._largest, numbers))
    cancelled = ROUNDING * torch.finfo(point.dtype).eps * level * max(map(numerics._largest, dys))
    found = [outputs[i] for i in point.differentiable] + got
    return all(
        math.isfinite(allowed) and numerics._largest(a - t) <= allowed + cancelled
        for a, t, allowed in zip(found, true, excused, strict=True)
    )
