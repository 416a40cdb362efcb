"""How the signal and its gradient go through a model: what vanishes, what explodes, which units are dead.

By the chain rule the gradient at a layer's output is that of the loss, multiplied by one Jacobian for each layer
between: `dy_i = J_i+1^T ... J_L^T dy_L`. If these shrink vectors by 0.5 each, 20 of them leave 1e-6, and the first
layers do not learn; if they stretch them by 2, the first step throws the weights away. A table of the norms
`|dy_i|`, layer by layer, shows which of the two it is, and where it begins. The forward signal has the same fate,
by the same weights, and is in the table too.

An activation multiplies by its slope: `dx = f'(x) dy`, element by element. The backward pass computes both, so the
slope in use is `dx / dy`, whatever the activation is and however it was called; modules, functions and operations
in place are seen alike, by the nodes of autograd's graph. Where the slope is 0 an element passes nothing on: it is
*flat*. A unit (feature or channel) that is flat in every sample is *dead*: neither its weights nor anything before
it learn from it. Sigmoids whose slope is near 0 are *saturated*.

Sources: Bengio et al., IEEE Transactions on Neural Networks 5 (1994); Glorot & Bengio, AISTATS 2010; He et al.,
ICCV 2015; Pascanu et al., ICML 2013.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils.parametrize import is_parametrized

from bptools._console import plain_table, printed

from ._graph import Graph

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table
    from torch.utils.tensorboard import SummaryWriter

FLAT = 0.01  # a slope below that part of the steepest
OPEN = (
    "Relu", "LeakyRelu", "PreluKernel", "Prelu", "RreluWithNoise", "Threshold", "Elu", "Selu", "Celu", "Gelu",
    "Silu", "Mish", "Softplus", "Hardswish",
)  # fmt: skip
BOUNDED = ("Hardtanh", "Sigmoid", "Tanh", "Softsign", "Hardsigmoid")  # on both sides: these saturate
STEEPEST = dict.fromkeys((*OPEN, *BOUNDED), 1.0) | {"Sigmoid": 0.25, "Hardsigmoid": 1 / 6}  # slope, by node
FEATURES_AT = {  # the dimension that features have, by what is in the name of the node that made them
    "Convolution": 1, "BatchNorm": 1, "GroupNorm": 1, "InstanceNorm": 1, "Addmm": -1, "Mm": -1, "Bmm": -1,
    "Linear": -1, "LayerNorm": -1, "RmsNorm": -1,
}  # fmt: skip

RATIO = 1e3  # from one end of the model to the other: more is found
DEAD = 0.25  # share of a layer's units
SATURATED = 0.5  # share of an activation's elements
LEAST = 16  # samples of a unit before it is called dead

INITIALISE = "Initialise for the activation (bptools.nn.init.gain: He for ReLU, Xavier for tanh), normalise"
CURES = {
    "vanishing": f"{INITIALISE}, add residual connections, avoid sigmoids",
    "exploding": f"{INITIALISE}, clip the gradient's norm, lower the rate",
    "dead": "Lower the rate, initialise biases by 0, normalise before the activation, or use leaky ReLU or GELU",
    "saturated": "Initialise smaller weights before it (bptools.nn.init.gain), or normalise",
    "unreached": "They are not used, or behind detach(), behind weights of 0 (as in new heads, for one step) or "
    "behind what is flat; freeze them if that is meant",
}
CAPTION = (
    "gradient: norm of the loss's gradient in what the module returned. flat: elements of an activation whose "
    "slope is below 1 % of the steepest. dead: units that are flat in every sample."
)


@dataclass(frozen=True)
class Row:
    """A module that has parameters or no modules within it, or an activation that was called as a function.

    Attributes:
        module: its path from the outermost one's class; with a number from the second time that it ran in a pass:
            `ResNet.layer1.0.relu#2`.
        kind: the module's class, or the activation's name.
        parameters: numbers in its own parameters; those of the first time, if it ran more than once.
        rms: root mean square of what it returned; `None` for a function.
        gradient: norm of the loss's gradient in what it returned, root mean square over backward passes; `None` if
            there was none.
        weight: norm of its own parameters that train; `None` without.
        weight_gradient: norm of their gradient when the block ended; `None` without.
        flat: share of an activation's elements whose slope is below 1 % of the steepest; `None` if it is none.
        units: channels or features of an activation; 0 if no gradient told.
        dead: units that were flat in every sample.
        samples: elements of each unit that were seen, over samples and positions.
        saturates: whether it is an activation that is flat on both sides.
    """

    module: str
    kind: str
    parameters: int
    rms: float | None
    gradient: float | None
    weight: float | None
    weight_gradient: float | None
    flat: float | None
    units: int
    dead: int
    samples: int
    saturates: bool


@dataclass(frozen=True)
class Finding:
    """What is wrong, and what is known to help.

    Attributes:
        what: `"not finite"`, `"no gradient"`, `"vanishing gradient"`, `"exploding gradient"`,
            `"vanishing signal"`, `"exploding signal"`, `"dead units"` or `"saturated"`.
        words: where, and how bad it is.
        cure: what is known to help.
    """

    what: str
    words: str
    cure: str

    def __str__(self) -> str:
        return f"{self.what}: {self.words}. {self.cure}."


@dataclass(eq=False)
class _Site:
    """What is summed up for a row."""

    module: str
    kind: str
    owner: nn.Module | None
    order: float
    parameters: int = 0
    count: int = 0
    squares: float = 0.0
    passes: set[int] = field(default_factory=set)
    gradients: float = 0.0
    judged: int = 0
    flat: int = 0
    alive: Tensor | None = None
    seen: Tensor | None = None
    samples: int = 0
    saturates: bool = False

    def add_output(self, t: Tensor) -> None:
        self.count += t.numel()
        self.squares += _square(t)

    def add_gradient(self, dy: Tensor) -> None:
        self.passes.add(torch._C._current_graph_task_id())
        self.gradients += _square(dy)

    def add_slopes(self, dx: Tensor, dy: Tensor, features: int, steepest: float) -> None:
        limits = torch.finfo(dy.dtype)
        known = dy.abs() > 1e3 * limits.tiny * limits.eps  # below, the product may be 0 by underflow
        steep = known & (dx.abs() > FLAT * steepest * dy.abs())
        others = [d for d in range(dy.dim()) if d != features % dy.dim()]
        alive, seen = (steep.any(others), known.any(others)) if others else (steep, known)
        if self.alive is not None and self.alive.shape != alive.shape:
            return
        self.judged += int(known.sum())
        self.flat += int(known.sum() - steep.sum())
        self.alive = alive if self.alive is None else self.alive | alive
        self.seen = seen if self.seen is None else self.seen | seen
        self.samples += dy.numel() // max(1, dy.shape[features])

    def row(self, scale: float) -> Row:
        training = [p for p in _own(self.owner) if p.requires_grad and not p.is_meta]
        weight_gradient = _norm([p.grad for p in training if p.grad is not None])
        judged = self.alive is not None and self.seen is not None and self.judged > 0
        return Row(
            self.module,
            self.kind,
            self.parameters,
            math.sqrt(self.squares / self.count) if self.count else None,
            math.sqrt(self.gradients / len(self.passes)) / scale if self.passes else None,
            _norm(training),
            weight_gradient / scale if weight_gradient is not None else None,
            self.flat / self.judged if judged else None,
            self.alive.numel() if judged else 0,
            int((self.seen & ~self.alive).sum()) if judged else 0,
            self.samples,
            self.saturates,
        )


class GradientFlow:
    """What :func:`gradient_flow` returns: watches the passes of a block, and tells of them when it has ended.

    Attributes:
        name: in titles; the model's class, unless it is set.
        scale: what the loss was multiplied by, as a `GradScaler` does, to be set within the block. Gradients are
            divided by it.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"gradient_flow: model must be a torch.nn.Module, got {type(model).__name__}")
        if hasattr(model, "_orig_mod"):
            raise TypeError("gradient_flow: model must be the module itself, not what torch.compile made of it")
        self.model, self.name, self.scale = model, type(model).__name__, 1.0
        self._members, self._sites = {*model.modules()}, {}
        self._calls: Counter[str] = Counter()
        self._hooks: list[Any] = []
        self._graph, self._watching = Graph(self._left), contextlib.ExitStack()
        self._graph.name(model, self.name)
        self._rows: list[Row] | None = None

    def __enter__(self) -> GradientFlow:
        if self._rows is not None or self._hooks:
            raise RuntimeError("gradient_flow: expected one block for each, got a second one")
        self._watching.enter_context(self._graph.watched())
        return self

    def __exit__(self, *exc: Any) -> None:
        self._watching.close()
        for hook in self._hooks:
            hook.remove()
        sites = sorted(self._sites.values(), key=lambda site: site.order)
        self._rows = [site.row(self.scale) for site in sites]
        training = {name: p for name, p in self.model.named_parameters() if p.requires_grad and not p.is_meta}
        self._missing = [name for name, p in training.items() if p.grad is None or not p.grad.any()]
        self._trained = len(training)
        self._hooks, self._sites, self._members = [], {}, set()
        del self._graph, self._watching

    def _left(self, module: nn.Module, path: str, results: list[Tensor], made: list[Node]) -> None:
        """A module has run."""
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpoint's second time: the gradients go to what the first one made
        if len(self._graph.running) == 1:  # the outermost
            self._calls.clear()
        if module not in self._members or ".parametrizations." in path:
            return  # what makes weights is no layer
        alone = next(module.children(), None) is None or is_parametrized(module)
        activations = sorted(
            (node for node in made if _kind(node) in STEEPEST), key=lambda node: node._sequence_nr()
        )
        floats = [t for t in results if t.is_floating_point() and _readable(t)]
        if floats and (alone or module._parameters):
            now = torch.autograd._get_sequence_nr() - 0.5  # behind the nodes that there are
            site = self._site(path, type(module).__name__, module, now)
            site.parameters = sum(p.numel() for p in _own(module))
            for t in floats:
                site.add_output(t)
                if t.requires_grad:
                    self._hooks.append(t.register_hook(site.add_gradient))
            if alone and len(activations) == 1:
                self._follow(site, activations.pop(), known=True)
        for node in activations:
            name = _kind(node).lower()
            self._follow(self._site(f"{path}.{name}()", name, None, node._sequence_nr()), node)

    def _site(self, label: str, kind: str, owner: nn.Module | None, order: float) -> _Site:
        self._calls[label] += 1
        if (n := self._calls[label]) > 1:
            label, owner = f"{label}#{n}", None  # its weights are those of the first time
        return self._sites.setdefault(label, _Site(label, kind, owner, order))

    def _follow(self, site: _Site, node: Node, known: bool = False) -> None:
        """Have the backward pass tell the slopes of an activation, and the gradient unless that is known."""
        kind, at = _kind(node), _features_at(node)
        site.saturates = kind in BOUNDED

        def look(dx: tuple[Tensor | None, ...], dy: tuple[Tensor | None, ...]) -> None:
            if dx[0] is None or dy[0] is None or not dy[0].dim() or dx[0].shape != dy[0].shape:
                return
            if not _readable(dy[0]):
                return
            if not known:
                site.add_gradient(dy[0])
            features = at if at is not None else 1 if dy[0].dim() in (4, 5) else -1
            site.add_slopes(dx[0], dy[0], features if dy[0].dim() > 1 else -1, STEEPEST[kind])

        self._hooks.append(node.register_hook(look))

    # To look at -------------------------------------------------------------------------------------------

    @property
    def rows(self) -> list[Row]:
        """A row for each module and activation, in the order in which they ran."""
        if self._rows is None:
            raise RuntimeError("gradient_flow: it is known when the block has ended, got asked before")
        return self._rows

    @property
    def ratio(self) -> float | None:
        """The gradient's norm at the first layer with parameters over that at the last; `None` if either lacks."""
        return ends(self.rows, "gradient").ratio

    @property
    def findings(self) -> list[Finding]:
        """What is wrong; empty if nothing is."""
        return [*_findings(self.rows, self._missing, self._trained)]

    def to_json(self, indent: int | None = None) -> str:
        """Everything, as JSON; numbers that are not finite are `null`."""
        rows = [{key: _plain(value) for key, value in asdict(row).items()} for row in self.rows]
        findings = [*map(asdict, self.findings)]
        whole = {"name": self.name, "ratio": _plain(self.ratio), "findings": findings, "rows": rows}
        return json.dumps(whole, indent=indent)

    def table(self, rows: int = 24) -> Table:
        """A table for rich to print.

        Args:
            rows: the number of lines: the first and the last, those with dead units or flat ones, and some evenly
                between them; 0 for all.

        Raises:
            ValueError: if `rows` is negative.
        """
        chosen = shown(self, rows)
        title = f"{self.name}: gradient flow"
        if self.ratio is not None:
            title += f"; norm at the first layer / at the last: {self.ratio:.2g}"
        numbers = ("output\nrms", "gradient", "of weights,\n/ weights", "flat\n%", "dead\nunits")
        table = _table(title, "module", numbers, [_cells(row) for row in chosen])
        left = f"{len(chosen)} of {len(self.rows)} rows; " if len(chosen) < len(self.rows) else ""
        table.caption = left + CAPTION
        return table

    def __rich__(self) -> Any:
        from rich.console import Group

        return Group(self.table(), *(f"• {finding}" for finding in self.findings or ["nothing found"]))

    def __str__(self) -> str:
        if self._rows is None:
            return "<gradient flow of a block that has not ended>"
        return printed(self)

    def figure(self, rows: int = 40) -> Figure:
        """A matplotlib figure: gradient, output and dead or flat units, module by module, for `rows` of them."""
        from ._picture import draw_one

        return draw_one(self, rows)

    def save_png(self, path: str | Path, rows: int = 40) -> None:
        """Write `figure(rows)` to a file."""
        from ._picture import save

        save(self.figure(rows), path)

    def scalars(self) -> dict[str, float]:
        """The numbers of each row: `gradient/layer1.0.conv1`, `output rms/...`, and `dead units/...`, 0 to 1."""
        found: dict[str, float | None] = {}
        for row in self.rows:
            found[f"gradient/{short(row)}"] = row.gradient
            found[f"output rms/{short(row)}"] = row.rms
            found[f"dead units/{short(row)}"] = row.dead / row.units if row.units else None
        return {name: value for name, value in found.items() if value is not None}

    def log(self, writer: SummaryWriter, step: int) -> None:
        """Write `scalars()` and `figure()` to TensorBoard."""
        for name, value in self.scalars().items():
            writer.add_scalar(name, value, step)
        writer.add_figure("gradient flow", self.figure(), step)


def gradient_flow(model: nn.Module) -> GradientFlow:
    """Watch how signal and gradient go through `model` within a block, and tell what is wrong with it.

    ::

        with bptools.diagnose.gradient_flow(model) as flow:
            loss_fn(model(x), y).backward()
        print(flow)                      # or flow.save_png("flow.png"), flow.log(writer, step)

    Values, random numbers and gradients are not changed. A block may hold several passes: norms are root mean
    squares over them, and a unit is dead if it was flat in all. Gradients are those of what `backward` is called
    on, so a scaled loss has scaled ones; those of weights are what is in `.grad` when the block ends. What is
    called as a function is named after the module that called it: `Net.relu()`. Not seen are the slopes of what
    reentrant checkpoints run (give them `use_reentrant=False`), other threads, and what runs under `torch.func`'s
    transforms.

    Args:
        model: a module. Others that run within the block are not looked at.

    Returns:
        A `GradientFlow`, to be entered. Afterwards it can be printed, and has `rows`, `findings`, `ratio`,
        `table()`, `figure()`, `save_png()`, `log()` and `to_json()`.

    Raises:
        TypeError: if the model is no module, or a compiled one.
        RuntimeError: if it is asked before the block has ended, or entered twice.
    """
    return GradientFlow(model)


def comparison(flows: Sequence[GradientFlow]) -> Table:
    """A table for rich to print, with a line for each model."""
    rows = []
    for flow in flows:
        norms = ends(flow.rows, "gradient").values
        numbers = [f"{value:.2g}" for value in (*norms[:-2:-1], *norms[:1], flow.ratio) if value is not None]
        dead = max((100 * row.dead / row.units for row in flow.rows if row.units), default=None)
        cells = (*numbers, "", "", "")[:3]
        rows.append((flow.name, len(norms), *cells, f"{dead:.0f}" if dead is not None else ""))
    headings = ("layers", "gradient\nat the last", "at the\nfirst", "first\n/ last", "most dead\nunits, %")
    table = _table("gradient flow", "model", headings, rows)
    table.caption = "gradient: its norm in what the last and the first layer that have parameters return"
    return table


def _table(title: str, name: str, numbers: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A column of names, which may be folded, and others of numbers, which may not."""
    table = plain_table(title, {name: "left"} | dict.fromkeys(numbers, "right"), rows)
    for column in table.columns[1:]:
        column.no_wrap = True
    table.caption_justify = "left"
    return table


# What is wrong -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ends:
    """A norm from one end of the model to the other, over the layers that have parameters."""

    rows: list[Row]
    values: list[float]

    @property
    def ratio(self) -> float | None:
        """The first value over the last."""
        return self.values[0] / self.values[-1] if len(self.values) > 1 and self.values[-1] > 0 else None

    def words(self, what: str, backward: bool) -> str:
        """From where to where it changes how much, and where most."""
        steps = [math.log(max(b, 1e-300) / max(a, 1e-300)) for a, b in pairwise(self.values)]
        at = max(range(len(steps)), key=lambda i: abs(steps[i]))
        ends = (-1, 0) if backward else (0, -1)
        (a, va), (b, vb) = ((short(self.rows[i]), self.values[i]) for i in ends)
        each = (vb / va) ** (1 / len(steps)) if va and vb else 0.0
        most = " and ".join(short(self.rows[i]) for i in ((at + 1, at) if backward else (at, at + 1)))
        return f"{what} goes from {va:.2g} at {a} to {vb:.2g} at {b}, x{each:.2g} a layer; most between {most}"


def ends(rows: Sequence[Row], name: str, positive: bool = False) -> Ends:
    """A norm of all layers that have parameters and that norm, and one above 0 if it is to be `positive`."""
    found = [(row, value) for row in rows if row.parameters and (value := getattr(row, name)) is not None]
    found = [(row, value) for row, value in found if value > 0 or not positive]
    return Ends([row for row, _ in found], [value for _, value in found])


def _findings(rows: Sequence[Row], missing: Sequence[str], trained: int) -> Iterator[Finding]:
    wrong = [short(row) for row in rows if not all(math.isfinite(v or 0.0) for v in (row.rms, row.gradient))]
    if wrong:
        yield Finding(
            "not finite", f"first in what {wrong[0]} returns or gets back", "detect_nonfinite() finds where"
        )
    if trained and len(missing) == trained and all(row.gradient is None for row in rows):
        yield Finding("no gradient", "no backward pass came through the model", "Call backward() within the block")
    elif missing:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        yield Finding(
            "no gradient",
            f"{len(missing)} of {trained} parameters that train got none or 0: {names}",
            CURES["unreached"],
        )
    for name, what, size in (("gradient", "gradient", "the norm"), ("rms", "signal", "its root mean square")):
        found = ends(rows, name, positive=True)  # where it is 0, nothing goes on: that is said above
        ratio = found.ratio
        if ratio is not None and math.isfinite(ratio):
            growth = ratio if name == "gradient" else 1 / ratio if ratio else math.inf
            if not 1 / RATIO < growth < RATIO:
                fate = "exploding" if growth > 1 else "vanishing"
                yield Finding(f"{fate} {what}", found.words(size, name == "gradient"), CURES[fate])
    dead = [row for row in rows if row.samples >= LEAST and row.dead > DEAD * row.units]
    if dead:
        worst = max(dead, key=lambda row: row.dead / row.units)
        words = f"{worst.dead} of {worst.units} in {short(worst)}, over {worst.samples} samples and positions"
        yield Finding("dead units", words + _others(dead), CURES["dead"])
    flat = [row for row in rows if row.saturates and (row.flat or 0) > SATURATED]
    if flat:
        worst = max(flat, key=lambda row: row.flat or 0)
        words = f"{100 * (worst.flat or 0):.0f} % of {short(worst)} is flat"
        yield Finding("saturated", words + _others(flat), CURES["saturated"])


def _others(rows: Sequence[Row]) -> str:
    return f"; {len(rows) - 1} more of its kind" if len(rows) > 1 else ""


# Small things --------------------------------------------------------------------------------------------------


def _kind(node: Node) -> str:
    """`Relu` of `ReluBackward0`, and of our `ReluBackward` and `Relu_Backward`."""
    return re.sub(r"_?Backward\d*$", "", node.name().rpartition("::")[2])


def _features_at(node: Node) -> int | None:
    """The dimension of features in what a node takes: that of the layer before it, or `None` if none is near."""
    without_batch = False
    for _ in range(8):
        before = node.next_functions[0][0] if node.next_functions else None
        if before is None or _kind(before) in ("Permute", "Transpose"):
            return None
        without_batch = without_batch or _kind(before).startswith("Squeeze")
        for part, dimension in FEATURES_AT.items():
            if part in _kind(before):
                return 0 if without_batch and dimension == 1 else dimension
        node = before
    return None


def _own(module: nn.Module | None) -> list[nn.Parameter]:
    """Its own parameters, and those that its own are made of."""
    return [] if module is None else [*module.parameters(recurse=is_parametrized(module))]


def _readable(t: Tensor) -> bool:
    """Whether it has numbers, as nested tensors and what stands for tensors in transforms do not."""
    return not (t.is_nested or t.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(t))


def _norm(tensors: Sequence[Tensor]) -> float | None:
    if not tensors:
        return None
    return math.sqrt(sum(map(_square, tensors)))


def _square(t: Tensor) -> float:
    """The sum of squares, in float64."""
    dtype = torch.complex128 if t.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(t.detach(), dtype=dtype)) ** 2


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(flow: GradientFlow, most: int) -> list[Row]:
    """At most so many rows: the ends, those with most dead or flat units, and others evenly between."""
    if most < 0:
        raise ValueError(f"gradient_flow: rows must be 0, for all, or more, got {most}")
    rows = flow.rows
    if not most or len(rows) <= most:
        return rows
    if most == 1:
        return rows[:1]
    ill = sorted(range(len(rows)), key=lambda i: -_illness(rows[i]))[: most // 4]
    chosen = {i for i in ill if _illness(rows[i])} | {0, len(rows) - 1}
    even = [round(k * (len(rows) - 1) / (most - 1)) for k in range(most)]
    for i in sorted(even, key=lambda i: min(abs(i - j) for j in chosen), reverse=True):
        if len(chosen) < most:
            chosen.add(i)
    return [rows[i] for i in sorted(chosen)]


def _illness(row: Row) -> float:
    dead = row.dead / row.units if row.units and row.samples >= LEAST else 0.0
    return dead + (row.flat or 0.0 if row.saturates else 0.0)


def short(row: Row) -> str:
    """The module's path, without the class of the outermost."""
    return row.module.partition(".")[2] or row.module


def named(row: Row) -> str:
    """The path, and the class if it is one."""
    return short(row) if "()" in row.module else f"{short(row)} {row.kind}"


def _cells(row: Row) -> list[str]:
    relative = row.weight_gradient / row.weight if row.weight and row.weight_gradient is not None else None
    numbers = (f"{v:.2g}" if v is not None else "" for v in (row.rms, row.gradient, relative))
    flat = f"{100 * row.flat:.0f}" if row.flat is not None else ""
    return [named(row), *numbers, flat, f"{row.dead} of {row.units}" if row.units else ""]
