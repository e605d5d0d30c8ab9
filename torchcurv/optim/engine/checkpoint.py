"""Loading what was saved, without what torch would make of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def exact_state(optimizer: torch.optim.Optimizer, then: Callable[[], None]) -> Iterator[None]:
    """Inside of it, `load_state_dict` keeps the precision of statistics; torch would cast them to the parameters'.

    then: called when the state is there, before the hooks that the user has registered.
    """
    seen: dict[str, Any] = {}

    def take(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.update(given)
        return {**given, "state": {}}

    def restore(_: Any) -> None:
        saved_ids = [key for group in seen["param_groups"] for key in group["params"]]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for key, p in zip(saved_ids, params, strict=True):
            if key in seen["state"]:
                optimizer.state[p] = adopted(seen["state"][key], p)
        then()

    handles = [
        optimizer.register_load_state_dict_pre_hook(take),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def adopted(value: Any, p: Tensor) -> Any:
    """A deep copy of loaded state for p: on its device, floats in float32 or better."""
    if isinstance(value, Tensor):
        dtype = torch.promote_types(p.dtype, torch.float32) if value.is_floating_point() else value.dtype
        return value.detach().to(p.device, dtype, copy=True)
    if isinstance(value, dict):
        return {key: adopted(item, p) for key, item in value.items()}
    return copy.deepcopy(value)
