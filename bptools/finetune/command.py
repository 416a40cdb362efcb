"""What a recipe's command does at its edges: errors in one line, the exit status, and being started again."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checkpoint import load_json
from .distributed import leave, shutdown, speaks, tells
from .errors import InputError, one_line
from .lr_search import RateFound
from .run import Stopped


def exit_status(job: Callable[[], int | None]) -> int:
    """Do ``job`` and return the exit status: its own, or that of an error, which one process prints in one line.

    It is 2 for what the user gave or the machine has not (an :class:`InputError`), a loss that is not finite, a
    data worker that died, and other processes that are gone; 128 and the signal's number for a job that was
    stopped. Where there are several processes, this one ends here, with that status.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; it warns of kernels it could use
    try:
        return leave(_status(job))
    except BaseException:
        shutdown()
        raise


def _status(job: Callable[[], int | None]) -> int:
    try:
        return job() or 0
    except Stopped as stop:
        folders = (stop.folder, *stop.folder.parents)
        folder = next((f for f in folders if (f / "config.json").exists()), stop.folder)
        if speaks():
            size = os.environ.get("LOCAL_WORLD_SIZE")
            command = f"torchrun --nproc-per-node {size} {sys.argv[0]}" if size else sys.argv[0]
            print(f"saved; continue: uv run {command} --resume {folder}", flush=True)
        return 128 + stop.signal
    except (InputError, FloatingPointError, ConnectionError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise  # that of a dead worker comes from a signal, wherever the process is
        if tells(error):
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        return 2
    except RateFound:
        return 0
    except KeyboardInterrupt:
        if speaks():
            print("interrupted", file=sys.stderr)
        return 130


def restarted(folder: str | Path) -> bool:
    """Return whether torchrun has started the job in ``folder`` again after a process was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and Path(folder, "config.json").exists()


def load_config(folder: str | Path) -> dict[str, Any]:
    """Return the settings of the job in ``folder``, with tuples where JSON has lists.

    Raises:
        InputError: If it holds none; the message names ``--resume``.
    """
    try:
        settings = load_json(Path(folder, "config.json"))
        return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    except InputError as error:
        raise InputError(f"--resume {folder}: {error}") from error
