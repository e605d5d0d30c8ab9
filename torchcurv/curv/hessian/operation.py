"""What is noted of one call of a torch function in a forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torchcurv.curv.graph import Edge, TreeSpec, tree_flatten, tree_unflatten, version_of

Key = tuple[Node, int]
Spec = TreeSpec | tuple[int, tuple[str, ...]]  # how a list of arguments is put together again


Apply = Callable[..., Tensor]  # (operation, argument, H at its output, propagation) -> H at the argument


class Rule(NamedTuple):
    """How H goes through one function, to one of its arguments.

    values: whether it reads the values of what it is applied to. operands: whether it reads those of the others.
    curved: whether it has a second derivative. joint: whether H may go to several arguments at once (the function is
    linear in all of them together, or d²/du dv of two of them is dropped). random: whether it drops elements at random,
    so that its slope is noted. switch: whether its slope is 0 or 1.
    chain: whether a chain may contain it (chains.py): "entry", a map with at most one entry per row of J; "mixing", one
    with more; "coupled", one that only chains of the matrix form contain; or "". move: whether it selects elements.
    copies: whether it is the identity, but for the type and the device.
    """

    apply: Apply
    values: bool = False
    operands: bool = False
    curved: bool = False
    joint: bool = False
    random: bool = False
    switch: bool = False
    chain: str = ""
    move: bool = False
    copies: bool = False


class Kept(NamedTuple):
    """A tensor argument, detached, with the version that an edit in place would change."""

    tensor: Tensor
    version: int


class Blank(NamedTuple):
    """An argument of which its rule needs only the shape."""

    shape: torch.Size
    device: torch.device


@dataclass(eq=False)
class Op:
    """One output of one call of a torch function.

    leaves, spec: its arguments, flattened. inputs: the edges of those that have a history. part: which output it is.
    shape: of the output itself (its edge may be that of a base). after: the name of the operation before it. slope: of
    a dropout, d(out)/d(in) element by element. inside: the module that called it, known where it may be refused.
    packed: whether hooks (of a checkpoint) hold what its node has saved, which can then be asked for once only.
    known: its rule; None where there is none, which is refused before it is asked for.
    """

    func: Callable[..., Any]
    name: str
    number: int
    after: str
    inputs: dict[int, Edge]
    output: Edge
    shape: torch.Size
    leaves: list[Any]
    spec: Spec
    part: int | None = None
    slope: Tensor | None = None
    inside: str = ""
    packed: bool = False
    known: Rule | None = None

    @property
    def rule(self) -> Rule:
        assert self.known is not None
        return self.known

    @property
    def args(self) -> tuple[Any, ...]:
        return unflattened(self.leaves, self.spec)[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        return unflattened(self.leaves, self.spec)[1]

    @property
    def place(self) -> str:
        return place_of(self.name, self.number, self.after, self.inside)

    def refused(self, why: str) -> NotImplementedError:
        return refusal(self.place, why)

    def read(self, leaf: Any, dtype: torch.dtype) -> Any:
        """An argument as it was; floating tensors in `dtype`, so that a pass under autocast can be run again."""
        if isinstance(leaf, Blank):
            return torch.zeros(leaf.shape, dtype=dtype, device=leaf.device)
        if not isinstance(leaf, Kept):
            return leaf
        if version_of(leaf.tensor) != leaf.version:
            raise RuntimeError(f"an argument of {self.place} was edited in place afterwards: edit a copy of it")
        return leaf.tensor.to(dtype) if leaf.tensor.is_floating_point() else leaf.tensor

    def named(self, slot: int, dtype: torch.dtype) -> Callable[[str], Any]:
        """Its arguments by name, for functions written in Python; `slot` is `input`. Only what is asked for is read."""
        try:
            bound = inspect.signature(self.func).bind(*self.args, **self.kwargs)
        except (TypeError, ValueError):
            raise self.refused("only the function of torch.nn.functional is known") from None
        bound.apply_defaults()
        if bound.arguments["input"] is not self.leaves[slot]:
            raise self.refused("only its input may depend on layers")
        return lambda name: self.read(bound.arguments[name], dtype)

    def option(self, position: int, name: str, default: Any = None) -> Any:
        """An argument that is no tensor."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


def place_of(name: str, number: int, after: str, inside: str = "") -> str:
    where = f", in {inside}" if inside else ""
    return f"{name} (operation {number} of the forward pass, after {after or 'its start'}{where})"


def refusal(place: str, why: str) -> NotImplementedError:
    return NotImplementedError(f"a Hessian cannot be propagated through {place}: {why}")


def flattened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Spec]:
    """The arguments as one list; those that hold no others without the work of a pytree."""
    leaves = [*args, *kwargs.values()]
    if any(isinstance(leaf, tuple | list | dict) for leaf in leaves):
        return tree_flatten((args, kwargs))
    return leaves, (len(args), tuple(kwargs))


def unflattened(leaves: list[Any], spec: Spec) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(spec, TreeSpec):
        return tree_unflatten(leaves, spec)
    count, names = spec
    return tuple(leaves[:count]), dict(zip(names, leaves[count:], strict=True))


def key_of(edge: Edge) -> Key:
    return edge.node, edge.number
