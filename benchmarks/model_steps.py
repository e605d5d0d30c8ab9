"""Steps of the models of docs/results/models.md, and of a compiled Llama, as multiples of steps of SGD.

    PYTHONPATH=.:tests/support python -m benchmarks.model_steps --threads 1               # every model, as it comes
    PYTHONPATH=.:tests/support python -m benchmarks.model_steps --threads 1 --models gpt2 bert
    PYTHONPATH=.:tests/support python -m benchmarks.model_steps --threads 1 --compiled    # a compiled Llama

Intervals are 10 / 10. Steps of both optimizers take turns. A ratio is that of the means of 20 steps after the first
ten, two of which measure and factor; "quiet" that of the medians, which are steps that do neither. Needs the extra
`integrations`.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from hugging_face import MODELS
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from torchcurv import SecondOrderOptimizer

Step = Callable[[], None]
WARM, STEPS = 10, 20


def step_of(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Any], called: Any = None) -> Step:
    called = model if called is None else called

    def step() -> None:
        optimizer.zero_grad()
        called(**batch).loss.backward()
        optimizer.step()

    return step


def both(make: Callable[[], tuple[Any, dict[str, Any]]], compiled: bool = False) -> list[Step]:
    """A step of SGD with momentum and one of SecondOrderOptimizer, each on a model of its own."""
    steps = []
    for second_order in (False, True):
        model, batch = make()
        model.train()
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer: Any = (
            SecondOrderOptimizer(model, update_every=10, refactor_every=10)
            if second_order
            else torch.optim.SGD(trainable, lr=1e-3, momentum=0.9)
        )
        steps.append(step_of(model, optimizer, batch, torch.compile(model) if compiled else None))
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
    sgd, ours = times(steps, count)
    quiet = statistics.median(ours) / statistics.median(sgd)
    return [name, f"{1e3 * statistics.median(sgd):.1f}", f"{sum(ours) / sum(sgd):.2f}", f"{quiet:.2f}"]


def llama(words: int, width: int) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * width,
        max_position_embeddings=128,
    )  # fmt: skip
    x = torch.randint(512, (words // 128, 128))
    return transformers.LlamaForCausalLM(config), {"input_ids": x, "labels": x}


def rows(args: argparse.Namespace) -> list[list[str]]:
    if not args.compiled:
        chosen = args.models or list(MODELS)
        return [line(name, both(MODELS[name])) for name in tqdm(chosen, leave=False)]
    found = []
    for width, words in tqdm([(128, 1024), (128, 2048), (128, 4096), (256, 2048)], leave=False):
        steps = both(lambda width=width, words=words: llama(words, width), compiled=True)
        found.append(line(f"compiled llama, width {width}, {words} words a batch", steps, 2 * STEPS))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), metavar="NAME")
    parser.add_argument("--compiled", action="store_true", help="a Llama under torch.compile")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
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
