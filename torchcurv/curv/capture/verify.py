"""The check of a pass: the recorded calls of a block's layers explain its gradient, sample by sample.

The statistics of a layer are made of pairs (a, s) at its calls. That they belong to the parameters' gradient, and to
the samples they are said to, is taken from no one: a pass compares them, for signals of random samples, wherever
something is new that this may depend on: the functions between the layers and the loss and how they move rows, shapes,
the calls, the kind of loss.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace

import torch
from torch import Tensor

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.capture.assemble import StatisticsAssembler
from torchcurv.curv.capture.probe import Findings, Path, Probe, Source
from torchcurv.curv.capture.rows import Mark, Rows, alone, candidates, found
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.numerics import at_least_float32, random_signs
from torchcurv.curv.statistics.layer import LayerData

SIZES = 16  # other sizes of a structure that are all checked; then every second, fourth, eighth time as many
KEPT = 4096  # structures that are remembered


class GradientCheck:
    """What was checked, and what becomes of blocks whose gradient the calls do not explain.

    names: of the model's parameters. unknown_uses: functions that used a bare parameter in a way that is not known.
    unsupported: "error" raises; "gradient" stops feeding the block.
    """

    def __init__(self, names: dict[Tensor, str], unknown_uses: dict[Tensor, str], unsupported: str) -> None:
        self.names, self.unknown_uses, self.unsupported = names, unknown_uses, unsupported
        self.excluded: set[str] = set()  # blocks that failed, under unsupported="gradient"
        self.left: dict[str, list[Tensor]] = {}  # blocks with parameters that have no pairs (a, s) of their type
        self.common: set[str] = set()  # blocks that have rows of no sample in particular
        self.name_fits = False  # whether a gradient was found to be that of the loss known by its name
        self.hard_labels: bool | None = None  # whether the last that told was of labels times a factor
        self._verified: set[Hashable] = set()
        self._explained: set[Hashable] = set()  # of common blocks: (block, functions, calls) that were compared
        self._rows: dict[Hashable, Rows] = {}  # by the path, where they are not equal runs
        self._one_row: set[Hashable] = set()  # (block, number of a call) where each sample had a row of its own
        self._sizes: dict[Hashable, int] = {}  # by the functions of a path: how many sizes it has held for, or -1
        self._labels: dict[Hashable, Tensor] = {}  # by the functions: the samples that were found last

    def settle(self, blocks: list[Curvature], source: Source) -> Rows | None:
        """Which rows belong to which sample (None: equal runs), so that the gradient of every parameter is
        sum_r s a^T over the recorded calls, and what one sample sends arrives at no other.

        Finds weights that are used outside their layers, layers that do more than their type, and batches that are not
        dimension 0; raises, or excludes a block. Where the rows of a block belong to no sample in particular, it is
        `common`: positions that all samples read, samples that meet.
        """
        rows = None
        while own := [block for block in blocks if block.name not in self.common]:
            before = len(self.common)
            rows = self._settled(own, source)
            if len(self.common) == before:
                break
        self._check_common([block for block in blocks if block.name in self.common], source)
        said = source.labels()[2]
        return alone(said) if rows is None and said is not None else rows

    def _settled(self, blocks: list[Curvature], source: Source) -> Rows | None:
        path = source.path(blocks)
        rows = None if path.values is None else self._rows.get(path.values)
        doubtful = [block for block in blocks if self._doubtful(block, path)]
        if rows is not None and (doubtful or not self._still_idle(rows, blocks, source)):
            rows, doubtful = None, blocks
        if not doubtful:
            return rows
        return self._settle(doubtful, blocks, path, source)

    def _settle(self, doubtful: list[Curvature], blocks: list[Curvature], path: Path, source: Source) -> Rows | None:
        runs, _, said = source.labels()
        functions = [path.functions[block.name] for block in doubtful]
        light = not path.chosen and all(self._sizes.get(key, -1) >= 0 for key in functions)
        if light and path.values is not None and not any(map(self._used_unknown, doubtful)):
            if path.waits and all(path.of_samples[block.name] in self._verified for block in doubtful):
                return None  # more or fewer samples, each as before: that is not worth waiting for
            passed_over = [self._passed_over(key) for key in functions]
            if all(passed_over):
                return None
        first: dict[str, Findings] | None = None
        searched = all(self._sizes.get(key) == -1 for key in functions)  # before, and will be again
        if runs is not None and said is None and path.values not in self._rows and not searched:
            first = Probe(self.compared, doubtful, source, None, runs).run(light)
            if first is not None and not any(found.coupled and not found.unexplained for found in first.values()):
                return self._conclude(doubtful, path, first, None, source)
        for rows, mixed in self._found(blocks, path, source):
            own = [block for block in blocks if mixed.isdisjoint(path.marks[block.name])]
            second = Probe(self.compared, own, source, rows, rows.labels).run(searched) if own else None
            if second is not None and not any(found.coupled for found in second.values()):
                self.common |= {block.name for block in blocks} - {block.name for block in own}
                return self._conclude(own, path, second, rows, source)
        if first is None:
            assembler = source.arranged(None)
            unfit = {b.name for b in blocks if not all(map(assembler.fits, assembler.calls_of([b])))}
            self.common |= unfit or {block.name for block in blocks}
            return None
        return self._conclude(doubtful, path, first, None, source)

    def _check_common(self, blocks: list[Curvature], source: Source) -> None:
        """Compare the gradients of blocks that the samples have in common."""
        if not blocks:
            return
        path = source.path(blocks)
        # Which rows meet in which, as by a product of two outputs, is nothing that their sum over all rows depends on.
        keys = {block.name: (block.name, path.functions[block.name], path.marks[block.name]) for block in blocks}
        doubtful = [b for b in blocks if keys[b.name] not in self._explained or self._used_unknown(b)]
        if not doubtful:
            return
        layers = {k: False for block in doubtful for k in source.arranged(None).layers_of(block)}
        one = torch.zeros(source.labels()[1], dtype=torch.long)
        findings = Probe(self.compared, doubtful, source, None, one, layers).run(True)
        assert findings is not None
        self._conclude(doubtful, path, findings, None, source)
        self._explained |= {
            keys[b.name] for b in doubtful if findings[b.name].finite and not findings[b.name].unexplained
        }

    def _doubtful(self, block: Curvature, path: Path) -> bool:
        """Whether the gradient of a block has to be compared."""
        new = path.values is None or (block.name, path.values, path.marks[block.name]) not in self._verified
        return new or self._used_unknown(block)

    def _used_unknown(self, block: Curvature) -> bool:
        """Whether a parameter has a use that is not known, which may not have mattered before."""
        by_sample = any(site.by_sample for layer in block.layers for site in layer.sites)
        return not by_sample and not self.unknown_uses.keys().isdisjoint(block.params)

    def _passed_over(self, functions: Hashable) -> bool:
        """Whether these functions held for so many sizes that this one need not be checked."""
        seen = self._sizes[functions] = self._sizes[functions] + 1
        return seen > SIZES and seen & (seen - 1) != 0

    def _conclude(
        self, blocks: list[Curvature], path: Path, findings: Mapping[str, Findings], rows: Rows | None, source: Source
    ) -> Rows | None:
        """Refuse the blocks that failed, and remember the others."""
        if max(len(self._verified), len(self._rows), len(self._sizes)) > KEPT * (1 + len(blocks)):
            self._verified, self._rows, self._sizes, self._explained, self._labels = set(), {}, {}, set(), {}
        for block in blocks:
            unexplained, coupled, finite = findings[block.name]
            wrong = [la for la in block.layers if any(self.names.get(p, la.name) in unexplained for p in la.params)]
            layers = source.arranged(None).layers if wrong else []
            called = [layers[mark.layer] for mark in path.marks[block.name]] if wrong else []
            if wrong and all(_has_own_forward(la) or la.sites[0].bare or la not in called for la in wrong):
                self.leave(block, wrong)  # there is more to it than what was seen
            elif unexplained:
                self.exclude(block, self.gradient_mismatch_message(block, unexplained))
            elif coupled:
                self.common.add(block.name)
            elif finite and path.values is not None and (rows is None or rows.lasting):
                self._verified.add((block.name, path.values, path.marks[block.name]))
                self._sizes.setdefault(path.functions[block.name], 0)
                if path.samples > 1:
                    self._verified.add(path.of_samples[block.name])
        if rows is not None:
            self._sizes |= {path.functions[block.name]: -1 for block in blocks}
            self._labels |= {path.functions[block.name]: rows.labels for block in blocks}
            self._one_row |= {
                (block.name, k)
                for block in blocks
                for k, mark in enumerate(path.marks[block.name])
                if rows.n > 1 and mark in rows.calls and rows.calls[mark].shape[1] == 1
            }
            if rows.lasting and path.values is not None:
                self._keep(path.values, rows)
        return rows

    def _keep(self, values: Hashable, rows: Rows) -> None:
        """Remember rows, with those that are known of other blocks' calls for the same samples."""
        known = self._rows.get(values)
        if known is not None and not torch.equal(known.labels, rows.labels):
            self._verified.clear()
        elif known is not None:
            rows = replace(rows, calls=known.calls | rows.calls, idle=known.idle | rows.idle)
        self._rows[values] = rows

    # --------------------------------------------------------------------------------- rows

    def _is_one_sample(self, blocks: list[Curvature], path: Path) -> bool:
        """Whether a call has one row, and had one for each sample when there were more."""
        calls = [(b.name, k, mark.batch) for b in blocks for k, mark in enumerate(path.marks[b.name])]
        return any(batch == 1 and (name, k) in self._one_row for name, k, batch in calls)

    def _found(self, blocks: list[Curvature], path: Path, source: Source) -> Iterator[tuple[Rows, AbstractSet[Mark]]]:
        """Rows that signals show, for the samples that the rows of the output may belong to, and calls in whose rows
        several of them meet: none, if that can be."""
        calls = source.arranged(None).calls_of(blocks)
        draw, generator = source.draws()
        signal = random_signs(draw, generator)
        reached = [call for call, got in zip(calls, source.send(calls, signal, ())[0], strict=True) if got is not None]

        def send(factors: Tensor) -> dict[Mark, Tensor]:
            scaled = (signal.reshape(len(factors), -1) * factors.to(signal).unsqueeze(1)).reshape(signal.shape)
            got = source.send(reached, scaled, ())[0]
            pairs = ((call, grad) for call, grad in zip(reached, got, strict=True) if grad is not None)
            return {source.mark_of(call): at_least_float32(call.signal(grad)).flatten(1) for call, grad in pairs}

        _, m, said = source.labels()
        before = (self._labels.get(path.functions[block.name]) for block in blocks)
        known = [labels for labels in before if labels is not None and len(labels) == m][:1]
        if path.values in self._rows:
            known.insert(0, self._rows[path.values].labels)
        tried: list[tuple[Rows, AbstractSet[Mark]]] = []
        for labels in [*known, *candidates(m, {call.batch for call in reached})] if said is None else [said]:
            tried.append(found(send, labels))
            if not tried[-1][1]:
                yield tried[-1]
        if said is None:
            one = self._is_one_sample(blocks, path)
            last = torch.zeros(m, dtype=torch.long) if one else source.depending(reached)
            if last is not None and (one or int(last.max()) > 0):
                tried.append(found(send, last))
                if not tried[-1][1]:
                    yield tried[-1]
        yield from sorted((rows for rows in tried if rows[1] and rows[0].calls), key=lambda rows: len(rows[1]))[:1]

    def _still_idle(self, rows: Rows, blocks: list[Curvature], source: Source) -> bool:
        """Whether rows that belonged to no sample still get no signal."""
        none = torch.empty(0)
        calls = source.arranged(None).calls_of(blocks)
        calls = [call for call in calls if len(rows.idle.get(source.mark_of(call), none))]
        if not calls:
            return True
        got = source.send(calls, random_signs(*source.draws()), ())[0]
        pairs = [(call, grad) for call, grad in zip(calls, got, strict=True) if grad is not None]
        flags = [call.signal(grad)[rows.idle[source.mark_of(call)].to(grad.device)].any() for call, grad in pairs]
        return not flags or not bool(torch.stack(flags).any())

    # --------------------------------------------------------------------------------- one signal

    def compared(
        self,
        block: Curvature,
        assembler: StatisticsAssembler,
        at_call: dict[int, Tensor | None],
        gradients: dict[Tensor, Tensor | None],
        silent: Tensor,
    ) -> Findings:
        """What one signal shows of a block. silent: samples [n] that sent nothing, so that nothing may arrive there."""
        wrong: list[tuple[Tensor, str]] = []
        mixed: list[Tensor] = []
        finite: list[Tensor] = []
        for k in assembler.layers_of(block):
            grads = [at_call.get(id(call)) for call in assembler.calls.get(k, [])]
            eps = max((torch.finfo(grad.dtype).eps for grad in grads if grad is not None), default=0.0)
            try:
                uses = assembler.uses(k, lambda call: [at_call.get(id(call))])
                wrong += self._unexplained(assembler.layers[k], uses, gradients, eps) if gradients else []
            except (RuntimeError, ValueError, IndexError):
                layer = assembler.layers[k]
                if not _has_own_forward(layer):
                    raise
                return Findings([self.names.get(p, layer.name) for p in layer.params], False, True)
            if k not in assembler.common:
                mixed += [use.s[:, silent].nan_to_num(0, 0, 0).any() for use in uses]  # 0 times inf is no signal
            finite += [torch.isfinite(use.s.sum()) for use in uses]
        unexplained = bool(wrong) and bool(torch.stack([flag for flag, _ in wrong]).any())
        return Findings(
            [name for flag, name in wrong if flag] if unexplained else [],
            bool(mixed) and bool(torch.stack(mixed).any()),
            all(bool(flag) for flag in finite),  # a signal that is not shows nothing: the next pass checks again
        )

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

    def leave(self, block: Curvature, layers: list[Layer]) -> None:
        """These layers have no pairs (a, s) of their type; the engine takes their parameters alone from the next step
        on."""
        self.left.setdefault(block.name, []).extend(p for layer in layers for p in layer.params)
        block.pending.forget()

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


def _has_own_forward(layer: Layer) -> bool:
    """Whether a module of the layer has another forward than its type."""
    return any(site.function for site in layer.sites)
