"""A view: how one module type is read as a grouped linear map."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from torchcurv.curv.layers.one_hot import Tokens

Arguments = tuple[Any, ...]  # the tensors (or None) that one call of a module was given


def one_group(module: nn.Module) -> int:
    return 1


def _refuses_nothing(module: nn.Module) -> None:
    return None


class Dimensions(NamedTuple):
    """Which dimensions of a weight count the groups, the outputs and the inputs of its linear map."""

    groups: tuple[int, ...]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]

    def sizes(self, shape: Sequence[int]) -> tuple[int, int, int]:
        g, o, i = (math.prod(shape[k] for k in part) for part in self)
        return g, o, i

    def columns(self, tensor: Tensor) -> Tensor:
        """[..., g, o, i] from a tensor shaped like the weight, any leading dimensions before."""
        order = [k for part in self for k in part]
        lead, shape = tensor.dim() - len(order), tensor.shape[tensor.dim() - len(order) :]
        brought = tensor.permute(*range(lead), *(lead + k for k in order))
        return brought.reshape(*tensor.shape[:lead], *self.sizes(shape))

    def uncolumns(self, columns: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `columns`, for a weight of this shape."""
        order, lead = [k for part in self for k in part], columns.dim() - 3
        brought = columns.reshape(*columns.shape[:lead], *(shape[k] for k in order))
        return brought.permute(*range(lead), *(lead + order.index(k) for k in range(len(order)))).contiguous()


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
    by_groups: the weight is stored [g, o, i ...]
    dims: which of the weight's dimensions are which, where it is stored in no such way
    tokens:     inputs returns Tokens
    batch_dependent: inputs depends on the batch as a whole
    mode:       module -> how it works at the time of the call, which `inputs` gets as a last argument
    refuses:    module -> why this module cannot be read, if it cannot
    """

    inputs: Callable[..., Tensor | Tokens]
    signal: Callable[..., Tensor]
    groups: Callable[[nn.Module], int] = one_group
    mean_input: Callable[..., Tensor] | None = None
    moments: Callable[..., tuple[Tensor, Tensor, int] | None] | None = None
    arguments: tuple[str, ...] = ("input",)
    weight: str = "weight"
    bias: str = "bias"
    transposed: bool = False
    by_groups: bool = False
    dims: Dimensions | None = None
    tokens: bool = False
    batch_dependent: bool = False
    mode: Callable[[Any], Any] | None = None
    refuses: Callable[[Any], str | None] = _refuses_nothing


# ---------------------------------------------------------------------------------------------- linear


def by_last_dimension(module: Any, x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, 1, x.shape[-1])
