"""Input curvature: what came into the layers alone; no signal is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torchcurv.curv.kinds.base import Block, CurvatureKind, SignalSource


@dataclass(frozen=True)
class InputCovariance(CurvatureKind):
    """The A of K-FAC: mean a a^T over samples and positions."""

    name: ClassVar[str] = "input"

    def measure(self, source: SignalSource, blocks: Sequence[Block]) -> None:
        source.deliver_inputs(blocks)
