"""The op core: a forward and a backward, both plain functions, become one sound `autograd.Function`.

An op is declared once::

    linear = Op(linear_forward, linear_backward, outputs="y", grads="x weight bias")

and everything is wired by name. `linear_backward(dy, x, weight, needs)` asks for what it needs: `dy` is the
gradient of the output `y`; `x` and `weight` are inputs (or outputs) of the forward and are therefore what is
kept for the backward pass; `needs` holds the names of the inputs whose gradient is wanted. Reading the
signature of a backward is reading its memory bill.

Two tiers compute the same thing. The **formula** is the pair of plain functions itself: the definition, which
is differentiated again for double backward and transposed for forward mode. The **kernel** is an optional
second pair that runs the vendor kernel for exactly this formula, where ATen has one. `backend` chooses.

What the core does for every op, so that no op repeats it:

- `save_for_backward` only, and of a tensor only if a wanted gradient reads it;
- `needs_input_grad` and undefined output gradients: no work for what nobody asked for;
- half precision: the formula computes in float32, results are rounded once, at the end;
- every gradient comes back in its input's shape and dtype;
- double backward: residuals (statistics computed in the forward) are recomputed differentiably;
- forward mode: the jvp is the transpose of the vjp, which is linear in `dy`, so no op writes a second rule;
- vmap and torch.func, in `setup_context` form, by torch's generated rule; torch.compile without a graph break;
- autocast: inputs are cast as torch casts them for this op, then the op runs with autocast off, both ways.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
import shutil
import types
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float64, *HALF)
BACKENDS = ("auto", "formula", "fused")

_backend: ContextVar[str] = ContextVar("bptools.backend", default="auto")
_outer_backends: ContextVar[tuple[str, ...]] = ContextVar("bptools.outer_backends", default=())


class backend(contextlib.ContextDecorator):
    """Choose how ops compute, for a block, a decorated function, or from now on.

    `with backend("formula"):` holds for the block; the bare call `backend("formula").set()` stays in force for
    this thread or task. An op remembers the tier of its forward, so its backward runs in the same one. What
    torch.compile traces is each op's own affair: the formula where the compiler can fuse it with its neighbours.

    Args:
        name: `"auto"`: ATen's kernel where there is one for exactly this formula, the fused formula where that
            was measured to win and a compiler is there, else the plain formula. `"formula"`: always the plain
            formula. `"fused"`: always the formula, compiled by Inductor (the first call compiles).

    Raises:
        ValueError: if `name` is none of these.
        RuntimeError: if `"fused"` is asked for and there is no compiler for the CPU (`g++` or `CXX`).
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"backend: name must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
        if name == "fused" and not _can_fuse("cpu"):
            raise RuntimeError("backend: 'fused' needs a C++ compiler (g++, or one named by CXX), found none")
        self.name = name

    def set(self) -> None:
        """Make this choice the setting from now on, in this thread or task."""
        _backend.set(self.name)

    def __enter__(self) -> backend:
        _outer_backends.set((*_outer_backends.get(), _backend.get()))
        _backend.set(self.name)
        return self

    def __exit__(self, *exc: object) -> None:
        *outer, last = _outer_backends.get()
        _outer_backends.set(tuple(outer))
        _backend.set(last)


@functools.cache
def _can_fuse(device_type: str) -> bool:
    """Whether Inductor has what it needs to compile for this device."""
    if device_type == "cpu":
        return shutil.which(os.environ.get("CXX", "g++")) is not None
    return importlib.util.find_spec("triton") is not None


class _Everything:
    """The `needs` of a backward that is called by hand: every gradient is wanted."""

    def __contains__(self, name: str) -> bool:
        return True


EVERY = _Everything()


@dataclass(frozen=True)
class Kernel:
    """A second implementation of an op's forward and backward, with the formula's own signatures.

    Attributes:
        forward: takes what the formula's forward takes and returns what it returns.
        backward: takes what the formula's backward takes and returns what it returns.
        usable: of the forward's arguments; False where the kernel does not compute exactly this formula.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    usable: Callable[..., bool] = lambda *args: True


class Op:
    """A differentiable operation made of a plain forward and a plain backward.

    Args:
        forward: `x_forward(...)`: tensors and constants, by position and without defaults. Returns the tensors
            `outputs`.
        backward: `x_backward(dy, ..., needs)`; parameters are matched by name: `d<output>` is the gradient of
            that output, `needs` the set of wanted gradients, `<argument>_shape` the shape of an argument that need
            not be kept; all others are arguments or outputs of the forward. Returns a tuple: one gradient (or
            None) for each of `grads`.
        outputs: names of what the forward returns. Those without a `d<output>` parameter in `backward` are not
            differentiable; the others and the first are in the dtype of the first differentiable input.
        grads: names of the differentiable inputs, in the order in which `backward` returns their gradients. The
            first must be given; any other may be None. No other argument may require a gradient.
        keep_for: for a tensor that not every gradient reads, the names of the gradients that do. It is not
            kept when none of them is wanted.
        residuals: recomputes the non-differentiable outputs that the backward reads, from kept tensors and
            constants matched by name, in the order of `outputs[1:]`. Double backward goes through it.
        kernel: the vendor kernel, if ATen has one.
        fuses: of the forward's arguments; True where the fused formula was measured to beat the alternatives.
        trace: the tier that torch.compile traces: the formula, so that the compiler can fuse across ops, or
            the kernel, where the formula is there to be read and a compiler could not do as well.
        autocast: for each device type what torch's autocast does with this op's inputs: `"lower"` casts to the
            autocast dtype, `"float32"` casts to float32. A device that is not named: left alone.
        mixed: whether differentiable inputs may have different dtypes. If not, a TypeError names the odd one.
        result: name of the constant that is the dtype of the differentiable outputs, where that is not the first
            differentiable input's.

    Raises:
        ValueError: if a declaration names what the forward and backward do not have.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        *,
        outputs: str,
        grads: str,
        keep_for: Mapping[str, str] | None = None,
        residuals: Callable[..., Any] | None = None,
        kernel: Kernel | None = None,
        fuses: Callable[..., bool] | None = None,
        trace: str = "formula",
        autocast: Mapping[str, str] | None = None,
        mixed: bool = False,
        result: str | None = None,
    ) -> None:
        self.name = forward.__name__.removesuffix("_forward")
        self.__doc__ = forward.__doc__
        self.forward, self.backward, self.residuals = forward, backward, residuals
        self.kernel, self.fuses, self.trace = kernel, fuses, trace
        self.autocast, self.mixed, self.result = dict(autocast or {}), mixed, result

        self.arguments = tuple(inspect.signature(forward).parameters)
        self.outputs = tuple(outputs.split())
        self.grads = tuple(grads.split())
        wanted = tuple(inspect.signature(backward).parameters)
        self.douts = tuple("d" + name if "d" + name in wanted else None for name in self.outputs)
        self.several = len(self.douts) - self.douts.count(None) > 1
        self.kept = tuple(n for n in wanted if n in self.arguments or n in self.outputs)
        self.shapes = tuple((n + "_shape", i) for i, n in enumerate(self.arguments) if n + "_shape" in wanted)
        self.keep_for = {n: frozenset(self.grads) for n in self.kept}
        self.keep_for.update({n: frozenset(names.split()) for n, names in (keep_for or {}).items()})
        self.residual_arguments = tuple(inspect.signature(residuals).parameters) if residuals else ()
        self._check_declaration(wanted)

        self.grad_arguments = tuple((name, self.arguments.index(name)) for name in self.grads)
        self.other_arguments = tuple((n, i) for i, n in enumerate(self.arguments) if n not in self.grads)
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        # Where each kept name is found: whether among the outputs, and at which position; and for which gradients.
        self.sources = tuple(
            (
                n,
                n in self.outputs,
                (self.outputs if n in self.outputs else self.arguments).index(n),
                self.keep_for[n],
            )
            for n in self.kept
        )
        self.key = self.name if self.name not in _OPS else f"{self.name}#{len(_OPS)}"
        _OPS[self.key] = self
        title = self.name.title().replace("_", "")  # so that grad_fn reads <LayerNormBackward>
        described = {"__doc__": self.__doc__}
        self.eager = type(title, (_Eager,), described)
        self.overwriting = type(title + "_", (_Overwriting,), described)
        self.traced = type(title, (_Traced,), described)
        self.transformed = type(title, (_Transformed,), described)

    def _check_declaration(self, wanted: tuple[str, ...]) -> None:
        for parameter, known, given in (
            ("grads", self.arguments, self.grads),
            ("backward", (*self.kept, *self.douts, *(n for n, _ in self.shapes), "needs"), wanted),
            ("keep_for", self.kept, self.keep_for),
            ("residuals", self.kept, self.residual_arguments),
        ):
            if unknown := [name for name in given if name not in known]:
                expected = ", ".join(filter(None, known))
                raise ValueError(f"{self.name}: {parameter} names {', '.join(unknown)}; it may name {expected}")

    def __repr__(self) -> str:
        return f"<op {self.name}({', '.join(self.arguments)})>"

    # Calling an op ---------------------------------------------------------------------------------------

    def __call__(self, *args: Any) -> Any:
        """Apply the op. Arguments and results are those of the plain forward function."""
        return self._apply(self.eager, args)

    def inplace(self, x: Tensor, *args: Any) -> Any:
        """Apply the op and write its result over its first argument, which is marked dirty.

        Where the backward reads that argument, it keeps a copy.
        """
        if torch.is_grad_enabled() and x.requires_grad and x.is_leaf:
            raise RuntimeError(f"{self.name}: a leaf Variable that requires grad cannot be written in place")
        if self.arguments[0] in self.kept or torch.compiler.is_compiling() or _transformed():
            return x.copy_(self(x.clone(), *args))
        return self._apply(self.overwriting, (x, *args))

    def _apply(self, function: type[torch.autograd.Function], args: tuple[Any, ...], mixed: bool = False) -> Any:
        first, odd, learns = None, None, False
        for name, i in self.grad_arguments:
            value = args[i]
            if value is None:
                continue
            if not fit(value):
                raise refusal(self.name, "input" if name == "x" else name, value)
            learns = learns or value.requires_grad
            if first is None:
                first = value
            elif value.dtype is not first.dtype:
                odd = odd or name
        if first is None:
            raise refusal(self.name, "input" if self.grads[0] == "x" else self.grads[0], None)
        for name, i in self.other_arguments:
            if isinstance(args[i], Tensor) and args[i].requires_grad:
                raise TypeError(f"{self.name}: {name} requires a gradient, and this op has none for it")
        device = first.device.type
        if _autocasting(device):
            args = self._autocast(device, args)
            with torch.autocast(device, enabled=False):
                return self._apply(function, args, mixed=True)
        if odd and not (mixed or self.mixed):
            got = args[self.arguments.index(odd)].dtype
            raise TypeError(f"{self.name}: {odd} must have input's dtype {first.dtype}, got {got}")
        if torch.compiler.is_compiling():
            usable = self.trace == "kernel" and self.kernel.usable(*args)
            return self.traced.apply(self.key, "kernel" if usable else "formula", *args)
        tier = self.tier(*args)
        if function is self.eager:
            if _transformed():
                return self.transformed.apply(self.key, tier, *args)
            if not (learns and torch.is_grad_enabled()):  # nobody will differentiate: spare the Function
                return self.compute_forward(tier, args)
        return function.apply(self.key, tier, *args)

    def _autocast(self, device: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        policy = self.autocast.get(device)
        if policy is None:
            return args
        dtype = torch.get_autocast_dtype(device) if policy == "lower" else torch.float32
        cast = list(args)
        for _, i in self.grad_arguments:
            if args[i] is not None and args[i].dtype is not torch.float64:
                cast[i] = args[i].to(dtype)  # outside the Function, so autograd casts the gradient back
        return tuple(cast)

    # Computing it, in one tier or another ----------------------------------------------------------------

    def tier(self, *args: Any) -> str:
        """The tier in which these arguments are computed: `"formula"`, `"kernel"` or `"fused"`."""
        choice = _backend.get()
        if choice == "auto":
            if self.kernel is not None and self.kernel.usable(*args):
                return "kernel"
            if self.fuses is None or not self.fuses(*args) or not _can_fuse(args[0].device.type):
                return "formula"
        elif choice == "formula":
            return "formula"
        plain = all(type(a) in (Tensor, torch.nn.Parameter) for a in args if isinstance(a, Tensor))
        ordinary = plain and outside_transforms() and not torch.jit.is_tracing()
        return "fused" if ordinary else "formula"

    def compute_forward(self, tier: str, args: tuple[Any, ...]) -> Any:
        if tier == "kernel":
            return self.kernel.forward(*args)
        if tier == "fused":
            return self._fused("_formula_forward", dict(zip(self.arguments, args, strict=True)))
        return self._formula_forward(**dict(zip(self.arguments, args, strict=True)))

    def compute_backward(
        self, tier: str, named: dict[str, Any], needs: frozenset[str]
    ) -> tuple[Tensor | None, ...]:
        if tier == "kernel":
            return self.kernel.backward(**named, needs=needs)
        if tier == "fused":
            return self._fused("_formula_backward", {**named, "needs": needs})
        return self._formula_backward(**named, needs=needs)

    def _formula_forward(self, **named: Any) -> Any:
        dtype = named[self.grads[0]].dtype
        if dtype not in HALF:
            return self.forward(**named)
        dtype = named[self.result] if self.result else dtype
        outputs = self.forward(**{name: _upcast(value) for name, value in named.items()})
        if len(self.outputs) == 1:
            return outputs.to(dtype)
        rounded = zip(outputs, self.douts, range(len(outputs)), strict=True)
        return tuple(o.to(dtype) if d is not None or i == 0 else o for o, d, i in rounded)

    def _formula_backward(self, **named: Any) -> tuple[Tensor | None, ...]:
        return self.backward(**{name: _upcast(value) for name, value in named.items()})

    def _fused(self, formula: str, named: dict[str, Any]) -> Any:
        """The result of a formula, compiled by Inductor for these constants, dtypes and numbers of dimensions.

        Dynamo gives up on a code object after a few recompilations, whatever for; so each kind of call, which
        would need its own, has its own copy of the code. Sizes may vary within it.
        """
        described = [(v.dtype, v.dim()) if isinstance(v, Tensor) else v for v in named.values()]
        key = (formula, *named, *described)
        if key not in self._compiled:
            plain = getattr(Op, formula)
            copy = types.FunctionType(plain.__code__.replace(), plain.__globals__)
            self._compiled[key] = torch.compile(types.MethodType(copy, self))
        # Dynamo looks at the `.grad` of what it is given: give it tensors without history.
        return self._compiled[key](
            **{name: value.detach() if isinstance(value, Tensor) else value for name, value in named.items()}
        )

    def recompute_residuals(self, named: dict[str, Any]) -> dict[str, Any]:
        """The kept residuals again, this time as differentiable functions of the kept inputs."""
        if self.residuals is None or all(named.get(name) is None for name in self.outputs[1:]):
            return {}  # of what no wanted gradient reads, nothing was kept
        residuals = self.residuals(**{name: _upcast(named[name]) for name in self.residual_arguments})
        residuals = residuals if isinstance(residuals, tuple) else (residuals,)
        again = zip(self.outputs[1:], residuals, strict=False)
        return {name: value for name, value in again if named.get(name) is not None}


def fit(value: Any) -> bool:
    """Whether an op can differentiate it."""
    return isinstance(value, Tensor) and value.dtype in FLOATS and value.layout is torch.strided


def refusal(name: str, argument: str, value: Any) -> TypeError:
    """What is said of what is not `fit`."""
    if not isinstance(value, Tensor):
        got = type(value).__name__
    else:
        got = str(value.dtype) if value.dtype not in FLOATS else f"layout {value.layout}"
    return TypeError(f"{name}: {argument} must be a dense tensor of a real floating dtype, got {got}")


def outside_transforms(*args: Any) -> bool:
    """Whether no torch.func transform is at work: kernels that write in place, or have no vmap rule, need it."""
    return not torch._C._are_functorch_transforms_active()


def _transformed() -> bool:
    """Whether a torch.func transform or forward mode is at work."""
    return not outside_transforms() or forward_ad._current_level >= 0


def _upcast(value: Any) -> Any:
    """Half precision to float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


# The Functions ------------------------------------------------------------------------------------------------
#
# What is remembered and how it is pulled back is the same for every op and every Function: `_set_up` and
# `_pull_back`. Four classes run them: torch.compile refuses a `jvp`, torch.func wants `setup_context`, and plain
# eager mode does better without it, since each `apply` of that form binds its arguments through `inspect`
# (30 to 40 µs an op in a training step, of a Python overhead of about as much again; torch 2.15).

# Dynamo can trace a Function that looks its op up by a key, but not one that holds the op in a closure.
_OPS: dict[str, Op] = {}


def _set_up(ctx: Any, key: str, tier: str, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    """Keep for the backward pass what the wanted gradients read, and nothing else."""
    op = _OPS[key]
    needs = frozenset([n for n, i in op.grad_arguments if ctx.needs_input_grad[2 + i]])
    # In forward mode everything is kept, in one order for both saves: the vmap rule that torch generates has a
    # single record of their batch dimensions.
    forward_mode = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    names, saved, rest = [], [], {}
    for name, is_output, i, wanted in op.sources:
        value = outputs[i] if is_output else args[i]
        if not isinstance(value, Tensor):
            rest[name] = value
        elif forward_mode or not needs.isdisjoint(wanted):
            names.append(name)
            saved.append(value)
        else:
            rest[name] = None
    for name, i in op.shapes:
        rest[name] = args[i].shape
    like = [None if args[i] is None else (args[i].shape, args[i].dtype) for _, i in op.grad_arguments]
    # Of a single output it is the gradient that is called with, so it is there.
    undefined = [(o.shape, o.dtype) for o in outputs] if op.several else None
    ctx.remembered = op.key, tier, needs, names, rest, like, undefined
    if forward_mode:
        saved += [o for o, d in zip(outputs, op.douts, strict=True) if d is not None]
        ctx.save_for_forward(*saved)
    ctx.save_for_backward(*saved)
    if constants := [o for o, d in zip(outputs, op.douts, strict=True) if d is None]:
        ctx.mark_non_differentiable(*constants)
    if not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)  # or there would be zeros for outputs without a gradient, too


def _pull_back(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
    """From the gradients of the outputs to those of the inputs, in the order of `apply`'s arguments."""
    key, tier, needs, names, rest, like, undefined = ctx.remembered
    op = _OPS[key]
    slots = [None] * (2 + len(op.arguments))
    named = {**rest, **dict(zip(names, ctx.saved_tensors, strict=False))}
    some = next((dout for dout in douts if dout is not None), None)
    if some is None:  # nothing downstream used an output
        return tuple(slots)
    device = some.device.type
    for i, (name, dout) in enumerate(zip(op.douts, douts, strict=True)):
        if name is not None and dout is None:  # of several outputs, one that nobody used has a gradient of zeros
            shape, dtype = undefined[i]
            dout = some.new_zeros(shape, dtype=dtype)
        if name is not None:
            named[name] = dout
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again
        tier = "formula"
        named.update(op.recompute_residuals(named))
    if tier == "fused" and any(is_legacy_batchedtensor(dout) for dout in douts if dout is not None):
        tier = "formula"  # torch.autograd.grad(is_grads_batched=True)
    with _no_autocast(device):
        grads = op.compute_backward(tier, named, needs)
    if not isinstance(grads, tuple):
        raise TypeError(f"{op.name}: backward must return a tuple of gradients, got {type(grads).__name__}")
    for (_, i), grad, shape_and_dtype in zip(op.grad_arguments, grads, like, strict=True):
        slots[2 + i] = None if grad is None else _fit(grad, *shape_and_dtype)
    return tuple(slots)


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


class _Eager(torch.autograd.Function):
    """An op in plain eager mode. Each op has a subclass that carries its name, here and below."""

    @staticmethod
    def forward(ctx, key, tier, *args):
        outputs = _OPS[key].compute_forward(tier, args)
        _set_up(ctx, key, tier, args, _tuple(outputs))
        return outputs

    backward = staticmethod(_pull_back)


class _Overwriting(torch.autograd.Function):
    """An op that writes its result over its first argument."""

    @staticmethod
    def forward(ctx, key, tier, x, *args):
        result, *rest = _tuple(_OPS[key].compute_forward(tier, (x, *args)))
        ctx.mark_dirty(x.copy_(result))
        _set_up(ctx, key, tier, (x, *args), (x, *rest))
        return (x, *rest) if rest else x

    backward = staticmethod(_pull_back)


class _Traced(torch.autograd.Function):
    """An op as torch.compile sees it."""

    @staticmethod
    def forward(key, tier, *args):
        return _OPS[key].compute_forward(tier, args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        key, tier, *args = inputs
        _set_up(ctx, key, tier, args, _tuple(output))

    backward = staticmethod(_pull_back)


class _Transformed(_Traced):
    """An op under torch.func and in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(key, tier, *args):
        outputs = _OPS[key].compute_forward(tier, args)
        if any(outputs is a for a in args):  # torch.func would not have an input returned as it is
            return outputs.view_as(outputs)
        return outputs

    @staticmethod
    def jvp(ctx, _key, _tier, *tangents):
        key, _, _, names, rest, like, _ = ctx.remembered
        op = _OPS[key]
        results = ctx.saved_tensors[len(names) :]
        named = {**rest, **dict(zip(names, ctx.saved_tensors, strict=False))}
        named.update(op.recompute_residuals(named))
        directions = [tangents[i] for _, i in op.grad_arguments]
        needs = frozenset(n for n, t in zip(op.grads, directions, strict=True) if t is not None)

        def along(*douts):  # Σ ⟨vjp(dy), t⟩ is linear in dy, and its gradient with respect to dy is the jvp
            douts = dict(zip(filter(None, op.douts), douts, strict=True))
            grads = op.compute_backward("formula", {**named, **douts}, needs)
            terms = [
                (_fit(grad, *shape_and_dtype) * t).sum()
                for grad, shape_and_dtype, t in zip(grads, like, directions, strict=True)
                if grad is not None
            ]
            return sum(terms, results[0].new_zeros(()))

        with _no_autocast(results[0].device.type):
            total, transpose = torch.func.vjp(along, *map(torch.zeros_like, results))
            moved = iter(transpose(torch.ones_like(total)))
        out = tuple(None if d is None else next(moved) for d in op.douts)
        return out if len(out) > 1 else out[0]


def _fit(grad: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A gradient in its input's shape (broadcast dimensions summed) and dtype."""
    if torch.compiler.is_compiling() or grad.shape != shape:  # Dynamo cannot compare sizes that are symbols
        grad = grad.sum_to_size(shape)
    return grad if grad.dtype is dtype else grad.to(dtype)


def _autocasting(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)  # which does not know of meta


def _no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    if _autocasting(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
