"""What a storage holds, where it came from, and how the backward pass will have it.

Two graphs, of which one is light and one is strong:

- a **content** is what a storage holds at one version. It hangs on the storage, and knows the recipe that made it:
  an operation and references to other contents. It owns no memory: it holds tensors weakly.
- a **plan** is made when autograd saves a tensor of that content. It owns what is needed: the tensor itself (or a
  code of it), or, if that takes fewer bytes, the recipe and the plans of its ingredients. Plans belong to what
  autograd saved, so memory goes when the graph goes, whatever tensors are still about.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import Variable
from torch.nn import Parameter

from ._codecs import Bits, Narrow, Offloaded, narrowest

SMALL = 1 << 14  # bytes that are not worth an operation
CHAIN = 8  # recipes that may stand on one another before a link is kept, so that not all are made at once
TINY = 64  # bytes that are not worth a code
LONGEST = 100  # operations from what is kept to what is made of it
SEARCH = 200  # contents that are looked at before a recipe is given up as too dear
NEVER = float("inf")


class Ref:
    """A tensor among the arguments of a recipe: a content, and which part of it."""

    __slots__ = ("content", "dtype", "offset", "size", "stride")

    def __init__(self, content: Content, t: Tensor) -> None:
        self.content, self.dtype = content, t.dtype
        self.size, self.stride, self.offset = t.size(), t.stride(), t.storage_offset()

    def is_like(self, t: Tensor, content: Content) -> bool:
        """Whether `t`, which is all of a content, has the layout that this has, which is all of another."""
        same = self.dtype is t.dtype and self.size == t.size() and self.stride == t.stride()
        return same and self.content.nbytes == content.nbytes == t.nbytes

    def is_all(self) -> bool:
        """Whether it covers its content."""
        return self.size.numel() * self.dtype.itemsize == self.content.nbytes


class Recipe:
    """An operation and its arguments, of which tensors are references.

    Attributes:
        refs: every reference, those within lists too.
        rewrites: whether it writes over its first argument.
        copies: whether its result is, byte for byte, its first argument.
        like: size and stride of the result.
        length: operations from what is kept.
    """

    __slots__ = ("args", "copies", "function", "kwargs", "length", "like", "refs", "rewrites")

    def __init__(self, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.refs: list[Ref] = []
        for a in (*args, *kwargs.values()):
            if type(a) is Ref:
                self.refs.append(a)
            elif type(a) is list:
                self.refs += (b for b in a if type(b) is Ref)
        self.rewrites = self.copies = False
        self.like: tuple[Any, Any] | None = None
        self.length = 1

    def price(self, seen: dict[Content, None], worth: float, spare: list[Content] | None = None) -> float:
        """Bytes that must be kept, beside what is kept already, for its ingredients to be had."""
        total = 0.0
        for ref in self.refs:
            total += ref.content.price(seen, worth, spare)
            if total == NEVER:
                break
        return total


class Content:
    """What a storage holds at one version.

    Attributes:
        nbytes: bytes of the storage.
        version: the version of the tensors on it for which this holds.
        outside: whether it was there before: a parameter, a buffer, an input. It is somebody else's to keep.
        recipe: what makes it, if that is cheap.
        costly: what makes it, if that is a matrix product or the like and a budget may ask for it.
        dtype: of the tensor that it was made as.
        limit: that, in this dtype, it holds integers from 0 to below this; if 2, perhaps as floats.
        exact: that no stash may round it: it is a statistic.
        tensor: returns a tensor on the storage while there is one.
        plan: returns how the backward pass will have it, while it will.
        held: such a plan, held from here because the storage has been written to since.
        before: what was noted for the storage under another version, as views by `.data` have.
        waiting: plans that keep a tensor, and could do without if this content were kept.
    """

    __slots__ = (
        "__weakref__", "before", "costly", "dtype", "exact", "held", "limit", "nbytes", "outside", "plan",
        "recipe", "recorder", "tensor", "version", "waiting",
    )  # fmt: skip

    def __init__(self, recorder: object, t: Tensor, *, outside: bool = False) -> None:
        self.recorder, self.outside = recorder, outside
        self.recipe: Recipe | None = None
        self.costly: Recipe | None = None
        self.nbytes, self.version, self.dtype = t.untyped_storage().nbytes(), t._version, t.dtype
        base = t._base if outside else None
        self.tensor: Callable[[], Tensor | None] = weakref.ref(t if base is None else base)
        self.limit = 2 if t.dtype is torch.bool else None
        self.plan: Callable[[], Plan | None] = gone
        self.held: Plan | None = None
        self.before: Content | None = None
        self.exact = False
        self.waiting: list[weakref.ref[Plan]] | None = None

    def length(self) -> int:
        """Operations that lie between it and what is kept."""
        plan = self.plan()
        return 0 if self.recipe is None or (plan is not None and plan.recipe is None) else self.recipe.length

    def size_if_kept(self) -> float:
        """Bytes that keeping it would take; infinite if it is not there any more."""
        if self.tensor() is None:
            return NEVER
        return self.nbytes // 8 if self.limit == 2 else self.nbytes

    def price(self, seen: dict[Content, None], worth: float, spare: list[Content] | None = None) -> float:
        """Bytes that must be kept, beside what is kept already, for this content to be had.

        Args:
            seen: contents that are paid for.
            worth: bytes of what is to be made of it. What is outside is free, unless it is larger: it would have
                to be held if its owner dropped it.
            spare: is given the contents that would be kept.
        """
        if self in seen or self.plan() is not None:
            return 0
        if self.outside:
            t = self.tensor()
            return NEVER if t is None or (self.nbytes > worth and not isinstance(t, Parameter)) else 0
        if len(seen) > SEARCH:
            return NEVER
        seen[self] = None
        kept = self.size_if_kept()
        if self.recipe is not None:
            found: list[Content] = []
            tried = dict(seen)
            made = self.recipe.price(tried, worth, found)
            if made < kept:
                seen.update(tried)
                if spare is not None:
                    spare += found
                return made
        if spare is not None and kept is not NEVER:
            spare.append(self)
        return kept


def gone() -> None:
    """What was there is not there any more."""


class Plan:
    """How the backward pass will have a content: kept, kept as a code, or made again.

    A content that several ask for is made once per backward pass: it is held until the last has had it, and at
    most until the pass is over.
    """

    __slots__ = (
        "__weakref__", "asked", "cached", "chain", "code", "content", "left", "pinned", "recipe", "sources",
        "stream", "tensor", "uses", "version",
    )  # fmt: skip

    def __init__(self, content: Content) -> None:
        self.content = content
        self.tensor: Tensor | None = None
        self.code: Any = None
        self.recipe: Recipe | None = None
        self.sources: dict[Content, Plan] = {}
        self.chain, self.uses, self.left, self.pinned = 0, 0, 0, False
        self.asked: set[tuple[Any, ...]] = set()  # the parts that will be asked for
        self.cached: Tensor | None = None
        self.stream: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes that it holds between the forward and the backward pass."""
        if self.recipe is not None or self.content.outside:
            return 0
        return self.code.nbytes if self.code is not None else self.content.nbytes

    # Making it --------------------------------------------------------------------------------------------

    def keep(self, t: Tensor, stash: Callable[[Tensor], Any] | None = None, offload: bool = False) -> None:
        """Own the content, as it is on the storage of `t`."""
        content = self.content
        with torch._C._DisableTorchDispatch(), torch._C._AutoDispatchBelowAutograd():
            if content.outside or content.nbytes < TINY:
                pass
            elif content.limit == 2:
                self.code = Bits(entire(t, content.dtype))
            elif content.limit is not None and (dtype := narrowest(content.limit)) is not content.dtype:
                self.code = Narrow(entire(t, content.dtype), dtype)
            elif content.nbytes > SMALL and offload and t.is_cuda:
                self.code = Offloaded(entire(t))
            elif (
                content.nbytes > SMALL
                and stash is not None
                and not content.exact
                and t.dtype.is_floating_point
                and t.dtype.itemsize > stash.itemsize
            ):
                self.code = stash(entire(t))
            if self.code is None:
                self.tensor, self.version = t.detach(), t._version

    def make(self, recipe: Recipe, sources: dict[Content, Plan]) -> None:
        """Own the recipe and the plans of its ingredients, and let the tensor go."""
        self.recipe, self.sources = recipe, sources
        self.tensor = self.code = None
        self.chain = max((s.chain for s in sources.values()), default=0)
        for ref in recipe.refs:
            sources[ref.content].ask(ref)

    def everything_below(self) -> Iterator[Plan]:
        """It and all plans that it is made of."""
        yield self
        for source in self.sources.values():
            yield from source.everything_below()

    def copy_before_write(self, t: Tensor) -> None:
        """Own a copy of the content: its storage is about to be written to, where `t` lies."""
        if self.tensor is None:
            return
        if all(apart(part, t) for part in self.asked):
            self.content.plan = gone  # what is asked for lies elsewhere; nobody else may ask now
        else:
            with torch._C._DisableTorchDispatch(), torch._C._AutoDispatchBelowAutograd():
                self.tensor = entire(self.tensor).clone()
            self.version = self.tensor._version

    def ask(self, part: Ref | Saved) -> None:
        """Take note of somebody who will ask for a part of it."""
        self.uses += 1
        self.asked.add((part.size, part.stride, part.offset, part.dtype.itemsize))

    # Having it --------------------------------------------------------------------------------------------

    def have(self) -> Tensor:
        """Return a tensor on whose storage the content is. It is not to be written to."""
        if self.cached is not None and self.stream == _stream(self.cached):
            result = self.cached
            self.left -= 1
            if self.left <= 0:
                self.cached = None
            return result
        if self.recipe is None:
            return self._kept()
        result = self._make()
        if self.uses > 1 and hold_until_end_of_backward(self):
            self.cached, self.left, self.stream = result, self.uses - 1, _stream(result)
        return result

    def _kept(self) -> Tensor:
        if self.code is not None:
            return self.code.decode()
        t = self.tensor
        _check_version(t, self.version)
        if t.untyped_storage().nbytes() < self.content.nbytes:
            raise RuntimeError(
                f"lean(): {_described(t)} that a gradient needs was freed after the forward pass, as sharded "
                "training does with parameters; put lean() inside each sharded module, or keep them gathered "
                "(reshard_after_forward=False)"
            )
        return t

    def _make(self) -> Tensor:
        recipe = self.recipe
        args = [self._argument(a) for a in recipe.args]
        kwargs = {k: self._argument(a) for k, a in recipe.kwargs.items()} if recipe.kwargs else {}
        if recipe.copies:
            return args[0]
        function, like = recipe.function, recipe.like
        if recipe.rewrites:  # what an operation overwrote is made again, and overwritten again
            first = recipe.args[0]
            if not self.sources[first.content].is_fresh():
                beside = not_in_place(function)
                if beside is None or not first.is_all() or any(r.dtype is not first.dtype for r in recipe.refs):
                    args[0] = part(entire(args[0]).clone(), first)
                else:
                    function, like = beside, (first.size, first.stride)
            if like is None:
                function(*args, **kwargs)
                return args[0]
        result = function(*args, **kwargs)
        if isinstance(result, tuple | list):
            result = result[0]
        if recipe.rewrites and result.dtype is not first.dtype:  # logical_not_: 0.0 and 1.0 in place
            result = result.to(first.dtype)
        if like is not None and result.stride() != like[1]:
            result = torch.empty_strided(*like, dtype=result.dtype, device=result.device).copy_(result)
        return result

    def is_fresh(self) -> bool:
        """Whether what it gives is made anew, for nobody else."""
        if self.recipe is None:
            return self.code is not None
        return self.uses <= 1 and not self.recipe.copies

    def _argument(self, a: Any) -> Any:
        if type(a) is Ref:
            return part(self.sources[a.content].have(), a)
        if type(a) is list:
            return [self._argument(b) for b in a]
        return a


@functools.cache
def not_in_place(op: Any) -> Any:
    """Return the operation that does the same and leaves its first argument as it is; None if there is none."""
    if not isinstance(op, OpOverload) or not op._opname.endswith("_"):
        return None
    packet = getattr(torch.ops.aten, op._opname[:-1], None)
    other = getattr(packet, op._overloadname, None)
    if other is None or torch.Tag.pointwise not in other.tags:
        return None
    ours, theirs = ([a.name for a in o._schema.arguments] for o in (other, op))
    return other if ours == theirs else None


def _stream(t: Tensor) -> Any:
    return torch.cuda.current_stream(t.device) if t.is_cuda else None


def apart(part: tuple[torch.Size, tuple[int, ...], int, int], t: Tensor) -> bool:
    """Whether a part of a storage and a tensor on it have no byte in common, as far as is easily seen."""
    size, stride, offset, itemsize = part
    if 0 in size or 0 in t.shape:
        return True
    first, other = (offset * itemsize, t.storage_offset() * t.itemsize)
    if first + _span(size, stride, itemsize) <= other or other + _span(t.shape, t.stride(), t.itemsize) <= first:
        return True
    # Side by side in rows of equal length: the gates of a recurrent cell.
    if itemsize != t.itemsize or not stride or stride[0] != t.stride(0) or len(size) != t.dim():
        return False
    row = stride[0] * itemsize
    mine, its = _span(size[1:], stride[1:], itemsize), _span(t.shape[1:], t.stride()[1:], itemsize)
    begin, start = first % row if row else 0, other % row if row else 0
    return begin + mine <= row and start + its <= row and (begin + mine <= start or start + its <= begin)


def _span(size: Sequence[int], stride: Sequence[int], itemsize: int) -> int:
    """Bytes from the first element to the end of the last."""
    return (1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))) * itemsize


def entire(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole storage of a tensor, flat."""
    return torch.empty(0, dtype=dtype or t.dtype, device=t.device).set_(t.untyped_storage())


def part(t: Tensor, ref: Ref | Saved) -> Tensor:
    """The part of a content that was meant."""
    if t.dtype is ref.dtype:
        if t.size() == ref.size and t.stride() == ref.stride and t.storage_offset() == ref.offset:
            return t
        return t.as_strided(ref.size, ref.stride, ref.offset)
    return torch.empty(0, dtype=ref.dtype, device=t.device).set_(
        t.untyped_storage(), ref.offset, ref.size, ref.stride
    )


class Saved:
    """What autograd holds instead of a tensor that it saved."""

    __slots__ = ("dtype", "offset", "plan", "size", "stride")

    def __init__(self, plan: Plan, t: Tensor) -> None:
        self.plan, self.dtype = plan, t.dtype
        self.size, self.stride, self.offset = t.size(), t.stride(), t.storage_offset()
        plan.ask(self)

    def have(self) -> Tensor:
        """Return the tensor."""
        if self.plan.tensor is not None:
            return part(self.plan.have(), self)
        with (
            _lock,
            torch._C._DisableTorchDispatch(),
            torch._C._DisableAutocast(),
            torch._C._AutoDispatchBelowAutograd(),
        ):
            return part(self.plan.have(), self)


class SavedAsItIs:
    """A tensor that autograd saved and lean() knows nothing about: a subclass, a sparse one, ..."""

    __slots__ = ("tensor", "version")

    def __init__(self, t: Tensor) -> None:
        self.tensor, self.version = t.detach(), None if t.is_inference() else t._version

    def have(self) -> Tensor:
        """Return the tensor."""
        _check_version(self.tensor, self.version)
        return self.tensor


def _check_version(t: Tensor, version: int | None) -> None:
    if version is not None and t._version != version:
        raise RuntimeError(
            f"lean(): {_described(t)} that a gradient needs was modified in place after the forward pass: it is "
            f"at version {t._version}, expected version {version}"
        )


def _described(t: Tensor) -> str:
    return f"a tensor of shape {tuple(t.shape)} and {t.dtype}"


_lock = threading.RLock()
_held: dict[int, list[weakref.ref[Plan]]] = {}


def hold_until_end_of_backward(plan: Plan) -> bool:
    """See to it that what a plan holds is let go when the backward pass is over; False outside of one."""
    task = torch._C._current_graph_task_id()
    if task == -1:
        return False
    if task not in _held:
        for other in [k for k, plans in _held.items() if all(ref() is None for ref in plans)]:
            del _held[other]  # a pass that failed never comes to its end
        _held[task] = []
        Variable._execution_engine.queue_callback(lambda: _let_go(task))
    _held[task].append(weakref.ref(plan))
    return True


def _let_go(task: int) -> None:
    for ref in _held.pop(task, ()):
        if (plan := ref()) is not None:
            plan.cached = None
