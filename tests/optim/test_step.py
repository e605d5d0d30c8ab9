"""The update rule, groups and invariances of a step, against slow obvious code in float64."""

import math

import cases
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchcurv import Preconditioner, SecondOrderOptimizer

DATA = [(cases.randn(6, 4, seed=t), torch.arange(6) % 3) for t in range(5)]


def make_model():
    return cases.seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors]).detach().clone()


def gradient(model, x, y, loss=None):
    loss = nn.CrossEntropyLoss() if loss is None else loss
    return flat(torch.autograd.grad(loss(model(x), y), list(model.parameters())))


def step(model, optimizer, x, y, loss=nn.functional.cross_entropy):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()


@settings(max_examples=30, deadline=None)
@given(
    momentum=st.sampled_from([0.0, 0.6]),
    nesterov=st.booleans(),
    momentum_type=st.sampled_from(["raw", "preconditioned"]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    l2=st.sampled_from([0.0, 0.2]),
    maximize=st.booleans(),
    kl_clip=st.sampled_from([None, 1e-3, 10.0]),
    ema_decay=st.sampled_from([0.0, 0.9, 1.0]),
    tensor_lr=st.booleans(),
)
def test_steps_are_those_of_the_formula(
    momentum, nesterov, momentum_type, weight_decay, l2, maximize, kl_clip, ema_decay, tensor_lr
):
    nesterov, lr, damping = nesterov and momentum > 0, 0.3, 0.05
    model, twin = make_model(), make_model()
    optimizer = SecondOrderOptimizer(
        model, approx="full", samples=None, damping_type="exact", damping=damping,
        lr=torch.tensor(lr, dtype=torch.float64) if tensor_lr else lr, momentum=momentum, nesterov=nesterov,
        momentum_type=momentum_type, weight_decay=weight_decay, l2=l2, maximize=maximize, kl_clip=kl_clip,
        ema_decay=ema_decay,
    )  # fmt: skip
    theta, buffer, average, weight = flat(twin.parameters()), 0, 0, 0
    for x, y in DATA:
        nn.utils.vector_to_parameters(theta, twin.parameters())
        ggn = oracles.ggn(twin, nn.CrossEntropyLoss(), x, y, list(twin.named_parameters()))
        weight = ema_decay * weight + 1
        average = average + (ggn - average) / weight
        g = gradient(twin, x, y) * (-1 if maximize else 1) + l2 * theta
        if momentum_type == "raw":
            buffer = momentum * buffer + g
            g = g + momentum * buffer if nesterov else buffer
        v = torch.linalg.solve(average + (damping + l2) * torch.eye(len(theta), dtype=theta.dtype), g)
        if kl_clip is not None:
            v = v * min(1, math.sqrt(kl_clip / abs(lr**2 * (v @ g))))
        if momentum_type == "preconditioned":
            buffer = momentum * buffer + v
            v = v + momentum * buffer if nesterov else buffer
        theta = (1 - lr * weight_decay) * theta - lr * v
        step(model, optimizer, x, y)
        torch.testing.assert_close(flat(model.parameters()), theta, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True}, {"l2": 0.1}, {"maximize": True}])
def test_without_an_approximation_it_is_torchs_sgd(options):
    model, twin = make_model(), make_model()
    ours = SecondOrderOptimizer(model, approx=None, lr=0.1, **{"momentum": 0.5, **options})
    renamed = {{"l2": "weight_decay"}.get(key, key): value for key, value in options.items()}
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, **{"momentum": 0.5, **renamed})
    for x, y in DATA:
        step(model, ours, x, y)
        step(twin, theirs, x, y)
    torch.testing.assert_close(flat(model.parameters()), flat(twin.parameters()), rtol=1e-12, atol=1e-12)


def test_rows_solve_the_natural_gradient_of_a_million_parameters():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 2000), nn.Tanh(), nn.Linear(2000, 250), nn.Tanh(), nn.Linear(250, 3))
    model = model.double()
    assert sum(p.numel() for p in model.parameters()) > 1_000_000
    x, y = cases.randn(4, 300), torch.arange(4) % 3
    optimizer = SecondOrderOptimizer(
        model, approx="full", samples=None, lr=1.0, momentum=0.0, damping=0.1, kl_clip=None, ema_decay=0.0
    )
    g, before = gradient(model, x, y), flat(model.parameters())
    rows = oracles.ggn_rows(model, nn.CrossEntropyLoss(), x, y, list(model.named_parameters())).flatten(0, 1)
    step(model, optimizer, x, y)
    v = before - flat(model.parameters())
    torch.testing.assert_close(rows.T @ (rows @ v) + 0.1 * v, g, rtol=1e-8, atol=1e-10)


def moved(approx, reduction="mean", factor=1.0, damping=0.1, splits=1, **options):
    """The direction of one step for factor * loss, accumulated over `splits` micro-batches."""
    model, loss = make_model(), nn.CrossEntropyLoss(reduction=reduction)
    optimizer = SecondOrderOptimizer(
        model, loss_fn=loss, approx=approx, samples=None, lr=1.0, momentum=0.0, kl_clip=None, damping=damping, **options
    )
    x, y = DATA[0]
    before = flat(model.parameters())
    for rows in torch.arange(6).chunk(splits):
        (factor / (splits if reduction == "mean" else 1) * loss(model(x[rows]), y[rows])).backward()
    optimizer.step()
    return before - flat(model.parameters())


@pytest.mark.parametrize("kind", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("approx", ["full", "block", "unit", "kfac", "ekfac", "diag"])
def test_reduction_scale_and_micro_batches_do_not_change_the_direction(approx, kind):
    truth = moved(approx, curv_type=kind)
    for options in (
        {"reduction": "sum", "damping": 0.6},
        {"factor": 1000.0, "damping": 100.0},
        {"splits": 3},
        {"splits": 2, "reduction": "sum", "damping": 0.6},
    ):
        torch.testing.assert_close(moved(approx, curv_type=kind, **options), truth, rtol=1e-7, atol=1e-10)


def test_options_of_a_layer_must_agree_and_those_of_the_step_may_differ():
    model = make_model()
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    with pytest.raises(ValueError, match=r"0\.weight and 0\.bias .* approx='kfac' and approx='diag'"):
        SecondOrderOptimizer(model, [{"params": weights}, {"params": biases, "approx": "diag"}])
    one = SecondOrderOptimizer(model, [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.05}])
    step(model, one, *DATA[0])
    twin = make_model()
    other = SecondOrderOptimizer(twin)
    step(twin, other, *DATA[0])
    assert not torch.equal(model[0].bias, twin[0].bias)


def test_groups_of_different_curvature_each_do_their_own():
    model = make_model()
    optimizer = SecondOrderOptimizer(
        model,
        [
            {"params": model[0].parameters(), "curv_type": "empirical_fisher", "approx": "diag", "damping": 0.5},
            {"params": model[2].parameters(), "approx": None},
        ],
        lr=1.0, momentum=0.0, kl_clip=None,
    )  # fmt: skip
    x, y = DATA[0]
    fisher = oracles.empirical_fisher(model, nn.CrossEntropyLoss(), x, y, list(model.named_parameters())).diag()
    g, before = gradient(model, x, y), flat(model.parameters())
    first = sum(p.numel() for p in model[0].parameters())
    truth = torch.cat([g[:first] / (fisher[:first] + 0.5), g[first:]])
    step(model, optimizer, x, y)
    torch.testing.assert_close(before - flat(model.parameters()), truth, rtol=1e-9, atol=1e-12)
    assert "plain gradient" in optimizer.summary() and "empirical_fisher" in optimizer.summary()


def test_what_is_outside_the_groups_is_untouched_and_unhooked():
    model = make_model()
    optimizer = SecondOrderOptimizer(model, model[2].parameters())
    before = model[0].weight.detach().clone()
    assert not model[0]._forward_hooks
    step(model, optimizer, *DATA[0])
    assert torch.equal(model[0].weight, before)
    optimizer.add_param_group({"params": model[0].parameters(), "approx": "diag"})
    step(model, optimizer, *DATA[0])
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.5**t),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    ],
)
def test_schedulers_of_torch(scheduler):
    model = make_model()
    optimizer = SecondOrderOptimizer(model)
    schedule = scheduler(optimizer)
    rates = []
    for x, y in DATA:
        step(model, optimizer, x, y)
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert len(set(rates)) > 1


def test_intervals_say_what_is_measured_and_factored_when():
    model = make_model()
    optimizer = SecondOrderOptimizer(model, update_every=2, refactor_every=lambda t: 3, lr=0.0)
    measured, factored = [], []
    for t in range(7):
        old = (
            optimizer.engine.blocks[0].tensors.get("B", torch.zeros(()).double()).clone(),
            optimizer.engine.blocks[0].factor,
        )
        step(model, optimizer, *DATA[t % 5])
        measured += [t] if not torch.equal(old[0], optimizer.engine.blocks[0].tensors["B"]) else []
        factored += [t] if old[1] is not optimizer.engine.blocks[0].factor else []
    assert measured == [0, 2, 4, 6] and factored == [0, 3, 6]


def test_a_closure_is_run_with_gradients_and_its_loss_returned():
    model = make_model()
    optimizer = SecondOrderOptimizer(model)
    calls = []
    handle = optimizer.register_step_post_hook(lambda *_: calls.append(1))
    x, y = DATA[0]

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with torch.no_grad():
        first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first and len(calls) == 2
    handle.remove()


@pytest.mark.parametrize("behind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_preconditioner_in_front_of_another_optimizer(behind):
    model = make_model()
    precond = Preconditioner(model, approx="block", samples=None, damping=0.1, damping_type="exact")
    other = behind(model.parameters(), lr=0.01)
    x, y = DATA[0]
    named = list(model.named_parameters())
    ggn, g = oracles.ggn(model, nn.CrossEntropyLoss(), x, y, named), gradient(model, x, y)
    nn.functional.cross_entropy(model(x), y).backward()
    precond.step()
    first = sum(p.numel() for p in model[0].parameters())
    truth = [oracles.solve_dense(ggn[s, s], g[s], 0.1) for s in (slice(first), slice(first, None))]
    torch.testing.assert_close(flat(p.grad for p in model.parameters()), torch.cat(truth), rtol=1e-8, atol=1e-11)
    other.step()


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("unsupported", ["error", "gradient"])
def test_parameters_that_no_layer_explains_are_preconditioned_element_by_element(unsupported):
    model = Odd().double()
    optimizer = SecondOrderOptimizer(
        model, unsupported=unsupported, samples=None, lr=1.0, momentum=0.0, kl_clip=None, damping=0.1,
        damping_type="exact",
    )  # fmt: skip
    x, y = DATA[0]
    nn.functional.cross_entropy(model(x), y).backward()
    p = model.body.parametrizations.weight.original1
    before, g = p.detach().clone(), p.grad.clone()
    name = "body.parametrizations.weight.original1"
    diagonal = oracles.ggn(model, nn.CrossEntropyLoss(), x, y, [(name, p)]).diag().reshape(p.shape)
    optimizer.step()
    torch.testing.assert_close(before - p.detach(), g / (diagonal + 0.1))
    assert {q for block in optimizer.engine.blocks for q in block.params} == set(model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"approx": "kfca"}, "allowed are 'full'"),
        ({"curv_type": "gauss_newton"}, "allowed are 'ggn'"),
        ({"lr": -0.1}, "lr=-0.1"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"damping": -1.0}, "damping=-1.0"),
        ({"damping": 0.0}, "damping=0"),
        ({"samples": 0}, "samples=0"),
        ({"ema_decay": 1.5}, "ema_decay=1.5"),
        ({"update_every": 0}, "update_every=0"),
        ({"kl_clip": -1.0}, "kl_clip=-1.0"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov"),
        ({"momentum_type": "heavy"}, "momentum_type='heavy'"),
        ({"unsupported": "skip"}, "unsupported='skip'"),
        ({"loss_fn": "hinge"}, "loss_fn='hinge'"),
        ({"loss_fn": 3}, "pass a loss module, a function"),
        ({"reduction": "avg"}, "reduction='avg'"),
        ({"sharing": "both"}, "sharing='both'"),
        ({"rows_limit": 0}, "rows_limit=0"),
        ({"weight_decay": -1}, "weight_decay=-1"),
    ],
)
def test_bad_arguments_say_what_came_and_what_is_allowed(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SecondOrderOptimizer(make_model(), **options)


def test_a_model_without_trainable_parameters_is_refused():
    for model in (nn.Tanh(), make_model().requires_grad_(False)):
        with pytest.raises(ValueError, match="no trainable parameters"):
            SecondOrderOptimizer(model)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        SecondOrderOptimizer(make_model().parameters())
    with pytest.raises(ValueError, match="not parameters of the model"):
        SecondOrderOptimizer(make_model(), make_model().parameters())
