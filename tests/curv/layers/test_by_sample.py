"""Parameters whose use is not known: element by element, from the gradients that arrive at them."""

import cases
import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from torchcurv import SecondOrderOptimizer, curvature

N, LOSS = 4, nn.CrossEntropyLoss()


class Mixed(nn.Module):
    """A linear layer of its own, a temperature that is divided by, and an exponent."""

    def __init__(self):
        super().__init__()
        self.matrix, self.power = nn.Parameter(cases.randn(3, 4, seed=1)), nn.Parameter(torch.tensor(1.5))
        self.temperature = nn.Parameter(torch.full((3,), 0.7))

    def forward(self, x, shift=0.0):
        return F.linear(x.abs() ** self.power, self.matrix) / self.temperature + shift


class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.mixed = nn.Linear(4, 4), Mixed()

    def forward(self, x):
        return self.mixed(self.before(x), shift=x[:, :3])


MODELS = {
    "own function": Called,
    "whole model": Mixed,
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)),
    "weight_norm of a convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), parametrizations.weight_norm(nn.Conv2d(1, 2, 2, padding=1)), nn.Flatten(),
        nn.Linear(18, 3),
    ),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)),
    "attention with a bias for keys": lambda: Attention(),
    "positions": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), Positions(), nn.Flatten(), nn.Linear(6, 3)
    ),
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, add_bias_kv=True, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x.reshape(-1, 2, 2)
        return self.head(self.attention(x, x, x, need_weights=False)[0].flatten(1))


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(cases.randn(3, 3, seed=3))

    def forward(self, x):
        return torch.einsum("ntd,de->nte", x, self.matrix.exp()).tanh()


def problem(name):
    return cases.seeded(MODELS[name]), cases.randn(N, 4, seed=4), torch.arange(N) % 3


@pytest.mark.parametrize("kind", ["ggn", "fisher", "empirical_fisher"])
@pytest.mark.parametrize("name", MODELS)
def test_the_diagonal_is_exact(name, kind):
    model, x, y = problem(name)
    got = curvature(model, LOSS, [(x, y)], curv_type=kind, approx="diag")
    truth = {"ggn": oracles.ggn, "fisher": oracles.fisher, "empirical_fisher": oracles.empirical_fisher}[kind]
    expected = truth(model, LOSS, x, y, list(model.named_parameters())).diag()
    assert (got.diag() - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_training_lowers_the_loss(name):
    model, x, y = problem(name)
    optimizer = SecondOrderOptimizer(model, approx="diag", lr=0.1, damping=0.1)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("approx", ["kfac", "ekfac", "unit", "diag"])
@pytest.mark.parametrize("name", MODELS)
def test_without_being_asked_their_elements_are_measured_one_by_one(name, approx, kind):
    """By the gradient that arrives at the parameter, of the signal of one sample after the other."""
    model, x, y = problem(name)
    options = {"samples": None, "ema_decay": 0.0, "damping": 1.0, "damping_type": "exact", "update_every": 1}
    optimizer = SecondOrderOptimizer(
        model, loss_fn=LOSS, approx=approx, curv_type=kind, lr=0.0, kl_clip=None, refactor_every=1, **options
    )
    for _ in range(2):  # what is not used as its module's type says is found out in the first
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
    truth = {"ggn": oracles.ggn, "empirical_fisher": oracles.empirical_fisher}[kind]
    names, seen = {p: key for key, p in model.named_parameters()}, 0
    for block in optimizer.blocks.values():
        if all(site.bare for layer in block.layers for site in layer.sites):
            (p,) = block.params
            expected = truth(model, LOSS, x, y, [(names[p], p)]).diag()
            assert (block.factor.diag().flatten() - expected).abs().max() < 1e-9 * expected.abs().max()
            seen += 1
    assert seen


@pytest.mark.parametrize("name", MODELS)
def test_random_signals_have_these_elements_as_their_mean(name):
    model, x, y = problem(name)
    exact = curvature(model, LOSS, [(x, y)], approx="unit")
    drawn = curvature(model, LOSS, [(x, y)] * 1500, approx="unit", samples=1)
    bare = [key for key, block in exact.blocks.items() if all(site.bare for site in block.layers[0].sites)]
    assert bare
    for key in bare:
        one, mean = (c.blocks[key].factor.diag().flatten() for c in (exact, drawn))
        assert (one - mean).norm() < 0.15 * one.norm()


class Centred(Mixed):
    """Samples meet, so that the module cannot be run sample by sample."""

    def forward(self, x):
        out = super().forward(x)
        return out - out.mean(0)


def test_where_samples_meet_the_elements_are_exact_as_well():
    model = cases.seeded(lambda: nn.Sequential(nn.Linear(4, 4), Centred()))
    x, y = cases.randn(N, 4, seed=4), torch.arange(N) % 3
    optimizer = SecondOrderOptimizer(
        model, loss_fn=LOSS, approx="diag", samples=None, ema_decay=0.0, lr=0.0, update_every=1, refactor_every=1
    )
    for _ in range(2):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
    named = dict(model.named_parameters())
    expected = oracles.ggn(model, LOSS, x, y, list(named.items())).diag()
    parts = dict(zip(named.values(), expected.split([p.numel() for p in named.values()]), strict=True))
    for block in optimizer.blocks.values():
        found = block.layout.split(block.layout.unflatten(block.factor.diag()))
        for p, own in zip(block.params, found, strict=True):
            assert (own.flatten() - parts[p]).abs().max() < 1e-9 * parts[p].abs().max()
