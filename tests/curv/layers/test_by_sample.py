"""Parameters whose use is not known: an error by default, their exact diagonal by the gradients of samples if asked."""

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
        return torch.einsum("ntd,de->nte", x, self.matrix).tanh()


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


@pytest.mark.parametrize("approx", ["kfac", "block", "unit"])
@pytest.mark.parametrize("name", MODELS)
def test_without_being_asked_it_is_an_error_that_names_the_parameters(name, approx):
    model, x, y = problem(name)
    wanted = r"(matrix|original|bias_k|power|temperature).*approx=None"
    with pytest.raises((ValueError, RuntimeError), match=wanted):
        optimizer = SecondOrderOptimizer(model, approx=approx)
        LOSS(model(x), y).backward()
        optimizer.step()


def test_samples_that_meet_are_found_out():
    class Centred(Mixed):
        def forward(self, x):
            out = super().forward(x)
            return out - out.mean(0)

    model = cases.seeded(lambda: nn.Sequential(nn.Linear(4, 4), Centred()))
    optimizer = SecondOrderOptimizer(model, approx="diag")
    with pytest.raises(RuntimeError, match="the gradient of"):
        LOSS(model(cases.randn(N, 4, seed=4)), torch.arange(N) % 3).backward()
        optimizer.step()
