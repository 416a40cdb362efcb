"""``recipes/policy.py``: exact resume, mistakes in one line, and, in the slow tier, what its card claims."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import Stop, load_recipe
from PIL import Image

from bptools.finetune import job, load_checkpoint, load_json
from bptools.finetune.verify import flatten, same

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "policy.py"
TINY = ("--seeds", "1", "--epochs", "2", "--batch-size", "4", "--episodes", "4", "--limit", "60", "--goal", "475",
        "--hidden", "8", "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module")
def policy():
    return load_recipe(RECIPE, "policy")


def results(folder):
    """All that a job came to, but for times; and its checkpoints."""
    done = {str(p.parent.relative_to(folder)): load_json(p) for p in sorted(folder.glob("seed*/*/result.json"))}
    kept = {str(p.relative_to(folder)): flatten(load_checkpoint(p)) for p in folder.glob("seed*/*/*t.pt")}
    return {k: {n: v for n, v in r.items() if n != "seconds"} for k, r in done.items()}, kept


@pytest.fixture(scope="module")
def finished(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "job"
    assert policy.main([*TINY, "--log-dir", str(folder)]) == 0
    return folder


def test_the_job_leaves_its_card_logs_and_results(finished):
    done, kept = results(finished)
    assert set(done) == {f"seed0/{n}" for n in ("random", "none", "mean", "learned")}
    assert len(kept) == 6
    for name in ("none", "mean", "learned"):
        assert done[f"seed0/{name}"]["episodes"] == 16
        assert len(done[f"seed0/{name}"]["history"]) == 2
        assert not done[f"seed0/{name}"]["solved"]
    first = done["seed0/learned"]["history"][0]
    assert all(first[f"variance {name}"] > 0 for name in ("none", "mean", "learned"))
    with Image.open(finished / "card.png") as picture:
        assert picture.width > 1500
    assert len(list(finished.glob("seed0/*/events.out.tfevents.*"))) == 3


def test_an_interrupted_job_plays_the_same_episodes(policy, finished, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "job"
    args = [*TINY, "--log-dir", str(folder)]
    for stop in (2, 5, 7):
        monkeypatch.setattr(job, "Interrupt", lambda stop=stop: Stop(stop))
        assert policy.main(args) == 128 + signal.SIGINT
        torch.manual_seed(123)  # whatever the generators hold
        args = re.search(r"continue: uv run .* (--resume .*)", capsys.readouterr().out)[1].split()
    monkeypatch.undo()
    assert policy.main(args) == 0
    (done, kept), (whole, others) = results(folder), results(finished)
    assert done == whole
    assert kept.keys() == others.keys()
    for path, state in kept.items():
        differ = [name for name in state if not same(state[name], others[path].get(name))]
        assert not differ, (path, differ)


def test_a_run_ends_at_its_goal_and_says_so(policy, tmp_path, capsys):
    args = [*TINY, "--strategy", "mean", "--goal", "1", "--log-dir", str(tmp_path / "job")]
    assert policy.main(args) == 0
    out = capsys.readouterr().out
    assert re.search(r"mean +test +[\d.]+ +[\d.]+ s +goal reached in epoch 1$", out, re.M)
    assert "Reached, of 1 seeds: mean 1." in out
    result = load_json(tmp_path / "job" / "seed0" / "mean" / "result.json")
    assert result["solved"]
    assert len(result["history"]) == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--env", "CartPoleX-v1"], "error: --env CartPoleX-v1: "),
        (["--env", "Pendulum-v1"], "expected discrete actions"),
        (["--workers", "1"], "error: --workers: expected 0 to 0, got 1"),
        (["--discount", "1.5"], "error: --discount: expected 0 to 1, got 1.5"),
        (["--lr-find"], "error: --lr-find: "),
        (["--updates", "0"], "error: --updates: expected more than 0, got 0"),
        (["--batch-size", "1"], "error: --batch-size: expected 2 or more, got 1"),
        (["--strategy", "learnt"], "'learnt'"),
        (["--schedule", "cosin"], "'cosin'"),
        (["--limit", "499"], "error: --limit 499: gymnasium's goal for CartPole-v1, 475, is of episodes of "),
    ],
)
def test_mistakes_are_one_line_and_status_2(policy, capsys, tmp_path, args, words):
    try:
        status = policy.main([*args, "--log-dir", str(tmp_path / "job")])
    except SystemExit as stop:  # from the command line's parser
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert not (tmp_path / "job").exists()
    assert words in error
    if error.startswith("error: "):
        assert error.count("\n") == 1


def test_another_environment_and_a_dry_run(policy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = [*TINY, "--env", "Acrobot-v1", "--strategy", "none", "--dry-run"]
    assert policy.main(args) == 0
    assert re.search(r"continued 2 times, validated and tested: all well", capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["learned"])
def test_verify(policy, tmp_path, monkeypatch, capsys, strategy):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert policy.main([*TINY, "--strategy", strategy, "--verify"]) == 0
    out = capsys.readouterr().out
    for check in ("resumed = uninterrupted", "accumulated = one batch", "two processes = one"):
        assert re.search(rf"^ {check} +holds ", out, re.M), check


@pytest.mark.slow
def test_two_processes_share_the_episodes(policy, finished, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", RECIPE,
               *TINY, "--log-dir", tmp_path / "job"]  # fmt: skip
    subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True, timeout=240)
    two, one = results(tmp_path / "job")[0], results(finished)[0]
    assert two.keys() == one.keys()
    for name in two:
        assert two[name]["return"] == pytest.approx(one[name]["return"])
        assert two[name].get("steps") == one[name].get("steps")


@pytest.mark.release
def test_the_whole_demonstration(tmp_path):
    args = [sys.executable, str(RECIPE), "--log-dir", str(tmp_path / "job")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(args, capture_output=True, text=True, check=True, env=environment, timeout=400)
    runs = {p.parent: load_json(p) for p in (tmp_path / "job").glob("seed*/*/result.json")}
    assert len(runs) == 12
    assert all(run["return"] >= 475 and run["solved"] for p, run in runs.items() if p.name != "random")
    assert all(run["return"] < 30 for p, run in runs.items() if p.name == "random")
    spent = {n: sum(r["episodes"] for p, r in runs.items() if p.name == n) for n in ("none", "mean", "learned")}
    assert spent["none"] > 1.3 * max(spent["mean"], spent["learned"])
    shares = re.search(r"if it is 1 without: mean ([\d.]+), learned ([\d.]+)\.", done.stdout)
    assert max(map(float, shares.groups())) < 0.6
