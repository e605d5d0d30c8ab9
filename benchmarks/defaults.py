"""One setting of SecondOrderOptimizer on five problems, against SGD, AdamW, Muon and SOAP at their best rates.

    python -m benchmarks.defaults --threads 2                       # the five problems, three seeds
    python -m benchmarks.defaults --problems mlp --seeds 0          # shorter
    python -m benchmarks.defaults --small-batches                   # of 500, 200, 200, 500 and 32
    python -m benchmarks.defaults --keep --kfac lr=0.3 --seeds 10   # tuning: the first-order runs of before, K-FAC anew
    pip install pytorch-optimizer                                   # for the rows of SOAP

Problems (benchmarks/problems.py): an MLP, a CNN and a ResNet with group norms on MNIST digits, the deep autoencoder,
and a GPT of two layers on characters. K-FAC has the same options on all of them, those of `KFAC`. Each of the others
has a learning rate of its own on each problem, constant over the run: rates are tried on the first seed, from the one
in `START` along 1, 3, 10, 30, ... in both directions until both neighbours of the best are worse, and the best is
run on every seed. SGD has momentum 0.9, Muon leaves to AdamW what is not the weight of a hidden layer, SOAP has the
options of the package; nothing decays weights: it is the training loss that counts.

Batches are all of the digits, where directions without noise pay, but for the GPT; --small-batches has those of
benchmarks/problems.py. "K-FAC, own steps" chooses damping, step size and momentum itself, by `OWN_STEPS`.

All get the same initial weights and mini-batches. The loss to reach is the lowest that one of the others has after
the steps of the problem, seed by seed. Steps cost unlike times: whoever has not reached it by then goes on, up to
`PATIENCE` times the seconds of the one that has. The table says when each first had it, and what share of the seconds
of the fastest of the others that is. Losses are evaluated with the clock stopped. The clock is that on the wall, which
means a quiet machine; with --processor-time it is the time of the processor, which others on the machine disturb less.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.plot import draw
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.train import OPTIMIZERS, RESULTS, Run, options_from, train

FIRST_ORDER = ("SGD", "AdamW", "Muon", "SOAP")
CONTENDERS = ("K-FAC", "K-FAC, own steps")
KFAC: dict[str, Any] = {}  # what differs from SecondOrderOptimizer's own defaults, which were chosen on seed 10
PATIENCE = 1.5
OWN_STEPS: dict[str, Any] = {"damping_rule": "lm", "step_rule": "quadratic"}
LADDER = tuple(float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 3))
LARGE = {"mlp": (4000, 80), "cnn": (4000, 80), "resnet": (4000, 80), "autoencoder": (5000, 120)}  # (batch, steps)
START: dict[str, dict[str, float]] = {
    "mlp": {"SGD": 0.3, "AdamW": 1e-2, "Muon": 3e-2, "SOAP": 3e-2},
    "cnn": {"SGD": 0.3, "AdamW": 1e-2, "Muon": 1e-1, "SOAP": 1e-1},
    "resnet": {"SGD": 0.1, "AdamW": 3e-3, "Muon": 3e-2, "SOAP": 3e-2},
    "autoencoder": {"SGD": 3e-3, "AdamW": 1e-3, "Muon": 1e-2, "SOAP": 1e-2},
    "gpt": {"SGD": 0.1, "AdamW": 3e-3, "Muon": 1e-2, "SOAP": 3e-3},
}
Clock = Callable[[], float]


def bracketed(trial: Callable[[float], Run], start: float) -> list[Run]:
    """Runs at rates of LADDER, in their order, among them the best between two that are worse."""
    at = min(range(len(LADDER)), key=lambda k: abs(math.log(LADDER[k] / start)))
    tried = {at: trial(LADDER[at])}
    while True:
        best = min(tried, key=lambda k: (final(tried[k]), k))  # where all diverge, on to smaller ones
        missing = [k for k in (best + 1, best - 1) if k not in tried and 0 <= k < len(LADDER)]
        if not missing:
            return [tried[k] for k in sorted(tried)]
        tried[missing[0]] = trial(LADDER[missing[0]])


def final(run: Run) -> float:
    """The last loss; infinite where it is no number."""
    return run.losses[-1] if math.isfinite(run.losses[-1]) else math.inf


def first_order(problem: Problem, names: Iterable[str], seeds: list[int], steps: int, clock: Clock) -> list[Run]:
    """The rates that were tried on the first seed, and the best of them on the others."""
    runs = []
    for name in names:
        start = START[problem.name][name]
        tried = bracketed(lambda lr, name=name: train(problem, name, {"lr": lr}, seeds[0], steps, clock=clock), start)  # type: ignore[misc]
        best = min(tried, key=final)
        runs += tried + [train(problem, name, best.options, seed, steps, clock=clock) for seed in seeds[1:]]
    return runs


def best_of(runs: list[Run], name: str) -> list[Run]:
    """One run per seed: those of `name` with the options that are best on the first seed."""
    own = [run for run in runs if run.optimizer == name]
    if not own:
        return []
    options = min((run for run in own if run.seed == own[0].seed), key=final).options
    return [run for run in own if run.options == options]


def goals(runs: list[Run]) -> dict[int, float]:
    """By seed, the lowest loss that one of the first-order optimizers ends with at its best rate."""
    finals: dict[int, list[float]] = {}
    for name in FIRST_ORDER:
        for run in best_of(runs, name):
            finals.setdefault(run.seed, []).append(final(run))
    return {seed: min(losses) for seed, losses in finals.items()}


def race(problem: Problem, trials: list[Run], contenders: dict[str, dict[str, Any]], clock: Clock) -> list[Run]:
    """A run to the goal for every optimizer and seed: the trial where it got there, else one that may take longer."""
    goal, runs = goals(trials), []
    best = {name: best_of(trials, name) for name in dict.fromkeys(run.optimizer for run in trials)}
    limits: dict[int, float] = {}
    for own in best.values():
        for run in own:
            if when := run.first_at(goal[run.seed]):
                limits[run.seed] = min(PATIENCE * when[1], limits.get(run.seed, math.inf))

    def to_the_goal(name: str, options: dict[str, Any], seed: int) -> Run:
        return train(problem, name, options, seed, 10**6, goal[seed], clock=clock, limit=limits[seed])

    for name, own in best.items():
        arrived = [run.first_at(goal[run.seed]) is not None for run in own]
        runs += [r if there else to_the_goal(name, r.options, r.seed) for r, there in zip(own, arrived, strict=True)]
    return runs + [to_the_goal(name, options, seed) for name, options in contenders.items() for seed in goal]


def reached(runs: list[Run], goal: dict[int, float]) -> tuple[float, float]:
    """Medians over the seeds of (steps, seconds) to the goal, infinite where it was missed."""
    when = [run.first_at(goal[run.seed]) or (math.inf, math.inf) for run in runs]
    steps, seconds = (statistics.median(column) for column in zip(*when, strict=True))
    return steps, seconds


def summary(trials: list[Run], races: list[Run]) -> list[dict[str, Any]]:
    """A row per optimizer, with the share it took of the seconds of the fastest first-order optimizer."""
    goal, rows = goals(trials), []
    for name in dict.fromkeys(run.optimizer for run in races):
        own = [run for run in races if run.optimizer == name]
        ended = best_of(trials, name) or own
        steps, seconds = reached(own, goal)
        rows.append({
            "optimizer": name,
            "options": own[0].options,
            "loss": statistics.median(final(run) for run in ended),
            "all_steps": statistics.median(run.steps[-1] for run in ended),
            "all_seconds": statistics.median(run.seconds[-1] for run in ended),
            "steps": steps,
            "seconds": seconds,
        })  # fmt: skip
    fastest = min(row["seconds"] for row in rows if row["optimizer"] in FIRST_ORDER)
    for row in rows:
        row["time_ratio"] = row["seconds"] / fastest if math.isfinite(row["seconds"]) else math.inf
    return rows


def table(problem: Problem, trials: list[Run], races: list[Run], all_rates: bool = False) -> Table:
    """The rows of `summary`; with all_rates also the final loss at every rate that was tried."""
    goal = statistics.median(goals(trials).values())
    seeds, caption = sorted({run.seed for run in races}), []
    title = f"{problem.name}, batches of {problem.batch_size}: to a loss of {goal:.4g} {problem.unit}"
    shown = Table(title=f"{title}; seeds {seeds}, medians", box=box.SIMPLE, caption_justify="left")
    shown.add_column("optimizer", no_wrap=True)
    for column in ("loss", "steps", "seconds", "steps to it", "seconds to it", "time ratio"):
        shown.add_column(column, justify="right")
    for row in summary(trials, races):
        label = f"{row['optimizer']} lr {row['options']['lr']:g}" if "lr" in row["options"] else row["optimizer"]
        to_goal = [f"{row['steps']:.0f}", f"{row['seconds']:.2f}", f"{row['time_ratio']:.2f}"]
        if not math.isfinite(row["seconds"]):
            to_goal = ["missed", "", ""]
        shown.add_row(
            label, f"{row['loss']:.4g}", f"{row['all_steps']:.0f}", f"{row['all_seconds']:.2f}", *to_goal,
            style="bold" if row["time_ratio"] == 1 else None,
        )  # fmt: skip
        if all_rates and row["optimizer"] in FIRST_ORDER:
            tried = [run for run in trials if run.optimizer == row["optimizer"] and run.seed == trials[0].seed]
            losses = ", ".join(f"{run.options['lr']:g}: {final(run):.4g}" for run in tried)
            caption.append(f"{row['optimizer']} after {tried[0].steps[-1]} steps, by rate: {losses}")
    shown.caption = "\n".join(caption) or None
    return shown


def saved(path: Path, problem: Problem, seeds: list[int], clock: Clock) -> list[Run]:
    """The trials that `path` holds of the optimizers that have one for each of these seeds, by this clock."""
    content = json.loads(path.read_text()) if path.exists() else {}
    if content.get("clock") != clock.__name__:
        return []
    entry = content["problems"].get(problem.name, {"trials": []})
    if entry.get("batch_size") != problem.batch_size:
        return []
    runs = [run for run in (Run(**run) for run in entry["trials"]) if run.seed in seeds]
    complete = [name for name in FIRST_ORDER if {run.seed for run in best_of(runs, name)} == set(seeds)]
    return [run for run in runs if run.optimizer in complete]


def save(
    path: Path, problems: dict[str, Problem], trials: dict[str, list[Run]], races: dict[str, list[Run]], clock: Clock
) -> None:
    """What was run, with what the file already holds of other problems."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if content.get("clock") != clock.__name__:
        content = {"clock": clock.__name__, "problems": {}}
    content |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for name, own in races.items():
        content["problems"][name] = {
            "batch_size": problems[name].batch_size,
            "summary": summary(trials[name], own),
            "trials": [asdict(run) for run in trials[name]],
            "races": [asdict(run) for run in own],
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=list(START), default=list(START))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of every optimizer (default: the problem's)")
    parser.add_argument("--small-batches", action="store_true", help="those of benchmarks/problems.py, and its steps")
    parser.add_argument("--first-order", nargs="+", choices=FIRST_ORDER, default=list(FIRST_ORDER))
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=["K-FAC"])
    parser.add_argument("--kfac", nargs="+", default=[], metavar="KEY=VALUE", help="other options than the defaults")
    parser.add_argument("--keep", action="store_true", help="take first-order runs from the results where they are")
    parser.add_argument("--processor-time", action="store_true", help="count processor time, not that on the wall")
    parser.add_argument("--all-rates", action="store_true", help="print the final loss at every rate tried")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--data-dir", help="folder with MNIST or FashionMNIST (IDX)")
    parser.add_argument("--results", type=Path, default=RESULTS / "defaults.json", help="the PNG goes beside it")
    return parser.parse_args()


def main() -> None:
    args, console = arguments(), Console(width=120)
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.process_time if args.processor_time else time.perf_counter
    names = [name for name in args.first_order if OPTIMIZERS[name].installed]
    for name in set(args.first_order) - set(names):
        package = OPTIMIZERS[name].package
        assert package is not None
        console.print(f"{name} is not installed. To compare: pip install {package[1]}", markup=False)
    plain = {**KFAC, **options_from(args.kfac)}
    every = {"K-FAC": plain, "K-FAC, own steps": {**plain, **OWN_STEPS}}
    contenders = {name: every[name] for name in args.contenders}
    trials: dict[str, list[Run]] = {}
    races: dict[str, list[Run]] = {}
    problems: dict[str, Problem] = {}
    for key in args.problems:
        problem = PROBLEMS[key](args.data_dir)
        if not args.small_batches and key in LARGE:
            problem = replace(problem, batch_size=LARGE[key][0], steps=LARGE[key][1])
        kept = saved(args.results, problem, args.seeds, clock) if args.keep else []
        missing = [name for name in names if name not in {run.optimizer for run in kept}]
        trials[key] = kept + first_order(problem, missing, args.seeds, args.steps or problem.steps, clock)
        races[key], problems[key] = race(problem, trials[key], contenders, clock), problem
        save(args.results, problems, trials, races, clock)
        console.print(table(problem, trials[key], races[key], args.all_rates))
    path = args.results.with_suffix(".png")
    goal = {key: statistics.median(goals(own).values()) for key, own in trials.items()}
    draw({key: (problems[key].unit, own) for key, own in races.items()}, path, goal)
    console.print(f"{args.results} and {path}", markup=False)


if __name__ == "__main__":
    main()
