"""Classifiers: a small one from a namespace of layers, and any of torchvision's with a head of our size."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models
from torchvision.models.vision_transformer import interpolate_embeddings

from bptools.optim import parameter_depths

from .checkpoint import load_weights
from .errors import InputError, one_line, suggestion
from .phases import match_parameters, parse_phases

WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


class Classifier(NamedTuple):
    """A model, the name of its last layer, and whether that layer holds fresh weights."""

    model: nn.Module
    head: str
    new_head: bool


def small_cnn(layers: ModuleType, classes: int, *, channels: int = 1, width: int = 32) -> nn.Sequential:
    """Return a convolutional network of three blocks and a linear head.

    Args:
        layers: Namespace of the layers, ``bptools.nn`` or ``torch.nn``; the state dict is the same.
        classes: Outputs.
        channels: Input channels; inputs are ``(n, channels, h, w)`` with ``h`` and ``w`` at least 4.
        width: Channels of the first block; the others have twice as many.
    """

    def block(c_in: int, c_out: int) -> list[nn.Module]:
        # The batch norm that follows would take a bias away again.
        return [
            layers.Conv2d(c_in, c_out, 3, padding=1, bias=False),
            layers.BatchNorm2d(c_out),
            layers.ReLU(),
        ]

    return nn.Sequential(
        nn.Sequential(*block(channels, width)),
        nn.Sequential(*block(width, 2 * width), layers.MaxPool2d(2)),
        nn.Sequential(*block(2 * width, 2 * width), layers.AdaptiveAvgPool2d(2)),
        nn.Sequential(nn.Flatten(), layers.Dropout(0.2), layers.Linear(8 * width, classes)),
    )


def small_classifier(layers: ModuleType, classes: int, *, grey: bool, weights: str | None = None) -> Classifier:
    """Return :func:`small_cnn` for grey images of 8 pixels from 0 to 1, or coloured ones of 32 pixels.

    Args:
        layers: Namespace of the layers.
        classes: Outputs of the head.
        grey: Whether images have one channel.
        weights: A weights file, or ``None``.

    Raises:
        InputError: If ``weights`` is no file or does not fit.
    """
    if weights == "DEFAULT":
        raise InputError("--weights DEFAULT: the small network has no published weights; name a file, or None")
    channels = 1 if grey else 3
    model = small_cnn(layers, classes, channels=channels)
    head = find_head(model)
    kept = load_weights(model, weights, replaceable=[head]) if weights else [head]
    return Classifier(model, head, bool(kept))


def find_head(model: nn.Module) -> str:
    """Return the name of the last linear layer, or of the last convolution if there is no linear one.

    Raises:
        ValueError: If the model has neither.
    """
    for kind in (nn.Linear, nn.Conv2d):
        names = [name for name, module in model.named_modules() if isinstance(module, kind)]
        if names:
            return names[-1]
    raise ValueError(f"model: expected a linear or convolution layer to serve as head, got {type(model).__name__}")


def replace_head(model: nn.Module, name: str, classes: int) -> None:
    """Put a fresh layer with ``classes`` outputs, of the same kind and inputs, in place of the head ``name``."""
    old = model.get_submodule(name)
    bias = old.bias is not None
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, classes, bias, old.weight.device, old.weight.dtype)
    else:
        new = nn.Conv2d(
            old.in_channels, classes, old.kernel_size, old.stride, old.padding, bias=bias,
            device=old.weight.device, dtype=old.weight.dtype,
        )  # fmt: skip
    model.set_submodule(name, new)


def _published(name: str, weights: str | None) -> WeightsEnum | None:
    known = list_models(module=torchvision.models)
    if name not in known:
        raise InputError(f"--model {name!r} is not a torchvision classifier{suggestion(name, ['small', *known])}")
    choices = get_model_weights(name)
    if weights == "DEFAULT":
        return choices.DEFAULT
    if weights is None or Path(weights).suffix in WEIGHT_SUFFIXES or Path(weights).exists():
        return None
    if weights not in choices.__members__:
        names = dict.fromkeys(["DEFAULT", *choices.__members__])  # DEFAULT may be a member
        raise InputError(f"--weights {weights!r}: expected a file or one of {', '.join(names)}")
    return choices[weights]


def resolve_weights(name: str, weights: str | None) -> str | None:
    """Return ``weights``, with ``"auto"`` replaced by what the model ``name`` has: ``"DEFAULT"`` or ``None``."""
    if weights == "auto":
        return None if name == "small" else "DEFAULT"
    return weights


def input_format(name: str, weights: str | None = None) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Return the image size in pixels, and the channel means and deviations, that a model was trained with.

    Args:
        name: ``"small"`` or a name of ``torchvision.models``.
        weights: As for :func:`torchvision_classifier`; a file is taken to be as the default weights are.

    Raises:
        InputError: If the model or the weights are unknown.
    """
    if name == "small":
        return 32, (0.5,) * 3, (0.5,) * 3
    preset = (_published(name, weights) or get_model_weights(name).DEFAULT).transforms()
    return preset.crop_size[0], tuple(preset.mean), tuple(preset.std)


def _takes_one_size(name: str) -> bool:
    return name.startswith("vit_")  # as many position embeddings as patches


def _fit_positions(state: dict[str, Any], *, size: int, patch: int) -> dict[str, Any]:
    """Interpolate the position embeddings of a vision transformer to those of images of another size."""
    return interpolate_embeddings(size, patch, state) if "encoder.pos_embedding" in state else state


def torchvision_classifier(
    name: str, classes: int, weights: str | None = None, size: int | None = None
) -> Classifier:
    """Return a torchvision classifier whose head has ``classes`` outputs.

    Args:
        name: A name of ``torchvision.models``, such as ``"resnet50"``.
        classes: Outputs of the head.
        weights: ``None`` for random weights, the name of published ones (``"DEFAULT"``, ``"IMAGENET1K_V2"``),
            or a weights file. A file's head is kept where its shape fits.
        size: Height and width of the images in pixels. Vision transformers are made for it, and the position
            embeddings of their weights interpolated where these are for another; others do not look at it.

    Raises:
        InputError: If the model or the weights are unknown, cannot be downloaded, or do not fit.
    """
    published = _published(name, weights)
    options: dict[str, Any] = {}
    if size and _takes_one_size(name) and not published:
        options = {"image_size": size}
    if name in ("googlenet", "inception_v3"):  # the auxiliary heads are of no use here
        options = {"aux_logits": False} | ({} if published else {"init_weights": True})
    try:
        model = get_model(name, weights=published, **options)
    except OSError as error:  # URLError is one
        raise InputError(
            f"--weights {weights}: cannot download {published.url} ({error}); give a local file instead"
        ) from error
    except AssertionError as error:
        raise InputError(f"--size {size}: {name} takes multiples of its patch, the number in its name") from error
    if published and size and _takes_one_size(name) and size != model.image_size:
        known, model = model.state_dict(), torchvision_classifier(name, model.num_classes, size=size).model
        model.load_state_dict(_fit_positions(known, size=size, patch=model.patch_size))
    head = find_head(model)
    replace_head(model, head, classes)
    file = weights if weights and not published else None
    adapt = (
        partial(_fit_positions, size=model.image_size, patch=model.patch_size) if _takes_one_size(name) else None
    )
    kept = load_weights(model, file, replaceable=[head], adapt=adapt) if file else [head]
    return Classifier(model, head, bool(kept))


def check_model(net: Classifier, example: Tensor, specs: Sequence[str]) -> None:
    """Find out before training whether ``net`` can be trained; it stays as it was.

    Args:
        net: The classifier.
        example: One image, ``(1, c, h, w)``, on the device of the model.
        specs: Phases, as :func:`bptools.finetune.parse_phases` reads them.

    Raises:
        InputError: If a pattern matches nothing, or the model cannot take images of this size.
    """
    for phase in parse_phases(specs):
        match_parameters(net.model, phase.trainable, net.head)
    try:
        parameter_depths(net.model, example)
    except (AssertionError, RuntimeError, ValueError) as error:
        size = example.shape[-1]
        raise InputError(f"--size {size}: the model takes no such images: {one_line(error)}") from error
