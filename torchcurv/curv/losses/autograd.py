"""Losses without a formula: any function of (output, target) that is a sum or a mean over samples.

The terms of one sample are the loss of that sample alone. Their gradient and Hessian with respect to the sample's
outputs come from autograd, vectorised over the samples, and the root is that of the Hessian's positive part.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchcurv.curv.linalg.symmetric import eigh
from torchcurv.curv.losses.formula import Layout, LossFormula, Target

MAX_OUTPUTS = 64  # of a sample: its Hessian has the square of that many numbers


@dataclass(frozen=True, eq=False)
class AutogradFormula(LossFormula):
    """c(f, y) = loss(f, y) of one sample, with H the positive part of d²c/df² wherever a root of it is asked for.

    A sample is one term, and all its outputs are c. loss: a module or a function of (output [rows, ...], target [rows,
    ...]). shape: of the output of one sample, [its rows, ...].
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[int, ...] = ()
    _roots: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    name: ClassVar[str] = "autograd"
    joint: ClassVar[bool] = True

    def of_shape(self, shape: tuple[int, ...]) -> AutogradFormula:
        return replace(self, shape=shape, _roots={})

    # -------------------------------------------------------------------------------- sample by sample

    def _of_sample(self, f: Tensor, y: Tensor) -> Tensor:
        """c of one sample, f [c]."""
        return self.loss(f.reshape(self.shape), y).sum()

    def _each(self, function: Callable[..., Tensor], f: Tensor, y: Tensor) -> Tensor:
        """A function of (f [c], y) for every sample of f [..., c]."""
        flat, targets = f.reshape(-1, f.shape[-1]), y.reshape(-1, *y.shape[f.dim() - 1 :])
        try:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                return torch.func.vmap(function)(flat, targets)
        except RuntimeError:  # a function that looks at its data cannot be vectorised
            with torch.enable_grad():
                return torch.stack([function(one, target) for one, target in zip(flat, targets, strict=True)])

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        return self._each(self._of_sample, f, y).detach().reshape(f.shape[:-1])

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        return self._each(torch.func.grad(self._of_sample), f, y).detach().reshape(f.shape)

    def _hessian(self, f: Tensor, y: Tensor) -> Tensor:
        """d²c/df² [..., c, c]."""
        if f.shape[-1] > MAX_OUTPUTS:
            raise NotImplementedError(
                f"the Hessian of a loss that is not known takes at most {MAX_OUTPUTS} outputs of a sample, and these "
                f"are {f.shape[-1]}: say what the loss computes by torchcurv.register_loss(type, formula=), or choose "
                'curv_type="empirical_fisher", which needs its gradient alone'
            )
        found = self._each(torch.func.jacrev(torch.func.grad(self._of_sample)), f, y).detach()
        return found.reshape(*f.shape, f.shape[-1])

    def _root(self, f: Tensor, y: Tensor) -> Tensor:
        """S [..., c, c], symmetric, with S² the positive part of the Hessian; kept for the f that was last asked."""
        held = self._roots.get(0)
        if held is not None and held[0] is f:
            return held[1]
        values, vectors = eigh(self._hessian(f, y))
        if isinstance(self.loss, torch.nn.L1Loss) or self.loss is torch.nn.functional.l1_loss:
            raise ValueError(
                "the second derivative of an absolute error is zero, so that its Gauss-Newton matrix and Hessian say "
                'nothing: choose curv_type="empirical_fisher"'
            )
        root = (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT
        self._roots[0] = f, root
        return root

    def root(self, f: Tensor, y: Any, v: Tensor) -> Tensor:
        return (self._root(f, y) @ v.unsqueeze(-1)).squeeze(-1)

    def hessian(self, f: Tensor, y: Any, v: Tensor) -> Tensor:
        """That of c itself, which may be indefinite."""
        return (self._hessian(f, y) @ v.unsqueeze(-1)).squeeze(-1)

    def hessian_diagonal(self, f: Tensor, y: Any) -> Tensor:
        return self._hessian(f, y).diagonal(dim1=-2, dim2=-1)

    def label_gradient(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        raise NotImplementedError(
            'curv_type="fisher" draws labels from the model\'s own distribution, and a loss that is not known has '
            'none: choose "ggn" or "empirical_fisher", or say what the loss computes by torchcurv.register_loss(type, '
            "formula=)"
        )

    # -------------------------------------------------------------------------------------- one call

    def read(self, f: Tensor, target: Tensor, layout: Layout, options: Mapping[str, Any]) -> Target:
        """The divisor is found by comparing the loss of all samples with those of single ones. Reads numbers."""
        n, rows = len(f), len(f) * self.shape[0]
        if not target.dim() or target.shape[0] != rows:
            raise ValueError(
                f"a loss that is not known is taken sample by sample: its target has shape {tuple(target.shape)}, and "
                f"its output {rows} rows. Give it a target [batch, ...], or call optimizer.observe(output, target, "
                'loss_fn, samples="batch")'
            )
        target = target.to(f.dtype) if target.is_floating_point() else target
        y = target.reshape(n, 1, self.shape[0], *target.shape[1:])
        each = self.value(f, y)
        with torch.enable_grad():
            whole = self.loss(f.reshape(rows, *self.shape[1:]), target).detach()
        if whole.dim():
            raise ValueError(
                f"a loss that is not known returned a tensor of shape {tuple(whole.shape)}: reduce it to a number, or "
                "call optimizer.observe for each part"
            )
        # single samples and all of them differ by the rounding of a sum of n numbers, and of what each goes through
        close = 100 * torch.finfo(each.dtype).eps * n**0.5 * each.abs().sum() + torch.finfo(each.dtype).tiny
        if bool((whole - each.sum()).abs() <= close):
            return Target(lambda: y, None, 1.0, True)
        if bool((whole * n - each.sum()).abs() <= close) or not bool(torch.isfinite(whole)):
            return Target(lambda: y, None, float(n), True)
        raise ValueError(
            f"the loss of all {n} samples is {float(whole):.4g}, and those of single samples have the sum "
            f"{float(each.sum()):.4g}: it is neither their sum nor their mean. Where samples meet in the loss, call "
            'optimizer.observe(output, target, loss_fn, samples="batch"); else say what it computes by '
            "torchcurv.register_loss(type, formula=)"
        )


class WatchedLoss(torch.nn.Module):
    """A function of (output, target) as a module, whose calls can be seen."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.__name__ = getattr(function, "__name__", "loss")

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.function(output, target)


def watched(loss_fn: Any) -> Any:
    """loss_fn, and a function as a module."""
    named = loss_fn is None or isinstance(loss_fn, str | torch.nn.Module)
    return loss_fn if named or not callable(loss_fn) else WatchedLoss(loss_fn)
