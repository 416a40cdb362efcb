"""The operation that made the first NaN, of the forward pass or the backward pass.

`torch.autograd.detect_anomaly` looks at what backward functions return, and at nothing before: a NaN of the
forward pass is blamed on the gradient of some later operation, or shows as a loss. Here every operation that torch
dispatches is looked at, in both directions, as it runs. Three things are told apart:

- an operation *makes* a NaN if none of its arguments has one: 0 / 0, inf - inf, the square root of -1;
- an infinity is no error by itself (masks are full of them), but it is what most NaNs come from, so the last that
  an operation made of finite arguments is named beside the NaN;
- an argument with a NaN that no operation made came from outside: data, or weights that were loaded.

In the backward pass an operation is named by the node of the graph, the module that made this node in the forward
pass, and the line of code that did.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ._graph import Graph

OURS = [Path(__file__).parents[1] / part for part in ("functional", "memory", "nn", "ops")]
HIDDEN = (  # whose lines are nobody's own
    *(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, *OURS)),
    *(str(Path(__file__).with_name(name)) for name in ("_nonfinite.py", "_graph.py")),
    *("<frozen", "<string>", "<eval_with_key>"),
)
NUMBERS = ("number", "float", "Tensor")  # what arguments are that may be one; torch passes x * 0 so
UNSET = (
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize_", "set_",
)  # fmt: skip
FIRST = ("_ctc_loss", "_cudnn_ctc_loss", "_scaled_dot_product", "_efficient_attention", "_flash_attention")
# of those the other results, which are for the backward pass, are not set all over


@dataclass(frozen=True)
class Origin:
    """Where a value that is not finite was made.

    Attributes:
        what: `"NaN"` or `"inf"`.
        op: the operation, as torch calls it: `aten.div`.
        module: path of the module in which, from the outermost one's class; `""` outside of modules.
        backward: the node of the graph that was going back: `SqrtBackward0`; `""` in the forward pass.
        line: of the code that called it, in the forward pass: `model.py:31, in forward: x = x / n`; `""` if that
            is not known.
        result: what it returned, in words.
        arguments: what it was given, in words.
    """

    what: str
    op: str
    module: str
    backward: str
    line: str
    result: str
    arguments: str

    @property
    def brief(self) -> str:
        """In a line, without the values: `aten.log in Net.block, in the forward pass, at model.py:31`."""
        line = f", at {self.line.partition(', in ')[0]}" if self.line else ""
        return f"{self.op} in {self._where}{line}"

    @property
    def _where(self) -> str:
        way = f"the backward pass, {self.backward}" if self.backward else "the forward pass"
        return f"{self.module or 'no module'}, in {way}"

    def __str__(self) -> str:
        made = f"{self.op} returned {self.result}, from {self.arguments}"
        return f"{self._where}: {made}" + (f"\n  at {self.line}" if self.line else "")


class NonFiniteError(FloatingPointError):
    """The first NaN, or the first infinity where these are errors too.

    Attributes:
        origin: where it was made.
        infinity: where the last infinity before it was made, of finite arguments; `None` if there was none.
    """

    def __init__(self, origin: Origin, infinity: Origin | None = None):
        before = f"\n  the last infinity before it: {infinity}" if infinity else ""
        super().__init__(f"first {origin.what}: {origin}{before}")
        self.origin, self.infinity = origin, infinity

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.origin, self.infinity)


@contextlib.contextmanager
def detect_nonfinite(*, inf: bool = False, outside: bool = True) -> Iterator[Detector]:
    """Raise where the first NaN is made, in the forward pass or the backward pass.

    ::

        with bptools.diagnose.detect_nonfinite():
            loss = loss_fn(model(x), y)
            loss.backward()

    It is for finding, not for training: each operation waits for one more reduction of what it returned. Values
    are not changed. An infinite gradient that a `GradScaler` would skip is no NaN yet, but may become one, and is
    an error then. Not looked at are views, memory that is not yet set, what was written over a NaN, sparse, nested
    and quantised tensors, what other threads do in the forward pass, and what runs compiled.

    Args:
        inf: take the first infinity that is made of finite arguments for an error too.
        outside: take the first operation on a NaN that no operation made for an error too: of data, or of weights
            that were loaded. False is for those who mark what is missing by NaN.

    Yields:
        What has `infinity`, the `Origin` of the first infinity so far, or `None`.

    Raises:
        NonFiniteError: where it is made; it says which operation of which module, at which line, and from what.
        RuntimeError: under `torch.compile`.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("detect_nonfinite: cannot be used in what torch.compile compiles")
    modules = Graph()
    with warnings.catch_warnings(), modules.watched(), torch.autograd.set_detect_anomaly(True, check_nan=False):
        warnings.filterwarnings("ignore", "Error detected in ", UserWarning)  # a trace of what our error says
        with Detector(modules, inf, outside) as detector:
            yield detector


class Detector(TorchDispatchMode):
    """Looks at what operations return.

    Attributes:
        infinity: where the first infinity was made of finite arguments; `None` so far.
    """

    def __init__(self, modules: Graph, inf: bool, outside: bool) -> None:
        super().__init__()
        self.modules, self.inf, self.outside = modules, inf, outside
        self.infinity: Origin | None = None
        self._last: Origin | None = None

    def __torch_dispatch__(self, op: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, names = kwargs or {}, _written(op)
        written = [a for name, a in _arguments(op, args, kwargs) if name in names] if names else []
        before = [t for t in written if _looked_at(t) and not _is_finite(t)]
        spoiled = any(t.isnan().any() for t in before)  # so it is not known what the operation makes
        results = op(*args, **kwargs)
        name = op.overloadpacket.__name__
        if spoiled or name in UNSET or _is_view(op):
            return results
        returned = tree_leaves(results) if op._schema.returns else written
        bad = [t for t in returned[: 1 if name.startswith(FIRST) else None] if _looked_at(t) and not _is_finite(t)]
        if bad:
            self._judge(op, bad, _arguments(op, args, kwargs), bool(before))
        return results

    def _judge(self, op: OpOverload, bad: list[Tensor], given: list[tuple[str, Any]], infinite: bool) -> None:
        nan = [t for t in bad if t.isnan().any()]
        if any(math.isnan(a) if nan else math.isinf(a) for _, a in given if not isinstance(a, Tensor)):
            return  # asked for
        others = [a for _, a in given if _looked_at(a) and not any(a is t for t in bad)]
        if nan and not self.outside and any(t.isnan().any() for t in others):
            return
        if not nan and (infinite or not all(map(_is_finite, others))):
            return  # handed on
        origin = self._origin("NaN" if nan else "inf", op, (nan or bad)[0], given)
        if nan or self.inf:
            raise NonFiniteError(origin, self._last)
        self.infinity, self._last = self.infinity or origin, origin

    def _origin(self, what: str, op: OpOverload, result: Tensor, given: list[tuple[str, Any]]) -> Origin:
        node = torch._C._current_autograd_node()
        if node is None or self.modules.forward:  # as a checkpointed block is, when it runs once more
            backward, module, line = "", self.modules.path, _line(traceback.walk_stack(sys._getframe(1)))
        else:
            backward, module = node.name().rpartition("::")[2], self.modules.module_of(node)
            line = _line_of_text(node.metadata.get("traceback_", ()))
        told = ("itself, in place" if a is result else f"{name} {self._in_words(a)}" for name, a in given)
        words = _in_words(result), ", ".join(told) or "nothing"
        return Origin(what, str(op.overloadpacket), module, backward, line, *words)

    def _in_words(self, t: Tensor | float) -> str:
        """Describe an argument; with its name, if it is a parameter or a buffer that has a NaN."""
        if not isinstance(t, Tensor):
            return str(t)
        words = _in_words(t)
        if not _looked_at(t) or not t.isnan().any():
            return words
        for module, path in self.modules.names.items():
            for name, own in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if own.untyped_storage().data_ptr() == t.untyped_storage().data_ptr():
                    return f"{path}.{name}, {words}, which no operation made"
        return f"{words}, which no operation made"


def _arguments(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """The tensors and numbers that were given, with the names that torch has for them; no sizes and no flags."""
    given = {a.name: value for a, value in zip(op._schema.arguments, args, strict=False)} | kwargs
    kinds = {a.name: str(a.real_type).removeprefix("Optional[").rstrip("]") for a in op._schema.arguments}
    return [
        (name, a)
        for name, value in given.items()
        for a in tree_leaves(value)
        if isinstance(a, Tensor) or (kinds[name] in NUMBERS and isinstance(a, int | float))
    ]


@functools.cache
def _written(op: OpOverload) -> set[str]:
    """The names of the arguments that it writes to."""
    return {a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write}


@functools.cache
def _is_view(op: OpOverload) -> bool:
    """Whether what it returns are its arguments' own bytes, which it did not write."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)


def _looked_at(t: Any) -> bool:
    return (
        isinstance(t, Tensor)
        and not isinstance(t, FakeTensor)
        and (t.is_complex() or (t.is_floating_point() and t.itemsize > 1))
        and t.layout == torch.strided
        and not (t.is_meta or t.is_quantized or t.is_nested or t._is_zerotensor())
    )


def _is_finite(t: Tensor) -> bool:
    """Whether all of it is; by the sum, which a value that is not spoils, and by each where that overflows."""
    return bool(t.sum().isfinite()) or bool(t.isfinite().all())


def _in_words(t: Tensor) -> str:
    """`float32 (4, 3) in [-1.5, 2]`, with its NaNs and infinities counted."""
    size = f"{str(t.dtype).removeprefix('torch.')} ({', '.join(map(str, t.shape))})"
    if not _looked_at(t) or not t.numel():
        return size
    finite = t[t.isfinite()]
    counts = [f"{int(n)} {what}" for what, n in (("NaN", t.isnan().sum()), ("inf", t.isinf().sum())) if n]
    if t.is_complex() or not finite.numel():
        ends = ""
    elif len(values := dict.fromkeys(f"{float(end):.3g}" for end in finite.aminmax())) == 1:
        ends = f" of {next(iter(values))}"
    else:
        ends = f" in [{', '.join(values)}]"
    return size + ends + (f" with {' and '.join(counts)}" if counts else "")


def _line(frames: Iterable[tuple[Any, int]]) -> str:
    """The innermost line that is neither torch's nor ours."""
    for frame, number in frames:
        if not frame.f_code.co_filename.startswith(HIDDEN):
            (entry,) = traceback.StackSummary.extract([(frame, number)])
            return _said(entry.filename, number, entry.name, entry.line or "")
    return ""


def _line_of_text(entries: Iterable[str]) -> str:
    """The same, of what anomaly mode wrote down in the forward pass: the innermost is the last."""
    for text in reversed([*entries]):
        found = re.match(r'\s*File "(.+)", line (\d+), in (.+)\n\s*(.*)', text)
        if found and not found[1].startswith(HIDDEN):
            return _said(found[1], int(found[2]), found[3], found[4])
    return ""


def _said(file: str, number: int, function: str, code: str) -> str:
    return f"{file}:{number}, in {function}" + (f": {code.strip()}" if code else "")
