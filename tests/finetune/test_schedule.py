import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from bptools.finetune.errors import InputError
from bptools.finetune.schedule import SCHEDULES, make_schedule

PEAKS = (2.0, 0.5, 0.01)


def groups():
    """An optimizer as a phase leaves it: each group has its own ``initial_lr``."""
    return torch.optim.SGD(
        [{"params": [torch.zeros(1, requires_grad=True)], "lr": p, "initial_lr": p} for p in PEAKS]
    )


def rates(optimizer, schedule, count):
    seen = []
    for _ in range(count):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return seen


def rates_of(name, steps, count, **options):
    optimizer = groups()
    return rates(optimizer, make_schedule(name, optimizer, steps, **options), count)


def highest(rows):
    return [row[0] for row in rows]


def test_cosine_rises_then_falls_to_nothing():
    seen = highest(rates_of("cosine", 20, 23, warmup=0.2))
    assert seen[:4] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert seen[4] == max(seen) == 2.0
    assert seen[12] == pytest.approx(1.0)
    assert 0 < seen[19] < 0.05
    assert seen[20:] == pytest.approx([0.0, 0.0, 0.0], abs=1e-12)


def test_linear_and_constant():
    assert highest(rates_of("linear", 10, 12, warmup=0.2)) == pytest.approx(
        [2 / 3, 4 / 3, 2, 1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25, 0, 0]
    )
    assert highest(rates_of("constant", 10, 12, warmup=0.2)) == pytest.approx([2 / 3, 4 / 3, *[2] * 10])


@pytest.mark.parametrize("steps", [2, 3, 7, 10, 33, 100])
def test_one_cycle_is_that_of_torch(steps):
    optimizer = groups()
    theirs = rates(optimizer, OneCycleLR(optimizer, list(PEAKS), steps, cycle_momentum=False), steps - 1)
    ours = rates_of("one-cycle", steps, steps + 2)
    for row, expected in zip(ours, theirs, strict=False):
        assert row == pytest.approx(expected, rel=1e-9)
    for row in ours[steps - 1 :]:  # the last step, and where torch raises
        assert row == pytest.approx([peak / 25e4 for peak in PEAKS], rel=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_groups_keep_their_proportions(name):
    for row in rates_of(name, 12, 12):
        assert row == pytest.approx([row[0] * peak / PEAKS[0] for peak in PEAKS])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_one_step_is_taken_at_full_rate(name):
    assert rates_of(name, 1, 1) == [list(PEAKS)]


def test_initial_rates_are_lost_by_torch_and_kept_by_ours():
    optimizer = groups()
    make_schedule("one-cycle", optimizer, 10)
    assert [group["initial_lr"] for group in optimizer.param_groups] == list(PEAKS)
    OneCycleLR(optimizer, 1.0, 10, cycle_momentum=False)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.04] * 3


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stop", [0, 2, 9])
def test_a_resumed_schedule_gives_the_same_rates(name, stop):
    whole = rates_of(name, 15, 15)
    before = groups()
    schedule = make_schedule(name, before, 15)
    first = rates(before, schedule, stop)
    after = groups()
    again = make_schedule(name, after, 15)
    after.load_state_dict(before.state_dict())
    again.load_state_dict(schedule.state_dict())
    assert first + rates(after, again, 15 - stop) == whole


def test_errors():
    with pytest.raises(ValueError, match=r"steps: .* got 0"):
        rates_of("cosine", 0, 1)
    with pytest.raises(ValueError, match=r"warmup: .* got 1"):
        rates_of("cosine", 5, 1, warmup=1.0)
    with pytest.raises(InputError, match=r"--schedule: expected one of constant, .* got 'onecycle' .*'one-cycle'"):
        rates_of("onecycle", 5, 1)
