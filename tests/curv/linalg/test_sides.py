"""Sides in blocks, of which the lower triangle counts."""

import pytest
import torch
from cases import randn

from torchcurv.curv.linalg.block_diagonal import norm_of_side, symmetrised


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 3, 3), (2, 3, 2, 2), (1, 5, 1, 1)])
def test_the_norm_is_that_of_the_whole_matrices(shape):
    """Whatever lies above the diagonal: each entry below it counts twice."""
    side = randn(*shape)
    torch.testing.assert_close(norm_of_side(side), symmetrised(side).norm())
    torch.testing.assert_close(norm_of_side(side.tril()), symmetrised(side).norm())
