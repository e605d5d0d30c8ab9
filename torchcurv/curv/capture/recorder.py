"""The recorder: which losses of which outputs are seen, and the curvature passes that they start.

What a forward pass did with the layers is noted in the graph (forward.py), and gathered here into a `Capture` at the
node of each output of the model. Backward: a trigger at the node of the loss (or of the output, for a loss known by
name) starts a `CurvaturePass` from inside the user's backward call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.capture.calls import Call, Capture
from torchcurv.curv.capture.context import LossEvent, PassContext
from torchcurv.curv.capture.hooks import Hook, argument, is_internal_forward
from torchcurv.curv.capture.loss_settings import LossSettings
from torchcurv.curv.capture.rows import numbered
from torchcurv.curv.capture.signal_pass import CurvaturePass
from torchcurv.curv.capture.triggers import LossModule, NamedOutput, Observed, Trigger
from torchcurv.curv.graph import Edge, age_of, backward_id, edge_of, frozen, will_run
from torchcurv.curv.kinds.table import kind_of
from torchcurv.curv.losses.loss import Loss
from torchcurv.curv.losses.terms import Terms

ROWS = 16  # per row and column of a factor that is made of a part of the batch


class Recorder:
    """Hooks on a model and its loss that feed curvature blocks.

    blocks: what is fed; a block takes part in a forward pass while its name is in `due`.
    loss_fn, reduction, class_dim, output_fn, grad_scaler: see `LossSettings`.
    unsupported: "error" raises where a parameter is used in a way its layer does not explain; "gradient" stops
        feeding its block.

    part: the model's output for some samples, and which they are, where signals start that stand for all of them.
    cut: by the shapes of its arguments, whether the model runs on a part of them.
    summed: terms of the losses of this step that are sums; None: there is no such loss.
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
        self.settings = LossSettings(loss_fn, reduction, class_dim, output_fn, grad_scaler)
        self.blocks, self.loss_fn = blocks, loss_fn
        self.context = PassContext(model, blocks, self._gather, seed, unsupported)
        self.forward = self.context.forward
        self.part: tuple[Tensor, Tensor] | None = None
        self.cut: dict[Any, bool] = {}
        self.summed: Tensor | float | None = None
        self._task = -1  # the backward call that the last loss belongs to
        self._loss_hook: Hook | None = None
        self._loss_handle: Any = None
        if isinstance(loss_fn, nn.Module):
            self._loss_hook = Hook(self._on_loss_module)
            self._loss_handle = loss_fn.register_forward_hook(self._loss_hook, with_kwargs=True)
        self.set_due(block.name for block in blocks)

    @property
    def due(self) -> set[str]:
        """Names of the blocks that the next passes feed."""
        return self.context.due

    def set_due(self, names: Iterable[str]) -> None:
        """Which blocks the next forward passes feed."""
        context, forward = self.context, self.forward
        context.due = set(names) - context.check.excluded
        forward.set_due({k for name in context.due for k in context.members[name]})
        kinds = [context.kind_of(block) for block in self.blocks if block.name in context.due]
        forward.taped = any(kind.needs_tape for kind in kinds)
        forward.twice = any(kind.needs_double_backward for kind in kinds)
        if self._loss_hook is not None:
            self._loss_hook.on = bool(context.due)

    def begin_step(self, step: int, due: Iterable[str]) -> None:
        """What was captured lives as long as the gradient: a new step starts with nothing."""
        self.context.step, self.context.passes, self.summed = step, 0, None
        self.context.tapes.clear()
        self.set_due(due)
        for block in self.blocks:
            block.forget_pending()

    def remove(self) -> None:
        """Take every hook away."""
        self.forward.remove()
        if self._loss_handle is not None:
            self._loss_handle.remove()
        self.set_due(())

    def loss_scale(self) -> Any:
        """See `LossSettings.scale`."""
        return self.settings.scale()

    def capture_of(self, f: Tensor) -> tuple[Capture, Edge] | None:
        """See `GraphNotes.capture_of`."""
        return self.forward.capture_of(f)

    # ----------------------------------------------------------------------------------- forward

    def _gather(self, calls: list[tuple[Call, Edge]], output: Any) -> None:
        """One capture per output, of the calls that came before it: references only go down the graph."""
        forward, outputs = object(), self.settings.outputs(output)
        if self.forward.tape is not None:
            self.context.tapes.keep(forward, self.forward.tape)
        numbered = [(age_of(edge.node), call, edge) for call, edge in calls]
        for out in outputs:
            if not out.dim() and any(call.batch > 1 for call, _ in calls):
                continue  # not the output of one sample, but a loss that the model computed
            edge = edge_of(out)
            last = age_of(edge.node)
            own: list[tuple[Call, Edge | None]] = []
            for number, call, at in numbered:
                if at[:2] == edge[:2]:
                    own.append((call, None))
                elif number < last:
                    own.append((call, at))
            capture = Capture(own, out.shape[:1].numel(), out.shape, forward, mixed=self.forward.mixed)
            self.forward.notes.at(edge).capture = capture
            if self.settings.named:
                NamedOutput(self, capture, edge.number, edge.shape, frozen(out)).arm(edge.node)

    def _on_loss_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any) -> None:
        if is_internal_forward() or not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        f, target = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "target")
        if isinstance(target, Tensor) and target.grad_fn is not None and self.capture_of(target) is not None:
            raise ValueError(
                "the second argument of the loss, the target, depends on the model: call loss(output, target) in "
                "this order and detach the target, or call optimizer.observe for what the loss is a function of"
            )
        found = self.capture_of(f) if isinstance(f, Tensor) and f.grad_fn is not None else None
        if found is None:
            return
        found[0].count_loss()
        edge = edge_of(loss)
        LossModule(self, found[0], edge.number, found[1], f, target).arm(edge.node)

    def observe(
        self,
        output: Tensor,
        target: Tensor,
        loss_fn: nn.Module | str | None,
        weight: float | Tensor,
        samples: Tensor | None = None,
    ) -> None:
        """Note the loss of one output; its pass starts when the backward reaches that output."""
        loss = self.settings.observed(loss_fn)
        if not isinstance(output, Tensor) or not output.dim():
            raise ValueError(
                "observe(output, target) takes the tensor that the loss is applied to, [batch, ...]; got "
                f"{'the loss, a number' if isinstance(output, Tensor) else f'a {type(output).__name__}'}"
            )
        if not self.due or is_internal_forward() or not output.requires_grad:
            return
        found = self.capture_of(output)
        if found is None:
            raise ValueError(
                "observe: this output does not come from a forward pass of the model that was recorded; observe "
                "the output of the model itself, before backward()"
            )
        capture, output_edge = found
        capture.deal()
        capture.count_loss()
        edge = edge_of(output)
        below = None if edge[:2] == output_edge[:2] else output_edge  # a node must not refer to itself
        terms = partial(loss.terms, target=target, n=capture.batch_of(output))
        samples = None if samples is None else numbered(samples, loss.rows(output))
        trigger = Observed(self, capture, edge.number, edge.shape, frozen(output), below, loss, terms, weight, samples)
        trigger.arm(edge.node)

    # ---------------------------------------------------------------------------------- backward

    def fed_by(self, trigger: Trigger) -> list[Curvature]:
        """The due blocks into whose gradients the running backward accumulates; none if they have this loss already.

        What was captured lives as long as the gradient: after step() or zero_grad() the same loss counts again.
        """
        context, capture = self.context, trigger.capture
        if self.forward.inside or not self.due or not capture.n:
            return []
        layers = {call.layer for call, _ in capture.calls}
        due = [block for block in self.blocks if block.name in self.due]
        reached = [block for block in due if not layers.isdisjoint(context.layers_of(block))]
        blocks = [block for block in reached if _accumulates(block.params)]
        held = any(block.captured and any(p.grad is not None for p in block.params) for block in blocks)
        if trigger.measured_in == context.step and held:
            return []
        trigger.measured_in = context.step
        return blocks

    def check_named(self, loss: Loss, f: Tensor, arriving: Tensor, terms: Terms) -> None:
        """Raise if what arrives at f cannot be the gradient of the loss that is known by its name; first use only."""
        check = self.context.check
        if not check.name_fits and not terms.empty:
            loss.check_arriving(f, arriving, terms)
            check.name_fits = True

    def measure(self, event: LossEvent, blocks: list[Curvature]) -> None:
        """Feed the blocks by one loss."""
        if event.terms.empty:
            return
        self._count(event, blocks)
        excluded = len(self.context.check.excluded)
        CurvaturePass(self.context, event, blocks, self._part_of(event)).run()
        if len(self.context.check.excluded) > excluded:
            self.set_due(self.due)

    def _part_of(self, event: LossEvent) -> LossEvent | None:
        """The same loss of the samples whose signals stand for all; None: there is no such part."""
        if self.part is None or event.f_edge[:2] != event.output_edge[:2]:
            return None
        output, samples = self.part
        found = self.capture_of(output)
        assert found is not None
        capture, edge = found
        f = output.detach().reshape(-1, *event.f.shape[1:])  # the loss may have been given the output's rows, flattened
        batch_fraction = capture.n / len(event.terms.f)
        return LossEvent(event.loss, event.terms.of(samples), event.factor / batch_fraction, f, edge, capture, edge)

    def _count(self, event: LossEvent, blocks: list[Curvature]) -> None:
        """Add up the terms of losses that are sums; those whose gradients are gone are forgotten."""
        task = backward_id()
        if task != self._task and all(p.grad is None for block in blocks for p in block.params):
            self.summed = None
        self._task = task
        if event.loss.reduction == "sum":
            self.summed = event.terms.count if self.summed is None else self.summed + event.terms.count

    def samples_needed(self, f: Tensor) -> int:
        """How many samples of this output the K-FAC factors that are due can be made of, by a pass of our own, so that
        each has ROWS rows per row and column; all of them where there is no such pass, or other blocks are due."""
        context, found, n = self.context, self.capture_of(f), len(f)
        blocks = [block for block in self.blocks if block.name in self.due]
        if found is None or not blocks or not all(map(self._subsampled, blocks)):
            return n
        positions: dict[int, int] = {}
        for call, _ in found[0].calls:
            positions[call.layer] = positions.get(call.layer, 0) + call.positions(context.layers[call.layer])
        layers = [k for block in blocks for k in context.layers_of(block) if positions.get(k)]
        return max((-(-ROWS * n * max(context.layers[k].shape[1:]) // positions[k]) for k in layers), default=n)

    def _subsampled(self, block: Curvature) -> bool:
        """Whether some of the samples may stand for all."""
        return kind_of(block.kind, block.options).subsamples and block.approx.subsampled


def _accumulates(params: Iterable[Tensor]) -> bool:
    """Whether the backward call that is running adds into the `.grad` of any of these parameters."""
    for p in params:
        try:
            if p.requires_grad and will_run(get_gradient_edge(p).node):
                return True
        except RuntimeError:  # torch.autograd.grad with respect to the parameter itself
            return False
    return False
