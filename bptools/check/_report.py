"""What an audit found: a verdict for each check, and for each failure the case against the function."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

VERDICTS = ("pass", "fail", "skipped", "unsupported")


@dataclass
class Failure:
    """What is wrong, and where.

    Attributes:
        what: the finding in one sentence.
        input: the name of the input whose gradient (or which itself) is wrong, if one can be named.
        output: the position of the output that is wrong or whose gradient was pulled back.
        index: the index of the largest error in that tensor.
        expected, got: the values there, or what was expected and what came, in words.
        error, allowed: the largest error and what would have passed.
        guess: at the cause.
        sample: the smallest sample found to fail, described.
        script: a standalone script that reproduces the failure with torch alone; it exits with status 1 while the
            defect is there, and with 0 once it is mended.
    """

    what: str
    input: str | None = None
    output: int | None = None
    index: tuple[int, ...] | None = None
    expected: Any = None
    got: Any = None
    error: float | None = None
    allowed: float | None = None
    guess: str | None = None
    sample: str | None = None
    script: str | None = None

    def lines(self) -> list[str]:
        """As text."""
        found = [self.what]
        where = []
        if self.input is not None:
            where.append(f"input {self.input}" + (f"[{', '.join(map(str, self.index))}]" if self.index else ""))
        if self.output is not None:
            place = f"[{', '.join(map(str, self.index))}]" if self.index and self.input is None else ""
            where.append(f"output {self.output}{place}")
        if self.expected is not None or self.got is not None:
            where.append(f"expected {_show(self.expected)}, got {_show(self.got)}")
        if self.error is not None:
            where.append(f"error {self.error:.2e}" + (f", allowed {self.allowed:.2e}" if self.allowed else ""))
        if where:
            found.append("; ".join(where))
        if self.guess:
            found.append(f"guess: {self.guess}")
        if self.sample:
            found.append(f"smallest sample: {self.sample}")
        return found


def _show(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)


@dataclass
class Result:
    """The verdict of one check on one sample in one dtype."""

    check: str
    sample: str
    dtype: str
    verdict: str
    reason: str = ""
    failure: Failure | None = None
    seconds: float = 0.0

    @property
    def key(self) -> str:
        """What names this result in a test id."""
        return f"{self.sample}-{self.check}-{self.dtype}"


@dataclass
class Report:
    """All verdicts of an audit.

    Attributes:
        name: of the function.
        results: one for each check, sample and dtype.
        seed, device: what the samples were drawn with.
        seconds: how long the audit took.
    """

    name: str
    kind: str
    seed: int
    device: str
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing failed and something passed, beyond that it runs. What was skipped has not passed."""
        return not self.failures and any(r.verdict == "pass" and r.check != "runs" for r in self.results)

    @property
    def failures(self) -> list[Result]:
        """The results that failed."""
        return [r for r in self.results if r.verdict == "fail"]

    def verdict(self, check: str) -> str:
        """The verdict of a check over all samples and dtypes: the worst one, and "pass" only if some passed.

        Raises:
            KeyError: if the check was not run.
        """
        found = {r.verdict for r in self.results if r.check == check}
        if not found:
            raise KeyError(check)
        return next(v for v in ("fail", "pass", "unsupported", "skipped") if v in found)

    def raise_if_failed(self) -> None:
        """Raise an AssertionError that holds this report, unless `ok`."""
        if not self.ok:
            raise AssertionError(str(self))

    def to_json(self, indent: int | None = None) -> str:
        """Everything in this report, and the versions it holds for."""
        document = {
            "function": self.name,
            "kind": self.kind,
            "ok": self.ok,
            "seed": self.seed,
            "device": self.device,
            "seconds": round(self.seconds, 3),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "results": [_document(r) for r in self.results],
        }
        return json.dumps(document, indent=indent, allow_nan=False)

    def __str__(self) -> str:
        """The report as text: failures first, with their case, then a line for each verdict."""
        counts = {v: sum(r.verdict == v for r in self.results) for v in VERDICTS}
        said = ", ".join(f"{n} {v if v != 'fail' else 'FAILED'}" for v, n in counts.items() if n)
        lines = [f"{self.name} ({self.kind}, {self.device}, seed {self.seed}): {said}; {self.seconds:.1f} s"]
        for check, group in _grouped(self.failures, lambda r: r.check):
            first, *more = group
            where = f"sample {first.sample}, {first.dtype}"
            others = ", ".join(dict.fromkeys(f"{r.sample} {r.dtype}" for r in more))
            lines.append(f"  FAIL  {check}  ({where}{'; also ' + others if others else ''})")
            text = first.failure.lines() if first.failure else [first.reason]
            lines += [f"          {line}" for entry in text for line in entry.splitlines()]
        passed = [c for c, _ in _grouped(self.results, lambda r: r.check) if self.verdict(c) == "pass"]
        if passed:
            lines += _wrapped("  pass         ", passed)
        for verdict in ("unsupported", "skipped"):
            rest = [r for r in self.results if r.verdict == verdict and self.verdict(r.check) == verdict]
            for reason, group in _grouped(rest, lambda r: r.reason):
                names = ", ".join(dict.fromkeys(r.check for r in group))
                lines.append(f"  {verdict:<13}{names}: {reason}")
        return "\n".join(lines)


def _grouped(results: Sequence[Result], key: Callable[[Result], str]) -> list[tuple[str, list[Result]]]:
    found: dict[str, list[Result]] = {}
    for r in results:
        found.setdefault(key(r), []).append(r)
    return list(found.items())


def _wrapped(head: str, words: Sequence[str], width: int = 110) -> list[str]:
    lines = [head]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append(" " * len(head))
        lines[-1] += word + " "
    return [line.rstrip() for line in lines]


def _document(result: Result) -> dict[str, Any]:
    found = {k: v for k, v in vars(result).items() if k != "failure"}
    found["seconds"] = round(result.seconds, 4)
    if result.failure:
        found["failure"] = {k: _plain(v) for k, v in vars(result.failure).items()}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return str(value)
    return (
        value
        if value is None or isinstance(value, str | int | float)
        else (list(value) if isinstance(value, tuple) else str(value))
    )
