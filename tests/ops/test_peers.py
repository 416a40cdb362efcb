"""What the contract has found in torch itself; each test passes silently once torch is right."""

from __future__ import annotations

import pytest
import torch

import bptools.functional as B


def hessian_block(layer_norm) -> torch.Tensor:
    """The derivative of the weight's gradient with respect to the input, by torch.func."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    w = torch.randn(5, dtype=torch.float64, generator=generator)
    return torch.func.hessian(lambda x, w: layer_norm(x, (5,), w).pow(3).sum(), (0, 1))(x, w)[1][0]


def written_out(x, normalized_shape, weight):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5) * weight


def test_our_layer_norm_has_the_right_hessian():
    torch.testing.assert_close(hessian_block(B.layer_norm), hessian_block(written_out))


@pytest.mark.xfail(strict=False, reason="torch 2.10 to 2.15: wrong under the vmap that torch.func.hessian uses")
def test_torchs_layer_norm_has_the_right_hessian():
    torch.testing.assert_close(hessian_block(torch.nn.functional.layer_norm), hessian_block(written_out))


def batch_norm_gradients(batch_norm) -> list[torch.Tensor]:
    """The gradient of the input with a contiguous weight, and with the same numbers in every second place."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    dy, places = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
    buffer = places[:3, :2].clone()
    return [
        torch.autograd.grad(batch_norm(x, None, None, w, training=True), x, dy)[0]
        for w in (buffer[:, 0].contiguous(), buffer[:, 0])
    ]


def test_our_batch_norm_takes_a_strided_weight():
    torch.testing.assert_close(*batch_norm_gradients(B.batch_norm))


@pytest.mark.xfail(strict=False, reason="torch 2.15: the CPU's backward kernel overlooks the stride of the weight")
def test_torchs_batch_norm_takes_a_strided_weight():
    torch.testing.assert_close(*batch_norm_gradients(torch.nn.functional.batch_norm))


def bias_hessian(layer_norm) -> torch.Tensor:
    """The second derivative with respect to the bias of a layer norm without a weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    bias = torch.randn(5, dtype=torch.float64, generator=generator)
    return torch.autograd.functional.hessian(lambda bias: layer_norm(x, (5,), None, bias).pow(3).sum(), bias)


def bias_added(x, normalized_shape, weight, bias):
    return written_out(x, normalized_shape, torch.ones_like(bias)) + bias


def test_our_layer_norm_has_the_right_second_derivative_of_a_bias_alone():
    torch.testing.assert_close(bias_hessian(B.layer_norm), bias_hessian(bias_added))


@pytest.mark.xfail(strict=False, reason="torch 2.15: wrong where there is a bias and no weight")
def test_torchs_layer_norm_has_the_right_second_derivative_of_a_bias_alone():
    torch.testing.assert_close(bias_hessian(torch.nn.functional.layer_norm), bias_hessian(bias_added))
