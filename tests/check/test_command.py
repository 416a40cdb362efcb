"""`bptools check` and `bptools zoo`: exit statuses, messages, files."""

import json
import sys

import pytest

from bptools.check import matrix
from bptools.check.zoo import by_number

MODULE = """
import torch

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

class Holder:
    square = Square

tensor = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
frozen = tensor.detach()

def samples(device, dtype, seed):
    yield (torch.full((2, 3), 1.0 + seed, dtype=dtype, device=device, requires_grad=True),), {}
"""


@pytest.fixture
def bptools(run_bptools, tmp_path, monkeypatch):
    """Run a command line in a folder that holds the module `functions`: its exit status, stdout and stderr."""
    (tmp_path / "functions.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delitem(sys.modules, "functions", raising=False)

    yield run_bptools
    sys.modules.pop("functions", None)


def check(function, *options, samples="functions:samples", checks=("gradients", "linearity")):
    return "check", f"functions:{function}", "--samples", samples, "--checks", *checks, *options


# Statuses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", ["functions:samples", "functions:tensor"])
def test_0_if_nothing_is_wrong(bptools, samples):
    status, said, errors = bptools(*check("Square", samples=samples))
    assert (status, errors) == (0, "")
    assert said.startswith("Square (Function, cpu, seed 0): 6 pass;")


def test_1_if_something_is(bptools):
    status, said, _ = bptools(*check("Wrong"))
    assert status == 1
    assert "FAIL  gradients" in said
    assert "guess: a constant factor: got = 1.5 × expected" in said


def test_1_if_nothing_passed(bptools):
    status, said, _ = bptools(*check("Square", checks=["opcheck"]))
    assert status == 1
    assert "skipped      opcheck: it is not a custom op" in said


def test_the_options_reach_the_audit(bptools):
    options = ("--reference", "torch:square", "--dtypes", "float32", "--seed", "4")
    status, said, _ = bptools(*check("Holder.square", *options, "--json", "r.json", checks=["values"]))
    assert status == 0, said
    with open("r.json") as file:
        document = json.load(file)
    assert document["seed"] == 4
    found = [(r["check"], r["dtype"]) for r in document["results"]]
    assert found == [("runs", "float32"), ("values", "float32")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("functions", "--samples", "functions:samples"), "function must be package.module:name, got 'functions'"),
        (
            ("functions:", "--samples", "functions:samples"),
            "function must be package.module:name, got 'functions:'",
        ),
        (
            ("functions:Cube", "--samples", "functions:samples"),
            "function names 'functions:Cube', and functions has no Cube",
        ),
        (
            ("no_such_module:f", "--samples", "functions:samples"),
            "function names 'no_such_module:f', and importing no_such_module gives: No module named",
        ),
        (
            ("functions:Square", "--samples", "functions:draw"),
            "--samples names 'functions:draw', and functions has",
        ),
        (
            ("functions:Square", "--samples", "functions:samples", "--reference", "square"),
            "--reference must be package.module:name, got 'square'",
        ),
        (
            ("functions:Square", "--samples", "functions:samples", "--checks", "gradient"),
            "did you mean 'gradients'?",
        ),
        (
            ("functions:Square", "--samples", "functions:frozen"),
            "samples must hold a tensor that requires a gradient",
        ),
    ],
)
def test_2_if_it_cannot_be_asked(bptools, arguments, said):
    status, out, errors = bptools("check", *arguments)
    assert status == 2
    assert errors.startswith("bptools check: ")
    assert said in errors
    assert out == ""


@pytest.mark.parametrize(
    "arguments",
    [("check",), ("check", "functions:Square"), ("zoo", "thirteen"), ("check", "f:g", "--dtypes", "int8")],
)
def test_2_for_a_command_line_that_is_none(bptools, arguments):
    assert bptools(*arguments)[0] == 2


# Files --------------------------------------------------------------------------------------------------------


def test_json_is_written_whole_into_a_folder_that_may_not_be_there(bptools, tmp_path):
    status, _, _ = bptools(*check("Wrong", "--json", "reports/wrong.json"))
    assert status == 1
    assert [p.name for p in (tmp_path / "reports").iterdir()] == ["wrong.json"]  # no partial file beside it
    document = json.loads((tmp_path / "reports/wrong.json").read_text())
    assert document["function"] == "Wrong"
    assert not document["ok"]
    verdicts = {r["check"]: r["verdict"] for r in document["results"]}
    assert verdicts == {"runs": "pass", "gradients": "fail", "linearity": "pass"}


def test_a_file_that_cannot_be_written_leaves_the_old_one(bptools, tmp_path, monkeypatch):
    from pathlib import Path

    (tmp_path / "report.json").write_text("old")
    write = Path.write_text

    def full(path, text, **options):
        write(path, text[:10], **options)
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        bptools(*check("Square", "--json", "report.json"))
    assert (tmp_path / "report.json").read_text() == "old"
    assert not (tmp_path / "report.json.partial").exists()


def test_scripts_are_written_that_fail_until_it_is_mended(bptools, tmp_path, capsys):
    status, said, _ = bptools(*check("Wrong", "--scripts", "out"))
    assert status == 1
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "Wrong-0-gradients-float64.py"
    assert f"reproduce gradients: python {path.relative_to(tmp_path)}" in said
    script = path.read_text()
    with pytest.raises(SystemExit) as found:
        exec(compile(script, path.name, "exec"), {"__name__": "__main__"})
    assert found.value.code == 1
    exec(compile(script.replace("Wrong", "Square"), path.name, "exec"), {"__name__": "__main__"})
    assert "mended: they are the same" in capsys.readouterr().out


def test_no_script_where_nothing_is_wrong(bptools, tmp_path):
    bptools(*check("Square", "--scripts", "out"))
    assert not (tmp_path / "out").exists()


# zoo ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Ask one check only, of ours alone: what the others cost is not asked about here."""
    given = matrix.check_function
    monkeypatch.setattr(
        matrix, "check_function", lambda *args, **options: given(*args, **{**options, "checks": "kinks"})
    )
    monkeypatch.setattr(matrix, "CHECKERS", {name: lambda *_: matrix.MISSED for name in matrix.CHECKERS})


def test_zoo_prints_the_matrix_and_the_report_of_the_chosen(bptools, quick, tmp_path):
    status, said, errors = bptools("zoo", "36", "--write", "page.md")
    assert (status, errors) == (0, "")
    (line,) = (line for line in said.splitlines() if "│" in line and " 36 " in line)
    assert line.split()[1:2] == ["36"]
    assert line.count("caught") == 2
    assert "1 of 1" in said
    assert f"36 {by_number(36).title}" in said
    assert "FAIL  kinks" in said
    page = (tmp_path / "page.md").read_text()
    assert page == matrix.markdown(matrix.matrix([36]))


@pytest.mark.parametrize("numbers", [("0",), ("46",), ("3", "99", "100")])
def test_zoo_has_the_defects_1_to_45(bptools, numbers):
    status, _, errors = bptools("zoo", *numbers)
    wrong = ", ".join(n for n in numbers if n != "3")
    assert (status, errors) == (2, f"bptools zoo: numbers must be among 1 to 45, got {wrong}\n")
