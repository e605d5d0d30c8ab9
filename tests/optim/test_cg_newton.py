"""CGNewton against dense solves, and its conjugate gradients on their own."""

import cases
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchcurv import curvature
from torchcurv.optim import CGNewton
from torchcurv.optim.cg_newton import conjugate_gradients

LOSS, ALPHA = nn.CrossEntropyLoss(), 0.1


def problem(id="mlp"):
    case = cases.model_case(id)
    model, x = case.make_model(), cases.randn(5, *case.input_shape, seed=2)
    return model, x, torch.arange(5) % cases.CLASSES


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def step_of(model, x, y, **options):
    optimizer = CGNewton(model, loss_fn=LOSS, lr=1.0, alpha=ALPHA, cg_tol=1e-12, cg_maxiter=500, **options)
    before = flat(model.parameters())
    if options.get("approx") == "operator":
        out = {}

        def closure():
            out["f"] = model(x)
            return LOSS(out["f"], y), out["f"]

        optimizer.step(closure)
    else:
        LOSS(model(x), y).backward()
        optimizer.step()
    return flat(model.parameters()) - before, optimizer


@pytest.mark.pairwise
@pytest.mark.parametrize("curv_type", ["ggn", "empirical_fisher", "hessian"])
@pytest.mark.parametrize("approx", ["full", "block", "unit", "kfac", "diag"])
@pytest.mark.parametrize("id", ["mlp", "cnn", "shared_layer"])
def test_a_step_solves_the_system(id, approx, curv_type):
    if (curv_type, approx) == ("hessian", "kfac"):
        return
    model, x, y = problem(id)
    C = curvature(model, LOSS, [(x, y)], curv_type=curv_type, approx=approx).to_dense()
    g = oracles.gradient(model, LOSS, x, y, list(model.named_parameters()))
    alpha = ALPHA if curv_type != "hessian" else 0.9  # positive definite
    options = {"curv_type": curv_type, "approx": approx}
    if curv_type == "hessian":
        optimizer = CGNewton(model, loss_fn=LOSS, lr=1.0, alpha=alpha, cg_tol=1e-12, cg_maxiter=500, **options)
        before = flat(model.parameters())
        LOSS(model(x), y).backward()
        optimizer.step()
        d = flat(model.parameters()) - before
    else:
        d, _ = step_of(model, x, y, **options)
    expected = torch.linalg.solve((1 - alpha) * C + alpha * torch.eye(len(g), dtype=g.dtype), -g)
    assert (d - expected).norm() < 1e-8 * expected.norm()


@pytest.mark.parametrize("curv_type", ["ggn", "hessian"])
def test_matrix_free_products_are_those_of_the_whole_matrix(curv_type):
    model, x, y = problem()
    named = list(model.named_parameters())
    truth = {"ggn": oracles.ggn, "hessian": oracles.hessian}[curv_type](model, LOSS, x, y, named)
    g = oracles.gradient(model, LOSS, x, y, named)
    alpha = 0.5
    optimizer = CGNewton(
        model, curv_type=curv_type, approx="operator", lr=1.0, alpha=alpha, cg_tol=1e-13, cg_maxiter=500
    )
    before = flat(model.parameters())

    def closure():
        out = model(x)
        return LOSS(out, y), out

    optimizer.step(closure)
    A = (1 - alpha) * truth + alpha * torch.eye(len(g), dtype=g.dtype)
    assert torch.linalg.eigvalsh(A).min() > 0
    expected = torch.linalg.solve(A, -g)
    assert (flat(model.parameters()) - before - expected).norm() < 1e-8 * expected.norm()
    assert all(p.grad is None for p in model.parameters())


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 8), rank=st.integers(0, 8), seed=st.integers(0, 99))
def test_conjugate_gradients_solve(n, rank, seed):
    x = cases.randn(max(1, rank), n, seed=seed)
    A, b = x.mT @ x + 0.1 * torch.eye(n, dtype=x.dtype), cases.randn(n, seed=seed + 1)
    (got,), iterations = conjugate_gradients(lambda v: [A @ v[0]], [b], None, 1e-13, 0.0, 200)
    assert torch.allclose(got, torch.linalg.solve(A, b), rtol=1e-7, atol=1e-9) and iterations <= 200
    (again,), none = conjugate_gradients(lambda v: [A @ v[0]], [b], [got], 1e-6, 0.0, 200)
    assert none == 0 and torch.equal(again, got)


def test_conjugate_gradients_stop():
    A, b = torch.diag(torch.tensor([1.0, 10.0, 100.0, 1000.0])), torch.ones(4)

    def product(v):
        return [A @ v[0]]

    assert conjugate_gradients(product, [b], None, 1e-9, 0.0, 2)[1] == 2
    assert conjugate_gradients(product, [b], None, 1e-9, 10.0, 50)[1] == 0
    loose, tight = (conjugate_gradients(product, [b], None, tol, 0.0, 50)[1] for tol in (0.5, 1e-5))
    assert 0 < loose < tight
    (x,), _ = conjugate_gradients(product, [b], None, 0.1, 0.0, 50)
    assert (b - A @ x).norm() <= 0.1 * b.norm()
    zero = [torch.zeros(4)]
    assert conjugate_gradients(product, zero, None, 0.1, 0.0, 50)[1] == 0
    (negative,), done = conjugate_gradients(lambda v: [-v[0]], [b], None, 1e-9, 0.0, 50)
    assert torch.equal(negative, b) and done == 0
    indefinite = torch.diag(torch.tensor([5.0, 1.0, -0.5, 2.0]))
    (some,), done = conjugate_gradients(lambda v: [indefinite @ v[0]], [b], None, 1e-9, 0.0, 50)
    assert torch.isfinite(some).all() and 0 < done < 50 and some @ b > 0


def test_a_warm_start_saves_iterations_and_is_resumed():
    def run(warm, steps, saved=None):
        model, x, y = problem()
        optimizer = CGNewton(model, loss_fn=LOSS, lr=0.01, alpha=0.01, cg_tol=1e-6, cg_maxiter=500, warm_start=warm)
        counts = []
        for _ in range(steps):
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()
            counts.append(optimizer.metrics()["cg_iterations"])
        return counts

    cold, warm = run(False, 4), run(True, 4)
    assert cold[0] == warm[0] and sum(warm[1:]) < sum(cold[1:])


def test_training_lowers_the_loss_and_parameters_without_curvature_follow_the_gradient():
    model, x, y = problem()
    groups = [{"params": model[0].parameters(), "approx": None}, {"params": model[2:].parameters(), "lr": 0.5}]
    optimizer = CGNewton(model, groups, loss_fn=LOSS)
    losses = []
    for k in range(6):
        optimizer.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        before, g = model[0].weight.detach().clone(), model[0].weight.grad.clone()
        optimizer.step()
        assert torch.allclose(before - model[0].weight, 0.1 * g), k
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"cg_maxiter": 0}, "cg_maxiter=0"),
        ({"cg_tol": -1.0}, "cg_tol=-1.0"),
        ({"approx": "operator", "curv_type": "fisher"}, 'allowed are "ggn" and "hessian"'),
        ({"approx": "kfca"}, "allowed are 'full'"),
        ({"residual": "zero"}, "residual='zero' with curv_type='ggn'.*curv_type=\"hessian\""),
        ({"residual": "half", "curv_type": "hessian", "approx": "kfac"}, "residual='half'"),
        ({"residual": "zero", "curv_type": "hessian"}, "not propagated"),
        ({"residual": "zero", "curv_type": "hessian", "approx": "operator"}, 'with approx="operator"'),
        ({"hessian_averaging": "batch", "curv_type": "hessian", "approx": "diag"}, "hessian_averaging='batch'"),
        ({"residual_over": "batch", "curv_type": "hessian", "approx": "block"}, "residual_over='batch'"),
        ({"residual_over": "all", "curv_type": "hessian", "approx": "kfac"}, "residual_over='all'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CGNewton(nn.Linear(4, 3), **options)


def backpropagated(model, x, y, residual, over, averaging):
    """[B ⊗ A over (weight, bias)] of a chain of linear layers and tanh, by loops over samples."""
    n, inputs, z = len(x), [], x
    for module in model:
        inputs.append(z.detach())
        z = module(z)
    p = z.detach().softmax(1)
    H = sum(torch.diag(row) - torch.outer(row, row) for row in p) / n  # the mean of the Hessians of the samples
    g = [(p[k] - nn.functional.one_hot(y[k], p.shape[1])) / n for k in range(n)]  # of the mean loss
    act = {"keep": lambda r: r, "zero": lambda r: 0 * r, "abs": torch.abs, "clip": lambda r: r.clamp(min=0)}[residual]
    blocks = []
    for module, a in zip(reversed(model), reversed(inputs), strict=True):
        if isinstance(module, nn.Linear):
            rows = [torch.cat([row, torch.ones(1, dtype=a.dtype)]) for row in a]
            mean = sum(rows) / n
            A = torch.outer(mean, mean) if averaging == "batch" else sum(torch.outer(row, row) for row in rows) / n
            blocks.insert(0, (H, A))
            W = module.weight.detach()
            H, g = W.T @ H @ W, [W.T @ row for row in g]
            continue
        t = a.tanh()
        slopes = [torch.diag(1 - row.square()) for row in t]
        seconds = [g[k] * -2 * t[k] * (1 - t[k].square()) for k in range(n)]
        J = sum(slopes) / n
        H = J @ H @ J if averaging == "batch" else sum(D @ H @ D for D in slopes) / n
        H = H + torch.diag(act(sum(seconds)) if over == "batch" else sum(act(r) for r in seconds))
        g = [D @ row for D, row in zip(slopes, g, strict=True)]
    return blocks


@pytest.mark.parametrize("averaging", ["sample", "batch"])
@pytest.mark.parametrize("over", ["sample", "batch"])
@pytest.mark.parametrize("residual", ["keep", "zero", "abs", "clip"])
def test_hessian_backpropagation_step_by_step(residual, over, averaging):
    model = cases.seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
    x, y, alpha = cases.randn(7, 4, seed=1), torch.arange(7) % 3, 0.9
    how = {"residual": residual, "residual_over": over, "hessian_averaging": averaging}
    optimizer = CGNewton(
        model, curv_type="hessian", approx="kfac", lr=1.0, alpha=alpha, cg_tol=1e-13, cg_maxiter=500, **how
    )
    truth = backpropagated(model, x, y, residual, over, averaging)
    LOSS(model(x), y).backward()
    layers = [module for module in model if isinstance(module, nn.Linear)]
    gradients = [torch.cat([m.weight.grad, m.bias.grad[:, None]], 1) for m in layers]
    before = [torch.cat([m.weight, m.bias[:, None]], 1).detach().clone() for m in layers]
    seen = curvature(model, LOSS, [(x, y)], curv_type="hessian", approx="kfac", **how)
    optimizer.step()
    for m, g, old, (B, A), block in zip(layers, gradients, before, truth, seen.blocks.values(), strict=True):
        assert torch.allclose(block.tensors["B"][0], B, rtol=1e-10, atol=1e-12)
        assert torch.allclose(block.tensors["A"][0] / block.tensors["count"], A, rtol=1e-10, atol=1e-12)
        C = torch.kron(B, A)
        d = torch.linalg.solve((1 - alpha) * C + alpha * torch.eye(len(C), dtype=C.dtype), -g.flatten()).reshape(
            g.shape
        )
        got = torch.cat([m.weight, m.bias[:, None]], 1) - old
        assert (got - d).norm() < 1e-8 * d.norm()


def test_averages_of_jacobians_weigh_micro_batches_by_their_samples():
    """One linear layer and a loss whose matrix is the same for all samples."""
    model, x, y = cases.seeded(lambda: nn.Linear(4, 3)), cases.randn(6, 4, seed=1), cases.randn(6, 3, seed=2)
    options = {"curv_type": "hessian", "approx": "kfac", "hessian_averaging": "batch"}
    seen = curvature(model, nn.MSELoss(), [(x[:2], y[:2]), (x[2:], y[2:])], **options)
    (block,) = seen.blocks.values()
    ones = torch.cat([x, torch.ones(6, 1, dtype=x.dtype)], 1)
    first, last = ones[:2].mean(0), ones[2:].mean(0)
    A = (2 * torch.outer(first, first) + 4 * torch.outer(last, last)) / 6
    assert torch.allclose(block.tensors["A"][0] / block.tensors["count"], A)


def test_the_operator_says_what_its_closure_must_return():
    model, x, y = problem()
    optimizer = CGNewton(model, approx="operator")
    with pytest.raises(ValueError, match=r"needs step\(closure\)"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"returns \(loss, output\)"):
        optimizer.step(lambda: LOSS(model(x), y))

    def closure():
        out = model(x)
        loss = LOSS(out, y)
        loss.backward()
        return loss, out

    with pytest.raises(RuntimeError, match="without calling backward"):
        optimizer.step(closure)
