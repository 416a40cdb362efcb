"""What hypothesis may draw for linear maps with frozen weights."""

from __future__ import annotations

import cases_adapter
import torch
from drawing import SIDE, Property, choice, optional
from hypothesis import strategies as st

import bptools.functional as B
from bptools.check.strategies import calls, shapes, tensors


@st.composite
def lora_linear(draw):
    rows, i, o, r = draw(shapes(0, 2, min_side=0, max_side=3)), draw(SIDE), draw(SIDE), draw(SIDE)
    update = tensors((r, i)), tensors((o, r))
    return draw(calls(tensors((*rows, i)), tensors((o, i)), *update, optional(tensors((o,))), choice(1.0, 0.25)))


@st.composite
def nf4_linear(draw):
    rows, i, o = draw(shapes(0, 2, min_side=0, max_side=3)), draw(st.integers(1, 40)), draw(SIDE)
    numbers = torch.randn(o, i, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    weight = B.quantize_nf4(numbers, 32, draw(st.booleans()))
    return draw(calls(tensors((*rows, i)), weight, optional(tensors((o,)))))


PROPERTIES = [
    Property("nf4_linear", nf4_linear(), theirs=cases_adapter.nf4_linear),
    Property("lora_linear", lora_linear(), theirs=cases_adapter.lora_linear),
]
