"""Sentences with a tag for each word, from files in the columns of CoNLL, in three parts.

Tags say where entities are and of which type. Files write them in several ways, which are told apart, checked and
turned into one, IOB2: ``B-PER`` begins an entity, ``I-PER`` goes on with it, ``O`` is outside of any.

=========  =============================================================
IOB2, BIO  each entity begins with ``B``
IOB1       ``B`` only where an entity follows another of the same type
BIOES      besides, ``E`` ends an entity and ``S`` is one of a single word; so do ``L`` and ``U`` of BILOU
=========  =============================================================

Source: Ramshaw and Marcus, arXiv cmp-lg/9505040 (IOB1); Tjong Kim Sang and De Meulder, arXiv cs/0306050 (CoNLL).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .data import split_sizes
from .errors import InputError

KINDS = (".conll", ".txt", ".tsv", ".bio", ".iob", ".iob2")
PARTS = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
TAG = re.compile(r"O|[BIESLU]-\S+")
ENDS = {"E": "I", "L": "I", "S": "B", "U": "B"}  # what they are in IOB2


@dataclass(frozen=True)
class Sentences:
    """Words, with a tag each.

    Attributes:
        words: Of each sentence.
        tags: Of each sentence, as many as words, in IOB2.
    """

    words: tuple[tuple[str, ...], ...]
    tags: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.words)

    def take(self, index: Sequence[int]) -> Sentences:
        """Return those at ``index``, in that order."""
        return Sentences(tuple(self.words[i] for i in index), tuple(self.tags[i] for i in index))

    def types(self) -> set[str]:
        """Return the types of the entities."""
        return {tag[2:] for tags in self.tags for tag in tags if tag != "O"}


@dataclass(frozen=True)
class TagSplits:
    """Sentences to train, to pick the best epoch and to test.

    Attributes:
        train: What is learned from.
        val: What chooses the best epoch.
        test: What the result is measured on; the same object as ``val`` where there is no third part.
        types: Of entities, sorted.
    """

    train: Sentences
    val: Sentences
    test: Sentences
    types: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """All tags: ``O``, and two for each type."""
        return ("O", *(f"{begin}-{name}" for name in self.types for begin in "BI"))

    def sizes(self) -> str:
        """Return the number of sentences in each part, in words."""
        return split_sizes(self.train, self.val, self.test)


def read_conll(path: str | Path, column: int = -1, word_column: int = 1) -> Sentences:
    """Read a file with a word and its tag in each line, and an empty line after each sentence.

    Columns are parted by tabs where a line has any, else by spaces. Lines of ``-DOCSTART-`` are left out, and so
    are those before a sentence that begin with ``#`` and have no tag.

    Args:
        path: UTF-8.
        column: Where the tag is: 1 is the first column, -1 the last.
        word_column: Where the word is.

    Returns:
        The sentences, their tags in IOB2 whatever the file has.

    Raises:
        InputError: If the file cannot be read, a line lacks a column, or a tag is none or cannot be where it is;
            the message names file and line.
    """
    for option, value in (("--column", column), ("--word-column", word_column)):
        if not value:
            raise InputError(f"{option} 0: the first column is 1, the last is -1")
    sentences: list[list[tuple[int, str, str]]] = [[]]  # line, word, tag
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                row = _row(line)
                if not row or row[0] == "-DOCSTART-":
                    sentences.append([])
                    continue
                tag = _cell(row, column)
                if row[0].startswith("#") and not sentences[-1] and not TAG.fullmatch(tag):
                    continue
                word = _cell(row, word_column)
                if not word or not tag:
                    option = f"--word-column {word_column}" if tag else f"--column {column}"
                    raise InputError(f"{path}, line {number}: has {len(row)} columns, and none for {option}")
                if not TAG.fullmatch(tag):
                    raise InputError(
                        f"{path}, line {number}: expected a tag such as O, B-PER or I-PER, got {tag!r}; "
                        "--column says where the tags are"
                    )
                sentences[-1].append((number, word, tag))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8, got other bytes ({error.reason})") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    sentences = [sentence for sentence in sentences if sentence]
    if not sentences:
        raise InputError(f"{path}: expected sentences, got none")
    tags = _to_iob2(path, [[(line, tag) for line, _, tag in sentence] for sentence in sentences])
    words = [tuple(word for _, word, _ in sentence) for sentence in sentences]
    return Sentences(tuple(words), tuple(map(tuple, tags)))


def _row(line: str) -> list[str]:
    line = line.rstrip("\r\n\t ")
    return line.split("\t") if "\t" in line else [cell for cell in line.split(" ") if cell]


def _cell(row: Sequence[str], column: int) -> str:
    index = column - 1 if column > 0 else column + len(row)
    return row[index] if 0 <= index < len(row) else ""


def _to_iob2(path: str | Path, sentences: Sequence[Sequence[tuple[int, str]]]) -> list[list[str]]:
    """Return the tags of ``sentences``, given with their lines, in IOB2."""
    every = [pair for sentence in sentences for pair in _pairs(sentence)]
    if any(tag[0] in ENDS for _, _, tag, _ in every):
        _check_ends(path, every)
        return [[ENDS.get(tag[0], tag[0]) + tag[1:] for _, tag in sentence] for sentence in sentences]
    iob2 = next((pair for pair in every if pair[2][0] == "I" and not _continues(pair)), None)
    if iob2 is None:
        return [[tag for _, tag in sentence] for sentence in sentences]
    iob1 = next((pair for pair in every if pair[2][0] == "B" and not _continues(pair)), None)
    if iob1 is not None:
        (line, before, tag, _), (other, _, begin, _) = iob2, iob1
        raise InputError(
            f"{path}, line {line}: {tag} after {before} begins no entity in IOB2, and {begin} in line {other} is "
            "not of IOB1"
        )
    return [
        ["B" + pair[2][1:] if pair[2][0] == "I" and not _continues(pair) else pair[2] for pair in _pairs(sentence)]
        for sentence in sentences
    ]


def _pairs(sentence: Sequence[tuple[int, str]]) -> Iterator[tuple[int, str, str, str]]:
    """Yield the line of each tag, the tag before it, itself, and the one after it."""
    tags = ["O", *(tag for _, tag in sentence), "O"]
    for i, (line, tag) in enumerate(sentence):
        yield line, tags[i], tag, tags[i + 2]


def _continues(pair: tuple[int, str, str, str]) -> bool:
    """Whether the tag before is of the same entity's type."""
    return pair[1][1:] == pair[2][1:]


def _check_ends(path: str | Path, every: Sequence[tuple[int, str, str, str]]) -> None:
    """Raise if an entity of BIOES is not whole: begun by B and ended by E, or S alone."""
    for line, before, tag, after in every:
        inside = before[0] in "BI" and before[1:] == tag[1:]
        goes_on = after[0] in "IEL" and after[1:] == tag[1:]
        if tag[0] in "IEL" and not inside:
            raise InputError(f"{path}, line {line}: {tag} after {before} begins no entity in BIOES")
        if tag[0] in "BI" and not goes_on:
            raise InputError(f"{path}, line {line}: {tag} before {after} ends no entity in BIOES")


def conll_folder(
    path: str | Path, column: int = -1, word_column: int = 1, *, holdout: float = 0.3, seed: int = 0
) -> TagSplits:
    """Read a file, of which a share is set aside, or a folder with files ``train``, ``val`` and maybe ``test``.

    Args:
        path: As for :func:`read_conll`, or a folder of such files that end in ``.conll``, ``.txt``, ``.tsv``,
            ``.bio``, ``.iob`` or ``.iob2``; ``valid`` and ``dev`` are ``val`` too. Without ``test``, ``val`` tests
            as well.
        column: Where the tag is.
        word_column: Where the word is.
        holdout: Share of a single file that is set aside, half to pick the epoch, half to test.
        seed: Draws what is set aside.

    Raises:
        InputError: As :func:`read_conll` does; if there are too few sentences to split, no entity to train on, or
            entities of a type that the training part has none of.
    """
    path = Path(path)
    if not path.is_dir():
        whole = read_conll(path, column, word_column)
        held = max(1, round(len(whole) * holdout / 2))
        parts = draw_sentences(path, whole, (len(whole) - 2 * held, held, held), seed)
        return TagSplits(*parts, _types(path, whole))
    files: dict[str, Path] = {}
    for part, names in PARTS.items():
        found = [file for name in names for file in sorted(path.glob(f"{name}.*")) if file.suffix in KINDS]
        if len(found) > 1:
            raise InputError(f"{path}: expected one file for {part}, got {found[0].name} and {found[1].name}")
        if not found and part != "test":
            raise InputError(f"{path}: expected files train and val, such as {part}.conll, found none for {part}")
        if found:
            files[part] = found[0]
    parts = {part: read_conll(file, column, word_column) for part, file in files.items()}
    types = _types(files["train"], parts["train"])
    for part, sentences in parts.items():
        odd = sorted(sentences.types() - set(types))
        if odd:
            raise InputError(f"{files[part]}: has entities of {odd[0]!r}, and {files['train'].name} has none")
    return TagSplits(parts["train"], parts["val"], parts.get("test", parts["val"]), types)


def _types(path: Path, sentences: Sentences) -> tuple[str, ...]:
    types = sentences.types()
    if not types:
        raise InputError(f"{path}: expected entities to learn from, but all tags are O")
    return tuple(sorted(types))


def draw_sentences(path: str | Path, whole: Sentences, sizes: Sequence[int], seed: int) -> tuple[Sentences, ...]:
    """Draw parts of ``sizes`` sentences, which share none.

    Raises:
        InputError: If there are too few sentences, or a part would have none.
    """
    if min(sizes) < 1 or sum(sizes) > len(whole):
        wanted = " + ".join(map(str, sizes))
        raise InputError(f"{path}: has {len(whole)} sentences, too few for parts of {wanted}")
    order = np.random.default_rng(seed).permutation(len(whole)).tolist()
    ends = np.cumsum(sizes).tolist()
    return tuple(whole.take(order[end - size : end]) for size, end in zip(sizes, ends, strict=True))
