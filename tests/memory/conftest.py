import gc
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _len_torch_dispatch_stack

from bptools.memory import _contents, _lean


@pytest.fixture(autouse=True)
def nothing_is_left_on(one_thread):
    """One thread; and after every test: no mode, no hooks."""
    yield
    assert _len_torch_dispatch_stack() == 0
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


@pytest.fixture
def no_threshold(monkeypatch):
    """Small contents count too, or nothing would be exercised."""
    monkeypatch.setattr(_contents, "SMALL", 0)
    monkeypatch.setattr(_lean, "SMALL", 0)


@pytest.fixture
def eager():
    """`with eager(*mine) as kept: ...`: what autograd keeps by itself, counted as `kept_bytes` counts it."""

    class Eager(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, *mine):
            self.mine = {t.untyped_storage()._cdata for t in mine}
            self.tensors = {}
            super().__init__(self._pack, self._unpack)

        def _pack(self, t):
            if t.layout is torch.strided and t.untyped_storage()._cdata not in self.mine:
                self.tensors[t.untyped_storage()._cdata] = t.detach()
            return t, t._version

        @staticmethod
        def _unpack(packed):
            t, version = packed
            assert t._version == version, "eager refuses this, a tensor was modified in place"
            return t

        def __enter__(self):
            super().__enter__()
            return self

        @property
        def kept_bytes(self):
            return sum(t.untyped_storage().nbytes() for t in self.tensors.values())

    return Eager


@pytest.fixture
def made(fresh):
    """`with made() as all: ...`: the storages that operations make; `all.alive()` is how many bytes are alive."""

    class Made(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.storages = {}

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor) and t.layout is torch.strided:
                    s = t.untyped_storage()
                    self.storages[s._cdata] = torch.multiprocessing.reductions.StorageWeakRef(s), s.nbytes()
            return out

        def alive(self):
            gc.collect()
            return sum(n for ref, n in self.storages.values() if not ref.expired())

    return Made


@pytest.fixture
def fresh():
    """The collector sees only what the test makes, and is quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def census(fresh):
    """Return how many objects of each kind there are now."""

    def count():
        gc.collect()
        objects = gc.get_objects()
        kinds = (_contents.Content, _contents.Plan, _contents.Recipe, _contents.Saved, torch.Tensor)
        return SimpleNamespace(**{kind.__name__: sum(type(o) is kind for o in objects) for kind in kinds})

    return count


@pytest.fixture
def remade(monkeypatch):
    """A list of the functions that are run again in the backward pass, as they are."""
    calls = []
    make = _contents.Plan._make

    def noted(plan, *args, **kwargs):
        calls.append(str(plan.recipe.function))
        return make(plan, *args, **kwargs)

    monkeypatch.setattr(_contents.Plan, "_make", noted)
    return calls
