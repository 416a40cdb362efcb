"""``recipes/vision.py`` under torchrun: interrupted, killed, started again, and with an error in one process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from torchvision.models import get_model

from bptools.finetune import load_checkpoint, load_json

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "vision.py"
TINY = ("--seeds", "1", "--epochs", "2", "--strategy", "discriminative", "--batch-size", "100", "--phases",
        "head:1", "all:1", "--save-every", "0", "--device", "cpu")  # fmt: skip
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")


class Job:
    """The recipe in a process of its own, or in ``size`` of torchrun."""

    def __init__(self, folder, size, *args, restarts=0):
        environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            size,
            "--max-restarts",
            restarts,
        ]
        command = [sys.executable, *(launcher if size else []), RECIPE, *args]
        folder.mkdir(exist_ok=True)
        self.files = folder / "stdout", folder / "stderr"
        with open(self.files[0], "w") as out, open(self.files[1], "w") as err:
            self.process = subprocess.Popen(
                list(map(str, command)), env=environment, cwd=folder, stdout=out, stderr=err
            )

    def workers(self):
        return [
            child
            for child in psutil.Process(self.process.pid).children()
            if child.is_running() and str(RECIPE) in child.cmdline()
        ]

    def end(self, seconds=300):
        """Wait for the end; return exit status, stdout and stderr."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.terminate()  # torchrun ends its own processes
            self.process.wait(60)
            pytest.fail(f"does not end: {self.files[1].read_text()[-3000:]}")
        return self.process.returncode, *(path.read_text() for path in self.files)


def run(folder, size, *args, **options):
    status, out, err = Job(folder, size, *args, **options).end()
    assert status == 0, err[-3000:]
    return out, err


def wait_for_checkpoint(folder, run, seconds=180):
    """Wait until ``run`` of the job in ``folder`` has a checkpoint."""
    for _ in range(seconds * 100):
        for pattern in ("last.pt", "sharded/*/manifest.json"):
            if any(folder.glob(f"seed0/{run}/{pattern}")):
                return
        time.sleep(0.01)
    pytest.fail(f"no checkpoint of {run} in {folder}")


def sharded_state(folder):
    """Whatever tensors the newest sharded checkpoint holds of the model and the optimizer."""
    reader = dcp.FileSystemReader(max(folder.glob("0*")))
    entries = reader.read_metadata().state_dict_metadata
    state = {k: torch.empty(e.size, dtype=e.properties.dtype) for k, e in entries.items() if k != "plain"}
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(state, storage_reader=reader, planner=planner, no_dist=True)
    return state


def results(folder):
    """All that a job came to, but for times; and the weights kept, by file."""
    done = {str(p.parent.relative_to(folder)): load_json(p) for p in sorted(folder.glob("seed*/*/result.json"))}
    weights = {p.relative_to(folder): load_checkpoint(p)["model"] for p in folder.glob("seed*/*/*t.pt")}
    weights |= {p.relative_to(folder): sharded_state(p) for p in folder.glob("seed*/*/sharded")}
    return {k: {n: v for n, v in r.items() if n != "seconds"} for k, r in done.items()}, weights


def assert_same(folder, other):
    (a, weights), (b, others) = results(folder), results(other)
    assert a == b
    assert len(weights) == 4
    assert weights.keys() == others.keys()
    for path, state in weights.items():
        assert all(torch.equal(v, others[path][k]) for k, v in state.items()), path


def assert_close(folder, other):
    a, b = (load_json(f / "seed0" / "discriminative" / "result.json") for f in (folder, other))
    assert a["loss"] == pytest.approx(b["loss"], rel=0.1)
    assert a["accuracy"] == pytest.approx(b["accuracy"], abs=15)
    assert len(a["history"]) == len(b["history"]) == 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The job in two processes without a disturbance, by kind: made when first asked for."""
    jobs = {}

    def finish(kind):
        if kind not in jobs:
            folder = tmp_path_factory.mktemp(kind)
            jobs[kind] = folder / "job", *run(folder, 2, *TINY, "--parallel", kind, "--log-dir", folder / "job")
        return jobs[kind]

    return finish


@pytest.mark.parametrize(
    "kind", [pytest.param("ddp", marks=pytest.mark.slow), pytest.param("fsdp", marks=pytest.mark.release)]
)
def test_two_processes_print_once_and_learn_what_one_does(finished, kind, tmp_path):
    folder, out, err = finished(kind)
    assert err == ""
    lines = [line for line in out.splitlines() if re.match(r"seed 0|inverted digits|logs:|picture:", line)]
    assert [line.split()[:3] for line in lines[:3]] == [
        ["seed", "0", name] for name in ("pretrain", "zero-shot", "discriminative")
    ]
    assert len(lines) == 6
    run(tmp_path, 0, *TINY, "--log-dir", tmp_path / "one")
    assert_close(folder, tmp_path / "one")


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        pytest.param("ddp", "SIGTERM", marks=pytest.mark.release),
        pytest.param("ddp", "SIGKILL", marks=pytest.mark.release),
        pytest.param("fsdp", "SIGINT to a worker", marks=pytest.mark.slow),
    ],
)
def test_interrupted_and_resumed_ends_as_if_it_had_not_been(finished, kind, way, tmp_path):
    job = Job(tmp_path, 2, *TINY, "--parallel", kind, "--log-dir", tmp_path / "job")
    wait_for_checkpoint(tmp_path / "job", "pretrain")
    workers, number = job.workers(), getattr(signal, way.split()[0])
    for process in {"SIGKILL": [job.process, *workers], "SIGINT to a worker": [workers[1]]}.get(
        way, [job.process]
    ):
        process.send_signal(number)
    status, out, err = job.end(120)
    psutil.wait_procs(workers, 60)
    assert status != 0
    assert not list(tmp_path.glob("job/seed0/discriminative"))
    if way != "SIGKILL":
        command = rf"uv run torchrun --nproc-per-node 2 {RECIPE} --resume {tmp_path / 'job'}"
        assert len(re.findall(rf"^saved; continue: {command}$", out, re.M)) == 1
        assert err.count("stopping after this step") <= 1
        assert "error: " not in err
    out, err = run(tmp_path, 2, "--resume", tmp_path / "job")
    assert err == ""
    assert_same(tmp_path / "job", finished(kind)[0])


@pytest.mark.release
@pytest.mark.parametrize(("kind", "size"), [("ddp", 3)])
def test_goes_on_with_another_number_of_processes(finished, kind, size, tmp_path):
    job = Job(tmp_path, 2, *TINY, "--parallel", kind, "--log-dir", tmp_path / "job")
    wait_for_checkpoint(tmp_path / "job", "discriminative")
    job.process.terminate()
    job.end(120)
    out, err = run(tmp_path, size, "--resume", tmp_path / "job")
    assert out.count("inverted digits, small") == 1
    assert err.count("another number of processes") == len(err.splitlines()) <= 1
    assert_close(tmp_path / "job", finished(kind)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "named"), [("fsdp", False)])
def test_torchrun_starts_again_after_a_process_was_killed(finished, kind, named, tmp_path):
    folder = ["--log-dir", tmp_path / "job"] if named else []
    job = Job(tmp_path, 2, *TINY, "--parallel", kind, *folder, restarts=1)
    where = tmp_path / "job"
    while not named and job.process.poll() is None:
        if made := list(tmp_path.glob("runs/vision/*/config.json")):
            where = made[0].parent
            break
        time.sleep(0.01)
    wait_for_checkpoint(where, "pretrain")
    first = job.workers()
    first[1].kill()
    psutil.wait_procs(first, 60)
    taken = json.loads((where / "config.json").read_text())["save_every"]
    assert taken == 0
    status, out, err = job.end()
    assert status == 0, err[-3000:]
    assert len(list(tmp_path.glob("runs/vision/*"))) == (not named)
    assert out.count("inverted digits, small") == 1
    assert_same(where, finished(kind)[0])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for name, shade in (("cat", 60), ("dog", 180)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.normal(shade, 40, (40, 36, 3)).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    torch.manual_seed(0)
    torch.save(get_model("resnet18", weights=None).state_dict(), root / "resnet18.pth")
    return root


def of_images(root):
    return ("--data", root, "--weights", root / "resnet18.pth", "--size", "32", "--batch-size", "4", "--epochs",
            "2", "--phases", "head:1", "layer4+head:1", "--device", "cpu")  # fmt: skip


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_ends_all(images, tmp_path):
    data = tmp_path / "data"
    for path in images.glob("*/*/*.png"):
        copy = data / path.relative_to(images)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    (data / "train" / "cat" / "1.png").unlink()
    (data / "train" / "cat" / "1.png").write_bytes(b"no image")
    (data / "resnet18.pth").symlink_to(images / "resnet18.pth")
    job = Job(tmp_path, 2, *of_images(data), "--workers", "1", "--log-dir", tmp_path / "job")
    status, _, err = job.end(120)
    assert status != 0
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: cannot read image {data / 'train' / 'cat' / '1.png'}")
    assert line.endswith("the run is saved as of its last checkpoint")


@pytest.mark.slow
def test_a_killed_data_worker_ends_all(images, tmp_path):
    args = [*of_images(images), "--epochs", "500", "--phases", "all:500", "--patience", "0", "--save-every", "0"]
    job = Job(tmp_path, 2, *args, "--workers", "1", "--log-dir", tmp_path / "job")
    wait_for_checkpoint(tmp_path / "job", "discriminative")
    while not (loaders := [child for worker in job.workers()[1:] for child in worker.children()]):
        time.sleep(0.01)
    loaders[0].kill()
    status, _, err = job.end(120)
    assert status != 0
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: DataLoader worker \(pid.*\) .*(killed|exited unexpectedly)", line)


@pytest.mark.release
def test_torchruns_signal_leaves_data_workers_alone(images, tmp_path):
    args = [*of_images(images), "--epochs", "500", "--phases", "all:500", "--patience", "0", "--save-every", "0"]
    job = Job(tmp_path, 2, *args, "--workers", "1", "--log-dir", tmp_path / "job")
    wait_for_checkpoint(tmp_path / "job", "discriminative")
    job.process.terminate()
    _, out, err = job.end(120)
    assert out.count("saved; continue: ") == 1
    assert "error: " not in err


@pytest.mark.slow
@pytest.mark.parametrize("args", [["--lr", "-1"]])
def test_what_all_refuse_is_said_once(args, tmp_path):
    status, out, err = Job(tmp_path, 2, *args, "--device", "cpu").end(120)
    said = out + err
    assert status != 0
    assert said.count(args[0]) - said.count(str(RECIPE)) <= 2
    assert len([line for line in said.splitlines() if re.search(r"^error: |Unrecognized options:", line)]) == 1
    assert not (tmp_path / "runs").exists()
