"""Checkpoints that are whole or absent, and errors that name the file.

A checkpoint is written beside its place, flushed to the disk, and moved there in one atomic step, so a crash
leaves the old one. It is read with ``weights_only=True``: tensors and plain Python values, no code.
"""

import json
import os
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import InputError

# What torch and safetensors raise for torn files, files of another kind, and files with code in them.
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError)


def make_folder(path: str | Path, config: dict[str, Any]) -> Path:
    """Make the folder of a job, with its resolved settings in ``config.json``, and return its path.

    Raises:
        InputError: If there is a file in its place, or no folder can be made or written there.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--log-dir {path}: {error.strerror}") from error
    return path


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain values) to ``path`` atomically, making folders as needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise InputError(f"{path} is torn or not a PyTorch checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise InputError(f"{path}: expected a dictionary of tensors, got {type(state).__name__}")
    missing = [key for key in keys if key not in state]
    if missing:
        raise InputError(f"{path} is not a checkpoint of this recipe: it lacks {', '.join(missing)}")
    return state


def load_job(folder: str | Path) -> dict[str, Any]:
    """Read ``last.pt`` of the job in ``folder``: its ``config``, and the runs ``done`` and ``unfinished``.

    Raises:
        InputError: As :func:`load_checkpoint` does; the message names ``--resume``.
    """
    try:
        return load_checkpoint(Path(folder, "last.pt"), keys=("config", "done", "unfinished"))
    except InputError as error:
        raise InputError(f"--resume {folder}: {error}") from error


def load_weights(model: nn.Module, path: str | Path, *, replaceable: Sequence[str] = ()) -> list[str]:
    """Load a weights file into ``model``, strictly, but for ``replaceable`` modules of another shape.

    The file holds a state dict, bare or under ``"model"`` or ``"state_dict"``. Prefixes left by
    ``torch.compile`` and data parallelism are removed.

    Args:
        model: Receives the weights.
        path: The file.
        replaceable: Module names (a new head) that keep their own values if the file's do not fit.

    Returns:
        Names of the entries that kept the model's own values.

    Raises:
        InputError: If the file cannot be read, or its names or shapes are not the model's.
    """
    state = load_checkpoint(path)
    for key in ("model", "state_dict"):
        state = state[key] if isinstance(state.get(key), dict) else state
    state = {k.removeprefix("module.").replace("_orig_mod.", ""): v for k, v in state.items()}
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
    model.load_state_dict(own | {k: v for k, v in state.items() if k not in kept})
    return kept


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
