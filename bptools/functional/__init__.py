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
from bptools.functional._convolution_transpose import conv_transpose1d, conv_transpose2d, conv_transpose3d
from bptools.functional._dropout import dropout
from bptools.functional._embedding import embedding
from bptools.functional._interpolate import interpolate
from bptools.functional._linear import linear
from bptools.functional._loss import cross_entropy, mse_loss
from bptools.functional._normalization import batch_norm, layer_norm, rms_norm
from bptools.functional._pad import pad
from bptools.functional._pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from bptools.functional._shuffle import channel_shuffle, pixel_shuffle, pixel_unshuffle
from bptools.functional._unfold import fold, unfold

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "channel_shuffle",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "cross_entropy",
    "dropout",
    "embedding",
    "fold",
    "gelu",
    "interpolate",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log_softmax",
    "max_pool2d",
    "mse_loss",
    "pad",
    "pixel_shuffle",
    "pixel_unshuffle",
    "relu",
    "rms_norm",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "softmax",
    "tanh",
    "unfold",
]
