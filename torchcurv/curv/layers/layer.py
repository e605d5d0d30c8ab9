"""A layer: the parameters of one grouped linear map, and the places where a model uses them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchcurv.curv.layers.view import View


class ParamSlice(NamedTuple):
    """A parameter, or some of its rows: nn.MultiheadAttention keeps the weights of q, k and v in one."""

    param: Tensor
    rows: slice | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Our part of a tensor shaped like the parameter, any leading dimensions before."""
        if self.rows is None:
            return tensor
        dim = tensor.dim() - self.param.dim()
        return tensor.narrow(dim, self.rows.start, self.rows.stop - self.rows.start)

    @property
    def shape(self) -> torch.Size:
        return self.param.shape if self.rows is None else self.param[self.rows].shape


# The part of a module that is the call of a torch function: the one its type is about, or a product with a parameter.
FUNCTION, PRODUCT = "function", "product"


@dataclass(eq=False)
class ParameterUse:
    """A place where a layer's parameters are used: a module, and how it is read.

    weight, bias: the module's own, covered or not. transposed: whether its W is the layer's transposed.
    part: the name in the module, where the use is inside it and not its whole call. function: whether the use is the
    call of one torch function, with this weight, that the view reads.
    opaque: whether it is not known what the module computes with it. by_sample: whether the gradients of samples may
    be taken then, by running the module sample by sample.
    """

    name: str
    module: nn.Module
    view: View
    weight: ParamSlice | None
    bias: ParamSlice | None
    part: str = ""
    opaque: bool = False
    by_sample: bool = False
    transposed: bool = False

    @property
    def inner(self) -> bool:
        return bool(self.part)

    @property
    def function(self) -> bool:
        return self.part in (FUNCTION, PRODUCT)

    @property
    def bare(self) -> bool:
        """Whether it is a parameter of a module's own, whose elements are taken one by one."""
        return self.inner and self.weight is None and not self.function

    @property
    def reading(self) -> tuple[Any, ...]:
        """What is the same at sites that see their weight alike, whose calls are further positions of one another."""
        return self.transposed, self.bias is None, self.view.inputs

    @property
    def geometry(self) -> tuple[Any, ...]:
        settings = ("groups", "kernel_size", "stride", "padding", "dilation", "padding_mode", "output_padding")
        return (self.view, *(getattr(self.module, key, None) for key in settings))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(g, o, i) of W, without the bias."""
        g = self.view.groups(self.module)
        if self.weight is None:
            assert self.bias is not None
            return g, self.bias.shape.numel() // g, 0
        shape = self.weight.shape
        if self.view.dims is not None:
            return self.view.dims.sizes(shape)
        if self.view.transposed:
            return g, shape[1], shape[0] // g * shape[2:].numel()
        if self.view.by_groups:
            return g, shape[1], shape[2:].numel()
        outputs = max(1, shape[0] // g)  # 1 where each of the weight's dimensions counts groups
        return g, outputs, shape.numel() // (g * outputs)


@dataclass(eq=False)
class Layer:
    """The parameters we cover of one grouped linear map, and the sites that share its weight.

    A frozen or uncovered weight or bias is None: the block is then over the other one alone. The first site says
    which way round the weight is seen.
    """

    name: str
    sites: list[ParameterUse]
    weight: ParamSlice | None
    bias: ParamSlice | None
    owned: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.view = self.sites[0].view
        self.groups, self.outputs, self.features = self.sites[0].shape
        self.dim = (self.features if self.weight is not None else 0) + (self.bias is not None)

    @property
    def pieces(self) -> list[ParamSlice]:
        return [piece for piece in (self.weight, self.bias) if piece is not None]

    @property
    def params(self) -> list[Tensor]:
        return [piece.param for piece in self.pieces]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(g, o, i) of the joined parameters, the bias being the last input."""
        return self.groups, self.outputs, self.dim

    def site_shape(self, site: ParameterUse) -> tuple[int, int, int]:
        """(g, o, i) of W as the site sees it."""
        g, o, i = self.groups, self.outputs, self.features
        return (g, i, o) if site.transposed else (g, o, i)

    @property
    def token_sides(self) -> tuple[bool, bool]:
        """Whether the (outputs, inputs) are a vocabulary, whose covariance is kept as a diagonal of counts."""
        tokens = [site.transposed for site in self.sites if site.view.tokens]
        return True in tokens, False in tokens

    def parts(self) -> list[Layer]:
        """The layer over its weight alone and over its bias alone."""
        if self.weight is None or self.bias is None:
            return [self]
        weight, bias = f"{self.name}.weight", f"{self.name}.bias"
        return [replace(self, name=weight, bias=None), replace(self, name=bias, weight=None)]

    def columns(self, tensors: list[Tensor]) -> list[Tensor]:
        """Tensors shaped like `pieces`, any leading dimensions before -> [..., g, o, features or 1] each."""
        columns = []
        for piece, tensor in zip(self.pieces, tensors, strict=True):
            lead = tensor.shape[: tensor.dim() - piece.param.dim()]
            if piece is not self.weight:
                columns.append(tensor.reshape(*lead, self.groups, self.outputs, 1))
            elif self.view.dims is not None:
                columns.append(self.view.dims.columns(tensor))
            elif self.view.transposed:
                stored = tensor.reshape(*lead, self.groups, -1, self.outputs, piece.shape[2:].numel())
                columns.append(stored.transpose(-3, -2).flatten(-2))
            else:
                columns.append(tensor.reshape(*lead, self.groups, self.outputs, self.features))
        return columns

    def uncolumns(self, columns: list[Tensor]) -> list[Tensor]:
        """The inverse of `columns`."""
        tensors = []
        for piece, column in zip(self.pieces, columns, strict=True):
            if piece is self.weight and self.view.dims is not None:
                tensors.append(self.view.dims.uncolumns(column, piece.shape))
            elif piece is self.weight and self.view.transposed:
                column = column.unflatten(-1, (-1, piece.shape[2:].numel())).transpose(-3, -2)
                tensors.append(column.reshape((*column.shape[:-4], *piece.shape)))
            else:
                tensors.append(column.reshape((*column.shape[:-3], *piece.shape)))
        return tensors

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Tensors shaped like `pieces`, any leading dimensions before -> [..., g, o, i]."""
        columns = self.columns(tensors)
        return columns[0] if len(columns) == 1 else torch.cat(columns, -1)

    def split(self, joined: Tensor) -> list[Tensor]:
        """The inverse of `join`."""
        sizes = [self.features if piece is self.weight else 1 for piece in self.pieces]
        return self.uncolumns(list(joined.split(sizes, -1)))
