"""What becomes of negative eigenvalues."""

from __future__ import annotations

import torch
from torch import Tensor

from torchcurv.curv.options import allow

SPECTRA = ("abs", "clip", "shift", "keep")
allow("indefinite", SPECTRA)


def map_negative_eigenvalues(values: Tensor, spectrum: str | None) -> Tensor:
    """What becomes of negative eigenvalues [..., o, d] of each matrix. None: there are none but by rounding."""
    spectrum = spectrum or "clip"
    if spectrum == "shift":
        return values - values.amin((-2, -1), keepdim=True).clamp_max(0)
    return {"abs": torch.abs, "clip": lambda x: x.clamp_min(0), "keep": lambda x: x}[spectrum](values)
