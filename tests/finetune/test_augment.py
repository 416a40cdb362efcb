import pytest
import torch
from torchvision.transforms import v2

from bptools.finetune import augmentation, mixing


def test_names_and_their_transformations():
    assert augmentation("none") == []
    kinds = {"affine": v2.RandomAffine, "randaugment": v2.RandAugment, "trivial": v2.TrivialAugmentWide,
             "auto": v2.AutoAugment}  # fmt: skip
    for name, kind in kinds.items():
        assert [type(t) for t in augmentation(name, 0.5)] == [kind, v2.RandomErasing]
    with pytest.raises(ValueError, match=r"name: expected none, affine, .* got 'rand'"):
        augmentation("rand")
    with pytest.raises(ValueError, match=r"name: expected none, mixup, cutmix or both, got 'mix'"):
        mixing("mix", 1.0, 3)
    assert mixing("none", 1.0, 3) is None


def test_what_comes_in_from_beyond_the_edges():
    (affine,) = augmentation("affine", fill=1.0)
    torch.manual_seed(0)
    assert all(affine(torch.ones(1, 8, 8)).min() > 0.99 for _ in range(20))
    (affine,) = augmentation("affine")
    assert any(affine(torch.ones(1, 8, 8)).min() < 0.5 for _ in range(20))


def test_both_does_one_or_the_other():
    mix = mixing("both", 1.0, 2)
    images, labels = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 8, 8).clone(), torch.tensor([0, 1])
    torch.manual_seed(0)
    pure = [bool(((x == 0) | (x == 1)).all()) for x, _ in (mix(images, labels) for _ in range(30))]
    assert 5 < sum(pure) < 25  # CutMix leaves each pixel as it was
