"""Bad input to the ops that most networks are made of."""

from __future__ import annotations

import torch

import bptools.functional as B

x = torch.randn(3, 5)
w = torch.randn(4, 5)
image = torch.randn(2, 2, 4, 5)
kernel = torch.randn(3, 2, 2, 2)

# A call, the exception, and what its message must say.
ERRORS = {
    "linear: features": (
        lambda: B.linear(x, w.T),
        ValueError,
        r"input must have shape \(\.\.\., 4\).*got \(3, 5\)",
    ),
    "linear: bias": (lambda: B.linear(x, w, x[0]), ValueError, r"bias must have shape \(4,\), got \(5,\)"),
    "linear: weight": (lambda: B.linear(x, w[None]), ValueError, r"weight must have 2 dim.*got \(1, 4, 5\)"),
    "linear: 1-D weight": (lambda: B.linear(x, w[0], w[:, 0]), ValueError, "1 without a bias"),
    "linear: dtypes": (lambda: B.linear(x, w.half()), TypeError, "weight must have input's dtype torch.float32"),
    "bilinear: weight": (lambda: B.bilinear(x, x, w), ValueError, r"weight must have 3 dim.*got \(4, 5\)"),
    "bilinear: features": (
        lambda: B.bilinear(x, x, torch.randn(2, 5, 4)),
        ValueError,
        r"input2 must have shape \(\.\.\., 4\).*got \(3, 5\)",
    ),
    "bilinear: rows": (
        lambda: B.bilinear(x, x[:2], torch.randn(2, 5, 5)),
        ValueError,
        r"leading dimensions \(3,\), got \(2,\)",
    ),
    "bilinear: bias": (
        lambda: B.bilinear(x, x, torch.randn(2, 5, 5), x[0]),
        ValueError,
        r"bias must have shape \(2,\), got \(5,\)",
    ),
    "relu: integers": (lambda: B.relu(torch.arange(3)), TypeError, "relu: input .* got torch.int64"),
    "relu: complex": (lambda: B.relu(x + 1j), TypeError, "relu: input .* got torch.complex64"),
    "relu: sparse": (lambda: B.relu(x.to_sparse()), TypeError, "relu: input .* got layout torch.sparse_coo"),
    "relu: nothing": (lambda: B.relu(None), TypeError, "relu: input .* got NoneType"),
    "relu: a list": (lambda: B.relu([1.0]), TypeError, "relu: input .* got list"),
    "conv1d: weight": (lambda: B.conv1d(x, w), ValueError, r"weight must have shape .*got \(4, 5\)"),
    "conv2d: groups": (lambda: B.conv2d(image, kernel, groups=2), ValueError, r"multiple of groups = 2"),
    "conv2d: channels": (
        lambda: B.conv2d(image[:, :1], kernel),
        ValueError,
        r"input must have shape \(n, 2, .*got",
    ),
    "conv2d: bias": (lambda: B.conv2d(image, kernel, w), ValueError, r"bias must have shape \(3,\), got \(4, 5\)"),
    "conv2d: stride": (lambda: B.conv2d(image, kernel, stride=0), ValueError, "stride must be .* got 0"),
    "conv2d: dilation": (lambda: B.conv2d(image, kernel, dilation=True), ValueError, "dilation must .* got True"),
    "conv2d: padding": (
        lambda: B.conv2d(image, kernel, padding=(1, -1)),
        ValueError,
        r"padding must .* got \(1, -1\)",
    ),
    "conv2d: mode": (
        lambda: B.conv2d(image, kernel, padding="full"),
        ValueError,
        "'valid', 'same' or .* got 'full'",
    ),
    "conv2d: same": (
        lambda: B.conv2d(image, kernel, stride=2, padding="same"),
        ValueError,
        r"stride 1, got .*\(2, 2\)",
    ),
    "conv2d: small": (lambda: B.conv2d(image, kernel, dilation=9), ValueError, "input must not be smaller .* got"),
    "max_pool2d: input": (lambda: B.max_pool2d(x, 2), ValueError, r"input must have shape .* got \(3, 5\)"),
    "max_pool2d: padding": (lambda: B.max_pool2d(image, 2, padding=2), ValueError, r"half of .* got \(2, 2\)"),
    "max_pool2d: kernel_size": (
        lambda: B.max_pool2d(image, 9),
        ValueError,
        r"kernel_size \(9, 9\) .* got size \(4, 5\)",
    ),
    "max_pool2d: dilation": (  # torch's index would lie outside of the input
        lambda: B.max_pool2d(image[..., :3, :3], 2, 1, 1, 4),
        ValueError,
        r"dilation must let every window see some of the input, got \(4, 4\)",
    ),
    "avg_pool2d: divisor_override": (
        lambda: B.avg_pool2d(image, 2, divisor_override=0),
        ValueError,
        "divisor_override must not be zero",
    ),
    "adaptive_avg_pool2d: output_size": (
        lambda: B.adaptive_avg_pool2d(image, (2, -1)),
        ValueError,
        r"output_size must be .* got \(2, -1\)",
    ),
    "adaptive_avg_pool2d: input": (
        lambda: B.adaptive_avg_pool2d(image[:, :, :0], 2),
        ValueError,
        "input must .* got",
    ),
    "gelu: approximate": (lambda: B.gelu(x, "sigmoid"), ValueError, "approximate must be .* got 'sigmoid'"),
    "layer_norm: empty": (lambda: B.layer_norm(x, ()), ValueError, r"normalized_shape .* got \(\)"),
    "layer_norm: shape": (lambda: B.layer_norm(x, (4,)), ValueError, r"input must end in .*\(4,\), got \(3, 5\)"),
    "layer_norm: weight": (lambda: B.layer_norm(x, (5,), x), ValueError, r"weight .*\(5,\), got \(3, 5\)"),
    "layer_norm: dtype": (lambda: B.layer_norm(x, (5,), x[0].double()), TypeError, "weight .* got torch.float64"),
    "layer_norm: bias": (lambda: B.layer_norm(x, (5,), None, x), ValueError, r"bias .*\(5,\), got \(3, 5\)"),
}
