"""`bptools recipes`: the recipes as files that one copies, edits, and compares with what became of them here.

A copy is the user's. Beside it, in a folder that is to be committed with it, stays what the recipe was when it was
copied, so that `diff` can tell later changes of ours from the user's own.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import sys
from collections.abc import Iterable
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
    """Copy a recipe, and the sample data that it reads, into a folder; no file is overwritten."""

    name: tyro.conf.Positional[str]
    """Of the recipe, as `ls` has it."""
    folder: tyro.conf.Positional[Path] = Path()
    """Where to; it is made if it is not there."""


@dataclass(frozen=True)
class Diff:
    """Show what changed in a recipe since it was copied; the exit status is 0 if nothing did, and 1 otherwise."""

    name: tyro.conf.Positional[str]
    """The copied file, or the recipe's name where it lies in this folder."""
    mine: bool = False
    """Show what you changed in the copy instead."""


Action = (
    Annotated[Ls, tyro.conf.subcommand("ls")]
    | Annotated[Cp, tyro.conf.subcommand("cp")]
    | Annotated[Diff, tyro.conf.subcommand("diff")]
)


def recipes(action: Action) -> None:
    """List the recipes, copy one into a project of your own, or see what changed in it since."""
    try:
        status = {Ls: list_recipes, Cp: copy_recipe, Diff: show_changes}[type(action)](action)
    except (RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    if status:
        sys.exit(status)


def recipe_folder() -> Path:
    """Return where the recipes are: in the package, or beside it in a clone."""
    for folder in (PACKED, SOURCE):
        if folder.is_dir():
            return folder
    raise RecipeError(f"no recipes are installed: neither {PACKED} nor {SOURCE} is there")


def find_recipes() -> dict[str, Path]:
    """Return the recipes' files by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("[!_]*.py"))}


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Raises:
        RecipeError: If there is none of that name.
    """
    known = find_recipes()
    wanted = name.removesuffix(".py")
    if wanted not in known:
        close = difflib.get_close_matches(wanted, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise RecipeError(f"no recipe {name!r}; {hint}")
    return known[wanted]


def list_recipes(_: Ls) -> int:
    """Print name, length and first sentence of each recipe."""
    for name, path in find_recipes().items():
        text = path.read_text(encoding="utf-8")
        sentence = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
        print(f"{name:<8} {len(text.splitlines()):>4} lines  {' '.join(sentence.split())}")
    return 0


def copy_recipe(action: Cp) -> int:
    """Copy a recipe with its data, keep what it was, and print what to do next."""
    source = find_recipe(action.name)
    text = source.read_text(encoding="utf-8")
    samples = source.parent / "data"
    data = [path for path in sorted(samples.glob("*")) if path.is_file() and f'"{path.name}"' in text]
    target, records = action.folder / source.name, action.folder / RECORDS
    wanted = {target: source, **{action.folder / "data" / path.name: path for path in data}}
    for new, old in wanted.items():
        if new.exists() and (new == target or new.read_bytes() != old.read_bytes()):
            raise RecipeError(f"{new} is there already; remove it, or name another folder")
    if action.folder.exists() and not action.folder.is_dir():
        raise RecipeError(f"{action.folder}: expected a folder, got a file")
    for new, old in {records / source.name: source, **wanted}.items():
        _write(new, old.read_bytes())
    record = {**_read_record(records), source.name: version("bptools")}
    _write(records / "versions.json", (json.dumps(record, indent=2) + "\n").encode())
    print(*(f"wrote {path}" for path in wanted), sep="\n")
    print(f"what it was is in {records}: commit that too; `bptools recipes diff {target}` shows what changes here")
    print(f"run it:  uv run {target}")
    return 0


def show_changes(action: Diff) -> int:
    """Print how a recipe differs from what it was when it was copied, or how the copy does."""
    given = Path(action.name)
    copy = given if given.suffix == ".py" else Path(f"{given}.py")
    records = copy.parent / RECORDS
    before = records / copy.name
    if not copy.is_file():
        raise RecipeError(f"{copy}: no such file; `bptools recipes cp {copy.stem}` copies a recipe")
    if not before.is_file():
        raise RecipeError(f"{copy}: what it was when it was copied is not known; {before} is missing")
    taken = _read_record(records).get(copy.name, "an unknown version")
    old_name = f"{copy.stem} of bptools {taken}, when it was copied"
    if action.mine:
        new, new_name, same = copy, str(copy), f"{copy} is as it was copied"
    else:
        new, new_name = find_recipe(copy.stem), f"{copy.stem} of bptools {version('bptools')}"
        same = f"{copy.stem} is as it was copied (bptools {taken})"
    lines = [path.read_text(encoding="utf-8").splitlines(keepends=True) for path in (before, new)]
    changes = list(difflib.unified_diff(*lines, old_name, new_name))
    if not changes:
        print(same)
        return 0
    _print_diff(changes)
    return 1


def _print_diff(lines: Iterable[str]) -> None:
    colours = {"+": "32", "-": "31", "@": "36"} if sys.stdout.isatty() and "NO_COLOR" not in os.environ else {}
    for line in lines:
        text, colour = line.rstrip("\n"), colours.get(line[0])
        print(f"\x1b[{colour}m{text}\x1b[0m" if colour else text)


def _read_record(records: Path) -> dict[str, str]:
    try:
        return json.loads((records / "versions.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RecipeError(f"{records / 'versions.json'} is torn: {error}") from error


def _write(path: Path, data: bytes) -> None:
    """Write a file that is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
