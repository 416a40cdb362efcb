"""Data in three parts, and loaders that repeat exactly."""

import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from .distributed import Parallel

LONE = Parallel()


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Put the generators of Python, NumPy and PyTorch (CPU) back at the end."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _set_generators(*numbers: int) -> None:
    number = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)


class Augmented(Dataset):
    """A data set with random transformations, whose random numbers depend on seed, epoch and index alone.

    So a sample is the same whichever process or worker loads it, and in whichever order; also after a resume.
    The generators of Python, NumPy and PyTorch (CPU) are set for each sample, and put back. In a list of
    indices, those beyond the last sample begin again at the first one, with other random numbers.

    Args:
        data: Samples, made with these generators.
        seed: Number that stands for seed and epoch; :func:`make_loader` sets it.
    """

    def __init__(self, data: Dataset, seed: int = 0):
        self.data, self.seed = data, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError(f"index: expected less than {len(self)}, got {index}")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        with _generators_kept():
            return [self._sample(index) for index in indices]

    def _sample(self, index: int) -> Any:
        _set_generators(self.seed, index)
        return self.data[index % len(self.data)]


class Mixed(Dataset):
    """A data set whose samples are mixed within each batch; :func:`make_loader` asks it for whole batches.

    The random numbers of a batch depend on seed, epoch and the batch's indices alone. Each process takes a stretch
    of the batch; it loads the sample before it too, with which the first one is mixed. So all processes together
    have the batch that one would.

    Args:
        data: Samples of a tensor and a label.
        mix: Maps a batch ``(n, ...)`` and labels ``(n,)`` to a mixed batch and probabilities ``(n, classes)``,
            each row from itself and the row before, the first from the last: ``v2.MixUp`` and ``v2.CutMix`` do.
        seed: Number that stands for seed and epoch.
        parallel: This process among those that share each batch.
    """

    def __init__(
        self, data: Dataset, mix: Callable[[Tensor, Tensor], Any], seed: int = 0, parallel: Parallel = LONE
    ):
        self.data, self.mix, self.seed, self.parallel = data, mix, seed, parallel

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        places = np.array_split(np.arange(len(indices)), self.parallel.size)[self.parallel.rank]
        near = [indices[place] for place in (places[0] - 1, *places)]
        load = getattr(self.data, "__getitems__", lambda indices: [self.data[index] for index in indices])
        own = load(near)
        with _generators_kept():
            _set_generators(self.seed, *indices)
            inputs, targets = self.mix(*default_collate(own))
        return list(zip(inputs[1:], targets[1:], strict=True))


@dataclass(frozen=True)
class Splits:
    """The three parts of a data set.

    Attributes:
        train: What is learned from.
        val: What chooses the best epoch.
        test: What the result is measured on; the same object as ``val`` where there is no third part.
        classes: Class names, by label.
        preprocessing: What was done to make an input of a file, in plain values, for whoever uses the model.
    """

    train: Dataset
    val: Dataset
    test: Dataset
    classes: tuple[str, ...]
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    def sizes(self) -> str:
        """Return the number of images in each part, in words."""
        return split_sizes(self.train, self.val, self.test)


def split_sizes(train: Sized, val: Sized, test: Sized) -> str:
    """Return the number of samples in each part, in words; ``test`` may be ``val`` itself."""
    parts = f"{len(train)} to train, {len(val)} to pick the best epoch"
    return f"{parts} and to test" if test is val else f"{parts}, {len(test)} to test"


def _told_apart(order: Tensor) -> Tensor:
    """Add the number of samples to an index for each time that it came before."""
    times: Counter[int] = Counter()
    for place, index in enumerate(order.tolist()):
        order[place] += len(order) * times[index]
        times[index] += 1
    return order


def _set_apart(_: int) -> None:
    os.setpgid(0, 0)  # Ctrl-C, and torchrun's SIGTERM, are for the main process, which still needs its data


def make_loader(
    data: Dataset,
    batch_size: int,
    *,
    seed: tuple[int, int] | None = None,
    workers: int = 0,
    parallel: Parallel | None = None,
    collate: Callable[[list], Any] | None = None,
    mix: Callable[[Tensor, Tensor], Any] | None = None,
    weights: Sequence[float] | None = None,
) -> StatefulDataLoader:
    """Return a loader whose order, and whose samples, depend on nothing but ``seed``.

    Batches differ in size by at most one, so no batch of a single image comes last to upset a batch norm. Several
    processes share each batch. The loader's ``state_dict`` is its position, and loading nothing again it goes on
    from there. PyTorch gives each worker its own seed, for Python and NumPy too, from the generator set here.

    Args:
        data: Samples of an input and a label; :class:`Augmented` ones get random numbers of this epoch.
        batch_size: Largest batch, of all processes together.
        seed: Seed and epoch of a random order, or ``None`` for the order of ``data``.
        workers: Processes that load.
        parallel: This process among those that share the batches; by default each batch is whole.
        collate: Makes a batch of a list of samples; by default tensors are stacked.
        mix: Mixes the samples of each batch, as :class:`Mixed` says.
        weights: How likely each sample is to be drawn, where ``seed`` draws as many as there are with replacement;
            by default each comes once. Augmented ones then get random numbers of their own each time.

    Raises:
        InputError: If the smallest batch has fewer samples than there are processes.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    generator, number = torch.Generator(), 0
    order = torch.arange(len(data))
    if seed is not None:
        number = seed[0] * 1_000_003 + seed[1]
        generator.manual_seed(number)
        if weights is None:
            order = order[torch.randperm(len(data), generator=generator)]
        else:
            likely = torch.tensor(weights, dtype=torch.float64)
            order = torch.multinomial(likely, len(data), replacement=True, generator=generator)
        if isinstance(data, Augmented):
            data = Augmented(data.data, number)
            order = order if weights is None else _told_apart(order)
    batches = [chunk.tolist() for chunk in order.tensor_split(-(-len(data) // batch_size))]
    parallel = parallel or LONE
    shares = [parallel.share(batch) for batch in batches]
    if mix is None:
        batches = shares
    else:
        data = Mixed(data, mix, number, parallel)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        return StatefulDataLoader(
            data, batch_sampler=batches, num_workers=workers, collate_fn=collate, generator=generator,
            worker_init_fn=_set_apart,
        )  # fmt: skip
