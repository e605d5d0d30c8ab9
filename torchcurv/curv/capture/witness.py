"""The gradient that arrives at a model's output, as the witness of what the loss is.

A loss module is watched: what it was given and what it returned. That the gradient is the one of its formula, and that
nothing else depends on the same output, is taken from no one: on each pass that measures, what arrives at the output is
compared with what the watched losses send there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.linalg import vector_norm

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.capture.context import LossEvent
from torchcurv.curv.graph import backward_id
from torchcurv.curv.numerics import at_least_float32, on_cpu


class Judge(Protocol):
    """Who is told what a witness saw."""

    @property
    def inside(self) -> bool:
        """Whether the backward that runs is one of our own."""
        ...

    def unexplained(self, layers: frozenset[int], gradient: Tensor) -> None:
        """A gradient arrived at an output whose losses were not seen."""
        ...


@dataclass(frozen=True)
class Expected:
    """What one watched loss sends to an output in one backward call.

    gradient: at the output's edge. rounding: a bound of what rounding makes of its norm, computed when asked.
    """

    task: int
    gradient: Tensor
    rounding: Callable[[], Tensor]
    blocks: list[Curvature]
    loss: str


@dataclass(eq=False)
class OutputWitness:
    """A pre-hook on the node of one output. It refers to no node, and so it lives in the graph.

    number: of the node's input. layers: the numbers of those that the output depends on.
    covered: whether someone else answers for what arrives: `observe`, or an output that was joined with others.
    differentiated: whether derivatives of the output were taken that can be differentiated again.
    """

    judge: Judge
    number: int
    layers: frozenset[int]
    covered: bool = False
    differentiated: bool = False
    expected: list[Expected] = field(default_factory=list)

    def __call__(self, grads: tuple[Tensor | None, ...]) -> None:
        gradient = grads[self.number]
        if gradient is None or self.judge.inside:
            return
        self.differentiated |= torch.is_grad_enabled()  # which it is in a hook where create_graph=True
        task, noted = backward_id(), self.expected
        expected = [one for one in noted if one.task == task]
        self.expected = [one for one in noted if one.task != task]  # one backward may run inside of another
        if self.covered:
            return
        if expected:
            self._compare(at_least_float32(gradient), expected)
        else:
            self.judge.unexplained(self.layers, gradient)

    @torch.no_grad()
    def _compare(self, gradient: Tensor, expected: list[Expected]) -> None:
        """Object to what the losses measured, where their sum is not what arrives; one that is not finite is let pass,
        since its measurements are left out."""
        total = sum((one.gradient for one in expected[1:]), expected[0].gradient)
        # Another loss or a missing term is off by per cents and more. Rounding leaves 1e-6 in float32 and a few units
        # of a coarser type, and where f and y nearly cancel, `rounding`.
        tolerance = max(1e-3, 8 * torch.finfo(gradient.dtype).eps)
        off, sent = vector_norm(gradient - total.reshape(gradient.shape)), vector_norm(total)
        if on_cpu(off) and off.item() <= tolerance * sent.item():
            return
        wrong = off > sum((one.rounding() for one in expected), tolerance * sent)
        name = " and ".join(dict.fromkeys(one.loss for one in expected))
        for block in {id(block): block for one in expected for block in one.blocks}.values():
            if self.differentiated:
                block.pending.doubt_if(wrong, OF_DERIVATIVES)
            else:
                block.pending.object_if(wrong, _of_another_loss(name))


def expected_from(event: LossEvent, at: Tensor, blocks: list[Curvature]) -> Expected:
    """What a loss sends to the output of its capture; at: what it was given, f in its graph."""
    loss, terms, f = event.loss, event.terms, event.f
    scale = torch.as_tensor(event.factor * terms.reduction * event.loss_scale, device=f.device).to(terms.f.dtype)
    canonical, weights = terms.arriving_gradient() * scale, terms.weights
    if weights is not None:
        canonical = canonical * (weights.unsqueeze(-1) if weights.dim() == 2 else weights)
    sent = loss.layout(f, len(terms.f))[1](canonical).to(f.dtype)
    for start in (get_gradient_edge(at), event.f_edge.public):  # a view lies above the output, its base may lie below
        if (start.node, start.output_nr) == event.output_edge[:2]:
            break
        ends, given = [event.output_edge.public], [sent.reshape(at.shape)]
        (below,) = torch.autograd.grad([start], ends, given, retain_graph=True, allow_unused=True)
        if below is not None:
            sent = below
            break

    def rounding() -> Tensor:
        """dc/df is a difference, of f and y or of p and y, each right to a rounding: of f itself, or of 1."""
        largest = scale.abs() if weights is None else scale.abs() * weights.abs().amax()
        return 4 * torch.finfo(f.dtype).eps * (terms.f.norm() + terms.f.numel() ** 0.5) * largest

    return Expected(backward_id(), at_least_float32(sent), rounding, blocks, loss.name)


def _of_another_loss(name: str) -> str:
    return (
        f"what arrives at the model's output is not what the watched loss ({name}) sends there: the loss module "
        "computes something else (a subclass with a forward of its own), or other terms of the loss depend on the same "
        "output (an entropy, a penalty, a second loss). Register what the module computes with "
        "torchcurv.register_loss(type, formula=), or call optimizer.observe(output, target, loss_fn, weight) before "
        "backward() for what is to be measured: the rest is then left out"
    )


OF_DERIVATIVES = (
    "the loss has terms that are made of derivatives of the network (a residual of a differential equation, a gradient "
    "penalty), whose curvature is not measured: only that of the watched loss is. For a loss of residuals "
    "torchcurv.optim.ResidualNewton takes the whole of it"
)
OF_ANOTHER_OUTPUT = (
    "the loss depends on an output of the model in another way than through the loss module given as loss_fn=: the "
    "curvature of that part is not measured. Call optimizer.observe(output, target, loss_fn, weight) before backward() "
    "for each output that counts"
)


# ---------------------------------------------------------------------------------------------- signs

NEGATIVE = (
    "the loss, or some of its terms, is multiplied by a negative number, and has no positive curvature then: choose "
    'negative="abs" for the curvature of the absolute values, or negative="model" for that of the model\'s own '
    "distribution, every term counted once and the mean taken (what policy gradients mean by the Fisher); or keep what "
    "is negative out of the loss that is watched, by optimizer.observe(output, target, loss_fn, weight) for the rest"
)


def with_signs(event: LossEvent, policy: str, blocks: list[Curvature]) -> LossEvent:
    """The loss as its curvature counts it.

    policy: "error": the step that would use the curvature raises, if something is negative; "abs": absolute values of
    the factor and of the weights of terms; "model": no factor, and each term that has a weight counts once in the mean.
    """
    terms = event.terms
    if policy == "model":
        weights = None if terms.weights is None else (terms.weights != 0).to(terms.f.dtype)
        count = terms.f[..., :1].numel() if weights is None else weights.sum().clamp_min(1)
        count = terms.f.numel() if terms.formula.elementwise and weights is None else count
        mean = replace(terms, weights=weights, reduction=terms.formula.factor / count, uniform=False)
        return replace(event, terms=mean, factor=1.0)
    factor = event.factor
    signed = [x for x in (factor, terms.weights) if isinstance(x, Tensor)]
    if not isinstance(factor, Tensor) and factor < 0:
        signed.append(torch.tensor(factor, device=event.f.device))
    if not signed:
        return event
    negative = torch.stack([(x < 0).any() for x in signed]).any()
    if on_cpu(negative) and not negative:
        return event
    if policy == "error":
        for block in blocks:
            block.pending.object_if(negative, NEGATIVE)
    weights = None if terms.weights is None else terms.weights.abs()
    return replace(
        event, terms=replace(terms, weights=weights), factor=factor.abs() if isinstance(factor, Tensor) else abs(factor)
    )
