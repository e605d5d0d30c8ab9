"""Probes: what the signals of some samples show of the recorded calls of blocks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.capture.assemble import StatisticsAssembler
from torchcurv.curv.capture.calls import Call
from torchcurv.curv.capture.rows import Mark, Rows
from torchcurv.curv.graph import has_backward_hooks
from torchcurv.curv.numerics import random_signs

HALVES = 3  # pairs of random halves of the samples by which a structure that was never seen is checked


class Path(NamedTuple):
    """The way from the layers of a pass to its loss. Each is equal where it is the same.

    functions: from the calls of each block, without sizes. values: with all that says how rows are moved; None: that
    cannot be read. chosen: whether a tensor chooses rows. marks: of the calls of each block. samples: how many.
    of_samples: functions, with the shapes of each sample. waits: whether reading a value waits for an accelerator.
    """

    functions: Mapping[str, Hashable]
    values: Hashable
    chosen: bool
    marks: dict[str, tuple[Mark, ...]]
    samples: int
    of_samples: Mapping[str, Hashable]
    waits: bool


class Source(Protocol):
    """One pass, as its check sees it."""

    def draws(self) -> tuple[Tensor, torch.Generator]:
        """(a signal [n, t, c] in equal runs of rows, a generator for more)."""
        ...

    def path(self, blocks: Sequence[Curvature]) -> Path:
        """From the calls of the blocks to the loss."""
        ...

    def labels(self) -> tuple[Tensor | None, int, Tensor | None]:
        """(the sample of each row where each has an equal run; None where that cannot be, the number of rows, what the
        user said they are)."""
        ...

    def depending(self, calls: Sequence[Call]) -> Tensor | None:
        """The sample of each row, if it depends on one row alone of the call that has fewest; None: it does not."""
        ...

    def mark_of(self, call: Call) -> Mark: ...

    def arranged(self, rows: Rows | None, common: Mapping[int, bool] | None = None) -> StatisticsAssembler:
        """What makes statistics of the calls, for these rows; common: layers that the samples have in common."""
        ...

    def send(
        self, calls: list[Call], signal: Tensor, params: Sequence[Tensor]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients at calls and at params of a signal in equal runs of rows."""
        ...


class Findings(NamedTuple):
    """Names of parameters whose gradient the calls of a block do not explain; whether samples meet; whether the signal
    was finite."""

    unexplained: list[str]
    coupled: bool
    finite: bool


# (block, what makes statistics, gradients at the calls, gradients of parameters, samples that sent nothing [n])
Compared = Callable[
    [Curvature, StatisticsAssembler, dict[int, Tensor | None], dict[Tensor, Tensor | None], Tensor], Findings
]


class Probe:
    """Signals of some of the samples, and what they show of blocks for some rows.

    common: the layers of the blocks, if the samples have them in common: then all of them send.
    """

    def __init__(
        self,
        compared: Compared,
        blocks: list[Curvature],
        source: Source,
        rows: Rows | None,
        labels: Tensor,
        common: Mapping[int, bool] | None = None,
    ) -> None:
        self.compared, self.blocks, self.source, self.labels = compared, blocks, source, labels
        self.assembler = source.arranged(rows, common)
        self.calls = self.assembler.calls_of(blocks)
        draw, self.generator = source.draws()
        dead = (draw == 0).all(-1, keepdim=True)  # where the loss is flat, any other signal shows the way as well
        self.signal = torch.where(dead, random_signs(draw, self.generator), draw)
        # a hook on a parameter may change its gradient, and must not run more often than the user's backward
        self.params = [p for block in blocks for p in block.params if p.requires_grad and not has_backward_hooks(p)]

    def run(self, light: bool) -> dict[str, Findings] | None:
        """What was found of each block; None where a call has no such rows.

        light: one random half of the samples sends; else both, and both of other halves: no two of up to 2^HALVES
        samples are together in all of them.
        """
        findings: dict[str, Findings] = {}
        for number, silent in enumerate(self._halves(light)):
            findings = self._sent(silent, findings, number < 2)  # a half and the other: all samples
            if not findings:
                return None
        return findings

    def _halves(self, light: bool) -> Iterator[Tensor]:
        """Samples that send nothing [n]."""
        n = int(self.labels.max()) + 1
        device = self.signal.device
        if n == 1:
            yield torch.zeros(1, dtype=torch.bool, device=device)
            return
        code = torch.randperm(n, generator=self.generator, device=device)
        for bit in range(1 if light else min(HALVES, (n - 1).bit_length())):
            half = (code >> bit) % 2 == 1
            yield half
            if not light:
                yield ~half

    def _sent(self, silent: Tensor, before: dict[str, Findings], compare: bool) -> dict[str, Findings]:
        sends = ~silent[self.labels.to(silent.device)]
        flat = self.signal.reshape(len(sends), -1)
        signal = torch.where(sends.unsqueeze(1), flat, 0).reshape(self.signal.shape)
        got, at_params = self.source.send(self.calls, signal, self.params if compare else ())
        at_call = {id(call): grad for call, grad in zip(self.calls, got, strict=True)}
        if any(grad is not None and not self.assembler.fits(call) for call, grad in zip(self.calls, got, strict=True)):
            return {}
        gradients = dict(zip(self.params, at_params, strict=True)) if compare else {}
        after = {}
        for block in self.blocks:
            found = self.compared(block, self.assembler, at_call, gradients, silent)
            old = before.get(block.name, Findings([], False, True))
            after[block.name] = Findings(
                found.unexplained or old.unexplained, found.coupled or old.coupled, found.finite and old.finite
            )
        return after
