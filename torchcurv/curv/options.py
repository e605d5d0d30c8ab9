"""Options of curvature: each is declared once, with its default and its check."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from torchcurv.curv.approximations.spectrum import SPECTRA
from torchcurv.curv.approximations.table import APPROXIMATIONS
from torchcurv.curv.checks import Interval, check_interval, check_number
from torchcurv.curv.hessian.local import RESIDUALS
from torchcurv.curv.kinds.base import INPUT, SECOND
from torchcurv.curv.kinds.table import KINDS

PARTITIONS = (None, "all", "group", "layer", "parameter")
HESSIAN_METHODS = (None, "exact", "hutchinson", "propagate", "price")
_ALLOWED: dict[str, Collection[Any]] = {
    "curv_type": KINDS,  # which `register_kind` adds to
    "approx": (*APPROXIMATIONS, None),
    "sharing": ("expand", "reduce", "whole"),
    "damping_type": ("factored", "exact"),
    "hessian_method": HESSIAN_METHODS,
    "indefinite": SPECTRA,
    "residual": tuple(RESIDUALS),
    "partition": PARTITIONS,
}
_METHODS_OF: dict[str | None, tuple[str, ...]] = {
    "diag": ("propagate", "exact", "hutchinson", "price"),
    "kfac": ("propagate",),
}


@dataclass(frozen=True)
class Options:
    """The curvature options of one block.

    curv_type: "ggn", "fisher", "empirical_fisher", "hessian", or "input": C = I ⊗ A over a weight, A = mean a a^T of
        what came into its layer, and 0 over a bias, whatever the loss; for approx="kfac" (or None). The direction
        of a step is then λ (C + λ I)^-1 g, which for λ -> ∞ is g; with ema_decay=0, update_every=1, refactor_every=1
        and damping_type="factored" it goes through the rows a where they are fewer than the inputs.
    approx: "full", "block", "unit", "kfac", "ekfac", "diag", "lowrank", or None for the plain gradient.
    partition: what one block of "full" and "lowrank" covers: "all" parameters with equal options (None, the default),
        those of a "group", a "layer", or a "parameter".
    rank: how many eigenpairs "lowrank" keeps, those of largest magnitude.
    samples: signals drawn per pass (random signs for the ggn, labels for the Fisher); None sends all of them.
    sharing: how K-FAC treats positions that share a weight. "expand": each is a sample of its own, as if their signals
        were independent. "reduce": inputs are averaged and signals added up over them first, as if each position had
        the same. "whole": the gradient G of a sample is taken as it is, A = Σ G^T G / Σ norm(G)² and B = Σ G G^T; then
        B ⊗ A has the partial traces of C, and is C wherever that is a Kronecker product. With one position per sample
        there is no difference. Embeddings, weights that unlike modules share, and curv_type="hessian" and "input" take
        it for "expand".
    damping: λ of (C + λ I)^-1, in units of the loss per squared parameter; > 0 for a step.
    damping_type: "exact" Tikhonov through eigenvectors, or "factored" over the Kronecker factors by Cholesky.
    ema_decay: the fraction ρ of the old that a running average keeps per step (ρ^k over the k steps between two
        measurements), 0 <= ρ <= 1; 1 is the plain mean.
    update_every, refactor_every: steps between two measurements, and between two factorisations: an int, a callable
        of the step, or "adaptive". Then each statistic (A and B of K-FAC on their own) is measured ever more rarely
        while its running average moves by less than `refresh_tol` (schedule.py), at most `refresh_cap` steps apart and
        on each of the first `refresh_warmup`. A factor is computed anew
        when a statistic has moved by refresh_tol since the last, or the damping by a tenth.
    rows_limit: a dense block with more parameters than this goes through the Gram matrix of its rows (one row
        per sample and signal) and never forms its matrix. Such a block has no running average. Of more rows than this
        "lowrank" keeps the `rank` largest eigenpairs at once, and goes on with them.
    hessian_method: of curv_type="hessian": "exact" (products with unit vectors), "hutchinson" for "diag" (`samples`
        products with random signs), "price" for "diag" of a VIOptimizer (from its draws and their gradients, without
        a pass), or "propagate" for "diag" (HesScale) and "kfac" (HBP). None: "propagate" for these two, else "exact".
    residual: what propagation does with second derivatives of activations, sample by sample: "keep", "zero" (Gauss-
        Newton), "abs", "clip".
    max_hessian_dim: the largest number of elements of a sample that "kfac" of the Hessian carries a matrix over.
    indefinite: what becomes of negative eigenvalues of the Hessian (or entries of its diagonal): "abs", "clip" (zero),
        "shift" (all are raised until the least is zero), or "keep", which can only be looked at.
    factor_blocks: K-FAC keeps this many diagonal blocks of each of its two factors; 1 keeps the whole.
    max_factor_dim: of a K-FAC factor, or of the matrix of a unit, larger than this only the diagonal is kept; None:
        no limit. The vocabulary side of an embedding is always a diagonal.
    max_positions: K-FAC statistics of a layer that is used at more positions of a batch (samples times pixels, or
        tokens) are those of every k-th sample, k = ceil(positions / max_positions), and of one at least; None: of all
        samples. For "kfac" and "ekfac", but not for curv_type="input" and "hessian".
    """

    curv_type: str = "ggn"
    approx: str | None = "kfac"
    samples: int | None = 1
    sharing: str = "expand"
    damping: float | Tensor = 0.1
    damping_type: str = "factored"
    ema_decay: float = 0.95
    update_every: Interval = 1
    refactor_every: Interval = 1
    refresh_tol: float = 0.1
    refresh_cap: int = 100
    refresh_warmup: int = 10
    rows_limit: int = 2048
    hessian_method: str | None = None
    residual: str = "keep"
    max_hessian_dim: int = 2048
    indefinite: str = "abs"
    factor_blocks: int = 1
    max_factor_dim: int | None = 8192
    max_positions: int | None = None
    partition: str | None = None
    rank: int = 16

    def __post_init__(self) -> None:
        for key, allowed in _ALLOWED.items():
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"{key}={getattr(self, key)!r} is unknown; allowed are {', '.join(map(repr, allowed))}"
                )
        if self.curv_type == SECOND:
            self._check_hessian()
        if self.partition not in (None, "layer") and self.approx not in ("full", "lowrank", None):
            raise ValueError(
                f'partition={self.partition!r} with approx={self.approx!r}; it is for "full" and "lowrank"; every '
                "other approximation is made layer by layer"
            )
        if self.curv_type == INPUT and self.approx not in ("kfac", None):
            raise ValueError(
                f'curv_type="input" with approx={self.approx!r}: it is the A of K-FAC, known as no other '
                'approximation: write approx="kfac"'
            )
        samples = self.samples
        if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
            raise ValueError(f"samples={samples!r}; pass an int of at least 1, or None for the exact curvature")
        for key in ("update_every", "refactor_every"):
            check_interval(key, getattr(self, key))
        check_number(
            "ema_decay", self.ema_decay, lambda x: 0 <= x <= 1, "a number between 0 (no memory) and 1 (plain mean)"
        )
        if not isinstance(self.damping, Tensor):
            check_number("damping", self.damping, lambda x: 0 <= x < math.inf, "a finite number >= 0, or a 0-d tensor")
        elif self.damping.dim():
            raise ValueError(f"damping is a tensor of shape {tuple(self.damping.shape)}; pass a number or a 0-d tensor")
        check_number("refresh_tol", self.refresh_tol, lambda x: 0 < x < math.inf, "a number > 0")
        check_number("refresh_warmup", self.refresh_warmup, lambda x: x >= 0 and x == int(x), "an int of at least 0")
        for key, other in (
            ("refresh_cap", ""),
            ("rows_limit", ""),
            ("factor_blocks", ""),
            ("max_hessian_dim", ""),
            ("rank", ""),
            ("max_factor_dim", ", or None for no limit"),
            ("max_positions", ", or None for no limit"),
        ):
            value = getattr(self, key)
            if value is None and other:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{key}={value!r}; pass an int of at least 1{other}")

    def _check_hessian(self) -> None:
        if self.approx == "ekfac":
            raise ValueError(
                'approx="ekfac" of the Hessian is not known: choose "full", "block", "unit", "kfac", "diag" or '
                '"lowrank", or curv_type="ggn"'
            )
        allowed = _METHODS_OF.get(self.approx, ("exact",))
        if self.approx is not None and self.hessian_method not in (None, *allowed):
            raise ValueError(
                f"hessian_method={self.hessian_method!r} with approx={self.approx!r}; allowed are "
                f"{', '.join(map(repr, allowed))}"
            )

    @property
    def method(self) -> str:
        """hessian_method, with what None stands for."""
        return self.hessian_method or _METHODS_OF.get(self.approx, ("exact",))[0]

    @property
    def covers(self) -> str:
        """partition, with what None stands for."""
        return self.partition or ("all" if self.approx in ("full", "lowrank") else "layer")


OPTION_NAMES = tuple(f.name for f in fields(Options))
# The options that decide what a block keeps; the others are read when they are needed.
STRUCTURE = (
    "curv_type", "approx", "samples", "sharing", "damping_type", "rows_limit", "factor_blocks", "max_factor_dim",
    "hessian_method", "residual", "max_hessian_dim", "indefinite", "max_positions", "partition", "rank",
)  # fmt: skip
