import logging
import re

import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bptools.finetune.evaluation import Evaluation
from bptools.finetune.monitor import Monitor, group_names
from bptools.finetune.stepper import StepResult

GROUPS = [{"depth": 0, "lr": 0.1}, {"depth": 1, "lr": 0.2}]
FIRST, SECOND = StepResult(4.0, 2.0, True, False, 10), StepResult(1.0, 0.5, False, False, 20)


def read(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def points(folder, tag):
    return [(e.step, e.value) for e in read(folder).Scalars(tag)]


def test_logs_every_figure(tmp_path):
    monitor = Monitor(tmp_path, "run", 40, bar=False, unit="tok")
    monitor.step(FIRST, GROUPS)
    object.__setattr__(SECOND, "ratios", (0.25, 0.5))
    monitor.step(SECOND, GROUPS, wait=0.1)
    assert monitor.mean_loss() == pytest.approx(2.0)  # by samples
    monitor.epoch(GROUPS, **{"val/loss": 0.5})
    test = Evaluation(0.1, 75.0, [0, 1, 1, 0], [0, 1, 0, 0], [0.9] * 4)
    monitor.finish({"lr": 0.1, "name": None}, test, ["a", "b"], Figure(figsize=(1, 1)))
    events = read(tmp_path)
    scalars = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["train/loss"] == [4.0, 1.0]
    assert scalars["train/gradient norm"] == [2.0, 0.5]
    assert scalars["train/share clipped"] == [0.5]
    assert scalars["lr/depth 01"] == pytest.approx([0.2])
    assert scalars["update ratio/depth 01"] == [0.5]
    assert scalars["speed/tok per second"][0] > 0
    assert scalars["memory/peak MiB"][0] > 10
    assert scalars["val/loss"] == [0.5]
    assert events.Tags()["images"] == ["test/confusion matrix", "test/mistakes"]
    assert [(e.step, e.value) for e in events.Scalars("test/accuracy")] == [(2, 75.0)]
    assert "config/text_summary" in events.Tags()["tensors"]


def test_groups_of_one_depth_are_told_apart():
    groups = [
        {"depth": 3, "weight_decay": 0.1},
        {"depth": 3, "weight_decay": 0.0},
        {"depth": 4, "weight_decay": 0.0},
    ]
    assert group_names(groups) == ["depth 03", "depth 03 no decay", "depth 04"]


def test_the_epoch_that_has_begun_survives_a_resume(tmp_path):
    monitor = Monitor(tmp_path, "run", 40, bar=False)
    monitor.step(FIRST, GROUPS)
    torch.save(monitor.state_dict(), tmp_path / "s.pt")
    monitor.step(StepResult(9.0, 2.0, True, False, 10), GROUPS)  # lost in the crash, and its curve with it
    monitor.epoch(GROUPS, **{"val/loss": 9.0})
    monitor.close()
    resumed = Monitor(tmp_path, "run", 40, bar=False, state=torch.load(tmp_path / "s.pt", weights_only=True))
    resumed.step(SECOND, GROUPS)
    assert resumed.mean_loss() == pytest.approx(2.0)
    assert (resumed.state_dict()["step"], resumed.state_dict()["seen"]) == (2, 30)
    resumed.epoch(GROUPS, **{"val/loss": 0.5})
    resumed.close()
    assert points(tmp_path, "train/loss") == [(1, 4.0), (2, 1.0)]
    assert points(tmp_path, "val/loss") == [(2, 0.5)]


def test_an_epoch_logged_after_the_checkpoint_is_not_doubled(tmp_path):
    monitor = Monitor(tmp_path, "run", 40, bar=False)
    monitor.step(FIRST, GROUPS)
    state = monitor.state_dict()
    monitor.epoch(GROUPS, **{"val/loss": 0.5})
    monitor.close()
    resumed = Monitor(tmp_path, "run", 40, bar=False, state=state)
    resumed.epoch(GROUPS, **{"val/loss": 0.5})
    resumed.close()
    assert points(tmp_path, "train/loss") == [(1, 4.0)]
    assert points(tmp_path, "val/loss") == [(1, 0.5)]


def test_the_state_does_not_grow(tmp_path):
    monitor = Monitor(tmp_path, "run", 400, bar=False, main=False)
    sizes = []
    for _ in range(9):
        monitor.step(FIRST, GROUPS)
        sizes.append(len(re.findall(r"\d+", repr(monitor.state_dict()))))
    assert sizes[0] == sizes[-1]
    monitor.close()


def test_other_processes_write_nothing(tmp_path, capsys):
    monitor = Monitor(tmp_path, "run", 40, bar=True, main=False)
    monitor.step(FIRST, GROUPS)
    monitor.epoch(GROUPS)
    monitor.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_the_line_says_how_it_goes(tmp_path, capsys):
    monitor = Monitor(tmp_path, "seed 0 full", 40, bar=True, unit="seq")
    monitor.step(FIRST, GROUPS)
    monitor.then -= 10.0  # 10 samples in 10 seconds and more, a quarter of which went by waiting
    monitor.recent = [0.0] * 3
    monitor.step(FIRST, GROUPS, wait=2.5)
    monitor.bar.refresh()
    line = capsys.readouterr().err.split("\r")[-1]
    monitor.close()
    assert re.search(r"seed 0 full +50%\|.*\| loss 4.000 \(4.000\) 1 seq/s lr 2.0e-01 wait 25%", line)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread ends
def test_a_full_disk_ends_the_log_and_not_the_training(tmp_path, caplog):
    monitor = Monitor(tmp_path, "run", 40, bar=False)
    file = monitor.writer.file_writer.event_writer._async_writer._writer._writer

    def full(*_):
        raise OSError(28, "No space left on device")

    file.write = file.flush = full
    with caplog.at_level(logging.WARNING, "bptools.finetune"):
        for _ in range(100):
            monitor.step(FIRST, GROUPS)
        monitor.epoch(GROUPS)
        monitor.close()
    assert monitor.taken == 100
    assert [r.getMessage() for r in caplog.records] == [
        "TensorBoard's log ends here: [Errno 28] No space left on device"
    ]
