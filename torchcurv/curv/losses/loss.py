"""A loss formula with the settings of one loss module: layout, reduction, weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchcurv.curv.losses.binary_cross_entropy import BinaryCrossEntropy
from torchcurv.curv.losses.squared_error import SquaredError
from torchcurv.curv.losses.terms import Terms
from torchcurv.curv.numerics import at_least_float32


@dataclass(frozen=True)
class Loss:
    """A row above together with the settings of one loss module.

    options: the module's own `weight`, `pos_weight`, `ignore_index`, `label_smoothing`.
    class_dim: dimension of the classes in the output; None where the loss has none or the user must say it.
    """

    name: str
    row: Any
    reduction: str = "mean"
    class_dim: int | None = 1
    options: dict[str, Any] = field(default_factory=dict)

    # ---------------------------------------------------------------------------------------- layout

    def layout(self, f: Tensor, n: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """(f as [n, t, c], a function that brings such a tensor back to the shape of f)."""
        rows = f.shape[0] if f.dim() else 0
        if rows == 0 or rows % n:
            raise ValueError(
                f"the output given to the loss has shape {tuple(f.shape)}, whose rows are no multiple of the batch "
                f"size {n} of the model's output: call optimizer.observe(output, target) with an output whose "
                "dimension 0 is the batch"
            )
        if self.row.elementwise:
            return f.reshape(n, 1, -1), lambda s: s.reshape(f.shape)
        if f.dim() < 2:
            raise ValueError(
                f"{self.name} needs outputs [batch, classes, ...]; this one has shape {tuple(f.shape)}. "
                "Add a batch dimension"
            )
        if self.class_dim is None and f.dim() > 2:
            raise ValueError(
                f"the output has shape {tuple(f.shape)}: say with class_dim= which dimension holds the classes "
                "(-1 for [batch, tokens, classes], 1 for [batch, classes, height, width])"
            )
        dim = 1 if self.class_dim is None else self.class_dim
        last = f.movedim(dim, -1)
        return last.reshape(n, -1, last.shape[-1]), lambda s: s.reshape(last.shape).movedim(-1, dim)

    # ----------------------------------------------------------------------------------------- terms

    def terms(self, f: Tensor, target: Tensor, n: int, arriving: Tensor | None = None) -> Terms:
        """Terms of one call of the loss.

        arriving: for reduction "none", the gradient that reached the unreduced loss; it weights the terms.
        """
        canonical = at_least_float32(self.layout(f.detach(), n)[0])
        read = self._elements if self.row.elementwise else self._classes
        terms = read(canonical, f, target)
        if self.reduction != "none":
            return terms
        if arriving is None:
            raise ValueError("reduction='none' says nothing about the weight of each term: reduce the loss first")
        reached = arriving.detach().to(canonical.dtype).reshape(n, *terms.f.shape[1:2], -1)
        reached = reached if self.row.elementwise else reached.squeeze(-1)
        weights = reached if terms.weights is None else terms.weights * reached
        largest = weights.amax().clamp_min(torch.finfo(weights.dtype).tiny)
        return replace(terms, reduction=terms.reduction * largest, weights=weights / largest, uniform=False)

    def _elements(self, canonical: Tensor, f: Tensor, target: Tensor) -> Terms:
        y = target.detach().to(canonical.dtype).expand_as(f).reshape(canonical.shape)
        weights: Tensor | None = None
        for key in ("weight", "pos_weight"):
            option = self.options.get(key)
            if option is not None:
                option = option.to(canonical.dtype).expand_as(f).reshape(canonical.shape)
                factor = option if key == "weight" else 1 + (option - 1) * y
                weights = factor if weights is None else weights * factor

        def residual() -> Tensor:
            pos = self.options.get("pos_weight")
            if self.row is SquaredError:
                return canonical - y
            if pos is None:
                return canonical.sigmoid() - y
            pos = pos.to(canonical.dtype).expand_as(f).reshape(canonical.shape)
            factor = 1 + (pos - 1) * y
            return canonical.sigmoid() - pos * y / factor.clamp_min(torch.finfo(y.dtype).tiny)

        scale = 2 if self.row is SquaredError else 1
        # torch's weighted squared error divides by the weights' sum, its BCE does not
        count = weights.sum() if self.row is SquaredError and weights is not None else canonical.numel()
        return Terms(canonical, scale / self._divisor(count), weights, weights is None, residual, count)

    def _divisor(self, count: Tensor | float) -> Tensor | float:
        return count if self.reduction == "mean" else 1.0

    def _classes(self, canonical: Tensor, f: Tensor, target: Tensor) -> Terms:
        n, t, c = canonical.shape
        class_weight = self.options.get("weight")
        class_weight = None if class_weight is None else class_weight.to(canonical.dtype)
        smoothing = self.options.get("label_smoothing", 0.0)
        # torch: probabilities have the shape of the output and a floating dtype, indices lack the class dimension
        soft = target.is_floating_point() and target.shape == f.shape
        if soft:
            q = self.layout(target.detach().to(canonical.dtype), n)[0]
            kept, labels = None, None
        else:
            labels = target.detach().reshape(n, t)
            kept = labels != self.options.get("ignore_index", -100)
            labels = labels.where(kept, 0)

        def distribution() -> Tensor:
            hard = q if labels is None else F.one_hot(labels, c).to(canonical.dtype)
            return hard * (1 - smoothing) + smoothing / c if smoothing else hard

        weights = None if kept is None else kept.to(canonical.dtype)
        if class_weight is not None:
            weighted = distribution() @ class_weight
            weights = weighted if weights is None else weights * weighted
        count: Tensor | float = float(n * t)
        if kept is not None:
            mask = kept.to(canonical.dtype)
            count = (mask if class_weight is None else class_weight[labels] * mask).sum()

        def residual() -> Tensor:
            p, q = canonical.softmax(-1), distribution()
            if class_weight is None:
                return p - q
            w = (q @ class_weight).unsqueeze(-1)
            return p - q * class_weight / w.clamp_min(torch.finfo(w.dtype).tiny)

        return Terms(canonical, 1 / self._divisor(count), weights, class_weight is None, residual, count)

    # --------------------------------------------------------------- losses known by their name alone

    def terms_from_gradient(self, f: Tensor, arriving: Tensor, n: int, loss_scale: Tensor | float = 1.0) -> Terms:
        """Terms of a loss that was named, not seen: the gradient that arrived at the output stands for the target.

        A row of a classification counts as ignored where that gradient is exactly zero although the prediction
        is not saturated (a saturated right prediction has gradient zero too, but is a term).
        """
        canonical = at_least_float32(self.layout(f.detach(), n)[0])
        weights = None
        if not self.row.elementwise:
            gradient = self.layout(arriving, n)[0]
            saturated = canonical.softmax(-1).amax(-1) > 1 - 2 * torch.finfo(arriving.dtype).eps
            weights = ((gradient != 0).any(-1) | saturated).to(canonical.dtype)
        count = canonical.numel() if weights is None else weights.sum()
        reduction = (2 if self.row is SquaredError else 1) / self._divisor(count)

        def residual() -> Tensor:
            return at_least_float32(self.layout(arriving, n)[0]) / loss_scale / reduction

        return Terms(canonical, reduction, weights, True, residual, count)

    def check_arriving(self, f: Tensor, arriving: Tensor, terms: Terms, scale: Tensor | float) -> None:
        """Raise if the gradient at the output cannot be that of the named loss. Reads numbers: first use only.

        A gradient R (p - q) tells the target q, which must be a distribution; of a factor c < 1, q = (1-c) p + c y.
        """
        if self.row is SquaredError:
            return  # any gradient is that of some target
        gradient = at_least_float32(self.layout(arriving, terms.f.shape[0])[0]) / scale / terms.reduction
        tolerance = max(1e-3, 32 * max(torch.finfo(arriving.dtype).eps, torch.finfo(f.dtype).eps))
        if self.row is BinaryCrossEntropy:
            p = terms.f.sigmoid()
            p, gradient = torch.stack([p, 1 - p], -1), torch.stack([gradient, -gradient], -1)
        else:
            p = torch.zeros_like(terms.f) if self.name == "nll" else terms.f.softmax(-1)
            p, gradient = (x[(gradient != 0).any(-1)] for x in (p, gradient))
        q = p - gradient
        fits = (q.amin(-1) >= -tolerance) & ((q.sum(-1) - 1).abs() <= tolerance)
        if not bool((fits | ~torch.isfinite(gradient).all(-1)).all()):
            raise ValueError(
                f"the gradient that arrived at the model's output is not that of loss_fn={self.name!r} with "
                f"reduction={self.reduction!r}, no class weights and factor 1. Pass the loss module you call as "
                "loss_fn=, name the loss and the reduction= you use (and grad_scaler=, if one scales the loss), or "
                "call optimizer.observe(output, target, loss_fn, weight) before backward()"
            )
        factor = _shrunk(p, gradient)
        if factor is not None:
            raise ValueError(
                f"the loss seems to be multiplied by {factor:.4g}, and loss_fn={self.name!r} means factor 1. Pass the "
                "loss module you call as loss_fn=, or call optimizer.observe(output, target, loss_fn, weight) before "
                "backward()"
            )


def _shrunk(p: Tensor, gradient: Tensor) -> float | None:
    """c if gradient = c (p - y) for labels y and c < 1, beyond what smoothed labels could imitate; else None.

    For labels smoothed by 1 - c the ratios gradient / p would spread like (1 - c) / (C p); for a factor they do not.
    """
    labels = F.one_hot(gradient.argmin(-1), p.shape[-1]).bool()
    kept = ~labels & (p > 1e-6)
    ratio, spread = (gradient / p)[kept], (1 / (p.shape[-1] * p))[kept]
    if len(ratio) < 2:
        return None
    c = float(ratio.mean())
    imitation = (1 - c) * float(spread.std())
    return c if c < 0.99 and float((ratio - c).abs().max()) < 0.1 * imitation else None
