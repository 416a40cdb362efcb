"""Whole models, trained in several ways side by side: `bptools bench MODEL`.

What is measured, and how:

- **kept**: bytes that are held for the backward pass when the forward pass is over: every storage of a tensor that
  autograd saved and still holds, once each, without parameters, buffers, inputs and targets. Of checkpointed
  blocks autograd saves nothing, and their inputs are held and count. What a Function puts on its context in
  another way than by `save_for_backward` is not seen. `lean()` counts its own tensors and codes by the same rule.
- **floor**: the fewest bytes from which cheap operations could give back all that was saved
  (`bptools.memory.ledger`).
- **step**: forward, loss and backward, from no gradients; there is no optimizer. The contenders take turns, each
  round in another order, after the step of each that is looked at for the rest; of times, and of the ratios to
  eager of each round, the median counts. Compiling is not in it.
- **peak**: in a fresh process for each contender, how much more memory two steps need than there was when model
  and inputs were made: resident memory, malloc's settings left alone; on a GPU torch's allocator is asked.
- **equal**: from the same parameters, buffers and seed, loss and gradients are eager's to the bit; so are buffers,
  and the state of the generator of random numbers, after the step. Where they are not, **off by** says by how
  much: the norm of the difference over the norm of eager's, of all gradients as one vector.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
import json
import math
import platform
import random
import re
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._lean import lean
from ._models import Loaded, load

MODELS = (
    "torchvision:resnet50",
    "torchvision:efficientnet_b0",
    "torchvision:convnext_tiny",
    "torchvision:vit_b_16",
    "torchvision:swin_t",
    "transformers:bert",
    "transformers:gpt2",
    # TinyLlama-1.1B at half its width
    "transformers:llama,hidden_size=1024,num_hidden_layers=22,intermediate_size=2816,num_attention_heads=16,"
    "num_key_value_heads=2,vocab_size=32000",
)
PEAK_STEPS = 2
LEAST_SECONDS = 40  # that rounds go on for, beyond those that are asked for


# The contenders -----------------------------------------------------------------------------------------------


class Eager:
    """The model as it is."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.model = loaded, loaded.model

    def warm_up(self) -> None:
        """Do what is no part of a step."""

    def forward(self) -> Tensor:
        """The loss, with all that the backward pass needs hanging on it."""
        return self.loaded.loss(self.model)

    def kept(self) -> tuple[Tensor, int]:
        """The loss, and the bytes that are kept for its backward pass."""
        return self._count(self.forward, [])

    def _count(self, forward: Callable[[], Tensor], beside: list[Tensor]) -> tuple[Tensor, int]:
        own = (*self.model.parameters(), *self.model.buffers(), *self.loaded.inputs)
        return kept_bytes(forward, own, beside)


def kept_bytes(
    forward: Callable[[], Tensor], own: Iterable[Tensor], beside: Iterable[Tensor] = ()
) -> tuple[Tensor, int]:
    """Return the result, and the bytes that are held for its backward pass.

    Args:
        forward: makes the result.
        own: what is not counted: parameters, buffers, inputs.
        beside: what is held too, looked at when the forward pass is over.
    """
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(t: Tensor) -> _Saved:
        saved.add(one := _Saved(t.detach()))
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        result = forward()
    mine = {_pointer(t) for t in own}
    held = [*beside, *(one.tensor for one in saved)]
    sizes = {_pointer(t): t.untyped_storage().nbytes() for t in held}
    return result, sum(size for pointer, size in sizes.items() if pointer not in mine)


class _Saved:
    """Held by autograd for as long as it holds the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _pointer(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


class Lean(Eager):
    """In `bptools.lean()`."""

    stash: Literal["bf16", "int8"] | None = None

    def forward(self) -> Tensor:
        with lean(stash=self.stash):
            return super().forward()

    def kept(self) -> tuple[Tensor, int]:
        with lean(stash=self.stash) as session:
            loss = super().forward()
        return loss, session.kept_bytes


class LeanBFloat16(Lean):
    """In `bptools.lean(stash="bf16")`, which is lossy."""

    stash = "bf16"


class LeanInt8(Lean):
    """In `bptools.lean(stash="int8")`, which is lossier."""

    stash = "int8"


class Checkpoint(Eager):
    """`torch.utils.checkpoint` around each of the model's repeated blocks."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        self.blocks = repeated_blocks(self.model)
        if not self.blocks:
            raise ValueError("no repeated blocks were found to checkpoint")

    def forward(self, note: Callable[[Tensor], Any] = lambda given: None) -> Tensor:
        with checkpointed(self.blocks, note):
            return super().forward()

    def kept(self) -> tuple[Tensor, int]:
        given: list[Tensor] = []  # to the blocks: checkpoint holds it to start again from
        return self._count(lambda: self.forward(given.append), given)


class Compile(Eager):
    """`torch.compile`, with the model's own parameters."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        torch.compiler.reset()
        self.compiled = torch.compile(self.model)

    def warm_up(self) -> None:
        self.forward().backward()

    def forward(self) -> Tensor:
        return self.loaded.loss(self.compiled)


class Liger(Eager):
    """A copy of a transformers model that Liger has patched."""

    def __init__(self, loaded: Loaded) -> None:
        if importlib.util.find_spec("liger_kernel") is None or not next(loaded.model.parameters()).is_cuda:
            raise ValueError("needs liger_kernel, and a GPU")
        super().__init__(loaded)
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        self.model = copy.deepcopy(loaded.model)
        _apply_liger_kernel_to_instance(model=self.model)


CONTENDERS: dict[str, type[Eager]] = {
    "eager": Eager,
    "lean": Lean,
    "lean-bf16": LeanBFloat16,
    "lean-int8": LeanInt8,
    "checkpoint": Checkpoint,
    "compile": Compile,
    "liger": Liger,
}


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model stacks: what its outermost lists and sequences consist of.

    A list within a list, such as the stages of a network, is looked into. A layer without layers of its own is no
    block.
    """

    def container(module: nn.Module) -> bool:
        return type(module) in (nn.Sequential, nn.ModuleList) and any(
            any(True for _ in child.children()) for child in module.children()
        )

    def within(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if container(child):
                yield from within(child)
            elif container(module) and any(True for _ in child.children()):
                yield child
            elif not container(module):
                yield from within(child)

    found = list(within(model))
    return found if len(found) > 1 else []


@contextlib.contextmanager
def checkpointed(blocks: list[nn.Module], note: Callable[[Tensor], Any]) -> Iterator[None]:
    """Run the blocks under checkpoint while in here. `note` is told of every tensor that one is given."""

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def again(*args: Any, **kwargs: Any) -> Any:
            for t in _tensors((args, kwargs)):
                note(t)
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)

        return again

    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = wrap(block.forward)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is not None:
                block.forward = own
            elif "forward" in vars(block):
                del block.forward


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, list | tuple):
        for one in given:
            yield from _tensors(one)
    elif isinstance(given, dict):
        yield from _tensors(list(given.values()))


# Measuring ----------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What was measured of one contender on one model; None is what could not be.

    Attributes:
        kept: bytes kept for the backward pass.
        seconds: of each round's step.
        peak: bytes that the step needed at most.
        unequal: what differs from eager: of `loss`, `gradients`, `buffers` and `generator`.
        error: by how much the gradients differ, all as one vector: the norm of the difference over eager's.
        eager_repeats: whether eager itself gives the same bits twice; asked only if something differs.
        failed: why there is nothing.
    """

    kept: int | None = None
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    unequal: list[str] | None = None
    error: float = 0.0
    eager_repeats: bool = True
    failed: str = ""


@dataclass
class Comparison:
    """What was measured on one model."""

    name: str
    floor: int
    found: dict[str, Found]

    def ratio(self, contender: str, of: str) -> float | None:
        """A contender's `kept`, `peak`, `seconds` or `fastest` over eager's, or its `kept` over the `floor`."""
        ours, eager = self.found[contender], self.found["eager"]
        if of in ("seconds", "fastest"):
            if not (ours.seconds and eager.seconds):
                return None
            if of == "fastest":
                return min(ours.seconds) / min(eager.seconds)
            return statistics.median(a / b for a, b in zip(ours.seconds, eager.seconds, strict=True))
        above, below = (ours.kept, self.floor) if of == "floor" else (getattr(ours, of), getattr(eager, of))
        return None if above is None or not below else above / below


State = dict[str, dict[str, Tensor | None]]


class Steps:
    """Steps of one model, each from the same parameters, buffers and seed."""

    def __init__(self, loaded: Loaded, seed: int) -> None:
        self.loaded, self.seed = loaded, seed
        self.buffers = {name: t.clone() for name, t in loaded.model.named_buffers()}

    def start(self, model: nn.Module) -> None:
        """Have a model as it was at first. Parameters are, as nothing updates them."""
        for name, t in model.named_buffers():
            t.copy_(self.buffers[name])
        model.zero_grad(set_to_none=True)
        torch.manual_seed(self.seed)
        gc.collect()

    def floor(self) -> int:
        """Bytes that cannot be done without, by the ledger."""
        from ._ledger import ledger

        self.start(self.loaded.model)
        with ledger() as found:
            self.loaded.loss()
        return found.floor

    def timed(self, contender: Eager) -> float:
        """Seconds of one step."""
        self.start(contender.model)
        self._wait()
        started = time.perf_counter()
        contender.forward().backward()
        self._wait()
        return time.perf_counter() - started

    def looked_at(self, contender: Eager) -> tuple[State, int]:
        """Loss, gradients, buffers and the generator of random numbers after one step, and what was kept in it."""
        self.start(contender.model)
        loss, kept = contender.kept()
        loss.backward()
        model = contender.model
        return {
            "loss": {"loss": loss.detach()},
            "gradients": {name: p.grad for name, p in model.named_parameters()},
            "buffers": {name: t.clone() for name, t in model.named_buffers()},
            "generator": {"state": torch.get_rng_state()},
        }, kept

    def _wait(self) -> None:
        if any(t.is_cuda for t in self.loaded.inputs):
            torch.cuda.synchronize()


def differing(ours: State, theirs: State) -> list[str]:
    """Return the names of what is not the same to the bit."""

    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b or (a is not None and b is not None and torch.equal(a, b))

    return [
        what
        for what in ours
        if ours[what].keys() != theirs[what].keys()
        or not all(same(t, theirs[what][name]) for name, t in ours[what].items())
    ]


def relative_error(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> float:
    """Return the norm of the difference of all these tensors over the norm of theirs."""
    pairs = [(ours.get(name), t) for name, t in theirs.items() if t is not None]
    off = sum(float((t if a is None else a.double() - t).double().square().sum()) for a, t in pairs)
    return math.sqrt(off / max(sum(float(t.double().square().sum()) for _, t in pairs), 1e-300))


def compare(
    spec: str,
    contenders: Iterable[str] = ("eager", "lean", "checkpoint"),
    batch: int = 8,
    size: int | None = None,
    rounds: int = 5,
    device: str = "cpu",
    seed: int = 0,
    peaks: bool = True,
    say: Callable[[str], Any] = lambda text: None,
) -> Comparison:
    """Measure the contenders on one model; eager is always among them.

    Args:
        spec: the model, as `load` takes it.
        contenders: names from `CONTENDERS`.
        batch: how many pictures or sequences.
        size: side of a picture, or length of a sequence.
        rounds: how many timed steps of each at least; they go on until `LEAST_SECONDS` are over. 0: none.
        device: where.
        seed: of the weights, the inputs, the random numbers of each step, and the order in a round.
        peaks: whether to start a process each for its peak memory.
        say: told what goes on.
    """
    contenders = ["eager", *(name for name in dict.fromkeys(contenders) if name != "eager")]
    say(f"{spec}: making it")
    loaded = load(spec, batch, size, seed, device)
    steps = Steps(loaded, seed)
    say(f"{spec}: the floor")
    result = Comparison(spec, steps.floor(), {name: Found() for name in contenders})
    running: dict[str, Eager] = {}
    truth: State = {}
    for name in contenders:
        say(f"{spec}: one step of {name}, to look at its gradients")
        found = result.found[name]
        try:
            contender = CONTENDERS[name](loaded)
            state, found.kept = steps.looked_at(contender)
            truth = truth or state
            found.unequal = differing(state, truth)
            if found.unequal:
                found.error = relative_error(state["gradients"], truth["gradients"])
                found.eager_repeats = not differing(steps.looked_at(running["eager"])[0], truth)
            running[name] = contender
        except Exception as error:
            if name == "eager":
                raise
            found.failed = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            say(f"{spec}: {name} is left out: {found.failed}")
        state = {}
    truth = {}
    order = random.Random(seed)
    started, i = time.perf_counter(), 0
    while rounds and (i < rounds or time.perf_counter() - started < LEAST_SECONDS):
        i += 1
        for name in order.sample(list(running), len(running)):
            say(f"{spec}: round {i} of at least {rounds}, {name}")
            result.found[name].seconds.append(steps.timed(running[name]))
    for name in running if peaks else ():
        say(f"{spec}: peak memory of {name}")
        peak = _peak_elsewhere(spec=spec, contender=name, batch=batch, size=size, device=device, seed=seed)
        if isinstance(peak, int):
            result.found[name].peak = peak
        else:
            say(f"{spec}: no peak memory of {name}: {peak}")
    return result


# Peak memory, in a process of its own -------------------------------------------------------------------------


def _peak_elsewhere(**task: Any) -> int | str:
    """The peak, or why there is none."""
    command = [sys.executable, "-m", __name__, json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return int(done.stdout.splitlines()[-1])


def _peak(spec: str, contender: str, batch: int, size: int | None, device: str, seed: int) -> int:
    """Bytes that a few steps need at most, beside what is there when model and inputs are made."""
    loaded = load(spec, batch, size, seed, device)
    run = CONTENDERS[contender](loaded)
    importlib.import_module("torch._dynamo")  # 100 MiB of code that any optimizer brings; so does lean()
    gc.collect()
    memory = _cuda_memory if torch.device(device).type == "cuda" else _resident_memory
    before = memory(reset=True)
    run.warm_up()
    memory(reset=True)
    for _ in range(PEAK_STEPS):
        torch.manual_seed(seed)
        run.model.zero_grad(set_to_none=True)
        run.forward().backward()
    return memory() - before


def _cuda_memory(reset: bool = False) -> int:
    """Peak of what torch's allocator gave out."""
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def _resident_memory(reset: bool = False) -> int:
    """Peak of the resident memory of this process, counted anew where the system (Linux) can do that."""
    with contextlib.suppress(OSError, ValueError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(status["VmHWM"].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# The report ---------------------------------------------------------------------------------------------------

DETAILS = (
    "contender", "kept MiB", "/ eager", "/ floor", "step s", "/ eager", "fastest", "peak MiB", "/ eager",
    "gradients", "buffers",
)  # fmt: skip
SUMMARY = (
    "model",
    "contender",
    "kept / eager",
    "kept / floor",
    "step / eager",
    "fastest",
    "peak / eager",
    "gradients",
)
RATIOS = ("kept", "floor", "seconds", "fastest", "peak")


def details(comparison: Comparison) -> list[tuple[str, ...]]:
    """Return a row for each contender."""
    rows = []
    for name, found in comparison.found.items():
        if found.failed:
            rows.append((name, *["-"] * (len(DETAILS) - 1)))
            continue
        kept, floor, seconds, fastest, peak = (_ratio(comparison.ratio(name, of)) for of in RATIOS)
        step = f"{statistics.median(found.seconds):.3f}" if found.seconds else ""
        equal = _equal(found, "loss", "gradients"), _equal(found, "buffers", "generator")
        rows.append((name, _mib(found.kept), kept, floor, step, seconds, fastest, _mib(found.peak), peak, *equal))
    return rows


def summary(comparisons: list[Comparison]) -> list[tuple[str, ...]]:
    """Return a row for each model and contender beside eager, then each contender's geometric means and worst."""
    rows, over_all = [], []
    for contender in dict.fromkeys(name for c in comparisons for name in c.found if name != "eager"):
        asked = [c for c in comparisons if contender in c.found]
        ratios = [[c.ratio(contender, of) for of in RATIOS] for c in asked]
        equal = [_equal(c.found[contender], "loss", "gradients") for c in asked]
        for c, mine, same in zip(asked, ratios, equal, strict=True):
            rows.append((short(c.name), contender, *map(_ratio, mine), same or "not run"))
        for what, of in (("geometric mean", statistics.geometric_mean), ("largest", max)):
            known = ([r for r in column if r] for column in zip(*ratios, strict=True))
            row = (_ratio(of(column) if column else None) for column in known)
            over_all.append((what, contender, *row, f"{equal.count('equal')} of {len(asked)} equal"))
    return [*rows, *over_all]


def short(name: str) -> str:
    """The name of a model without its settings."""
    name, comma, _ = name.partition(",")
    return name + (",..." if comma else "")


def _mib(n: int | None) -> str:
    return "" if n is None else f"{n / 2**20:.1f}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f}"


def _equal(found: Found, *what: str) -> str:
    if found.unequal is None:
        return ""
    if not {*what} & {*found.unequal}:
        return "equal"
    off = f"off by {found.error:.1%}" if "gradients" in what and found.error >= 5e-4 else "unequal"
    return off if found.eager_repeats else "unequal, as eager to itself"


def machine(device: str) -> str:
    """What it was measured on, in words."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return (
        f"{torch.get_num_threads()} cores of a virtual {platform.machine()} machine "
        f"({torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}. GPU: not measured"
    )


def markdown(rows: Iterable[tuple[str, ...]], head: tuple[str, ...]) -> str:
    """Return a table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def write_section(path: Path, section: str) -> None:
    """Put a section into a file of sections, in place of the one of its title, or at the end."""
    title = section.partition("\n")[0]
    text = path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n"
    parts = re.split(r"(?m)^(?=## )", text)
    same = [i for i, part in enumerate(parts) if part.partition("\n")[0] == title]
    if same:
        parts[same[0]] = section
    else:
        parts.append(section)
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")


SECTION = """## {title}

`{command}`, on {machine}. Forward, loss and backward in float32 from random weights, batch {batch}; medians of
{rounds} rounds or more, in which the contenders take turns. Kept: bytes held for the backward pass beside
parameters, buffers and inputs (of checkpointed blocks: their inputs). Floor: the fewest bytes from which cheap
operations could give back all that was saved. Fastest: the fastest round of each, for machines on which others
interfere. Peak: in a fresh process each, above what it held with model and inputs made; malloc's settings are the
system's. Equal: `torch.equal` with eager from the same state and seed, of the loss and
every gradient, and of every buffer after the step; off by: the norm of the difference over the norm of eager's.

{summary}

{details}
"""


def bench_models(
    specs: Iterable[str],
    *,
    write: Path | None = None,
    command: str,
    batch: int,
    size: int | None,
    contenders: tuple[str, ...],
    rounds: int,
    device: str,
) -> list[Comparison]:
    """Compare on each model, print a table of each and one of all, and write both to a file if one is named."""
    console, progress = Console(), Console(stderr=True, highlight=False, soft_wrap=True)
    console.width = max(console.width, 122)
    comparisons = []
    for spec in specs:
        with progress.status(spec) as status:
            say = status.update if progress.is_terminal else progress.print
            found = compare(spec, contenders, batch, size, rounds, device, say=say)
        comparisons.append(found)
        console.print(_table(f"{spec}, floor {_mib(found.floor)} MiB", DETAILS, details(found)))
        for name, one in found.found.items():
            if one.failed:
                console.print(f"{name} was not run: {one.failed}")
    console.print(_table("beside eager", SUMMARY, summary(comparisons)))
    if write is not None:
        rows = [(short(c.name), *row) for c in comparisons for row in details(c)]
        lossy = any(name.startswith("lean-") for name in contenders)
        text = SECTION.format(
            title="Whole models, with lossy stashes" if lossy else "Whole models",
            command=command,
            machine=machine(device),
            batch=batch,
            rounds=rounds,
            summary=markdown(summary(comparisons), SUMMARY),
            details=markdown(rows, ("model", *DETAILS)),
        )
        write_section(write, text)
    return comparisons


def _table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(title=title, box=box.SIMPLE)
    for column in head:
        words = column in ("model", "contender")
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    print(_peak(**json.loads(sys.argv[1])))
