"""Step control: lengths and damping from the quadratic model, schedules, norms, warm-up and metrics."""

import copy
import math
from itertools import pairwise

import cases
import measured
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from torchcurv import Preconditioner, SecondOrderOptimizer, VIOptimizer, curvature
from torchcurv.curv.block.reading import effective_dimension_of
from torchcurv.curv.capture.assemble import StatisticsAssembler
from torchcurv.optim.control import damping_rules
from torchcurv.optim.control.quadratic_model import Evaluation, sample_order
from torchcurv.optim.control.step_rules import RIDGE, minimiser, shifts, with_bounded_last
from torchcurv.optim.update import levenberg_marquardt, scale_within

DATA = [(cases.randn(6, 4, seed=t), torch.arange(6) % 3) for t in range(5)]
EACH = {"update_every": 1, "refactor_every": 1}
EXACT = {"approx": "full", "samples": None, "damping_type": "exact", "ema_decay": 0.0, "model_samples": None}


def interval(optimizer, key):
    """How often the blocks of the first group are measured, or factorised, at the next step."""
    return optimizer.engine.schedule.next_turn(0, key, optimizer.engine.step) - optimizer.engine.step


def make_model(dropout=0.0, norm=False):
    def build():
        between = nn.BatchNorm1d(5) if norm else nn.Tanh()
        return nn.Sequential(nn.Linear(4, 5), between, nn.Dropout(dropout), nn.Linear(5, 3)).double()

    return cases.seeded(build)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors]).clone()


def closure(model, x, y, loss=F.cross_entropy):
    def evaluate():
        output = model(x)
        return loss(output, y), output

    return evaluate


def gradient(model, x, y):
    return flat(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())))


def ggn(model, x, y):
    return oracles.ggn(model, nn.CrossEntropyLoss(), x, y, list(model.named_parameters()))


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def directions(model, count):
    vectors = [[cases.randn(*p.shape, seed=10 * k + j) for j, p in enumerate(model.parameters())] for k in range(count)]
    return [dict(zip(model.parameters(), vector, strict=True)) for vector in vectors]


# ------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("samples", [1, 4, 512, None])
def test_the_model_is_made_of_some_samples(samples):
    model, (x, y) = make_model(), DATA[0]
    evaluation = Evaluation(model, closure(model, x, y), samples, seed=3)
    got = evaluation.curvature(directions(model, 2), {p: p.detach() for p in model.parameters()})
    d = torch.stack([flat(vector.values()) for vector in directions(model, 2)])
    part = slice(None) if samples in (512, None) else sample_order(6, 3)[:samples]
    measured.close(got, d @ ggn(model, x[part], y[part]) @ d.T)


@pytest.mark.parametrize("kind", ["dropout", "batch norm", "called twice", "its own output", "edited", "autocast"])
def test_the_whole_batch_counts_where_a_part_would_be_another_function(kind):
    model, (x, y) = make_model(0.5 if kind == "dropout" else 0.0, norm=kind == "batch norm"), DATA[0]
    model.train(kind in ("dropout", "batch norm"))

    def evaluate():
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            output = model(x)
        if kind == "called twice":
            output = output + model(x)
        elif kind == "its own output":
            output = 2 * output
        elif kind == "edited":
            output *= 0.1
        return F.cross_entropy(output, y), output

    at, d = {p: p.detach() for p in model.parameters()}, directions(model, 1)
    torch.manual_seed(3)
    whole = Evaluation(model, evaluate).curvature(d, at)
    torch.manual_seed(3)
    part = Evaluation(model, evaluate, len(x) // 2).curvature(d, at)
    assert torch.equal(whole, part)
    model.eval()
    if kind in ("edited", "its own output"):
        C = ggn(nn.Sequential(model, Times(0.1 if kind == "edited" else 2)), x, y)
        measured.close(whole, (flat(d[0].values()) @ C @ flat(d[0].values())).reshape(1, 1))


def test_what_runs_again_has_the_same_draws_and_leaves_generators_and_buffers_alone():
    model, (x, y) = make_model(dropout=0.5, norm=True), DATA[0]
    model.train()
    torch.manual_seed(5)
    evaluation = Evaluation(model, closure(model, x, y), 1.0)
    buffers, state = [b.clone() for b in model.buffers()], torch.get_rng_state()
    assert torch.equal(evaluation.loss_now(), evaluation.loss.detach())
    evaluation.curvature(directions(model, 1), {p: p.detach() for p in model.parameters()})
    assert all(torch.equal(b, before) for b, before in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        model[0].weight += 1
    assert not torch.equal(evaluation.loss_now(), evaluation.loss.detach())


def test_buffers_that_a_pass_replaces_come_back():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(4, 3, dtype=torch.float64)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return super().forward(x)

    model, (x, y) = Counting(), DATA[0]
    evaluation = Evaluation(model, closure(model, x, y))
    evaluation.curvature(directions(model, 2), {p: p.detach() for p in model.parameters()})
    evaluation.loss_now()
    assert model.calls == 1


def losses_and_slopes(model, x, y, d):
    """ℓ_i and ∇ℓ_i·d of every sample."""
    each = [F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) for i in range(len(x))]
    slopes = [flat(torch.autograd.grad(loss, list(model.parameters()))) @ flat(d.values()) for loss in each]
    return torch.stack([loss.detach() for loss in each]), torch.stack(slopes)


@pytest.mark.parametrize("samples", [1, 4, 6, None])
@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize("hooks", [False, True])
def test_the_change_of_a_loss_is_of_first_order_that_of_the_batch_and_else_that_of_its_part(samples, penalty, hooks):
    model, (x, y) = make_model(), DATA[0]
    if hooks:
        model.register_forward_pre_hook(lambda _, args: (2 * args[0],))
        model.register_forward_hook(lambda _, args, output: output.sin())

    def evaluate():
        output = model(x)
        loss = F.cross_entropy(output, y)
        return loss + penalty * sum(p.square().sum() for p in model.parameters()) if penalty else loss, output

    (d,), at = directions(model, 1), {p: p.detach().clone() for p in model.parameters()}
    evaluation = Evaluation(model, evaluate, samples)
    evaluation.backward()
    slope = sum((p.grad * d[p]).sum() for p in d)
    before, slopes = losses_and_slopes(model, x, y, d)
    with torch.no_grad():
        for p in d:
            p += d[p]
    product, change = evaluation.actual_change(d, at, slope)
    after, _ = losses_and_slopes(model, x, y, d)
    if penalty or samples in (6, None):
        expected = evaluate()[0].detach() - evaluation.loss.detach()
    else:
        expected = slope + (after - before - slopes)[evaluation.part].mean()
    torch.testing.assert_close(change, expected)
    for p in d:
        p.data.copy_(at[p])
    if not hooks:
        part = slice(None) if evaluation.part is None else evaluation.part
        C = ggn(model, x[part], y[part])
        torch.testing.assert_close(product, flat(d.values()) @ C @ flat(d.values()))


@pytest.mark.parametrize("trigger", ["module", "name", "observe", "sum", "weights"])
def test_factors_are_made_of_as_many_samples_as_they_need(trigger):
    """Of 16 (4 + 1) = 80 of 200."""
    model, x, y = cases.seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()), None, None
    x, y = cases.randn(200, 4), torch.arange(200) % 3
    weight = torch.tensor([0.5, 1.0, 2.0]).double() if trigger == "weights" else None
    loss = nn.CrossEntropyLoss(weight, reduction="sum" if trigger == "sum" else "mean")
    options = {"samples": None, "damping_type": "exact"}
    optimizer = SecondOrderOptimizer(
        model, loss_fn={"name": "cross_entropy", "observe": None}.get(trigger, loss), step_rule="quadratic",
        model_samples=7, **options,
    )  # fmt: skip
    total, part = nn.CrossEntropyLoss(weight, reduction="sum"), sample_order(200, 0)[:80]
    expected = {
        block.name: curvature(model, total, [(x[part], y[part])], params=block.params, **options).to_dense()
        for block in optimizer.engine.blocks
    }

    def evaluate():
        output = model(x)
        if trigger == "observe":
            optimizer.observe(output, y, loss)
        return loss(output, y), output

    optimizer.step(evaluate)
    terms = {"sum": 1, "weights": float(weight[y].sum()) if weight is not None else 1}.get(trigger, 200)
    for block in optimizer.engine.blocks:
        truth = expected[block.name]
        scale = 200 / 80 / terms
        vectors = torch.eye(len(truth), dtype=truth.dtype)
        got = torch.stack([cat(block, v) for v in vectors])
        torch.testing.assert_close(got @ (scale * truth + 0.01 * vectors), vectors, rtol=1e-5, atol=1e-6)


def test_an_output_that_is_flattened_to_rows_is_cut_by_samples():
    """16 (4 + 1) rows are those of 40 samples with two positions each."""
    directions = []
    for part in (torch.arange(200), sample_order(200, 0)[:40]):
        model = cases.seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double())
        x, y, loss = cases.randn(200, 2, 4)[part], (torch.arange(400) % 3).reshape(200, 2)[part], nn.CrossEntropyLoss()
        optimizer = SecondOrderOptimizer(model, loss_fn=loss, step_rule="quadratic", model_samples=7, samples=None)

        def evaluate(model=model, x=x, y=y, loss=loss):
            output = model(x)
            return loss(output.view(-1, 3), y.flatten()), output

        optimizer.step(evaluate)
        gradients = {p: cases.randn(*p.shape, seed=k) for k, p in enumerate(model.parameters())}
        directions.append(flat(optimizer.engine.precondition(gradients).values()))
    torch.testing.assert_close(*directions)


def cat(block, v):
    """(C + 0.01)^-1 v by the factor of a block, in the order of its parameters."""
    given = v.split([p.numel() for p in block.params])
    pieces = [piece.of(part.reshape(p.shape)) for piece, p, part in zip(block.pieces, block.params, given, strict=True)]
    return torch.cat([x.flatten() for x in block.solve(pieces, 0.01)])


@pytest.mark.parametrize("kind", ["small batch", "model_samples", "empirical_fisher", "dropout", "diag"])
def test_factors_are_made_of_all_samples_where_a_part_is_not_enough_or_not_possible(kind):
    n = 150 if kind == "small batch" else 200
    model, x, y = make_model(0.5 if kind == "dropout" else 0.0), cases.randn(n, 4), torch.arange(n) % 3
    options = {"curv_type": kind} if kind == "empirical_fisher" else {"approx": kind} if kind == "diag" else {}
    optimizer = SecondOrderOptimizer(
        model, step_rule="quadratic", model_samples=None if kind == "model_samples" else 7, **options
    )
    seen = []
    deliver = StatisticsAssembler.deliver
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            StatisticsAssembler, "deliver", lambda self, *a, **k: (seen.append(self.n), deliver(self, *a, **k))[1]
        )
        optimizer.step(closure(model, x, y))
    assert seen and set(seen) == {n}


CONTROL = {"step_rule": "quadratic", "damping_rule": "lm", "model_samples": 16}


class Clips(nn.Module):
    """Values of every sample as `kind` takes them: in ways that a part of the arguments would change."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(4, 3).double()
        self.register_buffer("scale", torch.linspace(1, 2, 100).double()[:, None])
        self.x = cases.randn(100, 4)

    def forward(self, x, more=None):
        if self.kind == "time first":
            return self.layer(x).mean(0)
        if self.kind == "own data":
            return self.layer(self.x) + x.sum()
        if self.kind == "count":
            return self.layer(x.reshape(more, 4))
        if self.kind == "buffer":
            return self.layer(x) * self.scale
        return self.layer(more[x])  # a table that is as long as the batch


def test_arguments_with_the_batch_in_another_dimension_are_not_cut():
    model, x, y = cases.seeded(lambda: Clips("time first")), cases.randn(100, 100, 4), torch.arange(100) % 3
    assert Evaluation(model, lambda: F.cross_entropy(model(x), y), 16).part is None


@pytest.mark.parametrize("kind", ["own data", "count", "buffer", "table"])
def test_a_model_whose_arguments_cannot_be_cut_runs_on_all_of_them(kind):
    model, y = cases.seeded(lambda: Clips(kind)), torch.arange(100) % 3
    given = {
        "own data": (torch.zeros(3),), "count": (cases.randn(100, 4), 100),
        "buffer": (cases.randn(100, 4),), "table": (torch.arange(100), cases.randn(100, 4)),
    }[kind]  # fmt: skip
    evaluation = Evaluation(model, lambda: F.cross_entropy(model(*given), y), 16)
    assert evaluation.part is None and evaluation.share == 1
    whole = SecondOrderOptimizer(model, **{**CONTROL, "model_samples": None})
    part = SecondOrderOptimizer(twin := copy.deepcopy(model), **CONTROL)
    for optimizer, own in ((whole, model), (part, twin)):
        for _ in range(4):
            optimizer.step(lambda own=own: F.cross_entropy(own(*given), y))
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


def test_whether_arguments_can_be_cut_is_tried_once_for_their_shapes():
    model, known = make_model(), {}
    for n, entries in ((20, 1), (20, 1), (30, 2), (4, 2)):
        Evaluation(model, closure(model, cases.randn(n, 4), torch.arange(n) % 3), 8, known=known)
        assert len(known) == entries and all(known.values())


def test_buffers_that_the_backward_pass_needs_stay_as_they_are():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("factor", torch.tensor(2.0))

        def forward(self, x):
            return self.layer(x) * self.factor

    models = [
        nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3).eval(), nn.Tanh(), nn.Linear(3, 3)).double(),
        nn.Sequential(Scaled(), nn.Linear(3, 3)).double(),
    ]
    for model in models:
        optimizer, buffers = SecondOrderOptimizer(model, **CONTROL), list(model.buffers())
        x, y = cases.randn(200, 4), torch.arange(200) % 3
        losses = [float(optimizer.step(closure(model, x, y))) for _ in range(7)]
        assert losses[-1] < losses[0] and all(a is b for a, b in zip(model.buffers(), buffers, strict=True))


def test_samples_that_do_not_count_may_come_first():
    model, x, y = make_model(), cases.randn(200, 4), torch.arange(200) % 3
    y[:60] = -100
    optimizer = SecondOrderOptimizer(model, **CONTROL)
    losses = [float(optimizer.step(closure(model, x, y))) for _ in range(9)]
    assert max(losses) <= losses[0]


@pytest.mark.parametrize("kind", ["plain", "penalty", "weight of the loss", "own output"])
def test_gradients_below_the_output_are_those_of_the_loss(kind):
    model, (x, y), weight = make_model(), DATA[0], nn.Parameter(torch.ones(3).double())

    def evaluate():
        output = model(x) * 2 if kind == "own output" else model(x)
        loss = F.cross_entropy(output * weight if kind == "weight of the loss" else output, y)
        return (loss + model[0].weight.square().sum() if kind == "penalty" else loss), output

    leaves = [*model.parameters(), weight]
    expected = torch.autograd.grad(evaluate()[0], leaves, allow_unused=True)
    for measured_now in (True, False):
        evaluation = Evaluation(model, evaluate)
        evaluation.backward(measured_now)
        for leaf, gradient in zip(leaves, expected, strict=True):
            assert (leaf.grad is None) == (gradient is None) and (gradient is None or torch.equal(leaf.grad, gradient))
            leaf.grad = None
        assert evaluation.curvature(directions(model, 1), {p: p.detach() for p in model.parameters()}) > 0


def test_a_second_output_of_one_node_is_another_way_to_the_loss():
    model, x, y = nn.Linear(4, 6).double(), cases.randn(40, 4), torch.arange(40) % 3

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = model, None

        def forward(self, x):
            first, self.other = self.layer(x).split(3, 1)
            return first

    split = Split()
    evaluation = Evaluation(split, lambda: F.cross_entropy(split(x), y) + split.other.square().mean(), 8)
    at = {p: p.detach().clone() for p in split.parameters()}
    (d,) = directions(split, 1)
    with torch.no_grad():
        for p in d:
            p += d[p]
    change = evaluation.actual_change(d, at, torch.zeros(()).double())[1]
    expected = F.cross_entropy(split(x), y) + split.other.square().mean() - evaluation.loss
    torch.testing.assert_close(change, expected.detach())


def test_an_empty_batch_changes_nothing():
    model, x, y = make_model(), cases.randn(200, 4), torch.arange(200) % 3
    optimizer = SecondOrderOptimizer(model, **CONTROL, momentum=0.0)
    for n in (200, 200, 0):
        before = flat(model.parameters())
        optimizer.step(lambda n=n: F.cross_entropy(model(x[:n]), y[:n], reduction="sum") / 200)
    assert torch.equal(flat(model.parameters()), before)


def test_micro_batches_need_one_output():
    model, (x, y) = make_model(), DATA[0]

    def parts():
        return [model(x[:3]), model(x[3:])]

    def joined():
        output = torch.cat(parts())
        return F.cross_entropy(output, y), output

    optimizer = SecondOrderOptimizer(model, step_rule="quadratic", **EXACT)
    with pytest.raises(TypeError, match="called the model 2 times"):
        optimizer.step(lambda: sum(F.cross_entropy(o, t) / 2 for o, t in zip(parts(), (y[:3], y[3:]), strict=True)))
    d, at = directions(model, 1), {p: p.detach() for p in model.parameters()}
    whole = Evaluation(model, closure(model, x, y)).curvature(d, at)
    torch.testing.assert_close(Evaluation(model, joined).curvature(d, at), whole)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def test_recurrent_layers_have_a_forward_mode():
    model, x, y = cases.seeded(Recurrent).float(), cases.randn(6, 5, 3).float(), torch.arange(6) % 3
    optimizer = SecondOrderOptimizer(model, step_rule="quadratic", damping_rule="lm", damping_interval=2)
    losses = [float(optimizer.step(closure(model, x, y))) for _ in range(6)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("rule", [{"step_rule": "quadratic"}, {"damping_rule": "lm", "damping_interval": 1}])
def test_what_has_no_forward_mode_says_so_and_nothing_moves(rule):
    model = cases.seeded(lambda: nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 3)))
    optimizer = SecondOrderOptimizer(model, **rule)
    before = flat(model.parameters())
    with pytest.raises(NotImplementedError, match=r'(?s)forward mode.*step_rule="fixed"'):
        optimizer.step(closure(model, torch.arange(12).reshape(6, 2) % 7, torch.arange(6) % 3))
    assert torch.equal(flat(model.parameters()), before)


def test_fused_attention_has_a_forward_mode():
    model = cases.seeded(lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True).double())
    head, x, y = nn.Linear(4, 3).double(), cases.randn(2, 5, 4), torch.arange(10) % 3
    whole = nn.Sequential(model, head)

    def evaluate():
        output = whole(x)
        return F.cross_entropy(output.flatten(0, 1), y), output

    d = [{p: torch.ones_like(p) for p in whole.parameters()}]
    assert Evaluation(whole, evaluate).curvature(d, {p: p.detach() for p in whole.parameters()}) > 0


def test_a_loss_that_is_linear_in_the_output_has_no_curvature():
    model, (x, _) = make_model(), DATA[0]
    evaluation = Evaluation(model, lambda: model(x).sum())
    assert not evaluation.curvature(directions(model, 2), {p: p.detach() for p in model.parameters()}).any()


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 4), zeros=st.integers(0, 2), seed=st.integers(0, 100))
def test_the_minimiser_of_a_quadratic(size, zeros, seed):
    V, b = cases.randn(size, size + 2, seed=seed), cases.randn(size, seed=seed + 1)
    V[: min(zeros, size)] = 0
    b = torch.where(V.any(1), b, 0)
    A = V @ V.T
    c = minimiser(b, A)
    torch.testing.assert_close(c, -torch.linalg.pinv(A) @ b, rtol=1e-2, atol=1e-4)
    assert not c[: min(zeros, size)].any()


def test_the_minimiser_of_what_is_not_finite_stays_where_it_is():
    assert not minimiser(torch.tensor([1.0, math.nan]), torch.eye(2)).any()
    assert not minimiser(torch.ones(2), torch.full((2, 2), math.inf)).any()


def test_parallel_directions_share_the_step():
    A = torch.ones(2, 2, dtype=torch.float64)
    c = minimiser(-torch.ones(2, dtype=torch.float64), A)
    torch.testing.assert_close(c.sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-5, atol=0)


# -------------------------------------------------------------------------------------- quadratic steps


@settings(max_examples=25, deadline=None)
@given(
    momentum=st.sampled_from([0.0, 0.5]),
    l2=st.sampled_from([0.0, 0.2]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    kl_clip=st.sampled_from(["auto", 1e-3, 10.0]),
    lr=st.sampled_from([None, 0.5]),
    plain=st.booleans(),
)
def test_quadratic_steps_are_those_of_the_formula(momentum, l2, weight_decay, kl_clip, lr, plain):
    damping, model, twin = 0.05, make_model(), make_model()
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "approx": None if plain else "full"}]
    optimizer = SecondOrderOptimizer(
        model, groups, step_rule="quadratic", damping=damping, momentum=momentum, l2=l2, weight_decay=weight_decay,
        kl_clip=kl_clip, lr=lr, **EXACT,
    )  # fmt: skip
    theta, m = flat(twin.parameters()), torch.zeros_like(flat(twin.parameters()))
    split, size = 25, len(theta)  # of the first layer
    for x, y in DATA:
        nn.utils.vector_to_parameters(theta, twin.parameters())
        C, g = ggn(twin, x, y), gradient(twin, x, y) + l2 * theta
        damped = C + (damping + l2) * torch.eye(size, dtype=theta.dtype)
        if plain:
            V, other = torch.zeros_like(g), torch.zeros_like(g)
            V[:split] = torch.linalg.solve(damped[:split, :split], g[:split])
            other[split:] = g[split:]
            D = torch.stack([V, other])
        else:
            D = torch.linalg.solve(damped, g)[None]
        if momentum:
            D = torch.cat([D, m[None]])
        c = torch.linalg.pinv(D @ damped @ D.T) @ (D @ g)
        if momentum and not 0 <= c[-1] <= 1.1:  # β is bounded, and the others are least for it
            c[-1] = c[-1].clamp(0, 1.1)
            K = D @ damped @ D.T
            c[:-1] = torch.linalg.solve(K[:-1, :-1], D[:-1] @ g - K[:-1, -1] * c[-1])
        if kl_clip != "auto":
            c = c * min(1, math.sqrt(kl_clip / (c @ D @ C @ D.T @ c)))
        m = c @ D
        theta = (1 - (lr or 1) * weight_decay) * theta - (lr or 1) * m
        optimizer.step(closure(model, x, y))
        torch.testing.assert_close(flat(model.parameters()), theta, rtol=1e-4, atol=1e-6)
        with torch.no_grad():  # errors do not add up
            nn.utils.vector_to_parameters(theta, model.parameters())


def test_one_quadratic_step_solves_least_squares():
    model, x, y = cases.seeded(lambda: nn.Linear(4, 2).double()), cases.randn(20, 4), cases.randn(20, 2, seed=1)
    optimizer = SecondOrderOptimizer(model, loss_fn="mse", step_rule="quadratic", damping=1e-9, momentum=0.0, **EXACT)
    optimizer.step(closure(model, x, y, F.mse_loss))
    design = torch.cat([x, torch.ones(20, 1, dtype=x.dtype)], 1)
    best = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(torch.cat([model.weight, model.bias[:, None]], 1).T, best, rtol=1e-5, atol=1e-6)


def test_a_bad_scale_of_the_preconditioner_is_made_good():
    """The step does not change when the kept curvature is wrong by a factor, as K-FAC's is, but for the damping."""
    steps = []
    for factor in (1.0, 100.0):
        model, (x, y) = make_model(), DATA[0]
        optimizer = SecondOrderOptimizer(model, step_rule="quadratic", damping=1e-6, momentum=0.0, **EXACT)
        before, solve = flat(model.parameters()), optimizer.engine.precondition
        optimizer.engine.precondition = lambda g, f=factor, s=solve: {p: v * f for p, v in s(g).items()}
        optimizer.step(closure(model, x, y))
        steps.append(flat(model.parameters()) - before)
    torch.testing.assert_close(*steps, rtol=1e-5, atol=1e-8)


def test_schedulers_scale_what_the_model_chooses():
    moves = []
    for factor in (1.0, 0.25):
        model, (x, y) = make_model(), DATA[0]
        optimizer = SecondOrderOptimizer(model, step_rule="quadratic", **EXACT)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t, f=factor: f)
        before = flat(model.parameters())
        optimizer.step(closure(model, x, y))
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == factor
        moves.append(flat(model.parameters()) - before)
    torch.testing.assert_close(moves[1], 0.25 * moves[0])


def test_a_loss_alone_and_calls_by_keyword_will_do():
    results = []
    for form in range(3):
        model, (x, y) = make_model(), DATA[0]
        optimizer = SecondOrderOptimizer(model, step_rule="quadratic", damping_rule="lm", damping_interval=1, **EXACT)
        forms = (
            closure(model, x, y),
            lambda m=model, x=x, y=y: F.cross_entropy(m(x), y),
            lambda m=model, x=x, y=y: F.cross_entropy(m(input=x), y),
        )
        loss = optimizer.step(forms[form])
        assert not loss.requires_grad and torch.equal(loss, F.cross_entropy(make_model()(x), y).detach())
        results.append(flat(model.parameters()))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("rule", [{"step_rule": "quadratic"}, {"damping_rule": "lm", "damping_interval": 1}])
def test_a_step_without_the_loss_is_refused(rule):
    model, (x, y) = make_model(), DATA[0]
    optimizer = SecondOrderOptimizer(model, **rule)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="closure that returns the loss"):
        optimizer.step()


def bad_closures(model, x, y):
    def called_backward():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def without_gradients():
        with torch.no_grad():
            return F.cross_entropy(model(x), y)

    return {
        "without calling backward": called_backward,
        "with gradients enabled": without_gradients,
        "0-d tensor": lambda: F.cross_entropy(model(x), y, reduction="none"),
        "a float": lambda: F.cross_entropy(model(x), y).item(),
        "no tensor": lambda: (model(x).sum(), None),
        "does not depend": lambda: (model(x).sum(), model(x)),
    }


@pytest.mark.parametrize("match", list(bad_closures(None, None, None)))
def test_closures_that_do_not_fit_are_refused_and_change_nothing(match):
    model = make_model()
    optimizer = SecondOrderOptimizer(model, step_rule="quadratic", **EXACT)
    before = flat(model.parameters())
    with pytest.raises((RuntimeError, TypeError, ValueError), match=match):
        optimizer.step(bad_closures(model, *DATA[0])[match])
    assert torch.equal(flat(model.parameters()), before) and optimizer.metrics()["step"] == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"step_rule": "newton"}, "'fixed', 'quadratic'"),
        ({"damping_rule": True}, "'fixed', 'lm'"),
        ({"damping_rule": "lm", "damping_decay": 1.0}, "damping_decay"),
        ({"damping_rule": "lm", "damping_interval": 0}, "damping_interval"),
        ({"damping_rule": "lm", "damping_bounds": (1.0, 0.1)}, "damping_bounds"),
        ({"damping_rule": "lm", "damping": lambda step: 0.1}, "function of the step"),
        ({"damping_rule": "lm", "damping": torch.tensor(0.1)}, "is a tensor"),
        ({"damping_rule": "lm", "maximize": True}, "maximize"),
        ({"step_rule": "quadratic", "maximize": True}, "maximize"),
        ({"step_rule": "quadratic", "nesterov": True}, "nesterov"),
        ({"step_rule": "quadratic", "momentum_type": "raw"}, "momentum_type"),
        ({"step_rule": "quadratic", "trust_ratio": True}, "trust_ratio"),
        ({"model_samples": 0}, "model_samples"),
        ({"curvature_warmup": -1}, "curvature_warmup"),
        ({"kl_clip": "none"}, "kl_clip"),
        ({"trust_ratio": 1}, "trust_ratio"),
        ({"ema_decay": lambda step: 2.0}, "ema_decay"),
        ({"damping": lambda step: -1.0}, "damping"),
    ],
)
def test_options_that_are_not_allowed(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        SecondOrderOptimizer(make_model(), **options)


# ------------------------------------------------------------------------------------ Levenberg-Marquardt


@pytest.mark.parametrize(
    ("actual", "predicted", "factor"),
    [
        (-1.0, -1.0, 0.5), (-0.8, -1.0, 0.5), (-0.75, -1.0, 1.0), (-0.5, -1.0, 1.0), (-0.25, -1.0, 1.0),
        (-0.2, -1.0, 2.0), (0.3, -1.0, 2.0), (math.nan, -1.0, 2.0), (math.inf, -1.0, 2.0), (-1.0, 0.0, 2.0),
        (-1.0, 0.5, 2.0), (-1.0, math.nan, 2.0), (1e-9, -1e-9, 1.0), (0.0, 0.0, 1.0), (1e-3, -1e-9, 2.0),
    ],
)  # fmt: skip
def test_the_rule_of_levenberg_and_marquardt(actual, predicted, factor):
    assert levenberg_marquardt(actual, predicted, 0.5, noise=1e-8) == factor


def test_a_step_of_length_zero_says_nothing():
    model, (x, y) = make_model(), DATA[0]
    optimizer = SecondOrderOptimizer(model, lr=0.0, damping_rule="lm", damping_interval=1)
    optimizer.step(closure(model, x, y))
    assert optimizer.param_groups[0]["damping"] == 0.01 and optimizer.metrics()["rejected_steps"] == 0


@pytest.mark.parametrize("step_rule", ["fixed", "quadratic"])
@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_the_predicted_change_is_that_of_the_dense_model(step_rule, l2):
    model, twin, (x, y) = make_model(), make_model(), DATA[0]
    options = {"kl_clip": None} if step_rule == "fixed" else {}
    optimizer = SecondOrderOptimizer(
        model,
        step_rule=step_rule,
        damping_rule="lm",
        damping_interval=1,
        damping_decay=0.95,
        damping=0.5,
        l2=l2,
        **options,
        **EXACT,
    )
    optimizer.step(closure(model, x, y))
    theta, g, C = flat(twin.parameters()), gradient(twin, x, y), ggn(twin, x, y)
    d = flat(model.parameters()) - theta
    eye = torch.eye(len(d), dtype=d.dtype)
    predicted = (g + l2 * theta) @ d + 0.5 * d @ (C + l2 * eye) @ d
    new = theta + d
    with torch.no_grad():
        change = F.cross_entropy(model(x), y) - F.cross_entropy(twin(x), y) + l2 / 2 * (new @ new - theta @ theta)
    found = optimizer.metrics()
    assert found["predicted"] == pytest.approx(float(predicted), rel=1e-9)
    assert found["actual"] == pytest.approx(float(change), rel=1e-9)
    assert found["ratio"] == pytest.approx(float(change / predicted), rel=1e-9)
    omega = 0.95 if found["ratio"] > 0.75 else 1 / 0.95 if found["ratio"] < 0.25 else 1
    assert optimizer.param_groups[0]["damping"] == pytest.approx(0.5 * omega)


def test_damping_changes_every_t_steps_and_stays_within_bounds():
    model = make_model()
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "damping": 1.0}]
    optimizer = SecondOrderOptimizer(
        model, groups, step_rule="quadratic", damping_rule="lm", damping_interval=2, damping_decay=0.5, damping=0.1,
        damping_bounds=(0.002, 10.0),
    )  # fmt: skip
    seen = []
    for x, y in DATA[:1] * 14:
        optimizer.step(closure(model, x, y))
        seen.append([group["damping"] for group in optimizer.param_groups])
    for before, after in pairwise([[0.1, 1.0], *seen[:2]]):  # the first two one by one
        assert after[0] / before[0] == pytest.approx(after[1] / before[1])
        assert after[0] / before[0] in (pytest.approx(0.5), 1, pytest.approx(2))
    ratio = seen[3][0] / seen[1][0]
    assert seen[2] == seen[1] and ratio in (pytest.approx(0.25), 1, pytest.approx(4))
    assert all(0.002 <= low <= 10 and 0.002 <= high <= 10 for low, high in seen)
    assert seen[-1] == [0.002, 0.002]  # the model is good: it is trusted


def test_damping_changes_by_single_steps_at_first():
    """Where the model is right at every step: least squares."""
    model, x, y = cases.seeded(lambda: nn.Linear(4, 2).double()), cases.randn(20, 4), cases.randn(20, 2, seed=1)
    optimizer = SecondOrderOptimizer(
        model, loss_fn="mse", lr=0.1, step_rule="quadratic", damping_rule="lm", damping_interval=3, damping_decay=0.5,
        damping=1.0, curvature_warmup=2, damping_bounds=(1e-8, 1e8), **EXACT,
    )  # fmt: skip
    seen = []
    for _ in range(12):
        optimizer.step(closure(model, x, y, F.mse_loss))
        seen.append(math.log2(optimizer.param_groups[0]["damping"]))
    assert seen == [0, 0, -1, -2, -3, -3, -3, -6, -6, -6, -9, -9]


@pytest.mark.parametrize("step_rule", ["fixed", "quadratic"])
def test_a_step_that_makes_its_loss_rise_is_taken_back(step_rule):
    model, (x, y) = make_model(), DATA[0]
    lr = 300.0 if step_rule == "quadratic" else 1e5
    optimizer = SecondOrderOptimizer(
        model, lr=lr, damping=0.1, kl_clip=None, step_rule=step_rule, damping_rule="lm", damping_interval=1
    )
    before = flat(model.parameters())
    optimizer.step(closure(model, x, y))
    assert torch.equal(flat(model.parameters()), before)
    assert optimizer.param_groups[0]["damping"] > 0.1 and optimizer.metrics()["rejected_steps"] == 1
    assert optimizer.metrics()["step_norm"] == 0
    assert not any(optimizer.state[p]["momentum_buffer"].any() for p in model.parameters())
    optimizer.param_groups[0]["lr"] = 0.1
    loss = optimizer.step(closure(model, x, y))
    assert F.cross_entropy(model(x), y) < loss


def test_after_a_step_that_is_taken_back_comes_one_that_is_checked():
    model, (x, y) = make_model(), DATA[0]
    options = {"damping": 0.1, "step_rule": "quadratic", "damping_rule": "lm", "damping_interval": 2, "update_every": 1}
    optimizer = SecondOrderOptimizer(model, lr=300.0, **options)
    before = flat(model.parameters())
    for _ in range(5):
        optimizer.step(closure(model, x, y))
    resumed = SecondOrderOptimizer(model, lr=300.0, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        resumed.step(closure(model, x, y))
    assert resumed.metrics()["rejected_steps"] == 7 and torch.equal(flat(model.parameters()), before)


def test_a_loss_that_is_not_finite_after_the_step_is_taken_back():
    model, (x, y) = make_model(), DATA[0]
    optimizer = SecondOrderOptimizer(model, lr=1e300, kl_clip=None, damping_rule="lm", damping_interval=1)
    before = flat(model.parameters())
    optimizer.step(closure(model, x, y))
    assert torch.equal(flat(model.parameters()), before) and optimizer.metrics()["rejected_steps"] == 1


@pytest.mark.parametrize("approx", ["kfac", "ekfac", "diag", "unit", "block", None])
@pytest.mark.parametrize("curv_type", ["ggn", "empirical_fisher"])
def test_control_trains_with_every_shape(approx, curv_type):
    model = make_model()
    optimizer = SecondOrderOptimizer(
        model, approx=approx, curv_type=curv_type, step_rule="quadratic", damping_rule="lm", damping_interval=2
    )
    losses = [float(optimizer.step(closure(model, *DATA[0]))) for _ in range(12)]
    assert losses[-1] < 0.75 * losses[0]


def test_half_precision_parameters_train():
    model = make_model().to(torch.bfloat16)
    optimizer = SecondOrderOptimizer(model, step_rule="quadratic", damping_rule="lm", damping_interval=2)
    losses = [float(optimizer.step(closure(model, x.bfloat16(), y))) for x, y in DATA[:1] * 8]
    assert losses[-1] < 0.1 * losses[0]  # from here on it is rounding that is fitted


def test_frozen_and_unused_parameters_stay():
    model = make_model()
    model.append(nn.Identity()).register_module("unused", nn.Linear(2, 2).double())
    model[0].bias.requires_grad_(False)
    optimizer = SecondOrderOptimizer(
        model,
        params=list(model.parameters()),
        step_rule="quadratic",
        damping_rule="lm",
        damping_interval=1,
        damping=1.0,
    )
    model.forward = lambda x: model[3](model[1](model[0](x)))
    before = model[0].bias.clone(), model.unused.weight.clone(), model[0].weight.clone()
    optimizer.step(closure(model, *DATA[0]))
    assert torch.equal(model[0].bias, before[0]) and torch.equal(model.unused.weight, before[1])
    assert not torch.equal(model[0].weight, before[2])


def test_freezing_between_steps():
    model = make_model()
    optimizer = SecondOrderOptimizer(model, model.parameters(), step_rule="quadratic", **EACH)
    for frozen in (False, True, False):
        model[0].requires_grad_(not frozen)
        before = flat(model[0].parameters()), flat(model[3].parameters())
        optimizer.step(closure(model, *DATA[0]))
        assert torch.equal(flat(model[0].parameters()), before[0]) == frozen
        assert not torch.equal(flat(model[3].parameters()), before[1])


def test_input_curvature_has_a_coefficient_of_its_own():
    model = make_model()
    groups = [{"params": model[0].parameters(), "curv_type": "input"}, {"params": model[3].parameters()}]
    optimizer = SecondOrderOptimizer(model, groups, step_rule="quadratic", momentum=0.0)
    losses = [float(optimizer.step(closure(model, *DATA[0]))) for _ in range(5)]
    assert losses[-1] < losses[0] and {"step_along_0", "step_along_1"} <= set(optimizer.metrics())


def test_a_resumed_run_is_the_same_bit_for_bit():
    options = {"step_rule": "quadratic", "damping_rule": "lm", "damping_interval": 2, "update_every": 2}
    model = make_model()
    optimizer = SecondOrderOptimizer(model, **options)
    for x, y in DATA[:3]:
        optimizer.step(closure(model, x, y))
    other = copy.deepcopy(model)
    again = SecondOrderOptimizer(other, **options)
    again.load_state_dict(optimizer.state_dict())
    for x, y in DATA[3:] * 2:
        optimizer.step(closure(model, x, y))
        again.step(closure(other, x, y))
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))
    assert optimizer.metrics() == again.metrics()
    pair, copied = copy.deepcopy((model, optimizer))
    assert copied.metrics()["step"] == optimizer.metrics()["step"]
    optimizer.step(closure(model, *DATA[0]))
    copied.step(closure(pair, *DATA[0]))
    assert torch.equal(flat(model.parameters()), flat(pair.parameters()))


# ------------------------------------------------------------------------------------- clips and norms


@given(size=st.floats(-1e6, 1e6), bound=st.floats(1e-6, 1e6), largest=st.floats(0.1, 10))
def test_one_scale_for_clips_and_trust_regions(size, bound, largest):
    scale = float(scale_within(torch.tensor(size, dtype=torch.float64), bound, largest))
    assert 0 < scale <= largest and scale**2 * abs(size) <= bound * (1 + 1e-9)
    assert scale == largest or scale**2 * abs(size) == pytest.approx(bound)


def test_the_trust_ratio_makes_steps_as_long_as_the_weights():
    model, (x, y) = make_model(), DATA[0]
    with torch.no_grad():
        model[3].bias.zero_()  # too short to say anything
    before = [p.detach().clone() for p in model.parameters()]
    plain, twin = SecondOrderOptimizer(copy.deepcopy(model), kl_clip=None, momentum=0.0, lr=0.01), None
    optimizer = SecondOrderOptimizer(model, trust_ratio=True, lr=0.01, momentum=0.0)
    for o in (plain, optimizer):
        o.zero_grad()
        F.cross_entropy(o.model(x), y).backward()
        o.step()
    for p, twin, old in zip(model.parameters(), plain.model.parameters(), before, strict=True):
        moved = p.detach() - old
        length = 0.01 * old.norm() if old.norm() > 1e-2 else (twin.detach() - old).norm()
        torch.testing.assert_close(moved.norm(), length, rtol=1e-6, atol=0)
        torch.testing.assert_close(moved / moved.norm(), (twin.detach() - old) / (twin.detach() - old).norm())


def test_normalised_weights_have_one_norm_after_each_step():
    model = make_model()
    groups = [{"params": model[0].parameters(), "normalize_weights": True}, {"params": model[3].parameters()}]
    optimizer = SecondOrderOptimizer(model, groups)
    bias, other = model[0].bias.norm(), model[3].weight.norm()
    for x, y in DATA[:2]:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert model[0].weight.norm().item() == pytest.approx(math.sqrt(2 * 5))
    assert 0 < (model[0].bias.norm() - bias).abs() < 1 and 0 < (model[3].weight.norm() - other).abs() < 1


# ------------------------------------------------------------------------- schedules, warm-up and metrics


@pytest.mark.parametrize("make", [SecondOrderOptimizer, Preconditioner, lambda m, **o: VIOptimizer(m, 100, **o)])
def test_damping_and_memory_may_be_functions_of_the_step(make):
    model = make_model()
    optimizer = make(model, damping=lambda step: 0.1 / (1 + step), ema_decay=lambda step: min(0.9, 0.3 * step))
    for t, (x, y) in enumerate(DATA[:4]):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        group = optimizer.param_groups[0]
        assert group["damping"] == 0.1 / (1 + t) and group["ema_decay"] == min(0.9, 0.3 * t)


def test_a_function_may_be_put_into_a_group_and_taken_out_of_it():
    model = make_model()
    optimizer = SecondOrderOptimizer(model, approx="ekfac", damping=0.5)
    group, seen = optimizer.param_groups[0], []
    for t, (x, y) in enumerate([*DATA, *DATA][:6]):
        if t == 1:
            group["damping"] = group["refactor_every"] = None
            group["damping"], group["refactor_every"] = (lambda step: 0.1 + step), (lambda step: 2 + step)
            assert optimizer.metrics()["damping"] == 1.1
        if t == 4:
            group["damping"] = 0.3
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        seen.append(group["damping"])
    assert seen == [0.5, 1.1, 2.1, 3.1, 0.3, 0.3]
    group["damping"] = lambda step: -1.0
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="damping"):
        optimizer.step()


def test_a_scheduled_step_is_that_of_the_number():
    results = []
    for scheduled in (True, False):
        model = make_model()
        optimizer = SecondOrderOptimizer(
            model, damping=(lambda step: 0.5**step) if scheduled else 1.0, ema_decay=lambda step: 0.1 * step
        )
        for t, (x, y) in enumerate(DATA):
            if not scheduled:
                optimizer.param_groups[0]["damping"] = 0.5**t
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        results.append(flat(model.parameters()))
    assert torch.equal(*results)


def test_schedules_are_not_saved_and_are_given_again():
    schedule = {"damping": lambda step: 0.1 / (1 + step)}
    model = make_model()
    optimizer = SecondOrderOptimizer(model, **schedule)
    for x, y in DATA[:2]:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["damping"] == 0.05
    other = copy.deepcopy(model)
    again = SecondOrderOptimizer(other, **schedule)
    again.load_state_dict(saved)
    for m, o in ((model, optimizer), (other, again)):
        o.zero_grad()
        F.cross_entropy(m(DATA[2][0]), DATA[2][1]).backward()
        o.step()
    assert again.param_groups[0]["damping"] == pytest.approx(0.1 / 3)
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))


def test_a_schedule_in_a_group_is_that_of_the_group():
    model = make_model()
    groups = [{"params": model[0].parameters(), "damping": lambda step: 2.0 + step}, {"params": model[3].parameters()}]
    optimizer = SecondOrderOptimizer(model, groups, damping=0.5)
    assert [group["damping"] for group in optimizer.param_groups] == [2.0, 0.5]


@pytest.mark.parametrize(("option", "bad"), [("ema_decay", 1.5), ("damping", 0.0)])
def test_what_a_function_of_the_step_says_is_checked_at_every_step(option, bad):
    model = make_model()
    optimizer = SecondOrderOptimizer(model, **{option: lambda step: (0.5, bad)[step]})
    for x, y in DATA[:2]:
        F.cross_entropy(model(x), y).backward()
        if optimizer.metrics()["step"]:
            with pytest.raises(ValueError, match=option):
                optimizer.step()
        else:
            optimizer.step()


def test_a_group_that_is_refused_leaves_no_schedule_behind():
    model = make_model()
    optimizer = SecondOrderOptimizer(model, model[0].parameters(), damping_rule="lm", damping_interval=1)
    with pytest.raises(ValueError, match="function of the step"):
        optimizer.add_param_group({"params": model[3].parameters(), "damping": lambda step: 0.1})
    optimizer.step(closure(model, *DATA[0]))


def test_after_warm_up_adaptive_intervals_begin_at_once():
    model = make_model()
    optimizer = SecondOrderOptimizer(
        model, curvature_warmup=20, samples=None, update_every="adaptive", refactor_every="adaptive"
    )
    for _ in range(21):
        optimizer.zero_grad()
        F.cross_entropy(model(DATA[0][0]), DATA[0][1]).backward()
        optimizer.step()
    assert all(block.health.measurements == 21 and block.refresh.next_update == 21 for block in optimizer.engine.blocks)


def test_sparse_gradients_step_without_curvature():
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    groups = [{"params": model[0].parameters(), "approx": None, "momentum": 0.0}, {"params": model[2].parameters()}]
    optimizer = SecondOrderOptimizer(model, groups)
    F.cross_entropy(model(torch.arange(12).reshape(6, 2) % 7), torch.arange(6) % 3).backward()
    optimizer.step()
    assert optimizer.metrics()["step_norm"] > 0


@pytest.mark.parametrize("rule", [{}, {"step_rule": "quadratic"}])
def test_warm_up_measures_and_does_not_move(rule):
    model = make_model()
    optimizer = SecondOrderOptimizer(
        model, curvature_warmup=3, update_every=10, approx="full", samples=None, ema_decay=1.0, **rule
    )
    before, truths = flat(model.parameters()), []
    for x, y in DATA[:3]:
        truths.append(ggn(model, x, y))
        if rule:
            optimizer.step(closure(model, x, y))
        else:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert torch.equal(flat(model.parameters()), before)
    measured.close(measured.dense(optimizer, "tensors"), torch.stack(truths).mean(0))
    found = optimizer.metrics()
    assert (found["measurements"], found["factorisations"]) == (3, 0)
    if rule:
        optimizer.step(closure(model, *DATA[3]))
    else:
        optimizer.zero_grad()
        F.cross_entropy(model(DATA[3][0]), DATA[3][1]).backward()
        optimizer.step()
    assert not torch.equal(flat(model.parameters()), before)
    assert optimizer.metrics()["factorisations"] == 1


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.7, False), (0.7, True)])
def test_metrics_are_those_of_the_last_step(momentum, nesterov):
    model = make_model()
    optimizer = SecondOrderOptimizer(
        model, lr=0.2, momentum=momentum, nesterov=nesterov, damping=0.3, kl_clip=1e-3, **EACH
    )
    assert optimizer.metrics()["step"] == 0
    for x, y in DATA[:3]:
        before = flat(model.parameters())

        def evaluate(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(evaluate)
    found = optimizer.metrics()
    assert all(type(value) in (int, float) for value in found.values())
    assert found["step"] == 3 and found["measurements"] == 6 and found["factorisations"] == 6
    assert found["loss"] == pytest.approx(loss.item()) and found["damping"] == 0.3
    assert found["gradient_norm"] == pytest.approx(float(flat(p.grad for p in model.parameters()).norm()))
    assert found["parameter_norm"] == pytest.approx(float(flat(model.parameters()).norm()))
    assert found["step_norm"] == pytest.approx(float((flat(model.parameters()) - before).norm()))
    assert 0 < found["clip"] < 1 and found["kl"] == pytest.approx(0.5e-3)
    optimizer.param_groups[0]["l2"] = 0.4
    assert optimizer.metrics()["l2_loss"] == pytest.approx(0.2 * found["parameter_norm"] ** 2)


def test_metrics_of_a_posterior():
    model, (x, y) = make_model(), DATA[0]
    optimizer = VIOptimizer(model, 100, num_samples=2)

    def evaluate():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    loss = optimizer.step(evaluate)
    found = optimizer.metrics()
    assert found["loss"] == pytest.approx(loss.item())


@pytest.mark.parametrize("kl_clip", [None, 1e-3])
def test_metrics_of_a_quadratic_step(kl_clip):
    model, twin, (x, y) = make_model(), make_model(), DATA[0]
    optimizer = SecondOrderOptimizer(model, step_rule="quadratic", kl_clip=kl_clip, **EXACT)
    loss = optimizer.step(closure(model, x, y))
    found, d = optimizer.metrics(), flat(model.parameters()) - flat(twin.parameters())
    assert found["loss"] == pytest.approx(float(loss))
    assert found["kl"] == pytest.approx(float(0.5 * d @ ggn(twin, x, y) @ d))
    assert found["step_norm"] == pytest.approx(float(d.norm()))
    assert found["step_along_1"] == 0
    if kl_clip is None:
        assert found["step_along_0"] == pytest.approx(1.0, rel=1e-4)
    else:
        assert found["kl"] == pytest.approx(0.5 * kl_clip) and found["step_along_0"] < 0.5


AUTO = {"update_every": "auto", "refactor_every": "auto"}


@pytest.mark.parametrize(
    "make",
    [SecondOrderOptimizer, lambda m: Preconditioner(m, **AUTO), lambda m: VIOptimizer(m, 20, damping=1.0, **AUTO)],
    ids=["SecondOrderOptimizer", "Preconditioner", "VIOptimizer"],
)
def test_curvature_is_measured_in_each_of_the_first_steps_and_then_rarely(make):
    model = make_model()
    optimizer = make(model)
    blocks, counts = len(optimizer.engine.blocks), []
    copied = None
    for t in range(32):
        if t == 4:
            copied = copy.deepcopy((model, optimizer))
        for other, own in [(model, optimizer), *([copied] if copied else [])]:
            own.zero_grad()
            F.cross_entropy(other(DATA[0][0]), DATA[0][1]).backward()
            own.step()
        counts.append(optimizer.metrics()["measurements"] / blocks)
    assert counts == [*range(1, 12), *[11] * 9, *[12] * 10, 13, 13]
    assert copied is not None and torch.equal(flat(model.parameters()), flat(copied[0].parameters()))
    assert all(block.health.measurements == block.health.factorisations == 13 for block in optimizer.engine.blocks)
    again = make(make_model())
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = state["step"] * 0 + 3
    again.load_state_dict(saved)
    assert (
        again.engine.schedule.next_turn(0, "update_every", again.engine.step) == again.engine.step + 1
        and again.param_groups[0]["update_every"] == 10
    )


def test_an_interval_that_is_given_holds_from_the_first_step():
    optimizer = SecondOrderOptimizer(make_model(), update_every=4)
    assert interval(optimizer, "update_every") == 4 and interval(optimizer, "refactor_every") == 1


# ------------------------------------------------------------------------------------- relative damping

RELATIVE = [
    *({"approx": approx} for approx in ("kfac", "ekfac", "diag", "unit", "block", "full", "lowrank")),
    {"approx": "kfac", "damping_type": "exact"},
    {"approx": "kfac", "factor_blocks": 2},
    {"approx": "unit", "max_factor_dim": 2},
    {"approx": "full", "rows_limit": 3},
    {"approx": "diag", "curv_type": "hessian"},
    {"approx": "kfac", "curv_type": "input"},
]


@pytest.mark.parametrize("options", RELATIVE, ids=lambda row: " ".join(map(str, row.values())))
def test_relative_damping_is_that_of_the_mean_eigenvalue_of_each_block(options):
    """Against an absolute damping of λ tr C / dim C for each block."""
    model, twin, (x, y) = make_model(), make_model(), DATA[0]
    shape = {"samples": None, "rank": 3, **options}
    step = {"kl_clip": None, "ema_decay": 0.0, "momentum": 0.0}
    relative = SecondOrderOptimizer(model, damping=0.3, damping_scale="relative", **shape, **step)
    shape.pop("rows_limit", None)
    shape.pop("damping_type", None)
    shape["approx"] = "kfac" if shape["approx"] == "ekfac" else shape["approx"]  # whose first factor is K-FAC's
    C = curvature(twin, nn.CrossEntropyLoss(), [(x, y)], **shape).to_dense()
    sizes, dampings = [sum(p.numel() for p in block.params) for block in relative.engine.blocks], []
    for own in C.diagonal().split(sizes):
        dampings.append(0.3 * float(own.mean().abs()))
    params = [twin.parameters()] if len(sizes) == 1 else [twin[0].parameters(), twin[3].parameters()]
    groups = [{"params": list(own), "damping": damping} for own, damping in zip(params, dampings, strict=True)]
    absolute = SecondOrderOptimizer(twin, groups, **{"samples": None, "rank": 3, **options}, **step)
    for other, optimizer in ((model, relative), (twin, absolute)):
        F.cross_entropy(other(x), y).backward()
        optimizer.step()
    known = [block for block in relative.engine.blocks if block.average]
    added = [relative.engine.shift(block, relative.param_groups[0]) for block in known]
    assert [float(shift) for shift in added] == pytest.approx(dampings[: len(added)], rel=1e-9)
    if options.get("curv_type") != "input":  # whose step is multiplied with λ
        measured.close(flat(model.parameters()), flat(twin.parameters()))
    assert not torch.equal(flat(model.parameters()), flat(make_model().parameters()))


@pytest.mark.parametrize("rule", ["fixed", "quadratic"])
def test_with_relative_damping_the_units_of_the_loss_do_not_matter(rule):
    found = []
    for factor in (1.0, 100.0):
        model, (x, y) = make_model(), DATA[0]
        lr = 0.1 if rule == "fixed" else 1.0
        optimizer = SecondOrderOptimizer(
            model, loss_fn=None, approx="kfac", damping=0.3, damping_scale="relative", kl_clip=None, lr=lr, seed=3,
            step_rule=rule, damping_rule="lm", damping_interval=2,
        )  # fmt: skip

        def evaluate(model=model, optimizer=optimizer, x=x, y=y, factor=factor):
            output = model(x)
            loss = factor * F.cross_entropy(output, y)
            optimizer.observe(output, y, "cross_entropy", weight=factor)
            return loss, output

        for _ in range(6):
            optimizer.step(evaluate)
        found.append((flat(model.parameters()), optimizer.param_groups[0]["damping"]))
    measured.close(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1]) and found[0][1] != 0.3


def test_plain_gradients_have_no_relative_damping_in_the_model_of_the_loss():
    model = make_model()
    groups = [
        {"params": list(model[0].parameters())},
        {"params": list(model[3].parameters()), "approx": None, "l2": 0.2},
    ]
    optimizer = SecondOrderOptimizer(model, groups, damping_scale="relative", damping=0.5, step_rule="quadratic")
    optimizer.step(closure(model, *DATA[0]))
    fixed, relative = shifts(optimizer)
    mean = float(optimizer.engine.blocks[0].mean_eigenvalue())
    assert [fixed[p] for p in model.parameters()] == [0.0, 0.0, 0.2, 0.2]
    assert [float(relative[p]) for p in model[0].parameters()] == pytest.approx([0.5 * mean] * 2)
    assert not any(p in relative for p in model[3].parameters())


@pytest.mark.parametrize("scale", [0.3, 1.0, 20.0, 1e4])
def test_relative_damping_counts_less_in_the_model_where_the_loss_curves_less_than_the_average(scale):
    """The average is `scale` times the Gauss-Newton matrix of the batch; steps of V alone, in closed form."""
    model, twin, (x, y) = make_model(), make_model(), DATA[0]
    exact = {**EXACT, "ema_decay": 0.9, "update_every": 99, "refactor_every": 1}
    optimizer = SecondOrderOptimizer(
        model, step_rule="quadratic", damping=0.4, damping_scale="relative", momentum=0.0, l2=0.02, lr=0.0, **exact
    )
    optimizer.step(closure(model, x, y))
    (block,) = optimizer.engine.blocks
    block.average.tensors = block.approx.scaled(block.tensors, scale)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step(closure(model, x, y))
    theta, G = flat(twin.parameters()), ggn(twin, x, y)
    g, eye = gradient(twin, x, y) + 0.02 * theta, torch.eye(len(theta), dtype=torch.float64)
    damping = 0.4 * scale * G.trace() / len(G)
    V = torch.linalg.solve(scale * G + (damping + 0.02) * eye, g)
    share = min(1.0, max(0.01, float(V @ G @ V / (V @ (scale * G) @ V))))
    assert share == pytest.approx(min(1.0, max(0.01, 1 / scale)))
    length = (V @ g) / (V @ G @ V + (share * damping + 0.02) * V @ V) / (1 + RIDGE)
    measured.close(flat(model.parameters()), theta - length * V)


def test_damping_is_relative_where_the_optimizer_chooses_its_steps():
    def chosen(**options):
        group = SecondOrderOptimizer(make_model(), **options).param_groups[0]
        return group["damping_scale"], group["damping"]

    assert chosen() == chosen(step_rule="quadratic") == chosen(damping_rule="lm") == ("absolute", 0.01)
    assert chosen(step_rule="quadratic", damping_rule="lm") == ("relative", 0.03) == chosen(damping_scale="relative")
    assert chosen(step_rule="quadratic", damping_rule="lm", damping_scale="absolute") == ("absolute", 0.01)


EFFECTIVE = [row for row in RELATIVE if "rows_limit" not in row and row["approx"] not in ("lowrank", "ekfac")]


@pytest.mark.parametrize("damping_type", ["exact", "factored"])
@pytest.mark.parametrize("options", EFFECTIVE, ids=lambda row: " ".join(map(str, row.values())))
def test_the_effective_dimension_is_the_trace_of_c_times_the_damped_inverse(options, damping_type):
    model, (x, y) = make_model(), DATA[0]
    options = {"samples": None, "damping": 0.3, "ema_decay": 0.0, **options, "damping_type": damping_type}
    optimizer = SecondOrderOptimizer(model, lr=0.0, **options)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    for block in optimizer.engine.blocks:
        held = None if block.factors["step"].holds_damping else 0.3
        sizes = [piece.of(piece.param).numel() for piece in block.pieces]
        C, solved = [], []
        for row in torch.eye(block.size, dtype=torch.float64):
            parts = [
                x.reshape(piece.of(piece.param).shape) for x, piece in zip(row.split(sizes), block.pieces, strict=True)
            ]
            C.append(flat(block.multiply(parts)))
            solved.append(flat(block.solve(parts, held)))
        C, solved = torch.stack(C), torch.stack(solved)
        if options.get("curv_type") == "hessian":
            C = C.abs()
        torch.testing.assert_close(effective_dimension_of(block, 0.3), (C @ solved).trace())
        lower = {key: x.tril() if x.dim() > 2 and x.shape[-1] == x.shape[-2] else x for key, x in block.tensors.items()}
        block.average.tensors = lower  # other triangles are not kept up to date everywhere
        torch.testing.assert_close(effective_dimension_of(block, 0.3), (C @ solved).trace())


def test_rows_and_low_rank_count_what_they_know():
    for options in ({"approx": "full", "rows_limit": 3}, {"approx": "lowrank", "rank": 43, "partition": "all"}):
        model, (x, y) = make_model(), DATA[0]
        optimizer = SecondOrderOptimizer(model, samples=None, step_rule="quadratic", damping_rule="lm", **{
            "damping_interval": 1, "damping_scale": "absolute", "ema_decay": 0.0, "damping": 0.3, **EACH, **options
        })  # fmt: skip
        C = ggn(model, x, y)
        optimizer.step(closure(model, x, y))
        values = torch.linalg.eigvalsh(C).clamp_min(0)
        assert optimizer.metrics()["effective_dimension"] == pytest.approx(
            float((values / (values + 0.3)).sum()), rel=1e-6
        )


@pytest.mark.parametrize(("outputs", "expected"), [(1000, 0.5), (19, 1.0), (13, 2.0), (1, 2.0)])
def test_damping_does_not_leave_more_directions_than_a_batch_has_outputs_for(outputs, expected, monkeypatch):
    """With ω = ½ and a ratio near 1: of 6 x 3 outputs, a part of 4 is what counts, here set to `outputs` in all."""
    model, (x, y) = make_model(), DATA[0]
    optimizer = SecondOrderOptimizer(
        model,
        lr=0.01,
        momentum=0.0,
        damping_rule="lm",
        damping_interval=1,
        damping_decay=0.5,
        damping=1e-3,
        samples=None,
    )
    monkeypatch.setattr(damping_rules, "MAX_DIMENSIONS_PER_OUTPUT", outputs / 18)
    optimizer.step(closure(model, x, y))
    found = optimizer.metrics()
    assert found["ratio"] > 0.75 and 10 < found["effective_dimension"] < 20
    assert optimizer.param_groups[0]["damping"] == pytest.approx(1e-3 * expected)


def test_relative_damping_of_ekfac_is_that_of_its_eigenvalues():
    model, (x, y) = make_model(), DATA[0]
    optimizer = SecondOrderOptimizer(model, approx="ekfac", samples=None, damping_scale="relative", ema_decay=0.0)
    for _ in range(2):  # the second has a basis
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for block in optimizer.engine.blocks:
        assert float(block.mean_eigenvalue()) == pytest.approx(float(block.factor.values.mean()))


def test_a_damping_scale_that_is_none_is_refused():
    with pytest.raises(ValueError, match="damping_scale='mean' is unknown; allowed are 'absolute', 'relative'"):
        SecondOrderOptimizer(make_model(), damping_scale="mean")
    model = make_model()
    groups = [
        {"params": list(model[0].parameters())},
        {"params": list(model[3].parameters()), "damping_scale": "relative"},
    ]
    optimizer = SecondOrderOptimizer(model, groups, approx="full", samples=None)
    F.cross_entropy(model(DATA[0][0]), DATA[0][1]).backward()
    with pytest.raises(ValueError, match="lies over groups with damping_scale='absolute' and damping_scale='relative'"):
        optimizer.step()


# ------------------------------------------------------------------------------- small batches, jumps


def digits():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("net", ["mlp", "head"])
def test_batches_of_64_do_not_blow_it_up(net, seed):
    """They did: β reached -985, and then -9e6."""
    x, y = digits()
    torch.manual_seed(seed)
    hidden = [nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)]
    model = nn.Sequential(*hidden) if net == "mlp" else nn.Linear(64, 10)
    optimizer = SecondOrderOptimizer(model, step_rule="quadratic", damping_rule="lm")
    for t in range(60):
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(100 * seed + t))[:64]
        loss = float(optimizer.step(closure(model, x[chosen], y[chosen])))
        assert loss < 10
        along = optimizer.metrics()
        last = max((key for key in along if key.startswith("step_along")), default=None)
        assert last is None or t == 0 or -1e-6 <= along[last] <= 1.1 + 1e-6
    with torch.no_grad():
        assert F.cross_entropy(model(x), y) < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("batch", [32, 64])
def test_a_separable_problem_in_small_batches_stays_sane(batch, seed):
    """A batch of a separable problem is fitted by ever longer steps, each of which its own loss welcomes."""
    x, y = digits()
    torch.manual_seed(seed)
    model, generator = nn.Linear(64, 10), torch.Generator().manual_seed(seed)
    optimizer = SecondOrderOptimizer(model, step_rule="quadratic", damping_rule="lm")
    for _ in range(300):
        chosen = torch.randperm(len(x), generator=generator)[:batch]
        assert float(optimizer.step(closure(model, x[chosen], y[chosen]))) < 50
    with torch.no_grad():
        assert F.cross_entropy(model(x), y) < 1.0


def test_the_damping_grows_where_a_step_did_harm_to_the_next_batch():
    """Two batches that contradict each other, of which each is fitted well."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3), torch.randn(8, 5)
    optimizer = SecondOrderOptimizer(model, step_rule="quadratic", damping_rule="lm")
    dampings = []
    for t in range(6):
        y = torch.full((8,), t % 2)
        optimizer.step(closure(model, x, y))
        dampings.append(optimizer.param_groups[0]["damping"])
    assert dampings == sorted(dampings) and dampings[-1] > 2 * dampings[0]


def test_the_other_coefficients_are_least_for_a_bounded_one():
    A = cases.randn(3, 3)
    K, slope = A @ A.T, cases.randn(3, seed=1)
    free = minimiser(slope, K)
    for value in (-3.0, 0.4, 7.0):
        start = torch.cat([free[:2], torch.tensor([value], dtype=free.dtype)])
        found = with_bounded_last(start, slope, K)
        beta = min(1.1, max(0.0, value))
        assert float(found[-1]) == pytest.approx(beta)
        if beta != value:
            expected = torch.linalg.solve(K[:2, :2], -(slope[:2] + beta * K[:2, 2]))
            torch.testing.assert_close(found[:2], expected, rtol=1e-4, atol=1e-4)


def test_a_step_that_did_harm_to_the_next_batch_is_rejected_there():
    """Between two checks fifty steps apart; a batch that is hard by itself rejects nothing."""
    model, (x, y) = make_model(), DATA[0]
    x, y = torch.cat([x, x]), torch.cat([y, (y + 1) % 3])  # which cannot be fitted
    optimizer = SecondOrderOptimizer(model, step_rule="quadratic", damping_rule="lm", damping_interval=50)

    def step(scale=1.0):
        def evaluate():
            output = model(x)
            return scale * F.cross_entropy(output, y), output

        loss = float(optimizer.step(evaluate))
        return loss, optimizer.metrics()["rejected_steps"]

    for _ in range(52):
        calm, rejected = step()
    hard, now = step(3.0)
    assert hard > 2.9 * calm and now == rejected
    good = flat(model.parameters())
    damping = optimizer.param_groups[0]["damping"]
    with torch.no_grad():
        step()
        for p in model.parameters():
            p.add_(3 * torch.sign(p))
    loss, now = step()
    assert now == rejected + 1 and loss <= 2 * calm
    assert (flat(model.parameters()) - good).norm() < 0.5 * good.norm()
    assert optimizer.param_groups[0]["damping"] > damping
