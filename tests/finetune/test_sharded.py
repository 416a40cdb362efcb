import logging
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from bptools.finetune.checkpoint import random_state
from bptools.finetune.distributed import Parallel
from bptools.finetune.errors import InputError
from bptools.finetune.sharded import ShardedStore


def made(width=3):
    model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.fixture
def store(tmp_path):
    return ShardedStore(tmp_path, Parallel())


def save(store, value, extra=None):
    model, optimizer = made()
    nn.init.constant_(model[0].weight, value)
    store.save(model, optimizer, {}, extra or {})


def load(store):
    """The value that was saved."""
    model, optimizer = made()
    return None if store.load(model, optimizer, {}) is None else model[0].weight[0, 0].item()


def folders(store):
    return sorted(os.listdir(store.folder))


def test_nothing_is_saved_yet(store):
    assert load(store) is None


def test_the_newest_two_are_kept(store):
    for value in range(4):
        save(store, value)
    assert folders(store) == ["00000003", "00000004"]
    assert load(store) == 3


def cut(folder):
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])


@pytest.mark.parametrize(
    "tear",
    [
        cut,
        lambda folder: next(folder.glob("*.distcp")).unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"a":'),
        lambda folder: (folder / ".metadata").write_bytes(b""),
    ],
    ids=["cut", "no data", "no manifest", "half a manifest", "no metadata"],
)
def test_of_a_torn_checkpoint_the_one_before_is_taken(store, tear, caplog):
    save(store, 1)
    save(store, 2)
    tear(store.folder / "00000002")
    with caplog.at_level(logging.WARNING, "bptools.finetune"):
        assert load(store) == 1
    assert "00000002 is torn" in caplog.text
    save(store, 3)
    assert folders(store) == ["00000001", "00000003"]  # the torn one does not count as the previous
    shutil.rmtree(store.folder / "00000001")
    tear(store.folder / "00000003")
    assert load(store) is None


def while_writing(self, plan, planner):
    (self.path / "__0_0.distcp").write_bytes(b"half")
    raise KeyboardInterrupt


def before_renaming(self, part, final):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "crash"),
    [((dcp.FileSystemWriter, "write_data"), while_writing), ((ShardedStore, "_commit"), before_renaming)],
)
def test_a_crash_leaves_the_one_before(store, monkeypatch, where, crash):
    save(store, 1)
    monkeypatch.setattr(*where, crash)
    with pytest.raises(KeyboardInterrupt):
        save(store, 2)
    monkeypatch.undo()
    assert load(store) == 1
    save(store, 3)
    assert folders(store) == ["00000001", "00000002"]
    assert load(store) == 3


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor", "Rprop"])
def test_all_of_an_optimizer_comes_back(store, name):
    def build(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        model[0].weight.requires_grad_(False)
        groups = [
            {"params": part.parameters(), "lr": 0.1 / (depth + 1), "depth": depth}
            for depth, part in enumerate(model)
        ]
        return model, getattr(torch.optim, name)(groups)

    def step(model, optimizer):
        model(torch.ones(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = build(0)
    for made_steps in range(2):
        store.save(model, optimizer, {}, {"n": made_steps})
        other, resumed = build(1)
        group = resumed.param_groups[0]
        assert store.load(other, resumed, {}) == {"n": made_steps, "random": None}
        assert resumed.param_groups[0] is group  # which a schedule may hold
        assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        assert isinstance(group["lr"], float)
        twin = [(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)]
        assert all(torch.equal(p, q) for p, q in twin)
        assert [q in resumed.state for _, q in twin] == [p in optimizer.state for p, _ in twin]
        step(model, optimizer)
        step(other, resumed)
        assert all(torch.equal(p, q) for p, q in twin)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("harmed",))


def test_no_code_is_run(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(store, 1, {"random": random_state()})
    metadata = store.folder / "00000001" / ".metadata"
    whole = metadata.read_bytes()

    def replaced(value):
        data = pickle.dumps(value)
        metadata.write_bytes(data)
        manifest = store.folder / "00000001" / "manifest.json"
        manifest.write_text(f'{{".metadata": {len(data)}}}')

    replaced(Evil())
    with pytest.raises(InputError, match=r"00000001: its .metadata is not .*names posix.mkdir"):
        load(store)
    described = pickle.loads(whole)
    described.state_dict_metadata["code"] = dcp.metadata.BytesStorageMetadata()
    replaced(described)
    with pytest.raises(InputError, match=r"00000001: its .metadata is not .*BytesStorageMetadata"):
        load(store)
    replaced({"a": 1})
    with pytest.raises(InputError, match="expected a checkpoint of tensors"):
        load(store)
    assert not (tmp_path / "harmed").exists()


def test_plain_values_with_code_are_refused(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(store, 1, {"evil": Evil()})
    with pytest.raises(InputError, match="00000001 holds more than plain values"):
        load(store)
    assert not (tmp_path / "harmed").exists()


def test_a_checkpoint_of_another_model_is_refused_whole(store):
    save(store, 1)
    model, optimizer = made(width=5)
    before = model[2].bias.clone()
    with pytest.raises(
        InputError, match=r"00000001 does not fit: expected \(5, 4\) torch.float32 for model.0.weight"
    ) as caught:
        store.load(model, optimizer, {})
    assert "got (3, 4) torch.float32" in str(caught.value)
    assert torch.equal(model[2].bias, before)
    model, _ = made()
    with pytest.raises(InputError, match="other parameters or groups"):
        store.load(model, torch.optim.SGD(model[0].parameters()), {})
    with pytest.raises(InputError, match=r"expected \(3,\) torch.float32 for tensors.mean, got none"):
        store.load(*made(), {"mean": torch.zeros(3)})


@pytest.mark.parametrize("where", [(dcp.FileSystemWriter, "write_data"), (ShardedStore, "_commit")])
def test_a_full_disk_is_one_line(store, monkeypatch, where):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*where, full)
    with pytest.raises(InputError, match=r"cannot write a checkpoint to .*sharded: .*No space left") as caught:
        save(store, 1)
    assert "\n" not in str(caught.value)


def test_extra_state_of_a_module(store):
    class Counting(nn.Linear):
        count = 0

        def get_extra_state(self):
            return {"count": self.count}

        def set_extra_state(self, state):
            self.count = state["count"]

    model, other = Counting(2, 2), Counting(2, 2)
    model.count = 5
    store.save(model, torch.optim.SGD(model.parameters()), {}, {})
    store.load(other, torch.optim.SGD(other.parameters()), {})
    assert other.count == 5
