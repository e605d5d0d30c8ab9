"""Capture: what is kept of a forward pass, in the autograd graph itself.

A `Call` lies in the metadata of the graph node of a layer's output, a `Capture` at that of the model's output, and so
both live exactly as long as the graph. Nothing refers from a deep node to a shallow one: that would be a cycle that
Python cannot collect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.graph import Edge, version_of
from torchcurv.curv.layers.layer import Layer, ParameterUse


@dataclass(eq=False)
class Call:
    """One use of one layer: what it was given (detached), and how the gradient at its edge is read.

    shape: of the output. batch_first: from a gradient of that shape to dz [batch, ...] of the site.
    losses: how many losses have used something computed from it.
    differentiated: whether a derivative of an output that depends on it was taken that may be a part of the loss.
    """

    layer: int
    site: ParameterUse
    x: tuple[Any, ...]
    shape: torch.Size
    batch: int
    batch_first: Callable[[Tensor], Tensor] | None = None
    losses: int = 0
    differentiated: bool = False
    seen: int | None = None  # samples times positions, where the output is that of several layers in one product
    superseded: bool = False  # by the gradients of samples of the whole module

    def __post_init__(self) -> None:
        self.versions = [version_of(x) for x in self.x]

    @property
    def edited(self) -> bool:
        """Whether something it was given was edited in place since."""
        return self.versions != [version_of(x) for x in self.x]

    def positions(self, layer: Layer) -> int:
        """Samples times positions of this use of its layer."""
        if self.seen is not None:
            return self.seen
        g, o, _ = layer.site_shape(self.site)
        return self.shape.numel() // (g * o)

    def signal(self, gradient: Tensor) -> Tensor:
        """s [batch, r, g, o] from the gradient at the edge."""
        dz = gradient.reshape(self.shape)
        dz = dz if self.batch_first is None else self.batch_first(dz)
        return self.site.view.signal(self.site.module, dz)


@dataclass(eq=False)
class Capture:
    """The calls that one tensor (the model's output, or what a loss is applied to) may depend on.

    calls: with the edges of their outputs; None stands for the edge of this very tensor, which is kept at it.
    n: the batch size. shape: of the tensor.
    forward: one object per forward pass of the model; None for layers that were called outside one.
    parts: the captures that this one joins. explicit: whether `observe` dealt with it.
    witness: of what arrives at it; None where there is none yet.
    mixed: whether samples meet in it (batch statistics), which a pass of our own cuts and the user's backward does not.
    """

    calls: list[tuple[Call, Edge | None]]
    n: int
    shape: torch.Size
    forward: object | None
    parts: list[Capture] = field(default_factory=list)
    explicit: bool = False
    mixed: bool = False
    witness: Any = None

    def count_loss(self) -> None:
        """One more loss uses something that was computed from the calls."""
        for call, _ in self.calls:
            call.losses += 1

    @property
    def differentiated(self) -> bool:
        return any(call.differentiated for call, _ in self.calls)

    def deal(self) -> None:
        """`observe` was told of it."""
        self.explicit = True
        if self.witness is not None:
            self.witness.covered = True
        for part in self.parts:
            part.deal()

    def batch_of(self, f: Tensor) -> int:
        """n for a tensor [batch, ...] that is observed: its dimension 0, unless it is this one flattened to rows."""
        if not self.n or not f.shape[0]:
            return self.n
        fewer = f.dim() < len(self.shape) and f.shape[0] % self.n == 0
        fits = all(call.batch % f.shape[0] == 0 for call, _ in self.calls)
        return self.n if fewer and (f.numel() == self.shape.numel() or not fits) else f.shape[0]


@dataclass
class NodeNotes:
    """What lies at one edge of the graph: calls of layers, a capture, or both."""

    calls: list[Call] = field(default_factory=list)
    capture: Capture | None = None
