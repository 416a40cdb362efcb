"""Modules of pooling, as test_modules.py tries them."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pooled(dims, *size):
    def make():
        y, places = getattr(F, f"max_pool{dims}d")(torch.randn(size), 2, return_indices=True)
        return y.requires_grad_(), places

    return make


NO_HALF = {"AvgPool3d"}  # torch's, on a CPU
MODULES = [
    ("MaxPool1d", (3, 2, 1, 1, True, True), (2, 2, 6)),
    ("MaxPool3d", (2, 1), (2, 2, 3, 4, 3)),
    ("MaxUnpool1d", (2,), pooled(1, 2, 2, 6)),
    ("MaxUnpool2d", (2,), pooled(2, 2, 4, 6)),
    ("MaxUnpool3d", (2,), pooled(3, 1, 2, 2, 4, 6)),
    ("AvgPool1d", (3, 2, 1, True, False), (2, 2, 6)),
    ("AvgPool3d", (2, 1, 1, False, False, 3), (2, 2, 3, 4, 3)),
    ("FractionalMaxPool2d", (2, 3, None, True, torch.full((2, 2, 2), 0.3)), (2, 2, 6, 5)),
    ("FractionalMaxPool3d", (2, None, 0.5, False, torch.full((2, 2, 3), 0.7)), (2, 2, 4, 6, 5)),
    ("LPPool1d", (2, 3), (2, 2, 6)),
    ("LPPool2d", (2.0, 2, 1, True), (2, 2, 6, 5)),
    ("LPPool3d", (float("inf"), 2), (2, 2, 2, 4, 3)),
    ("AdaptiveMaxPool1d", (3, True), (2, 2, 5)),
    ("AdaptiveMaxPool2d", ((None, 2),), (2, 2, 6, 5)),
    ("AdaptiveMaxPool3d", (2,), (2, 2, 6, 5, 3)),
    ("AdaptiveAvgPool1d", (3,), (2, 2, 5)),
    ("AdaptiveAvgPool3d", ((2, None, 1),), (2, 2, 6, 5, 3)),
]
