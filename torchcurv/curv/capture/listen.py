"""Signals that the user's own backward brings."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.capture.assemble import StatisticsAssembler
from torchcurv.curv.capture.calls import Call
from torchcurv.curv.graph import Edge, backward_id
from torchcurv.curv.numerics import full_precision


class BackwardListener:
    """The calls of one block whose gradients the running backward is still to bring."""

    def __init__(self, assembler: StatisticsAssembler, block: Curvature, scale: Tensor) -> None:
        self.assembler, self.block, self.scale = assembler, block, scale
        self.task = backward_id()
        self.missing = 0
        self.received: list[tuple[Call, Tensor]] = []

    def expect(self, call: Call, edge: Edge) -> None:
        self.missing += 1
        handle: list[Any] = []
        handle.append(edge.node.register_prehook(partial(self._take, call, edge.number, handle)))

    def _take(self, call: Call, number: int, handle: list[Any], grads: tuple[Tensor | None, ...]) -> None:
        if backward_id() != self.task:
            return  # a pass of our own, for another kind, inside the same backward
        handle[0].remove()
        self.missing -= 1
        gradient = grads[number]
        if gradient is not None:
            self.received.append((call, gradient))
        self.deliver_if_complete()

    @torch.no_grad()
    def deliver_if_complete(self) -> None:
        if self.missing or not self.received:
            return
        calls, grads = [call for call, _ in self.received], [grad for _, grad in self.received]
        with full_precision(grads[0].device.type):
            self.assembler.deliver([self.block], calls, [list(grads)], self.scale, 1.0)
        self.received = []
