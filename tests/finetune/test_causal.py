import json
import re

import pytest
import torch
import transformers
from torch import nn

import bptools.nn
from bptools.finetune import (
    TEMPLATE,
    Adapter,
    CausalBatch,
    InputError,
    Stepper,
    TokenRows,
    add_adapter,
    byte_pairs,
    causal_loss,
    causal_scores,
    chat_tokenizer,
    check_packing,
    complete,
    count_tokens,
    document_folder,
    footprint,
    labelled_chats,
    load_causal,
    merged_difference,
    output_name,
    prompt_from_text,
    samples_text,
    small_causal,
    tokenise,
)
from bptools.finetune.causal import LossHead, Sample, chat_tokens, positions, read_documents

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # peft's prefixes
TURNS = (("user", "Where is my order?"), ("assistant", "On its way."), ("user", "Still?"), ("assistant", "Yes!"))
CHAT = [{"role": role, "content": content} for role, content in TURNS]
SAYS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
PLAIN = SAYS + "{% if add_generation_prompt %}[assistant]{% endif %}"
LATE = "{{ messages | length }}" + PLAIN  # it writes the first turn in another way when more follow
TEXTS = ("def f(x): return x", "a b c", "the quick brown fox jumps over the lazy dog", "one two three four")


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer([*TEXTS, CHAT], 300)


def tiny(tokenizer, kind="llama", seed=0, **changes):
    torch.manual_seed(seed)
    if kind == "llama":
        return small_causal(tokenizer, width=32, layers=2).eval()
    size = len(tokenizer)
    configs = {
        "tied llama": lambda: transformers.LlamaConfig(
            vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=True, **changes),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, **changes),
        "gemma2": lambda: transformers.Gemma2Config(
            vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.05, **changes),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(
            vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            **changes),
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(configs[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # some begin at 0, and would hide mistakes
    bptools.nn.convert(model)
    return model.eval()


# Documents ----------------------------------------------------------------------------------------------------


def test_documents_are_read_from_text_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\n  three \n")
    assert read_documents(tmp_path / "a.txt") == ("one\ntwo", "three")
    lines = [{"text": "one"}, {"messages": CHAT, "id": 3}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    assert read_documents(tmp_path / "a.jsonl") == ("one", CHAT)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", 'line 2: expected an object with either "text" or "messages"'),
        ('{"text": "a", "messages": []}', 'either "text" or "messages"'),
        ('{"text": " "}', 'line 2: "text" must be a string that is not empty'),
        ('{"text": 3}', '"text" must be a string'),
        ('{"messages": []}', 'line 2: "messages" must be a list that is not empty'),
        ('{"messages": [{"role": "user"}]}', 'line 2, message 1: expected an object with strings "role"'),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "message 1: role 'bot' is none of system, user"),
        ('{"messages": [{"role": "user", "content": " "}]}', 'message 1: "content" is empty'),
        ('{"messages": [{"role": "user", "content": "a"}]}', "the last message must be the assistant's"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        read_documents(tmp_path / "a.jsonl")
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}, line 2")


def test_a_bad_file_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "b.txt").write_text("\n \n")
    for name, words in (
        ("a.txt", "UTF-8"),
        ("b.txt", "got none"),
        ("c.txt", "No such file"),
        ("d.csv", "ends in"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            read_documents(tmp_path / name)
        assert name in str(caught.value)


def test_one_file_is_parted_by_the_seed_and_a_folder_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"text {i}" for i in range(20)))
    one, same, other = (document_folder(tmp_path / "a.txt", holdout=0.3, seed=seed) for seed in (0, 0, 1))
    assert one == same != other
    assert [len(part) for part in (one.train, one.val, one.test)] == [14, 3, 3]
    assert len({*one.train, *one.val, *one.test}) == 20
    assert one.sizes() == "14 to train, 3 to pick the best epoch, 3 to test"
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "train.txt").write_text("a")
    with pytest.raises(InputError, match="found none for val"):
        document_folder(folder)
    (folder / "dev.txt").write_text("b")
    assert document_folder(folder).test == ("b",)
    (folder / "val.jsonl").write_text('{"text": "c"}')
    with pytest.raises(InputError, match=r"one file for val, got val.jsonl and dev.txt"):
        document_folder(folder)
    (tmp_path / "b.txt").write_text("a\n\nb")
    with pytest.raises(InputError, match="more than 2 texts, got 2"):
        document_folder(tmp_path / "b.txt")


def test_labels_become_answers_and_no_message_is_in_two_parts(tmp_path):
    rows = [f"text {a}{b}{i},{a}_x,{b}" for a in "ab" for b in "cd" for i in range(8)]
    (tmp_path / "a.csv").write_text("\n".join(["text,what,how", *rows]))
    options = {"source": 3, "train": 1, "val": 1, "test": 2}
    one, two = (labelled_chats(tmp_path / "a.csv", ("what", "how"), **options, seed=seed) for seed in (0, 1))
    assert [len(part) for part in (one.train, one.val, one.test, one.more)] == [4, 4, 8, 12]
    texts = [chat[0]["content"] for part in (one.train, one.val, one.test, one.more) for chat in part]
    assert len(set(texts)) == 28
    for chat in (*one.train, *one.test):
        what, how = chat[0]["content"][5:7]
        assert chat[1]["content"] == f"how: {how}\nwhat: {what} x"
    assert one.more[0][1]["content"].startswith("what: ")
    assert (one.test, one.more) == (two.test, two.more)
    assert one.train != two.train


# Tokens -------------------------------------------------------------------------------------------------------


def said(tokenizer, ids, spoken):
    """What the assistant says, by the marks."""
    return tokenizer.decode([i for i, s in zip(ids, spoken, strict=True) if s])


@pytest.mark.parametrize(("template", "ends"), [(TEMPLATE, "<|endoftext|>"), (PLAIN, "<|endoftext|>")])
def test_the_assistant_is_heard_with_marks_and_without(tokenizer, template, ends):
    other = byte_pairs([*TEXTS, *(m["content"] for m in CHAT)], 300)
    other.chat_template = template
    ids, spoken = chat_tokens(CHAT, other)
    assert ids == other.apply_chat_template(CHAT)["input_ids"]
    assert said(other, ids, spoken) == f"On its way.{ends}Yes!{ends}"


def test_marks_and_differences_agree(tokenizer):
    without = byte_pairs([*TEXTS, *(m["content"] for m in CHAT)], 300)
    without.chat_template = re.sub(r"\{% (end)?generation %\}", "", TEMPLATE)
    (ids, spoken), (others, more) = chat_tokens(CHAT, tokenizer), chat_tokens(CHAT, without)
    assert tokenizer.decode(ids) == without.decode(others)
    # without marks what follows the end of the turn, here a line break, is the template's addition too
    assert said(without, others, more) == "On its way.<|endoftext|>\nYes!<|endoftext|>\n"
    assert said(tokenizer, ids, spoken) == "On its way.<|endoftext|>Yes!<|endoftext|>"


def test_a_template_that_rewrites_or_fails_is_an_error(tokenizer):
    other = byte_pairs([*TEXTS], 300)
    for template, words in (
        (LATE, "message 2 in another way"),
        ("{{ raise_exception('no system') }}", "no system"),
    ):
        other.chat_template = template
        with pytest.raises(InputError, match=words) as caught:
            chat_tokens(CHAT, other)
        assert "\n" not in str(caught.value)


def test_texts_are_parted_and_conversations_cut(tokenizer):
    samples, cut = tokenise(["the quick brown fox jumps over the lazy dog"], tokenizer, 8)
    assert cut == 0
    ids = [i for s in samples for i in s.ids]
    assert (
        tokenizer.decode(ids)
        == "the quick brown fox jumps over the lazy dog<|endoftext|>"[: len(tokenizer.decode(ids))]
    )
    assert all(s.labels == [-100, *s.ids[1:]] and len(s.ids) <= 8 for s in samples)
    whole = chat_tokens(CHAT, tokenizer)[0]
    (sample,), cut = tokenise([CHAT], tokenizer, len(whole) - 4)
    assert cut == 1
    assert sample.ids == whole[:-4]
    with pytest.raises(InputError, match=r"--length 8: conversation 1, of .* has no answer"):
        tokenise([CHAT], tokenizer, 8)


def samples_of(tokenizer, length=64):
    return tokenise([*TEXTS, CHAT], tokenizer, length)[0]


def test_rows_are_filled_and_lose_nothing(tokenizer):
    samples = samples_of(tokenizer)
    rows = TokenRows(samples, 64)
    assert len(rows) < len(samples) == len(TokenRows(samples))
    assert sorted(s for i in range(len(rows)) for s in rows[i]) == sorted(samples)
    assert all(sum(len(s.ids) for s in rows[i]) <= 64 for i in range(len(rows)))


def test_a_packed_batch_by_hand(tokenizer):
    row = [Sample([7, 8], [-100, 8]), Sample([9, 4, 5], [-100, -100, 5])]
    batch = CausalBatch(tokenizer, packed=True)([row, [Sample([1, 2, 3, 4, 5, 6], [-100, 2, 3, 4, 5, 6])]])
    assert batch["input_ids"][0].tolist() == [7, 8, 9, 4, 5, tokenizer.pad_token_id]
    assert batch["labels"][0].tolist() == [-100, 8, -100, -100, 5, -100]
    assert batch["position_ids"][0].tolist() == [0, 1, 0, 1, 2, 0]
    sees = (batch["attention_mask"][0, 0] == 0).int().tolist()
    assert sees == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0],
                    [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]]  # fmt: skip
    assert (batch["attention_mask"][1, 0] == 0).int().equal(torch.ones(6, 6).tril().int())
    assert count_tokens()(batch) == 7


# Models -------------------------------------------------------------------------------------------------------

KINDS = ("llama", "tied llama", "gpt2", "gpt_neox")


def gradients(model, rows, collate, loss):
    model.zero_grad()
    batch = collate(rows)
    value = loss(model, batch)
    value.backward()
    return value, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_texts_have_the_loss_and_the_gradient_of_texts_apart(tokenizer, kind):
    model, samples = tiny(tokenizer, kind).double(), samples_of(tokenizer)
    packed, apart = TokenRows(samples, 96), TokenRows(samples)
    assert len(packed) < len(apart)

    def loss(model, batch):
        return causal_loss(model, batch)(model, batch)

    one, grads = gradients(model, list(packed), _double(CausalBatch(tokenizer, packed=True)), loss)
    two, others = gradients(model, list(apart), CausalBatch(tokenizer), loss)
    assert abs((one - two).item()) < 1e-6
    assert grads.keys() == others.keys()
    assert all(torch.allclose(grads[name], others[name], atol=1e-8) for name in grads)


def _double(collate):
    def call(rows):
        batch = collate(rows)
        return {**batch, "attention_mask": batch["attention_mask"].double()}

    return call


def test_packing_without_the_mask_is_caught(tokenizer):
    class Deaf(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, **_):
            return self.model(input_ids=input_ids)

    model, samples = tiny(tokenizer), samples_of(tokenizer)
    check_packing(model, tokenizer, samples)
    with pytest.raises(InputError, match=r"--pack: Deaf lets texts of a row see each other.*--no-pack"):
        check_packing(Deaf(model), tokenizer, samples)


@pytest.mark.parametrize("kind", [*KINDS, "gemma2"])
def test_the_loss_is_that_of_transformers_and_the_head_makes_no_logits_where_it_may(tokenizer, kind):
    model, samples = tiny(tokenizer, kind), samples_of(tokenizer)
    batch = CausalBatch(tokenizer)(list(TokenRows(samples)))
    expected = model(**batch)
    plain = torch.autograd.grad(expected.loss, model.get_input_embeddings().weight)[0]
    loss = causal_loss(model, batch)
    value = loss(model, batch)
    grad = torch.autograd.grad(value, model.get_input_embeddings().weight)[0]
    assert torch.allclose(value, expected.loss, rtol=1e-5)
    assert torch.allclose(grad, plain, rtol=1e-3, atol=1e-6)
    assert (type(model.get_output_embeddings()) is LossHead) == (kind != "gemma2")
    logits = model(**{name: t for name, t in batch.items() if name != "labels"}).logits
    assert logits.equal(expected.logits)  # where it is not asked for a loss, it has logits
    assert not model.training


def test_no_label_is_a_loss_of_nan_that_the_stepper_leaves_out(tokenizer):
    model = tiny(tokenizer)
    batch = CausalBatch(tokenizer)(list(TokenRows(samples_of(tokenizer))))
    loss = causal_loss(model, batch)
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert loss(model, empty).isnan()


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_adapters_learn_with_the_head_that_makes_no_logits(tokenizer, kind):
    base, samples = tiny(tokenizer), samples_of(tokenizer)
    model = add_adapter(base, Adapter(kind, rank=2, tokens=3))
    batch = CausalBatch(tokenizer)(list(TokenRows(samples)))
    model.eval()
    expected = model(**batch).loss
    loss = causal_loss(model, batch)(model, batch)
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert type(base.get_output_embeddings()) is LossHead
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_an_adapted_head_keeps_its_logits(tokenizer):
    model = add_adapter(tiny(tokenizer), Adapter(rank=2, targets=("lm_head", "q_proj")))
    batch = CausalBatch(tokenizer)(list(TokenRows(samples_of(tokenizer))))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.eval()
    assert torch.allclose(causal_loss(model, batch)(model, batch), model(**batch).loss, rtol=1e-5)
    assert not any(type(module) is LossHead for module in model.modules())


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_scores_are_token_weighted_and_agree_with_greedy_decoding(tokenizer, kind):
    model, samples = tiny(tokenizer), samples_of(tokenizer)
    collate = CausalBatch(tokenizer)
    if kind != "lora":
        model = add_adapter(model, Adapter(kind, tokens=3)).eval()
    sums, count = 0.0, 0
    for sample in samples:
        batch = collate([[sample]])
        labels = count_tokens()(batch)
        with torch.no_grad():
            sums += float(model(**batch).loss) * labels
        count += labels
    for size in (1, 2, 32):
        scores = causal_scores(model, samples, collate, "cpu", size)
        assert scores.loss == pytest.approx(sums / count, rel=1e-5)
        assert scores.perplexity == pytest.approx(torch.tensor(scores.loss).exp().item(), rel=1e-5)
    given, wanted, written = complete(model, tokenizer, CHAT, new=5)
    assert (given, wanted) == ("Still?", "Yes!")
    text = tokenizer.apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert written == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    spoken = Sample(ids, [-100] * start + ids[start:])
    assert causal_scores(model, [spoken], collate, "cpu")[2:] == (100.0, 100.0)


def test_what_is_written_fits_the_model(tokenizer):
    model = tiny(tokenizer, "gpt2", n_positions=12)
    given, _, written = complete(model, tokenizer, "the quick brown fox jumps over the lazy dog " * 20, new=5)
    assert written
    assert len(given) > 100
    assert positions(add_adapter(model, Adapter("prompt", tokens=3))) == 9
    complete(add_adapter(model, Adapter("prefix", tokens=3)), tokenizer, "the quick brown fox " * 20)


def test_tokens_are_drawn_at_a_temperature(tokenizer):
    model, text = tiny(tokenizer), "the quick brown fox jumps"
    greedy = complete(model, tokenizer, text, new=20)[2]
    assert complete(model, tokenizer, text, new=20, temperature=1e-6)[2] == greedy
    drawn = [complete(model, tokenizer, text, new=20, temperature=2.0, seed=seed)[2] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_text_is_continued(tokenizer):
    given, wanted, written = complete(tiny(tokenizer), tokenizer, "the quick brown fox", new=3)
    assert given + wanted == "the quick brown fox"
    assert isinstance(written, str)
    table = samples_text([(given, wanted, "a | b"), ("x" * 300, "", "")])
    assert table.count("\n") == 3
    assert "a \\| b" in table
    assert max(map(len, table.split("\n"))) < 220


def test_what_a_step_holds(tokenizer):
    samples, pack = samples_of(tokenizer), CausalBatch(tokenizer, packed=True)
    batch = pack(list(TokenRows(samples, 96)))
    held = {}
    for kind in ("full", "lora", "qlora"):
        model = tiny(tokenizer)
        if kind != "full":
            model = add_adapter(model, Adapter(kind, rank=2))
        optimizer = torch.optim.AdamW(model.parameters())
        stepper = Stepper(model, optimizer, causal_loss(model, batch), count=count_tokens())
        stepper.step([batch])
        held[kind] = footprint(stepper, batch)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert held[kind].gradients == 4 * count
        assert 8 * count <= held[kind].optimizer <= 8 * count + 8 * 100  # and a counter for each
    assert held["qlora"].weights < held["lora"].weights
    assert held["lora"].gradients < held["full"].gradients
    assert held["lora"].backward > 0
    assert footprint(stepper, batch, lean=True).backward < held["qlora"].backward


def test_a_merged_adapter_is_the_adapter(tokenizer):
    model = add_adapter(tiny(tokenizer), Adapter("dora", rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    batch = CausalBatch(tokenizer)(list(TokenRows(samples_of(tokenizer))))
    assert 0 <= merged_difference(model, batch) < 1e-5
    with pytest.raises(InputError, match="merge_adapter"):
        merged_difference(add_adapter(tiny(tokenizer), Adapter("prompt", tokens=2)), batch)


def test_a_prompt_begins_from_words(tokenizer):
    base = tiny(tokenizer)
    model = add_adapter(base, Adapter("prompt", tokens=5))
    prompt_from_text(model, tokenizer, "abc")
    ids = tokenizer("abc")["input_ids"]
    prompt = model.prompt_encoder["default"].embedding.weight
    wanted = base.get_input_embeddings().weight[(ids * 5)[:5]]
    assert prompt.equal(wanted)
    assert prompt.requires_grad
    with pytest.raises(InputError, match="--text"):
        prompt_from_text(model, tokenizer, "")


def test_the_output_layer_has_a_name_unless_it_is_the_embedding(tokenizer):
    assert output_name(tiny(tokenizer)) == "lm_head"
    with pytest.raises(InputError, match=r"lm_head.weight and model.embed_tokens.weight are one tensor"):
        output_name(tiny(tokenizer, "tied llama"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_loaded_on_our_ops_and_gives_its_logits(tokenizer, tmp_path, kind):
    source = tiny(tokenizer, kind)
    bptools.nn.revert(source)
    source.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    model, loaded = load_causal(str(tmp_path / "m"))
    batch = CausalBatch(loaded)(list(TokenRows(samples_of(loaded))))
    assert any(type(module) is bptools.nn.Linear for module in model.modules())
    assert torch.allclose(model(**batch).logits, source(**batch).logits, atol=1e-5)
    torch.manual_seed(1)
    fresh, _ = load_causal(str(tmp_path / "m"), pretrained=False)
    assert not torch.allclose(fresh(**batch).logits, source(**batch).logits, atol=1e-2)


def test_other_folders_are_refused_in_one_line(tokenizer, tmp_path):
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    config = transformers.LlamaConfig(**sizes, pad_token_id=0)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=r"expected a causal language model .*LlamaForSequenceClassification"):
        load_causal(str(tmp_path / "m"))
    tiny(tokenizer).save_pretrained(tmp_path / "n")
    with pytest.raises(InputError, match="no tokenizer") as caught:
        load_causal(str(tmp_path / "n"))
    assert "\n" not in str(caught.value)
