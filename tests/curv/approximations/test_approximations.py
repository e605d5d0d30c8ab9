"""Every layer, loss, kind and approximation against dense truths in float64."""

import math
from contextlib import nullcontext

import cases
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchcurv import SecondOrderOptimizer, curvature
from torchcurv.curv.numerics import assume_accelerator

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
    x = case.input_for(n, seed=2)
    model = cases.net_around(case.make_layer(), case.input_shape, before=case.make_input is None, x=x)
    loss = nn.CrossEntropyLoss() if loss is None else loss
    y = torch.arange(n) % cases.CLASSES
    return model, loss, x, y


def is_token_layer(module):
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def kfac_truth(a, s, module, sharing="expand", blocks=1):
    """B ⊗ A of each group, of each factor only the diagonal blocks; the vocabulary side is a diagonal."""
    A, B = oracles.kron_factors(a, s, known_sharing(sharing, module), None)
    A, B = A * mask(A.shape[-1], A.shape[-1] if is_token_layer(module) else blocks), B * mask(B.shape[-1], blocks)
    products = [torch.kron(left.contiguous(), right.contiguous()) for left, right in zip(B, A, strict=True)]
    return oracles.to_param_order(torch.block_diag(*products), module)


def known_sharing(sharing, module):
    return "expand" if sharing == "whole" and is_token_layer(module) else sharing


def mask(d, blocks):
    """1 in the diagonal blocks of size ceil(d / blocks)."""
    m = -(-d // min(blocks, d))
    place = torch.arange(d) // m
    return (place[:, None] == place).double()


def layer_truth(approx, a, s, module, sharing="expand"):
    """The dense block of one layer under an approximation that is known per layer."""
    if approx == "diag":
        return oracles.diag_from_arrays(a, s, module).diag()
    if approx == "kfac":
        return kfac_truth(a, s, module, sharing)
    return {"unit": oracles.unit_from_arrays, "block": oracles.block_from_arrays}[approx](a, s, module)


ALL_LAYERS = cases.LAYERS + cases.NEW_LAYERS


@SAME_EVEN
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ALL_LAYERS + cases.LAYERS_SAME_EVEN, ids=ids(ALL_LAYERS + cases.LAYERS_SAME_EVEN))
def test_every_approximation_of_every_layer_equals_its_dense_truth(case, kind):
    model, loss, x, y = problem(case)
    module = model.get_submodule("layer")
    truth_kind = "empirical_fisher" if kind == "empirical_fisher" else "ggn"
    a, s = oracles.layer_arrays(model, loss, x, y, "layer", kind=truth_kind)
    options = {"curv_type": kind, "params": list(module.parameters())}
    for approx in ("diag", "unit", "block", "kfac"):
        got = curvature(model, loss, [(x, y)], approx=approx, **options)
        close(got.to_dense(), layer_truth(approx, a, s, module))
    for sharing in ("reduce", "whole"):
        got = curvature(model, loss, [(x, y)], sharing=sharing, **options)
        close(got.to_dense(), layer_truth("kfac", a, s, module, sharing))
    rows = curvature(model, loss, [(x, y)], approx="block", rows_limit=1, **options)
    close(rows.to_dense(), layer_truth("block", a, s, module))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", cases.BATCH_STATISTICS_LAYERS, ids=ids(cases.BATCH_STATISTICS_LAYERS))
def test_batch_statistics_count_as_constants(case, kind):
    """The layer before a batch norm that uses the statistics of its batch, and the batch norm itself."""
    model, loss, x, y = problem(case)
    copy = cases.net_around(case.make_layer(), case.input_shape, before=True, x=x)
    copy.load_state_dict(model.state_dict())
    norm = copy.get_submodule("layer")
    norm.eval()
    norm.momentum, norm.track_running_stats = 1.0, True
    seen = copy.before(x).detach()
    dims = [d for d in range(seen.dim()) if d != 1]
    norm.running_mean, norm.running_var = seen.mean(dims), seen.var(dims, correction=0)
    for approx in ("block", "diag", "kfac"):
        got, expected = (curvature(m, loss, [(x, y)], curv_type=kind, approx=approx) for m in (model, copy))
        close(got.to_dense(), expected.to_dense())


@pytest.mark.parametrize("sharing", ["expand", "reduce", "whole"])
@pytest.mark.parametrize("case", ALL_LAYERS, ids=ids(ALL_LAYERS))
def test_ekfac_has_the_exact_second_moments_in_its_basis(case, sharing):
    model, loss, x, y = problem(case)
    module = model.get_submodule("layer")
    a, s = oracles.layer_arrays(model, loss, x, y, "layer")
    got = curvature(model, loss, [(x, y)], approx="ekfac", sharing=sharing, params=module.parameters())
    left, right = got.blocks["layer"].factor.basis
    right = dense_side(right, a.shape[-1])
    truth = oracles.ekfac_from_arrays(a, s, known_sharing(sharing, module), module=module, bases=(right, left))
    close(got.to_dense(), truth)
    close(got.trace(), oracles.block_from_arrays(a, s, module).trace())


def dense_side(side, d):
    return side if side.dim() == 3 else torch.stack([torch.block_diag(*blocks)[:d, :d] for blocks in side])


@pytest.mark.parametrize("case", ALL_LAYERS, ids=ids(ALL_LAYERS))
def test_factors_of_whole_gradients_have_the_partial_traces_of_the_block(case):
    model, loss, x, y = problem(case)
    module = model.get_submodule("layer")
    a, s = oracles.layer_arrays(model, loss, x, y, "layer")
    if is_token_layer(module) or a.shape[1] == 1:  # there they are not taken as a whole
        alike = [curvature(model, loss, [(x, y)], params=module.parameters(), sharing=k) for k in ("whole", "expand")]
        return close(*(got.to_dense() for got in alike))
    g, o, d = *s.shape[-2:], a.shape[-1]
    order = oracles.param_order(module).argsort()
    whole, block = (
        curvature(model, loss, [(x, y)], params=module.parameters(), **options).to_dense()[order][:, order]
        for options in ({"sharing": "whole"}, {"approx": "block"})
    )
    whole, block = whole.reshape(g, o, d, g, o, d), block.reshape(g, o, d, g, o, d)
    for axes in ("gopgoq->gpq", "gopgrp->gor"):
        close(torch.einsum(axes, whole), torch.einsum(axes, block))


class Mixed(nn.Module):
    """A layer that sees one position of a sample, or several, or both."""

    def __init__(self):
        super().__init__()
        self.one, self.head = nn.Linear(4, 5), nn.Linear(5, cases.CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.one(x)).mean(1))


def test_whole_gradients_of_one_position_have_the_units_of_those_of_several():
    model, y = cases.seeded(lambda: Mixed().double()), torch.arange(6) % cases.CLASSES
    loss, options = nn.CrossEntropyLoss(reduction="sum"), {"params": list(model.one.parameters()), "sharing": "whole"}
    x, z = cases.randn(6, 1, 4), cases.randn(6, 3, 4, seed=1)
    alone = [curvature(model, loss, [(value, y)], **options).trace() for value in (x, z)]
    close(curvature(model, loss, [(x, y), (z, y)], **options).trace(), sum(alone))
    close(alone[0], curvature(model, loss, [(x, y)], params=options["params"]).trace())
    A, B, total = 0, 0, 0
    for value in (x, z):
        factors = oracles.kron_factors(*oracles.layer_arrays(model, loss, value, y, "one"), "whole")
        own, left = (factor[0] / factor[0].trace() for factor in factors)
        trace = factors[0][0].trace() * factors[1][0].trace()
        A, B, total = A + trace * own, B + trace * left, total + trace
    both = oracles.to_param_order(torch.kron(B, A / total), model.one)
    close(curvature(model, loss, [(x, y), (z, y)], **options).to_dense(), both)


@pytest.mark.parametrize("approx", ["kfac", "ekfac"])
@pytest.mark.parametrize("cut", [(6,), (2, 4), (1, 1, 4)])
def test_whole_gradients_of_one_position_are_expanded_ones_however_the_data_is_cut(cut, approx):
    found = []
    for sharing in ("whole", "expand"):
        model = cases.seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double())
        optimizer = SecondOrderOptimizer(
            model, loss_fn=nn.CrossEntropyLoss(reduction="sum"), approx=approx, sharing=sharing, samples=None,
            ema_decay=0.7, update_every=1, refactor_every=1, momentum=0.0,
        )  # fmt: skip
        for step in range(3):
            optimizer.zero_grad()
            x, y = cases.randn(6, 4, seed=step) * (1 + step), (torch.arange(6) + step) % 3
            for inputs, labels in zip(x.split(cut), y.split(cut), strict=True):
                optimizer.loss_fn(model(inputs), labels).backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    close(*found)


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("accelerator", [False, True])
def test_averages_over_one_position_and_several_have_one_unit(first, accelerator):
    """The mean of the curvature of two steps, whichever came first."""
    model, loss = cases.seeded(lambda: Mixed().double()), nn.CrossEntropyLoss(reduction="sum")
    optimizer = SecondOrderOptimizer(
        model, loss_fn=loss, sharing="whole", samples=None, ema_decay=1.0, update_every=1, lr=0.0, damping_type="exact"
    )
    traces, y = [], torch.arange(6) % cases.CLASSES
    with assume_accelerator() if accelerator else nullcontext():
        for positions in (first, 4 - first):
            x = cases.randn(6, positions, 4, seed=positions)
            optimizer.zero_grad()
            optimizer.loss_fn(model(x), y).backward()
            optimizer.step()
            own = curvature(model, loss, [(x, y)], params=list(model.one.parameters()), sharing="whole")
            traces.append(own.trace())
        block = optimizer.blocks["one"]
        close(block.approx.trace(block.tensors), sum(traces) / 2)


def test_a_weight_of_unlike_modules_is_not_taken_as_a_whole():
    model, y = cases.seeded(lambda: Mixed().double()), torch.arange(6) % cases.CLASSES
    other = nn.Linear(4, 5, bias=False).double()
    other.weight = model.one.weight
    model.other, loss, x = other, nn.CrossEntropyLoss(), cases.randn(6, 3, 4)
    model.forward = lambda x: model.head(torch.tanh(model.one(x[:, :1])).mean(1) + model.other(x).mean(1))
    options = {"params": list(model.one.parameters())}
    whole, expand = (curvature(model, loss, [(x, y)], sharing=s, **options).to_dense() for s in ("whole", "expand"))
    close(whole, expand)


def test_averages_of_whole_gradients_give_every_step_one_weight():
    """However large its gradients are: of the second pass they are a hundredth."""
    model = cases.seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3)).double())
    y, loss = torch.arange(8) % 3, nn.CrossEntropyLoss(reduction="sum")
    optimizer = SecondOrderOptimizer(
        model, loss_fn=loss, sharing="whole", samples=None, ema_decay=1.0, update_every=1, lr=0.0, damping_type="exact"
    )
    factors = []
    for k, scale in enumerate((1.0, 1e-2)):
        x = cases.randn(8, 2, 4, 4, seed=k)
        optimizer.zero_grad()
        (scale * loss(model(x), y)).backward()
        optimizer.step()
        a, s = oracles.layer_arrays(model, loss, x, y, "0")
        A, B = oracles.kron_factors(a, s, "whole")
        factors.append((A, scale * B))
    A, B = ((one + other) / 2 for one, other in zip(*factors, strict=True))
    left, right = optimizer.engine.blocks[0].approx.sides_of(optimizer.engine.blocks[0].tensors)
    close(right.tril(), A.tril())
    close(left.tril(), B.tril())


@pytest.mark.parametrize("approx", ["kfac", "ekfac"])
def test_whole_gradients_need_signals_where_only_inputs_are_due(approx):
    model = cases.seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double())
    x, y = cases.randn(8, 2, 4, 4), torch.arange(8) % 3
    optimizer = SecondOrderOptimizer(
        model, approx=approx, sharing="whole", update_every="adaptive", refresh_tol=0.2, refresh_warmup=2, lr=0.01
    )
    due_statistics = set()
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        due_statistics |= {tuple(sorted(block.refresh.due)) for block in optimizer.engine.blocks}
        optimizer.step()
    assert ("A",) in due_statistics


def test_whole_gradients_add_up_over_signals_and_micro_batches():
    case = next(case for case in ALL_LAYERS if case.id.startswith("conv2d"))
    model, _, x, y = problem(case, n=6)
    loss = nn.CrossEntropyLoss(reduction="sum")
    parts = [(x[:2], y[:2]), (x[2:], y[2:])]
    options = {"sharing": "whole", "params": list(model.get_submodule("layer").parameters())}
    close(curvature(model, loss, parts, **options).to_dense(), curvature(model, loss, [(x, y)], **options).to_dense())


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from([c for c in ALL_LAYERS if not c.id.startswith(("batchnorm", "groupnorm"))]),
    blocks=st.integers(1, 6),
    sharing=st.sampled_from(["expand", "reduce", "whole"]),
)
def test_factors_in_blocks(case, blocks, sharing):
    model, loss, x, y = problem(case)
    module = model.get_submodule("layer")
    a, s = oracles.layer_arrays(model, loss, x, y, "layer")
    options = {"params": list(module.parameters()), "sharing": sharing}
    got = curvature(model, loss, [(x, y)], factor_blocks=blocks, **options)
    truth = kfac_truth(a, s, module, sharing, blocks)
    eye, v = torch.eye(len(truth), dtype=truth.dtype), cases.randn(len(truth), seed=7)
    close(got.to_dense(), truth)
    close(got.diag(), truth.diag())
    close(got.trace(), truth.trace())
    close(got.logdet(0.1), torch.logdet(truth + 0.1 * eye))
    close(got.solve(v, 0.1), torch.linalg.solve(truth + 0.1 * eye, v))
    wide = curvature(model, loss, [(x, y)], max_factor_dim=1, **options)
    close(wide.to_dense(), kfac_truth(a, s, module, sharing, 10**6))
    exact = curvature(model, loss, [(x, y)], approx="ekfac", factor_blocks=blocks, **options)
    close(exact.trace(), oracles.block_from_arrays(a, s, module).trace())


@pytest.mark.pairwise
@pytest.mark.parametrize("sharing", ["expand", "reduce", "whole"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ALL_LAYERS, ids=ids(ALL_LAYERS))
def test_factors_of_every_kth_sample(case, kind, sharing):
    """Where there are more positions than max_positions, for a batch of each k-th sample alone."""
    model, loss, x, y = problem(case, n=7)
    module = model.get_submodule("layer")
    options = {"curv_type": kind, "params": list(module.parameters()), "sharing": sharing}
    a, s = oracles.layer_arrays(model, loss, x, y, "layer", kind="empirical_fisher" if "emp" in kind else "ggn")
    positions = a.shape[:2].numel()
    for every, limit in ((1, positions), (2, positions - 1), (3, -(-positions // 3)), (7, 1)):
        got, corrected = (
            curvature(model, loss, [(x, y)], approx=approx, max_positions=limit, **options)
            for approx in ("kfac", "ekfac")
        )
        some = a[::every], s[:, ::every] * math.sqrt(7 / len(a[::every]))  # the mean is over fewer
        close(got.to_dense(), kfac_truth(*some, module, sharing))
        close(corrected.trace(), oracles.block_from_arrays(*some, module).trace())  # its basis is not unique


def test_factors_of_every_kth_sample_have_their_weights():
    model, _, x, y = problem(next(case for case in ALL_LAYERS if case.id.startswith("conv2d")), n=7)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]).double(), reduction="sum")
    options = {"params": list(model.get_submodule("layer").parameters())}
    got = curvature(model, loss, [(x, y)], max_positions=1, **options)  # the first sample alone
    alone = curvature(model, loss, [(x[:1], y[:1])], **options)
    close(got.to_dense(), 7 * alone.to_dense())
    two = oracles.layer_arrays(model, loss, x, y, "layer")[0].shape[1] * 7 // 2 + 1
    got, alone = (
        curvature(model, loss, [batch], max_positions=limit, **options)
        for batch, limit in (((x, y), two), ((x[::2], y[::2]), None))
    )
    close(got.to_dense(), alone.to_dense() * 7 / 4)


def test_units_too_wide_for_a_matrix_keep_their_diagonal():
    model, loss, x, y = problem(cases.LAYERS[0])
    wide, diagonal = (curvature(model, loss, [(x, y)], approx=a, max_factor_dim=1) for a in ("unit", "diag"))
    close(wide.to_dense(), diagonal.to_dense())


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
@given(
    setting=cases.conv_settings(), kind=st.sampled_from(KINDS), sharing=st.sampled_from(["expand", "reduce", "whole"])
)
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
