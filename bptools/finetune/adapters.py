"""Adapters: peft's, on bptools' ops."""

from __future__ import annotations

from torch import nn

from .errors import InputError


def fuse_lora(model: nn.Module) -> list[str]:
    """Let every linear LoRA layer of a peft model run `bptools.functional.lora_linear`; in place.

    The op keeps the layer's input for backward, and nothing else of its size; peft's own forward keeps the mask of
    the dropout and its result, and the input of B, too. Where a layer has several adapters active, is merged or
    disabled, or is more than low-rank matrices (DoRA, biases of the adapter), it runs peft's forward as before. A
    layer stays the object that it is: parameters, `state_dict`, `save_pretrained` and `merge_and_unload` too.

    Args:
        model: What ``peft.get_peft_model`` returns, or a model that holds such layers.

    Returns:
        The names of the layers that were changed.

    Raises:
        InputError: If there is no linear LoRA layer in the model.
    """
    from peft.tuners.lora.layer import Linear

    from ._fused_lora import FusedLinear

    if not any(isinstance(module, Linear) for module in model.modules()):
        raise InputError("fuse_lora: model must hold peft's LoRA layers of linear ones, got none")
    return _change(model, Linear, FusedLinear)


def unfuse_lora(model: nn.Module) -> list[str]:
    """Undo :func:`fuse_lora`, and return the names of the layers that were changed back."""
    from peft.tuners.lora.layer import Linear

    from ._fused_lora import FusedLinear

    return _change(model, FusedLinear, Linear)


def _change(model: nn.Module, before: type[nn.Module], after: type[nn.Module]) -> list[str]:
    changed = [(name, module) for name, module in model.named_modules() if type(module) is before]
    for _, module in changed:
        module.__class__ = after
    return [name for name, _ in changed]
