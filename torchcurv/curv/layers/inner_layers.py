"""Parameters that a module uses inside its forward, where no hook on a module sees them."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from torchcurv.curv.graph import parameters_of
from torchcurv.curv.layers.table import LINEAR
from torchcurv.curv.layers.view import View

Rows = slice | None

# ----------------------------------------------------------------------------------------------- parts


class InnerLayer(NamedTuple):
    """A grouped linear map inside a module: (parameter, rows of it that belong to the map).

    opaque: what the module computes with it is not known; there are only the gradients of its samples.
    """

    name: str
    view: View
    weight: tuple[Tensor, Rows] | None
    bias: tuple[Tensor, Rows] | None
    opaque: bool = False


def inner_parts(module: nn.Module, view: View | None) -> tuple[list[InnerLayer], list[nn.Module]]:
    """The inner layers of one module, and the modules in it whose forward is never called."""
    if isinstance(module, nn.MultiheadAttention):
        own, known = _attention_parts(module), {"in_proj_weight", "in_proj_bias"}
        known |= {f"{name}_proj_weight" for name in "qkv"}
        return own + bare_parts(module, known), [module.out_proj]
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return _recurrent_parts(module), []
    return bare_parts(module, set() if view is None else {view.weight, view.bias}), []


def bare_parts(module: nn.Module, known: set[str]) -> list[InnerLayer]:
    """The other parameters of a module: its own, and those that its parametrizations compute them from."""
    if isinstance(module, ParametrizationList):
        return []
    named = {name: p for name, p in parameters_of(module).items() if p is not None and name not in known}
    computed = getattr(module, "parametrizations", None)
    computed = {} if computed is None else {f"parametrizations.{name}": p for name, p in computed.named_parameters()}
    opaque = type(module).__module__.startswith("torch.nn")
    return [
        InnerLayer(name, _bare_view(p.numel()), None, (p, None), opaque or name in computed)
        for name, p in (named | computed).items()
    ]


def _whole(module: nn.Module, name: str) -> tuple[Tensor, Rows] | None:
    parameter = parameters_of(module).get(name)
    return None if parameter is None else (parameter, None)


def _attention_parts(module: nn.MultiheadAttention) -> list[InnerLayer]:
    size, parts = module.embed_dim, []
    packed, bias = module.in_proj_weight, module.in_proj_bias
    for k, name in enumerate("qkv"):
        rows = slice(k * size, (k + 1) * size)
        weight = _whole(module, f"{name}_proj_weight") if packed is None else (packed, rows)
        parts.append(InnerLayer(name, LINEAR, weight, None if bias is None else (bias, rows)))
    parts.append(InnerLayer("out_proj", LINEAR, _whole(module.out_proj, "weight"), _whole(module.out_proj, "bias")))
    return [part for part in parts if part.weight is not None]


def _recurrent_parts(module: nn.Module) -> list[InnerLayer]:
    parts = []
    for name in parameters_of(module):
        if name.startswith("weight_"):
            part = name.removeprefix("weight_")
            parts.append(InnerLayer(part, LINEAR, _whole(module, name), _whole(module, f"bias_{part}")))
    return [part for part in parts if part.weight is not None]


def _bare_view(size: int) -> View:
    """A bare parameter has one group per element; its s is the gradient of a sample, its a is 1."""
    return View(partial(_ones, size), partial(_by_element, size), partial(_count, size))


def _ones(size: int, module: nn.Module, x: Tensor) -> Tensor:
    return x.new_ones(1).expand(len(x), 1, size, 1)


def _by_element(size: int, module: nn.Module, dz: Tensor) -> Tensor:
    return dz.reshape(len(dz), 1, size, 1)


def _count(size: int, module: nn.Module) -> int:
    return size
