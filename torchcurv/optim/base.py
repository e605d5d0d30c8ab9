"""What every optimizer here shares: the blocks of a model, their record, and when they are refreshed.

Parameter groups are those of torch.optim. The curvature options of a group decide which block a layer becomes;
what lies in the groups is plain numbers, strings, None and tensor learning rates, and the state lies in
`state[param]` as tensors, numbers and nested dicts of them, so that any checkpoint format can hold it.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchcurv.curv.block.block import Curvature, partition, read_flags
from torchcurv.curv.block.refresh import Pace
from torchcurv.curv.capture.recorder import Record
from torchcurv.curv.checks import ADAPTIVE, AUTO, check_interval, interval_at, value_at
from torchcurv.curv.kinds.base import GRADIENT, INPUT
from torchcurv.curv.layers.find import find_layers
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.options import OPTION_NAMES, Options
from torchcurv.optim.update import inner, norm_of, scale_within

_INTERVALS = ("update_every", "refactor_every")
INTERVAL = 10  # what "auto" stands for
OF_THE_BATCH = ("full", "block")  # which are made of the rows of one batch where these are few
_VALUES = ("damping", "ema_decay")  # which may be functions of the step, too
_READ_LATER = (*_INTERVALS, "damping", "damping_scale", "ema_decay", "refresh_tol", "refresh_cap", "refresh_warmup")
_DAMPING_TOLERANCE = 0.1  # relative change of the damping after which an inverse that holds it is computed anew
UNSUPPORTED = ("error", "gradient")
# What the schedulers of torch write into groups; keys of the user's own are welcome too.
_SCHEDULER_KEYS = ("initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum")
# Options of the optimizer as a whole.
WHOLE_OPTIONS = ("loss_fn", "reduction", "class_dim", "output_fn", "grad_scaler", "unsupported", "seed")


class CurvatureOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: subclasses define `_update`, which may call `_solve`.

    The structure of a block (STRUCTURE in curvature.py) is read when the optimizer is built, when a group is added
    and when a state is loaded; every other option of a group may be changed between steps.
    """

    model: nn.Module | None = None
    _record: Record | None = None
    _blocks: Sequence[Curvature] = ()
    _factors: ClassVar[bool] = True  # whether steps solve with factors, or only multiply with what was measured
    _finalizer: Any = None
    _kl_clip: float | None = None  # κ, of the optimizers that clip
    _last: dict[str, Tensor]  # what is known of the last step, 0-d
    _copied: ClassVar[tuple[str, ...]] = ("_unsupported", "_schedules", "_early", "_steps", "defaults")

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
        if isinstance(class_dim, bool) or not isinstance(class_dim, int | None):
            raise TypeError(f"class_dim={class_dim!r}; pass an int, or None")
        if grad_scaler is not None and not callable(getattr(grad_scaler, "get_scale", None)):
            raise TypeError(f"grad_scaler={grad_scaler!r}; pass a torch.amp.GradScaler, or anything with get_scale()")
        self.model = model
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self._unsupported, self._last = unsupported, {}
        self._settings = {
            "loss_fn": loss_fn,
            "reduction": reduction,
            "class_dim": class_dim,
            "output_fn": output_fn,
            "grad_scaler": grad_scaler,
            "seed": seed,
        }
        self._schedules: dict[tuple[int, str], Callable[[int], Any]] = {}
        self._early: set[tuple[int, str]] = set()  # (group, interval) that are 1 in the beginning
        self._steps = 0
        self._check_group(self._at_step({**step_defaults, **curvature_options}))
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
            if not params:
                raise ValueError("the model has no trainable parameters: nothing to optimize")
        super().__init__(params, {**step_defaults, **curvature_options})
        self._build()

    # ------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; curvature and step options may stand in the group."""
        if self.model is None:
            self._require_record()
        _check_keys(param_group, self.defaults)
        super().add_param_group(param_group)
        try:
            self._take_group(len(self.param_groups) - 1)
            if self._record is not None:
                self._build()
        except Exception:
            self.param_groups.pop()
            groups = len(self.param_groups)
            self._schedules = {key: value for key, value in self._schedules.items() if key[0] < groups}
            self._early = {key for key in self._early if key[0] < groups}
            raise

    def _take_group(self, index: int) -> None:
        """Check the group; callables (schedules) are kept beside it, so that it can be saved."""
        group = self.param_groups[index]
        strangers = [k for k, p in enumerate(group["params"]) if p not in self._names]
        if strangers:
            raise ValueError(
                f"the parameters at {strangers} of group {index} are not parameters of the model: pass parameters "
                "of the module given as the first argument"
            )
        schedules = {key: group[key] for key in (*_INTERVALS, *_VALUES)}
        early = {(index, key) for key in _INTERVALS if group[key] == AUTO}
        group.update(self._at_step(group))
        self._check_group(group)
        self._early = {pair for pair in self._early if pair[0] != index} | early
        for key, value in schedules.items():
            self._schedules.pop((index, key), None)
            if callable(value):
                self._schedules[index, key] = value

    def _at_step(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a group with what "auto" stands for, and what functions of the step say now."""
        every = 1 if options["curv_type"] == INPUT or options["approx"] in OF_THE_BATCH else INTERVAL
        found = {**options, **{key: every for key in _INTERVALS if options[key] == AUTO}}
        for key in (*_INTERVALS, *_VALUES):
            if callable(options[key]):
                found[key] = (interval_at if key in _INTERVALS else value_at)(key, options[key], self._steps)
        return found

    def _check_group(self, group: dict[str, Any]) -> None:
        options = Options(**{key: group[key] for key in OPTION_NAMES})
        if options.approx is not None and not self._is_damped(group):
            raise ValueError(
                "damping=0; pass a number > 0: curvature is singular as soon as a layer has more parameters than "
                "there are samples"
            )
        if options.approx is not None and options.curv_type == "hessian" and options.method == "price":
            self._check_price(group)
        if options.approx is not None and options.curv_type == "hessian" and options.indefinite == "keep":
            raise ValueError(
                'indefinite="keep" leaves negative eigenvalues to be looked at (torchcurv.curvature); a step needs '
                '"abs", "clip" or "shift"'
            )

    def _is_damped(self, group: dict[str, Any]) -> bool:
        """Whether something > 0 is added to the curvature of a group."""
        return not _is_zero(group["damping"]) or (bool(group.get("l2")) and group["curv_type"] != INPUT)

    def _check_price(self, group: dict[str, Any]) -> None:
        raise ValueError(
            'hessian_method="price" is an estimate over draws of a posterior, and needs VIOptimizer; others take '
            '"propagate", "exact" or "hutchinson"'
        )

    def _params(self) -> Iterable[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _trainable(self) -> list[bool]:
        return [p.requires_grad for p in self._params()]

    def _build(self) -> None:
        """Layers, blocks and record for the groups as they are now; blocks that did not change are kept."""
        assert self.model is not None
        groups = {p: k for k, group in enumerate(self.param_groups) for p in group["params"]}
        options = {p: Options(**{key: self.param_groups[k][key] for key in OPTION_NAMES}) for p, k in groups.items()}
        covered = {p for p in groups if options[p].approx is not None and p.requires_grad}
        layers = find_layers(self.model, lambda p: p in covered, lambda p: p in covered and options[p].approx == "diag")
        in_layer = {p for layer in layers for p in layer.params}
        missing = [self._names[p] for p in groups if p in covered and p not in in_layer]
        if missing and self._unsupported == "error":
            raise ValueError(
                f"no curvature is known for the parameters {', '.join(missing)}: put them into a group with "
                'approx=None to train them with the plain gradient, or with approx="diag" to have their gradients '
                'taken sample by sample, or pass unsupported="gradient" to train everything that is not covered with '
                "the plain gradient, or teach torchcurv the layer with torchcurv.register_view"
            )
        chosen: list[tuple[Layer, Options, int]] = []
        for layer in layers:
            self._check_agreement(layer, groups, options)
            chosen.append((layer, options[layer.params[0]], groups[layer.params[0]]))
        blocks = self._make_blocks(chosen)
        group_of = {id(block): groups[block.params[0]] for block in blocks}
        for block in blocks:
            self._check_block(block, group_of[id(block)])
        self._install(blocks, group_of)

    def _make_blocks(self, chosen: list[tuple[Layer, Options, int]]) -> list[Curvature]:
        return [Curvature(*arguments) for arguments in partition(chosen)]

    def _install(self, blocks: list[Curvature], group_of: dict[int, int]) -> None:
        assert self.model is not None
        old = {block.key: block for block in self._blocks}
        self._blocks, self._group_index = [], []
        for fresh in blocks:
            kept = old.get(fresh.key, fresh)
            kept.name, kept.layers, kept.options = fresh.name, fresh.layers, fresh.options
            self._blocks.append(kept)
            self._group_index.append(group_of[id(fresh)])
        self._built_for, self._outdated = self._trainable(), False
        kept_states = {(block.params[0], block.state_key) for block in self._blocks}
        for p, state in self.state.items():
            for key in [key for key in state if key.startswith("curvature") and (p, key) not in kept_states]:
                del state[key]
        self._unsaved = [b for b in self._blocks if b.state_key not in self.state.get(b.params[0], {})]
        if self._finalizer is not None:
            self._finalizer()
        self._record = Record(self.model, self._blocks, **self._settings, unsupported=self._unsupported)
        self._record.start_step(self._steps, self._due())
        self._finalizer = weakref.finalize(self, self._record.remove)

    def _check_block(self, block: Curvature, index: int) -> None:
        scheduled = [key for key in _INTERVALS if (index, key) in self._schedules]
        if block.uses_rows and (scheduled or any(self.param_groups[index][key] != 1 for key in _INTERVALS)):
            raise ValueError(
                f"block {block.name!r} has {block.size} parameters, more than rows_limit="
                f"{block.options.rows_limit}, and is solved through its rows, which belong to one step: set "
                "update_every=1 and refactor_every=1 for it, or raise rows_limit"
            )

    def _check_shared(self, blocks: list[tuple[Curvature, int]]) -> None:
        """A block over several groups has one damping and one schedule."""
        several = [(block, index) for block, index in blocks if len(block.layers) > 1]
        groups = {p: group for group in self.param_groups for p in group["params"]} if several else {}
        for block, index in several:
            own = self.param_groups[index]
            for other in {id(groups[p]): groups[p] for p in block.params}.values():
                for key in _READ_LATER:
                    here, there = own.get(key), other.get(key)
                    if not (here is there or here == there):
                        raise ValueError(
                            f"block {block.name!r} lies over groups with {key}={here!r} and {key}={there!r}: "
                            'give them equal ones, or build the optimizer with partition="group"'
                        )

    def _check_agreement(self, layer: Layer, groups: dict[Tensor, int], options: dict[Tensor, Options]) -> None:
        own = [p for p in layer.owned if p in groups and p.requires_grad]
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

    def _adaptive(self, index: int, key: str) -> bool:
        return self.param_groups[index][key] == ADAPTIVE

    def _interval(self, index: int, key: str) -> int:
        schedule = self._schedules.get((index, key))
        if schedule is not None:
            self.param_groups[index][key] = interval_at(key, schedule, self._steps)
        interval = check_interval(key, self.param_groups[index][key])
        assert isinstance(interval, int)
        return 1 if self._steps < INTERVAL and (index, key) in self._early else interval

    def _due(self) -> list[str]:
        for block, index in zip(self._blocks, self._group_index, strict=True):
            block.want(self._step_of(index))
        return [block.name for block in self._blocks if self._steps >= block.next_update]

    def _damping(self, group: dict[str, Any]) -> float | Tensor:
        """λ of a group; L2 regularisation is part of the loss's curvature, so it adds its coefficient."""
        return group["damping"] if group["curv_type"] == INPUT else group["damping"] + group.get("l2", 0.0)

    def _shift(self, block: Curvature, group: dict[str, Any]) -> float | Tensor:
        """What is added to the eigenvalues of a block."""
        return self._damping(group)

    def _memory(self, block: Curvature, group: dict[str, Any]) -> float:
        """ρ of the running average of a block."""
        return group["ema_decay"]

    def _require_record(self) -> Record:
        if self._record is None:
            raise RuntimeError(
                "this optimizer was copied or unpickled without its model and keeps state only: deepcopy the pair "
                "(model, optimizer), or build a new optimizer on the copied model and load this one's state_dict"
            )
        return self._record

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients in `.grad`; `closure` recomputes the loss and is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._last = {"loss": loss.detach()} if isinstance(loss, Tensor) and not loss.dim() else {}
        if self._refresh():
            self._update()
            self._finish_step()
        return loss

    def _update(self) -> None:
        """Move the parameters."""
        raise NotImplementedError

    def _refresh(self) -> bool:
        """Merge what was captured and factor what is due. False: there is nothing to step on."""
        record = self._require_record()
        if all(p.grad is None for p in self._params()):
            return False
        self._outdated = self._built_for != self._trainable()
        if self._outdated:
            self._check_unfrozen()
        self._apply_schedules()
        reached = [
            (block, index)
            for block, index in zip(self._blocks, self._group_index, strict=True)
            if any(p.grad is not None for p in block.params)
        ]
        missing = [b for b, _ in reached if self._steps >= b.next_update and not b.captured]
        if missing and not self._check_captured(record, missing):
            return False
        for block, index in reached:
            if block.captured:
                self._update_average(block, index)
                self._unsaved.append(block)
        self._check_shared(reached)
        moved = [(block, index) for block, index in reached if block.changes]
        self._decide(moved)
        read = [block for block, index in moved if self._factors and self._adaptive(index, "refactor_every")]
        self._report(read)
        stale = [(block, index) for block, index in reached if self._factors and self._is_stale(block, index)]
        self._report([block for block, _ in stale if block not in read])
        for block, index in stale:
            self._refactor(block, self.param_groups[index])
            if not self._adaptive(index, "refactor_every"):
                block.next_refactor = self._steps + self._interval(index, "refactor_every")
            self._unsaved.append(block)
        return True

    def _refactor(self, block: Curvature, group: dict[str, Any]) -> None:
        block.refactor(self._shift(block, group), said=self._damping(group))

    def _apply_schedules(self) -> None:
        """What functions of the step say of damping and memory now."""
        for (index, key), schedule in self._schedules.items():
            if key in _VALUES:
                self.param_groups[index][key] = value_at(key, schedule, self._steps)
                self._check_group(self.param_groups[index])

    def _step_of(self, index: int) -> int | None:
        """The step, for blocks that are measured at intervals of their own choice."""
        return self._steps if self._adaptive(index, "update_every") else None

    def _update_average(self, block: Curvature, index: int) -> None:
        decay, follow = self._memory(block, self.param_groups[index]), not self._is_due(block, index)
        adaptive = self._adaptive(index, "update_every")
        watched = adaptive or self._adaptive(index, "refactor_every")
        block.update(decay, follow, self._steps, watched)
        if not adaptive:
            block.next_update = self._steps + self._interval(index, "update_every")
            if any(pace.next for pace in block.paces.values()):  # it was adaptive before
                block.paces = {part: Pace() for part in block.paces}

    def _decide(self, blocks: list[tuple[Curvature, int]]) -> None:
        """Let blocks of adaptive intervals see how far they moved: a host sync where one was measured."""
        moves = [(block, part, change) for block, _ in blocks for part, change in block.changes.items()]
        if not moves:
            return
        device = moves[0][2].device
        read = torch.stack([change.to(device, torch.float64) for _, _, change in moves]).tolist()
        for block, index in blocks:
            own = {part: value for (other, part, _), value in zip(moves, read, strict=True) if other is block}
            block.decide(self._step_of(index), own)

    def _is_due(self, block: Curvature, index: int) -> bool:
        """Whether a factorisation is due whatever was measured."""
        scheduled = not self._adaptive(index, "refactor_every") and self._steps >= block.next_refactor
        return scheduled or not block.has_factor or _damping_moved(block, self._damping(self.param_groups[index]))

    def _is_stale(self, block: Curvature, index: int) -> bool:
        moved = self._adaptive(index, "refactor_every") and (block.moved or block.retry)
        return block.measured and (moved or self._is_due(block, index))

    def _report(self, blocks: list[Curvature]) -> None:
        """Read what went wrong since the last factorisation: the only host sync, and only when one is due."""
        for block, counts in zip(blocks, read_flags(blocks), strict=True):
            skipped, failed = (now - before for now, before in zip(counts, block.reported, strict=True))
            block.reported, block.retry = counts, failed > 0
            if skipped:
                warnings.warn(
                    f"block {block.name!r}: {skipped} curvature measurements were not finite and were left out",
                    stacklevel=4,
                )
            if failed:
                warnings.warn(
                    f"block {block.name!r}: {failed} factorisations failed; the last good factor was kept, and the "
                    "next one is computed in float64 with ten times the damping",
                    stacklevel=4,
                )

    def _check_unfrozen(self) -> None:
        """A parameter that is trained since the blocks were built has a gradient but no curvature."""
        now, before = self._trainable(), self._built_for
        changed = [p for p, new, old in zip(self._params(), now, before, strict=True) if new and not old]
        options = {p: group["approx"] for group in self.param_groups for p in group["params"]}
        names = [self._names[p] for p in changed if p.grad is not None and options[p] is not None]
        if names and self._unsupported == "error":
            raise RuntimeError(
                f"the parameters {', '.join(names)} were frozen when the curvature blocks were built and have "
                "gradients now: call optimizer.zero_grad() after requires_grad_(True) and before the forward pass"
            )

    def _check_captured(self, record: Record, missing: list[Curvature]) -> bool:
        """A gradient whose curvature was not captured is an error, or trains as it is if the user said so.

        False: all gradients are zero, as in the step that a checkpoint library takes to make the state exist.
        """
        if self._unsupported == "gradient" and any(block.next_update for block in self._blocks):
            return True
        names = [b.name for b in missing if any(p.grad.any() for p in b.params if p.grad is not None)]
        nothing = not any(block.captured for block in self._blocks)
        if not names:
            if nothing:
                self._save()
            return not nothing
        unknown = record.forward.unknown_uses
        used = [f"{self._names[p]} in torch.{unknown[p]}" for b in missing for p in b.params if p in unknown]
        if used and self._unsupported == "error":
            raise RuntimeError(
                f"nothing is known of the curvature of {', '.join(used)}: a parameter of a module's own may be added "
                "to, or multiplied with, something of the batch. Put it into a group with approx=None, or with "
                'approx="diag" to have its gradients taken sample by sample, or pass unsupported="gradient", or teach '
                "torchcurv the module with torchcurv.register_view"
            )
        if nothing and not used:
            trigger = self._silent_trigger(record.loss_fn)
            raise RuntimeError(
                f"there are gradients but no curvature was captured: {trigger}. Call the model and the loss between "
                "two steps with gradients enabled, then loss.backward(); the optimizer must have been built before "
                "that forward pass (and before torch.compile's first call)"
            )
        if self._unsupported == "error":
            raise RuntimeError(
                f"layers {', '.join(names)} have gradients but their curvature was not captured: their forward was "
                "not called by the pass that reached the loss (functional use of a weight?). Put their parameters "
                'into a group with approx=None, or pass unsupported="gradient"'
            )
        return True

    def _silent_trigger(self, loss_fn: nn.Module | str | None) -> str:
        if not self._finalizer.alive:
            return "optimizer.remove() has taken its hooks away"
        if loss_fn is None:
            return "loss_fn=None and optimizer.observe(output, target, loss_fn) was not called in this step"
        if isinstance(loss_fn, str):
            return "no backward() reached the model's output through a recorded forward pass"
        return "the loss module given as loss_fn= was not called on the model's output in this step"

    def _finish_step(self) -> None:
        """Count the step, put the curvature into the state, and say what the next forward passes feed."""
        self._steps += 1
        self._save()
        if self._outdated:
            self._build()
        else:
            self._require_record().start_step(self._steps, self._due())

    def _save(self) -> None:
        """What must survive this step into `state`, where every trainable parameter has its keys."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    self._save_param(self.state[p], p, group)
        for block in dict.fromkeys(self._unsaved):
            block.release_rows()
            self.state[block.params[0]][block.state_key] = block.state()
        self._unsaved = []

    def _save_param(self, state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
        state["step"] = self._steps

    def _solve(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """(C + λ I)^-1 applied to the gradients of the covered parameters, in float32 or better."""
        solved: dict[Tensor, Tensor] = {}
        for block, index in zip(self._blocks, self._group_index, strict=True):
            if not block.has_factor or not any(p in gradients for p in block.params):
                continue
            given = [
                piece.of(gradients[p] if (p := piece.param) in gradients else torch.zeros_like(p))
                for piece in block.pieces
            ]
            damping = None if block.bakes_damping() else self._shift(block, self.param_groups[index])
            for piece, x in zip(block.pieces, block.direction(given, damping), strict=True):
                p = piece.param
                if p in gradients and piece.rows is None:
                    solved[p] = x
                elif p in gradients:
                    piece.of(solved.setdefault(p, gradients[p].to(x.dtype, copy=True))).copy_(x)
        return solved

    def _buffer(self, state: dict[str, Any], p: Tensor) -> Tensor:
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        return state["momentum_buffer"]

    def _plain(self) -> None:
        """Parameters without a curvature follow the gradient."""
        covered = {p for block in self._blocks for p in block.params}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p not in covered:
                    p.add_(p.grad, alpha=-group["lr"])

    def _clip(self, gradients: dict[Tensor, Tensor], solved: dict[Tensor, Tensor]) -> Tensor | None:
        """ν of the KL clip, one number for all preconditioned steps; None: there is none."""
        if self._kl_clip is None or not solved:
            return None
        products = []
        for group in self.param_groups:
            clipped = [] if group["curv_type"] == INPUT else group["params"]
            own = [inner(solved[p], gradients[p]) for p in clipped if p in solved]
            if own:
                products.append(torch.stack(own).sum() * group["lr"] ** 2)
        if not products:
            return None
        size = torch.stack(products).sum()
        self._last |= {"size": size, "clip": scale_within(size, self._kl_clip)}
        return self._last["clip"]

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim; what was captured for these gradients goes with them."""
        super().zero_grad(set_to_none)
        for block in self._blocks:
            block.forget_pending()
        if self._record is not None and self._built_for != self._trainable():
            self._build()

    def remove(self) -> None:
        """Take every hook off the model and the loss; the optimizer keeps its state."""
        if self._finalizer is not None:
            self._finalizer()

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """What is known of the last step, as plain numbers, for one device sync.

        step: steps taken. measurements, factorisations: of all blocks, so far; skipped_measurements: those that were
        not finite and left out; failed_factorisations. parameter_norm, and gradient_norm of what lies in `.grad`.
        loss: what the closure returned, if `step` was given one. kl: ½ lr² <V, g> of the step after the KL clip, and
        clip: the factor ν of that. damping: that of the first group.
        """
        self._require_record()
        blocks = list(self._blocks)
        counts = {
            "step": self._steps,
            "measurements": sum(block.measurements for block in blocks),
            "factorisations": sum(block.factorisations for block in blocks),
        }
        flags = [block.flags for block in blocks if block.flags is not None]
        device = next(iter(self._params())).device
        bad = torch.stack([flag.to(device) for flag in flags]).sum(0) if flags else torch.zeros(2, device=device)
        tensors = {"skipped_measurements": bad[0], "failed_factorisations": bad[1], **self._known()}
        values = torch.stack([value.to(device, torch.float64) for value in tensors.values()]).tolist()
        return {**counts, **dict(zip(tensors, values, strict=True))}

    def _known(self) -> dict[str, Tensor]:
        """What `metrics` reports, as 0-d tensors."""
        params = list(self._params())
        known = {"parameter_norm": norm_of(params)}
        gradients = [p.grad for p in params if p.grad is not None]
        if gradients:
            known["gradient_norm"] = norm_of(gradients)
        known["damping"] = torch.as_tensor(self.param_groups[0]["damping"], dtype=torch.float64)
        last = dict(self._last)
        if "size" in last:
            last["kl"] = 0.5 * last.pop("size").abs() * last["clip"].square()
        return {**known, **last}

    def summary(self) -> str:
        """A table of what every parameter got: layer, curvature, approximation, block sizes, memory in bytes."""
        self._require_record()
        rows = [("parameter", "shape", "block", "curv_type", "approx", "block sizes", "memory")]
        owners: dict[Tensor, list[Curvature]] = {}
        for block in self._blocks:
            for p in block.params if block.kind != GRADIENT else ():
                owners.setdefault(p, []).append(block)
        for group in self.param_groups:
            for p in group["params"]:
                shape = "x".join(map(str, p.shape)) or "scalar"
                if p not in owners:
                    why = "frozen" if not p.requires_grad else "plain gradient"
                    rows.append((self._names.get(p, "?"), shape, "-", "-", why, "-", "-"))
                    continue
                for block in owners[p]:
                    memory = f"{block.memory():,}" if p is block.params[0] else '"'
                    options = block.options
                    kind = options.curv_type if options.samples is None else f"{options.curv_type}({options.samples})"
                    kind = options.curv_type if options.curv_type in ("empirical_fisher", INPUT) else kind
                    name, sizes = self._names[p], block.sizes()
                    rows.append((name, shape, block.name, kind, str(options.approx), sizes, memory))
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)

    # ------------------------------------------------------------------------- saving and copying

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, but statistics keep their precision. Callables (schedules) stay those given here."""
        seen: dict[str, Any] = {}

        def take(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            seen.update(given)
            return {**given, "state": {}}  # torch would cast the statistics to the parameters' dtype

        def restore(_: Any) -> None:
            saved_ids = [key for group in seen["param_groups"] for key in group["params"]]
            for key, p in zip(saved_ids, self._params(), strict=True):
                if key in seen["state"]:
                    self.state[p] = _adopted(seen["state"][key], p)
            if self._record is not None:
                self._restore()

        handles = [
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _restore(self) -> None:
        """Blocks and counters from `state`."""
        self._last, early = {}, self._early  # the groups say what "auto" has become
        self._steps = max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)
        for index, group in enumerate(self.param_groups):
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            schedules = {key: self._schedules.get((index, key)) for key in (*_INTERVALS, *_VALUES)}
            group.update({key: schedule for key, schedule in schedules.items() if schedule is not None})
            self._take_group(index)
        self._early = early
        self._build()
        for block in self._blocks:
            block.load_state(self.state.get(block.params[0], {}).get(block.state_key, {}))
        self._require_record().start_step(self._steps, self._due())

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {**state, "defaults": {key: x for key, x in state["defaults"].items() if not callable(x)}}

    def __deepcopy__(self, memo: dict[int, Any]) -> CurvatureOptimizer:
        """With its model, which must come first in what is copied, a working pair; alone, the state only."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        model = memo.get(id(self.model)) if self.model is not None else None
        if model is None:
            return new
        for key in self._copied:
            setattr(new, key, copy.copy(getattr(self, key)))
        new.model = model
        new._names = {p: name for name, p in model.named_parameters()}
        loss_fn = self._settings["loss_fn"]
        new._settings = {**self._settings, "loss_fn": memo.get(id(loss_fn), loss_fn)}
        new._restore()
        return new


# ---------------------------------------------------------------------------------------------- helpers


def _damping_moved(block: Curvature, damping: float | Tensor) -> bool:
    """Whether an inverse that holds its damping was made for another one. A tensor damping is never read."""
    if not block.bakes_damping() or isinstance(damping, Tensor):
        return False
    return moved(damping, block.factor_damping)


def moved(damping: float, held: float) -> bool:
    """Whether a damping is another than the one that an inverse holds."""
    return abs(damping - held) > _DAMPING_TOLERANCE * abs(held)


def _is_zero(value: Any) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _check_keys(group: dict[str, Any], known: dict[str, Any]) -> None:
    """Raise on keys that look like a misspelt option; torch and users may put keys of their own into groups."""
    for key in set(group) - set(known) - {"params", "param_names", *_SCHEDULER_KEYS}:
        if key in (*WHOLE_OPTIONS, "kl_clip"):
            raise ValueError(f"{key} in a parameter group: it belongs to the optimizer as a whole, not to a group")
        for name in known:
            if name.startswith(key[:4]) or SequenceMatcher(None, key, name).ratio() > 0.75:
                raise ValueError(
                    f"parameter group has the unknown option {key!r}, did you mean {name!r}? The options of a group "
                    f"are {', '.join(sorted(known))}; a key of your own needs a name less like them"
                )


def _adopted(value: Any, p: Tensor) -> Any:
    """A deep copy of loaded state for p: on its device, floats in float32 or better."""
    if isinstance(value, Tensor):
        dtype = torch.promote_types(p.dtype, torch.float32) if value.is_floating_point() else value.dtype
        return value.detach().to(p.device, dtype, copy=True)
    if isinstance(value, dict):
        return {key: _adopted(item, p) for key, item in value.items()}
    return copy.deepcopy(value)
