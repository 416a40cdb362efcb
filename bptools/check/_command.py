"""`bptools check package.module:Function --samples package.module:samples`."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from bptools.check._auditor import DTYPES, check_function, name_of

DTYPE_NAMES = tuple(name_of(d) for d in DTYPES)


def check(
    function: Annotated[str, tyro.conf.Positional],
    /,
    *,
    samples: str,
    reference: str | None = None,
    checks: tuple[str, ...] = ("default",),
    dtypes: tuple[Literal["float64", "float32", "bfloat16", "float16"], ...] = (
        "float64",
        "float32",
        "bfloat16",
        "float16",
    ),
    seed: int = 0,
    device: str = "cpu",
    json: Path | None = None,
    scripts: Path | None = None,
) -> None:
    """Audit a function: exit with 0 if nothing is wrong, with 1 if something is, with 2 if it could not be asked.

    Args:
        function: what to audit, as `package.module:Name`: an autograd.Function, function, module or custom op.
        samples: as `package.module:name`: a callable (device, dtype, seed) -> iterable of (args, kwargs), or
            tensors.
        reference: as `package.module:name`: a plain function that is right. Without one, numerical derivatives are
            the truth.
        checks: `default`, `all`, or the names of checks.
        dtypes: which dtypes to look at.
        seed: of samples and directions.
        device: where the samples are made.
        json: a file to write the report to.
        scripts: a folder for the scripts that reproduce the failures.
    """
    sys.path.insert(0, os.getcwd())
    try:
        fn, drawn = _load(function, "function"), _load(samples, "--samples")
        truth = None if reference is None else _load(reference, "--reference")
        chosen: Any = checks[0] if len(checks) == 1 and checks[0] in ("default", "all") else checks
        report = check_function(
            fn, drawn, truth, chosen, [getattr(torch, name) for name in dtypes], seed=seed, device=device
        )
    except (TypeError, ValueError) as error:
        print(f"bptools check: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(report)
    if json is not None:
        _write(json, report.to_json(indent=2))
    for result in report.failures if scripts is not None else ():
        if result.failure and result.failure.script:
            path = scripts / f"{re.sub(r'[^A-Za-z0-9_]+', '_', report.name)}-{result.key}.py"
            _write(path, result.failure.script)
            print(f"reproduce {result.check}: python {path}")
    if not report.ok:
        raise SystemExit(1)


def _load(path: str, argument: str) -> Any:
    """The object at `package.module:name`."""
    module_name, colon, name = path.partition(":")
    if not colon or not name:
        raise ValueError(f"{argument} must be package.module:name, got {path!r}")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{argument} names {path!r}, and importing {module_name} gives: {error}") from error
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ValueError(f"{argument} names {path!r}, and {module_name} has no {name}") from error
    return found


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
