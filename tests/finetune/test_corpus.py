import pytest
from transformers import AutoTokenizer

from bptools.finetune import InputError, byte_pairs, python_help, word_pieces

HINDI = "मुझे कल दिल्ली जाना है, ticket book kar do"


def test_pythons_help_is_text():
    texts = python_help()
    assert len(texts) == len(set(texts)) > 1500
    assert 300_000 < sum(map(len, texts)) < 1_000_000
    assert not any("\n" in text for text in texts)
    assert any("Assignment" in text for text in texts)


@pytest.mark.parametrize("lower", [False, True])
def test_word_pieces_know_what_they_were_trained_on(tmp_path, lower):
    tokenizer = word_pieces([*python_help(), HINDI], 1200, lower=lower)
    assert len(tokenizer) <= 1200
    encoded = tokenizer(HINDI, "class Book")
    assert tokenizer.unk_token_id not in encoded["input_ids"]
    assert encoded["input_ids"][0] == tokenizer.cls_token_id
    assert encoded["input_ids"].count(tokenizer.sep_token_id) == 2
    ids = tokenizer(HINDI, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids).replace(" ", "") == (HINDI.lower() if lower else HINDI).replace(" ", "")
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(HINDI)["input_ids"] == tokenizer(HINDI)["input_ids"]


# Trainers go through hash tables of random order; a resumed job, or another process, trains anew.
@pytest.mark.parametrize("train", [word_pieces, byte_pairs])
def test_the_same_pieces_each_time(train):
    one, *others = (train([*python_help()[:200], HINDI], 700).get_vocab() for _ in range(4))
    assert all(other == one for other in others)


def test_byte_pairs_know_everything(tmp_path):
    tokenizer = byte_pairs(python_help(), 800, ["<|user|>"])
    assert len(tokenizer) == 800
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    text = f"<|user|>{HINDI} 🙂\n  two  spaces"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|user|>") == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removeprefix("<|user|>")
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids


@pytest.mark.parametrize("train", [word_pieces, byte_pairs])
def test_no_text(train):
    with pytest.raises(InputError, match="expected words"):
        train(["", " "], 300)
