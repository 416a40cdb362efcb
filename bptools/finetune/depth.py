"""How deep each parameter lies, from the order in which the blocks of a model run.

A *block* is the largest module worth one learning rate: a residual block, an encoder layer, a lone
convolution. Plain containers are opened, and so is any module that holds a stack, that is, two or more
modules of one class with children of their own. Norms join the block that ran before them, and parameters
outside every block (class tokens, position embeddings) lie at depth 0.
"""

import torch
from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


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


def parameter_depths(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """Run ``model`` once and return the depth of each parameter: 0 at the input, the largest at the output.

    The model is run in evaluation mode without gradients, so its buffers stay as they were; its training
    modes are put back. Blocks that do not run (auxiliary heads) count as deep as the last one.

    Args:
        model: The model, on the device of ``example``.
        example: An input batch, ``(n, ...)``; one row is enough.

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
            model.eval()(example)
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
