"""A curvature pass: from one loss of one forward pass to what the blocks measure.

Two ways bring the signals, into the same assembler: `torch.autograd.grad` of our own from the output to the edges of
the layers, or pre-hooks on the layers' nodes during the user's backward, whose gradient is the signal of the empirical
Fisher. Which signals there are, if any, is said by the kinds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.capture.assemble import StatisticsAssembler
from torchcurv.curv.capture.calls import Call
from torchcurv.curv.capture.context import LossEvent, PassContext
from torchcurv.curv.capture.parameter_trace import CannotRunAgain
from torchcurv.curv.capture.rows import Mark, Rows, depending
from torchcurv.curv.capture.verify import Path
from torchcurv.curv.graph import Edge, backward_id, edges_below, will_run
from torchcurv.curv.graph_structure import Structure, structure_of
from torchcurv.curv.hessian.operation import Key, key_of
from torchcurv.curv.hessian.products import OutputLoss
from torchcurv.curv.hessian.tape import Tape
from torchcurv.curv.kinds.base import CurvatureKind, Signals, SignalSource
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.losses.terms import Terms
from torchcurv.curv.numerics import full_precision, on_cpu, random_signs

SIGNAL_ELEMENTS = 1 << 25  # elements of layer outputs held at once when many signals are sent


class CurvaturePass(SignalSource):
    """What the kinds of some blocks measure of one loss.

    part: the same loss for some of the samples, where the signals start that may stand for all.
    """

    def __init__(
        self, context: PassContext, event: LossEvent, blocks: list[Curvature], part: LossEvent | None = None
    ) -> None:
        self.context, self.event, self.blocks = context, event, blocks
        self.source = RowSource(context, event)
        self.edges = self.source.edges
        self.rows: Rows | None = None  # of the samples, where they have no equal runs
        self.assembler = self.source.arranged(None)
        self._part = None if part is None else CurvaturePass(context, part, blocks)

    @torch.no_grad()
    def run(self) -> None:
        """Feed the blocks."""
        if self.terms.empty:
            return
        for block in self.blocks:
            block.pending.begin(backward_id(), block.params)
        with self.context.running(self.event.f.device):
            if self.sampled().verify() is not None and self._part is not None:
                self._part = None  # which is of samples in equal runs
                self.verify()
            for source in (self, self.sampled()):
                source.take_common()
            for kind, blocks in self._by_kind().items():
                kind.measure(self, blocks)

    def _by_kind(self) -> dict[CurvatureKind, list[Curvature]]:
        context, kinds = self.context, dict[CurvatureKind, list[Curvature]]()
        for block in self.blocks:
            if block.name in context.due and block.name not in context.check.excluded | context.check.left.keys():
                kinds.setdefault(context.kind_of(block), []).append(block)
        return kinds

    def verify(self) -> Rows | None:
        """Find the rows of samples, and check that the recorded calls of the blocks explain their gradient."""
        context = self.context
        checked = [block for block in self.blocks if context.kind_of(block).checked]
        checked = [block for block in checked if block.name not in context.check.excluded | context.check.left.keys()]
        if checked:
            try:
                self.rows = context.check.settle(checked, self.source)
            except CannotRunAgain:  # the gradients that arrive at its parameters say it in the next pass
                for block in checked:
                    if layers := [layer for layer in block.layers if _by_sample(layer)]:
                        context.check.leave(block, layers)
                return self.verify()
            if self.rows is not None:
                self.assembler = self.source.arranged(self.rows)
        return self.rows

    def take_common(self) -> None:
        """Arrange the layers that the samples have in common: sample by sample, unless the signals are random signs and
        nothing has to tell which sample they are of."""
        modes: dict[int, bool] = {}
        for block in self.blocks:
            if block.name in self.context.check.common:
                if self.rows is None and self.context.kind_of(block).of_samples and self.source.labels()[0] is None:
                    raise ValueError(
                        f"the {block.kind} of block {block.name!r} is made of gradients of samples, and which rows of "
                        "the output belong to which sample cannot be found: say it by optimizer.observe(output, "
                        "target, samples=), the number of the sample of each row"
                    )
                each = block.approx.keeps_inputs or len(block.layers) > 1 or self.context.kind_of(block).drawn is None
                for k in self.context.layers_of(block):
                    modes[k] = modes.get(k, False) or each
        if modes:
            self.assembler = self.source.arranged(self.rows, modes)

    # ------------------------------------------------------------------------ what kinds ask

    @property
    def terms(self) -> Terms:
        return self.assembler.terms

    def sampled(self) -> CurvaturePass:
        return self if self._part is None else self._part

    def generator(self) -> torch.Generator:
        return self.source.generator()

    def send(self, signals: Signals, blocks: Sequence[Curvature]) -> None:
        calls = self.assembler.calls_of(blocks)
        common = self.assembler.common
        each = [call for call in calls if common.get(call.layer)]
        once = [call for call in calls if not common.get(call.layer)]
        calls = once + each
        scale, n = self.event.factor * self.terms.reduction, len(self.terms.f)
        numel = sum(call.shape.numel() for call in once) + n * sum(call.shape.numel() for call in each)
        size = max(1, SIGNAL_ELEMENTS // max(1, numel))
        chunk: list[list[Tensor | None]] = []
        done = 0
        for done, signal in enumerate(signals.values, 1):
            chunk.append([*(self.backward(once, signal) if once else ()), *self._of_each_sample(each, signal)])
            if len(chunk) == size or done == signals.count:
                self.assembler.deliver(blocks, calls, chunk, scale, len(chunk) / signals.count)
                chunk = []
        if done != signals.count:  # what was over would be missing, and what came too late would be counted twice
            raise ValueError(
                f"a kind said that it sends {signals.count} signals, and sent {done}: Signals(count, values)"
            )

    def _of_each_sample(self, calls: list[Call], signal: Tensor) -> list[Tensor | None]:
        """Gradients at the outputs of the calls [n, ...], of the signal of one sample after the other."""
        found: list[list[Tensor | None]] = []
        for k in range(len(signal) if calls else 0):
            alone = torch.zeros_like(signal)
            alone[k] = signal[k]
            found.append(self.backward(calls, alone))
        together: list[Tensor | None] = []
        for grads in zip(*found, strict=True):
            like = next((grad for grad in grads if grad is not None), None)
            parts = [torch.zeros_like(like) if grad is None else grad for grad in grads] if like is not None else []
            together.append(torch.stack(parts) if parts else None)
        return together

    def listen(self, blocks: Sequence[Curvature]) -> bool:
        """The gradients are loss_scale * factor * R times the signals of L / R, whose square is to count factor * R."""
        event, capture = self.event, self.event.capture
        own_loss_only = self.terms.uniform and not capture.explicit and backward_id() != -1
        differentiated = capture.witness is not None and capture.witness.differentiated
        if any(self.assembler.common.get(k) for block in blocks for k in self.assembler.layers_of(block)):
            return False
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
        return OutputLoss(event.loss, event.terms, len(event.terms.f), event.f, event.f_edge, event.factor)

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

    def backward(self, calls: list[Call], signal: Tensor) -> list[Tensor | None]:
        """Gradients at the outputs of the calls; None where f does not depend on one. signal: [n, t, c], at f."""
        signal = signal if self.rows is None else self.rows.ungrouped(signal, self.event.terms.f)
        return self.source.send(calls, signal, ())[0]


def _by_sample(layer: Layer) -> bool:
    return any(site.by_sample for site in layer.sites)


class RowSource:
    """One loss of one forward pass, as the check of its rows sees it."""

    def __init__(self, context: PassContext, event: LossEvent) -> None:
        self.context, self.event = context, event
        known = [(call, event.edge_at(edge)) for call, edge in event.capture.calls]
        known += context.calls_at_parameters(event.calls)
        self.calls = [call for call, _ in known]
        self.edges = {id(call): edge for call, edge in known}
        self._arranged: dict[Any, tuple[Rows | None, StatisticsAssembler]] = {}  # with inputs they have read

    @cached_property
    def structure(self) -> Structure:
        """That of the graph below the loss's input."""
        return structure_of(self.event.f_edge, {edge.node for edge in self.edges.values()})

    def generator(self) -> torch.Generator:
        """For draws that a resumed run repeats."""
        return self.context.generator(self.event.f.device)

    def draws(self) -> tuple[Tensor, torch.Generator]:
        generator = self.generator()
        return random_signs(self.event.terms.f, generator), generator

    def path(self, blocks: Sequence[Curvature]) -> Path:
        event, structure = self.event, self.structure
        said = None if event.samples is None else tuple(event.samples.tolist())
        loss = event.loss.name, event.loss.class_dim, self._part_of_batch(), said
        calls = self.arranged(None)
        marks = {block.name: tuple(map(self.mark_of, calls.calls_of([block]))) for block in blocks}
        sites = {name: tuple(mark[:4] for mark in each) for name, each in marks.items()}
        functions = {name: (name, structure.functions, loss, of_block) for name, of_block in sites.items()}
        values = None if structure.values is None else (structure.functions, structure.values, loss, event.f.shape)
        n, shape = len(event.terms.f), event.f.shape[1:]
        of_samples = {
            name: (
                functions[name],
                shape,
                len(event.f.shape),
                *((mark.shape[1:], mark.batch / n) for mark in marks[name]),
            )
            for name in marks
        }
        return Path(functions, values, structure.chosen, marks, n, of_samples, not on_cpu(event.f))

    def labels(self) -> tuple[Tensor | None, int, Tensor | None]:
        event = self.event
        n, m, said = len(event.terms.f), event.loss.rows(event.f), event.samples
        runs = None if self._part_of_batch() else torch.arange(m) // (m // n)
        return runs, m, None if said is None else said.cpu()

    def _part_of_batch(self) -> bool:
        """Whether the output is one of some of the samples; which they are is then to be found."""
        f, capture = self.event.f, self.event.capture
        return f.numel() < capture.shape.numel() and f.shape[:1].numel() < capture.n

    def depending(self, calls: Sequence[Call]) -> Tensor | None:
        """By derivatives along the outputs of a call: those, with respect to u, of the gradient that u sends there."""
        event, f_edge = self.event, self.event.f_edge
        plain = [call for call in calls if call.batch_first is None and self.edges[id(call)][:2] != f_edge[:2]]
        if not plain or min(call.batch for call in calls) < min(call.batch for call in plain):
            return None
        call = min(plain, key=lambda call: call.batch)
        try:
            with torch.enable_grad():
                u = event.f.new_zeros(f_edge.shape).requires_grad_()
                at_call = torch.autograd.grad([f_edge.public], [self.edges[id(call)].public], [u], create_graph=True)[0]
        except RuntimeError:  # of functions that cannot be differentiated twice
            return None
        along = random_signs(at_call, self.generator()).reshape(call.batch, -1)

        def carry(factors: Tensor) -> Tensor | None:
            v = (along * factors.to(along).unsqueeze(1)).reshape(at_call.shape)
            try:
                change = torch.autograd.grad(at_call, u, v, retain_graph=True, allow_unused=True)[0]
            except RuntimeError:
                return None
            return None if change is None else change.reshape(event.loss.rows(event.f), -1)

        return depending(carry, call.batch)

    def mark_of(self, call: Call) -> Mark:
        edge = self.edges[id(call)]
        place = self.structure.places.get(edge.node, -1)
        site = self.context.layers[call.layer].sites.index(call.site)
        return Mark(call.layer, site, place, edge.number, tuple(call.shape), call.batch)

    def arranged(self, rows: Rows | None, common: Mapping[int, bool] | None = None) -> StatisticsAssembler:
        context, event, common = self.context, self.event, common or {}
        key = id(rows), tuple(sorted(common.items()))
        if key not in self._arranged:
            terms, tables = event.terms, dict[int, Tensor]()
            if rows is not None:
                marks = {id(call): self.mark_of(call) for call in self.calls}
                tables = {key: rows.calls[mark].to(event.f.device) for key, mark in marks.items() if mark in rows.calls}
                terms = rows.grouped(terms)
            made = StatisticsAssembler(context.layers, context.members, terms, self.calls, tables, common)
            self._arranged = {key: (rows, made)}
        return self._arranged[key][1]

    def send(
        self, calls: Sequence[Call], signal: Tensor, params: Sequence[Tensor]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        event, f_edge = self.event, self.event.f_edge
        layout = event.loss.layout(event.f, len(event.terms.f))[1]
        # contiguous: the backward of an affine batch norm in torch misreads a strided gradient of one image
        at_f = layout(signal).to(event.f.dtype).reshape(f_edge.shape).contiguous()
        wanted: list[Any] = [self.edges[id(call)].public for call in calls]
        wanted += [get_gradient_edge(p) for p in params]
        inner = [edge for edge in wanted if edge[:2] != f_edge[:2]]
        found = iter(_gradients(f_edge, inner, at_f) if inner else ())
        got = [at_f if edge[:2] == f_edge[:2] else next(found) for edge in wanted]
        return got[: len(calls)], got[len(calls) :]


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
