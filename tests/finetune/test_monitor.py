import copy
import os
import resource
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import TensorDataset

from bptools.finetune.data import Splits
from bptools.finetune.evaluation import Evaluation
from bptools.finetune.mistakes import image_figures
from bptools.finetune.monitor import Monitor
from bptools.finetune.stepper import StepResult

GROUPS = [
    {"depth": 0, "lr": 0.1, "decays": True},
    {"depth": 1, "lr": 0.2, "decays": True},
    {"depth": 1, "lr": 0.2, "decays": False},
]
RESULT = StepResult(4.0, 2.0, 1.0, False, 10)
DATA = TensorDataset(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 1, 0]))
SPLITS = Splits(DATA, DATA, DATA, ("a", "b"))
METRICS = {"accuracy": 75.0, "loss": 0.1}
TEST = Evaluation(0.1, 75.0, [0, 1, 1, 0], [0, 1, 0, 0], [0.9] * 4)
FIGURES = image_figures(SPLITS, TEST)


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events


def curves(folder):
    """Return steps and values by tag, of all that does not depend on the machine."""
    events = read(folder)
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(("speed", "memory"))]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def values(folder):
    return {tag: [value for _, value in points] for tag, points in curves(folder).items()}


def test_logs_every_figure(tmp_path):
    monitor = Monitor(tmp_path, "run", 40, bar=False)
    monitor.step(replace(RESULT, ratios=(1e-3, 0.0, 7.0)), GROUPS, wait=0.5)
    monitor.step(StepResult(1.0, float("nan"), 0.0, False, 20), GROUPS, wait=0.5)
    assert monitor.mean_loss() == pytest.approx(2.0)  # by samples
    monitor.epoch(GROUPS, **{"val/loss": 0.5})
    assert monitor.mean_loss() == 0
    monitor.finish({"lr": 0.1, "name": None}, METRICS, FIGURES, samples="one, two")
    scalars, events = values(tmp_path), read(tmp_path)
    assert scalars["train/loss"] == [4.0, 1.0]
    assert scalars["train/mean loss"] == pytest.approx([2.0])
    assert scalars["train/gradient norm"] == [2.0]  # there was none in the second step
    assert scalars["train/share clipped"] == [0.5]
    assert scalars["lr/depth 01"] == pytest.approx([0.2])
    assert scalars["val/loss"] == [0.5]
    assert scalars["update ratio/depth 00"] == pytest.approx([1e-3])
    assert "update ratio/depth 01" not in scalars  # frozen, and its biases are not looked at
    assert events.Scalars("speed/share waiting for data")[0].value > 1  # half a second, it was told
    assert events.Scalars("speed/img per second")[0].value > 0
    assert 10 < events.Scalars("memory/peak MiB")[0].value < 1e6
    assert set(events.Tags()["images"]) == {"test/confusion matrix", "test/mistakes"}
    assert [(e.step, e.value) for e in events.Scalars("test/accuracy")] == [(2, 75.0)]
    assert {"config/text_summary", "test/samples/text_summary", "_hparams_/session_start_info"} <= {
        *events.Tags()["tensors"], *events.summary_metadata
    }  # fmt: skip


def test_a_skipped_step_leaves_the_mean_alone(tmp_path):
    monitor = Monitor(tmp_path, "run", None, bar=False)
    monitor.step(RESULT, GROUPS)
    monitor.step(StepResult(float("inf"), float("inf"), 0.0, True, 30), GROUPS)
    assert monitor.mean_loss() == 4.0
    monitor.epoch(GROUPS)
    monitor.close()
    assert values(tmp_path)["train/share skipped"] == [0.5]


def train(monitor, steps):
    """Go on to step number ``steps`` in epochs of 3; return the states at some moments, by step and moment."""
    states = {}
    while monitor.taken < steps:
        monitor.step(replace(RESULT, loss=float(monitor.taken)), GROUPS)
        states[monitor.taken, "step"] = copy.deepcopy(monitor.state_dict())
        if monitor.taken % 3 == 0:
            monitor.epoch(GROUPS, **{"val/loss": monitor.taken / 2})
            states[monitor.taken, "epoch"] = copy.deepcopy(monitor.state_dict())
    return states


@pytest.mark.parametrize("saved", [None, (2, "step"), (3, "step"), (3, "epoch"), (4, "step")])
def test_a_killed_run_goes_on_without_gaps_or_doubles(tmp_path, saved):
    whole = Monitor(tmp_path / "whole", "run", 40, bar=False)
    train(whole, 7)
    whole.finish({}, METRICS, FIGURES)
    killed = Monitor(tmp_path / "killed", "run", 40, bar=False)
    state = train(killed, 5).get(saved)  # what was logged after it was not saved
    killed.close()
    (file,) = (tmp_path / "killed").iterdir()
    os.truncate(file, file.stat().st_size - 5)  # within a record
    torch.save(state, tmp_path / "s.pt")
    state = torch.load(tmp_path / "s.pt", weights_only=True)
    resumed = Monitor(tmp_path / "killed", "run", 40, bar=False, state=state)
    if saved == (3, "step"):
        resumed.epoch(GROUPS, **{"val/loss": 1.5})  # the validation is done again
    train(resumed, 7)
    for monitor in (whole, resumed):
        left = monitor.state_dict()
        assert (left["step"], left["seen"], monitor.mean_loss()) == (7, 70, 6.0)
    resumed.finish({}, METRICS, FIGURES)
    assert curves(tmp_path / "killed") == curves(tmp_path / "whole")


def test_what_is_saved_is_in_the_file(tmp_path):
    monitor = Monitor(tmp_path, "run", 40, bar=False)
    monitor.step(RESULT, GROUPS)
    monitor.state_dict()  # and a kill here
    assert values(tmp_path)["train/loss"] == [4.0]
    monitor.close()


def test_the_state_is_small_and_the_same_again(tmp_path):
    states = []
    for name in "ab":
        monitor = Monitor(tmp_path / name, "run", 40, bar=False)
        sizes = [len(repr({**state, "wait": 0})) for state in train(monitor, 200).values()]
        assert max(sizes) < 1000
        states.append({**monitor.state_dict(), "wait": 0})
        monitor.close()
    assert states[0] == states[1]


def test_other_processes_write_and_show_nothing(tmp_path, capsys):
    monitor = Monitor(tmp_path, "run", 40, bar=True, main=False)
    monitor.step(RESULT, GROUPS)
    monitor.epoch(GROUPS)
    monitor.step(RESULT, GROUPS)
    assert monitor.mean_loss() == 4.0
    monitor.finish({}, METRICS, FIGURES)
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_files():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_the_log_and_not_the_run(tmp_path, caplog, small_files):
    monitor = Monitor(tmp_path, "run", 4000, bar=False)
    train(monitor, 400)
    monitor.finish({}, METRICS, FIGURES)
    assert monitor.taken == 400
    (record,) = caplog.records
    start = "TensorBoard's file cannot be written, training goes on without it: [Errno 27]"
    assert record.getMessage().startswith(start)
    assert len(values(tmp_path)["train/loss"]) > 20  # what there was room for can be read


def test_a_folder_that_cannot_be_made_costs_the_log_and_not_the_run(tmp_path, caplog):
    (tmp_path / "file").touch()
    monitor = Monitor(tmp_path / "file" / "log", "run", 40, bar=False)
    train(monitor, 4)
    monitor.finish({}, METRICS, FIGURES)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("columns", "time"), [(60, False), (80, False), (110, True)])
@pytest.mark.parametrize("items", [1000, None])
def test_the_line_fits(tmp_path, monkeypatch, capsys, columns, time, items):
    monitor = Monitor(tmp_path, "seed 0 full", items, bar=True)
    monitor._bar.dynamic_ncols = None
    monitor._bar.ncols = columns
    monitor.step(RESULT, GROUPS)
    line = str(monitor._bar)
    monitor.close()
    assert len(line) <= columns
    assert line.startswith("seed 0 full   1%|" if items else "seed 0 full 10")
    assert "loss 4.000 (4.000)" in line
    assert ("[00:0" in line) == time
    if columns >= 80:
        assert "img/s lr 2.0e-01 wait 0%" in line
