"""The command line: `bptools bench`, `bptools check`, `bptools ledger`, `bptools zoo`."""

from __future__ import annotations

import tyro

from bptools import bench
from bptools.check import _command, matrix
from bptools.memory import _ledger


def main() -> None:
    """Run the command line."""
    app = tyro.extras.SubcommandApp()
    app.command(bench.bench)
    app.command(_command.check)
    app.command(_ledger.ledger_command, name="ledger")
    app.command(matrix.zoo)
    app.cli(prog="bptools", description="Backpropagation you can read, check and afford.")
