"""Several processes, what each of them trains on, and what they return."""

import os
import tempfile
import traceback
from pathlib import Path

import torch
from torch import nn

WORLD, N, STEPS = 2, 8, 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def convolutions():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 2), nn.GroupNorm(1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 3)
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), *layers).double()


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
        self.places = nn.Embedding(4, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.words.weight
        self.double()

    def forward(self, x):
        index = (3 * x.abs()).long() % 7
        sizes = 1 + index[:, 0] % 3
        bags = self.bags(index.flatten()[: sizes.sum()], sizes.cumsum(0) - sizes)
        seen = (self.words(index) + self.positions + self.places(torch.arange(4))).tanh().mean(1)
        return self.head(self.inner(seen + bags).tanh())


class Sequences(nn.Module):
    """Of two positions in the first process, and of one in the others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def forward(self, x):
        return self.layers(torch.stack([x, x.flip(1)] if len(x) == N else [x], 1)).mean(1)


def grouped():
    torch.manual_seed(0)
    layers = nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 6, 1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)
    return nn.Sequential(*layers).double()


NETWORKS = {"mlp": network, "cnn": convolutions}


def part(step, rank):
    """The data of one process; they have unequal numbers of samples."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    n = (N, N - 3, 2, N - 2)[rank]
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def joined(rank, path, world, job, arguments, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    try:
        results[rank] = job(rank, *arguments)
    except Exception:  # for the test to see
        results[rank] = traceback.format_exc()
    torch.distributed.destroy_process_group()


def together(job, *arguments, world=WORLD):
    """What a function of (rank, ...) returns in each process."""
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        results = manager.dict()
        given = (os.fspath(Path(folder) / "rendezvous"), world, job, arguments, results)
        torch.multiprocessing.start_processes(joined, given, nprocs=world, start_method="spawn")
        found = [results[rank] for rank in range(world)]
    for one in found:
        assert not isinstance(one, str), one
    return found
