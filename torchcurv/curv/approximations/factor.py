"""What every factor answers: a symmetric matrix C in a form that can be solved with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, ClassVar

from torch import Tensor


class Factor:
    """A symmetric matrix C that can be solved with, and whatever else its form allows.

    Factors are frozen records of tensors: `state` is what goes into a state_dict, and comes back. What a form does not
    allow is refused by its name. x is [..., g, o, i] of the block's coordinates.
    """

    holds_damping: ClassVar[bool] = False  # whether another damping asks for another factor
    layer_by_layer: ClassVar[bool] = False  # whether vectors are lists with one tensor per layer
    symmetric: ClassVar[tuple[str, ...]] = ()  # the symmetric matrices in its state
    damping: Tensor | None
    finite: Any = None  # whether what it was made of was, where that was not known before: a 0-d bool tensor

    @property
    def ready(self) -> bool:
        """Whether it can be solved with."""
        return True

    @property
    def basis(self) -> tuple[Tensor, Tensor] | None:
        """(left, right) eigenvectors of a Kronecker product, where it is known by them."""
        return None

    def on(self, layout: Any, name: str, tensors: list[Tensor], *args: Any) -> list[Tensor]:
        """A method of it applied to tensors shaped like the pieces of a block, leading dimensions being a batch."""
        x = layout.flatten(layout.join(tensors))
        return layout.split(layout.unflatten(getattr(self, name)(x, *args)))

    def solve(self, x: Any, damping: Any = None) -> Any:
        """(C + damping I)^-1 x."""
        raise self._refused("solve")

    def matvec(self, x: Any) -> Any:
        """C x."""
        raise self._refused("matvec")

    def damped_matvec(self, x: Any, damping: Any = None) -> Any:
        """(C + damping I) x."""
        raise self._refused("damped_matvec")

    def sample(self, noise: Any, damping: Any = None) -> Any:
        """(C + damping I)^-1/2 noise, or another root."""
        raise self._refused("sample")

    def logdet(self, damping: Any = None) -> Tensor:
        """log det(C + damping I)."""
        raise self._refused("logdet")

    def diag(self) -> Any:
        """The diagonal of C."""
        raise self._refused("diag")

    def inverse_diag(self, damping: Any = None) -> Any:
        """The diagonal of (C + damping I)^-1."""
        raise self._refused("inverse_diag")

    def trace(self) -> Tensor:
        raise self._refused("trace")

    def eigvalsh(self) -> Tensor:
        """All eigenvalues, ascending."""
        raise self._refused("eigvalsh")

    def effective_dimension(self, damping: Any, sides: Callable[[], tuple[Tensor | None, Tensor]]) -> Tensor:
        """tr C (C + damping I)^-1. sides: those of C, asked for where it is not known by its eigenvalues."""
        values = self.eigvalsh().abs()
        return (values / (values + damping)).sum()

    def scaled(self, factor: Any) -> Any:
        """That of a multiple of C."""
        raise self._refused("scaled")

    def state(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {key: value for key, value in values.items() if isinstance(value, Tensor)}

    def _refused(self, what: str) -> NotImplementedError:
        return NotImplementedError(
            f"a curvature in the form {type(self).__name__} does not answer {what!r}: choose another approx, or "
            'damping_type="exact"'
        )


def with_tensors(factor: Factor, tensors: dict[str, Tensor]) -> Any:
    """The same with other tensors in the place of those of its state."""
    return replace(factor, **tensors)  # type: ignore[type-var]


def has_two_sides(factor: Factor) -> bool:
    """Whether C is kept as a Kronecker product of two sides."""
    return {"left", "right"} <= factor.state().keys()


def is_eigenform_over(factor: Factor, shape: tuple[int, int, int]) -> bool:
    """Whether its eigenvectors are those of a layer of this shape (g, o, i)."""
    state = factor.state()
    if "values" not in state or "vectors" in state:
        return False
    return state["values"].shape == shape or not {"left", "right"} & state.keys()
