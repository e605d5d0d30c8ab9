"""Propagation of H = d²L/dz² from a model's output to the outputs of its layers, through all that lies between.

    diag      HesScale (Elsayed et al., 2210.11639, 2406.03276): diag(H) of every sample, a tensor shaped like z
    matrix    HBP (Dangel, Harmeling, Hennig, 1902.01813): mean_n of d²L/dz_n², one [d, d] over a sample's elements

For z_out = f(z) with the Jacobian J of f,

    H = J^T H_out J + sum_k (dL/dz_out_k) d²f_k/dz²,

of which each form keeps its part. A `Tape` notes the torch functions of one forward pass. RULES says, for each of
them, what J is: a map with one entry per row (moves, scales, elementwise functions), or one that all samples share
(products with a weight, pools). Most rules get J^T from autograd, by running the function again on detached inputs.

Where branches fork, their contributions add up; the cross terms J1^T H J2 + J2^T H J1 of two branches that meet in an
addition (or of two inputs that meet in a `cat`) are dropped. Statistics of a batch count as constants.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from torchcurv.curv.capture import Edge, edge_of, version_of
from torchcurv.curv.linalg import times_squares

Key = tuple[Node, int]
Spec = TreeSpec | tuple[int, tuple[str, ...]]  # how a list of arguments is put together again
Gradients = Callable[[list[Edge]], Sequence[Tensor]]

RESIDUALS: dict[str, Callable[[Tensor], Tensor]] = {
    "keep": lambda r: r,  # the Hessian
    "zero": torch.zeros_like,  # Gauss-Newton
    "abs": torch.abs,
    "clip": lambda r: r.clamp(min=0),
}


# ------------------------------------------------------------------------------------------------- tape


class Kept(NamedTuple):
    """A tensor argument, detached, with the version that an edit in place would change."""

    tensor: Tensor
    version: int


class Blank(NamedTuple):
    """An argument of which its rule needs only the shape."""

    shape: torch.Size
    device: torch.device


@dataclass(eq=False)
class Op:
    """One output of one call of a torch function.

    leaves, spec: its arguments, flattened. inputs: the edges of those that have a history. part: which output it is.
    shape: of the output itself (its edge may be that of a base). after: the name of the operation before it. slope: of
    a dropout, d(out)/d(in) element by element. inside: the module that called it, known where it may be refused.
    packed: whether hooks (of a checkpoint) hold what its node has saved, which can then be asked for once only.
    """

    func: Callable[..., Any]
    name: str
    number: int
    after: str
    inputs: dict[int, Edge]
    output: Edge
    shape: torch.Size
    leaves: list[Any]
    spec: Spec
    part: int | None = None
    slope: Tensor | None = None
    inside: str = ""
    packed: bool = False

    @property
    def args(self) -> tuple[Any, ...]:
        return _unflattened(self.leaves, self.spec)[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        return _unflattened(self.leaves, self.spec)[1]

    @property
    def place(self) -> str:
        return _place(self.name, self.number, self.after, self.inside)

    def refused(self, why: str) -> NotImplementedError:
        return _refused(self.place, why)

    def read(self, leaf: Any, dtype: torch.dtype) -> Any:
        """An argument as it was; floating tensors in `dtype`, so that a pass under autocast can be run again."""
        if isinstance(leaf, Blank):
            return torch.zeros(leaf.shape, dtype=dtype, device=leaf.device)
        if not isinstance(leaf, Kept):
            return leaf
        if version_of(leaf.tensor) != leaf.version:
            raise RuntimeError(f"an argument of {self.place} was edited in place afterwards: edit a copy of it")
        return leaf.tensor.to(dtype) if leaf.tensor.is_floating_point() else leaf.tensor

    def named(self, slot: int, dtype: torch.dtype) -> Callable[[str], Any]:
        """Its arguments by name, for functions written in Python; `slot` is `input`. Only what is asked for is read."""
        try:
            bound = inspect.signature(self.func).bind(*self.args, **self.kwargs)
        except (TypeError, ValueError):
            raise self.refused("only the function of torch.nn.functional is known") from None
        bound.apply_defaults()
        if bound.arguments["input"] is not self.leaves[slot]:
            raise self.refused("only its input may depend on layers")
        return lambda name: self.read(bound.arguments[name], dtype)

    def option(self, position: int, name: str, default: Any = None) -> Any:
        """An argument that is no tensor."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


def _place(name: str, number: int, after: str, inside: str = "") -> str:
    where = f", in {inside}" if inside else ""
    return f"{name} (operation {number} of the forward pass, after {after or 'its start'}{where})"


def _calling_module(model: nn.Module | None) -> str:
    """The innermost module of a model that is running, as the stack has it."""
    names = {} if model is None else {id(module): name for name, module in model.named_modules()}
    frame = sys._getframe(1)
    while frame is not None and names:
        caller = frame.f_locals.get("self")
        if id(caller) in names:
            name = names[id(caller)]
            return f"module {name!r} ({type(caller).__name__})" if name else type(caller).__name__
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _refused(place: str, why: str) -> NotImplementedError:
    return NotImplementedError(f"a Hessian cannot be propagated through {place}: {why}")


class Tape(TorchFunctionMode):
    """Notes the torch functions that are called while it is active, those without a rule too.

    It keeps the nodes of the graph alive, and what the rules read of the arguments.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.ops: list[Op] = []
        self._known: set[Key] = set()
        self.calls, self.last = 0, ""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        leaves, spec = _flattened(args, kwargs)
        tensors = {k: x for k, x in enumerate(leaves) if isinstance(x, Tensor)}
        if not any(x.requires_grad for x in tensors.values()):
            return func(*args, **kwargs)
        inputs = {k: edge_of(x) for k, x in tensors.items() if x.grad_fn is not None}
        self._known |= {_key(edge) for edge in inputs.values()}
        kept = _kept(func, args, kwargs, leaves, inputs, RULES.get(name))  # before it edits them
        result = func(*args, **kwargs)
        self._note(func, name, inputs, kept, spec, result)
        return result

    def _note(self, func: Any, name: str, inputs: dict[int, Edge], kept: list[Any], spec: Spec, result: Any) -> None:
        several = isinstance(result, tuple | list)
        parts: dict[int | None, Any] = {**dict(enumerate(result))} if several else {None: result}
        new = {k: edge_of(x) for k, x in parts.items() if isinstance(x, Tensor) and x.grad_fn is not None}
        # What lies at an edge that is known made nothing: the same memory in the same order, or the same tensor.
        new = {k: edge for k, edge in new.items() if _key(edge) not in self._known}
        if not new:
            return
        self.calls += 1
        rule = RULES.get(name)
        doubtful = rule is None or not rule.matrix or (len(inputs) > 1 and not rule.joint)
        inside = _calling_module(self.model) if doubtful else ""
        packed = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        for part, edge in new.items():
            slope = _slope(parts[part], edge) if name in DROPOUTS else None
            shape, after = parts[part].shape, self.last
            self.ops.append(
                Op(func, name, self.calls, after, inputs, edge, shape, kept, spec, part, slope, inside, packed)
            )
            self._known.add(_key(edge))
        self.last = name


def _flattened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Spec]:
    """The arguments as one list; those that hold no others without the work of a pytree."""
    leaves = [*args, *kwargs.values()]
    if any(isinstance(leaf, tuple | list | dict) for leaf in leaves):
        return tree_flatten((args, kwargs))
    return leaves, (len(args), tuple(kwargs))


def _unflattened(leaves: list[Any], spec: Spec) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(spec, TreeSpec):
        return tree_unflatten(leaves, spec)
    count, names = spec
    return tuple(leaves[:count]), dict(zip(names, leaves[count:], strict=True))


def _key(edge: Edge) -> Key:
    return edge.node, edge.number


@cache
def _name(func: Callable[..., Any]) -> str | None:
    """Its name without the marks of methods and edits in place (add_, __iadd__); None for what only looks."""
    known = resolve_name(func)
    if known is None:
        return f"{getattr(func, '__name__', func)} (a function of its own)"
    path = known.split(".")
    if path[-1] == "__get__":
        return path[-2] if path[-2] in MOVES else None
    return path[-1].strip("_")


@cache
def _edits(func: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of a function that has an argument `inplace`."""
    try:
        signature = inspect.signature(func)
    except (TypeError, ValueError):
        return None
    return signature if "inplace" in signature.parameters else None


def _in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    if name.startswith("__i") and name.strip("_") not in ("invert", "iter", "index", "int"):
        return True
    signature = _edits(func)
    # F.threshold and boolean dispatches hide their signatures; `inplace` is then a keyword
    given = kwargs if signature is None else signature.bind(*args, **kwargs).arguments
    return bool(given.get("inplace", False))


def _kept(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any], inputs: dict[int, Edge], rule: Any
) -> list[Any]:
    if rule is None:
        return []
    copies = rule.values and _in_place(func, args, kwargs)

    def keep(k: int, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if k in inputs and not rule.values and not rule.operands:
            return Blank(x.shape, x.device)
        x = x.detach().clone() if copies and k in inputs else x.detach()
        return Kept(x, version_of(x))

    return [keep(k, x) for k, x in enumerate(leaves)]


def _through(node: Any, v: Tensor) -> Tensor:
    """J^T v by a node of the graph itself, without hooks."""
    with torch.no_grad():
        pulled = node(v)
        return pulled[0] if isinstance(pulled, tuple) else pulled


def _slope(out: Tensor, edge: Edge) -> Tensor:
    """The mask / (1 - p) of a dropout, exact where its input is 0 too."""
    there = out if out.grad_fn is edge.node else out._base
    assert there is not None
    return _through(edge.node, torch.ones_like(there)).reshape(out.shape)


# ----------------------------------------------------------------------------------------------- one step


@dataclass
class Pass:
    """What one propagation is about. n: samples, for the matrix form. gradients: dL/d(output) where rules read it."""

    form: str
    n: int
    residual: Callable[[Tensor], Tensor] | None
    gradients: dict[Key, Tensor] = field(default_factory=dict)

    @property
    def diag(self) -> bool:
        return self.form == "diag"


class Local:
    """A function as one of its arguments sees it, at the values of the forward pass: J^T v and J t.

    squared: with every other floating argument squared. For a product with a weight that is J∘J.
    """

    def __init__(self, op: Op, slot: int, dtype: torch.dtype, squared: bool = False) -> None:
        def argument(k: int, leaf: Any) -> Any:
            if k == slot:
                return self.x.clone()  # it may be edited in place
            leaf = op.read(leaf, dtype)
            return leaf.square() if squared and isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        x = op.leaves[slot]
        if isinstance(x, Kept) and not RULES[op.name].values:  # it may have been edited since
            x = Blank(x.tensor.shape, x.tensor.device)
        with torch.enable_grad():
            self.x = op.read(x, dtype).detach().requires_grad_()
            leaves = [argument(k, leaf) for k, leaf in enumerate(op.leaves)]
            args, kwargs = _unflattened(leaves, op.spec)
            out = op.func(*args, **kwargs)
        self.out: Tensor = out if op.part is None else out[op.part]

    def pull(self, v: Tensor) -> Tensor:
        """J^T v, shaped like the argument."""
        v = v.reshape(self.out.shape).to(self.out.dtype)
        return torch.autograd.grad(self.out, self.x, v, retain_graph=True, materialize_grads=True)[0]

    def push(self, t: Tensor) -> Tensor:
        """J t, shaped like the output: the transpose of the pull."""
        with torch.enable_grad():
            v = torch.zeros_like(self.out, requires_grad=True)
            pulled = torch.autograd.grad(self.out, self.x, v, create_graph=True, materialize_grads=True)[0]
        if not pulled.requires_grad:
            return torch.zeros_like(self.out)
        return torch.autograd.grad(pulled, v, t, materialize_grads=True)[0]


def _one_entry(op: Op, slot: int, H: Tensor, now: Pass) -> Tensor:
    """Each row of J has at most one entry c: J = diag(c) S, S a selection. H -> S^T (c c^T ∘ H) S."""
    if now.diag:
        local = Local(op, slot, H.dtype)
        return local.pull(local.push(torch.ones_like(local.x)) * H)
    local = Local(op, slot, torch.float64)  # the positions that S reads must come out as integers
    c = local.push(torch.ones_like(local.x))
    positions = torch.arange(local.x.numel(), dtype=c.dtype, device=c.device).reshape(local.x.shape)
    source = torch.where(c == 0, 0, local.push(positions) / c).round().long()
    source, c = (_by_sample(op, x, now.n) for x in (source, c.to(H.dtype)))
    size = local.x.numel() // now.n
    first = torch.arange(now.n, device=c.device)[:, None] * size
    source = torch.where(c == 0, 0, source - first)
    if (source < 0).any() or (source >= size).any() or local.x.numel() % now.n:
        raise op.refused('it moves dimension 0, or mixes samples; approx="diag" can do that')
    if (source == source[:1]).all():
        return _selected(H * (c.T @ c) / now.n, source[0], size)
    terms = (_selected(H * torch.outer(row, row) / now.n, at, size) for row, at in zip(c, source, strict=True))
    return sum(terms, H.new_zeros(size, size))


def _selected(H: Tensor, source: Tensor, size: int) -> Tensor:
    """S^T H S, where row k of S has its 1 at source[k]. Elements that are read twice add up."""
    columns = H.new_zeros(len(H), size).index_add_(1, source, H)
    return H.new_zeros(size, size).index_add_(0, source, columns)


def _by_sample(op: Op, x: Tensor, n: int) -> Tensor:
    if x.numel() % n:
        raise op.refused("it mixes samples")
    return x.reshape(n, -1)


def _scaled_by(c: Tensor, H: Tensor, now: Pass) -> Tensor:
    """D H D per sample, D = diag(c), and the mean over samples in the matrix form."""
    if now.diag:
        return c.square() * H
    c = c.reshape(now.n, -1)
    return H * (c.T @ c) / now.n


def _congruent(op: Op, slot: int, H: Tensor, now: Pass) -> Tensor:
    """M^T H M for a linear map M that all samples share: M^T of H's columns, n of them at a time, then of its rows."""
    local, n = Local(op, slot, H.dtype), now.n

    def pull(v: Tensor) -> Tensor:
        return _by_sample(op, local.pull(v), n)

    probe = torch.linspace(1, 2, len(H), dtype=H.dtype, device=H.device).expand(_by_sample(op, local.out, n).shape)
    alone, together = pull(torch.cat([probe[:1], torch.zeros_like(probe[1:])])), pull(probe)
    wrong = torch.cat([alone[1:], together - alone[:1]])
    if (wrong.abs() > 1e-3 * together.abs().amax()).any():
        raise op.refused('its map mixes samples, or differs between them; approx="diag" can do that')

    def transposed(rows: Tensor) -> Tensor:
        padded = F.pad(rows, (0, 0, 0, -len(rows) % n))
        return torch.cat([pull(some) for some in padded.split(n)])[: len(rows)]

    return transposed(transposed(H).T.contiguous())


def _with_residual(op: Op, H: Tensor, second: Callable[[Tensor], Tensor], now: Pass) -> Tensor:
    """H + diag(residual(second(dL/d(out)))): the map acts on every sample, before the mean over them."""
    g = now.gradients.get(_key(op.output))
    if now.residual is None or g is None:
        return H
    r = now.residual(second(g.reshape(op.shape).to(H.dtype)))
    return H + r if now.diag else H + r.reshape(now.n, -1).mean(0).diag()


# -------------------------------------------------------------------------------------------------- rules

Apply = Callable[[Op, int, Tensor, Pass], Tensor]


def _copied(op: Op, slot: int, H: Tensor, now: Pass) -> Tensor:
    return H.to(op.leaves[slot].device)


def _moved(op: Op, slot: int, H: Tensor, now: Pass) -> Tensor:
    """A selection: its entries are their own squares."""
    return Local(op, slot, H.dtype).pull(H) if now.diag else _one_entry(op, slot, H, now)


def _weighted(op: Op, slot: int, H: Tensor, now: Pass) -> Tensor:
    """A product with a weight: diag (M∘M)^T h, the transposed map with the weight squared."""
    if now.diag and op.name == "linear" and slot == 0:  # without running it again
        weight = op.read(op.option(1, "weight"), H.dtype)
        return times_squares(H.flatten(0, -2), weight).reshape(*H.shape[:-1], -1)
    return Local(op, slot, H.dtype, squared=True).pull(H) if now.diag else _congruent(op, slot, H, now)


def _averaged(coefficient: Callable[[Op, int, torch.dtype], Tensor | float]) -> Apply:
    """Sums and averages: the entries of row k of M are c_k or 0, so that (M∘M)^T h = M^T (c ∘ h)."""

    def apply(op: Op, slot: int, H: Tensor, now: Pass) -> Tensor:
        if not now.diag:
            return _congruent(op, slot, H, now)
        return Local(op, slot, H.dtype).pull(coefficient(op, slot, H.dtype) * H)

    return apply


def _mean_coefficient(op: Op, slot: int, dtype: torch.dtype) -> float:
    return op.shape.numel() / op.inputs[slot].shape.numel()


def _pool_coefficient(op: Op, slot: int, dtype: torch.dtype) -> Tensor:
    """1 / divisor, whatever the padding: what the pool makes of ones, over the number of ones it has read."""
    local, dims = Local(op, slot, dtype), int(op.name[-2])
    ones = torch.ones_like(local.x)
    kernel, padding, ceil = op.option(1, "kernel_size"), op.option(3, "padding", 0), op.option(4, "ceil_mode", False)
    stride = op.option(2, "stride") or kernel
    pool: Any = F.avg_pool3d if dims == 3 else F.avg_pool2d
    if dims == 1:  # avg_pool1d knows no divisor
        kernel, stride, padding = (
            (*(length if isinstance(length, tuple | list) else (length,)), other)
            for length, other in ((kernel, 1), (stride, 1), (padding, 0))
        )
        ones = ones.unsqueeze(-1)
    count: Tensor = pool(ones, kernel, stride, padding, ceil, divisor_override=1).reshape(local.out.shape)
    return local.push(torch.ones_like(local.x)) / count.clamp(min=1)


def _adaptive_coefficient(op: Op, slot: int, dtype: torch.dtype) -> Tensor:
    """1 / size of the window of each output: from floor(k in / out) up to ceil((k + 1) in / out)."""
    device, dims = op.leaves[slot].device, int(op.name[-2])
    c = torch.ones((), dtype=dtype, device=device)
    for size, out in zip(op.leaves[slot].shape[-dims:], op.shape[-dims:], strict=True):
        windows = [-(-(k + 1) * size // out) - k * size // out for k in range(out)]
        c = c.unsqueeze(-1) / torch.tensor(windows, dtype=dtype, device=device)
    return c


def _dropped(op: Op, slot: int, H: Tensor, now: Pass) -> Tensor:
    assert op.slope is not None
    return _scaled_by(op.slope.to(H.dtype), H, now)


def _elementwise(op: Op, slot: int, H: Tensor, now: Pass) -> Tensor:
    """D H D + diag(residual(φ'' ∘ dL/dφ)), D = diag(φ')."""
    if now.diag and not RULES[op.name].curved and _is_one_node(op, slot, H):
        scaled = _through(op.output.node, H)
        return scaled if op.name in SWITCHES else _through(op.output.node, scaled)  # whose slope is its own square
    local = Local(op, slot, H.dtype)
    if local.out.shape != local.x.shape:
        raise op.refused("it is known for one tensor, of the shape of its output")
    with torch.enable_grad():
        ones, curved = torch.ones_like(local.out), RULES[op.name].curved
        slope = torch.autograd.grad(local.out, local.x, ones, create_graph=curved, materialize_grads=True)[0]

    def second(g: Tensor) -> Tensor:
        if not slope.requires_grad:
            return torch.zeros_like(g)
        return g * torch.autograd.grad(slope, local.x, ones, materialize_grads=True)[0]

    return _with_residual(op, _scaled_by(slope.detach(), H, now), second, now)


def _is_one_node(op: Op, slot: int, H: Tensor) -> bool:
    """Whether the node of the output is all there is between it and the argument, in the precision of H."""
    edge = op.inputs[slot]
    alike = op.output.shape == op.shape == edge.shape == H.shape and op.leaves[slot].tensor.dtype == H.dtype
    return alike and not op.packed and op.output.node.next_functions == ((edge.node, edge.number),)


def _divided(op: Op, slot: int, H: Tensor, now: Pass) -> Tensor:
    return (_one_entry if slot == 0 else _elementwise)(op, slot, H, now)


def _batch_normed(op: Op, slot: int, H: Tensor, now: Pass) -> Tensor:
    """D = weight / sqrt(var + eps), with the statistics of the batch as constants in train mode."""
    given = op.named(slot, H.dtype)
    x, weight = given("input"), given("weight")
    own = [0, *range(2, x.dim())]
    var = x.var(own, correction=0) if given("training") else given("running_var")
    c = (var + given("eps")).rsqrt() * (1 if weight is None else weight)
    return _scaled_by(c.reshape(1, -1, *[1] * (x.dim() - 2)).expand_as(x), H, now)


def _layer_rows(given: Callable[[str], Any]) -> tuple[Tensor, Tensor | None]:
    """(x [groups, m], weight [1 or groups, m]): what is normalised together."""
    size, weight = math.prod(given("normalized_shape")), given("weight")
    return given("input").reshape(-1, size), None if weight is None else weight.reshape(1, size)


def _group_rows(given: Callable[[str], Any]) -> tuple[Tensor, Tensor | None]:
    x, weight = given("input"), given("weight")
    rows = len(x) * given("num_groups")
    if weight is not None:
        weight = weight.reshape(1, -1, *[1] * (x.dim() - 2)).expand_as(x).reshape(rows, -1)
    return x.reshape(rows, -1), weight


def _normalised(rows: Callable[[Callable[[str], Any]], tuple[Tensor, Tensor | None]], centred: bool = True) -> Apply:
    """A norm over groups of m elements; diagonal form only, because it couples the elements of a group.

    With x̂ = (x - μ) / σ, y = w ∘ x̂ + b, q = w² ∘ h, e = w ∘ dL/dy and P = I - 11^T / m (I and μ = 0 where the mean
    is left alone), dx̂_k/dx_i = (P_ki - x̂_k x̂_i / m) / σ. Both parts of the new diagonal are exact,

        sum_k q_k (dx̂_k/dx_i)²    and    sum_k e_k d²x̂_k/dx_i² = (-2 x̂_i (P e)_i + e·x̂ (3 x̂_i² / m - P_ii)) / (m σ²),

    but q is only the diagonal of what arrives: an approximation wherever H at the output is not diagonal.
    """

    def apply(op: Op, slot: int, H: Tensor, now: Pass) -> Tensor:
        given = op.named(slot, H.dtype)
        (x, w), eps = rows(given), given("eps")
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        m, w = x.shape[1], torch.ones_like(x[:1]) if w is None else w
        share = 1 / m if centred else 0.0
        x = x - x.mean(1, keepdim=True) if centred else x
        variance = x.square().mean(1, keepdim=True) + eps
        x = x * variance.rsqrt()
        q = H.reshape(x.shape) * w.square()

        def total(v: Tensor) -> Tensor:
            return v.sum(1, keepdim=True)

        others = share**2 * total(q) + 2 * share / m * x * total(q * x) + x.square() * total(q * x.square()) / m**2
        new = (q * (1 - 2 * share - 2 * x.square() / m) + others) / variance

        def second(g: Tensor) -> Tensor:
            e = g.reshape(x.shape) * w
            projected = e - e.mean(1, keepdim=True) if centred else e
            own = total(e * x) * (3 * x.square() / m - (1 - share))
            return ((own - 2 * x * projected) / (m * variance)).reshape(H.shape)

        return _with_residual(op, new.reshape(H.shape), second, now)

    return apply


# -------------------------------------------------------------------------------------------------- table


class Rule(NamedTuple):
    """How H goes through one function, to one of its arguments.

    values: whether it reads the values of what it is applied to. operands: whether it reads those of the others.
    curved: whether it has a second derivative. joint: whether H may go to several arguments at once (the function is
    linear in all of them together). matrix: whether it knows the matrix form.
    """

    apply: Apply
    values: bool = False
    operands: bool = False
    curved: bool = False
    joint: bool = False
    matrix: bool = True


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


MOVES = _names(
    "flatten unflatten view view_as reshape reshape_as ravel permute transpose swapaxes swapdims movedim moveaxis t T "
    "mT unsqueeze squeeze getitem select narrow index_select gather take_along_dim expand expand_as broadcast_to "
    "repeat repeat_interleave tile cat concat concatenate stack hstack vstack chunk split tensor_split unbind roll "
    "flip rot90 pad unfold pixel_shuffle pixel_unshuffle "
    "channel_shuffle tril triu where masked_fill diagonal"
)
COPIES = _names("contiguous clone to float double half bfloat16 type_as type positive alias")
MAX_POOLS = frozenset(
    f"{kind}{d}d{suffix}"
    for kind in ("max_pool", "adaptive_max_pool")
    for d in (1, 2, 3)
    for suffix in ("", "_with_indices")
)
SUMS = _names("add sub subtract rsub radd neg negative")
PRODUCTS = _names("mul multiply rmul")
QUOTIENTS = _names("div divide true_divide")
WEIGHTED = _names("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
MATRIX_PRODUCTS = _names("matmul mm bmm rmatmul")
DROPOUTS = _names("dropout native_dropout dropout1d dropout2d dropout3d feature_dropout")
PIECEWISE_LINEAR = _names(
    "relu relu6 leaky_relu prelu hardtanh hardsigmoid hardshrink softshrink threshold abs absolute clamp clamp_min "
    "clamp_max clip"
)
SWITCHES = _names("relu relu6 hardtanh hardshrink softshrink threshold clamp clamp_min clamp_max clip")
CURVED = _names(
    "elu selu celu gelu silu mish hardswish softplus softsign tanhshrink tanh sigmoid expit logsigmoid log_sigmoid "
    "exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan arcsin arccos arctan sinh cosh asinh acosh atanh "
    "arcsinh arccosh arctanh sqrt rsqrt square reciprocal rdiv rtruediv pow rpow float_power erf erfc sinc logit"
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(COPIES, Rule(_copied)),
    **dict.fromkeys(MOVES, Rule(_moved, joint=True)),
    **dict.fromkeys(MAX_POOLS, Rule(_moved, values=True)),
    **dict.fromkeys(SUMS, Rule(_one_entry, joint=True)),
    **dict.fromkeys(PRODUCTS, Rule(_one_entry, operands=True)),
    **dict.fromkeys(QUOTIENTS, Rule(_divided, values=True, operands=True, curved=True)),
    **dict.fromkeys(WEIGHTED, Rule(_weighted, operands=True)),
    **dict.fromkeys(MATRIX_PRODUCTS, Rule(_weighted, operands=True)),
    **dict.fromkeys(DROPOUTS, Rule(_dropped)),
    **dict.fromkeys(PIECEWISE_LINEAR, Rule(_elementwise, values=True)),
    **dict.fromkeys(CURVED, Rule(_elementwise, values=True, curved=True)),
    **dict.fromkeys([f"avg_pool{d}d" for d in (1, 2, 3)], Rule(_averaged(_pool_coefficient))),
    **dict.fromkeys([f"adaptive_avg_pool{d}d" for d in (1, 2, 3)], Rule(_averaged(_adaptive_coefficient))),
    "mean": Rule(_averaged(_mean_coefficient)),
    "sum": Rule(_averaged(lambda op, slot, dtype: 1.0)),
    "batch_norm": Rule(_batch_normed, values=True),
    "layer_norm": Rule(_normalised(_layer_rows), values=True, curved=True, matrix=False),
    "rms_norm": Rule(_normalised(_layer_rows, centred=False), values=True, curved=True, matrix=False),
    "group_norm": Rule(_normalised(_group_rows), values=True, curved=True, matrix=False),
}


# ---------------------------------------------------------------------------------------------- recursion


def propagate(
    tape: Tape,
    output_edge: Edge,
    seed: Tensor,
    gradient_at: Gradients,
    form: str,
    residual: str = "keep",
    max_dim: int = 2048,
    targets: Collection[Key] | None = None,
) -> dict[Key, Tensor]:
    """H at the output of every operation between `output_edge` and the targets, by edge.

    The graph must still hold what it has saved.

    Args:
        seed: H there: form "diag" a tensor shaped like the output, "matrix" a mean over samples [d, d].
        gradient_at: dL/d(tensor) at each of some edges; called at most once, for what `residual` needs.
        residual: what becomes of second derivatives, sample by sample: "keep" (the Hessian), "zero" (Gauss-Newton),
            "abs" or "clip" (at 0 from below).
        max_dim: the largest d in the matrix form.
        targets: edges of the outputs of layers; what lies below all of them needs no rule. None: everything.
    """
    if form not in ("diag", "matrix"):
        raise ValueError(f'form={form!r}: pass "diag" or "matrix"')
    if residual not in RESIDUALS:
        raise ValueError(f"residual={residual!r}: pass one of {', '.join(map(repr, RESIDUALS))}")
    n = 1 if form == "diag" else output_edge.shape.numel() // len(seed)
    now = Pass(form, n, None if residual == "zero" else RESIDUALS[residual])
    steps = _steps(tape, output_edge, targets)
    for op, slots in steps:
        _check(op, slots, now, max_dim)
    if now.residual is not None:
        curved = [op.output for op, _ in steps if RULES[op.name].curved]
        gradients = gradient_at(curved) if curved else []
        now.gradients = {_key(edge): g.detach() for edge, g in zip(curved, gradients, strict=True)}

    found: dict[Key, Tensor] = {_key(output_edge): seed.detach()}
    for op, slots in steps:
        key = _key(op.output)  # after its step, what is not asked for gives its memory back
        H = found[key] if targets is None or key in targets else found.pop(key)
        H = H.reshape(op.shape) if now.diag else H
        for slot in slots:
            edge = op.inputs[slot]
            new = RULES[op.name].apply(op, slot, H, now).detach().to(seed.dtype)
            before = found.get(_key(edge))
            found[_key(edge)] = new if before is None else before + new.reshape(before.shape)
    if now.diag:  # an edge stands for every view that keeps the order: as its operation made it
        made = {_key(op.output): op.shape for op in tape.ops}
        found = {key: H.reshape(made.get(key, H.shape)) for key, H in found.items()}
    return found


def _steps(tape: Tape, output: Edge, targets: Collection[Key] | None) -> list[tuple[Op, list[int]]]:
    """(operation, arguments that depend on a target), from the output backwards."""
    made = {_key(op.output) for op in tape.ops}
    nodes = {node for node, _ in made}
    reached = set(made) if targets is None else set(targets)
    gaps: dict[Key, str] = {}  # what no function on the tape made, though it depends on a target: its place

    def reaches(edge: Edge, number: int, after: str) -> bool:
        key = _key(edge)
        if key in made or key in reached or key in gaps:
            return key in reached or key in gaps
        below = _below(edge.node, nodes)
        if any(node in below for node, _ in reached):
            gaps[key] = _place(edge.node.name(), number, after)
        return key in gaps

    slots = {}
    for op in tape.ops:
        slots[op] = [slot for slot, edge in op.inputs.items() if reaches(edge, op.number, op.after)]
        if slots[op]:
            reached.add(_key(op.output))
    reaches(output, tape.calls + 1, tape.last)

    needed, steps = {_key(output)}, []
    for op in reversed(tape.ops):
        if _key(op.output) in needed and slots[op]:
            steps.append((op, slots[op]))
            needed |= {_key(op.inputs[slot]) for slot in slots[op]}
    for key, place in gaps.items():
        if key in needed:
            raise _refused(place, "no torch function that made it was seen (a custom function, or an edit of a part)")
    return steps


def _below(start: Node, nodes: set[Node]) -> set[Node]:
    """Which of `nodes` are met first on the ways down from `start`."""
    met, seen, todo = set(), {start}, [start]
    while todo:
        node = todo.pop()
        if node in nodes and node is not start:
            met.add(node)
            continue
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                todo.append(below)
    return met


def _check(op: Op, slots: list[int], now: Pass, max_dim: int) -> None:
    """Refusals, before anything is computed."""
    rule = RULES.get(op.name)
    if rule is None:
        raise op.refused("there is no rule for this function")
    if len(slots) > 1 and not rule.joint:
        raise op.refused("more than one of its arguments depends on layers")
    if now.diag:
        return
    if not rule.matrix:
        raise op.refused('there is no rule for matrices; use approx="diag"')
    d = max(edge.shape.numel() // now.n for edge in [op.output, *(op.inputs[slot] for slot in slots)])
    if d > max_dim:
        raise ValueError(
            f"at {op.place} the Hessian is a {d} x {d} matrix, above the limit of {max_dim}: use "
            f'approx="diag" or raise max_hessian_dim'
        )
