"""Does one plain call pay? SecondOrderOptimizer(model, loss_fn=...) against tuned AdamW, Muon and SOAP.

    python -m benchmarks.pays                              # everything that is not in docs/results/pays/ yet
    python -m benchmarks.pays --problems mlp gpt --seeds 0
    python -m benchmarks.pays --only-ours --ours "small clip: kl_clip=0.003" "long memory: ema_decay=0.99"
    python -m benchmarks.pays --quick --results /tmp/pays --page /tmp/pays.md
    pip install pytorch-optimizer                          # for SOAP

Thirteen problems (benchmarks/pays_problems.py) at the batches that people use, with a decaying rate and a warm-up.
All get the same processor time: that of a number of AdamW steps. What a step of each costs is measured in turns, and
from that follows how many steps fit; the schedule of each ends there. On a tuning seed (the equation: on three), AdamW
tries up to five rates without weight decay, then the best and its neighbours with 0.1 too; Muon and SOAP try up to
three rates, AdamW's and above, with AdamW's decay. All are judged by the final test loss; the best runs on the other
seeds. Ours has the settings of the plain call, and of each --ours, on every problem; where the loss is made of
derivatives, it is ResidualNewton(model, reduction="mean"). Evaluations are not timed. One thread.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.defaults import LADDER
from benchmarks.pays_problems import PROBLEMS, Problem, shorter
from benchmarks.pays_report import draw, write_page
from benchmarks.pays_runs import LOOKS, OTHERS, Contender, Store, final
from benchmarks.train import OPTIMIZERS, options_from

RESULTS = Path(__file__).parent.parent / "docs" / "results"
STARTS, DECAY = [3e-3, 1e-3, 1e-2], 0.1  # AdamW's first rates; the weight decay that is tried beside none
TRIALS = (5, 3)  # the most rates that AdamW, and that each of the others tries
TUNING_SEEDS = {seed for problem in PROBLEMS.values() for seed in problem.tuning_seeds}
PLAIN = Contender("ours")


def climb(trial: Callable[[float], float], starts: list[float], count: int) -> float:
    """The rate of LADDER with the lowest loss of up to `count`: `starts`, then neighbours of the best by then."""
    tried: dict[int, float] = {}
    missing = [min(range(len(LADDER)), key=lambda k: abs(math.log(LADDER[k] / rate))) for rate in starts[:count]]
    while missing and len(tried) < count:
        tried[missing[0]] = trial(LADDER[missing[0]])
        best = min(tried, key=lambda k: (tried[k], k))
        missing = missing[1:] or [k for k in (best + 1, best - 1) if k not in tried]
    return LADDER[best]


def tuned(store: Store, quick: bool, names: list[str]) -> list[Contender]:
    """AdamW, then the others of these with AdamW's weight decay and rates about and above AdamW's."""

    def loss(name: str, lr: float, decay: float) -> float:
        contender = Contender(name, {"lr": lr, "weight_decay": decay})
        seeds = store.problem.tuning_seeds[: 1 if quick else None]
        return statistics.fmean(final(store.run(contender, seed, 1)) for seed in seeds)

    most = (1, 1) if quick else TRIALS
    lr = climb(lambda rate: loss("AdamW", rate, 0.0), STARTS, most[0])
    grid = [(lr, 0.0)] if quick else [(rate, decay) for rate in about(lr) for decay in (0.0, DECAY)]
    lr, decay = min(grid, key=lambda pair: loss("AdamW", *pair))
    best = {"AdamW": lr}
    for name in names[1:]:
        best[name] = climb(lambda rate, name=name: loss(name, rate, decay), [lr, 3 * lr], most[1])  # type: ignore[misc]
    return [Contender(name, {"lr": rate, "weight_decay": decay}) for name, rate in best.items()]


def about(lr: float) -> tuple[float, ...]:
    at = LADDER.index(lr)
    return LADDER[at - 1 : at + 2]


def settings(texts: list[str]) -> list[Contender]:
    """The plain call, and "name: key=value ..." for each text."""
    found = [PLAIN]
    for text in texts:
        name, colon, options = text.partition(":")
        if not colon or not name.strip() or name.strip() in (*OTHERS, PLAIN.name):
            raise ValueError(f"{text!r} is no setting; write it as 'name: key=value ...', with a name of its own")
        found.append(Contender(name.strip(), options_from(options.split())))
    return found


def compete(problem: Problem, ours: list[Contender], args: argparse.Namespace) -> Store:
    """All that is missing of a problem, the others first."""
    store = Store(args.results, problem)
    own = ours if problem.data is not None else ours[:1]  # the others are options of SecondOrderOptimizer
    if args.again:
        names = {contender.name for contender in own}
        store.forget(lambda name: name in names or (name in OTHERS and not args.only_ours))
    others = [] if args.only_ours else [name for name in OTHERS if OPTIMIZERS[name].installed]
    starts = [Contender(name, {"lr": 1e-3}) for name in others]
    store.measure([*starts, *own], 0.0 if args.quick else 6.0)
    contenders = own + (tuned(store, args.quick, others) if others else [])
    for seed in args.seeds:
        for contender in contenders:
            store.run(contender, seed, 3 if args.quick else LOOKS)
    return store


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="none of those of tuning")
    parser.add_argument("--ours", nargs="+", default=[], metavar='"NAME: KEY=VALUE ..."', help="more settings of ours")
    parser.add_argument("--only-ours", action="store_true", help="leave the others as they are in the results")
    parser.add_argument("--again", action="store_true", help="run again what the results hold")
    parser.add_argument("--quick", action="store_true", help="one trial each and few steps: that it runs, no result")
    parser.add_argument("--report", action="store_true", help="the page and the figures of what the results hold")
    parser.add_argument("--results", type=Path, default=RESULTS / "pays", help="folder of the JSON files")
    parser.add_argument("--page", type=Path, default=RESULTS / "pays.md", help="Markdown page to write the tables into")
    parser.add_argument("--images", type=Path, help="folder of the figures (default: docs/images)")
    args = parser.parse_args(argv)
    if TUNING_SEEDS & set(args.seeds):
        parser.error(f"seeds {sorted(TUNING_SEEDS)} are those of tuning")
    if args.quick and args.results == RESULTS / "pays":
        parser.error("--quick is no result: give another folder with --results and another page with --page")
    args.images = args.images or args.page.parent.parent / "images"
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(1)
    ours = settings(args.ours)
    for name in OTHERS:
        if not OPTIMIZERS[name].installed:
            print(f"{name} is not installed. To compare: pip install {OPTIMIZERS[name].package[1]}")
    stores: list[Any] = []
    for name in args.problems:
        problem = PROBLEMS[name]
        if args.quick:
            problem = shorter(problem, max(40, math.ceil(problem.steps / 20)))
        stores.append(Store(args.results, problem) if args.report else compete(problem, ours, args))
    if not args.quick and not args.report:  # the page shows all that there is
        stores = [Store(args.results, problem) for problem in PROBLEMS.values()]
    stores = [store for store in stores if store.content["runs"]]
    print(write_page(args.page, stores))
    draw(stores, args.images)


if __name__ == "__main__":
    main()
