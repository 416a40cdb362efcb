"""Drop-in modules: torch.nn's constructors, parameters and state_dict keys, on bptools' ops.

Each class is a subclass of the torch.nn class of the same name with `forward` alone replaced, so a checkpoint of
one loads into the other, both ways. Containers and other modules that compute nothing are torch's own, given here
so that `from bptools import nn` can stand where `from torch import nn` stood.
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

from bptools.nn.activation import GELU, LeakyReLU, ReLU, Sigmoid, SiLU, Tanh
from bptools.nn.linear import Linear
from bptools.nn.normalization import LayerNorm

__all__ = [
    "GELU",
    "Flatten",
    "Identity",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "Module",
    "ModuleDict",
    "ModuleList",
    "Parameter",
    "ParameterDict",
    "ParameterList",
    "ReLU",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Tanh",
    "Unflatten",
]
