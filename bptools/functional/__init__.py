"""The ops under torch.nn.functional's names and signatures.

Each function checks its arguments, resolves their defaults, and calls one op of `bptools.ops`; the derivation
and the code of the op are there. Values and gradients are torch's; arguments that torch accepts and bptools does
not yet raise `NotImplementedError`, and bad input raises an error that names the argument, what was expected and
what came.

Shapes are given in parentheses: `(..., d)` is any number of leading dimensions and a last one of size d.
"""

from bptools.functional._activation import gelu, leaky_relu, log_softmax, relu, sigmoid, silu, softmax, tanh
from bptools.functional._attention import scaled_dot_product_attention
from bptools.functional._convolution import conv1d, conv2d, conv3d
from bptools.functional._ctc_loss import ctc_loss
from bptools.functional._detection_loss import dice_loss, focal_loss
from bptools.functional._distance import cosine_similarity, pairwise_distance
from bptools.functional._dropout import dropout
from bptools.functional._embedding import embedding
from bptools.functional._likelihood_loss import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    gaussian_nll_loss,
    kl_div,
    poisson_nll_loss,
)
from bptools.functional._linear import linear
from bptools.functional._loss import cross_entropy, nll_loss
from bptools.functional._margin_loss import (
    cosine_embedding_loss,
    hinge_embedding_loss,
    margin_ranking_loss,
    multi_margin_loss,
    multilabel_margin_loss,
    multilabel_soft_margin_loss,
    soft_margin_loss,
    triplet_margin_loss,
    triplet_margin_with_distance_loss,
)
from bptools.functional._normalization import batch_norm, layer_norm, rms_norm
from bptools.functional._penalty import l1_penalty, l2_penalty
from bptools.functional._pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from bptools.functional._regression_loss import huber_loss, l1_loss, mse_loss, smooth_l1_loss

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "conv1d",
    "conv2d",
    "conv3d",
    "cosine_embedding_loss",
    "cosine_similarity",
    "cross_entropy",
    "ctc_loss",
    "dice_loss",
    "dropout",
    "embedding",
    "focal_loss",
    "gaussian_nll_loss",
    "gelu",
    "hinge_embedding_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "l1_penalty",
    "l2_penalty",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log_softmax",
    "margin_ranking_loss",
    "max_pool2d",
    "mse_loss",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "nll_loss",
    "pairwise_distance",
    "poisson_nll_loss",
    "relu",
    "rms_norm",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "smooth_l1_loss",
    "soft_margin_loss",
    "softmax",
    "tanh",
    "triplet_margin_loss",
    "triplet_margin_with_distance_loss",
]
