"""Solve a differential equation: ResidualNewton beside Adam on u'' = f, u = 0 at both ends of [0, 1].

python -m examples.poisson_1d
python -m examples.poisson_1d --points 64 --width 48 --steps 60
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from torchcurv import ResidualNewton


class Equation:
    """A network for u, and its residuals at some points."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.u = nn.Sequential(nn.Linear(1, args.width), nn.Tanh(), nn.Linear(args.width, 1)).double()
        self.x = torch.linspace(0, 1, args.points, dtype=torch.float64)[:, None].requires_grad_()
        waves = [torch.sin(k * math.pi * self.x.detach()) for k in (1, 4)]
        self.exact, self.f = waves[0] + waves[1] / 4, -(math.pi**2) * (waves[0] + 4 * waves[1])
        self.ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)

    def residuals(self) -> list[Tensor]:
        (slope,) = torch.autograd.grad(self.u(self.x).sum(), self.x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), self.x, create_graph=True)
        return [bend - self.f, self.u(self.ends)]

    def loss(self) -> Tensor:
        inside, ends = self.residuals()
        return 0.5 * inside.square().mean() + 5 * ends.square().mean()

    @torch.no_grad()
    def error(self) -> float:
        return float((self.u(self.x) - self.exact).norm() / self.exact.norm())


def main(argv: list[str] | None = None) -> Figure:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60, help="of ResidualNewton; Adam gets 20 times as many")
    parser.add_argument("--out", type=Path, default=Path("examples/results/poisson_1d.png"))
    args = parser.parse_args(argv)
    newton, adam = Equation(args), Equation(args)
    ours, theirs = ResidualNewton(newton.u, reduction="mean"), torch.optim.Adam(adam.u.parameters(), lr=3e-2)

    def adam_step() -> None:
        theirs.zero_grad()
        adam.loss().backward()
        theirs.step()

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    newton_step = partial(ours.step, newton.residuals, [1.0, 10.0])
    for name, equation, times, step in (("ResidualNewton", newton, 1, newton_step), ("Adam", adam, 20, adam_step)):
        seconds, errors, start = [], [], time.perf_counter()
        for _ in range(args.steps * times):
            step()
            seconds.append(time.perf_counter() - start)
            errors.append(equation.error())
        print(f"{name:15} {args.steps * times:6} steps   {seconds[-1]:5.2f} s   relative error {errors[-1]:.1e}")
        axes.loglog(seconds, errors, label=name)
    axes.set(xlabel="seconds", ylabel="relative error of u")
    axes.legend()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    return figure


if __name__ == "__main__":
    main()
