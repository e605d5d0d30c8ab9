"""Layers: which parameters of a model act as one grouped linear map, and where in the model it is used.

Most layers are a module with a view, whose calls a forward hook sees. Others live inside a module that does more
(attention, recurrent networks) or are Parameters of a user's own module: `inner.py` tells of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from torchcurv.curv.inner import Part, inner_parts
from torchcurv.curv.views import View, view_of


class Piece(NamedTuple):
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


@dataclass(eq=False)
class Site:
    """A place where a layer's parameters are used: a module, and how it is read.

    weight, bias: the module's own, covered or not. transposed: whether its W is the layer's transposed.
    part: the name in the module, where the use is inside it and not its whole call.
    opaque: whether nothing is known of it but the gradients of samples. by_sample: whether these may be taken, by
    running the module sample by sample.
    """

    name: str
    module: nn.Module
    view: View
    weight: Piece | None
    bias: Piece | None
    part: str = ""
    opaque: bool = False
    by_sample: bool = False
    transposed: bool = False

    @property
    def inner(self) -> bool:
        return bool(self.part)

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
        if self.view.transposed:
            return g, shape[1], shape[0] // g * shape[2:].numel()
        outputs = max(1, shape[0] // g)  # 1 where each of the weight's dimensions counts groups
        return g, outputs, shape.numel() // (g * outputs)


@dataclass(eq=False)
class Layer:
    """The parameters we cover of one grouped linear map, and the sites that share its weight.

    A frozen or uncovered weight or bias is None: the block is then over the other one alone. The first site says
    which way round the weight is seen.
    """

    name: str
    sites: list[Site]
    weight: Piece | None
    bias: Piece | None
    owned: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.view = self.sites[0].view
        self.groups, self.outputs, self.features = self.sites[0].shape
        self.dim = (self.features if self.weight is not None else 0) + (self.bias is not None)

    @property
    def pieces(self) -> list[Piece]:
        return [piece for piece in (self.weight, self.bias) if piece is not None]

    @property
    def params(self) -> list[Tensor]:
        return [piece.param for piece in self.pieces]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(g, o, i) of the joined parameters, the bias being the last input."""
        return self.groups, self.outputs, self.dim

    def site_shape(self, site: Site) -> tuple[int, int, int]:
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
            if piece is self.weight and self.view.transposed:
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


def find_layers(
    model: nn.Module, covered: Callable[[Tensor], bool], by_sample: Callable[[Tensor], bool] = lambda p: False
) -> list[Layer]:
    """One Layer per grouped linear map with a covered parameter; sites that share a weight share a Layer.

    covered: whether a parameter is trained with a curvature. by_sample: whether its gradients may be taken sample by
    sample, where nothing better is known.
    """
    shared: dict[tuple[int, int], list[Site]] = {}
    found = list(_sites(model))
    held = {id(piece.param) for site in found if site.weight for piece in (site.weight, site.bias) if piece}
    for site in found:
        if site.inner and site.weight is None and site.bias is not None and id(site.bias.param) in held:
            continue  # the bias of a layer that another module holds too
        key = site.weight or site.bias
        assert key is not None
        if site.inner and site.weight is None:
            site.by_sample = by_sample(key.param)
        if site.opaque and not site.by_sample:
            continue
        shared.setdefault((id(key.param), 0 if key.rows is None else key.rows.start), []).append(site)
    layers = []
    for sites in shared.values():
        weight, bias = (_covered(piece, covered) for piece in (sites[0].weight, _shared_bias(sites)))
        if weight is None and bias is None:
            continue
        refusal = sites[0].view.refuses(sites[0].module)
        if refusal is not None:
            name, kind = sites[0].name, type(sites[0].module).__name__
            raise ValueError(
                f"layer {name!r} ({kind}) cannot be read: {refusal}. Put its parameters into a group with approx=None"
            )
        sites = _oriented(sites)
        owned = [piece.param for piece in (sites[0].weight, _shared_bias(sites)) if piece is not None]
        layers.append(Layer(sites[0].name, sites, weight, bias, owned))
    return layers


def _covered(piece: Piece | None, covered: Callable[[Tensor], bool]) -> Piece | None:
    return piece if piece is not None and piece.param.requires_grad and covered(piece.param) else None


def _shared_bias(sites: list[Site]) -> Piece | None:
    return next((site.bias for site in sites if site.bias is not None), None)


def _oriented(sites: list[Site]) -> list[Site]:
    """The site that decides how the weight is seen first; those that use it transposed are marked.

    A token embedding and the linear layer that shares its weight see it transposed.
    """
    if len(sites) == 1:
        return sites
    first = min(sites, key=lambda site: (site.bias is None, site.view.tokens))
    for site in sites:
        site.transposed = site.view.transposed != first.view.transposed
        same_use = site.geometry == first.geometry
        matrices = all(one.weight is not None and one.weight.param.dim() == 2 for one in (site, first))
        if not (same_use or (matrices and site.shape[0] == first.shape[0] == 1)) or not _same(site.bias, first.bias):
            raise ValueError(
                f"layers {first.name!r} and {site.name!r} share a weight but not its use (module type, bias or "
                "settings differ): put the shared parameters into a group with approx=None"
            )
    return [first, *(site for site in sites if site is not first)]


def _same(bias: Piece | None, other: Piece | None) -> bool:
    return bias is None or (other is not None and bias.param is other.param and bias.rows == other.rows)


def _sites(model: nn.Module) -> Iterator[Site]:
    """Every use of parameters in a model, in the order of its modules."""
    inside: set[int] = set()  # modules whose forward is never called
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        view = view_of(module)
        if view is not None:
            weight, bias = _own(name, module, view.weight), _own(name, module, view.bias)
            if weight is not None or bias is not None:
                yield Site(name, module, view, weight, bias)
        parts, children = inner_parts(module, view)
        inside |= {id(child) for child in children}
        for part in parts:
            yield _inner_site(name, module, part)


def _own(name: str, module: nn.Module, key: str) -> Piece | None:
    parameter = module._parameters.get(key)
    if isinstance(parameter, UninitializedParameter):
        raise ValueError(
            f"layer {name!r} ({type(module).__name__}) has no parameters yet: run the model once on a batch before "
            "building the optimizer"
        )
    return None if parameter is None else Piece(parameter)


def _inner_site(name: str, module: nn.Module, part: Part) -> Site:
    weight, bias = (None if own is None else Piece(*own) for own in (part.weight, part.bias))
    full = f"{name}.{part.name}" if name else part.name
    return Site(full, module, part.view, weight, bias, part.name, part.opaque)
