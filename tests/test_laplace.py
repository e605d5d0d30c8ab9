"""Laplace posteriors against closed forms and dense matrices, in float64."""

import copy
import io
import math
import pickle

import cases
import models
import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from torchcurv import curvature, laplace, register_loss
from torchcurv.curv.losses.table import MODULES
from torchcurv.curv.posterior.draws import arguments

DELTA, NOISE, TAU, DRAWS = 0.7, 0.3, 0.4, 100_000
KINDS = ["ggn", "fisher", "empirical_fisher", "hessian"]
SHAPES = {
    "diag": {"approx": "diag"},
    "unit": {"approx": "unit"},
    "kfac": {"approx": "kfac"},
    "kfac_blocks": {"approx": "kfac", "factor_blocks": 2},
    "kfac_diagonal": {"approx": "kfac", "max_factor_dim": 3},
    "ekfac": {"approx": "ekfac"},
    "block": {"approx": "block"},
    "full": {"approx": "full"},
    "full_rows": {"approx": "full", "rows_limit": 3},
    "fisher": {"approx": "kfac", "curv_type": "fisher"},
    "empirical_fisher": {"approx": "block", "curv_type": "empirical_fisher"},
    "hessian": {"approx": "block", "curv_type": "hessian", "indefinite": "abs"},
}
close = torch.testing.assert_close


def classification():
    """(a network of 24 parameters, data in two batches of different size)."""
    model = cases.seeded(lambda: nn.Sequential(nn.Conv1d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))).eval()
    x, y = cases.randn(6, 2, 3), torch.arange(6) % 3
    return model, [(x[:2], y[:2]), (x[2:], y[2:])]


def regression(noise=NOISE, delta=DELTA):
    """(a linear layer at its maximum of the posterior, x, y)."""
    x, y = cases.randn(12, 3, seed=1), cases.randn(12, 2, seed=2)
    model, features = nn.Linear(3, 2).double(), with_ones(x)
    weights = torch.linalg.solve(features.T @ features / noise + delta * torch.eye(4).double(), features.T @ y / noise)
    with torch.no_grad():
        model.weight.copy_(weights[:3].T)
        model.bias.copy_(weights[3])
    return model, x, y


def with_ones(x):
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def evidence(x, y, delta, noise):
    """log p(y) of independent Gaussian processes, one for each output."""
    features = with_ones(x)
    covariance = noise * torch.eye(len(x)).double() + features @ features.T / delta
    return sum(MultivariateNormal(torch.zeros(len(x)).double(), covariance).log_prob(column) for column in y.T)


def flat_batch(named):
    return torch.cat([x.flatten(1) for x in named.values()], 1)


def dense_precision(model, loss, data, factor, options, delta=DELTA, tau=TAU):
    C = curvature(model, loss, data, **options).to_dense()
    return factor / tau * C + delta * torch.eye(len(C)).double()


# ------------------------------------------------------------------------------- what the precision is


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("approx", ["full", "block", "kfac", "ekfac", "unit"])
def test_a_linear_regression_is_exact(approx, reduction):
    model, x, y = regression()
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    posterior = laplace(
        model, nn.MSELoss(reduction=reduction), data, approx=approx, prior_precision=DELTA, noise_variance=NOISE
    )
    features = with_ones(x)
    covariance = torch.linalg.inv(features.T @ features / NOISE + DELTA * torch.eye(4).double())
    weights = covariance @ features.T @ y / NOISE
    close(torch.cat([posterior.mean["weight"].T, posterior.mean["bias"][None]]), weights)
    variances = posterior.variances()
    close(torch.cat([variances["weight"], variances["bias"][:, None]], 1), covariance.diag().expand(2, 4))
    new = cases.randn(7, 3, seed=4)
    mean, predictive = posterior.predict_regression(new)
    close(mean, with_ones(new) @ weights)
    truth = NOISE + (with_ones(new) @ covariance @ with_ones(new).T).diag()
    close(predictive, truth[:, None, None] * torch.eye(2).double())
    close(posterior.log_marginal_likelihood(), evidence(x, y, DELTA, NOISE))


def test_the_noise_variance_is_one_unless_it_is_given():
    model, x, y = regression(noise=1.0)
    posterior = laplace(model, "mse", [(x, y)], approx="full", prior_precision=DELTA)
    assert posterior.noise_variance == 1
    close(posterior.log_marginal_likelihood(), evidence(x, y, DELTA, 1.0))


class WeightedSquaredError(nn.MSELoss):
    """The outputs weigh differently, and one sample nothing."""

    weight = torch.tensor([0.5, 3.0]).double() * (torch.arange(12) != 4).double()[:, None]

    def forward(self, f, y):
        return (self.weight * (f - y) ** 2).sum() / self.weight.sum()


@pytest.fixture
def weighted():
    """A loss with a forward of its own is no squared error, unless that is said."""
    held = dict(MODULES)
    register_loss(WeightedSquaredError, like="mse", options=("weight",))
    yield
    MODULES.clear()
    MODULES.update(held)


def test_weighted_residuals_have_a_noise_of_their_own(weighted):
    model, x, y = regression()
    loss = WeightedSquaredError()
    posterior = laplace(model, loss, [(x, y)], approx="full", prior_precision=DELTA, noise_variance=NOISE)
    kept = loss.weight > 0
    truth = torch.distributions.Normal(model(x)[kept], (NOISE / loss.weight[kept]).sqrt()).log_prob(y[kept]).sum()
    close(posterior.likelihood.log_prob(NOISE), truth.detach())
    features, variances = with_ones(x), posterior.variances()
    for k, weight in enumerate(loss.weight.T):
        precision = features.T @ (weight[:, None] / NOISE * features) + DELTA * torch.eye(4).double()
        found = torch.cat([variances["weight"][k], variances["bias"][k : k + 1]])
        close(found, torch.linalg.inv(precision).diag())


@pytest.mark.parametrize("case", cases.LOSSES, ids=cases.ids(cases.LOSSES))
def test_every_loss_has_the_scale_of_its_sum(case):
    """Curvature and likelihood are those of E = L / R, whatever L divides by."""
    model, x = cases.net_for(case), cases.randn(4, 4, seed=3)
    y = cases.target_for(case, model(x))
    posterior = laplace(model, case.loss, [(x, y)], approx="full", prior_precision=DELTA, temperature=TAU)
    terms = oracles.loss_terms(case.loss, model(x), y)
    params = list(model.named_parameters())
    truth = oracles.ggn(model, case.loss, x, y, params) / terms.R / TAU
    truth = truth + DELTA * torch.eye(len(truth)).double()
    close(torch.cat([x.flatten() for x in posterior.variances().values()]), torch.linalg.inv(truth).diag())
    close(posterior.entropy(), MultivariateNormal(torch.zeros(len(truth)).double(), precision_matrix=truth).entropy())
    constant = 0.5 * terms.c.numel() * math.log(2 * math.pi) if isinstance(case.loss, nn.MSELoss) else 0.0
    close(posterior.likelihood.log_prob(posterior.noise_variance), -(terms.w * terms.c).sum().detach() - constant)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_logistic_regression_has_the_hessian_of_its_negative_log_joint(kind, reduction):
    model = cases.seeded(lambda: nn.Linear(4, 3))
    x, y = cases.randn(9, 4), torch.arange(9) % 3
    data, loss = [(x[:2], y[:2]), (x[2:], y[2:])], nn.CrossEntropyLoss(reduction=reduction)
    posterior = laplace(model, loss, data, approx="full", curv_type=kind, prior_precision=DELTA)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])

    def negative_log_joint(theta, x=x, y=y, delta=DELTA):
        f = x @ theta[:12].reshape(3, 4).T + theta[12:]
        return F.cross_entropy(f, y, reduction="sum") + 0.5 * delta * theta.square().sum()

    if kind == "empirical_fisher":
        scores = torch.stack([torch.func.grad(negative_log_joint)(theta, x[n], y[n], 0.0) for n in range(9)])
        precision = scores.T @ scores + DELTA * torch.eye(15).double()
    else:
        precision = torch.autograd.functional.hessian(negative_log_joint, theta)
    close(torch.cat([v.flatten() for v in posterior.variances().values()]), torch.linalg.inv(precision).diag())
    # ½ P log 2π of the prior and of the integral cancel
    truth = -negative_log_joint(theta) + 7.5 * math.log(DELTA) - 0.5 * torch.logdet(precision)
    close(posterior.log_marginal_likelihood(), truth)


@pytest.mark.parametrize("name", SHAPES)
def test_draws_densities_and_predictions_are_those_of_the_dense_gaussian(name):
    model, data = classification()
    posterior = laplace(model, nn.CrossEntropyLoss(), data, prior_precision=DELTA, temperature=TAU, **SHAPES[name])
    precision = dense_precision(model, nn.CrossEntropyLoss(), data, 6, SHAPES[name])
    if name == "hessian":
        values, vectors = torch.linalg.eigh(precision - DELTA * torch.eye(len(precision)).double())
        precision = vectors @ (values.abs()[:, None] * vectors.T) + DELTA * torch.eye(len(precision)).double()
    mean = torch.cat([p.detach().flatten() for p in model.parameters()])
    truth = MultivariateNormal(mean, precision_matrix=precision)
    prior = MultivariateNormal(torch.zeros_like(mean), precision_matrix=DELTA * torch.eye(len(mean)).double())
    few = posterior.sample(torch.Generator().manual_seed(0), 4)
    close(posterior.log_prob(few), truth.log_prob(flat_batch(few)))
    close(posterior.log_prob(), truth.log_prob(mean))
    close(posterior.entropy(), truth.entropy())
    close(posterior.kl(), kl_divergence(truth, prior))
    close(torch.cat([x.flatten() for x in posterior.variances().values()]), truth.covariance_matrix.diag())

    x = cases.randn(5, 2, 3, seed=7)
    J, f = oracles.jacobian(model, x, list(model.named_parameters()))
    glm = posterior.glm(x)
    close(glm.mean, f)
    close(glm.covariance, torch.einsum("nap,pq,nbq->nab", J, truth.covariance_matrix, J))
    close(posterior.glm(x, chunk_size=2).covariance, glm.covariance)

    draws = DRAWS if name != "full_rows" else 500  # rows are drawn one after the other
    deviation = flat_batch(posterior.sample(torch.Generator().manual_seed(1), draws)) - mean
    scale = truth.covariance_matrix.diag().sqrt()
    error = (deviation.T @ deviation / draws - truth.covariance_matrix) / scale / scale[:, None]
    assert error.abs().max() < 5 * (2 / draws) ** 0.5
    assert (deviation.mean(0) / scale).abs().max() < 5 * draws**-0.5


# ----------------------------------------------------------------------------------- the marginal likelihood


@pytest.mark.parametrize("name", SHAPES)
def test_the_marginal_likelihood_and_its_gradient_are_those_of_dense_matrices(name):
    model, data = classification()
    loss = nn.CrossEntropyLoss()
    posterior = laplace(model, loss, data, prior_precision=DELTA, temperature=TAU, **SHAPES[name])
    C = dense_precision(model, loss, data, 6, SHAPES[name], delta=0.0)
    if name == "hessian":
        values, vectors = torch.linalg.eigh(C)
        C = vectors @ (values.abs()[:, None] * vectors.T)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    fits = sum(-F.cross_entropy(model(x), y, reduction="sum").detach() for x, y in data)

    def truth(deltas):
        logdet = torch.logdet(C + deltas.diag())
        return fits / TAU + 0.5 * (deltas.log().sum() - (deltas * theta**2).sum() - logdet)

    delta = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    expected, found = truth(delta.expand(len(theta))), posterior.log_marginal_likelihood(delta)
    close(found, expected)
    close(torch.autograd.grad(found, delta), torch.autograd.grad(expected, delta))
    close(posterior.log_marginal_likelihood(), truth(torch.full_like(theta, DELTA)))

    sizes = torch.tensor([block.size for block in posterior.gaussian.blocks])
    each = torch.linspace(0.5, 2.0, len(sizes)).double().requires_grad_()
    expected, found = truth(each.repeat_interleave(sizes)), posterior.log_marginal_likelihood(each)
    close(found, expected)
    close(torch.autograd.grad(found, each), torch.autograd.grad(expected, each))
    named = dict(zip(posterior.blocks, each.tolist(), strict=True))
    close(posterior.log_marginal_likelihood(named), expected)
    posterior.prior_precision = named
    close(posterior.log_marginal_likelihood(), expected)
    variances = torch.cat([x.flatten() for x in posterior.variances().values()])
    close(variances, torch.linalg.inv(C + each.detach().repeat_interleave(sizes).diag()).diag())


def test_the_evidence_of_a_regression_is_differentiable_in_prior_and_noise():
    """At the maximum of the posterior the evidence does not change with θ*, so that its own gradient is found."""
    model, x, y = regression()
    posterior = laplace(model, nn.MSELoss(), [(x, y)], prior_precision=DELTA, noise_variance=NOISE)
    settings = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (DELTA, NOISE)]
    found = torch.autograd.grad(posterior.log_marginal_likelihood(*settings), settings)
    close(found, torch.autograd.grad(evidence(x, y, *settings), settings))
    h = 1e-5
    for k, slope in enumerate(found):
        moved = [[v + sign * h * (j == k) for j, v in enumerate((DELTA, NOISE))] for sign in (1, -1)]
        high, low = (posterior.log_marginal_likelihood(*at) for at in moved)
        close((high - low) / (2 * h), slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("per_block", [False, True])
def test_the_best_prior_is_mackays_fixed_point(per_block):
    """δ |θ|² = γ, the effective number of parameters Σ l / (l + δ)."""
    model, data = classification()
    posterior = laplace(model, nn.CrossEntropyLoss(), data, approx="block", prior_precision=DELTA)
    before = posterior.log_marginal_likelihood()
    history = posterior.optimize_prior(300, 0.1, per_block=per_block)
    close(history[0], before)
    close(history[-1], posterior.log_marginal_likelihood())
    assert len(history) == 301 and history[-1] > history[0]
    blocks = list(curvature(model, nn.CrossEntropyLoss(), data, approx="block").blocks.values())
    deltas = posterior.prior_precision.tolist() if per_block else [posterior.prior_precision] * 2
    gammas, norms = [], []
    for block, delta in zip(blocks, deltas, strict=True):
        values = 6 * block.factor.eigvalsh()
        gammas.append((values / (values + delta)).sum())
        norms.append(delta * sum(p.detach().square().sum() for p in block.params))
    gammas, norms = torch.stack(gammas), torch.stack(norms)
    close(*((norms, gammas) if per_block else (norms.sum(), gammas.sum())), rtol=1e-4, atol=0)


def test_the_best_noise_accounts_for_the_residuals():
    """σ² = |y - f|² / (elements - γ)."""
    model, x, y = regression()
    posterior = laplace(model, "mse", [(x, y)], approx="full", prior_precision=DELTA)
    posterior.optimize_prior(400, noise=True)
    noise, delta = posterior.noise_variance, posterior.prior_precision
    values = torch.linalg.eigvalsh(with_ones(x).T @ with_ones(x)) / noise  # for each of the two outputs
    gamma = 2 * (values / (values + delta)).sum()
    close(torch.tensor(noise).double(), ((y - model(x)) ** 2).sum().detach() / (y.numel() - gamma), rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------- predictions


def test_draws_of_a_linear_model_have_the_linearised_distribution():
    model, x, y = regression()
    posterior = laplace(model, nn.MSELoss(), [(x, y)], prior_precision=DELTA, noise_variance=NOISE)
    outputs, glm = posterior.predict(x, 4000), posterior.glm(x)
    assert outputs.shape == (4000, *y.shape) and not outputs.requires_grad
    scale = glm.covariance.diagonal(dim1=1, dim2=2).sqrt()
    assert ((outputs.mean(0) - glm.mean) / scale).abs().max() < 5 * 4000**-0.5
    assert ((outputs.var(0) / scale**2 - 1).abs().max()) < 5 * (2 / 4000) ** 0.5
    assert posterior.predict(lambda: model(x)[:, 0], 2).shape == (2, len(x))


def test_probit_predictions():
    model, data = classification()
    x = cases.randn(5, 2, 3, seed=7)
    posterior = laplace(model, nn.CrossEntropyLoss(), data)
    mean, covariance = posterior.glm(x)
    shrunk = mean / (1 + math.pi / 8 * covariance.diagonal(dim1=1, dim2=2)).sqrt()
    close(posterior.predict_probit(x), shrunk.softmax(1))
    close(posterior.predict_probit(x).sum(1), torch.ones(5).double())
    bits = [(x, F.one_hot(y, 3).double()) for x, y in data]
    posterior = laplace(model, nn.BCEWithLogitsLoss(), bits)
    mean, covariance = posterior.glm(x)
    close(
        posterior.predict_probit(x), (mean / (1 + math.pi / 8 * covariance.diagonal(dim1=1, dim2=2)).sqrt()).sigmoid()
    )


@pytest.mark.parametrize("approx", ["full", "block"])
@pytest.mark.parametrize("layout", ["classes_first", "classes_last", "rows"])
def test_probit_predictions_of_sequences(layout, approx):
    """[N, C, T], [N, T, C] and [N T, C]: each position has its own distribution, and all the same posterior."""
    model = cases.seeded(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))).eval()
    x, y = cases.randn(4, 5, 2), torch.arange(20).reshape(4, 5) % 3
    layouts = {
        "classes_first": (lambda f: f.mT, y, {"class_dim": 1}),
        "classes_last": (lambda f: f, y, {"class_dim": -1}),
        "rows": (lambda f: f.reshape(-1, 3), y.flatten(), {}),
    }
    output_fn, target, options = layouts[layout]
    options = {"approx": approx, "prior_precision": DELTA, "output_fn": output_fn, **options}
    posterior = laplace(model, "cross_entropy", [(x, target)], **options)
    reference = laplace(model, "cross_entropy", [(x, y)], approx=approx, prior_precision=DELTA, class_dim=-1)
    close(posterior.log_marginal_likelihood(), reference.log_marginal_likelihood())
    f, (_, covariance) = model(x).detach(), reference.glm(x)
    variances = covariance.diagonal(dim1=1, dim2=2).reshape(f.shape)
    close(posterior.predict_probit(x), output_fn((f / (1 + math.pi / 8 * variances).sqrt()).softmax(-1)))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("approx", ["full", "block", "kfac"])
def test_one_output_needs_no_dimension(approx, mode):
    x, y = cases.randn(9, 3), cases.randn(9, seed=2)
    model = cases.seeded(lambda: nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))).train(mode == "train")
    posterior = laplace(model, "mse", [(x, y)], approx=approx, prior_precision=DELTA, noise_variance=NOISE)
    features = with_ones(x)
    covariance = torch.linalg.inv(features.T @ features / NOISE + DELTA * torch.eye(4).double())
    mean, predictive = posterior.predict_regression(x)
    assert mean.shape == (9, 1) and predictive.shape == (9, 1, 1)
    close(mean[:, 0], model(x).detach())
    close(predictive[:, 0, 0], NOISE + (features @ covariance @ features.T).diag())


def test_parameters_outside_are_known_exactly():
    model, data = classification()
    head, loss = model[3], nn.CrossEntropyLoss(reduction="sum")
    posterior = laplace(
        model, nn.CrossEntropyLoss(), data, params=head.parameters(), approx="full", prior_precision=DELTA
    )
    assert list(posterior.mean) == ["3.weight", "3.bias"]
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    H = oracles.ggn(head, loss, model[:3](x).detach(), y, list(head.named_parameters()))
    J, _ = oracles.jacobian(model, x, [(name, p) for name, p in model.named_parameters() if name.startswith("3")])
    covariance = torch.linalg.inv(H + DELTA * torch.eye(len(H)).double())
    close(posterior.glm(x).covariance, torch.einsum("nap,pq,nbq->nab", J, covariance, J))
    outside = model[0].weight.detach().clone()
    with posterior.sampled_params():
        assert torch.equal(model[0].weight, outside) and not torch.equal(model[3].weight, posterior.mean["3.weight"])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("id", ["resnet_bn", "encoder", "gpt_logits", "lstm", "autoencoder", "graph"])
def test_jacobians_of_complete_models(id):
    """Also of those that torch cannot differentiate for all samples at once."""
    case = next(case for case in models.MODELS if case.id == id)
    model, x, y = case.make_model(), case.make_inputs(), case.make_target()
    output_fn = case.output_fn
    posterior = laplace(model, case.loss, [(x, y)], approx="diag", curv_type="empirical_fisher", output_fn=output_fn)
    f = model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
    f = (f if output_fn is None else output_fn(f)).flatten(1)
    mean, covariance = posterior.glm(x)
    close(mean, f.detach())
    names, params = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    variances = posterior.variances()
    variances = torch.cat([variances[name].flatten() for name in names])
    for n, c in ((0, 0), (len(f) - 1, f.shape[1] - 1)):
        J = torch.cat([g.flatten() for g in torch.autograd.grad(f[n, c], params, retain_graph=True)])
        close(covariance[n, c, c], (J**2 * variances).sum())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("approx", ["kfac", "ekfac", "diag", "unit", "block"])
@pytest.mark.parametrize("id", ["resnet_gn", "depthwise_cnn", "vit", "encoder", "gpt_logits", "lstm", "graph"])
def test_the_way_by_layers(id, approx):
    """Jacobians that are never formed as a whole, against those that are."""
    case = next(case for case in models.MODELS if case.id == id)
    model, x, y = case.make_model(), case.make_inputs(), case.make_target()
    options = {"approx": approx, "samples": None if approx == "block" else 1, "rows_limit": 10_000}
    posterior = laplace(model, case.loss, [(x, y)], output_fn=case.output_fn, params=known(model), **options)
    blocks, call = posterior.gaussian.blocks, arguments(x)
    outputs = posterior.linearised
    truth = outputs.by_jacobians(blocks, outputs.network.jacobians(posterior.mean, call))
    close(outputs.by_layers(blocks, call), truth)
    close(posterior.glm(x, chunk_size=2).covariance, truth)


def known(model):
    """The parameters that layers cover."""
    return [p for name, p in model.named_parameters() if "embed" not in name and "token" not in name]


# --------------------------------------------------------------------------------------- the model is lent


def test_weights_come_back_bit_for_bit_also_after_an_exception():
    model, data = classification()
    posterior = laplace(model, nn.CrossEntropyLoss(), data)
    with torch.no_grad():
        model[0].weight += 1  # as further training would; the posterior stays where it was
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="inside"), posterior.sampled_params(torch.Generator().manual_seed(3)):
        drawn = {name: p.detach().clone() for name, p in model.named_parameters()}
        raise RuntimeError("inside")
    assert all(torch.equal(p, x) for p, x in zip(model.parameters(), before, strict=True))
    same = posterior.sample(torch.Generator().manual_seed(3))
    assert all(torch.equal(drawn[name], same[name]) for name in same)
    assert not torch.equal(posterior.mean["0.weight"], model[0].weight)
    with pytest.raises(RuntimeError, match="inside"):
        posterior.predict(lambda: (_ for _ in ()).throw(RuntimeError("inside")), 2)
    assert all(torch.equal(p, x) for p, x in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("approx", ["kfac", "full"])
def test_predictions_stay_where_the_posterior_was_made(approx):
    model, data = classification()
    posterior, x = laplace(model, nn.CrossEntropyLoss(), data, approx=approx), data[0][0]
    before = posterior.glm(x)
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    moved = [p.detach().clone() for p in model.parameters()]
    close(posterior.glm(x), before)
    assert all(torch.equal(p, x) for p, x in zip(model.parameters(), moved, strict=True))


def test_nothing_of_the_model_and_no_global_generator_changes():
    model, data = classification()
    model.eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, state = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    answers = []
    for _ in range(2):
        posterior = laplace(model, nn.CrossEntropyLoss(), data, curv_type="fisher", samples=2, seed=5)
        answers.append([posterior.predict(data[0][0], 2), *posterior.sample().values(), posterior.glm(data[0][0])[1]])
        posterior.optimize_prior(2)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert all(torch.equal(p, x) and (p.grad == 1).all() for p, x in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(*answers, strict=True))
    assert not torch.equal(*answers[0][0])
    other = laplace(model, nn.CrossEntropyLoss(), data, curv_type="fisher", samples=2, seed=6)
    assert not torch.equal(other.predict(data[0][0], 2), answers[0][0])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("approx", ["kfac", "ekfac"])
def test_data_may_be_an_iterator(approx):
    model, data = classification()
    once = laplace(model, "cross_entropy", iter(data), approx=approx)
    close(
        once.log_marginal_likelihood(), laplace(model, "cross_entropy", data, approx=approx).log_marginal_likelihood()
    )


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_low_precision_models(dtype, tol):
    model, x, y = regression()
    truth = laplace(model, nn.MSELoss(), [(x, y)], prior_precision=DELTA)
    variances, covariance = truth.variances(), truth.glm(x).covariance
    low = laplace(model.to(dtype), nn.MSELoss(), [(x.to(dtype), y.to(dtype))], prior_precision=DELTA)
    for name, variance in low.variances().items():
        assert variance.dtype == torch.float32
        close(variance.double(), variances[name], rtol=tol, atol=0)
    close(low.log_marginal_likelihood(), truth.log_marginal_likelihood(), rtol=tol, atol=0)
    close(low.glm(x.to(dtype)).covariance.double(), covariance, rtol=tol, atol=tol * covariance.abs().max().item())
    assert low.predict(x.to(dtype), 2).dtype == dtype


def test_a_copy_is_a_posterior_of_its_own():
    model, data = classification()
    posterior = laplace(model, nn.CrossEntropyLoss(), data)
    copied = copy.deepcopy(posterior)
    before = model[0].weight.detach().clone()
    with copied.sampled_params():
        assert torch.equal(model[0].weight, before) and not torch.equal(copied.model[0].weight, before)
    close(copied.glm(data[0][0]), posterior.glm(data[0][0]))
    close(copied.log_marginal_likelihood(), posterior.log_marginal_likelihood())


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_a_posterior_goes_through_a_file_with_its_model(options):
    model, data = classification()
    posterior = laplace(model, nn.CrossEntropyLoss(), data, prior_precision=DELTA, **options)
    posterior.sample()  # the draws go on where they were
    file = io.BytesIO()
    torch.save(posterior, file)
    file.seek(0)
    for back in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(posterior))):
        assert back.model is not model and torch.equal(back.model[0].weight, model[0].weight)
        x = data[1][0]
        assert torch.equal(back.glm(x).covariance, posterior.glm(x).covariance)
        assert torch.equal(back.log_marginal_likelihood(), posterior.log_marginal_likelihood())
        with back.sampled_params():
            outside, drawn = model[0].weight.detach().clone(), back.model[0].weight.detach().clone()
        assert torch.equal(outside, model[0].weight) and not torch.equal(drawn, back.model[0].weight)
        assert torch.equal(back.log_prob(), posterior.log_prob())
    draws = posterior.sample(), pickle.loads(pickle.dumps(posterior)).sample(), posterior.sample()
    assert torch.equal(draws[1]["3.weight"], draws[2]["3.weight"])
    assert not torch.equal(draws[0]["3.weight"], draws[1]["3.weight"])


# ------------------------------------------------------------------------------------------ what is refused

REFUSED = [
    ({"curv_type": "input"}, ValueError, "the curvature of no likelihood"),
    ({"approx": None}, ValueError, "no factor to draw with"),
    ({"approx": "operator"}, ValueError, "no factor to draw with"),
    ({"damping": 0.1}, ValueError, "the damping is prior_precision; leave damping out"),
    ({"damping_type": "factored"}, ValueError, "the damping is exact; leave damping_type out"),
    ({"ema_decay": 0.9}, ValueError, "measured once"),
    ({"prior_precision": 0.0}, ValueError, "prior_precision=0.0; pass a number > 0"),
    ({"prior_precision": "1"}, TypeError, "prior_precision is '1'; pass a number > 0"),
    ({"prior_precision": torch.ones(3)}, ValueError, r"shape \(3,\).*each of the 2 blocks \['0', '3'\]"),
    ({"prior_precision": {"0": 1.0}}, ValueError, r"one for each of \['0', '3'\]"),
    ({"temperature": -1}, ValueError, "temperature=-1; pass a number > 0"),
    ({"temperature": True}, TypeError, "temperature is True"),
    ({"noise_variance": 1.0}, ValueError, "noise_variance is that of a Gaussian likelihood"),
    ({"curv_type": "hessian", "approx": "full", "prior_precision": 1e-9}, ValueError, "no Gaussian has it"),
    ({"approx": "blocks"}, ValueError, "approx='blocks' is unknown"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_wrong_arguments_are_refused(options, error, message):
    model, data = classification()
    with pytest.raises(error, match=message):
        laplace(model, nn.CrossEntropyLoss(), data, **options)


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda q, x: q.predict(x, 0), ValueError, "num_samples=0; pass an int of at least 1"),
        (lambda q, x: q.predict(lambda: None, 1), TypeError, "the output is a NoneType"),
        (lambda q, x: q.sample(count=1.5), ValueError, "count=1.5"),
        (lambda q, x: q.glm(x, chunk_size=0), ValueError, "chunk_size=0"),
        (lambda q, x: q.glm(lambda: x), TypeError, "not a function"),
        (lambda q, x: q.glm(x[:0]), ValueError, "one at least"),
        (lambda q, x: q.glm((x, x[1:])), ValueError, r"\[1, 2\] samples"),
        (lambda q, x: q.predict_regression(x), ValueError, "use predict_probit"),
        (lambda q, x: q.log_prob({"0.bias": x}), ValueError, "missing for 0.weight, 3.weight, 3.bias"),
        (lambda q, x: q.log_marginal_likelihood(noise_variance=1.0), ValueError, "Gaussian likelihood"),
        (lambda q, x: q.log_marginal_likelihood(-1.0), ValueError, "prior_precision=-1.0"),
        (lambda q, x: q.optimize_prior(0), ValueError, "steps=0"),
        (lambda q, x: q.optimize_prior(lr=-1.0), ValueError, "lr=-1.0"),
        (lambda q, x: q.optimize_prior(noise=True), ValueError, "leave noise out"),
        (lambda q, x: setattr(q, "temperature", 0), ValueError, "temperature=0"),
        (lambda q, x: setattr(q, "noise_variance", 2.0), ValueError, "noise_variance"),
        (lambda q, x: setattr(q, "prior_precision", math.nan), ValueError, "prior_precision=nan"),
    ],
)
def test_wrong_uses_are_refused(use, error, message):
    model, data = classification()
    posterior = laplace(model, nn.CrossEntropyLoss(), data)
    with pytest.raises(error, match=message):
        use(posterior, data[0][0])


def test_a_squared_error_has_no_classes():
    model, x, y = regression()
    with pytest.raises(ValueError, match="use predict_regression"):
        laplace(model, "mse", [(x, y)]).predict_probit(x)
