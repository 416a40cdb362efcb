import math

import numpy as np
import pytest
import torch
from torch import nn

import bptools.nn
from bptools.finetune import (
    InputError,
    NGrams,
    RecurrentLanguageModel,
    Streams,
    carried_loss,
    continue_text,
    make_loader,
    read_text,
    text_loss,
)

IDS = torch.randint(7, (400,), generator=torch.Generator().manual_seed(0))


def model(cell="lstm", **options):
    torch.manual_seed(0)
    return RecurrentLanguageModel(7, 5, cell=cell, **options).double()


def batches(streams=4, chunk=6, ids=IDS):
    return list(make_loader(Streams(ids, streams, chunk), streams))


def test_streams_are_the_text_side_by_side():
    data = Streams(torch.arange(43), 4, 3)
    assert len(data) == 4 * 3  # of 42 tokens with a next one, streams of 10, of which 3 chunks
    rows = [data[k * 4 + 1] for k in range(3)]
    assert torch.cat([row["ids"] for row in rows]).tolist() == list(range(10, 19))
    assert torch.cat([row["labels"] for row in rows]).tolist() == list(range(11, 20))
    assert [bool(row["first"]) for row in rows] == [True, False, False]
    assert {int(row["row"]) for row in rows} == {1}
    with pytest.raises(InputError, match="expected 17 tokens or more, for 4 streams, got 16"):
        Streams(torch.arange(16), 4, 4)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_the_carried_state_is_that_of_the_whole_text(cell):
    net = model(cell, streams=4)
    loss = carried_loss(net)
    found = [loss(net, batch).item() for batch in batches()]
    ids, labels = (torch.cat([batch[name] for batch in batches()], 1) for name in ("ids", "labels"))
    whole, state = net(ids, labels, torch.zeros_like(net.state))
    assert np.mean(found) == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(net.state, state, rtol=1e-12, atol=1e-12)
    again = loss(net, batches()[0]).item()  # an epoch begins at zero
    assert again == pytest.approx(found[0], rel=1e-12)


def test_the_gradient_is_that_of_torch_with_the_state_detached():
    net = model(streams=4)
    loss, twin = carried_loss(net), nn.LSTM(5, 5, batch_first=True).double()
    twin.load_state_dict(net.recurrent.state_dict())
    state = None
    for batch in batches():
        net.zero_grad()
        loss(net, batch).backward()
        twin.zero_grad()
        y, state = twin(net.embedding.weight.detach()[batch["ids"]], state)
        logits = y @ net.head.weight.detach().T + net.head.bias.detach()
        nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
        state = tuple(s.detach() for s in state)
        for name, p in twin.named_parameters():
            torch.testing.assert_close(net.recurrent.get_parameter(name).grad, p.grad, rtol=1e-9, atol=1e-12)


def test_a_reset_state_makes_each_chunk_a_text_of_its_own():
    net = model(streams=4)
    loss = carried_loss(net, carry=False)
    later = batches()[3]
    loss(net, batches()[0])
    found = loss(net, later).item()
    assert found == net(later["ids"], later["labels"], torch.zeros_like(net.state))[0].item()
    assert found != carried_loss(net)(net, later).item()


def test_what_only_looks_leaves_the_state():
    net = model(streams=4)
    carried_loss(net)(net, batches()[0])
    before = net.state.clone()
    net.eval()
    carried_loss(net)(net, batches()[1])
    text_loss(net, IDS, chunk=10)
    assert torch.equal(net.state, before)
    assert before.abs().sum() > 0


def test_rows_that_are_not_there_keep_their_state():
    net = model(streams=4)
    whole = batches()[0]
    part = {name: value[:2] for name, value in whole.items()}
    carried_loss(net)(net, part)
    assert net.state[:, :, :2].abs().min() > 0
    assert net.state[:, :, 2:].abs().max() == 0


@pytest.mark.parametrize("carry", [True, False])
def test_the_loss_of_a_text(carry):
    net = model().eval()
    ids = IDS[:61]
    found = text_loss(net, ids, chunk=10, carry=carry, streams=1)
    pieces = [ids] if carry else [ids[i : i + 11] for i in range(0, 60, 10)]
    expected = [net(p[None, :-1], p[None, 1:], torch.zeros_like(net.state))[0].item() for p in pieces]
    assert found == pytest.approx(np.mean(expected), rel=1e-9)


@pytest.mark.parametrize("layers", [1, 2])
def test_checkpoints_of_states_change_nothing(layers):
    losses = []
    for every in (None, "sqrt", 2):
        net = model(streams=4, layers=layers, checkpoint_every=every)
        value = carried_loss(net)(net, batches()[0])
        value.backward()
        losses.append((value.item(), net.embedding.weight.grad.norm().item()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)
    assert losses[2] == pytest.approx(losses[0], rel=1e-10)


def test_the_work_is_done_by_our_ops():
    value = carried_loss(net := model(streams=4))(net, batches()[0])
    assert type(value.grad_fn).__name__.startswith("LinearCrossEntropy")
    assert isinstance(net.recurrent, bptools.nn.LSTM)


def test_a_text_that_repeats_is_continued():
    net = RecurrentLanguageModel(7, 24, streams=2)
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 6] * 60)
    loss, optimizer = carried_loss(net), torch.optim.Adam(net.parameters(), 0.03)
    for _ in range(12):
        for batch in batches(2, 10, ids):
            optimizer.zero_grad()
            loss(net, batch).backward()
            optimizer.step()
    assert continue_text(net, ids[:8], 10, temperature=0.1) == [1, 2, 3, 4, 5, 6, 0, 1, 2, 3]
    drawn = [continue_text(net, ids[:8], 30, temperature=5.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngrams_are_a_distribution(order):
    ids = IDS.tolist()
    grams = NGrams(ids[:300], order, 9)  # two tokens are never seen
    for context in ((), (3,), (3, 4), (8, 8), (0, 1, 2, 3)):
        shares = [grams.probability(context, token) for token in range(9)]
        assert min(shares) > 0
        assert sum(shares) == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(ValueError, match="order: expected at least 1"):
        NGrams(ids, 0, 9)


def test_bigrams_by_hand():
    """Of a b a c a b: after a come b twice and c once; before a stand two kinds of token, before b and c one."""
    grams = NGrams([0, 1, 0, 2, 0, 1], 2, 3, discount=0.5)
    lower = {token: (max(n - 0.5, 0) + 0.5 * 3 / 3) / 4 for token, n in ((0, 2), (1, 1), (2, 1))}
    assert grams.probability((0,), 1) == pytest.approx((2 - 0.5 + 0.5 * 2 * lower[1]) / 3)
    assert grams.probability((0,), 0) == pytest.approx(0.5 * 2 * lower[0] / 3)


def test_ngrams_learn_what_repeats():
    ids = [0, 1, 2, 3] * 100
    assert NGrams(ids, 2, 4).loss(ids) < 0.05 < 1.3 < NGrams(ids, 1, 4).loss(ids) < math.log(4) + 0.01


def test_text_is_read_from_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.md").write_text("ein é")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    assert read_text(tmp_path) == "ein é\ntwo"
    assert read_text(tmp_path / "b.txt") == "two"
    for name, words in (("c.bin", "expected UTF-8"), ("d.txt", "No such file")):
        with pytest.raises(InputError, match=words):
            read_text(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="found none"):
        read_text(tmp_path / "empty")
