"""What torch.optim lacks: LAMB, adaptive gradient clipping, layer-wise rates, stepping within the backward pass.

Clipping by norm and by value are `torch.nn.utils.clip_grad_norm_` and `clip_grad_value_`, given here so that one
import has all three. SGD with momentum, Adam, AdamW and RMSprop are torch.optim's.
"""

from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from bptools.optim._agc import clip_grad_adaptive_
from bptools.optim._in_backward import StepInBackward
from bptools.optim._lamb import Lamb
from bptools.optim._layerwise import layerwise_groups, parameter_depths

__all__ = [
    "Lamb",
    "StepInBackward",
    "clip_grad_adaptive_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "layerwise_groups",
    "parameter_depths",
]
