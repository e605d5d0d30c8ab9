"""Pass: from one loss of one forward pass to what the blocks measure.

Two ways bring the signals, into the same receiver: `torch.autograd.grad` of our own from the output to the edges of
the layers, or, for the empirical Fisher, pre-hooks on the layers' nodes during the user's backward, whose gradient is
the signal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torchcurv.curv.approx import Kronecker
from torchcurv.curv.capture import Call, Capture, Edge
from torchcurv.curv.curvature import Curvature
from torchcurv.curv.inputs import Inputs
from torchcurv.curv.kinds import INPUT, SECOND, signals
from torchcurv.curv.layers import Layer
from torchcurv.curv.losses import Loss, Terms, at_least_float32
from torchcurv.curv.propagate import propagate
from torchcurv.curv.second import LossHessian
from torchcurv.curv.sides import to_blocks
from torchcurv.curv.stats import Stats, Use

if TYPE_CHECKING:
    from torchcurv.curv.record import Record

SIGNAL_ELEMENTS = 1 << 25  # elements of layer outputs held at once when many signals are sent


class Receiver:
    """Where the signals of one pass arrive, with the layers' inputs, which all blocks and signals share.

    It refers to no node of the graph, so that the layers' nodes may refer to it.
    """

    def __init__(self, record: Record, terms: Terms, calls: list[Call]) -> None:
        self.record, self.terms, self.n = record, terms, terms.f.shape[0]
        self.calls: dict[int, list[Call]] = {}
        for call in calls:
            if not call.superseded:
                self.calls.setdefault(call.layer, []).append(call)
        self._inputs: dict[tuple[Any, ...], Inputs] = {}

    def members(self, blocks: list[Curvature]) -> list[Call]:
        return [call for block in blocks for k in self.record.members[block.name] for call in self.calls.get(k, [])]

    def inputs(self, used: list[Call], every: int = 1) -> Inputs:
        """A layer's inputs over the calls of one site, or sites alike, that this loss reaches, of each so many-th
        sample."""
        key = every, *(id(call) for call in used)
        if every > 1 and used[0].site.view.whole:
            return self.inputs(used).of(slice(None, None, every))
        if key not in self._inputs:
            for call in used:
                self.check(call)
            layer, weights = self.record.layers[used[0].layer], self.terms.position_weights
            weights = weights if weights is None else weights[::every]
            calls = [(call.site.module, tuple(self._some(x, call, every) for x in call.x)) for call in used]
            self._inputs[key] = Inputs(layer, used[0].site, calls, self.kept(every), weights)
        return self._inputs[key]

    def kept(self, every: int) -> int:
        """How many samples every so many-th is."""
        return len(range(0, self.n, every))

    def _some(self, x: Any, call: Call, every: int) -> Any:
        """An argument of a call, for every so many-th sample of those that have a part in it."""
        if every == 1 or not isinstance(x, Tensor) or not x.dim() or len(x) != call.batch:
            return x
        return x[::every] if call.batch == self.n else x.unflatten(0, (self.n, -1))[::every].flatten(0, 1)

    def _every(self, block: Curvature, reached: Callable[[Call], bool]) -> int:
        """Each how many-th sample makes the statistics of a block, given which calls the loss reaches."""
        limit, options = block.options.max_positions, block.options
        if limit is None or not isinstance(block.approx, Kronecker) or options.curv_type in (INPUT, SECOND):
            return 1
        calls = (call for k in self.record.members[block.name] for call in self.calls.get(k, []))
        positions = sum(self.record.positions(call) for call in calls if reached(call))
        return max(1, min(self.n, -(-positions // limit)))

    def check(self, call: Call) -> None:
        name, n = self.record.layers[call.layer].name, self.n
        if call.batch % n:
            raise ValueError(
                f"layer {name!r} was called with a tensor of shape {tuple(call.x[0].shape)}, whose dimension 0 is no "
                f"multiple of the batch size {n} (dimension 0 of the model's output): put the batch first, call "
                "optimizer.observe(output, target) with an output whose dimension 0 is the batch, or give this "
                "layer's parameters a group with approx=None"
            )
        if call.edited:
            raise RuntimeError(
                f"the input of layer {name!r} was edited in place after the layer had read it: apply that operation "
                "out of place, or give this layer's parameters a group with approx=None"
            )

    def signal(self, used: list[Call], grads: list[Tensor]) -> Tensor:
        """s [n, r, g, o] from the gradients at the outputs of the calls."""
        parts = []
        for call, grad in zip(used, grads, strict=True):
            s = at_least_float32(call.signal(grad))
            parts.append(s.reshape(self.n, -1, *s.shape[-2:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _alike(self, layer: int, reached: Callable[[Call], bool]) -> Iterable[list[Call]]:
        """The calls of a layer that the loss reaches, those together that see its weight alike."""
        alike: dict[tuple[Any, ...], list[Call]] = {}
        for call in self.calls.get(layer, []):
            if reached(call):
                alike.setdefault(call.site.reading, []).append(call)
        return alike.values()

    def uses(self, layer: int, got: Callable[[Call], list[Tensor | None]], every: int = 1) -> list[Use]:
        """The pairs (a, s) of a layer: one for the calls that see its weight alike.

        got: the gradients at the output of a call, one per signal; None where there is none.
        every: of each so many-th sample.
        """
        uses = []
        for used in self._alike(layer, lambda call: got(call)[0] is not None):
            inputs = self.inputs(used, every)
            if not inputs.weight_covered and not inputs.bias_covered:
                continue
            rows = zip(*(got(call) for call in used), strict=True)
            each = [self.signal(used, list(grads))[::every] for grads in rows]
            uses.append(Use(inputs, each[0].unsqueeze(0) if len(each) == 1 else torch.stack(each)))
        return uses

    def deliver(
        self,
        blocks: list[Curvature],
        calls: list[Call],
        chunk: list[list[Tensor | None]],
        scale: Tensor | float,
        share: float,
    ) -> None:
        """chunk: per signal, the gradients at the calls."""
        arrived = {id(call): [grads[k] for grads in chunk] for k, call in enumerate(calls)}

        def got(call: Call) -> list[Tensor | None]:
            return arrived.get(id(call), [None])

        for block in blocks:
            every = self._every(block, lambda call: got(call)[0] is not None)
            uses = [self.uses(k, got, every) for k in self.record.members[block.name]]
            if any(uses):
                own_scale = scale if every == 1 else scale * (self.n / self.kept(every))
                block.measure(Stats(uses, own_scale, share, block.layers))

    def deliver_inputs(self, block: Curvature, reached: set[int]) -> None:
        """What came into the calls whose ids are `reached`: pairs (a, s) of no signals."""
        (k,) = self.record.members[block.name]
        layer, uses = self.record.layers[k], []
        for used in self._alike(k, lambda call: id(call) in reached):
            inputs = self.inputs(used)
            g, o, _ = layer.site_shape(used[0].site)
            positions = sum(self.record.positions(call) for call in used) // self.n
            uses.append(Use(inputs, layer.params[0].new_empty(0, self.n, positions, g, o)))
        if uses:
            block.measure(Stats([uses], 1.0, 1.0, block.layers))

    def deliver_propagated(self, block: Curvature, at_calls: dict[int, Tensor]) -> None:
        """at_calls: by call, the diagonal of the Hessian at its output, or the mean of its matrices over samples."""
        (k,) = self.record.members[block.name]
        reached = [call for call in self.calls.get(k, []) if id(call) in at_calls]
        if not reached:
            return
        self._check_propagated(reached, block.options.approx)
        if block.options.approx == "diag":
            uses = self.uses(k, lambda call: [at_calls.get(id(call))])
            for use in uses:
                block.add({"diag": use.weighted_squares()})
            return
        (left, right), approx = block.sides, block.approx
        assert isinstance(approx, Kronecker)
        A, count = self.inputs(reached).cov(approx.sharing, right)
        B = torch.stack([_output_side(call, at_calls[id(call)], approx.sharing) for call in reached]).sum(0)
        block.add({"A": A, "count": count, "B": to_blocks(B * self.n, left)})

    def _check_propagated(self, calls: list[Call], approx: str | None) -> None:
        name = self.record.layers[calls[0].layer].name
        if any(call.batch_first is not None or call.batch != self.n for call in calls):
            raise NotImplementedError(
                f"the Hessian of layer {name!r} cannot be propagated: it is used inside a module, or with more rows "
                'than there are samples. Give its parameters curv_type="ggn", or approx=None'
            )
        if approx == "kfac" and any(call.site.transposed or call.site.view.tokens for call in calls):
            raise NotImplementedError(
                f'approx="kfac" of the Hessian is not known for layer {name!r}, an embedding: choose "diag"'
            )


def _output_side(call: Call, matrix: Tensor, sharing: str) -> Tensor:
    """[g, o, o]: the blocks of equal positions of a matrix over the elements of a sample, added up; "reduce": all."""
    index = torch.arange(len(matrix), device=matrix.device).reshape(1, *call.shape[1:])
    index = call.site.view.signal(call.site.module, index)[0]  # r g o
    if sharing == "reduce":
        rows = index.permute(1, 0, 2)
        return torch.stack([matrix[at[:, None, :, None], at[None, :, None, :]].sum((0, 1)) for at in rows])
    return matrix[index.unsqueeze(-1), index.unsqueeze(-2)].sum(0)


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
        record, terms, task = self.record, self.terms, torch._C._current_graph_task_id()
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
        below = _below(self.f_edge)
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
        draw = self.loss.row.draw(self.terms.f, self.record.generator(self.f.device))
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


def _below(start: Edge) -> set[tuple[Any, int]]:
    """The edges (node, number) of the graph that a gradient at `start` reaches, with its own."""
    seen: set[tuple[Any, int]] = {start[:2]}
    todo = [start.node]
    while todo:
        for edge in todo.pop().next_functions:
            if edge[0] is not None and edge not in seen:
                seen.add(edge)
                todo.append(edge[0])
    return seen


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
