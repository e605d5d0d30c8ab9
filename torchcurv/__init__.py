"""torchcurv: the curvature of a network's loss, layer by layer, in a form an optimizer can use."""

from torchcurv import nn, optim
from torchcurv.curv.analysis.curvature_set import CurvatureSet
from torchcurv.curv.analysis.measure import curvature, directions
from torchcurv.curv.analysis.operator import CurvatureOperator
from torchcurv.curv.approximations.base import Approximation, Statistic
from torchcurv.curv.approximations.table import register_approximation
from torchcurv.curv.bundles import EKFAC, KFAC, AdaptiveDamping, Damping, Hessian, LowRank, QuadraticModel, Refresh
from torchcurv.curv.kinds.base import CurvatureKind, SignalKind, Signals
from torchcurv.curv.kinds.table import register_kind
from torchcurv.curv.layers.table import register_view
from torchcurv.curv.losses.formula import LossFormula
from torchcurv.curv.losses.table import register_loss
from torchcurv.laplace import LaplacePosterior, laplace
from torchcurv.optim.preconditioner import Preconditioner
from torchcurv.optim.residual_newton import ResidualNewton
from torchcurv.optim.second_order import SecondOrderOptimizer
from torchcurv.optim.vi import VIOptimizer

__all__ = [
    "EKFAC",
    "KFAC",
    "AdaptiveDamping",
    "Approximation",
    "CurvatureKind",
    "CurvatureOperator",
    "CurvatureSet",
    "Damping",
    "Hessian",
    "LaplacePosterior",
    "LossFormula",
    "LowRank",
    "Preconditioner",
    "QuadraticModel",
    "Refresh",
    "ResidualNewton",
    "SecondOrderOptimizer",
    "SignalKind",
    "Signals",
    "Statistic",
    "VIOptimizer",
    "curvature",
    "directions",
    "laplace",
    "nn",
    "optim",
    "register_approximation",
    "register_kind",
    "register_loss",
    "register_view",
]
