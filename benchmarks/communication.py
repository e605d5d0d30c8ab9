"""What second-order training sends between processes: counted for large models, and timed for a small one.

    python -m benchmarks.communication                      # ResNet-50 and a GPT of 1 B parameters; nothing is computed
    python -m benchmarks.communication --links 100 50       # GB/s of the links
    python -m benchmarks.communication --measure            # two gloo processes on this machine, an MLP

Counting: the models are built on the meta device, and the bytes are those of the tensors that the optimizer would
send: of statistics as triangles, and of factors from the process that the assignment names. FLOPs of forward and
backward are torch's count. A sum over W processes passes 2 (W - 1) / W of its bytes over each link, what one process
sends to all passes its bytes once. Factorisations count n³ for each matrix, on the process that has most to do.
"""

import argparse
import os
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from torchcurv import SecondOrderOptimizer
from torchcurv.curv.block.block import Curvature
from torchcurv.curv.distributed import Ranks
from torchcurv.curv.linalg.triangles import triangle_shape
from torchcurv.optim.engine import engine, placement
from torchcurv.optim.engine.reduction import slots_of

# --- models ------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
        self.path = nn.Sequential(*(x for size in sizes for x in (convolution(*size), nn.ReLU())))[:-1]
        self.short = nn.Identity() if inputs == 4 * width else convolution(inputs, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.path(x) + self.short(x))


def convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Sequential:
    convolved = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(convolved, nn.BatchNorm2d(outputs))


def resnet50() -> nn.Module:
    layers, inputs = [convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)], 64
    for stage, count in enumerate((3, 4, 6, 3)):
        for k in range(count):
            width = 64 * 2**stage
            layers.append(Bottleneck(inputs, width, 2 if stage and not k else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


class Attending(nn.Module):
    """A layer of a transformer, without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.before, self.between = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.before(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class GPT(nn.Module):
    def __init__(self, width: int = 2048, depth: int = 16, words: int = 50257, length: int = 1024) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Attending(width, width // 128) for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))))


def images() -> Tensor:
    return torch.zeros(64, 3, 224, 224)


def texts() -> Tensor:
    return torch.zeros(8, 1024, dtype=torch.int64)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "ResNet-50": (resnet50, images, "64 images"),
    "GPT": (GPT, texts, "8 texts of 1,024 words"),
}

# --- counting ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speeds:
    """GB/s of links; TF/s of products, and of factorisations. interval: steps between two that are due."""

    links: tuple[float, ...] = (100.0, 25.0)
    products: float = 60.0
    factorisations: float = 5.0
    interval: int = 10


@dataclass(frozen=True)
class Counted:
    """Of one process in a step that is due: bytes, messages, operations.

    summed: bytes of statistics. whole: the same as matrices. spread: bytes of factors. held: of averages and factors.
    work: n³ of the process that has most to do.
    """

    summed: int
    whole: int
    spread: int
    held: int
    messages: int
    work: int

    @property
    def peak(self) -> int:
        """Bytes beside those of the model: of statistics while they are summed, or of factors, old and new."""
        return self.held + max(self.whole + 2 * self.summed, self.held - self.whole + 2 * self.spread)

    def seconds(self, link: float, count: int, speeds: Speeds) -> float:
        """In a step that is due: messages, and factorisations."""
        sent = 2 * (count - 1) / count * self.summed + self.spread
        return sent / (1e9 * link) + self.work / (1e12 * speeds.factorisations)


def counted(blocks: list[Curvature], count: int, where: str) -> Counted:
    costs = [placement.cost_of(block) for block in blocks]
    owners = placement.owners_of(costs, count)
    shared = placement.is_shared(where, costs, owners)
    kept = [(x, key in block.approx.symmetric) for block in blocks for key, x in slots_of(block).items()]
    forms = [form for block in blocks if (form := placement.form_of(block))]
    sent = [x for form in forms for x in form.message] if shared else []
    loads = Counter(dict.fromkeys(owners, 0))
    for owner, cost in zip(owners, costs, strict=True):
        loads[owner] += cost
    return Counted(
        summed=sum((triangle_shape(x.shape).numel() if half else x.numel()) * x.itemsize for x, half in kept),
        whole=(whole := sum(x.nbytes for x, _ in kept)),
        spread=sum(x.nbytes for x in sent),
        held=whole + sum(x.nbytes for form in forms for x in form.factor.state().values()),
        messages=2 + (1 + len(loads) if shared else 0),
        work=max(loads.values()) if shared else sum(costs),
    )


def floating_operations(model: nn.Module, x: Tensor) -> int:
    """Of forward and backward."""
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops()


COLUMNS = (
    *("model", "processes", "placement", "statistics, GB", "factors, GB", "messages", "held, GB", "peak, GB"),
    "forward and backward, ms",
)


def rows_of(name: str, counts: list[int], speeds: Speeds) -> list[list[str]]:
    make, batch, _ = MODELS[name]
    with torch.device("meta"):
        model, x = make(), batch()
        passes = 1e3 * floating_operations(model, x) / (1e12 * speeds.products)
    optimizer = SecondOrderOptimizer(model, loss_fn="cross_entropy")
    blocks = list(optimizer.blocks.values())
    optimizer.remove()
    found = []
    for count in counts:
        for where in ("replicated", "shared"):
            own = counted(blocks, count, where)
            sizes = [f"{n / 1e9:.2f}" for n in (own.summed, own.spread)]
            memory = [f"{n / 1e9:.1f}" for n in (own.held, own.peak)]
            added = [f"{1e3 * own.seconds(link, count, speeds) / speeds.interval:.1f}" for link in speeds.links]
            found.append([name, f"{count:,}", where, *sizes, str(own.messages), *memory, f"{passes:.0f}", *added])
    return found


# --- measuring ---------------------------------------------------------------------------------------------------

STEPS = 10  # of a round: one is due


class Clock:
    """Seconds of functions of the optimizer in one process, and of waiting until all processes have come there."""

    def __init__(self) -> None:
        self.sending = self.waiting = 0.0

    def timed(self, function: Callable[..., Any], meet: bool = True) -> Callable[..., Any]:
        """meet: whether it is one that all processes call."""

        def run(*args: Any) -> Any:
            start = time.perf_counter()
            if meet:
                distributed.barrier()
            begun = time.perf_counter()
            found = function(*args)
            self.waiting, self.sending = self.waiting + begun - start, self.sending + time.perf_counter() - begun
            return found

        return run

    def reduction(self, function: Callable[..., Any]) -> Callable[..., Any]:
        timed = self.timed(function)
        return lambda engine, due: timed(engine, due) if due else function(engine, due)


def mlp(where: str) -> Callable[[Tensor, Tensor], None]:
    """A step of K-FAC on the MLP 784-1024-1024-10."""
    torch.manual_seed(0)
    layers = nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    model = nn.Sequential(*layers)
    options: dict[str, Any] = {"update_every": 10, "refactor_every": 10, "factor_placement": where}
    optimizer, called = SecondOrderOptimizer(model, loss_fn="cross_entropy", **options), DistributedDataParallel(model)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(called(x), y).backward()
        optimizer.step()

    return step


def rounds(rank: int, count: int, batch: int) -> dict[str, list[tuple[float, float, float]]]:
    """(seconds of a round, of these sending, waiting) by placement, in turns."""
    places = "replicated", "shared"
    steps, generator = {where: mlp(where) for where in places}, torch.Generator().manual_seed(rank)
    x, y = torch.randn(batch, 784, generator=generator), torch.randint(10, (batch,), generator=generator)
    found: dict[str, list[tuple[float, float, float]]] = {where: [] for where in places}
    for _ in range(count + 1):
        for where, step in steps.items():
            clock = Clock()
            with (
                mock.patch.object(engine, "reduce_pending", clock.reduction(engine.reduce_pending)),
                mock.patch.object(placement, "_agree", clock.timed(placement._agree)),
                mock.patch.object(Ranks, "spread_", clock.timed(Ranks.spread_)),
                mock.patch.object(placement, "message_of", clock.timed(placement.message_of, meet=False)),
                mock.patch.object(placement, "_received", clock.timed(placement._received, meet=False)),
            ):
                distributed.barrier()
                start = time.perf_counter()
                for _ in range(STEPS):
                    step(x, y)
                found[where].append((time.perf_counter() - start, clock.sending, clock.waiting))
    return {where: own[1:] for where, own in found.items()}  # the first round warms up


def worker(rank: int, path: str, count: int, batch: int, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    results[rank] = rounds(rank, count, batch)
    distributed.destroy_process_group()


def measured(count: int, batch: int) -> list[list[str]]:
    """Milliseconds per step, the medians of the rounds, of the first of two processes."""
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        results = manager.dict()
        arguments = (str(Path(folder) / "rendezvous"), count, batch, results)
        torch.multiprocessing.spawn(worker, arguments, nprocs=2)
        found = results[0]
    lines = []
    for where, own in found.items():
        step, sending, waiting = (1e3 * statistics.median(x) / STEPS for x in zip(*own, strict=True))
        share = statistics.median(sent / whole for whole, sent, _ in own)
        pairs = zip(own, found["replicated"], strict=True)
        ratio = statistics.median(mine[0] / other[0] for mine, other in pairs)
        lines.append([where, f"{step:.1f}", f"{ratio:.3f}", f"{sending:.2f}", f"{share:.3f}", f"{waiting:.2f}"])
    return lines


MEASURED = "placement", "step, ms", "of replicated", "sending, ms", "share of the step", "waiting, ms"

# --- the program -------------------------------------------------------------------------------------------------


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = Speeds()
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--processes", nargs="+", type=int, default=[8, 64, 1024])
    parser.add_argument("--links", nargs="+", type=float, default=list(defaults.links), help="GB/s")
    parser.add_argument("--products", type=float, default=defaults.products, help="TF/s of matrix products")
    parser.add_argument("--factorisations", type=float, default=defaults.factorisations, help="TF/s of these")
    parser.add_argument("--interval", type=int, default=defaults.interval, help="steps between two that are due")
    parser.add_argument("--measure", action="store_true", help="time two processes on an MLP")
    parser.add_argument("--rounds", type=int, default=9, help="of ten steps, for --measure")
    parser.add_argument("--batch", type=int, default=512, help="samples of a process, for --measure")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, between its marks")
    args = parser.parse_args(given)
    if args.measure:
        mark, columns, found = "measured", MEASURED, measured(args.rounds, args.batch)
    else:
        speeds = Speeds(tuple(args.links), args.products, args.factorisations, args.interval)
        mark, columns = "counted", (*COLUMNS, *(f"added at {link:g} GB/s, ms" for link in args.links))
        found = [row for name in args.models for row in rows_of(name, args.processes, speeds)]
    show(columns, found)
    if args.markdown:
        write(args.markdown, mark, columns, found)


def show(columns: tuple[str, ...], found: list[list[str]]) -> None:
    table = Table(title="What processes send")
    for name in columns:
        table.add_column(name, justify="left" if name in ("model", "placement") else "right")
    for row in found:
        table.add_row(*row)
    Console().print(table)


def write(page: Path, mark: str, columns: tuple[str, ...], found: list[list[str]]) -> None:
    """Put a table into a page, between <!-- mark --> and <!-- end -->; at its end if there are none."""
    lines = [columns, ["---"] * len(columns), *found]
    table = "\n".join("| " + " | ".join(row) + " |" for row in lines)
    text, start = page.read_text() if page.exists() else "", f"<!-- {mark} -->\n"
    before, there, rest = text.partition(start)
    after = rest.partition("<!-- end -->")[2] if there else "\n"
    page.write_text(f"{before}{start}\n{table}\n\n<!-- end -->{after}")


if __name__ == "__main__":
    main()
