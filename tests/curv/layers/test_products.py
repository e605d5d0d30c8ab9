"""Products with bare parameters, by whatever function, are layers: with groups, of several dimensions, of experts."""

import copy

import cases
import pytest
import torch
import torch.nn.functional as F
from full_step import error_of_full, root_rows
from torch import Tensor, nn

from torchcurv import SecondOrderOptimizer, curvature
from torchcurv.curv.layers.products import products_with

D, E, V, H = 4, 3, 3, 8  # width, groups or experts, classes, width behind experts
CE = nn.CrossEntropyLoss()


def close(x: Tensor, truth: Tensor, tol: float = 1e-9) -> None:
    assert x.shape == truth.shape
    assert (x - truth).abs().max() <= tol * max(1e-12, float(truth.abs().max()))


def of_parameter(found, param: nn.Parameter) -> Tensor:
    """Its part of the diagonal."""
    parts = found.diag().split([p.numel() for p in found.params])
    return next(part for p, part in zip(found.params, parts, strict=True) if p is param)


def labels(n: int) -> Tensor:
    return torch.arange(n) % V


class Bare(nn.Module):
    """h of x [n, t, d] by a parameter w and a function, and classes from the mean over all but the samples."""

    def __init__(self, function, shape, width):
        super().__init__()
        self.function, self.head = function, nn.Linear(width, V)
        self.w = nn.Parameter(cases.randn(*shape, seed=sum(shape)))

    def forward(self, x):
        h = self.function(x, self.w).tanh()
        return self.head(h.reshape(len(x), -1, h.shape[-1]).mean(1))


def by_bmm(x, w):  # [n, t, d] x [e, d, o] over all tokens -> [n, e t, o]
    tokens = x.reshape(1, -1, D).expand(len(w), -1, -1)
    return torch.bmm(tokens, w).reshape(len(w), *x.shape[:2], -1).transpose(0, 1).flatten(1, 2)


def by_baddbmm(x, w):
    tokens = x.reshape(1, -1, D).expand(len(w), -1, -1)
    out = torch.baddbmm(x.new_ones(1), tokens, w)
    return out.reshape(len(w), *x.shape[:2], -1).transpose(0, 1).flatten(1, 2)


# name -> function of (x [n, t, D], w), the shape of w, the last dimension, (g, o, i) of the layer
MAPS = {
    "several outputs": (lambda x, w: torch.einsum("ntd,dhk->nthk", x, w), (D, E, 2), 2, (1, 6, D)),
    "outputs in another order": (lambda x, w: torch.einsum("ntd,hdk->nkth", x, w), (E, D, 2), E, (1, 6, D)),
    "several inputs": (lambda x, w: torch.einsum("ntd,tdo->no", x, w).unsqueeze(1), (5, D, 2), 2, (1, 2, 5 * D)),
    "weight first": (lambda x, w: torch.einsum("od,...d->...o", w, x), (2, D), 2, (1, 2, D)),
    "implicit output": (lambda x, w: torch.einsum("ntd,dz", x, w), (D, 2), 2, (1, 2, D)),
    "operands in a list": (lambda x, w: torch.einsum("ntd,do->nto", [x, w]), (D, 2), 2, (1, 2, D)),
    "groups by einsum": (lambda x, w: torch.einsum("nghd,gdo->ngho", x.unsqueeze(2), w), (5, D, 2), 2, (5, 2, D)),
    "groups by matmul": (lambda x, w: x.unsqueeze(2) @ w, (5, D, 2), 2, (5, 2, D)),
    "a row for each group": (lambda x, w: torch.matmul(x.unsqueeze(1), w), (E, D, 2), 2, (1, 2 * E, D)),
    "groups over all tokens": (by_bmm, (E, D, 2), 2, (E, 2, D)),
    "added": (by_baddbmm, (E, D, 2), 2, (E, 2, D)),
    "mixing of positions": (lambda x, w: w @ x, (6, 5), D, (1, 6, 5)),
    "one output": (lambda x, w: x @ w, (D, 1), 1, (1, 1, D)),
    "transposed": (lambda x, w: x @ w.mT, (2, D), 2, (1, 2, D)),
    "groups transposed": (lambda x, w: x.unsqueeze(2) @ w.transpose(1, 2), (5, 2, D), 2, (5, 2, D)),
}
over_maps = pytest.mark.parametrize("name", MAPS)


def mapped(name):
    function, shape, width, layer = MAPS[name]
    return cases.seeded(lambda: Bare(function, shape, width)), cases.randn(6, 5, D), labels(6), layer


@over_maps
def test_a_product_is_a_layer(name):
    model, x, y, layer = mapped(name)
    rows = root_rows(model(x), [model.w])
    for approx in ("block", "diag"):
        found = curvature(model, CE, [(x, y)], approx=approx)
        assert found.blocks["w"].layers[0].shape == layer
        close(of_parameter(found, model.w), rows.square().sum(0))


@over_maps
def test_a_step_of_it_is_the_dense_one(name):
    model, x, y, _ = mapped(name)
    assert error_of_full(model, lambda: CE(model(x), y), lambda: model(x), loss_fn=CE) <= 1e-9


def test_groups_have_the_factors_of_layers_of_their_own():
    """K-FAC of a batched product is that of one linear layer for each group."""
    model, x, y, _ = mapped("groups by matmul")

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps = nn.ModuleList(nn.Linear(D, 2, bias=False) for _ in range(5))
            self.head = model.head
            for own, w in zip(self.maps, model.w.detach(), strict=True):
                own.weight.data = w.T.clone()

        def forward(self, x):
            return self.head(torch.stack([own(x[:, k]).tanh() for k, own in enumerate(self.maps)], 1).mean(1))

    apart = Apart()
    close(apart(x).detach(), model(x).detach())
    joint, alone = (curvature(m, CE, [(x, y)], approx="kfac").blocks for m in (model, apart))
    close(joint["w"].factor.trace(), sum(alone[f"maps.{k}"].factor.trace() for k in range(5)))


# ---------------------------------------------------------------------------------------------- experts


class Experts(nn.Module):
    """Tokens [n, t, d] routed to the experts of a table, whose weights are one parameter [E, ...]."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        shape = (E + 1, D, H) if how in ("bmm of each", "grouped") else (E + 1, H, D)
        self.up, self.head = nn.Parameter(cases.randn(*shape)), nn.Linear(H, V)

    def forward(self, x):
        tokens = x.reshape(-1, D)
        chosen = (tokens[:, 0] * 7).long().abs() % E  # so that the last expert never gets one
        order = chosen.argsort(stable=True)
        if self.how.startswith("grouped"):
            ends = torch.bincount(chosen, minlength=E + 1).cumsum(0).int()
            w = self.up if self.how == "grouped" else self.up.transpose(-2, -1)
            h = F.grouped_mm(tokens[order], w, offs=ends)
            h = torch.zeros_like(h).index_copy(0, order, h)
        else:
            h = tokens.new_zeros(len(tokens), H)
            for k in range(E):
                own = (chosen == k).nonzero()[:, 0]
                if self.how == "linear":
                    part = F.linear(tokens[own], self.up[torch.tensor(k)])
                else:
                    part = tokens[own] @ self.up[k]
                h = h.index_add(0, own, part)
        return self.head(h.tanh().reshape(*x.shape[:2], H).mean(1))


def routed(how):
    model, x = cases.seeded(lambda: Experts(how)), cases.randn(6, 4, D)
    if "grouped" in how:  # which torch has in float32 alone on a CPU
        model, x = model.float(), x.float()
    return model, x, labels(6)


over_hows = pytest.mark.parametrize("how", ["linear", "bmm of each", "grouped", "grouped transposed"])


@over_hows
@pytest.mark.parametrize("approx", ["block", "diag", "unit"])
def test_each_expert_is_a_layer_of_the_samples_whose_tokens_it_gets(how, approx):
    model, x, y = routed(how)
    found = curvature(model, CE, [(x, y)], approx=approx)
    assert {f"up[{k}]" for k in range(E + 1)} < found.blocks.keys()
    rows = root_rows(model(x), [model.up]).square().sum(0)
    if approx == "unit":
        return
    diag = of_parameter(found, model.up)
    close(diag, rows, 1e-9 if diag.dtype == torch.float64 else 1e-4)


@over_hows
def test_experts_have_the_factors_of_linear_layers(how):
    """K-FAC of a slice is that of an nn.Linear that gets the same tokens."""
    model, x, y = routed(how)

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps = nn.ModuleList(nn.Linear(D, H, bias=False) for _ in range(E))
            self.head = model.head
            for own, w in zip(self.maps, model.up.detach(), strict=False):
                own.weight.data = (w.T if how in ("bmm of each", "grouped") else w).clone()

        def forward(self, x):
            tokens = x.reshape(-1, D)
            chosen = (tokens[:, 0] * 7).long().abs() % E
            h = tokens.new_zeros(len(tokens), H)
            for k, own in enumerate(self.maps):
                at = (chosen == k).nonzero()[:, 0]
                h = h.index_add(0, at, own(tokens[at]))
            return self.head(h.tanh().reshape(*x.shape[:2], H).mean(1))

    joint, alone = (curvature(m, CE, [(x, y)], approx="kfac").blocks for m in (model, Apart()))
    for k in range(E):
        close(joint[f"up[{k}]"].factor.trace(), alone[f"maps.{k}"].factor.trace(), 1e-4)


@over_hows
def test_experts_train_and_an_idle_one_stays(how):
    model, x, y = routed(how)
    optimizer = SecondOrderOptimizer(model, loss_fn=CE, update_every=3, refactor_every=3)
    idle, losses = model.up[E].detach().clone(), []
    for _ in range(9):
        optimizer.zero_grad()
        loss = CE(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2 and optimizer.coverage() == 1
    assert torch.equal(idle, model.up[E]) and bool(optimizer.blocks["up[0]"].average)
    waiting = {optimizer.blocks[f"up[{k}]"].refresh.next_update for k in range(E + 1)}
    assert len(waiting) == 1  # what met nothing waits for its next turn with the others


def test_an_expert_that_wakes_up_is_trained():
    """It follows its gradient until it is measured, as a block does whose parameters had no gradient."""
    torch.manual_seed(0)
    model = Experts("linear").float()
    optimizer = SecondOrderOptimizer(model, loss_fn=CE, update_every=4, refactor_every=4)
    x = cases.randn(6, 4, D).float()
    asleep = x.clone()
    asleep[..., 0] = 0.0  # all tokens to expert 0
    before = model.up.detach().clone()
    for step in range(8):
        optimizer.zero_grad()
        CE(model(asleep if step < 2 else x), labels(6)).backward()
        optimizer.step()
        if step == 1:
            assert torch.equal(before[1:], model.up[1:])
        if step == 2:
            moved = (model.up - before).flatten(1).norm(dim=1)
            assert (moved[1:E] > 0).all() and moved[E] == 0
    assert all(optimizer.blocks[f"up[{k}]"].average for k in range(E))


def test_a_resumed_run_goes_on_the_same():
    x, y = cases.randn(6, 4, D).float(), labels(6)

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()

    first = cases.seeded(lambda: Experts("linear")).float()
    one = SecondOrderOptimizer(first, loss_fn=CE)
    steps(first, one, 3)
    second = Experts("linear").float()
    second.load_state_dict(first.state_dict())
    two = SecondOrderOptimizer(second, loss_fn=CE)
    two.load_state_dict(one.state_dict())
    steps(first, one, 3)
    steps(second, two, 3)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# ------------------------------------------------------------------------------------- what is none


def unread(func, *args, **kwargs):
    w = next(x for x in args if isinstance(x, nn.Parameter))

    def owner(x):
        return w if x is w or x._base is w else None

    return products_with(owner, func, args, kwargs)


W, X = nn.Parameter(torch.randn(3, 4)), torch.randn(5, 4)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (torch.einsum, ("nd,od->n", X, W)),  # a sum over the outputs alone
        (torch.einsum, ("nd,od->o", X, W)),  # over the batch
        (torch.einsum, ("od,od->", W, W)),  # with itself
        (torch.einsum, ("nd,oo->nd", X, nn.Parameter(torch.randn(3, 3)))),
        (torch.einsum, ("nd,od,o->n", X, W, torch.ones(3))),
        (torch.matmul, (X[0], W)),
        (torch.matmul, (X, W.detach().requires_grad_()[:, :2])),
    ],
)
def test_what_is_no_product(func, args):
    given = [x for x in args if isinstance(x, nn.Parameter)]
    assert (unread(func, *args) if given else products_with(lambda x: None, func, args, {})) == []


def test_a_product_used_in_other_ways_too_is_taken_element_by_element():
    """The gradient is not that of the products alone, which is noticed."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.head = nn.Parameter(cases.randn(E, D, 2)), nn.Linear(2, V)

        def forward(self, x):
            h = torch.einsum("nd,edo->neo", x, self.w) + (self.w**2).mean(1)
            return self.head(h.tanh().mean(1))

    model, x, y = cases.seeded(Twice), cases.randn(6, D), labels(6)
    rows = root_rows(model(x), [model.w])
    found = curvature(model, CE, [(x, y)], approx="diag")
    close(of_parameter(found, model.w), rows.square().sum(0))


def test_a_copy_and_a_checkpoint_know_which_matrices_are_layers():
    """Also one of before that was known, loaded into an optimizer that knows it."""
    x, y = cases.randn(6, D).float(), labels(6)

    class Matrix(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.head = nn.Parameter(cases.randn(D, 2).float()), nn.Linear(2, V)

        def forward(self, x):
            return self.head((x @ self.w).tanh())

    def step(model, optimizer):
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()

    model = cases.seeded(Matrix).float()
    optimizer = SecondOrderOptimizer(model, loss_fn=CE)
    early = copy.deepcopy(optimizer.state_dict())
    for _ in range(3):
        step(model, optimizer)
    other = Matrix()
    resumed = SecondOrderOptimizer(other, loss_fn=CE)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    copied = copy.deepcopy({"model": model, "optimizer": optimizer})
    for own, theirs in ((other, resumed), (copied["model"], copied["optimizer"])):
        assert theirs.blocks["w"].layers[0].shape == (1, 2, D)
        step(own, theirs)
    step(model, optimizer)
    assert torch.equal(other.w, model.w) and torch.equal(copied["model"].w, model.w)
    resumed.load_state_dict(early)
    step(other, resumed)


class Doubled(nn.Linear):
    def forward(self, x):
        return F.linear(2 * x, self.weight, self.bias).tanh().mean(1)


@pytest.mark.parametrize("name", ["groups by matmul", "a layer's own function"])
def test_two_optimizers_see_the_same_layers(name):
    if name in MAPS:
        model, x, y, layer = mapped(name)
    else:
        model, x, y, layer = cases.seeded(lambda: Doubled(D, V)), cases.randn(6, 5, D), labels(6), (1, V, D + 1)
    options = {"approx": "diag", "samples": None, "update_every": 1, "refactor_every": 1}
    two = [SecondOrderOptimizer(model, loss_fn=CE, **options) for _ in range(2)]
    for _ in range(3):
        for optimizer in two:
            optimizer.zero_grad()
        CE(model(x), y).backward()
        for optimizer in two:
            optimizer.step()
    assert [next(iter(optimizer.blocks.values())).layers[0].shape for optimizer in two] == [layer] * 2


class BySums(nn.Linear):
    def forward(self, x):
        return torch.einsum("ntd,od->nto", x, self.weight).tanh().mean(1) + self.bias


def test_a_linear_layer_that_computes_by_another_function_is_right():
    model, x, y = cases.seeded(lambda: BySums(D, V)), cases.randn(6, 5, D), labels(6)
    assert error_of_full(model, lambda: CE(model(x), y), lambda: model(x), loss_fn=CE) <= 1e-9
