"""What CONTRIBUTING says a new row costs: a layer type, an approximation and an update rule, each in one file.

A loss and a kind are in test_new_loss.py and test_new_kind.py, an option in test_options.py.
"""

import inspect
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

import torchcurv
from torchcurv.curv.approximations.factors import Eigen
from torchcurv.curv.approximations.table import APPROXIMATIONS
from torchcurv.curv.layers.table import VIEWS
from torchcurv.curv.options import complete
from torchcurv.optim.base import CurvatureOptimizer

CE = nn.CrossEntropyLoss()


def lines_of(*things):
    return sum(len(inspect.getsource(thing).splitlines()) for thing in things)


# --- a layer type: a linear map with weights of its own at every position
# --8<-- [start:layer]


class LocallyConnected(nn.Module):
    """y[n, l, o] = sum_i W[l, o, i] x[n, l, i] + b[l, o]."""

    def __init__(self, length, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(length * outputs, inputs))
        self.bias = nn.Parameter(torch.randn(length * outputs))
        self.length = length

    def forward(self, x):
        weight = self.weight.unflatten(0, (self.length, -1))
        return torch.einsum("loi,nli->nlo", weight, x) + self.bias.unflatten(0, (self.length, -1))


def register_locally_connected():
    torchcurv.register_view(
        LocallyConnected,
        inputs=lambda module, x: x.unsqueeze(1),  # a [n, 1, g, i]: every position is a group
        signal=lambda module, dz: dz.unsqueeze(1),  # s [n, 1, g, o]
        groups=lambda module: module.length,
    )


# --8<-- [end:layer]


# --- an approximation: diag(b) ⊗ A
# --8<-- [start:approximation]


@dataclass(frozen=True)
class DiagonalKFAC(torchcurv.Approximation):
    """C ≈ diag(b) ⊗ A per group: A = mean a a^T over samples and positions, b = sum s²."""

    statistics: ClassVar = {
        "A": torchcurv.Statistic(("A", "count"), scales_with_loss=False, needs_signals=False),
        "b": torchcurv.Statistic(("b",), scales_with_loss=True, needs_signals=True),
    }

    def measure(self, stats, basis=None, due=("A", "b")):
        (use,) = stats.only_layer("diag_kfac")
        found = {}
        if "A" in due:
            A, count = use.inputs.cov("expand")
            found |= {"A": A * stats.share, "count": count * stats.share}
        if "b" in due:
            found["b"] = use.s.square().sum((0, 1, 2)) * stats.scale
        return found

    def empty(self, layers, like):
        g, o, d = layers[0].shape
        return {"A": like.new_zeros(g, d, d), "count": like.new_zeros(()), "b": like.new_zeros(g, o)}

    def _mean(self, tensors):
        A = tensors["A"] / tensors["count"].clamp_min(1e-30)
        return A.tril() + A.tril(-1).mT  # of a large matrix the lower triangle counts

    def product(self, tensors, x):
        return tensors["b"].unsqueeze(-1) * (x @ self._mean(tensors))

    def trace(self, tensors):
        return (tensors["b"].sum(-1) * self._mean(tensors).diagonal(dim1=1, dim2=2).sum(-1)).sum()

    def factor(self, tensors, damping, damping_type, basis=None):
        values, vectors = torch.linalg.eigh(self._mean(tensors))
        values = tensors["b"].unsqueeze(-1) * values.clamp_min(0).unsqueeze(-2)
        lam = torch.as_tensor(damping, dtype=values.dtype)
        return Eigen(values, None, vectors, lam), torch.isfinite(values.sum() + lam)


# --8<-- [end:approximation]


# --- an update rule: Adam's second moment in the eigenbasis of the curvature
# --8<-- [start:update-rule]


class EigenAdam(CurvatureOptimizer):
    """p <- p - lr Q m̂ / (sqrt(v̂) + eps), m and v the moments of Q^T g, for Q of the block's eigenvectors."""

    table: ClassVar = torchcurv.SecondOrderOptimizer.table

    def __init__(self, model, params=None, **options):
        defaults = {"approx": "ekfac", "lr": 1e-2, "damping": 0.1, "sharing": "expand", "damping_scale": "absolute"}
        super().__init__(model, params, complete(self.table, {**defaults, **options}, "EigenAdam"))

    def update_parameters(self):
        t = self.engine.step + 1
        for block, group in self.engine.by_group():
            if block.factor is None or any(p.grad is None for p in block.params):
                continue
            left, right = block.factor.basis
            (g,) = block.layout.join([piece.of(piece.param.grad) for piece in block.pieces])
            g = left.mT @ g @ right
            state = self.state[block.params[0]]
            m, v = (state.setdefault(name, torch.zeros_like(g)) for name in ("rotated_avg", "rotated_avg_sq"))
            m.lerp_(g, 0.1)
            v.lerp_(g.square(), 0.001)
            step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            for piece, x in zip(block.pieces, block.layout.split([left @ step @ right.mT]), strict=True):
                piece.of(piece.param).sub_(x, alpha=group["lr"])


# --8<-- [end:update-rule]


# ------------------------------------------------------------------------------------------- what they must do


@pytest.fixture
def rows():
    held = dict(VIEWS), dict(APPROXIMATIONS)
    register_locally_connected()
    torchcurv.register_approximation("diag_kfac", lambda options, layers: DiagonalKFAC())
    yield
    for table, before in zip((VIEWS, APPROXIMATIONS), held, strict=True):
        table.clear()
        table.update(before)


def test_their_sizes():
    assert lines_of(register_locally_connected) <= 20
    assert lines_of(DiagonalKFAC) <= 60
    assert lines_of(EigenAdam) <= 60


def data():
    torch.manual_seed(0)
    return torch.randn(6, 3, 4, dtype=torch.float64), torch.arange(6) % 2


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(LocallyConnected(3, 4, 2), nn.Flatten(), nn.Linear(6, 2)).double()


def dense_ggn(model, x):
    """J^T H J of the mean loss, over all parameters in their order."""
    params = dict(model.named_parameters())
    f = model(x)
    p = f.softmax(-1)
    H = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    J = jacrev(lambda at: functional_call(model, at, x))(params)
    J = torch.cat([J[name].flatten(2) for name in params], -1)
    return torch.einsum("ncp,ncd,ndq->pq", J, H, J).detach() / len(x)


def test_a_new_layer_type_has_the_exact_curvature(rows):
    model, (x, y) = make_model(), data()
    found = torchcurv.curvature(model, CE, [(x, y)], approx="full").to_dense()
    torch.testing.assert_close(found, dense_ggn(model, x), rtol=1e-9, atol=1e-12)


def test_a_new_approximation_is_right_everywhere(rows):
    model, (x, y) = make_model(), data()
    truth = torchcurv.curvature(model, CE, [(x, y)], approx="kfac")
    found = torchcurv.curvature(model, CE, [(x, y)], approx="diag_kfac")
    for name, block in found.blocks.items():
        A, B = (truth.blocks[name].tensors[key] for key in "AB")
        A = A / truth.blocks[name].tensors["count"]
        b = B.diagonal(dim1=1, dim2=2)
        expected = torch.block_diag(*[torch.kron(torch.diag(one), a) for one, a in zip(b, A, strict=True)])
        eye = torch.eye(block.size, dtype=x.dtype).reshape(-1, *block.layers[0].shape)
        close = torch.stack([block.layout.join(block.matvec(block.layout.split([unit])))[0].flatten() for unit in eye])
        torch.testing.assert_close(close, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(block.approx.trace(block.tensors), expected.trace())
    with pytest.raises(NotImplementedError, match="DiagonalKFAC is not known of the Hessian"):
        torchcurv.curvature(model, CE, [(x, y)], approx="diag_kfac", curv_type="hessian", hessian_method="exact")


def trained(model, optimizer, steps):
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def test_a_new_approximation_trains_is_summarised_and_resumes(rows):
    model = make_model()
    optimizer = torchcurv.SecondOrderOptimizer(model, approx="diag_kfac", update_every=3, refactor_every=4)
    first = trained(model, optimizer, 1)
    trained(model, optimizer, 5)
    assert "diag_kfac" in optimizer.summary()
    again = make_model()
    again.load_state_dict(model.state_dict())
    other = torchcurv.SecondOrderOptimizer(again, approx="diag_kfac", update_every=3, refactor_every=4)
    other.load_state_dict(optimizer.state_dict())
    assert trained(model, optimizer, 5) == trained(again, other, 5) < first
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_new_update_rule_trains_and_resumes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    optimizer = EigenAdam(model, update_every=1, refactor_every=1)
    first, last = trained(model, optimizer, 1), trained(model, optimizer, 40)
    assert last < 0.8 * first
    assert {"rotated_avg", "rotated_avg_sq", "step"} <= optimizer.state[model[1].weight].keys()


def test_a_name_is_taken_once(rows):
    with pytest.raises(ValueError, match="'kfac' is taken"):
        torchcurv.register_approximation("kfac", lambda options, layers: DiagonalKFAC())


def test_the_rule_uses_no_private_name():
    assert not re.search(r"\._[a-z]", inspect.getsource(EigenAdam))
