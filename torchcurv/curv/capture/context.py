"""What a curvature pass is about, and what it may ask of the recorder that starts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.capture.calls import Call, Capture
from torchcurv.curv.capture.forward import Ended, Forward
from torchcurv.curv.capture.verify import GradientCheck
from torchcurv.curv.graph import Edge
from torchcurv.curv.hessian.tape import Tape
from torchcurv.curv.kinds.base import CurvatureKind
from torchcurv.curv.layers.layer import ParameterUse
from torchcurv.curv.losses.loss import Loss
from torchcurv.curv.losses.terms import Terms
from torchcurv.curv.numerics import full_precision

TAPES = 8  # forward passes whose functions are kept until a backward comes


@dataclass(frozen=True)
class LossEvent:
    """One loss of one forward pass, whose gradient a running backward brings.

    factor: what multiplies this loss in the function whose gradient is in `.grad`, without the scaler's scale.
    f, f_edge: the tensor the loss is applied to, and where its gradient arrives; output_edge: that of the capture.
    loss_scale: what a GradScaler multiplied the function by.
    arriving: the gradient at f, where the node of f is running and no loss but this one sends it.
    samples: the sample of each row of f, where the user said it.
    """

    loss: Loss
    terms: Terms
    factor: Tensor | float
    f: Tensor
    f_edge: Edge
    capture: Capture
    output_edge: Edge
    loss_scale: Any = 1.0
    arriving: Tensor | None = None
    samples: Tensor | None = None

    def edge_at(self, edge: Edge | None) -> Edge:
        """The edge of a call of the capture."""
        return self.output_edge if edge is None else edge

    @property
    def calls(self) -> list[Call]:
        return [call for call, _ in self.capture.calls]


class TapeShelf:
    """The functions of the last forward passes, until a backward has used them."""

    def __init__(self) -> None:
        self._kept: list[tuple[object, Tape]] = []
        self._used: set[int] = set()  # ids of forward passes

    def keep(self, forward: object, tape: Tape) -> None:
        """forward: stands for the forward pass, as `Capture.forward` does."""
        self._kept = [entry for entry in self._kept if id(entry[0]) not in self._used][1 - TAPES :]
        self._kept.append((forward, tape))
        self._used &= {id(entry[0]) for entry in self._kept}

    def of(self, capture: Capture) -> Tape:
        for forward, tape in self._kept:
            if forward is capture.forward:
                self._used.add(id(forward))
                return tape
        raise RuntimeError(
            "the Hessian is propagated through one call of the model: compute the loss from the model's output, and "
            "call backward() before the model runs again more than a few times"
        )

    def clear(self) -> None:
        self._kept, self._used = [], set()


class PassContext:
    """What passes share: the layers of the blocks, the hooks of the forward passes, and the check of gradients.

    due: names of the blocks that are measured. step, passes: how many steps there were, and passes in this one.
    """

    def __init__(
        self, model: nn.Module, blocks: list[Curvature], ended: Ended, seed: int = 0, unsupported: str = "error"
    ) -> None:
        self.layers = list({id(layer): layer for block in blocks for layer in block.layers}.values())
        index = {id(layer): k for k, layer in enumerate(self.layers)}
        self.members = {block.name: [index[id(layer)] for layer in block.layers] for block in blocks}
        self.forward = Forward(model, self.layers, ended)
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self.check = GradientCheck(names, self.forward.unknown_uses, unsupported)
        self.tapes = TapeShelf()
        self.due: set[str] = set()
        self.seed, self.step, self.passes = seed, 0, 0

    def layers_of(self, block: Curvature) -> list[int]:
        """The numbers of the layers of a block."""
        return self.members[block.name]

    def calls_at_parameters(self, calls: list[Call]) -> list[tuple[Call, Edge]]:
        """A call at the parameter itself, for each parameter of a module's own that is used in a way that is not known:
        what arrives there is its gradient, whatever uses it. calls: those that are known of the others."""
        found, seen = [], {call.layer for call in calls if not call.superseded}
        for k in self.forward.due:
            (site, *others), bias = self.layers[k].sites, self.layers[k].bias
            if not site.bare or bias is None:
                continue
            superseded = any(call.superseded for call in calls if call.layer == k)
            sites = [site, *others]
            unknown = bias.param in self.forward.unknown_uses or any(one.opaque for one in sites) or k not in seen
            if not unknown or (any(one.by_sample for one in sites) and (superseded or k in seen)):
                continue
            for call in calls:
                call.superseded |= call.layer == k
            found.append(_at_parameter(k, site, bias.param))
            self.check.common |= {name for name, members in self.members.items() if k in members}
        return found

    def kind_of(self, block: Curvature) -> CurvatureKind:
        """What the next pass measures of a block."""
        return block.measured_kind()

    def generator(self, device: torch.device) -> torch.Generator:
        """Draws that a resumed run repeats, and that leave the global generators alone. Pass p of process k of W has
        the draws of pass p W + k of one process, which accumulates the parts of all."""
        rank, count = self.forward.ranks.place
        seed = hash((self.seed, self.step, self.passes * count + rank, 0)) & (2**63 - 1)
        return torch.Generator(device).manual_seed(seed)

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """A pass of our own runs, in full precision."""
        self.forward.inside = True
        try:
            with full_precision(device.type):
                yield
        finally:
            self.forward.inside = False
        self.passes += 1

    @contextmanager
    def batch_statistics_differentiated(self) -> Iterator[None]:
        """Batch statistics are functions of the batch, and not constants."""
        self.forward.constant_statistics = False
        try:
            yield
        finally:
            self.forward.constant_statistics = True


def _at_parameter(layer: int, site: ParameterUse, param: Tensor) -> tuple[Call, Edge]:
    edge = Edge(*get_gradient_edge(param)[:2], param.shape)
    call = Call(layer, site, (param.detach().new_empty(1),), param.shape, 1, lambda dz: dz.reshape(1, -1))
    return call, edge
