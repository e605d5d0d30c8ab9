"""Bundles: options that belong together, as one typed value in the place of a name or a number.

    SecondOrderOptimizer(model, approx=KFAC(sharing="reduce", factor_blocks=2), damping=Damping(0.1, type="exact"))

A bundle flattens into the flat options of the same meaning, so that parameter groups and states hold plain values. What
it leaves unset has the default of the optimizer. A flat option beside a bundle that sets it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor

from torchcurv.curv.checks import Interval


class _Unset:
    def __repr__(self) -> str:
        return "unset"


_UNSET: Any = _Unset()


@dataclass(frozen=True)
class Bundle:
    """Options that are given together."""

    fixed: ClassVar[Mapping[str, Any]] = {}  # flat options that the bundle itself stands for

    def flatten(self) -> dict[str, Any]:
        """The flat options that are set."""
        found = dict(self.fixed)
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not _UNSET:
                found[one.metadata.get("option", one.name)] = value
        return found


@dataclass(frozen=True)
class KFAC(Bundle):
    """approx="kfac"."""

    sharing: str = _UNSET
    factor_blocks: int = _UNSET
    max_factor_dim: int | None = _UNSET
    max_positions: int | None = _UNSET
    fixed: ClassVar[Mapping[str, Any]] = {"approx": "kfac"}


@dataclass(frozen=True)
class EKFAC(Bundle):
    """approx="ekfac"."""

    sharing: str = _UNSET
    factor_blocks: int = _UNSET
    max_factor_dim: int | None = _UNSET
    max_positions: int | None = _UNSET
    fixed: ClassVar[Mapping[str, Any]] = {"approx": "ekfac"}


@dataclass(frozen=True)
class LowRank(Bundle):
    """approx="lowrank"."""

    rank: int = _UNSET
    partition: str | None = _UNSET
    rows_limit: int = _UNSET
    fixed: ClassVar[Mapping[str, Any]] = {"approx": "lowrank"}


@dataclass(frozen=True)
class Hessian(Bundle):
    """curv_type="hessian"."""

    method: str | None = field(default=_UNSET, metadata={"option": "hessian_method"})
    indefinite: str = _UNSET
    residual: str = _UNSET
    residual_over: str = _UNSET
    averaging: str = field(default=_UNSET, metadata={"option": "hessian_averaging"})
    max_dim: int = field(default=_UNSET, metadata={"option": "max_hessian_dim"})
    max_chain_products: int = _UNSET
    samples: int | None = _UNSET
    fixed: ClassVar[Mapping[str, Any]] = {"curv_type": "hessian"}


@dataclass(frozen=True)
class Damping(Bundle):
    """A damping that is given."""

    value: float | Tensor | Callable[[int], float] = field(default=_UNSET, metadata={"option": "damping"})
    type: str = field(default=_UNSET, metadata={"option": "damping_type"})
    scale: str = field(default=_UNSET, metadata={"option": "damping_scale"})


@dataclass(frozen=True)
class AdaptiveDamping(Bundle):
    """damping_rule="lm": the damping follows how well a quadratic model predicts the loss."""

    start: float = field(default=_UNSET, metadata={"option": "damping"})
    interval: int = field(default=_UNSET, metadata={"option": "damping_interval"})
    decay: float = field(default=_UNSET, metadata={"option": "damping_decay"})
    bounds: tuple[float, float] | None = field(default=_UNSET, metadata={"option": "damping_bounds"})
    type: str = field(default=_UNSET, metadata={"option": "damping_type"})
    scale: str = field(default=_UNSET, metadata={"option": "damping_scale"})
    fixed: ClassVar[Mapping[str, Any]] = {"damping_rule": "lm"}


@dataclass(frozen=True)
class QuadraticModel(Bundle):
    """step_rule="quadratic": lengths and momentum by a quadratic model of the loss."""

    samples: int | None = field(default=_UNSET, metadata={"option": "model_samples"})
    kl_clip: float | str | None = _UNSET
    fixed: ClassVar[Mapping[str, Any]] = {"step_rule": "quadratic"}


@dataclass(frozen=True)
class Refresh(Bundle):
    """When statistics are measured and factors computed."""

    update_every: Interval = _UNSET
    refactor_every: Interval = _UNSET
    tol: float = field(default=_UNSET, metadata={"option": "refresh_tol"})
    cap: int = field(default=_UNSET, metadata={"option": "refresh_cap"})
    warmup: int = field(default=_UNSET, metadata={"option": "refresh_warmup"})
    ema_decay: float | Callable[[int], float] = _UNSET


def flattened(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options without bundles. Raises where a flat option stands beside a bundle that sets it."""
    flat: dict[str, Any] = {}
    for key, value in given.items():
        parts = value.flatten() if hasattr(value, "flatten") and not isinstance(value, Tensor) else {key: value}
        for name in parts.keys() & flat.keys():
            raise ValueError(f"{name} is given twice, once by {key}={value!r}: leave one of them out")
        flat |= parts
    return flat


def given_options(
    named: Mapping[str, Any], damping: Any, bundles: Sequence[Bundle | None], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The flat options of a constructor: those that it names, those that follow, and bundles in the place of any."""
    extra = {f"bundle {k}": bundle for k, bundle in enumerate(bundles) if bundle is not None}
    return flattened({**named, "damping": damping, **extra, **options})
