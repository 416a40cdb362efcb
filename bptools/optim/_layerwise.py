"""Layer-wise learning rates, by how deep each parameter lies: from the order in which the blocks of a model run.

A *block* is the largest module worth one learning rate: a residual block, an encoder layer, a lone
convolution. Plain containers are opened, and so is any module that holds a stack: two or more modules of one
class with several weights each, or a list of such, be it of one. Norms join the block that ran before them.
Embeddings, and parameters outside every block (class tokens, position embeddings), lie at depth 0; a weight that
serves in several places lies at the first.

Sources: Howard and Ruder, arXiv 1801.06146 (discriminative rates); Clark et al., arXiv 2003.10555 (layer-wise
decay).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def _is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is one weight with what belongs to it: a norm and an activation, or peft's adapter."""
    weights = [m for m in module.modules() if any(p.ndim > 1 for p in m.parameters(recurse=False))]
    return len(weights) <= 1 or hasattr(module, "base_layer")


def _is_stack(module: nn.Module) -> bool:
    children = list(module.children())
    enough = len(children) > (0 if type(module) is nn.ModuleList else 1)
    one_class = len({type(c) for c in children}) == 1
    return enough and one_class and type(children[0]) not in CONTAINERS and not _is_layer(children[0])


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of ``model`` that own parameters, by name and in the order of registration."""
    found = {}

    def descend(prefix: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            name = f"{prefix}{child_name}"
            if type(child) in CONTAINERS or any(_is_stack(m) for m in child.modules()):
                descend(f"{name}.", child)
            elif any(True for _ in child.parameters()):
                found[name] = child

    descend("", model)
    return found


def parameter_depths(model: nn.Module, example: Any) -> dict[str, int]:
    """Run ``model`` once and return the depth of each parameter: 0 at the input, the largest at the output.

    The model is run in evaluation mode without gradients, so its buffers stay as they were; its training
    modes are put back. Blocks that do not run (auxiliary heads) count as deep as the last one.

    Args:
        model: The model, on the device of ``example``.
        example: An input batch, ``(n, ...)``, or a tuple or mapping of such arguments; one row is enough.

    Returns:
        Depth by parameter name, with the names of ``model.named_parameters()``.
    """
    blocks, order = find_blocks(model), []
    hooks = [
        block.register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name, block in blocks.items()
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*example) if isinstance(example, tuple) else model(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode

    depth_of, depth, at = {}, 0, 0
    for place, name in enumerate(dict.fromkeys(order)):  # a block that runs twice keeps its first place
        block = blocks[name]
        if isinstance(block, nn.Embedding):
            at = 0
        elif place and any(p.ndim > 1 for p in block.parameters()):
            depth = at = depth + 1
        for parameter in block.parameters():
            depth_of.setdefault(parameter, at)
    for block in blocks.values():
        for parameter in block.parameters():
            depth_of.setdefault(parameter, depth)
    depths = {name: depth_of.get(parameter, 0) for name, parameter in model.named_parameters()}
    rank = {depth: place for place, depth in enumerate(sorted(set(depths.values())))}
    return {name: rank[depth] for name, depth in depths.items()}


def layerwise_groups(
    model: nn.Module,
    example: Any,
    lr: float,
    *,
    decay: float = 1.0,
    weight_decay: float = 0.0,
    depths: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer in which the rate falls towards the input, by a factor a block.

    Norms, biases and other parameters with one dimension get no weight decay. Frozen parameters are in the groups
    too, so that they can be unfrozen later. Parameters are told apart by identity: tied weights appear once, at
    the first of their names.

    Example::

        groups = bptools.optim.layerwise_groups(model, images[:1], lr=1e-3, decay=0.75, weight_decay=0.05)
        optimizer = torch.optim.AdamW(groups)

    Args:
        model: The model, already on its device.
        example: What ``parameter_depths`` runs the model on; not read if ``depths`` is given.
        lr: The rate of the deepest block, which is the head.
        decay: The rate of each block, as a share of the next deeper one's: more than 0, at most 1.
        weight_decay: Decay of weights with two or more dimensions.
        depths: Depth by parameter name, if it is known already.

    Returns:
        One group for each depth and decay, from the input on: ``params``, ``lr``, ``weight_decay``, ``depth`` and
        ``decays`` (whether weight decay applies to such parameters).

    Raises:
        ValueError: If ``lr`` or ``weight_decay`` is negative, or ``decay`` not in (0, 1].
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"layerwise_groups: {name} must be at least 0, got {value}")
    if not 0 < decay <= 1:
        raise ValueError(f"layerwise_groups: decay must be more than 0 and at most 1, got {decay}")
    if depths is None:
        depths = parameter_depths(model, example)
    deepest = max(depths.values(), default=0)
    normed = {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        depth = depths[name]
        decays = parameter.ndim > 1 and id(parameter) not in normed and not name.endswith("bias")
        group = groups.setdefault(
            (depth, decays),
            {
                "params": [],
                "lr": lr * decay ** (deepest - depth),
                "weight_decay": weight_decay if decays else 0.0,
                "depth": depth,
                "decays": decays,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
