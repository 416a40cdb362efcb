"""`import bptools` is cheap for those who have imported torch."""

import functools
import os
import subprocess
import sys

import bptools

SCRIPT = """
import time, torch
started = time.perf_counter()
import bptools.functional, bptools.nn
print(time.perf_counter() - started)
"""


def test_import_adds_less_than_a_tenth_of_a_second(tmp_path):
    """Once it is compiled, which the first run does."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    run = functools.partial(subprocess.run, capture_output=True, check=True, env=environment)
    runs = [run([sys.executable, "-c", SCRIPT]) for _ in range(4)]
    assert min(float(run.stdout) for run in runs) < 0.1


def test_heavy_parts_are_imported_on_first_use():
    loaded = (
        "import sys, bptools; print([m for m in ('peft', 'sklearn', 'matplotlib', 'tyro') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", loaded], capture_output=True, check=True, text=True)
    assert run.stdout.strip() == "[]"
    assert bptools.finetune.__name__ == "bptools.finetune"
