"""The structure of the autograd graph as numbers: which functions are applied to which, and how they move rows."""

from __future__ import annotations

from ctypes import string_at
from typing import Any, NamedTuple

import torch

from torchcurv.curv.graph import Edge, age_of

# Numbers by which a function moves rows, under the names by which its node keeps them: which dimensions, and how far.
_HOW = ("dim", "dims", "dim0", "dim1", "dim2", "dimension", "source_dim", "shifts", "step", "offset", "repeats")
_SIZES = ("start", "end", "index", "split_size", "split_sizes", "size")
_CHOSEN = ("_raw_saved_index", "_raw_saved_indices", "_raw_saved_lengths", "_raw_saved_offsets")  # tensors that say it
_MASKED = ("MulBackward0", "SumBackward1")
_MATRIX = {"MmBackward0": 1, "BmmBackward0": 1, "AddmmBackward0": 2, "SparseAddmmBackward0": 2}  # input of the second


class _Reading(NamedTuple):
    """What is read of the nodes of one class, by name: numbers, and the tensor that chooses rows."""

    how: tuple[str, ...]
    sizes: tuple[str, ...]
    chosen: str | None


_READINGS: dict[type, _Reading] = {}


def _reading(cls: type) -> _Reading:
    own = dir(cls)
    how, sizes = (
        tuple(f"_saved_{key}" for key in keys if f"_saved_{key}" in own and f"_raw_saved_{key}" not in own)
        for keys in (_HOW, _SIZES)
    )
    if ("View" in cls.__name__ or "Reshape" in cls.__name__) and "_saved_self_sym_sizes" in own:
        sizes += ("_saved_self_sym_sizes",)
    return _Reading(how, sizes, next((key for key in _CHOSEN if key in own), None))


class Structure(NamedTuple):
    """The graph below an edge.

    functions: equal where the same functions are applied to one another. values: equal where they also have equal
    sizes, and choose rows by equal tensors; None: such a tensor cannot be read. chosen: whether there is such a tensor.
    places: the nodes, numbered alike where the functions are equal.
    """

    functions: int
    values: int | None
    chosen: bool
    places: dict[Any, int]


def structure_of(start: Edge, ends: set[Any]) -> Structure:
    """The structure of the graph from an edge down. ends: nodes whose rows matter.

    Functions that choose rows by a tensor (index_add, x[permutation], a product with an adjacency matrix) count with
    its values, where they lie between the start and an end.
    """
    places: dict[Any, int] = {start.node: 0}
    order, functions = [start.node], list[Any]([start.number])
    numbers, choices, cut = list[Any](), list[Any](), False
    for node in order:  # which grows
        cls = type(node)
        read = _READINGS.get(cls)
        if read is None:
            read = _READINGS[cls] = _reading(cls)
        functions.append(cls)
        for name in read.how:
            functions.append(getattr(node, name))
        if read.sizes:
            own = [getattr(node, name) for name in read.sizes]
            numbers += own
            cut = cut or _cuts_rows(node, own)
        if read.chosen is not None or cls.__name__ in _MATRIX or (cls.__name__ in _MASKED and _spreads(node)):
            choices.append(node)
        for child, number in node.next_functions:
            if child is None:
                continue
            place = places.get(child)
            if place is None:
                place = places[child] = len(order)
                order.append(child)
            functions += (place, number)
    chosen = _choices(choices, order, ends) if choices else []
    values = None if None in chosen else hash((*numbers, *chosen))
    return Structure(hash(tuple(functions)), values, cut or bool(chosen), places)


def _is_leaf(node: Any) -> bool:
    return node is None or not node.next_functions


def _cuts_rows(node: Any, numbers: list[Any]) -> bool:
    """Whether a node takes rows of dimension 0, from here to there, of something that was computed."""
    if getattr(node, "_saved_dim", 1) != 0 or _is_leaf(node.next_functions[0][0]):
        return False
    return not (numbers[0] == 0 and numbers[-1] == (1 << 63) - 1)  # x[:], which takes all of them


def _spreads(node: Any) -> bool:
    """Whether a product repeats rows before it masks them: mask [g, n, 1] times x [1, n, c], and the sum of a product
    over dimension 0."""
    if type(node).__name__ != "MulBackward0":
        return 0 in (node._saved_dim or ()) and type(node.next_functions[0][0]).__name__ == "MulBackward0"
    rows = node._input_metadata[0].shape[:1]
    for child, number in node.next_functions:
        if rows and rows[0] > 1 and not _is_leaf(child):
            shape = child._input_metadata[number].shape
            if len(shape) == len(node._input_metadata[0].shape) and shape[0] == 1:
                return True
    return False


def _choices(choices: list[Any], order: list[Any], ends: set[Any]) -> list[Any]:
    """The values of tensors that choose rows on the way to the ends; None for one that must not be read."""
    reach = set(ends)
    for node in sorted(order, key=age_of):  # what it was computed from is older
        if node not in reach and any(child in reach for child, _ in node.next_functions):
            reach.add(node)
    values: list[Any] = []
    for node in choices:
        raw = _chosen(node, reach) if node in reach else None
        if raw is not None:
            values.append(_value(raw, _mixes_by_what_it_computes(node, reach)))
    return values


def _mixes_by_what_it_computes(node: Any, reach: set[Any]) -> bool:
    """Whether a product mixes rows by a matrix that depends on the ends as well: attention, or two towers.

    It is another one each time, of which only the zeros say which rows do not meet.
    """
    second = _MATRIX.get(type(node).__name__)
    return second is not None and node.next_functions[second - 1][0] in reach


def _chosen(node: Any, reach: set[Any]) -> Any:
    """The saved tensor by which a node chooses rows of dimension 0; None where it does not."""
    name = type(node).__name__
    if name in _MATRIX:  # the first matrix of a product mixes the rows of the second
        if node.next_functions[_MATRIX[name]][0] not in reach:
            return None
        raw = getattr(node, "_raw_saved_self", None) or getattr(node, "_raw_saved_mat1", None)
        batched = name == "BmmBackward0" and (raw is None or raw.unpack_hook is not None or len(raw.data) > 1)
        return None if batched else raw
    if name in _MASKED:
        product = node if name == "MulBackward0" else node.next_functions[0][0]
        first = product.next_functions[0][0] in reach
        return product._raw_saved_other if first else product._raw_saved_self
    raw = getattr(node, _READINGS[type(node)].chosen or "")
    if isinstance(raw, tuple):  # x[i, j]: dimension 0 is chosen by the first
        return raw[0]
    dim = getattr(node, "_saved_dim", 0)
    if dim >= 1 << 63:  # counted from the last, in a type without a sign; an index of one dimension does not tell
        dims = raw.data.dim() if raw.unpack_hook is None else 1
        dim = dim - (1 << 64) + dims if dims > 1 else 0
    return raw if dim <= 0 else None


def _value(raw: Any, zeros: bool) -> Any:
    """What a saved tensor holds, or where its zeros are, as a number; None where hooks (of a checkpoint) pack it, who
    unpack it once only."""
    if raw.unpack_hook is not None:
        return None
    tensor = raw.data
    if tensor is None:
        return 0
    dense = (tensor if tensor.layout == torch.strided else tensor.to_dense()).detach()
    dense = (dense != 0 if zeros else dense).cpu().contiguous()
    return hash((dense.shape, string_at(dense.data_ptr(), dense.nbytes)))
