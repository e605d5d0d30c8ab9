"""One step of a propagation: a function as one of its arguments sees it, and the maps that rules are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchcurv.curv.hessian.operation import Blank, Kept, Key, Op, key_of, unflattened
from torchcurv.curv.options import allow

RESIDUALS: dict[str, Callable[[Tensor], Tensor]] = {
    "keep": lambda r: r,  # the Hessian
    "zero": torch.zeros_like,  # Gauss-Newton
    "abs": torch.abs,
    "clip": lambda r: r.clamp(min=0),
}
allow("residual", RESIDUALS)


def through(node: Any, v: Tensor) -> Tensor:
    """J^T v by a node of the graph itself, without hooks."""
    with torch.no_grad():
        pulled = node(v)
        return pulled[0] if isinstance(pulled, tuple) else pulled


@dataclass(frozen=True)
class Treatment:
    """What the options say of a propagation; the next three are about the matrix form.

    residual: what becomes of second derivatives, a name in RESIDUALS. residual_over: whether that acts on those of
    each "sample" or on their mean over the "batch". averaging: mean J_n^T H J_n over the "sample"s, or for "batch"
    (mean J_n)^T H (mean J_n). max_dim: the largest d of a matrix [d, d]. max_products: the most of a chain, in the
    diagonal form.
    """

    residual: str = "keep"
    residual_over: str = "sample"
    averaging: str = "sample"
    max_dim: int = 2048
    max_products: int = 64


EXACT = Treatment()


@dataclass
class Propagation:
    """What one propagation is about. n: samples, for the matrix form. gradients: dL/d(output) where rules read it."""

    form: str
    n: int
    how: Treatment
    gradients: dict[Key, Tensor] = field(default_factory=dict)

    @property
    def diag(self) -> bool:
        return self.form == "diag"

    @property
    def averaged(self) -> bool:
        """Whether it is Jacobians that are averaged over samples."""
        return self.how.averaging == "batch"

    @property
    def of_means(self) -> bool:
        """Whether the mean of second derivatives is all that is asked of them."""
        return self.how.residual == "keep" or self.how.residual_over == "batch"

    def second_order_matrix(self, S: Tensor) -> Tensor:
        """The mean of second derivatives S [n, d, d] that are no diagonals: the map acts on their eigenvalues."""
        S = S.mean(0, keepdim=True) if self.of_means else S
        if self.how.residual != "keep":
            values, vectors = torch.linalg.eigh(S)
            S = vectors @ (RESIDUALS[self.how.residual](values).unsqueeze(-1) * vectors.mT)
        return S.mean(0)

    def second_order(self, r: Tensor) -> Tensor:
        """What the second derivatives r of all samples [n, ...] add: for each sample, or in the matrix form a mean."""
        act = RESIDUALS[self.how.residual]
        if self.diag:
            return act(r)
        r = r.reshape(self.n, -1)
        return (act(r.mean(0)) if self.how.residual_over == "batch" else act(r).mean(0)).diag()


class Local:
    """A function as one of its arguments sees it, at the values of the forward pass: J^T v and J t.

    squared: with every other floating argument squared. For a product with a weight that is J∘J.
    """

    def __init__(self, op: Op, slot: int, dtype: torch.dtype, squared: bool = False) -> None:
        def argument(k: int, leaf: Any) -> Any:
            if k == slot:
                return self.x.clone()  # it may be edited in place
            leaf = op.read(leaf, dtype)
            return leaf.square() if squared and isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        x = op.leaves[slot]
        if isinstance(x, Kept) and not op.rule.values:  # it may have been edited since
            x = Blank(x.tensor.shape, x.tensor.device)
        with torch.enable_grad():
            self.x = op.read(x, dtype).detach().requires_grad_()
            leaves = [argument(k, leaf) for k, leaf in enumerate(op.leaves)]
            args, kwargs = unflattened(leaves, op.spec)
            out = op.func(*args, **kwargs)
        self.out: Tensor = out if op.part is None else out[op.part]

    def pull(self, v: Tensor) -> Tensor:
        """J^T v, shaped like the argument."""
        v = v.reshape(self.out.shape).to(self.out.dtype)
        return torch.autograd.grad(self.out, self.x, v, retain_graph=True, materialize_grads=True)[0]

    def push(self, t: Tensor) -> Tensor:
        """J t, shaped like the output: the transpose of the pull."""
        with torch.enable_grad():
            v = torch.zeros_like(self.out, requires_grad=True)
            pulled = torch.autograd.grad(self.out, self.x, v, create_graph=True, materialize_grads=True)[0]
        if not pulled.requires_grad:
            return torch.zeros_like(self.out)
        return torch.autograd.grad(pulled, v, t, materialize_grads=True)[0]


def one_entry(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
    """Each row of J has at most one entry c: J = diag(c) S, S a selection. H -> S^T (c c^T ∘ H) S."""
    if now.diag:
        local = Local(op, slot, H.dtype)
        return local.pull(local.push(torch.ones_like(local.x)) * H)
    local = Local(op, slot, torch.float64)  # the positions that S reads must come out as integers
    c = local.push(torch.ones_like(local.x))
    positions = torch.arange(local.x.numel(), dtype=c.dtype, device=c.device).reshape(local.x.shape)
    source = torch.where(c == 0, 0, local.push(positions) / c).round().long()
    source, c = (_by_sample(op, x, now.n) for x in (source, c.to(H.dtype)))
    size = local.x.numel() // now.n
    first = torch.arange(now.n, device=c.device)[:, None] * size
    source = torch.where(c == 0, 0, source - first)
    if (source < 0).any() or (source >= size).any() or local.x.numel() % now.n:
        raise op.refused('it moves dimension 0, or mixes samples; approx="diag" can do that')
    if (source == source[:1]).all():
        return _selected(H * _mean_outer(c, now), source[0], size)
    if now.averaged:
        J = H.new_zeros(len(H), size)
        for row, at in zip(c, source, strict=True):
            J[torch.arange(len(H), device=H.device), at] += row / now.n
        return J.T @ H @ J
    terms = (_selected(H * torch.outer(row, row) / now.n, at, size) for row, at in zip(c, source, strict=True))
    return sum(terms, H.new_zeros(size, size))


def _selected(H: Tensor, source: Tensor, size: int) -> Tensor:
    """S^T H S, where row k of S has its 1 at source[k]. Elements that are read twice add up."""
    columns = H.new_zeros(len(H), size).index_add_(1, source, H)
    return H.new_zeros(size, size).index_add_(0, source, columns)


def _by_sample(op: Op, x: Tensor, n: int) -> Tensor:
    if x.numel() % n:
        raise op.refused("it mixes samples")
    return x.reshape(n, -1)


def _mean_outer(c: Tensor, now: Propagation) -> Tensor:
    """mean_n c_n c_n^T for c [n, d], or the product of the means."""
    if now.averaged:
        c = c.mean(0, keepdim=True)
    return c.T @ c / len(c)


def scaled_by(c: Tensor, H: Tensor, now: Propagation) -> Tensor:
    """D H D per sample, D = diag(c), and the mean over samples in the matrix form."""
    if now.diag:
        return c.square() * H
    return H * _mean_outer(c.reshape(now.n, -1), now)


def congruent(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
    """M^T H M for a linear map M that all samples share: M^T of H's columns, n of them at a time, then of its rows."""
    local, n = Local(op, slot, H.dtype), now.n

    def pull(v: Tensor) -> Tensor:
        return _by_sample(op, local.pull(v), n)

    probe = torch.linspace(1, 2, len(H), dtype=H.dtype, device=H.device).expand(_by_sample(op, local.out, n).shape)
    alone, together = pull(torch.cat([probe[:1], torch.zeros_like(probe[1:])])), pull(probe)
    wrong = torch.cat([alone[1:], together - alone[:1]])
    # A map that mixes samples is off by about itself, float32 rounds to 1e-6: a thousandth is far from both.
    if (wrong.abs() > 1e-3 * together.abs().amax()).any():
        raise op.refused('its map mixes samples, or differs between them; approx="diag" can do that')

    def transposed(rows: Tensor) -> Tensor:
        padded = F.pad(rows, (0, 0, 0, -len(rows) % n))
        return torch.cat([pull(some) for some in padded.split(n)])[: len(rows)]

    return transposed(transposed(H).T.contiguous())


def with_residual(op: Op, H: Tensor, second: Callable[[Tensor], Tensor], now: Propagation) -> Tensor:
    """H + diag(residual(second(dL/d(out))))."""
    g = now.gradients.get(key_of(op.output))
    return H if g is None else H + now.second_order(second(g.reshape(op.shape).to(H.dtype)))
