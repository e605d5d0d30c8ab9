"""Jacobians of a network's outputs with respect to some of its parameters, sample by sample.

A call is (args, kwargs); all of its tensors that have a dimension have the samples in the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call, jacrev, vmap

from torchcurv.curv.approximations.factor import is_eigenform_over
from torchcurv.curv.approximations.factors import Eigen
from torchcurv.curv.approximations.rows import JacobianRows, root_scale
from torchcurv.curv.posterior.gaussian import GaussianBlock
from torchcurv.curv.statistics.layer import LayerData, rotated

Call = tuple[tuple[Any, ...], dict[str, Any]]
Tensors = dict[str, Tensor]


class Network:
    """f(x; θ) as a function of the parameters by name.

    output_fn: from the model's output to f.
    """

    def __init__(self, model: nn.Module, output_fn: Callable[[Any], Tensor] | None) -> None:
        self.model, self.output_fn = model, output_fn

    def __call__(self, at: Tensors, call: Call) -> Tensor:
        output = functional_call(self.model, at, call[0], call[1])
        return output if self.output_fn is None else self.output_fn(output)

    def jacobians(self, at: Tensors, call: Call) -> Tensors:
        """df/dθ by name [n, C, *shape], the outputs of a sample flattened to C."""

        def of_one(at: Tensors, call: Call) -> Tensor:
            return self(at, samples_of(call, None)).flatten()

        where = _mapped(call, lambda x: 0 if _by_sample(x) else None)
        try:
            return vmap(jacrev(of_one), in_dims=(None, where))(at, call)
        except RuntimeError:  # some of torch's operations cannot be batched over samples, such as those of an LSTM
            if is_training(self.model):
                raise
        return self.jacobians_one_by_one(at, call)

    @torch.enable_grad()
    def jacobians_one_by_one(self, at: Tensors, call: Call) -> Tensors:
        """The same by a backward pass for every output of every sample."""
        at = {name: x.clone().requires_grad_() for name, x in at.items()}
        rows: list[list[Tensor]] = [[] for _ in at]
        for n in range(batch_size(call)):
            f = self(at, samples_of(call, slice(n, n + 1))).flatten()
            each = [grad(element, list(at.values()), retain_graph=True, materialize_grads=True) for element in f]
            for row, gradients in zip(rows, zip(*each, strict=True), strict=True):
                row.append(torch.stack(gradients))
        return {name: torch.stack(row) for name, row in zip(at, rows, strict=True)}


def covariance_of_rows(part: GaussianBlock, rows: JacobianRows) -> Tensor:
    """J Σ J^T [n, C, C] of one layer, the rows of J being known by their factors a and s."""
    block, (layer,) = part.block, part.block.layers
    factor, uses = part.factor, [own for stats in rows.stats for own in stats.uses]
    simple = all(len(own) == 1 and not own[0].transposed and own[0].inputs.tokens is None for own in uses)
    if simple and is_eigenform_over(factor, layer.shape):
        return _factored(part, factor, rows, uses)
    J = torch.cat([stats.layer_rows(0).reshape(*stats.shape, *layer.shape) for stats in rows.stats]).transpose(0, 1)
    layout = block.layout
    solved = layout.join(part.covariance_times(layout.split([J.flatten(0, 1)])))[0]
    return J.flatten(2) @ solved.reshape(*J.shape[:2], -1).mT


def _factored(part: GaussianBlock, factor: Eigen, rows: JacobianRows, uses: list[list[LayerData]]) -> Tensor:
    """J Σ J^T where Σ = Q diag(w) Q^T is Kronecker-factored or diagonal, Q = left ⊗ right.

    A row is sum_r s a^T, and its factors are rotated instead of itself, s' = left^T s and a' = right^T a. At one
    position (J Σ J^T)_nvw = sum_o s'_vno s'_wno sum_i w_oi a'_ni², and the row is never formed.
    """
    s = torch.cat([use.s * root_scale(stats, use.s) for stats, (use,) in zip(rows.stats, uses, strict=True)])
    a = uses[0][0].inputs.with_ones
    s = s if factor.left is None else rotated(s, factor.left)
    a = a if factor.right is None else rotated(a, factor.right)
    weights = 1 / (factor.values.reshape(part.block.layers[0].shape) + part.damping) / part.scale
    if s.shape[2] == 1:
        s = s.squeeze(2).transpose(0, 1)
        inner = torch.einsum("ngi,goi->ngo", a.squeeze(1).square(), weights)
        return (s * inner.unsqueeze(1)).flatten(2) @ s.flatten(2).mT
    J = (torch.einsum("vnrgo,nrgi->nvgoi", s, a) * weights.sqrt()).flatten(2)
    return J @ J.mT


def is_training(model: nn.Module) -> bool:
    return any(module.training for module in model.modules())


def batch_size(call: Call) -> int:
    sizes: list[int] = []
    _mapped(call, lambda x: sizes.append(len(x)) if _by_sample(x) else None)
    if len(set(sizes)) != 1 or not sizes[0]:
        raise ValueError(
            f"the inputs have {sorted(set(sizes))} samples: dimension 0 of every tensor must count the same samples, "
            "one at least"
        )
    return sizes[0]


def samples_of(call: Call, index: slice | None) -> Call:
    """The call for some samples; None: for one, whose tensors lack the dimension of the batch."""
    return _mapped(call, lambda x: x[index] if isinstance(x, Tensor) and (index is None or x.dim()) else x)


def _mapped(value: Any, f: Callable[[Any], Any]) -> Any:
    """The same nest of tuples, lists and dicts with f of what it holds."""
    if isinstance(value, dict):
        return {key: _mapped(x, f) for key, x in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_mapped(x, f) for x in value)
    return f(value)


def _by_sample(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0
