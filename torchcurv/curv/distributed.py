"""The processes that train one model together, each on a part of the batch.

A process is a micro-batch: the loss is the mean over the processes of theirs, as DistributedDataParallel averages
gradients, and statistics that are sums add up over them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from torchcurv.curv.graph import without_sink, wrapper_that_runs


class Ranks:
    """The processes whose gradients are averaged; alone where there is one.

    process_group: "auto": that of the DistributedDataParallel that is seen around the forward pass; a group, whose
    gradients somebody else averages; None: each process trains a model of its own.
    placement: where factors are made, see `factor_placement` of the optimizers.
    """

    def __init__(self, process_group: Any = "auto", placement: str = "replicated") -> None:
        self.said, self.placement = process_group, placement
        self.agreed = False  # whether they have compared what they train, since it was built or loaded
        self._seen: Callable[[], Any] = lambda: None  # weakly: a group that outlives its end aborts the process at exit
        self._wrapper: Callable[[], DistributedDataParallel | None] = lambda: None

    def saw(self, module: nn.Module) -> None:
        """A forward pass of the model starts, of which this is the outermost module that we know."""
        if not running():
            return
        wrapper = module if isinstance(module, DistributedDataParallel) else wrapper_that_runs()
        if wrapper is not None:
            self._seen, self._wrapper = weakref.ref(wrapper.process_group), weakref.ref(wrapper)

    @property
    def searching(self) -> bool:
        """Whether a wrapper is still to be seen around the forward pass."""
        return self.said == "auto" and self._seen() is None and running() and distributed.get_world_size() > 1

    def pass_of_ours(self) -> AbstractContextManager[None]:
        """What a pass through the graph runs in that is none of the user's."""
        wrapper = self._wrapper()
        return nullcontext() if wrapper is None else without_sink(wrapper)

    @property
    def group(self) -> Any:
        """None: this process is alone."""
        if self.said is None or not running():
            return None
        group = self._seen() if self.said == "auto" else self.said
        if group is None and distributed.get_world_size() > 1:
            raise RuntimeError(
                f"torch.distributed runs {distributed.get_world_size()} processes, and the model was not called "
                "through DistributedDataParallel, so that each would measure its own curvature: wrap the model in "
                "DistributedDataParallel, or pass process_group=, the group whose gradients are averaged "
                "(torch.distributed.group.WORLD), or process_group=None where each process trains a model of its own"
            )
        return None if group is None or distributed.get_world_size(group) == 1 else group

    @property
    def place(self) -> tuple[int, int]:
        """(the number of this process, how many there are), as far as is known."""
        group = None if self.searching else self.group
        return (0, 1) if group is None else (distributed.get_rank(group), distributed.get_world_size(group))

    @property
    def count(self) -> int:
        group = self.group
        return 1 if group is None else distributed.get_world_size(group)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes the sum of those of all processes; one message for each type and device."""
        group = self.group
        kinds: dict[tuple[Any, Any], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        if group is None:
            return
        for own in kinds.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in own])
            distributed.all_reduce(flat, group=group)
            for tensor, part in zip(own, flat.split([tensor.numel() for tensor in own]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def spread_(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Each tensor becomes that of the process that owns it; one message for each owner, type and device."""
        kinds: dict[tuple[Any, ...], list[Tensor]] = {}
        for tensor, owner in zip(tensors, owners, strict=True):
            kinds.setdefault((owner, tensor.dtype, tensor.device), []).append(tensor)
        group, waiting = self.group, []
        for (owner, *_), own in kinds.items():
            flat, source = torch.cat([tensor.reshape(-1) for tensor in own]), distributed.get_global_rank(group, owner)
            waiting.append((own, flat, distributed.broadcast(flat, source, group, async_op=True)))
        for own, flat, work in waiting:
            work.wait()
            for tensor, part in zip(own, flat.split([tensor.numel() for tensor in own]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def gathered(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """What each process has, in their order; sizes: how many elements that is."""
        width = max(sizes)
        padded = torch.cat([own, own.new_zeros(width - len(own))])
        every = own.new_empty(len(sizes), width)
        distributed.all_gather(list(every), padded, group=self.group)
        return [row[:size] for row, size in zip(every, sizes, strict=True)]

    @property
    def rank(self) -> int:
        """The number of this process."""
        group = self.group
        return 0 if group is None else distributed.get_rank(group)

    def at_own_place(self, own: list[int]) -> list[int]:
        """Numbers among zeros, so that the sum over processes has those of each, in their order."""
        before = self.rank * len(own)
        return [0] * before + own + [0] * (self.count * len(own) - before - len(own))

    def texts(self, own: str, device: torch.device) -> list[str]:
        """Those of all processes, in their order."""
        data = torch.tensor(list(own.encode()), dtype=torch.uint8, device=device)
        sizes = torch.tensor(self.at_own_place([len(data)]), device=device)
        self.sum_([sizes])
        return [bytes(x.tolist()).decode() for x in self.gathered(data, sizes.tolist())]

    def mean(self, numbers: Tensor) -> Tensor:
        """That of all processes."""
        if self.count == 1:
            return numbers
        total = numbers.detach().clone()
        self.sum_([total])
        return total / self.count


def running() -> bool:
    return distributed.is_available() and distributed.is_initialized()
