"""Norms beyond those of the foundation, as test_modules.py tries them."""

from __future__ import annotations

MODULES = [
    ("GroupNorm", (2, 4), (3, 4, 5)),
    ("GroupNorm", (4, 4, 1e-3, False), (3, 4, 2, 5)),
    ("InstanceNorm1d", (4, 1e-5, 0.1, True), (3, 4, 5)),
    ("InstanceNorm1d", (4,), (4, 5)),
    ("InstanceNorm2d", (4, 1e-3, 0.3, True, True), (3, 4, 2, 5)),
    ("InstanceNorm2d", (4, 1e-5, None, False, True), (4, 2, 5)),
    ("InstanceNorm3d", (4, 1e-5, 0.1, True), (3, 4, 2, 1, 5)),
    ("LocalResponseNorm", (3, 0.5, 0.6, 2.0), (3, 4, 5)),
    ("SyncBatchNorm", (4,), (6, 4)),
    ("SyncBatchNorm", (4, 1e-3, None), (6, 4, 3)),
]
