"""Modules that most networks are made of, as test_modules.py tries them."""

from __future__ import annotations

import torch

# Class name, constructor arguments, and the shape of the input, or a function that makes the inputs.
MODULES = [
    ("Linear", (5, 4), (3, 5)),
    ("Linear", (5, 4, False), (2, 3, 5)),
    (
        "Bilinear",
        (5, 4, 3),
        lambda: (torch.randn(2, 5, requires_grad=True), torch.randn(2, 4, requires_grad=True)),
    ),
    ("ReLU", (), (3, 5)),
    ("ReLU", (True,), (3, 5)),
    ("LeakyReLU", (0.2,), (3, 5)),
    ("LeakyReLU", (0.2, True), (3, 5)),
    ("GELU", (), (3, 5)),
    ("GELU", ("tanh",), (3, 5)),
    ("SiLU", (), (3, 5)),
    ("SiLU", (True,), (3, 5)),
    ("Sigmoid", (), (3, 5)),
    ("Tanh", (), (3, 5)),
    ("Conv1d", (2, 4, 3), (2, 2, 7)),
    ("Conv2d", (2, 4, 3, 2, 1, 1, 2, False), (2, 2, 7, 6)),
    ("Conv2d", (2, 4, 3, 1, "same"), (2, 7, 6)),
    ("Conv3d", (2, 4, 2, (1, 2, 1)), (2, 2, 3, 4, 3)),
    ("MaxPool2d", (3, 2, 1, 1, False, True), (2, 2, 6, 5)),
    ("AvgPool2d", (3, 2, 1, True, False), (2, 2, 6, 5)),
    ("AdaptiveAvgPool2d", ((None, 2),), (2, 2, 6, 5)),
    ("LayerNorm", (5,), (3, 5)),
    ("LayerNorm", ((3, 5), 1e-3, False), (2, 3, 5)),
    ("RMSNorm", (5,), (3, 5)),
    ("RMSNorm", ((3, 5), 1e-3, False), (2, 3, 5)),
    ("BatchNorm1d", (4,), (6, 4)),
    ("BatchNorm1d", (4, 1e-3, None), (6, 4, 3)),
    ("BatchNorm2d", (4, 1e-5, 0.3), (3, 4, 2, 5)),
    ("BatchNorm2d", (4, 1e-5, 0.1, False, False), (3, 4, 2, 5)),
    ("BatchNorm3d", (4,), (3, 4, 2, 1, 5)),
    ("Softmax", (-1,), (3, 5)),
    ("LogSoftmax", (0,), (3, 5)),
    ("Dropout", (0.3,), (3, 5)),
    ("Dropout", (0.3, True), (3, 5)),
    ("Embedding", (7, 3, 2), lambda: (torch.randint(7, (2, 5)),)),
    ("CrossEntropyLoss", (), lambda: (torch.randn(6, 4, requires_grad=True), torch.randint(4, (6,)))),
    (
        "CrossEntropyLoss",
        (torch.tensor([1.0, 2.0, 0.5, 1.5]), None, 1, None, "none", 0.1),
        lambda: (torch.randn(6, 4, 2, requires_grad=True), torch.randint(4, (6, 2))),
    ),
    ("MSELoss", (), lambda: (torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True))),
    ("MSELoss", (None, None, "sum"), lambda: (torch.randn(6, requires_grad=True), torch.randn(6))),
]
