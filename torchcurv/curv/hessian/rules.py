"""How H goes through each torch function: a table of rules (see propagate.py for the formulas)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchcurv.curv.hessian.coupled import (
    attended,
    contracted,
    coupled,
    gated,
    log_softmaxed,
    resampled,
    softmaxed,
    summed_products,
)
from torchcurv.curv.hessian.local import (
    Local,
    Propagation,
    congruent,
    one_entry,
    scaled_by,
    through,
    with_residual,
)
from torchcurv.curv.hessian.operation import Apply, Op, Rule
from torchcurv.curv.linalg.symmetric import times_squares


def _copied(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
    return H.to(op.leaves[slot].device)


def _moved(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
    """A selection: its entries are their own squares."""
    return Local(op, slot, H.dtype).pull(H) if now.diag else one_entry(op, slot, H, now)


def _weighted(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
    """A product with a weight: diag (M∘M)^T h, the transposed map with the weight squared."""
    if now.diag and op.name == "linear" and slot == 0:  # without running it again
        weight = op.read(op.option(1, "weight"), H.dtype)
        return times_squares(H.flatten(0, -2), weight).reshape(*H.shape[:-1], -1)
    return Local(op, slot, H.dtype, squared=True).pull(H) if now.diag else congruent(op, slot, H, now)


def _averaged(coefficient: Callable[[Op, int, torch.dtype], Tensor | float]) -> Apply:
    """Sums and averages: the entries of row k of M are c_k or 0, so that (M∘M)^T h = M^T (c ∘ h)."""

    def apply(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
        if not now.diag:
            return congruent(op, slot, H, now)
        return Local(op, slot, H.dtype).pull(coefficient(op, slot, H.dtype) * H)

    return apply


def _mean_coefficient(op: Op, slot: int, dtype: torch.dtype) -> float:
    return op.shape.numel() / op.inputs[slot].shape.numel()


def _pool_coefficient(op: Op, slot: int, dtype: torch.dtype) -> Tensor:
    """1 / divisor, whatever the padding: what the pool makes of ones, over the number of ones it has read."""
    local, dims = Local(op, slot, dtype), int(op.name[-2])
    ones = torch.ones_like(local.x)
    kernel, padding, ceil = op.option(1, "kernel_size"), op.option(3, "padding", 0), op.option(4, "ceil_mode", False)
    stride = op.option(2, "stride") or kernel
    pool: Any = F.avg_pool3d if dims == 3 else F.avg_pool2d
    if dims == 1:  # avg_pool1d knows no divisor
        kernel, stride, padding = (
            (*(length if isinstance(length, tuple | list) else (length,)), other)
            for length, other in ((kernel, 1), (stride, 1), (padding, 0))
        )
        ones = ones.unsqueeze(-1)
    count: Tensor = pool(ones, kernel, stride, padding, ceil, divisor_override=1).reshape(local.out.shape)
    return local.push(torch.ones_like(local.x)) / count.clamp(min=1)


def _adaptive_coefficient(op: Op, slot: int, dtype: torch.dtype) -> Tensor:
    """1 / size of the window of each output: from floor(k in / out) up to ceil((k + 1) in / out)."""
    device, dims = op.leaves[slot].device, int(op.name[-2])
    c = torch.ones((), dtype=dtype, device=device)
    for size, out in zip(op.leaves[slot].shape[-dims:], op.shape[-dims:], strict=True):
        windows = [-(-(k + 1) * size // out) - k * size // out for k in range(out)]
        c = c.unsqueeze(-1) / torch.tensor(windows, dtype=dtype, device=device)
    return c


def _dropped(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
    assert op.slope is not None
    return scaled_by(op.slope.to(H.dtype), H, now)


def _elementwise(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
    """D H D + diag(residual(φ'' ∘ dL/dφ)), D = diag(φ')."""
    if now.diag and not op.rule.curved and _is_one_node(op, slot, H):
        scaled = through(op.output.node, H)
        return scaled if op.rule.switch else through(op.output.node, scaled)  # whose slope is its own square
    local = Local(op, slot, H.dtype)
    if local.out.shape != local.x.shape:
        raise op.refused("it is known for one tensor, of the shape of its output")
    with torch.enable_grad():
        ones, curved = torch.ones_like(local.out), op.rule.curved
        slope = torch.autograd.grad(local.out, local.x, ones, create_graph=curved, materialize_grads=True)[0]

    def second(g: Tensor) -> Tensor:
        if not slope.requires_grad:
            return torch.zeros_like(g)
        return g * torch.autograd.grad(slope, local.x, ones, materialize_grads=True)[0]

    return with_residual(op, scaled_by(slope.detach(), H, now), second, now)


def _is_one_node(op: Op, slot: int, H: Tensor) -> bool:
    """Whether the node of the output is all there is between it and the argument, in the precision of H."""
    edge = op.inputs[slot]
    alike = op.output.shape == op.shape == edge.shape == H.shape and op.leaves[slot].tensor.dtype == H.dtype
    return alike and not op.packed and op.output.node.next_functions == ((edge.node, edge.number),)


def _divided(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
    return (one_entry if slot == 0 else _elementwise)(op, slot, H, now)


def _batch_normed(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
    """D = weight / sqrt(var + eps), with the statistics of the batch as constants in train mode."""
    given = op.named(slot, H.dtype)
    x, weight = given("input"), given("weight")
    own = [0, *range(2, x.dim())]
    var = x.var(own, correction=0) if given("training") else given("running_var")
    c = (var + given("eps")).rsqrt() * (1 if weight is None else weight)
    return scaled_by(c.reshape(1, -1, *[1] * (x.dim() - 2)).expand_as(x), H, now)


def _layer_rows(given: Callable[[str], Any]) -> tuple[Tensor, Tensor | None]:
    """(x [groups, m], weight [1 or groups, m]): what is normalised together."""
    size, weight = math.prod(given("normalized_shape")), given("weight")
    return given("input").reshape(-1, size), None if weight is None else weight.reshape(1, size)


def _group_rows(given: Callable[[str], Any]) -> tuple[Tensor, Tensor | None]:
    x, weight = given("input"), given("weight")
    rows = len(x) * given("num_groups")
    if weight is not None:
        weight = weight.reshape(1, -1, *[1] * (x.dim() - 2)).expand_as(x).reshape(rows, -1)
    return x.reshape(rows, -1), weight


def _normalised(rows: Callable[[Callable[[str], Any]], tuple[Tensor, Tensor | None]], centred: bool = True) -> Apply:
    """A norm over groups of m elements, which it couples.

    In the diagonal form, with x̂ = (x - μ) / σ, y = w ∘ x̂ + b, q = w² ∘ h, e = w ∘ dL/dy and P = I - 11^T / m (I and
    μ = 0 where the mean is left alone), dx̂_k/dx_i = (P_ki - x̂_k x̂_i / m) / σ. Both parts of the new diagonal are exact,

        sum_k q_k (dx̂_k/dx_i)²    and    sum_k e_k d²x̂_k/dx_i² = (-2 x̂_i (P e)_i + e·x̂ (3 x̂_i² / m - P_ii)) / (m σ²),

    but q is only the diagonal of what arrives: an approximation wherever H at the output is not diagonal.
    """

    def apply(op: Op, slot: int, H: Tensor, now: Propagation) -> Tensor:
        given = op.named(slot, H.dtype)
        if not now.diag:
            return coupled(op, slot, H, now)
        (x, w), eps = rows(given), given("eps")
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        m, w = x.shape[1], torch.ones_like(x[:1]) if w is None else w
        share = 1 / m if centred else 0.0
        x = x - x.mean(1, keepdim=True) if centred else x
        variance = x.square().mean(1, keepdim=True) + eps
        x = x * variance.rsqrt()
        q = H.reshape(x.shape) * w.square()

        def total(v: Tensor) -> Tensor:
            return v.sum(1, keepdim=True)

        others = share**2 * total(q) + 2 * share / m * x * total(q * x) + x.square() * total(q * x.square()) / m**2
        new = (q * (1 - 2 * share - 2 * x.square() / m) + others) / variance

        def second(g: Tensor) -> Tensor:
            e = g.reshape(x.shape) * w
            projected = e - e.mean(1, keepdim=True) if centred else e
            own = total(e * x) * (3 * x.square() / m - (1 - share))
            return ((own - 2 * x * projected) / (m * variance)).reshape(H.shape)

        return with_residual(op, new.reshape(H.shape), second, now)

    return apply


# -------------------------------------------------------------------------------------------------- table


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


MOVES = _names(
    "flatten unflatten view view_as reshape reshape_as ravel permute transpose swapaxes swapdims movedim moveaxis t T "
    "mT unsqueeze squeeze getitem select narrow index_select gather take_along_dim expand expand_as broadcast_to "
    "repeat repeat_interleave tile cat concat concatenate stack hstack vstack chunk split tensor_split unbind roll "
    "flip rot90 pad unfold pixel_shuffle pixel_unshuffle "
    "channel_shuffle tril triu where masked_fill diagonal"
)
COPIES = _names("contiguous clone to float double half bfloat16 type_as type positive alias")
MAX_POOLS = frozenset(
    f"{kind}{d}d{suffix}"
    for kind in ("max_pool", "adaptive_max_pool")
    for d in (1, 2, 3)
    for suffix in ("", "_with_indices")
)
SUMS = _names("add sub subtract rsub radd neg negative")
PRODUCTS = _names("mul multiply rmul")
QUOTIENTS = _names("div divide true_divide")
WEIGHTED = _names("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
MATRIX_PRODUCTS = _names("matmul mm bmm rmatmul")
DROPOUTS = _names("dropout native_dropout dropout1d dropout2d dropout3d feature_dropout")
PIECEWISE_LINEAR = _names("leaky_relu prelu hardsigmoid abs absolute")
SWITCHES = _names("relu relu6 hardtanh hardshrink softshrink threshold clamp clamp_min clamp_max clip")
CURVED = _names(
    "elu selu celu gelu silu mish hardswish softplus softsign tanhshrink tanh sigmoid expit logsigmoid log_sigmoid "
    "exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan arcsin arccos arctan sinh cosh asinh acosh atanh "
    "arcsinh arccosh arctanh sqrt rsqrt square reciprocal rdiv rtruediv pow rpow float_power erf erfc sinc logit"
)
REDUCTIONS = _names("var std logsumexp norm vector_norm normalize")  # nonlinear ones, and what is scaled by them
RULES: dict[str, Rule] = {
    **dict.fromkeys(COPIES, Rule(_copied, chain="entry", copies=True)),
    **dict.fromkeys(MOVES, Rule(_moved, joint=True, chain="entry", move=True)),
    **dict.fromkeys(MAX_POOLS, Rule(_moved, values=True, chain="entry")),
    **dict.fromkeys(SUMS, Rule(one_entry, joint=True, chain="entry")),
    **dict.fromkeys(PRODUCTS, Rule(one_entry, operands=True, joint=True, chain="entry")),
    **dict.fromkeys(QUOTIENTS, Rule(_divided, values=True, operands=True, curved=True, joint=True, chain="entry")),
    **dict.fromkeys(WEIGHTED, Rule(_weighted, operands=True)),
    **dict.fromkeys(MATRIX_PRODUCTS, Rule(contracted, operands=True, joint=True, chain="mixing")),
    "einsum": Rule(summed_products, operands=True, joint=True, chain="mixing"),
    **dict.fromkeys(DROPOUTS, Rule(_dropped, random=True, chain="entry")),
    **dict.fromkeys(PIECEWISE_LINEAR, Rule(_elementwise, values=True, chain="entry")),
    **dict.fromkeys(SWITCHES, Rule(_elementwise, values=True, switch=True, chain="entry")),
    **dict.fromkeys(CURVED, Rule(_elementwise, values=True, curved=True, chain="entry")),
    **dict.fromkeys([f"avg_pool{d}d" for d in (1, 2, 3)], Rule(_averaged(_pool_coefficient), chain="mixing")),
    **dict.fromkeys(
        [f"adaptive_avg_pool{d}d" for d in (1, 2, 3)], Rule(_averaged(_adaptive_coefficient), chain="mixing")
    ),
    "mean": Rule(_averaged(_mean_coefficient), chain="mixing"),
    **dict.fromkeys(("sum", "cumsum", "fold"), Rule(_averaged(lambda op, slot, dtype: 1.0), chain="mixing")),
    **dict.fromkeys(("interpolate", "upsample"), Rule(resampled, chain="mixing")),
    "softmax": Rule(softmaxed, values=True, curved=True, chain="coupled"),
    "log_softmax": Rule(log_softmaxed, values=True, curved=True, chain="coupled"),
    "glu": Rule(gated, values=True, curved=True, chain="mixing"),
    **dict.fromkeys(REDUCTIONS, Rule(coupled, values=True, curved=True, chain="mixing")),
    "scaled_dot_product_attention": Rule(
        attended, values=True, operands=True, curved=True, joint=True, chain="coupled"
    ),
    "batch_norm": Rule(_batch_normed, values=True),
    "layer_norm": Rule(_normalised(_layer_rows), values=True, curved=True, chain="coupled"),
    "rms_norm": Rule(_normalised(_layer_rows, centred=False), values=True, curved=True, chain="coupled"),
    "group_norm": Rule(_normalised(_group_rows), values=True, curved=True, chain="coupled"),
}
