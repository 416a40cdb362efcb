"""Phases as data: which parameters train, for how many epochs, at which rate for each depth.

All parameter groups are made once, before the first phase, one for each depth with and without weight
decay. A phase then only switches ``requires_grad`` and the groups' rates, so no group is added while a
schedule runs, and a frozen parameter has gradient ``None``, which every optimizer skips (a zero gradient
would still drift under AdamW's momentum and decay).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from bptools.optim import layerwise_groups

from .errors import InputError, suggestion


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Attributes:
        trainable: Patterns of parameter or module names (``fnmatch``); ``"all"`` matches everything.
        epochs: How many epochs the phase lasts at most.
        lr: Rate of the deepest layer, or ``None`` for the optimizer's own.
        lr_decay: Factor on the rate for each layer nearer to the input: below 1 the head learns fastest,
            above 1 the first layer does.
    """

    trainable: tuple[str, ...]
    epochs: int
    lr: float | None = None
    lr_decay: float = 1.0

    def __str__(self) -> str:
        return "+".join(self.trainable)


def parse_phases(specs: Sequence[str], *, lr_decay: float = 1.0) -> list[Phase]:
    """Read phases written as ``NAMES:EPOCHS`` or ``NAMES:EPOCHS@RATE``, with names joined by ``+``.

    ``["head:3", "layer4+head:5@1e-4", "all:10"]`` trains the head for three epochs, then ``layer4`` and the
    head at another rate, then everything.

    Raises:
        InputError: If a spec is not of that form; the message quotes it.
    """
    phases = []
    for spec in specs:
        names, _, rest = spec.rpartition(":")
        epochs, _, lr = rest.partition("@")
        patterns = tuple(name.strip() for name in names.split("+"))
        try:
            phase = Phase(patterns, int(epochs), float(lr) if "@" in rest else None, lr_decay)
            good_rate = phase.lr is None or 0 < phase.lr < math.inf
        except ValueError:
            phase = None
        if phase is None or phase.epochs < 1 or not all(patterns) or not good_rate:
            form = "NAMES:EPOCHS or NAMES:EPOCHS@RATE, such as head:3 or layer4+head:5@1e-4"
            raise InputError(f"--phases {spec!r}: expected {form}")
        phases.append(phase)
    return phases


def strategy_phases(strategy: str, epochs: int, specs: Sequence[str] = (), lr_decay: float = 1.0) -> list[Phase]:
    """Return the phases of a named strategy, of ``epochs`` in sum.

    Args:
        strategy: ``"head"`` trains the head; ``"discriminative"`` the head for a fifth of the epochs, then
            everything with a rate for each depth; any other name everything at one rate.
        epochs: Most epochs in all.
        specs: Phases to use for ``"discriminative"`` instead, as :func:`parse_phases` reads them.
        lr_decay: Factor on the rate for each layer nearer to the input, in ``"discriminative"``.
    """
    if strategy != "discriminative":
        return [Phase(("head" if strategy == "head" else "all",), epochs)]
    first = epochs // 5
    default = ([f"head:{first}"] if first else []) + [f"all:{epochs - first}"]
    return parse_phases(specs or default, lr_decay=lr_decay)


def match_parameters(model: nn.Module, patterns: Sequence[str], head: str | None = None) -> set[str]:
    """Return the names of the parameters that ``patterns`` choose, by their own name or a module's above it.

    Args:
        model: The model.
        patterns: ``fnmatch`` patterns; ``"all"`` for everything, ``"head"`` for the module named ``head``.
        head: Name of the module that the pattern ``"head"`` stands for.

    Raises:
        InputError: If a pattern matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = set()
    for pattern in patterns:
        real = head if pattern == "head" and head else "*" if pattern == "all" else pattern
        matched = {n for n in names if fnmatchcase(n, real) or fnmatchcase(n, f"{real}.*")}
        if not matched:
            near = suggestion(pattern, [*(n for n, _ in model.named_modules() if n), "head", "all"])
            raise InputError(f"--phases: {pattern!r} matches no parameter of the model{near}")
        chosen |= matched
    return chosen


def parameter_groups(model: nn.Module, depths: Mapping[str, int], lr: float, weight_decay: float) -> list[dict]:
    """Return optimizer groups for all parameters, frozen ones included: one per depth and decay.

    Norms, biases and other parameters with one dimension get no weight decay. Parameters are told apart by
    identity, so equal values never merge and tied weights appear once.

    Args:
        model: The model, already on its device.
        depths: Depth by parameter name, from :func:`parameter_depths`.
        lr: Rate at the greatest depth.
        weight_decay: Decay of weights with two or more dimensions.
    """
    groups = layerwise_groups(model, None, lr, weight_decay=weight_decay, depths=depths)
    return [{**group, "base_lr": lr} for group in groups]


def enter_phase(model: nn.Module, optimizer: torch.optim.Optimizer, phase: Phase, head: str | None = None) -> None:
    """Switch ``model`` and ``optimizer`` to ``phase``: what trains, and the rate of each depth.

    Make the phase's schedule after this call. ``model.train()`` is left to :func:`set_modes`.
    """
    chosen = match_parameters(model, phase.trainable, head)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
        parameter.grad = None
    deepest = max(group["depth"] for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        peak = group["base_lr"] if phase.lr is None else phase.lr
        group["lr"] = group["initial_lr"] = peak * phase.lr_decay ** (deepest - group["depth"])


def set_modes(model: nn.Module, *, frozen_dropout: bool = False) -> None:
    """Put ``model`` in training mode, and its frozen parts in evaluation mode. Call in place of ``train()``.

    A module whose parameters are all frozen is evaluated, with all it contains: its batch norms keep their
    running statistics and normalise with them, its dropout and stochastic depth are off. A norm without
    parameters follows the parameters registered before it.

    Args:
        model: The model.
        frozen_dropout: Keep dropout and stochastic depth active in frozen parts.
    """
    model.train()
    before_frozen = False
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own:
            before_frozen = not any(p.requires_grad for p in own)
        inside = list(module.parameters())
        if inside:
            frozen = not any(p.requires_grad for p in inside)
        else:
            frozen = before_frozen and isinstance(module, _NormBase)
        if frozen:
            module.eval()
    if frozen_dropout:
        for module in model.modules():
            if isinstance(module, (_DropoutNd, StochasticDepth)) or type(module).__name__ == "DropPath":
                module.train()


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise unless ``optimizer`` holds exactly the parameters of ``model``, by identity.

    Raises:
        ValueError: If a trainable parameter is not in the optimizer, or the optimizer holds a parameter that
            is not the model's (built before ``.to()``, wrapping, or a new head).
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    stale = len(held - names.keys())
    if missing:
        raise ValueError(
            f"optimizer: expected all trainable parameters, but it lacks {len(missing)}, such as {missing[0]!r}"
        )
    if stale:
        raise ValueError(
            f"optimizer: {stale} of its {len(held)} parameters are not the model's; build it after .to(), "
            "wrapping and replacing the head"
        )
