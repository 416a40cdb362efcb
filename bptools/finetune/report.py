"""The trainability report: what a phase trains, at which rate, in which mode, and whether the optimizer knows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn

from bptools._console import plain_table

from .phases import Head, Phase, check_optimizer, cover, draw, match_parameters

MOST_ROWS = 24  # about
WIDEST = 26  # characters of a name


@dataclass(frozen=True)
class _Row:
    """A parameter as the report sees it.

    ``rate`` is the peak; ``training`` is the mode of the module that owns the parameter, or ``None`` if that
    module is trainable in part.
    """

    parameter: nn.Parameter
    depth: int | None
    rate: float
    decay: float
    held: bool
    training: bool | None


def trainability_report(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    phase: Phase,
    head: Head = None,
    *,
    seed: int = 0,
    step: int = 0,
) -> Table:
    """Return what trains in ``phase``, as :func:`bptools.finetune.enter_phase` left it.

    Each pattern has a row, with one below it for each depth if the rates differ (neighbouring depths share a row
    where there are many), and what is frozen has a row. ``mode`` is that of the modules that own the
    parameters, but for modules that train in part. A parameter that several patterns match counts for the first.

    Args:
        model: The model, in the phase.
        optimizer: Of the groups that :func:`bptools.finetune.parameter_groups` made.
        phase: The phase.
        head: Name of the module, or names of those, that the pattern ``"head"`` stands for.
        seed: Of the run, for what is drawn at random.
        step: Optimizer steps done.

    Raises:
        ValueError: As :func:`bptools.finetune.check_optimizer`: if parameters train that are not in the
            optimizer, or the reverse, and if tied weights have been split.
    """
    check_optimizer(model, optimizer)
    rows, prefix = _read(model, optimizer)
    left, chosen = dict(rows), {}
    for pattern in dict.fromkeys((*phase.trainable, *draw(phase, model, seed=seed, step=step))):
        names = match_parameters(model, [pattern], head)
        chosen[pattern] = [left.pop(name) for name in names if name in left]
    depths = {pattern: sorted({row.depth for row in some if row.held}) for pattern, some in chosen.items()}
    share = -(-sum(map(len, depths.values())) // max(1, MOST_ROWS - len(chosen)))  # depths on a row
    table_rows = []
    for pattern, some in chosen.items():
        table_rows.append((_short(pattern.removeprefix(prefix)), *_cells(some)))
        if len({row.rate for row in some}) > 1 and len(depths[pattern]) > share:
            for start in range(0, len(depths[pattern]), share):
                here = depths[pattern][start : start + share]
                layers = cover(model, {name for name, row in rows.items() if row.depth in here})
                label = _from_to(layers[0].removeprefix(prefix), layers[-1].removeprefix(prefix))
                table_rows.append((f"  {label}", *_cells([row for row in some if row.depth in here])))
    if left:
        table_rows.append(("frozen", *_cells(list(left.values()))))

    columns = dict.fromkeys(("depth", "parameters", "trainable", "peak lr", "weight\ndecay"), "right")
    columns = {"layers": "left", **columns, "mode": "left", "in\noptimizer": "left"}
    title = f"phase {phase}" if len(str(phase)) <= 80 else f"phase of {len(chosen)} patterns"
    table = plain_table(title, columns, table_rows)
    total = sum(row.parameter.numel() for row in rows.values())
    trainable = sum(row.parameter.numel() for row in rows.values() if row.parameter.requires_grad)
    buffers = list(model.buffers())
    table.caption = (
        f"{trainable:,} of {total:,} parameters train ({100 * trainable / max(total, 1):.3g} %); "
        f"buffers: {len(buffers)}, of {sum(b.numel() for b in buffers):,} values"
        + (f"\nnames are those within {prefix[:-1]}" if prefix else "")
    )
    table.caption_justify = "left"
    return table


def _read(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, _Row], str]:
    """Return a row for each parameter, by name, and the dotted prefix that all names share."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    rows = {}
    for name, parameter in model.named_parameters():
        group, owner = groups.get(id(parameter), {}), model.get_submodule(name.rpartition(".")[0])
        alike = len({p.requires_grad for p in owner.parameters()}) == 1
        rows[name] = _Row(
            parameter, group.get("depth"), group.get("initial_lr", 0.0), group.get("weight_decay", 0.0),
            held=bool(group), training=owner.training if alike else None,
        )  # fmt: skip
    return rows, _shared_prefix([name.rpartition(".")[0] + "." for name in rows])


def _shared_prefix(names: Sequence[str]) -> str:
    """Return what all dotted ``names`` begin with, whole parts only: ``"a.b."`` of ``a.b.c`` and ``a.b.d``."""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(f"{parts[0]}.")
    return "".join(shared)


def _short(name: str) -> str:
    """Return ``name``, without its first parts if it is too long."""
    if len(name) <= WIDEST or "." not in name:
        return name
    kept = name.split(".")[1:]
    while len(kept) > 1 and len(".".join(kept)) >= WIDEST:
        del kept[0]
    return "…" + ".".join(kept)


def _from_to(first: str, last: str) -> str:
    if first == last:
        return _short(first)
    both = f"{first} … {last.removeprefix(_shared_prefix([first, last]))}"
    choices = [label for label in (both, f"{first} …") if len(label) <= WIDEST]
    return choices[0] if choices else _short(first)


def _cells(rows: Sequence[_Row]) -> tuple[str, ...]:
    """Return the cells right of the name: depth, parameters, trainable, rate, decay, mode, in the optimizer."""
    training = [row for row in rows if row.parameter.requires_grad]
    return (
        _span(row.depth for row in rows if row.depth is not None),
        f"{sum(row.parameter.numel() for row in rows):,}",
        f"{sum(row.parameter.numel() for row in training):,}",
        _span((row.rate for row in training), ".1e"),
        " / ".join(f"{decay:g}" for decay in sorted({row.decay for row in training})) or "-",
        _agree((row.training for row in rows), "train", "eval"),
        _agree((row.held for row in rows), "yes", "no"),
    )


def _span(values: Iterable[float], form: str = "") -> str:
    ends = sorted(values)
    if not ends:
        return "-"
    return "–".join(dict.fromkeys(f"{end:{form}}".replace("e-0", "e-") for end in (ends[0], ends[-1])))


def _agree(values: Iterable[bool | None], true: str, false: str) -> str:
    found = {true if value else false for value in values if value is not None}
    return "mixed" if len(found) > 1 else "".join(found) or "-"
