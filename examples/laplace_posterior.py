"""Laplace after training: error bars for a regression that is already trained, and a prior by the evidence.

python -m examples.laplace_posterior
python -m examples.laplace_posterior --approx diag --rounds 5
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import torchcurv
from examples.uncertainty import NOISE, data


def train(model: nn.Module, x: Tensor, y: Tensor, prior_precision: float, steps: int) -> None:
    """To the maximum of the posterior, by L-BFGS: squared errors over 2 σ², and the prior's ½ δ |θ|²."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=steps, history_size=30, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in model.parameters())
        loss = (model(x) - y).square().sum() / (2 * NOISE**2) + prior_precision / 2 * decay
        loss.backward()
        return loss

    optimizer.step(closure)


def main(argv: list[str] | None = None) -> Figure:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=80)
    parser.add_argument("--width", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300, help="of training, in each round")
    parser.add_argument("--rounds", type=int, default=3, help="of training, and of choosing the prior precision")
    parser.add_argument("--approx", default="full", choices=["full", "block", "kfac", "diag"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("examples/results/laplace_posterior.png"))
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    x, y = data(args.points, args.seed)
    model = nn.Sequential(
        nn.Linear(1, args.width), nn.Tanh(), nn.Linear(args.width, args.width), nn.Tanh(), nn.Linear(args.width, 1)
    )
    prior_precision = 1.0
    for _ in range(args.rounds):
        train(model, x, y, prior_precision, args.steps)
        posterior = torchcurv.laplace(
            model, nn.MSELoss(), [(x, y)], approx=args.approx, prior_precision=prior_precision, noise_variance=NOISE**2
        )
        evidence = posterior.optimize_prior()
        print(f"prior precision {prior_precision:.3f}: log marginal likelihood {evidence[0]:.1f}")
        prior_precision = posterior.prior_precision

    grid = torch.linspace(-1.5, 1.5, 200)[:, None]
    mean, covariance = posterior.predict_regression(grid)
    mean, sd = mean[:, 0], covariance[:, 0, 0].sqrt()
    figure = Figure(figsize=(11, 4), layout="constrained")
    predictions, prior = figure.subplots(1, 2)
    for k in (1, 2):
        predictions.fill_between(grid[:, 0], mean - k * sd, mean + k * sd, color="tab:blue", alpha=0.2, linewidth=0)
    predictions.plot(grid[:, 0], mean, color="tab:blue", label=f"Laplace, {args.approx}: mean, 1 and 2 sd")
    predictions.plot(x[:, 0], y[:, 0], ".", color="black", label="data")
    predictions.set(xlabel="x", ylabel="y", ylim=(-3, 3))
    predictions.legend()
    precisions = torch.logspace(-3, 2, 60)
    prior.semilogx(precisions, [float(posterior.log_marginal_likelihood(p)) for p in precisions])
    prior.axvline(prior_precision, linestyle=":", color="grey")
    prior.set(xlabel="prior precision", ylabel="log marginal likelihood")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    return figure


if __name__ == "__main__":
    main()
