"""Bad input to activations, gated products and dropouts."""

from __future__ import annotations

import torch

import bptools.functional as B
import bptools.nn

x = torch.randn(3, 5)
i = torch.arange(3)

# A call, the exception, and what its message must say.
ERRORS = {
    **{
        f"{name}: integers": (lambda f=f: f(i), TypeError, "input must be .* got torch.int64")
        for name, f in {
            "elu": B.elu,
            "selu": B.selu,
            "celu": B.celu,
            "softsign": B.softsign,
            "relu6": B.relu6,
            "hardtanh": B.hardtanh,
            "hardswish": B.hardswish,
            "rrelu": B.rrelu,
            "glu": B.glu,
            "threshold": lambda i: B.threshold(i, 1, 0),
            "prelu": lambda i: B.prelu(i, x[0, :1]),
            "dropout2d": lambda i: B.dropout2d(i.reshape(3, 1, 1, 1)),
            "alpha_dropout": lambda i: B.alpha_dropout(i, training=True),
        }.items()
    },
    "celu: alpha": (lambda: B.celu(x, 0.0), ValueError, "alpha must not be zero"),
    "hardtanh: min_val": (lambda: B.hardtanh(x, 2.0, 1.0), ValueError, "min_val must be at most .* 1.0, got 2.0"),
    "softshrink: lambd": (lambda: B.softshrink(x, -1.0), ValueError, "lambd must be at least 0, got -1.0"),
    "prelu: channels": (lambda: B.prelu(x, x[0, :2]), ValueError, r"weight must .* or \(5,\) .*got \(2,\)"),
    "prelu: dimensions": (lambda: B.prelu(x, x[:1, :1]), ValueError, r"weight must .* got \(1, 1\)"),
    "prelu: dtype": (lambda: B.prelu(x, x[0].double()), TypeError, "weight must have input's dtype .*float64"),
    "rrelu: lower": (lambda: B.rrelu(x, 0.5, 0.1), ValueError, "lower must be at most upper 0.1, got 0.5"),
    "glu: odd": (lambda: B.glu(x), ValueError, r"even size in dimension -1, got \(3, 5\)"),
    "glu: dim": (lambda: B.glu(x, 2), ValueError, "dim must be from -2 to 1 .* got 2"),
    "glu: scalar": (lambda: B.glu(x[0, 0]), ValueError, r"even size .* got \(\)"),
    "swiglu: shapes": (lambda: B.swiglu(x, x[0]), ValueError, r"up must have gate's shape \(3, 5\), got \(5,\)"),
    "swiglu: dtypes": (lambda: B.swiglu(x, x.half()), TypeError, "up must have gate's dtype .*float16"),
    "reglu: nothing": (lambda: B.reglu(x, None), TypeError, "up must be a dense tensor .* got NoneType"),
    "geglu: approximate": (lambda: B.geglu(x, x, "erf"), ValueError, "approximate must be .* got 'erf'"),
    "GEGLU: odd": (lambda: bptools.nn.GEGLU()(x), ValueError, "even size in dimension -1, got 5"),
    "Softmax2d: shape": (lambda: bptools.nn.Softmax2d()(x), ValueError, r"input must have .* got \(3, 5\)"),
    "softmin: dim": (lambda: B.softmin(x, 2), ValueError, "dim must be from -2 to 1 .* got 2"),
    "gumbel_softmax: tau": (lambda: B.gumbel_softmax(x, 0), ValueError, "tau must be positive, got 0"),
    "gumbel_softmax: no number": (lambda: B.gumbel_softmax(x, x), TypeError, "tau must be a number, got Tensor"),
    "gumbel_softmax: logits": (lambda: B.gumbel_softmax(i), TypeError, "logits must be .* got torch.int64"),
    "gumbel_softmax: dim": (lambda: B.gumbel_softmax(x, dim=2), ValueError, "dim must be from -2 to 1 .* got 2"),
    "dropout1d: shape": (lambda: B.dropout1d(x[0]), ValueError, r"input must have shape .* got \(5,\)"),
    "dropout3d: p": (lambda: B.dropout3d(x, 1.5), ValueError, "p must be between 0 and 1, got 1.5"),
    "feature_alpha_dropout: shape": (
        lambda: B.feature_alpha_dropout(x[0], training=True),
        ValueError,
        r"at least 2 dimensions, got \(5,\)",
    ),
    "drop_path: drop_prob": (lambda: B.drop_path(x, -1), ValueError, "drop_prob must be between 0 and 1, got -1"),
    "drop_path: scalar": (lambda: B.drop_path(x[0, 0], 0.5, True), ValueError, r"at least 1 .* got \(\)"),
    "stochastic_depth: mode": (lambda: B.stochastic_depth(x, 0.5, "all"), ValueError, "mode must .* got 'all'"),
}

DEVIATIONS = dict.fromkeys(
    ("swiglu", "geglu", "reglu", "drop_path", "stochastic_depth"), "torch has no function of this name"
)
