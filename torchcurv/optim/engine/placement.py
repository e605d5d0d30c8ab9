"""Which process makes which factors, and how the others get them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from torchcurv.curv.approximations.factor import Factor, with_tensors
from torchcurv.curv.block.block import Curvature, Made, factors_of
from torchcurv.curv.distributed import Ranks
from torchcurv.curv.linalg.triangles import from_triangle, to_triangle
from torchcurv.optim.engine.agreement import alike, digest
from torchcurv.optim.engine.reduction import slots_of

Dampings = tuple[float | Tensor, float | Tensor | None, float | None]  # of steps, the same as it was given, of draws
Job = tuple[Curvature, float | Tensor, float | Tensor | None, float | None]  # a block, and these

# Sum of n³ that sharing must spare the process with most to do. Two processes on a CPU break even at 2e9, in matrices
# of a thousand rows (docs/results/communication.md), and gain with more rows or processes, since the factors to be
# sent are some n² numbers. On a GPU 5e9 takes 1 to 5 ms, and such a message less than one inside of a machine.
PAYS = 5e9


@dataclass(frozen=True)
class Form:
    """What a factor of a block is like, on the meta device; message: what is sent of one."""

    factor: Factor
    message: list[Tensor]


_forms: WeakKeyDictionary[Curvature, dict[torch.dtype, Form | None]] = WeakKeyDictionary()


def factorise(jobs: Sequence[Job], ranks: Ranks) -> None:
    """Make the factors of blocks, here or, where that is shared, each in one process, which sends it to all."""
    alone = ranks.placement == "replicated" or ranks.count == 1
    costs = [0 if alone else cost_of(block) for block, *_ in jobs]
    owners = owners_of(costs, ranks.count)
    shared = [k for k, cost in enumerate(costs) if cost] if is_shared(ranks.placement, costs, owners) else []
    found = _shared([jobs[k] for k in shared], [owners[k] for k in shared], ranks) if shared else {}
    for block, damping, nominal, of_draws in jobs:
        block.refactor(damping, nominal, of_draws, found.get(block))


def cost_of(block: Curvature) -> int:
    """n³ over the matrices of a block; 0: no other process makes its factors.

    So it is of diagonals, of what is kept as rows, and where the sizes of a factor are not known without data.
    """
    if block.approx.of_one_step or not block.approx.symmetric or form_of(block) is None:
        return 0
    shapes = [x.shape for key, x in slots_of(block).items() if key in block.approx.symmetric]
    return sum(shape.numel() * shape[-1] for shape in shapes if shape[-1] > 1)


def owners_of(costs: Sequence[int], count: int) -> list[int]:
    """The process that makes each: the most expensive first, to the one that has least to do.

    More processes than have equal shares send more messages and are not done earlier: while all of the shares are
    below the largest cost, or the mean, a process takes more before another one begins.
    """
    loads, owners = [0] * count, [0] * len(costs)
    share = max([sum(costs) / count, *costs])
    for k in sorted(range(len(costs)), key=lambda k: -costs[k]):
        fits = (owner for owner, load in enumerate(loads) if load + costs[k] <= share)
        owners[k] = next(fits, loads.index(min(loads)))
        loads[owners[k]] += costs[k]
    return owners


def is_shared(placement: str, costs: Sequence[int], owners: Sequence[int]) -> bool:
    """Whether each makes its own factors alone."""
    loads = dict.fromkeys(owners, 0)
    for owner, cost in zip(owners, costs, strict=True):
        loads[owner] += cost
    spared = sum(costs) - max(loads.values(), default=0)
    return placement == "shared" or (placement == "auto" and spared > PAYS)


def form_of(block: Curvature) -> Form | None:
    """That of the factor of nothing; None: it is not known without data."""
    p, known = block.params[0], _forms.setdefault(block, {})
    dtype = torch.promote_types(p.dtype, torch.float32)
    if dtype not in known:
        empty = block.approx.empty(block.layers, torch.zeros((), dtype=dtype, device="meta"))
        try:
            factor, ok = block.approx.factor(empty, 1.0, block.options.damping_type)
            known[dtype] = Form(factor, message_of(factor, ok)) if factor.state() else None
        except RuntimeError:  # it reads numbers
            known[dtype] = None
    return known[dtype]


def message_of(factor: Factor, ok: Tensor) -> list[Tensor]:
    """What is sent of a factor: its state, of symmetric matrices the triangles, and whether it succeeded."""
    parts = [to_triangle(x) if key in factor.symmetric else x.contiguous() for key, x in factor.state().items()]
    return [*parts, ok.to(parts[0].dtype)]


def _received(form: Factor, message: Sequence[Tensor]) -> Made:
    """The inverse. All read what was sent, also the process that has made it: so their bits are the same."""
    *parts, ok = message
    pairs = zip(form.state().items(), parts, strict=True)
    state = {key: from_triangle(x, like.shape[-1]) if key in form.symmetric else x for (key, like), x in pairs}
    return with_tensors(form, state), ok > 0


def _shared(jobs: Sequence[Job], owners: Sequence[int], ranks: Ranks) -> dict[Curvature, list[Made]]:
    """The factors of each block, made by one process and sent to all."""
    sent, failure = [], None
    for (block, damping, _, of_draws), owner in zip(jobs, owners, strict=True):
        try:
            sent.append(_message(block, damping, of_draws, owner == ranks.rank))
        except Exception as why:  # for all processes to raise
            failure = failure or why
    _agree([block for block, *_ in jobs], failure, ranks)
    ranks.spread_(
        [x for message in sent for x in itertools.chain(*message)],
        [owner for message, owner in zip(sent, owners, strict=True) for _ in itertools.chain(*message)],
    )
    found = {}
    for (block, *_), message in zip(jobs, sent, strict=True):
        form = form_of(block)
        assert form is not None
        found[block] = [_received(form.factor, one) for one in message]
    return found


def _message(block: Curvature, damping: float | Tensor, of_draws: float | None, own: bool) -> list[list[Tensor]]:
    """What is sent of a block, or room for it."""
    form, device = form_of(block), block.params[0].device
    assert form is not None
    if not own:
        return [[torch.empty_like(x, device=device) for x in form.message] for _ in range(1 if of_draws is None else 2)]
    made = [message_of(factor, ok) for factor, ok in factors_of(block, damping, of_draws)]
    for one in made:
        if [(x.shape, x.dtype) for x in one] != [(x.shape, x.dtype) for x in form.message]:
            raise ValueError(
                f"{type(block.approx).__name__} makes factors of other shapes of measurements than of `empty`: pass "
                'factor_placement="replicated"'
            )
    return made


def _agree(blocks: Sequence[Curvature], failure: Exception | None, ranks: Ranks) -> None:
    """Raise in all processes what one of them met, or where they do not make the same factors."""
    device, numbers = blocks[0].params[0].device, digest([block.name for block in blocks])
    told = torch.tensor([*numbers, *(x * x for x in numbers), failure is not None], device=device)
    ranks.sum_([told])
    *said, errors = told.tolist()
    if errors:
        others = filter(None, ranks.texts("" if failure is None else f"{type(failure).__name__}: {failure}", device))
        raise failure or RuntimeError(f"another process could not make its factors, so that none steps: {next(others)}")
    if not alike(said[:2], said[2:], ranks.count):
        raise RuntimeError(
            "the processes do not make factors of the same blocks in this step: give all of them gradients of the same "
            'parameters, or pass factor_placement="replicated"'
        )
