import json
import re

import numpy as np
import pytest
from torch.utils.data import DataLoader

from bptools.finetune import (
    Evaluation,
    InputError,
    Pad,
    Texts,
    TextSplits,
    TokenisedTexts,
    draw_texts,
    macro_f1,
    read_texts,
    text_baseline,
    text_folder,
    text_mistakes,
    word_pieces,
)

ROWS = [
    (f"{word} {i}", label) for i in range(10) for word, label in (("paisa wapas", "refund"), ("kal milo", "meet"))
]
ROWS += [(f"phone band {i}", "tech") for i in range(6)]


def write_csv(path, rows, heading=("text", "label"), mark=","):
    path.write_text("\n".join(mark.join(map(str, row)) for row in [heading, *rows]) + "\n", encoding="utf-8")
    return path


def write_json(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
def test_each_kind_of_file_gives_the_same(tmp_path, suffix):
    rows = [("मुझे ticket, चाहिए", "book"), ('say "hi"\nthere', "meet"), (" 5 ", 3), ("a\tb", " x ")]
    path = tmp_path / f"some{suffix}"
    if suffix.startswith(".json"):
        write_json(path, [{"id": 1, "text": text, "label": label} for text, label in rows])
        path.write_text(path.read_text() + "\n", encoding="utf-8")  # an empty line
    else:
        quoted = [(1, *('"' + str(cell).replace('"', '""') + '"' for cell in row)) for row in rows]
        write_csv(path, quoted, ("id", "text", "label"), "," if suffix == ".csv" else "\t")
    found = read_texts(path)
    assert found == Texts(tuple(text for text, _ in rows), ("book", "meet", "3", "x"))
    assert len(found) == 4
    assert found.take([3, 0]) == Texts(("a\tb", "मुझे ticket, चाहिए"), ("x", "book"))
    assert read_texts(path, "label", "id").texts == ("book", "meet", "3", " x ")


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text("\ufefftext,label\na,b\n", encoding="utf-8")
    assert read_texts(path) == Texts(("a",), ("b",))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"text,label\n", "{}: expected a file that ends in .csv, .tsv, .jsonl, .json"),
        ("a.csv", None, "{}: No such file or directory"),
        ("a.csv", b"", "{}: expected rows, got none"),
        ("a.csv", b"text,label\n", "{}: expected rows, got none"),
        ("a.csv", b"text,lable\nx,y\n", "{}, line 2: --label-column 'label' is not there (did you mean 'lable'?)"),
        ("a.csv", b"a,b\nx,y\n", "{}, line 2: --text-column 'text' is not there; there are 'a', 'b'"),
        ("a.csv", b"text,label\nx,y\n  ,y\n", "{}, line 3: 'text' is empty"),
        ("a.csv", b"text,label\nx,y\nx\n", "{}, line 3: 'label' is empty"),
        ("a.csv", b"text,label\nx,y\nx,y,z\n", "{}, line 3: expected 2 columns, got more; quote commas"),
        ("a.csv", b'text,label\n"x"y,z\n', "{}, line 2: ',' expected after '\"'"),
        ("a.csv", b'text,label\nx,y\n"x,y\n', "{}, line 3: unexpected end of data"),
        ("a.csv", b"text,label\n\xe9t\xe9,y\n", "{}: expected UTF-8, got other bytes (invalid continuation byte)"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text"\n', "{}, line 2: not JSON: "),
        ("a.jsonl", b'\n["a", 1]\n', "{}, line 2: expected an object, got list"),
        ("a.jsonl", b'{"text": "a"}\n', "{}, line 1: --label-column 'label' is not there; there are 'text'"),
        ("a.jsonl", b'{"text": null, "label": 1}\n', "{}, line 1: 'text' is empty"),
        ("a.jsonl", b'{"text": ["a", "b"], "label": 1}\n', "{}, line 1: 'text': expected words, got list"),
        ("a.jsonl", b"\n\n", "{}: expected rows, got none"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(words.format(path))}") as error:
        read_texts(path)
    assert "\n" not in str(error.value)


def test_a_row_over_several_lines_is_counted_where_it_ends(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"x\ny",z\n"x\ny",\n')
    with pytest.raises(InputError, match="line 5: 'label' is empty"):
        read_texts(path)


# Splitting ------------------------------------------------------------------------------------------------------


def test_a_single_file_is_split_by_class(tmp_path):
    path = write_csv(tmp_path / "all.csv", ROWS)
    splits = text_folder(path, holdout=0.4, seed=3)
    assert splits.classes == ("meet", "refund", "tech")
    count = {
        part: [getattr(splits, part).labels.count(c) for c in splits.classes] for part in ("train", "val", "test")
    }
    assert count == {"train": [6, 6, 4], "val": [2, 2, 1], "test": [2, 2, 1]}
    parts = [[*zip(part.texts, part.labels, strict=True)] for part in (splits.train, splits.val, splits.test)]
    assert sorted(row for part in parts for row in part) == sorted(ROWS)
    assert list(splits.train.labels) != sorted(splits.train.labels)
    assert text_folder(path, holdout=0.4, seed=3) == splits
    assert text_folder(path, holdout=0.4, seed=4).test != splits.test
    assert splits.sizes() == "16 to train, 5 to pick the best epoch, 5 to test"


def test_a_little_held_out_is_one_of_each_class_for_either_part(tmp_path):
    splits = text_folder(write_csv(tmp_path / "all.csv", ROWS), holdout=0.001)
    assert sorted(splits.val.labels) == sorted(splits.test.labels) == list(splits.classes)


@pytest.mark.parametrize("names", [("train", "val", "test"), ("train", "valid"), ("train", "dev", "test")])
def test_a_folder_has_its_parts(tmp_path, names):
    for i, name in enumerate(names):
        write_csv(tmp_path / f"{name}.csv", [(f"{name} {text}", label) for text, label in ROWS[i:]])
    (tmp_path / "train.txt").write_text("not data")
    splits = text_folder(tmp_path)
    assert [len(part) for part in (splits.train, splits.val)] == [26, 25]
    assert splits.train.texts[0] == "train paisa wapas 0"
    assert splits.test.texts[0] == f"{names[-1]} {ROWS[len(names) - 1][0]}"
    assert splits.classes == ("meet", "refund", "tech")
    assert splits.more == ()


def test_columns_are_those_named(tmp_path):
    path = write_csv(tmp_path / "all.tsv", [(i, label, text) for i, (text, label) in enumerate(ROWS)],
                     ("id", "kind", "said"), "\t")  # fmt: skip
    assert text_folder(path, "said", "kind").classes == ("meet", "refund", "tech")
    with pytest.raises(InputError, match=r"--text-column 'text' is not there"):
        text_folder(path)


def test_what_cannot_be_split(tmp_path):
    with pytest.raises(InputError, match=f"^no such file or folder: {tmp_path / 'none'}$"):
        text_folder(tmp_path / "none")
    with pytest.raises(InputError, match=f"^{tmp_path}: expected files train and val, .*found none for train$"):
        text_folder(tmp_path)
    write_csv(tmp_path / "train.csv", ROWS)
    with pytest.raises(InputError, match=r"found none for val$"):
        text_folder(tmp_path)
    val = write_csv(tmp_path / "val.csv", [*ROWS, ("x", "other")])
    with pytest.raises(InputError, match=f"^{val}: label 'other' is not in train.csv$"):
        text_folder(tmp_path)
    write_json(tmp_path / "dev.jsonl", [])
    with pytest.raises(InputError, match=f"^{tmp_path}: expected one file for val, got val.csv and dev.jsonl$"):
        text_folder(tmp_path)
    one = write_csv(tmp_path / "one.csv", [("x", "only"), ("y", "only")])
    with pytest.raises(InputError, match=f"^{one}: expected 2 labels or more, got only 'only'$"):
        text_folder(one)
    few = write_csv(tmp_path / "few.csv", [*ROWS, ("x", "rare"), ("y", "rare")])
    with pytest.raises(InputError, match=f"^{few}: label 'rare' has 2 texts; splitting takes more than 2$"):
        text_folder(few)
    ids = write_csv(tmp_path / "ids.csv", [(text, i) for i, (text, _) in enumerate(ROWS)])
    with pytest.raises(InputError, match=r"26 labels in 26 rows, such as '\d+'; not a class each\?$"):
        text_folder(ids)


def test_draw_texts():
    whole = Texts(*map(tuple, zip(*ROWS, strict=True)))
    first = {"refund": 2, "meet": 1, "tech": 3}
    both = {"refund": 3, "meet": 5, "tech": 5}
    parts = draw_texts("file", whole, first, both, 0)
    assert [{name: part.labels.count(name) for name in first} for part in parts] == [
        first, {"refund": 1, "meet": 4, "tech": 2}, {"refund": 7, "meet": 5, "tech": 1},
    ]  # fmt: skip
    assert sorted(sum((part.texts for part in parts), ())) == sorted(whole.texts)
    assert draw_texts("file", whole, first, both, 0) == parts
    assert draw_texts("file", whole, first, both, 1) != parts
    with pytest.raises(InputError, match=r"^--labels: label 'tech' has 6 texts; splitting takes more than 6$"):
        draw_texts("--labels", whole, first, both | {"tech": 6}, 0)


def test_sizes_tell_of_texts_without_labels():
    some = Texts(("a", "b"), ("x", "y"))
    splits = TextSplits(some, some, Texts(("a", "c"), ("x", "y")), ("x", "y"), ("a", "b", "c"))
    assert splits.sizes() == "2 to train, 2 to pick the best epoch, 2 to test, 3 without labels"


def test_sizes_tell_that_what_picks_the_epoch_is_tested_on():
    some = Texts(("a", "b"), ("x", "y"))
    assert TextSplits(some, some, some, ("x", "y")).sizes() == "2 to train, 2 to pick the best epoch and to test"


# As word pieces, beside simpler models, and what was wrong ------------------------------------------------------


def test_tokenised_texts():
    texts = Texts(("paisa wapas karo", "kal"), ("refund", "meet"))
    tokenizer = word_pieces([text for text, _ in ROWS] + list(texts.texts), 100)
    data = TokenisedTexts(texts, ("meet", "refund"), tokenizer)
    assert len(data) == 2
    assert data[0] == {**tokenizer("paisa wapas karo"), "labels": 1}
    assert data[1]["labels"] == 0
    short = TokenisedTexts(texts, ("meet", "refund"), tokenizer, longest=4)[0]
    whole = data[0]["input_ids"]
    assert short["input_ids"] == [*whole[:3], whole[-1]]  # the end goes, [SEP] stays
    batch = next(iter(DataLoader(data, 2, collate_fn=Pad(tokenizer))))
    assert batch["labels"].tolist() == [1, 0]
    assert batch["input_ids"].shape == (2, len(whole))


def test_baselines(tmp_path):
    splits = text_folder(write_csv(tmp_path / "all.csv", ROWS), holdout=0.4)
    most = text_baseline("majority", splits)
    assert most.predictions == [0] * 5
    assert most.accuracy == pytest.approx(40)
    assert most.confidences == pytest.approx([6 / 16] * 5)
    assert most.loss == pytest.approx(-np.log([6 / 16, 6 / 16, 6 / 16, 6 / 16, 4 / 16]).mean())
    grams = text_baseline("n-grams", splits)
    assert grams.targets == most.targets == [splits.classes.index(label) for label in splits.test.labels]
    assert grams.accuracy == 100
    assert grams.predictions == grams.targets
    assert grams.loss < 0.5 < min(grams.confidences)
    assert json.dumps(grams._asdict())  # it goes into a result.json


def test_a_baseline_of_two_classes_which_the_test_part_has_one_of():
    train = Texts(("paisa wapas", "kal milo", "paisa do"), ("refund", "meet", "refund"))
    test = Texts(("paisa",), ("refund",))
    found = text_baseline("n-grams", TextSplits(train, train, test, ("meet", "refund")))
    assert found.predictions == found.targets == [1]


def test_macro_f1_is_the_mean_over_the_classes():
    found = Evaluation(0.0, 0.0, [0, 0, 0, 1], [0, 0, 1, 2], [])
    assert macro_f1(found) == pytest.approx(100 * (0.8 + 0 + 0) / 3)


def test_the_surest_mistakes_come_first():
    texts = ["right", "a|b\nc", "surest " + 300 * "x", "less sure"]
    found = Evaluation(0.0, 25.0, [0, 1, 1, 0], [0, 0, 0, 1], [0.9, 0.7, 0.8, 0.6])
    lines = text_mistakes(texts, found, ["no", "yes"]).splitlines()
    assert lines[0] == "3 of 4 texts"
    assert lines[4] == "| 80 % | yes | no | surest " + 193 * "x" + " |"
    assert lines[5:] == ["| 70 % | yes | no | a\\|b c |", "| 60 % | no | yes | less sure |"]
    assert len(text_mistakes(texts, found, ["no", "yes"], most=1).splitlines()) == 5
