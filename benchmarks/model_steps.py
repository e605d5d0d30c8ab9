"""Steps of the models of docs/results/models.md, and of a compiled Llama, as multiples of steps of SGD.

    PYTHONPATH=.:tests/support python -m benchmarks.model_steps --threads 1               # every model, as it comes
    PYTHONPATH=.:tests/support python -m benchmarks.model_steps --threads 1 --models gpt2 bert
    PYTHONPATH=.:tests/support python -m benchmarks.model_steps --threads 1 --compiled    # a compiled Llama

Intervals are 10 / 10. Steps of both optimizers take turns. A ratio is that of the means of 20 steps, two of which
measure and factor, the median of three such runs of 20 after the first ten steps; "quiet" that of the medians of all,
which are steps that do neither. Denormal numbers, which batches that are fitted leave behind, count as zero.
Images come in batches of 16, as the tests' own batches of four would time the parameters alone. Needs the extra
`integrations`, and timm.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hugging_face
import timm_models
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from torchcurv import SecondOrderOptimizer

Step = Callable[[], None]
WARM, STEPS = 10, 20


Made = tuple[Any, Callable[[Any], Tensor], Any]  # a model, from what is called in its place to the loss, loss_fn=


def of_transformers(make: Callable[[], tuple[Any, dict[str, Any]]]) -> Made:
    model, batch = make()
    return model, lambda called: called(**batch).loss, "cross_entropy"


def of_timm(name: str) -> Made:
    model, x, y = timm_models.made(name, 16)
    loss_fn = nn.CrossEntropyLoss()
    return model, lambda called: loss_fn(called(x), y), loss_fn


def step_of(model: Any, optimizer: torch.optim.Optimizer, loss: Callable[[Any], Tensor]) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    return step


def both(make: Callable[[], Made], compiled: bool = False) -> list[Step]:
    """A step of SGD with momentum and one of SecondOrderOptimizer, each on a model of its own."""
    steps = []
    for second_order in (False, True):
        model, loss, loss_fn = make()
        model.train()
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer: Any = (
            SecondOrderOptimizer(model, loss_fn=loss_fn, update_every=10, refactor_every=10)
            if second_order
            else torch.optim.SGD(trainable, lr=1e-3, momentum=0.9)
        )
        steps.append(step_of(torch.compile(model) if compiled else model, optimizer, loss))
    return steps


def times(steps: list[Step], count: int) -> list[list[float]]:
    """Seconds of each step after the first ten."""
    for step in steps:
        for _ in range(WARM):
            step()
    found: list[list[float]] = [[] for _ in steps]
    for _ in range(count):
        for step, seconds in zip(steps, found, strict=True):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return found


def line(name: str, steps: list[Step], count: int = STEPS) -> list[str]:
    sgd, ours = times(steps, 3 * count)
    runs = [slice(start, start + count) for start in range(0, 3 * count, count)]
    ratio = statistics.median(sum(ours[run]) / sum(sgd[run]) for run in runs)
    quiet = statistics.median(ours) / statistics.median(sgd)
    return [name, f"{1e3 * statistics.median(sgd):.1f}", f"{ratio:.2f}", f"{quiet:.2f}"]


def llama(words: int, width: int) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * width,
        max_position_embeddings=128,
    )  # fmt: skip
    x = torch.randint(512, (words // 128, 128))
    return transformers.LlamaForCausalLM(config), {"input_ids": x, "labels": x}


EVERY: dict[str, Callable[[], Made]] = {
    **{name: partial(of_transformers, make) for name, make in hugging_face.MODELS.items()},
    **{name: partial(of_timm, name) for name in timm_models.MODELS},
}


def rows(args: argparse.Namespace) -> list[list[str]]:
    if not args.compiled:
        return [line(name, both(EVERY[name])) for name in tqdm(args.models or list(EVERY), leave=False)]
    found = []
    for width, words in tqdm([(128, 1024), (128, 2048), (128, 4096), (256, 2048)], leave=False):
        steps = both(lambda width=width, words=words: of_transformers(lambda: llama(words, width)), compiled=True)
        found.append(line(f"compiled llama, width {width}, {words} words a batch", steps))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(EVERY), metavar="NAME")
    parser.add_argument("--compiled", action="store_true", help="a Llama under torch.compile")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    warnings.simplefilter("ignore")
    columns, found = ("model", "SGD, ms", "ratio", "quiet"), rows(args)
    table = Table(title="A step at intervals 10 / 10 as a multiple of a step of SGD")
    for name in columns:
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in found:
        table.add_row(*row)
    Console().print(table)
    if args.markdown:
        lines = [columns, ["---"] * len(columns), *found]
        args.markdown.write_text("\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n")


if __name__ == "__main__":
    main()
