"""AdaHesScale against its formulas, and against Adam."""

import copy

import cases
import models
import pytest
import torch
from torch import nn

from torchcurv import curvature
from torchcurv.optim import AdaHesScale

LOSS = nn.CrossEntropyLoss()


def problem():
    return cases.model_case("mlp").make_model(), cases.randn(6, 4, seed=2), torch.arange(6) % cases.CLASSES


@pytest.mark.parametrize("delta", [None, 1e-4, 1e4])
@pytest.mark.parametrize("residual", ["keep", "zero"])
def test_steps_follow_the_formulas(residual, delta):
    model, x, y = problem()
    lr, (b1, b2), eps, most = 0.01, (0.8, 0.95), 1e-6, 0.7
    optimizer = AdaHesScale(
        model, loss_fn=LOSS, lr=lr, betas=(b1, b2), eps=eps, residual=residual, delta=delta, max_scale=most
    )
    twin = copy.deepcopy(model)
    m, v = (torch.zeros(sum(p.numel() for p in twin.parameters()), dtype=torch.float64) for _ in range(2))
    for t in range(1, 5):
        options = {"curv_type": "hessian", "approx": "diag", "residual": residual}
        h = curvature(twin, LOSS, [(x, y)], **options).diag()
        g = torch.cat([e.flatten() for e in torch.autograd.grad(LOSS(twin(x), y), list(twin.parameters()))])
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * h**2
        u = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        s = 1.0 if delta is None else min(most, (2 * delta / (h.abs() * u**2).sum().item()) ** 0.5)
        flat = nn.utils.parameters_to_vector(twin.parameters()).detach() - lr * s * u
        nn.utils.vector_to_parameters(flat, twin.parameters())
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
        assert torch.allclose(nn.utils.parameters_to_vector(model.parameters()).detach(), flat, rtol=1e-9)


def test_without_an_approximation_it_is_adam():
    model, x, y = problem()
    twin = copy.deepcopy(model)
    ours = AdaHesScale(model, [{"params": model.parameters(), "approx": None}], loss_fn=LOSS, lr=0.01)
    adam = torch.optim.Adam(twin.parameters(), lr=0.01)
    for _ in range(4):
        for net, optimizer in ((model, ours), (twin, adam)):
            optimizer.zero_grad()
            LOSS(net(x), y).backward()
            optimizer.step()
    assert all(torch.allclose(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("update_every", [1, 3])
def test_a_resumed_run_equals_one_that_was_not_interrupted(update_every):
    def steps(model, optimizer, x, y, count):
        for _ in range(count):
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()

    model, x, y = problem()
    options = {"loss_fn": LOSS, "lr": 0.01, "delta": 0.1, "update_every": update_every}
    optimizer = AdaHesScale(model, **options)
    steps(model, optimizer, x, y, 4)
    twin = copy.deepcopy(model)
    again = AdaHesScale(twin, **options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, x, y, 4)
    steps(twin, again, x, y, 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("id", ["resnet_bn", "depthwise_cnn", "autoencoder"])
def test_training_lowers_the_loss(id):
    case = next(case for case in models.MODELS if case.id == id)
    model, x, y = case.make_model(), case.make_inputs(), case.make_target()
    optimizer = AdaHesScale(model, loss_fn=case.loss, lr=1e-3, delta=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = case.loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"approx": "kfac"}, "reads a diagonal"),
        ({"betas": (0.9, 1.0)}, "betas=1.0"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"residual": "half"}, "residual='half'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdaHesScale(nn.Linear(4, 3), **options)
