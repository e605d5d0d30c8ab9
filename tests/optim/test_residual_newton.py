"""ResidualNewton against dense solves, closed forms and scipy's least squares, in float64 unless said otherwise."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchcurv import SecondOrderOptimizer
from torchcurv.curv.linalg.least_squares import DampedLeastSquares, jacobian
from torchcurv.optim import ResidualNewton
from torchcurv.optim.control.trials import damping_factor


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def net(width=5, inputs=2, seed=0, dtype=torch.float64):
    model = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 1)).to(dtype)
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(randn(*p.shape, seed=seed + k) * 0.5)
    return model


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def dense(model, residuals):
    """(J, r), row by row."""
    r = residuals().flatten()
    rows = [torch.autograd.grad(x, list(model.parameters()), retain_graph=True, allow_unused=True) for x in r]
    zeros = [torch.zeros_like(p) for p in model.parameters()]
    J = torch.stack([flat(z if g is None else g for g, z in zip(row, zeros, strict=True)) for row in rows])
    return J, r.detach()


def data(m, inputs=2):
    x = randn(m, inputs, seed=7)
    return x, torch.sin(x.sum(1, keepdim=True))


FIXED = {"damping_rule": "fixed"}


@pytest.mark.parametrize("solver", [None, "rows", "parameters", "cg"])
@pytest.mark.parametrize("m", [6, 60])
def test_a_step_is_the_dense_solve(m, solver):
    model, (x, y) = net(), data(m)
    assert (6 < 21) and (60 > 21) and sum(p.numel() for p in model.parameters()) == 21

    def residuals():
        return model(x) - y

    J, r = dense(model, residuals)
    before, damping = flat(model.parameters()), 0.1
    options = {"solver": solver, "cg_tol": 1e-13, "cg_maxiter": 500}
    optimizer = ResidualNewton(model, damping=damping, **FIXED, **options)
    loss = optimizer.step(residuals)
    expected = -torch.linalg.solve(J.mT @ J + damping * torch.eye(21, dtype=r.dtype), J.mT @ r)
    torch.testing.assert_close(flat(model.parameters()) - before, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(loss, 0.5 * r.square().sum())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("m", [6, 60])
def test_without_damping_it_is_the_shortest_least_squares_step(m):
    model, (x, y) = net(), data(m)
    J, r = dense(model, lambda: model(x) - y)
    before = flat(model.parameters())
    optimizer = ResidualNewton(model, damping=0.0, **FIXED)
    optimizer.step(lambda: model(x) - y)
    expected = -torch.linalg.pinv(J) @ r
    torch.testing.assert_close(flat(model.parameters()) - before, expected, rtol=1e-7, atol=1e-9)
    assert optimizer.metrics()["rank"] == min(m, 21)


def test_directions_that_residuals_do_not_see_are_left_alone():
    """One residual twice, a parameter that is not used, and a product that only one direction of two enters."""
    a, b, unused = (nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in (1.0, 2.0, 3.0))
    optimizer = ResidualNewton([a, b, unused], damping=0.0, **FIXED)
    optimizer.step(lambda: torch.cat([a + b - 5, a + b - 5]))
    assert optimizer.metrics()["rank"] == 1 and unused.item() == 3.0
    torch.testing.assert_close(torch.cat([a, b]).detach(), torch.tensor([2.0, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("as_dict", [False, True])
def test_weights_and_means_are_those_of_the_loss(reduction, as_dict):
    model, (x, y) = net(), data(9)
    each = randn(9, 1, seed=3).abs()

    def parts():
        r = model(x)
        return {"data": r - y, "size": 0.1 * r[:4].flatten()} if as_dict else [r - y, 0.1 * r[:4].flatten()]

    def weighted():
        r, s = parts().values() if as_dict else parts()
        n, k = (r.numel(), s.numel()) if reduction == "mean" else (1, 1)
        return torch.cat([(r * (each / n).sqrt()).flatten(), s * math.sqrt(3.0 / k)])

    J, r = dense(model, weighted)
    before = flat(model.parameters())
    optimizer = ResidualNewton(model, damping=0.05, reduction=reduction, **FIXED)
    weights = {"data": each, "size": 3.0} if as_dict else [each, 3.0]
    loss = optimizer.step(parts, weights)
    expected = -torch.linalg.solve(J.mT @ J + 0.05 * torch.eye(21, dtype=r.dtype), J.mT @ r)
    torch.testing.assert_close(flat(model.parameters()) - before, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(loss, 0.5 * r.square().sum())


def test_a_dict_of_weights_may_leave_out_a_key():
    model, (x, y) = net(), data(5)
    twin = copy.deepcopy(model)
    ResidualNewton(model).step(lambda: {"a": model(x) - y, "b": model(-x)}, {"b": 2.0})
    ResidualNewton(twin).step(lambda: {"a": twin(x) - y, "b": twin(-x)}, {"a": 1.0, "b": 2.0})
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"damping": 0.0, "acceleration": False}, {"damping": 1e-13}])
@pytest.mark.parametrize(("m", "n"), [(20, 4), (4, 20)])
def test_linear_least_squares_are_solved_in_one_step(m, n, options):
    A, b = randn(m, n, seed=1), randn(m, seed=2)
    theta = nn.Parameter(torch.zeros(n, dtype=torch.float64))
    ResidualNewton([theta], **options).step(lambda: A @ theta - b)
    torch.testing.assert_close(theta.detach(), torch.linalg.lstsq(A, b, driver="gelsd").solution, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"acceleration": False}, {"line_search": 4}, {"solver": "cg"}])
def test_a_curve_fit_ends_where_other_software_does(options):
    scipy = pytest.importorskip("scipy.optimize")
    t = torch.linspace(0, 2, 25, dtype=torch.float64)
    y = 2.5 * torch.exp(-1.3 * t) + 0.5 + 0.05 * randn(25, seed=4)
    theta = nn.Parameter(torch.tensor([1.0, 0.1, 0.0], dtype=torch.float64))
    optimizer = ResidualNewton([theta], **options)
    for _ in range(40):
        optimizer.step(lambda: theta[0] * torch.exp(-theta[1] * t) + theta[2] - y)
    import numpy as np

    t_, y_ = t.numpy(), y.numpy()
    found = scipy.least_squares(
        lambda p: p[0] * np.exp(-p[1] * t_) + p[2] - y_, [1.0, 0.1, 0.0], xtol=1e-15, ftol=1e-15
    )
    torch.testing.assert_close(theta.detach(), torch.tensor(found.x), rtol=1e-6, atol=1e-6)


def test_rosenbrock():
    """The zero of (10 (y - x²), 1 - x), from its usual start at the other end of a bent valley."""
    theta = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    optimizer = ResidualNewton([theta])
    for _ in range(40):
        optimizer.step(lambda: torch.stack([10 * (theta[1] - theta[0] ** 2), 1 - theta[0]]))
    torch.testing.assert_close(theta.detach(), torch.ones(2, dtype=torch.float64), rtol=1e-9, atol=1e-9)


# --- derivatives of the network ------------------------------------------------------------------------------------


def poisson(model, x):
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return bend + torch.sin(x)


def sobolev(model, x):
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return torch.cat([(u - torch.sin(x)).flatten(), (slope - torch.cos(x)).flatten()])


def gradient_penalty(model, x):
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return slope.norm(dim=1) - 1


def by_forward_mode(model, x):
    """u' by torch.func, inside of the residuals."""
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1] - torch.cos(x)


@pytest.mark.parametrize("solver", [None, "cg"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, of its forward mode
@pytest.mark.parametrize("inside", [poisson, sobolev, gradient_penalty, by_forward_mode])
def test_residuals_of_derivatives_are_differentiated_by_the_parameters(inside, solver):
    model = net(inputs=1)
    x = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None].requires_grad_()
    theta = {name: p.detach() for name, p in model.named_parameters()}

    def of(theta):
        return inside(lambda x: torch.func.functional_call(model, theta, (x,)), x).flatten()

    # central differences, of error h² and eps/h
    h, columns = 1e-5, []
    for name, p in theta.items():
        for k in range(p.numel()):
            moved = [{**theta, name: (p.flatten() + s * h * torch.eye(p.numel())[k]).reshape(p.shape)} for s in (1, -1)]
            columns.append((of(moved[0]) - of(moved[1])).detach() / (2 * h))
    J, r = torch.stack(columns, 1), of(theta).detach()
    before = flat(model.parameters())
    optimizer = ResidualNewton(model, damping=0.1, solver=solver, cg_tol=1e-12, cg_maxiter=500, **FIXED)
    optimizer.step(lambda: inside(model, x))
    expected = -torch.linalg.solve(J.mT @ J + 0.1 * torch.eye(J.shape[1], dtype=r.dtype), J.mT @ r)
    torch.testing.assert_close(flat(model.parameters()) - before, expected, rtol=1e-5, atol=1e-7)


def test_a_differential_equation_is_solved():
    """u'' = -sin x on [0, pi], u = 0 at the ends: u = sin x."""
    model = net(width=12, inputs=1)
    x = torch.linspace(0, math.pi, 20, dtype=torch.float64)[:, None].requires_grad_()
    ends = torch.tensor([[0.0], [math.pi]], dtype=torch.float64)
    optimizer = ResidualNewton(model, reduction="mean")
    for _ in range(40):
        optimizer.step(lambda: {"inside": poisson(model, x), "ends": model(ends)}, {"ends": 10.0})
    error = (model(x) - torch.sin(x)).norm() / torch.sin(x).norm()
    assert error < 1e-4


# --- damping -------------------------------------------------------------------------------------------------------


def bent(theta):
    """A residual whose linear model is wrong far away: from -3 the undamped step leads to about -80."""
    return lambda: torch.atan(theta)


def test_a_step_that_raises_the_loss_is_taken_back_and_damped():
    theta = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = ResidualNewton([theta], damping=1e-9, acceleration=False, max_trials=1)
    optimizer.step(bent(theta))
    found = optimizer.metrics()
    assert theta.item() == 3.0 and found["rejected"] == 1 and found["length"] == 0
    assert found["ratio"] < 0 and found["damping"] == pytest.approx(4e-9) and found["actual"] > 0
    optimizer = ResidualNewton([theta], damping=1e-9, acceleration=False, max_trials=30)
    optimizer.step(bent(theta))
    found = optimizer.metrics()
    assert abs(theta.item()) < 3 and found["actual"] < 0 and found["length"] == 1
    # the damping of the step that was taken is 4^k times the first, with k rejections
    assert found["trial_damping"] == pytest.approx(1e-9 * 4.0 ** found["rejected"]) and found["rejected"] > 5


def test_the_ratio_is_actual_over_predicted():
    theta, damping = nn.Parameter(torch.tensor([1.0], dtype=torch.float64)), 0.3
    optimizer = ResidualNewton([theta], damping=damping, acceleration=False)
    optimizer.step(bent(theta))
    r, J = math.atan(1.0), 0.5
    d = -J * r / (J * J + damping)
    assert theta.item() == pytest.approx(1 + d)
    predicted, actual = 0.5 * (r + J * d) ** 2 - 0.5 * r * r, 0.5 * math.atan(1 + d) ** 2 - 0.5 * r * r
    found = optimizer.metrics()
    assert found["predicted"] == pytest.approx(predicted) and found["actual"] == pytest.approx(actual)
    assert found["ratio"] == pytest.approx(actual / predicted) and found["damping"] == pytest.approx(damping / 10)


def test_the_factor_of_the_damping():
    assert [damping_factor(ratio) for ratio in (1.0, 0.26, 0.25, 1e-9, 0.0, -2.0, -math.inf, math.nan)] == [
        *(0.1, 0.1, 1.0, 1.0, 4.0, 4.0, 4.0, 4.0)
    ]


def test_the_acceleration_is_half_the_second_derivative_along_the_step():
    """r = (θ² - 2): along d its second derivative is 2 d²."""
    theta, damping = nn.Parameter(torch.tensor([1.0], dtype=torch.float64)), 0.5
    ResidualNewton([theta], damping=damping).step(lambda: theta**2 - 2)
    r, J = -1.0, 2.0
    d = -J * r / (J * J + damping)
    c = -J * (0.5 * 2 * d * d) / (J * J + damping)
    assert theta.item() == pytest.approx(1 + d + c, abs=1e-12)


def test_a_line_search_takes_the_best_of_its_lengths():
    theta = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = ResidualNewton([theta], damping=0.0, line_search=6, **FIXED)
    optimizer.step(bent(theta))
    d = -10 * math.atan(3.0)
    losses = {2.0**-k: math.atan(3 + d * 2.0**-k) ** 2 for k in range(7)}
    best = min(losses, key=losses.get)
    assert optimizer.metrics()["length"] == best < 1 and theta.item() == pytest.approx(3 + best * d)


def test_the_first_damping_fits_the_jacobian_and_lm_leaves_rounding_alone():
    A = randn(6, 3, seed=1) * 100
    theta = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = ResidualNewton([theta])
    assert optimizer.param_groups[0]["damping"] is None
    optimizer.step(lambda: A @ theta - 1)
    assert optimizer.metrics()["trial_damping"] == pytest.approx(1e-3 * float(A.square().sum(0).max()))
    for _ in range(60):
        optimizer.step(lambda: A @ theta - 1)
    damping = optimizer.metrics()["damping"]
    assert 1e-16 * float(A.square().sum()) < damping < 1e-3 * float(A.square().sum())
    torch.testing.assert_close(theta.detach(), torch.linalg.lstsq(A, torch.ones(6, 1).double()).solution[:, 0])


# --- precision -----------------------------------------------------------------------------------------------------


def vandermonde(dtype):
    t = torch.linspace(0, 1, 30, dtype=torch.float64)
    return torch.stack([t**k for k in range(9)], 1).to(dtype), torch.cos(3 * t).to(dtype)


def test_float32_parameters_with_a_solve_in_float64():
    """J^T J of the monomials has a condition number of 1e11, far beyond 1 / eps of float32."""
    A, y = vandermonde(torch.float32)
    losses = {}
    for dtype in (None, torch.float64):
        theta = nn.Parameter(torch.zeros(9))
        optimizer = ResidualNewton([theta], damping=1e-8, dtype=dtype, solver="parameters", **FIXED)
        optimizer.step(lambda theta=theta: A @ theta - y)
        assert theta.dtype == torch.float32
        A64 = A.double()
        exact = torch.linalg.solve(A64.mT @ A64 + 1e-8 * torch.eye(9).double(), A64.mT @ y.double())
        losses[dtype] = (theta.detach().double() - exact).norm() / exact.norm()
    # rounded to float32 the solution keeps 24 bits, and float32 parameters hold no more
    assert losses[torch.float64] < 1e-5 < losses[None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parameters_keep_their_type(dtype):
    model, (x, y) = net(dtype=dtype), data(30)
    x, y = x.to(dtype), y.to(dtype)
    optimizer = ResidualNewton(model)
    losses = [float(optimizer.step(lambda: model(x) - y)) for _ in range(8)]
    assert losses[-1] < losses[0] and all(p.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("m", [4, 12])
def test_cholesky_singular_values_and_the_dense_system_agree(m, scale):
    J, r = randn(m, 7, seed=1), randn(m, seed=2)
    s = randn(7, seed=3).abs() + 0.1 if scale else None
    for damping in (1e-3, 1.0):
        system = DampedLeastSquares(J, r, s, torch.float64)
        d, _ = system.step(damping)
        S = torch.diag(torch.ones(7).double() if s is None else s)
        torch.testing.assert_close(d, -torch.linalg.solve(J.mT @ J + damping * S, J.mT @ r), rtol=1e-8, atol=1e-9)
        system.rounding = torch.tensor(math.inf)
        torch.testing.assert_close(system.step(damping)[0], d, rtol=1e-8, atol=1e-9)


def test_autocast_does_not_reach_the_solve():
    J, r = randn(4, 7, seed=1, dtype=torch.float32), randn(4, seed=2, dtype=torch.float32)
    plain = DampedLeastSquares(J, r, None, torch.float32)
    expected, moved = plain.step(0.1)[0], plain.times(plain.gradient)
    with torch.autocast("cpu", torch.bfloat16):
        system = DampedLeastSquares(J, r, None, torch.float32)
        assert torch.equal(system.step(0.1)[0], expected) and torch.equal(system.times(system.gradient), moved)


class Unbatched(torch.autograd.Function):
    """A square that vmap refuses."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if bool((grad != 0).any()):
            return 2 * x * grad
        return torch.zeros_like(x)


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_rows_are_made_one_by_one_where_vmap_cannot(chunk):
    theta = nn.Parameter(randn(5, seed=1))
    J = jacobian(Unbatched.apply(theta), [theta], chunk)
    torch.testing.assert_close(J, torch.diag(2 * theta.detach()))


def test_sparse_gradients_of_an_embedding_count():
    """torch makes them for one row at a time only."""
    table, index = nn.Embedding(4, 2, sparse=True).double(), torch.tensor([1, 3, 1])
    J = jacobian(table(index).flatten(), [table.weight])
    expected = torch.zeros(3, 2, 4, 2, dtype=torch.float64)
    for k, row in enumerate(index):
        expected[k, :, row] = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(J, expected.reshape(6, 8))


# --- groups, frozen parameters, states -----------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [None, "cg"])
@pytest.mark.parametrize("m", [6, 60])
def test_groups_have_their_own_damping_and_rate(m, solver):
    model, (x, y) = net(), data(m)
    J, r = dense(model, lambda: model(x) - y)
    groups = [{"params": model[0].parameters(), "damping": 0.5, "lr": 0.5}, {"params": model[2].parameters()}]
    before = flat(model.parameters())
    optimizer = ResidualNewton(groups, damping=0.1, solver=solver, cg_tol=1e-13, cg_maxiter=500, **FIXED)
    optimizer.step(lambda: model(x) - y)
    lam = torch.tensor([0.5] * 15 + [0.1] * 6, dtype=torch.float64)
    lr = torch.tensor([0.5] * 15 + [1.0] * 6, dtype=torch.float64)
    expected = -lr * torch.linalg.solve(J.mT @ J + torch.diag(lam), J.mT @ r)
    torch.testing.assert_close(flat(model.parameters()) - before, expected, rtol=1e-8, atol=1e-10)


def test_the_damping_of_groups_changes_by_one_factor():
    model, (x, y) = net(), data(9)
    groups = [{"params": model[0].parameters(), "damping": 0.5}, {"params": model[2].parameters()}]
    optimizer = ResidualNewton(groups, damping=0.1)
    for _ in range(5):
        optimizer.step(lambda: model(x) - y)
    one, other = (group["damping"] for group in optimizer.param_groups)
    assert one != 0.5 and one / other == pytest.approx(5)


def test_a_group_that_comes_later_has_the_damping_of_the_others():
    model, (x, y) = net(), data(9)
    optimizer = ResidualNewton(model[0].parameters())
    optimizer.step(lambda: model(x) - y)
    now = optimizer.metrics()["damping"]
    optimizer.add_param_group({"params": model[2].parameters()})
    optimizer.step(lambda: model(x) - y)
    assert optimizer.metrics()["trial_damping"] >= now > 0
    assert len({group["damping"] for group in optimizer.param_groups}) == 1


def test_a_first_step_without_slope_leaves_the_damping_open():
    theta = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = ResidualNewton([theta])
    optimizer.step(lambda: theta * 0 + 1)
    assert optimizer.param_groups[0]["damping"] is None and theta.tolist() == [1.0, 1.0]
    optimizer.step(lambda: theta * 2)
    assert optimizer.metrics()["trial_damping"] == pytest.approx(4e-3) and optimizer.metrics()["actual"] < 0


def test_frozen_parameters_stay_and_take_part_when_they_are_free():
    model, (x, y) = net(), data(9)
    model[0].weight.requires_grad_(False)
    optimizer = ResidualNewton(model)
    before = model[0].weight.clone()
    optimizer.step(lambda: model(x) - y)
    assert torch.equal(model[0].weight, before)
    model[0].weight.requires_grad_(True)
    optimizer.step(lambda: model(x) - y)
    assert not torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        ResidualNewton(model.requires_grad_(False)).step(lambda: model(x) - y)


def test_a_saved_run_goes_on_bit_for_bit():
    def start():
        model = net()
        return model, ResidualNewton(model, line_search=1)

    x, y = data(15)

    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.step(lambda: model(x) - y)

    model, optimizer = start()
    train(model, optimizer, 3)
    other, again = start()
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert str(again.state_dict()) == str(optimizer.state_dict())
    pair = copy.deepcopy((model, optimizer))
    for one in ((model, optimizer), (other, again), pair):
        train(*one, 5)
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))
    assert torch.equal(flat(model.parameters()), flat(pair[0].parameters()))
    assert optimizer.metrics() == again.metrics() == pair[1].metrics()


def test_a_scheduler_of_torch_moves_the_rate():
    model, (x, y) = net(), data(9)
    optimizer = ResidualNewton(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step(lambda: model(x) - y)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.step(lambda: model(x) - y)


# --- numbers that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, FIXED, {"solver": "cg"}])
def test_residuals_that_are_not_finite_move_nothing(value, options):
    model, (x, y) = net(), data(9)
    optimizer = ResidualNewton(model, damping=0.1, **options)
    before, bad = flat(model.parameters()), y.clone()
    bad[3] = value
    with pytest.warns(UserWarning, match="the residuals are not finite: the step was skipped"):
        loss = optimizer.step(lambda: model(x) - bad)
    assert not torch.isfinite(loss) and torch.equal(flat(model.parameters()), before)
    assert optimizer.metrics()["skipped"] == 1 and optimizer.metrics()["damping"] == 0.1
    optimizer.step(lambda: model(x) - y)
    assert optimizer.metrics()["skipped"] == 1 and not torch.equal(flat(model.parameters()), before)


def test_derivatives_that_are_not_finite_move_nothing():
    theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = ResidualNewton([theta])
    with pytest.warns(UserWarning, match="derivatives of the residuals are not finite"):
        optimizer.step(lambda: theta.abs().sqrt() - 1)
    assert theta.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("options", [{}, {"acceleration": False}, {"line_search": 3}])
def test_a_step_into_nan_is_taken_back(options):
    """sqrt(θ) + 0.01 from θ = 1 has its undamped step at -1.02, where the root is NaN."""
    theta = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = ResidualNewton([theta], damping=1e-12, max_trials=30, **options)
    losses = [float(optimizer.step(lambda: theta.sqrt() + 0.01)) for _ in range(5)]
    assert 0 < theta.item() < 1 and losses == sorted(losses, reverse=True)


def test_a_step_beyond_the_largest_number_is_not_made():
    theta = nn.Parameter(torch.tensor([1.0]))
    optimizer = ResidualNewton([theta], damping=0.0, dtype=torch.float64, **FIXED)
    optimizer.step(lambda: 1e-30 * theta + 1e10)  # the step is -1e40
    assert theta.item() == 1.0 and optimizer.metrics()["rejected"] == 1


def test_an_error_of_the_callable_leaves_parameters_as_they_were():
    model, (x, y) = net(), data(9)
    optimizer, before, calls = ResidualNewton(model), flat(model.parameters()), []

    def residuals():
        calls.append(0)
        if len(calls) == 4:
            raise KeyError("mine")
        return model(x) - y

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(residuals)
    assert len(calls) == 4 and torch.equal(flat(model.parameters()), before)


def test_at_a_solution_nothing_moves_and_the_damping_stays_finite():
    theta = nn.Parameter(torch.tensor([2.0, 3.0], dtype=torch.float64))
    optimizer = ResidualNewton([theta])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(50):
            optimizer.step(lambda: theta - torch.tensor([2.0, 3.0]))
    assert theta.tolist() == [2.0, 3.0] and math.isfinite(optimizer.metrics()["damping"])


# --- what is refused -----------------------------------------------------------------------------------------------


def test_residuals_that_change_between_calls_are_refused():
    model, (x, y) = net(), data(9)
    with pytest.raises(ValueError, match="two evaluations of the residuals"):
        ResidualNewton(model).step(lambda: model(torch.randn_like(x)) - y)
    ResidualNewton(model, damping=1.0, **FIXED).step(lambda: model(torch.randn_like(x)) - y)


@pytest.mark.parametrize(
    ("residuals", "weights", "error", "message"),
    [
        (lambda r: None, None, TypeError, "returned a NoneType"),
        (lambda r: [], None, ValueError, "not one residual"),
        (lambda r: r[:0], None, ValueError, "not one residual"),
        (lambda r: r.detach(), None, ValueError, "create_graph=True"),
        (lambda r: [r, r.detach()], None, ValueError, r"residuals\[1\]: no gradient leads"),
        (lambda r: {"a": r, "b": r.argmax()}, None, TypeError, "is a tensor of torch.int64"),
        (lambda r: [r, 1.0], None, TypeError, "is a float"),
        (lambda r: r, [1.0], TypeError, "weights is a list"),
        (lambda r: [r, r], [1.0], ValueError, "a list of 2"),
        (lambda r: {"a": r}, {"b": 1.0}, ValueError, "the keys 'a'"),
        (lambda r: r, -1.0, ValueError, "a finite number >= 0"),
        (lambda r: r, math.nan, ValueError, "a finite number >= 0"),
        (lambda r: r, -torch.ones(1), ValueError, "negative or not finite"),
        (lambda r: r, torch.ones(4), ValueError, "does not broadcast"),
        (lambda r: r, torch.ones(2, 9, 1), ValueError, "does not broadcast"),
    ],
)
def test_what_step_cannot_take_is_refused(residuals, weights, error, message):
    model, (x, y) = net(), data(9)
    with pytest.raises(error, match=message):
        ResidualNewton(model).step(lambda: residuals(model(x) - y), weights)


def test_a_loss_in_the_place_of_residuals_is_refused():
    model, (x, y) = net(), data(9)
    with pytest.raises(TypeError, match="pass a callable"):
        ResidualNewton(model).step((model(x) - y).square().mean())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr=-1.0"),
        ({"damping": math.inf}, ValueError, "damping=inf"),
        ({"reduction": "none"}, ValueError, "allowed are 'sum', 'mean'"),
        ({"damping_rule": "LM"}, ValueError, "allowed are 'lm', 'fixed'"),
        ({"dtype": torch.float16}, ValueError, "allowed are None, torch.float32"),
        ({"solver": "qr"}, ValueError, "allowed are None, 'rows'"),
        ({"line_search": -1}, ValueError, "line_search=-1"),
        ({"max_trials": 0}, ValueError, "max_trials=0"),
        ({"chunk": 0}, ValueError, "chunk=0"),
        ({"cg_tol": 1.0}, ValueError, "cg_tol=1.0"),
        ({"acceleration": 1}, TypeError, "acceleration=1"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        ResidualNewton(nn.Linear(2, 1), **options)


def test_bad_groups_are_refused():
    one, other = (nn.Parameter(torch.ones(1)) for _ in range(2))
    with pytest.raises(ValueError, match="did you mean 'damping'"):
        ResidualNewton([{"params": [one], "dampign": 0.1}])
    with pytest.raises(ValueError, match="belongs to the optimizer as a whole"):
        ResidualNewton([{"params": [one], "solver": "cg"}])
    with pytest.raises(TypeError, match="complex64"):
        ResidualNewton([nn.Parameter(torch.ones(1, dtype=torch.complex64))])
    optimizer = ResidualNewton([{"params": [one], "damping": 0.0}, {"params": [other], "damping": 1.0}])
    with pytest.raises(ValueError, match="all zero or all positive"):
        optimizer.step(lambda: one + other)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"lr=-1\.0"):
        optimizer.step(lambda: one + other)


# --- what other optimizers say of such losses -----------------------------------------------------------------------


def u_and_slope(model, x):
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return u, slope


MSE = nn.MSELoss()
LOSSES = {
    "equation": lambda u, slope, x: (slope - torch.cos(x)).square().mean(),
    "equation by the module": lambda u, slope, x: MSE(slope, torch.cos(x)),
    "sobolev": lambda u, slope, x: F.mse_loss(u, torch.sin(x)) + F.mse_loss(slope, torch.cos(x)),
    "sobolev by the module": lambda u, slope, x: MSE(u, torch.sin(x)) + MSE(slope, torch.cos(x)),
    "gradient penalty": lambda u, slope, x: MSE(u, torch.sin(x)) + (slope.norm(dim=1) - 1).square().mean(),
}


@pytest.mark.parametrize("loss_fn", ["mse", MSE, None])
@pytest.mark.parametrize("name", LOSSES)
def test_layer_wise_curvature_names_the_way_that_works(name, loss_fn):
    """Without it the curvature of the other part was used in silence, or parameters were said to be used elsewhere."""
    model, x = net(inputs=1), torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None].requires_grad_()
    optimizer = SecondOrderOptimizer(model, loss_fn=loss_fn)
    u, slope = u_and_slope(model, x)
    if loss_fn is None:
        optimizer.observe(u, torch.sin(x.detach()), MSE)

    def step():
        LOSSES[name](u, slope, x.detach()).backward()
        optimizer.step()

    if (loss_fn is None and not name.startswith("equation")) or (loss_fn is MSE and name == "gradient penalty"):
        step()  # the user has said which term has a curvature
        assert optimizer.metrics()["measurements"] > 0
        return
    with pytest.raises(RuntimeError, match=r"torchcurv.ResidualNewton\(model\).step\(residuals\)"):
        step()


@pytest.mark.parametrize("loss_fn", ["mse", MSE])
def test_under_unsupported_gradient_such_losses_follow_their_gradient(loss_fn):
    model, x = net(inputs=1), torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None].requires_grad_()
    optimizer = SecondOrderOptimizer(model, loss_fn=loss_fn, unsupported="gradient", lr=0.01, momentum=0.0)
    before = flat(model.parameters())
    u, slope = u_and_slope(model, x)
    LOSSES["sobolev by the module"](u, slope, x.detach()).backward()
    gradient = flat(p.grad for p in model.parameters())
    optimizer.step()
    moved = flat(model.parameters()) - before
    torch.testing.assert_close(moved / moved.norm(), -gradient / gradient.norm())


def test_other_derivatives_are_not_taken_for_parts_of_the_loss():
    """Those of another forward pass, those without create_graph, and a backward() that is differentiated itself."""
    model, x = net(inputs=1), torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None].requires_grad_()
    optimizer = SecondOrderOptimizer(model, loss_fn="mse")
    for t in range(3):
        optimizer.zero_grad()
        u_and_slope(model, x)
        u = model(x)
        torch.autograd.grad(u.sum(), x, retain_graph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, that create_graph makes a cycle
            F.mse_loss(u, torch.sin(x.detach())).backward(create_graph=t == 1)
        optimizer.step()
    assert optimizer.metrics()["measurements"] > 0
