"""Fine-tune a causal language model with LoRA, DoRA, QLoRA or as a whole, and see what each costs.

Without --data it needs no network: a small Llama reads Python's help and chat messages, then learns from few
conversations to answer a message with its topic and mood. The loss is on what the assistant says; several texts
share a row, and none sees another. The card has loss, share of parameters, memory and time of each strategy.

    uv run recipes/lora.py                                      the demonstration, under three minutes on 2 cores
    uv run recipes/lora.py --data FILE.jsonl --model FOLDER     a checkpoint that save_pretrained wrote
    uv run recipes/lora.py --data DIR --model Qwen/Qwen2.5-0.5B-Instruct --strategy qlora --rank 16
    uv run recipes/lora.py --data FILE.txt --model gpt2 --strategy lora full --length 512 --lean
    uv run recipes/lora.py --resume runs/lora/TIME              after Ctrl-C, a crash or kill -9
    uv run recipes/lora.py --verify                             prove these settings, and your edits, in seconds
    uv run torchrun --nproc-per-node 2 recipes/lora.py          several processes

FILE.jsonl has in each line {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]} or
{"text": ...}; FILE.txt has texts between empty lines; DIR holds train and val (and test) of these. Each run leaves
"model", a folder for from_pretrained with the adapter merged, and "adapter", for ft.load_adapter or peft.

Layers are bptools.nn's (ft.load_causal converts the model), LoRA's run bptools.functional.lora_linear, 4-bit ones
are bptools.nn.NF4Linear, and head and loss are one, bptools.functional.linear_cross_entropy, without logits.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes

from bptools import finetune as ft

MESSAGES = Path(__file__).parent / "data" / "chat.csv"
Strategy = Literal["scratch", "lora", "dora", "qlora", "full"]
ADAPTERS = ("lora", "dora", "qlora")


@dataclass(frozen=True)
class Config(ft.Settings):
    """Settings of a job; the defaults are the demonstration's."""

    data: ft.Dir = None
    """File or folder of texts or conversations; without it, Python's help and chat messages."""
    model: Annotated[str, tyro.conf.arg(metavar="FOLDER|NAME")] = "small"
    """Folder of a causal language model, or its name on the hub; "small": one layer of Llama, made here."""
    strategy: Annotated[tuple[Strategy, ...], tyro.conf.arg(metavar="NAME ...")] = get_args(Strategy)
    """Runs: scratch (from random weights), lora, dora, qlora (adapters, merged at the end), full (all weights)."""
    rank: int = 8
    """Rank of the adapters."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout of the adapters' input."""
    targets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Layers to adapt, such as q_proj v_proj; by default every linear one but the head."""
    epochs: int = 25
    batch_size: int = 8
    """Rows per batch, of all processes together."""
    lr: float = 5e-3
    """Peak learning rate of adapters."""
    full_lr: float = 5e-4
    """Peak learning rate of all weights."""
    scratch_lr: float = 8e-3
    """Peak learning rate of all weights where they begin at random."""
    weight_decay: float = 0.3
    patience: int = 6
    length: int = 128
    """Tokens of a row; longer texts are parted, and longer conversations cut."""
    pack: bool = True
    """Put several texts into one row, none of which sees another."""
    shown: int = 4
    """Test documents that the model answers, before and after, in TensorBoard and on the card."""
    temperature: float = 0.0
    """Of these answers: tokens are drawn, rather the likely ones below 1; 0: the most likely one each time."""
    holdout: float = 0.2
    """Share of a single file that is set aside, half to pick the epoch, half to test."""
    pretrain_epochs: int = 3
    """Epochs of pretraining in the demonstration."""
    pretrain_lr: float = 2e-3
    """Peak learning rate of pretraining."""


REAL = Config(model="HuggingFaceTB/SmolLM2-135M-Instruct", strategy=("lora",), epochs=2, batch_size=4,
              accumulate=4, lr=2e-4, full_lr=2e-5, scratch_lr=3e-4, weight_decay=0.0, patience=0, length=1024,
              seeds=1)  # fmt: skip
LIMITS = {"holdout": (0.001, 0.999), "length": (8, 1_000_000), "pretrain_epochs": (1, 10_000),
          "dropout": (0, 0.99), "full_lr": (1e-12, 100), "scratch_lr": (1e-12, 100), "pretrain_lr": (1e-12, 100),
          "alpha": (1e-9, 1e9), "shown": (0, 1000), "temperature": (0, 100)}  # fmt: skip
LOSS = ft.Metric("loss", "loss per token", "nats", 3, higher=False, top=None)
ANSWERS = ft.Metric("exact", "answers")


def resolve(cfg: Config) -> Config:
    """Refuse what cannot be, before any file is written."""
    ft.check_settings(cfg, LIMITS)
    if cfg.data is None and cfg.model != "small":
        raise ft.InputError(f"--model {cfg.model}: name the texts to train on with --data")
    if cfg.data and cfg.model == "small":
        raise ft.InputError("--model small: name a checkpoint, as there is nothing to pretrain on with --data")
    if cfg.parallel == "fsdp" and set(cfg.strategy) & set(ADAPTERS):
        raise ft.InputError("--strategy: adapters take --parallel ddp or none, as they are small, got fsdp")
    documents = read_data(cfg, cfg.seed)
    model, tokenizer = build(cfg, Path(), pretrained=cfg.data is not None)
    ft.check_length(model, cfg.length)
    samples = ft.check_documents(documents, tokenizer, cfg.length)
    if cfg.pack:
        ft.check_packing(model, tokenizer, samples[:3])
    for name in set(cfg.strategy) & set(ADAPTERS):
        adapt(cfg, name, build(cfg, Path(), pretrained=cfg.data is not None)[0])
    return cfg


@lru_cache(4)
def read_data(cfg: Config, seed: int) -> ft.Documents:
    """Return the documents of a seed. The demonstration tests on the same messages in all seeds."""
    if cfg.data is not None:
        return ft.document_folder(cfg.data, holdout=cfg.holdout, seed=seed)
    counts = {"source": 14, "train": 3, "val": 2, "test": 8}  # of each topic and mood
    return ft.labelled_chats(MESSAGES, ("intent", "sentiment"), **counts, seed=seed, fixed=cfg.seed)


@lru_cache(1)
def pretraining_data(cfg: Config) -> ft.Documents:
    """Return what to pretrain on: a quarter of Python's help, and other conversations, ten times."""
    texts, chats = ft.python_help()[::4], read_data(cfg, cfg.seed).more
    held = (*texts[::20], *chats[::20])
    kept, known = ([one for i, one in enumerate(some) if i % 20] for some in (texts, chats))
    return ft.Documents((*kept, *10 * known), held, held)


def build(cfg: Config, start: Path, pretrained: bool) -> tuple[Any, Any]:
    """Return the model, with the weights of --model or of the folder ``start``, and its tokenizer."""
    if cfg.data or pretrained:
        return ft.load_causal(cfg.model if cfg.data else str(start), pretrained=pretrained)
    tokenizer = ft.chat_tokenizer(pretraining_data(cfg).train, 1200)
    return ft.small_causal(tokenizer, layers=1, length=max(256, cfg.length)), tokenizer


def adapt(cfg: Config, name: str, model: Any) -> Any:
    """Put the adapter that ``name`` says on ``model``."""
    options = {"rank": cfg.rank, "alpha": cfg.alpha, "dropout": cfg.dropout, "targets": cfg.targets or None}
    return ft.add_adapter(model, ft.Adapter(name, **options))


def train(cfg: Config, parallel: ft.Parallel, name: str, seed: int, folder: Path, **options: Any) -> dict:
    """Do one run, from where it was interrupted if it was, and return what it came to.

    ``options`` are those of :class:`bptools.finetune.Run` which say when to stop and who looks on.
    """
    if cfg.data is None:
        torch.set_num_threads(1)  # tensors this small gain little from more, and the bits are the same anywhere
    documents = pretraining_data(cfg) if name == "pretrain" else read_data(cfg, seed)
    start = Path(cfg.log_dir, f"seed{cfg.seed}", "pretrain", "model")
    model, tokenizer = build(cfg, start, pretrained=name not in ("pretrain", "scratch"))
    model = model.to(parallel.device)
    if name in ADAPTERS:
        model = adapt(cfg, name, model)
    parts = (documents.train, documents.val, documents.test)
    (learned, val, test), cut = zip(*(ft.tokenise(part, tokenizer, cfg.length) for part in parts), strict=True)
    collate, plain = ft.CausalBatch(tokenizer, cfg.pack), ft.CausalBatch(tokenizer)
    score = partial(ft.causal_scores, collate=plain, device=parallel.device, batch=4 * cfg.batch_size)
    write = partial(ft.complete, model, tokenizer, temperature=cfg.temperature, seed=seed)
    shown = documents.test[:: max(1, len(documents.test) // max(1, cfg.shown))][: cfg.shown]
    if name == "zero-shot":
        return ft.not_trained(folder, "not trained", **score(model, test)._asdict(), written=[*map(write, shown)])

    rows = ft.TokenRows(learned, cfg.length if cfg.pack else None)
    example = collate([rows[0]])
    loss = ft.causal_loss(model, example)
    rates = {"full": cfg.full_lr, "scratch": cfg.scratch_lr, "pretrain": cfg.pretrain_lr}
    own = replace(cfg, lr=rates.get(name, cfg.lr))
    depths = dict.fromkeys((n for n, _ in model.named_parameters()), 0)  # one rate for all
    stepper = ft.make_stepper(own, model, loss, depths, parallel, count=ft.count_tokens())
    epochs = cfg.pretrain_epochs if name == "pretrain" else cfg.epochs
    phases = [ft.Phase(("adapters" if name in ADAPTERS else "all",), epochs)]
    run = ft.make_run(own, folder, stepper, phases, rows, seed, collate=collate, unit="tok", **options)
    for _ in run.phases():
        for _ in run.epochs():
            for window in run.windows():
                run.step(window)
            with run.averaged():
                scores = score(model, val)
                run.validate(scores.loss, exact=scores.exact)
    run.load_best()
    memory = ft.footprint(
        stepper, collate([rows[i] for i in range(min(cfg.batch_size, len(rows)))]), lean=cfg.lean
    )
    scores, used = ft.usage(score, model, test)
    results = scores._asdict() | {"memory": memory._asdict(), "total": sum(memory) / 2**20}
    share = ft.trainable_share(model)
    results |= {"share": 100 * share[0] / share[1], "written": [*map(write, shown)], "cut": sum(cut)}
    results["used"] = {name: used}
    whole = parallel.whole(model)
    if parallel.main:
        ft.export(whole, folder / "model", processor=tokenizer)
        if name in ADAPTERS:
            ft.save_adapter(model, folder / "adapter")
            results["apart"] = ft.merged_difference(model, plain([[sample] for sample in test[:8]]))
            merged = ft.load_causal(str(folder / "model"))[0].to(parallel.device)
            _, results["used"][f"{name}, merged"] = ft.usage(score, merged, test)
        saved = folder / ("adapter" if name in ADAPTERS else "model")
        results["file"] = sum(file.stat().st_size for file in saved.glob("*.safetensors")) / 2**20
    parallel.barrier()
    figures = {key: results[key] for key in ("loss", "perplexity", "exact", "share", "total")}
    settings = asdict(own) | {"strategy": name, "seed": seed}
    run.monitor.finish(settings, figures, {}, written=ft.samples_text(results["written"]))
    return run.finish(results)


def before(cfg: Config, seed: int) -> tuple[str, ...]:
    """Return what others begin from: one small model for all seeds, which no hub has."""
    return ("pretrain",) if cfg.data is None and seed == cfg.seed else ()


def draw_memory(runs: dict[str, list], axes: Axes) -> None:
    """Draw what a step of each strategy holds in memory, part by part."""
    trained = {name: some[-1]["memory"] for name, some in runs.items() if "memory" in some[-1]}
    bottom = [0.0] * len(trained)
    for part in ("weights", "gradients", "optimizer", "backward"):
        heights = [memory[part] / 2**20 for memory in trained.values()]
        axes.bar(
            range(len(trained)), heights, bottom=bottom, label=part if part != "backward" else "kept for backward"
        )
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(trained)), list(trained), rotation=25, ha="right")
    axes.set(ylabel="MiB", title="Memory of a training step")
    axes.margins(y=0.3)
    axes.legend(frameon=False)


def used_table(runs: dict[str, list]) -> Any:
    """Return what each model costs in use, with its adapter beside or merged: means over the seeds."""
    rows = []
    for some in runs.values():
        for form in some[-1].get("used", ()):
            loss, seconds, weights = np.mean([result["used"][form] for result in some], 0)
            rows.append((form, f"{loss:.3f}", f"{weights / 2**20:.2f}", f"{seconds:.2f}"))
    headings = {"model": "left", "test nats": "right", "weights MiB": "right", "seconds of the test": "right"}
    return ft.plain_table("in use, mean of the seeds", headings, rows)


def card(cfg: Config, folder: Path, runs: dict[str, list]) -> None:
    """Print what all runs came to."""
    notes = [f"texts: {read_data(cfg, cfg.seed).sizes()}; loss on the assistant's tokens, or on all of a text"]
    if cfg.data is None:
        pretext = "one pretraining and the same test messages for all seeds; none of these is in the pretraining"
        notes += [
            pretext,
            "answers: topic and mood word for word, of the epoch with the lowest loss; guessing has 5.6 %",
        ]
    apart = [result["apart"] for some in runs.values() for result in some if "apart" in result]
    if apart:
        notes.append(f"merged and unmerged adapters: logits differ by at most {max(apart):.0e} of their norm")
    if cut := max(result.get("cut", 0) for some in runs.values() for result in some):
        notes.append(f"conversations longer than --length {cfg.length}, which are cut: {cut}")
    last = cfg.strategy[-1]
    for (given, wanted, old), (_, _, new) in zip(
        runs["zero-shot"][-1]["written"][:2], runs[last][-1]["written"], strict=False
    ):
        texts = (" ".join(text.split())[:70] for text in (given, wanted, old, new))
        notes.append("{!r}: wanted {!r}, before {!r}, {} {!r}".format(*list(texts)[:3], last, new[:70]))
    columns = {
        "perplexity": ("perplexity", 2), "answers %": ("exact", 1), "trained %": ("share", 1),
        "memory MiB": ("total", 1),
    }  # fmt: skip
    pairs = [("lora", "scratch"), ("full", "scratch"), ("lora", "full"), ("dora", "lora"), ("qlora", "lora")]
    ft.print_card(
        RECIPE.console, folder, f"{cfg.data or 'chat messages'}, {cfg.model}", runs, notes=notes, metric=LOSS,
        also=() if cfg.data else (ANSWERS,), pairs=pairs, columns=columns, unit="texts",
        drawn="texts to learn from, weights and order", tables=(used_table(runs),),
        panel=partial(draw_memory, runs),
    )  # fmt: skip


RECIPE = ft.Recipe(
    __file__, __doc__, Config(), resolve, train, card, before, also=lambda cfg: ("zero-shot",),
    real={"--data": REAL}, metric=LOSS,
)  # fmt: skip


def main(args: Sequence[str] | None = None) -> int:
    """Read the command line and do the job; return the exit status."""
    return RECIPE.main(args)


if __name__ == "__main__":
    sys.exit(main())
