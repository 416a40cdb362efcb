"""What a check does to tensors, in plain torch: small functions that reproducing scripts carry along as they are.

`call(*inputs)` is the audited function with everything but its differentiable inputs filled in; `dys` are the
output gradients, one for each output that requires a gradient, in order.
"""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_leaves

# Calling ------------------------------------------------------------------------------------------------------


def tensors_in(result):
    """The tensors of a result, nested or not, in order."""
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def run(call, inputs, seed=0):
    """The outputs of a call, drawn from the same random state each time."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed queues work for a CUDA that may never be used
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    return tensors_in(call(*inputs))


def pull(outputs, inputs, dys, *, copies=True, **options):
    """The gradients of those inputs that require one; zeros where there is none.

    The output gradients are handed over as copies, in case the backward writes to them.
    """
    outputs = [y for y in outputs if y.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    dys = [exact_copy(dy) if copies and not dy.requires_grad else dy for dy in dys]
    return list(torch.autograd.grad(outputs, wanted, dys, materialize_grads=True, **options))


def grads(call, inputs, dys, **options):
    """The gradients of a fresh call."""
    return pull(run(call, inputs), inputs, dys, **options)


def leaf(x, grad=True):
    """The same numbers in the same memory layout, as a new leaf."""
    return exact_copy(x.detach()).requires_grad_(grad)


def exact_copy(t):
    """A copy with the strides and the offset of the original, expanded dimensions and gaps included."""
    if t.numel() == 0 or t.layout is not torch.strided or (t.is_contiguous() and t.storage_offset() == 0):
        return t.clone()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    before = t.storage_offset()
    span = torch.as_strided(t, (before + last + 1,), (1,), 0).clone()
    return torch.as_strided(span, t.shape, t.stride(), before)


# Memory layouts, same numbers ---------------------------------------------------------------------------------


def contiguous(t):
    """The numbers laid out in full."""
    return t.detach().clone(memory_format=torch.contiguous_format)


def padded(t):
    """Every second element of a buffer that is NaN elsewhere."""
    filler = torch.nan if t.is_floating_point() or t.is_complex() else 0
    buffer = torch.full((*t.shape, 2), filler, dtype=t.dtype, device=t.device)
    buffer[..., 0] = t.detach()
    return buffer[..., 0]


def offset(t):
    """Contiguous, but not at the beginning of its storage, which is NaN elsewhere."""
    filler = torch.nan if t.is_floating_point() or t.is_complex() else 0
    buffer = torch.full((t.numel() + 6,), filler, dtype=t.dtype, device=t.device)
    buffer[3 : 3 + t.numel()] = t.detach().reshape(-1)
    return buffer[3 : 3 + t.numel()].view(t.shape)


def transposed(t):
    """The dimensions stored in reverse order."""
    axes = tuple(reversed(range(t.dim())))
    return t.detach().permute(axes).clone(memory_format=torch.contiguous_format).permute(axes)


def first_row_everywhere(t):
    """The first row, expanded: stride 0."""
    return t.detach()[:1].expand(t.shape) if t.dim() and len(t) else t.detach()


def one_number_everywhere(t):
    """The first element, expanded to the whole shape: every stride 0, as `y.sum().backward()` gives it."""
    return t.detach().reshape(-1)[0].expand(t.shape) if t.numel() else t.detach()


# Looking inside -----------------------------------------------------------------------------------------------


def function_nodes(outputs):
    """The nodes of custom Functions in the graph behind these outputs."""
    found, queue = {}, [y.grad_fn for y in outputs if y.grad_fn is not None]
    while queue:
        node = queue.pop()
        if node is not None and node not in found:
            found[node] = None
            queue.extend(following for following, _ in node.next_functions)
    return [node for node in found if isinstance(node, torch.autograd.function.BackwardCFunction)]


def raw_gradients(call, inputs, dys):
    """What each custom Function's backward really returned, before autograd repairs it.

    A list of (name of the Function, slots); a slot, one for each argument of its forward, is (needed, gradient,
    like): `like` is the (shape, dtype, device, whether contiguous) of a needed input, else None.
    """
    outputs = run(call, inputs)
    nodes = {id(node): node for node in function_nodes(outputs)}
    classes = {type(node)._forward_cls for node in nodes.values()}
    records, replaced = [], []

    def spy(original):
        def backward(ctx, *dys):
            found = original(ctx, *dys)
            slots = found if isinstance(found, tuple) else (found,)
            wanted = [edge for edge in ctx.next_functions if edge[0] is not None]
            needs = ctx.needs_input_grad
            if id(ctx) in nodes and len(slots) == len(needs) and len(wanted) == sum(needs):
                likes = [metadata(wanted.pop(0)) if needed else None for needed in needs]
                name = type(ctx)._forward_cls.__name__
                records.append((name, list(zip(needs, slots, likes, strict=True))))
            return found

        return backward

    for cls in classes:
        replaced.append((cls, cls.__dict__.get("backward")))
        cls.backward = staticmethod(spy(cls.backward))
    try:
        pull(outputs, inputs, dys)
    finally:
        for cls, own in replaced:
            if own is None:
                del cls.backward
            else:
                cls.backward = own
    return records


def metadata(edge):
    """The (shape, dtype, device, whether contiguous) of the tensor that an edge of the graph leads to."""
    node, number = edge
    if hasattr(node, "variable"):
        x = node.variable
        return tuple(x.shape), x.dtype, x.device, x.is_contiguous()
    meta = node._input_metadata[number]
    return tuple(meta.shape), meta.dtype, meta.device, None


def kept_on_ctx(outputs):
    """The tensors that custom Functions keep as attributes of ctx: (Function, attribute, tensor)."""
    found = []
    for node in function_nodes(outputs):
        for name, value in vars(node).items():
            found += [(type(node)._forward_cls.__name__, name, t) for t in tensors_in(value)]
    return found


def memory(t):
    """Which memory a tensor looks at."""
    return t.untyped_storage().data_ptr() if t.numel() else None


class Swallow(torch.autograd.Function):
    """Takes a tensor and gives it no gradient, so that what made it receives an undefined one."""

    @staticmethod
    def forward(x):
        return x.new_zeros(())

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dy):
        return None


# Derivatives --------------------------------------------------------------------------------------------------


def loss_at(call, inputs, dys, which, k, index):
    """The function t -> ⟨dys, outputs⟩ where t is added to one element of input k."""

    def loss(t):
        moved = [x.detach().clone() for x in inputs]
        moved[k][index] += t
        outputs = run(call, moved)
        return sum(
            (dy.conj() * outputs[i]).real.sum() if dy.is_complex() else (dy * outputs[i]).sum()
            for dy, i in zip(dys, which, strict=True)
        )

    return loss


def slope(f, h):
    """The derivative at 0 of a function of one number: a central difference, extrapolated (Richardson)."""
    wide, narrow = ((f(s) - f(-s)) / (2 * s) for s in (h, h / 2))
    return (4 * narrow - wide) / 3
