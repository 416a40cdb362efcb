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
from bptools.functional._attention import scaled_dot_product_attention
from bptools.functional._convolution import conv1d, conv2d, conv3d
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
from bptools.functional._embedding import embedding
from bptools.functional._gated import geglu, glu, reglu, swiglu
from bptools.functional._linear import linear
from bptools.functional._loss import cross_entropy, mse_loss
from bptools.functional._normalization import batch_norm, layer_norm, rms_norm
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
from bptools.functional._pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from bptools.functional._softmax import gumbel_softmax, log_softmax, softmax, softmin

__all__ = [
    "adaptive_avg_pool2d",
    "alpha_dropout",
    "avg_pool2d",
    "batch_norm",
    "celu",
    "conv1d",
    "conv2d",
    "conv3d",
    "cross_entropy",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "elu",
    "embedding",
    "feature_alpha_dropout",
    "geglu",
    "gelu",
    "glu",
    "gumbel_softmax",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log_softmax",
    "logsigmoid",
    "max_pool2d",
    "mish",
    "mse_loss",
    "prelu",
    "reglu",
    "relu",
    "relu6",
    "rms_norm",
    "rrelu",
    "scaled_dot_product_attention",
    "selu",
    "sigmoid",
    "silu",
    "softmax",
    "softmin",
    "softplus",
    "softshrink",
    "softsign",
    "stochastic_depth",
    "swiglu",
    "tanh",
    "tanhshrink",
    "threshold",
]
