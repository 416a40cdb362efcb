"""Cases of the ops that most networks are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from case import CAPABILITIES, EMPTY, NO_HESSIAN, Case, Maker, call
from torch import Tensor

import bptools.functional as B


def training(functions: Any) -> Callable[..., Tensor]:
    """Batch norm in training, of (x, weight, bias), with running buffers that live for one call."""
    return lambda x, w, b: functions.batch_norm(x, x.new_zeros(3), x.new_ones(3), w, b, training=True)


def statistics(t: Maker) -> tuple[Tensor, Tensor]:
    """A running mean and variance."""
    return t(3, grad=False), t.positive(3, grad=False)


def qkv(t: Maker, heads: int = 2, keys: int = 3) -> tuple[Tensor, ...]:
    """Query, key and value: two samples, two heads of the query, two queries, four features.

    As in models, a head is a slice of what one linear layer gave, so heads lie beside features in memory.
    """
    shapes = ((2, 2, 2, 4), (2, keys, heads, 4), (2, keys, heads, 4))
    return tuple(t(*shape, grad=False).transpose(1, 2).requires_grad_() for shape in shapes)


def first_excluded(mask: Tensor) -> Tensor:
    """The mask, with a first row that excludes everything."""
    return torch.cat([torch.zeros_like(mask[:1]), mask[1:]])


def attention(*args: Any, **kwargs: Any) -> Tensor:
    """Torch's attention, by the path that can be differentiated twice and in forward mode."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


CASES: list[Case] = [
    # linear
    Case("linear", "bias", lambda t: ((t(3, 5), t(4, 5), t(4)), {})),
    Case("linear", "no-bias", lambda t: ((t(2, 3, 5), t(4, 5)), {})),
    Case("linear", "vector-input", lambda t: ((t(5), t(4, 5), t(4)), {})),
    Case("linear", "vector-weight", lambda t: ((t(3, 5), t(5)), {})),
    Case("linear", "no-rows", lambda t: ((t(0, 5), t(4, 5), t(4)), {}), only=EMPTY),
    Case("linear", "no-features", lambda t: ((t(3, 0), t(4, 0), t(4)), {}), only=EMPTY),
    # bilinear
    Case("bilinear", "bias", lambda t: ((t(3, 2), t(3, 4), t(2, 2, 4), t(2)), {})),
    Case("bilinear", "no-bias", lambda t: ((t(2, 3, 2), t(2, 3, 1), t(3, 2, 1)), {})),
    Case("bilinear", "no-rows", lambda t: ((t(0, 2), t(0, 3), t(4, 2, 3), t(4)), {}), only=EMPTY),
    # convolutions
    Case("conv1d", "plain", lambda t: ((t(2, 3, 5), t(4, 3, 2)), {})),
    Case("conv1d", "everything", lambda t: ((t(2, 2, 9), t(4, 1, 3), t(4), 2, 1, 2, 2), {})),
    Case("conv1d", "same", lambda t: ((t(2, 2, 5), t(3, 2, 3), t(3)), {"padding": "same", "dilation": 2})),
    Case(
        "conv1d",
        "same-even",  # torch warns of the copy that both make
        lambda t: ((t(2, 2, 5), t(3, 2, 4), t(3)), {}),
        ours=lambda x, w, b: B.conv1d(x, w, b, padding="same"),
        theirs=lambda x, w, b: F.conv1d(F.pad(x, (1, 2)), w, b),
    ),
    Case("conv2d", "plain", lambda t: ((t(2, 2, 4, 5), t(3, 2, 2, 3), t(3)), {})),
    Case(
        "conv2d",
        "everything",
        lambda t: ((t(2, 4, 5, 4), t(2, 2, 3, 2), t(2), (2, 3), (1, 2), (1, 2)), {"groups": 2}),
    ),
    Case("conv2d", "depthwise", lambda t: ((t(1, 3, 3, 4), t(6, 1, 2, 2)), {"groups": 3, "padding": 1})),
    Case(
        "conv2d", "wide-padding", lambda t: ((t(1, 2, 2, 3), t(2, 2, 1, 2)), {"stride": (3, 2), "padding": (2, 4)})
    ),
    Case("conv2d", "one-image", lambda t: ((t(2, 3, 3), t(3, 2, 2, 2), t(3)), {"padding": "valid"})),
    Case("conv2d", "no-images", lambda t: ((t(0, 2, 4, 4), t(3, 2, 3, 3), t(3)), {}), only=EMPTY),
    Case("conv3d", "plain", lambda t: ((t(1, 2, 3, 3, 4), t(2, 2, 2, 1, 3), t(2)), {"stride": (1, 2, 1)})),
    Case(
        "conv3d", "padded", lambda t: ((t(2, 2, 2, 3, 2), t(2, 1, 2, 2, 2)), {"padding": (1, 0, 1), "groups": 2})
    ),
    # pooling
    Case("max_pool2d", "plain", call(2, 2, 4, 5, kernel_size=2)),
    Case("max_pool2d", "overlapping", call(1, 2, 5, 4, kernel_size=3, stride=(2, 1), padding=1)),
    Case("max_pool2d", "ceil", call(1, 2, 5, 6, kernel_size=(2, 3), stride=2, dilation=(2, 1), ceil_mode=True)),
    Case("max_pool2d", "one-image", call(2, 4, 4, kernel_size=2, stride=1)),
    Case("max_pool2d", "no-images", call(0, 2, 4, 4, kernel_size=2), only=EMPTY),
    Case("avg_pool2d", "plain", call(2, 2, 4, 5, kernel_size=2)),
    Case("avg_pool2d", "overlapping", call(1, 2, 5, 4, kernel_size=3, stride=(2, 1), padding=1)),
    Case("avg_pool2d", "ceil", call(1, 2, 5, 6, kernel_size=(2, 3), stride=3, padding=1, ceil_mode=True)),
    Case("avg_pool2d", "uncounted", call(1, 2, 5, 4, kernel_size=3, padding=1, count_include_pad=False)),
    Case("avg_pool2d", "divisor", call(1, 2, 5, 4, kernel_size=(1, 3), divisor_override=2)),
    Case("avg_pool2d", "one-image", call(2, 4, 4, kernel_size=2, stride=1)),
    Case("avg_pool2d", "no-images", call(0, 2, 4, 4, kernel_size=2), only=EMPTY),
    Case("adaptive_avg_pool2d", "uneven", call(2, 2, 5, 4, output_size=(2, 3))),
    Case("adaptive_avg_pool2d", "global", call(2, 2, 3, 4, output_size=1)),
    Case("adaptive_avg_pool2d", "larger", call(1, 2, 3, 2, output_size=[5, None])),
    Case("adaptive_avg_pool2d", "one-image", call(2, 4, 4, output_size=2)),
    Case("adaptive_avg_pool2d", "no-images", call(0, 2, 4, 4, output_size=2), only=EMPTY),
    Case("adaptive_avg_pool2d", "no-places", call(2, 2, 0, 4, output_size=1), only=("values",)),
    # activations
    *[
        case
        for op in ("relu", "leaky_relu", "gelu", "silu", "sigmoid", "tanh")
        for case in (
            Case(op, "matrix", call(3, 5), theirs=getattr(torch, op, None)),
            Case(op, "scalar", call(), theirs=getattr(torch, op, None), only=EMPTY),
            Case(op, "empty", call(0, 3), theirs=getattr(torch, op, None), only=EMPTY),
        )
    ],
    Case("leaky_relu", "slope", call(7, negative_slope=0.3)),
    Case("leaky_relu", "negative-slope", call(7, negative_slope=-0.3)),
    Case("gelu", "approximate", call(3, 5, approximate="tanh")),
    # layer_norm
    Case("layer_norm", "affine", lambda t: ((t(3, 5), (5,), t(5), t(5)), {})),
    Case("layer_norm", "plain", lambda t: ((t(2, 3, 5), (3, 5)), {"eps": 1e-3})),
    Case("layer_norm", "weight-only", lambda t: ((t(2, 3, 5), [3, 5], t(3, 5)), {})),
    Case(
        "layer_norm",
        "bias-only",
        lambda t: ((t(3, 5), (5,), None, t(5)), {}),
        theirs=lambda x, shape, w, b: (
            F.layer_norm(x, shape) + b
        ),  # torch's second derivative is wrong, see test_peers
    ),
    Case("layer_norm", "one-row", lambda t: ((t(5), (5,), t(5), t(5)), {})),
    Case("layer_norm", "no-rows", lambda t: ((t(0, 5), (5,), t(5), t(5)), {}), only=EMPTY),
    # softmax
    *[
        case
        for op in ("softmax", "log_softmax")
        for case in (
            Case(op, "last", call(3, 5, dim=-1)),
            Case(op, "middle", call(2, 3, 4, dim=1)),
            Case(
                op,
                "cast",
                call(3, 5, dim=0, dtype=torch.float64),
                only=("values", "gradcheck", "half", "autocast"),
            ),
            Case(op, "scalar", call(dim=0), only=EMPTY),
            Case(op, "no-rows", call(0, 3, dim=1), only=EMPTY),
            Case(op, "no-classes", call(3, 0, dim=1), only=EMPTY),
        )
    ],
    # embedding
    Case("embedding", "matrix", lambda t: ((t.integers(5, 2, 3), t(5, 4)), {})),
    Case(
        "embedding",
        "padding",
        lambda t: ((t.integers(3, 9), t(3, 4)), {"padding_idx": -2}),
        # not "gradcheck": what padding_idx leaves out is in the derivative; nor "jvp", where torch leaves it in
        only=tuple(c for c in CAPABILITIES if c not in ("gradcheck", "jvp")),
    ),
    Case("embedding", "int32", lambda t: ((t.integers(3, 7).int(), t(3, 4)), {})),
    Case("embedding", "one-index", lambda t: ((t.integers(3), t(3, 4)), {})),
    Case("embedding", "no-index", lambda t: ((t.integers(3, 0, 2), t(3, 4)), {}), only=EMPTY),
    Case("embedding", "no-rows", lambda t: ((t.integers(3, 0), t(0, 4)), {}), only=EMPTY),
    # cross_entropy of class indices
    Case("cross_entropy", "matrix", lambda t: ((t(4, 5), t.integers(5, 4)), {})),
    *[
        Case(
            "cross_entropy",
            f"everything-{reduction}",
            lambda t, reduction=reduction: (
                (t(4, 3, 2), t.integers(3, 4, 2)),
                {
                    "weight": t.positive(3, grad=False),
                    "ignore_index": 1,
                    "label_smoothing": 0.1,
                    "reduction": reduction,
                },
            ),
        )
        for reduction in ("none", "mean", "sum")
    ],
    Case("cross_entropy", "weight", lambda t: ((t(4, 3), t.integers(3, 4), t.positive(3, grad=False)), {})),
    Case("cross_entropy", "smooth", lambda t: ((t(4, 3), t.integers(3, 4)), {"label_smoothing": 0.3})),
    Case(
        "cross_entropy",
        "image",
        lambda t: ((t(2, 3, 2, 2), t.integers(3, 2, 2, 2)), {"ignore_index": 2, "reduction": "none"}),
    ),
    Case("cross_entropy", "one-row", lambda t: ((t(5), t.integers(5)), {})),
    Case("cross_entropy", "uint8", lambda t: ((t(4, 3), t.integers(3, 4).byte()), {}), only=("values",)),
    Case("cross_entropy", "all-ignored", lambda t: ((t(4, 3), t.integers(1, 4) - 100), {}), only=EMPTY),
    Case("cross_entropy", "no-rows", lambda t: ((t(0, 3), t.integers(3, 0)), {}), only=EMPTY),
    Case(
        "cross_entropy",
        "no-pixels",
        lambda t: ((t(2, 3, 0), t.integers(3, 2, 0)), {"reduction": "none"}),
        only=EMPTY,
    ),
    # cross_entropy of class probabilities
    Case("cross_entropy", "probabilities", lambda t: ((t(4, 5), t.positive(4, 5)), {})),
    *[
        Case(
            "cross_entropy",
            f"probabilities-everything-{reduction}",
            lambda t, reduction=reduction: (
                (t(4, 3, 2), t.positive(4, 3, 2), t.positive(3)),
                {"label_smoothing": 0.1, "reduction": reduction},
            ),
        )
        for reduction in ("none", "mean", "sum")
    ],
    Case("cross_entropy", "probabilities-one-row", lambda t: ((t(5), t.positive(5), t.positive(5)), {})),
    Case("cross_entropy", "probabilities-no-rows", lambda t: ((t(0, 3), t(0, 3)), {}), only=EMPTY),
    # mse_loss
    Case("mse_loss", "matrix", lambda t: ((t(4, 3), t(4, 3)), {})),
    Case("mse_loss", "rows", lambda t: ((t(4, 3), t(4, 3)), {"reduction": "none"})),
    Case("mse_loss", "sum", lambda t: ((t(4, 3), t(4, 3)), {"reduction": "sum"})),
    *[
        Case(
            "mse_loss",
            f"weight-{reduction}",
            lambda t, reduction=reduction: (
                (t(4, 3), t(4, 3)),
                {"reduction": reduction, "weight": t.positive(4, 3)},
            ),
        )
        for reduction in ("none", "mean", "sum")
    ],
    Case("mse_loss", "scalar", lambda t: ((t(), t()), {}), only=EMPTY),
    Case("mse_loss", "empty", lambda t: ((t(0, 3), t(0, 3)), {}), only=EMPTY),
    # rms_norm
    Case("rms_norm", "affine", lambda t: ((t(3, 5), (5,), t(5)), {})),
    Case("rms_norm", "plain", lambda t: ((t(2, 3, 5), (3, 5)), {"eps": 1e-3})),
    Case("rms_norm", "one-row", lambda t: ((t(5), (5,), t(5)), {})),
    Case("rms_norm", "no-rows", lambda t: ((t(0, 5), (5,), t(5)), {}), only=EMPTY),
    # batch_norm: in training with running buffers made afresh for each call, which writes them
    Case("batch_norm", "training", lambda t: ((t(4, 3), t(3), t(3)), {}), training(B), training(F)),
    Case("batch_norm", "images", lambda t: ((t(2, 3, 2, 2), t(3), t(3)), {}), training(B), training(F)),
    Case("batch_norm", "no-buffers", lambda t: ((t(4, 3, 2), None, None, t(3), t(3)), {"training": True})),
    Case("batch_norm", "plain", lambda t: ((t(4, 3), None, None), {"training": True, "eps": 1e-3})),
    Case("batch_norm", "evaluation", lambda t: ((t(2, 3, 2), *statistics(t), t(3), t(3)), {})),
    Case("batch_norm", "plain-evaluation", lambda t: ((t(4, 3), *statistics(t)), {})),
    Case(
        "batch_norm",
        "shared-buffers",
        lambda t: ((t(4, 3), *statistics(t), t(3), t(3)), {"training": True}),
        only=("vmap",),
        raises={"vmap": (RuntimeError, "were not batched|mutate a captured Tensor|inplace arithmetic")},
    ),
    Case(
        "batch_norm", "no-samples", lambda t: ((t(0, 3, 2), t(3), t(3)), {}), training(B), training(F), only=EMPTY
    ),
    # dropout
    Case("dropout", "training", call(3, 5, p=0.3), random=True, raises=NO_HESSIAN),
    Case("dropout", "all", call(3, 5, p=1.0), random=True),
    Case("dropout", "empty", call(0, 3), random=True, only=EMPTY),
    # scaled_dot_product_attention
    *[
        Case("scaled_dot_product_attention", id, make, theirs=attention, **options)
        for id, make, options in (
            ("plain", lambda t: (qkv(t), {}), {}),
            ("causal", lambda t: (qkv(t), {"is_causal": True, "scale": 0.7}), {}),
            ("mask", lambda t: ((*qkv(t), first_excluded(t.booleans(2, 3))), {}), {}),
            ("bias", lambda t: ((*qkv(t), t(2, 1, 2, 3)), {}), {}),
            ("frozen-bias", lambda t: ((*qkv(t), t(2, 3, grad=False)), {}), {}),
            ("groups", lambda t: (qkv(t, heads=1), {"enable_gqa": True}), {}),
            ("no-heads", lambda t: ((t(2, 3), t(4, 3), t(4, 2)), {}), {}),
            ("no-keys", lambda t: (qkv(t, keys=0), {}), {"only": EMPTY}),
            ("dropout", lambda t: (qkv(t), {"dropout_p": 0.3}), {"random": True, "raises": NO_HESSIAN}),
        )
    ],
]
