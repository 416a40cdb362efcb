"""Cases of the recurrent ops: one layer each, in one direction or two, of equal lengths and packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from case import EMPTY, Case, Maker
from torch import Tensor

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
PACKED = (2, 2, 1)


def theirs(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """Torch's function, which takes a packed sequence by position and knows no checkpoints."""

    def call(*args, **options):
        packed = options.get("batch_sizes") is not None
        onednn = name == "lstm" and not packed and torch.is_autocast_enabled("cpu")
        if not onednn or torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return layer(*args, **options)
        # Here oneDNN's LSTM raises, as the processor has no bfloat16: elsewhere it returns that.
        enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            return tuple(t.bfloat16() for t in layer(*args, **options))
        finally:
            torch._C._set_mkldnn_enabled(enabled)

    def layer(input, hx, params, *constants, batch_sizes=None, checkpoint_every=None):
        hx, plain = tuple(hx) if name == "lstm" else hx, getattr(torch, name)
        if batch_sizes is None:
            return plain(input, hx, list(params), *constants, False)
        return plain(input, torch.tensor(batch_sizes), hx, list(params), *constants)

    return call


def network(
    name: str,
    *,
    biased: bool = True,
    both: bool = False,
    packed: bool = False,
    p: int = 3,
    n: int = 2,
    **constants: Any,
) -> Callable[[Maker], tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of a layer of three steps: two features in, three of a state, of which a projection leaves p."""

    def make(t: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows, runs = GATES[name] * 3, 1 + both
        params = []
        for _ in range(runs):
            params += [t(rows, 2), t(rows, p)]
            params += [t(rows), t(rows)] if biased else []
            params += [t(p, 3)] if p < 3 else []
        x, h, c = t(sum(PACKED), 2) if packed else t(3, n, 2), t(runs, n, p), t(runs, n, 3)
        more = {"batch_sizes": PACKED} if packed else {}
        return (x, (h, c) if name == "lstm" else h, params, biased, 1, 0.0, True, both), {**constants, **more}

    return make


def cell(name: str) -> Callable[[Maker], tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of a cell."""

    def make(t: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows, h = GATES[name] * 3, (t(2, 3), t(2, 3))
        return (t(2, 2), h if name == "lstm" else h[0], t(rows, 2), t(rows, 3), t(rows), t(rows)), {}

    return make


CASES: list[Case] = [
    *[
        Case(name, id, network(name, **how), theirs=theirs(name), only=only)
        for name in GATES
        for id, how, only in (
            ("plain", {}, ()),
            ("packed-both-ways", {"packed": True, "both": True, "biased": False}, ()),
            ("no-samples", {"n": 0}, EMPTY),
        )
    ],
    *[
        Case(name, id, network(name, **how), theirs=theirs(name))
        for name, id, how in (
            ("lstm", "projection", {"p": 1}),
            ("lstm", "checkpoints", {"packed": True, "both": True, "checkpoint_every": 2}),
            ("gru", "checkpoints", {"checkpoint_every": 1}),
            ("rnn_tanh", "checkpoints", {"packed": True, "checkpoint_every": "sqrt"}),
        )
    ],
    *[Case(f"{name}_cell", "plain", cell(name), theirs=getattr(torch, f"{name}_cell")) for name in GATES],
]
