"""A call of a loss that is given more than (output, target), as a function of one tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH_DIMS: dict[type[nn.Module], int] = {nn.CTCLoss: 1}  # of the first argument, [time, batch, classes]


@dataclass(frozen=True)
class Slot:
    """The place of one of the outputs among what the loss is given.

    shape: of the output, its batch first. dim: where the batch is in it.
    """

    number: int
    shape: tuple[int, ...]
    dim: int


class JoinedCall:
    """The loss as a function of (z, samples): z [n, c] has all that depends on the model side by side, and the rest of
    the call is held. samples: their numbers, a LongTensor.
    """

    def __init__(
        self, loss: Callable[..., Tensor], args: Any, kwargs: Any, is_output: Callable[[Tensor], bool], n: int
    ) -> None:
        self.loss, self.n = loss, n
        self.__name__ = getattr(loss, "__name__", type(loss).__name__)
        self.reduction = getattr(loss, "reduction", None)
        self.samples = torch.arange(n)
        self.outputs: list[Tensor] = []
        self.slots: list[Slot] = []
        self._call = _mapped((args, kwargs), lambda x: self._slot(x) if is_output(x) else x)

    def _slot(self, x: Tensor) -> Slot:
        dims = [dim for dim, size in enumerate(x.shape[:2]) if size == self.n]
        own = next((dim for cls, dim in BATCH_DIMS.items() if isinstance(self.loss, cls)), None)
        if not dims:
            raise ValueError(
                f"the loss {self.__name__!r} was given a tensor of shape {tuple(x.shape)} that depends on the model and "
                f"has no batch of {self.n} samples: give it tensors [batch, ...], and add what is a number outside of "
                "the loss"
            )
        slot = Slot(len(self.slots), tuple(x.shape), own if own in dims else dims[0])
        self.outputs.append(x)
        self.slots.append(slot)
        return slot

    @property
    def simple(self) -> bool:
        """Whether there is one output, with the batch first: then it is z itself."""
        return len(self.slots) == 1 and self.slots[0].dim == 0

    def join(self) -> Tensor:
        """z; what the call held of the graph is let go."""
        outputs, self.outputs = self.outputs, []
        if self.simple:
            return outputs[0]
        flat = [x.movedim(slot.dim, 0).reshape(self.n, -1) for x, slot in zip(outputs, self.slots, strict=True)]
        return torch.cat(flat, 1)

    def arguments(self, z: Tensor, samples: Tensor | None = None) -> Any:
        """(args, kwargs) with the outputs of z, and what is held of each sample for some of them; None: all."""
        rows = len(z)
        parts: list[Tensor] = [z]
        if not self.simple:
            sizes = [torch.Size(slot.shape).numel() // self.n for slot in self.slots]
            parts = []
            for part, slot in zip(z.split(sizes, 1), self.slots, strict=True):
                shape = [size for dim, size in enumerate(slot.shape) if dim != slot.dim]
                parts.append(part.reshape(rows, *shape).movedim(0, slot.dim))

        held = self._call if samples is None else self._of(samples)
        return _mapped(held, lambda x: parts[x.number] if isinstance(x, Slot) else x)

    def _of(self, samples: Tensor) -> Any:
        """What is held of some of the samples: of tensors and of lists that have as many entries as there are."""

        def chosen(x: Any) -> Any:
            if isinstance(x, Tensor) and x.shape[:1] == (self.n,):
                return x.index_select(0, samples.to(x.device))
            if isinstance(x, list | tuple) and len(x) == self.n and not any(isinstance(y, Slot) for y in leaves(x)):
                return type(x)(x[k] for k in samples.tolist())
            return x

        args, kwargs = self._call
        return tuple(map(chosen, args)), {key: chosen(value) for key, value in kwargs.items()}

    def __call__(self, z: Tensor, samples: Tensor) -> Tensor:
        args, kwargs = self.arguments(z, None if len(samples) == self.n else samples)
        return self.loss(*args, **kwargs)


def leaves(values: Any) -> list[Any]:
    """What is in nested tuples, lists, mappings and objects that hold tensors."""
    found: list[Any] = []
    _mapped(values, found.append)
    return found


def _mapped(values: Any, function: Callable[[Any], Any]) -> Any:
    """Nested tuples, lists, mappings and objects that hold tensors, with a function of what is in them."""
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*(_mapped(value, function) for value in values))
    if isinstance(values, list | tuple):
        return type(values)(_mapped(value, function) for value in values)
    if isinstance(values, Mapping):
        made: Any = copy.copy(values)
        for key, value in values.items():
            made[key] = _mapped(value, function)
        return made
    if any(isinstance(value, Tensor) for value in getattr(values, "__dict__", {}).values()) and not callable(values):
        made = copy.copy(values)
        for key, value in vars(values).items():
            setattr(made, key, _mapped(value, function))
        return made
    return function(values)
