"""Bad input to the recurrent functions."""

from __future__ import annotations

import torch

import bptools.functional as B

x, h = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
rows, xs = torch.randn(4, 3), torch.randn(2, 3)


def params(gates, *more):
    return [
        torch.randn(gates * 4, 3),
        torch.randn(gates * 4, 4),
        torch.randn(gates * 4),
        torch.randn(gates * 4),
        *more,
    ]


def run(f, input=x, hx=h, weights=(), biased=True, layers=1, dropout=0.0, **options):
    return f(input, hx, weights, biased, layers, dropout, True, False, **options)


def gru(**given):
    return lambda: run(B.gru, **{"weights": params(3), **given})


w_ih, w_hh, b, _ = params(3)

# A call, the exception, and what its message must say.
ERRORS = {
    "gru: input": (gru(input=x[0]), ValueError, r"input must have 3 dimensions, got \(2, 3\)"),
    "gru: packed input": (
        gru(batch_sizes=[2, 2]),
        ValueError,
        r"input must have shape \(r, i\) .*got \(5, 2, 3\)",
    ),
    "gru: batch_sizes": (
        gru(input=rows, batch_sizes=[1, 2, 1]),
        ValueError,
        r"batch_sizes must .* got \(1, 2, 1\)",
    ),
    "gru: batch_sizes, sum": (
        gru(input=rows, batch_sizes=[2, 1]),
        ValueError,
        r"sum to the 4 rows.* got \(2, 1\)",
    ),
    "gru: batch_sizes, none": (gru(input=rows, batch_sizes=[]), ValueError, r"batch_sizes .* got \(\)"),
    "gru: batch_sizes, floats": (
        gru(input=rows, batch_sizes=torch.ones(4)),
        ValueError,
        r"batch_sizes must be integers.* got \(1\.0",
    ),
    "gru: time": (gru(input=x[:0]), ValueError, r"at least one time step, got \(0, 2, 3\)"),
    "gru: hx": (gru(hx=h[:, :1]), ValueError, r"hx must have shape \(1, 2, h\), got \(1, 1, 4\)"),
    "gru: params": (gru(biased=False), ValueError, "params must be 2 tensors, 2 for each run, got 4"),
    "gru: features": (
        gru(input=x[..., :2]),
        ValueError,
        r"params, w_ih of layer 0 must have shape \(12, 2\), got \(12, 3\)",
    ),
    "gru: dropout": (gru(dropout=1.5), ValueError, "dropout must be between 0 and 1, got 1.5"),
    "gru: dtypes": (gru(hx=h.double()), TypeError, "h0 must have input's dtype torch.float32, got torch.float64"),
    "gru: checkpoint_every": (
        gru(checkpoint_every=0),
        ValueError,
        "checkpoint_every must be None, 'sqrt' or .* got 0",
    ),
    "lstm: hx": (lambda: run(B.lstm, hx=(h,), weights=params(4)), ValueError, "hx must be 2 tensors, got 1"),
    "lstm: projection": (
        lambda: run(B.lstm, hx=(h[..., :2], h), weights=params(4)),
        ValueError,
        "params must be 5 tensors, 5 for each run, got 4",
    ),
    "rnn_tanh: w_hh": (
        lambda: run(B.rnn_tanh, weights=[torch.randn(4, 3), torch.randn(4, 5)], biased=False),
        ValueError,
        r"params, w_hh of layer 0 must have shape \(4, 4\), got \(4, 5\)",
    ),
    "rnn_relu: params": (
        lambda: run(B.rnn_relu, weights=params(1), layers=2),
        ValueError,
        r"hx must have shape \(2, 2, h\), got \(1, 2, 4\)",
    ),
    "gru_cell: input": (
        lambda: B.gru_cell(x, h, w_ih, w_hh),
        ValueError,
        r"input must have shape \(n, i\), got \(5,",
    ),
    "gru_cell: hx": (
        lambda: B.gru_cell(xs, h, w_ih, w_hh),
        ValueError,
        r"hx must have shape \(2, h\), got \(1, 2, 4\)",
    ),
    "gru_cell: w_ih": (
        lambda: B.gru_cell(xs, h[0], w_hh, w_hh),
        ValueError,
        r"w_ih must .*\(12, 3\), got \(12, 4\)",
    ),
    "gru_cell: b_hh": (
        lambda: B.gru_cell(xs, h[0], w_ih, w_hh, b, b[:3]),
        ValueError,
        r"b_hh must have shape \(12,\), got \(3,\)",
    ),
    "rnn_tanh_cell: samples": (
        lambda: B.rnn_tanh_cell(xs, h[0, :1], w_ih, w_hh),
        ValueError,
        r"hx must have shape \(2, 4\), got \(1, 4\)",
    ),
    "rnn_relu_cell: w_hh": (
        lambda: B.rnn_relu_cell(xs, h[0], w_ih[:4], w_hh),
        ValueError,
        r"w_hh must have shape \(4, 4\), got \(12, 4\)",
    ),
    "lstm_cell: hx": (lambda: B.lstm_cell(xs, (h[0],), w_ih, w_hh), ValueError, "hx must be 2 tensors, got 1"),
}

_REASON = "torch.nn.functional has none; the signature is that of torch.{0}"
DEVIATIONS = {
    **{
        name: _REASON.format(name) + ", with batch_sizes as a keyword"
        for name in ("rnn_tanh", "rnn_relu", "gru", "lstm")
    },
    **{name: _REASON.format(name) for name in ("rnn_tanh_cell", "rnn_relu_cell", "gru_cell", "lstm_cell")},
}
