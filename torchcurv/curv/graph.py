"""The autograd graph: edges, versions, and every private name of torch that the package needs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from ctypes import string_at
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
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


def output_padding_of(module: Any, x: Tensor, output_size: Any) -> Any:
    """What a transposed convolution adds to its output to reach a size that was asked for."""
    dims = len(module.kernel_size)
    return module._output_padding(
        x, output_size, module.stride, module.padding, module.kernel_size, dims, module.dilation
    )


# Numbers by which a function moves rows, under the names by which its node keeps them: which dimensions, and how far.
_HOW = ("dim", "dims", "dim0", "dim1", "dim2", "dimension", "source_dim", "shifts", "step", "offset", "repeats")
_SIZES = ("start", "end", "index", "split_size", "split_sizes", "size")
_CHOSEN = ("_raw_saved_index", "_raw_saved_indices", "_raw_saved_lengths", "_raw_saved_offsets")  # tensors that say it
_MASKED = ("MulBackward0", "SumBackward1")
_MATRIX = {"MmBackward0": 1, "BmmBackward0": 1, "AddmmBackward0": 2, "SparseAddmmBackward0": 2}  # input of the second


class _Reading(NamedTuple):
    """What is read of the nodes of one class, by name: numbers, and the tensor that chooses rows."""

    how: tuple[str, ...]
    sizes: tuple[str, ...]
    chosen: str | None


_READINGS: dict[type, _Reading] = {}


def _reading(cls: type) -> _Reading:
    own = dir(cls)
    how, sizes = (
        tuple(f"_saved_{key}" for key in keys if f"_saved_{key}" in own and f"_raw_saved_{key}" not in own)
        for keys in (_HOW, _SIZES)
    )
    if ("View" in cls.__name__ or "Reshape" in cls.__name__) and "_saved_self_sym_sizes" in own:
        sizes += ("_saved_self_sym_sizes",)
    return _Reading(how, sizes, next((key for key in _CHOSEN if key in own), None))


class Structure(NamedTuple):
    """The graph below an edge.

    functions: equal where the same functions are applied to one another. values: equal where they also have equal
    sizes, and choose rows by equal tensors; None: such a tensor cannot be read. chosen: whether there is such a tensor.
    places: the nodes, numbered alike where the functions are equal.
    """

    functions: int
    values: int | None
    chosen: bool
    places: dict[Any, int]


def structure_of(start: Edge, ends: set[Any]) -> Structure:
    """The structure of the graph from an edge down. ends: nodes whose rows matter.

    Functions that choose rows by a tensor (index_add, x[permutation], a product with an adjacency matrix) count with
    its values, where they lie between the start and an end.
    """
    places: dict[Any, int] = {start.node: 0}
    order, functions = [start.node], list[Any]([start.number])
    numbers, choices, cut = list[Any](), list[Any](), False
    for node in order:  # which grows
        cls = type(node)
        read = _READINGS.get(cls)
        if read is None:
            read = _READINGS[cls] = _reading(cls)
        functions.append(cls)
        for name in read.how:
            functions.append(getattr(node, name))
        if read.sizes:
            own = [getattr(node, name) for name in read.sizes]
            numbers += own
            cut = cut or _cuts_rows(node, own)
        if read.chosen is not None or cls.__name__ in _MATRIX or (cls.__name__ in _MASKED and _spreads(node)):
            choices.append(node)
        for child, number in node.next_functions:
            if child is None:
                continue
            place = places.get(child)
            if place is None:
                place = places[child] = len(order)
                order.append(child)
            functions += (place, number)
    chosen = _choices(choices, order, ends) if choices else []
    values = None if None in chosen else hash((*numbers, *chosen))
    return Structure(hash(tuple(functions)), values, cut or bool(chosen), places)


def _is_leaf(node: Any) -> bool:
    return node is None or not node.next_functions


def _cuts_rows(node: Any, numbers: list[Any]) -> bool:
    """Whether a node takes rows of dimension 0, from here to there, of something that was computed."""
    if getattr(node, "_saved_dim", 1) != 0 or _is_leaf(node.next_functions[0][0]):
        return False
    return not (numbers[0] == 0 and numbers[-1] == (1 << 63) - 1)  # x[:], which takes all of them


def _spreads(node: Any) -> bool:
    """Whether a product repeats rows before it masks them: mask [g, n, 1] times x [1, n, c], and the sum of a product
    over dimension 0."""
    if type(node).__name__ != "MulBackward0":
        return 0 in (node._saved_dim or ()) and type(node.next_functions[0][0]).__name__ == "MulBackward0"
    rows = node._input_metadata[0].shape[:1]
    for child, number in node.next_functions:
        if rows and rows[0] > 1 and not _is_leaf(child):
            shape = child._input_metadata[number].shape
            if len(shape) == len(node._input_metadata[0].shape) and shape[0] == 1:
                return True
    return False


def _choices(choices: list[Any], order: list[Any], ends: set[Any]) -> list[Any]:
    """The values of tensors that choose rows on the way to the ends; None for one that must not be read."""
    reach = set(ends)
    for node in sorted(order, key=age_of):  # what it was computed from is older
        if node not in reach and any(child in reach for child, _ in node.next_functions):
            reach.add(node)
    values: list[Any] = []
    for node in choices:
        raw = _chosen(node, reach) if node in reach else None
        if raw is not None:
            values.append(_value(raw))
    return values


def _chosen(node: Any, reach: set[Any]) -> Any:
    """The saved tensor by which a node chooses rows of dimension 0; None where it does not."""
    name = type(node).__name__
    if name in _MATRIX:  # the first matrix of a product mixes the rows of the second
        if node.next_functions[_MATRIX[name]][0] not in reach:
            return None
        raw = getattr(node, "_raw_saved_self", None) or getattr(node, "_raw_saved_mat1", None)
        batched = name == "BmmBackward0" and (raw is None or raw.unpack_hook is not None or len(raw.data) > 1)
        return None if batched else raw
    if name in _MASKED:
        product = node if name == "MulBackward0" else node.next_functions[0][0]
        first = product.next_functions[0][0] in reach
        return product._raw_saved_other if first else product._raw_saved_self
    raw = getattr(node, _READINGS[type(node)].chosen or "")
    if isinstance(raw, tuple):  # x[i, j]: dimension 0 is chosen by the first
        return raw[0]
    dim = getattr(node, "_saved_dim", 0)
    if dim >= 1 << 63:  # counted from the last, in a type without a sign; an index of one dimension does not tell
        dims = raw.data.dim() if raw.unpack_hook is None else 1
        dim = dim - (1 << 64) + dims if dims > 1 else 0
    return raw if dim <= 0 else None


def _value(raw: Any) -> Any:
    """What a saved tensor holds, as a number; None where hooks (of a checkpoint) pack it, who unpack it once only."""
    if raw.unpack_hook is not None:
        return None
    tensor = raw.data
    if tensor is None:
        return 0
    dense = (tensor if tensor.layout == torch.strided else tensor.to_dense()).detach().cpu().contiguous()
    return hash((dense.shape, string_at(dense.data_ptr(), dense.nbytes)))


def function_modes() -> list[Any]:
    """The torch function modes that are active, the innermost last."""
    return _get_current_function_mode_stack()


# ---------------------------------------------------------------------------------------- torch.compile


never_compiled = torch._disable_dynamo  # a decorator; the compiler drops what a function writes to an optimizer
no_torch_function = torch._C.DisableTorchFunction  # a context in which no mode sees what a hook looks at


def untraced(function: Callable[..., Any]) -> Any:
    """A function that is not compiled; those that it calls are, but for what it says itself."""
    how = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)
    eval_frame.set_code_exec_strategy(function.__code__, how)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
        "a pass that measures curvature is not compiled: with fullgraph=True, give the optimizer the compiled model"
    )
    return function


@untraced
def uncompiled(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """target(*args, **kwargs), and what it calls; unlike torch.compiler.disable, this does not import the compiler."""
    callback = eval_frame.get_eval_frame_callback()
    if callback is None:
        return target(*args, **kwargs)
    eval_frame.set_eval_frame(None)
    try:
        return target(*args, **kwargs)
    finally:
        eval_frame.set_eval_frame(callback)


class CompilerOff:
    """Runs what follows in this thread uncompiled, also functions that are compiled for themselves, until `close`."""

    def __init__(self) -> None:
        self._callback = eval_frame.get_eval_frame_callback()  # which compiles what is called
        if self._callback is not None:
            eval_frame.set_eval_frame(None)
        loaded = "torch._dynamo" in sys.modules
        self._stance = torch.compiler.set_stance("force_eager") if loaded else None

    def close(self) -> None:
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
        if self._callback is not None:
            eval_frame.set_eval_frame(self._callback)


untraced(CompilerOff.__init__)
untraced(CompilerOff.close)
