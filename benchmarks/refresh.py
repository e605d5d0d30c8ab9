"""How often to refresh: K-FAC on the deep autoencoder with fixed intervals and with adaptive ones.

    python -m benchmarks.refresh --threads 2                    # seconds to a loss of 62 nats per image, seeds 0 1 2
    python -m benchmarks.refresh --seeds 0 --target 80          # shorter

Everything but the intervals is the setting of benchmarks.train.
The settings take turns, seed by seed; seconds are those of the training steps. Writes a table and a PNG: the loss
against seconds, and for the adaptive setting the intervals that the A and the B of each layer chose.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.problems import PROBLEMS, Problem
from benchmarks.train import KFAC_OPTIONS, RESULTS, Run, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SETTINGS: dict[str, dict[str, Any]] = {
    "every step": {"update_every": 1, "refactor_every": 1},
    "10 / 20": {},
    "adaptive": {"update_every": "adaptive", "refactor_every": "adaptive", "refresh_tol": 0.3},
}
Intervals = list[dict[str, list[int]]]  # per step: part -> the interval of each layer


def race(problem: Problem, name: str, seed: int, steps: int, target: float) -> tuple[Run, Intervals]:
    chosen: Intervals = []

    def watch(step: int, optimizer: Any) -> None:
        chosen.append({part: [block.paces[part].interval for block in optimizer.engine.blocks] for part in ("A", "B")})

    options = {**KFAC_OPTIONS[problem.name], **SETTINGS[name]}
    return train(problem, "K-FAC", options, seed, steps, target, watch=watch), chosen


def table(runs: dict[str, list[Run]], target: float) -> Table:
    """A row per setting, medians over the seeds, and ratios to refreshing every step."""
    shown = Table(title=f"autoencoder: to a training loss of {target:g} nats per image")
    for column in ("refresh", "steps", "seconds", "of every step's seconds"):
        shown.add_column(column, justify="left" if column == "refresh" else "right")
    base = {run.seed: run.first_at(target) for run in runs["every step"]}
    for name, own in runs.items():
        reached = [run.first_at(target) for run in own]
        if None in reached:
            shown.add_row(name, "not reached", "", "")
            continue
        steps, seconds = (statistics.median(column) for column in zip(*reached, strict=True))  # type: ignore[type-var]
        pairs = [(run.first_at(target), base[run.seed]) for run in own]
        ratios = [here[1] / there[1] for here, there in pairs if here and there]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
        shown.add_row(name, f"{steps:.0f}", f"{seconds:.1f}", ratio)
    return shown


def draw(runs: dict[str, list[Run]], chosen: Intervals, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    for k, (name, own) in enumerate(runs.items()):
        for run in own:
            label = name if run is own[0] else None
            left.plot(run.seconds, run.losses, color=f"C{k}", marker=".", markersize=3, label=label)
    left.set_yscale("log")
    left.set_xlabel("training time (seconds, evaluation not counted)")
    left.set_ylabel("loss on all training images (nats per image)")
    left.legend(title="refresh")
    for part, colour in (("A", "tab:blue"), ("B", "tab:red")):
        layers = list(zip(*(step[part] for step in chosen), strict=True))
        for k, layer in enumerate(layers):
            label = f"{part}, one line per layer" if k == 0 else None
            right.step(range(1, len(layer) + 1), layer, color=colour, alpha=0.6, linewidth=1.2, label=label)
    right.set_yscale("log")
    right.set_xlabel("step")
    right.set_ylabel("steps between measurements")
    right.set_title("intervals chosen (adaptive, first seed)")
    right.legend()
    for axes in (left, right):
        axes.grid(True, which="both", alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="at most")
    parser.add_argument("--target", type=float, default=62.0, help="training loss, nats per image")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--data-dir", type=Path, help="full MNIST as IDX files")
    parser.add_argument("--output", type=Path, default=RESULTS / "refresh.png")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    problem = PROBLEMS["autoencoder"](args.data_dir)
    runs: dict[str, list[Run]] = {name: [] for name in SETTINGS}
    shown: Intervals = []
    for seed in args.seeds:
        for name in SETTINGS:
            run, chosen = race(problem, name, seed, args.steps, args.target)
            runs[name].append(run)
            if name == "adaptive" and seed == args.seeds[0]:
                shown = chosen
    console = Console()
    console.print(table(runs, args.target))
    draw(runs, shown, args.output)
    console.print(f"wrote {args.output}", markup=False)


if __name__ == "__main__":
    main()
