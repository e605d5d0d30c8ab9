"""A symmetric matrix over named parameters, and what its eigenvalues tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.checks import check_number, entry_of
from torchcurv.curv.linalg import stochastic as estimate
from torchcurv.curv.linalg.krylov import Eigenpairs, Symmetric
from torchcurv.curv.linalg.stochastic import SpectralDensity

Vector = Tensor | list[Tensor] | dict[str, Tensor]
NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "frobenius": lambda values: values.norm(),
    "spectral": lambda values: values.abs().amax(),
}


class OverParameters:
    """A symmetric matrix C over named parameters, P elements in all, through its products.

    A vector v is flat [P], a batch of columns [P, K], a list like `params`, or a dict by parameter name; the same
    structure comes back. Flat order is that of `torch.nn.utils.parameters_to_vector(params)`.
    """

    _named: dict[str, Tensor]

    @property
    def params(self) -> list[Tensor]:
        return list(self._named.values())

    @property
    def size(self) -> int:
        """P."""
        return sum(p.numel() for p in self.params)

    def matvec(self, v: Vector) -> Any:
        """C v."""
        raise NotImplementedError

    def _columns(self, v: Vector) -> tuple[dict[Tensor, Tensor], Callable[[dict[Tensor, Tensor]], Any]]:
        """(param -> [K, *shape], a function that brings such a dict back to v's structure)."""
        params = self.params
        if isinstance(v, dict):
            if v.keys() != self._named.keys():
                raise ValueError(f"a vector by name needs the names {list(self._named)}; this one has {list(v)}")
            return {p: v[name].unsqueeze(0) for name, p in self._named.items()}, lambda out: {
                name: out[p][0] for name, p in self._named.items()
            }
        if not isinstance(v, Tensor):
            shapes, own = [tuple(t.shape) for t in v], [tuple(p.shape) for p in params]
            if shapes != own:
                raise ValueError(f"a vector as a list needs the shapes {own}; this one has {shapes}")
            return {p: t.unsqueeze(0) for p, t in zip(params, v, strict=True)}, lambda out: [out[p][0] for p in params]
        size = self.size
        if v.dim() not in (1, 2) or v.shape[0] != size:
            raise ValueError(f"a flat vector needs the shape [{size}] or [{size}, K]; this one has {tuple(v.shape)}")
        rows = v.reshape(size, -1).mT.split([p.numel() for p in params], -1)
        columns = {p: row.reshape(-1, *p.shape) for p, row in zip(params, rows, strict=True)}
        return columns, lambda out: torch.cat([out[p].reshape(len(out[p]), -1) for p in params], 1).mT.reshape(v.shape)

    @property
    def _symmetric(self) -> Symmetric:
        p = self.params[0]
        return Symmetric(self.matvec, self.size, torch.promote_types(p.dtype, torch.float32), p.device)

    def eigh(
        self,
        k: int,
        which: str = "largest",
        *,
        tol: float = 1e-3,
        max_products: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Eigenpairs:
        """(values [k], vectors [P, k], residuals [k]), the k eigenpairs furthest out by Lanczos; see `estimate.eigh`.

        which: "largest", "smallest" or "magnitude". tol: residual norm(C x - value x) as a fraction of the largest
        magnitude; the value errs by about the square of that over the gap. max_products: None means 20 k + 200.
        """
        return estimate.eigh(self._symmetric, k, which, tol, max_products, seeded(generator))


def seeded(generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator


class Spectra(OverParameters):
    """What follows from the eigenvalues of each block."""

    blocks: dict[str, Curvature]

    def eigvalsh_by_block(self) -> dict[str, Tensor]:
        """All eigenvalues of each block, ascending."""
        return {name: block.factor.eigvalsh() for name, block in self.blocks.items()}  # type: ignore[union-attr]

    def spectral_density(self, *, width: float | None = None, grid: Tensor | int = 1000) -> SpectralDensity:
        """All P eigenvalues with a Gaussian of standard deviation `width` in place of each; exact: no probes.

        width: None means 1 % of their range. grid: the points, or how many.
        """
        values = torch.cat(list(self.eigvalsh_by_block().values())).unsqueeze(0)
        density = estimate.smoothed(values, torch.full_like(values, 1 / values.numel()), width, grid)
        return density._replace(standard_error=torch.zeros_like(density.density))

    def norm(self, kind: str = "frobenius") -> Tensor:
        """The norm of C: "frobenius" or "spectral"."""
        return entry_of("kind", kind, NORMS)(torch.cat(list(self.eigvalsh_by_block().values())))

    def condition_numbers(self, damping: float | Tensor) -> dict[str, Tensor]:
        """(max + damping) / (min + damping) over the eigenvalues of each block; negative where it is indefinite."""
        if not isinstance(damping, Tensor):
            check_number("damping", damping, lambda x: x >= 0, "a number >= 0")
        found = self.eigvalsh_by_block()
        return {name: (values.amax() + damping) / (values.amin() + damping) for name, values in found.items()}
