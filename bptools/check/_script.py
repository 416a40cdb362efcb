"""Standalone scripts that reproduce a failure with torch alone."""

from __future__ import annotations

import base64
import inspect
import io
import math
import pickle
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from bptools.check import _tools

if TYPE_CHECKING:
    from bptools.check._subject import Point

LITERAL = 256  # a tensor of up to so many numbers is written out

HEAD = '''"""{what}

{name} on: {sample}
Reproduces with torch alone: exits with 1 while the defect is there, with 0 once it is mended.
Written by bptools.check; found with torch {version}, seed {seed}.
"""
'''

TAIL = """

def same(a, b):
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.shape != b.shape:
            return False
        if not (a.is_floating_point() or a.is_complex()):
            return torch.equal(a, b)
        finite = a[a.abs().isfinite()].abs()
        scale = finite.max() if finite.numel() else 0.0
        eps = torch.finfo(a.dtype).eps
        allowed = 5 * eps**0.5 * torch.nan_to_num(a.abs(), posinf=0.0) + eps**0.6 * scale
        equal = (a == b) | (a.isnan() & b.isnan())
        return bool((equal | ((a - b.to(a.dtype)).abs() <= allowed)).all())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


torch.set_printoptions(precision=10)
print("expected:", expected)
print("got:     ", got)
if not same(expected, got):
    raise SystemExit(1)
print("mended: they are the same")
"""


def write(
    point: Point,
    what: str,
    how: str,
    uses: Sequence[Callable[..., Any]] = (),
    dys: Sequence[Tensor] = (),
) -> str:
    """The script.

    Args:
        point: the sample.
        what: the finding, for the head.
        how: code that computes `expected` and `got`; it may use `call`, `inputs`, `others`, `dys`, `reference`
            and `uses`.
        uses: functions to carry along.
        dys: the output gradients.
    """
    from bptools.check._check import describe

    helpers = dict.fromkeys((_tools.tensors_in, _tools.run, _tools.pull, _tools.grads, *uses))
    imports = {"import torch", "from torch.utils._pytree import tree_leaves"}
    setup: list[str] = []
    fn = _named("fn", point.subject.target, imports, setup)
    if point.subject.kind == "Function":
        fn += ".apply"
    elif point.subject.kind == "module":
        setup.append("def stateful(state, *args, **kwargs):")
        setup.append(f"    return torch.func.functional_call({fn}, dict(state), args, kwargs)\n")
        fn = "stateful"
    reference = ""
    if point.reference is not None and "reference" in how:
        reference = f"reference = bind({_named('reference_fn', point.reference, imports, setup)})\n"

    rendered = []
    variables = []
    for i, value in enumerate(point.leaves):
        if i in point.places:
            rendered.append(_Raw(f"inputs[{point.places.index(i)}]"))
        elif isinstance(value, Tensor):
            variables.append(f"t{i} = {_tensor(value)}  # {point.leaf_names[i]}")
            rendered.append(_Raw(f"t{i}"))
        else:
            rendered.append(value if _printable(value) else _Raw(_constant(value, imports)))
    args, kwargs = tree_unflatten(rendered, point.spec)
    inputs = [
        f"    {_tensor(x)}.requires_grad_(),  # {name}" for x, name in zip(point.inputs, point.names, strict=True)
    ]
    copies = "    inputs = [x.clone() for x in inputs]  # it writes over its input\n" if point.in_place else ""
    parts = [
        HEAD.format(
            what=what, name=point.subject.name, sample=describe(point), version=torch.__version__, seed=point.seed
        ),
        "\n".join(sorted(imports, key=lambda line: (not line.startswith("import"), line))),
        "\n",
        *[f"\n\n{inspect.getsource(helper).rstrip()}\n" for helper in helpers],
        "\n\n" + "\n".join(setup) + "\n" if setup else "\n\n",
        "\n".join(variables) + "\n" if variables else "",
        "inputs = [\n" + "\n".join(inputs) + "\n]\n",
        "\n\ndef bind(function):\n    def call(*inputs):\n"
        + textwrap.indent(copies, "    ")
        + f"        args, kwargs = {args!r}, {kwargs!r}\n"
        + "        return function(*args, **kwargs)\n\n    return call\n",
        f"\n\ncall = bind({fn})\n",
        reference,
        "others = [" + ", ".join(v.split(" = ")[0] for v in variables) + "]\n",
        "dys = [" + ", ".join(_tensor(dy) for dy in dys) + "]\n",
        textwrap.dedent(how).strip() + "\n",
        TAIL,
    ]
    return "".join(parts)


class _Raw:
    """Code among values that are printed by repr."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __repr__(self) -> str:
        return self.code


def _printable(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str | torch.dtype | torch.device | torch.Size)


def _constant(value: Any, imports: set[str]) -> str:
    if isinstance(value, float):
        return f"float({str(value)!r})"
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return str(value)
    setup: list[str] = []
    return _named("constant", value, imports, setup) if not setup else "None"


def _tensor(t: Tensor) -> str:
    """An expression for a tensor, its memory layout included."""
    t = t.detach()
    if t.numel() == 0:
        return f"torch.empty({tuple(t.shape)}, dtype={t.dtype})"
    dense = t.is_contiguous()
    flat = t.reshape(-1) if dense else _span(t)
    if flat.numel() <= LITERAL:
        numbers = flat.tolist()
        listed = "[" + ", ".join(_literal(v) for v in numbers) + "]"
        code = f"torch.tensor({listed}, dtype={t.dtype})"
    else:
        buffer = io.BytesIO()
        torch.save(flat.clone(), buffer)
        text = base64.b64encode(buffer.getvalue()).decode()
        code = f"torch.load(__import__('io').BytesIO(__import__('base64').b64decode('{text}')), weights_only=True)"
    if dense:
        return code if t.dim() == 1 else f"{code}.view({tuple(t.shape)})"
    return f"{code}.as_strided({tuple(t.shape)}, {t.stride()})"


def _span(t: Tensor) -> Tensor:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return torch.as_strided(t, (last + 1,), (1,), t.storage_offset())


def _literal(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, complex):
        return f"complex({_literal(value.real)}, {_literal(value.imag)})"
    return repr(value)


def _named(variable: str, target: Any, imports: set[str], setup: list[str]) -> str:
    """An expression for an object: imported, copied from its source, or unpickled."""
    if isinstance(target, torch.library.CustomOpDef):
        _import_module(target._init_fn.__module__, imports, setup)
        namespace, name = target._qualname.split("::")
        return f"torch.ops.{namespace}.{name}"
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return f"torch.ops.{target}"
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if module and name and _reachable(target, module, name):
        _import_module(module, imports, setup)
        return f"{module}.{name}"
    if isinstance(target, nn.Module):
        try:
            text = base64.b64encode(pickle.dumps(target)).decode()
        except Exception:
            return f"{variable}  # not picklable: build it here as for the audit: {type(target).__name__}"
        imports.add("import base64")
        imports.add("import pickle")
        return f"pickle.loads(base64.b64decode({text!r}))"
    try:
        source = textwrap.dedent(inspect.getsource(target))
    except (OSError, TypeError):
        source = ""
    if source.startswith(("class ", "def ", "@")):
        setup.append(source)
        return target.__name__
    setup.append(f"{variable} = None  # it could not be imported or copied: put {target!r} here")
    return variable


def _reachable(target: Any, module: str, name: str) -> bool:
    if module == "__main__" or "<" in name:
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is target


def _import_module(module: str, imports: set[str], setup: list[str]) -> None:
    file = getattr(sys.modules.get(module), "__file__", None)
    if file and not {"site-packages", "dist-packages"} & set(Path(file).parts):
        root = Path(file).resolve().parents[module.count(".") + (Path(file).name == "__init__.py")]
        imports.add("import sys")
        setup.append(f"sys.path.insert(0, {str(root)!r})")
    setup.append(f"import {module}")
