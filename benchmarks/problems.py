"""What is trained: models with a seeded initialisation, their losses and their data.

Initialisation: Glorot uniform for tanh units and the GPT, He uniform for ReLU, zero biases, embeddings of standard
deviation 0.02. It depends on the seed alone: every optimizer of a comparison starts from the same weights.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data import ALPHABET, Labelled, held_out, mnist, text

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
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.02, generator=generator)
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


def as_images(pixels: int) -> nn.Unflatten:
    """Rows of pixels to square images; 3072 pixels are those of three channels."""
    channels = 3 if pixels == 3072 else 1
    side = math.isqrt(pixels // channels)
    return nn.Unflatten(1, (channels, side, side))


def digits_cnn(seed: int = 0, pixels: int = 784) -> nn.Module:
    """3x3 convolutions 1-16, 16-32/2, 32-32/2 with ReLU, average pool, Linear 32-10."""
    image = as_images(pixels)
    layers: list[nn.Module] = [image]
    for inputs, outputs, stride in ((image.unflattened_size[0], 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return initialise(nn.Sequential(*layers), seed, "relu")


def lenet(seed: int = 0, pixels: int = 784) -> nn.Module:
    """5x5 convolutions 1-16 (padded) and 16-32, each with ReLU and 2x2 max pooling, Linear 800-128-10; 117,000
    parameters."""
    image = as_images(pixels)
    channels, side, _ = image.unflattened_size
    features = 32 * ((side // 2 - 4) // 2) ** 2
    model = nn.Sequential(
        image, nn.Conv2d(channels, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    return initialise(model, seed, "relu")


class Residual(nn.Module):
    """ReLU of x plus two normalised 3x3 convolutions of it; x goes through a 1x1 convolution where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(8, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(8, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first_norm(self.first(x)).relu()
        return (self.shortcut(x) + self.second_norm(self.second(inner))).relu()


def resnet(seed: int = 0, pixels: int = 784) -> nn.Module:
    """3x3 convolution 1-16/2, residual blocks 16-16, 16-32/2, 32-32, average pool, Linear 32-10.

    Normalised by groups: a training loss is then that of the weights alone, whatever batches and running
    averages came before.
    """
    image = as_images(pixels)
    model = nn.Sequential(
        image, nn.Conv2d(image.unflattened_size[0], 16, 3, stride=2, padding=1, bias=False), nn.GroupNorm(8, 16),
        nn.ReLU(), Residual(16, 16), Residual(16, 32, 2), Residual(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    )  # fmt: skip
    return initialise(model, seed, "relu")


class CausalBlock(nn.Module):
    """Attention to what came before, then a hidden layer of four times the width; both normalised first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.hidden_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        split = (layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in self._inputs)
        attended = F.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.hidden_norm(x))))

    @property
    def _inputs(self) -> tuple[nn.Linear, ...]:
        return self.query, self.key, self.value


class GPT(nn.Module):
    """Characters [N, T] to logits of the next ones, [N, V, T]: classes where CrossEntropyLoss has them."""

    def __init__(self, context: int, width: int = 64, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(len(ALPHABET), width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(CausalBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        x = self.tokens(tokens) + self.positions(places)
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


def gpt(seed: int = 0, context: int = 64) -> nn.Module:
    """Two layers of two heads and width 64, 113,000 parameters."""
    return initialise(GPT(context), seed, "tanh")


@dataclass(frozen=True)
class Problem:
    """Inputs, targets and a loss; `loss` is always the mean over images (or characters)."""

    name: str
    loss_fn: nn.Module
    inputs: Tensor
    targets: Tensor
    test: Labelled | None
    batch_size: int
    steps: int  # of AdamW, whose loss there is the one to reach
    unit: str
    measured: int | None = None  # the training loss is that of the first so many; None: of all

    def model(self, seed: int) -> nn.Module:
        return MODELS[self.name](seed, self.inputs.shape[1])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        value = self.loss_fn(outputs, targets)
        return value / len(outputs) if self.loss_fn.reduction == "sum" else value

    @torch.no_grad()
    def training_loss(self, model: nn.Module, chunk: int = 1000) -> float:
        """The loss on the training images that are `measured`, as a rule all."""
        total, inputs, targets = 0.0, self.inputs[: self.measured], self.targets[: self.measured]
        for x, y in zip(inputs.split(chunk), targets.split(chunk), strict=True):
            total += float(self.loss(model(x), y)) * len(x)
        return total / len(inputs)

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


def cnn_problem(data_dir: str | Path | None = None) -> Problem:
    """Classify the images with convolutions."""
    train, test = held_out(data_dir)
    return Problem(
        "cnn", nn.CrossEntropyLoss(), train.images, train.labels, test, 200, 200, "nats per image", measured=1000
    )


def resnet_problem(data_dir: str | Path | None = None) -> Problem:
    """Classify the images with convolutions, group norms and residual additions."""
    train, test = held_out(data_dir)
    return Problem(
        "resnet", nn.CrossEntropyLoss(), train.images, train.labels, test, 200, 200, "nats per image", measured=1000
    )


def gpt_problem(data_dir: str | Path | None = None, context: int = 64) -> Problem:
    """Predict the next character of Python's help topics; 250 random windows of the 4,000 are measured."""
    windows = text(4000 * context + 1)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    inputs, targets = (tokens.reshape(4000, context)[order] for tokens in (windows[:-1], windows[1:]))
    return Problem("gpt", nn.CrossEntropyLoss(), inputs, targets, None, 32, 500, "nats per character", measured=250)


MODELS = {"autoencoder": autoencoder, "mlp": mlp, "cnn": digits_cnn, "resnet": resnet, "gpt": gpt}
PROBLEMS = {
    "autoencoder": autoencoder_problem,
    "mlp": mlp_problem,
    "cnn": cnn_problem,
    "resnet": resnet_problem,
    "gpt": gpt_problem,
}
