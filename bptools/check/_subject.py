"""What is audited, and where: a callable with its name, and a point at which it is looked at."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from bptools.check import _tools

COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}


@dataclass(frozen=True)
class Subject:
    """A function under audit.

    Attributes:
        name: as reports call it.
        kind: "Function", "function", "module" or "custom op".
        target: what the user gave.
        call: takes a sample's arguments; for a module, its state (a dict of parameters and buffers) comes first.
    """

    name: str
    kind: str
    target: Any
    call: Callable[..., Any]

    @classmethod
    def of(cls, fn: Any, name: str = "fn") -> Subject:
        """Take a Function, `Function.apply`, a function, a module or a custom op."""
        if isinstance(fn, Subject):
            return fn
        owner = getattr(fn, "__self__", None)
        if getattr(fn, "__name__", "") == "apply" and isinstance(owner, type) and _is_function_class(owner):
            fn = owner
        if _is_function_class(fn):
            return cls(fn.__name__, "Function", fn, fn.apply)
        if isinstance(fn, nn.Module):
            return cls(type(fn).__name__, "module", fn, functools.partial(_stateful, fn))
        if isinstance(fn, torch.library.CustomOpDef):
            return cls(fn._qualname, "custom op", fn, fn)
        if isinstance(fn, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            return cls(str(fn), "custom op", fn, fn)
        if callable(fn):
            return cls(getattr(fn, "__name__", type(fn).__name__), "function", fn, fn)
        raise TypeError(
            f"check_function: {name} must be an autograd.Function, its apply, a function, an nn.Module or a "
            f"torch.library.custom_op, got {type(fn).__name__}"
        )

    def argument_names(self) -> tuple[list[str], bool]:
        """The names of positional arguments, and whether the last one takes all that follow."""
        if self.kind == "Function":
            plain, drop = self.target.forward, 0 if has_setup_context(self.target) else 1
        elif self.kind == "module":
            plain, drop = self.target.forward, 0
        else:
            plain, drop = getattr(self.target, "_init_fn", self.target), 0
        try:
            parameters = list(inspect.signature(plain).parameters.values())[drop:]
        except (TypeError, ValueError):
            return [], False
        positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY and p.kind is not p.VAR_KEYWORD]
        starred = bool(positional) and positional[-1].kind is inspect.Parameter.VAR_POSITIONAL
        return [p.name for p in positional], starred


def _is_function_class(fn: Any) -> bool:
    return isinstance(fn, type) and issubclass(fn, torch.autograd.Function)


def has_setup_context(function: type[torch.autograd.Function]) -> bool:
    """Whether a Function is of the form that torch.func takes."""
    return function.setup_context is not torch.autograd.function._SingleLevelFunction.setup_context


def _stateful(module: nn.Module, state: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return torch.func.functional_call(module, dict(state), args, kwargs)


class Point:
    """A subject at one sample: its leaves, the differentiable ones among them, and what a plain run gives.

    Attributes:
        args, kwargs: the sample.
        inputs: the differentiable tensors, as leaves, in the order of the arguments.
        names: of `inputs`.
    """

    def __init__(
        self,
        subject: Subject,
        args: Iterable[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        reference: Callable[..., Any] | None = None,
        seed: int = 0,
        label: str = "0",
    ) -> None:
        self.subject, self.reference, self.seed, self.label = subject, reference, seed, label
        self.args, self.kwargs = tuple(args), dict(kwargs or {})
        self.leaves, self.spec = tree_flatten((self.args, self.kwargs))
        self.places = [i for i, a in enumerate(self.leaves) if isinstance(a, Tensor) and a.requires_grad]
        self.leaf_names = self._leaf_names()
        self.names = [self.leaf_names[i] for i in self.places]
        self.inputs = [_tools.leaf(self.leaves[i]) for i in self.places]
        self.in_place = False  # it writes over an input, as it may, and so takes no leaf
        self.overwrites = False  # it writes over an input, as it may not
        self.differentiable: list[int] = []  # which outputs require a gradient; known after `plain`
        self.broken: str | None = None  # why the plain run does not go through; "" if it does
        self.wrong: bool | None = None  # whether values or gradients are wrong here; known after it was asked
        self._plain: tuple[list[Tensor], list[Tensor], list[Tensor]] | None = None

    def __repr__(self) -> str:
        return f"sample {self.label}"

    def _leaf_names(self) -> list[str]:
        names, starred = self.subject.argument_names()
        found = []
        for i, arg in enumerate(self.args):
            if self.subject.kind == "module":
                if i == 0:
                    found += list(arg)
                    continue
                i -= 1
            if i < len(names) - starred:
                name = names[i]
            else:
                name = f"{names[-1]}[{i - len(names) + 1}]" if starred else f"argument {i}"
            leaves = tree_flatten(arg)[0]
            found += (
                [name] if leaves == [arg] or len(leaves) == 1 else [f"{name}[{k}]" for k in range(len(leaves))]
            )
        for name, value in self.kwargs.items():
            leaves = tree_flatten(value)[0]
            found += [name] if len(leaves) == 1 else [f"{name}[{k}]" for k in range(len(leaves))]
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Of the first differentiable input."""
        return self.inputs[0].dtype

    @property
    def device(self) -> torch.device:
        """Of the first differentiable input."""
        return self.inputs[0].device

    @property
    def others(self) -> list[tuple[str, Tensor]]:
        """The tensors that are not differentiated, by name."""
        pairs = zip(self.leaf_names, self.leaves, strict=True)
        return [(n, a) for i, (n, a) in enumerate(pairs) if isinstance(a, Tensor) and i not in self.places]

    def labels(self, outputs: Iterable[int]) -> list[str]:
        """What these outputs and, after them, all gradients are called."""
        return [f"output {i}" for i in outputs] + [f"gradient of {name}" for name in self.names]

    # Calling --------------------------------------------------------------------------------------------------

    def bind(self, function: Callable[..., Any], *, fresh: bool = True) -> Callable[..., Any]:
        """`call(*inputs)` of a function, with the sample's other arguments (copies, if `fresh`)."""

        def call(*inputs: Tensor) -> Any:
            leaves = list(self.leaves)
            for i, a in enumerate(leaves):
                if isinstance(a, Tensor) and fresh:
                    leaves[i] = _tools.exact_copy(a)
            for i, x in zip(self.places, inputs, strict=True):
                leaves[i] = x.clone() if self.in_place or self.overwrites else x
            args, kwargs = tree_unflatten(leaves, self.spec)
            return function(*args, **kwargs)

        return call

    @property
    def call(self) -> Callable[..., Any]:
        """The subject as a function of its differentiable inputs."""
        return self.bind(self.subject.call)

    @property
    def truth(self) -> Callable[..., Any]:
        """The reference as a function of the same inputs; the subject itself where there is none."""
        return self.bind(self.reference or self.subject.call)

    def plain(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Outputs, random output gradients and gradients of a run without any twist."""
        if self._plain is None:
            before = [_tools.exact_copy(x.detach()) for x in self.inputs]
            try:
                found = self._run()
            except RuntimeError as error:
                if "leaf Variable" not in str(error) or self.in_place:
                    raise
                self.in_place = True  # hand it copies that are not leaves
                found = self._run()
            if any(not same_numbers(x.detach(), old) for x, old in zip(self.inputs, before, strict=True)):
                self.overwrites = True  # `mutation` asks about that; in all other checks it gets copies
                self.inputs = [x.requires_grad_() for x in before]
                found = self._run()
            self._plain = found
        outputs, dys, found = self._plain
        return outputs, [_tools.exact_copy(dy) for dy in dys], found  # whoever gets them may write to them

    def _run(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        outputs = _tools.run(self.call, self.inputs)
        self.differentiable = [i for i, y in enumerate(outputs) if y.requires_grad]
        if not self.differentiable:
            raise ValueError("no output requires a gradient")
        values = [y.detach().clone() for y in outputs]
        dys = self.random_like([outputs[i] for i in self.differentiable])
        found = _tools.pull(outputs, self.inputs, dys)
        return values, dys, [g.detach().clone() for g in found]

    @property
    def finite(self) -> bool:
        """Whether the differentiable outputs and all gradients are finite here."""
        outputs, _, found = self.plain()
        return all(bool(t.isfinite().all()) for t in (*found, *(outputs[i] for i in self.differentiable)))

    @property
    def random(self) -> bool:
        """Whether the outputs are others from another random state."""
        again = [y.detach() for y in _tools.run(self.call, self.inputs, seed=1)]
        return not all(same_numbers(a, b) for a, b in zip(self.plain()[0], again, strict=True))

    def values(self, inputs: Iterable[Tensor], call: Callable[..., Any] | None = None) -> list[Tensor]:
        """The outputs that can be differentiated, at other inputs and without a graph."""
        outputs = _tools.run(call or self.call, [x.detach() for x in inputs])
        return [outputs[i] for i in self.differentiable]

    def generator(self, salt: int = 0) -> torch.Generator:
        """A generator of this point's own."""
        return torch.Generator().manual_seed(1_000_003 * self.seed + 17 * salt + 1)

    def random_like(self, tensors: Iterable[Tensor], salt: int = 0) -> list[Tensor]:
        """Normal numbers like these tensors: never ones, which hide what is not multiplied."""
        generator = self.generator(salt)
        found = []
        for t in tensors:
            wide = torch.complex128 if t.is_complex() else torch.float64
            numbers = torch.randn(t.shape, generator=generator, dtype=wide)
            found.append(numbers.to(device=t.device, dtype=t.dtype))
        return found

    def at(self, inputs: Iterable[Tensor], *, note: str = "") -> Point:
        """The same call with other numbers in its differentiable inputs."""
        leaves = list(self.leaves)
        for i, x in zip(self.places, inputs, strict=True):
            leaves[i] = x.detach().requires_grad_()
        return self.with_leaves(leaves, note=note)

    def with_leaves(self, leaves: list[Any], *, note: str = "") -> Point:
        """The same call with other leaves."""
        args, kwargs = tree_unflatten(leaves, self.spec)
        label = f"{self.label}, {note}" if note else self.label
        point = Point(self.subject, args, kwargs, reference=self.reference, seed=self.seed, label=label)
        point.in_place, point.overwrites = self.in_place, self.overwrites
        return point

    def copy(self) -> Point:
        """The same point with tensors of its own, in the same memory layout."""

        def copied(a: Any) -> Any:
            return _tools.leaf(a, a.requires_grad) if isinstance(a, Tensor) else a

        return self.with_leaves([copied(a) for a in self.leaves])

    def to(self, dtype: torch.dtype) -> Point:
        """The same numbers, rounded, in another floating dtype (or the complex one that goes with it)."""

        def cast(a: Any) -> Any:
            if not isinstance(a, Tensor) or not (a.is_floating_point() or a.is_complex()):
                return a
            kind = COMPLEX[dtype] if a.is_complex() else dtype
            return a.detach().to(kind).requires_grad_(a.requires_grad)

        return self.with_leaves([cast(a) for a in self.leaves])


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN in the same places."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def points(
    subject: Subject,
    samples: Any,
    dtype: torch.dtype,
    device: str,
    seed: int,
    reference: Callable[..., Any] | None,
) -> list[Point]:
    """The samples of one dtype.

    Raises:
        TypeError, ValueError: if `samples` is none of what check_function takes, or nothing can be differentiated.
    """
    if callable(samples) and not isinstance(samples, Tensor):
        drawn = list(samples(device, dtype, seed))
    else:
        given = samples if isinstance(samples, list) else [samples]
        drawn = [_cast(sample, dtype, device) for sample in given]
    found = []
    for i, sample in enumerate(drawn):
        args, kwargs = _arguments(sample, i)
        if subject.kind == "module":
            module = subject.target
            state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            args = (_cast(state, dtype, device), *args)
        point = Point(subject, args, kwargs, reference=reference, seed=seed, label=str(i))
        if not point.inputs:
            raise ValueError(
                f"check_function: samples must hold a tensor that requires a gradient, and sample {i} holds none; "
                "mark what is to be differentiated with requires_grad_()"
            )
        found.append(point)
    return found


def _arguments(sample: Any, i: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(sample, Tensor):
        return (sample,), {}
    if isinstance(sample, tuple):
        if len(sample) == 2 and isinstance(sample[0], tuple) and isinstance(sample[1], dict):
            return sample
        return sample, {}
    raise TypeError(
        f"check_function: sample {i} must be (args, kwargs), a tuple of arguments or a tensor, "
        f"got {type(sample).__name__}"
    )


def _cast(sample: Any, dtype: torch.dtype, device: str) -> Any:
    """A sample given as plain tensors, in the floating dtype that is asked for."""
    leaves, spec = tree_flatten(sample)
    moved = []
    for a in leaves:
        if isinstance(a, Tensor):
            kind = a.dtype
            if a.is_floating_point():
                kind = dtype
            elif a.is_complex() and dtype in COMPLEX:
                kind = COMPLEX[dtype]
            a = a.detach().to(device=device, dtype=kind).requires_grad_(a.requires_grad)
        moved.append(a)
    return tree_unflatten(moved, spec)
