"""The pytest plugin: one test item for each sample, check and dtype of an audited function.

A test asks for the fixture `audit` and says with the marker `bptools` what is to be audited; the marker takes what
`check_function` takes::

    @pytest.mark.bptools(Square, samples, reference=torch.square)
    def test_square(audit):
        audit()

The items are called `test_square[Square-0-gradients-float64]` and so on, so that `-k` and `-n` work on them. What
was skipped or is unsupported is shown as skipped, with the reason: it has not passed. `--bptools-seed` and
`--bptools-device` choose the samples. The ini option `bptools_known_failures` names a file with a line
`item: reason` for each item that is known to fail; an item that no longer does, or is not there, fails the run.

pytest loads this module in every run: it imports nothing but pytest until a marker asks for more.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import pytest

_KNOWN = pytest.StashKey[dict]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's options."""
    group = parser.getgroup("bptools", "audits of autograd Functions")
    group.addoption("--bptools-seed", type=int, default=0, help="seed of samples and directions (default: 0)")
    group.addoption("--bptools-device", default="cpu", help="device of the samples (default: cpu)")
    parser.addini("bptools_known_failures", "a file of known failures: a line `item: reason` each", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Announce the marker, read the known failures."""
    config.addinivalue_line(
        "markers",
        "bptools(fn, samples, **options): audit a function; takes what bptools.check.check_function takes",
    )
    config.stash[_KNOWN] = _known_failures(config)


def _known_failures(config: pytest.Config) -> dict[str, str]:
    """Pattern of an item -> reason."""
    name = config.getini("bptools_known_failures")
    if not name:
        return {}
    path = Path(config.rootpath, name)
    if not path.exists():
        raise pytest.UsageError(f"bptools_known_failures names {name}, and there is no such file")
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        item, colon, reason = line.rpartition(": ")
        if not colon or not reason.strip():
            raise pytest.UsageError(f"{name}:{number}: expected `item: reason`, got {line!r}")
        found[item.strip()] = reason.strip()
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One item for each question of each marker."""
    if "audit" not in metafunc.fixturenames:
        return
    markers = list(metafunc.definition.iter_markers("bptools"))
    if not markers:
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: the fixture audit needs the marker bptools(fn, samples, ...)"
        )
    parameters = []
    for marker in reversed(markers):
        audit = _audit(metafunc.config, marker)
        for task in audit.tasks():
            parameters.append(pytest.param((audit, task), id=f"{audit.subject.name}-{task.key}"))
    metafunc.parametrize("audit", parameters, indirect=True)


def _audit(config: pytest.Config, marker: pytest.Mark) -> Any:
    from bptools.check import Audit

    options = {
        "seed": config.getoption("--bptools-seed"),
        "device": config.getoption("--bptools-device"),
        **marker.kwargs,
    }
    return Audit(*marker.args, **options)


@pytest.fixture
def audit(request: pytest.FixtureRequest) -> Any:
    """Asks one question of the function that the marker `bptools` names; fails the test if the answer is wrong."""
    subject, task = request.param

    def ask() -> None:
        result = subject.ask(task)
        known = _reason(request.config, request.node.nodeid)
        if result.verdict == "fail":
            said = "\n".join(result.failure.lines()) if result.failure else result.reason
            if known:
                pytest.xfail(f"{known} ({result.reason})")
            script = result.failure.script if result.failure else None
            if script:
                request.node.add_report_section("call", "script that reproduces it", script)
            pytest.fail(f"{subject.subject.name}, {task.key}:\n{said}", pytrace=False)
        if known:
            pytest.fail(
                f"{task.key} is a known failure ({known}) and does not fail: take it off the list", pytrace=False
            )
        if result.verdict != "pass":
            pytest.skip(f"{result.verdict}: {result.reason}")

    return ask


def _reason(config: pytest.Config, nodeid: str) -> str | None:
    for pattern, reason in config.stash[_KNOWN].items():
        if _matches(nodeid, pattern):
            return reason
    return None


def _matches(nodeid: str, pattern: str) -> bool:
    escaped = pattern.replace("[", "[[]")
    return nodeid == pattern or fnmatch.fnmatchcase(nodeid, escaped)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A known failure that names nothing is stale too, wherever its file was collected whole."""
    if not config.stash[_KNOWN]:
        return
    ids = [item.nodeid for item in items]
    files = {nodeid.split("::")[0] for nodeid in ids}
    named = any("::" in str(arg) for arg in config.args)
    for pattern in config.stash[_KNOWN]:
        if not named and pattern.split("::")[0] in files and not any(_matches(i, pattern) for i in ids):
            raise pytest.UsageError(f"bptools_known_failures names {pattern}, and there is no such item")
