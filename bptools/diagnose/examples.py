"""Networks in which gradients vanish, explode or die, and the cures: to be looked at by `bptools diagnose`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bptools import nn

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}
NORMS = {"none": None, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
INITS = ("torch", "small", "large", "gain")


class Deep(torch.nn.Module):
    """A deep network of fully connected layers, with its loss.

    Args:
        depth: number of hidden layers.
        width: of each.
        activation: `"sigmoid"`, `"tanh"`, `"relu"` or `"gelu"`.
        init: of hidden weights: `"torch"` (uniform, of variance 1 / (3 fan_in)), `"small"` and `"large"` (normal,
            of 0.1 and 3 times the deviation of `"gain"`), or `"gain"`: normal, of deviation
            `bptools.nn.init.gain(activation) / √fan_in`, which is He's for ReLU.
        norm: of what enters each activation: `"none"`, `"batch"` or `"layer"`.
        residual: whether each layer adds to what it is given.

    Raises:
        ValueError: if an argument is none of these.
    """

    def __init__(self, depth: int, width: int, activation: str, init: str, norm: str, residual: bool) -> None:
        super().__init__()
        known = {"activation": ACTIVATIONS, "init": INITS, "norm": NORMS}
        for name, value in (("activation", activation), ("init", init), ("norm", norm)):
            if value not in known[name]:
                raise ValueError(f"{name} must be one of {', '.join(known[name])}, got {value!r}")
        for name, number in (("depth", depth), ("width", width)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a positive int, got {number!r}")
        self.residual = residual
        self.layers = torch.nn.ModuleList()
        for i in range(depth):
            linear = nn.Linear(width if i else 64, width)
            if init != "torch":
                scale = {"small": 0.1, "large": 3.0, "gain": 1.0}[init] * nn.init.gain(activation)
                torch.nn.init.normal_(linear.weight, std=scale / math.sqrt(linear.in_features))
                torch.nn.init.zeros_(linear.bias)
            parts = [linear, *([NORMS[norm](width)] if NORMS[norm] else []), ACTIVATIONS[activation]()]
            self.layers.append(torch.nn.Sequential(*parts))
        self.head, self.loss = nn.Linear(width, 10), nn.CrossEntropyLoss()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean cross entropy of images (n, 64) whose digits are y (n,)."""
        for i, layer in enumerate(self.layers):
            x = x + layer(x) if self.residual and i else layer(x)
        return self.loss(self.head(x), y)


def deep(
    batch: int,
    size: int | None,
    device: torch.device,
    *,
    depth: int = 20,
    width: int = 64,
    activation: str = "relu",
    init: str = "torch",
    norm: str = "none",
    residual: bool = False,
) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """`Deep`, and standardised images of scikit-learn's digits (batch, 64) with their classes (batch,).

    Raises:
        ValueError: if a size is asked for, which these images have already, or an argument is wrong.
    """
    from sklearn.datasets import load_digits

    if size is not None:
        raise ValueError(f"size must be left out, as the images are of 8×8, got {size}")
    model = Deep(depth, width, activation, init, norm, residual)
    images, digits = load_digits(return_X_y=True)
    chosen = torch.randperm(len(digits))[:batch]
    x, y = torch.tensor(images, dtype=torch.float32)[chosen], torch.tensor(digits)[chosen]
    return model, ((x - x.mean()) / x.std()).to(device), y.to(device)
