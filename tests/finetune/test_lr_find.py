import copy
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bptools.finetune.data import digits
from bptools.finetune.lr_find import lr_find
from bptools.finetune.models import small_cnn
from bptools.finetune.schedule import make_schedule
from bptools.finetune.stepper import Stepper


def make_stepper(model, optimizer):
    return Stepper(model, optimizer, nn.CrossEntropyLoss())


@pytest.fixture(scope="module")
def windows():
    data = digits(0, 5)[0].train
    inputs, targets = (torch.stack([torch.as_tensor(v) for v in column]) for column in zip(*data, strict=True))
    return [[batch] for batch in zip(inputs.split(50), targets.split(50), strict=True)][:8]


def cnn_stepper(lr=1e-3):
    torch.manual_seed(0)
    model = small_cnn(nn, 10, width=8)
    first, *rest = model.parameters()
    optimizer = torch.optim.AdamW([{"params": [first], "lr": lr / 10}, {"params": rest}], lr=lr)
    return make_stepper(model, optimizer)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("steps_before", [0, 3])
def test_leaves_no_trace(windows, steps_before):
    stepper, other = cnn_stepper(), cnn_stepper()
    for each in (stepper, other):
        each.schedule = make_schedule("cosine", each.optimizer, 100)
        torch.manual_seed(0)
        for window in windows[:steps_before]:
            each.step(window)

    def everything():
        parts = stepper.model.state_dict(), stepper.optimizer.state_dict(), stepper.schedule.state_dict()
        return copy.deepcopy((*parts, stepper.scaler.state_dict())), torch.get_rng_state(), random.getstate()

    before, numpys = everything(), np.random.get_state()[1].tolist()
    lr_find(stepper, windows, steps=12)
    assert same(before, everything())
    assert numpys == np.random.get_state()[1].tolist()
    torch.manual_seed(1)  # dropout
    result = stepper.step(windows[4])
    torch.manual_seed(1)
    assert result == other.step(windows[4])


def test_groups_keep_their_proportions(windows):
    stepper, seen = cnn_stepper(), []
    step = stepper.step

    def spy(window):
        seen.append([group["lr"] for group in stepper.optimizer.param_groups])
        return step(window)

    stepper.step = spy
    finding = lr_find(stepper, windows[:2], low=1e-5, high=1e-1, steps=5)
    assert finding.rates == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    assert seen == [pytest.approx([rate / 10, rate]) for rate in finding.rates]


def test_stops_where_training_diverges(windows):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    stepper = make_stepper(model, torch.optim.SGD(model.parameters(), lr=1.0))
    finding = lr_find(stepper, windows, low=1e-3, high=1e6)
    assert len(finding.rates) < 100
    assert all(np.isfinite(finding.losses))
    assert finding.suggestion < finding.rates[-1] / 10


def test_the_suggestion_trains_well(windows):
    suggestion = lr_find(cnn_stepper(), windows).suggestion

    def loss_after(lr):
        stepper = cnn_stepper(lr)
        try:
            return [stepper.step(window).loss for window in windows * 3][-8:]
        except FloatingPointError:
            return [np.inf]

    at, below, above = (np.mean(loss_after(suggestion * factor)) for factor in (1, 0.01, 100))
    assert at < below
    assert at < above


def test_the_picture(windows, tmp_path):
    finding = lr_find(cnn_stepper(), windows, steps=20)
    finding.save(tmp_path / "lr.png")
    with Image.open(tmp_path / "lr.png") as image:
        assert image.size == (704, 440)
    labels = [text.get_text() for text in finding.figure().axes[0].get_legend().get_texts()]
    assert f"suggestion {finding.suggestion:.1e}" in labels


def test_errors(windows):
    for wrong, message in [({"low": 0.0}, "low, high"), ({"steps": 2}, "steps: .* got 2"),
                           ({"smoothing": 1.0}, "smoothing"), ({"stop_factor": 1.0}, "stop_factor")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            lr_find(cnn_stepper(), windows, **wrong)
    with pytest.raises(ValueError, match="windows: expected at least one"):
        lr_find(cnn_stepper(), [])
    with pytest.raises(ValueError, match="stepper: expected a group"):
        lr_find(cnn_stepper(0.0), windows)
