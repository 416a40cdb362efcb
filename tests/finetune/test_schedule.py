import pytest
import torch

from bptools.finetune import warmup_cosine


def rates(steps, warmup, count):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = warmup_cosine(optimizer, steps, warmup=warmup)
    seen = []
    for _ in range(count):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_rises_then_falls_to_nothing():
    seen = rates(20, 0.2, 23)
    assert seen[:4] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert seen[4] == max(seen) == 2.0
    assert seen[12] == pytest.approx(1.0)
    assert 0 < seen[19] < 0.05
    assert seen[20:] == pytest.approx([0.0, 0.0, 0.0], abs=1e-12)


def test_one_step_is_taken_at_full_rate():
    assert rates(1, 0.1, 1) == [2.0]


def test_errors():
    with pytest.raises(ValueError, match=r"steps: .* got 0"):
        rates(0, 0.1, 1)
    with pytest.raises(ValueError, match=r"warmup: .* got 1"):
        rates(5, 1.0, 1)
