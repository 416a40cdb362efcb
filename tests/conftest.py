import sys

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--write-support", action="store_true", help="write SUPPORT.md from the contract tests of this run"
    )


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_bptools(monkeypatch, capsys):
    """Run the command line: its exit status, stdout and stderr."""

    def go(*arguments):
        from bptools import cli

        monkeypatch.setattr(sys, "argv", ["bptools", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return go
