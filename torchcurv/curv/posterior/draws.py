"""Weights drawn from a posterior: the parameters hold them for a while, and the model is called under each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def temporary_values(values: dict[Tensor, Tensor]) -> Iterator[None]:
    """The parameters hold other values; the bits they had come back on exit, also after an exception."""
    with torch.no_grad():
        before = {p: p.detach().clone() for p in values}
    try:
        with torch.no_grad():
            for p, value in values.items():
                p.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for p, value in before.items():
                p.copy_(value)


@torch.no_grad()
def outputs_under(draws: Iterable[AbstractContextManager[None]], model: nn.Module, inputs: Any) -> Tensor:
    """What the model returns under each of the draws, stacked [draws, ...].

    inputs: as in `arguments`, or a function without arguments that returns a tensor.
    """
    outputs = []
    for draw in draws:
        with draw:
            outputs.append(inputs() if callable(inputs) else call(model, inputs))
        if not isinstance(outputs[-1], Tensor):
            raise TypeError(
                f"predict: the output is a {type(outputs[-1]).__name__}; pass a function without arguments that calls "
                "the model and returns the tensor to be stacked"
            )
    return torch.stack(outputs)


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of what the model is called with: a tensor, a tuple of positional or a dict of keyword ones."""
    if isinstance(inputs, dict):
        return (), inputs
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}


def call(model: nn.Module, inputs: Any) -> Any:
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)
