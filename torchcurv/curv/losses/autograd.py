"""Losses without a formula: any function of the outputs that is a sum or a mean over samples.

The loss L of one call is differentiated as a whole: its gradient and its Hessian with respect to the outputs are those
of the samples, side by side, as long as no sample's share depends on the outputs of another, which is looked at. The
root is that of the positive part of each sample's Hessian: exact for few outputs, by Lanczos' method for many.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchcurv.curv.linalg.matrix_root import positive_root_times
from torchcurv.curv.linalg.symmetric import eigh
from torchcurv.curv.losses.formula import Layout, LossFormula, Target
from torchcurv.curv.numerics import random_signs

MAX_OUTPUTS = 64  # of a sample whose Hessian is made as a matrix: it has the square of that many numbers
LANCZOS_STEPS = 32  # the root of an eigenvalue is off by about a 32nd of that of the largest, or less

_seeds = itertools.count()


def hessian_times(slope: Tensor, f: Tensor, v: Tensor) -> Tensor:
    """H_L v like f, for the slope dL/df made with create_graph=True."""
    if not slope.requires_grad:  # the loss is linear in f
        return torch.zeros_like(v)
    with torch.enable_grad():
        return torch.autograd.grad(slope, f, v.to(slope.dtype), retain_graph=True, materialize_grads=True)[0]


class SamplesMeet(Exception):
    """The loss is no sum over samples, and no mean."""


class WholeLoss:
    """L of one call at the outputs z of all samples, and its derivatives there.

    loss: a function of (z, target). n: of samples; c: of outputs of each; shape: of z.
    """

    def __init__(self, loss: Callable[[Tensor, Any], Tensor], z: Tensor, target: Any, n: int) -> None:
        self.loss, self.target, self.n, self.shape = loss, target, n, z.shape
        self.c = z.numel() // n
        with torch.enable_grad():
            self.z = z.detach().requires_grad_()
            self.value = loss(self.z, target)
            if self.value.dim():
                raise ValueError(
                    f"a loss that is not known returned a tensor of shape {tuple(self.value.shape)}: reduce it to a "
                    "number"
                )
            (slope,) = torch.autograd.grad(self.value, self.z, create_graph=True, materialize_grads=True)
        self._slope = slope
        self.gradient = slope.detach().reshape(n, self.c)

    def gradient_at(self, z: Tensor, target: Any) -> Tensor:
        """dL/dz at other outputs [rows, c]."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.loss(z, target), z, materialize_grads=True)
        return slope.reshape(-1, self.c)

    def hessian_times(self, v: Tensor) -> Tensor:
        """H v for v [n, c]; zeros where torch does not know the second derivative."""
        return self._product(v) if self.twice else torch.zeros_like(v)

    def _product(self, v: Tensor) -> Tensor:
        return hessian_times(self._slope, self.z, v.reshape(self.shape)).reshape(self.n, self.c).to(v.dtype)

    @cached_property
    def twice(self) -> bool:
        """Whether torch knows the second derivative."""
        try:
            self._product(torch.zeros_like(self.gradient))
        except RuntimeError as error:
            if "not implemented" not in str(error):
                raise
            return False
        return True

    @cached_property
    def _direction(self) -> Tensor:
        """A random one [n, c]."""
        generator = torch.Generator(self.z.device).manual_seed(next(_seeds))
        return torch.empty_like(self.gradient).normal_(generator=generator)

    @cached_property
    def flat(self) -> bool:
        """Whether the loss has no second derivative, here and where else it is looked for. Reads numbers."""
        if not self.twice:
            return True
        if bool(self.hessian_times(self._direction).any()) or not bool(self.gradient.any()):
            return False
        return not any(self._curved_at(z) for z in self._elsewhere())

    def _elsewhere(self) -> Iterator[Tensor]:
        """Outputs at which a loss that is flat here would be curved: near the target, and downhill, as far as a loss
        with this slope is zero. So a Huber loss far from its targets is told from an absolute error."""
        z, gradient = self.z.detach(), self.gradient.reshape(self.shape)
        if isinstance(self.target, Tensor) and self.target.is_floating_point() and self.target.shape == z.shape:
            for part in (1e-4, 1e-2, 0.1):
                yield self.target + part * (z - self.target)
        down = self.value.detach().abs() / gradient.square().sum()
        for part in (0.25, 0.5, 0.75, 0.9, 1.0):
            yield z - part * down * gradient

    def _curved_at(self, z: Tensor) -> bool:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.loss(z, self.target), z, create_graph=True, materialize_grads=True)
            return bool(hessian_times(slope, z, self._direction.reshape(self.shape)).any())

    @cached_property
    def diagonal(self) -> Tensor | None:
        """That of H [n, c], where there is nothing beside it."""
        z = random_signs(self.gradient, torch.Generator(self.z.device).manual_seed(next(_seeds)))
        other = z * self._direction.sign()
        first, second = z * self.hessian_times(z), other * self.hessian_times(other)
        close = 1e3 * torch.finfo(first.dtype).eps * first.norm()
        return first if bool((first - second).norm() <= close) else None

    @cached_property
    def matrices(self) -> Tensor:
        """H of each sample [n, c, c]."""
        return torch.stack([self.hessian_times(unit.expand(self.n, -1)) for unit in self._units()], -1)

    def _units(self) -> Tensor:
        return torch.eye(self.c, dtype=self.gradient.dtype, device=self.z.device)

    @cached_property
    def roots(self) -> Tensor:
        """S of each sample [n, c, c], symmetric, with S² the positive part of H."""
        values, vectors = eigh(self.matrices)
        return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT

    def root_times(self, v: Tensor) -> Tensor:
        """S v for v [n, c]."""
        if self.c <= MAX_OUTPUTS:
            return (self.roots @ v.unsqueeze(-1)).squeeze(-1)
        if self.diagonal is not None:
            return self.diagonal.clamp_min(0).sqrt() * v
        return positive_root_times(self.hessian_times, v, LANCZOS_STEPS)

    # ------------------------------------------------------------------------ what the loss is of samples

    def divisor(self) -> float | None:
        """1 if L is a sum over samples, n if it is a mean; None if it cannot be seen. Reads numbers.

        Each of two random halves of the samples is given to the loss alone. Of a sum, its gradient is the one it has
        among all; of a mean, over what is counted (a mask), the two are larger by 1 / w_1 and 1 / w_2, w_1 + w_2 = 1.
        """
        if self.n == 1:
            return 1.0
        generator = torch.Generator(self.z.device).manual_seed(next(_seeds))
        for batch in self._batches():
            halves = torch.randperm(self.n, generator=generator, device=self.z.device).tensor_split(2)
            try:
                among = self._gradient_of(batch)
                weights = [self._weight(among[half], batch[half]) for half in halves]
            except SamplesMeet:
                raise
            except Exception:  # of a function that holds something for each sample
                if self._change(*halves):
                    raise SamplesMeet from None
                return None
            close = 1e3 * torch.finfo(self.gradient.dtype).eps
            seen = [weight for weight in weights if weight is not None]
            if len(seen) == 2:
                if all(abs(weight - 1) <= close for weight in seen):
                    return 1.0
                if abs(sum(seen) - 1) <= close:
                    return float(self.n)
                raise SamplesMeet
        return None

    def _batches(self) -> Iterator[Tensor]:
        """The samples; and the same, with one that has a gradient in the place of each that has none, so that either
        half says something."""
        every, speaks = torch.arange(self.n, device=self.z.device), self.gradient.any(1)
        yield every
        loud = speaks.nonzero().squeeze(1)
        if len(loud):
            yield every.where(speaks, loud[every % len(loud)])

    def _gradient_of(self, samples: Tensor) -> Tensor:
        """Of a batch of these samples."""
        return self.gradient_at(self._part(self.z, samples), self._part(self.target, samples))

    def _weight(self, among: Tensor, samples: Tensor) -> float | None:
        """By what the gradient of some samples in a batch of their own is larger than among all; None: it is zero."""
        alone = self._gradient_of(samples)
        size = alone.square().sum()
        if not torch.isfinite(size) or (size == 0 and not among.any()):
            return None
        weight = (among * alone).sum() / size
        if not weight > 0 or not self._close(weight * alone, among):
            raise SamplesMeet
        return float(weight)

    def _part(self, x: Any, samples: Tensor) -> Any:
        if not isinstance(x, Tensor) or x.shape[:1] != self.shape[:1]:
            return x
        return x.detach().unflatten(0, (self.n, -1))[samples].flatten(0, 1)

    def _change(self, kept: Tensor, moved: Tensor) -> bool:
        """Whether the gradient of some samples changes when others have other outputs."""
        flat = self.z.detach().reshape(self.n, self.c)
        # Between two outputs that there are is one that the loss allows, and unlike an exchange it shows in what does
        # not depend on the order of the samples.
        donors = kept[torch.arange(len(moved), device=kept.device) % len(kept)]
        other = flat.index_copy(0, moved, torch.lerp(flat[moved], flat[donors], 0.3)).reshape(self.shape)
        return not self._close(self.gradient_at(other, self.target)[kept], self.gradient[kept])

    def _close(self, x: Tensor, y: Tensor) -> bool:
        """Another share is off by a part of itself; sums in another order are off by some roundings."""
        return bool((x - y).norm() <= 1e3 * torch.finfo(y.dtype).eps * y.norm())


@dataclass(eq=False)
class AutogradFormula(LossFormula):
    """c = L / R of one call of a loss, with H the positive part of each sample's d²c/df² where a root of it is asked.

    A sample is one term, and all its outputs are c. Of a loss that has no second derivative (an absolute error, a
    hinge), or whose second derivative torch does not know, H is the outer product of the gradient.

    loss: a module or a function of (output [rows, ...], target). shape: of the output of one sample, [its rows, ...].
    weights: of a loss that is not reduced, those of its elements.
    `read` binds it to one call; y [n, t] is then the numbers of samples, and f their outputs in that call.
    """

    loss: Callable[[Tensor, Any], Tensor]
    shape: tuple[int, ...] = ()
    weights: Tensor | None = None

    name: ClassVar[str] = "autograd"
    joint: ClassVar[bool] = True

    def of_shape(self, shape: tuple[int, ...]) -> AutogradFormula:
        return replace(self, shape=shape)

    def weighted(self, weights: Tensor) -> AutogradFormula:
        return replace(self, weights=weights)

    # -------------------------------------------------------------------------------- one call

    def read(self, f: Tensor, target: Any, layout: Layout, options: Mapping[str, Any]) -> Target:
        n = len(f)
        z = f.detach().reshape(n * self.shape[0], *self.shape[1:])
        target = target.to(f.dtype) if isinstance(target, Tensor) and target.is_floating_point() else target
        self.whole = WholeLoss(self._reduced, z, target, n)
        self.rows = torch.arange(n, device=f.device).unsqueeze(1)
        said = getattr(self.loss, "divisor", None)  # of a call that knows
        known = None if said is None or self.weights is not None else said()
        if known is None and bool(torch.isfinite(self.whole.gradient).all()):  # else it is left out of the average
            known = self._seen()
        self.divisor_known = known is not None or not bool(self.whole.gradient.any())  # else it is nowhere asked
        self.scale = float(n) if known is None else known
        rows = self.rows
        return Target(lambda: rows, None, self.scale, True)

    def _seen(self) -> float | None:
        try:
            return self.whole.divisor()
        except SamplesMeet:
            raise ValueError(
                f"samples meet in the loss {_name_of(self.loss)!r}: it is neither a sum over the {self.whole.n} "
                "samples of the batch nor their mean, since the share of one changes with the others. Take the whole "
                'batch as one sample by optimizer.observe(output, target, loss_fn, samples="batch"), or say what the '
                "loss computes by torchcurv.register_loss(type, formula=)"
            ) from None

    def _reduced(self, z: Tensor, target: Any) -> Tensor:
        loss = self.loss(z, target)
        return loss if self.weights is None else (loss * self.weights.to(loss.dtype)).sum()

    def _of(self, x: Tensor, y: Tensor) -> Tensor:
        """The rows [..., c] that y stands for of x [n, c], times 1 / R."""
        x = x * self.scale
        return x.unsqueeze(1) if y is self.rows else x[y]

    def _all(self, v: Tensor, y: Tensor) -> Tensor:
        """[n, c] from those of the samples y stands for."""
        flat = v.reshape(-1, v.shape[-1])
        if y is self.rows:
            return flat
        return flat.new_zeros(self.whole.n, flat.shape[-1]).index_copy(0, y.flatten(), flat)

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """c [n, t]: of L it is known as a whole, and counted in equal parts."""
        part = self.whole.value.detach().to(f.dtype) / self.whole.n
        return self._of(part.expand(self.whole.n, 1), y).squeeze(-1)

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        return self._of(self.whole.gradient.to(f.dtype), y)

    def _outer(self) -> bool:
        """Whether H is the outer product of the gradient; said once."""
        if not self.whole.flat:
            return False
        what = "has no second derivative" if self.whole.twice else "cannot be differentiated twice by torch"
        if not self.divisor_known:
            raise ValueError(
                f"the loss {_name_of(self.loss)!r} {what}, and whether it is a sum or a mean over samples cannot be "
                "seen, which its empirical Fisher depends on: pass what it holds for each sample as a part of the "
                "target"
            )
        warnings.warn(
            f"the loss {_name_of(self.loss)!r} {what}: the outer product of its gradients at the outputs stands for "
            'it, as in curv_type="empirical_fisher"',
            stacklevel=2,
        )
        return True

    def root(self, f: Tensor, y: Any, v: Tensor) -> Tensor:
        if self._outer():
            return self.gradient(f, y) * v[..., :1]
        found = self.whole.root_times(self._all(v, y)) * self.scale**-0.5
        return self._of(found, y).reshape(v.shape)

    def hessian(self, f: Tensor, y: Any, v: Tensor) -> Tensor:
        """That of c itself, which may be indefinite."""
        return self._of(self.whole.hessian_times(self._all(v, y)), y).reshape(v.shape)

    def hessian_diagonal(self, f: Tensor, y: Any) -> Tensor:
        whole = self.whole
        if whole.diagonal is not None:
            return self._of(whole.diagonal, y)
        units = (unit for unit in torch.eye(whole.c, dtype=f.dtype, device=f.device))
        return self._of(torch.stack([whole.hessian_times(u.expand(whole.n, -1)) @ u for u in units], -1), y)

    def label_gradient(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        raise NotImplementedError(
            'curv_type="fisher" draws labels from the model\'s own distribution, and a loss that is not known has '
            'none: choose "ggn" or "empirical_fisher", or say what the loss computes by torchcurv.register_loss(type, '
            "formula=)"
        )


def _name_of(loss: Any) -> str:
    return str(getattr(loss, "__name__", type(loss).__name__))


class WatchedLoss(torch.nn.Module):
    """A function of the output and more as a module, whose calls can be seen."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.__name__ = getattr(function, "__name__", "loss")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(*args, **kwargs)


def watched(loss_fn: Any) -> Any:
    """loss_fn, and a function as a module."""
    named = loss_fn is None or isinstance(loss_fn, str | torch.nn.Module)
    return loss_fn if named or not callable(loss_fn) else WatchedLoss(loss_fn)
