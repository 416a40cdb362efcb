"""`bptools diagnose`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import torch
import tyro
from rich.markup import escape

from bptools.memory import _models

from ._flow import GradientFlow, comparison, gradient_flow
from ._nonfinite import NonFiniteError, detect_nonfinite


def diagnose(
    models: tyro.conf.Positional[tuple[str, ...]],
    *,
    batch: int = 32,
    size: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    rows: int = 24,
    json: Path | None = None,
    png: Path | None = None,
) -> None:
    """Print how the gradient goes through a model, which units are dead, and where the first NaN is made.

    One training pass with random weights and made-up data. Exit status 1 says that something was not finite.

    Args:
        models: `torchvision:NAME`, `transformers:TYPE`, `transformers:CONFIG.json`, `timm:NAME` or
            `package.module:callable`, such as `bptools.diagnose.examples:deep,activation=sigmoid,depth=30`.
            Several are compared.
        batch: pictures or sequences.
        size: of a picture's side, or the length of a sequence; the usual, if it is not given.
        seed: of weights and data.
        device: where it runs.
        rows: the number of lines for a model; 0 for all.
        json: a file to write everything to: an object, or a list of them for several models.
        png: a file to draw a picture to.
    """
    from rich.console import Console

    if not models:
        _refuse(f"models must be one or more of {_models.FORMS}, got none")
    for path in filter(None, (json, png)):
        if path.is_dir() or not path.parent.is_dir():
            why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            _refuse(f"{path} cannot be written, as {why}")
    try:
        looks = [_look(spec, batch, size, seed, device) for spec in models]
        tables = [flow.table(rows) for flow, _ in looks]
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:  # the last two of devices
        _refuse(f"{error}".splitlines()[0])
    flows, console = [flow for flow, _ in looks], Console()
    console.print(tables[0] if len(flows) == 1 else comparison(flows))
    for flow, origin in looks:
        found = [origin] if origin else [*map(str, flow.findings)]
        if len(flows) > 1:
            console.print(f"[bold]{escape(flow.name)}[/bold]", highlight=False)
        for words in found or ["nothing found"]:
            console.print(f"• {escape(words)}", highlight=False)
    if json is not None:
        parts = ",\n".join(flow.to_json(indent=2) for flow in flows)
        json.write_text(parts if len(flows) == 1 else f"[{parts}]", encoding="utf-8")
    if png is not None:
        from . import _picture

        _picture.save(flows[0].figure() if len(flows) == 1 else _picture.draw_many(flows), png)
    if any(finding.what == "not finite" for flow in flows for finding in flow.findings):
        raise SystemExit(1)


def _look(spec: str, batch: int, size: int | None, seed: int, device: str) -> tuple[GradientFlow, str]:
    """One training pass; if something was not finite a second one, and words for where that was made."""
    loaded = _models.load(spec, batch, size, seed, device)
    before = torch.get_rng_state()
    with gradient_flow(loaded.model) as flow:
        loaded.loss().backward()
    flow.name = spec
    if any(finding.what == "not finite" for finding in flow.findings):
        torch.set_rng_state(before)
        try:
            with detect_nonfinite() as seen:
                loaded.loss().backward()
        except NonFiniteError as error:
            return flow, str(error)
        return flow, f"first infinity: {seen.infinity}" if seen.infinity else ""
    return flow, ""


def _refuse(words: str) -> NoReturn:
    print(f"bptools diagnose: {words}", file=sys.stderr)
    raise SystemExit(2)
