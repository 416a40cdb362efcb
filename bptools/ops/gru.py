"""The gated recurrent unit, one layer in one direction, and backpropagation through time.

Index legend: `t` time, `n` samples, `i` input features, `h` hidden features. Gates: r reset, z update, m the new
state (torch's n). The rows of the weights and biases are those of r, z and m, in this order; ⊙ is elementwise.

    r[t] = σ(Wxr x[t] + bxr + Whr h[t-1] + bhr)          q[t] = Whm h[t-1] + bhm
    z[t] = σ(Wxz x[t] + bxz + Whz h[t-1] + bhz)          m[t] = tanh(Wxm x[t] + bxm + r[t] ⊙ q[t])
    h[t] = (1 - z[t]) ⊙ m[t] + z[t] ⊙ h[t-1]             y = h

Let dh[t] be the whole gradient of h[t], and da, db, dc, dq those of what σ, σ, tanh are taken of, and of q.
With σ' = σ (1 - σ) and tanh' = 1 - tanh², each is dh times a factor that the forward pass has already settled:

    dc = dh (1 - z) (1 - m²)            through m
    da = dc q r (1 - r)                 through r
    db = dh (h[t-1] - m) z (1 - z)      through z
    dq = dc r

    dh[t-1] = dy[t-1] + dh[t] z[t] + [da db dq] Wh

so the loop multiplies by factors that are computed for all times at once, and by Wh. After it, sums over all
times:

    dx = [da db dc] Wx          dWx = Σ [da db dc] x             dbx = Σ [da db dc]
    dh0 = dh[-1]                dWh = Σ [da db dq] h[t-1]        dbh = Σ [da db dq]

The direct way dh[t] z[t] is what the gates are for: where z is near 1, a gradient passes through a step as it
is, while the Jacobian of a plain recurrence makes it vanish or explode (see rnn.py).

x and the result are kept, and no gate: since y holds every h[t-1], the backward pass has all gates of all times
again by two matrix products. The kernel is for speed, and keeps r, z, m and q.

Sources: Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine
translation", arXiv 1406.1078; r applied to q, after the product, is Nvidia's variant, which torch took over.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from bptools.ops import _through_time as time
from bptools.ops._core import EVERY, Kernel, Op

aten = torch.ops.aten


def gru_gates(x: Tensor, h: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (r, 3h): the input's part of the gates, h (r, h): what enters -> r, z, m, q (r, h)."""
    xr, xz, xm = x.chunk(3, -1)
    hr, hz, q = torch.nn.functional.linear(h, w_hh, b_hh).chunk(3, -1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    return r, z, torch.tanh(xm + r * q), q


def gru_forward(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: tuple[int, ...] | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """x (t, n, i), or (r, i) with batch_sizes, h0 (n, h), w_ih (3h, i), w_hh (3h, h), b_ih, b_hh (3h,)
    -> y (t, n, h) or (r, h); and what the kernel keeps, here nothing. In reverse, time runs from the last to
    the first.
    """
    a = time.project(x, w_ih, b_ih)
    h, steps = h0, []
    for at in time.order_of(x, batch_sizes, reverse):
        h = time.entering(h, h0, time.width(at))
        _, z, m, _ = gru_gates(a[at], h, w_hh, b_hh)
        h = m + z * (h - m)
        steps.append(h)
    return time.as_input(time.join(steps, reverse), x), x.new_empty(0)


def gru_backward(
    dy: Tensor,
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    y: Tensor,
    kept: Tensor,
    batch_sizes: tuple[int, ...] | None,
    reverse: bool,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """dy, y (t, n, h) or (r, h), the rest as in the forward
    -> dx (t, n, i) or (r, i), dh0 (n, h), dw_ih (3h, i), dw_hh (3h, h), db_ih, db_hh (3h,).
    """
    order = time.order_of(x, batch_sizes, reverse)
    entered = time.previous(time.rows_of(y), h0, order)
    r, z, m, q = gru_gates(time.project(x, w_ih, b_ih), entered, w_hh, b_hh)
    through_m = (1 - z) * (1 - m * m)
    through = torch.stack(
        [through_m * q * r * (1 - r), (entered - m) * z * (1 - z), through_m * r], 1
    )  # (r, 3, h)
    rows, handed, initial, all_dh, steps = time.rows_of(dy), None, time.Initial(), [], []
    for at, before in time.backwards(order):
        dh = rows[at] if handed is None else time.add_carry(rows[at], handed)
        da_h = time.side_by_side(dh.unsqueeze(1) * through[at])  # (n, 3h): r, z, q
        all_dh.append(dh)
        steps.append(da_h)
        handed = initial.split(dh * z[at] + da_h @ w_hh, before)
    da_h = time.join(steps, not reverse)
    da = torch.cat([da_h[:, : 2 * z.shape[1]], time.join(all_dh, not reverse) * through_m], 1)
    dx, *parameters = time.sums(da, x, entered, w_ih, dy, needs, da_h)
    return dx, initial.gradient() if "h0" in needs else None, *parameters


# The kernel keeps its gates side by side, (r, 4h): m r z q. So the input's part is of the first three, and the
# hidden state's of the last three.


def _m_first(w: Tensor | None) -> Tensor | None:
    """Weights or a bias (3h, ...) with the rows of m before those of r and z."""
    return None if w is None else w.roll(w.shape[0] // 3, 0)


def _m_last(dw: Tensor | None) -> Tensor | None:
    return None if dw is None else dw.roll(-(dw.shape[0] // 3), 0)


def _kernel_forward(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse):
    size, w = h0.shape[1], w_hh.mT
    rows = time.rows_of(x)
    kept = rows.new_zeros(rows.shape[0], 4 * size)
    time.project(x, _m_first(w_ih), _m_first(b_ih), out=kept[:, : 3 * size])
    if b_hh is not None:
        kept[:, size:] += b_hh
    y, h = rows.new_empty(rows.shape[0], size), h0
    for at in time.order_of(x, batch_sizes, reverse):
        h, now = time.entering(h, h0, time.width(at)), kept[at]
        now[:, size:].addmm_(h, w)
        now[:, size : 3 * size].sigmoid_()
        m, r, z, q = now.chunk(4, 1)
        m.addcmul_(r, q).tanh_()
        h = torch.lerp(m, h, z, out=y[at])
    return time.as_input(y, x), kept


def _kernel_backward(dy, x, h0, w_ih, w_hh, b_ih, b_hh, y, kept, batch_sizes, reverse, needs):
    if is_legacy_batchedtensor(dy):
        return gru_backward(dy, x, h0, w_ih, w_hh, b_ih, b_hh, y, kept, batch_sizes, reverse, needs)
    order, size = time.order_of(x, batch_sizes, reverse), h0.shape[1]
    entered = time.previous(time.rows_of(y), h0, order)
    m, r, z, q = kept.chunk(4, 1)
    da = torch.empty_like(kept)  # first the factors of dh
    through_m, through_r, through_z, through_q = da.chunk(4, 1)
    aten.tanh_backward(1 - z, m, grad_input=through_m)
    aten.sigmoid_backward(through_m * q, r, grad_input=through_r)
    aten.sigmoid_backward(entered - m, z, grad_input=through_z)
    torch.mul(through_m, r, out=through_q)
    dh = time.rows_of(dy).clone(memory_format=torch.contiguous_format)
    dh0, by_gate = torch.zeros_like(h0), da.unflatten(1, (4, size))
    for i in reversed(range(len(order))):
        at = order[i]
        now = dh[at]
        by_gate[at].mul_(now.unsqueeze(1))
        for part, target in time.handed_back(order, i, dh, dh0):
            target.addmm_(da[at, size:][part], w_hh).addcmul_(now[part], z[at][part])
    dx, dw_ih, dw_hh, db_ih, db_hh = time.sums(
        da[:, : 3 * size], x, entered, _m_first(w_ih), dy, needs, da[:, size:]
    )
    return dx, dh0 if "h0" in needs else None, _m_last(dw_ih), dw_hh, _m_last(db_ih), db_hh


gru = Op(
    gru_forward,
    gru_backward,
    outputs="y kept",
    grads="x h0 w_ih w_hh b_ih b_hh",
    kernel=Kernel(_kernel_forward, _kernel_backward, time.kernel_usable),
    autocast={"cuda": "lower"},
)


# The same, keeping nothing but its arguments -----------------------------------------------------------------


def gru_again_forward(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse):
    """As `gru_forward`, y alone."""
    return gru_forward(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse)[0]


def gru_again_backward(dy, x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, needs=EVERY):
    """As `gru_backward`, but y is computed again."""
    y, kept = gru_forward(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse)
    return gru_backward(dy, x, h0, w_ih, w_hh, b_ih, b_hh, y, kept, batch_sizes, reverse, needs)


def _again_kernel_forward(*args):
    return _kernel_forward(*args)[0]


def _again_kernel_backward(dy, x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, needs):
    y, kept = _kernel_forward(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse)
    return _kernel_backward(dy, x, h0, w_ih, w_hh, b_ih, b_hh, y, kept, batch_sizes, reverse, needs)


gru_again = Op(
    gru_again_forward,
    gru_again_backward,
    outputs="y",
    grads="x h0 w_ih w_hh b_ih b_hh",
    kernel=Kernel(_again_kernel_forward, _again_kernel_backward, time.kernel_usable),
    autocast=gru.autocast,
)
