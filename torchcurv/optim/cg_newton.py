"""CGNewton: steps along the solution of [(1 - alpha) C + alpha I] d = -g, found by conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor, nn

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.checks import flag, number
from torchcurv.curv.hessian.products import CurvatureVectorProduct
from torchcurv.curv.losses.autograd import hessian_times
from torchcurv.curv.options import LIVE, BlockOptions, MainOptions, Option, Options, complete, table_of, with_defaults
from torchcurv.optim.base import CurvatureOptimizer
from torchcurv.optim.engine.companion import Group
from torchcurv.optim.engine.fallback import descend_uncovered
from torchcurv.optim.options import LossOptions, MainLossOption
from torchcurv.optim.rules import no_price
from torchcurv.optim.update import inner

Vector = list[Tensor]
OPERATOR_KINDS = ("ggn", "hessian")
_finite = number(lambda x: 0 <= x < math.inf, "a finite number >= 0")


def conjugate_gradients(
    product: Callable[[Vector], Vector], b: Vector, start: Vector | None, tol: float, atol: float, maxiter: int
) -> tuple[Vector, int]:
    """(x with A x = b, iterations) for a symmetric A given by its products; reads two numbers per iteration.

    Stops when norm(b - A x) <= max(tol * norm(b), atol), after maxiter iterations, or at a direction p with
    p^T A p <= 0: with x as it is, which is b if that is the first direction.
    """
    x = [torch.zeros_like(t) for t in b] if start is None else [t.clone() for t in start]
    r = [t.clone() for t in b] if start is None else [t - s for t, s in zip(b, product(x), strict=True)]
    p, rr = [t.clone() for t in r], _dot(r, r)
    enough = max(tol * math.sqrt(_dot(b, b)), atol)
    for done in range(maxiter):
        if math.sqrt(rr) <= enough:
            return x, done
        Ap = product(p)
        curvature = _dot(p, Ap)
        if not curvature > 0:
            return (p if done == 0 and start is None else x), done
        step = rr / curvature
        torch._foreach_add_(x, p, alpha=step)
        torch._foreach_add_(r, Ap, alpha=-step)
        rr, before = _dot(r, r), rr
        torch._foreach_mul_(p, rr / before)
        torch._foreach_add_(p, r)
    return x, maxiter


def _dot(x: Vector, y: Vector) -> float:
    return float(torch.stack([inner(s, t) for s, t in zip(x, y, strict=True)]).sum())


class CGSolveOptions(TypedDict, total=False):
    """When conjugate gradients stop, per group."""

    cg_tol: Annotated[float, Option(0.1, _finite, LIVE, "stop at a residual of this times norm(g)")]
    cg_atol: Annotated[float, Option(0.0, _finite, LIVE, "or at this residual")]
    cg_maxiter: Annotated[
        int, Option(50, number(lambda x: x >= 1, "an int of at least 1"), LIVE, "or after so many iterations")
    ]
    warm_start: Annotated[bool, Option(False, flag, LIVE, "start from the last solution")]


class CGOptions(CGSolveOptions):
    """All that is CGNewton's own."""

    lr: Annotated[float, Option(0.1, _finite, LIVE, "step size")]
    alpha: Annotated[
        float,
        Option(0.02, number(lambda x: 0 <= x <= 1, "a number from 0 to 1"), LIVE, "weight of the identity against C"),
    ]


class CGKeywords(CGSolveOptions, LossOptions):
    """What CGNewton takes beside the keywords that it names."""

    residual_over: str
    hessian_averaging: str
    max_hessian_dim: int
    max_chain_products: int
    indefinite: str


def _residual_is_propagated(group: Group, options: Options, settings: Mapping[str, Any]) -> None:
    if options.residual != "keep" and options.approx is not None and options.curv_type != "hessian":
        raise ValueError(
            f"residual={options.residual!r} with curv_type={options.curv_type!r}, which has no second derivatives of "
            'activations: write curv_type="hessian" with approx="kfac" or "diag"'
        )


class CGNewton(CurvatureOptimizer):
    r"""p <- p + lr d with [(1 - alpha) C + alpha I] d = -g by conjugate gradients, per block or over everything.

    Args:
        model, params, loss_fn, curv_type, samples, and the options of the whole optimizer: as in
            SecondOrderOptimizer. samples=None, the default, is the exact curvature.
        approx: "block" solves layer by layer and "full" over all parameters, both through products with the rows of
            the batch; "kfac", "unit" and "diag" multiply with what these keep. "operator" keeps nothing: C is the
            exact "ggn" or "hessian" over all parameters, by differentiating the closure of `step` twice.
        residual: with curv_type="hessian" and approx="kfac" or "diag", what becomes of the second derivatives of
            activations on the way: "keep" is the Hessian, "zero" Gauss-Newton, "abs" and "clip" (at 0 from below) the
            Hessian of positive curvature. residual_over="batch" and hessian_averaging="batch", of the options of the
            whole optimizer, are what the source does.
        lr: step size. alpha: 0 <= alpha <= 1, weight of the identity against C.
        cg_tol, cg_atol: CG stops when the residual is below max(cg_tol * norm(g), cg_atol). cg_maxiter: or then.
        warm_start: start CG from the last solution.

    `metrics()` reports the iterations of the last step, summed over its blocks. At a direction of negative curvature
    CG stops.

    Sources: Dangel, Harmeling, Hennig, "Modular block-diagonal curvature approximations for feedforward
    architectures" (2020); Martens, "Deep learning via Hessian-free optimization" (2010).
    """

    over_ranks: ClassVar = True
    table: ClassVar = with_defaults(
        table_of(MainLossOption, MainOptions, BlockOptions, LossOptions, CGOptions),
        approx="block",
        samples=None,
        ema_decay=0.0,
    )

    def __init__(
        self,
        model: nn.Module,
        params: Any = None,
        *,
        loss_fn: nn.Module | str | None = "cross_entropy",
        curv_type: str = "ggn",
        approx: str = "block",
        lr: float = 0.1,
        alpha: float = 0.02,
        samples: int | None = None,
        sharing: str = "expand",
        residual: str = "keep",
        ema_decay: float = 0.0,
        **options: Unpack[CGKeywords],
    ) -> None:
        operator = curv_type if approx == "operator" else None
        self.settings = {"operator": operator}
        if operator is not None and curv_type not in OPERATOR_KINDS:
            raise ValueError(f'curv_type={curv_type!r} with approx="operator"; allowed are "ggn" and "hessian"')
        if operator is not None and residual != "keep":
            raise ValueError(f'residual={residual!r} with approx="operator"; choose curv_type="ggn" for "zero"')
        by_rows = approx in ("full", "block") and curv_type != "hessian"
        given = {
            "loss_fn": loss_fn,
            "curv_type": "ggn" if operator else curv_type,
            "approx": None if operator else approx,
            "lr": lr,
            "alpha": alpha,
            "samples": samples,
            "sharing": sharing,
            "residual": residual,
            "ema_decay": ema_decay,
            "rows_limit": 1 if by_rows else 2**62,
            **options,
        }
        super().__init__(
            model,
            params,
            complete(self.table, given, type(self).__name__),
            rules=(no_price, _residual_is_propagated),
            factors=False,
            waits_for_gradients=operator is None,
            rows_stay=True,
        )

    def run_closure(self, closure: Callable[[], Any] | None) -> Any:
        """closure: recomputes loss and gradients as in torch.optim; with approx="operator" it is needed, and returns
        (loss, output), or for the Hessian the loss, without calling backward().
        """
        if self.settings["operator"] is None:
            return super().run_closure(closure)
        self._products, loss = self._products_of(closure)
        return loss

    def update_parameters(self) -> None:
        """Steps along the solutions: block by block, or over everything with products that keep nothing."""
        if self.settings["operator"] is not None:
            self._update_all(self._products)
            del self._products
            return
        iterations = 0
        for block, group in self.engine.by_group():
            if not self._measured(block) or all(p.grad is None for p in block.params):
                continue
            gradients = {p: p.grad if p.grad is not None else torch.zeros_like(p) for p in block.params}
            b = [-piece.of(gradients[piece.param]) for piece in block.pieces]
            d, count = self._solved(group, partial(self._multiply, block), b, [p for p, _ in block.pieces])
            iterations += count
            for piece, x in zip(block.pieces, d, strict=True):
                piece.of(piece.param).add_(x, alpha=group["lr"])
        descend_uncovered(self.param_groups, self.engine.blocks)
        self.noted.update(cg_iterations=torch.tensor(float(iterations)))

    def _measured(self, block: Curvature) -> bool:
        """Whether some process has measured a block."""
        ranks = self.engine.ranks
        return bool(block.average) if ranks.count == 1 else bool(ranks.mean(_number(block, bool(block.average))))

    def _multiply(self, block: Curvature, x: Vector) -> Vector:
        """C x; rows stay in the process that has them, and products are averaged."""
        ranks = self.engine.ranks
        if ranks.count == 1 or not block.approx.of_one_step:
            return block.multiply(x)
        return [ranks.mean(Cx) for Cx in (block.multiply(x) if block.average else [torch.zeros_like(t) for t in x])]

    def _solved(
        self, group: dict[str, Any], multiply: Callable[[Vector], Vector], b: Vector, params: list[Tensor]
    ) -> tuple[Vector, int]:
        """(the solution, iterations)."""
        alpha = group["alpha"]
        b = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in b]

        def product(x: Vector) -> Vector:
            return [(1 - alpha) * Cx + alpha * t for Cx, t in zip(multiply(x), x, strict=True)]

        key = f"direction:{len(params)}"
        start = None
        if group["warm_start"] and key in self.state[params[0]]:
            flat = self.state[params[0]][key].split([t.numel() for t in b])
            start = [part.reshape(t.shape) for part, t in zip(flat, b, strict=True)]
        d, iterations = conjugate_gradients(product, b, start, group["cg_tol"], group["cg_atol"], group["cg_maxiter"])
        if group["warm_start"]:
            self.state[params[0]][key] = torch.cat([t.flatten() for t in d])
        return d, iterations

    def _products_of(self, closure: Callable[[], Any] | None) -> tuple[tuple[CurvatureVectorProduct, Vector], Tensor]:
        """((products with C, the gradient), the loss) over all parameters, by differentiating the closure's graph."""
        if closure is None:
            raise ValueError('approx="operator" needs step(closure); the closure returns (loss, output)')
        with torch.enable_grad():
            result = closure()
        loss, output = result if isinstance(result, tuple) else (result, None)
        if output is None and self.settings["operator"] == "ggn":
            raise ValueError('approx="operator" with the GGN needs a closure that returns (loss, output)')
        params = [p for p in self.engine.params() if p.requires_grad]
        try:
            whole = CurvatureVectorProduct(loss, params, torch.ones_like(loss), output_matvec=None)
        except RuntimeError as error:
            if "second time" not in str(error) and "does not require grad" not in str(error):
                raise
            raise RuntimeError("the closure must return the loss without calling backward()") from error
        products = whole if self.settings["operator"] == "hessian" else _gauss_newton(loss, output, params)
        return (products, list(whole.first)), loss

    def _update_all(self, found: tuple[CurvatureVectorProduct, Vector]) -> None:
        products, gradient = found
        group, params = self.param_groups[0], [p for p in self.engine.params() if p.requires_grad]
        mean = self.engine.ranks.mean  # no backward() has averaged anything

        def multiply(x: Vector) -> Vector:
            return [mean(Cx[0]) for Cx in products([t.unsqueeze(0) for t in x])]

        d, iterations = self._solved(group, multiply, [-mean(g.detach()) for g in gradient], params)
        for p, x in zip(params, d, strict=True):
            p.add_(x.to(p.dtype), alpha=group["lr"])
        self.noted.update(cg_iterations=torch.tensor(float(iterations)))


def _number(block: Curvature, value: float) -> Tensor:
    return torch.tensor(float(value), device=block.params[0].device)


def _gauss_newton(loss: Tensor, output: Tensor, params: Vector) -> CurvatureVectorProduct:
    """J^T H_L J with H_L by differentiating the loss twice at the output."""
    with torch.enable_grad():
        (at_output,) = torch.autograd.grad(loss, output, create_graph=True)
    middle = partial(hessian_times, at_output, output)
    return CurvatureVectorProduct(output, params, torch.zeros_like(output), middle, include_second_order=False)
