"""ISAAC on a multi-layer perceptron: what preconditioning the first k layers by their inputs is worth.

    python -m benchmarks.isaac                         # 4,000 of the 5,000 packaged digits, 1,000 to test on
    python -m benchmarks.isaac --data-dir DIR          # full MNIST

784-400-400-400-400-10, ReLU, batch 100, plain SGD; the first k = 0..5 of the five layers are ISAACLinear. Published
(Petersen et al. 2023, full MNIST) are a rate of 0.1 for k = 0, and a rate of 1 with la = 10 for the others. Fewer
digits want other settings, so each k takes the best of six by its loss on the training digits after `--grid-epochs`
epochs, on a seed of its own: six rates for k = 0, three rates and two values of la for the others. Timed are the
seconds that one core computes, without evaluation.
"""

import argparse
import math
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

from benchmarks.data import Labelled, held_out
from torchcurv.nn import ISAACLinear

WIDTHS, BATCH = (784, 400, 400, 400, 400, 10), 100
LAYERS = len(WIDTHS) - 1
RATES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
ISAAC_RATES, REGULARISATIONS = (0.3, 1.0, 2.0), (1.0, 10.0)
GRID_SEED, TARGET = 100, 0.1
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Setting:
    """k layers with ISAAC, of regularisation la (none for k = 0), and the rate of SGD."""

    k: int
    lr: float
    la: float | None = None


@dataclass
class Run:
    """Loss on the training digits and accuracy on the others after each epoch; seconds of one core until then."""

    setting: Setting
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def seconds_to(self, target: float) -> float:
        """Seconds until the first epoch with at most this loss; infinite if there is none."""
        return next((s for s, loss in zip(self.seconds, self.losses, strict=True) if loss <= target), math.inf)


def network(setting: Setting) -> nn.Sequential:
    layers: list[nn.Module] = []
    for k, (i, o) in enumerate(pairwise(WIDTHS)):
        layers += [nn.Linear(i, o) if k >= setting.k else ISAACLinear(i, o, setting.la), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(setting: Setting, digits: Labelled, test: Labelled, epochs: int, seed: int) -> Run:
    """Seeds are shared: every setting starts at the same weights and sees the same batches."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, loss_fn = network(setting), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr)
    run, seconds = Run(setting), 0.0
    for _ in range(epochs):
        start = time.process_time()
        for index in torch.randperm(len(digits.images), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss_fn(model(digits.images[index]), digits.labels[index]).backward()
            optimizer.step()
        seconds += time.process_time() - start
        with torch.no_grad():
            run.losses.append(loss_fn(model(digits.images), digits.labels).item())
            run.accuracies.append(float((model(test.images).argmax(1) == test.labels).float().mean()))
        run.seconds.append(seconds)
    return run


def grid(k: int) -> list[Setting]:
    if k == 0:
        return [Setting(0, lr) for lr in RATES]
    return [Setting(k, lr, la) for la in REGULARISATIONS for lr in ISAAC_RATES]


def best(k: int, digits: Labelled, test: Labelled, epochs: int) -> Setting:
    """The setting with the least training loss; one that diverged counts as infinite."""
    losses = {s: train(s, digits, test, epochs, GRID_SEED).losses[-1] for s in tqdm(grid(k), f"k = {k}", leave=False)}
    return min(losses, key=lambda s: losses[s] if math.isfinite(losses[s]) else math.inf)


def table(runs: dict[int, list[Run]], steps: int) -> Table:
    """Means over seeds; the factor is the time of a step over that of k = 0, the last column the time to TARGET."""
    shown = Table(title="ISAAC on the first k of 5 layers, SGD, batch 100")
    for name in ("k", "rate", "la", "training loss", "test accuracy", "ms per step", "factor", f"s to {TARGET:g}"):
        shown.add_column(name, justify="right")
    plain = fmean(run.seconds[-1] for run in runs[0])
    for k, own in runs.items():
        setting = own[0].setting
        loss, accuracy = fmean(run.losses[-1] for run in own), fmean(run.accuracies[-1] for run in own)
        seconds, reached = fmean(run.seconds[-1] for run in own), fmean(run.seconds_to(TARGET) for run in own)
        cells = [f"{k}", f"{setting.lr:g}", "-" if setting.la is None else f"{setting.la:g}", f"{loss:.2g}"]
        shown.add_row(
            *cells, f"{accuracy:.1%}", f"{1000 * seconds / steps:.1f}", f"{seconds / plain:.2f}", f"{reached:.2f}"
        )
    return shown


def draw(runs: dict[int, list[Run]], path: Path) -> None:
    """Training loss against epochs and against seconds, means over seeds."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for k, own in runs.items():
        losses = [fmean(at) for at in zip(*(run.losses for run in own), strict=True)]
        seconds = [fmean(at) for at in zip(*(run.seconds for run in own), strict=True)]
        setting = own[0].setting
        label = f"k = {k}, rate {setting.lr:g}" + ("" if setting.la is None else f", la {setting.la:g}")
        for axes, at in zip(panels, (range(1, len(losses) + 1), seconds), strict=True):
            colour = "tab:orange" if k == 0 else plt.cm.viridis(1 - k / LAYERS)
            axes.plot(at, losses, color=colour, marker=".", markersize=4, label=label)
    for axes, name in zip(panels, ("epochs", "training time (seconds of one core)"), strict=True):
        axes.set_yscale("log")
        axes.set_xlabel(name)
        axes.grid(True, which="both", alpha=0.25)
    panels[0].set_ylabel("loss on all training digits (nats)")
    panels[1].legend(title="ISAAC on the first k layers")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--grid-epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=RESULTS / "isaac.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    digits, test = held_out(options.data_dir)
    runs: dict[int, list[Run]] = {}
    for k in range(LAYERS + 1):
        setting = best(k, digits, test, options.grid_epochs)
        runs[k] = [train(setting, digits, test, options.epochs, seed) for seed in options.seeds]
    Console().print(table(runs, options.epochs * math.ceil(len(digits.images) / BATCH)))
    print(f"means over {len(options.seeds)} seeds after {options.epochs} epochs of {len(digits.images)} digits")
    print(f"settings by the training loss after {options.grid_epochs} epochs on another seed")
    draw(runs, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
