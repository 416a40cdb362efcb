"""Fine-tuning in small parts that can be read and tested one by one.

Phases are data, one step owns its order, a run goes on from where it was killed, and each frozen thing stays
frozen. ``recipes/vision.py`` shows them at work.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bptools._console import plain_table
from bptools.optim import parameter_depths

from .adapters import (
    Adapter,
    add_adapter,
    fuse_lora,
    merge_adapter,
    tied_parameters,
    trainable_share,
    unfuse_lora,
)
from .batches import count_samples, count_tokens, split_batch, supervised, to_device, windows
from .card import (
    ACCURACY,
    Metric,
    best_seed,
    best_strategy,
    class_table,
    confusion_figure,
    log_scale,
    one_run,
    print_card,
    print_comparison,
)
from .checkpoint import (
    FileStore,
    holds_run,
    load_checkpoint,
    load_json,
    load_weights,
    make_folder,
    random_state,
    save_checkpoint,
    save_json,
    set_random_state,
    set_seed,
)
from .command import exit_status, load_config, restarted
from .conll import (
    Sentences,
    TagSplits,
    conll_folder,
    draw_sentences,
    read_conll,
)
from .corpus import byte_pairs, python_help, word_pieces
from .data import Augmented, Mixed, Splits, make_loader
from .deploy import check_export, deploy
from .devices import resolve_amp, resolve_device
from .distributed import Parallel, job_time, parallel_from_env, shutdown, speaks, whole_state
from .ema import Ema
from .encoders import (
    MaskedBlocks,
    Pad,
    TextClassifier,
    check_encoder,
    head_names,
    labelled_loss,
    labelled_outputs,
    load_pretrained,
    masked_loss,
    pretrain_masked,
    small_encoder,
)
from .errors import InputError, expect_positive, one_line
from .evaluation import Evaluation, evaluate
from .export import export, load_adapter, save_adapter, whole_folder
from .imbalance import balanced_loss, class_weights, focal_cross_entropy, sample_weights
from .interrupt import Interrupt
from .job import Dir, Recipe, Settings, TransferSettings, make_run, make_stepper, not_trained
from .language import (
    NGrams,
    RecurrentLanguageModel,
    Streams,
    carried_loss,
    continue_text,
    perplexity,
    read_text,
    text_loss,
)
from .lr_search import RateFinder, RateFinding, RateFound, lr_find
from .mistakes import image_figures, mistakes_figure
from .monitor import Monitor
from .phases import (
    Phase,
    check_optimizer,
    draw,
    enter_phase,
    gradual_phases,
    needs_redraw,
    parameter_groups,
    parse_phases,
    set_modes,
    set_rates,
    set_trainable,
    strategy_phases,
)
from .report import trainability_report
from .run import Run, Stopped
from .schedule import SCHEDULES, make_schedule
from .screening import (
    AUC,
    Rule,
    area,
    bootstrap,
    fit_rule,
    measures,
    print_screening,
    roc_panel,
    screening_figures,
)
from .settings import check_settings
from .sharded import ShardedStore
from .stepper import Stepper, StepResult
from .stopping import EarlyStopping
from .tagging import (
    EntityScores,
    TaggedWords,
    draw_types,
    entities,
    entity_scores,
    entity_table,
    label_names,
    labels_of_head,
    tag_mistakes,
    tagged_outputs,
    tags_by_dictionary,
    tags_by_regression,
    tags_by_word,
    tokenizer_notes,
    words_apart,
)
from .text import (
    Texts,
    TextSplits,
    TokenisedTexts,
    draw_texts,
    macro_f1,
    read_texts,
    text_baseline,
    text_folder,
    text_mistakes,
)
from .verify import dry_run, verify, verify_kind

if TYPE_CHECKING:
    from .augment import augmentation, mixing
    from .images import digits, image_folder, labels_of
    from .models import (
        Classifier,
        check_model,
        find_head,
        input_format,
        replace_head,
        resolve_weights,
        small_classifier,
        small_cnn,
        torchvision_classifier,
    )

# Their modules import torchvision or transformers, which takes longer than all the rest.
_LAZY = {
    "augment": ("augmentation", "mixing"),
    "causal": (
        "CausalBatch", "Documents", "Footprint", "TEMPLATE", "TokenRows", "causal_loss", "causal_scores",
        "chat_tokenizer", "check_documents", "check_length", "check_packing", "complete", "document_folder",
        "footprint", "labelled_chats", "load_causal", "merged_difference", "output_name", "prompt_from_text",
        "samples_text", "small_causal", "tokenise", "usage",
    ),
    "images": ("digits", "image_folder", "labels_of"),
    "models": (
        "Classifier", "check_model", "find_head", "input_format", "replace_head", "resolve_weights",
        "small_classifier", "small_cnn", "torchvision_classifier",
    ),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ACCURACY",
    "AUC",
    "SCHEDULES",
    "Adapter",
    "Augmented",
    "Classifier",
    "Dir",
    "EarlyStopping",
    "Ema",
    "EntityScores",
    "Evaluation",
    "FileStore",
    "InputError",
    "Interrupt",
    "MaskedBlocks",
    "Metric",
    "Mixed",
    "Monitor",
    "NGrams",
    "Pad",
    "Parallel",
    "Phase",
    "RateFinder",
    "RateFinding",
    "RateFound",
    "Recipe",
    "RecurrentLanguageModel",
    "Rule",
    "Run",
    "Sentences",
    "Settings",
    "ShardedStore",
    "Splits",
    "StepResult",
    "Stepper",
    "Stopped",
    "Streams",
    "TagSplits",
    "TaggedWords",
    "TextClassifier",
    "TextSplits",
    "Texts",
    "TokenisedTexts",
    "TransferSettings",
    "add_adapter",
    "area",
    "augmentation",
    "balanced_loss",
    "best_seed",
    "best_strategy",
    "bootstrap",
    "byte_pairs",
    "carried_loss",
    "check_encoder",
    "check_export",
    "check_model",
    "check_optimizer",
    "check_settings",
    "class_table",
    "class_weights",
    "confusion_figure",
    "conll_folder",
    "continue_text",
    "count_samples",
    "count_tokens",
    "deploy",
    "digits",
    "draw",
    "draw_sentences",
    "draw_texts",
    "draw_types",
    "dry_run",
    "enter_phase",
    "entities",
    "entity_scores",
    "entity_table",
    "evaluate",
    "exit_status",
    "expect_positive",
    "export",
    "find_head",
    "fit_rule",
    "focal_cross_entropy",
    "fuse_lora",
    "gradual_phases",
    "head_names",
    "holds_run",
    "image_figures",
    "image_folder",
    "input_format",
    "job_time",
    "label_names",
    "labelled_loss",
    "labelled_outputs",
    "labels_of",
    "labels_of_head",
    "load_adapter",
    "load_checkpoint",
    "load_config",
    "load_json",
    "load_pretrained",
    "load_weights",
    "log_scale",
    "lr_find",
    "macro_f1",
    "make_folder",
    "make_loader",
    "make_run",
    "make_schedule",
    "make_stepper",
    "masked_loss",
    "measures",
    "merge_adapter",
    "mistakes_figure",
    "mixing",
    "needs_redraw",
    "not_trained",
    "one_line",
    "one_run",
    "parallel_from_env",
    "parameter_depths",
    "parameter_groups",
    "parse_phases",
    "perplexity",
    "plain_table",
    "pretrain_masked",
    "print_card",
    "print_comparison",
    "print_screening",
    "python_help",
    "random_state",
    "read_conll",
    "read_text",
    "read_texts",
    "replace_head",
    "resolve_amp",
    "resolve_device",
    "resolve_weights",
    "restarted",
    "roc_panel",
    "sample_weights",
    "save_adapter",
    "save_checkpoint",
    "save_json",
    "screening_figures",
    "set_modes",
    "set_random_state",
    "set_rates",
    "set_seed",
    "set_trainable",
    "shutdown",
    "small_classifier",
    "small_cnn",
    "small_encoder",
    "speaks",
    "split_batch",
    "strategy_phases",
    "supervised",
    "tag_mistakes",
    "tagged_outputs",
    "tags_by_dictionary",
    "tags_by_regression",
    "tags_by_word",
    "text_baseline",
    "text_folder",
    "text_loss",
    "text_mistakes",
    "tied_parameters",
    "to_device",
    "tokenizer_notes",
    "torchvision_classifier",
    "trainability_report",
    "trainable_share",
    "unfuse_lora",
    "verify",
    "verify_kind",
    "whole_folder",
    "whole_state",
    "windows",
    "word_pieces",
    "words_apart",
]
