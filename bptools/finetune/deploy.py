"""Models in files that run without this package: torch.export's programs and ONNX, loaded back and compared.

bptools' modules export as torch's own do: without gradients their ops are plain ATen ones, and these are what the
files hold.
"""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import save_json
from .errors import InputError, one_line
from .export import whole_folder

LIMITS = {"torch": 1e-5, "onnx": 1e-4}  # how far outputs may be from the model's, in parts of their norm
FILES = {"torch": "model.pt2", "onnx": "model.onnx"}
NEEDED = ("onnx", "onnxscript", "onnxruntime")


def check_export(kind: str) -> None:
    """Raise an :class:`InputError` if what the export of ``kind`` takes is not installed."""
    missing = [name for name in NEEDED if not importlib.util.find_spec(name)] if kind in ("onnx", "both") else []
    if missing:
        raise InputError(
            f"--export {kind}: takes {', '.join(missing)}; get it by: pip install {' '.join(missing)}"
        )


def _save_program(model: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _save_onnx(model: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    from onnxruntime import InferenceSession

    names = {"input_names": ["input"], "output_names": ["logits"]}
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    program.save(path)
    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])


SAVE = {"torch": _save_program, "onnx": _save_onnx}


@torch.no_grad()
def deploy(
    model: nn.Module, inputs: Tensor, folder: str | Path, kind: str, about: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Write ``model`` in files that take batches of any size, load these, and compare outputs with the model's.

    Args:
        model: Maps inputs ``(n, ...)`` to logits ``(n, classes)``, on the CPU; it is put in evaluation mode.
        inputs: Three or more of the inputs that it is for.
        folder: Absent, empty, or of the same export before, which is replaced in one step. It gets ``model.pt2``
            for torch.export, ``model.onnx``, and ``preprocessing.json``.
        kind: ``"torch"``, ``"onnx"`` or ``"both"``.
        about: Plain values for ``preprocessing.json``: how an input is made of a file, and what outputs mean.

    Returns:
        By file, the largest difference over batches of 1 and all of ``inputs``, in parts of the outputs' norm.

    Raises:
        InputError: If the model cannot be exported, its files differ from it, or the folder cannot be written.
    """
    model.eval()
    about = {"input": ["batch", *inputs.shape[1:]], "dtype": "float32", **(about or {})}
    differences = {}
    with whole_folder(folder) as part:
        for one in SAVE if kind == "both" else (kind,):
            try:
                loaded = SAVE[one](model, inputs[:2], part / FILES[one])
            except Exception as error:  # of many kinds, from deep inside
                why = f"{type(error).__name__}: {one_line(error)}"
                raise InputError(f"--export {one}: {type(model).__name__} cannot be exported: {why}") from error
            apart = max(_difference(loaded(some), model(some)) for some in (inputs[:1], inputs))
            if not apart <= LIMITS[one]:
                raise InputError(
                    f"--export {one}: {FILES[one]} differs from the model by {apart:.0e} of its outputs' norm"
                )
            differences[FILES[one]] = apart
        save_json(part / "preprocessing.json", about)
    return differences


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny))
