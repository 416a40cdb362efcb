import re
import unicodedata
from collections import Counter, defaultdict
from difflib import SequenceMatcher
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "recipes" / "data"
LABELLED = DATA / "hindi_names.conll"
UNLABELLED = DATA / "hindi_text.txt"
KINDS = ("PER", "LOC", "ORG")
TAGS = {"O", *(f"{edge}-{kind}" for edge in "BI" for kind in KINDS)}
PUNCTUATION = set('।,?!"')
WORD = re.compile(r"[\u0900-\u0963\u0970-\u097f]+(-[\u0900-\u0963\u0970-\u097f]+)*|([\u0900-\u0963]+\.)+")
OUTSIDE = {"डॉ.", "श्री", "श्रीमती", "प्रधानाचार्य", "मुख्यमंत्री", "सम्राट", "महात्मा", "ने", "को", "में", "से"}
OUTSIDE |= {"नदी", "ज़िले", "जी", "काका", "दीदी", "भैया"}


def parse(text):
    """Sentences as lists of (token, tag)."""
    return [[tuple(line.split(" ")) for line in block.split("\n")] for block in text.strip("\n").split("\n\n")]


def entities(sentence):
    """(kind, name) of a sentence, in order."""
    found = []
    for token, tag in sentence:
        if tag.startswith("B-"):
            found.append((tag[2:], [token]))
        elif tag.startswith("I-"):
            found[-1][1].append(token)
    return [(kind, " ".join(tokens)) for kind, tokens in found]


def broken(tags):
    """Where an I- follows neither B- nor I- of its kind."""
    return [
        i
        for i, (last, tag) in enumerate(zip(["O", *tags], tags, strict=False))
        if tag[0] == "I" and last[1:] != tag[1:]
    ]


def near(a, b, least=0.8):
    """Whether difflib's ratio over tokens reaches ``least``; it depends on the order, so either order counts."""
    return max(SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in ((a, b), (b, a))) >= least


def near_copies(sentences, least=0.8):
    """Pairs of near copies; only those with enough tokens in common reach difflib."""
    counts = [Counter(tokens) for tokens in sentences]
    pairs = []
    for i, a in enumerate(sentences):
        for j, b in enumerate(sentences[:i]):
            need = least * (len(a) + len(b)) / 2
            if min(len(a), len(b)) >= need and (counts[i] & counts[j]).total() >= need and near(a, b, least):
                pairs.append((b, a))
    return pairs


@pytest.fixture(scope="module")
def labelled():
    return parse(LABELLED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def labelled_tokens(labelled):
    return [[token for token, _ in sentence] for sentence in labelled]


@pytest.fixture(scope="module")
def unlabelled():
    return [line.split(" ") for line in UNLABELLED.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("path", [LABELLED, UNLABELLED], ids=["labelled", "unlabelled"])
def test_form(path):
    data = path.read_bytes()
    text = data.decode("utf-8")
    assert unicodedata.is_normalized("NFC", text)
    assert b"\r" not in data
    assert data.endswith(b"\n")
    assert not data.endswith(b"\n\n")
    assert not text.startswith(("\ufeff", "\n", "-DOCSTART-"))
    assert "\u200d" not in text  # nor other joiners: one spelling a word
    assert "\u200c" not in text
    assert not re.search("[कखग]\u093c", text)  # the nukta is written on ज, फ, ड and ढ alone


def test_every_line_is_a_token_and_a_tag():
    text = LABELLED.read_text(encoding="utf-8")
    assert "\n\n\n" not in text
    lines = [line for line in text.splitlines() if line]
    assert all(re.fullmatch(r"\S+ \S+", line) for line in lines)
    assert {line.split(" ")[1] for line in lines} == TAGS


def test_tokens(labelled_tokens, unlabelled):
    for tokens in labelled_tokens + unlabelled:
        assert all(token in PUNCTUATION or WORD.fullmatch(token) for token in tokens), tokens
        assert 5 <= len(tokens) <= 22
        assert tokens[-1] in {"।", "?", "!"}
        assert tokens.count('"') % 2 == 0


def test_broken_tags_are_found():
    assert broken(["O", "I-PER", "B-PER", "I-LOC", "B-ORG", "I-ORG", "I-ORG"]) == [1, 3]


def test_tags_are_valid(labelled):
    assert [broken([tag for _, tag in sentence]) for sentence in labelled] == [[]] * len(labelled)


def test_punctuation_titles_and_postpositions_are_outside(labelled):
    outside = PUNCTUATION | OUTSIDE
    for sentence in labelled:
        assert all(tag == "O" for token, tag in sentence if token in outside), sentence


def test_counts(labelled, unlabelled):
    assert len(labelled) == 264
    assert len(unlabelled) == 400
    per_sentence = Counter(len(entities(sentence)) for sentence in labelled)
    assert 0.1 <= per_sentence[0] / len(labelled) <= 0.15
    assert max(per_sentence) <= 4
    assert per_sentence[4] <= 5


def test_names_are_varied(labelled):
    names = Counter(name for sentence in labelled for name in entities(sentence))
    different = Counter(kind for kind, _ in names)
    assert different["PER"] >= 120
    assert different["LOC"] >= 90
    assert different["ORG"] >= 60
    assert max(names.values()) <= 3
    longer = sum(count for (_, name), count in names.items() if " " in name)
    assert longer >= 0.4 * names.total()


def test_words_have_several_readings(labelled):
    readings = defaultdict(set)
    for sentence in labelled:
        for token, tag in sentence:
            readings[token].add(tag)
    for word in ("आशा", "किरण", "ज्योति", "सूरज", "पूजा", "विजय", "मुस्कान"):
        assert readings[word] == {"O", "B-PER"}
    for word in ("गंगा", "यमुना", "काशी", "अवध", "द्वारका", "सागर"):
        assert readings[word] == {"B-LOC", "B-PER"}
    assert readings["दिल्ली"] == {"B-LOC", "I-LOC", "B-ORG"}


def test_a_name_of_several_tokens_is_tagged_wherever_it_stands(labelled):
    names = {tuple(name.split(" ")) for sentence in labelled for _, name in entities(sentence) if " " in name}
    for sentence in labelled:
        tokens = [token for token, _ in sentence]
        for name in names:
            for i in range(len(tokens) - len(name) + 1):
                if tuple(tokens[i : i + len(name)]) == name:
                    assert all(tag != "O" for _, tag in sentence[i : i + len(name)]), sentence


def test_near_copies_are_found():
    a, b, c = (list(words) for words in ("abcde", "abxde", "fghij"))
    assert near_copies([a, c, b]) == [(a, b)]


def test_no_near_copies_nor_labelled_sentences_in_the_unlabelled_text(labelled_tokens, unlabelled):
    sentences = labelled_tokens + unlabelled
    assert len({tuple(tokens) for tokens in sentences}) == len(sentences)
    assert near_copies(sentences) == []


def test_the_unlabelled_text_has_other_persons(labelled, unlabelled):
    text = "\n".join(" " + " ".join(tokens) + " " for tokens in unlabelled)
    persons = {name for sentence in labelled for kind, name in entities(sentence) if kind == "PER" and " " in name}
    assert [name for name in sorted(persons) if f" {name} " in text] == []
