"""Embeddings: one-hot inputs over a vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.layers.one_hot import Tokens
from torchcurv.curv.layers.view import View, by_last_dimension


def _kept(module: Any, index: Tensor) -> Tensor:
    """1 where the token counts, 0 where it is padding."""
    ones = torch.ones_like(index, dtype=torch.promote_types(module.weight.dtype, torch.float32))
    return ones if module.padding_idx is None else ones * (index != module.padding_idx)


def _embedding(module: Any, index: Tensor) -> Tokens:
    index = index.reshape(len(index), -1, 1)
    return Tokens(index, _kept(module, index), module.num_embeddings)


def _bag(module: Any, index: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tokens:
    if index.dim() == 1:
        assert offsets is not None
        index, weight = _bags_of_rows(index, offsets, weights, module.include_last_offset, _kept(module, index))
    else:
        weight = _kept(module, index) if weights is None else _kept(module, index) * weights
    if module.mode == "mean":
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1)
    return Tokens(index.unsqueeze(1), weight.unsqueeze(1), module.num_embeddings)


def _bags_of_rows(
    index: Tensor, offsets: Tensor, weights: Tensor | None, last_included: bool, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Bags laid one after the other -> (index, weight) [bags, longest]."""
    starts = offsets[:-1] if last_included else offsets
    ends = torch.cat([starts[1:], offsets[-1:] if last_included else offsets.new_full((1,), len(index))])
    places = starts[:, None] + torch.arange(int((ends - starts).amax().clamp_min(1)), device=index.device)
    inside = places < ends[:, None]
    places = places.clamp_max(max(0, len(index) - 1))
    weight = kept if weights is None else kept * weights
    return index[places], weight[places] * inside


def _refused_embedding(module: Any) -> str | None:
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq=True divides its gradient by the counts of the batch"
    if module.sparse:
        return "sparse=True gives it a sparse gradient"
    if getattr(module, "mode", "sum") == "max":
        return 'mode="max" takes each element from another token'
    return None


EMBEDDING = View(_embedding, by_last_dimension, transposed=True, tokens=True, refuses=_refused_embedding)
EMBEDDING_BAG = View(
    _bag,
    by_last_dimension,
    arguments=("input", "offsets", "per_sample_weights"),
    transposed=True,
    tokens=True,
    batch_dependent=True,
    refuses=_refused_embedding,
)
