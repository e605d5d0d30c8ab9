"""Curvature: one block of the loss's curvature. Plain tensors in, plain tensors out.

A block is one layer, or for "full" all the layers that ask for it. It measures (pending.py), averages what it measured
(average.py) when that is due (refresh.py), and keeps factors of the average (slot.py), which are used here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.approximations.base import Approximation, Basis, Tensors
from torchcurv.curv.approximations.factor import Factor, with_tensors
from torchcurv.curv.approximations.table import approximation_of
from torchcurv.curv.block.average import RunningAverage
from torchcurv.curv.block.health import Health
from torchcurv.curv.block.layout import BlockLayout
from torchcurv.curv.block.pending import Pending
from torchcurv.curv.block.refresh import RefreshSchedule
from torchcurv.curv.block.slot import FactorSlot
from torchcurv.curv.kinds.base import CurvatureKind
from torchcurv.curv.kinds.table import kind_of
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.numerics import at_least_float32
from torchcurv.curv.options import STRUCTURE_NAMES, Options
from torchcurv.curv.statistics.block import Stats

STEP, POSTERIOR = "step", "posterior"  # what a factor is for
Made = tuple[Factor, Tensor]  # a factor, and whether it could be computed: a 0-d bool tensor


class Curvature:
    """One block: what it measures, the running average of that, and its factors.

    kind: which curvature, by the name in the table; None: that of the options. approx: what is kept of it; None: what
    the options name.

    layout: its layers and how their parameters become coordinates; name, layers, pieces, params and size are those of
    the layout. pending, average, refresh, health: see their classes. factors: a slot by what its factor is for; one of
    POSTERIOR is there while draws have another damping than steps.
    """

    layout: BlockLayout
    options: Options

    def __init__(
        self,
        name: str,
        layers: list[Layer],
        options: Options,
        *,
        kind: str | None = None,
        approx: Approximation | None = None,
    ) -> None:
        self.place(BlockLayout(name, layers), options)
        self.kind = options.curv_type if kind is None else kind
        self.approx: Approximation = approximation_of(name, options, layers) if approx is None else approx
        self.pending, self.average = Pending(self.approx), RunningAverage(self.approx)
        self.refresh, self.health = RefreshSchedule(self.approx.statistics), Health()
        self.factors = {STEP: FactorSlot()}

    def place(self, layout: BlockLayout, options: Options) -> None:
        """Belong to these layers and options, which a rebuilt model has in the place of equal ones."""
        self.layout, self.options = layout, options
        self.name, self.layers, self.size = layout.name, layout.layers, layout.size
        self.pieces, self.params = layout.pieces, layout.params

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two blocks the same: the structure, the parameters, and what linear maps they are."""
        pieces = ((p, rows and rows.start, rows and rows.stop) for p, rows in self.pieces)
        structure = (getattr(self.options, name) for name in STRUCTURE_NAMES)
        return self.kind, *structure, self.approx.of_one_step, *(layer.shape for layer in self.layers), *pieces

    # ------------------------------------------------------------------------------------ measure

    def measured_kind(self) -> CurvatureKind:
        """What the next pass measures: where no statistic that is due needs signals, the inputs alone."""
        kind = kind_of(self.kind, self.options)
        due = (self.approx.statistics[name] for name in self.refresh.due)
        return kind if any(one.needs_signals for one in due) else kind.without_signals()

    @torch.no_grad()
    def measure(self, stats: Stats) -> None:
        """Add one chunk of signals to what was measured since the last step."""
        self.follow_parameters()
        basis = None if self.factor is None else self.factor.basis
        self.pending.add(self.approx.measure(stats, basis, self.refresh.due))

    @torch.no_grad()
    def update(
        self, ema_decay: float, refresh_factor: bool = True, step: int | None = None, track_change: bool = False
    ) -> None:
        """Merge what is pending into the running average; see `RunningAverage`.

        refresh_factor: whether the factor takes over what it can; a factorisation that comes next does that anyway.
        A measurement with a value that is not finite is left out and counted.
        """
        self.health.take_doubts(self.pending.doubts)
        edited = self.pending.edited(self.name)
        if edited is not None:
            raise RuntimeError(edited)
        new, total = self.pending.take()
        if ema_decay and self.approx.forbids_memory:
            raise ValueError(
                f"block {self.name!r} was built with ema_decay=0, so that it keeps no running average, and has "
                f"ema_decay={ema_decay} now: build the optimizer with ema_decay > 0"
            )
        self.health.measurements += 1
        ok = self.average.merge(new, total, self.params[0], ema_decay, step, track_change)
        self.health.note_skipped(~ok)
        if refresh_factor:
            self._follow()

    def _follow(self) -> None:
        """Statistics that are eigenvalues in the basis of the factor, or all of it, reach it at once."""
        slot = self.factors[STEP]
        if slot.factor is not None or self.approx.of_one_step:
            slot.factor = self.approx.follow(self.tensors, slot.factor, self.options.damping_type)

    def follow_parameters(self) -> None:
        """Take the averages and factors along where the model has moved to another device or precision."""
        p, held = self.params[0], next((x for x in self.tensors.values() if isinstance(x, Tensor)), None)
        wide = torch.promote_types(p.dtype, torch.float32)
        if self.pending.measured_for not in (None, (p.dtype, p.device)):
            self.pending.follow(p)
        if held is None or (held.dtype == wide and held.device == p.device):
            return
        like = self._like()
        average, health = self.average, self.health
        average.tensors = {key: x.to(like) if isinstance(x, Tensor) else x for key, x in self.tensors.items()}
        average.weights = {key: x.to(like) for key, x in average.weights.items()}
        health.flags = None if health.flags is None else health.flags.to(like.device)
        for slot in self.factors.values():
            if slot.factor is not None:
                slot.factor = with_tensors(slot.factor, {k: x.to(like) for k, x in slot.factor.state().items()})

    def _like(self) -> Tensor:
        """A number on the device of the block, in float32 or better."""
        p = self.params[0]
        return p.new_zeros((), dtype=torch.promote_types(p.dtype, torch.float32))

    @property
    def tensors(self) -> Tensors:
        """The running averages by key."""
        return self.average.tensors

    def mean_eigenvalue(self) -> Tensor:
        """Its magnitude, a 0-d tensor; of what has been measured."""
        trace = self.approx.trace(self.tensors)
        least = torch.finfo(trace.dtype).tiny * 1e6  # times a damping below 1 it must not become 0
        return trace.abs().clamp_min(least) / self.size

    # ------------------------------------------------------------------------------------- factor

    @property
    def factor(self) -> Factor | None:
        """That of steps."""
        return self.factors[STEP].factor

    @torch.no_grad()
    def refactor(
        self,
        damping: float | Tensor,
        nominal: float | Tensor | None = None,
        of_draws: float | None = None,
        made: Sequence[Made] | None = None,
    ) -> None:
        """Compute the factors anew; where that fails the last good one stays, and the failure is counted.

        nominal: the damping as the user gave it; None: the damping itself. of_draws: that of draws, where they need
        a factor of their own. made: what `factors_of` has made of these, maybe in another process.
        """
        made = factors_of(self, damping, of_draws) if made is None else made
        self.health.retry = False
        self.health.factorisations += 1
        (new, ok), (apart, fine) = made[0], made[-1]
        self.factors[STEP].put(new, ok, damping if nominal is None else nominal)
        kept = self.factor
        assert kept is not None
        if kept.finite is not None:
            self.health.note_skipped(~kept.finite)
        self.average.tensors = self.approx.rebased(self.tensors, kept)
        if of_draws is None:
            self.factors.pop(POSTERIOR, None)
        else:
            self.factors.setdefault(POSTERIOR, FactorSlot()).put(apart, fine, of_draws)
        self.health.note_failed(~(ok & fine))
        self.refresh.factored()

    def solve(self, tensors: list[Tensor], damping: float | Tensor | None = None) -> list[Tensor]:
        """(C + damping I)^-1 applied to tensors shaped like `pieces` (leading dimensions are a batch)."""
        return self._apply("solve", tensors, damping)

    def matvec(self, tensors: list[Tensor]) -> list[Tensor]:
        """C applied to tensors shaped like `pieces`."""
        return self._apply("matvec", tensors)

    def multiply(self, tensors: list[Tensor]) -> list[Tensor]:
        """`matvec` from the running average itself, without a factor."""
        layout = self.layout
        x = layout.flatten(layout.join([at_least_float32(t) for t in tensors]))
        return layout.split(layout.unflatten(self.approx.product(self.tensors, x)))

    def _apply(self, name: str, tensors: list[Tensor], *args: Any) -> list[Tensor]:
        if self.factor is None:
            raise RuntimeError(f"the curvature of block {self.name!r} has not been measured yet")
        return self.factor.on(self.layout, name, [at_least_float32(t) for t in tensors], *args)

    # -------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """The running average and the factors as nested dicts of tensors and numbers.

        The keys and shapes do not depend on what has happened so far, since libraries that load a checkpoint in
        place ask a fresh optimizer for them: what is not known yet is zero, and marked as such.
        """
        saved: dict[str, Any] = {"size": self.size, "factor_damping": self.factors[STEP].damping}
        saved |= self.refresh.state() | self.average.state() | self.health.state(self.params[0])
        if self.approx.of_one_step:  # whoever resumes measures at once
            return saved | {"next_update": 0, "next_refactor": 0}
        tensors, weights, factor = dict(self.tensors), dict(self.average.weights), self.factor
        if factor is None or not self._averages <= tensors.keys():
            tensors = {**self.approx.empty(self.layers, self._like()), **tensors}
            weights = {key: weights[key] if key in weights else self._like() for key in tensors}
        if factor is None:
            factor = self.approx.factor(tensors, 1.0, self.options.damping_type)[0]
        known = {key: int(key in self.tensors) for key in tensors} | {"factor": int(self.factor is not None)}
        saved |= {"tensors": tensors, "weights": weights, "factor": factor.state(), "known": known}
        draws = self.factors.get(POSTERIOR)
        if draws is not None:
            known["draw_factor"] = int(draws.factor is not None)
            saved |= {"draw_factor": (draws.factor or factor).state(), "draw_damping": draws.damping}
        return saved

    @cached_property
    def _averages(self) -> set[str]:
        """The keys that the running averages have in the end."""
        return set(self.approx.empty(self.layers, self._like().to("meta")))

    def load_state(self, saved: dict[str, Any]) -> None:
        """Continue from what `state` returned; from nothing if it is empty."""
        if saved.get("size", self.size) != self.size:
            raise ValueError(
                f"block {self.name!r} was saved with {saved['size']} parameters and has {self.size} now: freeze the "
                "same parameters, and choose the same groups, as in the run that was saved"
            )
        self.pending.forget()
        self.refresh.load_state(saved)
        self.average.load_state(saved)
        self.health.load_state(saved)
        known = saved.get("known", {})
        self.factors = {STEP: FactorSlot(self._restored(saved, "factor"), float(saved.get("factor_damping", math.nan)))}
        if "draw_factor" in known:
            damping = float(saved.get("draw_damping", math.nan))
            self.factors[POSTERIOR] = FactorSlot(self._restored(saved, "draw_factor"), damping)

    def _restored(self, saved: dict[str, Any], name: str) -> Factor | None:
        if not saved.get("known", {}).get(name):
            return None
        return self.approx.restored(saved[name], self.layers, self.options.damping_type)


@torch.no_grad()
def factors_of(block: Curvature, damping: float | Tensor, of_draws: float | None = None) -> list[Made]:
    """What `refactor` puts into place: the factor of steps, and that of draws where they need one; nothing changes."""
    made = [_factored(block, block.tensors, damping, None if block.factor is None else block.factor.basis)]
    if of_draws is not None:
        kept = block.factors[STEP].after(*made[0])
        made.append(_factored(block, block.approx.rebased(block.tensors, kept), of_draws, kept.basis))
    return made


def _factored(block: Curvature, tensors: Tensors, damping: float | Tensor, basis: Basis | None) -> Made:
    """Of running averages, more carefully after a failure."""
    compute = block.approx.factored_again if block.health.retry else block.approx.factor
    new, ok = compute(tensors, damping, block.options.damping_type, basis)
    return block.approx.owned(new, tensors), ok


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
