"""Layers: which parameters of a model act as one grouped linear map, and where in the model it is used.

Most layers are a module with a view, whose calls a forward hook sees. Others live inside a module that does more
(attention, recurrent networks) or are Parameters of a user's own module: inner_layers.py tells of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from torchcurv.curv.graph import parameters_of
from torchcurv.curv.layers.inner_layers import InnerLayer, bare_parts, inner_parts
from torchcurv.curv.layers.layer import FUNCTION, PRODUCT, Layer, ParameterUse, ParamSlice
from torchcurv.curv.layers.products import Layout
from torchcurv.curv.layers.table import has_forward_of_its_view, view_of


def find_layers(
    model: nn.Module,
    covered: Callable[[Tensor], bool],
    by_sample: Callable[[Tensor], bool] = lambda p: False,
    alone: Collection[Tensor] = (),
    products: Mapping[Tensor, Layout] | None = None,
) -> list[Layer]:
    """One Layer per grouped linear map with a covered parameter; sites that share a weight share a Layer.

    covered: whether a parameter is trained with a curvature. by_sample: whether its gradients may be taken sample by
    sample, where nothing better is known. alone: parameters that are not used as their module's type says, and are
    taken element by element. products: parameters of a module's own that something of the batch is multiplied with as
    by a linear layer, and how they are laid out.
    """
    shared: dict[tuple[int, int], list[ParameterUse]] = {}
    single = {id(p) for p in alone}
    stored = {id(p): how for p, how in (products or {}).items() if id(p) not in single}
    found = list(_sites(model, single, stored))
    held = {id(piece.param) for site in found if site.weight for piece in (site.weight, site.bias) if piece}
    for site in found:
        if site.bare and site.bias is not None and id(site.bias.param) in held:
            continue  # the bias of a layer that another module holds too
        key = site.weight or site.bias
        assert key is not None
        site.by_sample = site.bare and id(key.param) not in single and by_sample(key.param)
        sites = shared.setdefault((id(key.param), 0 if key.rows is None else key.rows.start), [])
        if not (site.bare and sites and id(key.param) in single):
            sites.append(site)
    layers = []
    for sites in shared.values():
        weight, bias = (_covered(piece, covered) for piece in (sites[0].weight, _shared_bias(sites)))
        if weight is None and bias is None:
            continue
        reasons = (unreadable(piece.param) for piece in (weight, bias) if piece is not None)
        refusal = next(filter(None, reasons), None) or sites[0].view.refuses(sites[0].module)
        if refusal is not None:
            name, kind = sites[0].name, type(sites[0].module).__name__
            raise ValueError(
                f"layer {name!r} ({kind}) cannot be read: {refusal}. Put its parameters into a group with approx=None"
            )
        sites = _oriented(sites)
        owned = [piece.param for piece in (sites[0].weight, _shared_bias(sites)) if piece is not None]
        layers.append(Layer(sites[0].name, sites, weight, bias, owned))
    return layers


def unreadable(p: Tensor) -> str | None:
    """Why nothing can be measured for a parameter, whatever layer it belongs to."""
    if p.is_complex():
        return f"its parameters are complex ({p.dtype}), and curvatures are those of real parameters"
    if any(kind.__name__ == "DTensor" for kind in type(p).__mro__):  # by its name: importing it takes a second
        return (
            "its parameters are DTensors (fully_shard, tensor parallelism), and curvatures are those of whole tensors, "
            "which each process has: wrap the model in DistributedDataParallel instead"
        )
    return None


def _covered(piece: ParamSlice | None, covered: Callable[[Tensor], bool]) -> ParamSlice | None:
    return piece if piece is not None and piece.param.requires_grad and covered(piece.param) else None


def _shared_bias(sites: list[ParameterUse]) -> ParamSlice | None:
    return next((site.bias for site in sites if site.bias is not None), None)


def _oriented(sites: list[ParameterUse]) -> list[ParameterUse]:
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


def _same(bias: ParamSlice | None, other: ParamSlice | None) -> bool:
    return bias is None or (other is not None and bias.param is other.param and bias.rows == other.rows)


def _sites(model: nn.Module, alone: set[int], products: Mapping[int, Layout]) -> Iterator[ParameterUse]:
    """Every use of parameters in a model, in the order of its modules."""
    inside: set[int] = set()  # modules whose forward is never called
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        view = view_of(module)
        if view is not None:
            weight, bias = _own(name, module, view.weight), _own(name, module, view.bias)
            if any(piece is not None and id(piece.param) in alone for piece in (weight, bias)):
                yield from (_inner_site(name, module, part) for part in bare_parts(module, set()))
                continue
            if weight is not None or bias is not None:
                inside_of = "" if has_forward_of_its_view(module) else FUNCTION
                yield ParameterUse(name, module, view, weight, bias, inside_of)
        parts, children = inner_parts(module, view)
        of_parts = {id(piece[0]) for part in parts for piece in (part.weight, part.bias) if piece is not None}
        weights = {id(part.weight[0]) for part in parts if part.weight is not None}
        own = {id(p) for p in parameters_of(module).values() if p is not None}
        if not alone.isdisjoint(weights | (own - of_parts)) and weights:
            parts, children = bare_parts(module, set()), []
        inside |= {id(child) for child in children}
        for part in parts:
            own_id = id(part.bias[0]) if part.weight is None and part.bias is not None else None
            site = _inner_site(name, module, part._replace(opaque=True) if own_id in alone else part)
            if own_id is not None and own_id in products:
                yield from _products(site, products[own_id])
            else:
                yield site


def _products(bare: ParameterUse, layout: Layout) -> Iterator[ParameterUse]:
    """The linear maps that a module's own parameter is the weight of."""
    assert bare.bias is not None
    param, own = bare.bias.param, partial(ParameterUse, module=bare.module, view=layout.view, bias=None, part=PRODUCT)
    if not layout.apart:
        yield own(name=bare.name, weight=bare.bias)
        return
    for k in range(len(param)):
        yield own(name=f"{bare.name}[{k}]", weight=ParamSlice(param, slice(k, k + 1)))


def _own(name: str, module: nn.Module, key: str) -> ParamSlice | None:
    parameter = parameters_of(module).get(key)
    if isinstance(parameter, UninitializedParameter):
        raise ValueError(
            f"layer {name!r} ({type(module).__name__}) has no parameters yet: run the model once on a batch before "
            "building the optimizer"
        )
    return None if parameter is None else ParamSlice(parameter)


def _inner_site(name: str, module: nn.Module, part: InnerLayer) -> ParameterUse:
    weight, bias = (None if own is None else ParamSlice(*own) for own in (part.weight, part.bias))
    full = f"{name}.{part.name}" if name else part.name
    return ParameterUse(full, module, part.view, weight, bias, part.name, part.opaque)
