"""Defects that other packages have had, by name: what is wrong there is right here.

Those not listed stand where they belong: scales of mean, sum and micro-batches in test_step.py, in-place activations,
views, repeated and unused layers, skipped AMP steps and global generators in test_triggers.py, state that is lost on
saving in test_resume.py, the triangular factors of posterior draws in test_factor.py.
"""

import cases
import oracles
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchcurv import SecondOrderOptimizer, curvature, register_view
from torchcurv.curv.layers.table import VIEWS


def make_model():
    return cases.seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def step(model, optimizer, seed=0):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(cases.randn(6, 4, seed=seed)), torch.arange(6) % 3).backward()
    optimizer.step()


def test_statistics_do_not_start_at_the_identity():
    model = make_model()
    optimizer = SecondOrderOptimizer(model, lr=0.0, samples=None, ema_decay=0.9)
    step(model, optimizer)
    first = {key: value.clone() for key, value in optimizer.engine.blocks[0].tensors.items()}
    step(model, optimizer)
    for key, value in optimizer.engine.blocks[0].tensors.items():
        torch.testing.assert_close(value, first[key])


def test_refactoring_does_not_add_damping_to_the_statistics():
    model = make_model()
    optimizer = SecondOrderOptimizer(model, lr=0.0, damping=10.0)
    step(model, optimizer)
    block = optimizer.engine.blocks[0]
    before = {key: value.clone() for key, value in block.tensors.items()}
    for _ in range(3):
        block.refactor(10.0)
    assert all(torch.equal(value, before[key]) for key, value in block.tensors.items())


def test_the_diagonal_of_a_convolution_is_no_sum_of_position_wise_squares():
    model = cases.net_around(nn.Conv2d(2, 3, 2).double(), (2, 4, 4))
    x, y = cases.randn(3, 2, 4, 4), torch.arange(3)
    a, s = oracles.layer_arrays(model, nn.CrossEntropyLoss(), x, y, "layer")
    wrong = oracles.to_param_order(torch.einsum("vnrgo,nrgi->goi", s**2, a**2).flatten(), model.layer)
    got = curvature(model, "cross_entropy", [(x, y)], approx="diag", params=model.layer.parameters()).diag()
    torch.testing.assert_close(got, oracles.diag_from_arrays(a, s, model.layer))
    assert oracles.relative_error(got, wrong) > 1e-3


@pytest.mark.parametrize("samples", [1, 4])
def test_draws_are_divided_by_their_number_once(samples):
    model, loss = make_model(), nn.CrossEntropyLoss()
    x, y = cases.randn(6, 4), torch.arange(6) % 3
    exact = curvature(model, loss, [(x, y)], approx="diag").diag()
    for kind in ("ggn", "fisher"):
        draws = [
            curvature(model, loss, [(x, y)], curv_type=kind, approx="diag", samples=samples, seed=seed).diag()
            for seed in range(400)
        ]
        mean, error = torch.stack(draws).mean(0).sum(), torch.stack(draws).sum(1).std() / 20
        assert (mean - exact.sum()).abs() < 5 * error


def test_a_gaussian_has_its_variance_on_the_right_side():
    model, loss = make_model(), nn.MSELoss()
    x, y = cases.randn(6, 4), cases.randn(6, 3)
    truth = oracles.fisher(model, loss, x, y, list(model.named_parameters()))
    torch.testing.assert_close(curvature(model, loss, [(x, y)], curv_type="fisher", approx="full").to_dense(), truth)


def test_class_weights_and_ignored_rows_reach_both_kronecker_factors():
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]).double(), ignore_index=-1)
    model = make_model()
    x, y = cases.randn(6, 4), torch.tensor([0, -1, 1, 2, -1, 0])
    kept = y >= 0
    without = curvature(model, loss, [(x[kept], y[kept])]).to_dense()
    torch.testing.assert_close(curvature(model, loss, [(x, y)]).to_dense(), without)
    factors = curvature(model, loss, [(x, y)]).blocks["0"].tensors
    ones = torch.cat([x, torch.ones(6, 1, dtype=x.dtype)], 1)
    w = torch.where(kept, loss.weight[y.clamp_min(0)], 0)
    torch.testing.assert_close(factors["A"][0] / factors["count"], torch.einsum("n,ni,nj->ij", w, ones, ones) / w.sum())


@pytest.mark.parametrize("approx", ["full", "block", "unit", "kfac", "ekfac", "diag"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_short_last_batch_counts_by_its_terms(approx, reduction):
    model, loss = make_model(), nn.CrossEntropyLoss(reduction=reduction)
    x, y = cases.randn(7, 4), torch.arange(7) % 3
    whole = curvature(model, loss, [(x, y)], approx=approx)
    parts = curvature(model, loss, [(x[:3], y[:3]), (x[3:6], y[3:6]), (x[6:], y[6:])], approx=approx)
    torch.testing.assert_close(parts.to_dense(), whole.to_dense())


def test_looking_at_curvature_leaves_the_model_alone():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), normed).double().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = [(cases.randn(6, 4), torch.arange(6) % 3)]
    curvature(model, "cross_entropy", data)
    curvature(model, "cross_entropy", data, params=[*model[0].parameters(), *model[1].parameters(), normed.bias])
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not model[0]._forward_hooks


def test_an_unused_layer_and_a_missing_gradient_leave_their_parameters_as_they_are():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    model = Sometimes().double()
    optimizer = SecondOrderOptimizer(model)
    before = model.unused.weight.detach().clone()
    for seed in range(3):
        step(model, optimizer, seed)
    assert torch.equal(model.unused.weight, before)


class Syncs(TorchDispatchMode):
    """Counts what would make an accelerator wait: reading a value, or a shape that depends on values."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("damping_type", ["factored", "exact"])
@pytest.mark.parametrize("approx", ["kfac", "diag", "unit", "ekfac"])
def test_no_host_sync_per_layer_and_step(approx, damping_type, accelerator):
    """The KL clip, the running averages and the products read nothing; a factorisation reads its flags at most."""
    model = make_model()
    optimizer = SecondOrderOptimizer(model, approx=approx, damping_type=damping_type, refactor_every=100)
    step(model, optimizer)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(cases.randn(6, 4)), torch.arange(6) % 3).backward()
    with Syncs() as syncs:
        optimizer.step()
    assert syncs.count == 0


class TiedTokens(nn.Module):
    def __init__(self, tokens, width):
        super().__init__()
        self.embed, self.line = nn.Embedding(tokens, width), nn.Linear(width, width)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, t):
        return self.head(torch.tanh(self.line(self.embed(t)))).mean(1)


@pytest.mark.parametrize("approx", ["full", "block", "lowrank"])
@pytest.mark.parametrize(("tokens", "width"), [(3, 6), (3, 4), (6, 3)])
def test_rows_of_an_embedding_tied_to_its_head_with_fewer_tokens_than_width(tokens, width, approx):
    model = cases.seeded(lambda: TiedTokens(tokens, width))
    t = torch.randint(tokens, (5, 4), generator=torch.Generator().manual_seed(0))
    y, loss = torch.arange(5) % tokens, nn.CrossEntropyLoss()
    size = sum(p.numel() for p in model.parameters())
    rows = curvature(
        model, loss, [(t, y)], approx=approx, rows_limit=1, **({"rank": size} if approx == "lowrank" else {})
    )
    dense = curvature(model, loss, [(t, y)], approx="block" if approx == "block" else "full", rows_limit=10**6)
    torch.testing.assert_close(rows.to_dense(), dense.to_dense(), rtol=1e-8, atol=1e-10)


def test_one_image_with_a_loss_per_pixel_after_an_affine_batch_norm():
    """torch misreads a strided gradient there."""
    model = cases.seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)))
    optimizer = SecondOrderOptimizer(model, loss_fn=nn.CrossEntropyLoss())
    x, y = cases.randn(1, 3, 5, 5), torch.arange(25).reshape(1, 5, 5) % 4
    optimizer.loss_fn(model(x), y).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


NORMS = {
    "one group": (4, lambda c: nn.GroupNorm(1, c)),
    "four groups": (16, lambda c: nn.GroupNorm(4, c)),
    "each channel": (4, lambda c: nn.GroupNorm(4, c)),
    "instance": (4, lambda c: nn.InstanceNorm2d(c, affine=True)),
}


@pytest.mark.parametrize(("channels", "norm"), NORMS.values(), ids=NORMS)
def test_the_exact_hessian_beside_a_norm_whose_weight_is_frozen(channels, norm):
    """torch's batched second derivative of group norm is wrong there, without a word."""
    model = cases.seeded(
        lambda: nn.Sequential(nn.Conv2d(2, channels, 3), norm(channels), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
    )
    model(cases.randn(4, 2, 4, 4))
    model[1].weight.requires_grad_(False)
    x, y = cases.randn(4, 2, 4, 4), torch.arange(4) % 3
    params = [p for p in model.parameters() if p.requires_grad]
    options = {"curv_type": "hessian", "approx": "full", "params": params}
    H = curvature(model, nn.CrossEntropyLoss(), [(x, y)], **options).to_dense()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    torch.testing.assert_close(H, oracles.hessian(model, nn.CrossEntropyLoss(), x, y, named), rtol=1e-8, atol=1e-10)


class Grouped(nn.Module):
    """W [g, o, i], each group of its own inputs."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(2, 3, 4) * 0.5), nn.Parameter(torch.zeros(2, 3))

    def forward(self, x):
        return (torch.einsum("ngi,goi->ngo", x.unflatten(1, (2, 4)), self.weight) + self.bias).flatten(1)


class InputsFirst(nn.Module):
    """W [i, o], as GPT-2's Conv1D."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6) * 0.5), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.mark.parametrize("approx", ["full", "kfac", "unit", "diag"])
@pytest.mark.parametrize(
    ("module", "groups", "stored"), [(Grouped, 2, "groups first"), (InputsFirst, 1, "inputs first")]
)
def test_a_weight_may_be_stored_in_another_order(module, groups, stored, approx):
    held = dict(VIEWS)
    register_view(
        module,
        lambda m, x: x.reshape(len(x), 1, groups, -1),
        lambda m, dz: dz.reshape(len(dz), 1, groups, -1),
        lambda m: groups,
        stored=stored,
    )
    try:
        model = cases.seeded(lambda: nn.Sequential(module(), nn.Tanh(), nn.Linear(6, 3)))
        x, y, loss = cases.randn(5, 8), torch.arange(5) % 3, nn.CrossEntropyLoss()
        named = list(model.named_parameters())
        truth = oracles.ggn(model, loss, x, y, named)
        found = curvature(model, loss, [(x, y)], approx=approx).to_dense()
        if approx == "full":
            torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)
        elif approx == "diag":
            torch.testing.assert_close(found.diag(), truth.diag(), rtol=1e-9, atol=1e-12)
        optimizer = SecondOrderOptimizer(model, loss_fn=loss, approx=approx)
        loss(model(x), y).backward()
        optimizer.step()
    finally:
        VIEWS.clear()
        VIEWS.update(held)
