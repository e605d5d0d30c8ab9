"""Layers inside modules, tied weights, tokens and sides, against dense truths."""

import copy
import itertools

import cases
import oracles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchcurv import SecondOrderOptimizer, curvature
from torchcurv.curv.layers.one_hot import Tokens
from torchcurv.curv.linalg import block_diagonal as sides
from torchcurv.curv.statistics.gram import block_gram

KINDS = ["ggn", "empirical_fisher"]
CE = nn.CrossEntropyLoss()
over_kinds = pytest.mark.parametrize("kind", KINDS)


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def close(x: Tensor, truth: Tensor, tol: float = 1e-9) -> None:
    assert x.shape == truth.shape
    assert (x - truth).abs().max() <= tol * max(1e-12, float(truth.abs().max()))


def call(model: nn.Module, x) -> Tensor:
    return model(*x) if isinstance(x, tuple) else model(x)


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def dense_rows(model: nn.Module, loss: nn.Module, x, y: Tensor, kind: str) -> Tensor:
    """V [v, n, p] with C = sum_{v,n} V V^T, one backward pass per output element."""
    params, output = trainable(model), call(model, x)
    rows = []
    for entry in output.flatten():
        grads = torch.autograd.grad(entry, params, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    J, output = torch.stack(rows).reshape(len(output), -1, len(rows[0])), output.detach()
    U = oracles.output_roots(loss, output, y) if kind == "ggn" else oracles.output_gradients(loss, output, y)
    return torch.einsum("vne,nep->vnp", U.flatten(2), J)


def dense(model: nn.Module, loss: nn.Module, x, y: Tensor, kind: str) -> Tensor:
    V = dense_rows(model, loss, x, y, kind).flatten(0, 1)
    return V.T @ V


def indices_of(c) -> dict[str, Tensor]:
    """Block name -> where its elements lie in the order of parameters_to_vector(c.params)."""
    where, start = {}, 0
    for p in c.params:
        where[p] = torch.arange(start, start + p.numel()).view(p.shape)
        start += p.numel()
    return {
        name: torch.cat([(where[p] if rows is None else where[p][rows]).flatten() for p, rows in block.pieces])
        for name, block in c.blocks.items()
    }


def only_blocks(c, truth: Tensor) -> Tensor:
    """The truth, zero outside of the blocks of c, each of whose elements lies in one block."""
    out, indices = torch.zeros_like(truth), indices_of(c)
    assert torch.equal(torch.cat(list(indices.values())).sort().values, torch.arange(len(truth)))
    for index in indices.values():
        grid = torch.meshgrid(index, index, indexing="ij")
        out[grid] = truth[grid]
    return out


def check(model: nn.Module, x, y: Tensor, kind: str = "ggn", loss: nn.Module = CE) -> None:
    """Block and diagonal are those of the loss."""
    truth = dense(model, loss, x, y, kind)
    c = curvature(model, loss, [(x, y)], curv_type=kind, approx="block", rows_limit=10**6)
    got, expected = c.to_dense(), only_blocks(c, truth)
    for name, index in indices_of(c).items():
        gap, size = (got - expected)[index].abs().max(), expected[index].abs().max()
        assert gap <= 1e-9 * size + 1e-15, f"{name}: {gap:.1e} of {size:.1e}"
    close(curvature(model, loss, [(x, y)], curv_type=kind, approx="diag").diag(), truth.diag())


# --- bare parameters ----------------------------------------------------------------------------------------


class Using(nn.Module):
    """A linear layer, what `use` does to its output [n, 5, 4] with parameters, a linear layer."""

    def __init__(self, use, buffers: dict[str, Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.use, self.first, self.last = use, nn.Linear(3, 4), nn.Linear(4, 3)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(*shape) if shape else torch.tensor(0.7)))
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.use(self, torch.tanh(self.first(x)))).mean(1))


def using(use, buffers: dict[str, Tensor] | None = None, **shapes: tuple[int, ...]) -> nn.Module:
    return cases.seeded(lambda: Using(use, buffers or {}, **shapes))


def data(n: int, t: int = 5) -> tuple[Tensor, Tensor]:
    return cases.randn(n, t, 3, seed=1), integers(3, n, seed=2)


def inplace_add(m, h):
    h = h * 1
    h += m.p
    return h


def inplace_mul(m, h):
    h = h * 1
    h *= m.p
    return h


def heads(h: Tensor) -> Tensor:
    return h.unflatten(-1, (2, 2)).transpose(1, 2)  # n h t d


def swin(m, h):
    """A relative position bias: a table [entries, heads] indexed by a buffer [t t], added to the scores."""
    q = heads(h)
    bias = m.p[m.index.view(-1)].view(5, 5, -1).permute(2, 0, 1).contiguous()
    scores = q @ q.mT + bias.unsqueeze(0)
    return (scores.softmax(-1) @ q).transpose(1, 2).flatten(2)


def partly_frozen(m, h):
    return torch.cat([h[..., :2] + m.p[:2].detach(), h[..., 2:] + m.p[2:]], -1)


RELATIVE = {"index": torch.arange(5)[:, None] - torch.arange(5)[None] + 4}
USES = {
    "bias": (lambda m, h: h + m.p, {"p": (4,)}),
    "bias_first": (lambda m, h: m.p + h, {"p": (4,)}),
    "scale": (lambda m, h: h * m.p, {"p": (4,)}),
    "scale_first": (lambda m, h: m.p * h, {"p": (4,)}),
    "minus": (lambda m, h: h - m.p, {"p": (4,)}),
    "minus_first": (lambda m, h: m.p - h, {"p": (1, 1, 4)}),
    "alpha": (lambda m, h: torch.add(h, m.p, alpha=2), {"p": (4,)}),
    "alpha_method": (lambda m, h: h.add(m.p, alpha=-3), {"p": (4,)}),
    "alpha_first": (lambda m, h: torch.add(m.p, h, alpha=2), {"p": (4,)}),
    "sub_alpha": (lambda m, h: torch.sub(h, m.p, alpha=2), {"p": (4,)}),
    "sub_alpha_first": (lambda m, h: torch.sub(m.p, h, alpha=2), {"p": (4,)}),
    "inplace_add": (inplace_add, {"p": (4,)}),
    "inplace_mul": (inplace_mul, {"p": (4,)}),
    "inplace_add_method": (lambda m, h: (h * 1).add_(m.p, alpha=2), {"p": (4,)}),
    "inplace_sub_method": (lambda m, h: (h * 1).sub_(m.p), {"p": (5, 4)}),
    "modulation": (lambda m, h: h * (1 + m.p), {"p": (4,)}),
    "modulation_2": (lambda m, h: (2 * m.p - 1) * h * 3, {"p": (4,)}),
    "scaled_bias": (lambda m, h: h + 0.5 * m.p * 3, {"p": (4,)}),
    "position": (lambda m, h: h + m.p, {"p": (1, 5, 4)}),
    "position_2d": (lambda m, h: h + m.p, {"p": (5, 4)}),
    "position_slice": (lambda m, h: h + m.p[:, : h.shape[1]], {"p": (1, 8, 4)}),
    "position_narrow": (lambda m, h: h + m.p.narrow(0, 1, 5), {"p": (8, 4)}),
    "position_index": (lambda m, h: h + m.p[torch.tensor([4, 0, 0, 2, 1])], {"p": (6, 4)}),
    "none": (lambda m, h: h + m.p[None], {"p": (5, 4)}),
    "ellipsis": (lambda m, h: h * m.p[..., None], {"p": (5,)}),
    "view": (lambda m, h: h + m.p.view(1, 5, 4), {"p": (20,)}),
    "reshape": (lambda m, h: h + torch.reshape(m.p, (5, 4)), {"p": (4, 5)}),
    "unsqueeze": (lambda m, h: h * m.p.unsqueeze(0).unsqueeze(0), {"p": (4,)}),
    "permute": (lambda m, h: h + m.p.permute(1, 0), {"p": (4, 5)}),
    "transpose": (lambda m, h: h + m.p.t(), {"p": (4, 5)}),
    "T": (lambda m, h: h + m.p.T, {"p": (4, 5)}),
    "expand": (lambda m, h: h + m.p.expand(len(h), -1, -1), {"p": (1, 5, 4)}),
    "expand_as": (lambda m, h: h * m.p.expand_as(h), {"p": (4,)}),
    "repeat": (lambda m, h: h + m.p.repeat(len(h), 1, 1), {"p": (1, 5, 4)}),
    "repeat_positions": (lambda m, h: h + m.p.repeat(5, 1), {"p": (1, 4)}),
    "token": (lambda m, h: torch.cat([m.p.expand(len(h), -1, -1), h], 1), {"p": (1, 1, 4)}),
    "token_list": (lambda m, h: torch.concat((h, m.p.repeat(len(h), 1, 1)), dim=1), {"p": (1, 2, 4)}),
    "cast": (lambda m, h: h + m.p.to(h.dtype), {"p": (4,)}),
    "type_as": (lambda m, h: h * m.p.type_as(h), {"p": (4,)}),
    "scalar": (lambda m, h: h * m.p, {"p": ()}),
    "scalar_bias": (lambda m, h: h + m.p, {"p": ()}),
    "temperature": (lambda m, h: ((h @ h.mT) * m.p).softmax(-1) @ h, {"p": (1,)}),
    "head_temperature": (lambda m, h: ((heads(h) @ heads(h).mT) * m.p).sum(1) @ h, {"p": (2, 1, 1)}),
    "twice": (lambda m, h: (h * m.p).sin() * m.p, {"p": (4,)}),
    "twice_both": (lambda m, h: (h * m.p).sin() + m.p[0], {"p": (4,)}),
    "token_and_bias": (lambda m, h: torch.cat([m.p.expand(len(h), -1, -1), h + m.p], 1), {"p": (1, 1, 4)}),
    "one_token_twice": (lambda m, h: (lambda c: torch.cat([c, h, c], 1))(m.p.expand(len(h), -1, -1)), {"p": (1, 1, 4)}),
    "queries": (
        lambda m, h: (lambda q: (q @ h.mT).softmax(-1) @ h + q)(m.p.expand(len(h), -1, -1)),
        {"p": (2, 4)},
    ),
    "affine": (lambda m, h: h * m.p + m.q, {"p": (4,), "q": (4,)}),
    "affine_fused": (lambda m, h: torch.addcmul(m.q.expand_as(h), h, m.p.expand_as(h)), {"p": (4,), "q": (4,)}),
    "product_expanded": (lambda m, h: h + m.p.expand_as(h) * m.q.expand_as(h), {"p": (4,), "q": (4,)}),
    "layer_scale": (lambda m, h: h + m.p * h.sin(), {"p": (4,)}),
    "under_no_grad": (lambda m, h: h * m.p + (h * m.p).detach().sin(), {"p": (4,)}),
    "one_row": (lambda m, h: h + m.p[1], {"p": (3, 4)}),
    "partly_frozen": (partly_frozen, {"p": (4,)}),
    "sub_slices": (lambda m, h: torch.cat([h[..., :2] * m.p[:2], h[..., 2:] + m.p[2:]], -1), {"p": (4,)}),
    "transposed_batch": (lambda m, h: (h.transpose(1, 2) + m.p[:, None]).transpose(1, 2), {"p": (4,)}),
}
NOT_READ = {"T", "affine_fused", "one_token_twice", "queries", "token_and_bias"}  # may also raise


def right_or_refused(model: nn.Module, x: Tensor, y: Tensor, kind: str, name: str) -> bool:
    """Whether the curvature is there and right; an error must name the parameter."""
    try:
        check(model, x, y, kind)
    except (RuntimeError, ValueError) as error:
        assert name in str(error) and "approx=None" in str(error)
        return False
    return True


@pytest.mark.pairwise
@over_kinds
@pytest.mark.parametrize("n", [3, 1])
@pytest.mark.parametrize("use", USES)
def test_bare_parameters(use, n, kind):
    function, shapes = USES[use]
    model, (x, y) = using(function, **shapes), data(n)
    if use in NOT_READ:
        right_or_refused(model, x, y, kind, "p")
    else:
        check(model, x, y, kind)


@over_kinds
@pytest.mark.parametrize("n", [2, 1])
def test_a_table_of_relative_positions(n, kind):
    model = using(swin, RELATIVE, p=(9, 2))
    check(model, *data(n), kind)


REFUSED = {
    "linear": (lambda m, h: F.linear(h, m.p), {"p": (4, 4)}),
    "matmul": (lambda m, h: h @ m.p, {"p": (4, 4)}),
    "einsum": (lambda m, h: torch.einsum("nti,io->nto", h, m.p), {"p": (4, 4)}),
    "softmax": (lambda m, h: h * m.p.softmax(0), {"p": (4,)}),
    "divide": (lambda m, h: h / m.p, {"p": (4,)}),
    "exponent": (lambda m, h: h.abs() ** m.p, {"p": (4,)}),
    "exp": (lambda m, h: h * m.p.exp(), {"p": ()}),
    "product": (lambda m, h: h * (m.p * m.q), {"p": (4,), "q": (4,)}),
    "square": (lambda m, h: h * (m.p * m.p), {"p": (4,)}),
    "buffer": (lambda m, h: h + (m.p + m.b), {"p": (4,)}),
    "one_minus": (lambda m, h: h * (1 - m.p), {"p": (4,)}),
    "where": (lambda m, h: torch.where(h > 0, h, m.p), {"p": (4,)}),
    "matmul_twice": (lambda m, h: (h * m.p[0]) @ m.p, {"p": (4, 4)}),
    "of_the_sample": (lambda m, h: h + m.p[torch.arange(len(h)) % 2].unsqueeze(1), {"p": (2, 4)}),
    "inplace_on_a_view": (lambda m, h: (lambda g: (g[:, 0].add_(m.p), g)[1])(h * 1), {"p": (4,)}),
    "clone_exp_": (lambda m, h: h * m.p.clone().exp_(), {"p": (4,)}),
    "masked": (lambda m, h: h + m.p.clone().masked_fill_(torch.arange(4) > 1, 0), {"p": (4,)}),
}


@pytest.mark.pairwise
@over_kinds
@pytest.mark.parametrize("n", [3, 1])
@pytest.mark.parametrize("use", REFUSED)
def test_other_uses_raise_or_are_right(use, n, kind):
    function, shapes = REFUSED[use]
    model = using(function, {"b": cases.randn(5, 4, seed=5)}, **shapes)
    right_or_refused(model, *data(n), kind, "p")


def step(model: nn.Module, x, y: Tensor, **options) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what one step of rate 1 took away, gradients) by name."""
    settings = {"approx": "diag", "samples": None, "lr": 1.0, "momentum": 0.0, "damping": 0.1, "kl_clip": None}
    optimizer = SecondOrderOptimizer(model, loss_fn=CE, **settings, **options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    CE(call(model, x), y).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    optimizer.remove()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}, grads


def test_a_use_by_one_sample_alone_is_noticed_whichever_half_sends_first():
    """The gradients of samples are taken one by one, where each is the first of its batch."""
    function, shapes = REFUSED["of_the_sample"]
    model, (x, y) = using(function, {"b": cases.randn(5, 4, seed=5)}, **shapes), data(3)
    truth = dense(model, CE, x, y, "ggn").diag()
    for seed in range(10):
        close(curvature(model, CE, [(x, y)], approx="diag", seed=seed).diag(), truth)


@pytest.mark.parametrize("use", REFUSED)
def test_other_uses_have_a_curvature_of_their_elements(use):
    function, shapes = REFUSED[use]
    model, (x, y) = using(function, {"b": cases.randn(5, 4, seed=5)}, **shapes), data(3)
    diag = dense(model, CE, x, y, "ggn").diag()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    taken, grads = step(model, x, y)
    for (name, g), part in zip(grads.items(), diag.split(list(sizes.values())), strict=True):
        if name == "p" and use in (
            "inplace_on_a_view",
            "of_the_sample",
        ):  # which is found out in this step, and measured in the next
            close(taken[name], g / g.norm().clamp_min(1))
        else:
            close(taken[name], g / (part.view_as(g) + 0.1))


MISLEADING = {  # dimension 0 is as long as the batch, and is not the batch
    "buffer": REFUSED["buffer"],
    "buffer_first": (lambda m, h: h + m.b * m.p, {"p": (4,)}),
    "scalar_and_buffer": (lambda m, h: h + m.b * m.p, {"p": (1,)}),
    "of_the_weight": (lambda m, h: F.linear(h, m.p * m.b[:4]), {"p": (1,)}),
    "time_first": (lambda m, h: (h.transpose(0, 1) * m.p).transpose(0, 1), {"p": (4,)}),
    "time_first_expanded": (lambda m, h: (m.p.expand(5, 1, 4) * h.transpose(0, 1)).transpose(0, 1), {"p": (4,)}),
    "expanded_and_softmax": (lambda m, h: h * m.p.expand(5, 4).softmax(1), {"p": (4,)}),
    "expanded_and_0d": (lambda m, h: h + m.p.expand(len(h), 1, 4) * m.b[0, 0], {"p": (4,)}),
    "position_of_positions": (lambda m, h: h + m.p, {"p": (5, 4)}),
}


@pytest.mark.pairwise
@over_kinds
@pytest.mark.parametrize("n", [5, 4])
@pytest.mark.parametrize("use", MISLEADING)
def test_dimensions_that_look_like_the_batch(use, n, kind):
    function, shapes = MISLEADING[use]
    model = using(function, {"b": cases.randn(5, 4, seed=5)}, **shapes)
    right_or_refused(model, *data(n), kind, "p")


def gated(m, h):
    return h * m.p + m.gate * (h @ m.p.softmax(0).diag())


CHANGES = {
    "inplace_scale_of_one": (inplace_mul, {"p": (4,)}, {"p": 1.0}, {"p": 0.5}),
    "gate_of_zero": (gated, {"p": (4,), "gate": (1,)}, {"gate": 0.0}, {"gate": 2.0}),
    "another_use": (
        lambda m, h: h * m.p if m.gate == 0 else h * m.p * m.p.softmax(0) * m.gate,
        {"p": (4,), "gate": (1,)},
        {"gate": 0.0},
        {"gate": 2.0},
    ),
    "exp_at_zero": (lambda m, h: h * m.p + m.p.clone().exp_() * h.sin(), {"p": (4,)}, {"p": 0.0}, {"p": 0.5}),
}


@pytest.mark.parametrize("approx", ["unit", "diag"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_right_once_is_checked_again_when_it_changes(change, approx):
    use, shapes, first, then = CHANGES[change]
    model, (x, y) = using(use, **shapes), data(3)
    options = {"approx": approx, "samples": None, "lr": 1.0, "momentum": 0.0, "kl_clip": None, "ema_decay": 0.0}
    optimizer = SecondOrderOptimizer(model, loss_fn=CE, damping=0.1, update_every=1, refactor_every=1, **options)
    named = dict(model.named_parameters())
    try:
        for values in (first, then):
            with torch.no_grad():
                for name, value in values.items():
                    named[name].fill_(value)
            truth = dense(copy.deepcopy(model), CE, x, y, "ggn").diag()
            before = {name: p.detach().clone() for name, p in named.items()}
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
    except RuntimeError as error:
        assert "p" in str(error) and "approx=None" in str(error)
        return
    parts = dict(zip(named, truth.split([p.numel() for p in named.values()]), strict=True))
    p = named["p"]
    close(before["p"] - p.detach(), p.grad / (parts["p"].view_as(p) + 0.1))


class TiedBias(nn.Module):
    """An output head whose bias is also a parameter of the module around it."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(3))
        self.decoder = nn.Linear(4, 3)
        self.decoder.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x)


class Shared(nn.Module):
    """One bare parameter in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Using(USES["bias"][0], {}, p=(4,)), nn.Module(), nn.Linear(3, 3)
        self.second = Using(USES["bias"][0], {}, p=(4,))
        self.second.p = self.first.p

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(2 * x)


class Inside(nn.Module):
    """A parameter of the parent is used in the forward of its children."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.p = nn.Parameter(torch.randn(4))
        self.child = Adds()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.child(self.child(self.first(x), self.p), self.p).mean(1))


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, p: Tensor) -> Tensor:
        return (x * p).tanh() + self.q


class FromOutside(Inside):
    """A parameter of a child is used by its parent."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) * self.child.q + self.p).tanh().mean(1))


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.p = nn.ParameterList([torch.randn(4), torch.randn(4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) * self.p[0] + self.p[1]).tanh().mean(1))


class Keywords(Inside):
    """What the module gets first is not the batch; a number and a mask come before it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.child(p=self.p, x=self.first(x)).mean(1))


@over_kinds
@pytest.mark.parametrize("make", [Inside, Keywords])
def test_parameters_across_modules(make, kind):
    check(cases.seeded(make), *data(3), kind)


@over_kinds
@pytest.mark.parametrize("make, name", [(Shared, "p"), (FromOutside, "child.q"), (Listed, "p.0")])
def test_parameters_across_modules_are_right_or_refused(make, name, kind):
    try:
        check(cases.seeded(make), *data(3), kind)
    except (RuntimeError, ValueError) as error:
        assert name in str(error)


@over_kinds
def test_a_bias_that_two_modules_hold(kind):
    x, y = cases.randn(4, 4, seed=1), integers(3, 4)
    check(cases.seeded(TiedBias), x, y, kind)


@pytest.mark.parametrize("use", ["scale", "bias", "affine", "token", "position"])
@pytest.mark.parametrize("frozen", ["p", "first.weight", "last.bias"])
def test_frozen_parameters(use, frozen):
    function, shapes = USES[use]
    model = using(function, **shapes)
    model.get_parameter(frozen).requires_grad_(False)
    check(model, *data(3))


def test_a_projection_without_gradient_of_its_parameter():
    """What is computed from a parameter without gradients is a constant."""

    def use(m, h):
        with torch.no_grad():
            constant = m.p[None]
        return h * m.p + constant

    check(using(use, p=(4,)), *data(3))


@pytest.mark.parametrize("n", [3, 1])
@pytest.mark.parametrize(
    "use", [*sorted(REFUSED.keys() - {"of_the_sample", "inplace_on_a_view"}), "known_and_unknown", "logged"]
)
def test_the_diagonal_of_unknown_uses_is_taken_from_samples(use, n):
    """Also where the same parameter has known uses, or where an unknown one does not reach the loss."""
    more = {
        "known_and_unknown": (lambda m, h: h * m.p + (h * m.p.exp()).sin(), {"p": (4,)}),
        "logged": (lambda m, h: (m.p.square().sum(), h * m.p)[1], {"p": (4,)}),
    }
    function, shapes = {**REFUSED, **more}[use]
    model, (x, y) = using(function, {"b": cases.randn(5, 4, seed=5)}, **shapes), data(n)
    c = curvature(model, CE, [(x, y)], approx="diag", params=[model.p])
    start = sum(p.numel() for p in itertools.takewhile(lambda p: p is not model.p, model.parameters()))
    close(c.diag(), dense(model, CE, x, y, "ggn").diag()[start : start + model.p.numel()])


# --- attention ----------------------------------------------------------------------------------------------


def block_matrix(block) -> Tensor:
    """C of one block, in the order of its pieces."""
    shapes = [piece.shape for piece in block.pieces]
    eye = torch.eye(sum(s.numel() for s in shapes), dtype=torch.float64)
    parts = eye.split([s.numel() for s in shapes], -1)
    columns = block.matvec([part.reshape(-1, *s) for part, s in zip(parts, shapes, strict=True)])
    return torch.cat([x.flatten(1) for x in columns], -1)


def same_blocks(model: nn.Module, hand: nn.Module, x, y: Tensor, names: dict[str, str], kind: str, approx: str) -> None:
    """Blocks of `model` (the keys) are those of layers of `hand` (the values), which is written with nn.Linear."""
    close(call(model, x).detach(), call(hand, x).detach())
    got, truth = (curvature(m, CE, [(x, y)], curv_type=kind, approx=approx) for m in (model, hand))
    assert names.keys() <= got.blocks.keys()
    for ours, theirs in names.items():
        expected = block_matrix(truth.blocks[theirs])
        gap = (block_matrix(got.blocks[ours]) - expected).abs().max()
        assert gap <= 1e-8 * expected.abs().max() + 1e-15, f"{ours}: {gap:.1e}"


class Attends(nn.Module):
    """nn.MultiheadAttention of the arguments, as `options` say, and a head."""

    def __init__(self, batch_first: bool = True, call_options=None, **options) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.head, self.options = nn.Linear(4, 3), call_options or {}
        for p in self.parameters():
            nn.init.normal_(p, std=0.7)

    def forward(self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        k = q if k is None else k
        inputs = (q, k, k if v is None else v)
        if not self.attn.batch_first:
            same = {id(x): x.transpose(0, 1) for x in inputs}
            inputs = tuple(same[id(x)] for x in inputs)
        torch.manual_seed(5)
        z = self.attn(*inputs, **self.options)[0]
        return self.head((z if self.attn.batch_first else z.transpose(0, 1)).mean(1))


class ByHand(nn.Module):
    """The same with four nn.Linear."""

    def __init__(self, model: Attends) -> None:
        super().__init__()
        attn = model.attn
        weights = [attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight]
        weights = weights if attn.in_proj_weight is None else attn.in_proj_weight.chunk(3)
        biases = [None] * 3 if attn.in_proj_bias is None else attn.in_proj_bias.chunk(3)
        self.q, self.k, self.v = (linear_of(w, b) for w, b in zip(weights, biases, strict=True))
        self.out, self.head = linear_of(attn.out_proj.weight, attn.out_proj.bias), copy.deepcopy(model.head)
        self.options, self.zero, self.dropout = model.options, attn.add_zero_attn, attn.dropout
        self.train(model.training)

    def forward(self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        k = q if k is None else k
        q, k, v = self.q(q), self.k(k), self.v(k if v is None else v)
        if self.zero:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        q, k, v = (x.unflatten(-1, (2, 2)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT / 2**0.5
        if "attn_mask" in self.options:
            scores = scores.masked_fill(self.options["attn_mask"], -torch.inf)
        if "key_padding_mask" in self.options:
            scores = scores.masked_fill(self.options["key_padding_mask"][:, None, None], -torch.inf)
        torch.manual_seed(5)
        z = F.dropout(scores.softmax(-1).flatten(0, 1), self.dropout, self.training).unflatten(0, scores.shape[:2]) @ v
        return self.head(self.out(z.transpose(1, 2).flatten(2)).mean(1))


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear


def sequences(n: int, *sizes: tuple[int, int]) -> tuple[Tensor, ...]:
    return tuple(cases.randn(n, t, d, seed=k) for k, (t, d) in enumerate(sizes))


CAUSAL = {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)}
PADDING = {"key_padding_mask": torch.arange(5)[None] >= torch.tensor([[5], [3], [4]])}
SELF, CROSS = [(5, 4)], [(5, 4), (2, 4)]
ATTENTION = {
    "self": ({}, SELF),
    "no_bias": ({"bias": False}, SELF),
    "without_weights": ({"call_options": {"need_weights": False}}, SELF),
    "per_head_weights": ({"call_options": {"average_attn_weights": False}}, SELF),
    "cross": ({}, CROSS),
    "cross_no_bias": ({"bias": False}, CROSS),
    "different": ({}, [(5, 4), (2, 4), (2, 4)]),
    "kdim_vdim": ({"kdim": 3, "vdim": 2}, [(5, 4), (2, 3), (2, 2)]),
    "kdim_no_bias": ({"kdim": 3, "vdim": 3, "bias": False}, [(5, 4), (2, 3)]),
    "mask": ({"call_options": CAUSAL}, SELF),
    "mask_without_weights": ({"call_options": {**CAUSAL, "need_weights": False}}, SELF),
    "zero": ({"add_zero_attn": True}, CROSS),
    "dropout": ({"dropout": 0.4}, SELF),
    "padding": ({"call_options": PADDING}, SELF),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("approx", ["block", "diag", "kfac", "ekfac"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "time_first"])
@pytest.mark.parametrize("setting", ATTENTION)
def test_attention_is_four_linear_layers(setting, batch_first, approx):
    options, sizes = ATTENTION[setting]
    model = cases.seeded(lambda: Attends(batch_first, **options))
    names = {"attn.q": "q", "attn.k": "k", "attn.v": "v", "attn.out_proj": "out", "head": "head"}
    for n in [3] if setting == "padding" else [3, 1]:
        x, y = sequences(n, *sizes), integers(3, n)
        kind = KINDS[n // 3]
        same_blocks(model, ByHand(model), x, y, names, kind, approx)
        if approx == "block":
            check(model, x, y, kind)


@pytest.mark.parametrize("frozen", ["attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.bias"])
def test_frozen_parts_of_attention(frozen):
    model = cases.seeded(Attends)
    model.get_parameter(frozen).requires_grad_(False)
    check(model, *sequences(3, *SELF), integers(3, 3))


@over_kinds
def test_attention_without_a_batch_dimension(kind):
    class One(Attends):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attn(x[0], x[0], x[0])[0].mean(0, keepdim=True))

    check(cases.seeded(One), cases.randn(1, 5, 4), integers(3, 1), kind)


def test_bias_of_keys_and_values_is_measured_by_its_elements():
    model, x, y = cases.seeded(lambda: Attends(add_bias_kv=True)), sequences(2, *SELF), integers(3, 2)
    found = curvature(model, CE, [(x, y)]).blocks
    diag = dense(model, CE, x, y, "ggn").diag()
    parts = dict(zip(dict(model.named_parameters()), diag.split([p.numel() for p in model.parameters()]), strict=True))
    for name in ("attn.bias_k", "attn.bias_v"):
        close(found[name].factor.diag().flatten(), parts[name])


class Decodes(nn.Module):
    def __init__(self, make, batch_first: bool = True) -> None:
        super().__init__()
        self.body = make(d_model=4, nhead=2, dim_feedforward=5, dropout=0.0, batch_first=batch_first)
        self.head, self.batch_first = nn.Linear(4, 3), batch_first

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        if isinstance(self.body, nn.Transformer):
            return self.head(self.body(memory, x).mean(1))
        if self.batch_first:
            return self.head(self.body(x, memory).mean(1))
        return self.head(self.body(x.transpose(0, 1), memory.transpose(0, 1)).mean(0))


def transformer(**options):
    return nn.Transformer(num_encoder_layers=1, num_decoder_layers=1, **options)


@over_kinds
@pytest.mark.parametrize("make", [nn.TransformerDecoderLayer, transformer])
def test_attention_in_a_decoder(make, kind):
    model = cases.seeded(lambda: Decodes(make))
    check(model, sequences(3, (5, 4), (2, 4)), integers(3, 3), kind)


@pytest.mark.parametrize("n", [5, 3])
def test_time_first_layers_are_right_or_refused(n):
    """Linear layers and norms inside see [t, n, d], which no shape tells from a batch where t is n."""
    model = cases.seeded(lambda: Decodes(nn.TransformerDecoderLayer, False))
    try:
        check(model, sequences(n, (5, 4), (2, 4)), integers(3, n))
    except (RuntimeError, ValueError) as error:
        assert "approx=None" in str(error)


# --- recurrent networks -------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, make, layers: int, batch_first: bool, **options) -> None:
        super().__init__()
        self.rnn = make(3, 3, num_layers=layers, batch_first=batch_first, **options)
        width = (options.get("proj_size") or 3) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.rnn(x if self.rnn.batch_first else x.transpose(0, 1))[0]
        return self.head((out if self.rnn.batch_first else out.transpose(0, 1)).mean(1))


class Loop(nn.Module):
    """The same with nn.Linear, one call for the inputs of all steps and one call per step for the hidden state."""

    def __init__(self, model: Recurrent) -> None:
        super().__init__()
        rnn, self.head = model.rnn, copy.deepcopy(model.head)
        self.kind, self.layers, self.width = type(rnn), rnn.num_layers, rnn.hidden_size
        self.directions = ("", "_reverse") if rnn.bidirectional else ("",)
        for name, p in rnn.named_parameters():
            if name.startswith("weight_"):
                part = name.removeprefix("weight_")
                self.add_module(part, linear_of(p, getattr(rnn, f"bias_{part}", None)))

    def step(self, x: Tensor, z: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind is nn.RNN:
            return torch.tanh(x + z), c
        if self.kind is nn.GRU:
            (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), z.chunk(3, -1)
            keep = torch.sigmoid(x_z + h_z)
            return (1 - keep) * torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n) + keep * h, c
        i, f, g, o = (x + z).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def forward(self, x: Tensor) -> Tensor:
        for layer in range(self.layers):
            outputs = []
            for direction in self.directions:
                ih, hh, hr = (getattr(self, f"{key}_l{layer}{direction}", None) for key in ("ih", "hh", "hr"))
                c, steps = x.new_zeros(len(x), self.width), []
                h = c if hr is None else x.new_zeros(len(x), hr.out_features)
                inputs = ih(x).unbind(1)
                for one in reversed(inputs) if direction else inputs:
                    h, c = self.step(one, hh(h), h, c)
                    h = h if hr is None else hr(h)
                    steps.append(h)
                outputs.append(torch.stack(steps[::-1] if direction else steps, 1))
            x = torch.cat(outputs, -1)
        return self.head(x.mean(1))


RECURRENT = {
    "lstm": (nn.LSTM, 1, {}),
    "lstm_deep": (nn.LSTM, 2, {"bidirectional": True}),
    "lstm_proj": (nn.LSTM, 2, {"proj_size": 2}),
    "lstm_no_bias": (nn.LSTM, 1, {"bias": False}),
    "gru": (nn.GRU, 2, {}),
    "gru_both": (nn.GRU, 1, {"bidirectional": True, "bias": False}),
    "rnn": (nn.RNN, 2, {"bidirectional": True}),
    "rnn_no_bias": (nn.RNN, 1, {"bias": False}),
}


@pytest.mark.pairwise
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("approx", ["block", "diag", "kfac"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "time_first"])
@pytest.mark.parametrize("setting", RECURRENT)
def test_recurrent_layers_are_linear_layers_in_a_loop(setting, batch_first, approx):
    make, layers, options = RECURRENT[setting]
    model = cases.seeded(lambda: Recurrent(make, layers, batch_first, **options))
    parts = [name.removeprefix("weight_") for name, _ in model.rnn.named_parameters() if "weight" in name]
    names = {f"rnn.{part}": part for part in parts}
    for n, kind in ((3, "ggn"), (1, "empirical_fisher"), (4, "empirical_fisher")):
        x, y = cases.randn(n, 4, 3, seed=1), integers(3, n)
        same_blocks(model, Loop(model), x, y, {**names, "head": "head"}, kind, approx)


class Cells(nn.Module):
    def __init__(self, make, **options) -> None:
        super().__init__()
        self.cell, self.head = make(3, 4, **options), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for one in x.unbind(1):
            state = self.cell(one, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


@over_kinds
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=["bias", "no_bias"])
@pytest.mark.parametrize("make", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_in_a_loop(make, options, kind):
    model = cases.seeded(lambda: Cells(make, **options))
    for n in (3, 1):
        check(model, cases.randn(n, 4, 3), integers(3, n), kind)


# --- tied weights -------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Embeddings, bags and heads [7, 4] that share one weight; `used` says which of them the output depends on."""

    def __init__(self, kinds: tuple[str, ...], used: tuple[int, ...] | None = None) -> None:
        super().__init__()
        make = {
            "embedding": lambda: nn.Embedding(7, 4),
            "padded": lambda: nn.Embedding(7, 4, padding_idx=2),
            "bag": lambda: nn.EmbeddingBag(7, 4, mode="mean"),
            "head": lambda: nn.Linear(4, 7, bias=False),
            "head_bias": lambda: nn.Linear(4, 7),
        }
        self.kinds, self.used = kinds, used
        self.uses = nn.ModuleList(make[kind]() for kind in kinds)
        self.mix, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        for use in self.uses[1:]:
            use.weight = self.uses[0].weight
        if kinds == ("head_bias", "head_bias"):
            self.uses[1].bias = self.uses[0].bias

    def forward(self, tokens: Tensor) -> Tensor:
        h, out = F.one_hot(tokens, 7)[..., :4].double(), 0.0
        h = h + self.mix(h)
        for k, (kind, use) in enumerate(zip(self.kinds, self.uses, strict=True)):
            if self.used is not None and k not in self.used:
                continue
            if kind.startswith("head"):
                z = use(self.mix(h).tanh()).sin()
                out = out + z.mean(1)[:, :3] + z.mean(1)[:, 4:]
            else:
                z = use((tokens + k) % 7)
                h = h + (z.unsqueeze(1) if kind == "bag" else z)
        return out + self.last(h.mean(1))


def words(n: int) -> tuple[Tensor, Tensor]:
    return integers(7, n, 5, seed=3), integers(3, n, seed=4)


TIED = {
    "embedding_head": ("embedding", "head"),
    "padded_head_bias": ("padded", "head_bias"),
    "embeddings": ("embedding", "embedding"),
    "bag_head": ("bag", "head"),
    "bag_head_bias": ("bag", "head_bias"),
    "embedding_bag": ("embedding", "bag"),
    "heads_one_bias": ("head_bias", "head"),
    "heads_same_bias": ("head_bias", "head_bias"),
    "three": ("embedding", "bag", "head_bias"),
    "heads": ("embedding", "head_bias", "head"),
}
over_tied = pytest.mark.parametrize("tied", TIED)
over_used = pytest.mark.parametrize("used", [None, (0,), (1,)], ids=["all", "first", "second"])


def tied_layer(c) -> tuple[str, Tensor]:
    """The name of the block of the shared weight, and its elements in the order of c.params."""
    return next((name, index) for name, index in indices_of(c).items() if name.startswith("uses."))


@pytest.mark.pairwise
@over_kinds
@over_used
@over_tied
def test_uses_of_a_tied_weight_add_up(tied, used, kind):
    x, y = words(3)
    model = cases.seeded(lambda: Tied(TIED[tied], used))
    check(model, x, y, kind)
    truth = dense(model, CE, x, y, kind)
    for limit in (10**6, 1):
        full = curvature(model, CE, [(x, y)], curv_type=kind, approx="full", rows_limit=limit)
        close(full.to_dense(), truth)
        block = curvature(model, CE, [(x, y)], curv_type=kind, approx="block", rows_limit=limit)
        close(block.to_dense(), only_blocks(block, truth))
        close(block.solve(truth[:, :2], 0.1), oracles.solve_dense(only_blocks(block, truth), truth[:, :2], 0.1))
        close(full.diag(), truth.diag())
    unit = curvature(model, CE, [(x, y)], curv_type=kind, approx="unit")
    name, index = tied_layer(unit)
    layer = unit.blocks[name].layers[0]
    (order,) = [layer.join([piece.of(x) for piece, x in zip(layer.pieces, order_of(layer), strict=True)])]
    inside = torch.zeros_like(truth)
    for row in index[order].flatten(0, 1):
        inside[row[:, None], row[None]] = truth[row[:, None], row[None]]
    close(unit.to_dense()[index][:, index], inside[index][:, index])
    for sharing in ("expand", "reduce"):
        ekfac = curvature(model, CE, [(x, y)], curv_type=kind, approx="ekfac", sharing=sharing)
        close(ekfac.blocks[name].factor.trace(), truth[index, index].sum())


def order_of(layer) -> list[Tensor]:
    """Where each element of a layer's pieces lies in their concatenation."""
    sizes = [piece.shape.numel() for piece in layer.pieces]
    return [at.view(piece.shape) for at, piece in zip(torch.arange(sum(sizes)).split(sizes), layer.pieces, strict=True)]


@pytest.mark.pairwise
@over_kinds
@over_used
@over_tied
def test_kfac_of_a_tied_weight_has_the_partial_traces_of_the_sum(tied, used, kind):
    """Each orientation has its own product; the vocabulary side of a token use is the diagonal of that side."""
    x, y = words(3)
    model = cases.seeded(lambda: Tied(TIED[tied], used))
    c = curvature(model, CE, [(x, y)], curv_type=kind, approx="kfac")
    name, _ = tied_layer(c)
    layer = c.blocks[name].layers[0]
    tokens_left = any(s.view.tokens and s.transposed for s in layer.sites)
    tokens_right = any(s.view.tokens and not s.transposed for s in layer.sites)
    sums: dict[bool, list] = {}
    for k, site in enumerate(model.uses):
        if used is not None and k not in used:
            continue
        own = next(one for one in layer.sites if one.module is site)
        separate = copy.deepcopy(model)
        separate.uses[k].weight = nn.Parameter(model.uses[k].weight.detach().clone())
        a, s = oracles.layer_arrays(separate, CE, x, y, f"uses.{k}", kind)
        if layer.bias is not None:
            if own.transposed:
                s = F.pad(s, (0, 1))
            elif own.bias is None:
                a = F.pad(a, (0, 1))
        A, B = torch.einsum("nrgi,nrgj->ij", a, a), torch.einsum("vnrgo,vnrgp->op", s, s)
        total = sums.setdefault(own.transposed, [0, 0, 0])
        for j, value in enumerate((A, a.shape[0] * a.shape[1], B)):
            total[j] = total[j] + value
    pairs = [(A / count, B) if transposed else (B, A / count) for transposed, (A, count, B) in sums.items()]
    traces = [(left.trace(), right.trace()) for left, right in pairs]
    left = sum(L * tr for (L, _), (_, tr) in zip(pairs, traces, strict=True))
    right = sum(R * tr for (_, R), (tr, _) in zip(pairs, traces, strict=True))
    right = right / sum(tr_l * tr_r for tr_l, tr_r in traces)
    left, right = (left.diag().diag() if tokens_left else left), (right.diag().diag() if tokens_right else right)
    order = layer.join(order_of(layer)).flatten()
    expected = torch.empty(len(order), len(order), dtype=left.dtype)
    expected[order[:, None], order[None]] = torch.kron(left, right)
    close(block_matrix(c.blocks[name]), expected)


def test_a_layer_that_the_loss_does_not_reach_has_no_curvature_or_is_named():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, x, y = cases.seeded(Unused), cases.randn(4, 4), integers(3, 4)
    try:
        close(curvature(model, CE, [(x, y)], approx="block").to_dense(), dense(model, CE, x, y, "ggn"))
    except (RuntimeError, ValueError) as error:
        assert "spare" in str(error)


def test_two_biases_of_one_weight_are_refused():
    model = cases.seeded(lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match=r"share a weight but not its use.*approx=None"):
        curvature(model, CE, [(cases.randn(4, 3), integers(3, 4))])


@over_kinds
@pytest.mark.parametrize("approx", ["block", "full", "diag", "kfac"])
def test_one_bias_of_two_weights_is_right_or_refused(approx, kind):
    model = cases.seeded(lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    x, y = cases.randn(4, 3), integers(3, 4)
    model[2].bias = model[0].bias
    try:
        c = curvature(model, CE, [(x, y)], curv_type=kind, approx=approx)
        truth = dense(model, CE, x, y, kind)
        assert sum(len(index) for index in indices_of(c).values()) == len(truth)
        if approx == "diag":
            close(c.diag(), truth.diag())
        elif approx != "kfac":
            close(c.to_dense(), only_blocks(c, truth))
    except (RuntimeError, ValueError) as error:
        assert "0.bias" in str(error)


class OnePosition(nn.Module):
    """Two linear layers of one weight at one position each; the second lacks the bias of the first."""

    def __init__(self, used: str) -> None:
        super().__init__()
        self.first, self.second, self.used = nn.Linear(3, 3), nn.Linear(3, 3, bias=False), used
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        for use in self.used:
            x = {"a": self.first, "b": self.second}[use](x).tanh()
        return x


@over_kinds
@pytest.mark.parametrize("used", ["a", "b", "ab", "bab"])
def test_a_tied_weight_at_one_position(used, kind):
    model, x, y = cases.seeded(lambda: OnePosition(used)), cases.randn(4, 3, seed=1), integers(3, 4)
    check(model, x, y, kind)
    truth = dense(model, CE, x, y, kind)
    for approx, limit in (("full", 1), ("block", 1), ("full", 10**6)):
        close(curvature(model, CE, [(x, y)], curv_type=kind, approx=approx, rows_limit=limit).to_dense(), truth)
    for approx in ("ekfac", "unit"):
        close(curvature(model, CE, [(x, y)], curv_type=kind, approx=approx).trace(), truth.trace())


@pytest.mark.parametrize("uses", [("a", "b"), ("b", "a"), ("ab", "a")])
def test_batches_that_use_a_tied_weight_differently(uses):
    """The rows of several passes lie in one Gram matrix."""

    class Chosen(OnePosition):
        def forward(self, x: Tensor, used: str) -> Tensor:
            self.used = used
            return super().forward(x)

    model, y = cases.seeded(lambda: Chosen("a")), integers(3, 4)
    batches = [((cases.randn(4, 3, seed=k), used), y) for k, used in enumerate(uses)]
    truth = sum(dense(model, CE, x, y, "ggn") for x, y in batches) / 2
    for limit in (1, 10**6):
        close(curvature(model, CE, batches, approx="full", rows_limit=limit).to_dense(), truth)
        c = curvature(model, CE, batches, approx="block", rows_limit=limit)
        close(c.solve(truth, 0.1), oracles.solve_dense(truth, truth, 0.1))
        close(c.logdet(0.1), torch.logdet(truth + 0.1 * torch.eye(len(truth), dtype=truth.dtype)))


# --- tokens and sides ---------------------------------------------------------------------------------------


@st.composite
def bags(draw, n: int | None = None, size: int | None = None) -> Tokens:
    """Bags with repeated words and padding."""
    n, size = n or draw(st.integers(1, 3)), size or draw(st.integers(1, 5))
    r, l, seed = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(0, 99))  # noqa: E741
    weight = cases.randn(n, r, l, seed=seed) * integers(3, n, r, l, seed=seed).clamp_max(1)
    return Tokens(integers(size, n, r, l, seed=seed), weight, size)


quick = settings(max_examples=40, deadline=None, derandomize=True)


@quick
@given(tokens=bags(), v=st.integers(1, 2), o=st.integers(1, 3), seed=st.integers(0, 99))
def test_tokens_are_dense_rows(tokens, v, o, seed):
    a = tokens.dense().squeeze(2)
    n, r, size = a.shape
    assert (tokens.positions, tokens.size) == (r, size)
    weights, matrix = cases.randn(n, r, seed=seed), cases.randn(size, o, seed=seed + 1)
    s = cases.randn(v, n, r, o, seed=seed + 2)
    expected = torch.zeros(n, r, size, dtype=torch.float64)
    for k, j in itertools.product(range(n), range(r)):
        for word, weight in zip(tokens.index[k, j], tokens.weight[k, j], strict=True):
            expected[k, j, word] += weight
    close(a, expected)
    close(tokens.square_sums(), a.square().sum((0, 1)))
    close(tokens.square_sums(weights), torch.einsum("nri,nr->i", a.square(), weights))
    close(tokens.mean().dense(), a.mean(1)[:, None, None])
    close(tokens.rows_of(matrix), a @ matrix)
    close(tokens.added_rows(s[0]), torch.einsum("nri,nro->io", a, s[0]))
    close(tokens.squared_gradients(s), torch.einsum("nri,vnro->vnio", a, s).square().sum((0, 1)))
    close(tokens.of(slice(n // 2, None)).dense(), a[n // 2 :, :, None])
    if n % 2 == 0:
        close(tokens.per_sample(n // 2).dense(), a.reshape(n // 2, 2 * r, 1, size))


@quick
@given(first=bags(n=2, size=4), second=bags(n=2, size=4))
def test_joined_tokens_are_further_positions(first, second):
    close(Tokens.joined([first, second]).dense(), torch.cat([first.dense(), second.dense()], 1))


def dense_side(side: Tensor, d: int) -> Tensor:
    """[g, d, d]."""
    return side if side.dim() == 3 else torch.stack([torch.block_diag(*blocks)[:d, :d] for blocks in side])


@st.composite
def sides_of(draw, scales=(1.0,)) -> tuple[Tensor, int]:
    """(a side as block_gram makes it, d): positive semidefinite, possibly singular, the last block padded."""
    g, d, rank = (draw(st.integers(1, most)) for most in (2, 7, 9))
    seed = draw(st.integers(0, 99))
    blocks = draw(st.integers(1, d))
    x = cases.randn(rank, 1, g, d, seed=seed) * torch.tensor(scales)[integers(len(scales), d, seed=seed)]
    return block_gram(x, blocks), d


@quick
@given(pair=sides_of(), o=st.integers(1, 3), seed=st.integers(0, 99))
def test_products_with_sides(pair, o, seed):
    side, d = pair
    g, matrix = len(side), dense_side(*pair)
    x = cases.randn(2, g, o, d, seed=seed)
    lopsided = torch.tril(side) if side.shape[-1] > 1 else side
    close(sides.times(x, side), x @ matrix)
    close(sides.times(x, lopsided), x @ dense_side(lopsided, d))
    close(sides.times_left(lopsided, x.mT), dense_side(lopsided, d) @ x.mT)
    close(sides.mean_diagonal(side, d), matrix.diagonal(dim1=-2, dim2=-1).mean(-1))
    k = 1 if side.dim() == 3 else side.shape[1]
    assert side.shape == sides.side_shape(g, d, k)


@quick
@given(pair=sides_of(), tensor=st.booleans())
def test_inverses_of_sides(pair, tensor):
    side, d = pair
    shift = torch.linspace(0.1, 0.2, len(side), dtype=torch.float64) if tensor else 0.1
    shifts = shift[:, None, None] if tensor else shift
    before = side.clone()
    got, ok = sides.inverse(side, shift, d)
    assert bool(ok) and torch.equal(side, before) and got.shape == side.shape
    close(dense_side(got, d), torch.linalg.inv(dense_side(side, d) + shifts * torch.eye(d, dtype=torch.float64)), 1e-8)
    if side.dim() == 4:
        whole = torch.stack([torch.block_diag(*blocks) for blocks in got])[:, d:, d:]
        assert torch.equal(whole, torch.eye(whole.shape[-1], dtype=torch.float64).expand_as(whole))
    lower = sides.root(got)
    close(dense_side(lower, d) @ dense_side(lower, d).mT, dense_side(got, d))


@quick
@given(pair=sides_of(scales=(1.0, 1e-6, 1e4)))
def test_eigenbases_of_sides(pair):
    side, d = pair
    before = side.clone()
    values, vectors = sides.eigenbasis(side, d)
    assert values.shape == (len(side), d) and vectors.shape == side.shape and torch.equal(side, before)
    Q, matrix = dense_side(vectors, d), dense_side(side, d)
    close(Q.mT @ Q, torch.eye(d, dtype=torch.float64).expand_as(Q))
    close(Q @ values.diag_embed() @ Q.mT, matrix)
    for got, true in zip(values, matrix, strict=True):
        close(got.sort().values, torch.linalg.eigvalsh(true))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_does_not_cost_a_small_block_its_digits(dtype):
    side = torch.zeros(1, 2, 3, 3, dtype=dtype)
    side[0, 0] = 1e8 * torch.eye(3)
    side[0, 1, :2, :2] = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    values, _ = sides.eigenbasis(side, 5)
    close(values[0, 3:], torch.tensor([1.0, 3.0], dtype=dtype), 1e-5)


def test_a_singular_or_infinite_block_is_reported():
    side = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    assert not sides.inverse(side, 0.0, 5)[1]
    assert not sides.inverse(side[..., :1, :1], 0.0, 3)[1]
    assert not sides.inverse(side + torch.nan, 1.0, 5)[1]
    assert not sides.inverse(side[..., :1, :1] + torch.nan, 1.0, 3)[1]
    assert sides.inverse(side, 1.0, 5)[1]


# --- algebra with parts of parameters and sides in blocks ---------------------------------------------------


class Everything(nn.Module):
    """Parts of a parameter, a vocabulary side, a head tied to it, and bare parameters."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.attn = nn.Embedding(7, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.p, self.scalar = nn.Parameter(torch.randn(1, 5, 4)), nn.Parameter(torch.randn(1))
        self.head = nn.Linear(4, 7)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.p
        return self.head((h + self.scalar * self.attn(h, h, h)[0]).mean(1))


@pytest.mark.pairwise
@pytest.mark.parametrize("blocks", [{}, {"factor_blocks": 3}, {"max_factor_dim": 4}], ids=["dense", "blocks", "wide"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("approx", ["kfac", "ekfac", "diag", "unit", "block", "full"])
def test_algebra_is_that_of_the_dense_matrix(approx, tied, blocks, monkeypatch):
    model, x, y = cases.seeded(lambda: Everything(tied)), integers(7, 3, 5, seed=1), integers(7, 3, seed=2)
    for limit in (1, 10**6) if approx in ("block", "full") else (2048,):
        c = curvature(model, CE, [(x, y)], approx=approx, rows_limit=limit, **blocks)
        C = c.to_dense()
        P, eye = len(C), torch.eye(len(C), dtype=C.dtype)
        close(C, C.T)
        close(c.diag(), C.diag())
        close(c.trace(), C.trace())
        close(c.eigvalsh(), torch.linalg.eigvalsh(C))
        close(c.logdet(0.3), torch.logdet(C + 0.3 * eye))
        v = cases.randn(P, 3, seed=5)
        for one in (v, v[:, 0]):
            close(c.matvec(one), C @ one)
            close(c.solve(one, 0.3), torch.linalg.solve(C + 0.3 * eye, one))
        shapes = [p.shape for p in c.params]
        listed = [part.view(s) for part, s in zip(v[:, 0].split([s.numel() for s in shapes]), shapes, strict=True)]
        named = dict(zip(c._named, listed, strict=True))
        flat = torch.cat([part.flatten() for part in c.solve(listed, 0.3)])
        close(flat, torch.linalg.solve(C + 0.3 * eye, v[:, 0]))
        close(torch.cat([part.flatten() for part in c.matvec(named).values()]), C @ v[:, 0])
        columns = []
        for k in range(P):  # a draw is linear in its noise
            noise, at = eye[k], 0

            def randn(shape, noise=noise, **options):
                nonlocal at
                at += torch.Size(shape).numel()
                return noise[at - torch.Size(shape).numel() : at].reshape(shape)

            monkeypatch.setattr(torch, "randn", randn)
            columns.append(torch.cat([part.flatten() for part in c.sample(0.3)]))
            monkeypatch.undo()
        S = torch.stack(columns, 1)
        close(S @ S.T, torch.linalg.inv(C + 0.3 * eye))


# ------------------------------------------------------------------------------ products with bare matrices


class Products(nn.Module):
    """Linear maps without linear layers: [inputs, outputs] as in GPT-2's Conv1D, [outputs, inputs], transposed."""

    def __init__(self):
        super().__init__()
        shapes = {"a": (4, 5), "bias": (5,), "b": (6, 5), "c": (6, 3), "d": (3, 3)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(cases.randn(*shape, seed=len(name) + shape[0])))

    def forward(self, x):
        h = torch.addmm(self.bias, x.reshape(-1, 4), self.a).view(*x.shape[:-1], 5).tanh()
        return ((F.linear(h, self.b).tanh() @ self.c) @ self.d.T).mean(1)


PRODUCTS = {"a": (1, 5, 4), "b": (1, 6, 5), "c": (1, 3, 6), "d": (1, 3, 3)}


@over_kinds
@pytest.mark.parametrize("approx", ["block", "unit", "diag", "kfac"])
def test_products_with_matrices_are_layers(approx, kind):
    model, (x, y) = Products(), (cases.randn(6, 2, 4), integers(3, 6))
    found = curvature(model, CE, [(x, y)], approx=approx, curv_type=kind)
    assert {name: block.layers[0].shape for name, block in found.blocks.items() if name != "bias"} == PRODUCTS
    if approx != "kfac":
        close(found.diag(), dense(model, CE, x, y, kind).diag())
        return
    for name in ("a", "b", "c", "d"):  # its traces are those of the product of A and B, which are positive
        assert found.blocks[name].factor.trace() > 0


def test_they_are_found_in_the_first_step():
    model, x, y = Products().float(), cases.randn(6, 2, 4).float(), integers(3, 6)
    optimizer, losses = SecondOrderOptimizer(model, loss_fn=CE), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = CE(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert {n: block.layers[0].shape for n, block in optimizer.blocks.items() if n != "bias"} == PRODUCTS
    assert losses[-1] < losses[0] and all(block.factor is not None for block in optimizer.blocks.values())
