"""kill -9 at any moment, resume, and end as the run that was left in peace, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).with_name("killed_job.py")


@pytest.mark.parametrize(
    "kills", [pytest.param(2, marks=pytest.mark.release), pytest.param(50, marks=pytest.mark.slow)]
)
def test_a_killed_job_ends_as_if_it_had_not_been(tmp_path, kills):
    args = [sys.executable, str(JOB), str(tmp_path), str(kills), str(kills)]
    done = subprocess.run(args, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    jobs = json.loads(done.stdout.splitlines()[-1])
    assert sum(job["kills"] for job in jobs) >= kills
    assert [job for job in jobs if job["differ"]] == []
