"""The check of the first pass: the recorded calls of a block's layers explain its gradient.

The statistics of a layer are made of pairs (a, s) at its calls. That they belong to the parameters' gradient is taken
from no one: the first pass of a block compares them, for one signal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.capture.assemble import StatisticsAssembler
from torchcurv.curv.capture.calls import Call
from torchcurv.curv.graph import has_backward_hooks
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.numerics import at_least_float32
from torchcurv.curv.statistics.layer import LayerData

# From a signal at the output to the gradients at the outputs of calls and at parameters.
Backward = Callable[[list[Call], Tensor, list[Tensor]], list[Tensor | None]]


class GradientCheck:
    """Which blocks were checked, and what becomes of those whose gradient the calls do not explain.

    names: of the model's parameters. unknown_uses: functions that used a bare parameter in a way that is not known.
    unsupported: "error" raises; "gradient" stops feeding the block.
    """

    def __init__(self, names: dict[Tensor, str], unknown_uses: dict[Tensor, str], unsupported: str) -> None:
        self.names, self.unknown_uses, self.unsupported = names, unknown_uses, unsupported
        self.verified: dict[str, bool] = {}  # checked blocks: whether with more than one sample
        self.excluded: set[str] = set()  # blocks that failed, under unsupported="gradient"
        self.name_fits = False  # whether a gradient was found to be that of the loss known by its name

    def needs_check(self, block: Curvature, n: int) -> bool:
        """Whether the gradient of a block has still to be compared with that of its recorded calls.

        One sample alone does not show where samples meet. A use that is not known may not have mattered before.
        """
        separate = self.verified.get(block.name)
        if separate is None or (n > 1 and not separate):
            return True
        by_sample = any(site.by_sample for layer in block.layers for site in layer.sites)
        return not by_sample and not self.unknown_uses.keys().isdisjoint(block.params)

    def run(self, blocks: list[Curvature], assembler: StatisticsAssembler, draw: Tensor, backward: Backward) -> None:
        """Raise unless the gradient of every parameter is sum_r s a^T over the recorded calls, for one signal of half
        of the samples, and nothing arrives at the other half.

        Finds weights that are used outside their layers, layers that do more than their type, batches that are not
        dimension 0, and samples that meet; on first use only.

        draw: a signal [n, t, c].
        """
        calls = assembler.calls_of(blocks)
        # a hook on a parameter may change its gradient, and must not run more often than the user's backward
        params = [p for block in blocks for p in block.params if p.requires_grad and not has_backward_hooks(p)]
        if not params:
            return
        silent = slice(len(draw) // 2)
        draw[silent] = 0  # samples that send nothing: nothing may arrive at them
        got = backward(calls, draw, params)
        at_call = {id(call): grad for call, grad in zip(calls, got, strict=False)}
        gradients = dict(zip(params, got[len(calls) :], strict=True))
        for block in blocks:
            self._compare(block, assembler, at_call, gradients, silent)

    def _compare(
        self,
        block: Curvature,
        assembler: StatisticsAssembler,
        at_call: dict[int, Tensor | None],
        gradients: dict[Tensor, Tensor | None],
        silent: slice,
    ) -> None:
        wrong: list[tuple[Tensor, str]] = []
        mixed: list[Tensor] = []
        finite: list[Tensor] = []
        for k in assembler.layers_of(block):
            uses = assembler.uses(k, lambda call: [at_call.get(id(call))])
            grads = [at_call.get(id(call)) for call in assembler.calls.get(k, [])]
            eps = max((torch.finfo(grad.dtype).eps for grad in grads if grad is not None), default=0.0)
            wrong += self._unexplained(assembler.layers[k], uses, gradients, eps)
            mixed += [use.s[:, silent].nan_to_num(0, 0, 0).any() for use in uses]  # 0 times inf is no signal
            finite += [torch.isfinite(use.s.sum()) for use in uses]
        if wrong and bool(torch.stack([flag for flag, _ in wrong]).any()):
            self.exclude(block, self.gradient_mismatch_message(block, [name for flag, name in wrong if flag]))
        elif mixed and bool(torch.stack(mixed).any()):
            self.exclude(block, self.coupled_samples_message(block))
        if all(bool(flag) for flag in finite):  # a signal that is not finite shows nothing: the next pass checks again
            self.verified[block.name] = assembler.n > 1

    def _unexplained(
        self, layer: Layer, uses: list[LayerData], gradients: dict[Tensor, Tensor | None], eps: float
    ) -> list[tuple[Tensor, str]]:
        """(whether its gradient is not that of these uses, its name) for each parameter of the layer."""
        dtype = layer.params[0].dtype
        eps = max(eps, torch.finfo(dtype).eps)
        expected = layer.params[0].new_zeros(layer.shape, dtype=torch.promote_types(dtype, torch.float32))
        size = expected.new_zeros(())
        for use in uses:
            gradient, magnitude = use.gradient()
            expected, size = expected + gradient, size + magnitude
        flags = []
        for piece, part in zip(layer.pieces, layer.split(expected), strict=True):
            if piece.param in gradients:
                found = gradients[piece.param]
                gap = part if found is None else at_least_float32(piece.of(found)) - part
                # A use that is missed is off by about the gradient itself, so that a hundredth of it is far from both
                # that and from what rounding leaves: a few eps of the gradient (bfloat16: 8 eps = .06), and, where
                # terms cancel, of the norms norm(s) norm(a) that bound them, in the two products that are compared.
                bound = max(8 * eps, 1e-2) * expected.norm() + 4 * eps * size
                flags.append((gap.norm() > bound, self.names.get(piece.param, layer.name)))
        return flags

    # --------------------------------------------------------------------------------- what follows

    def exclude(self, block: Curvature, why: str) -> None:
        """The gradient of a block is not that of its recorded calls."""
        if self.unsupported == "error":
            raise RuntimeError(
                f'{why}. Put it into a group with approx=None, or pass unsupported="gradient" to train what is not '
                "supported with the plain gradient"
            )
        self.excluded.add(block.name)
        block.pending.forget()

    def gradient_mismatch_message(self, block: Curvature, params: list[str]) -> str:
        uses = [self.unknown_uses[p] for p in block.params if p in self.unknown_uses]
        bare = f"; a bare parameter may be added to, or multiplied with, the batch, and torch.{', '.join(uses)} used it"
        return (
            f"the gradient of {', '.join(params)} is not the one that the recorded calls of the layer explain: the "
            "parameter is used elsewhere too (F.linear(x, layer.weight), a layer of another type that shares it), or "
            f"the layer does more to its output than a layer of its type{bare if uses else ''}"
        )

    def coupled_samples_message(self, block: Curvature) -> str:
        names = ", ".join(self.names.get(p, block.name) for p in block.params)
        return (
            f"the gradient of {names} is not a sum over samples: what one sample of the output (its dimension 0) sends "
            "back arrives at another sample of the layer. Either the layer is called with another dimension first: "
            "put the batch first. Or the samples meet on the way: call optimizer.observe(output.unsqueeze(0), "
            "target.unsqueeze(0)) to take them as one"
        )
