"""Rows as bytes: what comes out of them answers as what went in, and is no larger than what layers were given."""

import pytest
import torch
from processes import Words, convolutions, network, normalised, part
from torch import nn

from torchcurv import SecondOrderOptimizer
from torchcurv.curv.approximations.rows import JacobianRows
from torchcurv.curv.statistics.packing import packed, unpacked

CPU = [torch.device("cpu")]


def rows_of(model, **options):
    """What a block over all layers keeps of one pass, and what needs not be sent."""
    given = {"approx": "full", "rows_limit": 1, "update_every": 1, "refactor_every": 1, "samples": None, **options}
    loss_fn = nn.CrossEntropyLoss()
    optimizer = SecondOrderOptimizer(model, loss_fn=loss_fn, **given)
    x, y = part(0, 0)
    loss_fn(model(x), y).backward()
    (block,) = optimizer.blocks.values()
    sites = [site for layer in block.layers for site in layer.sites]
    return block.pending.tensors["kept"], [*block.layers, *sites, *(site.module for site in sites)]


@pytest.mark.parametrize("make", [network, convolutions, normalised, Words])
def test_rows_that_were_packed_are_the_same(make):
    kept, known = rows_of(make())
    data, head = packed(kept, known, CPU)
    found = unpacked(data, head, known, CPU)
    assert all(a.layers is b.layers or a.layers == b.layers for a, b in zip(found, kept, strict=True))
    assert torch.equal(JacobianRows(found).gram(), JacobianRows(kept).gram())
    for one, other in zip(JacobianRows(found).samples(), JacobianRows(kept).samples(), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))  # chunks of one pass share their inputs


def test_of_a_convolution_its_input_is_sent_and_not_the_patches():
    model = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Upsample(scale_factor=16), nn.Conv2d(1, 2, 5, stride=1))
    model = nn.Sequential(*model, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    kept, known = rows_of(nn.Sequential(model, nn.Linear(2, 3)).double())
    JacobianRows(kept).gram()  # has read all patches, 25 times the input
    data, head = packed(kept, known, CPU)
    own = [use.s for stats in kept for uses in stats.uses for use in uses]
    inputs = 8 * (8 * 32 * 32 + 8 * 2)  # bytes
    assert head < 4096
    assert len(data) <= head + inputs + sum(s.numel() * s.element_size() for s in own) + 64 * 20


def test_one_input_of_two_blocks_is_sent_once():
    kept, known = rows_of(network())
    (data, head), (twice, more) = packed(kept, known, CPU), packed([kept, tuple(kept)], known, CPU)
    assert len(twice) - more == len(data) - head
