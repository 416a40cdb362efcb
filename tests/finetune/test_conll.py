"""Reading sentences with tags: columns, the ways in which tags are written, and parts."""

import re

import pytest

from bptools import finetune as ft
from bptools.finetune.conll import KINDS


def written(folder, text, name="x.conll"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def tagged(*sentences):
    """A file of sentences, each given as its tags."""
    return "\n\n".join("\n".join(f"w{i} {tag}" for i, tag in enumerate(tags.split())) for tags in sentences)


def test_words_and_tags_of_sentences(tmp_path):
    text = "\ufeffरवि B-PER\nशर्मा I-PER\nआए O\r\n   \n\n\nदिल्ली\u00a0वाले B-LOC\n"
    read = ft.read_conll(written(tmp_path, text))
    assert read.words == (("रवि", "शर्मा", "आए"), ("दिल्ली\u00a0वाले",))
    assert read.tags == (("B-PER", "I-PER", "O"), ("B-LOC",))
    assert len(read) == 2
    assert read.types() == {"PER", "LOC"}
    assert read.take([1]).words == (("दिल्ली\u00a0वाले",),)


def test_columns_document_marks_and_comments(tmp_path):
    text = "-DOCSTART- -X- O O\n\n# id 7\n1 U.N. NNP I-ORG\n2 # SYM O\n-DOCSTART- -X- O O\n1 official NN O\n"
    read = ft.read_conll(written(tmp_path, text), word_column=2)
    assert read.words == (("U.N.", "#"), ("official",))
    assert read.tags == (("B-ORG", "O"), ("O",))
    assert ft.read_conll(written(tmp_path, "B-X a b\n"), column=1, word_column=-1).words == (("b",),)
    assert ft.read_conll(written(tmp_path, "# O\n")).words == (("#",),)  # a word
    assert ft.read_conll(written(tmp_path, "New Delhi\tB-LOC\t\n\t\n")).words == (("New Delhi",),)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("O B-A I-A B-A B-B O", "O B-A I-A B-A B-B O"),  # IOB2
        ("I-A I-A B-A I-A I-B O I-A", "B-A I-A B-A I-A B-B O B-A"),  # IOB1
        ("B-A I-A E-A S-A S-B B-B E-B", "B-A I-A I-A B-A B-B B-B I-B"),  # BIOES
        ("B-A I-A L-A U-A O", "B-A I-A I-A B-A O"),  # BILOU
        ("O O", "O O"),
        ("I-A-B I-A", "B-A-B B-A"),
    ],
)
def test_tags_become_iob2(tmp_path, given, wanted):
    assert ft.read_conll(written(tmp_path, tagged(given))).tags == (tuple(wanted.split()),)


def test_an_entity_ends_with_its_sentence(tmp_path):
    assert ft.read_conll(written(tmp_path, tagged("O I-A", "I-A O"))).tags == (("O", "B-A"), ("B-A", "O"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a O\nb PER\n", "line 2: expected a tag such as O, B-PER or I-PER, got 'PER'"),
        ("a B-\n", "line 1: expected a tag such as"),
        ("a X-PER\n", "line 1: expected a tag such as"),
        ("a O\n\nb\n", "line 3: expected a tag such as O, B-PER or I-PER, got 'b'"),
        ("\tO\n", "line 1: has 2 columns, and none for --word-column 1"),
        (tagged("B-A O I-A"), "line 3: I-A after O begins no entity in IOB2, and B-A in line 1 is not of IOB1"),
        (tagged("O", "B-A I-B"), "line 4: I-B after B-A begins no entity in IOB2, and B-A in line 3"),
        (tagged("S-A I-A E-A"), "line 2: I-A after S-A begins no entity in BIOES"),
        (tagged("B-A E-B"), "line 1: B-A before E-B ends no entity in BIOES"),
        (tagged("S-A B-A I-A", "E-A"), "line 3: I-A before O ends no entity in BIOES"),
        (tagged("E-A"), "line 1: E-A after O begins no entity in BIOES"),
        ("\n-DOCSTART- O\n", "expected sentences, got none"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, text, words):
    path = written(tmp_path, text)
    with pytest.raises(ft.InputError, match=re.escape(words)) as error:
        ft.read_conll(path)
    assert str(error.value).startswith(str(path))


def test_a_column_that_is_not_there(tmp_path):
    path = written(tmp_path, "a b O\nc O\n")
    with pytest.raises(ft.InputError, match=r"line 2: has 2 columns, and none for --column 3"):
        ft.read_conll(path, 3)
    with pytest.raises(ft.InputError, match=r"line 2: has 2 columns, and none for --column -3"):
        ft.read_conll(written(tmp_path, "O b a\nO b\n"), -3, 2)
    with pytest.raises(ft.InputError, match=r"^--column 0: the first column is 1"):
        ft.read_conll(path, 0)
    with pytest.raises(ft.InputError, match=r"^--word-column 0: "):
        ft.read_conll(path, word_column=0)


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(ft.InputError, match=r"none\.conll: No such file"):
        ft.read_conll(tmp_path / "none.conll")
    (tmp_path / "x.conll").write_bytes(b"\xff\xfe O\n")
    with pytest.raises(ft.InputError, match=r"x\.conll: expected UTF-8"):
        ft.read_conll(tmp_path / "x.conll")


@pytest.mark.parametrize("names", [("train.conll", "dev.txt", "test.tsv"), ("train.bio", "valid.bio", "test.bio")])
def test_a_folder_of_parts(tmp_path, names):
    for name, tags in zip(names, ("B-B I-B B-A", "B-A", "I-B"), strict=True):
        written(tmp_path, tagged(tags), name)
    splits = ft.conll_folder(tmp_path)
    assert [part.tags for part in (splits.train, splits.val, splits.test)] == [
        (("B-B", "I-B", "B-A"),),
        (("B-A",),),
        (("B-B",),),  # a file of IOB1
    ]
    assert splits.types == ("A", "B")
    assert splits.labels == ("O", "B-A", "I-A", "B-B", "I-B")
    assert splits.sizes() == "1 to train, 1 to pick the best epoch, 1 to test"
    (tmp_path / names[2]).unlink()
    splits = ft.conll_folder(tmp_path)
    assert splits.test is splits.val
    assert splits.sizes() == "1 to train, 1 to pick the best epoch and to test"


def test_folders_that_will_not_do(tmp_path):
    written(tmp_path, tagged("B-A"), "train.conll")
    with pytest.raises(ft.InputError, match="found none for val"):
        ft.conll_folder(tmp_path)
    written(tmp_path, tagged("B-A B-C"), "dev.conll")
    with pytest.raises(ft.InputError, match=r"dev\.conll: has entities of 'C', and train\.conll has none"):
        ft.conll_folder(tmp_path)
    written(tmp_path, tagged("B-A"), "val.txt")
    with pytest.raises(ft.InputError, match=r"expected one file for val, got val\.txt and dev\.conll"):
        ft.conll_folder(tmp_path)
    (tmp_path / "val.txt").unlink()
    written(tmp_path, tagged("O O"), "train.conll")
    with pytest.raises(ft.InputError, match=r"train\.conll: expected entities to learn from, but all tags are O"):
        ft.conll_folder(tmp_path)
    assert ".conll" in KINDS


def test_a_file_is_split_by_seed(tmp_path):
    path = written(tmp_path, "\n\n".join(f"w{i} B-A" for i in range(20)))
    first, again, other = (ft.conll_folder(path, holdout=0.3, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    parts = [first.train.words, first.val.words, first.test.words]
    assert list(map(len, parts)) == [14, 3, 3]
    assert len({word for part in parts for (word,) in part}) == 20
    path = written(tmp_path, tagged("B-A", "O", "O"))
    assert list(map(len, (ft.conll_folder(path).val, ft.conll_folder(path).test))) == [1, 1]
    assert ft.conll_folder(path).types == ("A",)
    with pytest.raises(ft.InputError, match=r"x\.conll: has 2 sentences, too few for parts of 0 \+ 1 \+ 1"):
        ft.conll_folder(written(tmp_path, tagged("B-A", "O")))


def test_parts_share_no_sentence():
    whole = ft.Sentences(tuple((str(i),) for i in range(9)), (("O",),) * 9)
    parts = ft.draw_sentences("f", whole, (4, 3), 5)
    assert list(map(len, parts)) == [4, 3]
    assert not set(parts[0].words) & set(parts[1].words)
    with pytest.raises(ft.InputError, match=r"^f: has 9 sentences, too few for parts of 4 \+ 6$"):
        ft.draw_sentences("f", whole, (4, 6), 5)
