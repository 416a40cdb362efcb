"""Other people's autograd.Functions that run on a CPU, as targets of the auditor.

Nothing is imported from a peer before ``Target.load`` is called, so that the table can be read where none of the
peers is installed; ``reference`` is always our own plain torch. Environment, from an empty directory (two of them,
because unsloth pins transformers below what the others take)::

    uv venv /tmp/peers --python 3.11
    uv pip install --python /tmp/peers/bin/python -e /work/main "torch==2.15.0" liger-kernel timm peft \
        torchvision transformers bitsandbytes entmax kornia torchao flash-linear-attention pytest
    uv venv /tmp/peers-unsloth --python 3.11
    uv pip install --python /tmp/peers-unsloth/bin/python -e /work/main "torch==2.15.0" unsloth unsloth-zoo pytest

Two shims, neither of which touches an installed file; both act in ``load``, in this process alone:

* ``_interpreted``: Triton's interpreter hands Python floats to a kernel as they are, where the compiler makes fp32
  scalars of them. Kernels that write ``eps.to(tl.float32)`` then die, so floats are wrapped as the compiler would.
  libdevice's tanh, rsqrt, erf and exp are device code and return None in the interpreter; numpy's take their
  place. An autotuned kernel has no driver to be timed with and takes the first of its configurations.
* ``_unsloth``: unsloth refuses to be imported without a GPU, so its packages are entered without running their
  ``__init__`` and ``device_type`` is a stub that says "cpu". The Functions and kernels are unsloth's own.

``env`` must be set before the first import of torch or triton. In the interpreter bfloat16 is garbage wherever a
kernel computes in it (it is kept as uint16 there), so targets with TRITON_INTERPRET are for float32, and, unless
their note says otherwise, for float64 to the accuracy of float32. "FINDING" in a note is what was seen by hand.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Sample = tuple[tuple[Any, ...], dict[str, Any]]

INTERPRET = {"TRITON_INTERPRET": "1"}
# Some packages put forward under torch.compile, which on a CPU needs a C++ compiler and says nothing of gradients.
EAGER = {"TORCHDYNAMO_DISABLE": "1"}


@dataclass(frozen=True)
class Target:
    """One Function of a peer: how to get at it, what to call it with, and what it should be equal to."""

    package: str
    name: str
    load: Callable[[], Any]
    samples: Callable[[str, torch.dtype, int], Iterable[Sample]]
    reference: Callable[..., Any] | None = None
    env: dict[str, str] = field(default_factory=dict)
    note: str = ""


class _Draw:
    """Seeded draws. In float64 on the CPU first, so that every dtype and device sees the same numbers."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def _leaf(self, value: Tensor, grad: bool) -> Tensor:
        return value.to(self.device, self.dtype).detach().requires_grad_(grad)

    def normal(self, *shape: int, grad: bool = True, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return self._leaf(torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale + shift, grad)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, grad: bool = True) -> Tensor:
        value = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return self._leaf(low + (high - low) * value, grad)

    def transposed(self, *shape: int) -> Tensor:
        """A (B, H, T, D) leaf stored as (B, T, H, D), the way a projection leaves heads."""
        b, h, t, d = shape
        value = torch.randn(b, t, h, d, generator=self.generator, dtype=torch.float64)
        return value.to(self.device, self.dtype).transpose(1, 2).detach().requires_grad_()

    def logprob(self, *shape: int, grad: bool = True) -> Tensor:
        value = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return self._leaf(value.log_softmax(-1), grad)

    def prob(self, *shape: int, grad: bool = False) -> Tensor:
        value = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return self._leaf(value.softmax(-1), grad)

    def ints(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def labels(self, high: int, n: int, ignore: int = -100) -> Tensor:
        """Class indices, one of them ignored."""
        target = self.ints(high, n)
        target[n // 2] = ignore
        return target


def _samples(make: Callable[[_Draw], Iterable[Any]]) -> Callable[[str, torch.dtype, int], Iterator[Sample]]:
    """Turns a generator of argument tuples, or (args, kwargs) pairs, into what Target.samples is."""

    @functools.wraps(make)
    def samples(device: str, dtype: torch.dtype, seed: int) -> Iterator[Sample]:
        for item in make(_Draw(device, dtype, seed)):
            args, kwargs = item if len(item) == 2 and isinstance(item[1], dict) else (item, {})
            yield args, kwargs

    return samples


def _from(module: str, name: str) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module(module), name)


# ------------------------------------------------------------------------------------------------ shims


def _on_host(interpreter, tl, function):
    def call(x, **kwargs):
        data = np.asarray(function(x.handle.data)).astype(x.handle.data.dtype)
        return tl.tensor(interpreter.TensorHandle(data, x.handle.dtype), x.type)

    return call


def _interpreted() -> None:
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.autotuner import Autotuner

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported.")
    if hasattr(interpreter._implicit_cvt, "_floats_as_compiled"):
        return
    for libdevice in ("triton.language.extra.libdevice", "triton.language.extra.cuda.libdevice"):
        for name, on_host in (
            ("tanh", np.tanh),
            ("rsqrt", lambda x: 1 / np.sqrt(x)),
            ("erf", np.vectorize(math.erf)),
            ("exp", np.exp),
        ):
            setattr(importlib.import_module(libdevice), name, _on_host(interpreter, tl, on_host))
    # No driver to time an autotuned kernel's configurations with: all are equally good, the first is taken.
    Autotuner.do_bench = staticmethod(lambda kernel_call, quantiles=None: [0.0, 0.0, 0.0])
    plain = interpreter._implicit_cvt

    def convert(arg):
        if isinstance(arg, float):
            return tl.tensor(interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
        return plain(arg)

    convert._floats_as_compiled = True
    interpreter._implicit_cvt = convert


def _triton(module: str, name: str, output: int | None = None) -> Callable[[], Any]:
    """A Function whose kernels run in the interpreter; with ``output``, that one of its outputs alone."""

    def load():
        _interpreted()
        function = getattr(importlib.import_module(module), name)
        if output is None:
            return function

        def wrapper(*args, **kwargs):
            return function.apply(*args, **kwargs)[output]

        wrapper.__name__ = name
        return wrapper

    return load


def _liger(module: str, name: str, output: int | None = None) -> Callable[[], Any]:
    return _triton(f"liger_kernel.{module}", name, output)


def _unsloth(module: str, name: str, wrap: Callable[[Any], Any] | None = None) -> Callable[[], Any]:
    def load():
        _interpreted()
        cuda_stream = torch._C._cuda_getCurrentRawStream
        for package in ("unsloth_zoo", "unsloth", "unsloth_zoo.temporary_patches", "unsloth.kernels"):
            if package in sys.modules:
                continue
            root, _, sub = package.partition(".")
            found = importlib.util.find_spec(root) if not sub else None
            base = Path(found.submodule_search_locations[0] if found else sys.modules[root].__path__[0])
            entered = types.ModuleType(package)
            entered.__path__ = [str(base / sub)]
            entered.DEVICE_TYPE, entered.DEVICE_TYPE_TORCH, entered.DEVICE_COUNT = "cpu", "cpu", 1
            sys.modules[package] = entered
            if not sub:
                stub = types.ModuleType(f"{package}.device_type")
                stub.DEVICE_TYPE, stub.DEVICE_TYPE_TORCH, stub.DEVICE_COUNT = "cpu", "cpu", 1
                stub.ALLOW_PREQUANTIZED_MODELS = stub.ALLOW_BITSANDBYTES = False
                stub.is_hip, stub.get_device_type, stub.get_device_count = lambda: False, lambda: "cpu", lambda: 1
                stub.device_synchronize = lambda *args: None
                sys.modules[stub.__name__] = stub
        try:
            torch._C._cuda_getCurrentRawStream = lambda index: 0  # asked for at import, never used on a CPU
            function = getattr(importlib.import_module(module), name)
        finally:
            torch._C._cuda_getCurrentRawStream = cuda_stream
        return wrap(function) if wrap else function

    return load


# ------------------------------------------------------------------------------------------------ shared formulas


def _straight_through(value: Tensor, through: Tensor) -> Tensor:
    """``value`` forward, the gradient of ``through`` backward."""
    return through + (value - through).detach()


def _rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def _angles(draw: _Draw, length: int, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of a rotary embedding, (length, dim), both halves of dim the same."""
    frequency = 10.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(draw.device, draw.dtype), angle.sin().to(draw.device, draw.dtype)


# ------------------------------------------------------------------------------------------------ timm


@_samples
def _activation_samples(draw):
    # Away from the kinks of the hard activations, where timm's subgradient is not that of torch's clamp.
    x = draw.normal(5, 7, scale=3.0, grad=False)
    for kink in (-3.0, -2.0, 0.0, 3.0):
        x = torch.where((x - kink).abs() < 0.05, kink + 0.1, x)
    yield (x.requires_grad_(),)
    # Far out on both sides.
    values = [-90.0, -20.0, -1e-3, 1e-3, 20.0, 90.0]
    yield (torch.tensor(values, device=draw.device, dtype=draw.dtype, requires_grad=True),)


_TIMM = [
    ("SwishAutoFn", F.silu),
    ("MishAutoFn", lambda x: x * F.softplus(x).tanh()),
    ("HardSigmoidAutoFn", lambda x: (x + 3).clamp(0, 6) / 6),
    ("HardSwishAutoFn", lambda x: x * (x + 3).clamp(0, 6) / 6),
    ("HardMishAutoFn", lambda x: 0.5 * x * (x + 2).clamp(0, 2)),
]
TIMM = tuple(
    Target("timm", name, _from("timm.layers.activations_me", name), _activation_samples, reference)
    for name, reference in _TIMM
)


# ------------------------------------------------------------------------------------------------ peft


@_samples
def _velora_samples(draw):
    for features, groups in ((6, 3), (7, 3)):  # the second is padded
        embed = draw.normal(-(-features // groups), grad=False)
        embed = embed / embed.norm()
        yield draw.normal(2, 3, features), draw.normal(5, features), draw.normal(5), embed, groups, 1.5


def _velora_reference(x, weight, bias, embed, groups, scale):
    # The gradient of the weight is meant to be that of the reconstructed input: VeLoRA's compression, by design.
    width = embed.numel()
    padded = F.pad(x, (0, groups * width - x.shape[-1])).unflatten(-1, (groups, width))
    rebuilt = ((padded @ embed)[..., None] * embed).flatten(-2)[..., : x.shape[-1]] * scale
    return _straight_through(
        F.linear(x, weight, bias), F.linear(x, weight.detach(), bias) + F.linear(rebuilt.detach(), weight)
    )


@_samples
def _randlora_samples(draw):
    yield draw.normal(3, 1, 5, grad=False), draw.normal(3, 4), draw.normal(4, 5)


@_samples
def _c3a_samples(draw):
    yield draw.normal(2, 3, 8), draw.normal(3, 2, 4)
    yield draw.normal(2, 15), draw.normal(2, 3, 5)


def _c3a_reference(x, w):
    _, n, b = w.shape
    # y_m = sum_n circ(w_mn) x_n, with circ(w)[i, j] = w[(j - i) mod b]: what ifft, product, fft comes to.
    index = (torch.arange(b)[None, :] - torch.arange(b)[:, None]) % b
    return torch.einsum("...nj,mnij->...mi", x.unflatten(-1, (n, b)), w[..., index]).flatten(-2)


@_samples
def _loha_samples(draw):
    scale = torch.tensor(0.5, device=draw.device, dtype=draw.dtype)
    yield draw.normal(5, 3), draw.normal(3, 7), draw.normal(5, 3), draw.normal(3, 7), scale


@_samples
def _loha_cp_samples(draw):
    scale = torch.tensor(0.5, device=draw.device, dtype=draw.dtype)
    one = draw.normal(3, 3, 2, 2), draw.normal(3, 5), draw.normal(3, 4)
    two = draw.normal(3, 3, 2, 2), draw.normal(3, 5), draw.normal(3, 4)
    yield (*one, *two, scale)


def _loha_cp_reference(t1, w1a, w1b, t2, w2a, w2b, scale):
    def rebuild(t, a, b):
        return torch.einsum("ijkl,jr,ip->prkl", t, b, a)

    return rebuild(t1, w1a, w1b) * rebuild(t2, w2a, w2b) * scale


PEFT = (
    Target(
        "peft",
        "VeloraFunction",
        _from("peft.tuners.lora.velora", "VeloraFunction"),
        _velora_samples,
        _velora_reference,
        note="The weight's gradient is approximate by design; the reference has the same approximation.",
    ),
    Target(
        "peft",
        "UniqueBaseGrad",
        _from("peft.tuners.randlora.layer", "UniqueBaseGrad"),
        _randlora_samples,
        lambda a, lam, gamma: lam[:, :, None] * a * gamma[None],
        note="RandLora. The first argument is a frozen basis, whose gradient is None even if it asks for one.",
    ),
    Target(
        "peft",
        "BlockCircularConvolution",
        _from("peft.tuners.c3a.utils", "BlockCircularConvolution"),
        _c3a_samples,
        _c3a_reference,
        note="C3A. Uses torch.fft, so no half or bfloat16 on a CPU. FINDING (peft 0.21.2): wrong gradient of x.",
    ),
    Target(
        "peft",
        "HadaWeight",
        _from("peft.tuners.loha.layer", "HadaWeight"),
        _loha_samples,
        lambda w1a, w1b, w2a, w2b, scale: (w1a @ w1b) * (w2a @ w2b) * scale,
        note="LoHa. scale is a tensor without a gradient by design.",
    ),
    Target(
        "peft",
        "HadaWeightCP",
        _from("peft.tuners.loha.layer", "HadaWeightCP"),
        _loha_cp_samples,
        _loha_cp_reference,
        note="LoHa of a convolution. FINDING (peft 0.21.2): the gradients of w1a and w2a use each other's t, wb.",
    ),
)


# ------------------------------------------------------------------------------------------------ torchvision


def _bilinear(plane: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """plane (C, H, W) at the points (y, x), whose corners outside of it count as zero."""
    height, width = plane.shape[-2:]
    y0, x0 = y.detach().floor(), x.detach().floor()
    value = 0
    for row, row_weight in ((y0, 1 - (y - y0)), (y0 + 1, y - y0)):
        for col, col_weight in ((x0, 1 - (x - x0)), (x0 + 1, x - x0)):
            inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
            picked = plane[:, row.clamp(0, height - 1).long(), col.clamp(0, width - 1).long()]
            value = value + picked * (row_weight * col_weight * inside)
    return value


def _grid_mean(plane: Tensor, top, left, high, wide, rows: int, cols: int, points_y: int, points_x: int) -> Tensor:
    """Means over points_y x points_x samples in each of rows x cols bins, at the border as roi_align has it."""
    height, width = plane.shape[-2:]
    y = top + high / rows * (torch.arange(rows * points_y, dtype=plane.dtype) + 0.5) / points_y
    x = left + wide / cols * (torch.arange(cols * points_x, dtype=plane.dtype) + 0.5) / points_x
    y, x = torch.meshgrid(y.to(plane.device), x.to(plane.device), indexing="ij")
    near = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    values = _bilinear(plane, y.clamp(0, height - 1), x.clamp(0, width - 1)) * near
    return values.unflatten(-1, (cols, points_x)).unflatten(-3, (rows, points_y)).mean((-1, -3))


def _roi_align_reference(x, rois, size, scale, ratio, aligned):
    offset = 0.5 if aligned else 0.0
    out = []
    for batch, x1, y1, x2, y2 in rois.tolist():
        left, top = x1 * scale - offset, y1 * scale - offset
        wide, high = (x2 - x1) * scale, (y2 - y1) * scale
        if not aligned:
            wide, high = max(wide, 1.0), max(high, 1.0)
        points_y = ratio if ratio > 0 else math.ceil(high / size[0])
        points_x = ratio if ratio > 0 else math.ceil(wide / size[1])
        out.append(_grid_mean(x[int(batch)], top, left, high, wide, *size, points_y, points_x))
    return torch.stack(out)


def _ps_roi_align_reference(x, rois, size, scale, ratio):
    out = []
    for batch, x1, y1, x2, y2 in rois.tolist():
        wide, high = (x2 - x1) * scale, (y2 - y1) * scale
        pooled = _grid_mean(x[int(batch)], y1 * scale - 0.5, x1 * scale - 0.5, high, wide, *size, ratio, ratio)
        # Of the channels of one output, bin (i, j) reads channel i * cols + j.
        pooled = pooled.unflatten(0, (-1, size[0], size[1]))
        out.append(torch.einsum("cijij->cij", pooled))
    return torch.stack(out)


def _round(value: float) -> int:
    return math.floor(value + 0.5)  # C's round, of numbers that are not negative


def _roi_pool_reference(x, rois, size, scale):
    height, width = x.shape[-2:]
    out = x.new_zeros(len(rois), x.shape[1], *size)
    for n, (batch, *box) in enumerate(rois.tolist()):
        left, top, right, bottom = (_round(edge * scale) for edge in box)
        high, wide = max(bottom - top + 1, 1) / size[0], max(right - left + 1, 1) / size[1]
        for i in range(size[0]):
            for j in range(size[1]):
                y0, y1 = math.floor(i * high) + top, math.ceil((i + 1) * high) + top
                x0, x1 = math.floor(j * wide) + left, math.ceil((j + 1) * wide) + left
                y0, y1, x0, x1 = (
                    min(max(v, 0), m) for v, m in ((y0, height), (y1, height), (x0, width), (x1, width))
                )
                if y1 > y0 and x1 > x0:
                    out[n, :, i, j] = x[int(batch), :, y0:y1, x0:x1].amax((-1, -2))
    return out


def _ps_roi_pool_reference(x, rois, size, scale):
    height, width = x.shape[-2:]
    channels = x.shape[1] // (size[0] * size[1])
    out = x.new_zeros(len(rois), channels, *size)
    for n, (batch, *box) in enumerate(rois.tolist()):
        left, top, right, bottom = (_round(edge * scale) for edge in box)
        high, wide = max(bottom - top, 1) / size[0], max(right - left, 1) / size[1]
        for i in range(size[0]):
            for j in range(size[1]):
                y0, y1 = math.floor(i * high + top), math.ceil((i + 1) * high + top)
                x0, x1 = math.floor(j * wide + left), math.ceil((j + 1) * wide + left)
                y0, y1, x0, x1 = (
                    min(max(v, 0), m - 1) for v, m in ((y0, height), (y1, height), (x0, width), (x1, width))
                )
                if y1 > y0 and x1 > x0:
                    picked = x[int(batch), i * size[1] + j :: size[0] * size[1], y0:y1, x0:x1]
                    out[n, :, i, j] = picked.mean((-1, -2))
    return out


def _deform_reference(x, offset, weight, bias, stride, padding, dilation, mask):
    out_channels, per_group, rows, cols = weight.shape
    groups = x.shape[1] // per_group
    offset_groups = offset.shape[1] // (2 * rows * cols)
    height, width = offset.shape[-2:]
    base_y = torch.arange(height, device=x.device, dtype=x.dtype)[:, None] * stride[0] - padding[0]
    base_x = torch.arange(width, device=x.device, dtype=x.dtype)[None, :] * stride[1] - padding[1]
    images = []
    for n in range(x.shape[0]):
        taps = []
        for k in range(rows * cols):
            parts = []
            for g, plane in enumerate(x[n].chunk(offset_groups)):
                at = g * rows * cols + k
                y = base_y + (k // cols) * dilation[0] + offset[n, 2 * at]
                xx = base_x + (k % cols) * dilation[1] + offset[n, 2 * at + 1]
                value = _bilinear(plane, y, xx)
                parts.append(value if mask is None else value * mask[n, at])
            taps.append(torch.cat(parts))
        images.append(torch.stack(taps, 1))  # (C, k, H, W)
    columns = torch.stack(images).unflatten(1, (groups, per_group))
    kernel = weight.flatten(2).unflatten(0, (groups, out_channels // groups))
    out = torch.einsum("ngckhw,gock->ngohw", columns, kernel).flatten(1, 2)
    return out if bias is None else out + bias[:, None, None]


def _boxes(draw: _Draw, count: int = 4, images: int = 2) -> Tensor:
    corner = draw.uniform(count, 2, low=0, high=5, grad=False)
    extent = draw.uniform(count, 2, low=2, high=6, grad=False)
    index = torch.arange(count, device=draw.device).to(draw.dtype)[:, None] % images
    return torch.cat((index, corner, corner + extent), 1)


@_samples
def _roi_align_samples(draw):
    yield draw.normal(2, 3, 9, 10), _boxes(draw), (2, 3), 0.9, 2, False
    yield draw.normal(2, 3, 9, 10), _boxes(draw), (3, 2), 1.0, 3, True


@_samples
def _roi_pool_samples(draw):
    yield draw.normal(2, 3, 9, 10), _boxes(draw), (2, 3), 0.9


@_samples
def _ps_roi_align_samples(draw):
    yield draw.normal(2, 12, 9, 10), _boxes(draw), (2, 3), 0.9, 2


@_samples
def _ps_roi_pool_samples(draw):
    yield draw.normal(2, 12, 9, 10), _boxes(draw), (2, 3), 0.9


@_samples
def _deform_samples(draw):
    # Offsets that leave the samples between pixels, where the bilinear weights are smooth.
    yield (
        draw.normal(2, 4, 6, 7),
        draw.normal(2, 2 * 2 * 6, 4, 7),
        draw.normal(6, 2, 3, 2),
        draw.normal(6),
        (1, 1),
        (1, 1),
        (2, 2),
        draw.uniform(2, 2 * 6, 4, 7),
    )
    yield (
        draw.normal(1, 4, 6, 7),
        draw.normal(1, 2 * 9, 3, 3),
        draw.normal(5, 4, 3, 3),
        None,
        (2, 2),
        (1, 0),
        (1, 1),
        None,
    )


TORCHVISION = (
    Target(
        "torchvision",
        "roi_align",
        _from("torchvision.ops", "roi_align"),
        _roi_align_samples,
        _roi_align_reference,
        note="C++ forward and backward; boxes have no gradient by design, and there is no double backward.",
    ),
    Target(
        "torchvision", "roi_pool", _from("torchvision.ops", "roi_pool"), _roi_pool_samples, _roi_pool_reference
    ),
    Target(
        "torchvision",
        "ps_roi_align",
        _from("torchvision.ops", "ps_roi_align"),
        _ps_roi_align_samples,
        _ps_roi_align_reference,
    ),
    Target(
        "torchvision",
        "ps_roi_pool",
        _from("torchvision.ops", "ps_roi_pool"),
        _ps_roi_pool_samples,
        _ps_roi_pool_reference,
    ),
    Target(
        "torchvision",
        "deform_conv2d",
        _from("torchvision.ops", "deform_conv2d"),
        _deform_samples,
        _deform_reference,
    ),
)


# ------------------------------------------------------------------------------------------------ torch


@_samples
def _lrn_samples(draw):
    yield draw.normal(2, 5, 3, 2), 3, 0.5, 0.75, 1.0
    yield draw.normal(2, 7, 2, 3), 5, 0.5, 0.75, 1.0


def _lrn_reference(x, size, alpha, beta, k):
    square = F.pad(x.square(), (0, 0, 0, 0, size // 2, (size - 1) // 2))
    return x * (k + alpha / size * square.unfold(1, size, 1).sum(-1)) ** -beta


@_samples
def _fake_quant_samples(draw):
    scales = draw.uniform(3, low=0.05, high=0.1, grad=False)
    yield draw.normal(3, 7), scales, torch.tensor([0, 3, -2], device=draw.device), 0, -10, 10


def _fake_quant_reference(x, scales, zero_points, axis, low, high):
    shape = [-1 if d == axis else 1 for d in range(x.dim())]
    scale, zero = scales.reshape(shape), zero_points.reshape(shape)
    level = (x / scale).round() + zero
    inside = (level >= low) & (level <= high)
    return _straight_through((level.clamp(low, high) - zero) * scale, x * inside)


@_samples
def _linear_cross_entropy_samples(draw):
    from torch.nn import LinearCrossEntropyOptions

    for reduction in ("mean", "sum", "none"):
        options = LinearCrossEntropyOptions(batch_chunk_size=2)
        yield (
            (draw.normal(5, 4), draw.normal(7, 4), draw.labels(7, 5)),
            {"linear_bias": draw.normal(7), "reduction": reduction, "label_smoothing": 0.1, "options": options},
        )


def _linear_cross_entropy_reference(x, weight, target, *, linear_bias, reduction, label_smoothing, options):
    logits = F.linear(x, weight, linear_bias)
    return F.cross_entropy(logits, target, reduction=reduction, label_smoothing=label_smoothing)


@_samples
def _lobpcg_samples(draw):
    yield draw.normal(9, 9), 2


def _lobpcg_symmetric(a: Tensor) -> Tensor:
    # Well separated eigenvalues, whatever the draw.
    return a + a.mT + torch.diag(10.0 * torch.arange(len(a), dtype=a.dtype, device=a.device))


def _load_lobpcg():
    function = importlib.import_module("torch._lobpcg").LOBPCGAutogradFunction

    def lobpcg(a, k):
        # Eigenvectors have no sign, so the projector on them is compared. tol and niter are to converge fully.
        start = torch.eye(len(a), dtype=a.dtype, device=a.device)[:, -k:]
        d, u = function.apply(_lobpcg_symmetric(a), k, None, start, k, None, 200, 1e-12, True, "ortho")
        return d, u @ u.mT

    return lobpcg


def _lobpcg_reference(a, k):
    d, u = torch.linalg.eigh(_lobpcg_symmetric(a))
    u = u[:, -k:]
    return d[-k:].flip(0), u @ u.mT


def _load_checkpoint():
    function = importlib.import_module("torch.utils.checkpoint").CheckpointFunction

    def checkpoint(x, weight):
        return function.apply(_checkpointed, False, x, weight)

    return checkpoint


def _checkpointed(x, weight):
    return torch.tanh(x @ weight)


@_samples
def _checkpoint_samples(draw):
    yield draw.normal(3, 5), draw.normal(5, 4)


@_samples
def _dirichlet_samples(draw):
    yield (draw.uniform(3, 4, low=0.5, high=3.0),)


@_samples
def _mod_index_samples(draw):
    yield draw.normal(5, 4), [draw.ints(5, 3, 2), draw.ints(4, 3, 2)]


def _load_mod_index():
    function = importlib.import_module("torch._dynamo._trace_wrapped_higher_order_op").ModIndex

    def mod_index(x, indices):
        return function.apply(x, indices)

    return mod_index


def _combine(carry, x):
    carry = torch.tanh(carry * 0.5 + x)
    return carry, carry * x


def _load_scan():
    from torch._higher_order_ops import scan

    def run(init, xs):
        return scan(_combine, init, xs)

    return run


def _scan_reference(init, xs):
    out = []
    for x in xs:
        init, y = _combine(init, x)
        out.append(y)
    return init, torch.stack(out)


@_samples
def _scan_samples(draw):
    yield draw.normal(3), draw.normal(4, 3)


def _load_associative_scan():
    from torch._higher_order_ops import associative_scan

    def run(xs):
        return associative_scan(lambda a, b: a * b, xs, 0, combine_mode="generic")

    return run


@_samples
def _associative_scan_samples(draw):
    yield (draw.normal(5, 3),)


def _load_map():
    from torch._higher_order_ops.map import map as map_op

    def run(xs, weight):
        return map_op(lambda x, w: torch.tanh(x @ w), xs, weight)

    return run


@_samples
def _map_samples(draw):
    yield draw.normal(4, 3), draw.normal(3, 5)


def _load_cond():
    def run(x, weight):
        return torch.cond(x.sum() > 0, lambda x, w: (x @ w).sin(), lambda x, w: (x @ w).cos(), (x, weight))

    return run


def _cond_reference(x, weight):
    return (x @ weight).sin() if x.sum() > 0 else (x @ weight).cos()


@_samples
def _learnable_quant_samples(draw):
    scale = torch.tensor([0.1], device=draw.device, dtype=draw.dtype, requires_grad=True)
    zero = torch.tensor([2.0], device=draw.device, dtype=draw.dtype, requires_grad=True)
    yield draw.normal(4, 5), scale, zero, -8, 7, 1.0


def _learnable_quant_reference(x, scale, zero, low, high, factor):
    # LSQ+: rounding passes the gradient, the clamp stops it; all of it times factor for scale and zero point.
    point = zero.detach().round().clamp(low, high)
    level = (x.detach() / scale.detach()).round() + point
    inside = (level >= low) & (level <= high)
    value = (level.clamp(low, high) - point) * scale.detach()
    d_scale = torch.where(
        inside, (value - x.detach()) / scale.detach(), torch.where(level < low, low - point, high - point)
    )
    d_zero = torch.where(inside, torch.zeros_like(x), -scale.detach().expand_as(x))
    through = x * inside + (scale * d_scale + zero * d_zero) * factor
    return _straight_through(value, through)


TORCH = (
    Target(
        "torch",
        "CrossMapLRN2d",
        _from("torch.nn.modules._functions", "CrossMapLRN2d"),
        _lrn_samples,
        _lrn_reference,
        note="torch.nn.CrossMapLRN2d. FINDING (torch 2.15.0): forward never drops the first channel from its "
        "running sum, so it is not the LRN of F.local_response_norm, and backward is the gradient of neither.",
    ),
    Target(
        "torch",
        "FakeQuantPerChannel",
        _from("torch.ao.quantization.fx._decomposed", "FakeQuantPerChannel"),
        _fake_quant_samples,
        _fake_quant_reference,
        note="torch.ao.quantization.fx._decomposed. float32 only, by an assertion. A straight-through estimator.",
    ),
    Target(
        "torch",
        "linear_cross_entropy (chunked)",
        lambda: F.linear_cross_entropy,
        _linear_cross_entropy_samples,
        _linear_cross_entropy_reference,
        note="Custom ops of torch.nn.modules.linear_cross_entropy. Documented: one backward, first order, no jvp.",
    ),
    Target(
        "torch",
        "LOBPCGAutogradFunction",
        _load_lobpcg,
        _lobpcg_samples,
        _lobpcg_reference,
        note="torch.lobpcg; the wrapper makes its matrix symmetric and returns eigenvalues and projector.",
    ),
    Target(
        "torch",
        "CheckpointFunction",
        _load_checkpoint,
        _checkpoint_samples,
        _checkpointed,
        note="use_reentrant=True. Refuses torch.autograd.grad by design, but not backward().",
    ),
    Target(
        "torch",
        "_Dirichlet",
        _from("torch.distributions.dirichlet", "_Dirichlet"),
        _dirichlet_samples,
        note="Random forward, gradient of the implicit reparametrisation: no reference, and two calls differ.",
    ),
    Target(
        "torch",
        "ModIndex",
        _load_mod_index,
        _mod_index_samples,
        lambda x, indices: x[tuple(indices)],
        note="torch._dynamo._trace_wrapped_higher_order_op; indices are a list of tensors.",
    ),
    Target("torch", "scan", _load_scan, _scan_samples, _scan_reference, note="ScanAutogradOp."),
    Target(
        "torch",
        "associative_scan",
        _load_associative_scan,
        _associative_scan_samples,
        lambda xs: xs.cumprod(0),
        note="AssociativeScanAutogradOp.",
    ),
    Target("torch", "map", _load_map, _map_samples, lambda xs, w: torch.tanh(xs @ w), note="MapAutogradOp."),
    Target("torch", "cond", _load_cond, _checkpoint_samples, _cond_reference, note="CondAutogradOp."),
    Target(
        "torch",
        "_fake_quantize_learnable_per_tensor_affine",
        lambda: torch._fake_quantize_learnable_per_tensor_affine,
        _learnable_quant_samples,
        _learnable_quant_reference,
        note="C++ forward and backward, LSQ+. float32 only, by a check in backward.",
    ),
)


# ------------------------------------------------------------------------------------------------ transformers


@_samples
def _pointwise_samples(draw):
    yield (draw.normal(5, 7, scale=2.0),)


@_samples
def _sqrt_samples(draw):
    yield (draw.uniform(5, 7, low=0.1, high=3.0),)


@_samples
def _xsoftmax_samples(draw):
    mask = draw.ints(2, 3, 5)
    mask[:, 0] = 1
    mask[2] = 0  # a row with nothing in it
    yield draw.normal(3, 5), mask, -1


def _xsoftmax_reference(x, mask, dim):
    hidden = mask == 0
    return x.masked_fill(hidden, torch.finfo(x.dtype).min).softmax(dim).masked_fill(hidden, 0)


@_samples
def _xdropout_samples(draw):
    from transformers.models.sew_d.modeling_sew_d import DropoutContext

    context = DropoutContext()
    context.dropout, context.mask = 0.25, draw.ints(2, 4, 5).bool()
    yield draw.normal(4, 5), context


@_samples
def _yoso_samples(draw):
    query, key = (F.normalize(draw.normal(2, 4, 5, grad=False), dim=-1).requires_grad_() for _ in range(2))
    mask = torch.ones(2, 4, device=draw.device, dtype=draw.dtype)
    yield mask, mask, query, key, draw.normal(2, 4, 3), {"hash_code_len": 3}


def _yoso_reference(query_mask, key_mask, query, key, value, config):
    tau = config["hash_code_len"]
    cosine = query @ key.mT
    expectation = (1 - torch.acos(cosine) / math.pi) ** tau * query_mask[:, :, None] * key_mask[:, None, :]
    # The paper's lower bound on the derivative, tau / 2 times the expectation, in place of the true one.
    return _straight_through(expectation, cosine * (tau / 2 * expectation).detach()) @ value


@_samples
def _symmetric_quant_samples(draw):
    yield draw.normal(3, 5), 8, False, draw.uniform(3, low=0.02, high=0.05, grad=False)


def _symmetric_quant_reference(x, bits, percentile_mode, scale):
    n = 2 ** (bits - 1) - 1
    return _straight_through((x / scale[:, None]).round().clamp(-n, n - 1), x / scale[:, None])


@_samples
def _reverse_sort_samples(draw):
    order = (
        torch.stack([torch.randperm(6, generator=draw.generator) for _ in range(4)]).view(2, 2, 6).to(draw.device)
    )
    yield draw.normal(2, 2, 6, 3), draw.normal(2, 2, 6), order, order.argsort(-1)


def _reverse_sort_reference(vectors, logits, order, undo):
    return vectors.gather(2, undo[..., None].expand_as(vectors)), logits.gather(2, undo)


def _weight_quant_reference(weight):
    scale = 1 / weight.float().abs().mean().clamp(min=1e-5)
    return _straight_through(((weight.float() * scale).round().clamp(-1, 1) / scale).to(weight.dtype), weight)


def _act_quant_reference(x):
    scale = 127 / x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return _straight_through(((x.float() * scale).round().clamp(-128, 127) / scale).to(x.dtype), x)


def _load_grouped_mm():
    importlib.import_module("transformers.integrations.moe")
    return torch.ops.transformers.grouped_mm_fallback


@_samples
def _grouped_mm_samples(draw):
    # The third expert has no tokens.
    yield draw.normal(7, 4), draw.normal(4, 4, 5), torch.tensor([2, 5, 5, 7], device=draw.device)


def _grouped_mm_reference(x, weight, ends):
    starts = [0, *ends.tolist()[:-1]]
    return torch.cat([x[start:end] @ w for start, end, w in zip(starts, ends.tolist(), weight, strict=True)])


def _load_input_only_grad():
    function = importlib.import_module("transformers.loss.loss_lsd")._InputOnlyGrad

    def input_only(x):
        return function.apply(x, torch.tanh)

    return input_only


@_samples
def _phimoe_samples(draw):
    scores = draw.normal(4, 6)
    gates = scores.detach().softmax(-1)
    multiplier, chosen = gates.max(-1, keepdim=True)
    yield scores, multiplier, chosen, gates, torch.ones_like(multiplier)


def _phimoe_reference(scores, multiplier, chosen, gates, mask_for_one):
    picked = scores.softmax(-1).gather(-1, chosen)
    return _straight_through(multiplier * mask_for_one, picked)


_HF = "transformers.models"
TRANSFORMERS = (
    Target(
        "transformers",
        "GeLUFunction",
        _from(f"{_HF}.bloom.modeling_bloom", "GeLUFunction"),
        _pointwise_samples,
        lambda x: F.gelu(x, approximate="tanh"),
        note="bloom. Its constants have eight digits, so the gradient is good to 1e-8 or so and no further.",
    ),
    Target(
        "transformers",
        "SqrtBoundDerivative",
        _from(f"{_HF}.recurrent_gemma.modeling_recurrent_gemma", "SqrtBoundDerivative"),
        _sqrt_samples,
        torch.sqrt,
        note="Clips the gradient by design, at 1000: only near 0, which the samples keep away from.",
    ),
    Target(
        "transformers",
        "XSoftmax",
        _from(f"{_HF}.sew_d.modeling_sew_d", "XSoftmax"),
        _xsoftmax_samples,
        _xsoftmax_reference,
    ),
    Target(
        "transformers",
        "XDropout",
        _from(f"{_HF}.sew_d.modeling_sew_d", "XDropout"),
        _xdropout_samples,
        lambda x, context: x.masked_fill(context.mask, 0) / (1 - context.dropout),
        note="With the mask given, so that it is not random.",
    ),
    Target(
        "transformers",
        "YosoCumulation",
        _from(f"{_HF}.yoso.modeling_yoso", "YosoCumulation"),
        _yoso_samples,
        _yoso_reference,
        note="The gradient of query and key is the paper's lower bound by design; the reference has the same.",
    ),
    Target(
        "transformers",
        "SymmetricQuantFunction",
        _from(f"{_HF}.ibert.quant_modules", "SymmetricQuantFunction"),
        _symmetric_quant_samples,
        _symmetric_quant_reference,
        note="ibert. Straight through, past the clamp as well. Returns five gradients for four arguments.",
    ),
    Target(
        "transformers",
        "floor_ste",
        _from(f"{_HF}.ibert.quant_modules", "floor_ste"),
        _pointwise_samples,
        lambda x: _straight_through(x.floor(), x),
    ),
    Target(
        "transformers",
        "ReverseSort",
        _from(f"{_HF}.reformer.modeling_reformer", "ReverseSort"),
        _reverse_sort_samples,
        _reverse_sort_reference,
        note="Two outputs, both differentiable.",
    ),
    Target(
        "transformers",
        "WeightQuant",
        _from("transformers.integrations.bitnet", "WeightQuant"),
        _pointwise_samples,
        _weight_quant_reference,
        EAGER,
        note="bitnet. A straight-through estimator whose forward is under torch.compile.",
    ),
    Target(
        "transformers",
        "ActQuant",
        _from("transformers.integrations.bitnet", "ActQuant"),
        _pointwise_samples,
        _act_quant_reference,
        EAGER,
        note="bitnet. A straight-through estimator whose forward is under torch.compile.",
    ),
    Target(
        "transformers",
        "grouped_mm_fallback",
        _load_grouped_mm,
        _grouped_mm_samples,
        _grouped_mm_reference,
        note="A torch.library custom op with register_autograd (integrations.moe).",
    ),
    Target(
        "transformers",
        "_InputOnlyGrad",
        _load_input_only_grad,
        _pointwise_samples,
        torch.tanh,
        note="loss_lsd; takes a function, here torch.tanh.",
    ),
    Target(
        "transformers",
        "PhimoeMultiplier",
        _from(f"{_HF}.phimoe.modeling_phimoe", "PhimoeMultiplier"),
        _phimoe_samples,
        _phimoe_reference,
        note="SparseMixer's estimator: the gradient of softmax(scores)[chosen], of which forward is no function.",
    ),
)


# ------------------------------------------------------------------------------------------------ bitsandbytes


def _load_bnb(name: str) -> Callable[[], Any]:
    def load():
        functions = importlib.import_module("bitsandbytes.autograd._functions")
        function = getattr(functions, name)

        def matmul(a, weight, bias):
            if name == "MatMul4Bit":
                packed, state = _quantized_4bit(weight)
                return function.apply(a, packed, None, bias, state)
            state = functions.MatmulLtState()
            state.has_fp16_weights = False
            quantized = importlib.import_module("bitsandbytes.functional").int8_vectorwise_quant
            state.CB, state.SCB, _ = quantized(weight.detach().to(torch.float16))
            return function.apply(a, state.CB, None, bias, state)

        return matmul

    return load


def _quantized_4bit(weight):
    return importlib.import_module("bitsandbytes.functional").quantize_4bit(
        weight.detach(), blocksize=64, quant_type="nf4"
    )


@_samples
def _bnb_samples(draw):
    yield draw.normal(2, 3, 64), draw.normal(5, 64, grad=False), draw.normal(5)
    yield draw.normal(3, 64), draw.normal(5, 64, grad=False), draw.normal(5)


def _bnb_reference_8bit(a, weight, bias):
    half = weight.to(torch.float16).float()
    scale = half.abs().amax(1, keepdim=True)
    return F.linear(a, ((half * 127 / scale).round() * scale / 127).to(a.dtype), bias)


def _bnb_reference_4bit(a, weight, bias):
    packed, state = _quantized_4bit(weight)
    dequantized = importlib.import_module("bitsandbytes.functional").dequantize_4bit(packed, state)
    return F.linear(a, dequantized.to(a.dtype), bias)


BITSANDBYTES = (
    Target(
        "bitsandbytes",
        "MatMul4Bit",
        _load_bnb("MatMul4Bit"),
        _bnb_samples,
        _bnb_reference_4bit,
        note="The quantised weight has no gradient by design. The reference uses bitsandbytes to dequantise.",
    ),
    Target(
        "bitsandbytes",
        "MatMul8bitFp",
        _load_bnb("MatMul8bitFp"),
        _bnb_samples,
        _bnb_reference_8bit,
        note="What matmul picks on a CPU. Keeps A on ctx, not by save_for_backward.",
    ),
    Target(
        "bitsandbytes",
        "MatMul8bitLt",
        _load_bnb("MatMul8bitLt"),
        _bnb_samples,
        _bnb_reference_8bit,
        note="Quantises the activations as well: forward is only good to 1e-2 of the reference, by design.",
    ),
)


# ------------------------------------------------------------------------------------------------ entmax


def _newton(function: Callable[[Tensor], Tensor], tau: Tensor) -> Tensor:
    """A root found without a graph, given the derivative of the implicit function by one Newton step from it."""
    with torch.enable_grad():
        at = tau.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(at).sum(), at)
    return tau.detach() - function(tau.detach()) / slope.detach()


def _bisect(function: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    with torch.no_grad():
        for _ in range(80):
            middle = (low + high) / 2
            above = function(middle) >= 0
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return _newton(function, low)


def _positive_power(x: Tensor, power) -> Tensor:
    return torch.where(x > 0, x.clamp(min=1e-30) ** power, torch.zeros_like(x))


def _entmax_reference(x, alpha=1.5, dim=-1, *ignored):
    if not torch.is_tensor(alpha):
        alpha = torch.tensor(float(alpha), dtype=x.dtype, device=x.device)
    z = x * (alpha - 1)

    def excess(tau):
        return _positive_power(z - tau, 1 / (alpha - 1)).sum(dim, keepdim=True) - 1

    top = z.detach().amax(dim, keepdim=True)
    tau = _bisect(excess, top - 1, top)
    return _positive_power(z - tau, 1 / (alpha - 1))


def _normmax_reference(x, alpha=2, dim=-1, *ignored):
    # argmax of x @ p - ||p||_alpha over the simplex: p is proportional to (x - tau)_+ ** (1 / (alpha - 1)), where
    # the powers alpha / (alpha - 1) sum to one.
    def excess(tau):
        return _positive_power(x - tau, alpha / (alpha - 1)).sum(dim, keepdim=True) - 1

    top = x.detach().amax(dim, keepdim=True)
    p = _positive_power(x - _bisect(excess, top - 1, top), 1 / (alpha - 1))
    return p / p.sum(dim, keepdim=True)


def _budget_reference(x, budget=2, dim=-1, *ignored):
    def excess(tau):
        return (x - tau).clamp(0, 1).sum(dim, keepdim=True) - budget

    low = x.detach().amin(dim, keepdim=True) - budget / x.shape[dim]
    return (x - _bisect(excess, low, x.detach().amax(dim, keepdim=True))).clamp(0, 1)


def _fenchel_young(alpha: float) -> Callable[..., Tensor]:
    def loss(x, target, *ignored):
        p = _entmax_reference(x, alpha).detach()  # the maximiser, so that its derivative does not count
        omega = (1 - p.pow(alpha).sum(-1)) / (alpha * (alpha - 1))
        return omega + (p * x).sum(-1) - x.gather(1, target[:, None]).squeeze(1)

    return loss


@_samples
def _entmax_samples(draw):
    yield draw.normal(3, 7), -1
    yield draw.normal(4, 3, 2), 0


@_samples
def _entmax_bisect_samples(draw):
    yield draw.normal(3, 7), draw.uniform(3, 1, low=1.3, high=1.8), -1, 60
    yield draw.normal(5, 3), 1.5, 0, 60


@_samples
def _normmax_samples(draw):
    yield draw.normal(3, 7), 2, -1, 60
    yield draw.normal(3, 7), 3, -1, 60


@_samples
def _budget_samples(draw):
    yield draw.normal(3, 7), 2, -1, 60


@_samples
def _entmax_loss_samples(draw):
    yield draw.normal(4, 7), draw.ints(7, 4)


ENTMAX = (
    Target(
        "entmax",
        "SparsemaxFunction",
        _from("entmax.activations", "SparsemaxFunction"),
        _entmax_samples,
        lambda x, dim: _entmax_reference(x, 2.0, dim),
        note="Like all of entmax: forward and backward are classmethods.",
    ),
    Target(
        "entmax",
        "Entmax15Function",
        _from("entmax.activations", "Entmax15Function"),
        _entmax_samples,
        lambda x, dim: _entmax_reference(x, 1.5, dim),
    ),
    Target(
        "entmax",
        "EntmaxBisectFunction",
        _from("entmax.root_finding", "EntmaxBisectFunction"),
        _entmax_bisect_samples,
        _entmax_reference,
        note="alpha may be a tensor that wants a gradient.",
    ),
    Target(
        "entmax",
        "NormmaxBisectFunction",
        _from("entmax.root_finding", "NormmaxBisectFunction"),
        _normmax_samples,
        _normmax_reference,
    ),
    Target(
        "entmax",
        "BudgetBisectFunction",
        _from("entmax.root_finding", "BudgetBisectFunction"),
        _budget_samples,
        _budget_reference,
    ),
    Target(
        "entmax",
        "SparsemaxLossFunction",
        _from("entmax.losses", "SparsemaxLossFunction"),
        _entmax_loss_samples,
        _fenchel_young(2.0),
    ),
    Target(
        "entmax",
        "Entmax15LossFunction",
        _from("entmax.losses", "Entmax15LossFunction"),
        _entmax_loss_samples,
        _fenchel_young(1.5),
    ),
)


# ------------------------------------------------------------------------------------------------ kornia


def _load_null_space():
    function = importlib.import_module("kornia.geometry.epipolar.essential")._NullSpaceBasis

    def projector(x):
        basis = function.apply(x)[0]
        return basis @ basis.mT

    return projector


@_samples
def _null_space_samples(draw):
    yield (draw.normal(2, 5, 9),)


def _null_space_reference(x):
    return torch.eye(9, dtype=x.dtype, device=x.device) - x.mT @ torch.linalg.solve(x @ x.mT, x)


@_samples
def _target_log_softmax_samples(draw):
    valid = draw.ints(3, 3, 1, 4) > 0
    yield draw.normal(3, 5, 4), draw.ints(5, 3, 1, 4), None
    yield draw.normal(3, 5, 4), draw.ints(5, 3, 1, 4), valid


def _target_log_softmax_reference(pred, target, valid):
    if valid is not None:
        pred = torch.where(valid, pred, torch.zeros_like(pred))
    return pred.log_softmax(1).gather(1, target)


KORNIA = (
    Target(
        "kornia",
        "_NullSpaceBasis",
        _load_null_space,
        _null_space_samples,
        _null_space_reference,
        note="essential.py. A basis is not unique, so the wrapper returns the projector on its span.",
    ),
    Target(
        "kornia",
        "_TargetLogSoftmax",
        _from("kornia.losses.focal", "_TargetLogSoftmax"),
        _target_log_softmax_samples,
        _target_log_softmax_reference,
        note="losses/focal.py. Supports a double backward.",
    ),
)


# ------------------------------------------------------------------------------------------------ torchao


@_samples
def _apply_mask_samples(draw):
    yield draw.normal(3, 5), draw.uniform(3, 5)


@_samples
def _subnet_samples(draw):
    scores = draw.normal(3, 5)
    yield scores, torch.zeros_like(scores).detach(), torch.ones_like(scores).detach(), 0.4


def _subnet_reference(scores, zeros, ones, sparsity):
    rank = 1 + round(sparsity * (scores.numel() - 1))
    return _straight_through(torch.where(scores < scores.flatten().kthvalue(rank).values, zeros, ones), scores)


@_samples
def _lsq_samples(draw):
    yield draw.normal(3, 5), draw.uniform(3, 1, low=0.2, high=0.5), 3, False


def _lsq_reference(x, alpha, bits, layerwise):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    factor = 1 / math.sqrt(x.numel() * high)
    step = _straight_through(alpha, alpha * factor)
    level = x / step
    rounded = _straight_through(level.clamp(low, high).round(), level.clamp(low, high))
    # step's factor must not reach x: x's own gradient is one inside and zero outside.
    return rounded * step


@_samples
def _nf4_samples(draw):
    yield draw.normal(2, 3, 64), draw.normal(32, 64, grad=False)


def _load_nf4():
    nf4 = importlib.import_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")

    def linear(x, weight):
        return nf4.LinearNF4.apply(x, nf4.to_nf4(weight.to(torch.bfloat16), 64, 32))

    return linear


def _nf4_reference(x, weight):
    nf4 = importlib.import_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    return F.linear(x, nf4.to_nf4(weight.to(torch.bfloat16), 64, 32).to(x.dtype))


TORCHAO = (
    Target(
        "torchao",
        "ApplyMask",
        _from("torchao.sparsity.supermask", "ApplyMask"),
        _apply_mask_samples,
        lambda weight, scores: weight * scores,
        note="Called a straight-through estimator, but of a product: its gradients leave out the other factor.",
    ),
    Target(
        "torchao",
        "GetSubnet",
        _from("torchao.sparsity.supermask", "GetSubnet"),
        _subnet_samples,
        _subnet_reference,
    ),
    Target(
        "torchao",
        "_Round",
        _from("torchao.quantization.quant_primitives", "_Round"),
        _pointwise_samples,
        lambda x: _straight_through(x.round(), x),
    ),
    Target(
        "torchao",
        "LsqBinaryTernaryExtension",
        _from("torchao.prototype.paretoq.models.utils_quant", "LsqBinaryTernaryExtension"),
        _lsq_samples,
        _lsq_reference,
        note="paretoq. Learned step size, its gradient scaled as in the paper.",
    ),
    Target(
        "torchao",
        "LinearNF4",
        _load_nf4,
        _nf4_samples,
        _nf4_reference,
        note="The weight is frozen by design. The reference uses torchao to dequantise.",
    ),
)


# ------------------------------------------------------------------------------------------------ liger-kernel


def _pair(draw: _Draw, *shape: int) -> tuple[Tensor, Tensor]:
    return draw.normal(*shape), draw.normal(*shape)


@_samples
def _liger_rms_samples(draw):
    yield draw.normal(2, 3, 7), draw.normal(7), 1e-6, 0.0, "llama", False
    yield draw.normal(2, 3, 7), draw.normal(7), 1e-6, 1.0, "gemma", True
    yield draw.normal(5, 6), None, 1e-6, 0.0, "none", False


def _liger_rms_reference(x, weight, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
    return _rms(x, eps) if weight is None else _rms(x, eps) * (weight + offset)


@_samples
def _liger_add_rms_samples(draw):
    yield (*_pair(draw, 2, 3, 7), draw.normal(7), 1e-6, 0.0, "llama", False)
    yield (*_pair(draw, 2, 3, 7), draw.normal(7), 1e-6)


def _liger_add_rms_reference(x, residual, weight, eps, offset=0.0, casting_mode="llama", in_place=False):
    total = x + residual
    return _rms(total, eps) * (weight + offset), total


@_samples
def _liger_modulated_samples(draw):
    for in_place in (False, True):
        yield (
            draw.normal(2, 3, 7),
            draw.normal(7),
            draw.normal(2, 7),
            draw.normal(2, 7),
            1e-6,
            0.0,
            "llama",
            in_place,
        )


def _liger_modulated_reference(x, weight, scale, shift, eps, *ignored):
    return (1 + scale[:, None]) * (_rms(x, eps) * weight) + shift[:, None]


@_samples
def _liger_layer_norm_samples(draw):
    yield draw.normal(2, 3, 7), draw.normal(7), draw.normal(7), 1e-5


@_samples
def _liger_group_norm_samples(draw):
    yield draw.normal(2, 6, 5), draw.normal(6), draw.normal(6), 6, 3, 1e-5


@_samples
def _liger_pair_samples(draw):
    yield _pair(draw, 2, 3, 7)


@_samples
def _liger_silu_samples(draw):
    yield _pair(draw, 2, 3, 7)
    yield (*_pair(draw, 3, 5), 0.5, 2.0)


@_samples
def _liger_gate_up_samples(draw):
    yield draw.normal(3, 10), False
    yield draw.normal(3, 10), True
    yield draw.normal(2, 3, 10), False


@_samples
def _liger_poly_norm_samples(draw):
    yield draw.normal(2, 3, 7), draw.normal(3), draw.normal(), 1e-6, False
    yield draw.normal(2, 3, 7), draw.normal(3), draw.normal()


def _liger_poly_norm_reference(x, weight, bias, eps=1e-6, in_place=True):
    return weight[0] * _rms(x**3, eps) + weight[1] * _rms(x**2, eps) + weight[2] * _rms(x, eps) + bias


@_samples
def _liger_attn_res_samples(draw):
    yield draw.normal(3, 2, 4, 5), draw.normal(5), draw.normal(5), 1e-6


def _liger_attn_res_reference(stack, query, norm, eps):
    score = (_rms(stack, eps) * norm) @ query
    return (score.softmax(0)[..., None] * stack).sum(0)


@_samples
def _liger_cross_entropy_samples(draw):
    # input, target, weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap
    yield draw.normal(5, 7), draw.labels(7, 5), None
    yield draw.normal(5, 7), draw.labels(7, 5), None, -100, 1e-2, 0.1, "sum", 3.0
    yield draw.normal(5, 7), draw.labels(7, 5), draw.uniform(7, low=0.5, high=2.0, grad=False), -100, 0.0, 0.1
    yield draw.normal(5, 7), draw.labels(7, 5), None, -100, 0.0, 0.0, "none"


def _liger_cross_entropy_reference(
    x, target, weight=None, ignore=-100, lse_square_scale=0.0, smoothing=0.0, reduction="mean", softcap=None, *rest
):
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    loss = F.cross_entropy(x, target, weight, ignore_index=ignore, label_smoothing=smoothing, reduction=reduction)
    z = lse_square_scale * x.logsumexp(-1).square() * (target != ignore)
    z = {"mean": z.sum() / (target != ignore).sum(), "sum": z.sum(), "none": z}[reduction]
    return loss + z


@_samples
def _liger_fused_linear_samples(draw):
    # input, weight, target, bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap
    yield draw.normal(5, 4), draw.normal(7, 4), draw.labels(7, 5), draw.normal(7)
    yield draw.normal(5, 4), draw.normal(7, 4), draw.labels(7, 5), None, None, -100, 1e-2, 0.1, "sum", 3.0


def _liger_fused_linear_reference(x, weight, target, bias=None, ce_weight=None, *rest):
    return _liger_cross_entropy_reference(F.linear(x, weight, bias), target, ce_weight, *rest)


@_samples
def _liger_rope_samples(draw):
    cos, sin = (a[None] for a in _angles(draw, 3, 8))
    yield draw.normal(2, 4, 3, 8), draw.normal(2, 2, 3, 8), cos, sin
    yield draw.transposed(2, 4, 3, 8), draw.transposed(2, 2, 3, 8), cos, sin


def _rope_reference(q, k, cos, sin, *rest):
    return tuple(x * cos[:, None] + _rotate_half(x) * sin[:, None] for x in (q, k))


@_samples
def _liger_mrope_samples(draw):
    cos, sin = (a.expand(3, 2, 3, 8).contiguous() for a in _angles(draw, 3, 8))
    cos, sin = cos * torch.tensor([1.0, 0.5, 2.0], dtype=draw.dtype).view(3, 1, 1, 1), sin
    yield draw.normal(2, 4, 3, 8), draw.normal(2, 2, 3, 8), cos, sin, [2, 1, 1]
    yield draw.transposed(2, 4, 3, 8), draw.transposed(2, 2, 3, 8), cos, sin, [2, 1, 1]


def _liger_mrope_reference(q, k, cos, sin, section, unsqueeze_dim=1):
    def interleave(table):
        return torch.cat([part[i % 3] for i, part in enumerate(table.split(section * 2, -1))], -1)

    return _rope_reference(q, k, interleave(cos), interleave(sin))


@_samples
def _liger_llama4_samples(draw):
    angle = torch.rand(3, 4, generator=draw.generator, dtype=torch.float64)
    freqs = torch.polar(torch.ones_like(angle), angle).to(torch.complex64).to(draw.device)
    yield draw.normal(2, 3, 4, 8), draw.normal(2, 3, 2, 8), freqs


def _liger_llama4_reference(q, k, freqs):
    def rotate(x):
        real, imag = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = (part.to(x.dtype)[:, None] for part in (freqs.real, freqs.imag))
        return torch.stack((real * cos - imag * sin, real * sin + imag * cos), -1).flatten(-2)

    return rotate(q), rotate(k)


@_samples
def _liger_kl_samples(draw):
    yield draw.logprob(5, 7), draw.prob(5, 7)
    yield draw.logprob(5, 7), draw.logprob(5, 7, grad=False), "sum", True
    yield draw.logprob(5, 7), draw.prob(5, 7), "none"
    yield draw.logprob(5, 7), draw.prob(5, 7), "mean"


def _liger_kl_reference(pred, true, reduction="batchmean", log_target=False, eps=1e-10):
    return F.kl_div(pred, true, reduction=reduction, log_target=log_target)


@_samples
def _liger_jsd_samples(draw):
    yield draw.logprob(5, 7), draw.logprob(5, 7, grad=False), draw.labels(7, 5), 0.3
    yield draw.logprob(5, 7), draw.logprob(5, 7, grad=False), None, 0.0
    yield draw.logprob(5, 7), draw.logprob(5, 7, grad=False), None, 1.0


def _liger_jsd_reference(x, target, labels=None, beta=0.5, ignore=-100, *rest):
    keep = torch.ones(len(x), dtype=torch.bool, device=x.device) if labels is None else labels != ignore
    q, p = x[keep], target[keep]
    if beta == 0:
        loss = p.exp() * (p - q)
    elif beta == 1:
        loss = q.exp() * (q - p)
    else:
        middle = (beta * p.exp() + (1 - beta) * q.exp()).log()
        loss = beta * p.exp() * (p - middle) + (1 - beta) * q.exp() * (q - middle)
    return loss.sum() / keep.sum()


@_samples
def _liger_tvd_samples(draw):
    yield draw.prob(5, 7, grad=True), draw.prob(5, 7)
    yield draw.prob(5, 7, grad=True), draw.prob(5, 7), draw.labels(7, 5), "mean"
    yield draw.prob(5, 7, grad=True), draw.prob(5, 7), draw.labels(7, 5), "none"


def _liger_tvd_reference(p, q, labels=None, reduction="batchmean", ignore=-100):
    keep = torch.ones(len(p), dtype=torch.bool, device=p.device) if labels is None else labels != ignore
    loss = 0.5 * (p - q).abs() * keep[:, None]
    count = {"batchmean": keep.sum(), "mean": keep.sum() * p.shape[1], "sum": 1}.get(reduction)
    return loss if reduction == "none" else loss.sum() / count


@_samples
def _liger_ce_tvd_samples(draw):
    yield draw.normal(5, 7), draw.normal(5, 7, grad=False), draw.labels(7, 5)


def _liger_ce_tvd_reference(student, teacher, target, ignore=-100):
    ce = F.cross_entropy(student, target, reduction="none", ignore_index=ignore)
    return ce, 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1) * (target != ignore)


@_samples
def _liger_linear_jsd_samples(draw):
    for labels in (None, draw.labels(7, 5)):
        yield (
            draw.normal(5, 4),
            draw.normal(7, 4),
            draw.normal(5, 6, grad=False),
            draw.normal(7, 6, grad=False),
            labels,
            0.3,
            -100,
            2.0,
        )


def _liger_linear_jsd_reference(x, weight, teacher, teacher_weight, labels, beta, ignore, temperature):
    student = (x @ weight.mT / temperature).log_softmax(-1)
    return _liger_jsd_reference(
        student, (teacher @ teacher_weight.mT / temperature).log_softmax(-1), labels, beta, ignore
    )


@_samples
def _liger_linear_kl_samples(draw):
    yield draw.normal(5, 4), draw.normal(7, 4), draw.prob(5, 7)
    yield draw.normal(5, 4), draw.normal(7, 4), draw.prob(5, 7), draw.labels(7, 5), "sum", -100, 2.0


def _liger_linear_kl_reference(
    x, weight, target, labels=None, reduction="batchmean", ignore=-100, temperature=1.0
):
    keep = torch.ones(len(x), dtype=torch.bool, device=x.device) if labels is None else labels != ignore
    student = (x @ weight.mT / temperature).log_softmax(-1)
    loss = F.kl_div(student[keep], target[keep], reduction="sum")
    return loss / keep.sum() if reduction == "batchmean" else loss


@_samples
def _liger_embedding_samples(draw):
    yield draw.normal(7, 5), draw.ints(7, 2, 3)


@_samples
def _liger_mta_samples(draw):
    yield draw.normal(2, 4, 5, 5), draw.normal(4, 2, 3, 3), draw.normal(4), 1, 1, 1, 2
    yield draw.normal(2, 4, 5, 5), draw.normal(4, 4, 3, 3), None, 1, 1, 1, 1, True


def _liger_mta_reference(scores, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, sparse=False):
    length = scores.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    hidden = scores.masked_fill(future, -1e9)
    probability = _entmax_reference(hidden, 2.0, -1) if sparse else hidden.softmax(-1)
    return F.conv2d(probability, weight, bias, stride, padding, dilation, groups).masked_fill(future, 0)


@_samples
def _liger_neighborhood_samples(draw):
    yield draw.normal(1, 2, 16, 16), draw.normal(1, 2, 16, 16), draw.normal(1, 2, 16, 16), 5, 1
    yield draw.normal(1, 2, 11, 8), draw.normal(1, 2, 11, 8), draw.normal(1, 2, 11, 8), 3, 2, 0.3


def _liger_neighborhood_reference(q, k, v, kernel_size=7, dilation=1, scale=None):
    position = torch.arange(q.shape[-2], device=q.device)
    distance = (position[:, None] - position[None, :]).abs()
    near = (distance <= kernel_size // 2 * dilation) & (distance % dilation == 0)
    score = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return score.masked_fill(~near, -math.inf).softmax(-1) @ v


@_samples
def _liger_mhc_samples(draw):
    yield draw.normal(2, 3, 4, 5), draw.normal(2, 3, 4)


@_samples
def _liger_mhc_post_samples(draw):
    yield draw.normal(2, 3, 4, 5), draw.normal(2, 3, 5), draw.normal(2, 3, 4), draw.normal(2, 3, 4, 4)


def _liger_mhc_post_reference(x, out, post, residual):
    return torch.einsum("...os,...sc->...oc", residual, x) + post[..., None] * out[..., None, :]


@_samples
def _liger_moe_samples(draw):
    chosen = torch.stack([torch.randperm(3, generator=draw.generator)[:2] for _ in range(5)]).int().to(draw.device)
    yield draw.normal(5, 8), draw.normal(3, 12, 8), draw.normal(3, 8, 6), chosen, draw.uniform(5, 2)


def _liger_moe_reference(x, gate_up, down, chosen, weights):
    hidden = torch.einsum("th,tknh->tkn", x, gate_up[chosen.long()])
    gate, up = hidden.chunk(2, -1)
    out = torch.einsum("tki,tkhi->tkh", F.silu(gate) * up, down[chosen.long()])
    return (weights[..., None] * out).sum(1)


@_samples
def _liger_logprob_samples(draw):
    yield draw.normal(5, 4), draw.normal(7, 4), draw.ints(7, 5), draw.normal(7), 2.0, 3
    yield draw.normal(5, 4), draw.normal(7, 4), draw.ints(7, 5), None, 1.0, 4


def _liger_logprob_reference(hidden, weight, targets, bias, temperature, chunk):
    logits = F.linear(hidden, weight, bias) / temperature
    return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


@_samples
def _liger_scaled_ce_samples(draw):
    yield draw.normal(5, 4), draw.normal(7, 4), draw.labels(7, 5), 2.0, -100, True


def _liger_scaled_ce_reference(hidden, weight, target, temperature, ignore, entropy):
    logprob = (hidden @ weight.mT / temperature).log_softmax(-1)
    nll = F.nll_loss(logprob, target, ignore_index=ignore, reduction="none")
    return nll, -(logprob.exp() * logprob).sum(-1) * (target != ignore)


@_samples
def _liger_grpo_samples(draw):
    logits = draw.normal(2, 5, 7)
    ids = draw.ints(7, 2, 4)
    old = draw.logprob(2, 4, 7, grad=False).gather(-1, ids[..., None]).squeeze(-1)
    reference = draw.logprob(2, 4, 7, grad=False).gather(-1, ids[..., None]).squeeze(-1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], device=draw.device)
    yield logits, old, reference, ids, draw.normal(2, grad=False), mask, 0.9, 0.04, 0.2, 0.3, False


def _liger_grpo_reference(logits, old, ref, ids, advantages, mask, temperature, beta, low, high, inplace):
    logp = (logits[:, :-1] / temperature).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    ratio = (logp - old).exp()
    gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - low, 1 + high) * advantages[:, None])
    kl = (ref - logp).exp() - (ref - logp) - 1
    return (((-gain + beta * kl) * mask).sum(1) / mask.sum(1)).mean()


class _MLP(torch.nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x):
        return torch.tanh(x @ self.weight)


def _mlp_forward(module, x):
    return module(x)


def _load_tiled(module: str, name: str) -> Callable[[], Any]:
    def load():
        _interpreted()
        function = getattr(importlib.import_module(module), name)

        def tiled(x, weight):
            mlp = _MLP(weight.detach().clone())
            return function.apply(_mlp_forward, mlp, x, 3, list(mlp.parameters()))

        return tiled

    return load


@_samples
def _tiled_samples(draw):
    yield draw.normal(2, 7, 5), draw.normal(5, 5, grad=False)


def _tiled_reference(x, weight):
    return torch.tanh(x @ weight)


_OVERWRITES = "FINDING: backward writes the gradients over the saved inputs, which are the caller's own tensors."
_LIGER: list[tuple[Any, ...]] = [
    (
        "rms_norm",
        "LigerRMSNormFunction",
        _liger_rms_samples,
        _liger_rms_reference,
        "in_place (the default) writes over dY. Refuses float64.",
    ),
    (
        "fused_add_rms_norm",
        "LigerFusedAddRMSNormFunction",
        _liger_add_rms_samples,
        _liger_add_rms_reference,
        "Refuses float64.",
    ),
    (
        "modulated_rms_norm",
        "LigerModulatedRMSNormFunction",
        _liger_modulated_samples,
        _liger_modulated_reference,
        "in_place (the default) writes over dY. Refuses float64.",
    ),
    (
        "layer_norm",
        "LigerLayerNormFunction",
        _liger_layer_norm_samples,
        lambda x, w, b, eps: F.layer_norm(x, w.shape, w, b, eps),
        "",
    ),
    (
        "group_norm",
        "LigerGroupNormFunction",
        _liger_group_norm_samples,
        lambda x, w, b, channels, groups, eps: F.group_norm(x, groups, w, b, eps),
        "FINDING: for all but float32 the gradients of weight and bias are cast to bfloat16.",
    ),
    (
        "poly_norm",
        "LigerPolyNormFunction",
        _liger_poly_norm_samples,
        _liger_poly_norm_reference,
        "in_place (the default) writes over dY. A bias of shape (1,) is refused in backward: it must be ().",
    ),
    ("attn_res", "LigerAttnResFunction", _liger_attn_res_samples, _liger_attn_res_reference, ""),
    (
        "swiglu",
        "LigerSiLUMulFunction",
        _liger_silu_samples,
        lambda a, b, gate=1.0, down=1.0: F.silu(a * gate) * b * down,
        _OVERWRITES,
    ),
    (
        "swiglu",
        "LigerFusedGateUpSiLUMulFunction",
        _liger_gate_up_samples,
        lambda y, in_place: F.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1],
        "FINDING: a 3-D y, which its docstring allows, is refused in backward: the gradient comes back 2-D.",
    ),
    (
        "geglu",
        "LigerGELUMulFunction",
        _liger_pair_samples,
        lambda a, b: F.gelu(a, approximate="tanh") * b,
        _OVERWRITES,
    ),
    ("relu_squared", "LigerReLUSquaredFunction", _pointwise_samples, lambda x: F.relu(x).square(), ""),
    ("softmax", "LigerSoftmaxFunction", _pointwise_samples, lambda x: x.softmax(-1), ""),
    ("sparsemax", "LigerSparsemaxFunction", _entmax_samples, lambda x, dim: _entmax_reference(x, 2.0, dim), ""),
    (
        "rope",
        "LigerRopeFunction",
        _liger_rope_samples,
        _rope_reference,
        "FINDING: forward writes over q and k, no mark_dirty, when they are (B, T, H, D) in memory, as usual.",
    ),
    (
        "qwen2vl_mrope",
        "LigerQwen2VLMRopeFunction",
        _liger_mrope_samples,
        _liger_mrope_reference,
        "FINDING: as LigerRopeFunction.",
    ),
    (
        "llama4_rope",
        "LigerLlama4RopeFunction",
        _liger_llama4_samples,
        _liger_llama4_reference,
        "FINDING: forward writes over q and k without mark_dirty, backward over dq and dk.",
    ),
    ("kl_div", "LigerKLDivLossFunction", _liger_kl_samples, _liger_kl_reference, ""),
    ("jsd", "LigerJSDFunction", _liger_jsd_samples, _liger_jsd_reference, ""),
    ("tvd", "LigerTVDLossFunction", _liger_tvd_samples, _liger_tvd_reference, ""),
    ("fused_ce_tvd", "LigerFusedCETVDFunction", _liger_ce_tvd_samples, _liger_ce_tvd_reference, ""),
    (
        "fused_linear_jsd",
        "LigerFusedLinearJSDFunction",
        _liger_linear_jsd_samples,
        _liger_linear_jsd_reference,
        "A second backward (retain_graph) multiplies by dY again.",
    ),
    (
        "fused_linear_kl_div",
        "LigerFusedLinearKLDivFunction",
        _liger_linear_kl_samples,
        _liger_linear_kl_reference,
        "A second backward (retain_graph) multiplies by dY again.",
    ),
    (
        "experimental.embedding",
        "LigerEmbeddingFunction",
        _liger_embedding_samples,
        lambda table, index: F.embedding(index, table),
        "",
    ),
    (
        "multi_token_attention",
        "LigerMultiTokenAttentionFunction",
        _liger_mta_samples,
        _liger_mta_reference,
        "sparse=True is float32 only.",
    ),
    (
        "fused_neighborhood_attention",
        "LigerFusedNeighborhoodAttentionFunction",
        _liger_neighborhood_samples,
        _liger_neighborhood_reference,
        "",
    ),
    (
        "mhc",
        "LigerMHCPreFunction",
        _liger_mhc_samples,
        lambda x, h: (x * h[..., None]).sum(-2),
        "",
    ),
    ("mhc", "LigerMHCPostResFunction", _liger_mhc_post_samples, _liger_mhc_post_reference, ""),
    (
        "fused_moe",
        "LigerFusedMoEFunction",
        _liger_moe_samples,
        _liger_moe_reference,
        "Slow: half a minute a dtype. float32 only: float64 is garbage in the interpreter.",
    ),
    (
        "fused_linear_scaled_cross_entropy",
        "_FusedLinearPPOFallbackFunction",
        _liger_scaled_ce_samples,
        _liger_scaled_ce_reference,
        "No Triton.",
    ),
]
LIGER = (
    *(
        Target("liger-kernel", name, _liger(f"ops.{module}", name), samples, reference, INTERPRET, note)
        for module, name, samples, reference, note in _LIGER
    ),
    Target(
        "liger-kernel",
        "LigerCrossEntropyFunction",
        _liger("ops.cross_entropy", "LigerCrossEntropyFunction", 0),
        _liger_cross_entropy_samples,
        _liger_cross_entropy_reference,
        INTERPRET,
        note="The first of four outputs. FINDING: forward writes the gradient over the logits.",
    ),
    Target(
        "liger-kernel",
        "LigerFusedLinearCrossEntropyFunction",
        _liger("ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction", 0),
        _liger_fused_linear_samples,
        _liger_fused_linear_reference,
        INTERPRET,
        note="The first of its four outputs. A second backward (retain_graph) multiplies by dY again.",
    ),
    Target(
        "liger-kernel",
        "GrpoLossFunction",
        _liger("ops.grpo_loss", "GrpoLossFunction", 0),
        _liger_grpo_samples,
        _liger_grpo_reference,
        INTERPRET,
        note="The first of its outputs.",
    ),
    Target(
        "liger-kernel",
        "_ChunkedSelectiveLogProbFunction",
        _from("liger_kernel.chunked_loss.fused_linear_ppo", "_ChunkedSelectiveLogProbFunction"),
        _liger_logprob_samples,
        _liger_logprob_reference,
        INTERPRET,
        note="No Triton.",
    ),
    Target(
        "liger-kernel",
        "LigerTiledMLPFunction",
        _load_tiled("liger_kernel.ops.tiled_mlp", "LigerTiledMLPFunction"),
        _tiled_samples,
        _tiled_reference,
        INTERPRET,
        note="No Triton. Takes a function and a module; the wrapper closes over both.",
    ),
)


# ------------------------------------------------------------------------------------------------ unsloth


@_samples
def _unsloth_rms_samples(draw):
    yield draw.normal(2, 3, 7), draw.normal(7, grad=False), 1e-6, False
    yield draw.normal(2, 3, 7), draw.normal(7, grad=False), 1e-6, True


def _unsloth_rms_reference(x, weight, eps, gemma=False):
    return _rms(x, eps) * (weight + 1 if gemma else weight)


@_samples
def _unsloth_layer_norm_samples(draw):
    yield draw.normal(2, 3, 7), draw.normal(7, grad=False), draw.normal(7, grad=False), 1e-5


@_samples
def _unsloth_rope_samples(draw):
    cos, sin = _angles(draw, 3, 8)
    yield draw.normal(2, 3, 4, 8), cos, sin


def _unsloth_rope_reference(q, cos, sin):
    return q * cos[:, None] + _rotate_half(q) * sin[:, None]


@_samples
def _unsloth_rope_qk_samples(draw):
    cos, sin = _angles(draw, 3, 8)
    yield draw.normal(2, 4, 3, 8), draw.normal(2, 2, 3, 8), cos, sin, None
    yield draw.transposed(2, 4, 3, 8), draw.transposed(2, 2, 3, 8), cos, sin, None


def _unsloth_rope_qk_reference(q, k, cos, sin, indices):
    return tuple(x * cos + _rotate_half(x) * sin for x in (q, k))


def _wrap_in_place(function):
    def clone_first(q, *rest):
        # Writes over a tensor that is not to be a leaf.
        return function.apply(q.clone(), *rest)

    clone_first.__name__ = function.__name__
    return clone_first


@_samples
def _unsloth_slow_rope_samples(draw):
    cos, sin = _angles(draw, 3, 8)
    yield draw.normal(2, 4, 3, 8), cos, sin, None


def _unsloth_slow_rope_reference(q, cos, sin, position_ids):
    return q * cos + _rotate_half(q) * sin


def _wrap_cross_entropy(function):
    # An alias of tl.cast, which the interpreter does not know for tl.cast.
    sys.modules[function.__module__].triton_cast = lambda x, dtype: x.to(dtype) if hasattr(x, "to") else x
    return function


@_samples
def _unsloth_cross_entropy_samples(draw):
    yield draw.normal(5, 7), draw.labels(7, 5), 0, 0
    yield draw.normal(5, 7), draw.labels(7, 5), 3.0, 0.5


def _unsloth_cross_entropy_reference(logits, labels, softcap=0, scaling=0):
    if scaling:
        logits = logits * scaling
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="none")


def _lora(draw: _Draw, inputs: int, outputs: int, rank: int = 2) -> tuple[Any, ...]:
    """weight, its quant state, A, B and the scale, as unsloth passes them."""
    return (
        draw.normal(outputs, inputs, grad=False),
        None,
        draw.normal(rank, inputs),
        draw.normal(outputs, rank),
        0.5,
    )


def _lora_linear(x, weight, quant, a, b, scale):
    return x @ weight.mT + scale * (x @ a.mT @ b.mT)


@_samples
def _lora_w_samples(draw):
    yield draw.normal(2, 3, 5), *_lora(draw, 5, 7)


@_samples
def _lora_qkv_samples(draw):
    for in_place in (False, True):
        yield draw.normal(2, 3, 5), *_lora(draw, 5, 6), *_lora(draw, 5, 4), *_lora(draw, 5, 4), in_place


def _lora_qkv_reference(x, *args):
    return tuple(_lora_linear(x, *args[i : i + 5]) for i in (0, 5, 10))


@_samples
def _lora_mlp_samples(draw):
    for in_place in (False, True):
        yield draw.normal(2, 3, 5), *_lora(draw, 5, 6), *_lora(draw, 5, 6), *_lora(draw, 6, 5), in_place


def _lora_mlp_reference(gate: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def reference(x, *args):
        hidden = gate(_lora_linear(x, *args[:5])) * _lora_linear(x, *args[5:10])
        return _lora_linear(hidden, *args[10:15])

    return reference


def _wrap_lora_mlp(module: str, forward: str, backward: str) -> Callable[[Any], Any]:
    def wrap(function):
        kernels = importlib.import_module(module)

        def lora_mlp(x, *args):
            *weights, in_place = args
            return function.apply(x, *weights, getattr(kernels, forward), getattr(kernels, backward), in_place)

        return lora_mlp

    return wrap


def _wrap_checkpointer(function):
    def checkpointer(x, weight):
        (out,) = function.apply(lambda x: (torch.tanh(x @ weight.detach()),), x)
        return out

    return checkpointer


def _wrap_tiled(function):
    def tiled(x, weight):
        mlp = _MLP(weight.detach().clone())
        return function.apply(mlp.forward, mlp, x, False, 3, 0)

    return tiled


@_samples
def _unsloth_fused_loss_samples(draw):
    labels = draw.labels(7, 12).view(2, 6)
    yield draw.normal(2, 6, 4), draw.normal(7, 4), draw.normal(7), labels


def _wrap_fused_loss(function):
    def fused_loss(hidden, weight, bias, labels):
        from unsloth_zoo.fused_losses.cross_entropy_loss import compute_fused_ce_loss

        return function.apply(
            compute_fused_ce_loss,
            hidden,
            weight,
            bias,
            labels,
            None,
            None,
            None,
            True,
            None,
            False,
            False,
            {"n_chunks": 3},
        )

    return fused_loss


def _unsloth_fused_loss_reference(hidden, weight, bias, labels):
    return F.cross_entropy(F.linear(hidden[:, :-1], weight, bias).flatten(0, 1), labels[:, 1:].flatten())


_KERNELS = "unsloth.kernels"
_DY = "FINDING: backward writes over dY, which autograd may still hand to others."
_OUT_OF_BOUNDS = (
    "FINDING: takes dY's last stride to be 1, so an expanded dY (y.sum().backward()) is read and written out of "
    "bounds. That corrupts the heap: run it in a process of its own."
)
UNSLOTH = (
    Target(
        "unsloth",
        "Fast_RMS_Layernorm",
        _unsloth(f"{_KERNELS}.rms_layernorm", "Fast_RMS_Layernorm"),
        _unsloth_rms_samples,
        _unsloth_rms_reference,
        INTERPRET,
        note=f"The weight is frozen by design. {_DY} {_OUT_OF_BOUNDS}",
    ),
    Target(
        "unsloth",
        "Fast_Layernorm",
        _unsloth(f"{_KERNELS}.layernorm", "Fast_Layernorm"),
        _unsloth_layer_norm_samples,
        lambda x, w, b, eps: F.layer_norm(x, w.shape, w, b, eps),
        INTERPRET,
        note=f"Weight and bias are frozen by design. {_DY} {_OUT_OF_BOUNDS}",
    ),
    Target(
        "unsloth",
        "Fast_RoPE_Embedding",
        _unsloth(f"{_KERNELS}.rope_embedding", "Fast_RoPE_Embedding"),
        _unsloth_rope_samples,
        _unsloth_rope_reference,
        INTERPRET,
        note=f"Forward writes over Q without mark_dirty. {_DY} {_OUT_OF_BOUNDS}",
    ),
    Target(
        "unsloth",
        "Fast_RoPE_Embedding_QK",
        _unsloth(f"{_KERNELS}.rope_embedding", "Fast_RoPE_Embedding_QK"),
        _unsloth_rope_qk_samples,
        _unsloth_rope_qk_reference,
        INTERPRET,
        note=f"Forward writes over Q and K without mark_dirty. {_DY}",
    ),
    Target(
        "unsloth",
        "Slow_RoPE_Embedding",
        _unsloth(f"{_KERNELS}.rope_embedding", "Slow_RoPE_Embedding", _wrap_in_place),
        _unsloth_slow_rope_samples,
        _unsloth_slow_rope_reference,
        INTERPRET,
        note=f"No Triton. Writes over its argument without mark_dirty; the wrapper gives it a clone. {_DY}",
    ),
    Target(
        "unsloth",
        "Fast_CrossEntropyLoss",
        _unsloth(f"{_KERNELS}.cross_entropy_loss", "Fast_CrossEntropyLoss", _wrap_cross_entropy),
        _unsloth_cross_entropy_samples,
        _unsloth_cross_entropy_reference,
        INTERPRET,
        note=f"{_OVERWRITES} FINDING: with softcapping, padding past the vocabulary counts in the logsumexp.",
    ),
    Target(
        "unsloth",
        "LoRA_W",
        _unsloth(f"{_KERNELS}.fast_lora", "LoRA_W"),
        _lora_w_samples,
        _lora_linear,
        INTERPRET,
        note="No Triton.",
    ),
    Target(
        "unsloth",
        "LoRA_QKV",
        _unsloth(f"{_KERNELS}.fast_lora", "LoRA_QKV"),
        _lora_qkv_samples,
        _lora_qkv_reference,
        INTERPRET,
        note="No Triton. in_place (the default) writes the gradient over X.",
    ),
    *(
        Target(
            "unsloth",
            f"LoRA_MLP ({name})",
            _unsloth(
                f"{_KERNELS}.fast_lora", "LoRA_MLP", _wrap_lora_mlp(f"{_KERNELS}.{module}", forward, backward)
            ),
            _lora_mlp_samples,
            _lora_mlp_reference(gate),
            INTERPRET,
            note="Writes over saved tensors; in_place (the default) writes the gradient over X.",
        )
        for name, module, forward, backward, gate in (
            ("swiglu", "swiglu", "swiglu_fg_kernel", "swiglu_DWf_DW_dfg_kernel", F.silu),
            ("geglu exact", "geglu", "geglu_exact_forward_kernel", "geglu_exact_backward_kernel", F.gelu),
            (
                "geglu approx",
                "geglu",
                "geglu_approx_forward_kernel",
                "geglu_approx_backward_kernel",
                functools.partial(F.gelu, approximate="tanh"),
            ),
        )
    ),
    Target(
        "unsloth_zoo",
        "TiledMLP",
        _unsloth("unsloth_zoo.tiled_mlp", "TiledMLP", _wrap_tiled),
        _tiled_samples,
        _tiled_reference,
        INTERPRET,
        note="No Triton.",
    ),
    *(
        Target(
            "unsloth_zoo",
            name,
            _unsloth("unsloth_zoo.gradient_checkpointing", name, _wrap_checkpointer),
            _tiled_samples,
            _tiled_reference,
            INTERPRET,
            note="No Triton.",
        )
        for name in ("Unsloth_Gradient_Checkpointer", "Unsloth_Offloaded_Gradient_Checkpointer")
    ),
    Target(
        "unsloth_zoo",
        "UnslothFusedLoss",
        _unsloth("unsloth_zoo.fused_losses.cross_entropy_loss", "UnslothFusedLoss", _wrap_fused_loss),
        _unsloth_fused_loss_samples,
        _unsloth_fused_loss_reference,
        INTERPRET,
        note="No Triton; torch.func in forward. FINDING: backward ignores grad_output (its comment: assumed 1).",
    ),
)


# ------------------------------------------------------------------------------------------------ xformers


@_samples
def _swiglu_samples(draw):
    first, second = ((draw.normal(6, 5), draw.normal(6)) for _ in range(2))
    yield draw.normal(3, 5), *first, *second, draw.normal(4, 6), draw.normal(4)


def _swiglu_reference(x, w1, b1, w2, b2, w3, b3):
    return F.linear(F.silu(F.linear(x, w1, b1)) * F.linear(x, w2, b2), w3, b3)


@_samples
def _unbind_samples(draw):
    yield draw.normal(3, 2, 5), 0
    yield draw.normal(3, 2, 5), 1


XFORMERS = (
    Target(
        "xformers",
        "_SwiGLUDecomposedFunc",
        _from("xformers.ops.swiglu_op", "_SwiGLUDecomposedFunc"),
        _swiglu_samples,
        _swiglu_reference,
        note="Comes with unsloth. forward and backward are classmethods; the sigmoid of backward is float32.",
    ),
    Target(
        "xformers",
        "_Unbind",
        _from("xformers.ops.unbind", "_Unbind"),
        _unbind_samples,
        lambda x, dim: x.unbind(dim),
    ),
)


# ------------------------------------------------------------------------------------------------ fla


def _fla(module: str, name: str) -> Callable[[], Any]:
    return _triton(f"fla.{module}", name)


_FLA_ENV = INTERPRET | EAGER


@_samples
def _bias_samples(draw):
    yield draw.normal(2, 3, 7), draw.normal(7)


@_samples
def _log_sigmoid_samples(draw):
    yield draw.normal(5, 7), 2.0


@_samples
def _fla_norm_samples(draw):
    yield (draw.normal(2, 3, 8),)


@_samples
def _l2wrap_samples(draw):
    yield draw.normal(), draw.normal(2, 3, 7), 1e-2


def _l2wrap_reference(loss, logits, factor):
    penalty = 0.5 * factor * logits.amax(-1).square().sum() / (logits.shape[0] * logits.shape[1])
    return _straight_through(loss, loss + penalty)


_FLA: list[tuple[Any, ...]] = [
    (
        "modules.activations.ops",
        "GeLUFunction",
        _bias_samples,
        lambda x, bias: F.gelu(x + bias, approximate="tanh"),
        "",
    ),
    (
        "modules.activations.ops",
        "FastGeLUFunction",
        _pointwise_samples,
        lambda x: F.gelu(x, approximate="tanh"),
        "",
    ),
    ("modules.activations.ops", "SquaredReLUFunction", _pointwise_samples, lambda x: F.relu(x).square(), ""),
    ("modules.activations.ops", "SigmoidFunction", _pointwise_samples, torch.sigmoid, ""),
    (
        "modules.activations.ops",
        "LogSigmoidFunction",
        _log_sigmoid_samples,
        lambda x, temperature: F.logsigmoid(x) / temperature,
        "",
    ),
    ("modules.activations.ops", "ELUPlusOneFunction", _pointwise_samples, lambda x: F.elu(x) + 1, ""),
    ("modules.activations.ops", "SwishFunction", _pointwise_samples, F.silu, ""),
    ("modules.activations.ops", "SwiGLUFunction", _liger_pair_samples, lambda a, b: F.silu(a) * b, ""),
    (
        "modules.norm.l2norm",
        "L2NormFunction",
        _fla_norm_samples,
        lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6),
        "",
    ),
    (
        "modules.l2warp",
        "L2Wrap",
        _l2wrap_samples,
        _l2wrap_reference,
        "Adds the gradient of a penalty that is no part of its output, by design; the reference has the same.",
    ),
]
FLA = tuple(
    Target("flash-linear-attention", name, _fla(module, name), samples, reference, _FLA_ENV, note)
    for module, name, samples, reference, note in _FLA
)


TARGETS: tuple[Target, ...] = (
    *TIMM,
    *PEFT,
    *TORCHVISION,
    *TORCH,
    *TRANSFORMERS,
    *BITSANDBYTES,
    *ENTMAX,
    *KORNIA,
    *TORCHAO,
    *LIGER,
    *UNSLOTH,
    *XFORMERS,
    *FLA,
)
