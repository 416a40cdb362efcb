from types import SimpleNamespace

import pytest

from bptools.finetune import InputError, check_settings

GOOD = {
    "data": None, "strategy": ("head", "discriminative"), "phases": ("head:1",), "log_dir": None, "epochs": 1,
    "batch_size": 1, "accumulate": 1, "lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.0, "clip": 1.0, "seeds": 1,
    "seed": 0, "size": 0, "patience": 0, "workers": 0, "labels_per_class": 5, "holdout": 0.3, "ema": 0.0,
    "rank": 8, "save_every": 60.0,
}  # fmt: skip
LIMITS = {"holdout": (0.001, 0.999), "size": (0, 10_000), "labels_per_class": (1, 40)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"holdout": 0.0}, "--holdout: expected 0.001 to 0.999, got 0.0"),
        ({"holdout": 1.5}, "--holdout: "),
        ({"labels_per_class": 60}, "--labels-per-class: expected 1 to 40, got 60"),
        ({"patience": -1}, "--patience: expected 0 or more, got -1"),
        ({"seed": -1}, "--seed: "),
        ({"size": -5}, "--size: expected 0 to 10000, got -5"),
        ({"workers": -1}, "--workers: "),
        ({"weight_decay": -1.0}, "--weight-decay: "),
        ({"lr": float("inf")}, "--lr: expected 0 to 100, got inf"),
        ({"lr": float("nan")}, "--lr: "),
        ({"lr_decay": float("inf")}, "--lr-decay: "),
        ({"strategy": ()}, "--strategy: "),
        ({"strategy": ("head", "head")}, "--strategy: expected one name or more, each once"),
        ({"data": ""}, "--data: expected a file or folder"),
        ({"phases": ("head:1@inf",)}, "--phases 'head:1@inf'"),
        ({"strategy": ("head", "full")}, "--phases: those of --strategy discriminative, got --strategy head full"),
    ],
)
def test_what_cannot_be_is_named(change, message):
    with pytest.raises(InputError, match=f"^{message}"):
        check_settings(SimpleNamespace(**GOOD | change), LIMITS)


def test_gradient_flow_takes_whole_weights():
    settings = SimpleNamespace(**GOOD, diagnose=True, parallel="fsdp")
    with pytest.raises(InputError, match=r"^--diagnose: .* got fsdp"):
        check_settings(settings)


def test_a_folder_that_holds_a_job(tmp_path):
    settings = SimpleNamespace(**GOOD | {"log_dir": str(tmp_path)})
    check_settings(settings)
    (tmp_path / "seed0" / "full").mkdir(parents=True)
    (tmp_path / "seed0" / "full" / "last.pt").touch()
    with pytest.raises(InputError, match="holds a job"):
        check_settings(settings)
