"""Step control: a step rule times a damping rule, with the loss of the batch where they need it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.numerics import on_cpu
from torchcurv.optim.control.damping_rules import DAMPING_RULES
from torchcurv.optim.control.quadratic_model import Evaluation, Vector
from torchcurv.optim.control.step_rules import STEP_RULES, Descent
from torchcurv.optim.engine.companion import Companion, Group
from torchcurv.optim.update import norm_of

# A loss that is so many times the mean of about the last five is far above them: batches of one run differ by less
# while it goes well. The values are a choice; what they cost where nothing is wrong is a forward pass.
LOSS_JUMP, LOSS_MEMORY = 2.0, 5.0


class StepControl(Companion):
    """How SecondOrderOptimizer moves: `settings` of the optimizer name the two rules and their numbers."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.settings: dict[str, Any] = optimizer.settings
        self.step_rule = STEP_RULES[self.settings["step_rule"]]()
        self.damping_rule = DAMPING_RULES[self.settings["damping_rule"]]()
        self.rejected = False  # whether the last step was
        self.jumped = False  # whether the loss of this step is far above those of the steps before
        self.harmed = False  # whether the last step made the loss of the batch of this one larger
        self._mean_loss: float | None = None
        self._previous: Vector = {}  # the parameters before the last step, where a jump of the loss may reject it
        self._evaluation: Evaluation | None = None
        self._checked = 0

    @property
    def needs_closure(self) -> bool:
        """Whether a step needs more than gradients."""
        return self.step_rule.needs_closure or self.damping_rule.needs_closure

    # --------------------------------------------------------------------------------- before the step

    def evaluate(self, closure: Callable[[], Any] | None) -> Tensor:
        """The loss of the batch, with its gradients in `.grad`."""
        if closure is None:
            raise ValueError(
                'step_rule="quadratic" and damping_rule="lm" need the loss at other points: call step(closure) with a '
                "closure that returns the loss, or (loss, output), without calling backward()"
            )
        engine = self.optimizer.engine
        step = engine.step - engine.warmup
        self._checked = self.damping_rule.steps_to_check(self.settings, step, self.rejected or self.harmed)
        self.optimizer.zero_grad()
        products = (self.step_rule.needs_closure and not engine.warming_up) or self._checked > 0
        self._evaluation = self._evaluated(closure, products)
        if products and self.damping_rule.needs_closure and on_cpu(self._evaluation.loss):
            self._look_at(float(self._evaluation.value), step)
            if self.jumped:
                self._evaluation = self._compared(self._evaluation, closure, products)
        self.harmed = bool(self._checked and self._previous) and self._harm_of_last_step(self._evaluation)
        self._backward(self._evaluation)
        return self._evaluation.loss.detach()

    def _harm_of_last_step(self, evaluation: Evaluation) -> bool:
        """Whether this batch has a larger loss after the last step than before. Reads numbers.

        It was not made for this batch, so that it says what the ratio of its own batch cannot: that a small batch was
        fitted, and not the problem. Of one batch for all steps the answer is that of the ratio.
        """
        now = {p: p.data for p in self._previous}  # the graph of the loss needs what is there as it is
        try:
            for p, x in self._previous.items():
                p.data = x
            before = evaluation.loss_now()
        finally:
            for p, data in now.items():
                p.data = data
        noise = before.abs() * (8 * torch.finfo(before.dtype).eps)
        return not bool(evaluation.value <= before + noise)

    def _compared(self, evaluation: Evaluation, closure: Callable[[], Any], products: bool) -> Evaluation:
        """Where the last step has done harm to this batch it is rejected, and the batch evaluated where that began;
        else the batch is a hard one."""
        loss, now, previous = float(evaluation.value), {p: p.detach().clone() for p in self._previous}, self._previous
        for p, x in previous.items():
            p.copy_(x)
        before = self._evaluated(closure, products)
        self._previous = {}
        if previous and not loss <= LOSS_JUMP * float(before.value):
            self._count_rejected()
            self._forget_momentum(previous)
            return before
        self.jumped = False
        for p, x in now.items():
            p.copy_(x)
        return self._evaluated(closure, products)

    def _evaluated(self, closure: Callable[[], Any], products: bool) -> Evaluation:
        engine = self.optimizer.engine
        samples = self.settings["model_samples"]
        return Evaluation(
            self.optimizer.model, closure, samples, products, engine.step, engine.recorder.cut, engine.ranks
        )

    def _look_at(self, loss: float, step: int) -> None:
        """Check this step, whenever the next check was due, if its loss is far above those of the steps before: other
        batches have been fitted, not the problem, and the last step is rejected. On an accelerator, where reading the
        loss is a host sync, the intervals are kept."""
        mean = self._mean_loss
        self.jumped = mean is not None and not loss <= LOSS_JUMP * mean
        if self.jumped and step >= 0:
            self._checked = self._checked or 1
        if math.isfinite(loss):
            self._mean_loss = loss if mean is None else mean + (loss - mean) / LOSS_MEMORY

    def _backward(self, evaluation: Evaluation) -> None:
        """Gradients of the batch; curvature of a part of it where that is enough and half of it or less."""
        recorder = self.optimizer.engine.recorder
        if evaluation.part is not None:
            needed = recorder.samples_needed(evaluation.output)
            if needed <= len(evaluation.output) // 2:
                samples = evaluation.drawn(needed)
                with torch.enable_grad():
                    recorder.part = evaluation.output_of(samples), samples
        try:
            evaluation.backward(measured=bool(recorder.due))
        finally:
            recorder.part = None

    # --------------------------------------------------------------------------------------- the step

    def move(self, gradients: Vector, solved: Vector) -> None:
        """Change the parameters, and after a step that is checked the damping; a step that is rejected is undone."""
        self.optimizer.companion(Descent).last = []
        evaluation, self._evaluation = self._evaluation, None
        kept = self._checked or self._mean_loss is not None
        before = self._previous = {p: p.detach().clone() for p in gradients} if kept else {}
        self.step_rule.move(self.optimizer, evaluation, gradients, solved)
        if not self._checked:
            return
        assert evaluation is not None
        try:
            self.rejected = self.damping_rule.adapt(
                self.optimizer, evaluation, before, self._checked, self.jumped, self.harmed
            )
        except Exception:
            self._reject(before)
            raise
        if self.rejected:
            self._count_rejected()
            self._reject(before)

    def _count_rejected(self) -> None:
        first = self.optimizer.state[next(self.optimizer.engine.params())]
        first["rejected_steps"] = first.get("rejected_steps", 0) + 1

    def _reject(self, before: Vector) -> None:
        """Undo the step; the momentum starts again."""
        for p, x in before.items():
            p.copy_(x)
        self._forget_momentum(before)

    def _forget_momentum(self, params: Iterable[Tensor]) -> None:
        self.optimizer.companion(Descent).last = []
        for p in params:
            if "momentum_buffer" in self.optimizer.state[p]:
                self.optimizer.state[p]["momentum_buffer"].zero_()

    # ------------------------------------------------------------------------------- as a companion

    def save(self, state: dict[str, Any], p: Tensor, group: Group) -> None:
        if self.damping_rule.needs_closure:
            state.setdefault("rejected_steps", 0)
            state["taken_back"], state["did_harm"] = self.rejected, self.harmed
            held = self._previous.get(p)
            state["previous"] = p.detach().clone() if held is None else held
            state["mean_loss"] = math.nan if self._mean_loss is None else self._mean_loss

    def loaded(self, state: dict[Any, dict[str, Any]]) -> None:
        self.rejected = any(own.get("taken_back") for own in state.values())
        self.harmed = any(own.get("did_harm") for own in state.values())
        self._previous = {p: own["previous"] for p, own in state.items() if "previous" in own}
        mean = next((own["mean_loss"] for own in state.values() if "mean_loss" in own), math.nan)
        self._mean_loss = None if math.isnan(mean) else mean

    def known(self) -> dict[str, Tensor]:
        groups, found = self.optimizer.param_groups, {}
        terms = [norm_of(g["params"]).square() * g["l2"] / 2 for g in groups if g["l2"] and g["params"]]
        if terms:
            found["l2_loss"] = torch.stack(terms).sum()
        if self.damping_rule.needs_closure:
            count = sum(state.get("rejected_steps", 0) for state in self.optimizer.state.values())
            found["rejected_steps"] = torch.tensor(float(count))
        return found
