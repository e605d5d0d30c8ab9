"""Look at curvature: the eigenvalues of the Hessian and of each layer's K-FAC, before and after training.

python -m examples.spectrum
python -m examples.spectrum --images 1000 --curv-type ggn
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

import torchcurv
import torchcurv.plot
from examples.classify import digits


def main(argv: list[str] | None = None) -> Figure:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--curv-type", default="hessian", choices=["hessian", "ggn", "fisher", "empirical_fisher"])
    parser.add_argument("--probes", type=int, default=2, help="of Lanczos quadrature")
    parser.add_argument("--lanczos", type=int, default=30, help="products with the curvature per probe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("examples/results/spectrum.png"))
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    x, y = digits(args.images)
    data, loss_fn = [(x, y)], nn.CrossEntropyLoss()
    model = nn.Sequential(nn.Linear(784, args.width), nn.Tanh(), nn.Linear(args.width, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    figure = Figure(figsize=(11, 4), layout="constrained")
    densities, layers = figure.subplots(1, 2)

    for name in ("before training", "after training"):
        curvature = torchcurv.curvature(model, loss_fn, data, curv_type=args.curv_type, approx="operator")
        values, _, _ = curvature.eigh(5)
        trace, error = curvature.trace(30)
        print(f"{name}: trace {trace:.3g} ± {error:.1g}, largest eigenvalues {[round(float(v), 2) for v in values]}")
        options = {"probes": args.probes, "steps": args.lanczos}
        torchcurv.plot.plot_spectrum(curvature, densities, label=name, **options)
        if name == "before training":
            for _ in range(args.steps):
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()

    kfac = torchcurv.curvature(model, loss_fn, data, approx="kfac")
    torchcurv.plot.plot_layers(kfac, layers, damping=1e-3)
    densities.set_title(f"density of the eigenvalues, {args.curv_type}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    return figure


if __name__ == "__main__":
    main()
