"""Numerical derivatives: nine digits on smooth functions, one side at a time at kinks, doubt where it is due."""

import math

import pytest
import torch

from bptools.check._numeric import derivative, inner, one_sided, step_of

SMOOTH = {
    "exp": (torch.exp, torch.exp),
    "sin": (torch.sin, torch.cos),
    "tanh": (torch.tanh, lambda x: 1 - torch.tanh(x) ** 2),
    "cube": (lambda x: x**3, lambda x: 3 * x**2),
    "linear": (lambda x: 7 * x, lambda x: 7 + 0 * x),
    "sqrt": (lambda x: (2 + x).sqrt(), lambda x: 0.5 / (2 + x).sqrt()),
}


def number(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("at", [0.0, 0.3, 1.7])
@pytest.mark.parametrize("name", SMOOTH)
def test_nine_digits(name, at):
    f, df = SMOOTH[name]
    found, doubt = derivative(lambda t: f(number(at) + t))
    true = float(df(number(at)))
    assert abs(float(found) - true) <= 1e-9 * max(1.0, abs(true))
    assert float(doubt) <= 1e-8


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 1e3])
def test_steps_are_measured_in_the_magnitude_of_the_input(scale):
    """A function that changes over a length of `scale`: the caller moves along a direction of that length."""
    f, df = (lambda x: torch.sin(x / scale)), (lambda x: torch.cos(x / scale) / scale)
    x = number([0.4 * scale])
    step = step_of(x)
    found, doubt = derivative(lambda t: f(x[0] + t * step))
    true = float(df(x[0]))
    assert abs(float(found) / step - true) <= 1e-9 * abs(true)
    assert float(doubt) / step <= 1e-7 * abs(true)


def noisy(level):
    generator = torch.Generator().manual_seed(0)
    return lambda t: (
        torch.exp(number(0.5) + t) + level * torch.randn(256, generator=generator, dtype=torch.float64)
    )


@pytest.mark.parametrize("ulps", [0.5, 2.0])
def test_the_estimate_of_the_error_is_honest_under_rounding(ulps):
    found, doubt = derivative(noisy(ulps * torch.finfo(torch.float64).eps))
    assert bool(((found - math.exp(0.5)).abs() <= doubt).all())


@pytest.mark.parametrize("level", [1e-12, 1e-9, 1e-6, 1e-3])
def test_louder_noise_is_louder_doubt(level):
    found, doubt = derivative(noisy(level))
    assert float(doubt.median()) >= level
    assert float((found - math.exp(0.5)).abs().median()) <= 50 * float(doubt.median())


def test_a_jump_is_doubted():
    _, doubt = derivative(lambda t: number(1.0 if t > 0 else 0.0))
    assert float(doubt) > 1


def test_infinities_are_infinitely_doubtful():
    _, doubt = derivative(lambda t: number(math.inf if t > 0 else 0.0))
    assert float(doubt) == math.inf


def test_a_kink_nearby_makes_small_steps():
    """|x| at 1e-3: steps of 1e-2 see the other side, steps of 1e-4 do not."""
    found, doubt = derivative(lambda t: (number(1e-3) + t).abs())
    assert float(found) == pytest.approx(1.0, abs=1e-9)
    assert float(doubt) < 1e-8


def test_one_number_for_each_element():
    x = number([0.1, 0.2, 0.3])
    found, doubt = derivative(lambda t: torch.sin(x + t))
    assert torch.allclose(found, torch.cos(x), rtol=1e-10)
    assert doubt.shape == x.shape


@pytest.mark.parametrize(
    ("f", "left", "right"),
    [
        (torch.relu, 0.0, 1.0),
        (torch.abs, -1.0, 1.0),
        (lambda x: torch.where(x < 0, 3 * x, torch.sin(x)), 3.0, 1.0),
        (torch.exp, 1.0, 1.0),
    ],
    ids=["relu", "abs", "two branches", "smooth"],
)
def test_both_sides_of_a_kink(f, left, right):
    found = one_sided(lambda t: f(number(0.0) + t))
    assert [float(v) for v in found] == pytest.approx([left, right], abs=1e-5)


def test_the_inner_product_is_how_a_loss_moves():
    a, b = (torch.randn(5, dtype=torch.complex128, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    assert float(inner(a, b)) == pytest.approx(float((a.real * b.real + a.imag * b.imag).sum()))
    assert float(inner(a.real, b.real)) == pytest.approx(float(a.real @ b.real))


@pytest.mark.parametrize(
    ("x", "step"),
    [
        ([3.0, -4.0], math.sqrt(12.5)),
        ([0.0, 0.0], 1.0),
        ([], 1.0),
        ([math.inf, 1.0], 1.0),
        ([math.nan], 1.0),
        ([1e-7], 1e-7),
    ],
)
def test_the_step_is_the_root_mean_square_or_one(x, step):
    assert step_of(number(x)) == pytest.approx(step)
