"""The argument of transposed convolutions that is given to forward: which of the possible sizes is wanted."""

from __future__ import annotations

import pytest
import torch

import bptools

x = torch.randn(2, 2, 3, 4)


@pytest.mark.parametrize("output_size", [(5, 9), [6, 10], (2, 3, 5, 10)])
def test_output_size(output_size):
    ours, theirs = (nn.ConvTranspose2d(2, 3, 3, 2, 1, dilation=(1, 2)) for nn in (bptools.nn, torch.nn))
    ours.load_state_dict(theirs.state_dict())
    y = ours(x, output_size)
    assert y.shape[2:] == tuple(output_size[-2:])
    torch.testing.assert_close(y, theirs(x, output_size))


def test_output_size_that_is_none_of_the_possible_ones():
    with pytest.raises(ValueError, match="valid sizes range from"):
        bptools.nn.ConvTranspose2d(2, 3, 3, 2, 1)(x, (9, 9))
