"""Writes the support matrix, or checks that the page still says what the tests show."""

from __future__ import annotations

import pytest
from support import PAGE, SupportMatrix

_matrix = SupportMatrix()


def pytest_runtest_logreport(report):
    if report.when == "call" or report.failed:
        for name, value in report.user_properties:
            if name == "support":
                _matrix.add(report.passed, *value)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput") or not _matrix.complete():
        return
    page = _matrix.render()
    if session.config.getoption("--write-support"):
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        session.config.stale_support = True
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if getattr(config, "stale_support", False):
        terminalreporter.write_line(
            "SUPPORT.md does not say what the tests show; run: uv run pytest tests/ops --write-support", red=True
        )
