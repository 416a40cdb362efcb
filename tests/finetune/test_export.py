"""Adapters and merged models in files: what is written is all that there is, and comes back to the bit."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import torchvision
import transformers
from safetensors.torch import load_file
from torch import nn

from bptools.finetune.adapters import Adapter, add_adapter, merge_adapter
from bptools.finetune.checkpoint import load_weights
from bptools.finetune.errors import InputError
from bptools.finetune.export import export, load_adapter, save_adapter, whole_folder
from bptools.nn import NF4Linear, to_nf4

pytestmark = [  # peft's and transformers' own
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, vocab_size=99))


def gpt2():
    config = transformers.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=99, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=99))


def mobilenet():
    return torchvision.models.MobileNetV2(num_classes=3, width_mult=0.1)


def vit():
    return torchvision.models.VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=3)


HEADS = {bert: "classifier", gpt2: None, llama: None, mobilenet: "classifier.1", vit: "heads.head"}
CASES = [
    *((make, "lora") for make in HEADS),
    *((make, "dora") for make in (bert, gpt2, mobilenet)),
    *((make, "qlora") for make in (bert, llama, vit)),
    *((make, "prompt") for make in (bert, llama)),
    (gpt2, "prefix"),
]
parametrized = pytest.mark.parametrize(
    ("make", "kind"), CASES, ids=[f"{make.__name__}-{kind}" for make, kind in CASES]
)


def build(make):
    torch.manual_seed(0)
    return make().eval()


@torch.no_grad()
def logits(model, make):
    if make in (mobilenet, vit):
        return model(IMAGES)
    return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def train(model, make):
    """Two steps, in which batch norms take in statistics, as in a model whose modes nobody sets."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model.train()
        optimizer.zero_grad()
        with torch.enable_grad():
            (logits.__wrapped__(model, make) - 1).square().mean().backward()
        optimizer.step()
    return model.eval()


def trained(make, kind="lora"):
    return train(add_adapter(build(make), Adapter(kind, 4, tokens=5), head=HEADS[make]), make)


@parametrized
def test_an_adapter_comes_back_to_the_bit(make, kind, tmp_path):
    model = trained(make, kind)
    save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(1)
    again = load_adapter(build(make), tmp_path / "adapter")
    assert torch.equal(logits(again, make), logits(model, make))
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert not torch.equal(logits(model, make), logits(build(make), make))


def test_a_loaded_adapter_goes_on_learning(tmp_path):
    model = trained(bert)
    save_adapter(model, tmp_path)
    again = load_adapter(build(bert), tmp_path, trainable=True)
    assert again.training
    names = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert names[0] == names[1]
    save_adapter(train(again, bert), tmp_path)  # in the place of the first
    assert torch.equal(logits(load_adapter(build(bert), tmp_path), bert), logits(again, bert))


def test_peft_reads_the_folder_but_for_the_buffers(tmp_path):
    """Trap 16: with peft alone the statistics of batch norms are lost."""
    model = trained(mobilenet)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(mobilenet), tmp_path).eval()
    assert not torch.allclose(logits(theirs, mobilenet), logits(model, mobilenet), atol=1e-3)
    theirs.load_state_dict(load_file(tmp_path / "buffers.safetensors"), strict=False)
    assert torch.equal(logits(theirs, mobilenet), logits(model, mobilenet))


def test_a_head_that_peft_was_not_told_of_is_not_lost_in_silence(tmp_path):
    """Trap 15: unfrozen, it learns, but peft does not save it."""
    base = build(mobilenet)
    naive = add_adapter(base, Adapter(rank=4))
    base.classifier.requires_grad_(True)
    train(naive, mobilenet)
    naive.save_pretrained(tmp_path / "naive")
    again = peft.PeftModel.from_pretrained(build(mobilenet), tmp_path / "naive").eval()
    assert not torch.equal(again.get_base_model().classifier[1].weight, base.classifier[1].weight)
    with pytest.raises(InputError, match=r"save_adapter: 2 trainable parameters, such as '.*classifier.1.weight'"):
        save_adapter(naive, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(("make", "kind"), [(bert, "lora"), (gpt2, "dora"), (llama, "qlora")])
def test_transformers_reads_an_export(make, kind, tmp_path):
    model = trained(make, kind)
    export(model, tmp_path / "model")
    again = make().from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(again, make), logits(merge_adapter(model), make))
    torch.testing.assert_close(logits(again, make), logits(model, make), rtol=1e-5, atol=1e-5)
    if make is gpt2:
        assert again.lm_head.weight is again.transformer.wte.weight


@pytest.mark.parametrize("make", [mobilenet, vit])
def test_other_models_read_an_export_strictly(make, tmp_path):
    model = trained(make)
    export(model, tmp_path / "model")
    again = build(make)
    assert load_weights(again, tmp_path / "model" / "model.safetensors") == []
    assert torch.equal(logits(again, make), logits(merge_adapter(model), make))
    torch.testing.assert_close(logits(again, make), logits(model, make), rtol=1e-4, atol=1e-4)


def test_models_without_an_adapter_are_exported_too(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    model[2].weight = model[0].weight
    export(model, tmp_path / "tied")
    other = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    load_weights(other, tmp_path / "tied" / "model.safetensors")
    assert torch.equal(other[2].weight, model[0].weight)

    quantised = build(llama)
    to_nf4(quantised)
    export(quantised, tmp_path / "quantised")
    assert any(isinstance(m, NF4Linear) for m in quantised.modules())
    again = llama().from_pretrained(tmp_path / "quantised").eval()
    torch.testing.assert_close(logits(again, llama), logits(quantised, llama), rtol=1e-5, atol=1e-5)


def test_what_goes_with_the_model_is_written_beside(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    export(build(bert), tmp_path / "model", processor=Tokenizer())
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_a_prompt_cannot_be_exported(tmp_path):
    with pytest.raises(InputError, match="merge_adapter: prompt tuning is an input"):
        export(trained(llama, "prompt"), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "folder"
    for text in ("old", "new"):
        with whole_folder(path) as part:
            (part / "a").write_text(text)
        assert (path / "a").read_text() == text

    def crash(part):
        (part / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), whole_folder(path) as part:
        crash(part)
    assert (path / "a").read_text() == "new"
    (path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"holds other files, such as 'thesis\.tex'"), whole_folder(path) as part:
        (part / "a").write_text("newer")
    assert (path / "a").read_text() == "new"
    with pytest.raises(InputError, match=f"{path / 'a'}"), whole_folder(path / "a") as part:
        (part / "a").write_text("on a file")
    with pytest.raises(InputError, match="Not a directory"), whole_folder(path / "a" / "b"):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "buffers.safetensors"])
def test_files_that_are_missing_or_torn_are_named(name, tmp_path):
    save_adapter(trained(llama), tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"{name} is torn"):
        load_adapter(build(llama), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"no such .* file: .*{name}"):
        load_adapter(build(llama), tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    save_adapter(trained(llama), tmp_path)
    sizes = {**SIZES, "intermediate_size": 48}
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=99))
    says = r"adapter_model.safetensors does not fit the model: .* such as .*: \(4, 64\) for \(4, 48\)"
    with pytest.raises(InputError, match=says):
        load_adapter(other, tmp_path)
    with pytest.raises(InputError, match="does not fit the model"):
        load_adapter(build(bert), tmp_path)
    with pytest.raises(InputError, match="model must not have an adapter already"):
        load_adapter(trained(llama), tmp_path)


def test_an_adapter_needs_the_buffers_of_its_model(tmp_path):
    model = trained(mobilenet)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier.1"]
    base = build(mobilenet)
    base.features[0][1] = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(InputError, match=r"buffers\.safetensors does not fit the model: 3 of"):
        load_adapter(base, tmp_path)
