"""A job with everything in it that a resume can lose, killed at random moments; started by test_kills.py.

``python killed_job.py FOLDER KILLS SEED`` does the job once in peace, then again and again in fresh folders, with
each process killed by SIGKILL after a random time and another put in its place, until KILLS have been dealt. It
prints, as JSON, the kills of each job and in what it differs from the first. Processes are forked, so that they
need not import.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import peft  # noqa: F401  before the fork, as it takes seconds
import torch
from torch import nn
from torch.utils.data import Dataset

from bptools import finetune as ft
from bptools.finetune.verify import flatten, same

VARIANTS = ("plain", "adapter", "workers")


class Noisy(Dataset):
    """Sixty samples of six features in three classes, with fresh noise each time."""

    def __len__(self):
        return 60

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        return torch.randn(6, generator=generator) + i % 3 + 0.1 * torch.randn(6), i % 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.layer2 = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.layer3 = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layer3(self.layer2(self.layer1(x))))


def job(folder: Path, variant: str) -> None:
    torch.set_num_threads(1)
    ft.set_seed(0)
    model, head = Net(), "head"
    if variant == "adapter":
        model = ft.add_adapter(model, ft.Adapter("lora", rank=2, dropout=0.1), head="head", fuse=False)
        phases = [ft.Phase(("all",), 4)]
        for name, p in model.named_parameters():
            p.requires_grad_("lora" in name or "modules_to_save" in name)
        phases = [ft.Phase(("*lora*", "*modules_to_save*"), 4)]
    else:
        phases = ft.parse_phases(["head:2", "head+layer?~1:2@1e-2", "all:3"], lr_decay=0.7)
    depths = ft.parameter_depths(model, torch.zeros(1, 6))
    optimizer = torch.optim.AdamW(ft.parameter_groups(model, depths, 0.02, 0.1))
    stepper = ft.Stepper(
        model, optimizer, ft.supervised(nn.CrossEntropyLoss()), amp="fp16", clip=1.0, ema=ft.Ema(model, 0.9)
    )  # fmt: skip
    stepper.scaler.set_growth_interval(3)  # so that its scale grows until steps are skipped
    data = ft.Augmented(Noisy())

    def loader(epoch):
        return ft.make_loader(data, 7, seed=(0, epoch), workers=2 * (variant == "workers"))

    run = ft.Run(folder, stepper, phases, loader, head=head, accumulate=2, schedule="one-cycle", patience=2,
                 save_every=0.0)  # fmt: skip
    for _ in run.phases():
        for _ in run.epochs():
            for window in run.windows():
                run.step(window)
            with run.averaged():
                run.validate(ft.evaluate(model, Noisy2()).loss)
    run.load_best()
    run.finish({"weights": [p.double().sum().item() for p in model.parameters()]})


class Noisy2(Noisy):
    """The same, without noise, for validation."""

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(1000 + i)
        return torch.randn(6, generator=generator) + i % 3, i % 3


def start(folder: Path, variant: str) -> int:
    """Do the job in a process of its own; return its number."""
    process = os.fork()
    if process:
        return process
    try:
        job(folder, variant)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def differences(folder: Path, other: Path) -> list[str]:
    found = []
    for name in ("last.pt", "best.pt"):
        a, b = (flatten(ft.load_checkpoint(f / name)) for f in (folder, other))
        found += [f"{name}: {key}" for key in sorted(a.keys() | b.keys()) if not same(a.get(key), b.get(key))]
    a, b = (flatten(ft.load_json(f / "result.json")) for f in (folder, other))
    return found + [f"result: {key}" for key in a.keys() | b.keys() if not same(a.get(key), b.get(key))]


def main(folder: Path, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    jobs, dealt, seconds = [], 0, {}
    for variant in VARIANTS:
        begun = time.monotonic()
        if os.waitpid(start(folder / variant, variant), 0)[1]:
            raise SystemExit(f"{variant}: the job in peace failed")
        seconds[variant] = time.monotonic() - begun
    while dealt < kills:
        variant = VARIANTS[len(jobs) % len(VARIANTS)]
        place, here = folder / f"killed{len(jobs)}", 0
        while True:
            process, end = start(place, variant), time.monotonic() + draw.uniform(0, seconds[variant])
            done = (0, 0)
            while time.monotonic() < end and not done[0]:
                time.sleep(0.002)
                done = os.waitpid(process, os.WNOHANG)
            if done[0]:
                if done[1]:
                    raise SystemExit(f"{variant}: a resumed job failed")
                break
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            here += 1
        dealt += here
        jobs.append({"variant": variant, "kills": here, "differ": differences(folder / variant, place)})
    print(json.dumps(jobs))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
