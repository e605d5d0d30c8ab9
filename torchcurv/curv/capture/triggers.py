"""Triggers: where a gradient that arrives in the user's backward tells of a loss.

A trigger is a pre-hook on a node of the graph, and lives in it. So it refers neither to that node nor to one above it:
that would be a cycle that Python cannot collect.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.capture.calls import Capture
from torchcurv.curv.capture.context import LossEvent
from torchcurv.curv.capture.witness import Expected, expected_from
from torchcurv.curv.distributed import Ranks
from torchcurv.curv.graph import Edge, Frozen, edge_of, running_node
from torchcurv.curv.losses.formula import LabelFactor
from torchcurv.curv.losses.loss import Loss
from torchcurv.curv.losses.settings import LossSettings
from torchcurv.curv.losses.squared_error import SquaredError
from torchcurv.curv.losses.terms import Terms
from torchcurv.curv.numerics import at_least_float32

ANY_LOSS = Loss("any loss", SquaredError())  # which stands for one that is not asked


class Listener(Protocol):
    """Who is told of losses."""

    settings: LossSettings
    ranks: Ranks

    def fed_by(self, trigger: Trigger) -> list[Curvature]:
        """The blocks that a gradient at this trigger feeds."""
        ...

    @property
    def hard_labels(self) -> bool:
        """Whether a loss known by its name has shown to be one of labels."""
        ...

    def check_named(self, loss: Loss, f: Tensor, arriving: Tensor, terms: Terms, found: LabelFactor | None) -> None:
        """Raise if what arrives at f cannot be the gradient of a loss that is known by its name."""
        ...

    def measure(self, event: LossEvent, blocks: list[Curvature]) -> None:
        """Feed the blocks by this loss."""
        ...

    def derivative_taken(self, capture: Capture) -> None:
        """A backward call whose own derivatives are wanted has reached the output of a capture."""
        ...


@dataclass(eq=False)
class Trigger(ABC):
    """One loss of one capture, whose gradient is to arrive.

    number: of the node's input. measured_in: the step in which the loss was last measured.
    observed: whether `observe` told of it, so that no other trigger of this capture counts. of_a_loss: whether it feeds
    blocks whose curvature depends on the loss; else those whose does not.
    """

    listener: Listener
    capture: Capture
    number: int
    observed: ClassVar[bool] = False
    of_a_loss: ClassVar[bool] = True

    def arm(self, node: Node) -> None:
        node.register_prehook(self)

    def __call__(self, grads: tuple[Tensor | None, ...]) -> None:
        """Runs when gradients arrive at the node."""
        gradient = grads[self.number]
        if gradient is None or (self.capture.explicit and not self.observed):
            return
        blocks = self.listener.fed_by(self)
        if not blocks:
            return
        with self.listener.ranks.pass_of_ours():
            event, witness = self.event(gradient), self.capture.witness
            if witness is not None and not witness.covered and not event.terms.empty:
                witness.expected += self.sent(event, blocks)
            self.listener.measure(event, blocks)

    def sent(self, event: LossEvent, blocks: list[Curvature]) -> list[Expected]:
        """What this loss sends to the output of its capture, where that is known."""
        return []

    @abstractmethod
    def event(self, gradient: Tensor) -> LossEvent:
        """What the gradient says of the loss."""


@dataclass(eq=False)
class DerivativeTaken:
    """At the model's output: sees derivatives of it by `torch.autograd.grad(..., create_graph=True)`.

    What is then computed of them reaches the parameters past the output, where no trigger sees it.
    """

    listener: Listener
    capture: Capture

    def __call__(self, grads: tuple[Tensor | None, ...]) -> None:
        if torch.is_grad_enabled():
            self.listener.derivative_taken(self.capture)


@dataclass(eq=False)
class LossModule(Trigger):
    """At what a loss module returned for (f, target): the gradient is the factor of this loss."""

    loss: Callable[..., Tensor]
    output_edge: Edge
    f: Tensor
    target: Any

    def event(self, gradient: Tensor) -> LossEvent:
        f, capture = self.f, self.capture
        if f.dim() and f.shape[0] != capture.n and sorted(f.shape) == sorted(capture.shape):
            raise ValueError(
                f"the loss was given an output of shape {tuple(f.shape)}, and dimension 0 of the model's output "
                f"{tuple(capture.shape)} is the batch: return the batch first from the model, or call "
                "optimizer.observe(output, target) with an output whose dimension 0 is the batch"
            )
        loss, scale = self.listener.settings.loss(self.loss), self.listener.settings.scale()
        reached = at_least_float32(gradient) / scale
        unreduced = gradient.dim() > 0 if loss.formula.joint else loss.reduction == "none"
        terms = loss.terms(f, self.target, capture.n, reached if unreduced else None)
        factor = 1.0 if unreduced else reached
        return LossEvent(loss, terms, factor, f.detach(), edge_of(f), capture, self.output_edge, scale)

    def sent(self, event: LossEvent, blocks: list[Curvature]) -> list[Expected]:
        return [expected_from(event, self.f, blocks)]


@dataclass(eq=False)
class AtOutput(Trigger):
    """At the tensor f that the loss is applied to. shape: at its edge."""

    shape: torch.Size
    f: Frozen

    @property
    def edge(self) -> Edge:
        """Of f, while its node is running."""
        return Edge(running_node(), self.number, self.shape)


@dataclass(eq=False)
class InputsAlone(AtOutput):
    """At an output of the model, for blocks whose curvature is none of the loss: any gradient that arrives will do."""

    observed: ClassVar[bool] = True
    of_a_loss: ClassVar[bool] = False

    def event(self, gradient: Tensor) -> LossEvent:
        edge, f = self.edge, self.f.read()
        canonical = at_least_float32(ANY_LOSS.layout(f, self.capture.n)[0])
        terms = Terms(ANY_LOSS.formula, canonical, 1.0, None, True, None)
        return LossEvent(ANY_LOSS, terms, 1.0, f, edge, self.capture, edge)


@dataclass(eq=False)
class NamedOutput(AtOutput):
    """At the model's output, for a loss that is known by its name."""

    def event(self, gradient: Tensor) -> LossEvent:
        edge, f = self.edge, self.f.read()
        loss, scale = self.listener.settings.loss(), self.listener.settings.scale()
        arrived = gradient.reshape(f.shape)
        loss = loss.with_class_dim_of(f, arrived)
        said = self.listener.settings.factor()
        hard = self.listener.hard_labels
        terms, factor, found = loss.terms_from_gradient(f, arrived, self.capture.n, scale, said, hard)
        self.listener.check_named(loss, f, arrived, terms, found)
        return LossEvent(loss, terms, factor, f, edge, self.capture, edge, scale, gradient)


@dataclass(eq=False)
class Observed(AtOutput):
    """At a tensor that `observe` was told of.

    output_edge: where the capture is kept; None: here. terms: from f to those of the loss. weight: its factor.
    samples: the sample of each row of f, where the user said it.
    """

    output_edge: Edge | None
    loss: Loss
    terms: Callable[[Tensor], Terms]
    weight: float | Tensor
    samples: Tensor | None = None
    observed: ClassVar[bool] = True

    def event(self, gradient: Tensor) -> LossEvent:
        edge, f = self.edge, self.f.read()
        return LossEvent(
            self.loss,
            self.terms(f),
            self.weight,
            f,
            edge,
            self.capture,
            self.output_edge or edge,
            self.listener.settings.scale(),
            samples=self.samples,
        )
