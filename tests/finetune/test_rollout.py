import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import bptools.nn
from bptools.finetune import Augmented, InputError, rollout

TWO_STEPS = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)  # rewards of an action in either state


class TwoSteps(gymnasium.Env):
    """Two steps, told apart by what is seen; returns can be computed by hand. Actions are 1 and 2."""

    action_space = spaces.Discrete(2, start=1)
    observation_space = spaces.Box(0, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def observe(self):
        return np.eye(2, dtype=np.float32)[min(self.t, 1)]

    def step(self, action):
        reward = float(TWO_STEPS[self.t, action - 1]) + 10.0
        self.t += 1
        return self.observe(), reward, self.t == 2, False, {}


@pytest.fixture(scope="module", autouse=True)
def two_steps():
    gymnasium.register("TwoSteps-v0", TwoSteps, reward_threshold=24)
    yield
    gymnasium.registry.pop("TwoSteps-v0")


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return torch.nn.Linear(2, 2, bias=False).double()


def expected_gradient(policy, baseline):
    """The gradient of the mean reward to go at each step, by enumeration; and the variance of an episode's."""
    log_policy = policy(torch.eye(2, dtype=torch.float64)).log_softmax(1)
    mean, second = 0.0, 0.0
    for a in range(2):
        for b in range(2):
            rewards = TWO_STEPS[0, a] + 10, TWO_STEPS[1, b] + 10
            to_go = rewards[0] + rewards[1], rewards[1]
            value = (to_go[0] - baseline[0]) * log_policy[0, a] + (to_go[1] - baseline[1]) * log_policy[1, b]
            (grad,) = torch.autograd.grad(value, policy.weight, retain_graph=True)
            p = float((log_policy[0, a] + log_policy[1, b]).detach().exp())
            mean, second = mean + p * grad, second + p * grad.square().sum()
    return mean, float(second - mean.square().sum())


def test_the_score_function_is_the_gradient_of_the_return_with_any_baseline(policy):
    shares = policy(torch.eye(2, dtype=torch.float64)).softmax(1)
    (true,) = torch.autograd.grad((shares * TWO_STEPS).sum(), policy.weight, retain_graph=True)
    for baseline in ((0.0, 0.0), (7.0, 7.0), (22.0, 10.5)):
        assert torch.allclose(expected_gradient(policy, baseline)[0], true)


def test_variance_of_the_gradient_is_that_of_all_episodes_and_falls_with_a_good_baseline(policy):
    arena = rollout.Arena("TwoSteps-v0", 9)
    played = arena.play(policy, range(500))
    value = 10 + (policy(torch.eye(2, dtype=torch.float64)).softmax(1) * TWO_STEPS).sum(1).detach()
    value[0] += value[1]
    baselines = {"none": (0.0, 0.0), "mean": (16.0, 16.0), "learned": tuple(value.tolist())}
    at = {name: torch.tensor(b)[played.observations.argmax(1)] for name, b in baselines.items()}
    measured = rollout.gradient_variance(policy, played, at, 1.0)
    for name, baseline in baselines.items():
        assert measured[name] == pytest.approx(expected_gradient(policy, baseline)[1], rel=0.2)
    assert measured["none"] > 5 * measured["mean"] > 10 * measured["learned"]


def test_actions_are_drawn_as_likely_as_the_policy_says(policy):
    played = rollout.Arena("TwoSteps-v0", 9).play(policy, range(1000))
    assert played.lengths == (2,) * 1000
    share = policy(torch.eye(2, dtype=torch.float64)).softmax(1)[:, 1].detach()
    drawn = played.actions.view(-1, 2).double().mean(0)
    assert torch.allclose(drawn, share, atol=0.06)
    greedy = rollout.Arena("TwoSteps-v0", 9).play(policy, [0, 1], greedy=True)
    assert greedy.actions.tolist() == (share > 0.5).long().tolist() * 2
    assert set(played.returns) == {20.0, 21.0, 23.0, 24.0}


def test_an_episode_is_the_same_alone_and_among_others_and_ends_at_the_limit():
    arena = rollout.Arena("CartPole-v1", 15)
    torch.manual_seed(0)
    agent = rollout.in_double(*(rollout.Agent(4, 2, 8, True, bptools.nn) for _ in range(2)))
    together = arena.play(agent.policy, [5, 6, 7])
    alone = arena.play(agent.policy, [6])
    start = together.lengths[0]
    part = slice(start, start + together.lengths[1])
    assert torch.equal(together.observations[part], alone.observations)
    assert torch.equal(together.actions[part], alone.actions)
    assert max(together.lengths) <= 15
    assert not torch.equal(together.observations[0], alone.observations[0])
    assert together.returns == list(map(float, together.lengths))


def test_reward_to_go():
    episodes = rollout.Episodes(
        torch.zeros(5, 1), torch.zeros(5), torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), (3, 2)
    )
    assert episodes.to_go(0.5).tolist() == [3.0, 4.0, 4.0, 16.0, 16.0]
    assert episodes.rewards.tolist() == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert episodes.returns == [7.0, 24.0]


@pytest.mark.parametrize(
    ("kind", "wanted"), [("none", [1.0, 2.0, 6.0]), ("mean", [-2.0, -1.0, 3.0]), ("learned", [0.0, -3.0, 3.0])]
)
def test_baselines(kind, wanted):
    to_go = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    values = torch.tensor([2.0, 6.0, 4.0], dtype=torch.float64)
    advantages = rollout.subtract_baseline(to_go, kind, values)
    wanted = torch.tensor(wanted, dtype=torch.float64)
    assert torch.allclose(advantages, wanted / wanted.square().mean().sqrt())


def test_a_constant_return_gives_no_advantage():
    assert rollout.subtract_baseline(torch.full((4,), 0.1, dtype=torch.float64), "mean", None).abs().max() < 1e-6


def test_the_loss_has_the_gradient_of_its_parts():
    torch.manual_seed(0)
    agent = rollout.Agent(3, 2, 4, True, bptools.nn)
    seen, actions = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    advantages, targets = torch.randn(5), torch.randn(5)
    batch = {"observations": seen, "actions": actions, "advantages": advantages, "targets": targets}
    loss = rollout.policy_loss(0.1)(agent, batch)
    logits, values = agent(seen)
    chosen = torch.distributions.Categorical(logits=logits)
    by_hand = -(advantages * chosen.log_prob(actions)).mean() - 0.1 * chosen.entropy().mean()
    by_hand = by_hand + torch.nn.functional.mse_loss(values, targets) / 2
    assert torch.allclose(loss, by_hand)
    for a, b in zip(*(torch.autograd.grad(x, list(agent.parameters())) for x in (loss, by_hand)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_an_agent_begins_undecided_and_without_a_critic_has_no_values():
    logits, values = rollout.Agent(4, 3, 8, False, torch.nn)(torch.randn(6, 4))
    assert logits.shape == (6, 3)
    assert values is None
    assert (logits.softmax(1) - 1 / 3).abs().max() < 0.05


def test_seeds_depend_on_the_run_and_the_epoch():
    drawn = [[Augmented(rollout.Seeds(3), seed)[i] for i in range(3)] for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert len(set(drawn[0] + drawn[1])) == 6


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("CartPoleX-v1", "--env CartPoleX-v1: Environment `CartPoleX` doesn't exist"),
        ("Pendulum-v1", "expected discrete actions, got Box"),
        ("FrozenLake-v1", "expected observations that are vectors, got Discrete(16)"),
        ("no such", "--env no such: "),
    ],
)
def test_environments_that_do_not_fit_are_refused(name, words):
    with pytest.raises(InputError) as error:
        rollout.Arena(name, 10)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_an_environment_is_like():
    arena = rollout.Arena("CartPole-v1", 500)
    assert (arena.observations, arena.actions, arena.goal, arena.longest) == (4, 2, 475, 500)
    assert math.isclose(rollout.Arena("Acrobot-v1", 500).goal, -100)
