"""Losses that are multiplied by negative numbers: what their curvature is taken to be."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.capture.context import LossEvent
from torchcurv.curv.numerics import on_cpu

MESSAGE = (
    "the loss, or some of its terms, is multiplied by a negative number, and has no positive curvature then: choose "
    'negative="abs" for the curvature of the absolute values, or negative="model" for that of the model\'s own '
    "distribution, every term counted once and the mean taken (what policy gradients mean by the Fisher); or keep what "
    "is negative out of the loss that is watched, by optimizer.observe(output, target, loss_fn, weight) for the rest"
)


def with_signs(event: LossEvent, policy: str, blocks: list[Curvature]) -> LossEvent:
    """The loss as its curvature counts it.

    policy: "error": the step that would use the curvature raises, if something is negative; "abs": absolute values of
    the factor and of the weights of terms; "model": no factor, and each term that has a weight counts once in the mean.
    """
    terms = event.terms
    if policy == "model":
        weights = None if terms.weights is None else (terms.weights != 0).to(terms.f.dtype)
        count = terms.f[..., :1].numel() if weights is None else weights.sum().clamp_min(1)
        count = terms.f.numel() if terms.formula.elementwise and weights is None else count
        mean = replace(terms, weights=weights, reduction=terms.formula.factor / count, uniform=False)
        return replace(event, terms=mean, factor=1.0)
    factor = event.factor
    signed = [x for x in (factor, terms.weights) if isinstance(x, Tensor)]
    if not isinstance(factor, Tensor) and factor < 0:
        signed.append(torch.tensor(factor, device=event.f.device))
    if not signed:
        return event
    negative = torch.stack([(x < 0).any() for x in signed]).any()
    if on_cpu(negative) and not negative:
        return event
    if policy == "error":
        for block in blocks:
            block.pending.object_if(negative, MESSAGE)
    weights = None if terms.weights is None else terms.weights.abs()
    return replace(
        event, terms=replace(terms, weights=weights), factor=factor.abs() if isinstance(factor, Tensor) else abs(factor)
    )
