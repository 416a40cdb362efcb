"""Cases of pooling in other dimensions than two, and of its rarer kinds."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from case import EMPTY, Case, Maker, call

import bptools.functional as B


def pooled(t: Maker, dims: int, *size: int, **options):
    """The arguments of unpooling: what max pooling gave, and its windows."""
    pool = getattr(F, f"max_pool{dims}d")
    y, places = pool(t(*size, grad=False), return_indices=True, **options)
    return (y.requires_grad_(), places), options


def samples(t: Maker, *shape: int) -> dict[str, torch.Tensor]:
    """What fractional pooling draws."""
    return {"_random_samples": t.positive(*shape, grad=False) - 0.5}


def in_float(name: str) -> Callable[..., torch.Tensor]:
    """Torch's function, of half precision by way of float32: of volumes it has no other on a CPU."""

    def pool(x, *args, **kwargs):
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        y = getattr(F, name)(wide, *args, **kwargs)
        return y if torch.is_autocast_enabled("cpu") else y.to(x.dtype)

    return pool


CASES: list[Case] = [
    Case("max_pool1d", "overlapping", call(2, 2, 7, kernel_size=3, stride=2, padding=1, dilation=2)),
    Case("max_pool1d", "one-row-ceil", call(2, 6, kernel_size=4, stride=3, ceil_mode=True)),
    Case("max_pool1d", "no-rows", call(0, 2, 4, kernel_size=2), only=EMPTY),
    Case("max_pool3d", "overlapping", call(1, 2, 4, 3, 5, kernel_size=(2, 3, 2), stride=(2, 1, 2), padding=1)),
    Case("max_pool3d", "one-volume", call(2, 4, 2, 3, kernel_size=2, ceil_mode=True), only=("values", "vmap")),
    Case("max_pool3d", "no-volumes", call(0, 2, 2, 2, 2, kernel_size=2), only=EMPTY),
    Case("adaptive_max_pool1d", "uneven", call(2, 2, 5, output_size=3)),
    Case("adaptive_max_pool1d", "no-rows", call(0, 2, 4, output_size=2), only=EMPTY),
    Case("adaptive_max_pool2d", "uneven", call(2, 2, 5, 4, output_size=(2, 3))),
    Case("adaptive_max_pool2d", "larger", call(2, 3, 2, output_size=[5, None]), only=("values", "vmap", "half")),
    Case("adaptive_max_pool2d", "no-images", call(0, 2, 4, 4, output_size=2), only=EMPTY),
    Case("adaptive_max_pool3d", "uneven", call(1, 2, 3, 4, 2, output_size=(2, 3, 1))),
    Case("adaptive_max_pool3d", "no-volumes", call(0, 2, 2, 2, 2, output_size=1), only=EMPTY),
    Case("fractional_max_pool2d", "size", lambda t: ((t(2, 2, 6, 5), 2, (3, 2)), samples(t, 2, 2, 2))),
    Case(
        "fractional_max_pool2d",
        "ratio",
        lambda t: ((t(2, 5, 6), (2, 1)), {"output_ratio": (0.6, 0.6), **samples(t, 1, 2, 2)}),
        only=("values", "gradcheck"),
    ),
    Case("fractional_max_pool3d", "size", lambda t: ((t(1, 2, 4, 5, 4), 2, (2, 3, 1)), samples(t, 1, 2, 3))),
    Case("max_unpool1d", "plain", lambda t: pooled(t, 1, 2, 2, 6, kernel_size=2)),
    Case("max_unpool2d", "plain", lambda t: pooled(t, 2, 2, 2, 4, 5, kernel_size=2, stride=(2, 3))),
    Case(
        "max_unpool2d",
        "size",
        lambda t: ((args := pooled(t, 2, 2, 5, 4, kernel_size=2))[0], {**args[1], "output_size": (5, 4)}),
        only=("values", "gradcheck"),
    ),
    Case("max_unpool3d", "plain", lambda t: pooled(t, 3, 1, 2, 2, 4, 2, kernel_size=2)),
    Case("avg_pool1d", "padded", call(2, 2, 7, kernel_size=3, stride=2, padding=1)),
    Case("avg_pool1d", "ceil", call(2, 6, kernel_size=4, stride=3, ceil_mode=True, count_include_pad=False)),
    Case("avg_pool1d", "no-rows", call(0, 2, 4, kernel_size=2), only=EMPTY),
    Case(
        "avg_pool3d",
        "padded",
        call(1, 2, 4, 3, 5, kernel_size=(2, 3, 2), stride=(2, 1, 2), padding=(0, 1, 1)),
        theirs=in_float("avg_pool3d"),
    ),
    Case("avg_pool3d", "divisor", call(2, 3, 2, 3, kernel_size=2, divisor_override=3), only=("values", "vmap")),
    Case("avg_pool3d", "no-volumes", call(0, 2, 2, 2, 2, kernel_size=2), only=EMPTY),
    Case("adaptive_avg_pool1d", "uneven", call(2, 2, 5, output_size=3)),
    Case("adaptive_avg_pool1d", "no-rows", call(0, 2, 4, output_size=2), only=EMPTY),
    Case("adaptive_avg_pool3d", "uneven", call(1, 2, 3, 4, 2, output_size=(2, 3, 1))),
    Case("adaptive_avg_pool3d", "no-volumes", call(0, 2, 2, 2, 2, output_size=1), only=EMPTY),
    Case("lp_pool1d", "cubes", lambda t: ((t.positive(2, 2, 6), 3.0, 2), {})),
    Case("lp_pool2d", "squares", call(2, 2, 4, 5, norm_type=2.0, kernel_size=(2, 3), stride=1)),
    Case("lp_pool2d", "ceil", call(2, 5, 4, norm_type=2.0, kernel_size=3, stride=2, ceil_mode=True)),
    Case(
        "lp_pool2d",
        "largest",
        lambda t: ((t(2, 4, 4), math.inf, 2), {}),
        only=("values", "gradcheck", "vmap"),
    ),
    Case("lp_pool3d", "squares", call(1, 2, 2, 3, 4, norm_type=2.0, kernel_size=2), theirs=in_float("lp_pool3d")),
]


def unpooling(dims: int):
    """Unpooling of its own pooling, of ours and torch's: for properties, whose numbers are drawn."""

    def of(functions):
        def both(x, *window):
            y, places = getattr(functions, f"max_pool{dims}d")(x, *window, return_indices=True)
            return getattr(functions, f"max_unpool{dims}d")(y, places, *window, output_size=x.shape)

        return both

    return of(B), of(F)
