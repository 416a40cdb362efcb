"""Whether what is kept between forward and backward is kept rightly, and only there."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from bptools.check import _tools
from bptools.check._check import Refused, Skipped, check, compare, fail, said
from bptools.check._subject import Point, Subject, same_numbers


@check([20])
def saved_tensors(point: Point) -> None:
    """Tensors are kept by save_for_backward, not as attributes of ctx."""
    outputs = _tools.run(point.call, point.inputs)
    nodes = _tools.function_nodes(outputs)
    if not nodes:
        raise Skipped("there is no custom Function in its graph")
    for function, attribute, t in _tools.kept_on_ctx(outputs):
        fail(
            point,
            f"{function} keeps a tensor of shape {tuple(t.shape)} as ctx.{attribute}",
            expected="save_for_backward",
            got=f"ctx.{attribute}",
            guess="it escapes the version check, saved-tensor hooks, and may leak: use ctx.save_for_backward",
            how="expected = []\ngot = [(function, name) for function, name, _ in kept_on_ctx(run(call, inputs))]",
            uses=(_tools.function_nodes, _tools.kept_on_ctx),
        )


@check([21])
def leaks(point: Point) -> None:
    """The outputs are freed with their last user: there is no reference cycle."""
    gc.disable()
    try:
        outputs = _tools.run(point.call, [_tools.leaf(x) for x in point.inputs])
        gone = [weakref.ref(y) for y in outputs]
        del outputs
        alive = [i for i, ref in enumerate(gone) if ref() is not None]
        del gone
    finally:
        gc.enable()
    if alive:
        gc.collect()
        fail(
            point,
            f"output {alive[0]} outlives its last user",
            output=alive[0],
            expected="freed at once",
            got="part of a reference cycle, kept until the garbage collector runs",
            guess="an output is kept on ctx instead of by save_for_backward",
            how="""
            import gc, weakref
            gc.disable()
            outputs = run(call, inputs)
            gone = [weakref.ref(y) for y in outputs]
            del outputs
            got = [ref() is not None for ref in gone]
            expected = [False for ref in gone]
            """,
        )


@check([22])
def modified_later(point: Point) -> None:
    """A tensor written to between forward and backward is noticed, or does not matter."""
    _, dys, got = point.plain()
    counts = {"input": len(point.inputs), "argument": len(point.others), "output": len(point.plain()[0])}
    asked = 0
    for kind, count in counts.items():
        for k in range(count):
            own = point.copy()
            outputs = _tools.run(own.bind(own.subject.call, fresh=False), own.inputs)
            if kind == "output" and any(outputs[k] is x for x in own.inputs):
                continue
            name, t = {
                "input": lambda own=own, k=k: (own.names[k], own.inputs[k]),
                "argument": lambda own=own, k=k: own.others[k],
                "output": lambda outputs=outputs, k=k: (f"output {k}", outputs[k]),
            }[kind]()
            if t.numel() == 0:
                continue
            try:
                _overwrite(t)
            except RuntimeError:
                continue  # not writable: nothing can happen
            asked += 1
            try:
                again = _tools.pull(outputs, own.inputs, dys)
            except RuntimeError:
                continue  # noticed
            variable = {"input": f"inputs[{k}]", "argument": f"others[{k}]", "output": f"outputs[{k}]"}[kind]
            compare(
                point,
                got,
                again,
                what=f"{name} is written to between forward and backward, and the gradient is silently wrong",
                how=f"""
                expected = grads(call, inputs, dys)
                outputs = run(direct, inputs)
                _overwrite({variable})
                try:
                    got = pull(outputs, inputs, dys)
                except RuntimeError as error:
                    print("noticed:", error)
                    got = expected
                """,
                uses=(_overwrite,),
                guess="saved as .data or a view of memory, past autograd's version check: use save_for_backward",
                dys=dys,
            )
    if not asked:
        raise Skipped("nothing that it holds can be written to")


def _overwrite(t):
    """Other numbers in the same place."""
    with torch.no_grad():
        if t.is_floating_point() or t.is_complex():
            t.mul_(0.5).add_(0.25)
        elif t.dtype is torch.bool:
            t.logical_not_()
        else:
            t.copy_(t.flip(0) if t.dim() else t)


@check([23])
def backward_twice(point: Point) -> None:
    """A second backward through the same graph gives the same gradients."""
    _, dys, _ = point.plain()
    outputs = _tools.run(point.call, point.inputs)
    how = """
    outputs = run(call, inputs)
    expected = [g.clone() for g in pull(outputs, inputs, dys, retain_graph=True)]
    got = pull(outputs, inputs, dys)
    """
    first = [g.clone() for g in _tools.pull(outputs, point.inputs, dys, retain_graph=True)]
    try:
        second = _tools.pull(outputs, point.inputs, dys)
    except Exception as error:
        fail(
            point,
            "a second backward through a retained graph raises",
            expected="the same gradients",
            got=said(error),
            how=how,
            dys=dys,
        )
    compare(
        point,
        first,
        second,
        what="a second backward through the same graph gives other gradients",
        how=how,
        dys=dys,
        guess="the backward changes what was saved for it",
    )


@check([26])
def determinism(point: Point) -> None:
    """Run twice from one random state, it gives the same bits."""
    outputs, dys, got = point.plain()
    again = [y.detach() for y in _tools.run(point.call, point.inputs)]
    third = _tools.grads(point.call, point.inputs, dys)
    labels = point.labels(range(len(outputs)))
    for name, a, b in zip(labels, [*outputs, *got], [*again, *third], strict=True):
        if not same_numbers(a, b):
            error = float((a.double() - b.double()).abs().nan_to_num().max()) if not a.is_complex() else None
            fail(
                point,
                f"the {name} differs between two runs from the same random state",
                expected="the same bits",
                got="other bits",
                error=error,
                guess="randomness that torch.manual_seed does not reach, or a sum in a changing order",
                how="""
                def bits(a):
                    return [t.detach().double().tolist() if not t.is_complex() else t.tolist() for t in a]

                expected = bits([*run(call, inputs), *grads(call, inputs, dys)])
                got = bits([*run(call, inputs), *grads(call, inputs, dys)])
                """,
                dys=dys,
            )


@check([27])
def randomness(point: Point) -> None:
    """The backward does not draw random numbers of its own, nor depend on the random state."""
    _, dys, got = point.plain()
    for seed in (1, 2):
        outputs = _tools.run(point.call, point.inputs)
        torch.manual_seed(seed)
        compare(
            point,
            got,
            _tools.pull(outputs, point.inputs, dys),
            what="the gradient depends on the random state at the time of the backward",
            how=f"""
            expected = grads(call, inputs, dys)
            outputs = run(call, inputs)
            torch.manual_seed({seed})
            got = pull(outputs, inputs, dys)
            """,
            dys=dys,
            guess="the mask of the forward is drawn anew in the backward: save it, or its seed",
        )


@check([28])
def interleaved(point: Point) -> None:
    """A second forward before the backward changes nothing."""
    _, dys, got = point.plain()
    outputs = _tools.run(point.call, point.inputs)
    between = [x.detach() * 0.5 + 0.25 for x in point.inputs]
    later = _tools.run(point.call, [x.requires_grad_() for x in between])
    compare(
        point,
        got,
        _tools.pull(outputs, point.inputs, dys),
        what="the gradient is wrong when another forward ran in between",
        how="""
        expected = grads(call, inputs, dys)
        outputs = run(call, inputs)
        later = run(call, [(x.detach() * 0.5 + 0.25).requires_grad_() for x in inputs])
        got = pull(outputs, inputs, dys)
        """,
        dys=dys,
        guess="state is kept outside ctx: on the class, the module or in a global; the last call wins",
    )
    del later


@check([28])
def checkpoint(point: Point) -> None:
    """Under torch.utils.checkpoint, reentrant or not, the gradients are the same."""
    _, dys, got = point.plain()
    results = point.call(*map(_tools.leaf, point.inputs))
    nested = isinstance(results, tuple | list) and any(isinstance(r, tuple | list | dict) for r in results)
    for reentrant in (False,) if nested else (False, True):  # which sees no tensor within a tuple
        outputs = _tools.run(
            functools.partial(torch_checkpoint, point.call, use_reentrant=reentrant), point.inputs
        )
        how = f"""
        from torch.utils.checkpoint import checkpoint
        expected = grads(call, inputs, dys)
        torch.manual_seed(0)
        outputs = tensors_in(checkpoint(call, *inputs, use_reentrant={reentrant}))
        outputs = [outputs[i] for i in {point.differentiable}]
        torch.autograd.backward(outputs, [exact_copy(dy) for dy in dys])
        got = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
        """
        inputs = point.inputs
        for x in inputs:
            x.grad = None
        try:
            torch.autograd.backward([outputs[i] for i in point.differentiable], point.plain()[1])
        except Exception as error:
            fail(
                point,
                f"it raises under torch.utils.checkpoint(use_reentrant={reentrant})",
                expected="gradients",
                got=said(error),
                how=how,
                dys=dys,
            )
        found = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
        for x in inputs:
            x.grad = None
        compare(
            point,
            got,
            found,
            what=f"the gradients are others under torch.utils.checkpoint(use_reentrant={reentrant})",
            how=how,
            dys=dys,
            guess="state is kept outside ctx, or the recomputed forward is not the same",
        )


@check([20, 28])
def saved_tensor_hooks(point: Point) -> None:
    """Under saved-tensor hooks that hand back copies, as offloading does, the gradients are the same."""
    _, dys, got = point.plain()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        outputs = _tools.run(point.call, point.inputs)
    compare(
        point,
        got,
        _tools.pull(outputs, point.inputs, dys),
        what="the gradients are others under saved-tensor hooks",
        how="""
        expected = grads(call, inputs, dys)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
            outputs = run(call, inputs)
        got = pull(outputs, inputs, dys)
        """,
        dys=dys,
        guess="the identity or address of a saved tensor is relied on",
    )


@check([28])
def module_copies(point: Point) -> None:
    """A deep copy and a pickled copy of a module give the same outputs and gradients."""
    if point.subject.kind != "module":
        raise Skipped("it is not a module")
    outputs, dys, got = point.plain()
    module = point.subject.target
    copies = {
        "a deep copy": lambda: copy.deepcopy(module),
        "a pickled copy": lambda: pickle.loads(pickle.dumps(module)),
    }
    labels = point.labels(range(len(outputs)))
    for words, make in copies.items():
        try:
            twin = make()
        except Exception as error:
            if words == "a pickled copy":
                raise Refused(f"pickle: {said(error)}") from error
            raise
        call = point.bind(Subject.of(twin).call)
        again = _tools.run(call, point.inputs)
        compare(
            point,
            [*outputs, *got],
            [*(y.detach() for y in again), *_tools.pull(again, point.inputs, dys)],
            what=f"{words} of the module computes something else",
            labels=labels,
            how=f"""
            import copy, pickle
            twin = {"copy.deepcopy(module)" if words == "a deep copy" else "pickle.loads(pickle.dumps(module))"}
            expected = [y.detach() for y in run(call, inputs)] + grads(call, inputs, dys)
            other = bind(stateful(twin))
            got = [y.detach() for y in run(other, inputs)] + grads(other, inputs, dys)
            """,
            dys=dys,
        )
