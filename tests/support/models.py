"""Complete small models, each the way its kind is usually written: float64, seeded, at most 1500 parameters.

Every `make_*` builds a fresh object and leaves the global random state alone. No parameter is at its default (norms do
not have weight 1 and bias 0, running statistics are not 0 and 1), and all models are in eval mode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import randn, seeded
from torch import Tensor, nn

CLASSES = 3
VOCABULARY = 7


class Case(NamedTuple):
    id: str
    make_model: Callable[[], nn.Module]
    make_inputs: Callable[[], Any]  # what the model is called with: a tensor, a tuple or a dict
    make_target: Callable[[], Tensor]
    loss: nn.Module
    output_fn: Callable[[Any], Tensor] | None = None
    norms: tuple[type[nn.Module], ...] = ()  # the modules to give approx="unit"


def output_of(case: Case, model: nn.Module, x: Any) -> Tensor:
    """The tensor that the loss is applied to."""
    output = model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
    return output if case.output_fn is None else case.output_fn(output)


def built(make: Callable[..., nn.Module], *args, warm: tuple[int, ...] | None = None) -> nn.Module:
    """make(*args) with every parameter moved; warm: the shape of the inputs that running statistics come from."""

    def build():
        model = make(*args).double()
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
            for k in range(10 if warm else 0):
                model(1.5 * randn(*warm, seed=10 + k) + 0.5)
        return model.eval()

    return seeded(build)


def integers(high: int, *shape: int, low: int = 0, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


# --- convolutional ------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), norm(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, padding=1, bias=False), norm(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), norm(out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), norm(4)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(BasicBlock(4, 4, 1, norm), BasicBlock(4, 6, 2, norm))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.norm(self.conv(x))))
        return self.head(self.pool(x).flatten(1))


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


class Separable(nn.Sequential):
    """Depthwise, then pointwise, each with its norm and activation."""

    def __init__(self, channels: int, out: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            activation(),
            nn.Conv2d(channels, out, 1, bias=False),
            nn.BatchNorm2d(out),
            activation(),
        )


def depthwise_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Hardswish()),
        *(Separable(4, 6, 1, nn.ReLU6), Separable(6, 8, 2, nn.Hardswish)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.0), nn.Linear(8, CLASSES)),
    )


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self.stage(1, 4), self.stage(4, 6, stride=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.merge = self.stage(8, 4)
        self.head = nn.Conv2d(4, CLASSES, 1)

    @staticmethod
    def stage(channels: int, out: int, stride: int = 1) -> nn.Module:
        conv = nn.Conv2d(channels, out, 3, stride, padding=1)
        return nn.Sequential(conv, nn.InstanceNorm2d(out, affine=True), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x)
        return self.head(self.merge(torch.cat([skip, self.up(self.down2(skip))], dim=1)))


# --- attention ----------------------------------------------------------------------------------------------


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ViTBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = mlp(width)
        self.scale1, self.scale2 = LayerScale(width), LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.scale1(self.attn(h, h, h, need_weights=False)[0])
        return x + self.scale2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    def __init__(self, width: int = 8, tokens: int = 5) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(ViTBlock(width), ViTBlock(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class CausalBlock(nn.Module):
    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = (h.view(n, t, self.heads, -1).transpose(1, 2) for h in self.qkv(self.norm1(x)).split(width, dim=2))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(h.transpose(1, 2).reshape(n, t, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, width: int = 8, positions: int = 6) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(positions, width)
        self.blocks = nn.Sequential(CausalBlock(width), CausalBlock(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        n, t = tokens.shape
        positions = torch.arange(t, device=tokens.device).expand(n, t)
        x = self.wte(tokens) + self.wpe(positions)
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)  # n v t


@dataclass
class Logits:
    logits: Tensor


class GPTWithLogits(GPT):
    def forward(self, tokens: Tensor) -> Logits:
        return Logits(super().forward(tokens))


class Encoder(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        options = {"dropout": 0.0, "batch_first": True}
        self.embed = nn.Linear(3, width)
        self.layers = nn.Sequential(
            nn.TransformerEncoderLayer(width, 2, 12, **options),
            nn.TransformerEncoderLayer(width, 2, 12, activation="gelu", norm_first=True, **options),
        )
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embed(x))).mean(1))


# --- the rest -----------------------------------------------------------------------------------------------


class LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 4, padding_idx=0)
        self.lstm = nn.LSTM(4, 4, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0].mean(1))


def autoencoder() -> nn.Module:
    encoder = nn.Sequential(nn.Linear(8, 6), nn.PReLU(), nn.Linear(6, 3), nn.Tanh())
    decoder = nn.Sequential(nn.Linear(3, 6), nn.PReLU(6), nn.Linear(6, 8))
    return nn.Sequential(encoder, decoder)


class GraphNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        for linear in (self.first, self.second):
            x = torch.relu(linear(adjacency @ x))
        return self.head(x.mean(1))


def graph() -> tuple[Tensor, Tensor]:
    """Features [n, nodes, f] and the adjacency [n, nodes, nodes] with loops, each row divided by its degree."""
    edges = integers(2, 3, 5, 5, seed=4)
    adjacency = ((edges + edges.mT + torch.eye(5)) > 0).double()
    return randn(3, 5, 3, seed=5), adjacency / adjacency.sum(-1, keepdim=True)


def padded(ignored: int, *lengths: int, seed: int) -> Tensor:
    """Tokens >= 1 [n, max length], with `ignored` where a sequence has ended."""
    tokens = integers(VOCABULARY, len(lengths), max(lengths), low=1, seed=seed)
    ended = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    return tokens.masked_fill(ended, ignored)


def classes(*shape: int) -> Callable[[], Tensor]:
    return lambda: integers(CLASSES, *shape, seed=3)


CE = nn.CrossEntropyLoss()
NEXT_TOKEN = nn.CrossEntropyLoss(ignore_index=-1)
IMAGES = (4, 2, 6, 6)

MODELS = [
    Case(
        "resnet_bn",
        lambda: built(ResNet, nn.BatchNorm2d, warm=IMAGES),
        lambda: randn(*IMAGES, seed=1),
        classes(4),
        CE,
        norms=(nn.BatchNorm2d,),
    ),
    Case(
        "resnet_gn",
        lambda: built(ResNet, group_norm),
        lambda: randn(*IMAGES, seed=1),
        classes(4),
        CE,
        norms=(nn.GroupNorm,),
    ),
    Case(
        "depthwise_cnn",
        lambda: built(depthwise_cnn, warm=IMAGES),
        lambda: randn(*IMAGES, seed=1),
        classes(4),
        CE,
        norms=(nn.BatchNorm2d,),
    ),
    Case(
        "unet",
        lambda: built(UNet),
        lambda: randn(3, 1, 4, 4, seed=1),
        classes(3, 4, 4),
        CE,
        norms=(nn.InstanceNorm2d,),
    ),
    Case("vit", lambda: built(ViT), lambda: randn(3, 1, 4, 4, seed=1), classes(3), CE, norms=(nn.LayerNorm,)),
    Case(
        "gpt",
        lambda: built(GPT),
        lambda: padded(0, 5, 3, 4, seed=1),
        lambda: padded(-1, 5, 3, 4, seed=2),
        NEXT_TOKEN,
        norms=(nn.LayerNorm,),
    ),
    Case(
        "gpt_logits",
        lambda: built(GPTWithLogits),
        lambda: {"tokens": padded(0, 4, 2, 3, seed=1)},
        lambda: padded(-1, 4, 2, 3, seed=2),
        NEXT_TOKEN,
        output_fn=lambda output: output.logits,
        norms=(nn.LayerNorm,),
    ),
    Case(
        "encoder",
        lambda: built(Encoder),
        lambda: randn(3, 4, 3, seed=1),
        classes(3),
        CE,
        norms=(nn.LayerNorm, nn.RMSNorm),
    ),
    Case("lstm", lambda: built(LSTMClassifier), lambda: padded(0, 5, 3, 4, seed=1), classes(3), CE),
    Case(
        "autoencoder",
        lambda: built(autoencoder),
        lambda: (3 * randn(4, 8, seed=1)).sigmoid(),
        lambda: (3 * randn(4, 8, seed=1)).sigmoid(),
        nn.BCEWithLogitsLoss(),
    ),
    Case("graph", lambda: built(GraphNet), graph, lambda: randn(3, 2, seed=3), nn.MSELoss()),
]
