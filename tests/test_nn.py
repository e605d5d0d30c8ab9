"""ISAACLinear against its formula, against nn.Linear where they agree, and where a module may be put."""

import copy
import math
import pickle

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import torchcurv
from torchcurv import Preconditioner, SecondOrderOptimizer
from torchcurv.nn import ISAACLinear


def make(i=4, o=3, la=0.5, bias=True, seed=0):
    return cases.seeded(lambda: ISAACLinear(i, o, la, bias), seed)


def gradients(layer, x, back):
    """(input, weight, bias gradients) of <layer(x), back>."""
    x = x.clone().requires_grad_()
    wanted = [x, *layer.parameters()]
    return torch.autograd.grad(layer(x), wanted, back)


def twin_of(layer):
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)
    plain.load_state_dict(layer.state_dict())
    return plain


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(1, 4), max_size=3), i=st.integers(1, 6), o=st.integers(1, 5), bias=st.booleans(),
    la=st.sampled_from([1e-4, 0.3, 10.0]),
)  # fmt: skip
def test_gradients_are_those_of_the_formula(lead, i, o, bias, la):
    layer = make(i, o, la, bias)
    x, back = cases.randn(*lead, i, seed=1), cases.randn(*lead, o, seed=2)
    a, G = x.reshape(-1, i), back.reshape(-1, o)
    b = len(a)
    by_inputs = la * G.T @ a @ torch.linalg.inv(a.T @ a / b + la * torch.eye(i, dtype=a.dtype))
    by_rows = G.T @ torch.linalg.inv(torch.eye(b, dtype=a.dtype) + a @ a.T / (b * la)) @ a
    torch.testing.assert_close(by_inputs, by_rows, rtol=1e-10, atol=1e-10)
    at_x, at_weight, *at_bias = gradients(layer, x, back)
    torch.testing.assert_close(at_weight, by_rows, rtol=1e-10, atol=1e-10)
    plain_x, _, *plain_bias = gradients(twin_of(layer), x, back)
    torch.testing.assert_close([at_x, *at_bias], [plain_x, *plain_bias], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(layer(x), twin_of(layer)(x), rtol=0, atol=0)


@pytest.mark.parametrize("n", [2, 9])
def test_it_tends_to_the_plain_gradient(n):
    x, back = cases.randn(n, 4, seed=1), cases.randn(n, 3, seed=2)
    plain = gradients(twin_of(make()), x, back)[1]
    gaps = [(gradients(make(la=la), x, back)[1] - plain).norm() for la in (1e2, 1e4, 1e13)]
    assert gaps[1] < 0.02 * gaps[0] and gaps[2] < 1e-11


def test_gradcheck_of_the_input_and_the_bias():
    layer = make()
    x = cases.randn(2, 3, 4).requires_grad_()
    layer.weight.requires_grad_(False)
    assert torch.autograd.gradcheck(layer, x)
    replaced = lambda x, bias: torch.func.functional_call(layer, {"bias": bias}, x)  # noqa: E731
    assert torch.autograd.gradcheck(replaced, (x, layer.bias))


@pytest.mark.parametrize("n", [3, 8])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_it_is_the_preconditioner_for_the_input_curvature(n, ema_decay):
    layer, la, x, y = make(), 0.5, cases.randn(n, 5, 4), torch.arange(5 * n).reshape(n, 5) % 3
    plain = twin_of(layer)
    loss = nn.CrossEntropyLoss()
    precond = Preconditioner(plain, loss_fn=loss, curv_type="input", damping=la, ema_decay=ema_decay)
    for model in (layer, plain):
        loss(model(x).mT, y).backward()
    precond.step()
    for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------- where it may be put


def test_it_is_a_linear_layer():
    layer = make()
    assert isinstance(layer, nn.Linear) and torchcurv.nn.ISAACLinear is ISAACLinear
    assert "in_features=4" in repr(layer) and "la=0.5" in repr(layer)
    layer.load_state_dict(twin_of(layer).state_dict())
    assert ISAACLinear(4, 3, 0.5, False, "cpu", torch.float64).bias is None
    x, back = cases.randn(5, 4), cases.randn(5, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(gradients(other, x, back), gradients(layer, x, back), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [3, 8])
def test_lower_precision_keeps_its_statistics_in_float32(dtype, n):
    layer = make().to(dtype)
    x, back = cases.randn(n, 4).to(dtype), cases.randn(n, 3, seed=1).to(dtype)
    found = gradients(layer, x, back)
    assert {t.dtype for t in found} == {dtype}
    exact = gradients(layer.double(), x.double(), back.double())
    torch.testing.assert_close(
        [t.double() for t in found], list(exact), rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_autocast(inside):
    layer, x = make().float(), cases.randn(6, 4).float().requires_grad_()
    exact = gradients(layer, x.detach(), torch.ones(6, 3))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert out.dtype == torch.bfloat16
        if inside:
            out.sum().backward()
    if not inside:
        out.sum().backward()
    found = [x.grad, layer.weight.grad, layer.bias.grad]
    assert {t.dtype for t in found} == {torch.float32}
    torch.testing.assert_close(found[1:], list(exact[1:]), rtol=1e-5, atol=1e-5)  # G is exact here, and a float32
    torch.testing.assert_close(found[0], exact[0], rtol=1e-2, atol=1e-2)


def test_what_needs_no_gradient_costs_none():
    layer, x = make(), cases.randn(5, 4)
    layer(x).sum().backward()  # x needs none
    assert layer.weight.grad is not None
    layer.weight.requires_grad_(False)
    layer.zero_grad()
    out = layer(x.requires_grad_())
    saved = [t for t in out.grad_fn.saved_tensors if t is not None]
    assert [t.data_ptr() for t in saved] == [layer.weight.data_ptr()]
    out.sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None and x.grad is not None
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_an_empty_batch():
    layer = make()
    layer(torch.zeros(0, 4, dtype=torch.float64)).sum().backward()
    assert not layer.weight.grad.any() and not layer.bias.grad.any()


def test_calls_and_backward_calls_add_up():
    layer, x = make(), cases.randn(5, 4)
    one = [gradients(layer, part, torch.ones(len(part), 3, dtype=part.dtype))[1] for part in (x[:2], x[2:])]
    (layer(x[:2]).sum() + layer(x[2:]).sum()).backward()
    torch.testing.assert_close(layer.weight.grad, one[0] + one[1])


@pytest.mark.parametrize("n", [3, 9])
def test_rounding_shortens_the_gradient_and_does_not_spoil_it(n):
    layer = make(la=1e-20).float()
    x = torch.ones(n, 4) * torch.arange(1.0, n + 1).unsqueeze(1)
    at_weight = gradients(layer, x, torch.ones(n, 3))[1]
    assert at_weight.isfinite().all() and at_weight.norm() < 1e-3
    x[0, 0] = math.nan
    assert gradients(layer, x, torch.ones(n, 3))[1].isnan().any()


# --------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("la", [0, 0.0, -1.0, math.inf, math.nan])
def test_la_must_be_positive(la):
    with pytest.raises(ValueError, match=r"la=.*a finite number > 0"):
        ISAACLinear(3, 2, la)


@pytest.mark.parametrize("la", [True, "1", None, torch.tensor(1.0)])
def test_la_must_be_a_number(la):
    with pytest.raises(TypeError, match=r"la=.*a finite number > 0"):
        ISAACLinear(3, 2, la)


def test_its_gradient_is_not_differentiated_again():
    layer, x = make(), cases.randn(5, 4)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("options", [{}, {"curv_type": "input"}, {"approx": "diag"}])
def test_a_captured_curvature_refuses_it_and_says_what_to_write(options):
    model = nn.Sequential(make(4, 4), nn.Tanh(), make(4, 3))
    with pytest.raises(ValueError, match=r"'0' \(ISAACLinear\).*already preconditioned.*approx=None"):
        SecondOrderOptimizer(model, **options)


def test_it_lies_beside_layers_with_a_curvature():
    model = cases.seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), ISAACLinear(4, 3, 0.5)))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "approx": None}]
    optimizer = SecondOrderOptimizer(model, groups, lr=0.5)
    x, y, losses = cases.randn(8, 4), torch.arange(8) % 3, []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
