"""Adapters: peft's, on bptools' ops, with what peft lets pass in silence refused or done.

peft matches modules by the ends of their names, leaves a fresh head to chance, adds an update to a weight that
another module shares, and swaps the weights of attention in and out at every forward pass, which moves them.
Here the layers that are adapted are chosen one by one, and what would not come back from a file, or not merge, is
an error. Files are in `bptools.finetune.export`.
"""

from __future__ import annotations

import copy
import math
import re
import sys
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, get_args

from torch import nn

from bptools.functional._checks import is_int
from bptools.nn import NF4Linear, revert, to_nf4
from bptools.nn._convert import change_classes

from .errors import InputError, one_line, suggestion

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

Kind = Literal["lora", "dora", "qlora", "prompt", "prefix"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


@dataclass(frozen=True)
class Adapter:
    """What is trained beside a frozen model.

    Attributes:
        kind: ``"lora"`` adds a low-rank matrix to each weight (Hu et al. 2021); ``"dora"`` learns the weights'
            lengths too (Liu et al. 2024); ``"qlora"`` keeps the frozen linear layers in 4 bits (Dettmers et al.
            2023); ``"prompt"`` puts learned vectors before the input (Lester et al. 2021), and ``"prefix"``
            before the keys and values of every layer (Li and Liang 2021).
        rank: Rank of the low-rank matrices.
        alpha: They are scaled by ``alpha / rank``.
        dropout: Probability with which an element of their input is zeroed in training.
        targets: Layers to adapt: names, ends of names (``"q_proj"``) or patterns (``"layer4.*"``). ``None`` for
            every linear layer, convolution and attention that can be, but the head.
        tokens: Vectors of a prompt or prefix.

    Raises:
        InputError: If a value cannot be.
    """

    kind: Kind = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    tokens: int = 20

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            near = suggestion(str(self.kind), get_args(Kind))
            raise InputError(f"Adapter: kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}{near}")
        for name in ("rank", "tokens"):
            value = getattr(self, name)
            if not is_int(value) or value < 1:
                raise InputError(f"Adapter: {name} must be an int of at least 1, got {value!r}")
        if not 0 < self.alpha < math.inf:
            raise InputError(f"Adapter: alpha must be more than 0 and finite, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"Adapter: dropout must be from 0 to below 1, got {self.dropout!r}")
        if isinstance(self.targets, str) or self.targets == ():
            raise InputError(f"Adapter: targets must be None or a tuple of names, got {self.targets!r}")


def add_adapter(
    model: nn.Module, adapter: Adapter, *, head: str | Sequence[str] | None = None, fuse: bool = True
) -> PeftModel:
    """Freeze a model and put an adapter on it, in place; only the adapter and the head learn.

    The adapter starts from ``torch.manual_seed``, and all but prompts and prefixes as if it were not there. With
    ``"qlora"`` the linear layers but the head are quantised first, whatever ``targets`` are.

    Args:
        model: Any module; for prompts and prefixes one of transformers with a task.
        adapter: What to add.
        head: Names of modules that learn as a whole and are saved with the adapter: a fresh head, as peft keeps
            nothing of the model itself. A prompt of a classifier takes its ``classifier`` or ``score`` anyway.
        fuse: Let linear LoRA layers run our op, as :func:`fuse_lora` does.

    Returns:
        The `peft.PeftModel` around ``model``.

    Raises:
        InputError: If the head or a target is not there, shares a weight with another module, or cannot be
            adapted so.
    """
    from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
    from transformers.pytorch_utils import Conv1D

    if isinstance(model, PeftModel):
        raise InputError("add_adapter: model must not have an adapter already; merge it first")
    heads = (head,) if isinstance(head, str) else tuple(head or ())
    _check_heads(model, heads)
    saved = list(heads) or None
    if adapter.kind in ("prompt", "prefix"):
        task = _task(model, adapter.kind)
        options = {"task_type": task, "num_virtual_tokens": adapter.tokens, "modules_to_save": saved}
        if adapter.kind == "prefix":
            return wrap(model, PrefixTuningConfig(**options), fuse=False)
        sizes = model.config
        config = PromptTuningConfig(
            **options,
            token_dim=sizes.hidden_size,
            num_layers=sizes.num_hidden_layers,
            num_attention_heads=sizes.num_attention_heads,
        )
        return wrap(model, config, fuse=False)
    layers = _layers(model, adapter.kind, heads)
    targets = _targets(model, adapter, layers, heads)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules="|".join(map(re.escape, targets)),  # peft takes a list for ends of names
        modules_to_save=saved,
        use_dora=adapter.kind == "dora",
        fan_in_fan_out=all(isinstance(layers[name], Conv1D) for name in targets),
    )
    if adapter.kind == "qlora":
        quantise(model, _default(model, layers, heads))
    return wrap(model, config, fuse)


def merge_adapter(model: PeftModel) -> nn.Module:
    """Return the model with its adapter added to its weights: a plain one, of the classes that it had.

    The head is the trained one, buffers are the model's, and 4-bit layers become ordinary ones of the dtype that
    they were quantised from. In evaluation mode it computes what ``model`` does, up to the rounding of the sums.
    ``model`` stays as it is, so both are in memory; ``del model`` frees it.

    Raises:
        InputError: If ``model`` has no adapter, or one that is no change of weights: a prompt or prefix.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise InputError(f"merge_adapter: model must have an adapter, got {type(model).__name__}")
    if model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type.value.lower().replace("_", " ")
        raise InputError(f"merge_adapter: {kind} is an input, which no weight can take in; use save_adapter")
    return dequantised(model).merge_and_unload().requires_grad_(True)


def dequantised(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with ordinary linear layers in the place of 4-bit ones."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            layer = module.dequantize()
            revert(layer)
            model.set_submodule(name, layer)
    return model


def tied_parameters(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the names of each parameter that has several: a language model's head and its embedding, often."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [tuple(same) for same in names.values() if len(same) > 1]


def trainable_share(model: nn.Module) -> tuple[int, int]:
    """Return how many elements of parameters are trainable, and how many there are, 4-bit ones each counted."""
    packed = {id(m.weight): m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear)}
    sizes = [(packed.get(id(p), p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


def quantise(model: nn.Module, names: Iterable[str]) -> None:
    """Put `NF4Linear` in the place of the linear layers ``names``, in place.

    Raises:
        InputError: If there is none, or of a dtype that cannot be.
    """
    names = set(names)
    skip = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in names]
    try:
        to_nf4(model, skip)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"add_adapter: qlora cannot quantise {type(model).__name__}: {one_line(error)}"
        ) from error


def wrap(model: nn.Module, config: PeftConfig, fuse: bool) -> PeftModel:
    """Return peft's model for ``config``, repaired: every adapted layer is called, and no frozen weight moves."""
    from peft import get_peft_model
    from peft.tuners.lora.layer import Linear, MultiheadAttention

    from ._fused_lora import FusedMultiheadAttention

    for module in model.modules():
        # Both have a path for evaluation that reads the weights of their layers instead of calling them.
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            adapted = get_peft_model(model, config)
    except ValueError as error:
        reason = textwrap.shorten(one_line(error), 200)
        raise InputError(f"peft refuses {type(model).__name__}: {reason}") from error
    change_classes(adapted, "add_adapter", {MultiheadAttention: FusedMultiheadAttention})
    if fuse and any(type(module) is Linear for module in adapted.modules()):
        fuse_lora(adapted)
    return adapted


def fuse_lora(model: nn.Module) -> list[str]:
    """Let every linear LoRA layer of a peft model run `bptools.functional.lora_linear`; in place.

    The op keeps the layer's input for backward, and nothing else of its size; peft's own forward keeps the mask of
    the dropout and its result, and the input of B, too. Where a layer has several adapters active, is merged or
    disabled, or is more than low-rank matrices (DoRA, biases of the adapter), it runs peft's forward as before. A
    layer stays the object that it is: parameters, `state_dict`, `save_pretrained` and `merge_and_unload` too.

    Args:
        model: What ``peft.get_peft_model`` returns, or a model that holds such layers.

    Returns:
        The names of the layers that were changed.

    Raises:
        InputError: If there is no linear LoRA layer in the model.
    """
    from peft.tuners.lora.layer import Linear

    from ._fused_lora import FusedLinear

    if not any(isinstance(module, Linear) for module in model.modules()):
        raise InputError("fuse_lora: model must hold peft's LoRA layers of linear ones, got none")
    return change_classes(model, "fuse_lora", {Linear: FusedLinear})


def unfuse_lora(model: nn.Module) -> list[str]:
    """Undo :func:`fuse_lora`, and return the names of the layers that were changed back."""
    from peft.tuners.lora.layer import Linear

    from ._fused_lora import FusedLinear

    return change_classes(model, "unfuse_lora", {FusedLinear: Linear})


def _check_heads(model: nn.Module, heads: Sequence[str]) -> None:
    """Raise unless each head is there, shares no tensor, and peft, which goes by ends of names, takes no other."""
    modules = dict(model.named_modules())
    for head in heads:
        if head not in modules or not head:
            near = suggestion(head, filter(None, modules))
            raise InputError(f"add_adapter: head {head!r} is no module of {type(model).__name__}{near}")
    for name, module in modules.items():
        also = name not in heads and any(name.endswith(head) for head in heads)
        if also and any(True for _ in module.parameters()):
            raise InputError(f"add_adapter: peft would train {name!r} with the head {heads}; name it in head too")
    _check_untied(model, heads)


def _check_untied(model: nn.Module, names: Iterable[str]) -> None:
    """Raise if a module would learn a tensor that another name keeps: they diverge, or both change on merging."""
    for tied in tied_parameters(model):
        for name in names:
            mine = [key for key in tied if key.startswith(f"{name}.")]
            if mine:
                other = next((key for key in tied if key not in mine), mine[-1])
                raise InputError(
                    f"add_adapter: {name!r} cannot be adapted, as {mine[0]!r} and {other!r} are one tensor; "
                    "leave it out, or untie them first"
                )


def _task(model: nn.Module, kind: str) -> str:
    """peft's name for the task of a model of transformers."""
    from transformers import PreTrainedModel

    name = type(model).__name__
    task = next((task for end, task in TASKS.items() if name.endswith(end)), None)
    if not isinstance(model, PreTrainedModel) or task is None:
        raise InputError(f"add_adapter: {kind} takes a model of transformers with a task, got {name}; use lora")
    if kind == "prefix" and task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise InputError(f"add_adapter: prefix takes a model that generates text, got {name}; use prompt or lora")
    return task


def _reads_weights(module: nn.Module) -> bool:
    """Whether ``module`` reads the weights of its linear layers, and never calls the layers."""
    swin = sys.modules.get("torchvision.models.swin_transformer")  # absent where no model of it can be
    return isinstance(module, (nn.MultiheadAttention, *([swin.ShiftedWindowAttention] if swin else [])))


def _layers(model: nn.Module, kind: str, heads: Sequence[str]) -> dict[str, nn.Module]:
    """The layers outside of heads that peft adapts exactly, by name."""
    from transformers.pytorch_utils import Conv1D

    around = [name for name, module in model.named_modules() if _reads_weights(module)]
    out = tuple(f"{name}." for name in (*around, *heads))
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, CONVOLUTIONS):
            # peft's has neither of the last two, and cannot merge the first.
            fits = module.groups == 1 and module.padding_mode == "zeros" and set(module.dilation) == {1}
        elif isinstance(module, nn.MultiheadAttention):
            fits = kind != "dora" and module._qkv_same_embed_dim
        else:
            fits = isinstance(module, (nn.Linear, Conv1D))
        if fits and name not in heads and not name.startswith(out):
            layers[name] = module
    return layers


def _default(model: nn.Module, layers: dict[str, nn.Module], heads: Sequence[str]) -> list[str]:
    """The layers but the head, the output of a language model, and what shares a tensor."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kept = {name for name, module in layers.items() if module is output}
    if not heads and not kept:
        kept = set([name for name, module in layers.items() if isinstance(module, nn.Linear)][-1:])
    shared = [name for tied in tied_parameters(model) for name in tied]
    kept |= {layer for layer in layers for name in shared if name.startswith(f"{layer}.")}
    return [name for name in layers if name not in kept]


def _targets(model: nn.Module, adapter: Adapter, layers: dict[str, nn.Module], heads: Sequence[str]) -> list[str]:
    if adapter.targets is None:
        targets = _default(model, layers, heads)
    else:
        chosen = set()
        for target in adapter.targets:
            found = {name for name in layers if fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")}
            if not found:
                what = f"no layer that takes {adapter.kind}{suggestion(target, layers)}"
                raise InputError(f"add_adapter: targets: {target!r} matches {what}")
            chosen |= found
        targets = [name for name in layers if name in chosen]
        _check_untied(model, targets)
    if not targets:
        what = f"no layer beside its head that takes {adapter.kind}"
        raise InputError(f"add_adapter: {type(model).__name__} has {what}")
    attention = [name for name in targets if isinstance(layers[name], nn.MultiheadAttention)]
    if attention and adapter.dropout:
        raise InputError(
            f"add_adapter: dropout must be 0, as peft has none in attention such as {attention[0]!r}, "
            f"got {adapter.dropout}"
        )
    return targets
