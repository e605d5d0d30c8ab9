"""A curvature pass: from one loss of one forward pass to what the blocks measure.

Two ways bring the signals, into the same assembler: `torch.autograd.grad` of our own from the output to the edges of
the layers, or pre-hooks on the layers' nodes during the user's backward, whose gradient is the signal of the empirical
Fisher. Which signals there are, if any, is said by the kinds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.capture.assemble import StatisticsAssembler
from torchcurv.curv.capture.calls import Call
from torchcurv.curv.capture.context import LossEvent, PassContext
from torchcurv.curv.capture.listen import BackwardListener
from torchcurv.curv.graph import Edge, backward_id, edges_below, will_run
from torchcurv.curv.hessian.operation import Key, key_of
from torchcurv.curv.hessian.products import OutputLoss
from torchcurv.curv.hessian.tape import Tape
from torchcurv.curv.kinds.base import CurvatureKind, Signals, SignalSource
from torchcurv.curv.losses.terms import Terms

SIGNAL_ELEMENTS = 1 << 25  # elements of layer outputs held at once when many signals are sent


class CurvaturePass(SignalSource):
    """What the kinds of some blocks measure of one loss.

    part: the same loss for some of the samples, where the signals start that may stand for all.
    """

    def __init__(
        self, context: PassContext, event: LossEvent, blocks: list[Curvature], part: LossEvent | None = None
    ) -> None:
        self.context, self.event, self.blocks = context, event, blocks
        self.edges = {id(call): event.edge_at(edge) for call, edge in event.capture.calls}
        self.assembler = StatisticsAssembler(context.layers, context.members, event.terms, event.calls)
        self._part = None if part is None else CurvaturePass(context, part, blocks)

    @torch.no_grad()
    def run(self) -> None:
        """Feed the blocks."""
        if self.terms.empty:
            return
        for block in self.blocks:
            block.pending.begin(backward_id(), block.params)
        with self.context.running(self.event.f.device):
            self.sampled().verify()
            for kind, blocks in self._by_kind().items():
                kind.measure(self, blocks)

    def _by_kind(self) -> dict[CurvatureKind, list[Curvature]]:
        context, kinds = self.context, dict[CurvatureKind, list[Curvature]]()
        for block in self.blocks:
            if block.name in context.due and block.name not in context.check.excluded:
                kinds.setdefault(context.kind_of(block), []).append(block)
        return kinds

    def verify(self) -> None:
        """Check blocks that have not been: that the recorded calls explain their gradient."""
        context = self.context
        checked = [block for block in self.blocks if context.kind_of(block).checked]
        doubtful = [block for block in checked if context.check.needs_check(block, self.assembler.n)]
        if doubtful:
            context.check.run(doubtful, self.assembler, self.terms.draw(self.generator()), self.backward)

    # ------------------------------------------------------------------------ what kinds ask

    @property
    def terms(self) -> Terms:
        return self.event.terms

    def sampled(self) -> CurvaturePass:
        return self if self._part is None else self._part

    def generator(self) -> torch.Generator:
        return self.context.generator(self.event.f.device)

    def send(self, signals: Signals, blocks: Sequence[Curvature]) -> None:
        calls = self.assembler.calls_of(blocks)
        scale = self.event.factor * self.terms.reduction
        size = max(1, SIGNAL_ELEMENTS // sum(call.shape.numel() for call in calls))
        chunk: list[list[Tensor | None]] = []
        done = 0
        for done, signal in enumerate(signals.values, 1):
            chunk.append(self.backward(calls, signal))
            if len(chunk) == size or done == signals.count:
                self.assembler.deliver(blocks, calls, chunk, scale, len(chunk) / signals.count)
                chunk = []
        if done != signals.count:  # what was over would be missing, and what came too late would be counted twice
            raise ValueError(
                f"a kind said that it sends {signals.count} signals, and sent {done}: Signals(count, values)"
            )

    def listen(self, blocks: Sequence[Curvature]) -> bool:
        """The gradients are loss_scale * factor * R times the signals of L / R, whose square is to count factor * R."""
        event, capture = self.event, self.event.capture
        own_loss_only = self.terms.uniform and not capture.explicit and backward_id() != -1
        differentiated = capture.witness is not None and capture.witness.differentiated
        if not own_loss_only or differentiated or capture.mixed or any(call.losses > 1 for call in event.calls):
            return False
        scale = torch.as_tensor(event.factor * self.terms.reduction * event.loss_scale**2, device=event.f.device)
        scale = torch.where(scale == 0, 0, 1 / scale)
        for block in blocks:
            listener = BackwardListener(self.assembler, block, scale)
            for call in self.assembler.calls_of([block]):
                edge = self.edges[id(call)]
                if event.arriving is not None and edge[:2] == event.f_edge[:2]:
                    listener.received.append((call, event.arriving))
                elif will_run(edge.node):
                    listener.expect(call, edge)
            listener.deliver_if_complete()
        return True

    def deliver_inputs(self, blocks: Sequence[Curvature]) -> None:
        """By the calls that f depends on."""
        below = edges_below(self.event.f_edge)
        reached = {id(call) for call in self.assembler.calls_of(blocks) if self.edges[id(call)][:2] in below}
        for block in blocks:
            self.assembler.deliver_inputs(block, reached)

    def output_loss(self) -> OutputLoss:
        event = self.event
        return OutputLoss(event.loss, self.terms, self.assembler.n, event.f, event.f_edge, event.factor)

    @contextmanager
    def differentiated(self) -> Iterator[OutputLoss]:
        with self.context.batch_statistics_differentiated():
            yield self.output_loss()

    def tape(self) -> Tape:
        return self.context.tapes.of(self.event.capture)

    def edges_of(self, blocks: Sequence[Curvature]) -> set[Key]:
        return {key_of(self.edges[id(call)]) for call in self.assembler.calls_of(blocks)}

    def deliver_propagated(self, at_edges: dict[Key, Tensor], blocks: Sequence[Curvature]) -> None:
        keys = {id(call): key_of(self.edges[id(call)]) for call in self.assembler.calls_of(blocks)}
        at_calls = {call: at_edges[key] for call, key in keys.items() if key in at_edges}
        for block in blocks:
            self.assembler.deliver_propagated(block, at_calls)

    # ------------------------------------------------------------------------ a backward of our own

    def backward(self, calls: list[Call], signal: Tensor, params: Iterable[Tensor] = ()) -> list[Tensor | None]:
        """Gradients at the outputs of the calls, then at params; None where f does not depend on one.

        signal: [n, t, c], at f.
        """
        f, f_edge = self.event.f, self.event.f_edge
        at_f = self.event.loss.layout(f, self.assembler.n)[1](signal).to(f.dtype).reshape(f_edge.shape)
        wanted: list[Any] = [self.edges[id(call)].public for call in calls]
        wanted += [get_gradient_edge(p) for p in params]
        inner = [edge for edge in wanted if edge[:2] != f_edge[:2]]
        got = iter(_gradients(f_edge, inner, at_f) if inner else ())
        return [at_f if edge[:2] == f_edge[:2] else next(got) for edge in wanted]


def _gradients(start: Edge, edges: list[Any], gradient: Tensor) -> Sequence[Tensor | None]:
    """Those at some edges, from that at the start."""
    try:
        return torch.autograd.grad([start.public], edges, [gradient], retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "Checkpointing is not compatible" not in str(error):
            raise
        raise RuntimeError(
            "torch.utils.checkpoint with use_reentrant=True hides the layers inside it from a curvature pass: "
            "pass use_reentrant=False"
        ) from error
