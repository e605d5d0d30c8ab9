"""Lower triangles of symmetric matrices as rectangles, which are half as large and made of slices.

Of a matrix [d, d] the first half of the columns is kept as it stands, and the triangle that is left below the other
half lies transposed in the corner that is free above it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchcurv.curv.linalg.block_diagonal import symmetrised

COLUMNS = 128  # that are copied at once


def triangle_shape(shape: torch.Size) -> torch.Size:
    """That of the rectangle for matrices [..., d, d]."""
    d = shape[-1]
    if len(shape) < 2 or shape[-2] != d:
        raise ValueError(
            f"a statistic or factor of shape {tuple(shape)} is named in `symmetric`, which is for matrices [..., d, d]"
        )
    return torch.Size([*shape[:-2], d + 1 - d % 2, (d + 1) // 2])


def to_triangle(matrix: Tensor) -> Tensor:
    """d (d + 1) / 2 numbers for each matrix [..., d, d] whose lower triangle counts."""
    rectangle = matrix.new_empty(triangle_shape(matrix.shape))
    half = rectangle.shape[-1]
    rectangle[..., 1 - matrix.shape[-1] % 2 :, :] = matrix[..., :half]
    corner, rest = _corner(rectangle, matrix.shape[-1]), matrix[..., half:, half:].mT
    for part in _parts(corner.shape[-1]):
        corner[..., : part.start, part] = rest[..., : part.start, part]
        corner[..., part, part] = corner[..., part, part].tril(-1) + rest[..., part, part].triu()
    return rectangle


def from_triangle(rectangle: Tensor, d: int) -> Tensor:
    """The symmetric matrices [..., d, d]."""
    half = rectangle.shape[-1]
    matrix = rectangle.new_empty(*rectangle.shape[:-2], d, d)
    matrix[..., :half] = rectangle[..., 1 - d % 2 :, :]
    corner = _corner(rectangle, d)
    for part in _parts(d - half):
        own = slice(half + part.start, half + part.stop)
        matrix[..., own, half : own.stop] = corner[..., : part.stop, part].mT
    for part in _parts(d):
        matrix[..., : part.start, part] = matrix[..., part, : part.start].mT
        matrix[..., part, part] = symmetrised(matrix[..., part, part])
    return matrix


def _corner(rectangle: Tensor, d: int) -> Tensor:
    """The square in which the second triangle lies above the rest of the first, with its diagonal."""
    rest = d - rectangle.shape[-1]
    return rectangle[..., :rest, rectangle.shape[-1] - rest :]


def _parts(d: int) -> list[slice]:
    return [slice(start, min(start + COLUMNS, d)) for start in range(0, d, COLUMNS)]
