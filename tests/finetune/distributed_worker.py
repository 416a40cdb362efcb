"""What the processes of test_distributed.py and test_sharded.py do.

`python distributed_worker.py launch SIZE FOLDER CHECK ...` imports once, forks SIZE processes that do the
checks in order, and leaves what each found in FOLDER/rankR.pt.
`torchrun ... distributed_worker.py train FOLDER KIND KILL` is a job of which a process kills itself at step KILL.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from bptools.finetune.checkpoint import random_state
from bptools.finetune.distributed import Parallel, job_time, leave, parallel_from_env
from bptools.finetune.phases import check_optimizer, parameter_groups
from bptools.finetune.sharded import ShardedStore
from bptools.optim import parameter_depths

LONE = Parallel()
WINDOW = (7, 3, 4)  # micro-batches of a step
STEPS, INTERVAL = 7, 3


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.norm(self.conv(x)))


class Net(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.norm = nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5)
        self.blocks = nn.ModuleList(Block(5) for _ in range(2))
        self.head = nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Layer(nn.Module):
    """A block that holds `inner`, with a norm before or after it."""

    def __init__(self, inner: nn.Module, first: bool = False):
        super().__init__()
        self.inner, self.norm, self.first = inner, nn.LayerNorm(4), first

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x)) if self.first else self.inner(self.norm(x))


class Tied(nn.Module):
    """A language model whose output layer has the weight of its embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = Layer(nn.Embedding(11, 4), first=True), Layer(nn.Linear(4, 11, bias=False))
        self.layers = nn.ModuleList(Layer(nn.Linear(4, 4)) for _ in range(2))
        self.head.inner.weight = self.embed.inner.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x).mean(1)


def window(step: int = 0, tokens: bool = False) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    batches = []
    for n in WINDOW:
        images = torch.randn(n, 1, 6, 6, generator=generator, dtype=torch.float64)
        words = torch.randint(0, 11, (n, 6), generator=generator)
        batches.append((words if tokens else images, torch.randint(0, 3, (n,), generator=generator)))
    return batches


def backward(
    module: nn.Module, batches: list[tuple[Tensor, Tensor]], parallel: Parallel = LONE, naive: bool = False
) -> None:
    """Accumulate the gradient of the window's mean loss, from the process's share; naively, of a mean of means."""
    total = sum(len(y) for _, y in batches)
    for number, (x, y) in enumerate(batches, 1):
        x, y = parallel.share(x), parallel.share(y)
        with parallel.accumulating(module, last=number == len(batches)):
            loss = nn.functional.cross_entropy(module(x), y)
            weight = 1 / len(batches) if naive else len(y) / total * parallel.size
            (loss * weight).backward()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference; infinite if the names differ."""
    if found.keys() != expected.keys():
        return float("inf")
    return max(float((full(found[k]) - expected[k]).abs().max()) for k in expected)


def freeze(model: nn.Module) -> None:
    """A phase in which one block is frozen in part, another wholly, and the stem trains."""
    for p in (*model.blocks[0].conv.parameters(), *model.blocks[1].parameters()):
        p.requires_grad_(False)


def gradient(parallel: Parallel) -> dict:
    """The gradient of a window, in a model of another seed on every process, beside that of one process."""
    reference = Net()
    backward(reference, window())
    expected, buffers = gradients(reference), dict(reference.named_buffers())
    found = {}
    for kind in ("ddp", "fsdp"):
        some = replace(parallel, kind=kind)
        model = Net(seed=parallel.rank)
        kept = list(model.parameters())
        module = some.wrap(model)
        found[f"{kind} keeps parameters"] = all(p is q for p, q in zip(kept, model.parameters(), strict=True))
        backward(module, window(), some)
        found[kind] = off(gradients(model), expected)
        found[f"{kind} buffers"] = off(dict(model.named_buffers()), buffers)
        model.zero_grad()
        with torch.no_grad():
            module(window()[0][0])
        parameters = list(model.parameters())
        backward(module, window(), some, naive=True)
        found[f"{kind} naive"] = off(gradients(model), expected)
        found[f"{kind} same after evaluation"] = all(
            p is q for p, q in zip(parameters, model.parameters(), strict=True)
        )
    return found


def unfreezing(parallel: Parallel) -> dict:
    """The gradient after a phase in which little was trainable."""
    reference = Net()
    freeze(reference)
    backward(reference, window())
    frozen = gradients(reference)
    reference.requires_grad_(True).zero_grad()
    backward(reference, window())
    expected = gradients(reference)
    found = {}
    for kind, again in (("ddp", True), ("ddp", False), ("fsdp", True)):
        some = replace(parallel, kind=kind)
        model = Net()
        freeze(model)
        module = some.wrap(model)
        backward(module, window(), some)
        key = kind if again else "ddp without wrapping again"
        found[f"{key} frozen"] = off(gradients(model), frozen)
        model.requires_grad_(True).zero_grad()
        if again:
            module = some.rewrap(module)
        backward(module, window(), some)
        found[key] = off(gradients(model), expected)
    model = Net().requires_grad_(False)
    found["nothing to train"] = replace(parallel, kind="ddp").wrap(model) is model
    return found


def tied(parallel: Parallel, folder: Path) -> dict:
    """A step of a model with tied weights, saved and loaded."""
    reference, model, other = Tied(), Tied(), Tied()
    backward(reference, window(tokens=True))
    module = parallel.wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    backward(module, window(tokens=True), parallel)
    found = {"off": off(gradients(model), gradients(reference))}
    optimizer.step()
    ShardedStore(folder, parallel).save(model, optimizer, {}, {})
    resumed = torch.optim.SGD(parallel.wrap(other).parameters(), lr=0.1, momentum=0.9)
    ShardedStore(folder, parallel).load(other, resumed, {})
    return found | {
        "tied": all(m.head.inner.weight is m.embed.inner.weight for m in (model, other)),
        "sharded": [name for name, m in model.named_modules() if isinstance(m, FSDPModule)],
        "saved": state(model, optimizer),
        "loaded": state(other, resumed),
    }


def early_optimizer(parallel: Parallel) -> dict:
    """What becomes of an optimizer that is made before wrapping."""
    found = {}
    for kind in ("ddp", "fsdp"):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        replace(parallel, kind=kind).wrap(model)
        try:
            check_optimizer(model, optimizer)
            found[kind] = ""
        except ValueError as error:
            found[kind] = str(error)
    return found


def collectives(parallel: Parallel) -> dict:
    rank = parallel.rank
    parallel.barrier()
    return {
        "sum": parallel.sum([rank + 0.5, 2**53, -rank]),
        "any": [parallel.any(rank == 1), parallel.any(False)],
        "broadcast": parallel.broadcast({"rank": rank}),
        "gather": parallel.gather(("a", rank)),
        "share": parallel.share(list(range(5))),
        "again": parallel_from_env("ddp") == parallel,
        "job_time": job_time(parallel),
    }


def lost_peer(parallel: Parallel) -> dict:
    """Comes last: the second process dies."""
    if parallel.rank == 1:
        os._exit(0)
    try:
        for _ in range(100):
            parallel.barrier()
    except ConnectionError as error:
        return {"error": str(error)}
    return {}


def prepared(parallel: Parallel, seed: int = 0) -> tuple[Net, nn.Module, torch.optim.Optimizer]:
    model = Net(seed)
    depths = parameter_depths(model, torch.zeros(1, 1, 6, 6, dtype=torch.float64))
    module = parallel.wrap(model)
    return model, module, torch.optim.AdamW(parameter_groups(model, depths, 0.01, 0.1))


def head_only(model: Net, on: bool) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not on or name.startswith("head"))
        parameter.grad = None


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, parallel: Parallel, numbers: range) -> None:
    for number in numbers:
        optimizer.zero_grad()
        backward(module, window(number), parallel)
        optimizer.step()


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """All that there is of model and optimizer, with full tensors."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        "model": {name: full(value) for name, value in model.state_dict().items()},
        "states": {
            f"{names[id(p)]}.{key}": full(value)
            for p, values in optimizer.state.items()
            for key, value in values.items()
        },
        "groups": [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ],
    }


def save(parallel: Parallel, folder: Path) -> dict:
    """Train the head for two steps; save as all of the model is about to be trained; go on for two."""
    model, module, optimizer = prepared(parallel)
    head_only(model, True)
    module = parallel.rewrap(module)
    steps(module, optimizer, parallel, range(2))
    head_only(model, False)
    module = parallel.rewrap(module)
    averages = {"stem": model.stem.weight.detach() * 2}
    before = state(model, optimizer)
    extra = {"step": 2, "curve": [1.5, (2, "x")], "mask": torch.arange(3), "random": random_state()}
    ShardedStore(folder, parallel).save(model, optimizer, averages, extra)
    drawn = torch.rand(3)
    steps(module, optimizer, parallel, range(2, 4))
    return {"saved": before, "averages": full(averages["stem"]), "drawn": drawn, "end": state(model, optimizer)}


def load(parallel: Parallel, folder: Path) -> dict:
    """Load into a model of another seed, with an optimizer that has made no step; go on for two steps."""
    model, module, optimizer = prepared(parallel, seed=9)
    averages = {"stem": torch.zeros_like(model.stem.weight)}
    extra = ShardedStore(folder, parallel).load(model, optimizer, averages)
    check_optimizer(model, optimizer)
    drawn = None
    if extra["random"]:
        torch.set_rng_state(extra["random"]["torch"])
        drawn = torch.rand(3)
    loaded = state(model, optimizer)
    steps(module, optimizer, parallel, range(2, 4))
    end, averages = state(model, optimizer), full(averages["stem"])
    return {"loaded": loaded, "averages": averages, "drawn": drawn, "end": end, "extra": extra}


def train(parallel: Parallel, folder: Path, kill: int = -1) -> dict:
    """A job that goes on from its newest checkpoint; at step `kill` of the first attempt, rank 1 kills itself."""
    model, module, optimizer = prepared(parallel)
    store = ShardedStore(folder, parallel)
    begun = (store.load(model, optimizer, {}) or {"step": 0})["step"]
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    for step in range(begun, STEPS):
        if parallel.main:
            with open(folder / "log.txt", "a") as log:
                print(attempt, step, job_time(), file=log)
        optimizer.zero_grad()
        backward(module, window(step), parallel)
        if attempt == 0 and step == kill and parallel.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        if (step + 1) % INTERVAL == 0:
            store.save(model, optimizer, {}, {"step": step + 1})
    return state(model, optimizer)


def check(parallel: Parallel, folder: Path, name: str) -> dict:
    kind, _, action = name.rpartition(":")
    some = replace(parallel, kind=kind or "ddp")
    if action in ("save", "load"):
        return globals()[action](some, folder / kind)
    if action == "load-lone":
        return load(some, folder / "lone")
    if action == "tied":
        return tied(some, folder / "tied")
    if action == "train":
        job = folder / f"{kind}-{action}"
        job.mkdir(exist_ok=True)
        return train(some, job)
    return globals()[action](some)


def child(rank: int, size: int, port: int, folder: Path, names: list[str]) -> int:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    try:
        parallel = parallel_from_env("ddp", "cpu")
        found = {name: check(parallel, folder, name) for name in names}
        torch.save(found, folder / f"rank{rank}.pt")
        return 0
    except BaseException:
        traceback.print_exc()
        return 1


def launch(size: int, folder: Path, names: list[str]) -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = child(rank, size, port, folder, names)
            sys.stderr.flush()
            os._exit(code)  # gloo's threads abort when Python shuts down
        children.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "launch":
        sys.exit(launch(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
    _, _, directory, kind, kill = sys.argv
    this = parallel_from_env(kind, "cpu")
    end = train(this, Path(directory), int(kill))
    if this.main:
        torch.save(end, Path(directory, "end.pt"))
    leave(0)
