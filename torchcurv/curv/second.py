"""Second derivatives by autograd: products of the Hessian of one loss with vectors over the parameters.

    H v = J^T (H_L (J v)) + sum_k (dL/df_k) (d²f_k/dθ²) v,    f the output, J = df/dθ

Both terms follow from the gradient J^T u as a function of u and θ, without the loss itself in the graph: its
derivative along v with respect to u is J v, with respect to θ it is the second term at u = dL/df.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.capture import Edge
from torchcurv.curv.losses import Loss, Terms, at_least_float32

CHUNK = 1 << 24  # elements of the vectors that are multiplied at once


class HessianProducts:
    """H of `scale` times the loss whose terms are `terms`, over some parameters.

    f, f_edge: the output that the loss is applied to, and where its gradient arrives. n: the batch size.
    """

    def __init__(
        self, loss: Loss, terms: Terms, n: int, f: Tensor, f_edge: Edge, scale: Tensor | float, params: list[Tensor]
    ) -> None:
        self.loss, self.terms, self.n, self.f, self.f_edge, self.params = loss, terms, n, f, f_edge, params
        root = terms.root_weights
        self.weights = scale * terms.reduction * (1.0 if root is None else root.square())
        with torch.enable_grad():
            self.u = self._restored(terms.residual() * self.weights).requires_grad_()
            self.first = torch.autograd.grad(
                [f_edge.public], params, [self.u], create_graph=True, allow_unused=True, materialize_grads=True
            )

    def _restored(self, canonical: Tensor) -> Tensor:
        """[n, t, c] -> where the gradient of f arrives."""
        return self.loss.layout(self.f, self.n)[1](canonical).to(self.f.dtype).reshape(self.f_edge.shape)

    def _output_hessian(self, v: Tensor) -> Tensor:
        """H_L v for one v shaped like the edge of f."""
        canonical = at_least_float32(self.loss.layout(v.reshape(self.f.shape), self.n)[0])
        return self._restored(self.loss.row.hessian(self.terms.f, canonical) * self.weights)

    def __call__(self, v: list[Tensor]) -> list[Tensor]:
        """H v for a batch of vectors [k, *shape], one tensor per parameter."""
        connected = [k for k, g in enumerate(self.first) if g.requires_grad]
        if not connected:
            return [torch.zeros_like(x) for x in v]
        inputs = [*self.params, self.u]
        got = _each([self.first[k] for k in connected], inputs, [v[k] for k in connected])
        *second, Jv = got
        sent = torch.stack([self._output_hessian(x) for x in Jv])
        gauss_newton = _each([self.f_edge.public], self.params, [sent])
        return [at_least_float32(x + y) for x, y in zip(second, gauss_newton, strict=True)]

    def rows(self, size: int, place: Callable[[Tensor], list[Tensor]]) -> Iterator[tuple[int, list[Tensor]]]:
        """(start, the rows from there on) of H over coordinates [size]; place: from coordinates [k, size] to v."""
        like = self.first[0]
        chunk = max(1, CHUNK // max(1, size + self.f.numel()))
        for start in range(0, size, chunk):
            count = min(chunk, size - start)
            units = like.new_zeros(count, size, dtype=torch.promote_types(like.dtype, torch.float32))
            units[torch.arange(count), start + torch.arange(count)] = 1
            yield start, self([x.to(p.dtype) for x, p in zip(place(units), self.params, strict=True)])


def _each(outputs: list[Any], inputs: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    """Vector-Jacobian products for a batch of vectors; in a loop where an operation cannot be batched."""
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        try:
            return list(torch.autograd.grad(outputs, inputs, v, is_grads_batched=True, **options))
        except RuntimeError:
            each = [torch.autograd.grad(outputs, inputs, [x[k] for x in v], **options) for k in range(len(v[0]))]
            return [torch.stack(parts) for parts in zip(*each, strict=True)]
