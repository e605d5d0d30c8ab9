"""Random networks, losses and training loops, and one step of approx="full" against the dense solve by autograd.

A case is a seed. What it says of the step: "right", or the message of a refusal; anything else is an error.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchcurv import SecondOrderOptimizer

V, D, T = 3, 4, 3  # classes, features, tokens
LR, LAMBDA, TOLERANCE = 1.0, 0.3, 1e-6


# ------------------------------------------------------------------------------------------- networks


class Then(nn.Module):
    """A body, and what is done with its output."""

    def __init__(self, body: nn.Module, then: Any) -> None:
        super().__init__()
        self.body, self.then = body, then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.body(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, V)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.second(torch.tanh(self.first(x))))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice, self.head = nn.Linear(D, D), nn.Linear(D, V)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.body, self.head = kind(D, 3, batch_first=True), nn.Linear(3, V)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.MultiheadAttention(D, 2, batch_first=True), nn.Linear(D, V)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))


def _norm(module: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 4), module, nn.Tanh(), nn.Linear(4, V))


def _tokens() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, V))


# name: (model, shape of a sample, rows of the output per sample)
NETWORKS: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, V)), (D,), 1),
    "deep": (lambda: nn.Sequential(nn.Linear(D, 3), nn.SiLU(), nn.Linear(3, 3), nn.GELU(), nn.Linear(3, V)), (D,), 1),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8, V)),
        (2, 4),
        1,
    ),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, V)
        ),
        (1, 5, 5),
        1,
    ),
    "embedding": (
        lambda: nn.Sequential(Then(nn.Embedding(5, 3), lambda h: h.mean(1)), nn.Tanh(), nn.Linear(3, V)),
        (T,),
        1,
    ),
    "layer norm": (lambda: _norm(nn.LayerNorm(4)), (D,), 1),
    "batch norm, eval": (lambda: _norm(nn.BatchNorm1d(4)).eval(), (D,), 1),
    "residual": (Residual, (D,), 1),
    "shared": (Shared, (D,), 1),
    "gru": (lambda: Recurrent(nn.GRU), (T, D), 1),
    "rnn": (lambda: Recurrent(nn.RNN), (T, D), 1),
    "attention": (Attention, (T, D), 1),
    "flattened tokens": (lambda: Then(_tokens(), lambda f: f.reshape(-1, V)), (T, D), T),
    "permuted": (lambda: Then(_tokens(), lambda f: f.flip(0)), (D,), 1),
    "pooled tokens": (lambda: Then(_tokens(), lambda f: f.mean(1)), (T, D), 1),
}


# --------------------------------------------------------------------------------------------- losses


class Focal(nn.CrossEntropyLoss):
    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        p = f.softmax(-1).gather(-1, y[:, None]).squeeze(-1)
        return (-((1 - p) ** 2) * p.log()).mean()


def _labels(rows: int, g: torch.Generator) -> Tensor:
    return torch.randint(V, (rows,), generator=g)


def _real(rows: int, g: torch.Generator) -> Tensor:
    return torch.randn(rows, V, generator=g, dtype=torch.float64)


def _bits(rows: int, g: torch.Generator) -> Tensor:
    return torch.randint(2, (rows, V), generator=g).double()


def _soft(rows: int, g: torch.Generator) -> Tensor:
    return _real(rows, g).softmax(-1)


_WEIGHT = torch.tensor([0.4, 1.0, 2.5], dtype=torch.float64)
# name: (module, targets, the name that loss_fn= may have for it)
LOSSES: dict[str, tuple[Any, Any, str | None]] = {
    "ce": (nn.CrossEntropyLoss(), _labels, "cross_entropy"),
    "ce sum": (nn.CrossEntropyLoss(reduction="sum"), _labels, "cross_entropy"),
    "ce weights": (nn.CrossEntropyLoss(weight=_WEIGHT), _labels, None),
    "ce ignored": (nn.CrossEntropyLoss(ignore_index=1), _labels, None),
    "ce smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), _labels, None),
    "ce soft": (nn.CrossEntropyLoss(), _soft, None),
    "mse": (nn.MSELoss(), _real, "mse"),
    "mse sum": (nn.MSELoss(reduction="sum"), _real, None),
    "bce": (nn.BCEWithLogitsLoss(), _bits, "bce_with_logits"),
    "bce weights": (nn.BCEWithLogitsLoss(pos_weight=_WEIGHT), _bits, None),
    "huber": (nn.HuberLoss(delta=0.7), _real, None),
    "smooth l1": (nn.SmoothL1Loss(reduction="sum"), _real, None),
    "poisson": (nn.PoissonNLLLoss(), lambda rows, g: _real(rows, g).square(), None),
    "focal": (Focal(), _labels, None),
    "function": (F.huber_loss, _real, None),
}
FACTORS = [1.0, 1.0, 0.25, 10.0, 0.01, 65536.0]


# ---------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    network: str
    loss: str
    trigger: str  # module, name, observe
    batches: tuple[tuple[int, float], ...]  # samples and factor of each micro-batch
    looks: bool  # torch.autograd.grad before each backward
    twice: bool  # each backward is called twice
    restart: bool  # a batch before, whose gradients are zeroed


def case_of(seed: int) -> Case:
    draw = random.Random(seed)
    network, loss = draw.choice(list(NETWORKS)), draw.choice(list(LOSSES))
    named = LOSSES[loss][2] is not None
    trigger = draw.choice(["module", "module", "observe", *(["name"] * 2 if named else [])])
    batches = tuple((draw.randint(2, 4), draw.choice(FACTORS)) for _ in range(draw.choice([1, 1, 2, 3])))
    if trigger == "name" and loss == "mse":  # whose gradient says no factor
        batches = tuple((n, 1.0) for n, _ in batches)
    return Case(network, loss, trigger, batches, draw.random() < 0.3, draw.random() < 0.2, draw.random() < 0.3)


def outcome(seed: int) -> str:
    """ "right", or why the case is refused; raises AssertionError where the step is wrong."""
    case, g = case_of(seed), torch.Generator().manual_seed(seed)
    make, shape, rows = NETWORKS[case.network]
    loss, targets, name = LOSSES[case.loss]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().double()
    known = {"module": loss, "name": name, "observe": None}[case.trigger]
    extra = {"reduction": "sum"} if case.trigger == "name" and case.loss.endswith("sum") else {}
    optimizer = SecondOrderOptimizer(
        model, loss_fn=known, approx="full", samples=None, lr=LR, momentum=0.0, damping=LAMBDA, damping_type="exact",
        ema_decay=0.0, kl_clip=None, update_every=1, refactor_every=1, rows_limit=10**6, **extra,
    )  # fmt: skip
    called = optimizer.loss_fn if case.trigger == "module" else loss

    def batch(n: int) -> tuple[Tensor, Tensor]:
        if case.network == "embedding":
            return torch.randint(5, (n, *shape), generator=g), targets(n * rows, g)
        return torch.randn(n, *shape, generator=g, dtype=torch.float64), targets(n * rows, g)

    def backward(x: Tensor, y: Tensor, factor: float) -> None:
        f = model(x)
        if case.trigger == "observe":
            optimizer.observe(f, y, loss, factor)
        total = factor * called(f, y)
        if case.looks:
            torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
        total.backward(retain_graph=case.twice)
        if case.twice:
            total.backward()

    data = [(*batch(n), factor) for n, factor in case.batches]
    C, gradient = _truth(model, loss, data, 2 if case.twice else 1)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    try:
        if case.restart:
            backward(*batch(3), 1.0)
            optimizer.zero_grad()
        for x, y, factor in data:
            backward(x, y, factor)
        optimizer.step()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return str(error)
    finally:
        optimizer.remove()
    step = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = LR * torch.linalg.solve(C + LAMBDA * torch.eye(len(C), dtype=C.dtype), gradient)
    error = float((step - expected).norm() / expected.norm().clamp_min(1e-300))  # of no terms both are zero
    assert error <= TOLERANCE, f"seed {seed}: the step is off by {error:.2e} of its norm: {case}"
    return "right"


def _truth(model: nn.Module, loss: Any, data: list[Any], times: int) -> tuple[Tensor, Tensor]:
    """(J^T H J with the positive part of H, the gradient), added up over the micro-batches."""
    params, C, gradient = list(model.parameters()), 0.0, 0.0
    for x, y, factor in data:
        f = model(x)
        z = f.detach()
        J = torch.stack([_flat(torch.autograd.grad(one, params, retain_graph=True)) for one in f.flatten()])
        H = torch.autograd.functional.hessian(lambda v, s=z.shape, y=y: loss(v.reshape(s), y), z.flatten())
        values, Q = torch.linalg.eigh(H)
        C = C + times * factor * J.T @ (Q * values.clamp_min(0)) @ Q.T @ J
        gradient = gradient + times * _flat(torch.autograd.grad(factor * loss(model(x), y), params))
    assert isinstance(C, Tensor) and isinstance(gradient, Tensor)
    return C, gradient


def _flat(tensors: Any) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])
