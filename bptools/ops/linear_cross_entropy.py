"""The last layer of a classifier and its cross entropy in one op, which never holds all logits at once.

Index legend: `n` rows of x, `i` its features, `c` classes (C of them), `k` losses of a row (1, but for
K-dimensional losses). Each line holds for every k, which is left out where it says nothing.

    l[n,c] = Σ_i x[n,i] w[c,i] + b[c]               lse[n] = log Σ_c e^l[n,c]               p = e^(l - lse)
    loss[n] = Σ_c q[n,c] (lse[n] - l[n,c])          square[n] = lse[n]²

q is the target as amounts of each class: class weights, label smoothing and ignored rows are in it, see loss.py.
The z-loss ζ Σ square pulls lse to 0, so that logits do not drift; both are averaged alike, but that class weights
do not weigh the squares. Let g and h be the gradients that reach loss and square. As ∂lse/∂l = p,

    dl[n,c] = g[n] (Q[n] p[n,c] - q[n,c]) + 2 h[n] lse[n] p[n,c],           Q[n] = Σ_c q[n,c]
    dx[n,i] = Σ_c dl[n,c] w[c,i]            dw[c,i] = Σ_n dl[n,c] x[n,i]            db[c] = Σ_n dl[n,c]

and where the target is probabilities, they and the class weights learn as in loss.py.

A row of l is needed for that row alone: so rows are taken a chunk at a time, and n × C numbers are never there.
Unless told, a chunk has as many rows as make its l no larger than x, but not so few that products of it are slow.

The formula keeps x, w and b, and computes l a second time in its backward: 4 products of matrices, where keeping
l needs 3. The kernel does with 3 if the losses are summed or averaged. Then every g[n] and h[n] is the one number
dy times what is known in the forward, so dx, dw and db for dy = 1 (`gx`, `gw`, `gb`) are computed while l of the
chunk is there; in the backward they are multiplied by dy, in place if nobody may ask for them again. x, w and b
are kept beside them, which costs nothing where they live on, and the second derivative is right.

Sources: Wijmans et al., "Cut your losses in large-vocabulary language models", arXiv 2411.09009 (not to hold the
logits); Hsu et al., "Liger Kernel", arXiv 2410.10989 (the gradient in the forward); Chowdhery et al., "PaLM",
arXiv 2204.02311 (z-loss).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from bptools.ops._core import EVERY, Kernel, Op, outside_transforms
from bptools.ops._reduction import reduce_rows, row_gradient
from bptools.ops.loss import (
    cross_entropy_backward,
    cross_entropy_forward,
    smooth,
    soft_cross_entropy_backward,
    soft_cross_entropy_forward,
)
from bptools.ops.softmax import softmax_forward

GRADS = ("x", "weight", "bias", "class_weight", "probabilities")


# The formula --------------------------------------------------------------------------------------------------


def linear_cross_entropy_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    probabilities: Tensor | None,
    target: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    rows: int | None,
    argmax: bool,
    ahead: str,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """x (n, i), weight (k, C, i), bias (k, C), class_weight (C,) -> y (n, k) or (), best (n, k), gx, gw, gb.

    What is wanted is class indices, target (n, k), or probabilities (n, k, C); the other is None. `rows` of x are
    taken at a time, or as many as is thought best. With `argmax`, best is the class of the largest logit. gx, gw
    and gb are the kernel's, of those of x, weight and bias that `ahead` names. What is not computed is empty. y is
    in `dtype`.
    """
    losses, squares, best = [], [], []
    for here in _chunks(x, weight, rows):
        logits = _logits(x[here], weight, bias)  # (r k, C)
        if probabilities is None:
            t = target[here].reshape(-1)
            loss = cross_entropy_forward(logits, t, class_weight, ignore_index, label_smoothing, "none")
        else:
            q = probabilities[here].reshape(logits.shape)
            loss = soft_cross_entropy_forward(logits, q, class_weight, label_smoothing, "none")
        losses.append(loss)
        squares.append(logits.logsumexp(1) ** 2)
        if argmax:
            best.append(logits.argmax(1))
    shape = x.shape[0], weight.shape[0]
    squares = torch.cat(squares).reshape(shape)
    y = _reduced(torch.cat(losses).reshape(shape), squares, class_weight, target, ignore_index, z_loss, reduction)
    best = torch.cat(best).reshape(shape) if argmax else y.new_empty(0)
    return y, best, y.new_empty(0), y.new_empty(0), y.new_empty(0)


def linear_cross_entropy_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    probabilities: Tensor | None,
    target: Tensor | None,
    gx: Tensor | None,
    gw: Tensor | None,
    gb: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    rows: int | None,
    ahead: str,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """dy (n, k) or (), others as in the forward -> dx, dw, db, dclass_weight, dprobabilities, as their inputs."""
    g, h = _row_gradients(dy, x, weight, class_weight, target, ignore_index, z_loss, reduction)
    w = _rows(weight)
    dx, dq, dw, db, dclass = [], [], 0, 0, 0
    for here in _chunks(x, weight, rows):
        logits = _logits(x[here], weight, bias)  # (r k, C)
        row = g[here].reshape(-1)
        if probabilities is None:
            t = target[here].reshape(-1)
            dl, _ = cross_entropy_backward(row, logits, t, class_weight, ignore_index, label_smoothing, "none")
        else:
            q = probabilities[here].reshape(logits.shape)
            dl, dq_here, dclass_here = soft_cross_entropy_backward(
                row, logits, q, class_weight, label_smoothing, "none"
            )
            dq.append(dq_here)
            dclass = dclass + dclass_here
        if z_loss:
            pull = 2 * h[here].reshape(-1) * logits.logsumexp(1)
            dl = dl + pull.unsqueeze(1) * softmax_forward(logits, 1)
        dl = dl.reshape(x[here].shape[0], w.shape[0])  # (r, k C)
        if "x" in needs:
            dx.append(dl @ w)
        if "weight" in needs:
            dw = dw + dl.mT @ x[here]
        if "bias" in needs:
            db = db + dl.sum(0)
    return (
        torch.cat(dx) if "x" in needs else None,
        dw.reshape(weight.shape) if "weight" in needs else None,
        db.reshape(weight.shape[:2]) if "bias" in needs else None,
        dclass if "class_weight" in needs and probabilities is not None else None,
        torch.cat(dq).reshape(probabilities.shape) if dq and "probabilities" in needs else None,
    )


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (r, i), weight (k, C, i), bias (k, C) -> l (r k, C)."""
    logits = x @ _rows(weight).mT
    if bias is not None:
        logits = logits + bias.reshape(-1)
    return logits.reshape(x.shape[0] * weight.shape[0], weight.shape[1])


def _rows(weight: Tensor) -> Tensor:
    """(k, C, i) -> (k C, i)."""
    return weight.reshape(weight.shape[0] * weight.shape[1], weight.shape[2])


def _chunks(x: Tensor, weight: Tensor, rows: int | None) -> Iterator[slice]:
    if torch.compiler.is_compiling():  # the number of rows may be a symbol, and that of the chunks may not
        return iter((slice(None),))
    rows = rows or _rows_of_a_chunk(x, weight)
    return (slice(start, start + rows) for start in range(0, max(x.shape[0], 1), rows))


def _rows_of_a_chunk(x: Tensor, weight: Tensor) -> int:
    k, classes = weight.shape[:2]
    return max(1, x.numel() // (64 * classes * max(k, 1))) * 64


def _kept(like: Tensor, target: Tensor | None, ignore_index: int) -> Tensor:
    """Which losses count: like (n, k) -> (n, k)."""
    return torch.ones_like(like, dtype=torch.bool) if target is None else target != ignore_index


def _totals(kept: Tensor, class_weight: Tensor | None, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """By what the mean divides losses and squares."""
    count = kept.sum()
    if class_weight is None or target is None:
        return count, count
    t = torch.where(kept, target, 0)
    weights = class_weight.index_select(0, t.reshape(-1)).reshape(t.shape)
    return torch.where(kept, weights, 0).sum(), count


def _reduced(losses, squares, class_weight, target, ignore_index, z_loss, reduction) -> Tensor:
    """losses and squares (n, k) -> y (n, k) or ()."""
    kept = _kept(losses, target, ignore_index)
    total, count = _totals(kept, class_weight, target)
    y = reduce_rows(losses, reduction, total)
    return y + z_loss * reduce_rows(torch.where(kept, squares, 0), reduction, count) if z_loss else y


def _row_gradients(dy, x, weight, class_weight, target, ignore_index, z_loss, reduction) -> tuple[Tensor, Tensor]:
    """dy (n, k) or () -> g and h (n, k)."""
    shape = x.shape[0], weight.shape[0]
    kept = _kept(dy.expand(shape), target, ignore_index)
    total, count = _totals(kept, class_weight, target)
    g, h = row_gradient(dy, reduction, total), z_loss * row_gradient(dy, reduction, count)
    return torch.where(kept, g, 0), torch.where(kept, h, 0)


# The kernel ---------------------------------------------------------------------------------------------------


def _sweep(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    probabilities: Tensor | None,
    target: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    rows: int | None,
    argmax: bool,
    g: Tensor | None,
    h: Tensor | None,
    wanted: str,
) -> list[Tensor]:
    """One pass over the chunks, with one buffer for their logits: losses, squares and best (n, k), and gradients.

    g and h (n, k) are the gradients of losses and squares, for the gradients of the inputs that `wanted` names.
    What is not wanted is empty.
    """
    needs = wanted.split()
    n = x.shape[0]
    k, classes = weight.shape[:2]
    dtype = torch.promote_types(x.dtype, torch.float32)
    w = _rows(weight)
    if x.dtype is torch.float16 or not x.is_cuda:  # float16 has no room for g, and a CPU is at home in float32
        x, w = x.to(dtype), w.to(dtype)
    cw = x.new_ones(classes, dtype=dtype) if class_weight is None else class_weight.to(dtype)
    even = label_smoothing / classes
    if target is not None:
        kept = target != ignore_index
        t = torch.where(kept, target, 0)
        hit = (1 - label_smoothing) * cw.index_select(0, t.flatten()).view(n, k)  # IndexError for what is no class

    losses, squares, best, *grads = _results(x, weight, argmax, needs)
    found = dict(zip(GRADS, grads, strict=True))
    rows = min(rows or _rows_of_a_chunk(x, weight), n)
    buffer = x.new_empty((rows, k * classes), dtype=dtype)
    for start in range(0, n, rows or 1):
        here = slice(start, start + rows)
        wide = _product(x[here], w.mT, buffer[: n - start])  # (r, k C)
        if bias is not None:
            wide += bias.flatten()
        r = wide.shape[0]
        logits = wide.view(r * k, classes)
        top = logits.amax(1)
        if argmax:
            best[here] = logits.argmax(1).view(r, k)

        if target is not None:
            hits, at = hit[here].flatten(), t[here].reshape(-1, 1)
            total = hits + even * cw.sum()  # Q
            loss = hits * (top - logits.gather(1, at).squeeze(1))  # Σ q (top - l)
            if even:
                loss += even * (cw.sum() * top - logits @ cw)
        else:
            amounts = smooth(probabilities[here].reshape(logits.shape).to(dtype), label_smoothing, 1)
            q = cw * amounts
            total = q.sum(1)
            loss = total * top - torch.linalg.vecdot(q, logits)
        below = top.unsqueeze(1) - logits if "class_weight" in needs or "probabilities" in needs else None

        # The softmax of ATen is several times as fast as exp; its largest number is 1 / Σ e^(l - top).
        logits = torch.softmax(logits, 1, out=logits if x.device.type == "cpu" else None)
        log_z = -logits.amax(1).log()
        lse = top + log_z
        losses[here] = (loss + total * log_z).view(r, k)
        squares[here] = (lse * lse).view(r, k)
        if not needs:
            continue

        row = g[here].flatten()
        if below is not None:
            surprise = (below + log_z.unsqueeze(1)) * row.unsqueeze(1)
            if "class_weight" in needs:
                found["class_weight"] += (surprise * amounts).sum(0)
            if "probabilities" in needs:
                found["probabilities"][here] = ((1 - label_smoothing) * cw * surprise).view(r, k, classes)
        logits *= (row * total + 2 * h[here].flatten() * lse).unsqueeze(1)
        if target is not None:
            logits.scatter_add_(1, at, -(row * hits).unsqueeze(1))
            if even:
                logits.addcmul_(row.unsqueeze(1), cw, value=-even)
        else:
            logits.addcmul_(row.unsqueeze(1), q, value=-1)
        dl = logits.view(wide.shape)
        if "bias" in needs:
            found["bias"] += dl.sum(0).view(k, classes)
        dl = dl.to(x.dtype)
        if "x" in needs:
            _product(dl, w, found["x"][here])
        if "weight" in needs:
            _add_product(dl.mT, x[here], _rows(found["weight"]))

    if target is not None:
        losses.masked_fill_(~kept, 0)
    return [losses, squares, best, *grads]


def _results(x: Tensor, weight: Tensor, argmax: bool, needs: Collection[str]) -> list[Tensor]:
    """Room for what `_sweep` returns; gradients are sums, and start at 0."""
    (n, _), (k, classes, _) = x.shape, weight.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    shapes = x.shape, weight.shape, (k, classes), (classes,), (n, k, classes)
    return [
        x.new_empty((n, k), dtype=dtype),
        x.new_empty((n, k), dtype=dtype),
        x.new_empty((n, k) if argmax else 0, dtype=torch.int64),
        *(x.new_zeros(s if name in needs else 0, dtype=dtype) for name, s in zip(GRADS, shapes, strict=True)),
    ]


# What torch.compile sees: one operation, or it would unroll the loop, or hold all the logits.
_opaque_sweep = torch.library.custom_op(
    "bptools::linear_cross_entropy_sweep",
    _sweep,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? class_weight, Tensor? probabilities, Tensor? target, "
    "int ignore_index, float label_smoothing, int? rows, bool argmax, Tensor? g, Tensor? h, str wanted)"
    " -> Tensor[]",
)


@_opaque_sweep.register_fake
def _opaque_results(x, weight, *args):
    *_, argmax, _, _, wanted = args
    return _results(x, weight, argmax, wanted.split())


def _swept(*args) -> list[Tensor]:
    return _opaque_sweep(*args) if torch.compiler.is_compiling() else _sweep(*args)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """The product of two matrices, accumulated in the dtype of out."""
    if a.dtype is out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(a: Tensor, b: Tensor, to: Tensor) -> None:
    if a.dtype is to.dtype:
        to.addmm_(a, b)
    else:
        to += torch.mm(a, b, out_dtype=to.dtype)


def _kernel_usable(x, weight, bias, class_weight, probabilities, *constants) -> bool:
    if not outside_transforms():  # what is written in place may lack a batch dimension
        return False
    return probabilities is None or probabilities.dtype is x.dtype


def _kernel_forward(
    x,
    weight,
    bias,
    class_weight,
    probabilities,
    target,
    ignore_index,
    label_smoothing,
    z_loss,
    reduction,
    rows,
    argmax,
    ahead,
    dtype,
):
    args = x, weight, bias, class_weight, probabilities, target, ignore_index, label_smoothing
    g = h = None
    if ahead:
        one = x.new_ones((), dtype=torch.promote_types(x.dtype, torch.float32))
        g, h = _row_gradients(one, x, weight, class_weight, target, ignore_index, z_loss, reduction)
    losses, squares, best, gx, gw, gb, *_ = _swept(*args, rows, argmax, g, h, ahead)
    y = _reduced(losses, squares, class_weight, target, ignore_index, z_loss, reduction).to(dtype)
    return y, best, gx, gw, gb


def _kernel_backward(
    dy,
    x,
    weight,
    bias,
    class_weight,
    probabilities,
    target,
    gx,
    gw,
    gb,
    ignore_index,
    label_smoothing,
    z_loss,
    reduction,
    rows,
    ahead,
    needs,
):
    compiling = torch.compiler.is_compiling()
    batched = not compiling and (is_legacy_batchedtensor(dy) or not outside_transforms())
    if ahead:
        # Without retain_graph they are freed when this is over: so they may become the gradients.
        again = compiling or batched or torch._C._autograd._get_current_graph_task_keep_graph()
        ready = (gx if "x" in needs else None, gw if "weight" in needs else None, gb if "bias" in needs else None)
        return *(t if t is None else t * dy if again else t.mul_(dy) for t in ready), None, None
    args = x, weight, bias, class_weight, probabilities, target, ignore_index, label_smoothing, z_loss
    if batched:
        ready = gx, gw, gb
        return linear_cross_entropy_backward(dy, *args[:6], *ready, *args[6:], reduction, rows, ahead, needs)
    g, h = _row_gradients(dy, x, weight, class_weight, target, ignore_index, z_loss, reduction)
    wanted = " ".join(name for name in GRADS if name in needs)
    _, _, _, *found = _swept(*args[:-1], rows, False, g, h, wanted)
    return tuple(d if name in needs else None for name, d in zip(GRADS, found, strict=True))


linear_cross_entropy = Op(
    linear_cross_entropy_forward,
    linear_cross_entropy_backward,
    outputs="y best gx gw gb",
    grads=" ".join(GRADS),
    keep_for={"gx": "x", "gw": "weight", "gb": "bias"},
    kernel=Kernel(_kernel_forward, _kernel_backward, _kernel_usable),
    trace="kernel",
    mixed=True,  # class weights and probabilities are not cast under autocast; the function casts what is
    result="dtype",
)
