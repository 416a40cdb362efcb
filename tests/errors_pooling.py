"""Bad input to pooling in other dimensions than two, and to its rarer kinds."""

from __future__ import annotations

import torch

import bptools.functional as B

line = torch.randn(2, 2, 6)
image = torch.randn(2, 2, 4, 6)
volume = torch.randn(2, 2, 4, 4, 4)
samples = torch.rand(2, 2, 2)
places = torch.arange(4).reshape(1, 2, 2)

ERRORS = {
    "max_pool1d: input": (lambda: B.max_pool1d(image, 2), ValueError, r"\(n, c, length\).* got \(2, 2, 4, 6\)"),
    "max_pool1d: stride": (
        lambda: B.max_pool1d(line, 2, 0),
        ValueError,
        "stride must be .* at least 1, got 0",
    ),
    "max_pool3d: kernel_size": (lambda: B.max_pool3d(volume, (2, 2)), ValueError, r"or 3 of them, got \(2, 2\)"),
    "adaptive_max_pool1d: output_size": (
        lambda: B.adaptive_max_pool1d(line, (2, 2)),
        ValueError,
        r"output_size must be an int of at least 0, got \(2, 2\)",
    ),
    "adaptive_max_pool2d: input": (
        lambda: B.adaptive_max_pool2d(image[:, :, :0], 1),
        ValueError,
        r"none of the last 2 may be zero, got \(2, 2, 0, 6\)",
    ),
    "fractional_max_pool2d: size": (
        lambda: B.fractional_max_pool2d(image, 2),
        ValueError,
        "one of output_size and output_ratio must be given, got None and None",
    ),
    "fractional_max_pool2d: output_ratio": (
        lambda: B.fractional_max_pool2d(image, 2, output_ratio=1.5),
        ValueError,
        "output_ratio must be between 0 and 1.* got 1.5",
    ),
    "fractional_max_pool2d: output_size": (
        lambda: B.fractional_max_pool2d(image, 3, 3),
        ValueError,
        r"input must have at least size \(5, 5\) .*got \(4, 6\)",
    ),
    "fractional_max_pool2d: shape of _random_samples": (
        lambda: B.fractional_max_pool2d(image, 2, 2, _random_samples=samples[:1]),
        ValueError,
        r"_random_samples must have shape \(2, 2, 2\).*got \(1, 2, 2\)",
    ),
    "fractional_max_pool2d: dtype of _random_samples": (
        lambda: B.fractional_max_pool2d(image, 2, 2, _random_samples=samples.double()),
        TypeError,
        "_random_samples must have input's dtype torch.float32, got torch.float64",
    ),
    "max_unpool2d: dtype": (
        lambda: B.max_unpool2d(image, image, 2),
        TypeError,
        "indices must be int64, got torch.float32",
    ),
    "max_unpool2d: shape": (
        lambda: B.max_unpool2d(image, image.long()[:1], 2),
        ValueError,
        r"indices must have input's shape \(2, 2, 4, 6\), got \(1, 2, 4, 6\)",
    ),
    "max_unpool1d: indices": (
        lambda: B.max_unpool1d(line[:1, :, :2], places + 1, 2),
        ValueError,
        r"indices must be from 0 to 3 for an output of \(4,\), got 1 to 4",
    ),
    "max_unpool1d: output_size": (
        lambda: B.max_unpool1d(line[:1, :, :2], places, 2, output_size=(7,)),
        ValueError,
        r"output_size must differ from \(4,\) by less than the stride \(2,\), got \(7,\)",
    ),
    "max_unpool1d: padding": (
        lambda: B.max_unpool1d(line[:1, :, :2], places, 2, padding=2),
        ValueError,
        r"padding must leave an output of at least 1 place, got \(2,\)",
    ),
    "avg_pool3d: divisor_override": (
        lambda: B.avg_pool3d(volume, 2, divisor_override=0),
        ValueError,
        "divisor_override must not be zero",
    ),
    "lp_pool2d: norm_type": (lambda: B.lp_pool2d(image, 0, 2), ValueError, "norm_type must not be zero, got 0"),
}
