import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from bptools.finetune.evaluation import evaluate


def test_weighs_batches_by_samples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 4)).train()
    x, y = torch.rand(7, 3), torch.randint(0, 4, (7,))
    result = evaluate(model, TensorDataset(x, y), batch_size=3)
    logits = model.eval()(x)
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-5)
    assert result.accuracy == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item())
    assert (result.targets, result.predictions) == (y.tolist(), logits.argmax(1).tolist())
    chosen = logits.softmax(1).gather(1, logits.argmax(1, keepdim=True)).flatten()
    assert result.confidences == pytest.approx(chosen.tolist())
    assert not model.training


def test_two_classes_have_log_odds():
    model, data = nn.Linear(3, 2), TensorDataset(torch.rand(5, 3), torch.randint(0, 2, (5,)))
    result = evaluate(model, data, batch_size=2)
    logits = model(data.tensors[0])
    assert result.log_odds == pytest.approx((logits[:, 1] - logits[:, 0]).tolist())
    assert evaluate(nn.Linear(3, 4), data).log_odds == []


def test_a_trial_looks_at_few_batches():
    data = TensorDataset(torch.rand(8, 3), torch.randint(0, 4, (8,)))
    result = evaluate(nn.Linear(3, 4), data, batch_size=2, limit=2)
    assert len(result.targets) == len(result.predictions) == len(result.confidences) == 4
    assert result.targets == data.tensors[1][:4].tolist()


def test_error():
    with pytest.raises(ValueError, match="data: expected at least one sample"):
        evaluate(nn.Linear(1, 1), TensorDataset(torch.rand(0, 1)))
    with pytest.raises(ValueError, match="limit: expected at least 1 batch or None, got 0"):
        evaluate(nn.Linear(1, 1), TensorDataset(torch.rand(1, 1)), limit=0)
