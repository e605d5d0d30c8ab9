"""torchcurv: the curvature of a network's loss, layer by layer, in a form an optimizer can use."""

from torchcurv import optim
from torchcurv.curv.losses import register_loss
from torchcurv.curv.operator import CurvatureSet, curvature
from torchcurv.curv.views import register_view
from torchcurv.laplace import LaplacePosterior, laplace
from torchcurv.optim.preconditioner import Preconditioner
from torchcurv.optim.second_order import SecondOrderOptimizer
from torchcurv.optim.vi import VIOptimizer

__all__ = [
    "CurvatureSet",
    "LaplacePosterior",
    "Preconditioner",
    "SecondOrderOptimizer",
    "VIOptimizer",
    "curvature",
    "laplace",
    "optim",
    "register_loss",
    "register_view",
]
