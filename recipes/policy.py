"""Policy gradients: backpropagation where the loss cannot be differentiated, on gymnasium's CartPole.

A policy plays episodes, and each action becomes likelier by how much better it went from there than expected: by
nothing ("none"), by the average step ("mean"), or by a second network ("learned"). bptools/finetune/rollout.py
derives it: the score function, and why a baseline takes away variance and adds no bias. Here that is measured:
the card shows the episodes that each needs to the goal, and the gradient's variance with each baseline.

    uv run recipes/policy.py                                    the demonstration: CartPole-v1, three baselines
    uv run recipes/policy.py --strategy learned --env Acrobot-v1 --goal -100
    uv run recipes/policy.py --strategy learned --env LunarLander-v3 --limit 1000 --epochs 200
    uv run recipes/policy.py --resume runs/policy/TIME          after Ctrl-C, a crash or kill -9
    uv run recipes/policy.py --verify                           prove these settings, and your edits, in seconds
    uv run torchrun --nproc-per-node 2 recipes/policy.py        processes share the episodes; the same gradient

Any environment serves that has discrete actions and vectors as observations. The networks are of bptools.nn.
An epoch is some updates; a batch is what the policy of the moment plays, as the loader asks for it. Each episode
depends on the weights and on a seed of its own, drawn by run, epoch and index, so a resumed run plays the same.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import bptools.nn
from bptools import finetune as ft
from bptools.finetune import rollout
from bptools.finetune.card import COLOURS, paired_difference

BASELINES = get_args(rollout.Baseline)
VALIDATION, TEST, MEASURED = 10**9, 2 * 10**9, 3 * 10**9  # first seeds of episodes that nothing learns from


@dataclass(frozen=True)
class Config(ft.Settings):
    """Settings of a job; the defaults are the demonstration's."""

    env: str = "CartPole-v1"
    """Name of the environment in gymnasium."""
    strategy: Annotated[tuple[rollout.Baseline, ...], tyro.conf.arg(metavar="NAME ...")] = BASELINES
    """Runs, by baseline: none, mean (of the batch), learned (by a second network)."""
    epochs: int = 40
    """Most epochs of a run; it ends earlier at the goal."""
    updates: int = 2
    """Batches in an epoch."""
    batch_size: int = 16
    """Episodes per batch, of all processes together; advantages are normalised over these."""
    goal: float | None = None
    """Mean return in validation that ends a run; None: what gymnasium takes as solved, if it says so."""
    limit: int = 500
    """Most steps of an episode."""
    discount: float = 0.99
    """Factor on a reward for each step that it lies ahead."""
    entropy: float = 0.01
    """Weight of the policy's entropy in the loss."""
    hidden: int = 64
    """Width of the two hidden layers of each network."""
    episodes: int = 100
    """Episodes of the test, and of each validation; played by the likeliest actions."""
    lr: float = 1e-2
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine", "one-cycle"] = "constant"
    amp: Literal["auto", "bf16", "fp16", "off"] = "off"


METRIC = ft.Metric("return", "return", "", top=None)
EPISODES = ft.Metric("episodes", "episodes of training", "", digits=0, higher=False, top=None)
LIMITS = {"discount": (0, 1), "entropy": (0, 100), "workers": (0, 0), "batch_size": (2, math.inf)}


def resolve(cfg: Config) -> Config:
    """Refuse what cannot be, before any file is written, and find the goal."""
    ft.check_settings(cfg, LIMITS)
    ft.expect_positive(cfg, "updates limit hidden episodes")
    if cfg.lr_find:
        raise ft.InputError("--lr-find: the loss of a policy gradient does not say how good the policy is")
    arena = rollout.Arena(cfg.env, cfg.limit)
    if cfg.goal is None and arena.goal is not None and cfg.limit < arena.longest:
        goal = f"gymnasium's goal for {cfg.env}, {arena.goal:g}, is of episodes of up to {arena.longest} steps"
        raise ft.InputError(f"--limit {cfg.limit}: {goal}; name one for shorter episodes with --goal")
    return replace(cfg, goal=arena.goal if cfg.goal is None else cfg.goal)


def train(cfg: Config, parallel: ft.Parallel, name: str, seed: int, folder: Path, **options: Any) -> dict:
    """Do one run, from where it was interrupted if it was, and return what it came to.

    ``options`` are those of :class:`bptools.finetune.Run` which say when to stop and who looks on.
    """
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    arena = rollout.Arena(cfg.env, cfg.limit)

    own = range(seed * cfg.episodes, (seed + 1) * cfg.episodes)

    def score(first: int) -> dict[str, float]:
        """Play greedily, the processes sharing the episodes; return mean return and length."""
        seeds = [first + i for i in parallel.share(own, "--episodes")]
        played = arena.play(player().policy, seeds, greedy=True)
        sums = parallel.sum([sum(played.returns), sum(played.lengths)])
        return dict(zip(("return", "length"), (total / cfg.episodes for total in sums), strict=True))

    if name == "random":
        played = arena.play(lambda seen: torch.zeros(len(seen), arena.actions), [TEST + i for i in own])
        return ft.not_trained(folder, "not trained", **{"return": float(np.mean(played.returns))})

    shape = arena.observations, arena.actions, cfg.hidden, name == "learned"
    agent = rollout.Agent(*shape, bptools.nn).to(parallel.device)
    player = partial(rollout.in_double, agent, rollout.Agent(*shape, torch.nn))  # plays, and learns nothing
    scale = sum(cfg.discount**t for t in range(cfg.limit))  # the critic's unit, so that its outputs are near 1

    def collate(seeds: list[int]) -> rollout.Batch:
        """Play an episode for each seed with the policy of now, and say how good each step was."""
        now = player()
        played = arena.play(now.policy, seeds)
        to_go = played.to_go(cfg.discount)
        values = scale * now(played.observations.double())[1].detach() if name == "learned" else None
        advantages = rollout.subtract_baseline(to_go, name, values, parallel)
        return {
            "observations": played.observations, "actions": played.actions, "advantages": advantages.float(),
            "targets": (to_go / scale).float(),
        }  # fmt: skip

    def variances(epoch: int) -> dict[str, float]:
        """Return the variance of the gradient of now, with each baseline."""
        first = MEASURED + (seed * cfg.epochs + epoch) * cfg.batch_size
        now, seeds = player(), range(first, first + cfg.batch_size)
        played = arena.play(now.policy, seeds)
        values = scale * now(played.observations.double())[1].detach()
        baselines = {"none": torch.zeros(()), "mean": played.to_go(cfg.discount).mean(), "learned": values}
        return rollout.gradient_variance(now.policy, played, baselines, cfg.discount)

    depths = ft.parameter_depths(agent, torch.zeros(1, arena.observations, device=parallel.device))
    stepper = ft.make_stepper(cfg, agent, rollout.policy_loss(cfg.entropy), depths, parallel)
    data = ft.Augmented(rollout.Seeds(cfg.updates * cfg.batch_size))
    phases = [ft.Phase(("all",), cfg.epochs)]
    kept = {"collate": collate, "keep": {"env": cfg.env}, "unit": "steps", "items": 0}
    run = ft.make_run(cfg, folder, stepper, phases, data, seed, **kept, **options)

    def solved() -> bool:
        return bool(run.history) and cfg.goal is not None and run.history[-1]["return"] >= cfg.goal

    for _ in run.phases():
        for epoch in run.epochs():
            if solved():
                break
            for window in run.windows():
                run.step(window)
            with run.averaged():
                val = score(VALIDATION)
                more = {f"variance {k}": v for k, v in variances(epoch).items()} if name == "learned" else {}
                run.validate(-val["return"], **val, **more)
    run.load_best()
    result = score(TEST)
    one = draw_episode(arena.play(player().policy, [TEST], greedy=True))
    run.monitor.finish(asdict(cfg) | {"strategy": name, "seed": seed}, result, {"an episode": one})
    spent = {"episodes": len(run.history) * len(data), "steps": run.monitor.seen, "solved": solved()}
    reached = {"reason": f"goal reached in epoch {len(run.history)}"} if solved() else {}
    return run.finish(result | spent | reached)


def draw_episode(episode: rollout.Episodes) -> Figure:
    """Return a figure of what a policy saw and did in an episode, for TensorBoard."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot(episode.observations.numpy(), lw=1, label=range(episode.observations.shape[1]))
    above.set(ylabel="observation", title=f"An episode of return {episode.returns[0]:g}")
    above.legend(frameon=False, fontsize=8)
    below.plot(episode.actions.numpy(), ".", ms=2)
    below.set(xlabel="step", ylabel="action")
    return figure


def draw_variances(axes: Axes, results: Sequence[dict]) -> None:
    """Draw what part of the gradient's variance each baseline leaves, by epoch: seeds (dots) and their mean."""
    axes.axhline(1, color=COLOURS[1], lw=2, label="none")  # the colours of the other panels
    for name, colour in zip(BASELINES[1:], COLOURS[2:], strict=False):
        shares = [left(result, name) for result in results]
        for some in shares:
            axes.plot(range(1, len(some) + 1), some, "o", ms=4, alpha=0.4, color=colour)
        epochs = range(max(map(len, shares)))
        means = [np.exp(np.mean([np.log(some[i]) for some in shares if i < len(some)])) for i in epochs]
        axes.plot([i + 1 for i in epochs], means, lw=2, color=colour, label=name)
    axes.set(xlabel="epoch", ylabel="variance, relative to none", yscale="log")
    axes.set_title("Variance of the gradient by baseline,\nsame policy, same episodes")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def left(result: dict, name: str) -> list[float]:
    """Return the part of the gradient's variance that baseline ``name`` left in each epoch of a learned run."""
    return [epoch[f"variance {name}"] / epoch["variance none"] for epoch in result["history"]]


def card(cfg: Config, folder: Path, runs: dict[str, list]) -> None:
    """Print what all runs came to."""
    solved = ", ".join(f"{name} {sum(r['solved'] for r in runs[name])}" for name in cfg.strategy)
    notes = [
        f"goal: {cfg.goal}, the mean return of {cfg.episodes} episodes of likeliest actions; the test is as many "
        f"others. Reached, of {cfg.seeds} seeds: {solved}.",
    ]
    for other in ("none", "mean"):
        if {"learned", other} <= set(cfg.strategy):
            counts = [[result["episodes"] for result in runs[name]] for name in ("learned", other)]
            notes.append(paired_difference("learned", counts[0], other, counts[1], EPISODES))
    panel = None
    if measured := runs.get("learned"):
        panel = partial(draw_variances, results=measured)
        shares = {name: np.concatenate([left(result, name) for result in measured]) for name in BASELINES[1:]}
        parts = ", ".join(f"{name} {np.exp(np.log(some).mean()):.2f}" for name, some in shares.items())
        notes.append(f"Variance of an episode's gradient along the learned runs, if it is 1 without: {parts}.")
    columns = {"episodes": ("episodes", 0), "steps": ("steps", 0)}
    ft.print_card(
        RECIPE.console, folder, cfg.env, runs, notes=notes, metric=METRIC, columns=columns, unit="episodes",
        pairs=[("learned", "none"), ("learned", "mean"), ("mean", "none")], panel=panel,
    )  # fmt: skip


RECIPE = ft.Recipe(
    __file__, __doc__, Config(), resolve, train, card, also=lambda cfg: ("random",), metric=METRIC
)  # fmt: skip


def main(args: Sequence[str] | None = None) -> int:
    """Read the command line and do the job; return the exit status."""
    return RECIPE.main(args)


if __name__ == "__main__":
    sys.exit(main())
