"""Precision, draws and host reads: what every floor uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

_assumed: list[bool] = []  # one entry for each `assume_accelerator` that is active


def on_cpu(tensor: Tensor) -> bool:
    """Whether reading a tensor's value costs nothing; on an accelerator it waits for everything queued."""
    return not _assumed and tensor.device.type == "cpu"


@contextmanager
def assume_accelerator() -> Iterator[None]:
    """Inside of it, every tensor is treated as one on an accelerator: code takes the paths without host reads.

    For tests and for counting operations on a machine without an accelerator.
    """
    _assumed.append(True)
    try:
        yield
    finally:
        _assumed.pop()


def chosen(ok: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """new if ok else old, without a host sync on an accelerator; ok: a 0-d bool tensor."""
    if on_cpu(ok):
        return new if ok else old
    return torch.where(ok, new, old)


def sum_of(tensors: list[Tensor]) -> Tensor:
    """The sum of all values, a 0-d tensor: inf or nan where one of them is, or where it overflows itself."""
    total = tensors[0].sum()
    for tensor in tensors[1:]:
        total = total + tensor.sum()
    return total


def random_signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(like).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def at_least_float32(tensor: Tensor) -> Tensor:
    wanted = torch.promote_types(tensor.dtype, torch.float32)
    return tensor if tensor.dtype == wanted else tensor.to(wanted)


def full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Autocast switched off, where it is on."""
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()
