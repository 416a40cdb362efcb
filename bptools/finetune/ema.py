"""An exponential moving average of the weights, which often generalises better than the last of them.

After step n each average a of a weight w becomes a + (1 - d)(w - a) with d = min(decay, (1 + n) / (10 + n)): the
warm-up lets the average leave the first weights behind, where ``decay`` alone would remember them for
1 / (1 - decay) steps.

Source: Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, SIAM J. Control Optim. 30
(1992); the warm-up is that of TensorFlow's ``ExponentialMovingAverage``.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages of a model's weights over the steps.

    A parameter that is frozen is left alone, so one that a later phase unfreezes starts from its value then.
    Buffers of floating point, such as the running statistics of batch norms, are averaged along; those that are
    not finite (masks) are not. Weights of less than float32 are averaged in float32, in which small changes last.

    Args:
        model: The model, on its device, and sharded if it is to be.
        decay: d above: the average looks back about 1 / (1 - decay) steps.
        parameters: Names of the parameters to average, such as those that some phase trains; by default all of
            floating point.

    Attributes:
        tensors: The averages by the model's names, always the same tensors: a checkpoint is loaded into them.
        updates: n above, in :meth:`state_dict`.

    Raises:
        ValueError: If ``decay`` is not in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, *, parameters: Collection[str] | None = None):
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay}")
        self.decay, self.updates = decay, 0
        chosen = {n: p for n, p in model.named_parameters() if parameters is None or n in parameters}
        finite = {n: b for n, b in model.named_buffers() if b.isfinite().all()}
        self.tensors = {
            name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
            for name, tensor in (chosen | finite).items()
            if tensor.is_floating_point()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the averages towards the weights of ``model``, after a step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        moving = [(a, w.to(a.dtype)) for name, (a, w) in self._pairs(model).items() if name not in frozen]
        if moving:
            torch._foreach_lerp_([a for a, _ in moving], [w for _, w in moving], 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Have ``model`` be the averages while the context lasts, and then be itself again, to the bit."""
        pairs = self._pairs(model).values()
        own = [value.clone() for _, value in pairs]
        try:
            for average, value in pairs:
                value.copy_(average)
            yield
        finally:
            for (_, value), before in zip(pairs, own, strict=True):
                value.copy_(before)

    def _pairs(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """Each average with the tensor of ``model`` that it is of."""
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        return {name: (average, own[name].detach()) for name, average in self.tensors.items()}

    def state_dict(self) -> dict:
        """Return what is not in :attr:`tensors`."""
        return {"updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.updates = state["updates"]
