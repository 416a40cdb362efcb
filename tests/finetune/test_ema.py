import copy

import pytest
import torch
from torch import nn

from bptools.finetune.ema import Ema


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    return model


def move(model):
    """Change whatever trains, and the running statistics."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    model(torch.randn(16, 4))


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_formula():
    model = net()
    ema = Ema(model, decay=0.2)
    expected = snapshot(model)
    for decay in (1 / 10, 2 / 11, 0.2, 0.2):  # warming up
        move(model)
        ema.update(model)
        for name, value in model.state_dict().items():
            if name not in ("1.num_batches_tracked", "mask"):
                expected[name] = decay * expected[name] + (1 - decay) * value
    assert ema.tensors.keys() == expected.keys() - {"1.num_batches_tracked", "mask"}
    torch.testing.assert_close(ema.tensors, {name: expected[name] for name in ema.tensors})


def test_in_evaluation_the_model_is_the_average_and_then_itself_again():
    model = net()
    ema = Ema(model)
    for _ in range(3):
        move(model)
        ema.update(model)
    own, averaged = snapshot(model), net()
    averaged.load_state_dict(ema.tensors, strict=False)
    parameters, x = list(model.parameters()), torch.randn(5, 4)
    with ema.applied(model):
        assert torch.equal(model.eval()(x), averaged.eval()(x))
        assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    with pytest.raises(KeyboardInterrupt), ema.applied(model):
        raise KeyboardInterrupt
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_what_a_phase_unfreezes_starts_from_its_value_then():
    model = net()
    model[0].requires_grad_(False)
    ema, first = Ema(model, decay=0.9), model[0].weight.clone()
    for _ in range(5):
        move(model)
        ema.update(model)
    assert torch.equal(ema.tensors["0.weight"], first)
    model[0].requires_grad_(True)
    move(model)
    ema.update(model)
    decay = 6 / 15
    torch.testing.assert_close(ema.tensors["0.weight"], decay * first + (1 - decay) * model[0].weight.detach())


def test_only_the_parameters_that_are_named():
    ema = Ema(net(), parameters=["2.weight"])
    assert ema.tensors.keys() == {"2.weight", "1.running_mean", "1.running_var"}


def test_weights_of_less_than_float32_are_averaged_in_float32():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    model.weight.data.fill_(1.0)
    ema = Ema(model, decay=0.999)
    ema.updates = 10**6
    model.weight.data.fill_(1.0078125)  # the next one
    for _ in range(500):  # a thousandth of the way each is lost in bfloat16
        ema.update(model)
    assert ema.tensors["weight"].item() == pytest.approx(1 + 0.0078125 * (1 - 0.999**500))
    with ema.applied(model):
        assert model.weight.dtype == torch.bfloat16
    assert model.weight.item() == 1.0078125


def test_it_goes_on_from_its_state():
    model = net()
    ema = Ema(model)
    move(model)
    ema.update(model)
    other, again = copy.deepcopy(model), Ema(net())
    for name, tensor in again.tensors.items():
        tensor.copy_(ema.tensors[name])
    again.load_state_dict(ema.state_dict())
    torch.manual_seed(1)
    move(model)
    torch.manual_seed(1)
    move(other)
    ema.update(model)
    again.update(other)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in ema.tensors.items())


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_decay(decay):
    with pytest.raises(ValueError, match=rf"decay: expected a number in \[0, 1\), got {decay}"):
        Ema(net(), decay)
