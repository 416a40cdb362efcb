"""Train a recurrent language model by truncated backpropagation through time.

The text is cut into parallel streams, and each batch is the next chunk of all. The state is carried from chunk to
chunk; gradients are not. A step of a plain recurrence multiplies the gradient by the same matrix again and again,
so that it vanishes or explodes: without clipping, a rate that is right with it throws the weights far away. The
gates of an LSTM are the other cure.

    uv run recipes/lstm.py                                      the demonstration: Python's help, by bytes
    uv run recipes/lstm.py --data FILE.txt --vocabulary 4000 --width 512 --layers 2 --dropout 0.3 --epochs 20
    uv run recipes/lstm.py --cell rnn --chunk 256 --checkpoint-every sqrt
    uv run recipes/lstm.py --resume runs/lstm/TIME              after Ctrl-C, a crash or kill -9
    uv run recipes/lstm.py --verify                             prove these settings, and your edits
    uv run torchrun --nproc-per-node 2 recipes/lstm.py          each process has half of the streams

Strategies: "carried"; "reset", where each chunk begins at a zero state; "plain", a recurrence without gates; and
"unclipped", the same without clipping. N-grams with Kneser-Ney smoothing are beside them. Recurrence and embedding
are bptools' ops, and the head with its loss is bptools.functional.linear_cross_entropy, which never holds the
logits.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro
from matplotlib.axes import Axes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bptools import finetune as ft

Strategy = Literal["carried", "reset", "plain", "unclipped"]
PERPLEXITY = ft.Metric("perplexity", "perplexity per token", "", digits=2, higher=False, top=None)
NGRAMS = {"3-grams": 3, "5-grams": 5}


@dataclass(frozen=True)
class Config(ft.Settings):
    """Settings of a job; the defaults are the demonstration's."""

    data: ft.Dir = None
    """Text file, or folder of .txt and .md files; without it, Python's help on its syntax."""
    vocabulary: int = 257
    """Tokens: bytes (and one for the end), or with more of them pairs of bytes that are frequent in the text."""
    cell: Literal["lstm", "gru", "rnn"] = "lstm"
    """Kind of recurrence in "carried" and "reset"; rnn has a tanh and no gates."""
    width: int = 128
    """Of embedding and hidden state."""
    layers: int = 1
    """Recurrent layers."""
    dropout: float = 0.0
    """Between layers, and before the head."""
    chunk: int = 64
    """Tokens that gradients reach back."""
    checkpoint_every: Annotated[str | None, tyro.conf.arg(metavar="N|sqrt")] = None
    """Keep the state of every so many steps only, and make the others again in the backward pass."""
    strategy: Annotated[tuple[Strategy, ...], tyro.conf.arg(metavar="NAME ...")] = get_args(Strategy)
    """Runs: carried, reset (each chunk begins at zero), plain (an rnn), unclipped (the same, not clipped)."""
    batch_size: int = 32
    """Streams, of all processes together."""
    epochs: int = 2
    optimizer: Literal["adamw", "adam", "sgd", "momentum", "rmsprop", "lamb"] = "sgd"
    lr: float = 20.0
    plain_lr: float = 10.0
    """Peak learning rate of "plain" and "unclipped"."""
    weight_decay: float = 0.0
    clip: float = 0.25
    amp: Literal["auto", "bf16", "fp16", "off"] = "off"


LIMITS = {
    "vocabulary": (257, 10**6),
    "width": (1, 10**5),
    "layers": (1, 100),
    "dropout": (0, 0.95),
    "chunk": (1, 10**6),
    "plain_lr": (1e-12, 1e6),
}


def resolve(cfg: Config) -> Config:
    """Refuse what cannot be, before any file is written."""
    ft.check_settings(cfg, LIMITS)
    every = cfg.checkpoint_every
    if every not in (None, "sqrt") and not (every.isdigit() and int(every)):
        raise ft.InputError(f"--checkpoint-every: expected a number above 0 or sqrt, got {every!r}")
    for name, runs in {"lr": {"carried", "reset"}, "plain_lr": {"plain", "unclipped"}}.items():
        value, option = getattr(cfg, name), f"--{name.replace('_', '-')}"
        if cfg.optimizer != "sgd" and value == getattr(Config, name) and runs & set(cfg.strategy):
            raise ft.InputError(f"{option}: expected one for --optimizer {cfg.optimizer}, got {value:g}, sgd's")
    _, parts = read_data(cfg)
    for ids in parts[:2]:
        ft.Streams(ids, cfg.batch_size if ids is parts[0] else 1, cfg.chunk)
    return cfg


@lru_cache(1)
def read_data(cfg: Config) -> tuple[Any, list[torch.Tensor]]:
    """Return the tokenizer, made from the training text, and the first 90 %, next 5 % and last 5 % of the text."""
    text = "\n".join(ft.python_help()) if cfg.data is None else ft.read_text(cfg.data)
    cuts = [0, *(round(share * len(text)) for share in (0.9, 0.95)), len(text)]
    parts = [text[a:b] for a, b in pairwise(cuts)]
    tokenizer = ft.byte_pairs(parts[0].splitlines(keepends=True), cfg.vocabulary)
    return tokenizer, [torch.tensor(tokenizer(part, verbose=False)["input_ids"]) for part in parts]


@lru_cache(1)
def test_bytes(cfg: Config) -> int:
    """Return the length of the test text in bytes of UTF-8."""
    tokenizer, parts = read_data(cfg)
    return len(tokenizer.decode(parts[2]).encode())


def figures(cfg: Config, loss: float) -> dict[str, float]:
    """Return what a loss in nats per token of the test text comes to."""
    bits = loss * (len(read_data(cfg)[1][2]) - 1) / test_bytes(cfg) / math.log(2)
    return {"perplexity": ft.perplexity(loss), "bits": bits}


def train(cfg: Config, parallel: ft.Parallel, name: str, seed: int, folder: Path, **options: Any) -> dict:
    """Do one run, from where it was interrupted if it was, and return what it came to.

    ``options`` are those of :class:`bptools.finetune.Run` which say when to stop and who looks on.
    """
    tokenizer, (ids, val, test) = read_data(cfg)
    if name in NGRAMS:
        loss = ft.NGrams(ids.tolist(), NGRAMS[name], len(tokenizer)).loss(test.tolist())
        return ft.not_trained(folder, "counts, not a network", **figures(cfg, loss))
    if cfg.data is None:
        torch.set_num_threads(1)  # steps this small gain little from more
    every = int(cfg.checkpoint_every) if (cfg.checkpoint_every or "").isdigit() else cfg.checkpoint_every
    if name in ("plain", "unclipped"):
        cfg = replace(cfg, cell="rnn", lr=cfg.plain_lr)
    model = ft.RecurrentLanguageModel(
        len(tokenizer), cfg.width, cfg.layers, cfg.cell, streams=cfg.batch_size, dropout=cfg.dropout,
        checkpoint_every=every,
    ).to(parallel.device)  # fmt: skip
    carry, data = name != "reset", ft.Streams(ids, cfg.batch_size, cfg.chunk)
    depths = ft.parameter_depths(model, (ids[None, :2].to(parallel.device),) * 2 + (model.state[:, :, :1],))
    stepper = ft.make_stepper(
        cfg, model, ft.carried_loss(model, carry), depths, parallel, count=ft.count_tokens(shift=False),
        clip=None if name == "unclipped" else cfg.clip,
    )  # fmt: skip
    run = ft.make_run(
        cfg, folder, stepper, ft.strategy_phases("full", cfg.epochs), data, seed, shuffle=False,
        items=data.inputs.numel(), unit="tokens", **options,
    )  # fmt: skip
    settings = asdict(cfg) | {"strategy": name, "seed": seed}
    try:
        for _ in run.phases():
            for _ in run.epochs():
                for window in run.windows():
                    run.step(window)
                with run.averaged():
                    loss = ft.text_loss(model, val, chunk=cfg.chunk, carry=carry)
                    if name == "unclipped" and not loss < math.log(len(tokenizer)):
                        raise FloatingPointError("validation is worse than guessing")
                    run.validate(loss, perplexity=ft.perplexity(loss))
    except FloatingPointError as error:
        if name != "unclipped":
            raise
        run.monitor.finish(settings, {}, {})
        return run.finish(
            {"perplexity": None, "bits": None, "reason": f"diverged by step {run.taken}: {error}"[:90]}
        )
    run.load_best()
    found = figures(cfg, ft.text_loss(model, test, chunk=cfg.chunk, carry=carry))
    start = torch.tensor(tokenizer("The ")["input_ids"])
    sample = tokenizer.decode(ft.continue_text(parallel.whole(model), start, 300, seed=seed))
    run.monitor.finish(settings, found, {}, sample=f"```\nThe {sample}\n```")
    return run.finish(found | {"sample": sample})


def gradient_norms(cfg: Config, folder: Path) -> dict[str, list[float]]:
    """Return the gradient's norm before clipping at each step, by strategy, of the first seed."""
    norms = {}
    for name in cfg.strategy:
        events = EventAccumulator(str(folder / f"seed{cfg.seed}" / name), size_guidance={"scalars": 0})
        events.Reload()
        if "train/gradient norm" in events.Tags()["scalars"]:
            norms[name] = [event.value for event in events.Scalars("train/gradient norm")]
    return norms


def card(cfg: Config, folder: Path, runs: dict[str, list]) -> None:
    """Print what all runs came to, and a sample of what the first strategy writes."""
    norms = gradient_norms(cfg, folder)

    def panel(axes: Axes) -> None:
        for name, values in norms.items():
            axes.plot(range(1, len(values) + 1), values, lw=1.2, label=name)
        axes.axhline(cfg.clip, color="black", lw=0.8, ls="--", label=f"clipped to {cfg.clip:g}")
        axes.set(
            xlabel="step", ylabel="gradient norm before clipping", yscale="log", title="Gradient norm, first seed"
        )
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)

    _, parts = read_data(cfg)
    sizes = [f"{len(ids):,}" for ids in parts]
    notes = [f"tokens: {sizes[0]} to train, {sizes[1]} to pick the best epoch, {sizes[2]} to test, in that order"]
    highest = ", ".join(f"{name} {max(values):.3g}" for name, values in norms.items())
    notes.append(f"highest gradient norm before clipping, first seed: {highest}")
    sample = next((r["sample"] for some in runs.values() for r in some if "sample" in r), "")
    notes.append(
        f"a sample: The {' '.join(sample.split())[:200]}" if sample else "no sample, as nothing was trained"
    )
    title = f"{cfg.data or 'help of Python'}, {cfg.cell} of width {cfg.width}"
    pairs = [("carried", "reset"), ("carried", "plain"), *(("carried", name) for name in NGRAMS)]
    ft.print_card(
        RECIPE.console, folder, title, runs, notes=notes, metric=PERPLEXITY, pairs=pairs,
        columns={"bits per byte": ("bits", 3)}, drawn="weights", panel=panel,
    )  # fmt: skip


RECIPE = ft.Recipe(
    __file__, __doc__, Config(), resolve, train, card, also=lambda cfg: tuple(NGRAMS), metric=PERPLEXITY
)


def main(args: Sequence[str] | None = None) -> int:
    """Read the command line and do the job; return the exit status."""
    return RECIPE.main(args)


if __name__ == "__main__":
    sys.exit(main())
