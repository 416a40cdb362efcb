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
from bptools.functional._dropout import dropout
from bptools.functional._embedding import embedding
from bptools.functional._linear import linear
from bptools.functional._loss import cross_entropy, mse_loss
from bptools.functional._normalization import batch_norm, layer_norm, rms_norm
from bptools.functional._pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d
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

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "conv1d",
    "conv2d",
    "conv3d",
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "gru",
    "gru_cell",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log_softmax",
    "lstm",
    "lstm_cell",
    "max_pool2d",
    "mse_loss",
    "relu",
    "rms_norm",
    "rnn_relu",
    "rnn_relu_cell",
    "rnn_tanh",
    "rnn_tanh_cell",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "softmax",
    "tanh",
]
