"""How well a diagonal of the Hessian is approximated: the experiment of the HesScale paper on MNIST digits.

    python -m benchmarks.hessian_quality                   # tanh and ReLU, before and after training
    python -m benchmarks.hessian_quality --batch 8 --steps 20

A network 784-64-64-64-10. For each way to estimate diag(H) of the loss of one batch: the L1 distance to the exact
diagonal over that of the exact diagonal to zero, for each weight and bias, and their mean. "passes" counts backward
passes. Elsayed and Mahmood, 2210.11639, section 5.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.data import mnist
from benchmarks.problems import dense, initialise

WIDTHS = (784, 64, 64, 64, 10)
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}
LOSS = nn.CrossEntropyLoss()


def _diagonal(**options: object) -> Callable[[nn.Module, Tensor, Tensor], list[Tensor]]:
    def estimate(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
        from torchcurv import curvature

        flat = curvature(model, LOSS, [(x, y)], approx="diag", **options).diag()
        sizes = [p.numel() for p in model.parameters()]
        return [part.reshape(p.shape) for part, p in zip(flat.split(sizes), model.parameters(), strict=True)]

    return estimate


def _squared_gradient(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return [g.square() for g in torch.autograd.grad(LOSS(model(x), y), list(model.parameters()))]


HESSIAN = {"curv_type": "hessian"}
METHODS: dict[str, tuple[str, Callable[[nn.Module, Tensor, Tensor], list[Tensor]]]] = {
    "HesScale": ("1", _diagonal(**HESSIAN)),
    "HesScaleGN": ("1", _diagonal(**HESSIAN, residual="zero")),
    "GGN, 1 draw": ("1", _diagonal(curv_type="ggn", samples=1)),
    "Hutchinson, 1 draw": ("2", _diagonal(**HESSIAN, hessian_method="hutchinson", samples=1)),
    "squared gradient": ("1", _squared_gradient),
    "squared gradients of samples": ("1", _diagonal(curv_type="empirical_fisher")),
    "GGN, 50 draws": ("50", _diagonal(curv_type="ggn", samples=50)),
    "GGN, exact": ("10", _diagonal(curv_type="ggn")),
    "Hutchinson, 50 draws": ("100", _diagonal(**HESSIAN, hessian_method="hutchinson", samples=50)),
}
CHEAP = [name for name, (passes, _) in METHODS.items() if int(passes) <= 2]
exact = _diagonal(**HESSIAN, hessian_method="exact")


def distances(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, list[float]]:
    """Per method and tensor, sum |estimate - exact| / sum |exact|."""
    truth = exact(model, x, y)
    found = {}
    for name, (_, estimate) in METHODS.items():
        pairs = zip(estimate(model, x, y), truth, strict=True)
        found[name] = [float((ours - h).abs().sum() / h.abs().sum()) for ours, h in pairs]
    return found


def trained(model: nn.Module, images: Tensor, labels: Tensor, steps: int, batch: int = 100) -> None:
    """Adam at its default rate, in place."""
    optimizer, generator = torch.optim.Adam(model.parameters()), torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = torch.randint(len(images), (batch,), generator=generator)
        optimizer.zero_grad()
        LOSS(model(images[index]), labels[index]).backward()
        optimizer.step()


def table(title: str, found: dict[str, list[float]], names: list[str]) -> Table:
    shown = Table("estimate", "passes", *names, "mean", title=title)
    for name, values in sorted(found.items(), key=lambda item: sum(item[1])):
        cells = [f"{value:.3f}" for value in (*values, sum(values) / len(values))]
        shown.add_row(name, METHODS[name][0], *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--activations", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS))
    options = parser.parse_args()
    digits, console = mnist(options.data_dir), Console(width=120)
    x, y = digits.images[: options.batch], digits.labels[: options.batch]
    order = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(1))[: options.batch]
    x, y = digits.images[order], digits.labels[order]
    for activation in options.activations:
        nonlinearity = "tanh" if activation == "tanh" else "relu"
        model = initialise(dense(WIDTHS, ACTIVATIONS[activation]), 0, nonlinearity)
        names = [name for name, _ in model.named_parameters()]
        for stage in ("before training", f"after {options.steps} steps of Adam"):
            if not stage.startswith("before"):
                trained(model, digits.images, digits.labels, options.steps)
            start = time.perf_counter()
            found = distances(model, x, y)
            console.print(table(f"{activation}, {stage} ({time.perf_counter() - start:.0f} s)", found, names))
            best = min(CHEAP, key=lambda name: sum(found[name]))
            console.print(f"best at O(1) passes: {best}")


if __name__ == "__main__":
    main()
