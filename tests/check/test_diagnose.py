"""Guesses at the cause: each pattern is recognised, and none is seen where there is none."""

import pytest
import torch

from bptools.check._diagnose import guess
from bptools.check._subject import Point, Subject


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


A, OTHER, DY = draw(4, 4), draw(4, 4, seed=1), draw(4, 4, seed=2)


def with_(changes, shape=(3, 5), seed=0):
    """A tensor, and the same with other numbers at some indices."""
    a = draw(*shape, seed=seed)
    b = a.clone()
    for index in changes:
        b[index] += 1.5
    return a, b


@pytest.mark.parametrize(
    ("expected", "got", "said"),
    [
        (A, 2 * A, "a constant factor: got = 2 × expected"),
        (A, A / 2, "a constant factor: got = 1/2 × expected"),
        (A, -A, "the sign is wrong: got = -1 × expected"),
        (A, 0.3 * A, "a constant factor: got = 0.3 × expected"),
        (A, 1.0005 * A, "a constant in the formula is rounded or approximated"),
        (A, A.mT.contiguous(), "transposed"),
        (A, torch.zeros_like(A), "no gradient at all"),
        (A, torch.full_like(A, torch.nan), "NaN where the true value is finite"),
        (A, A.flatten().flip(0).view(4, 4), "the right numbers in the wrong places"),
        (A, A + 0.75, "off by a constant: 0.75 is added everywhere"),
        (A, A.abs(), "the sign is wrong for some elements"),
        (A, A.float().double(), "float32's rounding"),
        (A + 1j * OTHER, A - 1j * OTHER, "a complex conjugate is missing"),
        ((A + 1j * OTHER) * DY, (A + 1j * OTHER).conj() * DY, "a complex conjugate is missing"),
        ((A + 1j * OTHER) * (1 + 2j), (A - 1j * OTHER) * (1 + 2j), "a complex conjugate is missing on a factor"),
        (*with_([(1, 2)]), "one element of 15 is wrong"),
        (*with_([(2, 4)]), "one element of 15 is wrong, the last: a loop or tile ends too early"),
        (
            *with_([(1, k) for k in range(4)], (9, 9)),
            "4 elements of 81 are wrong, all at position 1 of dimension 0",
        ),
        (
            *with_([(k, 3) for k in range(4)], (9, 9)),
            "4 elements of 81 are wrong, all at position 3 of dimension 1",
        ),
    ],
)
def test_a_pattern_in_the_numbers_alone(expected, got, said):
    assert said in guess(expected, got)


def test_another_inputs_gradient():
    assert guess(A, OTHER, None, 0, [A, OTHER]) == "gradients in the wrong order: this is the one of input 1"


def test_the_output_gradient_that_is_not_multiplied_and_the_one_that_is_all():
    assert guess(A, A / DY, dys=[DY]) == "the output gradient is not multiplied in"
    assert "passed on as it is" in guess(A, DY, dys=[DY])


def point(*inputs):
    names = ["x", "w"][: len(inputs)]
    space = {}
    exec(f"def f({', '.join(names)}): pass", space)
    return Point(Subject.of(space["f"]), [x.clone().requires_grad_() for x in inputs])


@pytest.mark.parametrize("factor", [7.0, 1 / 7])
def test_a_factor_that_is_a_size_is_named(factor):
    x = draw(3, 7)
    assert guess(x, factor * x, point(x), 0).endswith("7 is a size of x: a mean for a sum, or the other way round")


@pytest.mark.parametrize(
    ("chosen", "word"),
    [
        (lambda x: x > 1.9, "large"),
        (lambda x: x.abs() < 0.05, "small"),
    ],
)
def test_wrong_where_the_input_is(chosen, word):
    x, a = draw(10, 10), draw(10, 10, seed=3)
    if word == "large":
        x[x < -1.9] = 0.5
    wrong = chosen(x)
    assert 1 < int(wrong.sum()) <= 10
    b = torch.where(wrong, a + 2 + a.abs(), a)
    assert f"those where x is {word}: a branch" in guess(a, b, point(x), 0)


def test_where_the_truth_is_not_known_it_is_left_out():
    a = A.clone()
    a[0, 0] = torch.nan
    assert guess(a, 2 * A) == "a constant factor: got = 2 × expected"
    assert guess(torch.full_like(A, torch.nan), A) is None


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        (A, OTHER),
        (draw(3, dtype=torch.complex128), draw(3, seed=1, dtype=torch.complex128)),
        (torch.empty(0, 3), torch.empty(0, 3)),
        (draw(1), draw(1, seed=1)),
        (torch.tensor(2.0), torch.tensor(3.0)),
    ],
    ids=["random", "complex", "empty", "one number", "scalar"],
)
def test_no_guess_without_a_pattern(expected, got):
    assert guess(expected, got) is None


def test_zeros_are_right_where_nothing_is_expected():
    assert guess(torch.zeros(4), torch.zeros(4)) is None
