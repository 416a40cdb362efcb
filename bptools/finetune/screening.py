"""Two classes, one of them the one to find: the report that a test of medicine gets.

Threshold and temperature come from validation data, and nothing from the test's: what is printed of the test is
what the rule, fixed before, comes to there. Measures are scikit-learn's.

Sources: Guo et al., arXiv 1706.04599 (temperature scaling, calibration error); Efron, Ann. Statist. 7 (1979)
(bootstrap); Youden, Cancer 3 (1950).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from bptools._console import plain_table

from .card import COLOURS, Metric, best_strategy, mean_spread
from .evaluation import Evaluation

AUC = Metric("auc", "AUC", "", 3, top=None)


class Measure(NamedTuple):
    """How a measure is printed: its name, and digits after the point."""

    name: str
    digits: int


MEASURES = {
    "sensitivity": Measure("sensitivity %", 1),
    "specificity": Measure("specificity %", 1),
    "ppv": Measure("positive predictive value %", 1),
    "npv": Measure("negative predictive value %", 1),
    "auc": Measure("AUC", 3),
    "average_precision": Measure("average precision", 3),
    "brier": Measure("Brier score", 4),
    "brier_scaled": Measure("Brier score, scaled by temperature", 4),
    "calibration_error": Measure("expected calibration error", 4),
    "calibration_error_scaled": Measure("expected calibration error, scaled", 4),
}


@dataclass(frozen=True)
class Rule:
    """What validation data have fixed before the test.

    Attributes:
        threshold: Log-odds from which on a sample is called positive.
        temperature: What log-odds are divided by for their sigmoid to be a probability.
    """

    threshold: float
    temperature: float

    def probability(self, log_odds: Sequence[float]) -> np.ndarray:
        """Return scaled probabilities of the positive class."""
        return _sigmoid(np.asarray(log_odds) / self.temperature)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return expit(np.asarray(x, dtype=float))


def fit_temperature(targets: Sequence[int], log_odds: Sequence[float]) -> float:
    """Return the temperature, 0.05 to 20, with the lowest cross-entropy.

    Args:
        targets: 0 or 1.
        log_odds: Of 1 against 0.
    """
    from scipy.optimize import minimize_scalar

    signed = np.where(targets, 1, -1) * np.asarray(log_odds)

    def loss(log_temperature: float) -> float:
        return np.logaddexp(0, -signed / np.exp(log_temperature)).mean()

    return float(np.exp(minimize_scalar(loss, bounds=np.log((0.05, 20)), method="bounded").x))


def fit_threshold(targets: Sequence[int], log_odds: Sequence[float], sensitivity: float = 0.0) -> float:
    """Return the threshold halfway between the lowest log-odds that are to be positive and the next below.

    Args:
        targets: 0 or 1, some of each.
        log_odds: Of 1 against 0.
        sensitivity: The threshold is the highest at which the share of the positive found is at least this; 0 for
            the one with the largest sum of sensitivity and specificity (Youden's).
    """
    from sklearn.metrics import roc_curve

    false, true, thresholds = roc_curve(targets, log_odds, drop_intermediate=False)
    place = int(np.argmax(true >= sensitivity)) if sensitivity else int(np.argmax(true - false))
    place = max(place, 1)  # the first threshold calls nothing positive
    below = thresholds[place + 1] if place + 1 < len(thresholds) else thresholds[place]
    return float((thresholds[place] + below) / 2)


def fit_rule(val: Evaluation, sensitivity: float = 0.0) -> Rule:
    """Return threshold and temperature from validation data; see :func:`fit_threshold`."""
    threshold = fit_threshold(val.targets, val.log_odds, sensitivity)
    return Rule(threshold, fit_temperature(val.targets, val.log_odds))


def calibration_error(targets: Sequence[int], probabilities: Sequence[float], bins: int = 10) -> float:
    """Return the mean distance of share and mean probability of the positive, over bins of equal width.

    Bins count by the samples that they have.
    """
    probabilities = np.asarray(probabilities, dtype=float)
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    gaps = np.bincount(place, probabilities, bins) - np.bincount(place, targets, bins)
    return float(np.abs(gaps).sum() / len(place))


def area(result: Evaluation) -> float:
    """Return the area under the ROC curve, 0 to 1."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(result.targets, result.log_odds))


def measures(targets: Sequence[int], log_odds: Sequence[float], rule: Rule) -> dict[str, float]:
    """Return the figures of :data:`MEASURES`; a predictive value is NaN where nothing is predicted so.

    Args:
        targets: 0 or 1, some of each.
        log_odds: Of 1 against 0.
        rule: Fixed before.
    """
    from sklearn.metrics import average_precision_score, brier_score_loss, confusion_matrix, roc_auc_score

    targets, log_odds = np.asarray(targets), np.asarray(log_odds, dtype=float)
    table = confusion_matrix(targets, log_odds >= rule.threshold, labels=[0, 1])
    raw, scaled = _sigmoid(log_odds), rule.probability(log_odds)
    with np.errstate(invalid="ignore"):
        found, right = 100 * np.diag(table) / table.sum(1), 100 * np.diag(table) / table.sum(0)
    return {
        "sensitivity": float(found[1]),
        "specificity": float(found[0]),
        "ppv": float(right[1]),
        "npv": float(right[0]),
        "auc": float(roc_auc_score(targets, log_odds)),
        "average_precision": float(average_precision_score(targets, log_odds)),
        "brier": float(brier_score_loss(targets, raw)),
        "brier_scaled": float(brier_score_loss(targets, scaled)),
        "calibration_error": calibration_error(targets, raw),
        "calibration_error_scaled": calibration_error(targets, scaled),
    }


def bootstrap(
    targets: Sequence[int], log_odds: Sequence[float], rule: Rule, *, draws: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return 95 % intervals of :func:`measures`, from test samples drawn again with replacement.

    They say how much another test set of this size might differ; the model and its rule are the same in each draw.

    Args:
        targets: 0 or 1, some of each.
        log_odds: Of 1 against 0.
        rule: Fixed before.
        draws: How many; those without both classes are drawn again.
        seed: Draws them.
    """
    import sklearn

    targets, log_odds = np.asarray(targets), np.asarray(log_odds, dtype=float)
    generator, seen = np.random.default_rng(seed), []
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        while len(seen) < draws:
            index = generator.integers(len(targets), size=len(targets))
            if 0 < targets[index].sum() < len(targets):
                seen.append(measures(targets[index], log_odds[index], rule))
    columns = {name: np.array([one[name] for one in seen]) for name in MEASURES}
    known = {name: values[~np.isnan(values)] for name, values in columns.items()}
    ends = {name: np.quantile(v, (0.025, 0.975)) if len(v) else (np.nan,) * 2 for name, v in known.items()}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def screening_table(title: str, results: Sequence[Mapping], intervals: Mapping[str, tuple[float, float]]) -> Table:
    """Return the table of all measures: mean and spread over runs, and the intervals of the first one.

    Args:
        title: Above it.
        results: Each with the keys of :data:`MEASURES`.
        intervals: What :func:`bootstrap` returned.
    """
    several = len(results) > 1
    value = "mean ± sd over seeds" if several else "value"
    interval = "95 % interval over test images" + (" (first seed)" if several else "")
    rows = []
    for key, (name, digits) in MEASURES.items():
        low, high = intervals[key]
        spread = mean_spread([result[key] for result in results], digits)
        rows.append((name, spread, f"{low:.{digits}f} to {high:.{digits}f}"))
    return plain_table(title, {"measure": "left", value: "right", interval: "right"}, rows)


def draw_roc(axes: Axes, targets: Sequence[int], log_odds: Sequence[float], rule: Rule) -> None:
    """Draw the ROC curve, and the point on it where the rule's threshold is."""
    from sklearn.metrics import roc_auc_score, roc_curve

    false, true, _ = roc_curve(targets, log_odds)
    figures = measures(targets, log_odds, rule)
    axes.plot([0, 100], [0, 100], color="silver", lw=1)
    label = f"AUC {roc_auc_score(targets, log_odds):.3f}"
    axes.plot(100 * false, 100 * true, color=COLOURS[0], lw=2, label=label, drawstyle="steps-post")
    at = 100 - figures["specificity"], figures["sensitivity"]
    axes.plot(
        *at, "o", color=COLOURS[1], label=f"threshold of validation: {at[1]:.0f} % found, {at[0]:.0f} % false"
    )
    axes.set(xlabel="100 - specificity (%)", ylabel="sensitivity (%)", xlim=(-2, 102), ylim=(-2, 102))
    axes.legend(loc="lower right", frameon=False)
    axes.grid(alpha=0.25)


def draw_reliability(axes: Axes, targets: Sequence[int], log_odds: Sequence[float], rule: Rule) -> None:
    """Draw the share of positive samples over their mean probability, before and after temperature scaling.

    The area of a dot grows with the root of the number of its samples.
    """
    from sklearn.calibration import calibration_curve

    axes.plot([0, 1], [0, 1], color="silver", lw=1)
    raw = _sigmoid(log_odds)
    for name, some, colour in (("as it is", raw, COLOURS[1]), ("scaled", rule.probability(log_odds), COLOURS[0])):
        share, mean = calibration_curve(targets, some, n_bins=10)
        counts = np.histogram(some, 10, (0, 1))[0]
        error = calibration_error(targets, some)
        axes.plot(mean, share, color=colour, lw=1, label=f"{name}: calibration error {error:.3f}")
        axes.scatter(mean, share, 8 * np.sqrt(counts[counts > 0]), color=colour, alpha=0.6)
    axes.set(
        xlabel="predicted probability", ylabel="share that is positive", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02)
    )
    axes.legend(loc="lower right", frameon=False, title=f"temperature {rule.temperature:.2f}")
    axes.grid(alpha=0.25)


def _figure(*draw: Callable[[Axes], None], title: str = "") -> Figure:
    figure = Figure(figsize=(5.5 * len(draw), 5), layout="constrained")
    for axes, one in zip(figure.subplots(1, len(draw), squeeze=False).flat, draw, strict=True):
        one(axes)
    if title:
        figure.suptitle(title, fontweight="bold")
    return figure


def screening_figures(test: Evaluation, rule: Rule) -> dict[str, Figure]:
    """Return the pictures of a test of two classes, for TensorBoard."""
    args = test.targets, test.log_odds, rule
    return {
        "ROC curve": _figure(lambda axes: draw_roc(axes, *args)),
        "reliability": _figure(lambda axes: draw_reliability(axes, *args)),
    }


def save_screening(path: Path, title: str, targets: Sequence[int], log_odds: Sequence[float], rule: Rule) -> None:
    """Save ROC curve and reliability diagram side by side as a PNG file."""
    args = targets, log_odds, rule
    figure = _figure(lambda axes: draw_roc(axes, *args), lambda axes: draw_reliability(axes, *args), title=title)
    figure.savefig(path, dpi=110)


def roc_panel(runs: Mapping[str, Sequence[Mapping]]) -> Callable[[Axes], None]:
    """Return what draws the ROC curve of the best strategy's first seed, as a panel of the card's picture."""
    best = best_strategy(runs)
    first = runs[best][0]

    def draw(axes: Axes) -> None:
        draw_roc(axes, first["targets"], first["log_odds"], Rule(first["threshold"], first["temperature"]))
        axes.set_title(f"ROC on the test images: {best}" + (", first seed" if len(runs[best]) > 1 else ""))

    return draw


def print_screening(
    console: Console,
    folder: Path,
    title: str,
    runs: Mapping[str, Sequence[Mapping]],
    classes: Sequence[str],
    sensitivity: float = 0.0,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> None:
    """Print the report of the strategy with the lowest validation loss, and save its pictures, ``screening.png``.

    Args:
        console: Where to print.
        folder: Of the job.
        title: Of the picture.
        runs: Results by strategy, one for each seed, with the fields of :class:`Evaluation` on the test data, of
            :class:`Rule`, and of :func:`measures`.
        classes: Names of the two, the positive one last.
        sensitivity: What the threshold was chosen by; see :func:`fit_threshold`.
        draws: Of the bootstrap.
        seed: Of the bootstrap.
    """
    best = best_strategy(runs)
    first = runs[best][0]
    rule, args = Rule(first["threshold"], first["temperature"]), (first["targets"], first["log_odds"])
    intervals = bootstrap(*args, rule, draws=draws, seed=seed)
    console.print(screening_table(f"{best}: test, to find {classes[1]!r}", runs[best], intervals))
    wanted = f"to find {100 * sensitivity:g} % there" if sensitivity else "by Youden's index"
    positive, count = sum(first["targets"]), len(first["targets"])
    for line in (
        f"threshold and temperature are of the validation images; the threshold is chosen {wanted}.",
        f"{positive} of {count} are positive; chance: AUC 0.5, average precision {positive / count:.3f}.",
        f"picture:  {folder / 'screening.png'}",
    ):
        console.print(line, soft_wrap=True)
    save_screening(folder / "screening.png", f"{title}; {best}, the first seed", *args, rule)
