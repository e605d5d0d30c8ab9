"""Variational inference against exact posteriors, dense Gaussians and slow obvious code."""

import copy
import io
import math
import warnings

import cases
import oracles
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn import functional as F

from torchcurv import Preconditioner, SecondOrderOptimizer, VIOptimizer, curvature
from torchcurv.optim import VOGN, NoisyKFAC
from torchcurv.optim.posterior_draws import PosteriorDraws
from torchcurv.optim.price import price_average

N, TAU, DELTA = 50.0, 0.5, 2.0
X, Y = cases.randn(8, 4), torch.arange(8) % 3
PRICE = {"curv_type": "hessian", "approx": "diag", "hessian_method": "price", "init_precision": 20.0}
SHAPES = [
    {"approx": "diag", "curv_type": "empirical_fisher"},
    {"approx": "unit"},
    {"approx": "kfac"},
    {"approx": "kfac", "damping_type": "factored"},
    {"approx": "ekfac", "curv_type": "fisher"},
    {"approx": "block"},
    {"approx": "full"},
    {"approx": "lowrank", "rank": 4},
    {"approx": "diag", "curv_type": "hessian", "indefinite": "clip"},
    {"approx": "full", "curv_type": "hessian"},
    PRICE,
]


def names(options):
    return [" ".join(map(str, row.values())) for row in options]


def make_model(dtype=torch.float64):
    return cases.seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).to(dtype)


def batch(t, dtype=torch.float64):
    return cases.randn(6, 4, seed=t).to(dtype), torch.randint(3, (6,), generator=torch.Generator().manual_seed(t))


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors]).detach().clone()


def weights(model):
    return flat(model.parameters())


def train(model, optimizer, steps, draws=1):
    dtype = next(model.parameters()).dtype
    for t in steps:
        optimizer.zero_grad()
        for _ in range(draws):
            with optimizer.sampled_params():
                x, y = batch(t, dtype)
                F.cross_entropy(model(x), y).backward()
        optimizer.step()


def step_at_mean(model, optimizer, loss=F.cross_entropy, x=X, y=Y):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()


# --- the posterior ------------------------------------------------------------------------------------------


EXACT = [row for row in SHAPES[:-2] if row.get("damping_type") != "factored" and "empirical_fisher" not in row.values()]


@pytest.mark.parametrize("options", EXACT, ids=names(EXACT))
def test_precision_is_the_curvature_of_the_mean_loss_times_the_data_plus_the_prior(options):
    model = make_model()
    optimizer = VIOptimizer(model, N, samples=None, prior_precision=DELTA, temperature=TAU, lr=0.0, **options)
    step_at_mean(model, optimizer)
    if options["approx"] == "ekfac":
        step_at_mean(model, optimizer)
    measured = curvature(model, nn.CrossEntropyLoss(), [(X, Y)], **options)
    C = measured.to_dense()
    truth = MultivariateNormal(weights(model), precision_matrix=N / TAU * C + DELTA * torch.eye(len(C)).double())
    prior = MultivariateNormal(torch.zeros(len(C)).double(), precision_matrix=DELTA * torch.eye(len(C)).double())
    draw = optimizer.sample()
    theta = flat(draw.values())
    close = torch.testing.assert_close
    close(optimizer.log_prob(draw), truth.log_prob(theta), rtol=1e-7, atol=1e-7)
    close(optimizer.log_prob(), truth.log_prob(weights(model)), rtol=1e-7, atol=1e-7)
    close(optimizer.entropy(), truth.entropy(), rtol=1e-7, atol=1e-7)
    close(optimizer.kl(), kl_divergence(truth, prior), rtol=1e-7, atol=1e-7)
    close(optimizer.elbo(0.3), -N * 0.3 - TAU * kl_divergence(truth, prior), rtol=1e-7, atol=1e-7)
    with optimizer.sampled_params():
        close(optimizer.log_prob(), truth.log_prob(weights(model)), rtol=1e-7, atol=1e-7)


def test_the_weights_inside_are_the_mean_and_a_deviation_and_come_back():
    for options in SHAPES:
        model = make_model()
        optimizer = VIOptimizer(model, N, **options)
        train(model, optimizer, range(3))
        mean = weights(model)
        truth = optimizer.posterior.deviation(torch.Generator().manual_seed(3))
        with optimizer.sampled_params(torch.Generator().manual_seed(3)):
            torch.testing.assert_close(weights(model), mean + flat(truth[p] for p in model.parameters()))
            assert torch.equal(flat(optimizer.mean.values()), mean)
        assert torch.equal(weights(model), mean)


def test_first_draws_are_from_the_prior_or_of_the_initial_precision():
    for options, precision in (({}, DELTA), ({"init_precision": 30.0}, 30.0)):
        optimizer = VIOptimizer(make_model(), N, prior_precision=DELTA, **options)
        draws = optimizer.posterior.deviation(torch.Generator().manual_seed(0), 2000)
        found = torch.cat([x.flatten() for x in draws.values()]).square().mean()
        assert abs(found * precision - 1) < 0.02


# --- exact posteriors -----------------------------------------------------------------------------------------


def regression(sigma2=0.3, delta=0.8, n=20):
    """(x, y, posterior mean and covariance over [weight, bias] of each output, log evidence)."""
    x = cases.randn(n, 3)
    y = x @ cases.randn(3, 2, seed=1) + 0.2 + sigma2**0.5 * cases.randn(n, 2, seed=2)
    a = torch.cat([x, torch.ones(n, 1).double()], 1)
    precision = a.T @ a / sigma2 + delta * torch.eye(4).double()
    mean = torch.linalg.solve(precision, a.T @ y / sigma2)
    evidence = MultivariateNormal(torch.zeros(n).double(), sigma2 * torch.eye(n).double() + a @ a.T / delta)
    return x, y, mean, torch.linalg.inv(precision), evidence.log_prob(y.T).sum()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("approx", ["full", "kfac"])  # one linear layer: kfac is exact
def test_bayesian_linear_regression_is_exact(approx, antithetic, reduction):
    sigma2, delta, n = 0.3, 0.8, 20
    x, y, mean, covariance, evidence = regression(sigma2, delta, n)
    model, loss = cases.seeded(lambda: nn.Linear(3, 2)), nn.MSELoss(reduction=reduction)
    optimizer = VIOptimizer(
        model, n, loss_fn=loss, approx=approx, samples=None, prior_precision=delta, noise_variance=sigma2, lr=1.0,
        num_samples=2, antithetic=antithetic, kl_clip=None,
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        return value

    for _ in range(3):  # the mean of a pair is the gradient at the mean, since the loss is quadratic
        optimizer.step(closure) if antithetic else step_at_mean(model, optimizer, loss, x, y)
    found = torch.cat([model.weight, model.bias[:, None]], 1).detach().T
    torch.testing.assert_close(found, mean, rtol=1e-8, atol=1e-10)
    draws = optimizer.posterior.variances()
    variances = torch.cat([draws[model.weight], draws[model.bias][:, None]], 1)
    torch.testing.assert_close(variances, covariance.diag().expand(2, 4), rtol=1e-8, atol=1e-10)
    a = torch.cat([x, torch.ones(n, 1).double()], 1)
    expected = (a @ mean - y).square().sum() + 2 * (a @ covariance * a).sum()  # of the squared errors under q
    torch.testing.assert_close(optimizer.elbo(expected / y.numel()), evidence, rtol=1e-8, atol=1e-8)


def logistic_fixed_point(a, y, delta, diagonal):
    """(μ, Σ) with E_q[g] + δ̃ μ = 0, Σ^-1 = N (E_q[H] + δ̃), by quadrature over each prediction."""
    nodes, quadrature = _hermite(40)
    mu, covariance = torch.zeros(a.shape[1]).double(), torch.eye(a.shape[1]).double()
    for _ in range(2000):
        f = (a @ mu)[:, None] + ((a @ covariance) * a).sum(1).sqrt()[:, None] * nodes
        p = f.sigmoid()
        slope, bend = ((p - y) * quadrature).sum(1), (p * (1 - p) * quadrature).sum(1)
        precision = a.T @ (bend[:, None] * a) + delta * torch.eye(a.shape[1]).double()
        precision = torch.diag(precision.diag()) if diagonal else precision
        covariance = covariance + 0.3 * (torch.linalg.inv(precision) - covariance)
        mu = mu - 0.3 * torch.linalg.solve(precision, a.T @ slope + delta * mu)
    return mu, covariance


def _hermite(count):
    """Nodes and weights of E f(ε), ε ~ N(0, 1): the eigenvalues of the recurrence's matrix (Golub & Welsch)."""
    matrix = torch.diag(torch.arange(1, count).double().sqrt(), 1)
    values, vectors = torch.linalg.eigh(matrix + matrix.T)
    return values, vectors[0].square()


@pytest.mark.parametrize(
    "options",
    [
        {"approx": "full", "samples": None},
        {"approx": "diag", "samples": None},
        {"approx": "diag", "curv_type": "hessian"},
        {**PRICE, "ema_decay": 0.98, "init_precision": 8.0},
    ],
    ids=["full", "diag", "hessian", "price"],
)
def test_logistic_regression_converges_to_the_gaussian_fixed_point(options):
    n, delta = 30, 1.0
    a = cases.randn(n, 2) * 1.5 + 0.5
    y = (a @ torch.tensor([1.0, -0.5]).double() + cases.randn(n, seed=5) > 0).double()[:, None]
    mean, covariance = logistic_fixed_point(a, y, delta, options["approx"] == "diag")
    model = cases.seeded(lambda: nn.Linear(2, 1, bias=False))
    optimizer = VIOptimizer(
        model, n, loss_fn="bce_with_logits", prior_precision=delta, lr=0.1, num_samples=4, antithetic=True,
        **{"ema_decay": 0.98, **options},
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(a), y).backward()

    means, variances = [], []
    for t in range(500):
        optimizer.step(closure)
        if t >= 150:
            means.append(weights(model))
            variances.append(optimizer.posterior.variances()[model.weight][0])
    deviations = covariance.diag().sqrt()
    assert ((torch.stack(means).mean(0) - mean).abs() / deviations).max() < 0.1
    assert (torch.stack(variances).mean(0) / covariance.diag() - 1).abs().max() < 0.08
    at_mode = torch.linalg.inv(
        curvature(model, "bce_with_logits", [(a, y)], approx="full").to_dense() * n + delta * torch.eye(2).double()
    )
    assert (at_mode.diag() / covariance.diag() - 1).abs().max() > 0.08 or options["approx"] == "diag"  # q is no Laplace


# --- steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_clip", [None, 1e-3])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_steps_are_those_of_the_formula(reduction, named, kl_clip):
    lr, momentum, damping, rho, draws = 0.3, 0.5, 0.02, 0.9, 3
    model, twin, loss = make_model(), make_model(), nn.CrossEntropyLoss(reduction=reduction)
    optimizer = VIOptimizer(
        model, N, loss_fn="cross_entropy" if named else loss, reduction=reduction, approx="full", samples=None,
        prior_precision=DELTA, temperature=TAU, lr=lr, momentum=momentum, damping=damping, ema_decay=rho,
        kl_clip=kl_clip,
    )  # fmt: skip
    mu, buffer, average, weight = weights(model), 0, 0, 0
    eye = torch.eye(len(mu)).double()
    small = TAU * DELTA / N
    for t in range(4):
        x, y = batch(t)
        optimizer.zero_grad()
        g, ggn = 0, 0
        for _ in range(draws):
            with optimizer.sampled_params():
                theta = weights(model)
                whole = named and reduction == "mean"  # a name means factor 1
                for rows in [slice(0, 6)] if whole else [slice(0, 2), slice(2, 6)]:  # micro-batches of one draw
                    factor = 1 if reduction == "sum" else len(x[rows]) / len(x)
                    (factor * loss(model(x[rows]), y[rows])).backward()
            nn.utils.vector_to_parameters(theta, twin.parameters())
            ggn = ggn + oracles.ggn(twin, nn.CrossEntropyLoss(), x, y, list(twin.named_parameters())) / draws
            g = g + flat(torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters()))) / draws
        weight = rho * weight + 1
        average = average + (ggn - average) / weight
        g = g + small * mu
        v = torch.linalg.solve(average + (small + damping) * eye, g)
        buffer = momentum * buffer + v * (1 if kl_clip is None else min(1, math.sqrt(kl_clip / (lr**2 * v @ g))))
        mu = mu - lr * buffer
        optimizer.step()
        torch.testing.assert_close(weights(model), mu, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("zeroing", ["inside", "outside", "by the model"])
@pytest.mark.parametrize("options", SHAPES, ids=names(SHAPES))
def test_a_closure_is_run_under_its_draws_and_is_the_loop_written_out(options, zeroing):
    one, other = make_model(), make_model()
    ours = VIOptimizer(one, N, num_samples=3, lr=0.1, samples=None, **options)
    theirs = VIOptimizer(other, N, lr=0.1, samples=None, **options)
    for t in range(3):
        x, y = batch(t)

        def closure(x=x, y=y):
            if zeroing == "inside":
                ours.zero_grad()
            elif zeroing == "by the model":
                one.zero_grad()
            loss = F.cross_entropy(one(x), y)
            loss.backward()
            return loss

        if zeroing == "outside":
            ours.zero_grad()
        with torch.no_grad():
            mean_loss = ours.step(closure)
        theirs.zero_grad()
        losses = []
        for _ in range(3):
            with theirs.sampled_params():
                losses.append(F.cross_entropy(other(x), y))
                losses[-1].backward()
        theirs.step()
        torch.testing.assert_close(mean_loss, sum(losses).detach() / 3)
        assert torch.equal(weights(one), weights(other))


def test_prices_average():
    model = make_model()
    optimizer = VIOptimizer(model, N, prior_precision=DELTA, temperature=TAU, lr=0.1, **PRICE)
    optimizer.param_groups[0]["ema_decay"] = 0.9
    mu, damping, scale = weights(model), TAU * DELTA / N, N / TAU
    h = torch.full_like(mu, 20.0 / scale - damping)
    for t in range(4):
        x, y = batch(t)
        optimizer.zero_grad()
        products, g = 0, 0
        for _ in range(2):
            with optimizer.sampled_params():
                theta = weights(model)
                loss = F.cross_entropy(model(x), y)
                own = flat(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))
                loss.backward()
            products, g = products + (theta - mu) * own / 2, g + own / 2
        f = scale * (h + damping) * products
        h = 0.9 * h + 0.1 * f + 0.5 * 0.01 * (h - f) ** 2 / (h + damping)
        mu = mu - 0.1 * (g + damping * mu) / (h + damping)
        optimizer.step()
        torch.testing.assert_close(weights(model), mu, rtol=1e-8, atol=1e-10)
        variances = optimizer.posterior.variances()
        torch.testing.assert_close(flat(variances[p] for p in model.parameters()), 1 / (scale * (h + damping)))
    wild = price_average(torch.tensor(0.1), torch.tensor([-1e3, 1e3]), 50.0, 0.01, 0.9)
    assert (wild + 0.01 > 0).all()


def test_what_is_not_a_draw_does_not_count():
    runs = []
    for extra in (False, True):
        model = make_model()
        optimizer = VIOptimizer(model, N, samples=None)
        train(model, optimizer, range(2))
        if extra:
            with optimizer.sampled_params():
                F.cross_entropy(model(X), Y).backward()
        optimizer.zero_grad(set_to_none=not extra)
        with optimizer.sampled_params(torch.Generator().manual_seed(1)):
            F.cross_entropy(model(X), Y).backward()
        if extra:
            with optimizer.sampled_params(), torch.no_grad():
                model(X)
            with optimizer.sampled_params():
                torch.autograd.grad(model(X).sum(), model[0].weight)
            optimizer.predict(X, 2)
        optimizer.step()
        runs.append(weights(model))
    assert torch.equal(*runs)


def test_temperature_warms_up():
    for warmup, taus in ((4, [0.25, 0.5, 0.75, 1.0, 1.0]), (lambda t: 0.1 + t, [0.1, 1.1, 2.1])):
        model = make_model()
        optimizer = VIOptimizer(model, N, approx="diag", kl_warmup=warmup, temperature=TAU, prior_precision=DELTA)
        for t, tau in enumerate(taus):
            C = optimizer.engine.blocks[0].tensors.get("diag", torch.zeros(()).double())
            got = torch.cat([x.flatten() for x in optimizer.posterior.blocks[0].variances()]).sort().values
            truth = (1 / (N / (TAU * tau) * C + DELTA)).flatten().expand_as(got).sort().values
            torch.testing.assert_close(got, truth)
            train(model, optimizer, [t])


# --- groups -------------------------------------------------------------------------------------------------------


def test_groups_without_a_posterior_are_not_drawn():
    model, x, y = make_model(), *batch(0)
    optimizer = VIOptimizer(
        model,
        N,
        [
            {"params": [model[0].weight, model[0].bias], "prior_precision": None, "approx": "diag", "damping": 0.1},
            {"params": [model[2].weight, model[2].bias]},
        ],
        lr=1.0,
        samples=None,
        kl_clip=None,
    )
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.sampled_params():
        F.cross_entropy(model(x), y).backward()
        inside = [p.detach().clone() for p in model.parameters()]
    same = [torch.equal(p, q) for p, q in zip(before, inside, strict=True)]
    assert same == [True, True, False, False]
    g = model[0].weight.grad.clone()
    optimizer.step()
    C = optimizer.engine.blocks[0].tensors["diag"][0, :, :4]
    torch.testing.assert_close(before[0] - model[0].weight, g / (C + 0.1))
    assert optimizer.posterior.size == 18
    assert torch.equal(optimizer.sample()["0.weight"], model[0].weight)


def test_plain_gradients_feel_their_prior():
    model, x, y = make_model(), *batch(0)
    optimizer = VIOptimizer(
        model,
        N,
        [
            {"params": model[0].parameters(), "approx": None},
            {"params": model[2].parameters(), "approx": None, "prior_precision": None},
        ],
        lr=0.1,
        prior_precision=DELTA,
    )
    before = [p.detach().clone() for p in model.parameters()]
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    for k, (p, old) in enumerate(zip(model.parameters(), before, strict=True)):
        torch.testing.assert_close(p.detach(), old - 0.1 * (p.grad + (DELTA / N * old if k < 2 else 0)))
    assert optimizer.posterior.size == 0 and float(optimizer.kl()) == 0


def test_frozen_parameters_none_gradients_and_new_groups():
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}).double()
    model.forward = lambda x: model["a"](x)
    model["a"].bias.requires_grad_(False)
    optimizer = VIOptimizer(model, N, model["a"].parameters())
    with pytest.raises(ValueError, match="prior_precision=-1"):
        optimizer.add_param_group({"params": model["b"].parameters(), "prior_precision": -1.0})
    optimizer.add_param_group({"params": model["b"].parameters(), "prior_precision": 3.0})
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        with optimizer.sampled_params():
            assert not torch.equal(model["b"].weight, before["b.weight"])
            F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    after = model.state_dict()
    assert [torch.equal(before[k], after[k]) for k in ("a.weight", "a.bias", "b.weight")] == [False, True, True]


# --- restoring, precision, randomness ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_mean_comes_back_bit_for_bit_also_after_exceptions(dtype):
    model = make_model(dtype)
    optimizer = VIOptimizer(model, N)
    train(model, optimizer, range(2))
    before = weights(model)
    with pytest.raises(KeyError), optimizer.sampled_params():
        assert not torch.equal(weights(model), before)
        raise KeyError
    assert torch.equal(weights(model), before)
    with pytest.raises(RuntimeError, match="drawn already"), optimizer.sampled_params(), optimizer.sampled_params():
        pass
    assert torch.equal(weights(model), before)
    with optimizer.sampled_params(), pytest.raises(RuntimeError, match=r"inside of sampled_params"):
        optimizer.step()
    with pytest.raises(KeyError):
        optimizer.predict(lambda: {}["no"], 2)
    assert torch.equal(weights(model), before)
    train(model, optimizer, range(2, 4))


def test_low_precision_parameters_have_a_mean_of_their_own():
    model, twin = make_model(torch.bfloat16), make_model(torch.float32)
    with torch.no_grad():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.copy_(p)
    start = weights(model)
    optimizer = VIOptimizer(model, N, lr=1e-4, approx="diag", samples=None)
    for _ in range(20):
        step_at_mean(model, optimizer, x=X.bfloat16())
    means = optimizer.mean
    assert all(x.dtype == torch.float32 for x in means.values())
    assert torch.equal(flat(means.values()).bfloat16(), weights(model))
    theirs = VIOptimizer(twin, N, lr=1e-4, approx="diag", samples=None)
    for _ in range(20):
        step_at_mean(twin, theirs, x=X.float())
    moved, truth = flat(means.values()) - start.float(), weights(twin) - start.float()
    assert (moved - truth).norm() < 0.1 * truth.norm()  # steps too small for bfloat16 add up
    with torch.no_grad():
        model[0].weight.zero_()  # edits of the user count
    assert not optimizer.mean["0.weight"].any() and optimizer.mean["2.weight"].any()


def test_no_global_random_numbers_are_drawn_and_seeds_decide():
    before = torch.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        model = make_model()
        optimizer = VIOptimizer(model, N, seed=seed)
        train(model, optimizer, range(3))
        runs.append((weights(model), optimizer.predict(X, 2), flat(optimizer.sample().values())))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(runs[0], runs[1], strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(runs[0], runs[2], strict=True))


def test_evaluation_leaves_the_draws_of_training_alone():
    model, twin = make_model(), make_model()
    one, other = VIOptimizer(model, N), VIOptimizer(twin, N)
    for t in range(3):
        train(model, one, [t])
        train(twin, other, [t])
        one.predict(X, 3), one.sample(), one.kl()
    assert torch.equal(weights(model), weights(twin))


def test_antithetic_pairs_are_mirror_images():
    model = make_model()
    optimizer = VIOptimizer(model, N, antithetic=True, num_samples=3)
    seen = []

    def closure():
        seen.append(weights(model) - mean)
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    for _ in range(2):
        mean = weights(model)
        optimizer.step(closure)
    for k in (0, 3):
        torch.testing.assert_close(seen[k], -seen[k + 1])
        assert not torch.allclose(seen[k + 1].abs(), seen[k + 2].abs())
    assert not torch.allclose(seen[2].abs(), seen[3].abs())


def deviations(model, optimizer, steps, draws=1):
    """θ - μ of every draw of a training run."""
    seen = []
    for t in steps:
        optimizer.zero_grad()
        for _ in range(draws):
            mean = weights(model)
            with optimizer.sampled_params():
                seen.append(weights(model) - mean)
                F.cross_entropy(model(batch(t)[0]), batch(t)[1]).backward()
        optimizer.step()
    return seen


def mirrored(seen):
    """Which draws are the mirror image of the one before."""
    return [k for k in range(1, len(seen)) if torch.allclose(seen[k], -seen[k - 1], rtol=1e-9, atol=1e-12)]


EVERY_FOUR = {"antithetic": True, "update_every": 4, "refactor_every": 4, "ema_decay": 0.9}


@pytest.mark.parametrize("options", SHAPES[:-1], ids=names(SHAPES[:-1]))
def test_antithetic_pairs_reach_over_steps_that_leave_the_covariance_alone(options):
    model = make_model()
    seen = deviations(model, VIOptimizer(model, N, **options, **EVERY_FOUR), range(10))
    assert mirrored(seen) == [2, 4, 6, 8]  # measured in the steps 0, 4 and 8
    model = make_model()
    seen = deviations(model, VIOptimizer(model, N, **options, **EVERY_FOUR), range(6), draws=3)
    assert mirrored(seen) == [1, 4, 6, 8, 10, 12, 14, 16]  # 12 draws have the factor of step 0


def test_antithetic_pairs_end_where_the_covariance_changes():
    price = {**PRICE, "ema_decay": 0.99, "lr": 1e-3}
    for changing in ({"update_every": 1}, {"kl_warmup": 20}, {"refactor_every": 1, "update_every": 1}, price):
        model = make_model()
        seen = deviations(model, VIOptimizer(model, N, **{**EVERY_FOUR, "approx": "diag", **changing}), range(6))
        assert all(x.any() for x in seen) and not mirrored(seen)


def test_the_second_of_a_pair_is_drawn_from_what_the_posterior_is_by_then():
    model = make_model()
    optimizer = VIOptimizer(model, N, samples=None, **EVERY_FOUR)
    seen = deviations(model, optimizer, range(2))
    optimizer.param_groups[0]["temperature"] = 4.0
    generator = optimizer.companion(PosteriorDraws).generator("training_draws", 2, torch.device("cpu"))
    same_noise = optimizer.posterior.deviation(generator)
    seen += deviations(model, optimizer, [2])
    assert not torch.allclose(seen[2], -seen[1])
    torch.testing.assert_close(seen[2], -flat(same_noise[p] for p in model.parameters()))


SHARED = {**EVERY_FOUR, "antithetic": False, "shared_noise": True}


def whitened(optimizer, seen):
    """The ε of draws from the posterior as it is, in the bases of the covariance."""
    (block,) = (part.block for part in optimizer.posterior.blocks)
    left, right = (torch.linalg.inv(root) for root in block.factor.roots)
    return [left @ block.layout.join([x[:10].view(5, 2), x[10:]])[0] @ right.mT for x in seen]


def test_shared_noise_lasts_until_the_covariance_changes():
    model = cases.seeded(lambda: nn.Linear(2, 5)).double()
    optimizer = VIOptimizer(model, N, damping_type="factored", **SHARED)
    x, y, noises = cases.randn(6, 2), torch.arange(6) % 5, []
    for _ in range(3):
        seen = []
        for _ in range(4):  # the first of them changes Σ after its draw
            optimizer.zero_grad()
            mean = weights(model)
            with optimizer.sampled_params():
                seen.append(weights(model) - mean)
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
        cores = whitened(optimizer, seen[1:])
        for core in cores[1:]:
            torch.testing.assert_close(core.abs(), cores[0].abs())
        noises.append(cores[0].abs())
        assert any(not torch.allclose(core, cores[0]) for core in cores[1:])
    assert not torch.allclose(noises[0], noises[1]) and not torch.allclose(noises[1], noises[2])


def test_shared_noise_and_pairs_go_together():
    model = make_model()
    seen = deviations(model, VIOptimizer(model, N, **{**SHARED, "antithetic": True}), range(10))
    assert mirrored(seen) == [2, 4, 6, 8]


def test_shared_noise_is_of_the_posterior_as_it_is_by_then():
    model = cases.seeded(lambda: nn.Linear(2, 5)).double()
    optimizer = VIOptimizer(model, N, damping_type="factored", samples=None, lr=0.0, **SHARED)
    step_at_mean(model, optimizer, x=cases.randn(6, 2), y=torch.arange(6) % 5)
    cores = []
    for temperature in (1.0, 4.0):
        optimizer.param_groups[0]["temperature"] = temperature
        with optimizer.sampled_params():
            cores.append(whitened(optimizer, [weights(model) - flat(optimizer.mean.values())])[0].abs())
    torch.testing.assert_close(cores[1], 2 * cores[0])


APART = [{"approx": approx, "damping_type": "factored", "damping": 0.4} for approx in ("kfac", "unit", "block", "full")]


@pytest.mark.parametrize("options", APART, ids=names(APART))
def test_the_damping_of_the_step_is_no_part_of_the_covariance(options):
    """δ for the draws and δ + N λ / τ for the step, against an optimizer with each of them."""
    found = []
    for damping, delta in ((0.4, DELTA), (0.0, DELTA), (0.0, DELTA + N * 0.4 / TAU)):
        model = make_model()
        optimizer = VIOptimizer(
            model, N, samples=None, prior_precision=delta, temperature=TAU, lr=0.0, **{**options, "damping": damping}
        )
        step_at_mean(model, optimizer)
        solved = [
            x
            for block in optimizer.engine.blocks
            for x in block.solve([piece.of(piece.param) for piece in block.pieces])
        ]
        variances = optimizer.posterior.variances()
        draw = optimizer.posterior.deviation(torch.Generator().manual_seed(0))
        found.append((flat(solved), flat(variances.values()), flat(draw.values()), optimizer.entropy()))
    both, draws, step = found
    torch.testing.assert_close(both[0], step[0])
    for ours, alone in zip(both[1:], draws[1:], strict=True):
        torch.testing.assert_close(ours, alone)
    assert not torch.allclose(draws[0], step[0])


def test_the_covariance_follows_a_prior_that_is_small_beside_the_damping():
    options = {"damping_type": "factored", "kl_warmup": 3, "update_every": 9, "refactor_every": 9, "lr": 0.0}
    entropies = []
    for damping in (1e6, 0.0):
        model = make_model()
        optimizer = VIOptimizer(model, N, damping=damping, samples=None, **options)
        entropies.append([])
        for _ in range(3):
            step_at_mean(model, optimizer)
            entropies[-1].append(optimizer.entropy())
    torch.testing.assert_close(*(torch.stack(values) for values in entropies))


@pytest.mark.parametrize("damping_type", ["exact", "factored"])
def test_each_of_an_antithetic_pair_is_a_draw_from_the_posterior(damping_type):
    moments, pairs = [0.0, 0.0], 600
    for seed in range(pairs):
        model = cases.seeded(lambda: nn.Linear(2, 2))
        x, y = cases.randn(6, 2), torch.arange(6) % 2
        optimizer = VIOptimizer(
            model, N, samples=None, damping_type=damping_type, seed=seed, lr=0.0, **{**EVERY_FOUR, "update_every": 99}
        )
        step_at_mean(model, optimizer, x=x, y=y)
        for k in range(2):
            optimizer.zero_grad()
            with optimizer.sampled_params():
                drawn = weights(model)
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
            moments[k] = moments[k] + torch.outer(drawn - weights(model), drawn - weights(model)) / pairs
    variances = optimizer.posterior.variances()
    truth = flat(variances[p] for p in model.parameters())
    for moment in moments:
        torch.testing.assert_close(moment.diagonal() / truth, torch.ones(6).double(), rtol=0, atol=0.25)
    torch.testing.assert_close(*moments)


RESUMED = [
    {"approx": "kfac", "shared_noise": True},
    {"approx": "kfac", "shared_noise": True, "antithetic": False},
    {"approx": "kfac", "shared_noise": True, **APART[0]},
    *APART,
]


@pytest.mark.pairwise
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", SHAPES + RESUMED, ids=names(SHAPES + RESUMED))
def test_a_run_resumed_within_a_pair_repeats_the_draw(options, dtype, draws):
    options = {**EVERY_FOUR, "momentum": 0.5, "lr": 0.05, **options}
    for stop in (2, 3, 4, 5):
        model, other = make_model(dtype), make_model(dtype)
        optimizer = VIOptimizer(model, N, **options)
        train(model, optimizer, range(stop), draws)
        saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        copied, paired = copy.deepcopy((model, optimizer))
        train(model, optimizer, range(stop, 9), draws)
        other.load_state_dict(saved["model"])
        again = VIOptimizer(other, N, **options)
        again.load_state_dict(saved["optimizer"])
        train(other, again, range(stop, 9), draws)
        train(copied, paired, range(stop, 9), draws)
        assert torch.equal(weights(model), weights(other)) and torch.equal(weights(model), weights(copied))


def test_predictions_are_stacked_raw_outputs_and_the_mode_stays():
    model = nn.Sequential(make_model(), nn.Dropout(0.5))
    optimizer = VIOptimizer(model, N)
    for training in (True, False):
        model.train(training)
        assert optimizer.predict(X, 5).shape == (5, 8, 3) and model.training == training
    generator = torch.Generator().manual_seed(0)
    outputs = optimizer.predict(lambda: {"logits": model(X)}["logits"], 2, generator)
    assert not outputs.requires_grad and not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs, optimizer.predict((X,), 2, torch.Generator().manual_seed(0)))
    with pytest.raises(TypeError, match="is a dict; pass a function"):
        optimizer.predict(lambda: {"logits": model(X)}, 2)


# --- state ---------------------------------------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", SHAPES, ids=names(SHAPES))
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(options, dtype):
    options = {**options, "momentum": 0.5, "lr": 0.05, "antithetic": True, "ema_decay": 0.9, "kl_warmup": 4}
    options |= {"update_every": 2, "refactor_every": 3}
    for stop in (1, 4):
        model, other = make_model(dtype), make_model(dtype)
        optimizer = VIOptimizer(model, N, **options)
        train(model, optimizer, range(stop), draws=2)
        optimizer.sample()
        saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        train(model, optimizer, range(stop, 8), draws=2)
        other.load_state_dict(saved["model"])
        again = VIOptimizer(other, N, **{**options, "lr": 0.7, "prior_precision": 9.0})
        again.load_state_dict(saved["optimizer"])
        train(other, again, range(stop, 8), draws=2)
        assert torch.equal(weights(model), weights(other))
        for p, q in zip(optimizer.sample().values(), again.sample().values(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("options", SHAPES, ids=names(SHAPES))
def test_a_copied_pair_goes_on_like_the_original_and_apart_from_it(options):
    model = make_model()
    optimizer = VIOptimizer(model, N, num_samples=2, **options)
    train(model, optimizer, range(3))
    other, copied = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(3, 5))
    assert not torch.equal(weights(model), weights(other))
    train(other, copied, range(3, 5))
    assert torch.equal(weights(model), weights(other))
    alone = copy.deepcopy(optimizer)
    with pytest.raises(RuntimeError, match="without its model"), alone.sampled_params():
        pass


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed.checkpoint", "ignore::FutureWarning")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("options", SHAPES, ids=names(SHAPES))
def test_distributed_checkpoint_resumes_bit_for_bit(options, flatten, tmp_path):
    model, other = make_model(torch.bfloat16), make_model(torch.bfloat16)
    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    optimizer, again = VIOptimizer(model, N, momentum=0.5, **options), VIOptimizer(other, N, momentum=0.5, **options)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))
    trained = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no process group: one process
        dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
        saved = get_optimizer_state_dict(other, again, options=how)
        dcp.load(saved, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(trained)
    set_optimizer_state_dict(other, again, saved, options=how)
    train(model, optimizer, range(3, 6))
    train(other, again, range(3, 6))
    assert torch.equal(weights(model), weights(other))


@pytest.mark.parametrize("options", [{"samples": None}, PRICE], ids=["ggn", "price"])
def test_scaled_gradients_step_as_without_a_scaler(options):
    runs = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = make_model()
        optimizer = VIOptimizer(model, N, grad_scaler=scaler, **options)
        for t in range(3):
            optimizer.zero_grad()
            for _ in range(2):
                with optimizer.sampled_params():
                    loss = F.cross_entropy(model(batch(t)[0]), batch(t)[1])
                    (loss if scaler is None else scaler.scale(loss)).backward()
            optimizer.step() if scaler is None else scaler.step(optimizer)
            scaler and scaler.update()
        runs.append(weights(model))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [{}, PRICE, {"loss_fn": "mse", "noise_variance": 0.5}], ids=["", "price", "noise"])
def test_a_checkpoint_library_may_step_a_fresh_optimizer(options):
    model = make_model()
    optimizer = VIOptimizer(model, N, lr=0.0, **options)
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(weights(model), before) and all(p in optimizer.state for p in model.parameters())


def test_noise_variance_survives_copies_and_hooks_go_away():
    model = cases.seeded(lambda: nn.Linear(3, 2))
    optimizer = VIOptimizer(model, 20, loss_fn="mse", noise_variance=0.1)
    with pytest.raises(RuntimeError, match="has not been called"):
        optimizer.elbo(1.0)
    x, y = regression()[:2]
    step_at_mean(model, optimizer, F.mse_loss, x, y)
    other, copied = copy.deepcopy((model, optimizer))
    torch.testing.assert_close(copied.elbo(1.0), optimizer.elbo(1.0))
    step_at_mean(model, optimizer, F.mse_loss, x, y)
    step_at_mean(other, copied, F.mse_loss, x, y)
    assert torch.equal(weights(model), weights(other))
    optimizer.remove()
    assert not model._forward_hooks and not model._forward_pre_hooks


# --- presets and arguments -------------------------------------------------------------------------------------------


def test_presets_are_rows_of_settings():
    for preset, kind, approx in ((VOGN, "empirical_fisher", "diag"), (NoisyKFAC, "fisher", "kfac")):
        model = make_model()
        optimizer = preset(model, N, lr=0.2)
        group = optimizer.param_groups[0]
        assert (group["curv_type"], group["approx"], group["lr"]) == (kind, approx, 0.2)
        train(model, optimizer, range(2))
    assert NoisyKFAC(make_model(), N, curv_type="ggn").param_groups[0]["curv_type"] == "ggn"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_precision": 0.0}, "prior_precision=0.0; pass a number > 0, or None"),
        ({"temperature": None}, "temperature=None"),
        ({"init_precision": -1.0}, "init_precision=-1.0"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"antithetic": 1}, "antithetic=1"),
        ({"shared_noise": None}, "shared_noise=None"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"kl_clip": 0.0}, "kl_clip=0.0"),
        ({"damping": -0.1}, "damping=-0.1"),
        ({"prior_precision": None}, "damping=0"),
        ({"kl_warmup": 0}, "kl_warmup=0"),
        ({"kl_warmup": lambda t: 0}, "kl_warmup at step 0=0"),
        ({"noise_variance": 0.1}, "loss_fn='cross_entropy' is none"),
        ({"noise_variance": 0.0, "loss_fn": "mse"}, "noise_variance=0.0"),
        ({"reduction": "sum", "update_every": 2}, "update_every=2 with a loss that is a sum"),
        ({**PRICE, "init_precision": None}, "init_precision=None"),
        ({**PRICE, "prior_precision": 30.0}, "greater than prior_precision=30.0"),
        ({**PRICE, "prior_precision": None, "damping": 0.1}, "needs draws"),
        ({**PRICE, "reduction": "sum"}, "terms of a sum"),
        ({**PRICE, "approx": "kfac"}, "hessian_method='price' with approx='kfac'"),
        ({"approx": "full", "rows_limit": 5}, "rows do not outlive a step"),
    ],
)
def test_bad_arguments_say_what_came_and_what_is_allowed(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        VIOptimizer(make_model(), N, **options)


def test_bad_calls_say_what_is_allowed():
    model = make_model()
    for size in (0, -5, math.inf):
        with pytest.raises(ValueError, match="dataset_size="):
            VIOptimizer(model, size)
    with pytest.raises(TypeError, match="dataset_size='many'"):
        VIOptimizer(model, "many")
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias], "prior_precision": 3.0}]
    with pytest.raises(ValueError, match=r"0\.weight and 0\.bias .* prior_precision=1\.0 and prior_precision=3\.0"):
        VIOptimizer(model, N, groups)
    price = {key: value for key, value in PRICE.items() if key != "init_precision"}
    for make in (SecondOrderOptimizer, Preconditioner):
        with pytest.raises(ValueError, match="needs VIOptimizer"):
            make(model, **price)
    with pytest.raises(ValueError, match="use VIOptimizer"):
        curvature(model, nn.CrossEntropyLoss(), [(X, Y)], **price)
    optimizer = VIOptimizer(model, N, **PRICE)
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(RuntimeError, match="estimates the curvature from draws"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"values are missing for 0\.weight"):
        optimizer.log_prob({})
    with pytest.raises(ValueError, match="num_samples=0"):
        optimizer.predict(X, 0)
