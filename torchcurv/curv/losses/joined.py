"""A call of a loss that is given more than (output, target), as a function of one tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchcurv.curv.graph import tree_flatten, tree_leaves, tree_unflatten

BATCH_SECOND = (nn.CTCLoss, F.ctc_loss)  # whose first argument is [time, batch, classes]


@dataclass(frozen=True)
class Place:
    """Of one of the outputs: its number among all that the loss is given, its shape, and where the batch is in it."""

    number: int
    shape: torch.Size
    dim: int


class JoinedCall:
    """The loss as a function of (z, samples): z [n, c] has all that depends on the model side by side, and the rest of
    the call is held. samples: their numbers, a LongTensor.
    """

    def __init__(self, loss: Any, args: Any, kwargs: Any, is_output: Callable[[Any], bool], n: int) -> None:
        self.loss, self.n = loss, n
        self.__name__ = getattr(loss, "__name__", type(loss).__name__)
        self.samples = torch.arange(n)
        self._reduction = getattr(loss, "reduction", kwargs.get("reduction", "mean"))  # of torch's losses

        def of_samples(x: Any) -> bool:
            """Whether it is a list with an entry for each sample."""
            listed = isinstance(x, list | tuple) and len(x) == n and x is not args
            return listed and not any(map(is_output, tree_leaves(x)))

        self._held, self._tree = tree_flatten((args, kwargs), is_leaf=of_samples)
        self._listed = [k for k, x in enumerate(self._held) if isinstance(x, list | tuple)]
        self.outputs = [x for x in self._held if is_output(x)]
        self._places = [self._place(k, x) for k, x in enumerate(self._held) if is_output(x)]
        for place in self._places:
            self._held[place.number] = None

    def _place(self, number: int, x: Tensor) -> Place:
        dims = [dim for dim, size in enumerate(x.shape[:2]) if size == self.n]
        own = self.batch_dim_of(self.loss)
        if not dims:
            raise ValueError(
                f"the loss {self.__name__!r} was given a tensor of shape {tuple(x.shape)} that depends on the model "
                f"and has no batch of {self.n} samples: give it tensors [batch, ...], and add what is a number outside "
                "of the loss"
            )
        return Place(number, x.shape, own if own in dims else dims[0])

    @staticmethod
    def batch_dim_of(loss: Any) -> int:
        """Where the batch is in what a loss is given first."""
        return int(loss in BATCH_SECOND or type(loss) in BATCH_SECOND)

    def divisor(self) -> float | None:
        """What a mean over samples divides by, 1 for a sum, where it is one of torch's."""
        own = type(self.loss) if isinstance(self.loss, nn.Module) else self.loss
        if not str(getattr(own, "__module__", "")).startswith("torch.nn"):
            return None
        return {"sum": 1.0, "mean": float(self.n)}.get(str(self._reduction))

    @property
    def _simple(self) -> bool:
        """Whether there is one output, with the batch first: then it is z itself."""
        return len(self._places) == 1 and self._places[0].dim == 0

    def join(self) -> Tensor:
        """z; what the call held of the graph is let go."""
        outputs, self.outputs = self.outputs, []
        if self._simple:
            return outputs[0]
        flat = [x.movedim(place.dim, 0).reshape(self.n, -1) for x, place in zip(outputs, self._places, strict=True)]
        return torch.cat(flat, 1)

    def arguments(self, z: Tensor, samples: Tensor | None = None) -> Any:
        """(args, kwargs) with the outputs of z, and what is held of each sample for some of them; None: all."""
        given = self._held.copy() if samples is None else [self._of(k, samples) for k in range(len(self._held))]
        for place, part in zip(self._places, self._parts(z), strict=True):
            given[place.number] = part
        return tree_unflatten(given, self._tree)

    def _parts(self, z: Tensor) -> list[Tensor]:
        if self._simple:
            return [z]
        parts = []
        for part, place in zip(
            z.split([p.shape.numel() // self.n for p in self._places], 1), self._places, strict=True
        ):
            shape = [size for dim, size in enumerate(place.shape) if dim != place.dim]
            parts.append(part.reshape(len(z), *shape).movedim(0, place.dim))
        return parts

    def _of(self, number: int, samples: Tensor) -> Any:
        """What is held of some of the samples: of tensors and of lists that have as many entries as there are."""
        x = self._held[number]
        if isinstance(x, Tensor) and x.shape[:1] == (self.n,):
            return x.index_select(0, samples.to(x.device))
        return type(x)(x[k] for k in samples.tolist()) if number in self._listed else x

    def __call__(self, z: Tensor, samples: Tensor) -> Any:
        args, kwargs = self.arguments(z, None if len(samples) == self.n else samples)
        return self.loss(*args, **kwargs)
