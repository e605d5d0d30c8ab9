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
from torchcurv.curv.capture.hooks import Hook, argument, is_inert, is_internal_forward
from torchcurv.curv.capture.inner_losses import InnerLosses
from torchcurv.curv.capture.rows import numbered
from torchcurv.curv.capture.signal_pass import CurvaturePass
from torchcurv.curv.capture.triggers import DerivativeTaken, InputsAlone, LossModule, NamedOutput, Observed, Trigger
from torchcurv.curv.capture.witness import OF_ANOTHER_OUTPUT, OutputWitness, with_signs
from torchcurv.curv.distributed import Ranks
from torchcurv.curv.graph import Edge, age_of, backward_id, drop_hooks, edge_of, frozen, tree_leaves, will_run
from torchcurv.curv.kinds.table import kind_of
from torchcurv.curv.losses.formula import LabelFactor
from torchcurv.curv.losses.joined import JoinedCall
from torchcurv.curv.losses.loss import Loss
from torchcurv.curv.losses.settings import LossSettings
from torchcurv.curv.losses.terms import Terms
from torchcurv.curv.numerics import on_cpu

# Rows per row and column of a factor that is made of a part of the batch: with k of them the eigenvalues of a sample
# covariance spread by 2 / sqrt(k), half of their size. With fewer the autoencoder of benchmarks/defaults.py, whose
# layers are wide, was slower than with all of its samples.
ROWS = 16

DERIVATIVES = (
    "a derivative of the model's output was taken with create_graph=True, and the curvature knows nothing of a loss "
    "made of it: train a differential equation, gradients to match or a gradient penalty by "
    "torchcurv.ResidualNewton(model).step(residuals). If the curvature of the other terms is enough, apply a loss "
    "module to the output, or observe it. If the derivative is no part of the loss, take it without create_graph"
)


class Recorder:
    """Hooks on a model and its loss that feed curvature blocks.

    blocks: what is fed; a block takes part in a forward pass while its name is in `due`.
    loss_fn, reduction, class_dim, output_fn, grad_scaler, loss_factor, negative: see `LossSettings`.
    loss_twins: copies of loss_fn that may be called in its place. before: the recorder that this one replaces.
    unsupported: "error" raises where a parameter is used in a way its layer does not explain; "gradient" stops
        feeding its block. ranks: who sees in which processes the model runs.

    part: the model's output for some samples, and which they are, where signals start that stand for all of them.
    cut: by the shapes of its arguments, whether the model runs on a part of them.
    summed: terms of the losses of this step that are sums; None: there is no such loss.
    derivatives: whether a derivative of an output was taken in this step that may be a part of the loss.
    without_terms: whether there was a loss in this step of which no term counts.
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
        loss_factor: Any = 1.0,
        negative: str = "error",
        loss_twins: tuple[nn.Module, ...] = (),
        seed: int = 0,
        unsupported: str = "error",
        before: Recorder | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.settings = LossSettings(loss_fn, reduction, class_dim, output_fn, grad_scaler, loss_factor, negative)
        self.blocks, self.loss_fn = blocks, loss_fn
        self.context = PassContext(model, blocks, self._gather, seed, unsupported)
        self.forward = self.context.forward
        self.ranks = self.forward.ranks = self.forward.ranks if ranks is None else ranks
        self.part: tuple[Tensor, Tensor] | None = None
        self.cut: dict[Any, bool] = {}
        self.summed: Tensor | float | None = None
        self.derivatives = self.without_terms = False
        self._lossless = self._alone = False  # whether blocks are due that no loss concerns, and no others
        self._task = -1  # the backward call that the last loss belongs to
        self._inner = InnerLosses(self) if self.settings.named else None
        if self._inner is not None and before is not None and before._inner is not None:
            self._inner.watching = before._inner.watching
        self._loss_hook: Hook | None = None
        self._join_hook: Hook | None = None
        self._joined: tuple[JoinedCall, Tensor] | None = None  # the call of a loss that runs, and what it is one of
        self._loss_handles: list[Any] = []
        for module in (loss_fn, *loss_twins):
            if isinstance(module, nn.Module):
                drop_hooks(module, is_inert)
                self._loss_hook = self._loss_hook or Hook(self._on_loss_module)
                if self.settings.loss(module).formula.joint:
                    self._join_hook = self._join_hook or Hook(self._before_loss_module)
                    self._loss_handles.append(module.register_forward_pre_hook(self._join_hook, with_kwargs=True))
                self._loss_handles.append(module.register_forward_hook(self._loss_hook, with_kwargs=True))
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
        needs_loss = [kind_of(b.kind, b.options).needs_loss for b in self.blocks if b.name in context.due]
        self._lossless, self._alone = not all(needs_loss), not any(needs_loss)
        if self._inner is not None:
            self._inner.begin(forward)
        forward.taped = any(kind.needs_tape for kind in kinds)
        forward.twice = any(kind.needs_double_backward for kind in kinds)
        for hook in (self._loss_hook, self._join_hook):
            if hook is not None:
                hook.on = bool(context.due)

    def begin_step(self, step: int, due: Iterable[str]) -> None:
        """What was captured lives as long as the gradient: a new step starts with nothing."""
        self.context.step, self.context.passes, self.summed = step, 0, None
        self.derivatives = self.without_terms = False
        self.context.tapes.clear()
        self.set_due(due)
        for block in self.blocks:
            block.pending.forget()

    def remove(self) -> None:
        """Take every hook away."""
        self.forward.remove()
        for handle in self._loss_handles:
            handle.remove()
        self.set_due(())

    def capture_of(self, f: Tensor) -> tuple[Capture, Edge] | None:
        """See `GraphNotes.capture_of`."""
        return self.forward.capture_of(f)

    # ----------------------------------------------------------------------------------- forward

    def _gather(self, calls: list[tuple[Call, Edge]], output: Any) -> None:
        """One capture per output, of the calls that came before it: references only go down the graph."""
        inner = self._inner is not None and self._inner.ended(self.forward, output)
        forward, outputs = object(), self.settings.outputs(output, every=self._alone or inner)
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
            edge.node.register_prehook(DerivativeTaken(self, capture))
            if isinstance(self.loss_fn, nn.Module) and not self._alone:
                self._witness(capture, edge)
            if self._lossless:
                InputsAlone(self, capture, edge.number, edge.shape, frozen(out)).arm(edge.node)
            if self.settings.named and not self._alone and not inner:
                NamedOutput(self, capture, edge.number, edge.shape, frozen(out)).arm(edge.node)

    def _witness(self, capture: Capture, edge: Edge) -> None:
        """Compare what arrives at an output with what the watched losses send there."""
        capture.witness = OutputWitness(self, edge.number, frozenset(call.layer for call, _ in capture.calls))
        edge.node.register_prehook(capture.witness)

    @property
    def unseen(self) -> bool:
        """Whether the model may have computed its loss in a pass in which this was not watched."""
        return self._inner is not None and self._inner.unseen

    @property
    def inside(self) -> bool:
        """Whether a pass of our own runs."""
        return self.forward.inside

    def unexplained(self, layers: frozenset[int], gradient: Tensor) -> None:
        """The loss depends on an output whose loss is not watched."""
        for block in self.blocks if self.due else ():
            own = block.name in self.due and not layers.isdisjoint(self.context.layers_of(block))
            if own and kind_of(block.kind, block.options).needs_loss and _accumulates(block.params):
                block.pending.doubt_if((gradient != 0).any(), OF_ANOTHER_OUTPUT)

    def _before_loss_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Of a loss that is not known and is given more than (output, target), the outputs become one tensor."""
        self._joined = None
        if is_internal_forward():
            return None
        outputs = [x for x in tree_leaves((args, kwargs)) if self._is_output(x)]
        pair = len(args) == 2 and not kwargs and len(outputs) == 1 and outputs[0] is args[0]
        if not outputs or (pair and isinstance(args[1], Tensor)):
            return None
        found = self.capture_of(outputs[0])
        assert found is not None
        call = JoinedCall(module, args, kwargs, self._is_output, found[0].n)
        z = call.join()
        self._joined = call, z
        return call.arguments(z)

    def _is_output(self, x: Any) -> bool:
        """Whether it depends on the model."""
        return isinstance(x, Tensor) and x.grad_fn is not None and self.capture_of(x) is not None

    def _on_loss_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any) -> None:
        joined, self._joined = self._joined, None
        if is_internal_forward() or not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        called: Any = module
        f, target = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "target")
        if joined is not None:
            called, f = joined
            target = called.samples
        if isinstance(target, Tensor) and target.grad_fn is not None and self.capture_of(target) is not None:
            raise ValueError(
                "the second argument of the loss, the target, depends on the model: call loss(output, target) in "
                "this order and detach the target, or call optimizer.observe for what the loss is a function of"
            )
        found = None
        if isinstance(f, Tensor) and f.grad_fn is not None:
            found = self.forward.capture_of(f, several=joined is not None)
        if found is None:
            return
        capture, output_edge = found
        capture.count_loss()
        if capture.witness is None:
            self._witness(capture, output_edge)
        for part in capture.parts:
            if part.witness is not None:
                part.witness.covered = True
        edge = edge_of(loss)
        LossModule(self, capture, edge.number, called, output_edge, f, target).arm(edge.node)

    def observe(
        self,
        output: Tensor,
        target: Tensor,
        loss_fn: nn.Module | str | None,
        weight: float | Tensor,
        samples: Tensor | str | None = None,
    ) -> None:
        """Note the loss of one output; its pass starts when the backward reaches that output."""
        loss = self.settings.observed(loss_fn)
        if not isinstance(output, Tensor) or not output.dim():
            raise ValueError(
                "observe(output, target) takes the tensor that the loss is applied to, [batch, ...]; got "
                f"{'the loss, a number' if isinstance(output, Tensor) else f'a {type(output).__name__}'}"
            )
        if isinstance(samples, str):
            loss, samples = loss.of_whole(samples), None
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
        terms = partial(loss.terms, target=target, n=1 if loss.whole else capture.batch_of(output))
        samples = None if samples is None else numbered(samples, loss.rows(output))
        trigger = Observed(self, capture, edge.number, edge.shape, frozen(output), below, loss, terms, weight, samples)
        trigger.arm(edge.node)

    # ---------------------------------------------------------------------------------- backward

    def fed_by(self, trigger: Trigger) -> list[Curvature]:
        """The due blocks into whose gradients the running backward accumulates: a loss counts as often as it does."""
        context, capture = self.context, trigger.capture
        if self.forward.inside or not self.due or not capture.n:
            return []
        layers = {call.layer for call, _ in capture.calls} | self.forward.bare
        due = [block for block in self.blocks if block.name in self.due]
        due = [block for block in due if kind_of(block.kind, block.options).needs_loss == trigger.of_a_loss]
        reached = [block for block in due if not layers.isdisjoint(context.layers_of(block))]
        blocks = [block for block in reached if _accumulates(block.params)]
        return blocks

    def derivative_taken(self, capture: Capture) -> None:
        """Note it, unless a pass of our own takes it, or it is what is accumulated."""
        params = [p for block in self.blocks for p in block.params]
        if not self.forward.inside and not _accumulates(params):
            self.derivatives = True
            for call, _ in capture.calls:
                call.differentiated = True

    def check_named(self, loss: Loss, f: Tensor, arriving: Tensor, terms: Terms, found: LabelFactor | None) -> None:
        """Raise if what arrives at f cannot be the gradient of the loss that is known by its name.

        found: what it says of labels. On an accelerator, where asking is a host sync, the first pass asks alone.
        """
        check = self.context.check
        if (check.name_fits and not on_cpu(f)) or terms.empty:
            return
        if found is None or (bool(found.known) and not bool(found.fits)):
            loss.check_arriving(f, arriving, terms, None if check.hard_labels is False else found)
        if found is not None and bool(found.known & ~found.alone):
            check.hard_labels = bool(found.fits)
        check.name_fits = True

    @property
    def hard_labels(self) -> bool:
        """Whether a loss known by its name has shown to be one of labels."""
        return self.context.check.hard_labels is True

    def measure(self, event: LossEvent, blocks: list[Curvature]) -> None:
        """Feed the blocks by one loss."""
        if event.terms.empty:
            self.without_terms = True
            return
        for block in blocks:
            block.pending.begin(backward_id(), block.params)
        event = with_signs(event, self.settings.negative, blocks)
        if event.f_edge[:2] != event.output_edge[:2] and self.forward.cut_between(event.f_edge, event.output_edge):
            event.capture.mixed = True
        self._count(event, blocks)
        excluded = len(self.context.check.excluded)
        # a module or `observe` may be given one term of several; a name stands for all of the loss
        if event.capture.differentiated and (self.settings.named or event.capture.forward is None):
            for block in self.blocks:  # a derivative depends on weights whose calls it does not pass
                self.context.check.exclude(block, DERIVATIVES)
        else:
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
