"""Text that needs no network, CPython's own help, and tokenizers trained on whatever text there is."""

import re
from collections.abc import Iterable, Sequence
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def python_help() -> list[str]:
    """Return the paragraphs of Python's help on its syntax, without line breaks: some 450,000 characters.

    They differ a little between Python's versions. Headings, tables and code, whose lines do not end in words, are
    kept too.
    """
    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return [paragraph for paragraph in dict.fromkeys(paragraphs) if len(paragraph) > 20]


def word_pieces(texts: Iterable[str], size: int, *, lower: bool = False) -> "PreTrainedTokenizerFast":
    """Train a tokenizer as BERT's on ``texts``: word pieces, with ``[CLS]`` and ``[SEP]`` around a text.

    Args:
        texts: Lines or paragraphs.
        size: Most pieces; each character of ``texts`` is one, so that no word of them is unknown.
        lower: Whether to make all letters small. Marks are kept: without them Hindi cannot be read.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    lowercase = [normalizers.Lowercase()] if lower else []
    texts, normalizer = _some(texts), normalizers.Sequence([normalizers.NFC(), *lowercase])
    letters = sorted({sign for text in texts for sign in normalizer.normalize_str(text) if not sign.isspace()})
    # All letters are named to the trainer, which else numbers them as it meets them: otherwise in each process.
    known = [*special, *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=known, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    pieces = tokenizer.get_vocab()

    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))  # to which letters are nothing special
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    ends = [(name, pieces[name]) for name in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


def byte_pairs(texts: Iterable[str], size: int, special: Sequence[str] = ()) -> "PreTrainedTokenizerFast":
    """Train a tokenizer as GPT-2's on ``texts``: pairs of bytes, so that no text is unknown.

    Args:
        texts: Lines or paragraphs.
        size: Most tokens, at least 256 and the special ones.
        special: More special tokens beside ``<|endoftext|>``, which ends a text and pads a batch.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[end, *special], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_some(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end,
        additional_special_tokens=list(special),
    )  # fmt: skip


def _some(texts: Iterable[str]) -> list[str]:
    texts = list(texts)
    if not any(text.strip() for text in texts):
        raise InputError("texts: expected words to train a tokenizer on, got none")
    return texts
