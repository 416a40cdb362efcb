"""bptools.nn.utils.parametrizations against torch's: the same state, the same weights, the same gradients."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch.nn.utils import parametrizations as theirs
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from bptools.check import check_function
from bptools.nn.utils import parametrizations as ours

LAYERS = {
    "linear": lambda: (torch.nn.Linear(4, 3), (5, 4)),
    "conv": lambda: (torch.nn.Conv1d(4, 3, 2), (2, 4, 5)),
    "transposed": lambda: (torch.nn.ConvTranspose1d(4, 3, 2), (2, 4, 5)),
}
WAYS = [
    pytest.param(name, layer, kwargs, id=f"{name}-{layer}-{kwargs}")
    for name, layer, kwargs in (
        ("weight_norm", "linear", {}),
        ("weight_norm", "linear", {"dim": None}),
        ("weight_norm", "conv", {"dim": 1}),
        ("weight_norm", "conv", {"name": "bias"}),
        ("spectral_norm", "linear", {}),
        ("spectral_norm", "conv", {"n_power_iterations": 3, "eps": 1e-6}),
        ("spectral_norm", "transposed", {}),
        ("spectral_norm", "conv", {"dim": -1}),
        ("spectral_norm", "conv", {"name": "bias"}),
    )
]


def pair(name, layer, kwargs):
    """The same layer twice, by ours and by torch's, and an input."""
    torch.manual_seed(0)
    module, shape = LAYERS[layer]()
    made = []
    for functions in (ours, theirs):
        torch.manual_seed(1)
        made.append(getattr(functions, name)(copy.deepcopy(module), **kwargs))
    return (*made, torch.randn(shape, requires_grad=True))


def step(module, x):
    module.zero_grad()
    y = module(x)
    torch.manual_seed(3)
    found = torch.autograd.grad(y, (x, *module.parameters()), torch.randn_like(y))
    return [y, *found, *(b.clone() for b in module.buffers())]


@pytest.mark.parametrize(("name", "layer", "kwargs"), WAYS)
def test_is_torchs(name, layer, kwargs):
    mine, torchs, x = pair(name, layer, kwargs)
    assert type(mine.parametrizations[kwargs.get("name", "weight")][0]).__module__ == ours.__name__
    assert list(mine.state_dict()) == list(torchs.state_dict())
    for mode in (True, True, False):  # the power iteration goes on from step to step
        mine.train(mode), torchs.train(mode)
        torch.testing.assert_close(step(mine, x), step(torchs, x), rtol=1e-5, atol=1e-6)
    torchs.load_state_dict(mine.state_dict())
    mine.load_state_dict(torchs.state_dict())
    torch.testing.assert_close(step(mine, x), step(torchs, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_signatures(name):
    described = [
        [(p.name, p.default) for p in inspect.signature(getattr(f, name)).parameters.values()]
        for f in (ours, theirs)
    ]
    assert described[0] == described[1]


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_audit(name):
    mine, torchs, x = pair(name, "linear", {})
    mine.eval(), torchs.eval()  # in training the power iteration writes to its buffers
    checks = ["values", "gradients", "masks", "mutation", "interleaved", "checkpoint", "module_copies"]
    check_function(mine, (x,), reference=torchs, checks=checks).raise_if_failed()


def test_two_forwards_before_a_backward():
    """As a discriminator is trained: the second power iteration must not spoil what the first forward kept."""
    results = []
    for module in pair("spectral_norm", "linear", {})[:2]:
        torch.manual_seed(2)
        loss = module(torch.randn(5, 4)).sum() - module(torch.randn(5, 4)).pow(2).sum()
        results.append(torch.autograd.grad(loss, list(module.parameters())))
    torch.testing.assert_close(*results)


def test_a_checkpoint_of_the_older_weight_norm():
    old = {"weight_g": torch.randn(3, 1), "weight_v": torch.randn(3, 4), "bias": torch.randn(3)}
    module = ours.weight_norm(torch.nn.Linear(4, 3))
    module.load_state_dict(dict(old))
    v = old["weight_v"]
    torch.testing.assert_close(module.weight, old["weight_g"] * v / v.norm(dim=1, keepdim=True))


def test_removed():
    module = ours.weight_norm(torch.nn.Linear(4, 3))
    weight = module.weight.detach().clone()
    remove_parametrizations(module, "weight")
    assert not is_parametrized(module)
    torch.testing.assert_close(module.weight.detach(), weight)


def test_errors_are_torchs():
    with pytest.raises(ValueError, match="has no parameter or buffer"):
        ours.spectral_norm(torch.nn.Linear(4, 3), "gain")
    with pytest.raises(ValueError, match="n_power_iterations to be positive"):
        ours.spectral_norm(torch.nn.Linear(4, 3), n_power_iterations=0)
