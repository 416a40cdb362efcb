"""Fine-tune a tagger of words, such as one of names: any encoder of transformers, on files in CoNLL's columns.

Without --data it needs no network. The 264 sentences are Hindi, with names of persons, places and organisations,
written for bptools; some are labelled for training. A small encoder learns, by guessing hidden word pieces, from
400 other sentences without tags; then it is fine-tuned in several ways, beside one from random weights, the tag
that each word has most often, a dictionary of the names seen, and logistic regression over words and their ends.
What counts is whole names: F1 of entities, by seqeval.

    uv run recipes/tagger.py                                    the demonstration
    uv run recipes/tagger.py --sentences 120                    with more labels
    uv run recipes/tagger.py --data DIR --model bert-base-multilingual-cased
    uv run recipes/tagger.py --data FILE.conll --column 4 --model DIR --strategy lora --lr 5e-4
    uv run recipes/tagger.py --resume runs/tagger/TIME          after Ctrl-C, a crash or kill -9
    uv run recipes/tagger.py --verify                           prove these settings, and your edits
    uv run torchrun --nproc-per-node 2 recipes/tagger.py

DIR of --data holds train.conll and dev.conll (and test.conll), or .txt; a single file is split. Tags may be in
IOB1, IOB2 (BIO) or BIOES. The fine-tuned model is left in a folder that from_pretrained reads, with its tokenizer
and the names of its tags. All layers run bptools' ops; a step's loss is the mean over all words of its batches.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
from transformers import AutoModelForMaskedLM, AutoModelForTokenClassification

import bptools.nn
from bptools import finetune as ft

DATA = Path(__file__).parent / "data"
NAMES, TEXT = DATA / "hindi_names.conll", DATA / "hindi_text.txt"
Strategy = Literal["scratch", "head", "full", "discriminative", "lora"]
logger = logging.getLogger("bptools.finetune")


@dataclass(frozen=True)
class Config(ft.TransferSettings):
    """Settings of a job; the defaults are the demonstration's."""

    data: ft.Dir = None
    """File of a word and its tag a line, or a folder of train, dev and test; without it, the Hindi sentences."""
    column: int = -1
    """Column of the tag; 1 is the first, -1 the last."""
    word_column: int = 1
    """Column of the word."""
    model: str = "small"
    """"small", a folder that save_pretrained wrote, or a name on the hub."""
    strategy: Annotated[tuple[Strategy, ...], tyro.conf.arg(metavar="NAME ...")] = get_args(Strategy)[:4]
    """Runs: scratch (from random weights), head, full (one rate), discriminative (in phases, rates by depth),
    lora (low-rank updates and the head; merged at the end)."""
    epochs: int = 25
    batch_size: int = 10
    lr: float = 1e-3
    lr_decay: float = 0.8
    length: int = 128
    """Most word pieces that the model sees at once; longer sentences are cut into windows."""
    sentences: int = 60
    """Labelled sentences to learn from in the demonstration; 40 more pick the epoch, the rest is tested."""
    pretrain_epochs: int = 20
    """Epochs of pretraining in the demonstration."""
    holdout: float = 0.3
    """Share of a single file that is set aside, half to pick the epoch, half to test."""


REAL = Config(model="bert-base-multilingual-cased", strategy=("discriminative",), epochs=4, batch_size=16, lr=5e-5,
              lr_decay=0.9, weight_decay=0.01, seeds=1, patience=2)  # fmt: skip
LIMITS = {"holdout": (0.001, 0.999), "length": (8, 100_000), "pretrain_epochs": (1, 10_000), "sentences": (1, 200)}
WIDTH, LAYERS, PIECES, LENGTH, BLOCK = 128, 2, 1500, 128, 64  # of the small encoder
PICK = 40  # sentences that pick the epoch
PEERS = {"by word": ("the tag that the word has most often", ft.tags_by_word),
         "dictionary": ("names as they were seen, the longest first", ft.tags_by_dictionary),
         "regression": ("over words, neighbours and ends, not a network", ft.tags_by_regression)}  # fmt: skip
F1 = ft.Metric("f1", "entity F1")


def resolve(cfg: Config) -> Config:
    """Refuse what cannot be, before any file is written; warn of what the tokenizer cannot read."""
    ft.check_settings(cfg, LIMITS)
    if cfg.data is None and cfg.model != "small":
        raise ft.InputError(f"--model {cfg.model}: name the sentences to train on with --data")
    if cfg.data is not None and cfg.model == "small":
        raise ft.InputError("--model small: is the demonstration's; name a folder or one of the hub for --data")
    if cfg.parallel == "fsdp" and "lora" in cfg.strategy:
        raise ft.InputError("--strategy lora: expected --parallel ddp or none, as adapters are small, got fsdp")
    splits = read_data(cfg, cfg.seed)
    model, tokenizer, labels = build(cfg, cfg.seed, cfg.model if cfg.data else None)
    ft.check_encoder(model, example(ft.TaggedWords(splits.train, labels, tokenizer, cfg.length), tokenizer),
                     cfg.length, cfg.phases)  # fmt: skip
    if cfg.data and ft.speaks():
        for note in ft.tokenizer_notes(tokenizer, splits.train):
            logger.warning("--model %s: %s", cfg.model, note)
    return cfg


@lru_cache(4)
def read_data(cfg: Config, seed: int) -> ft.TagSplits:
    """Return the sentences of a seed."""
    if cfg.data is not None:
        return ft.conll_folder(cfg.data, cfg.column, cfg.word_column, holdout=cfg.holdout, seed=seed)
    whole = ft.read_conll(NAMES)
    sizes = (cfg.sentences, PICK, len(whole) - cfg.sentences - PICK)
    return ft.TagSplits(*ft.draw_sentences(NAMES, whole, sizes, seed), tuple(sorted(whole.types())))


def build(cfg: Config, seed: int, source: str | None, fresh: bool = False) -> tuple[Any, Any, tuple[str, ...]]:
    """Return the tagger, with the weights of ``source`` unless ``fresh``, its tokenizer and its tags."""
    labels = read_data(cfg, seed).labels
    if source is None:
        model, tokenizer = small(AutoModelForTokenClassification, **ft.label_names(labels))
        return model, tokenizer, labels
    labels = ft.labels_of_head(source, labels)
    model, tokenizer = ft.load_pretrained(AutoModelForTokenClassification, source, **ft.label_names(labels))
    if fresh:
        model = AutoModelForTokenClassification.from_config(model.config)
        bptools.nn.convert(model)
    return model, ft.words_apart(tokenizer), labels


def small(auto: Any, **options: Any) -> tuple[Any, Any]:
    """Return an encoder of random weights for the demonstration, and its tokenizer, which no tagged word is in."""
    tokenizer = ft.word_pieces(TEXT.read_text(encoding="utf-8").splitlines(), PIECES)
    return ft.small_encoder(auto, tokenizer, width=WIDTH, layers=LAYERS, length=LENGTH, **options), tokenizer


def example(data: ft.TaggedWords, tokenizer: Any) -> dict[str, Any]:
    """Return the inputs of a batch of one sentence."""
    return {name: value for name, value in ft.Pad(tokenizer)([data[0]]).items() if name != "labels"}


def pretrain(cfg: Config, parallel: ft.Parallel, seed: int, folder: Path, **options: Any) -> dict[str, Any]:
    """Teach the small encoder to guess hidden word pieces, and leave it in ``folder / "encoder"``."""
    texts = TEXT.read_text(encoding="utf-8").splitlines()
    model, tokenizer = small(AutoModelForMaskedLM)
    model = model.to(parallel.device)
    kept = [text for i, text in enumerate(texts) if i % 10]
    own = replace(cfg, batch_size=16, lr=1e-3, patience=0)
    options |= {"epochs": cfg.pretrain_epochs, "block": BLOCK, "key": "f1"}
    return ft.pretrain_masked(own, parallel, seed, folder, model, tokenizer, [kept], texts[::10], **options)


def train(cfg: Config, parallel: ft.Parallel, name: str, seed: int, folder: Path, **options: Any) -> dict:
    """Do one run, from where it was interrupted if it was, and return what it came to.

    ``options`` are those of :class:`bptools.finetune.Run` which say when to stop and who looks on.
    """
    if name == "pretrain":
        return pretrain(cfg, parallel, seed, folder, **options)
    splits = read_data(cfg, seed)
    if name in PEERS:
        reason, tag = PEERS[name]
        return ft.not_trained(folder, reason, **tested(splits, tag(splits.train, splits.test.words)))
    fresh = name == "scratch"
    own = None if fresh else str(Path(cfg.log_dir, f"seed{cfg.seed}", "pretrain", "encoder"))
    model, tokenizer, labels = build(cfg, seed, cfg.model if cfg.data else own, fresh)
    model, head, pad = model.to(parallel.device), ft.head_names(model), ft.Pad(tokenizer)
    if name == "lora":
        model = ft.add_adapter(model, ft.Adapter(rank=cfg.rank), head=head)
    words, val_words, test_words = (
        ft.TaggedWords(part, labels, tokenizer, cfg.length) for part in (splits.train, splits.val, splits.test)
    )
    evaluate = partial(ft.evaluate, model, device=parallel.device, batch_size=64, collate=pad,
                       outputs=ft.tagged_outputs)  # fmt: skip

    depths = ft.parameter_depths(model, ft.to_device(example(words, tokenizer), parallel.device))
    counted = {"count": ft.count_tokens(shift=False)}
    stepper = ft.make_stepper(cfg, model, ft.labelled_loss, depths, parallel, **counted)
    phases = ft.strategy_phases(name, cfg.epochs, cfg.phases, cfg.lr_decay, frozen_dropout=cfg.frozen_dropout)
    kept = {"head": head, "unit": "words", "items": 0, "keep": {"labels": labels}}
    run = ft.make_run(cfg, folder, stepper, phases, words, seed, collate=pad, **kept, **options)
    for _ in run.phases():
        for _ in run.epochs():
            for window in run.windows():
                run.step(window)
            with run.averaged():
                val = evaluate(val_words)
                found = ft.entity_scores(splits.val.tags, val_words.tags(val.predictions))
                run.validate(100 - found.f1, f1=found.f1, cross_entropy=val.loss)  # which is lowest too early
    run.load_best()
    whole = parallel.whole(model)
    if parallel.main:
        if name == "lora":
            ft.save_adapter(model, folder / "adapter")
        ft.export(whole, folder / "model", processor=tokenizer)
    test = evaluate(test_words)
    result = tested(splits, test_words.tags(test.predictions))
    metrics = {key: result[key] for key in ("f1", "precision", "recall")} | {"loss": test.loss}
    mistakes = ft.tag_mistakes(splits.test.words, splits.test.tags, result["predictions"])
    confusion = ft.confusion_figure(test.targets, test.predictions, labels)
    settings = asdict(cfg) | {"strategy": name, "seed": seed}
    run.monitor.finish(settings, metrics, {"confusion of tags": confusion}, mistakes=mistakes)
    return run.finish(result | {"loss": test.loss})


def tested(splits: ft.TagSplits, predictions: list[list[str]]) -> dict[str, Any]:
    """Return what tags for the test sentences come to."""
    scores = ft.entity_scores(splits.test.tags, predictions)
    return {"targets": splits.test.tags, "predictions": predictions, **scores._asdict()}


def before(cfg: Config, seed: int) -> tuple[str, ...]:
    """Return what others begin from: one encoder for all seeds, which is on no hub."""
    return ("pretrain",) if cfg.data is None and seed == cfg.seed else ()


def card(cfg: Config, folder: Path, runs: dict[str, list]) -> None:
    """Print what all runs came to."""
    splits = read_data(cfg, cfg.seed)
    scores = {
        name: ft.entity_scores(
            *([tags for run in some for tags in run[key]] for key in ("targets", "predictions"))
        )
        for name, some in runs.items()
    }
    best = ft.best_strategy(runs)
    table = ft.entity_table(f"{best}, the best in validation: test entities of all seeds", scores[best])
    notes = [f"sentences: {splits.sizes()}"]
    if cfg.data is None:
        notes.append("one pretraining for all seeds, on 400 other sentences, without tags")
    panel = partial(ft.draw_types, runs=scores, types=splits.types)
    columns = {"precision %": ("precision", 1), "recall %": ("recall", 1)}
    title = f"{cfg.data or 'Hindi names'}, {cfg.model}"
    ft.print_card(RECIPE.console, folder, title, runs, notes=notes, metric=F1, columns=columns, unit="sentences",
                  drawn="sentences, weights and order", tables=(table,), panel=panel)  # fmt: skip


RECIPE = ft.Recipe(
    __file__, __doc__, Config(), resolve, train, card, before, also=lambda cfg: tuple(PEERS),
    real={"--data": REAL}, metric=F1,
)  # fmt: skip


def main(args: Sequence[str] | None = None) -> int:
    """Read the command line and do the job; return the exit status."""
    return RECIPE.main(args)


if __name__ == "__main__":
    sys.exit(main())
