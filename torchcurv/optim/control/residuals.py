"""Residuals as one vector r with the loss ½ norm(r)², and its Gauss-Newton system without a matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.checks import check_number
from torchcurv.curv.hessian.products import CurvatureVectorProduct
from torchcurv.optim.cg_newton import conjugate_gradients

Weight = float | Tensor
Weights = Weight | Sequence[Weight] | Mapping[str, Weight] | None
Vector = list[Tensor]


def residual_vector(found: Any, weights: Weights, reduction: str) -> Tensor:
    """r [m] with ½ norm(r)² = ½ Σ_k Σ w_k r_k² over the tensors r_k; "mean" divides each inner sum by its terms.

    found: a tensor, or a list or dict of them. weights: as found is, each a number or a tensor that broadcasts to its
    r_k; None: ones. Tensors without elements are left out.
    """
    parts = [
        _weighted(name, part, weight, reduction) for name, part, weight in _named(found, weights) if _numel(name, part)
    ]
    if not parts:
        raise ValueError("there is not one residual: the callable must return a tensor with elements, or several")
    return torch.cat([part.to(parts[0].device) for part in parts])


def _named(found: Any, weights: Weights) -> list[tuple[str, Any, Weight]]:
    """(name in errors, residuals, their weight)."""
    if isinstance(found, Tensor):
        if not (weights is None or isinstance(weights, int | float | Tensor)):
            raise TypeError(f"weights is a {type(weights).__name__} for one tensor; pass a number or a tensor")
        return [("the residuals", found, 1.0 if weights is None else weights)]
    if isinstance(found, Mapping):
        if not (weights is None or isinstance(weights, Mapping)) or (weights and weights.keys() - found.keys()):
            raise ValueError(f"weights={weights!r}; pass a dict with some of the keys {', '.join(map(repr, found))}")
        return [(f"residuals[{key!r}]", part, (weights or {}).get(key, 1.0)) for key, part in found.items()]
    if isinstance(found, list | tuple):
        if weights is None:
            weights = [1.0] * len(found)
        if not isinstance(weights, list | tuple) or len(weights) != len(found):
            raise ValueError(f"weights={weights!r}; pass a list of {len(found)}, one for each tensor of residuals")
        return [(f"residuals[{k}]", part, w) for k, (part, w) in enumerate(zip(found, weights, strict=True))]
    raise TypeError(
        f"the callable returned a {type(found).__name__}; it must return the residuals as a tensor, or as a list or "
        "dict of tensors"
    )


def _numel(name: str, part: Any) -> int:
    if not isinstance(part, Tensor) or not part.is_floating_point():
        kind = f"a tensor of {part.dtype}" if isinstance(part, Tensor) else f"a {type(part).__name__}"
        raise TypeError(f"{name} is {kind}; residuals are real floating-point tensors (view_as_real of complex ones)")
    return part.numel()


def _weighted(name: str, part: Tensor, weight: Weight, reduction: str) -> Tensor:
    if not part.requires_grad:
        raise ValueError(
            f"{name}: no gradient leads from there to the parameters. The callable must compute the residuals anew at "
            "each call, without detach() or no_grad(), and derivatives of the network by "
            "torch.autograd.grad(..., create_graph=True)"
        )
    scale: Weight
    if isinstance(weight, Tensor):
        weight = weight.detach().to(part.device, part.dtype)
        try:
            fits = torch.broadcast_shapes(weight.shape, part.shape) == part.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"the weight of {name} has shape {tuple(weight.shape)}, which does not broadcast to theirs, "
                f"{tuple(part.shape)}"
            )
        if not bool(((weight >= 0) & weight.isfinite()).all()):
            raise ValueError(f"the weight of {name} has entries that are negative or not finite; pass weights >= 0")
        scale = weight.sqrt()
    else:
        check_number(f"the weight of {name}", weight, lambda x: 0 <= x < math.inf, "a finite number >= 0")
        scale = math.sqrt(weight)
    if reduction == "mean":
        scale = scale / math.sqrt(part.numel())
    return (part * scale).flatten()


class MatrixFreeLeastSquares:
    """The steps of `DampedLeastSquares` by conjugate gradients, with products J^T (J v) in place of J.

    scale: s [P], all positive; None: ones. tol, maxiter: when conjugate gradients stop.
    """

    rounding = 0.0

    def __init__(
        self, r: Tensor, params: Vector, scale: Tensor | None, dtype: torch.dtype, tol: float, maxiter: int
    ) -> None:
        self.params, self.dtype, self.tol, self.maxiter = params, dtype, tol, maxiter
        self.r, self._graph = r.detach().to(dtype), r
        self.scale = None if scale is None else self._split(scale.to(dtype))
        self.products = CurvatureVectorProduct(r, params, torch.zeros_like(r), _itself, include_second_order=False)
        self.gradient = self._transposed_times(self.r)
        # the curvature along the gradient, a lower bound of the largest eigenvalue
        along = self.times(self.gradient).square().sum()
        self.largest_square = along / self.gradient.square().sum().clamp_min(torch.finfo(dtype).tiny)

    def step(self, damping: float, r: Tensor | None = None) -> tuple[Tensor, int]:
        """(d [P], iterations), also for another r [m]."""

        def damped(v: Vector) -> Vector:
            added = v if self.scale is None else torch._foreach_mul(v, self.scale)
            return [x + damping * y for x, y in zip(self._multiply(v), added, strict=True)]

        b = [-x for x in self._split(self.gradient if r is None else self._transposed_times(r))]
        d, iterations = conjugate_gradients(damped, b, None, self.tol, 0.0, self.maxiter)
        return torch.cat([x.flatten() for x in d]), iterations

    def times(self, d: Tensor) -> Tensor:
        """J d [m]."""
        pairs = [(g, x) for g, x in zip(self.products.first, self._split(d), strict=True) if g.requires_grad]
        first, v = [g for g, _ in pairs], [x.to(g.dtype) for g, x in pairs]
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        return torch.autograd.grad(first, self.products.u, v, **options)[0].to(self.dtype)

    def _transposed_times(self, u: Tensor) -> Tensor:
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        found = torch.autograd.grad(self._graph, self.params, u.to(self._graph), **options)
        return torch.cat([x.flatten().to(self.dtype) for x in found])

    def _multiply(self, v: Vector) -> Vector:
        return [x[0].to(self.dtype) for x in self.products([x.unsqueeze(0) for x in v])]

    def _split(self, d: Tensor) -> Vector:
        parts = d.split([p.numel() for p in self.params])
        return [x.reshape(p.shape) for x, p in zip(parts, self.params, strict=True)]


def _itself(v: Tensor) -> Tensor:
    return v
