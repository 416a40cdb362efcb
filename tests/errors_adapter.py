"""Bad input to linear maps with frozen weights."""

from __future__ import annotations

import torch

import bptools.functional as B

x, w, a, b = torch.randn(3, 5), torch.randn(4, 5), torch.randn(2, 5), torch.randn(4, 2)

ERRORS = {
    "lora_linear: weight": (
        lambda: B.lora_linear(x, w[0], a, b),
        ValueError,
        r"weight must have 2 dim.*got \(5,\)",
    ),
    "lora_linear: input": (
        lambda: B.lora_linear(x.T, w, a, b),
        ValueError,
        r"input must have .*5\).*got \(5, 3\)",
    ),
    "lora_linear: lora_A": (lambda: B.lora_linear(x, w, b, b), ValueError, r"lora_A .*\(r, 5\), got \(4, 2\)"),
    "lora_linear: lora_B": (lambda: B.lora_linear(x, w, a, a), ValueError, r"lora_B .*\(4, 2\), got \(2, 5\)"),
    "lora_linear: bias": (lambda: B.lora_linear(x, w, a, b, x[0]), ValueError, r"bias .*\(4,\), got \(5,\)"),
    "lora_linear: dropout_p": (
        lambda: B.lora_linear(x, w, a, b, dropout_p=1.5),
        ValueError,
        "dropout_p must be between 0 and 1, got 1.5",
    ),
    "lora_linear: dtype": (
        lambda: B.lora_linear(x, w.double(), a, b),
        TypeError,
        "weight must have input's dtype torch.float32, got torch.float64",
    ),
    "lora_linear: dtypes": (
        lambda: B.lora_linear(x, w, a, b.double()),
        TypeError,
        "lora_B must have lora_A's dtype torch.float32, got torch.float64",
    ),
    "quantize_nf4: dtype": (
        lambda: B.quantize_nf4(w.double()),
        TypeError,
        "weight must be a tensor of float32, bfloat16 or float16, got torch.float64",
    ),
    "quantize_nf4: empty": (lambda: B.quantize_nf4(w[:0]), ValueError, r"weight must have elements.*\(0, 5\)"),
    "quantize_nf4: block_size": (lambda: B.quantize_nf4(w, 48), ValueError, "power of 2 from 32 to 4096, got 48"),
    "nf4_linear: weight": (lambda: B.nf4_linear(x, w), TypeError, "weight must be what quantize_nf4 .*got Tensor"),
    "nf4_linear: dimensions": (
        lambda: B.nf4_linear(x, B.quantize_nf4(w[0])),
        ValueError,
        r"weight must have 2 dimensions, got \(5,\)",
    ),
    "nf4_linear: input": (
        lambda: B.nf4_linear(x.T, B.quantize_nf4(w)),
        ValueError,
        r"input must have shape \(\.\.\., 5\).*got \(5, 3\)",
    ),
    "nf4_linear: bias": (
        lambda: B.nf4_linear(x, B.quantize_nf4(w), x[0]),
        ValueError,
        r"bias must have shape \(4,\), got \(5,\)",
    ),
}
DEVIATIONS = dict.fromkeys(
    ("lora_linear", "nf4_linear", "quantize_nf4", "dequantize_nf4"), "torch has no such function"
)
