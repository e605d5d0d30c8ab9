"""The engine: blocks of the curvature that are measured, averaged, factorised and applied, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from torchcurv.curv.block.block import POSTERIOR, STEP, Curvature
from torchcurv.curv.block.slot import FactorSlot
from torchcurv.curv.capture.recorder import Recorder
from torchcurv.curv.distributed import Ranks
from torchcurv.curv.kinds.table import kind_of
from torchcurv.optim.engine.building import Blueprint, same
from torchcurv.optim.engine.damping import DampingPolicy, Group, has_changed, is_of_the_loss
from torchcurv.optim.engine.fallback import (
    Followers,
    all_usable,
    finite_or_zero,
    has_moved,
    put,
    short,
    usable_direction,
)
from torchcurv.optim.engine.placement import Dampings, factorise
from torchcurv.optim.engine.reduction import reduce_pending
from torchcurv.optim.engine.report import warn, warn_of_failures, warn_of_plain, without_curvature
from torchcurv.optim.engine.witness import check_captured, check_objections, check_present, check_unfrozen, remarks_on

# Options that all groups under one block must agree on at each step.
_SHARED = (
    *("update_every", "refactor_every", "damping", "damping_scale", "ema_decay"),
    *("refresh_tol", "refresh_cap", "refresh_warmup"),
)


class Schedule(Protocol):
    """What the engine asks of the options of groups."""

    def next_turn(self, index: int, key: str, step: int) -> int: ...

    def adaptive(self, index: int, key: str) -> bool: ...

    def constant(self, index: int, key: str) -> int | None: ...

    def apply(self, step: int) -> None: ...


class CurvatureEngine:
    """The blocks of an optimizer, each with the parameter group it belongs to, and what feeds them.

    blueprint: how blocks are made. recording: arguments of the recorder. schedule: intervals, and options that are
    functions of the step. damping: what is added to eigenvalues.
    factors: whether steps solve with factors, or only multiply with what was measured.
    warmup: so many steps only measure. waits_for_gradients: whether a step without gradients does nothing.
    hint: why nothing may have been captured, beyond what the recorder knows. process_group, placement: see `Ranks`.
    rows_stay: whether what is kept as rows is used where it was measured, and not to be sent.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        recording: dict[str, Any],
        schedule: Schedule,
        damping: DampingPolicy,
        *,
        factors: bool = True,
        warmup: int = 0,
        waits_for_gradients: bool = True,
        hint: Callable[[], str | None] = lambda: None,
        process_group: Any = "auto",
        placement: str = "replicated",
        rows_stay: bool = False,
    ) -> None:
        self.blueprint, self.recording, self.schedule, self.damping = blueprint, recording, schedule, damping
        self.factors, self.warmup, self.waits_for_gradients = factors, warmup, waits_for_gradients
        self.ranks, self.rows_stay = Ranks(process_group, placement), rows_stay
        self.step = 0
        self.groups: Sequence[Group] = ()
        self.pairs: list[tuple[Curvature, int]] = []
        self.fresh: list[Curvature] = []  # blocks that were not there before the last build
        self.recorder: Recorder | None = None
        self.hint = hint
        self.unsaved: list[Curvature] = []
        self.only_zeros = False  # whether the last refresh found gradients of zeros and nothing that was captured
        self.plain: dict[str, str] = {}  # why, for names of blocks and parameters that turned out without curvature
        self.said: set[str] = set()  # warnings that were given once
        self.hooked = False
        self.followers = Followers(blueprint.alone)
        self._measured: set[str] = set()  # names of the blocks that this step measures
        self._trained: list[bool] = []  # which parameters were trainable when the blocks were built

    # ------------------------------------------------------------------------------------ building

    @property
    def blocks(self) -> list[Curvature]:
        return [block for block, _ in self.pairs]

    @property
    def warming_up(self) -> bool:
        """Whether this step only measures."""
        return self.step < self.warmup

    def params(self) -> Iterator[Tensor]:
        return (p for group in self.groups for p in group["params"])

    def by_group(self) -> Iterator[tuple[Curvature, Group]]:
        return ((block, self.groups[index]) for block, index in self.pairs)

    def build(self, groups: Sequence[Group], state: dict[Any, Any]) -> None:
        """Blocks and recorder for the groups as they are now; blocks that did not change are kept, with their state."""
        old = {block.key: block for block in self.blocks}
        fresh = self.blueprint.blocks(groups)
        self.remove()
        self.groups, self.pairs, self.fresh = groups, [], []
        for block, index in fresh:
            self._check_rows(block, index)
            kept = old.get(block.key, block)
            self.fresh += [block] if kept is block else []
            kept.place(block.layout, block.options)
            if kept.factor is None and self.damping.of_draws(groups[index], self.step) is not None:
                kept.factors.setdefault(POSTERIOR, FactorSlot())
            self.pairs.append((kept, index))
        self._trained, self.followers.rebuild = [p.requires_grad for p in self.params()], False
        known = {(block.params[0], block.layout.state_key) for block in self.blocks}
        for p, own in state.items():
            for key in [key for key in own if key.startswith("curvature") and (p, key) not in known]:
                del own[key]
        self.unsaved = [b for b in self.blocks if b.layout.state_key not in state.get(b.params[0], {})]
        self.recorder = Recorder(
            self.blueprint.model,
            self.blocks,
            **self.recording,
            unsupported=self.blueprint.unsupported,
            before=self.recorder,
            ranks=self.ranks,
        )
        self.ranks.saw(self.blueprint.model)
        self.hooked = True
        self.begin_step()

    def _check_rows(self, block: Curvature, index: int) -> None:
        each = all(self.schedule.constant(index, key) == 1 for key in ("update_every", "refactor_every"))
        if block.approx.of_one_step and not each:
            raise ValueError(
                f"block {block.name!r} has {block.size} parameters, more than rows_limit={block.options.rows_limit}, "
                "and is solved through its rows, which belong to one step: set update_every=1 and refactor_every=1 for "
                "it, or raise rows_limit"
            )

    @property
    def outdated(self) -> bool:
        """Whether blocks have to be built anew: parameters were frozen or unfrozen, or are not used as was thought."""
        return self.followers.rebuild or self._trained != [p.requires_grad for p in self.params()]

    def unfrozen(self) -> list[Tensor]:
        """Parameters that are trainable and were not when the blocks were built."""
        pairs = zip(self.params(), self._trained, strict=True)
        return [p for p, before in pairs if p.requires_grad and not before]

    def remove(self) -> None:
        """Take every hook away."""
        self.hooked = False
        if self.recorder is not None:
            self.recorder.remove()

    # ------------------------------------------------------------------------------------ refresh

    def begin_step(self) -> None:
        """Say what the next forward passes feed."""
        assert self.recorder is not None
        self.followers.names = set()
        self._measured = set(due := self._due())
        self.recorder.begin_step(self.step, due)

    def _due(self) -> list[str]:
        for block, index in self.pairs:
            block.refresh.select_due(self._own_step(index))
        measured = [block for block in self.blocks if kind_of(block.kind, block.options).by_passes]
        return [block.name for block in measured if self.warming_up or self.step >= block.refresh.next_update]

    def refresh(self) -> bool:
        """Merge what was captured and factor what is due. False: there is nothing to step on."""
        self.only_zeros = False
        if all(p.grad is None for p in self.params()):
            check_present(self, self.params())
            return not self.waits_for_gradients
        if self.outdated:
            check_unfrozen(self)
        self.schedule.apply(self.step)
        reached = [pair for pair in self.pairs if any(p.grad is not None for p in pair[0].params)]
        for block, _ in reached:
            block.follow_parameters()
        due = [block for block in self.blocks if block.name in self._measured]
        reduce_pending(self, due)
        check_objections([block for block, _ in reached])
        missing = [block for block, _ in reached if self.step >= block.refresh.next_update and not block.pending]
        if missing and not check_captured(self, missing):
            self.only_zeros = True
            return False
        self._postpone(reached)
        self._note_plain([block for block in missing if self.blueprint.unsupported == "gradient"])
        for remark in remarks_on([block for block, _ in reached]) - self.said:
            self.said.add(remark)
            warn(remark)
        assert self.recorder is not None
        self.followers.rebuild |= self.blueprint.take(self.recorder.forward.products)
        for block, index in reached:
            if block.pending:
                self._update_average(block, index)
        self._check_shared(reached)
        changed = [pair for pair in reached if pair[0].average.changes]
        self._decide(changed)
        if self.factors and not self.warming_up:
            self._factorise(reached, changed)
        return True

    def _postpone(self, reached: list[tuple[Curvature, int]]) -> None:
        """Blocks that were never measured, since their parameters have no gradient (a token that nothing masks), keep
        no hook on until they have one: they follow it for a step, and are measured in the next. Experts wait."""
        there = {id(block) for block, _ in reached}
        for block, index in self.pairs:
            part = block.layout.is_part
            if block.pending or block.name in self.plain or (block.average and not part):
                continue
            idle = id(block) not in there or (part and block.name not in self.followers.names)
            if idle and block.name in self._measured:
                if not self.schedule.adaptive(index, "update_every"):
                    block.refresh.next_update = self.schedule.next_turn(index, "update_every", self.step)
            elif id(block) in there and not block.average and self.step < block.refresh.next_update:
                self.followers.add([block])
                block.refresh.next_update = block.refresh.next_update if part else self.step + 1

    def _note_plain(self, missing: list[Curvature]) -> None:
        """Say it when there are more parameters that train with the plain gradient."""
        assert self.recorder is not None
        new = [block for block in missing if block.name not in self.plain]
        moving = [block.name for block in new if has_moved(block)]
        seen = {block.name for block in self.blocks if block.pending}
        now = {name: why for name, why in self.plain.items() if name not in seen}
        now |= dict.fromkeys(moving, "its layer was not called, or what it returned led nowhere")
        now |= dict.fromkeys(self.recorder.context.check.excluded, "used outside of its layer as well")
        now |= self.blueprint.unread
        grown, self.plain = now.keys() - self.plain.keys(), now
        if grown:
            warn_of_plain(now, without_curvature(self.blocks, self.blueprint.names, now), self.params())

    def _own_step(self, index: int) -> int | None:
        """The step, for blocks that are measured at intervals of their own choice."""
        return self.step if self.schedule.adaptive(index, "update_every") and not self.warming_up else None

    def _update_average(self, block: Curvature, index: int) -> None:
        adaptive = self.schedule.adaptive(index, "update_every")
        track_change = adaptive or self.schedule.adaptive(index, "refactor_every")
        averages = kind_of(block.kind, block.options).by_passes  # what is made of draws is an average already
        decay = self.groups[index]["ema_decay"] if averages else 0.0
        block.update(decay, not self._is_due(block, index), self.step, track_change)
        if not adaptive:
            block.refresh.next_update = self.schedule.next_turn(index, "update_every", self.step)
            if block.refresh.adapted:
                block.refresh.restart()
        self.unsaved.append(block)

    def _decide(self, changed: list[tuple[Curvature, int]]) -> None:
        """Let blocks of adaptive intervals see how far they moved: a host read where one was measured."""
        moves = [(block, part, change) for block, _ in changed for part, change in block.average.changes.items()]
        if not moves:
            return
        device = moves[0][2].device
        read = torch.stack([change.to(device, torch.float64) for _, _, change in moves]).tolist()
        for block, index in changed:
            own = {part: value for (other, part, _), value in zip(moves, read, strict=True) if other is block}
            block.average.changes = {}
            limits = (self.groups[index][key] for key in ("refresh_tol", "refresh_cap", "refresh_warmup"))
            block.refresh.decide(self._own_step(index), own, *limits)

    def _factorise(self, reached: list[tuple[Curvature, int]], changed: list[tuple[Curvature, int]]) -> None:
        """Factors of what is stale; what went wrong before is read first, and only then."""
        read = [block for block, index in changed if self.schedule.adaptive(index, "refactor_every")]
        warn_of_failures(read)
        stale = [(block, index) for block, index in reached if self._is_stale(block, index)]
        warn_of_failures([block for block, _ in stale if block not in read])
        factorise([(block, *self._dampings(block, self.groups[index])) for block, index in stale], self.ranks)
        for block, index in stale:
            if not self.schedule.adaptive(index, "refactor_every"):
                block.refresh.next_refactor = self.schedule.next_turn(index, "refactor_every", self.step)
            self.unsaved.append(block)

    def _dampings(self, block: Curvature, group: Group) -> Dampings:
        nominal, of_draws = self.damping.nominal(group, self.step), self.damping.of_draws(group, self.step)
        return self.damping.shift(block, group, self.step), nominal, of_draws

    def _is_due(self, block: Curvature, index: int) -> bool:
        """Whether a factorisation is due whatever was measured."""
        slot, draws, group = block.factors[STEP], block.factors.get(POSTERIOR), self.groups[index]
        if not slot.ready:
            return True
        if not self.schedule.adaptive(index, "refactor_every") and self.step >= block.refresh.next_refactor:
            return True
        if slot.holds_damping and has_changed(self.damping.nominal(group, self.step), slot.damping):
            return True
        of_draws = self.damping.of_draws(group, self.step)
        return draws is not None and of_draws is not None and has_changed(of_draws, draws.damping)

    def _is_stale(self, block: Curvature, index: int) -> bool:
        drifted = block.refresh.has_drifted(self.groups[index]["refresh_tol"]) or block.health.retry
        moved = self.schedule.adaptive(index, "refactor_every") and drifted
        return bool(block.average) and (moved or self._is_due(block, index))

    def _check_shared(self, pairs: list[tuple[Curvature, int]]) -> None:
        """A block over several groups has one damping and one schedule."""
        several = [(block, index) for block, index in pairs if len(block.layers) > 1]
        groups = {p: group for group in self.groups for p in group["params"]} if several else {}
        for block, index in several:
            own = self.groups[index]
            for other in {id(groups[p]): groups[p] for p in block.params}.values():
                for key in _SHARED:
                    if not same(own.get(key), other.get(key)):
                        raise ValueError(
                            f"block {block.name!r} lies over groups with {key}={own.get(key)!r} and "
                            f"{key}={other.get(key)!r}: give them equal ones, or build the optimizer with "
                            'partition="group"'
                        )

    # ---------------------------------------------------------------------------------------- use

    def shift(self, block: Curvature, group: Group) -> float | Tensor:
        """What is added to the eigenvalues of a block in this step."""
        return self.damping.shift(block, group, self.step)

    def precondition(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """(C + λ I)^-1 applied to the gradients of the covered parameters, in float32 or better.

        Of the others, `gradients` has zero from then on in the place of what is not finite.
        """
        solved: dict[Tensor, Tensor] = {}
        ready: list[tuple[Curvature, list[Tensor], list[Tensor]]] = []
        for block, group in self.by_group():
            if not any(p in gradients for p in block.params):
                continue
            follows = not block.factors[STEP].ready
            if follows and block.name not in self.followers.names:
                continue
            given = [
                piece.of(gradients[p] if (p := piece.param) in gradients else torch.zeros_like(p))
                for piece in block.pieces
            ]
            if follows:
                put(block, short(given), gradients, solved)
            else:
                ready.append((block, given, self._direction(block, group, given)))
        usable = all_usable([block for block, _, _ in ready], [found for _, _, found in ready])
        for block, given, found in ready:
            put(block, found if usable else usable_direction(block, given, found), gradients, solved)
        gradients.update({p: finite_or_zero(g) for p, g in gradients.items() if p not in solved})
        return solved

    def _direction(self, block: Curvature, group: Group, gradients: list[Tensor]) -> list[Tensor]:
        """(C + λ I)^-1 g, and λ times that where C is none of the loss, so that the step has the units of g."""
        factor = block.factor
        assert factor is not None
        damping = None if factor.holds_damping else self.shift(block, group)
        solved = block.solve(gradients, damping)
        if is_of_the_loss(group):
            return solved
        held = factor.damping if damping is None else damping
        assert held is not None
        return [x * held for x in solved]

    def forget(self) -> None:
        """Gradients are gone, and what was captured for them."""
        if self.recorder is not None:
            self.recorder.forward.abandon()
        for block in self.blocks:
            block.pending.forget()

    def save(self, state: dict[Any, dict[str, Any]]) -> None:
        """The blocks that changed into the state of their first parameter."""
        for block in dict.fromkeys(self.unsaved):
            if block.approx.keeps_inputs:
                block.average.forget()
                block.factors = {STEP: FactorSlot()}
            state[block.params[0]][block.layout.state_key] = block.state()
        if self.unsaved:
            self.blueprint.tell(state)
        self.unsaved = []

    def load(self, state: dict[Any, dict[str, Any]]) -> None:
        """The inverse of `save`."""
        for block in self.blocks:
            block.load_state(state.get(block.params[0], {}).get(block.layout.state_key, {}))
        self.ranks.agreed = False
        self.begin_step()
