"""Rules of functions that couple the elements of a tensor, and of products of several tensors that depend on layers.

Each is exact for the H at its output that it is given. In the diagonal form that is a diagonal: what the function makes
of it beside the diagonal is dropped, and so is d²/du dv of two arguments u and v. Where both come from one tensor, and
no layer lies between, a chain takes the place of these rules (see chains.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.hessian.composed import Composed
from torchcurv.curv.hessian.local import Local, Propagation, congruent, with_residual
from torchcurv.curv.hessian.operation import Blank, Kept, Op, unflattened


def coupled(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
    """Any function, by its Jacobian and its second derivative row by row."""
    new = Composed([(op, [slot])]).at(op.inputs[slot], H, now)
    assert new is not None
    return new


def softmaxed(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
    """p = softmax(x): dp_k/dx_i = p_k (δ_ki - p_i), sum_k g_k d²p_k/dx_i² = p_i (g_i - a) (1 - 2 p_i) with a = g·p."""
    if not now.diag:
        return coupled(op, slot, H, now)
    p, dim = _probabilities(op, slot, H)
    new = p.square() * (H * (1 - 2 * p) + (H * p.square()).sum(dim, keepdim=True))

    def second(g: Tensor) -> Tensor:
        return p * (g - (g * p).sum(dim, keepdim=True)) * (1 - 2 * p)

    return with_residual(op, new, second, now)


def log_softmaxed(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
    """y = x - logsumexp(x): dy_k/dx_i = δ_ki - p_i, and sum_k g_k d²y_k/dx_i² = -(sum_k g_k) p_i (1 - p_i)."""
    if not now.diag:
        return coupled(op, slot, H, now)
    p, dim = _probabilities(op, slot, H)
    new = H * (1 - 2 * p) + p.square() * H.sum(dim, keepdim=True)
    return with_residual(op, new, lambda g: -g.sum(dim, keepdim=True) * p * (1 - p), now)


def _probabilities(op: Op, slot: int, H: Tensor) -> tuple[Tensor, int]:
    dim = op.option(1, "dim")
    if dim is None:
        raise op.refused("pass its dim")
    return op.read(op.leaves[slot], H.dtype).softmax(dim), dim


def gated(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
    """glu, y = u sigmoid(v) of the halves u and v: H_u = s² h, H_v = (u s')² h + u s'' g with s = sigmoid(v)."""
    if not now.diag:
        return coupled(op, slot, H, now)
    dim = op.option(1, "dim", -1)
    u, v = op.read(op.leaves[slot], H.dtype).chunk(2, dim)
    s = v.sigmoid()
    slope = s * (1 - s)
    new = torch.cat([s.square() * H, (u * slope).square() * H], dim)

    def second(g: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(g), g * u * slope * (1 - 2 * s)], dim)

    return with_residual(op, new, second, now)


def resampled(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
    """interpolate: a Kronecker product of maps M_d, one for each dimension of space, squared entry by entry."""
    if not now.diag:
        return congruent(op, slot, H, now)
    space = op.leaves[slot].shape[2:]
    for d, size in enumerate(space, start=2):
        # constant along the others, which the rows of M_d, whose sums are 1, leave alone
        ones = torch.eye(size, dtype=H.dtype, device=H.device)
        ones = ones.reshape(size, 1, *(size if k == d else 1 for k in range(2, 2 + len(space))))
        out = _run(op, slot, ones.expand(size, 1, *space))
        M = out.movedim(d, 1).flatten(2)[:, :, 0]  # in, out
        H = (H.movedim(d, -1) @ M.square().mT).movedim(-1, d)
    return H


def _run(op: Op, slot: int, x: Tensor) -> Tensor:
    leaves = [x if k == slot else op.read(leaf, x.dtype) for k, leaf in enumerate(op.leaves)]
    args, kwargs = unflattened(leaves, op.spec)
    out: Any = op.func(*args, **kwargs)
    found: Tensor = out
    return found


def contracted(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
    """matmul and its like: linear in each argument, with the others as entries: diag (M∘M)^T h."""
    if now.diag:
        return Local(op, slot, H.dtype, squared=True).pull(H)
    return coupled(op, slot, H, now) if len(op.inputs) > 1 else congruent(op, slot, H, now)


def summed_products(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
    """einsum: as `contracted`, unless others share an index that is summed without this argument."""
    if now.diag and not _entries_are_products(op, slot):
        return coupled(op, slot, H, now)
    return contracted(op, slot, H, now)


def _entries_are_products(op: Op, slot: int) -> bool:
    equation = op.leaves[0]
    if not isinstance(equation, str):
        return False
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        right = "".join(c for c in left if left.count(c) == 1)
    tensors = [k for k, leaf in enumerate(op.leaves) if isinstance(leaf, Kept | Blank)]
    own = tensors.index(slot)
    here = set(right) | set(terms[own]) | {"."}
    return all(set(term) <= here for k, term in enumerate(terms) if k != own)
