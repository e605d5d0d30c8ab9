"""Low-rank GGN: what all its eigenvalues cost, and the derivatives of every sample along the largest ones.

    python -m benchmarks.lowrank --threads 2

On the MLP 784-1024-1024-10 with 128 random inputs and 10 classes the exact GGN has 1280 rows over 1.9 million
parameters. Times are multiples of an SGD step of the same batch in the same run (medians of rounds that take turns);
memory is the growth of the process's peak, next to what the rows would take if they were stored.
"""

import argparse
import resource
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.problems import wide_mlp
from benchmarks.step_time import sgd_step
from torchcurv import directions
from torchcurv.optim.directional import top_k


def peak() -> float:
    """MB that the process has held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, loss_fn = wide_mlp(0), nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.batch, 784, generator=generator)
    y = torch.randint(10, (args.batch,), generator=generator)
    step = sgd_step(wide_mlp(0), loss_fn, x, y)

    def spectrum(k: int) -> Tensor:
        (found,) = directions(model, loss_fn, [(x, y)], criterion=top_k(k)).values()
        return found.spectrum

    for _ in range(5):
        step()
    before = peak()
    works = {"eigenvalues": lambda: spectrum(0), "and 10 directions": lambda: spectrum(10)}
    times: dict[str, list[float]] = {name: [] for name in ("SGD step", *works)}
    for _ in range(args.rounds):
        times["SGD step"] += [seconds(step) for _ in range(5)]
        for name, work in works.items():
            times[name].append(seconds(work))
    held = peak() - before
    base = statistics.median(times.pop("SGD step"))
    table = Table(title=f"Exact GGN of {args.batch} samples: {len(spectrum(0))} eigenvalues that are not zero")
    for column in ("work", "SGD steps"):
        table.add_column(column, justify="right")
    for name, own in times.items():
        table.add_row(name, f"{statistics.median(own) / base:.1f}")
    console = Console()
    console.print(table)
    stored = 10 * args.batch * sum(p.numel() for p in model.parameters()) * 4 / 1e6
    console.print(f"memory {held:.0f} MB; the rows would take {stored:.0f} MB. SGD step {base * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
