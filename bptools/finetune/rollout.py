"""Policy gradients: episodes of a gymnasium environment, and the loss whose gradient raises their return.

Index legend: ``e`` episodes, ``n`` steps of all of them, ``d`` numbers in an observation, ``a`` actions.

A policy is a network that gives logits of the actions, ``pi(a|s) = softmax(f(s))_a``. What it is to raise is the
expected return ``J = E[R]``, ``R = sum_t gamma^t r_t``, over episodes ``tau`` of probability
``p(tau) = p(s_0) prod_t pi(a_t|s_t) p(s_t+1|s_t, a_t)``. The environment cannot be differentiated, and need not:

    grad J = sum_tau R grad p(tau) = E[R grad log p(tau)] = E[R sum_t grad log pi(a_t|s_t)]

by ``grad p = p grad log p``, where the environment's own terms drop out, as they don't depend on the weights. An
action changes nothing that lies before it, so the rewards before ``t`` contribute 0 on average and may go:
``G_t = sum_k>=t gamma^(k-t) r_k`` (the reward to go) takes the place of ``R``. (The factor ``gamma^t`` that is
left over is dropped, as is usual: early steps don't count for more than late ones.)

A baseline ``b(s)`` that does not depend on the action may be subtracted, for

    E_a[b(s) grad log pi(a|s)] = b(s) sum_a grad pi(a|s) = b(s) grad sum_a pi(a|s) = b(s) grad 1 = 0:

no bias. But the variance of a term, which is ``E[|grad log pi|^2 (G_t - b)^2]`` less the square of the mean, falls
with ``(G_t - b)^2``, so a good baseline is near the mean of ``G_t`` from ``s``: its value, which a second network
learns by regression. :func:`gradient_variance` measures what that is worth.

Backpropagation gets at all this through a surrogate whose gradient it is: the mean over steps of
``-(G_t - b(s_t)) log pi(a_t|s_t)``, in which the advantage ``G_t - b`` is a constant.

Sources: Williams, Machine Learning 8 (1992) (REINFORCE); Sutton et al., NeurIPS 1999; Greensmith et al., JMLR 5
(2004) (baselines).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .batches import LossFn
from .distributed import Parallel, whole_state
from .errors import InputError, one_line

Baseline = Literal["none", "mean", "learned"]
Batch = dict[str, Tensor]
LONE = Parallel()


class Agent(nn.Module):
    """A policy, and the value of a state if ``critic``: two networks of two hidden layers each.

    Args:
        observations: Numbers in an observation, ``d``.
        actions: Number of actions, ``a``.
        hidden: Width of the hidden layers.
        critic: Whether it has the second network.
        layers: Whose layers they are made of: ``bptools.nn`` or ``torch.nn``.
    """

    def __init__(self, observations: int, actions: int, hidden: int, critic: bool, layers: ModuleType):
        super().__init__()

        def network(outputs: int) -> nn.Module:
            sizes = (observations, hidden, hidden)
            parts = [part for a, b in pairwise(sizes) for part in (layers.Linear(a, b), layers.Tanh())]
            last = layers.Linear(hidden, outputs)
            nn.init.normal_(last.weight, std=0.01)  # all actions are as likely at first
            nn.init.zeros_(last.bias)
            return nn.Sequential(*parts, last)

        self.policy, self.critic = network(actions), network(1) if critic else None

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits ``(n, a)`` and values ``(n,)`` of observations ``(n, d)``."""
        values = self.critic(observations).squeeze(1) if self.critic else None
        return self.policy(observations), values


@dataclass(frozen=True)
class Episodes:
    """Episodes one after the other.

    Attributes:
        observations: ``(n, d)``, in float32.
        actions: ``(n,)``.
        rewards: ``(n,)``, in float64.
        lengths: Steps of each episode.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    lengths: tuple[int, ...]

    @property
    def returns(self) -> list[float]:
        """The sum of each episode's rewards, not discounted."""
        return [float(part.sum()) for part in self.rewards.split(self.lengths)]

    def to_go(self, discount: float) -> Tensor:
        """Return the discounted sum of the rewards from each step to its episode's end, ``(n,)``."""
        sums = self.rewards.clone()
        for part in sums.split(self.lengths):  # views
            for t in range(len(part) - 2, -1, -1):
                part[t] += discount * part[t + 1]
        return sums


class Arena:
    """Environments of one kind, in which a policy plays many episodes at once.

    An episode depends on the policy and its seed alone: on no generator, and not on which others are played
    beside it. So processes that share the seeds play what one would, and a continued run what it would have.

    Args:
        name: Of the environment in gymnasium, such as ``"CartPole-v1"``.
        limit: Most steps of an episode.

    Attributes:
        observations: Numbers in an observation.
        actions: Number of actions.
        goal: The mean return at which gymnasium takes it as solved, or ``None``.
        longest: Steps at which gymnasium ends an episode, in which that goal is meant; 0 if it does not.

    Raises:
        InputError: If there is no such environment, something it needs is not installed, its actions are not
            discrete, or its observations are not vectors.
    """

    def __init__(self, name: str, limit: int):
        import gymnasium  # takes a while

        self.name, self.limit = name, limit
        self._make = lambda: gymnasium.make(name, disable_env_checker=True)
        try:
            self._environments = [self._make()]
        except (gymnasium.error.Error, ImportError, ValueError) as error:
            raise InputError(f"--env {name}: {one_line(error)}") from error
        first = self._environments[0]
        space, seen = first.action_space, first.observation_space
        if not isinstance(space, gymnasium.spaces.Discrete):
            raise InputError(f"--env {name}: expected discrete actions, got {space}")
        if not isinstance(seen, gymnasium.spaces.Box) or len(seen.shape) != 1:
            raise InputError(f"--env {name}: expected observations that are vectors, got {seen}")
        self.observations, self.actions, self._start = seen.shape[0], int(space.n), int(space.start)
        self.goal, self.longest = first.spec.reward_threshold, first.spec.max_episode_steps or 0

    @torch.no_grad()
    def play(self, policy: Callable[[Tensor], Tensor], seeds: Sequence[int], greedy: bool = False) -> Episodes:
        """Play an episode for each of ``seeds``.

        Args:
            policy: Maps observations ``(e, d)``, in float64, to logits ``(e, a)``.
            seeds: One or more, each draws the environment's random numbers and the actions.
            greedy: Take the likeliest actions, instead of drawing them.
        """
        while len(self._environments) < len(seeds):
            self._environments.append(self._make())
        drawn = np.stack([np.random.default_rng(seed).random(self.limit) for seed in seeds])  # (e, limit)
        seen = [env.reset(seed=seed)[0] for env, seed in zip(self._environments, seeds, strict=False)]
        steps: list[list[tuple]] = [[] for _ in seeds]
        going = list(range(len(seeds)))
        for t in range(self.limit):
            now = torch.from_numpy(np.stack([seen[e] for e in going])).double()
            logits = policy(now)
            if greedy:
                chosen = logits.argmax(1).tolist()
            else:
                below = logits.softmax(1).cumsum(1)[:, :-1] < torch.from_numpy(drawn[going, t, None])
                chosen = below.sum(1).tolist()
            still = []
            for e, action in zip(going, chosen, strict=True):
                after, reward, terminated, truncated, _ = self._environments[e].step(action + self._start)
                steps[e].append((seen[e], action, float(reward)))
                seen[e] = after
                if not (terminated or truncated):
                    still.append(e)
            going = still
            if not going:
                break
        observations, actions, rewards = zip(*(step for episode in steps for step in episode), strict=True)
        return Episodes(
            torch.from_numpy(np.stack(observations)).float(),
            torch.tensor(actions),
            torch.tensor(rewards, dtype=torch.float64),
            tuple(map(len, steps)),
        )


class Seeds(Dataset):
    """``size`` seeds of episodes, drawn from torch's generator: within :class:`Augmented` by run, epoch, index."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return int(torch.randint(2**31, ()))


def in_double(agent: Agent, blank: Agent) -> Agent:
    """Return ``blank`` with the weights of ``agent`` in float64, on the CPU.

    In float64 the size of a batch does not decide which action is drawn, as it would now and then in float32.
    """
    blank = blank.double()
    blank.load_state_dict({name: value.cpu().double() for name, value in whole_state(agent).items()})
    return blank


def subtract_baseline(to_go: Tensor, kind: Baseline, values: Tensor | None, parallel: Parallel = LONE) -> Tensor:
    """Return the advantages ``(n,)``: the reward to go less the baseline, divided by their root mean square.

    Args:
        to_go: The reward to go, ``(n,)``, in float64.
        kind: ``"none"`` subtracts nothing, ``"mean"`` the mean over all steps, ``"learned"`` ``values``, and what
            these are wrong by on average.
        values: What a network expects, ``(n,)``.
        parallel: Processes whose steps are taken together.
    """
    rest = to_go - values if kind == "learned" else to_go
    total, squares, count = parallel.sum([float(rest.sum()), float(rest.square().sum()), len(rest)])
    mean = 0.0 if kind == "none" else total / count
    scale = max(squares / count - (0.0 if kind == "none" else mean**2), 0.0) ** 0.5
    return (rest - mean) / (scale + 1e-8)


def policy_loss(entropy_weight: float) -> LossFn:
    """Return the loss of a batch of steps, as a mean over them.

    It is the surrogate of the policy's gradient, less ``entropy_weight`` times the entropy of the policy, which
    keeps it from settling too early; and, for an agent with a critic, half the squared error of its values.

    Args:
        entropy_weight: 0 or more.
    """

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        logits, values = module(batch["observations"])
        log_policy = logits.float().log_softmax(1)  # (n, a)
        taken = log_policy.gather(1, batch["actions"][:, None]).squeeze(1)
        entropy = -(log_policy.exp() * log_policy).sum(1)
        total = -(batch["advantages"] * taken + entropy_weight * entropy).mean()
        if values is not None:
            total = total + 0.5 * (values.float() - batch["targets"]).square().mean()
        return total

    return loss


def gradient_variance(
    policy: nn.Module, episodes: Episodes, baselines: dict[str, Tensor], discount: float
) -> dict[str, float]:
    """Return the variance of an episode's policy gradient, summed over the weights, for each of ``baselines``.

    The gradient of an episode is the sum over its steps of ``(G_t - b) grad log pi``: not normalised, so that only
    the baseline differs.

    Args:
        policy: Maps observations to logits.
        episodes: Two or more, drawn by this policy.
        baselines: What is subtracted from each step's reward to go, ``(n,)`` or a scalar, by name.
        discount: Of rewards.
    """
    weights = list(policy.parameters())
    to_go, dtype = episodes.to_go(discount), weights[0].dtype
    pieces = [episodes.observations.to(dtype), episodes.actions, *(to_go - b for b in baselines.values())]
    found: list[list[Tensor]] = [[] for _ in baselines]
    for observations, actions, *advantages in zip(*(p.split(episodes.lengths) for p in pieces), strict=True):
        taken = policy(observations).log_softmax(1).gather(1, actions[:, None]).squeeze(1)
        for some, advantage in zip(found, advantages, strict=True):
            grads = torch.autograd.grad(taken @ advantage.to(dtype), weights, retain_graph=True)
            some.append(torch.cat([g.flatten() for g in grads]))
    return {name: float(torch.stack(some).var(0).sum()) for name, some in zip(baselines, found, strict=True)}
