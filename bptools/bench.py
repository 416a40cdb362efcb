"""Each op beside torch's own, in one process: `bptools bench ops`. Whole models: `bptools bench MODEL`.

Of ops, the contenders take turns, so that a machine that slows down slows all of them, and medians are compared.
Times are of one forward and backward. What is kept is what autograd holds between the two beside inputs and
parameters. Where an op has further peers, they take their turns too, and the peak of each contender's resident
memory is measured, in a fresh process.
"""

from __future__ import annotations

import importlib
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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
    """One op at one realistic size: `make` gives the arguments, those that require gradients included.

    `theirs` is torch's function, if not the one of torch.nn.functional of the op's name; `peers` are others.
    """

    op: str
    size: str
    make: Callable[[], tuple[Any, ...]]
    constants: dict[str, Any]
    theirs: Callable[..., Tensor] | None = None
    peers: dict[str, Callable[..., Tensor]] = field(default_factory=dict)


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def _work() -> list[Work]:
    def elementwise(op: str) -> Work:
        return Work(op, "2048×1024", lambda: (_randn(2048, 1024),), {})

    def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), target)

    def in_chunks(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, weight, target, options=torch.nn.LinearCrossEntropyOptions())

    def errors(op: str) -> Work:
        return Work(op, "2048×1024", lambda: (_randn(2048, 1024), torch.randn(2048, 1024)), {})

    def labels(op: str) -> Work:
        return Work(op, "2048×1024", lambda: (_randn(2048, 1024), torch.rand(2048, 1024)), {})

    def signs(op: str) -> Work:
        return Work(op, "2048×1024", lambda: (_randn(2048, 1024), torch.randn(2048, 1024).sign()), {})

    def pairs(op: str) -> Work:
        return Work(op, "2048×1024", lambda: (_randn(2048, 1024), _randn(2048, 1024)), {})

    def triplets(op: str) -> Work:
        return Work(op, "2048×1024", lambda: tuple(_randn(2048, 1024) for _ in range(3)), {})

    return [
        Work("linear", "2048×512 → 512", lambda: (_randn(2048, 512), _randn(512, 512), _randn(512)), {}),
        Work(
            "bilinear", "512×128, 128 → 64", lambda: (_randn(512, 128), _randn(512, 128), _randn(64, 128, 128)), {}
        ),
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
        Work("group_norm", "32×64×28×28, 8", lambda: (_randn(32, 64, 28, 28), 8, _randn(64), _randn(64)), {}),
        Work("instance_norm", "32×64×28×28", lambda: (_randn(32, 64, 28, 28),), {}),
        Work("local_response_norm", "32×64×28×28, 5", lambda: (_randn(32, 64, 28, 28), 5), {}),
        Work("normalize", "2048×1024", lambda: (_randn(2048, 1024),), {}),
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
        Work(
            "conv_transpose1d",
            "32×64×128 → 256, 4",
            lambda: (_randn(32, 64, 128), _randn(64, 64, 4), _randn(64)),
            {"stride": 2, "padding": 1},
        ),
        Work(
            "conv_transpose2d",
            "16×64×14×14 → 28×28, 4×4",
            lambda: (_randn(16, 64, 14, 14), _randn(64, 64, 4, 4), _randn(64)),
            {"stride": 2, "padding": 1},
        ),
        Work(
            "conv_transpose3d",
            "2×16×8×14×14 → 16×28×28, 4×4×4",
            lambda: (_randn(2, 16, 8, 14, 14), _randn(16, 16, 4, 4, 4), _randn(16)),
            {"stride": 2, "padding": 1},
        ),
        Work("pad", "16×64×28×28, 3", lambda: (_randn(16, 64, 28, 28), (3, 3, 3, 3)), {"mode": "reflect"}),
        Work("unfold", "16×64×28×28, 3×3", lambda: (_randn(16, 64, 28, 28), 3), {"padding": 1}),
        Work("fold", "16×64×28×28, 3×3", lambda: (_randn(16, 576, 784), 28, 3), {"padding": 1}),
        Work(
            "interpolate",
            "16×64×28×28 → 56×56",
            lambda: (_randn(16, 64, 28, 28),),
            {"scale_factor": 2, "mode": "bilinear"},
        ),
        Work("pixel_shuffle", "16×64×28×28, 2", lambda: (_randn(16, 64, 28, 28), 2), {}),
        Work("pixel_unshuffle", "16×64×28×28, 2", lambda: (_randn(16, 64, 28, 28), 2), {}),
        Work("channel_shuffle", "16×64×28×28, 4", lambda: (_randn(16, 64, 28, 28), 4), {}),
        Work("max_pool2d", "32×64×56×56", lambda: (_randn(32, 64, 56, 56), 2), {}),
        Work("avg_pool2d", "32×64×56×56", lambda: (_randn(32, 64, 56, 56), 2), {}),
        Work("adaptive_avg_pool2d", "32×64×56×56 → 7×7", lambda: (_randn(32, 64, 56, 56), 7), {}),
        Work("max_pool1d", "32×64×1024", lambda: (_randn(32, 64, 1024), 2), {}),
        Work("max_pool3d", "4×32×16×28×28", lambda: (_randn(4, 32, 16, 28, 28), 2), {}),
        Work("adaptive_max_pool2d", "32×64×56×56 → 7×7", lambda: (_randn(32, 64, 56, 56), 7), {}),
        Work("fractional_max_pool2d", "32×64×56×56 → 28×28", lambda: (_randn(32, 64, 56, 56), 2, 28), {}),
        Work("avg_pool1d", "32×64×1024", lambda: (_randn(32, 64, 1024), 2), {}),
        Work("avg_pool3d", "4×32×16×28×28", lambda: (_randn(4, 32, 16, 28, 28), 2), {}),
        Work("lp_pool2d", "32×64×56×56", lambda: (_randn(32, 64, 56, 56), 2.0, 2), {}),
        Work(
            "max_unpool2d",
            "32×64×28×28 → 56×56",
            lambda: (_randn(32, 64, 28, 28), torch.arange(784).mul(4).view(28, 28).expand(32, 64, 28, 28), 2),
            {},
        ),
        Work("embedding", "4096 of 32000×256", lambda: (torch.randint(32000, (4096,)), _randn(32000, 256)), {}),
        Work(
            "embedding_bag",
            "256 × 16 of 32000×256",
            lambda: (torch.randint(32000, (256, 16)), _randn(32000, 256)),
            {},
        ),
        Work("cross_entropy", "2048×32000", lambda: (_randn(2048, 32000), torch.randint(32000, (2048,))), {}),
        Work(
            "linear_cross_entropy",
            "2048×512 → 32000",
            lambda: (_randn(2048, 512), _randn(32000, 512), torch.randint(32000, (2048,))),
            {},
            linear_cross_entropy,
            {"torch in chunks": in_chunks} if hasattr(F, "linear_cross_entropy") else {},
        ),
        Work(
            "nll_loss",
            "2048×32000",
            lambda: (_randn(2048, 32000), torch.randint(32000, (2048,))),
            {},
        ),
        *map(errors, ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "poisson_nll_loss")),
        *map(
            labels,
            ("binary_cross_entropy_with_logits", "multilabel_soft_margin_loss"),
        ),
        *map(signs, ("soft_margin_loss", "hinge_embedding_loss")),
        Work(
            "binary_cross_entropy",
            "2048×1024",
            lambda: (torch.rand(2048, 1024, requires_grad=True), torch.rand(2048, 1024)),
            {},
        ),
        Work(
            "kl_div",
            "2048×1024",
            lambda: (_randn(2048, 1024), torch.rand(2048, 1024)),
            {"reduction": "batchmean"},
        ),
        Work(
            "gaussian_nll_loss",
            "2048×1024",
            lambda: (_randn(2048, 1024), torch.randn(2048, 1024), torch.rand(2048, 1024, requires_grad=True)),
            {},
        ),
        *map(pairs, ("cosine_similarity", "pairwise_distance")),
        Work(
            "margin_ranking_loss",
            "2048×1024",
            lambda: (_randn(2048, 1024), _randn(2048, 1024), torch.randn(2048, 1024).sign()),
            {},
        ),
        Work(
            "cosine_embedding_loss",
            "2048×1024",
            lambda: (_randn(2048, 1024), _randn(2048, 1024), torch.randn(2048).sign()),
            {},
        ),
        *map(triplets, ("triplet_margin_loss", "triplet_margin_with_distance_loss")),
        Work(
            "multi_margin_loss",
            "2048×1024",
            lambda: (_randn(2048, 1024), torch.randint(1024, (2048,))),
            {},
        ),
        Work(
            "multilabel_margin_loss",
            "2048×64",
            lambda: (_randn(2048, 64), torch.randint(-1, 64, (2048, 64))),
            {},
        ),
        Work(
            "ctc_loss",
            "100×16×64, 20 labels",
            lambda: (
                _randn(100, 16, 64),
                torch.randint(1, 64, (16, 20)),
                torch.full((16,), 100),
                torch.full((16,), 20),
            ),
            {},
        ),
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


def _contenders(work: Work, args: tuple[Any, ...]) -> dict[str, tuple[Callable[[], Tensor], str]]:
    """Each contender's call, and the backend it is made in."""

    def of(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(*args, **work.constants)

    ours, theirs = of(getattr(B, work.op)), of(work.theirs or getattr(F, work.op))
    peers = {name: (of(peer), "auto") for name, peer in work.peers.items()}
    return {"torch": (theirs, "auto"), "auto": (ours, "auto"), "formula": (ours, "formula"), **peers}


def measure(work: Work, seconds: float) -> dict[str, Any]:
    """Median seconds and kept bytes of torch's op, ours in `auto`, our plain formula, and peers, taking turns."""
    args = work.make()
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    contenders = _contenders(work, args)
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
    for name, (call, tier) in contenders.items():
        with backend(tier):
            result[f"kept {name}"] = _bench.kept_bytes(call, inputs)[1]
        if work.peers:
            command = [sys.executable, "-m", __name__, work.op, name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result[f"peak {name}"] = int(done.stdout)
    return result


def _peak(op: str, contender: str) -> int:
    """Bytes of resident memory that two steps need at most, beside what is there when the arguments are made."""
    work = next(work for work in _work() if work.op == op)
    args = work.make()
    call, tier = _contenders(work, args)[contender]
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    importlib.import_module("torch._dynamo")  # 100 MiB of code that some bring
    before = _bench._resident_memory(reset=True)
    with backend(tier):
        for _ in range(2):
            _step(call, inputs)
    return _bench._resident_memory() - before


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
    rows, beside = [], []
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
                f"{found['kept auto'] / 2**20:.2f} MiB",
            )
        )
        for name in ("torch", *work.peers, "auto", "formula") if work.peers else ():
            memory = (f"{found[f'{what} {name}'] / 2**20:.1f} MiB" for what in ("kept", "peak"))
            beside.append((work.op, name, f"{1e3 * found[name]:.2f}", *memory))
    _print(console, "forward and backward, float32, CPU", head, rows)
    _print(console, "beside further peers", _BESIDE, beside)
    if write is not None:
        machine = (
            f"{torch.get_num_threads()} cores of a virtual {platform.machine()} machine, torch {torch.__version__}"
        )
        tables = _bench.markdown(rows, head), _bench.markdown(beside, _BESIDE)
        _bench.write_section(write, _SECTION.format(machine=machine, table=tables[0], beside=tables[1]))


def _print(console: Console, title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(title=title)
    for column in head:
        table.add_column(column, no_wrap=column == "op")
    for row in rows:
        table.add_row(*row)
    console.print(table)


_BESIDE = ("op", "contender", "ms", "kept", "peak")


_SECTION = """## Each op beside torch's

`uv run bptools bench ops --write BENCHMARKS.md`, on {machine}.
Medians of interleaved runs of one forward and backward in float32. `auto` is what a user gets; `formula` is the
plain formula, which is there to be read and checked. Kept: bytes held for the backward beside inputs and
parameters. On a GPU: not measured.

{table}

Beside further peers; peak: of the resident memory of a fresh process, above what it held with the arguments made.

{beside}
"""


if __name__ == "__main__":
    print(_peak(*sys.argv[1:]))
