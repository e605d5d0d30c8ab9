"""H carried backwards through the functions between layers, against dense Jacobians of every function.

A net is a list of nodes (function, indices of its inputs); node 0 is the input. The oracle walks it backwards with
the Jacobians that torch.func takes of each function alone, and knows nothing of rules.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from cases import randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import torchcurv.curv.hessian.propagate as module
from torchcurv.curv.graph import edge_of
from torchcurv.curv.hessian.local import RESIDUALS, Treatment
from torchcurv.curv.hessian.tape import Tape

TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def propagate(tape, edge, seed, gradient_at, form, residual="keep", targets=None, **how):
    return module.propagate(tape, edge, seed, gradient_at, form, Treatment(residual, **how), targets)


# --- nets ---------------------------------------------------------------------------------------------------


class N(NamedTuple):
    """A node. twin: the same function out of place, or with its randomness fixed, for the oracle."""

    fn: Callable[..., Tensor]
    inputs: tuple[int, ...]
    twin: Callable[..., Tensor] | None = None


class Net(NamedTuple):
    id: str
    shape: tuple[int, ...]  # of a sample
    nodes: Callable[[], list[N]]
    matrix: bool = True  # whether there is a matrix form


def chain(id: str, shape: tuple[int, ...], *functions, matrix: bool = True) -> Net:
    """functions: makers of modules, plain functions, or pairs (function, twin)."""

    def nodes() -> list[N]:
        built = []
        for k, f in enumerate(functions):
            f, twin = f if isinstance(f, tuple) else (f, None)
            f = seeded(f, k) if isinstance(f, Maker) else f
            built.append(N(f, (k,), twin))
        return built

    return Net(id, shape, nodes, matrix)


class Maker:
    """A module to be made under a seed, its parameters and statistics at random."""

    def __init__(self, make: Callable[..., nn.Module], *args, train: bool = True, **kwargs) -> None:
        self.make, self.args, self.train, self.kwargs = make, args, train, kwargs

    def __call__(self) -> nn.Module:
        module = self.make(*self.args, **self.kwargs).train(self.train)
        with torch.no_grad():
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 2) if "running_var" in name else tensor.normal_(0, 0.6)
        return module


def linear(i: int, o: int, **kwargs) -> Maker:
    return Maker(nn.Linear, i, o, **kwargs)


def conv(*args, **kwargs) -> Maker:
    return Maker(nn.Conv2d, *args, **kwargs)


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


SMOOTH = [
    chain("tanh", (4,), linear(4, 5), torch.tanh, linear(5, 4), torch.tanh, linear(4, 3)),
    chain("mixed", (4,), linear(4, 5), F.gelu, linear(5, 4), F.silu, linear(4, 4), F.softplus, linear(4, 3)),
    chain("conv", (2, 4, 4), conv(2, 2, 3), torch.sigmoid, flat, linear(8, 4), F.elu, linear(4, 3)),
    chain("pools", (1, 4, 4), conv(1, 2, 1), torch.tanh, nn.AvgPool2d(3, 1, 1), F.mish, conv(2, 2, 2), torch.exp, flat),
]

ACTIVATIONS = [
    F.relu, F.leaky_relu, F.relu6, F.hardtanh, F.hardswish, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus,
    F.softsign, F.tanhshrink, F.softshrink, F.hardshrink, F.logsigmoid, torch.tanh, torch.sigmoid, torch.exp, torch.sin,
    torch.erf, torch.square, torch.Tensor.abs, lambda x: F.threshold(x, 0.1, -1),
    lambda x: F.gelu(x, approximate="tanh"), lambda x: x**3,
    lambda x: 2.0**x, lambda x: 1 / (x + 5), lambda x: x.clamp(-0.5, 0.7), lambda x: x * x.detach(),
]  # fmt: skip


def activation(k: int) -> Net:
    f = ACTIVATIONS[k]
    fixed = {}  # what a detached factor was in the forward pass is a constant of the oracle too
    if f is ACTIVATIONS[-1]:
        f = (lambda x: x * fixed.setdefault("x", x.detach()), lambda x: x * fixed["x"])
    return chain(f"activation_{k}", (3,), linear(3, 4), f, linear(4, 3))


SCALE, SAMPLE_SCALE = randn(2, 1, 1, seed=5), randn(3, 2, 4, 4, seed=6)

LINEAR = [
    chain("linear_positions", (3, 2), linear(2, 3), torch.tanh, linear(3, 2), flat),
    chain("conv_stride", (2, 5, 4), conv(2, 2, 1), conv(2, 3, 3, stride=2, padding=1), flat),
    chain("conv_groups", (2, 4, 4), conv(2, 4, 1), conv(4, 2, 2, groups=2, dilation=2), flat),
    chain("conv_same", (2, 3, 3), conv(2, 2, 1), conv(2, 2, 3, padding="same", dilation=2), flat),
    chain("conv_circular", (1, 4, 4), conv(1, 2, 1), conv(2, 1, 3, padding=1, padding_mode="circular"), flat),
    chain("conv1d", (2, 6), Maker(nn.Conv1d, 2, 2, 1), Maker(nn.Conv1d, 2, 3, 3, stride=2), flat),
    chain("conv3d", (1, 3, 2, 3), Maker(nn.Conv3d, 1, 2, 1), Maker(nn.Conv3d, 2, 1, 2, padding=1, stride=2), flat),
    chain("transposed1d", (2, 3), Maker(nn.Conv1d, 2, 2, 1), Maker(nn.ConvTranspose1d, 2, 2, 3, 2, 1, 1), flat),
    chain("transposed2d", (2, 2, 2), conv(2, 4, 1), Maker(nn.ConvTranspose2d, 4, 2, 2, 2, groups=2, dilation=2), flat),
    chain(
        "transposed3d", (1, 2, 2, 1), Maker(nn.Conv3d, 1, 1, 1), Maker(nn.ConvTranspose3d, 1, 2, 2, 2, (1, 1, 0)), flat
    ),
    chain("batchnorm_eval", (2, 3, 3), conv(2, 2, 2), Maker(nn.BatchNorm2d, 2, train=False), torch.tanh, flat),
    chain("batchnorm1d_eval", (3,), linear(3, 4), Maker(nn.BatchNorm1d, 4, affine=False, train=False), torch.tanh),
    chain("matmul", (3, 2), linear(2, 2), lambda x: x @ randn(2, 3, seed=3), lambda x: randn(2, 3, seed=4) @ x, flat),
    chain(
        "scales",
        (2, 4, 4),
        conv(2, 2, 1),
        lambda x: 3 * x * SCALE,
        lambda x: x / SCALE - 1,
        lambda x: 2 - x,
        torch.neg,
        flat,
    ),
    chain("sample_scales", (2, 4, 4), conv(2, 2, 1), lambda x: x * SAMPLE_SCALE[: len(x)], torch.tanh, flat),
    chain("broadcast_scale", (1, 4, 4), conv(1, 1, 1), lambda x: x * SCALE[None], flat),
    chain("mean", (2, 3, 3), conv(2, 3, 1), lambda x: x.mean((2, 3)), torch.tanh, linear(3, 2)),
    chain("sum", (2, 3, 3), conv(2, 3, 1), lambda x: torch.sum(x, 2, keepdim=True), torch.tanh, flat),
]

POOLS = [
    chain(f"{type(pool).__name__}_{k}", shape, Maker(make, shape[0], 2, 1), pool, torch.tanh, flat)
    for k, (make, shape, pool) in enumerate([
        (nn.Conv2d, (2, 4, 5), nn.AvgPool2d(2)),
        (nn.Conv2d, (2, 5, 4), nn.AvgPool2d(3, 2, 1)),
        (nn.Conv2d, (2, 5, 4), nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        (nn.Conv2d, (2, 5, 4), nn.AvgPool2d((3, 2), 2, (1, 0), ceil_mode=True)),
        (nn.Conv2d, (2, 5, 4), nn.AvgPool2d(3, 1, 1, divisor_override=5)),
        (nn.Conv1d, (2, 6), nn.AvgPool1d(3, 2, 1)),
        (nn.Conv1d, (2, 6), nn.AvgPool1d(3, 2, 1, ceil_mode=True, count_include_pad=False)),
        (nn.Conv3d, (1, 3, 2, 3), nn.AvgPool3d(2, 1, 1, count_include_pad=False)),
        (nn.Conv1d, (2, 5), nn.AdaptiveAvgPool1d(3)),
        (nn.Conv2d, (2, 5, 4), nn.AdaptiveAvgPool2d((2, 3))),
        (nn.Conv2d, (2, 3, 4), nn.AdaptiveAvgPool2d(1)),
        (nn.Conv3d, (1, 3, 2, 3), nn.AdaptiveAvgPool3d((2, 1, 2))),
        (nn.Conv1d, (2, 6), nn.MaxPool1d(3, 2, 1)),
        (nn.Conv2d, (2, 5, 4), nn.MaxPool2d(3, 1)),
        (nn.Conv2d, (2, 5, 4), nn.MaxPool2d(2, 1, dilation=2)),
        (nn.Conv3d, (1, 3, 3, 2), nn.MaxPool3d(2, 1)),
        (nn.Conv1d, (2, 5), nn.AdaptiveMaxPool1d(3)),
        (nn.Conv2d, (2, 5, 4), nn.AdaptiveMaxPool2d((3, 2))),
        (nn.Conv3d, (1, 3, 3, 2), nn.AdaptiveMaxPool3d(2)),
    ])
]  # fmt: skip
POOLS.append(
    chain("max_with_indices", (2, 4, 4), conv(2, 2, 1), lambda x: F.max_pool2d(x, 3, 1, return_indices=True)[0], flat)
)

MASK = randn(2, 3, 4, seed=8) > 0

MOVES = [
    chain(f"moves_{k}", (2, 3, 4), conv(2, 2, 1), torch.tanh, move, torch.tanh, flat)
    for k, move in enumerate([
        lambda x: x.permute(0, 3, 1, 2),
        lambda x: x.transpose(1, 2).reshape(len(x), 3, -1).unsqueeze(1),
        lambda x: x.permute(0, 2, 3, 1).contiguous().view(len(x), -1),
        lambda x: x[:, 0, ::2],
        lambda x: x[:, [1, 0, 1]],
        lambda x: x[..., -1:].expand(-1, -1, -1, 2),
        lambda x: x.squeeze(1).clone().mT,
        lambda x: x.masked_fill(MASK, 0.5),
        lambda x: torch.where(MASK, x, torch.zeros_like(x)),
        lambda x: F.pad(x, (1, 0, 2, 1)),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: x.flip(2).roll(1, 3).repeat(1, 2, 1, 1),
        lambda x: F.unfold(x, 2).chunk(2, 1)[1],
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: x.double().to(torch.float64),
    ])
]  # fmt: skip


def _dropout() -> list[N]:
    """The oracle multiplies with the mask of the forward pass; the first dropout sees zeros."""
    masks = []

    def drop(x: Tensor, f: Callable[..., Tensor] = F.dropout, **options) -> Tensor:
        state = torch.get_rng_state()
        masks.append(f(torch.ones_like(x), 0.4))
        torch.set_rng_state(state)
        return f(x, 0.4, **options)

    zeros = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)
    return [
        N(seeded(linear(3, 4)), (0,)),
        N(lambda x: x * zeros, (1,)),
        N(drop, (2,), lambda x: x * masks[0]),
        N(seeded(linear(4, 4), 1), (3,)),
        N(torch.tanh, (4,)),
        N(lambda x: x.reshape(-1, 2, 2, 1), (5,)),
        N(lambda x: drop(x, F.dropout2d), (6,), lambda x: x * masks[1]),
        N(seeded(conv(2, 3, 1), 2), (7,)),
        N(lambda x: drop(x, inplace=True), (8,), lambda x: x * masks[2]),
        N(flat, (9,)),
    ]


def _in_place() -> list[N]:
    def add(x: Tensor, y: Tensor) -> Tensor:
        x += y
        return x

    return [
        N(seeded(linear(2, 3)), (0,)),  # three dimensions: a view
        N(nn.ReLU(inplace=True), (1,), F.relu),
        N(seeded(linear(3, 3), 1), (2,)),
        N(lambda x: F.silu(x, True), (3,), F.silu),
        N(seeded(linear(3, 3), 2), (4,)),
        N(add, (5, 4), torch.add),
        N(lambda x: x.mul_(2).sub_(0.1).tanh_(), (6,), lambda x: torch.tanh(2 * x - 0.1)),
        N(seeded(linear(3, 3), 3), (7,)),
        N(lambda x: F.leaky_relu(x, 0.2, True), (8,), lambda x: F.leaky_relu(x, 0.2)),
        N(flat, (9,)),
    ]


def _residual() -> list[N]:
    return [
        N(seeded(linear(3, 4)), (0,)),
        N(torch.tanh, (1,)),
        N(seeded(linear(4, 4), 1), (2,)),
        N(lambda x, y: torch.sub(x, y, alpha=2), (1, 3)),
        N(F.gelu, (4,)),
        N(lambda x, y: x + y, (5, 2)),
        N(seeded(linear(4, 3), 2), (6,)),
    ]


def _cat() -> list[N]:
    return [
        N(seeded(linear(3, 4)), (0,)),
        N(torch.tanh, (1,)),
        N(seeded(linear(4, 2), 1), (2,)),
        N(lambda x, y: torch.cat([x, y], 1), (2, 3)),
        N(torch.sigmoid, (4,)),
        N(lambda x: x.split([2, 4], 1)[0], (5,)),
        N(lambda x: x.split([2, 4], 1)[1], (5,)),
        N(lambda x, y: torch.stack([x, y], 2), (6, 3)),
        N(flat, (8,)),
        N(lambda x, y: torch.cat((x, y), dim=-1), (9, 7)),
    ]


GRAPHS = [
    Net("dropout", (3,), _dropout),
    Net("in_place", (2, 2), _in_place),
    Net("residual", (3,), _residual),
    Net("cat", (3,), _cat),
    chain("prelu", (3, 2), linear(2, 3), Maker(nn.PReLU, 3), linear(3, 2), flat),
    chain("time_major", (3, 2), linear(2, 3), lambda x: x.transpose(0, 1), torch.tanh, linear(3, 2),
          lambda x: x.transpose(0, 1), flat, matrix=False),
]  # fmt: skip

NORMS = [
    chain("layernorm", (4,), linear(4, 4), Maker(nn.LayerNorm, 4), torch.tanh, matrix=False),
    chain("layernorm_2", (2, 3), linear(3, 3), Maker(nn.LayerNorm, (2, 3), eps=0.1), flat, matrix=False),
    chain("layernorm_plain", (2, 3), linear(3, 3), lambda x: F.layer_norm(x, (3,)), torch.tanh, flat, matrix=False),
    chain("rmsnorm", (2, 3), linear(3, 3), Maker(nn.RMSNorm, 3), torch.tanh, flat, matrix=False),
    chain("groupnorm", (2, 2, 2), conv(2, 4, 1), Maker(nn.GroupNorm, 2, 4), torch.tanh, flat, matrix=False),
]


def _two(f: Callable[..., Tensor], last: Maker) -> Callable[[], list[N]]:
    """Two branches that meet in a function."""
    return lambda: [
        N(seeded(linear(3, 4)), (0,)),
        N(torch.tanh, (1,)),
        N(seeded(linear(4, 4), 1), (2,)),
        N(f, (2, 3)),
        N(seeded(last, 2), (4,)),
        N(flat, (5,)),
    ]


PRODUCTS = [
    Net("gate", (3,), _two(lambda x, y: x * y.sigmoid(), linear(4, 3)), matrix=False),
    Net("product", (2, 3), _two(torch.mul, linear(4, 3))),
    Net("repeated", (2, 3), _two(lambda x, y: x * y[:, :1], linear(4, 3)), matrix=False),
    Net("quotient", (2, 3), _two(lambda x, y: x / (y + 3), linear(4, 3)), matrix=False),
    Net("scores", (2, 3), _two(lambda x, y: x @ y.mT, linear(2, 3)), matrix=False),
    Net("bmm", (2, 3), _two(lambda x, y: torch.bmm(x.mT, y), linear(4, 3)), matrix=False),
    Net("einsum", (2, 3), _two(lambda x, y: torch.einsum("ntc, nsc -> nst", x, y), linear(2, 3)), matrix=False),
    Net("einsum_summed", (2, 3), _two(lambda x, y: torch.einsum("ntc,nsd->ntc", x, y), linear(4, 3)), matrix=False),
    *(
        Net(f"attention_{k}", (2, 3), _two(f, linear(4, 3)), matrix=False)
        for k, f in enumerate(
            [
                lambda x, y: F.scaled_dot_product_attention(
                    x, randn(3, 2, 4), y, torch.tensor([[0.0, 1.0], [2.0, 0.5]])
                ),
                lambda x, y: F.scaled_dot_product_attention(x, y, value=randn(3, 2, 4), is_causal=True, scale=0.7),
                lambda x, y: F.scaled_dot_product_attention(
                    randn(3, 2, 4), x, y, torch.tensor([[True, False], [True, True]])
                ),
            ]
        )
    ),
    Net("einsum_plain", (2, 3), _two(lambda x, y: torch.einsum("ntc,ncs", x, y.mT), linear(2, 3)), matrix=False),
]

COUPLED = [
    chain(f"coupled_{k}", (2, 3), linear(3, 4), f, torch.tanh, flat, matrix=False)
    for k, f in enumerate([
        lambda x: F.softmax(x, -1), lambda x: x.softmax(1), lambda x: torch.log_softmax(x, 2), F.glu,
        lambda x: F.glu(x, 1), lambda x: x.var(-1), lambda x: x.logsumexp((1, 2), True),
        lambda x: F.normalize(x, dim=-1),
        lambda x: x.norm(dim=1, keepdim=True), lambda x: x.std((1, 2), keepdim=True),
    ])
]  # fmt: skip

RESAMPLED = [
    chain(f"resampled_{k}", (2, 3, 4), conv(2, 2, 1), torch.tanh, f, torch.tanh, flat)
    for k, f in enumerate([
        nn.Upsample(scale_factor=2), nn.Upsample((5, 3), mode="bilinear"),
        lambda x: F.interpolate(x, 6, mode="bicubic"),
        lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear", align_corners=True), lambda x: x.cumsum(2),
        lambda x: F.interpolate(x, (2, 3), mode="bilinear", antialias=True), lambda x: F.interpolate(x, 2, mode="area"),
        lambda x: F.interpolate(x[:, :, 0], 7, mode="linear"), lambda x: torch.einsum("ncij,jk->ncik", x, randn(4, 2)),
        lambda x: F.interpolate(x[:, None], (3, 2, 5), mode="trilinear"),
        lambda x: F.fold(x.flatten(2)[:, :, :4].repeat(1, 2, 1), 3, 2),
    ])
]  # fmt: skip

ALL = [
    *PRODUCTS,
    *COUPLED,
    *RESAMPLED,
    *SMOOTH,
    *(activation(k) for k in range(len(ACTIVATIONS))),
    *LINEAR,
    *POOLS,
    *MOVES,
    *GRAPHS,
    *NORMS,
]


# --- oracle -------------------------------------------------------------------------------------------------


def loss_of(output: Tensor) -> Tensor:
    """Smooth, per sample, with a Hessian that is neither diagonal nor definite, and a mean over the samples."""
    y = output.flatten(1)
    weights = torch.linspace(0.5, 1.5, y.shape[1], dtype=y.dtype)
    return (y.logsumexp(1) + (y.sin() * weights).sum(1) + 0.3 * y.square().sum(1)).mean()


class Run(NamedTuple):
    nodes: list[N]
    edges: list
    outputs: list[Tensor]  # with their graph
    values: list[Tensor]  # of the oracle
    gradients: list[Tensor]
    tape: Tape
    loss: Tensor

    def gradient_at(self, edges) -> list[Tensor]:
        return list(torch.autograd.grad(self.loss, [e.public for e in edges], retain_graph=True))


def run_random(net: Net, n: int) -> Run:
    """Without an oracle."""
    nodes, tape = net.nodes(), Tape()
    values, edges = [randn(n, *net.shape, seed=7)], [None]
    with torch.random.fork_rng(devices=[]), tape:
        torch.manual_seed(0)
        for node in nodes:
            values.append(node.fn(*(values[k] for k in node.inputs)))
            edges.append(edge_of(values[-1]))
    return Run(nodes, edges, values, [], [], tape, loss_of(values[-1]))


def run(net: Net, n: int) -> Run:
    r = run_random(net, n)
    pure = [r.outputs[0]]
    for node in r.nodes:
        out = (node.twin or node.fn)(*(pure[k] for k in node.inputs))
        pure.append(out if out.requires_grad else out.requires_grad_())
    torch.testing.assert_close(pure[-1], r.outputs[-1], **TIGHT)
    gradients = torch.autograd.grad(loss_of(pure[-1]), pure[1:], allow_unused=True)
    return r._replace(values=[v.detach() for v in pure], gradients=[None, *gradients])


def per_sample(J: Tensor, n: int) -> Tensor:
    """[n d_out, n d_in] -> [n, d_out, d_in], when samples do not meet."""
    J = J.reshape(n, J.shape[0] // n, n, -1)
    return torch.stack([J[k, :, k] for k in range(n)])


def dense(r: Run, form: str, residual: str) -> dict[int, Tensor]:
    """H at every node, by dense Jacobians and second derivatives of each node with respect to each input alone."""
    n, values = len(r.values[0]), r.values
    top = len(values) - 1
    loss_H = torch.func.jacrev(torch.func.jacrev(loss_of))(values[top]).reshape(values[top].numel(), -1)
    H = {top: loss_H.diag() if form == "diag" else per_sample(loss_H, n).mean(0)}  # diagonals flat, over all samples
    act = {"keep": lambda t: t, "zero": lambda t: 0 * t, "abs": torch.abs, "clip": lambda t: t.clamp(min=0)}[residual]
    for at in range(top, 0, -1):
        node = r.nodes[at - 1]
        f, g = node.twin or node.fn, r.gradients[at]
        for j, below in enumerate(node.inputs):
            if below == 0 or at not in H:
                continue

            def alone(x, j=j, node=node, f=f):
                return f(*(x if i == j else values[k] for i, k in enumerate(node.inputs)))

            J = torch.func.jacrev(alone)(values[below]).reshape(values[at].numel(), -1)
            second = torch.func.jacrev(torch.func.grad(lambda x: (alone(x) * g).sum()))(values[below])  # noqa: B023
            T = act(second.reshape(values[below].numel(), -1).diag())
            if form == "diag":
                new = J.T.square() @ H[at] + T
            else:
                J = per_sample(J, n)
                new = (J.mT @ H[at] @ J).mean(0) + T.reshape(n, -1).mean(0).diag()
            H[below] = H[below] + new if below in H else new
    return H


def ours(r: Run, form: str, residual: str) -> dict[int, Tensor]:
    n, output = len(r.values[0]), r.values[-1]
    H = torch.func.jacrev(torch.func.jacrev(loss_of))(output).reshape(output.numel(), -1)
    seed = H.diag().reshape(output.shape) if form == "diag" else per_sample(H, n).mean(0)
    found = propagate(r.tape, r.edges[-1], seed, r.gradient_at, form, residual)
    return {k: found[e.node, e.number] for k, e in enumerate(r.edges) if e and (e.node, e.number) in found}


# --- the recursion ------------------------------------------------------------------------------------------


CASES = [(net, residual) for net in ALL for residual in (("keep",) if net in [*LINEAR, *POOLS] else RESIDUALS)]


def name(value: Net | str) -> str:
    return getattr(value, "id", value)


@pytest.mark.parametrize(("net", "residual"), [case for case in CASES if case[0].matrix], ids=name)
def test_matrix_is_the_dense_recursion(net, residual):
    r = run(net, 3)
    truth, found = dense(r, "matrix", residual), ours(r, "matrix", residual)
    assert set(truth) <= set(found)
    for k, H in truth.items():
        torch.testing.assert_close(found[k], H, **TIGHT, msg=lambda m, k=k: f"node {k}: {m}")


@pytest.mark.parametrize(("net", "residual"), CASES, ids=name)
def test_diag_is_the_dense_recursion_of_diagonals(net, residual):
    r = run(net, 3)
    truth, found = dense(r, "diag", residual), ours(r, "diag", residual)
    assert set(truth) <= set(found)
    for k, h in truth.items():
        if isinstance(r.nodes[k - 1].fn, nn.Linear | nn.Conv2d):
            assert found[k].shape == r.values[k].shape
        torch.testing.assert_close(found[k].flatten(), h, **TIGHT, msg=lambda m, k=k: f"node {k}: {m}")


# --- against autograd ---------------------------------------------------------------------------------------


def tail(r: Run, k: int) -> Callable[[Tensor], Tensor]:
    """The function from node k of a chain to the output."""

    def f(z: Tensor) -> Tensor:
        for node in r.nodes[k:]:
            z = (node.twin or node.fn)(z)
        return z

    return f


@pytest.mark.parametrize("net", SMOOTH, ids=lambda net: net.id)
def test_matrix_of_one_sample_is_the_hessian(net):
    r = run(net, 1)
    found = ours(r, "matrix", "keep")
    for k in range(1, len(r.values)):
        f = tail(r, k)
        H = torch.func.jacrev(torch.func.jacrev(lambda z: loss_of(f(z))))(r.values[k])  # noqa: B023
        torch.testing.assert_close(found[k], H.reshape(found[k].shape), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("net", SMOOTH, ids=lambda net: net.id)
def test_without_residual_it_is_gauss_newton(net):
    r = run(net, 1)
    found = ours(r, "matrix", "zero")
    output = r.values[-1]
    H = torch.func.jacrev(torch.func.jacrev(loss_of))(output).reshape(output.numel(), -1)
    for k in range(1, len(r.values)):
        J = torch.func.jacrev(tail(r, k))(r.values[k]).reshape(output.numel(), -1)
        torch.testing.assert_close(found[k], J.T @ H @ J, rtol=1e-10, atol=1e-10)


LOSSES = {  # the loss, the nodes at which it is exact
    "ce": (lambda f: F.cross_entropy(f, torch.tensor([0, 2, 1])), [6]),
    "mse": (lambda f: F.mse_loss(f, randn(3, 3, seed=9)), [3, 4, 5, 6]),
    "bce": (lambda f: F.binary_cross_entropy_with_logits(f, randn(3, 3, seed=9).sigmoid()), [3, 4, 5, 6]),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_hesscale_is_exact_at_the_last_layers(loss):
    """CE at the last layer; MSE and BCE, whose H is diagonal, also at the one before, through an activation."""
    loss_fn, exact = LOSSES[loss]
    r = run(chain("mlp", (4,), linear(4, 4), F.silu, linear(4, 4), torch.tanh, torch.neg, linear(4, 3)), 3)

    def diagonal(k: int) -> Tensor:
        H = torch.func.jacrev(torch.func.jacrev(lambda z: loss_fn(tail(r, k)(z))))(r.values[k])
        return H.reshape(r.values[k].numel(), -1).diag().reshape(r.values[k].shape)

    L = loss_fn(r.outputs[-1])

    def gradient_at(edges):
        return torch.autograd.grad(L, [e.public for e in edges], retain_graph=True)

    found = propagate(r.tape, r.edges[-1], diagonal(6), gradient_at, "diag")
    for k in range(1, 7):
        error = (found[r.edges[k][:2]] - diagonal(k)).abs().max()
        assert (error < 1e-12) == (k in exact), k


# --- batch norm in train mode -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["diag", "matrix"])
def test_batch_statistics_are_constants(form):
    norm = seeded(Maker(nn.BatchNorm1d, 4)).train()
    fixed = {}

    def twin(x: Tensor) -> Tensor:
        if not fixed:
            fixed["mean"], fixed["var"] = x.detach().mean(0), x.detach().var(0, correction=0)
        return F.batch_norm(x, fixed["mean"], fixed["var"], norm.weight, norm.bias, False, 0, norm.eps)

    r = run(chain("train", (3,), linear(3, 4), (norm, twin), linear(4, 3)), 3)
    truth, found = dense(r, form, "zero"), ours(r, form, "zero")
    for k, H in truth.items():
        torch.testing.assert_close(found[k].reshape(H.shape), H, **TIGHT)


# --- what it refuses, what it leaves alone ------------------------------------------------------------------


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def _edit_a_part(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 0
    return x


REFUSED = {
    "no rule": (lambda x: x.cumprod(1), r"through cumprod \(operation 3 of the forward pass, after tanh\)"),
    "custom": (Double.apply, r"through DoubleBackward \(operation 3 .*, after tanh\).*custom function"),
    "part": (_edit_a_part, r"through torch::autograd::CopySlices .*edit of a part"),
    "two arguments": (lambda x: torch.lerp(x, x.sigmoid(), 0.5), "through lerp .*no rule"),
    "scale of a norm": (lambda x: F.layer_norm(randn(4, 4), (4,), x[0]), "through layer_norm .*only its input"),
    "own norm": (lambda x: torch.layer_norm(x, (4,)), "through layer_norm .*torch.nn.functional"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_by_name_and_place(case):
    f, message = REFUSED[case]
    r = run(chain("refused", (3,), linear(3, 4), torch.tanh, f, linear(4, 3)), 4)
    with pytest.raises(NotImplementedError, match=message):
        ours(r, "diag", "zero")


MATRIX_REFUSED = {
    "norm over samples": (lambda x: F.softmax(x, 0), 'through softmax .*mixes samples; approx="diag"'),
    "transposed batch": (lambda x: x.T.contiguous().T, 'through T .*moves dimension 0.*approx="diag"'),
    "samples meet": (lambda x: x.roll(1, 0), 'through roll .*mixes samples; approx="diag"'),
    "matrix per sample": (
        lambda x: (x.unsqueeze(1) @ randn(len(x), 4, 4)).squeeze(1), 'through matmul .*differs between them',
    ),
    "mean of the batch": (lambda x: x.mean(0, keepdim=True).expand(4, 4), "through (expand|mean)"),
}  # fmt: skip


@pytest.mark.parametrize("case", MATRIX_REFUSED)
def test_refuses_matrices_by_name(case):
    f, message = MATRIX_REFUSED[case]
    r = run(chain("refused", (3,), linear(3, 4), f, linear(4, 3)), 4)
    ours(r, "diag", "zero")
    with pytest.raises(NotImplementedError, match=message):
        H = torch.eye(3, dtype=torch.float64)
        propagate(r.tape, r.edges[-1], H, r.gradient_at, "matrix", "zero")


def test_refuses_large_matrices():
    r = run(chain("wide", (3,), linear(3, 12), torch.tanh, linear(12, 3)), 2)
    H = torch.eye(3, dtype=torch.float64)
    message = r'linear .* 12 x 12 matrix, above the limit of 11: use approx="diag" or raise max_hessian_dim'
    with pytest.raises(ValueError, match=message):
        propagate(r.tape, r.edges[-1], H, r.gradient_at, "matrix", "zero", max_dim=11)
    propagate(r.tape, r.edges[-1], H, r.gradient_at, "matrix", "zero", max_dim=12)


@pytest.mark.parametrize("wrong", [{"form": "full"}, {"form": "diag", "residual": "drop"}])
def test_refuses_unknown_options(wrong):
    r = run(SMOOTH[0], 2)
    with pytest.raises(ValueError, match="pass"):
        propagate(r.tape, r.edges[-1], torch.ones(2, 3), r.gradient_at, **wrong)


def test_edited_arguments_are_noticed():
    r = run(SMOOTH[0], 2)
    with torch.no_grad():
        r.nodes[0].fn.weight.mul_(2)  # below every layer output: not read
        ours(r, "diag", "zero")
        r.nodes[2].fn.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"argument of linear .* was edited in place"):
        ours(r, "diag", "zero")


def test_operations_off_the_path_need_no_rule():
    """Below all targets, and beside the way to the output."""
    nodes = [
        N(seeded(linear(3, 4)), (0,)),
        N(lambda x: x.cumprod(1), (1,)),
        N(seeded(linear(4, 4), 1), (2,)),
        N(lambda x: x.cumprod(1), (3,)),
        N(torch.tanh, (3,)),
        N(lambda x: x * nn.Parameter(SCALE.flatten()[:1]).exp(), (5,)),
        N(seeded(linear(4, 3), 2), (6,)),
    ]
    r = run(Net("off", (3,), lambda: nodes), 3)
    seed = torch.ones(3, 3, dtype=torch.float64)
    target = r.edges[3][:2]
    found = propagate(r.tape, r.edges[-1], seed, r.gradient_at, "diag", "keep", targets=[target])
    assert target in found and r.edges[2][:2] not in found
    with pytest.raises(NotImplementedError, match="cumprod"):
        propagate(r.tape, r.edges[-1], seed, r.gradient_at, "diag", "keep")


def test_gradients_are_asked_for_once_and_only_where_needed():
    r = run(chain("two", (3,), linear(3, 4), F.relu, linear(4, 4), torch.tanh, linear(4, 4), F.gelu, linear(4, 3)), 2)
    asked = []

    def gradient_at(edges):
        asked.append([e[:2] for e in edges])
        return r.gradient_at(edges)

    seed = torch.ones(2, 3, dtype=torch.float64)
    propagate(r.tape, r.edges[-1], seed, gradient_at, "diag", "zero")
    assert asked == []
    propagate(r.tape, r.edges[-1], seed, gradient_at, "diag", "abs")
    assert asked == [[r.edges[6][:2], r.edges[4][:2]]]


UNCHANGED = [net for net in ALL if net.id in ("in_place", "cat", "conv", "MaxPool2d_13")]


@pytest.mark.parametrize("net", UNCHANGED, ids=lambda net: net.id)
def test_tape_and_propagation_change_nothing(net):
    nodes = net.nodes()
    parameters = [p for node in nodes if isinstance(node.fn, nn.Module) for p in node.fn.parameters()]
    x = randn(3, *net.shape, seed=7)

    def step(mode) -> list[Tensor]:
        torch.manual_seed(3)
        values = [x]
        with mode:
            for node in nodes:
                values.append(F.dropout(node.fn(*(values[k] for k in node.inputs)), 0.2))
        gradients = torch.autograd.grad(loss_of(values[-1]), parameters, retain_graph=True)
        return [values[-1], *gradients, torch.rand(3), mode, values[-1]]

    with torch.random.fork_rng(devices=[]):
        *plain, _, _ = step(torch.enable_grad())
        *taped, tape, output = step(Tape())
        state = torch.get_rng_state()
        propagate(tape, edge_of(output), torch.ones_like(output), lambda edges: [], "diag", "zero")
        assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(plain, taped, strict=True):
        assert torch.equal(a, b)


def test_single_precision_without_grad_mode():
    net = SMOOTH[3]
    r, single, tape, edges = run(net, 3), net.nodes(), Tape(), []
    x = r.values[0].float()
    with tape:
        for node in single:
            x = (node.fn.float() if isinstance(node.fn, nn.Module) else node.fn)(x)
            edges.append(edge_of(x))
    for form, seed in (("diag", torch.ones_like(x)), ("matrix", torch.eye(x[0].numel()))):
        truth = propagate(r.tape, r.edges[-1], seed.double(), r.gradient_at, form, "zero")
        with torch.no_grad():
            found = propagate(tape, edges[-1], seed, lambda edges: [], form, "zero")
        for a, b in zip(r.edges[1:], edges, strict=True):
            assert found[b[:2]].dtype == torch.float32 and not found[b[:2]].requires_grad
            torch.testing.assert_close(found[b[:2]].double(), truth[a[:2]], rtol=1e-4, atol=1e-6)


def test_rounded_slope_of_hardsigmoid():
    """torch has no second derivative of it, and a first one in single precision."""
    r = run_random(chain("hardsigmoid", (3,), linear(3, 4), F.hardsigmoid, linear(4, 3)), 3)
    found = propagate(r.tape, r.edges[-1], randn(3, 3, seed=2), r.gradient_at, "diag", "keep")
    inside = (r.outputs[1].abs() < 3).double() / 36
    torch.testing.assert_close(found[r.edges[1][:2]], found[r.edges[2][:2]] * inside, rtol=1e-6, atol=0)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_masks_of_all_and_of_no_dropout(p, native):
    """torch.native_dropout is what F.dropout calls on a GPU."""

    def drop(x: Tensor) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if native else F.dropout(x, p)

    r, seed = run_random(chain("drop", (8,), linear(8, 8), drop), 2), torch.ones(2, 8, dtype=torch.float64)
    h = propagate(r.tape, r.edges[-1], seed, r.gradient_at, "diag")[r.edges[1][:2]]
    torch.testing.assert_close(h, (r.outputs[2] / r.outputs[1]).square().detach(), **TIGHT)


@pytest.mark.parametrize("residual", ["keep", "zero"])
def test_edits_through_a_view(residual):
    """An edit of a view of the same memory in the same order is seen by all that read either."""

    def edit(h: Tensor) -> Tensor:
        h.view(-1, 3).tanh_()
        return h

    r = run(Net("view", (2, 2), lambda: [
        N(seeded(linear(2, 3)), (0,)), N(edit, (1,), torch.tanh), N(seeded(linear(3, 2), 1), (2,)),
    ]), 3)  # fmt: skip
    for form in ("diag", "matrix"):
        truth, found = dense(r, form, residual), ours(r, form, residual)
        torch.testing.assert_close(found[1].reshape(truth[1].shape), truth[1], **TIGHT)
