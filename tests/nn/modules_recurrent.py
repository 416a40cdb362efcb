"""Recurrent modules, as test_modules.py tries them; test_recurrent.py has all their constructors' combinations."""

from __future__ import annotations

import torch


def sequence(*shapes):
    """Tensors of these shapes that learn: the input, and initial states."""
    return lambda: tuple(torch.randn(shape, requires_grad=True) for shape in shapes)


MODULES = [
    ("RNN", (3, 4), (5, 2, 3)),
    ("RNN", (3, 4, 2, "relu", False, True, 0.4, True), sequence((2, 5, 3), (4, 2, 4))),
    ("GRU", (3, 4), (5, 2, 3)),
    ("GRU", (3, 4, 2, False, True, 0.4, True), sequence((2, 5, 3), (4, 2, 4))),
    ("LSTM", (3, 4), (5, 2, 3)),
    ("LSTM", (3, 4, 2, False, True, 0.4, True), (2, 5, 3)),
    ("LSTM", (3, 4, 1, True, False, 0.0, True), (5, 3)),
    ("RNNCell", (3, 4), (2, 3)),
    ("RNNCell", (3, 4, False, "relu"), sequence((3,), (4,))),
    ("GRUCell", (3, 4), sequence((2, 3), (2, 4))),
    ("GRUCell", (3, 4, False), (3,)),
    ("LSTMCell", (3, 4), (2, 3)),
    ("LSTMCell", (3, 4, False), (3,)),
]

# torch.nn has no such function
