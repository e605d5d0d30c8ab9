"""Products of something of the batch with a parameter, read by letters as grouped linear maps.

    z[positions, groups, outputs] = sum_inputs x[positions, groups, inputs] w[groups, outputs, inputs]

A letter (an index of a sum, as in einsum) that is in x, w and z counts groups; in w and z outputs; in x and w inputs;
in x and z positions. Rows that are sorted by the weight they meet (`grouped_mm`, experts) are one product for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from string import ascii_letters
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchcurv.curv.graph import GROUPED_MM, no_torch_function
from torchcurv.curv.layers.table import LINEAR
from torchcurv.curv.layers.view import Dimensions, View, by_last_dimension

Read = Callable[[Tensor], Tensor]


class Layout(NamedTuple):
    """The linear map that a parameter is the weight of.

    dims: which of its dimensions count what. apart: whether each index of dimension 0 has a map of its own, which
    other rows meet: experts.
    """

    dims: Dimensions
    apart: bool = False

    @classmethod
    def of(cls, letters: str) -> Layout:
        """The inverse of `letters`."""
        groups, outputs, inputs = (
            tuple(k for k, own in enumerate(letters) if own in part) for part in ("eg", "o", "i")
        )
        return cls(Dimensions(groups, outputs, inputs), letters.startswith("e"))

    @property
    def letters(self) -> str:
        """For each dimension what it counts: e experts, g groups, o outputs, i inputs."""
        named = {k: letter for part, letter in zip(self.dims, "goi", strict=True) for k in part}
        return "e" * self.apart + "".join(named[k] for k in range(self.apart, len(named)))

    @property
    def view(self) -> View:
        return _view(self)


_AS_STORED, _TRANSPOSED = Dimensions((), (0,), (1,)), Dimensions((), (1,), (0,))


@cache
def _view(layout: Layout) -> View:
    if layout.dims == _AS_STORED:
        return LINEAR
    if layout.dims == _TRANSPOSED:
        return View(by_last_dimension, by_last_dimension, transposed=True)
    as_given = _arranged if len(layout.dims.groups) > layout.apart else by_last_dimension
    return View(as_given, as_given, dims=layout.dims)


def _arranged(module: nn.Module, x: Tensor) -> Tensor:
    return x


class Product(NamedTuple):
    """One product with a parameter, or with one index (`expert`) of its dimension 0 where it is laid out apart.

    given: what came in, [n, ..., i] as it is or arranged as [n, r, g, i]. read: from the gradient at the output to
    that at [n, ..., o] or [n, r, g, o]; None: it is that already.
    """

    param: Tensor
    layout: Layout
    expert: int | None
    given: Callable[[], Tensor]
    read: Read | None

    @property
    def rows(self) -> slice | None:
        return None if self.expert is None else slice(self.expert, self.expert + 1)


class Contraction(NamedTuple):
    """z = sum a b over the letters that z lacks; " " stands for a dimension of size one that is repeated.

    rows: those of the function's output that z is.
    """

    a: Tensor
    b: Tensor
    of_a: str
    of_b: str
    of_z: str
    rows: slice | None = None


Owner = Callable[[Tensor], Tensor | None]  # the parameter that a tensor is, or is a view of


def products_with(owner: Owner, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Product]:
    """What a call of one of `CONTRACTIONS` is, as products with a parameter that `owner` knows; none where it is not
    one with something of the batch."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args
    if not any(isinstance(x, Tensor) and owner(x) is not None for x in operands):
        return []
    with no_torch_function():
        found = [_product(owner, one) for one in CONTRACTIONS[func](args, kwargs)]
    return [] if None in found else [one for one in found if one is not None]


# ------------------------------------------------------------------------------------------ by letters


def _product(owner: Owner, one: Contraction) -> Product | None:
    """What a contraction is with the parameter that one of its operands is, or is a view of."""
    second = owner(one.b) is not None
    weight, x = (one.b, one.a) if second else (one.a, one.b)
    of_w, of_x, of_z = (one.of_b, one.of_a, one.of_z) if second else (one.of_a, one.of_b, one.of_z)
    param = owner(weight)
    place = None if param is None or owner(x) is not None else _place(weight, param)
    if param is None or place is None or not _is_linear_map(of_w, of_x, of_z):
        return None
    dims, expert = place
    dim_of = dict(zip(of_w, dims, strict=True))
    in_order = sorted(dim_of, key=lambda letter: dim_of[letter])
    groups = [letter for letter in in_order if letter in of_x and letter in of_z]
    outputs = [letter for letter in in_order if letter not in of_x]
    inputs = [letter for letter in in_order if letter not in of_z]
    positions = [letter for letter in of_z if letter in of_x and letter not in dim_of]
    counted = (tuple(dim_of[letter] for letter in part) for part in (groups, outputs, inputs))
    layout = Layout(Dimensions(*counted), expert is not None)
    if expert is not None:
        layout = layout._replace(dims=layout.dims._replace(groups=(0, *layout.dims.groups)))
    given, rows = x.detach() if x.requires_grad else x, one.rows
    as_they_are = list(of_x) == positions + inputs and list(of_z) == positions + outputs
    if as_they_are and positions and len(inputs) == len(outputs) == 1 and rows is None:
        return Product(param, layout, expert, lambda: given, None)
    by_sample = bool(positions) and of_x[0] == of_z[0] == positions[0] and rows is None
    split = 1 if by_sample else len(positions)
    lead = positions[:split], positions[split:], groups
    bring = partial(_brought, letters=of_z, parts=(*lead, outputs))
    read = bring if rows is None else lambda dz: bring(dz[rows])
    return Product(param, layout, expert, partial(_brought, given, of_x, (*lead, inputs)), read)


def _is_linear_map(of_w: str, of_x: str, of_z: str) -> bool:
    """Whether no letter is repeated or summed in one of them alone, and the weight itself is not repeated."""
    letters = of_w + of_x + of_z
    alone = any(letters.count(letter) < 2 for letter in set(letters) - {" "})
    return not (alone or " " in of_w or _repeats(of_w) or _repeats(of_x))


def _repeats(letters: str) -> bool:
    named = letters.replace(" ", "")
    return len(set(named)) < len(named)


def _brought(x: Tensor, letters: str, parts: tuple[list[str], ...]) -> Tensor:
    """x with its dimensions in the order of the parts, each part as one."""
    keep = [k for k, letter in enumerate(letters) if letter != " "]
    x = x.reshape([x.shape[k] for k in keep])
    at = {letter: k for k, letter in enumerate(letters.replace(" ", ""))}
    size = {letter: x.shape[k] for letter, k in at.items()}
    return x.permute([at[letter] for part in parts for letter in part]).reshape(
        [math.prod(size[letter] for letter in part) for part in parts]
    )


def _place(view: Tensor, param: Tensor) -> tuple[list[int], int | None] | None:
    """(for each dimension of a view of a parameter the dimension it is, the index of dimension 0 where that is left
    out), by their strides; None where it is anything else."""
    free, found = list(range(param.dim())), [0] * view.dim()
    for at in sorted(range(view.dim()), key=lambda k: view.shape[k] == 1):
        fits = [k for k in free if param.shape[k] == view.shape[at]]
        same = [k for k in fits if param.stride(k) == view.stride(at)] or (fits if view.shape[at] == 1 else [])
        if not same:
            return None
        found[at] = same[0]
        free.remove(same[0])
    start = view.storage_offset() - param.storage_offset()
    if not free:
        return (found, None) if start == 0 and len(found) == param.dim() else None
    if free != [0] or len(found) != param.dim() - 1 or start % param.stride(0):
        return None
    return found, start // param.stride(0)


# ------------------------------------------------------------------------------------------- the table


def _linear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Contraction]:
    x, w = args[:2]
    lead = ascii_letters[2 : 1 + x.dim()]
    if w.dim() == 2:
        yield Contraction(x, w, lead + "a", "ba", lead + "b")


def _matmul(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Contraction]:
    a, b = args[:2]
    if min(a.dim(), b.dim()) < 2:
        return
    lead = ascii_letters[3 : 1 + max(a.dim(), b.dim())]
    shapes = [(1,) * (len(lead) + 2 - x.dim()) + tuple(x.shape[:-2]) for x in (a, b)]
    own = ["".join(" " if s == 1 else x for s, x in zip(shape, lead, strict=True)) for shape in shapes]
    one = [name[len(name) - (x.dim() - 2) :] for name, x in zip(own, (a, b), strict=True)]
    z = "".join(" " if p == q == " " else x for p, q, x in zip(*own, lead, strict=True))
    yield Contraction(a, b, one[0] + "ab", one[1] + "bc", z + "ac")


def _einsum(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Contraction]:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return
    given, arrow, out = equation.replace(" ", "").partition("->")
    names = given.split(",")
    if len(names) != 2 or sum("..." in name for name in names) == 2:
        return  # what the dots stand for may repeat one another
    if not arrow:
        out = "..." * ("..." in given) + "".join(sorted(k for k in set(given) - {",", "."} if given.count(k) == 1))
    more = "".join(letter for letter in ascii_letters if letter not in equation)
    lengths = [x.dim() - len(name.replace("...", "")) for name, x in zip(names, operands, strict=True)]
    dots = more[: max(n if "..." in name else 0 for n, name in zip(lengths, names, strict=True))]
    (a, b), (of_a, of_b) = operands, (name.replace("...", dots) for name in names)
    yield Contraction(a, b, of_a, of_b, out.replace("...", dots))


def _grouped(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Contraction]:
    """Rows sorted by the weight they meet; offs has where those of each end."""
    x, w = args[:2]
    offs = kwargs.get("offs", args[2] if len(args) > 2 else None)
    if x.dim() != 2 or w.dim() != 3 or offs is None:
        return
    start = 0
    for k, end in enumerate(offs.tolist()):
        if end > start:
            yield Contraction(x[start:end], w[k], "ab", "bc", "ac", slice(start, end))
        start = end


def _added(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Contraction]:
    if not kwargs and len(args) == 3:
        yield from _matmul(args[1:], kwargs)


CONTRACTIONS: dict[Any, Callable[[tuple[Any, ...], dict[str, Any]], Iterator[Contraction]]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm), _matmul),
    **dict.fromkeys((torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.addmm, torch.baddbmm), _added),
    torch.einsum: _einsum,
    GROUPED_MM: _grouped,
}
