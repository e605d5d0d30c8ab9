"""Views: every layer with parameters read as a grouped linear map.

    z[n,r,g,o] = sum_i W[g,o,i] a[n,r,g,i] + b[g,o]

n batch, r positions that share the weight (space, tokens, repeated calls), g groups, i inputs, o outputs.
A view says how to read `a` from what a module was given and `s` from the gradient at what it returned; the
gradient of the parameters is then always `einsum("nrgo,nrgi->goi", s, a)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torchcurv.curv.checks import check_one_of
from torchcurv.curv.layers.convolution import CONVOLUTION, TRANSPOSED_CONVOLUTION
from torchcurv.curv.layers.embedding import EMBEDDING, EMBEDDING_BAG
from torchcurv.curv.layers.normalization import (
    BATCH_NORM,
    INSTANCE_NORM,
    channels_last,
    group_norm,
    layer_norm,
    prelu_inputs,
    prelu_signal,
    rms_norm,
    trailing,
    weight_size,
)
from torchcurv.curv.layers.view import View, by_last_dimension, one_group


def _bilinear_inputs(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return by_last_dimension(module, (x.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2))


# ----------------------------------------------------------------------------------------------- table
LINEAR = View(by_last_dimension, by_last_dimension)
VIEWS: dict[type[nn.Module], View] = {
    nn.Linear: LINEAR,
    nn.Bilinear: View(_bilinear_inputs, by_last_dimension, arguments=("input1", "input2")),
    nn.Conv1d: CONVOLUTION,
    nn.Conv2d: CONVOLUTION,
    nn.Conv3d: CONVOLUTION,
    nn.ConvTranspose1d: TRANSPOSED_CONVOLUTION,
    nn.ConvTranspose2d: TRANSPOSED_CONVOLUTION,
    nn.ConvTranspose3d: TRANSPOSED_CONVOLUTION,
    nn.Embedding: EMBEDDING,
    nn.EmbeddingBag: EMBEDDING_BAG,
    nn.LayerNorm: View(layer_norm, trailing, weight_size),
    nn.RMSNorm: View(rms_norm, trailing, weight_size),
    nn.GroupNorm: View(group_norm, channels_last, weight_size),
    nn.BatchNorm1d: BATCH_NORM,
    nn.BatchNorm2d: BATCH_NORM,
    nn.BatchNorm3d: BATCH_NORM,
    nn.SyncBatchNorm: BATCH_NORM,
    nn.InstanceNorm1d: INSTANCE_NORM,
    nn.InstanceNorm2d: INSTANCE_NORM,
    nn.InstanceNorm3d: INSTANCE_NORM,
    nn.PReLU: View(prelu_inputs, prelu_signal, weight_size),
}


def register_view(
    module_type: type[nn.Module],
    inputs: Callable[..., Tensor],
    signal: Callable[..., Tensor],
    groups: Callable[[nn.Module], int] = one_group,
    *,
    weight: str = "weight",
    bias: str = "bias",
    arguments: tuple[str, ...] = ("input",),
    stored: str = "outputs first",
) -> None:
    """Teach torchcurv to read a module type whose parameters act as a grouped linear map of what it is given.

    inputs(module, x) -> a [n, r, g, i], signal(module, dz) -> s [n, r, g, o] and groups(module) -> g must satisfy
    `dW == einsum("nrgo,nrgi->goi", s, a)` and `b.grad.reshape(g, o) == einsum("nrgo->go", s)` for x the module's first
    argument, dz the gradient at its output, and dW that of W as [g, o, i]. Subclasses of `module_type` are read the
    same way unless they are registered themselves.

    Args:
        weight, bias: names of the parameters W and b; a module may lack either.
        arguments: names of the arguments of `forward`, in its order, that `inputs` gets as x.
        stored: the shape of W. "outputs first": [g o, i ...], where i may be several dimensions; "groups first":
            [g, o, i ...]; "inputs first": [g i, o, ...], as in a transposed convolution or GPT-2's Conv1D.
    """
    check_one_of("stored", stored, ("outputs first", "groups first", "inputs first"))
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_view: got {module_type!r}; pass a subclass of torch.nn.Module")
    VIEWS[module_type] = View(
        inputs, signal, groups, weight=weight, bias=bias, arguments=arguments,
        transposed=stored == "inputs first", by_groups=stored == "groups first",
    )  # fmt: skip


def has_forward_of_its_view(module: nn.Module) -> bool:
    """Whether its forward is the one that its view reads, and no subclass has put another in its place."""
    known = next(cls for cls in type(module).__mro__ if cls in VIEWS)
    return type(module).forward is known.forward or not known.__module__.startswith("torch.nn")


def view_of(module: nn.Module) -> View | None:
    """The view of the nearest class in the module's MRO, so that subclasses count."""
    return next((VIEWS[cls] for cls in type(module).__mro__ if cls in VIEWS), None)
