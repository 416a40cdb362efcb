"""Bad input to the head of a classifier and its loss in one function."""

from __future__ import annotations

import torch

import bptools.functional as B

learns = torch.ones(4, requires_grad=True)
x, w, t = torch.randn(3, 5), torch.randn(4, 5), torch.tensor([0, 3, 1])
soft = torch.rand(3, 4)
f = B.linear_cross_entropy

ERRORS = {
    f"linear_cross_entropy: {name}": (call, kind, pattern)
    for name, call, kind, pattern in (
        ("reduction", lambda: f(x, w, t, reduction="max"), ValueError, "reduction must be .* got 'max'"),
        ("smoothing", lambda: f(x, w, t, label_smoothing=2), ValueError, "label_smoothing must .* 0 to 1, got 2"),
        ("weight", lambda: f(x, w[0], t), ValueError, r"linear_weight must have shape \(C, .*got \(5,\)"),
        (
            "features",
            lambda: f(x[:, 1:], w, t),
            ValueError,
            r"input must .* \(N, 5\) or \(5,\), got \(3, 4\)",
        ),
        ("batches", lambda: f(x[None], w, t), ValueError, r"input must have shape .*got \(1, 3, 5\)"),
        ("vector", lambda: f(x[0], w[:, None], t), ValueError, r"input must have shape \(N, 5\), got \(5,\)"),
        ("bias", lambda: f(x, w, t, linear_bias=x[0]), ValueError, r"linear_bias .* \(4,\), got \(5,\)"),
        ("classes", lambda: f(x, w, t, weight=x[0]), ValueError, r"weight must have shape \(4,\), got \(5,\)"),
        ("target", lambda: f(x, w, t[:2]), ValueError, r"target must have shape \(3,\) .* \(3, 4\) .*got \(2,\)"),
        ("indices", lambda: f(x, w, t.int()), TypeError, "target must hold class indices.*got torch.int32"),
        ("probabilities", lambda: f(x, w, soft.long()), TypeError, "target .* probabilities, got torch.int64"),
        ("ignored", lambda: f(x, w, soft, ignore_index=1), ValueError, "ignore_index is for .* got 1"),
        ("range", lambda: f(x, w, t + 1), IndexError, "target must hold classes, 0 to 3, .*got 1 to 4"),
        ("dtype", lambda: f(x, w.double(), t), TypeError, "linear_weight must .*float32, got torch.float64"),
        ("dtypes", lambda: f(x, w, t, weight=w[:, 0].double()), TypeError, "weight must .* got torch.float64"),
        (
            "learns",
            lambda: f(x, w, t, weight=learns),
            TypeError,
            "weight has no gradient",
        ),
    )
}
DEVIATIONS = {
    "linear_cross_entropy": "z_loss and return_argmax are ours alone; torch 2.10 has no such function at all",
}
