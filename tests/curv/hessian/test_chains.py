"""H through forks and repeated sums, against the Hessian of the whole function by torch.func."""

import oracles
import pytest
import torch
from cases import randn, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from torchcurv import curvature
from torchcurv.curv.graph import edge_of
from torchcurv.curv.hessian.local import Treatment
from torchcurv.curv.hessian.propagate import propagate
from torchcurv.curv.hessian.tape import Tape

TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def hessian(f):
    return torch.func.jacrev(torch.func.jacrev(f))


def rotated(x):
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    angles = torch.linspace(0, 1, x.shape[-2], dtype=x.dtype)[:, None]
    return x * angles.cos() + turned * angles.sin()


def in_place(x):
    y = x * 2
    y.mul_(x.sigmoid())
    y -= y.mean(-1, keepdim=True)
    return F.relu(y, inplace=True)


def layer_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 0.1)


def attention(x):
    q, k, v = x.chunk(3, -1)
    return torch.softmax(q @ k.mT / 2, -1) @ v


LINEAR = {  # of x [n, 3, 6]; one linear map, exact in both forms
    "centred": lambda x: x - x.mean(-1, keepdim=True),
    "centred over all": lambda x: x - x.mean((1, 2), keepdim=True),
    "mean of a mean": lambda x: x.mean(-1).mean(-1, keepdim=True),
    "twice": lambda x: x + x,
    "flipped": lambda x: x + 2 * x.flip(-1),
    "rotated": rotated,
    "up and down": lambda x: F.avg_pool1d(F.interpolate(x, scale_factor=2, mode="linear"), 3, 2, 1),
    "blurred": lambda x: x - F.avg_pool1d(x, 3, 1, 1),
    "expanded": lambda x: x.mean(-1, keepdim=True).expand(-1, -1, 4) / 3,
    "shifted": lambda x: torch.cat([x[:, 1:], x[:, :1]], 1) - 0.5 * x,
    "contracted": lambda x: torch.einsum("nti,ij->ntj", x.cumsum(1), randn(6, 2, seed=1)) @ randn(2, 3, seed=2),
    "pooled": lambda x: x.unflatten(2, (2, 3)).sum(3) - x[..., :2],
    "per element": lambda x: x * randn(4, 3, 6, seed=3)[: len(x)] - x.sum(1, keepdim=True),
}
CURVED = {
    "gate": lambda x: x * x.sigmoid(),
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "skip": lambda x: x + torch.tanh(x),
    "square": lambda x: x * x,
    "quotient": lambda x: x / (1 + x.square()),
    "swish of halves": lambda x: F.silu(x[..., :3]) * x[..., 3:],
    "chunks": lambda x: torch.mul(*(part.sin() for part in x.chunk(2, -1))),
    "parts of a square": lambda x: x.square() + x[:, :1] * x.flip(1),
    "squeeze and excite": lambda x: x * torch.sigmoid(x.mean(1, keepdim=True) @ randn(6, 6, seed=4)),
    "layer norm": layer_norm,
    "rms norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1) * randn(6, seed=5),
    "var": lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 0.1),
    "softmax by hand": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
    "in place": in_place,
    "crossed": lambda x: torch.stack([x[..., :3] * x[..., 3:].tanh(), x[..., 3:] * x[..., :3].tanh()], -1),
    "viewed": lambda x: (x.flatten(1) - x.flatten(1).mean(1, keepdim=True)).view(x.shape) * x,
    "masked": lambda x: x * torch.where(x > 0, 1.0, 0.5) + x.masked_fill(x > 0.2, 0.0),
    "dying": lambda x: x.relu() * x.relu().mean(-1, keepdim=True),
    "maximum": lambda x: F.max_pool1d(x, 3, 1) * x[..., :4],
}
COUPLED = {
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "glu": lambda x: F.glu(x, -1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "layer_norm": lambda x: F.layer_norm(x, (6,), randn(6, seed=5), randn(6, seed=6), 0.1),
    "rms_norm": lambda x: F.rms_norm(x, (3, 6), eps=0.1),
    "group_norm": lambda x: F.group_norm(x.unflatten(2, (2, 3)), 3, randn(3, seed=5)),
    "upsampled": lambda x: F.interpolate(x, 9, mode="linear"),
}
MATRICES = {  # exact as matrices only
    "attention": attention,
    "kernel": lambda x: x @ x.mT,
    "heads": lambda x: F.scaled_dot_product_attention(*x.unflatten(2, (3, 2)).unbind(2), is_causal=True),
    "entropy": lambda x: -(F.softmax(x, -1) * F.log_softmax(x, -1)).sum(-1),
    "constant": lambda x: x.mean(-1, keepdim=True).expand_as(x).softmax(-1) + x.mean(-1, keepdim=True).tanh(),
    "expert": lambda x: (torch.softmax(x.mean(1), -1)[:, None] * x.tanh()).sum(-1),
}


def elementwise_loss(y):
    """Its Hessian is diagonal."""
    weights = torch.linspace(0.5, 1.5, y[0].numel(), dtype=y.dtype)
    return ((y.flatten(1) + 0.3).sin() * weights + 0.2 * y.flatten(1).square()).sum()


def loss_of(y):
    return y.flatten(1).logsumexp(1).mean() + elementwise_loss(y) / len(y)


def recorded(f, n, loss, form, seed=7, **how):
    """(found, the Hessian of each sample [n, d, d], what it was found of) for z -> f(z), z the output of a layer."""
    layer, x = seeded(lambda: nn.Linear(6, 6)), randn(n, 3, 6, seed=seed)
    with Tape() as tape:
        z = layer(x)
        y = f(z)
    L = loss(y)

    def gradient_at(edges):
        return torch.autograd.grad(L, [edge.public for edge in edges], retain_graph=True)

    d = y[0].numel()
    H = torch.stack([hessian(loss)(y[k : k + 1].detach()).reshape(d, d) for k in range(n)])
    at = H.diagonal(dim1=1, dim2=2).reshape(y.shape) if form == "diag" else H.mean(0)
    target = edge_of(z)
    found = propagate(tape, edge_of(y), at, gradient_at, form, Treatment(**how), [target[:2]])[target[:2]]
    whole = hessian(lambda z: loss(f(z)))(z.detach()).reshape(n, 18, n, 18)
    truth = whole.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return found, truth, (H, z.detach(), gradient_at([edge_of(y)])[0])


@pytest.mark.parametrize("name", [*LINEAR, *CURVED, *COUPLED])
def test_the_diagonal_is_exact_down_to_the_layer(name):
    f = {**LINEAR, **CURVED, **COUPLED}[name]
    found, truth, _ = recorded(f, 4, elementwise_loss, "diag")
    torch.testing.assert_close(found.reshape(4, 18), truth.diagonal(dim1=1, dim2=2), **TIGHT)


@pytest.mark.parametrize("name", [*LINEAR, *CURVED, *COUPLED, *MATRICES])
def test_the_matrix_of_one_sample_is_the_hessian(name):
    f = {**LINEAR, **CURVED, **COUPLED, **MATRICES}[name]
    found, truth, _ = recorded(f, 1, loss_of, "matrix")
    torch.testing.assert_close(found, truth[0], **TIGHT)


@pytest.mark.parametrize("averaging", ["sample", "batch"])
@pytest.mark.parametrize("name", [name for name in LINEAR if name != "per element"])
def test_the_mean_over_samples_is_exact_through_a_linear_chain(name, averaging):
    found, truth, _ = recorded(LINEAR[name], 4, loss_of, "matrix", averaging=averaging)
    torch.testing.assert_close(found, truth.sum(0), **TIGHT)  # of the mean of four losses


@pytest.mark.parametrize("averaging", ["sample", "batch"])
@pytest.mark.parametrize("over", ["sample", "batch"])
@pytest.mark.parametrize("residual", ["keep", "zero", "abs", "clip"])
@pytest.mark.parametrize("name", ["gate", "layer norm", "softmax", "attention"])
def test_the_matrix_of_several_samples_is_made_of_their_jacobians(name, residual, over, averaging):
    f, n = {**CURVED, **COUPLED, **MATRICES}[name], 3
    how = {"residual": residual, "residual_over": over, "averaging": averaging}
    found, _, (H, z, g) = recorded(f, n, loss_of, "matrix", **how)
    J, S = [], []
    for k in range(n):
        at, gk = z[k : k + 1], g[k : k + 1]
        J.append(torch.func.jacrev(f)(at).reshape(-1, 18))
        S.append(hessian(lambda z, gk=gk: (f(z) * gk).sum())(at).reshape(18, 18))

    def act(S):
        values, vectors = torch.linalg.eigh(S)
        values = {"keep": values, "zero": 0 * values, "abs": values.abs(), "clip": values.clamp(min=0)}[residual]
        return vectors @ torch.diag(values) @ vectors.T

    J_mean, H = sum(J) / n, H.mean(0)
    new = J_mean.T @ H @ J_mean if averaging == "batch" else sum(Jk.T @ H @ Jk for Jk in J) / n
    new = new + (act(sum(S) / n) if over == "batch" else sum(map(act, S)) / n)
    torch.testing.assert_close(found, new, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("residual", ["abs", "clip", "zero"])
def test_second_derivatives_of_a_chain_are_those_of_the_whole(residual):
    found, _, (H, z, g) = recorded(CURVED["layer norm"], 3, elementwise_loss, "diag", residual=residual)
    J = torch.stack([torch.func.jacrev(layer_norm)(z[k : k + 1]).reshape(18, 18) for k in range(3)])
    S = torch.stack([
        hessian(lambda x: (layer_norm(x) * g[k : k + 1]).sum())(z[k : k + 1]).reshape(18, 18)  # noqa: B023
        for k in range(3)
    ])  # fmt: skip
    r = {"abs": torch.abs, "zero": torch.zeros_like, "clip": lambda r: r.clamp(min=0)}[residual](
        S.diagonal(dim1=1, dim2=2)
    )
    new = torch.einsum("nk,nki->ni", H.diagonal(dim1=1, dim2=2), J.square()) + r
    torch.testing.assert_close(found.reshape(3, 18), new, **TIGHT)


def test_maps_over_the_batch():
    found, truth, _ = recorded(lambda x: x - x.mean(), 4, elementwise_loss, "diag", max_products=72)
    torch.testing.assert_close(found.reshape(4, 18), truth.diagonal(dim1=1, dim2=2), **TIGHT)
    with pytest.raises(NotImplementedError, match=r"through (mean|sub)"):
        recorded(lambda x: x - x.mean(), 4, loss_of, "matrix")


def test_a_chain_that_takes_too_many_products_is_gone_through_op_by_op():
    exact, truth, _ = recorded(
        LINEAR["centred"], 4, elementwise_loss, "diag", max_products=1
    )  # one product for all rows
    torch.testing.assert_close(exact.reshape(4, 18), truth.diagonal(dim1=1, dim2=2), **TIGHT)
    dropped, truth, _ = recorded(CURVED["rms norm"], 4, elementwise_loss, "diag", max_products=1)
    assert (dropped.reshape(4, 18) - truth.diagonal(dim1=1, dim2=2)).abs().max() > 1e-3
    found, truth, _ = recorded(CURVED["gate"], 4, elementwise_loss, "diag", max_products=2)
    torch.testing.assert_close(found.reshape(4, 18), truth.diagonal(dim1=1, dim2=2), **TIGHT)


def test_what_is_used_beside_a_chain_is_counted_once():
    """The gate is used outside of the chain too; sums of elementwise functions stay diagonal at every tensor."""

    def f(x):
        gate = x.sigmoid()
        return torch.cat([x * gate, gate], -1)

    found, truth, _ = recorded(f, 4, elementwise_loss, "diag")
    torch.testing.assert_close(found.reshape(4, 18), truth.diagonal(dim1=1, dim2=2), **TIGHT)
    found, truth, _ = recorded(f, 1, loss_of, "matrix")
    torch.testing.assert_close(found, truth[0], **TIGHT)


def test_chains_end_at_layers():
    """What lies below a layer in a chain is that of the recursion: HesScale's approximation at each layer."""
    first, second = (seeded(lambda: nn.Linear(6, 6), k) for k in range(2))
    x = randn(4, 6, seed=3)
    with Tape() as tape:
        z = first(x)
        u = second(z)
        y = z - u
    at = randn(4, 6, seed=4)
    targets = [edge_of(z)[:2], edge_of(u)[:2]]
    found = propagate(tape, edge_of(y), at, lambda edges: [], "diag", Treatment("zero"), targets)
    torch.testing.assert_close(found[targets[1]], at, **TIGHT)
    torch.testing.assert_close(found[targets[0]], at + at @ second.weight.detach().square(), **TIGHT)


# --- random functions ---------------------------------------------------------------------------------------


UNARY = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "square": lambda x: 0.3 * x.square(),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, 1),
    "mean": lambda x: x.mean(-1, keepdim=True).expand_as(x),
    "sum": lambda x: 0.3 * x.sum(1, keepdim=True) + 0 * x,
    "blur": lambda x: F.avg_pool1d(x, 3, 1, 1),
    "constant": lambda x: x @ (0.4 * randn(6, 6, seed=9)),
    "turn": lambda x: x.transpose(1, 2).reshape(x.shape),
    "halves": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "softmax": lambda x: F.softmax(x, -1),
}
BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda x, y: x / (2 + y.square()),
    "mix": lambda x, y: torch.cat([x[..., :3], y[..., :3]], -1),
}
PROGRAMS = st.lists(
    st.tuples(st.sampled_from([*UNARY, *BINARY]), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6
)


def of_program(program):
    def f(x):
        made = [x]
        for name, j, k in program:
            one, other = made[-1 - j % len(made)], made[-1 - k % len(made)]
            made.append(UNARY[name](one) if name in UNARY else BINARY[name](one, other))
        return made[-1]

    return f


@settings(max_examples=100, deadline=None)
@given(program=PROGRAMS, seed=st.integers(0, 99))
def test_random_functions_of_one_layer(program, seed):
    f = of_program([*program, ("add", 0, 1)])
    found, truth, _ = recorded(f, 1, loss_of, "matrix", seed=seed)
    torch.testing.assert_close(found, truth[0], rtol=1e-8, atol=1e-9 * float(1 + truth.abs().max()))
    if all(name != "softmax" for name, _, _ in program):  # which ends chains of the diagonal form
        found, truth, _ = recorded(f, 3, elementwise_loss, "diag", seed=seed)
        diagonal = truth.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(
            found.reshape(3, 18), diagonal, rtol=1e-8, atol=1e-9 * float(1 + diagonal.abs().max())
        )


class Between(nn.Module):
    """Two layers with a function between."""

    def __init__(self, f):
        super().__init__()
        self.first, self.last, self.f = nn.Linear(4, 18), nn.Linear(18, 3), f

    def forward(self, x):
        return self.last(self.f(self.first(x).unflatten(1, (3, 6))).flatten(1))


def dense(block):
    sizes = [p.numel() for p in block.params]
    columns = []
    for unit in torch.eye(sum(sizes), dtype=torch.float64):
        given = [part.reshape(p.shape) for part, p in zip(unit.split(sizes), block.params, strict=True)]
        columns.append(torch.cat([t.flatten() for t in block.matvec(given)]))
    return torch.stack(columns, 1)


def true_block(model, loss, x, y, name):
    named = list(model.named_parameters())
    names = [n for n, _ in named if n.rpartition(".")[0] == name]
    return oracles.sub_block(oracles.hessian(model, loss, x, y, named), named, names)


@settings(max_examples=10, deadline=None)
@given(program=PROGRAMS, seed=st.integers(0, 99))
def test_random_networks_of_two_layers(program, seed):
    """One sample: "kfac" is the Hessian of both layers; "diag" is that of the last."""
    model, loss = seeded(lambda: Between(of_program(program)), seed), nn.CrossEntropyLoss()
    x, y = randn(1, 4, seed=seed), torch.tensor([1])
    blocks = curvature(model, loss, [(x, y)], curv_type="hessian", approx="kfac").blocks
    for name in blocks:
        torch.testing.assert_close(dense(blocks[name]), true_block(model, loss, x, y, name), rtol=1e-7, atol=1e-9)
    diagonal = curvature(model, loss, [(x, y)], curv_type="hessian", approx="diag").blocks["last"]
    expected = true_block(model, loss, x, y, "last").diagonal()
    torch.testing.assert_close(dense(diagonal).diagonal(), expected, rtol=1e-8, atol=1e-10)


# --- models -------------------------------------------------------------------------------------------------


class Excited(nn.Module):
    """Squeeze and excitation of a linear layer's features, without layers inside."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x)
        h = h * torch.sigmoid(h.mean(1, keepdim=True))
        return self.last(h - h.mean(1, keepdim=True))


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(attention(self.qkv(x)).mean(1))


class Cell(nn.Module):
    """Two steps of an LSTM by hand, with layers of their own."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 12), nn.Linear(7, 12), nn.Linear(3, 3)

    def forward(self, x):
        h = c = x.new_zeros(len(x), 3)
        for layer in (self.first, self.second):
            i, f, g, o = layer(x if layer is self.first else torch.cat([x, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.last(h)


@pytest.mark.parametrize("make", [Excited, SwiGLU, Attends, Cell])
def test_for_one_sample_every_block_of_a_model_is_the_true_hessian(make):
    model, loss = seeded(make), nn.CrossEntropyLoss()
    x = randn(1, 3, 4, seed=1) if make is Attends else randn(1, 4, seed=1)
    y = torch.tensor([1])
    got = curvature(model, loss, [(x, y)], curv_type="hessian", approx="kfac", sharing="expand")
    for name, block in got.blocks.items():
        if (make is Attends and name == "qkv") or (make is Cell and name == "first"):
            continue  # shared positions, and branches with a layer on one of them
        torch.testing.assert_close(dense(block), true_block(model, loss, x, y, name), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("approx", ["diag", "kfac"])
@pytest.mark.parametrize("make", [Excited, SwiGLU, Attends, Cell])
def test_training_models_with_gates_and_attention(make, approx):
    from torchcurv import SecondOrderOptimizer

    model, loss = seeded(make), nn.CrossEntropyLoss()
    x = randn(8, 3, 4, seed=1) if make is Attends else randn(8, 4, seed=1)
    y = torch.arange(8) % 3
    optimizer = SecondOrderOptimizer(model, curv_type="hessian", approx=approx, lr=0.1, damping=0.1)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]
