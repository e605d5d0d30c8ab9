"""What the formula of a loss must say: c(f, y) in one layout, where L = R sum_t w_t c(f_t, y_t).

A formula is asked for four things, the value, the gradient and a root of the Hessian of c with respect to f, and the
gradient at a label of the model's own; the rest follows from these, and is overridden where there is a shorter way.

    f [n, t, c]    n samples, t terms of a sample, c outputs of a term; an elementwise loss has t = 1, its elements in c
    y [n, t, c]    the target in the same layout: values, or the probabilities of classes
    H = S S^T      the Hessian of c with respect to the c outputs of a term
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from torchcurv.curv.numerics import random_signs

Layout = Callable[[Tensor], Tensor]  # from a tensor that fits the output to [n, t, c], in the dtype of f


class Target(NamedTuple):
    """What the target of one call says.

    y: [n, t, c], computed when asked. weights: w [n, t] or [n, t, c] of the terms; None: all are 1.
    divisor: what a mean divides by. uniform: whether every weight is 0 or one common number.
    """

    y: Callable[[], Tensor]
    weights: Tensor | None
    divisor: Tensor | float
    uniform: bool


class LabelFactor(NamedTuple):
    """What a gradient says of the factor of a loss whose targets are labels.

    value: a 0-d tensor. known: whether the terms determine it: where all are right and saturated they do not.
    fits: whether it is known, and the gradient is that of labels times this value, and of nothing else that is likely.
    close: whether the gradient is that of labels times this value. alone: whether it is, of one term of two classes:
    that may as well be a soft label. 0-d bool tensors.
    """

    value: Tensor
    known: Tensor
    fits: Tensor
    close: Tensor
    alone: Tensor


class KnownByName:
    """What the gradient at the output tells of a loss that is known by its name alone."""

    def counted(self, f: Tensor, gradient: Tensor) -> Tensor | None:
        """w [n, t] of the terms that the gradient at f shows to count (1) or not (0); None: all count."""
        return None

    def factor_in(self, f: Tensor, gradient: Tensor, counted: Tensor | None, tolerance: float) -> LabelFactor | None:
        """The factor k for which `gradient` is k dc/df at targets that are labels, from all terms together.

        counted: as it is returned above. None: the gradient of this loss tells no factor.
        """
        return None

    def check_gradient(self, f: Tensor, gradient: Tensor, tolerance: float) -> str | None:
        """Why `gradient` cannot be dc/df at any target; None if it can. Reads numbers.

        tolerance: what rounding makes of a probability.
        """
        return None


class LossFormula(KnownByName, ABC):
    """c(f, y) of a loss, up to a constant in f.

    elementwise: whether each element of the output is a term of its own, so that H is diagonal.
    factor: R = factor, or factor / count for a mean.
    gaussian: whether c is 1/2 |f - y|², so that the loss has a noise variance.
    hessian_needs_target: whether H depends on y. Where it does not, y is None wherever only H is asked for; the exact
        Fisher is then the GGN (c being the negative log likelihood of `label_gradient`'s labels), and the loss may be
        known by its name alone.
    options: the settings of a loss module that `read` understands.
    joint: whether a sample is one term, whose c outputs are all of its own, in any shape; y is [n, 1, ...] then.
    divisor_known: whether `read` found out what a mean divides by.
    """

    name: ClassVar[str] = ""  # by which `loss_fn=` may know it; by default that of the class
    elementwise: ClassVar[bool] = False
    factor: ClassVar[float] = 1.0
    gaussian: ClassVar[bool] = False
    hessian_needs_target: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ()
    joint: ClassVar[bool] = False
    divisor_known: bool = True

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @abstractmethod
    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """c [n, t], or [n, t, c] of an elementwise loss."""

    @abstractmethod
    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """dc/df [n, t, c]."""

    @abstractmethod
    def root(self, f: Tensor, y: Any, v: Tensor) -> Tensor:
        """S v for v like f. Of an elementwise loss S is the square root of a diagonal."""

    @abstractmethod
    def label_gradient(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """dc/df at labels drawn from the model's own distribution."""

    # ------------------------------------------------------------------------------------- derived

    def draw(self, f: Tensor, y: Any, generator: torch.Generator | None) -> Tensor:
        """S r for random signs r: the mean of its outer product is H."""
        return self.root(f, y, random_signs(f, generator))

    def column(self, f: Tensor, y: Any, k: int) -> Tensor:
        """S e_k for f and y [..., c]."""
        unit = torch.zeros_like(f)
        unit[..., k] = 1
        return self.root(f, y, unit)

    def hessian(self, f: Tensor, y: Any, v: Tensor) -> Tensor:
        """H v = S (S^T v)."""
        if self.elementwise:
            return self.root(f, y, self.root(f, y, v))
        transposed = torch.func.vjp(partial(self.root, f, y), torch.zeros_like(f))[1]
        return self.root(f, y, transposed(v)[0])

    def hessian_diagonal(self, f: Tensor, y: Any) -> Tensor:
        """H_jj = sum_k S_jk²."""
        if self.elementwise:
            return self.root(f, y, torch.ones_like(f)).square()
        total = torch.zeros_like(f)
        for k in range(f.shape[-1]):
            total += self.column(f, y, k).square()
        return total

    def arriving_gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """What backward brings to f: dc/df, unless f is kept to a surface, where c stands for another function."""
        return self.gradient(f, y)

    # -------------------------------------------------------------------------- one call of a loss

    def for_module(self, module: nn.Module) -> LossFormula:
        """The formula with the settings of a loss module; raises ValueError on settings that it does not know."""
        return self

    def read(self, f: Tensor, target: Tensor, layout: Layout, options: Mapping[str, Any]) -> Target:
        """The target of one call. Labels of classes become their one-hot rows.

        A `weight` multiplies the elements of an elementwise loss, and a mean still divides by their number.
        """
        if not self.elementwise and options:
            raise NotImplementedError(
                f"{type(self).__name__} lists the options {', '.join(options)}, and does not say what they do to a "
                "loss of several outputs: define its `read`"
            )
        if not self.elementwise and not target.is_floating_point():
            labels = target.reshape(f.shape[:2])
            return Target(lambda: one_hot(labels, f), None, float(labels.numel()), True)
        y, weights = layout(target), options.get("weight")
        weights = None if weights is None else layout(weights)
        divisor = f.numel() if self.elementwise else f.shape[:2].numel()
        return Target(lambda: y, weights, divisor, weights is None)

    def of_shape(self, shape: tuple[int, ...]) -> LossFormula:
        """The formula for samples whose outputs have this shape."""
        return self

    def weighted(self, weights: Tensor) -> LossFormula:
        """Of a joint loss that is not reduced: the sum of its elements times these weights."""
        raise NotImplementedError(f"{type(self).__name__} is joint: reduce the loss to a number")

    # ----------------------------------------------------------------------------------- predictions

    def predictive(self, f: Tensor, variance: Tensor) -> Tensor:
        """The mean of the targets where the outputs are N(f, variance), approximately; in the layout of f."""
        raise NotImplementedError(
            f"the loss {self.name!r} says no predictive distribution of outputs that are Gaussian: use predict, or "
            f"define {type(self).__name__}.predictive"
        )


def one_hot(labels: Tensor, f: Tensor) -> Tensor:
    """[n, t] -> [n, t, c] in the dtype of f."""
    return torch.zeros_like(f).scatter(-1, labels.unsqueeze(-1), 1)
