"""The demo: K-FAC against AdamW on real MNIST digits, an MLP and a deep autoencoder, in about three minutes.

Both start from the same weights and see the same batches; AdamW has the best constant learning rate of the
grid that `benchmarks.train` runs. K-FAC stops once it has the training loss that AdamW ends with. The MLP is a
small, easy problem on which a tuned AdamW is hard to beat: over 300 steps instead of 100 it is the faster of the
two in seconds. The deep autoencoder is the kind of problem that curvature is for.
"""

import argparse
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.plot import draw
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.train import KFAC_OPTIONS, RESULTS, Run, train

BEST_ADAMW_RATE = {"mlp": 1e-2, "autoencoder": 1e-3}  # of benchmarks.train's grids
EVALUATE_ADAMW_EVERY = {"mlp": 25, "autoencoder": 50}


def race(problem: Problem, steps: int, seed: int = 0) -> tuple[Run, Run]:
    """AdamW for `steps` steps, then K-FAC to the same training loss."""
    name = problem.name
    every = EVALUATE_ADAMW_EVERY[name]
    adamw = train(problem, "AdamW", {"lr": BEST_ADAMW_RATE[name]}, seed, steps, evaluate_every=every)
    kfac = train(problem, "K-FAC", KFAC_OPTIONS[name], seed, steps, target=adamw.losses[-1])
    return adamw, kfac


def report(races: dict[str, tuple[Run, Run]]) -> Table:
    table = Table(title="K-FAC to the training loss that AdamW ends with", box=box.SIMPLE)
    table.add_column("problem")
    table.add_column("optimizer", no_wrap=True)
    for name in ("loss", "accuracy", "steps", "seconds", "time ratio"):
        table.add_column(name, justify="right")
    for problem, (adamw, kfac) in races.items():
        table.add_row(problem, *_cells(adamw), "1")
        reached = kfac.losses[-1] <= adamw.losses[-1]
        ratio = f"{kfac.seconds[-1] / adamw.seconds[-1]:.2f}" if reached else "missed"
        table.add_row("", *_cells(kfac), ratio, end_section=True)
    return table


def _cells(run: Run) -> list[str]:
    accuracy = "" if run.accuracy is None else f"{run.accuracy:.1%}"
    label = f"{run.optimizer}, lr {run.options['lr']:g}"
    return [label, f"{run.losses[-1]:.4g}", accuracy, f"{run.steps[-1]}", f"{run.seconds[-1]:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with MNIST, FashionMNIST (IDX) or CIFAR-10 (python)")
    parser.add_argument("--png", type=Path, default=RESULTS / "demo.png")
    parser.add_argument("--steps", type=int, help="of AdamW, for a shorter look (default: 100 and 1,250)")
    args = parser.parse_args()
    problems = [PROBLEMS[name](args.data_dir) for name in ("mlp", "autoencoder")]
    races = {problem.name: race(problem, args.steps or problem.steps) for problem in problems}
    draw({problem.name: (problem.unit, list(races[problem.name])) for problem in problems}, args.png)
    console = Console()
    console.print(report(races))
    console.print(
        "Losses are means over all training images (the autoencoder's summed over pixels), evaluated off the "
        "clock; accuracy is on held-out digits."
    )
    console.print(f"Loss against steps and seconds: {args.png}")


if __name__ == "__main__":
    main()
