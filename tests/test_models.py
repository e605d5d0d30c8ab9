"""Curvature and training of complete models, against the dense matrix of the loss as the module returns it."""

import copy
from functools import cache
from typing import Any

import cases
import models
import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from torchcurv import SecondOrderOptimizer, curvature
from torchcurv.optim.control.quadratic_model import Evaluation

KINDS = ["ggn", "empirical_fisher"]
ATTENTION = [case for case in models.MODELS if case.id in ("vit", "encoder")]  # with nn.MultiheadAttention
BATCH_NORM = [case for case in models.MODELS if nn.BatchNorm2d in case.norms]
over_models = pytest.mark.parametrize("case", models.MODELS, ids=cases.ids(models.MODELS))
over_attention = pytest.mark.parametrize("case", ATTENTION, ids=cases.ids(ATTENTION))
over_batch_norm = pytest.mark.parametrize("case", BATCH_NORM, ids=cases.ids(BATCH_NORM))
over_kinds = pytest.mark.parametrize("kind", KINDS)


def close(x: Tensor, truth: Tensor, tol: float = 1e-9) -> None:
    assert x.shape == truth.shape
    assert (x - truth).abs().max() <= tol * truth.abs().max()


# --- the truth ----------------------------------------------------------------------------------------------


def jacobian(case: models.Case, model: nn.Module) -> tuple[Tensor, Tensor]:
    """df/dtheta [n, e, p], one backward pass per output element, and the output."""
    params = list(model.parameters())
    output = models.output_of(case, model, case.make_inputs())
    rows = []
    for entry in output.flatten():
        grads = torch.autograd.grad(entry, params, retain_graph=True, materialize_grads=True)
        rows.append(parameters_to_vector(grads))
    return torch.stack(rows).reshape(len(output), -1, len(rows[0])), output.detach()


def dense(case: models.Case, model: nn.Module, kind: str) -> Tensor:
    """J^T H_L J, or the sum over samples of v v^T with v = sum_t sqrt(R w_t) J_t^T dc_t, [p, q]."""
    J, output = jacobian(case, model)
    y = case.make_target()
    if kind == "ggn":
        J = J.flatten(0, 1)
        return J.T @ oracles.output_hessian(case.loss, output, y) @ J
    u = oracles.output_gradients(case.loss, output, y).reshape(len(output), -1)
    V = torch.einsum("ne,nep->np", u, J)
    return V.T @ V


@cache
def truth_of(case: models.Case, kind: str) -> Tensor:
    return dense(case, case.make_model(), kind)


@over_models
def test_the_jacobian_is_that_of_finite_differences(case):
    model = case.make_model()
    J, _ = jacobian(case, model)
    theta = parameters_to_vector(model.parameters()).detach()
    moved = copy.deepcopy(model)
    vector_to_parameters(cases.randn(len(theta), seed=7), moved.parameters())
    for module in moved.modules():  # the row of the padding gets no gradient, though the output depends on it
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight.data[module.padding_idx] = 0
    direction = parameters_to_vector(moved.parameters()).detach()

    def output_at(step: float) -> Tensor:
        vector_to_parameters(theta + step * direction, model.parameters())
        return models.output_of(case, model, case.make_inputs()).detach()

    difference = (output_at(1e-6) - output_at(-1e-6)) / 2e-6
    close((J @ direction).flatten(), difference.flatten(), tol=1e-6)


@over_models
def test_the_samples_of_a_model_do_not_interact(case):
    def sample(x: Any, k: int) -> Any:
        if isinstance(x, dict):
            return {key: v[k : k + 1] for key, v in x.items()}
        return tuple(v[k : k + 1] for v in x) if isinstance(x, tuple) else x[k : k + 1]

    model, x = case.make_model(), case.make_inputs()
    output = models.output_of(case, model, x)
    close(torch.cat([models.output_of(case, model, sample(x, k)) for k in range(len(output))]), output)


# --- curvature ----------------------------------------------------------------------------------------------


def indices_of(c: Any) -> dict[str, Tensor]:
    """Block name -> where its elements lie in the order of parameters_to_vector(c.params)."""
    where, start = {}, 0
    for p in c.params:
        where[p] = torch.arange(start, start + p.numel()).view(p.shape)
        start += p.numel()
    return {
        name: torch.cat([(where[p] if rows is None else where[p][rows]).flatten() for p, rows in block.pieces])
        for name, block in c.blocks.items()
    }


def assert_blocks(c: Any, truth: Tensor) -> None:
    """Every element lies in one block; within blocks c is the truth, outside of them it is zero."""
    indices, got = indices_of(c), c.to_dense()
    assert torch.equal(torch.cat(list(indices.values())).sort().values, torch.arange(len(truth)))
    outside = got.clone()
    for name, index in indices.items():
        grid = torch.meshgrid(index, index, indexing="ij")
        difference, scale = (got[grid] - truth[grid]).abs().max(), truth[grid].abs().max()
        assert difference <= 1e-9 * scale, f"{name}: {difference:.1e} of {scale:.1e}"
        outside[grid] = 0
    assert not outside.any()


def measured(case: models.Case, model: nn.Module, kind: str, approx: str) -> Any:
    data = [(case.make_inputs(), case.make_target())]
    options = {"curv_type": kind, "approx": approx, "output_fn": case.output_fn}
    return curvature(model, case.loss, data, rows_limit=10**6, **options)


@over_kinds
@over_models
def test_every_block_is_that_of_the_loss(case, kind):
    model = case.make_model()
    c = measured(case, model, kind, "block")
    assert len(c.params) == len(list(model.parameters()))
    assert all(p is q for p, q in zip(c.params, model.parameters(), strict=True))
    assert_blocks(c, truth_of(case, kind))


@over_kinds
@over_models
def test_the_diagonal_is_that_of_the_loss(case, kind):
    close(measured(case, case.make_model(), kind, "diag").diag(), truth_of(case, kind).diag())


@over_attention
def test_the_projections_of_attention_are_blocks_of_their_own(case):
    model = case.make_model()
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    assert len(attentions) == 2
    blocks = measured(case, model, "empirical_fisher", "diag").blocks.values()
    for module in attentions:
        width, weight, bias = module.embed_dim, module.in_proj_weight, module.in_proj_bias
        own = [block.pieces for block in blocks if any(p is weight for p, _ in block.pieces)]
        rows = [slice(k * width, (k + 1) * width) for k in range(3)]
        assert [[(id(p), part) for p, part in pieces] for pieces in own] == [
            [(id(weight), part), (id(bias), part)] for part in rows
        ]


def at_batch_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy in eval mode whose running statistics are those of the batch x, layer by layer."""
    model = copy.deepcopy(model).eval()

    def freeze(module: nn.Module, inputs: tuple[Tensor]) -> None:
        module.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        module.running_var.copy_(inputs[0].var((0, 2, 3), correction=0))

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [module.register_forward_pre_hook(freeze) for module in norms]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return model


@over_batch_norm
def test_the_copy_at_batch_statistics_is_the_model_in_train_mode(case):
    model, x = case.make_model().train(), case.make_inputs()
    close(at_batch_statistics(model, x)(x), model(x))


@over_kinds
@over_batch_norm
def test_batch_statistics_count_as_constants(case, kind):
    model = case.make_model().train()
    truth = dense(case, at_batch_statistics(model, case.make_inputs()), kind)
    before = copy.deepcopy(model.state_dict())
    assert_blocks(measured(case, model, kind, "block"), truth)
    close(measured(case, model, kind, "diag").diag(), truth.diag())
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- training -----------------------------------------------------------------------------------------------


def groups_of(case: models.Case, model: nn.Module) -> list[dict[str, Any]]:
    """The norms by unit, everything else by the optimizer's default."""
    norms = {p for module in model.modules() if isinstance(module, case.norms) for p in module.parameters()}
    rest = [p for p in model.parameters() if p not in norms]
    units = [p for p in model.parameters() if p in norms]
    return [{"params": rest}] + ([{"params": units, "approx": "unit"}] if units else [])


def as_dtype(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, dict):
        return {key: as_dtype(v, dtype) for key, v in x.items()}
    if isinstance(x, tuple):
        return tuple(as_dtype(v, dtype) for v in x)
    return x.to(dtype) if x.is_floating_point() else x


@pytest.mark.pairwise
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@over_models
def test_training_lowers_the_loss(case, dtype, training):
    model = case.make_model().to(dtype).train(training)
    x, y = as_dtype(case.make_inputs(), dtype), as_dtype(case.make_target(), dtype)
    optimizer = SecondOrderOptimizer(
        model,
        params=groups_of(case, model),
        loss_fn=case.loss,
        approx="kfac",
        lr=0.05,
        damping=0.1,
        output_fn=case.output_fn,
    )
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = case.loss(models.output_of(case, model, x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(case.loss(models.output_of(case, model, x), y).item())
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in model.parameters())
    summary = optimizer.summary()
    assert all(name in summary for name, _ in model.named_parameters())


@over_models
def test_products_along_directions_are_those_of_the_dense_ggn(case):
    """In forward mode, through every model."""
    model, x, y = case.make_model(), case.make_inputs(), case.make_target()

    def evaluate():
        output = models.output_of(case, model, x)
        return case.loss(output, y), output

    params = list(model.parameters())
    wanted = [{p: cases.randn(*p.shape, seed=7 * k + j) for j, p in enumerate(params)} for k in range(2)]
    for module in model.modules():  # the output depends on the row of the padding, which has no gradient
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            for vector in wanted:
                vector[module.weight][module.padding_idx] = 0
    got = Evaluation(model, evaluate).curvature(wanted, {p: p.detach() for p in params})
    d = torch.stack([parameters_to_vector(vector.values()) for vector in wanted])
    close(got, d @ truth_of(case, "ggn") @ d.T)
