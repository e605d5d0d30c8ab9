"""Support: every layer with every kind and approximation takes steps, as docs/support.md says.

python tests/test_support.py      writes the names of all of them into that page
"""

import sys
import textwrap
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "support"))  # it is a program as well
import cases
from cover import pairwise

from torchcurv import SecondOrderOptimizer

PAGE = Path(__file__).parent.parent / "docs" / "support.md"
START, END = "<!-- support: start -->", "<!-- support: end -->"
KINDS = {
    "ggn": {"curv_type": "ggn", "samples": None},
    "ggn, draws": {"curv_type": "ggn", "samples": 2},
    "fisher": {"curv_type": "fisher", "samples": 1},
    "empirical_fisher": {"curv_type": "empirical_fisher"},
}
APPROXIMATIONS = {
    "full": {"approx": "full"},
    "full, rows": {"approx": "full", "rows_limit": 1},
    "block": {"approx": "block"},
    "unit": {"approx": "unit"},
    "kfac": {"approx": "kfac"},
    "kfac, exact damping": {"approx": "kfac", "damping_type": "exact"},
    "kfac, reduce": {"approx": "kfac", "sharing": "reduce"},
    "kfac, whole": {"approx": "kfac", "sharing": "whole"},
    "ekfac": {"approx": "ekfac"},
    "diag": {"approx": "diag"},
    "lowrank": {"approx": "lowrank", "rank": 8},
    "None": {"approx": None},
}


class Doubled(nn.Linear):
    """A subclass: found along the MRO."""


class First(nn.Module):
    """A module that returns several tensors, called with its input `times` times: the first of what it returns."""

    def __init__(self, module, times=1):
        super().__init__()
        self.module, self.times = module, times

    def forward(self, x):
        return self.module(*(x,) * self.times)[0]


class Bare(nn.Module):
    """Parameters of a module's own, as biases and scales."""

    def __init__(self):
        super().__init__()
        self.token, self.places = nn.Parameter(torch.ones(1, 1, 3)), nn.Parameter(torch.zeros(4, 3))
        self.scale = nn.Parameter(torch.full((3,), 0.5))

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places[: x.shape[1] + 1]
        return x * self.scale


class Tied(nn.Module):
    """An embedding and the linear layer that shares its weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.head.weight = self.embedding.weight

    def forward(self, index):
        return self.head(torch.tanh(self.embedding(index)))


def family(*prefixes):
    every = cases.LAYERS + cases.NEW_LAYERS + cases.BATCH_STATISTICS_LAYERS
    return [case for case in every if any(case.id == p or case.id.startswith(p + "_") for p in prefixes)]


def frozen(case, name):
    def make():
        layer = case.make_layer()
        getattr(layer, name).requires_grad_(False)
        return layer

    return case._replace(make_layer=make)


def made(id, make, shape):
    return cases.LayerCase(id, lambda: cases.seeded(make), shape)


EVERY = cases.NEW_LAYERS + cases.BATCH_STATISTICS_LAYERS
GROUPED = [case for case in cases.LAYERS if "groups" in case.id or "depthwise" in case.id]
SOME = [case for case in cases.LAYERS if case.id in ("linear", "linear_seq", "conv2d_3x3_pad", "conv1d_groups")]
ROWS = {
    "Linear": family("linear"),
    "Linear, extra dimensions": family("linear_seq", "linear_grid"),
    "Conv1d": [c for c in family("conv1d") if c not in GROUPED],
    "Conv2d": [c for c in family("conv2d") if c not in GROUPED],
    "Conv3d": [c for c in family("conv3d") if c not in GROUPED],
    "grouped and depthwise": GROUPED,
    "frozen weight": [frozen(case, "weight") for case in SOME],
    "frozen bias": [frozen(case, "bias") for case in SOME],
    "ConvTranspose1d, 2d, 3d": family("transposed1d", "transposed2d", "transposed3d"),
    "Embedding": cases.EMBEDDING_LAYERS,
    "EmbeddingBag": cases.BAG_LAYERS,
    "BatchNorm, eval and train": [c for c in EVERY if "batchnorm" in c.id],
    "LayerNorm, RMSNorm": [c for c in EVERY if "layernorm" in c.id or "rmsnorm" in c.id],
    "GroupNorm, InstanceNorm": [c for c in EVERY if "groupnorm" in c.id or "instancenorm" in c.id],
    "Bilinear": cases.BILINEAR_LAYERS,
    "PReLU": cases.ELEMENTWISE_LAYERS,
    "MultiheadAttention": [
        made("attention", lambda: First(nn.MultiheadAttention(4, 2, batch_first=True), 3), (3, 4)),
        made("attention_nobias", lambda: First(nn.MultiheadAttention(4, 2, bias=False, batch_first=True), 3), (3, 4)),
    ],
    "TransformerEncoderLayer": [
        made("encoder", lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), (3, 4))
    ],
    "LSTM, GRU, RNN": [
        made(f"{kind.__name__}", lambda kind=kind: First(kind(3, 4, 2, batch_first=True, bidirectional=True)), (3, 3))
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
    ],
    "LSTMCell, GRUCell, RNNCell": [
        made("lstm_cell", lambda: First(nn.LSTMCell(3, 4)), (3,)),
        made("gru_cell", lambda: nn.GRUCell(3, 4), (3,)),
        made("rnn_cell", lambda: nn.RNNCell(3, 4), (3,)),
    ],
    "bare Parameters": [made("bare", Bare, (3, 3))],
    "embedding tied to its head": [
        cases.EMBEDDING_LAYERS[0]._replace(id="tied", make_layer=lambda: cases.seeded(Tied))
    ],
    "subclasses": [cases.LayerCase("doubled", lambda: cases.seeded(lambda: Doubled(4, 3)), (4,))],
}


def takes_steps(case, options) -> bool:
    """Whether two steps lower the loss of a small net around the layer and keep every parameter finite."""
    x, y = case.input_for(3, seed=2), torch.arange(3) % cases.CLASSES
    model = cases.net_around(case.make_layer(), case.input_shape, x=x)
    given = x if isinstance(x, tuple) else (x,)
    optimizer = SecondOrderOptimizer(model, lr=0.1, damping=0.1, momentum=0.0, **options)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(*given), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses[2] < losses[0] and all(torch.isfinite(p).all() for p in model.parameters())


def names() -> str:
    """What the page lists."""
    lists = {"Layers": ROWS, "Kinds": KINDS, "Approximations": APPROXIMATIONS}
    lines = (f"* **{name}**: {'; '.join(entries)}." for name, entries in lists.items())
    return "\n".join(textwrap.fill(line, 118, subsequent_indent="  ") for line in lines)


def test_the_page_names_every_layer_kind_and_approximation():
    text = PAGE.read_text()
    shown = text[text.index(START) + len(START) : text.index(END)].strip()
    assert shown == names(), "the lists changed: run python tests/test_support.py"


@pytest.mark.parametrize("chosen", [pairwise, pytest.param(product, marks=pytest.mark.slow)])
@pytest.mark.parametrize("row", ROWS)
def test_every_pair_takes_steps_on_every_layer(row, chosen):
    """All triples of layer, approximation and kind are slow; of them those run that have every pair."""
    assert ROWS[row]
    failed = [
        f"{case.id}: {kind}, {approx}"
        for case, approx, kind in chosen(ROWS[row], list(APPROXIMATIONS), list(KINDS))
        if not takes_steps(case, {**KINDS[kind], **APPROXIMATIONS[approx]})
    ]
    assert not failed


if __name__ == "__main__":
    text = PAGE.read_text()
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    PAGE.write_text(f"{before}\n\n{names()}\n\n{after}")
