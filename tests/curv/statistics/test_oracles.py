"""The oracles agree among themselves, with torch, and with the theory."""

import itertools

import cases
import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import (
    BATCH_STATISTICS_LAYERS,
    LAYERS,
    LAYERS_SAME_EVEN,
    LOSSES,
    MODELS,
    NEW_LAYERS,
    ids,
    model_case,
    net_around,
    net_for,
    randn,
    target_for,
)
from hypothesis import HealthCheck, given, settings
from torch import nn

EXACT = 1e-10
N = 3


def close(x, truth):
    assert x.shape == truth.shape
    assert (x - truth).abs().max() <= EXACT * max(1.0, float(truth.abs().max()))


def named(model):
    return list(model.named_parameters())


def loss_setup(case, n=N):
    model = net_for(case)
    x = randn(n, 4, seed=1)
    return model, x, target_for(case, model(x))


# --- losses -------------------------------------------------------------------------------------------------

over_losses = pytest.mark.parametrize("case", LOSSES, ids=ids(LOSSES))


@over_losses
def test_terms_add_up_to_the_gradient_of_torch(case):
    model, x, y = loss_setup(case)
    loss = oracles.as_cross_entropy(case.loss)
    output = model(x).detach().requires_grad_()
    terms = oracles.loss_terms(case.loss, output, y)
    (truth,) = torch.autograd.grad(loss(output, y), output)
    close(terms.R * terms.w_out * terms.dc, truth)


@over_losses
def test_terms_add_up_to_the_hessian_of_torch(case):
    """R w_t times the Hessian of c, written out: diag(p) - p p^T, I, sigma (1 - sigma)."""
    model, x, y = loss_setup(case)
    output = model(x).detach()
    terms = oracles.loss_terms(case.loss, output, y)
    f = oracles.to_terms(case.loss, output, output)
    if oracles.is_cross_entropy(case.loss):
        p = f.softmax(-1)
        H = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    elif isinstance(case.loss, nn.MSELoss):
        H = torch.ones_like(f)[..., None]
    else:
        H = (f.sigmoid() * (1 - f.sigmoid()))[..., None]
    H = torch.block_diag(*(terms.R * terms.w[..., None, None] * H).flatten(0, 1))
    index = torch.arange(output.numel()).reshape(output.shape)
    order = oracles.to_terms(case.loss, index, output).flatten()
    close(H, oracles.output_hessian(case.loss, output, y)[order][:, order])


@over_losses
def test_terms_add_up_to_the_loss_of_torch(case):
    model, x, y = loss_setup(case)
    output = model(x).detach()
    terms = oracles.loss_terms(case.loss, output, y)
    close(terms.R * (terms.w * terms.c).sum(), case.loss(output, y))


@over_losses
def test_fisher_is_ggn(case):
    model, x, y = loss_setup(case)
    params = named(model)
    close(oracles.fisher(model, case.loss, x, y, params), oracles.ggn(model, case.loss, x, y, params))


@over_losses
def test_rows_of_ggn(case):
    model, x, y = loss_setup(case)
    V = oracles.ggn_rows(model, case.loss, x, y, named(model))
    assert V.shape[:2] == (model(x)[0].numel(), N)
    close(torch.einsum("vnp,vnq->pq", V, V), oracles.ggn(model, case.loss, x, y, named(model)))


@over_losses
def test_layer_arrays_for_every_loss(case):
    model, x, y = loss_setup(case)
    params = named(model)
    for name in ("0", "2"):
        check_layer(model, case.loss, x, y, name, params)


UNWEIGHTED = [case for case in LOSSES if getattr(case.loss, "weight", None) is None and "weight" not in case.id]


@pytest.mark.parametrize("case", UNWEIGHTED, ids=ids(UNWEIGHTED))
def test_empirical_fisher_rows_add_up_to_the_gradient(case):
    """Without weights the signal is the gradient over sqrt(R)."""
    model, x, y = loss_setup(case)
    terms = oracles.loss_terms(case.loss, model(x), y)
    V = oracles.empirical_fisher_rows(model, case.loss, x, y, named(model))
    close(terms.R.sqrt() * V.sum((0, 1)), oracles.gradient(model, case.loss, x, y, named(model)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_fisher_by_a_loop_over_samples(reduction):
    """Weights [w_y] are multiplicities: sum_n R w_n g_n g_n^T, g_n the gradient of -log p_y."""
    weight = cases.CLASS_WEIGHTS
    model, x = model_case("mlp").make_model(), randn(5, 4, seed=1)
    y = torch.tensor([0, 1, 2, 1, 0])
    params = named(model)
    R = 1 / weight[y].sum() if reduction == "mean" else 1.0
    truth = 0
    for k in range(5):
        grads = torch.autograd.grad(F.cross_entropy(model(x[k : k + 1]), y[k : k + 1]), model.parameters())
        g = torch.cat([grad.flatten() for grad in grads])
        truth = truth + R * weight[y[k]] * torch.outer(g, g)
    close(oracles.empirical_fisher(model, nn.CrossEntropyLoss(weight, reduction=reduction), x, y, params), truth)


def test_empirical_fisher_of_mse_counts_elements():
    """With the mean, C/2 times the mean of outer products of torch's per-sample losses."""
    model, x, y = model_case("mlp").make_model(), randn(5, 4, seed=1), randn(5, 3, seed=2)
    theirs = 0
    for k in range(5):
        grads = torch.autograd.grad(F.mse_loss(model(x[k]), y[k]), model.parameters())
        g = torch.cat([grad.flatten() for grad in grads])
        theirs = theirs + torch.outer(g, g) / 5
    close(oracles.empirical_fisher(model, nn.MSELoss(), x, y, named(model)), 3 / 2 * theirs)


def test_empirical_fisher_of_a_drawn_label_is_the_fisher_on_average():
    """Labels enumerated over both terms of one sample: the mean, weighted by p, is the exact Fisher."""
    model, x = model_case("deep_linear_seq").make_model(), randn(1, 2, 4, seed=1)
    loss, params = nn.CrossEntropyLoss(), named(model)
    p = model(x).softmax(1).detach()[0]
    total = 0
    for j in range(3):
        for k in range(3):
            total = total + p[j, 0] * p[k, 1] * oracles.empirical_fisher(model, loss, x, torch.tensor([[j, k]]), params)
    close(total, oracles.fisher(model, loss, x, torch.tensor([[0, 0]]), params))


def test_nll_of_log_softmax_is_cross_entropy():
    body, x, y = model_case("mlp").make_model(), randn(N, 4, seed=1), torch.tensor([0, 2, 1])
    model = nn.Sequential(*body, nn.LogSoftmax(1))
    for matrix in (oracles.ggn, oracles.fisher, oracles.empirical_fisher, oracles.hessian):
        truth = matrix(body, nn.CrossEntropyLoss(), x, y, named(body))
        close(matrix(model, nn.NLLLoss(), x, y, named(model)), truth)


def test_hessian_is_ggn_for_a_linear_model():
    model, x, y = model_case("softmax_regression").make_model(), randn(N, 4, seed=1), torch.tensor([0, 2, 1])
    params, loss = named(model), nn.CrossEntropyLoss()
    close(oracles.hessian(model, loss, x, y, params), oracles.ggn(model, loss, x, y, params))


@pytest.mark.parametrize("case", MODELS, ids=ids(MODELS))
def test_hessian_is_the_derivative_of_the_gradient(case):
    model, x = case.make_model(), randn(N, *case.input_shape, seed=1)
    y = randn(N, *case.output_shape, seed=2)
    params, loss, h = named(model), nn.MSELoss(), 1e-5
    v = randn(sum(p.numel() for _, p in params), seed=3)
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    Hv, sides = oracles.hessian(model, loss, x, y, params) @ v, []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(theta + sign * h * v, model.parameters())
        sides.append(oracles.gradient(model, loss, x, y, params))
    assert oracles.relative_error((sides[0] - sides[1]) / (2 * h), Hv) < 1e-6


# --- layers -------------------------------------------------------------------------------------------------


def check_layer(model, loss, x, y, name, params=None):
    """block, diag and unit of both kinds against the dense matrices."""
    module = model.get_submodule(name)
    params = params or oracles.layer_params(model, name)
    names = [f"{name}.{own}" for own, _ in module.named_parameters()]
    for kind, matrix in (("ggn", oracles.ggn), ("empirical_fisher", oracles.empirical_fisher)):
        truth = oracles.sub_block(matrix(model, loss, x, y, params), params, names)
        a, s = oracles.layer_arrays(model, loss, x, y, name, kind)
        block = oracles.block_from_arrays(a, s, module)
        close(block, truth)
        close(oracles.diag_from_arrays(a, s, module), truth.diagonal())
        close(oracles.unit_from_arrays(a, s, module), truth * same_unit(module))
        close(oracles.ekfac_from_arrays(a, s, module=module).trace(), truth.trace())


def same_unit(module):
    """1 where two parameters in parameter order belong to one output unit."""
    unit = torch.zeros(module.weight.shape, dtype=torch.long)
    for index in itertools.product(*(range(size) for size in unit.shape)):
        if isinstance(module, oracles.TRANSPOSED):
            group = index[0] // (module.in_channels // module.groups)
            unit[index] = group * unit.shape[1] + index[1]
        elif isinstance(module, oracles.NORMS):
            unit[index] = sum(index[j] * module.weight.stride(j) for j in range(len(index)))
        else:
            unit[index] = index[1] if isinstance(module, nn.Embedding | nn.EmbeddingBag) else index[0]
    unit = unit.flatten()
    if getattr(module, "bias", None) is not None:
        unit = torch.cat([unit, torch.arange(module.bias.numel())])
    return (unit[:, None] == unit[None, :]).double()


TARGETS = {
    "ce": (nn.CrossEntropyLoss(), torch.tensor([0, 2, 1])),
    "mse": (nn.MSELoss(), randn(N, 3, seed=2)),
}


def check_net_around(case, loss, before):
    x = case.input_for(N)
    model = net_around(case.make_layer(), case.input_shape, before=before, x=x)
    criterion, y = TARGETS[loss]
    check_layer(model, criterion, x, y, "layer")


ALL_LAYERS = LAYERS + NEW_LAYERS
PLAIN_LAYERS = [case for case in ALL_LAYERS if case.make_input is None]


@pytest.mark.parametrize("loss", TARGETS)
@pytest.mark.parametrize("case", ALL_LAYERS, ids=ids(ALL_LAYERS))
def test_layer_arrays(case, loss):
    check_net_around(case, loss, before=False)


@pytest.mark.parametrize("loss", TARGETS)
@pytest.mark.parametrize("case", PLAIN_LAYERS, ids=ids(PLAIN_LAYERS))
def test_layer_arrays_after_another_layer(case, loss):
    check_net_around(case, loss, before=True)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("case", LAYERS_SAME_EVEN, ids=ids(LAYERS_SAME_EVEN))
def test_layer_arrays_same_even(case):
    check_net_around(case, "ce", before=False)


GRADIENT_LAYERS = ALL_LAYERS + BATCH_STATISTICS_LAYERS


@pytest.mark.parametrize("case", GRADIENT_LAYERS, ids=ids(GRADIENT_LAYERS))
def test_signals_times_inputs_are_the_gradient(case):
    x, (criterion, y) = case.input_for(N), TARGETS["ce"]
    model, outputs = net_around(case.make_layer(), case.input_shape, x=x), []
    model.layer.register_forward_hook(lambda module, inputs, z: outputs.append(z))
    loss = criterion(model(*x) if isinstance(x, tuple) else model(x), y)
    dz, *truth = torch.autograd.grad(loss, [outputs[0], *model.layer.parameters()])
    a, s = oracles.layer_inputs(model.layer, x, N), oracles.layer_signals(model.layer, dz, N)
    got = oracles.to_param_order(torch.einsum("nrgo,nrgi->goi", s, a).flatten(), model.layer)
    close(got, torch.cat([g.flatten() for g in truth]))


# The output at padding is the padding row, which is no part of a.
AFFINE_LAYERS = [case for case in GRADIENT_LAYERS if case.id != "embedding_padding_not_zero"]


@pytest.mark.parametrize("case", AFFINE_LAYERS, ids=ids(AFFINE_LAYERS))
def test_inputs_times_weight_are_the_output(case):
    check_inputs(case.make_layer(), case.input_for(N), N)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases.conv_settings(padding_modes=("zeros", "circular", "reflect", "replicate")))
def test_inputs_times_weight_are_the_output_of_any_convolution(setting):
    check_inputs(setting.make_layer(), setting.make_input(), setting.batch)


def check_inputs(layer, x, n):
    a = oracles.layer_inputs(layer, x, n)
    z = (layer(*x) if isinstance(x, tuple) else layer(x)).detach()
    W = oracles.to_goi(layer, layer.weight, getattr(layer, "bias", None)).detach()
    z = oracles.layer_signals(layer, z, n)
    if isinstance(layer, nn.PReLU):
        z = z - oracles.layer_signals(layer, x.clamp(min=0), n)  # what does not go through the weight
    close(torch.einsum("goi,nrgi->nrgo", W, a), z)


@pytest.mark.parametrize("case", MODELS, ids=ids(MODELS))
def test_layer_arrays_in_models(case):
    model, x = case.make_model(), randn(N, *case.input_shape, seed=1)
    y = cases.labels(model(x), torch.Generator().manual_seed(0))
    assert model(x).shape == (N, *case.output_shape)
    for name, module in model.named_modules():
        if hasattr(module, "weight"):
            params = [(f"{name}.{own}" if name else own, p) for own, p in module.named_parameters()]
            truth = oracles.ggn(model, nn.CrossEntropyLoss(), x, y, params)
            a, s = oracles.layer_arrays(model, nn.CrossEntropyLoss(), x, y, name)
            close(oracles.block_from_arrays(a, s, module), truth)


def test_tied_and_frozen_layers():
    """A layer called twice adds positions; a frozen layer before does not matter."""
    case = model_case("shared_layer")
    model, x = case.make_model(), randn(N, 3, seed=1)
    model.requires_grad_(False)
    a, s = oracles.layer_arrays(model, *TARGETS["ce"][:1], x, TARGETS["ce"][1], "1.body.0")
    assert a.shape == (N, 2, 1, 5) and s.shape == (3, N, 2, 1, 4)
    truth = oracles.ggn(model, *TARGETS["ce"][:1], x, TARGETS["ce"][1], oracles.layer_params(model, "1.body.0"))
    close(oracles.block_from_arrays(a, s, model[1].body[0]), truth)


# --- K-FAC --------------------------------------------------------------------------------------------------


def kfac_error(model, loss, x, y, name, sharing, weights=None, approx=oracles.kfac_from_arrays):
    module = model.get_submodule(name)
    a, s = oracles.layer_arrays(model, loss, x, y, name)
    truth = oracles.block_from_arrays(a, s, module)
    return oracles.relative_error(approx(a, s, sharing, weights, module=module), truth)


def errors(id, sharing, names, n=4, loss=None, weights=None):
    case = model_case(id)
    model, x = case.make_model(), randn(n, *case.input_shape, seed=1)
    if loss is None:
        loss, y = nn.MSELoss(), randn(n, *case.output_shape, seed=2)
    else:
        y = cases.labels(model(x), torch.Generator().manual_seed(0))
    return {name: kfac_error(model, loss, x, y, name, sharing, weights) for name in names}


CE = nn.CrossEntropyLoss()

KFAC_EXACT = {
    "deep linear, MSE": ("deep_linear", "expand", "012", 4, None),
    "deep linear by position, MSE": ("deep_linear_seq", "expand", "012", 4, None),
    "position-wise linear and mean pooling": ("pooled_linear", "reduce", "01", 4, None),
    "convolution before global pooling": ("conv_before_pool", "reduce", "0", 4, None),
    "one datum": ("mlp", "expand", "024", 1, CE),
    "one datum, reduce": ("mlp", "reduce", "024", 1, CE),
    "one datum, mean pooling": ("pooled_linear", "reduce", "01", 1, CE),
    "deep linear, MSE, whole": ("deep_linear", "whole", "012", 4, None),
    "deep linear by position, MSE, whole": ("deep_linear_seq", "whole", "012", 4, None),
    "position-wise linear and mean pooling, whole": ("pooled_linear", "whole", "01", 4, None),
    "convolution before global pooling, whole": ("conv_before_pool", "whole", "0", 4, None),
    "one datum, whole": ("mlp", "whole", "024", 1, CE),
    "one datum, mean pooling, whole": ("pooled_linear", "whole", "01", 1, CE),
}

KFAC_NOT_EXACT = {
    "one datum with positions": ("per_position", "expand", "02", 1, CE),
    "one datum with positions, reduce": ("per_position", "reduce", "02", 1, CE),
    "one datum, convolutions": ("cnn", "expand", "03", 1, CE),
    "two linear convolutions": ("linear_convs", "expand", "01", 4, None),
    "two linear convolutions, reduce": ("linear_convs", "reduce", "01", 4, None),
    "mean pooling, expand": ("pooled_linear", "expand", "01", 4, None),
    "mean pooling, cross entropy": ("pooled_linear", "reduce", "01", 4, CE),
    "weighted pooling": ("weighted_pool", "reduce", "01", 4, None),
    "softmax regression": ("softmax_regression", "expand", ("",), 20, CE),
    "mlp": ("mlp", "expand", "02", 4, CE),
    "mlp, whole": ("mlp", "whole", "02", 4, CE),
}


@pytest.mark.parametrize("key", KFAC_EXACT)
def test_kfac_exact(key):
    id, sharing, names, n, loss = KFAC_EXACT[key]
    for name, error in errors(id, sharing, names, n, loss).items():
        assert error < EXACT, (name, error)


@pytest.mark.parametrize("key", KFAC_NOT_EXACT)
def test_kfac_not_exact(key):
    id, sharing, names, n, loss = KFAC_NOT_EXACT[key]
    for name, error in errors(id, sharing, names, n, loss).items():
        assert error > 1e-3, (name, error)


def test_kfac_with_term_weights():
    """At uniform predictions H is the same for all terms: exact with the weights in A, not without them."""
    model, loss = (
        model_case("per_position").make_model(),
        nn.CrossEntropyLoss(cases.CLASS_WEIGHTS, ignore_index=1),
    )
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    x, y = randn(4, 4, 4, seed=1), torch.arange(16).reshape(4, 4) % 3
    w = oracles.loss_terms(loss, model(x), y).w
    assert kfac_error(model, loss, x, y, "2", "expand", w) < EXACT
    assert kfac_error(model, loss, x, y, "2", "expand") > 1e-3


@pytest.mark.parametrize("id", ["cnn_groups", "cnn", "mlp"])
def test_kfac_keeps_the_factors_marginals(id):
    """Partial traces of B (x) A are tr(A) B and tr(B) A, group by group, and zero between groups."""
    case = model_case(id)
    model, x = case.make_model(), randn(N, *case.input_shape, seed=1)
    a, s = oracles.layer_arrays(model, CE, x, TARGETS["ce"][1], "0")
    A, B = oracles.kron_factors(a, s)
    (g, i, _), (_, o, _) = A.shape, B.shape
    kfac = oracles.kfac_from_arrays(a, s).reshape(g, o, i, g, o, i)
    for k in range(g):
        close(torch.einsum("oipi->op", kfac[k, :, :, k]), A[k].trace() * B[k])
        close(torch.einsum("oioj->ij", kfac[k, :, :, k]), B[k].trace() * A[k])
        for j in set(range(g)) - {k}:
            assert not kfac[k, :, :, j].any()


@pytest.mark.parametrize("id", ["mlp", "cnn", "per_position", "cnn_groups"])
def test_ekfac_is_nearer_than_kfac(id):
    """Same trace as the block within groups, and the best matrix with these eigenvectors."""
    case = model_case(id)
    model, x = case.make_model(), randn(N, *case.input_shape, seed=1)
    y = cases.labels(model(x), torch.Generator().manual_seed(0))
    kfac = kfac_error(model, CE, x, y, "0", "expand")
    ekfac = kfac_error(model, CE, x, y, "0", "expand", approx=oracles.ekfac_from_arrays)
    assert 1e-3 < ekfac < kfac


def test_ekfac_is_exact_where_kfac_is():
    for name in ("0", "1", "2"):
        case = model_case("deep_linear")
        model, x, y = case.make_model(), randn(4, 4, seed=1), randn(4, 3, seed=2)
        assert kfac_error(model, nn.MSELoss(), x, y, name, "expand", approx=oracles.ekfac_from_arrays) < EXACT


def test_solve_dense():
    C = randn(5, 3)
    C, v = C @ C.T, randn(5, 2, seed=1)
    close(C @ oracles.solve_dense(C, v, 0.1) + 0.1 * oracles.solve_dense(C, v, 0.1), v)


def test_cases_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    model_case("mlp").make_model(), net_for(LOSSES[0])
    for case in ALL_LAYERS:
        case.make_layer(), case.input_for(2)
    assert torch.equal(before, torch.get_rng_state())
