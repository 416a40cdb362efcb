import pytest
import torch
from torch import nn
from torchvision.models import get_model, vision_transformer

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
from bptools.optim import parameter_depths


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


@pytest.fixture
def tiny_vit(monkeypatch):
    """ViT-B/16 by name, with two narrow layers."""
    whole = vision_transformer.VisionTransformer

    def narrow(*, num_layers, num_heads, hidden_dim, mlp_dim, **options):
        return whole(num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, **options)

    monkeypatch.setattr(vision_transformer, "VisionTransformer", narrow)


def test_a_vision_transformer_takes_other_sizes(tiny_vit, tmp_path):
    torch.manual_seed(0)
    source = get_model("vit_b_16", weights=None, image_size=64)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    same = torchvision_classifier("vit_b_16", 3, str(tmp_path / "vit.pth"), size=64)
    other = torchvision_classifier("vit_b_16", 3, str(tmp_path / "vit.pth"), size=48)
    assert (same.head, same.new_head) == ("heads.head", True)
    assert torch.equal(same.model.encoder.pos_embedding, source.encoder.pos_embedding)
    assert other.model(torch.rand(2, 3, 48, 48)).shape == (2, 3)
    before, after = (m.encoder.pos_embedding for m in (source, other.model))
    assert torch.equal(before[:, 0], after[:, 0])
    corners = ((0, 3, 12, 15), (0, 2, 6, 8))  # of 4 * 4 patches, and of 3 * 3
    a, b = (t[:, [1 + i for i in some]] for t, some in zip((before, after), corners, strict=True))
    assert torch.allclose(a, b, atol=1e-5)
    with pytest.raises(InputError, match=r"^--size 50: vit_b_16 takes multiples of its patch"):
        torchvision_classifier("vit_b_16", 3, size=50)
    torch.save(source.state_dict() | {"encoder.pos_embedding": torch.zeros(1, 12, 16)}, tmp_path / "odd.pth")
    with pytest.raises(InputError, match=r"odd.pth does not fit the model: seq_length is not a perfect square"):
        torchvision_classifier("vit_b_16", 3, str(tmp_path / "odd.pth"), size=48)


def test_published_position_embeddings_are_interpolated(tiny_vit, monkeypatch):
    torch.manual_seed(0)
    published = get_model("vit_b_16", weights=None)  # at 224 pixels
    real = get_model
    monkeypatch.setattr(
        "bptools.finetune.models.get_model",
        lambda name, weights, **options: published if weights else real(name, weights=None, **options),
    )
    net = torchvision_classifier("vit_b_16", 3, "DEFAULT", size=32)
    assert net.model(torch.rand(1, 3, 32, 32)).shape == (1, 3)
    assert torch.equal(net.model.conv_proj.weight, published.conv_proj.weight)
    assert net.model.encoder.pos_embedding.shape[1] == 5
    assert torchvision_classifier("vit_b_16", 3, "DEFAULT", size=224).model is published


@pytest.mark.parametrize(("name", "layers"), [("vit_b_16", 12), ("efficientnet_b0", 16)])
def test_depths_and_rates_of_models_by_name(name, layers):
    model = torchvision_classifier(name, 3, size=32).model
    depths = parameter_depths(model, torch.rand(1, 3, 32, 32))
    first, last = {
        "vit_b_16": ("class_token", "heads.head.weight"),
        "efficientnet_b0": ("features.0.0.weight", "classifier.1.weight"),
    }[name]
    assert depths[first] == 0
    assert depths[last] == max(depths.values()) >= layers + 1
    if name == "vit_b_16":
        assert depths["encoder.pos_embedding"] == 0
        blocks = [depths[f"encoder.layers.encoder_layer_{i}.mlp.0.weight"] for i in range(12)]
        assert blocks == list(range(blocks[0], blocks[0] + 12))


@pytest.mark.parametrize("name", ["vit_b_16", "vit_l_32", "efficientnet_b0", "efficientnet_v2_s"])
def test_published_names_are_read(name):
    for weights in ("DEFAULT", "IMAGENET1K_V1"):
        assert input_format(name, weights)[0] >= 224
    with pytest.raises(InputError, match="expected a file or one of DEFAULT"):
        input_format(name, "IMAGENET22K")


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
