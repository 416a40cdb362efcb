"""Fine-tune a text classifier: any encoder of transformers, on CSV or JSON Lines.

Without --data it needs no network. The texts are 504 chat messages in Hindi and English mixed, written for
bptools, with six intents; 20 of each are labelled. A small encoder learns to guess hidden word pieces in Python's
own help and in the messages that are not tested; then it is fine-tuned in several ways, beside one from random
weights, and beside logistic regression over runs of characters, which is hard to beat with so few labels. What so
little text can teach is of no help here, as the card shows: to gain by fine-tuning takes a model that has read.

    uv run recipes/text.py                                      the demonstration
    uv run recipes/text.py --label-column sentiment
    uv run recipes/text.py --model DIR --epochs 10 --lr 2e-4 --head own --pool first    from weights that have read
    uv run recipes/text.py --data FILE.csv --model distilbert-base-multilingual-cased
    uv run recipes/text.py --data DIR --model DIR --strategy lora --head mlp --pool mean
    uv run recipes/text.py --resume runs/text/TIME              after Ctrl-C, a crash or kill -9
    uv run recipes/text.py --verify                             prove these settings, and your edits
    uv run torchrun --nproc-per-node 2 recipes/text.py

DIR of --data holds train.csv and val.csv (and test.csv), or .tsv, or .jsonl; a single file is split. The model is
left in a folder that from_pretrained reads, tokenizer included. All its layers run bptools' ops, and --lean halves
what is kept for the backward pass.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

import bptools.nn
from bptools import finetune as ft

MESSAGES = Path(__file__).parent / "data" / "chat.csv"
Strategy = Literal["scratch", "head", "full", "discriminative", "lora"]


@dataclass(frozen=True)
class Config(ft.TransferSettings):
    """Settings of a job; the defaults are the demonstration's."""

    data: ft.Dir = None
    """CSV, TSV or JSON Lines, or a folder of train, val and test; without it, the chat messages."""
    text_column: str = "text"
    """Column of the text."""
    label_column: str = "intent"
    """Column of the class; the messages have intent and sentiment."""
    model: str = "small"
    """"small", a folder that save_pretrained wrote, or a name on the hub."""
    head: Literal["own", "linear", "mlp"] = "linear"
    """What comes on top of the encoder: what the model's class has, a linear layer, or two with a tanh between."""
    pool: Literal["first", "mean"] = "mean"
    """What "linear" and "mlp" see of a text: its first hidden state, or the mean of all."""
    strategy: Annotated[tuple[Strategy, ...], tyro.conf.arg(metavar="NAME ...")] = get_args(Strategy)[:4]
    """Runs: scratch (from random weights), head, full (one rate), discriminative (in phases, rates by depth),
    lora (low-rank updates and the head; merged at the end)."""
    epochs: int = 20
    batch_size: int = 24
    lr: float = 1e-3
    lr_decay: float = 0.8
    length: int = 128
    """Most word pieces of a text; what is longer is cut."""
    labels: int = 20
    """Labelled messages of each class in the demonstration, as many more to pick the epoch."""
    pretrain_epochs: int = 2
    """Epochs of pretraining in the demonstration."""
    holdout: float = 0.3
    """Share of a single file that is set aside, half to pick the epoch, half to test."""
    smoothing: float = 0.1
    """Label smoothing."""


REAL = Config(
    model="distilbert-base-multilingual-cased", label_column="label", head="own", pool="first", epochs=4,
    strategy=("discriminative",), batch_size=16, lr=5e-5, lr_decay=0.9, seeds=1, patience=2,
)  # fmt: skip
LIMITS = {"holdout": (0.001, 0.999), "labels": (1, 100_000), "length": (4, 100_000),
          "pretrain_epochs": (1, 10_000), "smoothing": (0, 0.9)}  # fmt: skip
WIDTH, LAYERS, PIECES, BLOCK = 128, 2, 1000, 64  # of the small encoder
PEERS = {"majority": "always the most frequent class", "n-grams": "logistic regression, not a network"}


def resolve(cfg: Config) -> Config:
    """Refuse what cannot be, before any file is written."""
    ft.check_settings(cfg, LIMITS)
    if cfg.data is not None and cfg.model == "small":
        raise ft.InputError("--model small is the demonstration's; name a folder or a model on the hub")
    if cfg.parallel == "fsdp" and "lora" in cfg.strategy:
        raise ft.InputError("--strategy lora: expected --parallel ddp or none, as adapters are small, got fsdp")
    splits = read_data(cfg, cfg.seed)
    model, tokenizer = build(cfg, splits.classes, Path(), pretrained=cfg.model != "small")
    ft.check_encoder(model, example(cfg, splits, tokenizer), cfg.length, cfg.phases)
    return cfg


@lru_cache(4)
def read_data(cfg: Config, seed: int) -> ft.TextSplits:
    """Return the texts of a seed. The demonstration tests on the same messages in all seeds, 40 in 100."""
    if cfg.data is not None:
        return ft.text_folder(cfg.data, cfg.text_column, cfg.label_column, holdout=cfg.holdout, seed=seed)
    whole = ft.read_texts(MESSAGES, cfg.text_column, cfg.label_column)
    classes = tuple(sorted(set(whole.labels)))
    tested = {name: round(0.4 * whole.labels.count(name)) for name in classes}
    test, _, pool = ft.draw_texts(MESSAGES, whole, tested, tested, cfg.seed)
    count = [dict.fromkeys(classes, times * cfg.labels) for times in (1, 2)]
    train, val, _ = ft.draw_texts("--labels", pool, *count, seed)
    return ft.TextSplits(train, val, test, classes, pool.texts if cfg.model == "small" else ())


@lru_cache(1)
def unlabelled(cfg: Config) -> tuple[list[str], list[str]]:
    """Return the texts of pretraining: Python's help, and all messages that are not tested."""
    return ft.python_help(), list(read_data(cfg, cfg.seed).more)


def build(cfg: Config, classes: Sequence[str], folder: Path, pretrained: bool) -> tuple[Any, Any]:
    """Return the classifier, with the weights of --model or of the encoder in ``folder``, and its tokenizer."""
    auto = AutoModelForSequenceClassification if cfg.head == "own" else AutoModel
    names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    source = cfg.model if cfg.model != "small" else str(folder) if pretrained else None
    if source:
        model, tokenizer = ft.load_pretrained(auto, source, **names)
        if not pretrained:
            model = auto.from_config(model.config)
            bptools.nn.convert(model)
    else:
        tokenizer = ft.word_pieces([*unlabelled(cfg)[0], *3 * unlabelled(cfg)[1]], PIECES, lower=True)
        model = ft.small_encoder(auto, tokenizer, width=WIDTH, layers=LAYERS, length=cfg.length, **names)
    return (model if cfg.head == "own" else ft.TextClassifier(model, len(classes), cfg.head, cfg.pool)), tokenizer


def example(cfg: Config, splits: ft.TextSplits, tokenizer: Any) -> dict[str, Any]:
    """Return a batch of two texts, without labels."""
    some = ft.TokenisedTexts(splits.train.take([0, 1]), splits.classes, tokenizer, cfg.length)
    batch = ft.Pad(tokenizer)([some[0], some[1]])
    del batch["labels"]
    return batch


def pretrain(cfg: Config, parallel: ft.Parallel, seed: int, folder: Path, **options: Any) -> dict[str, Any]:
    """Teach the small encoder to guess hidden word pieces, and leave it in ``folder / "encoder"``."""
    tokenizer = build(cfg, ("a", "b"), folder, pretrained=False)[1]
    model = ft.small_encoder(AutoModelForMaskedLM, tokenizer, width=WIDTH, layers=LAYERS, length=cfg.length)
    model = model.to(parallel.device)
    held = [text for texts in unlabelled(cfg) for text in texts[::10]]
    kept = [[text for i, text in enumerate(texts) if i % 10] for texts in unlabelled(cfg)]
    own = replace(cfg, batch_size=32, lr=1e-3, patience=0)
    options |= {"epochs": cfg.pretrain_epochs, "block": min(BLOCK, cfg.length), "key": "accuracy"}
    return ft.pretrain_masked(own, parallel, seed, folder, model, tokenizer, kept, held, **options)


def train(cfg: Config, parallel: ft.Parallel, name: str, seed: int, folder: Path, **options: Any) -> dict:
    """Do one run, from where it was interrupted if it was, and return what it came to.

    ``options`` are those of :class:`bptools.finetune.Run` which say when to stop and who looks on.
    """
    if name == "pretrain":
        return pretrain(cfg, parallel, seed, folder, **options)
    splits = read_data(cfg, seed)
    if name in PEERS:
        found = ft.text_baseline(name, splits)
        return ft.not_trained(folder, PEERS[name], **found._asdict(), f1=ft.macro_f1(found))
    start = Path(cfg.log_dir, f"seed{cfg.seed}", "pretrain", "encoder")
    model, tokenizer = build(cfg, splits.classes, start, pretrained=name != "scratch")
    model, head = model.to(parallel.device), ft.head_names(model)
    if name == "lora":
        model = ft.add_adapter(model, ft.Adapter(rank=cfg.rank), head=head)
    tokenised = [
        ft.TokenisedTexts(part, splits.classes, tokenizer, cfg.length)
        for part in (splits.train, splits.val, splits.test)
    ]
    pad = ft.Pad(tokenizer)
    evaluate = partial(
        ft.evaluate, model, device=parallel.device, batch_size=64, collate=pad, outputs=ft.labelled_outputs
    )

    depths = ft.parameter_depths(model, ft.to_device(example(cfg, splits, tokenizer), parallel.device))
    loss = partial(ft.labelled_loss, smoothing=cfg.smoothing)
    stepper = ft.make_stepper(cfg, model, loss, depths, parallel)
    phases = ft.strategy_phases(name, cfg.epochs, cfg.phases, cfg.lr_decay, frozen_dropout=cfg.frozen_dropout)
    kept = {"head": head, "unit": "texts", "keep": {"classes": splits.classes}}
    run = ft.make_run(cfg, folder, stepper, phases, tokenised[0], seed, collate=pad, **kept, **options)
    for _ in run.phases():
        for _ in run.epochs():
            for window in run.windows():
                run.step(window)
            with run.averaged():
                val = evaluate(tokenised[1])
                # by the loss, epochs are picked before most is learned
                run.validate(100 - val.accuracy, accuracy=val.accuracy, cross_entropy=val.loss)
    run.load_best()
    whole = parallel.whole(model)
    if parallel.main:
        if name == "lora":
            ft.save_adapter(model, folder / "adapter")
        ft.export(whole, folder / "model", processor=tokenizer)
    result = evaluate(tokenised[2])
    metrics = {"accuracy": result.accuracy, "macro F1": ft.macro_f1(result), "loss": result.loss}
    figures = {"confusion matrix": ft.confusion_figure(result.targets, result.predictions, splits.classes)}
    settings = asdict(cfg) | {"strategy": name, "seed": seed}
    run.monitor.finish(
        settings, metrics, figures, mistakes=ft.text_mistakes(splits.test.texts, result, splits.classes)
    )
    return run.finish(result._asdict() | {"f1": metrics["macro F1"]})


def before(cfg: Config, seed: int) -> tuple[str, ...]:
    """Return what others begin from: one encoder for all seeds, which no hub has."""
    return ("pretrain",) if cfg.model == "small" and seed == cfg.seed else ()


def card(cfg: Config, folder: Path, runs: dict[str, list]) -> None:
    """Print what all runs came to."""
    splits = read_data(cfg, cfg.seed)
    notes = [f"texts: {splits.sizes()}"]
    if cfg.data is None:
        notes.append("the same test messages for all seeds")
    if cfg.model == "small":
        notes.append("one pretraining for all seeds, on none of the test messages")
    title = f"{cfg.data or 'chat messages'}, {cfg.label_column}, {cfg.model}"
    columns, drawn = {"macro F1": ("f1", 1)}, "texts, weights and order"
    ft.print_card(
        RECIPE.console, folder, title, runs, splits.classes, notes, columns=columns, unit="texts", drawn=drawn
    )


RECIPE = ft.Recipe(
    __file__, __doc__, Config(), resolve, train, card, before, also=lambda cfg: tuple(PEERS), real={"--data": REAL}
)


def main(args: Sequence[str] | None = None) -> int:
    """Read the command line and do the job; return the exit status."""
    return RECIPE.main(args)


if __name__ == "__main__":
    sys.exit(main())
