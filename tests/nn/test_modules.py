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
NO_HALF = {name for table in TABLES for name in getattr(table, "NO_HALF", ())}  # which torch's class lacks
OURS_ALONE = {name for table in TABLES for name in getattr(table, "OURS_ALONE", ())}  # what torch.nn lacks


def inputs_of(shapes):
    """The inputs that a row of the table means: one float tensor of a shape, or tensors made by a function."""
    torch.manual_seed(1)
    return shapes() if callable(shapes) else (torch.randn(shapes, requires_grad=True),)


def make(modules, name, args):
    """The module that a row of the table means, of bptools.nn or torch.nn; args may be a function of these."""
    torch.manual_seed(0)
    return getattr(modules, name)(*(args(modules) if callable(args) else args))


@pytest.fixture(params=MODULES, ids=lambda row: f"{row[0]}{'(...)' if callable(row[1]) else row[1]}")
def pair(request):
    name, args, shapes = request.param
    ours, theirs = (make(modules, name, args) for modules in (bptools.nn, torch.nn))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
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
    checks = [name for name in AUDITED if name != "dtypes" or type(theirs).__name__ not in NO_HALF]
    check_function(ours, inputs_of(shapes), reference=theirs, checks=checks).raise_if_failed()


def test_a_pretrained_embedding_is_ours():
    table = torch.randn(4, 3)
    layer = bptools.nn.Embedding.from_pretrained(table, freeze=False, padding_idx=1)
    assert type(layer) is bptools.nn.Embedding
    layer(torch.tensor([0, 1, 1])).sum().backward()
    assert layer.weight.grad.sum(1).tolist() == [3, 0, 0, 0]


def test_every_module_is_in_the_table():
    classes = {n: c for n in bptools.nn.__all__ if inspect.isclass(c := getattr(bptools.nn, n))}
    ours = {n for n, c in classes.items() if c.__module__.startswith("bptools.")}
    assert ours == {name for name, *_ in MODULES} | OURS_ALONE
