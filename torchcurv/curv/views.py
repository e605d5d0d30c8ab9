"""Views: every layer with parameters read as a grouped linear map.

    z[n,r,g,o] = sum_i W[g,o,i] a[n,r,g,i] + b[g,o]

n batch, r positions that share the weight (space, tokens, repeated calls), g groups, i inputs, o outputs.
A view says how to read `a` from what a module was given and `s` from the gradient at what it returned; the
gradient of the parameters is then always `einsum("nrgo,nrgi->goi", s, a)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchcurv.curv.shifted import shifted_cov
from torchcurv.curv.tokens import Tokens

Arguments = tuple[Any, ...]  # the tensors (or None) that one call of a module was given


def _one_group(module: nn.Module) -> int:
    return 1


def _refuses_nothing(module: nn.Module) -> None:
    return None


@dataclass(frozen=True)
class View:
    """How one module type is read; x stands for the arguments named in `arguments`, the first of them [n, ...].

    inputs:     (module, *x) -> a [n, r, g, i], without the 1 of the bias; or Tokens, where a is one-hot rows
    signal:     (module, dz) -> s [n, r, g, o], dz shaped like the module's output
    groups:     module -> g
    mean_input: (module, *x) -> mean_r a [n, 1, g, i]; only where it is cheaper than `inputs(...).mean(1)`
    moments:    (module, *x) -> (sum_{n,r} a a^T [g, i, i], sum_{n,r} a [g, i], n r), or None where the sums over
                `inputs(...)` are as cheap
    weight, bias: the names of the parameters
    transposed: the weight is stored [g i', o, ...] and not [g o, i ...]
    tokens:     inputs returns Tokens
    whole:      inputs depends on the batch as a whole
    mode:       module -> how it works at the time of the call, which `inputs` gets as a last argument
    refuses:    module -> why this module cannot be read, if it cannot
    """

    inputs: Callable[..., Tensor | Tokens]
    signal: Callable[..., Tensor]
    groups: Callable[[nn.Module], int] = _one_group
    mean_input: Callable[..., Tensor] | None = None
    moments: Callable[..., tuple[Tensor, Tensor, int] | None] | None = None
    arguments: tuple[str, ...] = ("input",)
    weight: str = "weight"
    bias: str = "bias"
    transposed: bool = False
    tokens: bool = False
    whole: bool = False
    mode: Callable[[Any], Any] | None = None
    refuses: Callable[[Any], str | None] = _refuses_nothing


# ---------------------------------------------------------------------------------------------- linear


def _linear(module: Any, x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, 1, x.shape[-1])


def _bilinear_inputs(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return _linear(module, (x.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2))


# --------------------------------------------------------------------------------------- convolutions


def conv_padding(module: Any) -> list[tuple[int, int]]:
    """(left, right) per spatial dimension, in the order of the dimensions."""
    if module.padding == "valid":
        return [(0, 0) for _ in module.kernel_size]
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(p, p) for p in module.padding]


def _padded(module: Any, x: Tensor) -> Tensor:
    pairs = conv_padding(module)
    if not any(left or right for left, right in pairs):
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, [p for pair in reversed(pairs) for p in pair], mode=mode)


def conv_output_size(module: Any, padded: Iterable[int], stride: Iterable[int]) -> list[int]:
    """Spatial size of the output, from the spatial size of the padded input."""
    settings = zip(padded, module.kernel_size, stride, module.dilation, strict=True)
    return [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in settings]


def _windows(module: Any, x: Tensor, stride: Iterable[int]) -> Tensor:
    """The windows a kernel meets, as a strided view of the padded input: n c k1..kd o1..od."""
    n, c, *size = x.shape
    batch, channel, *strides = x.stride()
    out = conv_output_size(module, size, stride)
    window = [d * t for d, t in zip(module.dilation, strides, strict=True)]
    move = [s * t for s, t in zip(stride, strides, strict=True)]
    return x.as_strided((n, c, *module.kernel_size, *out), (batch, channel, *window, *move), x.storage_offset())


def _patches(module: Any, x: Tensor) -> Tensor:
    return _windows(module, _padded(module, x), module.stride)


def _unfolded(module: Any, patches: Tensor) -> Tensor:
    """[n, r, g, i] stored as [g, i, n, r]: one row per input feature, so that products need no other copy."""
    d, g, n = len(module.kernel_size), module.groups, patches.shape[0]
    rows = patches.permute(*range(1, 2 + d), 0, *range(2 + d, 2 + 2 * d))  # c k1..kd n o1..od
    features = rows.shape[: 1 + d].numel() // g
    return rows.reshape(g, features, n, -1).permute(2, 3, 0, 1)


def _conv_inputs(module: Any, x: Tensor) -> Tensor:
    return _unfolded(module, _patches(module, x))


def _channel_signal(module: Any, dz: Tensor) -> Tensor:
    n, channels = dz.shape[:2]
    g = module.groups
    return dz.reshape(n, g, channels // g, -1).permute(0, 3, 1, 2)


def _conv_mean_input(module: Any, x: Tensor) -> Tensor:
    """mean_r a by one strided box mean per kernel position; no patches are stored."""
    patches, d = _patches(module, x), len(module.kernel_size)
    n = x.shape[0]
    space = tuple(range(2, 2 + d))
    offsets = product(*(range(k) for k in module.kernel_size))
    every = (slice(None), slice(None))
    means = [patches[every + offset].mean(space) for offset in offsets]
    return torch.stack(means, -1).reshape(n, 1, module.groups, -1)


def _conv_moments(module: Any, x: Tensor) -> tuple[Tensor, Tensor, int] | None:
    """By shifted products, where the regions are large against their borders (2 to 3 times faster on the CPU)."""
    kernel, dilation = module.kernel_size, module.dilation
    if x.is_cuda or module.groups > 1 or set(module.stride) != {1} or set(kernel) == {1} or len(kernel) > 2:
        return None
    padded = _padded(module, x)
    out = conv_output_size(module, padded.shape[2:], module.stride)
    if x.shape[1] < 8 or any(o < 4 * d * (k - 1) for o, d, k in zip(out, dilation, kernel, strict=True)):
        return None
    count = x.shape[0] * math.prod(out)
    total = _conv_mean_input(module, x).sum((0, 1)) * math.prod(out)
    return shifted_cov(padded, kernel, dilation, tuple(out)).unsqueeze(0), total, count


def _transposed_inputs(module: Any, x: Tensor, output_size: Any = None) -> Tensor:
    """A transposed convolution is one of stride 1 over the input with zeros between its elements, kernel reversed."""
    n, c, *size = x.shape
    spread = [(length - 1) * s + 1 for length, s in zip(size, module.stride, strict=True)]
    apart = x.new_zeros(n, c, *spread)
    apart[(slice(None), slice(None), *(slice(None, None, s) for s in module.stride))] = x
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    extra = module.output_padding
    if output_size is not None:
        extra = module._output_padding(
            x, output_size, module.stride, module.padding, module.kernel_size, len(size), module.dilation
        )
    pairs = [(r - p, r - p + e) for r, p, e in zip(reach, module.padding, extra, strict=True)]
    padded = F.pad(apart, [p for pair in reversed(pairs) for p in pair])
    kernel = range(2, 2 + len(size))
    return _unfolded(module, _windows(module, padded, (1,) * len(size)).flip(*kernel))


def _groups(module: Any) -> int:
    return module.groups


_CONV = View(_conv_inputs, _channel_signal, _groups, _conv_mean_input, _conv_moments)
_TRANSPOSED = View(_transposed_inputs, _channel_signal, _groups, arguments=("input", "output_size"), transposed=True)


# ----------------------------------------------------- one weight per feature: a = normalised input, i = o = 1


def _weight_size(module: Any) -> int:
    return (module.bias if module.weight is None else module.weight).numel()


def _channels_last(module: Any, x: Tensor) -> Tensor:
    """[n, C, ...] -> [n, r, C, 1]."""
    return x.reshape(*x.shape[:2], -1).transpose(1, 2).unsqueeze(-1)


def _trailing(module: Any, x: Tensor) -> Tensor:
    """[n, ..., *normalized_shape] -> [n, r, features, 1]."""
    return x.reshape(x.shape[0], -1, math.prod(module.normalized_shape), 1)


def _layer_norm(module: Any, x: Tensor) -> Tensor:
    return _trailing(module, F.layer_norm(x, module.normalized_shape, eps=module.eps))


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    return _trailing(module, F.rms_norm(x, module.normalized_shape, eps=module.eps))


def _group_norm(module: Any, x: Tensor) -> Tensor:
    return _channels_last(module, F.group_norm(x, module.num_groups, eps=module.eps))


def uses_batch_statistics(module: Any) -> bool:
    """Whether a batch norm normalises with the statistics of the batch it is given."""
    return module.training or module.running_mean is None


def _batch_norm(module: Any, x: Tensor, of_the_batch: bool) -> Tensor:
    if of_the_batch:
        return _channels_last(module, F.batch_norm(x, None, None, training=True, eps=module.eps))
    mean, var = (at.to(x.dtype) for at in (module.running_mean, module.running_var))
    return _channels_last(module, F.batch_norm(x, mean, var, eps=module.eps))


def _instance_norm(module: Any, x: Tensor, of_the_sample: bool) -> Tensor:
    if of_the_sample:
        return _channels_last(module, F.instance_norm(x, eps=module.eps))
    return _batch_norm(module, x, False)


def _prelu_inputs(module: Any, x: Tensor) -> Tensor:
    return _prelu_signal(module, x.clamp_max(0))


def _prelu_signal(module: Any, x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, 1, 1) if module.num_parameters == 1 else _channels_last(module, x)


_BATCH_NORM = View(_batch_norm, _channels_last, _weight_size, whole=True, mode=uses_batch_statistics)
_INSTANCE_NORM = View(_instance_norm, _channels_last, _weight_size, mode=uses_batch_statistics)


# ---------------------------------------------------------------------------------------------- tokens


def _kept(module: Any, index: Tensor) -> Tensor:
    """1 where the token counts, 0 where it is padding."""
    ones = torch.ones_like(index, dtype=torch.promote_types(module.weight.dtype, torch.float32))
    return ones if module.padding_idx is None else ones * (index != module.padding_idx)


def _embedding(module: Any, index: Tensor) -> Tokens:
    index = index.reshape(len(index), -1, 1)
    return Tokens(index, _kept(module, index), module.num_embeddings)


def _bag(module: Any, index: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tokens:
    if index.dim() == 1:
        assert offsets is not None
        index, weight = _bags_of_rows(index, offsets, weights, module.include_last_offset, _kept(module, index))
    else:
        weight = _kept(module, index) if weights is None else _kept(module, index) * weights
    if module.mode == "mean":
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1)
    return Tokens(index.unsqueeze(1), weight.unsqueeze(1), module.num_embeddings)


def _bags_of_rows(
    index: Tensor, offsets: Tensor, weights: Tensor | None, last_included: bool, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Bags laid one after the other -> (index, weight) [bags, longest]."""
    starts = offsets[:-1] if last_included else offsets
    ends = torch.cat([starts[1:], offsets[-1:] if last_included else offsets.new_full((1,), len(index))])
    places = starts[:, None] + torch.arange(int((ends - starts).amax().clamp_min(1)), device=index.device)
    inside = places < ends[:, None]
    places = places.clamp_max(max(0, len(index) - 1))
    weight = kept if weights is None else kept * weights
    return index[places], weight[places] * inside


def _refused_embedding(module: Any) -> str | None:
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq=True divides its gradient by the counts of the batch"
    if module.sparse:
        return "sparse=True gives it a sparse gradient"
    if getattr(module, "mode", "sum") == "max":
        return 'mode="max" takes each element from another token'
    return None


_EMBEDDING = View(_embedding, _linear, transposed=True, tokens=True, refuses=_refused_embedding)
_BAG = View(
    _bag, _linear, arguments=("input", "offsets", "per_sample_weights"), transposed=True, tokens=True, whole=True,
    refuses=_refused_embedding,
)  # fmt: skip


# ----------------------------------------------------------------------------------------------- table

LINEAR = View(_linear, _linear)

VIEWS: dict[type[nn.Module], View] = {
    nn.Linear: LINEAR,
    nn.Bilinear: View(_bilinear_inputs, _linear, arguments=("input1", "input2")),
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.ConvTranspose1d: _TRANSPOSED,
    nn.ConvTranspose2d: _TRANSPOSED,
    nn.ConvTranspose3d: _TRANSPOSED,
    nn.Embedding: _EMBEDDING,
    nn.EmbeddingBag: _BAG,
    nn.LayerNorm: View(_layer_norm, _trailing, _weight_size),
    nn.RMSNorm: View(_rms_norm, _trailing, _weight_size),
    nn.GroupNorm: View(_group_norm, _channels_last, _weight_size),
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
    nn.SyncBatchNorm: _BATCH_NORM,
    nn.InstanceNorm1d: _INSTANCE_NORM,
    nn.InstanceNorm2d: _INSTANCE_NORM,
    nn.InstanceNorm3d: _INSTANCE_NORM,
    nn.PReLU: View(_prelu_inputs, _prelu_signal, _weight_size),
}


def register_view(
    module_type: type[nn.Module],
    inputs: Callable[..., Tensor],
    signal: Callable[..., Tensor],
    groups: Callable[[nn.Module], int] = _one_group,
    *,
    weight: str = "weight",
    bias: str = "bias",
    arguments: tuple[str, ...] = ("input",),
) -> None:
    """Teach torchcurv to read a module type whose parameters act as a grouped linear map of what it is given.

    inputs(module, x) -> a [n, r, g, i], signal(module, dz) -> s [n, r, g, o] and groups(module) -> g must satisfy
    `W.grad.reshape(g, o, i) == einsum("nrgo,nrgi->goi", s, a)` and `b.grad.reshape(g, o) ==
    einsum("nrgo->go", s)` for x the module's first argument and dz the gradient at its output. Subclasses of
    `module_type` are read the same way unless they are registered themselves.

    Args:
        weight, bias: names of the parameters W and b; a module may lack either.
        arguments: names of the arguments of `forward`, in its order, that `inputs` gets as x.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_view: got {module_type!r}; pass a subclass of torch.nn.Module")
    VIEWS[module_type] = View(inputs, signal, groups, weight=weight, bias=bias, arguments=arguments)


def view_of(module: nn.Module) -> View | None:
    """The view of the nearest class in the module's MRO, so that subclasses count."""
    return next((VIEWS[cls] for cls in type(module).__mro__ if cls in VIEWS), None)
