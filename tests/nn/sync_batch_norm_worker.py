"""One of two processes, which test_sync_batch_norm.py starts: `python sync_batch_norm_worker.py RANK FILE`."""

from __future__ import annotations

import datetime
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor

import bptools
import bptools.functional as B

SPLITS = {"even": (3, 3), "uneven": (5, 1), "one without samples": (4, 0)}
FLOAT64 = torch.float64


def batch(size: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 + torch.randn(size, dtype=FLOAT64, generator=generator)


def layers(dims: int, **kwargs) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours, converted, and torch's, of the same parameters."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, f"BatchNorm{dims}d")(2, dtype=FLOAT64, **kwargs)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours = getattr(torch.nn, f"BatchNorm{dims}d")(2, dtype=FLOAT64, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return bptools.nn.SyncBatchNorm.convert_sync_batchnorm(ours), theirs


def gradients(y: Tensor, x: Tensor, module: torch.nn.Module, dy: Tensor) -> list[Tensor]:
    return torch.autograd.grad(y, (x, *module.parameters()), dy, create_graph=True)


def summed(t: Tensor) -> Tensor:
    """What the gradient of a parameter is in all: the sum over the processes."""
    t = t.detach().clone()
    dist.all_reduce(t)
    return t


def check_module(rank: int, split: tuple[int, int], dims: int, **kwargs) -> None:
    """Two steps: values, gradients, second derivatives and buffers are those of the whole batch in one process."""
    ours, theirs = layers(dims, **kwargs)
    shape = (sum(split), 2, *(3,) * (dims if dims > 1 else 0))
    for step in range(2):
        whole, dy = batch(shape, step).requires_grad_(), batch(shape, 10 + step)
        part = whole.detach().split(split)[rank].clone().requires_grad_()
        y, expected = ours(part), theirs(whole)
        torch.testing.assert_close(y, expected.split(split)[rank])
        dx, *rest = gradients(y, part, ours, dy.split(split)[rank])
        expected_dx, *expected_rest = gradients(expected, whole, theirs, dy)
        torch.testing.assert_close(dx, expected_dx.split(split)[rank])
        torch.testing.assert_close([summed(t) for t in rest], [t.detach() for t in expected_rest])
        second = torch.autograd.grad(dx.pow(3).sum(), part)[0]
        expected_second = torch.autograd.grad(expected_dx.pow(3).sum(), whole)[0]
        torch.testing.assert_close(second, expected_second.split(split)[rank])
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    ours.eval(), theirs.eval()  # as one process alone, without an exchange
    if rank == 0:
        torch.testing.assert_close(ours(part), theirs(part))


def check_frozen(rank: int) -> None:
    """Each gradient is what it is with all others wanted."""
    x, w, b = batch((4, 2)).split((3, 1))[rank], batch((2,), 1), batch((2,), 2)
    dy = batch((4, 2), 3).split((3, 1))[rank]
    everything = None
    for mask in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        inputs = [t.clone().requires_grad_(m) for t, m in zip((x, w, b), mask, strict=True)]
        y = B.sync_batch_norm(inputs[0], None, None, *inputs[1:])
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, dy))
        grads = [next(found) if m else None for m in mask]
        everything = everything or grads
        for grad, expected in zip(grads, everything, strict=True):
            assert grad is None or torch.equal(grad, expected)


def check_half(rank: int) -> None:
    """bfloat16 beside float32 parameters; the statistics are exchanged in float32."""
    x = batch((6, 2)).bfloat16()
    w, b, mean, var = (torch.ones(2) for _ in range(4))
    y = B.sync_batch_norm(x.split((4, 2))[rank], mean, var, w, b)
    expected = torch.nn.functional.batch_norm(x, torch.ones(2), torch.ones(2), w, b, training=True)
    torch.testing.assert_close(y, expected.split((4, 2))[rank])
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(mean, 0.9 + 0.1 * x.float().mean(0), rtol=1e-5, atol=1e-6)


def check_group(rank: int) -> None:
    """A group of this process alone: plain batch norm."""
    group = [dist.new_group([r]) for r in range(2)][rank]
    layer = bptools.nn.SyncBatchNorm(2, process_group=group, dtype=FLOAT64)
    x = batch((3 + rank, 2))
    torch.testing.assert_close(layer(x), torch.nn.functional.batch_norm(x, None, None, training=True))


def main(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=patience)
    for split in SPLITS.values():
        check_module(rank, split, 1)
    check_module(rank, (2, 3), 2, momentum=None)
    check_module(rank, (3, 2), 3, affine=False)
    check_module(rank, (3, 2), 1, track_running_stats=False)
    check_frozen(rank)
    check_half(rank)
    check_group(rank)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort when Python shuts down


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
