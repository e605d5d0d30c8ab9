"""Losses that are not known: any module or function of (output, target), against the dense truth by autograd."""

import cases
import pytest
import torch
from measured import close, measured, optimizer
from torch import nn
from torch.nn import functional as F

from torchcurv import SecondOrderOptimizer, curvature
from torchcurv.curv.losses.autograd import WholeLoss

N, V = 6, 3
X = cases.randn(N, 4)
LABELS, REAL = torch.arange(N) % V, cases.randn(N, V, seed=3)
P = REAL.softmax(-1)


class Focal(nn.CrossEntropyLoss):
    def forward(self, f, y):
        p = f.softmax(-1).gather(-1, y[:, None]).squeeze(-1)
        return (-((1 - p) ** 2) * p.log()).mean()


class GaussianHeads(nn.Module):
    """Mean and log variance from one output."""

    def forward(self, f, y):
        mean, log_variance = f[:, :1], f[:, 1:2]
        return (0.5 * log_variance + 0.5 * (mean - y[:, :1]).square() * (-log_variance).exp()).mean()


class Sided(nn.Module):
    """It looks at its data, and cannot be vectorised."""

    def forward(self, f, y):
        total = f.new_zeros(())
        for one, target in zip(f, y, strict=True):
            total = total + (
                2 * (one - target).square().sum() if float(one.detach().sum()) > 0 else (one - target).pow(4).sum()
            )
        return total / len(f)


def distilled(f, y):
    return F.kl_div((f / 2).log_softmax(-1), y, reduction="batchmean") * 4


def preference(f, y):
    """As DPO's: of the difference of two outputs."""
    return -F.logsigmoid(0.5 * (f[:, 0] - f[:, 1]) * y[:, 0]).mean()


UNKNOWN = {
    "huber": (nn.HuberLoss(delta=0.5), REAL),
    "smooth l1": (nn.SmoothL1Loss(beta=0.7), REAL),
    "smooth l1 sum": (nn.SmoothL1Loss(reduction="sum"), REAL),
    "poisson": (nn.PoissonNLLLoss(), P * 3),
    "poisson rates": (nn.PoissonNLLLoss(log_input=False), P * 3),
    "distillation": (distilled, P),
    "focal": (Focal(), LABELS),
    "gaussian heads": (GaussianHeads(), REAL),
    "soft margin": (nn.SoftMarginLoss(), REAL.sign()),
    "multi label soft margin": (nn.MultiLabelSoftMarginLoss(), (REAL > 0).double()),
    "preference": (preference, REAL.sign()),
    "data dependent": (Sided(), REAL),
    "function": (F.huber_loss, REAL),
    "lambda": (lambda f, y: (f - y).pow(4).sum(), REAL),
}


class Positive(nn.Module):
    """Rates, which are positive."""

    def forward(self, x):
        return F.softplus(x) + 0.1


def net(name):
    end = Positive() if name == "poisson rates" else nn.Identity()
    return cases.seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, V), end))


def truth(model, loss, y, kind):
    """J^T H J with the positive part of the Hessian of each sample's terms; or the sum of the samples' g g^T."""
    f, params = model(X), list(model.parameters())
    J = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(one, params, retain_graph=True)]) for one in f.flatten()
    ]).reshape(N, V, -1)  # fmt: skip
    whole, total = loss(f.detach(), y), 0.0
    each = [loss(f[k : k + 1].detach(), y[k : k + 1]) for k in range(N)]
    R = 1.0 if torch.isclose(whole, sum(each)) else 1 / N
    for k in range(N):

        def one(z, k=k):
            return loss(z[None], y[k : k + 1])

        if kind == "empirical_fisher":
            g = torch.autograd.functional.jacobian(one, f[k].detach())
            H = torch.outer(g, g)
        else:
            values, Q = torch.linalg.eigh(torch.autograd.functional.hessian(one, f[k].detach()))
            H = Q @ values.clamp_min(0).diag() @ Q.T
        total = total + R * J[k].T @ H @ J[k]
    return total


@pytest.mark.parametrize("kind", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("name", UNKNOWN)
def test_the_curvature_of_an_unknown_loss_is_that_of_its_samples(name, factor, kind):
    loss, y = UNKNOWN[name]
    opt = optimizer(net(name), loss, curv_type=kind)
    (factor * opt.loss_fn(opt.model(X), y)).backward()
    close(measured(opt), factor * truth(opt.model, loss, y, kind), 1e-9)


@pytest.mark.parametrize("name", ["huber", "function", "focal"])
def test_an_unknown_loss_may_be_observed(name):
    loss, y = UNKNOWN[name]
    opt = optimizer(net(name), None)
    f = opt.model(X)
    opt.observe(f, y, loss, 0.5)
    (0.5 * loss(f, y)).backward()
    close(measured(opt), 0.5 * truth(opt.model, loss, y, "ggn"), 1e-9)


@pytest.mark.parametrize("name", ["huber", "smooth l1 sum", "lambda"])
def test_curvature_of_data_adds_up(name):
    loss, y = UNKNOWN[name]
    model = net(name)
    expected = truth(model, loss, y, "ggn")
    found = curvature(model, loss, [(X[:2], y[:2]), (X[2:], y[2:])], approx="full").to_dense()
    close(found, expected, 1e-9)


def test_samples_that_meet_are_refused_and_taken_together_where_that_is_said():
    def together(f, y):
        return (f - f.mean(0) - y).square().sum(-1).pow(1.5).sum().sqrt()

    opt = optimizer(net(""), together)
    with pytest.raises(ValueError, match=r"samples meet in the loss 'together'.*samples=.batch."):
        opt.loss_fn(opt.model(X), REAL).backward()
    opt.remove()
    opt = optimizer(net(""), None)
    f = opt.model(X)
    opt.observe(f, REAL, together, samples="batch")
    together(f, REAL).backward()
    H = torch.autograd.functional.hessian(lambda z: together(z.reshape(N, V), REAL), f.detach().flatten())
    values, Q = torch.linalg.eigh(H)
    params = list(opt.model.parameters())
    J = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(one, params, retain_graph=True)])
        for one in opt.model(X).flatten()
    ])  # fmt: skip
    close(measured(opt), J.T @ Q @ values.clamp_min(0).diag() @ Q.T @ J, 1e-8)


FLAT = {
    "absolute": (nn.L1Loss(), REAL, "has no second derivative"),
    "hinge": (lambda f, y: F.relu(1 - f * y).mean(), REAL.sign(), "has no second derivative"),
    "multi margin": (nn.MultiMarginLoss(), LABELS, "cannot be differentiated twice"),
    "multi margin squares": (nn.MultiMarginLoss(p=2, reduction="sum"), LABELS, "cannot be differentiated twice"),
    "multi label margin": (nn.MultiLabelMarginLoss(), torch.tensor([[1, -1, 0]] * N), "cannot be differentiated twice"),
}


@pytest.mark.parametrize("name", FLAT)
def test_a_loss_without_a_second_derivative_counts_by_its_gradients(name):
    loss, y, why = FLAT[name]
    opt = optimizer(net(""), loss)
    with pytest.warns(UserWarning, match=why):
        opt.loss_fn(opt.model(X), y).backward()
    expected = truth(opt.model, loss, y, "empirical_fisher")
    close(measured(opt), expected, 1e-9)
    opt.remove()
    opt = optimizer(net(""), loss, curv_type="empirical_fisher")
    opt.loss_fn(opt.model(X), y).backward()
    close(measured(opt), expected, 1e-9)


def test_labels_of_an_unknown_loss_cannot_be_drawn():
    opt = optimizer(net(""), nn.HuberLoss(), curv_type="fisher", samples=1)
    with pytest.raises(NotImplementedError, match='"empirical_fisher"'):
        opt.loss_fn(opt.model(X), REAL).backward()


def of_softmax(f, y):
    return (f.log_softmax(-1) * y).sum(-1).square().mean()


@pytest.mark.parametrize("outputs", [70, 100])
@pytest.mark.parametrize(
    ("loss", "tolerance"),
    [(nn.HuberLoss(delta=0.8), 1e-9), (nn.PoissonNLLLoss(reduction="sum"), 1e-9), (of_softmax, 2e-3)],
    ids=["huber", "poisson", "of softmax"],
)
def test_many_outputs_of_a_sample_are_taken_by_products(outputs, loss, tolerance):
    """Elementwise losses exactly, others to a 32nd of the root of the largest eigenvalue."""
    model = cases.seeded(lambda: nn.Linear(4, outputs, bias=False))
    y = cases.randn(N, outputs, seed=2).softmax(-1) * (3 if isinstance(loss, nn.Module) else 1)
    opt = optimizer(model, loss)
    f = model(X)
    opt.loss_fn(f, y).backward()
    H = torch.zeros(N, outputs, outputs, dtype=f.dtype)
    whole, each = loss(f.detach(), y), [loss(f[k : k + 1].detach(), y[k : k + 1]) for k in range(N)]
    R = 1.0 if torch.isclose(whole, sum(each)) else 1 / N
    for k in range(N):
        values, Q = torch.linalg.eigh(
            torch.autograd.functional.hessian(lambda z, k=k: loss(z[None], y[k : k + 1]), f[k].detach())
        )
        H[k] = R * Q @ values.clamp_min(0).diag() @ Q.T
    close(measured(opt), torch.einsum("noq,ni,nj->oiqj", H, X, X).reshape(4 * outputs, -1), tolerance)


def test_draws_of_many_outputs_have_the_curvature_as_their_mean():
    model = cases.seeded(lambda: nn.Linear(1, 80, bias=False))
    x, y = torch.ones(1, 1, dtype=torch.float64), cases.randn(1, 80, seed=2).softmax(-1)
    opt = optimizer(model, of_softmax, samples=2000)
    f = model(x)
    opt.loss_fn(f, y).backward()
    values, Q = torch.linalg.eigh(torch.autograd.functional.hessian(lambda z: of_softmax(z[None], y), f[0].detach()))
    H = Q @ values.clamp_min(0).diag() @ Q.T
    found = measured(opt)
    assert (found - H).norm() < 0.3 * H.norm()
    assert (found.trace() - H.trace()).abs() < 0.05 * H.trace()


def test_a_function_that_was_not_called_through_the_optimizer_is_named():
    model = net("")
    opt = SecondOrderOptimizer(model, loss_fn=F.huber_loss)
    F.huber_loss(model(X), REAL).backward()
    with pytest.raises(RuntimeError, match=r"call it as optimizer\.loss_fn\(output, target\)"):
        opt.step()


@pytest.mark.parametrize("loss", [nn.HuberLoss(), F.huber_loss])
def test_it_trains(loss):
    model = net("").float()
    opt = SecondOrderOptimizer(model, loss_fn=loss)
    first = None
    for _ in range(40):
        opt.zero_grad()
        value = opt.loss_fn(model(X.float()), REAL.float())
        value.backward()
        opt.step()
        first = first or value.item()
    assert value.item() < 0.7 * first


def test_weights_that_a_function_holds_count():
    """They fit no batch but this one, so that a sum and a mean cannot be told from each other."""
    weights = torch.linspace(0.2, 2, N, dtype=torch.float64)

    def weighted(f, y):
        return (weights * F.smooth_l1_loss(f, y, reduction="none", beta=0.7).mean(-1)).sum()

    opt = optimizer(net(""), weighted)
    opt.loss_fn(opt.model(X), REAL).backward()
    f = opt.model(X)
    H = torch.autograd.functional.hessian(lambda z: weighted(z.reshape(N, V), REAL), f.detach().flatten())
    J = jacobian(opt.model, f)
    close(measured(opt), J.T @ H @ J, 1e-9)
    opt.remove()
    opt = optimizer(net(""), weighted, curv_type="empirical_fisher")
    with pytest.raises(ValueError, match="a sum or a mean over samples cannot be seen"):
        opt.loss_fn(opt.model(X), REAL).backward()


def test_a_mean_over_what_a_mask_keeps():
    kept = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.float64)

    def masked(f, y):
        mask, y = y[:, :1], y[:, 1:]
        return (mask * F.huber_loss(f, y, reduction="none", delta=0.5)).sum() / mask.sum()

    y = torch.cat([kept[:, None], REAL], 1)
    opt = optimizer(net(""), masked)
    f = opt.model(X)
    opt.loss_fn(f, y).backward()
    H = torch.autograd.functional.hessian(lambda z: masked(z.reshape(N, V), y), f.detach().flatten())
    J = jacobian(opt.model, opt.model(X))
    close(measured(opt), J.T @ H @ J, 1e-9)


@pytest.mark.parametrize("own", [True, False])
def test_a_loss_that_is_not_reduced_counts_by_what_reaches_it(own):
    weights = torch.linspace(0.2, 2, N * V, dtype=torch.float64).reshape(N, V)
    loss = nn.HuberLoss(reduction="none") if own else lambda f, y: F.huber_loss(f, y, reduction="none")
    opt = optimizer(net(""), loss)
    f = opt.model(X)
    (weights * opt.loss_fn(f, REAL)).sum().backward()
    H = ((f - REAL).abs() < 1).double() * weights
    J = jacobian(opt.model, opt.model(X))
    close(measured(opt), J.T @ H.flatten().diag() @ J, 1e-9)


def test_a_negative_multiple_of_an_unknown_loss_is_refused():
    opt = optimizer(net(""), nn.HuberLoss())
    (-opt.loss_fn(opt.model(X), REAL)).backward()
    with pytest.raises(RuntimeError, match="multiplied by a negative number"):
        opt.step()


def jacobian(model, f):
    params = list(model.parameters())
    return torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(one, params, retain_graph=True)]) for one in f.flatten()
    ])  # fmt: skip


# ------------------------------------------------------------------------------ calls of other forms


class Heads(nn.Module):
    """Two outputs of one input."""

    def __init__(self, as_dict=False):
        super().__init__()
        self.body, self.mean, self.spread, self.as_dict = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 2), as_dict

    def forward(self, x):
        h = self.body(x).tanh()
        mean, spread = self.mean(h), F.softplus(self.spread(h)) + 0.1
        return {"mean": mean, "spread": spread} if self.as_dict else (mean, spread)


def dense_truth(model, outputs, loss, n):
    """J^T H J of L as a function of all outputs [n, ...], with the positive part of each sample's Hessian."""
    sizes = [f[0].numel() for f in outputs]
    z = torch.cat([f.reshape(n, -1) for f in outputs], 1)
    shapes = [f.shape[1:] for f in outputs]

    def of(flat):
        parts = flat.reshape(n, -1).split(sizes, 1)
        return loss(*(part.reshape(n, *shape) for part, shape in zip(parts, shapes, strict=True)))

    H = torch.autograd.functional.hessian(of, z.detach().flatten())
    c = sum(sizes)
    for k in range(n):
        own = slice(k * c, (k + 1) * c)
        values, Q = torch.linalg.eigh(H[own, own])
        H[own, own] = Q @ values.clamp_min(0).diag() @ Q.T
    J = jacobian(model, z)
    return J.T @ H @ J


Y2 = cases.randn(N, 2, seed=5)


@pytest.mark.parametrize("form", ["positions", "keywords", "dict", "function"])
def test_mean_and_variance_may_be_two_heads(form):
    model = cases.seeded(lambda: Heads(as_dict=form == "dict"))

    def nll(output, y):
        return F.gaussian_nll_loss(output["mean"], y, output["spread"])

    opt = optimizer(
        model, nll if form == "dict" else F.gaussian_nll_loss if form == "function" else nn.GaussianNLLLoss()
    )
    output = model(X)
    if form == "dict":
        loss = opt.loss_fn(output, Y2)
    elif form == "keywords":
        loss = opt.loss_fn(input=output[0], var=output[1], target=Y2)
    else:
        loss = opt.loss_fn(output[0], Y2, output[1])
    loss.backward()
    found = measured(opt)
    f = tuple(model(X).values()) if form == "dict" else model(X)
    close(found, dense_truth(model, f, lambda m, v: F.gaussian_nll_loss(m, Y2, v), N), 1e-9)


def test_a_sum_over_heads():
    """As in detection: boxes and classes, with targets of every image in a list."""
    model = cases.seeded(lambda: Heads())
    targets = [{"box": REAL[k, :2], "label": LABELS[k] % 2} for k in range(N)]

    def matched(output, targets):
        boxes, logits = output
        labels = torch.stack([t["label"] for t in targets])
        return F.cross_entropy(logits, labels) + 5 * F.smooth_l1_loss(boxes, torch.stack([t["box"] for t in targets]))

    opt = optimizer(model, matched)
    opt.loss_fn(model(X), targets).backward()
    close(measured(opt), dense_truth(model, model(X), lambda b, p: matched((b, p), targets), N), 1e-9)


@pytest.mark.parametrize("loss", [nn.TripletMarginLoss(margin=3.0), nn.CosineEmbeddingLoss(margin=-1.0)])
def test_outputs_of_several_forward_passes(loss):
    model, others = net(""), [cases.randn(N, 4, seed=7), cases.randn(N, 4, seed=8)]
    triplet = isinstance(loss, nn.TripletMarginLoss)

    def views():
        return [model(x) for x in ([X, *others] if triplet else [X, others[0]])]

    rest = [] if triplet else [torch.ones(N, dtype=torch.float64)]
    opt = optimizer(model, loss)
    opt.loss_fn(*views(), *rest).backward()
    close(measured(opt), dense_truth(model, views(), lambda *f: loss(*f, *rest), N), 1e-8)


def test_preferences_against_a_reference():
    """DPO: log probabilities of what was chosen and what was rejected, and those of the reference."""
    model, other = net(""), cases.randn(N, 4, seed=7)
    reference = cases.randn(N, seed=9), cases.randn(N, seed=10)

    def dpo(chosen, rejected, ref_chosen, ref_rejected):
        return -F.logsigmoid(0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()

    def log_probs():
        return [model(x).log_softmax(-1)[:, 0] for x in (X, other)]

    opt = optimizer(model, dpo)
    opt.loss_fn(*log_probs(), *reference).backward()
    close(measured(opt), dense_truth(model, log_probs(), lambda a, b: dpo(a, b, *reference), N), 1e-9)


def test_ctc_counts_by_the_gradients_of_samples():
    """[time, batch, classes], which torch does not differentiate twice."""
    steps, classes, n = 5, 4, 3
    model = cases.seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, classes)))
    x, labels = cases.randn(n, steps, 4), torch.tensor([[1, 2], [2, 3], [3, 1]])
    lengths, loss = (torch.full((n,), steps), torch.tensor([2, 2, 1])), nn.CTCLoss()

    def log_probs():
        return model(x).log_softmax(-1).transpose(0, 1)

    opt = optimizer(model, loss)
    with pytest.warns(UserWarning, match="cannot be differentiated twice"):
        opt.loss_fn(log_probs(), labels, *lengths).backward()
    f = log_probs()
    each = F.ctc_loss(f, labels, *lengths, reduction="none") / lengths[1]
    params = list(model.parameters())
    G = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(e, params, retain_graph=True)]) for e in each])
    close(measured(opt), G.T @ G / n, 1e-6)


def test_a_number_among_the_outputs_is_refused():
    model = cases.seeded(lambda: Heads())
    opt = optimizer(model, lambda f, y, penalty: F.huber_loss(f, y) + penalty)
    mean, spread = model(X)
    with pytest.raises(ValueError, match=r"has no batch of 6 samples.*outside of the loss"):
        opt.loss_fn(mean, Y2, spread.sum())


@pytest.mark.parametrize(
    "coupled",
    [
        lambda f, y: F.cross_entropy(f @ f.T, torch.arange(len(f))),
        lambda f, y: F.cross_entropy(f @ f.T, torch.arange(N)),
        lambda f, y: F.huber_loss(f, y, reduction="none").mean(-1).topk(2)[0].mean(),
        lambda f, y: F.relu(1 - (f[0::2] - f[1::2]).square().sum(-1)).mean(),
        lambda f, y: F.huber_loss(f, y, reduction="none").max(),
        lambda f, y: F.huber_loss(f, y).sqrt(),
        lambda f, y: F.huber_loss((f - f.mean(0)) / f.std(0), y),
    ],
    ids=["info nce", "info nce of a fixed size", "top k", "pairs", "largest", "root", "standardised"],
)
def test_losses_in_which_samples_meet_are_refused(coupled):
    for _ in range(5):
        opt = optimizer(net(""), coupled)
        with pytest.raises(ValueError, match="samples meet in the loss"):
            opt.loss_fn(opt.model(X), REAL).backward()
        opt.remove()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("left", [0, 1])
def test_sum_and_mean_are_told_apart_when_few_samples_have_a_gradient(reduction, left):
    """A hinge that all samples but `left` satisfy: at its end there are such batches."""
    y = torch.ones(N, V)
    f = torch.full((N, V), 2.0)
    f[:left] = 0.5
    loss = WholeLoss(lambda f, y: getattr(F.relu(1 - f * y).mean(-1), reduction)(), f, y, N)
    assert loss.divisor() == (None if not left else N if reduction == "mean" else 1)


@pytest.mark.filterwarnings("ignore:the loss 'MultiMarginLoss' cannot be differentiated twice")
def test_a_loss_without_a_gradient_asks_for_no_divisor():
    model, loss_fn = net(""), nn.MultiMarginLoss(margin=1e-9)
    opt = optimizer(model, loss_fn)
    labels = model(X).argmax(-1)
    loss_fn(model(X), labels).backward()
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
