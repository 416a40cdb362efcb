import pytest
import torch
from torch import nn
from torchvision.models import get_model

from bptools.finetune import (
    InputError,
    check_model,
    find_head,
    input_format,
    replace_head,
    resolve_weights,
    small_classifier,
    small_cnn,
    torchvision_classifier,
)


@pytest.mark.parametrize("layers", ["torch.nn", "bptools.nn"])
def test_small_cnn(layers):
    layers = pytest.importorskip(layers)
    model = small_cnn(layers, 7, channels=3, width=4)
    assert model(torch.rand(2, 3, 12, 12)).shape == (2, 7)
    assert type(model[0][0]) is layers.Conv2d
    assert list(model.state_dict()) == list(small_cnn(nn, 7, channels=3, width=4).state_dict())


HEADS = {
    "alexnet": "classifier.6", "convnext_tiny": "classifier.2", "densenet121": "classifier", "googlenet": "fc",
    "efficientnet_b0": "classifier.1", "inception_v3": "fc", "maxvit_t": "classifier.5",
    "mnasnet0_5": "classifier.1", "mobilenet_v3_small": "classifier.3", "resnet50": "fc",
    "shufflenet_v2_x0_5": "fc",
    "squeezenet1_0": "classifier.1", "swin_t": "head", "swin_v2_t": "head", "vgg11": "classifier.6",
    "vit_b_16": "heads.head", "wide_resnet50_2": "fc", "resnext50_32x4d": "fc",
    "efficientnet_v2_s": "classifier.1",
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_every_family(name):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        model = get_model(name, weights=None, **options)
        assert find_head(model) == HEADS[name]
        replace_head(model, HEADS[name], 5)
    head = model.get_submodule(HEADS[name])
    assert head.weight.shape[0] == 5
    assert head.weight.is_meta


def test_replace_head_keeps_kind_bias_and_dtype():
    model = nn.Sequential(nn.Linear(3, 4, bias=False, dtype=torch.float64))
    replace_head(model, "0", 2)
    assert model[0].bias is None
    assert model[0].weight.dtype == torch.float64
    with pytest.raises(ValueError, match="model: expected a linear or convolution layer"):
        find_head(nn.ReLU())


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "googlenet"])
def test_torchvision_classifier_runs(name):
    net = torchvision_classifier(name, 4)
    assert net.new_head
    assert net.model(torch.rand(2, 3, 64, 64)).shape == (2, 4)


def test_a_local_file(tmp_path):
    torch.manual_seed(0)
    source = get_model("resnet18", weights=None)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    net = torchvision_classifier("resnet18", 4, str(tmp_path / "w.pth"))
    assert net.head == "fc"
    assert net.new_head
    assert torch.equal(net.model.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    own = torchvision_classifier("resnet18", 1000, str(tmp_path / "w.pth"))
    assert not own.new_head
    with pytest.raises(InputError, match=r"w.pth does not fit the model: .* missing"):
        torchvision_classifier("squeezenet1_1", 4, str(tmp_path / "w.pth"))


def test_unknown_names_are_explained(tmp_path):
    with pytest.raises(InputError, match=r"'resnet5' is not a torchvision classifier .did you mean 'resnet50'"):
        torchvision_classifier("resnet5", 4)
    with pytest.raises(InputError, match=r"expected a file or one of DEFAULT, IMAGENET1K_V1$"):
        torchvision_classifier("resnet18", 4, "IMAGENET")
    with pytest.raises(InputError, match=r"no such checkpoint file: nowhere.pth"):
        torchvision_classifier("resnet18", 4, "nowhere.pth")
    with pytest.raises(InputError, match="no published weights"):
        small_classifier(nn, 4, grey=True, weights="DEFAULT")


def test_a_failed_download_is_one_line(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("bptools.finetune.models.get_model", no_network)
    with pytest.raises(InputError, match=r"cannot download https://.*no route to host.*give a local file"):
        torchvision_classifier("resnet18", 4, "DEFAULT")


def test_input_format():
    assert input_format("small")[0] == 32
    size, mean, _ = input_format("inception_v3", "DEFAULT")
    assert (size, mean) == (299, (0.485, 0.456, 0.406))
    assert input_format("swin_t", "file.pth")[0] == 224
    assert input_format("vit_b_16", "IMAGENET1K_SWAG_E2E_V1")[0] == 384
    with pytest.raises(InputError, match="swin_tt"):
        input_format("swin_tt")


def test_resolve_weights():
    assert resolve_weights("small", "auto") is None
    assert resolve_weights("resnet18", "auto") == "DEFAULT"
    assert resolve_weights("resnet18", None) is None


def test_check_model_finds_what_training_would():
    net = small_classifier(nn, 2, grey=True)
    check_model(net, torch.rand(1, 1, 8, 8), ["head:1", "3:1"])
    with pytest.raises(InputError, match=r"^--phases: 'heed' matches no parameter"):
        check_model(net, torch.rand(1, 1, 8, 8), ["heed:1"])
    with pytest.raises(InputError, match=r"^--size 1: the model takes no such images"):
        check_model(net, torch.rand(1, 1, 1, 1), [])
    with pytest.raises(InputError, match=r"^--size 64: .* Expected 224 but got 64"):
        check_model(torchvision_classifier("vit_b_16", 2), torch.rand(1, 3, 64, 64), [])
