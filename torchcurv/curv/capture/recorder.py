"""Record: which losses of which outputs are seen, and the curvature passes that they start.

What a forward pass did with the layers is noted in the graph (forward.py), and gathered here into a `Capture` at the
node of each output of the model. Backward: a pre-hook on the node of the loss (or of the output, for a loss known by
name) starts a curvature `Pass` from inside the user's backward call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from torchcurv.curv.approximations.kronecker import Kronecker
from torchcurv.curv.block.block import Curvature
from torchcurv.curv.capture.calls import Call, Capture
from torchcurv.curv.capture.forward import Forward
from torchcurv.curv.capture.hooks import Hook, argument, ignored
from torchcurv.curv.capture.signal_pass import Pass
from torchcurv.curv.graph import Edge, Frozen, age_of, edge_of, frozen, running_node, will_run
from torchcurv.curv.hessian.tape import Tape
from torchcurv.curv.kinds.base import SECOND, SENT
from torchcurv.curv.losses.loss import Loss
from torchcurv.curv.losses.table import loss_of
from torchcurv.curv.losses.terms import Terms
from torchcurv.curv.numerics import at_least_float32

ROWS = 16  # per row and column of a factor that is made of a part of the batch
TAPES = 8  # forward passes whose functions are kept until a backward comes


@dataclass
class Once:
    """The step in which a loss was last measured."""

    step: int = -1


def _accumulates(params: Iterable[Tensor]) -> bool:
    """Whether the backward call that is running adds into the `.grad` of any of these parameters."""
    for p in params:
        try:
            if p.requires_grad and will_run(get_gradient_edge(p).node):
                return True
        except RuntimeError:  # torch.autograd.grad with respect to the parameter itself
            return False
    return False


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
            if isinstance(loss_fn, str):
                loss.check_known_by_name()
        if output_fn is not None and not callable(output_fn):
            raise TypeError(f"output_fn={output_fn!r}; pass a function from the model's output to the tensor of logits")
        self.layers = list({id(layer): layer for block in blocks for layer in block.layers}.values())
        index = {id(layer): k for k, layer in enumerate(self.layers)}
        self.members = {block.name: [index[id(layer)] for layer in block.layers] for block in blocks}
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self.step, self.passes = 0, 0
        self.task = -1  # the backward call that the last pass belongs to
        self.summed: Tensor | float | None = None  # terms of the losses that are sums, in this step; None: no such loss
        self.part: tuple[Tensor, Tensor] | None = None  # the model's output for some samples, where our signals start
        self.cut: dict[Any, bool] = {}  # by the shapes of its arguments, whether the model runs on a part of them
        self.tapes: list[list[Any]] = []  # [forward pass, its tape, whether a pass has used it]
        # Blocks whose gradient was found to be that of their recorded calls, and whether of more than one sample.
        self.verified: dict[str, bool] = {}
        self.refused: set[str] = set()  # blocks whose gradient was not, under unsupported="gradient"
        self._checked = False
        self.forward = Forward(model, self.layers, self._gather)
        self._loss_hook: Hook | None = None
        self._loss_handle: Any = None
        if isinstance(loss_fn, nn.Module):
            self._loss_hook = Hook(self._on_loss_known)
            self._loss_handle = loss_fn.register_forward_hook(self._loss_hook, with_kwargs=True)
        self.set_due(block.name for block in blocks)

    def set_due(self, names: Iterable[str]) -> None:
        """Which blocks the next forward passes feed."""
        self.due = set(names) - self.refused
        self.forward.set_due({k for name in self.due for k in self.members[name]})
        second = [b.options.method for b in self.blocks if b.name in self.due and b.options.curv_type == SECOND]
        self.forward.taped, self.forward.twice = "propagate" in second, bool({"exact", "hutchinson"} & {*second})
        if self._loss_hook is not None:
            self._loss_hook.on = bool(self.due)

    def remove(self) -> None:
        """Take every hook away."""
        self.forward.remove()
        if self._loss_handle is not None:
            self._loss_handle.remove()
        self.set_due(())

    # ----------------------------------------------------------------------------------- forward

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

    def _gather(self, calls: list[tuple[Call, Edge]], output: Any) -> None:
        """One capture per output, of the calls that came before it: references only go down the graph."""
        forward, outputs = object(), self._outputs(output)
        if self.forward.tape is not None:
            self.tapes = [entry for entry in self.tapes if not entry[2]][1 - TAPES :]
            self.tapes.append([forward, self.forward.tape, False])
        numbered = [(age_of(edge.node), call, edge) for call, edge in calls]
        for out in outputs:
            edge = edge_of(out)
            last = age_of(edge.node)
            own: list[tuple[Call, Edge | None]] = []
            for number, call, at in numbered:
                if at[:2] == edge[:2]:
                    own.append((call, None))
                elif number < last:
                    own.append((call, at))
            capture = Capture(own, out.shape[0], out.shape, forward, mixed=self.forward.mixed)
            self.forward.at(edge).capture = capture
            if isinstance(self.loss_fn, str):
                hook = partial(self._on_output, capture, edge.number, edge.shape, frozen(out), Once())
                edge.node.register_prehook(hook)

    def _on_loss_known(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any) -> None:
        if ignored() or not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        f, target = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "target")
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
        if not self.due or ignored() or not output.requires_grad:
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
        """See `Forward.find`."""
        return self.forward.find(f)

    # ---------------------------------------------------------------------------------- backward

    def _fed(self, capture: Capture, once: Once) -> list[Curvature]:
        """The due blocks into whose gradients the running backward accumulates; none if they have this loss already.

        What was captured lives as long as the gradient: after step() or zero_grad() the same loss counts again.
        """
        if self.forward.inside or not self.due or not capture.n:
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

    def loss_scale(self) -> Any:
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
        loss, scale = self._loss(), self.loss_scale()
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
        edge = Edge(running_node(), number, shape)
        blocks = self._fed(capture, once) if grads[number] is not None else []
        if blocks:
            output = f.read()
            output_edge = output_edge or edge
            Pass(self, capture, blocks, loss, terms(output), edge, output, output_edge, self.loss_scale()).run(weight)

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
        edge, output = Edge(running_node(), number, shape), f.read()
        loss, scale = self._loss(), self.loss_scale()
        arrived = arriving.reshape(output.shape)
        terms = loss.terms_from_gradient(output, arrived, capture.n, scale)
        if not self._checked and not terms.empty:
            loss.check_arriving(output, arrived, terms)
            self._checked = True
        Pass(self, capture, blocks, loss, terms, edge, output, edge, scale, arriving).run(1.0)

    def count(self, loss: Loss, terms: Terms, blocks: list[Curvature], task: int) -> None:
        """Add up the terms of losses that are sums; those whose gradients are gone are forgotten."""
        if task != self.task and all(p.grad is None for block in blocks for p in block.params):
            self.summed = None
        self.task = task
        if loss.reduction == "sum":
            self.summed = terms.count if self.summed is None else self.summed + terms.count

    def positions(self, call: Call) -> int:
        """Samples times positions of one use of a layer."""
        g, o, _ = self.layers[call.layer].site_shape(call.site)
        return call.shape.numel() // (g * o)

    def samples_needed(self, f: Tensor) -> int:
        """How many samples of this output the K-FAC factors that are due can be made of, by a pass of our own, so that
        each has ROWS rows per row and column; all of them where there is no such pass, or other blocks are due."""
        found, n = self.find(f), len(f)
        blocks = [block for block in self.blocks if block.name in self.due]
        if found is None or not blocks or not all(b.kind in SENT and isinstance(b.approx, Kronecker) for b in blocks):
            return n
        positions: dict[int, int] = {}
        for call, _ in found[0].calls:
            positions[call.layer] = positions.get(call.layer, 0) + self.positions(call)
        positions = {k: count for k, count in positions.items() if count}
        layers = [k for block in blocks for k in self.members[block.name] if k in positions]
        return max((-(-ROWS * n * max(self.layers[k].shape[1:]) // positions[k]) for k in layers), default=n)

    def _loss(self) -> Loss:
        assert self.loss_fn is not None
        return loss_of(self.loss_fn, self.reduction, self.class_dim)

    def doubtful(self, block: Curvature, n: int) -> bool:
        """Whether the gradient of a block has still to be compared with that of its recorded calls.

        One sample alone does not show where samples meet. A use that is not known may not have mattered before.
        """
        separate = self.verified.get(block.name)
        if separate is None or (n > 1 and not separate):
            return True
        by_sample = any(site.by_sample for layer in block.layers for site in layer.sites)
        return not by_sample and not self.forward.unknown_uses.keys().isdisjoint(block.params)

    def refuse(self, block: Curvature, why: str) -> None:
        """The gradient of a block is not that of its recorded calls."""
        if self.unsupported == "error":
            raise RuntimeError(
                f'{why}. Put it into a group with approx=None, or pass unsupported="gradient" to train what is not '
                "supported with the plain gradient"
            )
        self.refused.add(block.name)
        block.forget_pending()
        self.set_due(self.due)

    def unexplained(self, block: Curvature, params: list[str]) -> str:
        uses = [self.forward.unknown_uses[p] for p in block.params if p in self.forward.unknown_uses]
        bare = f"; a bare parameter may be added to, or multiplied with, the batch, and torch.{', '.join(uses)} used it"
        return (
            f"the gradient of {', '.join(params)} is not the one that the recorded calls of the layer explain: the "
            "parameter is used elsewhere too (F.linear(x, layer.weight), a layer of another type that shares it), or "
            f"the layer does more to its output than a layer of its type{bare if uses else ''}"
        )

    def meeting(self, block: Curvature) -> str:
        names = ", ".join(self.names.get(p, block.name) for p in block.params)
        return (
            f"the gradient of {names} is not a sum over samples: what one sample of the output (its dimension 0) sends "
            "back arrives at another sample of the layer. Either the layer is called with another dimension first: "
            "put the batch first. Or the samples meet on the way: call optimizer.observe(output.unsqueeze(0), "
            "target.unsqueeze(0)) to take them as one"
        )

    def tape_of(self, capture: Capture) -> Tape:
        """The tape of the forward pass that a capture belongs to."""
        for entry in self.tapes:
            if entry[0] is capture.forward:
                entry[2] = True
                return entry[1]
        raise RuntimeError(
            "the Hessian is propagated through one call of the model: compute the loss from the model's output, and "
            "call backward() before the model runs again more than a few times"
        )

    def generator(self, device: torch.device) -> torch.Generator:
        """Draws that a resumed run repeats, and that leave the global generators alone."""
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        seed = hash((self.seed, self.step, self.passes, rank)) & (2**63 - 1)
        return torch.Generator(device).manual_seed(seed)

    def start_step(self, step: int, due: Iterable[str]) -> None:
        """What was captured lives as long as the gradient: a new step starts with nothing."""
        self.step, self.passes, self.tapes, self.summed = step, 0, [], None
        self.set_due(due)
        for block in self.blocks:
            block.forget_pending()


def _order(tensor: Tensor) -> int:
    """Grows with the time of the operation that made the tensor; -1 for a leaf."""
    return -1 if tensor.grad_fn is None else age_of(tensor.grad_fn)


def _count_loss(capture: Capture) -> None:
    for call, _ in capture.calls:
        call.losses += 1


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
