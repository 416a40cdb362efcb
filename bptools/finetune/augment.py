"""Random transformations of images, and of batches of them: torchvision's, by name.

Sources: Cubuk et al., arXiv 1805.09501 (AutoAugment) and 1909.13719 (RandAugment); Müller and Hutter, arXiv
2103.10158 (TrivialAugment); Zhong et al., arXiv 1708.04896 (random erasing); Zhang et al., arXiv 1710.09412
(mixup); Yun et al., arXiv 1905.04899 (CutMix).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torchvision.transforms import v2

AUGMENTS: dict[str, Callable[..., v2.Transform]] = {
    "affine": lambda fill: v2.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), fill=fill),
    "randaugment": lambda fill: v2.RandAugment(fill=fill),
    "trivial": lambda fill: v2.TrivialAugmentWide(fill=fill),
    "auto": lambda fill: v2.AutoAugment(fill=fill),
}


def augmentation(name: str, erase: float = 0.0, *, fill: float = 0) -> list[v2.Transform]:
    """Return random transformations of one image, in a data set that :class:`bptools.finetune.Augmented` wraps.

    Args:
        name: ``"none"``; ``"affine"``, small shifts, turns and zooms, for what must not be mirrored or recoloured;
            ``"randaugment"``; ``"trivial"``, TrivialAugmentWide; ``"auto"``, AutoAugment's policy for ImageNet.
        erase: Probability that a rectangle is erased, which takes tensors.
        fill: What comes in from beyond the edges.

    Raises:
        ValueError: If there is no such name, or ``erase`` is no probability.
    """
    if name != "none" and name not in AUGMENTS:
        raise ValueError(f"name: expected none, {', '.join(AUGMENTS)}, got {name!r}")
    chosen = [] if name == "none" else [AUGMENTS[name](fill)]
    return chosen + ([v2.RandomErasing(erase)] if erase else [])


def mixing(name: str, alpha: float, classes: int) -> Callable[[Tensor, Tensor], Any] | None:
    """Return what mixes each sample of a batch with the one before it; ``make_loader`` takes it as ``mix``.

    Args:
        name: ``"mixup"`` adds images, ``"cutmix"`` pastes a rectangle, ``"both"`` does one or the other at random;
            ``"none"`` gives ``None``.
        alpha: Shares are drawn from Beta(alpha, alpha): 1 for any share alike, less for most of one image.
        classes: Number of classes, of the probabilities that labels become.

    Raises:
        ValueError: If there is no such name.
    """
    if name not in ("none", "mixup", "cutmix", "both"):
        raise ValueError(f"name: expected none, mixup, cutmix or both, got {name!r}")
    options = {"alpha": alpha, "num_classes": classes}
    mixes = {
        "none": lambda: None,
        "mixup": lambda: v2.MixUp(**options),
        "cutmix": lambda: v2.CutMix(**options),
        "both": lambda: v2.RandomChoice([v2.MixUp(**options), v2.CutMix(**options)]),
    }
    return mixes[name]()
