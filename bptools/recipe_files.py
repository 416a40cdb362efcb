"""`bptools recipes`: the recipes as files that one copies, edits, and compares with what became of them here.

A copy is the user's. Beside it, in a folder that is to be committed with it, stays what the recipe was when it was
copied, so that `diff` can tell later changes of ours from the user's own, and merge both.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import tyro

RECORDS = ".bptools"  # beside a copied recipe
PACKED = Path(__file__).parent / "_recipes"  # in a wheel
SOURCE = Path(__file__).parents[1] / "recipes"  # in a clone


class RecipeError(Exception):
    """What was asked for cannot be done; the message says why."""


@dataclass(frozen=True)
class Ls:
    """List the recipes."""


@dataclass(frozen=True)
class Cp:
    """Copy a recipe, and the sample data that it reads, into a folder; no file is overwritten.

    What the recipe was is kept beside it, in the folder .bptools: commit that too, for `diff` compares with it.
    """

    name: tyro.conf.Positional[str]
    """Of the recipe, as `ls` has it."""
    folder: tyro.conf.Positional[Path] = Path()
    """Where to; it is made if it is not there."""


@dataclass(frozen=True)
class Diff:
    """Show what changed upstream, in the recipe that bptools has now, since it was copied.

    The exit status is 0 if nothing did, 1 if something did, and 2 in trouble.
    """

    name: tyro.conf.Positional[str]
    """The copied file, or the recipe's name where it lies in this folder."""
    mine: bool = False
    """Show what you changed in the copy instead."""
    merge: bool = False
    """Merge what changed upstream into your copy, by git; the status is 1 if conflicts are left, marked."""


Action = (
    Annotated[Ls, tyro.conf.subcommand("ls")]
    | Annotated[Cp, tyro.conf.subcommand("cp")]
    | Annotated[Diff, tyro.conf.subcommand("diff")]
)


def recipes(action: Action) -> None:
    """List the recipes, copy one into a project of your own, or see what changed in it since."""
    try:
        status = {Ls: list_recipes, Cp: copy_recipe, Diff: show_changes}[type(action)](action)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        status = 2
    except (RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    if status:
        sys.exit(status)


def recipe_folder() -> Path:
    """Return where the recipes are: in the package, or beside it in a clone.

    Raises:
        RecipeError: If they are in neither.
    """
    for folder in (PACKED, SOURCE):
        if folder.is_dir():
            return folder
    raise RecipeError(f"no recipes are installed: neither {PACKED} nor {SOURCE} is there")


def find_recipes() -> dict[str, Path]:
    """Return the recipes' files by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("[!_]*.py"))}


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: As `ls` has it, or with `.py` behind.

    Raises:
        RecipeError: If there is none of that name.
    """
    known = find_recipes()
    wanted = name.removesuffix(".py")
    if wanted not in known:
        raise RecipeError(f"no recipe {name!r}; {_hint(wanted, known)}")
    return known[wanted]


@dataclass(frozen=True)
class Copy:
    """A copied recipe, and what is known of its origin."""

    path: Path
    before: Path
    """What it was when it was copied."""
    version: str
    """Of the bptools that it was copied from."""


def find_copy(name: str) -> Copy:
    """Return a copy of a recipe.

    Args:
        name: Path of the file, with or without `.py`.

    Raises:
        RecipeError: If it is not there, or is not known to be the copy of a recipe.
    """
    path = Path(name if name.endswith(".py") else f"{name}.py")
    records = path.parent / RECORDS
    before = records / path.name
    if not (path.is_file() and before.is_file()):
        fault = f"not known as the copy of a recipe ({before} is missing)" if path.is_file() else "no such file"
        others = {kept.stem for kept in records.glob("*.py")} - {path.stem}
        hint = (
            f"of those copied, {_hint(path.stem, sorted(others))}" if others else "`bptools recipes cp` copies one"
        )
        raise RecipeError(f"{path}: {fault}; {hint}")
    return Copy(path, before, _read_versions(records).get(path.name, "of unknown version"))


def list_recipes(_: Ls) -> int:
    """Print name, length and first sentence of each recipe."""
    known = find_recipes()
    width = max(map(len, known), default=0)
    for name, path in known.items():
        text = path.read_text(encoding="utf-8")
        sentence = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
        print(f"{name:<{width}} {len(text.splitlines()):>4} lines  {' '.join(sentence.split())}")
    return 0


def copy_recipe(action: Cp) -> int:
    """Copy a recipe with its data, keep what it was, and print what to do next.

    Raises:
        RecipeError: If there is no such recipe, or a file is in the way.
    """
    source, folder = find_recipe(action.name), action.folder
    target, records = folder / source.name, folder / RECORDS
    for parent in (folder, *folder.parents):
        if parent.exists() and not parent.is_dir():
            raise RecipeError(f"{parent}: expected a folder, got a file")
    data = {folder / "data" / path.name: path for path in _find_data(source)}
    for new in (target, *data):
        if new.exists() and not (new in data and new.is_file() and new.read_bytes() == data[new].read_bytes()):
            raise RecipeError(f"{new} is there already; remove it, or name another folder")
    for new, old in data.items():
        _write(new, old.read_bytes())
    _keep(records, source)
    _write(target, source.read_bytes())  # at last: where it is, all is
    print(*(f"wrote {path}" for path in (target, *data)), sep="\n")
    quoted = shlex.quote(str(target))
    print(f"kept what it was in {records}; commit that too")
    print(f"run it:  {'uv run' if 'UV' in os.environ else 'python'} {quoted}")  # as this was run itself
    print(f"see what changed upstream, later:  bptools recipes diff {quoted}")
    return 0


def show_changes(action: Diff) -> int:
    """Print how a recipe differs from what it was when it was copied, or how the copy does; or merge both.

    Raises:
        RecipeError: If the copy, what it was, or the recipe is missing, or they cannot be merged.
    """
    if action.mine and action.merge:
        raise RecipeError("--mine, --merge: expected one of them, got both")
    copy = find_copy(action.name)
    name = copy.path.stem
    labels = [f"{name} of bptools {copy.version}, when it was copied"]
    if action.mine:
        new, same = copy.path, f"{copy.path} is as it was copied (bptools {copy.version})"
        labels.append(str(copy.path))
    else:
        try:
            new = find_recipe(name)
        except RecipeError as error:
            raise RecipeError(f"{name} of bptools {copy.version} was removed or renamed since: {error}") from error
        same = f"{name}: no change upstream since it was copied (bptools {copy.version})"
        labels.append(f"{name} of bptools {version('bptools')}")
    changes = list(difflib.unified_diff(_read_lines(copy.before), _read_lines(new), *labels))
    if not changes:
        print(same)
        return 0
    if action.merge:
        return _merge(copy, new, labels)
    _print_diff(changes)
    return 1


def _merge(copy: Copy, new: Path, labels: list[str]) -> int:
    """Merge what changed from ``copy.before`` to ``new`` into the copy, which is then one of ``new``."""
    git = shutil.which("git")
    if git is None:
        raise RecipeError("--merge: expected git, which is not installed")
    mine = _read_lines(copy.path)
    if any(line.startswith("<<<<<<< ") for line in mine):
        raise RecipeError(f"{copy.path}: conflicts of an earlier merge are marked there; resolve them first")
    with tempfile.TemporaryDirectory() as folder:
        sides = [Path(folder, side) for side in ("mine", "before", "new")]
        for side, lines in zip(sides, (mine, _read_lines(copy.before), _read_lines(new)), strict=True):
            side.write_bytes("".join(lines).encode())
        titles = [word for label in (str(copy.path), *labels) for word in ("-L", label)]
        run = subprocess.run([git, "merge-file", "-p", *titles, *sides], capture_output=True)
    if not 0 <= run.returncode <= 127:  # the number of conflicts, unless it failed or was killed
        said = " ".join(run.stderr.decode(errors="replace").split()) or f"exit status {run.returncode}"
        raise RecipeError(f"{copy.path}: git merge-file: {said}")
    ends = b"\r\n" if b"\r\n" in copy.path.read_bytes() else b"\n"
    _write(copy.path, run.stdout.replace(b"\n", ends))
    _keep(copy.before.parent, new)
    print(f"merged {labels[1]} into {copy.path}")
    for path in _find_data(new):
        if not (copy.path.parent / "data" / path.name).exists():
            _write(copy.path.parent / "data" / path.name, path.read_bytes())
            print(f"wrote {copy.path.parent / 'data' / path.name}")
    if run.returncode:
        print(f"conflicts to resolve: {run.returncode}, marked by <<<<<<< and >>>>>>>")
    return int(run.returncode > 0)


def _hint(wanted: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(wanted, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def _find_data(source: Path) -> list[Path]:
    """Return the sample files that a recipe names."""
    text = source.read_text(encoding="utf-8")
    paths = sorted((source.parent / "data").glob("*"))
    return [path for path in paths if path.is_file() and f'"{path.name}"' in text]


def _keep(records: Path, source: Path) -> None:
    """Record what a recipe is now."""
    versions = {**_read_versions(records), source.name: version("bptools")}
    _write(records / source.name, source.read_bytes())
    _write(records / "versions.json", (json.dumps(versions, indent=2) + "\n").encode())


def _read_versions(records: Path) -> dict[str, str]:
    path = records / "versions.json"
    try:
        versions = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RecipeError(f"{path} is torn: {error}") from error
    if not isinstance(versions, dict):
        raise RecipeError(f"{path}: expected versions by file name, got {versions!r}")
    return versions


def _read_lines(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8") as file:
            return list(file)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: expected UTF-8; {error}") from error


def _print_diff(lines: Iterable[str]) -> None:
    lines = [line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines]
    if not sys.stdout.isatty():
        print(*lines, sep="", end="")  # as it is, for patch(1)
        return
    from rich.console import Console
    from rich.text import Text

    console, styles = Console(), {"+": "green", "-": "red", "@": "cyan"}
    for line in lines:
        console.print(Text(line, styles.get(line[0], "")), end="", soft_wrap=True)


def _write(path: Path, data: bytes) -> None:
    """Write a file that is whole or as it was, with the mode that it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        if path.exists():
            shutil.copymode(path, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
