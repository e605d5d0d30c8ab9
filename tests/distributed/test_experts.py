"""Experts that get tokens in one process only, in all, and in none, equal those of one process with all parts."""

import torch
from processes import STEPS, WORLD, part, together, weights
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from torchcurv import SecondOrderOptimizer

EXPERTS = 5


class Experts(nn.Module):
    """Of the samples' tokens; the first process has no use for the fourth expert, and nobody for the last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.head = nn.Parameter(torch.randn(EXPERTS, 6, 2)), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        tokens = x.reshape(-1, 2)
        chosen = (7 * tokens[:, 0]).long().abs() % (3 if len(x) == 8 else EXPERTS - 1)
        h = tokens.new_zeros(len(tokens), 6)
        for k in chosen.unique():
            own = (chosen == k).nonzero()[:, 0]
            h = h.index_add(0, own, F.linear(tokens[own], self.w[k]))
        return self.head(h.tanh().reshape(len(x), 2, 6).mean(1))


CASES = {
    "kfac": {},
    "diag": {"approx": "diag"},
    "block": {"approx": "block"},
    "full": {"approx": "full", "partition": "all"},
    "adaptive": {"update_every": "adaptive", "refactor_every": "adaptive", "refresh_warmup": 1},
}


def trained(name, rank):
    model = Experts()
    called = model if rank is None else DistributedDataParallel(model)
    every = {"update_every": 2, "refactor_every": 2, "samples": None, "lr": 0.1}
    optimizer = SecondOrderOptimizer(model, loss_fn="cross_entropy", **{**every, **CASES[name]})
    for step in range(STEPS + 2):
        optimizer.zero_grad()
        for r in range(WORLD) if rank is None else [rank]:
            x, y = part(step, r)
            (F.cross_entropy(called(x), y) / (WORLD if rank is None else 1)).backward()
        optimizer.step()
    return [*weights(model).tolist(), len(optimizer.blocks)]


def all_trained(rank):
    return {name: trained(name, rank) for name in CASES}


def test_experts_of_processes_equal_those_of_micro_batches():
    first, second = together(all_trained)
    for name in CASES:
        assert first[name] == second[name], name
        found, truth = (torch.tensor(x, dtype=torch.float64) for x in (first[name], trained(name, None)))
        assert (found - truth).norm() <= 1e-10 * truth.norm(), (name, (found - truth).norm())
    assert first["kfac"][-1] == EXPERTS + 1
