"""Standalone scripts that reproduce a failure with torch alone.

What is audited is imported where it can be, so that the script sees it mended; what cannot be imported (it is
defined in a function, or in the file that was run) is copied with all that it refers to. Where neither works there
is no script.
"""

from __future__ import annotations

import ast
import base64
import builtins
import enum
import functools
import inspect
import io
import math
import pickle
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from bptools.check import _tools

if TYPE_CHECKING:
    from bptools.check._subject import Point

LITERAL = 256  # a tensor of up to so many numbers is written out

HEAD = """{what}

{name} on: {sample}
Reproduces with torch alone: exits with 1 while the defect is there, with 0 once it is mended.
Written by bptools.check; found with torch {version}, seed {seed}.
"""

STATEFUL = """

def stateful(module):
    return lambda state, *args, **kwargs: torch.func.functional_call(module, dict(state), args, kwargs)
"""

BIND = """

def bind(function{option}):
    def call(*inputs):
{body}        args, kwargs = {args!r}, {kwargs!r}
        return function(*args, **kwargs)

    return call


"""

TAIL = """

def same(a, b):
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.shape != b.shape:
            return False
        if not (a.is_floating_point() or a.is_complex()):
            return torch.equal(a, b)
        finite = a[a.abs().isfinite()].abs()
        scale = finite.max() if finite.numel() else 0.0
        info = torch.finfo(a.dtype)
        floor = 8 * info.eps * max([float(dy.abs().max()) for dy in dys if dy.numel()], default=0.0)
        allowed = 5 * info.eps**0.5 * torch.nan_to_num(a.abs(), posinf=0.0) + info.eps**0.6 * scale
        equal = (a == b) | (a.isnan() & b.isnan())
        return bool((equal | ((a - b.to(a.dtype)).abs() <= allowed + floor + info.tiny)).all())
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

SPACES = (torch, nn.functional, torch.linalg, torch.special, torch.fft, torch.Tensor)
OWN = {
    "call",
    "direct",
    "reference",
    "inputs",
    "others",
    "dys",
    "bind",
    "stateful",
    "module",
    "same",
    "expected",
    "got",
}


def write(
    point: Point,
    what: str,
    how: str,
    uses: Sequence[Callable[..., Any]] = (),
    dys: Sequence[Tensor] = (),
) -> str | None:
    """The script, or None where no script would tell.

    Args:
        point: the sample.
        what: the finding, for the head.
        how: code that computes `expected` and `got`. It may use `call`, `inputs`, `others` and `dys`; `direct`,
            which is `call` handed the tensors themselves instead of copies; `reference`; for a module `module`,
            and `bind(stateful(twin))`, a call of its twin; and `uses`.
        uses: functions to carry along.
        dys: the output gradients.
    """
    if not how:
        return None
    try:
        text = _write(point, what, textwrap.dedent(how).strip(), uses, dys)
    except _Untold:
        return None
    return None if _undefined(text) else text


def _write(point: Point, what: str, how: str, uses: Sequence[Callable[..., Any]], dys: Sequence[Tensor]) -> str:
    from bptools.check._check import describe

    helpers = dict.fromkeys((_tools.tensors_in, _tools.exact_copy, _tools.run, _tools.pull, _tools.grads, *uses))
    held = [i for i, a in enumerate(point.leaves) if isinstance(a, Tensor) and i not in point.places]
    copies = bool(held) or point.overwrites  # and then `direct` is another than `call`
    scope = _Scope(OWN | {helper.__name__ for helper in helpers})
    function, lines = _callable(scope, point.subject.target), []
    if point.subject.kind == "module":
        lines.append(f"module = {function}")
        function = "stateful(module)"
    lines.append(f"call = bind({function})")
    if "direct" in how:
        lines.append(f"direct = bind({function}, fresh=False)" if copies else "direct = call")
    if "reference" in how:
        lines.append(f"reference = bind({_callable(scope, point.reference)})")

    code = []
    for i, value in enumerate(point.leaves):
        if i in point.places:
            code.append(_Raw(f"inputs[{point.places.index(i)}]"))
        else:
            code.append(_Raw(f"t{i}" if i in held else scope.expression(value)))
    args, kwargs = tree_unflatten(code, point.spec)
    body = ""
    if held:
        body += f"        {''.join(f't{i}, ' for i in held)[:-1]} = map(exact_copy, others) if fresh else others\n"
    if point.in_place:
        body += "        inputs = [x.clone() for x in inputs]  # it writes over its input\n"
    elif point.overwrites:
        body += "        inputs = [x.clone() for x in inputs] if fresh else inputs  # it writes over its input\n"
    inputs = [(f"{_tensor(x)}.requires_grad_()", n) for x, n in zip(point.inputs, point.names, strict=True)]
    others = [(_tensor(point.leaves[i]), point.leaf_names[i]) for i in held]
    head = HEAD.format(
        what=what, name=point.subject.name, sample=describe(point), version=torch.__version__, seed=point.seed
    )
    quotes = '"' * 3
    text = [
        quotes + head.replace("\\", "\\\\").replace(quotes, "'''") + f"{quotes}\n\n",
        "from __future__ import annotations\n\n" if scope.copied else "",
        "\n".join(sorted(scope.imports, key=lambda line: (not line.startswith("import"), line))),
        "\n",
        *[f"\n\n{inspect.getsource(helper).rstrip()}\n" for helper in helpers],
        STATEFUL if "stateful(" in "".join((*lines, how)) else "",
        "\n\n" + "\n".join(scope.setup) + "\n" if scope.setup else "\n\n",
        _list("inputs", inputs),
        _list("others", others),
        BIND.format(option=", fresh=True" if copies else "", body=body, args=args, kwargs=kwargs),
        "\n".join(lines),
        "\ndys = [" + ", ".join(_tensor(dy) for dy in dys) + "]\n",
        how,
        "\n",
        TAIL,
    ]
    return "".join(text)


def _list(name: str, items: list[tuple[str, str]]) -> str:
    if not items:
        return f"{name} = []\n"
    return f"{name} = [\n" + "".join(f"    {code},  # {comment}\n" for code, comment in items) + "]\n"


def _callable(scope: _Scope, target: Any) -> str:
    """An expression for what the script calls."""
    from bptools.check._subject import _stateful

    if isinstance(target, functools.partial) and target.func is _stateful:
        return f"stateful({scope.expression(target.args[0])})"
    expression = scope.expression(target)
    is_function = isinstance(target, type) and issubclass(target, torch.autograd.Function)
    return f"{expression}.apply" if is_function else expression


class _Untold(Exception):
    """There is no code for this."""


class _Raw:
    """Code among values that are printed by repr."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __repr__(self) -> str:
        return self.code


class _Scope:
    """What stands above a script's own code: imports, and copies of what cannot be imported.

    Attributes:
        imports: lines of it.
        setup: definitions, each after what it needs.
        copied: the objects that were copied, by name.
    """

    def __init__(self, taken: set[str]) -> None:
        self.taken = taken
        self.imports = {"import torch", "from torch.utils._pytree import tree_leaves"}
        self.setup: list[str] = []
        self.copied: dict[str, Any] = {}

    def expression(self, value: Any) -> str:
        """Code for a value: a literal, the path of something imported, the name of a copy, or a pickle."""
        if value is None or (
            isinstance(value, bool | int | str | bytes | float | complex) and not isinstance(value, enum.Enum)
        ):
            return _literal(value)
        if isinstance(value, Tensor):
            return _tensor(value)
        if isinstance(value, torch.device):
            return f"torch.device({str(value)!r})"
        if isinstance(
            value, torch.dtype | torch.layout | torch.memory_format | slice | range | types.EllipsisType
        ):
            return repr(value)
        if type(value) in (list, tuple, dict, set, torch.Size):
            return repr(_rendered(value, self.expression))
        if isinstance(value, types.ModuleType):
            self._import(value.__name__)
            return value.__name__
        if isinstance(value, enum.Enum):
            return f"{self.expression(type(value))}.{value.name}"
        return self._object(value)

    def _object(self, value: Any) -> str:
        if isinstance(value, torch.library.CustomOpDef):
            origin = value._init_fn
            if not _reachable(value, origin.__module__, origin.__qualname__):
                raise _Untold  # its registrations are calls, wherever they stand
            self._import(origin.__module__)
            return f"{origin.__module__}.{origin.__qualname__}"
        if isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            return f"torch.ops.{value}"
        name = getattr(value, "__name__", None)
        for space in SPACES:
            if name and getattr(space, name, None) is value:
                return f"{'torch' if space is torch else _path(space)}.{name}"
        if isinstance(value, functools.partial):
            self.imports.add("import functools")
            parts = [value.func, *value.args]
            words = [self.expression(p) for p in parts]
            words += [f"{k}={self.expression(v)}" for k, v in value.keywords.items()]
            return f"functools.partial({', '.join(words)})"
        module, path = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if module and path and _reachable(value, module, path):
            self._import(module)
            return f"{module}.{path}"
        owner = getattr(value, "__self__", None)
        if name and owner is not None and not isinstance(owner, types.ModuleType):
            return f"{self.expression(owner)}.{name}"
        if isinstance(value, type | types.FunctionType):
            return self._copy(value)
        return self._pickle(value)

    def _import(self, module: str) -> None:
        file = getattr(sys.modules.get(module), "__file__", None)
        if module == "__main__" or module not in sys.modules:
            raise _Untold
        lines = [f"import {module}"]
        if file and not {"site-packages", "dist-packages"} & set(Path(file).parts) and not _is_standard(module):
            root = Path(file).resolve().parents[module.count(".") + (Path(file).name == "__init__.py")]
            self.imports.add("import sys")
            lines.insert(0, f"sys.path.insert(0, {str(root)!r})")
        self.setup += [line for line in lines if line not in self.setup and line not in self.imports]

    def _copy(self, value: Any) -> str:
        """Define a function or class by its source, after all that it refers to."""
        is_lambda = value.__name__ == "<lambda>"
        name = f"function_{len(self.copied)}" if is_lambda else value.__name__
        if self.copied.get(name) is value:
            return name
        if name in self.taken or name in self.copied:
            raise _Untold  # two things of one name
        self.copied[name] = value
        try:
            source = textwrap.dedent(inspect.getsource(value))
        except (OSError, TypeError) as error:
            raise _Untold from error
        if is_lambda:
            source = f"{name} = {_lambda(source, value)}\n"
        if _undefined(source) is None:
            raise _Untold
        around = _surroundings(value)
        for needed in sorted(_undefined(source) or ()):
            if needed not in around:
                raise _Untold
            self._define(needed, around[needed])
        self.setup.append(f"\n{source}" if not is_lambda else source.rstrip())
        return name

    def _define(self, name: str, value: Any) -> None:
        """Let a name of copied code mean what it meant there."""
        if name == "torch" and value is torch:
            return
        if self.copied.get(name, self) is value:
            return
        if name in self.taken or name in self.copied:
            raise _Untold
        expression = self.expression(value)
        self.copied[name] = value
        if expression != name:
            self.setup.append(f"{name} = {expression}")

    def _pickle(self, value: Any) -> str:
        buffer = io.BytesIO()
        pickler = _Pickler(buffer)
        try:
            pickler.dump(value)
        except Exception as error:
            raise _Untold from error
        for needed in pickler.named:
            if needed.__module__ == "__main__":
                self._copy(needed)  # the script is __main__ in its turn
            elif needed.__module__.partition(".")[0] not in ("torch", "builtins"):
                self._import(needed.__module__)
        self.imports |= {"import base64", "import pickle"}
        return f"pickle.loads(base64.b64decode({base64.b64encode(buffer.getvalue()).decode()!r}))"


class _Pickler(pickle.Pickler):
    """Notes the classes and functions that a pickle refers to by name."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.named: list[Any] = []

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, type | types.FunctionType):
            self.named.append(value)
        return NotImplemented


def _rendered(value: Any, expression: Callable[[Any], str]) -> Any:
    if isinstance(value, torch.Size):
        return _Raw(f"torch.Size({list(value)!r})")
    if isinstance(value, dict):
        return {_Raw(expression(k)): _Raw(expression(v)) for k, v in value.items()}
    return type(value)(_Raw(expression(v)) for v in value)


def _literal(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, complex):
        return f"complex({_literal(value.real)}, {_literal(value.imag)})"
    return repr(value)


def _tensor(t: Tensor) -> str:
    """An expression for a tensor, its memory layout included."""
    if t.layout is not torch.strided or t.is_quantized:
        raise _Untold
    t = t.detach().resolve_conj().resolve_neg()
    where = "" if t.device.type == "cpu" else f", device={t.device.type!r}"
    if t.numel() == 0:
        return f"torch.empty({tuple(t.shape)}, dtype={t.dtype}{where})"
    dense = t.is_contiguous()
    flat = t.reshape(-1) if dense else _span(t)
    if flat.numel() <= LITERAL:
        listed = "[" + ", ".join(_literal(v) for v in flat.tolist()) + "]"
        code = f"torch.tensor({listed}, dtype={t.dtype}{where})"
    else:
        buffer = io.BytesIO()
        torch.save(flat.cpu().clone(), buffer)
        text = base64.b64encode(buffer.getvalue()).decode()
        code = f"torch.load(__import__('io').BytesIO(__import__('base64').b64decode('{text}')), weights_only=True)"
        code += f".to({t.device.type!r})" if where else ""
    if dense:
        return code if t.dim() == 1 else f"{code}.view({tuple(t.shape)})"
    return f"{code}.as_strided({tuple(t.shape)}, {t.stride()})"


def _span(t: Tensor) -> Tensor:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return torch.as_strided(t, (last + 1,), (1,), t.storage_offset())


# Names --------------------------------------------------------------------------------------------------------


def _path(space: Any) -> str:
    return space.__name__ if isinstance(space, types.ModuleType) else f"{space.__module__}.{space.__qualname__}"


def _reachable(target: Any, module: str, name: str) -> bool:
    """Whether an import finds it."""
    if module == "__main__" or "<" in name:
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is target


def _is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _undefined(source: str) -> set[str] | None:
    """The names that code uses and does not define itself, annotations aside; None if it is no code."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    used, defined = set(), set(dir(builtins)) | {"__file__", "__name__", "__class__"}
    for node in _nodes(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.alias):
            defined.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            defined.add(node.name)
    return used - defined


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _nodes(child)


def _surroundings(value: Any) -> dict[str, Any]:
    """What the names in the source of a function or class mean."""
    if isinstance(value, types.FunctionType):
        return {**value.__globals__, **_closure(value)}
    around = {**vars(sys.modules[value.__module__]), **{base.__name__: base for base in value.__bases__}}
    for member in vars(value).values():
        function = getattr(member, "__func__", member)
        if isinstance(function, types.FunctionType):
            around |= _closure(function)
    return around


def _closure(function: types.FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue  # not assigned yet
    return found


def _lambda(source: str, value: types.FunctionType) -> str:
    """The lambda in the lines around it."""
    found = set()
    start = source.find("lambda")
    while start >= 0:
        for end in range(len(source), start, -1):
            try:
                tree = ast.parse(f"({source[start:end]}\n)", mode="eval")
            except (SyntaxError, ValueError):
                continue
            if isinstance(tree.body, ast.Lambda):
                text = ast.unparse(tree)
                inner = [c for c in compile(text, "", "eval").co_consts if isinstance(c, types.CodeType)]
                if inner and _shape(inner[0]) == _shape(value.__code__):
                    found.add(text)
                break
        start = source.find("lambda", start + 1)
    if len(found) != 1:
        raise _Untold
    return found.pop()


def _shape(code: types.CodeType) -> tuple[Any, ...]:
    return (
        code.co_varnames,
        {*code.co_names, *code.co_freevars},
        {c for c in code.co_consts if isinstance(c, int | float)},
    )
