"""The losses that torch.nn lacks, or that cannot be tried in its table, as modules."""

from __future__ import annotations

import torch

import bptools.functional as B
import bptools.nn


def test_focal_and_dice_loss():
    x, t = torch.rand(2, 2, 3, 4)
    focal = bptools.nn.FocalLoss(-1, 1.5, "sum")
    assert torch.equal(focal(x, t), B.focal_loss(x, t, -1, 1.5, "sum"))
    assert repr(focal) == "FocalLoss(alpha=-1, gamma=1.5, reduction='sum')"
    dice = bptools.nn.DiceLoss(0.5, "none")
    assert torch.equal(dice(x[None], t[None]), B.dice_loss(x[None], t[None], 0.5, "none"))
    assert repr(dice) == "DiceLoss(smooth=0.5, reduction='none')"


def test_triplet_margin_with_a_distance():
    """Its row in the table would have to name a function, which repr and pickles do not like."""
    tensors = [torch.randn(4, 3, requires_grad=True) for _ in range(3)]
    arguments = {"distance_function": torch.nn.PairwiseDistance(), "margin": 2.0, "swap": True}
    found = []
    for package in (bptools.nn, torch.nn):
        y = package.TripletMarginWithDistanceLoss(**arguments)(*tensors)
        found.append([y, *torch.autograd.grad(y, tensors)])
    torch.testing.assert_close(*found)


def test_ctc_loss():
    """Its gradient is torch's behind a log_softmax alone: torch's is not the gradient of log_probs."""
    x = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    rest = torch.tensor([[2, 0], [3, 3]]), torch.tensor([5, 4]), torch.tensor([2, 2])
    found = []
    for package in (bptools.nn, torch.nn):
        loss = package.CTCLoss(1, "sum", True)
        assert repr(loss) == "CTCLoss()"
        y = loss(x.log_softmax(2), *rest)
        found.append([y, *torch.autograd.grad(y, x)])
    torch.testing.assert_close(*found)
    assert torch.autograd.gradcheck(lambda x: bptools.nn.CTCLoss(1)(x, *rest), x)  # torch's fails this
