"""Training time: the seconds and steps K-FAC needs to the loss of AdamW at the best rate of a small grid.

    python -m benchmarks.train                          # the whole grid, three seeds, the deep autoencoder
    python -m benchmarks.train --problem mlp --seeds 0
    python -m benchmarks.train --target 61.9 --seeds 0 --kfac lr=0.2 momentum=0.5  # tuning: K-FAC alone

Every optimizer gets the same initial weights and the same mini-batches. The loss is evaluated on all
training images with the clock stopped; timed are drawing a batch, forward, backward and the optimizer's step.
AdamW is torch's fused one, the fastest on a CPU, without weight decay: it is the training loss that counts.
"""

import argparse
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from benchmarks.plot import draw
from benchmarks.problems import PROBLEMS, Problem

ADAMW_RATES = {"autoencoder": (3e-4, 1e-3, 3e-3), "mlp": (1e-3, 3e-3, 1e-2)}
KFAC: dict[str, Any] = {  # chosen on seed 10
    "curv_type": "ggn",
    "approx": "kfac",
    "samples": 1,
    "lr": 0.3,
    "momentum": 0.5,
    "damping": 0.2,
    "kl_clip": 1.0,
    "update_every": 10,
    "refactor_every": 20,
    "ema_decay": 0.95,
}
KFAC_OPTIONS: dict[str, dict[str, Any]] = {
    "autoencoder": KFAC,
    "mlp": {**KFAC, "lr": 0.1, "damping": 0.02, "momentum": 0.75, "ema_decay": 0.995},  # chosen on seeds 10 and 11
}
RESULTS = Path(__file__).parent / "results"


@dataclass
class Run:
    """One training run: the loss on all training images after `steps[k]` steps, `seconds[k]` on the clock."""

    optimizer: str
    options: dict[str, Any]
    seed: int
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracy: float | None = None

    def note(self, step: int, seconds: float, loss: float) -> None:
        self.steps.append(step)
        self.seconds.append(seconds)
        self.losses.append(loss)

    def first_at(self, target: float) -> tuple[int, float] | None:
        """(steps, seconds) at the first evaluation whose loss is at most `target`; None if there was none."""
        for step, seconds, loss in zip(self.steps, self.seconds, self.losses, strict=True):
            if loss <= target:
                return step, seconds
        return None


def adamw(model: nn.Module, loss_fn: nn.Module, options: dict[str, Any]) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), **{"weight_decay": 0.0, "fused": True, **options})


def sgd(model: nn.Module, loss_fn: nn.Module, options: dict[str, Any]) -> Optimizer:
    return torch.optim.SGD(model.parameters(), **{"momentum": 0.9, "fused": True, **options})


class Muon:
    """torch's Muon on the weights of hidden layers, convolutions flattened to matrices, and AdamW on the rest.

    The rest: biases, norms, embeddings, and the first layer (unless it is an embedding) and the last. The matrices from
    state to state of recurrent layers are hidden. Muon's updates are scaled to the size of AdamW's
    ("match_rms_adamw"), so that both have one learning rate.
    """

    def __init__(self, model: nn.Module, loss_fn: nn.Module, options: dict[str, Any]) -> None:
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)]
        hidden = [m.weight for m in layers[1:-1] if not isinstance(m, nn.Embedding)]
        recurrent = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
        hidden += [p for m in recurrent for name, p in m.named_parameters() if name.startswith("weight_hh")]
        options = {"weight_decay": 0.0, **options}
        # Matrices that share the memory of the weights.
        self.matrices = [(p, nn.Parameter(p.detach().flatten(1))) for p in hidden]
        taken = set(hidden)
        rest = [p for p in model.parameters() if p not in taken]
        self.parts: list[Optimizer] = [torch.optim.AdamW(rest, fused=True, **options)]
        if hidden:
            matrices = [matrix for _, matrix in self.matrices]
            self.parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        self.parts[0].zero_grad()
        for p, _ in self.matrices:
            p.grad = None

    def step(self) -> None:
        for p, matrix in self.matrices:
            matrix.grad = None if p.grad is None else p.grad.flatten(1)
        for part in self.parts:
            part.step()


def soap(model: nn.Module, loss_fn: nn.Module, options: dict[str, Any]) -> Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), **{"weight_decay": 0.0, **options})


def kfac(model: nn.Module, loss_fn: nn.Module, options: dict[str, Any]) -> Optimizer:
    from torchcurv import SecondOrderOptimizer

    return SecondOrderOptimizer(model, loss_fn=loss_fn, **options)


@dataclass(frozen=True)
class Entry:
    """How an optimizer is made of (model, loss module, options), and what it needs.

    by_closure: its step is optimizer.step(closure) with a closure that returns (loss, output) and leaves
        backward() to the optimizer.
    package: the module that has to be installed, and what pip calls it.
    """

    make: Callable[[nn.Module, nn.Module, dict[str, Any]], Any]
    evaluate_every: int = 25
    by_closure: bool = False
    package: tuple[str, str] | None = None

    @property
    def installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package[0]) is not None


OPTIMIZERS: dict[str, Entry] = {
    "SGD": Entry(sgd),
    "AdamW": Entry(adamw),
    "Muon": Entry(Muon),
    "SOAP": Entry(soap, package=("pytorch_optimizer", "pytorch-optimizer")),
    "K-FAC": Entry(kfac, 5),
    "K-FAC, own steps": Entry(kfac, 5, by_closure=True),
}


def minibatches(problem: Problem, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole mini-batches without end: every epoch is one seeded permutation, its remainder is left out."""
    generator, size = torch.Generator().manual_seed(seed), min(problem.batch_size, len(problem.inputs))
    while True:
        order = torch.randperm(len(problem.inputs), generator=generator)
        for index in order.split(size):
            if len(index) == size:
                yield problem.inputs[index], problem.targets[index]


def train(
    problem: Problem, name: str, options: dict[str, Any], seed: int, steps: int,
    target: float | None = None, evaluate_every: int | None = None,
    watch: Callable[[int, Optimizer], None] | None = None, clock: Callable[[], float] = time.perf_counter,
    limit: float = math.inf,
) -> Run:  # fmt: skip
    """Train for `steps` steps, or until the training loss is at most `target` or no longer finite.

    limit: seconds after which it ends, too.

    watch: called after every step with its number and the optimizer, off the clock.
    """
    model, entry = problem.model(seed), OPTIMIZERS[name]
    optimizer = entry.make(model, problem.loss_fn, options)
    run, seconds = Run(name, options, seed), 0.0
    run.note(0, 0.0, problem.training_loss(model))
    every = evaluate_every or entry.evaluate_every
    batches = minibatches(problem, seed)
    with tqdm(total=steps, desc=_caption(problem, run), leave=False) as bar:
        for step in range(1, steps + 1):
            start = clock()
            x, y = next(batches)
            optimizer.zero_grad()
            if entry.by_closure:
                optimizer.step(_closure(problem, model, x, y))
            else:
                problem.loss(model(x), y).backward()
                optimizer.step()
            seconds += clock() - start
            if watch is not None:
                watch(step, optimizer)
            bar.update()
            if step % every == 0 or step == steps or seconds >= limit:
                loss = problem.training_loss(model)
                run.note(step, seconds, loss)
                bar.set_postfix(loss=f"{loss:.4g}")
                if not math.isfinite(loss) or (target is not None and loss <= target) or seconds >= limit:
                    break
    run.accuracy = problem.accuracy(model)
    if hasattr(optimizer, "remove"):
        optimizer.remove()  # the loss module outlives this run
    return run


def _closure(problem: Problem, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    def closure() -> tuple[Tensor, Tensor]:
        output = model(x)
        return problem.loss(output, y), output

    return closure


def train_grid(problem: Problem, rates: Sequence[float], seeds: list[int], steps: int) -> list[Run]:
    return [train(problem, "AdamW", {"lr": rate}, seed, steps) for seed in seeds for rate in rates]


def best_rate(runs: list[Run]) -> float:
    """The learning rate whose final loss is lowest, in the median over seeds."""
    finals: dict[float, list[float]] = {}
    for run in runs:
        finals.setdefault(run.options["lr"], []).append(_or_infinity(run.losses[-1]))
    return min(finals, key=lambda rate: statistics.median(finals[rate]))


def compare(baseline: list[Run], contenders: list[Run]) -> dict[str, Any]:
    """Medians over seeds of what K-FAC needs to the final loss that AdamW has with the same seed."""
    goal = {run.seed: run for run in baseline}
    rows = []
    for run in contenders:
        adam = goal[run.seed]
        steps, seconds = run.first_at(adam.losses[-1]) or (math.inf, math.inf)
        rows.append((steps, seconds, steps / adam.steps[-1], seconds / adam.seconds[-1]))
    steps, seconds, step_ratio, time_ratio = (statistics.median(column) for column in zip(*rows, strict=True))
    return {
        "rate": baseline[0].options["lr"],
        "target": statistics.median(run.losses[-1] for run in baseline),
        "adamw_steps": statistics.median(run.steps[-1] for run in baseline),
        "adamw_seconds": statistics.median(run.seconds[-1] for run in baseline),
        "kfac_steps": steps,
        "kfac_seconds": seconds,
        "step_ratio": step_ratio,
        "time_ratio": time_ratio,
    }


def report(problem: Problem, runs: list[Run], target: float | None = None) -> Table:
    """A row per optimizer and learning rate, medians over seeds, and ratios to the best AdamW."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_label(run), []).append(run)
    adams = [run for run in runs if run.optimizer == "AdamW"]
    best = [run for run in adams if run.options["lr"] == best_rate(adams)] if adams else []
    seeds = sorted({run.seed for run in runs})
    table = Table(title=f"{problem.name}: loss in {problem.unit}; seeds {seeds}, medians", box=box.SIMPLE)
    table.add_column("optimizer", no_wrap=True)
    for column in ("loss", "accuracy", "steps", "seconds", "step ratio", "time ratio"):
        table.add_column(column, justify="right")
    for label, group in groups.items():
        table.add_row(label, *_cells(group, best, target), style="bold" if group == best else None)
    return table


def _cells(group: list[Run], best: list[Run], target: float | None) -> list[str]:
    median = statistics.median
    steps, seconds = median(run.steps[-1] for run in group), median(run.seconds[-1] for run in group)
    loss, accuracies = median(run.losses[-1] for run in group), [run.accuracy for run in group]
    cells = [f"{loss:.4g}", "" if None in accuracies else f"{median(accuracies):.1%}"]
    cells += [f"{steps:.0f}", f"{seconds:.1f}"]
    if group == best:
        return [*cells, "1", "1"]
    if group[0].optimizer == "AdamW":
        return [*cells, "", ""]
    if best:
        result = compare(best, group)
        return [*cells, *(_ratio(result[key]) for key in ("step_ratio", "time_ratio"))]
    missed = [run.seed for run in group if target is not None and run.first_at(target) is None]
    return [*cells, f"target missed by seeds {missed}" if missed else "", ""]


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "missed"


def _label(run: Run) -> str:
    return f"{run.optimizer} lr {run.options['lr']:g}" if "lr" in run.options else run.optimizer


def _caption(problem: Problem, run: Run) -> str:
    return f"{problem.name}, {_label(run)}, seed {run.seed}"


def _or_infinity(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def save(path: Path, problem: Problem, runs: list[Run], summary: dict[str, Any] | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "problem": problem.name,
        "images": len(problem.inputs),
        "batch_size": problem.batch_size,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "summary": summary,
        "runs": [asdict(run) for run in runs],
    }
    path.write_text(json.dumps(content, indent=1))


def options_from(pairs: list[str]) -> dict[str, Any]:
    """{"lr": 0.2} from ["lr=0.2"]; values are JSON, and what is not is a string."""
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} is no option; write it as key=value, for example lr=0.2")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="K-FAC against AdamW at the best learning rate of a grid.")
    parser.add_argument("--problem", choices=sorted(KFAC_OPTIONS), default="autoencoder")
    parser.add_argument("--data-dir", help="folder with MNIST, FashionMNIST (IDX) or CIFAR-10 (python)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of AdamW; K-FAC gets as many (default: the problem's)")
    parser.add_argument("--rates", type=float, nargs="+", help="AdamW's grid (default: the problem's)")
    parser.add_argument("--kfac", nargs="+", default=[], metavar="KEY=VALUE", help="K-FAC options")
    parser.add_argument("--target", type=float, help="leave AdamW out and run K-FAC to this loss")
    parser.add_argument("--only-adamw", action="store_true", help="run the grid alone")
    parser.add_argument("--results", type=Path, help="JSON file to write; the PNG goes beside it")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    problem = PROBLEMS[args.problem](args.data_dir)
    steps, path = args.steps or problem.steps, args.results or RESULTS / f"{args.problem}.json"
    rates = args.rates or ADAMW_RATES[args.problem]
    kfac_options = {**KFAC_OPTIONS[args.problem], **options_from(args.kfac)}
    runs = [] if args.target else train_grid(problem, rates, args.seeds, steps)
    baseline = [run for run in runs if run.options["lr"] == best_rate(runs)]
    targets = {run.seed: run.losses[-1] for run in baseline} or dict.fromkeys(args.seeds, args.target)
    contenders = [] if args.only_adamw else [
        train(problem, "K-FAC", kfac_options, seed, steps, target=targets[seed]) for seed in args.seeds
    ]  # fmt: skip
    summary = compare(baseline, contenders) if baseline and contenders else None
    console = Console()
    console.print(report(problem, runs + contenders, args.target))
    save(path, problem, runs + contenders, summary)
    draw({problem.name: (problem.unit, baseline + contenders)}, path.with_suffix(".png"))
    console.print(f"{path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
