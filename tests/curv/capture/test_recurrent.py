"""The unrolled recurrent functions, against torch's fused ones in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode

from torchcurv import SecondOrderOptimizer
from torchcurv.curv.layers.recurrent import UNROLLED

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

I, H = 3, 4  # noqa: E741
LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "lstm_proj": lambda *args, **options: nn.LSTM(*args, proj_size=2, **options),
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options),
}
CELLS: dict[str, Callable[..., nn.RNNCellBase]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn_tanh": nn.RNNCell,
    "rnn_relu": lambda *args, **options: nn.RNNCell(*args, nonlinearity="relu", **options),
}


class Unroll(TorchFunctionMode):
    """Replaces torch's functions, and notes the shape of the input and the parameters of each product."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[str] = []
        self.calls: list[tuple[tuple[int, ...], Tensor, Tensor | None]] = []

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.calls.append((tuple(x.shape), weight, bias))
        return F.linear(x, weight, bias)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in UNROLLED:
            self.functions.append(func.__name__)
            return UNROLLED[func](self.linear, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def make(factory: Callable[..., nn.Module], *args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return factory(I, H, *args, **{"dtype": torch.float64, **options})


def flatten(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for part in out for t in flatten(part)]


def shape_of(out: Any) -> Any:
    return out.shape if isinstance(out, Tensor) else tuple(map(shape_of, out))


def agree(module: nn.Module, x: Tensor, hx: Tensor | tuple[Tensor, ...] | None = None, tol: float = 1e-12) -> Unroll:
    """Same outputs, same gradients, and the same state of the generator afterwards."""
    leaves = [t.requires_grad_() for t in (x, *([] if hx is None else flatten(hx)))] + list(module.parameters())

    def outcome(mode: Unroll | None) -> tuple[Any, list[Tensor], Tensor]:
        torch.manual_seed(1)
        if mode is None:
            out = module(x, hx)
        else:
            with mode:
                out = module(x, hx)
        state = torch.get_rng_state()
        loss = sum((t * torch.randn_like(t)).sum() for t in flatten(out))
        return out, flatten(out) + list(torch.autograd.grad(loss, leaves)), state

    fused, truth, state = outcome(None)
    mode = Unroll()
    ours, values, our_state = outcome(mode)
    assert len(mode.functions) == 1
    assert shape_of(ours) == shape_of(fused)
    assert [t.dtype for t in values] == [t.dtype for t in truth]
    assert torch.equal(our_state, state)
    torch.testing.assert_close(values, truth, rtol=tol, atol=tol)
    return mode


def initial(module: nn.RNNBase, n: tuple[int, ...]) -> Tensor | tuple[Tensor, Tensor]:
    """Initial states other than zero; n is () for inputs without a batch dimension."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    h = randn(count, *n, module.proj_size or H)
    return (h, randn(count, *n, H)) if isinstance(module, nn.LSTM) else h


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.pairwise
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_equal_torch(kind, num_layers, bias, bidirectional):
    module = make(LAYERS[kind], num_layers, bias=bias, bidirectional=bidirectional)
    mode = agree(module, randn(5, 2, I), initial(module, (2,)))
    assert mode.functions == [kind.removesuffix("_proj")]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    num_layers=st.integers(1, 3),
    bias=st.booleans(),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    batched=st.booleans(),
    given_state=st.booleans(),
    dropout=st.sampled_from([0.0, 0.4, 1.0]),
    train=st.booleans(),
    n=st.integers(1, 3),
    t=st.integers(1, 4),
)
def test_all_settings_equal_torch(
    kind, num_layers, bias, bidirectional, batch_first, batched, given_state, dropout, train, n, t
):
    module = make(
        LAYERS[kind],
        num_layers,
        bias=bias,
        bidirectional=bidirectional,
        batch_first=batch_first,
        dropout=dropout if num_layers > 1 else 0.0,  # which torch warns about
    ).train(train)
    shape = ((n, t) if batch_first else (t, n)) if batched else (t,)
    agree(module, randn(*shape, I), initial(module, (n,) if batched else ()) if given_state else None)


@pytest.mark.pairwise
@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize("batch", [(), (1,), (3,)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_equal_torch(kind, bias, batch, given_state):
    module, state = make(CELLS[kind], bias=bias), None
    if given_state:
        state = (randn(*batch, H), randn(*batch, H)) if kind == "lstm" else randn(*batch, H)
    mode = agree(module, randn(*batch, I), state)
    assert mode.functions == [f"{kind}_cell"]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # torch computes an LSTM in float32 by other kernels
@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_draws_what_torch_draws(kind, dtype, batch_first):
    module = make(LAYERS[kind], 3, dropout=0.5, bidirectional=True, batch_first=batch_first, dtype=dtype)
    x = randn(6, 5, I).to(dtype)
    agree(module, x, tol=1e-12 if dtype == torch.float64 else 1e-4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with Unroll():
        module(x)
    assert not torch.equal(torch.get_rng_state(), before)


def test_arguments_by_keyword():
    gru, x, h = make(nn.GRU), randn(5, 2, I), randn(1, 2, H)
    options = {"has_biases": True, "num_layers": 1, "dropout": 0.0, "train": True, "bidirectional": False}
    ours = UNROLLED[torch.gru](F.linear, input=x, hx=h, params=gru._flat_weights, **options, batch_first=False)
    torch.testing.assert_close(ours, gru(x, h), rtol=1e-12, atol=1e-12)
    cell, h = make(nn.GRUCell), randn(2, H)
    params = {"w_ih": cell.weight_ih, "w_hh": cell.weight_hh, "b_ih": cell.bias_ih, "b_hh": cell.bias_hh}
    ours = UNROLLED[torch.gru_cell](F.linear, input=x[0], hx=h, **params)
    torch.testing.assert_close(ours, cell(x[0], h), rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------------- what linear sees


def check_calls(calls, expected):
    assert [shape for shape, _, _ in calls] == [shape for shape, _, _ in expected]
    for (_, weight, bias), (_, expected_weight, expected_bias) in zip(calls, expected, strict=True):
        assert weight is expected_weight
        assert bias is expected_bias


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_linear_gets_the_parameters_and_the_batch_first(kind, bias, batch_first):
    n, t = 2, 5
    module = make(LAYERS[kind], 2, bias=bias, bidirectional=True, batch_first=batch_first)
    mode = agree(module, randn(*((n, t) if batch_first else (t, n)), I))
    out = module.proj_size or H
    expected = []
    for layer in range(2):
        for direction in ("", "_reverse"):
            ih, hh, hr = (getattr(module, f"weight_{w}_l{layer}{direction}", None) for w in ("ih", "hh", "hr"))
            b_ih, b_hh = (getattr(module, f"bias_{b}_l{layer}{direction}", None) for b in ("ih", "hh"))
            expected.append(((n, t, 2 * out if layer else I), ih, b_ih))
            expected += ([((n, out), hh, b_hh)] + [((n, H), hr, None)] * (hr is not None)) * t
    check_calls(mode.calls, expected)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_linear_gets_the_parameters_of_a_cell(kind, bias, batched):
    module = make(CELLS[kind], bias=bias)
    mode = agree(module, randn(3, I) if batched else randn(I))
    n = 3 if batched else 1
    ih, hh = module.weight_ih, module.weight_hh
    check_calls(mode.calls, [((n, I), ih, module.bias_ih), ((n, H), hh, module.bias_hh)])


def test_an_input_without_a_batch_is_a_batch_of_one():
    mode = agree(make(nn.LSTM), randn(5, I))
    assert [shape for shape, _, _ in mode.calls] == [(1, 5, I)] + [(1, H)] * 5


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences_are_left_to_torch(kind):
    packed, module = pack_padded_sequence(randn(3, 2, I), torch.tensor([3, 2])), make(LAYERS[kind])
    optimizer = SecondOrderOptimizer(module, loss_fn=None, approx="diag")
    assert torch.equal(module(packed)[0].data, make(LAYERS[kind])(packed)[0].data)
    optimizer.remove()
