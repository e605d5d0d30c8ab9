"""The options of parameter groups: checked when they are accepted, and again when they have changed.

What lies in the groups is plain numbers, strings, None and tensor learning rates. Functions of the step are kept here,
beside the groups, which hold what they say at the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from torchcurv.curv.checks import ADAPTIVE, AUTO, check_interval, interval_at, value_at
from torchcurv.curv.options import OPTION_NAMES, STRUCTURE, Option, Options
from torchcurv.optim.engine.damping import Group, is_of_the_loss

INTERVALS = ("update_every", "refactor_every")
VALUES = ("damping", "ema_decay")  # which may be functions of the step, too
# What "auto" stands for, after as many steps in each of which curvature is measured: one early measurement is wrong
# for the next ten steps, and ReLU units did not come back from it. Ten costs a tenth of a measurement per step.
AUTO_INTERVAL = 10
SINGLE_BATCH = ("full", "block")  # which are made of the rows of one batch where these are few
# What torch and its schedulers write into groups.
_TORCH_KEYS = (
    *("params", "param_names", "initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"),
    "differentiable",
)

GroupRule = Callable[[Group, Options, Mapping[str, Any]], None]  # raises on a group that is not allowed


class GroupOptions:
    """The options of the groups of one optimizer.

    table: by name. whole: names of options of the optimizer as a whole, which no group may have.
    settings: those of this optimizer, for the rules: what options of a group have to do with one another.
    numbers: options that may be no functions of the step, and why.
    """

    def __init__(
        self,
        table: Mapping[str, Option],
        whole: Sequence[str],
        settings: Mapping[str, Any],
        rules: Sequence[GroupRule],
        numbers: Mapping[str, str],
    ) -> None:
        self.table, self.whole, self.settings, self.rules, self.numbers = table, whole, settings, rules, numbers
        self.groups: Sequence[Group] = ()
        self.schedules: dict[tuple[int, str], Callable[[int], Any]] = {}
        self.early: set[tuple[int, str]] = set()  # (group, interval) that are 1 in the beginning
        self._held: dict[tuple[int, str], Any] = {}  # what the functions said last
        self._accepted: dict[int, dict[str, Any]] = {}  # what was last checked, by group
        self._sizes: dict[int, int] = {}  # how many keys each had then

    def copied(self, settings: Mapping[str, Any]) -> GroupOptions:
        """The same for a copy of the optimizer."""
        new = GroupOptions(self.table, self.whole, settings, self.rules, self.numbers)
        new.schedules, new.early = dict(self.schedules), set(self.early)
        return new

    # ------------------------------------------------------------------------------------ accepting

    def check_keys(self, group: Mapping[str, Any]) -> None:
        """Raise on keys that are no options."""
        for key in group.keys() - self.table.keys() - set(_TORCH_KEYS):
            if key in self.whole:
                raise ValueError(f"{key} in a parameter group: it belongs to the optimizer as a whole, not to a group")
            alike = get_close_matches(key, self.table, 1)
            meant = f", did you mean {alike[0]!r}?" if alike else "."
            raise ValueError(
                f"parameter group has the unknown option {key!r}{meant} The options of a group are "
                f"{', '.join(sorted(self.table))}"
            )

    def accept(self, index: int, step: int) -> None:
        """Check a group and make it hold plain values; functions of the step are kept."""
        group = self.groups[index]
        given = {key: group[key] for key in (*INTERVALS, *VALUES) if key in group}
        group.update(self.at_step(group, step))
        self.check(group)
        self.early = {pair for pair in self.early if pair[0] != index}
        self.early |= {(index, key) for key in INTERVALS if given.get(key) == AUTO}
        for key, value in given.items():
            self.schedules.pop((index, key), None)
            self._held.pop((index, key), None)
            if callable(value):
                self.schedules[index, key] = value
        self._sizes[index] = len(group)
        self._accepted[index] = {key: group[key] for key in self.table}

    def accept_loaded(self, defaults: Mapping[str, Any], step: int) -> None:
        """Groups of a state: what is missing has its default; functions of the step stay those given here."""
        early = self.early  # the groups say what "auto" has become
        for index, group in enumerate(self.groups):
            for key, value in defaults.items():
                group.setdefault(key, value)
            for key in (*INTERVALS, *VALUES):
                if (index, key) in self.schedules:
                    group[key] = self.schedules[index, key]
            self.accept(index, step)
        self.early = early

    def drop(self, index: int) -> None:
        """Forget a group that was not accepted."""
        self.schedules = {key: value for key, value in self.schedules.items() if key[0] != index}
        self.early = {key for key in self.early if key[0] != index}
        self._accepted.pop(index, None)

    def at_step(self, options: Group, step: int) -> dict[str, Any]:
        """The options with what "auto" stands for, and what functions of the step say now."""
        single = not is_of_the_loss(options) or options["approx"] in SINGLE_BATCH
        every = 1 if single else AUTO_INTERVAL
        found = {**options, **{key: every for key in INTERVALS if options.get(key) == AUTO}}
        for key in (*INTERVALS, *VALUES):
            if callable(options.get(key)):
                if key in self.numbers:
                    raise ValueError(f"{key} is a function of the step; {self.numbers[key]}")
                found[key] = (interval_at if key in INTERVALS else value_at)(key, options[key], step)
        return found

    def check(self, group: Group) -> None:
        """Every option of a group, and what they have to do with one another."""
        options = Options(**{key: group[key] for key in OPTION_NAMES if key in group})
        for name, option in self.table.items():
            if name not in OPTION_NAMES:
                option.check(name, group[name])
        for rule in self.rules:
            rule(group, options, self.settings)

    # -------------------------------------------------------------------------------------- at a step

    def apply(self, step: int) -> None:
        """What functions of the step say now; what was changed in a group since is checked."""
        for index, group in enumerate(self.groups):
            self._take_schedules(index, group)
        for (index, key), schedule in self.schedules.items():
            if key in VALUES:
                self.groups[index][key] = self._held[index, key] = value_at(key, schedule, step)
        for index, group in enumerate(self.groups):
            self._check_changes(index, group)

    def _take_schedules(self, index: int, group: Group) -> None:
        """Functions of the step that were put into a group since, and numbers that were put in the place of one."""
        for key in (*INTERVALS, *VALUES):
            pair, value = (index, key), group.get(key)
            if callable(value):
                if key in self.numbers:
                    raise ValueError(f"{key} is a function of the step; {self.numbers[key]}")
                self.schedules[pair] = value
                group[key] = self._accepted[index][key]
            elif pair in self.schedules and pair in self._held and value != self._held[pair]:
                del self.schedules[pair], self._held[pair]

    def _check_changes(self, index: int, group: Group) -> None:
        accepted = self._accepted[index]
        if len(group) != self._sizes[index]:
            self.check_keys(group)
            self._sizes[index] = len(group)
        changed = [key for key, value in accepted.items() if group[key] is not value and _differ(group[key], value)]
        for key in changed:
            if self.table[key].scope == STRUCTURE:
                raise ValueError(
                    f"{key} of group {index} was changed from {accepted[key]!r} to {group[key]!r}: it decides what "
                    "blocks keep, and is read when the optimizer is built, a group is added or a state is loaded. "
                    "Build a new optimizer with it"
                )
        if changed:
            self.check(self.at_step(group, 0))
            self._accepted[index] = {key: group[key] for key in self.table}

    def next_turn(self, index: int, key: str, step: int) -> int:
        """The step on which it is due again: a multiple of the interval, so that those that began late share passes."""
        group, schedule = self.groups[index], self.schedules.get((index, key))
        if schedule is not None:
            group[key] = self._held[index, key] = interval_at(key, schedule, step)
        interval = check_interval(key, group[key])
        assert isinstance(interval, int)
        interval = 1 if step < AUTO_INTERVAL and (index, key) in self.early else interval
        return (step // interval + 1) * interval

    def adaptive(self, index: int, key: str) -> bool:
        return self.groups[index][key] == ADAPTIVE

    def constant(self, index: int, key: str) -> Any:
        """The interval, unless a function of the step gives it."""
        return None if (index, key) in self.schedules else self.groups[index][key]


def _differ(one: Any, other: Any) -> bool:
    """Whether two values are different; a tensor is only what it is."""
    return isinstance(one, Tensor) or isinstance(other, Tensor) or one != other
