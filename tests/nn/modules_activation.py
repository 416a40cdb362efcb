"""Activations and dropouts as modules, as test_modules.py tries them."""

from __future__ import annotations

# Class name, constructor arguments, and the shape of the input.
MODULES = [
    ("LogSigmoid", (), (3, 5)),
    ("Tanhshrink", (), (3, 5)),
    ("Softsign", (), (3, 5)),
    ("Softplus", (2.0, 1.0), (3, 5)),
    ("ELU", (0.7, True), (3, 5)),
    ("SELU", (), (3, 5)),
    ("SELU", (True,), (3, 5)),
    ("CELU", (0.7, True), (3, 5)),
    ("Mish", (True,), (3, 5)),
    ("Hardtanh", (-0.7, 0.3, True), (3, 5)),
    ("ReLU6", (), (3, 5)),
    ("ReLU6", (True,), (3, 5)),
    ("Hardsigmoid", (True,), (3, 5)),
    ("Hardswish", (True,), (3, 5)),
    ("Threshold", (0.3, -0.2, True), (3, 5)),
    ("Hardshrink", (0.3,), (3, 5)),
    ("Softshrink", (0.3,), (3, 5)),
    ("PReLU", (), (3, 5)),
    ("PReLU", (5, 0.1), (3, 5, 2)),
    ("RReLU", (), (3, 5)),
    ("RReLU", (0.2, 0.4, True), (3, 5)),
    ("Softmin", (-1,), (3, 5)),
    ("Softmax2d", (), (2, 3, 2, 2)),
    ("Softmax2d", (), (3, 2, 2)),
    ("GLU", (), (3, 4)),
    ("GLU", (0,), (2, 5)),
    ("Dropout1d", (0.3,), (4, 3, 2)),
    ("Dropout2d", (0.3, True), (4, 3, 2, 2)),
    ("Dropout3d", (0.3,), (4, 3, 2, 1, 2)),
    ("Dropout3d", (0.3, True), (3, 2, 1, 2)),
    ("AlphaDropout", (0.3,), (3, 5)),
    ("AlphaDropout", (0.3, True), (3, 5)),
    ("FeatureAlphaDropout", (0.3, True), (3, 4, 2)),
]
OURS_ALONE = ("SwiGLU", "GEGLU", "ReGLU", "DropPath", "StochasticDepth")
