"""The support matrix: every layer with every kind and approximation takes steps, and the README says so.

python tests/test_support.py      writes the matrix into the README
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import cases

from torchcurv import SecondOrderOptimizer

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- support matrix: start -->", "<!-- support matrix: end -->"
KINDS = {
    "ggn": {"curv_type": "ggn", "samples": None},
    "ggn, draws": {"curv_type": "ggn", "samples": 2},
    "fisher": {"curv_type": "fisher", "samples": 1},
    "empirical_fisher": {"curv_type": "empirical_fisher"},
}
APPROXIMATIONS = {
    "full": {"approx": "full"},
    "full, rows": {"approx": "full", "rows_limit": 1},
    "block": {"approx": "block"},
    "unit": {"approx": "unit"},
    "kfac": {"approx": "kfac"},
    "kfac, exact damping": {"approx": "kfac", "damping_type": "exact"},
    "kfac, reduce": {"approx": "kfac", "sharing": "reduce"},
    "ekfac": {"approx": "ekfac"},
    "diag": {"approx": "diag"},
    "None": {"approx": None},
}


class Doubled(nn.Linear):
    """A subclass: found along the MRO."""


def family(*prefixes):
    return [case for case in cases.LAYERS if any(case.id == p or case.id.startswith(p + "_") for p in prefixes)]


def frozen(case, name):
    def make():
        layer = case.make_layer()
        getattr(layer, name).requires_grad_(False)
        return layer

    return case._replace(make_layer=make)


GROUPED = [case for case in cases.LAYERS if "groups" in case.id or "depthwise" in case.id]
SOME = [case for case in cases.LAYERS if case.id in ("linear", "linear_seq", "conv2d_3x3_pad", "conv1d_groups")]
ROWS = {
    "Linear": family("linear"),
    "Linear, extra dimensions": family("linear_seq", "linear_grid"),
    "Conv1d": [c for c in family("conv1d") if c not in GROUPED],
    "Conv2d": [c for c in family("conv2d") if c not in GROUPED],
    "Conv3d": [c for c in family("conv3d") if c not in GROUPED],
    "grouped and depthwise": GROUPED,
    "frozen weight": [frozen(case, "weight") for case in SOME],
    "frozen bias": [frozen(case, "bias") for case in SOME],
    "subclasses": [cases.LayerCase("doubled", lambda: cases.seeded(lambda: Doubled(4, 3)), (4,))],
}


def takes_steps(case, options) -> bool:
    """Whether two steps lower the loss of a small net around the layer and keep every parameter finite."""
    model = cases.net_around(case.make_layer(), case.input_shape)
    x, y = cases.randn(3, *case.input_shape, seed=2), torch.arange(3) % cases.CLASSES
    optimizer = SecondOrderOptimizer(model, lr=0.1, damping=0.1, momentum=0.0, **options)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses[2] < losses[0] and all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("approx", APPROXIMATIONS)
@pytest.mark.parametrize("row", ROWS)
def test_every_pair_takes_steps_on_every_layer(row, approx):
    assert ROWS[row]
    for case in ROWS[row]:
        for kind, options in KINDS.items():
            assert takes_steps(case, {**options, **APPROXIMATIONS[approx]}), (case.id, kind)


def matrix() -> str:
    """The matrix as a markdown table; a cell names the kinds that work."""
    short = {"ggn": "g", "ggn, draws": "d", "fisher": "f", "empirical_fisher": "e"}
    lines = ["| layer | " + " | ".join(APPROXIMATIONS) + " |", "|---" * (len(APPROXIMATIONS) + 1) + "|"]
    for row, layers in ROWS.items():
        cells = []
        for options in APPROXIMATIONS.values():
            works = [
                letter
                for kind, letter in short.items()
                if all(takes_steps(case, {**KINDS[kind], **options}) for case in layers)
            ]
            cells.append(" ".join(works) or "-")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_readme_shows_the_matrix():
    text = README.read_text()
    shown = text[text.index(START) + len(START) : text.index(END)].strip()
    assert shown == matrix(), "the support matrix changed: run python tests/test_support.py"


if __name__ == "__main__":
    text = README.read_text()
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    README.write_text(f"{before}\n{matrix()}\n{after}")
