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
}
DEVIATIONS = {"lora_linear": "torch has no such function"}
