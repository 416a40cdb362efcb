import copy
import math

import pytest
import torch
from torch import nn

from bptools.finetune import InputError, Stepper, resolve_amp, resolve_device, warmup_cosine, windows

LOSS = nn.CrossEntropyLoss()


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in sizes
    ]


def one_batch(parts):
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def sgd(model, **options):
    return Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), LOSS, **options)


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


def test_clips_once_a_step_by_the_norm_of_the_whole():
    parts, a, b = batches(4, 4, 4), net(), net()
    free = sgd(b).step(parts)
    before = [p.clone() for p in net().parameters()]
    result = sgd(a, clip=free.norm / 2).step(parts)
    assert result.clipped
    assert not free.clipped
    assert result.norm == pytest.approx(free.norm)  # before clipping
    for p, q, p0 in zip(a.parameters(), b.parameters(), before, strict=True):
        torch.testing.assert_close(p - p0, (q - p0) / 2, rtol=1e-3, atol=1e-6)
    assert not sgd(net(), clip=2 * free.norm).step(parts).clipped


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
        self.linear, self.factor = nn.Linear(4, 3), 1.0

    def forward(self, x):
        return self.linear(x) * self.factor


def test_a_skipped_step_moves_neither_weights_nor_schedule():
    model = Overflow()
    stepper = sgd(model, amp="fp16")
    stepper.schedule = warmup_cosine(stepper.optimizer, 10)
    model.factor = math.inf
    before, lr = model.linear.weight.clone(), stepper.optimizer.param_groups[0]["lr"]
    assert stepper.step(batches(4)).skipped
    assert torch.equal(model.linear.weight, before)
    assert (stepper.schedule.last_epoch, stepper.optimizer.param_groups[0]["lr"]) == (0, lr)
    model.factor = 1.0
    assert not stepper.step(batches(4)).skipped
    assert stepper.schedule.last_epoch == 1


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_without_a_scaler_a_broken_gradient_is_an_error(amp):
    model = Overflow()
    model.factor = math.nan
    before = model.linear.weight.clone()
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        sgd(model, amp=amp).step(batches(4))
    assert torch.equal(model.linear.weight, before)


def test_frozen_parameters_are_left_out_of_the_norm():
    model = net()
    model[0].requires_grad_(False)
    result = sgd(model).step(batches(4))
    assert result.norm == pytest.approx(float(torch.cat([p.grad.flatten() for p in model[2].parameters()]).norm()))


def test_state_holds_scaler_schedule_and_optimizer():
    def make():
        model = net()
        stepper = Stepper(model, torch.optim.AdamW(model.parameters(), lr=0.1), LOSS, amp="fp16")
        stepper.schedule = warmup_cosine(stepper.optimizer, 10)
        return model, stepper

    model, stepper = make()
    for _ in range(3):
        stepper.step(batches(4))
    stepper.scaler.update(32.0)
    other, resumed = make()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(stepper.state_dict()))
    assert resumed.scaler.get_scale() == 32.0
    assert resumed.schedule.last_epoch == 3
    assert resumed.optimizer.param_groups[0]["lr"] == stepper.optimizer.param_groups[0]["lr"]  # does not restart
    stepper.step(batches(4))
    resumed.step(batches(4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


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
    with pytest.raises(ValueError, match=r"float32 weights under fp16, got float16 in '0.weight'"):
        sgd(net().half(), amp="fp16")
