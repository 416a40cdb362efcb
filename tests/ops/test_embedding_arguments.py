"""What the contract cannot ask of embeddings: tables that are written, sparse gradients, and nested bags."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bptools
import bptools.functional as B

TIERS = pytest.mark.parametrize("tier", ["auto", "formula"])
INDICES = torch.tensor([[0, 3, 3], [1, 4, 3]])
CALLS = {
    "embedding": lambda f, w, **kwargs: f.embedding(INDICES, w, **kwargs),
    "sum": lambda f, w, **kwargs: f.embedding_bag(INDICES, w, mode="sum", **kwargs),
    "mean": lambda f, w, **kwargs: f.embedding_bag(INDICES.flatten(), w, torch.tensor([0, 0, 4]), **kwargs),
}


def table(rows: int = 6, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, 4, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()


@TIERS
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kwargs", [{"max_norm": 1.0}, {"max_norm": 1.5, "norm_type": 1.0}], ids=str)
def test_max_norm(name, kwargs, tier):
    """The rows that are read are scaled down in the table itself, before they are read, and no others."""
    found = []
    for functions in (B, F):
        w = table()
        with bptools.backend(tier):
            y = CALLS[name](functions, w, **kwargs)
        found.append([y, w.detach(), *torch.autograd.grad(y.pow(2).sum(), w)])
        assert w._version == 1
    torch.testing.assert_close(*found)
    assert torch.equal(found[0][1][2], table().detach()[2])


@TIERS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("name", CALLS)
def test_sparse(name, padding_idx, dtype, tier):
    """The gradient is sparse, lists the rows that torch's lists, and adds up to the same."""
    found = []
    for functions in (B, F):
        w = table(dtype=dtype)
        with bptools.backend(tier):
            CALLS[name](functions, w, sparse=True, padding_idx=padding_idx).pow(2).sum().backward()
        assert w.grad.layout is torch.sparse_coo
        assert w.grad.dtype is dtype
        found.append(w.grad.coalesce())
    assert torch.equal(found[0].indices(), found[1].indices())
    torch.testing.assert_close(found[0].to_dense(), found[1].to_dense())


@TIERS
def test_sparse_gradients_add_up_and_train(tier):
    """Two uses of a table, and a step of an optimizer for sparse gradients."""
    tables = []
    for module in (bptools.nn.Embedding, torch.nn.Embedding):
        layer = module(6, 4, sparse=True, _weight=table().detach().clone())
        optimizer = torch.optim.SparseAdam(layer.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            with bptools.backend(tier):
                (layer(INDICES) * layer(INDICES[:1])).sum().backward()
            optimizer.step()
        tables.append(layer.weight.detach())
    torch.testing.assert_close(*tables)


@TIERS
def test_sparse_and_by_frequency(tier):
    """Torch refuses this; ours is the dense gradient, listed."""
    w = table()
    with bptools.backend(tier):
        grads = [
            torch.autograd.grad(B.embedding(INDICES, w, scale_grad_by_freq=True, sparse=sparse).pow(2).sum(), w)[0]
            for sparse in (True, False)
        ]
    torch.testing.assert_close(grads[0].to_dense(), grads[1])


@TIERS
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_by_frequency(mode, tier):
    found = []
    for functions in (B, F):
        w = table()
        with bptools.backend(tier):
            y = functions.embedding_bag(INDICES, w, mode=mode, scale_grad_by_freq=True, padding_idx=1)
        found.append(torch.autograd.grad(y.pow(2).sum(), w))
    torch.testing.assert_close(*found)


@TIERS
def test_nested_bags(tier):
    """Bags as a nested tensor of indices, and of their weights."""
    flat, ends = torch.tensor([0, 3, 3, 1, 5]), torch.tensor([0, 2, 2, 5])
    samples = torch.randn(5, dtype=torch.float64)
    nested, weights = (torch.nested.nested_tensor_from_jagged(t, ends) for t in (flat, samples))
    with bptools.backend(tier):
        y = B.embedding_bag(nested, table(), mode="sum", per_sample_weights=weights)
        plain = B.embedding_bag(
            flat, table(), ends, mode="sum", per_sample_weights=samples, include_last_offset=True
        )
    torch.testing.assert_close(y, plain)


def test_pretrained_bags_are_ours():
    layer = bptools.nn.EmbeddingBag.from_pretrained(table().detach(), freeze=False, mode="sum", padding_idx=3)
    assert type(layer) is bptools.nn.EmbeddingBag
    layer(INDICES).sum().backward()
    assert layer.weight.grad.sum(1).tolist() == [4, 4, 0, 0, 4, 0]
