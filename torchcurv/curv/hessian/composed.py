"""Several operations as one function of the tensors that they start from: its Jacobian, and H through it, exactly.

With F that function, J its Jacobian for one sample and g = dL/dF, H at a start is J^T H J + sum_k g_k d²F_k/dx². Rows
of J come from autograd, one product for each. Along a dimension that F keeps apart (samples, mostly also positions or
channels) one product serves all elements, and where J is the same for all of these, each can serve another row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.graph import Edge
from torchcurv.curv.hessian.local import Propagation, scaled_by
from torchcurv.curv.hessian.operation import Kept, Key, Op, key_of, unflattened
from torchcurv.curv.hessian.products import several_products

AT_ONCE = {"cpu": 1 << 16}  # elements of the products that are made at once; elsewhere 2^24
APART = 1e-9  # a map in double precision that mixes what lies apart by less than this part of it does not
ROUNDING = 1e-12  # what may be left of a map that is 0


class Composed:
    """steps: operations with the arguments that are followed, in the order of the forward pass; the last is F's."""

    def __init__(self, steps: Sequence[tuple[Op, list[int]]]) -> None:
        self.steps, self.head = steps, steps[-1][0]
        self.starts: dict[Key, Tensor] = {}
        self.made: dict[Key, Tensor] = {}
        with torch.enable_grad():
            for op, slots in steps:
                self.made[key_of(op.output)] = self._run(op, slots)
        self.out = self.made[key_of(self.head.output)]

    def _run(self, op: Op, slots: list[int]) -> Tensor:
        followed = {slot: self._argument(op, slot, len(slots) > 1) for slot in slots}
        if op.rule.copies:
            return followed[slots[0]]
        if op.slope is not None:
            return followed[slots[0]] * op.slope
        leaves = [followed[k] if k in followed else op.read(x, torch.float64) for k, x in enumerate(op.leaves)]
        args, kwargs = unflattened(leaves, op.spec)
        out: Any = op.func(*args, **kwargs)
        found: Tensor = out if op.part is None else out[op.part]
        return found

    def _argument(self, op: Op, slot: int, several: bool) -> Tensor:
        """A followed argument, with the value that it had where one matters."""
        edge, leaf = op.inputs[slot], op.leaves[slot]
        shape, device = (leaf.tensor.shape, leaf.tensor.device) if isinstance(leaf, Kept) else leaf
        x = self.made.get(key_of(edge))
        if x is None:
            zeros = torch.zeros(shape, dtype=torch.float64, device=device, requires_grad=True)
            x = self.starts.setdefault(key_of(edge), zeros)
        x = x.reshape(shape).to(device)
        if op.rule.values or (op.rule.operands and several):
            x = x + (op.read(leaf, torch.float64) - x).detach()
        return x.clone()  # it may be edited in place

    def slope(self, g: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """(sum_k g_k dF_k/dx as a function of x, for a g of order 1, and the scale of g); None where it is constant."""
        if g is None:
            return None
        scale = g.abs().amax().clamp_min(torch.finfo(g.dtype).tiny).double()
        v = self.like_out(g) / scale
        (slope,) = torch.autograd.grad(self.out, x, v, create_graph=True, materialize_grads=True)
        return (slope, scale) if slope.requires_grad else None

    def like_out(self, v: Tensor) -> Tensor:
        return v.reshape(self.out.shape).to(self.out.dtype)

    def gradient_inside(self, key: Key, g: Tensor) -> Tensor:
        """The part of dL/d(what an operation of these made) that comes through F."""
        return _product(self.out, self.made[key], self.like_out(g))

    # ------------------------------------------------------------------------------------------- diagonal

    def at(self, edge: Edge, H: Tensor, now: Propagation, most: float = math.inf) -> Tensor | None:
        """H at a start; None where the diagonal form takes more than `most` products."""
        g = now.gradients.get(key_of(self.head.output))
        return self.diagonal(edge, H, g, now, most) if now.diag else self.matrix(edge, H, g, now)

    def diagonal(self, edge: Edge, h: Tensor, g: Tensor | None, now: Propagation, most: float) -> Tensor | None:
        """The exact one for a diagonal h at the output."""
        x = self.starts[key_of(edge)]
        apart = _apart(self.out, x)
        if g is not None and _Blocks(self.out, apart).size > most:  # known before anything is differentiated twice
            return None
        slope = self.slope(g, x)
        if slope is not None:
            if _Blocks(x, apart).size > most:
                return None
            too = _apart(slope[0], x)
            apart = [d for d in apart if d in too]
        outer, inner = _Blocks(self.out, apart), _Blocks(x, apart)
        rows = _Rows(self.out, x, outer, inner)
        if rows.products + (0 if slope is None else inner.size) > most:
            return None
        h = outer.split(self.like_out(h))
        new = torch.zeros(inner.count, inner.size, dtype=h.dtype, device=h.device)
        for k, J in rows:
            new += h[:, k] @ J.square() if J.dim() == 2 else torch.einsum("bk,bkq->bq", h[:, k], J.square())
        if slope is not None:
            r = torch.empty_like(new)
            for some in inner.chunks():
                columns = several_products(slope[0], x, inner.units(some))
                for at, column in zip(some, columns, strict=True):
                    r[:, at] = inner.split(column)[:, at]
            new += now.second_order(r * slope[1])
        return inner.join(new)

    # --------------------------------------------------------------------------------------------- matrix

    def matrix(self, edge: Edge, H: Tensor, g: Tensor | None, now: Propagation) -> Tensor:
        """The mean over samples at a start, for the matrix H at the output."""
        x, n, H = self.starts[key_of(edge)], now.n, H.double()
        self._check_samples(n, x)
        slope = self.slope(g, x)
        if self._is_elementwise(x) and (slope is None or len(_apart(slope[0], x)) == x.dim()):
            ones = torch.ones_like(x)
            new = scaled_by(_product(self.out, x, ones), H, now)
            return new if slope is None else new + now.second_order(_product(slope[0], x, ones) * slope[1])
        new = self._congruent(H, x, now)
        if slope is None:
            return new
        inner = x.numel() // n
        units = (_unit(n, inner, k, H).reshape(x.shape) for k in range(inner))
        rows = (_product(slope[0], x, v).reshape(n, inner) for v in units)
        S = torch.stack([row.mean(0, keepdim=True) if now.of_means else row for row in rows], 1)
        return new + now.second_order_matrix(S * slope[1])

    def _is_elementwise(self, x: Tensor) -> bool:
        return x.shape == self.out.shape and len(_apart(self.out, x)) == x.dim()

    def _congruent(self, H: Tensor, x: Tensor, now: Propagation) -> Tensor:
        """mean_n J_n^T H J_n, or that of the mean of J_n."""
        n, outer, inner = now.n, self.out.numel() // now.n, x.numel() // now.n
        if len(x) == n == len(self.out):
            rows = _Rows(self.out, x, _Blocks(self.out, [0]), _Blocks(x, [0]))
            if rows.shared:
                J = torch.cat([some for _, some in rows])
                return J.T @ H @ J

        def pull(v: Tensor) -> Tensor:
            return _product(self.out, x, v.reshape(self.out.shape)).reshape(n, inner)

        if now.averaged:
            J = torch.stack([pull(_unit(n, outer, k, H)).mean(0) for k in range(outer)])
            return J.T @ H @ J
        new = H.new_zeros(inner, inner)
        for k in range(outer):
            new += pull(H[k].expand(n, outer)).T @ pull(_unit(n, outer, k, H)) / n
        return new

    def _check_samples(self, n: int, x: Tensor) -> None:
        if self.out.numel() % n or x.numel() % n:
            raise self.head.refused("it mixes samples")
        v, s = _random((n, self.out.numel() // n), x), _random((n, 1), x)
        alone, together = (_product(self.out, x, u.reshape(self.out.shape)).reshape(n, -1) for u in (v * s, v))
        if not _same(alone, together * s):
            raise self.head.refused('it mixes samples; approx="diag" can do that')


def _product(out: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """J^T v of out as a function of x."""
    return torch.autograd.grad(out, x, v, retain_graph=True, materialize_grads=True)[0]


def _unit(n: int, size: int, k: int, like: Tensor) -> Tensor:
    v = like.new_zeros(n, size)
    v[:, k] = 1
    return v


def _random(shape: Sequence[int], like: Tensor) -> Tensor:
    """The same each time, and without the global generator."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).add(math.pi).to(like.device)


def _same(a: Tensor, b: Tensor) -> bool:
    """Of products with vectors of order 1, in double precision."""
    return bool(((a - b).abs() <= APART * b.abs().amax() + ROUNDING).all())


def _apart(outer: Tensor, inner: Tensor) -> list[int]:
    """The dimensions along which J keeps elements apart: a random scale along one of them goes through."""
    v = _random(outer.shape, outer)
    pulled, found = _product(outer, inner, v), []
    for d, (a, b) in enumerate(zip(outer.shape, inner.shape, strict=False)):
        if a != b:
            continue
        s = _random([a if k == d else 1 for k in range(outer.dim())], outer)
        if _same(_product(outer, inner, v * s), pulled * s.reshape([a if k == d else 1 for k in range(inner.dim())])):
            found.append(d)
    return found


class _Blocks:
    """A tensor as [count, size]: dimensions that are kept apart come first."""

    def __init__(self, like: Tensor, apart: list[int]) -> None:
        self.like = like.detach()
        self.order = [*apart, *(d for d in range(like.dim()) if d not in apart)]
        self.moved = self.like.permute(self.order).shape
        self.count = math.prod(self.moved[: len(apart)])
        self.size = math.prod(self.moved[len(apart) :])

    def split(self, x: Tensor) -> Tensor:
        return x.permute(self.order).reshape(self.count, self.size)

    def join(self, x: Tensor) -> Tensor:
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return x.reshape(self.moved).permute(back)

    def chunks(self) -> Iterator[range]:
        """The elements of a block, as many at a time as products are made at once."""
        step = max(1, AT_ONCE.get(self.like.device.type, 1 << 24) // max(1, self.like.numel()))
        return (range(start, min(start + step, self.size)) for start in range(0, self.size, step))

    def units(self, k: range) -> Tensor:
        """For each of these elements, 1 there in every block."""
        return torch.stack([self.join(_unit(self.count, self.size, at, self.like)) for at in k])


class _Rows:
    """The rows of J by block: (their numbers, J [count, rows, q]), or [rows, q] where all blocks have the same."""

    def __init__(self, out: Tensor, x: Tensor, outer: _Blocks, inner: _Blocks) -> None:
        self.out, self.x, self.outer, self.inner = out, x, outer, inner
        v = _random((1, outer.size), outer.like).expand(outer.count, -1)
        found = inner.split(_product(out, x, outer.join(v)))
        self.shared = outer.count > 1 and _same(found, found[:1].expand_as(found))
        self.products = -(-outer.size // outer.count) if self.shared else outer.size

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        if not self.shared:
            for k in self.outer.chunks():
                rows = several_products(self.out, self.x, self.outer.units(k))
                yield slice(k.start, k.stop), torch.stack([self.inner.split(row) for row in rows], 1)
            return
        count, size = self.outer.count, self.outer.size
        for start in range(0, size, count):  # every block takes another row
            taken = min(count, size - start)
            v = self.outer.like.new_zeros(count, size)
            v[torch.arange(taken), start + torch.arange(taken)] = 1
            product = _product(self.out, self.x, self.outer.join(v))
            yield slice(start, start + taken), self.inner.split(product)[:taken]
