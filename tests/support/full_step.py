"""A step of approx="full" on a model that somebody else wrote, against -(J^T H J + λ)^-1 g from autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchcurv import SecondOrderOptimizer

DAMPING = 0.1
MOST = 600  # numbers that the loss is a function of: one backward pass of the truth for each


def error_of_full(
    model: nn.Module, loss_of: Callable[[], Tensor], terms: Callable[[], Tensor], **options: Any
) -> float | None:
    """norm(step - truth) / norm(truth) for a mean of cross entropies; None where the truth would take too long.

    loss_of: the loss; terms: the logits [terms, classes] whose cross entropies it averages.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    logits = terms()
    if logits.numel() > MOST:
        return None
    optimizer = SecondOrderOptimizer(
        model, approx="full", samples=None, lr=0.0, momentum=0.0, weight_decay=0.0, kl_clip=None, damping=DAMPING,
        update_every=1, refactor_every=1, ema_decay=0.0, **options,
    )  # fmt: skip
    for last in (False, False, True):  # what is used in an unusual way is found in the first passes
        for group in optimizer.param_groups:
            group["lr"] = 1.0 if last else 0.0
        optimizer.zero_grad()
        loss_of().backward()
        before = [p.detach().clone() for p in params]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]
        if last:
            rows = root_rows(terms(), params)
        optimizer.step()
    step = torch.cat([(p.detach() - x).flatten() for p, x in zip(params, before, strict=True)])
    g = torch.cat([x.flatten() for x in gradients])
    inner = rows @ rows.T + DAMPING * torch.eye(len(rows), dtype=g.dtype)
    truth = -(g - rows.T @ torch.linalg.solve(inner, rows @ g)) / DAMPING
    return float((step - truth).norm() / truth.norm())


def root_rows(logits: Tensor, params: list[Tensor]) -> Tensor:
    """R with R^T R = J^T H J, [terms * classes, parameters]: H = (diag(p) - p p^T) / terms of each term."""
    rows = []
    for f in logits:
        p = f.detach().softmax(-1)
        root = p.sqrt().diag() - p[:, None] * p.sqrt()[None]
        for column in root.T:
            found = torch.autograd.grad(f, params, column, retain_graph=True, materialize_grads=True, allow_unused=True)
            rows.append(torch.cat([x.flatten() for x in found]))
    return torch.stack(rows) / len(logits) ** 0.5
