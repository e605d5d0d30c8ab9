"""A loss that the package has never seen is one class and one line, and has every curvature; what it does not say is
refused."""

import cases
import measured
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from torchcurv import LossFormula, SecondOrderOptimizer, curvature, laplace, register_loss
from torchcurv.curv.losses.table import FORMULAS, loss_of


# --8<-- [start:loss]
class PoissonNLL(LossFormula):
    """c = e^f - y f of counts y with the mean e^f, per element; H = diag(e^f)."""

    name = "poisson_nll"
    elementwise = True
    hessian_needs_target = False

    def value(self, f, y):
        return f.exp() - y * f

    def gradient(self, f, y):
        return f.exp() - y

    def root(self, f, y, v):
        return (f / 2).exp() * v

    def label_gradient(self, f, generator):
        return f.exp() - torch.poisson(f.exp(), generator)

    def for_module(self, module):
        if not module.log_input or module.full:
            raise ValueError("nn.PoissonNLLLoss: its formula is known for log_input=True and full=False")
        return self

    def check_gradient(self, f, gradient, tolerance):
        least = (f.exp() - gradient).amin()
        return f"it would say of a count that it is {float(least):.3g}" if least < -tolerance else None

    def predictive(self, f, variance):
        return (f + variance / 2).exp()  # the mean of a log-normal variable


# --8<-- [end:loss]


class Huber(LossFormula):
    """c = ½ d² where |d| < 1, |d| - ½ elsewhere, d = f - y: H depends on the target."""

    elementwise = True

    def value(self, f, y):
        return F.huber_loss(f, y, reduction="none")

    def gradient(self, f, y):
        return (f - y).clamp(-1, 1)

    def root(self, f, y, v):
        return ((f - y).abs() < 1) * v

    def label_gradient(self, f, generator):
        return torch.empty_like(f).normal_(generator=generator).clamp(-1, 1)


class Metric(LossFormula):
    """c = ½ |U (f - y)|² for the outputs of a term together: H = U^T U, and S = U^T is not symmetric."""

    name = "metric"
    hessian_needs_target = False
    U = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, -3.0], [0.0, 0.0, 0.5]], dtype=torch.float64)

    def value(self, f, y):
        return ((f - y) @ self.U.T).square().sum(-1) / 2

    def gradient(self, f, y):
        return (f - y) @ self.U.T @ self.U

    def root(self, f, y, v):
        return v @ self.U

    def label_gradient(self, f, generator):
        return torch.empty_like(f).normal_(generator=generator) @ self.U


class MetricLoss(nn.Module):
    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, f, y):
        c = ((f - y) @ Metric.U.T).square().sum(-1) / 2
        return c.mean() if self.reduction == "mean" else c.sum()


@pytest.fixture(autouse=True)
def registered(own_tables):
    register_loss(nn.PoissonNLLLoss, formula=PoissonNLL())
    register_loss(nn.HuberLoss, formula=Huber())
    register_loss(MetricLoss, formula=Metric())


LOSSES = [
    pytest.param(make(reduction=reduction), id=f"{make.__name__}-{reduction}")
    for make in (nn.PoissonNLLLoss, nn.HuberLoss, MetricLoss)
    for reduction in ("mean", "sum")
]
POISSON = LOSSES[:2]
X = cases.randn(6, 4, seed=3)
Y = (cases.randn(6, 3, seed=4).abs() * 2).floor()


def net():
    return cases.seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def hessian(f):
    return jacrev(jacrev(f))


def flat(tensors):
    return torch.cat([x.flatten() for x in tensors.values()])


def function_of(model):
    """(f of a flat vector of parameters, that vector)."""
    at = dict(model.named_parameters())
    theta = flat(at).detach()

    def f(theta):
        parts = theta.split([p.numel() for p in at.values()])
        return functional_call(model, {k: x.view_as(p) for (k, p), x in zip(at.items(), parts, strict=True)}, (X,))

    return f, theta


def ggn(model, loss):
    f, theta = function_of(model)
    J = jacrev(f)(theta).flatten(0, 1)
    H = hessian(lambda out: loss(out, Y))(f(theta)).reshape(len(J), len(J))
    return J.T @ H @ J


def empirical_fisher(model, loss):
    """R sum_n u_n u_n^T, u_n the gradient of the terms of a sample: those of a mean are R times as large."""
    f, theta = function_of(model)
    total = type(loss)(reduction="sum")
    rows = jacrev(lambda t: torch.stack([total(out[None], y[None]) for out, y in zip(f(t), Y, strict=True)]))(theta)
    terms = len(Y) if isinstance(loss, MetricLoss) else Y.numel()
    return rows.T @ rows / (terms if loss.reduction == "mean" else 1)


def true_hessian(model, loss):
    f, theta = function_of(model)
    return hessian(lambda t: loss(f(t), Y))(theta)


TRUTHS = {"ggn": ggn, "empirical_fisher": empirical_fisher, "hessian": true_hessian}
close = measured.close


def optimizer(model, loss_fn, **options):
    return measured.optimizer(model, loss_fn, **options)


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", TRUTHS)
@pytest.mark.parametrize("trigger", ["module", "observe"])
@pytest.mark.parametrize("loss", LOSSES)
def test_an_optimizer_measures_it(loss, trigger, kind):
    model = net()
    opt = optimizer(model, loss if trigger == "module" else None, curv_type=kind, indefinite="abs")
    output = model(X)
    if trigger == "observe":
        opt.observe(output, Y, loss)
    loss(output, Y).backward()
    close(measured.measured(opt), TRUTHS[kind](model, loss))


@pytest.mark.parametrize("kind", TRUTHS)
@pytest.mark.parametrize("loss", POISSON)
def test_its_name_is_enough_where_the_gradient_says_all(loss, kind):
    model = net()
    opt = optimizer(model, "poisson_nll", reduction=loss.reduction, curv_type=kind, indefinite="abs")
    loss(model(X), Y).backward()
    close(measured.measured(opt), TRUTHS[kind](model, loss))


def test_a_gradient_of_another_loss_is_refused_under_its_name():
    model = net()
    opt = optimizer(model, "poisson_nll")
    with pytest.raises(ValueError, match=r"not that of loss_fn='poisson_nll'.*a count that it is -.*observe\("):
        (10 * nn.PoissonNLLLoss()(model(X), 0 * Y)).backward()
    opt.remove()


@pytest.mark.parametrize("kind", TRUTHS)
@pytest.mark.parametrize("loss", LOSSES)
def test_curvature_and_its_operator_are_those_of_the_loss(loss, kind):
    model, data = net(), [(X, Y)]
    truth = TRUTHS[kind](model, loss)
    found = curvature(model, loss, data, curv_type=kind, approx="full")
    close(found.to_dense(), truth)
    operator = curvature(model, loss, data, curv_type=kind, approx="operator")
    close(operator.matvec(torch.eye(len(truth), dtype=torch.float64)), truth)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_propagated_diagonal_of_its_hessian(loss):
    model = cases.seeded(lambda: nn.Linear(4, 3))  # where the diagonal is exact if H at the output is diagonal
    found = curvature(model, loss, [(X, Y)], curv_type="hessian", approx="diag", hessian_method="propagate").diag()
    close(found, true_hessian(model, loss).diagonal())


@pytest.mark.parametrize("loss", POISSON)
def test_its_fisher_is_the_ggn_in_expectation(loss):
    model, data = net(), [(X, Y)]
    truth = ggn(model, loss)
    close(curvature(model, loss, data, curv_type="fisher", approx="full").to_dense(), truth)
    for kind in ("fisher", "ggn"):
        drawn = curvature(model, loss, data, curv_type=kind, approx="full", samples=4000).to_dense()
        assert (drawn - truth).norm() < 0.1 * truth.norm()
        assert (drawn - truth).norm() > 1e-4 * truth.norm()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("approx", ["kfac", "diag", "block"])
def test_a_step_is_taken(loss, approx):
    model = net()
    opt = SecondOrderOptimizer(model, loss_fn=loss, approx=approx, lr=0.1, damping=1.0)
    before = float(loss(model(X), Y).detach())
    for _ in range(10):
        opt.zero_grad()
        loss(model(X), Y).backward()
        opt.step()
    assert float(loss(model(X), Y).detach()) < before


def test_the_predictions_of_its_laplace_posterior():
    model, loss = net().eval(), nn.PoissonNLLLoss()
    posterior = laplace(model, loss, [(X, Y)])
    mean, covariance = posterior.glm(X)
    close(posterior.predict_probit(X), (mean + covariance.diagonal(dim1=1, dim2=2) / 2).exp())
    values = nn.PoissonNLLLoss(reduction="sum")(model(X), Y).detach()
    assert posterior.likelihood.energy == pytest.approx(float(values))


# --------------------------------------------------------------------------------- what is derived


TRIED = {
    "cross_entropy": FORMULAS["cross_entropy"],
    "mse": FORMULAS["mse"],
    "bce_with_logits": FORMULAS["bce_with_logits"],
    "metric": Metric(),
    "poisson_nll": PoissonNLL(),
    "huber": Huber(),
}


@pytest.mark.parametrize("name", TRIED)
def test_the_derivatives_of_a_formula_are_those_of_its_value(name):
    formula, f, v = TRIED[name], cases.randn(4, 2, 3, seed=1), cases.randn(4, 2, 3, seed=2)
    y = cases.randn(4, 2, 3, seed=5).softmax(-1)
    gradient = jacrev(lambda f: formula.value(f, y).sum())(f)
    H = hessian(lambda f: formula.value(f, y).sum())(f).reshape(24, 24)
    close(formula.gradient(f, y), gradient)
    close(formula.hessian(f, y, v).flatten(), H @ v.flatten())
    close(formula.hessian_diagonal(f, y).flatten(), H.diagonal())
    columns = torch.stack([formula.column(f[:, 0], y[:, 0], k) for k in range(3)], -1)
    at_first = H.reshape(4, 2, 3, 4, 2, 3)[range(4), 0, :, range(4), 0]
    close(columns @ columns.mT, at_first)
    for method in ("hessian", "hessian_diagonal", "column", "draw"):  # the shorter ways agree with what follows
        given = {"hessian": (v,), "hessian_diagonal": (), "column": (1,), "draw": (torch.Generator().manual_seed(0),)}
        derived = getattr(LossFormula, method)(formula, f, y, *given[method])
        if method == "draw":
            given["draw"] = (torch.Generator().manual_seed(0),)
        close(getattr(formula, method)(f, y, *given[method]), derived)


# --------------------------------------------------------------------------------- what is refused


def test_a_formula_says_all_four():
    class Partial(LossFormula):
        def value(self, f, y):
            return f

    with pytest.raises(TypeError, match="abstract"):
        register_loss(MetricLoss, formula=Partial())


def test_a_loss_whose_hessian_needs_the_target_is_not_known_by_its_name_alone():
    with pytest.raises(ValueError, match=r"loss_fn='Huber' is a name, and the Hessian.*pass the loss module"):
        optimizer(net(), "Huber")
    model = net()
    opt = optimizer(model, None)
    output = model(X)
    opt.observe(output, Y, "Huber")  # the target is there
    nn.HuberLoss()(output, Y).backward()
    close(measured.measured(opt), ggn(model, nn.HuberLoss()))


@pytest.mark.parametrize("approx", ["full", "operator"])
def test_the_exact_fisher_of_a_loss_whose_hessian_needs_the_target_is_refused(approx):
    with pytest.raises(ValueError, match=r"exact Fisher.*'Huber'.*samples=1"):
        curvature(net(), nn.HuberLoss(), [(X, Y)], curv_type="fisher", approx=approx).matvec(torch.zeros(43).double())


def test_settings_that_the_formula_does_not_know_are_refused():
    with pytest.raises(ValueError, match="log_input=True and full=False"):
        loss_of(nn.PoissonNLLLoss(log_input=False))


def test_predictions_that_the_formula_does_not_say_are_refused():
    posterior = laplace(net().eval(), MetricLoss(), [(X, Y)])
    with pytest.raises(NotImplementedError, match=r"Metric\.predictive"):
        posterior.predict_probit(X)
    with pytest.raises(ValueError, match="use predict_probit"):
        posterior.predict_regression(X)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ValueError, "either like="),
        ({"like": "mse", "formula": Metric()}, ValueError, "either like="),
        ({"formula": Metric}, TypeError, "pass an instance"),
        ({"formula": PoissonNLL(), "name": "mse"}, ValueError, "the name 'mse' is that of SquaredError"),
        ({"formula": Metric(), "options": ("weight",)}, ValueError, "does not know the options weight; it knows none"),
        ({"like": "poisson"}, ValueError, "'poisson_nll'"),
    ],
)
def test_a_registration_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        register_loss(MetricLoss, **arguments)
