"""Recurrent networks, (t, n, input_size) -> (t, n, directions * hidden_size) and the final state; their cells.

Input may be (n, t, ·) with batch_first, (t, ·) without a batch, or a `PackedSequence` of sequences of unequal
lengths.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from bptools import functional


class _Recurrent:
    """The forward of the recurrent networks; their constructor and parameters are torch's.

    Attributes:
        checkpoint_every: set it to have less memory kept for the backward pass. None: the results of all steps
            are kept. k: every k-th state is, and the steps from it are computed again. "sqrt": k = √t.
            Gradients stay exact; it costs one more forward pass.
    """

    checkpoint_every: int | str | None = None

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Tensor | PackedSequence, Any]:
        """Apply the network."""
        self._update_flat_weights()
        packed = input if isinstance(input, PackedSequence) else None
        unbatched = False
        if packed is None:
            if input.dim() not in (2, 3):
                raise ValueError(f"{self._get_name()}: input must have 2 or 3 dimensions, got {input.dim()}")
            unbatched = input.dim() == 2
            x, batch_sizes = input.unsqueeze(0 if self.batch_first else 1) if unbatched else input, None
            self._check_dimensions(hx, input.dim())
            if unbatched and hx is not None:
                hx = _each(lambda state: state.unsqueeze(1), hx)
        else:
            x, batch_sizes = packed.data, packed.batch_sizes
            hx = None if hx is None else self.permute_hidden(hx, packed.sorted_indices)
        if hx is None:
            hx = self._zeros(x, batch_sizes)
        self.check_forward_args(x, hx, batch_sizes)
        y, *states = self._function(
            x,
            hx,
            [getattr(self, name) for name in self._flat_weights_names],
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first and packed is None,
            batch_sizes=batch_sizes,
            checkpoint_every=self.checkpoint_every,
        )
        after = states[0] if len(states) == 1 else tuple(states)
        if packed is not None:
            y = PackedSequence(y, batch_sizes, packed.sorted_indices, packed.unsorted_indices)
            return y, self.permute_hidden(after, packed.unsorted_indices)
        if unbatched:
            return y.squeeze(0 if self.batch_first else 1), _each(lambda state: state.squeeze(1), after)
        return y, after

    def _check_dimensions(self, hx: Any, dims: int) -> None:
        for state in () if hx is None else hx if isinstance(hx, tuple) else (hx,):
            if state.dim() != dims:
                raise RuntimeError(
                    f"{self._get_name()}: hx must have {dims} dimensions, as input, got {state.dim()}"
                )

    def _zeros(self, x: Tensor, batch_sizes: Tensor | None) -> Tensor:
        return x.new_zeros(self.get_expected_hidden_size(x, batch_sizes))


def _each(function: Callable[[Tensor], Tensor], hx: Tensor | tuple[Tensor, ...]) -> Any:
    return tuple(map(function, hx)) if isinstance(hx, tuple) else function(hx)


class RNN(_Recurrent, torch.nn.RNN):
    """`torch.nn.RNN` on `bptools.functional.rnn_tanh` and `rnn_relu`, with `checkpoint_every`."""

    @property
    def _function(self) -> Callable[..., tuple[Tensor, ...]]:
        return functional.rnn_tanh if self.nonlinearity == "tanh" else functional.rnn_relu


class GRU(_Recurrent, torch.nn.GRU):
    """`torch.nn.GRU` on `bptools.functional.gru`, with `checkpoint_every`."""

    _function = staticmethod(functional.gru)


class LSTM(_Recurrent, torch.nn.LSTM):
    """`torch.nn.LSTM` on `bptools.functional.lstm`, with `checkpoint_every`.

    Example:
        >>> layer = LSTM(8, 16)
        >>> layer.checkpoint_every = "sqrt"  # of 400 steps every 20th is kept
        >>> y, (hn, cn) = layer(torch.randn(400, 2, 8))
        >>> y.shape
        torch.Size([400, 2, 16])
    """

    _function = staticmethod(functional.lstm)

    def _zeros(self, x: Tensor, batch_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        sizes = self.get_expected_hidden_size(x, batch_sizes), self.get_expected_cell_size(x, batch_sizes)
        return x.new_zeros(sizes[0]), x.new_zeros(sizes[1])


class _Cell:
    """The forward of the cells, of one step: input (n, i) or (i,), hx (n, h) or (h,)."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Apply one step."""
        name, states = self._get_name(), () if hx is None else hx if isinstance(hx, tuple) else (hx,)
        for argument, t in (("input", input), *(("hx", state) for state in states)):
            if t.dim() not in (1, 2):
                raise ValueError(f"{name}: {argument} must have 1 or 2 dimensions, got {t.dim()}")
        x = torch.atleast_2d(input)
        if hx is None:
            hx = self._zeros(x)
        elif input.dim() == 1:
            hx = _each(lambda state: state.unsqueeze(0), hx)
        after = self._function(x, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return _each(lambda state: state.squeeze(0), after) if input.dim() == 1 else after

    def _zeros(self, x: Tensor) -> Any:
        return x.new_zeros(x.shape[0], self.hidden_size)


class RNNCell(_Cell, torch.nn.RNNCell):
    """`torch.nn.RNNCell` on `bptools.functional.rnn_tanh_cell` and `rnn_relu_cell`."""

    @property
    def _function(self) -> Callable[..., Tensor]:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"RNNCell: nonlinearity must be 'tanh' or 'relu', got {self.nonlinearity!r}")
        return functional.rnn_tanh_cell if self.nonlinearity == "tanh" else functional.rnn_relu_cell


class GRUCell(_Cell, torch.nn.GRUCell):
    """`torch.nn.GRUCell` on `bptools.functional.gru_cell`."""

    _function = staticmethod(functional.gru_cell)


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """`torch.nn.LSTMCell` on `bptools.functional.lstm_cell`."""

    _function = staticmethod(functional.lstm_cell)

    def _zeros(self, x: Tensor) -> tuple[Tensor, Tensor]:
        zeros = super()._zeros(x)
        return zeros, zeros


def truncated_bptt(
    module: torch.nn.Module, input: Tensor, hx: Any = None, *, chunk: int, window: int | None = None
) -> Iterator[tuple[Tensor, Any]]:
    """Run a recurrent module over a long sequence, chunk by chunk; gradients reach back so far and no farther.

    Truncated backpropagation through time. The state is carried from chunk to chunk without its history, so
    memory does not grow with the sequence: call `backward` on each chunk before asking for the next.

        for (y, state), wanted in zip(truncated_bptt(lstm, x, chunk=20), target.split(20)):
            loss_of(head(y), wanted).backward()

    Gradients are those of a loop that detaches the state by hand. With a window longer than a chunk, the
    gradient of every chunk reaches back over `window` steps (BPTT(window; chunk) of Williams and Peng), which
    costs window / chunk times the forward passes: the steps from the state `window` steps back are run again,
    with the weights as they are by then.

    Args:
        module: a recurrent module of bptools.nn or torch.nn, or any with `module(input, hx) -> (output, hx)`;
            if it has an attribute `batch_first` that is True, time is the second dimension of a batch.
        input: (t, n, i); (n, t, i) for batch_first; or (t, i) without a batch.
        hx: the initial state, as the module takes it. It keeps its history: gradients of the first chunk reach it.
        chunk: how many steps there are from one loss to the next; the last chunk may be shorter.
        window: over how many steps gradients reach back, a multiple of chunk; None: chunk.

    Yields:
        The output of each chunk (chunk, n, ·), and the state after it.

    Raises:
        ValueError: if chunk or window is no such number, or input has not 2 or 3 dimensions.
        TypeError: if input is not a tensor.

    Source: Williams and Peng, "An efficient gradient-based algorithm for on-line training of recurrent network
    trajectories", Neural Computation 2, 1990.
    """
    window = chunk if window is None else window
    for argument, value in (("chunk", chunk), ("window", window)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"truncated_bptt: {argument} must be an int of at least 1, got {value!r}")
    if window % chunk:
        raise ValueError(f"truncated_bptt: window must be a multiple of chunk, {chunk}, got {window}")
    if not isinstance(input, Tensor):
        raise TypeError(f"truncated_bptt: input must be a tensor, got {type(input).__name__}")
    if input.dim() not in (2, 3):
        raise ValueError(f"truncated_bptt: input must have 2 or 3 dimensions, got {tuple(input.shape)}")
    return _chunks(module, input, hx, chunk, window)


def _chunks(module: Any, input: Tensor, hx: Any, chunk: int, window: int) -> Iterator[tuple[Tensor, Any]]:
    time = 1 if input.dim() == 3 and getattr(module, "batch_first", False) else 0
    starts: deque[tuple[int, Any]] = deque(maxlen=window // chunk)  # where a window may begin, and the state there
    for begin in range(0, input.shape[time], chunk):
        starts.append((begin, hx))
        first, state = starts[0]
        steps = min(chunk, input.shape[time] - begin)
        y, hx = module(input.narrow(time, first, begin - first + steps), state)
        yield y.narrow(time, begin - first, steps), hx
        hx = tree_map(torch.Tensor.detach, hx)
