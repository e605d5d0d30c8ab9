"""torchcurv: the curvature of a network's loss, layer by layer, in a form an optimizer can use."""

from torchcurv import nn, optim
from torchcurv.curv.losses import register_loss
from torchcurv.curv.operator import CurvatureSet, curvature, directions
from torchcurv.curv.products import CurvatureOperator
from torchcurv.curv.views import register_view
from torchcurv.laplace import LaplacePosterior, laplace
from torchcurv.optim.preconditioner import Preconditioner
from torchcurv.optim.second_order import SecondOrderOptimizer
from torchcurv.optim.vi import VIOptimizer

__all__ = [
    "CurvatureOperator",
    "CurvatureSet",
    "LaplacePosterior",
    "Preconditioner",
    "SecondOrderOptimizer",
    "VIOptimizer",
    "curvature",
    "directions",
    "laplace",
    "nn",
    "optim",
    "register_loss",
    "register_view",
]
