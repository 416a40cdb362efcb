"""The recurrent modules against torch.nn's, with every argument of theirs; checkpoints; truncation."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_leaves, tree_map

import bptools
from bptools import nn

LENGTHS = (3, 5, 3, 1)
KINDS = ("RNN", "GRU", "LSTM")
COMBINATIONS = [
    (kind, dict(zip(("num_layers", "bias", "bidirectional"), values, strict=True)), how)
    for kind in KINDS
    for values in itertools.product((1, 2), (True, False), (False, True))
    for how in ("plain", "packed")
]


def pair(kind, dtype=torch.float64, **arguments):
    """Our module and torch's, with the same parameters."""
    arguments = {"input_size": 3, "hidden_size": 4, **arguments}
    torch.manual_seed(0)
    ours, theirs = getattr(nn, kind)(**arguments, dtype=dtype), getattr(torch.nn, kind)(**arguments, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def sample(module, how, dtype=torch.float64, enforce_sorted=False):
    """An input and initial states that learn, of four sequences; packed, their lengths are LENGTHS."""
    torch.manual_seed(1)
    n = {"plain": (4,), "packed": (4,), "unbatched": ()}[how]
    if how == "packed":
        leaves = [torch.randn(length, 3, dtype=dtype, requires_grad=True) for length in LENGTHS]
        x = pack_sequence(sorted(leaves, key=len, reverse=True) if enforce_sorted else leaves, enforce_sorted)
    else:
        x = torch.randn(5, *n, 3, dtype=dtype)
        x = (x.transpose(0, 1).contiguous() if module.batch_first and n else x).requires_grad_()
        leaves = [x]
    runs = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 2 if module.mode == "LSTM" else 1]
    states = [torch.randn(runs, *n, size, dtype=dtype, requires_grad=True) for size in sizes]
    return x, tuple(states) if len(states) > 1 else states[0], [*leaves, *states]


def results(module, x, hx, leaves, seed=2):
    """What the module gives, and the gradients of everything from all of it."""
    torch.manual_seed(seed)
    out = module(x, hx)
    outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    torch.manual_seed(3)
    wanted = [*(leaf for leaf in leaves if leaf is not None), *module.parameters()]
    weights = [torch.randn_like(t) for t in outputs]
    grads = torch.autograd.grad(outputs, wanted, weights, retain_graph=True)  # how x was packed is used again
    return [*outputs, *grads]


@pytest.mark.parametrize("tier", ["auto", "formula"])
@pytest.mark.parametrize(("kind", "arguments", "how"), COMBINATIONS, ids=str)
def test_every_constructor(kind, arguments, how, tier):
    """Values, final states, and the gradients of input, initial states and parameters."""
    ours, theirs = pair(kind, **arguments)
    given = sample(theirs, how)
    with bptools.backend(tier):
        torch.testing.assert_close(results(ours, *given), results(theirs, *given))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["plain", "packed", "unbatched"])
def test_the_rest_of_the_arguments(kind, how):
    """batch_first, dropout between layers, float32 (oneDNN's LSTM), and ReLU."""
    more = {"nonlinearity": "relu"} if kind == "RNN" else {}
    arguments = {"num_layers": 3, "bidirectional": True, "batch_first": True, "dropout": 0.3, **more}
    ours, theirs = pair(kind, torch.float32, **arguments)
    given = sample(theirs, how, torch.float32)
    torch.testing.assert_close(results(ours, *given), results(theirs, *given), rtol=1e-4, atol=1e-5)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(results(ours, *given), results(theirs, *given), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("how", ["plain", "packed", "unbatched"])
@pytest.mark.parametrize("bias", [True, False])
def test_projection(how, bias):
    ours, theirs = pair("LSTM", proj_size=2, num_layers=2, bidirectional=True, bias=bias)
    given = sample(theirs, how)
    torch.testing.assert_close(results(ours, *given), results(theirs, *given))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["plain", "packed", "unbatched"])
def test_without_an_initial_state(kind, how):
    ours, theirs = pair(kind, bidirectional=True)
    x, _, leaves = sample(theirs, how)
    leaves = [leaf for leaf in leaves if leaf.shape[-1] == 3]
    torch.testing.assert_close(results(ours, x, None, leaves), results(theirs, x, None, leaves))


def test_packed_sequences_come_out_as_they_went_in():
    layer = nn.GRU(3, 4)
    for enforce_sorted in (True, False):
        x = sample(layer, "packed", torch.float32, enforce_sorted)[0]
        y, _ = layer(x)
        assert isinstance(y, PackedSequence)
        assert torch.equal(y.batch_sizes, x.batch_sizes)
        assert y.sorted_indices is x.sorted_indices
        assert y.unsorted_indices is x.unsorted_indices


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_of_a_packed_sequence(kind):
    ours, theirs = pair(kind, bidirectional=True)
    x, hx, leaves = sample(theirs, "packed")

    def penalty(module):
        y, _ = module(x, hx)
        grads = torch.autograd.grad(y.data.sin().sum(), leaves, create_graph=True)
        wanted = [*leaves, *module.parameters()]
        return torch.autograd.grad(sum((g**2).sum() for g in grads), wanted, retain_graph=True)

    torch.testing.assert_close(penalty(ours), penalty(theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_and_partial_losses(kind):
    """Only the final state is used, only the result is, only some parameters learn."""
    ours, theirs = pair(kind)
    x, hx, _ = sample(theirs, "plain")
    x = x.detach()
    for used in (0, 1):
        for frozen in ("weight", "bias", "ih"):
            found = []
            for module in (ours, theirs):
                for name, p in module.named_parameters():
                    p.requires_grad_(frozen not in name)
                learns = [p for p in module.parameters() if p.requires_grad]
                loss = sum(t.sin().sum() for t in tree_leaves(module(x, hx)[used]))
                found.append(torch.autograd.grad(loss, learns))
            torch.testing.assert_close(*found)


ERRORS = {
    "dimensions": lambda m: m(torch.randn(3)),
    "features": lambda m: m(torch.randn(5, 2, 9)),
    "dtype": lambda m: m(torch.randn(5, 2, 3).double()),
    "no time": lambda m: m(torch.randn(0, 2, 3)),
    "state": lambda m: m(torch.randn(5, 2, 3), tree_map(lambda s: s[:, :1], m(torch.randn(5, 2, 3))[1])),
    "state dimensions": lambda m: m(torch.randn(5, 2, 3), tree_map(lambda s: s[0], m(torch.randn(5, 2, 3))[1])),
    "unbatched state": lambda m: m(torch.randn(5, 3), m(torch.randn(5, 2, 3))[1]),
    "packed features": lambda m: m(pack_sequence([torch.randn(3, 9), torch.randn(2, 9)])),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_torchs_in_kind(kind, name):
    ours, theirs = pair(kind, torch.float32)
    with pytest.raises(Exception) as expected:
        ERRORS[name](theirs)
    with pytest.raises((expected.type, ValueError)):
        ERRORS[name](ours)


@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell", "LSTMCell"])
def test_errors_of_cells(kind):
    cell = getattr(nn, kind)(3, 4)
    with pytest.raises(ValueError, match=f"{kind}: input must have 1 or 2 dimensions, got 3"):
        cell(torch.randn(1, 2, 3))
    state = torch.randn(1, 2, 4)
    with pytest.raises(ValueError, match=f"{kind}: hx must have 1 or 2 dimensions, got 3"):
        cell(torch.randn(2, 3), (state, state) if kind == "LSTMCell" else state)


def test_cells_take_states():
    for kind in ("RNNCell", "GRUCell", "LSTMCell"):
        ours, theirs = getattr(nn, kind)(3, 4), getattr(torch.nn, kind)(3, 4)
        ours.load_state_dict(theirs.state_dict())
        for shape in ((2,), ()):
            x, *states = (torch.randn(*shape, size, requires_grad=True) for size in (3, 4, 4))
            hx = tuple(states) if kind == "LSTMCell" else states[0]
            found = []
            for cell in (ours, theirs):
                after = tree_leaves(cell(x, hx))
                used = [x, *states[: len(after)], *cell.parameters()]
                found.append([*after, *torch.autograd.grad(sum(t.sin().sum() for t in after), used)])
            torch.testing.assert_close(*found)


# Checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("tier", ["auto", "formula"])
@pytest.mark.parametrize("how", ["plain", "packed"])
@pytest.mark.parametrize("every", [1, 2, 9, "sqrt"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_change_no_gradient(kind, every, how, tier):
    """Of float64 numbers, to their last digits: the sums over all times are made of sums over segments."""
    more = {"proj_size": 2} if kind == "LSTM" and every == 2 else {}
    ours, theirs = pair(kind, num_layers=2, bidirectional=True, **more)
    given = sample(theirs, how)
    ours.checkpoint_every = every
    with bptools.backend(tier):
        torch.testing.assert_close(results(ours, *given), results(theirs, *given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_computes_the_same_steps(kind):
    """With one segment nothing is summed in another order: the same bits."""
    layer = nn.__dict__[kind](3, 4)
    x, hx, leaves = sample(layer, "plain", torch.float32)
    found = []
    for every in (None, 5):
        layer.checkpoint_every = every
        with bptools.backend("formula"):
            found.append(results(layer, x, hx, leaves))
    assert all(map(torch.equal, *found))


def kept_bytes(call, own):
    """Bytes that a call keeps for its backward, beside the storages of its own tensors."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    own = {t.untyped_storage().data_ptr() for t in own}
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize("tier", ["auto", "formula"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_keep_the_square_root(kind, tier):
    layer = nn.__dict__[kind](8, 8)
    x = torch.randn(400, 4, 8)
    kept = {}
    with bptools.backend(tier):
        for every in (None, "sqrt"):
            layer.checkpoint_every = every
            kept[every] = kept_bytes(lambda: layer(x)[1], [x, *layer.parameters()])
    state = 4 * 8 * 4 * (2 if kind == "LSTM" else 1)
    assert kept["sqrt"] <= 21 * state + 8 * x.element_size() * x.shape[1]
    assert kept["sqrt"] < kept[None] / 5


def test_the_formula_keeps_its_result_and_no_gates():
    x = torch.randn(50, 4, 8)
    for kind in KINDS:
        layer = nn.__dict__[kind](8, 8)
        with bptools.backend("formula"):
            kept = kept_bytes(lambda layer=layer: layer(x)[0], [x, *layer.parameters()])
        assert kept <= (50 + 4) * 4 * 8 * 4


@pytest.mark.parametrize("every", [0, -1, 2.0, True, "sqr"])
def test_what_checkpoint_every_may_be(every):
    layer = nn.GRU(3, 4)
    layer.checkpoint_every = every
    with pytest.raises(ValueError, match=r"gru: checkpoint_every must be None, 'sqrt' or an int .* got"):
        layer(torch.randn(5, 2, 3))


# Truncation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_truncation_is_detaching_by_hand(kind, batch_first):
    ours, theirs = pair(kind, batch_first=batch_first)
    x, hx, leaves = sample(theirs, "plain")
    time = 1 if batch_first else 0
    state, outputs = hx, []
    for part in x.split(2, time):
        y, state = theirs(part, state)
        y.sin().sum().backward()
        outputs.append(y)
        state = tree_map(torch.Tensor.detach, state)
    expected = [*outputs, *tree_leaves(state), *(t.grad.clone() for t in [*leaves, *theirs.parameters()])]
    for t in leaves:
        t.grad = None
    found = []
    for y, state in nn.truncated_bptt(ours, x, hx, chunk=2):
        y.sin().sum().backward()
        found.append(y)
        last = state
    found += [*tree_leaves(last), *(t.grad for t in [*leaves, *ours.parameters()])]
    torch.testing.assert_close(found, expected)


def test_a_window_reaches_back_over_its_steps():
    """The loss of a chunk has gradients over the window that ends with it, and is not counted twice."""
    layer = torch.nn.GRU(3, 4).double()
    x = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    whole, _ = layer(x)
    chunks = list(nn.truncated_bptt(layer, x, chunk=2, window=4))
    torch.testing.assert_close(torch.cat([y for y, _ in chunks]), whole)
    for i, (y, _) in enumerate(chunks):
        (dx,) = torch.autograd.grad(y.sum(), x)
        reached = dx.abs().sum((1, 2)).ne(0).tolist()
        assert reached == [max(0, 2 * i - 2) <= t < 2 * i + len(y) for t in range(7)]
    # a window as long as the sequence is the whole gradient
    (expected,) = torch.autograd.grad(whole.sin().sum(), x)
    parts = [torch.autograd.grad(y.sin().sum(), x)[0] for y, _ in nn.truncated_bptt(layer, x, chunk=2, window=8)]
    torch.testing.assert_close(sum(parts), expected)


def test_truncation_holds_one_chunk():
    """What a chunk has kept is free before the next but one is asked for."""
    layer = nn.LSTM(3, 4)
    alive = []
    for y, (hn, cn) in nn.truncated_bptt(layer, torch.randn(60, 2, 3), chunk=10):
        y.sum().backward()
        alive.append(weakref.ref(y.untyped_storage()))
        del y, hn, cn
        assert sum(ref() is not None for ref in alive) <= 1


def test_the_last_chunk_may_be_shorter_and_a_sequence_unbatched():
    layer = nn.RNN(3, 4, batch_first=True)
    assert [y.shape for y, _ in nn.truncated_bptt(layer, torch.randn(5, 3), chunk=2)] == [(2, 4), (2, 4), (1, 4)]


@pytest.mark.parametrize(
    ("arguments", "kind", "pattern"),
    [
        ({"chunk": 0}, ValueError, "chunk must be an int of at least 1, got 0"),
        ({"chunk": 2.0}, ValueError, "chunk must be an int of at least 1, got 2.0"),
        ({"chunk": 2, "window": 3}, ValueError, "window must be a multiple of chunk, 2, got 3"),
        (
            {"chunk": 2, "input": pack_sequence([torch.randn(3, 3)])},
            TypeError,
            "input must be a tensor, got Packed",
        ),
        ({"chunk": 2, "input": torch.randn(3)}, ValueError, r"input must have 2 or 3 dimensions, got \(3,\)"),
    ],
)
def test_errors_of_truncated_bptt(arguments, kind, pattern):
    with pytest.raises(kind, match=f"truncated_bptt: {pattern}"):
        nn.truncated_bptt(nn.RNN(3, 4), **{"input": torch.randn(5, 2, 3), **arguments})


def test_the_example_in_the_docstring():
    """Truncated training of a running sum, as `truncated_bptt` shows it."""
    torch.manual_seed(0)
    lstm, head = nn.LSTM(1, 8), nn.Linear(8, 1)
    x = torch.randn(60, 4, 1)
    target = x.cumsum(0) / 10
    learning = torch.optim.Adam([*lstm.parameters(), *head.parameters()], 0.03)
    losses = []
    for _ in range(40):
        total = 0.0
        for (y, _), wanted in zip(nn.truncated_bptt(lstm, x, chunk=20), target.split(20), strict=True):
            learning.zero_grad()
            loss = (head(y) - wanted).square().mean()
            loss.backward()
            learning.step()
            total += loss.item()
        losses.append(total)
    assert losses[-1] < losses[0] / 4
