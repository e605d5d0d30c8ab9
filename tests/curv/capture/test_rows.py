"""Which rows of an output belong to which sample: found from the graph, checked again when it changes, or refused."""

import random
import re

import cases
import oracles
import pytest
import torch
from full_step import error_of_full, root_rows
from measured import KINDS, Part, close, covered, measured, optimizer, truth
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from torchcurv import SecondOrderOptimizer, curvature, laplace
from torchcurv.curv.capture.probe import Probe
from torchcurv.curv.capture.verify import GradientCheck

V, D = cases.CLASSES, 4
CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


def mlp(width=5, out=V):
    return cases.seeded(lambda: nn.Sequential(nn.Linear(D, width), nn.Tanh(), nn.Linear(width, out)))


def batch(n, seed=0, out=V):
    return cases.randn(n, D, seed=seed), torch.randint(out, (n,), generator=torch.Generator().manual_seed(seed))


class Rearranged(nn.Module):
    """A model whose output is seen in equal runs of rows, for the truth: [n k, ...] -> [n, k, ...], classes second."""

    def __init__(self, model, order, n, inner=lambda out: out):
        super().__init__()
        self.model, self.order, self.n, self.inner = model, order, n, inner

    def forward(self, *args):
        out = self.inner(self.model(*args))[self.order]
        return out.reshape(self.n, -1, out.shape[-1]).movedim(-1, 1)


def grouped_truth(opt, x, y, kind, order, n, inner=lambda out: out):
    """The truth of cross entropy, where `order` lists the output's rows sample by sample."""
    order = torch.as_tensor(order)
    return truth(opt, CE, x, y[order].reshape(n, -1), kind, Rearranged(opt.model, order, n, inner))


def step(opt, loss):
    """One step's curvature."""
    opt.zero_grad()
    loss().backward()
    return measured(opt)


# ------------------------------------------------------------------- flattened outputs and concatenated heads


class TimeFirst(nn.Module):
    """Characters to logits, rows flattened: [n, t] -> [t * n, V] (position by position), or [n * t, V]."""

    def __init__(self, by_position, recurrent=True):
        super().__init__()
        self.embedding, self.by_position = nn.Embedding(7, 3), by_position
        self.body = nn.RNN(3, 4, batch_first=True) if recurrent else nn.Linear(3, 4)
        self.head = nn.Linear(4, V)

    def forward(self, tokens):
        h = self.body(self.embedding(tokens))
        h = h[0] if isinstance(h, tuple) else h.tanh()
        out = self.head(h)
        return out.transpose(0, 1).flatten(0, 1) if self.by_position else out.flatten(0, 1)


def by_sample(n, t, by_position):
    return torch.arange(n * t).reshape(t, n).T.flatten() if by_position else torch.arange(n * t)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trigger", ["module", "name"])
@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("lengths", [(3,), (1, 3, 2)])
def test_flattened_outputs_of_sequences(lengths, by_position, recurrent, trigger, kind):
    """Also where the first batch is of length 1, which shows nothing of the others."""
    n, model = 5, cases.seeded(lambda: TimeFirst(by_position, recurrent)).double()
    opt = optimizer(model, CE if trigger == "module" else "cross_entropy", curv_type=kind)
    for t in lengths:
        tokens = torch.randint(7, (n, t), generator=torch.Generator().manual_seed(t))
        y = torch.randint(V, (n * t,), generator=torch.Generator().manual_seed(t + 9))
        got = step(opt, lambda tokens=tokens, y=y: CE(model(tokens), y))
        close(got, grouped_truth(opt, tokens, y, kind, by_sample(n, t, by_position), n))


class Attending(nn.Module):
    """Tokens of a sample attend to one another, by torch's fused function; the rows of the output are flattened."""

    def __init__(self, by_position):
        super().__init__()
        self.embedding, self.by_position = nn.Embedding(7, 4), by_position
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, V)

    def forward(self, tokens):
        h = self.embedding(tokens)
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        h = h + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head((h.transpose(0, 1) if self.by_position else h).flatten(0, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("trigger", [CE, "cross_entropy"])
def test_flattened_outputs_of_attention(trigger, by_position, kind):
    model = cases.seeded(lambda: Attending(by_position)).double()
    opt = optimizer(model, trigger, curv_type=kind)
    for n, t in ((4, 3), (4, 5), (2, 3), (1, 3)):
        tokens = torch.randint(7, (n, t), generator=torch.Generator().manual_seed(t))
        y = torch.randint(V, (n * t,), generator=torch.Generator().manual_seed(t + 9))
        got = step(opt, lambda tokens=tokens, y=y: CE(model(tokens), y))
        with sdpa_kernel(SDPBackend.MATH):
            close(got, grouped_truth(opt, tokens, y, kind, by_sample(n, t, by_position), n))


class LateHead(TimeFirst):
    """The head sees the rows flattened."""

    def forward(self, tokens):
        h = self.body(self.embedding(tokens)).tanh()
        return self.head((h.transpose(0, 1) if self.by_position else h).flatten(0, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_position", [True, False])
def test_a_flattened_output_of_a_last_batch_of_one(by_position, kind):
    model, t = cases.seeded(lambda: LateHead(by_position, recurrent=False)).double(), 3
    opt = optimizer(model, CE, curv_type=kind)
    for n in (4, 1, 2):
        tokens = torch.randint(7, (n, t), generator=torch.Generator().manual_seed(n))
        y = torch.randint(V, (n * t,), generator=torch.Generator().manual_seed(n + 9))
        got = step(opt, lambda tokens=tokens, y=y: CE(model(tokens), y))
        close(got, grouped_truth(opt, tokens, y, kind, by_sample(n, t, by_position), n))


def test_kfac_of_a_flattened_output_is_that_of_the_same_network_unflattened():
    n, t = 5, 3
    tokens = torch.randint(7, (n, t), generator=torch.Generator().manual_seed(0))
    y = torch.randint(V, (n, t), generator=torch.Generator().manual_seed(1))
    model = cases.seeded(lambda: TimeFirst(True)).double()

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(tokens).unflatten(0, (t, n)).transpose(0, 1)

    flat = curvature(model, CE, [(tokens, y.T.flatten())], approx="kfac", sharing="reduce")
    plain = curvature(Plain(), CE, [(tokens, y)], approx="kfac", sharing="reduce", class_dim=-1)
    v = cases.randn(sum(p.numel() for p in model.parameters()), seed=3)
    close(flat.matvec(v), plain.matvec(v))


class ManyHeads(nn.Module):
    """Heads on one trunk, joined along dimension 0."""

    def __init__(self, heads):
        super().__init__()
        self.trunk = nn.Linear(D, 5)
        self.heads = nn.ModuleList(nn.Linear(5, V) for _ in range(heads))

    def forward(self, x):
        z = self.trunk(x).tanh()
        return torch.cat([head(z) for head in self.heads])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [2, 3])
def test_heads_joined_along_dimension_0(heads, kind):
    n, model = 4, cases.seeded(lambda: ManyHeads(heads)).double()
    opt = optimizer(model, CE, curv_type=kind)
    (x, _), (_, y) = batch(n), batch(heads * n)
    got = step(opt, lambda: CE(model(x), y))
    close(got, grouped_truth(opt, x, y, kind, by_sample(n, heads, True), n))


# --------------------------------------------------------------------------- parts, permutations, two views

N = 6
CHOICES = {
    "second half": (lambda out: out[N // 2 :], torch.arange(N // 2, N)),
    "first half": (lambda out: out[: N // 2], torch.arange(N // 2)),
    "every other": (lambda out: out[::2], torch.arange(0, N, 2)),
    "last two": (lambda out: out[-2:], torch.arange(N - 2, N)),
    "one": (lambda out: out[4:5], torch.arange(4, 5)),
    "permuted in halves": (lambda out: out[[1, 0, 2, 4, 5, 3]], torch.tensor([1, 0, 2, 4, 5, 3])),
    "swapped": (lambda out: out[[0, 1, 2, 5, 4, 3]], torch.tensor([0, 1, 2, 5, 4, 3])),
    "chosen": (lambda out: out[[5, 1]], torch.tensor([5, 1])),
    "flipped": (lambda out: out.flip(0), torch.arange(N).flip(0)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", CHOICES)
def test_observed_parts_of_a_batch(choice, kind):
    part, order = CHOICES[choice]
    opt = optimizer(mlp(), None, curv_type=kind)
    for seed in range(2):
        (x, _), (_, y) = batch(N, seed), batch(len(order), seed)

        def loss(x=x, y=y):
            f = part(opt.model(x))
            opt.observe(f, y, CE)
            return CE(f, y)

        close(step(opt, loss), truth(opt, CE, x, y, kind, Part(opt.model, part)))


@pytest.mark.parametrize("kind", KINDS)
def test_both_halves_of_a_batch_with_losses_of_their_own(kind):
    opt, ((x, y), (_, other)) = optimizer(mlp(), None, curv_type=kind), (batch(3), batch(3, 1))
    x = cases.randn(6, D, seed=4)
    halves = [lambda out: out[:3], lambda out: out[3:]]

    def loss():
        out, total = opt.model(x), 0.0
        for half, target, weight in zip(halves, (y, other), (1.0, 0.3), strict=True):
            f = half(out)
            opt.observe(f, target, CE, weight)
            total = total + weight * CE(f, target)
        return total

    got = step(opt, loss)
    first, second = (
        truth(opt, CE, x, target, kind, Part(opt.model, half)) for half, target in zip(halves, (y, other), strict=True)
    )
    close(got, first + 0.3 * second)


@pytest.mark.parametrize("approx", ["kfac", "ekfac", "diag", "block"])
def test_a_part_of_a_batch_is_like_a_batch_of_its_own(approx):
    model, (x, y) = mlp(), batch(3)
    x = cases.randn(6, D, seed=4)

    def tensors(given, part):
        torch.manual_seed(0)
        opt = optimizer(model, None, approx=approx)
        for _ in range(2):
            opt.zero_grad()
            f = part(model(given))
            opt.observe(f, y, CE)
            CE(f, y).backward()
            opt.step()
        blocks = opt.blocks.values()
        return [x for block in blocks for x in block.matvec([cases.randn(*p.shape, seed=7) for p in block.params])]

    for got, expected in zip(tensors(x, lambda out: out[3:]), tensors(x[3:], lambda out: out), strict=True):
        close(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["mean", "rows", "channels"])
def test_two_views_of_each_sample(form, kind):
    """One call of the model for both views, and a sample has both."""
    n, model = 4, mlp()
    opt, (x, _) = optimizer(model, CE, curv_type=kind), batch(2 * n)
    forms = {
        "mean": lambda out: (out[:n] + out[n:]) / 2,
        "rows": lambda out: out.unflatten(0, (2, n)).transpose(0, 1).flatten(0, 1)[: 2 * n],
        "channels": lambda out: torch.cat([out[:n], out[n:]], 1),
    }
    y = batch(2 * n if form == "rows" else n)[1]
    got = step(opt, lambda: CE(forms[form](model(x)), y))
    close(got, truth(opt, CE, x, y, kind, Part(model, forms[form])))


# ------------------------------------------------------------------------------------------------- graphs


class Graphs(nn.Module):
    """Nodes of several graphs in one tensor, pooled by a tensor that says which graph a node is of."""

    def __init__(self, pool):
        super().__init__()
        self.first, self.second, self.pool = nn.Linear(D, 5), nn.Linear(5, V), pool

    def forward(self, x, graph, n):
        return self.second(self.pool(self.first(x).tanh(), graph, n))


def _indexed(h, graph, n):
    return h.new_zeros(n, h.shape[1]).index_add(0, graph, h)


def _scattered(h, graph, n):
    return h.new_zeros(n, h.shape[1]).scatter_add(0, graph.unsqueeze(1).expand_as(h), h)


def _multiplied(h, graph, n):
    return nn.functional.one_hot(graph, n).to(h.dtype).T @ h


def _sliced(h, graph, n):
    return torch.stack([part.sum(0) for part in h.split(torch.bincount(graph).tolist())])


def _cut(h, graph, n):
    ends = torch.bincount(graph).cumsum(0).tolist()
    return torch.stack([h[start:end].sum(0) for start, end in zip([0, *ends], ends, strict=False)])


def _masked(h, graph, n):
    return (nn.functional.one_hot(graph, n).to(h.dtype).T.unsqueeze(-1) * h.unsqueeze(0)).sum(1)


def _masked_after(h, graph, n):
    return (nn.functional.one_hot(graph, n).to(h.dtype).unsqueeze(-1) * h.unsqueeze(1)).sum(0)


def _einsum(h, graph, n):
    return torch.einsum("vg,vc->gc", nn.functional.one_hot(graph, n).to(h.dtype), h)


def _sparse(h, graph, n):
    return torch.sparse.mm(nn.functional.one_hot(graph, n).to(h.dtype).T.to_sparse(), h)


def _segments(h, graph, n):
    return torch.segment_reduce(h, "sum", lengths=torch.bincount(graph), axis=0)


def _checkpointed(h, graph, n):
    return checkpoint(_indexed, h, graph, n, use_reentrant=False)


POOLS = [
    _indexed, _scattered, _multiplied, _sliced, _cut, _masked, _masked_after, _einsum, _sparse, _segments, _checkpointed
]  # fmt: skip
SIZES = [[4, 4, 4, 4], [4, 4, 4, 4], [3, 5, 4, 4], [4, 4, 5, 3], [1, 2, 3, 2]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool", POOLS)
def test_ragged_graphs_after_equal_ones(pool, kind):
    """Also of as many nodes in all, so that no shape tells."""
    opt = optimizer(cases.seeded(lambda: Graphs(pool)), CE, curv_type=kind)
    for k, sizes in enumerate(SIZES):
        graph = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        x, y = cases.randn(len(graph), D, seed=k), batch(len(sizes), k)[1]
        got = step(opt, lambda x=x, y=y, graph=graph: CE(opt.model(x, graph, len(graph.unique())), y))

        class Bound(nn.Module):
            def __init__(self, graph, n):
                super().__init__()
                self.model, self.graph, self.n = opt.model, graph, n

            def forward(self, x):
                return self.model(x, self.graph, self.n)

        bound = Bound(graph, len(sizes))
        opt.model.pool = _indexed if pool is _checkpointed else pool  # torch.func differentiates no checkpoints
        close(got, truth(opt, CE, x, y, kind, bound))
        opt.model.pool = pool


def test_kfac_of_ragged_graphs_counts_each_node_once():
    """The input side of the first layer is the mean over the nodes there are, that of the output side their sum."""
    opt = optimizer(cases.seeded(lambda: Graphs(_indexed)), CE, approx="kfac")
    graph = torch.tensor([0, 0, 1, 2, 2, 2])
    x, y = cases.randn(6, D), batch(3)[1]
    step_once(opt, lambda: CE(opt.model(x, graph, 3), y))
    block = next(iter(opt.blocks.values()))
    a = torch.cat([x, x.new_ones(6, 1)], 1)
    model = opt.model
    z = model.first(x).detach().requires_grad_()
    f = model.second(_indexed(z.tanh(), graph, 3))
    roots = oracles.output_roots(CE, f, y)
    s = torch.stack([torch.autograd.grad(f, z, root, retain_graph=True)[0] for root in roots])
    B, A = torch.einsum("vno,vnp->op", s, s), a.T @ a / 6
    v = cases.randn(5, D + 1, seed=2)
    weight, bias = block.matvec([v[:, :D], v[:, D]])
    close(torch.cat([weight, bias.unsqueeze(1)], 1), B @ v @ A)


def step_once(opt, loss):
    opt.zero_grad()
    loss().backward()
    opt.step()


# ------------------------------------------------------------------------------ what the user says of rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("said", [True, False])
def test_packed_tokens(said, kind):
    """Logits of the tokens that count alone, of samples with several numbers of them: the user may say which."""
    model = cases.seeded(lambda: TimeFirst(False, recurrent=True)).double()
    opt = optimizer(model, None, curv_type=kind)
    tokens = torch.randint(7, (3, 4), generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
    samples = kept.nonzero()[:, 0]
    y = torch.randint(V, (len(samples),), generator=torch.Generator().manual_seed(1))

    def loss():
        f = model(tokens)[kept.flatten()]
        opt.observe(f, y, CE, samples=samples if said else None)
        return CE(f, y)

    got = step(opt, loss)
    J, output = oracles.jacobian(Part(model, lambda out: out[kept.flatten()]), tokens, named(opt))
    roots = oracles.output_roots(CE, output, y) if kind == "ggn" else oracles.output_gradients(CE, output, y)
    rows = torch.einsum("vme,mep->vmp", roots.flatten(2), J)
    if kind == "empirical_fisher":
        rows = rows.new_zeros(1, 3, rows.shape[-1]).index_add(1, samples, rows)
    close(got, torch.einsum("vmp,vmq->pq", rows, rows))


@pytest.mark.parametrize("said", [True, False])
def test_rows_that_cannot_be_found_need_not_be_for_a_curvature_that_is_none_of_samples(said):
    """Packed tokens of a model that cannot be differentiated twice."""
    model = cases.seeded(lambda: Attending(False)).double()
    opt = optimizer(model, None)
    tokens, kept = torch.randint(7, (3, 4), generator=torch.Generator().manual_seed(0)), torch.arange(12) % 5 != 3
    y = torch.randint(V, (int(kept.sum()),), generator=torch.Generator().manual_seed(1))
    f = model(tokens)[kept]
    opt.observe(f, y, CE, samples=(torch.arange(12) // 4)[kept] if said else None)
    CE(f, y).backward()
    got = measured(opt)
    with sdpa_kernel(SDPBackend.MATH):
        close(got, truth(opt, CE, tokens, y, "ggn", Part(model, lambda out: out[kept])))


def test_of_rows_that_cannot_be_found_there_is_no_empirical_fisher():
    """It is made of gradients of samples."""
    model = cases.seeded(lambda: Attending(False)).double()
    opt = optimizer(model, None, curv_type="empirical_fisher")
    tokens, kept = torch.randint(7, (3, 4), generator=torch.Generator().manual_seed(0)), torch.arange(12) % 5 != 3
    y = torch.randint(V, (int(kept.sum()),), generator=torch.Generator().manual_seed(1))
    f = model(tokens)[kept]
    opt.observe(f, y, CE)
    with pytest.raises(ValueError, match=r"observe\(output, target, samples=\)"):
        CE(f, y).backward()


def named(opt):
    """(name in a `Part` of the model, parameter)."""
    return [(f"model.{name}", p) for name, p in covered(opt)]


@pytest.mark.parametrize("samples", [[0, 0, 1], torch.tensor([0, 1]), torch.tensor([0.0, 1.0, 2.0])])
def test_what_is_said_of_rows_must_fit(samples):
    opt, (x, y) = optimizer(mlp(), None), batch(3)
    with pytest.raises(ValueError, match=r"samples= is a .*LongTensor \[3\]"):
        opt.observe(opt.model(x), y, CE, samples=samples)


def test_samples_that_are_said_are_those_of_the_terms_where_they_meet_in_the_layers():
    opt, (x, y) = optimizer(Mixed(), None, curv_type="empirical_fisher"), batch(4)
    f, said = opt.model(x), torch.tensor([0, 1, 2, 2])
    opt.observe(f, y, CE, samples=said)
    CE(f, y).backward()
    got, f = measured(opt), opt.model(x)
    each = torch.zeros(3, dtype=torch.double).index_add(0, said, F.cross_entropy(f, y, reduction="none"))
    G = rows_of(opt, each)
    close(got, G.T @ G / 4)


# ------------------------------------------------------------------- verified again, and refused where they meet


class Mixed(nn.Module):
    """Samples meet: each is compared with the mean of all."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, 5).double(), nn.Linear(5, V).double()

    def forward(self, x):
        h = self.a(x).tanh()
        return self.b(h - h.mean(0))


def contrastive(z):
    return z @ z.T


def one_pair(z):
    """Two of many samples meet."""
    return z + torch.cat([z[1:2], z[1:]])


FIXED = cases.randn(8, V, seed=5)
COUPLED = {
    "contrastive": contrastive,
    "symmetric, fixed side first": lambda z: (z @ FIXED[: len(z)].T).T,
    "attention over the batch": lambda z: (z @ z.T).softmax(-1) @ z,
    "mean of the batch": lambda z: z - z.mean(0),
    "neighbours": lambda z: z + z.roll(1, 0),
    "one pair": one_pair,
}


def rows_of(opt, f):
    """df/dθ [numel, P], in the order of `covered`."""
    params = [p for _, p in covered(opt)]
    return torch.stack([
        torch.cat([
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(params, torch.autograd.grad(one, params, retain_graph=True, allow_unused=True), strict=True)
        ])
        for one in f.flatten()
    ])  # fmt: skip


def curvature_of_rows(opt, f, y, kind):
    """J^T H J for the rows of f, and the sum of the outer products of their gradients."""
    if kind == "empirical_fisher":
        G = rows_of(opt, F.cross_entropy(f, y, reduction="none"))
        return G.T @ G / len(f)
    J, p = rows_of(opt, f).reshape(*f.shape, -1), f.detach().softmax(-1)
    H = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    return torch.einsum("ncp,ncd,ndq->pq", J, H, J) / len(f)


@pytest.mark.parametrize("kind", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("coupled", COUPLED)
@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("before", [0, 1, 3])
def test_samples_that_meet_have_the_curvature_of_what_each_depends_on(before, n, coupled, kind):
    """Also after losses in which they did not meet."""
    opt = optimizer(mlp(), None, curv_type=kind)
    x, y = batch(n)
    labels = torch.arange(n)

    def loss(f, target):
        opt.observe(f, target, CE)
        return CE(f, target)

    for _ in range(before):
        step(opt, lambda: loss(opt.model(x), y))
        step(opt, lambda: loss(opt.model(x) @ FIXED[:n].T, labels))
    f = COUPLED[coupled](opt.model(x))
    target = labels if f.shape[1] >= n else y.clamp_max(f.shape[1] - 1)
    expected = curvature_of_rows(opt, f, target, kind)
    close(step(opt, lambda: loss(COUPLED[coupled](opt.model(x)), target)), expected)


@pytest.mark.parametrize("approx", ["kfac", "ekfac", "diag", "unit", "block"])
def test_of_samples_that_meet_random_signals_add_up(approx):
    """The mean over many draws is the curvature; of "kfac" that with all rows as positions of one sample."""
    model, (x, y) = Mixed(), batch(3)
    exact = curvature(model, CE, [(x, y)], approx=approx, params=model.a.parameters())
    drawn = curvature(model, CE, [(x, y)] * 4000, approx=approx, samples=1, params=model.a.parameters())
    expected, found = exact.to_dense(), drawn.to_dense()
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("order", [1, 2])
def test_a_loss_of_derivatives_after_one_of_values_is_refused(order):
    """A Sobolev term, and the residual of a differential equation: the weights enter the derivatives too."""
    opt = optimizer(mlp(out=1), None)
    x, y = cases.randn(4, D), cases.randn(4, 1, seed=1)

    def data():
        f = opt.model(x)
        opt.observe(f, y, MSE)
        return MSE(f, y)

    step(opt, data)
    given = x.clone().requires_grad_()
    slope = opt.model(given)
    for _ in range(order):
        (slope,) = torch.autograd.grad(slope.sum(), given, create_graph=True)
    opt.observe(slope, torch.zeros_like(slope), MSE)
    with pytest.raises(RuntimeError, match=r"is not the one that|not a sum over samples|was taken with create_graph"):
        MSE(slope, torch.zeros_like(slope)).backward()


def test_a_weight_that_a_later_loss_uses_elsewhere_is_refused():
    opt, (x, y) = optimizer(mlp(), CE), batch(4)
    step(opt, lambda: CE(opt.model(x), y))
    with pytest.raises(RuntimeError, match="is not the one that the recorded calls"):
        CE(opt.model(x) + x[:, :1] * opt.model[2].weight.sum(1), y).backward()


@pytest.fixture
def looked_at(monkeypatch):
    """The blocks that the checks looked at, once for each signal they sent."""
    seen, own = [], GradientCheck.compared
    monkeypatch.setattr(GradientCheck, "compared", lambda *args: (seen.append(args[1].name), own(*args))[1])
    return seen


def test_ordinary_training_is_checked_once(looked_at):
    """With dropout, and a last batch of another size that is checked by one signal more."""
    model = nn.Sequential(mlp(), nn.Dropout(0.3), nn.Linear(V, V)).double()
    opt = optimizer(model, CE)
    counts = []
    for n in (8, 8, 8, 5, 8, 5, 8):
        x, y = batch(n, len(counts))
        step(opt, lambda x=x, y=y: CE(model(x), y))
        counts.append(len(looked_at))
    assert counts[0] == counts[2] > 0
    assert counts[3] == counts[-1] == counts[0] + 1


def test_sizes_that_change_all_the_time_are_checked_ever_more_rarely(looked_at):
    model = cases.seeded(lambda: nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, V))).double()
    opt = SecondOrderOptimizer(model, loss_fn=CE, lr=1e-9)
    for t in range(1, 401):
        opt.zero_grad()
        x = cases.randn(3, t, D, seed=t)
        CE(opt.model(x).movedim(-1, 1), torch.zeros(3, t, dtype=torch.long)).backward()
        opt.step()
    assert len(looked_at) <= 2 * (6 + 16 + 4)  # blocks times (at first, 16 sizes, and the 32nd, 64th, ...)


# --------------------------------------------------------------------- batches of one, numbers, and what fits


class Squeezed(nn.Module):
    def __init__(self, out=1, all_rows=False):
        super().__init__()
        self.model = mlp(out=out)

    def forward(self, x):
        return self.model(x).squeeze()


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss()])
@pytest.mark.parametrize("trigger", ["module", "name", "observe"])
def test_squeezed_outputs_and_a_last_batch_of_one(trigger, loss):
    name = "mse" if isinstance(loss, nn.MSELoss) else "bce_with_logits"
    opt = optimizer(Squeezed(), {"module": loss, "name": name, "observe": None}[trigger])
    for n in (4, 1, 3):
        x, y = cases.randn(n, D, seed=n), torch.rand(n, generator=torch.Generator().manual_seed(n)).double()
        y = y.squeeze()

        def value(x=x, y=y):
            f = opt.model(x)
            if trigger == "observe":
                opt.observe(f.reshape(-1), y.reshape(-1), loss)
            return loss(f, y)

        got = step(opt, value)
        close(got, truth(opt, loss, x, y.reshape(-1), "ggn", Part(opt.model, lambda out: out.reshape(-1))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_several_outputs_without_its_batch_dimension(kind):
    """squeeze() of [1, classes]."""
    opt = optimizer(Squeezed(V), CE, curv_type=kind)
    for n in (4, 1):
        x, y = batch(n, n)
        got = step(opt, lambda x=x, y=y: CE(opt.model(x), y.squeeze()))
        close(got, truth(opt, CE, x, y, kind, Part(opt.model, lambda out: out.reshape(-1, V))))


def test_a_model_that_returns_a_number_for_all_it_was_given():
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = mlp(out=1)

        def forward(self, x):
            return self.model(x).sum()

    opt = optimizer(Energy(), MSE)
    x, y = cases.randn(4, D), torch.tensor(0.3).double()
    got = step(opt, lambda: MSE(opt.model(x), y))
    close(got, truth(opt, MSE, x, y.reshape(1, 1), "ggn", Part(opt.model, lambda out: out.reshape(1, 1))))


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("shapes", [((4, 1), (4,)), ((4,), (4, 1)), ((4, 1), (4, 3))])
def test_a_target_that_torch_would_compare_each_with_each(shapes):
    out, target = shapes
    opt = optimizer(mlp(out=1), MSE)
    with pytest.raises(ValueError, match="each with each"):
        MSE(opt.model(cases.randn(4, D)).reshape(out), cases.randn(*target)).backward()


def test_a_target_that_is_repeated_is_as_torch_has_it():
    opt = optimizer(mlp(), MSE)
    x, y = cases.randn(4, D), cases.randn(V)
    with pytest.warns(UserWarning, match="Using a target size"):
        got = step(opt, lambda: MSE(opt.model(x), y))
    close(got, truth(opt, MSE, x, y.expand(4, V)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16])
def test_labels_of_small_types(dtype):
    x, y = batch(4)
    model = mlp()
    got = curvature(model, CE, [(x, y.to(dtype))], approx="diag")
    expected = curvature(model, CE, [(x, y)], approx="diag")
    assert torch.equal(got.diag(), expected.diag())


BATCHES = {
    "a dict": (
        {"x": torch.zeros(2, D).double(), "labels": torch.zeros(2).long()},
        "a dict with the keys 'x', 'labels'",
    ),
    "three": ((torch.zeros(2, D), torch.zeros(2, D), torch.zeros(2).long()), "a tuple of Tensor, Tensor, Tensor"),
    "inputs alone": (torch.zeros(2, D), "a Tensor"),
    "labels of a list": ((torch.zeros(2, D), [0, 1]), "a tuple of Tensor, list"),
}


@pytest.mark.parametrize("given", BATCHES)
@pytest.mark.parametrize("approx", ["kfac", "operator", "laplace"])
def test_batches_that_are_no_pairs(approx, given):
    data, message = BATCHES[given]
    model = mlp()
    with pytest.raises(TypeError, match=f"data gave {message}.*pair"):
        if approx == "laplace":
            laplace(model, CE, [data])
        elif approx == "operator":
            curvature(model, CE, [data], approx=approx).matvec(torch.zeros(sum(p.numel() for p in model.parameters())))
        else:
            curvature(model, CE, [data], approx=approx)


# ---------------------------------------------------------------------------------------- other layers and ways


class Normed(nn.Module):
    """A convolution and a layer norm on images, pooled to one row for each."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Linear(3, V)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).tanh().mean((2, 3)))


@pytest.mark.parametrize("kind", [*KINDS, "hessian"])
@pytest.mark.parametrize("part", ["half", "flipped", "views"])
def test_parts_of_a_batch_of_images(part, kind):
    model = cases.seeded(Normed).double()
    opt = optimizer(model, None, curv_type=kind)
    x = cases.randn(4, 2, 5, 5)
    of = {
        "half": lambda out: out[2:],
        "flipped": lambda out: out.flip(0),
        "views": lambda out: out.reshape(2, 2, V).sum(0),
    }[part]
    y = batch(len(of(x[:, 0, 0, :V])) if part != "views" else 2)[1]

    def loss():
        f = of(model(x))
        opt.observe(f, y, CE)
        return CE(f, y)

    got = step(opt, loss)
    outer = Part(model, of)
    close(got, oracles.hessian(outer, CE, x, y, named(opt)) if kind == "hessian" else truth(opt, CE, x, y, kind, outer))


@pytest.mark.parametrize("part", ["half", "flipped"])
def test_parts_of_a_batch_with_statistics_of_the_whole(part):
    """Batch norm in train mode, whose statistics count as constants: those of the same network in eval mode."""
    of = {"half": lambda out: out[2:], "flipped": lambda out: out.flip(0)}[part]
    model = cases.seeded(lambda: nn.Sequential(nn.BatchNorm1d(D), *mlp())).double()
    x, y = cases.randn(5, D), batch(3 if part == "half" else 5)[1]
    opt = optimizer(model, None)

    def loss():
        f = of(model(x))
        opt.observe(f, y, CE)
        return CE(f, y)

    got = step(opt, loss)
    model[0].running_mean, model[0].running_var = x.mean(0), x.var(0, correction=0)
    close(got, truth(opt, CE, x, y, "ggn", Part(model.eval(), of)))


@pytest.mark.parametrize("approx", ["kfac", "diag", "full"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_curvature_of_ragged_bags_of_tokens(approx, sharing):
    """Padding costs nothing: equal to the sum over samples that are measured one at a time."""
    model = cases.seeded(lambda: Bags()).double()
    tokens = torch.tensor([1, 2, 3, 3, 0, 5])
    graph = torch.tensor([0, 0, 1, 1, 1, 2])
    y = torch.tensor([0, 2, 1])
    sum_ce = nn.CrossEntropyLoss(reduction="sum")
    got = curvature(model, sum_ce, [({"tokens": tokens, "graph": graph, "n": 3}, y)], approx=approx, sharing=sharing)
    if approx != "kfac":
        each = [
            ({"tokens": tokens[graph == k], "graph": graph[graph == k] * 0, "n": 1}, y[k : k + 1]) for k in range(3)
        ]
        parts = sum(curvature(model, sum_ce, [pair], approx=approx, sharing=sharing).to_dense() for pair in each)
        close(got.to_dense(), parts)
        return
    counts = torch.bincount(tokens, minlength=7).double() / len(tokens)
    if sharing == "reduce":
        bags = torch.stack([torch.bincount(tokens[graph == k], minlength=7).double() for k in range(3)])
        bags = bags / bags.sum(1, keepdim=True)
        counts = bags.square().mean(0)
    dense = got.to_dense()[: 7 * 3, : 7 * 3].reshape(7, 3, 7, 3)
    sizes = torch.stack([dense[k, :, k].diagonal().sum() for k in range(7)])
    close(sizes / sizes.sum(), counts / counts.sum())


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 3), nn.Linear(3, V)

    def forward(self, tokens, graph, n):
        return self.head(_indexed(self.embedding(tokens), graph, n).tanh())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_found_in_every_precision(dtype):
    model = cases.seeded(lambda: ManyHeads(2)).to(dtype)
    (x, _), (_, y) = batch(4), batch(8)
    got = curvature(model, CE, [(x.to(dtype), y)], approx="full").to_dense()
    exact = curvature(model.double(), CE, [(x.to(dtype).double(), y)], approx="full").to_dense()
    assert (got - exact).norm() <= 30 * torch.finfo(dtype).eps * exact.norm()


def test_blocks_whose_samples_meet_are_measured_beside_the_others():
    class Below(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixed, self.head = Mixed(), nn.Linear(V, V)

        def forward(self, x):
            return self.head(self.mixed(x).tanh())

    model, (x, y) = cases.seeded(Below).double(), batch(4)
    opt = optimizer(model, CE, approx="block")
    for _ in range(2):
        step_once(opt, lambda: CE(model(x), y))
    f, p = model(x), model(x).detach().softmax(-1)
    H = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    for name, block in opt.blocks.items():
        params = list(model.get_submodule(name).parameters())
        J = torch.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(one, params, retain_graph=True)]) for one in f.flatten()
        ]).reshape(*f.shape, -1)  # fmt: skip
        truth_of_block = torch.einsum("ncp,ncd,ndq->pq", J, H, J) / len(f)
        close(block.approx.trace(block.tensors), truth_of_block.trace())


def test_blocks_that_are_measured_in_turns():
    """Each block is checked, whatever the others that are due with it."""
    model = cases.seeded(lambda: ManyHeads(2)).double()
    turns = {"trunk": 1, "heads.0": 2, "heads.1": 3}
    groups = [
        {"params": [p for name, p in model.named_parameters() if name.startswith(key)], "update_every": every}
        for key, every in turns.items()
    ]
    exact = {"samples": None, "ema_decay": 0.0, "damping": 1.0, "damping_type": "exact"}
    opt = SecondOrderOptimizer(model, groups, loss_fn=CE, lr=1e-30, approx="block", **exact)
    for k in range(7):
        (x, _), (_, y) = batch(4, k), batch(8, k)
        step_once(opt, lambda x=x, y=y: CE(model(x), y))
        for name, every in turns.items():
            if k % every == 0:
                params = [(key, p) for key, p in model.named_parameters() if key.startswith(name)]
                v = [cases.randn(*p.shape, seed=3) for _, p in params]
                got = torch.cat([part.flatten() for part in opt.blocks[name].matvec(v)])
                close(got, oracles.ggn(model, CE, x, y, params) @ torch.cat([part.flatten() for part in v]))


# ------------------------------------------------------------------------------------------------ random routes


def route(rng, m):
    """(a random function of the rows of a tensor, how many rows it makes of m)."""
    steps = []
    for _ in range(rng.randint(1, 3)):
        pairs, order = m % 2 == 0, torch.tensor(rng.sample(range(m), m))
        start, few = rng.randrange(m), rng.randint(1, m)
        groups = torch.tensor([*range(few), *(rng.randrange(few) for _ in range(m - few))])[order]
        choices = {
            "permute": (lambda h, order=order: h[order], m),
            "cut": (lambda h, start=start: h[start:], m - start),
            "pick": (lambda h, order=order[:few]: h[order], few),
            "join": (lambda h: torch.cat([h, h.tanh()]), 2 * m),
            "repeat": (lambda h: torch.stack([h, h * h], 1).flatten(0, 1), 2 * m),
            "pool": (lambda h, groups=groups, few=few: h.new_zeros(few, h.shape[1]).index_add(0, groups, h), few),
            "roll": (lambda h, few=few: h.roll(few, 0), m),
            "views": (lambda h, m=m: h[: m // 2] + h[m // 2 :], m // 2) if pairs else (lambda h: h, m),
            "pairs": (lambda h: h.unflatten(0, (-1, 2)).sum(1), m // 2) if pairs else (lambda h: h, m),
        }
        function, m = choices[rng.choice(list(choices))]
        steps.append(function)

    def run(h):
        for function in steps:
            h = function(h)
        return h

    return run, m


class Routed(nn.Module):
    """Two layers, and what moves the rows after each."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, 4), nn.Linear(4, V)

    def forward(self, x):
        return self.after(self.b(self.between(self.a(x).tanh())))


@pytest.mark.parametrize("seed", range(8))
def test_random_routes_of_rows_are_right_or_refused(seed):
    """One optimizer after the other, each over several routes: never silently wrong."""
    right = refused = 0
    for draw in range(12):
        rng = random.Random(100 * seed + draw)
        opt = optimizer(cases.seeded(Routed).double(), None)
        for _ in range(3):
            n = rng.randint(1, 8)
            opt.model.between, m = route(rng, n)
            opt.model.after, m = route(rng, m)
            part, m = route(rng, m)
            x, y = cases.randn(n, D, seed=draw), batch(m, draw)[1]
            try:
                f = part(opt.model(x))
                opt.observe(f, y, CE)
                got = step(opt, lambda f=f, y=y: CE(f, y))
            except (RuntimeError, ValueError) as error:
                assert re.search("not a sum over samples|no multiple of the batch size", str(error))
                refused += 1
                break
            close(got, truth(opt, CE, x, y, "ggn", Part(opt.model, part)))
            right += 1
    assert right > refused / 2  # most of these do join samples


class Towers(nn.Module):
    """Each output of a sample is a product with what another sample gives."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.twice = nn.Linear(4, 3), nn.Linear(4, 3), False

    def forward(self, x):
        left = self.left(x)
        if self.twice:
            left = left + F.linear(x, self.left.weight)
        return left @ self.right(x).T


def test_layers_of_samples_that_meet_are_compared_once(monkeypatch):
    """The products that mix the samples change with the weights, and what they mix is not asked."""
    probes = []
    monkeypatch.setattr(Probe, "run", lambda self, light, run=Probe.run: probes.append(light) or run(self, light))
    torch.manual_seed(0)
    model, x, y = Towers(), torch.randn(5, 4), torch.arange(5)
    opt = SecondOrderOptimizer(model, loss_fn="cross_entropy", update_every=1, refactor_every=1)
    for k in range(4):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        if k == 1:
            probes.clear()
    assert not probes
    model.twice = True
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="is not the one that the recorded calls of the layer explain"):
        F.cross_entropy(model(x), y).backward()


class Odd(nn.Module):
    """Weights that are used past their modules, and a token that is used otherwise than as a bias."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, 3)
        self.shift, self.token = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(1, 1, 6))
        self.scaled = self.Standardised(6, 6)

    class Standardised(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight / self.weight.norm(), self.bias)

    def forward(self, x):
        h = F.linear(x, self.qkv.weight, torch.cat([self.shift, torch.zeros_like(self.shift)]))
        both = torch.stack([h, self.token.expand(len(x), -1, -1).squeeze(1)], 1)
        return self.head(self.scaled((both.softmax(1) * both).sum(1)).tanh())


def test_odd_parameters_of_a_joined_block_are_taken_alone_and_the_others_stay():
    torch.manual_seed(0)
    model, (x, y) = Odd().double(), batch(5, out=3)
    error = error_of_full(model, lambda: F.cross_entropy(model(x), y), lambda: model(x), loss_fn="cross_entropy")
    assert error <= 1e-10


class Pooled(nn.Module):
    """Attention within each row of the batch, and rows that are added up to the samples of an index."""

    def __init__(self, index):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(D, 2, batch_first=True), nn.Linear(D, V)
        self.index = torch.tensor(index)

    def forward(self, x):
        h = self.attention(x, x, x, need_weights=False)[0].mean(1)
        return self.head(h.new_zeros(3, D).index_add(0, self.index, h))


@pytest.mark.parametrize("index", [[0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 2]], ids=str)
def test_products_with_a_part_of_a_weight_in_samples_of_unequal_numbers_of_rows(index):
    """q, k and v are one product, whose output has three times the positions of each."""
    model, x, y = cases.seeded(lambda: Pooled(index)), cases.randn(6, 5, D), torch.arange(3)
    found = curvature(model, CE, [(x, y)], approx="diag")
    rows = root_rows(model(x), found.params)
    close(found.diag(), rows.square().sum(0))
    error = error_of_full(model, lambda: CE(model(x), y), lambda: model(x), loss_fn=CE)
    assert error <= 1e-10
    traces = [curvature(model, CE, [(x, y)], approx=a).trace() for a in ("diag", "block", "kfac", "ekfac")]
    assert torch.isfinite(torch.stack(traces)).all() and torch.allclose(traces[0], traces[1])


@pytest.mark.parametrize("limit", [30, 29])
def test_the_positions_of_q_k_and_v_are_counted_once(limit):
    """Six rows of five positions: a limit of thirty leaves all of them in, one less takes every second sample."""
    model, x, y = cases.seeded(lambda: Pooled([0, 1, 2, 0, 1, 2])), cases.randn(6, 5, D), torch.arange(3)
    whole, part = (curvature(model, CE, [(x, y)], approx="kfac", max_positions=m) for m in (None, limit))
    same = torch.equal(whole.trace(), part.trace())
    assert same == (limit == 30)
