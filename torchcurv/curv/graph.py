"""The autograd graph: edges, versions, and every private name of torch that the package needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import _get_current_function_mode_stack
from torch.utils._pytree import TreeSpec as TreeSpec
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_unflatten as tree_unflatten


class Edge(NamedTuple):
    """Where the gradient of a tensor arrives: a node of the graph, the number of its input, and the shape there."""

    node: Node
    number: int
    shape: torch.Size

    @property
    def public(self) -> GradientEdge:
        return GradientEdge(self.node, self.number)


def version_of(x: Any) -> int:
    return 0 if not isinstance(x, Tensor) or x.is_inference() else x._version


class Frozen(NamedTuple):
    """A tensor as it was: detached, with the version that an edit in place would change."""

    tensor: Tensor
    version: int

    def read(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "the model's output was edited in place before the loss: apply that operation out of place, or "
                "inside the model"
            )
        return self.tensor


def edge_of(tensor: Tensor) -> Edge:
    """The edge of a tensor; that of its base if it is the same memory in the same order.

    Editing a view in place rewrites the view's own node but not the base's (nn.Linear with a bias returns a view
    for inputs of three or more dimensions).
    """
    base = tensor._base
    if (
        base is not None
        and base.grad_fn is not None
        and base.numel() == tensor.numel()
        and base.is_contiguous()
        and tensor.is_contiguous()
    ):
        tensor = base
    node, number = get_gradient_edge(tensor)[:2]
    return Edge(node, number, tensor.shape)


def frozen(tensor: Tensor) -> Frozen:
    return Frozen(tensor.detach(), tensor._version)


def metadata(node: Node) -> dict[Any, Any]:
    """The dict that lives as long as the node (torch's stubs call the property a method)."""
    return node.metadata  # type: ignore[return-value]


def edges_below(start: Edge) -> set[tuple[Any, int]]:
    """The edges (node, number) of the graph that a gradient at `start` reaches, with its own."""
    seen: set[tuple[Any, int]] = {start[:2]}
    todo = [start.node]
    while todo:
        for edge in todo.pop().next_functions:
            if edge[0] is not None and edge not in seen:
                seen.add(edge)
                todo.append(edge[0])
    return seen


def nodes_between(start: Edge, end: Edge) -> list[Node]:
    """The nodes that a gradient passes on its way from an edge to one below it, and others that lie above that one."""
    seen, todo, found = {start.node, end.node}, [start.node], []
    while todo:
        node = todo.pop()
        found.append(node)
        for below, _ in node.next_functions:
            if below is not None and below not in seen and age_of(below) > age_of(end.node):
                seen.add(below)
                todo.append(below)
    return found


# ------------------------------------------------------------------------------- private names of torch


def scale_of_batch_norm(node: Node) -> Tensor | None:
    """weight / sqrt(var + eps) of a batch norm that normalises with its batch; None for every other node."""
    saved: Any = node
    if "BatchNorm" not in node.name() or not getattr(saved, "_saved_training", False):
        return None
    scale, weight = saved._saved_result2, saved._saved_weight
    return scale if weight is None else scale * weight


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor that this one is a view of; None where it is none."""
    return tensor._base


def age_of(node: Node) -> int:
    """Grows with the time at which the node was made."""
    return node._sequence_nr()


def backward_id() -> int:
    """The number of the backward call that is running in this thread; -1 where none is."""
    return torch._C._current_graph_task_id()


def running_node() -> Node:
    """The node whose hook is running."""
    return torch._C._current_autograd_node()


def will_run(node: Node) -> bool:
    """Whether the backward call that is running executes a node.

    Raises RuntimeError for the node of a leaf that `torch.autograd.grad` was asked for.
    """
    return torch._C._will_engine_execute_node(node)


def in_transform() -> bool:
    """Whether a transform of torch.func is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def saved_tensors_are_packed() -> bool:
    """Whether hooks (of a checkpoint) hold what a node saves, which can then be asked for once only."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters by name, None where one was left out."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of a module by name, to be read and replaced."""
    return module._buffers


def drop_hooks(module: nn.Module, left_over: Callable[[Any], bool]) -> None:
    """Take the forward hooks of a module away of which this is true."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if left_over(hook)]:
            del hooks[key]
            for of_key in (module._forward_hooks_with_kwargs, module._forward_hooks_always_called):
                of_key.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def has_backward_hooks(tensor: Tensor) -> bool:
    """Whether hooks of the user's run when the gradient of a tensor arrives."""
    return bool(tensor._backward_hooks)


def wrapper_that_runs() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward runs now."""
    return DistributedDataParallel._get_active_ddp_module()


@contextmanager
def without_sink(wrapper: DistributedDataParallel) -> Iterator[None]:
    """Passes through the graph that do not use up the callback by which a static graph averages its first gradients."""
    if not wrapper.static_graph:
        yield
        return
    queued = wrapper._static_graph_delay_allreduce_enqueued
    wrapper._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        wrapper._static_graph_delay_allreduce_enqueued = queued


def output_padding_of(module: Any, x: Tensor, output_size: Any) -> Any:
    """What a transposed convolution adds to its output to reach a size that was asked for."""
    dims = len(module.kernel_size)
    return module._output_padding(
        x, output_size, module.stride, module.padding, module.kernel_size, dims, module.dilation
    )


def function_modes() -> list[Any]:
    """The torch function modes that are active, the innermost last."""
    return _get_current_function_mode_stack()


no_torch_function = torch._C.DisableTorchFunction  # a context in which no mode sees what a hook looks at
GROUPED_MM = torch._grouped_mm  # what torch.nn.functional.grouped_mm calls
