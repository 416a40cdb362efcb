"""Pictures of gradient flow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ._flow import GradientFlow, ends, named, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, GREY, RED = "#2f6f9f", "#8a929c", "#c8323c"


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as a PNG."""
    FigureCanvasAgg(figure).print_png(str(path))


def draw_one(flow: GradientFlow, most: int) -> Figure:
    """Gradient, output, and dead or flat units, module by module, from the input (above) to the loss (below)."""
    rows = shown(flow, most)
    figure = Figure(figsize=(11, 2.2 + 0.24 * max(len(rows), 1)), layout="constrained", dpi=130)
    left, middle, right = figure.subplots(1, 3, sharey=True)
    _norms(left, [row.gradient for row in rows], BLUE)
    left.set_xlabel("norm of the gradient in the output")
    _norms(middle, [row.rms for row in rows], GREY)
    middle.set_xlabel("output, root mean square")
    for y, row in enumerate(rows):
        if row.flat is not None:
            right.barh(y, 100 * row.flat, height=0.7, color="#d5dae0")
            right.plot([100 * row.flat], [y], "o", ms=3.5, color=GREY)
        if row.units:
            right.barh(y, 100 * row.dead / row.units, height=0.4, color=RED)
    right.set(xlim=(0, 100), xlabel="% of elements flat (grey),\nof units dead (red)")
    left.set_yticks(range(len(rows)), [named(row) for row in rows], fontsize=8)
    left.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    for axes in (left, middle, right):
        _plain(axes)
    ratio = f"; first layer / last: {flow.ratio:.2g}" if flow.ratio is not None else ""
    ratio += f"; {len(rows)} of {len(flow.rows)} rows" if len(rows) < len(flow.rows) else ""
    wrong = ", ".join(finding.what for finding in flow.findings) or "nothing found"
    figure.suptitle(f"{flow.name}: gradient flow{ratio}\n{wrong}", x=0.01, ha="left", fontsize=11, weight="bold")
    return figure


def draw_many(flows: Sequence[GradientFlow]) -> Figure:
    """Gradient and output of several models, over the layers that have parameters."""
    figure = Figure(figsize=(11, 4.4 + 0.2 * len(flows)), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2)
    for axes, name, title in (
        (left, "gradient", "norm of the gradient in the output"),
        (right, "rms", "output, root mean square"),
    ):
        for flow in flows:
            values = [value if value > 0 else None for value in ends(flow.rows, name).values]
            places = [i / max(1, len(values) - 1) for i in range(len(values))]
            axes.plot(places, values, marker=".", ms=4, lw=1.4, label=flow.name)
        axes.set(yscale="log", xlabel="layers with parameters, from the input (0) to the loss (1)", title=title)
        _plain(axes)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", frameon=False, fontsize=9, ncols=2)
    return figure


def _norms(axes: Axes, values: Sequence[float | None], colour: str) -> None:
    known = [(value, y) for y, value in enumerate(values) if value is not None]
    if known:
        axes.plot(*zip(*known, strict=True), marker="o", ms=3.5, lw=1, color=colour)
    positive = [value for value in values if value and math.isfinite(value)]
    if positive and max(positive) > 10 * min(positive):  # else a logarithmic axis would have one number
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())


def _plain(axes: Axes) -> None:
    axes.grid(color="#e6e8eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="both", length=0)
