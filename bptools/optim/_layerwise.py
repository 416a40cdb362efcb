"""Layer-wise learning rates, by how deep each parameter lies: from the order in which the blocks of a model run.

A *block* is the largest module worth one learning rate: a residual block, an encoder layer, a lone
convolution. Plain containers are opened, and so is any module that holds a stack, that is, two or more
modules of one class with children of their own. Norms join the block that ran before them, and parameters
outside every block (class tokens, position embeddings) lie at depth 0.

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


def _is_stack(module: nn.Module) -> bool:
    children = list(module.children())
    return len(children) > 1 and len({type(c) for c in children}) == 1 and any(children[0].children())


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

    depth_of, depth = {}, -1
    for name in dict.fromkeys(order):  # a block that runs twice keeps its first place
        only_vectors = all(p.ndim <= 1 for p in blocks[name].parameters())
        depth += 0 if only_vectors and depth >= 0 else 1
        depth_of[name] = depth
    inside = {
        f"{name}.{inner}": depth_of.get(name, max(depth, 0))
        for name, block in blocks.items()
        for inner, _ in block.named_parameters()
    }
    return {name: inside.get(name, 0) for name, _ in model.named_parameters()}


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
        One group for each depth and decay, from the input on: ``params``, ``lr``, ``weight_decay`` and ``depth``.

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
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
