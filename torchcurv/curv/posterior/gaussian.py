"""A Gaussian over the parameters of a model whose precision is a curvature: block by block N(μ, Σ) with

    Σ^-1 = scale (C + damping I)

C is the curvature that a block holds, in whatever shape. Of its factor this asks four things: `sample`, `logdet`,
`damped_matvec` (C + damping) x, and `inverse_diag`, the diagonal of (C + damping)^-1. A `KroneckerInverse` has its
damping inside, and its Σ is exactly the explicit inverse over the scale, so that draws, densities and solves agree.

In a posterior of N loss terms at temperature τ with the prior N(0, I / δ), C is the curvature of the mean loss,
scale = N / τ and damping = τ δ / N.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.approximations.factor import has_two_sides
from torchcurv.curv.approximations.factors import Eigen
from torchcurv.curv.approximations.rows import each_of_batch
from torchcurv.curv.block.block import POSTERIOR, STEP, Curvature
from torchcurv.curv.block.layout import gathered
from torchcurv.curv.numerics import at_least_float32

Number = float | Tensor


@dataclass(frozen=True)
class GaussianBlock:
    """The Gaussian of one block, around zero. Vectors over it are lists of tensors shaped like `block.pieces`, any
    leading dimensions before.

    start: C is start times the identity as long as nothing has been measured.
    """

    block: Curvature
    scale: Number
    damping: Number
    start: Number = 0.0

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.block.size

    @property
    def factor(self) -> Any:
        slots = self.block.factors
        factor = slots.get(POSTERIOR, slots[STEP]).factor
        if factor is not None:
            return factor
        like = at_least_float32(self.block.params[0].detach()).new_zeros(self.block.layout.factor_shape)
        return Eigen(like + self.start)

    def sample(self, generator: torch.Generator | None = None, count: int | None = None) -> list[Tensor]:
        """A draw Σ^1/2 ε, or `count` of them [count, ...]; generator: on the device of the parameters."""
        return self._apply(lambda factor, x: factor.sample(x, self.damping), self._noise(generator, count))

    def _noise(self, generator: torch.Generator | None, count: int | None) -> list[Tensor]:
        """Normal numbers of variance 1 / scale, [*count, g, o, i] of each layer."""
        p, scale = self.block.params[0], self.scale
        dtype, lead = torch.promote_types(p.dtype, torch.float32), () if count is None else (count,)
        std = 1.0 if isinstance(scale, Tensor) else scale**-0.5
        noise = [
            torch.empty(*lead, *layer.shape, dtype=dtype, device=p.device).normal_(std=std, generator=generator)
            for layer in self.block.layers
        ]
        return [x * scale**-0.5 for x in noise] if isinstance(scale, Tensor) else noise

    def draws(self, generator: torch.Generator | None = None) -> Callable[[torch.Generator | None], list[Tensor]]:
        """A function of the generator that makes draws, each a `sample`. Those of a Kronecker product L ⊗ R share

            L^1/2 S ε R^1/2

        the noise ε and its product with one side; S, random signs of the rows of ε (or of its columns, where these are
        more), is drawn anew. Each is a draw from the Gaussian by itself, and two of them are uncorrelated.
        """
        factor = self.factor
        if not has_two_sides(factor):
            return self.sample
        (noise,) = self._noise(generator, None)
        core = factor.core_of_sample(noise, self.damping)
        by_rows = core.shape[-2] >= core.shape[-1]
        half = factor.right_of_sample(core) if by_rows else factor.left_of_sample(core)
        signs = (*core.shape[:-1], 1) if by_rows else (*core.shape[:-2], 1, core.shape[-1])

        def draw(generator: torch.Generator | None) -> list[Tensor]:
            signed = half * _random_signs(signs, half, generator)
            x = factor.left_of_sample(signed) if by_rows else factor.right_of_sample(signed)
            return self.block.layout.split(self.block.layout.unflatten(x.reshape(noise.shape)))

        return draw

    def precision_times(self, x: list[Tensor]) -> list[Tensor]:
        """Σ^-1 x."""
        joined = self.block.layout.join([at_least_float32(part) for part in x])
        return [y * self.scale for y in self._apply(lambda factor, x: factor.damped_matvec(x, self.damping), joined)]

    def covariance_times(self, x: list[Tensor]) -> list[Tensor]:
        """Σ x."""
        joined = self.block.layout.join([at_least_float32(part) for part in x])
        if self.factor.layer_by_layer:  # one inverse for all of them
            rows, _ = self.factor.damped(self.damping)
            solved = self.block.layout.split(each_of_batch(rows.solve, joined))
        else:
            solved = self._apply(lambda factor, x: factor.solve(x, self.damping), joined)
        return [y / self.scale for y in solved]

    def square(self, x: list[Tensor]) -> Tensor:
        """x^T Σ^-1 x, one number per leading index."""
        pairs = zip(self.block.pieces, x, self.precision_times(x), strict=True)
        sums = [
            (part * y).sum(tuple(range(part.dim() - piece.param.dim(), part.dim()))) if piece.param.dim() else part * y
            for piece, part, y in pairs
        ]
        return torch.stack(sums).sum(0)

    def logdet_precision(self) -> Tensor:
        """log det Σ^-1."""
        logdet = self.factor.logdet(self.damping)
        return logdet + self.size * torch.as_tensor(self.scale, dtype=logdet.dtype, device=logdet.device).log()

    def variances(self) -> list[Tensor]:
        """The diagonal of Σ."""
        diagonal = self.factor.inverse_diag(self.damping)
        layout = self.block.layout
        joined = diagonal if isinstance(diagonal, list) else layout.unflatten(diagonal.reshape(layout.factor_shape))
        return [x / self.scale for x in layout.split(joined)]

    def _apply(self, f: Callable[..., Tensor], joined: list[Tensor]) -> list[Tensor]:
        """f(factor, x) for x [..., g, o, i] of each layer."""
        layout, factor = self.block.layout, self.factor
        if factor.layer_by_layer:
            return layout.split(each_of_batch(lambda x: f(factor, x), joined))  # type: ignore[arg-type, return-value]
        return layout.split(layout.unflatten(f(factor, layout.flatten(joined))))


class Gaussian:
    """N(mean, Σ), independent between blocks.

    mean: by parameter. blocks: what the covariance consists of; parameters that are in none are known exactly.
    """

    def __init__(self, mean: dict[Tensor, Tensor], blocks: list[GaussianBlock]) -> None:
        self.mean, self.blocks = mean, blocks

    @property
    def size(self) -> int:
        """Number of random parameters."""
        return sum(block.size for block in self.blocks)

    def deviation(self, generator: torch.Generator | None = None, count: int | None = None) -> dict[Tensor, Tensor]:
        """A draw around zero by parameter, or `count` of them [count, *shape]; random parameters only."""
        return self._gathered(lambda block: block.sample(generator, count))

    def draws(
        self, generator: torch.Generator | None = None
    ) -> Callable[[torch.Generator | None], dict[Tensor, Tensor]]:
        """A function of the generator that makes draws around zero by parameter, which share what
        `GaussianBlock.draws` says.
        """
        pairs = [(block.block, block.draws(generator)) for block in self.blocks]
        return lambda generator: gathered((block, draw(generator)) for block, draw in pairs)

    def sample(self, generator: torch.Generator | None = None, count: int | None = None) -> dict[Tensor, Tensor]:
        """A draw by parameter, or `count` of them [count, *shape]; of random parameters only."""
        return {p: self.mean[p] + x for p, x in self.deviation(generator, count).items()}

    def variances(self) -> dict[Tensor, Tensor]:
        """The diagonal of Σ by parameter."""
        return self._gathered(lambda block: block.variances())

    def log_prob(self, values: dict[Tensor, Tensor]) -> Tensor:
        """log density at `values` by parameter (leading dimensions are a batch); the random parameters count."""
        total = self._normaliser()
        for block in self.blocks:
            pieces = block.block.pieces
            total = total - 0.5 * block.square(
                [piece.of(values[piece.param] - self.mean[piece.param]) for piece in pieces]
            )
        return total

    def entropy(self) -> Tensor:
        """½ (P + P log 2π - log det Σ^-1)."""
        return 0.5 * self.size - self._normaliser()

    def kl(self, prior_precision: Number) -> Tensor:
        """KL(q || N(0, I / δ)) = ½ (δ tr Σ + δ |μ|² - P - P log δ + log det Σ^-1) over the random parameters."""
        return sum_of_terms([kl_of_block(block, self.mean, prior_precision) for block in self.blocks])

    def _normaliser(self) -> Tensor:
        """½ log det Σ^-1 - ½ P log 2π."""
        logdet = sum_of_terms([block.logdet_precision() for block in self.blocks])
        return 0.5 * (logdet - self.size * math.log(2 * math.pi))

    def _gathered(self, f: Callable[[GaussianBlock], list[Tensor]]) -> dict[Tensor, Tensor]:
        """By parameter, what f says of its pieces in each block."""
        return gathered((block.block, f(block)) for block in self.blocks)


def kl_of_block(block: GaussianBlock, mean: dict[Tensor, Tensor], prior_precision: Number) -> Tensor:
    """The share of one block in `Gaussian.kl`."""
    logdet = block.logdet_precision()
    delta = torch.as_tensor(prior_precision, dtype=logdet.dtype, device=logdet.device)
    trace = sum_of_terms([x.sum() for x in block.variances()])
    norm = sum_of_terms([piece.of(mean[piece.param]).square().sum() for piece in block.block.pieces])
    return 0.5 * (delta * (trace + norm) - block.size * (1 + delta.log()) + logdet)


def _random_signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(generator=generator).mul_(2).sub_(1)


def sum_of_terms(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum() if terms else torch.zeros(())
