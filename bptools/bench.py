"""Each op beside torch's own, in one process: `bptools bench ops`. Whole models: `bptools bench MODEL`.

Of ops, the contenders take turns, so that a machine that slows down slows all of them, and medians are compared.
Times are of one forward and backward. What is kept is what autograd holds between the two beside inputs and
parameters.
"""

from __future__ import annotations

import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

import bptools.functional as B
from bptools.memory import _bench
from bptools.ops import backend

Contender = Literal["eager", "lean", "lean-bf16", "lean-int8", "checkpoint", "compile", "liger"]


@dataclass(frozen=True)
class Work:
    """One op at one realistic size: `make` gives the arguments, those that require gradients included."""

    op: str
    size: str
    make: Callable[[], tuple[Any, ...]]
    constants: dict[str, Any]


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def _work() -> list[Work]:
    def elementwise(op: str) -> Work:
        return Work(op, "2048×1024", lambda: (_randn(2048, 1024),), {})

    return [
        Work("linear", "2048×512 → 512", lambda: (_randn(2048, 512), _randn(512, 512), _randn(512)), {}),
        *map(
            elementwise, ("relu", "leaky_relu", "gelu", "silu", "sigmoid", "tanh", "elu", "selu", "celu", "mish")
        ),
        *map(
            elementwise, ("logsigmoid", "tanhshrink", "softsign", "softplus", "hardtanh", "relu6", "hardsigmoid")
        ),
        *map(elementwise, ("hardswish", "hardshrink", "softshrink", "rrelu", "glu", "gumbel_softmax")),
        Work("threshold", "2048×1024", lambda: (_randn(2048, 1024), 0.1, 0.0), {}),
        Work("prelu", "2048×1024", lambda: (_randn(2048, 1024), _randn(1024)), {}),
        Work("softmin", "2048×1024", lambda: (_randn(2048, 1024),), {"dim": -1}),
        Work("softmax", "2048×1024", lambda: (_randn(2048, 1024),), {"dim": -1}),
        Work("log_softmax", "2048×1024", lambda: (_randn(2048, 1024),), {"dim": -1}),
        Work("dropout", "2048×1024", lambda: (_randn(2048, 1024),), {}),
        Work("dropout1d", "32×64×1024", lambda: (_randn(32, 64, 1024),), {}),
        Work("dropout2d", "32×64×32×32", lambda: (_randn(32, 64, 32, 32),), {}),
        Work("dropout3d", "32×64×4×16×16", lambda: (_randn(32, 64, 4, 16, 16),), {}),
        Work("alpha_dropout", "2048×1024", lambda: (_randn(2048, 1024),), {"training": True}),
        Work("feature_alpha_dropout", "32×64×32×32", lambda: (_randn(32, 64, 32, 32),), {"training": True}),
        Work("layer_norm", "2048×1024", lambda: (_randn(2048, 1024), (1024,), _randn(1024), _randn(1024)), {}),
        Work("rms_norm", "2048×1024", lambda: (_randn(2048, 1024), (1024,), _randn(1024)), {}),
        Work(
            "batch_norm",
            "32×64×28×28",
            lambda: (_randn(32, 64, 28, 28), torch.zeros(64), torch.ones(64), _randn(64), _randn(64), True),
            {},
        ),
        Work(
            "conv1d", "32×64×256, 3", lambda: (_randn(32, 64, 256), _randn(64, 64, 3), _randn(64)), {"padding": 1}
        ),
        Work(
            "conv2d",
            "16×64×28×28, 3×3",
            lambda: (_randn(16, 64, 28, 28), _randn(64, 64, 3, 3), _randn(64)),
            {"padding": 1},
        ),
        Work(
            "conv3d",
            "2×16×16×28×28, 3×3×3",
            lambda: (_randn(2, 16, 16, 28, 28), _randn(16, 16, 3, 3, 3), _randn(16)),
            {"padding": 1},
        ),
        Work("max_pool2d", "32×64×56×56", lambda: (_randn(32, 64, 56, 56), 2), {}),
        Work("avg_pool2d", "32×64×56×56", lambda: (_randn(32, 64, 56, 56), 2), {}),
        Work("adaptive_avg_pool2d", "32×64×56×56 → 7×7", lambda: (_randn(32, 64, 56, 56), 7), {}),
        Work("embedding", "4096 of 32000×256", lambda: (torch.randint(32000, (4096,)), _randn(32000, 256)), {}),
        Work("cross_entropy", "2048×32000", lambda: (_randn(2048, 32000), torch.randint(32000, (2048,))), {}),
        Work("mse_loss", "2048×1024", lambda: (_randn(2048, 1024), torch.randn(2048, 1024)), {}),
        Work(
            "scaled_dot_product_attention",
            "4×8×256×64",
            lambda: (_randn(4, 8, 256, 64), _randn(4, 8, 256, 64), _randn(4, 8, 256, 64)),
            {"is_causal": True},
        ),
    ]


def _step(call: Callable[[], Tensor], inputs: list[Tensor]) -> float:
    """Seconds that one forward and backward take."""
    started = time.perf_counter()
    y = call()
    torch.autograd.grad(y, inputs, torch.ones_like(y))
    return time.perf_counter() - started


def measure(work: Work, seconds: float) -> dict[str, Any]:
    """Median seconds and kept bytes of torch's op, ours in `auto`, and our plain formula, taking turns."""
    args = work.make()
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]

    def ours() -> Tensor:
        return getattr(B, work.op)(*args, **work.constants)

    def theirs() -> Tensor:
        return getattr(F, work.op)(*args, **work.constants)

    contenders = {"torch": (theirs, "auto"), "auto": (ours, "auto"), "formula": (ours, "formula")}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for warm_up in (
        True,
        False,
    ):  # the allocator settles only after a while, and where `auto` is fused it compiles
        started = time.perf_counter()
        while time.perf_counter() - started < seconds or len(times["torch"]) < 5:
            # In another order each time: what one frees is what the next does not have to ask the system for.
            for name, (call, tier) in random.sample(list(contenders.items()), len(contenders)):
                with backend(tier):
                    times[name].append(_step(call, inputs))
        if warm_up:
            times = {name: [] for name in contenders}
    result: dict[str, Any] = {name: statistics.median(taken) for name, taken in times.items()}
    with backend("auto"):
        result["kept torch"], result["kept ours"] = (_bench.kept_bytes(f, inputs)[1] for f in (theirs, ours))
    return result


def bench(
    what: tyro.conf.Positional[tuple[str, ...]],
    *,
    seconds: float = 2.0,
    batch: int = 8,
    size: int | None = None,
    contenders: tuple[Contender, ...] = ("eager", "lean", "checkpoint"),
    rounds: int = 5,
    device: str = "cpu",
    write: Path | None = None,
) -> None:
    """Time each op beside torch's, or train models in several ways side by side, taking turns in one process.

    Args:
        what: `ops`: every op at one realistic size, forward and backward, float32, on the CPU. `models`: the eight
            models of BENCHMARKS.md. Or models by name: `torchvision:resnet50`, `transformers:bert`,
            `transformers:config.json`, `timm:...`, `package.module:callable`; settings follow as
            `transformers:bert,num_hidden_layers=2`.
        seconds: how long to measure each op, after as long a warm-up.
        batch: of models: how many pictures or sequences.
        size: of models: the side of a picture (224 by default), or the length of a sequence (128).
        contenders: of models: in which ways. Eager is always among them.
        rounds: of models: how many steps of each are timed at least; they go on for 40 s. 0: none.
        device: of models: where.
        write: a Markdown file to write the tables to as well, in place of those of an earlier time.
    """
    if what == ("ops",):
        return _bench_ops(seconds, write)
    sys.path.insert(0, os.getcwd())
    specs = [spec for word in what for spec in (_bench.MODELS if word == "models" else (word,))]
    command = f"uv run bptools {shlex.join(sys.argv[1:])}"
    try:
        if "ops" in what or not what:
            raise ValueError(f"expected `ops` alone, or `models` and names of models, got {' '.join(what)!r}")
        if rounds < 0:
            raise ValueError(f"--rounds must be at least 0, got {rounds}")
        _bench.bench_models(
            specs,
            write=write,
            command=command,
            batch=batch,
            size=size,
            contenders=contenders,
            rounds=rounds,
            device=device,
        )
    except ValueError as error:
        print(f"bptools bench: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _bench_ops(seconds: float, write: Path | None) -> None:
    head = ("op", "size", "torch ms", "auto ms", "auto / torch", "formula / torch", "kept, torch", "kept, ours")
    rows = []
    console = Console()
    for work in _work():
        with console.status(f"{work.op} {work.size}"):
            found = measure(work, seconds)
        rows.append(
            (
                work.op,
                work.size,
                f"{1e3 * found['torch']:.2f}",
                f"{1e3 * found['auto']:.2f}",
                f"{found['auto'] / found['torch']:.2f}",
                f"{found['formula'] / found['torch']:.2f}",
                f"{found['kept torch'] / 2**20:.2f} MiB",
                f"{found['kept ours'] / 2**20:.2f} MiB",
            )
        )
    table = Table(title="forward and backward, float32, CPU")
    for title in head:
        table.add_column(title, no_wrap=title == "op")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if write is not None:
        machine = (
            f"{torch.get_num_threads()} cores of a virtual {platform.machine()} machine, torch {torch.__version__}"
        )
        _bench.write_section(write, _SECTION.format(machine=machine, table=_bench.markdown(rows, head)))


_SECTION = """## Each op beside torch's

`uv run bptools bench ops --write BENCHMARKS.md`, on {machine}.
Medians of interleaved runs of one forward and backward in float32. `auto` is what a user gets; `formula` is the
plain formula, which is there to be read and checked. Kept: bytes held for the backward beside inputs and
parameters. On a GPU: not measured.

{table}
"""
