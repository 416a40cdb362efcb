"""SyncBatchNorm on two processes is batch norm of the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bptools

WORKER = Path(__file__).with_name("sync_batch_norm_worker.py")
PATH = str(Path(__file__).parents[2])


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)
def test_two_processes(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH, "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(tmp_path / "rendezvous")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)


def test_alone_it_is_batch_norm():
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    ours = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    ours.load_state_dict(theirs.state_dict())
    ours = bptools.nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert type(ours[0]) is bptools.nn.SyncBatchNorm
    x = torch.randn(5, 3)
    for mode in (True, False):
        ours.train(mode), theirs.train(mode)
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize(
    "kwargs", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
def test_converted(kwargs):
    """Parameters and buffers are those of the layer it was; so is its mode."""
    layer = torch.nn.BatchNorm2d(4, **kwargs).eval()
    ours = bptools.nn.SyncBatchNorm.convert_sync_batchnorm(layer, process_group="mine")
    theirs = torch.nn.SyncBatchNorm.convert_sync_batchnorm(layer, process_group="mine")
    assert repr(ours) == repr(theirs)
    assert ours.process_group == "mine"
    assert not ours.training
    for kind in ("parameters", "buffers"):
        mine, torchs = (dict(getattr(m, f"named_{kind}")()) for m in (ours, layer))
        assert mine.keys() == torchs.keys()
        assert all(mine[name] is torchs[name] for name in mine)
