"""``recipes/vision.py``: models by name, mixing, augmentation, unequal classes, two classes, export."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import Stop, load_recipe
from PIL import Image
from torchvision.models import get_model

from bptools.finetune import job, load_checkpoint, load_json

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "vision.py"
TINY = ("--strategy", "full", "--seeds", "1", "--epochs", "2", "--device", "cpu")
MIXED = ["--mix", "both", "--augment", "affine", "--erase", "0.2", "--label-smoothing", "0.1"]
MIXED += ["--balance", "sampler"]


@pytest.fixture(scope="module")
def vision():
    return load_recipe(RECIPE, "vision")


@pytest.fixture(autouse=True)
def few_draws(vision, monkeypatch):
    """Let intervals be of few draws."""
    print_screening = vision.ft.print_screening
    monkeypatch.setattr(vision.ft, "print_screening", lambda *a, **k: print_screening(*a, **k, draws=5))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, shade, count in (("ill", 60, 6), ("odd", 120, 8), ("well", 200, 14)):
        (root / name).mkdir()
        for i in range(count):
            pixels = generator.normal(shade, 40, (40, 36, 3)).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def result(folder, name="full"):
    return load_json(folder / "seed0" / name / "result.json")


def weights(folder, name="full"):
    return load_checkpoint(folder / "seed0" / name / "best.pt")["model"]


def test_a_screening_reports_resumes_and_exports(vision, tmp_path, monkeypatch, capsys):
    args = ["--positive", "8", *TINY, *MIXED, "--batch-size", "100", "--export", "torch"]
    assert vision.main([*args, "--log-dir", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    for words in ("8 or not: AUC", "full: test, to find '8'", "expected calibration error, scaled", "balanced %"):
        assert words in out
    for words in ("chosen to find 95 % there", "52 of 549 are positive", "export/model.pt2 (outputs differ by"):
        assert words in out
    found = result(tmp_path / "a")
    assert 0 <= found["sensitivity"] <= 100 > found["brier"] > 0 < found["temperature"]
    assert len(found["log_odds"]) == 549
    assert "auc" in found["history"][0]
    for file in ("card.png", "screening.png"):
        with Image.open(tmp_path / "a" / file) as picture:
            assert picture.width > 1000
    about = json.loads((tmp_path / "a" / "export" / "preprocessing.json").read_text())
    assert about["classes"] == ["other", "8"]
    assert about["threshold"] == found["threshold"]
    assert about["preprocessing"]["invert"] is True
    program = torch.export.load(tmp_path / "a" / "export" / "model.pt2").module()
    target = vision.read_data(vision.replace(vision.SCREENING, positive="8"), 0)[1]
    logits = program(target.test.tensors[0])
    assert (logits[:, 1] - logits[:, 0]).tolist() == pytest.approx(found["log_odds"], abs=1e-3)

    monkeypatch.setattr(job, "Interrupt", lambda: Stop(75))  # after 8 epochs of 8 windows
    args = [*args, "--log-dir", str(tmp_path / "b")]
    while (status := vision.main(args)) == 130:
        args = ["--resume", str(tmp_path / "b")]
        monkeypatch.setattr(job, "Interrupt", lambda: Stop(3))
    assert status == 0
    assert result(tmp_path / "b") | {"seconds": 0} == found | {"seconds": 0}
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("balance", ["weights", "effective", "focal"])
def test_a_folder_of_unequal_classes(vision, images, tmp_path, capsys, balance):
    args = ["--data", str(images), "--model", "small", *TINY, "--size", "16", "--workers", "0"]
    assert vision.main([*args, "--balance", balance, "--log-dir", str(tmp_path / "x")]) == 0
    assert "balanced %" in capsys.readouterr().out
    assert 0 <= result(tmp_path / "x")["balanced_accuracy"] <= 100
    assert not (tmp_path / "x" / "screening.png").exists()


def test_a_class_of_a_folder_against_the_rest(vision, images, tmp_path, capsys):
    args = ["--data", str(images), "--model", "small", "--strategy", "full", "--epochs", "1", "--size", "16",
            "--workers", "0", "--augment", "trivial", "--mix", "cutmix", "--sensitivity", "0"]  # fmt: skip
    args += ["--positive", "ill", "--device", "cpu", "--log-dir", str(tmp_path / "x")]
    assert vision.main(args) == 0
    out = capsys.readouterr().out
    assert "to find 'ill'" in out
    assert "by Youden's index" in out
    assert "auc" in result(tmp_path / "x")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--positive", "88"], "error: --positive '88': expected one of 0, 1, 2"),
        (["--mix-alpha", "0"], "error: --mix-alpha: expected 0.01 to 100, got 0.0"),
        (["--erase", "1.5"], "error: --erase: expected 0 to 1, got 1.5"),
        (["--label-smoothing", "1"], "error: --label-smoothing: expected 0 to 0.999, got 1.0"),
        (["--sensitivity", "95"], "error: --sensitivity: expected 0 to 1, got 95.0"),
        (["--balance", "focal", "--mix", "mixup"], "error: --balance focal: takes whole labels"),
        (["--balance", "focal", "--label-smoothing", "0.1"], "error: --balance focal: takes whole labels"),
        (["--augment", "rand"], "randaugment"),
        (["--data", ".", "--model", "efficientnet_b9", "--weights", "None"], "did you mean 'efficientnet_b"),
        (["--data", ".", "--model", "vit_b_16", "--weights", "IMAGENET"], "expected a file or one of DEFAULT"),
    ],
)
def test_mistakes_in_the_options(vision, capsys, tmp_path, args, words):
    try:
        status = vision.main([*args, "--log-dir", str(tmp_path / "job")])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "job").exists()


def test_missing_exporters_are_named_before_training(vision, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["bptools.finetune.deploy"], "NEEDED", ("no_such_package",))
    assert vision.main(["--export", "onnx", "--log-dir", str(tmp_path / "job")]) == 2
    assert capsys.readouterr().err == (
        "error: --export onnx: takes no_such_package; get it by: pip install no_such_package\n"
    )
    assert not (tmp_path / "job").exists()


# The slow tier


def model_args(name, images, folder):
    torch.manual_seed(0)
    path = folder / f"{name}.pth"
    torch.save(get_model(name, weights=None).state_dict(), path)
    args = ["--data", str(images), "--model", name, "--weights", str(path), "--size", "32", "--workers", "0",
            "--device", "cpu", "--batch-size", "10"]  # fmt: skip
    return [*args, "--positive", "ill", "--mix", "both", "--balance", "weights", "--augment", "randaugment"]


@pytest.mark.parametrize(
    "name",
    [pytest.param("efficientnet_b0", marks=pytest.mark.slow), pytest.param("vit_b_16", marks=pytest.mark.release)],
)
def test_models_by_name_train_from_a_file_and_export(vision, images, tmp_path, capsys, name):
    args = model_args(name, images, tmp_path)
    args += ["--epochs", "2", "--phases", "head:1", "all:1", "--export", "both", "--log-dir", str(tmp_path / "x")]
    assert vision.main(args) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"export/model\.(?:pt2|onnx) \(outputs differ by \de[+-]\d+ of", out)) == 2
    kept = weights(tmp_path / "x", "discriminative")
    if name == "vit_b_16":
        assert kept["encoder.pos_embedding"].shape == (1, 5, 768)
    head = {"resnet18": "fc", "efficientnet_b0": "classifier.1", "vit_b_16": "heads.head"}[name]
    assert kept[f"{head}.weight"].shape[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("data", ["digits"])
def test_verify_with_all_of_it(vision, images, tmp_path, monkeypatch, capsys, data):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    args = model_args("resnet18", images, tmp_path) if data == "images" else ["--positive", "8", *MIXED]
    before = set(tmp_path.iterdir())
    assert vision.main([*args, "--strategy", "discriminative", "--accumulate", "2", "--verify"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"two processes = one +holds", out)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.release
def test_two_processes_mix_as_one_does(images, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    args = ["--data", images, "--model", "small", "--size", "16", "--workers", "1", *TINY, "--positive", "ill"]
    args += ["--mix", "both", "--augment", "trivial", "--batch-size", "7", "--balance", "sampler", "--amp", "off"]
    for size in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2] if size == 2 else []
        command = [sys.executable, *launcher, RECIPE, *args, "--log-dir", tmp_path / str(size)]
        subprocess.run([*map(str, command)], env=env, cwd=tmp_path, check=True, capture_output=True)
    one, two = (result(tmp_path / str(size)) for size in (1, 2))
    assert one["history"][0]["train_loss"] == pytest.approx(two["history"][0]["train_loss"], rel=0.05)


@pytest.mark.release
def test_the_screening_demonstration(tmp_path):
    args = [sys.executable, str(RECIPE), "--positive", "8", "--log-dir", str(tmp_path / "job")]
    out = subprocess.run(args, capture_output=True, text=True, check=True).stdout
    auc = {n: float(re.search(rf"^ {n} +(0\.\d+) ±", out, re.M)[1]) for n in ("scratch", "discriminative")}
    assert 0.93 < auc["scratch"] < auc["discriminative"] < 1
    found = re.search(r"sensitivity % +([\d.]+) ±.* ([\d.]+) to ([\d.]+)", out)
    sensitivity, low, high = map(float, found.groups())
    assert low < 100 >= high
    assert sensitivity > 60
