"""Images: scikit-learn's digits, plain and inverted, and any folder of images."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from .augment import augmentation
from .data import Augmented, Splits
from .errors import InputError, suggestion


class Transformed(Dataset):
    """Samples of ``data``, with ``transform`` applied to the input."""

    def __init__(self, data: Dataset, transform: Callable[[Tensor], Tensor]):
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.data[index]
        return self.transform(image), label


def labels_of(data: Dataset) -> list[int]:
    """Return the labels of a part of :func:`digits` or :func:`image_folder`, without reading an image."""
    if isinstance(data, (Augmented, Transformed)):
        return labels_of(data.data)
    if isinstance(data, Subset):
        labels = labels_of(data.dataset)
        return [labels[index] for index in data.indices]
    return data.tensors[1].tolist() if isinstance(data, TensorDataset) else list(data.targets)


def _one_of(positive: str, classes: Sequence[str]) -> int:
    """Return the label of the class ``positive``."""
    if positive not in classes:
        some = ", ".join([*classes[:10], *(["..."] if len(classes) > 10 else [])])
        raise InputError(f"--positive {positive!r}: expected one of {some}{suggestion(positive, classes)}")
    return list(classes).index(positive)


def digits(
    seed: int, labels_per_class: int = 5, *, positive: str | None = None, augment: str = "none", erase: float = 0.0
) -> tuple[Splits, Splits]:
    """Return scikit-learn's digits as a source task, and inverted as a target task with few labels.

    Half of the 1,797 images are the source. The other half, inverted, gives ``labels_per_class`` images a
    class to train, as many to pick the best epoch, and all the rest to test. No image is in two parts.

    Args:
        seed: Draws the parts; each keeps the shares of the classes.
        labels_per_class: Training images a class in the target task, 1 to 40.
        positive: A digit that is to be told from all others in the target task, a tenth of the images. Of each
            digit then 30 or more pick the epoch, for they fix a threshold too.
        augment: Random transformations of training images, as :func:`bptools.finetune.augmentation` names them.
        erase: Probability that a rectangle of a training image is erased.

    Returns:
        Source and target, with images ``(1, 8, 8)`` from 0 to 1 in float32.

    Raises:
        ValueError: If ``labels_per_class`` is out of range.
        InputError: If ``positive`` is no digit.
    """
    if not 1 <= labels_per_class <= 40:
        raise ValueError(f"labels_per_class: expected 1 to 40, got {labels_per_class}")
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16  # (n, 1, 8, 8)
    labels = data.target
    classes = tuple(str(c) for c in range(10))
    is_one = labels == _one_of(positive, classes) if positive is not None else None

    def split(index: np.ndarray, size: float | int) -> list[np.ndarray]:
        return train_test_split(index, test_size=size, stratify=labels[index], random_state=seed)

    def splits(
        parts: Sequence[np.ndarray], pixels: Tensor, task: np.ndarray, names: tuple[str, ...], invert: bool
    ) -> Splits:
        train, *others = (TensorDataset(pixels[index], torch.tensor(task[index])) for index in parts)
        changes = augmentation(augment, erase, fill=float(invert))
        if changes:
            train = Augmented(Transformed(train, v2.Compose(changes)))
        made = {"colour": "grey", "size": [8, 8], "scale": 1 / 16, "invert": invert}
        return Splits(train, *others, names, made)

    source, target = split(np.arange(len(labels)), 0.5)
    source_train, rest = split(source, 0.2)
    source_val, source_test = split(rest, 0.5)
    picking = labels_per_class if positive is None else max(30, labels_per_class)
    each = [target[labels[target] == c] for c in range(10)]  # target is shuffled
    train = np.concatenate([some[:labels_per_class] for some in each])
    val = np.concatenate([some[labels_per_class : labels_per_class + picking] for some in each])
    test = np.setdiff1d(target, np.concatenate([train, val]))
    task = (labels, classes) if positive is None else (is_one.astype(int), ("other", positive))
    plain = splits((source_train, source_val, source_test), images, labels, classes, invert=False)
    return plain, splits((train, val, test), 1 - images, *task, invert=True)


def open_image(path: str) -> Image.Image:
    """Read an image as RGB, or raise an :class:`InputError` that names the file."""
    try:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")
    except UnidentifiedImageError as error:
        raise InputError(f"cannot read image {path}: not an image of a known format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read image {path}: {error}") from error


def _folder(path: Path, transform: v2.Transform, positive: str | None) -> ImageFolder:
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
    if positive is not None:
        label, names = _one_of(positive, folder.classes), folder.classes
        folder.samples = [(file, int(target == label)) for file, target in folder.samples]
        folder.targets = [target for _, target in folder.samples]
        folder.classes = [names[1 - label] if len(names) == 2 else "other", positive]
    return folder


def image_folder(
    path: str | Path,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    holdout: float = 0.3,
    seed: int = 0,
    positive: str | None = None,
    augment: str = "none",
    erase: float = 0.0,
) -> Splits:
    """Read an image folder: one folder a class, or ``train`` and ``val`` (and ``test``) with one a class each.

    Without ``train`` and ``val``, the share ``holdout`` of each class is set aside, half to pick the best
    epoch and half to test. Training images are cropped at random and mirrored; the others are resized and
    cropped at the centre. Images ``(3, size, size)``, float32, are normalised by ``mean`` and ``std``.

    Args:
        path: The folder.
        size: Height and width in pixels.
        mean: Of each channel.
        std: Of each channel.
        holdout: Share that is set aside.
        seed: Draws what is set aside.
        positive: A class that is to be told from all others, which makes two classes, this one the second.
        augment: More random transformations of training images, which :func:`bptools.finetune.augmentation` names.
        erase: Probability that a rectangle of a training image is erased.

    Raises:
        InputError: If a folder is missing, there is one class only, a class has no image or too few to split,
            the parts' classes differ, or ``positive`` is none of them. A corrupt image raises one when it is read.
    """
    path = Path(path)
    if not 0 < holdout < 1:
        raise ValueError(f"holdout: expected a share between 0 and 1, got {holdout}")
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    cropped = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    varied = v2.Compose([*cropped, *augmentation(augment), *finish, *augmentation("none", erase)])
    plain = v2.Compose([v2.Resize(round(size * 1.14), antialias=True), v2.CenterCrop(size), *finish])
    made = {
        "colour": "RGB", "resize shorter side": round(size * 1.14), "resize by": "bilinear, antialiased",
        "crop at the centre": [size, size], "scale": 1 / 255, "mean": list(mean), "std": list(std),
    }  # fmt: skip
    if (path / "train").is_dir() or (path / "val").is_dir():
        train, val = _folder(path / "train", varied, positive), _folder(path / "val", plain, positive)
        test = _folder(path / "test", plain, positive) if (path / "test").is_dir() else val
        for part in (val, test):
            if part.classes != train.classes:
                odd = sorted(set(part.classes) ^ set(train.classes))[0]
                raise InputError(f"{path / 'train'} and {part.root} differ in their classes, such as {odd!r}")
        return Splits(Augmented(train), val, test, tuple(train.classes), made)

    augmented, resized = _folder(path, varied, positive), _folder(path, plain, positive)
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
    return Splits(Augmented(train), val, test, tuple(resized.classes), made)
