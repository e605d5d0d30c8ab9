"""Second derivatives by autograd: products of the curvature of one loss with vectors over the parameters.

    H v = J^T (H_L (J v)) + sum_k (dL/df_k) (d²f_k/dθ²) v,    f the output, J = df/dθ

The Gauss-Newton matrix is the first term, the empirical Fisher the same with another matrix in the middle. Both
terms follow from the gradient J^T u as a function of u and θ, without the loss itself in the graph: its derivative
along v with respect to u is J v, with respect to θ it is the second term at u = dL/df.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torchcurv.curv.graph import Edge
from torchcurv.curv.losses.loss import Loss
from torchcurv.curv.losses.terms import Terms
from torchcurv.curv.numerics import at_least_float32

CHUNK = 1 << 24  # elements of the vectors that are multiplied at once


class OutputLoss:
    """Derivatives of `factor` times the loss whose terms are `terms`, with respect to the output f.

    f, f_edge: the output that the loss is applied to, and where its gradient arrives. n: the batch size.
    """

    def __init__(self, loss: Loss, terms: Terms, n: int, f: Tensor, f_edge: Edge, factor: Tensor | float) -> None:
        self.loss, self.terms, self.n, self.f, self.f_edge = loss, terms, n, f, f_edge
        root = terms.root_weights
        self.weights = factor * terms.reduction * (1.0 if root is None else root.square())

    def canonical(self, v: Tensor) -> Tensor:
        """v like the edge of f -> [n, t, c], in float32 or better."""
        return at_least_float32(self.loss.layout(v.reshape(self.f.shape), self.n)[0])

    def restored(self, canonical: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[n, t, c] -> where the gradient of f arrives."""
        return (
            self.loss.layout(self.f, self.n)[1](canonical)
            .to(dtype or self.f.dtype)
            .reshape(self.f_edge.shape)
            .contiguous()
        )

    def gradient(self) -> Tensor:
        """dL/df."""
        return self.restored(self.terms.gradient() * self.weights)

    def gradients_at(self, edges: list[Edge]) -> list[Tensor]:
        """dL/d(tensor) at edges below f, or at that of f."""
        at_f = self.gradient()
        inner = [edge.public for edge in edges if edge[:2] != self.f_edge[:2]]
        got = iter(torch.autograd.grad([self.f_edge.public], inner, [at_f], retain_graph=True) if inner else ())
        return [at_f if edge[:2] == self.f_edge[:2] else next(got) for edge in edges]

    def term_gradients(self) -> Tensor:
        """u [n, t, c], whose outer product is the share of a sample in the empirical Fisher of f."""
        f = self.terms.f
        return self.terms.gradient() * torch.as_tensor(self.weights, dtype=f.dtype, device=f.device).sqrt()

    def hessian_matvec(self, v: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """H_L v for one v shaped like the edge of f."""
        return self.restored(self.terms.hessian(self.canonical(v)) * self.weights, dtype)

    def diagonal(self) -> Tensor:
        """That of H_L, like the edge of f, in float32 or better."""
        return self.restored(self.terms.hessian_diagonal() * self.weights, self.terms.f.dtype)

    def mean_matrix(self, max_dim: int) -> Tensor:
        """mean_n of the Hessian of a sample [d, d], over its elements in the order of the edge."""
        d = self.f_edge.shape.numel() // self.n
        if d > max_dim:
            raise ValueError(
                f"a sample of the output has {d} elements, more than max_hessian_dim={max_dim}, the largest matrix "
                'that "kfac" of the Hessian carries: choose approx="diag", or raise max_hessian_dim'
            )
        columns = []
        for k in range(d):
            v = torch.zeros(self.n, d, dtype=self.terms.f.dtype, device=self.f.device)
            v[:, k] = 1
            Hv = self.hessian_matvec(v.reshape(self.f_edge.shape), v.dtype)
            columns.append(Hv.reshape(self.n, d).mean(0))
        return torch.stack(columns, 1)

    def products(
        self, params: list[Tensor], output_matvec: Callable[[OutputLoss, Tensor], Tensor], second_order: bool
    ) -> CurvatureVectorProduct:
        """Those of a curvature J^T M J (+ the term of second order) over some parameters; output_matvec: M v."""
        return CurvatureVectorProduct(
            self.f_edge.public, params, self.gradient(), partial(output_matvec, self), second_order
        )


class CurvatureVectorProduct:
    """C v = J^T M (J v) + sum_k u_k (d²f_k/dθ²) v over some parameters, of an output f.

    f: that tensor, or where its gradient arrives. u: like f, dL/df.
    output_matvec: M x for one x like f; None: M = 0. include_second_order: whether C has its second term, as the
    Hessian of L does, with M that of L with respect to f; any u will do without it.
    """

    def __init__(
        self,
        f: Tensor | GradientEdge,
        params: list[Tensor],
        u: Tensor,
        output_matvec: Callable[[Tensor], Tensor] | None,
        include_second_order: bool = True,
    ) -> None:
        self.f, self.params = f, params
        self.output_matvec, self.include_second_order = output_matvec, include_second_order
        self._batched: dict[int, bool] = {}  # whether several vectors at once give what each gives alone
        with torch.enable_grad():
            self.u = u.detach().requires_grad_()
            self.first = torch.autograd.grad(
                f, params, self.u, create_graph=True, allow_unused=True, materialize_grads=True
            )

    def __call__(self, v: list[Tensor]) -> list[Tensor]:
        """C v for a batch of vectors [k, *shape], one tensor per parameter."""
        connected = [k for k, g in enumerate(self.first) if g.requires_grad]
        if not connected:
            return [at_least_float32(torch.zeros_like(x)) for x in v]
        wanted = [
            *(self.params if self.include_second_order else ()),
            *(() if self.output_matvec is None else (self.u,)),
        ]
        sent = [v[k].to(self.first[k].dtype) for k in connected]
        total = self._each(2, [self.first[k] for k in connected], wanted, sent)
        if self.output_matvec is not None:
            at_f = torch.stack([self.output_matvec(x) for x in total.pop()])
            first_order = self._each(1, [self.f], self.params, [at_f])
            total = (
                [x + y for x, y in zip(total, first_order, strict=True)] if self.include_second_order else first_order
            )
        return [at_least_float32(x) for x in total]

    def _each(self, order: int, outputs: list[Any], inputs: list[Tensor], v: list[Tensor]) -> list[Tensor]:
        """Vector-Jacobian products for a batch of vectors, all at once where that is right.

        torch's batching of a second derivative is wrong for some operations, without a word (group norm with a weight
        that is not differentiated). So the first products are compared, by one sum of them, with one product alone.
        """
        if not self._batched.get(order, True):
            return _one_by_one(outputs, inputs, v)
        found = _all_at_once(outputs, inputs, v)
        if order not in self._batched and len(v[0]) > 1:
            self._batched[order] = _add_up(found, outputs, inputs, v)
            if not self._batched[order]:
                return _one_by_one(outputs, inputs, v)
        return found

    def at_once(self, size: int) -> int:
        """How many vectors over `size` coordinates are multiplied at once."""
        return max(1, CHUNK // max(1, size + self.u.numel()))

    def rows(self, size: int, place: Callable[[Tensor], list[Tensor]]) -> Iterator[tuple[int, list[Tensor]]]:
        """(start, the rows from there on) of H over coordinates [size]; place: from coordinates [k, size] to v."""
        like = self.first[0]
        chunk = self.at_once(size)
        for start in range(0, size, chunk):
            count = min(chunk, size - start)
            units = like.new_zeros(count, size, dtype=torch.promote_types(like.dtype, torch.float32))
            units[torch.arange(count), start + torch.arange(count)] = 1
            yield start, self(place(units))


OPTIONS: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}


def _one_by_one(outputs: list[Any], inputs: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    """Vector-Jacobian products for a batch of vectors."""
    each = [torch.autograd.grad(outputs, inputs, [x[k] for x in v], **OPTIONS) for k in range(len(v[0]))]
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


def _all_at_once(outputs: list[Any], inputs: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    """The same; in a loop where an operation cannot be batched."""
    if len(v[0]) == 1:
        return _one_by_one(outputs, inputs, v)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        try:
            found = torch.autograd.grad(outputs, inputs, v, is_grads_batched=True, **OPTIONS)
        except RuntimeError:
            return _one_by_one(outputs, inputs, v)
    # torch fills in zeros without the dimension of the batch
    return [x if x.dim() > y.dim() else x.expand(len(v[0]), *x.shape) for x, y in zip(found, inputs, strict=True)]


def several_products(output: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """J^T v at x for each v of a batch of them, at once where that is right."""
    found = _all_at_once([output], [x], [v])
    return (found if len(v) == 1 or _add_up(found, [output], [x], [v]) else _one_by_one([output], [x], [v]))[0]


def _add_up(found: list[Tensor], outputs: list[Any], inputs: list[Tensor], v: list[Tensor]) -> bool:
    """Whether Σ ± of the products is the product with Σ ± of the vectors, or not finite. Reads a number."""
    k = torch.arange(len(v[0]), device=v[0].device)
    signs = torch.where(k * 7 % 5 < 2, 1.0, -1.0)  # a sum alone would let opposite errors cancel
    total = [torch.einsum("k,k...->...", signs.to(x.dtype), x) for x in v]
    alone = torch.autograd.grad(outputs, inputs, total, **OPTIONS)
    together = [torch.einsum("k,k...->...", signs.to(x.dtype), x) for x in found]
    gap = torch.stack([(x - y).norm() for x, y in zip(together, alone, strict=True)]).norm()
    size = torch.stack([x.norm() for x in found]).norm()
    # what is wrong is off by a part of itself, rounding by a few units of the coarsest type that takes part
    bound = max(1e-3, 32 * max(torch.finfo(x.dtype).eps for x in found)) * size
    return not bool(gap > bound)
