"""A regression with a gap in its inputs: VIOptimizer says where the predictions are not known.

python -m examples.uncertainty
python -m examples.uncertainty --approx diag --steps 1000
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from torchcurv import VIOptimizer

NOISE = 0.1  # standard deviation of the targets


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """x in [-1, -0.4] and [0.4, 1], y = sin(4 x) + noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, generator=generator) * 0.6 + 0.4
    x[::2] *= -1
    return x, torch.sin(4 * x) + NOISE * torch.randn(count, 1, generator=generator)


def main(argv: list[str] | None = None) -> Figure:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=80)
    parser.add_argument("--width", type=int, default=30)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--approx", default="kfac", choices=["kfac", "ekfac", "diag", "block"])
    parser.add_argument("--draws", type=int, default=200, help="that predictions average over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("examples/results/uncertainty.png"))
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    x, y = data(args.points, args.seed)
    model = nn.Sequential(
        nn.Linear(1, args.width), nn.Tanh(), nn.Linear(args.width, args.width), nn.Tanh(), nn.Linear(args.width, 1)
    )
    optimizer = VIOptimizer(
        model, len(x), loss_fn="mse", noise_variance=NOISE**2, approx=args.approx, lr=0.1, momentum=0.9, damping=0.1,
        ema_decay=0.95, init_precision=1e4, seed=args.seed,
    )  # fmt: skip
    schedule = CosineAnnealingLR(optimizer, args.steps)
    for _ in range(args.steps):
        optimizer.zero_grad()
        with optimizer.sampled_params():
            nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        schedule.step()

    grid = torch.linspace(-1.5, 1.5, 200)[:, None]
    outputs = optimizer.predict(grid, args.draws)
    mean, sd = outputs.mean(0)[:, 0], (outputs.var(0) + NOISE**2).sqrt()[:, 0]
    gap = grid[:, 0].abs() < 0.3
    seen = (grid[:, 0].abs() > 0.5) & (grid[:, 0].abs() < 0.9)
    print(f"predicted standard deviation: {sd[seen].mean():.3f} at the data, {sd[gap].mean():.3f} in the gap")

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for k in (1, 2):
        axes.fill_between(grid[:, 0], mean - k * sd, mean + k * sd, color="tab:blue", alpha=0.2, linewidth=0)
    axes.plot(grid[:, 0], mean, color="tab:blue", label=f"VIOptimizer, {args.approx}: mean, 1 and 2 sd")
    axes.plot(x[:, 0], y[:, 0], ".", color="black", label="data")
    axes.set(xlabel="x", ylabel="y", ylim=(-3, 3))
    axes.legend()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    return figure


if __name__ == "__main__":
    main()
