import copy
import io
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.datasets import load_digits
from torch import nn

from bptools.finetune import lr_search as module
from bptools.finetune.batches import supervised
from bptools.finetune.ema import Ema
from bptools.finetune.lr_search import RateFinder, RateFinding, RateFound, lr_find
from bptools.finetune.models import small_cnn
from bptools.finetune.phases import Phase
from bptools.finetune.schedule import make_schedule
from bptools.finetune.stepper import Stepper
from bptools.finetune.verify import flatten, same

LOSS = supervised(nn.CrossEntropyLoss())


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))


def some_windows(count=3):
    generator = torch.Generator().manual_seed(1)
    return [
        [
            (torch.randn(6, 4, generator=generator), torch.randint(0, 3, (6,), generator=generator))
            for _ in range(2)
        ]
        for _ in range(count)
    ]


class Drawing:
    """Windows that draw random numbers, as augmented data does."""

    def __iter__(self):
        random.random(), np.random.permutation(700), torch.rand(1)
        return iter(some_windows())


def make(model=None, loss=LOSS, **options):
    model = model or net()
    groups = [
        {"params": model[0].parameters(), "lr": 0.001, "initial_lr": 0.001},
        {"params": [*model[1].parameters(), *model[3].parameters()], "lr": 0.01, "initial_lr": 0.01},
    ]
    return Stepper(model, torch.optim.AdamW(groups), loss, **options)


def snapshot(stepper):
    state = {
        "model": stepper.model.state_dict(), "optimizer": stepper.optimizer.state_dict(),
        "stepper": stepper.state_dict(), "ema": [stepper.ema.tensors, stepper.ema.state_dict()],
        "random": [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()],
    }  # fmt: skip
    return flatten(copy.deepcopy(state))


@pytest.mark.parametrize("taken", [0, 3])
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_everything_is_put_back_to_the_bit(taken, amp):
    model = net()
    stepper = make(model, ema=Ema(model, 0.9), amp=amp)
    stepper.schedule = make_schedule("cosine", stepper.optimizer, 10)
    for window in some_windows(taken):
        stepper.step(window)
    before = snapshot(stepper)
    finding = lr_find(stepper, Drawing(), steps=30)
    assert len(finding.rates) > 10
    after = snapshot(stepper)
    assert [key for key in before.keys() | after.keys() if not same(before.get(key), after.get(key))] == []


def test_training_goes_on_as_if_there_had_been_no_search():
    searched, not_searched = make(), make()
    lr_find(searched, some_windows(), steps=20)
    for stepper in (searched, not_searched):
        torch.manual_seed(5)
        for window in some_windows():
            stepper.step(window)
    for p, q in zip(searched.model.parameters(), not_searched.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("error", [FloatingPointError, KeyboardInterrupt])
def test_everything_is_put_back_after_an_error(error):
    calls = []

    def loss(called, batch):
        calls.append(1)
        if len(calls) == 15:
            raise error
        return LOSS(called, batch)

    model = net()
    stepper = make(model, loss, ema=Ema(model, 0.9))
    before = snapshot(stepper)
    if error is FloatingPointError:
        assert len(lr_find(stepper, some_windows()).rates) == 7  # two batches a step
    else:
        with pytest.raises(error):
            lr_find(stepper, some_windows())
    after = snapshot(stepper)
    assert all(same(value, after[key]) for key, value in before.items())


def test_rates_rise_evenly_in_proportion_and_what_is_frozen_stays():
    model, seen = net(), []
    model[3].requires_grad_(False)
    head = model[3].weight.clone()

    def loss(called, batch):
        seen.append([group["lr"] for group in stepper.optimizer.param_groups])
        assert torch.equal(model[3].weight, head)
        return LOSS(called, batch)

    stepper = make(model, loss)
    finding = lr_find(stepper, some_windows(), low=1e-4, high=1e-2, steps=5)
    assert finding.rates == pytest.approx([1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2])
    assert [deepest for _, deepest in seen[::2]] == pytest.approx(list(finding.rates))
    assert all(first == pytest.approx(deepest / 10) for first, deepest in seen)


def told(*losses):
    """A stepper whose losses are these, whatever it does."""
    left = iter(losses)
    return make(loss=lambda called, batch: called(batch[0]).sum() * 0 + next(left))


def one_batch():
    return [some_windows(1)[0][:1]]


def test_the_average_is_free_of_bias_and_ends_the_search():
    finding = lr_find(told(4.0, 2.0, 8.0, 9.0, 9.0), one_batch(), smoothing=0.5, stop_factor=2.0)
    assert finding.losses == (4.0, 2.0, 8.0)
    assert finding.smoothed == pytest.approx([4.0, 8 / 3, 40 / 7])
    assert len(lr_find(told(-1.0, -2.0, -2.0, 9.0), one_batch(), smoothing=0.0).losses) == 4  # negative ones too
    assert lr_find(told(1.0, 2.0, float("nan")), one_batch()).losses == (1.0, 2.0)


def curve():
    """Flat to 1e-4, then down to a minimum at 1e-1, then up, and steepest at 1e-2."""
    exponents = np.linspace(-7, 0, 71)
    losses = 2 - 1 / (1 + np.exp(-3 * (exponents + 2))) + np.where(exponents > -1, 5 * (exponents + 1) ** 2, 0)
    return RateFinding(tuple(10**exponents), tuple(losses + 0.1 * np.sin(9 * exponents)), tuple(losses))


def test_what_is_read_off_a_curve():
    assert curve().steepest == pytest.approx(1e-2, rel=0.3)
    assert curve().valley == pytest.approx(1e-4, rel=0.5)  # all of it falls, from 1e-7 to 1e-1
    assert curve().valley < curve().suggestion < curve().steepest
    for losses in ([2.0, 1.0], [1.0, 2.0], [1.0, 1.0, 1.0]):
        short = RateFinding((0.1, 0.2, 0.3)[: len(losses)], tuple(losses), tuple(losses))
        assert {short.steepest, short.valley} <= set(short.rates)
        short.figure()


def test_the_picture(tmp_path):
    figure = curve().figure()
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert axes.get_ylim()[1] < 3  # the curve goes up to 6
    assert [text.get_text() for text in axes.texts] == [f"suggestion {curve().suggestion:.1e}"]
    curve().save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_errors():
    with pytest.raises(ValueError, match=r"windows: .* there are none"):
        lr_find(make(), [])
    with pytest.raises(ValueError, match=r"windows: .* gone through again"):
        lr_find(make(), iter(some_windows()))
    with pytest.raises(FloatingPointError, match=r"not finite at a learning rate of 1.0e-07"):
        lr_find(told(float("nan")), one_batch())
    for options, message in (
        ({"low": 0.0}, r"low, high: .* got 0.0 and 10.0"),
        ({"low": 1.0, "high": 0.5}, r"low, high: .* got 1.0 and 0.5"),
        ({"steps": 1}, r"steps: .* got 1"),
        ({"smoothing": 1.0}, r"smoothing: .* got 1.0"),
        ({"stop_factor": 1.0}, r"stop_factor: .* got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            lr_find(make(), some_windows(), **options)


def test_the_observer_searches_once_and_ends_the_run(tmp_path, monkeypatch):
    asked, closed, out = [], [], io.StringIO()

    def loader(epoch):
        asked.append(epoch)
        return [batch for window in some_windows(2) for batch in window]

    monkeypatch.setattr(module, "lr_find", lambda stepper, windows: lr_find(stepper, windows, steps=12))
    stepper = make()
    run = SimpleNamespace(
        folder=tmp_path / "seed0" / "full", stepper=stepper, loader=loader, accumulate=3,
        phase_index=0, plan=[Phase(("layer[ab]",), 2)], parallel=stepper.parallel,
        monitor=SimpleNamespace(close=lambda: closed.append(True)),
    )  # fmt: skip
    observe = RateFinder("full", Console(file=out, width=60))
    observe("step", run)
    observe("end", run)
    RateFinder("head", Console(file=out))("phase", run)
    assert out.getvalue() == ""
    with pytest.raises(RateFound) as found:
        observe("phase", run)
    assert found.value.path == tmp_path / "lr_find.png"
    assert found.value.path.exists()
    assert len(found.value.finding.rates) == 12
    assert asked == [0, 1, 2, 3, 4, 5]  # windows of 3 batches and of 1
    assert closed
    assert f"{found.value.finding.suggestion:.1e}" in out.getvalue()
    assert "phase 1 of full, layer[ab]" in out.getvalue()


def digits_stepper(seed, lr):
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:320]
    torch.manual_seed(seed)
    model = small_cnn(nn, 10, width=8)
    windows = [[(images[i], labels[i])] for i in order.split(32)]
    return Stepper(model, torch.optim.AdamW(model.parameters(), lr), LOSS), windows


def loss_after_training(seed, lr):
    stepper, windows = digits_stepper(seed, lr)
    for _ in range(4):
        for window in windows:
            stepper.step(window)
    stepper.model.eval()
    with torch.no_grad():
        return float(np.mean([LOSS(stepper.model, batch) for (batch,) in windows]))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_suggestion_trains_better_than_a_hundredth_or_a_hundred_times_of_it(seed):
    rate = lr_find(*digits_stepper(seed, 1e-3)).suggestion
    low, good, high = (loss_after_training(seed, rate * factor) for factor in (0.01, 1, 100))
    assert good < 0.5 * low
    assert good < 0.5 * high
