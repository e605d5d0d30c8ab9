"""What went wrong with a block, and how often it was measured and factored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchcurv.curv.numerics import on_cpu


class Health:
    """Counts of a block.

    measurements, factorisations: how many there were, on the host. flags: [measurements that were not finite,
    factorisations that failed], on the device; None: none was. reported: what was last read of them. retry: whether
    the last factorisation failed, so that the next is in float64 with more damping. doubts: see `Pending`; of what has
    been averaged since they were last read.
    """

    def __init__(self) -> None:
        self.measurements = self.factorisations = 0
        self.flags: Tensor | None = None
        self.reported = (0, 0)
        self.retry = False
        self.doubts: dict[str, Tensor] = {}

    def note_skipped(self, skipped: Tensor) -> None:
        """A measurement may have been left out; skipped: a 0-d bool tensor."""
        self._count(0, skipped)

    def note_failed(self, failed: Tensor) -> None:
        """A factorisation may have failed; failed: a 0-d bool tensor."""
        self._count(1, failed)

    def take_doubts(self, doubts: dict[str, Tensor]) -> None:
        """Keep those of a measurement that has been averaged, until they are read."""
        for why, flag in doubts.items():
            self.doubts[why] = flag | self.doubts[why] if why in self.doubts else flag

    def _count(self, which: int, bad: Tensor) -> None:
        if on_cpu(bad) and not bad:
            return
        if self.flags is None:
            self.flags = torch.zeros(2, dtype=torch.int32, device=bad.device)
        self.flags[which] += bad

    def state(self, like: Tensor) -> dict[str, int | Tensor]:
        """like: on the device of the flags."""
        return {
            "reported_skipped": self.reported[0],
            "reported_failed": self.reported[1],
            "measurements": self.measurements,
            "factorisations": self.factorisations,
            "flags": like.new_zeros(2, dtype=torch.int32) if self.flags is None else self.flags,
        }

    def load_state(self, saved: dict) -> None:
        self.flags = saved.get("flags")
        self.reported = int(saved.get("reported_skipped", 0)), int(saved.get("reported_failed", 0))
        self.measurements, self.factorisations = (int(saved.get(k, 0)) for k in ("measurements", "factorisations"))


def read_flags(healths: Sequence[Health]) -> list[tuple[int, int]]:
    """(measurements that were not finite, factorisations that failed) of each block; one host sync.

    Raises RuntimeError where a doubt about what was measured turns out to be right.
    """
    doubts = {id(flag): (flag, why) for health in healths for why, flag in health.doubts.items()}
    flags = [health.flags for health in healths if health.flags is not None]
    flags += [torch.stack([flag, flag]).to(torch.int32) for flag, _ in doubts.values()]
    counts = iter(torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else ())
    read = [(0, 0) if health.flags is None else tuple(next(counts)) for health in healths]
    for health in healths:
        health.doubts = {}
    for (wrong, _), (_, why) in zip(counts, doubts.values(), strict=True):
        if wrong:
            raise RuntimeError(why)
    return read
