"""bptools.nn.init.gain: closed forms, torch's table, and what the variance does in fifty layers."""

from __future__ import annotations

import math

import pytest
import torch

import bptools.functional as B
import bptools.nn
from bptools.nn.init import gain

STABLE = [
    *("tanh", "sigmoid", "logsigmoid", "softplus", "softsign"),
    *("elu", "selu", "celu", "hardtanh", "hardsigmoid"),
]
NEUTRAL = ["linear", "relu", "leaky_relu", "prelu", "rrelu", "relu6"]  # relu6 as long as nothing is near 6
UNSTABLE = ["gelu", "silu", "mish", "hardswish", "tanhshrink", "softshrink", "hardshrink"]
GATED = {"glu": "sigmoid", "swiglu": "silu", "geglu": "gelu", "reglu": "relu"}


def function(name: str):
    """The activation of that name, rrelu in training."""
    special = {
        "linear": lambda z: z,
        "prelu": lambda z: B.prelu(z, torch.tensor(0.25)),
        "rrelu": lambda z: B.rrelu(z, training=True),
    }
    return special.get(name) or getattr(B, name)


@pytest.mark.parametrize(
    ("expected", "name", "parameters"),
    [
        (1.0, "linear", {}),
        (math.sqrt(2), "relu", {}),
        (math.sqrt(2 / 1.04), "leaky_relu", {"negative_slope": 0.2}),
        (math.sqrt(2 / 1.25), "prelu", {"weight": torch.tensor([0.1, 0.7])}),
        (math.sqrt(2 / (1 + 0.07 / 3)), "rrelu", {"lower": 0.1, "upper": 0.2}),
        (1.0, "selu", {}),
        (math.sqrt(1 / 0.5160585), "hardtanh", {}),  # 1 - 2 φ(1)
        (math.sqrt(2), "threshold", {"threshold": 0, "value": 0}),
        (1.0, "hardshrink", {"lambd": 0}),
    ],
)
def test_closed_forms(expected, name, parameters):
    assert gain(name, **parameters) == pytest.approx(expected, rel=1e-6)


def test_torchs_table():
    """Where torch has the number that keeps the variance we have it too; the others are not that number."""
    for name, *parameters in (("linear",), ("relu",), ("leaky_relu", 0.3)):
        ours = gain(name, **dict(zip(("negative_slope",), parameters, strict=False)))
        assert ours == pytest.approx(torch.nn.init.calculate_gain(name, *parameters), rel=1e-6)
    for name, theirs, ours in (("tanh", 5 / 3, 1.592537), ("sigmoid", 1.0, 1.846229), ("selu", 0.75, 1.0)):
        assert torch.nn.init.calculate_gain(name) == theirs
        assert gain(name) == pytest.approx(ours, rel=1e-6)


@pytest.mark.parametrize(
    ("module", "name", "parameters"),
    [
        (bptools.nn.GELU("tanh"), "gelu", {"approximate": "tanh"}),
        (torch.nn.ELU(0.5, inplace=True), "elu", {"alpha": 0.5}),
        (bptools.nn.PReLU(3, 0.1), "leaky_relu", {"negative_slope": 0.1}),
        (torch.nn.RReLU(0.1, 0.2), "rrelu", {"lower": 0.1, "upper": 0.2}),
        (bptools.nn.GEGLU(approximate="tanh"), "gelu", {"approximate": "tanh"}),
        (torch.nn.GLU(), "sigmoid", {}),
        (torch.nn.Sequential(torch.nn.Dropout(), torch.nn.ReLU()), "relu", {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_modules(module, name, parameters):
    assert gain(module) == pytest.approx(gain(name, **parameters), rel=1e-6)
    assert module.training


def test_gated_products():
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 2**18, generator=generator)
    for product, name in GATED.items():
        y = B.glu(torch.cat([up, gate])) if product == "glu" else getattr(B, product)(gate, up)
        assert gain(product) == gain(name) == pytest.approx(y.square().mean().item() ** -0.5, rel=0.01)


def test_errors():
    with pytest.raises(ValueError, match=r"activation must be one of relu, .* got 'softmax'"):
        gain("softmax")
    for module in (torch.nn.Softmax(0), torch.nn.Softmax2d(), torch.nn.Linear(3, 3)):
        with pytest.raises((ValueError, RuntimeError)):
            gain(module)
    with pytest.raises(TypeError, match="parameters must come with a name, got alpha"):
        gain(torch.nn.ELU(), alpha=1.0)
    with pytest.raises(TypeError, match="beta"):
        gain("relu", beta=2)


def test_all_else_is_torchs():
    assert bptools.nn.init.xavier_uniform_ is torch.nn.init.xavier_uniform_
    with pytest.raises(AttributeError):
        bptools.nn.init.nothing  # noqa: B018


# Fifty layers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights():
    """Of variance 1 / 1024."""
    return torch.randn(50, 1024, 1024, generator=torch.Generator().manual_seed(0)) / math.sqrt(1024)


def samples() -> torch.Tensor:
    return torch.randn(2, 1024, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def variances(weights):
    """By name and factor of the gain: the variance behind fifty layers."""
    torch.manual_seed(0)
    runs = {(name, factor): factor * gain(name) for name in STABLE + NEUTRAL for factor in (1.0, 0.5, 2.0)}
    z = samples().repeat(len(runs), 1, 1)
    for w in weights:
        y = torch.stack([g * function(name)(z) for ((name, _), g), z in zip(runs.items(), z, strict=True)])
        z = (y.flatten(0, 1) @ w).view_as(y)
    return dict(zip(runs, z.square().mean((1, 2)).tolist(), strict=True))


@pytest.mark.parametrize("name", STABLE + NEUTRAL)
def test_the_variance_is_kept(name, variances):
    # What nothing pulls back to 1 wanders: relu's logarithm by √(50 · 5 / 1024) = 0.5, one standard deviation.
    most = 2 if name in STABLE else 4
    assert 1 / most < variances[name, 1.0] < most


@pytest.mark.parametrize("name", STABLE + NEUTRAL)
def test_another_gain_does_not_keep_it(name, variances):
    less, more = (variances[name, factor] for factor in (0.5, 2.0))
    assert less < 0.5
    assert more > 2
    if name in ("linear", "relu", "leaky_relu", "prelu", "rrelu"):
        assert less < 1e-20
        assert more > 1e20


@pytest.mark.parametrize("name", ["linear", "relu", "leaky_relu", "prelu", "rrelu"])
def test_the_gradients_variance_is_kept(name, weights):
    torch.manual_seed(0)
    x, g = samples().requires_grad_(), gain(name)
    z = x
    for w in weights:
        z = g * function(name)(z) @ w
    (dx,) = torch.autograd.grad(z, x, torch.randn_like(z))
    assert 0.25 < dx.square().mean() < 4


class Louder(torch.nn.Module):
    """An activation of z times a factor."""

    def __init__(self, name: str, factor: float) -> None:
        super().__init__()
        self.function, self.factor = function(name), factor

    def forward(self, z):
        return self.function(self.factor * z)


@pytest.mark.parametrize("name", [*STABLE, "linear", "relu", "leaky_relu", "relu6", *UNSTABLE])
def test_which_return_to_a_variance_of_1(name):
    """How many percent more variance comes out for one percent more that goes in."""
    growth = math.log(gain(Louder(name, 0.99)) / gain(Louder(name, 1.01))) / math.log(1.01 / 0.99)
    if name in STABLE:
        assert growth < 0.95
    elif name in UNSTABLE:
        assert growth > 1.02
    else:
        assert growth == pytest.approx(1, abs=1e-4)
