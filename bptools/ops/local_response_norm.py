"""Local response normalisation: a channel is damped by the squares of its neighbours.

Index legend: `c`, `j` channels. W(c) is the window of `size` channels around c, from c - ⌊size/2⌋ to
c + ⌊(size-1)/2⌋, of which those that lie outside of x hold zeros. Each line holds for every sample and position.

    s[c] = k + α / size Σ_{j in W(c)} x[j]²              y[c] = x[c] s[c]^-β

x[c] reaches y[c] directly, and through s every channel whose window it lies in: ∂s[j]/∂x[c] = 2 α / size x[c] if
c is in W(j), and ∂y[j]/∂s[j] = -β x[j] s[j]^(-β-1).

    dx[c] = dy[c] s[c]^-β - 2 α β / size x[c] Σ_{j: c in W(j)} dy[j] x[j] s[j]^(-β-1)

c is in W(j) if j is in the mirrored window, from c - ⌊(size-1)/2⌋ to c + ⌊size/2⌋. x alone is kept, and s is
summed again.

Source: Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep convolutional neural networks", 2012;
that the window is divided by its size is torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Op


def local_response_norm_forward(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """x (n, c, ...) -> y (n, c, ...)."""
    return x * _damping(x, size, alpha, k) ** -beta


def local_response_norm_backward(
    dy: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float, needs=EVERY
) -> tuple[Tensor]:
    """dy, x (n, c, ...) -> dx (n, c, ...)."""
    s = _damping(x, size, alpha, k)
    scale = s**-beta
    through_s = _window_sum(dy * x * scale / s, size, (size - 1) // 2)
    return (dy * scale - 2 * alpha * beta / size * x * through_s,)


def _damping(x: Tensor, size: int, alpha: float, k: float) -> Tensor:
    return k + alpha / size * _window_sum(x * x, size, size // 2)


def _window_sum(t: Tensor, size: int, before: int) -> Tensor:
    """(n, c, ...) -> the sums over windows of `size` channels, which begin `before` channels earlier."""
    n, c, *rest = t.shape
    parts = [t.new_zeros((n, before, *rest)), t, t.new_zeros((n, size - 1 - before, *rest))]
    padded = torch.cat(parts, 1)
    return sum((padded[:, i : i + c] for i in range(1, size)), padded[:, :c])


local_response_norm = Op(
    local_response_norm_forward,
    local_response_norm_backward,
    outputs="y",
    grads="x",
    autocast={"cpu": "float32", "cuda": "float32"},
)
