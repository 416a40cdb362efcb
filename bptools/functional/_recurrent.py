"""Recurrent layers and cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bptools.functional._checks import check_probability, is_int, shape_of
from bptools.functional._dropout import dropout as _dropout
from bptools.ops import _through_time as time
from bptools.ops import gru as _gru
from bptools.ops import lstm as _lstm
from bptools.ops import rnn as _rnn

States = tuple[Tensor, ...]


@dataclass(frozen=True)
class _Kind:
    """A recurrence: one layer in one direction, and what it is made of.

    Attributes:
        gates: how many times hidden_size the rows of its weights are.
        states: the names of what it carries from step to step.
        layer: (x, states, weights, batch_sizes, reverse, again) -> y, final states; with `again` it keeps
            nothing but its arguments for the backward pass.
    """

    gates: int
    states: tuple[str, ...]
    layer: Callable[..., tuple[Tensor, States]]


def _rnn_layer(nonlinearity: str) -> Callable[..., tuple[Tensor, States]]:
    def layer(x, states, weights, batch_sizes, reverse, again):
        op = _rnn.rnn_again if again else _rnn.rnn
        y = op(x, *states, *weights[:4], nonlinearity, batch_sizes, reverse)
        return y, (_last(y, batch_sizes, reverse),)

    return layer


def _gru_layer(x, states, weights, batch_sizes, reverse, again):
    op = _gru.gru_again if again else _gru.gru
    results = op(x, *states, *weights[:4], batch_sizes, reverse)
    y = results if again else results[0]
    return y, (_last(y, batch_sizes, reverse),)


def _lstm_layer(x, states, weights, batch_sizes, reverse, again, wide=False):
    again = again or not torch.is_grad_enabled()  # nothing to be kept
    if wide or (batch_sizes is not None and weights[4] is None):
        op = _lstm.wide_lstm_again if again else _lstm.wide_lstm
    else:
        op = _lstm.lstm_again if again else _lstm.lstm
    y, cn, *_ = op(x, *states, *weights, batch_sizes, reverse)
    return y, (_last(y, batch_sizes, reverse), cn)


def _last(y: Tensor, batch_sizes: tuple[int, ...] | None, reverse: bool) -> Tensor:
    return time.final(time.rows_of(y), time.order_of(y, batch_sizes, reverse))


_KINDS = {
    "rnn_tanh": _Kind(1, ("hx",), _rnn_layer("tanh")),
    "rnn_relu": _Kind(1, ("hx",), _rnn_layer("relu")),
    "gru": _Kind(3, ("hx",), _gru_layer),
    "lstm": _Kind(4, ("hx[0]", "hx[1]"), _lstm_layer),
}


def rnn_tanh(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | Sequence[int] | None = None,
    checkpoint_every: int | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The simple recurrent network, `h = tanh(Wx x + bx + Wh h + bh)`: layers, in one or two directions.

    The arguments are those of `torch.rnn_tanh`, except that a packed sequence is told by a keyword.

    Args:
        input: (t, n, i); (n, t, i) if batch_first; (r, i) if batch_sizes is given.
        hx: the initial state (layers * directions, n, h).
        params: for each layer, and in it each direction: weights (h, i) and (h, h) and, if has_biases, two
            biases (h,).
        has_biases: whether params has biases.
        num_layers: how many layers; each reads the result of the one below.
        dropout: the probability of zero in what a layer reads from the one below.
        train: whether dropout drops.
        bidirectional: whether each layer also runs from the last time to the first, with weights of its own.
        batch_first: whether input and the result are (n, t, ·).
        batch_sizes: of a packed sequence, see `torch.nn.utils.rnn.PackedSequence`: how many samples each time has.
        checkpoint_every: None: for each layer the result is kept for the backward pass, and what speeds it up.
            k: only every k-th state is, and the steps from it are computed again. "sqrt": with k = √t, of which
            the memory is the least, O(√t) instead of O(t).

    Returns:
        The last layer's result (t, n, directions * h), and the final state (layers * directions, n, h).

    Raises:
        ValueError: if a shape does not fit.
        TypeError: if dtypes differ.
    """
    return _network(
        "rnn_tanh",
        input,
        (hx,),
        params,
        has_biases,
        num_layers,
        dropout,
        train,
        bidirectional,
        batch_first,
        batch_sizes,
        checkpoint_every,
    )


def rnn_relu(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | Sequence[int] | None = None,
    checkpoint_every: int | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The simple recurrent network with ReLU, (t, n, i) -> (t, n, directions * h): see `rnn_tanh`."""
    return _network(
        "rnn_relu",
        input,
        (hx,),
        params,
        has_biases,
        num_layers,
        dropout,
        train,
        bidirectional,
        batch_first,
        batch_sizes,
        checkpoint_every,
    )


def gru(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | Sequence[int] | None = None,
    checkpoint_every: int | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The gated recurrent unit, (t, n, i) -> (t, n, directions * h): see `rnn_tanh`; weights have 3h rows."""
    return _network(
        "gru",
        input,
        (hx,),
        params,
        has_biases,
        num_layers,
        dropout,
        train,
        bidirectional,
        batch_first,
        batch_sizes,
        checkpoint_every,
    )


def lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | Sequence[int] | None = None,
    checkpoint_every: int | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Long short-term memory, (t, n, i) -> (t, n, directions * p): see `rnn_tanh`; weights have 4h rows.

    Args:
        input: (t, n, i); (n, t, i) if batch_first; (r, i) if batch_sizes is given.
        hx: the initial hidden state (layers * directions, n, p) and cell (layers * directions, n, h). If p is
            not h, it is a projection, and each layer and direction has a last weight (p, h).
        params: for each layer, and in it each direction: weights (4h, i) and (4h, p), if has_biases two biases
            (4h,), and if there is a projection its weight (p, h).
        has_biases: see `rnn_tanh`, as for the other arguments.
        num_layers: how many layers.
        dropout: between layers.
        train: whether dropout drops.
        bidirectional: whether there are two directions.
        batch_first: whether input and the result are (n, t, ·).
        batch_sizes: of a packed sequence.
        checkpoint_every: how many steps are computed again from one kept state.

    Returns:
        The last layer's result (t, n, directions * p), the final hidden state and the final cell.

    Raises:
        ValueError: if a shape does not fit.
        TypeError: if dtypes differ.
    """
    return _network(
        "lstm",
        input,
        tuple(hx),
        params,
        has_biases,
        num_layers,
        dropout,
        train,
        bidirectional,
        batch_first,
        batch_sizes,
        checkpoint_every,
    )


def rnn_tanh_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """One step of `rnn_tanh`: input (n, i), hx (n, h), w_ih (h, i), w_hh (h, h), b_ih, b_hh (h,) -> (n, h)."""
    return _cell("rnn_tanh", input, (hx,), w_ih, w_hh, b_ih, b_hh)[0]


def rnn_relu_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """One step of `rnn_relu`: input (n, i), hx (n, h), w_ih (h, i), w_hh (h, h), b_ih, b_hh (h,) -> (n, h)."""
    return _cell("rnn_relu", input, (hx,), w_ih, w_hh, b_ih, b_hh)[0]


def gru_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """One step of `gru`: input (n, i), hx (n, h), w_ih (3h, i), w_hh (3h, h), b_ih, b_hh (3h,) -> (n, h)."""
    return _cell("gru", input, (hx,), w_ih, w_hh, b_ih, b_hh)[0]


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `lstm`: input (n, i), hx a hidden state and a cell (n, h) each, w_ih (4h, i), w_hh (4h, h),
    b_ih, b_hh (4h,) -> the next hidden state and cell (n, h).
    """
    return _cell("lstm", input, tuple(hx), w_ih, w_hh, b_ih, b_hh)


# What they share ----------------------------------------------------------------------------------------------


def _cell(name: str, input: Tensor, states: States, w_ih, w_hh, b_ih, b_hh) -> States:
    kind, name = _KINDS[name], f"{name}_cell"
    if input.dim() != 2:
        raise ValueError(f"{name}: input must have shape (n, i), got {shape_of(input)}")
    _check_count(name, kind, states)
    hidden = states[0].shape[-1] if states[0].dim() == 2 else None
    for argument, state in zip(kind.states, states, strict=True):
        if hidden is None or shape_of(state) != (input.shape[0], hidden):
            expected = f"({input.shape[0]}, {'h' if hidden is None else hidden})"
            raise ValueError(f"{name}: {argument} must have shape {expected}, got {shape_of(state)}")
    rows = kind.gates * hidden
    _check_shape(name, "w_ih", w_ih, (rows, input.shape[1]))
    _check_shape(name, "w_hh", w_hh, (rows, hidden))
    _check_shape(name, "b_ih", b_ih, (rows,))
    _check_shape(name, "b_hh", b_hh, (rows,))
    wide = {"wide": True} if name == "lstm_cell" else {}
    weights = (w_ih, w_hh, b_ih, b_hh, None)
    y, after = kind.layer(input.unsqueeze(0), states, weights, None, False, again=False, **wide)
    return (y.squeeze(0), *after[1:])


def _network(
    name: str,
    input: Tensor,
    hx: States,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | Sequence[int] | None,
    checkpoint_every: int | str | None,
) -> tuple[Tensor, ...]:
    """All layers and directions: the result, and each of the final states."""
    kind, directions = _KINDS[name], 2 if bidirectional else 1
    sizes = _check_sequence(name, input, batch_sizes)
    x = input.transpose(0, 1) if batch_first and sizes is None else input
    if sizes and sizes[0] == sizes[-1]:  # of equal lengths: no different from a batch
        x, sizes = x.unflatten(0, (len(sizes), sizes[0])), None
    steps = x.shape[0] if sizes is None else len(sizes)
    if steps == 0:
        raise ValueError(f"{name}: input must have at least one time step, got {shape_of(input)}")
    n = x.shape[1] if sizes is None else sizes[0]
    weights = _check_params(name, kind, hx, params, has_biases, num_layers * directions, n)
    _check_weights(name, kind, hx, weights, x.shape[-1], directions)
    check_probability(name, "dropout", dropout)
    every = _check_every(name, checkpoint_every, steps)

    finals = []
    for layer in range(num_layers):
        results = []
        for direction in range(directions):
            i = layer * directions + direction
            run = _run if every is None else _run_in_segments
            y, after = run(kind.layer, x, tuple(s[i] for s in hx), weights[i], sizes, direction == 1, every)
            results.append(y)
            finals.append(after)
        x = torch.cat(results, -1) if bidirectional else results[0]
        if layer < num_layers - 1:
            x = _dropout(x, dropout, train)
    if batch_sizes is not None:
        x = time.rows_of(x)
    elif batch_first:
        x = x.transpose(0, 1)
    return (x, *(torch.stack(states) for states in zip(*finals, strict=True)))


def _run(layer, x, initial, weights, sizes, reverse, every):
    return layer(x, initial, weights, sizes, reverse, again=False)


def _run_in_segments(layer, x, initial, weights, sizes, reverse, every):
    """As `_run`, in segments of so many steps: each keeps the state with which it begins."""
    order = time.order_of(x, sizes, False)
    states, results, ended = initial, [], []
    begins = range(0, len(order), every)
    for begin in reversed(begins) if reverse else begins:
        steps = order[begin : begin + every]
        part = slice(begin, begin + every) if sizes is None else slice(steps[0].start, steps[-1].stop)
        n = time.width(steps[0])
        if not reverse and n < states[0].shape[0]:
            ended.insert(0, tuple(s[n:] for s in states))
        states = tuple(time.entering(s, s0, n) for s, s0 in zip(states, initial, strict=True))
        part_sizes = None if sizes is None else sizes[begin : begin + every]
        y, states = layer(x[part], states, weights, part_sizes, reverse, again=True)
        results.append(y)
    y = torch.cat(results[::-1] if reverse else results)
    return y, tuple(map(torch.cat, zip(states, *ended, strict=True))) if ended else states


# Checks -------------------------------------------------------------------------------------------------------


def _check_shape(name: str, argument: str, t: Tensor | None, shape: tuple[int, ...]) -> None:
    if t is not None and shape_of(t) != shape:
        raise ValueError(f"{name}: {argument} must have shape {shape}, got {shape_of(t)}")


def _check_count(name: str, kind: _Kind, states: States) -> None:
    if len(states) != len(kind.states):
        raise ValueError(f"{name}: hx must be {len(kind.states)} tensors, got {len(states)}")


def _check_sequence(
    name: str, input: Tensor, batch_sizes: Tensor | Sequence[int] | None
) -> tuple[int, ...] | None:
    """The sizes as numbers, if there are any."""
    if batch_sizes is None:
        if input.dim() != 3:
            raise ValueError(f"{name}: input must have 3 dimensions, got {shape_of(input)}")
        return None
    if input.dim() != 2:
        raise ValueError(f"{name}: input must have shape (r, i) beside batch_sizes, got {shape_of(input)}")
    sizes = tuple(batch_sizes.tolist() if isinstance(batch_sizes, Tensor) else batch_sizes)
    if not all(is_int(n) for n in sizes):
        raise ValueError(f"{name}: batch_sizes must be integers, one for each time, got {sizes}")
    grows = any(sizes[i] < sizes[i + 1] for i in range(len(sizes) - 1))
    if any(n < 1 for n in sizes) or grows or sum(sizes) != input.shape[0]:
        raise ValueError(
            f"{name}: batch_sizes must be at least 1, not grow, and sum to the {input.shape[0]} rows of input, "
            f"got {sizes}"
        )
    return sizes


def _check_params(
    name: str, kind: _Kind, hx: States, params: Sequence[Tensor], has_biases: bool, runs: int, n: int
) -> list[tuple[Tensor | None, ...]]:
    """For each layer and direction w_ih, w_hh, b_ih, b_hh and w_hr, None for what there is not."""
    _check_count(name, kind, hx)
    for argument, state in zip(kind.states, hx, strict=True):
        if state.dim() != 3 or state.shape[0] != runs or state.shape[1] != n:
            raise ValueError(f"{name}: {argument} must have shape ({runs}, {n}, h), got {shape_of(state)}")
    projected = hx[0].shape[2] != hx[-1].shape[2]
    each = 2 + 2 * has_biases + projected
    if len(params) != runs * each:
        raise ValueError(f"{name}: params must be {runs * each} tensors, {each} for each run, got {len(params)}")
    groups = [tuple(params[i : i + each]) for i in range(0, len(params), each)]
    none = (None, None)
    return [(*p[:2], *(p[2:4] if has_biases else none), p[-1] if projected else None) for p in groups]


def _check_weights(
    name: str, kind: _Kind, hx: States, weights: list[tuple[Tensor | None, ...]], features: int, directions: int
) -> None:
    p, h = hx[0].shape[2], hx[-1].shape[2]
    rows = kind.gates * h
    for i, group in enumerate(weights):
        read = features if i < directions else directions * p
        shapes = ((rows, read), (rows, p), (rows,), (rows,), (p, h))
        where = f"layer {i // directions}" + (", reverse" if i % directions else "")
        for argument, t, shape in zip(("w_ih", "w_hh", "b_ih", "b_hh", "w_hr"), group, shapes, strict=True):
            _check_shape(name, f"params, {argument} of {where}", t, shape)


def _check_every(name: str, every: int | str | None, steps: int) -> int | None:
    if every == "sqrt":
        return math.isqrt(steps - 1) + 1  # rounded up
    if every is None or (is_int(every) and every >= 1):
        return every
    raise ValueError(f"{name}: checkpoint_every must be None, 'sqrt' or an int of at least 1, got {every!r}")
