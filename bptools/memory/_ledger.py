"""The ledger: what is kept for the backward pass, by module and operation, and what lean() would give back.

One forward pass says it all. Autograd's saved-tensor hooks are told of every tensor that eager torch would keep,
while what `lean()` keeps instead is decided by its own engine. Who saved a tensor is read off the autograd graph
afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from bptools._console import printed
from bptools._modules import Modules

from ._codecs import Bits, Narrow, narrowest
from ._contents import Content, Plan, Saved, SavedAsItIs
from ._floor import cheapest
from ._lean import Recorder, Session, have, plain, record, recording

if TYPE_CHECKING:
    from rich.table import Table

By = Literal["module", "op", "tensor"]
NOWHERE = "(no module)"


@dataclass(frozen=True)
class Row:
    """A tensor that is kept for the backward pass.

    Attributes:
        module: the running module, as a path from the outermost one's class: `ResNet.layer1.0.conv1`.
        op: the operation whose gradient needs it: `convolution`; `lean` if it is only kept to make others again.
        argument: which of its arguments or results it is: `input`.
        shape: of the tensor.
        dtype: of the tensor.
        bytes: of its storage; 0 if another row counts them.
        shared_with: the number of that row.
        lean: what `lean()` does with it: `kept`, `kept as bits`, `made again by gelu`, ...
        lean_bytes: that `lean()` keeps for it; 0 if another row counts them.
        floor_bytes: that the floor keeps for it.
    """

    module: str
    op: str
    argument: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    shared_with: int | None
    lean: str
    lean_bytes: int
    floor_bytes: int


# While the forward pass runs ----------------------------------------------------------------------------------


@dataclass
class _Entry:
    """A tensor that autograd saved, before it is known who it was."""

    handle: Saved | SavedAsItIs
    module: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    shared_with: int | None


@dataclass
class _Made:
    """Where a content was made, and what was the tensor."""

    module: str
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Witness(Recorder):
    """A recorder that knows where contents were made, and the results that are still about."""

    def __init__(self, modules: Modules) -> None:
        super().__init__()
        self.modules, self.op = modules, ""
        self.made: dict[Content, _Made] = {}
        self.results: list[weakref.ref[Tensor]] = []

    def note(self, t: Tensor) -> Content:
        content = super().note(t)
        self.made[content] = _Made(self.modules.path, self.op, tuple(t.shape), t.dtype)
        return content

    def __torch_dispatch__(self, op: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.op = op.overloadpacket.__name__
        for t in _storages_of(a for a in tree_leaves((args, kwargs)) if not plain(a)):
            self.content(t)
        results = super().__torch_dispatch__(op, types, args, kwargs)
        for t in tree_leaves(results):
            if isinstance(t, Tensor):
                self.results.append(weakref.ref(t))
                if not plain(t):
                    self._note_parts(t)
        return results

    def _note_parts(self, t: Tensor) -> None:
        """Note the storages of what is no plain tensor: lean() knows nothing of them, but they have bytes."""
        for inner in _storages_of([t]):
            if getattr(getattr(inner.untyped_storage(), "_bptools_content", None), "recorder", None) is not self:
                self.note(inner)


def _storages_of(things: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors that each have a storage, of which other tensors are made: subclasses, sparse ones, ..."""
    for t in things:
        if not isinstance(t, Tensor) or t.device.type == "meta":
            continue
        if is_traceable_wrapper_subclass(t):
            yield from _storages_of(getattr(t, name) for name in t.__tensor_flatten__()[0])
        elif t.layout is torch.sparse_coo:
            yield from (t._indices(), t._values())
        elif t.layout in (torch.sparse_csr, torch.sparse_bsr):
            yield from (t.crow_indices(), t.col_indices(), t.values())
        elif t.layout in (torch.sparse_csc, torch.sparse_bsc):
            yield from (t.ccol_indices(), t.row_indices(), t.values())
        elif t.layout is torch.strided and not t.is_inference():
            yield t


class _Watch(Session):
    """A session of lean() that writes down what autograd saves."""

    recorder: _Witness

    def __init__(self, recorder: _Witness) -> None:
        super().__init__(recorder)
        self.entries: list[_Entry] = []

    def pack(self, t: Tensor) -> Saved | SavedAsItIs:
        handle = super().pack(t)
        with torch._C._DisableTorchDispatch():
            nbytes, shared_with = 0, None
            for inner in _storages_of([t]):
                storage = inner.untyped_storage()
                if self.recorder.content(inner).outside:
                    continue
                ledger, number = getattr(storage, "_bptools_ledger", (None, 0))
                if ledger is not self.recorder.made:
                    storage._bptools_ledger = self.recorder.made, len(self.entries)
                    nbytes += storage.nbytes()
                elif storage.nbytes():
                    shared_with = number
        if nbytes or shared_with is not None:
            path, dtype = self.recorder.modules.path, _name_of(t.dtype)
            self.entries.append(_Entry(handle, path, tuple(t.shape), dtype, nbytes, shared_with))
        return handle


# The report ---------------------------------------------------------------------------------------------------


class _Totals:
    """The bytes of some rows."""

    rows: list[Row]

    @property
    def eager(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def lean(self) -> int:
        return sum(row.lean_bytes for row in self.rows)

    @property
    def floor(self) -> int:
        return sum(row.floor_bytes for row in self.rows)


class Ledger(_Totals):
    """What one forward pass keeps for its backward pass. Made by `ledger`.

    Attributes:
        name: what stands above the table; the model's class, if it is not set.
        rows: one for each tensor that autograd saved, in order, and then for what only lean or the floor keeps.
        eager: bytes that torch keeps. What was there before does not count: parameters, buffers, inputs.
        lean: bytes that `bptools.lean()` keeps.
        floor: the fewest bytes from which cheap operations could give back all that was saved, however they are
            arranged: mostly the inputs of matrix products, convolutions and attention that nothing cheap makes.
    """

    def __init__(self) -> None:
        self.name = ""
        self._rows: list[Row] | None = None
        self._stack: contextlib.ExitStack | None = None
        self._watch: _Watch | None = None

    def __enter__(self) -> Ledger:
        if self._stack is not None or self._rows is not None:
            raise RuntimeError("ledger(): each is for one block; call ledger() again")
        if recording() is not None:
            raise RuntimeError(
                "ledger(): not inside lean() or another ledger(); it finds out what lean() would keep"
            )
        with contextlib.ExitStack() as stack:
            modules = Modules()
            stack.enter_context(modules.watched())
            recorder = _Witness(modules)
            stack.enter_context(record(recorder))
            self._watch = _Watch(recorder)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._watch.pack, have))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: Any) -> None:
        self._stack.__exit__(kind, *exc)
        watch, self._watch = self._watch, None
        try:
            if kind is None:
                self._rows = _rows(watch)
        finally:
            # The storages lead to the recorder for as long as they are there: it may own nothing then.
            watch.recorder.made.clear()
            watch.recorder.results.clear()
            watch.entries.clear()

    @property
    def rows(self) -> list[Row]:
        if self._rows is None:
            raise RuntimeError("ledger(): nothing is known before its block has ended without an error")
        return self._rows

    def to_json(self, indent: int | None = None) -> str:
        """Totals and rows, in bytes, and the version of torch they hold for."""
        document = {
            "name": self.name or self._model,
            "torch": torch.__version__,
            "totals": {"eager": self.eager, "lean": self.lean, "floor": self.floor},
            "rows": [asdict(row) for row in self.rows],
        }
        return json.dumps(document, indent=indent)

    # To look at -------------------------------------------------------------------------------------------

    @property
    def summary(self) -> str:
        """What this is, and the totals."""
        if not self.rows:
            return "Nothing was kept for a backward pass: is grad mode on, and does anything require a gradient?"
        shares = (f"{name} {_size(n)} ({n / self.eager:.2f}x)" for name, n in self._less())
        return f"{self._title}\neager {_size(self.eager)}, " + ", ".join(shares)

    @property
    def _model(self) -> str:
        """The model's class, if there is but one model."""
        models = {row.module.partition(".")[0] for row in self.rows if "." in row.module}
        return models.pop() if len(models) == 1 else ""

    @property
    def _title(self) -> str:
        return ", ".join(filter(None, (self.name or self._model, "kept for the backward pass")))

    def _less(self) -> tuple[tuple[str, int], ...]:
        return ("lean", self.lean), ("floor", self.floor)

    def table(self, by: By = "module", rows: int = 24) -> Table:
        """A table for rich to print.

        Args:
            by: `module`: a line for each module, as deep as `rows` allows; `op`: for each operation and argument,
                the largest first; `tensor`: for each tensor, the largest first.
            rows: the number of lines; what is left is summed in one more.

        Raises:
            ValueError: if `by` is none of these, or `rows` is not positive.
        """
        from rich.table import Table

        groups = self._groups(by, rows)
        table = Table(title=self.summary, caption=_CAPTION if self.rows else None)
        table.add_column("saved by" if by == "op" else "module", overflow="fold")
        if by == "tensor":
            for title in ("saved by", "tensor"):
                table.add_column(title, overflow="fold")
        else:
            table.add_column("tensors", justify="right")
        for title in ("eager", "lean", "floor"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column(
            "lean()" if by == "tensor" else "lean / eager", justify="left" if by == "tensor" else "right"
        )
        for group in groups:
            table.add_row(*group.cells(by))
        table.add_section()
        table.add_row(*_Group("in all", self.rows).cells(by), style="bold")
        return table

    def _groups(self, by: By, rows: int) -> list[_Group]:
        if by not in ("module", "op", "tensor"):
            raise ValueError(f"ledger: by must be 'module', 'op' or 'tensor', got {by!r}")
        if not isinstance(rows, int) or rows < 1:
            raise ValueError(f"ledger: rows must be a positive number, got {rows!r}")
        if by == "module":
            deepest = 1 + max((row.module.count(".") for row in self.rows), default=0)
            for depth in range(deepest, min(deepest, 2) - 1, -1):
                groups = self._by(functools.partial(self._module, depth=depth))
                if len(groups) <= rows:
                    break
        elif by == "op":
            groups = self._by(_saver)
        else:
            groups = [_Group(self._module(row), [row], row) for row in self.rows]
        largest = sorted((group for group in groups if group.most), key=lambda group: -group.most)
        shown = largest[:rows]
        if by == "module":
            shown = [group for group in groups if group in shown]
        if rest := largest[rows:]:
            shown.append(_Group(f"{len(rest)} more", [row for group in rest for row in group.rows]))
        return shown

    def _module(self, row: Row, depth: int | None = None) -> str:
        """The path of a module, to a depth, and without the model's own name if all are of one model."""
        path = row.module.split(".")[:depth]
        return ".".join(path[1:] if len(path) > 1 and self._model else path) or NOWHERE

    def _by(self, name: Callable[[Row], str]) -> list[_Group]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(name(row), []).append(row)
        return [_Group(name, rows) for name, rows in found.items()]

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        if self._rows is None:
            return "<ledger whose block has not ended>"
        return printed(self.table())

    def save_png(self, path: str | Path, by: By = "module", rows: int = 24) -> None:
        """Draw a bar chart: what eager, lean and the floor keep, for each line of `table(by, rows)`.

        By `tensor` there is no bar for the rest, which would dwarf the others.

        Raises:
            ValueError: if `by` or `rows` is wrong.
        """
        groups = self._groups(by, rows)
        _draw(self, Path(path), [group for group in groups if by != "tensor" or group.only])


@dataclass(eq=False)
class _Group(_Totals):
    """Rows that make a line of a table, or the one that does."""

    name: str
    rows: list[Row]
    only: Row | None = None

    @property
    def most(self) -> int:
        return max(self.eager, self.lean, self.floor)

    def cells(self, by: By) -> list[str]:
        count = str(sum(row.bytes > 0 for row in self.rows))
        sizes = [_size(self.eager), _size(self.lean), _size(self.floor)]
        if by != "tensor":
            return [self.name, count, *sizes, f"{self.lean / self.eager:.2f}x" if self.eager else ""]
        if self.only is None:
            return [self.name, "", f"{count} tensors", *sizes, ""]
        shape = "×".join(map(str, self.only.shape))
        return [self.name, _saver(self.only), f"{self.only.dtype} {shape}", *sizes, self.only.lean]


_CAPTION = (
    "Parameters, buffers and inputs are not counted. A storage is counted once, where it was first saved. "
    "Floor: the fewest bytes from which cheap operations could give back all of it."
)


def _saver(row: Row) -> str:
    return f"{row.op}: {row.argument}" if row.argument else row.op


def _size(n: float) -> str:
    for unit, one in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= one:
            return f"{n / one:.1f} {unit}"
    return f"{n:.0f} B"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _draw(report: Ledger, path: Path, groups: list[_Group]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    unit, one = ("MiB", 2**20) if report.eager >= 2**20 else ("KiB", 2**10)
    figure = Figure(figsize=(9, 1.8 + 0.3 * max(len(groups), 1)), layout="constrained", dpi=150)
    axes = figure.subplots()
    grey, blue, red = "#c3c9d1", "#2f6f9f", "#c8323c"
    for y, group in enumerate(groups):
        axes.barh(y, group.eager / one, height=0.74, color=grey)
        axes.barh(y, group.lean / one, height=0.38, color=blue)
        axes.plot([group.floor / one] * 2, [y - 0.37, y + 0.37], color=red, linewidth=2, solid_capstyle="butt")
        if group.eager:
            ratio, end = f"{group.lean / group.eager:.2f}x", (group.most / one, y)
            axes.annotate(ratio, end, (4, 0), textcoords="offset points", va="center", fontsize=8, color="#555555")
    names = [f"{group.name}  {_saver(group.only)}" if group.only else group.name for group in groups]
    axes.set_yticks(range(len(groups)), names, fontsize=9)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    axes.set_xlabel(unit)
    axes.grid(axis="x", color="#e6e8eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    share = {name: f"{name} {_size(n)}, {n / report.eager:.2f}x" for name, n in report._less() if report.eager}
    figure.legend(
        handles=[
            Patch(color=grey, label=f"eager {_size(report.eager)}"),
            Patch(color=blue, label=share.get("lean", "lean")),
            Line2D([], [], color=red, linewidth=2, label=share.get("floor", "floor")),
        ],
        title=report._title,
        title_fontproperties={"weight": "bold", "size": 12},
        alignment="left",
        loc="outside upper left",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    FigureCanvasAgg(figure).print_png(path)


# From what was written down to rows ---------------------------------------------------------------------------


def _rows(watch: _Watch) -> list[Row]:
    made = watch.recorder.made
    roots = (t.grad_fn for ref in watch.recorder.results if (t := ref()) is not None)
    savers = _savers(node for node in roots if node is not None)
    plans = _plans(entry.handle.plan for entry in watch.entries if isinstance(entry.handle, Saved))
    kept = {content: plan.nbytes for content, plan in plans.items() if plan.nbytes}
    floor = _floor(watch, plans, made)
    if sum(floor.values()) > sum(kept.values()):  # by rounding, where there are too many bytes to count one by one
        floor = dict(kept)
    rows = []
    for entry in watch.entries:
        op, argument = savers.get(entry.handle, ("unknown", ""))
        if isinstance(entry.handle, Saved):
            content = entry.handle.plan.content
            lean, lean_bytes, floor_bytes = _said(plans[content]), kept.pop(content, 0), floor.pop(content, 0)
        else:
            lean, lean_bytes, floor_bytes = "kept", entry.nbytes, entry.nbytes
        rows.append(
            Row(
                entry.module, op, argument, entry.shape, entry.dtype, entry.nbytes, entry.shared_with,
                lean, lean_bytes, floor_bytes,
            )
        )  # fmt: skip
    for content in {**kept, **floor}:
        at = made.get(content, _Made("", "unknown", (), torch.uint8))
        said = _said(plans[content]) if content in kept else "not kept"
        rows.append(
            Row(
                at.module, "lean", f"result of {at.op}", at.shape, _name_of(at.dtype), 0, None,
                said, kept.get(content, 0), floor.get(content, 0),
            )
        )  # fmt: skip
    return rows


def _plans(asked: Iterable[Plan]) -> dict[Content, Plan]:
    """These plans and all that they rest on."""
    found: dict[Content, Plan] = {}
    todo = list(asked)
    while todo:
        plan = todo.pop()
        if plan.content not in found:
            found[plan.content] = plan
            todo += plan.sources.values()
    return found


def _said(plan: Plan) -> str:
    if plan.recipe is not None:
        function = plan.recipe.function
        function = function.func if isinstance(function, functools.partial) else function
        name = function.overloadpacket.__name__ if isinstance(function, OpOverload) else function.__name__
        return f"made again by {name.strip('_')}"
    if isinstance(plan.code, Bits):
        return "kept as bits"
    return f"kept as {_name_of(plan.code.code.dtype)}" if isinstance(plan.code, Narrow) else "kept"


def _floor(watch: _Watch, plans: dict[Content, Plan], made: dict[Content, _Made]) -> dict[Content, int]:
    """What to keep at the least, and the bytes of each."""

    def price(content: Content) -> int:
        if content.outside:
            return 0
        plan = plans.get(content)
        if plan is not None and plan.recipe is None:
            return plan.nbytes
        if content.limit is None or content not in made:
            return content.nbytes
        numel = content.nbytes // made[content].dtype.itemsize
        return -(-numel // 8) if content.limit == 2 else numel * narrowest(content.limit).itemsize

    def made_of(content: Content) -> list[Content] | None:
        return None if content.recipe is None else [ref.content for ref in content.recipe.refs]

    asked = [entry.handle.plan.content for entry in watch.entries if isinstance(entry.handle, Saved)]
    return cheapest(asked, made_of, price)


def _savers(roots: Iterable[Any]) -> dict[Saved | SavedAsItIs, tuple[str, str]]:
    """Who saved what, of all that the graph behind these nodes holds: an operation and an argument of it."""
    found: dict[Saved | SavedAsItIs, tuple[str, str]] = {}
    slots: dict[type, list[str]] = {}
    seen = dict.fromkeys(roots)
    todo = list(seen)
    while todo:
        node = todo.pop()
        for name in slots.setdefault(type(node), [a for a in dir(node) if a.startswith("_raw_saved_")]):
            # The raw attribute gives what the hook returned, and does not unpack it: nothing is made again.
            with contextlib.suppress(RuntimeError):  # the backward pass has been through here
                raw = getattr(node, name)
                for i, saved in enumerate(raw if isinstance(raw, tuple) else [raw]):
                    if isinstance(handle := saved.data, Saved | SavedAsItIs):
                        found[handle] = _op_and_argument(node, name.removeprefix("_raw_saved_"), i)
        for other, _ in node.next_functions:
            if other is not None and other not in seen:
                seen[other] = None
                todo.append(other)
    return found


def _op_and_argument(node: Any, argument: str, i: int) -> tuple[str, str]:
    function = getattr(type(node), "_forward_cls", None)
    if function is not None:
        return function.__name__, f"saved tensor {i}"
    name = re.sub(r"Backward\d*$", "", node.name().rpartition("::")[2])
    return re.sub(r"(?<=[A-Za-z0-9])(?=[A-Z][a-z])", "_", name).lower(), argument


# For users ----------------------------------------------------------------------------------------------------


def ledger(model: Callable[..., Any] | None = None, /, *inputs: Any, **kwargs: Any) -> Ledger:
    """Find out what is kept for the backward pass: of `model(*inputs)`, or of a block.

    ::

        print(bptools.memory.ledger(model, x))

        with bptools.memory.ledger() as l:
            loss = loss_fn(model(x), y)
        print(l)

    With a model, its forward pass is run once, in its present mode, with gradients; random numbers and buffers are
    then as they were. A block keeps what `lean()` keeps, so the backward pass works as always. What an inner
    `lean()`, other saved-tensor hooks or `torch.utils.checkpoint` keep is not seen; nor is what other threads do.

    Args:
        model: a module or any other callable.
        inputs: its arguments.
        kwargs: its keyword arguments.

    Returns:
        A `Ledger`: to print, with `rows`, the totals `eager`, `lean` and `floor` in bytes, `table()`, `to_json()`
        and `save_png()`. Without a model it is to be entered, and knows all that when its block has ended.

    Raises:
        TypeError: if the model cannot be called, or there are arguments and no model.
        RuntimeError: if it is used inside `lean()`, or asked too early.
    """
    if model is None:
        if inputs or kwargs:
            raise TypeError("ledger: model must come first, before its inputs; got None")
        return Ledger()
    if not callable(model):
        raise TypeError(f"ledger: model must be a module or another callable, got {type(model).__name__}")
    modules = [*model.modules()] if isinstance(model, torch.nn.Module) else []
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
    tensors += [t for t in tree_leaves((inputs, kwargs)) if isinstance(t, Tensor)]
    devices = {t.device for t in tensors if t is not None and t.is_cuda}
    with torch.random.fork_rng(sorted(devices, key=str)), _copies_of_buffers(modules), torch.enable_grad():
        report = Ledger()
        with report:
            _outputs = model(*inputs, **kwargs)  # while they are there, so is the graph
    return report


@contextlib.contextmanager
def _copies_of_buffers(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Let the modules have copies of their buffers, and then their own again, which nobody has written to."""
    own = [(m._buffers, dict(m._buffers)) for m in modules]
    copies: dict[Tensor | None, Tensor | None] = {None: None}
    for buffers, before in own:
        for name, buffer in before.items():
            if buffer not in copies:
                copies[buffer] = buffer.detach().clone()
            buffers[name] = copies[buffer]
    try:
        yield
    finally:
        for buffers, before in own:
            buffers.clear()
            buffers.update(before)


def ledger_command(
    model: str,
    /,
    *,
    batch: int = 8,
    size: int | None = None,
    device: str = "cpu",
    by: By = "module",
    rows: int = 24,
    json: Path | None = None,
    png: Path | None = None,
) -> None:
    """Print what a model keeps for the backward pass, what `bptools.lean()` would keep, and the floor.

    Args:
        model: `torchvision:NAME`, `transformers:TYPE`, `transformers:CONFIG.json`, `timm:NAME` or
            `package.module:callable`; with random weights.
        batch: pictures or sequences.
        size: of a picture's side, or the length of a sequence; the usual, if it is not given.
        device: where it runs.
        by: a line for each module, operation or tensor.
        rows: the number of lines.
        json: a file to write everything to.
        png: a file to draw a bar chart to.
    """
    from rich.console import Console

    from . import _models

    try:
        loaded = _models.load(model, batch, size, device=device)
        with ledger() as report:
            loss = loaded.loss()
        report.name = f"{model}, batch {batch}" + (f", size {size}" if size else "")
        table = report.table(by, rows)
    except (TypeError, ValueError) as error:
        print(f"bptools ledger: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    del loss
    Console().print(table)
    if json is not None:
        json.write_text(report.to_json(indent=2), encoding="utf-8")
    if png is not None:
        report.save_png(png, by, rows)
