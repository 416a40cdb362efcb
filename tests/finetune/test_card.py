import io
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from bptools.finetune import Metric, confusion_figure, log_scale, one_run, print_card, print_comparison
from bptools.finetune.card import mean_spread, paired_difference


@pytest.fixture
def console():
    return Console(record=True, width=110, file=io.StringIO())


def result(accuracy, losses=(0.9, 0.5), seed=0):
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, 3, 30).tolist()
    predictions = [t if generator.random() < accuracy / 100 else (t + 1) % 3 for t in targets]
    history = [{"loss": loss, "accuracy": accuracy - 10 * i} for i, loss in enumerate(losses)]
    return {"accuracy": accuracy, "targets": targets, "predictions": predictions, "seconds": 1.5,
            "reason": "all 2 epochs ran", "history": history}  # fmt: skip


def test_words():
    assert mean_spread([90.0, 92.0]) == "91.0 ± 1.4"
    assert mean_spread([90.0]) == "90.0"
    assert paired_difference("a", [3.0, 5.0], "b", [1.0, 6.0]) == "a - b: +0.5 ± 2.1 points, ahead on 1 of 2 seeds"
    assert paired_difference("a", [3.0], "b", [1.0]) == "a - b: +2.0 points, one seed only"
    assert one_run("head", result(80.0)) == "head            test  80.0 %     1.5 s  all 2 epochs ran"


@pytest.mark.parametrize("seeds", [1, 3])
def test_card_and_picture(console, tmp_path, seeds):
    runs = {
        "zero-shot": [{"accuracy": None, "seconds": 0.0, "reason": "n/a, the head is new", "history": []}] * seeds,
        "scratch": [result(60.0 + i, seed=i) for i in range(seeds)],
        "full": [result(90.0 + 3 * i, losses=(0.9, 0.5, 0.1, 0.2), seed=i) for i in range(seeds)],
    }
    print_card(console, tmp_path, "a job", runs, ("a", "b", "c"), ["a note"])
    text = console.export_text()
    for words in ("zero-shot", "n/a", "the head is new", "full, the best in validation", "full - scratch: +",
                  "a note", f"{tmp_path}/card.png", "tensorboard --logdir"):  # fmt: skip
        assert words in text
    assert "± " in text if seeds > 1 else "one seed" in text
    with Image.open(tmp_path / "card.png") as image:
        assert image.size == (1760, 550)


def test_a_second_metric_is_compared_over_the_same_pairs(console, tmp_path):
    runs = {"scratch": [result(60.0), result(62.0)], "full": [result(90.0), result(95.0)]}
    for some, values in zip(runs.values(), ((0.5, 0.6), (0.4, 0.3)), strict=True):
        for one, value in zip(some, values, strict=True):
            one["error"] = value
    print_card(console, tmp_path, "a job", runs, also=(Metric("error", "error", "", 2, higher=False, top=None),))
    text = console.export_text()
    assert "\nfull - scratch: +31.5 ± 2.1 points, ahead on 2 of 2 seeds" in text
    assert "\nerror: full - scratch: -0.20 ± 0.14 error, ahead on 2 of 2 seeds" in text


def test_a_run_that_diverged_has_its_curve_and_no_test(console, tmp_path):
    lost = result(20.0) | {"accuracy": None, "reason": "diverged"}
    print_card(console, tmp_path, "a job", {"scratch": [result(60.0)], "lost": [lost]})
    assert re.search(r"^ lost +n/a ", console.export_text(), re.M)


@pytest.mark.parametrize("width", [110, 70])
def test_the_table_stays_one_line_a_strategy(width, tmp_path):
    console = Console(record=True, width=width, file=io.StringIO())
    runs = {name: [result(60.0), result(62.0)] for name in ("scratch", "discriminative")}
    print_card(console, tmp_path, "a job", runs, columns={"and": ("seconds", 1)})
    text = console.export_text()
    assert ("all 2 epochs ran" in text) == ("why it stopped" in text) == (width == 110)
    rows = text[text.rindex("─") + 1 : text.index("discriminative - ")].split("\n")
    assert [row.split()[0] for row in rows if row.strip()] == ["scratch", "discriminative"]


@pytest.mark.parametrize("values", [(0.36, 6.0), (0.002, 0.0), (5.1, 5.3), (1e-3, 1e4)])
def test_a_logarithmic_axis_has_plain_numbers(values):
    figure = Figure()
    axes = figure.subplots()
    axes.plot(values)
    log_scale(axes)
    figure.canvas.draw()
    labels = [label.get_text() for minor in (False, True) for label in axes.get_yticklabels(minor=minor)]
    some = [float(label) for label in labels if label]
    assert len(some) >= 2
    assert all(f"{value:g}" in labels for value in some)


def test_many_classes_fit(tmp_path):
    labels = list(range(60))
    figure = confusion_figure(labels, labels[::-1], [f"class number {i}" for i in labels])
    figure.savefig(tmp_path / "c.png")


def test_comparison(console):
    accuracy = {"torch": [{"full": 90.0}, {"full": 92.0}], "bptools": [{"full": 90.5}, {"full": 91.0}]}
    print_comparison(console, {"torch": [2.0, 4.0], "bptools": [3.0, 4.4]}, accuracy)
    text = console.export_text()
    assert "bptools - torch = -0.25 points" in text
    assert "bptools / torch = 1.300, median of 2 seeds (1.10, 1.50" in text


def test_comparison_of_one_seed(console):
    accuracy = {"torch": [{"full": 90.0}], "bptools": [{"full": 90.5}]}
    print_comparison(console, {"torch": [2.0], "bptools": [3.0]}, accuracy)
    text = console.export_text()
    assert "median of 1 seed (1.50" in text
    assert "1 seeds" not in text
