"""torch's fused recurrent functions, step by step, with every product with a weight in the caller's hands.

    UNROLLED[torch.lstm](linear, *args) == torch.lstm(*args)

linear(x, weight, bias) computes F.linear and may record it. It is called with the tensors of args themselves:
    once per layer and direction with the whole input sequence, batch first: [n, t, i]
    once per time step, in the order of the recurrence, with the hidden state: [n, h]
    and, in an LSTM with proj_size, once per time step with what is projected: [n, h]
A cell, which is one time step, calls it once with [n, i] and once with [n, h].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
State = tuple[Tensor, ...]  # (h,), and (h, c) for an LSTM
Gates = Callable[[Tensor, Tensor, State], State]  # (W_i x + b_i, W_h h + b_h, state) -> next state


class Weights(NamedTuple):
    """The parameters of one layer in one direction."""

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    hr: Tensor | None = None  # the projection of an LSTM with proj_size


# ----------------------------------------------------------------------------------------------- gates


def _tanh(x: Tensor, h: Tensor, state: State) -> State:
    return (torch.tanh(x + h),)


def _relu(x: Tensor, h: Tensor, state: State) -> State:
    return (torch.relu(x + h),)


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), h.chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return ((1 - z) * n + z * state[0],)


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


# ---------------------------------------------------------------------------------------------- unrolling


def _step(linear: Linear, gates: Gates, x: Tensor, state: State, weights: Weights) -> State:
    """One time step; x is W_i x + b_i."""
    h, *c = gates(x, linear(state[0], weights.hh, weights.bias_hh), state)
    if weights.hr is not None:
        h = linear(h, weights.hr, None)
    return (h, *c)


def _layer(
    linear: Linear, gates: Gates, input: Tensor, state: State, weights: Weights, reverse: bool
) -> tuple[Tensor, State]:
    """One layer in one direction: [t, n, i] -> [t, n, h] and the last state."""
    xs = linear(input.transpose(0, 1), weights.ih, weights.bias_ih).unbind(1)
    outputs = []
    for x in reversed(xs) if reverse else xs:
        state = _step(linear, gates, x, state, weights)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state


def _per_layer(params: Sequence[Tensor], has_biases: bool, count: int) -> Iterator[Weights]:
    """torch's flat list, in which biases and projections that a module lacks are left out."""
    size = len(params) // count
    for start in range(0, len(params), size):
        ih, hh, *rest = params[start : start + size]
        biases = (rest.pop(0), rest.pop(0)) if has_biases else (None, None)
        yield Weights(ih, hh, *biases, *rest)


def _sequence(gates: Gates) -> Callable[..., tuple[Tensor, ...]]:
    """torch's function over a whole sequence: (output, h_n), and c_n for an LSTM."""

    def unrolled(
        linear: Linear,
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        directions = (False, True) if bidirectional else (False,)
        initial = zip(*([hx] if isinstance(hx, Tensor) else hx), strict=True)
        weights = _per_layer(params, has_biases, num_layers * len(directions))
        final: list[State] = []
        # time first throughout, as in torch: dropout draws in the order of memory
        output = input.transpose(0, 1) if batch_first else input
        for layer in range(num_layers):
            if layer > 0:
                output = F.dropout(output, dropout, train)
            outputs = []
            for reverse in directions:
                out, state = _layer(linear, gates, output, next(initial), next(weights), reverse)
                outputs.append(out)
                final.append(state)
            output = torch.cat(outputs, -1)
        states = map(torch.stack, zip(*final, strict=True))
        return output.transpose(0, 1) if batch_first else output, *states

    return unrolled


def _cell(gates: Gates) -> Callable[..., Tensor | State]:
    """torch's function for one time step: the next h, and (h, c) for an LSTM."""

    def unrolled(
        linear: Linear,
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor | State:
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        state = _step(linear, gates, linear(input, w_ih, b_ih), state, Weights(w_ih, w_hh, b_ih, b_hh))
        return state[0] if isinstance(hx, Tensor) else state

    return unrolled


UNROLLED: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm: _sequence(_lstm),
    torch.gru: _sequence(_gru),
    torch.rnn_tanh: _sequence(_tanh),
    torch.rnn_relu: _sequence(_relu),
    torch.lstm_cell: _cell(_lstm),
    torch.gru_cell: _cell(_gru),
    torch.rnn_tanh_cell: _cell(_tanh),
    torch.rnn_relu_cell: _cell(_relu),
}


class Unrolled(TorchFunctionMode):
    """While it is active, recurrent functions run step by step."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        unrolled = UNROLLED.get(func)
        return func(*args, **(kwargs or {})) if unrolled is None else unrolled(F.linear, *args, **(kwargs or {}))


@contextmanager
def unfused() -> Iterator[None]:
    """Attention and recurrent layers by functions that have a derivative of every order, and in forward mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), Unrolled():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
