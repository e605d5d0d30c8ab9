"""A kind of curvature that the package has never seen is one class and one line; what it does not say is refused."""

import cases
import measured
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from torchcurv import CurvatureKind, SecondOrderOptimizer, SignalKind, Signals, curvature, directions, register_kind
from torchcurv.curv.kinds.table import KINDS

close = measured.close


class Centred(SignalKind):
    """The empirical Fisher of gradients at the output, less their mean over the samples."""

    def signals(self, terms, generator):
        gradient = terms.gradient()
        return Signals(1, iter([gradient - gradient.mean(0)]))


# --8<-- [start:kind]
class CentredFisher(SignalKind):
    """The same for labels of the model's own."""

    def signals(self, terms, generator):
        count = self.samples or 1

        def drawn():
            for _ in range(count):
                gradient = terms.label_gradient(generator)
                yield (gradient - gradient.mean(0)) * count**-0.5

        return Signals(count, drawn())


# --8<-- [end:kind]


@pytest.fixture(autouse=True)
def registered(own_tables):
    register_kind("centred", Centred)
    register_kind("centred_fisher", CentredFisher)


X, Y = cases.randn(6, 4, seed=3), torch.tensor([0, 1, 2, 2, 1, 0])
LOSSES = [
    pytest.param(nn.CrossEntropyLoss(), id="mean"),
    pytest.param(nn.CrossEntropyLoss(reduction="sum"), id="sum"),
    pytest.param(nn.CrossEntropyLoss(cases.CLASS_WEIGHTS), id="weights"),
]


def net():
    return cases.seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def factors(loss):
    """R w of every sample."""
    w = torch.ones(len(Y), dtype=torch.float64) if loss.weight is None else loss.weight[Y]
    return w if loss.reduction == "sum" else w / w.sum()


def truth(model, loss):
    """sum_n R w_n J_n^T u_n u_n^T J_n, u_n the gradient of sample n at the output, less the mean of all."""
    at = dict(model.named_parameters())
    jacobians = jacrev(lambda p: functional_call(model, p, (X,)))(at)
    J = torch.cat([x.flatten(2) for x in jacobians.values()], -1)  # n c p
    u = model(X).softmax(1) - nn.functional.one_hot(Y, 3)
    rows = torch.einsum("ncp,nc->np", J, u - u.mean(0)).detach() * factors(loss).sqrt()[:, None]
    return rows.T @ rows


@pytest.mark.parametrize("trigger", ["module", "observe"])
@pytest.mark.parametrize("loss", LOSSES)
def test_an_optimizer_measures_it(loss, trigger):
    model = net()
    opt = measured.optimizer(model, loss if trigger == "module" else None, curv_type="centred")
    output = model(X)
    if trigger == "observe":
        opt.observe(output, Y, loss)
    loss(output, Y).backward()
    close(measured.measured(opt), truth(model, loss))


@pytest.mark.parametrize("loss", LOSSES)
def test_curvature_measures_it(loss):
    model = net()
    expected = truth(model, loss)
    found = curvature(model, loss, [(X, Y)], curv_type="centred", approx="full")
    close(found.to_dense(), expected)
    close(curvature(model, loss, [(X, Y)], curv_type="centred", approx="diag").diag(), expected.diagonal())


def test_it_converges_in_the_number_of_its_draws():
    model, loss = net(), nn.CrossEntropyLoss()
    one, two = (
        curvature(model, loss, [(X, Y)], curv_type="centred_fisher", approx="full", samples=4000, seed=seed).to_dense()
        for seed in (0, 1)
    )
    ggn = curvature(model, loss, [(X, Y)], approx="full").to_dense()
    expected = ggn * (1 - 1 / len(X))  # independent draws less their mean, but for what other samples add to it
    assert 1e-4 < (one - two).norm() / two.norm() < 0.1
    assert (one - expected).norm() < 0.25 * expected.norm()


@pytest.mark.parametrize("approx", ["kfac", "ekfac", "diag", "unit", "block", "full", "lowrank"])
@pytest.mark.parametrize("kind", ["centred", "centred_fisher"])
def test_a_step_is_taken_with_every_approximation(kind, approx):
    model, loss = net(), nn.CrossEntropyLoss()
    opt = SecondOrderOptimizer(model, loss_fn=loss, curv_type=kind, approx=approx, damping=1.0)
    before = float(loss(model(X), Y).detach())
    for _ in range(10):
        opt.zero_grad()
        loss(model(X), Y).backward()
        opt.step()
    assert float(loss(model(X), Y).detach()) < before
    assert kind in opt.summary()


def test_its_directions_are_eigenvectors():
    model, loss = net(), nn.CrossEntropyLoss()
    (found,) = directions(model, loss, [(X, Y)], curv_type="centred").values()
    values = torch.linalg.eigvalsh(truth(model, loss))
    close(found.spectrum, values[-len(found.spectrum) :], 1e-9)


# --------------------------------------------------------------------------------- what is refused


def test_an_operator_of_a_kind_without_products_is_refused_by_name():
    with pytest.raises(ValueError, match=r"curv_type='centred' says no product with vectors"):
        curvature(net(), nn.CrossEntropyLoss(), [(X, Y)], curv_type="centred", approx="operator")
    with pytest.raises(ValueError, match=r"curv_type='input' says no product with vectors"):
        curvature(net(), nn.CrossEntropyLoss(), [(X, Y)], curv_type="input", approx="operator")


def test_an_operator_takes_the_product_that_a_kind_says(monkeypatch):
    class WithProduct(Centred):
        def output_matvec(self, loss, v):
            u = loss.term_gradients()
            u = u - u.mean(0)
            return loss.restored(u * (u * loss.canonical(v)).sum((1, 2), keepdim=True))

    monkeypatch.setitem(KINDS, "centred", WithProduct)
    model, loss = net(), nn.CrossEntropyLoss()
    expected = truth(model, loss)
    operator = curvature(model, loss, [(X, Y)], curv_type="centred", approx="operator")
    close(operator.matvec(torch.eye(len(expected), dtype=torch.float64)), expected)


def test_a_kind_that_is_not_registered_is_refused():
    with pytest.raises(ValueError, match=r"curv_type='decentred' is unknown; allowed are .*'centred'"):
        SecondOrderOptimizer(net(), curv_type="decentred")
    with pytest.raises(ValueError, match=r"curv_type='decentred' is unknown"):
        curvature(net(), nn.CrossEntropyLoss(), [(X, Y)], curv_type="decentred", approx="operator")


@pytest.mark.parametrize("count", [0, 2])
def test_signals_that_are_not_as_many_as_was_said_are_refused(count, monkeypatch):
    class Miscounted(SignalKind):
        def signals(self, terms, generator):
            return Signals(count, iter([terms.gradient()]))

    monkeypatch.setitem(KINDS, "centred", Miscounted)
    with pytest.raises(ValueError, match=f"sends {count} signals, and sent 1"):
        curvature(net(), nn.CrossEntropyLoss(), [(X, Y)], curv_type="centred")


def test_a_kind_says_what_it_measures():
    class Silent(CurvatureKind):
        pass

    with pytest.raises(TypeError, match="measure"):
        Silent()


@pytest.mark.parametrize(
    "name, kind, error, message",
    [
        ("new", Centred(), TypeError, "pass a subclass of CurvatureKind"),
        ("new", nn.Linear, TypeError, "pass a subclass of CurvatureKind"),
        ("a new one", Centred, ValueError, "pass a name"),
        ("ggn", Centred, ValueError, "the name 'ggn' is that of GGN"),
        ("gradient", Centred, ValueError, "the name 'gradient' is that of GradientShares"),
    ],
)
def test_a_registration_says_what_is_wrong(name, kind, error, message):
    with pytest.raises(error, match=message):
        register_kind(name, kind)


def test_a_registration_lets_options_name_it():
    register_kind("once", Centred)
    register_kind("once", Centred)  # again, as a notebook does
    assert KINDS["once"] is Centred
    SecondOrderOptimizer(net(), curv_type="once").remove()
