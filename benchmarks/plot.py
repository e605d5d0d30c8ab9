"""The figure: loss against steps and against seconds, side by side, one row per problem."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

COLOURS = {
    "AdamW": "tab:orange", "K-FAC": "tab:blue", "SGD": "tab:grey", "Muon": "tab:green", "SOAP": "tab:purple",
    "K-FAC, own steps": "tab:cyan",
}  # fmt: skip
AXES = {"steps": "optimizer steps", "seconds": "training time (seconds, evaluation not counted)"}


def draw(problems: dict[str, tuple[str, list[Any]]], path: Path, goals: dict[str, float] | None = None) -> None:
    """Write a PNG of {problem: (unit of the loss, its runs)}; seeds share a colour.

    goals: the loss to reach by problem; None: that with which AdamW ends, the mean over its runs.
    """
    figure, grid = plt.subplots(
        len(problems), 2, figsize=(12, 4.5 * len(problems)), squeeze=False, sharey="row", layout="constrained"
    )
    for row, (name, (unit, runs)) in zip(grid, problems.items(), strict=True):
        for axes, quantity in zip(row, AXES, strict=True):
            _curves(axes, quantity, runs, None if goals is None else goals[name])
            axes.set_title(f"{name}: training loss against {quantity}")
        row[0].set_ylabel(f"training loss ({unit})")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _curves(axes: Axes, quantity: str, runs: list[Any], goal: float | None) -> None:
    labelled = set()
    for run in runs:
        label = f"{run.optimizer}, lr {run.options['lr']:g}" if "lr" in run.options else run.optimizer
        axes.plot(
            getattr(run, quantity), run.losses, color=COLOURS.get(run.optimizer), linewidth=1.6, marker=".",
            markersize=3, label=None if label in labelled else label,
        )  # fmt: skip
        labelled.add(label)
    finals = [run.losses[-1] for run in runs if run.optimizer == "AdamW"]
    if goal is not None:
        axes.axhline(goal, color="black", linestyle=":", label="the loss to reach")
    elif finals:
        axes.axhline(sum(finals) / len(finals), color="grey", linestyle=":", label="AdamW's final loss")
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
