"""Pictures of curvature, with matplotlib: `pip install torchcurv[plot]`."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

from torch import Tensor

from torchcurv.curv.analysis.operator import CurvatureOperator
from torchcurv.curv.analysis.spectra import Spectra
from torchcurv.curv.linalg.stochastic import SpectralDensity

QUARTILES = (0, 0.25, 0.75, 1)
VISIBLE = 1e-8  # of the largest magnitude: eigenvalues below it count as zero


def _axes(ax: Any, size: tuple[float, float]) -> Any:
    if ax is not None:
        return ax
    try:
        pyplot = import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError("plots need matplotlib, an extra of this package: pip install torchcurv[plot]") from error
    return pyplot.subplots(figsize=size, layout="constrained")[1]


def plot_spectrum(
    curvature: Spectra | CurvatureOperator | SpectralDensity,
    ax: Any = None,
    *,
    label: str | None = None,
    floor: float = 1e-8,
    color: Any = None,
    **options: Any,
) -> Any:
    """The density of the eigenvalues on a log scale, with a band of one standard error; returns the axes.

    curvature: a CurvatureSet, a CurvatureOperator, or what their `spectral_density` returned.
    ax: matplotlib axes; None: a new figure. floor: where the scale begins, as a fraction of the highest density; one
    eigenvalue among P reaches about 1 / P of a peak that holds all others. options: those of `spectral_density`.

    Raises: ImportError without matplotlib.
    """
    ax = _axes(ax, (7, 4))
    density = curvature if isinstance(curvature, SpectralDensity) else curvature.spectral_density(**options)
    x, y, error = (t.detach().cpu().double() for t in (density.grid, density.density, density.standard_error))
    bottom = floor * float(y.max())
    (line,) = ax.plot(x, y.clamp_min(bottom / 10), label=label, color=color, linewidth=1.5)
    low, high = (y - error).clamp_min(bottom / 10), (y + error).clamp_min(bottom / 10)
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    if ax.get_yscale() != "log":
        ax.set_yscale("log")
        ax.set_ylim(bottom=bottom)
        ax.set_xlabel("eigenvalue")
        ax.set_ylabel("density of eigenvalues")
    ax.set_ylim(bottom=min(bottom, ax.get_ylim()[0]))
    if label is not None:
        ax.legend()
    return ax


def plot_layers(curvature: Spectra, ax: Any = None, *, damping: float = 1e-3, color: Any = "tab:blue") -> Any:
    """The eigenvalues of each block on a log scale, and the condition number of block + damping I; returns the axes.

    A thin line goes from the least to the largest magnitude, zeros left out, a thick one over the middle half of the
    magnitudes; a dot marks the mean eigenvalue, trace / size, and a triangle the magnitude of the most negative one.

    curvature: a CurvatureSet. ax: matplotlib axes; None: a new figure. damping: drawn as a line.

    Raises: ImportError without matplotlib; TypeError for a curvature that has no blocks.
    """
    if not isinstance(curvature, Spectra):
        raise TypeError(
            f"plot_layers got a {type(curvature).__name__}, which has no layers: pass a curvature(...) whose "
            'approx= works by layers, such as "kfac"'
        )
    found = {name: values.detach().cpu().double() for name, values in curvature.eigvalsh_by_block().items()}
    lowest = VISIBLE * max(float(values.abs().amax()) for values in found.values())
    ax = _axes(ax, (max(5.0, 0.9 * len(found)), 4))
    ax.set_yscale("log")
    spreads = [_spread(values, lowest) for values in found.values()]
    (least, first, third, largest), places = zip(*spreads, strict=True), range(len(found))
    ax.vlines(places, least, largest, color=color, linewidth=1.2, label="all but zeros")
    ax.vlines(places, first, third, color=color, linewidth=7, alpha=0.4, label="middle half")
    means = [float(values.mean()) for values in found.values()]
    ax.plot(places, [x if x > lowest else math.nan for x in means], "o", color=color, label="mean")
    negative = [-float(values.amin()) for values in found.values()]
    if max(negative) > lowest:
        shown = [x if x > lowest else math.nan for x in negative]
        ax.plot(places, shown, "v", color="tab:red", label="most negative")
    if damping > 0:
        ax.axhline(damping, color="grey", linestyle=":", label=f"damping {damping:g}")
    _label(ax, list(found), list(curvature.condition_numbers(damping).values()))
    return ax


def _spread(values: Tensor, lowest: float) -> list[float]:
    """Least magnitude above `lowest`, quartiles, largest; nan where there is none."""
    sizes = values.abs()
    sizes = sizes[sizes > lowest].sort().values
    return [float(sizes[round(q * (len(sizes) - 1))]) if len(sizes) else math.nan for q in QUARTILES]


def _label(ax: Any, names: list[str], conditions: list[Tensor]) -> None:
    """Names below, condition numbers above, and a legend in a margin of its own."""
    for place, condition in enumerate(conditions):
        text = f"{float(condition):.1e}" if condition > 0 else "indefinite"
        above = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom", "fontsize": "small"}
        ax.annotate(text, (place, 1.01), **above)
    ax.set_title("condition number of layer + damping", fontsize="small", pad=16)
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(names) > 6 else {}
    ax.set_xticks(range(len(names)), names, **slanted)
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.set_xlabel("layer")
    ax.set_ylabel("|eigenvalue|")
    ax.grid(True, axis="y", alpha=0.25)
    low, high = ax.get_ylim()
    ax.set_ylim(low * (low / high) ** 0.15, high)
    ax.legend(fontsize="small", loc="lower center", ncols=5)
