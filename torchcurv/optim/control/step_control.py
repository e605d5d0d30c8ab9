"""Step control: a step rule times a damping rule, with the loss of the batch where they need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchcurv.optim.control.damping_rules import DAMPING_RULES
from torchcurv.optim.control.quadratic_model import Evaluation, Vector
from torchcurv.optim.control.step_rules import STEP_RULES, Descent
from torchcurv.optim.engine.companion import Companion, Group
from torchcurv.optim.update import norm_of


class StepControl(Companion):
    """How SecondOrderOptimizer moves: `settings` of the optimizer name the two rules and their numbers."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.settings: dict[str, Any] = optimizer.settings
        self.step_rule = STEP_RULES[self.settings["step_rule"]]()
        self.damping_rule = DAMPING_RULES[self.settings["damping_rule"]]()
        self.rejected = False  # whether the last step was
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
        self._checked = self.damping_rule.steps_to_check(self.settings, step, self.rejected)
        self.optimizer.zero_grad()
        products = (self.step_rule.needs_closure and not engine.warming_up) or self._checked > 0
        self._evaluation = Evaluation(
            self.optimizer.model, closure, self.settings["model_samples"], products, engine.step, engine.recorder.cut
        )
        self._backward(self._evaluation)
        return self._evaluation.loss.detach()

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
        before = {p: p.detach().clone() for p in gradients} if self._checked else {}
        self.step_rule.move(self.optimizer, evaluation, gradients, solved)
        if not self._checked:
            return
        assert evaluation is not None
        try:
            self.rejected = self.damping_rule.adapt(self.optimizer, evaluation, before, self._checked)
        except Exception:
            self._reject(before)
            raise
        if self.rejected:
            first = self.optimizer.state[next(iter(before))]
            first["rejected_steps"] = first.get("rejected_steps", 0) + 1
            self._reject(before)

    def _reject(self, before: Vector) -> None:
        """Undo the step; the momentum starts again."""
        self.optimizer.companion(Descent).last = []
        for p, x in before.items():
            p.copy_(x)
            if "momentum_buffer" in self.optimizer.state[p]:
                self.optimizer.state[p]["momentum_buffer"].zero_()

    # ------------------------------------------------------------------------------- as a companion

    def save(self, state: dict[str, Any], p: Tensor, group: Group) -> None:
        if self.damping_rule.needs_closure:
            state.setdefault("rejected_steps", 0)
            state["taken_back"] = self.rejected

    def loaded(self, state: dict[Any, dict[str, Any]]) -> None:
        self.rejected = any(own.get("taken_back") for own in state.values())

    def known(self) -> dict[str, Tensor]:
        groups, found = self.optimizer.param_groups, {}
        terms = [norm_of(g["params"]).square() * g["l2"] / 2 for g in groups if g["l2"] and g["params"]]
        if terms:
            found["l2_loss"] = torch.stack(terms).sum()
        if self.damping_rule.needs_closure:
            count = sum(state.get("rejected_steps", 0) for state in self.optimizer.state.values())
            found["rejected_steps"] = torch.tensor(float(count))
        return found
