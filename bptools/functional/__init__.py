"""The ops under torch.nn.functional's names and signatures.

Each function checks its arguments, resolves their defaults, and calls one op of `bptools.ops`; the derivation
and the code of the op are there. Values and gradients are torch's; arguments that torch accepts and bptools does
not yet raise `NotImplementedError`, and bad input raises an error that names the argument, what was expected and
what came.

Shapes are given in parentheses: `(..., d)` is any number of leading dimensions and a last one of size d.
"""

from bptools.functional._activation import (
    celu,
    elu,
    gelu,
    leaky_relu,
    logsigmoid,
    mish,
    relu,
    selu,
    sigmoid,
    silu,
    softplus,
    softsign,
    tanh,
    tanhshrink,
)
from bptools.functional._attention import (
    multi_head_attention_forward,
    scaled_dot_product_attention,
)
from bptools.functional._convolution import (
    conv1d,
    conv2d,
    conv3d,
)
from bptools.functional._convolution_transpose import (
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from bptools.functional._ctc_loss import (
    ctc_loss,
)
from bptools.functional._detection_loss import (
    dice_loss,
    focal_loss,
)
from bptools.functional._distance import (
    cosine_similarity,
    pairwise_distance,
)
from bptools.functional._dropout import (
    alpha_dropout,
    drop_path,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    feature_alpha_dropout,
    stochastic_depth,
)
from bptools.functional._embedding import (
    embedding,
    embedding_bag,
    rotary_embedding,
)
from bptools.functional._gated import (
    geglu,
    glu,
    reglu,
    swiglu,
)
from bptools.functional._interpolate import (
    interpolate,
)
from bptools.functional._likelihood_loss import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    gaussian_nll_loss,
    kl_div,
    poisson_nll_loss,
)
from bptools.functional._linear import (
    bilinear,
    linear,
)
from bptools.functional._linear_loss import (
    linear_cross_entropy,
)
from bptools.functional._lora import (
    lora_linear,
)
from bptools.functional._loss import (
    cross_entropy,
    nll_loss,
)
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
from bptools.functional._nf4 import (
    NF4Weight,
    dequantize_nf4,
    nf4_linear,
    quantize_nf4,
)
from bptools.functional._normalization import (
    add_layer_norm,
    add_rms_norm,
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    local_response_norm,
    normalize,
    rms_norm,
    spectral_norm,
    sync_batch_norm,
    weight_norm,
)
from bptools.functional._pad import (
    pad,
)
from bptools.functional._penalty import (
    l1_penalty,
    l2_penalty,
)
from bptools.functional._piecewise import (
    hardshrink,
    hardsigmoid,
    hardswish,
    hardtanh,
    prelu,
    relu6,
    rrelu,
    softshrink,
    threshold,
)
from bptools.functional._pooling import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    fractional_max_pool2d,
    fractional_max_pool3d,
    lp_pool1d,
    lp_pool2d,
    lp_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
    max_unpool1d,
    max_unpool2d,
    max_unpool3d,
)
from bptools.functional._recurrent import (
    gru,
    gru_cell,
    lstm,
    lstm_cell,
    rnn_relu,
    rnn_relu_cell,
    rnn_tanh,
    rnn_tanh_cell,
)
from bptools.functional._regression_loss import (
    huber_loss,
    l1_loss,
    mse_loss,
    smooth_l1_loss,
)
from bptools.functional._shuffle import (
    channel_shuffle,
    pixel_shuffle,
    pixel_unshuffle,
)
from bptools.functional._softmax import (
    gumbel_softmax,
    log_softmax,
    softmax,
    softmin,
)
from bptools.functional._unfold import (
    fold,
    unfold,
)

__all__ = [
    "NF4Weight",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "add_layer_norm",
    "add_rms_norm",
    "alpha_dropout",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm",
    "bilinear",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "celu",
    "channel_shuffle",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "cosine_embedding_loss",
    "cosine_similarity",
    "cross_entropy",
    "ctc_loss",
    "dequantize_nf4",
    "dice_loss",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "elu",
    "embedding",
    "embedding_bag",
    "feature_alpha_dropout",
    "focal_loss",
    "fold",
    "fractional_max_pool2d",
    "fractional_max_pool3d",
    "gaussian_nll_loss",
    "geglu",
    "gelu",
    "glu",
    "group_norm",
    "gru",
    "gru_cell",
    "gumbel_softmax",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "hinge_embedding_loss",
    "huber_loss",
    "instance_norm",
    "interpolate",
    "kl_div",
    "l1_loss",
    "l1_penalty",
    "l2_penalty",
    "layer_norm",
    "leaky_relu",
    "linear",
    "linear_cross_entropy",
    "local_response_norm",
    "log_softmax",
    "logsigmoid",
    "lora_linear",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "lstm",
    "lstm_cell",
    "margin_ranking_loss",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_unpool1d",
    "max_unpool2d",
    "max_unpool3d",
    "mish",
    "mse_loss",
    "multi_head_attention_forward",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "nf4_linear",
    "nll_loss",
    "normalize",
    "pad",
    "pairwise_distance",
    "pixel_shuffle",
    "pixel_unshuffle",
    "poisson_nll_loss",
    "prelu",
    "quantize_nf4",
    "reglu",
    "relu",
    "relu6",
    "rms_norm",
    "rnn_relu",
    "rnn_relu_cell",
    "rnn_tanh",
    "rnn_tanh_cell",
    "rotary_embedding",
    "rrelu",
    "scaled_dot_product_attention",
    "selu",
    "sigmoid",
    "silu",
    "smooth_l1_loss",
    "soft_margin_loss",
    "softmax",
    "softmin",
    "softplus",
    "softshrink",
    "softsign",
    "spectral_norm",
    "stochastic_depth",
    "swiglu",
    "sync_batch_norm",
    "tanh",
    "tanhshrink",
    "threshold",
    "triplet_margin_loss",
    "triplet_margin_with_distance_loss",
    "unfold",
    "weight_norm",
]
