"""Pass: from one loss of one forward pass to what the blocks measure.

Two ways bring the signals, into the same receiver: `torch.autograd.grad` of our own from the output to the edges of
the layers, or, for the empirical Fisher, pre-hooks on the layers' nodes during the user's backward, whose gradient is
the signal.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.capture.assemble import Receiver
from torchcurv.curv.capture.calls import Call, Capture
from torchcurv.curv.capture.listen import BackwardListener
from torchcurv.curv.graph import Edge, backward_id, edges_below, will_run
from torchcurv.curv.hessian.products import LossHessian
from torchcurv.curv.hessian.propagate import propagate
from torchcurv.curv.kinds.base import INPUT, SECOND, signals
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.losses.loss import Loss
from torchcurv.curv.losses.terms import Terms
from torchcurv.curv.numerics import at_least_float32, full_precision
from torchcurv.curv.statistics.layer import Use

if TYPE_CHECKING:
    from torchcurv.curv.capture.recorder import Record

SIGNAL_ELEMENTS = 1 << 25  # elements of layer outputs held at once when many signals are sent


class Pass:
    """One curvature pass: the two ways to get signals.

    blocks: what is fed.
    f, f_edge: the tensor the loss is applied to and where its gradient arrives; output_edge: that of the capture.
    loss_scale: what a GradScaler multiplied the loss with.
    arriving: the gradient at f, where the node of f is running and no loss but this one sends it.
    """

    def __init__(
        self,
        record: Record,
        capture: Capture,
        blocks: list[Curvature],
        loss: Loss,
        terms: Terms,
        f_edge: Edge,
        f: Tensor,
        output_edge: Edge,
        loss_scale: Any = 1.0,
        arriving: Tensor | None = None,
    ) -> None:
        self.record, self.capture, self.loss, self.terms = record, capture, loss, terms
        self.blocks, self.f, self.f_edge, self.output_edge = blocks, f, f_edge, output_edge
        self.loss_scale, self.arriving = loss_scale, arriving
        self.edges = {id(call): output_edge if edge is None else edge for call, edge in capture.calls}
        self.receiver = Receiver(record, terms, [call for call, _ in capture.calls])

    @torch.no_grad()
    def run(self, factor: Tensor | float) -> None:
        """Feed the blocks.

        factor: what multiplies this loss in the function whose gradient is in .grad.
        """
        record, terms, task = self.record, self.terms, backward_id()
        if terms.empty:
            return
        for block in self.blocks:
            block.begin(task)
        record.count(self.loss, terms, self.blocks, task)
        own_loss_only = terms.uniform and not self.capture.explicit and task != -1
        own_loss_only &= not self.capture.mixed and all(call.losses <= 1 for call, _ in self.capture.calls)
        record.forward.inside = True
        try:
            with full_precision(self.f.device.type):
                first_order = [block for block in self.blocks if block.kind != SECOND]
                sender, share = self.of_part()
                sender.verify([block for block in first_order if record.doubtful(block, sender.receiver.n)])
                kinds: dict[tuple[str, int | None], list[Curvature]] = {}
                for block in self.blocks:
                    if block.name in record.due:
                        kind = INPUT if block.inputs_alone else block.kind
                        kinds.setdefault((kind, block.options.samples), []).append(block)
                for (kind, samples), blocks in kinds.items():
                    if kind == SECOND:
                        self.differentiate([b for b in blocks if b.options.method != "propagate"], factor)
                        self.propagate([b for b in blocks if b.options.method == "propagate"], factor)
                    elif kind == INPUT:
                        self.read_inputs(blocks)
                    elif kind == "empirical_fisher" and own_loss_only:
                        self.listen(blocks, factor)
                    else:
                        sender.send(blocks, kind, samples, factor / share)
        finally:
            record.forward.inside = False
        record.passes += 1

    # ------------------------------------------------------------------------ a pass of our own

    def of_part(self) -> tuple[Pass, float]:
        """The pass that sends our own signals, and what share of the samples it is of."""
        if self.record.part is None or self.f_edge[:2] != self.output_edge[:2]:
            return self, 1.0
        output, samples = self.record.part
        found = self.record.find(output)
        assert found is not None
        capture, edge = found
        f = output.detach().reshape(-1, *self.f.shape[1:])  # the loss may have been given the output flattened to rows
        terms = self.terms.of(samples)
        part = Pass(self.record, capture, self.blocks, self.loss, terms, edge, f, edge)
        return part, capture.n / self.receiver.n

    def send(self, blocks: list[Curvature], kind: str, samples: int | None, factor: Tensor | float) -> None:
        """Send the kind's signals from f to the layers of these blocks."""
        calls = self.receiver.members(blocks)
        scale = factor * self.terms.reduction
        generator = self.record.generator(self.f.device)
        count, generated = signals(kind, self.terms, samples, generator)
        size = max(1, SIGNAL_ELEMENTS // sum(call.shape.numel() for call in calls))
        chunk: list[list[Tensor | None]] = []
        for done, signal in enumerate(generated, 1):
            chunk.append(self._backward(calls, signal))
            if len(chunk) == size or done == count:
                self.receiver.deliver(blocks, calls, chunk, scale, len(chunk) / count)
                chunk = []

    def _backward(self, calls: list[Call], signal: Tensor, params: Iterable[Tensor] = ()) -> list[Tensor | None]:
        """Gradients at the outputs of the calls, then at params; None where f does not depend on one."""
        restored = self.loss.layout(self.f, self.receiver.n)[1](signal).to(self.f.dtype).reshape(self.f_edge.shape)
        wanted = [self.edges[id(call)].public for call in calls] + [get_gradient_edge(p) for p in params]
        at_f = [edge[:2] == self.f_edge[:2] for edge in wanted]
        inner = [edge for edge, own in zip(wanted, at_f, strict=True) if not own]
        got: Iterable[Tensor | None] = ()
        if inner:
            try:
                got = torch.autograd.grad([self.f_edge.public], inner, [restored], retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                if "Checkpointing is not compatible" not in str(error):
                    raise
                raise RuntimeError(
                    "torch.utils.checkpoint with use_reentrant=True hides the layers inside it from a curvature pass: "
                    "pass use_reentrant=False"
                ) from error
        rest = iter(got)
        return [restored if own else next(rest) for own in at_f]

    # ------------------------------------------------------------------------ no signal

    def read_inputs(self, blocks: list[Curvature]) -> None:
        """Feed blocks that ask for what came into their layers alone, by the calls that f depends on."""
        below = edges_below(self.f_edge)
        reached = {id(call) for call in self.receiver.members(blocks) if self.edges[id(call)][:2] in below}
        for block in blocks:
            self.receiver.deliver_inputs(block, reached)

    # ------------------------------------------------------------------------ second derivatives

    def differentiate(self, blocks: list[Curvature], factor: Tensor | float) -> None:
        """The Hessian of these blocks, by products with unit vectors or with random signs."""
        self.record.forward.constant_statistics = False
        try:
            for block in blocks:
                loss = LossHessian(self.loss, self.terms, self.receiver.n, self.f, self.f_edge, factor)
                block.differentiate(loss.products(block.params), self.record.generator(self.f.device))
        finally:
            self.record.forward.constant_statistics = True

    def propagate(self, blocks: list[Curvature], factor: Tensor | float) -> None:
        """The Hessian carried back from f to the layers of these blocks: diagonals, or one matrix for all samples."""
        alike: dict[tuple[str, str, int], list[Curvature]] = {}
        for block in blocks:
            form = "diag" if block.options.approx == "diag" else "matrix"
            alike.setdefault((form, block.options.residual, block.options.max_hessian_dim), []).append(block)
        for (form, residual, max_dim), own in alike.items():
            calls = self.receiver.members(own)
            loss = LossHessian(self.loss, self.terms, self.receiver.n, self.f, self.f_edge, factor)
            seed = loss.diagonal() if form == "diag" else loss.mean_matrix(max_dim)
            targets = {self.edges[id(call)][:2] for call in calls}
            tape = self.record.tape_of(self.capture)
            gradient_at = partial(self._gradients, loss)
            found = propagate(tape, self.f_edge, seed, gradient_at, form, residual, max_dim, targets)
            edges = {id(call): self.edges[id(call)][:2] for call in calls}
            at_calls = {key: found[edge] for key, edge in edges.items() if edge in found}
            for block in own:
                self.receiver.deliver_propagated(block, at_calls)

    def _gradients(self, loss: LossHessian, edges: list[Edge]) -> list[Tensor]:
        """dL/d(tensor) at each of the edges."""
        at_f = loss.gradient()
        inner = [edge for edge in edges if edge[:2] != self.f_edge[:2]]
        wanted = [edge.public for edge in inner]
        got = iter(torch.autograd.grad([self.f_edge.public], wanted, [at_f], retain_graph=True) if wanted else ())
        return [at_f if edge[:2] == self.f_edge[:2] else next(got) for edge in edges]

    # ------------------------------------------------------------------------ the first pass of a block

    def verify(self, blocks: list[Curvature]) -> None:
        """Raise unless the gradient of every parameter is sum_r s a^T over the recorded calls, for one signal of half
        of the samples, and nothing arrives at the other half.

        Finds weights that are used outside their layers, layers that do more than their type, batches that are not
        dimension 0, and samples that meet; on first use only.
        """
        calls = self.receiver.members(blocks)
        # a hook on a parameter may change its gradient, and must not run more often than the user's backward
        params = [p for block in blocks for p in block.params if p.requires_grad and not p._backward_hooks]
        if not params:
            return
        draw = self.terms.draw(self.record.generator(self.f.device))
        silent = slice(self.receiver.n // 2)
        draw[silent] = 0  # samples that send nothing: nothing may arrive at them
        got = self._backward(calls, draw, params)
        at_call = {id(call): grad for call, grad in zip(calls, got, strict=False)}
        gradients = dict(zip(params, got[len(calls) :], strict=True))
        for block in blocks:
            wrong: list[tuple[Tensor, str]] = []
            mixed: list[Tensor] = []
            finite: list[Tensor] = []
            for k in self.record.members[block.name]:
                uses = self.receiver.uses(k, lambda call: [at_call.get(id(call))])
                grads = [at_call.get(id(call)) for call in self.receiver.calls.get(k, [])]
                eps = max((torch.finfo(grad.dtype).eps for grad in grads if grad is not None), default=0.0)
                wrong += self._unexplained(self.record.layers[k], uses, gradients, eps)
                mixed += [use.s[:, silent].nan_to_num(0, 0, 0).any() for use in uses]  # 0 times inf is no signal
                finite += [torch.isfinite(use.s.sum()) for use in uses]
            if wrong and bool(torch.stack([flag for flag, _ in wrong]).any()):
                self.record.refuse(block, self.record.unexplained(block, [name for flag, name in wrong if flag]))
            elif mixed and bool(torch.stack(mixed).any()):
                self.record.refuse(block, self.record.meeting(block))
            if all(bool(flag) for flag in finite):  # else the next pass has to show it
                self.record.verified[block.name] = self.receiver.n > 1

    def _unexplained(
        self, layer: Layer, uses: list[Use], gradients: dict[Tensor, Tensor | None], eps: float
    ) -> list[tuple[Tensor, str]]:
        """(whether its gradient is not that of these uses, its name) for each parameter of the layer."""
        dtype = layer.params[0].dtype
        eps = max(eps, torch.finfo(dtype).eps)
        expected = layer.params[0].new_zeros(layer.shape, dtype=torch.promote_types(dtype, torch.float32))
        size = expected.new_zeros(())
        for use in uses:
            gradient, magnitude = use.gradient()
            expected, size = expected + gradient, size + magnitude
        flags = []
        for piece, part in zip(layer.pieces, layer.split(expected), strict=True):
            if piece.param in gradients:
                found = gradients[piece.param]
                gap = part if found is None else at_least_float32(piece.of(found)) - part
                bound = max(8 * eps, 1e-2) * expected.norm() + 4 * eps * size
                flags.append((gap.norm() > bound, self.record.names.get(piece.param, layer.name)))
        return flags

    # -------------------------------------------------------------------- the user's own backward

    def listen(self, blocks: list[Curvature], factor: Tensor | float) -> None:
        """Take the gradients that the running backward brings to the layers of these blocks.

        They are loss_scale * factor * R times the residual signal of L / R, whose square is to count factor * R.
        """
        scale = torch.as_tensor(factor * self.terms.reduction * self.loss_scale**2, device=self.f.device)
        scale = torch.where(scale == 0, 0, 1 / scale)
        for block in blocks:
            waiting = BackwardListener(self.receiver, block, scale)
            for call in self.receiver.members([block]):
                edge = self.edges[id(call)]
                if self.arriving is not None and edge[:2] == self.f_edge[:2]:
                    waiting.received.append((call, self.arriving))
                elif will_run(edge.node):
                    waiting.expect(call, edge)
            waiting.deliver_if_complete()
