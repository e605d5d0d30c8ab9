"""The other packages, as training steps that do the same work on the same batch.

Each adapter takes (work, model, loss_fn, x, y) and returns a function that makes one training step, or None
where the package cannot do that work. All end in SGD with momentum. None of the packages is needed: they are
imported when asked for, and `INSTALL` says how to get them without letting pip touch torch.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

DAMPING, DECAY = 0.1, 0.95


@dataclass(frozen=True)
class Work:
    """What a step has to do; `curvature` is "ggn" (one draw), "ggn exact", "empirical_fisher" or "hessian"."""

    approx: str
    curvature: str
    update_every: int = 1  # statistics
    refactor_every: int = 1  # inverses


Step = Callable[[], None]
Adapter = Callable[[Work, nn.Module, nn.Module, Tensor, Tensor], Step | None]


def sgd(model: nn.Module) -> torch.optim.SGD:
    """Plain SGD with momentum; the rate is small so that the timed weights stay in the same regime."""
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)


def backpack(work: Work, model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> Step | None:
    """BackPACK gives the statistics; averaging, inverses and products are ours (`_Inverses`)."""
    import backpack
    from backpack.extensions import KFAC, DiagGGNExact, DiagGGNMC, SumGradSquared

    quantities = {
        ("kfac", "ggn"): (KFAC, "kfac"),
        ("diag", "ggn"): (DiagGGNMC, "diag_ggn_mc"),
        ("diag", "ggn exact"): (DiagGGNExact, "diag_ggn_exact"),
        ("diag", "empirical_fisher"): (SumGradSquared, "sum_grad_squared"),
    }
    if (work.approx, work.curvature) not in quantities:
        return None
    quantity, attribute = quantities[work.approx, work.curvature]
    options = {} if quantity in (SumGradSquared, DiagGGNExact) else {"mc_samples": 1}
    model, loss_fn, optimizer = backpack.extend(model), backpack.extend(loss_fn), sgd(model)
    inverses, count = _Inverses(model), 0

    def step() -> None:
        nonlocal count
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        if count % work.update_every == 0:
            with backpack.backpack(quantity(**options)):
                loss.backward()
            inverses.average(attribute)
        else:
            loss.backward()
        if work.approx == "diag":
            inverses.divide()
        else:
            if count % work.refactor_every == 0:
                inverses.refactor()
            inverses.multiply()
        optimizer.step()
        count += 1

    return step


def curvlinops(work: Work, model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> Step | None:
    """curvlinops' K-FAC operator and its inverse; it has no running averages and no diagonal."""
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

    if work.approx != "kfac" or work.curvature == "ggn exact":
        return None
    fisher_type = "mc" if work.curvature == "ggn" else "empirical"
    parameters, optimizer = list(model.parameters()), sgd(model)
    factors = inverse = None
    count = 0

    def step() -> None:
        nonlocal factors, inverse, count
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        gradients = [p.grad for p in parameters]
        if count % work.update_every == 0:
            factors = KFACLinearOperator(
                model, loss_fn, parameters, [(x, y)], fisher_type=fisher_type, mc_samples=1,
                check_deterministic=False, separate_weight_and_bias=False, num_data=len(x),
            )  # fmt: skip
            factors.compute_kronecker_factors()
        if count % work.refactor_every == 0:
            inverse = KFACInverseLinearOperator(factors, damping=DAMPING, use_heuristic_damping=True)
        for p, direction in zip(parameters, inverse @ gradients, strict=True):
            p.grad = direction
        optimizer.step()
        count += 1

    return step


def asdl(work: Work, model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> Step | None:
    """ASDL's gradient makers, which average and invert themselves."""
    if not torch.cuda.is_available():  # it marks ranges for a CUDA profiler, which a CPU build of torch refuses
        torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: None
    from asdl.precondition import DiagNaturalGradientMaker, KfacGradientMaker, PreconditioningConfig

    config = PreconditioningConfig(
        data_size=len(x), damping=DAMPING, ema_decay=1 - DECAY,
        curvature_upd_interval=work.update_every, preconditioner_upd_interval=work.refactor_every,
    )  # fmt: skip
    maker = {"kfac": KfacGradientMaker, "diag": DiagNaturalGradientMaker}[work.approx]
    fisher = {"ggn": "fisher_mc", "ggn exact": "fisher_exact", "empirical_fisher": "fisher_emp"}
    gradients, optimizer = maker(model, config, fisher_type=fisher[work.curvature]), sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        outputs = gradients.setup_model_call(model, x)
        gradients.setup_loss_call(loss_fn, outputs, y)
        gradients.forward_and_backward()
        optimizer.step()

    return step


def singd(work: Work, model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> Step | None:
    """SINGD with dense structures: empirical Fisher K-FAC whose inverses are updated, never computed."""
    from singd.optim.optimizer import SINGD

    same = work.update_every == work.refactor_every
    if work.approx != "kfac" or work.curvature != "empirical_fisher" or not same:
        return None
    optimizer = SINGD(
        model, lr=1e-4, momentum=0.9, damping=DAMPING, alpha1=0.0, T=work.update_every, lr_cov=1e-2,
        kfac_like=True, normalize_lr_cov=True,
    )  # fmt: skip

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()

    return step


def nngeometry(work: Work, model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> Step | None:
    """NNGeometry's Fisher matrices, drawn or exact; no running averages."""
    from nngeometry.metrics import FIM, FIM_MonteCarlo
    from nngeometry.object import PMatDiag, PMatKFAC
    from nngeometry.object.vector import PVector
    from torch.utils.data import DataLoader, TensorDataset

    measure = {"ggn": partial(FIM_MonteCarlo, trials=1), "ggn exact": FIM}.get(work.curvature)
    if measure is None:
        return None
    representation = {"kfac": PMatKFAC, "diag": PMatDiag}[work.approx]
    loader, optimizer = DataLoader(TensorDataset(x, y), batch_size=len(x)), sgd(model)
    fisher = inverse = None
    count = 0

    def step() -> None:
        nonlocal fisher, inverse, count
        if count % work.update_every == 0:
            fisher = measure(model, loader, representation)
        if count % work.refactor_every == 0:
            inverse = fisher.inverse(regul=DAMPING)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        direction = inverse.mv(PVector.from_model_grad(model)).to_dict()
        for key, module in modules.items():
            module.weight.grad, module.bias.grad = direction[key]
        optimizer.step()
        count += 1

    modules = _modules_by_key(model)
    return step


def _modules_by_key(model: nn.Module) -> dict[str, nn.Module]:
    """Layers under the names that NNGeometry gives them."""
    from nngeometry.layercollection import LayerCollection

    keys = LayerCollection.from_model(model).layers
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return dict(zip(keys, layers, strict=True))


class _Inverses:
    """Running averages, damped Cholesky inverses and products for a package that gives statistics only."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.averages: dict[nn.Parameter, list[Tensor]] = {}
        self.inverses: dict[nn.Parameter, list[Tensor]] = {}

    def average(self, attribute: str) -> None:
        for p in self.parameters:
            new = getattr(p, attribute)
            new = [new] if isinstance(new, Tensor) else new
            old = self.averages.setdefault(p, [x.clone() for x in new])
            torch._foreach_lerp_(old, new, 1 - DECAY)
            delattr(p, attribute)

    def refactor(self) -> None:
        for p, factors in self.averages.items():
            damping = DAMPING ** (1 / len(factors))
            self.inverses[p] = [_inverse(x, damping) for x in factors]

    def multiply(self) -> None:
        for p, (output, *inputs) in self.inverses.items():
            matrix = output @ p.grad.reshape(len(output), -1)
            p.grad = (matrix @ inputs[0] if inputs else matrix).view_as(p)

    def divide(self) -> None:
        for p, (diagonal,) in self.averages.items():
            p.grad = p.grad / (diagonal + DAMPING)


def _inverse(matrix: Tensor, damping: float) -> Tensor:
    damped = matrix + damping * torch.eye(len(matrix))
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


OTHERS: dict[str, tuple[str, Adapter]] = {  # name: (module, adapter)
    "BackPACK": ("backpack", backpack),
    "curvlinops": ("curvlinops", curvlinops),
    "ASDL": ("asdl", asdl),
    "SINGD": ("singd", singd),
    "NNGeometry": ("nngeometry", nngeometry),
}
INSTALL = (
    "pip install --no-deps backpack-for-pytorch curvlinops-for-pytorch asdfghjkl singd nngeometry "
    "einops einconv unfoldNd linear_operator jaxtyping typeguard wadler_lindig opt_einsum"
)


def available(names: list[str] | None = None) -> tuple[dict[str, Adapter], list[str]]:
    """(adapters of what is installed, names of what is not)."""
    wanted = list(OTHERS) if names is None else names
    missing = [name for name in wanted if importlib.util.find_spec(OTHERS[name][0]) is None]
    return {name: OTHERS[name][1] for name in wanted if name not in missing}, missing
