"""Text that every machine has: the source of the standard library, as bytes."""

import argparse as source
import inspect

import torch
from torch import Tensor


def pieces(length: int, count: int) -> Tensor:
    """[count, length] bytes, one piece after the other."""
    data = inspect.getsource(source).encode()[: length * count]
    return torch.tensor(list(data), dtype=torch.long).reshape(-1, length)
