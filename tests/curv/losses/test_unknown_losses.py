"""Losses that are not known: any module or function of (output, target), against the dense truth by autograd."""

import cases
import pytest
import torch
from measured import close, measured, optimizer
from torch import nn
from torch.nn import functional as F

from torchcurv import SecondOrderOptimizer, curvature

N, V = 6, 3
X = cases.randn(N, 4)
LABELS, REAL = torch.arange(N) % V, cases.randn(N, V, seed=3)
P = REAL.softmax(-1)


class Focal(nn.CrossEntropyLoss):
    def forward(self, f, y):
        p = f.softmax(-1).gather(-1, y[:, None]).squeeze(-1)
        return (-((1 - p) ** 2) * p.log()).mean()


class GaussianHeads(nn.Module):
    """Mean and log variance from one output."""

    def forward(self, f, y):
        mean, log_variance = f[:, :1], f[:, 1:2]
        return (0.5 * log_variance + 0.5 * (mean - y[:, :1]).square() * (-log_variance).exp()).mean()


class Sided(nn.Module):
    """It looks at its data, and cannot be vectorised."""

    def forward(self, f, y):
        total = f.new_zeros(())
        for one, target in zip(f, y, strict=True):
            total = total + (
                2 * (one - target).square().sum() if float(one.detach().sum()) > 0 else (one - target).pow(4).sum()
            )
        return total / len(f)


def distilled(f, y):
    return F.kl_div((f / 2).log_softmax(-1), y, reduction="batchmean") * 4


def preference(f, y):
    """As DPO's: of the difference of two outputs."""
    return -F.logsigmoid(0.5 * (f[:, 0] - f[:, 1]) * y[:, 0]).mean()


UNKNOWN = {
    "huber": (nn.HuberLoss(delta=0.5), REAL),
    "smooth l1": (nn.SmoothL1Loss(beta=0.7), REAL),
    "smooth l1 sum": (nn.SmoothL1Loss(reduction="sum"), REAL),
    "poisson": (nn.PoissonNLLLoss(), P * 3),
    "poisson rates": (nn.PoissonNLLLoss(log_input=False), P * 3),
    "distillation": (distilled, P),
    "focal": (Focal(), LABELS),
    "gaussian heads": (GaussianHeads(), REAL),
    "soft margin": (nn.SoftMarginLoss(), REAL.sign()),
    "multi label soft margin": (nn.MultiLabelSoftMarginLoss(), (REAL > 0).double()),
    "preference": (preference, REAL.sign()),
    "data dependent": (Sided(), REAL),
    "function": (F.huber_loss, REAL),
    "lambda": (lambda f, y: (f - y).pow(4).sum(), REAL),
}


class Positive(nn.Module):
    """Rates, which are positive."""

    def forward(self, x):
        return F.softplus(x) + 0.1


def net(name):
    end = Positive() if name == "poisson rates" else nn.Identity()
    return cases.seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, V), end))


def truth(model, loss, y, kind):
    """J^T H J with the positive part of the Hessian of each sample's terms; or the sum of the samples' g g^T."""
    f, params = model(X), list(model.parameters())
    J = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(one, params, retain_graph=True)]) for one in f.flatten()
    ]).reshape(N, V, -1)  # fmt: skip
    whole, total = loss(f.detach(), y), 0.0
    each = [loss(f[k : k + 1].detach(), y[k : k + 1]) for k in range(N)]
    R = 1.0 if torch.isclose(whole, sum(each)) else 1 / N
    for k in range(N):

        def one(z, k=k):
            return loss(z[None], y[k : k + 1])

        if kind == "empirical_fisher":
            g = torch.autograd.functional.jacobian(one, f[k].detach())
            H = torch.outer(g, g)
        else:
            values, Q = torch.linalg.eigh(torch.autograd.functional.hessian(one, f[k].detach()))
            H = Q @ values.clamp_min(0).diag() @ Q.T
        total = total + R * J[k].T @ H @ J[k]
    return total


@pytest.mark.parametrize("kind", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("name", UNKNOWN)
def test_the_curvature_of_an_unknown_loss_is_that_of_its_samples(name, factor, kind):
    loss, y = UNKNOWN[name]
    opt = optimizer(net(name), loss, curv_type=kind)
    (factor * opt.loss_fn(opt.model(X), y)).backward()
    close(measured(opt), factor * truth(opt.model, loss, y, kind), 1e-9)


@pytest.mark.parametrize("name", ["huber", "function", "focal"])
def test_an_unknown_loss_may_be_observed(name):
    loss, y = UNKNOWN[name]
    opt = optimizer(net(name), None)
    f = opt.model(X)
    opt.observe(f, y, loss, 0.5)
    (0.5 * loss(f, y)).backward()
    close(measured(opt), 0.5 * truth(opt.model, loss, y, "ggn"), 1e-9)


@pytest.mark.parametrize("name", ["huber", "smooth l1 sum", "lambda"])
def test_curvature_of_data_adds_up(name):
    loss, y = UNKNOWN[name]
    model = net(name)
    expected = truth(model, loss, y, "ggn")
    found = curvature(model, loss, [(X[:2], y[:2]), (X[2:], y[2:])], approx="full").to_dense()
    close(found, expected, 1e-9)


def test_samples_that_meet_are_refused_and_taken_together_where_that_is_said():
    def together(f, y):
        return (f - f.mean(0) - y).square().sum(-1).pow(1.5).sum().sqrt()

    opt = optimizer(net(""), together)
    with pytest.raises(ValueError, match=r"neither their sum nor their mean.*samples=.batch."):
        opt.loss_fn(opt.model(X), REAL).backward()
    opt.remove()
    opt = optimizer(net(""), None)
    f = opt.model(X)
    opt.observe(f, REAL, together, samples="batch")
    together(f, REAL).backward()
    H = torch.autograd.functional.hessian(lambda z: together(z.reshape(N, V), REAL), f.detach().flatten())
    values, Q = torch.linalg.eigh(H)
    params = list(opt.model.parameters())
    J = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(one, params, retain_graph=True)])
        for one in opt.model(X).flatten()
    ])  # fmt: skip
    close(measured(opt), J.T @ Q @ values.clamp_min(0).diag() @ Q.T @ J, 1e-8)


@pytest.mark.parametrize("kind", ["ggn", "fisher"])
def test_an_absolute_error_has_no_curvature_but_the_empirical_fisher(kind):
    opt = optimizer(net(""), nn.L1Loss(), curv_type=kind, samples=1)
    with pytest.raises((ValueError, NotImplementedError), match='"empirical_fisher"'):
        opt.loss_fn(opt.model(X), REAL).backward()
    opt.remove()
    opt = optimizer(net(""), nn.L1Loss(), curv_type="empirical_fisher")
    opt.loss_fn(opt.model(X), REAL).backward()
    close(measured(opt), truth(opt.model, nn.L1Loss(), REAL, "empirical_fisher"), 1e-9)


def test_a_sample_of_many_outputs_is_refused():
    model = cases.seeded(lambda: nn.Linear(4, 70))
    opt = optimizer(model, nn.HuberLoss())
    with pytest.raises(NotImplementedError, match="at most 64 outputs of a sample"):
        opt.loss_fn(model(X), cases.randn(N, 70)).backward()


def test_a_function_that_was_not_called_through_the_optimizer_is_named():
    model = net("")
    opt = SecondOrderOptimizer(model, loss_fn=F.huber_loss)
    F.huber_loss(model(X), REAL).backward()
    with pytest.raises(RuntimeError, match=r"call it as optimizer\.loss_fn\(output, target\)"):
        opt.step()


@pytest.mark.parametrize("loss", [nn.HuberLoss(), F.huber_loss])
def test_it_trains(loss):
    model = net("").float()
    opt = SecondOrderOptimizer(model, loss_fn=loss)
    first = None
    for _ in range(40):
        opt.zero_grad()
        value = opt.loss_fn(model(X.float()), REAL.float())
        value.backward()
        opt.step()
        first = first or value.item()
    assert value.item() < 0.7 * first


def test_a_loss_of_more_arguments_is_refused_and_may_be_wrapped():
    model, variances = net(""), REAL.square() + 0.5
    opt = optimizer(model, nn.GaussianNLLLoss())
    with pytest.raises(ValueError, match=r"GaussianNLLLoss was called with 3 arguments.*a function of these two"):
        opt.loss_fn(model(X), REAL, variances)
    opt.remove()

    def with_variances(f, y):
        return nn.functional.gaussian_nll_loss(f, y[..., :V], y[..., V:])

    opt, y = optimizer(model, with_variances), torch.cat([REAL, variances], -1)
    opt.loss_fn(model(X), y).backward()
    close(measured(opt), truth(model, with_variances, y, "ggn"), 1e-9)
