"""What hypothesis may draw for bags of embeddings and for rotations."""

from __future__ import annotations

import cases_embedding
import torch
from drawing import SIDE, Property, choice, optional
from hypothesis import strategies as st

from bptools.check.strategies import calls, indices, shapes, tensors


@st.composite
def embedding_bag(draw):
    rows, mode = draw(SIDE), draw(choice("sum", "mean", "max"))
    table, dtype = tensors((rows, draw(SIDE))), draw(choice(torch.int64, torch.int32))
    constants = {"mode": mode, "padding_idx": optional(st.integers(0, rows - 1))}
    if draw(st.booleans()):
        shape, offsets = draw(shapes(2, 2, max_side=4)), None
    else:
        sizes = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
        shape, ends = (sum(sizes),), torch.tensor([0, *sizes], dtype=dtype).cumsum(0, dtype=dtype)
        constants["include_last_offset"] = draw(st.booleans())
        offsets = ends if constants["include_last_offset"] else ends[:-1]
    if mode == "sum":
        constants["per_sample_weights"] = optional(tensors(shape))
    return draw(calls(indices(rows, shape, dtype), table, offsets, **constants))


@st.composite
def rotary_embedding(draw):
    shape = (*draw(shapes(0, 3, min_side=0, max_side=3)), 2 * draw(st.integers(1, 3)))
    least = draw(st.integers(0, len(shape) - 1))
    tables = [tensors(shape[least:], requires_grad=st.booleans()) for _ in range(2)]
    return draw(calls(tensors(shape), *tables, st.booleans()))


PROPERTIES = (
    Property("embedding_bag", embedding_bag(), theirs=cases_embedding.bags),
    Property("rotary_embedding", rotary_embedding(), theirs=cases_embedding.rotation),
)
