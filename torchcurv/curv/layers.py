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
from torch.nn.parameter import UninitializedParameter

from torchcurv.curv.shifted import shifted_cov

Read = Callable[..., Tensor]


@dataclass(frozen=True)
class View:
    """How one module type is read.

    inputs:     (module, x) -> a [n, r, g, i], without the 1 of the bias
    signal:     (module, dz) -> s [n, r, g, o], dz shaped like the module's output
    groups:     module -> g
    mean_input: (module, x) -> mean_r a [n, 1, g, i]; only where it is cheaper than `inputs(...).mean(1)`
    moments:    (module, x) -> (sum_{n,r} a a^T [g, i, i], sum_{n,r} a [g, i], n r), or None where the sums over
                `inputs(...)` are as cheap
    """

    inputs: Read
    signal: Read
    groups: Callable[[nn.Module], int] = lambda module: 1
    mean_input: Read | None = None
    moments: Callable[..., tuple[Tensor, Tensor, int] | None] | None = None


# ---------------------------------------------------------------------------------------------- linear


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, 1, x.shape[-1])


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


def conv_output_size(module: Any, padded: Iterable[int]) -> list[int]:
    """Spatial size of the output, from the spatial size of the padded input."""
    settings = zip(padded, module.kernel_size, module.stride, module.dilation, strict=True)
    return [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in settings]


def _patches(module: Any, x: Tensor) -> Tensor:
    """The windows a convolution multiplies, as a strided view of the padded input: n c k1..kd o1..od."""
    x = _padded(module, x)
    n, c, *size = x.shape
    batch, channel, *strides = x.stride()
    out = conv_output_size(module, size)
    window = [d * t for d, t in zip(module.dilation, strides, strict=True)]
    move = [s * t for s, t in zip(module.stride, strides, strict=True)]
    return x.as_strided((n, c, *module.kernel_size, *out), (batch, channel, *window, *move))


def _conv_inputs(module: Any, x: Tensor) -> Tensor:
    """Stored as [g, i, n, r]: one row per input feature, so that products need no other copy."""
    patches, d = _patches(module, x), len(module.kernel_size)
    n, g = x.shape[0], module.groups
    rows = patches.permute(*range(1, 2 + d), 0, *range(2 + d, 2 + 2 * d))  # c k1..kd n o1..od
    features = rows.shape[: 1 + d].numel() // g
    return rows.reshape(g, features, n, -1).permute(2, 3, 0, 1)


def _conv_signal(module: Any, dz: Tensor) -> Tensor:
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
    out = conv_output_size(module, padded.shape[2:])
    if x.shape[1] < 8 or any(o < 4 * d * (k - 1) for o, d, k in zip(out, dilation, kernel, strict=True)):
        return None
    count = x.shape[0] * math.prod(out)
    total = _conv_mean_input(module, x).sum((0, 1)) * math.prod(out)
    return shifted_cov(padded, kernel, dilation, tuple(out)).unsqueeze(0), total, count


def _conv_groups(module: Any) -> int:
    return module.groups


_CONV = View(_conv_inputs, _conv_signal, _conv_groups, _conv_mean_input, _conv_moments)

VIEWS: dict[type[nn.Module], View] = {
    nn.Linear: View(_linear, _linear),
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
}


def register_view(
    module_type: type[nn.Module],
    inputs: Read,
    signal: Read,
    groups: Callable[[nn.Module], int] = lambda module: 1,
) -> None:
    """Teach torchcurv to read a module type whose `weight` (and `bias`) act as a grouped linear map.

    inputs(module, x) -> a [n, r, g, i], signal(module, dz) -> s [n, r, g, o] and groups(module) -> g must satisfy
    `weight.grad.reshape(g, o, i) == einsum("nrgo,nrgi->goi", s, a)` and `bias.grad.reshape(g, o) ==
    einsum("nrgo->go", s)` for x the module's first input and dz the gradient at its output. Subclasses of
    `module_type` are read the same way unless they are registered themselves.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_view: got {module_type!r}; pass a subclass of torch.nn.Module")
    VIEWS[module_type] = View(inputs, signal, groups)


def view_of(module: nn.Module) -> View | None:
    """The view of the nearest class in the module's MRO, so that subclasses count."""
    return next((VIEWS[cls] for cls in type(module).__mro__ if cls in VIEWS), None)


# ----------------------------------------------------------------------------------------------- layer


@dataclass(eq=False)
class Layer:
    """A module (or several that share one weight) bound to its view and to the parameters we cover.

    A frozen or uncovered weight or bias is None: the block is then over the other one alone.
    """

    name: str
    modules: list[nn.Module]
    view: View
    weight: Tensor | None
    bias: Tensor | None

    def __post_init__(self) -> None:
        shape = _parameter(self.modules[0], "weight").shape
        self.groups = self.view.groups(self.modules[0])
        self.outputs = shape[0] // self.groups
        self.features = shape[1:].numel()
        self.dim = (self.features if self.weight is not None else 0) + (self.bias is not None)

    @property
    def params(self) -> list[Tensor]:
        return [p for p in (self.weight, self.bias) if p is not None]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(g, o, i) of the joined parameters, the bias being the last input."""
        return self.groups, self.outputs, self.dim

    def columns(self, tensors: list[Tensor]) -> list[Tensor]:
        """Tensors shaped like `params`, any leading dimensions before -> [..., g, o, features or 1] each."""
        columns = []
        for p, tensor in zip(self.params, tensors, strict=True):
            width = self.features if p is self.weight else 1
            columns.append(_unflatten(tensor, p.dim(), (self.groups, self.outputs, width)))
        return columns

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Tensors shaped like `params`, any leading dimensions before -> [..., g, o, i]."""
        columns = self.columns(tensors)
        return columns[0] if len(columns) == 1 else torch.cat(columns, -1)

    def split(self, joined: Tensor) -> list[Tensor]:
        """The inverse of `join`."""
        lead, parts = joined.shape[:-3], []
        if self.weight is not None:
            parts.append(joined[..., : self.features].reshape(*lead, *self.weight.shape))
        if self.bias is not None:
            parts.append(joined[..., -1].reshape(*lead, *self.bias.shape))
        return parts


def _parameter(module: nn.Module, name: str) -> Tensor:
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter


def _unflatten(tensor: Tensor, dims: int, shape: tuple[int, ...]) -> Tensor:
    return tensor.reshape(*tensor.shape[: tensor.dim() - dims], *shape)


def find_layers(model: nn.Module, covered: Callable[[Tensor], bool]) -> list[Layer]:
    """One Layer per module that has a view and a covered parameter; modules that share a weight share a Layer.

    covered: whether a parameter is trained with a curvature.
    """
    layers: dict[int, Layer] = {}
    for name, module in model.named_modules():
        view = view_of(module)
        if view is None:
            continue
        own = [module._parameters.get(key) for key in ("weight", "bias")]
        if any(isinstance(p, UninitializedParameter) for p in own):
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) has no parameters yet: run the model once on a batch "
                "before building the optimizer"
            )
        weight, bias = (p if p is not None and p.requires_grad and covered(p) else None for p in own)
        if own[0] is None or (weight is None and bias is None):
            continue
        layer = layers.get(id(own[0]))
        if layer is None:
            layers[id(own[0])] = Layer(name, [module], view, weight, bias)
        elif layer.view is view and layer.bias is bias and _same_geometry(layer.modules[0], module):
            layer.modules.append(module)
        else:
            raise ValueError(
                f"layers {layer.name!r} and {name!r} share a weight but not its use (module type, bias or settings "
                "differ): put the shared parameters into a group with approx=None"
            )
    return list(layers.values())


def _same_geometry(one: nn.Module, other: nn.Module) -> bool:
    settings = ("groups", "kernel_size", "stride", "padding", "dilation", "padding_mode")
    return all(getattr(one, key, None) == getattr(other, key, None) for key in settings)
