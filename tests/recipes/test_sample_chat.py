import csv
import re
import unicodedata
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path

import pytest

CHAT = Path(__file__).parents[2] / "recipes" / "data" / "chat.csv"
INTENTS = ("order_status", "refund", "booking", "recharge", "technical", "meetup")
SENTIMENTS = ("negative", "neutral", "positive")


@pytest.fixture(scope="module")
def rows():
    with CHAT.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def plain(text):
    """Lower case, without punctuation and emoji; marks stay, Devanagari's vowels are among them."""
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in text.lower())
    return " ".join("".join(kept).split())


def near(a, b, least=0.8):
    """Whether difflib's ratio reaches ``least``; it depends on the order, so either order counts."""

    def reaches(x, y):
        match = SequenceMatcher(None, x, y, autojunk=False)
        return match.quick_ratio() >= least and match.ratio() >= least

    return reaches(a, b) or reaches(b, a)


def near_copies(texts, least=0.8):
    """Pairs of near copies; only those whose lengths and letters leave it possible reach difflib."""
    letters = [Counter(text) for text in texts]
    pairs = []
    for i, a in enumerate(texts):
        for j, b in enumerate(texts[:i]):
            need = least * (len(a) + len(b)) / 2
            if min(len(a), len(b)) >= need and (letters[i] & letters[j]).total() >= need and near(a, b, least):
                pairs.append((b, a))
    return pairs


def test_columns(rows):
    assert list(rows[0]) == ["text", "intent", "sentiment"]
    assert all(None not in row and None not in row.values() for row in rows)


def test_every_sentiment_is_as_frequent_in_every_intent(rows):
    count = Counter((row["intent"], row["sentiment"]) for row in rows)
    assert count == {(intent, sentiment): 28 for intent in INTENTS for sentiment in SENTIMENTS}


def test_rows_are_grouped(rows):
    groups = list(dict.fromkeys((row["intent"], row["sentiment"]) for row in rows))
    assert groups == [(intent, sentiment) for intent in INTENTS for sentiment in SENTIMENTS]
    assert [(row["intent"], row["sentiment"]) for row in rows] == [group for group in groups for _ in range(28)]


def test_form():
    data = CHAT.read_bytes()
    text = data.decode("utf-8")
    assert unicodedata.is_normalized("NFC", text)
    assert b"\r" not in data
    assert data.endswith(b"\n")
    assert not text.startswith("\ufeff")


def test_messages_have_3_to_25_words(rows):
    texts = [row["text"] for row in rows]
    assert all(text == " ".join(text.split()) for text in texts)
    words = [len(text.split()) for text in texts]
    assert min(words) >= 3
    assert max(words) <= 25


def test_near_copies_are_found():
    texts = ["parcel kab aayega bhai", "kal milte hai paanch baje", "parcel kb aayega bhai", "refund nahi aaya"]
    assert near_copies(texts) == [("parcel kab aayega bhai", "parcel kb aayega bhai")]


def test_no_near_copies(rows):
    assert near_copies([plain(row["text"]) for row in rows]) == []


def test_a_share_has_devanagari(rows):
    share = sum(bool(re.search("[\u0900-\u097f]", row["text"])) for row in rows) / len(rows)
    assert 0.1 <= share <= 0.25
    for intent in INTENTS:
        assert any(re.search("[\u0900-\u097f]", row["text"]) for row in rows if row["intent"] == intent)
