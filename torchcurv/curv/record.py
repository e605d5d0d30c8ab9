"""Record: the hooks that get (a, s) out of the user's own forward and backward.

Forward: a hook on each layer that is due notes a `Call` (the input) at the graph node of the layer's output, and a
hook on the model gathers the calls of one forward pass into a `Capture` at the node of the model's output. Backward:
a pre-hook on the node of the loss (or of the output, for a loss known by name) starts a curvature `Pass` from inside
the user's backward call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm

from torchcurv.curv.capture import Call, Capture, Edge, Frozen, Noted, edge_of, frozen, metadata
from torchcurv.curv.curvature import Curvature
from torchcurv.curv.inner import Watch
from torchcurv.curv.layers import Layer, Site
from torchcurv.curv.losses import Loss, Terms, at_least_float32, loss_of
from torchcurv.curv.passes import Pass
from torchcurv.curv.views import uses_batch_statistics


@dataclass
class Once:
    """The step in which a loss was last measured."""

    step: int = -1


class Hook:
    """A bound hook that can be switched off, and is off after deepcopy and pickling: copies of the model feed nothing.

    The switch is a bool, so that a compiled model breaks its graph at the hooks only while they are on.
    """

    def __init__(self, target: Callable[..., Any] | None = None) -> None:
        self.target, self.on = target, target is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.target is None or not self.on:
            return None
        call = _uncompiled if torch.compiler.is_compiling() else _plain
        return call(self.target, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def _plain(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return target(*args, **kwargs)


_uncompiled = torch._disable_dynamo(_plain)  # unlike torch.compiler.disable, imports the compiler only when called


def _accumulates(params: Iterable[Tensor]) -> bool:
    """Whether the backward call that is running adds into the `.grad` of any of these parameters."""
    for p in params:
        try:
            if p.requires_grad and torch._C._will_engine_execute_node(get_gradient_edge(p).node):
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
    unsupported: "error" raises where a parameter is used in a way its layer does not explain; "gradient" stops
        feeding its block.
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
        unsupported: str = "error",
    ) -> None:
        self.blocks = blocks
        self.loss_fn, self.reduction, self.class_dim = loss_fn, reduction, class_dim
        self.output_fn, self.grad_scaler, self.seed = output_fn, grad_scaler, seed
        self.unsupported = unsupported
        if loss_fn is not None:
            loss = loss_of(loss_fn, reduction, class_dim)  # unknown losses raise here
            if isinstance(loss_fn, str) and loss.reduction == "none":
                raise ValueError(
                    f"loss_fn={loss_fn!r} with reduction='none' says nothing about the weight of each term: pass the "
                    "loss module, or name the reduction ('mean', 'sum') that is taken of it"
                )
        if output_fn is not None and not callable(output_fn):
            raise TypeError(f"output_fn={output_fn!r}; pass a function from the model's output to the tensor of logits")
        self.layers: list[Layer] = [layer for block in blocks for layer in block.layers]
        index = {id(layer): k for k, layer in enumerate(self.layers)}
        self.members = {block.name: [index[id(layer)] for layer in block.layers] for block in blocks}
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self.step, self.passes = 0, 0
        self.verified: set[str] = set()  # blocks whose gradient was found to be that of their recorded calls
        self.refused: set[str] = set()  # blocks whose gradient was not, under unsupported="gradient"
        self._calls: list[tuple[Call, Edge]] = []
        self._depth = 0  # of calls of the model's own forward
        self._inside = False
        self._checked = False
        self._key = ("torchcurv", id(self))
        self._handles: list[Any] = []
        self._hooks: list[tuple[Hook, set[int]]] = []  # with the layers they feed
        self._inner: dict[int, list[tuple[int, Site]]] = {}  # the sites inside modules, by the id of their parameter
        self._watches: list[Watch | None] = []
        self._unknown_uses: dict[Tensor, str] = {}
        self._mixed = False  # whether batch statistics were used in the running forward pass
        self._hook_layers()
        start, end = Hook(self._on_start), Hook(self._on_end)
        self._handles.append(model.register_forward_pre_hook(start))
        self._handles.append(model.register_forward_hook(end, always_call=True))
        self._whole = [start, end]
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                self._whole.append(Hook(self._on_batch_norm))
                self._handles.append(module.register_forward_hook(self._whole[-1], with_kwargs=True))
        if isinstance(loss_fn, nn.Module):
            self._whole.append(Hook(self._on_loss_known))
            self._handles.append(loss_fn.register_forward_hook(self._whole[-1], with_kwargs=True))
        self.set_due(block.name for block in blocks)

    def _hook_layers(self) -> None:
        inside: dict[nn.Module, list[tuple[int, Site]]] = {}
        for k, layer in enumerate(self.layers):
            for site in layer.sites:
                if site.inner:
                    inside.setdefault(site.module, []).append((k, site))
                    self._inner.setdefault(_owner(site), []).append((k, site))
                    continue
                hook = Hook(partial(self._on_layer, k, site))
                self._hooks.append((hook, {k}))
                self._handles.append(site.module.register_forward_hook(hook, with_kwargs=True))
        for module, sites in inside.items():
            bare = [site.bias.param for _, site in sites if site.weight is None and site.bias is not None]
            before, after = Hook(partial(self._watch, bare)), Hook(self._unwatch)
            self._hooks += [(hook, {k for k, _ in sites}) for hook in (before, after)]
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after, always_call=True))

    def set_due(self, names: Iterable[str]) -> None:
        """Which blocks the next forward passes feed."""
        self.due = set(names) - self.refused
        due_layers = {k for name in self.due for k in self.members[name]}
        for hook, layers in self._hooks:
            hook.on = not due_layers.isdisjoint(layers)
        for hook in self._whole:
            hook.on = bool(self.due)

    def remove(self) -> None:
        """Take every hook away."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._calls, self._depth = [], [], 0
        self.set_due(())

    # ----------------------------------------------------------------------------------- forward

    def _at(self, edge: Edge) -> Noted:
        return metadata(edge.node).setdefault(self._key, {}).setdefault(edge.number, Noted())

    def _on_layer(
        self, k: int, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Any:
        if _ignored():
            return None
        layer, names = self.layers[k], site.view.arguments
        x = tuple(_argument(args, kwargs, position, name) for position, name in enumerate(names))
        if not isinstance(x[0], Tensor) or not isinstance(out, Tensor):
            raise ValueError(
                f"layer {layer.name!r} was called with a {type(x[0]).__name__} and returned a {type(out).__name__}; a "
                "tensor as first argument and a tensor back is what can be read. Put its parameters into a group "
                "with approx=None"
            )
        if not out.requires_grad or not _own_parameters(site):
            return None
        x = tuple(value.detach() if isinstance(value, Tensor) else value for value in x)
        return self._note(out, [Call(k, site, x, out.shape, out.shape[0] if out.dim() else 1)])

    def _note(self, out: Tensor, calls: list[Call]) -> Tensor | None:
        """Keep calls at the node of their output; a tensor is to take the place of that output."""
        edge = edge_of(out)
        self._at(edge).calls.extend(calls)
        if self._depth:
            self._calls += [(call, edge) for call in calls]
        # A view of part of another tensor: in-place edits must reach a clone, or they would rewrite our edge.
        return out.clone() if out._base is not None and edge.node is out.grad_fn else None

    def _watch(self, bare: list[Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module with inner layers starts. A recomputation must run the same functions, but is not noted."""
        running = torch._C._current_graph_task_id() != -1
        if (_ignored() and not running) or not torch.is_grad_enabled():
            self._watches.append(None)
            return
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()), None)
        note = _unnoted if running else self._note_inner
        watch = Watch(note, None if first is None else len(first), bare, self._unknown_uses.setdefault)
        self._watches.append(watch)
        watch.__enter__()

    def _unwatch(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        watch = self._watches.pop() if self._watches else None
        if watch is not None:
            watch.__exit__(None, None, None)

    def _note_inner(
        self, param: Tensor, rows: slice | None, x: Tensor, out: Tensor, batch_first: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """A product with these rows of a parameter, or a use of it as a bias or scale."""
        if not out.requires_grad:
            return out
        calls = []
        for k, site in self._inner.get(id(param), ()):
            if not self._hook_is_due(k):
                continue
            own = site.weight.rows if site.weight is not None else None
            read = batch_first
            if rows is not None and own is not None:
                if not rows.start <= own.start < own.stop <= rows.stop:
                    continue
                read = partial(_columns, batch_first, slice(own.start - rows.start, own.stop - rows.start))
            calls.append(Call(k, site, (x,), out.shape, len(x), read))
        noted = self._note(out, calls) if calls else None
        return out if noted is None else noted

    def _hook_is_due(self, k: int) -> bool:
        return any(k in self.members[name] for name in self.due)

    def _on_batch_norm(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Through batch statistics the samples meet: a pass of our own takes the statistics as constants."""
        x = _argument(args, kwargs, 0, "input")
        if _ignored() or not uses_batch_statistics(module) or not isinstance(out, Tensor) or not out.requires_grad:
            return
        self._mixed = True
        if isinstance(x, Tensor) and x.requires_grad and out.grad_fn is not None:
            out.grad_fn.register_hook(partial(self._cut, module, x.detach()))

    @torch.no_grad()
    def _cut(self, module: Any, x: Tensor, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> Any:
        """dx = dz weight / sqrt(var + eps) in place of the gradient of batch norm."""
        if not self._inside or inputs[0] is None or outputs[0] is None:
            return None
        dims = [0, *range(2, x.dim())]
        scale = (at_least_float32(x).var(dims, correction=0) + module.eps).rsqrt()
        scale = scale if module.weight is None else scale * module.weight
        shaped = scale.reshape(1, -1, *(1,) * (x.dim() - 2))
        return ((outputs[0] * shaped).to(inputs[0].dtype), *inputs[1:])

    def _on_start(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if _ignored():
            return
        if not self._depth:
            self._calls, self._mixed = [], False
        self._depth += 1

    def _on_end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _ignored() or not self._depth:
            return
        self._depth -= 1
        if self._depth:
            return
        calls, self._calls = self._calls, []
        if calls and output is not None:
            self._gather(calls, self._outputs(output))

    def _outputs(self, output: Any) -> list[Tensor]:
        outputs = [out for out in _tensors(output) if out.grad_fn is not None and out.dim()]
        if not isinstance(self.loss_fn, str):
            return outputs
        if self.output_fn is None:
            if len(outputs) > 1:
                raise ValueError(
                    f"the model returned {len(outputs)} tensors: pass output_fn=, a function from the model's output "
                    f"to the one that loss_fn={self.loss_fn!r} is applied to, or loss_fn=None and call "
                    "optimizer.observe"
                )
            return outputs
        f = self.output_fn(output)
        if not isinstance(f, Tensor) or (outputs and _order(f) > max(map(_order, outputs))):
            raise ValueError(
                f"output_fn returned a {'new tensor' if isinstance(f, Tensor) else type(f).__name__}; it must pick a "
                "tensor that the model returned and your loss is computed from. For anything else pass the loss "
                "module as loss_fn=, or loss_fn=None and call optimizer.observe"
            )
        return [f] if f.grad_fn is not None and f.dim() else []

    def _gather(self, calls: list[tuple[Call, Edge]], outputs: list[Tensor]) -> None:
        """One capture per output, of the calls that came before it: references only go down the graph."""
        forward = object()
        numbered = [(edge.node._sequence_nr(), call, edge) for call, edge in calls]
        for out in outputs:
            edge = edge_of(out)
            last = edge.node._sequence_nr()
            own: list[tuple[Call, Edge | None]] = []
            for number, call, at in numbered:
                if at[:2] == edge[:2]:
                    own.append((call, None))
                elif number < last:
                    own.append((call, at))
            capture = Capture(own, out.shape[0], out.shape, forward, mixed=self._mixed)
            self._at(edge).capture = capture
            if isinstance(self.loss_fn, str):
                hook = partial(self._on_output, capture, edge.number, edge.shape, frozen(out), Once())
                edge.node.register_prehook(hook)

    def _on_loss_known(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any) -> None:
        if _ignored() or not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        f, target = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "target")
        if isinstance(target, Tensor) and target.grad_fn is not None and self.find(target) is not None:
            raise ValueError(
                "the second argument of the loss, the target, depends on the model: call loss(output, target) in "
                "this order and detach the target, or call optimizer.observe for what the loss is a function of"
            )
        found = self.find(f) if isinstance(f, Tensor) and f.grad_fn is not None else None
        if found is None:
            return
        _count_loss(found[0])
        edge = edge_of(loss)
        edge.node.register_prehook(partial(self._on_loss, edge.number, *found, f, target, Once()))

    def observe(self, output: Tensor, target: Tensor, loss_fn: nn.Module | str | None, weight: float | Tensor) -> None:
        """Note the loss of one output; its pass starts when the backward reaches that output."""
        loss_fn = self.loss_fn if loss_fn is None else loss_fn
        if loss_fn is None:
            raise ValueError("observe: no loss is known; pass loss_fn= here or to the optimizer")
        loss = loss_of(loss_fn, self.reduction if isinstance(loss_fn, str) else None, self.class_dim)
        if not isinstance(output, Tensor) or not output.dim():
            raise ValueError(
                "observe(output, target) takes the tensor that the loss is applied to, [batch, ...]; got "
                f"{'the loss, a number' if isinstance(output, Tensor) else f'a {type(output).__name__}'}"
            )
        if not self.due or _ignored() or not output.requires_grad:
            return
        found = self.find(output)
        if found is None:
            raise ValueError(
                "observe: this output does not come from a forward pass of the model that was recorded; observe "
                "the output of the model itself, before backward()"
            )
        capture, output_edge = found
        capture.deal()
        _count_loss(capture)
        edge = edge_of(output)
        below = None if edge[:2] == output_edge[:2] else output_edge  # a node must not refer to itself
        noted = partial(loss.terms, target=target, n=capture.batch_of(output))
        hook = partial(
            self._on_observed, capture, below, edge.number, edge.shape, frozen(output), loss, noted, weight, Once()
        )
        edge.node.register_prehook(hook)

    def find(self, f: Tensor) -> tuple[Capture, Edge] | None:
        """The capture of f, or of the model's output that f is computed from, and the edge it is kept at.

        Layers that lie between (or were called outside the model's own forward) make a capture of f itself.
        """
        start = edge_of(f)
        calls: list[tuple[Call, Edge | None]] = []
        captures: list[tuple[Capture, Edge]] = []
        seen, queue = set(), [start]
        while queue:
            edge = queue.pop()
            noted = metadata(edge.node).get(self._key, {}).get(edge.number, Noted())
            if noted.capture is not None:
                captures.append((noted.capture, edge))
                continue
            calls += [(call, None if edge[:2] == start[:2] else edge) for call in noted.calls]
            for node, number in edge.node.next_functions:
                if node is not None and (node, number) not in seen:
                    seen.add((node, number))
                    queue.append(Edge(node, number, torch.Size()))
        if not calls and len(captures) < 2:
            return captures[0] if captures else None
        forwards = {capture.forward for capture, _ in captures} - {None}
        if len(forwards) > 1:
            raise ValueError(
                "one loss joins the outputs of several forward passes: give each its own loss call, or call "
                "optimizer.observe(output, target, weight=) for each of them"
            )
        known = {id(call) for call, _ in calls}
        for capture, edge in captures:
            for call, at in capture.calls:
                if id(call) not in known:
                    known.add(id(call))
                    calls.append((call, edge if at is None else at))
        n = captures[0][0].n if captures else f.shape[0]
        parts = [capture for capture, _ in captures]
        mixed = self._mixed if not parts else any(part.mixed for part in parts)
        joined = Capture(calls, n, f.shape, next(iter(forwards), None), parts, mixed=mixed)
        self._at(start).capture = joined
        return joined, start

    # ---------------------------------------------------------------------------------- backward

    def _fed(self, capture: Capture, once: Once) -> list[Curvature]:
        """The due blocks into whose gradients the running backward accumulates; none if they have this loss already.

        What was captured lives as long as the gradient: after step() or zero_grad() the same loss counts again.
        """
        if self._inside or not self.due or not capture.n:
            return []
        layers = {call.layer for call, _ in capture.calls}
        blocks = [
            block
            for block in self.blocks
            if block.name in self.due and not layers.isdisjoint(self.members[block.name]) and _accumulates(block.params)
        ]
        held = any(block.captured and any(p.grad is not None for p in block.params) for block in blocks)
        if once.step == self.step and held:
            return []
        once.step = self.step
        return blocks

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
        once: Once,
        grads: tuple[Tensor | None, ...],
    ) -> None:
        """Runs when a gradient arrives at a loss that the loss module returned: the factor of this loss."""
        reached = grads[number]
        if reached is None or capture.explicit:
            return
        blocks = self._fed(capture, once)
        if not blocks:
            return
        loss, scale = self._loss(), self._unscale()
        if f.shape[0] != capture.n and sorted(f.shape) == sorted(capture.shape):
            raise ValueError(
                f"the loss was given an output of shape {tuple(f.shape)}, and dimension 0 of the model's output "
                f"{tuple(capture.shape)} is the batch: return the batch first from the model, or call "
                "optimizer.observe(output, target) with an output whose dimension 0 is the batch"
            )
        reached = at_least_float32(reached) / scale
        if loss.reduction == "none":
            terms, factor = loss.terms(f, target, capture.n, reached), 1.0
        else:
            terms, factor = loss.terms(f, target, capture.n), reached
        Pass(self, capture, blocks, loss, terms, edge_of(f), f.detach(), output_edge, scale).run(factor)

    def _on_observed(
        self,
        capture: Capture,
        output_edge: Edge | None,
        number: int,
        shape: torch.Size,
        f: Frozen,
        loss: Loss,
        terms: Callable[[Tensor], Terms],
        weight: float | Tensor,
        once: Once,
        grads: tuple[Tensor | None, ...],
    ) -> None:
        """Runs when a gradient arrives at an observed tensor; output_edge None: it is the captured one itself."""
        edge = Edge(torch._C._current_autograd_node(), number, shape)
        blocks = self._fed(capture, once) if grads[number] is not None else []
        if blocks:
            output = f.read()
            output_edge = output_edge or edge
            Pass(self, capture, blocks, loss, terms(output), edge, output, output_edge, self._unscale()).run(weight)

    def _on_output(
        self,
        capture: Capture,
        number: int,
        shape: torch.Size,
        f: Frozen,
        once: Once,
        grads: tuple[Tensor | None, ...],
    ) -> None:
        """Runs when a gradient arrives at the model's output, for a loss known by its name."""
        arriving = grads[number]
        if arriving is None or capture.explicit:
            return
        blocks = self._fed(capture, once)
        if not blocks:
            return
        edge, output = Edge(torch._C._current_autograd_node(), number, shape), f.read()
        loss, scale = self._loss(), self._unscale()
        arrived = arriving.reshape(output.shape)
        terms = loss.terms_from_gradient(output, arrived, capture.n, scale)
        if not self._checked and not terms.empty:
            loss.check_arriving(output, arrived, terms, scale)
            self._checked = True
        Pass(self, capture, blocks, loss, terms, edge, output, edge, scale, arriving).run(1.0)

    def _loss(self) -> Loss:
        assert self.loss_fn is not None
        return loss_of(self.loss_fn, self.reduction, self.class_dim)

    def refuse(self, block: Curvature, params: list[str]) -> None:
        """The gradient of a block is not that of its recorded calls."""
        if self.unsupported == "error":
            raise RuntimeError(
                f"the gradient of {', '.join(params)} is not the one that the recorded calls of the layer explain: "
                "the parameter is used elsewhere too (F.linear(x, layer.weight), a layer of another type that shares "
                f"it), or the layer does more to its output than a layer of its type{self._where(block)}. Put it into "
                'a group with approx=None, or pass unsupported="gradient"'
            )
        self.refused.add(block.name)
        block.forget_pending()
        self.set_due(self.due)

    def _where(self, block: Curvature) -> str:
        uses = [self._unknown_uses[p] for p in block.params if p in self._unknown_uses]
        return f" (a bare parameter may be added or multiplied to the batch; torch.{uses[0]} used it)" if uses else ""

    def generator(self, device: torch.device) -> torch.Generator:
        """Draws that a resumed run repeats, and that leave the global generators alone."""
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        seed = hash((self.seed, self.step, self.passes, rank)) & (2**63 - 1)
        return torch.Generator(device).manual_seed(seed)

    def start_step(self, step: int, due: Iterable[str]) -> None:
        """What was captured lives as long as the gradient: a new step starts with nothing."""
        self.step, self.passes = step, 0
        self.set_due(due)
        for block in self.blocks:
            block.forget_pending()


def _order(tensor: Tensor) -> int:
    """Grows with the time of the operation that made the tensor; -1 for a leaf."""
    return -1 if tensor.grad_fn is None else tensor.grad_fn._sequence_nr()


def _own_parameters(site: Site) -> bool:
    """Whether the module runs on the parameters we cover, not on others put in for one call (functional_call)."""
    own = site.module._parameters
    return (site.weight is None or own.get(site.view.weight) is site.weight.param) and (
        site.bias is None or own.get(site.view.bias) is site.bias.param
    )


def _owner(site: Site) -> int:
    """The id of the parameter that an inner layer is recognised by."""
    piece = site.weight or site.bias
    assert piece is not None
    return id(piece.param)


def _unnoted(param: Tensor, rows: slice | None, x: Tensor, out: Tensor, batch_first: Any) -> Tensor:
    return out


def _columns(batch_first: Callable[[Tensor], Tensor], columns: slice, gradient: Tensor) -> Tensor:
    return batch_first(gradient)[..., columns]


def _count_loss(capture: Capture) -> None:
    for call, _ in capture.calls:
        call.losses += 1


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
