"""Prove a recipe on its user's own settings, in seconds: ``--verify`` and ``--dry-run``.

Both call the recipe's own training function, for one epoch of a few windows in each phase, in a temporary folder.
What is looked at is what that function does, with whatever its user has changed in it. Gradients are compared
without mixed precision, TF32 and dropout, so what differs is a mistake and not rounding.

- *resumed = uninterrupted*: a run that is stopped after every step and every epoch, and continued, leaves the
  checkpoints that a run without a stop does, bit for bit.
- *accumulated = one batch*: the gradient of a window is the same however its samples are cut into micro-batches.
- *what trains learns*: each trainable parameter gets a gradient from the first window of its phase. An adapter on
  a layer whose weight is read, and which is never called, gets none.
- *frozen unchanged*: what a phase does not train has the same bits at its end, and so have the running statistics
  that it is to keep.
- *merged = adapter*: a peft model gives the same outputs with its adapter merged.
- *two processes = one*: two processes that share each batch have the gradient that one has, in every phase.
"""

import io
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from copy import copy
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from bptools._console import plain_table

from .adapters import merge_adapter
from .batches import Batch, count_samples, map_tensors, to_device
from .checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state, set_seed
from .distributed import Parallel
from .errors import InputError
from .phases import needs_redraw, set_trainable
from .run import Observer, Run, Stopped

Train = Callable[..., Any]
Verdict = tuple[bool | None, str]  # None: there is nothing to check
VERDICTS = {True: "[green]holds[/]", False: "[bold red]FAILS[/]", None: "-"}
FOLDER = "BPTOOLS_VERIFY_FOLDER"  # where two processes train, and leave their gradients
TOLERANCE = 1e-4  # of a norm; float32 has rounding errors near 1e-6, a wrong weighting some percent
WINDOWS = 2  # in each epoch
PATIENCE = 300  # seconds that two processes have


class StopAfter:
    """In place of ``Interrupt``: true when it is asked for the ``n``-th time, and then on.

    Args:
        n: Counted from 1.
    """

    signal = signal.SIGTERM

    def __init__(self, n: int):
        self.left = n

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left <= 0


@contextmanager
def _temporary_folder(parallel: Parallel) -> Iterator[Path]:
    """Give all processes the same folder."""
    with tempfile.TemporaryDirectory() as own:
        yield Path(parallel.broadcast(own))
        parallel.barrier()  # others may still read what is there


def dry_run(train: Train, console: Console, parallel: Parallel) -> int:
    """Do one window of everything: stop after each step, continue from the checkpoint, validate and test.

    Args:
        train: Called with a folder and ``trial``, ``interrupt``, ``observe``, which :class:`Run` takes. It does a
            run, or several, each in a folder of its own inside.
        console: Where to print.
        parallel: This process among those that train.

    Returns:
        The exit status: 0, or 1 if a run was not stopped or not continued.
    """
    done: dict[str, dict[int, str]] = {}

    def observe(event: str, run: Run) -> None:
        done.setdefault(run.folder.name, {})[run.phase_index] = str(run.plan[run.phase_index])

    with _temporary_folder(parallel) as folder, redirect_stdout(io.StringIO()):
        stops, complaint = _in_pieces(train, folder, observe, trial=1)
    if parallel.main:
        runs = "; ".join(f"{name} ({', '.join(phases.values())})" for name, phases in done.items())
        what = complaint or f"saved, stopped and continued {stops} times, validated and tested: all well"
        console.print(f"dry run: one window of every phase: {runs}\n{what}", markup=False, soft_wrap=True)
    return int(bool(complaint))


def verify_kind(kind: str) -> str:
    """Return the ``--parallel`` of this process of :func:`verify`: where there are two, the user's ``kind``."""
    return kind if FOLDER in os.environ and kind != "none" else "auto"


def verify(train: Train, command: Sequence[str], console: Console, parallel: Parallel) -> int:
    """Make all checks, print a table of them, and return the exit status: 0 if all hold, else 1.

    Args:
        train: As for :func:`dry_run`. A run that is finished may be skipped.
        command: The recipe's file and its arguments, for the two processes.
        console: Where to print.
        parallel: This process; where it is one of several, it only writes its gradients for the process that
            started it.

    Raises:
        InputError: If torchrun was started by someone else.
    """
    if parallel.size > 1:
        if FOLDER not in os.environ:
            raise InputError("--verify: starts two processes itself; leave out torchrun")
        _write_gradients(train, parallel)
        return 0
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), _exactly():
        whole, watch = Path(folder, "whole"), _Watch()
        train(whole, trial=WINDOWS, observe=watch)
        if not watch.gradients:
            raise InputError("--verify: no run was seen; hand observe on to Run")
        verdicts = {
            "resumed = uninterrupted": _resume(train, whole),
            "accumulated = one batch": watch.accumulation(),
            "what trains learns": watch.learning(),
            "frozen unchanged": watch.frozen(),
            "merged = adapter": watch.merged(),
            "two processes = one": _two_processes(whole, command, watch),
        }
    rows = [(name, VERDICTS[holds], escape(seen)) for name, (holds, seen) in verdicts.items()]
    columns = {"check": "left", "verdict": "left", "what was seen": "left"}
    console.print(plain_table("Verified on these settings", columns, rows))
    checked = [holds for holds, _ in verdicts.values() if holds is not None]
    failed = checked.count(False)
    result = f"{failed} of {len(checked)} checks fail" if failed else "all hold"
    console.print(f"{result}; {time.perf_counter() - begun:.0f} s", highlight=False)
    return int(failed > 0)


class _Watch:
    """An observer of runs that checks what it sees.

    Attributes:
        gradients: First gradients of the last run, by phase and name.
        items: Items of its first window.
        folder: Its folder.
        device: Where it computes.
        tolerance: How far its gradients may be apart, in parts of their norm.
    """

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.items = 0
        self.phases = 0  # that came to their end
        self._idle: dict[str, None] = {}  # as an ordered set
        self._pieces: list[tuple[float, float, str]] = []
        self._merges: list[tuple[float, float]] = []
        self._before: dict[str, Tensor] = {}
        self._may_change: set[str] = set()
        self._held = 0
        self._changed: list[str] = []

    def __call__(self, event: str, run: Run) -> None:
        phase = run.plan[run.phase_index]
        if event == "phase":
            if run.phase_index == 0:
                self._look_ahead(run)
            state = run.model.state_dict()
            self._before = {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
            self._may_change = _may_change(run.model)
        elif event == "step" and needs_redraw(phase, run.phase_steps - 1):
            self._may_change |= _may_change(run.model)
        elif event == "end":
            self.phases += 1
            self._compare_frozen(run.model, str(phase))
            if run.phase_index == len(run.plan) - 1 and hasattr(run.model, "merge_and_unload"):
                with _undisturbed(run):
                    self._compare_merged(run)

    def _look_ahead(self, run: Run) -> None:
        """Look at the gradients of the first window in every phase, with the weights of now."""
        self.folder, self.device, self.tolerance = run.folder, run.stepper.device, _tolerance(run.model)
        window = _first_window(run)
        self.items, self.gradients = sum(map(run.stepper.count, window)), {}
        with _undisturbed(run):
            for phase in _each_phase(run):
                gradients = _first_gradients(run, window)
                self.gradients |= {f"{name} in {phase}": gradient for name, gradient in gradients.items()}
                trainable = [name for name, p in run.model.named_parameters() if p.requires_grad]
                self._idle |= dict.fromkeys(name for name in trainable if name not in gradients)
                run.model.eval()  # a batch norm in training mode sees each micro-batch by itself
                pieces = [*_cut(window[0]), *window[1:]]
                if len(pieces) > len(window):
                    compared = difference(_gradient(run, pieces), _gradient(run, window))
                    self._pieces.append((compared[0] / self.tolerance, *compared))

    def _compare_frozen(self, model: nn.Module, phase: str) -> None:
        after = model.state_dict()
        kept = [name for name in self._before if name not in self._may_change]
        self._held += len(kept)
        for name in kept:
            if not same(self._before[name], after[name]):
                self._changed.append(f"{name} {_by(self._before[name], after[name])} in phase {phase}")

    def _compare_merged(self, run: Run) -> None:
        run.model.eval()
        try:
            merged = merge_adapter(run.model)
        except InputError:
            return  # virtual tokens cannot be merged
        batch = to_device(_first_window(run)[0], run.stepper.device)
        with torch.no_grad():
            apart, _ = difference({"": _outputs(merged, batch)}, {"": _outputs(run.model, batch)})
        self._merges.append((apart / _tolerance(merged), apart))

    def accumulation(self) -> Verdict:
        if not self._pieces:
            return None, "a batch of one sample cannot be cut"
        ratio, apart, name = max(self._pieces)
        where = "" if ratio < 1 else f", most in {name}"
        return ratio < 1, f"gradients differ by {apart:.0e} of their norm, in evaluation mode{where}"

    def learning(self) -> Verdict:
        if self._idle:
            return False, f"{len(self._idle)} trainable tensors get no gradient, first {next(iter(self._idle))}"
        return True, "every trainable tensor gets a gradient"

    def frozen(self) -> Verdict:
        if self._changed:
            return False, f"{len(self._changed)} of {self._held} tensors changed, first {self._changed[0]}"
        if not self._held:
            return None, "nothing is frozen"
        return True, f"{self._held} tensors, buffers included, over {self.phases} phases, bit for bit"

    def merged(self) -> Verdict:
        if not self._merges:
            return None, "no adapter that can be merged"
        ratio, apart = max(self._merges)
        return ratio < 1, f"outputs differ by {apart:.0e} of their norm"


def _in_pieces(train: Train, folder: Path, observe: Observer, **options: Any) -> tuple[int, str]:
    """Stop ``train`` after every step and epoch, and call it again; return the stops, and what is wrong."""
    stops, continued, where = 0, True, ""

    def look(event: str, run: Run) -> None:
        nonlocal continued
        continued |= run.resumed
        observe(event, run)

    while True:
        set_seed(2**31 + stops)  # whatever the generators hold, what is saved must count
        try:
            train(folder, interrupt=StopAfter(1), observe=look, **options)
            return stops, "" if stops else "did not stop after the first step: hand interrupt on to Run"
        except Stopped as stop:
            if not continued:
                return stops, f"a run made again does not find what was saved in {where}"
            stops, continued, where = stops + 1, False, stop.folder.name


def _resume(train: Train, whole: Path) -> Verdict:
    stopped = whole.with_name("stopped")
    stops, complaint = _in_pieces(train, stopped, lambda event, run: None, trial=WINDOWS)
    if complaint:
        return False, complaint
    files = [path.relative_to(whole) for name in ("last.pt", "best.pt") for path in sorted(whole.rglob(name))]
    if not files:
        return False, "no checkpoint at the end: call run.load_best(), or run.save()"
    tensors = 0
    for file in files:
        a, b = (flatten(load_checkpoint(folder / file)) for folder in (whole, stopped))
        differ = [name for name in a | b if not same(a.get(name), b.get(name))]
        if differ:
            first = f"{differ[0]} {_by(a.get(differ[0]), b.get(differ[0]))}"
            return False, f"{file}: {len(differ)} of {len(a)} values differ, first {first}"
        tensors += sum(isinstance(value, Tensor) for value in a.values())
    return True, f"{tensors} tensors and all counters, bit for bit, after {stops} stops"


TIMES = ("seconds", "wait")


def flatten(state: Any, name: str = "") -> dict[str, Any]:
    """Return what a checkpoint holds as one dictionary of tensors and plain values, times left out."""
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, (list, tuple)):
        items = enumerate(state)
    else:
        return {name: state}
    flat = {}
    for key, value in items:
        if key not in TIMES:
            flat |= flatten(value, f"{name}.{key}" if name else str(key))
    return flat


def same(a: Any, b: Any) -> bool:
    """Return whether two values of :func:`flatten` have the same bits."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and (a == b or a != a)


def _by(a: Any, b: Any) -> str:
    """Say how ``b`` differs from ``a``."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        return f"by {float((a.double() - b.double()).abs().max()):.0e}"
    return f"is {b!r}, not {a!r}" if isinstance(a, (int, float, str)) else "is not the same"


def _two_processes(whole: Path, command: Sequence[str], watch: _Watch) -> Verdict:
    """Have two processes begin the last run anew, where the ones before it are finished."""
    if watch.device.type == "cuda" and torch.cuda.device_count() < 2:
        return None, "takes two GPUs, and there is one; --device cpu does without"
    folder = whole.with_name("two")
    shutil.copytree(whole, folder, ignore=lambda path, names: names if Path(path) == watch.folder else [])
    complaint = _launch(command, folder)
    if complaint:
        return False, complaint
    two = load_checkpoint(folder / "gradients.pt")
    if two["items"] != watch.items:
        items = f"two have {two['items']:.0f} items in the first window, one has {watch.items}"
        return False, f"{items}: hand parallel on to the loader"
    apart, name = difference(two["gradients"], watch.gradients)
    holds = apart < watch.tolerance
    where = "" if holds else f", most in {name}"
    return holds, f"gradients differ by {apart:.0e} of their norm, without dropout{where}"


def _launch(command: Sequence[str], folder: Path) -> str:
    """Start two processes that write their gradients in ``folder``, wait for them, and return what went wrong."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    threads = str(max(1, torch.get_num_threads() // 2))
    shared = {
        **os.environ, FOLDER: str(folder), "OMP_NUM_THREADS": threads, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    logs = [folder / f"stderr{rank}" for rank in range(2)]
    processes: list[subprocess.Popen] = []
    try:
        for rank, log in enumerate(logs):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(log, "w") as file:
                processes.append(
                    subprocess.Popen([sys.executable, *command], env=own, stdout=subprocess.DEVNULL, stderr=file)
                )
        deadline = time.monotonic() + PATIENCE
        while None in (states := [process.poll() for process in processes]) and not any(states):
            if time.monotonic() > deadline:
                return f"two processes did not come to their first gradient within {PATIENCE} s"
            time.sleep(0.05)
        for process in processes:
            with suppress(subprocess.TimeoutExpired):  # one that waits for a process which is gone
                process.wait(5)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if (folder / "gradients.pt").exists():
        return ""
    said = [line.strip() for log in logs for line in log.read_text().splitlines()[-1:]]
    said.sort(key=lambda line: "another process is gone" in line)
    ends = f"ended with status {states[0] or states[1]}" if any(states) else "no gradient; hand observe on to Run"
    return f"two processes: {said[0] if said else ends}"


def _write_gradients(train: Train, parallel: Parallel) -> None:
    """Write the first gradients of the first run that is not finished; what trains after is not looked at."""
    folder = Path(os.environ[FOLDER])

    def observe(event: str, run: Run) -> None:
        if run.resumed:
            return  # of a run that is finished
        window = _first_window(run)
        (items,) = run.parallel.sum([sum(map(run.stepper.count, window))])
        gradients = {
            f"{name} in {phase}": gradient
            for phase in _each_phase(run)
            for name, gradient in _first_gradients(run, window).items()
        }
        if parallel.main:
            save_checkpoint(folder / "gradients.pt", {"gradients": gradients, "items": items})
        parallel.barrier()
        raise Stopped(signal.SIGTERM, run.folder)

    with suppress(Stopped), _exactly():
        train(folder, trial=WINDOWS, observe=observe)


def _each_phase(run: Run) -> Iterator[str]:
    """Enter the phases in turn, without a step, and give their names."""
    for number, phase in enumerate(run.plan, 1):
        set_trainable(run.model, phase, run.head, seed=run.seed)
        run.stepper.rewrap()
        yield f"phase {number} ({phase})"


def _first_gradients(run: Run, window: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the gradient of ``window`` with batch norms as they train, but without dropout."""
    for module in run.model.modules():
        module.training = module.training and isinstance(module, _BatchNorm)
    return _gradient(run, window)


def _gradient(run: Run, window: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the gradient of ``window`` by name, in full precision."""
    stepper = copy(run.stepper)
    stepper.amp, stepper.scaler, stepper._in_backward = "off", torch.amp.GradScaler(enabled=False), None
    stepper.backward(window)
    return {name: _whole(p.grad).clone() for name, p in run.model.named_parameters() if p.grad is not None}


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[float, str]:
    """Return the norm of the difference of two gradients over the norm of ``b``, and what differs the most."""
    lacking = sorted(a.keys() ^ b.keys())
    if lacking:
        return math.inf, lacking[0]
    apart = {name: float((a[name].to(b[name].device).double() - b[name].double()).norm()) for name in b}
    worst = max(apart, key=apart.__getitem__)
    above = math.hypot(*apart.values())
    below = math.hypot(*(float(gradient.double().norm()) for gradient in b.values()))
    if not math.isfinite(above) or (above and not below):
        return math.inf, worst
    return (above / below if above else 0.0), worst


def _cut(batch: Batch) -> list[Batch]:
    """Cut a batch in parts of 1, 2, 3, ... samples, so that no two weigh the same; the last is what is left."""
    samples = count_samples(batch)
    ends = [end for k in range(1, samples) if (end := k * (k + 1) // 2) < samples]

    def part(i: int) -> Batch:
        return map_tensors(batch, lambda t: t.tensor_split(ends)[i] if t.ndim and len(t) == samples else t)

    return [part(i) for i in range(len(ends) + 1)]


def _first_window(run: Run) -> list[Batch]:
    stream = iter(run.loader(0))
    return [batch for batch, _ in zip(stream, range(run.accumulate), strict=False)]


def _outputs(model: nn.Module, batch: Batch) -> Tensor:
    outputs = model(**batch) if hasattr(batch, "keys") else model(batch[0])
    return getattr(outputs, "logits", outputs)


def _tolerance(model: nn.Module) -> float:
    """Return how far norms may be apart: more where weights are of half precision."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max([TOLERANCE, *(4 * torch.finfo(dtype).eps for dtype in types)])


def _may_change(model: nn.Module) -> set[str]:
    """Return the names of what a step may change: trainable parameters; buffers of modules in training mode."""
    buffers = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        if module.training
        for name in module._buffers
    }
    return buffers | {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


@contextmanager
def _undisturbed(run: Run) -> Iterator[None]:
    """Put what trains, modes, buffers, gradients and random states of the run back at the end."""
    trains = {parameter: parameter.requires_grad for parameter in run.model.parameters()}
    modes = {module: module.training for module in run.model.modules()}
    buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    random = random_state()
    try:
        yield
    finally:
        for parameter, trainable in trains.items():
            parameter.requires_grad_(trainable)
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in run.model.named_buffers():
                buffer.copy_(buffers[name])
        run.optimizer.zero_grad(set_to_none=True)
        set_random_state(random)


@contextmanager
def _exactly() -> Iterator[None]:
    """Have a GPU repeat to the bit what it did, without TF32."""
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(torch.backends.cudnn.enabled, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
