"""Convolutions and transposed convolutions as grouped linear maps of patches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchcurv.curv.graph import output_padding_of
from torchcurv.curv.layers.conv_covariance import shifted_cov
from torchcurv.curv.layers.view import View
from torchcurv.curv.numerics import on_cpu


def conv_padding(module: Any) -> list[tuple[int, int]]:
    """(left, right) per spatial dimension, in the order of the dimensions."""
    if module.padding == "valid":
        return [(0, 0) for _ in module.kernel_size]
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(p, p) for p in module.padding]


def padded_input(module: Any, x: Tensor) -> Tensor:
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
    return _windows(module, padded_input(module, x), module.stride)


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


def conv_moments(module: Any, x: Tensor) -> tuple[Tensor, Tensor, int] | None:
    """By shifted products, where the regions are large against their borders (2 to 3 times faster on the CPU)."""
    kernel, dilation = module.kernel_size, module.dilation
    if not on_cpu(x) or module.groups > 1 or set(module.stride) != {1} or set(kernel) == {1} or len(kernel) > 2:
        return None
    padded = padded_input(module, x)
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
        extra = output_padding_of(module, x, output_size)
    pairs = [(r - p, r - p + e) for r, p, e in zip(reach, module.padding, extra, strict=True)]
    padded = F.pad(apart, [p for pair in reversed(pairs) for p in pair])
    kernel = range(2, 2 + len(size))
    return _unfolded(module, _windows(module, padded, (1,) * len(size)).flip(*kernel))


def _groups(module: Any) -> int:
    return module.groups


CONVOLUTION = View(_conv_inputs, _channel_signal, _groups, _conv_mean_input, conv_moments)
TRANSPOSED_CONVOLUTION = View(
    _transposed_inputs, _channel_signal, _groups, arguments=("input", "output_size"), transposed=True
)
