import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

import bptools.nn
from bptools.finetune import balanced_loss, class_weights, focal_cross_entropy, make_loader, sample_weights

LABELS = [0] * 12 + [1] * 3 + [2]


def test_weights_are_one_over_the_classes_sizes():
    weights = class_weights(LABELS, 3)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    assert weights.tolist() == pytest.approx(expected.tolist())
    assert weights[torch.tensor(LABELS)].mean().item() == pytest.approx(1)
    effective = class_weights(LABELS, 3, "effective")
    assert effective[torch.tensor(LABELS)].mean().item() == pytest.approx(1)
    assert weights[2] / weights[0] > effective[2] / effective[0] > 1
    beta = 1 - 1 / 16
    assert (effective[1] / effective[0]).item() == pytest.approx((1 - beta**12) / (1 - beta**3), rel=1e-5)
    with pytest.raises(ValueError, match="labels: expected some of each of 4 classes, got none of 3"):
        class_weights(LABELS, 4)
    with pytest.raises(ValueError, match=r"how: .* got 'some'"):
        class_weights(LABELS, 3, "some")


def test_samples_of_each_class_are_as_likely():
    weights = sample_weights(LABELS)
    totals = [sum(w for w, label in zip(weights, LABELS, strict=True) if label == c) for c in range(3)]
    assert totals == pytest.approx([1, 1, 1])
    data = torch.utils.data.TensorDataset(torch.arange(16), torch.tensor(LABELS))
    drawn = torch.cat([y for e in range(200) for _, y in make_loader(data, 16, seed=(0, e), weights=weights)])
    assert all(0.3 < share < 0.37 for share in (torch.bincount(drawn) / len(drawn)).tolist())


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_the_focal_loss_is_that_of_the_softmax(classes, gamma):
    torch.manual_seed(0)
    logits = torch.randn(7, classes, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, classes, (7,))
    p = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    expected = (-((1 - p) ** gamma) * p.log()).mean()
    loss = focal_cross_entropy(logits, labels, gamma)
    assert loss.item() == pytest.approx(expected.item())
    ours, theirs = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected))
    assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("layers", [bptools.nn, nn])
@pytest.mark.parametrize("balance", ["none", "sampler", "weights", "effective", "focal"])
def test_losses_are_means_over_samples_that_can_be_accumulated(layers, balance):
    torch.manual_seed(0)
    smoothing = 0.0 if balance == "focal" else 0.1
    loss = balanced_loss(layers, balance, LABELS, 3, smoothing)
    logits, labels = torch.randn(16, 3), torch.tensor(LABELS)
    whole = loss(logits, labels)
    parts = [loss(logits[a:b], labels[a:b]) * (b - a) / 16 for a, b in ((0, 13), (13, 16))]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)
    if balance == "weights":
        each = nn.CrossEntropyLoss(class_weights(LABELS, 3), reduction="none", label_smoothing=smoothing)
        assert whole.item() == pytest.approx(each(logits, labels).mean().item(), rel=1e-5)


@pytest.mark.parametrize("balance", ["none", "weights"])
def test_probabilities_are_targets_too(balance):
    torch.manual_seed(0)
    logits, labels = torch.randn(16, 3), torch.tensor(LABELS)
    loss = balanced_loss(bptools.nn, balance, LABELS, 3)
    assert loss(logits, nn.functional.one_hot(labels).float()).item() == pytest.approx(loss(logits, labels).item())
