"""Long short-term memory, one layer in one direction, and backpropagation through time.

Index legend: `t` time, `n` samples, `i` input features, `h` features of the cell, `p` features of the hidden
state: those of the cell, or fewer with a projection. Gates: i input, f forget, g new content, o output; the
rows of the weights and biases are theirs, in this order. ⊙ is elementwise.

    [a_i a_f a_g a_o][t] = Wx x[t] + bx + Wh h[t-1] + bh
    i, f, o = σ(a_i), σ(a_f), σ(a_o)          g = tanh(a_g)
    c[t] = f[t] ⊙ c[t-1] + i[t] ⊙ g[t]        m[t] = o[t] ⊙ tanh(c[t])          h[t] = Wr m[t], or m[t];    y = h

Let dh[t] and dc[t] be the whole gradients of h[t] and c[t]: from outside and through the next step. From the last
time to the first, with dm = dh Wr, or dh,

    dh[t] = dy[t] + da[t+1] Wh                                dc[t] = dc[t+1] f[t+1] + dm[t] o (1 - tanh² c)
    da_i = dc g i (1 - i)      da_f = dc c[t-1] f (1 - f)     da_g = dc i (1 - g²)      da_o = dm tanh(c) o (1 - o)

where dc begins with dcn, the gradient of a sample's last cell. What multiplies dc and dm has been settled by
the forward pass, so the loop multiplies by factors that are computed for all times at once, and by Wh. After
it,

    dx = da Wx       dWx = Σ_t,n da x       dWh = Σ_t,n da h[t-1]       dbx = dbh = Σ_t,n da       dWr = Σ_t,n dh m
    dh0 = da[0] Wh   dc0 = dc[0] f[0]

Through k steps dc is multiplied by k forget gates and by no matrix: near 1 they carry a gradient over many steps,
where the Jacobians of a plain recurrence make it vanish or explode (see rnn.py).

x and the result are kept, and neither gates nor cells: since y holds every h[t-1], the backward pass has all
gates of all times again by two matrix products, and the cells by adding up. The kernels are for speed. They
keep gates and cells, or what oneDNN keeps.

Sources: Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers, Schmidhuber and Cummins, "Learning to
forget", 2000; Sak, Senior and Beaufays, arXiv 1402.1128 (the projection); Graves and Schmidhuber, "Framewise
phoneme classification with bidirectional LSTM", 2005 (the whole gradient).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from bptools.ops import _through_time as time
from bptools.ops._core import EVERY, Kernel, Op

aten = torch.ops.aten


def lstm_gates(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a (r, 4h) -> i, f, g, o (r, h)."""
    i, f, g, o = a.chunk(4, -1)
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)


def lstm_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: tuple[int, ...] | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (t, n, i), or (r, i) with batch_sizes, h0 (n, p), c0 (n, h), w_ih (4h, i), w_hh (4h, p), b_ih, b_hh (4h,),
    w_hr (p, h) -> y (t, n, p) or (r, p); cn (n, h), the last cells; and what a kernel keeps, here nothing. In
    reverse, time runs from the last to the first.
    """
    order = time.order_of(x, batch_sizes, reverse)
    a = time.project(x, w_ih, b_ih, b_hh)
    h, c, steps, cells = h0, c0, [], []
    for at in order:
        h, c = (time.entering(s, s0, time.width(at)) for s, s0 in ((h, h0), (c, c0)))
        i, f, g, o = lstm_gates(a[at] + h @ w_hh.mT)
        c = f * c + i * g
        h = o * torch.tanh(c)
        h = h if w_hr is None else h @ w_hr.mT
        steps.append(h)
        cells.append(c)
    cn = time.final(time.join(cells, reverse), order)
    return time.as_input(time.join(steps, reverse), x), cn, x.new_empty(0)


def lstm_backward(
    dy: Tensor,
    dcn: Tensor,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    y: Tensor,
    cn: Tensor,
    kept: Tensor,
    batch_sizes: tuple[int, ...] | None,
    reverse: bool,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """dy, y (t, n, p) or (r, p), dcn, cn (n, h), the rest as in the forward
    -> dx (t, n, i) or (r, i), dh0 (n, p), dc0 (n, h), dw_ih (4h, i), dw_hh (4h, p), db_ih and db_hh (4h,),
    dw_hr (p, h).
    """
    order = time.order_of(x, batch_sizes, reverse)
    entered = time.previous(time.rows_of(y), h0, order)
    i, f, g, o = lstm_gates(time.project(x, w_ih, b_ih, b_hh) + entered @ w_hh.mT)
    c, cells = c0, []
    for at in order:
        c = f[at] * time.entering(c, c0, time.width(at)) + i[at] * g[at]
        cells.append(c)
    cells = time.join(cells, reverse)
    tanh_c = torch.tanh(cells)
    into_c = o * (1 - tanh_c * tanh_c)
    through_c = torch.stack([g * i * (1 - i), time.previous(cells, c0, order) * f * (1 - f), i * (1 - g * g)], 1)
    through_o = tanh_c * o * (1 - o)

    rows, handed, handed_c = time.rows_of(dy), None, dcn[:0]
    first, first_c, steps, all_dh = time.Initial(), time.Initial(), [], []
    for at, before in time.backwards(order):
        dh = rows[at] if handed is None else time.add_carry(rows[at], handed)
        dm = dh if w_hr is None else dh @ w_hr
        dc = time.widen(handed_c, dcn[: time.width(at)]) + dm * into_c[at]
        through_gates = time.side_by_side(dc.unsqueeze(1) * through_c[at]), dm * through_o[at]
        da = torch.cat(through_gates, 1)  # (n, 4h)
        steps.append(da)
        all_dh.append(dh)
        handed = first.split(da @ w_hh, before)
        handed_c = first_c.split(dc * f[at], before)
    da = time.join(steps, not reverse)
    dx, *parameters = time.sums(da, x, entered, w_ih, dy, needs)
    dw_hr = None
    if "w_hr" in needs and w_hr is not None:
        dw_hr = time.join(all_dh, not reverse).mT @ (o * tanh_c)
    return dx, *time.wanted(needs, h0=first.gradient(), c0=first_c.gradient()), *parameters, dw_hr


def _onednn(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse) -> bool:
    """Whether torch would hand this to oneDNN, which computes a whole layer: float32 on the CPU, equal lengths."""
    return (
        x.device.type == "cpu"
        and x.dtype is torch.float32
        and batch_sizes is None
        and w_hr is None
        and (b_ih is None) == (b_hh is None)
        and x.shape[0] > 1  # one step is a cell
        and x.numel() > 0
        and torch._C._get_mkldnn_enabled()
        and torch.backends.mkldnn.is_available()
    )


def _onednn_constants(h0: Tensor, b_ih: Tensor | None, reverse: bool) -> dict[str, object]:
    lstm = 2  # its number for this recurrence
    return {
        "reverse": reverse,
        "mode": lstm,
        "hidden_size": h0.shape[1],
        "num_layers": 1,
        "has_biases": b_ih is not None,
        "bidirectional": False,
        "batch_first": False,
        "train": True,
        "batch_sizes": (),
    }


def _onednn_tensors(x, h0, c0, w_ih, w_hh, b_ih, b_hh) -> list[Tensor]:
    biases = (w_ih, w_hh) if b_ih is None else (b_ih, b_hh)  # it wants some, even if has_biases is False
    return [t.detach().contiguous() for t in (x, w_ih, w_hh, *biases, h0, c0)]


def _onednn_forward(x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse, keep):
    tensors = _onednn_tensors(x, h0, c0, w_ih, w_hh, b_ih, b_hh)
    with torch.set_grad_enabled(keep):  # which tells it whether to keep anything for the backward pass
        y, _, cn, kept = aten.mkldnn_rnn_layer(*tensors, **_onednn_constants(h0, b_ih, reverse))
    return y, cn, kept


def _onednn_backward(dy, dcn, x, h0, c0, w_ih, w_hh, b_ih, b_hh, y, cn, kept, reverse, needs):
    tensors = _onednn_tensors(x, h0, c0, w_ih, w_hh, b_ih, b_hh)
    results, gradients = (y, y[0] if reverse else y[-1], cn), (dy, None, dcn)
    dx, dw_ih, dw_hh, db_ih, db_hh, dh0, dc0 = aten.mkldnn_rnn_layer_backward(
        *tensors, *results, *gradients, workspace=kept, **_onednn_constants(h0, b_ih, reverse)
    )
    learns = needs if b_ih is not None else needs - {"b_ih", "b_hh"}
    grads = {"h0": dh0, "c0": dc0, "w_ih": dw_ih, "w_hh": dw_hh, "b_ih": db_ih, "b_hh": db_hh, "w_hr": None}
    return time.wanted(learns, x=dx, **grads)


def _kernel_forward(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse, keep=True):
    if _onednn(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse):
        return _onednn_forward(x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse, keep)
    order, size, w = time.order_of(x, batch_sizes, reverse), c0.shape[1], w_hh.mT
    rows = time.rows_of(x)
    kept = rows.new_empty(rows.shape[0], 5 * size)  # i f g o and c, side by side
    gates, cells = kept[:, : 4 * size], kept[:, 4 * size :]
    time.project(x, w_ih, b_ih, b_hh, out=gates)
    y = rows.new_empty(rows.shape[0], h0.shape[1])
    h, c = h0, c0
    for at in order:
        h, c = (time.entering(s, s0, time.width(at)) for s, s0 in ((h, h0), (c, c0)))
        now = gates[at].addmm_(h, w)
        now[:, : 2 * size].sigmoid_()
        i, f, g, o = now.chunk(4, 1)
        torch.mul(f, c, out=cells[at]).addcmul_(i, g.tanh_())
        c, o = cells[at], o.sigmoid_()
        if w_hr is None:
            h = torch.tanh(c, out=y[at]).mul_(o)
        else:
            h = torch.mm(torch.tanh(c).mul_(o), w_hr.mT, out=y[at])
    return time.as_input(y, x), time.final(cells, order).clone(), kept


def _kernel_backward(dy, dcn, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, y, cn, kept, batch_sizes, reverse, needs):
    if is_legacy_batchedtensor(dy) or is_legacy_batchedtensor(dcn):
        return lstm_backward(
            dy, dcn, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, y, cn, kept, batch_sizes, reverse, needs
        )
    if kept.dtype is torch.uint8:
        return _onednn_backward(dy, dcn, x, h0, c0, w_ih, w_hh, b_ih, b_hh, y, cn, kept, reverse, needs)
    order, size = time.order_of(x, batch_sizes, reverse), c0.shape[1]
    gates, cells = kept[:, : 4 * size], kept[:, 4 * size :]
    i, f, g, o = gates.chunk(4, 1)
    tanh_c = torch.tanh(cells)
    into_c = aten.tanh_backward(o, tanh_c)
    da = kept.new_empty(gates.shape)  # first the factors of dc, thrice, and of dm
    through_i, through_f, through_g, through_o = da.chunk(4, 1)
    aten.sigmoid_backward(g, i, grad_input=through_i)
    aten.sigmoid_backward(time.previous(cells, c0, order), f, grad_input=through_f)
    aten.tanh_backward(i, g, grad_input=through_g)
    aten.sigmoid_backward(tanh_c, o, grad_input=through_o)
    by_gate = da.unflatten(1, (4, size))

    dh = time.rows_of(dy).clone(memory_format=torch.contiguous_format)
    dc = torch.zeros_like(cells)
    for ended, those in time.last_rows(order):
        dc[ended] = dcn[those]
    dh0, dc0 = torch.zeros_like(h0), torch.zeros_like(c0)
    for j in reversed(range(len(order))):
        at = order[j]
        dm = dh[at] if w_hr is None else dh[at] @ w_hr
        now = dc[at].addcmul_(dm, into_c[at])
        by_gate[at, :3].mul_(now.unsqueeze(1))
        by_gate[at, 3].mul_(dm)
        for part, target in time.handed_back(order, j, dh, dh0):
            target.addmm_(da[at][part], w_hh)
        for part, target in time.handed_back(order, j, dc, dc0):
            target.addcmul_(now[part], f[at][part])
    entered = time.previous(time.rows_of(y), h0, order) if "w_hh" in needs else None
    dx, *parameters = time.sums(da, x, entered, w_ih, dy, needs)
    dw_hr = dh.mT @ tanh_c.mul_(o) if "w_hr" in needs and w_hr is not None else None
    return dx, *time.wanted(needs, h0=dh0, c0=dc0), *parameters, dw_hr


_GRADS = "x h0 c0 w_ih w_hh b_ih b_hh w_hr"
_KERNEL = Kernel(_kernel_forward, _kernel_backward, time.kernel_usable)
_LOWER, _WIDE = {"cpu": "lower", "cuda": "lower"}, {"cuda": "lower"}

lstm = Op(lstm_forward, lstm_backward, outputs="y cn kept", grads=_GRADS, kernel=_KERNEL, autocast=_LOWER)
# Under autocast on the CPU, torch lowers what oneDNN computes, and leaves packed sequences and cells in float32.
wide_lstm = Op(lstm_forward, lstm_backward, outputs="y cn kept", grads=_GRADS, kernel=_KERNEL, autocast=_WIDE)


# The same, keeping nothing but its arguments -----------------------------------------------------------------


def lstm_again_forward(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse):
    """As `lstm_forward`, y and cn."""
    return lstm_forward(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse)[:2]


def lstm_again_backward(dy, dcn, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse, needs=EVERY):
    """As `lstm_backward`, but y is computed again."""
    arguments = x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr
    results = lstm_forward(*arguments, batch_sizes, reverse)
    return lstm_backward(dy, dcn, *arguments, *results, batch_sizes, reverse, needs)


def _again_kernel_forward(*args):
    return _kernel_forward(*args, keep=False)[:2]


def _again_kernel_backward(dy, dcn, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse, needs):
    arguments = x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr
    results = _kernel_forward(*arguments, batch_sizes, reverse)
    return _kernel_backward(dy, dcn, *arguments, *results, batch_sizes, reverse, needs)


_AGAIN = Kernel(_again_kernel_forward, _again_kernel_backward, time.kernel_usable)

lstm_again = Op(
    lstm_again_forward, lstm_again_backward, outputs="y cn", grads=_GRADS, kernel=_AGAIN, autocast=_LOWER
)
wide_lstm_again = Op(
    lstm_again_forward, lstm_again_backward, outputs="y cn", grads=_GRADS, kernel=_AGAIN, autocast=_WIDE
)
