"""The outputs of a network linearised in its parameters, whose distribution is a Gaussian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.analysis.measure import curvature
from torchcurv.curv.approximations.by_rows import rows_in
from torchcurv.curv.numerics import at_least_float32
from torchcurv.curv.posterior.draws import arguments, temporary_values
from torchcurv.curv.posterior.gaussian import GaussianBlock
from torchcurv.curv.posterior.linearised import (
    Call,
    Network,
    batch_size,
    covariance_of_rows,
    is_training,
    samples_of,
)

JACOBIAN_ELEMENTS = 2**24  # of the Jacobians that are held at a time, unless chunk_size says otherwise


class LinearisedOutputs:
    """f(x; θ*) + J (θ - θ*) for θ of a Gaussian around θ*.

    names: the covered parameters by name. mean: θ* by parameter.
    """

    def __init__(self, network: Network, names: dict[str, Tensor], mean: dict[Tensor, Tensor]) -> None:
        self.network, self.names, self.mean = network, names, mean

    def __call__(self, blocks: list[GaussianBlock], inputs: Any, chunk_size: int | None) -> tuple[Tensor, Tensor]:
        """(f(x; θ*) in its own shape, J Σ J^T [N, C, C])."""
        call = arguments(inputs)
        at = {name: self.mean[p] for name, p in self.names.items()}
        n, f = batch_size(call), at_least_float32(self.network(at, call))
        size = f.numel() // max(1, n) * sum(x.numel() for x in at.values())
        chunk = chunk_size or max(1, JACOBIAN_ELEMENTS // max(1, size))
        parts = []
        for k in range(0, n, chunk):
            some = samples_of(call, slice(k, k + chunk))
            part = self.by_layers(blocks, some)
            parts.append(self.by_jacobians(blocks, self.network.jacobians(at, some)) if part is None else part)
        return f, torch.cat(parts)

    def by_layers(self, blocks: list[GaussianBlock], call: Call) -> Tensor | None:
        """J Σ J^T without a Jacobian over all parameters, None where this way is not open.

        The rows of J are those of the curvature of |f|² / 2, of which the layers' inputs and signals are kept.
        """
        opaque = any(site.opaque for part in blocks for layer in part.block.layers for site in layer.sites)
        layers = all(len(part.block.layers) == 1 and part.size > 1 for part in blocks)
        if opaque or not layers or not all(p.requires_grad for p in self.mean) or is_training(self.network.model):
            return None
        args, kwargs = call
        nothing = next(iter(self.mean)).new_zeros(())
        moved = {p: x for p, x in self.mean.items() if not torch.equal(p, x)}  # a write spoils graphs of the user's
        with temporary_values(moved):
            rows = curvature(
                self.network.model, "mse", [(kwargs or args, nothing)], approx="block", reduction="sum", rows_limit=1,
                params=self.names.values(), output_fn=self.network.output_fn,
            )  # fmt: skip
        total = []
        for part in blocks:
            factor = rows_in(rows.blocks[part.block.layers[0].name].tensors)
            total.append(covariance_of_rows(part, factor))
        return torch.stack(total).sum(0) / 2

    def by_jacobians(self, blocks: list[GaussianBlock], jacobians: dict[str, Tensor]) -> Tensor:
        """J Σ J^T [n, C, C]."""
        by_param = {p: at_least_float32(jacobians[name]) for name, p in self.names.items()}
        total = []
        for block in blocks:
            J = [piece.of(by_param[piece.param]) for piece in block.block.pieces]
            n, c = J[0].shape[:2]
            solved = block.covariance_times([x.flatten(0, 1) for x in J])
            pairs = zip(J, solved, strict=True)
            total += [x.reshape(n, c, -1) @ y.reshape(n, c, -1).mT for x, y in pairs]
        return torch.stack(total).sum(0)
