"""Pass: from one loss of one forward pass to what the blocks measure.

Two ways bring the signals, into the same receiver: `torch.autograd.grad` of our own from the output to the edges of
the layers, or, for the empirical Fisher, pre-hooks on the layers' nodes during the user's backward, whose gradient is
the signal.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torchcurv.curv.capture import Call, Capture, Edge
from torchcurv.curv.curvature import Curvature
from torchcurv.curv.kinds import signals
from torchcurv.curv.layers import Layer
from torchcurv.curv.losses import Loss, Terms, at_least_float32
from torchcurv.curv.stats import Inputs, Stats

if TYPE_CHECKING:
    from torchcurv.curv.record import Record

SIGNAL_ELEMENTS = 1 << 25  # elements of layer outputs held at once when many signals are sent
PATCH_ELEMENTS = 1 << 22  # elements of layer inputs read at once when the gradient is checked


class Receiver:
    """Where the signals of one pass arrive, with the layers' inputs, which all blocks and signals share.

    It refers to no node of the graph, so that the layers' nodes may refer to it.
    """

    def __init__(self, record: Record, terms: Terms, calls: list[Call]) -> None:
        self.record, self.terms, self.n = record, terms, terms.f.shape[0]
        self.calls: dict[int, list[Call]] = {}
        for call in calls:
            self.calls.setdefault(call.layer, []).append(call)
        self._inputs: dict[tuple[int, ...], Inputs] = {}

    def members(self, blocks: list[Curvature]) -> list[Call]:
        return [call for block in blocks for k in self.record.members[block.name] for call in self.calls.get(k, [])]

    def inputs(self, layer: int, used: list[Call]) -> Inputs:
        """The layer's inputs over the calls that this loss reaches."""
        key = (layer, *(id(call) for call in used))
        if key not in self._inputs:
            for call in used:
                self.check(call)
            calls = [call.x for call in used]
            self._inputs[key] = Inputs(self.record.layers[layer], calls, self.n, self.terms.position_weights)
        return self._inputs[key]

    def check(self, call: Call) -> None:
        name, n = self.record.layers[call.layer].name, self.n
        if call.x.shape[0] % n or call.shape[0] % n:
            raise ValueError(
                f"layer {name!r} was called with a tensor of shape {tuple(call.x.shape)}, whose dimension 0 is no "
                f"multiple of the batch size {n} (dimension 0 of the model's output): put the batch first, call "
                "optimizer.observe(output, target) with an output whose dimension 0 is the batch, or give this "
                "layer's parameters a group with approx=None"
            )
        if not call.x.is_inference() and call.x._version != call.version:
            raise RuntimeError(
                f"the input of layer {name!r} was edited in place after the layer had read it: apply that operation "
                "out of place, or give this layer's parameters a group with approx=None"
            )

    def signal(self, layer: int, used: list[Call], grads: list[Tensor]) -> Tensor:
        """s [n, r, g, o] from the gradients at the outputs of the calls."""
        view, parts = self.record.layers[layer].view, []
        for call, grad in zip(used, grads, strict=True):
            s = at_least_float32(view.signal(call.module, grad.reshape(call.shape)))
            parts.append(s.reshape(self.n, -1, *s.shape[-2:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def deliver(
        self,
        blocks: list[Curvature],
        calls: list[Call],
        chunk: list[list[Tensor | None]],
        scale: Tensor | float,
        share: float,
    ) -> None:
        """chunk: per signal, the gradients at the calls."""
        got = {id(call): [grads[k] for grads in chunk] for k, call in enumerate(calls)}
        for block in blocks:
            members = self.record.members[block.name]
            inputs: list[Inputs | None] = []
            stacked: list[Tensor | None] = []
            for k in members:
                used = [call for call in self.calls.get(k, []) if got.get(id(call), [None])[0] is not None]
                if not used:
                    inputs.append(None)
                    stacked.append(None)
                    continue
                inputs.append(self.inputs(k, used))
                each = [self.signal(k, used, [got[id(call)][v] for call in used]) for v in range(len(chunk))]  # type: ignore[misc]
                stacked.append(each[0].unsqueeze(0) if len(each) == 1 else torch.stack(each))
            if any(s is not None for s in stacked):
                block.measure(Stats(inputs, stacked, scale, share, block.layers))


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
        self.blocks, self.f, self.f_edge = blocks, f, f_edge
        self.loss_scale, self.arriving = loss_scale, arriving
        self.edges = {id(call): output_edge if edge is None else edge for call, edge in capture.calls}
        self.receiver = Receiver(record, terms, [call for call, _ in capture.calls])

    @torch.no_grad()
    def run(self, factor: Tensor | float) -> None:
        """Feed the blocks.

        factor: what multiplies this loss in the function whose gradient is in .grad.
        """
        record, terms, task = self.record, self.terms, torch._C._current_graph_task_id()
        if terms.empty:
            return
        for block in self.blocks:
            block.begin(task)
        own_loss_only = terms.uniform and not self.capture.explicit and task != -1
        own_loss_only &= all(call.losses <= 1 for call, _ in self.capture.calls)
        record._inside = True
        try:
            with full_precision(self.f.device.type):
                self.verify([block for block in self.blocks if block.name not in record.verified])
                kinds: dict[tuple[str, int | None], list[Curvature]] = {}
                for block in self.blocks:
                    if block.name in record.due:
                        kinds.setdefault((block.options.curv_type, block.options.samples), []).append(block)
                for (kind, samples), blocks in kinds.items():
                    if kind == "empirical_fisher" and own_loss_only:
                        self.listen(blocks, factor)
                    else:
                        self.send(blocks, kind, samples, factor)
        finally:
            record._inside = False
        record.passes += 1

    # ------------------------------------------------------------------------ a pass of our own

    def send(self, blocks: list[Curvature], kind: str, samples: int | None, factor: Tensor | float) -> None:
        """Send the kind's signals from f to the layers of these blocks."""
        calls = self.receiver.members(blocks)
        scale = factor * self.terms.reduction
        generator = self.record.generator(self.f.device)
        count, generated = signals(kind, self.loss.row, self.terms, samples, generator)
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
            got = torch.autograd.grad([self.f_edge.public], inner, [restored], retain_graph=True, allow_unused=True)
        rest = iter(got)
        return [restored if own else next(rest) for own in at_f]

    # ------------------------------------------------------------------------ the first pass of a block

    def verify(self, blocks: list[Curvature]) -> None:
        """Raise unless the gradient of every parameter is sum_r s a^T over the recorded calls, for one signal.

        Finds weights that are used outside their layers and layers that do more than their type, on first use only.
        """
        calls = self.receiver.members(blocks)
        # a hook on a parameter may change its gradient, and must not run more often than the user's backward
        params = [p for block in blocks for p in block.params if p.requires_grad and not p._backward_hooks]
        if not params:
            return
        draw = self.loss.row.draw(self.terms.f, self.record.generator(self.f.device))
        got = self._backward(calls, draw, params)
        at_call = {id(call): grad for call, grad in zip(calls, got, strict=False)}
        gradients = dict(zip(params, got[len(calls) :], strict=True))
        for block in blocks:
            wrong: list[tuple[Tensor, str]] = []
            for k in self.record.members[block.name]:
                used = [(call, at_call[id(call)]) for call in self.receiver.calls.get(k, [])]
                wrong += self._unexplained(self.record.layers[k], used, gradients)
            if wrong and bool(torch.stack([flag for flag, _ in wrong]).any()):
                self.record.refuse(block, [name for flag, name in wrong if flag])
            self.record.verified.add(block.name)

    def _unexplained(
        self, layer: Layer, used: list[tuple[Call, Tensor | None]], gradients: dict[Tensor, Tensor | None]
    ) -> list[tuple[Tensor, str]]:
        """(whether its gradient is not that of these calls, its name) for each parameter of the layer."""
        dtype = torch.promote_types(layer.params[0].dtype, torch.float32)
        expected = layer.params[0].new_zeros(layer.shape, dtype=dtype)
        size, eps = expected.new_zeros(()), torch.finfo(layer.params[0].dtype).eps
        for call, grad in used:
            if grad is not None:
                self.receiver.check(call)
                eps = max(eps, torch.finfo(grad.dtype).eps)
                size += _add_gradient_(expected, layer, call, grad)
        found = [
            expected if p not in gradients else torch.zeros_like(part) if gradients[p] is None else gradients[p]
            for p, part in zip(layer.params, layer.split(expected), strict=True)
        ]
        parts = [
            (p, at_least_float32(g).reshape(part.shape) - part)  # type: ignore[arg-type]
            for p, g, part in zip(layer.params, found, layer.split(expected), strict=True)
            if p in gradients
        ]
        bound = max(8 * eps, 1e-2) * expected.norm() + 4 * eps * size
        return [(gap.norm() > bound, self.record.names.get(p, layer.name)) for p, gap in parts]

    # -------------------------------------------------------------------- the user's own backward

    def listen(self, blocks: list[Curvature], factor: Tensor | float) -> None:
        """Take the gradients that the running backward brings to the layers of these blocks.

        They are loss_scale * factor * R times the residual signal of L / R, whose square is to count factor * R.
        """
        scale = torch.as_tensor(factor * self.terms.reduction * self.loss_scale**2, device=self.f.device)
        scale = torch.where(scale == 0, 0, 1 / scale)
        for block in blocks:
            waiting = _Waiting(self.receiver, block, scale)
            for call in self.receiver.members([block]):
                edge = self.edges[id(call)]
                if self.arriving is not None and edge[:2] == self.f_edge[:2]:
                    waiting.received.append((call, self.arriving))
                elif torch._C._will_engine_execute_node(edge.node):
                    waiting.expect(call, edge)
            waiting.deliver_if_complete()


def full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Autocast switched off, where it is on."""
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


def _add_gradient_(total: Tensor, layer: Layer, call: Call, grad: Tensor) -> Tensor:
    """Add sum_{n,r} s a^T of one call to total [g, o, i], some rows at a time; norm(s) norm(a)."""
    s, squares = at_least_float32(layer.view.signal(call.module, grad.reshape(call.shape))), total.new_zeros(2)
    rows = call.x.shape[0]
    per_row = layer.view.inputs(call.module, call.x[:1]).numel()
    size = max(1, PATCH_ELEMENTS // max(1, per_row))
    for start in range(0, rows, size):
        part = s[start : start + size]
        a = at_least_float32(layer.view.inputs(call.module, call.x[start : start + size]))
        if layer.weight is not None:
            total[..., : layer.features] += torch.einsum("nrgo,nrgi->goi", part, a)
        if layer.bias is not None:
            total[..., -1] += part.sum((0, 1))
        squares += torch.stack([part.square().sum(), a.square().sum() + a.shape[:-1].numel()])
    return squares.prod().sqrt()


class _Waiting:
    """The calls of one block whose gradients the running backward is still to bring."""

    def __init__(self, receiver: Receiver, block: Curvature, scale: Tensor) -> None:
        self.receiver, self.block, self.scale = receiver, block, scale
        self.task = torch._C._current_graph_task_id()
        self.missing = 0
        self.received: list[tuple[Call, Tensor]] = []

    def expect(self, call: Call, edge: Edge) -> None:
        self.missing += 1
        handle: list[Any] = []
        handle.append(edge.node.register_prehook(partial(self._take, call, edge.number, handle)))

    def _take(self, call: Call, number: int, handle: list[Any], grads: tuple[Tensor | None, ...]) -> None:
        if torch._C._current_graph_task_id() != self.task:
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
            self.receiver.deliver([self.block], calls, [list(grads)], self.scale, 1.0)
        self.received = []
