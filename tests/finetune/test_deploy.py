import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision.models import get_model

import bptools.nn
from bptools.finetune import InputError, check_export, deploy, small_classifier

ALONE = """
import sys, torch
sys.modules["bptools"] = None  # what imports it fails
program = torch.export.load(sys.argv[1]).module()
assert program(torch.rand(7, 1, 8, 8)).shape == (7, 10)
"""


def small():
    torch.manual_seed(0)
    return small_classifier(bptools.nn, 10, grey=True).model.train()


def test_a_program_of_our_layers_runs_without_them(tmp_path):
    model, images = small(), torch.rand(5, 1, 8, 8)
    apart = deploy(model, images, tmp_path / "e", "torch", {"classes": ["a"]})
    assert list(apart) == ["model.pt2"]
    assert apart["model.pt2"] < 1e-6
    assert not model.training
    assert {p.name for p in (tmp_path / "e").iterdir()} == {"model.pt2", "preprocessing.json"}
    about = json.loads((tmp_path / "e" / "preprocessing.json").read_text())
    assert about == {"input": ["batch", 1, 8, 8], "dtype": "float32", "classes": ["a"]}
    loaded = torch.export.load(tmp_path / "e" / "model.pt2").module()
    assert torch.allclose(loaded(images), model(images), atol=1e-6)


@pytest.mark.slow
def test_a_process_without_bptools_runs_a_program(tmp_path):
    deploy(small(), torch.rand(5, 1, 8, 8), tmp_path / "e", "torch")
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path / "e" / "model.pt2")], check=True)


def test_onnx_takes_batches_of_any_size(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model, images = small(), torch.rand(5, 1, 8, 8)
    assert deploy(model, images, tmp_path / "e", "onnx")["model.onnx"] < 1e-4
    session = runtime.InferenceSession(tmp_path / "e" / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [1, 8, 8]
    for count in (1, 3, 9):
        some = torch.rand(count, 1, 8, 8)
        (logits,) = session.run(["logits"], {"input": some.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(some).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [pytest.param("efficientnet_b0", marks=pytest.mark.slow), pytest.param("vit_b_16", marks=pytest.mark.release)],
)
@pytest.mark.parametrize("ours", [True])
def test_models_of_torchvision(tmp_path, name, ours):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = get_model(name, weights=None, **({"image_size": 32} if name == "vit_b_16" else {}))
    if name == "vit_b_16":
        nn.init.normal_(model.heads.head.weight)  # torchvision's is 0
    if ours:
        bptools.nn.convert(model)
    images = torch.rand(3, 3, 32, 32)
    apart = deploy(model, images, tmp_path / "e", "both")
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(images.double())
        rounding = (model(images) - exact).norm() / exact.norm()
    assert apart["model.pt2"] < 4 * rounding < 4e-6
    assert 0 < apart["model.onnx"] < 1e-4


class Fickle(nn.Module):
    """Does another thing when it is exported."""

    def forward(self, x):
        return x.flatten(1) * (2.0 if torch.compiler.is_exporting() else 1.0)


class Branching(nn.Module):
    def forward(self, x):
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


def test_what_differs_or_cannot_be_exported_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match=r"^--export torch: model.pt2 differs from the model by 1e\+00"):
        deploy(Fickle(), torch.rand(3, 2), tmp_path / "e", "torch")
    with pytest.raises(InputError, match=r"^--export torch: Branching cannot be exported: ") as caught:
        deploy(Branching(), torch.rand(3, 2), tmp_path / "e", "torch")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(monkeypatch):
    check_export("none")
    check_export("torch")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_export("torch")
    with pytest.raises(
        InputError, match=r"^--export both: takes onnx, onnxscript, onnxruntime; get it by: pip install"
    ):
        check_export("both")
