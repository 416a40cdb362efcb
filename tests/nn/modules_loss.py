"""Losses and distances, as test_modules.py tries them."""

from __future__ import annotations

import torch


def two(*shape):
    return lambda: (torch.randn(shape, requires_grad=True), torch.randn(shape))


def three(*shape):
    return lambda: tuple(torch.randn(3, *shape).unbind()[i].clone().requires_grad_() for i in range(3))


def scored(classes, *rows):
    return lambda: (torch.randn(*rows, classes, requires_grad=True), torch.randint(classes, rows))


def signed(*shape):
    return lambda: (torch.randn(shape, requires_grad=True), torch.randn(shape).sign())


def shared(*shape):
    return lambda: ((torch.rand(shape) * 0.8 + 0.1).requires_grad_(), torch.rand(shape) * 0.8 + 0.1)


OURS_ALONE = ("CTCLoss", "DiceLoss", "FocalLoss", "TripletMarginWithDistanceLoss")  # in test_loss_modules.py

# Class name, constructor arguments, and a function that makes the inputs.
MODULES = [
    ("NLLLoss", (torch.tensor([1.0, 2.0, 0.5]), None, 1), scored(3, 6)),
    ("L1Loss", (), two(3, 4)),
    ("SmoothL1Loss", (None, None, "sum", 0.3), two(3, 4)),
    ("HuberLoss", ("none", 0.3), two(3, 4)),
    ("BCELoss", (), shared(3, 4)),
    (
        "BCEWithLogitsLoss",
        (torch.tensor([1.0, 0.5, 2.0]), None, None, "mean", torch.tensor([2.0, 1.0, 3.0])),
        shared(4, 3),
    ),
    ("KLDivLoss", (None, None, "batchmean", True), two(3, 4)),
    ("GaussianNLLLoss", (), lambda: (*two(3, 4)(), torch.rand(3, 1) + 0.1)),
    ("PoissonNLLLoss", (False, True), shared(3, 4)),
    ("MarginRankingLoss", (0.2,), lambda: (torch.randn(5, requires_grad=True), *signed(5)())),
    ("HingeEmbeddingLoss", (0.5,), signed(3, 4)),
    ("SoftMarginLoss", (), signed(3, 4)),
    ("CosineEmbeddingLoss", (0.1,), lambda: (*two(4, 3)(), torch.tensor([1, -1, 1, -1]))),
    ("TripletMarginLoss", (1.5, 2.0, 1e-6, True), three(4, 3)),
    ("MultiMarginLoss", (2, 0.5), scored(4, 5)),
    (
        "MultiLabelMarginLoss",
        (),
        lambda: (torch.randn(2, 3, requires_grad=True), torch.tensor([[0, 2, -1], [1, -1, 0]])),
    ),
    ("MultiLabelSoftMarginLoss", (), shared(3, 4)),
    ("CosineSimilarity", (1, 1e-3), two(3, 4)),
    ("PairwiseDistance", (1.0, 1e-3, True), two(3, 4)),
]
