"""Attention and transformers against torch's in float64, for arguments that the table of modules has not."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bptools
import bptools.functional as B
from bptools.ops import attention as _attention

N, L, S = 3, 4, 5


@pytest.fixture(autouse=True)
def _slow_path():
    """Torch's fast path for evaluation gives zeros, or NaN, where its own slow path does not."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def pair(name, *args, **kwargs):
    """Our module and torch's, with the same parameters."""
    made = []
    for modules in (bptools.nn, torch.nn):
        torch.manual_seed(0)
        made.append(getattr(modules, name)(*args, **kwargs, dtype=torch.float64))
    for ours, theirs in zip(*(m.parameters() for m in made), strict=True):
        assert torch.equal(ours, theirs)
        torch.nn.init.normal_(theirs, std=0.5)
    made[0].load_state_dict(made[1].state_dict())
    return made


def step(module, inputs, **kwargs):
    """Results and gradients of one forward and backward, with the same dropout for all."""
    leaves = {id(x): x.detach().clone().requires_grad_() for x in inputs}  # one tensor twice stays one tensor
    module.zero_grad()
    torch.manual_seed(2)
    results = [y for y in tree_leaves(module(*(leaves[id(x)] for x in inputs), **kwargs)) if y is not None]
    torch.manual_seed(3)
    torch.autograd.backward(results, [torch.randn_like(y) for y in results])
    return [*results, *(x.grad for x in leaves.values()), *(p.grad for p in module.parameters())]


def masks(batched: bool, s: int):
    """Pairs of attn_mask and key_padding_mask, none of which excludes all keys."""
    n = (N,) if batched else ()
    later = torch.ones(L, s, dtype=torch.bool).triu(1)
    per_head = torch.randn(2 * (N if batched else 1), L, s, dtype=torch.float64)
    some = (per_head < -0.3) & (torch.arange(s) > 0)
    padding = torch.arange(s).expand(*n, s) > s - 2
    yield None, None
    yield later, padding
    yield some, None
    yield per_head, torch.randn(*n, s, dtype=torch.float64)
    yield None, padding


ARGUMENTS = {
    "plain": {},
    "no-bias": {"bias": False, "batch_first": True},
    "more-keys": {"add_bias_kv": True, "add_zero_attn": True, "dropout": 0.3},
    "features": {"kdim": 3, "vdim": 5, "batch_first": True, "dropout": 0.2},
}


@pytest.mark.parametrize("batched", [True, False], ids=["batch", "no-batch"])
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_multi_head_attention(arguments, batched):
    arguments = ARGUMENTS[arguments]
    ours, theirs = pair("MultiheadAttention", 8, 2, **arguments)
    shapes = [(L, 8), (S, arguments.get("kdim", 8)), (S, arguments.get("vdim", 8))]
    q, k, v = (
        torch.randn(l, N, e, dtype=torch.float64) if batched else torch.randn(l, e, dtype=torch.float64)
        for l, e in shapes
    )
    if batched and "batch_first" in arguments:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    inputs = [(q, k, v)] if "kdim" in arguments else [(q, k, v), (q, k, k), (q, q, q)]
    for tensors, weights, training in itertools.product(inputs, ("none", "mean", "heads"), (True, False)):
        s = L if tensors[1] is q else S
        for attn_mask, key_padding_mask in masks(batched, s):
            options = {
                "attn_mask": attn_mask,
                "key_padding_mask": key_padding_mask,
                "need_weights": weights != "none",
                "average_attn_weights": weights == "mean",
            }
            ours.train(training), theirs.train(training)
            torch.testing.assert_close(step(ours, tensors, **options), step(theirs, tensors, **options))


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_hint_of_causality(need_weights):
    ours, theirs = pair("MultiheadAttention", 8, 2)
    x = torch.randn(L, N, 8, dtype=torch.float64)
    options = {"attn_mask": torch.ones(L, L, dtype=torch.bool).triu(1), "need_weights": need_weights}
    hinted = step(ours, (x, x, x), is_causal=True, **options)
    torch.testing.assert_close(hinted, step(theirs, (x, x, x), is_causal=True, **options))
    torch.testing.assert_close(hinted, step(ours, (x, x, x), **options))


def test_a_hint_of_causality_does_not_hide_the_added_keys():
    """Torch's own results differ here between need_weights=True and False."""
    layer, _ = pair("MultiheadAttention", 8, 2, add_zero_attn=True)
    x = torch.randn(L, N, 8, dtype=torch.float64)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    results = [layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=need)[0] for need in (True, False)]
    torch.testing.assert_close(*results)


def test_a_causal_mask_that_learns_has_a_gradient():
    """Torch takes it for the causal one and drops it."""
    layer = bptools.nn.TransformerEncoderLayer(8, 2, 6, 0.0, norm_first=True)
    encoder = bptools.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(L).requires_grad_()
    for hint in (None, True):
        output = encoder(torch.randn(L, N, 8), mask=mask, is_causal=hint)
        assert torch.autograd.grad(output.square().sum(), mask)[0].abs().sum() > 0


def test_static_keys_and_values():
    ours, theirs = pair("MultiheadAttention", 8, 2)
    given = []
    for module, functions in ((ours, B), (theirs, torch.nn.functional)):
        torch.manual_seed(1)
        q, k, v = (torch.randn(s, dtype=torch.float64) for s in ((L, N, 8), (2 * N, S, 4), (2 * N, S, 4)))
        weights = module.in_proj_weight, module.in_proj_bias, None, None
        out = module.out_proj.weight, module.out_proj.bias
        given.append(
            functions.multi_head_attention_forward(
                q, q, q, 8, 2, *weights, True, 0.0, *out, static_k=k, static_v=v
            )
        )
    torch.testing.assert_close(*given)


TRANSFORMERS = {
    "post-norm": {"activation": "relu", "batch_first": True, "layer_norm_eps": 1e-3},
    "pre-norm": {"activation": "gelu", "norm_first": True, "bias": False, "batch_first": True},
    "callable": {"activation": torch.tanh, "norm_first": True, "batch_first": False},
}


def floating(mask):
    return torch.zeros_like(mask, dtype=torch.float64).masked_fill(mask, -torch.inf)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("arguments", TRANSFORMERS)
def test_transformer(arguments):
    arguments = TRANSFORMERS[arguments]
    ours, theirs = pair("Transformer", 8, 2, 2, 1, 12, 0.2, **arguments)
    src, tgt = torch.randn(N, S, 8, dtype=torch.float64), torch.randn(N, L, 8, dtype=torch.float64)
    if not arguments["batch_first"]:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    later, padding = torch.ones(L, L, dtype=torch.bool).triu(1), (torch.arange(S) > 2).expand(N, S)
    for options in (
        {},
        {"tgt_mask": later, "src_key_padding_mask": padding, "memory_key_padding_mask": padding},
        {
            "src_mask": torch.randn(S, S, dtype=torch.float64),
            "src_key_padding_mask": floating(padding),
            "memory_mask": torch.randn(L, S, dtype=torch.float64),
            "tgt_mask": floating(later),
            "tgt_is_causal": True,
        },
    ):
        for training in (True, False):
            ours.train(training), theirs.train(training)
            torch.testing.assert_close(step(ours, (src, tgt), **options), step(theirs, (src, tgt), **options))


def test_what_transformers_are_made_of():
    """Everything that computes is ours, also in evaluation, save what the caller gave."""
    given = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(8, 2, 6, batch_first=True), 1)
    model = bptools.nn.Transformer(8, 2, 1, 1, 6, custom_decoder=given, batch_first=True)
    assert model.decoder is given
    assert type(given.layers[0]) is torch.nn.TransformerDecoderLayer
    made = {type(m) for m in model.encoder.modules()} - {torch.nn.ModuleList}
    assert {m.__module__.split(".")[0] for m in made} - {"torch"} == {"bptools"}
    assert {m.__name__ for m in made if m.__module__.startswith("torch")} == {"NonDynamicallyQuantizableLinear"}
    assert model.encoder.layers[0].activation is B.relu
    activation = torch.nn.GELU()
    layer = bptools.nn.TransformerEncoderLayer(8, 2, 6, 0.0, activation)
    assert layer.activation is activation
    assert type(activation) is torch.nn.GELU


def test_evaluation_runs_our_ops():
    torch.backends.mha.set_fastpath_enabled(True)
    layer = bptools.nn.TransformerEncoderLayer(8, 2, 6, 0.0, batch_first=True)
    encoder = bptools.nn.TransformerEncoder(layer, 2).eval()
    padding = torch.tensor([[False, False, True]] * 2)
    with torch.no_grad(), Seen() as seen:
        encoder(torch.randn(2, 3, 8), src_key_padding_mask=padding)
    assert "_transformer_encoder_layer_fwd" not in seen.names
    assert "native_layer_norm" in seen.names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_transformer_compiles():
    model = bptools.nn.Transformer(8, 2, 1, 1, 6, 0.0, batch_first=True)
    src, tgt = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(src, tgt, tgt_mask=mask), model(src, tgt, tgt_mask=mask))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_errors():
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)])
    x = torch.randn(2, 3, 8)
    with pytest.raises(NotImplementedError, match="MultiheadAttention: query must be a dense tensor"):
        bptools.nn.MultiheadAttention(8, 2, batch_first=True)(nested, nested, nested)
    with pytest.raises(NotImplementedError, match="TransformerEncoderLayer: src must be a dense tensor"):
        bptools.nn.TransformerEncoderLayer(8, 2, batch_first=True)(nested)
    with pytest.raises(NotImplementedError, match="TransformerDecoderLayer: memory must be a dense tensor"):
        bptools.nn.TransformerDecoderLayer(8, 2, batch_first=True)(x, nested)
    model = bptools.nn.Transformer(8, 2, 1, 1, 6, batch_first=True)
    with pytest.raises(ValueError, match=r"Transformer: src must have .* 8 features, got \(2, 3, 7\)"):
        model(x[..., :7], x)
    with pytest.raises(ValueError, match=r"tgt must have the batch of src, \(2, 3, 8\), got \(1, 3, 8\)"):
        model(x, x[:1])


# Memory ----------------------------------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """The ATen operations that run, and the bytes of the largest tensor that one of them makes."""

    def __init__(self):
        super().__init__()
        self.largest, self.names = 0, set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **(kwargs or {}))
        self.names.add(op.__name__.split(".")[0])
        for t in tree_leaves(results):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return results


def kept_and_largest(l: int, options) -> list[int]:
    """Bytes kept for a first and for a second backward, and those of the largest tensor on the way."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, l, 4).requires_grad_() for _ in range(3))
    kept = [{}, {}]
    with bptools.backend("formula"), Seen() as seen:
        for stage in (0, 1):
            storages = kept[stage]

            def pack(t, storages=storages):
                storages[t.untyped_storage().data_ptr()] = t  # held, so that no other takes its place
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                if stage == 0:
                    y = B.scaled_dot_product_attention(q, k, v, **options)
                else:
                    grads = torch.autograd.grad(y.square().sum(), (q, k, v), create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v))
    return [*(sum(t.untyped_storage().nbytes() for t in storages.values()) for storages in kept), seen.largest]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.3}], ids=str)
def test_memory_grows_with_the_length_not_its_square(options, monkeypatch):
    monkeypatch.setattr(_attention, "TILE", 64)
    short, long = (kept_and_largest(l, options) for l in (256, 1024))
    assert all(b <= 4.2 * a for a, b in zip(short, long, strict=True)), (short, long)


@pytest.mark.parametrize("shape", [(4,), (2, 5, 4)], ids=str)
def test_dropout_from_a_seed(shape):
    """The gradients of dropout that is drawn tile by tile, and that of a bias of any shape."""
    q, k, v = (torch.randn(2, n, 2, dtype=torch.float64, requires_grad=True) for n in (5, 4, 4))
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def attend(q, k, v, bias):
        bias = torch.atleast_2d(bias)
        constants = False, 0.4, 0.7, False, 2
        return _attention.scaled_dot_product_attention(q, k, v, bias, None, None, 5, *constants)[0]

    with bptools.backend("formula"):
        assert torch.autograd.gradcheck(attend, (q, k, v, bias))
        assert torch.autograd.gradgradcheck(attend, (q, k, v, bias))


def test_dropout_of_long_sequences(monkeypatch):
    """It zeroes the share that it should, the same for the same seed of torch, and keeps the mean."""
    monkeypatch.setattr(_attention, "TILE", 16)
    q = torch.zeros(1, 1, 50, 2)
    v = torch.eye(40).expand(1, 1, 40, 40)
    k = torch.zeros(1, 1, 40, 2)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(B.scaled_dot_product_attention(q, k, v, dropout_p=0.25))
    assert torch.equal(*results[:2])
    assert not torch.equal(*results[1:])
    assert not torch.equal(results[0][..., :16, :], results[0][..., 16:32, :]), "tiles have numbers of their own"
    share = (results[0] == 0).float().mean()
    assert abs(share - 0.25) < 0.05
    assert torch.equal(results[0].unique(), torch.tensor([0.0, 1 / 40 / 0.75]))
