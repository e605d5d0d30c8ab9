"""What is trained: models with a seeded initialisation, their losses and their data.

Initialisation: Glorot uniform for tanh units, He uniform for ReLU, zero biases. It depends on the seed alone:
every optimizer of a comparison starts from the same weights.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.data import Labelled, held_out, mnist

AUTOENCODER_WIDTHS = (1000, 500, 250, 30, 250, 500, 1000)


def initialise(model: nn.Module, seed: int, nonlinearity: str) -> nn.Module:
    """Glorot ("tanh") or He ("relu") uniform weights and zero biases, drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            if nonlinearity == "tanh":
                nn.init.xavier_uniform_(layer.weight, generator=generator)
            else:
                nn.init.kaiming_uniform_(layer.weight, nonlinearity=nonlinearity, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


def dense(widths: tuple[int, ...], activation: type[nn.Module], linear: int | None = None) -> nn.Sequential:
    """Linear layers between `widths`, `activation` after each but the last and layer `linear` (from 0)."""
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(inputs, outputs))
        if index not in (len(widths) - 2, linear):
            layers.append(activation())
    return nn.Sequential(*layers)


def autoencoder(seed: int = 0, pixels: int = 784) -> nn.Module:
    """784-1000-500-250-30-250-500-1000-784 (Hinton & Salakhutdinov 2006); tanh, linear code and output."""
    widths = (pixels, *AUTOENCODER_WIDTHS, pixels)
    code = widths.index(30) - 1
    return initialise(dense(widths, nn.Tanh, linear=code), seed, "tanh")


def mlp(seed: int = 0, pixels: int = 784) -> nn.Module:
    """784-256-128-10 with ReLU, the classifier that is trained."""
    return initialise(dense((pixels, 256, 128, 10), nn.ReLU), seed, "relu")


def wide_mlp(seed: int = 0) -> nn.Module:
    """784-1024-1024-10 with ReLU, whose steps are timed at batch 512."""
    return initialise(dense((784, 1024, 1024, 10), nn.ReLU), seed, "relu")


def cnn(seed: int = 0) -> nn.Module:
    """3x3 convolutions 3-32, 32-64/2, 64-128/2, 128-128, average pool, Linear 128-10; for 32x32 images."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.ReLU()]
    layers += [nn.AvgPool2d(8), nn.Flatten(), nn.Linear(128, 10)]
    return initialise(nn.Sequential(*layers), seed, "relu")


@dataclass(frozen=True)
class Problem:
    """Inputs, targets and a loss; `loss` is always the mean over images."""

    name: str
    loss_fn: nn.Module
    inputs: Tensor
    targets: Tensor
    test: Labelled | None
    batch_size: int
    steps: int  # of AdamW, whose loss there is the one to reach
    unit: str

    def model(self, seed: int) -> nn.Module:
        return MODELS[self.name](seed, self.inputs.shape[1])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        value = self.loss_fn(outputs, targets)
        return value / len(outputs) if self.loss_fn.reduction == "sum" else value

    @torch.no_grad()
    def training_loss(self, model: nn.Module, chunk: int = 1000) -> float:
        """The loss on all training images."""
        total = 0.0
        for x, y in zip(self.inputs.split(chunk), self.targets.split(chunk), strict=True):
            total += float(self.loss(model(x), y)) * len(x)
        return total / len(self.inputs)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float | None:
        """The fraction of the test images whose label the model predicts; None without labels."""
        if self.test is None:
            return None
        return float((model(self.test.images).argmax(1) == self.test.labels).float().mean())


def autoencoder_problem(data_dir: str | Path | None = None) -> Problem:
    """Reconstruct the images: binary cross entropy summed over pixels, mean over images."""
    images = mnist(data_dir).images
    loss_fn = nn.BCEWithLogitsLoss(reduction="sum")
    return Problem("autoencoder", loss_fn, images, images, None, 500, 1250, "nats per image")


def mlp_problem(data_dir: str | Path | None = None) -> Problem:
    """Classify the images; 1,000 of the digits are held out."""
    train, test = held_out(data_dir)
    return Problem("mlp", nn.CrossEntropyLoss(), train.images, train.labels, test, 500, 100, "nats per image")


MODELS = {"autoencoder": autoencoder, "mlp": mlp}
PROBLEMS = {"autoencoder": autoencoder_problem, "mlp": mlp_problem}
