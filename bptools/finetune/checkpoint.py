"""Checkpoints that are whole or absent, and errors that name the file.

A checkpoint is written beside its place, flushed to the disk, and moved there in one atomic step, so a crash
leaves the old one. It is read with ``weights_only=True``: tensors and plain Python values, no code; and its
checksums are verified first, which `torch.load` does not do.
"""

import json
import logging
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

from .distributed import Parallel
from .errors import InputError, one_line

logger = logging.getLogger("bptools.finetune")

# What torch and safetensors raise for torn files, files of another kind, and files with code in them.
UNREADABLE = (
    OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile,
    SafetensorError,
)  # fmt: skip


def make_folder(path: str | Path, config: dict[str, Any]) -> Path:
    """Make the folder of a job, with its resolved settings in ``config.json``, and return its path.

    Raises:
        InputError: If there is a file in its place, or no folder can be made or written there.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--log-dir {path}: {error.strerror}") from error
    save_json(path / "config.json", config)
    return path


def holds_run(folder: str | Path) -> bool:
    """Return whether a job in ``folder`` has learned something: has a checkpoint or the weights of an epoch."""
    return any(path.name in ("last.pt", "best.pt", "sharded") for path in Path(folder).glob("*/*/*"))


def write_file(path: str | Path, write: Callable[[BinaryIO], None], *, previous: str | None = None) -> None:
    """Write a file atomically, making folders as needed.

    Args:
        path: The file.
        write: Writes the contents to the open file that it is given.
        previous: Name, in the same folder, that the file which was there before takes.

    Raises:
        InputError: If the disk is full, or the file cannot be written; what was there before is there still.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, path.with_name(previous))
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # what torch.save stumbled over
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"cannot write {path}: {cause.strerror}; what was saved before is still there") from error
    finally:
        part.unlink(missing_ok=True)


def save_checkpoint(path: str | Path, state: Mapping[str, Any], *, previous: str | None = None) -> None:
    """Write ``state`` (tensors and plain values) to ``path``, as :func:`write_file` does."""
    write_file(path, lambda file: torch.save(dict(state), file), previous=previous)


def save_json(path: str | Path, value: Any) -> Any:
    """Write ``value`` to ``path`` as JSON, as :func:`write_file` does, and return it."""
    text = json.dumps(value, indent=2) + "\n"
    write_file(path, lambda file: file.write(text.encode()))
    return value


def load_checkpoint(path: str | Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: The file; ``.safetensors`` files hold tensors only.
        keys: Entries that must be there.

    Raises:
        InputError: If the file is missing, torn, of another kind, or lacks one of ``keys``.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such checkpoint file: {path}")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            _verify_checksums(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise InputError(f"{path} is torn or not a PyTorch checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise InputError(f"{path}: expected a dictionary of tensors, got {type(state).__name__}")
    missing = [key for key in keys if key not in state]
    if missing:
        raise InputError(f"{path} is not a checkpoint of this recipe: it lacks {', '.join(missing)}")
    return state


def _verify_checksums(path: Path) -> None:
    """Raise unless each record of a zip file, which `torch.save` writes, has the sum that is written beside it."""
    if zipfile.is_zipfile(path):  # else of an old format, which has none
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
        if broken:
            raise zipfile.BadZipFile(f"{broken} is broken")


def load_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: If the file is missing or torn.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is torn or not JSON ({type(error).__name__})") from error


class FileStore:
    """Checkpoints of a run in one file, ``last.pt``, and the one before it in ``previous.pt``.

    For a lone process, and for data parallelism, where each process holds everything and the first one writes.
    All processes must call the methods.

    Args:
        folder: Folder of the run; all processes must see the same one.
        parallel: This process among the others.
    """

    def __init__(self, folder: str | Path, parallel: Parallel | None = None):
        self.folder, self.parallel = Path(folder), parallel or Parallel()

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tensors: Mapping[str, Tensor],
        extra: Mapping[str, Any],
    ) -> None:
        """Write a checkpoint.

        Args:
            model: Its whole state is kept, buffers too.
            optimizer: The same.
            tensors: More tensors, such as the averages of the weights.
            extra: Plain values; ``"random"`` is kept for each process.

        Raises:
            InputError: As :func:`write_file` does.
        """
        randoms = self.parallel.gather(extra["random"])
        if self.parallel.main:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "tensors": dict(tensors),
                "extra": {**extra, "random": randoms},
            }
            save_checkpoint(self.folder / "last.pt", state, previous="previous.pt")
        self.parallel.barrier()

    def load(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
    ) -> dict[str, Any] | None:
        """Restore the newest checkpoint that is whole, in place, and return its ``extra``; ``None`` without one.

        ``extra["random"]`` is ``None`` if the checkpoint is of another number of processes.

        Raises:
            InputError: If there are checkpoints, and none is whole.
        """
        paths = [path for path in (self.folder / "last.pt", self.folder / "previous.pt") if path.exists()]
        if not paths:
            return None
        for path in paths:
            try:
                state = load_checkpoint(path, keys=("model", "optimizer", "tensors", "extra"))
                break
            except InputError as error:
                if path is paths[-1]:
                    raise
                logger.warning("%s; going on from the one before it, %s", error, paths[-1].name)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for name, value in state["tensors"].items():
            tensors[name].copy_(value)
        randoms = state["extra"]["random"]
        same = len(randoms) == self.parallel.size
        return {**state["extra"], "random": randoms[self.parallel.rank] if same else None}


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    replaceable: Sequence[str] = (),
    adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> list[str]:
    """Load a weights file into ``model``, strictly, but for ``replaceable`` modules of another shape.

    The file holds a state dict, bare or under ``"model"`` or ``"state_dict"``. Prefixes left by
    ``torch.compile`` and data parallelism are removed.

    Args:
        model: Receives the weights.
        path: The file.
        replaceable: Module names (a new head) that keep their own values if the file's do not fit.
        adapt: Changes what the file holds so that it fits, where it raises no ValueError.

    Returns:
        Names of the entries that kept the model's own values.

    Raises:
        InputError: If the file cannot be read, or its names or shapes are not the model's.
    """
    state = load_checkpoint(path)
    for key in ("model", "state_dict"):
        state = state[key] if isinstance(state.get(key), dict) else state
    state = {k.removeprefix("module.").replace("_orig_mod.", ""): v for k, v in state.items()}
    if adapt is not None:
        try:
            state = adapt(state)
        except ValueError as error:
            raise InputError(f"{path} does not fit the model: {one_line(error)}") from error
    own = model.state_dict()
    shapes = {k: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for k, v in state.items()}
    kept = [
        k
        for k, v in own.items()
        if shapes.get(k) != tuple(v.shape) and any(k.startswith(f"{name}.") for name in replaceable)
    ]
    missing = [k for k in own if k not in state and k not in kept]
    unexpected = [k for k in state if k not in own]
    misfit = [k for k in own if k in state and k not in kept and shapes[k] != tuple(own[k].shape)]
    problems = [
        f"{len(names)} {what} (such as {names[0]}{detail(names[0])})"
        for what, names, detail in (
            ("missing", missing, lambda k: ""),
            ("unexpected", unexpected, lambda k: ""),
            ("of another shape", misfit, lambda k: f": {shapes[k]} for {tuple(own[k].shape)}"),
        )
        if names
    ]
    if problems:
        raise InputError(f"{path} does not fit the model: {', '.join(problems)}, of {len(own)} entries")
    fitting = {k: v for k, v in state.items() if k not in kept}
    if any(isinstance(v, DTensor) for v in own.values()):
        set_model_state_dict(model, fitting, options=StateDictOptions(full_state_dict=True, strict=False))
    else:
        model.load_state_dict(own | fitting)
    return kept


def set_seed(seed: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch (CPU and every CUDA device)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Return the states of the generators of Python, NumPy and PyTorch (CPU and every CUDA device)."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what :func:`random_state` returned."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
