"""The layout of a block: its layers, and how tensors shaped like its parameters become coordinates of its factor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from torchcurv.curv.layers.layer import Layer, ParamSlice


class BlockLayout:
    """The layers of a block, one after the other.

    pieces: parameters, or rows of them, in the order of the layers. size: how many numbers they hold.
    """

    def __init__(self, name: str, layers: list[Layer]) -> None:
        self.name, self.layers = name, layers
        self.size = sum(torch.Size(layer.shape).numel() for layer in layers)
        self.pieces = [piece for layer in layers for piece in layer.pieces]
        self.params = list(dict.fromkeys(piece.param for piece in self.pieces))

    def join(self, tensors: list[Tensor]) -> list[Tensor]:
        """Tensors shaped like `pieces` -> one [..., g, o, i] per layer."""
        joined = []
        for layer in self.layers:
            own, tensors = tensors[: len(layer.pieces)], tensors[len(layer.pieces) :]
            joined.append(layer.join(own))
        return joined

    def split(self, joined: list[Tensor]) -> list[Tensor]:
        return [part for layer, x in zip(self.layers, joined, strict=True) for part in layer.split(x)]

    def flatten(self, joined: list[Tensor]) -> Tensor:
        """One tensor [..., g, o, i] for the factor: several layers are laid one after the other."""
        if len(joined) == 1:
            return joined[0]
        return torch.cat([x.flatten(-3) for x in joined], -1).unsqueeze(-2).unsqueeze(-2)

    def unflatten(self, x: Tensor) -> list[Tensor]:
        if len(self.layers) == 1:
            return [x]
        sizes = [torch.Size(layer.shape).numel() for layer in self.layers]
        parts = x.squeeze(-2).squeeze(-2).split(sizes, -1)
        return [part.unflatten(-1, layer.shape) for part, layer in zip(parts, self.layers, strict=True)]

    @property
    def factor_shape(self) -> tuple[int, int, int]:
        """(g, o, i) of one tensor over the block's coordinates."""
        return self.layers[0].shape if len(self.layers) == 1 else (1, 1, self.size)

    def of_parameters(self, x: Tensor, params: list[Tensor]) -> list[Tensor]:
        """Vectors over the coordinates of the factor [k, size] -> [k, *shape] for each parameter."""
        parts = self.split(self.unflatten(x.reshape(-1, *self.factor_shape)))
        whole = {p: x.new_zeros(len(x), *p.shape) for p in params}
        for piece, part in zip(self.pieces, parts, strict=True):
            piece.of(whole[piece.param]).copy_(part)
        return list(whole.values())

    def coordinates(self, tensors: list[Tensor]) -> Tensor:
        """The inverse of `of_parameters`, of what belongs to the block."""
        by_param = dict(zip(self.params, tensors, strict=True))
        joined = self.join([piece.of(by_param[piece.param]) for piece in self.pieces])
        return self.flatten(joined).flatten(1)

    @property
    def is_part(self) -> bool:
        """Whether it has a part of a parameter, as an expert has, whose gradient is there whether it ran or not."""
        return any(piece.rows is not None for piece in self.pieces)

    @property
    def state_key(self) -> str:
        """Under which the state of the first parameter keeps the block: several may share the rows of one."""
        rows = self.pieces[0].rows
        return "curvature" if rows is None else f"curvature:{rows.start}"


class HasPieces(Protocol):
    """What has the pieces of a layout."""

    pieces: list[ParamSlice]


def gathered(by_block: Iterable[tuple[HasPieces, list[Tensor]]]) -> dict[Tensor, Tensor]:
    """By parameter, from tensors shaped like the pieces of blocks (leading dimensions are a batch)."""
    out: dict[Tensor, Tensor] = {}
    for block, parts in by_block:
        for piece, x in zip(block.pieces, parts, strict=True):
            if piece.rows is None:
                out[piece.param] = x
                continue
            lead = x.shape[: x.dim() - piece.param.dim()]
            if piece.param not in out:
                out[piece.param] = x.new_zeros(*lead, *piece.param.shape)
            piece.of(out[piece.param]).copy_(x)
    return out
