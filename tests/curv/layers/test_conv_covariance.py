"""The input covariance by shifted products equals the one by patches."""

from dataclasses import replace

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchcurv import curvature
from torchcurv.curv.layers.conv_covariance import shifted_cov
from torchcurv.curv.layers.convolution import conv_moments as _conv_moments
from torchcurv.curv.layers.convolution import conv_output_size
from torchcurv.curv.layers.convolution import padded_input as _padded
from torchcurv.curv.layers.table import VIEWS
from torchcurv.curv.statistics.gram import position_gram


def by_patches(conv, x):
    return position_gram(VIEWS[nn.Conv2d].inputs(conv, x))[0]


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    size=st.tuples(st.integers(7, 12), st.integers(10, 12)),
)
def test_shifted_products_equal_patches(kernel, dilation, padding, size):
    conv = nn.Conv2d(2, 1, kernel, dilation=dilation, padding=padding).double()
    x = cases.randn(3, 2, *size)
    padded = _padded(conv, x)
    got = shifted_cov(padded, kernel, dilation, tuple(conv_output_size(conv, padded.shape[2:], conv.stride)))
    torch.testing.assert_close(got, by_patches(conv, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("conv", [nn.Conv2d(8, 4, 3, padding=1), nn.Conv1d(9, 2, 3, padding="same", bias=False)])
def test_kfac_by_either_way_is_the_same(conv, monkeypatch):
    space = (9, 8) if isinstance(conv, nn.Conv2d) else (20,)
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    x = cases.randn(4, conv.in_channels, *space).double()
    model(x)
    assert _conv_moments(conv, x) is not None
    data, loss = [(x, torch.arange(4) % 3)], nn.CrossEntropyLoss()
    fast = curvature(model, loss, data).blocks["0"].tensors
    monkeypatch.setitem(VIEWS, type(conv), replace(VIEWS[type(conv)], moments=None))
    slow = curvature(model, loss, data).blocks["0"].tensors
    for key in slow:
        torch.testing.assert_close(fast[key], slow[key], rtol=1e-12, atol=1e-12)
