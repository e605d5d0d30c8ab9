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


def attended(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
    """y = P v with P = softmax(s q k^T + mask), and a_ts = P_ts (v_s - y_t), a vector over the outputs d:

        dy_t/dq_ti = s sum_s a_ts k_si        dy_t/dk_si = s a_ts q_ti        dy_td/dv_sd = P_ts

    With G = g v^T and c_ts = P_ts (G_ts - sum_s P_ts G_ts), sum_td g_td d²y_td is, for q_ti² and for k_si²,

        s² sum_s c_ts k_si² - 2 s² (sum_s c_ts k_si) (sum_s P_ts k_si)        s² sum_t c_ts (1 - 2 P_ts) q_ti²
    """
    if op.option(4, "dropout_p", 0.0) or op.option(7, "enable_gqa", False):
        raise op.refused("it is known without dropout and enable_gqa")
    if not now.diag:
        return coupled(op, slot, H, now)
    given = [op.option(k, name) for k, name in enumerate(("query", "key", "value"))]
    q, k, v = (op.read(leaf, H.dtype) for leaf in given)
    scale = op.option(6, "scale")
    s = q.shape[-1] ** -0.5 if scale is None else scale
    P = _scores(op, q, k, s).softmax(-1)
    y, mean_k, to_query = P @ v, P @ k, op.leaves[slot] is given[0]
    if op.leaves[slot] is given[2]:
        return (P.square().mT @ H).sum_to_size(v.shape)
    if to_query:
        new = torch.zeros_like(mean_k)
        for d in range(v.shape[-1]):  # all at once take the memory of an output times that of a key
            new += H[..., d, None] * (P @ (v[..., d, None] * k) - y[..., d, None] * mean_k).square()
    else:
        spread = H @ v.square().mT - 2 * (H * y) @ v.mT + (H * y.square()).sum(-1, keepdim=True)
        new = (P.square() * spread).mT @ q.square()

    def second(g: Tensor) -> Tensor:
        G = g @ v.mT
        c = P * (G - (P * G).sum(-1, keepdim=True))
        if to_query:
            return (s**2 * (c @ k.square() - 2 * (c @ k) * mean_k)).sum_to_size(q.shape)
        return (s**2 * (c * (1 - 2 * P)).mT @ q.square()).sum_to_size(k.shape)

    return with_residual(op, (s**2 * new).sum_to_size((q if to_query else k).shape), second, now)


def _scores(op: Op, q: Tensor, k: Tensor, scale: float) -> Tensor:
    mask, scores = op.option(3, "attn_mask"), scale * q @ k.mT
    if op.option(5, "is_causal", False):
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if mask is None:
        return scores
    mask = op.read(mask, q.dtype)
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
