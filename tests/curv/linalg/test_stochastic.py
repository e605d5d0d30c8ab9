"""Estimates from products alone, against dense matrices in float64."""

import math
import warnings

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchcurv.curv.linalg import stochastic as estimate
from torchcurv.curv.linalg.krylov import Symmetric

SIZES = st.integers(1, 30)
SEEDS = st.integers(0, 99)
KEYS = {"largest": lambda x: x, "smallest": lambda x: -x, "magnitude": torch.abs}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def operator(C):
    counted = {"products": 0}

    def matvec(x):
        assert x.dim() == 2 and x.shape[1] > 0
        counted["products"] += x.shape[1]
        return C @ x

    return Symmetric(matvec, len(C), torch.float64), counted


def with_eigenvalues(values, seed=0):
    values = torch.as_tensor(values, dtype=torch.float64)
    Q = torch.linalg.qr(cases.randn(len(values), len(values), seed=seed))[0]
    return (Q * values) @ Q.mT


def symmetric(n, seed, rank=None):
    x = cases.randn(n, n if rank is None else rank, seed=seed)
    return x @ x.mT if rank is not None else (x + x.mT) / 2


# --- Lanczos ------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(n=SIZES, k=st.integers(1, 30), which=st.sampled_from(list(KEYS)), rank=st.none() | st.integers(0, 6), seed=SEEDS)
def test_eigenpairs(n, k, which, rank, seed):
    k = min(k, n)
    C = symmetric(n, seed, rank)
    found = estimate.eigh(operator(C)[0], k, which, 1e-9, generator=generator(seed))
    exact = torch.linalg.eigvalsh(C)
    order = KEYS[which](exact).sort(descending=True).indices[:k]
    scale = 1e-300 + exact.abs().max()
    assert ((KEYS[which](found.values) - KEYS[which](exact[order])).abs() <= 1e-8 * scale).all()
    X = found.vectors
    assert torch.allclose(X.mT @ X, torch.eye(k, dtype=X.dtype), atol=1e-9)
    assert ((C @ X - X * found.values).norm(dim=0) <= 1e-7 * scale).all()
    assert torch.allclose((C @ X - X * found.values).norm(dim=0), found.residuals, atol=1e-12 * (1 + scale))


@settings(max_examples=30, deadline=None)
@given(copies=st.integers(1, 5), k=st.integers(1, 8), seed=SEEDS)
def test_every_copy_of_an_eigenvalue_is_found(copies, k, seed):
    """In a matrix too large to be spanned, so that restarts and fresh starts must find them."""
    values = torch.cat([torch.full((copies,), 5.0), torch.tensor([4.0, 4.0, 3.0]), torch.linspace(-1, 1, 130)])
    C, counted = operator(with_eigenvalues(values, seed))
    found = estimate.eigh(C, k, "largest", 1e-8, 2000, generator(seed))
    assert torch.allclose(found.values, values.double().sort(descending=True).values[:k], atol=1e-8)
    assert counted["products"] < 1000


def test_restarts_keep_within_their_columns():
    """Eigenvalues that lie close together need more steps than the basis has columns."""
    values = 1 - torch.arange(300.0, dtype=torch.float64).square() / 300**2
    C, counted = operator(with_eigenvalues(values))
    found = estimate.eigh(C, 3, tol=1e-6, max_products=2000, generator=generator())
    assert counted["products"] > 60
    assert torch.allclose(found.values, values[:3], atol=1e-9)


def test_too_few_products_are_reported():
    C, counted = operator(symmetric(200, 0))
    with pytest.warns(RuntimeWarning, match="max_products=12 were too few"):
        found = estimate.eigh(C, 3, tol=1e-10, max_products=12, generator=generator())
    assert counted["products"] == 15 and found.residuals.max() > 1e-10  # 3 of them measure the residuals


@settings(max_examples=60, deadline=None)
@given(n=SIZES, steps=st.integers(1, 12), seed=SEEDS)
def test_lanczos_is_a_gauss_quadrature(n, steps, seed):
    """Exact for polynomials of degree 2 steps - 1, against the start vector that the generator draws."""
    C = symmetric(n, seed)
    nodes, weights = estimate.lanczos(operator(C)[0], steps, generator(seed))
    x = torch.randn(n, 1, generator=generator(seed), dtype=torch.float64)
    moment = x / x.norm()
    assert nodes.shape == weights.shape == (steps,)
    for degree in range(min(2 * steps, 12)):
        expected = (x / x.norm() * moment).sum()
        scale = max(1.0, torch.linalg.eigvalsh(C).abs().max().item()) ** degree
        assert abs((weights * nodes**degree).sum() - expected) <= 1e-9 * scale
        moment = C @ moment


def test_lanczos_over_all_steps_has_all_eigenvalues():
    C = symmetric(25, 3)
    nodes, weights = estimate.lanczos(operator(C)[0], 25, generator())
    assert torch.allclose(nodes, torch.linalg.eigvalsh(C), atol=1e-10) and weights.min() > 0


@settings(max_examples=8, deadline=None)
@given(n=st.integers(2, 12), seed=SEEDS)
def test_the_density_is_that_of_the_eigenvalues(n, seed):
    values = torch.linalg.eigvalsh(symmetric(n, seed))
    got = estimate.spectral_density(
        operator(with_eigenvalues(values, seed))[0], 100, n, grid=200, generator=generator(seed)
    )
    z = (got.grid[:, None] - values) / got.width
    exact = (-0.5 * z.square()).exp().sum(1) / (n * got.width * math.sqrt(2 * math.pi))
    assert abs(torch.trapezoid(got.density, got.grid) - 1) < 1e-3
    assert torch.allclose(got.weights.sum(1), torch.ones(100, dtype=torch.float64))
    visible = exact > 0.01 * exact.max()
    assert ((got.density - exact).abs()[visible] < 6 * got.standard_error[visible] + 1e-9 * exact.max()).all()


def test_the_density_of_a_multiple_of_the_identity_is_one_peak():
    got = estimate.spectral_density(operator(3 * torch.eye(5, dtype=torch.float64))[0], 4, 3, generator=generator())
    assert abs(got.grid[got.density.argmax()] - 3) < got.width
    assert abs(torch.trapezoid(got.density, got.grid) - 1) < 1e-3
    grid = torch.linspace(2, 4, 11, dtype=torch.float64)
    assert torch.equal(estimate.smoothed(got.nodes, got.weights, 0.1, grid).grid, grid)


@pytest.mark.parametrize("products", range(3, 60))
def test_pairs_come_back_whenever_the_products_run_out(products):
    """Even right after a restart; and the least of a spectrum to the accuracy that its largest allows."""
    C, _ = operator(with_eigenvalues(torch.cat([torch.linspace(0.9, 1, 60), torch.tensor([50.0, 0.5])])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = estimate.eigh(C, 3, "smallest", 1e-3, products, generator())
    assert found.values.shape == found.residuals.shape == (3,)
    if products > 30:
        assert abs(found.values[0] - 0.5) < 1e-3 and found.residuals.max() <= 2e-3 * 50


def test_the_tolerance_is_relative_to_the_largest_magnitude():
    C, counted = operator(with_eigenvalues(torch.cat([torch.linspace(0, 1, 500), torch.tensor([50.0])])))
    found = estimate.eigh(C, 1, "smallest", 1e-3, generator=generator())
    assert counted["products"] < 100 and found.residuals[0] < 2e-3 * 50


# --- trace, diagonal, norms -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(n=SIZES, rank=st.integers(0, 6), seed=SEEDS)
def test_hutchpp_of_low_rank_is_exact(n, rank, seed):
    C = symmetric(n, seed, rank)
    got = estimate.hutchpp_trace(operator(C)[0], 3 * max(rank, 2), generator(seed))
    assert torch.allclose(got.value, C.trace(), atol=1e-9) and got.standard_error < 1e-9 * (1 + C.trace())


@settings(max_examples=80, deadline=None)
@given(n=SIZES, rank=st.none() | st.integers(0, 6), pairs=st.integers(2, 9), seed=SEEDS)
def test_xdiag_is_its_definition(n, rank, pairs, seed):
    """Each Q_i Q_i^T as the projector on the other products; of low rank that leaves nothing to chance."""
    C = symmetric(n, seed, rank)
    z = Symmetric(lambda x: x, n, torch.float64).signs(min(pairs, n), generator(seed))
    answers, exact = [], True
    for i in range(z.shape[1]):
        others = C @ torch.cat([z[:, :i], z[:, i + 1 :]], 1)
        P = others @ torch.linalg.pinv(others, rtol=1e-9)
        answers.append((P @ C).diag() + z[:, i] * (C @ z[:, i] - P @ (C @ z[:, i])))
        exact &= bool(torch.allclose(P @ C, C, atol=1e-9))
    got = estimate.xdiag(operator(C)[0], 2 * pairs, generator(seed))
    tolerance = 1e-7 * (1 + C.abs().max())
    assert torch.allclose(got.value, torch.stack(answers).mean(0), atol=tolerance)
    assert not exact or torch.allclose(got.value, C.diag(), atol=tolerance)


@settings(max_examples=30, deadline=None)
@given(n=SIZES, seed=SEEDS)
def test_enough_products_are_exact(n, seed):
    C = symmetric(n, seed)
    got = estimate.hutchpp_trace(operator(C)[0], 3 * max(n, 2), generator(seed))
    assert torch.allclose(got.value, C.trace(), atol=1e-9) and got.standard_error < 1e-9
    diagonal = torch.diag(C.diag())
    exact = estimate.hutchinson_trace(operator(diagonal)[0], 2, generator(seed))
    assert torch.allclose(exact.value, C.trace(), atol=1e-12) and exact.standard_error < 1e-12
    norm = estimate.frobenius_norm(operator(diagonal)[0], 2, generator(seed))
    assert torch.allclose(norm.value, diagonal.norm(), atol=1e-12)
    spectral = estimate.spectral_norm(operator(C)[0], generator=generator(seed))
    assert torch.allclose(spectral.value, torch.linalg.matrix_norm(C, 2), rtol=1e-7)


@pytest.mark.parametrize("damping", [0.1, 3.0])
def test_the_determinant_is_within_its_error_and_exact_for_a_multiple_of_the_identity(damping):
    C = symmetric(60, 3, 10)
    exact = torch.logdet(C + damping * torch.eye(60, dtype=torch.float64))
    errors, reported = [], []
    for seed in range(100):
        found = estimate.logdet(operator(C)[0], damping, 4, 30, generator(seed))
        errors.append(found.value - exact)
        reported.append(found.standard_error)
    errors, reported = torch.stack(errors), torch.stack(reported)
    assert 0.75 < reported.square().mean().sqrt() / errors.square().mean().sqrt() < 1.3
    assert abs(errors.mean()) < 4 * errors.std() / 10
    flat = estimate.logdet(operator(2 * torch.eye(7, dtype=torch.float64))[0], damping, 2, 5, generator())
    assert torch.allclose(flat.value, torch.tensor(7 * math.log(2 + damping), dtype=torch.float64))


def test_a_determinant_needs_positive_eigenvalues():
    with pytest.raises(ValueError, match=r"damping=0.5: C \+ damping I has eigenvalues down to -1.5 or below"):
        estimate.logdet(operator(torch.tensor([[-2.0]]).double())[0], 0.5)


ESTIMATES = {
    "hutchinson": (estimate.hutchinson_trace, torch.trace),
    "hutch++": (estimate.hutchpp_trace, torch.trace),
    "xdiag": (estimate.xdiag, torch.diag),
    "frobenius": (estimate.frobenius_norm, torch.norm),
}


@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.parametrize("decay", [0.2, 1.0])
def test_errors_are_those_reported_and_fall_with_the_products(name, decay):
    """Over many runs: no bias, a reported error that is the true one, and at least a root of the products."""
    f, exact = ESTIMATES[name]
    C = with_eigenvalues((1 + torch.arange(120.0, dtype=torch.float64)) ** -decay * (-1) ** torch.arange(120))
    truth, spread = exact(C), {}
    for products in (24, 96):
        runs = [f(operator(C)[0], products, generator(seed)) for seed in range(1000, 1400)]
        values = torch.stack([run.value for run in runs])
        errors = (values - truth).square().mean().sqrt()
        reported = torch.stack([run.standard_error for run in runs]).square().mean().sqrt()
        assert 0.8 < reported / errors < 1.25
        bias = (values.mean(0) - truth) / (values.std(0) / math.sqrt(400))
        assert bias.square().mean().sqrt() < 3.5
        spread[products] = errors
    faster = 1.6 if decay == 1 and name in ("hutch++", "xdiag") else 1.0  # they remove what they have seen
    assert spread[96] < spread[24] / (0.8 * 2 * faster)


def test_products_are_as_many_as_asked_for():
    for f, given_products in ((f, n) for f, _ in ESTIMATES.values() for n in (12, 30)):
        C, counted = operator(symmetric(50, 0))
        f(C, given_products, generator())
        assert counted["products"] == given_products


def test_a_single_draw_has_no_error_bar():
    assert estimate.hutchinson_trace(operator(symmetric(5, 0))[0], 1, generator()).standard_error.isnan()


def test_nothing_touches_the_global_generator():
    before = torch.get_rng_state()
    C = operator(symmetric(20, 0))[0]
    first, again = (estimate.eigh(C, 2, generator=generator(4)) for _ in range(2))
    estimate.spectral_density(C, 2, 4, generator=generator())
    for f, _ in ESTIMATES.values():
        f(C, 12, generator())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.vectors, again.vectors)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda C: estimate.eigh(C, 0), "k=0; pass an int of at least 1"),
        (lambda C: estimate.eigh(C, 6), "k=6 eigenpairs of a matrix of size 5"),
        (lambda C: estimate.eigh(C, 1, "top"), "allowed are 'largest', 'smallest', 'magnitude'"),
        (lambda C: estimate.eigh(C, 1, tol=-1.0), "tol=-1.0"),
        (lambda C: estimate.eigh(C, 3, max_products=2), "max_products=2; pass an int of at least 3"),
        (lambda C: estimate.hutchpp_trace(C, 5), "products=5; pass an int of at least 6"),
        (lambda C: estimate.spectral_density(C, True), "probes=True"),
        (lambda C: estimate.spectral_density(C, 2, 3, width=0.0), "width=0.0"),
        (lambda C: estimate.spectral_density(C, 2, 3, grid=1), "grid=1"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(operator(symmetric(5, 0))[0])


def test_products_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        estimate.eigh(Symmetric(lambda x: x * math.nan, 4, torch.float64), 1, generator=generator())
