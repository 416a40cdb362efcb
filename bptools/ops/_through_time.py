"""Time, for the ops that recur: which rows belong to which step, and what one step hands to the next.

All steps of all samples are rows of one matrix, (r, ·), those of time 0 first. A batch of equal lengths, (t, n,
·), is such a matrix already. In a packed sequence the samples are sorted by length, and time t has the rows of
the batch_sizes[t] samples that are that long; nothing is computed for padding.

The order of the steps is the order in which they are computed: in reverse, from the last time to the first. Going
through it, the samples that have ended leave (forward), and those that begin later join with their initial
state (reverse).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from bptools.ops._core import outside_transforms

Order = list[slice]  # the rows of each step


def order_of(x: Tensor, batch_sizes: tuple[int, ...] | None, reverse: bool) -> Order:
    """x (t, n, ·), or (r, ·) with its batch_sizes -> the rows of each step, in the order of computation."""
    sizes = (x.shape[1],) * x.shape[0] if batch_sizes is None else batch_sizes
    order, start = [], 0
    for n in sizes:
        order.append(slice(start, start + n))
        start = start + n
    return order[::-1] if reverse else order


def width(step: slice) -> int:
    """How many samples take part in a step."""
    return step.stop - step.start


def samples(order: Order) -> int:
    """How many samples there are in all."""
    return max(width(order[0]), width(order[-1]))


def rows_of(x: Tensor) -> Tensor:
    """(t, n, d) or (r, d) -> (r, d)."""
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2]) if x.dim() == 3 else x


def as_input(rows: Tensor, x: Tensor) -> Tensor:
    """rows (r, d) -> (t, n, d) if x is (t, n, ·)."""
    return rows.reshape(x.shape[0], x.shape[1], rows.shape[1]) if x.dim() == 3 else rows


def project(x: Tensor, w_ih: Tensor, *biases: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x (t, n, i) or (r, i), w_ih (g, i), biases (g,) -> x Wxᵀ + their sum, (r, g), for all times at once."""
    given = [b for b in biases if b is not None]
    if not given:
        return torch.mm(rows_of(x), w_ih.mT, out=out)
    return torch.addmm(sum(given[1:], given[0]), rows_of(x), w_ih.mT, out=out)


def side_by_side(t: Tensor) -> Tensor:
    """(n, g, h) -> (n, g h)."""
    return t.reshape(t.shape[0], t.shape[1] * t.shape[2])


def join(steps: list[Tensor], reverse: bool) -> Tensor:
    """What each step gave, (n, d) each, in the order of computation -> (r, d)."""
    return torch.cat(steps[::-1] if reverse else steps)


def entering(state: Tensor, initial: Tensor, n: int) -> Tensor:
    """The state after one step -> what enters the next, of n samples. initial (N, d) -> (n, d)."""
    m = state.shape[0]
    if n == m:
        return state
    return state[:n] if n < m else torch.cat([state, initial[m:n]])


def previous(states: Tensor, initial: Tensor, order: Order) -> Tensor:
    """The state after each step, (r, d), and the initial one, (N, d) -> what enters each step, (r, d)."""
    reverse = order[0].start > 0
    n = initial.shape[0]
    if width(order[0]) == width(order[-1]):  # equal lengths
        return torch.cat([states[n:], initial] if reverse else [initial, states[: states.shape[0] - n]])
    entered = [entering(states[before], initial, width(now)) for before, now in itertools.pairwise(order)]
    return join([initial[: width(order[0])], *entered], reverse)


def last_rows(order: Order) -> list[tuple[slice, slice]]:
    """The rows of the samples' last steps, and which samples those are, the longest first."""
    found, m = [], 0
    for at in order[::-1]:
        n = width(at)
        if n > m:
            found.append((slice(at.start + m, at.stop), slice(m, n)))
            m = n
    return found


def final(states: Tensor, order: Order) -> Tensor:
    """The state after each step, (r, d) -> that after each sample's last step, (N, d), a copy: what keeps it
    does not keep them all.
    """
    return torch.cat([states[rows] for rows, _ in last_rows(order)] or [states])


def backwards(order: Order) -> list[tuple[slice, int]]:
    """From the last step to the first: its rows, and the number of samples in the step before, 0 for none."""
    before = [0, *map(width, order[:-1])]
    return list(zip(order, before, strict=True))[::-1]


# The transposes, which the backward pass runs ---------------------------------------------------------------


def widen(carry: Tensor, ended: Tensor) -> Tensor:
    """The gradient of the state that a step gave: handed back for the first samples, carry (m, d); for those
    whose last step it was, the rows from m on of ended (n, d) -> (n, d).
    """
    m = carry.shape[0]
    return carry if m == ended.shape[0] else torch.cat([carry, ended[m:]])


def add_carry(dy: Tensor, carry: Tensor) -> Tensor:
    """dy (n, d), and carry (m, d) for the first m samples -> their sum (n, d)."""
    m = carry.shape[0]
    return dy + carry if m == dy.shape[0] else torch.cat([dy[:m] + carry, dy[m:]])


def sums(
    da: Tensor,
    x: Tensor | None,
    entered: Tensor | None,
    w_ih: Tensor | None,
    like: Tensor,
    needs,
    da_h: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """What is a sum over all times: da (r, g), x, what entered each step (r, k), w_ih (g, i)
    -> dx (as like, the gradient of the result, is), dw_ih (g, i), dw_hh (g, k), db_ih and db_hh (g,).

    da_h is the gradient of the hidden state's part, Wh h + bh, if that is another than da.
    """
    da_h = da if da_h is None else da_h
    dx = as_input(da @ w_ih, like) if "x" in needs else None
    dw_ih = da.mT @ rows_of(x) if "w_ih" in needs else None
    dw_hh = da_h.mT @ entered if "w_hh" in needs else None
    return dx, dw_ih, dw_hh, da.sum(0) if "b_ih" in needs else None, da_h.sum(0) if "b_hh" in needs else None


def wanted(needs, **grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients that are, and None for the others."""
    return tuple(grad if name in needs else None for name, grad in grads.items())


class Initial:
    """The gradient of the initial state: of each sample, what is handed back from its first step."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def split(self, carry: Tensor, m: int) -> Tensor:
        """Takes from carry (n, d) what is not handed to a step of m samples before -> (min(m, n), d)."""
        if m and carry.shape[0] <= m:
            return carry
        self.parts.append(carry[m:])
        return carry[:m]

    def gradient(self) -> Tensor:
        """-> (N, d)."""
        return torch.cat(self.parts[::-1]) if len(self.parts) > 1 else self.parts[0]


# For the kernels, which write in place ----------------------------------------------------------------------


def kernel_usable(*args) -> bool:
    """Whether the loops that write into buffers of their own may run: one dtype, as wide as the formula's."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    dtype = tensors[0].dtype
    if dtype not in (torch.float32, torch.float64) or not outside_transforms():
        return False
    return all(t.dtype is dtype for t in tensors)


def handed_back(order: Order, i: int, dh: Tensor, dh0: Tensor) -> list[tuple[slice, Tensor]]:
    """Where the gradient of what enters the i-th step goes: for some of its samples the rows of the step
    before, in dh (r, d); for those that begin with it, rows of dh0 (N, d). To be added to.
    """
    n = width(order[i])
    if i == 0:
        return [(slice(n), dh0[:n])]
    before = order[i - 1]
    m = width(before)
    if n <= m:
        return [(slice(n), dh[before.start : before.start + n])]
    return [(slice(m), dh[before]), (slice(m, n), dh0[m:n])]
