import contextlib
import copy
import math
import weakref

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from bptools.diagnose import gradient_flow
from bptools.finetune.batches import count_samples, count_tokens, split_batch, supervised, windows
from bptools.finetune.devices import resolve_amp, resolve_device
from bptools.finetune.distributed import Parallel
from bptools.finetune.ema import Ema
from bptools.finetune.errors import InputError
from bptools.finetune.schedule import make_schedule
from bptools.finetune.stepper import Stepper
from bptools.optim import clip_grad_adaptive_

LOSS = supervised(nn.CrossEntropyLoss())


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))


def batches(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in sizes
    ]


def one_batch(parts):
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def sgd(model, loss_fn=LOSS, **options):
    return Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, **options)


def adamw(model, **options):
    return Stepper(model, torch.optim.AdamW(model.parameters(), lr=0.1), LOSS, **options)


def assert_same(a, b):
    """Equal to the bit, buffers too."""
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


# Accumulation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(8, 8, 8), (500, 20, 20, 20), (7,)])
def test_a_window_is_one_large_batch(sizes):
    # The mean of the batches' means is wrong where they differ in size.
    parts, a, b = batches(*sizes), net(), net()
    result = sgd(a).step(parts)
    whole = sgd(b).step([one_batch(parts)])
    assert result.samples == sum(sizes)
    assert result.loss == pytest.approx(whole.loss, rel=1e-5)  # unscaled
    assert result.norm == pytest.approx(whole.norm, rel=1e-5)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_windows_keep_the_short_last_one():
    assert [len(w) for w in windows(batches(2, 2, 2, 2, 2), 2)] == [2, 2, 1]
    assert [len(w) for w in windows([], 2)] == []
    with pytest.raises(ValueError, match=r"accumulate: .* got 0"):
        list(windows([], 0))


def test_the_short_last_window_weighs_its_own_samples():
    parts, a, b = batches(4, 4, 4, 2), net(), net()
    stepper, other = sgd(a), sgd(b)
    for window in windows(parts, 3):
        result = stepper.step(window)
    other.step([one_batch(parts[:3])])
    other.step(parts[3:])
    assert result.samples == 2
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    return transformers.LlamaForCausalLM(config)


def language_batches(*counts):
    """Sequences of 1 to 500 labels that count, and one each that does not, as nothing predicts the first."""
    generator = torch.Generator().manual_seed(2)
    for count in counts:
        tokens = torch.randint(0, 50, (1, 510), generator=generator)
        labels = tokens.clone()
        labels[:, count + 1 :] = -100
        mask = torch.ones_like(tokens)
        yield transformers.BatchEncoding({"input_ids": tokens, "attention_mask": mask, "labels": labels})


def language_loss(module, batch):
    return module(**batch).loss


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_tokens_are_weighed_as_one_batch_of_them_would():
    parts = list(language_batches(500, 20, 20, 20))
    whole, naive, model = llama(), llama(), llama()
    whole(**{key: torch.cat([p[key] for p in parts]) for key in parts[0]}).loss.backward()
    for part in parts:
        (naive(**part).loss / 4).backward()
    result = sgd(model, language_loss, count=count_tokens()).step(parts)
    right = gradient(whole)
    assert result.samples == 560
    torch.testing.assert_close(gradient(model), right, rtol=1e-3, atol=1e-6)
    assert (gradient(naive) - right).norm() > right.norm()  # what the mean of means comes to


def test_counting():
    labels = torch.tensor([[-100, 5, -100, 7], [9, 9, 9, -100]])
    assert count_tokens()({"labels": labels}) == 4
    assert count_tokens(shift=False)({"labels": labels}) == 5
    assert count_tokens(ignore_index=9)((None, labels)) == 4
    assert count_samples({"name": "a", "x": [labels]}) == 2
    with pytest.raises(TypeError, match=r"batch: expected tensors .* got dict"):
        count_samples({"x": 3})


def test_a_batch_of_which_nothing_counts_adds_nothing():
    parts = list(language_batches(30, 0, 20))
    with_it, without = llama(), llama()
    result = sgd(with_it, language_loss, count=count_tokens()).step(parts)
    assert result == sgd(without, language_loss, count=count_tokens()).step([parts[0], parts[2]])
    assert_same(with_it, without)
    with pytest.raises(ValueError, match=r"window: expected items that count, got none in 1 batches"):
        sgd(llama(), language_loss, count=count_tokens()).step(parts[1:2])


class Two(Parallel):
    """What one of two processes sees whose other one has nothing that counts."""

    passes = ()

    def sum(self, values):
        return list(values)

    def any(self, flag):
        return flag

    def accumulating(self, module, last):
        Two.passes += (last,)
        return contextlib.nullcontext()


def test_of_several_processes_each_takes_part_in_every_exchange():
    # DDP and FSDP2 average, so what one of two adds is doubled; a batch of which nothing counts is passed through.
    parts, both, alone = list(language_batches(30, 0)), llama(), llama()
    stepper = sgd(both, language_loss, count=count_tokens(), parallel=Two(size=2), module=both)
    Two.passes = ()
    result = stepper.step(parts)
    expected = sgd(alone, language_loss, count=count_tokens()).step(parts)
    assert Two.passes == (False, True)
    assert result.loss == expected.loss
    torch.testing.assert_close(gradient(both), 2 * gradient(alone))


def test_split_batches():
    batch = {"x": torch.arange(10).view(5, 2), "y": (torch.arange(5), "name"), "scale": torch.tensor(2.0)}
    parts = split_batch(batch, 4)
    assert [p["y"][0].tolist() for p in parts] == [[0, 1, 2], [3, 4]]
    assert [len(p["x"]) for p in parts] == [3, 2]
    assert parts[0]["scale"] is batch["scale"]
    assert [len(split_batch(batch, most)) for most in (None, 9, 2, 1)] == [1, 1, 3, 5]


# Clipping, scaling, precision ---------------------------------------------------------------------------------


def test_clips_once_a_step_by_the_norm_of_the_whole():
    parts, a, b = batches(4, 4, 4), net(), net()
    free = sgd(b).step(parts)
    before = [p.clone() for p in net().parameters()]
    result = sgd(a, clip=free.norm / 2).step(parts)
    assert (result.clipped, free.clipped) == (1, 0)
    assert result.norm == pytest.approx(free.norm)  # before clipping
    for p, q, p0 in zip(a.parameters(), b.parameters(), before, strict=True):
        torch.testing.assert_close(p - p0, (q - p0) / 2, rtol=1e-3, atol=1e-6)
    assert not sgd(net(), clip=2 * free.norm).step(parts).clipped


@pytest.mark.parametrize(
    ("by", "limit", "utility"),
    [("norm", 0.1, clip_grad_norm_), ("value", 0.02, clip_grad_value_), ("adaptive", 0.05, clip_grad_adaptive_)],
)
def test_each_kind_of_clipping_is_that_of_the_utility(by, limit, utility):
    parts, a, b = batches(16), net(), net()
    result = sgd(a, clip=limit, clip_by=by).step(parts)
    LOSS(b, parts[0]).backward()
    over = (gradient(b).abs() > limit).float().mean()
    share = utility(b.parameters(), limit)
    assert torch.equal(gradient(a), gradient(b))
    assert result.clipped == pytest.approx(float({"norm": 1.0, "value": over, "adaptive": share}[by]))
    assert 0 < result.clipped <= 1


def test_adaptive_clipping_leaves_out_the_last_layer():
    parts, a, b = batches(16), net(), net()
    sgd(b).step(parts)
    sgd(a, clip=1e-3, clip_by="adaptive", clip_exclude=a[2].parameters()).step(parts)
    assert torch.equal(a[2].weight.grad, b[2].weight.grad)
    assert a[0].weight.grad.norm() < b[0].weight.grad.norm() / 2


def test_fp16_unscales_before_it_clips():
    parts, a, b = batches(4, 4), net(), net()
    expected = sgd(b, clip=0.1).step(parts)
    result = sgd(a, clip=0.1, amp="fp16").step(parts)
    assert result.norm == pytest.approx(expected.norm, rel=0.02)  # not 65536 times as large
    assert result.clipped
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.02, atol=1e-4)


class Overflow(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.factor = nn.BatchNorm1d(4), nn.Linear(4, 3), 1.0
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.linear(self.dropout(self.norm(x * self.factor)))


def test_a_skipped_step_moves_nothing():
    model, ema = Overflow(), Ema(Overflow())
    stepper = sgd(model, amp="fp16", ema=ema, ratios_every=1)
    stepper.schedule = make_schedule("cosine", stepper.optimizer, 10)
    model.factor = math.inf
    before, lr = copy.deepcopy(model), stepper.optimizer.param_groups[0]["lr"]
    result = stepper.step(batches(4))
    assert (result.skipped, result.ratios) == (True, (0.0,))
    assert_same(model, before)  # its running statistics too
    assert (stepper.schedule.last_epoch, stepper.optimizer.param_groups[0]["lr"], ema.updates) == (0, lr, 0)
    model.factor = 1.0
    assert not stepper.step(batches(4)).skipped
    assert (stepper.schedule.last_epoch, ema.updates) == (1, 1)


def test_what_no_scale_helps_is_an_error_in_the_end():
    model = Overflow()
    model.factor = math.nan
    stepper = sgd(model, amp="fp16")
    while stepper.scaler.get_scale() >= 2**-10:
        assert stepper.step(batches(4)).skipped
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        stepper.step(batches(4))


@pytest.mark.parametrize(("amp", "in_backward"), [("off", False), ("bf16", False), ("off", True)])
def test_without_a_scaler_a_broken_gradient_is_an_error(amp, in_backward):
    model = Overflow()
    stepper = adamw(model, amp=amp, in_backward=in_backward)
    stepper.step(batches(4))
    model.factor = math.nan
    before, random = (copy.deepcopy(model), copy.deepcopy(stepper.optimizer.state_dict())), torch.get_rng_state()
    words = r"loss is nan" if in_backward else r"gradient norm is nan.*; first NaN: aten\."
    with pytest.raises(FloatingPointError, match=words):
        stepper.step(batches(4))
    assert_same(model, before[0])
    torch.testing.assert_close(stepper.optimizer.state_dict(), before[1], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)


class Logarithm(nn.Module):
    def __init__(self, floor):
        super().__init__()
        self.linear, self.dropout, self.floor = nn.Linear(4, 4), nn.Dropout(0.5), floor

    def forward(self, x):
        return (self.dropout(self.linear(x)).abs() + self.floor).log()


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(
    ("floor", "words"),
    [
        (-9.0, "; first NaN: aten.log in Logarithm, in the forward pass, at "),
        (0.0, "; last infinity before it: aten.log in Logarithm, in the forward pass, at "),
    ],
)
def test_the_error_says_where_it_began(floor, words, lean):
    stepper, random = sgd(Logarithm(floor), lean=lean), torch.get_rng_state()
    with pytest.raises(FloatingPointError, match="gradient norm is nan") as caught:
        stepper.step(batches(4, 4))
    assert words in str(caught.value)
    assert f"{__file__}:" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(p.grad is None for p in stepper.model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_what_watches_sees_the_gradient_before_it_is_clipped():
    model = net()
    flow = gradient_flow(model)
    result = sgd(model, clip=1e-3).step(batches(4), flow)
    seen = math.hypot(*(row.weight_gradient for row in flow.rows if row.weight_gradient))
    assert seen == pytest.approx(result.norm, rel=1e-5)
    assert result.clipped == 1
    with pytest.raises(ValueError, match="watch: cannot be had with in_backward"):
        sgd(model, in_backward=True).step(batches(4), gradient_flow(model))


def test_frozen_parameters_are_left_out_of_the_norm():
    model = net()
    model[0].requires_grad_(False)
    result = sgd(model).step(batches(4))
    assert result.norm == pytest.approx(float(torch.cat([p.grad.flatten() for p in model[2].parameters()]).norm()))


# Options ------------------------------------------------------------------------------------------------------


def test_ratios_of_update_and_weights():
    model = net()
    nn.init.zeros_(model[2].bias)
    groups = [model[0].parameters(), [model[2].weight], [model[2].bias]]
    stepper = Stepper(model, torch.optim.SGD([{"params": g} for g in groups], lr=0.1), LOSS, ratios_every=2)
    assert stepper.step(batches(4)).ratios == ()
    model[0].bias.requires_grad_(False)
    model[2].bias.data.zero_()
    before = copy.deepcopy(model)
    first, second, third = stepper.step(batches(4)).ratios

    def ratio(layer):
        return ((model[layer].weight - before[layer].weight).norm() / before[layer].weight.norm()).item()

    assert (first, second) == (pytest.approx(ratio(0), rel=1e-5), pytest.approx(ratio(2), rel=1e-5))
    assert third == 0
    assert stepper.step(batches(4)).ratios == ()


def test_lean_keeps_less_and_changes_nothing():
    a, b = normed(), normed()
    for _ in range(2):
        for model, lean in ((a, True), (b, False)):
            torch.manual_seed(3)
            sgd(model, lean=lean).step(batches(16, 8))
        assert torch.equal(gradient(a), gradient(b))
        assert_same(a, b)


def test_a_step_in_backward_is_the_step():
    a, b = normed(), normed()
    inside, after = adamw(a, in_backward=True, lean=True, ratios_every=1), adamw(b, ratios_every=1)
    for stepper in (inside, after):
        stepper.schedule = make_schedule("cosine", stepper.optimizer, 10)
        torch.manual_seed(3)
        for window in windows(batches(8, 8, 5), 1):
            result = stepper.step(window)
            assert result.ratios[0] > 0
            assert math.isnan(result.norm) == (stepper is inside)
    assert_same(a, b)
    assert all(p.grad is None for p in a.parameters())


@pytest.mark.parametrize("options", [{"clip": 1.0}, {"amp": "fp16"}, {"parallel": Two(size=2)}])
def test_a_step_in_backward_contradicts(options):
    model = net()
    with pytest.raises(ValueError, match="in_backward: cannot be had with"):
        sgd(model, in_backward=True, module=model, **options)


def test_a_step_in_backward_is_of_one_batch():
    with pytest.raises(ValueError, match=r"window: expected one batch, .* got 2"):
        sgd(net(), in_backward=True).step(batches(4, 4))


# Memory -------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A network for which there is memory for so many samples and no more."""

    def __init__(self, most, wanted=None):
        super().__init__()
        self.net, self.most, self.wanted, self.sizes = normed(), most, wanted, []

    def forward(self, x):
        self.sizes.append(len(x))
        y = self.net(x)
        if len(x) > self.most:
            if self.wanted:
                torch.empty(self.wanted, dtype=torch.uint8)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return y


@pytest.mark.parametrize("wanted", [None, 2**60])  # 2^60: the allocator of the CPU says so itself
def test_what_does_not_fit_is_taken_in_pieces(wanted, caplog):
    parts, a, b = batches(8, 4), Small(2, wanted), Small(8)
    stepper, by_hand = adamw(a), adamw(b)
    torch.manual_seed(3)
    result = stepper.step(parts)
    torch.manual_seed(3)
    expected = by_hand.step([piece for batch in parts for piece in split_batch(batch, 2)])
    assert result == expected
    assert_same(a, b)  # weights, and running statistics
    assert a.sizes == [8, 4, 2, 2, 2, 2, 2, 2]
    assert [r.getMessage() for r in caplog.records] == [
        f"out of memory: micro-batches are cut in {n} samples or less from here on; batch norm sees no more either"
        for n in (4, 2)
    ]
    caplog.clear()
    stepper.step(parts)  # it remembers
    assert not caplog.records
    again = adamw(Small(2))
    again.load_state_dict(stepper.state_dict())
    assert again.most == 2


def test_nothing_of_the_first_attempt_is_held_in_the_second():
    model, outputs = Small(2), []

    class Ref(nn.Module):
        def forward(self, x):
            outputs.append(weakref.ref(y := x * 2))
            alive.append(sum(ref() is not None for ref in outputs))
            return y

    alive = []
    model.net = nn.Sequential(nn.Linear(4, 3), Ref())
    sgd(model).step(batches(4))
    assert alive == [1, 1, 1]


@pytest.mark.parametrize(
    ("most", "options", "message"),
    [
        (0, {}, "--batch-size: one sample by itself does not fit in memory .CUDA out of memory"),
        (2, {"in_backward": True}, "--batch-size: a batch of 4 does not fit in memory"),
        (2, {"parallel": Two(size=2)}, "--batch-size: a batch of 4 does not fit in memory"),
    ],
)
def test_what_cannot_be_cut_is_an_error(most, options, message):
    model = Small(most)
    model.net.eval()
    with pytest.raises(InputError, match=message):
        sgd(model, module=model, **options).step(batches(4))


def test_other_errors_are_not_of_memory():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        sgd(net()).step([(torch.randn(2, 5), torch.zeros(2, dtype=torch.long))])


# State and settings -------------------------------------------------------------------------------------------


def test_state_holds_scaler_and_schedule():
    def make():
        stepper = adamw(net(), amp="fp16", ratios_every=2)
        stepper.schedule = make_schedule("cosine", stepper.optimizer, 10)
        return stepper.model, stepper

    model, stepper = make()
    for _ in range(3):
        stepper.step(batches(4))
    stepper.scaler.update(32.0)
    other, resumed = make()
    other.load_state_dict(model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(stepper.optimizer.state_dict()))
    resumed.load_state_dict(copy.deepcopy(stepper.state_dict()))
    assert resumed.scaler.get_scale() == 32.0
    assert resumed.schedule.last_epoch == 3
    assert resumed.optimizer.param_groups[0]["lr"] == stepper.optimizer.param_groups[0]["lr"]  # does not restart
    assert stepper.step(batches(4)).ratios == resumed.step(batches(4)).ratios != ()
    assert_same(model, other)


@pytest.mark.parametrize(("kernels", "amp"), [(True, "bf16"), (False, "off")])
def test_auto_takes_bf16_on_a_cpu_only_where_it_is_fast(kernels, amp, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: kernels)
    assert [resolve_amp("auto", d) for d in ("cpu", "cuda")] == [amp, "fp16"]


def test_resolve_amp():
    assert resolve_amp("off", "cuda") == "off"
    with pytest.raises(ValueError, match=r"amp: expected one of .* got 'fp8'"):
        resolve_amp("fp8", "cpu")


def test_resolve_device():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") in ("cpu", "cuda")
    with pytest.raises(InputError, match="--device cpuu: "):
        resolve_device("cpuu")
    with pytest.raises(InputError, match="--device meta: ") as caught:
        resolve_device("meta")
    assert len(str(caught.value)) < 150


def test_errors():
    with pytest.raises(ValueError, match=r"clip: .* got -1"):
        sgd(net(), clip=-1)
    with pytest.raises(ValueError, match=r"clip_by: expected one of .* got 'l2'"):
        sgd(net(), clip=1, clip_by="l2")
    with pytest.raises(ValueError, match=r"ratios_every: .* got -1"):
        sgd(net(), ratios_every=-1)
    with pytest.raises(ValueError, match=r"module: expected what parallel.wrap returned, for 2 processes"):
        sgd(net(), parallel=Two(size=2))
    with pytest.raises(ValueError, match=r"float32 weights under fp16, got float16 in '0.weight'"):
        sgd(net().half(), amp="fp16")
    base = net().half().requires_grad_(False)
    sgd(nn.Sequential(base, nn.Linear(3, 3)), amp="fp16")  # frozen ones may be
