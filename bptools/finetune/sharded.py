"""Checkpoints that all processes write together, and that any number of processes can read.

Each process writes its own share of the tensors by ``torch.distributed.checkpoint``, into a folder with a
temporary name. When all files are on the disk, the first process lists their sizes in a manifest and renames the
folder, so a crash at any time leaves the checkpoint before. All processes have to see the same disk.

What is read is tensors and plain values, no code: torch pickles a description of the tensors, which is read here
with a list of what it may name.

The optimizer's state is taken by the names of parameters, and not by ``get_optimizer_state_dict``: that makes a
missing state by a step with zero gradients, which sets Adam's count to 1, and it asks for the state of each
parameter that is trainable now, although those of the next phase have none yet.
"""

import io
import json
import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from .checkpoint import UNREADABLE
from .distributed import Parallel, peer_errors
from .errors import InputError, one_line

MANIFEST = "manifest.json"
NAMED = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},  # Python 3.13
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Reads the description of a checkpoint, which names nothing but its own few classes."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in NAMED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """Reads a checkpoint whose description has been read already."""

    def __init__(self, path: Path, metadata: Metadata):
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.metadata


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _whole(folder: Path) -> bool:
    """Return whether the manifest of a checkpoint is there, and all its files with the sizes that it says."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def _checkpointing(what: str) -> Iterator[None]:
    """Turn torch's exception, with the tracebacks of all processes, and those of the disk into one line."""
    try:
        with warnings.catch_warnings(), peer_errors():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if not isinstance(cause, Exception):
            raise cause from None  # Ctrl-C
        raise InputError(f"{what}: {type(cause).__name__}: {one_line(cause)}") from error
    except OSError as error:
        if isinstance(error, ConnectionError):
            raise
        raise InputError(f"{what}: {one_line(error)}") from error


def _describe(folder: Path) -> Metadata:
    """Return the description of the checkpoint in ``folder``."""
    try:
        with open(folder / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
    except (*UNREADABLE, AttributeError, TypeError, ImportError) as error:
        raise InputError(f"{folder}: its .metadata is not that of a checkpoint ({one_line(error)})") from error
    known = isinstance(metadata, Metadata) and all(
        isinstance(entry, TensorStorageMetadata) for entry in metadata.state_dict_metadata.values()
    )
    if not known:
        raise InputError(f"{folder}: expected a checkpoint of tensors, but it has other entries")
    return metadata


def _named_groups(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[dict[str, Any], dict[str, nn.Parameter]]]:
    """Yield each group of the optimizer and its parameters, by their names in the model."""
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        yield group, {names[id(p)]: p for p in group["params"]}


def _encode(plain: dict[str, Any]) -> Tensor:
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _expect_same(folder: Path, saved: Mapping[str, TensorStorageMetadata], state: Mapping[str, Tensor]) -> None:
    """Raise an :class:`InputError` unless the checkpoint has the names, shapes and dtypes of ``state``."""
    there = {name: (tuple(entry.size), entry.properties.dtype) for name, entry in saved.items()}
    here = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    for name in here | there:
        if there.get(name) != here.get(name):
            found, expected = (" ".join(map(str, side.get(name, ("none",)))) for side in (there, here))
            raise InputError(f"{folder} does not fit: expected {expected} for {name}, got {found}")


def _empty(
    key: str, parameter: nn.Parameter, entry: TensorStorageMetadata | None, options: Mapping[str, Any]
) -> Tensor:
    """Return memory for an optimizer's state of ``parameter``, sharded as it is and placed as torch places it."""
    if entry is None:
        return torch.empty(0)
    dtype = entry.properties.dtype
    counts = key == "step" and not (options.get("capturable") or options.get("fused"))
    if entry.size == parameter.shape and not counts:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=dtype, device="cpu" if counts else parameter.device)


class ShardedStore:
    """The newest two checkpoints of a job, in the folder ``sharded`` of its own.

    Args:
        folder: The job's folder, on a disk that all processes see.
        parallel: This process among the others.
    """

    def __init__(self, folder: str | Path, parallel: Parallel):
        self.folder, self.parallel = Path(folder, "sharded"), parallel

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tensors: Mapping[str, Tensor],
        extra: Mapping[str, Any],
    ) -> None:
        """Write a checkpoint; every process calls it.

        Args:
            model: The bare model.
            optimizer: Its optimizer.
            tensors: Further tensors, such as averaged weights.
            extra: Plain values and small tensors, kept of the first process; but ``extra["random"]`` of each.

        Raises:
            InputError: If the files cannot be written.
        """
        state = {f"tensors.{name}": tensor for name, tensor in tensors.items()}
        own = model.state_dict()
        state |= {f"model.{name}": value for name, value in own.items() if isinstance(value, Tensor)}
        plain = {
            "extra": dict(extra),
            "random": self.parallel.gather(extra.get("random")),
            "model": {name: value for name, value in own.items() if not isinstance(value, Tensor)},
            "groups": [],
        }
        for group, parameters in _named_groups(model, optimizer):
            states = {}
            for name, parameter in parameters.items():
                states[name] = {"tensors": [], "plain": {}}
                for key, value in optimizer.state.get(parameter, {}).items():
                    if not isinstance(value, Tensor):
                        states[name]["plain"][key] = value
                        continue
                    if isinstance(value, DTensor) and value.shape != parameter.shape:
                        raise ValueError(f"optimizer: {key!r} of {name!r} is sharded unlike the parameter itself")
                    states[name]["tensors"].append(key)
                    state[f"optimizer.{name}.{key}"] = value
            plain["groups"].append(group | {"params": states})
        if self.parallel.main:
            state["plain"] = _encode(plain)

        with _checkpointing(f"cannot write a checkpoint to {self.folder}"):
            part, final = self.parallel.broadcast(self._prepare() if self.parallel.main else None)
            dcp.save(
                state,
                storage_writer=dcp.FileSystemWriter(part),  # each process flushes its own files to the disk
                planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
                no_dist=self.parallel.size == 1,
            )
            if self.parallel.main:
                self._commit(part, final)
        self.parallel.barrier()

    def load(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
    ) -> dict[str, Any] | None:
        """Read the newest whole checkpoint into ``model``, ``optimizer`` and ``tensors``; every process calls it.

        Returns:
            What was saved as ``extra``, with the ``"random"`` of this process, or with ``None`` in its place if
            another number of processes saved it; ``None`` if there is no checkpoint.

        Raises:
            InputError: If the checkpoint is of another model, or its files hold something else.
        """
        folder = self.parallel.broadcast(self._newest() if self.parallel.main else None)
        if folder is None:
            return None
        metadata = _describe(folder)
        saved = dict(metadata.state_dict_metadata)
        plain = self._read_plain(folder, metadata, saved.pop("plain", None))
        own = model.state_dict()
        groups = list(_named_groups(model, optimizer))
        if [list(group["params"]) for group in plain["groups"]] != [list(parameters) for _, parameters in groups]:
            raise InputError(f"{folder} does not fit: its optimizer has other parameters or groups")

        state = {f"tensors.{name}": tensor for name, tensor in tensors.items()}
        state |= {f"model.{name}": value for name, value in own.items() if isinstance(value, Tensor)}
        states = {}
        for (_, parameters), options in zip(groups, plain["groups"], strict=True):
            for name, entries in options.pop("params").items():
                parameter = parameters[name]
                states[parameter] = entries["plain"]
                for key in entries["tensors"]:
                    path = f"optimizer.{name}.{key}"
                    state[path] = states[parameter][key] = _empty(key, parameter, saved.get(path), options)
        _expect_same(folder, saved, state)
        self._read(folder, metadata, state)

        model.load_state_dict(own | plain["model"])
        optimizer.state.clear()
        optimizer.state.update({parameter: values for parameter, values in states.items() if values})
        for (group, _), options in zip(groups, plain["groups"], strict=True):
            group.update(options)
        everyones = plain["random"]
        mine = everyones[self.parallel.rank] if len(everyones) == self.parallel.size else None
        return plain["extra"] | {"random": mine}

    def _checkpoints(self) -> list[Path]:
        """Return the folders of checkpoints, the newest first, torn or not."""
        return sorted((p for p in self.folder.glob("[0-9]*") if p.is_dir()), reverse=True)

    def _newest(self) -> Path | None:
        for folder in self._checkpoints():
            if _whole(folder):
                return folder
            logging.getLogger("bptools.finetune").warning("%s is torn; trying the checkpoint before it", folder)
        return None

    def _prepare(self) -> tuple[Path, Path]:
        """Return the temporary and the final name of the next checkpoint, and remove what a crash left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob("*.part"):
            shutil.rmtree(left)
        number = max((int(p.name) for p in self._checkpoints()), default=0) + 1
        return self.folder / f"{number:08d}.part", self.folder / f"{number:08d}"

    def _commit(self, part: Path, final: Path) -> None:
        sizes = {path.name: path.stat().st_size for path in part.iterdir()}
        (part / MANIFEST).write_text(json.dumps(sizes, indent=2) + "\n")
        _sync(part / MANIFEST)
        _sync(part)
        os.rename(part, final)
        _sync(self.folder)
        folders = self._checkpoints()
        kept = [folder for folder in folders if _whole(folder)][:2]
        for folder in folders:
            if folder not in kept:
                shutil.rmtree(folder)

    def _read(self, folder: Path, metadata: Metadata, state: dict[str, Tensor]) -> None:
        with _checkpointing(f"cannot read {folder}"):
            dcp.load(
                state,
                storage_reader=_Reader(folder, metadata),
                planner=dcp.DefaultLoadPlanner(flatten_state_dict=False),
                no_dist=self.parallel.size == 1,
            )

    def _read_plain(self, folder: Path, metadata: Metadata, entry: TensorStorageMetadata | None) -> dict[str, Any]:
        """Return the plain values, which are stored as the bytes of a tensor."""
        if entry is None:
            raise InputError(f"{folder} is not a checkpoint of this recipe: it lacks plain values")
        state = {"plain": torch.empty(entry.size, dtype=torch.uint8)}
        self._read(folder, metadata, state)
        try:
            return torch.load(io.BytesIO(state["plain"].numpy().tobytes()), weights_only=True)
        except UNREADABLE as error:
            raise InputError(f"{folder} holds more than plain values ({one_line(error)})") from error
