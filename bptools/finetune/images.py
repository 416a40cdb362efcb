"""Images: scikit-learn's digits, plain and inverted, and any folder of images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from .data import Augmented, Splits
from .errors import InputError


def digits(seed: int, labels_per_class: int = 5) -> tuple[Splits, Splits]:
    """Return scikit-learn's digits as a source task, and inverted as a target task with few labels.

    Half of the 1,797 images are the source. The other half, inverted, gives ``labels_per_class`` images a
    class to train, as many to pick the best epoch, and all the rest to test. No image is in two parts.

    Args:
        seed: Draws the parts; each keeps the shares of the classes.
        labels_per_class: Training images a class in the target task, 1 to 40.

    Returns:
        Source and target, with images ``(1, 8, 8)`` from 0 to 1 in float32.

    Raises:
        ValueError: If ``labels_per_class`` is out of range.
    """
    if not 1 <= labels_per_class <= 40:
        raise ValueError(f"labels_per_class: expected 1 to 40, got {labels_per_class}")
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16  # (n, 1, 8, 8)
    labels = data.target
    classes = tuple(str(c) for c in range(10))

    def split(index: np.ndarray, size: float | int) -> list[np.ndarray]:
        return train_test_split(index, test_size=size, stratify=labels[index], random_state=seed)

    def subset(index: np.ndarray, pixels: Tensor) -> TensorDataset:
        return TensorDataset(pixels[index], torch.tensor(labels[index]))

    source, target = split(np.arange(len(labels)), 0.5)
    source_train, rest = split(source, 0.2)
    source_val, source_test = split(rest, 0.5)
    few = [target[labels[target] == c][: 2 * labels_per_class] for c in range(10)]  # target is shuffled
    train = np.concatenate([f[:labels_per_class] for f in few])
    val = np.concatenate([f[labels_per_class:] for f in few])
    test = np.setdiff1d(target, np.concatenate([train, val]))
    inverted = 1 - images
    return (
        Splits(*(subset(i, images) for i in (source_train, source_val, source_test)), classes),
        Splits(*(subset(i, inverted) for i in (train, val, test)), classes),
    )


def open_image(path: str) -> Image.Image:
    """Read an image as RGB, or raise an :class:`InputError` that names the file."""
    try:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")
    except UnidentifiedImageError as error:
        raise InputError(f"cannot read image {path}: not an image of a known format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read image {path}: {error}") from error


def _folder(path: Path, transform: v2.Transform) -> ImageFolder:
    if not path.is_dir():
        raise InputError(f"no such folder: {path}")
    if not any(p.is_dir() for p in path.iterdir()):
        raise InputError(f"{path}: expected one folder of images for each class, found no folder")
    folder = ImageFolder(str(path), transform, loader=open_image, allow_empty=True)
    counts = np.bincount(folder.targets, minlength=len(folder.classes))
    for name, count in zip(folder.classes, counts, strict=True):
        if count == 0:
            raise InputError(f"class folder without an image: {path / name}")
    if len(folder.classes) < 2:
        raise InputError(f"{path}: expected 2 or more classes, found only {folder.classes[0]!r}")
    return folder


def image_folder(
    path: str | Path,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    holdout: float = 0.3,
    seed: int = 0,
) -> Splits:
    """Read an image folder: one folder a class, or ``train`` and ``val`` (and ``test``) with one a class each.

    Without ``train`` and ``val``, the share ``holdout`` of each class is set aside, half to pick the best
    epoch and half to test. Training images are cropped at random and mirrored; the others are resized and
    cropped at the centre. Images ``(3, size, size)``, float32, are normalised by ``mean`` and ``std``.

    Raises:
        InputError: If a folder is missing, there is one class only, a class has no image or too few to split,
            or the parts' classes differ. A corrupt image raises one when it is read.
    """
    path = Path(path)
    if not 0 < holdout < 1:
        raise ValueError(f"holdout: expected a share between 0 and 1, got {holdout}")
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    augment = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *finish])
    plain = v2.Compose([v2.Resize(round(size * 1.14), antialias=True), v2.CenterCrop(size), *finish])
    if (path / "train").is_dir() or (path / "val").is_dir():
        train, val = _folder(path / "train", augment), _folder(path / "val", plain)
        test = _folder(path / "test", plain) if (path / "test").is_dir() else val
        for part in (val, test):
            if part.classes != train.classes:
                odd = sorted(set(part.classes) ^ set(train.classes))[0]
                raise InputError(f"{path / 'train'} and {part.root} differ in their classes, such as {odd!r}")
        return Splits(Augmented(train), val, test, tuple(train.classes))

    augmented, resized = _folder(path, augment), _folder(path, plain)
    generator = np.random.default_rng(seed)
    parts: list[list[int]] = [[], [], []]
    for label, name in enumerate(resized.classes):
        index = generator.permutation(np.flatnonzero(np.array(resized.targets) == label)).tolist()
        if len(index) < 3:
            raise InputError(f"class {name!r} has {len(index)} image(s); splitting {path} takes 3 or more")
        held = min(max(2, round(len(index) * holdout)), len(index) - 1)
        for part, some in zip(parts, (index[held:], index[: held // 2], index[held // 2 : held]), strict=True):
            part.extend(some)
    train, val, test = Subset(augmented, parts[0]), Subset(resized, parts[1]), Subset(resized, parts[2])
    return Splits(Augmented(train), val, test, tuple(resized.classes))
