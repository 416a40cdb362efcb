"""Causal language models: documents and conversations as tokens, packed rows, and a head that makes no logits.

What an assistant says is found by the chat template's own marks, ``{% generation %}``, or, where it has none, as
what the template adds to the conversation before it. Nothing else of a conversation has labels.

Packing puts several texts into one row. Each has positions from 0 and attends to itself alone, by a mask that is
block-wise and causal; the first token of a text is nobody's target. So a packed row has the losses of its texts.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import bptools.nn
from bptools import memory
from bptools.functional import cross_entropy, linear_cross_entropy

from .adapters import merge_adapter, tied_parameters
from .batches import Batch, LossFn, to_device
from .corpus import byte_pairs
from .data import make_loader, split_sizes
from .encoders import IGNORED, load_pretrained
from .errors import InputError, one_line
from .language import perplexity
from .stepper import Stepper
from .text import Texts, draw_texts, read_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Document = str | list[dict[str, str]]  # a text, or the messages of a conversation
ROLES = ("system", "user", "assistant")
PARTS = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
KINDS = (".txt", ".jsonl")
OPEN = 64  # rows that are looked at for room
# For tokenizers without a template of their own; it needs no special token but the one that ends a text.
TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Documents:
    """Texts or conversations to train, to pick the best epoch and to test.

    Attributes:
        train: What is learned from.
        val: What chooses the best epoch.
        test: What the result is measured on.
        more: What else there is, to pretrain on; none of it is of the other parts.
    """

    train: tuple[Document, ...]
    val: tuple[Document, ...]
    test: tuple[Document, ...]
    more: tuple[Document, ...] = field(default=(), repr=False)

    def sizes(self) -> str:
        """Return the number of texts in each part, in words."""
        return split_sizes(self.train, self.val, self.test)


def read_documents(path: str | Path) -> tuple[Document, ...]:
    """Read texts or conversations.

    Args:
        path: ``.txt``, UTF-8, with texts between empty lines; or ``.jsonl`` with an object in each line that has
            ``"text"``, or ``"messages"``, a list of objects with ``"role"`` and ``"content"``.

    Raises:
        InputError: If the file cannot be read, or a line is none of that; the message names the line.
    """
    path = Path(path)
    if path.suffix not in KINDS:
        raise InputError(f"{path}: expected a file that ends in {' or '.join(KINDS)}, or a folder")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8, got other bytes ({error.reason})") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if path.suffix == ".txt":
        found: list[Document] = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    else:
        lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        found = [_document(f"{path}, line {number}", line) for number, line in lines]
    if not found:
        raise InputError(f"{path}: expected texts, got none")
    return tuple(found)


def _document(where: str, line: str) -> Document:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict) or len(row.keys() & {"text", "messages"}) != 1:
        raise InputError(f'{where}: expected an object with either "text" or "messages"')
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise InputError(f'{where}: "text" must be a string that is not empty')
        return row["text"]
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise InputError(f'{where}: "messages" must be a list that is not empty')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise InputError(f'{where}, message {number}: expected an object with strings "role" and "content"')
        if message["role"] not in ROLES:
            raise InputError(f"{where}, message {number}: role {message['role']!r} is none of {', '.join(ROLES)}")
        if not message["content"].strip():
            raise InputError(f'{where}, message {number}: "content" is empty')
    if messages[-1]["role"] != "assistant":
        raise InputError(f"{where}: the last message must be the assistant's, or there is nothing to learn")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def document_folder(path: str | Path, *, holdout: float = 0.2, seed: int = 0) -> Documents:
    """Read a file, of which a share is set aside, or a folder with files ``train``, ``val`` and maybe ``test``.

    Args:
        path: As for :func:`read_documents`, or a folder of such files; ``valid`` and ``dev`` are ``val`` too.
            Without ``test``, ``val`` tests as well.
        holdout: Share of a single file that is set aside, half to pick the epoch, half to test.
        seed: Draws what is set aside.

    Raises:
        InputError: As :func:`read_documents` does; if a part is missing, there twice, or too small to be split.
    """
    path = Path(path)
    if not path.is_dir():
        whole = read_documents(path)
        held = max(2, round(len(whole) * holdout))
        if len(whole) <= held:
            raise InputError(f"{path}: splitting takes more than {held} texts, got {len(whole)}")
        order = np.random.default_rng(seed).permutation(len(whole)).tolist()
        cuts = order[held:], order[: held // 2], order[held // 2 : held]
        return Documents(*(tuple(whole[i] for i in cut) for cut in cuts))
    parts = {}
    for part, names in PARTS.items():
        found = [path / f"{name}{end}" for name in names for end in KINDS if (path / f"{name}{end}").is_file()]
        if len(found) > 1:
            raise InputError(f"{path}: expected one file for {part}, got {found[0].name} and {found[1].name}")
        if found:
            parts[part] = read_documents(found[0])
        elif part != "test":
            raise InputError(f"{path}: expected files train and val, such as {part}.jsonl; found none for {part}")
    return Documents(parts["train"], parts["val"], parts.get("test", parts["val"]))


def labelled_chats(
    path: str | Path,
    columns: Sequence[str],
    *,
    source: int,
    train: int,
    val: int,
    test: int,
    seed: int,
    fixed: int = 0,
) -> Documents:
    """Read messages with labels as conversations of two turns: the message, and an answer that names its labels.

    Each part has as many messages of each combination of labels. The answer has a line for each label, such as
    ``intent: refund``; in the conversations to pretrain on these are in the order of ``columns``, in the others in
    the reverse order.

    Args:
        path: As for :func:`bptools.finetune.read_texts`.
        columns: Names of the labels' columns.
        source: Messages of each combination to pretrain on; like those of the test they depend on ``fixed`` alone.
        train: Messages of each combination to train.
        val: To pick the best epoch.
        test: To test.
        seed: Draws what is learned from, out of what is left.
        fixed: Draws what is tested, and what is pretrained on.

    Raises:
        InputError: As :func:`bptools.finetune.read_texts` and :func:`bptools.finetune.draw_texts` do.
    """
    read = [read_texts(path, label_column=column) for column in columns]
    lines = [
        [f"{column}: {label}".replace("_", " ") for column, label in zip(columns, some, strict=True)]
        for some in zip(*(part.labels for part in read), strict=True)
    ]
    whole = Texts(read[0].texts, tuple("\n".join(some[::-1]) for some in lines))
    names = sorted(set(whole.labels))

    def draw(texts: Texts, first: int, second: int, number: int) -> tuple[Texts, Texts, Texts]:
        return draw_texts(Path(path), texts, *(dict.fromkeys(names, n) for n in (first, first + second)), number)

    tested, known, rest = draw(whole, test, source, fixed)
    learned, chosen, _ = draw(rest, train, val, seed)
    turned = Texts(known.texts, tuple("\n".join(label.split("\n")[::-1]) for label in known.labels))
    return Documents(*map(_conversations, (learned, chosen, tested, turned)))


def _conversations(texts: Texts) -> tuple[Document, ...]:
    return tuple(
        [{"role": "user", "content": text}, {"role": "assistant", "content": label}]
        for text, label in zip(texts.texts, texts.labels, strict=True)
    )


# Tokens -------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A text as tokens.

    Attributes:
        ids: The tokens.
        labels: The same, or -100 where nothing is to be predicted: the first token, and what a user says.
    """

    ids: list[int]
    labels: list[int]


def tokenise(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[list[Sample], int]:
    """Return documents as tokens, and how many were cut.

    A text ends with the tokenizer's end of text; one longer than ``length`` goes on in further samples. A
    conversation is written by the tokenizer's chat template, and has labels where the assistant speaks, up to
    and with the mark that ends its turn if the template says so; one longer than ``length`` is cut at its end.

    Args:
        documents: Texts and conversations.
        tokenizer: With a chat template where there are conversations.
        length: Most tokens of a sample.

    Raises:
        InputError: If a conversation cannot be written, or has no answer within ``length``.
    """
    samples, cut = [], 0
    for number, document in enumerate(documents, 1):
        if isinstance(document, str):
            ids = [*tokenizer(document, verbose=False)["input_ids"]]
            if ids[-1:] != [tokenizer.eos_token_id] and tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
            pieces = [ids[i : i + length] for i in range(0, len(ids), length)]
            samples += [Sample(piece, [IGNORED, *piece[1:]]) for piece in pieces if len(piece) > 1]
            continue
        ids, spoken = chat_tokens(document, tokenizer)
        labels = [i if said else IGNORED for i, said in zip(ids, spoken, strict=True)][:length]
        if all(label == IGNORED for label in labels[1:]):
            raise InputError(
                f"--length {length}: conversation {number}, of {len(ids)} tokens, has no answer within it"
            )
        cut += len(ids) > length
        samples.append(Sample(ids[:length], [IGNORED, *labels[1:]]))
    return samples, cut


def chat_tokens(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation, and which of them the assistant says.

    Raises:
        InputError: If the template fails, or writes earlier turns in another way once later ones are there, so
            that it cannot be known what the assistant says.
    """
    try:
        if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template or ""):
            options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
            written = tokenizer.apply_chat_template(messages, **options)
            return list(written["input_ids"]), [bool(said) for said in written["assistant_masks"]]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
                upto = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
                if not (whole.startswith(upto) and upto.startswith(before)):
                    raise InputError(
                        f"--data: the chat template writes message {i + 1} in another way once more follow; "
                        "give it {% generation %} marks, or conversations of one answer"
                    )
                spans.append((len(before), len(upto)))
    except InputError:
        raise
    except Exception as error:  # of Jinja, or what the template itself raises
        raise InputError(f"--data: the chat template cannot write a conversation: {one_line(error)}") from error
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], [any(a <= start < b for a, b in spans) for start in starts]


class TokenRows(Dataset):
    """Rows of a batch: one sample each, or several that are packed.

    Args:
        samples: Texts as tokens.
        pack: The length of a row, into which samples go while they fit; ``None`` for one sample in each row.
    """

    def __init__(self, samples: Sequence[Sample], pack: int | None = None):
        self.rows: list[list[Sample]] = []
        room: list[int] = []
        for sample in samples:
            size = len(sample.ids)
            some = range(max(0, len(room) - OPEN), len(room)) if pack else ()
            place = next((i for i in some if room[i] >= size), None)
            if place is None:
                self.rows.append([])
                room.append(pack or size)
                place = len(room) - 1
            self.rows[place].append(sample)
            room[place] -= size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Sample]:
        return self.rows[index]


class CausalBatch:
    """Makes a batch of rows: tensors ``(n, length)``, padded at the end.

    Args:
        tokenizer: Says what padding is.
        packed: Whether rows are of several texts: then there are positions for each, and ``attention_mask`` is
            ``(n, 1, length, length)``, 0 where a token may look and very low elsewhere; otherwise ``(n, length)``,
            1 where a token is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, packed: bool = False):
        pad = tokenizer.pad_token_id
        self.pad, self.packed = tokenizer.eos_token_id if pad is None else pad, packed

    def __call__(self, rows: Sequence[list[Sample]]) -> dict[str, Tensor]:
        """Return ids, labels, mask and, if packed, positions."""
        length = max(sum(len(s.ids) for s in row) for row in rows)
        ids = torch.full((len(rows), length), self.pad or 0)
        labels = torch.full_like(ids, IGNORED)
        places = torch.zeros_like(ids)
        texts = torch.full_like(ids, -1)  # of which text of its row a token is
        for i, row in enumerate(rows):
            start = 0
            for number, sample in enumerate(row):
                here = slice(start, start := start + len(sample.ids))
                ids[i, here], labels[i, here] = torch.tensor(sample.ids), torch.tensor(sample.labels)
                places[i, here], texts[i, here] = torch.arange(len(sample.ids)), number
        if not self.packed:
            return {"input_ids": ids, "attention_mask": (texts >= 0).long(), "labels": labels}
        allowed = (texts[:, :, None] == texts[:, None, :]).tril()  # padding looks at padding, so no row is empty
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        return {"input_ids": ids, "attention_mask": mask[:, None], "position_ids": places, "labels": labels}


# Models -------------------------------------------------------------------------------------------------------


def load_causal(name: str, *, pretrained: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer from a folder or the hub, on bptools' ops.

    A tokenizer without a chat template gets a plain one.

    Args:
        name: A folder that ``save_pretrained`` wrote, or a name on the hub.
        pretrained: Whether to have its weights, or random ones.

    Raises:
        InputError: As :func:`bptools.finetune.load_pretrained` does; or if it is another kind of model.
    """
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_pretrained(AutoModelForCausalLM, name)
    kinds = model.config.architectures or []
    if type(model).__name__ not in kinds:
        raise InputError(
            f"--model {name}: expected a causal language model ({type(model).__name__}), got {', '.join(kinds)}"
        )
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model {name}: its tokenizer has no token that ends a text")
    if not pretrained:
        model = AutoModelForCausalLM.from_config(model.config)
        bptools.nn.convert(model)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    return model, tokenizer


def small_causal(
    tokenizer: PreTrainedTokenizerBase, *, width: int = 96, layers: int = 2, length: int = 256
) -> PreTrainedModel:
    """Return a Llama of small size with random weights, on bptools' ops; its head is a weight of its own.

    Args:
        tokenizer: Says how many tokens there are.
        width: Of the hidden states; a multiple of 32.
        layers: Of attention.
        length: The longest row, in tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=width // 32, max_position_embeddings=length, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    bptools.nn.convert(model)
    return model


def chat_tokenizer(documents: Iterable[Document], size: int) -> PreTrainedTokenizerBase:
    """Train a tokenizer of ``size`` byte pairs on texts and conversations, with a chat template."""
    texts = (
        document if isinstance(document, str) else "\n".join(message["content"] for message in document)
        for document in documents
    )
    tokenizer = byte_pairs(texts, size)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class LossHead(bptools.nn.Linear):
    """The output layer of a language model, which gives the mean loss in place of logits where it knows labels.

    Attributes:
        labels: ``(n, length)``, set for one forward pass; ``None`` for logits. Where there are more hidden states
            than labels, virtual tokens came first.
    """

    labels: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states ``(n, length, width)`` to logits, or to the loss ``()`` of the labels."""
        if self.labels is None:
            return super().forward(hidden)
        hidden, labels = hidden[:, -self.labels.shape[1] :][:, :-1], self.labels[:, 1:]
        kept = labels != IGNORED
        return linear_cross_entropy(hidden[kept], self.weight, labels[kept], linear_bias=self.bias)


def causal_loss(model: nn.Module, batch: Batch) -> LossFn:
    """Return what a :class:`Stepper` calls: the mean loss over the labels of a batch, without logits if it can.

    Where the output layer is a plain linear one, it becomes a :class:`LossHead`, if the model then gives the same
    loss; models that do more with logits, and an output layer with a low-rank update, keep theirs.

    Args:
        model: Of transformers, with an adapter or without, as it is trained.
        batch: From :class:`CausalBatch`, to try it on.
    """
    batch = to_device(batch, next(model.parameters()).device)
    heads = [m for m in model.modules() if type(m) in (nn.Linear, bptools.nn.Linear) and m in _outputs(model)]

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch["labels"]
        for head in heads:
            head.labels = labels
        try:
            output = module(**inputs).logits
        finally:
            for head in heads:
                head.labels = None
        return output if heads else _logits_loss(output, labels)

    training, classes = model.training, [type(head) for head in heads]
    model.eval()
    for head in heads:
        head.__class__ = LossHead
    try:
        with torch.no_grad():
            plain = _logits_loss(
                model(**{n: v for n, v in batch.items() if n != "labels"}).logits, batch["labels"]
            )
            try:
                same = not heads or torch.allclose(loss(model, batch), plain, rtol=1e-4, atol=1e-4)
            except (RuntimeError, ValueError, TypeError, IndexError):  # it does something to logits
                same = False
    finally:
        model.train(training)
    if not same:
        for head, old in zip(heads, classes, strict=True):
            head.__class__ = old
        heads.clear()
    return loss


def _outputs(model: nn.Module) -> list[nn.Module]:
    """The output layer, and the copies of it that peft keeps to train."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return list(base.get_output_embeddings().modules())


def _logits_loss(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits[:, -labels.shape[1] :][:, :-1].flatten(0, 1)
    return cross_entropy(logits.float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


def check_packing(model: nn.Module, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> None:
    """Raise unless a packed row gives the loss that its texts have by themselves.

    Raises:
        InputError: If texts of a row see each other, as in models that do not follow the mask.
    """
    some = list(samples[:3])
    model.eval()
    with torch.no_grad():
        losses = [
            float(_logits_loss(model(**{n: v for n, v in batch.items() if n != "labels"}).logits, batch["labels"]))
            for batch in (
                CausalBatch(tokenizer, packed)(TokenRows(some, 2**30 if packed else None))
                for packed in (False, True)
            )
        ]
    if abs(losses[0] - losses[1]) > 1e-4 * max(1.0, losses[0]):
        raise InputError(
            f"--pack: {type(model).__name__} lets texts of a row see each other (loss {losses[1]:.4f} packed, "
            f"{losses[0]:.4f} apart); use --no-pack"
        )


# What comes of it ---------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Mean loss per label, in nats; its exponential; labels and whole answers that greedy decoding gives, in %."""

    loss: float
    perplexity: float
    tokens: float
    exact: float


@torch.inference_mode()
def causal_scores(
    model: nn.Module, samples: Sequence[Sample], collate: CausalBatch, device: torch.device | str, batch: int = 32
) -> Scores:
    """Measure a model in evaluation mode, label by label, without packing or mixed precision.

    An answer is right where each of its tokens is the likeliest after those before it, which is when greedy
    decoding writes it word for word.
    """
    model.eval()
    rows = TokenRows(sorted(samples, key=lambda sample: len(sample.ids)))  # little padding
    loss, right, count, exact = 0.0, 0, 0, 0
    for inputs in make_loader(rows, batch, collate=collate):
        inputs = to_device(inputs, torch.device(device))
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, -labels.shape[1] - 1 : -1].float()
        kept = labels != IGNORED
        hit = logits.argmax(-1) == labels
        loss += float(nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum"))
        right += int((hit & kept).sum())
        count += int(kept.sum())
        exact += int((hit | ~kept).all(1).sum())
    mean = loss / count
    return Scores(mean, perplexity(mean), 100 * right / count, 100 * exact / len(samples))


def _weight_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers, those that are tied once."""
    return sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


@torch.inference_mode()
def complete(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    document: Document,
    *,
    new: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> tuple[str, str, str]:
    """Let a model go on: answer a conversation in the place of its last message, or end a text.

    Where the model has too few positions for all, it is given less of the beginning.

    Args:
        model: With an adapter or without; it is put in evaluation mode.
        tokenizer: Its tokenizer.
        document: A conversation, or a text of which the first quarter is given.
        new: Most tokens to write.
        temperature: Logits are divided by it, and tokens drawn; 0: the most likely token each time.
        seed: What is drawn.

    Returns:
        What was given, what the document has there, and what the model wrote.
    """
    if isinstance(document, str):
        given = document[: max(1, len(document) // 4)]
        ids, wanted = tokenizer(given)["input_ids"], document[len(given) :]
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
    else:
        given, wanted = document[-2]["content"] if len(document) > 1 else "", document[-1]["content"]
        text = tokenizer.apply_chat_template(document[:-1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    model.eval()
    if (room := positions(model)) is not None:
        ids = ids[-max(1, room - new) :]
        new = min(new, room - len(ids))
    generator = torch.Generator().manual_seed(seed)
    start, device = len(ids), next(model.parameters()).device
    # peft's generate loses a prefix, and repeats a prompt, where transformers calls the cache by its new name
    for _ in range(new):
        inputs = torch.tensor([ids], device=device)
        logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[0, -1].float().cpu()
        drawn = (logits / temperature).softmax(-1).multinomial(1, generator=generator) if temperature else None
        ids.append(int(logits.argmax() if drawn is None else drawn))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return given, wanted, tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def positions(model: nn.Module) -> int | None:
    """Return how many tokens a model takes, beside those of a prompt or prefix; ``None`` if it does not say."""
    most = getattr(model.config, "max_position_embeddings", None)
    own = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None)
    return None if most is None else most - (own or 0)


def check_length(model: nn.Module, length: int) -> None:
    """Refuse a ``length`` for which the model has too few positions beside its prompt, with an InputError."""
    most = positions(model)
    if most is not None and most < length:
        raise InputError(f"--length {length}: the model takes {most} tokens at most, beside those of a prompt")


def check_documents(documents: Documents, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Sample]:
    """Find out before training whether all documents can be tokens, and return those to train on as such.

    Raises:
        InputError: As :func:`tokenise` does.
    """
    samples = []
    for name in ("test", "val", "train"):
        try:
            samples = tokenise(getattr(documents, name), tokenizer, length)[0]
        except InputError as error:
            raise InputError(f"{error} (of those for {name})") from error
    return samples


class Usage(NamedTuple):
    """What a model costs in use: loss on some samples in nats per label, seconds for them, bytes of weights."""

    loss: float
    seconds: float
    weights: int


def usage(
    score: Callable[[nn.Module, Sequence[Sample]], Scores], model: nn.Module, samples: Sequence[Sample]
) -> tuple[Scores, Usage]:
    """Score a model by :func:`causal_scores`, its other arguments given, and measure what that costs."""
    began = time.perf_counter()
    scores = score(model, samples)
    return scores, Usage(scores.loss, time.perf_counter() - began, _weight_bytes(model))


def samples_text(rows: Sequence[tuple[str, str, str]]) -> str:
    """Return a table in Markdown of what :func:`complete` returned."""

    def cell(text: str) -> str:
        short = " ".join(text.split())
        return (short if len(short) <= 200 else f"{short[:199]}…").replace("|", "\\|")

    table = ["| given | wanted | written |", "|---|---|---|"]
    return "\n".join([*table, *(f"| {' | '.join(map(cell, row))} |" for row in rows)])


class Footprint(NamedTuple):
    """Bytes of one training step: weights, gradients, optimizer state, and what is kept for the backward pass."""

    weights: int
    gradients: int
    optimizer: int
    backward: int


def footprint(stepper: Stepper, batch: Batch, *, lean: bool = False) -> Footprint:
    """Count what a step of ``stepper`` holds in memory; the model is as the last phase left it.

    What is kept for backward is counted by :func:`bptools.memory.ledger`; buffers of single operations, which are
    gone when these are done, are not.

    Args:
        stepper: After a step, when its optimizer has its state.
        batch: On any device.
        lean: Whether the steps run under :func:`bptools.lean`.
    """
    stepper.model.train()
    with memory.ledger() as book, stepper.autocast():
        loss = stepper.loss_fn(stepper.model, to_device(batch, stepper.device))
    del loss
    gradients = sum(p.nbytes for p in stepper.model.parameters() if p.requires_grad)
    state = sum(
        t.nbytes
        for parameter, kept in stepper.optimizer.state.items()
        if parameter.requires_grad
        for t in kept.values()
        if isinstance(t, Tensor)
    )
    return Footprint(_weight_bytes(stepper.model), gradients, state, book.lean if lean else book.eager)


@torch.inference_mode()
def merged_difference(model: nn.Module, batch: Batch) -> float:
    """Return how far the logits of a merged adapter are from the adapter's own, as a part of their norm.

    Args:
        model: With an adapter, which is no prompt; it is put in evaluation mode.
        batch: From :class:`CausalBatch`.
    """
    batch = to_device(batch, next(model.parameters()).device)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    merged, logits = merge_adapter(model.eval())(**inputs).logits.double(), model(**inputs).logits.double()
    return float((merged - logits).norm() / logits.norm())


def output_name(model: nn.Module) -> str:
    """Return the name of the output layer.

    Raises:
        InputError: If it shares its weight with the embedding, which would learn along.
    """
    output = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is output)
    tied = next((names for names in tied_parameters(model) if f"{name}.weight" in names), None)
    if tied:
        other = next(n for n in tied if n != f"{name}.weight")
        raise InputError(f"--strategy head: {name}.weight and {other} are one tensor; use full or lora")
    return name


@torch.no_grad()
def prompt_from_text(model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Let a soft prompt begin from the embeddings of a text, repeated or cut to its length, in place.

    Source: Lester et al., arXiv 2104.08691.

    Args:
        model: With an adapter of kind ``"prompt"``.
        tokenizer: Its tokenizer.
        text: At least one token.

    Raises:
        InputError: If the text is empty.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError("--text: expected words, got none")
    prompt = model.prompt_encoder[model.active_adapter].embedding.weight
    words = model.get_input_embeddings().weight[[ids[i % len(ids)] for i in range(len(prompt))]]
    prompt.copy_(words)
