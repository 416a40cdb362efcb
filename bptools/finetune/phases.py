"""Phases as data: which parameters train, for how many epochs, at which rate for each depth.

All parameter groups are made once, before the first phase, one for each depth with and without weight
decay. A phase then only switches ``requires_grad`` and the groups' rates, so no group is added while a
schedule runs, and a frozen parameter has gradient ``None``, which every optimizer skips (a zero gradient
would still drift under AdamW's momentum and decay).

Sources: Howard and Ruder, arXiv 1801.06146 (gradual unfreezing); Pan et al., arXiv 2403.17919 (LISA: a few
layers at a time train, drawn at random).
"""

import math
import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from bptools.optim import layerwise_groups

from .errors import InputError, expect_positive, suggestion

Head = str | Sequence[str] | None


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Attributes:
        trainable: Patterns of parameter or module names (``fnmatch``). ``"all"`` matches everything,
            ``"adapters"`` what peft has added (and its copies of the modules to save).
        epochs: How many epochs the phase lasts at most.
        lr: Rate of the deepest layer, or ``None`` for the optimizer's own.
        lr_decay: Factor on the rate for each layer nearer to the input: below 1 the head learns fastest,
            above 1 the first layer does.
        weight_decay: Decay of weights with two or more dimensions, or ``None`` for the optimizer's own.
        frozen_norm: Whether norms with running statistics in frozen parts keep and use these (``"eval"``), or
            use the batch's and update them (``"train"``).
        frozen_dropout: Keep dropout and stochastic depth active in frozen parts.
        sampled: Pairs of a pattern of module names and a number: that many of the modules train besides, drawn
            at random.
        resample: Optimizer steps from one draw to the next.
    """

    trainable: tuple[str, ...]
    epochs: int
    lr: float | None = None
    lr_decay: float = 1.0
    weight_decay: float | None = None
    frozen_norm: Literal["eval", "train"] = "eval"
    frozen_dropout: bool = False
    sampled: tuple[tuple[str, int], ...] = ()
    resample: int = 20

    def __post_init__(self) -> None:
        if self.frozen_norm not in ("eval", "train"):
            raise InputError(f"--frozen-norm: expected eval or train, got {self.frozen_norm!r}")
        expect_positive(self, "resample lr_decay")

    def __str__(self) -> str:
        return "+".join([*self.trainable, *(f"{pattern}~{count}" for pattern, count in self.sampled)])


def parse_phases(specs: Sequence[str], **options: Any) -> list[Phase]:
    """Read phases written as ``NAMES:EPOCHS`` or ``NAMES:EPOCHS@RATE``, with names joined by ``+``.

    ``["head:3", "layer4+head:5@1e-4", "all:10"]`` trains the head for three epochs, then ``layer4`` and the
    head at another rate, then everything. ``"head+layer?~2:10"`` trains the head and two of the modules that
    ``layer?`` matches, drawn anew every :attr:`Phase.resample` steps.

    Args:
        specs: The phases.
        options: Other attributes of every :class:`Phase`, such as ``lr_decay``.

    Raises:
        InputError: If a spec is not of that form; the message quotes it.
    """
    phases = []
    for spec in specs:
        names, _, rest = spec.rpartition(":")
        epochs, _, lr = rest.partition("@")
        patterns = [name.strip() for name in names.split("+")]
        drawn = [name.partition("~") for name in patterns if "~" in name]
        try:
            phase = Phase(
                tuple(name for name in patterns if "~" not in name),
                int(epochs),
                float(lr) if "@" in rest else None,
                sampled=tuple((pattern, int(count)) for pattern, _, count in drawn),
                **options,
            )
        except InputError:  # of an option, not of the spec
            raise
        except ValueError:
            phase = None
        if phase is None or not (all(patterns) and _is_sound(phase)):
            form = "NAMES:EPOCHS or NAMES:EPOCHS@RATE, such as head:3, layer4+head:5@1e-4 or head+layer?~2:5"
            raise InputError(f"--phases {spec!r}: expected {form}")
        phases.append(phase)
    return phases


def _is_sound(phase: Phase) -> bool:
    good_rate = phase.lr is None or 0 < phase.lr < math.inf
    return phase.epochs >= 1 and good_rate and all(pattern and count >= 1 for pattern, count in phase.sampled)


def strategy_phases(
    strategy: str, epochs: int, specs: Sequence[str] = (), lr_decay: float = 1.0, **options: Any
) -> list[Phase]:
    """Return the phases of a named strategy, of ``epochs`` in sum.

    Args:
        strategy: ``"head"`` trains the head; ``"lora"`` what peft has added; ``"discriminative"`` the head for a
            fifth of the epochs, then everything with a rate for each depth; any other name everything at one rate.
        epochs: Most epochs in all.
        specs: Phases to use for ``"discriminative"`` instead, as :func:`parse_phases` reads them.
        lr_decay: Factor on the rate for each layer nearer to the input, in ``"discriminative"``.
        options: Other attributes of every :class:`Phase`, such as ``frozen_dropout``.
    """
    if strategy != "discriminative":
        return [Phase(({"head": "head", "lora": "adapters"}.get(strategy, "all"),), epochs, **options)]
    first = epochs // 5
    default = ([f"head:{first}"] if first else []) + [f"all:{epochs - first}"]
    return parse_phases(specs or default, lr_decay=lr_decay, **options)


def gradual_phases(
    model: nn.Module, depths: Mapping[str, int], epochs: int, stages: int = 4, **options: Any
) -> list[Phase]:
    """Return the phases of gradual unfreezing: the head for an epoch, then with each epoch more below it.

    The last phase trains everything, for the epochs that are left. The layers below the head are shared out
    evenly over the stages after the first.

    Args:
        model: The model.
        depths: Depth by parameter name, from :func:`parameter_depths`.
        epochs: Epochs in all.
        stages: Number of phases; fewer if the model has fewer depths.
        options: Other attributes of every :class:`Phase`, such as ``lr_decay``.

    Raises:
        InputError: If there are fewer epochs than phases.
    """
    deepest = max(depths.values())
    stages = min(stages, deepest + 1)
    if not 1 <= stages <= epochs:
        raise InputError(
            f"--epochs {epochs}: gradual unfreezing expected an epoch for each stage, got {stages} stages"
        )
    phases = []
    for stage in range(stages - 1):
        lowest = deepest - round(stage * deepest / (stages - 1))
        names = cover(model, {name for name, depth in depths.items() if depth >= lowest})
        phases.append(Phase(names, 1, **options))
    return [*phases, Phase(("all",), epochs - len(phases), **options)]


def cover(model: nn.Module, names: Collection[str]) -> tuple[str, ...]:
    """Return the fewest names of modules and parameters that hold the parameters ``names`` and no other."""
    found = []

    def descend(prefix: str, module: nn.Module) -> None:
        inside = [f"{prefix}{name}" for name, _ in module.named_parameters()]
        if prefix and inside and all(name in names for name in inside):
            found.append(prefix[:-1])
            return
        found.extend(
            f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False) if f"{prefix}{name}" in names
        )
        for name, child in module.named_children():
            descend(f"{prefix}{name}.", child)

    descend("", model)
    return tuple(found)


def match_parameters(model: nn.Module, patterns: Sequence[str], head: Head = None) -> set[str]:
    """Return the names of the parameters that ``patterns`` choose, by their own names or a module's above them.

    Args:
        model: The model.
        patterns: ``fnmatch`` patterns; ``"all"`` for everything, ``"head"`` for what ``head`` names,
            ``"adapters"`` for what peft has added. A tied weight answers to each of its names.
        head: Name of the module, or names of those, that the pattern ``"head"`` stands for.

    Raises:
        InputError: If a pattern matches no parameter.
    """
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}  # of tied ones too
    chosen = set()
    for pattern in patterns:
        if pattern == "adapters":
            matched = {names[name] for name in _adapters(model)}
        else:
            heads = (head,) if isinstance(head, str) else tuple(head or ())
            reals = heads if pattern == "head" and heads else ("*" if pattern == "all" else pattern,)
            matched = {
                name for n, name in names.items() for r in reals if fnmatchcase(n, r) or fnmatchcase(n, f"{r}.*")
            }
        if not matched:
            near = suggestion(pattern, [*(n for n, _ in model.named_modules() if n), "head", "all"])
            raise InputError(f"--phases: {pattern!r} matches no parameter of the model{near}")
        chosen |= matched
    return chosen


def _adapters(model: nn.Module) -> Iterator[str]:
    """Yield the names of the parameters in peft's adapters, and in its copies of the modules to save."""
    for name, module in model.named_modules():
        for part in getattr(module, "adapter_layer_names", ()):
            for inner, _ in getattr(module, part).named_parameters():
                yield f"{name}.{part}.{inner}"


def draw(phase: Phase, model: nn.Module, *, seed: int = 0, step: int = 0) -> tuple[str, ...]:
    """Return the names of the modules that are drawn to train besides ``phase.trainable``.

    The draw depends on ``seed`` and ``step // phase.resample`` alone, so a resumed run needs no state for it,
    and processes agree.

    Args:
        phase: The phase; :attr:`Phase.sampled` says what to draw from.
        model: The model. A module within another one that matches is not drawn by itself.
        seed: Of the run.
        step: Optimizer steps done.

    Raises:
        InputError: If fewer modules match than are to be drawn.
    """
    drawn = []
    for pattern, count in phase.sampled:
        matched = []
        for name, module in model.named_modules():
            inside = any(name.startswith(f"{outer}.") for outer in matched)
            if name and fnmatchcase(name, pattern) and not inside and any(True for _ in module.parameters()):
                matched.append(name)
        if len(matched) < count:
            near = "" if matched else suggestion(pattern, [n for n, _ in model.named_modules() if n])
            raise InputError(f"--phases: {pattern}~{count} draws {count} modules, but {len(matched)} match{near}")
        generator = random.Random(f"{seed} {step // phase.resample} {pattern}")
        drawn += sorted(generator.sample(matched, count), key=matched.index)
    return tuple(drawn)


def needs_redraw(phase: Phase, step: int) -> bool:
    """Return whether :func:`set_trainable` is due again after ``step`` optimizer steps."""
    return bool(phase.sampled) and step > 0 and step % phase.resample == 0


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
    return [{**group, "base_lr": lr, "base_weight_decay": weight_decay} for group in groups]


def enter_phase(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    phase: Phase,
    head: Head = None,
    *,
    seed: int = 0,
    step: int = 0,
) -> None:
    """Switch ``model`` and ``optimizer`` to ``phase``: what trains, in which mode, and the rate of each depth.

    Make the phase's schedule after this call.

    Args:
        model: The model.
        optimizer: Of the groups that :func:`parameter_groups` made.
        phase: The phase.
        head: Name of the module, or names of those, that the pattern ``"head"`` stands for.
        seed: Of the run, for what is drawn at random.
        step: Optimizer steps done.

    Raises:
        InputError: As :func:`set_trainable`.
    """
    set_trainable(model, phase, head, seed=seed, step=step)
    set_rates(optimizer, phase)


def set_trainable(model: nn.Module, phase: Phase, head: Head = None, *, seed: int = 0, step: int = 0) -> None:
    """Let exactly the parameters of ``phase`` train, drop all gradients, and set the modes.

    Rates and the optimizer's state stay as they are, so it serves for a new draw in the middle of a schedule.

    Args:
        model: The model.
        phase: The phase.
        head: Name of the module, or names of those, that the pattern ``"head"`` stands for.
        seed: Of the run.
        step: Optimizer steps done.

    Raises:
        InputError: If a pattern matches nothing, or what cannot train: quantized weights.
    """
    chosen = match_parameters(model, [*phase.trainable, *draw(phase, model, seed=seed, step=step)], head)
    for name, parameter in model.named_parameters():
        if name in chosen and not parameter.dtype.is_floating_point:
            raise InputError(f"--phases: {str(phase)!r} includes {name}, which cannot train: {parameter.dtype}")
        parameter.requires_grad_(name in chosen)
        parameter.grad = None
    set_modes(model, frozen_norm=phase.frozen_norm, frozen_dropout=phase.frozen_dropout)


def set_rates(optimizer: torch.optim.Optimizer, phase: Phase) -> None:
    """Set the peak rate and the weight decay of every group to what ``phase`` says."""
    deepest = max(group["depth"] for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        peak = group["base_lr"] if phase.lr is None else phase.lr
        group["lr"] = group["initial_lr"] = peak * phase.lr_decay ** (deepest - group["depth"])
        decay = group["base_weight_decay"] if phase.weight_decay is None else phase.weight_decay
        group["weight_decay"] = decay if group["decays"] else 0.0


def set_modes(
    model: nn.Module, *, frozen_norm: Literal["eval", "train"] = "eval", frozen_dropout: bool = False
) -> None:
    """Put ``model`` in training mode, and its frozen parts as the options say. Call in place of ``train()``.

    A module whose parameters are all frozen is a frozen part, with all it contains: by default it is evaluated,
    so its batch norms keep their running statistics and normalise with them, and its dropout and stochastic
    depth are off. A module without parameters is frozen if those registered before and after it are; a norm, if
    those before it are.

    Args:
        model: The model.
        frozen_norm: As :attr:`Phase.frozen_norm`.
        frozen_dropout: As :attr:`Phase.frozen_dropout`.
    """
    model.train()
    modules = list(model.modules())
    before, after = (
        {},
        {},
    )  # whether the parameters registered last before each module, and next after it, are frozen
    for found, walk, state in ((before, modules, False), (after, modules[::-1], True)):
        for module in walk:
            own = list(module.parameters(recurse=False))
            state = not any(p.requires_grad for p in own) if own else state
            found[module] = state
    for module in modules:
        inside = list(module.parameters())
        if inside:
            frozen = not any(p.requires_grad for p in inside)
        else:
            frozen = before[module] and (after[module] or isinstance(module, _NormBase))
        if frozen:
            for part in module.modules():
                part.training = frozen_norm == "train" if isinstance(part, _NormBase) else frozen_dropout


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise unless ``optimizer`` can train exactly what is trainable in ``model``; compared by identity.

    Raises:
        ValueError: If a trainable parameter is not in the optimizer; the optimizer holds a parameter that is
            not the model's (built before ``.to()``, wrapping, or a new head), or one twice; a frozen parameter
            has a gradient, which would go on moving it; or weights that the model declares as tied are no
            longer one. The message names the first and says how many there are.
    """
    held = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    named = list(model.named_parameters())
    names = {id(p) for _, p in named}
    missing = [name for name, p in named if p.requires_grad and id(p) not in held]
    stale = len(held.keys() - names)
    twice = [name for name, p in named if held[id(p)] > 1]
    moving = [name for name, p in named if p.grad is not None and not p.requires_grad]
    split = [f"{a} and {b}" for a, b in _split_ties(model)]
    if missing:
        raise ValueError(
            f"optimizer: expected all trainable parameters, but it lacks {len(missing)}, such as {missing[0]!r}; "
            "make its groups of all parameters, frozen ones too, by parameter_groups"
        )
    if stale:
        raise ValueError(
            f"optimizer: {stale} of its {len(held)} parameters are not the model's; build it after .to(), "
            "wrapping and replacing the head"
        )
    if twice:
        raise ValueError(
            f"optimizer: holds {len(twice)} parameters more than once, such as {twice[0]!r}; one step would move "
            "them repeatedly"
        )
    if moving:
        raise ValueError(
            f"model: {len(moving)} frozen parameters have gradients, such as {moving[0]!r}, and AdamW would move "
            "them; set .grad to None on freezing, as enter_phase does"
        )
    if split:
        raise ValueError(
            f"model: {len(split)} pairs of tied weights are no longer one, such as {split[0]}; tie them again "
            "(model.tie_weights(); peft: ensure_weight_tying=True), or build it with tie_word_embeddings=False"
        )


def _split_ties(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the names of weights that transformers means to be one, but that are two, or differ by an adapter."""
    for prefix, module in model.named_modules():
        for name, source in vars(module).get("all_tied_weights_keys", {}).items():
            (a, _, weight), (b, _, other) = name.rpartition("."), source.rpartition(".")
            try:
                here, there = module.get_submodule(a), module.get_submodule(b)
                same = getattr(here, weight) is getattr(there, other)
            except AttributeError:  # another kind of head has been put there
                continue
            if not same or hasattr(here, "base_layer") != hasattr(there, "base_layer"):
                yield f"{prefix}.{name}".lstrip("."), f"{prefix}.{source}".lstrip(".")
