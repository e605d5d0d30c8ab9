"""Input curvature (ISAAC, FOOF): A = mean a a^T against slow obvious code in float64."""

import copy

import cases
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from torchcurv import Preconditioner, SecondOrderOptimizer, curvature
from torchcurv.optim import CGNewton

CE = nn.CrossEntropyLoss()
FORMS = {
    "inverse": {"ema_decay": 0.5},
    "eigenvectors": {"damping_type": "exact"},
    "rows": {"ema_decay": 0.0},
}
FAMILIES = [c for c in cases.LAYERS + cases.NEW_LAYERS if not c.id.startswith(("batchnorm", "groupnorm"))]


def close(x, truth, tol=1e-10):
    assert x.shape == truth.shape
    assert (x - truth).abs().max() <= tol * (1e-3 + truth.abs().max())


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors]).detach().clone()


def net(case, n=4):
    x = case.input_for(n, seed=2)
    return cases.net_around(case.make_layer(), case.input_shape, x=x), x, torch.arange(n) % cases.CLASSES


def call(model, x):
    return model(*x) if isinstance(x, tuple) else model(x)


def input_covariance(module, x, n, sharing="expand"):
    """A [g, d, d], with zeros for the bias; of a vocabulary the diagonal is kept, as in K-FAC."""
    x = tuple(t if t is None else t.detach() for t in x) if isinstance(x, tuple) else x.detach()
    a = oracles.layer_inputs(module, x, n)
    if sharing == "reduce":
        a = a.mean(1, keepdim=True)
    A = torch.einsum("nrgi,nrgj->gij", a, a) / (a.shape[0] * a.shape[1])
    if getattr(module, "bias", None) is not None:
        A[:, -1] = A[:, :, -1] = 0
    return A * torch.eye(A.shape[-1], dtype=A.dtype) if isinstance(module, nn.Embedding | nn.EmbeddingBag) else A


def dense(module, A):
    """I ⊗ A of each group, in the order of the parameters."""
    o = oracles.to_goi(module, module.weight, getattr(module, "bias", None)).shape[1]
    blocks = [torch.kron(torch.eye(o, dtype=A.dtype), part.contiguous()) for part in A]
    return oracles.to_param_order(torch.block_diag(*blocks), module)


# ------------------------------------------------------------------------------------------ curvature


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", FAMILIES, ids=cases.ids(FAMILIES))
def test_the_block_is_the_identity_times_the_inputs_second_moment(case, sharing):
    model, x, y = net(case)
    module = model.get_submodule("layer")
    got = curvature(model, CE, [(x, y)], curv_type="input", params=list(module.parameters()), sharing=sharing)
    truth = dense(module, input_covariance(module, x, 4, sharing))
    close(got.to_dense(), truth)
    v, eye = cases.randn(len(truth), seed=3), torch.eye(len(truth), dtype=torch.float64)
    close(got.solve(v, 0.3), torch.linalg.solve(truth + 0.3 * eye, v))
    close(got.diag(), truth.diag())
    close(got.trace(), truth.trace())
    close(got.logdet(0.3), torch.logdet(truth + 0.3 * eye))
    close(got.eigvalsh(), torch.linalg.eigvalsh(truth), 1e-9)


def test_it_does_not_depend_on_the_loss_and_is_a_mean_over_batches():
    model, x, y = net(cases.LINEAR_LAYERS[0], 6)
    whole = curvature(model, CE, [(x, y)], curv_type="input").to_dense()
    for loss in (nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(label_smoothing=0.3)):
        parts = [(x[:2], y[:2]), (x[2:], y[2:])]
        close(curvature(model, loss, parts, curv_type="input").to_dense(), whole)


def test_ignored_terms_leave_it():
    layer = nn.Linear(3, cases.CLASSES).double()
    x, y = cases.randn(2, 4, 3), torch.tensor([[0, 1, -100, 2], [1, -100, -100, 0]])
    model = nn.Sequential(layer, cases.ClassFirst())
    got = curvature(model, CE, [(x, y)], curv_type="input", params=[layer.weight]).to_dense()
    kept = x[y != -100]
    close(got, torch.kron(torch.eye(cases.CLASSES).double(), kept.T @ kept / len(kept)))


def test_a_layer_that_the_loss_does_not_reach_does_not_count():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            self.other(x)
            return self.one(self.one(x))

    model, x, y = cases.seeded(Two), cases.randn(4, 3), torch.arange(4) % 3
    got = curvature(model, CE, [(x, y)], curv_type="input", params=[model.one.weight])
    rows = torch.cat([x, model.one(x)]).detach()
    close(got.to_dense(), torch.kron(torch.eye(3).double(), rows.T @ rows / 8))
    with pytest.raises(ValueError, match="does not depend on other"):
        curvature(model, CE, [(x, y)], curv_type="input")


# -------------------------------------------------------------------------------------------- direction


def direction(model, x, y, damping=0.2, sizes=(0,), **options):
    """.grad after a Preconditioner, and before it; the batch comes in parts of these sizes."""
    precond = Preconditioner(model, loss_fn=CE, curv_type="input", damping=damping, **options)
    parts = [(x, y)] if len(sizes) == 1 else zip(x.split(sizes), y.split(sizes), strict=True)
    for inputs, target in parts:
        (CE(call(model, inputs), target) * len(target) / len(y)).backward()
    before = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    precond.step()
    return {p: p.grad for p in before}, before


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", FAMILIES, ids=cases.ids(FAMILIES))
def test_the_direction_is_damping_times_the_solution_and_a_bias_is_left_alone(case, form):
    model, x, y = net(case)
    module, params = model.get_submodule("layer"), list(model.get_submodule("layer").parameters())
    after, before = direction(model, x, y, params=params, **FORMS[form])
    A = input_covariance(module, x, 4)
    damped = dense(module, A) / 0.2 + torch.eye(sum(p.numel() for p in params), dtype=torch.float64)
    close(flat(after[p] for p in params), torch.linalg.solve(damped, flat(before[p] for p in params)))
    if getattr(module, "bias", None) is not None:
        torch.testing.assert_close(after[module.bias], before[module.bias], rtol=1e-14, atol=0)
    for p in set(before) - set(params):
        assert torch.equal(after[p], before[p])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 7), i=st.integers(1, 6), o=st.integers(1, 5), bias=st.booleans(),
    damping=st.sampled_from([1e-3, 0.5, 30.0]), split=st.booleans(),
)  # fmt: skip
def test_both_forms_agree_whether_rows_or_inputs_are_more(n, i, o, bias, damping, split):
    model = cases.seeded(lambda: nn.Linear(i, o, bias=bias))
    x, y = cases.randn(n, i, seed=n), torch.arange(n) % o
    sizes = (1, n - 1) if split and n > 1 else (n,)
    inverse = torch.linalg.inv(x.T @ x / n + damping * torch.eye(i, dtype=x.dtype))
    for form in FORMS.values():
        twin = copy.deepcopy(model)
        after, before = direction(twin, x, y, damping, sizes, **form)
        truth = damping * before[twin.weight] @ inverse
        close(after[twin.weight], truth)


@settings(max_examples=30, deadline=None)
@given(setting=cases.conv_settings(), form=st.sampled_from(sorted(FORMS)))
def test_convolutions_against_unfold(setting, form):
    x, model = setting.make_input(), cases.net_around(setting.make_layer(), setting.input_shape)
    module = model.get_submodule("layer")
    y = torch.arange(len(x)) % cases.CLASSES
    after, before = direction(model, x, y, params=list(module.parameters()), **FORMS[form])
    A = input_covariance(module, x, len(x))
    d = A.shape[-1] - (module.bias is not None)
    G = before[module.weight].reshape(module.groups, -1, d)
    truth = 0.2 * G @ torch.linalg.inv(A[:, :d, :d] + 0.2 * torch.eye(d, dtype=A.dtype))
    close(after[module.weight], truth.reshape(module.weight.shape))


def test_a_convolution_against_torchs_unfold():
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=1).double()
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(27, 3).double())
    x, y = cases.randn(4, 2, 5, 5), torch.arange(4) % 3
    after, before = direction(model, x, y, params=layer.parameters())
    a = F.unfold(x, 3, padding=1, stride=2).mT.reshape(-1, 18)
    inverse = torch.linalg.inv(a.T @ a / len(a) + 0.2 * torch.eye(18, dtype=a.dtype))
    close(after[layer.weight].reshape(3, 18), 0.2 * before[layer.weight].reshape(3, 18) @ inverse)


@pytest.mark.parametrize("form", FORMS)
def test_it_tends_to_the_plain_gradient(form):
    model, x, y = net(cases.LINEAR_LAYERS[0])
    gaps = []
    for damping in (1e2, 1e4, 1e12):
        model.zero_grad()
        after, before = direction(model, x, y, damping, **FORMS[form])
        gaps.append((flat(after.values()) - flat(before.values())).norm())
    assert gaps[1] < 0.02 * gaps[0] and gaps[2] < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_a_frozen_weight_leaves_the_bias_alone(form):
    layer = nn.Linear(3, 3).double()
    layer.weight.requires_grad_(False)
    after, before = direction(layer, cases.randn(4, 3), torch.arange(4) % 3, **FORMS[form])
    torch.testing.assert_close(after[layer.bias], before[layer.bias], rtol=1e-14, atol=0)


# ---------------------------------------------------------------------------------------------- steps

BATCHES = [(cases.randn(5, 4, seed=t), torch.arange(5) % 3) for t in range(8)]


def make_model():
    return cases.seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def train(model, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
    return flat(model.parameters())


def covariance_of(layer, x):
    rows = x if layer == 0 else torch.tanh(x)
    return rows.T @ rows


@pytest.mark.parametrize("ema_decay", [0.0, 0.7, 1.0])
def test_steps_are_those_of_the_formula(ema_decay):
    model, twin, lr, damping = make_model(), make_model(), 0.3, 0.2
    optimizer = SecondOrderOptimizer(
        model, curv_type="input", lr=lr, damping=damping, momentum=0.6, ema_decay=ema_decay, l2=0.1, kl_clip=1e-9
    )
    sums, buffers = [0, 0], dict.fromkeys(twin.parameters(), 0)
    count = 0
    for x, y in BATCHES:
        train(model, optimizer, [(x, y)])
        twin.zero_grad()
        hidden = twin[1](twin[0](x))
        CE(twin[2](hidden), y).backward()
        count = ema_decay * count + len(x)
        inputs = (x, hidden.detach())
        sums = [ema_decay * S + a.T @ a for S, a in zip(sums, inputs, strict=True)]
        with torch.no_grad():
            for layer, S in zip((twin[0], twin[2]), sums, strict=True):
                eye = torch.eye(len(S), dtype=S.dtype)
                for p in layer.parameters():
                    v = p.grad + 0.1 * p
                    if p is layer.weight:
                        v = damping * v @ torch.linalg.inv(S / count + damping * eye)
                    buffers[p] = 0.6 * buffers[p] + v
            for p, v in buffers.items():
                p -= lr * v
    torch.testing.assert_close(flat(model.parameters()), flat(twin.parameters()), rtol=1e-9, atol=1e-11)


def test_a_large_damping_is_torchs_sgd():
    model, twin = make_model(), make_model()
    ours = SecondOrderOptimizer(model, curv_type="input", lr=2.0, damping=1e14, momentum=0.5)
    theirs = torch.optim.SGD(twin.parameters(), lr=2.0, momentum=0.5)
    torch.testing.assert_close(train(model, ours, BATCHES), train(twin, theirs, BATCHES), rtol=1e-9, atol=1e-11)


def test_the_clip_neither_sees_this_group_nor_reaches_it():
    def moved(**first):
        model = make_model()
        groups = [{"params": model[0].parameters(), **first}, {"params": model[2].parameters()}]
        optimizer = SecondOrderOptimizer(model, groups, samples=None, lr=1.0, momentum=0.0, kl_clip=1e-4)
        bias = model[0].bias.detach().clone()
        before = flat(model[2].parameters())
        train(model, optimizer, BATCHES[:1])
        torch.testing.assert_close(bias - model[0].bias, model[0].bias.grad, rtol=1e-9, atol=1e-12)
        return flat(model[2].parameters()) - before

    torch.testing.assert_close(moved(curv_type="input"), moved(approx=None), rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_average(form):
    answers = []
    for sizes in [(5,), (2, 3), (1, 1, 3)]:
        after, _ = direction(make_model(), *BATCHES[0], sizes=sizes, **FORMS[form])
        answers.append(flat(after.values()))
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=1e-11, atol=1e-12)


def test_what_lies_between_refreshes_is_kept():
    """The factor of step 0 serves until step 3, the damping that it holds included."""
    model = make_model()
    optimizer = SecondOrderOptimizer(
        model, curv_type="input", lr=0.1, damping=0.2, momentum=0.0, update_every=3, refactor_every=3
    )
    A = covariance_of(0, BATCHES[0][0]) / 5
    for t, (x, y) in enumerate(BATCHES[:3]):
        optimizer.zero_grad()
        CE(model(x), y).backward()
        g, before = model[0].weight.grad.clone(), flat(model.parameters())
        optimizer.param_groups[0]["damping"] = 0.2 * (1 + 0.02 * t)
        optimizer.step()
        truth = 0.2 * g @ torch.linalg.inv(A + 0.2 * torch.eye(4, dtype=A.dtype))
        moved = (before - flat(model.parameters())) / 0.1
        close(moved[: g.numel()], truth.flatten(), 1e-9)
        close(moved[g.numel() : g.numel() + 5], model[0].bias.grad, 1e-9)


@pytest.mark.parametrize(
    "options", [{"update_every": 3, "refactor_every": 2}, {"ema_decay": 0.0}, FORMS["eigenvectors"]]
)
@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_is_the_uninterrupted_one(options, stop, tmp_path):
    def build():
        model = make_model()
        return model, SecondOrderOptimizer(model, curv_type="input", lr=0.2, **options)

    truth = train(*build(), BATCHES)
    model, optimizer = build()
    train(model, optimizer, BATCHES[:stop])
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "run.pt")
    resumed, fresh = build()
    weights, state = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed.load_state_dict(weights)
    fresh.load_state_dict(state)
    assert torch.equal(train(resumed, fresh, BATCHES[stop:]), truth)
    copied_model, copied = copy.deepcopy((model, optimizer))
    assert torch.equal(train(copied_model, copied, BATCHES[stop:]), truth)


def test_a_state_with_a_running_average_is_loaded_into_an_optimizer_built_without_one():
    model, other = make_model(), make_model()
    saved = SecondOrderOptimizer(model, curv_type="input", ema_decay=0.9)
    train(model, saved, BATCHES[:3])
    fresh = SecondOrderOptimizer(other, curv_type="input", ema_decay=0.0)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(train(other, fresh, BATCHES[3:]), train(model, saved, BATCHES[3:]))


def test_rows_that_were_not_saved_are_measured_at_once():
    """Also where the next measurement would have been later, the interval having new_weight in the run."""
    model, fresh = make_model(), make_model()
    saved = SecondOrderOptimizer(model, curv_type="input", ema_decay=0.0)
    saved.param_groups[0].update(update_every=3, refactor_every=3, damping=0.2, momentum=0.0, lr=1.0)
    train(model, saved, BATCHES[:2])
    fresh.load_state_dict(model.state_dict())
    state = saved.state_dict()
    optimizer = SecondOrderOptimizer(fresh, curv_type="input", ema_decay=0.0)
    optimizer.load_state_dict(state)
    before, x = fresh[0].weight.detach().clone(), BATCHES[2][0]
    train(fresh, optimizer, BATCHES[2:3])
    inverse = torch.linalg.inv(x.T @ x / 5 + 0.2 * torch.eye(4, dtype=x.dtype))
    close(before - fresh[0].weight.detach(), 0.2 * fresh[0].weight.grad @ inverse, 1e-9)


@pytest.mark.parametrize("blocks", [{"factor_blocks": 2}, {"max_factor_dim": 3}])
@pytest.mark.parametrize("form", FORMS)
def test_a_may_be_kept_in_blocks(blocks, form):
    model, (x, y) = nn.Linear(4, 3).double(), BATCHES[0]
    after, before = direction(model, x, y, **blocks, **FORMS[form])
    # the bias counts as the last of five inputs: blocks of three and two
    place = torch.arange(4) // 3 if "factor_blocks" in blocks else torch.arange(4)
    A = x.T @ x / 5 * (place[:, None] == place)
    close(after[model.weight], 0.2 * before[model.weight] @ torch.linalg.inv(A + 0.2 * torch.eye(4, dtype=A.dtype)))


def test_any_loss_will_do():
    model, (x, y) = make_model(), BATCHES[0]
    precond = Preconditioner(model, loss_fn="mse", curv_type="input", damping=0.2, ema_decay=0.0)
    F.multi_margin_loss(model(x), y).backward()
    g = model[0].weight.grad.clone()
    precond.step()
    A = x.T @ x / 5
    close(model[0].weight.grad, 0.2 * g @ torch.linalg.inv(A + 0.2 * torch.eye(4, dtype=A.dtype)))


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_no_signal_is_sent_after_the_first_pass(ema_decay, monkeypatch):
    """The first pass compares the gradient with that of the recorded calls; later ones differentiate nothing."""
    model = make_model()
    optimizer = SecondOrderOptimizer(model, curv_type="input", ema_decay=ema_decay)
    train(model, optimizer, BATCHES[:1])
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: pytest.fail("a pass was sent"))
    train(model, optimizer, BATCHES[1:])


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_rows_are_those_of_the_forward_pass(ema_decay):
    """An edit of the input after the backward changes nothing."""
    answers = []
    for edit in (False, True):
        model, (x, y) = nn.Linear(4, 3, bias=False).double(), BATCHES[0]
        model.load_state_dict({"weight": cases.randn(3, 4)})
        precond = Preconditioner(model, loss_fn=CE, curv_type="input", ema_decay=ema_decay)
        x = x[:3].clone()
        CE(model(x), y[:3]).backward()
        if edit:
            x.zero_()
        precond.step()
        answers.append(model.weight.grad)
    assert torch.equal(*answers)


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_not_finite_are_left_out(form):
    """The average stays what it was; rows of one step count as none, and the direction is the gradient."""
    model, (x, y), (more, _) = nn.Linear(4, 3).double(), BATCHES[0], BATCHES[1]
    precond = Preconditioner(model, curv_type="input", damping=0.2, **FORMS[form])
    CE(model(x[:3]), y[:3]).backward()
    precond.step()
    bad = more[:3].clone()
    bad[0, 0] = torch.inf
    precond.zero_grad()
    CE(model(bad).nan_to_num(0), y[:3]).backward()
    with pytest.warns(UserWarning, match="1 curvature measurements were not finite"):
        g = cases.randn(3, 4, seed=9)
        model.weight.grad.copy_(g)
        precond.step()
    A = 0 if form == "rows" else x[:3].T @ x[:3] / 3
    close(model.weight.grad, 0.2 * g @ torch.linalg.inv(A + 0.2 * torch.eye(4, dtype=g.dtype)))


class States(nn.GRU):
    """A recurrent network that returns its states alone."""

    def forward(self, x):
        return super().forward(x)[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), (3, 4)),
        (lambda: States(3, 4, 2, batch_first=True, bidirectional=True), (3, 3)),
    ],
    ids=["encoder", "gru"],
)
def test_layers_inside_modules(make, shape, form):
    model = cases.net_around(cases.seeded(make), shape)
    x, y = cases.randn(4, *shape), torch.arange(4) % cases.CLASSES
    after, before = direction(model, x, y, **FORMS[form])
    for name, p in model.named_parameters():
        same = torch.allclose(after[p], before[p], rtol=1e-12, atol=1e-15)
        assert same == ("bias" in name), name


def test_the_layers_inside_attention_have_the_inputs_of_their_own():
    attention = cases.seeded(lambda: nn.MultiheadAttention(4, 2, batch_first=True))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x)[0].mean(1)

    x, y = cases.randn(3, 5, 4), torch.arange(3)
    after, before = direction(Model(), x, y)
    A = x.flatten(0, 1).T @ x.flatten(0, 1) / 15
    inverse = torch.linalg.inv(A + 0.2 * torch.eye(4, dtype=A.dtype))
    close(after[attention.in_proj_weight], 0.2 * before[attention.in_proj_weight] @ inverse)


def test_few_rows_are_kept_in_the_place_of_a_and_many_are_not():
    for n, kept in [(3, "InputRows"), (5, "KroneckerInverse")]:
        model = nn.Linear(4, 3).double()
        precond = Preconditioner(model, curv_type="input", ema_decay=0.0)
        CE(model(cases.randn(n, 4)), torch.arange(n) % 3).backward()
        precond.step()
        assert type(precond.engine.blocks[0].factor).__name__ == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("rows", ["with a mean", "alike", "of many sizes"])
def test_few_rows_are_as_accurate_as_the_matrix(rows, top, dtype):
    """Inputs with a mean, samples that come twice: a step along λ (A + λ I)^-1 of the gradient, against a dense solve
    in the same precision. The gradient lies in the span of the rows, so nearly all of it cancels."""
    x = cases.randn(8, 20)
    x = {
        "with a mean": x + 10,
        "alike": x[torch.arange(8) % 5],
        "of many sizes": x * torch.logspace(0, -3, 8)[:, None],
    }[rows]
    x = x.float().double()
    A = x.T @ x / len(x)
    lam = torch.linalg.eigvalsh(A)[-1].item() / top
    damped = A + lam * torch.eye(20, dtype=A.dtype)
    model = cases.seeded(lambda: nn.Linear(20, 3)).to(dtype)
    precond = Preconditioner(model, curv_type="input", ema_decay=0.0, damping=lam)
    CE(model(x.to(dtype)), torch.arange(8) % 3).backward()
    g = model.weight.grad.clone()
    precond.step()
    assert type(precond.engine.blocks[0].factor).__name__ == "InputRows"
    truth = lam * torch.linalg.solve(damped, g.double().T).T
    matrix = lam * torch.cholesky_solve(g.T, torch.linalg.cholesky(damped.to(dtype))).T

    def error(step):
        return ((step.double() - truth).norm() / truth.norm()).item()

    assert error(model.weight.grad) <= 10 * error(matrix) + torch.finfo(dtype).eps * (10 + top)


def test_batches_of_other_sizes_where_nothing_is_read_from_the_device(accelerator):
    """On an accelerator the choice between the new and the last factor is made without a host sync."""
    model = nn.Linear(4, 3).double()
    precond = Preconditioner(model, loss_fn=CE, curv_type="input", damping=0.2, ema_decay=0.0)
    for n in (3, 2, 5, 3, 1):
        x = cases.randn(n, 4, seed=n)
        precond.zero_grad()
        CE(model(x), torch.arange(n) % 3).backward()
        g = model.weight.grad.clone()
        precond.step()
        close(model.weight.grad, 0.2 * g @ torch.linalg.inv(x.T @ x / n + 0.2 * torch.eye(4, dtype=x.dtype)))


def test_newton_by_conjugate_gradients():
    for n in (3, 5):
        model, x, y, alpha = nn.Linear(4, 3).double(), cases.randn(n, 4), torch.arange(n) % 3, 0.2
        optimizer = CGNewton(
            model,
            loss_fn=CE,
            curv_type="input",
            approx="kfac",
            lr=1.0,
            alpha=alpha,
            cg_tol=1e-13,
            cg_maxiter=500,
            ema_decay=0.0,
        )
        before = model.weight.detach().clone()
        CE(model(x), y).backward()
        optimizer.step()
        damped = (1 - alpha) * x.T @ x / n + alpha * torch.eye(4, dtype=x.dtype)
        close(before - model.weight.detach(), model.weight.grad @ torch.linalg.inv(damped), 1e-9)


def test_summary():
    model = make_model()
    matrix = SecondOrderOptimizer(model, curv_type="input")
    assert "(I ⊗ 5²)" in matrix.summary() and "  input  " in matrix.summary()
    assert "(I ⊗ rows of 5)" in SecondOrderOptimizer(model, curv_type="input", ema_decay=0.0).summary()


def test_it_trains():
    model = make_model()
    x, y = BATCHES[0]
    before = CE(model(x), y).item()
    train(model, SecondOrderOptimizer(model, curv_type="input", lr=0.5, damping=0.5, momentum=0.0), [(x, y)] * 20)
    assert CE(model(x), y).item() < 0.5 * before


# ------------------------------------------------------------------------------------------- any loss


LOSSES = {
    "huber": lambda f, y: F.huber_loss(f, F.one_hot(y, f.shape[1]).to(f.dtype)),
    "focal": lambda f, y: (-((1 - f.softmax(-1)) ** 2) * f.log_softmax(-1)).gather(1, y[:, None]).mean(),
    "negative": lambda f, y: -F.cross_entropy(f, y),
    "contrastive": lambda f, y: F.cross_entropy(f @ f.T, torch.arange(len(f))),
    "number": lambda f, y: f.square().sum(),
}


@pytest.mark.parametrize("loss_fn", ["cross_entropy", None, CE])
@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_is_asked_for(name, loss_fn):
    model, (x, y) = make_model(), BATCHES[0]
    known, opt = (SecondOrderOptimizer(make_model(), loss_fn=CE, curv_type="input", lr=0.0) for _ in range(2))
    opt = SecondOrderOptimizer(model, loss_fn=loss_fn, curv_type="input", lr=0.0)
    CE(known.model(x), y).backward()
    LOSSES[name](model(x), y).backward()
    known.step()
    opt.step()
    for block, expected in zip(opt.engine.blocks, known.engine.blocks, strict=True):
        A, B = (one.tensors["A"] / one.tensors["count"] for one in (block, expected))
        close(A, B)


def test_several_outputs_need_no_output_fn():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 3)

        def forward(self, x):
            h = self.body(x).tanh()
            return {"a": self.a(h), "b": self.b(h)}

    model, x = Two().double(), BATCHES[0][0]
    opt = SecondOrderOptimizer(model, curv_type="input", lr=0.0)
    out = model(x)
    (out["a"].square().mean() + out["b"].abs().mean()).backward()
    opt.step()
    for block, inputs in zip(opt.engine.blocks, (x, *[model.body(x).tanh()] * 2), strict=True):
        A, d = block.tensors["A"][0] / block.tensors["count"], inputs.shape[1]
        close(A[:d, :d], inputs.T @ inputs / len(x))


def test_beside_a_curvature_of_the_loss_the_loss_is_asked_for_that_one():
    model, (x, y) = make_model(), BATCHES[0]
    first, rest = list(model[0].parameters()), [p for layer in model[1:] for p in layer.parameters()]
    groups = [{"params": first, "curv_type": "input", "damping": 1.0}, {"params": rest}]
    opt = SecondOrderOptimizer(model, groups, loss_fn=CE, lr=0.0)
    f = model(x)
    (CE(f, y) + f.square().mean()).backward()
    with pytest.raises(RuntimeError, match="is not what the watched loss"):
        opt.step()


@pytest.mark.parametrize("seed", [5, 6])
def test_its_defaults_train(seed):
    x = cases.randn(200, 4, seed=seed)
    y = (x @ cases.randn(4, 3, seed=seed + 1)).argmax(1)
    model = cases.seeded(lambda: nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3)), seed)
    optimizer = SecondOrderOptimizer(model, curv_type="input")
    assert optimizer.param_groups[0]["damping"] == 1.0 and optimizer.param_groups[0]["lr"] == 0.3
    train(model, optimizer, [(x, y)] * 60)
    assert CE(model(x), y).item() < 0.3


# --------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("approx", ["full", "block", "unit", "ekfac", "diag"])
def test_other_approximations_are_refused(approx):
    with pytest.raises(ValueError, match=rf'curv_type="input" with approx=\'{approx}\'.*write approx="kfac"'):
        SecondOrderOptimizer(make_model(), curv_type="input", approx=approx)


def test_a_damping_of_zero_is_refused_whatever_l2_is():
    with pytest.raises(ValueError, match="damping=0; pass a number > 0"):
        SecondOrderOptimizer(make_model(), curv_type="input", damping=0.0, l2=0.1)


def test_a_weight_that_is_also_used_transposed_is_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
            self.head.weight = self.embedding.weight

        def forward(self, index):
            return self.head(self.embedding(index))

    with pytest.raises(ValueError, match=r"also used transposed.*approx=None"):
        SecondOrderOptimizer(Tied(), curv_type="input")


def test_memory_that_is_asked_for_later_is_refused():
    model = make_model()
    optimizer = SecondOrderOptimizer(model, curv_type="input", ema_decay=0.0)
    optimizer.param_groups[0]["ema_decay"] = 0.5
    with pytest.raises(ValueError, match=r"built with ema_decay=0.*build the optimizer with ema_decay > 0"):
        train(model, optimizer, BATCHES[:1])
