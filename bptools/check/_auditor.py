"""`check_function`: every check, at every sample, in every dtype, with a verdict for each."""

from __future__ import annotations

import contextlib
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bptools.check._check import Check, Failed, Refused, Skipped, describe, load_checks, said
from bptools.check._report import Failure, Report, Result
from bptools.check._subject import Point, Subject, points
from bptools.check.checks.layout import shrunk

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RAISES = "it raises: "
TRIES, SECONDS = 40, 20.0  # for the search of a smaller failing sample

Expectation = str | tuple[type[BaseException], str]


@dataclass(frozen=True)
class Task:
    """One check at one sample in one dtype: what a test item runs."""

    check: Check
    sample: int
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """As it stands in test ids: `0-gradients-float64`."""
        return f"{self.sample}-{self.check.name}-{name_of(self.dtype)}"


def name_of(dtype: torch.dtype) -> str:
    """`float64` of `torch.float64`."""
    return str(dtype).removeprefix("torch.")


class Audit:
    """A function, its samples and its expectations, ready to be asked.

    The arguments are those of `check_function`.
    """

    def __init__(
        self,
        fn: Any,
        samples: Any,
        reference: Callable[..., Any] | None = None,
        checks: str | Iterable[str] = "default",
        dtypes: Sequence[torch.dtype] = DTYPES,
        expect: Mapping[str, Expectation] | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.subject = Subject.of(fn)
        self.reference = _reference(reference, self.subject)
        self.checks = _chosen(checks)
        self.dtypes = _dtypes(dtypes)
        self.expect = _expectations(expect)
        self.samples, self.seed, self.device = samples, seed, str(device)
        self._points: dict[torch.dtype, list[Point]] = {}
        self._base: torch.dtype | None = None

    def points(self, dtype: torch.dtype) -> list[Point]:
        """The samples in one dtype."""
        if dtype not in self._points:
            with torch.random.fork_rng(devices=_cuda(self.device)):
                torch.manual_seed(self.seed)
                self._points[dtype] = points(
                    self.subject, self.samples, dtype, self.device, self.seed, self.reference
                )
        return self._points[dtype]

    @property
    def base(self) -> torch.dtype:
        """The widest dtype of the audit that the function takes: float64, unless it refuses that."""
        if self._base is None:
            self._base = self._find_base()
        return self._base

    def _find_base(self) -> torch.dtype:
        wide = [d for d in self.dtypes if d in (torch.float64, torch.float32)] or [self.dtypes[0]]
        for dtype in wide[:-1]:
            try:
                with torch.random.fork_rng(devices=_cuda(self.device)), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    if (found := self.points(dtype)) and not any(map(_why_not, found)):
                        return dtype
            except Exception:
                continue  # there are no samples in this dtype; what is wrong with them shows in the last one
        return wide[-1]

    def tasks(self) -> Iterator[Task]:
        """Everything there is to ask."""
        narrower = [d for d in self.dtypes if torch.finfo(d).eps > torch.finfo(self.base).eps]
        chosen_by = {"base": [self.base], "low": narrower, "each": [self.base, *narrower], "any": self.dtypes}
        for check in self.checks:
            chosen = chosen_by[check.dtypes]
            for dtype in chosen:
                for i in range(len(self.points(dtype)) or 1):
                    yield Task(check, i, dtype)

    def ask(self, task: Task) -> Result:
        """The verdict on one task."""
        check, started = task.check, time.perf_counter()
        result = Result(check.name, str(task.sample), name_of(task.dtype), "pass")
        with (
            torch.random.fork_rng(devices=_cuda(self.device)),
            warnings.catch_warnings(),
            torch.enable_grad(),
            _threads(check),
        ):
            warnings.simplefilter("ignore")
            try:
                found = self.points(task.dtype)
                if not found:
                    raise Skipped(f"samples gives none in {result.dtype}")
                point = found[task.sample]
                broken = _why_not(point)
                if broken and check.name != "runs":
                    raise Skipped("forward and backward do not run")
                if broken:
                    result.verdict = "fail" if task.dtype is self.base else "unsupported"
                    result.reason = f"{result.dtype}: {broken}"
                    result.failure = Failure(what=f"it does not run: {broken}", sample=describe(point))
                else:
                    _ask(check, point, result)
            except Skipped as skipped:
                result.verdict, result.reason = "skipped", str(skipped)
        _hold_against(self.expect.get(check.name), result)
        result.seconds = time.perf_counter() - started
        return result

    def run(self) -> Report:
        """Ask everything."""
        started = time.perf_counter()
        report = Report(self.subject.name, self.subject.kind, self.seed, self.device)
        for task in self.tasks():
            report.results.append(self.ask(task))
        report.seconds = time.perf_counter() - started
        return report


def check_function(
    fn: Any,
    samples: Any,
    reference: Callable[..., Any] | None = None,
    checks: str | Iterable[str] = "default",
    dtypes: Sequence[torch.dtype] = DTYPES,
    expect: Mapping[str, Expectation] | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Report:
    """Audit a differentiable function, in every way in which its gradients can be wrong.

    Args:
        fn: an `autograd.Function`, its `apply`, a plain function, an `nn.Module` (its parameters are inputs too),
            or a `torch.library.custom_op`.
        samples: what to call it with: a callable `(device, dtype, seed) -> iterable of (args, kwargs)`; or plain
            tensors: a tensor, a tuple of arguments, or a list of such. Tensors that require a gradient are the
            differentiable inputs; plain tensors are cast to each dtype of the audit. Small samples of odd shapes,
            such as (3, 5), say most: other layouts, magnitudes, empty and special values are derived from them.
        reference: a plain differentiable function of the same arguments that is right (for a module: a module with
            the same parameters). Its autograd in float64 is the truth; without one, numerical derivatives are.
        checks: "default", "all", or the names of checks.
        dtypes: which dtypes to look at. Most checks are asked in the widest one that `fn` takes.
        expect: for a check, "unsupported" (it must refuse, by an error), (exception, pattern) (it must refuse with
            this one), or "supported" (a refusal is a failure). Without a word, a clear refusal of what is optional
            (jvp, vmap, double backward, compile) is reported as unsupported and does not fail the audit.
        seed: of samples, output gradients and directions.
        device: where the samples are made.

    Returns:
        The report: `ok`, `failures`, `raise_if_failed()`, `to_json()`; printed, it is the whole story.

    Raises:
        TypeError, ValueError: if an argument is none of what it should be.

    Example:
        >>> x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        >>> check_function(torch.tanh, x).ok
        True
    """
    return Audit(fn, samples, reference, checks, dtypes, expect, seed, device).run()


# Asking -------------------------------------------------------------------------------------------------------


def _why_not(point: Point) -> str:
    """Why the plain forward and backward do not go through; nothing if they do."""
    if point.broken is None:
        try:
            point.plain()
            point.broken = ""
        except Exception as error:
            point.broken = said(error)
    return point.broken


def _ask(check: Check, point: Point, result: Result, *, shrink: bool = True) -> None:
    started = time.perf_counter()
    try:
        check.run(point)
    except Failed as failed:
        result.verdict, result.failure = "fail", failed.failure
    except Skipped as skipped:
        result.verdict, result.reason = "skipped", str(skipped)
    except Refused as refused:
        result.verdict, result.reason = "unsupported", str(refused)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        result.verdict = "fail"
        result.failure = Failure(
            what=RAISES + said(error), got=f"{where.filename}:{where.lineno}", sample=describe(point)
        )
    if result.verdict == "fail":
        result.reason = result.failure.what
        if shrink:
            _shrink(check, point, result, time.perf_counter() - started)


def _shrink(check: Check, point: Point, result: Result, cost: float) -> None:
    """Cut dimensions while the check still fails with the same finding; the report gets the smallest sample."""
    deadline, tries = time.perf_counter() + SECONDS, 0

    def smaller(current: Point) -> Iterator[Point]:
        nonlocal tries
        sizes = sorted({s for x in current.inputs for s in x.shape if s > 1}, reverse=True)
        cuts = [(size, to) for size in sizes for to in dict.fromkeys((1, 2, size // 2)) if 0 < to < size]
        for size, to in cuts:
            if tries >= TRIES or time.perf_counter() + cost > deadline:
                return
            tries += 1
            yield from filter(None, (shrunk(current, size, to, constants=c) for c in (True, False)))

    def still_fails(there: Point) -> bool:
        trial = Result(check.name, result.sample, result.dtype, "pass")
        if _why_not(there):
            return False
        _ask(check, there, trial, shrink=False)
        if trial.verdict != "fail" or not _alike(trial.failure, result.failure):
            return False
        result.failure.sample, result.failure.script = trial.failure.sample, trial.failure.script
        return True

    current: Point | None = point
    while current is not None:
        current = next(filter(still_fails, smaller(current)), None)


def _alike(a: Failure, b: Failure) -> bool:
    """Whether two failures are the same finding."""
    digits = re.compile(r"\d+")
    return (
        digits.sub("#", a.what) == digits.sub("#", b.what) and a.guess == b.guess and not a.what.startswith(RAISES)
    )


def _hold_against(expected: Expectation | None, result: Result) -> None:
    """Turn the verdict into a failure where it is not what was expected."""
    if expected is None or result.verdict == "skipped":
        return
    if expected == "supported":
        if result.verdict == "unsupported":
            result.verdict = "fail"
            result.failure = Failure(what=f"expected to be supported, and refused: {result.reason}")
        return
    reason = result.reason or (result.failure.what if result.failure else "")
    if result.verdict == "pass":
        result.verdict = "fail"
        result.failure = Failure(what="expected to be refused, and it passes: the expectation is stale")
        result.reason = result.failure.what
        return
    if isinstance(expected, tuple):
        kind, pattern = expected
        text = " ".join(filter(None, (reason, str(result.failure.got) if result.failure else "")))
        if kind.__name__ not in text or not re.search(pattern, text):
            result.verdict = "fail"
            result.failure = Failure(what=f"expected {kind.__name__} matching {pattern!r}, got: {text}")
            return
    result.verdict, result.failure = "unsupported", None


@contextlib.contextmanager
def _threads(check: Check) -> Iterator[None]:
    """One thread: on tensors this small, waking others costs more than the work. All, to ask for the bits."""
    before = torch.get_num_threads()
    if check.name == "determinism" or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cuda(device: str) -> list[int]:
    return list(range(torch.cuda.device_count())) if device.startswith("cuda") else []


# Arguments ----------------------------------------------------------------------------------------------------


def _reference(reference: Any, subject: Subject) -> Callable[..., Any] | None:
    if reference is None:
        return None
    other = Subject.of(reference, "reference")
    if (subject.kind == "module") != (other.kind == "module"):
        raise TypeError(
            f"check_function: reference of a {subject.kind} must be "
            f"{'a module with its parameters' if subject.kind == 'module' else 'a function'}, got a {other.kind}"
        )
    return other.call


def _chosen(checks: str | Iterable[str]) -> list[Check]:
    known = load_checks()
    if checks == "all":
        return list(known.values())
    if checks == "default":
        return [c for c in known.values() if c.default]
    names = [checks] if isinstance(checks, str) else list(checks)
    for name in names:
        if name not in known:
            import difflib

            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
            raise ValueError(
                f"check_function: checks must be 'default', 'all' or names of checks, got {name!r}{hint}"
            )
    return [c for c in known.values() if c.name in names or c.name == "runs"]


def _dtypes(dtypes: Sequence[torch.dtype]) -> tuple[torch.dtype, ...]:
    given = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    for dtype in given:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"check_function: dtypes must hold real floating dtypes, got {dtype!r}")
    if not given:
        raise ValueError("check_function: dtypes must hold at least one dtype, got none")
    return tuple(sorted(dict.fromkeys(given), key=lambda d: torch.finfo(d).eps))


def _expectations(expect: Mapping[str, Expectation] | None) -> dict[str, Expectation]:
    known = load_checks()
    for name, value in (expect or {}).items():
        if name not in known:
            raise ValueError(f"check_function: expect names {name!r}; known are {', '.join(known)}")
        pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], type)
        if value not in ("supported", "unsupported") and not pair:
            raise ValueError(
                f"check_function: expect[{name!r}] must be 'supported', 'unsupported' or (exception, pattern), "
                f"got {value!r}"
            )
    return dict(expect or {})
