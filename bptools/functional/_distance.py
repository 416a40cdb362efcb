"""Cosine similarity and distance of vectors."""

from __future__ import annotations

from torch import Tensor

from bptools.functional._checks import broadcast, check_power, one_dtype, shape_of
from bptools.ops import distance as _distance


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Cosine of the angle between x1 and x2: their product, divided by their lengths.

    Args:
        x1: (..., d, ...).
        x2: (..., d, ...); the two broadcast.
        dim: where d is.
        eps: a length is taken for this, positive, where it is smaller.

    Returns:
        (..., ...): without d.

    Raises:
        IndexError: if there is no dimension `dim`.
        TypeError: if an argument is not real, or none is floating.
        ValueError: if the shapes do not fit.
    """
    x1, x2 = one_dtype(*broadcast("cosine_similarity", x1=x1, x2=x2))
    dims = max(x1.dim(), 1)
    if not -dims <= dim < dims:
        raise IndexError(f"cosine_similarity: dim must be a dimension of shape {shape_of(x1)}, got {dim}")
    return _distance.cosine_similarity(x1, x2, dim, float(eps))


def pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Tensor:
    """Distance of x1 and x2, the p-norm of `x1 - x2 + eps`.

    Args:
        x1: (..., d).
        x2: (..., d); the two broadcast.
        p: the power of the norm, at least 0; infinity too.
        eps: added to each difference.
        keepdim: whether to keep the last dimension, of size 1.

    Returns:
        (...), or (..., 1).

    Raises:
        TypeError: if an argument is not real, or none is floating.
        ValueError: if the shapes do not fit, or `p` is negative.
    """
    check_power("pairwise_distance", p)
    broadcast("pairwise_distance", x1=x1, x2=x2)
    return _distance.pairwise_distance(*one_dtype(x1, x2), float(p), float(eps), keepdim)
