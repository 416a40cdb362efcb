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


ODD_STRIDES = pytest.mark.parametrize(
    ("odd", "dtype"), [("input", torch.float64), ("weight", torch.float32), ("weight", torch.float64)], ids=str
)


def grouped_convolutions(conv2d, odd: str, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """The result and the gradients of channels-last tensors, and of the same numbers contiguous.

    One of the tensors has a dimension of size 1 whose stride is not what channels last makes it.
    """
    generator = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).permute(0, 3, 1, 2)
        for shape in ((2, 5, 1, 4), (6, 2, 1, 2))
    )
    if odd == "input":
        x = x[0].unsqueeze(0)  # strides (4, 1, 4, 4): so conv2d itself makes a batch of a single image
    else:
        w = w.squeeze(3).unsqueeze(3)  # strides (4, 1, 2, 1): so conv2d can be given a weight of conv1d
    found = []
    for tensors in ((x, w), (x.contiguous(), w.contiguous())):
        inputs = [t.detach().requires_grad_() for t in tensors]
        y = conv2d(*inputs, groups=2)
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    return found


@ODD_STRIDES
def test_our_conv2d_takes_any_stride_in_a_dimension_of_size_1(odd, dtype):
    torch.testing.assert_close(*grouped_convolutions(B.conv2d, odd, dtype))


@ODD_STRIDES
@pytest.mark.xfail(
    strict=False,
    raises=(AssertionError, RuntimeError),
    reason="torch 2.15: the CPU's kernels take x for channels last and weight for contiguous, or the reverse",
)
def test_torchs_conv2d_takes_any_stride_in_a_dimension_of_size_1(odd, dtype):
    torch.testing.assert_close(*grouped_convolutions(torch.nn.functional.conv2d, odd, dtype))


RESIZED = pytest.mark.parametrize(
    ("shape", "constants"),
    [
        ((1, 1, 3), {"scale_factor": 1.3, "mode": "nearest"}),
        ((1, 1, 3, 3), {"scale_factor": 1.3, "mode": "bicubic"}),
        ((1, 1, 3, 3), {"scale_factor": 1.3, "mode": "bilinear", "antialias": True}),
        ((1, 1, 14), {"size": 46, "mode": "nearest"}),
    ],
    ids=str,
)


def interpolated(interpolate, shape, constants) -> list[torch.Tensor]:
    """<dy, A x> and <Aᵀ dy, x>, of a linear map A and its gradient Aᵀ: the same number."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    y = interpolate(x, **constants)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    return [(dy * y).sum(), (torch.autograd.grad(y, x, dy)[0] * x).sum()]


@RESIZED
def test_our_interpolate_has_the_gradient_of_its_result(shape, constants):
    torch.testing.assert_close(*interpolated(B.interpolate, shape, constants))


@RESIZED
@pytest.mark.xfail(
    strict=False,
    reason="torch 2.15: a scale that leaves the size as it is, or the rounding of float64",
)
def test_torchs_interpolate_has_the_gradient_of_its_result(shape, constants):
    torch.testing.assert_close(*interpolated(torch.nn.functional.interpolate, shape, constants))


def narrowed(interpolate) -> list[torch.Tensor]:
    """An image shrunk to a width of 1 with antialias, contiguous and channels last."""
    x = torch.randn(1, 2, 8, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    formats = torch.contiguous_format, torch.channels_last
    resized = {"size": (11, 1), "mode": "bilinear", "antialias": True}
    return [interpolate(x.contiguous(memory_format=f), **resized).contiguous() for f in formats]


def test_our_interpolate_with_antialias_takes_a_width_of_1():
    torch.testing.assert_close(*narrowed(B.interpolate))


@pytest.mark.xfail(strict=False, reason="torch 2.15: on a CPU the result is wrong if the image is contiguous")
def test_torchs_interpolate_with_antialias_takes_a_width_of_1():
    torch.testing.assert_close(*narrowed(torch.nn.functional.interpolate))


def unshuffled(pixel_unshuffle) -> torch.Tensor:
    return pixel_unshuffle(torch.empty(0, 1, 4, 6), 2)


def test_our_pixel_unshuffle_gives_an_empty_result_its_shape():
    assert unshuffled(B.pixel_unshuffle).shape == (0, 4, 2, 3)


@pytest.mark.xfail(strict=False, reason="torch 2.15: the CPU gives an empty input back as it is")
def test_torchs_pixel_unshuffle_gives_an_empty_result_its_shape():
    assert unshuffled(torch.nn.functional.pixel_unshuffle).shape == (0, 4, 2, 3)


def soft_margin(soft_margin_loss) -> list[torch.Tensor]:
    """The loss and the gradient of a score of -1000 that was to be positive."""
    x = torch.tensor([-1000.0], requires_grad=True)
    y = soft_margin_loss(x, torch.ones(1))
    return [y, *torch.autograd.grad(y, x)]


def test_our_soft_margin_loss_does_not_overflow():
    torch.testing.assert_close(soft_margin(B.soft_margin_loss), [torch.tensor(1000.0), torch.tensor([-1.0])])


@pytest.mark.xfail(strict=False, reason="torch 2.15: log(1 + exp(1000)) is infinite, and its gradient NaN")
def test_torchs_soft_margin_loss_does_not_overflow():
    theirs = soft_margin(torch.nn.functional.soft_margin_loss)
    torch.testing.assert_close(theirs, [torch.tensor(1000.0), torch.tensor([-1.0])])


def ctc_gradcheck(ctc_loss) -> bool:
    """Whether the gradient of log_probs is their derivative, without a log_softmax before them."""
    x = torch.randn(4, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rest = torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2])
    return torch.autograd.gradcheck(lambda x: ctc_loss(x, *rest), x, raise_exception=False)


def test_our_ctc_loss_has_the_derivative_of_log_probs():
    assert ctc_gradcheck(B.ctc_loss)


@pytest.mark.xfail(strict=False, reason="torch 2.15: the gradient of a log_softmax before it is in it")
def test_torchs_ctc_loss_has_the_derivative_of_log_probs():
    assert ctc_gradcheck(torch.nn.functional.ctc_loss)
