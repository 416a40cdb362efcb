"""Soft prompts and prefix tuning on a frozen causal language model, beside LoRA, its head, and all its weights.

Without --data it needs no network: a small Llama reads Python's help and conversations that name a message's topic
and mood, then learns from few others to name them in another order. What trains is a few vectors before the input
("prompt"), before the keys and values of every layer ("prefix"), low-rank updates, the output layer, or all.

    uv run recipes/prompt.py                                     the demonstration, under three minutes on 2 cores
    uv run recipes/prompt.py --data FILE.jsonl --model FOLDER    a checkpoint that save_pretrained wrote
    uv run recipes/prompt.py --data DIR --model gpt2 --length 512 --strategy prompt --text "Answer in one line:"
    uv run recipes/prompt.py --strategy prompt prefix --lr 0.3 --prefix-lr 0.03
    uv run recipes/prompt.py --resume runs/prompt/TIME           after Ctrl-C, a crash or kill -9
    uv run recipes/prompt.py --verify                            prove these settings, and your edits, in seconds
    uv run torchrun --nproc-per-node 2 recipes/prompt.py         several processes

FILE.jsonl has in each line {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]} or
{"text": ...}; FILE.txt has texts between empty lines; DIR holds train and val (and test) of these. A prompt is an
input and not a change of weights, so it cannot be merged: it is left in "adapter", for ft.load_adapter.

Layers are bptools.nn's (ft.load_causal converts the model), LoRA's linear ones run bptools.functional.lora_linear,
and head and loss are one, bptools.functional.linear_cross_entropy, without logits.
"""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro
from matplotlib.axes import Axes

from bptools import finetune as ft

MESSAGES = Path(__file__).parent / "data" / "chat.csv"
Strategy = Literal["scratch", "prompt", "prefix", "lora", "head", "full"]
ADAPTERS = ("prompt", "prefix", "lora")


@dataclass(frozen=True)
class Config(ft.Settings):
    """Settings of a job; the defaults are the demonstration's."""

    data: ft.Dir = None
    """File or folder of texts or conversations; without it, Python's help and chat messages."""
    model: Annotated[str, tyro.conf.arg(metavar="FOLDER|NAME")] = "small"
    """Folder of a causal language model, or its name on the hub; "small": one layer of Llama, made here."""
    strategy: Annotated[tuple[Strategy, ...], tyro.conf.arg(metavar="NAME ...")] = get_args(Strategy)
    """Runs: scratch (from random weights), prompt, prefix, lora, head (the output layer), full (all weights)."""
    tokens: int = 16
    """Vectors of a prompt or prefix."""
    text: str = "Name the sentiment, then the intent:"
    """Words whose embeddings a prompt begins from, repeated or cut to --tokens; "": those of tokens at random."""
    rank: int = 4
    """Rank of the updates in "lora"."""
    epochs: int = 25
    batch_size: int = 16
    """Texts per batch, of all processes together."""
    lr: float = 0.1
    """Peak learning rate of a prompt."""
    prefix_lr: float = 0.1
    """Peak learning rate of a prefix."""
    lora_lr: float = 5e-3
    """Peak learning rate of "lora"."""
    head_lr: float = 1e-2
    """Peak learning rate of "head"."""
    full_lr: float = 5e-4
    """Peak learning rate of all weights."""
    scratch_lr: float = 8e-3
    """Peak learning rate of all weights where they begin at random."""
    weight_decay: float = 0.3
    patience: int = 6
    length: int = 128
    """Tokens of a text; longer texts are parted, and longer conversations cut."""
    shown: int = 4
    """Test documents that the model answers, before and after, in TensorBoard and on the card."""
    holdout: float = 0.2
    """Share of a single file that is set aside, half to pick the epoch, half to test."""
    pretrain_epochs: int = 3
    """Epochs of pretraining in the demonstration."""
    pretrain_lr: float = 2e-3
    """Peak learning rate of pretraining."""


REAL = Config(model="HuggingFaceTB/SmolLM2-135M-Instruct", strategy=("prompt", "lora"), text="", epochs=3, rank=8,
              batch_size=4, accumulate=4, lora_lr=2e-4, head_lr=2e-4, full_lr=2e-5, scratch_lr=3e-4,
              weight_decay=0.0, patience=0, length=1024, seeds=1)  # fmt: skip
RATES = (1e-12, 100)
LIMITS = {"holdout": (0.001, 0.999), "length": (8, 1_000_000), "pretrain_epochs": (1, 10_000), "prefix_lr": RATES,
          "lora_lr": RATES, "head_lr": RATES, "full_lr": RATES, "scratch_lr": RATES, "pretrain_lr": RATES,
          "tokens": (1, 10_000),
          "shown": (0, 1000)}  # fmt: skip
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
    for name in cfg.strategy:
        model, tokenizer = build(cfg, Path(), pretrained=cfg.data is not None)
        ft.check_length(prepare(cfg, name, model, tokenizer)[0], cfg.length)
    ft.check_documents(documents, tokenizer, cfg.length)
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
    return ft.small_causal(tokenizer, layers=1, length=max(256, cfg.length + cfg.tokens)), tokenizer


def prepare(cfg: Config, name: str, model: Any, tokenizer: Any) -> tuple[Any, ft.Phase, float]:
    """Return the model with the adapter of ``name``, what of it trains, and at which rate."""
    if name in ADAPTERS:
        model = ft.add_adapter(model, ft.Adapter(name, rank=cfg.rank, tokens=cfg.tokens))
        if name == "prompt" and cfg.text:
            ft.prompt_from_text(model, tokenizer, cfg.text)
    rates = {"prompt": cfg.lr, "prefix": cfg.prefix_lr, "lora": cfg.lora_lr, "head": cfg.head_lr}
    rates |= {"full": cfg.full_lr, "pretrain": cfg.pretrain_lr}
    trains = {"prompt": "prompt_encoder", "prefix": "prompt_encoder", "lora": "adapters"}
    pattern = ft.output_name(model) if name == "head" else trains.get(name, "all")
    epochs = cfg.pretrain_epochs if name == "pretrain" else cfg.epochs
    return model, ft.Phase((pattern,), epochs), rates.get(name, cfg.scratch_lr)


def train(cfg: Config, parallel: ft.Parallel, name: str, seed: int, folder: Path, **options: Any) -> dict:
    """Do one run, from where it was interrupted if it was, and return what it came to.

    ``options`` are those of :class:`bptools.finetune.Run` which say when to stop and who looks on.
    """
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)  # it is peft that gives it
    if cfg.data is None:
        torch.set_num_threads(1)  # tensors this small gain little from more, and the bits are the same anywhere
    documents = pretraining_data(cfg) if name == "pretrain" else read_data(cfg, seed)
    start = Path(cfg.log_dir, f"seed{cfg.seed}", "pretrain", "model")
    model, tokenizer = build(cfg, start, pretrained=name not in ("pretrain", "scratch"))
    model, phase, rate = prepare(cfg, name, model.to(parallel.device), tokenizer)
    parts = (documents.train, documents.val, documents.test)
    learned, val, test = (ft.tokenise(part, tokenizer, cfg.length)[0] for part in parts)
    collate, rows = ft.CausalBatch(tokenizer), ft.TokenRows(learned)  # a prompt is for one text: no packing
    score = partial(ft.causal_scores, model, collate=collate, device=parallel.device, batch=2 * cfg.batch_size)
    write = partial(ft.complete, model, tokenizer)
    shown = documents.test[:: max(1, len(documents.test) // max(1, cfg.shown))][: cfg.shown]
    if name == "zero-shot":
        return ft.not_trained(folder, "not trained", **score(test)._asdict(), written=[*map(write, shown)])

    own = replace(cfg, lr=rate)
    depths = dict.fromkeys((n for n, _ in model.named_parameters()), 0)  # one rate for all
    loss = ft.causal_loss(model, collate([rows[0]]))
    stepper = ft.make_stepper(own, model, loss, depths, parallel, count=ft.count_tokens())
    run = ft.make_run(own, folder, stepper, [phase], rows, seed, collate=collate, unit="tok", **options)
    for _ in run.phases():
        for _ in run.epochs():
            for window in run.windows():
                run.step(window)
            with run.averaged():
                scores = score(val)
                run.validate(scores.loss, exact=scores.exact)
    share = ft.trainable_share(model)
    run.load_best()
    results = score(test)._asdict() | {"trained": share[0], "share": 100 * share[0] / share[1]}
    results["written"] = [*map(write, shown)]
    whole = parallel.whole(model)
    if parallel.main:
        if name in ADAPTERS:
            ft.save_adapter(model, folder / "adapter")
        if name not in ("prompt", "prefix"):  # these cannot be merged
            ft.export(whole, folder / "model", processor=tokenizer)
    parallel.barrier()
    figures = {key: results[key] for key in ("loss", "perplexity", "exact", "share")}
    settings = asdict(own) | {"strategy": name, "seed": seed}
    run.monitor.finish(settings, figures, {}, written=ft.samples_text(results["written"]))
    return run.finish(results)


def before(cfg: Config, seed: int) -> tuple[str, ...]:
    """Return what others begin from: one small model for all seeds, which no hub has."""
    return ("pretrain",) if cfg.data is None and seed == cfg.seed else ()


def draw_shares(runs: dict[str, list], axes: Axes) -> None:
    """Draw each run's loss over the number of parameters that train."""
    for name, some in runs.items():
        if "trained" in some[0]:
            axes.scatter([r["trained"] for r in some], [r["loss"] for r in some], label=name, s=28)
    ft.log_scale(axes)
    axes.set(xscale="log", xlabel="parameters that train", ylabel=f"test {LOSS}", title="What a parameter buys")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def card(cfg: Config, folder: Path, runs: dict[str, list]) -> None:
    """Print what all runs came to."""
    notes = [f"texts: {read_data(cfg, cfg.seed).sizes()}; loss on the assistant's tokens, or on all of a text"]
    if cfg.data is None:
        notes.append(
            "one pretraining and the same test messages for all seeds; none of these is in the pretraining"
        )
        notes.append(
            "answers: topic and mood word for word, of the epoch with the lowest loss; guessing has 5.6 %"
        )
    if {"prompt", "prefix"} & set(cfg.strategy):
        notes.append("a prompt or prefix is an input, which no weight can take in: there is no merged model of it")
    columns = {"perplexity": ("perplexity", 2), "answers %": ("exact", 1), "trained": ("trained", 0),
               "trained %": ("share", 2)}  # fmt: skip
    pairs = [(a, b) for b in ("scratch", "full") for a in cfg.strategy if a not in ("scratch", b)]
    ft.print_card(
        RECIPE.console, folder, f"{cfg.data or 'chat messages'}, {cfg.model}", runs, notes=notes, metric=LOSS,
        also=() if cfg.data else (ANSWERS,), pairs=pairs, columns=columns, unit="texts",
        drawn="texts to learn from, weights and order", panel=partial(draw_shares, runs),
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
