"""The end card: tables for the terminal and a picture."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from rich.console import Console
from rich.table import Table

from bptools._console import plain_table

# Okabe and Ito's palette, which holds up under colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass(frozen=True)
class Metric:
    """What runs are judged by.

    Attributes:
        key: Its key in results, and in the history of epochs.
        name: In words.
        unit: Such as ``"%"``, or an empty string.
        digits: After the point.
        higher: Whether more is better.
        top: The highest value there can be, where there is one.
    """

    key: str = "accuracy"
    name: str = "accuracy"
    unit: str = "%"
    digits: int = 1
    higher: bool = True
    top: float | None = 100.0

    def __str__(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name


ACCURACY = Metric()


def mean_spread(values: Sequence[float], digits: int = 1) -> str:
    """Return ``"94.7 ± 1.2"``: mean and sample standard deviation, or the mean alone for one value."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def paired_difference(
    name: str, values: Sequence[float], other: str, others: Sequence[float], metric: Metric = ACCURACY
) -> str:
    """Return in words by how much ``values`` exceed ``others``, seed by seed."""
    gaps = np.subtract(values, others)
    spread = f" ± {np.std(gaps, ddof=1):.{metric.digits}f}" if len(gaps) > 1 else ""
    unit = "points" if metric.unit == "%" else metric.unit or metric.name
    better = (gaps > 0 if metric.higher else gaps < 0).sum()
    ahead = f", ahead on {better} of {len(gaps)} seeds" if len(gaps) > 1 else ", one seed only"
    return f"{name} - {other}: {np.mean(gaps):+.{metric.digits}f}{spread} {unit}{ahead}"


def class_table(
    title: str, targets: Sequence[int], predictions: Sequence[int], classes: Sequence[str], unit: str = "images"
) -> Table:
    """Return precision, recall and F1 in percent, and the number of samples, for each class."""
    from sklearn.metrics import precision_recall_fscore_support  # takes seconds to import

    scores = precision_recall_fscore_support(targets, predictions, labels=range(len(classes)), zero_division=0.0)
    rows = [
        (name, *(f"{100 * score[i]:.1f}" for score in scores[:3]), scores[3][i]) for i, name in enumerate(classes)
    ]
    columns = {"class": "left", "precision %": "right", "recall %": "right", "F1 %": "right", unit: "right"}
    return plain_table(title, columns, rows)


def draw_confusion(axes: Axes, targets: Sequence[int], predictions: Sequence[int], classes: Sequence[str]) -> None:
    """Draw the confusion matrix in percent of each true class, with numbers where they fit."""
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(targets, predictions, labels=range(len(classes)))
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    if len(classes) <= 12:
        for (i, j), value in np.ndenumerate(percent):
            if value >= 0.5:
                colour = "white" if value > 55 else "black"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    if len(classes) <= 40:
        long = max(map(len, classes)) > 3
        axes.set_xticks(range(len(classes)), classes, rotation=90 if long else 0, fontsize=8)
        axes.set_yticks(range(len(classes)), classes, fontsize=8)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.04, label="share of the true class (%)")


def confusion_figure(targets: Sequence[int], predictions: Sequence[int], classes: Sequence[str]) -> Figure:
    """Return a figure of the confusion matrix alone, for TensorBoard."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    draw_confusion(figure.subplots(), targets, predictions, classes)
    return figure


def _best_epoch(result: Mapping) -> Mapping:
    return min(result["history"], key=lambda epoch: epoch["loss"])


def best_seed(runs: Sequence[Mapping]) -> int:
    """Return which of the results has the lowest validation loss."""
    return min(range(len(runs)), key=lambda i: _best_epoch(runs[i])["loss"])


def best_strategy(runs: Mapping[str, Sequence[Mapping]]) -> str:
    """Return the name of those results, of one strategy over the seeds, with the lowest mean validation loss."""
    trained = [name for name, some in runs.items() if all(result["history"] for result in some)]
    return min(trained, key=lambda name: sum(_best_epoch(result)["loss"] for result in runs[name]))


Panel = Callable[[Axes], None]


class _Plain(LogFormatter):
    """Writes 0.4, not 4e-01, where matplotlib finds that a label has room."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return super().__call__(x, pos) and f"{x:g}"


def log_scale(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with plain numbers between powers of ten, too."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_Plain())
    axes.yaxis.set_minor_formatter(_Plain(minor_thresholds=(2, 0.5)))


def _draw_curves(axes: Axes, curves: Mapping[str, Sequence[Sequence[float]]], colour: Mapping[str, str]) -> None:
    """Draw a line for each strategy, the mean over seeds, with a band of one standard deviation."""
    for name, runs in curves.items():
        epochs = np.arange(1, max(map(len, runs)) + 1)
        padded = np.full((len(runs), len(epochs)), np.nan)
        for row, run in zip(padded, runs, strict=True):
            row[: len(run)] = run
            row[len(run) :] = run[-1]  # a run that stopped early stays where it stopped
        mean = padded.mean(0)
        axes.plot(epochs, mean, color=colour[name], label=name, lw=2, marker="o" if len(epochs) == 1 else "")
        if len(runs) > 1:
            spread = padded.std(0, ddof=1)
            axes.fill_between(epochs, mean - spread, mean + spread, color=colour[name], alpha=0.12, lw=0)


def _draw_seeds(
    axes: Axes, values: Mapping[str, Sequence[float]], colour: Mapping[str, str], metric: Metric
) -> None:
    """Draw the test's figure of each seed as a dot, and the mean as a line with its number."""
    for place, (name, some) in enumerate(values.items()):
        places = place + np.linspace(-0.15, 0.15, len(some)) if len(some) > 1 else [place]
        axes.scatter(places, some, color=colour[name], s=28, zorder=3)
        axes.hlines(np.mean(some), place - 0.32, place + 0.32, color=colour[name], lw=2)
        axes.annotate(
            f"{np.mean(some):.{metric.digits}f}", (place, max(some)), (0, 7), textcoords="offset points",
            ha="center",
        )  # fmt: skip
    axes.set_xticks(range(len(values)), list(values), rotation=25, ha="right")


def save_picture(
    path: Path,
    title: str,
    curves: Mapping[str, Sequence[Sequence[float]]],
    values: Mapping[str, Sequence[float]],
    metric: Metric = ACCURACY,
    panel: Panel | None = None,
) -> None:
    """Save the picture: validation curves, the test's figure of each seed, and one more panel.

    Args:
        path: The PNG file.
        title: Above the picture.
        curves: The metric in validation, by strategy, seed and epoch.
        values: The metric in the test, by strategy and seed.
        metric: What is measured.
        panel: Draws the third panel.
    """
    names = dict.fromkeys([*values, *curves])  # what diverged has a curve and no test
    colour = dict(zip(names, COLOURS * len(names), strict=False))
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure = Figure(figsize=(16 if panel else 11, 5), layout="constrained")
        left, middle, *right = figure.subplots(
            1, 2 + bool(panel), width_ratios=(1.15, 0.85, 1.05)[: 2 + bool(panel)]
        )
        _draw_curves(left, curves, colour)
        several = any(len(runs) > 1 for runs in curves.values())
        left.set(xlabel="epoch", ylabel=f"validation {metric}")
        left.set_title(f"Validation {metric.name}" + (", mean ± sd over seeds" if several else ""))
        left.grid(alpha=0.25)
        if curves:
            left.legend(loc="lower right" if metric.higher else "upper right", frameon=False)
        _draw_seeds(middle, values, colour, metric)
        middle.set(ylabel=f"test {metric}", title=f"Test {metric.name}: seeds (dots) and mean (line)")
        middle.grid(axis="y", alpha=0.25)
        if metric.top is not None:
            left.set_ylim(0, 1.02 * metric.top)
            middle.set_ylim(0, 1.08 * metric.top)
        else:
            middle.margins(y=0.15)
        if metric.top is None and not metric.higher:  # a loss falls by orders of magnitude, and ends are compared
            log_scale(left)
            log_scale(middle)
        if panel:
            panel(right[0])
        figure.suptitle(title, fontweight="bold")
        figure.savefig(path, dpi=110)


def print_card(
    console: Console,
    folder: Path,
    title: str,
    runs: Mapping[str, Sequence[Mapping]],
    classes: Sequence[str] = (),
    notes: Sequence[str] = (),
    *,
    metric: Metric = ACCURACY,
    also: Sequence[Metric] = (),
    pairs: Sequence[tuple[str, str]] | None = None,
    columns: Mapping[str, tuple[str, int]] | None = None,
    unit: str = "images",
    drawn: str = "images, weights and order",
    tables: Sequence[Table] = (),
    panel: Panel | None = None,
) -> None:
    """Print what a job came to, and save the picture of it as ``card.png`` in ``folder``.

    Args:
        console: Where to print.
        folder: Folder of the job.
        title: What was done, in a few words.
        runs: Results by strategy, one for each seed: the metric on the test data (``None`` where there is none),
            ``seconds``, ``reason``, and ``history``, which is empty if nothing was trained, or has the ``loss``
            and the metric of each epoch's validation. With ``classes`` also ``targets`` and ``predictions``.
        classes: Class names by label, for a table of them and, without ``panel``, a confusion matrix.
        notes: Lines to print below the tables.
        metric: What the runs are judged by.
        also: What they are compared by besides, seed by seed.
        pairs: Strategies to compare seed by seed; by default each with ``"scratch"``, and ``"discriminative"``
            with ``"full"``. Names that did not run are left out.
        columns: More columns: key in the results, and digits, by heading.
        unit: What test samples are called.
        drawn: What each seed draws.
        tables: More tables, printed below the others.
        panel: Draws the third panel of the picture.
    """

    def column(some: Sequence[Mapping], key: str, digits: int) -> str:
        values = [result[key] for result in some if result.get(key) is not None]
        return f"{np.mean(values):,.{digits}f}" if values else "-"

    key, digits = metric.key, metric.digits
    trained = {name: some for name, some in runs.items() if any(r["history"] for r in some)}
    values = {n: [r[key] for r in some if r[key] is not None] for n, some in runs.items()}
    values = {name: some for name, some in values.items() if some}
    columns = {**(columns or {}), "seconds": ("seconds", 1)}
    rows = []
    for name, some in runs.items():
        test = mean_spread(values[name], digits) if name in values else "n/a"
        if 0 < len(values.get(name, ())) < len(some):
            test += f" ({len(values[name])} of {len(some)} seeds)"
        val = mean_spread([_best_epoch(r)[key] for r in some if r["history"]], digits) if name in trained else "-"
        rows.append((name, test, val, *(column(some, *one) for one in columns.values()), some[-1]["reason"]))
    several = len(some) > 1
    heading = f"{title}: {metric.name}, " + (f"mean ± sd, {len(some)} seeds" if several else "one seed")
    headings = [f"{part} {metric.unit}".strip() for part in ("test", "validation")]
    justify = {"strategy": "left", **dict.fromkeys([*headings, *columns], "right")}
    stop = {"why it stopped" + (" (last seed)" if several else ""): "left"}
    table = plain_table(heading, justify | stop, rows)
    if console.measure(table, options=console.options.update(width=1000)).maximum > console.width:
        table = plain_table(heading, justify, [row[:-1] for row in rows])  # each run has left its reason above
    console.print(table)

    if classes:
        best = best_strategy(runs)
        targets, predictions = ([v for r in runs[best] for v in r[name]] for name in ("targets", "predictions"))
        heading = f"{best}, the best in validation: test {unit}" + (" of all seeds" if several else "")
        console.print(class_table(heading, targets, predictions, classes, unit))
        if panel is None:

            def panel(axes: Axes) -> None:
                draw_confusion(axes, targets, predictions, classes)
                axes.set_title(f"Confusion on the test {unit}: {best}")

    for table in tables:
        console.print(table)
    if pairs is None:
        pairs = [(name, "scratch") for name in trained if name != "scratch"] + [("discriminative", "full")]
    pairs = [pair for pair in pairs if all(len(values.get(name, ())) == len(some) for name in pair)]
    for a, b in pairs:
        console.print(paired_difference(a, values[a], b, values[b], metric))
    for more in also:
        for a, b in pairs:
            first, second = ([result[more.key] for result in runs[name]] for name in (a, b))
            console.print(f"{more.name}: {paired_difference(a, first, b, second, more)}")
    if several:
        settled = f"A difference smaller than its ± is not settled by {len(some)} seeds; each seed draws its own"
        console.print(f"{settled} {drawn}.", soft_wrap=True)
    for note in notes:
        console.print(note, soft_wrap=True)
    curves = {name: [[epoch[key] for epoch in r["history"]] for r in some] for name, some in trained.items()}
    picture = folder / "card.png"
    save_picture(picture, title, curves, values, metric, panel)
    for line in (f"logs:     {folder}", f"picture:  {picture}", f"board:    uv run tensorboard --logdir {folder}"):
        console.print(line, soft_wrap=True)


def one_run(name: str, result: Mapping, metric: Metric = ACCURACY) -> str:
    """Return the line that a finished run leaves: name, test figure, seconds, and why it stopped."""
    value, blank = result[metric.key], " " * (len(metric.unit) + bool(metric.unit))
    test = f"{'n/a':<5}{blank}" if value is None else f"{value:5.{metric.digits}f} {metric.unit}".rstrip()
    return f"{name:<15} test {test}  {result['seconds']:6.1f} s  {result['reason']}"


def print_comparison(
    console: Console, seconds: Mapping[str, Sequence[float]], accuracy: Mapping[str, Sequence[Mapping[str, float]]]
) -> None:
    """Print two sets of layers side by side: accuracy in percent, and seconds of the processor.

    Runs of one seed followed each other and did the same work, so times are compared seed by seed.

    Args:
        console: Where to print.
        seconds: Seconds of the processor for each seed, by set; the second set is judged by the first.
        accuracy: Accuracy by strategy of each seed, by set.
    """
    (first, old), (second, new) = accuracy.items()
    seeds = f"{len(new)} seed" + ("s" if len(new) > 1 else "")
    rows = []
    for name in old[0]:
        a, b = ([seed[name] for seed in some] for some in (old, new))
        gaps = np.subtract(b, a)
        rows.append((name, mean_spread(a), mean_spread(b), f"{gaps.mean():+.2f}", f"{np.abs(gaps).max():.2f}"))
    headings = (f"{first} %", f"{second} %", "difference, points", "largest of one seed")
    columns = {"strategy": "left", **dict.fromkeys(headings, "right")}
    console.print(plain_table(f"{second} beside {first}: test accuracy, {seeds}", columns, rows))
    gap = np.mean([b[n] - a[n] for a, b in zip(old, new, strict=True) for n in a])
    ratios = np.divide(seconds[second], seconds[first])
    console.print(f"accuracy: {second} - {first} = {gap:+.2f} points on average (wanted: within 0.5)")
    console.print(
        f"time:     {second} / {first} = {np.median(ratios):.3f}, median of {seeds} "
        f"({', '.join(f'{ratio:.2f}' for ratio in sorted(ratios))}; wanted: at most 1.1)"
    )
