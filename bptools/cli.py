"""The command line: `bptools bench ops`."""

from __future__ import annotations

import tyro

from bptools import bench


def main() -> None:
    """Run the command line."""
    app = tyro.extras.SubcommandApp()
    app.command(bench.bench)
    app.cli(prog="bptools", description="Backpropagation you can read, check and afford.")
