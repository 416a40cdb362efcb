"""Data in three parts, and loaders that repeat exactly."""

import os
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from .distributed import Parallel


class Augmented(Dataset):
    """A data set with random transformations, whose random numbers depend on seed, epoch and index alone.

    So a sample is the same whichever process or worker loads it, and in whichever order; also after a resume.
    The generators of Python, NumPy and PyTorch (CPU) are set for each sample, and put back.

    Args:
        data: Samples, made with these generators.
        seed: Number that stands for seed and epoch; :func:`make_loader` sets it.
    """

    def __init__(self, data: Dataset, seed: int = 0):
        self.data, self.seed = data, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            return [self._sample(index) for index in indices]
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])

    def _sample(self, index: int) -> Any:
        number = int(np.random.SeedSequence((self.seed, index)).generate_state(1)[0])
        random.seed(number)
        np.random.seed(number)
        torch.default_generator.manual_seed(number)
        return self.data[index]


@dataclass(frozen=True)
class Splits:
    """The three parts of a data set.

    Attributes:
        train: What is learned from.
        val: What chooses the best epoch.
        test: What the result is measured on; the same object as ``val`` where there is no third part.
        classes: Class names, by label.
    """

    train: Dataset
    val: Dataset
    test: Dataset
    classes: tuple[str, ...]

    def sizes(self) -> str:
        """Return the number of images in each part, in words."""
        parts = f"{len(self.train)} to train, {len(self.val)} to pick the best epoch"
        return f"{parts} and to test" if self.test is self.val else f"{parts}, {len(self.test)} to test"


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

    Raises:
        InputError: If the smallest batch has fewer samples than there are processes.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    generator = torch.Generator()
    order = torch.arange(len(data))
    if seed is not None:
        number = seed[0] * 1_000_003 + seed[1]
        generator.manual_seed(number)
        order = order[torch.randperm(len(data), generator=generator)]
        data = Augmented(data.data, number) if isinstance(data, Augmented) else data
    batches = [chunk.tolist() for chunk in order.tensor_split(-(-len(data) // batch_size))]
    if parallel is not None:
        batches = [parallel.share(batch) for batch in batches]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        return StatefulDataLoader(
            data, batch_sampler=batches, num_workers=workers, collate_fn=collate, generator=generator,
            worker_init_fn=_set_apart,
        )  # fmt: skip
