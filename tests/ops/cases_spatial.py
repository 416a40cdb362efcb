"""Cases of transposed convolutions, padding, unfold and fold, interpolation and shuffles."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from case import EMPTY, Case, call
from torch import Tensor


def in_float32(x: Tensor, **constants: Any) -> Tensor:
    """Torch's interpolation with antialias, which a CPU does not do in half precision."""
    return F.interpolate(x.to(torch.promote_types(x.dtype, torch.float32)), **constants).to(x.dtype)


CASES: list[Case] = [
    # transposed convolutions: (input, weight, bias, stride, padding, output_padding, groups, dilation)
    Case("conv_transpose1d", "plain", lambda t: ((t(2, 3, 4), t(3, 2, 2)), {})),
    Case("conv_transpose1d", "everything", lambda t: ((t(2, 2, 3), t(2, 2, 3), t(4), 3, 1, 2, 2, 2), {})),
    Case("conv_transpose2d", "plain", lambda t: ((t(2, 2, 3, 2), t(2, 3, 2, 3), t(3)), {})),
    Case(
        "conv_transpose2d",
        "everything",
        lambda t: ((t(1, 4, 2, 3), t(4, 1, 3, 2), t(2), (2, 3), (1, 0), (1, 2), 2, (2, 1)), {}),
    ),
    Case(
        "conv_transpose2d",
        "one-image",
        lambda t: ((t(3, 2, 2), t(3, 1, 2, 2)), {"groups": 3, "padding": 1, "stride": 2}),
    ),
    Case("conv_transpose2d", "no-images", lambda t: ((t(0, 2, 3, 3), t(2, 3, 2, 2), t(3)), {}), only=EMPTY),
    Case(
        "conv_transpose3d",
        "strided",
        lambda t: (
            (t(1, 2, 2, 1, 3), t(2, 2, 2, 1, 2), t(2)),
            {"stride": (2, 1, 1), "padding": (0, 0, 1), "output_padding": (1, 0, 0)},
        ),
    ),
    # padding
    Case("pad", "constant", call(3, 4, pad=(1, 2), value=0.5)),
    Case("pad", "cropped", call(2, 3, 4, pad=[-1, 2, 2, -2, 0, 1])),
    Case("pad", "reflect", call(2, 2, 4, pad=(3, 1), mode="reflect")),
    Case("pad", "reflect-image", call(2, 3, 4, pad=(1, -2, 0, 2), mode="reflect")),
    Case("pad", "replicate", call(1, 2, 3, 2, pad=(3, -1, 1, 1), mode="replicate")),
    Case("pad", "replicate-volume", call(2, 2, 2, 3, pad=(1, 0, 2, 1, 0, 1), mode="replicate")),
    Case("pad", "circular", call(2, 2, 3, 4, pad=(2, -1, 3, 0), mode="circular")),
    Case("pad", "empty", call(0, 3, pad=(1, 1, 2, 0)), only=EMPTY),
    Case("pad", "nothing", call(2, 3, pad=()), only=EMPTY),
    Case("pad", "no-images", call(0, 2, 3, pad=(2, 1), mode="reflect"), only=EMPTY),
    # unfold and fold
    Case("unfold", "plain", call(2, 2, 4, 3, kernel_size=2)),
    Case("unfold", "everything", lambda t: ((t(2, 5, 4), (2, 3), (2, 1), (0, 1), (1, 2)), {})),
    Case("unfold", "no-images", call(0, 2, 4, 4, kernel_size=2), only=EMPTY),
    Case("fold", "plain", call(2, 8, 6, output_size=(4, 3), kernel_size=2)),
    Case(
        "fold",
        "everything",
        lambda t: ((t(12, 6), (5, 4), (2, 3), (2, 1), (0, 1), (1, 2)), {}),
    ),
    Case("fold", "no-images", call(0, 8, 9, output_size=4, kernel_size=2), only=EMPTY),
    # shuffles
    Case("pixel_shuffle", "image", call(2, 8, 1, 3, upscale_factor=2)),
    Case("pixel_shuffle", "no-batch", call(9, 2, 1, upscale_factor=3), only=EMPTY),
    Case("pixel_unshuffle", "image", call(2, 2, 4, 2, downscale_factor=2)),
    Case("pixel_unshuffle", "more-dimensions", call(2, 1, 1, 3, 6, downscale_factor=3), only=EMPTY),
    Case("channel_shuffle", "image", call(2, 6, 2, 1, groups=3)),
    Case("channel_shuffle", "no-images", call(0, 4, 2, groups=2), only=EMPTY),
    # interpolation
    *[
        Case(
            "interpolate",
            id,
            call(*shape, mode=mode, **constants),
            theirs=in_float32 if "antialias" in id else None,
            only=only,
        )
        for id, mode, shape, constants, only in (
            ("nearest", "nearest", (2, 2, 3, 2), {"scale_factor": 2}, ()),
            ("nearest-uneven", "nearest", (1, 2, 5), {"size": 3}, ()),
            ("nearest-volume", "nearest", (1, 2, 2, 3, 2), {"size": (3, 2, 4)}, ()),
            ("nearest-exact", "nearest-exact", (1, 2, 3, 4), {"scale_factor": (1.5, 0.6)}, ()),
            ("linear", "linear", (2, 2, 4), {"scale_factor": 1.7}, ()),
            ("recomputed", "linear", (1, 2, 3), {"scale_factor": 1.5, "recompute_scale_factor": True}, EMPTY),
            ("bilinear", "bilinear", (1, 2, 3, 4), {"size": (5, 3)}, ()),
            ("bilinear-corners", "bilinear", (1, 2, 3, 4), {"size": (5, 1), "align_corners": True}, ()),
            ("trilinear", "trilinear", (1, 1, 2, 3, 2), {"size": (3, 2, 4)}, ()),
            ("bicubic", "bicubic", (1, 2, 3, 2), {"size": (4, 3)}, ()),
            ("bicubic-corners", "bicubic", (1, 1, 3, 4), {"scale_factor": 1.4, "align_corners": True}, EMPTY),
            ("antialias", "bilinear", (1, 2, 5, 4), {"size": (2, 5), "antialias": True}, ()),
            ("bicubic-antialias", "bicubic", (1, 1, 6, 3), {"scale_factor": (0.4, 1), "antialias": True}, ()),
            ("area", "area", (1, 2, 5), {"size": 2}, ()),
            ("area-image", "area", (1, 2, 3, 4), {"scale_factor": 0.7}, EMPTY),
            ("area-volume", "area", (1, 2, 3, 2, 4), {"size": (2, 3, 2)}, EMPTY),
            ("no-images", "bilinear", (0, 2, 3, 4), {"size": (2, 5)}, EMPTY),
        )
    ],
]
