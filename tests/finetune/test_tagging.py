"""Tags for words: word pieces of three kinds of tokenizers, scores of entities, baselines."""

import io
import random

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from seqeval.scheme import IOB2, Entities
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerFast, RobertaTokenizerFast

from bptools import finetune as ft

LABELS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
TEXTS = ["रवि शर्मा दिल्ली में रहते हैं ।", "आशा पटना से मुंबई गई ।", "गंगा काशी से होकर बहती है ।"]


def sentences(*lines):
    """Sentences written as ``word/TAG word ...``; a word without a tag is ``O``."""
    pairs = [[word.partition("/") for word in line.split()] for line in lines]
    words = tuple(tuple(word for word, _, _ in line) for line in pairs)
    return ft.Sentences(words, tuple(tuple(tag or "O" for _, _, tag in line) for line in pairs))


SOME = sentences("रवि/B-PER शर्मा/I-PER दिल्ली/B-LOC में रहते हैं ।", "आशा/B-PER पटना/B-LOC गई ।")


def bert(pieces=None, **options):
    """A tokenizer of BERT's class, with vowel signs in its pieces."""
    own = ft.word_pieces(TEXTS, 60)
    vocab = {piece: i for i, piece in enumerate(pieces or sorted(own.get_vocab(), key=own.get_vocab().get))}
    return BertTokenizerFast(vocab=vocab, do_lower_case=False, **options)


def roberta(**options):
    merges = [("Ġ", "à"), ("Ġà", "¤")]
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {piece: i for i, piece in enumerate([*names, *map("".join, merges)])}
    return RobertaTokenizerFast(vocab=vocab, merges=merges, **options)


@pytest.mark.parametrize("kind", ["own", "bert", "roberta"])
def test_a_tag_is_at_the_first_piece_of_its_word(kind):
    tokenizer = {"own": lambda: ft.word_pieces(TEXTS, 60), "bert": bert, "roberta": roberta}[kind]()
    data = ft.TaggedWords(SOME, LABELS, ft.words_apart(tokenizer))
    assert len(data) == 2
    for sample, words, tags in zip(data, SOME.words, SOME.tags, strict=True):
        assert len(sample["labels"]) == len(sample["input_ids"]) > len(words) + 2
        assert sample["labels"][0] == sample["labels"][-1] == -100
        marked = [i for i, label in enumerate(sample["labels"]) if label != -100]
        assert [LABELS[sample["labels"][i]] for i in marked] == list(tags)
        bounds = zip(marked, [*marked[1:], len(sample["labels"]) - 1], strict=True)
        assert [tokenizer.decode(sample["input_ids"][a:b]).strip() for a, b in bounds] == list(words)
    labels = [label for sample in data for label in sample["labels"] if label != -100]
    assert data.tags(labels) == list(map(list, SOME.tags))


def test_a_batch_is_padded_with_labels_that_do_not_count():
    data = ft.TaggedWords(SOME, LABELS, tokenizer := bert())
    batch = ft.Pad(tokenizer)([data[0], data[1]])
    short = len(data[1]["labels"])
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    assert (batch["labels"][1, short:] == -100).all()
    assert not batch["attention_mask"][1, short:].any()
    assert ft.count_tokens(shift=False)(batch) == 11


def test_a_word_without_pieces_is_outside_and_shifts_nothing():
    some = sentences("रवि/B-PER \u200d/B-LOC दिल्ली/B-LOC ।")
    data = ft.TaggedWords(some, LABELS, bert())
    assert data.tags([3, 1, 0]) == [["B-PER", "O", "B-LOC", "O"]]
    lone = ft.TaggedWords(sentences("\u200d/B-LOC"), LABELS, bert())
    assert lone.tags([]) == [["O"]]


@pytest.mark.parametrize("longest", [8, 12, 20])
def test_a_long_sentence_is_cut_and_no_tag_is_lost(longest):
    words = [f"{word}/{tag}" for word, tag in zip(SOME.words[0], SOME.tags[0], strict=True)] * 5
    some = sentences(" ".join(words), "रवि/B-PER")
    data = ft.TaggedWords(some, LABELS, bert(), longest)
    assert len(data) > 3
    assert max(len(sample["input_ids"]) for sample in data) <= longest
    labels = [label for sample in data for label in sample["labels"] if label != -100]
    assert len(labels) == 36
    assert data.tags(labels) == list(map(list, some.tags))
    seen = [sum(i == 0 for i, _ in data.places), [word for i, place in data.places if i == 0 for word in place]]
    assert seen == [len(data) - 1, list(range(35))]


def test_a_window_begins_with_words_of_the_one_before():
    tokenizer = ft.word_pieces(["a b c d e f g h i j k l m n"], 60)
    data = ft.TaggedWords(sentences("a b c d e f g h i j k l m n"), ("O",), tokenizer, 10)
    texts = [tokenizer.decode(sample["input_ids"], skip_special_tokens=True) for sample in data]
    assert texts == ["a b c d e f g h", "g h i j k l m n"]
    assert data[1]["labels"] == [-100, -100, -100, 0, 0, 0, 0, 0, 0, -100]


def test_a_word_longer_than_the_model_keeps_its_tag():
    tokenizer = ft.word_pieces(["a b c abcabc"], 11)  # no piece has two letters
    data = ft.TaggedWords(sentences("a b abcabcabcabcabcabc/B-PER c"), LABELS, tokenizer, 8)
    assert [label for sample in data for label in sample["labels"] if label != -100] == [0, 0, 3, 0]
    assert max(len(sample["input_ids"]) for sample in data) == 8


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ft.InputError, match="--model: expected a fast tokenizer"):
        ft.TaggedWords(SOME, LABELS, Slow())


# Without words_apart, transformers 5 makes pieces of "b" in "a b" as if it stood within a word, and says nothing.
def test_a_tokenizer_of_bytes_begins_words_as_after_a_space(tmp_path):
    plain, split = roberta(), {"is_split_into_words": True, "add_special_tokens": False}
    words = ["दिल्ली", "रवि"]
    wanted = plain(" दिल्ली रवि", add_special_tokens=False)["input_ids"]
    assert plain(words, **split)["input_ids"] != wanted
    apart = ft.words_apart(plain)
    assert apart is plain
    assert apart(words, **split)["input_ids"] == wanted
    apart.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(words, **split)["input_ids"] == wanted


def test_a_tokenizer_of_bytes_within_a_sequence(tmp_path):
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), byte_level])
    whole = ft.words_apart(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert whole(["a", "b"], is_split_into_words=True).tokens() == ["Ġ", "a", "Ġ", "b"]
    whole.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(["a", "b"], is_split_into_words=True).tokens() == ["Ġ", "a", "Ġ", "b"]


def test_word_pieces_are_left_as_they_are():
    tokenizer = bert()
    before = tokenizer.backend_tokenizer.to_str()
    assert ft.words_apart(tokenizer).backend_tokenizer.to_str() == before


def test_a_tokenizer_that_strips_vowel_signs_is_noticed():
    strip = BertTokenizerFast(vocab={"[UNK]": 0}, do_lower_case=True).backend_tokenizer.normalizer.normalize_str
    stripped = {strip(word) for words in SOME.words for word in words}
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(stripped)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    assert ft.tokenizer_notes(BertTokenizerFast(vocab=vocab, do_lower_case=True), SOME) == [
        "tokenizer: 5 of 10 words, such as 'दिल्ली', which becomes 'दिलली', lose their marks or vowel signs; "
        "take a tokenizer that is cased, or keeps accents"
    ]
    kept = BertTokenizerFast(vocab=bert().get_vocab(), do_lower_case=True, strip_accents=False)
    assert ft.tokenizer_notes(kept, SOME) == []


@pytest.mark.parametrize("make", [bert, roberta, lambda: ft.word_pieces(TEXTS, 60)])
def test_a_tokenizer_that_can_read_these_words_gets_no_note(make):
    assert ft.tokenizer_notes(make(), SOME) == []


def test_unknown_words_and_words_without_pieces_are_noticed():
    some = sentences("रवि xyz \u200d आशा xyz")
    assert ft.tokenizer_notes(bert(), some) == [
        "tokenizer: 1 of 4 words, such as 'xyz', have a piece that is unknown",
        "tokenizer: 1 of 4 words, such as '\\u200d', have no piece, and are tagged O",
    ]
    assert ft.tokenizer_notes(roberta(), sentences("रवि xyz")) == []


def test_the_head_of_a_tagger_keeps_its_order(tmp_path):
    from transformers import BertConfig

    own = ("O", "I-LOC", "B-LOC")
    BertConfig(**ft.label_names(own)).save_pretrained(tmp_path)
    assert ft.labels_of_head(str(tmp_path), ("O", "B-LOC", "I-LOC")) == own
    assert ft.labels_of_head(str(tmp_path), ("O", "B-PER", "I-PER")) == ("O", "B-PER", "I-PER")
    assert ft.labels_of_head(str(tmp_path / "none"), ["O", "B-LOC"]) == ("O", "B-LOC")


def test_outputs_are_those_of_words():
    class Model(torch.nn.Module):
        def forward(self, input_ids):
            class Out:
                logits = torch.nn.functional.one_hot(input_ids, 5).float()

            return Out

    batch = {"input_ids": torch.tensor([[0, 3], [4, 1]]), "labels": torch.tensor([[-100, 2], [1, -100]])}
    logits, labels = ft.tagged_outputs(Model(), batch)
    assert logits.argmax(1).tolist() == [3, 4]
    assert labels.tolist() == [2, 1]


def test_scores_count_whole_entities():
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "I-LOC", "O"]]
    guess = [["B-PER", "I-PER", "O", "B-PER"], ["B-LOC", "O", "I-LOC"]]  # the last is no entity
    scores = ft.entity_scores(true, guess)
    assert scores.entities == 3
    assert scores[:3] == pytest.approx((100 / 3, 100 / 3, 100 / 3))
    assert scores.types == {"LOC": (0, 0, 0, 2), "PER": pytest.approx((50, 100, 200 / 3, 1))}
    assert ft.entity_scores(true, true)[:4] == (100, 100, 100, 3)


@pytest.mark.parametrize(("true", "guess"), [(["O"], ["O"]), (["B-A"], ["O"]), (["O"], ["B-A"])])
def test_undefined_scores_are_0_without_a_warning(true, guess):
    assert ft.entity_scores([true], [guess])[:3] == (0, 0, 0)


def test_entities_are_those_of_seqeval():
    generator = random.Random(0)
    for _ in range(300):
        tags = generator.choices(LABELS, k=generator.randrange(1, 9))
        theirs = [(one.tag, one.start, one.end) for one in Entities([tags], IOB2).entities[0]]
        assert ft.entities(tags) == theirs, tags


def test_the_tag_that_a_word_has_most_often():
    train = sentences("काशी/B-PER काशी/B-LOC", "काशी/B-LOC में")
    assert ft.tags_by_word(train, [["काशी", "नगर"], ["में"]]) == [["B-LOC", "O"], ["O"]]


def test_the_dictionary_takes_the_longest_name():
    train = sentences("नई/B-LOC दिल्ली/I-LOC", "दिल्ली/B-LOC रवि/B-PER", "रवि/B-LOC", "रवि/B-PER")
    words = [["नई", "दिल्ली", "दिल्ली", "नई", "रवि"], ["और"]]
    assert ft.tags_by_dictionary(train, words) == [["B-LOC", "I-LOC", "B-LOC", "O", "B-PER"], ["O"]]
    assert ft.tags_by_dictionary(sentences("और"), words) == [["O"] * 5, ["O"]]


def test_regression_goes_by_neighbours_and_by_ends():
    train = sentences(
        "रवि/B-PER ने कहा", "मोहन/B-PER ने देखा", "गीता/B-PER ने कहा", "वह रामपुर/B-LOC में है", "वे कानपुर/B-LOC में थे"
    )
    found = ft.tags_by_regression(train, [["सीता", "ने", "कहा"], [], ["वह", "जयपुर", "में", "है"]])
    assert found == [["B-PER", "O", "O"], [], ["O", "B-LOC", "O", "O"]]
    names = ["रवि/B-PER ने", "मोहन/B-PER ने", "गीता/B-PER ने", "दिल्ली/B-LOC में", "काशी/B-LOC में", "पटना/B-LOC में"]
    found = ft.tags_by_regression(sentences(*names), [["अनिल", "ने"], ["अनिल", "में"]])
    assert found == [["B-PER", "O"], ["B-LOC", "O"]]  # by what comes after
    assert ft.tags_by_regression(sentences("और वह"), [["और"], ["मोहन", "ने"]]) == [["O"], ["O", "O"]]


def test_a_table_of_types():
    scores = ft.entity_scores([["B-PER", "B-LOC"]], [["B-PER", "O"]])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(ft.entity_table("names", scores))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["LOC", "0.0", "0.0", "0.0", "1"] in lines
    assert ["PER", "100.0", "100.0", "100.0", "1"] in lines
    assert ["all", "100.0", "50.0", "66.7", "2"] in lines


def test_bars_for_types():
    scores = ft.entity_scores([["B-PER", "B-LOC"]], [["B-PER", "O"]])
    axes = Figure().subplots()
    ft.draw_types(axes, {"full": scores, "head": scores}, ("LOC", "ORG", "PER"))
    assert [patch.get_height() for patch in axes.patches] == [0, 0, 100, 0, 0, 100]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["full", "head"]


def test_wrong_sentences_are_shown():
    words, true = [list(one) for one in SOME.words], [list(one) for one in SOME.tags]
    guess = [["B-PER", "O", *true[0][2:]], true[1]]
    assert ft.tag_mistakes(words, true, guess) == (
        "1 of 2 sentences have a wrong entity\n\n"
        "    true       [रवि शर्मा PER] [दिल्ली LOC] में रहते हैं ।\n"
        "    predicted  [रवि PER] शर्मा [दिल्ली LOC] में रहते हैं ।"
    )
    assert ft.tag_mistakes(words, true, true) == "0 of 2 sentences have a wrong entity"
    both = ft.tag_mistakes(words, true, [["O"] * 7, ["O"] * 4], most=1)
    assert both.startswith("2 of 2 sentences have a wrong entity, 1 of them below\n")
    assert both.count("predicted") == 1
