"""Models as torch's own tutorials write them train with nothing but the model and the loss."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchcurv import SecondOrderOptimizer

V = 7
CE = nn.CrossEntropyLoss()


class WordModel(nn.Module):
    """A Transformer with time first, and learnt positions."""

    def __init__(self):
        super().__init__()
        self.embedding, self.place = nn.Embedding(V, 8), nn.Parameter(0.1 * torch.randn(10, 1, 8))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0), 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, V)

    def forward(self, x):
        h = self.embedding(x) * math.sqrt(8) + self.place[: len(x)]
        return self.head(self.encoder(h)).view(-1, V)


class Translation(nn.Module):
    """nn.Transformer at its defaults."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, 8), nn.Linear(8, V)
        self.body = transformer()

    def forward(self, pair):
        source, target = pair
        return self.head(self.body(self.embedding(source), self.embedding(target))).reshape(-1, V)


def transformer():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0), 1, enable_nested_tensor=False)
    return nn.Transformer(8, 2, 1, 1, 12, 0.0, custom_encoder=encoder)


class Detection(nn.Module):
    """DETR's demo: learnt queries and positions, the batch second, two heads."""

    def __init__(self):
        super().__init__()
        self.conv, self.body = nn.Conv2d(1, 8, 2, 2), transformer()
        self.queries, self.rows = nn.Parameter(torch.rand(5, 8)), nn.Parameter(torch.rand(4, 8))
        self.classes, self.boxes = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x):
        h = self.conv(x)
        places = (self.rows.unsqueeze(1) + self.rows.unsqueeze(0)).flatten(0, 1).unsqueeze(1)
        queries = self.queries.unsqueeze(1).repeat(1, len(x), 1)
        h = self.body(places + 0.1 * h.flatten(2).permute(2, 0, 1), queries).transpose(0, 1)
        return {"logits": self.classes(h), "boxes": self.boxes(h).sigmoid()}


def of_detection(output, target):
    labels, boxes = target["labels"].flatten(), target["boxes"]
    return F.cross_entropy(output["logits"].flatten(0, 1), labels) + 5 * F.smooth_l1_loss(output["boxes"], boxes)


class CharacterRNN(nn.Module):
    """Cells in a loop over the characters of one name."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(V + 6, 6), nn.Linear(V + 6, 3)

    def forward(self, x):
        h = torch.zeros(1, 6)
        for one in x:
            joined = torch.cat((one, h), 1)
            h, out = self.hidden(joined).tanh(), self.out(joined)
        return out.log_softmax(1)


class Tagger(nn.Module):
    """Tags of the words of one sentence, which are the terms of its loss."""

    def __init__(self):
        super().__init__()
        self.embedding, self.lstm, self.out = nn.Embedding(V, 4), nn.LSTM(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h, _ = self.lstm(self.embedding(x).view(len(x), 1, -1))
        return self.out(h.view(len(x), -1)).log_softmax(1)


class Autoencoder(nn.Module):
    """A variational one; its draws are the same in each pass."""

    def __init__(self):
        super().__init__()
        self.body, self.mean, self.spread, self.decoder = (nn.Linear(*s) for s in ((6, 5), (5, 2), (5, 2), (2, 6)))

    def forward(self, x):
        h = self.body(x).relu()
        mean, spread = self.mean(h), self.spread(h)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
        return self.decoder(mean + noise * (0.5 * spread).exp()), mean, spread


def of_autoencoder(output, x):
    logits, mean, spread = output
    divergence = -0.5 * (1 + spread - mean.square() - spread.exp()).sum()
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") + divergence


class SpatialTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.place, self.affine = nn.Linear(64, 4), nn.Linear(4, 6)
        self.conv, self.out = nn.Conv2d(1, 3, 3), nn.Linear(108, 3)
        self.affine.weight.data.zero_()
        self.affine.bias.data.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]))

    def forward(self, x):
        theta = self.affine(self.place(x.flatten(1)).relu()).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, x.size(), align_corners=False), align_corners=False)
        return self.out(self.conv(x).relu().flatten(1))


class Siamese(nn.Module):
    """Whether two inputs are alike, as a probability."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), nn.Linear(8, 1)

    def forward(self, pair):
        return self.head(torch.cat([self.body(x) for x in pair], 1)).sigmoid().squeeze(1)


def real(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def whole(n, *shape):
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(sum(shape)))


def super_resolution():
    layers = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.PixelShuffle(2))
    return nn.Sequential(*layers)


TUTORIALS = {
    "word language model": (WordModel, CE, whole(V, 5, 3), whole(V, 15)),
    "translation": (Translation, CE, (whole(V, 5, 3), whole(V, 4, 3)), whole(V, 12)),
    "detection": (
        Detection,
        of_detection,
        real(3, 1, 8, 8),
        {"labels": whole(3, 3, 5), "boxes": real(3, 5, 4).sigmoid()},
    ),
    "names by characters": (CharacterRNN, nn.NLLLoss(), real(4, 1, V), whole(3, 1)),
    "tagger": (Tagger, nn.NLLLoss(), whole(V, 6), whole(3, 6)),
    "variational autoencoder": (Autoencoder, of_autoencoder, real(4, 6).sigmoid(), real(4, 6).sigmoid()),
    "spatial transformer": (SpatialTransformer, CE, real(4, 1, 8, 8), whole(3, 4)),
    "super-resolution": (super_resolution, nn.MSELoss(), real(3, 1, 4, 4), real(3, 1, 8, 8)),
    "siamese": (Siamese, nn.BCELoss(), (real(4, 6), real(4, 6) + 1), (real(4) > 0).float()),
}


def made(name):
    make, loss, x, y = TUTORIALS[name]
    torch.manual_seed(0)
    return make(), loss, x, y


@pytest.mark.parametrize("name", TUTORIALS)
def test_it_trains_untouched(name):
    model, loss, x, y = made(name)
    optimizer, losses = SecondOrderOptimizer(model, loss_fn=loss), []
    for _ in range(12):
        optimizer.zero_grad()
        value = optimizer.loss_fn(model(x), y)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] and optimizer.coverage() == 1.0


@pytest.mark.parametrize("name", ["word language model", "translation", "tagger", "spatial transformer"])
def test_the_diagonal_is_exact(name):
    """diag(J^T H J) over all rows, in float64."""
    model, loss, x, y = made(name)
    model, x = model.double(), x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
    optimizer = SecondOrderOptimizer(
        model, loss_fn=loss, approx="diag", samples=None, ema_decay=0.0, lr=0.0, update_every=1, refactor_every=1
    )
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.loss_fn(model(x), y).backward()
        optimizer.step()
    f, params = model(x), list(model.parameters())
    expected = {p: torch.zeros_like(p) for p in params}
    for row in f:
        p = row.detach().softmax(-1)
        for column in (p.diag().sqrt() - p[:, None] * p.sqrt()[None]).T:
            grads = torch.autograd.grad(row, params, column, retain_graph=True, materialize_grads=True)
            for q, g in zip(params, grads, strict=True):
                expected[q] += g.square() / len(f)
    for block in optimizer.blocks.values():
        parts = block.layout.split(block.layout.unflatten(block.factor.diag()))
        for piece, part in zip(block.pieces, parts, strict=True):
            truth = piece.of(expected[piece.param])
            assert (part - truth).norm() <= 1e-9 * truth.norm() + 1e-12, block.name
