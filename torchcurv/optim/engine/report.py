"""What an optimizer tells: a table of what every parameter got, numbers of the last step, warnings of failures."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.block.health import read_flags
from torchcurv.curv.block.reading import memory_of, sizes_of
from torchcurv.curv.kinds.base import GRADIENT_SHARES
from torchcurv.curv.kinds.table import kind_of
from torchcurv.optim.engine.damping import Group
from torchcurv.optim.update import norm_of


def warn_of_failures(blocks: list[Curvature]) -> None:
    """Read what went wrong since the last factorisation: the only host read, and only when one is due."""
    healths = [block.health for block in blocks]
    for block, health, counts in zip(blocks, healths, read_flags(healths), strict=True):
        skipped, failed = (now - before for now, before in zip(counts, health.reported, strict=True))
        health.reported, health.retry = counts, failed > 0
        if skipped:
            warn(f"block {block.name!r}: {skipped} curvature measurements were not finite and were left out")
        if failed:
            warn(
                f"block {block.name!r}: {failed} factorisations failed; the last good factor was kept, and the next "
                "one is computed in float64 with ten times the damping"
            )


def warn(message: str) -> None:
    warnings.warn(message, stacklevel=10)  # the line that calls step(), through torch's own wrappers of it


def warn_of_plain(plain: Iterable[str], without: Iterable[Tensor], params: Iterable[Tensor]) -> None:
    """Some blocks and parameters have no curvature after all."""
    found = sorted(plain)
    names = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
    own, total = (sum(p.numel() for p in of) for of in (without, params))
    warn(
        f'{own:,} of {total:,} parameters train with the plain gradient (unsupported="gradient"), since their '
        f"curvature is not known: {names}. optimizer.summary() lists them, each with its reason"
    )


def without_curvature(
    blocks: Sequence[Curvature], names: dict[Tensor, str], plain: Mapping[str, str]
) -> dict[Tensor, str]:
    """Why a parameter trains with the plain gradient, where that was not chosen; plain: why, for the names of blocks
    and parameters."""
    why = {p: plain[name] for p, name in names.items() if name in plain}
    return why | {p: plain[block.name] for block in blocks if block.name in plain for p in block.params}


def metrics_of(
    step: int, blocks: Sequence[Curvature], groups: Sequence[Group], last: dict[str, Tensor]
) -> dict[str, float]:
    """Counts, and 0-d tensors as plain numbers: one host read for all of them."""
    counts = {
        "step": step,
        "measurements": sum(block.health.measurements for block in blocks),
        "factorisations": sum(block.health.factorisations for block in blocks),
    }
    flags = [block.health.flags for block in blocks if block.health.flags is not None]
    params = [p for group in groups for p in group["params"]]
    device = params[0].device
    bad = torch.stack([flag.to(device) for flag in flags]).sum(0) if flags else torch.zeros(2, device=device)
    tensors = {"skipped_measurements": bad[0], "failed_factorisations": bad[1], "parameter_norm": norm_of(params)}
    gradients = [p.grad for p in params if p.grad is not None]
    if gradients:
        tensors["gradient_norm"] = norm_of(gradients)
    damping = groups[0]["damping"]  # a function, if it was put there since the last step
    tensors["damping"] = torch.as_tensor(damping(step) if callable(damping) else damping, dtype=torch.float64)
    tensors |= last
    values = torch.stack([value.to(device, torch.float64) for value in tensors.values()]).tolist()
    return {**counts, **dict(zip(tensors, values, strict=True))}


def summary_of(
    blocks: Sequence[Curvature], params: Iterable[Tensor], names: dict[Tensor, str], plain: Mapping[Tensor, str]
) -> str:
    """A table of what every parameter got: layer, curvature, approximation, block sizes, memory in bytes.

    plain: why a parameter trains with the plain gradient, where that was not chosen.
    """
    rows = [("parameter", "shape", "block", "curv_type", "approx", "block sizes", "memory")]
    owners: dict[Tensor, list[Curvature]] = {}
    for block in blocks:
        for p in block.params if block.kind != GRADIENT_SHARES else ():
            if p not in plain:
                owners.setdefault(p, []).append(block)
    for p in params:
        name, shape = names.get(p, "?"), "x".join(map(str, p.shape)) or "scalar"
        if p not in owners:
            why = f"plain gradient: {plain.get(p, 'approx=None')}" if p.requires_grad else "frozen"
            rows.append((name, shape, "-", "-", why, "-", "-"))
        rows += [(name, shape, *_cells(block, p)) for block in owners.get(p, ())]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _cells(block: Curvature, p: Tensor) -> tuple[str, str, str, str, str]:
    options, memory = block.options, f"{memory_of(block):,}" if p is block.params[0] else '"'
    drawn = kind_of(block.kind, options).drawn
    kind = options.curv_type if drawn is None else f"{options.curv_type}({drawn})"
    return block.name, kind, str(options.approx), sizes_of(block), memory
