"""Autograd's graph, and the modules that made it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from bptools._modules import Modules

Left = Callable[[nn.Module, str, list[Tensor], list[Node]], None]


class _Begun(NamedTuple):
    """When a module began to run: the number of the node to come, and of the backward pass, -1 outside of one."""

    node: int
    task: int


class Graph(Modules):
    """Knows of each node which module made it: the innermost one that was running.

    Args:
        left: called when a module has run, with it, its path, the tensors it returned, and the nodes that it made,
            without those of the modules within it.
    """

    def __init__(self, left: Left | None = None) -> None:
        super().__init__()
        self.left, self.begun = left, []
        self._made_in = f"bptools.diagnose.{id(self)}"  # in a node's metadata

    def module_of(self, node: Node) -> str:
        """The path of the module that made a node; `""` if none did."""
        return node.metadata.get(self._made_in, "")

    @property
    def forward(self) -> bool:
        """Whether a module runs now, and not a backward pass that was called within it."""
        return bool(self.running) and self.begun[-1].task == torch._C._current_graph_task_id()

    def _enter(self, module: nn.Module, args: Any) -> None:
        super()._enter(module, args)
        if len(self.running) > len(self.begun):
            self.begun.append(_Begun(torch.autograd._get_sequence_nr(), torch._C._current_graph_task_id()))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._here() and self.running and self.running[-1] is module:
            results = [*_tensors(output)]
            made, seen, todo = [], set(), [t.grad_fn for t in results]
            while todo:
                node = todo.pop()
                if node is None or node in seen or node._sequence_nr() < self.begun[-1].node:
                    continue  # the last is older than this call
                seen.add(node)
                todo += [other for other, _ in node.next_functions]
                if self._made_in not in node.metadata:  # else a module within made it
                    node.metadata[self._made_in] = self.names[module]
                    made.append(node)
            if self.left is not None:
                self.left(module, self.names[module], results, made)
        super()._leave(module, args, output)
        del self.begun[len(self.running) :]


def _tensors(output: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for field in fields(leaf):
                yield from _tensors(getattr(leaf, field.name, None))
