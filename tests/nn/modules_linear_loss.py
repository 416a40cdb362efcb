"""The head of a classifier and its loss in one module, as test_modules.py tries it where torch has it."""

from __future__ import annotations

import torch

MODULES = [
    ("LinearCrossEntropyLoss", (3, 4), lambda: (torch.randn(6, 3, requires_grad=True), torch.randint(4, (6,)))),
]
OURS_ALONE: set[str] = set()
if not hasattr(torch.nn, "LinearCrossEntropyLoss"):  # before torch 2.14 or so; see test_linear_loss.py
    OURS_ALONE = {name for name, *_ in MODULES}
    MODULES = []
