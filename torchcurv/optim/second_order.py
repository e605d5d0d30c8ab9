"""SecondOrderOptimizer: gradient descent along (C + λ I)^-1 g."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.checks import check_count, check_number
from torchcurv.curv.kinds.base import INPUT
from torchcurv.curv.options import OPTION_NAMES
from torchcurv.optim.base import WHOLE_OPTIONS, CurvatureOptimizer
from torchcurv.optim.control.quadratic_model import Evaluation, Vector, minimiser
from torchcurv.optim.update import (
    descend_,
    dot,
    levenberg_marquardt,
    momentum_,
    norm_of,
    normalise_,
    scale_within,
    trust_ratio,
)

STEP_OPTIONS = (
    *("lr", "momentum", "nesterov", "momentum_type", "weight_decay", "l2", "maximize"),
    *("trust_ratio", "normalize_weights", "damping_scale"),
)
DAMPING_SCALES = ("absolute", "relative")
MOMENTUM_TYPES = ("preconditioned", "raw")
LEAST_SHARE = 0.01  # of a relative damping, in a model of a loss that curves less than its running average says
MOST_DIRECTIONS = 4.5  # per output of a batch, that LM damping leaves to the curvature
STEP_RULES, DAMPING_RULES = ("fixed", "quadratic"), ("fixed", "lm")
_CONTROL = (
    *("step_rule", "model_samples", "damping_rule", "damping_interval", "damping_decay", "damping_bounds"),
    "curvature_warmup",
)


class SecondOrderOptimizer(CurvatureOptimizer):
    r"""Preconditioned gradient descent with the curvature of each layer.

    For a gradient g (maximize flips its sign, `l2` adds l2 * p to it) and the curvature C of the loss

        V = (C + (damping + l2) I)^-1 g                 approx=None: V = g
        ν = min(1, sqrt(kl_clip / Σ lr² <V, g>))        one number for all covered parameters; 1 if kl_clip is None
        m = momentum * m + ν V,  p = (1 - lr * weight_decay) p - lr * m

    For curv_type="input", whose C is not in units of the loss, V = damping (C + damping I)^-1 g and ν = 1: such a
    group tends to the plain gradient as its damping grows.

    With step_rule="quadratic" the step is m <- α V + β m, p <- p - lr m, with the α and β for which the quadratic model
    of the loss of the batch is least at d = -m,

        q(d) = g·d + ½ d^T (G + damping + l2) d,    G its Gauss-Newton matrix: exact, by products with its Jacobian

    and a coefficient of their own for plain gradients and for directions of input curvature. Where the loss curves less
    along V than the running average C, which it does when it falls fast, a relative damping counts in q by the share
    V^T G V / V^T C V of it, but by 0.01 at least.

    With damping_rule="lm" (Levenberg and Marquardt) the damping of every group is divided by ω = damping_decay^T if, on
    the batch of every T-th step (ω = damping_decay for each of the first T, and after a step that was taken back),

        ρ = (L(θ + d) - L(θ)) / (g·d + ½ d^T (G + l2) d)

    is below ¼, and multiplied with ω if it is above ¾; if the loss of that batch rose, the step is taken back. A batch
    fits any model that has more directions than the batch has outputs (samples times classes, or pixels): where
    Σ tr C (C + λ)^-1 over the blocks is above 4.5 times these, the damping is divided by ω whatever ρ is, and above two
    thirds of that it is not made smaller.

    Of batches larger than `model_samples` so many, drawn at random, stand for all: in products with G, and in
    L(θ + d) - L(θ) but for its first order g·d. K-FAC factors are then made of a part as well: of as many samples as
    give each 16 rows (samples times positions) per row and column, where half of the batch has these.

    Both need `step(closure)`, with a closure that returns the loss, or (loss, output), without calling backward():

        optimizer = SecondOrderOptimizer(model, step_rule="quadratic", damping_rule="lm")
        for x, y in loader:
            optimizer.step(lambda: F.cross_entropy(model(x), y))

    Args:
        model: the module to train. It gets removable forward hooks and nothing else.
        params: what torch.optim takes (parameters, named parameters, groups); None means every trainable parameter.
            Groups may set any curvature or step option below.
        loss_fn: the loss module you call, or the name of the loss you compute: "cross_entropy", "mse",
            "bce_with_logits", "nll"; None: you call `observe(output, target, loss_fn)` before backward().
            A name means mean reduction, no class weights and a factor of 1 in what backward() is called on.
        curv_type: "ggn" (Gauss-Newton), "fisher", "empirical_fisher", "hessian", or "input" (ISAAC).
        approx: "kfac", "ekfac", "diag", "unit" (one block per output unit), "block" (per layer), "full", "lowrank" (the
            `rank` largest eigenpairs), or None.
        lr: step size, a number or a 0-d tensor. None: 0.1, or 1 for step_rule="quadratic", where it multiplies what
            the model has chosen.
        momentum: 0 <= momentum < 1; for step_rule="quadratic" any but 0 lets the model choose. nesterov: look ahead.
        momentum_type: "preconditioned" averages V, "raw" averages g before preconditioning.
        damping: λ > 0, a number, a 0-d tensor, or a function of the step; for damping_rule="lm" the first value. None:
            0.01, or 0.03 if it is relative. damping_type: "factored" or "exact" (through eigenvectors).
        damping_scale: "absolute": λ is in units of the loss's curvature. "relative": it is the damping times the mean
            eigenvalue of each block, tr C / dim C, so that no loss, width or layer has units of its own. "auto":
            relative for step_rule="quadratic" with damping_rule="lm", else absolute.
        kl_clip: bound κ on lr² <V, g>, or for step_rule="quadratic" on m^T G m, its trust region; None: no clipping.
            "auto" is 0.01, and None for step_rule="quadratic".
        weight_decay: decoupled decay. l2: coefficient of l2/2 norm(p)² in the loss, in g and in the damping.
        maximize: ascend.
        trust_ratio: V of every tensor is scaled to the norm of the tensor, where that is above 1e-2 (LARS). After the
            KL clip, which then has no effect on it.
        normalize_weights: after each step every tensor that moved and has two or more dimensions has norm sqrt(2 o),
            for o = p.shape[0] outputs: for weights in front of a normalisation, whose scale means nothing.
        step_rule: "fixed", or "quadratic". model_samples: so many of a larger batch stand for it; None: it is taken as
            a whole. Fewer are faster, and fit a model to themselves: 125 let classifiers diverge.
        damping_rule: "fixed", or "lm", with damping_interval = T, damping_decay, and damping_bounds of λ; None: 1e-4 to
            1e8 if it is relative, else from 1e-8.
        curvature_warmup: the first so many steps measure curvature and leave the parameters alone.
        samples: signals drawn per step; None: the exact curvature (one backward pass per output element).
        update_every, refactor_every: an int, a function of the step, "adaptive", or "auto": 1 in the first 10 steps,
            where curvature changes fast, and then 10; always 1 for curv_type="input" and for approx="full" and "block",
            which may be made of the rows of one batch.
        sharing: see `torchcurv.curv.options.Options`; None: "whole" for step_rule="quadratic", else "expand".
        ema_decay: a number, or a function of the step. refresh_tol, refresh_cap, refresh_warmup, rows_limit,
            factor_blocks, max_factor_dim, max_positions, partition, rank: see `torchcurv.curv.options.Options`.
        reduction, class_dim: of a loss given by name. output_fn: from the model's output to the loss's input.
        grad_scaler: the torch.amp.GradScaler that scales the loss, if any.
        unsupported: "error" lists parameters without a known curvature, "gradient" trains them with the gradient.
        seed: of the generator that the draws come from; the global generators are left alone.

    Raises:
        ValueError, TypeError: on arguments that are not allowed, saying what is.
        RuntimeError: from `step` if there are gradients whose curvature was not captured.

    Sources: Martens & Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (2015);
    Martens, "New insights and perspectives on the natural gradient method" (2020); You et al., "Large batch training
    of convolutional networks" (2017).
    """

    _copied: ClassVar[tuple[str, ...]] = (*CurvatureOptimizer._copied, "_kl_clip", "_control")

    def __init__(
        self,
        model: nn.Module,
        params: Any = None,
        *,
        loss_fn: nn.Module | str | None = "cross_entropy",
        curv_type: str = "ggn",
        approx: str | None = "kfac",
        lr: float | Tensor | None = None,
        momentum: float = 0.7,
        damping: float | Tensor | Callable[[int], float] | None = None,
        damping_scale: str = "auto",
        nesterov: bool = False,
        momentum_type: str = "preconditioned",
        weight_decay: float = 0.0,
        l2: float = 0.0,
        maximize: bool = False,
        trust_ratio: bool = False,
        normalize_weights: bool = False,
        kl_clip: float | str | None = "auto",
        step_rule: str = "fixed",
        model_samples: int | None = 512,
        damping_rule: str = "fixed",
        damping_interval: int = 5,
        damping_decay: float = 0.7,
        damping_bounds: tuple[float, float] | None = None,
        curvature_warmup: int = 0,
        samples: int | None = 1,
        sharing: str | None = None,
        damping_type: str = "factored",
        ema_decay: float | Callable[[int], float] = 0.95,
        update_every: int | str | Callable[[int], int] = "auto",
        refactor_every: int | str | Callable[[int], int] = "auto",
        refresh_tol: float = 0.1,
        refresh_cap: int = 100,
        refresh_warmup: int = 10,
        rows_limit: int = 2048,
        hessian_method: str | None = None,
        residual: str = "keep",
        max_hessian_dim: int = 2048,
        indefinite: str = "abs",
        factor_blocks: int = 1,
        max_factor_dim: int | None = 8192,
        max_positions: int | None = 2**15,
        partition: str | None = None,
        rank: int = 16,
        reduction: str | None = None,
        class_dim: int | None = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        grad_scaler: Any = None,
        unsupported: str = "error",
        seed: int = 0,
    ) -> None:
        quadratic = step_rule == "quadratic"
        lr = (1.0 if quadratic else 0.1) if lr is None else lr
        if damping_scale == "auto":
            damping_scale = "relative" if quadratic and damping_rule == "lm" else "absolute"
        relative = damping_scale == "relative"
        if damping is None:
            damping = 0.03 if relative else 0.01
        if damping_bounds is None:
            damping_bounds = (1e-4 if relative else 1e-8, 1e8)
        if sharing is None:
            sharing = "whole" if quadratic else "expand"
        self._kl_clip = checked_kl_clip(kl_clip, None if quadratic else 0.01)
        given = locals()
        self._control = {name: given[name] for name in _CONTROL}
        self._moved: list[tuple[float | Tensor, list[Tensor]]] = []  # (lr, steps or their norms) of the last step
        self._taken_back = False  # whether the last step was
        _check_control(self._control, grad_scaler)
        super().__init__(
            model,
            params,
            {name: given[name] for name in STEP_OPTIONS},
            {name: given[name] for name in OPTION_NAMES},
            **{name: given[name] for name in WHOLE_OPTIONS},
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_step_options(group)
        for key in ("trust_ratio", "normalize_weights"):
            if not isinstance(group[key], bool):
                raise TypeError(f"{key}={group[key]!r}; pass True or False")
        if group["damping_scale"] not in DAMPING_SCALES:
            allowed = ", ".join(map(repr, DAMPING_SCALES))
            raise ValueError(f"damping_scale={group['damping_scale']!r}; allowed are {allowed}")
        plain = {"nesterov": False, "maximize": False, "trust_ratio": False, "momentum_type": "preconditioned"}
        for key, value in plain.items():
            if group[key] != value and self._control["step_rule"] == "quadratic":
                raise ValueError(f'{key}={group[key]!r} with step_rule="quadratic", which makes the step its own way')
        if self._control["damping_rule"] == "lm":
            if group["maximize"]:
                raise ValueError('maximize=True with damping_rule="lm": it trusts a model of a loss that falls')
            if isinstance(group["damping"], Tensor):
                raise TypeError('damping is a tensor; damping_rule="lm" changes a number')

    def _take_group(self, index: int) -> None:
        super()._take_group(index)
        if self._control["damping_rule"] == "lm" and (index, "damping") in self._schedules:
            raise ValueError('damping is a function of the step; with damping_rule="lm" pass the number to start from')

    def _restore(self) -> None:
        self._moved = []
        self._taken_back = any(state.get("taken_back") for state in self.state.values())
        super()._restore()

    @property
    def _warming_up(self) -> bool:
        """Whether this step measures curvature only."""
        return self._steps < self._control["curvature_warmup"]

    def _due(self) -> list[str]:
        due = super()._due()
        return [block.name for block in self._blocks] if self._warming_up else due

    def _shift(self, block: Curvature, group: dict[str, Any]) -> float | Tensor:
        if group["damping_scale"] == "absolute":
            return super()._shift(block, group)
        own = group["damping"] * block.mean_eigenvalue()
        return own if group["curv_type"] == INPUT else own + group["l2"]

    def _step_of(self, index: int) -> int | None:
        return None if self._warming_up else super()._step_of(index)

    def _is_stale(self, block: Curvature, index: int) -> bool:
        return not self._warming_up and super()._is_stale(block, index)

    @property
    def _controlled(self) -> bool:
        """Whether a step needs more than gradients."""
        return self._control["step_rule"] != "fixed" or self._control["damping_rule"] != "fixed"

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients in `.grad`.

        closure: recomputes the loss and its gradients, as in torch.optim. With step_rule="quadratic" or
            damping_rule="lm" it is needed, and returns the loss, or (loss, output), without calling backward().
        """
        self._require_record()
        if not self._controlled:
            return super().step(closure)
        if closure is None:
            raise ValueError(
                'step_rule="quadratic" and damping_rule="lm" need the loss at other points: call step(closure) with a '
                "closure that returns the loss, or (loss, output), without calling backward()"
            )
        assert self.model is not None
        control = self._control
        quadratic = control["step_rule"] == "quadratic" and not self._warming_up
        checked = self._steps_to_check()
        self.zero_grad()
        products, known = quadratic or checked > 0, self._require_record().cut
        evaluation = Evaluation(self.model, closure, control["model_samples"], products, self._steps, known)
        self._backward(evaluation)
        self._last = {"loss": evaluation.loss.detach()}
        with torch.no_grad():
            if self._refresh():
                if not self._warming_up:
                    self._controlled_update(evaluation, checked)
                self._finish_step()
        return evaluation.loss.detach()

    def _backward(self, evaluation: Evaluation) -> None:
        """Gradients of the batch; curvature of a part of it where that is enough and half of it or less."""
        record = self._require_record()
        if evaluation.part is not None:
            needed = record.samples_needed(evaluation.output)
            if needed <= len(evaluation.output) // 2:
                samples = evaluation.drawn(needed)
                with torch.enable_grad():
                    record.part = evaluation.output_of(samples), samples
        try:
            evaluation.backward(measured=bool(record.due))
        finally:
            record.part = None

    def _update(self) -> None:
        if self._warming_up:
            return
        gradients, solved = self._preconditioned()
        common = self._clip(gradients, solved)
        for group in self.param_groups:
            clip = None if group["curv_type"] == INPUT else common
            params = [p for p in group["params"] if p in gradients]
            buffered = group["momentum"] and group["momentum_type"] == "preconditioned"
            # one pass over the steps less
            alone = buffered and not group["nesterov"] and not group["trust_ratio"]
            if alone and clip is not None and all(p in solved for p in params):
                for p in params:
                    self._buffer(self.state[p], p).mul_(group["momentum"]).addcmul_(solved[p], clip)
                self._descend(group, params, [self.state[p]["momentum_buffer"] for p in params])
                continue
            steps = [solved[p] if p in solved else gradients[p] for p in params]
            if clip is not None:
                steps = [x * clip if p in solved else x for p, x in zip(params, steps, strict=True)]
            if group["trust_ratio"]:
                steps = [x * trust_ratio(p, x) for p, x in zip(params, steps, strict=True)]
            if buffered:
                steps = self._momentum(group, params, steps)
            self._descend(group, params, steps)

    def _preconditioned(self) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """(g, V) by parameter, for a new step; V where there is a curvature."""
        self._moved = []
        gradients: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            gradients.update(self._gradients(group))
        return gradients, self._solve(gradients)

    def _descend(self, group: dict[str, Any], params: list[Tensor], steps: list[Tensor]) -> None:
        descend_(params, steps, group["lr"], group["weight_decay"])
        if group["normalize_weights"]:
            normalise_(params)
        self._note_step(group["lr"], params, steps)

    def _note_step(self, lr: float | Tensor, params: list[Tensor], steps: list[Tensor]) -> None:
        """For `metrics`: momentum buffers are there to be looked at later, what is not kept is measured now."""
        kept = all(x is self.state[p].get("momentum_buffer") for p, x in zip(params, steps, strict=True))
        if params:
            lr = lr.clone() if isinstance(lr, Tensor) else lr
            self._moved.append((lr, steps if kept else [norm_of(steps)]))

    def _gradients(self, group: dict[str, Any]) -> dict[Tensor, Tensor]:
        """What is preconditioned: the gradient with L2, its sign, and raw momentum."""
        params = [p for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        if group["maximize"]:
            grads = [-g for g in grads]
        if group["l2"]:
            grads = [g.add(p, alpha=group["l2"]) for g, p in zip(grads, params, strict=True)]
        if group["momentum_type"] == "raw":
            grads = self._momentum(group, params, grads)
        return dict(zip(params, grads, strict=True))

    def _momentum(self, group: dict[str, Any], params: list[Tensor], steps: list[Tensor]) -> list[Tensor]:
        if not group["momentum"]:
            return steps
        buffers = [self._buffer(self.state[p], p) for p in params]
        return momentum_(buffers, steps, group["momentum"], group["nesterov"])

    # ------------------------------------------------------------------------------- step control

    def _steps_to_check(self) -> int:
        """Over how many steps the damping is to change after this one: the first T one by one, and one that comes after
        a step that was taken back; then all T."""
        interval, step = self._control["damping_interval"], self._steps - self._control["curvature_warmup"]
        if self._control["damping_rule"] != "lm" or step < 0:
            return 0
        if (step + 1) % interval == 0 and step >= interval:
            return interval
        return int(step < interval or self._taken_back)

    def _controlled_update(self, evaluation: Evaluation, checked: int) -> None:
        before = {p: p.detach().clone() for p in self._params() if p.grad is not None} if checked else {}
        if self._control["step_rule"] == "quadratic":
            self._quadratic_update(evaluation)
        else:
            self._update()
        if not checked:
            return
        try:
            self._adapt_damping(evaluation, before, checked)
        except Exception:
            self._take_back(before)
            raise

    def _quadratic_update(self, evaluation: Evaluation) -> None:
        """p <- p - lr m with the m of the span of V, of what is not in units of the curvature of the loss (plain
        gradients, and directions of input curvature), and of the last m, where the model of the loss at p - m is
        least."""
        gradients, directed = self._preconditioned()
        inputs = {p for group in self.param_groups if group["curv_type"] == INPUT for p in group["params"]}
        solved = {p: x for p, x in directed.items() if p not in inputs}
        averaged = [p for group in self.param_groups if group["momentum"] for p in group["params"] if p in gradients]
        plain = {p: directed.get(p, g) for p, g in gradients.items() if p not in solved}
        last = {p: self._buffer(self.state[p], p) for p in averaged}
        directions: list[Vector] = [d for d in (solved, plain, last) if d]
        slope = torch.stack([dot(d, gradients) for d in directions])
        gram = evaluation.curvature(directions, {p: p.detach() for p in self._params()})
        fixed, relative = self._shifts()
        damped = gram + _products(directions, fixed)
        if relative and solved:
            added = _products(directions, relative)
            # V^T C V, for a running average C of times when the loss may have curved more
            averaged_curvature = slope[0] - added[0, 0] - (damped - gram)[0, 0]
            tiny = torch.finfo(slope.dtype).tiny
            damped = damped + added * (gram[0, 0] / averaged_curvature.clamp_min(tiny)).clamp(LEAST_SHARE, 1)
        chosen = minimiser(-slope, damped)
        size = chosen @ gram.double() @ chosen
        if self._kl_clip is not None:
            scale = scale_within(size, self._kl_clip)
            chosen, size = chosen * scale, size * scale.square()
        self._last |= {"kl": size / 2, "coefficients": chosen}
        chosen = chosen.to(slope.dtype)
        for group in self.param_groups:
            params = [p for p in group["params"] if p in gradients]
            steps = [solved[p] * chosen[0] if p in solved else plain[p] * chosen[min(1, len(solved))] for p in params]
            if group["momentum"]:
                steps = [last[p].mul_(chosen[-1]).add_(x) for p, x in zip(params, steps, strict=True)]
            self._descend(group, params, steps)

    def _shifts(self) -> tuple[dict[Tensor, float], dict[Tensor, Tensor]]:
        """By parameter, what is added to eigenvalues whatever they are, and what is relative to them."""
        fixed, relative = {}, {}
        for group in self.param_groups:
            own = group["damping"] if group["damping_scale"] == "absolute" else 0.0
            fixed.update(dict.fromkeys(group["params"], own + group["l2"]))
        for block, index in zip(self._blocks, self._group_index, strict=True):
            group = self.param_groups[index]
            if group["damping_scale"] == "relative" and group["curv_type"] != INPUT and block.measured:
                relative.update(dict.fromkeys(block.params, group["damping"] * block.mean_eigenvalue()))
        return fixed, relative

    def _adapt_damping(self, evaluation: Evaluation, before: Vector, steps: int) -> None:
        """Levenberg and Marquardt's rule, for the step that was made, to count for so many; one host sync."""
        moved = {p: (p.detach() - x).to(torch.promote_types(x.dtype, torch.float32)) for p, x in before.items()}
        l2 = {p: group["l2"] for group in self.param_groups for p in group["params"]}
        gradients = {p: p.grad for p in before if p.grad is not None}
        slope = dot(moved, gradients)
        curvature, change = evaluation.checked(moved, before, slope)
        decay = dot(moved, before, l2) + 0.5 * dot(moved, moved, l2)
        predicted, actual = slope + 0.5 * curvature + decay, change + decay
        dimension = self._effective_dimension(evaluation.loss.detach())
        self._last |= {"predicted": predicted, "actual": actual, "effective_dimension": dimension}
        size = evaluation.loss.detach().abs() * (8 * torch.finfo(evaluation.loss.dtype).eps / evaluation.share)
        read = torch.stack([x.double() for x in (actual, predicted, size, dimension)])
        change, expected, noise, directions = read.tolist()
        control = self._control
        omega = control["damping_decay"] ** steps
        factor = levenberg_marquardt(change, expected, omega, noise)
        crowding = directions / (MOST_DIRECTIONS * evaluation.output.numel())
        if crowding > 2 / 3:  # smaller by ω, it would leave up to half as many more
            factor = max(1.0, factor)
        if crowding > 1:
            factor = 1 / omega
        low, high = control["damping_bounds"]
        for group in self.param_groups:
            group["damping"] = min(high, max(low, group["damping"] * factor))
        self._taken_back = not change <= noise
        if self._taken_back:
            first = self.state[next(iter(before))]
            first["rejected_steps"] = first.get("rejected_steps", 0) + 1
            self._take_back(before)

    def _effective_dimension(self, like: Tensor) -> Tensor:
        """Σ tr C (C + λ)^-1 over the blocks whose C is that of the loss."""
        total = torch.zeros_like(like, dtype=torch.float64)
        for block, index in zip(self._blocks, self._group_index, strict=True):
            group = self.param_groups[index]
            if group["curv_type"] != INPUT and block.has_factor:
                total += block.effective_dimension(self._shift(block, group)).to(total.device)
        return total

    def _take_back(self, before: Vector) -> None:
        """Undo the step; the momentum starts again."""
        self._moved = []
        for p, x in before.items():
            p.copy_(x)
            if "momentum_buffer" in self.state[p]:
                self.state[p]["momentum_buffer"].zero_()

    def _save_param(self, state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
        super()._save_param(state, p, group)
        if group["momentum"]:
            self._buffer(state, p)
        if self._control["damping_rule"] == "lm":
            state.setdefault("rejected_steps", 0)
            state["taken_back"] = self._taken_back

    def metrics(self) -> dict[str, float]:
        """Those of every optimizer here, and

        step_norm: of the last change of the parameters but for their decay. l2_loss: l2/2 norm(p)², where there is
        any. With step_rule="quadratic": kl = ½ m^T G m,
        step_along_0, step_along_1, ...: the coefficients of V, of plain gradients if there are any, and of the last
        step if there is momentum. With damping_rule="lm", at the steps where it acts: predicted and actual change of
        the loss and their ratio, and effective_dimension = Σ tr C (C + λ)^-1; rejected_steps: so far.
        """
        found = super().metrics()
        if self._control["damping_rule"] == "lm":
            found["rejected_steps"] = sum(state.get("rejected_steps", 0) for state in self.state.values())
        if "predicted" in found:
            found["ratio"] = found["actual"] / found["predicted"] if found["predicted"] else math.nan
        return found

    def _known(self) -> dict[str, Tensor]:
        known = super()._known()
        chosen = known.pop("coefficients", None)
        if chosen is not None:
            known |= {f"step_along_{k}": c for k, c in enumerate(chosen)}
        decayed = [group for group in self.param_groups if group["l2"] and group["params"]]
        terms = [norm_of(group["params"]).square() * group["l2"] / 2 for group in decayed]
        if terms:
            known["l2_loss"] = torch.stack(terms).sum()
        if self._moved:
            known["step_norm"] = torch.stack([norm_of(steps) * lr for lr, steps in self._moved]).norm()
        return known


def _products(directions: list[Vector], weights: dict[Tensor, Any]) -> Tensor:
    """[k, k] of Σ_p w_p <x_p, y_p> over the parameters that have a weight."""
    known = [{p: d[p] for p in d if p in weights} for d in directions]
    zero = next(x.new_zeros(()) for d in directions for x in d.values())
    return torch.stack([
        torch.stack([dot(x, y, weights) if x.keys() & y.keys() else zero for y in known]) for x in known
    ])  # fmt: skip


def _check_control(control: dict[str, Any], grad_scaler: Any) -> None:
    for key, allowed in (("step_rule", STEP_RULES), ("damping_rule", DAMPING_RULES)):
        if control[key] not in allowed:
            raise ValueError(f"{key}={control[key]!r}; allowed are {', '.join(map(repr, allowed))}")
        if control[key] != "fixed" and grad_scaler is not None:
            raise ValueError(f"{key}={control[key]!r} with a grad_scaler: it reads the loss as it is; scale nothing")
    if control["model_samples"] is not None:
        check_count("model_samples", control["model_samples"])
    check_number("damping_decay", control["damping_decay"], lambda x: 0 < x < 1, "a number between 0 and 1")
    check_count("damping_interval", control["damping_interval"])
    if control["curvature_warmup"] != 0:
        check_count("curvature_warmup", control["curvature_warmup"])
    bounds = control["damping_bounds"]
    if not (isinstance(bounds, tuple | list) and len(bounds) == 2 and 0 < bounds[0] <= bounds[1] < math.inf):
        raise ValueError(f"damping_bounds={bounds!r}; pass two numbers with 0 < low <= high")


def checked_kl_clip(kl_clip: Any, auto: float | None = 1.0) -> float | None:
    """κ; auto: what "auto" stands for."""
    if kl_clip == "auto":
        return auto
    if kl_clip is not None:
        check_number("kl_clip", kl_clip, lambda x: x > 0, 'a number > 0, or None for no clipping, or "auto"')
    return kl_clip


def check_step_options(options: dict[str, Any]) -> None:
    """Raise on step options that are not allowed, saying what is."""
    lr = options["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}; pass a number >= 0, or a 0-d tensor")
    else:
        check_number("lr", lr, lambda x: 0 <= x < math.inf, "a finite number >= 0, or a 0-d tensor")
    for key in ("weight_decay", "l2"):
        check_number(key, options[key], lambda x: 0 <= x < math.inf, "a finite number >= 0")
    check_number("momentum", options["momentum"], lambda x: 0 <= x < 1, "a number with 0 <= momentum < 1")
    for key in ("nesterov", "maximize"):
        if not isinstance(options[key], bool):
            raise TypeError(f"{key}={options[key]!r}; pass True or False")
    if options["nesterov"] and not options["momentum"]:
        raise ValueError("nesterov=True needs momentum > 0")
    if options["momentum_type"] not in MOMENTUM_TYPES:
        allowed = ", ".join(map(repr, MOMENTUM_TYPES))
        raise ValueError(f"momentum_type={options['momentum_type']!r}; allowed are {allowed}")
