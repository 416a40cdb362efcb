"""Models by name, with made-up weights and inputs, to measure on: nothing is downloaded.

- `torchvision:NAME[,key=value...]`: what classifies or segments pictures or clips; the settings go to
  `torchvision.models.get_model`. The size is the side of the picture, 224 by default (clips: 16 frames of 112).
- `transformers:TYPE[,key=value...]` and `transformers:CONFIG.json[,key=value...]`: the configuration of that model
  type or of that file, with some entries changed. The head is for what the type is mostly trained for: the next
  token (gpt2, llama), a sequence from a sequence (t5), the class of a sequence (bert) or of a picture (vit). The
  size is the length of the sequence, 128 by default, or the side of the picture. `use_cache` is off, as when
  training.
- `timm:NAME[,key=value...]`: what `timm.create_model` knows, if timm is installed.
- `package.module:callable[,key=value...]`: `callable(batch, size, device, key=value...)` returns a module, and its
  input or a tuple of its inputs; `size` is None unless one was asked for. What the module returns is the loss if
  it is a scalar, otherwise the mean of its squares is.
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FORMS = "torchvision:NAME, transformers:TYPE, transformers:CONFIG.json, timm:NAME or package.module:callable"


@dataclass
class Loaded:
    """A model in training mode, and something to train it on.

    Attributes:
        name: as it was asked for.
        model: the model.
        inputs: every tensor that the loss is made of beside the model's own.
        objective: the loss of a model that is called like this one.
    """

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    objective: Callable[[Callable[..., Any]], Tensor]

    def loss(self, call: Callable[..., Any] | None = None) -> Tensor:
        """One forward pass: a scalar.

        Args:
            call: what to call in place of the model, such as the model compiled.
        """
        return self.objective(self.model if call is None else call)


def load(
    spec: str, batch: int = 8, size: int | None = None, seed: int = 0, device: str | torch.device = "cpu"
) -> Loaded:
    """Make a model, inputs and targets from a seed. The caller's random numbers are left alone.

    Args:
        spec: see the top of this page.
        batch: how many pictures or sequences.
        size: side of a picture, or length of a sequence.
        seed: of weights, inputs and targets.
        device: where they go.

    Raises:
        ValueError: if there is no such model, or it cannot be measured without knowing more of it.
    """
    for name, value in (("batch", batch), ("size", size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    name, *options = re.split(r",(?=[A-Za-z_]\w*=)", spec)
    family, colon, name = name.partition(":")
    if not colon or not family or not name:
        raise ValueError(f"a model is {FORMS}, got {spec!r}{_meant(spec, _torchvision_names(), 'torchvision:')}")
    settings = {key: _value(value) for key, value in (option.split("=", 1) for option in options)}
    make = FAMILIES.get(family, _own)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        loaded = make(spec, name, settings, batch, size, torch.device(device))
    loaded.model.train()
    return loaded


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _meant(got: str, known: Iterable[str], prefix: str = "") -> str:
    """` (did you mean ...?)`, or nothing if nothing is near."""
    near = difflib.get_close_matches(got, list(known), n=1)
    return f" (did you mean {prefix + near[0]!r}?)" if near else ""


def _built(spec: str, make: Callable[[], nn.Module]) -> nn.Module:
    """A model whose settings may be wrong."""
    try:
        return make()
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{spec}: {error}") from error


# torchvision ---------------------------------------------------------------------------------------------------


def _torchvision_names() -> list[str]:
    import torchvision

    return torchvision.models.list_models()


def _torchvision(
    spec: str, name: str, settings: dict[str, Any], batch: int, size: int | None, device: torch.device
) -> Loaded:
    import torchvision.models as zoo

    if name not in _torchvision_names():
        raise ValueError(f"torchvision has no model {name!r}{_meant(name, _torchvision_names())}")
    of = {kind: name in zoo.list_models(getattr(zoo, kind)) for kind in ("segmentation", "video", "quantization")}
    if of["quantization"] or name in (*zoo.list_models(zoo.detection), *zoo.list_models(zoo.optical_flow)):
        raise ValueError(
            f"torchvision:{name} is not for classifying or segmenting; write a callable(batch, size, device) that "
            "returns it and its inputs, and name it as package.module:callable"
        )
    settings = {"weights": None} | settings
    if of["segmentation"]:
        settings = {"weights_backbone": None} | settings
    if name in ("googlenet", "inception_v3"):
        settings = {"init_weights": False} | settings  # theirs takes minutes
    if name.startswith("vit_"):
        settings = {"image_size": size or 224} | settings
    elif name.startswith("maxvit"):
        settings = {"input_size": (size or 224,) * 2} | settings
    model = _built(spec, lambda: zoo.get_model(name, **settings)).to(device)
    side = size or (112 if of["video"] and not name.startswith("mvit") else 224)
    x = torch.randn(batch, 3, *([16] if of["video"] else []), side, side).to(device)
    classes = settings.get("num_classes") or (21 if of["segmentation"] else 400 if of["video"] else 1000)
    y = torch.randint(classes, (batch, side, side) if of["segmentation"] else (batch,)).to(device)
    return Loaded(spec, model, (x, y), lambda call: _classified(call(x), y))


def _classified(output: Any, y: Tensor) -> Tensor:
    """Cross entropy, of the auxiliary heads too, by the weights that they are trained with."""
    if isinstance(output, dict):  # segmentation
        return F.cross_entropy(output["out"], y) + (
            0.5 * F.cross_entropy(output["aux"], y) if "aux" in output else 0
        )
    if not isinstance(output, tuple):
        return F.cross_entropy(output, y)
    first, *others = (logits for logits in output if logits is not None)
    weight = 0.4 if len(others) == 1 else 0.3  # inception_v3, googlenet
    return F.cross_entropy(first, y) + sum(weight * F.cross_entropy(logits, y) for logits in others)


# transformers --------------------------------------------------------------------------------------------------


def _transformers(
    spec: str, name: str, settings: dict[str, Any], batch: int, size: int | None, device: torch.device
) -> Loaded:
    import transformers
    from transformers.models.auto import configuration_auto, modeling_auto

    entries: dict[str, Any] = {}
    kind = name
    if name.endswith(".json"):
        try:
            entries = json.loads(Path(name).read_text(encoding="utf-8"))
            kind = entries.pop("model_type")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{spec}: expected a configuration with a model_type in {name}, got {error!r}"
            ) from error
    known = configuration_auto.CONFIG_MAPPING_NAMES
    if kind not in known:
        raise ValueError(f"transformers has no model type {kind!r}{_meant(kind, known)}")
    plain = transformers.AutoConfig.for_model(kind)
    for key in settings:
        if not hasattr(plain, key) and key not in ("attn_implementation", "dtype"):
            keys = {*plain.to_dict(), *plain.attribute_map}
            raise ValueError(f"the configuration of {kind} has no {key!r}{_meant(key, keys)}")

    def has(head: str) -> bool:
        return kind in getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES")

    if has("IMAGE_CLASSIFICATION"):
        head, classes = "ImageClassification", True
        if size is not None and hasattr(plain, "image_size"):
            settings = {"image_size": size} | settings
    elif has("SEQ_TO_SEQ_CAUSAL_LM"):
        head, classes = "Seq2SeqLM", False
    elif has("CAUSAL_LM") and not has("MASKED_LM"):
        head, classes = "CausalLM", False
    elif has("SEQUENCE_CLASSIFICATION"):
        head, classes = "SequenceClassification", True
    else:
        raise ValueError(
            f"transformers:{kind} is neither a language model nor a classifier of text or pictures; write a "
            "callable(batch, size, device) that returns it and its inputs, and name it as package.module:callable"
        )
    config = transformers.AutoConfig.for_model(kind, **{**entries, **settings})
    if hasattr(config, "use_cache") and "use_cache" not in settings:
        config.use_cache = False
    config.architectures = config.architectures or []  # None is more than AutoModel can bear
    if head == "Seq2SeqLM" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id or 0
    auto = getattr(transformers, f"AutoModelFor{head}")
    model: Any = _built(spec, lambda: auto.from_config(config)).to(device)
    given = _transformers_inputs(spec, model, batch, size)
    if classes:
        config.problem_type = "single_label_classification"
        given["labels"] = torch.randint(config.num_labels, (batch,))
    else:
        given["labels"] = given["input_ids"]
    given = {key: t.to(device) for key, t in given.items()}
    return Loaded(spec, model, tuple(given.values()), lambda call: call(**given).loss)


def _transformers_inputs(spec: str, model: Any, batch: int, size: int | None) -> dict[str, Tensor]:
    config = model.config
    if model.main_input_name == "pixel_values":
        side = getattr(config, "image_size", None) or size or 224
        height, width = (side, side) if isinstance(side, int) else side
        return {"pixel_values": torch.randn(batch, getattr(config, "num_channels", 3), height, width)}
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{spec}: expected a model of input_ids or pixel_values, got one of {model.main_input_name}"
        )
    length, most = size or 128, getattr(config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise ValueError(f"{spec}: size must be at most its max_position_embeddings, {most}, got {length}")
    return {"input_ids": torch.randint(config.vocab_size, (batch, length))}


# timm, and anybody's -------------------------------------------------------------------------------------------


def _timm(
    spec: str, name: str, settings: dict[str, Any], batch: int, size: int | None, device: torch.device
) -> Loaded:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"{spec}: timm cannot be imported ({error}); pip install timm") from error
    if name.split(".")[0] not in timm.list_models():
        raise ValueError(f"timm has no model {name!r}{_meant(name, timm.list_models())}")
    model: Any = _built(spec, lambda: timm.create_model(name, pretrained=False, **settings)).to(device)
    channels, *sides = model.default_cfg["input_size"]
    x = torch.randn(batch, channels, *([size, size] if size else sides)).to(device)
    y = torch.randint(model.num_classes, (batch,)).to(device)
    return Loaded(spec, model, (x, y), lambda call: _classified(call(x), y))


def _own(
    spec: str, name: str, settings: dict[str, Any], batch: int, size: int | None, device: torch.device
) -> Loaded:
    family = spec.partition(":")[0]
    meant = _meant(family, FAMILIES)
    try:
        found: Any = importlib.import_module(family)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"a model is {FORMS}, got {spec!r}{meant}: {error}") from error
    if not callable(found):
        raise ValueError(f"{spec}: expected a callable(batch, size, device), got {type(found).__name__}")
    made = found(batch, size, device, **settings)
    model, *inputs = made if isinstance(made, tuple) else (made,)
    if len(inputs) == 1 and isinstance(inputs[0], tuple | list):
        inputs = list(inputs[0])
    if not isinstance(model, nn.Module) or not all(isinstance(t, Tensor) for t in inputs):
        got = ", ".join(type(a).__name__ for a in (model, *inputs))
        raise ValueError(f"{spec}: expected a module and its inputs, got {got}")
    return Loaded(spec, model.to(device), tuple(inputs), lambda call: _scalar(spec, call(*inputs)))


def _scalar(spec: str, output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(f"{spec}: expected the module to return a tensor, got {type(output).__name__}")
    return output if output.dim() == 0 else output.float().square().mean()


FAMILIES = {"torchvision": _torchvision, "transformers": _transformers, "timm": _timm}
