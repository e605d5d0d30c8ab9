"""Losses: L = R * sum_t w_t c(f_t, y_t), one row per c.

A row knows the number of terms behind R, the term weights w, a root S of the Hessian H = S S^T of c with respect
to the output, a label sampler of the model's own distribution, and the gradient of c. Everything is computed in
one layout, f [n, t, c]: n samples, t terms per sample that share the c outputs. An elementwise loss has t = 1 and
all its elements in c. Formulas: Martens, "New insights and perspectives on the natural gradient method" (2020).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchcurv.curv.linalg import free_to_read

REDUCTIONS = ("mean", "sum", "none")


def random_signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(like).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def at_least_float32(tensor: Tensor) -> Tensor:
    wanted = torch.promote_types(tensor.dtype, torch.float32)
    return tensor if tensor.dtype == wanted else tensor.to(wanted)


@dataclass(frozen=True)
class Terms:
    """One (output, target) pair in the layout f [n, t, c].

    reduction: R, a number or a 0-d tensor
    weights:   w [n, t] or [n, t, c]; None means all 1
    uniform:   whether every weight is 0 or one common number, so that the gradient of L is sqrt(R) times the signal
    residual:  gradient of c at the target [n, t, c]; computed when asked
    count:     what the mean over these terms divides by, whatever the reduction is
    """

    f: Tensor
    reduction: Tensor | float
    weights: Tensor | None
    uniform: bool
    residual: Callable[[], Tensor]
    count: Tensor | float = 1.0

    def __post_init__(self) -> None:
        if self.weights is not None and free_to_read(self.weights) and bool((self.weights == 1).all()):
            object.__setattr__(self, "weights", None)  # nothing to weight: knowing it saves a pass over the inputs

    @property
    def empty(self) -> bool:
        """Whether no term counts, so that L is zero (or 0/0); never known on an accelerator, where it costs a sync."""
        return self.weights is not None and free_to_read(self.weights) and not bool(self.weights.any())

    def of(self, samples: Tensor) -> Terms:
        """Those of some of the samples, with the R of all."""
        weights = None if self.weights is None else self.weights[samples]
        return replace(self, f=self.f[samples], weights=weights, residual=lambda: self.residual()[samples])

    @property
    def root_weights(self) -> Tensor | None:
        """sqrt(w), broadcastable to f."""
        if self.weights is None:
            return None
        root = self.weights.sqrt()
        return root if root.dim() == 3 else root.unsqueeze(-1)

    @property
    def position_weights(self) -> Tensor | None:
        """w [n, t] as the input covariance counts its positions."""
        if self.weights is None or self.weights.dim() == 2:
            return self.weights
        return self.weights.mean(-1)


class CrossEntropy:
    """c = -log p_y, p = softmax(f). NLLLoss on log-probabilities is the same: softmax(log p) = p, and the root's
    columns sum to zero over the classes, which log_softmax passes back unchanged."""

    elementwise = False

    @staticmethod
    def draw(f: Tensor, generator: torch.Generator | None) -> Tensor:
        """S r with S = sqrt(p_k) (e_k - p) in column k: sqrt(p) r - p (sqrt(p) . r)."""
        p = f.softmax(-1)
        u = p.sqrt() * random_signs(p, generator)
        return u - p * u.sum(-1, keepdim=True)

    @staticmethod
    def column(f: Tensor, k: int) -> Tensor:
        p = f.softmax(-1)
        column = -p * p[..., k : k + 1].sqrt()
        column[..., k] += p[..., k].sqrt()
        return column

    @staticmethod
    def label(f: Tensor, generator: torch.Generator | None) -> Tensor:
        p = f.softmax(-1)
        drawn = torch.multinomial(p.flatten(0, -2), 1, generator=generator).reshape(*p.shape[:-1], 1)
        return p.scatter_add(-1, drawn, -torch.ones_like(p[..., :1]))

    @staticmethod
    def value(f: Tensor, residual: Tensor) -> Tensor:
        """c [n, t] from its gradient p - q at the target: -sum q log p."""
        q = f.softmax(-1) - residual
        return -torch.where(q == 0, 0, q * f.log_softmax(-1)).sum(-1)

    @staticmethod
    def hessian(f: Tensor, v: Tensor) -> Tensor:
        """(diag(p) - p p^T) v."""
        p = f.softmax(-1)
        return p * v - p * (p * v).sum(-1, keepdim=True)

    @staticmethod
    def hessian_diagonal(f: Tensor) -> Tensor:
        p = f.softmax(-1)
        return p - p.square()


class SquaredError:
    """c = 1/2 (f - y)^2 per element; torch's loss is twice that, hence R = 2 or 2 / elements."""

    elementwise = True

    @staticmethod
    def draw(f: Tensor, generator: torch.Generator | None) -> Tensor:
        return random_signs(f, generator)

    @staticmethod
    def column(f: Tensor, k: int) -> Tensor:
        column = torch.zeros_like(f)
        column[..., k] = 1
        return column

    @staticmethod
    def label(f: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.empty_like(f).normal_(generator=generator)

    @staticmethod
    def value(f: Tensor, residual: Tensor) -> Tensor:
        """c [n, t, c] from its gradient f - y."""
        return 0.5 * residual.square()

    @staticmethod
    def hessian(f: Tensor, v: Tensor) -> Tensor:
        return v

    @staticmethod
    def hessian_diagonal(f: Tensor) -> Tensor:
        return torch.ones_like(f)


class BinaryCrossEntropy:
    """c = -y log s(f) - (1 - y) log(1 - s(f)) per element, s the logistic function; H = diag(s (1 - s))."""

    elementwise = True

    @staticmethod
    def _root(f: Tensor) -> Tensor:
        return (f.sigmoid() * (-f).sigmoid()).sqrt()  # 1 - s(f) = s(-f), without cancellation

    @classmethod
    def draw(cls, f: Tensor, generator: torch.Generator | None) -> Tensor:
        return cls._root(f) * random_signs(f, generator)

    @classmethod
    def column(cls, f: Tensor, k: int) -> Tensor:
        column = torch.zeros_like(f)
        column[..., k] = cls._root(f[..., k])
        return column

    @staticmethod
    def label(f: Tensor, generator: torch.Generator | None) -> Tensor:
        p = f.sigmoid()
        return p - torch.bernoulli(p, generator=generator)

    @staticmethod
    def value(f: Tensor, residual: Tensor) -> Tensor:
        """c [n, t, c] from its gradient s(f) - q at the target: -log s(f) + (1 - q) f."""
        return (1 - f.sigmoid() + residual) * f - F.logsigmoid(f)

    @classmethod
    def hessian(cls, f: Tensor, v: Tensor) -> Tensor:
        return cls._root(f).square() * v

    @classmethod
    def hessian_diagonal(cls, f: Tensor) -> Tensor:
        return cls._root(f).square()


@dataclass(frozen=True)
class Loss:
    """A row above together with the settings of one loss module.

    options: the module's own `weight`, `pos_weight`, `ignore_index`, `label_smoothing`.
    class_dim: dimension of the classes in the output; None where the loss has none or the user must say it.
    """

    name: str
    row: Any
    reduction: str = "mean"
    class_dim: int | None = 1
    options: dict[str, Any] = field(default_factory=dict)

    # ---------------------------------------------------------------------------------------- layout

    def layout(self, f: Tensor, n: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """(f as [n, t, c], a function that brings such a tensor back to the shape of f)."""
        rows = f.shape[0] if f.dim() else 0
        if rows == 0 or rows % n:
            raise ValueError(
                f"the output given to the loss has shape {tuple(f.shape)}, whose rows are no multiple of the batch "
                f"size {n} of the model's output: call optimizer.observe(output, target) with an output whose "
                "dimension 0 is the batch"
            )
        if self.row.elementwise:
            return f.reshape(n, 1, -1), lambda s: s.reshape(f.shape)
        if f.dim() < 2:
            raise ValueError(
                f"{self.name} needs outputs [batch, classes, ...]; this one has shape {tuple(f.shape)}. "
                "Add a batch dimension"
            )
        if self.class_dim is None and f.dim() > 2:
            raise ValueError(
                f"the output has shape {tuple(f.shape)}: say with class_dim= which dimension holds the classes "
                "(-1 for [batch, tokens, classes], 1 for [batch, classes, height, width])"
            )
        dim = 1 if self.class_dim is None else self.class_dim
        last = f.movedim(dim, -1)
        return last.reshape(n, -1, last.shape[-1]), lambda s: s.reshape(last.shape).movedim(-1, dim)

    # ----------------------------------------------------------------------------------------- terms

    def terms(self, f: Tensor, target: Tensor, n: int, arriving: Tensor | None = None) -> Terms:
        """Terms of one call of the loss.

        arriving: for reduction "none", the gradient that reached the unreduced loss; it weights the terms.
        """
        canonical = at_least_float32(self.layout(f.detach(), n)[0])
        read = self._elements if self.row.elementwise else self._classes
        terms = read(canonical, f, target)
        if self.reduction != "none":
            return terms
        if arriving is None:
            raise ValueError("reduction='none' says nothing about the weight of each term: reduce the loss first")
        reached = arriving.detach().to(canonical.dtype).reshape(n, *terms.f.shape[1:2], -1)
        reached = reached if self.row.elementwise else reached.squeeze(-1)
        weights = reached if terms.weights is None else terms.weights * reached
        largest = weights.amax().clamp_min(torch.finfo(weights.dtype).tiny)
        return replace(terms, reduction=terms.reduction * largest, weights=weights / largest, uniform=False)

    def _elements(self, canonical: Tensor, f: Tensor, target: Tensor) -> Terms:
        y = target.detach().to(canonical.dtype).expand_as(f).reshape(canonical.shape)
        weights: Tensor | None = None
        for key in ("weight", "pos_weight"):
            option = self.options.get(key)
            if option is not None:
                option = option.to(canonical.dtype).expand_as(f).reshape(canonical.shape)
                factor = option if key == "weight" else 1 + (option - 1) * y
                weights = factor if weights is None else weights * factor

        def residual() -> Tensor:
            pos = self.options.get("pos_weight")
            if self.row is SquaredError:
                return canonical - y
            if pos is None:
                return canonical.sigmoid() - y
            pos = pos.to(canonical.dtype).expand_as(f).reshape(canonical.shape)
            factor = 1 + (pos - 1) * y
            return canonical.sigmoid() - pos * y / factor.clamp_min(torch.finfo(y.dtype).tiny)

        scale = 2 if self.row is SquaredError else 1
        # torch's weighted squared error divides by the weights' sum, its BCE does not
        count = weights.sum() if self.row is SquaredError and weights is not None else canonical.numel()
        return Terms(canonical, scale / self._divisor(count), weights, weights is None, residual, count)

    def _divisor(self, count: Tensor | float) -> Tensor | float:
        return count if self.reduction == "mean" else 1.0

    def _classes(self, canonical: Tensor, f: Tensor, target: Tensor) -> Terms:
        n, t, c = canonical.shape
        class_weight = self.options.get("weight")
        class_weight = None if class_weight is None else class_weight.to(canonical.dtype)
        smoothing = self.options.get("label_smoothing", 0.0)
        # torch: probabilities have the shape of the output and a floating dtype, indices lack the class dimension
        soft = target.is_floating_point() and target.shape == f.shape
        if soft:
            q = self.layout(target.detach().to(canonical.dtype), n)[0]
            kept, labels = None, None
        else:
            labels = target.detach().reshape(n, t)
            kept = labels != self.options.get("ignore_index", -100)
            labels = labels.where(kept, 0)

        def distribution() -> Tensor:
            hard = q if labels is None else F.one_hot(labels, c).to(canonical.dtype)
            return hard * (1 - smoothing) + smoothing / c if smoothing else hard

        weights = None if kept is None else kept.to(canonical.dtype)
        if class_weight is not None:
            weighted = distribution() @ class_weight
            weights = weighted if weights is None else weights * weighted
        count: Tensor | float = float(n * t)
        if kept is not None:
            mask = kept.to(canonical.dtype)
            count = (mask if class_weight is None else class_weight[labels] * mask).sum()

        def residual() -> Tensor:
            p, q = canonical.softmax(-1), distribution()
            if class_weight is None:
                return p - q
            w = (q @ class_weight).unsqueeze(-1)
            return p - q * class_weight / w.clamp_min(torch.finfo(w.dtype).tiny)

        return Terms(canonical, 1 / self._divisor(count), weights, class_weight is None, residual, count)

    # --------------------------------------------------------------- losses known by their name alone

    def terms_from_gradient(self, f: Tensor, arriving: Tensor, n: int, loss_scale: Tensor | float = 1.0) -> Terms:
        """Terms of a loss that was named, not seen: the gradient that arrived at the output stands for the target.

        A row of a classification counts as ignored where that gradient is exactly zero although the prediction
        is not saturated (a saturated right prediction has gradient zero too, but is a term).
        """
        canonical = at_least_float32(self.layout(f.detach(), n)[0])
        weights = None
        if not self.row.elementwise:
            gradient = self.layout(arriving, n)[0]
            saturated = canonical.softmax(-1).amax(-1) > 1 - 2 * torch.finfo(arriving.dtype).eps
            weights = ((gradient != 0).any(-1) | saturated).to(canonical.dtype)
        count = canonical.numel() if weights is None else weights.sum()
        reduction = (2 if self.row is SquaredError else 1) / self._divisor(count)

        def residual() -> Tensor:
            return at_least_float32(self.layout(arriving, n)[0]) / loss_scale / reduction

        return Terms(canonical, reduction, weights, True, residual, count)

    def check_arriving(self, f: Tensor, arriving: Tensor, terms: Terms, scale: Tensor | float) -> None:
        """Raise if the gradient at the output cannot be that of the named loss. Reads numbers: first use only.

        A gradient R (p - q) tells the target q, which must be a distribution; of a factor c < 1, q = (1-c) p + c y.
        """
        if self.row is SquaredError:
            return  # any gradient is that of some target
        gradient = at_least_float32(self.layout(arriving, terms.f.shape[0])[0]) / scale / terms.reduction
        tolerance = max(1e-3, 32 * max(torch.finfo(arriving.dtype).eps, torch.finfo(f.dtype).eps))
        if self.row is BinaryCrossEntropy:
            p = terms.f.sigmoid()
            p, gradient = torch.stack([p, 1 - p], -1), torch.stack([gradient, -gradient], -1)
        else:
            p = torch.zeros_like(terms.f) if self.name == "nll" else terms.f.softmax(-1)
            p, gradient = (x[(gradient != 0).any(-1)] for x in (p, gradient))
        q = p - gradient
        fits = (q.amin(-1) >= -tolerance) & ((q.sum(-1) - 1).abs() <= tolerance)
        if not bool((fits | ~torch.isfinite(gradient).all(-1)).all()):
            raise ValueError(
                f"the gradient that arrived at the model's output is not that of loss_fn={self.name!r} with "
                f"reduction={self.reduction!r}, no class weights and factor 1. Pass the loss module you call as "
                "loss_fn=, name the loss and the reduction= you use (and grad_scaler=, if one scales the loss), or "
                "call optimizer.observe(output, target, loss_fn, weight) before backward()"
            )
        factor = _shrunk(p, gradient)
        if factor is not None:
            raise ValueError(
                f"the loss seems to be multiplied by {factor:.4g}, and loss_fn={self.name!r} means factor 1. Pass the "
                "loss module you call as loss_fn=, or call optimizer.observe(output, target, loss_fn, weight) before "
                "backward()"
            )


def _shrunk(p: Tensor, gradient: Tensor) -> float | None:
    """c if gradient = c (p - y) for labels y and c < 1, beyond what smoothed labels could imitate; else None.

    For labels smoothed by 1 - c the ratios gradient / p would spread like (1 - c) / (C p); for a factor they do not.
    """
    labels = F.one_hot(gradient.argmin(-1), p.shape[-1]).bool()
    kept = ~labels & (p > 1e-6)
    ratio, spread = (gradient / p)[kept], (1 / (p.shape[-1] * p))[kept]
    if len(ratio) < 2:
        return None
    c = float(ratio.mean())
    imitation = (1 - c) * float(spread.std())
    return c if c < 0.99 and float((ratio - c).abs().max()) < 0.1 * imitation else None


# ------------------------------------------------------------------------------------------ registration

_NAMES: dict[str, Any] = {
    "cross_entropy": CrossEntropy,
    "nll": CrossEntropy,
    "mse": SquaredError,
    "bce_with_logits": BinaryCrossEntropy,
}
_MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.CrossEntropyLoss: ("cross_entropy", ("weight", "ignore_index", "label_smoothing")),
    nn.NLLLoss: ("nll", ("weight", "ignore_index")),
    nn.MSELoss: ("mse", ("weight",)),
    nn.BCEWithLogitsLoss: ("bce_with_logits", ("weight", "pos_weight")),
}


def register_loss(module_type: type[nn.Module], like: str, options: tuple[str, ...] = ()) -> None:
    """Say that a loss module computes one of the known losses.

    module_type: a subclass of nn.Module called as module(output, target), with an attribute `reduction`.
    like: "cross_entropy", "nll", "mse" or "bce_with_logits".
    options: names of the module's attributes that mean what they mean in torch's own module
        (`weight`, `ignore_index`, `label_smoothing`, `pos_weight`).
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_loss: got {module_type!r}; pass a subclass of torch.nn.Module")
    if like not in _NAMES:
        raise ValueError(f"register_loss: like={like!r}; allowed are {', '.join(map(repr, _NAMES))}")
    _MODULES[module_type] = (like, tuple(options))


def loss_of(loss_fn: nn.Module | str, reduction: str | None = None, class_dim: int | None = None) -> Loss:
    """The Loss of a torch loss module, read anew at each call so that changed settings count, or of a name."""
    if isinstance(loss_fn, str):
        if loss_fn not in _NAMES:
            allowed = ", ".join(map(repr, _NAMES))
            raise ValueError(
                f"loss_fn={loss_fn!r} is unknown; allowed are {allowed}, a torch loss module, or None "
                "together with optimizer.observe(output, target, loss_fn)"
            )
        return Loss(loss_fn, _NAMES[loss_fn], check_reduction(reduction or "mean"), class_dim)
    found = next((_MODULES[cls] for cls in type(loss_fn).__mro__ if cls in _MODULES), None)
    if found is None:
        allowed = ", ".join(cls.__name__ for cls in _MODULES)
        raise TypeError(
            f"loss_fn is a {type(loss_fn).__name__}; known are {allowed} and their subclasses. Name the loss it "
            "computes ('cross_entropy', 'mse', 'bce_with_logits', 'nll'), or register it with "
            "torchcurv.register_loss"
        )
    name, keys = found
    options = {key: getattr(loss_fn, key, None) for key in keys}
    options = {key: value for key, value in options.items() if value is not None}
    dim = class_dim if class_dim is not None else 1
    return Loss(name, _NAMES[name], check_reduction(reduction or str(loss_fn.reduction)), dim, options)


def check_reduction(reduction: str) -> str:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}; allowed are {', '.join(map(repr, REDUCTIONS))}")
    return reduction


def signal_count(terms: Terms) -> int:
    """Number of exact signals: one per output element of a sample."""
    return prod(terms.f.shape[1:])
