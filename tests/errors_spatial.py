"""Bad input to transposed convolutions, padding, unfold and fold, interpolation and shuffles."""

from __future__ import annotations

import torch

import bptools.functional as B

x = torch.randn(3, 5)
image = torch.randn(2, 2, 4, 5)
kernel = torch.randn(2, 3, 2, 2)

# A call, the exception, and what its message must say.
ERRORS = {
    "conv_transpose1d: weight": (
        lambda: B.conv_transpose1d(x, x),
        ValueError,
        r"weight must have shape \(in_channels, .*got \(3, 5\)",
    ),
    "conv_transpose2d: groups": (
        lambda: B.conv_transpose2d(image, kernel, groups=3),
        ValueError,
        r"multiple of groups = 3, got \(2, 3, 2, 2\)",
    ),
    "conv_transpose2d: channels": (
        lambda: B.conv_transpose2d(image[:, :1], kernel),
        ValueError,
        r"input must have shape \(n, 2, .*got \(2, 1, 4, 5\)",
    ),
    "conv_transpose2d: bias": (
        lambda: B.conv_transpose2d(image, kernel, x),
        ValueError,
        r"bias must have shape \(3,\), got \(3, 5\)",
    ),
    "conv_transpose2d: output_padding": (
        lambda: B.conv_transpose2d(image, kernel, stride=2, output_padding=2),
        ValueError,
        r"output_padding must be smaller than stride .*got \(2, 2\)",
    ),
    "conv_transpose2d: padding": (
        lambda: B.conv_transpose2d(image, kernel, padding=3),
        ValueError,
        r"padding must leave some of the result, got \(3, 3\)",
    ),
    "conv_transpose2d: same": (
        lambda: B.conv_transpose2d(image, kernel, padding="same"),
        ValueError,
        "padding must be an int .*got 'same'",
    ),
    "pad: odd": (lambda: B.pad(x, (1, 2, 3)), ValueError, r"pad must be a pair of ints .*got \(1, 2, 3\)"),
    "pad: too many": (lambda: B.pad(x, (1,) * 6), ValueError, r"last dimensions of input \(3, 5\)"),
    "pad: fractions": (lambda: B.pad(x, (1, 0.5)), ValueError, r"pair of ints .*got \(1, 0.5\)"),
    "pad: cropped": (lambda: B.pad(x, (-3, -3)), ValueError, r"must not crop more .*got \(-3, -3\)"),
    "pad: mode": (
        lambda: B.pad(x, (1, 1), "mirror"),
        ValueError,
        "mode must be one of .*got 'mirror'",
    ),
    "pad: value": (lambda: B.pad(x, (1, 1), "reflect", 2.0), ValueError, "value must be None .*got 2.0"),
    "pad: dimensions": (
        lambda: B.pad(x, (1, 1, 1, 1), "replicate"),
        ValueError,
        r"input must have shape \(n, c, \*size\).*got \(3, 5\) where mode is 'replicate'",
    ),
    "pad: reflect": (lambda: B.pad(x, (5, 1), "reflect"), ValueError, r"must be smaller than .*got \(5, 1\)"),
    "pad: circular": (lambda: B.pad(x, (6, 1), "circular"), ValueError, r"comes round again, got \(6, 1\)"),
    "pad: nothing left": (lambda: B.pad(x, (-5, 0), "replicate"), ValueError, r"must leave some .*got \(-5, 0\)"),
    "unfold: input": (lambda: B.unfold(x, 2), ValueError, r"input must have shape .*got \(3, 5\)"),
    "unfold: kernel_size": (lambda: B.unfold(image, 5), ValueError, r"kernel_size \(5, 5\) .*must fit"),
    "unfold: stride": (lambda: B.unfold(image, 2, stride=0), ValueError, "stride must be .*got 0"),
    "fold: input": (lambda: B.fold(x, 4, 2), ValueError, r"input must have shape \(n, 4 c, 9\).*got \(3, 5\)"),
    "fold: output_size": (lambda: B.fold(x, 0, 2), ValueError, "output_size must be .*got 0"),
    "fold: kernel_size": (lambda: B.fold(x, 2, 3), ValueError, r"kernel_size \(3, 3\) .*must fit"),
    "pixel_shuffle: channels": (
        lambda: B.pixel_shuffle(image, 2),
        ValueError,
        r"input must have shape .*got \(2, 2, 4, 5\)",
    ),
    "pixel_shuffle: factor": (lambda: B.pixel_shuffle(image, -1), ValueError, "upscale_factor must be .*got -1"),
    "pixel_unshuffle: size": (
        lambda: B.pixel_unshuffle(image, 2),
        ValueError,
        r"input must have shape .*got \(2, 2, 4, 5\)",
    ),
    "channel_shuffle: channels": (lambda: B.channel_shuffle(image, 3), ValueError, "multiple of groups = 3, got"),
    "channel_shuffle: groups": (lambda: B.channel_shuffle(image, 0), ValueError, "groups must be .*got 0"),
    "interpolate: mode": (
        lambda: B.interpolate(image, 3, mode="linear"),
        ValueError,
        r"mode must be one of 'nearest', .*\(2, 2, 4, 5\), got 'linear'",
    ),
    "interpolate: nothing": (lambda: B.interpolate(image), ValueError, "size must be given, or scale_factor"),
    "interpolate: both": (lambda: B.interpolate(image, 3, 2), ValueError, "size must be given, or .*got 3 and 2"),
    "interpolate: size": (lambda: B.interpolate(image, (3, 0)), ValueError, r"size must be .*got \(3, 0\)"),
    "interpolate: scale_factor": (
        lambda: B.interpolate(image, scale_factor=(1, -2)),
        ValueError,
        r"scale_factor must be a positive number.*got \(1, -2\)",
    ),
    "interpolate: nothing left": (
        lambda: B.interpolate(image, scale_factor=0.1),
        ValueError,
        r"only n may be zero .*got \(0, 0\)",
    ),
    "interpolate: recompute_scale_factor": (
        lambda: B.interpolate(image, 3, recompute_scale_factor=True),
        ValueError,
        "recompute_scale_factor must not come with size",
    ),
    "interpolate: align_corners": (
        lambda: B.interpolate(image, 3, align_corners=False),
        ValueError,
        "align_corners must be None where mode is 'nearest', got False",
    ),
    "interpolate: antialias": (
        lambda: B.interpolate(image, 3, antialias=True),
        ValueError,
        "antialias must be False where mode is none of",
    ),
    "interpolate: lanczos": (
        lambda: B.interpolate(image, 3, mode="lanczos"),
        ValueError,
        "antialias must be True where mode is 'lanczos'",
    ),
    "interpolate: lanczos' corners": (
        lambda: B.interpolate(image, 3, mode="lanczos", align_corners=True, antialias=True),
        ValueError,
        "align_corners must be False where mode is 'lanczos'",
    ),
}
