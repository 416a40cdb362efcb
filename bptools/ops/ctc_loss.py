"""Connectionist temporal classification: the likelihood of a sequence of labels that were not aligned with the
input.

Index legend: `t` time steps (T of them), `n` sequences, `c` classes (C), `s` states (2 S + 1 of them, for at most
S labels). A sequence of L labels has the states l: the labels with a blank before, between and after them, 2 L +
1 in all. A path goes through the states from one of the first two to one of the last two, and at each step stays,
goes on by one, or skips a blank between two labels that differ. Its probability is the product of what the
classes of its states have at each step; that of the labels is the sum over all paths. x[t,n,c] are logarithms of
the probabilities, and all sums are of logarithms (⊕):

    α[t,n,s] = x[t,n,l[s]] + (α[t-1,n,s] ⊕ α[t-1,n,s-1] ⊕ α[t-1,n,s-2] if l[s] is no blank and differs from l[s-2])
    β[t,n,s] = (x + β)[t+1,n,s] ⊕ (x + β)[t+1,n,s+1] ⊕ (x + β)[t+1,n,s+2] if one may skip from l[s] to l[s+2]

the paths up to a state, and from it on; β is 0 in the last two states at the last step. The loss is

    nll[n] = -(α[T-1,n,2L] ⊕ α[T-1,n,2L-1])

and with g[n] the gradient that reaches it, since each path has exactly one state at each step, the derivative of
the logarithm of their sum is the share of the paths that are in a state of class c at step t:

    dx[t,n,c] = -g[n] Σ_{s: l[s] = c} exp(α[t,n,s] + β[t,n,s] + nll[n])

That is the derivative with respect to x whatever x is. ATen's kernel adds g exp(x), which is what log_softmax
takes away again: torch's gradient is right behind a log_softmax alone, and ours is the same there.

The mean divides each loss by its number of labels (by 1, if there are none), and the sum by the number of
sequences. A loss is infinite where no path is long enough: then the gradient is NaN, or with zero_infinity both
are 0.

Kept are x, α (as much as T N (2 S + 1) numbers) and nll; β is computed in the backward.

Source: Graves et al., "Connectionist temporal classification: labelling unsegmented sequence data with recurrent
neural networks", 2006.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op, outside_transforms
from bptools.ops._reduction import reduce_rows, row_gradient

aten = torch.ops.aten

NEVER = (
    -1e30
)  # stands for the logarithm of 0: what is made of it has a derivative, 0, where infinity's would be NaN


def _states(targets: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """targets (n, S) -> each state's class (n, 2 S + 1), and whether one may skip to it from the last but one."""
    labels = torch.stack([torch.full_like(targets, blank), targets], 2).flatten(1)
    labels = F.pad(labels, (0, 1), value=blank)
    same = F.pad(labels, (2, 0), value=blank)[:, : labels.shape[1]] == labels
    return labels, (labels != blank) & ~same


def _emissions(x: Tensor, labels: Tensor) -> Tensor:
    """x (T, n, C), each state's class (n, 2 S + 1) -> what a state has at each step (T, n, 2 S + 1)."""
    return x.clamp_min(NEVER).gather(2, labels.expand(x.shape[0], *labels.shape))


def _later(a: Tensor, by: int) -> Tensor:
    """The states of a (n, s), moved on by so many (back, if negative)."""
    moved = F.pad(a, (max(by, 0), max(-by, 0)), value=NEVER)
    return moved[:, : a.shape[1]] if by > 0 else moved[:, -a.shape[1] :]


def _log_sum(*terms: Tensor) -> Tensor:
    return torch.logsumexp(torch.stack(terms), 0)


def ctc_loss_statistics(
    x: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int
) -> tuple[Tensor, Tensor]:
    """x (T, n, C), targets (n, S), lengths (n) -> nll (n), alpha (n, T, 2 S + 1)."""
    labels, skips = _states(targets, blank)
    emissions = _emissions(x, labels)
    state = torch.arange(labels.shape[1], device=x.device)
    begins = (state < 2) & (state <= 2 * target_lengths.unsqueeze(1))  # (n, 2 S + 1)
    alpha = [torch.where(begins, emissions[0], NEVER)]
    for emission in emissions[1:].unbind():
        a = alpha[-1]
        skipped = torch.where(skips, _later(a, 2), NEVER)
        alpha.append(emission + _log_sum(a, _later(a, 1), skipped))
    alpha = torch.stack(alpha, 1)  # (n, T, 2 S + 1)
    last = (input_lengths - 1).clamp_min(0).reshape(-1, 1, 1).expand(-1, 1, alpha.shape[2])
    ended = torch.where(_ends(state, target_lengths), alpha.gather(1, last).squeeze(1), NEVER)
    nll = -torch.logsumexp(ended, 1)
    nothing = torch.where(target_lengths == 0, 0.0, torch.inf).to(x.dtype)  # what no step at all can say
    nll = torch.where(nll < -0.1 * NEVER, nll, torch.inf)
    return torch.where(input_lengths == 0, nothing, nll), alpha


def _ends(state: Tensor, target_lengths: Tensor) -> Tensor:
    """state (s), target_lengths (n) -> whether a path may end in that state (n, s)."""
    final = 2 * target_lengths.unsqueeze(1)
    return (state == final) | (state == final - 1)


def ctc_loss_forward(
    x: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    zero_infinity: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, n, C), targets (n, S), lengths (n) -> y (n) or (), nll (n), alpha (n, T, 2 S + 1)."""
    nll, alpha = ctc_loss_statistics(x, targets, input_lengths, target_lengths, blank)
    return _reduced(nll, target_lengths, zero_infinity, reduction), nll, alpha


def _reduced(nll: Tensor, target_lengths: Tensor, zero_infinity: bool, reduction: str) -> Tensor:
    if zero_infinity:
        nll = torch.where(nll == torch.inf, 0, nll)
    if reduction == "mean":
        nll = nll / target_lengths.clamp_min(1)
    y = reduce_rows(nll, reduction, nll.numel())
    return y.clone() if reduction == "none" else y  # not the same tensor as nll, which is a result of its own


def ctc_loss_backward(
    dy: Tensor,
    x: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    nll: Tensor,
    alpha: Tensor,
    blank: int,
    zero_infinity: bool,
    reduction: str,
    needs=EVERY,
) -> tuple[Tensor]:
    """dy (n) or (), x (T, n, C), targets (n, S), lengths and nll (n), alpha (n, T, 2 S + 1) -> dx (T, n, C)."""
    labels, skips = _states(targets, blank)
    emissions = _emissions(x, labels)
    state = torch.arange(labels.shape[1], device=x.device)
    ends = torch.where(_ends(state, target_lengths), 0.0, NEVER).to(x.dtype)  # (n, 2 S + 1)
    steps, skips = x.shape[0], F.pad(skips, (0, 2), value=False)[:, 2:]  # now: whether one may skip from a state
    beta = [ends]
    for t in range(steps - 2, -1, -1):
        b = emissions[t + 1] + beta[-1]
        skipped = torch.where(skips, _later(b, -2), NEVER)
        on = _log_sum(b, _later(b, -1), skipped)
        beta.append(torch.where((input_lengths == t + 1).unsqueeze(1), ends, on))
    beta = torch.stack(beta[::-1])  # (T, n, 2 S + 1)

    share = (alpha.transpose(0, 1) + beta + torch.where(nll == torch.inf, 0, nll).unsqueeze(1)).exp()
    before = torch.arange(steps, device=x.device).reshape(-1, 1, 1) < input_lengths.unsqueeze(1)  # (T, n, 1)
    g = _sequence_gradient(dy, target_lengths, reduction).unsqueeze(1)  # (n, 1)
    share = torch.where(before, -g * share, 0)
    dx = torch.zeros_like(x).scatter_add(2, labels.expand(share.shape), share)
    infinite = before & (nll.unsqueeze(1) == torch.inf)
    return (torch.where(infinite, 0 if zero_infinity else torch.nan, dx),)


def _sequence_gradient(dy: Tensor, target_lengths: Tensor, reduction: str) -> Tensor:
    """dy (n) or (), target_lengths (n) -> the gradient of each sequence's loss (n)."""
    n = target_lengths.shape[0]
    g = row_gradient(dy, reduction, n).expand(n)
    return g / target_lengths.clamp_min(1) if reduction == "mean" else g


def _kernel_forward(x, targets, input_lengths, target_lengths, blank, zero_infinity, reduction):
    nll, alpha = aten._ctc_loss.Tensor(x, targets, input_lengths, target_lengths, blank, zero_infinity)
    return _reduced(nll, target_lengths, zero_infinity, reduction), nll, alpha


def _kernel_backward(
    dy, x, targets, input_lengths, target_lengths, nll, alpha, blank, zero_infinity, reduction, needs
):
    g = _sequence_gradient(dy, target_lengths, reduction)
    lengths = input_lengths, target_lengths
    dx = aten._ctc_loss_backward.Tensor(g, x, targets, *lengths, nll, alpha, blank, zero_infinity)
    # The kernel's is the gradient behind a log_softmax, see above.
    counts = torch.arange(x.shape[0], device=x.device).unsqueeze(1) < input_lengths  # (T, n)
    extra = torch.where(counts & (nll != torch.inf), g, 0).unsqueeze(2)
    return (dx - extra * x.exp(),)


def _usable(x, targets, *constants) -> bool:
    ordinary = outside_transforms() and x.device.type in ("cpu", "cuda")
    return ordinary and x.dtype in (torch.float32, torch.float64) and x.numel() > 0


ctc_loss = Op(
    ctc_loss_forward,
    ctc_loss_backward,
    outputs="y nll alpha",
    grads="x",
    residuals=ctc_loss_statistics,
    kernel=Kernel(_kernel_forward, _kernel_backward, _usable),
    autocast={"cpu": "float32", "cuda": "float32"},
)
