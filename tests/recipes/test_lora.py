import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from jobs import Stop, load_recipe
from PIL import Image

from bptools.finetune import (
    CausalBatch,
    TokenRows,
    chat_tokenizer,
    job,
    load_adapter,
    load_causal,
    load_checkpoint,
    load_json,
    tokenise,
)

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = ("--device", "cpu", "--seeds", "1", "--epochs", "2", "--pretrain-epochs", "1", "--amp", "off",
        "--shown", "2")  # fmt: skip


def load(name):
    return load_recipe(RECIPES / f"{name}.py", f"recipe_{name}")


@pytest.fixture(scope="module")
def lora():
    return load("lora")


@pytest.fixture(scope="module")
def prompt():
    return load("prompt")


COLOURS = ("red", "blue", "green", "black", "white")
THINGS = ("hat", "coat", "shoe", "bag", "ring", "belt")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A checkpoint with its tokenizer, and conversations, as a user has them."""
    root = tmp_path_factory.mktemp("local")
    chats = [
        [{"role": "user", "content": f"I lost my {colour} {thing}"}, {"role": "assistant", "content": thing}]
        for colour in COLOURS
        for thing in THINGS
    ]
    tokenizer = chat_tokenizer(chats, 320)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    return root


def of(local, *args):
    return [
        *("--data", str(local / "chats.jsonl"), "--model", str(local / "model"), "--batch-size", "4", "--length"),
        *("64", "--lr", "0.01", "--full-lr", "0.01", "--accumulate", "1", *TINY, *args),
    ]


def results(folder):
    done = {str(p.parent.relative_to(folder)): load_json(p) for p in sorted(folder.glob("seed*/*/result.json"))}
    return {k: {n: v for n, v in r.items() if n not in ("seconds", "used")} for k, r in done.items()}


def logits(folder, local):
    model, tokenizer = load_causal(str(folder))
    samples = tokenise([[{"role": "user", "content": "my red hat"}, {"role": "assistant", "content": "hat"}]],
                       tokenizer, 64)[0]  # fmt: skip
    batch = CausalBatch(tokenizer)(list(TokenRows(samples)))
    batch.pop("labels")
    return batch, model, model.eval()(**batch).logits


@pytest.mark.parametrize("strategy", ["lora", "dora", "qlora", "full", "scratch"])
def test_a_local_checkpoint_learns_and_its_folder_has_its_logits(lora, local, tmp_path, monkeypatch, strategy):
    seen, export = {}, lora.ft.export

    def watched(model, folder, **options):
        seen["model"] = model
        export(model, folder, **options)

    monkeypatch.setattr(lora.ft, "export", watched)
    args = of(local, "--strategy", strategy, "--epochs", "4", "--log-dir", str(tmp_path / "job"))
    assert lora.main(args) == 0
    run = tmp_path / "job" / "seed0" / strategy
    done = results(tmp_path / "job")
    assert done[f"seed0/{strategy}"]["loss"] < done["seed0/zero-shot"]["loss"]
    batch, _, reloaded = logits(run / "model", local)
    trained = seen["model"].eval()
    with torch.no_grad():
        expected = trained(**batch).logits
    if strategy in ("full", "scratch"):
        assert reloaded.equal(expected)
    else:
        assert torch.allclose(reloaded, expected, atol=1e-5)
        assert done[f"seed0/{strategy}"]["apart"] < 1e-5
        again = load_adapter(load_causal(str(local / "model"))[0], run / "adapter")
        assert again(**batch).logits.equal(expected)
    source = transformers.AutoModelForCausalLM.from_pretrained(run / "model")  # as anybody would
    assert torch.allclose(source(**batch).logits, reloaded, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(run / "model").chat_template


@pytest.mark.parametrize("lean", [(), ("--lean",)])
@pytest.mark.parametrize("strategy", ["prompt", pytest.param("prefix", marks=pytest.mark.slow)])
def test_a_frozen_model_stays_and_its_prompt_comes_back(prompt, local, tmp_path, monkeypatch, strategy, lean):
    seen, save = {}, prompt.ft.save_adapter

    def watched(model, folder):
        seen["model"] = model
        save(model, folder)

    monkeypatch.setattr(prompt.ft, "save_adapter", watched)
    args = of(local, "--strategy", strategy, "--epochs", "3", *lean, "--log-dir", str(tmp_path / "job"))
    assert prompt.main(args) == 0
    run, done = tmp_path / "job" / "seed0" / strategy, results(tmp_path / "job")
    if strategy != "prompt":  # three epochs move an untrained model's prompt nowhere
        assert done[f"seed0/{strategy}"]["loss"] < done["seed0/zero-shot"]["loss"]
    assert not (run / "model").exists()
    batch, base, plain = logits(local / "model", local)
    again = load_adapter(base, run / "adapter").eval()(**batch).logits
    assert again.equal(seen["model"].eval()(**batch).logits)
    assert not again[:, -plain.shape[1] :].allclose(plain)


def test_head_trains_the_output_layer_alone(prompt, local, tmp_path):
    assert prompt.main(of(local, "--strategy", "head", "--log-dir", str(tmp_path / "job"))) == 0
    folders = local / "model", tmp_path / "job" / "seed0" / "head" / "model"
    old, new = (load_causal(str(folder))[0].state_dict() for folder in folders)
    assert [name for name in old if not old[name].equal(new[name])] == ["lm_head.weight"]


@pytest.fixture(scope="module")
def finished(lora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "job"
    assert lora.main([*TINY, "--strategy", "scratch", "lora", "--log-dir", str(folder)]) == 0
    return folder


def test_the_demonstration_leaves_its_card_and_logs(finished, lora, capsys):
    done = results(finished)
    assert set(done) == {f"seed0/{name}" for name in ("pretrain", "zero-shot", "scratch", "lora")}
    assert done["seed0/pretrain"]["loss"] < 6
    with Image.open(finished / "card.png") as picture:
        assert picture.width > 1000
    assert len(list(finished.glob("seed0/*/events.out.tfevents.*"))) == 3
    assert lora.main(["--resume", str(finished)]) == 0
    out = capsys.readouterr().out
    assert "seed 0  " not in out
    assert "merged and unmerged adapters: logits differ by at most" in out
    used = {
        form: row.split() for form, row in re.findall(r"^ (scratch|lora|lora, merged)  +([\d. ]+)$", out, re.M)
    }
    assert set(used) == {"scratch", "lora", "lora, merged"}
    assert used["lora"][0] == used["lora, merged"][0]  # the loss
    assert float(used["lora"][1]) > float(used["lora, merged"][1]) == float(used["scratch"][1])  # the weights
    assert max(map(len, out.split("texts: ")[0].splitlines())) <= 110


@pytest.mark.parametrize("recipe", ["lora", "prompt"])
def test_an_interrupted_job_ends_as_if_it_had_not_been(recipe, local, tmp_path, monkeypatch, capsys, request):
    module = request.getfixturevalue(recipe)
    strategy = "qlora" if recipe == "lora" else "prefix"
    args = of(local, "--strategy", strategy, "--accumulate", "2", "--ema", "0.5")
    assert module.main([*args, "--log-dir", str(tmp_path / "a")]) == 0
    monkeypatch.setattr(job, "Interrupt", lambda: Stop(4))
    assert module.main([*args, "--log-dir", str(tmp_path / "b")]) == 130
    assert re.search(r"continue: uv run .* --resume ", capsys.readouterr().out)
    monkeypatch.undo()
    assert module.main(["--resume", str(tmp_path / "b")]) == 0
    a, b = results(tmp_path / "a"), results(tmp_path / "b")
    assert a == b


BAD = [
    (["--strategy", "lorra"], "'lorra'"),
    (["--model", "/nowhere", "--data", "DATA"], "error: --model /nowhere: no such folder"),
    (["--model", "gpt2"], "error: --model gpt2: name the texts to train on with --data"),
    (["--data", "DATA", "--model", "small"], "error: --model small: name a checkpoint"),
    (["--data", "/nowhere.jsonl"], "error: /nowhere.jsonl: No such file"),
    (["--data", "DATA", "--length", "8"], "error: --length 8: conversation 1"),
    (["--length", "2"], "error: --length: expected 8"),
    (["--scratch-lr", "0"], "error: --scratch-lr"),
    (["--resume", "/nowhere"], "error: --resume /nowhere"),
]


@pytest.mark.parametrize(("args", "words"), BAD)
@pytest.mark.parametrize("recipe", ["lora", "prompt"])
def test_mistakes_are_one_line_and_status_2(recipe, local, tmp_path, capsys, request, args, words):
    module = request.getfixturevalue(recipe)
    args = [str(local / "chats.jsonl") if arg == "DATA" else arg for arg in args]
    if "--data" in args and "--model" not in args:
        args += ["--model", str(local / "model")]
    try:
        status = module.main([*args, *([] if "--resume" in args else ["--log-dir", str(tmp_path / "job")])])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert words in error
    assert not (tmp_path / "job").exists()
    if error.startswith("error: "):
        assert error.count("\n") == 1


@pytest.mark.parametrize("recipe", ["lora", "prompt"])
def test_adapters_are_not_sharded(recipe, request):
    module = request.getfixturevalue(recipe)
    with pytest.raises(module.ft.InputError, match="--strategy: adapters take --parallel ddp or none"):
        module.resolve(module.Config(parallel="fsdp"))


@pytest.mark.parametrize("recipe", ["lora", "prompt"])
def test_a_late_conversation_that_does_not_fit_is_found_before_the_job(recipe, local, tmp_path, capsys, request):
    chats = [json.loads(line)["messages"] for line in (local / "chats.jsonl").read_text().splitlines()]
    chats[20][0]["content"] = "lost " * 100
    for part, some in (("train", chats), ("val", chats[:5])):
        (tmp_path / f"{part}.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in some))
    module = request.getfixturevalue(recipe)
    args = of(local, "--strategy", recipe, "--data", str(tmp_path), "--log-dir", str(tmp_path / "job"))
    assert module.main(args) == 2
    words = (
        r"^error: --length 64: conversation 21, of \d+ tokens, has no answer within it \(of those for train\)\n$"
    )
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(("recipe", "length"), [("lora", "129"), ("prompt", "125")])
def test_tokens_beyond_the_model_are_refused(recipe, length, local, tmp_path, capsys, request):
    args = of(local, "--strategy", recipe, "--length", length, "--log-dir", str(tmp_path / "job"))
    args += ["--tokens", "8"] if recipe == "prompt" else []
    assert request.getfixturevalue(recipe).main(args) == 2
    most = 120 if recipe == "prompt" else 128
    assert f"--length {length}: the model takes {most} tokens at most" in capsys.readouterr().err
    assert not (tmp_path / "job").exists()


def test_conversations_that_are_cut_are_counted_on_the_card(lora, local, tmp_path, capsys):
    chats = [json.loads(line)["messages"] for line in (local / "chats.jsonl").read_text().splitlines()]
    chats[4] += [{"role": "user", "content": "and " * 50}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    args = ["--data", str(tmp_path / "chats.jsonl"), "--strategy", "lora", "--log-dir", str(tmp_path / "job")]
    assert lora.main(of(local, *args)) == 0
    assert "\nconversations longer than --length 64, which are cut: 1\n" in capsys.readouterr().out


def test_bad_targets_and_torn_folders_are_one_line(lora, local, tmp_path, capsys):
    args = of(local, "--strategy", "lora", "--targets", "q_prj", "--log-dir", str(tmp_path / "job"))
    assert lora.main(args) == 2
    assert "targets: 'q_prj' matches no layer" in capsys.readouterr().err
    torn = tmp_path / "torn"
    torn.mkdir()
    for file in (local / "model").iterdir():
        (torn / file.name).write_bytes(file.read_bytes())
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    args = ["--data", str(local / "chats.jsonl"), "--model", str(torn), "--log-dir", str(tmp_path / "job")]
    assert lora.main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --model {torn}: cannot be loaded")
    assert error.count("\n") == 1
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("recipe", ["lora", "prompt"])
def test_a_dry_run_and_the_search_for_a_rate(recipe, local, tmp_path, monkeypatch, capsys, request):
    module = request.getfixturevalue(recipe)
    monkeypatch.chdir(tmp_path)
    assert module.main(of(local, "--strategy", recipe, "--dry-run")) == 0
    assert "validated and tested: all well" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert module.main(of(local, "--strategy", recipe, "--lr-find", "--log-dir", str(tmp_path / "job"))) == 0
    assert re.search(r"^suggested learning rate: (\S+)$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    ("recipe", "strategy"),
    [
        pytest.param("prompt", "prefix", marks=pytest.mark.slow),
        pytest.param("lora", "dora", marks=pytest.mark.release),
    ],
)
def test_verify(recipe, strategy, local, tmp_path, monkeypatch, capsys, request):
    module = request.getfixturevalue(recipe)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(RECIPES.parent))
    assert module.main(of(local, "--strategy", strategy, "--accumulate", "2", "--verify")) == 0
    out = capsys.readouterr().out
    assert re.search(r"\nall hold; \d+ s\n", out)
    assert len(re.findall(r" holds ", out)) == (6 if recipe == "lora" else 5)


def start(args, processes=1):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(RECIPES.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *launch, *args], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "recipe",
    [pytest.param("lora", marks=pytest.mark.slow), pytest.param("prompt", marks=pytest.mark.release)],
)
def test_two_processes_come_to_what_one_does(recipe, local, tmp_path):
    losses = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        args = of(local, "--strategy", recipe, "full", "--log-dir", str(folder))
        done = start([str(RECIPES / f"{recipe}.py"), *args], processes)
        assert done.returncode == 0, done.stderr
        losses.append([results(folder)[f"seed0/{name}"]["loss"] for name in (recipe, "full")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.release
@pytest.mark.parametrize(("recipe", "strategy"), [("lora", "full"), ("prompt", "head")])
def test_sharded_weights_are_whole_in_the_folder(recipe, strategy, local, tmp_path):
    args = of(local, "--strategy", strategy, "--epochs", "1", "--parallel", "fsdp", "--log-dir", str(tmp_path))
    done = start([str(RECIPES / f"{recipe}.py"), *args], processes=2)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "seed0" / strategy
    best = load_checkpoint(run / "best.pt")["model"]
    saved = load_causal(str(run / "model"))[0].state_dict()
    assert all(torch.equal(value, best[name]) for name, value in saved.items())


@pytest.mark.release
@pytest.mark.parametrize("recipe", ["lora", "prompt"])
def test_the_whole_demonstration(recipe, tmp_path):
    began = time.perf_counter()
    done = start([str(RECIPES / f"{recipe}.py"), "--log-dir", str(tmp_path / "job")])
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - began < 360  # a third of it alone; here other tests run beside it
    means = {name: float(mean) for name, mean in re.findall(r"^ ([a-z-]+) +([\d.]+) ±", done.stdout, re.M)}
    assert max(means["lora"], means["full"], means["scratch"]) < means["zero-shot"]
    gap = r"^answers: full - scratch: \+([\d.]+) ± ([\d.]+) points, ahead on 3 of 3 seeds$"
    mean, spread = map(float, re.search(gap, done.stdout, re.M).groups())
    assert mean > spread  # what the card claims for pretraining
    if recipe == "prompt":
        assert means["full"] < means["prefix"] < means["prompt"] < means["zero-shot"]
