"""Encoders of text: any that transformers can load, a small one that needs no network, and how to pretrain it.

The small encoder learns as BERT does: some word pieces are hidden, and it says which they were. What is hidden
depends on seed, epoch and place alone, as with all of :class:`bptools.finetune.Augmented`.

Source: Devlin et al., arXiv 1810.04805 (15 % of the pieces; of these 80 % masked, 10 % exchanged, 10 % kept).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

import bptools.nn
from bptools.functional import cross_entropy
from bptools.optim import parameter_depths

from ._quiet import quiet_transformers
from .batches import Batch, count_tokens
from .checkpoint import load_checkpoint, load_json, save_json
from .data import Augmented, make_loader
from .distributed import Parallel
from .errors import InputError, one_line
from .export import export
from .job import Settings, make_run, make_stepper
from .phases import match_parameters, parse_phases, strategy_phases

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100
HEAD_WEIGHTS, HEAD_OPTIONS = "head.safetensors", "head.json"
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xlm-roberta-xl")


def load_pretrained(
    auto: Any, name: str, *, option: str = "--model", convert: bool = True, **config: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from a folder or the hub; no code of theirs is run.

    Args:
        auto: The class that says for which task, such as ``transformers.AutoModelForSequenceClassification``.
        name: A folder that ``save_pretrained`` wrote, or a name on the hub.
        option: What the user gave ``name`` with, for messages.
        convert: Whether the model's layers are to run bptools' ops (:func:`bptools.nn.convert`).
        config: Changes of the model's configuration, such as ``num_labels``.

    Returns:
        The model, in float32 on the CPU and in evaluation mode, and its tokenizer, which gives what the model
        takes, and pads with what ends a text if it has nothing else. A head or pooler that the weights do not
        have, or a head that they have in another size, is drawn at random.

    Raises:
        InputError: If there is no such folder or name, it is torn, has no tokenizer or no model for that task.
    """
    from transformers import AutoTokenizer

    folder = Path(name)
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError(f"{option} {name}: no such folder")
    if folder.exists() and not (folder / "config.json").is_file():
        raise InputError(
            f"{option} {name}: expected a folder that save_pretrained wrote, but it has no config.json"
        )
    options = {"ignore_mismatched_sizes": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        with quiet_transformers():
            model, info = auto.from_pretrained(name, **options, **config)
    except Exception as error:  # of the hub, of safetensors, of json, of transformers
        what = "" if folder.exists() else "; no folder has that name, and it cannot be had from the hub"
        raise InputError(f"{option} {name}: cannot be loaded: {one_line(error)}{what}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise InputError(f"{option} {name}: has no tokenizer that can be loaded: {one_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers 5 makes of a folder without its files
        raise InputError(f"{option} {name}: has no tokenizer that can be loaded: it has special tokens only")
    inner, prefix = {name for name, _ in model.base_model.named_parameters()}, f"{model.base_model_prefix}."
    wrong = [key for key in info["missing_keys"] if ".pooler." not in f".{key}"]
    wrong += [key for key, *_ in info["mismatched_keys"]]
    wrong = sorted(key for key in wrong if key.removeprefix(prefix) in inner)
    if wrong:
        what = f"{len(wrong)} of {len(inner)} tensors are missing or of another size, such as {wrong[0]}"
        raise InputError(f"{option} {name}: its weights are not those of a {type(model).__name__}: {what}")
    size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        raise InputError(f"{option} {name}: its tokenizer has {len(tokenizer)} pieces, its model {size}")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # by which a decoder's classifier finds the last token
    taken = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in taken]
    if convert:
        bptools.nn.convert(model)
    return model, tokenizer


def small_encoder(
    auto: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    width: int = 128,
    layers: int = 3,
    length: int = 128,
    **config: Any,
) -> PreTrainedModel:
    """Return a DistilBERT of small size with random weights, on bptools' ops.

    Args:
        auto: As for :func:`load_pretrained`.
        tokenizer: Says how many word pieces there are.
        width: Of the hidden states; a multiple of 32.
        layers: Of attention.
        length: The longest text, in word pieces.
        config: More of the configuration, such as ``num_labels``.
    """
    from transformers import DistilBertConfig

    options = {
        "dim": width, "hidden_dim": 4 * width, "n_layers": layers, "n_heads": width // 32,
        "vocab_size": len(tokenizer), "max_position_embeddings": length, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    model = auto.from_config(DistilBertConfig(**options | config))
    bptools.nn.convert(model)
    return model


class MaskedBlocks(Dataset):
    """Text in blocks of word pieces, of which some are hidden at random; wrap it in :class:`Augmented`.

    The texts follow each other, each within ``[CLS]`` and ``[SEP]``; what is left over at the end is dropped, but
    where it is all that there is.

    Args:
        texts: Lines or paragraphs.
        tokenizer: With a mask token.
        length: Word pieces in a block.
        share: Of the pieces that are to be guessed; special ones are never.

    Raises:
        InputError: If there are no texts.
    """

    def __init__(
        self, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int = 64, share: float = 0.15
    ):
        texts = list(texts)
        if not texts:
            raise InputError("texts: expected words to pretrain on, got none")
        ids = list(chain.from_iterable(tokenizer(texts, verbose=False)["input_ids"]))
        whole = max(1, len(ids) // length) * length
        self.blocks = torch.tensor(ids[:whole]).view(-1, min(length, len(ids)))  # (n, length)
        self.mask, self.size, self.share = tokenizer.mask_token_id, len(tokenizer), share
        self.special = torch.tensor(tokenizer.all_special_ids)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.blocks[index]  # (length,)
        chosen = (torch.rand(len(ids)) < self.share) & ~torch.isin(ids, self.special)
        kind, other = torch.rand(len(ids)), torch.randint(self.size, (len(ids),))
        shown = torch.where(chosen & (kind < 0.8), self.mask, torch.where(chosen & (kind >= 0.9), other, ids))
        return {"input_ids": shown, "labels": torch.where(chosen, ids, IGNORED)}


class Pad:
    """Makes a batch of tokenised samples: mappings of lists, of one length within a sample.

    Args:
        tokenizer: Says what is put at the end of the shorter ones.
        longest: Samples are cut to this length; ``None`` for no limit.

    Raises:
        InputError: If it says nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, longest: int | None = None):
        if tokenizer.pad_token_id is None:
            raise InputError("--model: its tokenizer has no token to pad with, and none that ends a text")
        self.ids, self.longest = tokenizer.pad_token_id, longest

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return tensors ``(n, length)`` by name, and ``(n,)`` of what are numbers."""
        length = max(len(sample["input_ids"]) for sample in samples)
        filling = {"input_ids": self.ids, "labels": IGNORED}
        batch = {}
        for name, first in samples[0].items():
            if isinstance(first, int):
                batch[name] = torch.tensor([sample[name] for sample in samples])
                continue
            rows = [[*s[name], *[filling.get(name, 0)] * (length - len(s[name]))][: self.longest] for s in samples]
            batch[name] = torch.tensor(rows)
        return batch


def labelled_loss(module: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy over a batch's ``"labels"``, those of -100 left out."""
    logits, labels = labelled_outputs(module, batch)
    return cross_entropy(logits.float(), labels, ignore_index=IGNORED, label_smoothing=smoothing)


def labelled_outputs(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits ``(n, classes)`` and labels ``(n,)``; those of tokens in one row each."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = module(**inputs).logits, batch["labels"]
    return logits.flatten(0, -2), labels.flatten()


@torch.inference_mode()
def masked_loss(model: nn.Module, loader: Iterable[Batch], device: torch.device | str) -> tuple[float, float]:
    """Return the mean loss per hidden word piece, and the share of them that is guessed, in percent."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for batch in loader:
        logits, labels = labelled_outputs(model, {name: value.to(device) for name, value in batch.items()})
        chosen = labels != IGNORED
        logits, labels = logits[chosen].float(), labels[chosen]
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    return loss / max(1, count), 100 * right / max(1, count)


class TextClassifier(nn.Module):
    """An encoder of transformers with a head of our own, in the manner of its classes with a head.

    Args:
        encoder: Returns ``last_hidden_state`` (n, length, width), as ``transformers.AutoModel`` gives.
        classes: Outputs.
        head: ``"linear"``, or ``"mlp"`` for two layers with a tanh between.
        pool: What the head sees of a text: the hidden state of the ``"first"`` piece, or the ``"mean"`` over all
            that are no padding.
        dropout: Before each layer of the head.
    """

    def __init__(
        self, encoder: PreTrainedModel, classes: int, head: str = "mlp", pool: str = "mean", dropout: float = 0.1
    ):
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # nothing reads what it gives
        width = encoder.config.hidden_size
        self.options = {"classes": classes, "head": head, "pool": pool, "dropout": dropout}
        self.encoder, self.pool = encoder, pool
        inner = [bptools.nn.Dropout(dropout), bptools.nn.Linear(width, width), bptools.nn.Tanh()]
        last = [bptools.nn.Dropout(dropout), bptools.nn.Linear(width, classes)]
        self.classifier = nn.Sequential(*(inner if head == "mlp" else []), *last)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Any:
        """Return ``logits`` (n, classes) of word pieces ``(n, length)``."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        if self.pool == "first":
            pooled = hidden[:, 0]
        else:
            weights = attention_mask.to(hidden.dtype).unsqueeze(-1)  # (n, length, 1)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        return SequenceClassifierOutput(logits=self.classifier(pooled))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the encoder, which ``AutoModel`` reads, and the head beside it, to an existing folder."""
        from safetensors.torch import save_file

        self.encoder.save_pretrained(folder)
        save_file(self.classifier.state_dict(), Path(folder, HEAD_WEIGHTS), {"format": "pt"})
        save_json(Path(folder, HEAD_OPTIONS), self.options)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TextClassifier:
        """Return what :meth:`save_pretrained` wrote, in evaluation mode.

        Raises:
            InputError: If a file is missing or torn, or the head is another model's.
        """
        from transformers import AutoModel

        encoder, _ = load_pretrained(AutoModel, str(folder), option="folder")
        options, weights = load_json(Path(folder, HEAD_OPTIONS)), load_checkpoint(Path(folder, HEAD_WEIGHTS))
        try:
            model = cls(encoder, **options)
            model.classifier.load_state_dict(weights)
        except (RuntimeError, TypeError) as error:
            raise InputError(f"{folder}: the head does not fit: {one_line(error)}") from error
        return model.eval()


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules with parameters that a model of transformers has on top of its encoder.

    The pooler of BERT's family is one of them, as pretraining seldom leaves one that is of use.
    """
    if isinstance(model, TextClassifier):
        return ("classifier",)
    base = model.base_model
    parts = {name: part for name, part in model.named_children() if part is not base}
    if isinstance(getattr(base, "pooler", None), nn.Module):
        parts[f"{model.base_model_prefix}.pooler"] = base.pooler
    return tuple(name for name, part in parts.items() if any(True for _ in part.parameters()))


def check_encoder(model: nn.Module, example: Mapping[str, Any], length: int, specs: Sequence[str]) -> None:
    """Find out before training whether a model can be trained; it stays as it was.

    Args:
        model: An encoder with a head.
        example: A batch of one text or more.
        length: Most word pieces of a text.
        specs: Phases, as :func:`bptools.finetune.parse_phases` reads them.

    Raises:
        InputError: If a pattern matches nothing, texts may be too long, or the model does not run.
    """
    config = model.encoder.config if isinstance(model, TextClassifier) else model.config
    most = getattr(config, "max_position_embeddings", None)
    if most and config.model_type in OFFSET_POSITIONS:
        most -= 2  # theirs begin after that of padding
    if most and 0 < most < length:
        raise InputError(f"--length {length}: the model takes {most} word pieces at most")
    for phase in parse_phases(specs):
        match_parameters(model, phase.trainable, head_names(model))
    try:
        parameter_depths(model, dict(example))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"--model: it does not run on a text: {one_line(error)}") from error
    if isinstance(model, TextClassifier) and model.pool == "first":
        _check_first_sees_all(model, example)


@torch.no_grad()
def _check_first_sees_all(model: nn.Module, example: Mapping[str, Any]) -> None:
    """Refuse a model whose first state does not depend on what comes later, as in one that reads to the right."""
    training = model.training
    ids, last = example["input_ids"].clone(), example["attention_mask"].sum(1) - 1
    rows = torch.arange(len(ids))
    ids[rows, last] = (ids[rows, last] + 1) % model.encoder.get_input_embeddings().num_embeddings
    states = [model.eval()(**{**example, "input_ids": some}).logits for some in (example["input_ids"], ids)]
    model.train(training)
    if torch.equal(*states):
        raise InputError("--pool first: the model's first state does not see the words after it; expected mean")


def pretrain_masked(
    cfg: Settings,
    parallel: Parallel,
    seed: int,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[Sequence[str]],
    held: Sequence[str],
    *,
    epochs: int,
    block: int,
    key: str,
    **options: Any,
) -> dict[str, Any]:
    """Teach a small encoder to guess hidden word pieces, and leave it in ``folder / "encoder"``.

    Args:
        cfg: The settings; ``batch_size`` is of blocks.
        parallel: This process among those that train.
        seed: Of the run.
        folder: Of the run.
        model: A masked language model, on ``parallel.device``.
        tokenizer: Its own.
        parts: Texts to learn from; each part is cut into blocks by itself.
        held: Texts that pick the epoch.
        epochs: Of all ``parts``.
        block: Word pieces in a block.
        key: What the share that is guessed, in percent, is called in the results.
        options: Of :class:`bptools.finetune.Run`, which say when to stop and who looks on.
    """

    def hidden(some: Sequence[Sequence[str]]) -> Augmented:
        return Augmented(ConcatDataset([MaskedBlocks(texts, tokenizer, block) for texts in some]))

    blocks, check = hidden(parts), hidden([held])
    depths = parameter_depths(model, {"input_ids": blocks[0]["input_ids"][None].to(parallel.device)})
    stepper = make_stepper(cfg, model, labelled_loss, depths, parallel, count=count_tokens(shift=False))
    phases = strategy_phases("full", epochs)
    run = make_run(cfg, folder, stepper, phases, blocks, seed, items=0, unit="pieces", **options)
    for _ in run.phases():
        for _ in run.epochs():
            for window in run.windows():
                run.step(window)
            with run.averaged():
                loss, guessed = masked_loss(model, make_loader(check, 64), parallel.device)
                run.validate(loss, **{key: guessed})
    run.load_best()
    whole = parallel.whole(model)
    if parallel.main:
        export(whole, folder / "encoder", processor=tokenizer)
    parallel.barrier()
    return run.finish({key: run.history[-1][key]})
