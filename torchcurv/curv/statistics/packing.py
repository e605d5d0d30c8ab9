"""What is kept as rows, as bytes for other processes: what layers were given, and the signals.

The bytes are those of a pickle, which knows tensors by where they lie behind it, and layers by their numbers.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.statistics.inputs import Inputs, given_of, inputs_from

ALIGNED = 64  # bytes; tensors begin at multiples, so that every process computes with them alike


def _as_given(inputs: Inputs) -> tuple[Callable[..., Inputs], tuple[Any, ...]]:
    return inputs_from, given_of(inputs)


class _Packer(pickle.Pickler):
    """known: what all processes have, such as layers. devices: those that tensors may lie on."""

    def __init__(self, file: io.BytesIO, known: Sequence[object], devices: Sequence[torch.device]) -> None:
        super().__init__(file)
        self.dispatch_table = {**copyreg.dispatch_table, Inputs: _as_given}
        self.numbers, self.devices = {id(one): k for k, one in enumerate(known)}, list(devices)
        self.places: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self.parts: list[Tensor] = []
        self.size = 0

    def persistent_id(self, one: Any) -> Any:
        if id(one) in self.numbers:
            return self.numbers[id(one)]
        return self._place(one.detach()) if isinstance(one, Tensor) else None

    def _place(self, tensor: Tensor) -> tuple[Any, ...]:
        """(where its bytes begin, shape, type, number of its device)."""
        key = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
        if key not in self.places:
            self.places[key] = self.size, tuple(tensor.shape), tensor.dtype, self.devices.index(tensor.device)
            self.parts.append(tensor)
            self.size += _aligned(tensor.numel() * tensor.element_size())
        return self.places[key]


class _Unpacker(pickle.Unpickler):
    def __init__(self, packed: bytes, data: Tensor, known: Sequence[object], devices: Sequence[torch.device]) -> None:
        super().__init__(io.BytesIO(packed))
        self.data, self.known, self.devices = data, known, devices
        self.tensors: dict[tuple[Any, ...], Tensor] = {}

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, int):
            return self.known[pid]
        if pid not in self.tensors:
            start, shape, dtype, device = pid
            size = torch.Size(shape).numel() * dtype.itemsize
            self.tensors[pid] = self.data[start : start + size].view(dtype).reshape(shape).to(self.devices[device])
        return self.tensors[pid]


def packed(kept: object, known: Sequence[object], devices: Sequence[torch.device]) -> tuple[Tensor, int]:
    """(bytes on the first device, how many of them are read on the host)."""
    file = io.BytesIO()
    packer = _Packer(file, known, devices)
    packer.dump(kept)
    written = file.getvalue()
    head = _aligned(len(written))
    data = torch.zeros(head + packer.size, dtype=torch.uint8, device=devices[0])
    data[: len(written)] = torch.frombuffer(bytearray(written), dtype=torch.uint8)
    start = head
    for tensor in packer.parts:
        own = tensor.contiguous().reshape(-1).view(torch.uint8)
        data[start : start + len(own)] = own
        start += _aligned(len(own))
    return data, head


def unpacked(data: Tensor, head: int, known: Sequence[object], devices: Sequence[torch.device]) -> Any:
    """The inverse; its tensors lie in `data`."""
    return _Unpacker(bytes(data[:head].tolist()), data[head:], known, devices).load()


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
