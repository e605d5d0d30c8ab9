"""Attention, recurrence, norms, embeddings, bare and tied parameters in the loops that people write: every statistic
against the dense truth of the loss, every variant of a loop against the plain one."""

import contextlib
import copy
import io
import re
import warnings

import cases
import models
import oracles
import pytest
import torch
from measured import KINDS, close, dense, optimizer, same_random_state
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from torchcurv import Preconditioner, SecondOrderOptimizer, curvature
from torchcurv.curv.block.reading import diagonal_of

N, T, W, V, WORDS = 4, 3, 4, cases.CLASSES, 6
CE = nn.CrossEntropyLoss()
over_kinds = pytest.mark.parametrize("kind", KINDS)


# --- models -------------------------------------------------------------------------------------------------


class LoopedCell(nn.Module):
    """A recurrence of the user's own."""

    def __init__(self, cell=nn.LSTMCell):
        super().__init__()
        self.cell, self.head = cell(W, W), nn.Linear(W, V)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Attends(nn.Module):
    """One attention called twice: on its own input, and across to something shorter."""

    def __init__(self, batch_first=True, times=2, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(W, 2, batch_first=batch_first, **options)
        self.head, self.times = nn.Linear(W, V), times
        self.key, self.value = (slice(options.get(name)) for name in ("kdim", "vdim"))

    def forward(self, x, **masks):
        x = x if self.attn.batch_first else x.transpose(0, 1)
        z = x + self.attn(x, x[..., self.key], x[..., self.value], **masks)[0]
        if self.times > 1:
            short = z[:, :2] if self.attn.batch_first else z[:2]
            z = z + self.attn(z, short[..., self.key], short[..., self.value], need_weights=False)[0]
        return self.head(z.mean(1 if self.attn.batch_first else 0))


class SharedNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.mix, self.head = norm(), nn.Linear(W, W), nn.Linear(W, V)

    def forward(self, x):
        z = self.norm(x)
        return self.head(self.norm(self.mix(z).tanh() + z).mean(1))


class TwiceEmbedded(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, W, padding_idx=0), nn.Linear(W, WORDS, bias=tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head((self.embed(tokens).mean(1) * self.embed(tokens[:, 0])).tanh())


class Recurrent(nn.Module):
    """One recurrent module called twice, on sequences of different lengths."""

    def __init__(self, kind=nn.LSTM, times=2, tokens=False, **options):
        super().__init__()
        self.embed = nn.Embedding(WORDS, W) if tokens else nn.Identity()
        self.rnn, self.times = kind(W, W, batch_first=True, **options), times
        self.head = nn.Linear(W, V)

    def forward(self, x):
        out, state = self.rnn(self.embed(x))
        if self.times > 1:
            out, _ = self.rnn(out[:, 1:], state)
        return self.head(out.mean(1))


class ScaleShift(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(W)), nn.Parameter(torch.rand(1, T, W))

    def forward(self, x):
        return x * self.scale + self.shift


class TwiceBare(nn.Module):
    def __init__(self):
        super().__init__()
        self.bare, self.head = ScaleShift(), nn.Linear(W, V)

    def forward(self, x):
        return self.head(self.bare(self.bare(x).tanh()).mean(1))


class TwiceConvolved(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.lift, self.up = nn.Conv2d(1, 2, 1), nn.ConvTranspose2d(2, 2, 3, stride=1, padding=1)
        self.norm, self.head = norm(2), nn.Linear(2, V)

    def forward(self, x):
        z = self.up(self.lift(x.unsqueeze(1))).tanh()
        return self.head(self.norm(self.up(z)).mean((2, 3)))


class Everything(nn.Module):
    """Tokens through an embedding tied to its head, attention, an LSTM, batch norm and bare parameters."""

    def __init__(self, dropout=0.0, reentrant=None):
        super().__init__()
        self.embed = nn.Embedding(WORDS, W)
        self.attn = nn.MultiheadAttention(W, 2, batch_first=True, dropout=dropout)
        self.lstm, self.norm = nn.LSTM(W, W, 2, batch_first=True, dropout=dropout), nn.LayerNorm(W)
        self.bn, self.bare = nn.BatchNorm1d(W), ScaleShift()
        self.head, self.reentrant = nn.Linear(W, WORDS, bias=False), reentrant
        self.head.weight = self.embed.weight

    def body(self, x):
        z = self.norm(x + self.attn(x, x, x)[0])
        z = z + self.lstm(self.bare(z))[0]
        return self.bn(z.transpose(1, 2)).mean(2)

    def forward(self, tokens):
        x = self.embed(tokens)
        z = self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.head(z)


def floats(n=N, seed=0):
    return cases.randn(n, T, W, seed=seed), models.integers(V, n, seed=seed)


def tokens(n=N, seed=0):
    return models.integers(WORDS, n, T, seed=seed), models.integers(WORDS, n, seed=seed + 100)


def built(make):
    """make() in eval mode, float64, running statistics away from 0 and 1."""
    model = cases.seeded(make).eval()
    for k, (name, buffer) in enumerate(model.named_buffers()):
        if "running" in name:
            buffer += 0.3 * cases.randn(*buffer.shape, seed=k).abs()
    return model


REPEATED = {
    "lstm cell": (LoopedCell, floats),
    "gru cell": (lambda: LoopedCell(nn.GRUCell), floats),
    "rnn cell": (lambda: LoopedCell(nn.RNNCell), floats),
    "attention": (Attends, floats),
    "attention, time first": (lambda: Attends(batch_first=False), floats),
    "attention, own k and v": (lambda: Attends(kdim=3, vdim=2, bias=False), floats),
    "layer norm": (lambda: SharedNorm(lambda: nn.LayerNorm(W)), floats),
    "rms norm": (lambda: SharedNorm(lambda: nn.RMSNorm(W)), floats),
    "group norm": (lambda: SharedNorm(lambda: nn.GroupNorm(1, T)), floats),
    "batch norm": (lambda: SharedNorm(lambda: nn.BatchNorm1d(T)), floats),
    "instance norm": (lambda: SharedNorm(lambda: nn.InstanceNorm1d(T, affine=True)), floats),
    "embedding": (TwiceEmbedded, tokens),
    "tied embedding": (lambda: TwiceEmbedded(tied=True), tokens),
    "lstm": (Recurrent, floats),
    "gru, two layers": (lambda: Recurrent(nn.GRU, num_layers=2), floats),
    "bare": (TwiceBare, floats),
    "transposed convolution": (TwiceConvolved, floats),
    "everything": (Everything, tokens),
}
over_repeated = pytest.mark.parametrize("name", REPEATED)


# --- truths -------------------------------------------------------------------------------------------------


def truth_of(model, loss, x, y, kind="ggn", call=None):
    """J^T H J or the sum of v v^T over all parameters that are trained, by autograd on a copy without hooks."""
    model = model if not any(module._forward_hooks for module in model.modules()) else copy.deepcopy(model)
    params = [p for p in model.parameters() if p.requires_grad]
    output = model(x) if call is None else call(model, x)
    rows = []
    for entry in output.flatten():
        grads = torch.autograd.grad(entry, params, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    J = torch.stack(rows)
    if kind == "ggn":
        return J.T @ oracles.output_hessian(loss, output, y) @ J
    u = oracles.output_gradients(loss, output.detach(), y).reshape(len(output), -1)
    rows = torch.einsum("ne,nep->np", u, J.reshape(*u.shape, -1))
    return rows.T @ rows


def places_of(model, block):
    """Where the elements of a block lie in the order of truth_of."""
    where, start = {}, 0
    for p in model.parameters():
        if p.requires_grad:
            where[p] = torch.arange(start, start + p.numel()).view(p.shape)
            start += p.numel()
    return torch.cat([piece.of(where[piece.param]).flatten() for piece in block.pieces])


def assert_measured(opt, truth, tol=1e-9, uncovered=0):
    """Step, and every block holds its part of the truth; the blocks cover all of it but so many parameters."""
    opt.step()
    seen = []
    for block in opt.engine.blocks:
        index = places_of(opt.model, block)
        expected = truth[index][:, index]
        seen.append(index)
        if block.options.approx == "diag":
            got = torch.cat([part.flatten() for part in block.layout.split(diagonal_of(block))])
            expected = expected.diag()
        else:
            got = dense(opt, "tensors", block)
        difference, scale = (got - expected).abs().max(), expected.abs().max()
        assert difference <= tol * max(scale, 1e-12), f"{block.name}: {difference:.1e} of {scale:.1e}"
    assert len(torch.cat(seen).unique()) == sum(map(len, seen)) == len(truth) - uncovered


def modes_are_clean():
    return not torch.overrides._get_current_function_mode_stack()


def taken(model, opt, batches, loss=CE):
    """One step per batch; the losses and the gradients of the last."""
    losses = []
    for x, y in batches:
        opt.zero_grad()
        value = loss(model(x), y)
        value.backward()
        losses.append(value.item())
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        opt.step()
    return losses, grads


def same(ours, theirs, tol=None):
    for p, q in zip(ours, theirs, strict=True):
        if tol is None:
            assert (p is None and q is None) or torch.equal(p, q)
        else:
            assert (p is None and q is None) or (p - q).abs().max() <= tol * max(1, q.abs().max())


# --- 1. several calls in one forward pass --------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("approx", ["full", "block", "diag"])
@over_kinds
@over_repeated
def test_modules_that_are_called_several_times_are_measured_exactly(name, kind, approx):
    make, batch = REPEATED[name]
    model, (x, y) = built(make), batch()
    opt = optimizer(model, CE, curv_type=kind, approx=approx, rows_limit=10**6)
    with same_random_state():
        CE(model(x), y).backward()
    assert modes_are_clean()
    other = copy.deepcopy(model)
    other.zero_grad()
    CE(other(x), y).backward()
    same([p.grad for p in model.parameters()], [p.grad for p in other.parameters()], 1e-12)
    assert_measured(opt, truth_of(model, CE, x, y, kind))


class TimeFirst(nn.Module):
    """Sequences as torch's recurrent networks and transformers take them by default: [t, n, w]."""

    def __init__(self, make):
        super().__init__()
        self.body, self.head = make(), nn.Linear(W, V)

    def forward(self, x):
        out = self.body(x.transpose(0, 1))
        return self.head((out[0] if isinstance(out, tuple) else out).mean(0))


TIME_FIRST = {
    "encoder": lambda: nn.TransformerEncoderLayer(W, 2, W, dropout=0.0),
    "lstm": lambda: nn.LSTM(W, W, 2),
    "norm": lambda: nn.LayerNorm(W),
    "linear": lambda: nn.Linear(W, W),
}


@pytest.mark.pairwise
@over_kinds
@pytest.mark.parametrize("n", [2, T, 2 * T])
@pytest.mark.parametrize("name", TIME_FIRST)
def test_sequences_with_the_time_first_are_right_or_refused(name, n, kind):
    model, (x, y) = built(lambda: TimeFirst(TIME_FIRST[name])), floats(n)
    opt = optimizer(model, CE, curv_type=kind, approx="block", rows_limit=10**6)
    try:
        CE(model(x), y).backward()
    except (ValueError, RuntimeError) as error:
        assert "put the batch first" in str(error)
        return
    assert_measured(opt, truth_of(model, CE, x, y, kind))


@over_kinds
@pytest.mark.parametrize("name", ["attention", "lstm", "lstm cell", "bare", "tied embedding", "everything"])
def test_two_optimizers_on_one_model_measure_apart(name, kind):
    make, batch = REPEATED[name]
    model, (x, y) = built(make), batch()
    opts = [optimizer(model, CE, curv_type=kind, approx=approx, rows_limit=10**6) for approx in ("block", "diag")]
    CE(model(x), y).backward()
    truth = truth_of(model, CE, x, y, kind)
    for opt in opts:
        assert_measured(opt, truth)


@over_kinds
@pytest.mark.parametrize("name", ["attention", "lstm", "bare", "tied embedding", "batch norm"])
def test_looking_at_curvature_in_the_middle_of_a_step_changes_nothing(name, kind):
    make, batch = REPEATED[name]
    model, (x, y) = built(make), batch()
    opt = optimizer(model, CE, curv_type=kind, approx="block", rows_limit=10**6)
    truth = truth_of(model, CE, x, y, kind)
    loss = CE(model(x), y)
    looked = curvature(model, CE, [(x, y)], curv_type=kind, approx="diag").diag()
    loss.backward()
    close(looked, truth.diag(), 1e-9)
    assert_measured(opt, truth)


class Uses(nn.Module):
    """A bare parameter, used as `use` says."""

    def __init__(self, use, shape):
        super().__init__()
        self.p, self.use, self.lift, self.head = nn.Parameter(torch.rand(shape)), use, nn.Linear(W, W), nn.Linear(W, V)

    def forward(self, x):
        return self.head(self.use(self.lift(x), self.p).tanh().mean(1))


def plus_equals(x, p):
    x = x.clone()
    x += p
    return x


def times_equals(x, p):
    x = x.clone()
    x *= p
    return x


USES = {
    "plus": (lambda x, p: x + p, T, W),
    "minus, from the left": (lambda x, p: p - x, W),
    "alpha": (lambda x, p: torch.add(x, p, alpha=3.0), W),
    "alpha, from the left": (lambda x, p: torch.add(p, x, alpha=3.0), W),
    "minus alpha": (lambda x, p: torch.sub(x, p, alpha=3.0), W),
    "minus alpha, from the left": (lambda x, p: torch.sub(p, x, alpha=3.0), W),
    "other as keyword": (lambda x, p: torch.add(x, other=p), W),
    "plus equals": (plus_equals, W),
    "add_": (lambda x, p: x.clone().add_(p), W),
    "times": (lambda x, p: p * x, W),
    "times equals": (times_equals, W),
    "scalar": (lambda x, p: x * p,),
    "one element": (lambda x, p: x * p, 1),
    "negative": (lambda x, p: x - -2 * p, W),
    "negated": (lambda x, p: x + (-p), W),
    "divided": (lambda x, p: x / (1 + p), W),
    "one plus": (lambda x, p: x * (1 + p), W),
    "twice": (lambda x, p: x * p + p, W),
    "squared": (lambda x, p: x * p * p, W),
    "exponential": (lambda x, p: x * p.exp(), W),
    "matrix": (lambda x, p: x @ p, W, W),
    "linear": (F.linear, W, W),
    "gate": (lambda x, p: torch.lerp(x, x.tanh(), p), W),
    "row": (lambda x, p: x + p[0] * p[1, 0], 2, W),
    "rows": (lambda x, p: x * p[0] + p[1][None, None], 2, W),
    "index": (lambda x, p: x + p[[0, 1, 0]], 2, W),
    "embedding": (lambda x, p: x + F.embedding(torch.arange(T), p), T, W),
    "permuted": (lambda x, p: x + p.T.unsqueeze(0).repeat(len(x), 1, 1), W, T),
    "token": (lambda x, p: torch.cat([p.expand(len(x), -1, -1), x], 1), 1, 1, W),
    "scaled token": (lambda x, p: torch.cat([2 * p.expand(len(x), -1, -1), x], 1), 1, 1, W),
    "times alike": (lambda x, p: (x.unsqueeze(1) * p.reshape(1, 2, 1, W)).sum(1), 2, W),
    "queries": (lambda x, p: F.scaled_dot_product_attention(p.expand(len(x), -1, -1), x, x), 2, W),
    "einsum": (lambda x, p: torch.einsum("ntw,w->ntw", x, p), W),
    "clamped": (lambda x, p: x + p.clamp(max=0.5), W),
    "detached": (lambda x, p: x * p.detach() + p, W),
    "norm": (lambda x, p: F.layer_norm(x, (W,), p), W),
    "dropout": (lambda x, p: x + F.dropout(p, 0.0), W),
    "data": (lambda x, p: x + p.view(1, 1, W).to(x.dtype), W),
    "time first": (lambda x, p: x.transpose(0, 1).add(p).transpose(0, 1), W),
    "scaled constant": (lambda x, p: x + p * torch.linspace(0, 1, T * W, dtype=x.dtype).view(T, W), W),
    "of one sample": (lambda x, p: torch.cat([x[:1] + p, x[1:]]), W),
    "stack": (lambda x, p: torch.stack([one * p for one in x]), W),
}


@pytest.mark.pairwise
@over_kinds
@pytest.mark.parametrize("approx", ["block", "diag"])
@pytest.mark.parametrize("name", USES)
def test_uses_of_bare_parameters_are_right_or_refused_by_name(name, approx, kind):
    (use, *shape), (x, y) = USES[name], floats(T)  # as many samples as positions
    model = built(lambda: Uses(use, shape))
    try:
        opt = optimizer(model, CE, curv_type=kind, approx=approx, rows_limit=10**6)
        for _ in range(2):  # a use that is known and another are found out in the first
            opt.zero_grad()
            CE(model(x), y).backward()
            truth = truth_of(model, CE, x, y, kind)
            opt.step()
    except (RuntimeError, ValueError) as error:
        assert re.search(r"(gradient|curvature) of p\b|layers? '?p\b|put the batch first", str(error)), error
        assert modes_are_clean()
        return
    for block in opt.engine.blocks:
        index = places_of(model, block)
        expected = truth[index][:, index]
        if approx == "diag":
            close(torch.cat([part.flatten() for part in block.layout.split(diagonal_of(block))]), expected.diag(), 1e-9)
        else:
            close(dense(opt, "tensors", block), expected, 1e-9)


@over_kinds
def test_the_models_own_parameters_through_functional_call_count(kind):
    for name in ("everything", "lstm", "bare"):
        make, batch = REPEATED[name]
        model, (x, y) = built(make), batch()
        opt = optimizer(model, CE, curv_type=kind, approx="block", rows_limit=10**6)
        CE(torch.func.functional_call(model, dict(model.named_parameters()), x), y).backward()
        assert_measured(opt, truth_of(model, CE, x, y, kind))


@over_kinds
def test_parameters_that_are_slices_of_one_tensor(kind):
    model, (x, y) = built(lambda: Attends(times=1)), floats()
    flat = parameters_to_vector(model.parameters()).detach().clone()
    nn.utils.vector_to_parameters(flat, model.parameters())  # each parameter is a view of flat now
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                setattr(module, name, nn.Parameter(p.data))
    opt = optimizer(model, CE, curv_type=kind, approx="block", rows_limit=10**6)
    CE(model(x), y).backward()
    assert_measured(opt, truth_of(model, CE, x, y, kind))


# --- 2. some of the forward passes; frozen parameters ---------------------------------------------------------


class Branches(nn.Module):
    """Modules that are used in some forward passes only."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict(
            {
                "attention": nn.TransformerEncoderLayer(W, 2, W, dropout=0.0, batch_first=True),
                "lstm": Recurrent(times=1),
                "norm": nn.LayerNorm(W),
                "bare": ScaleShift(),
            }
        )
        self.head = nn.Linear(W, V)
        self.used = "attention"

    def forward(self, x):
        out = self.parts[self.used](x)
        return out if self.used == "lstm" else self.head(out.mean(1))


@over_kinds
@pytest.mark.parametrize("approx", ["full", "block"])
def test_modules_used_in_some_forward_passes_only(approx, kind):
    model, (x, y) = built(Branches), floats()
    opt = optimizer(model, CE, curv_type=kind, approx=approx, rows_limit=10**6)
    total = 0
    for k, used in enumerate(model.parts):
        model.used = used
        x, y = floats(seed=k)
        CE(model(x), y).backward()
        total = total + truth_of(model, CE, x, y, kind)
    assert_measured(opt, total)


@over_kinds
@pytest.mark.parametrize("used", ["attention", "lstm", "norm", "bare"])
def test_modules_that_no_forward_pass_used_stay_as_they_are(used, kind):
    model, (x, y) = built(Branches), floats()
    before = copy.deepcopy(model.state_dict())
    opt = SecondOrderOptimizer(model, curv_type=kind, lr=0.1)
    for _ in range(2):
        model.used = used
        opt.zero_grad()
        CE(model(x), y).backward()
        opt.step()
    for name, p in model.named_parameters():
        own = name.startswith(f"parts.{used}.") or (name.startswith("head") and used != "lstm")
        assert torch.equal(p, before[name]) != own, name


FROZEN = {
    "everything": [
        *("embed.weight", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"),
        *("lstm.weight_ih_l0", "lstm.weight_hh_l1", "lstm.bias_ih_l0", "lstm.bias_hh_l1"),
        *("norm.weight", "norm.bias", "bn.weight", "bn.bias", "bare.scale", "bare.shift"),
        "attn.in_proj_weight attn.in_proj_bias",
        "embed.weight attn.in_proj_weight lstm.weight_ih_l0 norm.bias",
    ],
    "transposed convolution": ["up.weight", "up.bias", "norm.weight", "lift.weight lift.bias"],
    "attention, own k and v": ["attn.q_proj_weight", "attn.k_proj_weight attn.v_proj_weight"],
    "lstm cell": ["cell.weight_ih", "cell.weight_hh cell.bias_hh", "cell.bias_ih"],
    "embedding": ["embed.weight"],
    "tied embedding": ["embed.weight", "head.bias"],
    "rms norm": ["norm.weight"],
}


@pytest.mark.pairwise
@over_kinds
@pytest.mark.parametrize("name, frozen", [(name, names) for name, each in FROZEN.items() for names in each])
def test_frozen_parameters_of_every_layer(name, frozen, kind):
    make, batch = REPEATED[name]
    model, (x, y) = built(make), batch()
    for key in frozen.split():
        model.get_parameter(key).requires_grad_(False)
    opt = optimizer(model, CE, curv_type=kind, approx="block", rows_limit=10**6)
    CE(model(x), y).backward()
    assert_measured(opt, truth_of(model, CE, x, y, kind))


# --- 3. activation checkpointing ------------------------------------------------------------------------------


@pytest.mark.parametrize("approx", ["kfac", "diag", "block"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@over_kinds
def test_checkpoints_that_are_not_reentrant_change_nothing(kind, training, approx):
    found = []
    for reentrant in (None, False):
        model = built(lambda reentrant=reentrant: Everything(0.3, reentrant)).train(training)
        model.bn.momentum = 0.0  # a recomputation updates running statistics once more, with or without us
        opt = SecondOrderOptimizer(model, curv_type=kind, approx=approx, lr=0.1, rows_limit=10**6)
        torch.manual_seed(0)
        losses, grads = taken(model, opt, [tokens(seed=k) for k in range(3)])
        assert modes_are_clean()
        kept = [t for block in opt.engine.blocks for t in block.tensors.values()]
        found.append((losses, grads, kept, [p.detach() for p in model.parameters()]))
    assert found[0][0] == found[1][0]
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        same(ours, theirs)


class Blocks(nn.Module):
    """A checkpoint around each of several modules."""

    def __init__(self, make, reentrant):
        super().__init__()
        self.first, self.block, self.head, self.reentrant = nn.Linear(W, W), make(), nn.Linear(W, V), reentrant

    def body(self, x):
        out = self.block(x, x, x) if isinstance(self.block, nn.MultiheadAttention) else self.block(x)
        return out[0] if isinstance(out, tuple) else out

    def forward(self, x):
        z = self.first(x)
        z = self.body(z) if self.reentrant is None else checkpoint(self.body, z, use_reentrant=self.reentrant)
        return self.head(z.mean(1))


CHECKPOINTED = {
    "attention": lambda: nn.MultiheadAttention(W, 2, batch_first=True),
    "encoder": lambda: nn.TransformerEncoderLayer(W, 2, W, dropout=0.0, batch_first=True),
    "lstm": lambda: nn.LSTM(W, W, 2, batch_first=True),
    "batch norm": lambda: nn.BatchNorm1d(T),
    "bare": ScaleShift,
    "linear": lambda: nn.Linear(W, W),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CHECKPOINTED)
@over_kinds
def test_reentrant_checkpoints_are_right_or_refused(kind, name, training):
    found = []
    for reentrant in (None, True):
        model = built(lambda reentrant=reentrant: Blocks(CHECKPOINTED[name], reentrant)).train(training)
        opt = SecondOrderOptimizer(model, curv_type=kind, approx="block", lr=0.1, rows_limit=10**6, samples=None)
        try:
            losses, _ = taken(model, opt, [floats(seed=k) for k in range(2)])
        except RuntimeError as error:
            assert reentrant and "use_reentrant" in str(error)
            assert modes_are_clean()
            return
        found.append((losses, [p.detach() for p in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    same(found[0][1], found[1][1], 1e-10)


# --- 4. torch.compile -----------------------------------------------------------------------------------------

COMPILED = {
    "attention": (lambda: Attends(times=1), floats, "eager"),
    "encoder": (lambda: Blocks(CHECKPOINTED["encoder"], None), floats, "eager"),
    "batch norm, transposed convolution": (TwiceConvolved, floats, "aot_eager"),
    "bare": (TwiceBare, floats, "eager"),
    "tied": (lambda: TwiceEmbedded(tied=True), tokens, "eager"),
    "everything": (Everything, tokens, "aot_eager"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_models_train_like_plain_ones(name):
    torch._dynamo.reset()
    make, batch, backend = COMPILED[name]
    runs = []
    for compiled in (False, True):
        model = built(make).train()
        opt = SecondOrderOptimizer(model, lr=0.1, update_every=2, samples=None)
        used = torch.compile(model, backend=backend) if compiled else model
        losses, _ = taken(used, opt, [batch(seed=k) for k in range(3)])
        assert all(block.average for block in opt.engine.blocks)
        runs.append((losses, list(model.parameters())))
    torch._dynamo.reset()
    assert modes_are_clean()
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-9)
    same(*(params for _, params in runs), 1e-9)


# --- 5. memory formats and dtypes -----------------------------------------------------------------------------


class ConvNet(nn.Module):
    def __init__(self, channels_last=False):
        super().__init__()
        self.conv, self.up = nn.Conv2d(2, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2)
        self.bn, self.gn, self.act = nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.PReLU(4)
        self.head, self.format = nn.Linear(4, V), torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, x):
        x = x.contiguous(memory_format=self.format)
        return self.head(self.act(self.gn(self.up(self.bn(self.conv(x))))).mean((2, 3)))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("approx", ["kfac", "diag", "block", "unit"])
@over_kinds
def test_channels_last_changes_nothing(kind, approx, training):
    found = []
    for last in (False, True):
        model = built(lambda last=last: ConvNet(last)).train(training)
        if last:
            model = model.to(memory_format=torch.channels_last)
        opt = SecondOrderOptimizer(model, curv_type=kind, approx=approx, lr=0.1, samples=None)
        x, y = cases.randn(N, 2, 4, 4), models.integers(V, N)
        taken(model, opt, [(x, y)] * 3)
        found.append([p.detach().contiguous() for p in model.parameters()])
    same(*found, 1e-9)


@pytest.mark.pairwise
@pytest.mark.parametrize("form", ["autocast", "bfloat16"])
@pytest.mark.parametrize("approx", ["kfac", "diag", "block"])
@pytest.mark.parametrize("name", ["attention", "lstm", "lstm cell", "bare", "tied embedding", "everything"])
def test_low_precision_measures_nearly_the_same_in_float32(name, approx, form):
    make, batch = REPEATED[name]
    found = []
    for low in (False, True):
        dtype = torch.bfloat16 if low and form == "bfloat16" else torch.float32
        model, (x, y) = built(make).to(dtype), batch(32)
        x = x.to(dtype) if x.is_floating_point() else x
        opt = optimizer(model, CE, curv_type="empirical_fisher", approx=approx, rows_limit=10**6)
        with torch.autocast("cpu", torch.bfloat16, enabled=low and form == "autocast"):
            loss = CE(model(x), y)
        loss.backward()
        opt.step()
        found.append([tensor for block in opt.engine.blocks for tensor in block.tensors.values()])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert theirs.isfinite().all()
        assert (ours - theirs).norm() <= 0.1 * ours.norm() + 1e-6


@over_kinds
@over_repeated
def test_float32_is_float64_rounded(name, kind):
    make, batch = REPEATED[name]
    model, (x, y) = built(make), batch()
    truth = truth_of(model, CE, x, y, kind)
    model = model.float()
    opt = optimizer(model, CE, curv_type=kind, approx="block", rows_limit=10**6)
    CE(model(x.float() if x.is_floating_point() else x), y).backward()
    assert_measured(opt, truth.float(), 1e-3)


# --- 6. attention: masks, dropout, scaled_dot_product_attention -----------------------------------------------


class OwnAttention(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(W, W, bias=False), nn.Linear(W, 2 * W), nn.Linear(W, W)
        self.head, self.dropout = nn.Linear(W, V), dropout

    def forward(self, x):
        split = lambda z: z.unflatten(-1, (2, -1)).transpose(1, 2)  # noqa: E731
        q, (k, v) = split(self.q(x)), (split(z) for z in self.kv(x).chunk(2, -1))
        p = self.dropout if self.training else 0.0
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        return self.head(self.out(z.transpose(1, 2).flatten(2)).mean(1))


CAUSAL = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
PADDING = torch.tensor([[False] * T, [False, False, True], [False, True, True], [False] * T])
MASKS = {
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "boolean": {"attn_mask": CAUSAL != 0},
    "causal without weights": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "padding and causal": {"key_padding_mask": PADDING, "attn_mask": CAUSAL != 0, "need_weights": False},
    "each head": {"average_attn_weights": False},
}


@pytest.mark.pairwise
@pytest.mark.parametrize("approx", ["block", "diag"])
@pytest.mark.parametrize("masks", MASKS)
@over_kinds
def test_attention_with_masks(kind, masks, approx):
    model, (x, y) = built(Attends), floats()
    opt = optimizer(model, CE, curv_type=kind, approx=approx, rows_limit=10**6)
    CE(model(x, **MASKS[masks]), y).backward()
    assert_measured(opt, truth_of(model, CE, x, y, kind, lambda model, x: model(x, **MASKS[masks])))


@over_kinds
def test_scaled_dot_product_attention_in_a_module_of_ones_own(kind):
    model, (x, y) = built(OwnAttention), floats()
    opt = optimizer(model, CE, curv_type=kind, rows_limit=10**6)
    CE(model(x), y).backward()
    assert_measured(opt, truth_of(model, CE, x, y, kind))


DROPOUT = {
    "attention": (lambda: Attends(dropout=0.4), floats),
    "own attention": (lambda: OwnAttention(0.4), floats),
    "lstm": (lambda: Recurrent(num_layers=2, dropout=0.4), floats),
    "encoder": (
        lambda: Blocks(lambda: nn.TransformerEncoderLayer(W, 2, W, dropout=0.4, batch_first=True), None),
        floats,
    ),
    "everything": (lambda: Everything(0.4), tokens),
}


@pytest.mark.parametrize("name", DROPOUT)
@over_kinds
def test_dropout_draws_what_it_draws_without_the_optimizer(kind, name):
    make, batch = DROPOUT[name]
    model, (x, y) = built(make).train(), batch()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    other = copy.deepcopy(model)
    opt = optimizer(model, CE, curv_type=kind, approx="block", rows_limit=10**6)
    torch.manual_seed(5)
    plain = CE(other(x), y)
    plain.backward()
    after = torch.get_rng_state()
    torch.manual_seed(5)
    loss = CE(model(x), y)
    loss.backward()
    assert torch.equal(after, torch.get_rng_state())
    close(loss.detach(), plain.detach(), 1e-12)
    same([p.grad for p in model.parameters()], [p.grad for p in other.parameters()], 1e-12)
    torch.manual_seed(5)
    assert_measured(opt, truth_of(model, CE, x, y, kind))


# --- 7. the loop: accumulation, closures, scalers, copies, files ----------------------------------------------


@over_kinds
@pytest.mark.parametrize("name", ["everything", "attention", "lstm", "tied embedding", "bare"])
def test_accumulation_adds_and_scales_are_divided_out(name, kind):
    class Scale:
        def get_scale(self):
            return 2.0**9

    make, batch = REPEATED[name]
    model, batches = built(make), [batch(n=3 + k, seed=k) for k in range(3)]
    opt = optimizer(model, CE, curv_type=kind, approx="block", rows_limit=10**6, grad_scaler=Scale())
    for x, y in batches:
        (2.0**9 * CE(model(x), y) / 3).backward()
    assert_measured(opt, sum(truth_of(model, CE, x, y, kind) for x, y in batches) / 3)


@over_kinds
def test_a_closure_is_a_step_like_any_other(kind):
    runs = []
    for closed in (False, True):
        model = built(Everything).train()
        opt = SecondOrderOptimizer(model, curv_type=kind, lr=0.1)
        for k in range(3):
            x, y = tokens(seed=k)

            def closure(x=x, y=y, opt=opt, model=model):
                opt.zero_grad()
                loss = CE(model(x), y)
                loss.backward()
                return loss

            if closed:
                opt.step(closure)
            else:
                closure()
                opt.step()
        runs.append([p.detach() for p in model.parameters()])
    same(*runs)


SETTINGS = {
    "kfac": {"approx": "kfac", "factor_blocks": 2},
    "kfac, small factors": {"approx": "kfac", "max_factor_dim": 4},
    "kfac, exact": {"approx": "kfac", "factor_blocks": 2, "max_factor_dim": 4, "damping_type": "exact"},
    "ekfac": {"approx": "ekfac"},
    "unit": {"approx": "unit", "max_factor_dim": 4},
    "diag": {"approx": "diag"},
}


def file_of(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("setting", SETTINGS)
@over_kinds
def test_resuming_and_copies_in_the_middle_of_an_interval_change_no_bit(kind, setting):
    options = {"curv_type": kind, "lr": 0.05, "update_every": 3, "refactor_every": 4, **SETTINGS[setting]}
    batches = [tokens(seed=k) for k in range(8)]
    model = built(Everything).train()
    opt = SecondOrderOptimizer(model, **options)
    taken(model, opt, batches[:5])
    copied, its = copy.deepcopy((model, opt))
    file = file_of({"model": model.state_dict(), "optimizer": opt.state_dict()})
    whole = torch.load(file_of(model), weights_only=False)  # with hooks on
    taken(model, opt, batches[5:])
    taken(copied, its, batches[5:])
    saved, other = torch.load(file, weights_only=True), built(Everything).train()
    other.load_state_dict(saved["model"])
    for loaded in (other, whole):
        again = SecondOrderOptimizer(loaded, **{**options, "lr": 0.9})
        again.load_state_dict(saved["optimizer"])
        taken(loaded, again, batches[5:])
        same(model.state_dict().values(), loaded.state_dict().values())
    same(model.state_dict().values(), copied.state_dict().values())


@over_kinds
def test_the_rows_of_a_packed_parameter_are_solved_each_with_their_own_curvature(kind):
    model, (x, y) = built(lambda: Attends(times=1)), floats()
    opt = Preconditioner(model, curv_type=kind, approx="block", samples=None, damping=0.3, damping_type="exact")
    CE(model(x), y).backward()
    grads, truth = [p.grad.clone() for p in model.parameters()], truth_of(model, CE, x, y, kind)
    opt.step()
    got = parameters_to_vector([p.grad for p in model.parameters()])
    flat, expected = parameters_to_vector(grads), torch.zeros_like(got)
    for block in opt.engine.blocks:
        index = places_of(model, block)
        expected[index] = oracles.solve_dense(truth[index][:, index], flat[index], 0.3)
    close(got, expected, 1e-9)


# --- 8. evaluation in between, exceptions, function transforms ------------------------------------------------


def evaluated(model, x, how):
    mode = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}[how]
    training = model.training
    model.eval()
    with mode():
        model(x + 1 if x.is_floating_point() else x.flip(0))
    model.train(training)


@pytest.mark.pairwise
@over_kinds
@pytest.mark.parametrize("how", ["no_grad", "inference", "grad"])
@pytest.mark.parametrize(
    "name", ["everything", "attention", "lstm", "lstm cell", "bare", "tied embedding", "batch norm"]
)
def test_evaluation_between_forward_and_backward_changes_nothing(name, how, kind):
    make, batch = REPEATED[name]
    model, (x, y) = built(make), batch()
    opt = optimizer(model, CE, curv_type=kind, approx="block", rows_limit=10**6)
    evaluated(model, x, how)
    loss = CE(model(x), y)
    evaluated(model, x, how)
    loss.backward()
    evaluated(model, x, how)
    assert_measured(opt, truth_of(model, CE, x, y, kind))


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.mix, self.norm, self.head = nn.Linear(W, W), norm(), nn.Linear(W, V)

    def forward(self, x):
        return self.head(self.norm(self.mix(x)).tanh().mean(1))


TRACKING = {
    "batch norm": lambda: nn.BatchNorm1d(T),
    "instance norm": lambda: nn.InstanceNorm1d(T, affine=True, track_running_stats=True),
}


@over_kinds
@pytest.mark.parametrize("first", [False, True], ids=["later step", "first step"])
@pytest.mark.parametrize("norm", TRACKING)
def test_a_norm_is_read_in_the_mode_of_its_forward_pass(norm, first, kind):
    found = []
    for switched in (False, True):
        model, (x, y) = built(lambda: Normed(TRACKING[norm])).train(), floats()
        opt = optimizer(model, CE, curv_type=kind, approx="block", rows_limit=10**6)
        if not first:  # after which the gradients are checked no more
            CE(model(x), y).backward()
            opt.zero_grad()
        loss = CE(model(x), y)
        if switched:
            evaluated(model, x, "no_grad")
            model.eval()
        loss.backward()
        opt.step()
        found.append([t for block in opt.engine.blocks for t in block.tensors.values()])
    same(*found, 1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_an_encoder_in_eval_mode_gives_what_it_gives_without_hooks(frozen):
    model = built(lambda: nn.Sequential(nn.TransformerEncoderLayer(W, 2, W, batch_first=True), nn.Linear(W, V)))
    model[0].requires_grad_(not frozen)
    x, plain = floats()[0], copy.deepcopy(model)
    opt = optimizer(model, CE, approx="block", rows_limit=10**6)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            close(model(x).detach(), plain(x).detach(), 1e-12)
    y = models.integers(V, N, T)
    CE(model(x).transpose(1, 2), y).backward()
    assert_measured(opt, truth_of(model, CE, x, y, call=lambda model, x: model(x).transpose(1, 2)))


class Breaks(nn.Module):
    """Raises at some place of its forward while `place` says so."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(W))
        self.attn, self.lstm = nn.MultiheadAttention(W, 2, batch_first=True), nn.LSTM(W, W, batch_first=True)
        self.norm, self.head, self.place = nn.LayerNorm(W), nn.Linear(W, V), None

    def forward(self, x):
        x = x * self.scale
        if self.place == "bare":
            raise ZeroDivisionError
        z = self.attn(x, x, x, attn_mask=x.new_zeros(1, 1) if self.place == "attention" else None)[0]
        z = self.lstm(z[..., :2] if self.place == "lstm" else z)[0]
        return self.head(self.norm(z[..., :3] if self.place == "norm" else z).mean(1))


@pytest.mark.pairwise
@over_kinds
@pytest.mark.parametrize("by", ["forward", "hook", "pre-hook", "earlier pre-hook"])
@pytest.mark.parametrize("place", ["bare", "attention", "lstm", "norm"])
def test_an_exception_in_a_forward_leaves_hooks_and_modes_clean(place, by, kind):
    model, (x, y) = built(Breaks), floats()
    module = {"bare": model, "attention": model.attn, "lstm": model.lstm, "norm": model.norm}[place]
    handle = module.register_forward_pre_hook(lambda *_: 1 / 0) if by == "earlier pre-hook" else None
    opt = optimizer(model, CE, curv_type=kind, approx="block", rows_limit=10**6)
    if by == "forward":
        model.place = place
    elif handle is None:
        register = module.register_forward_hook if by == "hook" else module.register_forward_pre_hook
        handle = register(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            model(x)
        assert modes_are_clean()
    model.place = None
    if handle is not None:
        handle.remove()
    CE(model(x), y).backward()
    assert_measured(opt, truth_of(model, CE, x, y, kind))


@over_kinds
def test_an_exception_that_the_model_catches_is_no_call(kind):
    class Retries(Breaks):
        def forward(self, x):
            self.place = "attention"
            with contextlib.suppress(RuntimeError):
                super().forward(x)
            self.place = None
            return super().forward(x)

    model, (x, y) = built(Retries), floats()
    opt = optimizer(model, CE, curv_type=kind, approx="block", rows_limit=10**6)
    CE(model(x), y).backward()
    assert modes_are_clean()
    assert_measured(opt, truth_of(model, CE, x, y, kind))


def functional(model, x):
    torch.func.functional_call(model, {name: 2 * p for name, p in model.named_parameters()}, x)


def vmapped(model, x):
    params = {name: p.detach() for name, p in model.named_parameters()}
    torch.vmap(lambda one: torch.func.functional_call(model, params, one.unsqueeze(0)))(x)


def per_sample_gradients(model, x):
    params = {name: p.detach() for name, p in model.named_parameters()}
    loss = lambda params, one: torch.func.functional_call(model, params, one.unsqueeze(0)).square().sum()  # noqa: E731
    torch.vmap(torch.func.grad(loss), (None, 0))(params, x)


def vmapped_with_our_parameters(model, x):
    torch.vmap(lambda one: model(one.unsqueeze(0)))(x)


def pushed_forward(model, x):
    torch.func.jvp(model, (x,), (torch.ones_like(x),))


TRANSFORMS = [functional, vmapped, per_sample_gradients, vmapped_with_our_parameters, pushed_forward]


@pytest.mark.pairwise
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:`torch.jit.script` is deprecated")
@over_kinds
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["attention", "bare", "layer norm", "tied embedding"])
def test_function_transforms_of_the_model_add_nothing(name, transform, kind):
    make, batch = REPEATED[name]
    model, (x, y) = built(make), batch()
    if transform is pushed_forward and name in ("attention", "tied embedding"):
        return  # torch has no forward derivative of its attention; tokens have none
    opt = optimizer(model, CE, curv_type=kind, approx="block", rows_limit=10**6)
    transform(model, x)
    loss = CE(model(x), y)
    transform(model, x)
    loss.backward()
    assert modes_are_clean()
    assert_measured(opt, truth_of(model, CE, x, y, kind))


@over_kinds
@pytest.mark.parametrize("name", ["attention", "layer norm", "lstm", "tied embedding"])
def test_parameters_put_in_for_one_call_are_not_ours(name, kind):
    make, batch = REPEATED[name]
    model, (x, y) = built(make), batch()
    opt = optimizer(model, CE, curv_type=kind, approx="block", rows_limit=10**6)
    doubled = {key: 2 * p for key, p in model.named_parameters()}
    CE(torch.func.functional_call(model, doubled, x), y).backward()
    with pytest.raises(RuntimeError, match="no curvature was captured"):
        opt.step()


# --- 9. outputs with .logits, padded sequences ----------------------------------------------------------------

PADDED = nn.CrossEntropyLoss(ignore_index=-100)


def sentences():
    return models.padded(0, 5, 3, 4, seed=1), models.padded(-100, 5, 3, 4, seed=2)


@pytest.mark.pairwise
@over_kinds
@pytest.mark.parametrize("approx", ["block", "diag"])
@pytest.mark.parametrize(
    "trigger", ["module", "module rows", "output_fn", "observe", "observe rows", "observe shifted rows"]
)
def test_outputs_with_logits_and_padding(trigger, approx, kind):
    model, (x, y) = models.built(models.GPTWithLogits), sentences()
    loss_fn = PADDED if "module" in trigger else "cross_entropy" if trigger == "output_fn" else None
    options = {"output_fn": lambda out: out.logits, "class_dim": 1} if trigger == "output_fn" else {}
    opt = optimizer(model, loss_fn, curv_type=kind, approx=approx, rows_limit=10**6, **options)
    logits = model(x).logits
    shifted = "shifted" in trigger
    if shifted:
        logits, y = logits[..., :-1], y[:, 1:]
    if "rows" in trigger:
        rows, labels = logits.transpose(1, 2).reshape(-1, logits.shape[1]), y.reshape(-1)
        if "observe" in trigger:
            opt.observe(rows, labels, PADDED)
        loss = PADDED(rows, labels)
    else:
        if trigger == "observe":
            opt.observe(logits, y, PADDED)
        loss = PADDED(logits, y)
    loss.backward()
    last = -1 if shifted else None
    assert_measured(opt, truth_of(model, PADDED, x, y, kind, lambda model, x: model(x).logits[..., :last]))


# --- 10. refused, or right ------------------------------------------------------------------------------------


class Reparametrized(nn.Module):
    def __init__(self, change, kind=nn.Linear):
        super().__init__()
        self.body, self.head = change(kind(W, W)), nn.Linear(W, V)

    def forward(self, x):
        return self.head(self.body(x.mean(1)).tanh())


class OwnLinear(nn.Linear):
    pass


def old(function):
    def change(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(module)

    return change


NORMALISED = {
    "weight_norm": (nn.utils.parametrizations.weight_norm, r"body\.parametrizations\.weight\.original0"),
    "spectral_norm": (nn.utils.parametrizations.spectral_norm, r"body\.parametrizations\.weight\.original"),
    "orthogonal": (nn.utils.parametrizations.orthogonal, r"body\.parametrizations\.weight"),
    "old weight_norm": (old(lambda module: nn.utils.weight_norm(module)), r"body\.weight_g"),
    "old spectral_norm": (old(nn.utils.spectral_norm), r"body\.weight_orig"),
}


@pytest.mark.parametrize("layer", [nn.Linear, OwnLinear])
@pytest.mark.parametrize("name", NORMALISED)
@over_kinds
def test_reparametrized_weights_are_measured_at_what_they_are_computed_from(kind, name, layer):
    (change, message), (x, y) = NORMALISED[name], floats()
    make = lambda: Reparametrized(change, layer)  # noqa: E731
    model = built(make)
    opt = optimizer(model, CE, curv_type=kind, approx="block", rows_limit=10**6)
    for _ in range(2):
        opt.zero_grad()
        CE(model(x), y).backward()
        opt.step()
    truth, names = truth_of(built(make), CE, x, y, kind), [key for key, _ in model.named_parameters()]
    assert any(re.search(message, name) for name in names)
    for block in opt.engine.blocks:
        index = places_of(model, block)
        close(dense(opt, "tensors", block), truth[index][:, index], 1e-7)


@pytest.mark.parametrize("change", ["weight_norm", "old weight_norm"])
def test_a_reparametrized_recurrent_weight_trains(change):
    def normed(*args, **options):
        module = nn.LSTM(*args, **options)
        change_one = {"weight_norm": nn.utils.parametrizations.weight_norm, "old weight_norm": nn.utils.weight_norm}
        return old(lambda module: change_one[change](module, name="weight_hh_l0"))(module)

    model, (x, y) = built(lambda: Recurrent(normed, times=1)), floats()
    opt, losses = SecondOrderOptimizer(model), []
    for _ in range(8):
        opt.zero_grad()
        loss = CE(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    covered = {p for block in opt.engine.blocks if block.factors["step"].ready for p in block.params}
    assert losses[-1] < losses[0] and covered == set(model.parameters())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_weights_of_packed_sequences_are_measured_by_their_elements(kind):
    class Packed(Recurrent):
        def forward(self, x):
            packed = pack_padded_sequence(x, [3, 2, 2, 1], batch_first=True)
            return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0].mean(1))

    model, (x, y) = built(lambda: Packed(kind)), floats()
    opt = optimizer(model, CE, approx="block")
    for _ in range(2):
        opt.zero_grad()
        CE(model(x), y).backward()
        opt.step()
    truth = truth_of(model, CE, x, y)
    for block in opt.engine.blocks:
        index = places_of(model, block)
        close(dense(opt, "tensors", block), truth[index][:, index], 1e-9)
    assert modes_are_clean()


REFUSED = {
    "max": (lambda: nn.EmbeddingBag(WORDS, W, mode="max"), r"layer '0' \(EmbeddingBag\).*mode=\"max\""),
    "sparse": (lambda: nn.Embedding(WORDS, W, sparse=True), r"layer '0' \(Embedding\).*sparse=True"),
    "counted": (lambda: nn.Embedding(WORDS, W, scale_grad_by_freq=True), r"layer '0' .*scale_grad_by_freq=True"),
    "sparse bag": (lambda: nn.EmbeddingBag(WORDS, W, sparse=True), r"layer '0' .*sparse=True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_embeddings_that_cannot_be_read_are_refused_by_name(name):
    make, message = REFUSED[name]
    model = built(lambda: nn.Sequential(make(), nn.Linear(W, V)))
    with pytest.raises(ValueError, match=message):
        SecondOrderOptimizer(model)
    with pytest.raises(ValueError, match=message):
        curvature(model, CE, [])
    rest = [{"params": model[1].parameters()}, {"params": model[0].parameters(), "approx": None}]
    assert len(SecondOrderOptimizer(model, params=rest).engine.blocks) == 1


@over_kinds
@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_the_added_biases_of_attention_are_measured(options, kind):
    model, (x, y) = built(lambda: Attends(**options)), floats()
    opt = optimizer(model, CE, curv_type=kind, approx="block", rows_limit=10**6)
    CE(model(x), y).backward()
    assert_measured(opt, truth_of(model, CE, x, y, kind))


# --- 11. a preconditioner, named groups, the summary ----------------------------------------------------------


@over_kinds
@pytest.mark.parametrize("every", [1, 3])
def test_a_preconditioner_in_front_of_adam(every, kind):
    model = built(Everything).train()
    precond = Preconditioner(model, curv_type=kind, update_every=every, samples=None, damping=1e-2)
    adam, batch = torch.optim.Adam(model.parameters(), lr=1e-2), tokens()
    losses = []
    for _ in range(12):
        precond.zero_grad()
        loss = CE(model(batch[0]), batch[1])
        loss.backward()
        precond.step()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.isfinite().all() for p in model.parameters())


def test_groups_of_named_parameters():
    model = built(Everything)
    named = list(model.named_parameters())
    inside = [(name, p) for name, p in named if name.startswith(("attn", "lstm"))]
    rest = [(name, p) for name, p in named if not name.startswith(("attn", "lstm"))]
    opt = SecondOrderOptimizer(model, params=[{"params": inside, "approx": "diag"}, {"params": rest}])
    taken(model, opt, [tokens(seed=k) for k in range(2)])
    assert opt.param_groups[0]["param_names"] == [name for name, _ in inside]
    kinds = {block.name: block.options.approx for block in opt.engine.blocks}
    assert all((kind == "diag") == name.startswith(("attn", "lstm")) for name, kind in kinds.items())
    flat = SecondOrderOptimizer(built(Everything), params=None)
    assert len(flat.engine.blocks) == len(opt.engine.blocks)


@pytest.mark.parametrize("case", models.MODELS, ids=cases.ids(models.MODELS))
def test_the_summary_of_every_model_has_a_line_for_every_parameter(case):
    model = case.make_model()
    opt = SecondOrderOptimizer(model, loss_fn=case.loss)
    before = opt.summary().splitlines()
    case.loss(models.output_of(case, model, case.make_inputs()), case.make_target()).backward()
    opt.step()
    after = opt.summary().splitlines()
    for lines in (before, after):
        named = [line.split()[0] for line in lines[1:]]
        assert set(named) == {name for name, _ in model.named_parameters()}
    assert [line.split()[:3] for line in before] == [line.split()[:3] for line in after]


def test_the_summary_shows_blocks_and_diagonals():
    model = built(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)))
    text = SecondOrderOptimizer(model, factor_blocks=2, max_factor_dim=8).summary()
    assert "(2 x 2² ⊗ 2 x 3²)" in text and "(9 ⊗ 2 x 3²)" in text and "(2 x 2² ⊗ 10)" in text
    embedding = built(lambda: nn.Sequential(nn.Embedding(11, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
    groups = [{"params": embedding[1].parameters(), "approx": "unit"}, {"params": embedding[0].parameters()}]
    text = SecondOrderOptimizer(embedding, groups).summary()
    assert "(4² ⊗ 11)" in text and "4 x 2²" in text


def test_bags_beside_a_table_that_all_samples_read_are_measured():
    """Every row is a position of each sample then, also those of bags, which are known of the whole batch alone."""

    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.bags, self.table, self.head = nn.EmbeddingBag(7, 5), nn.Embedding(4, 5), nn.Linear(5, 3)

        def forward(self, x, offsets):
            return self.head((self.bags(x, offsets) + self.table(torch.arange(4)).mean(0)).tanh())

    torch.manual_seed(0)
    model = Bags().double()
    optimizer = SecondOrderOptimizer(model, loss_fn="cross_entropy", approx="block", samples=None, update_every=1)
    nn.functional.cross_entropy(model(torch.arange(12) % 7, torch.tensor([0, 2, 3, 7])), torch.arange(4) % 3).backward()
    optimizer.step()
    assert optimizer.coverage() == 1.0 and optimizer.blocks["bags"].mean_eigenvalue() > 0
