"""Forward: the hooks that note, in the autograd graph itself, what a forward pass does with the layers that are due.

A hook on each layer notes a `Call` at the graph node of its output. Modules that compute with their parameters inside
are watched while they run (parameter_trace.py). Where samples meet in batch statistics, our own passes take these as
constants.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchcurv.curv.capture.calls import Call, Capture
from torchcurv.curv.capture.hooks import Hook, argument, is_inert, is_internal_forward
from torchcurv.curv.capture.notes import GraphNotes
from torchcurv.curv.capture.parameter_trace import ParameterTrace, sample_gradients
from torchcurv.curv.compiler import CompilerOff, untraced
from torchcurv.curv.distributed import Ranks
from torchcurv.curv.graph import (
    Edge,
    backward_id,
    base_of,
    drop_hooks,
    edge_of,
    no_torch_function,
    nodes_between,
    parameters_of,
    scale_of_batch_norm,
)
from torchcurv.curv.hessian.tape import Tape
from torchcurv.curv.layers.layer import FUNCTION, PRODUCT, Layer, ParameterUse
from torchcurv.curv.layers.normalization import BATCH_NORMS, uses_batch_statistics
from torchcurv.curv.layers.products import Layout, Product
from torchcurv.curv.layers.table import has_forward_of_its_view
from torchcurv.curv.numerics import at_least_float32

Ended = Callable[[list[tuple[Call, Edge]], Any], None]  # with what was noted in a forward pass, and its output


class Forward:
    """The hooks on a model.

    ended: called after each forward pass of the model, with what was noted in it and the model's output.
    inside: set while a pass of our own runs. mixed: whether samples met in the last forward pass.
    ranks: who sees whether the model runs in several processes.
    twice: whether the graph will be differentiated twice, which fused attention cannot. taped: whether every function
    is noted, for propagation. constant_statistics: whether batch statistics are constants in a pass of our own.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], ended: Ended) -> None:
        self.layers, self.ended, self.notes, self.ranks = layers, ended, GraphNotes(), Ranks(None)
        self.inside = self.mixed = False
        self.constant_statistics, self.twice, self.taped = True, False, False
        self.tape: Tape | None = None  # of the last forward pass of the model
        self.losses: Any = None  # where the model may compute its loss itself
        self.due: set[int] = set()
        self.bare = {k for k, layer in enumerate(layers) if layer.sites[0].bare}
        self.unknown_uses: dict[Tensor, str] = {}  # functions that used a bare parameter in a way that is not known
        self._calls: list[tuple[Call, Edge]] = []
        self._depth = 0  # of calls of the model's own forward
        self._open = ExitStack()  # what ends with it
        self._compiler: CompilerOff | None = None  # is put back after it
        self._watches: list[ParameterTrace | None] = []
        self._recent: dict[int, list[Call]] = {}  # uses of a bare parameter in the running call of its module
        self._handles: list[Any] = []
        self._hooks: list[tuple[Hook, set[int]]] = []  # with the layers they feed
        self._inner: dict[
            int, list[tuple[int, ParameterUse]]
        ] = {}  # the sites inside modules, by the id of their parameter
        self.products: dict[Tensor, Layout] = {}  # bare parameters that turned out to be weights of linear maps
        self._functions: set[int] = set()  # ids of parameters that are known by torch functions
        self._weights: set[int] = set()  # ids of parameters that are known as weights of linear maps
        self._called: set[int] = set()  # the layers whose function was called in the running call of their module
        self._hook_layers()
        start, end = Hook(self._on_start, untraced=True), Hook(self._on_end, untraced=True)
        for inner in model.modules():
            drop_hooks(inner, is_inert)
        self._handles.append(model.register_forward_pre_hook(start))
        self._handles.append(model.register_forward_hook(end, always_call=True))
        self._model_hooks = [start, end]
        for module in model.modules():
            if isinstance(module, BATCH_NORMS):
                self._model_hooks.append(Hook(self._on_batch_norm))
                self._handles.append(module.register_forward_hook(self._model_hooks[-1], with_kwargs=True))

    def _hook_layers(self) -> None:
        inside: dict[nn.Module, list[tuple[int, ParameterUse]]] = {}
        for k, layer in enumerate(self.layers):
            for site in layer.sites:
                if site.function:
                    (self._weights if site.part == PRODUCT else self._functions).add(_owner(site))
                if site.inner:
                    inside.setdefault(site.module, []).append((k, site))
                    self._inner.setdefault(_owner(site), []).append((k, site))
                    continue
                hook = Hook(partial(self._on_layer, k, site))
                self._hooks.append((hook, {k}))
                self._handles.append(site.module.register_forward_hook(hook, with_kwargs=True))
        for module, sites in inside.items():
            bare = [site.bias.param for _, site in sites if site.bare and site.bias is not None]
            before, after = Hook(partial(self._watch, bare)), Hook(partial(self._unwatch, sites))
            self._hooks += [(hook, {k for k, _ in sites}) for hook in (before, after)]
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))

    def set_due(self, layers: set[int]) -> None:
        """Which layers the next forward passes note."""
        self.due = layers
        for hook, fed in self._hooks:
            hook.on = not layers.isdisjoint(fed)
        for hook in self._model_hooks:
            hook.on = bool(layers) or self.ranks.searching

    def remove(self) -> None:
        """Take every hook away."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._calls, self._depth = [], [], 0
        self.set_due(set())

    # ------------------------------------------------------------------------------------ the whole model

    @untraced
    def _on_start(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A pass that is noted runs uncompiled as a whole: each hook inside of it would end a compiled graph."""
        compiler = CompilerOff()
        if is_internal_forward() or self._depth:
            self._depth += not is_internal_forward()
            compiler.close()
            return
        self._depth, self._calls, self.mixed, self._compiler = 1, [], False, compiler
        self.ranks.saw(module)
        if self.twice:
            self._open.enter_context(sdpa_kernel(SDPBackend.MATH))
        self.tape = self._open.enter_context(Tape(module)) if self.taped else None
        if self.losses is not None:
            self._open.enter_context(self.losses)

    @untraced
    def _on_end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._depth or is_internal_forward():
            return
        self._depth -= 1
        if self._depth:
            return
        self._open.close()
        calls, self._calls = self._calls, []
        try:
            if output is not None and (calls or not self.due.isdisjoint(self.bare)):
                self.ended(calls, output)
        finally:
            self.abandon()

    @untraced
    def abandon(self) -> None:
        """End a pass that has not ended itself: one that was interrupted from the keyboard."""
        self._depth, compiler, self._compiler = 0, self._compiler, None
        self._open.close()
        if compiler is not None:
            compiler.close()

    # --------------------------------------------------------------------------------------- its layers

    def _on_layer(
        self, k: int, site: ParameterUse, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Any:
        if is_internal_forward():
            return None
        layer, names = self.layers[k], site.view.arguments
        x = tuple(argument(args, kwargs, position, name) for position, name in enumerate(names))
        if not isinstance(x[0], Tensor) or not isinstance(out, Tensor):
            raise ValueError(
                f"layer {layer.name!r} was called with a {type(x[0]).__name__} and returned a {type(out).__name__}; a "
                "tensor as first argument and a tensor back is what can be read. Put its parameters into a group "
                "with approx=None"
            )
        if not out.requires_grad or not _own_parameters(site):
            return None
        with no_torch_function():
            x = tuple(value.detach() if isinstance(value, Tensor) else value for value in x)
            if site.view.mode is not None:
                x += (site.view.mode(module),)
            call = Call(k, site, x, out.shape, out.shape[0] if out.dim() else 1)
        return self._note(out, [call])

    def _note(self, out: Tensor, calls: list[Call]) -> Tensor | None:
        """Keep calls at the node of their output; a tensor is to take the place of that output."""
        with no_torch_function():
            edge = edge_of(out)
            self.notes.at(edge).calls.extend(calls)
            if self._depth:
                self._calls += [(call, edge) for call in calls]
            keep = base_of(out) is None or edge.node is not out.grad_fn
        # A view of part of another tensor: in-place edits must reach a clone, or they would rewrite our edge.
        return None if keep else out.clone()

    def _watch(self, bare: list[Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module with inner layers starts. A recomputation must run the same functions, but is not noted."""
        running = backward_id() != -1
        if (is_internal_forward() and not running) or not torch.is_grad_enabled():
            self._watches.append(None)
            return
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and not isinstance(x, nn.Parameter))
        first = next((x for x in given if x.dim()), None)
        note = _unnoted if running else self._note_inner
        at_function = _unnoted_call if running else partial(self._note_function, module)
        at_products = _unnoted_products if running else partial(self._note_products, module)
        batch = None if first is None else len(first)
        unknown, seen = self.unknown_uses.setdefault, self.products.__setitem__
        watch = ParameterTrace(
            note, batch, bare, unknown, at_function, self._functions, at_products, self._weights, seen
        )
        self._watches.append(watch)
        self._recent |= {id(p): [] for p in bare}
        watch.__enter__()

    def _unwatch(
        self,
        sites: list[tuple[int, ParameterUse]],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        watch = self._watches.pop() if self._watches else None
        if watch is None:
            return None
        watch.__exit__(None, None, None)
        bare = [site.bias.param for _, site in sites if site.bare and site.bias is not None]
        recent = {id(p): self._recent.pop(id(p), []) for p in bare}
        called, self._called = self._called, set()
        out = output[0] if isinstance(output, tuple) and output else output
        if is_internal_forward() or not isinstance(out, Tensor) or not out.requires_grad or not out.dim():
            return None
        calls, batch = [], len(out)
        for k, site in sites:
            if site.by_sample and k in self.due and (site.opaque or _unknown(site, self.unknown_uses)):
                assert site.bias is not None
                for call in recent[id(site.bias.param)]:
                    call.superseded = True
                read = sample_gradients(module, site.part, site.bias.param.detach(), args, kwargs, batch)
                calls.append(Call(k, site, (out.new_empty(batch),), out.shape, batch, read))
        noted = self._note(out, calls) if calls else None
        for k, site in sites:
            if site.part == FUNCTION and k in self.due and k not in called and noted is None:
                noted = self._on_layer(k, site, module, args, kwargs, out)  # its output is what its type says, perhaps
        return noted if noted is None or out is output else (noted, *output[1:])

    def _note_inner(
        self, param: Tensor, rows: slice | None, x: Tensor, out: Tensor, batch_first: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """A product with these rows of a parameter, or a use of it as a bias or scale."""
        if not out.requires_grad:
            return out
        calls = []
        for k, site in self._inner.get(id(param), ()):
            if k not in self.due:
                continue
            own = site.weight.rows if site.weight is not None else None
            read = batch_first
            if rows is not None and own is not None:
                if not rows.start <= own.start < own.stop <= rows.stop:
                    continue
                read = partial(_columns, batch_first, slice(own.start - rows.start, own.stop - rows.start))
            seen = None if rows is None else x.shape[:-1].numel()
            calls.append(Call(k, site, (x,), out.shape, len(x), read, seen=seen))
            if id(param) in self._recent:
                self._recent[id(param)].append(calls[-1])
        noted = self._note(out, calls) if calls else None
        return out if noted is None else noted

    def _note_function(self, module: nn.Module, param: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """A call of the function that a layer of this module is about."""
        if not out.requires_grad:
            return out
        calls = []
        for k, site in self._inner.get(id(param), ()):
            if k in self.due and site.part == FUNCTION and site.module is module:
                given: tuple[Any, ...] = (x.detach(),)
                if site.view.mode is not None:
                    given += (site.view.mode(site.module),)
                calls.append(Call(k, site, given, out.shape, out.shape[0] if out.dim() else 1))
        self._called |= {call.layer for call in calls}
        noted = self._note(out, calls) if calls else None
        return out if noted is None else noted

    def _note_products(self, module: nn.Module, products: list[Product], out: Tensor) -> Tensor:
        """Products with parameters of this module, which one function call is."""
        if not out.requires_grad:
            return out
        calls = []
        for one in products:
            for k, site in self._inner.get(id(one.param), ()):
                rows = None if site.weight is None else site.weight.rows
                if k not in self.due or site.part != PRODUCT or site.module is not module:
                    continue
                if site.view is one.layout.view and rows == one.rows:
                    x = one.given()
                    if one.expert is not None and not len(x):
                        continue  # it gets no token
                    seen = None if one.read is None else x.shape[:2].numel()
                    batch = x.shape[0] if x.dim() else 1
                    calls.append(Call(k, site, (x,), out.shape, batch, one.read, seen=seen))
        noted = self._note(out, calls) if calls else None
        return out if noted is None else noted

    def _on_batch_norm(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Through batch statistics the samples meet: a pass of our own takes the statistics as constants."""
        x = argument(args, kwargs, 0, "input")
        if (
            is_internal_forward()
            or not uses_batch_statistics(module)
            or not isinstance(out, Tensor)
            or not out.requires_grad
        ):
            return
        self.mixed = True
        if not isinstance(x, Tensor) or not x.requires_grad or out.grad_fn is None:
            return
        if not has_forward_of_its_view(module):
            self.cut_between(edge_of(out), edge_of(x))  # its forward does more than normalise
        else:
            out.grad_fn.register_hook(partial(self._cut, module, x.detach()))

    @torch.no_grad()
    def _cut(self, module: Any, x: Tensor, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> Any:
        """dx = dz weight / sqrt(var + eps) in place of the gradient of batch norm."""
        if not self.inside or not self.constant_statistics or inputs[0] is None or outputs[0] is None:
            return None
        dims = [0, *range(2, x.dim())]
        scale = (at_least_float32(x).var(dims, correction=0) + module.eps).rsqrt()
        scale = scale if module.weight is None else scale * module.weight
        shaped = scale.reshape(1, -1, *(1,) * (x.dim() - 2))
        return ((outputs[0] * shaped).to(inputs[0].dtype), *inputs[1:])

    def cut_between(self, start: Edge, end: Edge) -> bool:
        """The same for batch norms of other models, through which the loss goes; whether there are any."""
        scales = [(node, scale_of_batch_norm(node)) for node in nodes_between(start, end)]
        found = [(node, scale.detach()) for node, scale in scales if scale is not None]
        for node, scale in found:
            node.register_hook(partial(self._cut_by, scale))
        return bool(found)

    @torch.no_grad()
    def _cut_by(self, scale: Tensor, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> Any:
        if not self.inside or not self.constant_statistics or inputs[0] is None or outputs[0] is None:
            return None
        shaped = scale.reshape(1, -1, *(1,) * (outputs[0].dim() - 2))
        return ((outputs[0] * shaped).to(inputs[0].dtype), *inputs[1:])

    def capture_of(self, f: Tensor, several: bool = False) -> tuple[Capture, Edge] | None:
        """See `GraphNotes.capture_of`."""
        unseen = self._depth > 0 and not self.due.isdisjoint(self.bare)  # bare parameters are looked for from the loss
        return self.notes.capture_of(f, self.mixed, several, unseen)


def _own_parameters(site: ParameterUse) -> bool:
    """Whether the module runs on the parameters we cover, not on others put in for one call (functional_call)."""
    own = parameters_of(site.module)
    return (site.weight is None or own.get(site.view.weight) is site.weight.param) and (
        site.bias is None or own.get(site.view.bias) is site.bias.param
    )


def _unknown(site: ParameterUse, unknown_uses: dict[Tensor, str]) -> bool:
    return site.bias is not None and site.bias.param in unknown_uses


def _owner(site: ParameterUse) -> int:
    """The id of the parameter that an inner layer is recognised by."""
    piece = site.weight or site.bias
    assert piece is not None
    return id(piece.param)


def _unnoted(param: Tensor, rows: slice | None, x: Tensor, out: Tensor, batch_first: Any) -> Tensor:
    return out


def _columns(batch_first: Callable[[Tensor], Tensor], columns: slice, gradient: Tensor) -> Tensor:
    return batch_first(gradient)[..., columns]


def _unnoted_call(param: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return out


def _unnoted_products(products: list[Product], out: Tensor) -> Tensor:
    return out
