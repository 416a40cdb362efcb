"""What hypothesis may draw for linear maps with frozen weights."""

from __future__ import annotations

import cases_adapter
from drawing import SIDE, Property, choice, optional
from hypothesis import strategies as st

from bptools.check.strategies import calls, shapes, tensors


@st.composite
def lora_linear(draw):
    rows, i, o, r = draw(shapes(0, 2, min_side=0, max_side=3)), draw(SIDE), draw(SIDE), draw(SIDE)
    update = tensors((r, i)), tensors((o, r))
    return draw(calls(tensors((*rows, i)), tensors((o, i)), *update, optional(tensors((o,))), choice(1.0, 0.25)))


PROPERTIES = [Property("lora_linear", lora_linear(), theirs=cases_adapter.lora_linear)]
