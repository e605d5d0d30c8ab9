"""HBP (kfac) and HesScale (diag) in blocks, against the exact Hessian and the GGN where they are exact."""

import cases
import models
import oracles
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchcurv import SecondOrderOptimizer, curvature

LOSSES = [nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss(reduction="sum")]
RESIDUALS = ["keep", "zero", "abs", "clip"]
CHAINS = {
    "tanh": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)),
    "gelu": lambda: nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 3, bias=False)),
}


def close(x, truth, tol=1e-10):
    assert x.shape == truth.shape
    assert (x - truth).abs().max() <= tol * (1e-3 + truth.abs().max())


def target(loss, n, shape=(3,)):
    if isinstance(loss, nn.CrossEntropyLoss):
        return torch.arange(n) % 3
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def blocks_of(matrix, model):
    """The diagonal blocks over the parameters of each Linear layer."""
    named = list(model.named_parameters())
    layers = dict.fromkeys(name.rpartition(".")[0] for name, _ in named)
    return [oracles.sub_block(matrix, named, [n for n, _ in named if n.rpartition(".")[0] == at]) for at in layers]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("name", CHAINS)
def test_for_one_sample_on_a_chain_every_block_is_the_true_hessian(name, loss):
    model, x = cases.seeded(CHAINS[name]), cases.randn(1, 4, seed=1)
    y, named = target(loss, 1), list(model.named_parameters())
    for residual, truth in (("keep", oracles.hessian), ("zero", oracles.ggn)):
        got = curvature(model, loss, [(x, y)], curv_type="hessian", approx="kfac", residual=residual).to_dense()
        for ours, expected in zip(
            blocks_of(got, model), blocks_of(truth(model, loss, x, y, named), model), strict=True
        ):
            close(ours, expected)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_the_diagonal_is_exact_at_the_last_layer_and_for_elementwise_losses_at_the_last_two(loss):
    model, x = cases.seeded(CHAINS["tanh"]), cases.randn(6, 4, seed=1)
    y, named = target(loss, 6), list(model.named_parameters())
    truth = oracles.hessian(model, loss, x, y, named).diag()
    got = curvature(model, loss, [(x, y)], curv_type="hessian", approx="diag").diag()
    exact = sum(p.numel() for p in model[4].parameters())
    if not isinstance(loss, nn.CrossEntropyLoss):
        exact += sum(p.numel() for p in model[2].parameters())
    close(got[-exact:], truth[-exact:])
    first = slice(0, sum(p.numel() for p in model[0].parameters()))
    assert (got[first] - truth[first]).norm() > 1e-3 * truth[first].norm()


@pytest.mark.parametrize("approx", ["kfac", "diag"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_for_one_linear_layer_all_residuals_are_the_same(loss, approx):
    model, x = cases.seeded(lambda: nn.Linear(4, 3)), cases.randn(5, 4, seed=1)
    y = target(loss, 5)
    found = [
        curvature(model, loss, [(x, y)], curv_type="hessian", approx=approx, residual=residual).to_dense()
        for residual in RESIDUALS
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])
    if approx == "diag":
        close(found[0].diag(), oracles.hessian(model, loss, x, y, list(model.named_parameters())).diag())


def test_kfac_sums_the_matrices_of_the_samples():
    """One linear layer and a loss whose Hessian is the same for all samples: B ⊗ A is the Hessian, for any number."""
    model, loss, x = cases.seeded(lambda: nn.Linear(4, 3)), nn.MSELoss(), cases.randn(5, 4, seed=1)
    y = target(loss, 5)
    got = curvature(model, loss, [(x, y)], curv_type="hessian", approx="kfac").to_dense()
    close(got, oracles.hessian(model, loss, x, y, list(model.named_parameters())))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kfac_of_a_convolution_sums_the_matrix_over_equal_or_all_positions(sharing):
    """One sample: the matrix at the convolution's output is exact, and B follows from it by its definition."""
    model = cases.seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 2, groups=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)))
    loss, x, y = nn.CrossEntropyLoss(), cases.randn(1, 2, 3, 3, seed=1), torch.tensor([1])
    z = model[0](x).detach()
    H = torch.autograd.functional.hessian(lambda z: loss(model[1:](z), y), z).reshape(3, 4, 3, 4)  # o r o' r'
    B = torch.einsum("ornr->on", H) if sharing == "expand" else H.sum((1, 3))
    patches = torch.nn.functional.unfold(x, 2)[0].mT
    a = torch.cat([patches, torch.ones(4, 1, dtype=x.dtype)], 1)
    a = a if sharing == "expand" else a.mean(0, keepdim=True)
    truth = torch.kron(B.contiguous(), (a.mT @ a / len(a)).contiguous())
    order = oracles.param_order(model[0])
    got = curvature(model, loss, [(x, y)], curv_type="hessian", approx="kfac", sharing=sharing).blocks["0"]
    dense = torch.stack([torch.cat([t.flatten() for t in column]) for column in columns(got)], 1)
    close(dense, truth[order][:, order])


def columns(block):
    sizes = [p.numel() for p in block.params]
    for unit in torch.eye(sum(sizes), dtype=torch.float64):
        yield block.matvec([part.reshape(p.shape) for part, p in zip(unit.split(sizes), block.params, strict=True)])


def test_batches_and_reductions():
    model, loss = cases.seeded(CHAINS["tanh"]), nn.MSELoss()
    x, y = cases.randn(6, 4, seed=1), target(loss, 6)
    options = {"curv_type": "hessian", "approx": "diag"}
    whole = curvature(model, loss, [(x, y)], **options).diag()
    close(curvature(model, loss, [(x[:2], y[:2]), (x[2:], y[2:])], **options).diag(), whole)
    total = curvature(model, nn.MSELoss(reduction="sum"), [(x, y)], **options).diag()
    close(total, whole * y.numel())


@pytest.mark.parametrize(("approx", "keys"), [("diag", ["diag"]), ("kfac", ["A", "count", "B"])])
@pytest.mark.parametrize("loss_fn", ["module", "name"])
def test_an_optimizer_measures_what_is_looked_at(loss_fn, approx, keys):
    model, loss = cases.seeded(CHAINS["tanh"]), nn.CrossEntropyLoss()
    x, y = cases.randn(6, 4, seed=1), target(loss, 6)
    seen = curvature(model, loss, [(x, y)], curv_type="hessian", approx=approx)
    chosen = loss if loss_fn == "module" else "cross_entropy"
    optimizer = SecondOrderOptimizer(model, loss_fn=chosen, curv_type="hessian", approx=approx)
    loss(model(x), y).backward()
    for block in optimizer.engine.blocks:
        for key in keys:
            assert torch.allclose(block.pending.tensors[key], seen.blocks[block.name].tensors[key], rtol=1e-10)


def test_micro_batches_add_up():
    """The diagonal; the matrices of HBP are averaged within each micro-batch."""
    model, loss = cases.seeded(CHAINS["tanh"]), nn.CrossEntropyLoss()
    x, y = cases.randn(6, 4, seed=1), target(loss, 6)
    seen = curvature(model, loss, [(x, y)], curv_type="hessian", approx="diag")
    optimizer = SecondOrderOptimizer(model, loss_fn=loss, curv_type="hessian", approx="diag")
    for part in (slice(0, 3), slice(3, 6)):
        (loss(model(x[part]), y[part]) / 2).backward()
    for block in optimizer.engine.blocks:
        assert torch.allclose(block.pending.tensors["diag"], seen.blocks[block.name].tensors["diag"], rtol=1e-10)


REAL = ("resnet_bn", "resnet_gn", "depthwise_cnn", "autoencoder", "graph", "gpt")


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("id", REAL)
def test_training_complete_models_with_the_diagonal(id, residual):
    case = next(case for case in models.MODELS if case.id == id)
    model, x, y = case.make_model(), case.make_inputs(), case.make_target()
    optimizer = SecondOrderOptimizer(
        model, loss_fn=case.loss, curv_type="hessian", approx="diag", residual=residual, lr=0.05, damping=0.1
    )
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = case.loss(model(*x) if isinstance(x, tuple) else model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_training_with_hessian_backpropagation():
    model, loss = cases.model_case("cnn").make_model(), nn.CrossEntropyLoss()
    x, y = cases.randn(6, 1, 4, 6, seed=1), target(loss, 6)
    for residual in RESIDUALS:
        optimizer = SecondOrderOptimizer(model, curv_type="hessian", approx="kfac", residual=residual, lr=0.1)
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            optimizer.step()
            losses.append(value.item())
        optimizer.remove()
        assert losses[-1] < losses[0]


def test_what_has_no_rule_is_named():
    model = nn.Sequential(nn.Linear(4, 4), Attends(), nn.Linear(4, 3)).double()
    optimizer = SecondOrderOptimizer(model, curv_type="hessian", approx="diag")
    with pytest.raises(NotImplementedError, match="cumprod"):
        nn.functional.cross_entropy(model(cases.randn(2, 4)), torch.tensor([0, 1])).backward()
    optimizer.remove()
    wide = cases.seeded(lambda: nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)))
    optimizer = SecondOrderOptimizer(wide, curv_type="hessian", approx="kfac", max_hessian_dim=8)
    with pytest.raises(ValueError, match=r"9.*max_hessian_dim|max_hessian_dim.*9"):
        nn.functional.cross_entropy(wide(cases.randn(2, 4)), torch.tensor([0, 1])).backward()


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.cumprod(self.query(x) * self.key(x), -1)


def test_a_refusal_names_the_operation_and_the_module():
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"inner": Attends()})["inner"], nn.Linear(4, 3)).double()
    data = [(cases.randn(2, 4), torch.tensor([0, 1]))]
    with pytest.raises(NotImplementedError, match=r"through cumprod \(operation .* in module '1' \(Attends\)\): there"):
        curvature(model, nn.CrossEntropyLoss(), data, curv_type="hessian", approx="diag")


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.Tanh()])
def test_activations_inside_a_checkpoint(activation):
    class Checkpointed(nn.Module):
        def __init__(self, active):
            super().__init__()
            self.first, self.last, self.active = nn.Linear(4, 5), nn.Linear(5, 3), active

        def inner(self, x):
            return activation(self.first(x))

        def forward(self, x):
            return self.last(checkpoint(self.inner, x, use_reentrant=False) if self.active else self.inner(x))

    found = []
    for active in (False, True):
        model = cases.seeded(lambda active=active: Checkpointed(active))
        optimizer = SecondOrderOptimizer(model, curv_type="hessian", approx="diag", lr=0.0, momentum=0.0)
        nn.functional.cross_entropy(model(cases.randn(6, 4)), torch.arange(6) % 3).backward()
        optimizer.step()
        found.append(torch.cat([block.tensors["diag"].flatten() for block in optimizer.engine.blocks]))
    assert torch.allclose(*found, rtol=1e-12)


@pytest.mark.parametrize("approx", ["diag", "kfac"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_carried_back_in_single(dtype, approx):
    """p (1 - p) / N times the squares of small weights underflows in half precision."""
    found = []
    for used in (torch.float32, dtype):
        model = cases.seeded(lambda: nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(32, 32), nn.LeakyReLU()))))
        model = model.to(dtype).to(used)
        x = cases.randn(4096, 32).to(dtype).to(used)
        optimizer = SecondOrderOptimizer(
            model, curv_type="hessian", approx=approx, residual="zero", lr=0.0, momentum=0.0
        )
        nn.functional.cross_entropy(model(x), torch.arange(4096) % 32).backward()
        optimizer.step()
        key = "diag" if approx == "diag" else "B"
        found.append([block.tensors[key] for block in optimizer.engine.blocks])
    for single, low in zip(*found, strict=True):
        assert low.dtype == torch.float32 and (single - low).norm() < 0.03 * single.norm()
