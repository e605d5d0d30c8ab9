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


NETWORKS = {"mlp": network, "cnn": convolutions}


def part(step, rank):
    """The data of one process; that of the second has fewer samples."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    n = N - 3 * rank
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def joined(rank, path, job, arguments, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    try:
        results[rank] = job(rank, *arguments)
    except Exception:  # for the test to see
        results[rank] = traceback.format_exc()
    torch.distributed.destroy_process_group()


def together(job, *arguments):
    """What a function of (rank, ...) returns in each of two processes."""
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        results = manager.dict()
        given = (os.fspath(Path(folder) / "rendezvous"), job, arguments, results)
        torch.multiprocessing.start_processes(joined, given, nprocs=WORLD, start_method="spawn")
        found = [results[rank] for rank in range(WORLD)]
    for one in found:
        assert not isinstance(one, str), one
    return found
