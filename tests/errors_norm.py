"""Bad input to the norms beyond those of the foundation."""

from __future__ import annotations

import torch

import bptools.functional as B

x = torch.randn(3, 4)
row = torch.randn(4)
image = torch.randn(2, 4, 3)

# A call, the exception, and what its message must say.
ERRORS = {
    "group_norm: input": (lambda: B.group_norm(row, 2), ValueError, r"input must have shape .* got \(4,\)"),
    "group_norm: num_groups": (
        lambda: B.group_norm(x, 3),
        ValueError,
        "must be a divisor of 4 .* got 3",
    ),
    "group_norm: no group": (lambda: B.group_norm(x, 0), ValueError, "num_groups must be .* got 0"),
    "group_norm: weight": (
        lambda: B.group_norm(x, 2, x),
        ValueError,
        r"weight must have shape \(4,\), got \(3, 4\)",
    ),
    "group_norm: dtype": (lambda: B.group_norm(x, 2, row.double()), TypeError, "weight .* got torch.float64"),
    "group_norm: one value": (lambda: B.group_norm(x[:1], 4), ValueError, r"more than one value .* got \(1, 4\)"),
    "instance_norm: input": (lambda: B.instance_norm(row), ValueError, r"input must have shape .* got \(4,\)"),
    "instance_norm: one value": (lambda: B.instance_norm(x), ValueError, r"more than one value .* got \(3, 4\)"),
    "instance_norm: buffers": (
        lambda: B.instance_norm(image, row),
        ValueError,
        "both given or both None",
    ),
    "instance_norm: evaluation": (
        lambda: B.instance_norm(image, use_input_stats=False),
        ValueError,
        "must be given in evaluation, got None",
    ),
    "instance_norm: bias": (
        lambda: B.instance_norm(image, bias=row[:3]),
        ValueError,
        r"bias must have shape \(4,\), got \(3,\)",
    ),
    "sync_batch_norm: eps": (
        lambda: B.sync_batch_norm(x, None, None, eps=0.0),
        ValueError,
        "eps must be positive, got 0",
    ),
    "sync_batch_norm: momentum": (
        lambda: B.sync_batch_norm(x, None, None, momentum=None),
        TypeError,
        "momentum must be a number, got None",
    ),
    "sync_batch_norm: processes": (
        lambda: B.sync_batch_norm(x, None, None),
        RuntimeError,
        "torch.distributed must be initialised",
    ),
    "local_response_norm: input": (
        lambda: B.local_response_norm(x, 2),
        ValueError,
        r"input must have at least 3 dimensions, got \(3, 4\)",
    ),
    "local_response_norm: size": (lambda: B.local_response_norm(image, 0), ValueError, "size must be .* got 0"),
    "normalize: dim": (lambda: B.normalize(x, dim=2), IndexError, "dim must be of the 2 dimensions .* got 2"),
    "normalize: out": (
        lambda: B.normalize(x.clone().requires_grad_(), out=torch.empty(3, 4)),
        RuntimeError,
        "with out there is no gradient",
    ),
    "add_layer_norm: residual": (
        lambda: B.add_layer_norm(x, row, (4,)),
        ValueError,
        r"residual must have input's shape \(3, 4\), got \(4,\)",
    ),
    "add_layer_norm: weight": (lambda: B.add_layer_norm(x, x, (4,), x), ValueError, r"weight .* got \(3, 4\)"),
    "add_layer_norm: dtype": (
        lambda: B.add_layer_norm(x, x, (4,), row.double()),
        TypeError,
        "weight .* got torch.float64",
    ),
    "add_rms_norm: residual": (
        lambda: B.add_rms_norm(x, x[:1], (4,)),
        ValueError,
        r"residual must have input's shape \(3, 4\), got \(1, 4\)",
    ),
    "add_rms_norm: shape": (lambda: B.add_rms_norm(x, x, (3,)), ValueError, r"input must end in .* got \(3, 4\)"),
    "add_rms_norm: dtype": (
        lambda: B.add_rms_norm(x, x, (4,), row.double()),
        TypeError,
        "weight must not be wider .* got torch.float64",
    ),
    "weight_norm: dim": (lambda: B.weight_norm(x, row, 2), ValueError, "dim must be from -1 to 1, got 2"),
    "weight_norm: g": (lambda: B.weight_norm(x, row), ValueError, r"g must have shape \(3, 1\), got \(4,\)"),
    "spectral_norm: dim": (lambda: B.spectral_norm(x, row, row, 2), ValueError, "dim must be .* got 2"),
    "spectral_norm: u": (
        lambda: B.spectral_norm(x, row, row),
        ValueError,
        r"u must have shape \(3,\), got \(4,\)",
    ),
}

DEVIATIONS = {
    "add_layer_norm": "torch has no such function",
    "add_rms_norm": "torch has no such function",
    "spectral_norm": "torch has it as a parametrization alone",
    "sync_batch_norm": "torch has it as a module alone",
    "weight_norm": "torch's is private",
}
