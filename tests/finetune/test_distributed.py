import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from torch import nn

import bptools.nn
from bptools.finetune.distributed import Parallel, _synchronise_norms, job_time, parallel_from_env
from bptools.finetune.errors import InputError

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)
KINDS = ("ddp", "fsdp")
CHECKS = (
    "gradient", "unfreezing", "fsdp:tied", "early_optimizer", "collectives",
    *(f"{kind}:{action}" for kind in KINDS for action in ("save", "load", "load-lone", "train")), "lost_peer",
)  # fmt: skip
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")


def python(*arguments):
    environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN} | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        _, said = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its own processes
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said[-5000:]


def launch(size, folder, *checks):
    python(worker.__file__, "launch", size, folder, *checks)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(size) if (folder / f"rank{rank}.pt").exists()]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """What two processes found, and a lone one before them; `lost_peer` leaves the first of the two alone."""
    folder = tmp_path_factory.mktemp("job")
    lone = worker.save(Parallel(), folder / "lone")
    [found] = launch(2, folder, *CHECKS)
    return found | {"folder": folder, "lone": lone}


def same(found, expected):
    """Equal to the last bit, under the same names."""
    return found["groups"] == expected["groups"] and all(
        found[part].keys() == expected[part].keys()
        and all(torch.equal(found[part][name], expected[part][name]) for name in expected[part])
        for part in ("model", "states")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_compute_what_one_does(job, kind):
    assert job["gradient"][kind] < 1e-12
    assert job["gradient"][f"{kind} buffers"] < 1e-12
    assert job["gradient"][f"{kind} naive"] > 1e-2  # a mean of means
    assert job["gradient"][f"{kind} same after evaluation"]


def test_unfreezing_wraps_again(job):
    found = job["unfreezing"]
    for kind in KINDS:
        assert found[f"{kind} frozen"] < 1e-12
        assert found[kind] < 1e-12
    assert found["ddp without wrapping again"] > 1e-2  # each process has its own gradient
    assert found["nothing to train"]


def test_tied_weights_stay_tied_in_shards(job):
    found = job["fsdp:tied"]
    assert found["off"] < 1e-12
    assert found["tied"]
    assert found["sharded"] == ["", "layers.0", "layers.1"]
    assert same(found["loaded"], found["saved"])


def test_an_optimizer_made_before_sharding_is_noticed(job):
    assert job["gradient"]["ddp keeps parameters"]
    assert not job["gradient"]["fsdp keeps parameters"]
    assert job["early_optimizer"]["ddp"] == ""
    assert "it lacks 14, such as 'stem.weight'" in job["early_optimizer"]["fsdp"]


def test_what_processes_tell_each_other(job):
    found = job["collectives"]
    assert found["sum"] == [2.0, 2.0**54, -1.0]
    assert found["any"] == [True, False]
    assert found["broadcast"] == {"rank": 0}
    assert found["gather"] == [("a", 0), ("a", 1)]
    assert found["share"] == [0, 2, 4]
    assert found["again"]


def test_a_lost_process_is_one_line(job):
    message = job["lost_peer"]["error"]
    assert message.startswith("process 0: another process is gone")
    assert "\n" not in message
    assert len(message) < 250


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_as_if_nothing_had_happened(job, kind):
    saved, loaded = job[f"{kind}:save"], job[f"{kind}:load"]
    assert len(saved["saved"]["states"]) == 6  # the rest has made no step
    assert same(loaded["loaded"], saved["saved"])
    assert torch.equal(loaded["averages"], saved["averages"])
    assert torch.equal(loaded["drawn"], saved["drawn"])
    assert same(loaded["end"], saved["end"])
    extra = loaded["extra"]
    assert (extra["step"], extra["curve"], extra["mask"].tolist()) == (2, [1.5, (2, "x")], [0, 1, 2])


@pytest.mark.parametrize("kind", KINDS)
def test_from_one_process_to_two_and_back(job, kind):
    pairs = [
        (job[f"{kind}:load-lone"], job["lone"]),
        (worker.load(Parallel(), job["folder"] / kind), job[f"{kind}:save"]),
    ]
    for loaded, saved in pairs:
        assert same(loaded["loaded"], saved["saved"])
        assert torch.equal(loaded["averages"], saved["averages"])
        assert loaded["extra"]["random"] is None
        for name, value in saved["end"]["model"].items():
            torch.testing.assert_close(loaded["end"]["model"][name], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "kind", [pytest.param("ddp", marks=pytest.mark.release), pytest.param("fsdp", marks=pytest.mark.slow)]
)
def test_from_two_processes_to_three(job, kind):
    for found in launch(3, job["folder"], f"{kind}:load"):
        assert same(found[f"{kind}:load"]["loaded"], job[f"{kind}:save"]["saved"])


@pytest.mark.parametrize(
    "kind", [pytest.param("ddp", marks=pytest.mark.release), pytest.param("fsdp", marks=pytest.mark.slow)]
)
def test_a_killed_process_costs_at_most_one_interval(job, kind, tmp_path):
    run = "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 2
    python("-m", *run, "--monitor-interval", 0.2, worker.__file__, "train", tmp_path, kind, 5)
    lines = [line.split() for line in (tmp_path / "log.txt").read_text().splitlines()]
    attempts = [[int(step) for attempt, step, _ in lines if attempt == number] for number in "01"]
    assert attempts == [[0, 1, 2, 3, 4, 5], [3, 4, 5, 6]]
    redone = set(attempts[0][:-1]) & set(attempts[1])
    assert len(redone) <= worker.INTERVAL
    assert len({time for _, _, time in lines}) == 1  # the folder of the job keeps its name
    assert same(torch.load(tmp_path / "end.pt"), job[f"{kind}:train"])


class Odd(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).relu()


def test_only_plain_batch_norms_are_exchanged(caplog):
    shared = nn.BatchNorm1d(3)
    model = nn.Sequential(shared, nn.Sequential(bptools.nn.BatchNorm1d(3), shared), Odd(3), nn.LayerNorm(3))
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    _synchronise_norms(model)
    assert [type(m) for m in (model[0], model[1][0], model[1][1])] == [bptools.nn.SyncBatchNorm] * 3
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert all(before[name] is tensor for name, tensor in after.items())
    assert type(model[2]) is Odd  # or its activation would be lost
    assert caplog.messages == [
        "2 is a Odd: it normalises with the statistics of each process's own share of a batch"
    ]


def test_a_lone_process_needs_no_group():
    some = Parallel()
    model = nn.Linear(2, 2)
    assert some.main
    assert some.wrap(model) is some.rewrap(model) is model
    assert (some.sum([1, 2.5]), some.any(True), some.broadcast("x"), some.gather(3)) == ([1, 2.5], True, "x", [3])
    some.barrier()
    assert len(job_time()) == len("2026-01-31_23-59-59")


def test_a_batch_has_something_for_each():
    parts = [Parallel(rank=rank, size=3).share(list(range(8))) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == list(range(8))
    with pytest.raises(InputError, match=r"^--batch-size: .* each of 3 processes, got 2"):
        Parallel(rank=0, size=3).share([1, 2])
    with pytest.raises(InputError, match=r"^--episodes: expected "):
        Parallel(rank=0, size=3).share([1, 2], "--episodes")


@pytest.fixture
def environment(monkeypatch):
    def torchrun(size):
        values = {"RANK": "0", "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
        for name, value in (values | {"LOCAL_WORLD_SIZE": str(size)}).items():
            monkeypatch.setenv(name, value)

    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    return torchrun


def test_kind_and_number_of_processes_go_together(environment, monkeypatch):
    assert parallel_from_env("auto", "cpu") == parallel_from_env("none") == Parallel()
    for kind in KINDS:
        with pytest.raises(
            InputError, match=rf"^--parallel {kind}: .*torchrun --nproc-per-node 2 .*--parallel {kind}"
        ):
            parallel_from_env(kind)
    with pytest.raises(InputError, match=r"--parallel: expected one of auto, none, ddp, fsdp, got 'dp'"):
        parallel_from_env("dp")
    environment(1)
    assert parallel_from_env("auto", "cuda:3") == Parallel(device="cuda:3")
    environment(2)
    with pytest.raises(InputError, match="--parallel none: expected one process, got 2"):
        parallel_from_env("none")
    with pytest.raises(InputError, match="--device: expected cpu or cuda under torchrun, got cuda:1"):
        parallel_from_env("auto", "cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"--device cuda: .* each of 2 processes .* got 1; .*--nproc-per-node 1"):
        parallel_from_env("auto", "cuda")
