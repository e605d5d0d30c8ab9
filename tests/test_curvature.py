"""Every layer, loss, kind and approximation against dense truths in float64."""

import cases
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchcurv import curvature

APPROXIMATIONS = ["full", "block", "unit", "kfac", "ekfac", "diag"]
KINDS = ["ggn", "fisher", "empirical_fisher"]
SAME_EVEN = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
N = 4


def ids(rows):
    return [row.id for row in rows]


def close(x, truth, tol=1e-10):
    assert x.shape == truth.shape
    assert (x - truth).abs().max() <= tol * (1e-3 + truth.abs().max())


def problem(case, loss=None, n=N):
    model = cases.net_around(case.make_layer(), case.input_shape, before=True)
    x = cases.randn(n, *case.input_shape, seed=2)
    loss = nn.CrossEntropyLoss() if loss is None else loss
    y = torch.arange(n) % cases.CLASSES
    return model, loss, x, y


def layer_truth(approx, a, s, module, sharing="expand"):
    """The dense block of one layer under an approximation that is known per layer."""
    if approx == "diag":
        return oracles.diag_from_arrays(a, s, module).diag()
    if approx == "kfac":
        return oracles.kfac_from_arrays(a, s, sharing, module=module)
    return {"unit": oracles.unit_from_arrays, "block": oracles.block_from_arrays}[approx](a, s, module)


@SAME_EVEN
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", cases.LAYERS + cases.LAYERS_SAME_EVEN, ids=ids(cases.LAYERS + cases.LAYERS_SAME_EVEN))
def test_every_approximation_of_every_layer_equals_its_dense_truth(case, kind):
    model, loss, x, y = problem(case)
    module = model.get_submodule("layer")
    truth_kind = "empirical_fisher" if kind == "empirical_fisher" else "ggn"
    a, s = oracles.layer_arrays(model, loss, x, y, "layer", kind=truth_kind)
    for approx in ("diag", "unit", "block", "kfac"):
        got = curvature(model, loss, [(x, y)], curv_type=kind, approx=approx, params=module.parameters())
        close(got.to_dense(), layer_truth(approx, a, s, module))
    reduced = curvature(model, loss, [(x, y)], curv_type=kind, sharing="reduce", params=module.parameters())
    close(reduced.to_dense(), layer_truth("kfac", a, s, module, "reduce"))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", cases.LAYERS, ids=ids(cases.LAYERS))
def test_ekfac_has_the_exact_second_moments_in_its_basis(case, sharing):
    model, loss, x, y = problem(case)
    module = model.get_submodule("layer")
    a, s = oracles.layer_arrays(model, loss, x, y, "layer")
    got = curvature(model, loss, [(x, y)], approx="ekfac", sharing=sharing, params=module.parameters())
    left, right = got.blocks["layer"].basis
    truth = oracles.ekfac_from_arrays(a, s, sharing, module=module, bases=(right, left))
    close(got.to_dense(), truth)
    close(got.trace(), oracles.block_from_arrays(a, s, module).trace())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", cases.LOSSES, ids=ids(cases.LOSSES))
def test_full_equals_the_curvature_of_the_loss_itself(case, kind):
    model = cases.net_for(case)
    x = cases.randn(N, 4, seed=3)
    y = cases.target_for(case, model(x))
    named = list(model.named_parameters())
    truth = {"ggn": oracles.ggn, "fisher": oracles.fisher, "empirical_fisher": oracles.empirical_fisher}[kind]
    expected = truth(model, case.loss, x, y, named)
    for rows_limit in (2048, 1):
        got = curvature(model, case.loss, [(x, y)], curv_type=kind, approx="full", rows_limit=rows_limit)
        close(got.to_dense(), expected)
        close(got.diag(), expected.diag())
        close(got.trace(), expected.trace())


@pytest.mark.parametrize("approx", APPROXIMATIONS)
@pytest.mark.parametrize("case", cases.MODELS, ids=ids(cases.MODELS))
def test_models(case, approx):
    model = case.make_model()
    x = cases.randn(N, *case.input_shape, seed=5)
    loss = nn.MSELoss()
    y = cases.randn(N, *case.output_shape, seed=6)
    named = list(model.named_parameters())
    got = curvature(model, loss, [(x, y)], approx=approx)
    ggn = oracles.ggn(model, loss, x, y, named)
    if approx == "full":
        close(got.to_dense(), ggn)
    elif approx == "diag":
        close(got.diag(), ggn.diag())
    elif approx == "block":
        dense = got.to_dense()
        for block in got.blocks.values():
            names = [name for name, p in named if any(p is q for q in block.params)]
            close(oracles.sub_block(dense, named, names), oracles.sub_block(ggn, named, names))
    elif approx in ("unit", "ekfac"):
        close(got.trace(), ggn.trace())


@settings(max_examples=40, deadline=None)
@given(setting=cases.conv_settings(), kind=st.sampled_from(KINDS), sharing=st.sampled_from(["expand", "reduce"]))
def test_convolutions_of_any_setting(setting, kind, sharing):
    x = setting.make_input()
    model = cases.net_around(setting.make_layer(), setting.input_shape)
    module, loss = model.get_submodule("layer"), nn.CrossEntropyLoss(reduction="sum")
    y = torch.arange(len(x)) % cases.CLASSES
    truth_kind = "empirical_fisher" if kind == "empirical_fisher" else "ggn"
    a, s = oracles.layer_arrays(model, loss, x, y, "layer", kind=truth_kind)
    for approx in ("diag", "block", "kfac"):
        got = curvature(
            model, loss, [(x, y)], curv_type=kind, approx=approx, params=module.parameters(), sharing=sharing
        )
        close(got.to_dense(), layer_truth(approx, a, s, module, sharing))
