import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bptools.finetune import (
    InputError,
    holds_run,
    load_checkpoint,
    load_config,
    load_json,
    load_weights,
    make_folder,
    random_state,
    save_checkpoint,
    save_json,
    set_random_state,
)


def test_round_trip_of_tensors_and_plain_values(tmp_path):
    path = tmp_path / "a" / "b.pt"
    save_checkpoint(path, {"x": torch.arange(3), "n": [1, (2, "c")], "none": None})
    state = load_checkpoint(path, keys=("x", "n"))
    assert state["n"] == [1, (2, "c")]
    assert torch.equal(state["x"], torch.arange(3))
    assert os.listdir(tmp_path / "a") == ["b.pt"]


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"x": 1})

    def crash(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"x": 2})
    monkeypatch.undo()
    assert load_checkpoint(path) == {"x": 1}
    assert os.listdir(tmp_path) == ["c.pt"]


class Evil:
    def __reduce__(self):
        return (os.getcwd, ())


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("empty.pt", lambda p: p.write_bytes(b"")),
        ("text.pt", lambda p: p.write_text("hello")),
        ("code.pt", lambda p: torch.save({"x": Evil()}, p)),
        ("text.safetensors", lambda p: p.write_text("hello")),
        ("list.pt", lambda p: torch.save([1], p)),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, write):
    write(tmp_path / name)
    with pytest.raises(InputError, match=name) as caught:
        load_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_torn_and_missing_files_and_keys(tmp_path):
    path = tmp_path / "torn.pt"
    save_checkpoint(path, {"x": torch.rand(1000)})
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"torn.pt is torn or not"):
        load_checkpoint(path)
    with pytest.raises(InputError, match=r"no such checkpoint file: .*none.pt"):
        load_checkpoint(tmp_path / "none.pt")
    save_checkpoint(path, {"x": 1})
    with pytest.raises(InputError, match="lacks y, z"):
        load_checkpoint(path, keys=("x", "y", "z"))


def net(classes=3):
    return nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Linear(2, classes))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3}])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_weights_with_the_usual_wrappings(tmp_path, wrap, prefix):
    source, model = net(), net()
    source[1].running_mean.fill_(7.0)
    torch.save(wrap({prefix + k: v for k, v in source.state_dict().items()}), tmp_path / "w.pt")
    assert load_weights(model, tmp_path / "w.pt") == []
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())


def test_safetensors(tmp_path):
    source, model = net(), net()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model[0].weight, source[0].weight)


def test_a_new_head_keeps_its_own_values(tmp_path):
    torch.save(net(classes=5).state_dict(), tmp_path / "w.pt")
    model = net()
    head = model[2].weight.clone()
    assert load_weights(model, tmp_path / "w.pt", replaceable=["2"]) == ["2.weight", "2.bias"]
    assert torch.equal(model[2].weight, head)


def test_wrong_weights_in_one_line(tmp_path):
    state = net(classes=5).state_dict()
    state["extra"] = state.pop("0.weight")
    torch.save(state, tmp_path / "w.pt")
    model = net()
    before = model[0].bias.clone()
    with pytest.raises(InputError) as caught:
        load_weights(model, tmp_path / "w.pt")
    message = str(caught.value)
    assert "\n" not in message
    assert "1 missing (such as 0.weight)" in message
    assert "1 unexpected (such as extra)" in message
    assert "2 of another shape (such as 2.weight: (5, 2) for (3, 2))" in message
    assert torch.equal(model[0].bias, before)


def test_random_states_come_back(tmp_path):
    draw = lambda: (random.random(), np.random.rand(), torch.rand(()).item())  # noqa: E731
    save_checkpoint(tmp_path / "r.pt", {"random": random_state()})
    first = draw()
    assert draw() != first
    set_random_state(load_checkpoint(tmp_path / "r.pt")["random"])
    assert draw() == first


def test_folders_that_cannot_be_used_are_named_by_option(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^--log-dir .*file: File exists"):
        make_folder(tmp_path / "file", {})
    with pytest.raises(InputError, match=r"^--log-dir .*job: Not a directory"):
        make_folder(tmp_path / "file" / "job", {})
    with pytest.raises(InputError, match=r"^--resume nowhere: no such file: nowhere.config.json"):
        load_config("nowhere")


def test_settings_come_back_with_their_tuples(tmp_path):
    make_folder(tmp_path / "job", {"phases": ("head:1", "all:2"), "lr": 0.1})
    assert load_config(tmp_path / "job") == {"phases": ("head:1", "all:2"), "lr": 0.1}
    assert not holds_run(tmp_path / "job")
    save_checkpoint(tmp_path / "job" / "seed0" / "full" / "best.pt", {})
    assert holds_run(tmp_path / "job")


def test_one_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "x.pt"
    save_checkpoint(path, {"x": torch.full((100,), 7.0)})
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((100,), 7.0).numpy().tobytes()) + 50] ^= 1
    path.write_bytes(content)
    assert not torch.equal(
        torch.load(path, weights_only=True)["x"], torch.full((100,), 7.0)
    )  # torch does not see it
    with pytest.raises(InputError, match=r"x.pt is torn"):
        load_checkpoint(path)


def test_json_is_whole_or_an_error(tmp_path):
    save_json(tmp_path / "a" / "x.json", {"loss": 0.1})
    assert load_json(tmp_path / "a" / "x.json") == {"loss": 0.1}
    (tmp_path / "a" / "x.json").write_text('{"loss": 0.')
    with pytest.raises(InputError, match=r"x.json is torn"):
        load_json(tmp_path / "a" / "x.json")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import resource, signal, sys, torch\n"
        "from bptools.finetune.checkpoint import save_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "save_checkpoint('x.pt', {'x': torch.ones(10)})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "save_checkpoint('x.pt', {'x': torch.zeros(100_000)})\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "InputError: cannot write x.pt: File too large; " in last
    assert "what was saved before is still there" in last
    assert torch.equal(load_checkpoint(tmp_path / "x.pt")["x"], torch.ones(10))
    assert sorted(os.listdir(tmp_path)) == ["script.py", "x.pt"]
