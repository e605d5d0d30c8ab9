"""Step time: one training step as a multiple of an SGD-with-momentum step of the same model in the same run.

    python -m benchmarks.step_time --threads 2                     # every row
    python -m benchmarks.step_time --rows kfac-ggn mlp --rounds 3  # rows whose key has all these words
    python -m benchmarks.step_time --list

A round visits every contender in turn: a block of SGD steps, then a block of as many of the contender's, a whole
number of refresh cycles. The ratio is that of the two medians over the rounds. "Floor" counts the matrix
products that the work needs; "table" is the best other package when the table was first measured, on 2 threads.
K-FAC rows give the intervals of statistics / inverses; "GGN" is one draw. A row "nothing due" says what a step
costs on which neither is refreshed: without preconditioning (approx None) against SGD; with K-FAC against SGD
plus the products B^-1 G A^-1 of the same sizes.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.others import INSTALL, Adapter, Step, Work, available, sgd
from benchmarks.problems import cnn, wide_mlp

NEVER = 10**9
STEPS = 4  # of a block, at least; the first finds cold caches, on both sides
MODELS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "mlp": (wide_mlp, (512, 784)),
    "cnn": (cnn, (128, 3, 32, 32)),
}


@dataclass(frozen=True)
class Row:
    """One line: the work, the model, and what the table says (best other package, floor, wanted)."""

    model: str
    work: Work
    table: float | None = None
    floor: float | None = None
    want: float | None = None

    @property
    def idle(self) -> bool:
        return self.work.update_every == NEVER

    @property
    def key(self) -> str:
        interval = "idle" if self.idle else f"{self.work.update_every}-{self.work.refactor_every}"
        curvature = self.work.curvature.replace(" ", "-")
        return f"{self.work.approx or 'none'}-{curvature}-{interval}-{self.model}"

    @property
    def label(self) -> str:
        work, model = self.work, self.model.upper()
        approx = {"kfac": "K-FAC", "diag": "diagonal", None: "approx None"}[work.approx]
        if self.idle:
            return f"nothing due, {approx}, {model}"
        names = {"ggn": "GGN", "ggn exact": "exact GGN", "empirical_fisher": "emp. Fisher", "hessian": "HesScale"}
        curvature = names[work.curvature]
        every = f" {work.update_every}/{work.refactor_every}" if work.approx == "kfac" else ""
        return f"{approx} {curvature}{every}, {model}"


def rows() -> list[Row]:
    """The table; a K-FAC row is (model, update_every, refactor_every)."""
    kfac = {
        ("mlp", 1, 1): (6.6, 3.5, 4.5),
        ("mlp", 1, 10): (3.3, 2.8, 3.0),
        ("mlp", 10, 10): (3.3, 2.3, 2.4),
        ("cnn", 1, 1): (4.7, 2.3, 3.0),
        ("cnn", 1, 10): (None, None, None),
        ("cnn", 10, 10): (1.7, 1.2, 1.3),
    }
    diagonal = {
        ("mlp", "empirical_fisher"): (1.9, 1.3, 1.5),
        ("cnn", "empirical_fisher"): (7.3, 1.5, 2.5),
        ("mlp", "ggn"): (2.0, 1.7, 1.8),
        ("cnn", "ggn"): (4.1, 1.9, 2.5),
        ("mlp", "ggn exact"): (5.4, 4.0, 4.5),
        ("cnn", "ggn exact"): (32.0, 8.0, 12.0),
        ("mlp", "hessian"): (1.9, 1.7, 1.8),
    }
    table = [
        Row(model, Work("kfac", curvature, update, refactor), *numbers)
        for curvature in ("ggn", "empirical_fisher")
        for (model, update, refactor), numbers in kfac.items()
    ]
    table += [Row(model, Work("diag", curvature), *numbers) for (model, curvature), numbers in diagonal.items()]
    for approx in (None, "kfac"):
        table += [Row(model, Work(approx, "ggn", NEVER, NEVER), None, 1.0, 1.02) for model in MODELS]
    return table


def sgd_step(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, products: bool = False) -> Step:
    """A step of plain SGD; `products` adds B^-1 G A^-1 of every layer, weights and biases together."""
    optimizer = sgd(model)
    triples = [_random_triple(layer) for layer in model.modules() if hasattr(layer, "weight")] if products else []

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        for output, gradient, inputs in triples:
            output @ gradient @ inputs
        optimizer.step()

    return step


def _random_triple(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = len(layer.weight), layer.weight[0].numel() + (layer.bias is not None)
    return torch.randn(rows, rows), torch.randn(rows, columns), torch.randn(columns, columns)


def torchcurv_step(work: Work, model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> Step:
    """A step of SecondOrderOptimizer in the plain training loop."""
    from torchcurv import SecondOrderOptimizer

    optimizer = SecondOrderOptimizer(
        model, loss_fn=loss_fn, curv_type=work.curvature.removesuffix(" exact"), approx=work.approx,
        samples=None if work.curvature == "ggn exact" else 1, lr=1e-4, momentum=0.9, damping=0.1,
        ema_decay=0.95, update_every=work.update_every, refactor_every=work.refactor_every,
        max_positions=None,  # others measure all
    )  # fmt: skip

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()

    return step


@dataclass
class Contender:
    """A step, timed in blocks next to blocks of its base."""

    name: str
    step: Step
    base: Step
    steps: int  # in a block
    times: list[float] = field(default_factory=list)
    base_times: list[float] = field(default_factory=list)

    def visit(self) -> None:
        self.base_times.append(block(self.base, self.steps))
        self.times.append(block(self.step, self.steps))

    @property
    def ratio(self) -> float:
        return statistics.median(self.times) / statistics.median(self.base_times)


def block(step: Step, steps: int) -> float:
    """Seconds per step over `steps` steps."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def contender(row: Row, name: str, adapter: Adapter) -> Contender | str | None:
    """One that has made its first cycle; a string says why it failed, None that it cannot do the work."""
    make_model, shape = MODELS[row.model]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    y = torch.randint(10, shape[:1], generator=generator)
    cycle = 4 if row.idle else max(row.work.update_every, row.work.refactor_every)
    try:
        step = adapter(row.work, make_model(0), nn.CrossEntropyLoss(), x, y)
        if step is None:
            return None
        block(step, cycle)
    except Exception as error:  # another package's failure must not end the table
        if name == "torchcurv":
            raise
        return f"{name} failed on {row.key}: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    base = sgd_step(make_model(0), nn.CrossEntropyLoss(), x, y, products=row.idle and row.work.approx == "kfac")
    block(base, 2)
    return Contender(name, step, base, cycle * -(-STEPS // cycle))


def measure(row: Row, adapters: dict[str, Adapter], rounds: int) -> tuple[dict[str, float], list[str]]:
    """({package: ratio}, failures) of one row; the contenders take turns in every round."""
    made = [contender(row, name, adapter) for name, adapter in adapters.items()]
    contenders = [entry for entry in made if isinstance(entry, Contender)]
    for _ in range(rounds):
        for entry in contenders:
            entry.visit()
    return {entry.name: entry.ratio for entry in contenders}, [entry for entry in made if isinstance(entry, str)]


COLUMNS = ("row", "torchcurv", "best other here", "best other, table", "floor", "want")


def cells(row: Row, ratios: dict[str, float]) -> list[str]:
    ours = ratios.get("torchcurv")
    others = {name: ratio for name, ratio in ratios.items() if name != "torchcurv"}
    best = min(others, key=lambda name: others[name], default=None)
    here = "" if best is None else f"{others[best]:.2f} ({best})"
    return [
        row.label,
        _number(ours, 2),
        here,
        *(_number(value) for value in (row.table, row.floor, row.want)),
    ]


def _number(value: float | None, digits: int | None = None) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if digits is not None else f"{value:g}"


def markdown(lines: list[list[str]], note: str) -> str:
    table = [COLUMNS, ["---"] * len(COLUMNS), *lines]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in table), "", note, ""])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Step times as multiples of an SGD step.")
    parser.add_argument("--rows", nargs="+", default=[], metavar="WORD", help="only keys that contain all words")
    parser.add_argument("--list", action="store_true", help="print the keys of the rows and stop")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--others", nargs="*", metavar="NAME", help="other packages (default: all installed)")
    parser.add_argument("--no-torchcurv", action="store_true", help="measure the other packages alone")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    chosen = [row for row in rows() if all(word in row.key for word in args.rows)]
    if args.list or not chosen:
        print("\n".join(row.key for row in rows()))
        return
    warnings.filterwarnings("ignore")  # what the other packages say of themselves
    others, missing = available(args.others)
    ours = {} if args.no_torchcurv else {"torchcurv": torchcurv_step}
    lines, failures = [], []
    for row in (bar := tqdm(chosen, leave=False)):
        bar.set_description(row.key)
        ratios, failed = measure(row, {**ours, **({} if row.idle else others)}, args.rounds)
        lines.append(cells(row, ratios))
        failures += failed
        tqdm.write(f"{row.key}: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    note = f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {args.rounds} rounds"
    table = Table(title="One step as a multiple of an SGD step", caption=note)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "row" else "right", no_wrap=name == "row")
    for line in lines:
        table.add_row(*line)
    console = Console()
    console.print(table)
    for failure in failures:
        console.print(failure, style="yellow", markup=False)
    if missing:
        console.print(f"not installed: {', '.join(missing)}. To compare: {INSTALL}", markup=False)
    if args.markdown:
        args.markdown.write_text(markdown(lines, note))


if __name__ == "__main__":
    main()
