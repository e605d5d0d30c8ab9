"""The input covariance of a stride-1 convolution by shifted products, without patches.

The entry of kernel positions k and l is a sum over the window positions u of x[u + k] x[u + l]^T. With v = u + k
it is a sum of x[v] x[v + (l - k)]^T over the region k + [0, out), which for all pairs of one shift l - k is the
same but for strips at the border. So each shift needs one product per piece that the borders of the regions cut,
and 13 shifts (symmetry) replace the 45 products of a 3x3 kernel.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

Shape = tuple[int, ...]


def shifted_cov(x: Tensor, kernel: Shape, dilation: Shape, out: Shape) -> Tensor:
    """sum_{n,u} a a^T [c K, c K] for the windows a of a padded input x [n, c, *space], in the weight's order."""
    c = x.shape[1]
    x = x.movedim(1, -1).movedim(0, -2).contiguous()  # space, n, c
    positions = list(product(*(range(k) for k in kernel)))
    index = {position: number for number, position in enumerate(positions)}
    cov = x.new_empty(len(positions), len(positions), c, c)
    for shift in product(*(range(1 - k, k) for k in kernel)):
        if shift < tuple(0 for _ in kernel):
            continue  # the transpose of the opposite shift
        for k, block in _blocks_of_shift(x, shift, kernel, dilation, out).items():
            here, there = index[k], index[tuple(a + b for a, b in zip(k, shift, strict=True))]
            cov[here, there] = block
            cov[there, here] = block.mT
    return cov.permute(2, 0, 3, 1).reshape(c * len(positions), -1)


def _blocks_of_shift(x: Tensor, shift: Shape, kernel: Shape, dilation: Shape, out: Shape) -> dict[Shape, Tensor]:
    """For each kernel position k with k + shift inside the kernel, sum_v x[v] x[v + shift]^T over its region."""
    settings = list(zip(shift, kernel, dilation, out, strict=True))
    starts = [range(max(0, -s), size - max(0, s)) for s, size, _, _ in settings]  # positions k per dimension
    cuts = [
        sorted({edge for k in ks for edge in (k * d, k * d + length)})
        for ks, (_, _, d, length) in zip(starts, settings, strict=True)
    ]
    c = x.shape[-1]
    pieces = x.new_empty(*(len(cut) - 1 for cut in cuts), c, c)
    for number in product(*(range(len(cut) - 1) for cut in cuts)):
        piece = [(cut[j], cut[j + 1]) for cut, j in zip(cuts, number, strict=True)]
        offsets = [s * d for s, _, d, _ in settings]
        here = x[tuple(slice(a, b) for a, b in piece)].reshape(-1, c)
        there = x[tuple(slice(a + o, b + o) for (a, b), o in zip(piece, offsets, strict=True))].reshape(-1, c)
        torch.mm(here.mT, there, out=pieces[number])
    blocks = {}
    for k in product(*starts):
        edges = zip(cuts, k, settings, strict=True)
        region = tuple(slice(cut.index(j * d), cut.index(j * d + length)) for cut, j, (_, _, d, length) in edges)
        blocks[k] = pieces[region].sum(tuple(range(len(kernel))))
    return blocks
