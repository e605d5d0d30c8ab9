"""The exact Hessian, block by block, against torch.func."""

import warnings

import cases
import models
import oracles
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchcurv import SecondOrderOptimizer, curvature

SMOOTH = ["mlp", "cnn", "deep_linear", "per_position", "shared_layer", "residual", "softmax_regression"]
COMPLETE = ("resnet_bn", "vit", "gpt", "unet", "autoencoder", "lstm", "depthwise_cnn", "encoder")


def close(x, truth, tol=1e-9):
    assert x.shape == truth.shape
    assert (x - truth).abs().max() <= tol * (1e-3 + truth.abs().max())


def places(c, block):
    """Where the entries of a block lie in the flat order of the set."""
    starts, at = {}, 0
    for p in c.params:
        starts[p], at = at, at + p.numel()
    index = [
        torch.arange(p.numel()).reshape(p.shape)[slice(None) if rows is None else rows] for p, rows in block.pieces
    ]
    parts = [starts[p] + own.flatten() for (p, _), own in zip(block.pieces, index, strict=True)]
    return torch.cat(parts)


def held_blocks_equal(c, truth, tol=1e-9):
    dense = c.to_dense()
    covered = torch.zeros_like(dense, dtype=torch.bool)
    for block in c.blocks.values():
        at = places(c, block)
        covered[at[:, None], at] = True
    close(torch.where(covered, dense, 0), torch.where(covered, truth, 0), tol)
    assert not dense[~covered].any()


def problem(id, loss):
    case = cases.model_case(id)
    model, x = case.make_model(), cases.randn(4, *case.input_shape, seed=5)
    if isinstance(loss, nn.CrossEntropyLoss):
        y = torch.arange(4 * model(x)[:, 0].numel() // 4).reshape(model(x)[:, 0].shape) % model(x).shape[1]
    else:
        y = torch.rand(4, *case.output_shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return model, x, y


LOSSES = [nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss(reduction="sum")]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("id", SMOOTH)
def test_exact(id, loss):
    model, x, y = problem(id, loss)
    truth = oracles.hessian(model, loss, x, y, list(model.named_parameters()))
    close(curvature(model, loss, [(x, y)], curv_type="hessian", approx="full").to_dense(), truth)
    block = curvature(model, loss, [(x, y)], curv_type="hessian", approx="block")
    held_blocks_equal(block, truth)
    close(
        curvature(model, loss, [(x, y)], curv_type="hessian", approx="diag", hessian_method="exact").diag(),
        truth.diag(),
    )
    unit = curvature(model, loss, [(x, y)], curv_type="hessian", approx="unit")
    close(unit.diag(), truth.diag())
    inside = unit.to_dense()
    close(inside, torch.where(inside != 0, truth, 0))


@pytest.mark.parametrize("case", cases.LOSSES, ids=cases.ids(cases.LOSSES))
def test_every_loss(case):
    model, x = cases.net_for(case), cases.randn(4, 4, seed=3)
    y = cases.target_for(case, model(x))
    truth = oracles.hessian(model, case.loss, x, y, list(model.named_parameters()))
    close(curvature(model, case.loss, [(x, y)], curv_type="hessian", approx="full").to_dense(), truth)


@pytest.mark.parametrize("id", COMPLETE)
def test_complete_models(id):
    """Attention too, which is differentiated twice in its plain form."""
    case = next(case for case in models.MODELS if case.id == id)
    model, x, y = case.make_model(), case.make_inputs(), case.make_target()
    c = curvature(
        model, case.loss, [(x, y)], curv_type="hessian", approx="diag", hessian_method="exact", params=some(model)
    )
    with sdpa_kernel(SDPBackend.MATH):
        loss = case.loss(model(*x) if isinstance(x, tuple) else model(x), y)
        grads = torch.autograd.grad(loss, c.params, create_graph=True)
    truth = [
        torch.autograd.grad(g, p, retain_graph=True, materialize_grads=True)[0].flatten()[k]
        for p, grad in zip(c.params, grads, strict=True)
        for k, g in enumerate(grad.flatten())
    ]
    close(c.diag(), torch.stack(truth))


def some(model):
    """Parameters enough: every fourth of the model, a bias and the first weights among them."""
    named = list(model.named_parameters())
    layers = {name.rpartition(".")[0] for name, _ in named[::4]}
    return [p for name, p in named if name.rpartition(".")[0] in layers]


def test_batches_add_up_and_a_sum_is_a_sum():
    model, x, y = problem("mlp", nn.MSELoss())
    for loss in (nn.MSELoss(), nn.MSELoss(reduction="sum")):
        whole = curvature(model, loss, [(x, y)], curv_type="hessian", approx="full").to_dense()
        parts = curvature(model, loss, [(x[:1], y[:1]), (x[1:], y[1:])], curv_type="hessian", approx="full").to_dense()
        close(parts, whole)


def test_hutchinson_is_unbiased():
    model, x, y = problem("mlp", nn.CrossEntropyLoss())
    truth = oracles.hessian(model, nn.CrossEntropyLoss(), x, y, list(model.named_parameters())).diag()
    options = {"curv_type": "hessian", "approx": "diag", "hessian_method": "hutchinson"}
    few, many = (curvature(model, nn.CrossEntropyLoss(), [(x, y)], samples=m, **options).diag() for m in (20, 2000))
    assert (many - truth).norm() < 0.25 * (few - truth).norm()
    assert (many - truth).norm() < 0.1 * truth.norm()


@pytest.mark.pairwise
@pytest.mark.parametrize("loss_fn", ["module", "name"])
@pytest.mark.parametrize("indefinite", ["abs", "clip", "shift"])
@pytest.mark.parametrize("approx", ["full", "block", "unit", "diag"])
def test_a_step_takes_the_mapped_spectrum(approx, indefinite, loss_fn):
    loss, lam = nn.CrossEntropyLoss(), 0.05
    model, x, y = problem("mlp", loss)
    method = "exact"
    seen = curvature(model, loss, [(x, y)], curv_type="hessian", approx=approx, hessian_method=method)
    dense = seen.to_dense()
    optimizer = SecondOrderOptimizer(
        model, loss_fn=loss if loss_fn == "module" else "cross_entropy", curv_type="hessian", approx=approx,
        hessian_method=method,
        indefinite=indefinite, damping=lam, lr=1.0, momentum=0.0, kl_clip=None,
    )  # fmt: skip
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    loss(model(x), y).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    step = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = torch.zeros_like(g)
    for at in matrices(seen, approx):
        matrix = dense[at][:, at]
        values, vectors = torch.linalg.eigh(matrix.diagonal().diag() if approx == "diag" else matrix)
        values = {
            "abs": values.abs(), "clip": values.clamp(min=0), "shift": values - values.min().clamp(max=0)
        }[indefinite]  # fmt: skip
        expected[at] = vectors @ ((vectors.T @ g[at]) / (values + lam))
    close(step, expected)


def matrices(c, approx):
    if approx != "unit":
        return [places(c, block) for block in c.blocks.values()]
    found = []
    for block in c.blocks.values():
        at = places(c, block)
        _, o, d = block.layers[0].shape
        weights, biases = at[: o * (d - 1)].reshape(o, -1), at[o * (d - 1) :]
        found += [torch.cat([weights[k], biases[k : k + 1]]) for k in range(o)]
    return found


def test_training_with_the_hessian_lowers_the_loss():
    loss = nn.CrossEntropyLoss()
    for approx in ("full", "block", "unit", "diag"):
        model, x, y = problem("cnn", loss)
        optimizer = SecondOrderOptimizer(model, loss_fn=loss, curv_type="hessian", approx=approx, lr=0.5, damping=0.1)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            optimizer.step()
            losses.append(value.item())
        assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"approx": "ekfac"}, '"ekfac" of the Hessian'),
        ({"approx": "kfac", "hessian_method": "exact"}, "allowed are 'propagate'"),
        ({"approx": "block", "hessian_method": "hutchinson"}, "allowed are 'exact'"),
        ({"approx": "diag", "residual": "drop"}, "residual='drop' is unknown"),
        ({"approx": "block", "rows_limit": 5}, "raise rows_limit"),
        ({"approx": "diag", "indefinite": "keep"}, 'a step needs "abs"'),
        ({"approx": "diag", "indefinite": "flip"}, "indefinite='flip' is unknown"),
        ({"approx": "diag", "hessian_method": "guess"}, "hessian_method='guess' is unknown"),
    ],
)
def test_what_is_not_there_is_refused(options, message):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        SecondOrderOptimizer(nn.Linear(4, 3), curv_type="hessian", **options)
