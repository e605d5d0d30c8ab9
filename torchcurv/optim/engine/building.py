"""From parameter groups to blocks: which layers a model has, which options they get, what none of them covers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from torchcurv.curv.block.block import Curvature, partition
from torchcurv.curv.layers.find import find_layers, unreadable
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.layers.products import Layout
from torchcurv.curv.options import OPTION_NAMES, Options
from torchcurv.optim.engine.damping import Group

Chosen = list[tuple[Layer, Options, int]]  # layers, with the options and the index of their group
Names = dict[Tensor, str]
BlockRule = Callable[[Curvature, int, Sequence[Group], Names], None]  # raises where a block may not be in its group


@dataclass(frozen=True)
class Blueprint:
    """How an optimizer makes blocks.

    model: whose parameters the groups hold. unsupported: "error", or "gradient" for what has no curvature.
    arrange: from the blocks of the groups to those that are kept. rules: checks of each.
    alone: parameters that turned out not to be used as their module's type says. products: those of modules' own that
    turned out to be the weights of linear maps, and how they are laid out.
    unread: why, for the names of parameters of which nothing can be measured, under unsupported="gradient".
    """

    model: nn.Module
    unsupported: str
    arrange: Callable[[list[Curvature]], list[Curvature]] = list
    rules: tuple[BlockRule, ...] = ()
    alone: set[Tensor] = field(default_factory=set)
    products: dict[Tensor, Layout] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> Names:
        return {p: name for name, p in self.model.named_parameters()}

    def take(self, seen: Mapping[Tensor, Layout]) -> bool:
        """Parameters that turned out to be weights are layers from the next build on. Whether any did."""
        new = {p: layout for p, layout in seen.items() if p not in self.products and p not in self.alone}
        self.products.update(new)
        return bool(new)

    def tell(self, state: dict[Any, dict[str, Any]]) -> None:
        """Put into the state what was found out of parameters: the letters of a layout, none for single elements."""
        for p, use in (
            {p: layout.letters for p, layout in self.products.items()} | dict.fromkeys(self.alone, "")
        ).items():
            state[p]["use"] = use

    def learn(self, state: Mapping[Any, Mapping[str, Any]]) -> None:
        """The inverse of `tell`."""
        for p, own in state.items():
            if any(key.startswith("curvature") for key in own):
                self.products.pop(p, None)
                self.alone.discard(p)
            if own.get("use"):
                self.products[p] = Layout.of(own["use"])
            elif "use" in own:
                self.alone.add(p)

    def blocks(self, groups: Sequence[Group]) -> list[tuple[Curvature, int]]:
        """The blocks of these groups, each with the index of its group."""
        group_of = {p: k for k, group in enumerate(groups) for p in group["params"]}
        blocks = self.arrange([Curvature(*arguments) for arguments in partition(self._chosen(groups, group_of))])
        found = [(block, group_of[block.params[0]]) for block in blocks]
        for block, index in found:
            for rule in self.rules:
                rule(block, index, groups, self.names)
        return found

    def _chosen(self, groups: Sequence[Group], group_of: dict[Tensor, int]) -> Chosen:
        options = {p: Options(**{key: groups[k][key] for key in OPTION_NAMES}) for p, k in group_of.items()}
        names = self.names  # parameters of a module that was replaced stay in their group, and are none of the model
        covered = {p for p in group_of if options[p].approx is not None and p.requires_grad and p in names}
        if self.unsupported == "gradient":
            self.unread.update({names[p]: why for p in covered if (why := unreadable(p))})
            covered = {p for p in covered if names[p] not in self.unread}
        for _ in range(2):  # what no layer explains is taken element by element
            layers = find_layers(
                self.model,
                lambda p: p in covered,
                lambda p: p in covered and options[p].approx == "diag",
                self.alone,
                self.products,
            )
            in_layer = {p for layer in layers for p in layer.params}
            self.alone.update(covered - in_layer)
        missing = [names[p] for p in group_of if p in covered and p not in in_layer]
        if missing and self.unsupported == "error":
            raise ValueError(
                f"no curvature is known for the parameters {', '.join(missing)}: put them into a group with "
                'approx=None to train them with the plain gradient, or with approx="diag" to have their gradients '
                'taken sample by sample, or pass unsupported="gradient" to train everything that is not covered with '
                "the plain gradient, or teach torchcurv the layer with torchcurv.register_view"
            )
        for layer in layers:
            self._check_agreement(layer, options)
        return [(layer, options[layer.params[0]], group_of[layer.params[0]]) for layer in layers]

    def _check_agreement(self, layer: Layer, options: dict[Tensor, Options]) -> None:
        own = [p for p in layer.owned if p in options and p.requires_grad]
        for other in own[1:]:
            for key in OPTION_NAMES:
                here, there = getattr(options[own[0]], key), getattr(options[other], key)
                if not same(here, there):
                    raise ValueError(
                        f"the parameters {self.names[own[0]]} and {self.names[other]} belong to one layer but have "
                        f"{key}={here!r} and {key}={there!r}: curvature options of one layer must agree between "
                        "groups (lr, momentum and decay may differ)"
                    )


def same(here: Any, there: Any) -> bool:
    return here is there or here == there
