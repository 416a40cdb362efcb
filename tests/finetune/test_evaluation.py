import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from bptools.finetune import evaluate


def test_weighs_batches_by_samples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 4)).train()
    x, y = torch.rand(7, 3), torch.randint(0, 4, (7,))
    result = evaluate(model, TensorDataset(x, y), batch_size=3)
    logits = model.eval()(x)
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-5)
    assert result.accuracy == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item())
    assert (result.targets, result.predictions) == (y.tolist(), logits.argmax(1).tolist())
    assert not model.training


def test_error():
    with pytest.raises(ValueError, match="data: expected at least one sample"):
        evaluate(nn.Linear(1, 1), TensorDataset(torch.rand(0, 1)))
