"""Every module of bptools.nn against its namesake in torch.nn: the same in all but the code that runs."""

from __future__ import annotations

import copy
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import bptools
from bptools.check import check_function

TABLES = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("modules_*.py"))]
MODULES = [row for table in TABLES for row in table.MODULES]
OURS_ALONE = {name for table in TABLES for name in getattr(table, "OURS_ALONE", ())}  # what torch.nn lacks


def inputs_of(shapes):
    """The inputs that a row of the table means: one float tensor of a shape, or tensors made by a function."""
    torch.manual_seed(1)
    return shapes() if callable(shapes) else (torch.randn(shapes, requires_grad=True),)


@pytest.fixture(params=MODULES, ids=lambda row: f"{row[0]}{row[1]}")
def pair(request):
    name, args, shapes = request.param
    ours, theirs = getattr(bptools.nn, name)(*args), getattr(torch.nn, name)(*args)
    with torch.no_grad():
        for p in theirs.parameters():  # norms start at 1 and 0, which would hide an exchange
            p.normal_()
    return ours, theirs, shapes


def step(module, shapes):
    """The output, the gradients of inputs and parameters, and the buffers, after one forward and backward."""
    inputs = inputs_of(shapes)
    torch.manual_seed(2)
    # an in-place module may not write to a leaf
    results = tree_leaves(module(*(x.clone() if x.is_floating_point() else x for x in inputs)))
    torch.manual_seed(3)
    module.zero_grad()
    learns = [y for y in results if y is not None and y.requires_grad]
    torch.autograd.backward(learns, [torch.randn_like(y) for y in learns])
    found = [x.grad for x in inputs if x.requires_grad] + [p.grad for p in module.parameters()]
    return [*results, *found, *(b.clone() for b in module.buffers())]


def test_state_dict_goes_both_ways(pair):
    ours, theirs, shapes = pair
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    back = copy.deepcopy(theirs)
    back.load_state_dict(ours.state_dict())
    for mode in (True, True, False):  # twice in training: what a step leaves behind counts too
        ours.train(mode), theirs.train(mode), back.train(mode)
        expected = step(theirs, shapes)
        torch.testing.assert_close(step(ours, shapes), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(step(back, shapes), expected)


def test_is_torchs_module_in_everything_else(pair):
    ours, theirs, _ = pair
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    assert inspect.signature(type(ours)) == inspect.signature(type(theirs))
    assert (
        inspect.signature(type(ours).forward).parameters.keys()
        == inspect.signature(type(theirs).forward).parameters.keys()
    )


AUDITED = ["values", "gradients", "masks", "mutation", "interleaved", "checkpoint", "module_copies", "dtypes"]


def test_audit(pair):
    """Parameters, copies and pickles, as bptools.check sees a module."""
    ours, theirs, shapes = pair
    ours.load_state_dict(theirs.state_dict())
    check_function(ours, inputs_of(shapes), reference=theirs, checks=AUDITED).raise_if_failed()


def test_initialisation_is_torchs(pair):
    for module in pair[:2]:
        torch.manual_seed(0)
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    ours, theirs, _ = pair
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_pretrained_embedding_is_ours():
    table = torch.randn(4, 3)
    layer = bptools.nn.Embedding.from_pretrained(table, freeze=False, padding_idx=1)
    assert type(layer) is bptools.nn.Embedding
    layer(torch.tensor([0, 1, 1])).sum().backward()
    assert layer.weight.grad.sum(1).tolist() == [3, 0, 0, 0]


def test_what_is_not_there_yet_is_refused():
    with pytest.raises(NotImplementedError, match="padding_mode"):
        bptools.nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")(torch.randn(1, 1, 5, 5))
    with pytest.raises(NotImplementedError, match="max_norm"):
        bptools.nn.Embedding(4, 3, max_norm=1.0)(torch.tensor([1]))


def test_every_module_is_in_the_table():
    classes = {n: c for n in bptools.nn.__all__ if inspect.isclass(c := getattr(bptools.nn, n))}
    ours = {n for n, c in classes.items() if c.__module__.startswith("bptools.")}
    assert ours == {name for name, *_ in MODULES} | OURS_ALONE


def test_padding_mode_of_convolutions():
    layer = bptools.nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")
    with pytest.raises(NotImplementedError, match="padding_mode must be 'zeros', got 'reflect'"):
        layer(torch.randn(2, 2, 5, 5))
