"""Dense truths for the tests: float64, slow and obvious.

Everything here is about L = R * sum_t w_t c(f_t, y_t), the loss exactly as the user's module returns it.
Index letters: n samples (dimension 0 of the output), t terms of a sample, c classes, e output elements of a
sample, v signals, r shared positions, g groups, i inputs, o outputs, p and q parameters. `params` is a list
of (name, Parameter); every matrix over parameters is in the order of `parameters_to_vector` of that list.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn.utils import parameters_to_vector

# --- the loss: factors, terms, Hessian ----------------------------------------------------------------------


class Terms(NamedTuple):
    """L = R * sum_{n,t} w[n,t] c[n,t]; dL/df = R * w_out * dc."""

    R: Tensor  # []
    w: Tensor  # [n, t]        t = one per position for cross entropy, one per element for MSE and BCE
    c: Tensor  # [n, t]        the unweighted loss of each term
    dc: Tensor  # like output   gradient of each term's c with respect to its own outputs
    w_out: Tensor  # like output   w of the term that each output element belongs to


def is_cross_entropy(loss: nn.Module) -> bool:
    return isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss)


def as_cross_entropy(loss: nn.Module) -> nn.Module:
    """NLLLoss of log-probabilities is cross entropy of them: log_softmax is idempotent. Others unchanged."""
    if isinstance(loss, nn.NLLLoss):
        return nn.CrossEntropyLoss(loss.weight, ignore_index=loss.ignore_index, reduction=loss.reduction)
    return loss


def to_terms(loss: nn.Module, v: Tensor, output: Tensor) -> Tensor:
    """v [*output.shape, ...] -> [n, t, k, ...]: k = c for cross entropy, k = 1 for elementwise losses."""
    n, rest = output.shape[0], v.shape[output.dim() :]
    if is_cross_entropy(loss):
        return v.reshape(n, output.shape[1], -1, *rest).transpose(1, 2)
    return v.reshape(n, -1, 1, *rest)


def from_terms(loss: nn.Module, v: Tensor, output: Tensor) -> Tensor:
    """v [n, t, k] -> the shape of output: the inverse of `to_terms`."""
    return (v.transpose(1, 2) if is_cross_entropy(loss) else v).reshape(output.shape)


def loss_terms(loss: nn.Module, output: Tensor, target: Tensor) -> Terms:
    """R, w, c and the gradient of c (by autograd) for a loss module with reduction mean or sum."""
    if loss.reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {loss.reduction!r}: mean or sum")
    output = output.detach().requires_grad_()
    if is_cross_entropy(loss):
        R, w, c = _cross_entropy_terms(loss, output, target)
    elif isinstance(loss, nn.MSELoss):
        R, w, c = _mse_terms(loss, output, target)
    elif isinstance(loss, nn.BCEWithLogitsLoss):
        R, w, c = _bce_terms(loss, output, target)
    else:
        raise TypeError(f"no terms known for {type(loss).__name__}")
    (dc,) = torch.autograd.grad(c.sum(), output)
    k = output.shape[1] if is_cross_entropy(loss) else 1
    w_out = from_terms(loss, w.unsqueeze(-1).repeat(1, 1, k), output)
    return Terms(torch.as_tensor(R, dtype=output.dtype), w, c.detach(), dc, w_out)


def _cross_entropy_terms(loss, output, target):
    """c_t = -sum_c q'_tc log p_tc, q' = q weight / w_t, w_t = sum_c q_tc weight_c, q the smoothed target."""
    log_p = F.log_softmax(to_terms(loss, output, output), dim=-1)
    n, t, classes = log_p.shape
    weight = torch.ones(classes, dtype=output.dtype) if loss.weight is None else loss.weight.to(output.dtype)
    kept = torch.ones(n, t, dtype=torch.bool)
    if target.is_floating_point():
        q = to_terms(loss, target, output)
        total = torch.tensor(n * t, dtype=output.dtype)
    else:
        y = target.reshape(n, t)
        kept = y != loss.ignore_index
        y = torch.where(kept, y, 0)
        q = F.one_hot(y, classes).to(output.dtype)
        total = weight[y][kept].sum()
    eps = getattr(loss, "label_smoothing", 0.0)
    q = ((1 - eps) * q + eps / classes) * weight
    w = q.sum(-1)
    c = -(q * log_p).sum(-1) / torch.where(w == 0, 1.0, w)
    return (1.0 if loss.reduction == "sum" else 1 / total), w * kept, c


def _mse_terms(loss, output, target):
    """c = 1/2 (f - y)^2 for each element."""
    c = 0.5 * (output - target) ** 2
    R = 2.0 if loss.reduction == "sum" else 2.0 / output.numel()
    n = output.shape[0]
    return R, torch.ones_like(c).detach().reshape(n, -1), c.reshape(n, -1)


def _bce_terms(loss, output, target):
    """c = -q log sigma(f) - (1 - q) log sigma(-f) and w = weight w', where
    w' = pos_weight y + 1 - y, q w' = pos_weight y."""
    ones = torch.ones_like(output).detach()
    pos_weight = ones if loss.pos_weight is None else loss.pos_weight * ones
    weight = ones if loss.weight is None else loss.weight * ones
    positive, negative = pos_weight * target, 1 - target
    w = positive + negative
    q = positive / torch.where(w == 0, 1.0, w)
    c = -q * F.logsigmoid(output) - (1 - q) * F.logsigmoid(-output)
    R = 1.0 if loss.reduction == "sum" else 1.0 / output.numel()
    n = output.shape[0]
    return R, (w * weight).reshape(n, -1), c.reshape(n, -1)


def output_hessian(loss: nn.Module, output: Tensor, target: Tensor) -> Tensor:
    """H_L = d2L/df2 [n e, n e], with NLLLoss read as cross entropy."""
    loss, output = as_cross_entropy(loss), output.detach()
    return jacrev(grad(lambda f: loss(f, target)))(output).reshape(output.numel(), output.numel())


def output_roots(loss: nn.Module, output: Tensor, target: Tensor) -> Tensor:
    """U [v = e, *output.shape]: columns of a root of each sample's H_L, sum_v U[v,n] U[v,n]^T = H_L[n,n]."""
    n = output.shape[0]
    H = output_hessian(loss, output, target).reshape(n, -1, n, output[0].numel())
    roots = []
    for k in range(n):
        values, vectors = torch.linalg.eigh(H[k, :, k])
        roots.append((vectors * values.clamp(min=0).sqrt()).T)  # [v, e]
    return torch.stack(roots, dim=1).reshape(-1, *output.shape)


def output_gradients(loss: nn.Module, output: Tensor, target: Tensor) -> Tensor:
    """U [1, *output.shape] = sqrt(R w) dc: the signal of the empirical Fisher."""
    terms = loss_terms(loss, output, target)
    return ((terms.R * terms.w_out).sqrt() * terms.dc).unsqueeze(0)


# --- whole-model matrices, by torch.func --------------------------------------------------------------------


def _output_of(model, x, params):
    """theta [p] -> model output, and theta now."""
    sizes = [param.numel() for _, param in params]

    def f(theta):
        parts = zip(params, theta.split(sizes), strict=True)
        return functional_call(model, {name: part.view_as(param) for (name, param), part in parts}, x)

    return f, parameters_to_vector([param for _, param in params]).detach()


def jacobian(model: nn.Module, x, params) -> tuple[Tensor, Tensor]:
    """df/dtheta [*output.shape, p] and the output."""
    f, theta = _output_of(model, x, params)
    return jacrev(f, chunk_size=1)(theta).detach(), f(theta).detach()


def gradient(model: nn.Module, loss: nn.Module, x, y, params) -> Tensor:
    """dL/dtheta [p]."""
    f, theta = _output_of(model, x, params)
    return grad(lambda theta: loss(f(theta), y))(theta).detach()


def hessian(model: nn.Module, loss: nn.Module, x, y, params) -> Tensor:
    """d2L/dtheta2 [p, q], one row at a time."""
    f, theta = _output_of(model, x, params)
    theta.requires_grad_()
    (g,) = torch.autograd.grad(loss(f(theta), y), theta, create_graph=True)
    return torch.stack([torch.autograd.grad(entry, theta, retain_graph=True)[0] for entry in g])


def ggn(model: nn.Module, loss: nn.Module, x, y, params) -> Tensor:
    """J^T H_L J [p, q]."""
    J, output = jacobian(model, x, params)
    J = J.reshape(output.numel(), -1)
    return J.T @ output_hessian(loss, output, y) @ J


def ggn_rows(model: nn.Module, loss: nn.Module, x, y, params) -> Tensor:
    """V [v, n, p] with sum_{v,n} V V^T = ggn: J_n^T times the columns of a root of sample n's H_L."""
    J, output = jacobian(model, x, params)
    n = output.shape[0]
    return torch.einsum(
        "vne,nep->vnp",
        output_roots(loss, output, y).reshape(-1, n, output[0].numel()),
        J.reshape(n, -1, J.shape[-1]),
    )


def empirical_fisher_rows(model: nn.Module, loss: nn.Module, x, y, params) -> Tensor:
    """V [1, n, p]: sum_t sqrt(R w_t) J_t^T dc_t."""
    J, output = jacobian(model, x, params)
    n = output.shape[0]
    u = output_gradients(loss, output, y).reshape(1, n, -1)
    return torch.einsum("vne,nep->vnp", u, J.reshape(n, -1, J.shape[-1]))


def empirical_fisher(model: nn.Module, loss: nn.Module, x, y, params) -> Tensor:
    """sum_n (sum_t sqrt(R w_t) J_t^T dc_t) (...)^T [p, q]."""
    V = empirical_fisher_rows(model, loss, x, y, params)
    return torch.einsum("vnp,vnq->pq", V, V)


def fisher(model: nn.Module, loss: nn.Module, x, y, params) -> Tensor:
    """sum_{n,t} R w_t E_y'[J_t^T d d^T J_t], d the gradient of c at a label y' of the model [p, q].

    Cross entropy: y' = k with probability p_k, d = p - e_k. BCE: both labels, d = sigma - y'. MSE:
    y' ~ N(f, 1), d = f - y', E[d d^T] = I. Labels are drawn independently: terms have no cross products.
    """
    J, output = jacobian(model, x, params)
    J, f = to_terms(loss, J, output), to_terms(loss, output, output)  # [n, t, k, p], [n, t, k]
    terms = loss_terms(loss, output, y)
    total = torch.zeros(J.shape[-1], J.shape[-1], dtype=output.dtype)
    for d, probability in _labels(loss, f):
        rows = torch.einsum("ntk,ntkp->ntp", d, J)
        total += torch.einsum("nt,ntp,ntq->pq", terms.R * terms.w * probability, rows, rows)
    return total


def _labels(loss, f):
    """(d [n, t, k], probability [n, t]) for each label that the model can draw."""
    if is_cross_entropy(loss):
        p = f.softmax(-1)
        return [(p - F.one_hot(torch.tensor(k), p.shape[-1]), p[..., k]) for k in range(p.shape[-1])]
    if isinstance(loss, nn.BCEWithLogitsLoss):
        p = f.sigmoid()
        return [(p - 1, p[..., 0]), (p, 1 - p[..., 0])]
    return [(torch.ones_like(f), torch.ones_like(f[..., 0]))]


def sub_block(matrix: Tensor, params, names) -> Tensor:
    """The rows and columns of `matrix` (over `params`) that belong to `names`, in the order of `names`."""
    index, start = {}, 0
    for name, param in params:
        index[name] = torch.arange(start, start + param.numel())
        start += param.numel()
    keep = torch.cat([index[name] for name in names])
    return matrix[keep][:, keep]


def layer_params(model: nn.Module, layer_name: str):
    """(name, Parameter) of one layer: weight, then bias if it has one."""
    return [(f"{layer_name}.{name}", param) for name, param in model.get_submodule(layer_name).named_parameters()]


def solve_dense(matrix: Tensor, v: Tensor, damping: float = 0.0) -> Tensor:
    """(matrix + damping I)^{-1} v."""
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype), v)


# --- one layer: what came in (a) and what is sent back (s) --------------------------------------------------


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMS = (*BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def layer_inputs(module: nn.Module, x: Tensor | tuple, n: int) -> Tensor:
    """a [n, r, g, i] of a layer called with x, or with *x; a 1 is appended to i where the module has a bias.

    Linear: g = 1. Convolutions: the groups; r = output positions, of transposed ones too. Bilinear: g = 1, i the pairs
    of inputs. Embedding, EmbeddingBag: g = 1, i the words; r = 1 for a bag. Norms, PReLU: g the elements of the
    weight, i = o = 1.
    """
    x, *others = x if isinstance(x, tuple) else (x,)
    if isinstance(module, nn.Linear):
        a = x.reshape(n, -1, 1, x.shape[-1])
    elif isinstance(module, nn.Bilinear):
        a = torch.einsum("...i,...j->...ij", x, others[0]).reshape(n, -1, 1, x.shape[-1] * others[0].shape[-1])
    elif isinstance(module, TRANSPOSED):
        a = _transposed_patches(module, x)
    elif isinstance(module, NORMS):
        a = _per_element(module, _normalized(module, x), n)
    elif isinstance(module, nn.PReLU):
        a = _per_element(module, x.clamp(max=0), n)
    elif isinstance(module, nn.Embedding):
        a = _one_hot(module, x.flatten()).reshape(n, -1, 1, module.num_embeddings)
    elif isinstance(module, nn.EmbeddingBag):
        a = torch.stack([_counts(module, *bag) for bag in _bags(module, n, x, *others)]).reshape(n, 1, 1, -1)
    else:
        a = _patches(module, x)
    if getattr(module, "bias", None) is not None:
        a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
    return a.detach()


def _patches(module, x):
    """a[n, r, g, (channel of the group, kernel offsets)]: a slice of the padded input per output position."""
    k, stride, dilation, groups = module.kernel_size, module.stride, module.dilation, module.groups
    dims = len(k)
    x = F.pad(x, _pad(module), mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    reach = [dilation[j] * (k[j] - 1) + 1 for j in range(dims)]
    sizes = [(x.shape[2 + j] - reach[j]) // stride[j] + 1 for j in range(dims)]
    channels = x.shape[1] // groups
    positions = []
    for position in itertools.product(*(range(size) for size in sizes)):
        start = [position[j] * stride[j] for j in range(dims)]
        window = tuple(slice(start[j], start[j] + reach[j], dilation[j]) for j in range(dims))
        per_group = [x[(slice(None), slice(g * channels, (g + 1) * channels), *window)] for g in range(groups)]
        positions.append(torch.stack([patch.flatten(1) for patch in per_group], dim=1))
    return torch.stack(positions, dim=1)


def _pad(module):
    """The argument of F.pad (last dimension first); "same" puts the odd one after."""
    if module.padding == "valid":
        return [0, 0] * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return [side for padding in reversed(module.padding) for side in (padding, padding)]


def _transposed_patches(module, x):
    """a[n, r, g, (channel of the group, kernel offset k)] = x[n, c, p] where r = p stride - padding + k dilation."""
    kernel, stride, padding, dilation = module.kernel_size, module.stride, module.padding, module.dilation
    n, channels, *sizes_in = x.shape
    dims = range(len(kernel))
    sizes = [
        (sizes_in[j] - 1) * stride[j] - 2 * padding[j] + dilation[j] * (kernel[j] - 1) + module.output_padding[j] + 1
        for j in dims
    ]
    a = torch.zeros(n, *sizes, channels, *kernel, dtype=x.dtype)
    for p in itertools.product(*(range(size) for size in sizes_in)):
        for k in itertools.product(*(range(size) for size in kernel)):
            r = [p[j] * stride[j] - padding[j] + k[j] * dilation[j] for j in dims]
            if all(0 <= r[j] < sizes[j] for j in dims):
                a[(slice(None), *r, slice(None), *k)] = x[(slice(None), slice(None), *p)]
    return a.reshape(n, math.prod(sizes), module.groups, -1)


def _normalized(module, x):
    """What a normalization computes before its affine part."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        dims = list(range(x.dim() - len(module.normalized_shape), x.dim()))
        if isinstance(module, nn.RMSNorm):
            eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
            return x / (x.square().mean(dims, keepdim=True) + eps).sqrt()
        return _standardized(x, dims, module.eps)
    if isinstance(module, nn.GroupNorm):
        return _standardized(x.reshape(len(x), module.num_groups, -1), [2], module.eps).reshape(x.shape)
    if module.track_running_stats and not module.training:
        shape = [1, -1] + [1] * (x.dim() - 2)
        mean, variance = module.running_mean.reshape(shape), module.running_var.reshape(shape)
        return (x - mean) / (variance + module.eps).sqrt()
    own = list(range(2, x.dim()))
    return _standardized(x, own if isinstance(module, INSTANCE_NORMS) else [0, *own], module.eps)


def _standardized(x, dims, eps):
    """Mean and biased variance over `dims` taken out."""
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


def _per_element(module, v, n):
    """v, like the output of a norm or PReLU -> [n, r, g, 1], g the element of the weight that applies."""
    elements = module.weight.numel()
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) or elements == 1:
        return v.reshape(n, -1, elements, 1)
    return v.reshape(n, elements, -1, 1).transpose(1, 2)


def _one_hot(module, tokens):
    """[tokens, words], zero where the token is padding."""
    rows = torch.zeros(len(tokens), module.num_embeddings, dtype=module.weight.dtype)
    for row, token in zip(rows, tokens.tolist(), strict=True):
        if token != module.padding_idx:
            row[token] = 1
    return rows


def _bags(module, n, x, offsets=None, weights=None):
    """(tokens, weights) of each of the n bags."""
    weights = torch.ones(x.shape, dtype=module.weight.dtype) if weights is None else weights
    if offsets is None:
        return list(zip(x, weights, strict=True))
    ends = offsets.tolist() if module.include_last_offset else [*offsets.tolist(), len(x)]
    return [(x[ends[k] : ends[k + 1]], weights[ends[k] : ends[k + 1]]) for k in range(n)]


def _counts(module, tokens, weights):
    """[words]: how often each word is in the bag, weighted."""
    rows = _one_hot(module, tokens)
    total = (weights[:, None] * rows).sum(0)
    return total / max(1.0, float(rows.sum())) if module.mode == "mean" else total


def layer_signals(module: nn.Module, dz: Tensor, n: int) -> Tensor:
    """s [n, r, g, o] from the gradient with respect to the layer's output."""
    if isinstance(module, nn.Linear | nn.Bilinear | nn.Embedding | nn.EmbeddingBag):
        return dz.reshape(n, -1, 1, dz.shape[-1])
    if isinstance(module, (*NORMS, nn.PReLU)):
        return _per_element(module, dz, n)
    dz = dz.reshape(n, module.groups, dz.shape[1] // module.groups, -1)  # n g o r
    return dz.permute(0, 3, 1, 2)


def layer_arrays(model: nn.Module, loss: nn.Module, x, y, layer_name: str, kind: str = "ggn"):
    """(a [n, r, g, i], s [v, n, r, g, o]) with block = sum_{v,n} vec(sum_r s a^T) vec(sum_r s a^T)^T.

    kind "ggn": exact, v = one per output element of a sample (column v of a root of the sample's H_L).
    kind "empirical_fisher": v = 1. A module called again adds its positions to r.
    """
    module, calls = model.get_submodule(layer_name), []

    def keep(_, inputs, z):
        z = z if z.requires_grad else z.requires_grad_()
        calls.append((tuple(v.detach().clone() if isinstance(v, Tensor) else v for v in inputs), z))
        return z.clone()  # what follows may work in place

    handle = module.register_forward_hook(keep)
    try:
        output = model(*x) if isinstance(x, tuple) else model(x)
    finally:
        handle.remove()
    n = output.shape[0]
    a = torch.cat([layer_inputs(module, x_in, n) for x_in, _ in calls], dim=1)
    signals = {"ggn": output_roots, "empirical_fisher": output_gradients}[kind](loss, output.detach(), y)
    s = []
    for signal in signals:
        dzs = torch.autograd.grad(
            output,
            [z for _, z in calls],
            signal,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        s.append(torch.cat([layer_signals(module, dz, n) for dz in dzs], dim=1))
    return a, torch.stack(s)


# --- what the approximations keep of (a, s) -----------------------------------------------------------------


def to_goi(module: nn.Module, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The weight (or anything like it) as it is stored -> [g, o, i], with the bias, if given, as the last i."""
    if isinstance(module, TRANSPOSED):  # [in, out / groups, k...]
        g, i, o = module.groups, module.in_channels // module.groups, module.out_channels // module.groups
        weight = weight.reshape(g, i, o, -1).transpose(1, 2).reshape(g, o, -1)
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):  # [words, d]
        weight = weight.T.unsqueeze(0)
    elif isinstance(module, (*NORMS, nn.PReLU)):
        weight = weight.reshape(-1, 1, 1)
    else:  # [out, ...]
        g = getattr(module, "groups", 1)
        weight = weight.reshape(g, len(weight) // g, -1)
    return weight if bias is None else torch.cat([weight, bias.reshape(*weight.shape[:2], 1)], dim=-1)


def param_order(module: nn.Module) -> Tensor:
    """Where each entry of (weight.flatten(), bias.flatten()) lies in the flattened (g, o, i) order."""
    weight, bias = module.weight, getattr(module, "bias", None)
    index = torch.arange(weight.numel()).reshape(weight.shape)
    bias_index = None if bias is None else weight.numel() + torch.arange(bias.numel())
    return to_goi(module, index, bias_index).flatten().argsort()


def to_param_order(matrix_goi: Tensor, module: nn.Module | None) -> Tensor:
    """Matrix [goi, goi] or vector [goi] -> the order weight.flatten(), bias.flatten(); module None: as it is."""
    if module is None:
        return matrix_goi
    order = param_order(module)
    return matrix_goi[order] if matrix_goi.dim() == 1 else matrix_goi[order][:, order]


def rows_from_arrays(a: Tensor, s: Tensor) -> Tensor:
    """V [v, n, goi] = vec(sum_r s a^T)."""
    return torch.einsum("vnrgo,nrgi->vngoi", s, a).flatten(2)


def block_from_arrays(a: Tensor, s: Tensor, module: nn.Module | None = None) -> Tensor:
    """sum_{v,n} vec(sum_r s a^T) vec(sum_r s a^T)^T [p, p]."""
    V = rows_from_arrays(a, s)
    return to_param_order(torch.einsum("vnp,vnq->pq", V, V), module)


def diag_from_arrays(a: Tensor, s: Tensor, module: nn.Module | None = None) -> Tensor:
    """sum_{v,n} (sum_r s a)^2 [p], a vector."""
    return to_param_order(rows_from_arrays(a, s).square().sum((0, 1)), module)


def unit_from_arrays(a: Tensor, s: Tensor, module: nn.Module | None = None) -> Tensor:
    """The block with everything outside the (i x i) block of each output unit zeroed [p, p]."""
    i, units = a.shape[-1], s.shape[-1] * s.shape[-2]
    inside = torch.kron(torch.eye(units, dtype=a.dtype), torch.ones(i, i, dtype=a.dtype))
    return to_param_order(block_from_arrays(a, s) * inside, module)


def kron_factors(a: Tensor, s: Tensor, sharing: str = "expand", weights: Tensor | None = None):
    """A [g, i, i] = sum w a a^T / sum w and B [g, o, o] = sum_{v,n,r} s s^T.

    sharing "reduce": a is first averaged over r, s summed over r. weights: [n], or [n, r] for "expand".
    "whole": with several positions the partial traces of the block, A divided by its trace.
    """
    if sharing == "whole" and a.shape[1] > 1:
        V = torch.einsum("vnrgo,nrgi->vngoi", s, a)
        A = torch.einsum("vngoi,vngoj->gij", V, V)
        traces = A.diagonal(dim1=1, dim2=2).sum(-1)
        return A / torch.where(traces > 0, traces, 1)[:, None, None], torch.einsum("vngoi,vngpi->gop", V, V)
    if sharing == "reduce":
        a, s = a.mean(1, keepdim=True), s.sum(2, keepdim=True)
    elif sharing not in ("expand", "whole"):
        raise ValueError(f"sharing {sharing!r}: expand, reduce or whole")
    n, r = a.shape[:2]
    weights = torch.ones(n, 1, dtype=a.dtype) if weights is None else weights.reshape(n, -1)
    if weights.shape[1] not in (1, r):
        raise ValueError(f"weights {list(weights.shape)} for n={n}, r={r}")
    weights = weights.expand(n, r)
    A = torch.einsum("nr,nrgi,nrgj->gij", weights, a, a) / weights.sum()
    B = torch.einsum("vnrgo,vnrgp->gop", s, s)
    return A, B


def kfac_from_arrays(
    a: Tensor,
    s: Tensor,
    sharing: str = "expand",
    weights: Tensor | None = None,
    module: nn.Module | None = None,
) -> Tensor:
    """B_g (x) A_g for each group, zero between groups [p, p]."""
    A, B = kron_factors(a, s, sharing, weights)
    blocks = [torch.kron(B[g].contiguous(), A[g].contiguous()) for g in range(len(A))]
    return to_param_order(torch.block_diag(*blocks), module)


def kron_bases(a: Tensor, s: Tensor, sharing: str = "expand", weights: Tensor | None = None):
    """Eigenvectors Q_A [g, i, i], Q_B [g, o, o] of the factors, in columns."""
    A, B = kron_factors(a, s, sharing, weights)
    return torch.linalg.eigh(A).eigenvectors, torch.linalg.eigh(B).eigenvectors


def ekfac_from_arrays(
    a: Tensor,
    s: Tensor,
    sharing: str = "expand",
    weights: Tensor | None = None,
    module: nn.Module | None = None,
    bases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Q diag(d) Q^T, Q = Q_B (x) Q_A, d[o,i] = sum_{v,n} (sum_r (Q_B^T s)_o (Q_A^T a)_i)^2, per group [p, p].

    Where an eigenvalue of A or B is multiple the basis, and with it the matrix, is not unique: pass `bases`
    (as `kron_bases` returns them) to compare. A null space of the unweighted "expand" factors does no harm
    (a and s have nothing in it), one of the "reduce" factors does.
    """
    Q_A, Q_B = kron_bases(a, s, sharing, weights) if bases is None else bases
    rotated_a, rotated_s = torch.einsum("gji,nrgj->nrgi", Q_A, a), torch.einsum("gpo,vnrgp->vnrgo", Q_B, s)
    d = torch.einsum("vnrgo,nrgi->vngoi", rotated_s, rotated_a).square().sum((0, 1))
    blocks = []
    for g in range(len(Q_A)):
        Q = torch.kron(Q_B[g].contiguous(), Q_A[g].contiguous())
        blocks.append(Q @ torch.diag(d[g].flatten()) @ Q.T)
    return to_param_order(torch.block_diag(*blocks), module)


def relative_error(x: Tensor, truth: Tensor) -> float:
    """norm(x - truth) / norm(truth)."""
    return math.inf if x.shape != truth.shape else float((x - truth).norm() / truth.norm())
