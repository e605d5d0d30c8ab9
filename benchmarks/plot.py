"""The figure: loss against steps and against seconds, side by side, one row per problem."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

COLOURS = {"AdamW": "tab:orange", "K-FAC": "tab:blue"}
AXES = {"steps": "optimizer steps", "seconds": "training time (seconds, evaluation not counted)"}


def draw(problems: dict[str, tuple[str, list[Any]]], path: Path) -> None:
    """Write a PNG of {problem: (unit of the loss, its runs)}; seeds share a colour."""
    figure, grid = plt.subplots(
        len(problems), 2, figsize=(12, 4.5 * len(problems)), squeeze=False, sharey="row", layout="constrained"
    )
    for row, (name, (unit, runs)) in zip(grid, problems.items(), strict=True):
        for axes, quantity in zip(row, AXES, strict=True):
            _curves(axes, quantity, runs)
            axes.set_title(f"{name}: training loss against {quantity}")
        row[0].set_ylabel(f"loss on all training images ({unit})")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _curves(axes: Axes, quantity: str, runs: list[Any]) -> None:
    labelled = set()
    for run in runs:
        label = f"{run.optimizer}, lr {run.options['lr']:g}"
        axes.plot(
            getattr(run, quantity), run.losses, color=COLOURS.get(run.optimizer), linewidth=1.6, marker=".",
            markersize=3, label=None if label in labelled else label,
        )  # fmt: skip
        labelled.add(label)
    goals = [run.losses[-1] for run in runs if run.optimizer == "AdamW"]
    if goals:
        axes.axhline(sum(goals) / len(goals), color="grey", linestyle=":", label="AdamW's final loss")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low < 30:  # less than a decade and a half: powers of ten alone would leave the axis bare
        grid = [digit * 10.0**power for power in range(-6, 6) for digit in (1, 1.5, 2, 3, 4, 5, 6, 8)]
        ticks = [value for value in grid if low <= value <= high]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(AXES[quantity])
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
