"""What the two processes of test_traps.py do: `python traps_worker.py FOLDER CHECK ...`."""

from __future__ import annotations

import sys
from pathlib import Path

import distributed_worker
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bptools.finetune.batches import count_tokens, supervised
from bptools.finetune.distributed import Parallel
from bptools.finetune.phases import Phase, check_optimizer, parameter_groups, set_trainable
from bptools.finetune.stepper import Stepper

TOKENS = (30, 2)  # of each process
LOSS = supervised(nn.CrossEntropyLoss())


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def share(rank: int, number: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * number + rank)
    inputs = torch.randn(TOKENS[rank], 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (TOKENS[rank],), generator=generator)


def whole(number: int = 0) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(share(0, number), share(1, number), strict=True)
    return inputs, targets


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def averaging(parallel: Parallel) -> dict[str, float]:
    """The relative errors of a gradient of 30 tokens on one process and 2 on the other."""
    (a, b), (s, t) = whole()
    reference = net()
    nn.functional.cross_entropy(reference(torch.cat([a, b])), torch.cat([s, t])).backward()
    right = gradient(reference)

    def off(model: nn.Module) -> float:
        return float((gradient(model) - right).norm() / right.norm())

    inputs, targets = share(parallel.rank)
    found = {}
    for name, reduction, divisor in (("mean of means", "mean", 1), ("sum over the total", "sum", sum(TOKENS))):
        model = DistributedDataParallel(net())
        (nn.functional.cross_entropy(model(inputs), targets, reduction=reduction) / divisor).backward()
        found[name] = off(model)
    model = net()
    module = parallel.wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    counting = count_tokens(shift=False)
    result = Stepper(model, optimizer, LOSS, count=counting, parallel=parallel, module=module).step(
        [(inputs, targets)]
    )
    return found | {"ours": off(model), "samples": result.samples}


def unfreezing(parallel: Parallel) -> dict[str, float | str]:
    """How far two processes' weights are from a lone one's, after the first layer has been unfrozen."""

    def train(kind: str) -> nn.Module:
        model = net()
        set_trainable(model, Phase(("2",), 1))
        alone = kind == "alone"
        module = model if alone else DistributedDataParallel(model) if kind == "naive" else parallel.wrap(model)
        depths = dict.fromkeys(dict(model.named_parameters()), 0)
        optimizer = torch.optim.AdamW(parameter_groups(model, depths, 0.1, 0.0))
        options = {} if alone else {"parallel": parallel, "module": module}
        stepper = Stepper(model, optimizer, LOSS, **options)
        for number in range(4):
            if number == 2:
                set_trainable(model, Phase(("all",), 1))
                check_optimizer(model, optimizer)
                if kind == "ours":
                    stepper.rewrap()
            (a, b), (s, t) = whole(number)
            stepper.step([(torch.cat([a, b]), torch.cat([s, t])) if alone else share(parallel.rank, number)])
        return model

    def frozen_late() -> str:
        module = DistributedDataParallel(net())
        module.module[0].requires_grad_(False)
        try:
            for _ in range(2):
                LOSS(module, share(parallel.rank)).backward()
        except RuntimeError as error:
            return str(error)
        return ""

    reference = train("alone")
    found = {}
    for kind in ("naive", "ours"):
        model = train(kind)
        apart = [(p - q).abs().max() for p, q in zip(model.parameters(), reference.parameters(), strict=True)]
        first = parallel.gather(model[0].weight.detach().tolist())
        found[kind] = float(torch.stack(apart).max().detach())
        found[f"{kind}, processes"] = float((torch.tensor(first[0]) - torch.tensor(first[1])).abs().max())
    return found | {"frozen after wrapping": frozen_late()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed_worker.check = lambda parallel, folder, name: globals()[name](parallel)
    sys.exit(distributed_worker.launch(2, Path(sys.argv[1]), sys.argv[2:]))
