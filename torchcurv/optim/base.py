"""What every optimizer here shares: parameter groups, an engine of curvature, and the life of a step.

Parameter groups are those of torch.optim. The curvature options of a group decide which block a layer becomes;
what lies in the groups is plain numbers, strings, None and tensor learning rates, and the state lies in
`state[param]` as tensors, numbers and nested dicts of them, so that any checkpoint format can hold it.
"""

from __future__ import annotations

import copy
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.checks import ADAPTIVE, AUTO, check_interval, interval_at, value_at
from torchcurv.curv.kinds.base import INPUT
from torchcurv.curv.options import OPTION_NAMES, Options
from torchcurv.optim.companion import Companion, hint_of
from torchcurv.optim.engine.building import BlockRule, Blueprint
from torchcurv.optim.engine.checkpoint import exact_state
from torchcurv.optim.engine.damping import DampingPolicy, StepDamping, is_zero
from torchcurv.optim.engine.engine import CurvatureEngine
from torchcurv.optim.engine.report import metrics_of, summary_of

_INTERVALS = ("update_every", "refactor_every")
INTERVAL = 10  # what "auto" stands for
OF_THE_BATCH = ("full", "block")  # which are made of the rows of one batch where these are few
_VALUES = ("damping", "ema_decay")  # which may be functions of the step, too
UNSUPPORTED = ("error", "gradient")
# What the schedulers of torch write into groups; keys of the user's own are welcome too.
_SCHEDULER_KEYS = ("initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum")
# Options of the optimizer as a whole.
WHOLE_OPTIONS = ("loss_fn", "reduction", "class_dim", "output_fn", "grad_scaler", "unsupported", "seed")

C = TypeVar("C", bound=Companion)


class CurvatureOptimizer(torch.optim.Optimizer, ABC):
    """Base of the optimizers: subclasses define `update_parameters`, which moves the parameters.

    The structure of a block is read when the optimizer is built, when a group is added and when a state is loaded;
    every other option of a group may be changed between steps.
    """

    model: nn.Module | None = None
    _engine: CurvatureEngine | None = None
    _companions: Mapping[type[Companion], Companion] = MappingProxyType({})
    _last: dict[str, Tensor]  # what is known of the last step, 0-d
    _copied: ClassVar[tuple[str, ...]] = ("_schedules", "_early", "defaults")
    settings: Mapping[str, Any] = MappingProxyType({})  # options of the whole optimizer that are its own

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
        damping: DampingPolicy | None = None,
        arrange: Callable[[list[Curvature]], list[Curvature]] = list,
        rules: tuple[BlockRule, ...] = (),
        companions: Sequence[type[Companion]] = (),
        **engine_options: Any,
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
        self._last = {}
        self._companions: dict[type[Companion], Companion] = {}
        self._schedules: dict[tuple[int, str], Callable[[int], Any]] = {}
        self._early: set[tuple[int, str]] = set()  # (group, interval) that are 1 in the beginning
        recording = {
            "loss_fn": loss_fn,
            "reduction": reduction,
            "class_dim": class_dim,
            "output_fn": output_fn,
            "grad_scaler": grad_scaler,
            "seed": seed,
        }
        blueprint = Blueprint(model, unsupported, arrange, rules)
        self._make_engine(blueprint, recording, damping or StepDamping(), engine_options)
        self._companions |= {companion: companion(self) for companion in companions}
        self._check_group(self._at_step({**step_defaults, **curvature_options}))
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
            if not params:
                raise ValueError("the model has no trainable parameters: nothing to optimize")
        super().__init__(params, {**step_defaults, **curvature_options})
        self._build()

    def _make_engine(
        self, blueprint: Blueprint, recording: dict[str, Any], damping: DampingPolicy, options: dict[str, Any]
    ) -> None:
        schedule, hint = _Schedule(weakref.proxy(self)), partial(hint_of, self._companions)
        engine = CurvatureEngine(blueprint, recording, schedule, damping, hint=hint, **options)
        self._engine, self._engine_options = engine, options
        self._finalizer = weakref.finalize(self, engine.remove)

    # ------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; curvature and step options may stand in the group."""
        engine = self.engine
        _check_keys(param_group, self.defaults)
        super().add_param_group(param_group)
        try:
            self._take_group(len(self.param_groups) - 1)
            if engine.pairs or engine.hooked:
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
                found[key] = (interval_at if key in _INTERVALS else value_at)(key, options[key], self.engine.step)
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
        return not is_zero(group["damping"]) or (bool(group.get("l2")) and group["curv_type"] != INPUT)

    def _check_price(self, group: dict[str, Any]) -> None:
        raise ValueError(
            'hessian_method="price" is an estimate over draws of a posterior, and needs VIOptimizer; others take '
            '"propagate", "exact" or "hutchinson"'
        )

    def _params(self) -> Iterable[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _build(self) -> None:
        """Layers, blocks and recorder for the groups as they are now."""
        self.engine.build(self.param_groups, self.state)

    @property
    def engine(self) -> CurvatureEngine:
        """The blocks of the curvature, and when they are refreshed."""
        if self._engine is None:
            raise RuntimeError(
                "this optimizer was copied or unpickled without its model and keeps state only: deepcopy the pair "
                "(model, optimizer), or build a new optimizer on the copied model and load this one's state_dict"
            )
        return self._engine

    def _apply_schedules(self) -> None:
        """What functions of the step say of damping and memory now."""
        step = self.engine.step
        for (index, key), schedule in self._schedules.items():
            if key in _VALUES:
                self.param_groups[index][key] = value_at(key, schedule, step)
                self._check_group(self.param_groups[index])

    # --------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients in `.grad`; what it returns is what the closure does.

        closure: recomputes the loss, and is called first. What else it does, the docstring of the class says.
        """
        engine = self.engine
        loss = self.run_closure(closure)
        self._last = {"loss": loss.detach()} if isinstance(loss, Tensor) and not loss.dim() else {}
        if engine.refresh():
            self.update_parameters()
            self._finish_step()
        elif engine.only_zeros:
            self._save()
        return loss

    def run_closure(self, closure: Callable[[], Any] | None) -> Any:
        """Run the closure, if there is one, so that gradients lie in `.grad`."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    @abstractmethod
    def update_parameters(self) -> None:
        """Move the parameters, by `engine.precondition`, or the blocks, and the gradients in `.grad`."""

    def _finish_step(self) -> None:
        """Count the step, put what must survive into the state, and say what the next forward passes feed."""
        engine = self.engine
        for companion in self._companions.values():
            companion.gradients_gone()
        engine.step += 1
        self._save()
        if engine.outdated:
            self._build()
        else:
            engine.begin_step()
        for companion in self._companions.values():
            companion.step_ended()

    def companion(self, kind: type[C]) -> C:
        """The companion of this type; an optimizer that was copied without its model has none, and says so."""
        assert self.engine is not None
        found: Any = self._companions[kind]
        return found

    def note(self, **known: Tensor) -> None:
        """What `metrics` is to say of this step, as 0-d tensors."""
        self._last |= known

    def _save(self) -> None:
        """What must survive this step into `state`, where every trainable parameter has its keys."""
        engine = self.engine
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    self.state[p]["step"] = engine.step
                    for companion in self._companions.values():
                        companion.save(self.state[p], p, group)
        engine.save(self.state)

    # -------------------------------------------------------------------------------------- public

    @property
    def blocks(self) -> Mapping[str, Curvature]:
        """The blocks of the curvature by name: those of layers have the names of the modules."""
        return {block.name: block for block in self.engine.blocks}

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
        recorder = self.engine.recorder
        assert recorder is not None
        recorder.observe(output, target, loss_fn, weight)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim; what was captured for these gradients goes with them."""
        super().zero_grad(set_to_none)
        if self._engine is None:
            return
        self._engine.forget()
        for companion in self._companions.values():
            companion.gradients_gone()
        if self._engine.outdated:
            self._build()

    def remove(self) -> None:
        """Take every hook off the model and the loss; the optimizer keeps its state."""
        if self._engine is not None:
            self._engine.remove()
        for companion in self._companions.values():
            companion.removed()

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """What is known of the last step, as plain numbers, for one device sync.

        step: steps taken. measurements, factorisations: of all blocks, so far; skipped_measurements: those that were
        not finite and left out; failed_factorisations. parameter_norm, and gradient_norm of what lies in `.grad`.
        damping: that of the first group. loss: what the closure returned, if `step` was given one. kl: ½ lr² <V, g> of
        the step after the KL clip, and clip: the factor ν of that. What else there is, the docstring of the class says.
        """
        engine = self.engine
        last = dict(self._last)
        for companion in self._companions.values():
            last |= companion.known()
        if "size" in last:
            last["kl"] = 0.5 * last.pop("size").abs() * last["clip"].square()
        return metrics_of(engine.step, engine.blocks, self.param_groups, last)

    def summary(self) -> str:
        """A table of what every parameter got: layer, curvature, approximation, block sizes, memory in bytes."""
        engine = self.engine
        return summary_of(engine.blocks, engine.params(), engine.blueprint.names)

    # ------------------------------------------------------------------------- saving and copying

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, but statistics keep their precision. Callables (schedules) stay those given here."""
        with exact_state(self, self._restore if self._engine is not None else lambda: None):
            super().load_state_dict(state_dict)

    def _restore(self) -> None:
        """Blocks and counters from `state`."""
        engine = self.engine
        self._last, early = {}, self._early  # the groups say what "auto" has become
        engine.step = max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)
        for index, group in enumerate(self.param_groups):
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            schedules = {key: self._schedules.get((index, key)) for key in (*_INTERVALS, *_VALUES)}
            group.update({key: schedule for key, schedule in schedules.items() if schedule is not None})
            self._take_group(index)
        self._early = early
        self._build()
        engine.load(self.state)
        for companion in self._companions.values():
            companion.loaded(self.state)

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
        new.settings = dict(self.settings)
        new.model, old = model, self.engine
        new._names = {p: name for name, p in model.named_parameters()}
        loss_fn = old.recording["loss_fn"]
        recording = {**old.recording, "loss_fn": memo.get(id(loss_fn), loss_fn)}
        new._companions = {}
        new._make_engine(replace(old.blueprint, model=model), recording, old.damping, self._engine_options)
        new._companions |= {companion: companion(new) for companion in self._companions}
        new._restore()
        return new


class _Schedule:
    """Intervals and options of groups that are functions of the step, as the engine asks for them."""

    def __init__(self, optimizer: CurvatureOptimizer) -> None:
        self.optimizer = optimizer

    def interval(self, index: int, key: str, step: int) -> int:
        group, schedule = self.optimizer.param_groups[index], self.optimizer._schedules.get((index, key))
        if schedule is not None:
            group[key] = interval_at(key, schedule, step)
        interval = check_interval(key, group[key])
        assert isinstance(interval, int)
        return 1 if step < INTERVAL and (index, key) in self.optimizer._early else interval

    def adaptive(self, index: int, key: str) -> bool:
        return self.optimizer.param_groups[index][key] == ADAPTIVE

    def constant(self, index: int, key: str) -> int | None:
        return None if (index, key) in self.optimizer._schedules else self.optimizer.param_groups[index][key]

    def apply(self, step: int) -> None:
        self.optimizer._apply_schedules()


# ---------------------------------------------------------------------------------------------- helpers


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
