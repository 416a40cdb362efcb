"""The detection matrix: ours catches every defect of the zoo, and has nothing to say about the twins."""

import re
from pathlib import Path

import pytest
import torch

from bptools.check import check_function, matrix
from bptools.check._check import load_checks
from bptools.check.matrix import ALARM, CAUGHT, MISSED, NAMES, REFUSED, Row
from bptools.check.zoo import ZOO, by_number

PAGE = Path(__file__).parents[2] / "DETECTION.md"
VISIBLE = [d for d in ZOO if d.visible == "cpu"]
OURS = ("ours", "ours, ref.")


def named(defect):
    return f"{defect.number:02}-{defect.name}"


def checks_for(defect):
    return [name for name, check in load_checks().items() if defect.number in check.finds]


def test_every_defect_has_a_check_that_is_there_for_it():
    assert [d.number for d in ZOO if not checks_for(d)] == []


@pytest.mark.parametrize("defect", VISIBLE, ids=named)
def test_the_checks_that_are_there_for_a_defect_find_it_and_spare_its_twin(defect):
    broken, correct = (
        check_function(function, defect.samples, checks=checks_for(defect))
        for function in (defect.broken, defect.correct)
    )
    assert broken.failures, broken
    assert not correct.failures, correct
    assert correct.verdict("runs") == "pass"  # of 17, the twin has nothing else that could be asked


def test_what_only_a_gpu_can_show_is_skipped_on_a_cpu():
    (defect,) = (d for d in ZOO if d.visible != "cpu")
    report = check_function(defect.broken, defect.samples, checks=checks_for(defect))
    assert {r.verdict for r in report.results if r.check != "runs"} == {"skipped"}
    assert not report.ok


# The whole of it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "defect",
    [
        # Others look at each element of a large tensor there: minutes.
        pytest.param(d, marks=pytest.mark.release if d.number == 34 else pytest.mark.slow)
        for d in ZOO
    ],
    ids=named,
)
def test_ours_catches_it_with_and_without_a_reference_and_raises_no_alarm(defect):
    row = matrix.row(defect)
    assert row.alarms == ()
    for checker in OURS:
        assert row.cell(checker) == (CAUGHT if defect.visible == "cpu" else MISSED)
    if PAGE.exists():
        # The last column, which checks found it, may differ where the defect itself is a matter of chance.
        told, seen = (
            next(line for line in page.splitlines() if line.startswith(f"| {defect.number} |")).split(" | ")[:-1]
            for page in (PAGE.read_text(encoding="utf-8"), matrix.markdown([row]))
        )
        assert told == seen


@pytest.mark.skipif(not PAGE.exists(), reason="DETECTION.md is not there")
def test_the_page_says_that_ours_catches_all():
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if re.match(r"\| \d+ \|", line)
    ]
    assert [int(row[0]) for row in rows] == [d.number for d in ZOO]
    head = ["", "defect", *NAMES, "found by"]
    for row, defect in zip(rows, ZOO, strict=True):
        assert row[1].startswith(defect.title)
        for checker in OURS:
            assert row[head.index(checker)] == (CAUGHT if defect.visible == "cpu" else MISSED), defect


@pytest.mark.skipif(not PAGE.exists(), reason="DETECTION.md is not there")
def test_the_readme_shows_the_pages_summary():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| defects of"))
    summary = lines[first : lines.index("", first)]
    assert len(summary) == 9
    assert "\n".join(summary) in (PAGE.parent / "README.md").read_text(encoding="utf-8")


# Its parts ----------------------------------------------------------------------------------------------------


def made_up(number, broken=MISSED, correct=MISSED, **changes):
    row = Row(by_number(number), dict.fromkeys(NAMES, broken), dict.fromkeys(NAMES, correct))
    for name, said in changes.items():
        row.broken[name] = said
    return row


def test_a_cell_says_what_was_found_and_whether_it_cries_wolf():
    row = made_up(13, CAUGHT)
    row.correct["opcheck"] = CAUGHT
    assert row.cell("gradcheck") == CAUGHT
    assert row.cell("opcheck") == f"{CAUGHT}, {ALARM}"


def test_totals_count_what_a_cpu_can_show_and_no_objection_that_is_an_alarm_too():
    rows = [
        made_up(13, CAUGHT),
        made_up(12, gradcheck=CAUGHT),
        made_up(36, CAUGHT, CAUGHT),
        made_up(41, REFUSED),
        made_up(44, gradcheck=CAUGHT),
    ]
    counted = matrix.totals(rows)
    assert counted["gradcheck"] == (2, 4, 1)
    assert counted["ours"] == (1, 4, 1)


def test_the_page():
    row = made_up(13, CAUGHT)
    row.found_by = ("gradients", "linearity", "kinks", "dtypes", "masks")
    page = matrix.markdown([row, made_up(44)])
    lines = page.splitlines()
    table = [line for line in lines if line.startswith("|")]
    counts = [line.count("|") for line in table]
    # by family: head, rule, two families, all, false alarms; then head, rule and the two defects
    assert counts == [len(NAMES) + 2] * 6 + [len(NAMES) + 4] * 4
    assert f"| 13 | {by_number(13).title} | caught |" in page
    assert "| gradients, linearity, kinks and 2 more |" in page
    assert f"| 44 | {by_number(44).title} (needs a GPU) | - |" in page
    assert "| contract | 1 of 1 |" in page
    assert "| composition | 0 of 0 |" in page
    assert "| **all** | 1 of 1 |" in page
    assert "| false alarms on 2 correct twins | 0 |" in page
    assert f"torch {torch.__version__.split('+')[0]}" in page
    assert matrix.LEGEND in page


def test_chosen_rows_with_word_of_progress(monkeypatch):
    monkeypatch.setattr(matrix, "row", lambda defect: made_up(defect.number))
    said = []
    rows = matrix.matrix([36, 13], said.append)
    assert [r.defect.number for r in rows] == [13, 36]
    assert said == [f"13 {by_number(13).name}", f"36 {by_number(36).name}"]
    assert len(matrix.matrix()) == len(ZOO)


@pytest.mark.parametrize(
    ("number", "checker", "broken", "correct"),
    [
        (13, "gradcheck", CAUGHT, MISSED),
        (14, "gradcheck", MISSED, MISSED),
        (24, "gradgradcheck", CAUGHT, MISSED),
        (13, "opcheck", REFUSED, REFUSED),
        (13, "ours", CAUGHT, MISSED),
    ],
)
def test_one_checker_on_one_defect(number, checker, broken, correct, monkeypatch):
    given = matrix.check_function
    monkeypatch.setattr(
        matrix, "check_function", lambda *args, **options: given(*args, **{**options, "checks": "gradients"})
    )
    row = matrix.row(by_number(number), [checker])
    assert (row.broken, row.correct) == ({checker: broken}, {checker: correct})
    assert row.found_by == (("gradients",) if checker == "ours" else ())


def test_the_truth_is_given_to_ours_only_in_its_own_column(monkeypatch):
    asked = []

    def spy(function, samples, reference, checks):
        asked.append((function, reference, checks))
        return check_function(function, samples, reference=reference, checks="linearity")

    monkeypatch.setattr(matrix, "check_function", spy)
    defect = by_number(13)
    matrix.row(defect, OURS)
    assert asked == [
        (defect.broken, None, "all"),
        (defect.correct, None, "all"),
        (defect.broken, defect.reference, "all"),
        (defect.correct, defect.reference, "all"),
    ]
