from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader, Dataset

from bptools.finetune.errors import InputError, expect_positive, one_line, suggestion


class Broken(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise InputError("cannot read image a/b.png: truncated")


def test_expect_positive():
    settings = SimpleNamespace(lr=0.1, batch_size=0)
    expect_positive(settings, "lr")
    with pytest.raises(InputError, match="--batch-size: expected more than 0, got 0"):
        expect_positive(settings, "lr batch_size")


def test_suggestion():
    assert suggestion("resnet5", ["resnet50", "vgg11"]) == " (did you mean 'resnet50'?)"
    assert suggestion("qqq", ["resnet50"]) == ""


def test_one_line_of_plain_errors():
    assert one_line(InputError("first\nsecond")) == "first"
    assert one_line(KeyError()) == "KeyError"


@pytest.mark.parametrize("workers", [0, 1])
def test_one_line_survives_a_loader_worker(workers):
    with pytest.raises(InputError) as caught:
        list(DataLoader(Broken(), num_workers=workers))
    assert one_line(caught.value) == "cannot read image a/b.png: truncated"
