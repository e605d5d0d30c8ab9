"""More random cases of differential.py: other networks, losses of several terms, and loops that real programs have.

A case is a set of features, each drawn alone, so that a fault is found by the feature it needs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from differential import LAMBDA, LOSSES, LR, NETWORKS, TOLERANCE, D, Residual, T, Then, V, _flat
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchcurv import SecondOrderOptimizer


class Positions(nn.Module):
    """Tokens and positions, as in a small language model, with a head that is tied or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.token, self.place, self.head = nn.Embedding(V, D), nn.Embedding(T, D), nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(T).expand(len(x), T)  # one row of positions for each sample
        return self.head(torch.tanh(self.token(x) + self.place(places))).flatten(0, 1)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(D, 4), nn.Tanh()), nn.Linear(4, V)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Gated(nn.Module):
    """A product of two branches, joined with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(D, 3), nn.Linear(D, 3, bias=False), nn.Linear(3 + D, V)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([torch.sigmoid(self.one(x)) * self.two(x), x], -1))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(D, 2, batch_first=True), nn.Linear(2, V)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0]).reshape(-1, V)


def _convolution(*layers: nn.Module, flat: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(flat, V))


def _frozen(layer: int, name: str) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, V))
    getattr(model[layer], name).requires_grad_(False)
    return model


WIDE: dict[str, tuple[Any, tuple[int, ...], int]] = {
    **{name: NETWORKS[name] for name in ("mlp", "flattened tokens", "permuted", "shared")},
    "positions": (lambda: Positions(False), (T,), T),
    "tied": (lambda: Positions(True), (T,), T),
    "checkpointed": (Checkpointed, (D,), 1),
    "gated": (Gated, (D,), 1),
    "lstm, every step": (Lstm, (T, D), T),
    "depthwise": (lambda: _convolution(nn.Conv1d(2, 4, 2, groups=2, dilation=2), flat=8), (2, 4), 1),
    "transposed": (lambda: _convolution(nn.ConvTranspose1d(2, 2, 2, stride=2), flat=8), (2, 2), 1),
    "group norm": (lambda: _convolution(nn.Conv1d(2, 4, 1), nn.GroupNorm(2, 4), flat=8), (2, 2), 1),
    "frozen weight": (lambda: _frozen(2, "weight"), (D,), 1),
    "frozen bias": (lambda: _frozen(0, "bias"), (D,), 1),
    "frozen head": (lambda: _frozen(4, "weight"), (D,), 1),
    "time first": (lambda: Then(NETWORKS["flattened tokens"][0]().body, lambda f: f.transpose(0, 1).reshape(-1, V)),
                   (T, D), T),
    "two views": (lambda: Then(NETWORKS["mlp"][0](), lambda f: 0.5 * (f + f.detach())), (D,), 1),
    "prelu": (lambda: nn.Sequential(nn.Linear(D, 3), nn.PReLU(3), nn.Linear(3, V)), (D,), 1),
    "residual, scaled": (lambda: Then(Residual(), lambda f: 30.0 * f), (D,), 1),  # saturated outputs
}  # fmt: skip


def _gaussian(f: Tensor, y: Tensor) -> Tensor:
    """A mean and a variance of one real target per row."""
    return F.gaussian_nll_loss(f[:, :1], y[:, :1], F.softplus(f[:, 1:2]) + 0.1)


def _distil(f: Tensor, y: Tensor) -> Tensor:
    return 4.0 * F.kl_div(F.log_softmax(f / 2, -1), F.softmax(y / 2, -1), reduction="batchmean")


def _mixed(f: Tensor, y: Tensor) -> Tensor:
    """A cross entropy and a squared error in one function."""
    return F.cross_entropy(f, y.argmax(-1)) + 0.3 * F.mse_loss(f, y)


def _margin(f: Tensor, y: Tensor) -> Tensor:
    return F.softplus(1.0 - f * (2.0 * (y > 0) - 1.0)).sum(-1).mean()


_real = LOSSES["mse"][1]
WIDE_LOSSES: dict[str, tuple[Any, Any, str | None]] = {
    **{name: LOSSES[name] for name in ("ce", "ce sum", "ce ignored", "ce weights", "mse", "bce", "bce weights")},
    "gaussian": (_gaussian, _real, None),
    "distillation": (_distil, _real, None),
    "mixed": (_mixed, _real, None),
    "margin": (_margin, _real, None),
    "huber": (nn.HuberLoss(reduction="sum"), _real, None),
    "kl": (lambda f, y: F.kl_div(f.log_softmax(-1), y.softmax(-1), reduction="batchmean"), _real, None),
    "exponential": (lambda f, y: (f.exp() - y * f).sum(-1).mean(), _real, None),
}
FACTORS = (1.0, 1.0, 0.25, 10.0, 0.01, 65536.0, 1e-6)
# How the micro-batches of a step meet their backward calls.
LOOPS = ("one by one", "forwards first", "sum", "list")
EPS = 2.0**-52


@dataclass(frozen=True)
class WideCase:
    network: str
    loss: str
    trigger: str
    loop: str
    batches: tuple[tuple[int, float], ...]
    between: bool  # an evaluation without gradients between forward and backward
    penalty: bool  # a term of the parameters in the loss
    second: bool  # a second loss of the same output, by observe
    rows: bool  # approx="full" by rows
    negative: bool  # the factor is negative, and negative="abs"


# What is left out of the draws until it is mended or because nothing can be said of it; remove a row to draw it again.
KNOWN: dict[str, tuple[Any, str]] = {
    "negative, by name": (
        lambda c: c.negative and c.trigger == "name" and c.loss == "mse",
        "nothing tells the factor of squared errors",
    ),
    "no precision left": (
        lambda c: c.network == "residual, scaled" and c.loss == "exponential",
        "curvature above 1e12 λ: float64 cannot say what is right",
    ),
}


def known(seed: int) -> str | None:
    """Why a case is left out."""
    return next((why for holds, why in KNOWN.values() if holds(wide_case(seed))), None)


def wide_case(seed: int) -> WideCase:
    draw = random.Random(seed)
    network, loss = draw.choice(list(WIDE)), draw.choice(list(WIDE_LOSSES))
    named = WIDE_LOSSES[loss][2] is not None
    trigger = draw.choice(["module", "module", "observe", *(["name"] * 2 if named else [])])
    batches = tuple((draw.randint(1, 4), draw.choice(FACTORS)) for _ in range(draw.choice([1, 1, 2, 3])))
    loop = draw.choice(LOOPS)
    if trigger == "name":  # a name knows one output for each backward; nothing tells the factor of squared errors
        loop = LOOPS[0]
        batches = tuple((n, 1.0 if loss == "mse" else factor) for n, factor in batches)
    flags = [draw.random() < p for p in (0.25, 0.2, 0.2, 0.2, 0.15)]
    second = flags[2] and trigger == "observe"
    return WideCase(network, loss, trigger, loop, batches, *flags[:2], second, flags[3], flags[4])


def _optimizer(case: WideCase, model: nn.Module) -> SecondOrderOptimizer:
    loss, _, name = WIDE_LOSSES[case.loss]
    return SecondOrderOptimizer(
        model, loss_fn={"module": loss, "name": name, "observe": None}[case.trigger], approx="full", samples=None,
        lr=LR, momentum=0.0, damping=LAMBDA, damping_type="exact", ema_decay=0.0, kl_clip=None, update_every=1,
        refactor_every=1, rows_limit=4 if case.rows else 10**6, negative="abs" if case.negative else "error",
        **({"reduction": "sum"} if case.trigger == "name" and case.loss.endswith("sum") else {}),
    )  # fmt: skip


def wide_outcome(seed: int) -> str:
    """ "right", or why the case is refused; raises AssertionError where the step is wrong."""
    case, g = wide_case(seed), torch.Generator().manual_seed(seed)
    make, shape, rows = WIDE[case.network]
    loss, targets, _ = WIDE_LOSSES[case.loss]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().double()
    optimizer = _optimizer(case, model)
    called = optimizer.loss_fn if case.trigger == "module" else loss
    params, data = [p for p in model.parameters() if p.requires_grad], []
    for n, factor in case.batches:
        whole = case.network in ("positions", "tied")
        x = torch.randint(V, (n, *shape), generator=g) if whole else _real_of((n, *shape), g)
        data.append((x, targets(n * rows, g), -factor if case.negative else factor))

    def forward(x: Tensor, y: Tensor, factor: float) -> Tensor:
        f = model(x)
        if case.trigger == "observe":
            optimizer.observe(f, y, loss, factor)
        total = factor * called(f, y)
        if case.second:
            optimizer.observe(f, f.detach() + 1.0, "mse", 0.5)
            total = total + 0.5 * F.mse_loss(f, f.detach() + 1.0)
        if case.penalty:
            total = total + 0.1 * sum(p.square().sum() for p in params)
        if case.between:
            with torch.no_grad():
                model(x[:1])
        return total

    C, gradient = _truth(model, params, loss, data, case)
    before = _flat([p.detach() for p in params])
    try:
        _run(case.loop, forward, data)
        optimizer.step()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return str(error)
    finally:
        optimizer.remove()
    step = before - _flat([p.detach() for p in params])
    expected = LR * torch.linalg.solve(C + LAMBDA * torch.eye(len(C), dtype=C.dtype), gradient)
    if case.loss == "ce ignored" and not C.any():  # nothing is measured: the gradient, of length 1 at most
        expected = LR * gradient / gradient.norm().clamp_min(1)
    # A step far shorter than the parameters is known to the rounding of their difference only.
    rounding = EPS * before.norm()
    error = float(((step - expected).norm() - rounding) / expected.norm().clamp_min(1e-300))
    unknown = 4 * EPS * float(torch.linalg.eigvalsh(C)[-1]) / LAMBDA  # what rounding C alone does to the truth
    assert error <= TOLERANCE + unknown, f"seed {seed}: the step is off by {error:.2e} of its norm: {case}"
    return "right"


def _real_of(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _run(loop: str, forward: Any, data: list[Any]) -> None:
    if loop == "one by one":
        for batch in data:
            forward(*batch).backward()
        return
    totals = [forward(*batch) for batch in data]
    if loop == "sum":
        torch.stack(totals).sum().backward()
    elif loop == "list":
        torch.autograd.backward(totals)
    else:
        for total in reversed(totals):
            total.backward()


def _truth(model: nn.Module, params: list[Tensor], loss: Any, data: list[Any], case: WideCase) -> tuple[Tensor, Tensor]:
    """(J^T H J with the positive part of H times the factor's absolute value, the gradient), added up."""
    size = sum(p.numel() for p in params)
    C, gradient = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for x, y, factor in data:
        f = model(x)
        z = f.detach()
        J = torch.stack([_flat(_grads(one, params)) for one in f.flatten()])
        H = torch.autograd.functional.hessian(lambda v, s=z.shape, y=y: loss(v.reshape(s), y), z.flatten())
        values, Q = torch.linalg.eigh(0.5 * (H + H.T))
        C = C + abs(factor) * J.T @ (Q * values.clamp_min(0)) @ Q.T @ J
        total = factor * loss(f, y)
        if case.second:
            C = C + 0.5 * (2.0 / z.numel()) * J.T @ J
            total = total + 0.5 * F.mse_loss(f, z + 1.0)
        if case.penalty:
            total = total + 0.1 * sum(p.square().sum() for p in params)
        gradient = gradient + _flat(_grads(total, params))
    return C, gradient


def _grads(value: Tensor, params: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]
