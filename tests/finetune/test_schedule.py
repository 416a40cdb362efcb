import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from bptools.finetune.errors import InputError
from bptools.finetune.schedule import SCHEDULES, make_schedule


def two_groups():
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (2.0, 0.5)]
    return torch.optim.SGD(groups)


def run(optimizer, schedule, count):
    """The rates of ``count`` steps, a tuple for each."""
    seen = []
    for _ in range(count):
        seen.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        schedule.step()
    return seen


def rates(name, steps, count, **options):
    optimizer = two_groups()
    return [pair[0] for pair in run(optimizer, make_schedule(name, optimizer, steps, **options), count)]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_rises_from_above_nothing_then_goes_its_way(name):
    seen = rates(name, 20, 23, warmup=0.2)
    assert seen[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    middle, end = {"constant": (2.0, 2.0), "linear": (1.0, 0.0), "cosine": (1.0, 0.0)}[name]
    assert seen[12] == pytest.approx(middle)
    assert seen[19] > 0
    assert seen[20:] == pytest.approx([end] * 3, abs=1e-12)
    assert seen == sorted(seen[:4]) + sorted(seen[4:], reverse=True)


@pytest.mark.parametrize("steps", [4, 10, 33, 100])
def test_one_cycle_is_that_of_torch(steps):
    optimizer, other = two_groups(), two_groups()
    torchs = OneCycleLR(other, [2.0, 0.5], total_steps=steps, cycle_momentum=False)
    expected = [*run(other, torchs, steps - 1), tuple(torchs.get_last_lr())]
    seen = run(optimizer, make_schedule("one-cycle", optimizer, steps), steps + 2)
    assert seen == [pytest.approx(pair, rel=1e-9) for pair in expected + expected[-1:] * 2]


@pytest.mark.parametrize("name", SCHEDULES)
def test_groups_keep_their_proportions_and_their_own_rates(name):
    optimizer = two_groups()
    for first, second in run(optimizer, make_schedule(name, optimizer, 12), 12):
        assert first == pytest.approx(4 * second)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [2.0, 0.5]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_phase_goes_on_at_the_very_rates(name):
    optimizer = two_groups()
    schedule = make_schedule(name, optimizer, 12)
    run(optimizer, schedule, 5)
    states = optimizer.state_dict(), schedule.state_dict()
    resumed = two_groups()
    schedule_again = make_schedule(name, resumed, 12)
    resumed.load_state_dict(states[0])
    schedule_again.load_state_dict(states[1])
    assert run(resumed, schedule_again, 7) == run(optimizer, schedule, 7)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_phases_train(name, steps):
    assert max(rates(name, steps, steps)) == 2.0


def test_errors():
    with pytest.raises(InputError, match=r"--schedule: .* got 'cosin' \(did you mean 'cosine'"):
        rates("cosin", 5, 1)
    with pytest.raises(ValueError, match=r"steps: .* got 0"):
        rates("cosine", 0, 1)
    with pytest.raises(ValueError, match=r"warmup: .* got 1"):
        rates("linear", 5, 1, warmup=1.0)
