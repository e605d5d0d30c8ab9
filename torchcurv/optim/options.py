"""Options of the optimizers, beside those of their blocks (torchcurv/curv/options.py says how one is declared)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, TypedDict

from torch import Tensor, nn

from torchcurv.curv.checks import anything, check_count, check_number, count, flag, number, one_of
from torchcurv.curv.options import LIVE, OPTIMIZER, BlockOptions, Option


def _lr(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        check_number(name, value, lambda x: 0 <= x < math.inf, "a finite number >= 0, or a 0-d tensor")
    elif value.numel() != 1:
        raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}; pass a number >= 0, or a 0-d tensor")


def _steps(name: str, value: Any) -> None:
    if value != 0:
        check_count(name, value)


def _bounds(name: str, value: Any) -> None:
    if value is None:
        return
    if not (isinstance(value, tuple | list) and len(value) == 2 and 0 < value[0] <= value[1] < math.inf):
        raise ValueError(f"{name}={value!r}; pass two numbers with 0 < low <= high")


_decay = number(lambda x: 0 <= x < math.inf, "a finite number >= 0")


def _precision(name: str, value: Any) -> None:
    if value is not None:
        check_number(name, value, lambda x: 0 < x < math.inf, "a number > 0, or None")


def _unsupported(name: str, value: Any) -> None:
    if value not in ("error", "gradient"):
        raise ValueError(f"{name}={value!r}; allowed are 'error', 'gradient'")


def _seed(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}; pass an int")


def _class_dim(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | None):
        raise TypeError(f"{name}={value!r}; pass an int, or None")


def _scaler(name: str, value: Any) -> None:
    if value is not None and not callable(getattr(value, "get_scale", None)):
        raise TypeError(f"{name}={value!r}; pass a torch.amp.GradScaler, or anything with get_scale()")


def _loss_factor(name: str, value: Any) -> None:
    if not callable(value):
        allowed = "a number that is not 0, or a function that returns one"
        check_number(name, value, lambda x: 0 < abs(x) < math.inf, allowed)


class MainStepOptions(TypedDict, total=False):
    """What a constructor names itself."""

    lr: Annotated[float | Tensor, Option(0.1, _lr, LIVE, "step size, a number or a 0-d tensor")]
    momentum: Annotated[
        float, Option(0.7, number(lambda x: 0 <= x < 1, "a number with 0 <= momentum < 1"), LIVE, "0 <= momentum < 1")
    ]


class StepOptions(TypedDict, total=False):
    """The update, per group."""

    nesterov: Annotated[bool, Option(False, flag, LIVE, "look ahead")]
    momentum_type: Annotated[
        str,
        Option(
            "preconditioned",
            one_of("preconditioned", "raw"),
            LIVE,
            '"preconditioned" averages V, "raw" averages g before preconditioning',
        ),
    ]
    weight_decay: Annotated[float, Option(0.0, _decay, LIVE, "decoupled decay")]
    l2: Annotated[float, Option(0.0, _decay, LIVE, "coefficient of l2/2 norm(p)² in the loss, in g and in the damping")]
    maximize: Annotated[bool, Option(False, flag, LIVE, "ascend")]
    trust_ratio: Annotated[
        bool,
        Option(False, flag, LIVE, "V of every tensor gets the norm of the tensor, where that is above 1e-2 (LARS)"),
    ]
    normalize_weights: Annotated[
        bool,
        Option(
            False,
            flag,
            LIVE,
            "after each step every tensor that moved and has two or more dimensions has norm sqrt(2 p.shape[0])",
        ),
    ]
    damping_scale: Annotated[
        str,
        Option(
            "absolute",
            one_of("absolute", "relative"),
            LIVE,
            '"absolute": in units of the curvature; "relative": times the mean eigenvalue of each block, tr C / dim C',
        ),
    ]


class KLClipOption(TypedDict, total=False):
    """One bound on the length of all preconditioned steps."""

    kl_clip: Annotated[float | str | None, Option("auto", anything, OPTIMIZER, "bound κ on lr² <V, g>; None: no clip")]


class ControlOptions(TypedDict, total=False):
    """Lengths and damping by a model of the loss, for the whole optimizer."""

    step_rule: Annotated[str, Option("fixed", anything, OPTIMIZER, '"fixed", or "quadratic"')]
    model_samples: Annotated[
        int | None,
        Option(512, count("all of the batch"), OPTIMIZER, "so many of a larger batch stand for it; None: all do"),
    ]
    damping_rule: Annotated[str, Option("fixed", anything, OPTIMIZER, '"fixed", or "lm" (Levenberg and Marquardt)')]
    damping_interval: Annotated[int, Option(5, count(), OPTIMIZER, "steps between two changes of the damping")]
    damping_decay: Annotated[
        float,
        Option(
            0.7,
            number(lambda x: 0 < x < 1, "a number between 0 and 1"),
            OPTIMIZER,
            "what the damping changes by in a step",
        ),
    ]
    damping_bounds: Annotated[tuple[float, float] | None, Option(None, _bounds, OPTIMIZER, "of λ")]
    curvature_warmup: Annotated[int, Option(0, _steps, OPTIMIZER, "so many first steps only measure")]


class PosteriorOptions(TypedDict, total=False):
    """The posterior, per group."""

    prior_precision: Annotated[
        float | None, Option(1.0, _precision, LIVE, "δ of the prior N(0, 1/δ); None: no posterior and no prior")
    ]
    temperature: Annotated[
        float,
        Option(
            1.0,
            number(lambda x: 0 < x < math.inf, "a number > 0"),
            LIVE,
            "τ; 1 is the Bayesian posterior, smaller is colder",
        ),
    ]
    init_precision: Annotated[
        float | None, Option(None, _precision, LIVE, "Σ^-1 of the first draws; None: that of the prior")
    ]


class DrawOptions(TypedDict, total=False):
    """Draws from the posterior, for the whole optimizer."""

    num_samples: Annotated[int, Option(1, count(), OPTIMIZER, "draws that `step(closure)` makes")]
    antithetic: Annotated[
        bool, Option(False, flag, OPTIMIZER, "every second draw is the mirror image of the one before")
    ]
    shared_noise: Annotated[bool, Option(False, flag, OPTIMIZER, "draws share ε but for signs while Σ is the same")]
    draws: Annotated[
        str,
        Option(
            "different",
            one_of("different", "same"),
            OPTIMIZER,
            'of several processes: "different" in each, or the "same" in all',
        ),
    ]
    kl_warmup: Annotated[
        int | Callable[[int], float] | None, Option(None, anything, OPTIMIZER, "what τ is multiplied by at first")
    ]
    noise_variance: Annotated[float | None, Option(None, anything, OPTIMIZER, "σ² of a Gaussian likelihood")]


class MainLossOption(TypedDict, total=False):
    """What a constructor names itself."""

    loss_fn: Annotated[
        nn.Module | Callable[[Tensor, Tensor], Tensor] | str | None,
        Option(
            "cross_entropy",
            anything,
            OPTIMIZER,
            "the loss module you call, or the name of the loss you compute; a function of (output, target), which is "
            "then called as optimizer.loss_fn; None: you call observe",
        ),
    ]


class LossOptions(TypedDict, total=False):
    """The loss, and what the optimizer does as a whole."""

    reduction: Annotated[str | None, Option(None, anything, OPTIMIZER, "of a loss given by name")]
    class_dim: Annotated[int | None, Option(None, _class_dim, OPTIMIZER, "dimension of the classes in the output")]
    output_fn: Annotated[
        Callable[[Any], Tensor] | None, Option(None, anything, OPTIMIZER, "from the model's output to the loss's input")
    ]
    grad_scaler: Annotated[Any, Option(None, _scaler, OPTIMIZER, "the torch.amp.GradScaler that scales the loss")]
    loss_factor: Annotated[
        float | Callable[[], float],
        Option(
            1.0,
            _loss_factor,
            OPTIMIZER,
            "what a loss given by name is multiplied by (1/k for k micro-batches), or a function that says it; used "
            "where the gradient does not tell it: squared errors and soft labels. A negative one needs `negative=`",
        ),
    ]
    negative: Annotated[
        str,
        Option(
            "error",
            one_of("error", "abs", "model"),
            OPTIMIZER,
            'of a loss, or of terms, that are multiplied by a negative number: "error"; "abs" counts absolute values; '
            '"model" counts every term once in the mean, whatever it is multiplied by: the Fisher of policy gradients',
        ),
    ]
    unsupported: Annotated[
        str,
        Option(
            "error",
            _unsupported,
            OPTIMIZER,
            '"error" lists parameters without a known curvature, "gradient" trains them with the gradient',
        ),
    ]
    seed: Annotated[int, Option(0, _seed, OPTIMIZER, "of the generator that draws come from")]
    process_group: Annotated[
        Any,
        Option(
            "auto",
            anything,
            OPTIMIZER,
            'over which processes what is measured is reduced: "auto", those of the DistributedDataParallel around the '
            "forward pass; a group whose gradients are averaged; None: each process trains a model of its own",
        ),
    ]


class PlacementOption(TypedDict, total=False):
    """Where factors are made, for the whole optimizer."""

    factor_placement: Annotated[
        str,
        Option(
            "auto",
            one_of("replicated", "shared", "auto"),
            OPTIMIZER,
            'where several processes make factors: "replicated", each makes all of them; "shared", each makes some and '
            'sends them to all; "auto", shared where that spares enough work',
        ),
    ]


class SecondOrderOptions(BlockOptions, StepOptions, KLClipOption, ControlOptions, LossOptions, PlacementOption):
    """What SecondOrderOptimizer takes beside the keywords that it names."""


class PreconditionerOptions(BlockOptions, LossOptions, PlacementOption):
    """What Preconditioner takes beside the keywords that it names."""


class VariationalOptions(BlockOptions, PosteriorOptions, DrawOptions, LossOptions, PlacementOption):
    """What VIOptimizer takes beside the keywords that it names."""
