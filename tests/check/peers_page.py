"""The page that audit_peers.py writes: a table of all targets, and what was looked at by hand."""

from __future__ import annotations

import json
from pathlib import Path

from audit_peers import CLASSES, failures, slug

# What a check reports, and what is meant to be so or is a matter of how the target was called. Not counted.
BY_DESIGN: dict[tuple[str, str], dict[str, str]] = {
    ("torch", "CheckpointFunction"): {"*": "refuses torch.autograd.grad, which the auditor calls; documented"},
    ("torch", "_Dirichlet"): {"*": "draws by rejection: implicit reparametrisation is no derivative at one seed"},
    ("torch", "LOBPCGAutogradFunction"): {"dtypes": "an iteration asked for 1e-12 in float32"},
    ("torch", "FakeQuantPerChannel"): {"*": "float32 only"},
    ("peft", "VeloraFunction"): {"double_backward": "its first gradient is an approximation"},
    ("flash-linear-attention", "L2Wrap"): {
        "double_backward": "the gradient of a penalty that is not in its output"
    },
    ("transformers", "YosoCumulation"): {"double_backward": "its first gradient is a bound"},
    ("transformers", "SqrtBoundDerivative"): {"magnitudes": "clips the gradient"},
    ("transformers", "PhimoeMultiplier"): dict.fromkeys(
        ("magnitudes", "kinks", "overflow", "double_backward"),
        "masked_gates is an argument of its own, and is not moved with the scores",
    ),
    ("torchvision", "roi_pool"): {"kinks": "ties: one of several right choices"},
    ("bitsandbytes", "MatMul8bitLt"): dict.fromkeys(
        ("values", "gradients", "dtypes", "overflow", "magnitudes", "kinks", "double_backward"),
        "quantises the activations",
    ),
    ("bitsandbytes", "MatMul8bitFp"): dict.fromkeys(
        ("values", "gradients", "magnitudes", "kinks", "double_backward"), "the weight is rebuilt in float32"
    ),
    ("xformers", "_SwiGLUDecomposedFunc"): dict.fromkeys(
        ("gradients", "linearity", "magnitudes", "kinks", "empty"),
        "the sigmoid of backward is in float32: errors of 4e-7",
    ),
    ("torchao", "LsqBinaryTernaryExtension"): {
        "magnitudes": "its step has a floor",
        "double_backward": "a straight-through estimator",
    },
    ("torchao", "ApplyMask"): {"*": "its docstring calls it a straight-through estimator (of a product)"},
    ("kornia", "_NullSpaceBasis"): {"empty": "of five rows only", "kinks": "singular: refused"},
    ("entmax", "EntmaxBisectFunction"): dict.fromkeys(
        ("magnitudes", "kinks", "special_values"), "alpha is moved out of its domain"
    ),
    ("liger-kernel", "LigerJSDFunction"): {"empty": "a loss of 0 of nothing, and not NaN"},
}
# The samples of `empty` point into a dimension that is gone, or divide by a size of 0: the crash is noted below.
_INDEXED = "the derived sample is no valid one (boxes of images that are gone), though a crash is no answer to it"
for _name in ("roi_align", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
    BY_DESIGN[("torchvision", _name)] = {"empty": _INDEXED}

# Verified by hand: (package, target, title, text, script or ""). Scripts exit with 1 while the defect is there.
FINDINGS: tuple[tuple[str, str, str, str, str], ...] = (
    (
        "peft",
        "BlockCircularConvolution",
        "the gradient of x is wrong (C3A)",
        "The backward is not the transpose of its forward: the gradient of x differs from the numerical "
        "derivative by more than its own size. That of w is right.",
        """
import torch
from peft.tuners.c3a.utils import BlockCircularConvolution

torch.manual_seed(0)
x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
w = torch.randn(3, 2, 4, dtype=torch.float64)
dy, v = torch.randn(2, 12, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
(dx,) = torch.autograd.grad(BlockCircularConvolution.apply(x, w), x, dy)
with torch.no_grad():  # linear in x: the difference is the derivative
    true = (dy * (BlockCircularConvolution.apply(x + v, w) - BlockCircularConvolution.apply(x, w))).sum()
print("expected", true.item(), "got", (dx * v).sum().item())
raise SystemExit(not torch.isclose(true, (dx * v).sum()))
""",
    ),
    (
        "peft",
        "HadaWeightCP",
        "the gradients of w1a and w2a are wrong (LoHa of a convolution)",
        "They are computed with each other's factors.",
        """
import torch
from peft.tuners.loha.layer import HadaWeightCP

torch.manual_seed(0)
t1, t2 = (torch.randn(3, 3, 2, 2, dtype=torch.float64) for _ in range(2))
w1a, w2a = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
w1b, w2b = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
scale = torch.tensor(0.5, dtype=torch.float64)
f = lambda a: HadaWeightCP.apply(t1, a, w1b, t2, w2a, w2b, scale)
y = f(w1a)
dy, v = torch.randn_like(y), torch.randn_like(w1a)
(dw,) = torch.autograd.grad(y, w1a, dy)
true = (dy * (f(w1a + v) - f(w1a))).sum()  # linear in w1a: the difference is the derivative
print("expected", true.item(), "got", (dw * v).sum().item())
raise SystemExit(not torch.isclose(true, (dw * v).sum()))
""",
    ),
    (
        "torch",
        "CrossMapLRN2d",
        "neither the forward nor the gradient is right",
        "The running sum of squares never drops the first channel, so that the forward is not the LRN of "
        "`torch.nn.functional.local_response_norm`; the backward is the gradient of neither.",
        """
import torch

torch.manual_seed(0)
x = torch.randn(1, 5, 1, 1, dtype=torch.float64, requires_grad=True)
f = torch.nn.CrossMapLRN2d(3, 0.5, 0.75, 1.0)
y, right = f(x).flatten(), torch.nn.functional.local_response_norm(x, 3, 0.5, 0.75, 1.0).flatten()
print("forward: expected", right.tolist(), "got", y.tolist())
dy, v = torch.randn_like(x), torch.randn_like(x)
(dx,) = torch.autograd.grad(f(x), x, dy)
h = 1e-6
true = (dy * (f(x + h * v) - f(x - h * v))).sum() / (2 * h)
print("slope of its own forward", true.item(), "got", (dx * v).sum().item())
raise SystemExit(not (torch.allclose(y, right) and torch.isclose(true, (dx * v).sum(), rtol=1e-5)))
""",
    ),
    (
        "torch",
        "scan",
        "the second derivative is silently wrong; tensors that were written to are not noticed",
        "`torch._higher_order_ops.scan` (ScanAutogradOp). First derivatives are right. A gradient of its gradient "
        "comes back without complaint, and is another one than that of the same loop in Python. `xs` written to "
        "between forward and backward changes the gradient in silence, where the loop raises.",
        """
import torch
from torch._higher_order_ops import scan

def step(carry, x):
    carry = torch.tanh(carry * 0.5 + x)
    return carry, carry * x

def loop(carry, xs):
    out = []
    for x in xs:
        carry, y = step(carry, x)
        out.append(y)
    return carry, torch.stack(out)

torch.manual_seed(0)
init = torch.randn(3, dtype=torch.float64, requires_grad=True)
xs = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

def second(f):
    carry, ys = f(init, xs)
    dinit, dxs = torch.autograd.grad(carry.sum() + (ys**2).sum(), (init, xs), create_graph=True)
    return torch.autograd.grad((dinit**2).sum() + (dxs**3).sum(), init)[0]

expected, got = second(loop), second(lambda init, xs: scan(step, init, xs))
print("expected", expected.tolist(), "got", got.tolist())
raise SystemExit(not torch.allclose(expected, got))
""",
    ),
    (
        "torch",
        "_fake_quantize_learnable_per_tensor_affine",
        "on an empty input the gradients of scale and zero_point are scale and zero_point",
        "They should be zero: nothing depends on them.",
        """
import torch

x = torch.randn(0, 5, requires_grad=True)
scale, zero = torch.tensor([0.1], requires_grad=True), torch.tensor([2.0], requires_grad=True)
y = torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, -8, 7, 1.0)
got = torch.autograd.grad(y.sum(), (scale, zero))
print("expected 0 and 0, got", got[0].item(), got[1].item())
raise SystemExit(bool(got[0].any() or got[1].any()))
""",
    ),
    (
        "transformers",
        "GeLUFunction",
        "in float16 the gradient is NaN beyond |x| = 782 (bloom)",
        "0.107 x² overflows float16 and meets 1 - tanh² = 0. `torch.nn.functional.gelu` gives 1 and 0 there.",
        """
import torch
from transformers.models.bloom.modeling_bloom import GeLUFunction

x = torch.tensor([700.0, 800.0, 1000.0, -1000.0], dtype=torch.float16, requires_grad=True)
(got,) = torch.autograd.grad(GeLUFunction.apply(x).sum(), x)
(expected,) = torch.autograd.grad(torch.nn.functional.gelu(x, approximate="tanh").sum(), x)
print("expected", expected.tolist(), "got", got.tolist())
raise SystemExit(bool(got.isnan().any()))
""",
    ),
    (
        "entmax",
        "Entmax15Function",
        "second derivatives are NaN as soon as one probability is 0",
        "The backward takes the square root of the output, whose derivative at 0 is infinite and is multiplied by "
        "0. Nothing refuses it (a gradient penalty would meet it).",
        """
import torch
from entmax.activations import Entmax15Function

x = torch.tensor([[1.0, 0.5, -3.0, 0.5]], dtype=torch.float64, requires_grad=True)

def second(x, z):
    y = Entmax15Function.apply(z, -1)
    (dx,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    return torch.autograd.grad((dx**2).sum(), x)[0]

expected = second(x, x[:, [0, 1, 3]])  # the third is outside of the support, and may as well be absent
got = second(x, x)
print("expected", expected.tolist(), "got", got.tolist())
raise SystemExit(not torch.allclose(expected, got))
""",
    ),
    (
        "torchvision",
        "roi_align",
        "forward mode is silently zero (all five ops)",
        "`torch.func.jvp` of roi_align, roi_pool, ps_roi_align, ps_roi_pool and deform_conv2d gives zeros and no "
        "error: the tangent is dropped. It is so for operators with a Python backward in general "
        "(transformers' grouped_mm_fallback too), and more torch's doing than theirs.",
        """
import torch
import torchvision

x = torch.randn(1, 1, 5, 5, dtype=torch.float64)
box = torch.tensor([[0, 0, 0, 3.0, 3.0]], dtype=torch.float64)
f = lambda x: torchvision.ops.roi_align(x, box, (2, 2))
y, got = torch.func.jvp(f, (x,), (x,))
print("expected (linear)", y.flatten().tolist(), "got", got.flatten().tolist())
raise SystemExit(not torch.allclose(y, got))
""",
    ),
    (
        "liger-kernel",
        "LigerFusedLinearKLDivFunction",
        "gradients are wrong where input or weight is transposed in memory and dY is not 1 (JSD as well)",
        "`zeros_like` keeps the strides, and the kernel that multiplies the gradient by dY reads it as "
        "contiguous. With dY = 3 and a transposed weight the gradient is off by 16.2 where its largest number is "
        "1.38; with dY = 1 the kernel is skipped, and all is well. Also: a second backward multiplies by dY "
        "again.",
        "",
    ),
    (
        "unsloth_zoo",
        "UnslothFusedLoss",
        "the output gradient is ignored",
        "A comment says that it is assumed to be 1. Whoever scales or sums the loss gets the wrong gradients: "
        "with dY = 0.66 expected 0.3257, got 0.4925 for an element of the bias; with dY = 0 the gradient is not "
        "0.",
        "",
    ),
    (
        "unsloth",
        "Fast_RMS_Layernorm",
        "an expanded output gradient is read and written out of bounds (Fast_Layernorm and Fast_RoPE too)",
        "The last stride of dY is taken for 1. `y.sum().backward()` gives strides of 0: in the interpreter the "
        "heap is corrupted and the process dies; a dY that is a slice gives wrong numbers. So does a strided X.",
        "",
    ),
    (
        "unsloth",
        "Fast_CrossEntropyLoss",
        "with softcapping, padding past the vocabulary counts in the logsumexp",
        "tanh of the padding's -inf is -1, so that it adds exp(-softcap) for each padded column.",
        "",
    ),
    (
        "liger-kernel",
        "LigerFusedGateUpSiLUMulFunction",
        "a 3-D input, which its docstring allows, is refused in backward",
        "The gradient comes back 2-D: 'returned an invalid gradient at index 0'.",
        "",
    ),
    (
        "liger-kernel",
        "LigerSiLUMulFunction",
        "the backward writes the gradients over the caller's tensors",
        "As do GELUMul, FusedGateUpSiLUMul (in_place), cross entropy (in forward), RMSNorm and PolyNorm (over "
        "dY), and unsloth's kernels. Whoever reads the tensor again, or goes backward twice, gets other numbers.",
        "",
    ),
)

_CELL = "; "


def page(targets, folder: Path) -> str:
    """The Markdown page of all reports in a folder."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    versions = {f["package"]: f["version"] for f in found.values()}
    some = next(iter(found.values()))
    rows, totals = [], dict.fromkeys((*CLASSES, "run", "clean", "design", "dead"), 0)
    for target in targets:
        report = found.get(slug(target.package, target.name))
        if report is None:
            rows.append(f"| {target.package} | {target.name} | not run | | | | |")
            continue
        rows.append(_row(target, report, totals))
    lines = [
        "# Other people's autograd.Functions under the auditor",
        "",
        f"`bptools.check` was asked about {len(targets)} Functions and operators of other packages, those that "
        "run on a CPU. This page is written by `tests/check/audit_peers.py`; the findings further down were "
        "verified by hand, with plain torch.",
        "",
        "To run it (two environments, because unsloth pins an older transformers than the others take; "
        "a C++ compiler and a GPU are not needed):",
        "",
        "```",
        "uv venv peers --python 3.11",
        'uv pip install --python peers -e . "torch==2.15.0" liger-kernel timm peft torchvision transformers \\',
        "    bitsandbytes entmax kornia torchao flash-linear-attention",
        "uv venv peers-unsloth --python 3.11",
        'uv pip install --python peers-unsloth -e . "torch==2.15.0" unsloth unsloth-zoo',
        "peers/bin/python tests/check/audit_peers.py --json reports",
        "peers-unsloth/bin/python tests/check/audit_peers.py --json reports --write PEERS.md",
        "```",
        "",
        "Versions: " + ", ".join(f"{p} {v}" for p, v in sorted(versions.items())) + f"; triton {some['triton']}, "
        f"Python {some['python']}. Machine: two cores of an x86-64 server, no GPU.",
        "",
        "Functions in plain torch are asked the default checks in float64, float32, bfloat16 and float16. Triton "
        "kernels run in Triton's interpreter (marked *), in float32, which they compute in whatever they are "
        "given; `double_backward` and `raw_gradients` in float64 too. There `compiled`, `vmap`, "
        "`batched_gradients` and `jvp` are left out, because under a transform the interpreter has no numbers to "
        "work on, and `autocast`, `dtypes` and `overflow`, because its bfloat16 is garbage.",
        "",
        "What fails is sorted into (a) wrong values or gradients, and crashes; (b) side effects: arguments, "
        "output gradients or saved tensors written to, tensors kept on ctx, a second backward that differs; (c) "
        "contract: `needs_input_grad` ignored, a gradient that is not reduced or of another dtype or layout, a "
        "clear error, a second derivative that is silently absent (no `once_differentiable`), `torch.func` "
        "refused (func). In brackets: what is so by design, or the sample's fault, and is counted in no class. "
        "Unsupported is what a Function refuses by an error, as it may.",
        "",
        f"Of {totals['run']} targets that ran, {totals['clean']} have no failure at all; {totals['a']} have one "
        f"of class (a), {totals['b']} of class (b), {totals['c']} of class (c); {totals['dead']} do not run.",
        "",
        "A target in class (a) has a verdict of the auditor; those verified by hand are under Findings.",
        "",
        "| package | target | pass | unsupported | (a) wrong | (b) side effects | (c) contract |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "## Findings",
        "",
    ]
    for package, name, title, text, script in FINDINGS:
        version = versions.get(package, "not run")
        lines += [f"### {package} {version}, {name}: {title}", "", text, ""]
        lines += _case(found.get(slug(package, name)))
        if script:
            lines += ["<details><summary>A script; exits with 1 while the defect is there</summary>", ""]
            lines += ["```python", script.strip(), "```", "", "</details>", ""]
    return "\n".join(lines).rstrip() + "\n"


def _row(target, report: dict, totals: dict[str, int]) -> str:
    name = target.name + (" *" if report["interpreted"] else "")
    if report["broken"]:
        totals["dead"] += 1
        return f"| {target.package} | {name} | does not run: {report['broken'][:80].replace('|', '/')} | | | | |"
    totals["run"] += 1
    unsettled = report.get("unsettled")
    design = BY_DESIGN.get((target.package, target.name), {})
    cells: dict[str, list[str]] = {letter: [] for letter in CLASSES}
    excused = []
    for entry in failures(report):
        what = (entry["first"].get("failure") or {}).get("what", "")
        word = entry["check"] + (" (crash)" if "the process" in what else "")
        if entry["class"] == "a" and unsettled and "the process" not in what:
            continue
        if entry["class"] == "a" and (entry["check"] in design or "*" in design):
            excused.append(f"{word}: {design.get(entry['check'], design.get('*'))}")
        elif word not in cells[entry["class"]]:
            cells[entry["class"]].append(word)
    for letter, words in cells.items():
        totals[letter] += bool(words)
    totals["clean"] += not any(cells.values())
    words = {letter: ", ".join(found) for letter, found in cells.items()}
    if unsettled:
        words["a"] = ", ".join(filter(None, (words["a"], "to be run again")))
    reasons: dict[str, list[str]] = {}
    for line in excused:
        check, _, reason = line.partition(": ")
        reasons.setdefault(reason, []).append(check)
    for reason, checks in reasons.items():
        listed = ", ".join(dict.fromkeys(checks)) if len(checks) < 8 else "all"
        words["a"] = (words["a"] + " " if words["a"] else "") + f"[{listed}: {reason}]"
    counts = {v: sum(r["verdict"] == v for r in report["results"]) for v in ("pass", "unsupported")}
    return (
        f"| {target.package} | {name} | {counts['pass']} | {counts['unsupported']} "
        f"| {words['a']} | {words['b']} | {words['c']} |"
    )


def _case(report: dict | None) -> list[str]:
    """What the auditor said of the gradients or values."""
    if report is None:
        return []
    lines = []
    for entry in failures(report):
        failure = entry["first"].get("failure") or {}
        if entry["class"] != "a" or not failure.get("what") or failure.get("expected") is None:
            continue
        where = failure.get("input") or (
            f"output {failure['output']}" if failure.get("output") is not None else ""
        )
        index = failure.get("index")
        place = f" at {where}{list(index) if index else ''}" if where else ""
        numbers = f"expected {_number(failure['expected'])}, got {_number(failure['got'])}"
        guess = f" Guess: {failure['guess']}." if failure.get("guess") else ""
        lines.append(f"* `{entry['check']}`: {failure['what']}{place}: {numbers}.{guess}")
    return [*lines[:4], ""] if lines else []


def _number(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value).splitlines()[0][:100]
