"""The support matrix: op × capability, as the contract tests of one run have shown it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from deviations import ABSENT, DEVIATIONS
from table import CAPABILITIES, CASES

PAGE = Path(__file__).parents[2] / "SUPPORT.md"

HEAD = """# What every op supports

Written by the tests, never by hand: `uv run pytest tests/ops --write-support` puts every case of every op to
`bptools.check`; of what takes long, compiling above all, the first case alone, and the others before a release
(`-m release`). A cell holds `yes` if every case of that op passed the checks of that column in the run that wrote
this page, and `raises` if the op refuses with a clear error and the test demanded that error; `part` says that
some cases do one and some the other, and the notes say which. The suite fails if a cell is false or the page is
out of date.

"""


TORCH = """
## Where ours differ from torch's

`uv run pytest -m slow tests/ops/test_torch_samples.py` draws what PyTorch's own suite draws for these functions
and modules: values, gradients and errors agree, but for what is listed here, and each line is seen to be true.
*refuses*: ours raises where torch gives a result; *accepts*: the reverse, of a call that PyTorch's suite wants to
fail; *differs*: both give results, and not the same ones. Where torch raises a `RuntimeError`, ours may raise a
`ValueError`, `TypeError` or `IndexError`, and name the argument, what was expected and what came.

"""


class SupportMatrix:
    """Collects what the contract tests report, and renders the page."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.notes: set[str] = set()

    def add(self, passed: bool, op: str, capability: str, verdict: str, note: str) -> None:
        """Take in the outcome of one test."""
        self.cells[op, capability].add(verdict if passed else "FAILS")
        if note:
            self.notes.add(f"- `{op}`, {capability}: {note}")

    def complete(self) -> bool:
        """Whether every cell was run at all."""
        wanted = {(c.op, k) for c in CASES for k in CAPABILITIES if not c.only or k in c.only}
        return wanted <= set(self.cells)

    def render(self) -> str:
        """The page in Markdown."""
        ops = dict.fromkeys(c.op for c in CASES)
        lines = ["| op | " + " | ".join(CAPABILITIES) + " |", "|---" * (len(CAPABILITIES) + 1) + "|"]
        for op in ops:
            found = [self.cells.get((op, k), set()) for k in CAPABILITIES]
            lines.append(f"| {op} | " + " | ".join(_cell(verdicts) for verdicts in found) + " |")
        legend = [f"- **{name}**: {meaning}" for name, (meaning, _, _) in CAPABILITIES.items()]
        notes = ["", "Refused, with the error:", "", *sorted(self.notes)] if self.notes else []
        return HEAD + "\n".join([*lines, "", *legend, *notes]) + "\n" + _deviations()


def _deviations() -> str:
    listed = [f"- `{d.op}` {d.kind}: {d.reason}" for d in sorted(DEVIATIONS, key=lambda d: (d.op, d.kind))]
    absent = [f"- `{name}`: {reason}" for name, reason in sorted(ABSENT.items())]
    return TORCH + "\n".join([*listed, "", "Of torch.nn.functional's, these are absent:", "", *absent]) + "\n"


def _cell(verdicts: set[str]) -> str:
    if "FAILS" in verdicts:
        return "**FAILS**"
    return "part" if len(verdicts) > 1 else next(iter(verdicts), "-")
