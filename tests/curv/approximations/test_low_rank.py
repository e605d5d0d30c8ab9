"""Low rank: eigenpairs, derivatives along them and damped steps, against a dense V."""

import cases
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import close
from torch import nn

from torchcurv import SecondOrderOptimizer, curvature, directions
from torchcurv.curv.approximations import rows as rows_module
from torchcurv.curv.approximations.factors import LowRankEigen
from torchcurv.curv.approximations.low_rank import largest_pairs
from torchcurv.curv.approximations.rows import JacobianRows
from torchcurv.curv.statistics.block import Stats
from torchcurv.optim import DirectionalNewton
from torchcurv.optim.directional import above, constant, from_noise, top_k

LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "mse": nn.MSELoss(),
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), label_smoothing=0.1),
}
MODELS = ["mlp", "cnn"]


def problem(id, n=4, loss="mean"):
    case = cases.model_case(id)
    model, x = case.make_model(), cases.randn(n, *case.input_shape, seed=3)
    y = cases.randn(n, cases.CLASSES, seed=4) if loss == "mse" else torch.arange(n) % cases.CLASSES
    return model, LOSSES[loss], x, y


def named(model):
    return list(model.named_parameters())


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def shares(model, loss, x, y):
    """The part of every sample in the gradient [N, P]."""
    f, sum_of = model(x), []
    whole = loss(f, y)
    at_output = torch.autograd.grad(whole, f, retain_graph=True)[0]
    for n in range(len(x)):
        own = torch.zeros_like(at_output)
        own[n] = at_output[n]
        sum_of.append(flat(torch.autograd.grad(f, list(model.parameters()), own, retain_graph=True)))
    return torch.stack(sum_of)


class Dense:
    """Everything from V [n, C, P] spelt out."""

    def __init__(self, model, loss, x, y, curvature_samples=None, gradient_samples=None, where=slice(None)):
        n = len(x)
        V = oracles.ggn_rows(model, loss, x, y, named(model)).transpose(0, 1)
        V, G = V[..., where], shares(model, loss, x, y)[:, where]
        m = n if curvature_samples is None else curvature_samples
        self.rows = V[:m] * (n / m) ** 0.5
        self.values, self.vectors = torch.linalg.eigh(torch.einsum("ncp,ncq->pq", self.rows, self.rows))
        known = self.values > 1e-9 * self.values.max()
        self.values, self.vectors = self.values[known], self.vectors[:, known]
        self.lambdas = m * (self.rows @ self.vectors).square().sum(1)
        self.gammas = n * (G[: gradient_samples or n] @ self.vectors)

    def step(self, chosen, delta):
        along = -self.gammas.mean(0)[chosen] / (self.lambdas.mean(0)[chosen] + delta)
        return self.vectors[:, chosen] @ along


def aligned(found, truth):
    """Signs [K] of eigenvectors given as columns."""
    overlap = (found * truth).sum(0)
    close(overlap.abs(), torch.ones_like(overlap), 1e-7)
    return overlap.sign()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("id", MODELS)
@pytest.mark.parametrize("n", [1, 5])
def test_directions_equal_a_dense_computation(id, n, loss):
    model, loss_fn, x, y = problem(id, n, loss)
    dense = Dense(model, loss_fn, x, y)
    (found,) = directions(model, loss_fn, [(x, y)], cutoff=1e-9).values()
    close(found.spectrum, dense.values, 1e-8)
    close(found.evals, dense.values, 1e-8)
    vectors = torch.cat([v.flatten(1) for v in found.vectors()], 1).mT
    distinct = [k for k in range(len(dense.values)) if _isolated(dense.values, k)]
    assert distinct
    sign = aligned(vectors[:, distinct], dense.vectors[:, distinct])
    close(found.gammas[:, distinct], dense.gammas[:, distinct] * sign, 1e-8)
    close(found.lambdas[:, distinct], dense.lambdas[:, distinct], 1e-8)
    close(found.lambdas.mean(0), found.evals, 1e-8)
    assert [v.shape[1:] for v in found.vectors()] == [p.shape for p in model.parameters()]


def _isolated(values, k):
    gaps = (values - values[k]).abs()
    gaps[k] = values[-1]
    return gaps.min() > 1e-4 * values[-1] and values[k] > 1e-4 * values[-1]


@settings(max_examples=15, deadline=None)
@given(
    id=st.sampled_from(MODELS),
    loss=st.sampled_from(list(LOSSES)),
    n=st.sampled_from([1, 2, 7, 64]),
    k=st.integers(1, 6),
    delta=st.floats(1e-3, 1.0),
    subsampled=st.booleans(),
)
def test_a_step_equals_a_dense_computation(id, loss, n, k, delta, subsampled):
    model, loss_fn, x, y = problem(id, n, loss)
    own = {"curvature_samples": max(1, n // 2), "gradient_samples": max(1, n - 1)} if subsampled else {}
    dense = Dense(model, loss_fn, x, y, **own)
    optimizer = DirectionalNewton(
        model, loss_fn=loss_fn, criterion=top_k(k), damping=constant(delta), lr=0.5, cutoff=1e-9, **own
    )
    before = flat(model.parameters())
    loss_fn(model(x), y).backward()
    optimizer.step()
    k = min(k, len(dense.values))
    if k < len(dense.values) and dense.values[-k] - dense.values[-k - 1] < 1e-6 * dense.values[-1]:
        return  # which of two equal ones is chosen is not defined
    chosen = torch.arange(len(dense.values) - k, len(dense.values))
    close(flat(model.parameters()) - before, 0.5 * dense.step(chosen, delta), 1e-8)


@pytest.mark.parametrize("partition", ["group", "layer", "parameter"])
@pytest.mark.parametrize("id", MODELS)
def test_partitions(id, partition):
    model, loss_fn, x, y = problem(id)
    params = list(model.parameters())
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = DirectionalNewton(
        model, groups, loss_fn=loss_fn, criterion=above(1e-6), damping=constant(0.1), partition=partition
    )
    ends = torch.tensor([p.numel() for p in params]).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    spans = {
        "group": [slice(0, ends[1]), slice(ends[1], ends[-1])],
        "layer": [slice(starts[k], ends[k + 1]) for k in range(0, len(params), 2)],
        "parameter": [slice(*pair) for pair in zip(starts, ends, strict=True)],
    }[partition]
    expected = []
    for span in spans:
        dense = Dense(model, loss_fn, x, y, where=span)
        expected.append(dense.step(dense.values > 1e-6, 0.1))
    before = flat(model.parameters())
    loss_fn(model(x), y).backward()
    optimizer.step()
    close(flat(model.parameters()) - before, torch.cat(expected), 1e-8)
    assert ":gradient" not in optimizer.summary()


def test_the_damping_sees_the_spectrum_and_its_noise():
    model, loss_fn, x, y = problem("mlp", 6)
    dense, seen = Dense(model, loss_fn, x, y), {}

    def damping(evals, gram_evecs, gammas, lambdas):
        seen.update(evals=evals, gram_evecs=gram_evecs, gammas=gammas, lambdas=lambdas)
        return from_noise(0.01)(evals, gram_evecs, gammas, lambdas)

    optimizer = DirectionalNewton(model, loss_fn=loss_fn, criterion=top_k(3), damping=damping)
    before = flat(model.parameters())
    loss_fn(model(x), y).backward()
    optimizer.step()
    assert [t.shape for t in seen.values()] == [(3,), (18, 3), (6, 3), (6, 3)]
    close(seen["gram_evecs"].mT @ seen["gram_evecs"], torch.eye(3, dtype=torch.float64), 1e-8)
    chosen = torch.arange(len(dense.values) - 3, len(dense.values))
    gammas, lambdas = dense.gammas[:, chosen], dense.lambdas[:, chosen]
    error = [t.std(0) / 6**0.5 for t in (gammas, lambdas)]
    delta = 0.01 + error[1] + lambdas.mean(0) * (error[0] / gammas.mean(0)) ** 2
    close(flat(model.parameters()) - before, dense.step(chosen, delta), 1e-8)


def test_drawn_signals_tend_to_the_exact_spectrum():
    model, loss_fn, x, y = problem("mlp")
    (exact,) = directions(model, loss_fn, [(x, y)]).values()
    (drawn,) = directions(model, loss_fn, [(x, y)], samples=400).values()
    assert (drawn.spectrum[-3:] - exact.spectrum[-3:]).norm() < 0.15 * exact.spectrum[-3:].norm()


def test_several_backward_passes_make_one_batch():
    steps = []
    for parts in (1, 2):
        model, loss_fn, x, y = problem("mlp", 6, "sum")
        optimizer = DirectionalNewton(model, loss_fn=loss_fn, criterion=top_k(4), damping=constant(0.1))
        before = flat(model.parameters())
        for xs, ys in zip(x.split(6 // parts), y.split(6 // parts), strict=True):
            loss_fn(model(xs), ys).backward()
        optimizer.step()
        steps.append(flat(model.parameters()) - before)
    close(steps[0], steps[1], 1e-9)


def test_signals_in_chunks_are_of_the_same_samples(monkeypatch):
    from torchcurv.curv.capture import signal_pass as passes

    model, loss_fn, x, y = problem("cnn", 5)
    (whole,) = directions(model, loss_fn, [(x, y)], cutoff=1e-9).values()
    monkeypatch.setattr(passes, "SIGNAL_ELEMENTS", 1)
    (chunked,) = directions(model, loss_fn, [(x, y)], cutoff=1e-9).values()
    close(chunked.lambdas, whole.lambdas, 1e-8)
    close(chunked.gammas.abs(), whole.gammas.abs(), 1e-7)


# ------------------------------------------------------------------------------- the running version


@pytest.mark.parametrize("id", [*MODELS, "shared_layer"])
def test_all_pairs_are_the_whole_matrix(id):
    model, loss_fn, x, y = problem(id)
    size = sum(p.numel() for p in model.parameters())
    full = curvature(model, loss_fn, [(x, y)], approx="full")
    low = curvature(model, loss_fn, [(x, y)], approx="lowrank", rank=size)
    dense, v = full.to_dense(), cases.randn(size, 2)
    close(low.to_dense(), dense, 1e-9)
    close(low.solve(v, 0.1), full.solve(v, 0.1), 1e-9)
    for name in ("diag", "trace", "eigvalsh"):
        close(getattr(low, name)(), getattr(full, name)(), 1e-9)
    close(low.logdet(0.1), full.logdet(0.1), 1e-9)


def test_fewer_pairs_are_the_best_of_their_rank():
    model, loss_fn, x, y = problem("mlp", 6)
    dense = curvature(model, loss_fn, [(x, y)], approx="full").to_dense()
    values, vectors = torch.linalg.eigh(dense)
    low = curvature(model, loss_fn, [(x, y)], approx="lowrank", rank=4)
    close(low.to_dense(), vectors[:, -4:] @ values[-4:].diag() @ vectors[:, -4:].mT, 1e-9)
    draws = torch.stack([flat(low.sample(0.5, torch.Generator().manual_seed(k))) for k in range(20000)])
    expected = torch.linalg.inv(low.to_dense() + 0.5 * torch.eye(len(dense), dtype=torch.float64))
    assert (draws.mT @ draws / len(draws) - expected).norm() < 0.1 * expected.norm()


def test_more_rows_than_the_limit_are_compressed_on_the_way():
    model, loss_fn, x, y = problem("mlp", 8)
    size = sum(p.numel() for p in model.parameters())
    data = [(xs, ys) for xs, ys in zip(x.split(2), y.split(2), strict=True)]
    dense = curvature(model, loss_fn, [(x, y)], approx="full").to_dense()
    close(curvature(model, loss_fn, data, approx="lowrank", rank=size, rows_limit=7).to_dense(), dense, 1e-9)


def test_the_running_average_is_the_best_of_the_weighted_sum():
    model, loss_fn, x, y = problem("mlp", 6)
    optimizer = SecondOrderOptimizer(
        model,
        loss_fn=loss_fn,
        approx="lowrank",
        update_every=1,
        rank=100,
        samples=None,
        ema_decay=0.5,
        damping=0.3,
        lr=0.0,
        momentum=0.0,
    )
    matrices = []
    for xs, ys in zip(x.split(2), y.split(2), strict=True):
        optimizer.zero_grad()
        loss_fn(model(xs), ys).backward()
        optimizer.step()
        matrices.append(oracles.ggn(model, loss_fn, xs, ys, named(model)))
    expected = (0.25 * matrices[0] + 0.5 * matrices[1] + matrices[2]) / 1.75
    (block,) = optimizer.engine.blocks
    v = [cases.randn(*p.shape, seed=k) for k, p in enumerate(model.parameters())]
    close(flat(block.matvec(v)), expected @ flat(v), 1e-9)
    close(
        flat(block.solve(v, 0.3)),
        torch.linalg.solve(expected + 0.3 * torch.eye(len(expected), dtype=torch.float64), flat(v)),
        1e-9,
    )


@pytest.mark.parametrize("approx", ["lowrank"])
def test_a_measurement_that_is_not_finite_is_left_out(approx):
    model, loss_fn, x, y = problem("mlp")
    optimizer = SecondOrderOptimizer(
        model, loss_fn=loss_fn, approx=approx, rank=5, lr=0.0, momentum=0.0, update_every=1, refactor_every=1
    )
    loss_fn(model(x), y).backward()
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.engine.blocks[0].tensors.items()}
    optimizer.zero_grad()
    loss_fn(model(x * torch.nan), y).backward()
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    for key, value in optimizer.engine.blocks[0].tensors.items():
        assert torch.equal(value, before[key])


def test_resume_is_the_uninterrupted_run():
    def run(stop):
        model, loss_fn, x, y = problem("mlp", 6)
        options = {"loss_fn": loss_fn, "approx": "lowrank", "rank": 5, "lr": 0.1, "update_every": 2}
        optimizer = SecondOrderOptimizer(model, **options)
        for step in range(6):
            if step == stop:
                saved = optimizer.state_dict()
                optimizer = SecondOrderOptimizer(model, **options)
                optimizer.load_state_dict(saved)
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
        return flat(model.parameters())

    assert torch.equal(run(None), run(3))


# ------------------------------------------------------------------------------------- the Hessian


def best_of_rank(matrix, rank):
    values, vectors = torch.linalg.eigh(matrix)
    largest = values.abs().argsort(descending=True)[:rank]
    return values[largest], vectors[:, largest] @ values[largest].diag() @ vectors[:, largest].mT


@pytest.mark.parametrize("partition", ["all", "layer"])
@pytest.mark.parametrize("id", MODELS)
def test_pairs_of_the_hessian_by_lanczos(id, partition):
    model, loss_fn, x, y = problem(id, 6)
    dense = oracles.hessian(model, loss_fn, x, y, named(model))
    found = curvature(model, loss_fn, [(x, y)], curv_type="hessian", approx="lowrank", rank=4, partition=partition)
    start = 0
    for block in found.blocks.values():
        span = slice(start, start + block.size)
        start += block.size
        values, _ = best_of_rank(dense[span, span], 4)
        close(block.factor.values.sort().values, values.sort().values, 1e-5)
        assert len(block.params) == len(named(model)) if partition == "all" else 2
    assert start == len(dense)
    whole = curvature(model, loss_fn, [(x, y)], curv_type="hessian", approx="lowrank", rank=len(dense))
    close(whole.to_dense(), dense, 1e-9)
    halves = [(x[:3], y[:3]), (x[3:], y[3:])]
    whole = curvature(model, loss_fn, halves, curv_type="hessian", approx="lowrank", rank=len(dense))
    close(whole.to_dense(), dense, 1e-9)


@pytest.mark.parametrize("indefinite", ["abs", "clip", "shift"])
def test_a_step_with_the_pairs_of_the_hessian(indefinite):
    model, loss_fn, x, y = problem("mlp", 6)
    dense = oracles.hessian(model, loss_fn, x, y, named(model))
    _, low = best_of_rank(dense, 7)
    values, vectors = torch.linalg.eigh(low)
    assert values.min() < -1e-3
    map_negative_eigenvalues = {"abs": values.abs(), "clip": values.clamp(min=0), "shift": values - values.min()}[
        indefinite
    ]
    optimizer = SecondOrderOptimizer(
        model, loss_fn=loss_fn, curv_type="hessian", approx="lowrank", rank=7, indefinite=indefinite, lr=1.0,
        momentum=0.0, damping=0.2, kl_clip=None,
    )  # fmt: skip
    before = flat(model.parameters())
    loss_fn(model(x), y).backward()
    gradient = flat(p.grad for p in model.parameters())
    optimizer.step()
    expected = vectors @ ((vectors.mT @ gradient) / (map_negative_eigenvalues + 0.2))
    close(before - flat(model.parameters()), expected, 5e-3)  # Lanczos stops at residuals of 1e-3


def test_a_hessian_that_is_not_finite_is_left_out():
    model, loss_fn, x, y = problem("mlp")
    optimizer = SecondOrderOptimizer(model, loss_fn=loss_fn, curv_type="hessian", approx="lowrank", rank=3)
    loss_fn(model(x * torch.nan), y).backward()
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 8), first=st.integers(1, 6), second=st.integers(1, 6), rank=st.integers(1, 9))
def test_pairs_of_an_indefinite_sum(size, first, second, rank):
    """Parts that share directions, with negative eigenvalues."""
    parts, total = [], torch.zeros(size, size, dtype=torch.float64)
    for seed, (count, weight) in enumerate(((first, 0.3), (second, 2.0))):
        count = min(count, size)
        vectors = torch.linalg.qr(cases.randn(size, count, seed=seed))[0].mT
        values = cases.randn(count, seed=10 + seed)
        parts.append((weight, LowRankEigen(values, vectors)))
        total += weight * vectors.mT @ values.diag() @ vectors
    found, ok = largest_pairs(parts, rank)
    values, vectors = torch.linalg.eigh(total)
    largest = values.abs().argsort(descending=True)[:rank]
    expected = vectors[:, largest] @ values[largest].diag() @ vectors[:, largest].mT
    assert ok and len(found.values) == rank
    magnitudes = values.abs().sort(descending=True).values
    if rank >= size or magnitudes[rank - 1] - magnitudes[rank] > 1e-3:
        close(found.vectors.mT @ found.values.diag() @ found.vectors, expected, 1e-8)


@pytest.mark.parametrize("options", [{"approx": "lowrank"}, {"approx": "full", "rows_limit": 1}])
def test_a_batch_that_is_overwritten_before_the_step_is_found_out(options):
    model, loss_fn, x, y = problem("mlp")
    optimizer = SecondOrderOptimizer(model, loss_fn=loss_fn, **options)
    loss_fn(model(x), y).backward()
    x.copy_(cases.randn(*x.shape))
    with pytest.raises(RuntimeError, match="were edited in place between backward"):
        optimizer.step()


@pytest.mark.parametrize("value", [torch.nan, 1e30])
def test_directional_newton_takes_no_step_on_a_batch_that_is_not_finite(value):
    model, loss_fn, x, y = problem("mlp")
    model, x = model.float(), x.float()
    optimizer = DirectionalNewton(model, loss_fn=loss_fn, criterion=top_k(2), damping=constant(0.1))
    before = flat(model.parameters())
    x[0] = value
    loss_fn(model(x), y).backward()
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert torch.equal(flat(model.parameters()), before) and optimizer.metrics()["skipped_measurements"] == 1


def test_a_batch_that_overflows_is_left_out_when_rows_are_compressed():
    model, loss_fn, x, y = problem("mlp", 6)
    model, x = model.float(), x.float()
    optimizer = SecondOrderOptimizer(
        model,
        loss_fn=loss_fn,
        approx="lowrank",
        rank=3,
        rows_limit=3,
        lr=0.0,
        momentum=0.0,
        update_every=1,
        refactor_every=1,
    )
    loss_fn(model(x), y).backward()
    optimizer.step()
    before = optimizer.engine.blocks[0].tensors["values"].clone()
    optimizer.zero_grad()
    loss_fn(model(x * 1e30), y).backward()
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert torch.equal(optimizer.engine.blocks[0].tensors["values"], before)


def test_the_gram_matrix_stays_near_the_limit_of_its_rows(monkeypatch):
    sizes, own = [], JacobianRows.gram
    monkeypatch.setattr(JacobianRows, "gram", lambda self, *other: (sizes.append(len(g := own(self, *other))), g)[1])
    model = cases.seeded(lambda: nn.Linear(4, 30))
    data = [(cases.randn(16, 4), torch.arange(16))]
    curvature(model, nn.CrossEntropyLoss(), data, approx="lowrank", rank=5, rows_limit=32)
    assert max(sizes) <= 2 * 32


@pytest.mark.parametrize("id", ["cnn", "cnn_groups", "shared_layer"])
def test_rows_over_some_of_the_outputs_at_a_time(id, monkeypatch):
    model, loss_fn, x, y = problem(id)
    widths, own = [], Stats.layer_rows
    monkeypatch.setattr(Stats, "layer_rows", lambda *args: (widths.append((r := own(*args)).shape[1]), r)[1])
    (whole,) = directions(model, loss_fn, [(x, y)]).values()
    once = len(widths)
    widths.clear()
    monkeypatch.setattr(rows_module, "ROW_ELEMENTS", 1)
    (parts,) = directions(model, loss_fn, [(x, y)]).values()
    close(parts.spectrum, whole.spectrum, 1e-9)
    assert len(widths) > once


def test_a_block_over_groups_that_differ_asks_for_a_partition():
    model, loss_fn, x, y = problem("mlp")
    params = list(model.parameters())
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = SecondOrderOptimizer(model, groups, loss_fn=loss_fn, approx="lowrank", rank=3, damping=0.1)
    optimizer.param_groups[1]["damping"] = 100.0
    loss_fn(model(x), y).backward()
    with pytest.raises(ValueError, match=r'groups with damping=0\.1 and damping=100\.0.*partition="group"'):
        optimizer.step()


# --------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, match",
    [
        ({"criterion": 3}, "criterion=3; pass a function"),
        ({"damping": 0.1}, "damping=0.1; pass a function"),
        ({"curv_type": "hessian"}, "reads rows"),
        ({"partition": "rows"}, "partition='rows' is unknown"),
        ({"cutoff": 2.0}, "cutoff=2.0"),
        ({"curvature_samples": 0}, "curvature_samples=0"),
    ],
)
def test_errors_of_directional_newton(options, match):
    model, loss_fn, _, _ = problem("mlp")
    arguments = {"criterion": top_k(1), "damping": constant(0.1), **options}
    with pytest.raises((TypeError, ValueError), match=match):
        DirectionalNewton(model, loss_fn=loss_fn, **arguments)


def test_errors_of_options():
    model, loss_fn, x, y = problem("mlp")
    with pytest.raises(ValueError, match="partition='all' with approx='kfac'; it is for \"full\""):
        SecondOrderOptimizer(model, loss_fn=loss_fn, approx="kfac", partition="all")
    with pytest.raises(ValueError, match="rank=0; pass an int of at least 1"):
        curvature(model, loss_fn, [(x, y)], approx="lowrank", rank=0)
    for options in ({"curvature_samples": 0}, {"gradient_samples": -1}, {"cutoff": 3.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            directions(model, loss_fn, [(x, y)], **options)
    with pytest.raises(ValueError, match="directions are known of"):
        directions(model, loss_fn, [(x, y)], curv_type="hessian")
