"""Modules whose gradient is preconditioned by what comes into them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from torchcurv.curv.checks import check_number
from torchcurv.curv.layers.table import LINEAR, VIEWS
from torchcurv.curv.linalg.symmetric import inverse_spd
from torchcurv.curv.numerics import at_least_float32, full_precision


class ISAACLinear(nn.Linear):
    """nn.Linear whose weight gradient is preconditioned by the batch that came in (ISAAC).

    For the rows a [b, in] that come in, all leading dimensions counted, and the gradients G [b, out] at the output,
    `backward()` leaves in `weight.grad`

        la G^T a (a^T a / b + la I)^-1  =  G^T (I + a a^T / (b la))^-1 a

    by the form that inverts the smaller matrix. The gradients of the bias and of the input are those of nn.Linear;
    for la -> ∞ so is that of the weight. Any optimizer goes behind it; the parameters have nn.Linear's names. Over
    several backward calls the preconditioned gradients add up, each with its own rows.

    Args:
        in_features, out_features, bias, device, dtype: as of nn.Linear.
        la: the regularisation λ > 0, in units of a squared element of the input; an attribute that may be changed.

    The products are taken in float32, or in float64 for what comes in float64, also under autocast. Where a batch is
    so far from well-conditioned that λ is lost in rounding, the gradient is shortened in the place of being wrong.

    Raises:
        TypeError, ValueError: if la is not a finite number > 0.
        RuntimeError: by torch, where its gradient is to be differentiated again (create_graph=True).

    The optimizers of torchcurv cannot take curvature from it: put its parameters into a group with approx=None, or use
    nn.Linear with curv_type="input", which is the same with a running average.

    Source: Petersen et al., "ISAAC Newton: input-based approximate curvature for Newton's method" (2023).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        la: float,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_number("la", la, lambda x: 0 < x < math.inf, "a finite number > 0")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.la = la

    def forward(self, input: Tensor) -> Tensor:
        return _LinearByInputs.apply(input, self.weight, self.bias, self.la)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, la={self.la:g}"


class _LinearByInputs(torch.autograd.Function):
    """x W^T + b, with `input_preconditioned` for the gradient of W."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, la: float) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, float], output: Tensor) -> None:
        x, weight, bias, ctx.la = inputs
        by_x, by_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if by_weight else None, weight if by_x else None)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (x, weight), dtypes = ctx.saved_tensors, ctx.dtypes
        at_x = at_weight = at_bias = None
        with full_precision(gradient.device.type):
            if ctx.needs_input_grad[0]:
                at_x = (gradient @ weight.to(gradient.dtype)).to(dtypes[0])
            rows = _rows(gradient)
            if ctx.needs_input_grad[1]:
                at_weight = input_preconditioned(rows, _rows(x), ctx.la).to(dtypes[1])
            if ctx.needs_input_grad[2]:
                at_bias = rows.sum(0).to(dtypes[2])
        return at_x, at_weight, at_bias, None


def _rows(x: Tensor) -> Tensor:
    """[..., d] -> [b, d]."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def input_preconditioned(gradient: Tensor, a: Tensor, la: float) -> Tensor:
    """la G^T a (a^T a / b + la I)^-1 [o, i] for G [b, o] and a [b, i], by the smaller of the two inverses."""
    G, a = at_least_float32(gradient), at_least_float32(a)
    b, i = a.shape
    if b == 0:
        return G.mT @ a
    if b < i:
        inverse = inverse_spd((a @ a.mT).unsqueeze(0), b * la)[0][0]
        return (inverse @ G).mT @ a * (b * la)
    inverse = inverse_spd((a.mT @ a / b).unsqueeze(0), la)[0][0]
    return (G.mT @ a) @ inverse * la


VIEWS[ISAACLinear] = replace(
    LINEAR,
    refuses=lambda module: (
        "its weight gradient is already preconditioned by its inputs, and is not that of the loss; use nn.Linear with "
        'curv_type="input" for the same direction'
    ),
)
