"""The end card: tables for the terminal and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

# Okabe and Ito's palette, which holds up under colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def mean_spread(values: Sequence[float]) -> str:
    """Return ``"94.7 ± 1.2"``: mean and sample standard deviation, or the mean alone for one value."""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def paired_difference(name: str, values: Sequence[float], other: str, others: Sequence[float]) -> str:
    """Return in words by how much ``values`` exceed ``others``, seed by seed, in percentage points."""
    gaps = np.subtract(values, others)
    spread = f" ± {np.std(gaps, ddof=1):.1f}" if len(gaps) > 1 else ""
    ahead = f", ahead on {(gaps > 0).sum()} of {len(gaps)} seeds" if len(gaps) > 1 else ", one seed only"
    return f"{name} - {other}: {np.mean(gaps):+.1f}{spread} points{ahead}"


def plain_table(title: str, columns: Mapping[str, str], rows: Sequence[Sequence[object]]) -> Table:
    """Return a table without vertical lines; ``columns`` maps each heading to its justification."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for heading, justify in columns.items():
        table.add_column(heading, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    return table


def class_table(title: str, targets: Sequence[int], predictions: Sequence[int], classes: Sequence[str]) -> Table:
    """Return precision, recall and F1 in percent, and the number of images, for each class."""
    scores = precision_recall_fscore_support(targets, predictions, labels=range(len(classes)), zero_division=0.0)
    rows = [
        (name, *(f"{100 * score[i]:.1f}" for score in scores[:3]), scores[3][i]) for i, name in enumerate(classes)
    ]
    columns = {"class": "left", "precision %": "right", "recall %": "right", "F1 %": "right", "images": "right"}
    return plain_table(title, columns, rows)


def draw_confusion(axes: Axes, targets: Sequence[int], predictions: Sequence[int], classes: Sequence[str]) -> None:
    """Draw the confusion matrix in percent of each true class, with numbers where they fit."""
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


def save_picture(
    path: Path,
    title: str,
    curves: Mapping[str, Sequence[Sequence[float]]],
    accuracies: Mapping[str, Sequence[float]],
    confusion: tuple[str, Sequence[int], Sequence[int], Sequence[str]],
) -> None:
    """Save the picture: validation curves, test accuracy of each seed, confusion matrix.

    Args:
        path: The PNG file.
        title: Above the picture.
        curves: Validation accuracy in percent by strategy, seed and epoch.
        accuracies: Test accuracy in percent by strategy and seed.
        confusion: Strategy, true labels, predictions and class names of the matrix.
    """
    colour = dict(zip(accuracies, COLOURS * len(accuracies), strict=False))
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure = Figure(figsize=(16, 5), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 0.85, 1.05))
        several = any(len(runs) > 1 for runs in curves.values())
        for name, runs in curves.items():
            epochs = np.arange(1, max(map(len, runs)) + 1)
            padded = np.full((len(runs), len(epochs)), np.nan)
            for row, run in zip(padded, runs, strict=True):
                row[: len(run)] = run
                row[len(run) :] = run[-1]  # a run that stopped early stays where it stopped
            mean = padded.mean(0)
            left.plot(epochs, mean, color=colour[name], label=name, lw=2, marker="o" if len(epochs) == 1 else "")
            if len(runs) > 1:
                spread = padded.std(0, ddof=1)
                left.fill_between(epochs, mean - spread, mean + spread, color=colour[name], alpha=0.12, lw=0)
        left.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(0, 102))
        left.set_title("Validation accuracy" + (", mean ± sd over seeds" if several else ""))
        left.grid(alpha=0.25)
        left.legend(loc="lower right", frameon=False)
        for place, (name, values) in enumerate(accuracies.items()):
            middle.scatter(
                place + np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else [place], values,
                color=colour[name], s=28, zorder=3,
            )  # fmt: skip
            middle.hlines(np.mean(values), place - 0.32, place + 0.32, color=colour[name], lw=2)
            middle.annotate(
                f"{np.mean(values):.1f}", (place, max(values)), (0, 7), textcoords="offset points", ha="center"
            )
        middle.set_xticks(range(len(accuracies)), list(accuracies), rotation=25, ha="right")
        middle.set(ylabel="test accuracy (%)", ylim=(0, 108), title="Test accuracy: seeds (dots) and mean (line)")
        middle.grid(axis="y", alpha=0.25)
        name, targets, predictions, classes = confusion
        draw_confusion(right, targets, predictions, classes)
        right.set_title(f"Confusion on the test images: {name}")
        figure.suptitle(title, fontweight="bold")
        figure.savefig(path, dpi=110)


def print_card(
    console: Console,
    folder: Path,
    title: str,
    runs: Mapping[str, Sequence[Mapping]],
    classes: Sequence[str],
    notes: Sequence[str] = (),
) -> None:
    """Print what a job came to, and save the picture of it as ``card.png`` in ``folder``.

    Args:
        console: Where to print.
        folder: Folder of the job.
        title: What was done, in a few words.
        runs: Results by strategy, one for each seed: ``accuracy`` on the test images in percent (``None`` if
            not measured), ``targets``, ``predictions``, ``seconds``, ``reason``, and ``history``, which is
            empty if nothing was trained, or has the ``loss`` and ``accuracy`` of each epoch's validation.
        classes: Class names by label.
        notes: Lines to print below the tables.
    """

    def best_epoch(result: Mapping) -> Mapping:
        return min(result["history"], key=lambda epoch: epoch["loss"])

    trained = {name: some for name, some in runs.items() if some[0]["history"]}
    accuracies = {n: [r["accuracy"] for r in some] for n, some in runs.items() if some[0]["accuracy"] is not None}
    rows = []
    for name, some in runs.items():
        test = mean_spread(accuracies[name]) if name in accuracies else "n/a"
        val = mean_spread([best_epoch(r)["accuracy"] for r in some]) if name in trained else "-"
        rows.append((name, test, val, f"{np.mean([r['seconds'] for r in some]):.1f}", some[-1]["reason"]))
    several = len(some) > 1
    seeds = f"mean ± sd, {len(some)} seeds" if several else "one seed"
    right = {"test %": "right", "validation %": "right", "seconds": "right"}
    stop = "why it stopped" + (" (last seed)" if several else "")
    console.print(plain_table(f"{title}: accuracy, {seeds}", {"strategy": "left", **right, stop: "left"}, rows))

    best = min(trained, key=lambda name: sum(best_epoch(r)["loss"] for r in trained[name]))
    targets, predictions = ([v for r in runs[best] for v in r[key]] for key in ("targets", "predictions"))
    heading = f"{best}, the lowest validation loss: test images" + (" of all seeds" if several else "")
    console.print(class_table(heading, targets, predictions, classes))

    pairs = [(name, "scratch") for name in trained if name != "scratch"] + [("discriminative", "full")]
    for name, other in pairs:
        if name in trained and other in trained:
            console.print(paired_difference(name, accuracies[name], other, accuracies[other]))
    if several:
        settled = f"A difference smaller than its ± is not settled by {len(some)} seeds; each seed draws its own"
        console.print(f"{settled} images, weights and order.", soft_wrap=True)
    for note in notes:
        console.print(note, soft_wrap=True)
    curves = {
        name: [[epoch["accuracy"] for epoch in r["history"]] for r in some] for name, some in trained.items()
    }
    picture = folder / "card.png"
    save_picture(picture, title, curves, accuracies, (best, targets, predictions, classes))
    for line in (f"logs:     {folder}", f"picture:  {picture}", f"board:    uv run tensorboard --logdir {folder}"):
        console.print(line, soft_wrap=True)


def one_run(name: str, result: Mapping) -> str:
    """Return the line that a finished run leaves: name, test accuracy, seconds, and why it stopped."""
    test = "n/a  " if result["accuracy"] is None else f"{result['accuracy']:5.1f} %"
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
