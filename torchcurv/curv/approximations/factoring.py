"""What becomes of the factor of an approximation between two factorisations, and where one fails."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from torchcurv.curv.approximations.averaging import Refusing, Tensors
from torchcurv.curv.approximations.factor import Factor, with_tensors
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.linalg.symmetric import Damping

Basis = tuple[Tensor, Tensor]


class Factoring(Refusing):
    """How averages become a factor."""

    @abstractmethod
    def empty(self, layers: list[Layer], like: Tensor) -> Tensors:
        """The statistics of no signals: zeros of the right shapes, like `like`."""

    @abstractmethod
    def factor(
        self, tensors: Tensors, damping: Damping, damping_type: str, basis: Basis | None = None
    ) -> tuple[Factor, Tensor]:
        """(the factor, whether it could be computed: a 0-d bool tensor).

        basis: that of the last factor. A factor that shares memory with the tensors is copied, unless `follow` says
        what becomes of it, since averages are updated in place.
        """

    def factored_again(
        self, tensors: Tensors, damping: Damping, damping_type: str, basis: Basis | None = None
    ) -> tuple[Factor, Tensor]:
        """`factor` after one that failed: in float64, and with ten times the damping."""
        doubled = {key: value.double() for key, value in tensors.items()}
        wide = None if basis is None else (basis[0].double(), basis[1].double())
        new, ok = self.factor(doubled, 10 * damping, damping_type, wide)
        dtype = next(iter(tensors.values())).dtype
        return with_tensors(new, {key: value.to(dtype) for key, value in new.state().items()}), ok

    def owned(self, factor: Factor, tensors: Tensors) -> Factor:
        """The factor without memory of the averages, which are updated in place; unless `follow` looks after it."""
        if type(self).follow is not Factoring.follow:
            return factor
        averages = {x.untyped_storage().data_ptr() for x in tensors.values() if isinstance(x, Tensor)}
        state = factor.state()
        shared = {key: x.clone() for key, x in state.items() if x.untyped_storage().data_ptr() in averages}
        return with_tensors(factor, shared) if shared else factor

    def follow(self, tensors: Tensors, factor: Any, damping_type: str) -> Any:
        """The factor with what it can take over from new averages without a factorisation."""
        return factor

    def rebased(self, tensors: Tensors, factor: Factor) -> Tensors:
        """The averages in the basis of a new factor."""
        return tensors

    def restored(self, state: dict[str, Tensor], layers: list[Layer], damping_type: str) -> Factor:
        """The factor that was saved as `state`: of the form that `factor` makes, with these tensors."""
        made = self.factor(self.empty(layers, next(iter(state.values()))), 1.0, damping_type)[0]
        if made.state().keys() != state.keys():
            raise ValueError(
                f"a state has a factor of {sorted(state)}, and {type(self).__name__} with damping_type="
                f"{damping_type!r} makes one of {sorted(made.state())}: choose the same approx and damping_type as in "
                "the run that was saved"
            )
        return with_tensors(made, state)

    def sides_of(self, tensors: Tensors) -> tuple[Tensor | None, Tensor]:
        """C as a Kronecker product (left or None, right)."""
        raise self._refused("is no Kronecker product")
