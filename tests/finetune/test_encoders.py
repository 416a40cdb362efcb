import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import ConcatDataset
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

import bptools.nn
from bptools.finetune import (
    Augmented,
    InputError,
    MaskedBlocks,
    Pad,
    TextClassifier,
    byte_pairs,
    check_encoder,
    export,
    head_names,
    labelled_loss,
    labelled_outputs,
    load_json,
    load_pretrained,
    make_loader,
    masked_loss,
    save_json,
    small_encoder,
    word_pieces,
)
from bptools.finetune.encoders import HEAD_OPTIONS, HEAD_WEIGHTS, IGNORED

TEXTS = [
    f"the {a} {b} is {c}" for a in ("old", "new") for b in ("phone", "ticket", "train") for c in ("late", "ok")
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"max_position_embeddings": 40, "vocab_size": 80}
KINDS = {
    "bert": transformers.BertConfig(**SIZES),
    "distilbert": transformers.DistilBertConfig(
        dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=40, vocab_size=80
    ),
    "roberta": transformers.RobertaConfig(**SIZES, pad_token_id=0, bos_token_id=2, eos_token_id=3),
    "electra": transformers.ElectraConfig(**SIZES, embedding_size=16),
    "gpt2": transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=40, vocab_size=300, bos_token_id=0, eos_token_id=0
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    return word_pieces(TEXTS, 80)


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """A folder of random weights for each kind, as of a pretraining, with its tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for name, config in KINDS.items():
        torch.manual_seed(0)
        (AutoModel if name == "gpt2" else AutoModelForMaskedLM).from_config(config).save_pretrained(root / name)
        (byte_pairs(TEXTS, 300) if name == "gpt2" else tokenizer).save_pretrained(root / name)
    return root


def copy(folder, to):
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def batch(tokenizer, texts=("the old train", "ok")):
    return Pad(tokenizer)([tokenizer(text) for text in texts])


# Loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_gives_the_encoder_that_it_has_on_our_ops(folders, name):
    model, tokenizer = load_pretrained(AutoModelForSequenceClassification, str(folders / name), num_labels=3)
    assert not model.training
    assert model.config.num_labels == 3
    assert any(isinstance(m, bptools.nn.LayerNorm) for m in model.modules())
    weights = load_file(folders / name / "model.safetensors")
    prefix = f"{model.base_model_prefix}."
    own = {name: p for name, p in model.base_model.state_dict().items() if "pooler" not in name}
    stored = {name.removeprefix(prefix): p for name, p in weights.items()}
    assert all(torch.equal(p, stored[name]) for name, p in own.items())
    inputs = batch(tokenizer)
    assert model(**inputs).logits.shape == (2, 3)
    assert all(p.dtype is torch.float32 for p in model.parameters())


def test_our_ops_give_what_theirs_do(folders):
    ours, tokenizer = load_pretrained(AutoModelForMaskedLM, str(folders / "bert"))
    theirs, _ = load_pretrained(AutoModelForMaskedLM, str(folders / "bert"), convert=False)
    assert not any(type(m).__module__.startswith("bptools") for m in theirs.modules())
    inputs = batch(tokenizer)
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits)


def test_half_precision_becomes_float32(folders, tmp_path):
    folder = copy(folders / "bert", tmp_path / "half")
    AutoModel.from_pretrained(folder).half().save_pretrained(folder)
    model, _ = load_pretrained(AutoModel, str(folder))
    assert model.dtype is torch.float32
    assert AutoModel.from_config(model.config).dtype is torch.float32


def test_a_head_of_another_size_is_drawn_anew(folders, tokenizer, tmp_path):
    model, _ = load_pretrained(AutoModelForSequenceClassification, str(folders / "bert"), num_labels=2)
    export(model, tmp_path / "two", processor=tokenizer)
    same, _ = load_pretrained(AutoModelForSequenceClassification, str(tmp_path / "two"), num_labels=2)
    assert torch.equal(same.classifier.weight, model.classifier.weight)
    other, _ = load_pretrained(AutoModelForSequenceClassification, str(tmp_path / "two"), num_labels=5)
    assert other.classifier.weight.shape == (5, 32)
    assert torch.equal(other.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)


def test_a_tokenizer_gives_only_what_the_model_takes(folders, tokenizer, tmp_path):
    folder = copy(folders / "distilbert", tmp_path / "one")
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    assert "token_type_ids" in plain("ok")
    plain.save_pretrained(folder)
    _, loaded = load_pretrained(AutoModel, str(folder))
    assert list(loaded("ok")) == ["input_ids", "attention_mask"]


def test_a_tokenizer_without_padding_pads_with_what_ends_a_text(folders, tmp_path):
    folder = copy(folders / "gpt2", tmp_path / "one")
    plain = byte_pairs(TEXTS, 300)
    plain.pad_token = None
    plain.save_pretrained(folder)
    model, tokenizer = load_pretrained(AutoModelForSequenceClassification, str(folder), num_labels=3)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id
    inputs = batch(tokenizer)
    assert model(**inputs).logits.shape == (2, 3)
    with torch.no_grad():
        alone = model(**batch(tokenizer, ["ok"])).logits
    torch.testing.assert_close(model(**inputs).logits[1:], alone)  # padding changes nothing


def spoil_config(folder):
    (folder / "config.json").write_text("{")


def spoil_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def drop_weights(folder):
    (folder / "model.safetensors").unlink()


def drop_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def drop_layer(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layer.1.output" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def change_size(folder):
    save_json(folder / "config.json", load_json(folder / "config.json") | {"max_position_embeddings": 60})


def other_kind(folder):
    save_json(
        folder / "config.json", transformers.DistilBertConfig(**KINDS["distilbert"].to_diff_dict()).to_dict()
    )


def add_pieces(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"piece{i}" for i in range(30)])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "expected a folder that save_pretrained wrote"),
        (spoil_config, "cannot be loaded: "),
        (spoil_weights, "cannot be loaded: "),
        (drop_weights, "cannot be loaded: "),
        (drop_tokenizer, "has no tokenizer that can be loaded: "),
        (drop_layer, "its weights are not those of a BertModel: 4 of 39 tensors are missing or of another size"),
        (change_size, "1 of 39 tensors are missing or of another size, such as embeddings.position_embeddings"),
        (other_kind, "its weights are not those of a DistilBertModel: "),
        (add_pieces, " pieces, its model 80"),
    ],
)
def test_a_spoilt_folder_is_one_line_that_names_option_and_folder(folders, tmp_path, spoil, words, caplog):
    folder = copy(folders / "bert", tmp_path / "model")
    spoil(folder)
    with pytest.raises(InputError) as error:
        load_pretrained(AutoModel, str(folder), option="--base")
    assert str(error.value).startswith(f"--base {folder}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not caplog.records


def test_a_tokenizer_may_have_fewer_pieces_than_the_model(folders, tmp_path):
    folder = copy(folders / "bert", tmp_path / "model")
    word_pieces(TEXTS[:2], 50).save_pretrained(folder)
    _, tokenizer = load_pretrained(AutoModel, str(folder))
    assert len(tokenizer) < 80


def test_a_model_that_is_not_for_the_task(tokenizer, folders, tmp_path):
    folder = copy(folders / "bert", tmp_path / "model")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    transformers.ViTModel(config).save_pretrained(folder)
    with pytest.raises(InputError, match=f"^--model {folder}: cannot be loaded: Unrecognized configuration class"):
        load_pretrained(AutoModelForSequenceClassification, str(folder))


@pytest.mark.parametrize("name", ["/no/where", "./nowhere", "~/nowhere", "a/b/c"])
def test_what_can_only_be_a_folder_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(AutoModel, "from_pretrained", None)
    with pytest.raises(InputError, match=f"^--model {name}: no such folder$"):
        load_pretrained(AutoModel, name)


def test_a_name_on_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as error:
        load_pretrained(AutoModel, "nobody/no-such-model")
    assert str(error.value).startswith("--model nobody/no-such-model: cannot be loaded: ")
    assert str(error.value).endswith("; no folder has that name, and it cannot be had from the hub")
    assert "\n" not in str(error.value)


# The small encoder and what it is pretrained on ------------------------------------------------------------------


def test_the_small_encoder_is_on_our_ops_and_reloads(tokenizer, tmp_path):
    options = {"width": 64, "layers": 2, "length": 20}
    model = small_encoder(AutoModelForSequenceClassification, tokenizer, **options, num_labels=4)
    assert model.config.model_type == "distilbert"
    assert (model.config.dim, model.config.n_heads, model.config.n_layers) == (64, 2, 2)
    assert model.distilbert.embeddings.word_embeddings.weight.shape == (len(tokenizer), 64)
    assert any(isinstance(m, bptools.nn.LayerNorm) for m in model.modules())
    export(model, tmp_path / "model", processor=tokenizer)
    again, pieces = load_pretrained(AutoModelForSequenceClassification, str(tmp_path / "model"))
    inputs = batch(pieces)
    assert torch.equal(again(**inputs).logits, model.eval()(**batch(tokenizer)).logits)
    assert inputs["input_ids"].tolist() == batch(tokenizer)["input_ids"].tolist()


def test_blocks_are_the_texts_with_some_pieces_hidden(tokenizer):
    blocks = MaskedBlocks(TEXTS * 20, tokenizer, length=16, share=0.3)
    torch.manual_seed(0)
    samples = [blocks[i] for i in range(len(blocks))]
    shown = torch.cat([sample["input_ids"] for sample in samples])
    labels = torch.cat([sample["labels"] for sample in samples])
    whole = torch.tensor([i for text in TEXTS * 20 for i in tokenizer(text)["input_ids"]])
    assert len(blocks) == len(whole) // 16
    chosen, whole = labels != IGNORED, whole[: len(shown)]
    assert torch.equal(torch.where(chosen, labels, shown), whole)
    plain = ~torch.isin(whole, torch.tensor(tokenizer.all_special_ids))
    assert not (chosen & ~plain).any()
    assert chosen[plain].float().mean() == pytest.approx(0.3, abs=0.04)
    hidden = shown[chosen] == tokenizer.mask_token_id
    assert hidden.float().mean() == pytest.approx(0.8, abs=0.06)
    kept = shown[chosen] == labels[chosen]
    assert 0.06 < kept.float().mean() < 0.16  # 10 in 100, and who are exchanged for themselves
    assert 0.04 < (~hidden & ~kept).float().mean() < 0.15


def test_what_is_hidden_depends_on_seed_epoch_and_index_alone(tokenizer):
    parts = ConcatDataset([MaskedBlocks(TEXTS, tokenizer, 8), MaskedBlocks(TEXTS[::2], tokenizer, 8)])
    data = Augmented(parts)

    def load(seed, batch_size=3):
        samples = [
            one for some in make_loader(data, batch_size, seed=seed) for one in zip(*some.values(), strict=True)
        ]
        return sorted((ids.tolist(), labels.tolist()) for ids, labels in samples)

    first = load((0, 0))
    torch.manual_seed(5)
    assert load((0, 0)) == load((0, 0), batch_size=2) == first
    assert load((0, 1)) != first
    assert load((1, 0)) != first


def test_little_text_is_one_block_and_none_an_error(tokenizer):
    blocks = MaskedBlocks(["the train"], tokenizer, length=64)
    assert len(blocks) == 1
    assert len(blocks[0]["input_ids"]) == len(tokenizer("the train")["input_ids"])
    with pytest.raises(InputError, match="expected words"):
        MaskedBlocks([], tokenizer)


def test_pad_makes_a_batch_of_samples(tokenizer):
    samples = [{"input_ids": [2, 7, 3], "attention_mask": [1, 1, 1], "labels": 4},
               {"input_ids": [2], "attention_mask": [1], "labels": 0}]  # fmt: skip
    found = Pad(tokenizer)(samples)
    assert {name: value.tolist() for name, value in found.items()} == {
        "input_ids": [[2, 7, 3], [2, 0, 0]], "attention_mask": [[1, 1, 1], [1, 0, 0]], "labels": [4, 0],
    }  # fmt: skip
    tagged = [{"input_ids": [2, 7, 3], "labels": [-100, 1, 1]}, {"input_ids": [2], "labels": [5]}]
    assert Pad(tokenizer)(tagged)["labels"].tolist() == [[-100, 1, 1], [5, -100, -100]]
    cut = Pad(tokenizer, longest=2)(tagged)
    assert {name: value.tolist() for name, value in cut.items()} == {
        "input_ids": [[2, 7], [2, 0]],
        "labels": [[-100, 1], [5, -100]],
    }
    tokenizer = byte_pairs(TEXTS, 300)
    tokenizer.pad_token = None
    with pytest.raises(InputError, match=r"^--model: its tokenizer has no token to pad with"):
        Pad(tokenizer)


def test_workers_pad(tokenizer):
    samples = [{**tokenizer(text), "labels": i} for i, text in enumerate(TEXTS)]
    a, b = ([*make_loader(samples, 5, seed=(0, 0), workers=n, collate=Pad(tokenizer))] for n in (0, 1))
    assert len(a) == len(b) == 3
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


class Given(nn.Module):
    """Has logits (n, length, classes) whatever the input, in half precision."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids):
        return transformers.modeling_outputs.TokenClassifierOutput(logits=self.logits[: len(input_ids)])


def test_losses_look_at_what_is_labelled():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, -100, 4], [-100, 0, -100]])
    inputs = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "labels": labels}
    model = Given(logits)
    rows, targets = labelled_outputs(model, inputs)
    assert rows.shape == (6, 5)
    assert targets.tolist() == [1, -100, 4, -100, 0, -100]
    shares = logits.log_softmax(-1)
    expected = -(shares[0, 0, 1] + shares[0, 2, 4] + shares[1, 1, 0]) / 3
    torch.testing.assert_close(labelled_loss(model, inputs), expected)
    smooth = 0.8 * expected - 0.2 * (shares[0, 0] + shares[0, 2] + shares[1, 1]).mean() / 3
    torch.testing.assert_close(labelled_loss(model, inputs, smoothing=0.2), smooth)
    assert labelled_loss(Given(logits.bfloat16()), inputs).dtype is torch.float32
    other = {"input_ids": inputs["input_ids"], "labels": torch.tensor([[-100, 2, -100], [-100, -100, -100]])}
    loss, share = masked_loss(model, [inputs, other], "cpu")
    assert loss == pytest.approx(float(3 * expected - shares[0, 1, 2]) / 4, rel=1e-5)
    found = logits.argmax(-1)
    right = (found[0, 0] == 1) + (found[0, 2] == 4) + (found[1, 1] == 0).int() + (found[0, 1] == 2)
    assert share == pytest.approx(25 * float(right))
    assert not model.training
    assert masked_loss(model, [], "cpu") == (0.0, 0.0)


def test_labels_of_whole_texts(folders):
    model, tokenizer = load_pretrained(AutoModelForSequenceClassification, str(folders / "bert"), num_labels=3)
    inputs = batch(tokenizer)
    logits, labels = labelled_outputs(model, inputs | {"labels": torch.tensor([2, 0])})
    torch.testing.assert_close(logits, model(**inputs).logits)
    assert labels.tolist() == [2, 0]


# A head of our own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["first", "mean"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "electra"])
def test_a_head_of_our_own_learns_and_reloads(folders, tmp_path, name, head, pool):
    torch.manual_seed(0)
    encoder, tokenizer = load_pretrained(AutoModel, str(folders / name))
    model = TextClassifier(encoder, 3, head, pool)
    inputs = batch(tokenizer)
    labelled_loss(model, inputs | {"labels": torch.tensor([2, 0])}).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert idle == []
    assert sum(isinstance(m, nn.Linear) for m in model.classifier) == (2 if head == "mlp" else 1)
    model.eval()
    with torch.no_grad():
        alone = model(**batch(tokenizer, ["ok"])).logits
        together = model(**inputs).logits
    assert together.shape == (2, 3)
    torch.testing.assert_close(together[1:], alone)  # padding changes nothing
    export(model, tmp_path / "model", processor=tokenizer)
    assert torch.equal(TextClassifier.from_pretrained(tmp_path / "model")(**inputs).logits, together)
    reloaded = AutoModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        hidden, ours = (m(**inputs).last_hidden_state for m in (reloaded, model.encoder))
    torch.testing.assert_close(hidden, ours)


def test_pools(folders):
    encoder, tokenizer = load_pretrained(AutoModel, str(folders / "distilbert"))
    inputs = batch(tokenizer)
    with torch.no_grad():
        hidden = encoder(**inputs).last_hidden_state
        for pool, expected in (("first", hidden[1, 0]), ("mean", hidden[1, :3].mean(0))):
            model = TextClassifier(encoder, 3, "linear", pool).eval()
            torch.testing.assert_close(model(**inputs).logits[1], model.classifier(expected))
    assert inputs["attention_mask"][1].tolist()[:4] == [1, 1, 1, 0]


def drop_head(folder):
    (folder / HEAD_WEIGHTS).unlink()


def tear_head(folder):
    (folder / HEAD_WEIGHTS).write_bytes(b"torn")


def swap_head(folder):
    save_json(folder / HEAD_OPTIONS, load_json(folder / HEAD_OPTIONS) | {"classes": 7})


def odd_options(folder):
    save_json(folder / HEAD_OPTIONS, {"classes": 3, "heed": "mlp"})


def tear_options(folder):
    (folder / HEAD_OPTIONS).write_text("{")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (drop_head, "no such checkpoint file: .*head.safetensors"),
        (tear_head, "head.safetensors is torn"),
        (swap_head, "the head does not fit"),
        (odd_options, "the head does not fit"),
        (tear_options, "head.json is torn"),
        (spoil_weights, "cannot be loaded"),
    ],
)
def test_a_spoilt_head(folders, tmp_path, spoil, words):
    encoder, tokenizer = load_pretrained(AutoModel, str(folders / "distilbert"))
    export(TextClassifier(encoder, 3), tmp_path / "model", processor=tokenizer)
    spoil(tmp_path / "model")
    with pytest.raises(InputError, match=words) as error:
        TextClassifier.from_pretrained(tmp_path / "model")
    assert str(tmp_path / "model") in str(error.value)
    assert "\n" not in str(error.value)


HEADS = {
    "bert": ("classifier", "bert.pooler"), "distilbert": ("pre_classifier", "classifier"), "gpt2": ("score",),
    "roberta": ("classifier",), "electra": ("classifier",),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_head_names(folders, name):
    model, _ = load_pretrained(AutoModelForSequenceClassification, str(folders / name), num_labels=3)
    assert head_names(model) == HEADS[name]
    encoder, _ = load_pretrained(AutoModel, str(folders / name))
    assert head_names(TextClassifier(encoder, 3)) == ("classifier",)


# What can be found out before ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "length", "phases", "words"),
    [
        ("bert", 40, ["head:1", "layer.1+head:2"], None),
        ("bert", 41, [], "--length 41: the model takes 40 word pieces at most"),
        ("roberta", 38, [], None),
        ("roberta", 39, [], "--length 39: the model takes 38 word pieces at most"),
        ("gpt2", 41, [], "--length 41: the model takes 40 word pieces at most"),
        ("bert", 20, ["heed:1"], "--phases: 'heed' matches no parameter"),
    ],
)
def test_check_encoder(folders, name, length, phases, words):
    model, tokenizer = load_pretrained(AutoModelForSequenceClassification, str(folders / name), num_labels=3)
    phases = [phase.replace("layer.1", "*layer.1.*") for phase in phases]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if words is None:
        check_encoder(model, batch(tokenizer), length, phases)
    else:
        with pytest.raises(InputError) as error:
            check_encoder(model, batch(tokenizer), length, phases)
        assert words in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_check_encoder_runs_the_model(folders):
    encoder, tokenizer = load_pretrained(AutoModel, str(folders / "bert"))
    model = TextClassifier(encoder, 3)
    check_encoder(model, batch(tokenizer), 40, [])
    with pytest.raises(InputError, match="--length 41"):
        check_encoder(model, batch(tokenizer), 41, [])
    with pytest.raises(InputError, match=r"^--model: it does not run on a text: ") as error:
        check_encoder(model, batch(tokenizer) | {"input_ids": torch.full((2, 5), 999)}, 40, [])
    assert "\n" not in str(error.value)
