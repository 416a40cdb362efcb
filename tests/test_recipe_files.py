import ast
import io
import json
import os
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
        "images    1 lines  See.",
        "words     7 lines  Count words. And more.",
    ]


@pytest.mark.parametrize("source", sorted((ROOT / "recipes").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_recipe_comes_with_the_data_that_it_reads(run_bptools, tmp_path, source):
    assert run_bptools("recipes", "cp", source.stem, str(tmp_path))[0] == 0
    nodes = ast.walk(ast.parse(source.read_text()))
    words = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    names = {path.name for path in (ROOT / "recipes" / "data").iterdir()}
    read = {word.rpartition("/")[2] for word in words} & names
    assert {path.name for path in tmp_path.glob("data/*")} == read
    assert (tmp_path / source.name).read_bytes() == source.read_bytes()


def test_a_copy_has_its_data_and_what_it_was(upstream, run_bptools, tmp_path):
    assert run_bptools("recipes", "cp", "words", str(tmp_path / "a" / "b"))[0] == 0
    mine = tmp_path / "a" / "b"
    files = {str(path.relative_to(mine)) for path in mine.rglob("*") if path.is_file()}
    assert files == {"words.py", "data/words.csv", ".bptools/words.py", ".bptools/versions.json"}
    assert (mine / "words.py").read_bytes() == (upstream / "words.py").read_bytes()
    assert json.loads((mine / ".bptools" / "versions.json").read_text()) == {"words.py": version("bptools")}
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


@pytest.mark.parametrize(("uv", "command"), [(None, "python"), ("/bin/uv", "uv run")])
def test_the_command_to_run_it_can_be_pasted(upstream, run_bptools, tmp_path, monkeypatch, uv, command):
    """uv sets UV in what it runs."""
    monkeypatch.delenv("UV", raising=False)
    if uv:
        monkeypatch.setenv("UV", uv)
    monkeypatch.chdir(tmp_path)
    out = run_bptools("recipes", "cp", "words", "my project")[1]
    assert out.splitlines() == [
        "wrote my project/words.py",
        "wrote my project/data/words.csv",
        "kept what it was in my project/.bptools; commit that too",
        f"run it:  {command} 'my project/words.py'",
        "see what changed upstream, later:  bptools recipes diff 'my project/words.py'",
    ]


def test_a_copy_that_failed_halfway_can_be_made_again(upstream, run_bptools, tmp_path, monkeypatch):
    """The recipe comes last, so where it is, all is."""
    replace = os.replace

    def fail(old, new):
        if Path(new).name == "versions.json":
            raise OSError(28, "No space left on device")
        replace(old, new)

    with monkeypatch.context() as context:
        context.setattr(os, "replace", fail)
        status, out, err = run_bptools("recipes", "cp", "words", str(tmp_path / "mine"))
    assert (status, out, err) == (2, "", "error: [Errno 28] No space left on device\n")
    assert not (tmp_path / "mine" / "words.py").exists()
    assert not list(tmp_path.rglob("*.part"))
    assert run_bptools("recipes", "cp", "words", str(tmp_path / "mine"))[0] == 0


@pytest.fixture
def copied(upstream, run_bptools, tmp_path, monkeypatch):
    """A project with a copy of words in it, in which we are."""
    folder = tmp_path / "project"
    run_bptools("recipes", "cp", "words", str(folder))
    monkeypatch.chdir(folder)
    return folder


def rewrite(path, **words):
    text = path.read_text()
    for old, new in words.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def test_what_changed_here_and_what_there(upstream, copied, run_bptools):
    now = version("bptools")
    same = f"words: no change upstream since it was copied (bptools {now})\n"
    for name in ("words", "words.py", str(copied / "words")):
        assert run_bptools("recipes", "diff", name) == (0, same, "")
    assert run_bptools("recipes", "diff", "words", "--mine") == (
        0, f"words.py is as it was copied (bptools {now})\n", "",
    )  # fmt: skip
    with open("words.py", "a") as file:
        file.write("MINE = 1\n")
    rewrite(upstream / "words.py", DATA="FILE")
    rewrite(copied / ".bptools" / "versions.json", **{now: "0.0.7"})
    status, out, _ = run_bptools("recipes", "diff", "words.py")
    assert status == 1
    assert out.splitlines() == [
        "--- words of bptools 0.0.7, when it was copied",
        f"+++ words of bptools {now}",
        "@@ -4,4 +4,4 @@",
        " At length.",
        ' """',
        " ",
        '-DATA = "words.csv"',
        '+FILE = "words.csv"',
    ]
    status, out, _ = run_bptools("recipes", "diff", "--mine", str(copied / "words.py"))
    assert status == 1
    assert out.splitlines()[1] == f"+++ {copied / 'words.py'}"
    assert [line for line in out.splitlines()[2:] if line[0] in "+-"] == ["+MINE = 1"]


def test_patch_takes_the_diff(upstream, copied, run_bptools):
    """Form feeds and tabs in lines, and a last line without end."""
    rewrite(upstream / "words.py", DATA="FILE")
    with open(upstream / "words.py", "a") as file:
        file.write("A = '\f'\t# of\x85 two\nB = 1")
    status, out, _ = run_bptools("recipes", "diff", "words")
    assert status == 1
    assert out.endswith("\n+A = '\f'\t# of\x85 two\n+B = 1\n\\ No newline at end of file\n")
    hunks = out[out.index("@@") :]
    changes = f"--- a/words.py\n+++ b/words.py\n{hunks}"  # `patch words.py` does without names
    subprocess.run(["git", "apply"], input=changes, text=True, check=True)
    assert (copied / "words.py").read_bytes() == (upstream / "words.py").read_bytes()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("coloured", [True, False])
def test_colours_in_a_terminal(upstream, copied, monkeypatch, coloured):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not coloured:
        monkeypatch.setenv("NO_COLOR", "1")
    rewrite(upstream / "words.py", DATA="[bold]" + "long " * 40)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert recipe_files.show_changes(recipe_files.Diff("words")) == 1
    lines = sys.stdout.getvalue().splitlines()
    old, new = '-DATA = "words.csv"', f'+[bold]{"long " * 40} = "words.csv"'
    assert lines[-2:] == ([f"\x1b[31m{old}\x1b[0m", f"\x1b[32m{new}\x1b[0m"] if coloured else [old, new])


def test_a_reader_that_has_seen_enough(tmp_path):
    run = "import sys; sys.argv[1:] = [{}]; from bptools.cli import main; main()"
    copy = [sys.executable, "-c", run.format(f"'recipes', 'cp', 'vision', {str(tmp_path)!r}")]
    subprocess.run(copy, check=True, capture_output=True)
    (tmp_path / "vision.py").write_text("# mine\n" * 50_000)
    diff = [sys.executable, "-c", run.format(f"'recipes', 'diff', '--mine', {str(tmp_path / 'vision.py')!r}")]
    with subprocess.Popen(diff, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 2


def test_merge(upstream, copied, run_bptools):
    """Both changes are in the copy, which is then one of the new recipe, with the data that this reads."""
    rewrite(copied / "words.py", Count="Count my")
    (copied / "words.py").chmod(0o755)
    rewrite(upstream / "words.py", **{"words.csv": "other.csv"})
    rewrite(copied / ".bptools" / "versions.json", **{version("bptools"): "0.0.7"})
    status, out, err = run_bptools("recipes", "diff", "words", "--merge")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"merged words of bptools {version('bptools')} into words.py", "wrote data/other.csv",
    ]  # fmt: skip
    assert (copied / "words.py").read_text() == (upstream / "words.py").read_text().replace("Count", "Count my")
    assert (copied / "words.py").stat().st_mode & 0o777 == 0o755
    assert (copied / "data" / "other.csv").read_bytes() == (upstream / "data" / "other.csv").read_bytes()
    for options in ((), ("--merge",)):
        status, out, _ = run_bptools("recipes", "diff", "words", *options)
        assert status == 0
        assert out == f"words: no change upstream since it was copied (bptools {version('bptools')})\n"
    out = run_bptools("recipes", "diff", "words", "--mine")[1]
    assert [line for line in out.splitlines()[2:] if line[0] in "+-"] == ['-"""Count', '+"""Count my']


def test_merge_leaves_conflicts_marked(upstream, copied, run_bptools):
    rewrite(copied / "words.py", DATA="MINE")
    rewrite(upstream / "words.py", DATA="THEIRS")
    status, out, err = run_bptools("recipes", "diff", "words", "--merge")
    assert (status, err) == (1, "")
    assert out.splitlines()[-1] == "conflicts to resolve: 1, marked by <<<<<<< and >>>>>>>"
    lines = (copied / "words.py").read_text().splitlines()
    assert lines[-5:] == [
        "<<<<<<< words.py",
        'MINE = "words.csv"',
        "=======",
        'THEIRS = "words.csv"',
        f">>>>>>> words of bptools {version('bptools')}",
    ]
    rewrite(upstream / "words.py", Count="List")
    before = (copied / "words.py").read_bytes()
    status, out, err = run_bptools("recipes", "diff", "words", "--merge")
    assert (status, out) == (2, "")
    assert err == "error: words.py: conflicts of an earlier merge are marked there; resolve them first\n"
    assert (copied / "words.py").read_bytes() == before


def test_merge_keeps_the_ends_of_lines(upstream, copied, run_bptools):
    """As git checks out on Windows; what was kept has them too, then."""
    for path in (copied / "words.py", copied / ".bptools" / "words.py"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert run_bptools("recipes", "diff", "words")[0] == 0
    rewrite(upstream / "words.py", DATA="THEIRS")
    assert run_bptools("recipes", "diff", "words", "--merge")[0] == 0
    assert (copied / "words.py").read_bytes() == (upstream / "words.py").read_bytes().replace(b"\n", b"\r\n")


def test_merge_needs_git(upstream, copied, run_bptools, monkeypatch):
    rewrite(upstream / "words.py", DATA="THEIRS")
    monkeypatch.setenv("PATH", "")
    assert run_bptools("recipes", "diff", "words", "--merge") == (
        2, "", "error: --merge: expected git, which is not installed\n",
    )  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for git is a shell script")
@pytest.mark.parametrize(
    ("script", "said"), [("kill -9 $$", "exit status -9"), ("echo fatal: >&2; echo no >&2; exit 255", "fatal: no")]
)
def test_a_merge_that_fails_changes_nothing(upstream, copied, run_bptools, tmp_path, monkeypatch, script, said):
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text(f"#!/bin/sh\n{script}\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(git.parent))
    rewrite(upstream / "words.py", DATA="THEIRS")
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    status, out, err = run_bptools("recipes", "diff", "words", "--merge")
    assert (status, out, err) == (2, "", f"error: words.py: git merge-file: {said}\n")
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def spoil(upstream, mine, how):
    if how == "no copy":
        (mine / "words.py").unlink()
    elif how == "no record":
        (mine / ".bptools" / "words.py").unlink()
    elif how == "torn record":
        (mine / ".bptools" / "versions.json").write_text("{")
    elif how == "odd record":
        (mine / ".bptools" / "versions.json").write_text("[]")
    elif how == "not text":
        (mine / ".bptools" / "words.py").write_bytes(b"\xff")
    elif how == "renamed copy":
        (mine / "words.py").rename(mine / "nouns.py")
    elif how == "renamed upstream":
        (upstream / "words.py").rename(upstream / "word.py")
    elif how == "gone upstream":
        (upstream / "words.py").unlink()


UNKNOWN = "{0}.py: not known as the copy of a recipe (.bptools/{0}.py is missing)"
REMOVED = f"words of bptools {version('bptools')} was removed or renamed since"


@pytest.mark.parametrize(
    ("how", "arguments", "words"),
    [
        ("no copy", ["words"], "words.py: no such file; `bptools recipes cp` copies one"),
        ("nothing", ["wrods"], "wrods.py: no such file; of those copied, did you mean words?"),
        ("nothing", ["elsewhere/words"], "elsewhere/words.py: no such file; `bptools recipes cp` copies one"),
        ("no record", ["words"], f"{UNKNOWN.format('words')}; `bptools recipes cp` copies one"),
        ("renamed copy", ["nouns.py"], f"{UNKNOWN.format('nouns')}; of those copied, there are words"),
        ("torn record", ["words"], ".bptools/versions.json is torn: "),
        ("odd record", ["words"], ".bptools/versions.json: expected versions by file name, got []"),
        ("not text", ["words", "--mine"], ".bptools/words.py: expected UTF-8; "),
        ("renamed upstream", ["words"], f"{REMOVED}: no recipe 'words'; did you mean word?"),
        ("gone upstream", ["words"], f"{REMOVED}: no recipe 'words'; there are images"),
        ("nothing", ["words", "--mine", "--merge"], "--mine, --merge: expected one of them, got both"),
    ],
)
def test_what_cannot_be_compared_is_said(upstream, copied, run_bptools, how, arguments, words):
    spoil(upstream, copied, how)
    status, out, err = run_bptools("recipes", "diff", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {words}")
    assert err.count("\n") == 1


def test_what_is_gone_upstream_still_has_what_is_mine(upstream, copied, run_bptools):
    (upstream / "words.py").unlink()
    assert run_bptools("recipes", "diff", "words", "--mine")[0] == 0


def test_a_version_that_is_not_recorded(upstream, copied, run_bptools):
    (copied / ".bptools" / "versions.json").unlink()
    assert "(bptools of unknown version)" in run_bptools("recipes", "diff", "words")[1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wards", "no recipe 'wards'; did you mean words?"),
        ("Words.py", "no recipe 'Words.py'; did you mean words?"),
        ("_inner", "no recipe '_inner'; there are images, words"),
        ("../words", "no recipe '../words'; did you mean words?"),
    ],
)
def test_no_such_recipe(upstream, run_bptools, name, words):
    assert run_bptools("recipes", "cp", name) == (2, "", f"error: {words}\n")


@pytest.mark.parametrize("folder", ["file", "file/a/b"])
def test_a_file_in_the_way(upstream, run_bptools, tmp_path, folder):
    (tmp_path / "file").touch()
    status, out, err = run_bptools("recipes", "cp", "words", str(tmp_path / folder))
    assert (status, out, err) == (2, "", f"error: {tmp_path / 'file'}: expected a folder, got a file\n")


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
    source = ROOT / "recipes"
    files = {path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("bptools/_recipes/")}
        assert names == {f"bptools/_recipes/{path.relative_to(source).as_posix()}" for path in files}
        archive.extractall(tmp_path / "site")
    site = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    run = "import sys; sys.argv[1:] = ['recipes', 'cp', 'text', 'mine']; from bptools.cli import main; main()"
    run += "; from bptools import recipe_files; assert recipe_files.recipe_folder() == recipe_files.PACKED"
    subprocess.run([sys.executable, "-c", run], cwd=tmp_path, env=site, check=True, capture_output=True)
    for name in ("text.py", "data/chat.csv"):
        assert (tmp_path / "mine" / name).read_bytes() == (source / name).read_bytes()
