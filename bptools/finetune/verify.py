"""Prove a recipe on its user's own settings, in seconds: ``--verify`` and ``--dry-run``.

Both call the recipe's own training function, for one epoch of a few windows in each phase, in a temporary folder.
What is looked at is what that function does, with whatever its user has changed in it.

- *accumulated = one batch*: the gradient of a window is the same however its samples are cut into micro-batches.
- *resumed = uninterrupted*: a run that is stopped after some step and continued leaves the checkpoint that a run
  without a stop does, bit for bit.
- *what trains learns*: each trainable parameter gets a gradient from the first window of each phase.
- *frozen unchanged*: what no step of a phase trains has the same bits at its end, and so have the buffers of
  modules in evaluation mode.
- *merged = adapter*: a peft model gives the same outputs with its adapter merged.
- *two processes = one*: two processes that share each batch have the gradient that one has.
"""

import copy
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .adapters import merge_adapter
from .batches import Batch, split_batch, to_device
from .card import plain_table
from .checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state
from .distributed import Parallel
from .errors import InputError
from .run import Run, Stopped

Train = Callable[..., Any]
GRADIENTS = "BPTOOLS_VERIFY_GRADIENTS"  # where one of two processes writes its gradients
TOLERANCE = 1e-4  # of a gradient's norm; float32 has rounding errors near 1e-6, a wrong weighting some percent
WINDOWS = 2  # in each epoch


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


def dry_run(train: Train, console: Console, parallel: Parallel) -> None:
    """Do one window of everything: stop after the first step, continue from the checkpoint, validate and test.

    Args:
        train: Called with a folder and ``trial``, ``interrupt``, ``observe``, which :class:`Run` takes. It does a
            run, or several, each in a folder of its own inside.
        console: Where to print.
        parallel: This process among those that train.
    """
    with _temporary_folder(parallel) as folder:
        try:
            train(folder, trial=1, interrupt=StopAfter(1))
        except Stopped:
            train(folder, trial=1)
    if parallel.main:
        console.print(
            "dry run: one window of every phase, a checkpoint written and read, validation and test: all well"
        )


def verify_kind(kind: str) -> str:
    """Return the ``--parallel`` of this process of :func:`verify`: where there are two, the user's ``kind``."""
    return kind if GRADIENTS in os.environ and kind != "none" else "auto"


def verify(train: Train, command: Sequence[str], console: Console, parallel: Parallel) -> int:
    """Make all checks, print a table of them, and return the exit status: 0 if all hold, else 1.

    Args:
        train: As for :func:`dry_run`.
        command: The recipe's file and its arguments, for the two processes.
        console: Where to print.
        parallel: This process; where it is one of several, it only writes its gradients for the process that
            started it.

    Raises:
        InputError: If torchrun was started by someone else.
    """
    if parallel.size > 1:
        if GRADIENTS not in os.environ:
            raise InputError("--verify: starts two processes itself; leave out torchrun")
        _write_gradients(train, parallel)
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        watch = _Watch()
        checks = (
            ("resumed = uninterrupted", lambda: _resume(train, Path(folder), watch)),
            ("accumulated = one batch", watch.accumulation),
            ("what trains learns", watch.learning),
            ("frozen unchanged", watch.frozen),
            ("merged = adapter", watch.merged),
            ("two processes = one", lambda: _two_processes(Path(folder), command, watch.gradients)),
        )
        for name, check in checks:
            begun = time.perf_counter()
            holds, note = check()
            verdict = {True: "holds", False: "FAILS", None: "-"}[holds]
            rows.append((name, verdict, f"{time.perf_counter() - begun:.1f}", note))
    columns = {"check": "left", "verdict": "left", "seconds": "right", "what was seen": "left"}
    console.print(plain_table("Verified on these settings", columns, rows))
    failed = [row[0] for row in rows if row[1] == "FAILS"]
    console.print(f"{len(failed)} of {len(rows)} checks fail" if failed else "all hold")
    return int(bool(failed))


Verdict = tuple[bool | None, str]  # None: there is nothing to check


class _Watch:
    """An observer of runs that checks what it sees."""

    def __init__(self) -> None:
        self.differences: list[float] = []
        self.gradients: dict[str, Tensor] = {}
        self.changed: list[str] = []
        self.idle: list[str] = []
        self.held = self.phases = self.steps = 0
        self.merges: list[float] = []
        self._before: dict[str, Tensor] = {}
        self._touched: set[str] = set()

    def __call__(self, event: str, run: Run) -> None:
        if event == "phase":
            self.phases += 1
            with _undisturbed(run):
                self._compare_pieces(run)
            if self.phases == 1:
                self.gradients = first_gradients(run)
            self._before = {name: t.detach().clone() for name, t in run.model.state_dict().items()}
            self._touched = set()
        self.steps += event == "step"
        self._touched |= _may_change(run.model)
        if event == "end":
            after = run.model.state_dict()
            kept = self._before.keys() - self._touched
            self.held += len(kept)
            self.changed += [name for name in sorted(kept) if not torch.equal(self._before[name], after[name])]
            if run.phase_index == len(run.plan) - 1 and hasattr(run.model, "merge_and_unload"):
                with _undisturbed(run):
                    self._compare_merged(run)

    def _compare_pieces(self, run: Run) -> None:
        """Look at the gradient of a window, whole and in pieces of 3 samples."""
        run.model.eval()  # without dropout, and batch norms whose statistics are not the micro-batch's
        window = _first_window(run)
        whole = gradient(run, window)
        pieces = gradient(run, [piece for batch in window for piece in split_batch(batch, 3)])
        self.differences.append(difference(pieces, whole))
        self.idle += [name for name, p in run.model.named_parameters() if p.requires_grad and p not in whole]

    def _compare_merged(self, run: Run) -> None:
        run.model.eval()
        (batch, *_) = _first_window(run)
        try:
            merged = merge_adapter(copy.deepcopy(run.model))
        except InputError:
            return  # virtual tokens cannot be merged
        with torch.no_grad():
            outputs = [_outputs(model, to_device(batch, run.stepper.device)) for model in (run.model, merged)]
        self.merges.append(float((outputs[0] - outputs[1]).norm() / outputs[0].norm()))

    def accumulation(self) -> Verdict:
        worst = max(self.differences)
        return worst < TOLERANCE, f"gradients differ by {worst:.0e} of their norm, in evaluation mode"

    def learning(self) -> Verdict:
        if self.idle:
            return False, f"{len(self.idle)} trainable tensors get no gradient, such as {self.idle[0]}"
        return True, "every trainable tensor gets a gradient"

    def frozen(self) -> Verdict:
        if self.changed:
            return False, f"{len(self.changed)} of {self.held} tensors changed, such as {self.changed[0]}"
        return True, f"{self.held} tensors, buffers included, over {self.phases} phases, bit for bit"

    def merged(self) -> Verdict:
        if not self.merges:
            return None, "no adapter that can be merged"
        return max(self.merges) < TOLERANCE, f"outputs differ by {max(self.merges):.0e} of their norm"


def _resume(train: Train, folder: Path, watch: _Watch) -> Verdict:
    train(folder / "whole", trial=WINDOWS, observe=watch)
    stop = max(1, watch.steps - 1)
    try:
        train(folder / "stopped", trial=WINDOWS, interrupt=StopAfter(stop))
        return False, f"the run did not stop after step {stop}: is interrupt handed on to Run?"
    except Stopped:
        train(folder / "stopped", trial=WINDOWS)
    tensors = 0
    for path in sorted((folder / "whole").rglob("last.pt")):
        other = folder / "stopped" / path.relative_to(folder / "whole")
        a, b = flatten(load_checkpoint(path)), flatten(load_checkpoint(other))
        differ = sorted(name for name in a.keys() | b.keys() if not same(a.get(name), b.get(name)))
        if differ:
            return False, f"{len(differ)} of {len(a)} values differ in {path.parent.name}, such as {differ[0]}"
        tensors += sum(isinstance(value, Tensor) for value in a.values())
    return True, f"{tensors} tensors and all counters, bit for bit, from step {stop} of {watch.steps}"


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


def _two_processes(folder: Path, command: Sequence[str], one: dict[str, Tensor]) -> Verdict:
    gpus = torch.cuda.device_count()
    if next(iter(one.values())).is_cuda and gpus < 2:
        return None, "takes two GPUs, and there is one; --device cpu does without"
    path = folder / "gradients.pt"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, GRADIENTS: str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True)
    if not path.exists():
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["no reason given"]
        return False, f"two processes ended with status {done.returncode}: {lines[0].strip()}"
    two = load_checkpoint(path)
    worst = difference(two, one)
    note = f"gradients differ by {worst:.0e} of their norm, without dropout"
    return worst < TOLERANCE, note


def _write_gradients(train: Train, parallel: Parallel) -> None:
    def observe(event: str, run: Run) -> None:
        gradients = first_gradients(run)
        if parallel.main:
            save_checkpoint(os.environ[GRADIENTS], gradients)
        raise Stopped(signal.SIGTERM, run.folder)

    with suppress(Stopped), _temporary_folder(parallel) as folder:
        train(folder, trial=WINDOWS, observe=observe)


def first_gradients(run: Run) -> dict[str, Tensor]:
    """Return the gradient of the run's first window, by names, without dropout; the run stays as it is."""
    with _undisturbed(run):
        for module in run.model.modules():
            if not any(True for _ in module.parameters()):
                module.eval()  # dropout, and nothing that has weights
        names = {p: name for name, p in run.model.named_parameters()}
        return {names[p]: g for p, g in gradient(run, _first_window(run)).items()}


def gradient(run: Run, window: Sequence[Batch]) -> dict[Any, Tensor]:
    """Return the gradient of a window by parameter, in full precision."""
    amp, run.stepper.amp = run.stepper.amp, "off"
    run.stepper.backward(window)
    run.stepper.amp = amp
    return {p: _whole(p.grad).clone() for p in run.model.parameters() if p.grad is not None}


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def difference(a: dict[Any, Tensor], b: dict[Any, Tensor]) -> float:
    """Return the norm of the difference of two gradients over the norm of the second."""
    if a.keys() != b.keys():
        return float("inf")
    above = sum(float((a[key].to(b[key].device).double() - b[key].double()).square().sum()) for key in b)
    below = sum(float(b[key].double().square().sum()) for key in b)
    return (above / below) ** 0.5


def _first_window(run: Run) -> list[Batch]:
    stream = iter(run.loader(0))
    return [batch for batch, _ in zip(stream, range(run.accumulate), strict=False)]


def _outputs(model: nn.Module, batch: Batch) -> Tensor:
    outputs = model(**batch) if hasattr(batch, "keys") else model(batch[0])
    outputs = getattr(outputs, "logits", outputs)
    return outputs.double()


def _may_change(model: nn.Module) -> set[str]:
    """Return the names of what a step may change: trainable parameters; buffers of modules in training mode."""
    buffers = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if module.training
        for name in module._buffers
    }
    return buffers | {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


@contextmanager
def _undisturbed(run: Run):
    """Put modes, buffers, gradients and random states of the run back at the end."""
    modes = {module: module.training for module in run.model.modules()}
    buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    random = random_state()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in run.model.named_buffers():
                buffer.copy_(buffers[name])
        run.optimizer.zero_grad(set_to_none=True)
        set_random_state(random)
