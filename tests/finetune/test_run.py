"""A run's progress: what the loop is given, what is saved, and what happens when it is stopped."""

import errno
import logging
import os
import signal
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from bptools import finetune as ft
from bptools.finetune.verify import StopAfter, flatten, same


def data(n=24):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long())


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 2))


def make(folder, *, phases=("3:2", "all:2"), samples=None, lr=0.05, batch=5, workers=0, loss=None, **options):
    model, samples = net(), samples or data()
    depths = ft.parameter_depths(model, torch.zeros(1, 4))
    optimizer = torch.optim.AdamW(ft.parameter_groups(model, depths, lr, 0.1))
    stepper = ft.Stepper(model, optimizer, loss or ft.supervised(nn.CrossEntropyLoss()), ema=ft.Ema(model, 0.9))
    return ft.Run(
        folder, stepper, ft.parse_phases(phases),
        lambda epoch: ft.make_loader(samples, batch, seed=(0, epoch), workers=workers),
        **{"head": "3", "accumulate": 2, **options},
    )  # fmt: skip


def loop(run, seen=None):
    for phase in run.phases():
        for epoch in run.epochs():
            for window in run.windows():
                run.step(window)
                if seen is not None:
                    seen.append((str(phase), epoch, len(window), sum(len(y) for _, y in window)))
            with run.averaged():
                run.validate(ft.evaluate(run.model, data()).loss)
    run.load_best()
    return run.finish({"weights": [p.tolist() for p in run.model.parameters()]})


def assert_same(folder, other):
    for name in ("last.pt", "best.pt"):
        a, b = (flatten(ft.load_checkpoint(f / name)) for f in (folder, other))
        assert [k for k in a.keys() | b.keys() if not same(a.get(k), b.get(k))] == []
    a, b = (ft.load_json(f / "result.json") for f in (folder, other))
    assert a | {"seconds": 0} == b | {"seconds": 0}


def test_the_loop_gets_phases_epochs_and_windows_in_turn(tmp_path):
    seen = []
    result = loop(make(tmp_path), seen)
    # 24 samples in batches of 5 at most: 4 of 5 and 1 of 4, in windows of 2.
    assert [s[:2] for s in seen] == [(p, e) for e in range(4) for p in ["3" if e < 2 else "all"] for _ in range(3)]
    assert [s[2] for s in seen[:3]] == [2, 2, 1]
    assert sum(s[3] for s in seen[:3]) == 24
    assert len(result["history"]) == 4
    assert result["reason"].startswith("all 4 epochs ran")


@pytest.mark.parametrize("stop", [1, 3, 5, 6, 7, 12])
def test_a_stopped_run_made_anew_goes_on_to_the_same_end(tmp_path, stop):
    loop(make(tmp_path / "whole"))
    with pytest.raises(ft.Stopped) as stopped:
        loop(make(tmp_path / "stopped", interrupt=StopAfter(stop)))
    assert stopped.value.signal == signal.SIGTERM
    torch.manual_seed(99)  # whatever the generators hold, the checkpoint's states count
    run = make(tmp_path / "stopped")
    assert run.taken > 0
    seen = []
    loop(run, seen)
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    assert len(seen) == 12 - min(run.taken - len(seen), 12)


def test_every_step_can_be_the_last_one(tmp_path):
    loop(make(tmp_path / "whole"))
    for _ in range(30):
        try:
            loop(make(tmp_path / "stopped", interrupt=StopAfter(1)))
            break
        except ft.Stopped:
            pass
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_what_was_not_saved_is_done_again_to_the_bit(tmp_path):
    loop(make(tmp_path / "whole"))

    def crash(event, run):
        run.save_every = 0.0 if run.taken <= 4 else 1e9
        if run.taken == 8:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop(make(tmp_path / "killed", observe=crash))
    assert make(tmp_path / "killed").taken == 4
    loop(make(tmp_path / "killed"))
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    loop(make(tmp_path))
    before = flatten(ft.load_checkpoint(tmp_path / "last.pt"))
    seen = []
    loop(make(tmp_path), seen)
    assert seen == []
    after = flatten(ft.load_checkpoint(tmp_path / "last.pt"))
    assert all(same(before[k], after[k]) for k in before)


def test_patience_is_per_phase_and_survives(tmp_path):
    run = make(tmp_path, phases=["3:9", "all:9"], patience=2)
    losses = iter([1.0, 2.0, 3.0, 0.5, 0.7, 0.9])
    epochs = []
    for phase in run.phases():
        for _ in run.epochs():
            for window in run.windows():
                run.step(window)
            epochs.append(str(phase))
            run.validate(next(losses))
    assert epochs == ["3"] * 3 + ["all"] * 3
    assert run.stopper.reason() == "no gain for 2 epochs, best at epoch 4 of 6"


def test_rates_go_on_where_they_were(tmp_path):
    with pytest.raises(ft.Stopped):
        loop(run := make(tmp_path, interrupt=StopAfter(10)))
    rates = [g["lr"] for g in run.optimizer.param_groups]
    again = make(tmp_path)
    next(again.phases())
    assert [g["lr"] for g in again.optimizer.param_groups] == rates
    assert set(rates).isdisjoint(g["initial_lr"] for g in again.optimizer.param_groups)


def test_best_holds_the_averages_and_last_the_weights(tmp_path):
    run = make(tmp_path)
    loop(run)
    best, last = ft.load_checkpoint(tmp_path / "best.pt"), ft.load_checkpoint(tmp_path / "last.pt")
    assert not torch.equal(best["model"]["0.weight"], last["model"]["0.weight"])
    assert torch.equal(run.model.state_dict()["0.weight"], best["model"]["0.weight"])


def test_a_torn_checkpoint_gives_way_to_the_one_before(tmp_path, caplog):
    loop(make(tmp_path / "whole"))
    with pytest.raises(ft.Stopped):
        loop(make(tmp_path / "torn", save_every=0.0, interrupt=StopAfter(8)))
    last = tmp_path / "torn" / "last.pt"
    content = bytearray(last.read_bytes())
    weight = ft.load_checkpoint(last)["model"]["0.weight"].numpy().tobytes()
    content[content.index(weight)] ^= 1  # one bit, which torch.load does not see
    last.write_bytes(content)
    with caplog.at_level(logging.WARNING, "bptools.finetune"):
        run = make(tmp_path / "torn")
    assert "last.pt is torn" in caplog.text
    assert run.taken == 6  # the checkpoint of before the end of the epoch
    loop(run)
    assert_same(tmp_path / "whole", tmp_path / "torn")


def test_no_whole_checkpoint_is_an_error(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"x")
    (tmp_path / "previous.pt").write_bytes(b"y")
    with pytest.raises(ft.InputError, match=r"previous.pt is torn"):
        make(tmp_path)


def nan_at(step):
    calls = []

    def loss(module, batch):
        calls.append(1)
        value = nn.functional.cross_entropy(module(batch[0]), batch[1])
        return value * float("nan") if len(calls) == step else value

    return loss


def test_a_loss_that_is_not_finite_leaves_what_was_learned(tmp_path):
    with pytest.raises(FloatingPointError):
        loop(make(tmp_path / "nan", loss=nan_at(9)))
    state = ft.load_checkpoint(tmp_path / "nan" / "last.pt")
    assert all(v.isfinite().all() for v in state["model"].values())
    loop(run := make(tmp_path / "nan"))  # with a loss that is well again
    assert run.taken == 12
    assert not run.model[0].weight.isnan().any()


def test_gradient_flow_of_each_epochs_first_step_is_in_tensorboard_and_changes_nothing(tmp_path):
    loop(make(tmp_path / "plain"))
    loop(make(tmp_path / "watched", diagnose=True))
    assert_same(tmp_path / "plain", tmp_path / "watched")
    board = EventAccumulator(str(tmp_path / "watched")).Reload()
    steps = [event.step for event in board.Scalars("gradient/3")]
    assert steps == [1, 4, 7, 10]
    assert [event.step for event in board.Images("gradient flow")] == steps
    assert all(event.value > 0 for event in board.Scalars("output rms/0"))


class Dying(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        if i == 7 and torch.utils.data.get_worker_info():
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        return data()[i]


def test_a_dead_data_worker_is_a_line_and_nothing_is_lost(tmp_path):
    loop(make(tmp_path / "whole"))
    with pytest.raises(ft.InputError, match=r"DataLoader worker .* saved as of step \d+"):
        loop(make(tmp_path / "died", samples=Dying(), workers=2))
    loop(make(tmp_path / "died"))
    assert_same(tmp_path / "whole", tmp_path / "died")


def test_a_full_disk_is_a_line_and_the_checkpoint_before_stands(tmp_path, monkeypatch):
    run = make(tmp_path, save_every=0.0)
    save = torch.save

    def full(state, file):
        save(state, file)
        if run.taken >= 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ft.InputError, match=r"cannot write .*last.pt: No space left on device; what was saved"):
        loop(run)
    monkeypatch.undo()
    assert make(tmp_path).taken == 4
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_layers_are_drawn_anew_and_the_draw_survives(tmp_path):
    def training(run, seen):
        for _ in run.phases():
            for _ in run.epochs():
                for window in run.windows():
                    run.step(window)
                    seen.append(frozenset(n for n, p in run.model.named_parameters() if p.requires_grad))
                run.validate(1.0)

    def phases():
        (phase,) = ft.parse_phases(["3+[01]~1:6"], resample=2)
        return [phase]

    def lisa(folder, **options):
        run = make(folder, phases=["all:1"], **options)
        run.plan = phases()
        return run

    whole, cut = [], []
    training(lisa(tmp_path / "whole"), whole)
    assert len(set(whole)) == 2
    assert all(a == b for a, b in zip(whole[::2], whole[1::2], strict=True))
    with pytest.raises(ft.Stopped):
        training(lisa(tmp_path / "cut", interrupt=StopAfter(6)), cut)
    training(lisa(tmp_path / "cut"), cut)
    assert cut == whole[: len(cut)] or cut[:5] + cut[5:] == whole[:5] + whole[6:]


def test_errors(tmp_path):
    with pytest.raises(ft.InputError, match=r"--accumulate: expected at least 1, got 0"):
        make(tmp_path, accumulate=0)
