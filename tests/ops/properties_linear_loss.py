"""What hypothesis may draw for the head of a classifier and its loss in one op."""

from __future__ import annotations

from types import SimpleNamespace

import cases_linear_loss
from drawing import REDUCTION, SIDE, Property, choice, optional
from hypothesis import strategies as st

from bptools.check.strategies import calls, indices, shapes, tensors


@st.composite
def linear_cross_entropy(draw):
    c, i, places = draw(SIDE), draw(SIDE), draw(shapes(0, 2, max_side=2))
    n = draw(choice((0,), (1,), (5,)) if places else choice((), (0,), (5,)))
    constants = {
        "reduction": REDUCTION,
        "label_smoothing": choice(0.0, 0.3, 1.0),
        "z_loss": choice(0.0, 0.1),
        "linear_bias": optional(tensors((c, *places))),
        "options": choice(None, SimpleNamespace(batch_chunk_size=2)),
        "return_argmax": st.booleans(),
    }
    x, w = tensors((*n, i)), tensors((c, *places, i))
    if draw(st.booleans()):
        weight = optional(tensors((c,), numbers="positive", requires_grad=False))
        return draw(
            calls(x, w, indices(c, (*n, *places)), weight=weight, ignore_index=choice(None, 0), **constants)
        )
    weight = optional(tensors((c,), numbers="positive"))
    return draw(calls(x, w, tensors((*n, c, *places), numbers="positive"), weight=weight, **constants))


PROPERTIES = (
    Property("linear_cross_entropy", linear_cross_entropy(), theirs=cases_linear_loss.linear_cross_entropy),
)
