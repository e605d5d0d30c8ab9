"""Looking at curvature: the blocks of L over a whole data set, as one symmetric operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from torchcurv.curv.analysis.curvature_set import CurvatureSet
from torchcurv.curv.analysis.directions import Criterion, Directions, check_choices, directions_of, with_gradient_blocks
from torchcurv.curv.analysis.operator import CurvatureOperator, forward, preserved_buffers
from torchcurv.curv.block.block import Curvature, partition
from torchcurv.curv.bundles import flattened
from torchcurv.curv.capture.context import LossEvent
from torchcurv.curv.capture.recorder import Recorder
from torchcurv.curv.capture.signal_pass import CurvaturePass
from torchcurv.curv.checks import entry_of, pair_of
from torchcurv.curv.graph import edge_of
from torchcurv.curv.kinds.table import KINDS
from torchcurv.curv.layers.find import find_layers
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.layers.products import Layout
from torchcurv.curv.losses.loss import Loss
from torchcurv.curv.losses.table import loss_of
from torchcurv.curv.options import Options

DEFAULTS = {"damping": 0.0, "damping_type": "exact", "indefinite": "keep"}


@overload
def curvature(
    model: nn.Module,
    loss_fn: nn.Module | str,
    data: Iterable[tuple[Any, Tensor]],
    *,
    approx: Literal["operator"],
    **options: Any,
) -> CurvatureOperator: ...


@overload
def curvature(
    model: nn.Module,
    loss_fn: nn.Module | str,
    data: Iterable[tuple[Any, Tensor]],
    *,
    approx: str | None = "kfac",
    **options: Any,
) -> CurvatureSet: ...


def curvature(
    model: nn.Module,
    loss_fn: nn.Module | str,
    data: Iterable[tuple[Any, Tensor]],
    *,
    curv_type: str = "ggn",
    approx: str | None = "kfac",
    params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | None = None,
    samples: int | None = None,
    reduction: str | None = None,
    class_dim: int | None = None,
    output_fn: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    **options: Any,
) -> CurvatureSet | CurvatureOperator:
    """The curvature of L over all of `data`, at the parameters as they are.

    L is the loss of the whole set: for a mean loss the batches count by their terms (their 1/R), a sum loss is
    summed. Nothing of the model changes: not its mode, its buffers, its gradients, nor the global generators.

    Args:
        approx: "operator" measures nothing now: C is exact, over all parameters together, and known by its products
            with vectors, for networks of any size and of any layers.
        loss_fn: a torch loss module, or "cross_entropy", "mse", "bce_with_logits", "nll".
        data: an iterable of (x, y). x is what the model is called with: a tensor, a tuple of positional or a dict of
            keyword arguments. "ekfac" goes over it twice (an iterator is kept in memory for that), "operator" once
            for every product.
        params: the parameters to cover (or named ones); None: all that are trainable.
        samples: signals drawn per batch; None: the exact curvature.
        options: `sharing`, `rows_limit`, as in `torchcurv.curv.options`.

    Returns: a CurvatureSet; for approx="operator" a CurvatureOperator.
    Raises: ValueError for parameters that no layer covers, for empty data, and for options that are not allowed.
    """
    flat = flattened({"curv_type": curv_type, "approx": approx, **options})
    curv_type, approx = flat.pop("curv_type"), flat.pop("approx")
    if "samples" in flat:
        if samples is not None:
            raise ValueError(f"samples is given twice, once by samples={samples!r}: leave one of them out")
        samples = flat.pop("samples")
    options = flat
    if approx == "operator":
        extra = [*options, *(["samples"] if samples is not None else [])]
        if extra:
            raise ValueError(f'approx="operator" is exact and has no option {", ".join(extra)}: leave that out')
        loss = _loss(loss_fn, reduction, class_dim)
        return CurvatureOperator(model, loss, data, curv_type, _named(model, _chosen(model, params)), output_fn, seed)
    chosen = Options(curv_type=curv_type, approx=approx, samples=samples, **{**DEFAULTS, **options})
    if approx is None:
        raise ValueError("approx=None asks for no curvature; choose an approximation")
    blocks, covered = _looked_at(
        model, loss_fn, data, chosen, params, reduction=reduction, class_dim=class_dim, output_fn=output_fn, seed=seed
    )
    return CurvatureSet(blocks, _named(model, covered))


def directions(
    model: nn.Module,
    loss_fn: nn.Module | str,
    data: Iterable[tuple[Any, Tensor]],
    *,
    criterion: Criterion | None = None,
    curv_type: str = "ggn",
    partition: str = "all",
    params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | None = None,
    samples: int | None = None,
    cutoff: float | None = None,
    curvature_samples: int | None = None,
    gradient_samples: int | None = None,
    reduction: str | None = None,
    class_dim: int | None = None,
    output_fn: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Directions]:
    """Eigenvectors of the low-rank GGN of L over all of `data`, with two derivatives of every sample along them.

    The layers' inputs and signals of all the data are kept until the end, and the Gram matrix has a row per sample and
    signal: give it a batch or a few.

    Args:
        criterion: from the eigenvalues above the cut-off, ascending, to the indices of those wanted; None: all.
        curv_type: "ggn", "fisher" or "empirical_fisher".
        partition: eigenvectors over "all" parameters, those of each "layer", or each "parameter".
        cutoff: eigenvalues up to this times the largest count as zero; None: what rounding makes of zero.
        curvature_samples, gradient_samples: make directions and λ, or γ, of so many samples, the first of each batch;
            None: of all.
        the rest: as in `curvature`.

    Returns: block name -> torchcurv.curv.analysis.directions.Directions.
    """
    if not entry_of("curv_type", curv_type, KINDS).sends_signals:
        known = ", ".join(repr(name) for name, kind in KINDS.items() if kind.sends_signals)
        raise ValueError(f"curv_type={curv_type!r}; directions are known of {known}")
    check_choices(cutoff, curvature_samples, gradient_samples)
    chosen = Options(curv_type=curv_type, approx="full", partition=partition, samples=samples, damping=0.0)
    blocks, _ = _looked_at(
        model, loss_fn, data, chosen, params, with_gradient_blocks,
        reduction=reduction, class_dim=class_dim, output_fn=output_fn, seed=seed,
    )  # fmt: skip
    pairs = zip(blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :], strict=True)
    every = criterion or (lambda evals: torch.arange(len(evals), device=evals.device))
    return {
        block.name: directions_of(block, shares, every, cutoff, curvature_samples, gradient_samples)
        for block, shares in pairs
    }


def _looked_at(
    model: nn.Module,
    loss_fn: nn.Module | str,
    data: Iterable[tuple[Any, Tensor]],
    options: Options,
    params: Any,
    prepared: Callable[[list[Curvature]], list[Curvature]] = list,
    *,
    reduction: str | None,
    class_dim: int | None,
    output_fn: Callable[[Any], Tensor] | None,
    seed: int,
) -> tuple[list[Curvature], set[Tensor]]:
    """(the blocks, measured over all of the data, and what they cover)."""
    alone, products = set[Tensor](), dict[Tensor, Layout]()
    covered = _covered(model, params, options, alone)
    loss = _loss(loss_fn, reduction, class_dim)
    passes = 2 if options.approx == "ekfac" else 1
    if iter(data) is data:
        data = list(data)
    while True:
        blocks = prepared(_blocks(_layers(model, covered, options, alone, products), options))
        record = Recorder(model, blocks, None, seed=seed)
        try:
            with preserved_buffers(model):
                for _ in range(passes):
                    _measure(model, record, blocks, loss, data, output_fn)
            seen = _new(record, products, alone)
            if not seen:
                return blocks, covered
            products |= seen
        except _UsedElsewhere as error:  # what that is, is known now: the parameters are taken element by element
            seen = _new(record, products, alone)
            if not seen and error.params <= alone:
                raise ValueError(str(error)) from None
            products |= seen
            alone |= error.params - seen.keys()
        finally:
            record.remove()


def _new(record: Recorder, products: dict[Tensor, Layout], alone: set[Tensor]) -> dict[Tensor, Layout]:
    """Parameters that turned out to be the weights of linear maps."""
    return {p: how for p, how in record.forward.products.items() if p not in products and p not in alone}


class _UsedElsewhere(Exception):
    """Parameters that are not used as their modules' types say."""

    def __init__(self, blocks: list[Curvature]) -> None:
        names = ", ".join(block.name for block in blocks)
        super().__init__(f"the loss does not depend on {names}: pass params= without their parameters")
        self.params = {p for block in blocks for p in block.params}


def _named(model: nn.Module, chosen: set[Tensor]) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p in chosen}


def _loss(loss_fn: nn.Module | str, reduction: str | None, class_dim: int | None) -> Loss:
    loss = loss_of(loss_fn, reduction, class_dim)
    if loss.reduction == "none":
        raise ValueError("reduction='none' says nothing about the weight of each term; pass 'mean' or 'sum'")
    return loss


def _layers(
    model: nn.Module,
    covered: set[Tensor],
    options: Options,
    alone: set[Tensor],
    products: dict[Tensor, Layout] | None = None,
) -> list[Layer]:
    return find_layers(model, lambda p: p in covered, lambda p: options.approx == "diag", alone, products)


def _chosen(model: nn.Module, params: Any) -> set[Tensor]:
    own: set[Tensor] = set(model.parameters())
    if params is None:
        chosen = {p for p in own if p.requires_grad}
    else:
        chosen = {p[1] if isinstance(p, tuple) else p for p in params}
    strangers = len(chosen - own)
    if strangers:
        raise ValueError(f"{strangers} of the parameters given are not parameters of the model")
    if not chosen:
        raise ValueError("the model has no trainable parameters: there is no curvature to look at")
    return chosen


def _covered(model: nn.Module, params: Any, options: Options, alone: set[Tensor]) -> set[Tensor]:
    """What is looked at; parameters that no layer explains are put into `alone`."""
    chosen = _chosen(model, params)
    for _ in range(2):
        covered = {p for layer in _layers(model, chosen, options, alone) for p in layer.params}
        alone |= chosen - covered
    missing = [name for name, p in model.named_parameters() if p in chosen - covered]
    if missing:
        raise ValueError(
            f"no curvature is known for the parameters {', '.join(sorted(missing))}: pass params= without them, or "
            'choose approx="diag" or "operator", or teach torchcurv the layer with torchcurv.register_view'
        )
    return chosen


def _blocks(layers: list[Layer], options: Options) -> list[Curvature]:
    return [Curvature(*arguments) for arguments in partition((layer, options, 0) for layer in layers)]


def _measure(
    model: nn.Module,
    record: Recorder,
    blocks: list[Curvature],
    loss: Any,
    data: Iterable[tuple[Any, Tensor]],
    output_fn: Callable[[Any], Tensor] | None,
) -> None:
    """One pass over the data, and the factors that follow from it."""
    record.context.passes = 0
    total: Tensor | float = 0.0
    for block in blocks:
        block.average.forget()
    empty = True
    for x, y in map(pair_of, data):
        empty = False
        with torch.enable_grad():
            f, _ = forward(model, x, output_fn)
        found = record.capture_of(f) if f.grad_fn is not None else None
        if found is None:
            raise ValueError("the model's output does not depend on any covered parameter through a recorded layer")
        capture, edge = found
        terms = loss.terms(f, y, capture.batch_of(f))
        if loss.averages(terms):  # batches count by 1/R: measure with R = 1, divide by the sum of all 1/R
            total = total + 1 / terms.reduction
            terms = replace(terms, reduction=1.0)
        event = LossEvent(loss, terms, 1.0, f.detach(), edge_of(f), capture, edge)
        CurvaturePass(record.context, event, blocks).run()
    if empty:
        raise ValueError("data is empty: there is nothing to measure")
    for block in blocks:
        idle = block.layout.is_part and not block.pending and block.name not in record.context.check.left
        if idle and not block.approx.of_one_step:  # an expert that no sample came to
            block.pending.add(block.approx.empty(block.layers, block.params[0].new_zeros(())))
    unreached = [block for block in blocks if not block.pending]
    if unreached:
        raise _UsedElsewhere(unreached)
    for block in blocks:
        if isinstance(total, Tensor) or total:
            block.pending.scale(1 / total)
        block.update(1.0)
        if not block.approx.of_one_step:
            block.refactor(0.0)
