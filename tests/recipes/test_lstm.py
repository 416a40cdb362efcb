"""``recipes/lstm.py``: exact resume with the carried state, mistakes in one line, and what its card claims."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import Stop, load_recipe

from bptools.finetune import job, load_checkpoint, load_json
from bptools.finetune.verify import flatten, same

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "lstm.py"
TINY = ("--seeds", "1", "--width", "8", "--batch-size", "4", "--chunk", "16", "--device", "cpu")


@pytest.fixture(scope="module")
def lstm():
    return load_recipe(RECIPE, "lstm")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = "so it was that the wind and the sea went on and on, as they had before; nobody saw them."
    file.write_text("\n".join(words[i:] + " " + words[:i] for i in range(24)))
    return file


def results(folder):
    """All that a job came to, but for times; and its checkpoints."""
    done = {str(p.parent.relative_to(folder)): load_json(p) for p in sorted(folder.glob("seed*/*/result.json"))}
    kept = {str(p.relative_to(folder)): flatten(load_checkpoint(p)) for p in folder.glob("seed*/*/*t.pt")}
    return {k: {n: v for n, v in r.items() if n != "seconds"} for k, r in done.items()}, kept


@pytest.fixture(scope="module")
def finished(lstm, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "job"
    assert lstm.main([*TINY, "--data", str(text), "--log-dir", str(folder)]) == 0
    return folder


def test_the_job_leaves_its_card_logs_and_results(finished):
    done, _ = results(finished)
    names = ("3-grams", "5-grams", "carried", "reset", "plain", "unclipped")
    assert set(done) == {f"seed0/{name}" for name in names}
    assert done["seed0/carried"]["history"][0]["loss"] != done["seed0/reset"]["history"][0]["loss"]
    assert len(done["seed0/carried"]["sample"]) > 100
    assert (finished / "card.png").stat().st_size > 10_000


def test_an_interrupted_job_carries_its_state_on(lstm, text, finished, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "job"
    args = [*TINY, "--data", str(text), "--log-dir", str(folder)]
    for stop in (7, 20, 60):
        monkeypatch.setattr(job, "Interrupt", lambda stop=stop: Stop(stop))
        assert lstm.main(args) == 128 + signal.SIGINT
        torch.manual_seed(123)  # whatever the generators hold
        args = re.search(r"continue: uv run .* (--resume .*)", capsys.readouterr().out)[1].split()
    monkeypatch.undo()
    assert lstm.main(args) == 0
    (done, kept), (there, theirs) = results(finished), results(folder)
    assert done == there
    assert kept.keys() == theirs.keys()
    states = 0
    for file in kept:
        for name, value in kept[file].items():
            timed = name.endswith(("seconds", "wait")) or "monitor" in name
            assert timed or same(value, theirs[file][name]), (file, name)
            states += name.endswith("state")
    assert states >= 4


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--checkpoint-every", "often"], "--checkpoint-every: expected a number above 0 or sqrt, got 'often'"),
        (["--vocabulary", "10"], "--vocabulary: expected 257 to 1000000, got 10"),
        (["--plain-lr", "-1"], "--plain-lr: expected 1e-12 to 1000000.0, got -1.0"),
        (["--optimizer", "adamw"], "--lr: expected one for --optimizer adamw, got 20, sgd's"),
        (
            ["--optimizer", "adamw", "--lr", "0.01"],
            "--plain-lr: expected one for --optimizer adamw, got 10, sgd's",
        ),
        (["--data", "/nowhere.txt"], "--data /nowhere.txt: No such file"),
        (["--batch-size", "100000"], "--data: expected"),
        (["--strategy", "carried", "carried"], "--strategy"),
    ],
)
def test_mistakes_are_one_line_and_status_2(lstm, capsys, tmp_path, args, words):
    assert lstm.main([*args, "--log-dir", str(tmp_path / "job")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "job").exists()


def test_a_loss_beyond_all_bounds_has_a_perplexity(lstm):
    assert lstm.ft.perplexity(2.0) == pytest.approx(7.389056)
    assert 1e300 < lstm.ft.perplexity(1e6) < float("inf")


def test_a_run_that_diverges_is_a_result(lstm, text, tmp_path):
    options = ["--strategy", "unclipped", "--plain-lr", "900", "--data", str(text)]
    assert lstm.main([*TINY, *options, "--log-dir", str(tmp_path)]) == 0
    result = load_json(tmp_path / "seed0" / "unclipped" / "result.json")
    assert result["perplexity"] is None
    assert result["reason"].startswith("diverged by step ")


def test_a_dry_run_does_everything(lstm, text, capsys):
    assert lstm.main([*TINY, "--data", str(text), "--dry-run"]) == 0
    assert "all well" in capsys.readouterr().out


@pytest.mark.slow
def test_verify(lstm, text, capsys):
    options = ["--strategy", "carried", "--accumulate", "2", "--dropout", "0.2"]
    assert lstm.main([*TINY, *options, "--data", str(text), "--verify"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "kind", [pytest.param("ddp", marks=pytest.mark.slow), pytest.param("fsdp", marks=pytest.mark.release)]
)
def test_two_processes_have_half_of_the_streams_each(lstm, text, finished, tmp_path, kind):
    options = [*TINY, "--strategy", "carried", "reset", "--data", str(text), "--log-dir", str(tmp_path)]
    options += ["--parallel", kind]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(RECIPE)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, *options], check=True, capture_output=True, timeout=300, env=environment)
    for name in ("carried", "reset"):
        one, two = (load_json(folder / "seed0" / name / "result.json") for folder in (finished, tmp_path))
        assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)
        assert two["history"][0]["loss"] == pytest.approx(one["history"][0]["loss"], rel=1e-3)


@pytest.mark.release
def test_the_whole_demonstration(tmp_path):
    command = [sys.executable, str(RECIPE), "--seeds", "1", "--log-dir", str(tmp_path / "job")]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    done = {path.parent.name: load_json(path) for path in (tmp_path / "job").glob("seed0/*/result.json")}
    assert done["carried"]["perplexity"] < done["3-grams"]["perplexity"]
    assert done["carried"]["perplexity"] < done["plain"]["perplexity"]
    assert done["unclipped"]["perplexity"] is None
    assert "diverged by step" in run.stdout
