import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bptools.finetune import Evaluation, Monitor, StepResult

GROUPS = [{"depth": 0, "lr": 0.1}, {"depth": 1, "lr": 0.2}]


def read(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_logs_every_figure(tmp_path):
    monitor = Monitor(tmp_path, "run", 40, bar=False)
    monitor.step(StepResult(4.0, 2.0, True, False, 10), GROUPS)
    monitor.step(StepResult(1.0, 0.5, False, False, 20), GROUPS)
    assert monitor.mean_loss() == pytest.approx(2.0)  # by samples
    monitor.epoch(GROUPS, **{"val/loss": 0.5})
    monitor.finish({"lr": 0.1, "name": None}, Evaluation(0.1, 75.0, [0, 1, 1, 0], [0, 1, 0, 0]), ["a", "b"])
    events = read(tmp_path)
    scalars = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["train/loss"] == [4.0, 1.0]
    assert scalars["train/gradient norm"] == [2.0, 0.5]
    assert scalars["train/share clipped"] == [0.5]
    assert scalars["lr/depth 01"] == pytest.approx([0.2])
    assert scalars["val/loss"] == [0.5]
    assert events.Tags()["images"] == ["test/confusion matrix"]
    assert [(e.step, e.value) for e in events.Scalars("test/accuracy")] == [(2, 75.0)]
    assert "config/text_summary" in events.Tags()["tensors"]


def test_the_epoch_that_has_begun_survives_a_resume(tmp_path):
    monitor = Monitor(tmp_path, "run", 40, bar=False)
    monitor.step(StepResult(4.0, 2.0, True, False, 10), GROUPS)
    state = monitor.state_dict()
    monitor.close()
    torch.save(state, tmp_path / "s.pt")
    resumed = Monitor(tmp_path, "run", 40, bar=False, state=torch.load(tmp_path / "s.pt", weights_only=True))
    resumed.step(StepResult(1.0, 0.5, False, False, 20), GROUPS)
    assert resumed.mean_loss() == pytest.approx(2.0)
    assert resumed.state_dict()["step"] == 2
    assert resumed.state_dict()["seen"] == 30
    resumed.close()
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("train/loss")] == [(1, 4.0), (2, 1.0)]
