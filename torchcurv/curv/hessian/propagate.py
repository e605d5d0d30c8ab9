"""Propagation of H = d²L/dz² from a model's output to the outputs of its layers, through all that lies between.

    diag      HesScale (Elsayed et al., 2210.11639, 2406.03276): diag(H) of every sample, a tensor shaped like z
    matrix    HBP (Dangel, Harmeling, Hennig, 1902.01813): mean_n of d²L/dz_n², one [d, d] over a sample's elements

For z_out = f(z) with the Jacobian J of f,

    H = J^T H_out J + sum_k (dL/dz_out_k) d²f_k/dz²,

of which each form keeps its part. A `Tape` notes the torch functions of one forward pass. RULES says, for each of
them, what J is: a map with one entry per row (moves, scales, elementwise functions), or one that all samples share
(products with a weight, pools). Most rules get J^T from autograd, by running the function again on detached inputs.

Where branches fork, their contributions add up. The cross terms J1^T H J2 + J2^T H J1 of two branches that meet again
are exact where no layer lies on either: what lies between is then taken as one function (chains.py). With a layer on
one of them they are dropped. Statistics of a batch count as constants.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor
from torch.autograd.graph import Node

from torchcurv.curv.graph import Edge
from torchcurv.curv.hessian.chains import Chain, chains
from torchcurv.curv.hessian.composed import Composed
from torchcurv.curv.hessian.local import EXACT, RESIDUALS, Propagation, Treatment
from torchcurv.curv.hessian.operation import Key, Op, key_of, place_of, refusal
from torchcurv.curv.hessian.tape import Tape

Gradients = Callable[[list[Edge]], Sequence[Tensor]]


def propagate(
    tape: Tape,
    output_edge: Edge,
    seed: Tensor,
    gradient_at: Gradients,
    form: str,
    how: Treatment = EXACT,
    targets: Collection[Key] | None = None,
) -> dict[Key, Tensor]:
    """H at the output of every operation between `output_edge` and the targets, by edge.

    The graph must still hold what it has saved.

    Args:
        seed: H there: form "diag" a tensor shaped like the output, "matrix" a mean over samples [d, d].
        gradient_at: dL/d(tensor) at each of some edges; called at most once, for what `residual` needs.
        how: what becomes of second derivatives, how Jacobians are averaged, and the largest matrix.
        targets: edges of the outputs of layers; what lies below all of them needs no rule. None: everything.
    """
    if form not in ("diag", "matrix"):
        raise ValueError(f'form={form!r}: pass "diag" or "matrix"')
    if how.residual not in RESIDUALS:
        raise ValueError(f"residual={how.residual!r}: pass one of {', '.join(map(repr, RESIDUALS))}")
    n = 1 if form == "diag" else output_edge.shape.numel() // len(seed)
    now = Propagation(form, n, how)
    steps = _steps(tape, output_edge, targets)
    for op, slots in steps:
        _check(op, slots, now)
    taken = {} if targets is None else chains(steps, targets, now)
    if how.residual != "zero":
        curved = [op.output for op, _ in steps if op.rule.curved or (op in taken and taken[op].curved)]
        gradients = gradient_at(curved) if curved else []
        now.gradients = {key_of(edge): g.detach() for edge, g in zip(curved, gradients, strict=True)}

    found: dict[Key, Tensor] = {key_of(output_edge): seed.detach()}
    for op, slots in steps:
        key = key_of(op.output)
        if key not in found:  # chains have gone past it
            continue
        # after its step, what is not asked for gives its memory back
        H = found[key] if targets is None or key in targets else found.pop(key)
        H = H.reshape(op.shape) if now.diag else H
        for edge, new in _below_step(op, slots, taken.get(op), H, now):
            new = new.detach().to(seed.dtype)
            before = found.get(key_of(edge))
            found[key_of(edge)] = new if before is None else before + new.reshape(before.shape)
    if now.diag:  # an edge stands for every view that keeps the order: as its operation made it
        made = {key_of(op.output): op.shape for op in tape.ops}
        found = {key: H.reshape(made.get(key, H.shape)) for key, H in found.items()}
    return found


Arriving = list[tuple[Edge, Tensor]]


def _below_step(op: Op, slots: list[int], chain: Chain | None, H: Tensor, now: Propagation) -> Arriving:
    """What one operation, or the chain whose head it is, makes of H at its output, by where it arrives."""
    new = None if chain is None else _through(chain, H, now)
    return new or [(op.inputs[slot], op.rule.apply(op, slot, H, now)) for slot in slots]


def _through(chain: Chain, H: Tensor, now: Propagation) -> Arriving | None:
    """H at the starts of a chain; None for a diagonal that takes more products than `max_products`."""
    composed, found = Composed(chain.steps), []
    for edge in chain.starts:
        new = composed.at(edge, H, now, now.how.max_products)
        if new is None:
            return None
        found.append((edge, new))
    g = now.gradients.get(key_of(composed.head.output))
    if g is not None:  # what came through the chain has been counted
        for op, _ in chain.steps[:-1]:
            key = key_of(op.output)
            if key in now.gradients:
                inside = composed.gradient_inside(key, g).reshape(now.gradients[key].shape)
                now.gradients[key] = now.gradients[key] - inside.to(now.gradients[key].dtype)
    return found


def _steps(tape: Tape, output: Edge, targets: Collection[Key] | None) -> list[tuple[Op, list[int]]]:
    """(operation, arguments that depend on a target), from the output backwards."""
    made = {key_of(op.output) for op in tape.ops}
    nodes = {node for node, _ in made}
    reached = set(made) if targets is None else set(targets)
    gaps: dict[Key, str] = {}  # what no function on the tape made, though it depends on a target: its place

    def reaches(edge: Edge, number: int, after: str) -> bool:
        key = key_of(edge)
        if key in made or key in reached or key in gaps:
            return key in reached or key in gaps
        below = _below(edge.node, nodes)
        if any(node in below for node, _ in reached):
            gaps[key] = place_of(edge.node.name(), number, after)
        return key in gaps

    slots = {}
    for op in tape.ops:
        slots[op] = [slot for slot, edge in op.inputs.items() if reaches(edge, op.number, op.after)]
        if slots[op]:
            reached.add(key_of(op.output))
    reaches(output, tape.calls + 1, tape.last)

    needed, steps = {key_of(output)}, []
    for op in reversed(tape.ops):
        if key_of(op.output) in needed and slots[op]:
            steps.append((op, slots[op]))
            needed |= {key_of(op.inputs[slot]) for slot in slots[op]}
    for key, place in gaps.items():
        if key in needed:
            raise refusal(place, "no torch function that made it was seen (a custom function, or an edit of a part)")
    return steps


def _below(start: Node, nodes: set[Node]) -> set[Node]:
    """Which of `nodes` are met first on the ways down from `start`."""
    met, seen, todo = set(), {start}, [start]
    while todo:
        node = todo.pop()
        if node in nodes and node is not start:
            met.add(node)
            continue
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                todo.append(below)
    return met


def _check(op: Op, slots: list[int], now: Propagation) -> None:
    """Refusals, before anything is computed."""
    rule = op.known
    if rule is None:
        raise op.refused("there is no rule for this function")
    if len(slots) > 1 and not rule.joint:
        raise op.refused("more than one of its arguments depends on layers")
    if now.diag:
        return
    d = max(edge.shape.numel() // now.n for edge in [op.output, *(op.inputs[slot] for slot in slots)])
    if d > now.how.max_dim:
        raise ValueError(
            f"at {op.place} the Hessian is a {d} x {d} matrix, above the limit of {now.how.max_dim}: use "
            f'approx="diag" or raise max_hessian_dim'
        )
