"""Runs of benchmarks/pays.py: the contenders, what a step of each costs, training for a number of steps, the store."""

import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.pays_problems import Equation, Problem, points
from benchmarks.train import OPTIMIZERS

OTHERS = ("AdamW", "Muon", "SOAP")
LOOKS, CHUNK = 20, 500  # evaluations of a run; rows that are evaluated at once
ROUND = 20  # steps; a multiple of the interval between two refreshes of a curvature
COLUMNS = ("step", "seconds", "train_loss", "train_accuracy", "test_loss", "test_accuracy")


@dataclass(frozen=True)
class Contender:
    """name: of one of the others, or of a setting of ours; its options.

    Ours may have clip_follows=true beside the options of SecondOrderOptimizer: `kl_clip` is then multiplied by the
    square of the schedule's factor, so that the length of clipped steps follows the rate.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.name not in OTHERS

    def make(self, problem: Problem, model: nn.Module, loss_fn: nn.Module) -> Any:
        if not self.ours:
            return OPTIMIZERS[self.name].make(model, loss_fn, self.options)
        if problem.data is None:
            from torchcurv.optim import ResidualNewton

            return ResidualNewton(model, reduction="mean", **self.options)
        from torchcurv import SecondOrderOptimizer

        options = {key: value for key, value in self.options.items() if key != "clip_follows"}
        return SecondOrderOptimizer(model, loss_fn=loss_fn, **options)


def rate_factor(schedule: str, step: int, steps: int) -> float:
    """Of the rate at `step`, from 0: up over a twentieth of the steps, then down to 0 along a line or a cosine."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done


class Training:
    """A model, its optimizer and its batches."""

    def __init__(self, problem: Problem, contender: Contender, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.problem, self.steps, self.done = problem, steps, 0
        self.model = problem.model(seed)
        self.loss_fn = copy.deepcopy(problem.loss)  # ours hangs hooks on it, which would slow down the others
        self.optimizer = contender.make(problem, self.model, self.loss_fn)
        self.equation = Equation(self.model) if problem.data is None else None
        self.by_residuals = self.equation is not None and contender.ours
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.clip = self.optimizer.settings["kl_clip"] if contender.options.get("clip_follows") else None
        self.batches = problem.batches(seed)

    def step(self) -> None:
        """One step, at the rate of the schedule."""
        x, y = next(self.batches)
        factor = rate_factor(self.problem.schedule, self.done, self.steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        if self.clip is not None:
            self.optimizer.settings["kl_clip"] = self.clip * factor**2
        if self.by_residuals:
            self.optimizer.step(lambda: self.equation.residuals(x, y), self.equation.weights)
        else:
            self.optimizer.zero_grad()
            self._loss(x, y).backward()
            self.optimizer.step()
        self.done += 1

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.equation.loss(x, y) if self.equation else self.loss_fn(self.model(x), y)

    def look(self) -> list[float | None]:
        """Training loss and accuracy, test loss and accuracy; accuracies None without labels."""
        if self.equation:
            return [float(self.equation.loss(*next(points(999))).detach()), None, self.equation.error(), None]
        data = self.problem.data()
        self.model.eval()
        found = [*self._on(*(part[: self.problem.measured] for part in data.train)), *self._on(*data.test)]
        self.model.train()
        return found

    @torch.no_grad()
    def _on(self, x: Tensor, y: Tensor) -> tuple[float, float | None]:
        loss, right = 0.0, 0.0
        for inputs, targets in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            output = self.model(inputs)
            loss += float(self.problem.loss(output, targets)) * len(inputs)
            if self.problem.labels:
                right += float((output.argmax(1) == targets).float().mean()) * len(inputs)
        return loss / len(x), right / len(x) if self.problem.labels else None

    def close(self) -> None:
        if hasattr(self.optimizer, "remove"):
            self.optimizer.remove()


def train(problem: Problem, contender: Contender, seed: int, steps: int, looks: int = LOOKS) -> dict[str, Any]:
    """A run as it is stored: rows of COLUMNS after `looks` parts of the steps, which end where a loss is not finite."""
    training, seconds, rows = Training(problem, contender, seed, steps), 0.0, []
    stops = sorted({round(steps * (k + 1) / looks) for k in range(looks)} - {0})
    caption = f"{problem.name}, {contender.name}, seed {seed}"
    if looks > 1:
        rows.append([0, 0.0, *rounded(training.look())])
    with tqdm(total=steps, desc=caption, leave=False, mininterval=1) as bar:
        for stop in stops:
            start = time.process_time()
            while training.done < stop:
                training.step()
                bar.update()
            seconds += time.process_time() - start
            found = training.look()
            rows.append([stop, *rounded([seconds]), *rounded(found)])
            if not (math.isfinite(found[0]) and math.isfinite(found[2])):
                break
    training.close()
    return {"name": contender.name, "options": contender.options, "seed": seed, "steps": steps, "rows": rows}


def rounded(values: Iterable[float | None]) -> list[float | None]:
    """To four digits; what is not finite is None, as JSON has no other name for it."""
    return [None if v is None or not math.isfinite(v) else float(f"{v:.4g}") for v in values]


def costs(problem: Problem, contenders: list[Contender], least: float) -> dict[str, list[float]]:
    """By name (seconds of the first ROUND steps, of a step after them), all in turns, medians over the rounds.

    There are 3 to 40 rounds, until those of all have taken `least` seconds; in one, AdamW takes a tenth of a second or
    more, since what is not in the caches when turns change slows the first steps.
    """
    for contender in contenders:  # what is slow the first time in a process
        warm = Training(problem, contender, 0, problem.steps)
        seconds_of(warm, 3)
        warm.close()
    trainings = {c.name: Training(problem, c, 0, 100 * problem.steps) for c in contenders}
    first = {name: seconds_of(t, ROUND) for name, t in trainings.items()}
    count = ROUND * math.ceil(0.1 / min(first.values())) if least else ROUND
    later: dict[str, list[float]] = {name: [] for name in trainings}
    for k in range(40):
        for name, t in trainings.items():
            later[name].append(seconds_of(t, count) / count)
        if k >= 2 and count * sum(map(sum, later.values())) >= least:
            break
    for t in trainings.values():
        t.close()
    return {name: [first[name], statistics.median(times)] for name, times in later.items()}


def seconds_of(training: Training, steps: int) -> float:
    start = time.process_time()
    for _ in range(steps):
        training.step()
    return time.process_time() - start


class Store:
    """The JSON file of a problem: costs by setting, in seconds and as multiples of AdamW's, and runs."""

    def __init__(self, folder: Path, problem: Problem) -> None:
        self.path, self.problem = folder / f"{problem.name}.json", problem
        head = {"problem": problem.name, "batch": problem.batch, "steps": problem.steps, "schedule": problem.schedule}
        self.content = {**head, "torch": torch.__version__, "costs": {}, "runs": []}
        if self.path.exists():
            content = json.loads(self.path.read_text())
            if {key: content.get(key) for key in head} == head:
                self.content = content

    def forget(self, chosen: Callable[[str], bool]) -> None:
        """What was measured of the contenders with these names."""
        self.content["runs"] = [run for run in self.content["runs"] if not chosen(run["name"])]
        self.content["costs"] = {name: cost for name, cost in self.content["costs"].items() if not chosen(name)}

    def measure(self, contenders: list[Contender], least: float) -> None:
        """The costs that are missing, beside AdamW's, whose step is the unit."""
        missing = [c for c in contenders if c.name not in self.content["costs"]]
        if not missing:
            return
        beside = [Contender("AdamW", {"lr": 1e-3}), *(c for c in missing if c.name != "AdamW")]
        found = costs(self.problem, beside, least)
        unit = found["AdamW"][1]
        for name, (first, later) in found.items():
            if name not in self.content["costs"]:
                values = {"first": first / unit, "later": later / unit, "seconds": later}
                self.content["costs"][name] = {key: float(f"{value:.4g}") for key, value in values.items()}
        self.save()

    def steps(self, name: str) -> int:
        """As many as take the time of AdamW's steps of the problem, ROUND at the least."""
        adamw, own = self.content["costs"]["AdamW"], self.content["costs"][name]
        budget = adamw["first"] + (self.problem.steps - ROUND)
        return max(ROUND, ROUND + round((budget - own["first"]) / own["later"]))

    def cost(self, name: str) -> float:
        """Of a step, the mean over a run, in AdamW's."""
        return self.problem.steps / self.steps(name)

    def run(self, contender: Contender, seed: int, looks: int = LOOKS) -> dict[str, Any]:
        """The stored run, or a new one, which is stored. More looks than one make it one of those that count."""
        steps = self.steps(contender.name)
        key = {"name": contender.name, "options": contender.options, "seed": seed, "steps": steps}
        for run in self.content["runs"]:
            if {k: run[k] for k in key} == key:
                return run
        run = train(self.problem, contender, seed, steps, looks)
        self.content["runs"].append(run)
        self.save()
        return run

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        runs = ",\n".join("  " + json.dumps(run, separators=(",", ":")) for run in self.content["runs"])
        head = json.dumps({key: value for key, value in self.content.items() if key != "runs"}, indent=1)
        self.path.write_text(f'{head[:-2]},\n "runs": [\n{runs}\n ]\n}}\n')


def final(run: dict[str, Any]) -> float:
    """The last test loss, infinite where the run diverged."""
    return math.inf if diverged(run) else run["rows"][-1][COLUMNS.index("test_loss")]


def diverged(run: dict[str, Any]) -> bool:
    return None in (run["rows"][-1][2], run["rows"][-1][4])
