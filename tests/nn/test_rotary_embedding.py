"""Rotary embedding against transformers': Llama's halves and GPT-J's interleaved pairs."""

from __future__ import annotations

import pytest
import torch

import bptools
import bptools.functional as B

DIM, LENGTH = 8, 5


def queries(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, LENGTH, DIM, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_llama(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=3 * DIM, num_attention_heads=3, max_position_embeddings=16)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    tables = [
        llama.LlamaRotaryEmbedding(config)(queries(dtype), positions),
        bptools.nn.RotaryEmbedding(DIM, positions=4)(queries(dtype), positions),  # grows
    ]
    torch.testing.assert_close(*tables)
    assert tables[1][0].dtype is dtype
    q, k = queries(dtype), queries(dtype)
    expected = llama.apply_rotary_pos_emb(q, k, *tables[0])
    cos, sin = (t.unsqueeze(1) for t in tables[1])
    y = B.rotary_embedding(q, cos, sin)
    how = {"rtol": 0.0, "atol": 4 * torch.finfo(dtype).eps}  # transformers rounds each product, we round once
    torch.testing.assert_close(y, expected[0], **how)
    grads = [torch.autograd.grad(y.sin().sum(), q)[0] for y in (y, expected[0])]
    torch.testing.assert_close(*grads, **how)


def test_gptj():
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    q = queries()
    sin, cos = gptj.create_sinusoidal_positions(LENGTH, DIM).chunk(2, -1)
    expected = gptj.apply_rotary_pos_emb(q.transpose(1, 2), sin[None], cos[None]).transpose(1, 2)
    tables = bptools.nn.RotaryEmbedding(DIM, interleaved=True)(q)
    y = B.rotary_embedding(q, *tables, interleaved=True)
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(y.sin().sum(), q)[0] for y in (y, expected)]
    torch.testing.assert_close(*grads)


def test_a_rotation_keeps_lengths_and_depends_on_distance_alone():
    rotary = bptools.nn.RotaryEmbedding(DIM, base=100.0)
    q, k = torch.randn(2, 1, DIM, generator=torch.Generator().manual_seed(1)).expand(2, LENGTH, DIM)
    q, k = (B.rotary_embedding(t, *rotary(t)) for t in (q, k))
    torch.testing.assert_close(q.norm(dim=-1), q[:1].norm(dim=-1).expand(LENGTH))
    scores = q @ k.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])


def test_tables_are_not_in_the_state_and_keep_nothing():
    rotary = bptools.nn.RotaryEmbedding(DIM)
    assert not rotary.state_dict()
    assert repr(rotary) == "RotaryEmbedding(8, base=10000.0, interleaved=False)"
    q, kept = queries(), []
    tables = rotary(q)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        B.rotary_embedding(q, *tables)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in tables}


def test_an_odd_dim_is_refused():
    with pytest.raises(ValueError, match="RotaryEmbedding: dim must be even and positive, got 3"):
        bptools.nn.RotaryEmbedding(3)
