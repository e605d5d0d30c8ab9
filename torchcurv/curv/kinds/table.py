"""The table of kinds: what `curv_type` may name."""

from __future__ import annotations

from torchcurv.curv.kinds.base import GRADIENT_SHARES, CurvatureKind, InputCovariance, KindOptions
from torchcurv.curv.kinds.first_order import GGN, EmpiricalFisher, Fisher, GradientShares
from torchcurv.curv.kinds.hessian import METHODS, Hessian
from torchcurv.curv.options import allow

KINDS: dict[str, type[CurvatureKind]] = {}
_INTERNAL: dict[str, type[CurvatureKind]] = {GRADIENT_SHARES: GradientShares}  # no user can ask for them

allow("curv_type", KINDS)
allow("hessian_method", METHODS)


def register_kind(name: str, kind: type[CurvatureKind]) -> None:
    """Let `curv_type=name` mean a kind of your own.

    kind: a subclass of torchcurv.CurvatureKind, or of torchcurv.SignalKind where it is known by the signals that are
        sent back from the output.
    """
    if not (isinstance(kind, type) and issubclass(kind, CurvatureKind)):
        raise TypeError(f"register_kind: got {kind!r}; pass a subclass of CurvatureKind")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"register_kind: name={name!r}; pass a name such as 'centred_fisher'")
    held = {**KINDS, **_INTERNAL}.get(name)
    if held is not None and (held.__module__, held.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"register_kind: the name {name!r} is that of {held.__name__}: choose another one")
    KINDS[name] = kind


def kind_of(name: str, options: KindOptions) -> CurvatureKind:
    """The kind under a name of the table, as the options of a block ask for it."""
    return (KINDS.get(name) or _INTERNAL[name]).of(options)


register_kind("ggn", GGN)
register_kind("fisher", Fisher)
register_kind("empirical_fisher", EmpiricalFisher)
register_kind("hessian", Hessian)  # type: ignore[type-abstract]  # whose `of` chooses one of its own
register_kind("input", InputCovariance)
