"""Symmetric statistics travel as triangles, of which nothing is lost."""

from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import part, together
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from torchcurv import SecondOrderOptimizer
from torchcurv.curv.approximations.dense import Dense
from torchcurv.curv.distributed import Ranks
from torchcurv.curv.linalg.triangles import from_triangle, to_triangle

SIZES = (4, 40, 31, 3)
BYTES = 8  # of a number


@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    d=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_triangle_is_exact(batch, d, dtype):
    check(batch, d, dtype)


def check(batch, d, dtype):
    matrix = torch.randn(*batch, d, d, dtype=torch.float64).to(dtype)
    matrix.view(-1)[:1] = torch.nan
    rectangle = to_triangle(matrix)
    assert rectangle.numel() * 2 == matrix.numel() // d * (d + 1) and rectangle.is_contiguous()
    mirrored = from_triangle(rectangle, d)
    expected = torch.where(torch.ones(d, d, dtype=torch.bool).tril(), matrix, matrix.mT)
    assert torch.equal(mirrored.nan_to_num(7), expected.nan_to_num(7)) and mirrored.dtype == dtype


@pytest.mark.parametrize("d", [127, 128, 129, 255, 256, 257, 258, 300])
def test_large_triangles_are_exact(d):
    check([2], d, torch.float32)


def test_what_is_no_square_is_refused():
    with pytest.raises(ValueError, match="named in `symmetric`"):
        to_triangle(torch.zeros(3, 2))


def layers_of(sizes):
    return [nn.Linear(*pair) for pair in pairwise(sizes)]


def bytes_sent(rank, approx):
    """Those of the floating numbers that a step sums."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers_of(SIZES)).double()
    called = DistributedDataParallel(model)
    opt = SecondOrderOptimizer(model, loss_fn="cross_entropy", approx=approx, samples=None)
    sent, original = [], Ranks.sum_

    def noted(self, tensors):
        sent.extend(x.numel() * x.element_size() for x in tensors if x.is_floating_point())
        original(self, tensors)

    x, y = part(0, rank)
    F.cross_entropy(called(x), y).backward()
    with mock.patch.object(Ranks, "sum_", noted):
        opt.step()
    matrices = [x for block in opt.blocks.values() for x in block.tensors.values() if x.dim() > 2]
    assert all(torch.equal(x, x.mT) for x in matrices)
    return sum(sent)


def all_sent(rank):
    found = {approx: bytes_sent(rank, approx) for approx in ("kfac", "unit", "block", "full", "ekfac")}
    with mock.patch.object(Dense, "symmetric", ()):  # as of one that does not say so
        return {**found, "whole": bytes_sent(rank, "unit")}


def triangle(d):
    return d * (d + 1) // 2


def test_the_bytes_are_those_of_triangles():
    shapes = [(o, d + 1) for d, o in pairwise(SIZES)]
    kfac = sum(triangle(o) + triangle(d) for o, d in shapes)
    numbers = {
        "kfac": kfac,
        "ekfac": kfac,
        "unit": sum(o * triangle(d) for o, d in shapes),
        "block": sum(triangle(o * d) for o, d in shapes),
        "full": triangle(sum(o * d for o, d in shapes)),
    }
    first, second = together(all_sent)
    assert first == second
    numbers["whole"] = sum(o * d * d for o, d in shapes)
    for approx, least in numbers.items():
        assert BYTES * least <= first[approx] <= 1.1 * BYTES * least, approx
