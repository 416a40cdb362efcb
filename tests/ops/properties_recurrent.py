"""What hypothesis may draw for the recurrent ops."""

from __future__ import annotations

import cases_recurrent
import torch
from drawing import SIDE, Property, choice
from hypothesis import strategies as st

from bptools.check.strategies import calls, tensors


@st.composite
def network(draw, name):
    """One or two layers and directions; of equal lengths or packed."""
    i, h, layers = draw(SIDE), draw(st.integers(2, 3)), draw(st.integers(1, 2))
    biased, both, train = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    runs = layers * (1 + both)
    p = draw(st.integers(1, h)) if name == "lstm" else h
    sizes = sorted(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)), reverse=True)
    packed = draw(st.booleans())
    n = sizes[0] if packed else draw(st.integers(0, 3))
    rows, params = cases_recurrent.GATES[name] * h, []
    for run in range(runs):
        read = i if run < 1 + both else p * (1 + both)
        params += [tensors((rows, read)), tensors((rows, p))]
        params += [tensors((rows,)), tensors((rows,))] if biased else []
        params += [tensors((p, h))] if p < h else []
    states = [tensors((runs, n, p)), tensors((runs, n, h))]
    x = tensors((sum(sizes), i) if packed else (len(sizes), n, i))
    constants = {"checkpoint_every": choice(None, None, 1, 2)}
    constants |= {"batch_sizes": tuple(sizes)} if packed else {}
    hx = st.tuples(*states) if name == "lstm" else states[0]
    return draw(calls(x, hx, st.tuples(*params), biased, layers, 0.0, train, both, **constants))


@st.composite
def cell(draw, name):
    n, i, h = draw(st.integers(0, 3)), draw(SIDE), draw(SIDE)
    rows, state = cases_recurrent.GATES[name] * h, tensors((n, h))
    biases = [tensors((rows,)), tensors((rows,))] if draw(st.booleans()) else []
    hx = st.tuples(state, state) if name == "lstm" else state
    return draw(calls(tensors((n, i)), hx, tensors((rows, i)), tensors((rows, h)), *biases))


PROPERTIES = (
    *[Property(name, network(name), theirs=cases_recurrent.theirs(name)) for name in cases_recurrent.GATES],
    *[
        Property(f"{name}_cell", cell(name), theirs=getattr(torch, f"{name}_cell"))
        for name in cases_recurrent.GATES
    ],
)
