"""Where to compute and how precisely: what ``"auto"`` stands for."""

import textwrap

import torch

from .errors import InputError

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_amp(amp: str, device: torch.device | str) -> str:
    """Return ``amp``, with ``"auto"`` replaced by what the device does fast.

    That is fp16 on CUDA; bf16 on a CPU for which oneDNN has bf16 kernels (AVX-512 and up; elsewhere torch falls
    back on loops that took five times float32's time here); and off on other CPUs.

    Raises:
        ValueError: If ``amp`` is not ``"auto"``, ``"bf16"``, ``"fp16"`` or ``"off"``.
    """
    if amp == "auto":
        if torch.device(device).type == "cuda":
            return "fp16"
        fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return "bf16" if fast else "off"
    if amp not in AMP_DTYPES:
        raise ValueError(f"amp: expected one of auto, bf16, fp16, off, got {amp!r}")
    return amp


def resolve_device(device: str) -> str:
    """Return ``device``, with ``"auto"`` replaced by CUDA where there is one and the CPU elsewhere.

    Raises:
        InputError: If there is no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # the meta device fails here
    except (RuntimeError, AssertionError) as error:
        sentence = str(error).splitlines()[0].split(". ")[0]
        raise InputError(f"--device {device}: {textwrap.shorten(sentence, 120)}") from error
    return device
