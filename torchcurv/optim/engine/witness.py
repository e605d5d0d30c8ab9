"""Whether the curvature that a step needs was captured; if not, what the user is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor, nn

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.capture.recorder import DERIVATIVES, Recorder
from torchcurv.curv.losses.autograd import WatchedLoss
from torchcurv.optim.engine.building import Blueprint
from torchcurv.optim.engine.damping import Group
from torchcurv.optim.engine.fallback import Followers, has_moved


class Watched(Protocol):
    """What is asked of an engine."""

    blueprint: Blueprint
    groups: Sequence[Group]
    recorder: Recorder | None
    hooked: bool
    followers: Followers
    hint: Callable[[], str | None]

    @property
    def blocks(self) -> list[Curvature]: ...

    def unfrozen(self) -> list[Tensor]: ...


def check_unfrozen(engine: Watched) -> None:
    """A parameter that is trained since the blocks were built has a gradient but no curvature."""
    options = {p: group["approx"] for group in engine.groups for p in group["params"]}
    names = engine.blueprint.names
    found = [names[p] for p in engine.unfrozen() if p.grad is not None and options[p] is not None and p in names]
    if found and engine.blueprint.unsupported == "error":
        raise RuntimeError(
            f"the parameters {', '.join(found)} were frozen when the curvature blocks were built and have gradients "
            "now: call optimizer.zero_grad() after requires_grad_(True) and before the forward pass"
        )


def check_present(engine: Watched, params: Iterable[Tensor]) -> None:
    """Where nothing has a gradient: whether that is because the model has others in the place of all parameters."""
    names = engine.blueprint.names
    if not any(p in names for p in params) and any(p.grad is not None for p in names):
        raise RuntimeError(
            "none of the parameters of the groups belongs to the model any longer, and those that it has now have "
            "gradients: layers were replaced, or sharded (fully_shard), after the optimizer was built. Pass the new "
            "parameters to optimizer.add_param_group, or build the optimizer after that"
        )


def check_objections(blocks: list[Curvature]) -> None:
    """Raise if what was measured is not the curvature of the loss whose gradient is there."""
    for block in blocks:
        if block.pending.objection is not None:
            raise RuntimeError(block.pending.objection)


def remarks_on(blocks: list[Curvature]) -> set[str]:
    """What is missing in what was measured."""
    return {block.pending.remark for block in blocks if block.pending and block.pending.remark is not None}


def check_captured(engine: Watched, missing: list[Curvature]) -> bool:
    """A gradient whose curvature was not captured is an error, or trains as it is if the user said so.

    False: all gradients are zero, as in the step that a checkpoint library takes to make the state exist.
    """
    refuses = engine.blueprint.unsupported == "error"
    if not refuses and any(block.refresh.next_update for block in engine.blocks):
        return True
    names = [block.name for block in missing if has_moved(block)]
    nothing = not any(block.pending for block in engine.blocks)
    if not names:
        return not nothing
    left = {} if engine.recorder is None else engine.recorder.context.check.left
    nothing = nothing and not left and not _only_odd(engine, [b for b in missing if b.name in names])
    if nothing and engine.recorder is not None and engine.recorder.unseen:
        engine.followers.add(missing)
        return True  # the next passes are watched
    if nothing and engine.recorder is not None and engine.recorder.without_terms:
        return True  # every target is ignored: what has a gradient is no part of this loss
    if nothing and engine.recorder is not None and engine.recorder.derivatives:
        if refuses:
            raise RuntimeError(f"there are gradients but no curvature was captured: {DERIVATIVES}")
        return True
    if nothing:
        raise RuntimeError(
            f"there are gradients but no curvature was captured: {_silent_trigger(engine)}. Call the model and the "
            "loss between two steps with gradients enabled, then loss.backward(); the optimizer must have been built "
            "before that forward pass (and before torch.compile's first call)"
        )
    excluded = set() if engine.recorder is None else engine.recorder.context.check.excluded
    new = [block for block in missing if block.name in names and block.name not in excluded]
    seen = {} if engine.recorder is None else engine.recorder.forward.products
    fresh = seen.keys() - engine.blueprint.products.keys()  # are layers from the next step on
    alone = {block.name: set(left.get(block.name, block.params)) - fresh for block in new}
    engine.followers.add(new, alone)
    return True


def _only_odd(engine: Watched, blocks: list[Curvature]) -> bool:
    """Whether others were measured before, and these never, so that it is their use that is not seen, not the loss."""
    new = not any(block.average or engine.blueprint.alone.issuperset(block.params) for block in blocks)
    return new and any(block.average for block in engine.blocks)


def _silent_trigger(engine: Watched) -> str:
    assert engine.recorder is not None
    hint, loss_fn = engine.hint(), engine.recorder.loss_fn
    if hint is not None:
        return hint
    if not engine.hooked:
        return "optimizer.remove() has taken its hooks away"
    if loss_fn is None:
        return "loss_fn=None and optimizer.observe(output, target, loss_fn) was not called in this step"
    if isinstance(loss_fn, WatchedLoss):
        return "the function given as loss_fn= was not seen: call it as optimizer.loss_fn(output, target)"
    if isinstance(loss_fn, nn.Module):
        return "the loss module given as loss_fn= was not called on the model's output in this step"
    return "no backward() reached the model's output through a recorded forward pass"
