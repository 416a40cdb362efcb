"""Losses: (N, ...) and its target -> (), or one number a row without reduction."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on `bptools.functional.cross_entropy`: logits (N, C, ...), target (N, ...)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class MSELoss(torch.nn.MSELoss):
    """`torch.nn.MSELoss` on `bptools.functional.mse_loss`: input and target of one shape."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.mse_loss(input, target, reduction=self.reduction)


class NLLLoss(torch.nn.NLLLoss):
    """`torch.nn.NLLLoss` on `bptools.functional.nll_loss`: log-probabilities (N, C, ...), target (N, ...)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.nll_loss(
            input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction
        )


class L1Loss(torch.nn.L1Loss):
    """`torch.nn.L1Loss` on `bptools.functional.l1_loss`: input and target of one shape (...)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(torch.nn.SmoothL1Loss):
    """`torch.nn.SmoothL1Loss` on `bptools.functional.smooth_l1_loss`: input and target of one shape (...)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(torch.nn.HuberLoss):
    """`torch.nn.HuberLoss` on `bptools.functional.huber_loss`: input and target of one shape (...)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class BCELoss(torch.nn.BCELoss):
    """`torch.nn.BCELoss` on our `binary_cross_entropy`: probabilities and target of one shape (...)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.binary_cross_entropy(input, target, weight=self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """`torch.nn.BCEWithLogitsLoss` on our `binary_cross_entropy_with_logits`: logits, target (...)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


class KLDivLoss(torch.nn.KLDivLoss):
    """`torch.nn.KLDivLoss` on `bptools.functional.kl_div`: log-probabilities and target (N, ...)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class GaussianNLLLoss(torch.nn.GaussianNLLLoss):
    """`torch.nn.GaussianNLLLoss` on our `gaussian_nll_loss`: means, target and variances (..., d)."""

    def forward(self, input: Tensor, target: Tensor, var: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.gaussian_nll_loss(
            input, target, var, full=self.full, eps=self.eps, reduction=self.reduction
        )


class PoissonNLLLoss(torch.nn.PoissonNLLLoss):
    """`torch.nn.PoissonNLLLoss` on `bptools.functional.poisson_nll_loss`: rates and target (...)."""

    def forward(self, log_input: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.poisson_nll_loss(
            log_input, target, log_input=self.log_input, full=self.full, eps=self.eps, reduction=self.reduction
        )


class MarginRankingLoss(torch.nn.MarginRankingLoss):
    """`torch.nn.MarginRankingLoss` on our `margin_ranking_loss`: two inputs and target of one shape (...)."""

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.margin_ranking_loss(input1, input2, target, margin=self.margin, reduction=self.reduction)


class HingeEmbeddingLoss(torch.nn.HingeEmbeddingLoss):
    """`torch.nn.HingeEmbeddingLoss` on our `hinge_embedding_loss`: input and target of one shape (...)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.hinge_embedding_loss(input, target, margin=self.margin, reduction=self.reduction)


class SoftMarginLoss(torch.nn.SoftMarginLoss):
    """`torch.nn.SoftMarginLoss` on `bptools.functional.soft_margin_loss`: input and target of one shape (...)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.soft_margin_loss(input, target, reduction=self.reduction)


class CosineEmbeddingLoss(torch.nn.CosineEmbeddingLoss):
    """`torch.nn.CosineEmbeddingLoss` on our `cosine_embedding_loss`: two inputs (N, D), target (N,)."""

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.cosine_embedding_loss(
            input1, input2, target, margin=self.margin, reduction=self.reduction
        )


class TripletMarginLoss(torch.nn.TripletMarginLoss):
    """`torch.nn.TripletMarginLoss` on `bptools.functional.triplet_margin_loss`: three inputs (N, D)."""

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.triplet_margin_loss(
            anchor,
            positive,
            negative,
            margin=self.margin,
            p=self.p,
            eps=self.eps,
            swap=self.swap,
            reduction=self.reduction,
        )


class TripletMarginWithDistanceLoss(torch.nn.TripletMarginWithDistanceLoss):
    """`torch.nn.TripletMarginWithDistanceLoss` on our `triplet_margin_with_distance_loss`: (N, ...)."""

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.triplet_margin_with_distance_loss(
            anchor,
            positive,
            negative,
            distance_function=self.distance_function,
            margin=self.margin,
            swap=self.swap,
            reduction=self.reduction,
        )


class MultiMarginLoss(torch.nn.MultiMarginLoss):
    """`torch.nn.MultiMarginLoss` on `bptools.functional.multi_margin_loss`: scores (N, C), target (N,)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.multi_margin_loss(
            input, target, p=self.p, margin=self.margin, weight=self.weight, reduction=self.reduction
        )


class MultiLabelMarginLoss(torch.nn.MultiLabelMarginLoss):
    """`torch.nn.MultiLabelMarginLoss` on `bptools.functional.multilabel_margin_loss`: scores and target (N, C)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.multilabel_margin_loss(input, target, reduction=self.reduction)


class MultiLabelSoftMarginLoss(torch.nn.MultiLabelSoftMarginLoss):
    """`torch.nn.MultiLabelSoftMarginLoss` on our `multilabel_soft_margin_loss`: logits and target (N, C)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.multilabel_soft_margin_loss(input, target, weight=self.weight, reduction=self.reduction)


class CTCLoss(torch.nn.CTCLoss):
    """`torch.nn.CTCLoss` on our `ctc_loss`: log-probabilities (T, N, C), targets (N, S), lengths (N,)."""

    def forward(self, log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.ctc_loss(
            log_probs, targets, input_lengths, target_lengths, self.blank, self.reduction, self.zero_infinity
        )


class CosineSimilarity(torch.nn.CosineSimilarity):
    """`torch.nn.CosineSimilarity` on our `cosine_similarity`: two inputs (..., d, ...) -> (..., ...)."""

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.cosine_similarity(x1, x2, self.dim, self.eps)


class PairwiseDistance(torch.nn.PairwiseDistance):
    """`torch.nn.PairwiseDistance` on `bptools.functional.pairwise_distance`: two inputs (..., d) -> (...)."""

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.pairwise_distance(x1, x2, self.norm, self.eps, self.keepdim)


class FocalLoss(torch.nn.Module):
    """`bptools.functional.focal_loss`: logits and target of one shape (...). Arguments are the function's."""

    def __init__(self, alpha: float = 0.25, gamma: float = 2, reduction: str = "none") -> None:
        super().__init__()
        self.alpha, self.gamma, self.reduction = alpha, gamma, reduction

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.focal_loss(inputs, targets, self.alpha, self.gamma, self.reduction)

    def extra_repr(self) -> str:
        """What repr shows."""
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}"


class DiceLoss(torch.nn.Module):
    """`bptools.functional.dice_loss`: probabilities and target (N, C, ...). Arguments are the function's."""

    def __init__(self, smooth: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.smooth, self.reduction = smooth, reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.dice_loss(input, target, self.smooth, self.reduction)

    def extra_repr(self) -> str:
        """What repr shows."""
        return f"smooth={self.smooth}, reduction={self.reduction!r}"
