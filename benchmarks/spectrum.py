"""The eigenvalues of the Hessian and the GGN of a network on MNIST digits, before and after training.

    python -m benchmarks.spectrum                          # writes spectrum.png
    python -m benchmarks.spectrum --images 2000 --probes 8 --out curvature.png

A network 784-256-128-10 with ReLU, trained with Adam. Above: the density of all its eigenvalues by stochastic Lanczos
quadrature, from products with the curvature of the mean loss over the images alone. Below: the eigenvalues of the K-FAC
factors of each layer. Prints the largest and smallest eigenvalues, traces and norms.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.data import mnist
from benchmarks.hessian_quality import LOSS, trained
from benchmarks.problems import mlp
from torchcurv import curvature
from torchcurv.curv.linalg.stochastic import SpectralDensity
from torchcurv.plot import plot_layers, plot_spectrum

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KINDS = {"Hessian": "hessian", "GGN": "ggn"}
COLOURS = {"Hessian": "tab:orange", "GGN": "tab:blue"}
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def densities(model: nn.Module, data: Batches, probes: int, steps: int) -> dict[str, SpectralDensity]:
    return {
        name: curvature(model, LOSS, data, curv_type=kind, approx="operator").spectral_density(probes, steps)
        for name, kind in KINDS.items()
    }


def table(title: str, model: nn.Module, data: Batches, k: int, console: Console) -> None:
    """Print what products with each curvature tell."""
    shown = Table("", f"{k} largest eigenvalues", "smallest", "trace", "Frobenius norm", "seconds", title=title)
    for name, kind in KINDS.items():
        start = time.perf_counter()
        C = curvature(model, LOSS, data, curv_type=kind, approx="operator")
        top = ", ".join(f"{value:.3g}" for value in C.eigh(k, tol=1e-2).values.tolist())
        least = f"{float(C.eigh(1, 'smallest', tol=1e-2).values[0]):.3g}"
        cells = [f"{float(x.value):.3g} ± {float(x.standard_error):.2g}" for x in (C.trace(), C.norm(products=20))]
        shown.add_row(name, top, least, *cells, f"{time.perf_counter() - start:.0f}")
    console.print(shown)


def draw(stages: dict[str, tuple[dict[str, SpectralDensity], object]], damping: float, path: Path) -> None:
    """Write a PNG: a column for each stage, its densities above and its layers below."""
    figure, grid = plt.subplots(2, len(stages), figsize=(7 * len(stages), 8.5), squeeze=False, layout="constrained")
    for (title, (found, layers)), above, below in zip(stages.items(), *grid, strict=True):
        for name, density in found.items():
            plot_spectrum(density, above, label=name, color=COLOURS[name])
        above.set_title(f"{title}: all weights")
        above.grid(True, alpha=0.25)
        plot_layers(layers, below, damping=damping)
    low, high = (f(axes.get_ylim()[k] for axes in grid[1]) for k, f in enumerate((min, max)))
    for axes in grid[1]:
        axes.set_ylim(low, high)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--images", type=int, default=500, help="that the curvature is taken over")
    parser.add_argument("--batch", type=int, default=500, help="images that are in memory at once")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--probes", type=int, default=4)
    parser.add_argument("--lanczos", type=int, default=60, help="products per probe")
    parser.add_argument("--top", type=int, default=12, help="eigenvalues printed")
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("spectrum.png"))
    options = parser.parse_args()
    digits, console = mnist(options.data_dir), Console(width=150)
    order = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(1))[: options.images]
    x, y = digits.images[order], digits.labels[order]
    data = list(zip(x.split(options.batch), y.split(options.batch), strict=True))
    model, stages = mlp(), {}
    for title in ("before training", f"after {options.steps} steps of Adam"):
        if stages:
            trained(model, digits.images, digits.labels, options.steps)
        start = time.perf_counter()
        found = densities(model, data, options.probes, options.lanczos)
        stages[title] = found, curvature(model, LOSS, data, approx="kfac")
        products = len(KINDS) * options.probes * options.lanczos
        loss = LOSS(model(x), y).item()
        seconds = time.perf_counter() - start
        console.print(f"{title}: loss {loss:.3g}; {products} products for the densities in {seconds:.0f} s")
        table(title, model, data, options.top, console)
    draw(stages, options.damping, options.out)
    console.print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
