"""A picture of what a classifier got wrong while it was surest: often a wrong label, or a class it cannot know."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset

from .card import confusion_figure
from .data import Splits
from .evaluation import Evaluation


def _short(name: str) -> str:
    return name if len(name) <= 15 else f"{name[:7]}…{name[-7:]}"  # classes often begin alike, or end so


def _displayable(image: Tensor) -> np.ndarray:
    """Return an image of ``(channels, height, width)``, however normalised, as grey or RGB from 0 to 1."""
    image = image.detach().cpu().float()
    image = image[:3].movedim(0, -1) if len(image) >= 3 else image[0]
    low, high = image.aminmax()
    return ((image - low) / (high - low).clamp_min(1e-12)).numpy()


def mistakes_figure(data: Dataset, test: Evaluation, classes: Sequence[str], *, most: int = 16) -> Figure:
    """Return a figure of the images that were misclassified with the most confidence, the surest first.

    Args:
        data: What ``test`` was measured on: images ``(channels, height, width)``, each with a label.
        test: Targets, predictions and confidences, in the order of ``data``.
        classes: Class names by label.
        most: How many images at most.
    """
    triples = enumerate(zip(test.targets, test.predictions, test.confidences, strict=True))
    wrong = [(confidence, i, t, p) for i, (t, p, confidence) in triples if t != p]
    chosen = sorted(wrong, key=lambda mistake: -mistake[0])[:most]
    if not chosen:
        figure = Figure(figsize=(5, 1.5))
        figure.text(0.5, 0.5, f"no mistakes in {len(test.targets)} images", ha="center", va="center", fontsize=12)
        return figure
    columns = math.ceil(math.sqrt(len(chosen)))
    rows = math.ceil(len(chosen) / columns)
    long = any(len(classes[t]) + len(classes[p]) > 12 for _, _, t, p in chosen)
    figure = Figure(figsize=(max(4.5, 1.9 * columns), (2.4 if long else 2.15) * rows + 0.6), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    for axes, (confidence, i, target, prediction) in zip(grid, chosen, strict=False):
        image = _displayable(data[i][0])
        axes.axis("on")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("silver")
        axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest" if len(image) < 64 else None)
        true, predicted = _short(classes[target]), _short(classes[prediction])
        words = f"{true} →\n{predicted}" if long else f"{true} → {predicted}"
        axes.set_title(f"{words}  {100 * confidence:.0f} %", fontsize=10)
    which = f"the {len(chosen)} surest of {len(wrong)}" if len(wrong) > len(chosen) else f"all {len(wrong)}"
    figure.suptitle(f"Mistakes (true → predicted)\n{which}, in {len(test.targets)} images", fontsize=11)
    return figure


def image_figures(splits: Splits, test: Evaluation) -> dict[str, Figure]:
    """Return the pictures of a classifier of images on its test data: confusion matrix and worst mistakes."""
    confusion = confusion_figure(test.targets, test.predictions, splits.classes)
    return {"confusion matrix": confusion, "mistakes": mistakes_figure(splits.test, test, splits.classes)}
