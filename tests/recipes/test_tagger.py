"""The recipe of taggers: its demonstration, local checkpoints of three kinds, bad input, processes."""

import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import Stop, load_recipe
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizerFast,
)

from bptools import finetune as ft
from bptools.finetune import job

RECIPE = Path(__file__).parents[2] / "recipes" / "tagger.py"
TINY = ("--seeds", "1", "--epochs", "2", "--pretrain-epochs", "1", "--sentences", "12", "--device", "cpu",
        "--strategy", "scratch", "discriminative")  # fmt: skip
PEOPLE, PLACES = ("रवि शर्मा", "आशा", "गंगा राम मीणा", "किरण"), ("दिल्ली", "नई दिल्ली", "काशी")


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    """The recipe, its demonstration with few sentences and a narrow encoder."""
    module = load_recipe(RECIPE, "tagger")
    folder = tmp_path_factory.mktemp("few")
    for name, part, count in (("NAMES", "\n\n", 40), ("TEXT", "\n", 60)):
        few = part.join(getattr(module, name).read_text(encoding="utf-8").split(part)[:count])
        (folder / name).write_text(few, encoding="utf-8")
        setattr(module, name, folder / name)
    module.WIDTH, module.PIECES, module.PICK = 32, 400, 10
    return module


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A file of sentences, some longer than the 16 pieces that the tests let a model see."""
    lines = []
    for person, place, verb in itertools.product(PEOPLE, PLACES, ("गए", "पहुँचे और वहीं बहुत दिन रुके रहे")):
        for name, words in (("PER", person), ("O", "कल"), ("LOC", place), ("O", f"{verb} ।")):
            for i, word in enumerate(words.split()):
                begin = "" if name == "O" else "I-" if i else "B-"
                lines.append(f"{word} x {begin}{name}")
        lines.append("")
    path = tmp_path_factory.mktemp("sentences") / "names.conll"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def checkpoints(sentences, tmp_path_factory):
    """Folders as mBERT, DistilBERT and RoBERTa come in, each with its tokenizer and the head of pretraining."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    pieces = ft.word_pieces([" ".join(words) for words in ft.read_conll(sentences).words], 80).get_vocab()
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    alphabet = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = RobertaTokenizerFast(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[])
    size = {"vocab_size": len(pieces)}
    bert = BertForMaskedLM(BertConfig(**common, **size, max_position_embeddings=64))
    distilbert = DistilBertForMaskedLM(
        DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, **size, max_position_embeddings=64)
    )
    roberta = RobertaForMaskedLM(
        RobertaConfig(**common, vocab_size=len(alphabet), max_position_embeddings=66, pad_token_id=1)
    )
    cased = BertTokenizerFast(vocab=pieces, do_lower_case=False)
    for name, model, tokenizer in (
        ("bert", bert, cased),
        ("distilbert", distilbert, cased),
        ("roberta", roberta, bytewise),
    ):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def real(sentences, model, log_dir, *more):
    options = ["--data", str(sentences), "--model", str(model), "--device", "cpu", "--log-dir", str(log_dir)]
    return [*options, "--epochs", "2", "--batch-size", "8", "--lr", "1e-3", "--length", "16", *more]


def outcome(folder):
    """All that a job came to, but for times."""
    done = {str(p.parent.relative_to(folder)): ft.load_json(p) for p in sorted(folder.glob("seed*/*/result.json"))}
    return {k: {n: v for n, v in r.items() if n != "seconds"} for k, r in done.items()}


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_a_local_checkpoint_loads_trains_saves_and_gives_the_same_logits(
    tagger, sentences, checkpoints, tmp_path, capsys, kind
):
    job = tmp_path / "job"
    assert tagger.main(real(sentences, checkpoints / kind, job, "--strategy", "full")) == 0
    assert "tokenizer" not in capsys.readouterr().err
    cfg = tagger.Config(**ft.load_config(job))
    net, tokenizer, labels = tagger.build(cfg, 0, cfg.model)
    assert labels == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    ft.load_weights(net, job / "seed0" / "full" / "best.pt")
    saved = job / "seed0" / "full" / "model"
    again = AutoModelForTokenClassification.from_pretrained(saved)
    read = AutoTokenizer.from_pretrained(saved)
    assert again.config.id2label == dict(enumerate(labels))
    test = tagger.read_data(cfg, 0).test
    batch, other = (ft.Pad(some)(list(ft.TaggedWords(test, labels, some, 16))) for some in (tokenizer, read))
    assert torch.equal(batch["input_ids"], other["input_ids"])
    assert torch.equal(batch.pop("labels"), other["labels"])
    with torch.inference_mode():
        assert torch.equal(again(**batch).logits, net.eval()(**batch).logits)
    done = outcome(job)["seed0/full"]
    assert len(done["predictions"]) == len(done["targets"]) == 4
    assert [len(tags) for tags in done["predictions"]] == list(map(len, test.words))


def test_lora_leaves_its_adapter_and_the_merged_model(tagger, sentences, checkpoints, tmp_path):
    job = tmp_path / "job"
    assert tagger.main(real(sentences, checkpoints / "distilbert", job, "--strategy", "lora")) == 0
    cfg = tagger.Config(**ft.load_config(job))
    net, tokenizer, _ = tagger.build(cfg, 0, cfg.model)
    adapted = ft.load_adapter(net, job / "seed0" / "lora" / "adapter")
    merged = AutoModelForTokenClassification.from_pretrained(job / "seed0" / "lora" / "model")
    batch = tokenizer([["रवि", "दिल्ली"]], is_split_into_words=True, return_tensors="pt")
    with torch.inference_mode():
        assert torch.allclose(adapted(**batch).logits, merged(**batch).logits, atol=1e-5)


def test_what_trains(tagger, sentences, checkpoints, tmp_path):
    job = tmp_path / "job"
    assert tagger.main(real(sentences, checkpoints / "bert", job, "--strategy", "head", "scratch")) == 0
    start = ft.load_checkpoint(checkpoints / "bert" / "model.safetensors")
    head, scratch = (ft.load_checkpoint(job / "seed0" / n / "best.pt")["model"] for n in ("head", "scratch"))
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(head[name], start[name])
    assert not torch.equal(scratch[name], start[name])


def test_a_tagger_goes_on_with_its_own_labels(tagger, sentences, checkpoints, tmp_path):
    model = AutoModelForTokenClassification.from_pretrained(
        checkpoints / "distilbert", **ft.label_names(own := ("O", "I-PER", "B-PER", "I-LOC", "B-LOC"))
    )
    model.save_pretrained(tmp_path / "tagger")
    AutoTokenizer.from_pretrained(checkpoints / "distilbert").save_pretrained(tmp_path / "tagger")
    cfg = tagger.replace(tagger.REAL, data=str(sentences), model=str(tmp_path / "tagger"))
    net, _, labels = tagger.build(cfg, 0, cfg.model)
    assert labels == own
    assert torch.equal(net.classifier.weight, model.classifier.weight)


def test_a_tokenizer_that_strips_vowel_signs_is_warned_of(tagger, sentences, checkpoints, tmp_path, caplog):
    folder = tmp_path / "lower"
    BertForMaskedLM.from_pretrained(checkpoints / "bert").save_pretrained(folder)
    vocab = AutoTokenizer.from_pretrained(checkpoints / "bert").get_vocab()
    BertTokenizerFast(vocab=vocab, do_lower_case=True).save_pretrained(folder)
    assert tagger.main(real(sentences, folder, tmp_path / "job", "--dry-run")) == 0
    assert re.search(r"--model .*lower: tokenizer: \d+ of \d+ words, such as '.*', which becomes '", caplog.text)


@pytest.fixture(scope="module")
def finished(tagger, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "job"
    assert tagger.main([*TINY, "--accumulate", "2", "--log-dir", str(folder)]) == 0
    return folder


def test_the_demonstration_leaves_its_card_logs_and_models(finished):
    runs = ("pretrain", "by word", "dictionary", "regression", "scratch", "discriminative")
    done = outcome(finished)
    assert set(done) == {f"seed0/{name}" for name in runs}
    with Image.open(finished / "card.png") as picture:
        assert picture.width > 1000
    for name in runs[4:]:
        assert (finished / "seed0" / name / "model" / "model.safetensors").is_file()
        assert list((finished / "seed0" / name).glob("events.out.tfevents.*"))
    targets = done["seed0/scratch"]["targets"]
    assert len(targets) == 40 - 12 - 10
    assert all(done[f"seed0/{name}"]["targets"] == targets for name in runs[1:])


def test_what_is_tested_is_neither_learned_from_nor_pretrained_on(tagger):
    cfg = tagger.Config(sentences=12)
    texts = set(tagger.TEXT.read_text(encoding="utf-8").splitlines())
    for seed in range(3):
        splits = tagger.read_data(cfg, seed)
        parts = [set(part.words) for part in (splits.train, splits.val, splits.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 40
        assert not texts & {" ".join(words) for part in parts for words in part}


def test_an_interrupted_job_ends_as_if_it_had_not_been(tagger, finished, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "job"
    args = [*TINY, "--accumulate", "2", "--log-dir", str(folder)]
    for stop in (3, 8, 9):
        monkeypatch.setattr(job, "Interrupt", lambda stop=stop: Stop(stop))
        assert tagger.main(args) == 128 + signal.SIGINT
        torch.manual_seed(123)
        args = re.search(r"continue: uv run .* (--resume .*)", capsys.readouterr().out)[1].split()
    monkeypatch.undo()
    assert tagger.main(args) == 0
    assert outcome(folder) == outcome(finished)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--strategy", "fulll"], "'fulll'"),
        (["--model", "bert"], "error: --model bert: name the sentences to train on with --data"),
        (["--data", "DATA", "--model", "small"], "error: --model small: is the demonstration's"),
        (["--data", "DATA", "--model", "./none"], "error: --model ./none: no such folder"),
        (["--data", "DATA", "--model", "DATA/.."], "has no config.json"),
        (["--data", "/nowhere", "--model", "BERT"], "error: /nowhere: No such file or directory"),
        (["--data", "DATA", "--model", "BERT", "--column", "9"], "line 1: has 3 columns, and none for --column 9"),
        (["--data", "DATA", "--model", "BERT", "--column", "2"], "line 1: expected a tag such as"),
        (["--data", "DATA", "--model", "BERT", "--length", "999"], "error: --length 999: the model takes 64"),
        (
            ["--data", "DATA", "--model", "BERT", "--length", "16", "--phases", "heed:3"],
            "error: --phases: 'heed' matches no",
        ),
        (["--sentences", "0"], "error: --sentences: expected 1 to 200, got 0"),
        (["--length", "4"], "error: --length: expected 8 to 100000, got 4"),
        (["--parallel", "fsdp", "--strategy", "lora"], "error: --parallel fsdp: expected processes"),
    ],
)
def test_mistakes_are_one_line_and_status_2(tagger, sentences, checkpoints, capsys, tmp_path, args, words):
    known = {"DATA": str(sentences), "BERT": str(checkpoints / "bert"), "DATA/..": str(sentences.parent)}
    try:
        status = tagger.main([*(known.get(arg, arg) for arg in args), "--log-dir", str(tmp_path / "job")])
    except SystemExit as stop:  # from the command line's parser
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert not (tmp_path / "job").exists()
    assert words in error
    if error.startswith("error: "):
        assert error.count("\n") == 1


def test_help_reads_well(tagger, capsys):
    with pytest.raises(SystemExit) as stop:
        tagger.main(["--help"])
    assert stop.value.code == 0
    assert "uv run recipes/tagger.py --sentences" in capsys.readouterr().out


def test_a_dry_run_does_everything_and_leaves_nothing(tagger, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert tagger.main([*TINY, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^dry run: one window of every phase: pretrain \(all\); discriminative \(", out, re.M)
    assert re.search(r"^saved, stopped and continued \d+ times, validated and tested: all well$", out, re.M)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_search_for_a_rate_ends_with_a_suggestion(tagger, tmp_path, capsys):
    assert tagger.main([*TINY, "--lr-find", "--log-dir", str(tmp_path / "job")]) == 0
    assert 1e-5 < float(re.search(r"^suggested learning rate: (\S+)$", capsys.readouterr().out, re.M)[1]) < 1


@pytest.mark.release
def test_the_whole_demonstration(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(RECIPE.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RECIPE), "--log-dir", str(tmp_path / "job")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    mean = {name: float(value) for name, value in re.findall(r"^ (\S+) +([\d.]+) ± ", done.stdout, re.M)}
    assert min(mean[name] for name in ("scratch", "full", "discriminative")) > mean["head"]
    assert mean["regression"] > max(value for name, value in mean.items() if name != "regression")  # the README's


@pytest.mark.release
def test_verify(tmp_path):
    args = ["--device", "cpu", "--batch-size", "6", "--sentences", "24", "--strategy", "lora", "--accumulate", "2"]
    command = [sys.executable, str(RECIPE), *args, "--verify"]  # its two processes read the same sentences then
    environment = {**os.environ, "PYTHONPATH": str(RECIPE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    out = done.stdout
    assert re.search(r"what trains learns +holds", out)
    assert re.search(r"two processes = one +holds", out)
    assert re.search(r"\nall hold; \d+ s\n", out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kind", [pytest.param("ddp", marks=pytest.mark.slow), pytest.param("fsdp", marks=pytest.mark.release)]
)
def test_two_processes(sentences, checkpoints, tmp_path, kind):
    options = ["--strategy", "full", "--parallel", kind]
    args = real(sentences, checkpoints / "bert", tmp_path / "job", *options)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(RECIPE), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seed 0  full") == 1
    assert outcome(tmp_path / "job")["seed0/full"]["f1"] >= 0
    run = tmp_path / "job" / "seed0" / "full"
    best = ft.load_checkpoint(run / "best.pt")["model"]
    saved = AutoModelForTokenClassification.from_pretrained(run / "model").state_dict()
    assert all(torch.equal(value, best[name]) for name, value in saved.items())
