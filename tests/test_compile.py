"""Compiled models: the same weights as uncompiled; one graph for the passes that are not measured, and no other."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchcurv import SecondOrderOptimizer
from torchcurv.optim import AdaHesScale

EVERY = 5
pytestmark = [  # which the compiler raises for itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning"),
]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(self.words(x)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Bare(nn.Module):
    """A scale and a matrix of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.scale, self.matrix = nn.Parameter(torch.ones(6)), nn.Parameter(torch.randn(6, 3) / 3)

    def forward(self, x):
        return (self.first(x) * self.scale).tanh() @ self.matrix


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(checkpoint(lambda x: self.first(x).tanh(), x, use_reentrant=False))


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def cnn():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


MODELS = {
    "mlp": (mlp, lambda: torch.randn(8, 4)),
    "cnn": (cnn, lambda: torch.randn(8, 1, 6, 6)),
    "attention": (Attention, lambda: torch.randint(11, (8, 5))),
    "lstm": (Recurrent, lambda: torch.randn(8, 5, 4)),
    "bare": (Bare, lambda: torch.randn(8, 4)),
    "checkpointed": (Checkpointed, lambda: torch.randn(8, 4)),
}
WAYS = ["not", "wrapped", "wrapped for the optimizer too", "in place", "parts", "with the loss"]


def train(name, way, steps=12, make=None, backend="eager", evaluate=False):
    """(weights, what the compiler counted after each step): graph breaks, graphs, functions looked at."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model, x = (f() for f in MODELS[name])
    y, loss_fn = torch.arange(8) % 3, nn.CrossEntropyLoss()
    make = make or (lambda m: SecondOrderOptimizer(m, loss_fn=loss_fn, update_every=EVERY, refactor_every=EVERY))
    called = model
    if way.startswith("wrapped"):
        called = torch.compile(model, backend=backend)
    opt = make(called if way == "wrapped for the optimizer too" else model)
    if way == "in place":
        model.compile(backend=backend)
    if way == "parts":
        for part in model.children():
            part.compile(backend=backend)

    def loss():
        return loss_fn(called(x), y)

    if way == "with the loss":
        loss = torch.compile(loss, backend=backend)
    seen = []
    for _ in range(steps):
        opt.zero_grad()
        loss().backward()
        opt.step()
        if evaluate:
            model.eval()
            with torch.no_grad():
                called(x)
            model.train()
        counted = counters["stats"]["unique_graphs"], counters["frames"]["total"]
        seen.append((sum(counters["graph_break"].values()), *counted))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), seen


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_model_that_is_not_compiled(name, way):
    expected, _ = train(name, "not")
    weights, seen = train(name, way, 2 * EVERY + 2)
    assert torch.equal(weights, expected)
    if name != "bare":  # whose matrix is found in its first two passes, which rebuilds the blocks
        assert len(set(seen[1:])) == 1  # after one pass that is measured and one that is not, nothing is compiled
    assert len(set(seen[EVERY:])) == 1


@pytest.mark.parametrize("way", WAYS[1:])
def test_a_pass_that_is_not_measured_is_one_graph(way):
    _, seen = train("cnn", way)
    breaks, compiled = seen[0][0], seen[1][1] - seen[0][1]
    assert seen[1][0] == breaks and compiled == {"parts": 3}.get(way, 1)  # the flat part has none
    assert breaks <= 4 and seen[0][1] <= 1  # a measured pass is not compiled, but for the loss beside it


@pytest.mark.parametrize(
    "options", [{"approx": a} for a in ("full", "ekfac", "diag", "lowrank")] + [{"curv_type": "hessian"}]
)
def test_every_kind_and_shape_compiles(options):
    def make(m):
        return SecondOrderOptimizer(m, loss_fn="cross_entropy", update_every=EVERY, refactor_every=EVERY, **options)

    weights, seen = train("mlp", "wrapped", make=make, backend="aot_eager")
    assert torch.equal(weights, train("mlp", "not", make=make)[0]) and seen[-1][1] == 1


def test_optimizers_that_measure_at_each_step_compile_nothing():
    def make(m):
        return AdaHesScale(m, loss_fn="cross_entropy", lr=0.01)

    weights, seen = train("mlp", "wrapped", make=make)
    assert torch.equal(weights, train("mlp", "not", make=make)[0]) and seen[-1] == seen[0]


def test_no_limit_of_recompilation_is_hit_in_a_hundred_steps():
    """Blocks that measure at steps of their own, and an evaluation after each."""
    weights, seen = train(
        "mlp", "wrapped", 100, lambda m: SecondOrderOptimizer(m, loss_fn="cross_entropy"), evaluate=True
    )
    assert weights.isfinite().all() and seen[-1][1] == 2 and seen[-1] == seen[15]


def test_the_whole_graph_is_asked_for():
    torch._dynamo.reset()
    model, x, y = mlp(), torch.randn(8, 4), torch.arange(8) % 3
    called = torch.compile(model, backend="eager", fullgraph=True)
    opt = SecondOrderOptimizer(called, loss_fn="cross_entropy")
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(called(x), y).backward()
        opt.step()
    torch._dynamo.reset()
    model = mlp()
    called = torch.compile(model, backend="eager", fullgraph=True)
    inner = SecondOrderOptimizer(model, loss_fn="cross_entropy")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="give the optimizer the compiled model"):
        called(x)
    inner.remove()


def test_a_model_that_was_compiled_before_is_said():
    torch._dynamo.reset()
    model, x, y = mlp(), torch.randn(8, 4), torch.arange(8) % 3
    called = torch.compile(model, backend="eager")
    F.cross_entropy(called(x), y).backward()
    opt = SecondOrderOptimizer(model, loss_fn="cross_entropy")
    F.cross_entropy(called(x), y).backward()
    with pytest.raises(RuntimeError, match=r"before torch.compile's first call"):
        opt.step()


def test_a_pass_that_was_interrupted_leaves_the_compiler_on():
    """KeyboardInterrupt ends a forward pass without its last hooks."""
    torch._dynamo.reset()
    model, x, y = mlp(), torch.randn(8, 4), torch.arange(8) % 3
    opt, presses = SecondOrderOptimizer(model, loss_fn="cross_entropy"), [1]

    def press(*_):
        if presses:
            presses.clear()
            raise KeyboardInterrupt

    model[1].register_forward_hook(press)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    opt.zero_grad()
    assert torch._dynamo.eval_frame._stance.stance == "default"
    F.cross_entropy(model(x), y).backward()
    opt.step()
    assert opt.metrics()["measurements"] == 2


def test_two_optimizers_on_one_model_leave_the_compiler_on():
    """Their hooks begin and end a pass in one order, not one inside of the other."""
    torch._dynamo.reset()
    counters.clear()
    model, x, y = mlp(), torch.randn(8, 4), torch.arange(8) % 3
    options = {"loss_fn": "cross_entropy", "update_every": EVERY, "refactor_every": EVERY}
    both = [SecondOrderOptimizer(model, **options), SecondOrderOptimizer(model, curv_type="fisher", **options)]
    called = torch.compile(model, backend="eager")
    for _ in range(EVERY + 2):
        model.zero_grad()
        F.cross_entropy(called(x), y).backward()
        for opt in both:
            opt.step()
    assert counters["stats"]["unique_graphs"] == 1 and torch._dynamo.eval_frame._stance.stance == "default"
    assert all(opt.metrics()["measurements"] == 4 for opt in both)
