"""Labelled text from CSV and JSON Lines, in three parts, and as word pieces."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from .data import split_sizes
from .errors import InputError, suggestion
from .evaluation import Evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = {".csv": ",", ".tsv": "\t", ".jsonl": None, ".json": None}
PARTS = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Texts:
    """Texts with a label each.

    Attributes:
        texts: What was written.
        labels: The classes, by name.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: Sequence[int]) -> Texts:
        """Return those at ``index``, in that order."""
        return Texts(tuple(self.texts[i] for i in index), tuple(self.labels[i] for i in index))


@dataclass(frozen=True)
class TextSplits:
    """Labelled texts to train, to pick the best epoch and to test, and texts whose labels nobody looks at.

    Attributes:
        train: What is learned from.
        val: What chooses the best epoch.
        test: What the result is measured on.
        classes: Names of the classes, sorted.
        more: Further texts, none of them of ``test``, for pretraining.
    """

    train: Texts
    val: Texts
    test: Texts
    classes: tuple[str, ...]
    more: tuple[str, ...] = field(default=(), repr=False)

    def sizes(self) -> str:
        """Return the number of texts in each part, in words."""
        more = f", {len(self.more)} without labels" if self.more else ""
        return split_sizes(self.train, self.val, self.test) + more


def read_texts(path: str | Path, text_column: str = "text", label_column: str = "label") -> Texts:
    """Read a file with a text and a label in each row.

    Args:
        path: ``.csv`` or ``.tsv`` with a heading, or ``.jsonl`` with an object in each line; UTF-8.
        text_column: Where the text is.
        label_column: Where the label is; numbers become words.

    Raises:
        InputError: If the file cannot be read or lacks a column, or a row its text or label; with the line.
    """
    path = Path(path)
    if path.suffix not in KINDS:
        raise InputError(f"{path}: expected a file that ends in {', '.join(KINDS)}")
    texts, labels = [], []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = _json_rows(path, file) if KINDS[path.suffix] is None else _csv_rows(path, file)
            for line, row in rows:
                for column, option in ((text_column, "--text-column"), (label_column, "--label-column")):
                    if column not in row:
                        near = suggestion(column, row) or f"; there are {', '.join(map(repr, row))}"
                        raise InputError(f"{path}, line {line}: {option} {column!r} is not there{near}")
                    if row[column] is None or not str(row[column]).strip():
                        raise InputError(f"{path}, line {line}: {column!r} is empty")
                    if isinstance(row[column], (dict, list)):
                        kind = type(row[column]).__name__
                        raise InputError(f"{path}, line {line}: {column!r}: expected words, got {kind}")
                texts.append(str(row[text_column]))
                labels.append(str(row[label_column]).strip())
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8, got other bytes ({error.reason})") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if not texts:
        raise InputError(f"{path}: expected rows, got none")
    return Texts(tuple(texts), tuple(labels))


def _csv_rows(path: Path, file: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(file, delimiter=KINDS[path.suffix], strict=True)
    try:
        for row in reader:
            if None in row:
                wanted = len(reader.fieldnames or ())
                raise InputError(
                    f"{path}, line {reader.line_num}: expected {wanted} columns, got more; quote commas"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(
            f"{path}, line {reader.reader.line_num}: {error}"
        ) from error  # its own is of the row before


def _json_rows(path: Path, file: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
        yield number, row


def text_folder(
    path: str | Path,
    text_column: str = "text",
    label_column: str = "label",
    *,
    holdout: float = 0.3,
    seed: int = 0,
) -> TextSplits:
    """Read a file, of which a share is set aside, or a folder with files ``train``, ``val`` and maybe ``test``.

    Args:
        path: As for :func:`read_texts`, or a folder of such files; ``valid`` and ``dev`` are ``val`` too. Without
            ``test``, ``val`` tests as well.
        text_column: Where the text is.
        label_column: Where the label is.
        holdout: Share of each class of a single file that is set aside, half to pick the epoch, half to test.
        seed: Draws what is set aside.

    Raises:
        InputError: As :func:`read_texts` does; if there is nothing at ``path``, there is one class only, a class
            has too few texts to split, or a label of another part is not in the training part.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"no such file or folder: {path}")
    if not path.is_dir():
        whole = read_texts(path, text_column, label_column)
        classes = _classes(path, whole)
        held = {name: max(2, round(whole.labels.count(name) * holdout)) for name in classes}
        val, test, train = draw_texts(path, whole, {n: k // 2 for n, k in held.items()}, held, seed)
        return TextSplits(train, val, test, classes)
    files: dict[str, list[Path]] = {
        part: [file for name in names for file in sorted(path.glob(f"{name}.*")) if file.suffix in KINDS]
        for part, names in PARTS.items()
    }
    for part, found in files.items():
        if len(found) > 1:
            raise InputError(f"{path}: expected one file for {part}, got {found[0].name} and {found[1].name}")
        if not found and part != "test":
            raise InputError(
                f"{path}: expected files train and val, such as {part}.csv, and found none for {part}"
            )
    parts = {part: read_texts(found[0], text_column, label_column) for part, found in files.items() if found}
    classes = _classes(files["train"][0], parts["train"])
    for part in parts:
        odd = sorted(set(parts[part].labels) - set(classes))
        if odd:
            raise InputError(f"{files[part][0]}: label {odd[0]!r} is not in {files['train'][0].name}")
    return TextSplits(parts["train"], parts["val"], parts.get("test", parts["val"]), classes)


def draw_texts(
    path: Path, whole: Texts, first: Mapping[str, int], both: Mapping[str, int], seed: int
) -> tuple[Texts, Texts, Texts]:
    """Draw for each class ``first`` texts, then more up to ``both``, and return these two parts and the rest.

    Raises:
        InputError: If a class has no more than ``both`` texts.
    """
    generator = np.random.default_rng(seed)
    labels, parts = np.array(whole.labels), ([], [], [])
    for name in sorted(set(whole.labels)):
        index = generator.permutation(np.flatnonzero(labels == name)).tolist()
        if len(index) <= both[name]:
            raise InputError(
                f"{path}: label {name!r} has {len(index)} texts; splitting takes more than {both[name]}"
            )
        cut = (index[: first[name]], index[first[name] : both[name]], index[both[name] :])
        for part, some in zip(parts, cut, strict=True):
            part.extend(some)
    return tuple(whole.take(generator.permutation(part).tolist()) for part in parts)


def _classes(path: Path, texts: Texts) -> tuple[str, ...]:
    classes = tuple(sorted(set(texts.labels)))
    if len(classes) < 2:
        raise InputError(f"{path}: expected 2 labels or more, got only {classes[0]!r}")
    if len(classes) > len(texts) // 2:
        rarest = Counter(texts.labels).most_common()[-1][0]
        raise InputError(
            f"{path}: {len(classes)} labels in {len(texts)} rows, such as {rarest!r}; not a class each?"
        )
    return classes


class TokenisedTexts(Dataset):
    """Labelled texts as word pieces: mappings of lists, for :class:`Pad`, with the class's number as ``"labels"``.

    Args:
        texts: The texts.
        classes: Names of the classes.
        tokenizer: Makes word pieces of them.
        longest: Longer texts are cut, the end first.
    """

    def __init__(
        self, texts: Texts, classes: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int = 128
    ):
        encoded = tokenizer(list(texts.texts), truncation=True, max_length=longest)
        number = {name: i for i, name in enumerate(classes)}
        self.samples = [
            {**{name: values[i] for name, values in encoded.items()}, "labels": number[label]}
            for i, label in enumerate(texts.labels)
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index]


def text_baseline(name: str, splits: TextSplits) -> Evaluation:
    """Return what a classifier that is no network comes to on the test part.

    Args:
        name: ``"majority"``, always the most frequent class; or ``"n-grams"``, logistic regression over weights
            (tf-idf) of runs of 2 to 4 characters within words, which learns from few labels.
        splits: The texts.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.pipeline import make_pipeline

    if name == "majority":
        model = DummyClassifier(strategy="prior")
    else:
        grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
        model = make_pipeline(grams, LogisticRegression(C=10.0, max_iter=1000))
    number = {label: i for i, label in enumerate(splits.classes)}
    model.fit(splits.train.texts, [number[label] for label in splits.train.labels])
    targets = [number[label] for label in splits.test.labels]
    shares = model.predict_proba(splits.test.texts)  # (n, classes that are in train)
    predictions = model.classes_[shares.argmax(1)].tolist()
    right = sum(t == p for t, p in zip(targets, predictions, strict=True))
    loss = log_loss(targets, shares, labels=model.classes_)
    return Evaluation(float(loss), 100 * right / len(targets), targets, predictions, shares.max(1).tolist())


def macro_f1(found: Evaluation) -> float:
    """Return the mean F1 over the classes, in percent."""
    from sklearn.metrics import f1_score

    return 100 * float(f1_score(found.targets, found.predictions, average="macro", zero_division=0.0))


def text_mistakes(texts: Sequence[str], found: Evaluation, classes: Sequence[str], *, most: int = 20) -> str:
    """Return a table, in Markdown, of the texts that were misclassified with the most confidence."""
    rows = zip(found.confidences, texts, found.targets, found.predictions, strict=True)
    wrong = sorted((row for row in rows if row[2] != row[3]), key=lambda row: -row[0])
    lines = [f"{len(wrong)} of {len(texts)} texts", "", "| sure | true | predicted | text |", "|---|---|---|---|"]
    for confidence, text, target, prediction in wrong[:most]:
        words = " ".join(text.split()).replace("|", "\\|")[:200]
        lines.append(f"| {100 * confidence:.0f} % | {classes[target]} | {classes[prediction]} | {words} |")
    return "\n".join(lines)
