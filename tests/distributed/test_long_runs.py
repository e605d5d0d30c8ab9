"""Four processes, and many steps: what is decided on the way is decided alike by all."""

import pytest
import torch
from processes import WORLD, network, part, together, weights
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchcurv import SecondOrderOptimizer, VIOptimizer
from torchcurv.optim import AdaHesScale, CGNewton, DirectionalNewton
from torchcurv.optim.directional import above, from_noise

CE = nn.CrossEntropyLoss()
ADAPTIVE = {"update_every": "adaptive", "refactor_every": "adaptive", "refresh_warmup": 3, "refresh_cap": 20}
CONTROL = {"step_rule": "quadratic", "damping_rule": "lm", "model_samples": None}
EXACT = {"samples": None, "sharing": "expand", "update_every": 1, "refactor_every": 1}
LONG = {
    "adaptive": (SecondOrderOptimizer, {**ADAPTIVE, "lr": 0.05, "momentum": 0.9}),
    "control": (SecondOrderOptimizer, {**ADAPTIVE, **CONTROL, "damping_interval": 2}),
    "low rank": (SecondOrderOptimizer, {**ADAPTIVE, "approx": "lowrank", "lr": 0.05}),
    "draws": (VIOptimizer, {**ADAPTIVE, "dataset_size": 100, "lr": 0.02}),
    "conjugate gradients": (CGNewton, {"lr": 0.05}),
    "adahesscale": (AdaHesScale, {"lr": 0.01}),
    "directions": (DirectionalNewton, {"criterion": above(1e-4), "damping": from_noise(0.1), "lr": 0.05}),
}
SHORT = {
    "kfac": {**EXACT, "lr": 0.1, "momentum": 0.9},
    "shared": {**EXACT, "factor_placement": "shared", "lr": 0.1},
    "low rank": {**EXACT, "approx": "lowrank", "lr": 0.1},
    "rows": {**EXACT, "approx": "full", "rows_limit": 1, "lr": 0.1},
    "input": {"curv_type": "input", "ema_decay": 0.0, "update_every": 1, "refactor_every": 1, "lr": 0.01},
    "control": {**EXACT, **CONTROL},
}


def trained(make, options, ranks, world, steps):
    """ranks: whose parts these are, one where there are several processes. Parts are of equal size under control, which
    takes the batch as a whole."""
    model, controlled = network(), "step_rule" in options
    called = DistributedDataParallel(model) if len(ranks) < world else model
    opt = make(model, loss_fn=CE, **options)
    for step in range(steps):
        parts = [part(step + 1000 * r, 0) if controlled else part(step, r) for r in ranks]

        def closure(parts=parts):
            opt.zero_grad()
            losses = [CE(called(x), y) for x, y in parts]
            for loss in losses:
                (loss / len(losses)).backward()
            return losses[0]

        if controlled:
            x, y = (torch.cat(a) for a in zip(*parts, strict=True))
            opt.step(lambda x=x, y=y: CE(called(x), y))
        else:
            opt.step(closure)
    return weights(model)


def long_runs(rank, world, steps):
    return {name: trained(make, options, [rank], world, steps) for name, (make, options) in LONG.items()}


def short_runs(rank, world):
    return {name: trained(SecondOrderOptimizer, options, [rank], world, 4) for name, options in SHORT.items()}


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_many_steps_leave_processes_equal(steps):
    first, second = together(long_runs, WORLD, steps)
    for name in LONG:
        assert first[name].isfinite().all()
        assert torch.equal(first[name], second[name]), name


def test_four_processes_equal_one():
    first, *others = together(short_runs, 4, world=4)
    for name, options in SHORT.items():
        assert all(torch.equal(first[name], other[name]) for other in others), name
        expected = trained(SecondOrderOptimizer, options, range(4), 4, 4)
        assert (first[name] - expected).norm() <= 1e-10 * expected.norm(), (name, (first[name] - expected).norm())
