"""The detection matrix: what torch's own checkers and ours say of every defect of the zoo.

A checker catches a defect if it objects to the broken Function; objecting to the correct twin is a false alarm.
torch's checkers get the same samples in float64, and all that they can be asked for.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._pytree import tree_flatten, tree_unflatten

from bptools.check._auditor import check_function
from bptools.check._report import Report
from bptools.check.zoo import ZOO, Defect

CAUGHT, MISSED, REFUSED, ALARM = "caught", "-", "refused", "FALSE ALARM"
LEGEND = (
    "`gradcheck`, `gradgradcheck`: torch's, with their defaults. `forward-AD`: both again, with "
    "`check_batched_grad`, `check_forward_ad`, `check_batched_forward_grad` and `check_fwd_over_rev`. `opcheck`: "
    "torch.library.opcheck, which refuses what is no custom op. `ours`: check_function with samples alone. "
    "`ours, ref.`: with a reference too."
)


@dataclass
class Row:
    """What each checker says of one defect: of the broken Function, and of its correct twin."""

    defect: Defect
    broken: dict[str, str] = field(default_factory=dict)
    correct: dict[str, str] = field(default_factory=dict)
    found_by: tuple[str, ...] = ()
    alarms: tuple[str, ...] = ()

    def cell(self, checker: str) -> str:
        """One word, or two: what it says of the broken one, and whether it cries wolf."""
        said = self.broken[checker]
        return f"{said}, {ALARM}" if self.correct[checker] == CAUGHT else said


def _torchs(*calls: tuple[Callable[..., Any], dict[str, Any]]) -> Callable[[Defect, Any], str]:
    """Calls of torch's checkers as a function of a defect and one of its two Functions; one objection suffices."""

    def verdict(defect: Defect, function: Any) -> str:
        call, refused = function.apply, False
        for checker, options in calls:
            for args, kwargs in defect.samples("cpu", torch.float64, 0):
                flat, places, bound = _bound(call, args, kwargs)
                try:
                    checker(bound, [flat[i] for i in places], **options)
                except NotImplementedError:
                    refused = True  # the Function does without, and says so
                except Exception:
                    return CAUGHT
        return REFUSED if refused else MISSED

    return verdict


def _bound(call: Callable[..., Any], args: Any, kwargs: Any) -> tuple[list[Any], list[int], Callable[..., Any]]:
    """A call as a function of its differentiable tensors, as gradcheck wants it."""
    flat, spec = tree_flatten((args, kwargs))
    places = [i for i, a in enumerate(flat) if isinstance(a, Tensor) and a.requires_grad]

    def bound(*inputs: Tensor) -> Any:
        torch.manual_seed(0)
        leaves = list(flat)
        for i, x in zip(places, inputs, strict=True):
            leaves[i] = x
        args, kwargs = tree_unflatten(leaves, spec)
        outputs = call(*args, **kwargs)
        return tuple(y for y in outputs if y.requires_grad) if isinstance(outputs, tuple) else outputs

    return flat, places, bound


def _opcheck(defect: Defect, function: Any) -> str:
    for args, kwargs in defect.samples("cpu", torch.float64, 0):
        try:
            torch.library.opcheck(function.apply, args, kwargs)
        except ValueError as error:
            return REFUSED if "opcheck" in str(error) else CAUGHT
        except Exception:
            return CAUGHT
    return MISSED


CHECKERS: dict[str, Callable[[Defect, Any], str]] = {
    "gradcheck": _torchs((gradcheck, {})),
    "gradgradcheck": _torchs((gradgradcheck, {})),
    "forward-AD": _torchs(
        (gradcheck, {"check_batched_grad": True}),
        (gradcheck, {"check_forward_ad": True}),
        (gradcheck, {"check_forward_ad": True, "check_batched_forward_grad": True}),
        (gradgradcheck, {"check_batched_grad": True}),
        (gradgradcheck, {"check_fwd_over_rev": True}),
    ),
    "opcheck": _opcheck,
}
OURS = {"ours": False, "ours, ref.": True}
NAMES = (*CHECKERS, *OURS)


def audit(defect: Defect, function: Any, *, with_reference: bool) -> Report:
    """Ours, with every check."""
    reference = defect.reference if with_reference else None
    return check_function(function, defect.samples, reference=reference, checks="all")


def row(defect: Defect, checkers: Iterable[str] = NAMES) -> Row:
    """One line of the matrix."""
    found = Row(defect)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in checkers:
            if name in CHECKERS:
                found.broken[name] = CHECKERS[name](defect, defect.broken)
                found.correct[name] = CHECKERS[name](defect, defect.correct)
                continue
            broken = audit(defect, defect.broken, with_reference=OURS[name])
            correct = audit(defect, defect.correct, with_reference=OURS[name])
            found.broken[name] = CAUGHT if broken.failures else MISSED
            found.correct[name] = CAUGHT if correct.failures else MISSED
            found.found_by = tuple(dict.fromkeys((*found.found_by, *(r.check for r in broken.failures))))
            found.alarms = tuple(dict.fromkeys((*found.alarms, *(r.check for r in correct.failures))))
    return found


def matrix(numbers: Iterable[int] = (), progress: Callable[[str], None] = lambda said: None) -> list[Row]:
    """The matrix, of all defects or of those with these numbers."""
    chosen = set(numbers)
    rows = []
    for defect in ZOO:
        if not chosen or defect.number in chosen:
            progress(f"{defect.number} {defect.name}")
            rows.append(row(defect))
    return rows


def totals(rows: list[Row]) -> dict[str, tuple[int, int, int]]:
    """For each checker: defects caught, of those that a CPU can show, and false alarms."""
    visible = [r for r in rows if r.defect.visible == "cpu"]
    return {
        name: (
            sum(r.broken[name] == CAUGHT and r.correct[name] != CAUGHT for r in visible),
            len(visible),
            sum(r.correct[name] == CAUGHT for r in rows),
        )
        for name in NAMES
    }


def summary(rows: list[Row]) -> str:
    """The matrix by family of defects, in Markdown: caught, of those that a CPU can show."""
    families: dict[str, list[Row]] = {}
    for r in rows:
        families.setdefault(r.defect.broken.__module__.rpartition(".")[2], []).append(r)
    lines = ["| defects of | " + " | ".join(NAMES) + " |", "|" + "---|" * (len(NAMES) + 1)]
    for family, some in [*families.items(), ("**all**", rows)]:
        lines.append(f"| {family} | " + " | ".join(f"{c} of {n}" for c, n, _ in totals(some).values()) + " |")
    alarms = " | ".join(str(a) for _, _, a in totals(rows).values())
    return "\n".join([*lines, f"| false alarms on {len(rows)} correct twins | {alarms} |"])


def markdown(rows: list[Row]) -> str:
    """The matrix as a page."""
    head = ["", "defect", *NAMES, "found by"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        mark = " (needs a GPU)" if r.defect.visible != "cpu" else ""
        cells = [str(r.defect.number), r.defect.title + mark, *(r.cell(n) for n in NAMES), _few(r.found_by)]
        lines.append("| " + " | ".join(cells) + " |")
    return PAGE.format(
        version=torch.__version__.split("+")[0], legend=LEGEND, summary=summary(rows), table="\n".join(lines)
    )


def _few(names: tuple[str, ...], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


PAGE = """# What the auditor finds that the others do not

`uv run bptools zoo --write DETECTION.md`, torch {version}, on a CPU. Each line is a deliberately broken
`autograd.Function` in `bptools/check/zoo`, beside which stands its correct twin: an objection to the twin is a
false alarm.

{legend}

{summary}

{table}
"""


def zoo(
    numbers: Annotated[tuple[int, ...], tyro.conf.Positional] = (),
    /,
    *,
    write: Path | None = None,
) -> None:
    """Print the detection matrix: torch's checkers and ours on a broken Function for each known defect.

    Args:
        numbers: of the defects to run, and with them the report of each; all, if none is given.
        write: a Markdown file to write the matrix to as well.
    """
    from rich.console import Console
    from rich.table import Table

    known = {d.number for d in ZOO}
    if unknown := sorted(set(numbers) - known):
        said = f"numbers must be among 1 to {max(known)}, got {', '.join(map(str, unknown))}"
        print(f"bptools zoo: {said}", file=sys.stderr)
        raise SystemExit(2)
    console = Console()
    with console.status("") as status:
        rows = matrix(numbers, status.update)
    table = Table(title="what each checker says of a broken Function (and of its correct twin, if it objects)")
    table.add_column("", justify="right")
    table.add_column("defect")
    for name in NAMES:
        table.add_column(name)
    for r in rows:
        table.add_row(str(r.defect.number), r.defect.name, *(_coloured(r.cell(n)) for n in NAMES))
    table.add_section()
    counted = totals(rows)
    table.add_row("", "caught", *(f"{c} of {n}" for c, n, _ in counted.values()))
    table.add_row("", "false alarms", *(str(a) for _, _, a in counted.values()))
    console.print(table)
    for defect in (r.defect for r in rows if numbers):
        console.print(f"\n[bold]{defect.number} {defect.title}[/]")
        console.print(str(audit(defect, defect.broken, with_reference=False)), markup=False, highlight=False)
    if write is not None:
        write.write_text(markdown(rows), encoding="utf-8")


def _coloured(cell: str) -> str:
    colour = {"caught": "green", "-": "red", "refused": "yellow"}.get(cell, "bold red")
    return f"[{colour}]{cell}[/]"
