"""The pytest plugin: its items, what they show, its options and the list of known failures."""

import subprocess
import sys

import pytest
import torch

from bptools.check import check_function

pytest_plugins = ["pytester"]

FUNCTIONS = """
import pytest, torch

class Square(torch.autograd.Function):
    @staticmethod
    def forward(x): return x * x
    @staticmethod
    def setup_context(ctx, inputs, output): ctx.save_for_backward(*inputs)
    @staticmethod
    def backward(ctx, dy): return 2 * ctx.saved_tensors[0] * dy

class Wrong(Square):
    @staticmethod
    def backward(ctx, dy): return 3 * ctx.saved_tensors[0] * dy

x = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
"""


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """pytester forgets what an inner run imports first; torch imports much on first use, which takes seconds."""
    check_function(torch.square, torch.ones(2, requires_grad=True), checks=["gradients", "vmap"])


@pytest.fixture
def run(pytester, monkeypatch):
    """Run pytest in this process on a test file that holds two Functions and the given tests."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "")

    def go(tests, *options, ini=""):
        pytester.makeini(f"[pytest]\n{ini}")
        pytester.makepyfile(test_audits=FUNCTIONS + tests)
        return pytester.runpytest_inprocess("-p", "no:xdist", "-p", "no:cacheprovider", "-rsxX", *options)

    return go


RIGHT = """
@pytest.mark.bptools(Square, x, checks=["gradients", "linearity", "dtypes"], dtypes=[torch.float64, torch.float32])
def test_square(audit):
    audit()
"""
WRONG = """
@pytest.mark.bptools(Wrong, x, checks=["gradients", "linearity"], dtypes=torch.float64)
def test_wrong(audit):
    audit()
"""
GRADIENTS = "test_audits.py::test_wrong[Wrong-0-gradients-float64]"


# Items --------------------------------------------------------------------------------------------------------


def test_one_item_for_each_sample_check_and_dtype(run):
    found = run(RIGHT, "--collect-only", "-q")
    found.stdout.fnmatch_lines(
        [
            "test_audits.py::test_square[[]Square-0-runs-float64[]]",
            "test_audits.py::test_square[[]Square-0-runs-float32[]]",
            "test_audits.py::test_square[[]Square-0-gradients-float64[]]",
            "test_audits.py::test_square[[]Square-0-linearity-float64[]]",
            "test_audits.py::test_square[[]Square-0-dtypes-float32[]]",
            "5 tests collected*",
        ]
    )


def test_what_is_right_passes_and_can_be_chosen_by_name(run):
    run(RIGHT).assert_outcomes(passed=5)
    run(RIGHT, "-k", "dtypes").assert_outcomes(passed=1, deselected=4)


def test_several_markers_make_one_test_of_several_functions(run):
    tests = """
@pytest.mark.bptools(Square, x, checks="gradients", dtypes=torch.float64)
@pytest.mark.bptools(Wrong, [x, x], checks="gradients", dtypes=torch.float64)
def test_both(audit):
    audit()
"""
    found = run(tests, "-v", "-k", "gradients")
    found.assert_outcomes(passed=1, failed=2, deselected=3)
    found.stdout.fnmatch_lines(["*Square-0-gradients-float64*PASSED*", "*Wrong-0-*FAILED*", "*Wrong-1-*FAILED*"])


def test_a_failure_shows_its_case_and_the_script(run):
    found = run(WRONG)
    found.assert_outcomes(passed=2, failed=1)
    found.stdout.fnmatch_lines(
        [
            "Wrong, 0-gradients-float64:",
            "a gradient is wrong",
            "input x*; output 0; expected *, got *; error *",
            "guess: a constant factor: got = 1.5 × expected",
            "smallest sample: x float64(*)",
            "*script that reproduces it*",
            '"""a gradient is wrong',
            "*raise SystemExit(1)",
        ]
    )
    assert "Traceback" not in found.stdout.str()


def test_what_did_not_run_is_skipped_with_the_reason(run):
    tests = """
@pytest.mark.bptools(Square, x, checks=["opcheck", "vmap"])
def test_square(audit):
    audit()
"""
    found = run(tests)
    found.assert_outcomes(passed=4, skipped=2)
    found.stdout.fnmatch_lines_random(
        ["SKIPPED*skipped: it is not a custom op", "SKIPPED*unsupported: RuntimeError: *vmap*"]
    )


def test_the_marker_takes_what_check_function_takes(run):
    tests = """
@pytest.mark.bptools(Square, x, reference=torch.square, checks=["values", "vmap"], expect={"vmap": "supported"})
def test_square(audit):
    audit()
"""
    found = run(tests, "-k", "not runs")
    found.assert_outcomes(passed=1, failed=1, deselected=4)
    found.stdout.fnmatch_lines(["expected to be supported, and refused: *"])


def test_an_audit_that_is_not_asked_fails_nothing(run):
    run(WRONG.replace("audit()", "assert callable(audit)")).assert_outcomes(passed=3)


# Mistakes -----------------------------------------------------------------------------------------------------


def test_the_fixture_without_the_marker_is_an_error(run):
    found = run("def test_bare(audit):\n    audit()\n")
    assert found.ret != 0
    assert "test_audits.py::test_bare: the fixture audit needs the marker bptools(fn, samples, ...)" in (
        found.stdout.str() + found.stderr.str()
    )


def test_a_wrong_argument_of_the_marker_is_an_error(run):
    found = run(WRONG.replace('"linearity"', '"linear"'))
    assert found.ret != 0
    assert "got 'linear'; did you mean 'linearity'?" in found.stdout.str() + found.stderr.str()


def test_the_marker_is_known_to_strict_pytest(run):
    run(RIGHT, "--strict-markers").assert_outcomes(passed=5)
    assert "bptools(fn, samples, **options): audit a function" in run("", "--markers").stdout.str()


# Options ------------------------------------------------------------------------------------------------------

SEEDED = """
def samples(device, dtype, seed):
    print("drawn on", device, "with seed", seed)
    yield (torch.full((2,), 1.0 + seed, dtype=dtype, requires_grad=True),), {}

@pytest.mark.bptools(Wrong, samples, checks="gradients", dtypes=torch.float64{more})
def test_seed(audit):
    audit()
"""


@pytest.mark.parametrize(
    ("options", "more", "said"),
    [
        ([], "", "seed 0"),
        (["--bptools-seed", "5"], "", "seed 5"),
        (["--bptools-seed", "5"], ", seed=2", "seed 2"),
    ],
    ids=["default", "option", "the marker has the last word"],
)
def test_the_seed(run, options, more, said):
    found = run(SEEDED.replace("{more}", more), "-s", *options)
    assert f"drawn on cpu with {said}" in found.stdout.str()
    assert f"{said}." in found.stdout.str()  # in the head of the script


def test_the_device(run):
    tests = """
def samples(device, dtype, seed):
    assert device == "meta"
    return []

@pytest.mark.bptools(Square, samples, checks="gradients", dtypes=torch.float64)
def test_device(audit):
    audit()
"""
    run(tests, "--bptools-device", "meta").assert_outcomes(skipped=2)
    assert "error" in run(tests).stdout.str().lower()


def test_a_seed_is_a_number(run):
    assert "invalid int value: 'many'" in run(RIGHT, "--bptools-seed", "many").stderr.str()


# Known failures -----------------------------------------------------------------------------------------------

INI = "bptools_known_failures = known.txt"


def test_a_known_failure_is_an_expected_one_with_its_reason(run, pytester):
    pytester.path.joinpath("known.txt").write_text(f"# ours to mend\n\n{GRADIENTS}: three for two\n")
    found = run(WRONG, ini=INI)
    found.assert_outcomes(passed=2, xfailed=1)
    found.stdout.fnmatch_lines(["XFAIL*three for two (a gradient is wrong)"])
    assert found.ret == 0


def test_a_pattern_names_several(run, pytester):
    pytester.path.joinpath("known.txt").write_text(
        "test_audits.py::test_wrong[Wrong-*-gradients-*]: three for two\n"
    )
    run(WRONG.replace(", x,", ", [x, x],"), ini=INI).assert_outcomes(passed=4, xfailed=2)


def test_a_known_failure_that_passes_is_stale(run, pytester):
    pytester.path.joinpath("known.txt").write_text(f"{GRADIENTS.replace('gradients', 'linearity')}: no more\n")
    found = run(WRONG, ini=INI)
    found.assert_outcomes(passed=1, failed=2)
    found.stdout.fnmatch_lines(
        ["0-linearity-float64 is a known failure (no more) and does not fail: take it off the list"]
    )


def test_a_known_failure_that_is_skipped_is_stale_too(run, pytester):
    pytester.path.joinpath("known.txt").write_text("test_audits.py::test_*[Square-0-opcheck-float64]: why\n")
    tests = WRONG.replace("Wrong", "Square").replace('["gradients", "linearity"]', '"opcheck"')
    run(tests, ini=INI).assert_outcomes(passed=1, failed=1)


def test_a_known_failure_without_an_item_is_an_error(run, pytester):
    pytester.path.joinpath("known.txt").write_text("test_audits.py::test_gone[Wrong-0-gradients-float64]: why\n")
    found = run(WRONG, ini=INI)
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    assert "names test_audits.py::test_gone[Wrong-0-gradients-float64], and there is no such item" in (
        found.stderr.str()
    )


def test_an_item_that_was_not_asked_for_is_not_missed(run, pytester):
    pytester.path.joinpath("known.txt").write_text(f"{GRADIENTS}: three for two\ntest_other.py::test_x[y]: why\n")
    linearity = GRADIENTS.replace("gradients", "linearity")
    run(WRONG, linearity, ini=INI).assert_outcomes(passed=1)
    run(WRONG, "-k", "linearity", ini=INI).assert_outcomes(passed=1, deselected=2)


@pytest.mark.parametrize("line", [GRADIENTS, f"{GRADIENTS}: ", f"{GRADIENTS}:reason"])
def test_a_line_without_a_reason_is_an_error(run, pytester, line):
    pytester.path.joinpath("known.txt").write_text(f"# first\n{line}\n")
    found = run(WRONG, ini=INI)
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    assert f"known.txt:2: expected `item: reason`, got {line.strip()!r}" in found.stderr.str()


def test_a_missing_file_is_an_error(run):
    found = run(WRONG, ini=INI)
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    assert "bptools_known_failures names known.txt, and there is no such file" in found.stderr.str()


# Neighbours ---------------------------------------------------------------------------------------------------


def test_it_does_not_import_torch_until_it_is_asked():
    code = "import sys, bptools.check.plugin; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.slow
def test_it_works_under_xdist(pytester, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "")
    pytester.makeini("[pytest]")
    pytester.makepyfile(test_audits=FUNCTIONS + RIGHT + WRONG)
    found = pytester.runpytest_subprocess("-n", "2", "-p", "no:cacheprovider", timeout=500)
    found.assert_outcomes(passed=7, failed=1)
    found.stdout.fnmatch_lines(["*script that reproduces it*"])
