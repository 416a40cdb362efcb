"""Fine-tuning in small parts that can be read and tested one by one.

Phases are data, one step owns its order, checkpoints are exact, and each frozen thing stays frozen.
``recipes/vision.py`` shows them at work.
"""

from bptools.optim import parameter_depths

from .adapters import fuse_lora, unfuse_lora
from .card import confusion_figure, one_run, print_card, print_comparison, trainability_table
from .checkpoint import (
    load_checkpoint,
    load_job,
    load_weights,
    make_folder,
    random_state,
    save_checkpoint,
    set_random_state,
)
from .data import Splits, digits, image_folder, make_loader
from .errors import InputError, expect_positive, one_line
from .evaluation import Evaluation, evaluate
from .interrupt import Interrupt
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
from .monitor import Monitor
from .phases import (
    Phase,
    check_optimizer,
    enter_phase,
    parameter_groups,
    parse_phases,
    set_modes,
    strategy_phases,
)
from .schedule import warmup_cosine
from .settings import check_settings
from .stepper import Stepper, StepResult, resolve_amp, resolve_device, windows
from .stopping import EarlyStopping

__all__ = [
    "Classifier",
    "EarlyStopping",
    "Evaluation",
    "InputError",
    "Interrupt",
    "Monitor",
    "Phase",
    "Splits",
    "StepResult",
    "Stepper",
    "check_model",
    "check_optimizer",
    "check_settings",
    "confusion_figure",
    "digits",
    "enter_phase",
    "evaluate",
    "expect_positive",
    "find_head",
    "fuse_lora",
    "image_folder",
    "input_format",
    "load_checkpoint",
    "load_job",
    "load_weights",
    "make_folder",
    "make_loader",
    "one_line",
    "one_run",
    "parameter_depths",
    "parameter_groups",
    "parse_phases",
    "print_card",
    "print_comparison",
    "random_state",
    "replace_head",
    "resolve_amp",
    "resolve_device",
    "resolve_weights",
    "save_checkpoint",
    "set_modes",
    "set_random_state",
    "small_classifier",
    "small_cnn",
    "strategy_phases",
    "torchvision_classifier",
    "trainability_table",
    "unfuse_lora",
    "warmup_cosine",
    "windows",
]
