"""Adaptive intervals: the rule, what is not due is not computed, averages that fade with time, and resuming."""

import math
import warnings
from itertools import pairwise

import cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measured import close
from torch import nn

from torchcurv import Preconditioner, SecondOrderOptimizer
from torchcurv.curv.block.refresh import AdaptiveInterval
from torchcurv.curv.capture.signal_pass import CurvaturePass
from torchcurv.curv.linalg import symmetric
from torchcurv.curv.statistics import block as stats
from torchcurv.curv.statistics.inputs import Inputs

EACH = {"update_every": 1, "refactor_every": 1}
ADAPTIVE = {"update_every": "adaptive", "refactor_every": "adaptive"}


def make_model():
    return cases.seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def backward(model, seed=0):
    x, y = cases.randn(6, 4, seed=seed), torch.arange(6) % 3
    nn.functional.cross_entropy(model(x), y).backward()


def train(optimizer, model, steps, seed=lambda t: 0):
    measured = []
    for t in range(steps):
        optimizer.zero_grad()
        backward(model, seed(t))
        measured.append({part: t >= pace.next for part, pace in optimizer.engine.blocks[0].refresh.paces.items()})
        optimizer.step()
    return {part: [t for t, due in enumerate(measured) if due[part]] for part in measured[0]}


@given(st.lists(st.floats(0, 0.3), min_size=1, max_size=30), st.integers(1, 40), st.integers(0, 5))
def test_the_rule(changes, cap, warmup):
    pace, step, intervals, before = AdaptiveInterval(), 0, [1, 1], math.inf
    for change in changes:
        pace.decide(step, change, 0.1, cap, warmup)
        last = intervals[-1]
        if step < warmup:
            expected = 1
        elif change >= 0.1:
            expected = max(1, last // 2)
        else:
            expected = last if change + before >= 0.1 else min(cap, last + intervals[-2])
        intervals.append(expected)
        before = change
        assert (pace.interval, pace.next) == (expected, step + expected)
        step = pace.next
    pace.decide(step, math.nan, 0.1, cap, warmup)
    assert pace.next == step + 1


def test_what_stands_still_is_measured_ever_more_rarely():
    model = make_model()
    optimizer = SecondOrderOptimizer(
        model, approx="kfac", samples=None, lr=0.0, momentum=0.0, refresh_cap=20, refresh_warmup=2, **ADAPTIVE
    )
    measured = train(optimizer, model, 80)
    gaps = [later - earlier for earlier, later in pairwise(measured["A"])]
    assert gaps == [1, 1, 2, 3, 5, 8, 13, 20, 20] and measured["A"] == measured["B"]


@pytest.mark.parametrize("curv_type", ["ggn", "empirical_fisher"])
def test_what_is_not_due_is_not_computed(monkeypatch, curv_type):
    """The same inputs each time, but draws or weights that change what is sent back: A rests while B does not."""
    computed = {"A": 0, "B": 0, "sent": 0}

    def counting(owner, name, key):
        own = getattr(owner, name)

        def counted(*args):
            computed[key] += 1
            return own(*args)

        monkeypatch.setattr(owner, name, counted)

    model = nn.Sequential(make_model()[0])
    optimizer = SecondOrderOptimizer(
        model, approx="kfac", curv_type=curv_type, lr=0.0, momentum=0.0, ema_decay=0.5, refresh_warmup=0, **ADAPTIVE
    )
    train(optimizer, model, 1)  # the first pass is checked by one of its own
    counting(Inputs, "cov", "A")
    counting(stats.LayerData, "output_cov", "B")
    counting(CurvaturePass, "backward", "sent")
    labels = lambda t: torch.arange(6) * (t + 1) % 5  # noqa: E731
    due = {"A": [], "B": []}
    for t in range(1, 30):
        optimizer.zero_grad()
        (block,) = optimizer.engine.blocks
        for part in due:
            due[part] += [t] if t >= block.refresh.paces[part].next else []
        nn.functional.cross_entropy(model(cases.randn(6, 4)), labels(t)).backward()
        optimizer.step()
    assert computed["A"] == len(due["A"]) < 12 and computed["B"] == len(due["B"])
    assert len(due["B"]) > len(due["A"])
    assert computed["sent"] == (len(due["B"]) if curv_type == "ggn" else 0)


@pytest.mark.parametrize("rho", [0.8, 1.0])
@pytest.mark.parametrize("intervals", [ADAPTIVE, {"update_every": 3}, {"update_every": lambda t: 1 + t // 4}])
def test_averages_fade_with_steps_not_measurements(intervals, rho):
    model = make_model()
    optimizer = SecondOrderOptimizer(
        model, approx="diag", samples=None, lr=0.0, momentum=0.0, ema_decay=rho, refresh_tol=0.3, refresh_warmup=0,
        **intervals,
    )  # fmt: skip
    times = []
    for t in range(25):
        before = optimizer.engine.blocks[0].health.measurements
        optimizer.zero_grad()
        backward(model, t)
        optimizer.step()
        times += [t] * (optimizer.engine.blocks[0].health.measurements - before)
    assert len(times) < 25 and max(later - earlier for earlier, later in pairwise(times)) > 1
    every = SecondOrderOptimizer(
        model, approx="diag", samples=None, lr=0.0, momentum=0.0, ema_decay=0.0, update_every=1
    )
    total = weight = 0.0
    for t, last in zip(times, [times[0] - 1, *times], strict=False):
        every.zero_grad()
        backward(model, t)
        every.step()
        total = rho ** (t - last) * total + every.engine.blocks[0].tensors["diag"]
        weight = rho ** (t - last) * weight + 1
    close(optimizer.engine.blocks[0].tensors["diag"], total / weight)


@pytest.mark.parametrize(("approx", "key"), [("diag", "diag"), ("lowrank", "values")])
def test_a_measurement_that_is_not_finite_fades_the_old(approx, key):
    model = make_model()
    optimizer = SecondOrderOptimizer(model, approx=approx, samples=None, lr=0.0, ema_decay=0.5, **EACH)
    block = optimizer.engine.blocks[0]
    for finite in (True, False, False, True):
        optimizer.zero_grad()
        x = cases.randn(6, 4)
        nn.functional.cross_entropy(model(x if finite else x * math.nan), torch.arange(6) % 3).backward()
        for p in model.parameters():
            p.grad.zero_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    assert block.average.weights[key].item() == 1 + 0.5**3


@pytest.mark.parametrize("approx", cases.APPROXIMATIONS)
def test_every_approximation_rests_and_its_factor_too(approx, monkeypatch):
    model = make_model()
    options = {"approx": approx, "samples": None, "lr": 0.0, "momentum": 0.0, "rank": 4, "damping": 0.1}
    optimizer = SecondOrderOptimizer(model, **options, **ADAPTIVE)
    (block, *_), factored = optimizer.engine.blocks, []
    own = block.refactor
    monkeypatch.setattr(
        block, "refactor", lambda *args, **kwargs: (factored.append(optimizer.engine.step), own(*args, **kwargs))
    )
    measured = train(optimizer, model, 60)
    assert all(len(times) < 20 for times in measured.values())
    assert factored[0] == 0 and len(factored) <= 3
    still = SecondOrderOptimizer(model, update_every=1, refactor_every=1, **options)
    train(still, model, 2)
    v = [cases.randn(*p.shape, seed=k) for k, p in enumerate(block.params)]
    damping = None if block.factors["step"].holds_damping else 0.1
    for ours, theirs in zip(block.solve(v, damping), still.engine.blocks[0].solve(v, damping), strict=True):
        close(ours, theirs, 1e-8)


def test_a_factor_is_computed_anew_when_the_average_or_the_damping_has_moved():
    model = make_model()
    optimizer = SecondOrderOptimizer(
        model,
        approx="kfac",
        samples=None,
        lr=0.0,
        momentum=0.0,
        update_every=1,
        refactor_every="adaptive",
        ema_decay=0.0,
    )
    (block, _) = optimizer.engine.blocks
    train(optimizer, model, 2)
    held = block.factor
    train(optimizer, model, 2)
    assert block.factor is held
    train(optimizer, model, 1, seed=lambda t: 5)
    assert block.factor is not held
    held = block.factor
    for group in optimizer.param_groups:
        group["damping"] *= 2
    train(optimizer, model, 1, seed=lambda t: 5)
    assert block.factor is not held


def test_after_a_measurement_that_is_not_finite_the_next_step_measures():
    model = make_model()
    optimizer = SecondOrderOptimizer(model, samples=None, lr=0.0, momentum=0.0, refresh_warmup=0, **ADAPTIVE)
    train(optimizer, model, 30)
    (block, _) = optimizer.engine.blocks
    while optimizer.engine.step < block.refresh.next_update:
        train(optimizer, model, 1)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(cases.randn(6, 4) * math.nan), torch.arange(6) % 3).backward()
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert block.refresh.next_update == optimizer.engine.step


@pytest.mark.parametrize("make", [SecondOrderOptimizer, Preconditioner])
@pytest.mark.parametrize("approx", ["kfac", "ekfac", "diag", "lowrank"])
def test_resuming_changes_no_bit(approx, make):
    def run(stop):
        model = make_model()
        options = {"approx": approx, "refresh_warmup": 3, "refresh_tol": 0.3, **ADAPTIVE}
        optimizer, step = make(model, **options), torch.optim.SGD(model.parameters(), lr=0.05)
        for t in range(25):
            if t == stop:
                saved = optimizer.state_dict()
                optimizer = make(model, **options)
                optimizer.load_state_dict(saved)
            optimizer.zero_grad()
            backward(model, t)
            optimizer.step()
            if make is Preconditioner:
                step.step()
        return list(model.parameters())

    for stop in (4, 13):
        assert all(torch.equal(p, q) for p, q in zip(run(None), run(stop), strict=True))


@pytest.mark.parametrize("approx", ["kfac", "ekfac"])
@pytest.mark.parametrize("curv_type", ["ggn", "empirical_fisher"])
def test_a_alone_is_measured_without_a_signal(curv_type, approx, monkeypatch):
    model = make_model()
    optimizer = SecondOrderOptimizer(
        model, approx=approx, curv_type=curv_type, samples=None, lr=0.0, ema_decay=0.0, update_every=1
    )
    train(optimizer, model, 1)
    whole = [dict(block.tensors) for block in optimizer.engine.blocks]
    sent, own = [], CurvaturePass.backward
    monkeypatch.setattr(CurvaturePass, "backward", lambda self, *args: (sent.append(1), own(self, *args))[1])
    optimizer.zero_grad()
    for block in optimizer.engine.blocks:
        block.refresh.due = ("A",)
    backward(model)
    assert not sent
    for block, known in zip(optimizer.engine.blocks, whole, strict=True):
        assert set(block.pending.tensors) == {"A", "count"}
        for key, value in block.pending.tensors.items():
            close(value, known[key])


def test_slow_drifts_add_up():
    model = make_model()
    optimizer = SecondOrderOptimizer(
        model, samples=None, lr=0.0, momentum=0.0, update_every=1, refactor_every="adaptive", ema_decay=0.99
    )
    (block, _) = optimizer.engine.blocks
    train(optimizer, model, 40)
    held, moves = block.factor, [dict(block.refresh.drifts)]
    while block.factor is held and len(moves) < 20:
        train(optimizer, model, 1, seed=lambda t: 9)
        moves.append(dict(block.refresh.drifts))
    assert 2 < len(moves) < 20 and block.factor is not held
    assert all(0 < now["A"] - before["A"] < 0.1 for before, now in pairwise(moves[:-1]))  # each alone is too small


def test_a_factor_that_failed_is_tried_again(monkeypatch):
    # with what the diagonal needs to be known in this precision none fails
    monkeypatch.setattr(symmetric, "rounding_level", lambda matrix: matrix.new_zeros(matrix.shape[:-1]))
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    optimizer = SecondOrderOptimizer(
        model, samples=None, damping=1e-16, lr=0.0, momentum=0.0, update_every=1, refactor_every="adaptive"
    )
    with pytest.warns(UserWarning, match="factorisations failed"):
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.ones(6, 4)), torch.arange(6) % 3).backward()
            optimizer.step()


def test_an_interval_may_become_a_number_and_adaptive_again():
    averages = []
    for switches in (False, True):
        model = make_model()
        optimizer = SecondOrderOptimizer(model, samples=None, lr=0.0, momentum=0.0, ema_decay=0.9, **ADAPTIVE)
        train(optimizer, model, 3, seed=lambda t: t)
        for group in optimizer.param_groups:
            group["update_every"] = 1
        train(optimizer, model, 20, seed=lambda t: t)
        if switches:
            for group in optimizer.param_groups:
                group["update_every"] = "adaptive"
        train(optimizer, model, 1, seed=lambda t: 50)
        averages.append(optimizer.engine.blocks[0].tensors["A"])
    close(*averages)


def test_options():
    model = make_model()
    with pytest.raises(ValueError, match="update_every='often'; pass an int of at least 1, \"adaptive\""):
        SecondOrderOptimizer(model, update_every="often")
    with pytest.raises(ValueError, match="refresh_tol=0; pass a number > 0"):
        SecondOrderOptimizer(model, refresh_tol=0)
    with pytest.raises(ValueError, match="refresh_warmup=-1; pass an int of at least 0"):
        SecondOrderOptimizer(model, refresh_warmup=-1)
    with pytest.raises(ValueError, match="refresh_cap=0; pass an int of at least 1"):
        SecondOrderOptimizer(model, refresh_cap=0)
    with pytest.raises(ValueError, match="solved through its rows"):
        SecondOrderOptimizer(model, approx="full", rows_limit=1, **ADAPTIVE)
