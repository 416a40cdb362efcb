"""The simple recurrent layer (Elman's), one layer in one direction, and backpropagation through time.

Index legend: `t` time, `n` samples, `i` input features, `h` and `k` hidden features. φ is tanh or ReLU.

    a[t,n,h] = Σ_i x[t,n,i] Wx[h,i] + bx[h] + Σ_k y[t-1,n,k] Wh[h,k] + bh[h]        y[t] = φ(a[t]),  y[-1] = h0

The same weights act at every time, so the layer is a deep network with shared weights, as deep as the sequence is
long: *unrolled* in time, it is differentiated as any other. Let dh[t] be the whole gradient of y[t]: what
reaches it from outside, dy[t], and through the next step. From the last time to the first,

    dh[t] = dy[t] + da[t+1] Wh                      dh[t] = dy[t] at the last time
    da[t] = dh[t] φ'(a[t])                          φ' = 1 - y² for tanh, [y > 0] for ReLU

This loop is all that must go step by step. Everything else is a sum over all times at once, as in any linear
layer:

    dx = da Wx          dWx = Σ_t,n da x          dWh = Σ_t,n da y[t-1]          dbx = dbh = Σ_t,n da
    dh0 = da[0] Wh

Through k steps a gradient is multiplied by k Jacobians diag(φ') Wh: if their largest singular values stay below
1 it vanishes, like the power of a small number, and it may explode if they are above (Pascanu et al.).

φ' is read off y, so beside x and the result itself nothing is kept; a is forgotten.

Sources: Elman, "Finding structure in time", 1990; Werbos, "Backpropagation through time: what it does and how
to do it", 1990; Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", arXiv
1211.5063.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from bptools.ops import _through_time as time
from bptools.ops._core import EVERY, Kernel, Op

aten = torch.ops.aten


def rnn_forward(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    nonlinearity: str,
    batch_sizes: tuple[int, ...] | None,
    reverse: bool,
) -> Tensor:
    """x (t, n, i), or (r, i) with batch_sizes, h0 (n, h), w_ih (h, i), w_hh (h, h), b_ih, b_hh (h,)
    -> y (t, n, h) or (r, h). nonlinearity is "tanh" or "relu"; in reverse, time runs from the last to the first.
    """
    order = time.order_of(x, batch_sizes, reverse)
    a = time.project(x, w_ih, b_ih, b_hh)
    phi = torch.tanh if nonlinearity == "tanh" else torch.relu
    h, steps = h0, []
    for at in order:
        h = phi(a[at] + time.entering(h, h0, time.width(at)) @ w_hh.mT)
        steps.append(h)
    return time.as_input(time.join(steps, reverse), x)


def rnn_backward(
    dy: Tensor,
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    y: Tensor,
    nonlinearity: str,
    batch_sizes: tuple[int, ...] | None,
    reverse: bool,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """dy, y (t, n, h) or (r, h), the rest as in the forward
    -> dx (t, n, i) or (r, i), dh0 (n, h), dw_ih (h, i), dw_hh (h, h), db_ih, db_hh (h,).
    """
    order = time.order_of(dy, batch_sizes, reverse)
    rows, y = time.rows_of(dy), time.rows_of(y)
    handed, initial, steps = None, time.Initial(), []
    for at, before in time.backwards(order):
        dh = rows[at] if handed is None else time.add_carry(rows[at], handed)
        da = dh * (1 - y[at] * y[at]) if nonlinearity == "tanh" else torch.where(y[at] <= 0, 0, dh)
        steps.append(da)
        handed = initial.split(da @ w_hh, before)
    da = time.join(steps, not reverse)
    entered = time.previous(y, h0, order) if "w_hh" in needs else None
    dx, *parameters = time.sums(da, x, entered, w_ih, dy, needs)
    return dx, initial.gradient() if "h0" in needs else None, *parameters


def _kernel_forward(x, h0, w_ih, w_hh, b_ih, b_hh, nonlinearity, batch_sizes, reverse):
    y, w, h = time.project(x, w_ih, b_ih, b_hh), w_hh.mT, h0
    activate = torch.tanh_ if nonlinearity == "tanh" else torch.relu_
    for at in time.order_of(x, batch_sizes, reverse):
        h = activate(y[at].addmm_(time.entering(h, h0, time.width(at)), w))
    return time.as_input(y, x)


def _kernel_backward(dy, x, h0, w_ih, w_hh, y, nonlinearity, batch_sizes, reverse, needs):
    if is_legacy_batchedtensor(dy):
        return rnn_backward(dy, x, h0, w_ih, w_hh, y, nonlinearity, batch_sizes, reverse, needs)
    order, y = time.order_of(dy, batch_sizes, reverse), time.rows_of(y)
    da = time.rows_of(dy).clone(memory_format=torch.contiguous_format)
    dh0 = da.new_zeros(time.samples(order), da.shape[1])
    for i in reversed(range(len(order))):
        now, at = da[order[i]], order[i]
        if nonlinearity == "tanh":
            aten.tanh_backward(now, y[at], grad_input=now)
        else:
            aten.threshold_backward(now, y[at], 0, grad_input=now)
        for part, target in time.handed_back(order, i, da, dh0):
            target.addmm_(now[part], w_hh)
    entered = time.previous(y, h0, order) if "w_hh" in needs else None
    dx, *parameters = time.sums(da, x, entered, w_ih, dy, needs)
    return dx, dh0 if "h0" in needs else None, *parameters


rnn = Op(
    rnn_forward,
    rnn_backward,
    outputs="y",
    grads="x h0 w_ih w_hh b_ih b_hh",
    keep_for={"x": "w_ih", "w_ih": "x", "h0": "w_hh"},
    kernel=Kernel(_kernel_forward, _kernel_backward, time.kernel_usable),
    autocast={"cpu": "lower", "cuda": "lower"},
)


# The same, keeping nothing but its arguments -----------------------------------------------------------------


def rnn_again_forward(x, h0, w_ih, w_hh, b_ih, b_hh, nonlinearity, batch_sizes, reverse):
    """As `rnn_forward`."""
    return rnn_forward(x, h0, w_ih, w_hh, b_ih, b_hh, nonlinearity, batch_sizes, reverse)


def rnn_again_backward(dy, x, h0, w_ih, w_hh, b_ih, b_hh, nonlinearity, batch_sizes, reverse, needs=EVERY):
    """As `rnn_backward`, but y is computed again."""
    y = rnn_forward(x, h0, w_ih, w_hh, b_ih, b_hh, nonlinearity, batch_sizes, reverse)
    return rnn_backward(dy, x, h0, w_ih, w_hh, y, nonlinearity, batch_sizes, reverse, needs)


def _again_kernel_backward(dy, x, h0, w_ih, w_hh, b_ih, b_hh, nonlinearity, batch_sizes, reverse, needs):
    y = _kernel_forward(x, h0, w_ih, w_hh, b_ih, b_hh, nonlinearity, batch_sizes, reverse)
    return _kernel_backward(dy, x, h0, w_ih, w_hh, y, nonlinearity, batch_sizes, reverse, needs)


rnn_again = Op(
    rnn_again_forward,
    rnn_again_backward,
    outputs="y",
    grads="x h0 w_ih w_hh b_ih b_hh",
    kernel=Kernel(_kernel_forward, _again_kernel_backward, time.kernel_usable),
    autocast=rnn.autocast,
)
