"""A picture of what a classifier got most confidently wrong: mislabelled images show up first."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset


def _pixels(image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> np.ndarray:
    """Return ``image`` ``(c, h, w)`` as ``(h, w)`` or ``(h, w, 3)`` from 0 to 1."""
    image = image.detach().float().cpu()
    if mean is not None and std is not None:
        shape = (-1, 1, 1)
        image = image * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    else:
        low, high = image.aminmax()
        image = (image - low) / (high - low).clamp(min=1e-12)
    image = image.clamp(0, 1)
    return (image.permute(1, 2, 0) if len(image) == 3 else image[0]).numpy()


def mistakes_figure(
    data: Dataset, targets: Sequence[int], predictions: Sequence[int], classes: Sequence[str],
    *, confidences: Sequence[float] | None = None, most: int = 16,
    mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
) -> Figure:  # fmt: skip
    """Return a grid of the wrongly classified images, the most confident first.

    Args:
        data: Samples of an image ``(c, h, w)``, grey or RGB, and a label, in the order of ``targets``.
        targets: True labels.
        predictions: Predicted labels.
        classes: Names by label.
        confidences: Probability of each predicted label, from 0 to 1; without them the first mistakes are shown.
        most: Images at most.
        mean: What was subtracted from each channel, to be undone together with ``std``; without the two, each
            image is stretched to the full range.
        std: What each channel was divided by.
    """
    wrong = [i for i, (t, p) in enumerate(zip(targets, predictions, strict=True)) if t != p]
    if confidences is not None:
        wrong.sort(key=lambda i: -confidences[i])
    shown = wrong[:most]
    columns = min(4, len(shown)) or 1
    rows = math.ceil(len(shown) / columns) or 1
    figure = Figure(figsize=(max(4.5, 1.9 * columns), 0.6 + 2.0 * rows), layout="constrained")
    total = len(targets)
    if not shown:
        figure.text(0.5, 0.5, f"no mistakes in {total} images", ha="center", va="center", fontsize=11)
        return figure
    order = "the most confident first" if confidences is not None else "the first ones"
    some = f", {len(shown)} shown" if len(shown) < len(wrong) else ""
    figure.suptitle(f"{len(wrong)} of {total} images wrong{some}\n{order}; true → predicted", fontsize=10)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, i in zip(grid, shown, strict=False):
        axes.imshow(_pixels(data[i][0], mean, std), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        sure = f" ({confidences[i]:.2f})" if confidences is not None else ""
        names = f"{classes[targets[i]]} → {classes[predictions[i]]}"
        text = f"{names}{sure}" if len(names) <= 14 else names.replace(" → ", "\n→ ") + sure
        axes.text(0.5, -0.04, text, transform=axes.transAxes, ha="center", va="top", fontsize=8)
    return figure
