"""K-FAC and EK-FAC: C ≈ B ⊗ A over the outputs and inputs of a layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchcurv.curv.approximations.base import Approximation, Basis, Statistic, Tensors, damping_tensor
from torchcurv.curv.approximations.factor import Factor
from torchcurv.curv.approximations.factors import Eigen, KroneckerInverse
from torchcurv.curv.approximations.spectrum import map_negative_eigenvalues
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.linalg.block_diagonal import (
    block_count,
    eigenbasis,
    inverse,
    mean_diagonal,
    norm_of_side,
    side_shape,
    symmetrised,
    times,
    times_left,
    to_blocks,
)
from torchcurv.curv.linalg.symmetric import Damping
from torchcurv.curv.numerics import sum_of
from torchcurv.curv.statistics.block import Stats
from torchcurv.curv.statistics.inputs import Inputs
from torchcurv.curv.statistics.layer import LayerData


@dataclass(frozen=True)
class Sides:
    """How the two sides of a layer's Kronecker product are kept: sizes (o, d) and numbers of diagonal blocks.

    uses: the suffixes of the statistics: "" for the layer as it stands, "_t" for uses of its weight transposed.
    """

    sizes: tuple[int, int]
    blocks: tuple[int, int] = (1, 1)
    uses: tuple[str, ...] = ("",)

    @classmethod
    def of(cls, layer: Layer, factor_blocks: int, max_factor_dim: int | None) -> Sides:
        _, o, d = layer.shape
        left, right = (
            size if tokens else block_count(size, factor_blocks, max_factor_dim)
            for size, tokens in zip((o, d), layer.token_sides, strict=True)
        )
        uses = sorted({site.transposed for site in layer.sites})
        return cls((o, d), (left, right), tuple("_t" if transposed else "" for transposed in uses))


@dataclass(frozen=True)
class Kronecker(Approximation):
    """C ≈ B ⊗ A per group: A = mean a a^T, B = sum s s^T (Martens & Grosse 2015; Eschenhagen et al. 2023).

    sharing: "expand" takes every position as a sample, "reduce" averages a and sums s over positions first. "whole"
        takes the gradient G = sum_r s a^T [o, d] of a sample as it is: B = sum G G^T and A = sum G^T G / sum norm(G)²,
        so that B ⊗ A has the partial traces of C, and is C where that is a Kronecker product; elsewhere it is one step
        of the power iteration towards the nearest one (Morwani et al. 2025, 2406.17748). With one position all are the
        same.
    corrected: keep also the exact second moments in the eigenbasis of B ⊗ A, and use them as its eigenvalues
        (ekfac; George et al. 2018). They are measured in the basis of the last factor and carried to a new one.
    sides: how A and B are kept; None: dense. A weight that is also used transposed (an embedding and its output
        head) has two such products, and C ≈ Σ_k L_k ⊗ R_k becomes the one with the same partial traces,
        Σ_k tr(R_k) L_k ⊗ Σ_k tr(L_k) R_k / Σ_k tr(L_k) tr(R_k).
    of_mean_input: for a Hessian that is propagated, A = (mean a) (mean a)^T over samples, position by position.
    """

    sharing: str = "expand"
    corrected: bool = False
    sides: Sides | None = None
    spectrum: str | None = None
    of_mean_input: bool = False

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """A with the count of its rows, whose scale drops out, and B with the moments in the basis of B ⊗ A."""
        return {
            "A": Statistic(("A", "count", "A_t", "count_t"), False, needs_signals=self.sharing == "whole"),
            "B": Statistic(("B", "B_t", "moments"), True, needs_signals=True),
        }

    def side_names(self, o: int, d: int) -> tuple[str, str]:
        """The sizes of (B, A) as a summary prints them: n² is a matrix, k x m² are blocks, n a diagonal."""
        blocks = (1, 1) if self.sides is None else self.sides.blocks
        shapes = (side_shape(1, size, k) for size, k in zip((o, d), blocks, strict=True))
        left, right = (f"{s[1]}²" if len(s) == 3 else f"{s[1]}" if s[2] == 1 else f"{s[1]} x {s[2]}²" for s in shapes)
        return left, right

    subsampled: ClassVar[bool] = True
    propagated: ClassVar[str | None] = "matrix"

    def describe(self, size: int, shape: tuple[int, int, int]) -> str:
        g, o, d = shape
        left, right = self.side_names(o, d)
        return f"{f'{g} x ' if g > 1 else ''}({left} ⊗ {right})"

    def of_mean_matrix(self, inputs: Inputs, matrix: Callable[[str], Tensor], n: int) -> Tensors:
        left, right = (1, 1) if self.sides is None else self.sides.blocks
        if self.of_mean_input:  # which stands for all samples, also beside those of other micro-batches
            A, count = (n * x for x in inputs.averaged().cov(self.sharing, right))
        else:
            A, count = inputs.cov(self.sharing, right)
        return {"A": A, "count": count, "B": to_blocks(matrix(self.sharing) * n, left)}

    def follow(self, tensors: Tensors, factor: Factor, damping_type: str) -> Factor:
        """The second moments in the basis of the factor are its eigenvalues."""
        if "moments" not in tensors or factor.basis is None:
            return factor
        return Eigen(tensors["moments"], *factor.basis, factor.damping)

    def rebased(self, tensors: Tensors, factor: Factor) -> Tensors:
        if "moments" not in tensors or factor.basis is None:
            return tensors
        return {**tensors, "moments": factor.state()["values"]}

    def measure(self, stats: Stats, basis: Basis | None = None, due: Collection[str] = ("A", "B")) -> Tensors:
        tensors: Tensors = {}
        left, right = (1, 1) if self.sides is None else self.sides.blocks
        for use in stats.only_layer("kfac"):
            suffix, inner, outer = ("_t", left, right) if use.transposed else ("", right, left)
            found: Tensors = {}
            if self.sharing == "whole":
                found = _whole_gradients(use, due, outer, inner, stats.scale)
            else:
                if "A" in due:
                    cov, count = use.inputs.cov(self.sharing, inner)
                    if stats.share != 1:
                        cov, count = cov * stats.share, count * stats.share
                    found = {f"A{suffix}": cov, f"count{suffix}": count}
                if "B" in due:
                    found[f"B{suffix}"] = use.output_cov(self.sharing, outer).mul_(stats.scale)
            for key, value in found.items():
                tensors[key] = tensors[key] + value if key in tensors else value
        if self.corrected and basis is not None and "B" in due:
            tensors["moments"] = stats.squares(*basis)
        return tensors

    def norm_of(self, key: str, value: Tensor) -> Tensor:
        return norm_of_side(value) if key in ("A", "B", "A_t", "B_t") else value.norm()

    def normalised_measurement(self, tensors: Tensors) -> Tensors:
        """What was measured for one step, so that its A has as much weight in an average as that of any other: that of
        whole gradients is large where they are.
        """
        if self.sharing != "whole" or "A" not in tensors:
            return tensors
        A, count = tensors["A"], tensors["count"]
        mean = A / _by_group(count.clamp_min(torch.finfo(count.dtype).tiny), A)
        return {**tensors, "A": mean, "count": (count > 0).to(count.dtype)}

    def product(self, tensors: Tensors, x: Tensor) -> Tensor:
        """B x A for x [g, o, d]."""
        left, right = (symmetrised(side) for side in self.sides_of(tensors))
        return times(times_left(left, x), right)

    def trace(self, tensors: Tensors) -> Tensor:
        if "moments" in tensors:
            return tensors["moments"].sum()
        total = next(iter(tensors.values())).new_zeros(())
        for suffix in ("", "_t"):
            if f"B{suffix}" in tensors:
                of_A, of_B = (_traces(tensors[f"{key}{suffix}"]) for key in "AB")
                count = tensors[f"count{suffix}"]
                total = total + (of_A * of_B / count.clamp_min(torch.finfo(count.dtype).tiny)).sum()
        return total

    def empty(self, layers: list[Layer], like: Tensor) -> Tensors:
        g, o, d = layers[0].shape
        sides = self.sides or Sides((o, d))
        left, right = (like.new_zeros(side_shape(g, *pair)) for pair in zip(sides.sizes, sides.blocks, strict=True))
        tensors: Tensors = {}
        for suffix in sides.uses:
            A, B = (left, right) if suffix else (right, left)
            count = like.new_zeros(g if self.sharing == "whole" else ())
            tensors |= {f"A{suffix}": A.clone(), f"count{suffix}": count, f"B{suffix}": B.clone()}
        return {**tensors, "moments": like.new_zeros(g, o, d)} if self.corrected else tensors

    def factor(
        self, tensors: Tensors, damping: Damping, damping_type: str, basis: Basis | None = None
    ) -> tuple[Factor, Tensor]:
        left, right = self.sides_of(tensors)
        o, d = (left.shape[-1], right.shape[-1]) if self.sides is None else self.sides.sizes
        lam = damping_tensor(damping, left)
        if damping_type == "factored" and not self.corrected and self.spectrum is None:
            shift_right, shift_left = split_damping(mean_diagonal(right, d), mean_diagonal(left, o), lam, (o, d))
            right, ok_right = inverse(right, shift_right, d)
            left, ok_left = inverse(left, shift_left, o)
            return KroneckerInverse(right, left, (o, d)), ok_right & ok_left
        (a, right), (b, left) = eigenbasis(right, d), eigenbasis(left, o)
        if "moments" in tensors and basis is not None:
            values = project_moments(tensors["moments"], basis, (left, right))
        else:
            b = b.clamp_min(0) if self.spectrum is None else b
            values = map_negative_eigenvalues(b.unsqueeze(-1) * a.clamp_min(0).unsqueeze(-2), self.spectrum)
        return Eigen(values, left, right, lam), torch.isfinite(sum_of([values, left, right]))

    def sides_of(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """(B, A), whose lower triangles count."""
        pairs = []
        for suffix in ("", "_t"):
            if f"B{suffix}" in tensors:
                A, count, B = (tensors[f"{key}{suffix}"] for key in ("A", "count", "B"))
                A = A / _by_group(count.clamp_min(torch.finfo(count.dtype).tiny), A)
                pairs.append((A, B) if suffix else (B, A))
        if len(pairs) == 1:
            return pairs[0]
        traces = [[side.diagonal(dim1=-2, dim2=-1).sum() for side in pair] for pair in pairs]
        left = sum(L * tr_right for (L, _), (_, tr_right) in zip(pairs, traces, strict=True))
        right = sum(R * tr_left for (_, R), (tr_left, _) in zip(pairs, traces, strict=True))
        total = sum(tr_left * tr_right for tr_left, tr_right in traces)
        assert isinstance(left, Tensor) and isinstance(right, Tensor) and isinstance(total, Tensor)
        return left, right / total.clamp_min(torch.finfo(total.dtype).tiny)


def _whole_gradients(use: LayerData, due: Collection[str], outer: int, inner: int, scale: Tensor | float) -> Tensors:
    """A = sum G^T G, count = tr A of each group, and B = sum G G^T.

    With one position B ⊗ A / count is what "expand" has, in the same units as with several.
    """
    if use.s.shape[2] > 1:
        A = use.row_gram("right", inner) if "A" in due else None
        B = use.row_gram("left", outer) if "B" in due else None
    else:
        cov, count = use.inputs.cov("expand", inner)
        count = count.clamp_min(torch.finfo(count.dtype).tiny)
        A = cov * _by_group(use.s.square().sum((0, 1, 2, 4)) / count, cov) if "A" in due else None
        B = use.output_cov("expand", outer) if "B" in due else None
        B = None if B is None else B * _by_group(_traces(cov) / count, B)
    found = {} if A is None else {"A": A * scale, "count": _traces(A) * scale}
    return found if B is None else {**found, "B": B * scale}


def _traces(side: Tensor) -> Tensor:
    """tr of each group [g]."""
    return side.diagonal(dim1=-2, dim2=-1).flatten(1).sum(-1)


def _by_group(values: Tensor, side: Tensor) -> Tensor:
    """[g] or [] as factors of a side."""
    return values.reshape(-1, *(1,) * (side.dim() - 1))


def split_damping(mean_a: Tensor, mean_b: Tensor, damping: Tensor, sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Damping of A and of B, [g] each: π sqrt(λ) and sqrt(λ)/π, π² = (tr A / dim A) / (tr B / dim B).

    mean_a, mean_b: the traces over the sizes; sizes: those of B and of A. A factor of size 1 takes none, and the
    other then takes λ over its value; π is 1 where a trace vanishes.
    """
    tiny = torch.finfo(mean_a.dtype).tiny
    safe_a, safe_b = mean_a.clamp_min(tiny), mean_b.clamp_min(tiny)
    known = (mean_a > tiny) & (mean_b > tiny)
    pi = torch.where(known, safe_a / safe_b, 1).sqrt()
    shift_a, shift_b = pi * damping.sqrt(), damping.sqrt() / pi
    if sizes[0] == 1:
        whole = mean_b > tiny
        return torch.where(whole, damping / safe_b, shift_a), torch.where(whole, 0, shift_b)
    if sizes[1] == 1:
        whole = mean_a > tiny
        return torch.where(whole, 0, shift_a), torch.where(whole, damping / safe_a, shift_b)
    return shift_a, shift_b


def project_moments(moments: Tensor, old: Basis, new: Basis) -> Tensor:
    """Diagonal in the new basis of the matrix whose eigenvalues in the old basis are `moments`; keeps the trace."""
    (left, right), (new_left, new_right) = old, new
    return times(times_left((new_left.mT @ left).square(), moments), (new_right.mT @ right).square().mT)
