"""PyTorch's own sample inputs: what its suite draws for functions and modules, and which calls it wants to fail.

Values, gradients of every differentiable input, running buffers and errors must agree, or the difference is one of
`deviations.py`. Where torch raises a RuntimeError, ours may raise a ValueError, TypeError or IndexError.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from deviations import ABSENT, DEVIATIONS, covering
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import bptools
import bptools.functional as B

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
ERRORS = (RuntimeError, ValueError, TypeError, IndexError)  # NotImplementedError is a RuntimeError
PREFIX = "nn.functional."


def name_of(info: Any) -> str:
    return info.name.removeprefix(PREFIX)


ALSO_IN_TORCH = {"log_softmax", "sigmoid", "softmax", "tanh"}  # drawn for torch's functions of these names
OPS = [i for i in op_db if name_of(i) in B.__all__ and (PREFIX in i.name or i.name in ALSO_IN_TORCH)]
CLASSES = {name: c for name in bptools.nn.__all__ if inspect.isclass(c := getattr(bptools.nn, name))}
OURS_NN = {name for name, c in CLASSES.items() if c.__module__.startswith("bptools.")}
MODULES = [info for info in module_db if info.module_cls.__name__ in OURS_NN]


def ours_and_theirs(info: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Our function and torch's, with the arguments that the samples have."""
    name = name_of(info)
    ours = getattr(B, name)
    if "lambda" not in getattr(info.op, "__name__", ""):
        return ours, info.op

    def patched(*args: Any, **kwargs: Any) -> Any:  # a lambda that calls torch.nn.functional's, with a fixed seed
        with mock.patch.object(F, name, mock.Mock(side_effect=ours)) as called:
            result = info.op(*args, **kwargs)
        assert called.called, "the sample does not reach our function"
        return result

    return patched, info.op


def copies(values: Any) -> Any:
    """The same arguments again, so that nobody sees what another has written or accumulated."""
    return tree_map(
        lambda v: v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v, values
    )


def outcome(call: Callable[..., Any], args: Any, kwargs: Any, also: Callable[[], list[Tensor]] = list) -> Any:
    """What a call gives: results, gradients of all inputs (and of `also`), and its arguments as it left them."""
    args, kwargs = copies((args, kwargs))
    torch.manual_seed(0)
    results = [y for y in tree_leaves(call(*args, **kwargs)) if isinstance(y, Tensor)]
    generator = torch.Generator().manual_seed(1)
    learns = [y for y in results if y.requires_grad]
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    wanted = [t for t in (*inputs, *also()) if t.requires_grad and t.is_leaf]
    douts = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in learns]
    gradients = torch.autograd.grad(learns, wanted, douts, allow_unused=True) if learns and wanted else []
    gradients = [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]
    # An input that takes no part has a gradient of None or of zeros.
    gradients = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, wanted, strict=False)]
    return [*results, *gradients, *(t.detach() for t in inputs)]


def compare(op: str, ours: Callable[[], Any], theirs: Callable[[], Any], args: Any, kwargs: Any) -> str | None:
    """What kind of deviation there is, if any, and none that is not listed."""
    expected, kind = theirs(), None
    try:
        found = ours()
    except ERRORS as error:
        kind, why = "refuses", error
    else:
        try:
            torch.testing.assert_close(found, expected, equal_nan=True)
        except AssertionError as error:
            kind, why = "differs", error
    if kind is None:
        return None
    deviation = covering(op, kind, args, kwargs)
    assert deviation, f"{op} {kind}, called with {describe(args)} {describe(kwargs)}:\n{why}"
    return kind


def describe(values: Any) -> Any:
    return tree_map(lambda v: f"<{v.dtype} {tuple(v.shape)}>" if isinstance(v, Tensor) else v, values)


def no_stale(op: str, seen: set[str | None], kinds: tuple[str, ...]) -> None:
    listed = {d.kind for d in DEVIATIONS if d.op == op and d.kind in kinds}
    assert listed <= seen, f"{op}: no sample shows the listed deviation any more"


@pytest.mark.parametrize("tier", ["auto", "formula"])
@pytest.mark.parametrize("op", sorted({name_of(info) for info in OPS}))
def test_values_and_gradients(op, tier):
    seen = set()
    with bptools.backend(tier):
        for info in (info for info in OPS if name_of(info) == op):
            ours, theirs = ours_and_theirs(info)
            for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
                args, kwargs = (sample.input, *sample.args), sample.kwargs
                runs = [lambda f=f, a=args, k=kwargs: outcome(f, a, k) for f in (ours, theirs)]
                seen.add(compare(op, *runs, args, kwargs))
    assert seen, "there was no sample"
    no_stale(op, seen, ("refuses", "differs"))


@pytest.mark.parametrize("op", sorted({name_of(info) for info in OPS if info.error_inputs_func}))
def test_errors(op):
    seen = set()
    for info in (info for info in OPS if name_of(info) == op and info.error_inputs_func):
        ours, _ = ours_and_theirs(info)
        for wrong in info.error_inputs("cpu"):
            sample = wrong.sample_input
            args, kwargs = (sample.input, *sample.args), sample.kwargs
            try:
                ours(*copies(args), **copies(kwargs))
            except (wrong.error_type, *ERRORS):
                seen.add(None)
            else:
                assert covering(op, "accepts", args, kwargs), f"accepted: {describe(args)} {describe(kwargs)}"
                seen.add("accepts")
    assert seen, "there was no sample"
    no_stale(op, seen, ("accepts",))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", sorted({info.module_cls.__name__ for info in MODULES}))
def test_modules(name, training):
    ours, theirs = getattr(bptools.nn, name), getattr(torch.nn, name)
    seen = set()
    for info in (info for info in MODULES if info.module_cls.__name__ == name):
        drawn = info.module_inputs_func(info, "cpu", torch.float64, True, training)
        for sample in drawn:
            if sample.forward_input is None:
                continue
            made = sample.constructor_input
            args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
            module = theirs(*made.args, **made.kwargs).to(torch.float64).train(training)
            mine = ours(*made.args, **made.kwargs).to(torch.float64).train(training)
            mine.load_state_dict(module.state_dict())
            runs = [
                lambda m=m, a=args, k=kwargs: [
                    *outcome(m, a, k, lambda: list(m.parameters())),
                    *(b.clone() for b in m.buffers()),
                ]
                for m in (mine, module)
            ]
            seen.add(compare(name, *runs, (made, *args), kwargs))
    assert seen, "there was no sample"
    if training:
        no_stale(name, seen, ("refuses", "differs"))


WRONG = [info for info in MODULES if info.module_error_inputs_func]


def construct_and_call(name: str, wrong: Any) -> None:
    made, called = wrong.module_error_input.constructor_input, wrong.module_error_input.forward_input
    module = getattr(bptools.nn, name)(*made.args, **made.kwargs).to(torch.float64)
    if called is not None:
        module(*called.args, **called.kwargs)


@pytest.mark.parametrize("name", sorted({info.module_cls.__name__ for info in WRONG}))
def test_module_errors(name):
    for info in (info for info in WRONG if info.module_cls.__name__ == name):
        for wrong in info.module_error_inputs_func(info, "cpu", torch.float64, True, True):
            with pytest.raises((wrong.error_type, *ERRORS)):
                construct_and_call(name, wrong)


def test_what_is_drawn():
    """Every function of torch.nn.functional that its suite draws samples for is here, or is named."""
    drawn = {name_of(info) for info in op_db if info.name.startswith(PREFIX)}
    absent = drawn - set(B.__all__)
    assert absent == set(ABSENT), sorted(absent ^ set(ABSENT))


def test_signature_of_the_database():
    """The database is torch's private one: what is used of it is still there."""
    assert {"sample_inputs", "error_inputs"} <= set(dir(op_db[0]))
    assert "module_inputs_func" in inspect.signature(type(module_db[0]).__init__).parameters
