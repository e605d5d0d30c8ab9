"""Products with the curvature over a data set, without the matrix, and what is read from them."""

import copy

import cases
import models
import oracles
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchcurv import CurvatureOperator, curvature
from torchcurv.curv.linalg.stochastic import Estimate

KINDS = ["hessian", "ggn", "fisher", "empirical_fisher"]
LOSS = nn.CrossEntropyLoss()


def close(x, truth, tol=1e-9):
    assert x.shape == truth.shape
    assert (x - truth).abs().max() <= tol * (1e-3 + truth.abs().max())


def problem(id="mlp", n=6):
    case = cases.model_case(id)
    model, x = case.make_model(), cases.randn(n, *case.input_shape, seed=2)
    classes = model(x)[:, 0]
    return model, x, torch.arange(classes.numel()).reshape(classes.shape) % cases.CLASSES


def operator(model, loss, data, curv_type="ggn", **options):
    return curvature(model, loss, data, curv_type=curv_type, approx="operator", **options)


def dense(C):
    return C.matvec(torch.eye(C.size, dtype=C.params[0].dtype))


# --- products -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("id", ["mlp", "mlp_relu_inplace", "cnn", "shared_layer", "residual", "per_position"])
def test_products_are_those_of_the_matrix(id, kind):
    model, x, y = problem(id)
    truth = getattr(oracles, kind)(model, LOSS, x, y, list(model.named_parameters()))
    close(dense(operator(model, LOSS, [(x, y)], kind)), truth)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", cases.LOSSES, ids=cases.ids(cases.LOSSES))
def test_every_loss_in_batches_of_any_size(case, kind):
    """Each batch with its own 1/R: weights, ignored targets, means and sums."""
    model, x = cases.net_for(case), cases.randn(5, 4, seed=3)
    y = cases.target_for(case, model(x))
    expected = getattr(oracles, kind)(model, case.loss, x, y, list(model.named_parameters()))
    weight = getattr(case.loss, "weight", None)
    one_size = weight is not None and weight.dim() > 1 and len(weight) > 1  # of batch, which it has a row for each of
    data = [(x, y)] if one_size else [(x[:2], y[:2]), (x[2:], y[2:])]
    close(dense(operator(model, case.loss, data, kind)), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_without_a_target_counts_for_nothing(kind, reduction):
    model, x, y = problem()
    loss, ignored = nn.CrossEntropyLoss(reduction=reduction), torch.full_like(y, -100)
    expected = getattr(oracles, kind)(model, loss, x, y, list(model.named_parameters()))
    close(dense(operator(model, loss, [(x, y), (x, ignored)], kind)), expected)


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("id", ["vit", "gpt", "unet", "lstm", "encoder"])
def test_complete_models(id, kind):
    case = next(case for case in models.MODELS if case.id == id)
    model, x, y = case.make_model(), case.make_inputs(), case.make_target()
    params = [p for p in model.parameters() if p.numel() < 40][:6]
    C = operator(model, case.loss, [(x, y)], kind, params=params)
    full = curvature(model, case.loss, [(x, y)], curv_type=kind, approx="full", params=params)
    close(dense(C), full.to_dense())


def test_a_vector_comes_back_in_its_structure():
    model, x, y = problem()
    C = operator(model, LOSS, [(x, y)])
    assert isinstance(C, CurvatureOperator) and C.size == sum(p.numel() for p in model.parameters())
    flat = cases.randn(C.size, seed=4)
    parts = [part.reshape(p.shape) for part, p in zip(flat.split([p.numel() for p in C.params]), C.params, strict=True)]
    named = dict(zip([name for name, _ in model.named_parameters()], parts, strict=True))
    expected = dense(C) @ flat
    close(C.matvec(flat), expected)
    close(torch.cat([t.flatten() for t in C.matvec(parts)]), expected)
    got = C.matvec(named)
    assert got.keys() == named.keys()
    close(torch.cat([t.flatten() for t in got.values()]), expected)
    many = cases.randn(C.size, 37, seed=5)  # more columns than go through a graph at once
    close(C.matvec(many), dense(C) @ many)
    with pytest.raises(ValueError, match="a flat vector needs the shape"):
        C.matvec(flat[1:])


def test_some_parameters_and_parameters_that_no_layer_covers():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(cases.randn(4, 3)), nn.Parameter(cases.randn(3))

        def forward(self, x):
            return torch.sin(x @ self.a.exp()) * self.b

    model, x, y = Odd(), cases.randn(6, 4, seed=1), torch.arange(6) % 3
    named = list(model.named_parameters())
    for kind in KINDS:
        truth = getattr(oracles, kind)(model, LOSS, x, y, named)
        close(dense(operator(model, LOSS, [(x, y)], kind)), truth)
        close(dense(operator(model, LOSS, [(x, y)], kind, params=[model.b])), truth[12:, 12:])
    found = curvature(model, LOSS, [(x, y)])  # by elements, from the gradients that arrive
    close(found.blocks["a"].factor.diag().flatten(), oracles.ggn(model, LOSS, x, y, named).diag()[:12])


def test_outputs_that_are_picked_and_flattened():
    """An output [n, t, c] whose rows the loss is applied to still has n samples."""
    model, x, y = problem("per_position")

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).movedim(1, -1)

    expected = oracles.empirical_fisher(model, LOSS, x, y, list(model.named_parameters()))
    got = operator(Tokens(), LOSS, [(x, y.flatten())], "empirical_fisher", output_fn=lambda out: out.flatten(0, 1))
    close(dense(got), expected)
    with pytest.raises(TypeError, match="the model returned a tuple"):
        operator(nn.LSTM(4, 3).double(), LOSS, [(x, y)]).matvec(torch.zeros(108, dtype=torch.float64))


def test_nothing_is_left_behind_and_chance_is_the_same_in_every_product():
    """Dropout, a batch norm that learns its statistics, batches in random order."""
    model = cases.seeded(lambda: nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Tanh(), nn.Linear(6, 3)
    )).train()  # fmt: skip
    x, y = cases.randn(12, 4), torch.arange(12) % 3
    data = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    C = operator(model, LOSS, data)
    first, again = dense(C), dense(C)
    assert torch.equal(first, again) and torch.allclose(first, first.mT, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), random) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not torch.equal(first, dense(operator(model, LOSS, data, seed=1)))


def test_low_precision_parameters_have_float32_products():
    model, x, y = problem()
    model, x = model.bfloat16(), x.bfloat16()
    got = operator(model, LOSS, [(x, y)]).matvec(torch.ones(sum(p.numel() for p in model.parameters())))
    assert got.dtype == torch.float32 and got.isfinite().all()


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({}, "generator", "data is a generator, which can be gone over once"),
        ({"curv_type": "input"}, "list", "curv_type='input' says no product with vectors"),
        ({"samples": 1}, "list", "has no option samples"),
        ({"rows_limit": 3}, "list", "has no option rows_limit"),
        ({"params": [nn.Parameter(torch.zeros(2))]}, "list", "not parameters of the model"),
        ({"params": []}, "list", "no trainable parameters"),
        ({"reduction": "none"}, "list", "says nothing about the weight"),
    ],
)
def test_wrong_arguments_are_refused(options, data, message):
    model, x, y = problem()
    batches = [(x, y)] if data == "list" else ((x, y) for _ in range(1))
    with pytest.raises(ValueError, match=message):
        operator(model, options.pop("loss", "cross_entropy"), batches, **options)


def test_frozen_parameters_and_empty_data_are_refused():
    model, x, y = problem()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.weight are frozen"):
        operator(model, LOSS, [(x, y)], params=model.parameters())
    C = operator(model, LOSS, [])
    assert all(p is not model[0].weight for p in C.params)
    with pytest.raises(ValueError, match="data is empty, or"):
        C.matvec(torch.zeros(C.size, dtype=torch.float64))


# --- what is read from them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_estimates_what_the_matrix_says(kind):
    model, x, y = problem()
    C = operator(model, LOSS, [(x[:4], y[:4]), (x[4:], y[4:])], kind)
    truth = dense(C)
    values = torch.linalg.eigvalsh(truth)
    close(C.eigh(3, tol=1e-9).values, values.flip(0)[:3])
    close(C.eigh(2, "smallest", tol=1e-9).values, values[:2])
    close(C.trace(3 * C.size).value, truth.trace())
    for estimate, exact in [
        (C.trace(method="hutchinson"), truth.trace()),
        (C.diag(), truth.diag()),
        (C.norm(), truth.norm()),
        (C.norm("frobenius", 100), truth.norm()),
    ]:
        assert isinstance(estimate, Estimate) and estimate.value.shape == exact.shape == estimate.standard_error.shape
        assert (estimate.value - exact).norm() <= 4 * estimate.standard_error.norm() + 1e-9
    close(C.norm("spectral").value, values.abs().max(), 1e-6)
    density = C.spectral_density(2, 10)
    assert abs(torch.trapezoid(density.density, density.grid) - 1) < 1e-2
    assert density.nodes.max() <= values.max() + 1e-9
    with pytest.raises(ValueError, match=r"method='hutch'.* allowed are 'hutch\+\+', 'hutchinson'"):
        C.trace(method="hutch")


@pytest.mark.parametrize(("kind", "approx"), [
    ("hessian", "full"), ("hessian", "block"), ("ggn", "kfac"), ("ggn", "ekfac"), ("ggn", "unit"), ("ggn", "diag"),
    ("empirical_fisher", "block"),
])  # fmt: skip
def test_the_set_of_blocks_knows_the_same_of_itself(kind, approx):
    model, x, y = problem()
    C = curvature(model, LOSS, [(x, y)], curv_type=kind, approx=approx)
    values = torch.linalg.eigvalsh(C.to_dense())
    pairs = C.eigh(4, tol=1e-9)
    close(pairs.values, values.flip(0)[:4])
    close(C.matvec(pairs.vectors), pairs.vectors * pairs.values, 1e-6)
    close(C.norm(), C.to_dense().norm())
    close(C.norm("spectral"), values.abs().max())
    got = C.spectral_density(width=0.1, grid=values)
    z = (values[:, None] - values) / 0.1
    close(got.density, (-z.square() / 2).exp().mean(1) / (0.1 * (2 * torch.pi) ** 0.5))
    assert not got.standard_error.any()
    conditions = C.condition_numbers(2.0)
    assert conditions.keys() == C.blocks.keys()
    for name, own in C.eigvalsh_by_block().items():
        close(conditions[name], (own.max() + 2) / (own.min() + 2))
    with pytest.raises(ValueError, match=r"damping=-1\.0"):
        C.condition_numbers(-1.0)
    with pytest.raises(ValueError, match="allowed are 'frobenius', 'spectral'"):
        C.norm("nuclear")


def test_condition_numbers_of_blocks_held_as_rows():
    model, x, y = problem()
    kept, rows = (curvature(model, LOSS, [(x, y)], approx="block", rows_limit=limit) for limit in (2048, 1))
    for name, number in kept.condition_numbers(0.1).items():
        close(rows.condition_numbers(0.1)[name], number)


# --- pictures -----------------------------------------------------------------------------------------------


@pytest.fixture
def axes():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_pictures(axes, tmp_path):
    from torchcurv.plot import plot_layers, plot_spectrum

    model, x, y = problem()
    C = operator(model, LOSS, [(x, y)], "hessian")
    ax = plot_spectrum(C, label="operator", probes=2, steps=8)
    assert plot_spectrum(C.spectral_density(2, 8), ax, label="density") is ax
    by_block = curvature(model, LOSS, [(x, y)], curv_type="hessian", approx="block")
    plot_spectrum(by_block, ax, width=0.01)
    assert len(ax.lines) == 3 and ax.get_yscale() == "log"
    layers = plot_layers(by_block, damping=0.1)
    assert [tick.get_text() for tick in layers.get_xticklabels()] == list(by_block.blocks)
    plot_layers(curvature(model, LOSS, [(x, y)]), damping=0.0)
    for number in axes.get_fignums():
        axes.figure(number).savefig(tmp_path / f"{number}.png")
    with pytest.raises(TypeError, match="has no layers"):
        plot_layers(C)


def test_pictures_without_matplotlib(monkeypatch):
    from torchcurv import plot

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(plot, "import_module", missing)
    model, x, y = problem()
    with pytest.raises(ImportError, match=r"pip install torchcurv\[plot\]"):
        plot.plot_spectrum(operator(model, LOSS, [(x, y)]))
