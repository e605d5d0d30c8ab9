"""K-FAC and EK-FAC: C ≈ B ⊗ A over the outputs and inputs of a layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from torchcurv.curv.approximations.base import Approximation, Averaged, Basis, Forms, Statistic, Tensors, damping_tensor
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
from torchcurv.curv.numerics import chosen, sum_of
from torchcurv.curv.statistics.block import Stats
from torchcurv.curv.statistics.inputs import Inputs
from torchcurv.curv.statistics.layer import LayerData

SUFFIXES = ("", "_t")  # of the statistics of a layer as it stands, and of its weight transposed
ONE = "one"  # the key, with a suffix, that says that B was measured at one position


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


class OneOrMany(Forms):
    """Measured at one position, or at many, for each use."""

    marks: ClassVar = tuple(ONE + suffix for suffix in SUFFIXES)

    def of(self, tensors: Tensors) -> tuple[bool, ...]:
        return tuple(_of_one_position(tensors, suffix) is one for suffix in SUFFIXES for one in (True, False))

    def unified(self, tensors: Tensors, there: Sequence[bool]) -> Tensors:
        for suffix, one, many in zip(SUFFIXES, there[::2], there[1::2], strict=True):
            if one and many:
                tensors = _as_whole(tensors, suffix) if _of_one_position(tensors, suffix) else tensors
                tensors = {key: value for key, value in tensors.items() if key != ONE + suffix}
            elif one and f"count{suffix}" in tensors:
                tensors = {**tensors, f"count{suffix}": tensors[f"count{suffix}"].sum()}
        return tensors


@dataclass(frozen=True)
class Kronecker(Approximation):
    """C ≈ B ⊗ A per group: A = mean a a^T, B = sum s s^T (Martens & Grosse 2015; Eschenhagen et al. 2023).

    sharing: "expand" takes every position as a sample, "reduce" averages a and sums s over positions first. "whole"
        takes the gradient G = sum_r s a^T [o, d] of a sample as it is: B = sum G G^T and A = sum G^T G / sum norm(G)²,
        so that B ⊗ A has the partial traces of C, and is C where that is a Kronecker product; elsewhere it is one step
        of the power iteration towards the nearest one (Morwani et al. 2025, 2406.17748). With one position all are the
        same, and kept as by "expand".
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

    forms: ClassVar[Forms] = OneOrMany()
    symmetric: ClassVar = ("A", "B", "A_t", "B_t")

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """A with the count of its rows, whose scale drops out, and B with the moments in the basis of B ⊗ A."""
        return {
            "A": Statistic(("A", "count", "A_t", "count_t"), False, needs_signals=self.sharing == "whole"),
            "B": Statistic(("B", "B_t", "moments", *(ONE + suffix for suffix in SUFFIXES)), True, needs_signals=True),
        }

    subsampled: ClassVar[bool] = True
    propagated: ClassVar[str | None] = "matrix"

    def describe(self, size: int, shape: tuple[int, int, int]) -> str:
        g, o, d = shape
        left, right = side_names(self.sides, o, d)
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
            if self.sharing == "whole" and use.s.shape[2] > 1:
                found = _whole_gradients(use, due, outer, inner, stats.scale, suffix)
            else:
                if "A" in due:
                    cov, count = use.inputs.cov(self.sharing, inner)
                    if stats.share != 1:
                        cov, count = cov * stats.share, count * stats.share
                    found = {f"A{suffix}": cov, f"count{suffix}": count}
                if "B" in due:
                    found[f"B{suffix}"] = use.output_cov(self.sharing, outer).mul_(stats.scale)
                    if self.sharing == "whole":
                        found[ONE + suffix] = use.s.new_zeros(())
            for key, value in found.items():
                tensors[key] = tensors[key] + value if key in tensors else value
        if self.corrected and basis is not None and "B" in due:
            tensors["moments"] = stats.squares(*basis)
        return tensors

    def norm_of(self, key: str, value: Tensor) -> Tensor:
        return norm_of_side(value) if key in self.symmetric else value.norm()

    def collected(self, held: Tensors, new: Tensors) -> Tensors:
        return super().collected(*_in_one_unit(held, new)) if self.sharing == "whole" else super().collected(held, new)

    def measured_keys(self, new: Tensors) -> AbstractSet[str]:
        return {key for key in new if not key.startswith(ONE)}

    def averaged(
        self, old: Tensors, new: Tensors, total: Tensor | None, shares: Mapping[str, Tensor], track_change: bool
    ) -> Averaged:
        if self.sharing != "whole":
            return super().averaged(old, new, total, shares, track_change)
        before, now = _averageable(old, new)
        found = super().averaged(before, now, total, shares, track_change)
        return replace(found, tensors={**{k: x for k, x in before.items() if x is not old[k]}, **found.tensors})

    def product(self, tensors: Tensors, x: Tensor) -> Tensor:
        """B x A for x [g, o, d]."""
        left, right = (symmetrised(side) for side in self.sides_of(tensors))
        return times(times_left(left, x), right)

    def trace(self, tensors: Tensors) -> Tensor:
        if "moments" in tensors:
            return tensors["moments"].sum()
        total = next(iter(tensors.values())).new_zeros(())
        for suffix in SUFFIXES:
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
            tensors |= {f"A{suffix}": A.clone(), f"count{suffix}": count.clone(), f"B{suffix}": B.clone()}
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
        (a, right), (b, left) = eigenbasis(right, d), eigenbasis(left, o, self.spectrum is None)
        if "moments" in tensors and basis is not None:
            values = project_moments(tensors["moments"], basis, (left, right))
        else:
            values = map_negative_eigenvalues(b.unsqueeze(-1) * a.unsqueeze(-2), self.spectrum)
        return Eigen(values, left, right, lam), torch.isfinite(sum_of([values, left, right]))

    def sides_of(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """(B, A), whose lower triangles count."""
        pairs = []
        for suffix in SUFFIXES:
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


def side_names(sides: Sides | None, o: int, d: int) -> tuple[str, str]:
    """The sizes of (B, A) as a summary prints them: n² is a matrix, k x m² are blocks, n a diagonal."""
    blocks = (1, 1) if sides is None else sides.blocks
    shapes = (side_shape(1, size, k) for size, k in zip((o, d), blocks, strict=True))
    left, right = (f"{s[1]}²" if len(s) == 3 else f"{s[1]}" if s[2] == 1 else f"{s[1]} x {s[2]}²" for s in shapes)
    return left, right


def _whole_gradients(
    use: LayerData, due: Collection[str], outer: int, inner: int, scale: Tensor | float, suffix: str
) -> Tensors:
    """A = sum G^T G, count = tr A of each group, and B = sum G G^T."""
    found: Tensors = {}
    if "A" in due:
        A = use.row_gram("right", inner) * scale
        found = {f"A{suffix}": A, f"count{suffix}": _traces(A)}
    if "B" in due:
        found[f"B{suffix}"] = use.row_gram("left", outer) * scale
    return found


# What was measured at one position is in the units of "expand", with one number as the count of A, and ONE beside B.
# The averages have a count for each group in both units; in those of whole gradients it is tr A.


def _in_one_unit(held: Tensors, new: Tensors) -> tuple[Tensors, Tensors]:
    """Two measurements in the units of whole gradients, where one of them has these."""
    for suffix in SUFFIXES:
        one = {_of_one_position(tensors, suffix) for tensors in (held, new)}
        if one == {True, False}:
            held, new = (
                _as_whole(tensors, suffix) if _of_one_position(tensors, suffix) else tensors for tensors in (held, new)
            )
    return held, new


def _of_one_position(measured: Tensors, suffix: str) -> bool | None:
    """Whether a use was measured at one position, in the units of "expand"; None: it was not."""
    if f"count{suffix}" in measured:
        return not measured[f"count{suffix}"].dim()
    return ONE + suffix in measured if f"B{suffix}" in measured else None


def _averageable(old: Tensors, new: Tensors) -> tuple[Tensors, Tensors]:
    """Averages and a measurement in one unit, where that of whole gradients has an A of trace 1, so that every step
    has the same weight."""
    before, now = dict(old), {key: value for key, value in new.items() if not key.startswith(ONE)}
    for suffix in SUFFIXES:
        keys = [f"{name}{suffix}" for name in ("A", "count", "B")]
        own = {key: now[key] for key in keys if key in now}
        one = _of_one_position(new, suffix)
        if one is None:
            continue
        if f"count{suffix}" in own:
            own[keys[1]] = own[keys[1]].expand(_traces(own[keys[0]]).shape)
        whole = _normalised(_as_whole(own, suffix) if one else own, suffix)
        if keys[0] not in old:
            now |= own if one else whole
            continue
        held = {key: old[key] for key in keys if key in old}
        is_whole = _is_whole(old[keys[0]], old[keys[1]])
        if one:  # a B whose A is not known has no units of whole gradients, and is left out
            now |= {key: chosen(is_whole, whole.get(key, held.get(key, x)), x) for key, x in own.items()}
        else:
            now |= whole
            changed = _normalised(_as_whole(held, suffix), suffix)
            before |= {key: chosen(is_whole, x, changed[key]) for key, x in held.items()}
    return before, now


def _is_whole(A: Tensor, count: Tensor) -> Tensor:
    """Whether an average has the units of whole gradients. (Where tr A is n by chance, both are the same.)"""
    return ((_traces(A) - count).abs() <= 1e-4 * count).all()


def _as_whole(tensors: Tensors, suffix: str) -> Tensors:
    """B tr A / n, and A tr B / n with its trace as the count, of what was measured at one position."""
    A, B, count = (tensors.get(f"{key}{suffix}") for key in ("A", "B", "count"))
    rest = {key: value for key, value in tensors.items() if key not in (ONE + suffix, f"B{suffix}")}
    if A is None or count is None:
        return rest
    n = count.clamp_min(torch.finfo(count.dtype).tiny)
    of_A = _traces(A) / n
    if B is None:
        return {**rest, f"A{suffix}": A / _by_group(n, A), f"count{suffix}": of_A}
    A = A * _by_group(_traces(B) / n, A)
    return {**rest, f"A{suffix}": A, f"count{suffix}": _traces(A), f"B{suffix}": B * _by_group(of_A, B)}


def _normalised(tensors: Tensors, suffix: str) -> Tensors:
    """With an A of trace 1: that of whole gradients is large where they are."""
    if f"A{suffix}" not in tensors:
        return tensors
    A, count = tensors[f"A{suffix}"], tensors[f"count{suffix}"]
    mean = A / _by_group(count.clamp_min(torch.finfo(count.dtype).tiny), A)
    return {**tensors, f"A{suffix}": mean, f"count{suffix}": (count > 0).to(count.dtype)}


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
