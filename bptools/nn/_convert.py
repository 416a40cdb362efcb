"""Models that exist already: their torch.nn modules become ours, in place, and back."""

from __future__ import annotations

import torch
from torch.nn import Module

import bptools.nn


def convert(model: Module) -> list[str]:
    """Let every torch.nn module of a model, for which there is one here, run bptools' op; in place.

    A module stays the object that it is: parameters, buffers, hooks, `state_dict` keys, training mode and what an
    optimizer holds are not touched, for ours are torch's classes with another `forward`. Modules of other classes,
    subclasses of torch.nn's among them, stay as they are, and so do functions that a model calls directly.

    Args:
        model: any module, of torchvision, transformers, timm or your own.

    Returns:
        The names of the modules that were converted, as `named_modules` has them ("" is the model itself); not of
        those that had been converted before.

    Raises:
        TypeError: if model is not a module.
    """
    return change_classes(model, "convert", {theirs: ours for ours, theirs in _pairs()})


def revert(model: Module) -> list[str]:
    """Undo `convert`: every module of bptools.nn becomes torch.nn's again, in place; its arguments and results."""
    return change_classes(model, "revert", dict(_pairs()))


def _pairs() -> list[tuple[type[Module], type[Module]]]:
    """Our classes that are torch.nn's with another forward, and torch's."""
    named = ((getattr(bptools.nn, name), getattr(torch.nn, name, None)) for name in bptools.nn.__all__)
    return [(ours, theirs) for ours, theirs in named if isinstance(theirs, type) and theirs in ours.__mro__[1:]]


def change_classes(model: Module, name: str, classes: dict[type[Module], type[Module]]) -> list[str]:
    """Give each module whose exact class is a key of classes that key's value; return names, as `convert` does."""
    if not isinstance(model, Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")
    changed = []
    for path, module in model.named_modules():
        # What has a forward of its own, as accelerate's hooks give it, would not run the class's.
        if type(module) in classes and "forward" not in vars(module):
            module.__class__ = classes[type(module)]
            changed.append(path)
    return changed
