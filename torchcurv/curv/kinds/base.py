"""Kinds of curvature: what is backpropagated from the output of a model, and what its layers make of it.

With s_v the signal v that arrives at a layer, its block is sum_{v,n} vec(sum_r s a^T) vec(sum_r s a^T)^T. A signal
here is of order 1 per term; the factor R of the loss is applied to the statistics, where nothing can underflow.

A kind is one class. It is given a source, which is one loss of one forward pass, and tells it what to send to which
blocks. `SignalKind` is asked for the signals alone. The table of kinds is in table.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from torchcurv.curv.hessian.operation import Key
from torchcurv.curv.hessian.products import OutputLoss
from torchcurv.curv.hessian.tape import Tape
from torchcurv.curv.losses.terms import Terms

GRADIENT_SHARES = "gradient"  # the name of a kind that no user can ask for


class KindOptions(Protocol):
    """What a kind reads of the options of a block."""

    @property
    def samples(self) -> int | None: ...
    @property
    def approx(self) -> str | None: ...
    @property
    def method(self) -> str: ...
    @property
    def residual(self) -> str: ...
    @property
    def residual_over(self) -> str: ...
    @property
    def hessian_averaging(self) -> str: ...
    @property
    def max_hessian_dim(self) -> int: ...
    @property
    def max_chain_products(self) -> int: ...


class Block(Protocol):
    """What a kind asks of a block."""

    params: list[Tensor]
    layout: Any
    approx: Any
    pending: Any


@dataclass(frozen=True)
class Signals:
    """Gradients at the output f [n, t, c], for L / R without its weights, one after the other.

    count: how many there are, so that what has arrived of them can be scaled to all.
    """

    count: int
    values: Iterator[Tensor]


class SignalSource(Protocol):
    """One loss of one forward pass, as a kind sees it."""

    @property
    def terms(self) -> Terms:
        """Those of the samples whose signals it sends."""
        ...

    def sampled(self) -> SignalSource:
        """The source that sends signals of which some samples can stand for all; it may be this one."""
        ...

    def generator(self) -> torch.Generator:
        """For draws that a resumed run repeats."""
        ...

    def send(self, signals: Signals, blocks: Sequence[Any]) -> None:
        """Backpropagate the signals to the layers of the blocks, by a pass of our own."""
        ...

    def listen(self, blocks: Sequence[Any]) -> bool:
        """Take the gradients that the running backward brings, if these are those of this loss alone; whether so."""
        ...

    def deliver_inputs(self, blocks: Sequence[Any]) -> None:
        """Give the blocks the inputs of their layers, without signals."""
        ...

    def output_loss(self) -> OutputLoss:
        """Derivatives of the loss at the output."""
        ...

    def differentiated(self) -> AbstractContextManager[OutputLoss]:
        """The same, while batch statistics are functions of the batch, and not constants."""
        ...

    def tape(self) -> Tape:
        """The functions of the forward pass."""
        ...

    def edges_of(self, blocks: Sequence[Any]) -> set[Key]:
        """Where the gradients of the blocks' layers arrive."""
        ...

    def deliver_propagated(self, at_edges: dict[Key, Tensor], blocks: Sequence[Any]) -> None:
        """Give the blocks what was propagated to the edges of their layers."""
        ...


@dataclass(frozen=True)
class CurvatureKind(ABC):
    """What is measured of one loss. Kinds that are equal are measured together.

    sends_signals: whether blocks are made of rows, one per sample and signal, as the GGN is.
    subsamples: whether the signals of some samples, scaled up, can stand for those of all.
    checked: whether blocks are made of pairs (a, s), so that the recorded calls of their layers must explain the
        gradient, which the first pass checks.
    second_order: whether C has the term with the second derivatives of the network, so that the graph is
        differentiated twice. needs_tape: whether the functions of the forward pass are noted.
    indefinite: whether C may have negative eigenvalues. of_the_loss: whether C has the units of the loss.
    of_samples: whether C depends on which terms are those of one sample. by_passes: whether passes measure it.
    needs_loss: whether what is measured depends on the loss. approximations: the only ones it is known as; None: any.
    """

    name: ClassVar[str] = ""  # in messages; by default that of the class
    sends_signals: ClassVar[bool] = False
    subsamples: ClassVar[bool] = False
    checked: ClassVar[bool] = True
    second_order: ClassVar[bool] = False
    needs_double_backward: ClassVar[bool] = False
    needs_tape: ClassVar[bool] = False
    indefinite: ClassVar[bool] = False
    of_the_loss: ClassVar[bool] = True
    of_samples: ClassVar[bool] = False
    by_passes: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True
    approximations: ClassVar[tuple[str, ...] | None] = None

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @classmethod
    def of(cls, options: KindOptions) -> CurvatureKind:
        """The kind that the options of a block ask for."""
        return cls()

    @abstractmethod
    def measure(self, source: SignalSource, blocks: Sequence[Block]) -> None:
        """Give the blocks what they measure of the loss."""

    @property
    def drawn(self) -> int | None:
        """How many signals are drawn; None: nothing is."""
        return None

    def without_signals(self) -> CurvatureKind:
        """The kind for blocks of which only the inputs of their layers are due."""
        return self

    def output_matvec(self, loss: OutputLoss, v: Tensor) -> Tensor:
        """M v for v like the output f, where C = J^T M J (+ the term of second order): what an operator asks."""
        raise NotImplementedError(_no_matrix_free_form(self.name))

    @classmethod
    def check_matrix_free(cls, name: str) -> None:
        """Raise if the kind that is registered under this name has no product with vectors."""
        if cls.output_matvec is CurvatureKind.output_matvec:
            raise ValueError(_no_matrix_free_form(name))


@dataclass(frozen=True)
class InputCovariance(CurvatureKind):
    """The A of K-FAC: mean a a^T of what came into the layers, over samples and positions; no signal is sent."""

    name: ClassVar[str] = "input"
    of_the_loss: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    approximations: ClassVar[tuple[str, ...] | None] = ("kfac",)

    def measure(self, source: SignalSource, blocks: Sequence[Block]) -> None:
        source.deliver_inputs(blocks)


@dataclass(frozen=True)
class SignalKind(CurvatureKind):
    """A kind that is known by the signals it sends.

    samples: how many signals are drawn; None: all of them.
    rides: whether the signals are the gradients that the user's own backward brings, where no other loss adds to them.
    """

    samples: int | None = None
    rides: ClassVar[bool] = False
    sends_signals: ClassVar[bool] = True

    @classmethod
    def of(cls, options: KindOptions) -> CurvatureKind:
        return cls(options.samples)

    @abstractmethod
    def signals(self, terms: Terms, generator: torch.Generator) -> Signals:
        """What is sent back from f: signals [n, t, c] of c, which are weighted by sqrt(w) afterwards."""

    @property
    def drawn(self) -> int | None:
        return None if self.rides else self.samples

    def without_signals(self) -> CurvatureKind:
        return InputCovariance()

    def measure(self, source: SignalSource, blocks: Sequence[Block]) -> None:
        if self.rides and source.listen(blocks):
            return
        source = source.sampled() if self.subsamples else source
        signals, root = self.signals(source.terms, source.generator()), source.terms.root_weights
        weighted = signals.values if root is None else (root * signal for signal in signals.values)
        source.send(Signals(signals.count, weighted), blocks)


def _no_matrix_free_form(name: str) -> str:
    return (
        f"curv_type={name!r} says no product with vectors (CurvatureKind.output_matvec), so that it is known as no "
        'operator: choose an approximation, such as approx="kfac"'
    )
