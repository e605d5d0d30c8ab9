"""Kinds of curvature: which signals are sent back from the output.

With s_v the signal v sent back to a layer, its block is sum_{v,n} vec(sum_r s a^T) vec(sum_r s a^T)^T. A signal
here is of order 1 per term; the factor R of the loss is applied to the statistics, where nothing can underflow.

    ggn               the columns of S (H = S S^T), one per output element of a sample; or S r, r random signs
    fisher            the gradient at labels drawn from the model; exact, it equals the ggn for our losses
    empirical_fisher  the gradient at the true target

Two kinds send none: the Hessian (second.py, propagate.py), and what came in alone (input_side.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from torchcurv.curv.losses.terms import Terms

Generator = torch.Generator | None


def _columns(terms: Terms) -> Iterator[Tensor]:
    t, c = terms.f.shape[1:]
    for position in range(t):
        for k in range(c):
            signal = torch.zeros_like(terms.f)
            signal[:, position] = terms.column(position, k)
            yield signal


def _draws(draw: Callable[[Generator], Tensor], samples: int, generator: Generator) -> Iterator[Tensor]:
    for _ in range(samples):
        yield draw(generator) * samples**-0.5


def _ggn(terms: Terms, samples: int | None, generator: Generator) -> Iterator[Tensor]:
    return _columns(terms) if samples is None else _draws(terms.draw, samples, generator)


def _fisher(terms: Terms, samples: int | None, generator: Generator) -> Iterator[Tensor]:
    return _columns(terms) if samples is None else _draws(terms.label_gradient, samples, generator)


def _empirical_fisher(terms: Terms, samples: int | None, generator: Generator) -> Iterator[Tensor]:
    yield terms.gradient()


KINDS: dict[str, Callable[..., Iterator[Tensor]]] = {
    "ggn": _ggn,
    "fisher": _fisher,
    "empirical_fisher": _empirical_fisher,
}
SENT = ("ggn", "fisher")  # whose signals are drawn, and sent by a pass of our own
SECOND, INPUT = "hessian", "input"  # send no signals
GRADIENT = "gradient"  # the share of every sample in the gradient of L / R: no curvature, but rows to read with one


def signals(kind: str, terms: Terms, samples: int | None, generator: Generator = None) -> tuple[int, Iterator[Tensor]]:
    """(number of signals, the signals [n, t, c] of L / R one after the other)."""
    root = terms.root_weights
    if kind == GRADIENT:
        return 1, iter([terms.gradient() if root is None else root.square() * terms.gradient()])
    exact = 1 if kind == "empirical_fisher" else terms.f.shape[1:].numel()
    count = exact if samples is None or kind == "empirical_fisher" else samples
    generated = KINDS[kind](terms, samples, generator)
    return count, generated if root is None else (root * signal for signal in generated)
