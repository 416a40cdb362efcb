import math

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from bptools.finetune import Rule, area, bootstrap, fit_rule, measures, print_screening, screening_figures
from bptools.finetune.evaluation import Evaluation
from bptools.finetune.screening import MEASURES, calibration_error, fit_temperature, fit_threshold


def sample(count=400, seed=0, scale=1.0):
    """Log-odds that are calibrated at a temperature of ``scale``, and labels drawn of them."""
    generator = np.random.default_rng(seed)
    log_odds = generator.normal(-1, 2, count)
    targets = (generator.random(count) < 1 / (1 + np.exp(-log_odds))).astype(int)
    return targets.tolist(), (scale * log_odds).tolist()


def evaluation(count=400, seed=0, scale=1.0):
    targets, log_odds = sample(count, seed, scale)
    return Evaluation(0.0, 0.0, targets, [int(z > 0) for z in log_odds], [0.5] * count, log_odds)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_what_is_too_sure(scale):
    targets, log_odds = sample(5000, scale=scale)
    temperature = fit_temperature(targets, log_odds)
    assert temperature == pytest.approx(scale, rel=0.1)
    figures = measures(targets, log_odds, Rule(0.0, temperature))
    if scale != 1.0:
        assert figures["calibration_error_scaled"] < figures["calibration_error"] / 2
        assert figures["brier_scaled"] < figures["brier"]


def test_perfect_separation_keeps_a_finite_temperature():
    assert 0.04 < fit_temperature([0, 0, 1, 1], [-2.0, -1.0, 1.0, 2.0]) < 0.2


def test_the_threshold_is_between_two_scores():
    targets, log_odds = [0, 0, 1, 0, 1, 1], [-3.0, -2.0, -1.0, 1.0, 2.0, 3.0]
    assert fit_threshold(targets, log_odds, 1.0) == -1.5
    assert fit_threshold(targets, log_odds, 0.6) == 1.5
    assert fit_threshold([0, 0, 0, 1, 0, 1, 1], [-4.0, *log_odds]) == -1.5  # all found, 1 of 4 false
    assert fit_threshold([1, 0], [-1.0, 1.0], 0.95) == -1.0
    reached = [z for z, t in zip(log_odds, targets, strict=True) if t]
    assert sum(z >= fit_threshold(targets, log_odds, 0.95) for z in reached) / 3 >= 0.95


def test_measures_by_hand():
    targets, log_odds = [1, 1, 1, 0, 0, 0, 0, 0], [2.0, 1.0, -1.0, 1.5, -0.5, -1.0, -2.0, -3.0]
    figures = measures(targets, log_odds, Rule(0.5, 2.0))
    assert set(figures) == set(MEASURES)
    assert figures["sensitivity"] == pytest.approx(100 * 2 / 3)
    assert figures["specificity"] == pytest.approx(100 * 4 / 5)
    assert figures["ppv"] == pytest.approx(100 * 2 / 3)
    assert figures["npv"] == pytest.approx(100 * 4 / 5)
    assert figures["auc"] == pytest.approx((5 + 4 + 2.5) / 15)
    scaled = 1 / (1 + np.exp(-np.array(log_odds) / 2))
    assert figures["brier_scaled"] == pytest.approx(np.mean((scaled - targets) ** 2))
    assert math.isnan(measures(targets, log_odds, Rule(9.0, 1.0))["ppv"])


def test_calibration_error_by_hand():
    assert calibration_error([0, 1, 1, 1], [0.1, 0.12, 0.95, 1.0]) == pytest.approx((0.78 + 0.05) / 4)
    assert calibration_error([0, 1], [0.0, 1.0]) == 0


def test_intervals_hold_the_value_and_repeat():
    targets, log_odds = sample(200)
    rule = Rule(0.0, 1.0)
    whole, ends = measures(targets, log_odds, rule), bootstrap(targets, log_odds, rule, draws=40, seed=1)
    for name in ("sensitivity", "specificity", "ppv", "npv", "auc", "average_precision", "brier"):
        low, high = ends[name]
        assert low < whole[name] < high
    assert ends == bootstrap(targets, log_odds, rule, draws=40, seed=1)
    assert ends != bootstrap(targets, log_odds, rule, draws=40, seed=2)
    rare = bootstrap([1, 0, 0, 0], [1.0, 0.0, -1.0, -2.0], rule, draws=20)  # many draws are without the one
    assert rare["auc"] == (1.0, 1.0)


def test_test_data_do_not_move_the_rule():
    val = evaluation(seed=1)
    rule = fit_rule(val, 0.9)
    found = [z >= rule.threshold for z, t in zip(val.log_odds, val.targets, strict=True) if t]
    assert np.mean(found) >= 0.9
    assert rule.temperature == fit_temperature(val.targets, val.log_odds)
    assert 0.5 < area(val) < 1


def test_the_report(tmp_path):
    def run(seed, loss):
        test, rule = evaluation(seed=seed), Rule(0.1, 1.2)
        figures = test._asdict() | vars(rule) | measures(test.targets, test.log_odds, rule)
        return figures | {"history": [{"loss": loss}]}

    runs = {"scratch": [run(0, 0.5), run(1, 0.5)], "full": [run(2, 0.4), run(3, 0.3)]}
    console = Console(width=110, record=True, highlight=False)
    print_screening(console, tmp_path, "title", runs, ("well", "ill"), 0.95, draws=10)
    text = console.export_text()
    assert "full: test, to find 'ill'" in text
    assert all(name in text for name, _ in MEASURES.values())
    assert "chosen to find 95 % there" in text
    with Image.open(tmp_path / "screening.png") as picture:
        assert picture.width > 1000


def test_figures():
    figures = screening_figures(evaluation(), Rule(0.0, 1.0))
    roc, reliability = (figures[name].axes[0] for name in ("ROC curve", "reliability"))
    assert "AUC 0." in roc.get_legend().get_texts()[0].get_text()
    assert reliability.get_legend().get_title().get_text() == "temperature 1.00"
