"""ResidualNewton: Gauss-Newton and Levenberg-Marquardt steps for losses that are sums of squared residuals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor, nn

from torchcurv.curv.checks import check_count, check_number, check_one_of, flag
from torchcurv.curv.compiler import never_compiled
from torchcurv.curv.linalg.least_squares import DampedLeastSquares, jacobian
from torchcurv.curv.options import LIVE, Option, table_of
from torchcurv.optim.control.residuals import MatrixFreeLeastSquares, Weights, residual_vector
from torchcurv.optim.control.trials import (
    FIRST_DAMPING,
    Path,
    Point,
    System,
    Trial,
    check_repeats,
    damping_factor,
    half_square,
    scaled,
)
from torchcurv.optim.engine.groups import GroupOptions


def _rate(name: str, value: Any) -> None:
    check_number(name, value, lambda x: 0 <= x < math.inf, "a finite number >= 0")


def _damping(name: str, value: Any) -> None:
    if value is not None:
        _rate(name, value)


class ResidualOptions(TypedDict, total=False):
    """Per group."""

    lr: Annotated[float, Option(1.0, _rate, LIVE, "what the step is multiplied by")]
    damping: Annotated[float | None, Option(None, _damping, LIVE, "λ of J^T J + λ I; None: one that fits the first J")]


class ResidualNewton(torch.optim.Optimizer):
    r"""p <- p + lr d with (J^T J + λ I) d = -J^T r, for the loss L = ½ Σ_k w_k norm(r_k)² of residuals r_k(θ).

    The residuals may be made of derivatives of the network: those of a differential equation and its boundary, of
    gradients that are to be matched or to be small. J = dr/dθ comes from autograd, through any module. The system is
    solved exactly, over all parameters together, through the smaller of J^T J [P, P] and J J^T [m, m]:
    (J^T J + λ I)^-1 J^T = J^T (J J^T + λ I)^-1. With λ = 0 the step is that of Gauss-Newton, the shortest d of least
    norm(J d + r).

        optimizer.step(residuals)       # no zero_grad(), no backward(): `.grad` is neither read nor written

    A step is tried: if the loss does not fall or is not finite, parameters are put back as they were, λ is raised and
    the step is solved again, up to `max_trials` times. So the callable runs once or more per step, and must compute the
    same residuals each time: draw points before the step. Each trial reads its loss from the device.

    Args:
        model_or_params: a module, or parameters, or groups of them as in torch.optim. Frozen ones are left alone.
        lr: what the step is multiplied by, per group.
        damping: λ >= 0, per group, in units of L; all zero, or all positive. None, the default, is that of the
            other groups, or 1e-3 of the largest entry of the diagonal of J^T J at the first step.
        reduction: "sum", or "mean": L = ½ Σ_k w_k mean(r_k²).
        damping_rule: "lm" changes λ after each trial by the gain ratio ρ, the actual change of L over that of
            ½ norm(r + J d)²: λ/10 for ρ > 1/4, 4 λ for ρ <= 0, which is a rejected step. λ of all groups change by one
            factor, and λ never shrinks below the rounding of J^T J. "fixed" keeps λ, and with line_search=0 takes
            every finite step.
        acceleration: with "lm", the step is d + c, c solved like d with half of the second derivative of r along d in
            the place of r, for one more evaluation. Where 2 norm(c) > 0.75 norm(d) it is not tried.
        line_search: halvings. Steps t d + t² c are tried at t = 1, 1/2, 1/4... as long as L falls on the way, and the
            best is taken; 0: the full step only.
        max_trials: at how many λ a step is solved before it is given up.
        dtype: of the Gram matrix and the solve, at least that of the parameters and float32, the default. float64
            keeps digits that float32 loses where J^T J is ill-conditioned, as it is for differential equations.
        solver: "rows" for J J^T, "parameters" for J^T J, None for the smaller, or "cg": conjugate gradients with
            products J^T (J v), which need no memory for J, to a residual of cg_tol of the gradient's norm or for
            cg_maxiter iterations.
        chunk: rows of J that are backpropagated at once; None: as many as have 2^18 elements on a CPU, else 2^24.

    A point where residuals or J are not finite cannot be left: the step is skipped with a warning, and nothing changes.

    Sources: Nocedal and Wright, "Numerical Optimization" (2006), chapter 10; Madsen, Nielsen, Tingleff, "Methods for
    non-linear least squares problems" (2004); the acceleration: Transtrum and Sethna, "Improvements to the
    Levenberg-Marquardt algorithm for nonlinear least-squares minimization" (1201.5885); the line search, and the Gram
    matrix for differential equations: Müller and Zeinhofer, "Achieving high accuracy with PINNs via energy natural
    gradient descent" (2302.13163).
    """

    settings: dict[str, Any]
    _last: dict[str, float]

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        *,
        lr: float = 1.0,
        damping: float | None = None,
        reduction: str = "sum",
        damping_rule: str = "lm",
        acceleration: bool = True,
        line_search: int = 0,
        max_trials: int = 10,
        dtype: torch.dtype | None = None,
        solver: str | None = None,
        cg_tol: float = 1e-3,
        cg_maxiter: int = 100,
        chunk: int | None = None,
    ) -> None:
        check_one_of("reduction", reduction, ("sum", "mean"))
        check_one_of("damping_rule", damping_rule, ("lm", "fixed"))
        check_one_of("dtype", dtype, (None, torch.float32, torch.float64))
        check_one_of("solver", solver, (None, "rows", "parameters", "cg"))
        flag("acceleration", acceleration)
        check_count("line_search", line_search, 0)
        for name, value in {"max_trials": max_trials, "cg_maxiter": cg_maxiter, "chunk": chunk}.items():
            if value is not None or name != "chunk":
                check_count(name, value)  # type: ignore[arg-type]
        check_number("cg_tol", cg_tol, lambda x: 0 < x < 1, "a number between 0 and 1")
        self.settings = {
            "reduction": reduction,
            "damping_rule": damping_rule,
            "acceleration": acceleration and damping_rule == "lm",
            "line_search": line_search,
            "max_trials": max_trials,
            "dtype": dtype,
            "solver": solver,
            "cg_tol": cg_tol,
            "cg_maxiter": cg_maxiter,
            "chunk": chunk,
        }
        self._groups, self._last = GroupOptions(table_of(ResidualOptions), tuple(self.settings), {}, (), {}), {}
        params = list(model_or_params.parameters()) if isinstance(model_or_params, nn.Module) else model_or_params
        super().__init__(params, {"lr": lr, "damping": damping})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; `lr` and `damping` may stand in the group."""
        self._groups.check_keys(param_group)
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
            bad = [p.dtype for p in self.param_groups[-1]["params"] if not p.is_floating_point()]
            if bad:
                raise TypeError(f"a parameter is of {bad[0]}; ResidualNewton trains real floating-point ones")
        except Exception:
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        for name, option in self._groups.table.items():
            option.check(name, group[name])

    # --------------------------------------------------------------------------------------------- step

    @never_compiled
    @torch.no_grad()
    def step(self, residuals: Callable[[], Any], weights: Weights = None) -> Tensor:  # type: ignore[override]
        """One step; returns the loss before it, a 0-d tensor.

        residuals: computes the residuals at the parameters as they are, as a tensor, or a list or dict of tensors,
            without calling backward().
        weights: w_k >= 0, for a tensor a number or a tensor that broadcasts to it, for a list or dict of tensors a list
            or dict of these; None: ones. What a dict leaves out has the weight 1.
        """
        if not callable(residuals):
            raise TypeError(
                f"step() got a {type(residuals).__name__}; pass a callable that computes the residuals, since they are "
                "computed again where the step leads: optimizer.step(lambda: model(x) - y)"
            )
        for group in self.param_groups:
            self._check(group)
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not params:
            raise ValueError("every parameter is frozen: nothing to optimize")
        self._set_damping(self._damping())
        evaluate = partial(self._residuals, residuals, weights)
        r = evaluate()
        loss = half_square(r)
        self._last = {"loss": float(loss)}
        system = self._system(r, params) if math.isfinite(self._last["loss"]) else None
        if system is None:
            return self._skipped(loss, "the residuals")
        if not math.isfinite(float(system.largest_square)) or not bool(system.gradient.isfinite().all()):
            return self._skipped(loss, "derivatives of the residuals")
        self._set_damping(FIRST_DAMPING * float(system.largest_square))
        if self._counts["step"] == self._counts["skipped"] and self._compares:
            check_repeats(r.detach(), evaluate().detach())
        self._count("step")
        eps = max(torch.finfo(dtype).eps for dtype in (r.dtype, params[0].dtype))
        self._search(Point(system, evaluate, params, self._last["loss"], eps))
        return loss

    def _residuals(self, residuals: Callable[[], Any], weights: Weights) -> Tensor:
        with torch.enable_grad():
            return residual_vector(residuals(), weights, self.settings["reduction"])

    def _system(self, r: Tensor, params: list[Tensor]) -> System:
        """The linear problem at this point."""
        dtype = torch.float32 if self.settings["dtype"] is None else self.settings["dtype"]
        for p in params:
            dtype = torch.promote_types(dtype, p.dtype)
        top, scale = self._damping(), None
        groups = [g for g in self.param_groups if any(p.requires_grad for p in g["params"])]
        if len({g["damping"] for g in groups}) > 1:
            if any(g["damping"] in (None, 0) for g in groups):
                raise ValueError(
                    f"the groups have damping {[g['damping'] for g in groups]}; pass all zero or all positive"
                )
            scale = self._by_element([g["damping"] / top for g in self.param_groups], params[0], dtype)
        if self.settings["solver"] == "cg":
            with torch.enable_grad():
                return MatrixFreeLeastSquares(
                    r, params, scale, dtype, self.settings["cg_tol"], self.settings["cg_maxiter"]
                )
        J = jacobian(r, params, self.settings["chunk"])
        return DampedLeastSquares(J, r.detach().to(J.device), scale, dtype, self.settings["solver"])

    def _by_element(self, values: list[float], like: Tensor, dtype: torch.dtype) -> Tensor:
        """A number per group as a vector over the elements of what is trained."""
        parts = [
            torch.full((p.numel(),), value, dtype=dtype, device=like.device)
            for value, group in zip(values, self.param_groups, strict=True)
            for p in group["params"]
            if p.requires_grad
        ]
        return torch.cat(parts)

    # -------------------------------------------------------------------------------------------- trials

    @property
    def _compares(self) -> bool:
        """Whether steps are accepted by the loss where they lead."""
        return self.settings["damping_rule"] == "lm" or self.settings["line_search"] > 0

    def _search(self, point: Point) -> None:
        """Move to where the loss is lower, or stay."""
        settings = self.settings
        accepted: Trial | None = None
        rates, adapts = [group["lr"] for group in self.param_groups], settings["damping_rule"] == "lm"
        lr = None if set(rates) == {1.0} else self._by_element(rates, point.params[0], torch.float64)
        for _ in range(settings["max_trials"] if adapts else 1):
            damping = self._damping()
            d, rank = point.system.step(damping)
            d = scaled(d, lr)
            self._last |= {"rank": rank, "trial_damping": damping}
            if not self._compares:
                if not point.move(d, to_stay=True):
                    self._count("rejected")
                return
            try:
                path = point.bent(d, damping, lr) if settings["acceleration"] else Path(d)
                full, best = point.tried(path, settings["line_search"])
            finally:
                point.restore()
            settled = full.says_nothing(point.noise)
            if adapts and not settled:
                self._adapt(full, point.system)
            if best.actual < 0:
                point.move(path.at(best.length), to_stay=True)
                accepted = best
                break
            self._count("rejected")
            if settled:
                break
        self._last |= {"ratio": full.ratio, "length": accepted.length if accepted else 0.0}
        self._last |= {"predicted": (accepted or full).predicted, "actual": (accepted or full).actual}

    # ------------------------------------------------------------------------------------------- damping

    def _damping(self) -> float:
        """The largest of the groups that are trained; the others are in a fixed proportion to it."""
        found = [g["damping"] for g in self.param_groups if any(p.requires_grad for p in g["params"])]
        return max((x for x in found if x is not None), default=0.0)

    def _set_damping(self, value: float) -> None:
        """Of groups that have none yet."""
        for group in self.param_groups:
            if group["damping"] is None and value > 0:
                group["damping"] = value

    def _adapt(self, trial: Trial, system: System) -> None:
        now, largest, factor = self._damping(), float(system.largest_square), damping_factor(trial.ratio)
        if now == 0:
            if factor > 1:
                for group in self.param_groups:
                    group["damping"] = FIRST_DAMPING * largest
            return
        # below rounding λ does nothing, and above largest / eps the step is below rounding
        low, high = float(system.rounding), largest / torch.finfo(system.gradient.dtype).eps
        wanted = max(now * factor, min(now, low)) if factor < 1 else min(now * factor, max(now, high))
        for group in self.param_groups:
            group["damping"] = group["damping"] * (wanted / now)

    # ------------------------------------------------------------------------------------------- counting

    @property
    def _counts(self) -> dict[str, Any]:
        """Numbers that a checkpoint holds, in the state of the first parameter."""
        counts = self.state[self.param_groups[0]["params"][0]]
        if not counts:
            counts.update(step=0, rejected=0, skipped=0)
        return counts

    def _count(self, name: str) -> None:
        self._counts[name] += 1

    def _skipped(self, loss: Tensor, what: str) -> Tensor:
        self._count("step")
        self._count("skipped")
        warnings.warn(f"{what} are not finite: the step was skipped, and parameters are as they were", stacklevel=7)
        return loss

    def metrics(self) -> dict[str, float]:
        """What is known of the last step, as plain numbers.

        step, rejected, skipped: steps so far, trials that were rejected, and steps without finite residuals or J.
        damping: λ for the next step, the largest of the groups. Of the last step: loss, that before it; rank, the size
        of the system, or with λ at rounding level the singular values that were kept, or iterations of CG;
        trial_damping, the λ that it was solved with; predicted and actual change of the loss; ratio, actual over
        predicted at full length; length, what the line search took, 0 if the step was given up.
        """
        known = {key: self._counts[key] for key in ("step", "rejected", "skipped")}
        return {**known, "damping": self._damping(), **self._last}

    def __getstate__(self) -> dict[str, Any]:
        own = {"settings": self.settings, "_groups": self._groups, "_last": self._last}
        return {**super().__getstate__(), **own}
