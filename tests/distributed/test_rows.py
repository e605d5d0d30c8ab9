"""What does not simply add up: rows that a process keeps of its part are collected by all, and K-FAC of whole gradients
is in two units. The steps equal those of one process that accumulates the parts."""

import pytest
import torch
from processes import (
    STEPS,
    WORLD,
    Sequences,
    Words,
    convolutions,
    grouped,
    network,
    normalised,
    part,
    together,
    weights,
    wide,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchcurv import SecondOrderOptimizer
from torchcurv.optim import DirectionalNewton
from torchcurv.optim.directional import above, constant, from_noise, top_k

INPUT = {"curv_type": "input", "ema_decay": 0.0, "lr": 0.01, "damping_type": "factored"}
ADAPTIVE = {"update_every": "adaptive", "refactor_every": "adaptive", "refresh_warmup": 1}
SUM = nn.CrossEntropyLoss(reduction="sum")
CASES = {
    "low rank": (network, {"approx": "lowrank", "rank": 5}),
    "low rank, all pairs": (network, {"approx": "lowrank", "rank": 60, "partition": "all"}),
    "low rank, adaptive": (network, {"approx": "lowrank", "update_every": "adaptive", "refactor_every": "adaptive"}),
    "low rank, empirical": (network, {"approx": "lowrank", "curv_type": "empirical_fisher"}),
    "block": (network, {"approx": "block", "rows_limit": 1}),
    "some blocks": (network, {"approx": "block", "rows_limit": 25}),
    "group": (network, {"approx": "full", "rows_limit": 1, "partition": "group"}),
    "parameter": (network, {"approx": "full", "rows_limit": 1, "partition": "parameter"}),
    "full": (network, {"approx": "full", "rows_limit": 1}),
    "full, convolutions": (convolutions, {"approx": "full", "rows_limit": 1}),
    "block, convolutions": (convolutions, {"approx": "block", "rows_limit": 1}),
    "full, norms": (normalised, {"approx": "full", "rows_limit": 1}),
    "full, words": (Words, {"approx": "full", "rows_limit": 1}),
    "block, words": (Words, {"approx": "block", "rows_limit": 1}),
    "low rank, words": (Words, {"approx": "lowrank", "rank": 10}),
    "input": (wide, INPUT),
    "input, convolutions": (convolutions, INPUT),
    "full, without data": (network, {"approx": "full", "rows_limit": 1, "loss_fn": SUM}),
    "low rank, without data": (network, {"approx": "lowrank", "loss_fn": SUM}),
    "input, without data": (wide, {**INPUT, "loss_fn": SUM}),
    "whole": (network, {"sharing": "whole"}),
    "whole, convolutions": (convolutions, {"sharing": "whole"}),
    "whole, at one position and at many": (Sequences, {"sharing": "whole"}),
    "whole, adaptive": (Sequences, {"sharing": "whole", **ADAPTIVE}),
    "whole, in groups, without data": (grouped, {"sharing": "whole", "loss_fn": SUM}),
    "whole, at many, without data": (Sequences, {"sharing": "whole", "loss_fn": SUM}),
    "whole, corrected": (Sequences, {"sharing": "whole", "approx": "ekfac"}),
    "full, nan": (network, {"approx": "full", "rows_limit": 1}),
    "low rank, nan": (network, {"approx": "lowrank"}),
    "input, nan": (wide, INPUT),
}

NEWTON = {
    "largest": {"criterion": top_k(3), "damping": constant(0.1)},
    "by noise": {"criterion": above(1e-6), "damping": from_noise(0.1), "partition": "layer"},
    "some samples": {"criterion": top_k(2), "damping": constant(0.1), "curvature_samples": 6, "gradient_samples": 4},
    "empirical": {"criterion": top_k(4), "damping": constant(0.1), "curv_type": "empirical_fisher"},
    "drawn": {"criterion": top_k(3), "damping": constant(0.1), "curv_type": "fisher", "samples": 2},
    "without data": {"criterion": top_k(3), "damping": constant(0.1), "loss_fn": SUM},
    "nan": {"criterion": top_k(3), "damping": constant(0.1)},
}


def trained(name, rank):
    """rank: None for one process that accumulates the parts. In one step a part may have no data, or no numbers."""
    make, options = CASES[name] if name in CASES else (network, NEWTON[name])
    model = make()
    called = model if rank is None else DistributedDataParallel(model)
    every = {"lr": 0.1, "loss_fn": nn.CrossEntropyLoss()}
    if name in CASES:
        every |= {"update_every": 1, "refactor_every": 1, "momentum": 0.9}
    exact = {} if "curv_type" in options else {"samples": None}
    make_optimizer = SecondOrderOptimizer if name in CASES else DirectionalNewton
    opt = make_optimizer(model, **{**every, **exact, **options})
    loss_fn = opt.loss_fn
    for step in range(STEPS):
        opt.zero_grad()
        for r in range(WORLD) if rank is None else [rank]:
            x, y = part(step, r)
            if step == r == 1:
                y = torch.full_like(y, -100) if "without data" in name else y
                x = x / 0 if "nan" in name else x
            loss = loss_fn(called(x), y)
            (loss / WORLD if rank is None else loss).backward()
        opt.step()
    return weights(model).tolist()


def all_trained(rank):
    return {name: trained(name, rank) for name in (*CASES, *NEWTON)}


@pytest.mark.filterwarnings("ignore:block .* not finite")
def test_rows_of_processes_equal_those_of_micro_batches():
    first, second = together(all_trained)
    for name in (*CASES, *NEWTON):
        assert first[name] == second[name], name  # bit for bit
        found, expected = (torch.tensor(x, dtype=torch.float64) for x in (first[name], trained(name, None)))
        assert found.isfinite().all(), name
        assert (found - expected).norm() <= 1e-10 * expected.norm(), (name, (found - expected).norm())
