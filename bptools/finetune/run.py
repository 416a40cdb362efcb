"""A training run that can be killed at any moment, and goes on as if nothing had happened.

The loop stays the recipe's own, and reads as one::

    run = Run(folder, stepper, phases, loader)
    for phase in run.phases():
        for epoch in run.epochs():
            for window in run.windows():
                run.step(window)
            with run.averaged():
                run.validate(evaluate(model, data).loss)
    run.load_best()

Made anew in a folder that holds a checkpoint, a run continues from it: phases, epochs and windows that are done
are not given again, and everything is put back bit by bit: weights, buffers, optimizer, averages, scaler,
schedule, patience, random states, the position in the data, and the sums of what is logged.
"""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from bptools.diagnose import gradient_flow

from .batches import Batch
from .checkpoint import (
    FileStore,
    load_weights,
    random_state,
    save_checkpoint,
    save_json,
    set_random_state,
    set_seed,
)
from .distributed import whole_state
from .errors import InputError, one_line
from .interrupt import Interrupt
from .monitor import Monitor
from .phases import Head, Phase, check_optimizer, enter_phase, needs_redraw, set_modes, set_trainable
from .schedule import make_schedule
from .sharded import ShardedStore
from .stepper import Stepper, StepResult
from .stopping import EarlyStopping

logger = logging.getLogger("bptools.finetune")
Observer = Callable[[str, "Run"], None]


class Stopped(Exception):
    """A run was asked to stop, has saved where it is, and can be continued.

    Args:
        number: Of the signal that asked.
        folder: Of the run, or of its job.
    """

    def __init__(self, number: int, folder: str | Path):
        super().__init__(f"{folder}: stopped by {signal.Signals(number).name}")
        self.signal, self.folder = number, Path(folder)


class Run:
    """Progress of one run through its phases, with its checkpoints, its log and its patience.

    Args:
        folder: Where ``last.pt`` and ``previous.pt`` (or ``sharded``), ``best.pt`` and TensorBoard's files go. All
            processes must see the same one.
        stepper: Holds model and optimizer.
        phases: What trains, in turn.
        loader: Makes the loader of an epoch, counted from 0 over all phases. It must depend on nothing else.
        head: Name of the module, or names of those, that ``"head"`` stands for in the phases' patterns.
        accumulate: Batches in a window, which is what one optimizer step learns from.
        schedule: Name of each phase's schedule, as :func:`bptools.finetune.make_schedule` takes it.
        patience: Epochs without a better metric that end a phase; 0: never.
        seed: Of what is drawn: the layers that train, where a phase draws them; and the random numbers of
            processes other than the first.
        title: Name of the run in the progress bar.
        items: Items in an epoch, for the bar.
        unit: What they are called there.
        bar: Whether to show the bar.
        keep: Plain values that go into ``best.pt`` beside the weights.
        save_every: Seconds between two checkpoints.
        trial: For a trial, the most windows in an epoch; each phase then is of one epoch.
        diagnose: Log how the gradient goes through the model, and dead units, in each epoch's first step.
        interrupt: Asked after each step; where it is true, the run saves and raises :class:`Stopped`.
        observe: Called with ``"phase"`` when a phase has been entered, ``"step"`` after each step, ``"end"`` when
            a phase ends, and the run.

    Attributes:
        taken: Optimizer steps so far.
        history: What each epoch came to.
        stopper: The patience.
        monitor: The log.
        resumed: Whether a checkpoint was found.

    Raises:
        InputError: If no checkpoint in the folder is whole.
    """

    def __init__(
        self,
        folder: str | Path,
        stepper: Stepper,
        phases: Sequence[Phase],
        loader: Callable[[int], StatefulDataLoader],
        *,
        head: Head = None,
        accumulate: int = 1,
        schedule: str = "cosine",
        patience: int = 0,
        seed: int = 0,
        title: str = "",
        items: int = 0,
        unit: str = "img",
        bar: bool = False,
        keep: Mapping[str, Any] | None = None,
        save_every: float = 60.0,
        trial: int | None = None,
        diagnose: bool = False,
        interrupt: Interrupt | None = None,
        observe: Observer | None = None,
    ):
        if accumulate < 1:
            raise InputError(f"--accumulate: expected at least 1, got {accumulate}")
        self.folder, self.stepper, self.loader = Path(folder), stepper, loader
        self.plan = [replace(phase, epochs=1) if trial else phase for phase in phases]
        self.head, self.accumulate, self.schedule, self.seed = head, accumulate, schedule, seed
        self.bar, self.diagnose = bar, diagnose
        self.keep, self.save_every, self.trial = dict(keep or {}), save_every, trial
        self.interrupt, self.observe = interrupt, observe or (lambda event, run: None)
        self.model, self.optimizer, self.parallel = stepper.model, stepper.optimizer, stepper.parallel
        self.tensors = stepper.ema.tensors if stepper.ema else {}
        self.store = (ShardedStore if self.parallel.kind == "fsdp" else FileStore)(self.folder, self.parallel)
        self.stopper = EarlyStopping(patience)
        self.taken = self.phase_index = self.phase_steps = self.epoch = self.batches = 0
        self.position: dict | None = None
        self.history: list[dict[str, float]] = []
        self.seconds, self.wait = 0.0, 0.0
        self._ahead: tuple[int, dict | None] = (0, None)

        state = self._load()
        self.resumed = state is not None
        self.windows_per_epoch = self._count_windows()
        total = items * sum(phase.epochs for phase in self.plan)
        logged = state and state["monitor"]
        self.monitor = Monitor(
            self.folder, title, total, unit=unit, bar=bar, main=self.parallel.main, state=logged
        )
        self._begun = self._saved = time.perf_counter()

    # What is saved -------------------------------------------------------------------------------------------

    def _load(self) -> dict | None:
        state = self._restore = self.store.load(self.model, self.optimizer, self.tensors)
        if self.parallel.rank:
            set_seed((self.seed * 1_000_003 + self.parallel.rank) % 2**32)  # dropout of its own
        if state is None:
            return None
        for name in ("taken", "phase_index", "phase_steps", "epoch", "batches", "position", "history", "seconds"):
            setattr(self, name, state[name])
        self._ahead = self.batches, self.position
        self.stopper.load_state_dict(state["stopper"])
        if state["random"] is None and self.parallel.main:
            logger.warning("the checkpoint is of another number of processes: random numbers are drawn anew")
        return state

    def save(self) -> None:
        """Write a checkpoint of this moment; all processes must call it."""
        state = {name: getattr(self, name) for name in ("taken", "phase_index", "phase_steps", "epoch", "batches")}
        state |= {"position": self.position, "history": self.history, "seconds": self.elapsed()}
        state |= {"stopper": self.stopper.state_dict(), "stepper": self.stepper.state_dict()}
        state |= {"monitor": self.monitor.state_dict(), "random": random_state()}
        state["ema"] = self.stepper.ema.state_dict() if self.stepper.ema else None
        self.store.save(self.model, self.optimizer, self.tensors, state)
        self._saved = time.perf_counter()

    def elapsed(self) -> float:
        """Return the seconds of training, those before an interruption included."""
        return self.seconds + time.perf_counter() - self._begun

    def _save_if_asked(self) -> None:
        stop = bool(self.interrupt)
        due = time.perf_counter() - self._saved >= self.save_every
        if self.parallel.size > 1:
            stop, due = (total > 0 for total in self.parallel.sum([stop, due]))
        if stop or due:
            self.save()
        if stop:
            self.monitor.close()
            raise Stopped(self.interrupt.signal if self.interrupt else signal.SIGTERM, self.folder)

    def _save_before(self, error: Exception) -> str:
        """Save what was learned before ``error``, if all processes know of it; return in words what is saved."""
        together = self.parallel.size == 1 or isinstance(error, FloatingPointError)
        if together:
            self.save()
        self.monitor.close()
        return f"the run is saved as of {f'step {self.taken}' if together else 'its last checkpoint'}"

    # The loop ------------------------------------------------------------------------------------------------

    def _count_windows(self) -> int:
        batches = len(self.loader(0))
        return min(math.ceil(batches / self.accumulate), self.trial or batches)

    def phases(self) -> Iterator[Phase]:
        """Enter the phases that are left, one after the other."""
        for index in range(self.phase_index, len(self.plan)):
            if index > self.phase_index:
                self.phase_index, self.phase_steps, self.epoch = index, 0, 0
            phase = self.plan[index]
            self._enter(phase)
            self.observe("phase", self)
            self.monitor.clear()
            yield phase
            self.observe("end", self)

    def _enter(self, phase: Phase) -> None:
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        enter_phase(self.model, self.optimizer, phase, self.head, seed=self.seed, step=self.phase_steps)
        check_optimizer(self.model, self.optimizer)
        self.stepper.rewrap()
        self.stepper.schedule = make_schedule(self.schedule, self.optimizer, self.windows_per_epoch * phase.epochs)
        if self._restore is None:
            self.stopper.start_phase()
            return
        for group, option in zip(self.optimizer.param_groups, options, strict=True):
            group.update(option)  # the rates of the moment, which entering has set to the phase's first ones
        self.stepper.load_state_dict(self._restore["stepper"])
        if self.stepper.ema:
            self.stepper.ema.load_state_dict(self._restore["ema"])
        if self._restore["random"] is not None:
            set_random_state(self._restore["random"])
        self._restore = None

    def epochs(self) -> Iterator[int]:
        """Give the epochs of the phase that are left, counted from 0 over all phases, while patience lasts."""
        phase = self.plan[self.phase_index]
        while self.epoch < phase.epochs and not self.stopper.exhausted:
            set_modes(self.model, frozen_norm=phase.frozen_norm, frozen_dropout=phase.frozen_dropout)
            yield self.stopper.epoch
            self.epoch, self.batches, self.position = self.epoch + 1, 0, None
            self._save_if_asked()

    def windows(self) -> Iterator[list[Batch]]:
        """Give the windows of the epoch that are left: lists of ``accumulate`` batches, the last maybe shorter.

        Raises:
            InputError: If the data cannot be read, or a process that loads them died. What was learned is saved,
                but where other processes, which do not know, train along: there the last checkpoint has it.
        """
        loader = self.loader(self.stopper.epoch)
        if self.position is not None:
            loader.load_state_dict(self.position)
        last = min(len(loader), self.windows_per_epoch * self.accumulate)
        if self.batches == last:
            return
        stream, done = iter(loader), self.batches
        while done < last:
            begun = time.perf_counter()
            try:
                window = [next(stream) for _ in range(min(self.accumulate, last - done))]
            except Exception as error:
                saved = self._save_before(error)
                if isinstance(error, InputError) or "DataLoader worker" in str(error):
                    raise InputError(f"{one_line(error)}; {saved}") from error
                raise
            self.wait = time.perf_counter() - begun
            done += len(window)
            self._ahead = done, loader.state_dict()
            yield window

    def step(self, window: Sequence[Batch]) -> StepResult:
        """Learn from a window, log it, and save or stop where that is due.

        Raises:
            Stopped: If the run was asked to stop; it is saved.
            FloatingPointError: If loss or gradient is not finite; the run is saved as of before the step.
        """
        phase = self.plan[self.phase_index]
        if needs_redraw(phase, self.phase_steps):
            set_trainable(self.model, phase, self.head, seed=self.seed, step=self.phase_steps)
            self.stepper.rewrap()
        due = self.diagnose and not self.batches and self.parallel.main
        flow = gradient_flow(self.model) if due else None
        try:
            result = self.stepper.step(window, flow)
        except (FloatingPointError, InputError) as error:
            self._save_before(error)
            raise
        self.taken, self.phase_steps = self.taken + 1, self.phase_steps + 1
        self.batches, self.position = self._ahead
        self.monitor.step(result, self.optimizer.param_groups, wait=self.wait)
        if flow and not result.skipped:
            self.monitor.flow(flow)
        self.observe("step", self)
        self._save_if_asked()
        return result

    # What comes of it ------------------------------------------------------------------------------------------

    def averaged(self) -> AbstractContextManager:
        """Return a context in which the model has the averaged weights, if the stepper keeps such."""
        return self.stepper.ema.applied(self.model) if self.stepper.ema else nullcontext()

    def validate(self, loss: float, **scalars: float) -> bool:
        """End an epoch with the validation's ``loss``, keep the weights in ``best.pt`` if it is the lowest.

        Args:
            loss: What patience looks at; that of the first process counts.
            scalars: More figures to log and to remember.

        Returns:
            Whether it is the best epoch so far.
        """
        loss = self.parallel.broadcast(loss)  # or rounding could have processes disagree on when to stop
        self.history.append({"train_loss": self.monitor.mean_loss(), "loss": loss, **scalars})
        figures = {f"val/{name}": value for name, value in {"loss": loss, **scalars}.items()}
        self.monitor.epoch(self.optimizer.param_groups, **figures)
        better = self.stopper.update(loss)
        if better:
            state = whole_state(self.model)
            if self.parallel.main:
                save_checkpoint(self.folder / "best.pt", {"model": state, **self.keep})
        return better

    def load_best(self) -> nn.Module:
        """Save the end in ``last.pt``, load the weights of the best epoch into the model, and return it.

        Raises:
            InputError: If :meth:`validate` was never called.
        """
        self.save()
        load_weights(self.model, self.folder / "best.pt")
        return self.model

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write ``result`` (plain values), history, seconds and why it stopped to ``result.json``; return it."""
        whole = {"history": self.history, "reason": self.stopper.reason(), "seconds": self.elapsed(), **result}
        if self.parallel.main:
            save_json(self.folder / "result.json", whole)
        self.monitor.close()
        return whole
