"""State and life: copies, replaced layers, other precisions, two models in one loss, what is said once."""

import copy
import warnings

import cases
import oracles
import pytest
import torch
from measured import close, measured, optimizer
from torch import nn
from torch.nn import functional as F

from torchcurv import SecondOrderOptimizer
from torchcurv.optim import DirectionalNewton

CE = nn.CrossEntropyLoss()
X, Y = cases.randn(8, 4).float(), torch.arange(8) % 3


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def train(model, opt, steps=1, loss=F.cross_entropy):
    for _ in range(steps):
        opt.zero_grad()
        loss(model(X.to(next(model.parameters()).dtype)), Y).backward()
        opt.step()


def hooks_of(*modules):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for module in modules for m in module.modules())


@pytest.mark.parametrize("order", ["model optimizer loss", "loss model optimizer", "model loss optimizer"])
def test_copies_of_copies_own_their_hooks_and_work(order):
    model, loss = mlp(), nn.CrossEntropyLoss()
    parts = {"model": model, "loss": loss, "optimizer": SecondOrderOptimizer(model, loss_fn=loss)}
    first = hooks_of(model, loss)
    train(model, parts["optimizer"], 1, loss)
    for _ in range(3):
        chosen = order.split()
        parts = dict(zip(chosen, copy.deepcopy(tuple(parts[name] for name in chosen)), strict=True))
        assert hooks_of(parts["model"], parts["loss"]) == first
        train(parts["model"], parts["optimizer"], 2, parts["loss"])
    parts["optimizer"].remove()
    assert hooks_of(parts["model"], parts["loss"]) == 0


def test_a_copy_without_its_loss_goes_on_with_the_loss_that_is_there():
    model, loss = mlp(), nn.CrossEntropyLoss()
    opt = SecondOrderOptimizer(model, loss_fn=loss)
    train(model, opt, 1, loss)
    other, again = copy.deepcopy((model, opt))
    train(model, opt, 2, loss)
    train(other, again, 2, loss)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("approx", ["kfac", "diag"])
def test_a_layer_that_takes_the_place_of_another_is_trained(approx):
    model = mlp()
    opt = SecondOrderOptimizer(model, approx=approx)
    train(model, opt, 2)
    model[2] = nn.Linear(6, 3)
    opt.add_param_group({"params": model[2].parameters()})
    before = [p.clone() for p in model[2].parameters()]
    train(model, opt, 2)
    assert all(not torch.equal(p, old) for p, old in zip(model[2].parameters(), before, strict=True))
    assert "2.weight" in opt.summary()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("approx", ["kfac", "ekfac", "diag", "unit", "block", "full", "lowrank"])
def test_a_model_may_change_its_precision(approx, dtype):
    model = mlp()
    opt = SecondOrderOptimizer(model, approx=approx)
    train(model, opt, 2)
    model.to(dtype)
    train(model, opt, 3)
    wide = torch.promote_types(dtype, torch.float32)
    held = [x for block in opt.engine.blocks for x in block.tensors.values() if isinstance(x, torch.Tensor)]
    assert {x.dtype for x in held} == {wide}
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())


def test_a_scripted_model_is_refused_with_a_sentence():
    model = mlp()
    opt = SecondOrderOptimizer(model)
    with warnings.catch_warnings(), pytest.raises(AttributeError, match="script the model before the optimizer"):
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(model)
    opt.remove()


class Odd(nn.Module):
    """Its parameter is used in a way that no layer explains."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.eye(4))

    def forward(self, x):
        return torch.linalg.matrix_exp(self.w)[0] * x


def test_blocks_that_turn_out_to_have_no_curvature_are_said_once_and_listed():
    torch.manual_seed(0)
    model = nn.Sequential(Odd(), nn.Linear(4, 3))
    opt = SecondOrderOptimizer(model, unsupported="gradient")
    with pytest.warns(UserWarning, match=r"1 of 2 blocks train with the plain gradient .*: 0\.w\."):
        train(model, opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, 3)
    line = next(line for line in opt.summary().splitlines() if line.startswith("0.w"))
    assert "plain gradient" in line and "kfac" not in line


def test_options_of_the_whole_optimizer_are_refused_in_a_group():
    model = mlp()
    with pytest.raises(ValueError, match="unknown option 'criterion'"):
        DirectionalNewton(
            model, [{"params": model.parameters(), "criterion": len}], criterion=lambda e: e, damping=lambda *a: a[0]
        )
    with pytest.raises(ValueError, match="step_rule in a parameter group: it belongs to the optimizer as a whole"):
        SecondOrderOptimizer(model, [{"params": model.parameters(), "step_rule": "quadratic"}])


def test_metrics_after_a_step_that_was_rejected():
    model = mlp()
    opt = SecondOrderOptimizer(model, step_rule="quadratic", damping_rule="lm")
    scales = iter([1, 1e3] * 20)

    def closure():
        output = model(X)
        return F.cross_entropy(output, Y) * next(scales), output

    while not opt.metrics().get("rejected_steps"):
        opt.step(closure)
    assert opt.metrics()["step_norm"] >= 0


def test_complex_parameters_train_in_a_group_without_curvature():
    class Rotated(nn.Module):
        def __init__(self):
            super().__init__()
            self.line, self.c = nn.Linear(4, 3), nn.Parameter(torch.eye(4, dtype=torch.complex64))

        def forward(self, x):
            return self.line((x.to(torch.complex64) @ self.c).abs())

    model = Rotated()
    with pytest.raises(RuntimeError, match="approx=None"):
        train(model, SecondOrderOptimizer(model))
    model = Rotated()
    opt = SecondOrderOptimizer(model, [{"params": model.line.parameters()}, {"params": [model.c], "approx": None}])
    train(model, opt, 2)
    assert not torch.equal(model.c, torch.eye(4, dtype=torch.complex64))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["ggn", "empirical_fisher"])
def test_the_loss_may_go_through_another_model_with_batch_statistics(kind, affine):
    """A generator's goes through its discriminator; the statistics count as constants."""
    cases_of = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=affine), nn.Tanh(), nn.Linear(5, 3))
    judge = cases.seeded(lambda: cases_of)
    model, x = cases.seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh())), cases.randn(8, 4)
    opt = optimizer(model, CE, curv_type=kind)
    with torch.no_grad():
        h = judge[0](model(x))
    CE(judge(model(x)), Y).backward()
    norm = judge[1]

    class Frozen(nn.Module):
        """The same function of each sample, at the statistics of this batch."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            z = (judge[0](self.model(x)) - h.mean(0)) / (h.var(0, correction=0) + norm.eps).sqrt()
            return judge[3](judge[2](z * norm.weight + norm.bias if affine else z))

    frozen = Frozen()
    truth = oracles.ggn if kind == "ggn" else oracles.empirical_fisher
    named = [(name, p) for name, p in frozen.named_parameters() if name.startswith("model.")]
    close(measured(opt), truth(frozen, CE, x, Y, named))


def test_two_networks_play_against_each_other():
    torch.manual_seed(0)
    make, bce = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), nn.BCEWithLogitsLoss()
    judge = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    of_make, of_judge = SecondOrderOptimizer(make, loss_fn=bce), SecondOrderOptimizer(judge, loss_fn=bce)
    real, fake = torch.ones(8, 1), torch.zeros(8, 1)
    for _ in range(4):
        noise = torch.randn(8, 4)
        of_judge.zero_grad()
        bce(judge(X), real).backward()
        bce(judge(make(noise).detach()), fake).backward()
        of_judge.step()
        of_make.zero_grad()
        bce(judge(make(noise)), real).backward()
        of_make.step()
    assert all(p.isfinite().all() for p in [*make.parameters(), *judge.parameters()])


@pytest.mark.parametrize("options", [{"approx": "full", "rows_limit": 4}, {"approx": "full"}, {"approx": "kfac"}])
def test_a_copy_after_a_layer_was_frozen_and_before_the_next_step(options):
    """What was saved of the block that was is none of the block that is."""
    model = mlp()
    opt = SecondOrderOptimizer(model, model.parameters(), **options)
    train(model, opt, 2)
    model[2].requires_grad_(False)
    opt.zero_grad()
    other, again = copy.deepcopy((model, opt))
    train(model, opt, 2)
    train(other, again, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
