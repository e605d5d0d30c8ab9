"""From gradients at the layers of a pass to what blocks measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.capture.calls import Call
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.losses.terms import Terms
from torchcurv.curv.numerics import at_least_float32
from torchcurv.curv.statistics.block import Stats
from torchcurv.curv.statistics.inputs import Inputs, repeated
from torchcurv.curv.statistics.layer import LayerData

Gradients = Callable[[Call], list[Tensor | None]]  # those at the output of a call, one per signal; None: it has none


class StatisticsAssembler:
    """Where the signals of one pass arrive, with the layers' inputs, which all blocks and signals share.

    layers, members: all layers, and by the name of a block the numbers of its own. rows: by the id of a call, the rows
    of each sample [n, k], -1 for those that it lacks; calls that are not there have an equal run for each.
    common: numbers of layers whose rows belong to no sample in particular (positions of a table that all samples read;
    samples that meet), so that all rows are positions of each. True: signals are sent sample by sample, and arrive
    [n, ...]; False: they are the sum over samples, and count as those of one, as signals of random signs may.
    It refers to no node of the graph, so that the layers' nodes may refer to it.
    """

    def __init__(
        self,
        layers: list[Layer],
        members: Mapping[str, list[int]],
        terms: Terms,
        calls: list[Call],
        rows: Mapping[int, Tensor],
        common: Mapping[int, bool],
    ) -> None:
        self.layers, self._members, self.terms, self.n = layers, members, terms, terms.f.shape[0]
        self._rows, self.common = rows, common
        self.calls: dict[int, list[Call]] = {}
        for call in calls:
            if not call.superseded:
                self.calls.setdefault(call.layer, []).append(call)
        self._inputs: dict[tuple[Any, ...], Inputs] = {}

    def layers_of(self, block: Curvature) -> list[int]:
        """The numbers of the layers of a block."""
        return self._members[block.name]

    def calls_of(self, blocks: Iterable[Curvature]) -> list[Call]:
        return [call for block in blocks for k in self.layers_of(block) for call in self.calls.get(k, [])]

    def inputs(self, used: list[Call], stride: int = 1) -> Inputs:
        """A layer's inputs over the calls of one site, or sites alike, that this loss reaches, of every stride-th
        sample."""
        key = stride, *(id(call) for call in used)
        if used[0].layer in self.common:
            if key not in self._inputs:
                self._inputs[key] = self._inputs_in_common(used)
            return self._inputs[key]
        if stride > 1 and used[0].site.view.batch_dependent:
            return self.inputs(used).of(slice(None, None, stride))
        if key not in self._inputs:
            for call in used:
                self.check(call)
            if used[0].site.view.batch_dependent and any(id(call) in self._rows for call in used):
                self._inputs[key] = self._regrouped(used)
                return self._inputs[key]
            layer, weights = self.layers[used[0].layer], self.terms.position_weights
            present = self._present(used, stride)
            weights = weights if weights is None else weights[::stride]
            calls = [(call.site.module, tuple(self._strided(x, call, stride) for x in call.x)) for call in used]
            self._inputs[key] = Inputs(layer, used[0].site, calls, self._num_strided(stride), weights, present)
        return self._inputs[key]

    def _inputs_in_common(self, used: list[Call]) -> Inputs:
        """All rows as positions of one sample, or of each."""
        layer, site = self.layers[used[0].layer], used[0].site
        for call in used:
            self._check_edited(call)
        whole = Inputs(layer, site, [(site.module, call.x) for call in used], 1, None)
        return repeated(whole, self.n) if self.common[used[0].layer] else whole

    def _regrouped(self, used: list[Call]) -> Inputs:
        """Inputs that are known only of the whole batch, and then taken for the samples."""
        layer, site, parts = self.layers[used[0].layer], used[0].site, []
        for call in used:
            whole = Inputs(layer, site, [(site.module, call.x)], call.batch, None).a
            parts.append(self._by_sample(call, whole))
        a = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return Inputs.made(layer, site, a, self.terms.position_weights, self._present(used, 1))

    def _by_sample(self, call: Call, x: Tensor) -> Tensor:
        """[n, r, ...] from what a call has for its rows [batch, p, ...]; zeros for rows that are missing."""
        rows = self._rows.get(id(call))
        if rows is not None:
            x = torch.where((rows >= 0).flatten().reshape(-1, *(1,) * (x.dim() - 1)), x[rows.clamp_min(0).flatten()], 0)
        return x.reshape(self.n, -1, *x.shape[2:])

    def _present(self, used: list[Call], stride: int) -> Tensor | None:
        """[n, r]: whether a sample has the position, where some lack rows that others have."""
        if all(id(call) not in self._rows or bool((self._rows[id(call)] >= 0).all()) for call in used):
            return None
        parts = []
        for call in used:
            rows, each = self._rows[id(call)][::stride], call.positions(self.layers[call.layer]) // call.batch
            parts.append((rows >= 0).repeat_interleave(each, 1))
        return torch.cat(parts, 1)

    def _num_strided(self, stride: int) -> int:
        """How many samples every stride-th is."""
        return len(range(0, self.n, stride))

    def _strided(self, x: Any, call: Call, stride: int) -> Any:
        """An argument of a call, for every stride-th sample of those that have a part in it."""
        if not isinstance(x, Tensor) or not x.dim() or len(x) != call.batch:
            return x
        rows = self._rows.get(id(call))
        if rows is not None:
            return x[rows[::stride].clamp_min(0).flatten()]
        if stride == 1:
            return x
        return x[::stride] if call.batch == self.n else x.unflatten(0, (self.n, -1))[::stride].flatten(0, 1)

    def _sample_stride(self, block: Curvature, reached: Callable[[Call], bool]) -> int:
        """Every how many-th sample makes the statistics of a block, given which calls the loss reaches."""
        limit = block.options.max_positions
        if limit is None or not block.approx.subsampled or not self.common.keys().isdisjoint(self.layers_of(block)):
            return 1
        calls = (call for k in self.layers_of(block) for call in self.calls.get(k, []))
        positions = sum(call.positions(self.layers[call.layer]) for call in calls if reached(call))
        return max(1, min(self.n, -(-positions // limit)))

    def fits(self, call: Call) -> bool:
        """Whether the rows of a call are those of the samples."""
        return call.layer in self.common or id(call) in self._rows or call.batch % self.n == 0

    def check(self, call: Call) -> None:
        name, n = self.layers[call.layer].name, self.n
        if not self.fits(call):
            raise ValueError(
                f"layer {name!r} was called with a tensor of shape {tuple(call.x[0].shape)}, whose dimension 0 is no "
                f"multiple of the batch size {n} (dimension 0 of the model's output): put the batch first, say "
                "with optimizer.observe(output, target, samples=) which sample each row of the output belongs to, or "
                "give this layer's parameters a group with approx=None"
            )
        self._check_edited(call)

    def _check_edited(self, call: Call) -> None:
        name = self.layers[call.layer].name
        if call.edited:
            raise RuntimeError(
                f"the input of layer {name!r} was edited in place after the layer had read it: apply that operation "
                "out of place, or give this layer's parameters a group with approx=None"
            )

    def signal(self, used: list[Call], grads: list[Tensor]) -> Tensor:
        """s [n, r, g, o] from the gradients at the outputs of the calls; of each sample, where they are taken so."""
        parts, each = [], self.common.get(used[0].layer)
        for call, grad in zip(used, grads, strict=True):
            own = [at_least_float32(call.signal(one)) for one in (grad if each else (grad,))]
            if each is None:
                parts.append(self._by_sample(call, own[0]))
            else:
                parts.append(torch.stack([one.flatten(0, 1) for one in own]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _positions(self, call: Call) -> int:
        """Those of a sample."""
        rows, all_of_them = self._rows.get(id(call)), call.positions(self.layers[call.layer])
        if call.layer in self.common:
            return all_of_them
        return all_of_them // self.n if rows is None else rows.shape[1] * all_of_them // call.batch

    def _alike(self, layer: int, reached: Callable[[Call], bool]) -> Iterable[list[Call]]:
        """The calls of a layer that the loss reaches, those together that see its weight alike."""
        alike: dict[tuple[Any, ...], list[Call]] = {}
        for call in self.calls.get(layer, []):
            if reached(call):
                alike.setdefault(call.site.reading, []).append(call)
        return alike.values()

    def uses(self, layer: int, gradients_at: Gradients, stride: int = 1) -> list[LayerData]:
        """The pairs (a, s) of a layer, of every stride-th sample: one for the calls that see its weight alike."""
        uses = []
        for used in self._alike(layer, lambda call: gradients_at(call)[0] is not None):
            inputs = self.inputs(used, stride)
            if not inputs.weight_covered and not inputs.bias_covered:
                continue
            rows = zip(*(gradients_at(call) for call in used), strict=True)
            each = [self.signal(used, list(grads))[::stride] for grads in rows]
            uses.append(LayerData(inputs, each[0].unsqueeze(0) if len(each) == 1 else torch.stack(each)))
        return uses

    def deliver(
        self,
        blocks: Iterable[Curvature],
        calls: list[Call],
        chunk: list[list[Tensor | None]],
        scale: Tensor | float,
        signal_fraction: float,
    ) -> None:
        """chunk: per signal, the gradients at the calls; signal_fraction: of all the signals, those that are here."""
        arrived = {id(call): [grads[k] for grads in chunk] for k, call in enumerate(calls)}

        def gradients_at(call: Call) -> list[Tensor | None]:
            return arrived.get(id(call), [None])

        for block in blocks:
            stride = self._sample_stride(block, lambda call: gradients_at(call)[0] is not None)
            uses = [self.uses(k, gradients_at, stride) for k in self.layers_of(block)]
            if any(uses):
                own_scale = scale if stride == 1 else scale * (self.n / self._num_strided(stride))
                block.measure(Stats(uses, own_scale, signal_fraction, block.layers))

    def deliver_inputs(self, block: Curvature, reached: set[int]) -> None:
        """What came into the calls whose ids are `reached`: pairs (a, s) of no signals."""
        (k,) = self.layers_of(block)
        layer, uses = self.layers[k], []
        for used in self._alike(k, lambda call: id(call) in reached):
            inputs = self.inputs(used)
            g, o, _ = layer.site_shape(used[0].site)
            positions = sum(self._positions(call) for call in used)
            uses.append(LayerData(inputs, layer.params[0].new_empty(0, inputs.n, positions, g, o)))
        if uses:
            block.measure(Stats([uses], 1.0, 1.0, block.layers))

    def deliver_propagated(self, block: Curvature, at_calls: dict[int, Tensor]) -> None:
        """at_calls: by call, the diagonal of the Hessian at its output, or the mean of its matrices over samples."""
        (k,) = self.layers_of(block)
        reached = [call for call in self.calls.get(k, []) if id(call) in at_calls]
        if not reached:
            return
        self._check_propagated(reached, block)
        if block.approx.propagated == "diag":
            uses = self.uses(k, lambda call: [at_calls.get(id(call))])
            for use in uses:
                block.pending.add(block.approx.of_diagonal(use))
            return

        def matrix(sharing: str) -> Tensor:
            return torch.stack([_output_side(call, at_calls[id(call)], sharing) for call in reached]).sum(0)

        block.pending.add(block.approx.of_mean_matrix(self.inputs(reached), matrix, self.n))

    def _check_propagated(self, calls: list[Call], block: Curvature) -> None:
        name = self.layers[calls[0].layer].name
        if any(call.batch_first is not None or call.batch != self.n or id(call) in self._rows for call in calls):
            raise NotImplementedError(
                f"the Hessian of layer {name!r} cannot be propagated: it is used inside a module, or with more rows "
                'than there are samples. Give its parameters curv_type="ggn", or approx=None'
            )
        if block.approx.propagated == "matrix" and any(call.site.transposed or call.site.view.tokens for call in calls):
            raise NotImplementedError(
                f'approx="kfac" of the Hessian is not known for layer {name!r}, an embedding: choose "diag"'
            )


def _output_side(call: Call, matrix: Tensor, sharing: str) -> Tensor:
    """[g, o, o]: the blocks of equal positions of a matrix over the elements of a sample, added up; "reduce": all."""
    index = torch.arange(len(matrix), device=matrix.device).reshape(1, *call.shape[1:])
    index = call.site.view.signal(call.site.module, index)[0]  # r g o
    if sharing == "reduce":
        rows = index.permute(1, 0, 2)
        return torch.stack([matrix[at[:, None, :, None], at[None, :, None, :]].sum((0, 1)) for at in rows])
    return matrix[index.unsqueeze(-1), index.unsqueeze(-2)].sum(0)
