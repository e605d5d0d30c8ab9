"""State and life: copies, replaced layers, other precisions, two models in one loss, what is said once."""

import copy
import pickle
import warnings

import cases
import oracles
import pytest
import torch
from measured import close, measured, optimizer
from torch import nn
from torch.nn import functional as F

import torchcurv
from torchcurv import SecondOrderOptimizer
from torchcurv.curv.statistics import gram
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
    """It uses a weight besides calling its layer."""

    def __init__(self):
        super().__init__()
        self.w = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.w(x).tanh() + F.linear(x, self.w.weight)


def test_blocks_that_turn_out_to_have_no_curvature_are_said_once_and_listed():
    torch.manual_seed(0)
    model = nn.Sequential(Odd(), nn.Linear(4, 3))
    opt = SecondOrderOptimizer(model, unsupported="gradient")
    with pytest.warns(UserWarning, match=r"16 of 31 parameters train with the plain gradient .*: 0\.w\."):
        train(model, opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, 3)
    line = next(line for line in opt.summary().splitlines() if line.startswith("0.w"))
    assert "plain gradient: used outside of its layer" in line and "kfac" not in line
    assert opt.coverage() == 15 / 31


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
    with pytest.raises(ValueError, match=r"are complex .* approx=None"):
        SecondOrderOptimizer(model)
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


class Complex(nn.Module):
    """A complex layer below a real one."""

    def __init__(self):
        super().__init__()
        self.low, self.head = nn.Linear(4, 3, dtype=torch.complex64), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.low(x.to(torch.complex64)).abs())


def test_complex_layers_are_refused_at_once_or_train_with_the_plain_gradient():
    model = Complex()
    with pytest.raises(ValueError, match=r"'low' .* are complex .* approx=None"):
        SecondOrderOptimizer(model)
    with pytest.raises(ValueError, match=r"'low' .* are complex"):
        torchcurv.curvature(model, CE, [(X, Y)])
    opt = SecondOrderOptimizer(model, unsupported="gradient", lr=0.1)
    before = model.low.weight.detach().clone()
    F.cross_entropy(model(X), Y).backward()
    grad = model.low.weight.grad.clone()
    with pytest.warns(UserWarning, match=r"15 of 27 parameters train with the plain gradient .*: low\.bias, low\.w"):
        opt.step()
    torch.testing.assert_close(model.low.weight.detach(), before - 0.1 * grad)
    lines = {line.split()[0]: line for line in opt.summary().splitlines()}
    assert "plain gradient: its parameters are complex" in lines["low.weight"] and opt.coverage() == 12 / 27
    assert "kfac" in lines["head.weight"]


@pytest.mark.parametrize("approx", ["kfac", "ekfac", "diag", "unit", "block", "full"])
@pytest.mark.parametrize(("first", "then"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_model_may_change_its_precision_between_backward_and_step(approx, first, then):
    """The first step, and one that has an average."""
    model, twin = mlp().double(), mlp().double()
    opt, other = (SecondOrderOptimizer(m, approx=approx) for m in (model, twin))
    for _ in range(2):
        for m in (model, twin):
            m.zero_grad()
        model.to(first)
        F.cross_entropy(model(X.to(first)), Y).backward()
        model.to(then)
        opt.step()
        F.cross_entropy(twin(X.double()), Y).backward()
        other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.dtype == then
        torch.testing.assert_close(p.double(), q, rtol=1e-3, atol=1e-4)  # float32, through the inverse at λ = 0.01


@pytest.mark.parametrize("options", [{"approx": "lowrank"}, {"approx": "full", "rows_limit": 1, "ema_decay": 0.0}])
def test_what_is_kept_for_the_step_in_another_precision_is_refused(options):
    model = mlp()
    opt = SecondOrderOptimizer(model, update_every=1, refactor_every=1, **options)
    train(model, opt)
    opt.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    model.double()
    with pytest.raises(RuntimeError, match=r"moved to torch.float64 on cpu between backward\(\) and step\(\)"):
        opt.step()
    train(model, opt, 2)


@pytest.mark.parametrize("what", ["step", "zero_grad"])
def test_compiled_methods_do_what_they_do_uncompiled(what):
    """What the compiler traces of an optimizer may lose the attributes that it writes."""
    (model, opt), (twin, other) = ((m, SecondOrderOptimizer(m, lr=0.1, momentum=0.9)) for m in (mlp(), mlp()))
    called = {"step": opt.step, "zero_grad": opt.zero_grad}
    called[what] = torch.compile(called[what], backend="eager")
    for _ in range(4):
        called["zero_grad"]()
        F.cross_entropy(model(X), Y).backward()
        called["step"]()
        train(twin, other)
    assert opt.metrics()["step"] == 4 and opt.metrics()["measurements"] == other.metrics()["measurements"]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_state_goes_around_after_a_layer_was_replaced():
    model = mlp()
    opt = SecondOrderOptimizer(model, momentum=0.9, lr=0.1)
    train(model, opt, 2)
    model[2] = nn.Linear(6, 3)
    opt.add_param_group({"params": model[2].parameters()})
    train(model, opt, 2)
    other, again = copy.deepcopy((model, opt))
    third = copy.deepcopy(model)
    saved = pickle.loads(pickle.dumps(opt.state_dict()))
    opt.load_state_dict(copy.deepcopy(saved))
    for m, o in ((model, opt), (other, again)):
        train(m, o, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    gone = [nn.Parameter(torch.zeros(3, 6)), nn.Parameter(torch.zeros(3))]
    with pytest.raises(ValueError, match="not parameters of the model"):
        SecondOrderOptimizer(third, [{"params": [*third[0].parameters(), *gone]}])


@pytest.mark.parametrize("all_of_it", [True, False])
def test_a_model_that_has_other_parameters_now_is_said(all_of_it):
    model = mlp()
    opt = SecondOrderOptimizer(model)
    train(model, opt, 2)
    model[2] = nn.Linear(6, 3)
    if not all_of_it:
        train(model, opt, 2)  # as in torch.optim: what is in no group is not trained
        return
    model[0] = nn.Linear(4, 6)
    with pytest.raises(RuntimeError, match="none of the parameters of the groups belongs to the model any longer"):
        train(model, opt)


def test_sharded_parameters_are_refused_by_their_name():
    """Those of fully_shard are DTensors: a type of this name stands for them, as no process group is needed for it."""

    class DTensor(nn.Parameter):
        pass

    model = mlp()
    model[2].weight = DTensor(model[2].weight.detach())
    with pytest.raises(ValueError, match=r"'2' .* DTensors \(fully_shard"):
        SecondOrderOptimizer(model)
    opt = SecondOrderOptimizer(
        model, [{"params": model[0].parameters()}, {"params": model[2].parameters(), "approx": None}]
    )
    train(model, opt, 2)


@pytest.mark.parametrize("curv", [{}, {"approx": "ekfac"}, {"curv_type": "input"}])
def test_adaptive_moves_do_not_depend_on_the_triangle_that_is_not_read(curv, monkeypatch):
    """Gram matrices from a size on fill their lower triangle alone."""
    found = []
    for smallest in (512, 1):
        monkeypatch.setattr(gram, "SYMMETRIC_FROM", smallest)
        monkeypatch.setattr(gram, "COLUMNS", 2)
        model = mlp().double()
        opt = SecondOrderOptimizer(model, update_every="adaptive", refresh_warmup=0, lr=0.1, **curv)
        train(model, opt, 3)
        found.append({(b.name, key): p.change for b in opt.engine.blocks for key, p in b.refresh.paces.items()})
    assert found[0].keys() == found[1].keys()
    for key, change in found[0].items():
        assert found[1][key] == pytest.approx(change, rel=1e-9)


def test_a_convolutional_generator_trains_through_its_discriminator():
    torch.manual_seed(0)
    make = nn.Sequential(
        nn.ConvTranspose2d(6, 8, 4, 1, 0, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
        nn.ConvTranspose2d(8, 1, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip
    judge = nn.Sequential(
        nn.Conv2d(1, 8, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True), nn.Conv2d(8, 8, 3, 1, 1, bias=False),
        nn.BatchNorm2d(8), nn.LeakyReLU(0.2, True), nn.Conv2d(8, 1, 4, 1, 0, bias=False),
    )  # fmt: skip
    bce = nn.BCEWithLogitsLoss()
    of_make, of_judge = SecondOrderOptimizer(make, loss_fn=bce), SecondOrderOptimizer(judge, loss_fn=bce)
    for _ in range(4):
        of_judge.zero_grad()
        fake = make(torch.randn(8, 6, 1, 1))
        bce(judge(torch.randn(8, 1, 8, 8).tanh()).view(-1), torch.ones(8)).backward()
        bce(judge(fake.detach()).view(-1), torch.zeros(8)).backward()
        of_judge.step()
        of_make.zero_grad()
        bce(judge(fake).view(-1), torch.ones(8)).backward()
        of_make.step()
    assert of_make.metrics()["measurements"] == 4 * 3 and of_judge.metrics()["measurements"] == 4 * 4
    assert all(p.isfinite().all() for p in [*make.parameters(), *judge.parameters()])


def test_warnings_of_a_step_point_at_the_line_that_calls_it():
    torch.manual_seed(0)
    model = nn.Sequential(Odd(), nn.Linear(4, 3))
    opt = SecondOrderOptimizer(model, unsupported="gradient")
    F.cross_entropy(model(X), Y).backward()
    with pytest.warns(UserWarning, match="plain gradient") as said:
        opt.step()
    assert {one.filename for one in said} == {__file__}


def test_warnings_of_a_residual_step_point_at_the_line_that_calls_it():
    model = mlp()
    opt = torchcurv.ResidualNewton(model)
    with pytest.warns(UserWarning, match="not finite") as said:
        opt.step(lambda: model(X) * torch.nan)
    assert {one.filename for one in said} == {__file__}


def test_coverage_is_the_share_of_parameters_with_a_curvature():
    model = nn.Sequential(Odd(), nn.Linear(4, 3))
    assert SecondOrderOptimizer(model).coverage() == 1.0
    groups = [{"params": model[0].parameters(), "approx": None}, {"params": model[1].parameters()}]
    assert SecondOrderOptimizer(model, groups).coverage() == pytest.approx(15 / 31)
    opt = SecondOrderOptimizer(model, unsupported="gradient")
    F.cross_entropy(model(X), Y).backward()
    with pytest.warns(UserWarning, match="plain gradient"):
        opt.step()
    assert opt.coverage() == pytest.approx(15 / 31)


class OwnLoss(nn.Module):
    """It computes its loss, and adds positions, which a module returns, outside of that module."""

    class Positions(nn.Embedding):
        def forward(self, x):
            return self.weight[: x.shape[1]]

    def __init__(self):
        super().__init__()
        self.words, self.positions, self.head = nn.Embedding(7, 4), self.Positions(6, 4), nn.Linear(4, 7)

    def forward(self, x, labels):
        logits = self.head((self.words(x) + self.positions(x)).tanh())
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits, "more": logits * 2}


def test_a_loss_inside_the_model_is_seen_when_only_a_bare_parameter_is_due():
    """At intervals, the blocks that a first pass rebuilds measure in the second, and nothing else does."""
    torch.manual_seed(0)
    model, x = OwnLoss(), torch.randint(7, (5, 4))
    opt = SecondOrderOptimizer(model, update_every=10, refactor_every=10)
    losses = []
    for _ in range(15):
        opt.zero_grad()
        loss = model(x, x)["loss"]
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and opt.coverage() == 1.0
    assert all(block.average.known is None or bool(block.average.known) for block in opt.blocks.values())


class Masked(nn.Module):
    """A token that takes the place of words, if some are masked."""

    def __init__(self):
        super().__init__()
        self.first, self.mask, self.head = nn.Linear(4, 6), nn.Parameter(torch.zeros(6)), nn.Linear(6, 3)
        self.masks = False

    def forward(self, x):
        h = self.first(x).tanh()
        return self.head(h + self.mask if self.masks else h)


def test_a_parameter_without_a_gradient_keeps_no_hook_on_and_is_measured_once_it_has_one():
    torch.manual_seed(0)
    model = Masked()
    opt = SecondOrderOptimizer(model, update_every=5, refactor_every=5)
    due = []
    for step in range(14):
        model.masks = step >= 7
        due.append(len(opt.engine.recorder.due))
        opt.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        before = model.mask.detach().clone()
        opt.step()
        moved = float((model.mask.detach() - before).norm())
        assert (moved > 0) == model.masks and moved <= 0.1 + 1e-6  # lr times a length of 1 at the most
    assert due == [3, 0, 0, 0, 0, 3, 0, 0, 1, 0, 3, 0, 0, 0]  # and then with the others
    assert opt.coverage() == 1.0


class Past(nn.Module):
    """A weight that is used past its module, and has no gradient at first."""

    def __init__(self):
        super().__init__()
        self.first, self.past, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.gate = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        h = self.first(x).tanh()
        return self.head(h + self.gate * F.linear(h, self.past.weight, self.past.bias + 0))


def test_odd_weights_that_first_have_no_gradient_are_measured_when_nothing_else_is_due():
    torch.manual_seed(0)
    model = Past()
    opt = SecondOrderOptimizer(model, update_every=10, refactor_every=10)
    train(model, opt, 14)
    assert opt.coverage() == 1.0
    assert all(block.factor is not None for block in opt.blocks.values())
