"""`lean()`: less is kept for the backward pass of any model, and its gradients are the same to the last bit.

Two hooks of torch are joined. A dispatch mode sees every ATen operation below autograd, whoever calls it, and
notes on each new storage how its content was made (`_contents`). Saved-tensor hooks see every tensor that
autograd is about to keep, and keep instead what its content can be made from again, where that takes fewer
bytes.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from . import _codecs
from ._cheap import Kind, aten, hidden_writes, indices_below, kind, products, repeatable, special_way
from ._contents import CHAIN, LONGEST, SMALL, TINY, Content, Plan, Recipe, Ref, Saved, SavedAsItIs, gone

STASHES = {"bf16": _codecs.BFloat16, "int8": _codecs.Int8}
PLAIN_TYPES = {Tensor, torch.nn.Parameter, torch.nn.Buffer}
BERNOULLI = {aten.bernoulli_, aten.bernoulli}
COPIES = {aten.clone, aten._to_copy}


def plain(t: Any) -> bool:
    """Whether this is an ordinary dense tensor, which its storage says all about."""
    if type(t) not in PLAIN_TYPES:
        return False
    keys = torch._C._dispatch_keys(t).raw_repr()
    if keys not in _plain_keys:
        odd = t.is_conj() or t.is_neg() or t.is_quantized or t.is_inference()
        _plain_keys[keys] = t.layout is torch.strided and t.device.type != "meta" and not odd
    return _plain_keys[keys]


_plain_keys: dict[int, bool] = {}


# What happens in the forward pass -----------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Notes on every new storage how its content was made."""

    costly = False  # whether to note the recipes of matrix products too, because a budget may ask for them
    supports_higher_order_operators = True  # and lets them through

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[weakref.ref[Content]] = []

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for ref in self.outside:  # whom nothing binds any more: torch.utils.swap_tensors asks for that
            if (content := ref()) is not None:
                content.tensor = gone

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Say that compiled modules may run compiled; what they do within is then not seen."""
        return True

    def content(self, t: Tensor) -> Content:
        """Return what is on the storage of a plain tensor."""
        storage = t.untyped_storage()
        content = getattr(storage, "_bptools_content", None)
        if content is None or content.recorder is not self:
            content = storage._bptools_content = Content(self, t, outside=True)
            self.outside.append(weakref.ref(content))
        elif content.version != t._version:  # it was written to where nobody saw it
            before, content = content, Content(self, t, outside=content.outside)
            content.before = before
            storage._bptools_content = content
        elif content.tensor is not gone and content.tensor() is None:
            content.tensor = weakref.ref(t)
        return content

    def note(self, t: Tensor) -> Content:
        """Note a new content on the storage of a plain tensor."""
        content = t.untyped_storage()._bptools_content = Content(self, t)
        return content

    def __torch_dispatch__(self, op: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(op, OpOverload) or torch.is_inference_mode_enabled():
            return op(*args, **kwargs)
        known = kind(op)
        if known.view:
            return op(*args, **kwargs)
        if not known.writes and not known.special:
            results = op(*args, **kwargs)
            self._after_making(op, known, args, kwargs, results)
            return results
        recipe = self._recipe(op, args, kwargs) if known.cheap else None
        written = [t for where in known.writes for t in _plain_tensors(_argument(where, args, kwargs))]
        hidden = _plain_tensors(hidden_writes(op, args))
        for t in (*written, *hidden):
            self._before_write(t)
        results = op(*args, **kwargs)
        for t in hidden:
            self.note(t).outside = True
        for t in written:
            self._after_write(op, t, recipe)
        if not written:
            self._after_making(op, known, args, kwargs, results)
        return results

    def _recipe(self, function: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> Recipe | None:
        """Return the recipe, unless it has an ingredient that is no plain tensor or has come too long a way."""
        recipe = Recipe(function, [self._refer(a) for a in args], {k: self._refer(a) for k, a in kwargs.items()})
        for a in (*recipe.args, *recipe.kwargs.values()):
            if isinstance(a, Tensor) or (type(a) is list and any(isinstance(b, Tensor) for b in a)):
                return None
        recipe.length = 1 + max([ref.content.length() for ref in recipe.refs], default=0)
        return recipe if recipe.length <= LONGEST else None

    def _refer(self, a: Any) -> Any:
        """An argument of a recipe: plain tensors become references."""
        if isinstance(a, Tensor):
            return Ref(self.content(a), a) if plain(a) else a
        if type(a) in (list, tuple) and any(isinstance(b, Tensor) for b in a):
            return [self._refer(b) for b in a]
        return a

    def _before_write(self, t: Tensor) -> None:
        content = self.content(t)
        known: Content | None = content
        while known is not None:
            if (plan := known.plan()) is not None:
                plan.copy_before_write(t)
            known.tensor = gone
            known = known.before
        free = content.plan() is None and content.recipe is None and not content.outside
        if free and content.limit == 2 and content.nbytes >= max(TINY, SMALL):
            content.held = plan = Plan(content)  # a mask in bits, for what is made of it by writing over it
            content.plan = weakref.ref(plan)
            plan.keep(t)

    def _after_write(self, op: OpOverload, t: Tensor, recipe: Recipe | None) -> None:
        outside = self.content(t).outside
        content = self.note(t)
        content.outside = outside
        content.version = t._version + 1  # autograd counts when the operation has returned
        if op.overloadpacket in BERNOULLI and t.nbytes == content.nbytes:
            content.limit = 2
        elif recipe is not None and not outside and not _overlaps(recipe):
            recipe.rewrites = True
            content.recipe = recipe

    def _after_making(self, op: OpOverload, known: Kind, args: Any, kwargs: dict[str, Any], results: Any) -> None:
        made: list[Content | None] = []
        plain_results = _plain_tensors(results)
        for t in plain_results:
            content = getattr(t.untyped_storage(), "_bptools_content", None)
            as_it_was = content is not None and content.recorder is self and content.version == t._version
            made.append(None if as_it_was else self.note(t))
        if not made or (content := made[0]) is None:
            return
        if op.overloadpacket in BERNOULLI:
            content.limit = 2
        for statistic in made[1:]:
            if statistic is not None:
                statistic.exact = True
        if len(made) > 1 and made[1] is not None and (limit := indices_below(op, args)) is not None:
            made[1].limit = limit
        result = plain_results[0]
        if content.nbytes <= SMALL or result.nbytes != content.nbytes:
            return
        if known.special:
            way = special_way(op, args, plain_results)
            recipe = None if way is None else self._recipe(*way, {})
        elif known.cheap or (known.matmul and self.costly and repeatable(op, args, kwargs)):
            recipe = self._recipe(op, args, kwargs)
        else:
            return
        if recipe is None:
            return
        recipe.like = result.size(), result.stride()
        if known.matmul:
            content.costly = recipe
        else:
            content.recipe = recipe
            if op.overloadpacket in COPIES and args[0].device == result.device:
                recipe.copies = recipe.args[0].is_like(result, content)


def _argument(where: int | str, args: Any, kwargs: Any) -> Any:
    return kwargs.get(where) if isinstance(where, str) else args[where] if where < len(args) else None


def _plain_tensors(a: Any) -> list[Tensor]:
    if isinstance(a, Tensor):
        return [a] if plain(a) else []
    return [t for t in a if plain(t)] if isinstance(a, list | tuple) else []


def _overlaps(recipe: Recipe) -> bool:
    """Whether another operand lies on the storage that is written to, in another way: then order matters."""
    where = [(r.size, r.stride, r.offset) for r in recipe.refs if r.content is recipe.args[0].content]
    return any(other != where[0] for other in where)


class Session:
    """What one `lean()` block keeps, and by which policy.

    Attributes:
        kept_bytes: bytes that are kept for the backward pass now, parameters, buffers and inputs not counted.
    """

    def __init__(
        self,
        recorder: Recorder | None = None,
        stash: str | None = None,
        offload: str | None = None,
        budget: int | None = None,
    ) -> None:
        self.recorder, self.stash, self.offload, self.budget = recorder, STASHES.get(stash), offload, budget
        self.plans: weakref.WeakSet[Plan] = weakref.WeakSet()

    @property
    def kept_bytes(self) -> int:
        sizes = {
            id(plan) if plan.tensor is None else plan.tensor.untyped_storage()._cdata: plan for plan in self.plans
        }
        return sum(plan.nbytes for plan in sizes.values())

    # When autograd saves a tensor -------------------------------------------------------------------------

    def pack(self, t: Tensor) -> Saved | SavedAsItIs:
        """Return what is to be held instead of the tensor."""
        if not plain(t):
            return SavedAsItIs(t)
        content = self.recorder.content(t)
        plan = content.plan() or self.plan(content, t)
        if not plan.uses and plan.recipe is not None:
            plan.chain += 1
        saved = Saved(plan, t)
        if self.budget is not None:
            self._keep_to_budget()
        return saved

    def plan(self, content: Content, t: Tensor | None = None) -> Plan:
        """Return how a content will be had; decide it if it is not decided."""
        if (plan := content.plan()) is not None:
            self.plans.add(plan)
            return plan
        plan = Plan(content)
        content.plan = weakref.ref(plan)
        self.plans.add(plan)
        if content.recipe is None or content.outside:
            plan.keep(content.tensor() if t is None else t, self.stash, self.offload)
        else:
            before = content.tensor
            if t is not None:
                content.tensor = lambda: t  # while it is decided
            spare: list[Content] = []
            if not self._make_again(plan, spare):
                plan.keep(content.tensor(), self.stash, self.offload)
                for other in spare:
                    other.waiting = [*(other.waiting or ()), weakref.ref(plan)]
            if t is not None:
                content.tensor = weakref.ref(t) if before() is None else before
        if content.waiting is not None:
            for ref in content.waiting:
                if (other := ref()) is not None:
                    self._make_again(other, [], only_if_free=True)
            content.waiting = None
        return plan

    def _make_again(self, plan: Plan, spare: list[Content], only_if_free: bool = False) -> bool:
        """Have the plan make its content again, if that takes fewer bytes than keeping it."""
        content = plan.content
        if content.outside or content.recipe is None or plan.recipe is not None:
            return False
        kept = plan.nbytes if only_if_free else content.size_if_kept()
        if kept <= SMALL:
            return False
        price = content.recipe.price({content: None}, kept, spare)
        if price >= (1 if only_if_free else kept):
            return False
        sources = {ref.content: self.plan(ref.content) for ref in content.recipe.refs}
        long = any(source.chain >= CHAIN for source in sources.values())
        if long and (plan.tensor is not None or content.tensor() is not None):
            return False
        plan.make(content.recipe, sources)
        for source in sources:
            source.held = None  # the plan holds it from now on
        return True

    # When a budget is exceeded ----------------------------------------------------------------------------

    def _keep_to_budget(self) -> None:
        """Have matrix products done again, the ones of fewest multiplications a byte first, until it will do."""
        excess = self.kept_bytes - self.budget
        if excess <= 0:
            return
        candidates = [p for p in self.plans if p.recipe is None and not p.pinned and p.nbytes > SMALL]
        for plan in sorted(candidates, key=lambda plan: _work(plan.content)):
            content, size = plan.content, plan.nbytes
            recipe = content.costly or content.recipe
            sources = self._sources(recipe) if recipe is not None else None
            # One deep, else all would be made again at once.
            if sources is None or _products_below(sources) + (recipe is content.costly) > 1:
                continue
            for source in sources.values():
                for below in source.everything_below():
                    below.pinned = True
            plan.make(recipe, sources)
            excess -= size
            if excess <= 0:
                return

    def _sources(self, recipe: Recipe) -> dict[Content, Plan] | None:
        """Return the plans of its ingredients, without keeping more; None if there is no way."""
        sources = {}
        for ref in recipe.refs:
            plan = self._plan_by_products(ref.content)
            if plan is None:
                return None
            sources[ref.content] = plan
        return sources

    def _plan_by_products(self, content: Content) -> Plan | None:
        if content.plan() is not None or (content.outside and content.tensor() is not None):
            return self.plan(content)
        recipe = content.recipe or content.costly
        sources = self._sources(recipe) if recipe is not None else None
        if sources is None:
            return None
        plan = Plan(content)
        content.plan = weakref.ref(plan)
        plan.make(recipe, sources)
        self.plans.add(plan)
        return plan


def _work(content: Content) -> int:
    """Multiplications for each element of what would be done again to have it."""
    if content.costly is not None:
        return products(content.costly)
    if content.recipe is None:
        return 0
    return max((_work(ref.content) for ref in content.recipe.refs if ref.content.plan() is None), default=0)


def _products_below(sources: dict[Content, Plan]) -> int:
    """How many matrix products would be done again, one on the other, to have these."""
    return max(
        (
            _products_below(p.sources) + (p.recipe is not None and p.recipe is p.content.costly)
            for p in sources.values()
        ),
        default=0,
    )


# The context manager ------------------------------------------------------------------------------------------

_here = threading.local()  # the recorder of this thread, and the blocks that are open in it


def recording() -> Recorder | None:
    """Return the recorder that is at work in this thread."""
    return getattr(_here, "recorder", None)


@contextlib.contextmanager
def record(recorder: Recorder) -> Iterator[None]:
    """Have this recorder at work in this thread."""
    _here.recorder = recorder
    try:
        with recorder:
            yield
    finally:
        _here.recorder = None


def have(saved: Saved | SavedAsItIs) -> Tensor:
    return saved.have()


class lean(contextlib.ContextDecorator):
    """Keep less for the backward pass of whatever runs in the block; the gradients are the same to the last bit.

    Put it around the forward pass and the loss; the backward pass may be inside or outside::

        with bptools.lean():
            loss = loss_fn(model(x), y)
        loss.backward()

    The model is not edited, and may be anybody's. What autograd would keep is kept as the recipe to make it again
    where that takes fewer bytes: activations from their inputs, norms, softmax, dropout from one bit an element,
    casts, copies, residual sums. Matrix products, convolutions and attention are not done twice. It can be used
    as a decorator, nested (the inner block's policy holds in it), and by several threads, each for itself.

    It sees what goes through torch's dispatcher. What runs compiled within keeps what the compiler chose to keep.
    What a recipe reads must be as it was when the backward pass comes: torch's version counters tell if it is not,
    and then that raises. They do not tell of writes through `numpy()` or `.data`, by kernels on bare pointers that
    torch is not told of (`torch.autograd.graph.increment_version` tells it), and by torch's fused optimizers:
    those belong after the backward pass.

    Args:
        stash: lossy: keeps what must be kept of floating point activations in 2 or 1 bytes an element, rounded to
            bfloat16 (`"bf16"`: off by 2⁻⁸ of itself at most), or to 8 bits (`"int8"`: off by 1/254 of the largest
            of its 256 neighbours at most). Gradients are then no longer the same. How far off they are depends on
            the model: where a ReLU's input changes its sign, they differ by much more than that.
        offload: `"cpu"`: keeps it in pinned memory of the host, of tensors on a GPU.
        budget: bytes that may be kept. Where it is exceeded, matrix products, convolutions and attention are done
            again too, as few as it takes, one deep: what they are made of is at hand or cheap. A warning says so
            if that is not enough.

    Returns:
        On entry a `Session`, whose `kept_bytes` says what is kept at the moment.

    Raises:
        ValueError: if an option is none of these.
        RuntimeError: if it is used inside what torch.compile compiles (put it around), or, in the backward pass,
        if
            a kept tensor was modified in place or freed after the block.
    """

    def __init__(
        self,
        *,
        stash: Literal["bf16", "int8"] | None = None,
        offload: Literal["cpu"] | None = None,
        budget: int | None = None,
    ) -> None:
        for name, value, known in (("stash", stash, STASHES), ("offload", offload, ("cpu",))):
            if value is not None and value not in known:
                raise ValueError(f"lean: {name} must be {' or '.join(map(repr, known))} or None, got {value!r}")
        if budget is not None and (not isinstance(budget, int) or budget < 0):
            raise ValueError(f"lean: budget must be a number of bytes, at least 0, or None, got {budget!r}")
        self.stash, self.offload, self.budget = stash, offload, budget

    def __enter__(self) -> Session:
        if torch.compiler.is_compiling():
            raise RuntimeError("lean(): put it around what is compiled, it cannot be inside")
        with contextlib.ExitStack() as stack:
            recorder = recording()
            if recorder is None:
                stack.enter_context(record(recorder := Recorder()))
            recorder.costly |= self.budget is not None
            session = Session(recorder, self.stash, self.offload, self.budget)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(session.pack, have))
            if not hasattr(_here, "open"):
                _here.open = []
            _here.open.append((stack.pop_all(), session))
        return session

    def __exit__(self, *exc: Any) -> None:
        stack, session = _here.open.pop()
        stack.__exit__(*exc)
        if self.budget is not None and exc[0] is None and (kept := session.kept_bytes) > self.budget:
            warnings.warn(f"lean(): {kept} bytes are kept, the budget was {self.budget}", stacklevel=2)
