"""Which operations are cheap enough to be done again in the backward pass, and how that is done exactly.

Cheap is what reads and writes each element a few times: elementwise work, casts, copies, softmax, norms, pooling.
It is done again by the very same ATen kernel on the very same numbers, so the bits are the same. What is not
listed is not done again: matrix products, convolutions, attention, sorts, reductions (whose results are small),
and whatever draws random numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from ._contents import Recipe

aten = torch.ops.aten


def _packets(names: str) -> frozenset[Any]:
    return frozenset(getattr(aten, name) for name in names.split() if hasattr(aten, name))


# Beside all that ATen tags as pointwise.
CHEAP = _packets("""
    _to_copy clone cat stack constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d roll flip repeat tril triu masked_fill where index index_select gather
    embedding select_scatter slice_scatter pixel_shuffle pixel_unshuffle channel_shuffle im2col glu hardswish
    _prelu_kernel _softmax _safe_softmax _log_softmax native_layer_norm native_group_norm _fused_rms_norm
    avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d
    copy_ fill_ zero_ masked_fill_ hardswish_
""")
# Not what allocates, `zeros` and the like: kernels that torch does not see write to what they return.
MATMULS = _packets("""
    mm addmm bmm baddbmm addmv mv dot convolution _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
""")
# Autograd saves their noise before they fill it in: what is saved is what will be there.
FILL_WHAT_IS_SAVED = _packets("rrelu_with_noise rrelu_with_noise_")
BATCH_NORMS = {aten.native_batch_norm, aten.cudnn_batch_norm, aten.miopen_batch_norm}


@dataclass(frozen=True)
class Kind:
    """What the recorder has to know of an ATen operation."""

    cheap: bool  # its first result can be given back
    view: bool  # it makes no storage
    matmul: bool
    writes: tuple[int | str, ...]  # positions or names of the arguments that it writes to
    special: bool  # running it again would not do


@functools.cache
def kind(op: OpOverload) -> Kind:
    """Return what kind of operation this is."""
    schema = op._schema
    written = [
        (i, a) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    ]
    random = torch.Tag.nondeterministic_seeded in op.tags
    pointwise = torch.Tag.pointwise in op.tags
    packet = op.overloadpacket
    # Of what it writes to, only a first argument can be made again.
    simple = not written or (
        len(written) == 1 and written[0][0] == 0 and isinstance(written[0][1].type, torch.TensorType)
    )
    listed = "_foreach" in op._opname
    cheap = not random and (pointwise or packet in CHEAP) and simple and not listed
    return Kind(
        cheap=cheap,
        view=not written and any(r.alias_info is not None for r in schema.returns),
        matmul=packet in MATMULS,
        writes=tuple(
            a.name if a.kwarg_only else i for i, a in written if i == 0 or packet not in FILL_WHAT_IS_SAVED
        ),
        special=packet in SPECIAL,
    )


def hidden_writes(op: OpOverload, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return what an operation writes to although its schema does not say so."""
    if op.overloadpacket in BATCH_NORMS and args[5]:
        return tuple(t for t in args[3:5] if t is not None)
    return ()


# Those that would not give the same, or not as cheaply, if they were just run again ----------------------------
#
# Each takes the operation, its arguments and its results, and returns the ways to have the first result again: a
# function and its arguments, the cheapest first.

Way = tuple[Callable[..., Any], tuple[Any, ...]]


def _batch_norm(op: OpOverload, args: tuple[Any, ...], results: Sequence[Tensor]) -> list[Way]:
    """Batch norm again, without touching the running statistics."""
    x, weight, bias, running_mean, running_var, training, momentum, eps = args[:8]
    if training:
        again = functools.partial(_batch_norm_again, op, momentum=momentum, eps=eps)
        return [(_batch_norm_from_statistics, (x, weight, bias, *results[1:3])), (again, (x, weight, bias))]
    # The running statistics may be written to before the backward pass, and no version counts that.
    mean, var = running_mean.clone(), running_var.clone()
    return [(functools.partial(_batch_norm_in_evaluation, op, mean=mean, var=var, eps=eps), (x, weight, bias))]


def _batch_norm_in_evaluation(op, x, weight, bias, *, mean, var, eps):
    return op(x, weight, bias, mean, var, False, 0.0, eps)


def _batch_norm_again(op, x, weight, bias, *, momentum, eps):
    return op(x, weight, bias, None, None, True, momentum, eps)


def _batch_norm_from_statistics(x, weight, bias, mean, rstd):
    # The kernel multiplies by weight / sqrt(var + eps) and adds bias - mean * that. With a variance of 1, an eps
    # of 0 and the product for a weight, evaluation does the same arithmetic.
    scale = rstd if weight is None else weight * rstd
    bias = torch.zeros_like(mean) if bias is None else bias
    return aten.native_batch_norm(x, scale, bias, mean, torch.ones_like(mean), False, 0.0, 0.0)


def _dropout(op: OpOverload, args: tuple[Any, ...], results: Sequence[Tensor]) -> list[Way]:
    """Fused dropout again, with the mask that it drew."""
    x, p, train = args
    return [(functools.partial(_dropout_with_mask, scale=1 / (1 - p)), (x, results[1]))] if train and p < 1 else []


def _dropout_with_mask(x, mask, *, scale):
    return aten.native_dropout_backward(x, mask, scale)


def _max_pool(op: OpOverload, args: tuple[Any, ...], results: Sequence[Tensor]) -> list[Way]:
    """The largest again, from where they were found: their indices are there for the backward pass anyway."""
    return [(functools.partial(_at_indices, dims=MAX_POOLS[op.overloadpacket]), (args[0], results[1]))]


def _at_indices(x, indices, *, dims):
    return x.flatten(-dims).gather(-1, indices.flatten(-dims)).view(indices.shape)


MAX_POOLS = {aten.max_pool2d_with_indices: 2, aten.max_pool3d_with_indices: 3}
SPECIAL = {
    **dict.fromkeys(BATCH_NORMS, _batch_norm),
    aten.native_dropout: _dropout,
    **dict.fromkeys(MAX_POOLS, _max_pool),
}


def special_way(op: OpOverload, args: tuple[Any, ...], results: Sequence[Tensor]) -> Way | None:
    """Return the first of the ways that is proven to give the very bits."""
    setting = (op, *map(_layout, args))
    if setting not in _first_exact:
        _first_exact[setting] = _find_exact(op, args)
    first = _first_exact[setting]
    return None if first is None else SPECIAL[op.overloadpacket](op, args, results)[first]


_first_exact: dict[tuple[Any, ...], int | None] = {}


def _layout(t: Any) -> Any:
    if not isinstance(t, Tensor):
        return tuple(t) if isinstance(t, list) else t
    return t.dtype, t.device, t.dim(), t.is_contiguous(), t.is_contiguous(memory_format=torch.channels_last)


def _find_exact(op: OpOverload, args: tuple[Any, ...]) -> int | None:
    """Try the ways on random numbers, in the shapes and layouts that are asked for."""
    devices = [args[0].device] if args[0].is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        trial = [torch.rand_like(a).add_(0.5) if isinstance(a, Tensor) else a for a in args]
        results = op(*trial)
        for i, (function, ingredients) in enumerate(SPECIAL[op.overloadpacket](op, trial, results)):
            try:
                again = function(*ingredients)
            except (RuntimeError, NotImplementedError):  # it does not take these dtypes
                continue
            again = again if isinstance(again, Tensor) else again[0]
            if again.dtype is results[0].dtype and torch.equal(again, results[0]):
                return i
    return None


def indices_below(op: OpOverload, args: tuple[Any, ...]) -> int | None:
    """For an operation whose second result are indices: the number that they stay below."""
    dims = MAX_POOLS.get(op.overloadpacket)
    return None if dims is None else args[0].shape[-dims:].numel()


def repeatable(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a matrix product or the like gives the same again: attention that draws a dropout mask does not."""
    for i, a in enumerate(op._schema.arguments):
        if a.name == "dropout_p":
            return (args[i] if i < len(args) else kwargs.get(a.name, 0)) == 0
    return True


def products(recipe: Recipe) -> int:
    """Multiplications for each element of the result of a matrix product or the like."""
    packet = recipe.function.overloadpacket
    if packet is aten.convolution:
        return recipe.args[1].size[1:].numel()
    if packet in (aten.addmm, aten.baddbmm, aten.addmv):
        return recipe.args[1].size[-1]
    if packet in (aten.mm, aten.bmm, aten.mv, aten.dot):
        return recipe.args[0].size[-1]
    return 2 * recipe.args[1].size[-2]  # attention: as many keys, twice
