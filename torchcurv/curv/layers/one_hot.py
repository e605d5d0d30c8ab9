"""Tokens: inputs that are one-hot rows over a vocabulary, or weighted sums of some, without the vocabulary.

a[n, r, :] = sum_l weight[n, r, l] onehot(index[n, r, l])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Tokens:
    """index, weight [n, r, l]; size: of the vocabulary. Padding has weight 0."""

    index: Tensor
    weight: Tensor
    size: int

    @property
    def positions(self) -> int:
        return self.index.shape[1]

    def of(self, samples: slice) -> Tokens:
        return Tokens(self.index[samples], self.weight[samples], self.size)

    def repeated(self, n: int) -> Tokens:
        """Those of one sample as those of n."""
        return Tokens(self.index.expand(n, -1, -1), self.weight.expand(n, -1, -1), self.size)

    def per_sample(self, n: int) -> Tokens:
        """[n k, r, l] -> [n, k r, l]."""
        last = self.index.shape[-1]
        return Tokens(self.index.reshape(n, -1, last), self.weight.reshape(n, -1, last), self.size)

    @staticmethod
    def joined(parts: list[Tokens]) -> Tokens:
        """Further positions; bags of different sizes are filled up with weight 0."""
        last = max(part.index.shape[-1] for part in parts)
        index, weight = (
            torch.cat([F.pad(x, (0, last - x.shape[-1])) for x in each], 1)
            for each in ([part.index for part in parts], [part.weight for part in parts])
        )
        return Tokens(index, weight, parts[0].size)

    def mean(self) -> Tokens:
        """mean_r a: one bag of all that the sample contains."""
        n, r, _ = self.index.shape
        return Tokens(self.index.reshape(n, 1, -1), self.weight.reshape(n, 1, -1) / max(1, r), self.size)

    def dense(self) -> Tensor:
        """a [n, r, 1, size]."""
        a = self.weight.new_zeros(*self.index.shape[:2], self.size)
        return a.scatter_add_(-1, self.index, self.weight).unsqueeze(2)

    def square_sums(self, weights: Tensor | None = None) -> Tensor:
        """sum_{n,r} weights[n, r] a² [size]."""
        same = self._coinciding(self.index, self.weight.unsqueeze(-1)).squeeze(-1)
        values = self.weight * same if weights is None else self.weight * same * weights.unsqueeze(-1)
        return values.new_zeros(self.size).index_add_(0, self.index.flatten(), values.flatten())

    @staticmethod
    def _coinciding(index: Tensor, x: Tensor) -> Tensor:
        """sum_l' x[..., l', :] over the l' that have the same index as l [..., l, :]; no sort, no host sync."""
        if index.shape[-1] == 1:
            return x
        same = (index.unsqueeze(-1) == index.unsqueeze(-2)).to(x.dtype)
        return same @ x

    def rows_of(self, matrix: Tensor) -> Tensor:
        """sum_i a_i matrix[i] [n, r, o] for matrix [size, o]."""
        return torch.einsum("nrl,nrlo->nro", self.weight, matrix[self.index])

    def added_rows(self, s: Tensor) -> Tensor:
        """sum_{n,r} a s^T [size, o] for s [n, r, o]."""
        values = torch.einsum("nrl,nro->nrlo", self.weight, s)
        return s.new_zeros(self.size, s.shape[-1]).index_add_(0, self.index.flatten(), values.flatten(0, 2))

    def squared_gradients(self, s: Tensor) -> Tensor:
        """sum_{v,n} (sum_r a s^T)² [size, o], elementwise, for s [v, n, r, o]."""
        index = self.index.flatten(1)
        values = torch.einsum("nrl,vnro->vnrlo", self.weight, s).flatten(2, 3)
        products = (values * self._coinciding(index, values)).sum(0)
        return s.new_zeros(self.size, s.shape[-1]).index_add_(0, index.flatten(), products.flatten(0, 1))
