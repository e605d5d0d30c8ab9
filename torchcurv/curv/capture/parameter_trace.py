"""Inner layers: parameters that are used inside a module's forward, where no hook on a module sees them.

    nn.MultiheadAttention               q, k and v (rows of in_proj, or weights of their own) and out_proj
    nn.LSTM, GRU, RNN and their cells   one linear map of the inputs, one of the hidden state, for each layer
    bare Parameters of a user's module  biases and scales: added to, or multiplied with, something of the batch

While a due forward pass runs such a module, a `ParameterTrace` sees the torch functions it calls and notes the
products it knows. Attention runs torch's own code; fused recurrent functions run step by step (recurrent.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchcurv.curv.compiler import uncompiled
from torchcurv.curv.graph import base_of, function_modes
from torchcurv.curv.layers.inner_layers import Rows
from torchcurv.curv.layers.products import CONTRACTIONS, Layout, Product, products_with
from torchcurv.curv.layers.recurrent import UNROLLED

Read = Callable[[Tensor], Tensor]
# (parameter, the rows of it that were used, the batch's input, output, from the gradient there to dz of the batch)
Note = Callable[[Tensor, Rows, Tensor, Tensor, Read], Tensor]

# ------------------------------------------------------------------------------------------ bare parameters


@dataclass(frozen=True)
class Bare:
    """A tensor made from a bare parameter by moving and repeating its elements: factor * parameter[index] + const."""

    tensor: Tensor  # kept, so that its id stays its own
    param: Tensor
    index: Tensor
    factor: float = 1.0

    @property
    def batched(self) -> bool:
        """Whether dimension 0 repeats the others, as a batch does."""
        index = self.index
        if not index.dim() or not len(index):
            return False
        return len(index) == 1 or index.stride(0) == 0 or bool((index == index[:1]).all())


def _of(*names: str) -> set[Any]:
    owners = (torch.Tensor, torch)
    return {getattr(owner, name) for owner in owners for name in names if hasattr(owner, name)}


_MOVES = _of(
    "__getitem__", "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose", "permute", "t",
    "movedim", "swapaxes", "expand", "expand_as", "broadcast_to", "repeat", "select", "narrow", "view_as",
)  # fmt: skip
_MOVES |= {torch.Tensor.T.__get__, torch.Tensor.mT.__get__}  # type: ignore[attr-defined]
_KEEPS = _of("to", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone", "cuda", "cpu")
# What layers with a view are about, by torch's own forward.
LAYER_FUNCTIONS = {
    *(F.linear, F.embedding, F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, F.instance_norm, F.prelu),
    *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}
# What else may be done with the weight of a linear layer, or its transpose, as second argument (after a bias: third).
_MATRIX_PRODUCTS = _of("matmul", "mm") | {torch.Tensor.__matmul__, torch.addmm}
_WITH_WEIGHTS = LAYER_FUNCTIONS | _MATRIX_PRODUCTS
_ADDS, _SUBTRACTS = _of("add", "add_", "__radd__"), _of("sub", "sub_", "subtract")
_MULTIPLIES = _of("mul", "mul_", "multiply", "__rmul__")

# ------------------------------------------------------------------------------------- opaque parameters


class CannotRunAgain(Exception):
    """A module cannot be run sample by sample: it draws random numbers, changes its buffers, looks at its data."""


def sample_gradients(
    module: nn.Module, name: str, param: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int
) -> Read:
    """dz [batch, ...] at the module's output -> the gradient of the parameter for each sample [batch, numel].

    The module is run again, sample by sample under vmap: right for modules whose samples do not meet.
    """
    names = list(kwargs)
    given = [x.detach() if isinstance(x, Tensor) else x for x in (*args, *kwargs.values())]
    batched = [k for k, x in enumerate(given) if isinstance(x, Tensor) and x.dim() and len(x) == batch]

    def one(dz: Tensor, *own: Tensor) -> Tensor:
        mine = dict(zip(batched, own, strict=True))
        x = [mine[k].unsqueeze(0) if k in mine else value for k, value in enumerate(given)]
        positional, named = tuple(x[: len(args)]), dict(zip(names, x[len(args) :], strict=True))

        def output(p: Tensor) -> Tensor:
            out = torch.func.functional_call(module, {name: p}, positional, named)
            return out[0] if isinstance(out, tuple) else out

        pull: Any = torch.func.vjp(output, param)[1]
        return pull(dz.unsqueeze(0))[0]

    def read(dz: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            try:
                return torch.func.vmap(one)(dz, *(given[k] for k in batched)).reshape(batch, -1)
            except RuntimeError as error:
                raise CannotRunAgain(f"{name} of a {type(module).__name__}") from error

    return read


# ------------------------------------------------------------------------------------------------ watch


class ParameterTrace(TorchFunctionMode):
    """Notes what one module computes with its inner layers while it is active.

    note: called for each product. batch: dimension 0 of what the module was given. bare: its bare parameters.
    unknown: called with a bare parameter and the function that used it in a way that is not known.
    at_function: called with (parameter, input, output) of a function of `LAYER_FUNCTIONS` that is given a parameter
    whose id is in `functions`. at_products: called with the products that a function is, and its output, where they
    are those of parameters whose ids are in `weights`. seen: called with a bare parameter of which that is still to be
    known, and how it is laid out.
    """

    def __init__(
        self,
        note: Note,
        batch: int | None,
        bare: Iterable[Tensor],
        unknown: Callable[[Tensor, str], object],
        at_function: Callable[[Tensor, Tensor, Tensor], Tensor],
        functions: AbstractSet[int],
        at_products: Callable[[list[Product], Tensor], Tensor],
        weights: AbstractSet[int],
        seen: Callable[[Tensor, Layout], object],
    ) -> None:
        super().__init__()
        self.note, self.batch, self.unknown = note, batch, unknown
        self.at_function, self.functions = at_function, functions
        self.at_products, self.weights, self.seen = at_products, weights, seen
        self._multiplied = weights | {id(p) for p in bare}
        self.bare = {id(p): Bare(p, p, torch.arange(p.numel()).reshape(p.shape)) for p in bare}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return uncompiled(self._run, (func, args, kwargs), {})
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.multi_head_attention_forward:
            return self._attention(*args, **kwargs)
        if func in UNROLLED and not (len(args) > 3 and isinstance(args[3], tuple | list)):  # of packed sequences
            return UNROLLED[func](self._linear, *args, **kwargs)
        if func in _WITH_WEIGHTS and len(args) > 1:
            own = next((p for x in (*args[1:], *kwargs.values()) if (p := self._of_function(x)) is not None), None)
            if own is not None:
                return self.at_function(own, args[func is torch.addmm], func(*args, **kwargs))
        known = self._products(func, args, kwargs) if len(args) > 1 else []
        if known:
            return self.at_products(known, func(*args, **kwargs))
        if self.bare:
            return self._bare_function(func, args, kwargs)
        return func(*args, **kwargs)

    def _of_function(self, x: Any) -> Tensor | None:
        """The parameter of `functions` that this is, or is the transpose of."""
        if not isinstance(x, Tensor):
            return None
        if id(x) in self.functions:
            return x
        base = base_of(x)
        return base if base is not None and id(base) in self.functions and x.dim() == 2 else None

    # ------------------------------------------------------------------------------------ products

    def _products(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Product]:
        """Those with parameters that are known as weights; others are told of."""
        if not self._multiplied or func not in CONTRACTIONS:
            return []
        found = products_with(self._multiplied_one, func, args, kwargs)
        for one in found:
            if id(one.param) not in self.weights:
                self.seen(one.param, one.layout)
        return [one for one in found if id(one.param) in self.weights]

    def _multiplied_one(self, x: Tensor) -> Tensor | None:
        own = x if id(x) in self._multiplied else base_of(x)
        return own if own is not None and id(own) in self._multiplied else None

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._noted(x, weight, F.linear(x, weight, bias), lambda tensor: tensor)

    def _attention(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """torch's attention, with a `linear` that notes. Its tensors are time-major, [t, n, e] or [t n, e]."""
        n = query.shape[1] if query.dim() == 3 else 1

        def batch_first(tensor: Tensor) -> Tensor:
            return tensor.reshape(-1, n, tensor.shape[-1]).transpose(0, 1)

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return self._noted(x, weight, F.linear(x, weight, bias), batch_first)

        return _rebound_attention(linear)(query, *args, **kwargs)

    def _noted(self, x: Tensor, weight: Tensor, out: Tensor, batch_first: Read) -> Tensor:
        stored = weight if (base := base_of(weight)) is None else base
        start = (weight.storage_offset() - stored.storage_offset()) // max(1, stored.stride(0))
        rows, given = slice(start, start + len(weight)), batch_first(x.detach())
        others = [trace.note for trace in _active_traces()]
        for note in dict.fromkeys([self.note, *others]):  # one for each optimizer on the model
            out = note(stored, rows, given, out, batch_first)
        return out

    # ------------------------------------------------------------------------------ bare parameters

    def _bare_function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [self.bare[id(x)] for x in _flat((args, tuple(kwargs.values()))) if id(x) in self.bare]
        if not given:
            return func(*args, **kwargs)
        if len(given) == 1 and len(args) and id(args[0]) in self.bare and func in _MOVES | _KEEPS:
            (one,) = given
            out = func(*args, **kwargs)
            index = one.index if func in _KEEPS else func(one.index, *args[1:], **kwargs)
            return self._derived(one, out, index, one.factor)
        if len(given) == 1 and len(args) == 2 and func in _ADDS | _SUBTRACTS | _MULTIPLIES:
            return self._elementwise(func, given[0], args, kwargs)
        out = func(*args, **kwargs)
        if any(isinstance(x, Tensor) and x.requires_grad for x in _flat(out)):
            for one in given:
                if one.batched and len(one.index) == self.batch and one.tensor.requires_grad:
                    self._note_bare(one, one.tensor, one.index, one.factor, None)
                else:
                    self.unknown(one.param, getattr(func, "__name__", str(func)))
        return out

    def _derived(self, one: Bare, out: Tensor, index: Tensor, factor: float) -> Tensor:
        if isinstance(out, Tensor) and torch.is_grad_enabled() and index.shape == out.shape:
            self.bare[id(out)] = Bare(out, one.param, index, factor)
        return out

    def _elementwise(self, func: Any, one: Bare, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """z = x + p, x - p, p - x, x * p; the other operand is a number or something of the batch."""
        first = id(args[0]) in self.bare
        other = args[1] if first else args[0]
        scale = other.detach() if isinstance(other, Tensor) and func in _MULTIPLIES else None
        if scale is not None and func is torch.Tensor.mul_:
            scale = scale.clone()
        factor = one.factor
        out: Tensor = func(*args, **kwargs)
        if func in _MULTIPLIES:
            if scale is None:
                factor = factor * other
        elif not first:
            factor *= kwargs.get("alpha", 1) * (-1 if func in _SUBTRACTS else 1)
        if not isinstance(other, Tensor):
            return self._derived(one, out, one.index, factor)
        index = one.index.expand(out.shape)
        made = Bare(out, one.param, index, factor)
        if not made.batched or (self.batch is not None and len(out) != self.batch):
            self.unknown(one.param, func.__name__)
            return out
        return self._note_bare(made, out, index, factor, scale)

    def _note_bare(self, one: Bare, out: Tensor, index: Tensor, factor: float, scale: Tensor | None) -> Tensor:
        places, size, shape = index[0].flatten().to(out.device), one.param.numel(), out.shape

        def gradient_of_samples(dz: Tensor) -> Tensor:
            dz = dz.reshape(shape) * factor
            dz = (dz if scale is None else dz * scale).reshape(shape[0], -1)
            return dz.new_zeros(shape[0], size).index_add_(1, places, dz)

        x = out.new_empty(len(out)) if scale is None or scale.shape[:1] != out.shape[:1] else scale
        return self.note(one.param, None, x, out, gradient_of_samples)


def _active_traces() -> list[ParameterTrace]:
    """Of each optimizer on the model one, and of modules around this one."""
    return [mode for mode in function_modes() if isinstance(mode, ParameterTrace)]


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _rebound_attention(linear: Any) -> Callable[..., Any]:
    """F.multi_head_attention_forward, and the projections it calls, with another `linear` in their globals."""
    scope = {**vars(F), "linear": linear, "has_torch_function": lambda _: False}
    for name in ("_in_projection_packed", "_in_projection", "multi_head_attention_forward"):
        function = getattr(F, name)
        rebound = FunctionType(function.__code__, scope, name, function.__defaults__, function.__closure__)
        rebound.__kwdefaults__ = function.__kwdefaults__
        scope[name] = rebound
    return scope["multi_head_attention_forward"]
