"""Options: each is declared once, with its name, type, default, check, scope and meaning.

An option is one line in one of the typed dicts below:

    rank: Annotated[int, Option(16, count(), STRUCTURE, "how many eigenpairs are kept")]

From it follow the keyword of every constructor that takes the topic (by `**options: Unpack[...]`), its check in groups,
its key in `param_groups` and in the state, and its row in the reference. What several options have to do with one
another is said by rules (`check_block`). Names of kinds and approximations are those of tables on higher floors, which
hand them over with `allow`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Annotated, Any, TypedDict, get_type_hints

from torch import Tensor

from torchcurv.curv.checks import NAMES, Check, Interval, check_interval, check_number, count, number, of_table, one_of
from torchcurv.curv.checks import allow as allow
from torchcurv.curv.option_rules import BLOCK_RULES

# What an option decides: the structure of blocks, which is read when they are built; what the next step does, which is
# read at every use; or the optimizer as a whole.
STRUCTURE, LIVE, OPTIMIZER = "structure", "live", "optimizer"


@dataclass(frozen=True)
class Option:
    """One option: its default, what raises on values that are not allowed, its scope, and what it means."""

    default: Any
    check: Check
    scope: str
    doc: str


# -------------------------------------------------------------------------------- names and numbers


def _damping(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        check_number(name, value, lambda x: 0 <= x < math.inf, "a finite number >= 0, or a 0-d tensor")
    elif value.dim():
        raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}; pass a number or a 0-d tensor")


def _interval(name: str, value: Any) -> None:
    check_interval(name, value)


# ----------------------------------------------------------------------------------- options of a block


class ShapeOptions(TypedDict, total=False):
    """What is measured, and of which shape."""

    samples: Annotated[
        int | None,
        Option(
            1,
            count("the exact curvature"),
            STRUCTURE,
            "signals drawn per pass (random signs for the ggn, labels for the Fisher); None: all of them",
        ),
    ]
    partition: Annotated[
        str | None,
        Option(
            None,
            one_of(None, "all", "group", "layer", "parameter"),
            STRUCTURE,
            'what one block of "full" and "lowrank" covers: "all" parameters with equal options (None), those of a '
            '"group", a "layer", or a "parameter"',
        ),
    ]
    rows_limit: Annotated[
        int,
        Option(
            2048,
            count(),
            STRUCTURE,
            "a dense block with more parameters goes through the Gram matrix of its rows (one per sample and signal) "
            'and has no running average; of more rows "lowrank" keeps the largest eigenpairs at once',
        ),
    ]
    ema_decay: Annotated[
        float | Callable[[int], float],
        Option(
            0.95,
            number(lambda x: 0 <= x <= 1, "a number between 0 (no memory) and 1 (plain mean)"),
            LIVE,
            "the fraction ρ of the old that a running average keeps per step (ρ^k over the k steps between two "
            "measurements), 0 <= ρ <= 1; 1 is the plain mean; or a function of the step",
        ),
    ]


class KroneckerOptions(TypedDict, total=False):
    """K-FAC and EK-FAC."""

    sharing: Annotated[
        str,
        Option(
            "expand",
            one_of("expand", "reduce", "whole"),
            STRUCTURE,
            'how positions that share a weight count: "expand": each is a sample of its own; "reduce": inputs are '
            'averaged and signals added up over them first; "whole": the gradient G of a sample as it is, '
            "A = Σ G^T G / Σ norm(G)², B = Σ G G^T, so that B ⊗ A has the partial traces of C",
        ),
    ]
    factor_blocks: Annotated[
        int, Option(1, count(), STRUCTURE, "diagonal blocks that are kept of each of the two factors; 1: the whole")
    ]
    max_factor_dim: Annotated[
        int | None,
        Option(
            8192,
            count("no limit"),
            STRUCTURE,
            "of a factor, or of the matrix of a unit, larger than this only the diagonal is kept",
        ),
    ]
    max_positions: Annotated[
        int | None,
        Option(
            None,
            count("no limit"),
            STRUCTURE,
            "statistics of a layer that is used at more positions of a batch are those of every k-th sample, "
            "k = ceil(positions / max_positions)",
        ),
    ]


class LowRankOptions(TypedDict, total=False):
    """approx="lowrank"."""

    rank: Annotated[int, Option(16, count(), STRUCTURE, "how many eigenpairs are kept, those of largest magnitude")]


class HessianOptions(TypedDict, total=False):
    """curv_type="hessian"."""

    hessian_method: Annotated[
        str | None,
        Option(
            None,
            of_table(None),
            STRUCTURE,
            '"exact" (products with unit vectors), "hutchinson" for "diag" (`samples` products with random signs), '
            '"price" for "diag" of a VIOptimizer (from its draws), or "propagate" for "diag" (HesScale) and "kfac" '
            '(HBP); None: "propagate" for these two, else "exact"',
        ),
    ]
    residual: Annotated[
        str,
        Option(
            "keep",
            of_table(),
            STRUCTURE,
            'what propagation does with second derivatives of activations: "keep", "zero" (Gauss-Newton), "abs", '
            '"clip" (at 0 from below)',
        ),
    ]
    residual_over: Annotated[
        str,
        Option(
            "sample",
            one_of("sample", "batch"),
            STRUCTURE,
            'what "abs" and "clip" act on: those of each "sample", or for "kfac" their mean over the "batch"',
        ),
    ]
    hessian_averaging: Annotated[
        str,
        Option(
            "sample",
            one_of("sample", "batch"),
            STRUCTURE,
            'how "kfac" of the Hessian averages Jacobians J_n: "sample": mean J_n^T H J_n and A = mean a a^T, or '
            '"batch": (mean J_n)^T H (mean J_n) and A = (mean a) (mean a)^T',
        ),
    ]
    max_hessian_dim: Annotated[
        int,
        Option(
            2048,
            count(),
            STRUCTURE,
            'the largest number of elements of a sample that "kfac" of the Hessian carries a matrix over',
        ),
    ]
    max_chain_products: Annotated[
        int,
        Option(
            64,
            count(),
            STRUCTURE,
            'the most vector-Jacobian products that "diag" of the propagated Hessian spends on a chain of operations '
            "between layers, which is exact; one that takes more is gone through op by op, without its cross terms",
        ),
    ]
    indefinite: Annotated[
        str,
        Option(
            "abs",
            of_table(),
            STRUCTURE,
            'what becomes of negative eigenvalues: "abs", "clip" (zero), "shift" (all are raised until the least is '
            'zero), or "keep", which can only be looked at',
        ),
    ]


class RefreshOptions(TypedDict, total=False):
    """When statistics are measured and factors computed."""

    update_every: Annotated[
        Interval,
        Option(
            1,
            _interval,
            LIVE,
            'steps between two measurements: an int, a function of the step, or "adaptive": each statistic is then '
            "measured ever more rarely while its running average moves by less than refresh_tol",
        ),
    ]
    refactor_every: Annotated[
        Interval,
        Option(
            1,
            _interval,
            LIVE,
            'steps between two factorisations; "adaptive": when a statistic has moved by refresh_tol since the last, '
            "or the damping by a tenth",
        ),
    ]
    refresh_tol: Annotated[
        float, Option(0.1, number(lambda x: 0 < x < math.inf, "a number > 0"), LIVE, "see update_every")
    ]
    refresh_cap: Annotated[int, Option(100, count(), LIVE, "the longest adaptive interval, in steps")]
    refresh_warmup: Annotated[
        int,
        Option(
            10,
            number(lambda x: x >= 0 and x == int(x), "an int of at least 0"),
            LIVE,
            "so many first steps measure in each",
        ),
    ]


class DampingTypeOptions(TypedDict, total=False):
    """How the damping is applied."""

    damping_type: Annotated[
        str,
        Option(
            "factored",
            one_of("factored", "exact"),
            STRUCTURE,
            '"exact" Tikhonov through eigenvectors, or "factored" over the Kronecker factors by Cholesky',
        ),
    ]


class MainOptions(TypedDict, total=False):
    """What a constructor names itself."""

    curv_type: Annotated[
        str,
        Option(
            "ggn",
            of_table(),
            STRUCTURE,
            '"ggn", "fisher", "empirical_fisher", "hessian", or "input": C = I ⊗ A, A = mean a a^T of the inputs of '
            "a layer; or a name given to register_kind",
        ),
    ]
    approx: Annotated[
        str | None,
        Option(
            "kfac",
            of_table(None),
            STRUCTURE,
            '"full", "block", "unit", "kfac", "ekfac", "diag", "lowrank", or None for the plain gradient',
        ),
    ]
    damping: Annotated[
        float | Tensor | Callable[[int], float],
        Option(
            0.1,
            _damping,
            LIVE,
            "λ of (C + λ I)^-1, in units of the loss per squared parameter; > 0 for a step; or a function of the step",
        ),
    ]


class BlockOptions(ShapeOptions, KroneckerOptions, LowRankOptions, HessianOptions, RefreshOptions, DampingTypeOptions):
    """The options of a block beside those of MainOptions."""


# ---------------------------------------------------------------------------------------------- table


def table_of(*topics: Any) -> dict[str, Option]:
    """The options of some typed dicts by name."""
    found: dict[str, Option] = {}
    for topic in topics:
        for name, hint in get_type_hints(topic, include_extras=True).items():
            found[name] = hint.__metadata__[0]
    return found


def with_defaults(table: Mapping[str, Option], **defaults: Any) -> dict[str, Option]:
    """The table with other defaults for some options."""
    return {**table, **{name: replace(table[name], default=value) for name, value in defaults.items()}}


def complete(table: Mapping[str, Option], given: Mapping[str, Any], who: str) -> dict[str, Any]:
    """Every option of a table, with its default where none is given. who: takes the options."""
    for name in given.keys() - table.keys():
        alike = get_close_matches(name, table, 1)
        meant = f", did you mean {alike[0]!r}?" if alike else "."
        raise TypeError(f"{who} has no option {name!r}{meant} Its options are {', '.join(sorted(table))}")
    return {name: given.get(name, option.default) for name, option in table.items()}


BLOCK_TABLE = table_of(MainOptions, BlockOptions)
OPTION_NAMES = tuple(BLOCK_TABLE)
STRUCTURE_NAMES = tuple(name for name, option in BLOCK_TABLE.items() if option.scope == STRUCTURE)


class Options:
    """The options of one block, complete and checked: an attribute for each of MainOptions and BlockOptions."""

    def __init__(self, **given: Any) -> None:
        unknown = given.keys() - BLOCK_TABLE.keys()
        if unknown:
            raise TypeError(f"unknown options {', '.join(sorted(unknown))}; a block has {', '.join(OPTION_NAMES)}")
        values = {name: given.get(name, option.default) for name, option in BLOCK_TABLE.items()}
        self.__dict__.update(values)
        for name, option in BLOCK_TABLE.items():
            option.check(name, values[name])
        for rule in BLOCK_RULES:
            rule(self)

    def __getattr__(self, name: str) -> Any:  # for the type checker: the options are in __dict__
        raise AttributeError(f"a block has no option {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"the options of a block are fixed: {name} cannot be set")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def __repr__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v is not BLOCK_TABLE[k].default}
        return f"Options({', '.join(f'{k}={v!r}' for k, v in changed.items())})"

    @property
    def kind(self) -> Any:
        """The class of curv_type in the table of kinds."""
        return NAMES["curv_type"][self.curv_type]

    @property
    def hessian_methods(self) -> tuple[str, ...]:
        """The ways to the Hessian that the approximation has, the default first."""
        return () if self.approx is None else NAMES["approx"][self.approx].hessian

    @property
    def method(self) -> str:
        """hessian_method, with what None stands for."""
        return self.hessian_method or next(iter(self.hessian_methods), "exact")

    @property
    def joins(self) -> bool:
        """Whether one block covers several layers unless `partition` says otherwise."""
        return self.approx is not None and NAMES["approx"][self.approx].joins

    @property
    def covers(self) -> str:
        """partition, with what None stands for."""
        return self.partition or ("all" if self.joins else "layer")
