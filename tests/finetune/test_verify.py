"""``--verify`` holds on sound recipes; on one that is broken in one way, only the check of that fails."""

import importlib.util
import io
import re
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from bptools import finetune as ft
from bptools.finetune.distributed import Parallel
from bptools.finetune.verify import StopAfter, difference, flatten, same

ROOT = Path(__file__).parents[2]


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body(self.stem(x.to(self.stem[0].weight.dtype))))


class Bypassing(Net):
    """Reads the weight of a layer and never calls it, as some attention does."""

    def forward(self, x):
        layer = self.body[0]
        return self.head(F.linear(self.stem(x), layer.weight, layer.bias))


class Break:
    """A way to break a recipe: one object for each call of its training function."""

    net = Net
    phases = ("head:1", "all:1")
    count = staticmethod(ft.count_samples)
    adapter = None

    def loss(self, module, batch):
        return F.cross_entropy(module(batch[0]).float(), batch[1])

    def change(self, model):
        """Called when it is made."""

    def before_step(self, run, window):
        """Called in the loop."""

    def seed(self, epoch):
        return (0, epoch)

    def folder(self, folder):
        return folder / "run"

    def options(self, **given):
        return given

    def end(self, run):
        run.load_best()


def recipe(way=Break):
    def train(folder, **given):
        ft.set_seed(0)
        broken = way()
        model, phases = broken.net(), broken.phases
        if broken.adapter:
            model, phases = ft.add_adapter(model, broken.adapter, head="head"), ("adapters:1", "adapters:1")
        broken.change(model)
        optimizer = torch.optim.AdamW(
            ft.parameter_groups(model, ft.parameter_depths(model, torch.zeros(1, 4)), 0.05, 0.1)
        )
        stepper = ft.Stepper(model, optimizer, broken.loss, count=broken.count)
        run = ft.Run(
            broken.folder(folder), stepper, ft.parse_phases(phases),
            lambda epoch: ft.make_loader(data(), 8, seed=broken.seed(epoch)),
            head="head", accumulate=2, **broken.options(**given),
        )  # fmt: skip
        for _ in run.phases():
            for _ in run.epochs():
                for window in run.windows():
                    broken.before_step(run, window)
                    run.step(window)
                run.validate(1.0)
        broken.end(run)

    return train


def verdicts(train, command=("-c", "raise SystemExit('not asked')")):
    """The table of ``--verify`` as a dictionary, its last line, and the exit status."""
    text = io.StringIO()
    status = ft.verify(train, command, Console(file=text, width=500), Parallel())
    *lines, last = text.getvalue().splitlines()
    rows = [re.split(r"\s{2,}", line.strip(), maxsplit=2) for line in lines]
    return {row[0]: tuple(row[1:]) for row in rows if len(row) == 3 and row[0] != "check"}, last, status


class Adapted(Break):
    adapter = ft.Adapter(rank=2)


class Half(Break):
    def net(self):
        return Net().bfloat16()


@pytest.mark.parametrize("way", [Break, Adapted, Half])
def test_sound_recipes_hold(way):
    rows, last, status = verdicts(recipe(way))
    assert rows.pop("two processes = one") == ("FAILS", "two processes: not asked")
    assert rows.pop("merged = adapter")[0] == ("holds" if way is Adapted else "-")
    assert {row[0] for row in rows.values()} == {"holds"}, rows
    assert re.fullmatch(rf"1 of {6 if way is Adapted else 5} checks fail; \d+ s", last)
    assert status == 1


class Summed(Break):
    def loss(self, module, batch):
        return F.cross_entropy(module(batch[0]), batch[1], reduction="sum")


class MeanOfMeans(Break):
    count = staticmethod(lambda batch: 1)


class Unused(Adapted):
    net = Bypassing


class Detached(Break):
    def loss(self, module, batch):
        return F.cross_entropy(module.head(module.body(module.stem(batch[0])).detach()), batch[1])


class Counter(Break):
    """A factor on the loss that grows with each step, and is in no checkpoint."""

    steps = 0

    def before_step(self, run, window):
        self.steps += 1

    def loss(self, module, batch):
        return super().loss(module, batch) * (1 + self.steps / 10)


class Unseeded(Break):
    generator = torch.Generator()

    def before_step(self, run, window):
        window[0][0].add_(torch.randn(window[0][0].shape, generator=self.generator) / 10)


class Timed(Break):
    def seed(self, epoch):
        return (time.time_ns() % 2**31, epoch)


class Deaf(Break):
    def options(self, interrupt=None, **given):
        return given


class Elsewhere(Break):
    def folder(self, folder):
        return folder / f"run{time.time_ns()}"


class Unsaved(Break):
    def end(self, run):
        pass

    def before_step(self, run, window):
        run.validate = lambda loss: True


class TrainMode(Break):
    def before_step(self, run, window):
        run.model.train()


class Moving(Break):
    def before_step(self, run, window):
        if run.phase_index == 0:
            with torch.no_grad():
                run.model.stem[0].weight.mul_(1.001)


class Unfreezing(Break):
    def before_step(self, run, window):
        run.model.body.requires_grad_(True)


class Hooked(Adapted):
    def change(self, model):
        layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
        layer.register_forward_hook(lambda module, inputs, output: output * 1.01)


class Unmerged(Adapted):
    def change(self, model):
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.merge = lambda *args, **kwargs: None


@pytest.mark.parametrize(
    ("way", "check", "seen"),
    [
        (Summed, "accumulated = one batch", r"gradients differ by \de[+-]\d\d of their norm.*, most in \S+"),
        (MeanOfMeans, "accumulated = one batch", r"gradients differ by \de-01 of their norm"),
        (Unused, "what trains learns", r"2 trainable tensors get no gradient, first \S*body\.0\.lora_A"),
        (Detached, "what trains learns", r"6 trainable tensors get no gradient, first stem\.0\.weight"),
        (Counter, "resumed = uninterrupted", r"run/last\.pt: \d+ of \d+ values differ, first model\.\S+ by \de-0"),
        (Unseeded, "resumed = uninterrupted", r"run/last\.pt: \d+ of \d+ values differ, first model\."),
        (Timed, "resumed = uninterrupted", r"run/last\.pt: \d+ of \d+ values differ, first model\."),
        (Deaf, "resumed = uninterrupted", r"did not stop after the first step: hand interrupt on to Run"),
        (Elsewhere, "resumed = uninterrupted", r"a run made again does not find what was saved in run\d+"),
        (Unsaved, "resumed = uninterrupted", r"no checkpoint at the end: call run\.load_best"),
        (TrainMode, "frozen unchanged", r"\d+ of \d+ tensors changed, first stem\.1\.running_mean by .* head"),
        (Moving, "frozen unchanged", r"1 of \d+ tensors changed, first stem\.0\.weight by \de-0\d in phase head"),
        (Unfreezing, "frozen unchanged", r"2 of \d+ tensors changed, first body\.0\.weight by"),
        (Hooked, "merged = adapter", r"outputs differ by \de-0[123] of their norm"),
        (Unmerged, "merged = adapter", r"outputs differ by \de-0[123] of their norm"),
    ],
)  # fmt: skip
def test_a_broken_recipe_fails_the_one_check_that_it_should(way, check, seen):
    rows, _, _ = verdicts(recipe(way))
    del rows["two processes = one"]
    assert [name for name, row in rows.items() if row[0] == "FAILS"] == [check], rows
    assert re.match(seen, rows[check][1]), rows[check][1]


# What two processes do has to be in a file that they run; its first argument is what is wrong with it.
SCRIPT = """
import sys
from functools import partial

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import TensorDataset

from bptools import finetune as ft

generator = torch.Generator().manual_seed(0)
x = torch.randn(45, 4, generator=generator)
data = TensorDataset(x, (x[:, 0] > 0).long())


class OwnNorm(nn.BatchNorm1d):
    pass


def train(wrong, parallel, folder, **options):
    print("not in the table")
    for name in ("first", "last"):
        if (folder / name / "result.json").exists():
            continue
        if wrong == "raises" and parallel.rank:
            raise ZeroDivisionError("what went wrong [here]")
        ft.set_seed(0)
        norm = OwnNorm if wrong == "norm" and name == "last" else nn.BatchNorm1d
        model = nn.Sequential(nn.Linear(4, 8), norm(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))
        depths = ft.parameter_depths(model, x[:1])
        module = parallel.wrap(model)
        optimizer = torch.optim.AdamW(ft.parameter_groups(model, depths, 0.05, 0.1))
        loss = ft.supervised(nn.CrossEntropyLoss())
        stepper = ft.Stepper(model, optimizer, loss, parallel=parallel, module=module)
        sharing = ft.Parallel() if wrong == "whole" else parallel
        run = ft.Run(
            folder / name, stepper, ft.parse_phases(["4:1", "all:1"]),
            lambda epoch: ft.make_loader(data, 9, seed=(0, epoch), parallel=sharing), accumulate=2, **options,
        )
        for _ in run.phases():
            for _ in run.epochs():
                for window in run.windows():
                    run.step(window)
                run.validate(1.0)
        run.load_best()
        run.finish({})


def main():
    parallel = ft.parallel_from_env(ft.verify_kind("auto"), "cpu")
    return ft.verify(partial(train, sys.argv[1], parallel), sys.argv, Console(width=110), parallel)


if __name__ == "__main__":
    sys.exit(ft.exit_status(main))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)
@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        ("nothing", r"gradients differ by \de-0[678] of their norm, without dropout$"),
        ("norm", r"gradients differ by .* most in \S+ in phase 2 \(all\)"),
        ("whole", r"two have 36 items in the first window, one has 18"),
        ("raises", r"two processes: .*what went wrong \[here\]"),
    ],
)
def test_two_processes(wrong, seen, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "verified_recipe.py"
    path.write_text(SCRIPT)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows, last, status = verdicts(lambda *a, **o: module.train(wrong, Parallel(), *a, **o), [str(path), wrong])
    verdict, said = rows.pop("two processes = one")
    assert verdict == ("holds" if wrong == "nothing" else "FAILS"), said
    assert re.match(seen, said), said
    assert {row[0] for row in rows.values()} == {"holds", "-"}
    assert re.match("all hold; " if wrong == "nothing" else "1 of 5 checks fail; ", last)
    assert status == (wrong != "nothing")
    assert "not in the table" not in capsys.readouterr().out
    assert [p for p in tmp_path.iterdir() if p.is_dir() and p.name != "__pycache__"] == []


def test_two_processes_that_do_not_end_are_ended(monkeypatch):
    monkeypatch.setattr(sys.modules[ft.verify.__module__], "PATIENCE", 0.5)
    rows, _, _ = verdicts(recipe(), ["-c", "import time; time.sleep(100)"])
    seen = "two processes did not come to their first gradient within 0.5 s"
    assert rows["two processes = one"] == ("FAILS", seen)
    assert not [child for child in psutil.Process().children() if "time.sleep(100)" in child.cmdline()]


def test_what_the_user_gave_is_passed_through_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    class Wrong(Break):
        def before_step(self, run, window):
            raise ft.InputError("--size: too small")

    with pytest.raises(ft.InputError, match=r"^--size: too small$"):
        verdicts(recipe(Wrong))
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_does_not_let_look_on_is_refused():
    class Blind(Break):
        def options(self, observe, **given):
            return given

    with pytest.raises(ft.InputError, match="hand observe on to Run"):
        verdicts(recipe(Blind))


def test_torchrun_is_refused(monkeypatch):
    with pytest.raises(ft.InputError, match="leave out torchrun"):
        ft.verify(recipe(), [], Console(), Parallel(size=2, kind="ddp"))


def test_a_dry_run_stops_and_continues_in_every_phase(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    text = io.StringIO()
    assert ft.dry_run(recipe(), Console(file=text), Parallel()) == 0
    first, second = text.getvalue().splitlines()
    assert first == "dry run: one window of every phase: run (head, all)"
    assert second == "saved, stopped and continued 4 times, validated and tested: all well"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("way", "words"), [(Deaf, "hand interrupt on"), (Elsewhere, "does not find what was")])
def test_a_dry_run_says_what_is_wrong(way, words):
    text = io.StringIO()
    assert ft.dry_run(recipe(way), Console(file=text), Parallel()) == 1
    assert words in text.getvalue()


def test_parts():
    assert flatten({"a": [1, {"b": 2}], "seconds": 3}) == {"a.0": 1, "a.1.b": 2}
    assert same(float("nan"), float("nan"))
    assert not same(1, 1.0)
    assert not same(torch.ones(1), torch.ones(1, dtype=torch.float64))
    assert difference({"x": torch.ones(1)}, {"y": torch.ones(1)}) == (float("inf"), "x")
    assert difference({"x": torch.tensor([float("nan")])}, {"x": torch.ones(1)}) == (float("inf"), "x")
    assert difference({"x": torch.zeros(1)}, {"x": torch.zeros(1)}) == (0.0, "x")
    stop = StopAfter(2)
    assert [bool(stop), bool(stop), bool(stop)] == [False, True, True]
