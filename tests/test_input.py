"""Input curvature (ISAAC, FOOF): A = mean a a^T against slow obvious code in float64."""

import copy

import cases
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from torchcurv import Preconditioner, curvature

CE = nn.CrossEntropyLoss()
FORMS = {
    "inverse": {"ema_decay": 0.5},
    "eigenvectors": {"damping_type": "exact"},
    "rows": {"ema_decay": 0.0},
}
FAMILIES = [c for c in cases.LAYERS + cases.NEW_LAYERS if not c.id.startswith(("batchnorm", "groupnorm"))]


def close(x, truth, tol=1e-10):
    assert x.shape == truth.shape
    assert (x - truth).abs().max() <= tol * (1e-3 + truth.abs().max())


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors]).detach().clone()


def net(case, n=4):
    x = case.input_for(n, seed=2)
    return cases.net_around(case.make_layer(), case.input_shape, x=x), x, torch.arange(n) % cases.CLASSES


def call(model, x):
    return model(*x) if isinstance(x, tuple) else model(x)


def input_covariance(module, x, n, sharing="expand"):
    """A [g, d, d], with zeros for the bias; of a vocabulary the diagonal is kept, as in K-FAC."""
    x = tuple(t if t is None else t.detach() for t in x) if isinstance(x, tuple) else x.detach()
    a = oracles.layer_inputs(module, x, n)
    if sharing == "reduce":
        a = a.mean(1, keepdim=True)
    A = torch.einsum("nrgi,nrgj->gij", a, a) / (a.shape[0] * a.shape[1])
    if getattr(module, "bias", None) is not None:
        A[:, -1] = A[:, :, -1] = 0
    return A * torch.eye(A.shape[-1], dtype=A.dtype) if isinstance(module, nn.Embedding | nn.EmbeddingBag) else A


def dense(module, A):
    """I ⊗ A of each group, in the order of the parameters."""
    o = oracles.to_goi(module, module.weight, getattr(module, "bias", None)).shape[1]
    blocks = [torch.kron(torch.eye(o, dtype=A.dtype), part.contiguous()) for part in A]
    return oracles.to_param_order(torch.block_diag(*blocks), module)


# ------------------------------------------------------------------------------------------ curvature


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", FAMILIES, ids=cases.ids(FAMILIES))
def test_the_block_is_the_identity_times_the_inputs_second_moment(case, sharing):
    model, x, y = net(case)
    module = model.get_submodule("layer")
    got = curvature(model, CE, [(x, y)], curv_type="input", params=list(module.parameters()), sharing=sharing)
    truth = dense(module, input_covariance(module, x, 4, sharing))
    close(got.to_dense(), truth)
    v, eye = cases.randn(len(truth), seed=3), torch.eye(len(truth), dtype=torch.float64)
    close(got.solve(v, 0.3), torch.linalg.solve(truth + 0.3 * eye, v))
    close(got.diag(), truth.diag())
    close(got.trace(), truth.trace())
    close(got.logdet(0.3), torch.logdet(truth + 0.3 * eye))
    close(got.eigvalsh(), torch.linalg.eigvalsh(truth), 1e-9)


def test_it_does_not_depend_on_the_loss_and_is_a_mean_over_batches():
    model, x, y = net(cases.LINEAR_LAYERS[0], 6)
    whole = curvature(model, CE, [(x, y)], curv_type="input").to_dense()
    for loss in (nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(label_smoothing=0.3)):
        parts = [(x[:2], y[:2]), (x[2:], y[2:])]
        close(curvature(model, loss, parts, curv_type="input").to_dense(), whole)


def test_ignored_terms_leave_it():
    layer = nn.Linear(3, cases.CLASSES).double()
    x, y = cases.randn(2, 4, 3), torch.tensor([[0, 1, -100, 2], [1, -100, -100, 0]])
    model = nn.Sequential(layer, cases.ClassFirst())
    got = curvature(model, CE, [(x, y)], curv_type="input", params=[layer.weight]).to_dense()
    kept = x[y != -100]
    close(got, torch.kron(torch.eye(cases.CLASSES).double(), kept.T @ kept / len(kept)))


def test_a_layer_that_the_loss_does_not_reach_does_not_count():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            self.other(x)
            return self.one(self.one(x))

    model, x, y = cases.seeded(Two), cases.randn(4, 3), torch.arange(4) % 3
    got = curvature(model, CE, [(x, y)], curv_type="input", params=[model.one.weight])
    rows = torch.cat([x, model.one(x)]).detach()
    close(got.to_dense(), torch.kron(torch.eye(3).double(), rows.T @ rows / 8))
    with pytest.raises(ValueError, match="does not depend on other"):
        curvature(model, CE, [(x, y)], curv_type="input")


# -------------------------------------------------------------------------------------------- direction


def direction(model, x, y, damping=0.2, sizes=(0,), **options):
    """.grad after a Preconditioner, and before it; the batch comes in parts of these sizes."""
    precond = Preconditioner(model, loss_fn=CE, curv_type="input", damping=damping, **options)
    parts = [(x, y)] if len(sizes) == 1 else zip(x.split(sizes), y.split(sizes), strict=True)
    for inputs, target in parts:
        (CE(call(model, inputs), target) * len(target) / len(y)).backward()
    before = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    precond.step()
    return {p: p.grad for p in before}, before


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", FAMILIES, ids=cases.ids(FAMILIES))
def test_the_direction_is_damping_times_the_solution_and_a_bias_is_left_alone(case, form):
    model, x, y = net(case)
    module, params = model.get_submodule("layer"), list(model.get_submodule("layer").parameters())
    after, before = direction(model, x, y, params=params, **FORMS[form])
    A = input_covariance(module, x, 4)
    damped = dense(module, A) / 0.2 + torch.eye(sum(p.numel() for p in params), dtype=torch.float64)
    close(flat(after[p] for p in params), torch.linalg.solve(damped, flat(before[p] for p in params)))
    if getattr(module, "bias", None) is not None:
        torch.testing.assert_close(after[module.bias], before[module.bias], rtol=1e-14, atol=0)
    for p in set(before) - set(params):
        assert torch.equal(after[p], before[p])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 7), i=st.integers(1, 6), o=st.integers(1, 5), bias=st.booleans(),
    damping=st.sampled_from([1e-3, 0.5, 30.0]), split=st.booleans(),
)  # fmt: skip
def test_both_forms_agree_whether_rows_or_inputs_are_more(n, i, o, bias, damping, split):
    model = cases.seeded(lambda: nn.Linear(i, o, bias=bias))
    x, y = cases.randn(n, i, seed=n), torch.arange(n) % o
    sizes = (1, n - 1) if split and n > 1 else (n,)
    a, g = x, None
    for form in FORMS.values():
        twin = copy.deepcopy(model)
        after, before = direction(twin, x, y, damping, sizes, **form)
        g = before[twin.weight]
        truth = damping * g @ torch.linalg.inv(a.T @ a / n + damping * torch.eye(i, dtype=a.dtype))
        close(after[twin.weight], truth)


@settings(max_examples=30, deadline=None)
@given(setting=cases.conv_settings(), form=st.sampled_from(sorted(FORMS)))
def test_convolutions_against_unfold(setting, form):
    x, model = setting.make_input(), cases.net_around(setting.make_layer(), setting.input_shape)
    module = model.get_submodule("layer")
    y = torch.arange(len(x)) % cases.CLASSES
    after, before = direction(model, x, y, params=list(module.parameters()), **FORMS[form])
    A = input_covariance(module, x, len(x))
    d = A.shape[-1] - (module.bias is not None)
    G = before[module.weight].reshape(module.groups, -1, d)
    truth = 0.2 * G @ torch.linalg.inv(A[:, :d, :d] + 0.2 * torch.eye(d, dtype=A.dtype))
    close(after[module.weight], truth.reshape(module.weight.shape))


def test_a_convolution_against_torchs_unfold():
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=1).double()
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(27, 3).double())
    x, y = cases.randn(4, 2, 5, 5), torch.arange(4) % 3
    after, before = direction(model, x, y, params=layer.parameters())
    a = F.unfold(x, 3, padding=1, stride=2).mT.reshape(-1, 18)
    inverse = torch.linalg.inv(a.T @ a / len(a) + 0.2 * torch.eye(18, dtype=a.dtype))
    close(after[layer.weight].reshape(3, 18), 0.2 * before[layer.weight].reshape(3, 18) @ inverse)


@pytest.mark.parametrize("form", FORMS)
def test_it_tends_to_the_plain_gradient(form):
    model, x, y = net(cases.LINEAR_LAYERS[0])
    gaps = []
    for damping in (1e2, 1e4, 1e12):
        model.zero_grad()
        after, before = direction(model, x, y, damping, **FORMS[form])
        gaps.append((flat(after.values()) - flat(before.values())).norm())
    assert gaps[1] < 0.02 * gaps[0] and gaps[2] < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_a_frozen_weight_leaves_the_bias_alone(form):
    layer = nn.Linear(3, 3).double()
    layer.weight.requires_grad_(False)
    after, before = direction(layer, cases.randn(4, 3), torch.arange(4) % 3, **FORMS[form])
    torch.testing.assert_close(after[layer.bias], before[layer.bias], rtol=1e-14, atol=0)
