"""Tags for words by a model that sees word pieces: samples, scores of whole entities, baselines without a model.

A word's tag is learned and read at its first piece; its other pieces and the special ones have the label -100. A
sentence longer than the model takes is cut between words into windows, each with some words before it to look at,
so that no tag is lost.

An entity counts as found if all of its words, and no other, have its type (the strict mode of seqeval).

Source: Devlin et al., arXiv 1810.04805, section 5.3 (first piece).
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from bptools._console import plain_table

from .batches import Batch
from .card import COLOURS
from .conll import Sentences
from .encoders import IGNORED, labelled_outputs
from .errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

Tags = Sequence[Sequence[str]]


class TaggedWords(Dataset):
    """Sentences as word pieces, for :class:`Pad`: mappings of lists with ``"labels"``, one or more a sentence.

    Args:
        sentences: Words and tags.
        labels: All tags; their places are the labels' numbers.
        tokenizer: A fast one, as it must say of which word a piece is. See :func:`words_apart`.
        longest: Most pieces of a sample, special ones included.

    Raises:
        InputError: If the tokenizer cannot be used.
    """

    def __init__(
        self,
        sentences: Sentences,
        labels: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        longest: int = 128,
    ):
        if not tokenizer.is_fast:
            raise InputError("--model: expected a fast tokenizer, which says of which word a piece is")
        number = {label: i for i, label in enumerate(labels)}
        self.sentences, self.labels = sentences, tuple(labels)
        words, split = list(map(list, sentences.words)), {"is_split_into_words": True, "verbose": False}
        whole = tokenizer(words, add_special_tokens=False, **split)
        room = longest - tokenizer.num_special_tokens_to_add()
        windows = [
            (i, *window)
            for i in range(len(words))
            for window in _windows(np.bincount(_of_words(whole.word_ids(i)), minlength=len(words[i])), room)
        ]
        parts = [words[i][begin:end] for i, begin, _, end in windows]
        encoded = tokenizer(parts, truncation=True, max_length=longest, **split)
        self.samples, self.places = [], []
        for j, (i, begin, first, _) in enumerate(windows):
            sample, before = {name: encoded[name][j] for name in encoded}, None
            sample["labels"], place = [], []
            for word in encoded.word_ids(j):
                label = IGNORED
                if word is not None and word != before and begin + word >= first:
                    label = number[sentences.tags[i][begin + word]]
                    place.append(begin + word)
                sample["labels"].append(label)
                before = word
            self.samples.append(sample)
            self.places.append((i, place))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index]

    def tags(self, numbers: Sequence[int]) -> list[list[str]]:
        """Return the tags of all words, from the labels of those that have pieces, in the samples' order.

        A word that the tokenizer makes nothing of, such as a lone joiner, is ``O``.
        """
        tags, stream = [["O"] * len(words) for words in self.sentences.words], iter(numbers)
        for i, place in self.places:
            for word in place:
                tags[i][word] = self.labels[next(stream)]
        return tags


def _of_words(ids: Sequence[int | None]) -> list[int]:
    return [word for word in ids if word is not None]


def _windows(pieces: Sequence[int], room: int) -> Iterator[tuple[int, int, int]]:
    """Cut a sentence into windows of ``room`` pieces.

    Args:
        pieces: How many each word has.
        room: For pieces in a window. A word with more comes alone, or after others, and its end is cut.

    Yields:
        The window's first word, the first of it that was in no other, and the end. Up to a quarter of the room is
        for words that were in the one before.
    """
    first = 0
    while first < len(pieces):
        begin, used = first, 0
        while begin and used + pieces[begin - 1] <= room // 4:
            begin -= 1
            used += pieces[begin]
        end = first
        while end < len(pieces) and (end == first or used + pieces[end] <= room):
            used += pieces[end]
            end += 1
        yield begin, first, end
        first = end


def words_apart(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Have a tokenizer of bytes, such as RoBERTa's, begin each word as it does after a space; return it.

    Without this, words that come one by one look to the model like ends of words, and nothing says so.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Sequence

    whole = tokenizer.backend_tokenizer.pre_tokenizer if tokenizer.is_fast else None
    for part in whole if isinstance(whole, Sequence) else [whole]:
        if isinstance(part, ByteLevel):
            part.add_prefix_space = True
            tokenizer.add_prefix_space = tokenizer.init_kwargs["add_prefix_space"] = True  # also when saved
    return tokenizer


def label_names(labels: Sequence[str]) -> dict[str, Any]:
    """Return the part of a configuration of transformers that names its classes."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def labels_of_head(name: str, labels: Sequence[str]) -> tuple[str, ...]:
    """Return ``labels`` in the order that the head of a model has them in, if these are its labels.

    Otherwise a head that knows them would be kept, as it has the right size, and answer to wrong names.

    Args:
        name: A folder or a name on the hub; what cannot be loaded is left to :func:`load_pretrained` to say.
        labels: All tags.
    """
    from transformers import AutoConfig

    try:
        own = AutoConfig.from_pretrained(name).id2label
    except Exception:  # of the hub, of json, of transformers
        own = {}
    return tuple(own.values()) if sorted(own.values()) == sorted(labels) else tuple(labels)


def tokenizer_notes(tokenizer: PreTrainedTokenizerBase, sentences: Sentences) -> list[str]:
    """Return what a tokenizer cannot tell apart in these words, one line each; none where all is well.

    Lower-casing tokenizers of BERT strip accents, and with them the vowel signs of Hindi and of other scripts.
    """
    words = sorted({word for words in sentences.words for word in words})
    pieces = tokenizer([[word] for word in words], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    lost, unknown, nothing = [], [], []
    for word, ids in zip(words, pieces, strict=True):
        if not ids:
            nothing.append(repr(word))
        elif tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            unknown.append(repr(word))
        elif _marks(word) - _marks(text := tokenizer.decode(ids)):
            lost.append(f"{word!r}, which becomes {text.strip()!r}")
    notes = []
    for some, what in (
        (lost, "lose their marks or vowel signs; take a tokenizer that is cased, or keeps accents"),
        (unknown, "have a piece that is unknown"),
        (nothing, "have no piece, and are tagged O"),
    ):
        if some:
            notes.append(f"tokenizer: {len(some)} of {len(words)} words, such as {some[0]}, {what}")
    return notes


def _marks(text: str) -> Counter[str]:
    return Counter(sign for sign in unicodedata.normalize("NFKD", text) if unicodedata.category(sign)[0] == "M")


def tagged_outputs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits ``(words, tags)`` and labels ``(words,)`` of the words of a batch, for :func:`evaluate`."""
    logits, labels = labelled_outputs(model, batch)
    chosen = labels != IGNORED
    return logits[chosen], labels[chosen]


class EntityScores(NamedTuple):
    """Precision, recall and F1 in percent, and the number of true entities; of all, and by type."""

    precision: float
    recall: float
    f1: float
    entities: int
    types: Mapping[str, tuple[float, float, float, int]]


def entity_scores(tags: Tags, predicted: Tags) -> EntityScores:
    """Compare tags with predicted ones, entity by entity; a score that is undefined is 0.

    Args:
        tags: True tags of each sentence, in IOB2.
        predicted: Of the same words. An ``I-PER`` that continues nothing is no part of an entity.
    """
    from seqeval.metrics.v1 import precision_recall_fscore_support, unique_labels  # imports sklearn: slow
    from seqeval.scheme import IOB2

    options = {"scheme": IOB2, "zero_division": 0}
    tags, predicted = list(map(list, tags)), list(map(list, predicted))
    *scores, entities = precision_recall_fscore_support(tags, predicted, average="micro", **options)
    each = zip(*precision_recall_fscore_support(tags, predicted, average=None, **options), strict=True)
    names = sorted(unique_labels(tags, predicted, IOB2))
    types = {name: (100 * p, 100 * r, 100 * f, int(n)) for name, (p, r, f, n) in zip(names, each, strict=True)}
    return EntityScores(*(100 * float(score) for score in scores), int(entities), types)


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return type, first word and end of each entity in tags of IOB2; an ``I`` that continues nothing is none."""
    found, begun = [], None
    for i, tag in enumerate([*tags, "O"]):
        if begun is not None and tag != f"I-{tags[begun][2:]}":
            found.append((tags[begun][2:], begun, i))
            begun = None
        if tag[0] == "B":
            begun = i
    return found


def tags_by_word(train: Sentences, words: Tags) -> list[list[str]]:
    """Tag each word as it is tagged most often in ``train``, and ``O`` where it is not there: a baseline."""
    seen = defaultdict(Counter)
    for sentence, tags in zip(train.words, train.tags, strict=True):
        for word, tag in zip(sentence, tags, strict=True):
            seen[word][tag] += 1
    best = {word: counts.most_common(1)[0][0] for word, counts in seen.items()}
    return [[best.get(word, "O") for word in sentence] for sentence in words]


def tags_by_dictionary(train: Sentences, words: Tags) -> list[list[str]]:
    """Find again the entities of ``train``, as they are written there, the longest first: a baseline."""
    seen = defaultdict(Counter)
    for sentence, tags in zip(train.words, train.tags, strict=True):
        for name, begin, end in entities(tags):
            seen[tuple(sentence[begin:end])][name] += 1
    longest = max(map(len, seen), default=0)
    tagged = []
    for sentence in words:
        tags, i = ["O"] * len(sentence), 0
        while i < len(sentence):
            ends = range(min(len(sentence), i + longest), i, -1)
            end = next((end for end in ends if tuple(sentence[i:end]) in seen), None)
            if end is not None:
                name = seen[tuple(sentence[i:end])].most_common(1)[0][0]
                tags[i:end] = [f"B-{name}", *[f"I-{name}"] * (end - i - 1)]
            i = end or i + 1
        tagged.append(tags)
    return tagged


def tags_by_regression(train: Sentences, words: Tags) -> list[list[str]]:
    """Tag each word by logistic regression over it, its neighbours, and their beginnings and ends: a baseline."""
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    clues, tags = [clue for some in train.words for clue in _clues(some)], [t for some in train.tags for t in some]
    if len(set(tags)) < 2:
        return [tags[:1] * len(some) for some in words]
    model = make_pipeline(DictVectorizer(), LogisticRegression(C=10.0, max_iter=1000)).fit(clues, tags)
    found = iter(model.predict([clue for some in words for clue in _clues(some)]).tolist())
    return [[next(found) for _ in some] for some in words]


def _clues(words: Sequence[str]) -> Iterator[dict[str, Any]]:
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        clues = {"word": word, "before": before, "after": after, "first": not before}
        clues |= {"end before": before[-2:], "end after": after[-2:]}
        yield clues | {
            f"{n} {side}": part for n in (1, 2, 3) for side, part in (("first", word[:n]), ("last", word[-n:]))
        }


def entity_table(title: str, scores: EntityScores) -> Table:
    """Return precision, recall and F1 in percent, and the number of true entities, for each type and for all."""
    headings = ("precision %", "recall %", "F1 %", "entities")
    rows = [*scores.types.items(), ("all", scores[:4])]
    columns = {"type": "left", **dict.fromkeys(headings, "right")}
    return plain_table(title, columns, [(name, *(f"{x:.1f}" for x in row[:3]), row[3]) for name, row in rows])


def draw_types(axes: Axes, runs: Mapping[str, EntityScores], types: Sequence[str]) -> None:
    """Draw a bar of F1 for each type and run."""
    width = 0.8 / len(runs)
    for i, (name, scores) in enumerate(runs.items()):
        heights = [scores.types.get(kind, (0, 0, 0, 0))[2] for kind in types]
        places = np.arange(len(types)) + (i - (len(runs) - 1) / 2) * width
        axes.bar(places, heights, width, label=name, color=COLOURS[i % len(COLOURS)])
    axes.set_xticks(range(len(types)), types, rotation=90 if len(types) > 6 else 0)
    axes.set(ylabel="test F1 (%)", ylim=(0, 119), yticks=range(0, 101, 20), title="Entity F1 by type")
    axes.legend(ncols=3, frameon=False, fontsize=8, loc="upper center")
    axes.grid(axis="y", alpha=0.25)


def tag_mistakes(words: Tags, tags: Tags, predicted: Tags, most: int = 40) -> str:
    """Return the sentences with a wrong entity in Markdown, true entities above predicted ones.

    Args:
        words: Of each sentence.
        tags: True ones.
        predicted: Of the same words.
        most: How many sentences at most.
    """
    pairs = zip(words, tags, predicted, strict=True)
    wrong = [
        f"    true       {_bracketed(sentence, true)}\n    predicted  {_bracketed(sentence, guess)}"
        for sentence, true, guess in pairs
        if entities(true) != entities(guess)
    ]
    shown = f", {most} of them below" if len(wrong) > most else ""
    return "\n\n".join([f"{len(wrong)} of {len(words)} sentences have a wrong entity{shown}", *wrong[:most]])


def _bracketed(words: Sequence[str], tags: Sequence[str]) -> str:
    shown = list(words)
    for name, begin, end in entities(tags):
        shown[begin] = f"[{shown[begin]}"
        shown[end - 1] += f" {name}]"
    return " ".join(shown)
