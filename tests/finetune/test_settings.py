from types import SimpleNamespace

import pytest

from bptools.finetune import InputError, check_settings

GOOD = {
    "data": None, "model": "small", "weights": None, "strategy": ("head", "full"), "phases": ("head:1",),
    "log_dir": None, "compare": False, "epochs": 1, "batch_size": 1, "accumulate": 1, "lr": 0.1, "lr_decay": 0.5,
    "weight_decay": 0.0, "clip": 1.0, "seeds": 1, "seed": 0, "size": 0, "patience": 0, "workers": 0,
    "labels_per_class": 5, "holdout": 0.3, "ema": 0.0, "rank": 8, "save_every": 60.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"holdout": 0.0}, "--holdout: expected 0.001 to 0.999, got 0.0"),
        ({"holdout": 1.5}, "--holdout: "),
        ({"labels_per_class": 60}, "--labels-per-class: expected 1 to 40, got 60"),
        ({"patience": -1}, "--patience: expected 0 or more, got -1"),
        ({"seed": -1}, "--seed: "),
        ({"size": -5}, "--size: "),
        ({"workers": -1}, "--workers: "),
        ({"weight_decay": -1.0}, "--weight-decay: "),
        ({"lr": float("inf")}, "--lr: expected 0 to 100, got inf"),
        ({"lr": float("nan")}, "--lr: "),
        ({"lr_decay": float("inf")}, "--lr-decay: "),
        ({"strategy": ()}, "--strategy: "),
        ({"strategy": ("head", "head")}, "--strategy: expected one name or more, each once"),
        ({"data": ""}, "--data: expected a folder"),
        ({"data": "d", "compare": True}, "--compare .* leave out --data"),
        ({"weights": "DEFAULT"}, "--weights DEFAULT: name the images to train on with --data"),
        ({"model": "resnet18"}, "--model resnet18: name the images"),
        ({"phases": ("head:1@inf",)}, "--phases 'head:1@inf'"),
    ],
)
def test_what_cannot_be_is_named(change, message):
    with pytest.raises(InputError, match=f"^{message}"):
        check_settings(SimpleNamespace(**GOOD | change))


def test_a_folder_that_holds_a_job(tmp_path):
    settings = SimpleNamespace(**GOOD | {"log_dir": str(tmp_path)})
    check_settings(settings)
    (tmp_path / "seed0" / "full").mkdir(parents=True)
    (tmp_path / "seed0" / "full" / "last.pt").touch()
    with pytest.raises(InputError, match="holds a job"):
        check_settings(settings)
