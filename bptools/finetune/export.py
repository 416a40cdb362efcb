"""Adapters and merged models in files: safetensors, buffers included, and folders that are whole or absent.

peft's own file holds the adapter and the modules that it was told to save. The statistics of the frozen model's
batch norms are in neither, and lost when the adapter is put on a fresh model; here they are in a file beside.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bptools.nn import NF4Linear

from ._quiet import quiet_transformers
from .adapters import dequantised, merge_adapter, quantise, wrap
from .checkpoint import load_checkpoint
from .errors import InputError, one_line

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG, WEIGHTS, BUFFERS = "adapter_config.json", "adapter_model.safetensors", "buffers.safetensors"


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write the adapter and the trained head as peft does, and the model's buffers, to ``folder``.

    ``peft.PeftModel.from_pretrained`` reads it too, but for ``buffers.safetensors``, where the names of the 4-bit
    layers are as well. In `nn.MultiheadAttention` peft adds the output's update twice, and computes another thing.

    Args:
        model: What :func:`add_adapter` returned.
        folder: Absent, empty, or of an adapter that was saved before, which is replaced in one step.

    Raises:
        InputError: If a parameter is trainable but not the adapter's nor the head's, and would be lost; or if
            the folder cannot be written or holds other files.
    """
    _check_complete(model)
    layers = model.get_base_model().named_modules()
    names = [name.removesuffix(".base_layer") for name, module in layers if isinstance(module, NF4Linear)]
    with whole_folder(folder) as part:
        model.save_pretrained(part, save_embedding_layers=False)
        save_file(_unshared(_buffers(model)), part / BUFFERS, {"format": "pt", "nf4": json.dumps(names)})


def load_adapter(model: nn.Module, folder: str | Path, *, trainable: bool = False, fuse: bool = True) -> PeftModel:
    """Put the adapter of ``folder`` on ``model``, in place, with its head and buffers; strictly.

    Args:
        model: The base, with the weights that it had when the adapter was added to it.
        folder: What :func:`save_adapter` wrote.
        trainable: Whether adapter and head go on learning; otherwise the model is in evaluation mode.
        fuse: As for :func:`add_adapter`.

    Raises:
        InputError: If a file is missing or torn, or its names or shapes are not the model's.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    if isinstance(model, PeftModel):
        raise InputError("load_adapter: model must not have an adapter already")
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise InputError(f"no such adapter file: {path / CONFIG}")
    try:
        config = PeftConfig.from_pretrained(path)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path / CONFIG} is torn or not an adapter's ({type(error).__name__})") from error
    weights, buffers = load_checkpoint(path / WEIGHTS), load_checkpoint(path / BUFFERS)
    with safe_open(path / BUFFERS, "pt") as file:
        quantised = json.loads((file.metadata() or {}).get("nf4", "[]"))
    fresh = [name for name in quantised if not isinstance(_submodule(model, name, path), NF4Linear)]
    if fresh:
        quantise(model, fresh)
    config.inference_mode = not trainable
    try:
        adapted = wrap(model, config, fuse)
    except InputError as error:
        raise InputError(f"{path / CONFIG} does not fit the model: {error}") from error
    _check_fit(path / WEIGHTS, weights, get_peft_model_state_dict(adapted, save_embedding_layers=False))
    own = _buffers(adapted)
    _check_fit(path / BUFFERS, buffers, own)
    set_peft_model_state_dict(adapted, weights)
    for name, buffer in own.items():
        buffer.copy_(buffers[name])
    if not trainable:
        adapted.requires_grad_(False)  # peft leaves prompts out
    return adapted.train(trainable)


def export(model: nn.Module, folder: str | Path, *, processor: Any = None) -> None:
    """Write a plain model to ``folder``: weights and buffers as safetensors, an adapter merged, no 4-bit layers.

    A model of transformers is written by its ``save_pretrained``, and ``from_pretrained`` reads it. Of any other
    there is ``model.safetensors``, which :func:`load_weights` reads, with each name of a tied tensor.

    Args:
        model: Any model, with an adapter or without; it stays as it is.
        folder: Absent, empty, or of the same export before, which is replaced in one step.
        processor: A tokenizer or the like to write as well, by its ``save_pretrained``.

    Raises:
        InputError: As :func:`merge_adapter` does; or if the folder cannot be written or holds other files.
    """
    from peft import PeftModel

    plain = merge_adapter(model) if isinstance(model, PeftModel) else dequantised(model)
    with whole_folder(folder) as part:
        if hasattr(plain, "save_pretrained"):
            with quiet_transformers():
                plain.save_pretrained(part)
        else:
            save_file(_unshared(plain.state_dict()), part / "model.safetensors", {"format": "pt"})
        if processor is not None:
            processor.save_pretrained(part)


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Give a folder to write to, which takes the place of ``folder`` when all went well, and goes otherwise.

    Raises:
        InputError: If ``folder`` is a file, cannot be written, or holds something that the new one does not.
    """
    path = Path(folder).resolve()
    part, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        part.mkdir(parents=True)
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
        if path.exists():
            stray = sorted({entry.name for entry in path.iterdir()} - {entry.name for entry in part.iterdir()})
            if stray:
                raise InputError(f"{folder} holds other files, such as {stray[0]!r}; choose a folder of its own")
            path.rename(old)
        try:
            part.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror or one_line(error)}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict has; those of quantised weights are no part of it."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous, none in the memory of another."""
    result, seen = {}, set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        result[name] = (tensor.clone() if storage in seen else tensor).contiguous()
        seen.add(storage)
    return result


def _check_complete(model: PeftModel) -> None:
    """Raise if a parameter learns that the adapter's files leave out."""
    from peft import get_peft_model_state_dict

    saved = {t.data_ptr() for t in get_peft_model_state_dict(model, save_embedding_layers=False).values()}
    lost = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.data_ptr() not in saved and not name.startswith("prompt_encoder.")
    ]
    if lost:
        raise InputError(
            f"save_adapter: {len(lost)} trainable parameters, such as {lost[0]!r}, are not the adapter's and "
            "would be lost; name their module as head in add_adapter"
        )


def _check_fit(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    def shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | str:
        return tuple(tensors[name].shape) if name in tensors else "none"

    names = sorted(found.keys() | expected.keys())
    odd = [name for name in names if shape(found, name) != shape(expected, name)]
    if odd:
        detail = f"such as {odd[0]}: {shape(found, odd[0])} for {shape(expected, odd[0])}"
        raise InputError(f"{path} does not fit the model: {len(odd)} of {len(names)} tensors, {detail}")


def _submodule(model: nn.Module, name: str, path: Path) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise InputError(f"{path / BUFFERS} does not fit the model: {one_line(error)}") from error
