import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """Weights that a test leaves to chance are the same each time."""
    torch.manual_seed(0)
