"""The gradient is the witness of what the loss is: factors, signs, subclasses, other terms, repeated backward calls."""

from contextlib import nullcontext

import cases
import oracles
import pytest
import torch
from measured import close, dense, measured, optimizer
from measured import truth as truth_of
from torch import nn
from torch.nn import functional as F

import torchcurv
from torchcurv import SecondOrderOptimizer, curvature
from torchcurv.curv.losses.table import MODULES
from torchcurv.curv.numerics import assume_accelerator

CE, V, N = nn.CrossEntropyLoss(), 3, 6
Y = torch.arange(N) % V
KINDS = ["ggn", "fisher", "empirical_fisher"]


def truth(opt, loss, x, y, kind="ggn"):
    """Of cross entropy the exact Fisher is the GGN."""
    return truth_of(opt, loss, x, y, "ggn" if kind == "fisher" else kind)


def mlp():
    return cases.seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, V)))


X = cases.randn(N, 4)
WEIGHTS = cases.randn(N, seed=3)


class Focal(nn.CrossEntropyLoss):
    def forward(self, f, y):
        p = f.softmax(-1).gather(-1, y[:, None]).squeeze(-1)
        return -((1 - p) ** 2 * p.log()).mean()


class RootMeanSquare(nn.MSELoss):
    def forward(self, f, y):
        return super().forward(f, y).sqrt()


class WithDice(nn.BCEWithLogitsLoss):
    def forward(self, f, y):
        p = f.sigmoid()
        return super().forward(f, y) + 1 - 2 * (p * y).sum() / (p + y).sum()


ONE_HOT = F.one_hot(Y, V).double()


@pytest.fixture
def mistaken():
    """A focal loss that was registered as a cross entropy."""
    held = dict(MODULES)
    torchcurv.register_loss(Focal, like="cross_entropy")
    yield Focal()
    MODULES.clear()
    MODULES.update(held)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_what_it_was_said_to_be_is_noticed(kind, mistaken):
    opt = optimizer(mlp(), mistaken, curv_type=kind)
    mistaken(opt.model(X), Y).backward()
    with pytest.raises(RuntimeError, match=r"is not what the watched loss \(\w+\) sends there.*register_loss.*observe"):
        opt.step()


@pytest.mark.parametrize("make", [RootMeanSquare, WithDice])
def test_a_loss_module_with_a_forward_of_its_own_is_not_its_parent(make):
    """Those in which samples meet are refused; others are right (test_unknown_losses.py)."""
    loss = make()
    opt = optimizer(mlp(), loss)
    with pytest.raises(ValueError, match="samples meet in the loss"):
        loss(opt.model(X), ONE_HOT).backward()


TERMS = {
    "entropy": lambda f: -0.1 * (f.softmax(-1) * f.log_softmax(-1)).sum(-1).mean(),
    "kl": lambda f: 0.9 * F.kl_div(f.log_softmax(-1), torch.full_like(f, 1 / V), reduction="batchmean"),
    "logits": lambda f: 0.01 * f.square().mean(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TERMS)
def test_other_terms_of_the_same_output_are_noticed(name, kind):
    opt = optimizer(mlp(), CE, curv_type=kind)
    f = opt.model(X)
    (CE(f, Y) + TERMS[name](f)).backward()
    with pytest.raises(RuntimeError, match="other terms of the loss depend on the same output"):
        opt.step()


@pytest.mark.parametrize("name", TERMS)
def test_they_may_be_left_out_by_observe(name):
    opt = optimizer(mlp(), CE)
    f = opt.model(X)
    opt.observe(f, Y, CE, 0.1)
    (0.1 * CE(f, Y) + TERMS[name](f)).backward()
    close(measured(opt), 0.1 * truth(opt, CE, X, Y))


def test_gradients_that_are_thrown_away_take_their_objection_along():
    """As those of a discriminator in the step of the generator."""
    opt = optimizer(mlp(), CE)
    f = opt.model(X)
    (CE(f, Y) + f.square().sum()).backward()
    opt.zero_grad()
    CE(opt.model(X), Y).backward()
    close(measured(opt), truth(opt, CE, X, Y))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(4, 5), nn.Linear(5, V), nn.Linear(5, 2)

    def forward(self, x):
        h = self.body(x).tanh()
        return self.first(h), self.second(h)


def test_an_output_whose_loss_is_not_watched_is_said_once():
    model = cases.seeded(Heads)
    opt = optimizer(model, CE, approx="diag", unsupported="gradient")
    for said in (True, False):
        first, second = model(X)
        (CE(first, Y) + second.square().mean()).backward()
        with (
            pytest.warns(UserWarning, match="depends on an output of the model in another way")
            if said
            else nullcontext()
        ):
            opt.step()
        opt.zero_grad()


SETTINGS = [{}, {"label_smoothing": 0.2}, {"weight": torch.tensor([0.2, 1.0, 3.0])}, {"ignore_index": 1}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"weight": torch.tensor([0.2, 1.0, 3.0])}, {"ignore_index": 1}]
)
@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_what_the_watched_loss_sends_is_known_of_all_its_settings(options, factor, dtype):
    """Two losses of one output, one of them at targets that are nearly met."""
    model = mlp().to(dtype)
    loss = nn.CrossEntropyLoss(**options).to(dtype)
    opt = SecondOrderOptimizer(model, loss_fn=loss, lr=0.0)
    for scale in (1.0, 40.0):
        opt.zero_grad()
        f = model(X.to(dtype)) * scale
        near = f.detach().argmax(-1)
        (factor * (loss(f, near) + 0.3 * loss(f, Y))).backward()
        opt.step()


# ------------------------------------------------------------------------------ how often a loss counts


@pytest.mark.parametrize("trigger", ["module", "cross_entropy"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_losses_of_one_output_by_two_backward_calls_add_up(trigger, kind):
    opt = optimizer(mlp(), CE if trigger == "module" else trigger, curv_type=kind)
    f, other = opt.model(X), (Y + 1) % V
    CE(f, Y).backward(retain_graph=True)
    (0.5 * CE(f, other)).backward()
    close(measured(opt), truth(opt, CE, X, Y, kind) + 0.5 * truth(opt, CE, X, other, kind))


@pytest.mark.parametrize("trigger", ["module", "cross_entropy"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_are_looked_at_before_backward_use_nothing_up(trigger, kind):
    """Gradient norms, input gradients: in each of two micro-batches."""
    opt = optimizer(mlp(), CE if trigger == "module" else trigger, curv_type=kind)
    for part in (slice(0, 3), slice(3, 6)):
        x = X[part].clone().requires_grad_()
        loss = CE(opt.model(x), Y[part]) / 2
        torch.autograd.grad(loss, list(opt.model.parameters()), retain_graph=True)
        torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward()
    close(measured(opt), truth(opt, CE, X, Y, kind))


@pytest.mark.parametrize("penalty", ["inputs", "loss"])
def test_a_penalty_of_derivatives_leaves_the_empirical_fisher_of_the_loss(penalty):
    """The backward that brings the loss's gradients brings those of the penalty too."""
    opt = optimizer(mlp(), CE, curv_type="empirical_fisher", approx="kfac")
    x = X.clone().requires_grad_()
    f = opt.model(x)
    of = f.sum() if penalty == "inputs" else CE(f, Y)
    (slope,) = torch.autograd.grad(of, x, create_graph=True)
    (CE(f, Y) + 5 * slope.square().sum()).backward()
    with pytest.warns(UserWarning, match="ResidualNewton") if penalty == "loss" else nullcontext():
        opt.step()
    expected = curvature(opt.model, CE, [(X, Y)], curv_type="empirical_fisher", approx="kfac").blocks
    for block in opt.engine.blocks:
        close(block.tensors["B"], expected[block.name].tensors["B"])


# -------------------------------------------------------------------------------------- signs of a loss


def weighted(f, weights):
    return (F.cross_entropy(f, Y, reduction="none") * weights).mean()


NEGATIVE = {
    "factor": (lambda loss, f: -loss(f, Y).mean(), lambda rows: rows.mean()),
    "weights": (lambda loss, f: (loss(f, Y) * WEIGHTS).mean(), lambda rows: (rows * WEIGHTS.abs()).mean()),
    "all weights": (lambda loss, f: (-WEIGHTS.abs() * loss(f, Y)).sum(), lambda rows: (rows * WEIGHTS.abs()).sum()),
}


def absolute(reduce):
    class Absolute(nn.Module):
        def forward(self, f, y):
            return reduce(F.cross_entropy(f, y, reduction="none"))

    return Absolute()


@pytest.mark.parametrize("approx", ["full", "kfac", "unit", "diag", "ekfac", "lowrank"])
@pytest.mark.parametrize("name", NEGATIVE)
def test_a_negative_loss_is_refused_with_the_remedy(name, approx):
    loss = nn.CrossEntropyLoss(reduction="none")
    opt = optimizer(mlp(), loss, approx=approx)
    NEGATIVE[name][0](loss, opt.model(X)).backward()
    before = [p.clone() for p in opt.model.parameters()]
    with pytest.raises(RuntimeError, match=r'negative="abs".*negative="model"'):
        opt.step()
    assert all(torch.equal(p, old) for p, old in zip(opt.model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", ["ggn", "fisher"])
@pytest.mark.parametrize("name", NEGATIVE)
def test_absolute_values_are_counted_where_that_is_asked_for(name, kind):
    loss = nn.CrossEntropyLoss(reduction="none")
    opt = optimizer(mlp(), loss, negative="abs", curv_type=kind)
    NEGATIVE[name][0](loss, opt.model(X)).backward()
    close(measured(opt), oracles.ggn(opt.model, absolute(NEGATIVE[name][1]), X, Y, list(opt.model.named_parameters())))


@pytest.mark.parametrize("kind", ["ggn", "fisher", "empirical_fisher"])
@pytest.mark.parametrize("name", NEGATIVE)
def test_the_fisher_of_the_model_ignores_what_the_loss_is_multiplied_by(name, kind):
    """Policy gradients: terms times advantages."""
    loss = nn.CrossEntropyLoss(reduction="none")
    opt = optimizer(mlp(), loss, negative="model", curv_type=kind)
    NEGATIVE[name][0](loss, opt.model(X)).backward()
    close(measured(opt), truth(opt, CE, X, Y, kind))


def test_an_observed_loss_of_negative_weight_is_refused():
    opt = optimizer(mlp(), None)
    f = opt.model(X)
    opt.observe(f, Y, CE, -1.0)
    (-CE(f, Y)).backward()
    with pytest.raises(RuntimeError, match="multiplied by a negative number"):
        opt.step()


def test_what_to_do_with_signs_is_one_of_three():
    with pytest.raises(ValueError, match="negative='flip' is unknown"):
        optimizer(mlp(), CE, negative="flip")


# ------------------------------------------------------------------------------------------ GradScaler


@pytest.mark.parametrize("by", ["module", "cross_entropy"])
def test_a_scaler_that_was_not_named_is_noticed(by):
    loss = CE if by == "module" else by
    scaler = torch.amp.GradScaler("cpu")
    model = mlp().float()
    opt = SecondOrderOptimizer(model, loss_fn=loss)
    scaler.scale(CE(model(X.float()), Y)).backward()
    with pytest.raises(RuntimeError, match="pass it as grad_scaler="):
        scaler.step(opt)
    named = SecondOrderOptimizer(model, loss_fn=loss, grad_scaler=scaler)
    opt.remove()
    named.zero_grad()
    scaler.scale(CE(model(X.float()), Y)).backward()
    scaler.step(named)
    scaler.update()


def test_pending_is_the_sum_of_what_was_measured():
    opt = optimizer(mlp(), CE)
    CE(opt.model(X), Y).backward()
    once = dense(opt, "pending")
    CE(opt.model(X), Y).backward()
    close(dense(opt, "pending"), 2 * once)


@pytest.mark.parametrize("loss", ["another", "negative"])
def test_on_an_accelerator_an_objection_waits_for_the_next_factorisation(loss):
    with assume_accelerator():
        opt = optimizer(mlp(), CE, approx="kfac", refactor_every=3)
        CE(opt.model(X), Y).backward()
        opt.step()
        for _ in range(2):
            opt.zero_grad()
            f = opt.model(X)
            (CE(f, Y) + f.square().sum() if loss == "another" else -CE(f, Y)).backward()
            opt.step()
        opt.zero_grad()
        CE(opt.model(X), Y).backward()
        with pytest.raises(RuntimeError, match="watched loss" if loss == "another" else "negative number"):
            opt.step()


# --------------------------------------------------------------------------- losses in which samples meet


def info_nce(z):
    """Similarities, without those of a view with itself."""
    z = F.normalize(z, dim=-1)
    return (z @ z.mT / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)


class Similarities(nn.Module):
    def __init__(self, model, of):
        super().__init__()
        self.model, self.of = model, of

    def forward(self, x):
        return self.of(self.model(x))


TOGETHER = {
    "info nce": (info_nce, (torch.arange(N) + N // 2) % N, CE),
    "as many classes as samples": (lambda z: z @ cases.randn(V, N, seed=7) + z.mean(), torch.arange(N), CE),
    "other classes": (lambda z: (z - z.mean(0)) @ cases.randn(V, 4, seed=7), torch.arange(N) % 4, CE),
    "squared": (lambda z: z @ z.mT, torch.eye(N, dtype=torch.float64), nn.MSELoss()),
    "classes first": (lambda z: (z - z.mean(0)).mT.reshape(1, V, N), Y.reshape(1, N), CE),
}


@pytest.mark.parametrize("kind", ["ggn", "fisher"])
@pytest.mark.parametrize("name", TOGETHER)
def test_a_batch_may_be_taken_as_one_sample(name, kind):
    of, target, loss = TOGETHER[name]
    body = mlp()
    model = Similarities(body, of)
    opt = optimizer(body, None, curv_type=kind)
    f = of(body(X))
    opt.observe(f, target, loss, samples="batch")
    loss(f, target).backward()
    close(measured(opt), oracles.ggn(model, loss, X, target, list(model.named_parameters())))


def test_a_batch_is_the_only_word_for_samples():
    opt = optimizer(mlp(), None)
    with pytest.raises(ValueError, match=r"samples='all'; pass \"batch\""):
        opt.observe(opt.model(X), Y, CE, samples="all")


SURE = [[-31.57029, 62.26093, -31.06781], [13.95065, -3.05188, -11.82039], [19.41863, -30.07877, 11.84760],
        [-14.60568, 52.21463, -36.93744], [14.78140, -4.24383, -11.46913]]  # fmt: skip


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.7, 3.1])
def test_terms_that_are_sure_and_wrong_leave_the_sign_of_a_named_loss_to_rounding(shift):
    """Of such a row the two largest entries of the gradient are of one size."""
    model = nn.Linear(5, 3, bias=False)
    model.weight.data = torch.tensor(SURE).T + shift
    optimizer = SecondOrderOptimizer(model, lr=1e-30)
    for factor in (1.0, 0.25, 0.1):
        optimizer.zero_grad()
        (factor * nn.functional.cross_entropy(model(torch.eye(5)), torch.tensor([0, 1, 2, 0, 1]))).backward()
        optimizer.step()
    assert optimizer.coverage() == 1.0
