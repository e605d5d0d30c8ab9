"""Curvature: one block of the loss's curvature. Plain tensors in, plain tensors out.

It holds what was measured since the last step (`pending`), the running average (`tensors`), and the factor.
A block is one layer, or for "full" all the layers that ask for it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.approximations.base import Tensors, part_of
from torchcurv.curv.approximations.factors import Factor, LowRank, factor_from_state
from torchcurv.curv.approximations.rows import RowSpace, row_count
from torchcurv.curv.approximations.table import APPROXIMATIONS
from torchcurv.curv.block.refresh import Pace
from torchcurv.curv.hessian.products import Products
from torchcurv.curv.kinds.base import INPUT, SECOND
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.linalg.krylov import Symmetric, eigh
from torchcurv.curv.numerics import at_least_float32, on_cpu, random_signs, sum_of
from torchcurv.curv.options import STRUCTURE_NAMES, Options
from torchcurv.curv.statistics.block import Stats


class Curvature:
    """One block: its layers, options, measurements, running average and factor."""

    def __init__(self, name: str, layers: list[Layer], options: Options) -> None:
        assert options.approx is not None
        self.name, self.layers, self.options = name, layers, options
        self.size = sum(torch.Size(layer.shape).numel() for layer in layers)
        self.approx: Any = APPROXIMATIONS[options.approx](options, layers).fitted(self.size)
        dense = options.approx in ("full", "block")
        self.uses_rows = dense and self.size > options.rows_limit
        self.kind = options.curv_type  # which signals it is sent
        if self.uses_rows and options.curv_type == SECOND:
            raise ValueError(
                f"block {name!r} has {self.size} parameters, and its Hessian is kept as a matrix: raise rows_limit="
                f'{options.rows_limit}, or choose approx="unit" or "diag"'
            )
        # Its rows hold what one step measured: no average, nothing to save.
        self.input_rows = self.approx.of_one_step
        self.pieces = [piece for layer in layers for piece in layer.pieces]
        self.params = list(dict.fromkeys(piece.param for piece in self.pieces))
        self.next_update = self.next_refactor = 0  # the steps at which a measurement and a factorisation are due
        self.paces = {part: Pace() for part in self.approx.parts}  # where the intervals are adaptive
        self.drifts = dict.fromkeys(self.approx.parts, math.inf)  # moves since the last factorisation, added up
        self.wanted: Collection[str] = self.approx.parts  # what the next passes measure
        self.changes: Tensors = {}  # by part, how far the last measurement moved it
        self.pending: Tensors = {}
        self.pending_sum: Tensor | None = None  # of all its values: finite if they are
        self.pending_rows: list[Any] = []  # rows (Stats), or eigenpairs of earlier ones
        self.task: int | None = None  # the backward call that the last measurement belongs to
        self.tensors: Tensors = {}
        self.weights: Tensors = {}
        self.factor: Factor | None = None
        self.factor_damping = math.nan  # of the factor; unknown where it came as a tensor
        self.draws_apart = False  # whether draws have a factor of their own, of another damping than that of the step
        self.draw_factor: Factor | None = None
        self.draw_damping = math.nan
        self.flags: Tensor | None = None  # how many measurements were not finite, how many factorisations failed
        self.reported = (0, 0)  # what was last read of them
        self.measurements = self.factorisations = 0  # so far
        self.measured_at: dict[str, int] = {}  # by part, the step of the last measurement
        self.retry = False  # the last factorisation failed: the next is in float64 with more damping

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two blocks the same: the structure and the parameters."""
        pieces = ((p, rows and rows.start, rows and rows.stop) for p, rows in self.pieces)
        return self.kind, *(getattr(self.options, name) for name in STRUCTURE_NAMES), self.input_rows, *pieces

    @property
    def state_key(self) -> str:
        """Under which the state of the first parameter keeps the block: several may share the rows of one."""
        rows = self.pieces[0].rows
        return "curvature" if rows is None else f"curvature:{rows.start}"

    # -------------------------------------------------------------------------------- measuring

    @property
    def by_passes(self) -> bool:
        """Whether curvature passes measure it; Price's estimate of the Hessian is made from draws."""
        return self.kind != SECOND or self.options.method != "price"

    @property
    def captured(self) -> bool:
        return bool(self.pending or self.pending_rows)

    def forget_pending(self) -> None:
        self.pending, self.pending_sum, self.pending_rows = {}, None, []

    def forget_running(self) -> None:
        """Forget the running averages but not the factor, whose basis the next measurement may ask for."""
        self.tensors, self.weights = {}, {}

    def begin(self, task: int) -> None:
        """A pass of backward call `task` starts: forget what was measured for gradients that are gone since
        (zero_grad, a step that a GradScaler skipped)."""
        if task != -1 and self.task != task and all(p.grad is None for p in self.params):
            self.forget_pending()
        self.task = task

    @torch.no_grad()
    def measure(self, stats: Stats) -> None:
        """Add one chunk of signals to what was measured since the last step."""
        if self.uses_rows or self.approx.keeps_rows:
            self._keep_rows(stats)
            return
        self.add(self.approx.measure(stats, self.basis, self.wanted))

    def _keep_rows(self, stats: Stats) -> None:
        """Rows until the step; of too many for their Gram matrix, the largest eigenpairs."""
        if self.uses_rows:
            self.pending_rows.append(stats)
            return
        for part in stats.parts(self.options.rows_limit):
            self.pending_rows.append(part)
            if row_count(self.pending_rows) > self.options.rows_limit:
                pairs, ok = self.approx.merged([(1.0, self.pending_rows)])
                self.pending_rows = [replace(pairs, values=torch.where(ok, pairs.values, math.nan))]

    def add(self, measured: Tensors) -> None:
        """Add statistics to what was measured since the last step."""
        total = sum_of(list(measured.values()))  # here, where they are still in the cache
        self.pending_sum = total if self.pending_sum is None else self.pending_sum + total
        for key, value in measured.items():
            self.pending[key] = self.approx.added(key, self.pending[key], value) if key in self.pending else value

    @torch.no_grad()
    def differentiate(self, products: Products, generator: torch.Generator | None = None) -> None:
        """Add the Hessian of one loss: what the approximation keeps of its rows, or of products with random signs."""
        if self.options.method == "price":
            raise ValueError('hessian_method="price" is an estimate over draws of a posterior: use VIOptimizer')
        if self.options.method == "hutchinson":
            draws = self.options.samples or 1
            z = random_signs(products.first[0].new_empty(draws, self.size), generator)
            product = self._coordinates(products(self.of_parameters(z, products.params)))
            self.add({"diag": (z * product).mean(0).reshape(self.layers[0].shape)})
            return
        if self.approx.keeps_rows:
            self.pending_rows.append(self._largest(products, generator))
            return
        for start, rows in products.rows(self.size, lambda units: self.of_parameters(units, products.params)):
            self.add(self.approx.of_rows(start, self._coordinates(rows), [layer.shape for layer in self.layers]))

    def of_parameters(self, x: Tensor, params: list[Tensor]) -> list[Tensor]:
        """Vectors over the coordinates of the factor [k, size] -> [k, *shape] for each parameter."""
        parts = self.split(self.unflatten(x.reshape(-1, *self.factor_shape)))
        whole = {p: x.new_zeros(len(x), *p.shape) for p in params}
        for piece, part in zip(self.pieces, parts, strict=True):
            piece.of(whole[piece.param]).copy_(part)
        return list(whole.values())

    def _largest(self, products: Products, generator: torch.Generator | None) -> LowRank:
        """The eigenpairs of largest magnitude of the Hessian of one loss, by Lanczos."""
        first = products.first[0]
        like = torch.zeros((), dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)
        if not torch.isfinite(sum_of(list(products.first))):
            return LowRank(like.new_full((self.approx.rank,), math.nan), like.new_zeros(self.approx.rank, self.size))

        def times(x: Tensor) -> Tensor:
            return self._coordinates(products(self.of_parameters(x.mT, products.params))).mT

        found = eigh(
            Symmetric(times, self.size, like.dtype, like.device), self.approx.rank, "magnitude", generator=generator
        )
        return LowRank(found.values, found.vectors.mT)

    def _coordinates(self, tensors: list[Tensor]) -> Tensor:
        """The inverse of `of_parameters`, of what belongs to the block."""
        by_param = dict(zip(self.params, tensors, strict=True))
        joined = self.join([piece.of(by_param[piece.param]) for piece in self.pieces])
        return self.flatten(joined).flatten(1)

    @property
    def factor_shape(self) -> tuple[int, int, int]:
        """(g, o, i) of one tensor over the block's coordinates."""
        return self.layers[0].shape if len(self.layers) == 1 else (1, 1, self.size)

    @property
    def basis(self) -> tuple[Tensor, Tensor] | None:
        return None if self.factor is None else self.factor.basis

    # -------------------------------------------------------------------------- running average

    @torch.no_grad()
    def update(self, ema_decay: float, follow: bool = True, step: int | None = None, watched: bool = False) -> None:
        """Merge what is pending into the running average: w <- ρ^k w + 1, X <- X + (X_new - X) / w.

        follow: whether the factor takes over what it can; a factorisation that comes next does that anyway.
        step: of the optimizer, k = 1 without; k are the steps since the last measurement, so that the memory in steps
        does not depend on how often one measures. watched: let `changes` say how far the averages move.
        A measurement with a value that is not finite is left out and counted.
        """
        self._check_rows()
        self.measurements += 1
        if self.uses_rows:
            self.factor = RowSpace(tuple(self.pending_rows))
            self.forget_pending()
            return
        if self.approx.keeps_rows:
            self._merge(ema_decay ** self._since("values", step), watched)
            if step is not None:
                self.measured_at[""] = step
            if follow:
                self._follow()
            return
        if self.input_rows:
            if ema_decay:
                raise ValueError(
                    f"block {self.name!r} was built with ema_decay=0, so that it keeps no running average, and has "
                    f"ema_decay={ema_decay} now: build the optimizer with ema_decay > 0"
                )
            self.forget_running()
        new = self.pending
        assert self.pending_sum is not None
        ok = torch.isfinite(self.pending_sum)
        self.forget_pending()
        self._count(0, ~ok)
        new = self.approx.of_equal_weight(new)
        for key, value in new.items():
            if key not in self.weights:
                self.weights[key], self.tensors[key] = value.new_zeros(()), torch.zeros_like(value)
            old, weight = self.tensors[key], self.weights[key]
            faded = weight * ema_decay ** self._since(key, step)
            grown = faded + 1
            if watched and value.dim():
                moved = 1 / grown * torch.dist(value, old) / old.norm()
                self._note_change(key, torch.where(old.any(), moved, math.inf))
            if not on_cpu(ok):
                self.weights[key] = torch.where(ok, grown, faded)
                self.tensors[key] = torch.where(ok, old.lerp(value, 1 / grown), old)
            else:
                self.weights[key] = grown if ok else faded
                if ok:
                    old.lerp_(value, 1 / grown)
        if step is not None:
            self.measured_at |= {part_of(key, self.approx.parts): step for key in new}
        if follow:
            self._follow()

    def _since(self, key: str, step: int | None) -> int:
        """Steps since the last measurement of a statistic."""
        last = self.measured_at.get(part_of(key, self.approx.parts))
        return 1 if step is None or last is None else max(1, step - last)

    def _note_change(self, key: str, change: Tensor) -> None:
        """The largest relative move of the statistics of a part; infinite for the first measurement."""
        part = part_of(key, self.approx.parts)
        self.changes[part] = torch.maximum(self.changes[part], change) if part in self.changes else change

    def decide(self, step: int | None, changes: dict[str, float]) -> None:
        """Take note of how far each part moved and, at a step of an adaptive interval, when it is measured next."""
        options = self.options
        for part, change in changes.items():
            self.drifts[part] += change
            if step is not None:
                self.paces[part].decide(step, change, options.refresh_tol, options.refresh_cap, options.refresh_warmup)
        self.changes = {}
        if step is not None:
            self.next_update = min(pace.next for pace in self.paces.values())

    def want(self, step: int | None) -> None:
        """Measure what is due at a step of an adaptive interval; None: everything."""
        due = [part for part, pace in self.paces.items() if step is None or step >= pace.next]
        self.wanted = due or self.approx.parts

    @property
    def moved(self) -> bool:
        """Whether a statistic has moved by the tolerance since the last factorisation."""
        return any(not drift < self.options.refresh_tol for drift in self.drifts.values())

    @property
    def inputs_alone(self) -> bool:
        """Whether what came in is all that is measured: no signal needs to be sent."""
        alone = tuple(self.wanted) == ("A",) and not self.approx.needs_all_signals
        return self.kind == INPUT or (self.kind != SECOND and alone)

    def _check_rows(self) -> None:
        """Rows are read when they are used, after the backward pass that brought them."""
        for stats in self.pending_rows:
            if stats.edited:
                raise RuntimeError(
                    f"the inputs of block {self.name!r} were edited in place between backward() and step(): its "
                    "curvature is found from them in step(). Give every batch a tensor of its own"
                )

    def _merge(self, faded: float, watched: bool) -> None:
        """The running average of a block that keeps its largest eigenpairs: those of the weighted sum.

        faded: what is left of the old weight.
        """
        new = self.pending_rows
        self.forget_pending()
        p = self.params[0]
        zero = p.new_zeros((), dtype=torch.promote_types(p.dtype, torch.float32))
        before = self.weights.get("values", zero)
        old = self.tensors or self.approx.empty(self.layers, zero)
        weight = before * faded + 1
        merged, ok = self.approx.merged([(1 / weight, new), (1 - 1 / weight, [LowRank(**old)])])
        self._count(0, ~ok)
        if watched:
            known = old["values"].any()
            self._note_change("values", torch.where(known, merged.distance(LowRank(**old)), math.inf))
        self.tensors = {key: torch.where(ok, getattr(merged, key), value) for key, value in old.items()}
        self.weights = dict.fromkeys(old, torch.where(ok, weight, before * faded))

    def _follow(self) -> None:
        """Statistics that are eigenvalues in the basis of the factor, or all of it, reach it at once."""
        if self.factor is not None:
            self.factor = self.approx.follow(self.tensors, self.factor, self.options.damping_type)

    def _count(self, which: int, bad: Tensor) -> None:
        if on_cpu(bad) and not bad:
            return
        if self.flags is None:
            self.flags = torch.zeros(2, dtype=torch.int32, device=bad.device)
        self.flags[which] += bad

    def scale_pending(self, factor: Tensor | float) -> None:
        """Multiply what was measured since the last step and scales with the loss."""
        for key in self.approx.linear:
            if key in self.pending:
                self.pending[key].mul_(factor)
        self.pending_rows = [part.scaled(factor) for part in self.pending_rows]

    def count_skipped(self) -> None:
        """What was measured was not finite, and is left out."""
        self._count(0, torch.ones((), dtype=torch.bool, device=self.params[0].device))

    def scale(self, factor: Tensor | float) -> None:
        """Multiply the statistics that scale with the loss."""
        if self.uses_rows and self.factor is not None:
            self.factor = self.factor.scaled(factor)
        for key in self.approx.linear:
            if key in self.tensors:
                self.tensors[key] = self.tensors[key] * factor

    # -------------------------------------------------------------------------------- factoring

    @property
    def measured(self) -> bool:
        return bool(self.tensors) or (self.uses_rows and self.factor is not None)

    @property
    def has_factor(self) -> bool:
        return self.factor is not None and self.factor.ready

    @torch.no_grad()
    def refactor(
        self, damping: float | Tensor, draw_damping: float = math.nan, said: float | Tensor | None = None
    ) -> None:
        """Compute the factor anew; where that fails the last good one stays, and the failure is counted.

        draw_damping: that of `draw_factor`, where draws have one of their own. said: what the user calls its damping;
        None: the damping itself.
        """
        old, again, self.retry = self.factor, self.retry, False
        self.factorisations += 1
        if isinstance(old, RowSpace):
            self.factor, ok = old.damped(10 * damping if again else damping, again)
            assert self.factor.finite is not None
            self._count(0, ~self.factor.finite)
        else:
            new, ok = self._factorise(damping, again)
            self.factor = new if old is None else _choose(ok, new, old)
            self.tensors = self.approx.rebased(self.tensors, self.factor)
            if self.draws_apart:
                apart, fine = self._factorise(draw_damping, again)
                self.draw_factor = apart if self.draw_factor is None else _choose(fine, apart, self.draw_factor)
                self.draw_damping, ok = draw_damping, ok & fine
        self._count(1, ~ok)
        self.drifts = dict.fromkeys(self.approx.parts, 0.0)
        said = damping if said is None else said
        self.factor_damping = math.nan if isinstance(said, Tensor) else float(said)

    def _factorise(self, damping: float | Tensor, again: bool) -> tuple[Factor, Tensor]:
        """(the factor of the running average, whether it succeeded); again: in float64 and with more damping."""
        if not again:
            return self.approx.factor(self.tensors, damping, self.options.damping_type, self.basis)
        doubled = {key: value.double() for key, value in self.tensors.items()}
        basis = None if self.basis is None else (self.basis[0].double(), self.basis[1].double())
        new, ok = self.approx.factor(doubled, 10 * damping, self.options.damping_type, basis)
        dtype = next(iter(self.tensors.values())).dtype
        return new.with_tensors({key: value.to(dtype) for key, value in new.state().items()}), ok

    def mean_eigenvalue(self) -> Tensor:
        """Its magnitude, a 0-d tensor; of what has been measured."""
        trace = self.factor.trace() if self.uses_rows and self.factor else self.approx.trace(self.tensors)
        return trace.abs().clamp_min(torch.finfo(trace.dtype).tiny * 1e6) / self.size

    def effective_dimension(self, damping: float | Tensor) -> Tensor:
        """tr C (C + damping I)^-1, a 0-d tensor: in how many directions the curvature outweighs the damping."""
        if self.factor is None:
            raise RuntimeError(f"the curvature of block {self.name!r} has not been measured yet")
        return self.factor.effective_dimension(damping, lambda: self.approx.sides_of(self.tensors))

    def bakes_damping(self) -> bool:
        """Whether the factor holds its damping, so that another damping asks for another factor."""
        return self.factor is None or self.factor.holds_damping

    # ---------------------------------------------------------------------------------- reading

    def join(self, tensors: list[Tensor]) -> list[Tensor]:
        """Tensors shaped like `pieces` -> one [..., g, o, i] per layer."""
        joined = []
        for layer in self.layers:
            own, tensors = tensors[: len(layer.pieces)], tensors[len(layer.pieces) :]
            joined.append(layer.join(own))
        return joined

    def split(self, joined: list[Tensor]) -> list[Tensor]:
        return [part for layer, x in zip(self.layers, joined, strict=True) for part in layer.split(x)]

    def solve(self, tensors: list[Tensor], damping: float | Tensor | None = None) -> list[Tensor]:
        """(C + damping I)^-1 applied to tensors shaped like `pieces` (leading dimensions are a batch)."""
        return self._apply("solve", tensors, damping)

    def direction(self, tensors: list[Tensor], damping: float | Tensor | None = None) -> list[Tensor]:
        """What a step takes in the place of a gradient: `solve`, and for curv_type="input" λ times that."""
        solved = self.solve(tensors, damping)
        if self.options.curv_type != INPUT:
            return solved
        assert self.factor is not None
        held = self.factor.damping if damping is None else damping
        assert held is not None
        return [x * held for x in solved]

    def matvec(self, tensors: list[Tensor]) -> list[Tensor]:
        """C applied to tensors shaped like `pieces`."""
        return self._apply("matvec", tensors)

    def multiply(self, tensors: list[Tensor]) -> list[Tensor]:
        """`matvec` from the running average itself, without a factor."""
        if self.uses_rows:
            return self.matvec(tensors)
        x = self.flatten(self.join([at_least_float32(t) for t in tensors]))
        return self.split(self.unflatten(self.approx.product(self.tensors, x)))

    def sample(self, damping: float | Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """One draw from N(0, (C + damping I)^-1), shaped like `pieces`."""
        assert self.factor is not None
        params = self.params
        dtype = torch.promote_types(params[0].dtype, torch.float32)
        shapes = [layer.shape for layer in self.layers]
        noise = [torch.randn(s, dtype=dtype, device=params[0].device, generator=generator) for s in shapes]
        if self.factor.layer_by_layer:
            return self.split(self.factor.sample(noise, damping))
        return self.split(self.unflatten(self.factor.sample(self.flatten(noise), damping)))

    def diag(self) -> list[Tensor]:
        """The diagonal of C, one [g, o, i] per layer."""
        assert self.factor is not None
        diagonal = self.factor.diag()
        if self.factor.layer_by_layer:
            return diagonal
        if len(self.layers) > 1:
            return self.unflatten(diagonal)
        return [diagonal.reshape(self.layers[0].shape)]

    def _apply(self, name: str, tensors: list[Tensor], *args: Any) -> list[Tensor]:
        if self.factor is None:
            raise RuntimeError(f"the curvature of block {self.name!r} has not been measured yet")
        return self.factor.on(self, name, [at_least_float32(t) for t in tensors], *args)

    def flatten(self, joined: list[Tensor]) -> Tensor:
        """One tensor [..., g, o, i] for the factor: several layers are laid one after the other."""
        if len(joined) == 1:
            return joined[0]
        return torch.cat([x.flatten(-3) for x in joined], -1).unsqueeze(-2).unsqueeze(-2)

    def unflatten(self, x: Tensor) -> list[Tensor]:
        if len(self.layers) == 1:
            return [x]
        sizes = [torch.Size(layer.shape).numel() for layer in self.layers]
        parts = x.squeeze(-2).squeeze(-2).split(sizes, -1)
        return [part.unflatten(-1, layer.shape) for part, layer in zip(parts, self.layers, strict=True)]

    # ------------------------------------------------------------------------------------ state

    def release_rows(self) -> None:
        """Rows belong to one step; what they hold must not outlive it."""
        if self.uses_rows:
            self.factor = None

    def state(self) -> dict[str, Any]:
        """The running average and the factor as nested dicts of tensors and numbers.

        The keys and shapes do not depend on what has happened so far, since libraries that load a checkpoint in
        place ask a fresh optimizer for them: what is not known yet is zero, and marked as such.
        """
        saved: dict[str, Any] = {
            "size": self.size,
            "next_update": self.next_update,
            "next_refactor": self.next_refactor,
            "reported_skipped": self.reported[0],
            "reported_failed": self.reported[1],
            "measured_at": {part: self.measured_at.get(part, -1) for part in self.approx.parts},
            "measurements": self.measurements,
            "factorisations": self.factorisations,
            "factor_damping": self.factor_damping,
            "paces": {part: pace.state() for part, pace in self.paces.items()},
            "drifts": dict(self.drifts),
        }
        p = self.params[0]
        saved["flags"] = p.new_zeros(2, dtype=torch.int32) if self.flags is None else self.flags
        if self.input_rows:
            saved["next_update"] = saved["next_refactor"] = 0  # whoever resumes measures at once
        if self.uses_rows or self.input_rows:
            return saved
        tensors, weights, factor = self.tensors, self.weights, self.factor
        if factor is None or ("moments" not in tensors and self.options.approx == "ekfac"):
            like = p.new_empty((), dtype=torch.promote_types(p.dtype, torch.float32))
            tensors = {**self.approx.empty(self.layers, like), **tensors}
            weights = {key: weights.get(key, like.new_zeros(())) for key in tensors}
        if factor is None:
            factor = self.approx.factor(tensors, 1.0, self.options.damping_type)[0]
        saved["known"] = {**{key: int(key in self.tensors) for key in tensors}, "factor": int(self.factor is not None)}
        saved["tensors"], saved["weights"], saved["factor"] = dict(tensors), dict(weights), factor.state()
        if self.draws_apart:
            saved["draw_factor"] = (self.draw_factor or factor).state()
            saved["known"]["draw_factor"] = int(self.draw_factor is not None)
            saved["draw_damping"] = self.draw_damping
        return saved

    def load_state(self, saved: dict[str, Any]) -> None:
        """Continue from what `state` returned; from nothing if it is empty."""
        if saved.get("size", self.size) != self.size:
            raise ValueError(
                f"block {self.name!r} was saved with {saved['size']} parameters and has {self.size} now: freeze the "
                "same parameters, and choose the same groups, as in the run that was saved"
            )
        self.forget_pending()
        self.next_update, self.next_refactor = int(saved.get("next_update", 0)), int(saved.get("next_refactor", 0))
        self.paces = {part: Pace(**saved.get("paces", {}).get(part, {})) for part in self.approx.parts}
        self.drifts = {part: saved.get("drifts", {}).get(part, math.inf) for part in self.approx.parts}
        self.flags = saved.get("flags")
        self.reported = int(saved.get("reported_skipped", 0)), int(saved.get("reported_failed", 0))
        self.measured_at = {part: int(t) for part, t in saved.get("measured_at", {}).items() if t >= 0}
        self.measurements, self.factorisations = (int(saved.get(k, 0)) for k in ("measurements", "factorisations"))
        known = saved.get("known", {})
        self.tensors = {key: value for key, value in saved.get("tensors", {}).items() if known[key]}
        self.weights = {key: value for key, value in saved.get("weights", {}).items() if known[key]}
        self.factor = self._factor_from(saved["factor"]) if known.get("factor") else None
        self.factor_damping = float(saved.get("factor_damping", math.nan))
        self.draw_factor = self._factor_from(saved["draw_factor"]) if known.get("draw_factor") else None
        self.draws_apart, self.draw_damping = "draw_factor" in known, float(saved.get("draw_damping", math.nan))

    def _factor_from(self, state: dict[str, Tensor]) -> Factor:
        return self.approx.restored(factor_from_state(state, self.layers[0].shape[1:]))

    def sizes(self) -> str:
        """Sizes of the matrices kept, as the summary prints them."""
        return f"rows of {self.size}" if self.uses_rows else self.approx.describe(self.size, self.layers[0].shape)

    def memory(self) -> int:
        """Bytes held by the running average and the factor."""
        held = [*self.tensors.values(), *(() if self.factor is None else self.factor.state().values())]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        return sum(storages.values())


def partition(chosen: Iterable[tuple[Layer, Options, int]]) -> Iterator[tuple[str, list[Layer], Options]]:
    """(name, layers, options) of each block, for layers with their options and the group they are in."""
    joined: dict[tuple[Options, int], list[Layer]] = {}
    for layer, options, group in chosen:
        if options.covers == "layer":
            yield layer.name, [layer], options
        elif options.covers == "parameter":
            for part in layer.parts():
                yield part.name, [part], options
        else:
            joined.setdefault((options, group if options.covers == "group" else 0), []).append(layer)
    names: set[str] = set()
    for (options, _), layers in joined.items():
        assert options.approx is not None
        name = options.approx if options.approx not in names else f"{options.approx}:{layers[0].name}"
        names.add(name)
        yield name, layers, options


def gathered(by_block: Iterable[tuple[Curvature, list[Tensor]]]) -> dict[Tensor, Tensor]:
    """By parameter, from tensors shaped like the pieces of blocks (leading dimensions are a batch)."""
    out: dict[Tensor, Tensor] = {}
    for block, parts in by_block:
        for piece, x in zip(block.pieces, parts, strict=True):
            if piece.rows is None:
                out[piece.param] = x
                continue
            lead = x.shape[: x.dim() - piece.param.dim()]
            if piece.param not in out:
                out[piece.param] = x.new_zeros(*lead, *piece.param.shape)
            piece.of(out[piece.param]).copy_(x)
    return out


def read_flags(blocks: list[Curvature]) -> list[tuple[int, int]]:
    """(measurements that were not finite, factorisations that failed) of each block; one host sync."""
    flags = [block.flags for block in blocks if block.flags is not None]
    counts = iter(torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else ())
    return [(0, 0) if block.flags is None else tuple(next(counts)) for block in blocks]


def _choose(ok: Tensor, new: Factor, old: Factor) -> Factor:
    """new if ok else old, without a host sync on an accelerator."""
    if on_cpu(ok):
        return new if ok else old
    kept, fresh = old.state(), new.state()
    if type(new) is not type(old) or {k: x.shape for k, x in kept.items()} != {k: x.shape for k, x in fresh.items()}:
        return new
    chosen = {key: torch.where(ok, value, kept[key]) for key, value in fresh.items()}
    return new.with_tensors(chosen)
