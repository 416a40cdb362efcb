"""The linear map with a low-rank update."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.functional._checks import check_probability, shape_of
from bptools.ops import dropout as _dropout
from bptools.ops import lora as _lora


def lora_linear(
    input: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """`linear(input, weight, bias) + scaling * linear(linear(dropout(input), lora_A), lora_B)`, in one op.

    Keeps input for backward, with dropout one byte for each of its elements, and nothing else of its size.

    Args:
        input: (..., in_features).
        weight: (out_features, in_features), frozen as a rule: then it costs neither time nor memory in backward.
        lora_A: (r, in_features).
        lora_B: (out_features, r), of lora_A's dtype, which may be float32 beside an input in half precision.
        bias: (out_features,), or None.
        scaling: of the update: alpha / r, as a rule.
        dropout_p: the probability with which an element of the update's input is zeroed.
        training: if False, there is no dropout.

    Returns:
        (..., out_features), in input's dtype.

    Raises:
        ValueError: if the shapes do not fit, or `dropout_p` is not between 0 and 1.
        TypeError: if an argument is not a floating tensor, or the dtypes do not fit.
    """
    name = "lora_linear"
    check_probability(name, "dropout_p", dropout_p)
    if weight.dim() != 2:
        raise ValueError(f"{name}: weight must have 2 dimensions, got {shape_of(weight)}")
    o, i = weight.shape
    if input.dim() == 0 or input.shape[-1] != i:
        raise ValueError(
            f"{name}: input must have shape (..., {i}) to fit weight {shape_of(weight)}, got {shape_of(input)}"
        )
    if lora_A.dim() != 2 or lora_A.shape[1] != i:
        raise ValueError(f"{name}: lora_A must have shape (r, {i}), got {shape_of(lora_A)}")
    if shape_of(lora_B) != (o, lora_A.shape[0]):
        raise ValueError(f"{name}: lora_B must have shape ({o}, {lora_A.shape[0]}), got {shape_of(lora_B)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must have shape ({o},), got {shape_of(bias)}")
    if not torch.is_autocast_enabled(input.device.type):
        for argument, t in (("weight", weight), ("bias", bias)):
            if t is not None and t.dtype is not input.dtype:
                raise TypeError(f"{name}: {argument} must have input's dtype {input.dtype}, got {t.dtype}")
    if lora_B.dtype is not lora_A.dtype:
        raise TypeError(f"{name}: lora_B must have lora_A's dtype {lora_A.dtype}, got {lora_B.dtype}")
    keep = None
    if training and dropout_p > 0:
        keep = _dropout.draw(torch.empty_like(input, dtype=torch.uint8), dropout_p)
    return _lora.lora_linear(input, weight, lora_A, lora_B, bias, keep, float(scaling), float(dropout_p))
