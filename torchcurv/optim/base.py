"""What every optimizer here shares: the blocks of a model, their record, and when they are refreshed.

Parameter groups are those of torch.optim. The curvature options of a group decide which block a layer becomes;
what lies in the groups is plain numbers, strings, None and tensor learning rates, and the state lies in
`state[param]` as tensors, numbers and nested dicts of them, so that any checkpoint format can hold it.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torchcurv.curv.curvature import OPTION_NAMES, Curvature, Options
from torchcurv.curv.layers import Layer, find_layers
from torchcurv.curv.record import Record
from torchcurv.curv.schedule import interval_at

_INTERVALS = ("update_every", "refactor_every")
_DAMPING_TOLERANCE = 0.1  # relative change of the damping after which an inverse that holds it is computed anew
UNSUPPORTED = ("error", "gradient")


class CurvatureOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: subclasses define `step` and call `_refresh` and `_solve` from it."""

    model: nn.Module | None = None
    _record: Record | None = None

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        step_defaults: dict[str, Any],
        curvature_options: dict[str, Any],
        *,
        loss_fn: nn.Module | str | None,
        reduction: str | None,
        class_dim: int | None,
        output_fn: Callable[[Any], Tensor] | None,
        grad_scaler: Any,
        unsupported: str,
        seed: int,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; pass the nn.Module to train as the first argument")
        if unsupported not in UNSUPPORTED:
            raise ValueError(f"unsupported={unsupported!r}; allowed are {', '.join(map(repr, UNSUPPORTED))}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed={seed!r}; pass an int")
        self.model = model
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self._unsupported = unsupported
        self._settings = {
            "loss_fn": loss_fn,
            "reduction": reduction,
            "class_dim": class_dim,
            "output_fn": output_fn,
            "grad_scaler": grad_scaler,
            "seed": seed,
        }
        self._schedules: dict[tuple[int, str], Callable[[int], int]] = {}
        self._steps = 0
        self._blocks: list[Curvature] = []
        Options(**curvature_options)
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
            if not params:
                raise ValueError("the model has no trainable parameters: nothing to optimize")
        super().__init__(params, {**step_defaults, **curvature_options})
        self._build()

    # ------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; curvature and step options may stand in the group."""
        unknown = set(param_group) - set(self.defaults) - {"params", "param_names", "initial_lr", "max_lr", "min_lr"}
        misspelt = [key for key in unknown if not isinstance(key, str) or key in ("approximation", "curvature", "type")]
        if misspelt:
            raise ValueError(f"parameter group has unknown options {misspelt}; known are {sorted(self.defaults)}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        strangers = [k for k, p in enumerate(group["params"]) if p not in self._names]
        if strangers:
            raise ValueError(
                f"parameters {strangers} of group {len(self.param_groups) - 1} are not parameters of the model"
            )
        self._check_group(group)
        for key in _INTERVALS:
            if callable(group[key]):
                self._schedules[len(self.param_groups) - 1, key] = group[key]
                group[key] = interval_at(key, group[key], self._steps)
        if self._record is not None:
            self._build()

    def _check_group(self, group: dict[str, Any]) -> None:
        Options(**{key: group[key] for key in OPTION_NAMES})

    def _group_of(self) -> dict[Tensor, int]:
        return {p: k for k, group in enumerate(self.param_groups) for p in group["params"]}

    def _build(self) -> None:
        """Layers, blocks and record for the groups as they are now; blocks that did not change are kept."""
        assert self.model is not None
        groups = self._group_of()
        options = {p: Options(**{key: self.param_groups[k][key] for key in OPTION_NAMES}) for p, k in groups.items()}
        covered = {p for p in groups if options[p].approx is not None and p.requires_grad}
        layers = find_layers(self.model, lambda p: p in covered)
        in_layer = {p for layer in layers for p in layer.params}
        missing = [self._names[p] for p in groups if p in covered and p not in in_layer]
        if missing and self._unsupported == "error":
            raise ValueError(
                f"no curvature is known for the parameters {', '.join(missing)}: put them into a group with "
                'approx=None to train them with the plain gradient, or pass unsupported="gradient" to do so for '
                "everything that is not covered, or teach torchcurv the layer with torchcurv.register_view"
            )
        chosen: list[tuple[Layer, Options]] = []
        for layer in layers:
            self._check_agreement(layer, groups, options)
            chosen.append((layer, options[layer.params[0]]))
        old = {(b.options, tuple(b.params)): b for b in self._blocks}
        blocks = [Curvature(*arguments) for arguments in _partition(chosen)]
        self._blocks = [old.get((b.options, tuple(b.params)), b) for b in blocks]
        for fresh, kept in zip(blocks, self._blocks, strict=True):
            kept.layers = fresh.layers
        for block in self._blocks:
            if block.uses_rows and any(self._interval(block, key) != 1 for key in _INTERVALS):
                raise ValueError(
                    f"block {block.name!r} has {block.size} parameters, more than rows_limit="
                    f"{block.options.rows_limit}, and is solved through its rows, which belong to one step: set "
                    "update_every=1 and refactor_every=1 for it, or raise rows_limit"
                )
        self._due: dict[str, list[int]] = {
            b.name: self._due.get(b.name, [0, 0]) if hasattr(self, "_due") else [0, 0] for b in self._blocks
        }
        if self._record is not None:
            self._record.remove()
        self._record = Record(self.model, self._blocks, **self._settings)
        self._record.start_step(self._steps, self._due_now())
        self._finalizer = weakref.finalize(self, self._record.remove)

    def _check_agreement(self, layer: Layer, groups: dict[Tensor, int], options: dict[Tensor, Options]) -> None:
        module = layer.modules[0]
        own = [p for p in (module._parameters.get("weight"), module._parameters.get("bias")) if p in groups]
        own = [p for p in own if p is not None and p.requires_grad]
        for other in own[1:]:
            one = options[own[0]]
            for key in OPTION_NAMES:
                here, there = getattr(one, key), getattr(options[other], key)
                if not (here is there or here == there):
                    raise ValueError(
                        f"the parameters {self._names[own[0]]} and {self._names[other]} belong to one layer but "
                        f"have {key}={here!r} and {key}={there!r}: curvature options of one layer must agree "
                        "between groups (lr, momentum and decay may differ)"
                    )

    # ------------------------------------------------------------------------------------ refresh

    def _block_group(self, block: Curvature) -> dict[str, Any]:
        return self.param_groups[self._group_of()[block.params[0]]]

    def _interval(self, block: Curvature, key: str) -> int:
        index = self._group_of()[block.params[0]]
        schedule = self._schedules.get((index, key))
        if schedule is not None:
            self.param_groups[index][key] = interval_at(key, schedule, self._steps)
        return interval_at(key, self.param_groups[index][key], self._steps)

    def _due_now(self) -> list[str]:
        return [name for name, (update, _) in self._due.items() if self._steps >= update]

    def _damping(self, group: dict[str, Any]) -> float | Tensor:
        """λ of a group; L2 regularisation is part of the curvature, so it adds its coefficient."""
        return group["damping"] + group.get("l2", 0.0)

    def _require_record(self) -> Record:
        if self._record is None:
            raise RuntimeError(
                "this optimizer was copied or unpickled without its model and keeps state only: deepcopy the pair "
                "(model, optimizer), or build a new optimizer on the copied model and load this one's state_dict"
            )
        return self._record

    @torch.no_grad()
    def _refresh(self) -> bool:
        """Merge what was captured and factor what is due. False: there is nothing to step on."""
        record = self._require_record()
        with_gradient = [b for b in self._blocks if any(p.grad is not None for p in b.params)]
        if not any(p.grad is not None for group in self.param_groups for p in group["params"]):
            return False
        due = set(self._due_now())
        self._check_captured(record, [b for b in with_gradient if b.name in due])
        refactored = False
        for block in with_gradient:
            group = self._block_group(block)
            if block.captured:
                block.update(group["ema_decay"])
            if block.measured:
                refactored |= self._refactor_if_due(block, group)
        for block in self._blocks:
            if block.name in due:
                self._due[block.name][0] = self._steps + self._interval(block, "update_every")
        return True

    def _refactor_if_due(self, block: Curvature, group: dict[str, Any]) -> bool:
        damping = self._damping(group)
        due = self._due[block.name]
        if self._steps < due[1] and block.has_factor and not _damping_moved(block, damping):
            return False
        self._report(block)
        block.refactor(damping)
        due[1] = self._steps + self._interval(block, "refactor_every")
        return True

    def _report(self, block: Curvature) -> None:
        """Read what went wrong since the last factorisation: the only host sync, and only when one is due."""
        skipped, failed = block.read_flags()
        if skipped:
            warnings.warn(
                f"block {block.name!r}: {skipped} curvature measurements were not finite and were left out",
                stacklevel=4,
            )
        if failed:
            warnings.warn(
                f"block {block.name!r}: {failed} factorisations failed; the last good factor was kept, and the next "
                "one is computed in float64 with ten times the damping",
                stacklevel=4,
            )

    def _check_captured(self, record: Record, due: list[Curvature]) -> None:
        """A gradient whose curvature was not captured is an error; a step of a fresh optimizer with lr 0 is not."""
        missing = [b.name for b in due if not b.captured]
        if not missing or all(_is_zero(group.get("lr", 1.0)) for group in self.param_groups):
            return
        loss_fn = record.loss_fn
        if len(missing) == len(due):
            trigger = {
                "module": "the loss module given as loss_fn= was not called on the model's output in this step",
                "name": "no backward() reached the model's output through a recorded forward pass",
                "none": "loss_fn=None and optimizer.observe(output, target, loss_fn) was not called in this step",
            }["none" if loss_fn is None else "name" if isinstance(loss_fn, str) else "module"]
            raise RuntimeError(
                f"there are gradients but no curvature was captured: {trigger}. Call the model and the loss between "
                "two steps with gradients enabled, then loss.backward(); the optimizer must have been built before "
                "that forward pass (and before torch.compile's first call)"
            )
        if self._unsupported == "error":
            raise RuntimeError(
                f"layers {', '.join(missing)} have gradients but their curvature was not captured: their forward was "
                "not called by the pass that reached the loss (functional use of a weight?). Put their parameters "
                'into a group with approx=None, or pass unsupported="gradient"'
            )

    def _finish_step(self) -> None:
        """Count the step, put the curvature into the state, and say what the next forward passes feed."""
        record = self._require_record()
        self._steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    self.state[p]["step"] = self._steps
        for block in self._blocks:
            update, refactor = self._due[block.name]
            saved = {**block.state(), "next_update": update, "next_refactor": refactor}
            self.state[block.params[0]]["curvature"] = saved
        record.start_step(self._steps, self._due_now())

    def _solve(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """(C + λ I)^-1 applied to the gradients of the covered parameters, in float32 or better."""
        solved: dict[Tensor, Tensor] = {}
        for block in self._blocks:
            params = block.params
            if not block.has_factor or not any(p in gradients for p in params):
                continue
            given = [gradients[p] if p in gradients else torch.zeros_like(p) for p in params]
            damping = None if block.bakes_damping() else self._damping(self._block_group(block))
            solutions = block.solve(given, damping)
            solved.update((p, x) for p, x in zip(params, solutions, strict=True) if p in gradients)
        return solved

    # -------------------------------------------------------------------------------------- public

    def observe(
        self,
        output: Tensor,
        target: Tensor,
        loss_fn: nn.Module | str | None = None,
        weight: float | Tensor = 1.0,
    ) -> None:
        """Say which loss was applied to `output`, before backward(); for losses torchcurv cannot see.

        output: the model's output, or a tensor computed from it, [batch, ...]; target: as the loss takes it.
        loss_fn: a loss module, or the name of one; default the optimizer's own.
        weight: the factor this loss has in what backward() is called on.
        That output is then dealt with: no other trigger counts it again.
        """
        self._require_record().observe(output, target, loss_fn, weight)

    def remove(self) -> None:
        """Take every hook off the model and the loss; the optimizer keeps its state."""
        if self._record is not None:
            self._record.remove()

    def metrics(self) -> dict[str, float]:
        """Plain numbers of the last step (one device sync)."""
        skipped = sum(block.read_flags(reset=False)[0] for block in self._blocks)
        failed = sum(block.read_flags(reset=False)[1] for block in self._blocks)
        return {"step": self._steps, "skipped_measurements": skipped, "failed_factorisations": failed}

    def summary(self) -> str:
        """A table of what every parameter got: layer, curvature, approximation, block sizes, memory in bytes."""
        rows = [("parameter", "shape", "block", "curv_type", "approx", "block sizes", "memory")]
        owner = {p: block for block in self._blocks for p in block.params}
        for group in self.param_groups:
            for p in group["params"]:
                shape, block = "x".join(map(str, p.shape)) or "scalar", owner.get(p)
                if block is None:
                    why = "frozen" if not p.requires_grad else "plain gradient"
                    rows.append((self._names.get(p, "?"), shape, "-", "-", why, "-", "-"))
                    continue
                memory = f"{block.memory():,}" if p is block.params[0] else '"'
                options = block.options
                kind = options.curv_type if options.samples is None else f"{options.curv_type}({options.samples})"
                kind = options.curv_type if options.curv_type == "empirical_fisher" else kind
                names = (self._names[p], shape, block.name, kind, str(options.approx), block.sizes(), memory)
                rows.append(names)
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)

    # ------------------------------------------------------------------------- saving and copying

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, but statistics keep their own dtype. Callables (schedules) stay those given here."""
        seen: dict[str, Any] = {}
        handle = self.register_load_state_dict_pre_hook(lambda _, given: seen.update(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        saved_ids = [key for group in seen["param_groups"] for key in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(saved_ids, own, strict=True):
            if key in seen["state"]:
                self.state[p] = _to_device(seen["state"][key], p.device)
        if self._record is not None:
            self._restore()

    def _restore(self) -> None:
        """Blocks and counters from `state`."""
        self._steps = max((state["step"] for state in self.state.values() if "step" in state), default=0)
        self._build()
        for block in self._blocks:
            saved = self.state[block.params[0]].get("curvature") if block.params[0] in self.state else None
            if saved is not None:
                block.load_state(saved)
                self._due[block.name] = [saved["next_update"], saved["next_refactor"]]
            if saved is None or (block.uses_rows and not block.measured):
                self._due[block.name] = [0, 0]
        self._require_record().start_step(self._steps, self._due_now())

    def __deepcopy__(self, memo: dict[int, Any]) -> CurvatureOptimizer:
        """With its model, a working pair; alone, the state only."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(super().__getstate__(), memo))
        model = memo.get(id(self.model)) if self.model is not None else None
        if model is None:
            return new
        new.model = model
        new._names = {p: name for name, p in model.named_parameters()}
        new._unsupported, new._schedules, new._steps = self._unsupported, dict(self._schedules), self._steps
        loss_fn = self._settings["loss_fn"]
        new._settings = {**self._settings, "loss_fn": memo.get(id(loss_fn), loss_fn)}
        new._blocks = []
        new._restore()
        return new


# ---------------------------------------------------------------------------------------------- helpers


def _partition(chosen: list[tuple[Layer, Options]]) -> Iterable[tuple[str, list[Layer], Options]]:
    """(name, layers, options) of each block: a layer is a block; "full" joins the layers with equal options."""
    joined: dict[Options, list[Layer]] = {}
    for layer, options in chosen:
        if options.approx == "full":
            joined.setdefault(options, []).append(layer)
        else:
            yield layer.name, [layer], options
    for count, (options, layers) in enumerate(joined.items()):
        yield "full" if count == 0 else f"full:{layers[0].name}", layers, options


def _damping_moved(block: Curvature, damping: float | Tensor) -> bool:
    """Whether an inverse that holds its damping was made for another one. A tensor damping is never read."""
    held = block.factor_damping
    if not block.bakes_damping() or held is None or isinstance(damping, Tensor):
        return False
    return abs(damping - held) > _DAMPING_TOLERANCE * abs(held)


def _is_zero(value: Any) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _to_device(value: Any, device: torch.device) -> Any:
    """A deep copy with the tensors on the device, in their own dtype."""
    if isinstance(value, Tensor):
        return value.detach().clone().to(device)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    return copy.deepcopy(value)
