"""Update rules that read curvature."""

from torchcurv.optim.adahesscale import AdaHesScale
from torchcurv.optim.cg_newton import CGNewton
from torchcurv.optim.directional import DirectionalNewton
from torchcurv.optim.preconditioner import Preconditioner
from torchcurv.optim.residual_newton import ResidualNewton
from torchcurv.optim.second_order import SecondOrderOptimizer
from torchcurv.optim.vi import VOGN, NoisyKFAC, VIOptimizer

__all__ = [
    "VOGN",
    "AdaHesScale",
    "CGNewton",
    "DirectionalNewton",
    "NoisyKFAC",
    "Preconditioner",
    "ResidualNewton",
    "SecondOrderOptimizer",
    "VIOptimizer",
]
