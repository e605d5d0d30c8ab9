"""A differential equation: ResidualNewton against tuned Adam, in seconds to a relative error.

    python -m benchmarks.poisson                    # tune both on seeds 10 to 12, then race on seeds 0 to 4
    python -m benchmarks.poisson --problem one --seeds 0 1

u'' = f on [0, 1] with u = 0 at both ends, in float64, by a network 1-32-1 of two layers with tanh. f is that of a known
u: sin(pi x), or sin(pi x) + sin(4 pi x) / 4. The loss is ½ mean (u'' - f)² over 32 fixed points plus w/2 mean u² at the
ends. The relative L2 error of u is taken at 1,001 points, off the clock.

Adam is torch's fused one with a cosine schedule; its rate, the length of its schedule and w are the best of a grid.
ResidualNewton is at its defaults; its w is the best of the same values. The best has the fewest steps to the target in
the median, since steps of one optimizer take equal time. Adam's target is the looser one; a third row is Adam on its
way to the other, with the longest schedule. The two run in turns, several rounds for each seed, and the median of the
seconds counts.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

WIDTH, POINTS = 32, 32
ADAM_TARGET, NEWTON_TARGET = 5e-3, 1e-4
RATES, LENGTHS, WEIGHTS = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), (300, 1000, 10000), (1.0, 10.0, 100.0, 1000.0)
TUNING_STEPS = 1000  # the most that are looked at while tuning Adam
NEWTON_STEPS, ADAM_EVERY = 300, 10  # the most steps; steps between two looks at Adam's error
# By name, the factors a_k of u = Σ a_k sin(k pi x).
PROBLEMS = {"one": {1: 1.0}, "two": {1: 1.0, 4: 0.25}}


class Poisson:
    """A network, its residuals, and how far it is from the solution."""

    def __init__(self, name: str, seed: int) -> None:
        self.waves = PROBLEMS[name]
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)).double()
        self.x = torch.linspace(0, 1, POINTS + 2, dtype=torch.float64)[1:-1, None].requires_grad_()
        self.ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        self.f = sum(-a * (k * math.pi) ** 2 * torch.sin(k * math.pi * self.x.detach()) for k, a in self.waves.items())
        self.grid = torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None]
        self.u = sum(a * torch.sin(k * math.pi * self.grid) for k, a in self.waves.items())

    def residuals(self) -> dict[str, Tensor]:
        u = self.model(self.x)
        (slope,) = torch.autograd.grad(u.sum(), self.x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), self.x, create_graph=True)
        return {"inside": bend - self.f, "ends": self.model(self.ends)}

    @torch.no_grad()
    def error(self) -> float:
        return float((self.model(self.grid) - self.u).norm() / self.u.norm())


@dataclass(frozen=True)
class Run:
    """(steps, seconds, error) after some steps."""

    points: list[tuple[int, float, float]]

    def first_at(self, target: float) -> tuple[float, float]:
        """(steps, seconds) at the first look with an error of at most `target`, or infinities."""
        return next(
            ((steps, seconds) for steps, seconds, error in self.points if error <= target), (math.inf, math.inf)
        )

    @property
    def best(self) -> float:
        return min(error for _, _, error in self.points)


def run(problem: Poisson, step: Callable[[], None], steps: int, every: int, target: float) -> Run:
    """Until the target is reached, or for so many steps."""
    points, seconds = [], 0.0
    for k in range(1, steps + 1):
        start = time.perf_counter()
        step()
        seconds += time.perf_counter() - start
        if k % every == 0:
            points.append((k, seconds, problem.error()))
            if points[-1][2] <= target:
                break
    return Run(points)


def adam(
    name: str, seed: int, lr: float, length: int, weight: float, target: float = ADAM_TARGET, most: int = 10**6
) -> Run:
    problem = Poisson(name, seed)
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length)

    def step() -> None:
        optimizer.zero_grad()
        r = problem.residuals()
        (0.5 * r["inside"].square().mean() + 0.5 * weight * r["ends"].square().mean()).backward()
        optimizer.step()
        schedule.step()

    return run(problem, step, min(length, most), ADAM_EVERY, target)


def newton(name: str, seed: int, weight: float, target: float = NEWTON_TARGET) -> Run:
    from torchcurv.optim import ResidualNewton

    problem = Poisson(name, seed)
    optimizer = ResidualNewton(problem.model, reduction="mean")
    weights = {"ends": weight}
    return run(problem, lambda: optimizer.step(problem.residuals, weights), NEWTON_STEPS, 1, target)


def median_steps(runs: list[Run], target: float) -> float:
    return statistics.median(one.first_at(target)[0] for one in runs)


def tune(name: str, seeds: list[int]) -> tuple[dict[str, float], dict[str, float]]:
    """The best options of Adam and of ResidualNewton."""
    grid = [dict(zip(("lr", "length", "weight"), x, strict=True)) for x in itertools.product(RATES, LENGTHS, WEIGHTS)]
    found = []
    for x in tqdm(grid, leave=False):
        found.append(median_steps([adam(name, seed, **x, most=TUNING_STEPS) for seed in seeds], ADAM_TARGET))
    own = [{"weight": w} for w in WEIGHTS]
    ours = [median_steps([newton(name, seed, **x) for seed in seeds], NEWTON_TARGET) for x in own]
    return grid[found.index(min(found))], own[ours.index(min(ours))]


def row(label: str, options: dict[str, float], target: float, seeds: list[list[Run]]) -> list[str]:
    """Of runs by seed and round."""
    hits = [[one.first_at(target) for one in rounds] for rounds in seeds]
    seconds = [statistics.median(second for _, second in rounds) for rounds in hits]
    return [
        label,
        ", ".join(f"{key} {value:g}" for key, value in options.items()),
        f"{target:g}",
        f"{statistics.median(rounds[0][0] for rounds in hits):.0f}",
        f"{statistics.median(seconds):.3f}",
        f"{min(seconds):.3f} to {max(seconds):.3f}",
        f"{sum(math.isfinite(s) for s in seconds)} of {len(seconds)}",
        f"{statistics.median(rounds[0].best for rounds in seeds):.1e}",
    ]


def race(name: str, seeds: list[int], tuning_seeds: list[int], rounds: int) -> Table:
    best, ours = tune(name, tuning_seeds)
    adams: list[list[Run]] = [[] for _ in seeds]
    newtons: list[list[Run]] = [[] for _ in seeds]
    adam(name, tuning_seeds[0], **best)  # the first runs warm up
    newton(name, tuning_seeds[0], **ours)
    for _ in range(rounds):
        for k, seed in enumerate(seeds):
            adams[k].append(adam(name, seed, **best))
            newtons[k].append(newton(name, seed, **ours))
    slowly = {**best, "length": LENGTHS[-1]}
    further = [[adam(name, seed, **slowly, target=NEWTON_TARGET)] for seed in seeds]
    table = Table(title=f"u'' = f, {name}: medians over {len(seeds)} seeds, {rounds} rounds", box=box.SIMPLE)
    for column in ("optimizer", "options", "target", "steps", "seconds", "least to most", "reached", "best error"):
        table.add_column(column, no_wrap=True)
    table.add_row(*row("Adam", best, ADAM_TARGET, adams))
    table.add_row(*row("ResidualNewton", ours, NEWTON_TARGET, newtons))
    table.add_row(*row("Adam", slowly, NEWTON_TARGET, further))
    return table


def main(argv: list[str] | None = None) -> None:
    global POINTS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=[*PROBLEMS, "all"], default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tuning-seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--points", type=int, default=POINTS)
    args = parser.parse_args(argv)
    POINTS = args.points
    for name in PROBLEMS if args.problem == "all" else [args.problem]:
        Console(width=140).print(race(name, args.seeds, args.tuning_seeds, args.rounds))


if __name__ == "__main__":
    main()
