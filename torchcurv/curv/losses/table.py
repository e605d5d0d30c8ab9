"""Losses: L = R * sum_t w_t c(f_t, y_t), one formula per c.

A formula (formula.py) says the value of c, its gradient and a root S of its Hessian H = S S^T with respect to the
output, and the gradient at labels of the model's own distribution. With the settings of a loss module (loss.py) come
the number of terms behind R and their weights w. Everything is computed in one layout, f [n, t, c]: n samples, t terms
per sample that share the c outputs. Formulas: Martens, "New insights and perspectives on the natural gradient method"
(2020).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from torchcurv.curv.losses.autograd import AutogradFormula
from torchcurv.curv.losses.binary_cross_entropy import BinaryCrossEntropy
from torchcurv.curv.losses.cross_entropy import CrossEntropy
from torchcurv.curv.losses.formula import LossFormula
from torchcurv.curv.losses.loss import Loss
from torchcurv.curv.losses.squared_error import SquaredError
from torchcurv.curv.losses.terms import REDUCTIONS

FORMULAS: dict[str, LossFormula] = {}  # by the names that `loss_fn=` knows
MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {}  # names of a formula, and of its options


def register_loss(
    module_type: type[nn.Module],
    like: str | None = None,
    options: tuple[str, ...] = (),
    *,
    formula: LossFormula | None = None,
    name: str | None = None,
) -> None:
    """Say what a loss module computes: one of the known losses, or a formula of your own.

    module_type: a subclass of nn.Module called as module(output, target), with an attribute `reduction`.
    like: the name of a known loss: "cross_entropy", "nll", "mse", "bce_with_logits", or that of a formula registered
        before.
    options: names of the module's attributes that mean what they mean in torch's own module (`weight`, `ignore_index`,
        `label_smoothing`, `pos_weight`), as far as the formula knows them (`LossFormula.options`).
    formula: an instance of a subclass of torchcurv.LossFormula, in place of `like`.
    name: by which `loss_fn=` may know it from now on; None: the formula's own.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_loss: got {module_type!r}; pass a subclass of torch.nn.Module")
    if (like is None) == (formula is None):
        raise ValueError("register_loss: pass either like=, the name of a known loss, or formula=")
    if formula is not None:
        like = _named(formula, name)
    if like not in FORMULAS:
        raise ValueError(f"register_loss: like={like!r}; allowed are {', '.join(map(repr, FORMULAS))}")
    unknown = sorted(set(options) - set(FORMULAS[like].options))
    if unknown:
        raise ValueError(
            f"register_loss: the formula of {like!r} does not know the options {', '.join(unknown)}; it knows "
            f"{', '.join(FORMULAS[like].options) or 'none'}"
        )
    MODULES[module_type] = (like, tuple(options))


def _named(formula: LossFormula, name: str | None) -> str:
    """The name under which a formula is kept from now on."""
    if not isinstance(formula, LossFormula):
        raise TypeError(f"register_loss: formula={formula!r}; pass an instance of a subclass of LossFormula")
    name = formula.name if name is None else name
    held = FORMULAS.get(name)
    if held is not None and (type(held).__module__, type(held).__qualname__) != (
        type(formula).__module__,
        type(formula).__qualname__,
    ):
        raise ValueError(
            f"register_loss: the name {name!r} is that of {type(held).__name__}: give {type(formula).__name__} "
            "another one with name="
        )
    FORMULAS[name] = formula
    return name


def loss_of(loss_fn: Callable[..., Tensor] | str, reduction: str | None = None, class_dim: int | None = None) -> Loss:
    """The Loss of a torch loss module, read anew at each call so that changed settings count, or of a name.

    One that is not registered, a subclass with a forward of its own, or a function, is taken by autograd.
    """
    if isinstance(loss_fn, str):
        if loss_fn not in FORMULAS:
            allowed = ", ".join(map(repr, FORMULAS))
            raise ValueError(
                f"loss_fn={loss_fn!r} is unknown; allowed are {allowed}, a torch loss module, or None "
                "together with optimizer.observe(output, target, loss_fn)"
            )
        return Loss(loss_fn, FORMULAS[loss_fn], check_reduction(reduction or "mean"), class_dim)
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn is a {type(loss_fn).__name__}; pass a loss module, a function of (output, target), the name of a "
            f"loss ({', '.join(map(repr, FORMULAS))}), or None together with optimizer.observe"
        )
    known = next((cls for cls in type(loss_fn).__mro__ if cls in MODULES), None)
    if known is None or type(loss_fn).forward is not known.forward:  # type: ignore[attr-defined]
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        said = getattr(loss_fn, "reduction", None)
        return Loss(name, AutogradFormula(loss_fn), said if said in REDUCTIONS else "mean", class_dim)
    name, keys = MODULES[known]
    assert isinstance(loss_fn, nn.Module)
    options = {key: getattr(loss_fn, key, None) for key in keys}
    options = {key: value for key, value in options.items() if value is not None}
    dim = class_dim if class_dim is not None else 1
    formula = FORMULAS[name].for_module(loss_fn)
    return Loss(name, formula, check_reduction(reduction or str(loss_fn.reduction)), dim, options)


def check_reduction(reduction: str) -> str:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}; allowed are {', '.join(map(repr, REDUCTIONS))}")
    return reduction


register_loss(nn.CrossEntropyLoss, formula=CrossEntropy(), options=CrossEntropy.options)
register_loss(
    nn.NLLLoss, formula=CrossEntropy(of_log_probabilities=True), options=("weight", "ignore_index"), name="nll"
)
register_loss(nn.MSELoss, formula=SquaredError(), options=SquaredError.options)
register_loss(nn.BCEWithLogitsLoss, formula=BinaryCrossEntropy(), options=BinaryCrossEntropy.options)
