import json
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from bptools import recipe_files

ROOT = Path(__file__).parents[1]


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    """Recipes of our own, in the place of those that are installed."""
    folder = tmp_path / "upstream"
    (folder / "data").mkdir(parents=True)
    (folder / "words.py").write_text('"""Count\nwords. And more.\n\nAt length.\n"""\n\nDATA = "words.csv"\n')
    (folder / "images.py").write_text('"""See."""\n')
    (folder / "_inner.py").write_text('"""No recipe."""\n')
    (folder / "data" / "words.csv").write_text("a,b\n")
    (folder / "data" / "other.csv").write_text("c,d\n")
    monkeypatch.setattr(recipe_files, "PACKED", folder)
    return folder


def test_the_list_has_every_recipe(run_bptools):
    status, out, _ = run_bptools("recipes", "ls")
    assert status == 0
    names = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    assert {line.split()[0] for line in out.splitlines()} == names
    for line in out.splitlines():
        assert 10 < int(line.split()[1]) <= 300
        assert line.rstrip().endswith(".")


def test_what_is_listed(upstream, run_bptools):
    assert run_bptools("recipes", "ls")[1].splitlines() == [
        "images      1 lines  See.",
        "words       7 lines  Count words. And more.",
    ]


def test_a_copy_has_its_data_and_what_it_was(upstream, run_bptools, tmp_path):
    status, out, _ = run_bptools("recipes", "cp", "words", str(tmp_path / "a" / "b"))
    assert status == 0
    mine = tmp_path / "a" / "b"
    files = {str(path.relative_to(mine)) for path in mine.rglob("*") if path.is_file()}
    assert files == {"words.py", "data/words.csv", ".bptools/words.py", ".bptools/versions.json"}
    assert (mine / "words.py").read_bytes() == (upstream / "words.py").read_bytes()
    assert json.loads((mine / ".bptools" / "versions.json").read_text()) == {"words.py": version("bptools")}
    assert f"uv run {mine / 'words.py'}" in out
    assert run_bptools("recipes", "cp", "images.py", str(mine))[0] == 0
    assert set(json.loads((mine / ".bptools" / "versions.json").read_text())) == {"words.py", "images.py"}


@pytest.mark.parametrize("there", ["words.py", "data/words.csv"])
def test_nothing_is_overwritten_and_nothing_half_written(upstream, run_bptools, tmp_path, there):
    mine = tmp_path / "mine"
    (mine / there).parent.mkdir(parents=True)
    (mine / there).write_text("mine")
    status, _, err = run_bptools("recipes", "cp", "words", str(mine))
    assert status == 2
    assert err == f"error: {mine / there} is there already; remove it, or name another folder\n"
    assert [path for path in mine.rglob("*") if path.is_file()] == [mine / there]
    assert (mine / there).read_text() == "mine"


def test_data_that_are_the_same_are_no_obstacle(upstream, run_bptools, tmp_path):
    assert run_bptools("recipes", "cp", "words", str(tmp_path / "mine"))[0] == 0
    (tmp_path / "mine" / "words.py").unlink()
    assert run_bptools("recipes", "cp", "words", str(tmp_path / "mine"))[0] == 0


def test_what_changed_here_and_what_there(upstream, run_bptools, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_bptools("recipes", "cp", "words")[0] == 0
    assert run_bptools("recipes", "diff", "words") == (
        0, f"words is as it was copied (bptools {version('bptools')})\n", "",
    )  # fmt: skip
    assert run_bptools("recipes", "diff", "words", "--mine")[:2] == (0, "words.py is as it was copied\n")
    with open("words.py", "a") as file:
        file.write("MINE = 1\n")
    (upstream / "words.py").write_text((upstream / "words.py").read_text() + "THEIRS = 1\n")
    status, out, _ = run_bptools("recipes", "diff", "words.py")
    assert status == 1
    assert "+THEIRS = 1" in out.splitlines()
    assert "MINE" not in out
    status, out, _ = run_bptools("recipes", "diff", "--mine", str(tmp_path / "words.py"))
    assert status == 1
    assert "+MINE = 1" in out.splitlines()
    assert "THEIRS" not in out


def spoil(upstream, mine, how):
    if how == "no copy":
        (mine / "words.py").unlink()
    elif how == "no record":
        (mine / ".bptools" / "words.py").unlink()
    elif how == "torn record":
        (mine / ".bptools" / "versions.json").write_text("{")
    else:
        (upstream / "words.py").unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no copy", "no such file; `bptools recipes cp words`"),
        ("no record", "is not known"),
        ("torn record", "versions.json is torn"),
        ("gone upstream", "no recipe 'words'; there are images"),
    ],
)
def test_what_cannot_be_compared_is_said(upstream, run_bptools, tmp_path, monkeypatch, how, words):
    monkeypatch.chdir(tmp_path)
    run_bptools("recipes", "cp", "words")
    spoil(upstream, tmp_path, how)
    status, out, err = run_bptools("recipes", "diff", "words")
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_a_near_miss_and_a_file_in_the_way(upstream, run_bptools, tmp_path):
    assert run_bptools("recipes", "cp", "wards")[2] == "error: no recipe 'wards'; did you mean words?\n"
    (tmp_path / "file").touch()
    status, _, err = run_bptools("recipes", "cp", "words", str(tmp_path / "file"))
    assert status == 2
    assert "expected a folder, got a file" in err


def test_without_any_recipe(monkeypatch, run_bptools, tmp_path):
    for name in ("PACKED", "SOURCE"):
        monkeypatch.setattr(recipe_files, name, tmp_path / "nothing")
    status, _, err = run_bptools("recipes", "ls")
    assert status == 2
    assert "no recipes are installed" in err


def test_it_does_without_torch():
    run = "import sys; sys.argv[1:] = ['recipes', 'ls']; from bptools.cli import main; main()"
    code = f"{run}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
def test_a_wheel_has_them(tmp_path):
    build = ["uv", "build", "--wheel", "--out-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "recipes").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert f"bptools/_recipes/{path.relative_to(ROOT / 'recipes')}" in names
