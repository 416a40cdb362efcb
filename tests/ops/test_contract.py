"""The contract that every op keeps: the auditor, asked at every case of the table, in both tiers."""

from __future__ import annotations

import itertools

import pytest
import torch
from table import CAPABILITIES, CASES, Case, Maker
from torch import Tensor

import bptools
from bptools.check import Audit
from bptools.check._subject import Point, Subject

ONCE = ("gradgradcheck", "func", "compile")  # what does not depend on the tier
FIRST = {case.op: case for case in reversed(CASES) if not case.only}


def marks(case: Case, tier: str, capability: str) -> tuple[pytest.MarkDecorator, ...]:
    """What the default suite leaves out of an op's cases after the first: the formula, and to compile."""
    if case is FIRST.get(case.op) or capability in case.only or case.raises:
        return ()
    if capability == "compile":
        return (pytest.mark.release,)
    return (pytest.mark.slow,) if tier == "formula" else ()


QUESTIONS = [
    pytest.param(case, tier, name, id=f"{case}-{tier}-{name}", marks=marks(case, tier, name))
    for case in CASES
    for name in CAPABILITIES
    if not case.only or name in case.only
    for tier in (("auto",) if name in ONCE else ("auto", "formula"))
]


def audit(case: Case, capability: str, only: tuple[str, ...] = ()) -> Audit:
    """The questions of one capability, or ``only`` some. What is not declared as refused must be supported."""
    _, checks, against_torch = CAPABILITIES[capability]
    checks = only or checks
    expect = {name: "supported" for name in checks if name != "empty"}  # derived sizes of 0 may make no sense
    return Audit(
        case.plain("ours"),
        lambda device, dtype, seed: [case.make(Maker(dtype, seed))],
        reference=case.plain("theirs") if against_torch else None,
        checks=checks,
        expect={name: case.raises.get(name, verdict) for name, verdict in expect.items()},
    )


@pytest.mark.parametrize(("case", "tier", "capability"), QUESTIONS)
def test_contract(case, tier, capability, record_property):
    refused = [(name, how) for name, how in case.raises.items() if name in CAPABILITIES[capability][1]]
    for name, (kind, pattern) in refused:
        note = f'{case.id}, {name}: {kind.__name__}, "{pattern}"'
        record_property("support", [case.op, capability, "raises", note])
    if not refused:
        record_property("support", [case.op, capability, "yes", ""])
    only = ("compiled_dynamic",) if capability == "compile" and case is FIRST.get(case.op) and not refused else ()
    with bptools.backend(tier):
        report = audit(case, capability, only).run()
    assert not report.failures, str(report)
    assert refused or report.ok, f"nothing was asked:\n{report}"


@pytest.mark.release
@pytest.mark.parametrize("case", [c for c in FIRST.values() if not c.raises], ids=str)
def test_compiled_for_one_size(case):
    """What the default suite compiles with sizes as symbols alone."""
    report = audit(case, "compile", ("compiled",)).run()
    assert report.ok, str(report)


# What is ours alone to promise -----------------------------------------------------------------------------------


def point(case: Case, whose: str = "ours", dtype: torch.dtype = torch.float64) -> Point:
    """A case as the auditor sees it."""
    args, kwargs = case.make(Maker(dtype))
    return Point(Subject.of(case.plain(whose)), args, kwargs)


@pytest.mark.parametrize("tier", ["auto", "formula"])
@pytest.mark.parametrize("case", [c for c in CASES if not c.only], ids=str)
def test_memory(case, tier):
    """A frozen input costs no memory, and nothing is kept where nothing is differentiated."""
    with bptools.backend(tier):
        here = point(case)
        everything = kept_bytes(here, here.inputs)
        for mask in itertools.product((True, False), repeat=len(here.inputs)):
            inputs = [x.detach().requires_grad_(m) for x, m in zip(here.inputs, mask, strict=True)]
            kept = kept_bytes(here, inputs)
            assert kept <= everything if any(mask) else kept == 0
        with torch.no_grad():
            assert kept_bytes(here, here.inputs) == 0


def kept_bytes(here: Point, inputs: list[Tensor]) -> int:
    """Bytes that a call keeps for its backward, beside its own frozen inputs."""
    kept = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    call = here.bind(here.subject.call, fresh=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(*inputs)
    own = {x.untyped_storage().data_ptr() for x in inputs if not x.requires_grad}
    own |= {t.untyped_storage().data_ptr() for _, t in here.others}
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("case", [c for c in CASES if not c.only or "autocast" in c.only], ids=str)
def test_autocast_dtypes(case, dtype):
    """Under autocast the result is in the dtype in which torch's is."""
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (point(case, whose, dtype).plain()[0][0] for whose in ("ours", "theirs"))
    assert ours.dtype is theirs.dtype


# Of three dimensions, the windows of pooling are so many lines of C++ that these take minutes to compile.
FUSED = {c.op: c for c in reversed(CASES) if not c.random and "pool3d" not in c.op}
SOME_FUSED = ("cross_entropy", "embedding", "gelu", "layer_norm", "linear", "softmax")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if op in SOME_FUSED else pytest.mark.release)
        for op, case in FUSED.items()
    ],
    ids=str,
)
def test_fused(case):
    """The formula, compiled by Inductor, equals the formula. No column of the matrix: compiling takes its time."""
    results = {}
    for tier in ("formula", "fused"):
        with bptools.backend(tier):
            outputs, _, gradients = point(case, dtype=torch.float32).plain()
            results[tier] = [*outputs, *gradients]
    torch.testing.assert_close(results["fused"], results["formula"], rtol=1e-4, atol=1e-5, equal_nan=True)
