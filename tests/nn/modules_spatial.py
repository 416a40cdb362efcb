"""Transposed convolutions, padding, folds, shuffles and upsampling, as test_modules.py tries them."""

from __future__ import annotations

# Class name, constructor arguments, and the shape of the input.
MODULES = [
    ("ConvTranspose1d", (2, 4, 3, 2, 1, 1), (2, 2, 5)),
    ("ConvTranspose2d", (2, 4, 3, 2, 1, 1, 2, False, 2), (2, 2, 3, 4)),
    ("ConvTranspose3d", (2, 3, 2, (1, 2, 1)), (2, 2, 3, 2)),
    ("Conv1d", (2, 4, 3, 1, 2, 1, 1, True, "reflect"), (2, 2, 7)),
    ("Conv2d", (2, 4, (3, 2), 1, "same", 1, 2, True, "circular"), (2, 2, 5, 4)),
    ("Conv3d", (2, 2, 3, 2, (1, 0, 2), 1, 1, False, "replicate"), (2, 3, 3, 4)),
    *[
        (f"{kind}Pad{len(size)}d", args, shape)
        for size, pad in (((4,), (1, 2)), ((3, 4), (2, 0, -1, 1)), ((2, 3, 3), 1))
        for shape in [(2, 2, *size)]
        for kind, args in (
            ("Constant", (pad, 1.5)),
            ("Zero", (pad,)),
            ("Reflection", (pad,)),
            ("Replication", (pad,)),
            ("Circular", (pad,)),
        )
    ],
    ("Unfold", (2, 1, 1, 2), (2, 2, 4, 3)),
    ("Fold", ((4, 3), 2, 1, 1, 2), (2, 8, 6)),
    ("PixelShuffle", (2,), (2, 4, 3, 2)),
    ("PixelUnshuffle", (2,), (2, 2, 4, 2)),
    ("ChannelShuffle", (2,), (2, 6, 2, 1)),
    ("Upsample", (None, 2), (2, 2, 4)),
    ("Upsample", (None, (1.5, 0.6), "bicubic", True), (2, 2, 4, 5)),
    ("Upsample", (None, 1.3, "bilinear", None, True), (2, 2, 4, 5)),
    ("Upsample", ((2, 5, 3), None, "trilinear"), (2, 2, 3, 4, 2)),
    ("UpsamplingNearest2d", (None, 2), (2, 2, 3, 4)),
    ("UpsamplingBilinear2d", ((5, 3),), (2, 2, 3, 4)),
]
