from __future__ import annotations

import copy

import pytest
import timm.optim
import timm.utils.agc
import torch
from torch import nn

from bptools.optim import Lamb, StepInBackward, clip_grad_adaptive_, clip_grad_norm_, clip_grad_value_


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    )


def batches(n=6):
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        yield torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def groups(model):
    """Weights decay, biases and norms do not; and they learn at another rate."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0, "lr": 0.02}]


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


def train(model, optimizer, schedule=None):
    losses = []
    for x, y in batches():
        optimizer.zero_grad()
        losses.append(loss_of(model, x, y))
        losses[-1].backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return losses


# LAMB ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": None},
        {"max_grad_norm": 0.1, "betas": (0.8, 0.9), "eps": 1e-3},
        {"bias_correction": False},
        {"trust_clip": True},
        {"always_adapt": True},
        {"weight_decay": 0.3},
    ],
    ids=str,
)
def test_lamb_is_timms_step_for_step(options):
    ours, theirs = network(), network()
    a = Lamb(groups(ours), lr=0.05, **options)
    b = timm.optim.Lamb(groups(theirs), lr=0.05, **options)
    for x, y in batches(8):
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert all(s["step"] == 8 for s in a.state.values())


def test_lamb_moves_a_layer_by_its_own_norm_times_the_rate():
    for scale in (1e-3, 1.0, 1e3):
        w = nn.Parameter(scale * torch.ones(4, 4))
        w.grad = torch.randn(4, 4) * 100
        before = w.detach().clone()
        Lamb([w], lr=0.1, max_grad_norm=None).step()
        assert float((w.detach() - before).norm() / before.norm()) == pytest.approx(0.1, rel=1e-4)


def test_lamb_starts_from_zero_weights_and_passes_over_what_has_no_gradient():
    w, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    w.grad = torch.tensor([1.0, -2.0, 0.0])
    Lamb([w, other], lr=0.1).step()
    torch.testing.assert_close(w.detach(), torch.tensor([-0.1, 0.1, 0.0]), rtol=1e-4, atol=1e-6)
    assert torch.equal(other, torch.ones(3))
    still = nn.Parameter(torch.ones(3))
    still.grad = torch.zeros(3)
    Lamb([still], weight_decay=0.0, always_adapt=True).step()
    assert torch.equal(still, torch.ones(3))


def test_lamb_goes_on_from_its_state():
    ours, other = network(), network()
    optimizer = Lamb(groups(ours), lr=0.05)
    train(ours, optimizer)
    other.load_state_dict(ours.state_dict())
    resumed = Lamb(groups(other), lr=0.7)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(ours, optimizer)
    train(other, resumed)
    assert all(map(torch.equal, ours.parameters(), other.parameters()))


def test_lamb_takes_a_closure_and_a_tensor_for_its_rate():
    model, (x, y) = network(), next(batches(1))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    optimizer = Lamb(model.parameters(), lr=torch.tensor(0.05))
    losses = [float(optimizer.step(closure).detach()) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr must be at least 0.0, got -1.0"),
        ({"eps": float("nan")}, r"eps must be at least 0.0, got nan"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers from 0 to below 1, got \(0.9, 1.0\)"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm must be positive or None, got 0"),
    ],
)
def test_lamb_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Lamb([nn.Parameter(torch.ones(2))], **options)


def test_lamb_has_one_limit_for_all_gradients():
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="the same in every group"):
        Lamb([{"params": [w]}, {"params": [v], "max_grad_norm": 3.0}])


def test_lamb_refuses_sparse_gradients():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="must be dense"):
        Lamb(table.parameters()).step()


# Clipping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (4, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_adaptive_clipping_is_timms(shape, size):
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    ours.grad = size * torch.randn(shape)
    theirs = nn.Parameter(ours.detach().clone())
    theirs.grad = ours.grad.clone()
    clip_grad_adaptive_(ours, 0.02)
    timm.utils.agc.adaptive_clip_grad([theirs], 0.02)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_adaptive_clipping_of_each_unit_by_its_own_weights():
    w = nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]))
    w.grad = torch.tensor([[0.03, 0.0], [0.03, 0.0], [1.0, 0.0]])
    frozen = nn.Parameter(torch.ones(3))
    share = clip_grad_adaptive_([w, frozen], clip_factor=0.01)
    assert float(share) == pytest.approx(2 / 3)
    torch.testing.assert_close(w.grad[:, 0], torch.tensor([0.03, 0.005, 1e-5]))
    assert float(clip_grad_adaptive_([frozen])) == 0


@pytest.mark.parametrize("options", [{"clip_factor": 0.0}, {"eps": -1.0}])
def test_adaptive_clipping_refuses(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be positive"):
        clip_grad_adaptive_([nn.Parameter(torch.ones(2))], **options)


def test_clipping_by_norm_and_by_value_are_torchs():
    assert clip_grad_norm_ is nn.utils.clip_grad_norm_
    assert clip_grad_value_ is nn.utils.clip_grad_value_


# Stepping in the backward pass --------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda g: torch.optim.Adam(g, lr=0.01, amsgrad=True),
    "adamw": lambda g: torch.optim.AdamW(g, lr=0.01),
    "adamw-fused": lambda g: torch.optim.AdamW(g, lr=0.01, fused=True),
    "rmsprop": lambda g: torch.optim.RMSprop(g, lr=0.01, centered=True),
    "lamb": lambda g: Lamb(g, lr=0.01, max_grad_norm=None),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stepping_in_the_backward_pass_is_the_ordinary_step(name):
    ours, theirs = network(), network()
    a, b = OPTIMIZERS[name](groups(ours)), OPTIMIZERS[name](groups(theirs))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in (a, b)]
    expected = train(theirs, b, schedules[1])
    with StepInBackward(a):
        for (x, y), loss in zip(batches(), expected, strict=True):
            mine = loss_of(ours, x, y)
            assert torch.equal(mine, loss)
            mine.backward()
            assert all(p.grad is None for p in ours.parameters())
            schedules[0].step()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    one, other = a.state_dict(), b.state_dict()
    assert one["param_groups"] == other["param_groups"]
    for i, state in other["state"].items():
        assert all(torch.equal(one["state"][i][key], t) for key, t in state.items())
    train(ours, a)  # and goes on in the ordinary way
    train(theirs, b)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_a_state_that_is_loaded_in_between_is_the_one_that_is_used():
    ours, theirs = network(), network()
    a, b = OPTIMIZERS["adamw"](ours.parameters()), OPTIMIZERS["adamw"](theirs.parameters())
    with StepInBackward(a):
        for x, y in batches():
            loss_of(ours, x, y).backward()
            a.load_state_dict(copy.deepcopy(a.state_dict()))
    train(theirs, b)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_few_gradients_are_there_at_once():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(16)))
    most = 0

    def look(grad):
        nonlocal most
        most = max(most, sum(p.grad.nbytes for p in model.parameters() if p.grad is not None) + grad.nbytes)

    def largest():
        nonlocal most
        most = 0
        model(torch.randn(4, 64)).sum().backward()
        return most

    for p in model.parameters():
        p.register_hook(look)
    ordinary = largest()
    assert ordinary == sum(p.nbytes for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.zero_grad()
    with StepInBackward(optimizer):
        assert largest() < ordinary / 8


def test_a_parameter_used_twice_is_stepped_once_and_a_frozen_one_never():
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    with StepInBackward(torch.optim.SGD([w, v], lr=0.1)):
        (w * 3 + (w * v) * w).sum().backward()
    torch.testing.assert_close(w.detach(), torch.full((2,), 1 - 0.1 * 5))
    assert torch.equal(v, torch.ones(2))


def test_the_hooks_are_gone_afterwards():
    w = nn.Parameter(torch.ones(2))
    with StepInBackward(torch.optim.SGD([w], lr=0.1)):
        pass
    w.sum().backward()
    assert torch.equal(w, torch.ones(2))
    again = StepInBackward(torch.optim.SGD([w]))
    with pytest.raises(RuntimeError, match="must have no gradient at the start"), again:
        pass
    w.grad = None
    w.sum().backward()
    assert torch.equal(w, torch.ones(2))


def test_what_needs_all_gradients_is_refused():
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="max_grad_norm=None"):
        StepInBackward(Lamb([w]))
    with pytest.raises(ValueError, match="LBFGS"):
        StepInBackward(torch.optim.LBFGS([w]))
