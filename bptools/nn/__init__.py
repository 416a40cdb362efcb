"""Drop-in modules: torch.nn's constructors, parameters and state_dict keys, on bptools' ops.

Each class is a subclass of the torch.nn class of the same name with `forward` alone replaced, so a checkpoint of
one loads into the other, both ways. Containers and other modules that compute nothing are torch's own, given here
so that a model made of these layers needs no second import; what else torch.nn has stays there.
"""

from torch.nn import (
    Flatten,
    Identity,
    Module,
    ModuleDict,
    ModuleList,
    Parameter,
    ParameterDict,
    ParameterList,
    Sequential,
    Unflatten,
)

from bptools.nn.activation import GELU, LeakyReLU, LogSoftmax, ReLU, Sigmoid, SiLU, Softmax, Tanh
from bptools.nn.convolution import Conv1d, Conv2d, Conv3d
from bptools.nn.dropout import Dropout
from bptools.nn.embedding import Embedding
from bptools.nn.linear import Linear
from bptools.nn.loss import CrossEntropyLoss, MSELoss
from bptools.nn.normalization import BatchNorm1d, BatchNorm2d, BatchNorm3d, LayerNorm, RMSNorm
from bptools.nn.pooling import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d
from bptools.nn.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell, truncated_bptt

__all__ = [
    "GELU",
    "GRU",
    "LSTM",
    "RNN",
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "Flatten",
    "GRUCell",
    "Identity",
    "LSTMCell",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LogSoftmax",
    "MSELoss",
    "MaxPool2d",
    "Module",
    "ModuleDict",
    "ModuleList",
    "Parameter",
    "ParameterDict",
    "ParameterList",
    "RMSNorm",
    "RNNCell",
    "ReLU",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Tanh",
    "Unflatten",
    "truncated_bptt",
]
