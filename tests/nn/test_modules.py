"""Every module of bptools.nn against its namesake in torch.nn: the same in all but the code that runs."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

import bptools
from bptools.check import check_function

# Class name, constructor arguments, and the shape of the input, or a function that makes the inputs.
MODULES = [
    ("Linear", (5, 4), (3, 5)),
    ("Linear", (5, 4, False), (2, 3, 5)),
    ("ReLU", (), (3, 5)),
    ("ReLU", (True,), (3, 5)),
    ("LeakyReLU", (0.2,), (3, 5)),
    ("LeakyReLU", (0.2, True), (3, 5)),
    ("GELU", (), (3, 5)),
    ("GELU", ("tanh",), (3, 5)),
    ("SiLU", (), (3, 5)),
    ("SiLU", (True,), (3, 5)),
    ("Sigmoid", (), (3, 5)),
    ("Tanh", (), (3, 5)),
    ("Conv1d", (2, 4, 3), (2, 2, 7)),
    ("Conv2d", (2, 4, 3, 2, 1, 1, 2, False), (2, 2, 7, 6)),
    ("Conv2d", (2, 4, 3, 1, "same"), (2, 7, 6)),
    ("Conv3d", (2, 4, 2, (1, 2, 1)), (2, 2, 3, 4, 3)),
    ("MaxPool2d", (3, 2, 1, 1, False, True), (2, 2, 6, 5)),
    ("AvgPool2d", (3, 2, 1, True, False), (2, 2, 6, 5)),
    ("AdaptiveAvgPool2d", ((None, 2),), (2, 2, 6, 5)),
    ("LayerNorm", (5,), (3, 5)),
    ("LayerNorm", ((3, 5), 1e-3, False), (2, 3, 5)),
    ("RMSNorm", (5,), (3, 5)),
    ("RMSNorm", ((3, 5), 1e-3, False), (2, 3, 5)),
    ("BatchNorm1d", (4,), (6, 4)),
    ("BatchNorm1d", (4, 1e-3, None), (6, 4, 3)),
    ("BatchNorm2d", (4, 1e-5, 0.3), (3, 4, 2, 5)),
    ("BatchNorm2d", (4, 1e-5, 0.1, False, False), (3, 4, 2, 5)),
    ("BatchNorm3d", (4,), (3, 4, 2, 1, 5)),
    ("Softmax", (-1,), (3, 5)),
    ("LogSoftmax", (0,), (3, 5)),
    ("Dropout", (0.3,), (3, 5)),
    ("Dropout", (0.3, True), (3, 5)),
    ("Embedding", (7, 3, 2), lambda: (torch.randint(7, (2, 5)),)),
    ("CrossEntropyLoss", (), lambda: (torch.randn(6, 4, requires_grad=True), torch.randint(4, (6,)))),
    (
        "CrossEntropyLoss",
        (torch.tensor([1.0, 2.0, 0.5, 1.5]), None, 1, None, "none", 0.1),
        lambda: (torch.randn(6, 4, 2, requires_grad=True), torch.randint(4, (6, 2))),
    ),
    ("MSELoss", (), lambda: (torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True))),
    ("MSELoss", (None, None, "sum"), lambda: (torch.randn(6, requires_grad=True), torch.randn(6))),
]


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
    y = module(*(x.clone() if x.is_floating_point() else x for x in inputs))
    torch.manual_seed(3)
    module.zero_grad()
    y.backward(torch.randn_like(y))
    found = [x.grad for x in inputs if x.requires_grad] + [p.grad for p in module.parameters()]
    return [y, *found, *(b.clone() for b in module.buffers())]


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
    ours = {n for n in bptools.nn.__all__ if getattr(bptools.nn, n).__module__.startswith("bptools.")}
    assert ours == {name for name, *_ in MODULES}


def test_padding_mode_of_convolutions():
    layer = bptools.nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")
    with pytest.raises(NotImplementedError, match="padding_mode must be 'zeros', got 'reflect'"):
        layer(torch.randn(2, 2, 5, 5))
