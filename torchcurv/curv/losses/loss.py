"""A loss formula with the settings of one loss module: layout, reduction, weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.losses.formula import LabelFactor, LossFormula
from torchcurv.curv.losses.terms import Terms
from torchcurv.curv.numerics import at_least_float32


@dataclass(frozen=True)
class Loss:
    """A formula together with the settings of one loss module.

    options: the module's own `weight`, `pos_weight`, `ignore_index`, `label_smoothing`.
    whole: whether all rows of the output are one sample.
    class_dim: dimension of the classes in the output; None where the loss has none or the user must say it.
    """

    name: str
    formula: LossFormula
    reduction: str = "mean"
    class_dim: int | None = 1
    options: dict[str, Any] = field(default_factory=dict)
    whole: bool = False

    # ---------------------------------------------------------------------------------------- layout

    def of_whole(self, samples: str) -> Loss:
        """The loss with the whole batch taken as one sample; samples: "batch", which asks for it."""
        if samples != "batch":
            raise ValueError(
                f'observe: samples={samples!r}; pass "batch", to take the whole batch as one sample, or a LongTensor, '
                "the number of the sample that each row of the output belongs to"
            )
        return replace(self, whole=True)

    def _class_dim_of_whole(self) -> int | None:
        dim = self.class_dim
        return dim if dim is None or dim < 0 else dim + 1

    def rows(self, f: Tensor) -> int:
        """How many rows of dimension 0 an output has; the one of a sample without a batch dimension counts too."""
        return 1 if self.whole or f.dim() < (1 if self.formula.elementwise or self.formula.joint else 2) else f.shape[0]

    def layout(self, f: Tensor, n: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """(f as [n, t, c], a function that brings such a tensor back to the shape of f).

        Each of the n has an equal run of the rows of dimension 0; where there are no equal ones, it has one row. Which
        samples they are is found from the graph (curv/capture/rows.py).
        """
        if self.whole:
            one, back = replace(self, whole=False, class_dim=self._class_dim_of_whole()).layout(f.unsqueeze(0), 1)
            return one, lambda s: back(s).squeeze(0)
        rows = self.rows(f)
        if rows == 0:
            raise ValueError(
                f"the output given to the loss has shape {tuple(f.shape)}, a batch of no samples: skip that batch"
            )
        n = n if n and rows % n == 0 else rows
        if self.formula.elementwise or self.formula.joint:
            return f.reshape(n, 1, -1), lambda s: s.reshape(f.shape)
        if not f.dim():
            raise ValueError(
                f"{self.name} needs outputs [batch, classes, ...]; this one is a number. Return outputs of every "
                "class from the model"
            )
        if f.dim() == 1:
            return f.reshape(1, 1, -1), lambda s: s.reshape(f.shape)
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

        arriving: of a loss that is not reduced, the gradient that reached it; it weights the terms.
        """
        canonical = at_least_float32(self.layout(f.detach(), n)[0])

        def layout(x: Tensor) -> Tensor:
            x = x.reshape(()) if x.numel() == 1 else x
            self._check_fits(x, f)
            return self.layout(x.detach().to(canonical.dtype).expand_as(f), n)[0]

        one = f if f.dim() else f.reshape(1)
        formula = self.formula.of_shape((len(one) // len(canonical), *one.shape[1:]))
        if formula.joint and arriving is not None:
            formula = formula.weighted(arriving.detach())
        y, weights, count, uniform = formula.read(canonical, _labels(target), layout, self.options)
        reduction = formula.factor / self._divisor(count)
        terms = Terms(formula, canonical, reduction, weights, uniform, y, count=count)
        if self.reduction != "none" or formula.joint:
            return terms
        if arriving is None:
            raise ValueError("reduction='none' says nothing about the weight of each term: reduce the loss first")
        reached = arriving.detach().to(canonical.dtype).reshape(*terms.f.shape[:2], -1)
        reached = reached if self.formula.elementwise else reached.squeeze(-1)
        weights = reached if terms.weights is None else terms.weights * reached
        largest = weights.abs().amax().clamp_min(torch.finfo(weights.dtype).tiny)
        return replace(terms, reduction=terms.reduction * largest, weights=weights / largest, uniform=False)

    def _check_fits(self, x: Tensor, f: Tensor) -> None:
        """Raise if torch would repeat the output to fit a target."""
        wanted, own = reversed(f.shape), reversed(x.shape)
        if x.dim() > f.dim() or any(size not in (1, to) for to, size in zip(wanted, own, strict=False)):
            raise ValueError(
                f"{self.name} was given an output of shape {tuple(f.shape)} and a target (or weight) of shape "
                f"{tuple(x.shape)}, which torch compares each with each: give both one shape, as by "
                "target.reshape(output.shape) where they have as many elements"
            )

    def averages(self, terms: Terms) -> bool:
        """Whether the loss of these terms is their mean. Of a function it is found with them: a sum divides by 1."""
        return self.reduction == "mean" and not (self.formula.joint and terms.count == 1.0 and len(terms.f) > 1)

    def _divisor(self, count: Tensor | float) -> Tensor | float:
        return count if self.reduction == "mean" or self.formula.joint else 1.0

    # --------------------------------------------------------------- losses known by their name alone

    def check_known_by_name(self) -> None:
        """Raise unless the gradient at the output is all that has to be seen of this loss."""
        if self.reduction == "none":
            raise ValueError(
                f"loss_fn={self.name!r} with reduction='none' says nothing about the weight of each term: pass the "
                "loss module, or name the reduction ('mean', 'sum') that is taken of it"
            )
        if self.formula.hessian_needs_target:
            raise ValueError(
                f"loss_fn={self.name!r} is a name, and the Hessian of this loss depends on the target, which its "
                "gradient does not tell: pass the loss module, or loss_fn=None and call optimizer.observe"
            )

    def terms_from_gradient(
        self,
        f: Tensor,
        arriving: Tensor,
        n: int,
        loss_scale: Tensor | float = 1.0,
        loss_factor: float = 1.0,
        hard_labels: bool = False,
    ) -> tuple[Terms, Tensor | float, LabelFactor | None]:
        """(terms, factor, found) of a loss that was named, not seen: the gradient that arrived stands for the target.

        factor: what the loss was multiplied by. Where the targets are labels, the gradient says it, as `found` tells
        (None: that of this loss never does). Elsewhere it is `loss_factor`. hard_labels: whether earlier gradients of
        this loss were those of labels, so that one term that may be of a label is.
        """
        canonical = at_least_float32(self.layout(f.detach(), n)[0])
        reached = at_least_float32(self.layout(arriving, n)[0]) / loss_scale
        weights = self.formula.counted(canonical, self.layout(arriving, n)[0])
        elements = canonical.numel() if self.formula.elementwise else canonical.shape[:2].numel()
        count = elements if weights is None else weights.sum()
        reduction = self.formula.factor / self._divisor(count)
        sign = math.copysign(1.0, loss_factor)  # of two that fit, the one that is said is taken
        found = self.formula.factor_in(canonical, sign * reached, weights, self._tolerance(f, arriving))
        factor: Tensor | float = loss_factor
        if found is not None:
            if hard_labels:
                found = found._replace(fits=found.fits | found.alone, alone=torch.zeros_like(found.alone))
            said = sign * found.value / reduction
            # a few roundings of either tensor are no factor: what is 1 stays 1
            eps = max(1e3 * torch.finfo(canonical.dtype).eps, 4 * torch.finfo(arriving.dtype).eps)
            same = (said - loss_factor).abs() <= eps * abs(loss_factor)
            factor = torch.where(found.fits & ~same, said, loss_factor)
            found = found._replace(alone=found.alone & ~same)
        terms = Terms(
            self.formula, canonical, reduction, weights, True, None, lambda: reached / (reduction * factor), count
        )
        return terms, factor, found

    def with_class_dim_of(self, f: Tensor, arriving: Tensor) -> Loss:
        """The loss with the dimension of the classes that the gradient at its input shows, where none was said.

        That of a cross entropy of logits sums to zero over its classes. Reads numbers; where none fits or several do,
        it stays open.
        """
        if self.class_dim is not None or f.dim() < 3 or self.formula.elementwise or self.formula.joint:
            return self
        size = at_least_float32(arriving).abs().sum()
        sums = [at_least_float32(arriving).sum(dim).abs().sum() for dim in range(1, f.dim())]
        bound = max(1e-3, 32 * torch.finfo(arriving.dtype).eps) * size
        fitting = [dim for dim, total in enumerate(sums, 1) if bool(total <= bound)]
        return replace(self, class_dim=fitting[0]) if len(fitting) == 1 and bool(size > 0) else self

    def _tolerance(self, f: Tensor, arriving: Tensor) -> float:
        """A thousandth of a probability is more than float32 loses and less than another loss is off by; a coarser
        type may lose a few roundings of either tensor, 32 of them in a softmax and a sum over classes."""
        return max(1e-3, 32 * max(torch.finfo(arriving.dtype).eps, torch.finfo(f.dtype).eps))

    def check_arriving(self, f: Tensor, arriving: Tensor, terms: Terms, found: LabelFactor | None) -> None:
        """Raise if the gradient at the output, which is not that of labels, cannot be that of the named loss at other
        targets, or may be of both. Reads numbers."""
        gradient = terms.gradient()
        if not bool(torch.isfinite(gradient).all() & torch.isfinite(terms.f).all()):
            return  # it is left out and counted when it is averaged
        why = self.formula.check_gradient(terms.f, gradient, self._tolerance(f, arriving))
        if why is None and found is not None and bool(found.alone):
            why = "it has one term, of which a soft label and a factor cannot be told from each other"
        if why is not None:
            raise ValueError(
                f"the gradient that arrived at the model's output is not that of loss_fn={self.name!r} with "
                f"reduction={self.reduction!r}, no class weights and factor 1: {why}. Pass the loss module you call "
                "as loss_fn=, name the loss and the reduction= you use (with loss_factor=, if it is multiplied, and "
                "grad_scaler=, if one scales it), or call optimizer.observe(output, target, loss_fn, weight) before "
                "backward()"
            )


def _labels(target: Any) -> Any:
    """Labels in the type that torch indexes with; uint8 ones are common."""
    if not isinstance(target, Tensor):
        return target
    whole = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    return target.detach().long() if whole else target.detach()
