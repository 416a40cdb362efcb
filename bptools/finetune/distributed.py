"""The same training by several processes: data parallel (DDP) or sharded (FSDP2), started by torchrun.

Every process builds the same model from the same seed, reads the same list of batches, and takes its share of
each, so that all together compute what one would. Both ways average gradients over the processes: a loss that is a
share of the whole window's has to be multiplied by the number of processes. Batch norms exchange statistics.

The order matters. Freeze before wrapping, and wrap anew after unfreezing: DDP exchanges what was trainable when it
was made, and lets the rest drift apart on every process in silence. Wrap before making the optimizer: FSDP puts
new parameters, which are DTensors, in the place of the old ones. (DDP keeps them.)

Sources: Li et al., arXiv 2006.15704 (DDP); Zhao et al., arXiv 2304.11277 (FSDP).
"""

import atexit
import copy
import datetime
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

import bptools.nn
from bptools.optim._layerwise import find_blocks

from .errors import InputError, one_line

T = TypeVar("T")
KINDS = ("auto", "none", "ddp", "fsdp")
PATIENCE = datetime.timedelta(minutes=10)  # how long a process waits for the others before it gives up
BATCH_NORMS = {getattr(module, f"BatchNorm{d}d") for module in (nn, bptools.nn) for d in (1, 2, 3)}
BLANKS: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()  # sharded models as they were
LOST = re.compile(r"gloo/|nccl|connection (closed|reset|refused)|by peer|timed out waiting", re.IGNORECASE)


@contextmanager
def peer_errors() -> Iterator[None]:
    """Turn what the process group raises where another process is gone or late into one line."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or LOST.search(str(error))):
            raise
        reason = re.sub(r"^\[\S*\] ", "", one_line(error)).split(". ")[0]  # without the line of gloo's source
        raise ConnectionError(
            f"process {os.environ.get('RANK')}: another process is gone, or did not answer within "
            f"{PATIENCE.total_seconds() / 60:.0f} minutes: {reason}"
        ) from error


class _DataParallel(DistributedDataParallel):
    """DDP that takes ``bptools.nn.SyncBatchNorm`` on a CPU too, where torch's own does not run."""

    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        pass


def _synchronise_norms(model: nn.Module) -> None:
    """Exchange the batch norms of ``model`` for synchronised ones, with the same parameters and buffers."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) in BATCH_NORMS:
            model.set_submodule(name, bptools.nn.SyncBatchNorm.convert_sync_batchnorm(module))
        elif isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            logging.getLogger("bptools.finetune").warning(
                "%s is a %s: it normalises with the statistics of each process's own share of a batch",
                name,
                type(module).__name__,
            )


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a model; a sharded one is put together on the CPU of every process."""
    state = model.state_dict()
    return {k: v.full_tensor().cpu() if isinstance(v, DTensor) else v for k, v in state.items()}


def _with_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of ``model`` with ``values`` as its parameters; its own are not copied, and ties are kept."""
    own = model.named_parameters()
    return copy.deepcopy(model, {id(p): nn.Parameter(values[name], p.requires_grad) for name, p in own})


def _units(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of ``model`` that are sharded by themselves.

    Lone layers, and blocks that share a parameter with others (tied embeddings), are left to the whole, so that
    their parameters are there wherever they are used in its forward.
    """
    everywhere = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))

    def alone(block: nn.Module) -> bool:
        inside = Counter(id(p) for _, p in block.named_parameters(remove_duplicate=False))
        return all(everywhere[key] == count for key, count in inside.items())

    return [block for block in find_blocks(model).values() if any(block.children()) and alone(block)]


@dataclass(frozen=True)
class Parallel:
    """One process among those that train together; ``Parallel()`` is a lone one.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        local_rank: Number of this process on its machine.
        kind: ``"none"``, ``"ddp"`` (each process has the whole model) or ``"fsdp"`` (each has a share of it).
        device: Where this process computes: ``"cpu"`` or, such as, ``"cuda:1"``.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    kind: Literal["none", "ddp", "fsdp"] = "none"
    device: str = "cpu"

    @property
    def main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return what is called in place of ``model``; all processes begin with the weights of the first.

        Batch norms of ``model`` become synchronised ones; DDP keeps the parameters, and FSDP replaces them in
        ``model`` itself. So make the optimizer afterwards, and take state dicts from ``model``.

        Args:
            model: The model, on ``device``, with ``requires_grad`` as in the first phase.

        Returns:
            The model itself for ``"none"`` and ``"fsdp"``; also for ``"ddp"`` if nothing in it is trainable.
        """
        if self.kind == "none":
            return model
        if self.kind == "fsdp":
            BLANKS[model] = _with_parameters(model, {n: p.to("meta") for n, p in model.named_parameters()})
        _synchronise_norms(model)
        with peer_errors(), torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                values = tensor.contiguous()
                dist.broadcast(values, 0)
                tensor.copy_(values)
        if self.kind == "ddp":
            return self._data_parallel(model)
        mesh = init_device_mesh(torch.device(self.device).type, (self.size,))
        for module in (*_units(model), model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)  # or the optimizer's are not in the model
        return model

    def whole(self, model: nn.Module) -> nn.Module:
        """Return a plain copy, on the CPU, of a ``model`` that :meth:`wrap` has sharded; any other model itself.

        All processes call it, and each has the copy: one to write, or to call in other ways than by its forward.
        """
        if model not in BLANKS:
            return model
        with peer_errors():
            state = whole_state(model)
        blank, buffers = BLANKS[model], dict(model.named_buffers())
        copied = _with_parameters(blank, {n: state[n].detach().cpu() for n, _ in blank.named_parameters()}).cpu()
        for name, buffer in copied.named_buffers():
            buffer.copy_(buffers[name])
        return copied

    def rewrap(self, module: nn.Module) -> nn.Module:
        """Return what is called from now on in place of ``module``, after ``requires_grad`` has changed.

        DDP is made anew, and the old one must not be used again; FSDP sees the change by itself.
        """
        if self.kind != "ddp":
            return module
        if isinstance(module, _DataParallel):
            module._remove_autograd_hooks()  # or the gradients would be exchanged twice until it is collected
            module = module.module
        return self._data_parallel(module)

    def _data_parallel(self, model: nn.Module) -> nn.Module:
        if not any(p.requires_grad for p in model.parameters()):
            return model
        with peer_errors():
            return _DataParallel(model, device_ids=[self.device] if self.device.startswith("cuda") else None)

    @contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Iterator[None]:
        """While active, forward and backward of ``module`` exchange gradients only if ``last`` of the window."""
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last)
        waits = isinstance(module, _DataParallel) and not last
        with peer_errors(), module.no_sync() if waits else nullcontext():
            yield

    def share(self, items: Sequence[T], setting: str = "--batch-size") -> Sequence[T]:
        """Return this process's part of ``items``: every ``size``-th.

        Raises:
            InputError: If there are fewer items than processes; it names the ``setting`` that says how many.
        """
        if len(items) < self.size:
            raise InputError(
                f"{setting}: expected at least one item for each of {self.size} processes, got {len(items)}"
            )
        return items[self.rank :: self.size]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of ``values`` over all processes, in float64."""
        if self.size == 1:
            return list(values)
        with peer_errors():
            total = torch.tensor(values, dtype=torch.float64, device=self.device)
            dist.all_reduce(total)
            return total.tolist()

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on any process."""
        return self.sum([float(flag)])[0] > 0

    def broadcast(self, value: T) -> T:
        """Return the ``value`` of the first process."""
        if self.size == 1:
            return value
        with peer_errors():
            box = [value]
            dist.broadcast_object_list(box, 0)
            return box[0]

    def gather(self, value: T) -> list[T]:
        """Return the ``value`` of each process, by rank."""
        if self.size == 1:
            return [value]
        with peer_errors():
            values: list[Any] = [None] * self.size
            dist.all_gather_object(values, value)
            return values

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)


def parallel_from_env(kind: str = "auto", device: str = "cpu") -> Parallel:
    """Return this process among those that torchrun started, and join them; a second call changes nothing.

    Args:
        kind: ``"ddp"``, ``"fsdp"``, ``"none"``, or ``"auto"``: DDP where there are several processes.
        device: ``"cpu"`` (processes talk by gloo) or ``"cuda"`` (by nccl, one GPU for each process).

    Raises:
        InputError: If ``kind`` and the number of processes do not go together, or there are too few GPUs.
    """
    if kind not in KINDS:
        raise InputError(f"--parallel: expected one of {', '.join(KINDS)}, got {kind!r}")
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        if kind in ("ddp", "fsdp"):
            raise InputError(
                f"--parallel {kind}: expected processes started by torchrun, got one alone; use "
                f"torchrun --nproc-per-node 2 {sys.argv[0]} --parallel {kind} ..."
            )
        return Parallel(device=device)
    rank, size, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if kind == "auto":
        kind = "ddp" if size > 1 else "none"
    if kind == "none":
        if size > 1:
            raise InputError(f"--parallel none: expected one process, got {size} from torchrun")
        return Parallel(device=device)
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device: expected cpu or cuda under torchrun, got {device}")
    on = None
    if device == "cuda":
        gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
        if here > gpus:
            raise InputError(
                f"--device cuda: expected a GPU for each of {here} processes on this machine, got {gpus}; use "
                f"torchrun --nproc-per-node {gpus or 1}, or --device cpu"
            )
        torch.cuda.set_device(local_rank)
        device = f"cuda:{local_rank}"
        on = torch.device(device)
    if not dist.is_initialized():
        _join("nccl" if on else "gloo", on)
    return Parallel(rank, size, local_rank, kind, device)


@peer_errors()
def _join(backend: str, device: torch.device | None) -> None:
    """Start the process group.

    On one machine torchrun's store outlives its restarts, and with it the addresses of processes that are dead;
    so each restart uses names of its own. Several machines count restarts differently: there, set
    ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` for torchrun.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"restart{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE, device_id=device)


def speaks() -> bool:
    """Return whether this process is the one that prints, also before it has joined the others."""
    return int(os.environ.get("RANK", 0)) == 0


def tells(error: Exception) -> bool:
    """Return whether this process is to print ``error``, at which it ends.

    Of processes with the same error one does; that another process is gone is told only if that one told nothing.
    """
    if not dist.is_initialized():
        return speaks()
    try:
        store = dist.distributed_c10d._get_default_store()
        errors = store.add("errors", 1)
        return errors == 1 if isinstance(error, ConnectionError) else store.add(f"error: {error}", 1) == 1
    except RuntimeError:  # the store is gone with the process that had it
        return True


def shutdown() -> None:
    """Leave the other processes, if there are any; call it at the end of the job."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(status: int) -> int:
    """Leave the other processes and end this one with ``status``; return it if there are no others.

    Gloo's threads may hold tensors after their group is destroyed, and now and then abort a process while Python
    shuts down, with all of its work done; so what is to be done at exit is done here, and Python has no say.
    """
    if dist.is_initialized():
        shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def job_time(parallel: Parallel = Parallel()) -> str:
    """Return a date and time that can name a job: ``"2026-01-31_23-59-59"``.

    Processes of torchrun all get the time at which it was started, also after it has started them again, so that
    they find the same folder. A lone process gets the time of now.
    """
    started = time.time()
    if dist.is_torchelastic_launched():
        started = psutil.Process(os.getppid()).create_time()
    return parallel.broadcast(time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(started)))
