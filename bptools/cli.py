"""The command line: `bptools bench`, `check`, `diagnose`, `ledger`, `recipes`, `zoo`."""

from __future__ import annotations

import sys

import tyro

from bptools.recipe_files import recipes


def main() -> None:
    """Run the command line."""
    app = tyro.extras.SubcommandApp()
    app.command(recipes)
    if sys.argv[1:2] != ["recipes"]:  # which does without torch
        from bptools import bench
        from bptools.check import _command, matrix
        from bptools.diagnose import _command as _diagnose
        from bptools.memory import _ledger

        app.command(bench.bench)
        app.command(_command.check)
        app.command(_diagnose.diagnose)
        app.command(_ledger.ledger_command, name="ledger")
        app.command(matrix.zoo)
    app.cli(
        prog="bptools",
        description="Backpropagation you can read, check and afford.",
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
