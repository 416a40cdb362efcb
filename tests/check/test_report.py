"""The report: what it prints, what it writes as JSON, when it is ok."""

import json
import math

import pytest
import torch

from bptools.check import Failure, Report, Result


def failure(**changes):
    given = {
        "what": "a gradient is wrong",
        "input": "x",
        "output": 0,
        "index": (1, 2),
        "expected": 1.25,
        "got": 2.5,
        "error": 1.25,
        "allowed": 1e-7,
        "guess": "a constant factor: got = 2 × expected",
        "sample": "x float64(3, 5)",
        "script": "print('reproduce')",
    }
    return Failure(**{**given, **changes})


def result(check="gradients", verdict="pass", sample="0", dtype="float64", **more):
    return Result(check, sample, dtype, verdict, **more)


def report(*results):
    return Report("Square", "Function", 3, "cpu", list(results), seconds=1.25)


def test_ok_needs_something_that_passed_and_nothing_that_failed():
    passed, skipped = result(), result("vmap", "skipped", reason="none")
    unsupported, failed = result("jvp", "unsupported", reason="no"), result("masks", "fail", failure=failure())
    assert report(passed).ok
    assert report(passed, skipped, unsupported).ok
    assert not report(passed, failed).ok
    assert not report(result("runs"), skipped).ok  # that it runs says nothing about a gradient
    assert not report(skipped).ok
    assert not report(unsupported).ok
    assert not report().ok


def test_the_verdict_of_a_check_is_its_worst_one():
    every = report(
        result("a"),
        result("a", "fail", failure=failure()),
        result("b", "skipped"),
        result("b"),
        result("c", "skipped"),
        result("c", "unsupported"),
        result("d", "skipped"),
    )
    assert [every.verdict(c) for c in "abcd"] == ["fail", "pass", "unsupported", "skipped"]
    with pytest.raises(KeyError, match="never"):
        every.verdict("never")


def test_raise_if_failed_holds_the_whole_report():
    report(result()).raise_if_failed()
    failed = report(result(), result("masks", "fail", failure=failure()))
    with pytest.raises(AssertionError) as caught:
        failed.raise_if_failed()
    assert str(caught.value) == str(failed)
    with pytest.raises(AssertionError, match="1 skipped"):
        report(result("vmap", "skipped", reason="no tensors")).raise_if_failed()


def test_the_text_puts_failures_first_with_their_case():
    text = str(
        report(
            result("values"),
            result("linearity"),
            result("gradients", "fail", failure=failure()),
            result("gradients", "fail", sample="1", failure=failure()),
            result("jvp", "unsupported", reason="it says no"),
            result("vmap", "unsupported", reason="it says no"),
            result("opcheck", "skipped", reason="it is not a custom op"),
        )
    )
    assert text.splitlines() == [
        "Square (Function, cpu, seed 3): 2 pass, 2 FAILED, 1 skipped, 2 unsupported; 1.2 s",
        "  FAIL  gradients  (sample 0, float64; also 1 float64)",
        "          a gradient is wrong",
        "          input x[1, 2]; output 0; expected 1.25, got 2.5; error 1.25e+00, allowed 1.00e-07",
        "          guess: a constant factor: got = 2 × expected",
        "          smallest sample: x float64(3, 5)",
        "  pass         values linearity",
        "  unsupported  jvp, vmap: it says no",
        "  skipped      opcheck: it is not a custom op",
    ]


def test_a_check_that_passed_somewhere_is_not_listed_as_skipped():
    text = str(report(result("dtypes"), result("dtypes", "skipped", dtype="float16", reason="none")))
    assert "  pass         dtypes" in text
    assert "\n  skipped" not in text


def test_many_names_are_wrapped():
    lines = str(report(*(result(f"a_long_name_of_a_check_{i}") for i in range(20)))).splitlines()
    assert max(map(len, lines)) <= 110
    assert "".join(lines).count("a_long_name_of_a_check_") == 20


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"output": None}, "input x[1, 2]; expected 1.25, got 2.5; error 1.25e+00, allowed 1.00e-07"),
        ({"input": None, "error": None}, "output 0[1, 2]; expected 1.25, got 2.5"),
        ({"index": ()}, "input x; output 0; expected 1.25, got 2.5; error 1.25e+00, allowed 1.00e-07"),
        (
            {"input": None, "output": None, "expected": "None", "got": "a tensor", "error": None},
            "expected None, got a tensor",
        ),
        ({"expected": 1 / 3, "output": None, "error": None}, "input x[1, 2]; expected 0.333333333, got 2.5"),
    ],
)
def test_the_line_that_says_where(changes, line):
    assert failure(**changes).lines()[1] == line


def test_a_failure_may_know_no_more_than_what():
    assert Failure("it raises").lines() == ["it raises"]


def test_json_holds_everything():
    given = report(
        result(seconds=0.123456),
        result("gradients", "fail", reason="a gradient is wrong", failure=failure()),
        result("vmap", "skipped", reason="none"),
    )
    document = json.loads(given.to_json())
    assert {k: document[k] for k in ("function", "kind", "ok", "seed", "device", "seconds", "torch")} == {
        "function": "Square",
        "kind": "Function",
        "ok": False,
        "seed": 3,
        "device": "cpu",
        "seconds": 1.25,
        "torch": torch.__version__,
    }
    assert document["results"][0] == {
        "check": "gradients",
        "sample": "0",
        "dtype": "float64",
        "verdict": "pass",
        "reason": "",
        "seconds": 0.1235,
    }
    assert document["results"][1]["failure"] == {**vars(failure()), "index": [1, 2]}
    assert document["results"][2]["reason"] == "none"
    assert "\n" in given.to_json(indent=2)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_json_is_json_even_with_nan_and_infinity(number):
    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    given = report(result("g", "fail", failure=failure(expected=1.0, got=number, error=number, index=None)))
    found = json.loads(given.to_json(), parse_constant=no_constant)["results"][0]["failure"]
    assert (found["got"], found["error"], found["index"]) == (str(number), str(number), None)


def test_json_of_complex_numbers_and_other_objects_is_text():
    given = report(result("g", "fail", failure=failure(expected=1 + 2j, got=torch.float32)))
    found = json.loads(given.to_json())["results"][0]["failure"]
    assert (found["expected"], found["got"]) == ("(1+2j)", "torch.float32")
