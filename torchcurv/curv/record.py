"""Record: how (a, s) get out of the user's own forward and backward. The only file that touches hooks.

Forward: a hook on each layer that is due keeps a `Call` (the input and the gradient edge of the output); a hook
on the model gathers the calls of one forward pass into a `Capture`, which lives in the metadata of the output's
graph node, and so exactly as long as the graph. Backward: a pre-hook on the node of the loss (or of the output,
for a loss known by name) starts the curvature pass from inside the user's backward call.

Two ways bring the signals, into the same receiver: `torch.autograd.grad` of our own from the output to the edges,
or, for the empirical Fisher, pre-hooks on the layers' nodes during the user's backward, whose gradient is the
signal. Nothing refers from a deep node to a shallow one, so a graph that is dropped frees what was captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from torchcurv.curv.curvature import Curvature
from torchcurv.curv.kinds import signals
from torchcurv.curv.layers import Layer
from torchcurv.curv.losses import Loss, Terms, at_least_float32, loss_of
from torchcurv.curv.stats import Inputs, Stats

SIGNAL_ELEMENTS = 1 << 25  # elements of layer outputs held at once when many signals are sent


class Edge(NamedTuple):
    """Where the gradient of a tensor arrives: a node of the graph, the number of its input, and the shape there."""

    node: Node
    number: int
    shape: torch.Size

    @property
    def public(self) -> GradientEdge:
        return GradientEdge(self.node, self.number)


@dataclass
class Call:
    """One call of one layer: its detached input, the edge of its output, the output's shape.

    edge None: the layer's output is the model's own, whose node must not be referred to from below.
    """

    layer: int
    module: nn.Module
    x: Tensor
    edge: Edge | None
    shape: torch.Size


class Observed(NamedTuple):
    """What `observe` was told of an output."""

    loss: Loss
    output: Tensor
    target: Tensor
    weight: float | Tensor


@dataclass
class Capture:
    """The calls of one forward pass that ended in one output, and what is known of its losses.

    losses: how many calls of the loss module have used this output.
    observed: what `observe` was told and nothing has run yet; explicit: whether it was told anything.
    """

    calls: list[Call]
    n: int
    losses: int = 0
    observed: list[Observed] = field(default_factory=list)
    explicit: bool = False
    done: bool = False


class _Hook:
    """A bound hook that is inert after deepcopy and pickling, so that copies of the model feed nothing."""

    def __init__(self, target: Callable[..., Any] | None = None) -> None:
        self.target = target

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self.target is None else self.target(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def edge_of(tensor: Tensor) -> Edge:
    """The edge of a tensor; that of its base if it is the same memory in the same order.

    Editing a view in place rewrites the view's own node but not the base's (nn.Linear with a bias returns a view
    for inputs of three or more dimensions).
    """
    base = tensor._base
    if (
        base is not None
        and base.grad_fn is not None
        and base.numel() == tensor.numel()
        and base.is_contiguous()
        and tensor.is_contiguous()
    ):
        tensor = base
    node, number = get_gradient_edge(tensor)[:2]
    return Edge(node, number, tensor.shape)


def metadata(node: Node) -> dict[Any, Any]:
    """The dict that lives as long as the node (torch's stubs call the property a method)."""
    return node.metadata  # type: ignore[return-value]


def _accumulates(params: Iterable[Tensor]) -> bool:
    """Whether the backward call that is running adds into the `.grad` of any of these parameters."""
    for p in params:
        try:
            if torch._C._will_engine_execute_node(get_gradient_edge(p).node):
                return True
        except RuntimeError:  # torch.autograd.grad with respect to the parameter itself
            return False
    return False


def _ignored() -> bool:
    """Forward passes that are none of the user's: recomputation inside a backward, function transforms, tracing."""
    return (
        not torch.is_grad_enabled()
        or torch._C._current_graph_task_id() != -1
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
    )


class Record:
    """Hooks on a model and its loss that feed curvature blocks.

    blocks: what is fed; a block takes part in a forward pass while its name is in `due`.
    loss_fn: a loss module, the name of a loss, or None (then only `observe` starts a pass).
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Curvature],
        loss_fn: nn.Module | str | None,
        reduction: str | None = None,
        class_dim: int | None = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        grad_scaler: Any = None,
        seed: int = 0,
    ) -> None:
        self.blocks = blocks
        self.loss_fn, self.reduction, self.class_dim = loss_fn, reduction, class_dim
        self.output_fn, self.grad_scaler, self.seed = output_fn, grad_scaler, seed
        if loss_fn is not None:
            loss_of(loss_fn, reduction, class_dim)  # unknown losses raise here
        if output_fn is not None and not callable(output_fn):
            raise TypeError(f"output_fn={output_fn!r}; pass a function from the model's output to the tensor of logits")
        self.layers: list[Layer] = [layer for block in blocks for layer in block.layers]
        index = {id(layer): k for k, layer in enumerate(self.layers)}
        self.members = {block.name: [index[id(layer)] for layer in block.layers] for block in blocks}
        self.due: set[str] = {block.name for block in blocks}
        self.step, self.passes = 0, 0
        self._calls: list[Call] = []
        self._inside = False
        self._checked = False
        self._handles = [
            module.register_forward_hook(_Hook(partial(self._on_layer, k)), with_kwargs=True)
            for k, layer in enumerate(self.layers)
            for module in layer.modules
        ]
        self._handles.append(model.register_forward_pre_hook(_Hook(self._on_start)))
        self._handles.append(model.register_forward_hook(_Hook(self._on_output_known)))
        if isinstance(loss_fn, nn.Module):
            self._handles.append(loss_fn.register_forward_hook(_Hook(self._on_loss_known), with_kwargs=True))
        self._due_layers: set[int] = set()
        self.set_due(self.due)

    def set_due(self, names: Iterable[str]) -> None:
        """Which blocks the next forward passes feed."""
        self.due = set(names)
        self._due_layers = {k for name in self.due for k in self.members[name]}

    def remove(self) -> None:
        """Take every hook away."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._calls = [], []
        self.set_due(())

    # ----------------------------------------------------------------------------------- forward

    def _on_layer(self, k: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if k not in self._due_layers or _ignored() or not out.requires_grad:
            return None
        x = _argument(args, kwargs, 0, "input")
        if not isinstance(x, Tensor):
            raise ValueError(f"layer {self.layers[k].name!r} was called without a tensor as its first argument")
        edge = edge_of(out)
        self._calls.append(Call(k, module, x.detach(), edge, out.shape))
        # A view of part of another tensor: in-place edits must reach a clone, or they would rewrite our edge.
        return out.clone() if out._base is not None and edge.node is out.grad_fn else None

    def _on_start(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not _ignored():
            self._calls = []

    def _on_output_known(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._calls or _ignored():
            return
        outputs = [self.output_fn(output)] if self.output_fn is not None else list(_tensors(output))
        outputs = [out for out in outputs if out.requires_grad and out.dim()]
        if isinstance(self.loss_fn, str) and len(outputs) > 1:
            raise ValueError(
                f"the model returned {len(outputs)} tensors: pass output_fn=, a function from the model's output to "
                f"the one that loss_fn={self.loss_fn!r} is applied to, or loss_fn=None and call optimizer.observe"
            )
        if outputs:
            self._gather(outputs)

    def _gather(self, outputs: list[Tensor]) -> Capture:
        """Turn the calls seen so far into a capture that lives in the outputs' nodes."""
        capture = Capture(self._calls, outputs[0].shape[0])
        self._calls = []
        for out in outputs:
            edge = edge_of(out)
            for call in capture.calls:
                if call.edge == edge:
                    call.edge = None
            metadata(edge.node)[self._key(edge.number)] = (capture, edge.shape)
            edge.node.register_prehook(partial(self._on_output, edge.number, out.detach(), out._version))
        return capture

    def _key(self, number: int) -> tuple[str, int, int]:
        return ("torchcurv", id(self), number)

    def _on_loss_known(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any) -> None:
        if not self.due or _ignored() or not loss.requires_grad:
            return
        f, target = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "target")
        found = self.find(f)
        if found is None:
            return
        found[0].losses += 1
        edge = edge_of(loss)
        edge.node.register_prehook(partial(self._on_loss, edge.number, *found, f, target, []))

    def observe(self, output: Tensor, target: Tensor, loss_fn: nn.Module | str | None, weight: float | Tensor) -> None:
        """Note the loss of one output; its pass starts when the backward reaches that output."""
        loss_fn = self.loss_fn if loss_fn is None else loss_fn
        if loss_fn is None:
            raise ValueError("observe: no loss is known; pass loss_fn= here or to the optimizer")
        loss = loss_of(loss_fn, self.reduction if isinstance(loss_fn, str) else None, self.class_dim)
        if not self.due or _ignored() or not output.requires_grad:
            return
        found = self.find(output)
        if found is None:
            raise ValueError(
                "observe: this output does not come from a forward pass of the model that was recorded; observe "
                "the output of the model itself, before backward()"
            )
        capture, output_edge = found
        capture.explicit = True
        edge = edge_of(output)
        if edge == output_edge:  # that node runs our pre-hook already, and must not refer to itself
            capture.observed.append(Observed(loss, output.detach(), target, weight))
        else:
            noted = Observed(loss, output, target, weight)
            edge.node.register_prehook(partial(self._on_observed, capture, output_edge, noted, []))

    def find(self, f: Tensor) -> tuple[Capture, Edge] | None:
        """The capture whose output f is, or is computed from, and that output's edge."""
        if self._calls:  # layers called outside the model's own forward: f is their output
            self._gather([f])
        found: dict[int, tuple[Capture, Edge]] = {}
        start = edge_of(f)
        seen, queue = set(), [(start.node, start.number)]
        while queue:
            node, number = queue.pop()
            noted = metadata(node).get(self._key(number))
            if noted is not None:
                found[id(noted[0])] = (noted[0], Edge(node, number, noted[1]))
                continue
            for deeper, position in node.next_functions:
                if deeper is not None and (deeper, position) not in seen:
                    seen.add((deeper, position))
                    queue.append((deeper, position))
        if len(found) > 1:
            raise ValueError(
                "one loss joins the outputs of several forward passes: give each its own loss call, or call "
                "optimizer.observe(output, target, weight=) for each of them"
            )
        return next(iter(found.values()), None)

    # ---------------------------------------------------------------------------------- backward

    def _starts(self, capture: Capture) -> bool:
        if self._inside or not self.due:
            return False
        return _accumulates(p for call in capture.calls for p in self.layers[call.layer].params)

    def _unscale(self) -> Any:
        """The scale that a GradScaler put on the loss; as a tensor where it offers one without a sync."""
        scaler = self.grad_scaler
        if scaler is None:
            return 1.0
        read = getattr(scaler, "_get_scale_async", None)
        scale = read() if read is not None else None
        return scaler.get_scale() if scale is None else scale

    def _on_loss(
        self,
        number: int,
        capture: Capture,
        output_edge: Edge,
        f: Tensor,
        target: Tensor,
        done: list[bool],
        grads: tuple[Tensor | None, ...],
    ) -> None:
        """Runs when a gradient arrives at a loss that the loss module returned: the factor of this loss."""
        reached = grads[number]
        if done or reached is None or capture.explicit or not self._starts(capture):
            return
        done.append(True)
        loss = self._loss()
        scale = self._unscale()
        if loss.reduction == "none":
            terms, factor = loss.terms(f, target, capture.n, reached / scale), 1.0
        else:
            terms, factor = loss.terms(f, target, capture.n), at_least_float32(reached) / scale
        Pass(self, capture, loss, terms, edge_of(f), f.detach(), output_edge, scale).run(factor)

    def _on_observed(
        self,
        capture: Capture,
        output_edge: Edge,
        noted: Observed,
        done: list[bool],
        grads: tuple[Tensor | None, ...],
    ) -> None:
        """Runs when a gradient arrives at an observed tensor that was computed from the model's output."""
        if done or not self._starts(capture):
            return
        done.append(True)
        self._run_observed(capture, output_edge, edge_of(noted.output), noted)

    def _run_observed(self, capture: Capture, output_edge: Edge, edge: Edge, noted: Observed) -> None:
        f = noted.output.detach()
        terms = noted.loss.terms(f, noted.target, capture.n)
        Pass(self, capture, noted.loss, terms, edge, f, output_edge, self._unscale()).run(noted.weight)

    def _on_output(self, number: int, f: Tensor, version: int, grads: tuple[Tensor | None, ...]) -> None:
        """Runs when a gradient arrives at the model's output."""
        arriving = grads[number]
        if self._inside or not self.due or arriving is None:
            return
        node = torch._C._current_autograd_node()
        capture, shape = metadata(node)[self._key(number)]
        named = isinstance(self.loss_fn, str) and not capture.explicit
        if not (named or capture.observed) or capture.done or not self._starts(capture):
            return
        capture.done = True
        edge = Edge(node, number, shape)
        if named:
            if f._version != version:
                raise RuntimeError(
                    "the model's output was edited in place before the loss: apply that operation out of place, or "
                    "inside the model"
                )
            self._run_named(capture, edge, f, arriving)
        for noted in capture.observed:
            self._run_observed(capture, edge, edge, noted)
        capture.observed = []

    def _run_named(self, capture: Capture, edge: Edge, f: Tensor, arriving: Tensor) -> None:
        loss, scale = self._loss(), self._unscale()
        terms = loss.terms_from_gradient(f, arriving.reshape(f.shape), capture.n)
        if not self._checked:
            loss.check_arriving(f, arriving.reshape(f.shape), terms, scale)
            self._checked = True
        Pass(self, capture, loss, terms, edge, f, edge, scale, arriving).run(1.0)

    def _loss(self) -> Loss:
        assert self.loss_fn is not None
        return loss_of(self.loss_fn, self.reduction, self.class_dim)

    def generator(self, device: torch.device) -> torch.Generator:
        """Draws that a resumed run repeats, and that leave the global generators alone."""
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        seed = hash((self.seed, self.step, self.passes, rank)) & (2**63 - 1)
        return torch.Generator(device).manual_seed(seed)

    def start_step(self, step: int, due: Iterable[str]) -> None:
        """What was captured lives as long as the gradient: a new step starts with nothing."""
        self.step, self.passes = step, 0
        self._calls = []
        self.set_due(due)
        for block in self.blocks:
            block.forget_pending()


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _tensors(output: Any) -> Iterable[Tensor]:
    """The tensors in a model's output: a tensor, or tuples, lists, mappings and dataclass-like objects of them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif hasattr(output, "__dict__"):
        for value in vars(output).values():
            if isinstance(value, Tensor):
                yield value


class Pass:
    """One curvature pass: the layers' inputs, shared by all blocks and signals, and the two ways to get signals.

    f, f_edge: the tensor the loss is applied to and where its gradient arrives; output_edge: the model's output.
    loss_scale: what a GradScaler multiplied the loss with.
    arriving: the gradient at f, where the node of f is running and no loss but this one sends it.
    """

    def __init__(
        self,
        record: Record,
        capture: Capture,
        loss: Loss,
        terms: Terms,
        f_edge: Edge,
        f: Tensor,
        output_edge: Edge,
        loss_scale: Any = 1.0,
        arriving: Tensor | None = None,
    ) -> None:
        self.record, self.capture, self.loss, self.terms = record, capture, loss, terms
        self.f, self.f_edge, self.output_edge = f, f_edge, output_edge
        self.loss_scale, self.arriving = loss_scale, arriving
        self.calls: dict[int, list[Call]] = {}
        for call in capture.calls:
            self.calls.setdefault(call.layer, []).append(call)
        self._inputs: dict[tuple[int, ...], Inputs] = {}

    @torch.no_grad()
    def run(self, factor: Tensor | float) -> None:
        """Feed every block that is due.

        factor: what multiplies this loss in the function whose gradient is in .grad.
        """
        record, terms = self.record, self.terms
        kinds: dict[tuple[str, int | None], list[Curvature]] = {}
        for block in record.blocks:
            if block.name in record.due:
                block.begin(torch._C._current_graph_task_id())
                kinds.setdefault((block.options.curv_type, block.options.samples), []).append(block)
        own_loss_only = terms.uniform and not self.capture.explicit and self.capture.losses <= 1
        record._inside = True
        try:
            with torch.autocast(self.f.device.type, enabled=False):
                for (kind, samples), blocks in kinds.items():
                    if kind == "empirical_fisher" and own_loss_only and torch._C._current_graph_task_id() != -1:
                        self.listen(blocks, factor)
                    else:
                        self.send(blocks, kind, samples, factor)
        finally:
            record._inside = False
        record.passes += 1

    def _edge(self, call: Call) -> Edge:
        return self.output_edge if call.edge is None else call.edge

    def inputs(self, layer: int, used: list[Call]) -> Inputs:
        """The layer's inputs over the calls that this loss reaches."""
        key = (layer, *(id(call) for call in used))
        if key not in self._inputs:
            name, n = self.record.layers[layer].name, self.capture.n
            for call in used:
                if call.x.shape[0] % n or call.shape[0] % n:
                    raise ValueError(
                        f"layer {name!r} was called with a tensor of shape {tuple(call.x.shape)}, whose dimension 0 "
                        f"is no multiple of the batch size {n} (dimension 0 of the model's output): put the batch "
                        "first, or give this layer's parameters a group with approx=None"
                    )
            calls = [call.x for call in used]
            self._inputs[key] = Inputs(self.record.layers[layer], calls, n, self.terms.position_weights)
        return self._inputs[key]

    def signal(self, layer: int, used: list[Call], grads: list[Tensor]) -> Tensor:
        """s [n, r, g, o] from the gradients at the outputs of the calls."""
        view, parts = self.record.layers[layer].view, []
        for call, grad in zip(used, grads, strict=True):
            s = at_least_float32(view.signal(call.module, grad.reshape(call.shape)))
            parts.append(s.reshape(self.capture.n, -1, *s.shape[-2:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    # ------------------------------------------------------------------------ a pass of our own

    def send(self, blocks: list[Curvature], kind: str, samples: int | None, factor: Tensor | float) -> None:
        """Send the kind's signals from f to the layers of these blocks."""
        members = [k for block in blocks for k in self.record.members[block.name]]
        calls = [call for k in members for call in self.calls.get(k, [])]
        if not calls:
            return
        scale = factor * self.terms.reduction
        restore = self.loss.layout(self.f, self.capture.n)[1]
        generator = self.record.generator(self.f.device)
        count, generated = signals(kind, self.loss.row, self.terms, samples, generator)
        size = max(1, SIGNAL_ELEMENTS // sum(call.shape.numel() for call in calls))
        chunk: list[list[Tensor | None]] = []
        for done, signal in enumerate(generated, 1):
            chunk.append(self._backward(calls, restore(signal).to(self.f.dtype)))
            if len(chunk) == size or done == count:
                self._deliver(blocks, calls, chunk, scale, len(chunk) / count)
                chunk = []

    def _backward(self, calls: list[Call], signal: Tensor) -> list[Tensor | None]:
        """Gradients at the outputs of the calls; None where f does not depend on one."""
        signal = signal.reshape(self.f_edge.shape)
        grads: dict[tuple[Node, int], Tensor | None] = {self.f_edge[:2]: signal}
        edges = [self._edge(call) for call in calls]
        inner = [edge for edge in edges if edge[:2] != self.f_edge[:2]]
        if inner:
            got = torch.autograd.grad(
                [self.f_edge.public],
                [edge.public for edge in inner],
                [signal],
                retain_graph=True,
                allow_unused=True,
            )
            grads.update((edge[:2], grad) for edge, grad in zip(inner, got, strict=True))
        return [grads[edge[:2]] for edge in edges]

    def _deliver(
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
                inputs.append(self.inputs(k, used) if used else None)
                each = [self.signal(k, used, [got[id(call)][v] for call in used]) for v in range(len(chunk))]  # type: ignore[misc]
                stacked.append((each[0].unsqueeze(0) if len(each) == 1 else torch.stack(each)) if used else None)
            if any(s is not None for s in stacked):
                block.measure(Stats(inputs, stacked, scale, share, block.layers))

    # -------------------------------------------------------------------- the user's own backward

    def listen(self, blocks: list[Curvature], factor: Tensor | float) -> None:
        """Take the gradients that the running backward brings to the layers of these blocks.

        They are loss_scale * factor * R times the residual signal of L / R, whose square is to count factor * R.
        """
        scale = torch.as_tensor(factor * self.terms.reduction * self.loss_scale**2, device=self.f.device)
        scale = torch.where(scale == 0, 0, 1 / scale)
        for block in blocks:
            waiting = _Waiting(self, block, scale)
            for k in self.record.members[block.name]:
                for call in self.calls.get(k, []):
                    waiting.expect(call, self._edge(call))
            waiting.deliver_if_complete()


class _Waiting:
    """The calls of one block whose gradients the running backward is still to bring."""

    def __init__(self, run: Pass, block: Curvature, scale: Tensor) -> None:
        self.run, self.block, self.scale = run, block, scale
        self.task = torch._C._current_graph_task_id()
        self.missing = 0
        self.received: list[tuple[Call, Tensor]] = []

    def expect(self, call: Call, edge: Edge) -> None:
        run = self.run
        if run.arriving is not None and edge[:2] == run.f_edge[:2]:
            self.received.append((call, run.arriving))
        elif torch._C._will_engine_execute_node(edge.node):
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
        order = {id(call): position for position, call in enumerate(self.run.capture.calls)}
        self.received.sort(key=lambda pair: order[id(pair[0])])
        calls, grads = [call for call, _ in self.received], [grad for _, grad in self.received]
        with torch.autocast(grads[0].device.type, enabled=False):
            self.run._deliver([self.block], calls, [list(grads)], self.scale, 1.0)
        self.received = []
