"""Rows that a process keeps of its part are collected by all: they equal those of one process with all the parts."""

import torch
from processes import STEPS, WORLD, convolutions, network, part, together, weights
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchcurv import SecondOrderOptimizer


def wide():
    """Of its layers the first sees more rows than inputs in a process, the second in both, the third in none."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 30), nn.Tanh(), nn.Linear(30, 3)
    return nn.Sequential(*layers).double()


def normalised():
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, affine=True)
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)).double()


class Words(nn.Module):
    """Tokens, alone and in bags of unequal size, positions that all samples share, and a head of the same weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.bags = nn.Embedding(7, 5), nn.EmbeddingBag(7, 5)
        self.positions, self.inner = nn.Parameter(torch.randn(4, 5)), nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.words.weight
        self.double()

    def forward(self, x):
        index = (3 * x.abs()).long() % 7
        sizes = 1 + index[:, 0] % 3
        bags = self.bags(index.flatten()[: sizes.sum()], sizes.cumsum(0) - sizes)
        seen = (self.words(index) + self.positions).tanh().mean(1)
        return self.head(self.inner(seen + bags).tanh())


INPUT = {"curv_type": "input", "ema_decay": 0.0, "lr": 0.01, "damping_type": "factored"}
SUM = nn.CrossEntropyLoss(reduction="sum")
CASES = {
    "low rank": (network, {"approx": "lowrank", "rank": 5}),
    "low rank, all pairs": (network, {"approx": "lowrank", "rank": 60, "partition": "all"}),
    "low rank, adaptive": (network, {"approx": "lowrank", "update_every": "adaptive", "refactor_every": "adaptive"}),
    "low rank, drawn": (network, {"approx": "lowrank", "samples": None, "curv_type": "empirical_fisher"}),
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
}


def trained(name, rank):
    """rank: None for one process that accumulates the parts. "without data": one process has none in a step."""
    make, options = CASES[name]
    model = make()
    called = model if rank is None else DistributedDataParallel(model)
    every = {"update_every": 1, "refactor_every": 1, "lr": 0.1, "momentum": 0.9, "loss_fn": nn.CrossEntropyLoss()}
    exact = {} if "curv_type" in options else {"samples": None}
    opt = SecondOrderOptimizer(model, **{**every, **exact, **options})
    loss_fn = opt.loss_fn
    for step in range(STEPS):
        opt.zero_grad()
        for r in range(WORLD) if rank is None else [rank]:
            x, y = part(step, r)
            y = torch.full_like(y, -100) if "without data" in name and step == 1 and r == 1 else y
            loss = loss_fn(called(x), y)
            (loss / WORLD if rank is None else loss).backward()
        opt.step()
    return weights(model).tolist()


def all_trained(rank):
    return {name: trained(name, rank) for name in CASES}


def test_rows_of_processes_equal_those_of_micro_batches():
    first, second = together(all_trained)
    for name in CASES:
        assert first[name] == second[name], name  # bit for bit
        expected = torch.tensor(trained(name, None), dtype=torch.float64)
        found = torch.tensor(first[name], dtype=torch.float64)
        assert (found - expected).norm() <= 1e-10 * expected.norm(), name
