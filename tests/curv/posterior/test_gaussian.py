"""Gaussians whose precision is a curvature, of every shape, against dense ones in float64."""

import cases
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from torchcurv import curvature
from torchcurv.curv.block.slot import FactorSlot
from torchcurv.curv.linalg.symmetric import lower_times, times_lower_transposed
from torchcurv.curv.posterior.gaussian import Gaussian, GaussianBlock

SCALE, DAMPING, DRAWS = 5.0, 0.3, 200_000
SHAPES = {
    "diag": {"approx": "diag"},
    "unit": {"approx": "unit"},
    "unit_wide": {"approx": "unit", "max_factor_dim": 2},
    "kfac": {"approx": "kfac"},
    "kfac_factored": {"approx": "kfac", "damping_type": "factored"},
    "kfac_blocks": {"approx": "kfac", "factor_blocks": 2},
    "kfac_blocks_factored": {"approx": "kfac", "factor_blocks": 2, "damping_type": "factored"},
    "kfac_diagonal_factored": {"approx": "kfac", "max_factor_dim": 3, "damping_type": "factored"},
    "ekfac": {"approx": "ekfac"},
    "block": {"approx": "block"},
    "block_cholesky": {"approx": "block", "damping_type": "factored"},
    "full": {"approx": "full"},
    "full_rows": {"approx": "full", "rows_limit": 3},
    "hessian": {"approx": "block", "curv_type": "hessian", "indefinite": "abs"},
    "lowrank": {"approx": "lowrank", "rank": 5},
    "lowrank_hessian": {"approx": "lowrank", "rank": 4, "curv_type": "hessian", "indefinite": "abs"},
    "lowrank_shifted": {"approx": "lowrank", "rank": 4, "curv_type": "hessian", "indefinite": "shift"},
    "input": {"approx": "kfac", "curv_type": "input"},
    "hessian_abs": {"approx": "diag", "curv_type": "hessian", "indefinite": "abs"},
    "hessian_diag": {"approx": "diag", "curv_type": "hessian", "indefinite": "clip"},
}


def make_model():
    return cases.seeded(lambda: nn.Sequential(nn.Conv1d(2, 2, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)))


def gaussian_of(options):
    """(the Gaussian, its parameters in order)."""
    model = make_model()
    measured = curvature(model, nn.CrossEntropyLoss(), [(cases.randn(6, 2, 3), torch.arange(6) % 3)], **options)
    blocks = list(measured.blocks.values())
    for block in blocks:
        if options.get("damping_type") == "factored":
            block.refactor(DAMPING)
    mean = {p: cases.randn(*p.shape, seed=k) for k, p in enumerate(measured.params)}
    return Gaussian(mean, [GaussianBlock(block, SCALE, DAMPING) for block in blocks]), measured


def flat(by_param, params):
    lead = by_param[params[0]].shape[: by_param[params[0]].dim() - params[0].dim()]
    return torch.cat([by_param[p].reshape(*lead, -1) for p in params], -1)


def dense_precision(gaussian, measured, options):
    """Σ^-1 column by column; for exact damping from C alone."""
    params = measured.params
    size = sum(p.numel() for p in params)
    if options.get("damping_type") != "factored":
        return SCALE * (measured.to_dense() + DAMPING * torch.eye(size, dtype=torch.float64))
    inverse = measured.solve(torch.eye(size, dtype=torch.float64), None) / SCALE
    return torch.linalg.inv(inverse)


@pytest.mark.parametrize("name", SHAPES)
def test_densities_and_divergences_are_those_of_the_dense_gaussian(name):
    gaussian, measured = gaussian_of(SHAPES[name])
    params = measured.params
    precision = dense_precision(gaussian, measured, SHAPES[name])
    mean = flat(gaussian.mean, params)
    truth = MultivariateNormal(mean, precision_matrix=precision)
    delta = 0.7
    prior = MultivariateNormal(torch.zeros_like(mean), precision_matrix=delta * torch.eye(len(mean)).double())
    values = gaussian.sample(torch.Generator().manual_seed(0), 4)
    close = torch.testing.assert_close
    close(gaussian.log_prob(values), truth.log_prob(flat(values, params)), rtol=1e-8, atol=1e-8)
    close(gaussian.log_prob(gaussian.mean), truth.log_prob(mean), rtol=1e-8, atol=1e-8)
    close(gaussian.entropy(), truth.entropy(), rtol=1e-8, atol=1e-8)
    close(gaussian.kl(delta), torch.distributions.kl_divergence(truth, prior), rtol=1e-8, atol=1e-8)
    close(flat(gaussian.variances(), params), truth.covariance_matrix.diag(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", SHAPES)
def test_the_covariance_of_many_draws_is_the_inverse_of_the_precision(name):
    gaussian, measured = gaussian_of(SHAPES[name])
    draws = DRAWS if name != "full_rows" else 2_000  # rows are drawn one after the other
    x = flat(gaussian.deviation(torch.Generator().manual_seed(1), draws), measured.params)
    truth = torch.linalg.inv(dense_precision(gaussian, measured, SHAPES[name]))
    found = x.T @ x / draws
    scale = truth.diag().sqrt()
    error = (found - truth) / scale / scale[:, None]  # of correlations: its standard deviation is at most sqrt(2/draws)
    assert error.abs().max() < 5 * (2 / draws) ** 0.5
    assert (x.mean(0) / scale).abs().max() < 5 * draws**-0.5


@pytest.mark.parametrize("name", ["diag", "kfac", "kfac_factored", "kfac_blocks_factored", "ekfac", "block"])
def test_draws_that_share_noise_are_draws_and_uncorrelated(name):
    gaussian, measured = gaussian_of(SHAPES[name])
    generator, pairs = torch.Generator().manual_seed(2), []
    count = 4000
    for _ in range(count):
        draw = gaussian.draws(generator)
        pairs.append(torch.stack([flat(draw(generator), measured.params) for _ in range(2)]))
    first, second = torch.stack(pairs, 1)
    truth = torch.linalg.inv(dense_precision(gaussian, measured, SHAPES[name]))
    scale = truth.diag().sqrt()
    for x, y, expected in ((first, first, truth), (second, second, truth), (first, second, torch.zeros_like(truth))):
        assert ((x.T @ y / count - expected) / scale / scale[:, None]).abs().max() < 5 * (2 / count) ** 0.5


@pytest.mark.parametrize("name", ["kfac", "kfac_factored", "ekfac"])
def test_draws_that_share_noise_differ_by_signs_of_rows_or_columns(name):
    gaussian, _ = gaussian_of(SHAPES[name])
    generator, mixed = torch.Generator().manual_seed(0), 0
    for part in gaussian.blocks:  # the factors [2, 1, 3] and [1, 3, 5]
        left, right = part.factor.left, part.factor.right
        roots = part.factor.roots if name == "kfac_factored" else (left, right)
        draw = part.draws(generator)
        cores = []
        for _ in range(20):
            (x,) = part.block.layout.join(draw(generator))
            cores.append(torch.linalg.solve(roots[0], x) @ torch.linalg.inv(roots[1]).mT)
        for core in cores[1:]:
            torch.testing.assert_close(core.abs(), cores[0].abs())
        signs = torch.stack([core / cores[0] for core in cores]).round()
        torch.testing.assert_close(signs, signs[:, :, :1].expand_as(signs))  # a column has one sign: d > o
        mixed += (signs.std(0) > 0).sum()
    assert mixed == 2 * 3 + 3 * 5


def test_before_anything_is_measured_the_covariance_is_a_multiple_of_the_identity():
    gaussian, measured = gaussian_of(SHAPES["full"])
    for part in gaussian.blocks:
        part.block.factors = {"step": FactorSlot()}
    fresh = Gaussian(gaussian.mean, [GaussianBlock(part.block, SCALE, DAMPING, 0.2) for part in gaussian.blocks])
    variances = flat(fresh.variances(), measured.params)
    torch.testing.assert_close(variances, torch.full_like(variances, 1 / (SCALE * (DAMPING + 0.2))))


def test_products_with_large_triangles_skip_their_zeros():
    root, x = cases.randn(2, 700, 700).tril(), cases.randn(2, 700, 3, seed=1)
    torch.testing.assert_close(lower_times(root, x), root @ x)
    torch.testing.assert_close(times_lower_transposed(x.mT, root), x.mT @ root.mT)
