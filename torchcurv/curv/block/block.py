"""Curvature: one block of the loss's curvature. Plain tensors in, plain tensors out.

A block is one layer, or for "full" all the layers that ask for it. Its life has three parts, each in its own file: it
measures (measurement.py), averages what it measured (average.py), and factors the average, which is then used (here).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.approximations.factor import Factor, with_tensors
from torchcurv.curv.approximations.factors import factor_from_state
from torchcurv.curv.approximations.rows import rows_of
from torchcurv.curv.block.average import RunningAverage
from torchcurv.curv.block.refresh import AdaptiveInterval
from torchcurv.curv.kinds.base import INPUT_COVARIANCE
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.numerics import at_least_float32, on_cpu
from torchcurv.curv.options import Options


class Curvature(RunningAverage):
    """One block: its layers, options, measurements, running average and factor."""

    def __init__(self, name: str, layers: list[Layer], options: Options) -> None:
        super().__init__(name, layers, options)
        self.factor_damping = math.nan  # of the factor; unknown where it came as a tensor
        self.draws_apart = False  # whether draws have a factor of their own, of another damping than that of the step
        self.draw_factor: Factor | None = None
        self.draw_damping = math.nan
        self.retry = False  # the last factorisation failed: the next is in float64 with more damping

    @property
    def has_factor(self) -> bool:
        return self.factor is not None and self.factor.ready

    @torch.no_grad()
    def refactor(
        self, damping: float | Tensor, draw_damping: float = math.nan, nominal: float | Tensor | None = None
    ) -> None:
        """Compute the factor anew; where that fails the last good one stays, and the failure is counted.

        draw_damping: that of `draw_factor`, where draws have one of their own. nominal: the damping as the user
        gave it; None: the damping itself.
        """
        old, again, self.retry = self.factor, self.retry, False
        self.factorisations += 1
        if self.uses_rows and old is not None:
            rows, ok = rows_of(old).damped(10 * damping if again else damping, again)
            assert rows.finite is not None
            self._count(0, ~rows.finite)
            self.factor = rows
        else:
            new, ok = self._factorise(damping, again)
            self.factor = new if old is None else _choose(ok, new, old)
            self.tensors = self.approx.rebased(self.tensors, self.factor)
            if self.draws_apart:
                apart, fine = self._factorise(draw_damping, again)
                self.draw_factor = apart if self.draw_factor is None else _choose(fine, apart, self.draw_factor)
                self.draw_damping, ok = draw_damping, ok & fine
        self._count(1, ~ok)
        self.change_since_factorisation = dict.fromkeys(self.approx.parts, 0.0)
        nominal = damping if nominal is None else nominal
        self.factor_damping = math.nan if isinstance(nominal, Tensor) else float(nominal)

    def _factorise(self, damping: float | Tensor, again: bool) -> tuple[Factor, Tensor]:
        """(the factor of the running average, whether it succeeded); again: in float64 and with more damping."""
        if not again:
            return self.approx.factor(self.tensors, damping, self.options.damping_type, self.basis)
        doubled = {key: value.double() for key, value in self.tensors.items()}
        basis = None if self.basis is None else (self.basis[0].double(), self.basis[1].double())
        new, ok = self.approx.factor(doubled, 10 * damping, self.options.damping_type, basis)
        dtype = next(iter(self.tensors.values())).dtype
        return with_tensors(new, {key: value.to(dtype) for key, value in new.state().items()}), ok

    def effective_dimension(self, damping: float | Tensor) -> Tensor:
        """tr C (C + damping I)^-1, a 0-d tensor: in how many directions the curvature outweighs the damping."""
        if self.factor is None:
            raise RuntimeError(f"the curvature of block {self.name!r} has not been measured yet")
        return self.factor.effective_dimension(damping, lambda: self.approx.sides_of(self.tensors))

    def holds_damping(self) -> bool:
        """Whether the factor holds its damping, so that another damping asks for another factor."""
        return self.factor is None or self.factor.holds_damping

    def solve(self, tensors: list[Tensor], damping: float | Tensor | None = None) -> list[Tensor]:
        """(C + damping I)^-1 applied to tensors shaped like `pieces` (leading dimensions are a batch)."""
        return self._apply("solve", tensors, damping)

    def direction(self, tensors: list[Tensor], damping: float | Tensor | None = None) -> list[Tensor]:
        """What a step takes in the place of a gradient: `solve`, and for curv_type="input" λ times that."""
        solved = self.solve(tensors, damping)
        if self.options.curv_type != INPUT_COVARIANCE:
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
            "drifts": dict(self.change_since_factorisation),
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
        self.paces = {part: AdaptiveInterval(**saved.get("paces", {}).get(part, {})) for part in self.approx.parts}
        self.change_since_factorisation = {
            part: saved.get("drifts", {}).get(part, math.inf) for part in self.approx.parts
        }
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


def _choose(ok: Tensor, new: Factor, old: Factor) -> Factor:
    """new if ok else old, without a host sync on an accelerator."""
    if on_cpu(ok):
        return new if ok else old
    kept, fresh = old.state(), new.state()
    if type(new) is not type(old) or {k: x.shape for k, x in kept.items()} != {k: x.shape for k, x in fresh.items()}:
        return new
    chosen = {key: torch.where(ok, value, kept[key]) for key, value in fresh.items()}
    return with_tensors(new, chosen)
