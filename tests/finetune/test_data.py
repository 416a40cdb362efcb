import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

from bptools.finetune import (
    Augmented,
    InputError,
    Parallel,
    digits,
    image_folder,
    labels_of,
    make_loader,
    mixing,
    one_line,
)

FORMAT = (16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # size, mean, std


def draw(folder, count, colour=(255, 0, 0)):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (20, 24), colour).save(folder / f"{i}.png")


@pytest.fixture
def flat(tmp_path):
    draw(tmp_path / "blue", 6, (0, 0, 255))
    draw(tmp_path / "red", 10)
    return tmp_path


def test_digits_never_share_an_image():
    source, target = digits(3)
    assert [len(part) for part in (target.train, target.val, target.test)] == [50, 50, 799]
    parts = [*(1 - p.tensors[0] for p in (source.train, source.val, source.test)),
             *(p.tensors[0] for p in (target.train, target.val, target.test))]  # fmt: skip
    assert sum(map(len, parts)) == 1797
    everything = torch.cat(parts)
    assert everything.shape == (1797, 1, 8, 8)
    assert len(everything.flatten(1).unique(dim=0)) == 1797
    assert torch.bincount(target.train.tensors[1]).tolist() == [5] * 10
    assert 0 <= everything.min() <= everything.max() <= 1


def test_digits_follow_the_seed():
    first, again, other = digits(0)[1], digits(0)[1], digits(1)[1]
    assert torch.equal(first.train.tensors[0], again.train.tensors[0])
    assert not torch.equal(first.train.tensors[0], other.train.tensors[0])
    assert first.sizes() == "50 to train, 50 to pick the best epoch, 799 to test"
    with pytest.raises(ValueError, match=r"labels_per_class: .* got 0"):
        digits(0, 0)


def test_one_folder_is_split_by_class(flat):
    splits = image_folder(flat, *FORMAT, holdout=0.5, seed=1)
    assert splits.classes == ("blue", "red")
    assert [len(p) for p in (splits.train, splits.val, splits.test)] == [8, 3, 5]
    index = [i for p in (splits.train.data, splits.val, splits.test) for i in p.indices]
    assert sorted(index) == list(range(16))
    for part in (splits.train, splits.val, splits.test):
        assert {label for _, label in part} == {0, 1}
    image, label = splits.test[0]
    assert (image.shape, image.dtype, label) == ((3, 16, 16), torch.float32, 0)
    assert image[:, 8, 8].tolist() == [-1.0, -1.0, 1.0]


def test_train_val_and_test_folders(tmp_path):
    for part in ("train", "val"):
        draw(tmp_path / part / "a", 2)
        draw(tmp_path / part / "b", 2)
        draw(tmp_path / part / "c", 1)
    splits = image_folder(tmp_path, *FORMAT)
    assert splits.test is splits.val
    assert splits.sizes() == "5 to train, 5 to pick the best epoch and to test"
    draw(tmp_path / "test" / "a", 1)
    draw(tmp_path / "test" / "c", 1)
    with pytest.raises(InputError, match="differ in their classes, such as 'b'"):
        image_folder(tmp_path, *FORMAT)
    draw(tmp_path / "test" / "b", 1)
    assert len(image_folder(tmp_path, *FORMAT).test) == 3


def test_missing_and_empty_folders(tmp_path, flat):
    with pytest.raises(InputError, match=r"no such folder: .*nowhere"):
        image_folder(tmp_path / "nowhere", *FORMAT)
    with pytest.raises(InputError, match="found no folder"):
        image_folder(flat / "red", *FORMAT)
    (flat / "green").mkdir()
    with pytest.raises(InputError, match=r"class folder without an image: .*green"):
        image_folder(flat, *FORMAT)
    draw(flat / "green" / "x", 2)
    with pytest.raises(InputError, match=r"class 'green' has 2 image\(s\)"):
        image_folder(flat, *FORMAT)
    draw(tmp_path / "one" / "a", 3)
    with pytest.raises(InputError, match=r"one: expected 2 or more classes, found only 'a'"):
        image_folder(tmp_path / "one", *FORMAT)
    with pytest.raises(ValueError, match=r"holdout: .* got 1"):
        image_folder(flat, *FORMAT, holdout=1.0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(flat, workers):
    path = flat / "red" / "3.png"
    path.write_bytes(path.read_bytes()[:60])
    splits = image_folder(flat, *FORMAT)
    everything = ConcatDataset([splits.train, splits.val, splits.test])
    with pytest.raises(InputError) as caught:
        list(make_loader(everything, 4, workers=workers))
    assert one_line(caught.value).startswith(f"cannot read image {path}: ")


def test_batches_differ_by_one_at_most():
    data = TensorDataset(torch.arange(33), torch.zeros(33))
    sizes = [len(x) for x, _ in make_loader(data, 16, seed=(0, 0))]
    assert sizes == [11, 11, 11]
    assert [len(x) for x, _ in make_loader(data, 64)] == [33]
    with pytest.raises(ValueError, match=r"batch_size: .* got 0"):
        make_loader(data, 0)


class Noise(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return np.random.rand(), torch.rand(()).item()


def test_order_and_workers_depend_on_seed_and_epoch_alone():
    data = TensorDataset(torch.arange(20), torch.zeros(20))

    def order(seed, epoch):
        torch.manual_seed(99)  # the global generator plays no part
        return torch.cat([x for x, _ in make_loader(data, 6, seed=(seed, epoch))]).tolist()

    assert order(1, 2) == order(1, 2)
    assert sorted(order(1, 2)) == list(range(20))
    assert len({tuple(order(s, e)) for s in (1, 2) for e in (0, 1)}) == 4
    assert torch.cat([x for x, _ in make_loader(data, 6)]).tolist() == list(range(20))


def test_workers_do_not_share_one_numpy_seed():
    def numbers(epoch):
        batches = list(make_loader(Noise(), 2, seed=(0, epoch), workers=2))
        return torch.cat([x for x, _ in batches]).tolist()

    assert len(set(numbers(0))) == 8  # not each worker the same
    assert numbers(0) == numbers(0)
    assert not set(numbers(0)) & set(numbers(1))  # not each epoch the same


class Drawn(Dataset):
    """Draws from the generators of torch, NumPy and Python."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.tensor([i, torch.rand(()), np.random.rand(), random.random()]), 0


def samples(loader):
    return {int(row[0]): row.tolist() for inputs, _ in loader for row in inputs}


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    data = Augmented(Drawn())
    whole = samples(make_loader(data, 5, seed=(3, 1)))
    assert len({row[1] for row in whole.values()}) == 12
    assert samples(make_loader(data, 5, seed=(3, 1), workers=2)) == whole
    assert samples(make_loader(data, 3, seed=(3, 1))) == whole  # in other batches
    shares = [samples(make_loader(data, 4, seed=(3, 1), parallel=Parallel(rank, 2))) for rank in (0, 1)]
    assert shares[0] | shares[1] == whole  # over two processes
    other = samples(make_loader(data, 5, seed=(3, 2)))
    assert all(other[i][1:] != whole[i][1:] for i in range(12))


def test_augmentation_leaves_the_generators_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(make_loader(Augmented(Drawn()), 5, seed=(0, 0)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_from_its_position_without_loading_again(workers):
    def make():
        return make_loader(Augmented(Drawn()), 2, seed=(0, 0), workers=workers)

    whole = [inputs.tolist() for inputs, _ in make()]
    first = make()
    stream = iter(first)
    begun = [next(stream)[0].tolist() for _ in range(4)]
    rest = make()
    rest.load_state_dict(first.state_dict())
    assert begun + [inputs.tolist() for inputs, _ in rest] == whole


def test_processes_share_each_batch():
    parts = [make_loader(Drawn(), 5, seed=(0, 0), parallel=Parallel(rank, 3)) for rank in range(3)]
    together = [
        sorted(i for b in batches for i in b) for batches in zip(*(p.batch_sampler for p in parts), strict=True)
    ]
    assert together == [sorted(batch) for batch in make_loader(Drawn(), 5, seed=(0, 0)).batch_sampler]
    with pytest.raises(InputError, match=r"--batch-size: expected at least one item for each of 3 processes"):
        make_loader(Drawn(), 2, seed=(0, 0), parallel=Parallel(0, 3))


class Picture(Dataset):
    """A coloured image of noise that is drawn anew each time, whose class is its index modulo 3."""

    def __len__(self):
        return 11

    def __getitem__(self, i):
        return i + torch.rand(3, 6, 6), i % 3


@pytest.mark.parametrize("name", ["mixup", "cutmix", "both"])
def test_mixing_depends_on_seed_epoch_and_batch_alone(name):
    data, mix = Augmented(Picture()), mixing(name, 1.0, 3)

    def batches(**options):
        torch.manual_seed(7)  # the global generator plays no part
        return list(make_loader(data, 4, mix=mix, **{"seed": (3, 1)} | options))

    whole = batches()
    assert [len(x) for x, _ in whole] == [4, 4, 3]  # 11 in batches of 4: the last is odd
    assert all(y.shape == (len(x), 3) and torch.allclose(y.sum(1), torch.ones(len(x))) for x, y in whole)
    assert any((y.amax(1) < 1).any() for _, y in whole)
    for other in (batches(workers=2), batches()):
        assert all(
            torch.equal(a, b) for one, two in zip(whole, other, strict=True) for a, b in zip(one, two, strict=True)
        )
    for size in (2, 3):
        parts = [batches(parallel=Parallel(rank, size)) for rank in range(size)]
        for one, *shares in zip(whole, *parts, strict=True):
            assert all(
                torch.equal(torch.cat(some), a) for a, some in zip(one, zip(*shares, strict=True), strict=True)
            )
    assert not torch.equal(batches(seed=(3, 2))[0][0], whole[0][0])


def test_mixing_goes_on_from_its_position():
    mix = mixing("both", 1.0, 3)
    whole = [x for x, _ in make_loader(Augmented(Picture()), 3, seed=(0, 0), mix=mix)]
    first = make_loader(Augmented(Picture()), 3, seed=(0, 0), mix=mix)
    stream = iter(first)
    begun = [next(stream)[0] for _ in range(2)]
    rest = make_loader(Augmented(Picture()), 3, seed=(0, 0), mix=mix)
    rest.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip([*begun, *(x for x, _ in rest)], whole, strict=True))


def test_each_image_is_mixed_with_the_one_before():
    data = TensorDataset(torch.eye(4).reshape(4, 4, 1, 1), torch.arange(4))
    x, y = next(iter(make_loader(data, 4, mix=mixing("mixup", 1.0, 4))))
    share = x[0, 0].item()
    assert 0 < share < 1
    expected = share * torch.eye(4) + (1 - share) * torch.eye(4).roll(1, 0)
    assert torch.allclose(x.flatten(1), expected)
    assert torch.allclose(y, expected)


def test_weights_draw_with_replacement_and_repeat_exactly():
    weights = [0.0] * 5 + [1.0] * 6
    data = TensorDataset(torch.arange(11), torch.zeros(11))

    def drawn(epoch, **options):
        return [
            i for x, _ in make_loader(data, 4, seed=(0, epoch), weights=weights, **options) for i in x.tolist()
        ]

    assert len(drawn(0)) == 11
    assert min(drawn(0)) >= 5
    assert drawn(0) == drawn(0) != drawn(1)
    shares = [drawn(0, parallel=Parallel(rank, 2)) for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == sorted(drawn(0))


def test_a_sample_drawn_twice_is_augmented_twice():
    rows = [
        row for x, _ in make_loader(Augmented(Drawn()), 12, seed=(0, 0), weights=[1.0] + [0.0] * 11) for row in x
    ]
    assert {int(row[0]) for row in rows} == {0}
    assert len({row[1].item() for row in rows}) == 12


def test_one_class_against_the_rest(flat):
    draw(flat / "green", 5, (0, 255, 0))
    splits = image_folder(flat, *FORMAT, positive="green")
    assert splits.classes == ("other", "green")
    labels = labels_of(splits.train)
    assert labels == [label for _, label in splits.train]
    assert sum(labels) == 5 - 2
    with pytest.raises(
        InputError, match=r"--positive 'gren': expected one of blue, green, red .did you mean 'green'"
    ):
        image_folder(flat, *FORMAT, positive="gren")
    source, target = digits(0, positive="8")
    assert (len(source.classes), target.classes) == (10, ("other", "8"))
    assert [sum(labels_of(part)) for part in (target.train, target.val)] == [5, 30]
    with pytest.raises(InputError, match=r"--positive '11': expected one of 0, 1"):
        digits(0, positive="11")


def test_two_classes_keep_their_names(flat):
    assert image_folder(flat, *FORMAT, positive="blue").classes == ("red", "blue")


@pytest.mark.parametrize("name", ["none", "affine", "randaugment", "trivial", "auto"])
def test_augmentation_of_folders_and_digits(flat, name):
    splits = image_folder(flat, *FORMAT, augment=name, erase=0.5)
    images = [splits.train[i][0] for i in range(len(splits.train))]
    assert all(image.shape == (3, 16, 16) and image.dtype == torch.float32 for image in images)
    assert torch.equal(images[0], splits.train[0][0])
    train = digits(0, augment=name)[1].train
    assert (type(train) is TensorDataset) == (name == "none")
    image, label = train[3]
    assert (image.shape, image.dtype, int(label)) == ((1, 8, 8), torch.float32, labels_of(train)[3])
    assert 0 <= image.min() <= image.max() <= 1
