"""Step rules: from gradients and preconditioned gradients to the change of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchcurv.optim.control.kl_clip import kl_clip
from torchcurv.optim.control.quadratic_model import Evaluation, Vector
from torchcurv.optim.engine.companion import Companion, Group, buffer_of
from torchcurv.optim.engine.damping import is_of_the_loss
from torchcurv.optim.update import descend_, dot, momentum_, norm_of, normalise_, scale_within, trust_ratio

# The least share of a relative damping that counts in a model of a loss which curves less than its running average. It
# keeps the model bounded below where the loss is nearly linear along V. The value is a choice, not a measurement.
MIN_CURVATURE_RATIO = 0.01
# Relative to the diagonal of the 2 x 2 system. J d in float32 is wrong by about 1e-6 of its norm (ten roundings), so
# that a determinant smaller than that is none.
RIDGE = 1e-6

# The largest β of a quadratic model. A quadratic whose steps go on in one direction wants β near 1; a tenth more lets
# them grow, by half at the most between two checks of ρ five steps apart.
MOST_MOMENTUM = 1.1

State = Any  # of an optimizer: by parameter, a dict


class Descent(Companion):
    """p <- (1 - lr decay) p - lr step, and how long that was."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.last: list[tuple[float | Tensor, list[Tensor]]] = []  # (lr, steps or their norm) of the last step

    def __call__(self, group: Group, params: list[Tensor], steps: list[Tensor]) -> None:
        lr, state = group["lr"], self.optimizer.state
        descend_(params, steps, lr, group["weight_decay"])
        if group["normalize_weights"]:
            normalise_(params)
        # momentum buffers are there to be looked at later, what is not kept is measured now
        kept = all(x is state[p].get("momentum_buffer") for p, x in zip(params, steps, strict=True))
        if params:
            self.last.append((lr.clone() if isinstance(lr, Tensor) else lr, steps if kept else [norm_of(steps)]))

    def loaded(self, state: State) -> None:
        self.last = []

    def known(self) -> dict[str, Tensor]:
        if not self.last:  # nothing has moved: no step, or one that was rejected
            return {"step_norm": torch.zeros(())}
        return {"step_norm": torch.stack([norm_of(steps) * lr for lr, steps in self.last]).norm()}


def with_momentum(state: State, group: Group, params: list[Tensor], steps: list[Tensor]) -> list[Tensor]:
    """The steps averaged by the momentum of the group."""
    if not group["momentum"]:
        return steps
    return momentum_([buffer_of(state[p], p) for p in params], steps, group["momentum"], group["nesterov"])


class FixedStep:
    """p <- p - lr m, m the momentum of ν V: as long as the learning rate says."""

    needs_closure = False

    def move(self, optimizer: Any, evaluation: Evaluation | None, gradients: Vector, solved: Vector) -> None:
        descent, state = optimizer.companion(Descent), optimizer.state
        known = kl_clip(optimizer.param_groups, gradients, solved, optimizer.settings["kl_clip"])
        optimizer.noted.update(known)
        for group in optimizer.param_groups:
            clip = known.get("clip") if is_of_the_loss(group) else None
            params = [p for p in group["params"] if p in gradients]
            buffered = group["momentum"] and group["momentum_type"] == "preconditioned"
            alone = buffered and not group["nesterov"] and not group["trust_ratio"]
            if alone and clip is not None and all(p in solved for p in params):
                for p in params:  # ν goes into the sum, which saves a pass over the steps
                    buffer_of(state[p], p).mul_(group["momentum"]).addcmul_(solved[p], clip)
                descent(group, params, [state[p]["momentum_buffer"] for p in params])
                continue
            steps = [solved[p] if p in solved else gradients[p] for p in params]
            if clip is not None:
                steps = [x * clip if p in solved else x for p, x in zip(params, steps, strict=True)]
            if group["trust_ratio"]:
                steps = [x * trust_ratio(p, x) for p, x in zip(params, steps, strict=True)]
            descent(group, params, with_momentum(state, group, params, steps) if buffered else steps)


class QuadraticModelStep:
    """p <- p - lr m, with the m of the span of V, of what is not in units of the curvature of the loss (plain
    gradients, and directions of input curvature), and of the last m, where the model of the loss at p - m is least."""

    needs_closure = True

    def move(self, optimizer: Any, evaluation: Evaluation | None, gradients: Vector, directed: Vector) -> None:
        assert evaluation is not None
        groups = optimizer.param_groups
        foreign = {p for group in groups if not is_of_the_loss(group) for p in group["params"]}
        solved = {p: x for p, x in directed.items() if p not in foreign}
        averaged = [p for group in groups if group["momentum"] for p in group["params"] if p in gradients]
        plain = {p: directed.get(p, g) for p, g in gradients.items() if p not in solved}
        last = {p: buffer_of(optimizer.state[p], p) for p in averaged}
        chosen = self._coefficients(optimizer, evaluation, gradients, solved, [d for d in (solved, plain, last) if d])
        for group in groups:
            params = [p for p in group["params"] if p in gradients]
            steps = [solved[p] * chosen[0] if p in solved else plain[p] * chosen[min(1, len(solved))] for p in params]
            if group["momentum"]:
                steps = [last[p].mul_(chosen[-1]).add_(x) for p, x in zip(params, steps, strict=True)]
            optimizer.companion(Descent)(group, params, steps)

    def _coefficients(
        self, optimizer: Any, evaluation: Evaluation, gradients: Vector, solved: Vector, directions: list[Vector]
    ) -> Tensor:
        """What each direction is multiplied by."""
        slope = torch.stack([dot(d, gradients) for d in directions])
        gram = evaluation.curvature(directions, {p: p.detach() for p in optimizer.engine.params()})
        fixed, relative = shifts(optimizer)
        damped = gram + _products(directions, fixed)
        if relative and solved:
            added = _products(directions, relative)
            # V^T C V, for a running average C of times when the loss may have curved more
            averaged_curvature = slope[0] - added[0, 0] - (damped - gram)[0, 0]
            tiny = torch.finfo(slope.dtype).tiny
            ratio = gram[0, 0] / averaged_curvature.clamp_min(tiny)
            damped = damped + added * ratio.clamp(MIN_CURVATURE_RATIO, 1)
        chosen = minimiser(-slope, damped)
        if any(group["momentum"] for group in optimizer.param_groups) and len(directions) > 1:
            chosen = with_bounded_last(chosen, -slope.double(), damped.double())
        size, bound = chosen @ gram.double() @ chosen, optimizer.settings["kl_clip"]
        if bound is not None:
            scale = scale_within(size, bound)
            chosen, size = chosen * scale, size * scale.square()
        optimizer.noted.update(kl=size / 2, **{f"step_along_{k}": c for k, c in enumerate(chosen)})
        return chosen.to(slope.dtype)


def minimiser(slope: Tensor, curvature: Tensor) -> Tensor:
    """argmin_c slope·c + ½ c^T curvature c, [k] in float64; 0 for directions that are zero, and for all where something
    is not finite. No host sync.
    """
    slope, curvature = slope.double(), curvature.double()
    diagonal = curvature.diagonal()
    known = diagonal > 0
    scale = torch.where(known, diagonal, 1.0).rsqrt() * known
    # With a unit diagonal, how parallel two directions may be to count as two.
    ridge = torch.where(known, RIDGE, 1.0)
    scaled = torch.linalg.solve_ex(scale[:, None] * curvature * scale + ridge.diag(), scale * slope)[0]
    found = -scale * scaled
    return torch.where(torch.isfinite(found).all(), found, 0.0)


def with_bounded_last(chosen: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
    """The coefficients [k], the last of them, β, between 0 and MOST_MOMENTUM; the others are least for that one.

    The curvature of a small batch along the last step is noise where the batches before have not curved alike, and a β
    that it makes large multiplies the step again and again, unseen between two checks of ρ. No host sync.
    """
    beta = chosen[-1].clamp(0, MOST_MOMENTUM)
    rest = minimiser(slope[:-1] + beta * curvature[:-1, -1], curvature[:-1, :-1])
    return torch.where(beta == chosen[-1], chosen, torch.cat([rest, beta[None]]))


STEP_RULES: dict[str, Callable[[], FixedStep | QuadraticModelStep]] = {
    "fixed": FixedStep,
    "quadratic": QuadraticModelStep,
}


def shifts(optimizer: Any) -> tuple[dict[Tensor, float], dict[Tensor, Tensor]]:
    """By parameter, what is added to eigenvalues whatever they are, and what is relative to them."""
    fixed, relative = {}, {}
    for group in optimizer.param_groups:
        own = group["damping"] if group["damping_scale"] == "absolute" else 0.0
        fixed.update(dict.fromkeys(group["params"], own + group["l2"]))
    for block, group in optimizer.engine.by_group():
        if group["damping_scale"] == "relative" and is_of_the_loss(group) and block.average:
            relative.update(dict.fromkeys(block.params, group["damping"] * block.mean_eigenvalue()))
    return fixed, relative


def _products(directions: list[Vector], weights: dict[Tensor, Any]) -> Tensor:
    """[k, k] of Σ_p w_p <x_p, y_p> over the parameters that have a weight."""
    known = [{p: d[p] for p in d if p in weights} for d in directions]
    zero = next(x.new_zeros(()) for d in directions for x in d.values())
    return torch.stack([
        torch.stack([dot(x, y, weights) if x.keys() & y.keys() else zero for y in known]) for x in known
    ])  # fmt: skip
