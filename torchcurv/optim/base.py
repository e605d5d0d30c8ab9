"""What every optimizer here shares: parameter groups, an engine of curvature, and the life of a step.

Parameter groups are those of torch.optim. The curvature options of a group decide which block a layer becomes;
what lies in the groups is plain numbers, strings, None and tensor learning rates, and the state lies in
`state[param]` as tensors, numbers and nested dicts of them, so that any checkpoint format can hold it.
"""

from __future__ import annotations

import copy
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.bundles import flattened
from torchcurv.curv.compiler import never_compiled
from torchcurv.curv.losses.autograd import watched
from torchcurv.curv.options import OPTIMIZER, Option
from torchcurv.optim.engine.building import BlockRule, Blueprint
from torchcurv.optim.engine.checkpoint import exact_state
from torchcurv.optim.engine.companion import Companion, hint_of
from torchcurv.optim.engine.damping import DampingPolicy, StepDamping
from torchcurv.optim.engine.engine import CurvatureEngine
from torchcurv.optim.engine.groups import GroupOptions, GroupRule
from torchcurv.optim.engine.report import metrics_of, summary_of, without_curvature
from torchcurv.optim.rules import damped, indefinite_is_mapped

RECORDING = ("loss_fn", "reduction", "class_dim", "output_fn", "grad_scaler", "loss_factor", "negative", "seed")

C = TypeVar("C", bound=Companion)


class CurvatureOptimizer(torch.optim.Optimizer, ABC):
    """Base of the optimizers: subclasses define `update_parameters`, which moves the parameters.

    The structure of a block is read when the optimizer is built, when a group is added and when a state is loaded;
    every other option of a group may be changed between steps.
    """

    table: ClassVar[Mapping[str, Option]]  # what it takes, with its own defaults
    model: nn.Module | None = None
    _engine: CurvatureEngine | None = None
    _companions: Mapping[type[Companion], Companion] = MappingProxyType({})
    _scaled = False  # whether a GradScaler calls `step` now
    noted: dict[str, Tensor]  # what is known of the last step, 0-d
    settings: Mapping[str, Any] = MappingProxyType({})  # options of the whole optimizer that are its own
    over_ranks: ClassVar[bool] = False  # whether all that a step decides follows from what is reduced over processes

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        options: Mapping[str, Any],
        *,
        rules: Sequence[GroupRule] = (),
        numbers: Mapping[str, str] = MappingProxyType({}),
        damping: DampingPolicy | None = None,
        block_rules: Sequence[BlockRule] = (),
        arrange: Callable[[list[Curvature]], list[Curvature]] = list,
        companions: Sequence[type[Companion]] = (),
        **engine_options: Any,
    ) -> None:
        """options: all of `table`, as `complete` returns them. rules: what the options of a group have to do with one
        another. numbers: options that may be no functions of the step, and why. The others are those of Blueprint and
        CurvatureEngine.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is a {type(model).__name__}; pass the nn.Module to train as the first argument. Wrappers that "
                "build their optimizer of parameters alone (ZeroRedundancyOptimizer) cannot: use this one itself, on a "
                "model in DistributedDataParallel"
            )
        whole = {name: options[name] for name, one in self.table.items() if one.scope == OPTIMIZER}
        for name, value in whole.items():
            self.table[name].check(name, value)
        own = {name: one for name, one in self.table.items() if one.scope != OPTIMIZER}
        defaults = {name: options[name] for name in own}
        self.model, self.noted = model, {}
        every = (damped, indefinite_is_mapped, *rules)
        self._group_options = GroupOptions(own, tuple(whole), self.settings, every, numbers)
        self._companions: dict[type[Companion], Companion] = {}
        recording = {name: whole[name] for name in RECORDING}
        recording["loss_fn"] = watched(recording["loss_fn"])
        blueprint = Blueprint(model, whole["unsupported"], arrange, tuple(block_rules))
        engine_options["process_group"] = whole["process_group"]
        engine_options["placement"] = whole.get("factor_placement", "replicated")
        self._make_engine(blueprint, recording, damping or StepDamping(), engine_options)
        self._companions |= {companion: companion(self) for companion in companions}
        self._group_options.check(self._group_options.at_step(defaults, 0))
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
            if not params:
                raise ValueError("the model has no trainable parameters: nothing to optimize")
        super().__init__(params, defaults)
        self._build()

    def _make_engine(
        self, blueprint: Blueprint, recording: dict[str, Any], damping: DampingPolicy, options: dict[str, Any]
    ) -> None:
        hint = partial(hint_of, self._companions)
        engine = CurvatureEngine(blueprint, recording, self._group_options, damping, hint=hint, **options)
        self._engine, self._engine_options = engine, options
        self._finalizer = weakref.finalize(self, engine.remove)

    # ------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; curvature and step options may stand in the group, and bundles of them."""
        engine, options = self.engine, self._group_options
        flat = flattened(param_group)
        param_group.clear()
        param_group.update(flat)
        options.check_keys(param_group)
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        try:
            self._check_params(index, engine.blueprint.names)
            options.groups = self.param_groups
            options.accept(index, engine.step)
            if engine.recorder is not None:
                self._rebuild()
        except Exception:
            self.param_groups.pop()
            options.drop(index)
            raise

    def _check_params(self, index: int, names: dict[Tensor, str]) -> None:
        foreign = [k for k, p in enumerate(self.param_groups[index]["params"]) if p not in names]
        if foreign:
            raise ValueError(
                f"the parameters at {foreign} of group {index} are not parameters of the model: pass parameters "
                "of the module given as the first argument"
            )

    def _build(self) -> None:
        """Layers, blocks and recorder for the groups as they are now."""
        self.engine.build(self.param_groups, self.state)

    def _rebuild(self) -> None:
        """The same where groups or parameters have changed: what was saved of blocks that are no more is dropped."""
        self._build()
        for block in self.engine.fresh:
            self.state.get(block.params[0], {}).pop(block.layout.state_key, None)
            self.engine.unsaved.append(block)

    @property
    def engine(self) -> CurvatureEngine:
        """The blocks of the curvature, and when they are refreshed."""
        if self._engine is None:
            raise RuntimeError(
                "this optimizer was copied or unpickled without its model and keeps state only: deepcopy the pair "
                "(model, optimizer), or build a new optimizer on the copied model and load this one's state_dict"
            )
        return self._engine

    # --------------------------------------------------------------------------------------- step

    @never_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients in `.grad`; what it returns is what the closure does.

        closure: recomputes the loss, and is called first. What else it does, the docstring of the class says.
        """
        engine = self.engine
        self._check_scaler()
        self._check_ranks()
        loss = self.run_closure(closure)
        self.noted = {"loss": loss.detach()} if isinstance(loss, Tensor) and not loss.dim() else {}
        if engine.refresh():
            self.update_parameters()
            self._finish_step()
        elif engine.only_zeros:
            self._save()
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by a GradScaler alone, just before it calls `step`: so one that was not named is noticed."""
        self._scaled = True
        return False

    def _check_scaler(self) -> None:
        scaled, self._scaled = self._scaled, False
        recording = self.engine.recording
        if scaled and recording["grad_scaler"] is None and recording["loss_fn"] is not None:
            raise RuntimeError(
                "a GradScaler steps this optimizer, and its scale is in the loss whose curvature was measured: pass it "
                "as grad_scaler= when you build the optimizer"
            )

    def _check_ranks(self) -> None:
        if not self.over_ranks and self.engine.ranks.group is not None:
            raise NotImplementedError(
                f"{type(self).__name__} decides in one process what others do not know of, so that their models "
                "would drift apart: use SecondOrderOptimizer on several processes, or pass process_group=None where "
                "each trains a model of its own"
            )

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
            self._rebuild()
        else:
            engine.begin_step()
        for companion in self._companions.values():
            companion.step_ended()

    def companion(self, kind: type[C]) -> C:
        """The companion of this type; an optimizer that was copied without its model has none, and says so."""
        assert self.engine is not None
        found: Any = self._companions[kind]
        return found

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

    @property
    def loss_fn(self) -> Any:
        """The loss as it is watched. A function that was given as loss_fn= is seen only when it is called as this."""
        return self.engine.recording["loss_fn"]

    def observe(
        self,
        output: Tensor,
        target: Tensor,
        loss_fn: nn.Module | str | None = None,
        weight: float | Tensor = 1.0,
        samples: Tensor | str | None = None,
    ) -> None:
        """Say which loss was applied to `output`, before backward(); for losses torchcurv cannot see.

        output: the model's output, or a tensor computed from it, [batch, ...]; target: as the loss takes it.
        loss_fn: a loss module, or the name of one; default the optimizer's own.
        weight: the factor this loss has in what backward() is called on.
        samples: LongTensor, the sample of each row (of dimension 0) of `output`; None: found from the graph. "batch":
            the whole batch is one sample, for losses in which samples meet.
        That output is then dealt with: no other trigger counts it again.
        """
        recorder = self.engine.recorder
        assert recorder is not None
        recorder.observe(output, target, loss_fn, weight, samples)

    @never_compiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim; what was captured for these gradients goes with them."""
        super().zero_grad(set_to_none)
        if self._engine is None:
            return
        self._engine.forget()
        for companion in self._companions.values():
            companion.gradients_gone()
        if self._engine.outdated:
            self._rebuild()

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
        last = dict(self.noted)
        for companion in self._companions.values():
            last |= companion.known()
        if "size" in last:
            last["kl"] = 0.5 * last.pop("size").abs() * last["clip"].square()
        return metrics_of(engine.step, engine.blocks, self.param_groups, last)

    def summary(self) -> str:
        """A table of what every parameter got: layer, curvature, approximation, block sizes, memory in bytes."""
        engine = self.engine
        names = engine.blueprint.names
        return summary_of(engine.blocks, engine.params(), names, without_curvature(engine.blocks, names, engine.plain))

    def coverage(self) -> float:
        """The share of the trainable parameters, by their number of elements, that belong to a block with a curvature:
        neither to a group with approx=None nor to a block that trains with the plain gradient."""
        engine = self.engine
        without = without_curvature(engine.blocks, engine.blueprint.names, engine.plain)
        covered = {p for block in engine.blocks for p in block.params} - without.keys()
        sizes = [(p.numel(), p in covered) for p in engine.params() if p.requires_grad]
        return sum(size for size, own in sizes if own) / max(1, sum(size for size, _ in sizes))

    # ------------------------------------------------------------------------- saving and copying

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, but statistics keep their precision. Callables (schedules) stay those given here."""
        with exact_state(self, self._restore if self._engine is not None else lambda: None):
            super().load_state_dict(state_dict)

    def _restore(self) -> None:
        """Blocks and counters from `state`."""
        engine = self.engine
        self.noted = {}
        engine.step = max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)
        self._group_options.groups = self.param_groups
        self._group_options.accept_loaded(self.defaults, engine.step)
        engine.blueprint.learn(self.state)
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
        new.defaults = dict(self.defaults)
        new.settings = dict(self.settings)
        new.model, old = model, self.engine
        loss_fn = old.recording["loss_fn"]
        recording = {**old.recording, "loss_fn": memo.get(id(loss_fn), loss_fn)}
        if isinstance(loss_fn, nn.Module) and id(loss_fn) not in memo:  # it may be copied later, or not at all
            known = (loss_fn, *old.recording.get("loss_twins", ()))
            recording["loss_twins"] = tuple(copy.deepcopy(module, memo) for module in known)
        new._group_options = self._group_options.copied(new.settings)
        new._companions = {}
        new._make_engine(
            replace(old.blueprint, model=model, alone=set(), products={}), recording, old.damping, self._engine_options
        )
        new._companions |= {companion: companion(new) for companion in self._companions}
        new._restore()
        if old.recorder is not None and new.engine.recorder is not None:  # so that both draw alike in this step
            new.engine.recorder.context.passes = old.recorder.context.passes
        return new
