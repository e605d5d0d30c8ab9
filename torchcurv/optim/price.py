"""Price's estimate of the diagonal of the Hessian: from draws of a posterior and their gradients, without a pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.kinds.table import kind_of
from torchcurv.curv.posterior.gaussian import GaussianBlock

Products = dict[Tensor, Tensor]  # by parameter, the sum of (θ - μ) g over draws


def price_average(h: Tensor, products: Tensor, scale: float | Tensor, damping: float | Tensor, beta: float) -> Tensor:
    """h + (1-β) (f - h) + ½ (1-β)² (h - f)² / (h + δ̃) with f = scale (h + δ̃) products.

    products: mean of (θ - μ) ∘ ĝ over draws of variance 1 / (scale (h + δ̃)). The last term keeps
    h + δ̃ = (h + δ̃) (1 + x + x²/2), x = (1-β) (f - h) / (h + δ̃), positive (Shen et al., 2402.17641).
    """
    damped = h + damping
    change = (scale * damped * products - h) * (1 - beta)
    return h + change + 0.5 * change.square() / damped


def is_priced(block: Curvature) -> bool:
    """Whether the curvature of a block is estimated from draws."""
    return not kind_of(block.kind, block.options).by_passes


def add_products(total: Products, products: Products) -> None:
    for p, product in products.items():
        total[p] = total[p] + product if p in total else product


@torch.no_grad()
def products_of_draw(params: Iterable[Tensor], means: Any, before: Products) -> Products:
    """(θ - μ) g of the draw that ends; before: gradients that other draws have left in the same tensors."""
    found = {}
    for p in params:
        if p.grad is not None:
            gradient = p.grad - before[p] if p in before else p.grad
            found[p] = (p - means(p)) * gradient
    return found


def estimate(part: GaussianBlock, products: Products, beta: float, factor: float | Tensor) -> None:
    """What the running average of Price's estimate becomes, as the measurement of the block.

    factor: from the sum over draws to the mean of the mean loss.
    """
    block = part.block
    wide = torch.promote_types(block.params[0].dtype, torch.float32)
    by_param = {p: products.get(p, torch.zeros_like(p, dtype=wide)) for p in block.params}
    joined = block.layout.join([piece.of(by_param[piece.param]) for piece in block.pieces])[0] * factor
    h = block.tensors.get("diag", torch.full_like(joined, float(part.start)))
    block.pending.add({"diag": price_average(h, joined, part.scale, part.damping, beta)})
