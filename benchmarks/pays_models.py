"""The networks of benchmarks/pays.py that benchmarks/problems.py does not have: small, as practitioners build them.

Weights are torch's own defaults but where a docstring says otherwise, drawn from the seed alone.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.problems import CausalBlock, as_images, dense, initialise


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """What make() builds with torch's generator at `seed`; the generator is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def cnn(classes: int = 10) -> nn.Module:
    """3x3 convolutions 1-16, 16-32/2, 32-32/2, each with batch norm and ReLU, average pool, Linear 32-classes."""
    layers: list[nn.Module] = [as_images(784), nn.AvgPool2d(2)]
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))


class Residual(nn.Module):
    """ReLU of x plus two 3x3 convolutions of it with batch norms; x goes through a 1x1 convolution at stride 2."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.first_norm, self.second_norm = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first_norm(self.first(x)).relu()
        return (self.shortcut(x) + self.second_norm(self.second(inner))).relu()


def resnet() -> nn.Module:
    """Halved images, 3x3 convolution 1-16, residual blocks 16-16, 16-32/2, 32-32, average pool, Linear 32-10."""
    return nn.Sequential(
        as_images(784), nn.AvgPool2d(2), nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    )  # fmt: skip


class Rows(nn.Module):
    """An image row by row through an LSTM of width 64; its last state gives the class."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(14, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        halved = F.avg_pool2d(x.unflatten(1, (1, 28, 28)), 2).squeeze(1)
        return self.head(self.lstm(halved)[0][:, -1])


class ViT(nn.Module):
    """8 by 8 images as 16 patches of 2 by 2, three pre-norm encoder layers of width 48, the mean token's class."""

    def __init__(self, width: int = 48, layers: int = 3) -> None:
        super().__init__()
        self.patch = nn.Linear(4, width)
        self.place = nn.Parameter(0.02 * torch.randn(16, width))
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
                for _ in range(layers)
            )
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        return self.head(self.norm(self.layers(self.patch(patches) + self.place)).mean(1))


class ByteGPT(nn.Module):
    """Bytes [N, T] to logits of the next ones [N, 256, T]: two blocks of width 64 with two heads."""

    def __init__(self, context: int = 64, width: int = 64) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(CausalBlock(width, 2), CausalBlock(width, 2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1]).expand(tokens.shape)
        x = self.tokens(tokens) + self.positions(places)
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


def byte_gpt(seed: int) -> nn.Module:
    """Glorot weights, embeddings of standard deviation 0.02."""
    return initialise(ByteGPT(), seed, "tanh")


def deep(seed: int, depth: int = 12) -> nn.Module:
    """784-64-...-64-10 of `depth` linear layers with tanh and Glorot weights, no norm, no shortcut."""
    return initialise(dense((784, *[64] * (depth - 1), 10), nn.Tanh), seed, "tanh")


def autoencoder(seed: int) -> nn.Module:
    """784-250-100-20-100-250-784 with tanh and a linear code, Glorot weights."""
    return initialise(dense((784, 250, 100, 20, 100, 250, 784), nn.Tanh, linear=2), seed, "tanh")
