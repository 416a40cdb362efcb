import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from jobs import Stop, load_recipe
from PIL import Image
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bptools import finetune as ft
from bptools.finetune import Interrupt, job

pytestmark = [  # peft's and transformers' own
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]
HELP = ft.python_help()[:60]
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "text.py"
MESSAGES = ROOT / "recipes" / "data" / "chat.csv"
TINY = ("--seeds", "1", "--epochs", "2", "--pretrain-epochs", "1", "--labels", "4", "--device", "cpu")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"max_position_embeddings": 80, "vocab_size": 300}
KINDS = {
    "bert": transformers.BertConfig(**SIZES),
    "distilbert": transformers.DistilBertConfig(
        dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=80, vocab_size=300
    ),
    "roberta": transformers.RobertaConfig(**SIZES, pad_token_id=0, bos_token_id=2, eos_token_id=3),
    "gpt2": transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=80, vocab_size=300, bos_token_id=0, eos_token_id=0
    ),
}


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(RECIPE, "text_recipe")


@pytest.fixture
def few(recipe, monkeypatch):
    """The demonstration with little of Python's help."""
    monkeypatch.setattr(recipe.ft, "python_help", lambda: HELP)
    recipe.unlabelled.cache_clear()
    yield recipe
    recipe.unlabelled.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Messages of two kinds in a file, and a checkpoint of each kind of model."""
    root = tmp_path_factory.mktemp("text")
    with open(MESSAGES, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["intent"] in ("refund", "meetup")][::7]
    rows[0]["text"] = " ".join(row["text"] for row in rows)  # longer than any model takes
    with open(root / "all.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("said", "kind"), *((row["text"], row["intent"]) for row in rows)])
    texts = [row["text"] for row in rows]
    for name, config in KINDS.items():
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(root / name)
        tokenizer = ft.byte_pairs(texts, 300) if name == "gpt2" else ft.word_pieces(texts, 300)
        tokenizer.save_pretrained(root / name)
    return root


def of(folder, name, *args):
    """Arguments for a checkpoint's folder."""
    data = ("--data", folder / "all.csv", "--text-column", "said", "--label-column", "kind", "--length", "70")
    return [
        *map(str, (*data, "--model", folder / name, "--epochs", "2", "--lr", "1e-3", "--device", "cpu", *args))
    ]


def results(folder):
    """All that a job came to, but for times; and the weights kept."""
    done = {str(p.parent.relative_to(folder)): ft.load_json(p) for p in sorted(folder.glob("seed*/*/result.json"))}
    weights = {p.relative_to(folder): ft.load_checkpoint(p)["model"] for p in folder.glob("seed*/*/*t.pt")}
    return {k: {n: v for n, v in r.items() if n != "seconds"} for k, r in done.items()}, weights


def assert_same(folder, other):
    (a, weights), (b, others) = results(folder), results(other)
    assert a == b
    assert weights.keys() == others.keys()
    for path, state in weights.items():
        assert all(torch.equal(v, others[path][k]) for k, v in state.items()), path


def logits_of(model, tokenizer, texts):
    encoded = ft.Pad(tokenizer)([tokenizer(text, truncation=True, max_length=70) for text in texts])
    names = ("input_ids", "attention_mask")
    with torch.no_grad():
        return model(**{name: encoded[name] for name in names}).logits


# A checkpoint of transformers: load, train, save, reload ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("bert", "scratch"), ("bert", "discriminative"), ("distilbert", "head"), ("distilbert", "lora"),
        ("roberta", "full"), ("roberta", "lora"), ("gpt2", "discriminative"), ("gpt2", "lora"),
    ],
)  # fmt: skip
def test_a_checkpoint_loads_trains_saves_and_reloads(recipe, folder, tmp_path, name, strategy):
    args = of(folder, name, "--strategy", strategy)
    args += ["--phases", "all:1", "head+all:1"] if strategy == "discriminative" else []
    assert recipe.main([*args, "--log-dir", str(tmp_path)]) == 0
    run = tmp_path / "seed0" / strategy
    result = ft.load_json(run / "result.json")
    model = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert model.config.id2label == {0: "meetup", 1: "refund"}
    assert model.config.label2id == {"meetup": 0, "refund": 1}

    # The test part again, by transformers alone, gives what the recipe measured.
    splits = ft.text_folder(folder / "all.csv", "said", "kind")
    logits = logits_of(model, tokenizer, splits.test.texts)
    assert logits.argmax(1).tolist() == result["predictions"]
    assert logits.softmax(1).amax(1).tolist() == pytest.approx(result["confidences"], abs=1e-5)

    # So does the best epoch's checkpoint in a model of ours, to the bit.
    ours, pieces = ft.load_pretrained(AutoModelForSequenceClassification, str(run / "model"))
    if strategy != "lora":
        state = ft.load_checkpoint(run / "best.pt")["model"]
        assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    again = logits_of(ours, pieces, splits.test.texts)
    ft.export(ours, tmp_path / "copy", processor=pieces)
    copy, others = ft.load_pretrained(AutoModelForSequenceClassification, str(tmp_path / "copy"))
    assert torch.equal(logits_of(copy, others, splits.test.texts), again)

    source = transformers.AutoModel.from_pretrained(folder / name).state_dict()
    after = model.base_model.state_dict()
    same = [torch.equal(value, after[key]) for key, value in source.items() if "pooler" not in key]
    assert all(same) if strategy == "head" else not all(same)
    if strategy == "lora":
        base, _ = ft.load_pretrained(AutoModelForSequenceClassification, str(folder / name), num_labels=2)
        base.config.pad_token_id = tokenizer.pad_token_id
        adapted = ft.load_adapter(base, run / "adapter")
        torch.testing.assert_close(logits_of(adapted, tokenizer, splits.test.texts), again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("head", "pool", "strategy"), [("mlp", "mean", "discriminative"), ("linear", "first", "lora")]
)
def test_a_head_of_our_own_reloads(recipe, folder, tmp_path, head, pool, strategy):
    args = of(folder, "bert", "--strategy", strategy, "--head", head, "--pool", pool)
    assert recipe.main([*args, "--log-dir", str(tmp_path)]) == 0
    run = tmp_path / "seed0" / strategy
    model = ft.TextClassifier.from_pretrained(run / "model")
    assert (model.options["head"], model.pool) == (head, pool)
    splits = ft.text_folder(folder / "all.csv", "said", "kind")
    logits = logits_of(model, AutoTokenizer.from_pretrained(run / "model"), splits.test.texts)
    result = ft.load_json(run / "result.json")
    assert logits.argmax(1).tolist() == result["predictions"]
    assert logits.softmax(1).amax(1).tolist() == pytest.approx(result["confidences"], abs=1e-5)


def test_files_of_three_parts_in_json_lines(recipe, folder, tmp_path):
    with open(folder / "all.csv", encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    for i, part in enumerate(("train", "valid", "test")):
        lines = (json.dumps(row | {"more": i}) for row in rows[i::3])
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    args = of(folder, "distilbert", "--data", tmp_path, "--strategy", "full", "--workers", "1")
    assert recipe.main([*args, "--log-dir", str(tmp_path / "job")]) == 0
    result = ft.load_json(tmp_path / "job" / "seed0" / "full" / "result.json")
    assert [("meetup", "refund")[i] for i in result["targets"]] == [row["kind"] for row in rows[2::3]]
    for epoch in result["history"]:
        assert epoch["loss"] == pytest.approx(100 - epoch["accuracy"])  # what picks the epoch


# The job --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_the_first_state_of_a_model_that_reads_to_the_right_is_refused(recipe, folder, tmp_path, capsys, head):
    args = [*of(folder, "gpt2", "--head", head, "--pool", "first"), "--log-dir", str(tmp_path / "job")]
    assert recipe.main(args) == 2
    assert capsys.readouterr().err.startswith("error: --pool first: the model's first state does not see")
    assert not (tmp_path / "job").exists()
    for model, pool in (("gpt2", "mean"), ("bert", "first")):
        columns = {"data": folder / "all.csv", "text_column": "said", "label_column": "kind", "length": 70}
        recipe.resolve(recipe.replace(recipe.REAL, **columns, model=str(folder / model), head=head, pool=pool))


def test_the_demonstration_leaves_its_card_logs_and_models(few, tmp_path, capsys):
    args = [*TINY, "--length", "40", "--strategy", "scratch", "discriminative", "--log-dir", str(tmp_path / "job")]
    assert few.main(args) == 0
    done, _ = results(tmp_path / "job")
    assert set(done) == {f"seed0/{n}" for n in ("pretrain", "majority", "n-grams", "scratch", "discriminative")}
    assert done["seed0/majority"]["accuracy"] == pytest.approx(100 / 6)
    assert done["seed0/n-grams"]["accuracy"] > 20
    out = capsys.readouterr().out
    assert re.search(
        r"^texts: 24 to train, 24 to pick the best epoch, 204 to test, 300 without labels$", out, re.M
    )
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 110
    with Image.open(tmp_path / "job" / "card.png") as picture:
        assert picture.width > 1000
    assert len([*tmp_path.glob("job/seed0/*/events.out.tfevents.*")]) == 3
    start = AutoModelForSequenceClassification.from_pretrained
    for run in ("scratch", "discriminative"):
        assert start(tmp_path / "job" / "seed0" / run / "model").config.id2label[5] == "technical"


def test_a_checkpoint_on_the_messages_is_not_said_to_be_pretrained_here(recipe, folder, tmp_path, capsys):
    args = [*TINY, "--epochs", "1", "--length", "40", "--model", str(folder / "bert"), "--strategy", "head"]
    assert recipe.main([*args, "--log-dir", str(tmp_path / "job")]) == 0
    done, _ = results(tmp_path / "job")
    assert set(done) == {"seed0/majority", "seed0/n-grams", "seed0/head"}
    out = capsys.readouterr().out
    assert re.search(
        r"^texts: 24 to train, 24 to pick the best epoch, 204 to test\nthe same test messages for all seeds\nlogs",
        out,
        re.M,
    )


def test_pretraining_sees_no_message_that_is_tested(recipe):
    for seed in range(2):
        cfg = recipe.Config()
        splits, texts = recipe.read_data(cfg, seed), {text for some in recipe.unlabelled(cfg) for text in some}
        assert not texts & set(splits.test.texts)
        assert texts >= set(splits.train.texts)
        assert not set(splits.train.texts) & set(splits.val.texts)
        assert splits.test == recipe.read_data(cfg, 0).test
        assert [splits.train.labels.count(name) for name in splits.classes] == [cfg.labels] * 6
    assert recipe.read_data(cfg, 0).train != recipe.read_data(cfg, 1).train


def test_an_interrupted_job_ends_as_if_it_had_not_been(few, tmp_path, monkeypatch, capsys):
    common = [*TINY, "--strategy", "discriminative", "lora", "--phases", "head:1", "all:1", "--batch-size", "10"]
    assert few.main([*common, "--log-dir", str(tmp_path / "a")]) == 0
    args = [*common, "--log-dir", str(tmp_path / "b")]
    for stop in (3, 12, 8):
        monkeypatch.setattr(job, "Interrupt", lambda stop=stop: Stop(stop))
        assert few.main(args) == 130
        torch.manual_seed(123)
        args = re.search(r"continue: uv run .* (--resume .*)", capsys.readouterr().out)[1].split()
        monkeypatch.setattr(job, "Interrupt", Interrupt)
    assert few.main(args) == 0
    assert_same(tmp_path / "a", tmp_path / "b")


def test_a_dry_run_leaves_nothing(recipe, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert recipe.main([*of(folder, "bert"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^dry run: one window of every phase: discriminative \(all\)$", out, re.M)
    assert list(tmp_path.iterdir()) == []


def test_the_search_for_a_rate_ends_with_a_suggestion(recipe, folder, tmp_path, capsys):
    assert recipe.main([*of(folder, "distilbert"), "--lr-find", "--log-dir", str(tmp_path / "job")]) == 0
    assert re.search(r"^suggested learning rate: \S+$", capsys.readouterr().out, re.M)
    assert (tmp_path / "job" / "lr_find.png").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--labels", "0"], "error: --labels: expected 1 to 100000, got 0"),
        (["--labels", "50"], "error: --labels: label 'booking' has 50 texts; splitting takes more than 100"),
        (["--length", "2"], "error: --length: expected 4 to 100000, got 2"),
        (["--label-column", "intnet"], "--label-column 'intnet' is not there (did you mean 'intent'?)"),
        (["--text-column", "intnt"], "--text-column 'intnt' is not there (did you mean 'intent'?)"),
        (["--data", "/nowhere"], "error: no such file or folder: /nowhere"),
        (["--data", "{folder}/all.csv"], "all.csv, line 2: --text-column 'text' is not there"),
        (["--data", "{folder}/bert"], "bert: expected files train and val"),
        (["--data", str(MESSAGES), "--label-column", "intent", "--model", "small"], "error: --model small"),
        (["--model", "/nowhere"], "error: --model /nowhere: no such folder"),
        (["--model", "{folder}"], "expected a folder that save_pretrained wrote"),
        (
            ["--model", "{folder}/bert", "--length", "90"],
            "error: --length 90: the model takes 80 word pieces at most",
        ),
        (
            ["--model", "{folder}/bert", "--length", "70", "--phases", "heed:3"],
            "error: --phases: 'heed' matches no parameter",
        ),
        (["--strategy", "headd"], "'headd'"),
        (["--head", "big"], "--head"),
        (["--parallel", "fsdp"], "error: --parallel fsdp: expected processes started by torchrun"),
    ],
)
def test_mistakes_are_one_line_and_status_2(few, folder, tmp_path, capsys, args, words):
    args = [arg.replace("{folder}", str(folder)) for arg in args]
    try:
        status = few.main([*args, "--device", "cpu", "--log-dir", str(tmp_path / "job")])
    except SystemExit as stop:  # from the command line's parser
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert words in error
    assert not (tmp_path / "job").exists()
    if error.startswith("error: "):
        assert error.count("\n") == 1


# The slow tier ---------------------------------------------------------------------------------------------------


def start(*args, size=0, **options):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size else []
    command = [sys.executable, *launcher, str(RECIPE), *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "head"), [("ddp", "linear"), pytest.param("fsdp", "own", marks=pytest.mark.release)]
)
def test_two_processes_learn_what_one_does(recipe, folder, tmp_path, kind, head):
    args = of(folder, "bert", "--strategy", "discriminative", "--phases", "head:1", "all:1", "--head", head)
    assert recipe.main([*args, "--log-dir", str(tmp_path / "one")]) == 0
    done = start(*args, "--parallel", kind, "--log-dir", tmp_path / "two", size=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("picture:") == 1
    one, two = (ft.load_json(tmp_path / n / "seed0" / "discriminative" / "result.json") for n in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], rel=0.1)
    assert len(two["history"]) == len(one["history"])
    weights = ft.load_checkpoint(tmp_path / "two" / "seed0" / "discriminative" / "best.pt")["model"]
    model = tmp_path / "two" / "seed0" / "discriminative" / "model"
    if head == "own":
        saved = AutoModelForSequenceClassification.from_pretrained(model)
    else:
        saved = ft.TextClassifier.from_pretrained(model)
    assert all(torch.equal(value, weights[name]) for name, value in saved.state_dict().items())


@pytest.mark.release
def test_the_demonstration_in_two_processes(tmp_path):
    done = start(*TINY, "--strategy", "scratch", "full", "--log-dir", tmp_path / "job", size=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"^seed 0  (\S+)", done.stdout, re.M) == [
        "pretrain",
        "majority",
        "n-grams",
        "scratch",
        "full",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["lora"])
def test_verify_holds_for_a_checkpoint(recipe, folder, tmp_path, monkeypatch, capsys, strategy):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    args = of(folder, "distilbert", "--strategy", strategy, "--accumulate", "2", "--batch-size", "6", "--verify")
    assert recipe.main(args) == 0
    out = capsys.readouterr().out
    assert re.search(r"\nall hold; \d+ s\n", out)
    assert re.search(r"two processes = one +holds", out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.release
def test_verify_holds_for_the_demonstration(tmp_path):
    done = start("--verify", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert re.search(r"two processes = one +holds", done.stdout)
    assert re.search(r"\nall hold; \d+ s\n", done.stdout)


@pytest.mark.release
def test_the_whole_demonstration(tmp_path):
    done = start("--log-dir", tmp_path / "job", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"^ (\S+) +([\d.]+) ± ([\d.]+)", done.stdout, re.M)
    mean = {name: float(value) for name, value, _ in found}
    assert mean["majority"] == pytest.approx(16.7)
    assert mean["n-grams"] > 40
    assert min(mean[name] for name in ("scratch", "full", "discriminative")) > 20  # and no claim of pretraining
