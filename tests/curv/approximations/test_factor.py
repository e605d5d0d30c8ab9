"""What a block can do with its matrix, against dense linear algebra in float64."""

import copy
import warnings
from contextlib import nullcontext

import cases
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchcurv import SecondOrderOptimizer, curvature
from torchcurv.curv.approximations.by_rows import rows_in
from torchcurv.curv.approximations.dense import Dense
from torchcurv.curv.approximations.diagonal import Diagonal
from torchcurv.curv.approximations.factors import Eigen, KroneckerInverse
from torchcurv.curv.approximations.kronecker import Kronecker, project_moments
from torchcurv.curv.block.block import Curvature
from torchcurv.curv.block.health import read_flags
from torchcurv.curv.layers.find import find_layers
from torchcurv.curv.linalg import symmetric as linalg
from torchcurv.curv.linalg.symmetric import inverse_spd
from torchcurv.curv.numerics import assume_accelerator
from torchcurv.curv.options import Options

APPROXIMATIONS = cases.APPROXIMATIONS
LAMBDA = 0.03


def close(x, truth, tol=1e-9):
    assert x.shape == truth.shape
    assert (x - truth).abs().max() <= tol * (1e-3 + truth.abs().max())


def measured(approx, model="mlp", n=3, **options):
    case = cases.model_case(model)
    net, x, y = case.make_model(), cases.randn(n, *case.input_shape, seed=2), cases.randn(n, *case.output_shape, seed=3)
    return curvature(net, nn.MSELoss(), [(x, y), (x.flip(0)[1:], y[1:])], approx=approx, **options)


def structures(c, size, k=3):
    """The same vectors as [P], [P, K], a list and a dict, with what flattens an answer again."""
    flat, many = cases.randn(size, seed=4), cases.randn(size, k, seed=5)
    shapes = [p.shape for p in c.params]
    parts = [v.reshape(s) for v, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
    joined = lambda out: torch.cat([t.flatten() for t in out])  # noqa: E731
    yield flat, flat, lambda out: out
    yield many, many, lambda out: out
    yield parts, flat, joined
    yield dict(zip(c._named, parts, strict=True)), flat, lambda out: joined(out.values())


def root_of_samples(c, size, damping):
    """The matrix R of theta = R noise, from as many draws as there are parameters: the same generator gives both."""
    draws, noises = [], []
    for seed in range(size):
        draws.append(torch.cat([t.flatten() for t in c.sample(damping, torch.Generator().manual_seed(seed))]))
        generator = torch.Generator().manual_seed(seed)
        shapes = [layer.shape for block in c.blocks.values() for layer in block.layers]
        noise = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        noises.append(torch.cat([t.flatten() for t in noise]))
    return torch.linalg.solve(torch.stack(noises), torch.stack(draws)).T


def check_algebra(c, truth, tol=1e-8):
    """Everything a CurvatureSet answers, against the dense matrix."""
    size = len(truth)
    damped = truth + LAMBDA * torch.eye(size, dtype=truth.dtype)
    for v, flat, flatten in structures(c, size):
        close(flatten(c.matvec(v)), truth @ flat, tol)
        close(flatten(c.solve(v, LAMBDA)), torch.linalg.solve(damped, flat), tol)
        close(flatten(c.solve(v, torch.tensor(LAMBDA))), torch.linalg.solve(damped, flat), 1e-5)
    v = cases.randn(size, seed=9)
    close(c.solve(c.matvec(v) + LAMBDA * v, LAMBDA), v, tol)
    close(c.diag(), truth.diagonal(), tol)
    close(c.trace(), truth.trace(), tol)
    close(c.eigvalsh(), torch.linalg.eigvalsh(truth), tol)
    close(c.logdet(LAMBDA), torch.logdet(damped), tol)
    root = root_of_samples(c, size, LAMBDA)
    close(root @ root.T, torch.linalg.inv(damped), 1e-6)


@pytest.mark.parametrize("approx", APPROXIMATIONS)
@pytest.mark.parametrize("model", ["mlp", "cnn_groups", "softmax_regression"])
def test_a_curvature_set_is_its_dense_matrix(approx, model):
    c = measured(approx, model)
    truth = c.to_dense()
    close(truth, truth.T)
    assert torch.linalg.eigvalsh(truth).min() > -1e-10
    check_algebra(c, truth)


@pytest.mark.parametrize("n", [2, 30], ids=["fewer_rows_than_parameters", "more_rows_than_parameters"])
@pytest.mark.parametrize("approx", ["full", "block"])
@pytest.mark.parametrize("model", ["mlp", "cnn_groups", "shared_layer"])
def test_rows_answer_what_the_matrix_answers(approx, model, n):
    dense, rows = measured(approx, model, n), measured(approx, model, n, rows_limit=1)
    assert all(block.approx.of_one_step for block in rows.blocks.values())
    check_algebra(rows, dense.to_dense(), 1e-7)


# --- factors by themselves ------------------------------------------------------------------------------------


def spd(g, d, rank, seed):
    x = cases.randn(g, d, rank, seed=seed)
    return x @ x.mT


def kron(left, right):
    """[g, o, o], [g, i, i] -> block-diagonal [g o i, g o i]."""
    pairs = zip(left, right, strict=True)
    return torch.block_diag(*(torch.kron(b.contiguous(), a.contiguous()) for b, a in pairs))


def damped_factors(A, B, damping):
    """MATH, factored damping, one group: a factor of size 1 takes nothing and the other gets all of it."""
    i, o = torch.eye(len(A), dtype=A.dtype), torch.eye(len(B), dtype=B.dtype)
    mean_a, mean_b = A.trace() / len(A), B.trace() / len(B)
    if len(B) == 1 and mean_b > 0:
        return A + damping / mean_b * i, B
    if len(A) == 1 and len(B) > 1 and mean_a > 0:
        return A, B + damping / mean_a * o
    pi = (mean_a / mean_b).sqrt() if mean_a > 0 and mean_b > 0 else torch.ones((), dtype=A.dtype)
    return A + pi * damping**0.5 * i, B + damping**0.5 / pi * o


sizes = st.integers(1, 4)


@settings(max_examples=60, deadline=None)
@given(g=st.integers(1, 3), o=sizes, i=sizes, rank=st.integers(1, 4), zero=st.sampled_from([None, "A", "B", "both"]))
def test_factored_damping_is_the_kronecker_product_of_damped_factors(g, o, i, rank, zero):
    A, B = spd(g, i, rank, 1), spd(g, o, rank, 2)
    A[0] *= zero not in ("A", "both")
    B[0] *= zero not in ("B", "both")
    count = torch.tensor(5.0, dtype=torch.float64)
    factor, ok = Kronecker().factor({"A": A * count, "count": count, "B": B}, LAMBDA, "factored")
    assert ok
    pairs = [damped_factors(a, b, LAMBDA) for a, b in zip(A, B, strict=True)]
    truth = kron([b for _, b in pairs], [a for a, _ in pairs])
    x = cases.randn(2, g, o, i, seed=3)
    close(factor.solve(x).flatten(1).T, torch.linalg.solve(truth, x.flatten(1).T))
    close(factor.logdet(), torch.logdet(truth))
    unit = torch.eye(g * o * i, dtype=torch.float64).reshape(-1, g, o, i)
    root = factor.sample(unit).flatten(1).T
    close(root @ root.T, torch.linalg.inv(truth))


@settings(max_examples=40, deadline=None)
@given(g=st.integers(1, 3), o=sizes, i=sizes, rank=st.integers(1, 4), which=st.sampled_from(["kron", "dense", "diag"]))
def test_exact_damping_is_tikhonov(g, o, i, rank, which):
    A, B = spd(g, i, rank, 1), spd(g, o, rank, 2)
    if which == "kron":
        statistics, approx = {"A": A, "count": torch.ones(()).double(), "B": B}, Kronecker()
        truth = kron(B, A)
    elif which == "dense":
        statistics, approx, truth = {"matrix": A}, Dense(per_unit=True), torch.block_diag(*A)
        o = 1
    else:
        statistics, approx = {"diag": A[..., :1].square()}, Diagonal()
        truth, o, i = A[..., 0].square().flatten().diag(), i, 1
    factor, ok = approx.factor(statistics, LAMBDA, "exact")
    assert ok
    damped = truth + LAMBDA * torch.eye(len(truth), dtype=truth.dtype)
    x = cases.randn(2, g, o, i, seed=3)
    close(factor.solve(x).flatten(1).T, torch.linalg.solve(damped, x.flatten(1).T))
    close(factor.solve(x, 7.0).flatten(1).T, torch.linalg.solve(truth + 7 * torch.eye(len(truth)), x.flatten(1).T))
    close(factor.matvec(x).flatten(1).T, truth @ x.flatten(1).T)
    close(factor.logdet(), torch.logdet(damped))
    close(factor.diag().flatten(), truth.diagonal())
    close(factor.trace(), truth.trace())


@settings(max_examples=40, deadline=None)
@given(g=st.integers(1, 2), o=sizes, i=sizes)
def test_moments_carried_to_a_new_basis_are_the_diagonal_there(g, o, i):
    old, new = (tuple(torch.linalg.qr(cases.randn(g, d, d, seed=seed + d)).Q for d in (o, i)) for seed in (0, 50))
    moments = cases.randn(g, o, i, seed=1).square()
    got = project_moments(moments, old, new)
    Q, Q_new = kron(*old), kron(*new)
    matrix = Q @ moments.flatten().diag() @ Q.T
    close(got.flatten(), (Q_new.T @ matrix @ Q_new).diagonal())
    close(got.sum(), moments.sum())


# --- running averages -----------------------------------------------------------------------------------------


def block_of(approx="diag", **options):
    net = cases.model_case("softmax_regression").make_model()
    return Curvature("layer", find_layers(net, lambda p: True), Options(approx=approx, **options))


@settings(max_examples=60, deadline=None)
@given(
    rho=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    bad=st.lists(st.sampled_from([None, None, float("nan"), float("inf")]), min_size=1, max_size=6),
    accelerator=st.booleans(),
)
def test_the_running_average_is_bias_corrected_and_leaves_out_what_is_not_finite(rho, bad, accelerator):
    block, kept = block_of(), []
    with assume_accelerator() if accelerator else nullcontext():
        for k, value in enumerate(bad):
            x = cases.randn(1, 3, 5, seed=k).square()
            kept += [x.clone()] if value is None else []
            if value is not None:
                x[0, 0, 0] = value
            block.pending.add({"diag": x})
            block.update(rho)
    assert read_flags([block.health]) == [(len(bad) - len(kept), 0)]
    times = [k for k, value in enumerate(bad) if value is None]  # the old fades while nothing new is let in
    weights = torch.tensor([rho ** (times[-1] - k) for k in times], dtype=torch.float64)
    if kept:
        close(block.tensors["diag"], torch.einsum("k,k...->...", weights, torch.stack(kept)) / weights.sum())
    else:
        close(block.tensors["diag"], torch.zeros(1, 3, 5, dtype=torch.float64))


@pytest.mark.parametrize("approx", [approx for approx in APPROXIMATIONS if approx != "lowrank"])  # test_lowrank.py
@pytest.mark.parametrize("damping_type", ["factored", "exact"])
def test_of_nothing_measured_the_step_is_the_gradient_and_not_divided_by_the_damping(approx, damping_type):
    """The first measurement is not finite: the step is, along the gradient of each block, of length 1 at the most."""
    model = cases.model_case("mlp").make_model()
    optimizer = SecondOrderOptimizer(
        model, loss_fn=nn.MSELoss(), approx=approx, damping_type=damping_type, lr=1.0, momentum=0.0, kl_clip=None,
        damping=0.1, update_every=1, refactor_every=1,
    )  # fmt: skip
    x, y = cases.randn(3, 4), cases.randn(3, 3)
    optimizer.engine.recorder.loss_fn(model(x), y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    for block in optimizer.engine.blocks:
        block.pending.add({key: value * torch.nan for key, value in block.pending.tensors.items()})
    with pytest.warns(UserWarning, match="were not finite"):
        optimizer.step()
    old = dict(zip(model.parameters(), before, strict=True))
    for block in optimizer.engine.blocks:
        length = torch.stack([p.grad.norm() for p in block.params]).norm()
        for p in block.params:
            close(old[p] - p, p.grad / length.clamp_min(1))


# --- failures -------------------------------------------------------------------------------------------------


def stepper(approx="kfac", **options):
    model, loss = nn.Linear(4, 3).double(), nn.MSELoss()
    model.load_state_dict(cases.model_case("softmax_regression").make_model().state_dict())
    options = {
        "damping": LAMBDA,
        "lr": 1.0,
        "momentum": 0.0,
        "kl_clip": None,
        "update_every": 100,
        "refactor_every": 1,
        **options,
    }
    optimizer = SecondOrderOptimizer(nn.Sequential(model), loss_fn=loss, approx=approx, **options)
    x, y = cases.randn(6, 4, seed=1), cases.randn(6, 3, seed=2)

    def step():
        optimizer.zero_grad()
        before = model.weight.detach().clone(), model.bias.detach().clone()
        loss(optimizer.model(x), y).backward()
        optimizer.step()
        return before[0] - model.weight.detach(), before[1] - model.bias.detach()

    return optimizer, optimizer.engine.blocks[0], step


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
@pytest.mark.parametrize("approx", ["kfac", "block"])
def test_a_failed_factorisation_keeps_the_last_good_factor_and_is_tried_again(approx, device, request, monkeypatch):
    if device == "accelerator":
        request.getfixturevalue("accelerator")
    optimizer, block, step = stepper(approx)
    step()
    good = {key: value.clone() for key, value in block.factor.state().items()}
    name = "B" if approx == "kfac" else "matrix"
    block.tensors[name] = block.tensors[name] - 1e3 * torch.eye(block.tensors[name].shape[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()  # fails; no message before the next refresh
    for key, value in block.factor.state().items():
        assert torch.equal(value, good[key])
    assert optimizer.metrics()["failed_factorisations"] == 1
    block.tensors[name] = block.tensors[name] + 1e3 * torch.eye(block.tensors[name].shape[-1])
    asked = []
    inverse_spd = linalg.inverse_spd
    monkeypatch.setattr(
        "torchcurv.curv.linalg.block_diagonal.inverse_spd",
        lambda m, d: (asked.append((m.dtype, d)), inverse_spd(m, d))[1],
    )
    with pytest.warns(UserWarning, match=r"block '0': 1 factorisations failed.*last good factor"):
        step()
    step()
    more, usual = asked[0], asked[len(asked) // 2]
    assert more[0] == usual[0] == torch.float64
    ratio = torch.as_tensor(more[1]) / torch.as_tensor(usual[1])
    assert torch.allclose(ratio, torch.full_like(ratio, 10**0.5 if approx == "kfac" else 10), rtol=1e-3)
    assert optimizer.metrics()["failed_factorisations"] == 1


@pytest.mark.parametrize("d", [512, 513, 785])
def test_a_large_matrix_is_inverted_by_blocks_from_its_lower_triangle(d):
    x = cases.randn(d + 5, d, seed=1)
    matrix = torch.stack([x.mT @ x / d, torch.eye(d, dtype=x.dtype)])
    garbage = torch.full_like(matrix, 7.0).triu(1)
    inverse, ok = inverse_spd(matrix.tril() + garbage, torch.tensor([0.1, 2.0]))
    damped = matrix + torch.tensor([0.1, 2.0])[:, None, None] * torch.eye(d)
    truth = torch.stack([torch.linalg.inv(one) for one in damped])
    assert ok and torch.allclose(inverse, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("d", [3, 300])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_columns_are_solved_as_the_whole(d, lead):
    g, o = 2, 3
    right, left = (m @ m.mT for m in (cases.randn(g, d, d, seed=1), cases.randn(g, o, o, seed=2)))
    factor, x = KroneckerInverse(right, left), cases.randn(*lead, g, o, d, seed=3)
    whole = factor.solve(x)
    assert torch.allclose(whole, left @ x @ right)
    for widths in ([d], [d - 1, 1], [1, d - 2, 1]):
        parts = factor.solve_columns(list(x.split(widths, -1)))
        assert torch.allclose(torch.cat(parts, -1), whole)


@pytest.mark.parametrize("d", [1, 3, 600])
def test_a_singular_matrix_is_a_failure_and_no_exception(d):
    matrices = torch.stack([torch.zeros(d, d), 2 * torch.eye(d)]).double()
    inverse, ok = linalg.inverse_spd(matrices, 0.0)
    assert not ok
    close(inverse[1], 0.5 * torch.eye(d, dtype=torch.float64))


def test_a_retry_in_float64_returns_to_the_dtype_of_the_statistics():
    block = block_of("kfac")
    block.average.tensors = {"A": spd(1, 5, 5, 1).float(), "count": torch.ones(()), "B": spd(1, 3, 3, 2).float()}
    block.health.retry = True
    block.refactor(LAMBDA)
    assert {value.dtype for value in block.factor.state().values()} == {torch.float32} and not block.health.retry
    wanted, _ = block.approx.factor(block.tensors, 10 * LAMBDA, "factored")
    close(block.factor.right, wanted.right, 1e-4)


# --- damping --------------------------------------------------------------------------------------------------


def kfac_reference(optimizer, model, x, y, damping, exact):
    """The step of one Linear layer with exact curvature at the model's parameters."""
    a, s = oracles.layer_arrays(model, nn.MSELoss(), x, y, "0")
    A, B = (m[0] for m in oracles.kron_factors(a, s))
    grad = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1)
    if exact:
        damped = torch.kron(B.contiguous(), A.contiguous()) + damping * torch.eye(grad.numel())
        return torch.linalg.solve(damped, grad.flatten()).reshape(grad.shape)
    A, B = damped_factors(A, B, damping)
    return torch.linalg.solve(B, grad) @ torch.linalg.inv(A)


@pytest.mark.parametrize("exact", [True, False])
def test_a_changed_damping_takes_effect_without_a_factorisation_due(exact):
    """At once for eigenvectors; for inverses, which hold it, once it moved by more than a tenth."""
    optimizer, _, step = stepper(
        damping_type="exact" if exact else "factored", refactor_every=100, samples=None, lr=1e-12
    )
    x, y = cases.randn(6, 4, seed=1), cases.randn(6, 3, seed=2)
    group, used = optimizer.param_groups[0], LAMBDA
    for damping in (LAMBDA, LAMBDA * 1.08, LAMBDA * 1.3, LAMBDA * 0.02):
        group["damping"] = damping
        used = damping if exact or abs(damping - used) > 0.1 * used else used
        moved = torch.cat([part if part.dim() == 2 else part[:, None] for part in step()], 1) / 1e-12
        close(moved, kfac_reference(optimizer, optimizer.model, x, y, used, exact), 1e-3)


def test_l2_is_in_the_gradient_and_in_the_damping():
    optimizer, block, step = stepper(damping_type="exact", samples=None, l2=0.5)
    x, y = cases.randn(6, 4, seed=1), cases.randn(6, 3, seed=2)
    weight, bias = (p.detach().clone() for p in block.params)
    moved = step()
    matrix = oracles.kfac_from_arrays(*oracles.layer_arrays(optimizer.model, nn.MSELoss(), x, y, "0"))
    grad = torch.cat([block.params[0].grad + 0.5 * weight, (block.params[1].grad + 0.5 * bias)[:, None]], 1)
    truth = torch.linalg.solve(matrix + (LAMBDA + 0.5) * torch.eye(15, dtype=grad.dtype), grad.flatten()).reshape(3, 5)
    close(torch.cat([moved[0], moved[1][:, None]], 1), truth)


def test_the_eigenvalues_of_a_diagonal_follow_every_measurement():
    """Between two factorisations too, and whether or not the average is updated in place."""
    _, block, step = stepper("diag", update_every=1, refactor_every=5, samples=None)
    for _ in range(3):
        step()
        assert isinstance(block.factor, Eigen)
        assert torch.equal(block.factor.values, block.tensors["diag"])


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("approx", ["full", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top", [1e0, 1e2, 1e4, 1e6])
def test_rows_are_as_accurate_as_the_matrix(top, dtype, approx, passes):
    """(g - V^T (λ I + V V^T)^-1 V g) / λ as it stands would lose (C / λ)² eps where a dense solve loses C / λ eps."""
    model = cases.seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))).float()
    data = [(cases.randn(3, 4, seed=k).float(), torch.arange(3)) for k in range(passes)]

    def of(dtype, limit):
        own = [(x.to(dtype), y) for x, y in data]
        return curvature(copy.deepcopy(model).to(dtype), nn.CrossEntropyLoss(), own, approx=approx, rows_limit=limit)

    rows, matrix, C = of(dtype, 1), of(dtype, 10**6), of(torch.float64, 10**6).to_dense()
    lam = torch.linalg.eigvalsh(C)[-1].item() / top
    noise = cases.randn(len(C), seed=5).float().double()
    for v in (noise, (C @ noise).float().double()):  # what no row reaches, and what they do
        truth = torch.linalg.solve(C + lam * torch.eye(len(C), dtype=C.dtype), v)
        by_rows, by_matrix = (
            ((c.solve(v.to(dtype), lam).double() - truth).norm() / truth.norm()).item() for c in (rows, matrix)
        )
        assert by_rows <= 4 * by_matrix + torch.finfo(dtype).eps * (10 + top)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_by_rows_are_as_accurate_as_their_spectrum(dtype):
    """(C + λ I)^-1/2 along the rows, for C / λ from 1e4 on."""
    model = cases.seeded(lambda: nn.Linear(6, 3, bias=False)).to(dtype)
    data = [((cases.randn(4, 6) * 300).to(dtype), cases.randn(4, 3).to(dtype))]
    rows = curvature(model, nn.MSELoss(reduction="sum"), data, approx="full", rows_limit=1)
    values, Q = torch.linalg.eigh(rows.to_dense().double())
    along = Q[:, values > 1e4]
    assert 0 < along.shape[1] < len(Q)
    (block,) = rows.blocks.values()
    for k in range(5):
        noise = [cases.randn(*layer.shape, seed=k).to(dtype) for layer in block.layers]
        flat = torch.cat([t.flatten() for t in noise]).double()
        found = torch.cat([t.flatten() for t in rows_in(block.tensors).sample(noise, 1.0)]).double()
        truth = (values[values > 1e4] + 1).rsqrt() * (along.T @ flat)
        assert (along.T @ found - truth).norm() < 1e5 * torch.finfo(dtype).eps * truth.norm()
