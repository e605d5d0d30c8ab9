"""Losses: L = R * sum_t w_t c(f_t, y_t), one row per c.

A row knows the number of terms behind R, the term weights w, a root S of the Hessian H = S S^T of c with respect
to the output, a label sampler of the model's own distribution, and the gradient of c. Everything is computed in
one layout, f [n, t, c]: n samples, t terms per sample that share the c outputs. An elementwise loss has t = 1 and
all its elements in c. Formulas: Martens, "New insights and perspectives on the natural gradient method" (2020).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from torchcurv.curv.losses.binary_cross_entropy import BinaryCrossEntropy
from torchcurv.curv.losses.cross_entropy import CrossEntropy
from torchcurv.curv.losses.loss import Loss
from torchcurv.curv.losses.squared_error import SquaredError
from torchcurv.curv.losses.terms import REDUCTIONS

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
