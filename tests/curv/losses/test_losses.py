"""The same loss gives the same curvature however it reaches the optimizer: as a module, by name, through observe."""

import cases
import pytest
import torch
from measured import KINDS, Part, close, measured, optimizer, truth
from torch import nn
from torch.nn import functional as F

from torchcurv.curv.losses.table import loss_of

N, T, V = 4, 3, cases.CLASSES
NAMED = {"ce": "cross_entropy", "nll": "nll", "mse": "mse", "bce": "bce_with_logits"}
PLAIN = [case for case in cases.LOSSES if "weight" not in case.id and "ignore_class" not in case.id]


def labels(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def tokens(mix=True):
    """[n, t, 4] -> [n, t, V], with t mixed in between."""
    body = [nn.Linear(4, 5), nn.Tanh(), *([cases.ClassFirst(), nn.Linear(T, T), cases.ClassFirst()] if mix else [])]
    return cases.seeded(lambda: nn.Sequential(*body, nn.Linear(5, V)))


def problem(case):
    model = cases.net_for(case)
    x = cases.randn(N, 4, seed=3)
    return model, x, cases.target_for(case, model(x))


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trigger", ["module", "observe"])
@pytest.mark.parametrize("case", cases.LOSSES, ids=cases.ids(cases.LOSSES))
def test_a_loss_seen_or_observed_gives_its_curvature(case, trigger, kind):
    model, x, y = problem(case)
    opt = optimizer(model, case.loss if trigger == "module" else None, curv_type=kind)
    output = model(x)
    if trigger == "observe":
        opt.observe(output, y, case.loss)
    case.loss(output, y).backward()
    close(measured(opt), truth(opt, case.loss, x, y, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", PLAIN, ids=cases.ids(PLAIN))
def test_a_named_loss_gives_the_curvature_of_its_module(case, kind):
    model, x, y = problem(case)
    name = NAMED[case.id.split("_")[0]]
    opt = optimizer(model, name, reduction=case.loss.reduction, class_dim=1, curv_type=kind)
    case.loss(model(x), y).backward()
    close(measured(opt), truth(opt, case.loss, x, y, kind))


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(ignore_index=1), nn.MSELoss(), nn.BCEWithLogitsLoss()])
def test_the_terms_of_some_samples_have_the_factor_of_all(loss):
    f, labels = cases.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    y = labels if isinstance(loss, nn.CrossEntropyLoss) else nn.functional.one_hot(labels, 3).double()
    every = loss_of(loss).terms(f, y, 5)
    at = torch.tensor([4, 0, 2])
    some, alone = every.of(at), loss_of(loss).terms(f[at], y[at], 3)
    assert torch.equal(some.f, alone.f) and torch.equal(some.gradient(), alone.gradient())
    assert (some.weights is None and alone.weights is None) or torch.equal(some.weights, alone.weights)
    assert float(some.reduction) == float(every.reduction) != float(alone.reduction)


def test_a_right_prediction_of_gradient_zero_is_a_term_and_an_ignored_one_is_not():
    model, x, y, loss = cases.seeded(lambda: nn.Linear(4, V)), cases.randn(N, 4), labels(N), nn.CrossEntropyLoss()
    with torch.no_grad():
        x[0] = torch.linalg.pinv(model.weight) @ (1000.0 * F.one_hot(y[0], V) - model.bias)
    opt = optimizer(model, "cross_entropy")
    loss(model(x), y).backward()
    close(measured(opt), truth(opt, loss, x, y))
    opt.zero_grad()
    y[1] = -100
    loss(model(x), y).backward()
    close(measured(opt), truth(opt, loss, x, y))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trigger", ["module", "name", "observe"])
@pytest.mark.parametrize("shift", [0, 1])
def test_flattened_rows_are_mapped_back_to_samples(trigger, kind, shift):
    model, x, loss = tokens(), cases.randn(N, T, 4), nn.CrossEntropyLoss()
    y = labels(N, T - shift)
    opt = optimizer(model, {"module": loss, "name": "cross_entropy", "observe": None}[trigger], class_dim=-1
                    if trigger == "name" else None, curv_type=kind)  # fmt: skip
    output = model(x)
    rows = output[:, : T - shift].reshape(-1, V)
    if trigger == "observe":
        opt.observe(rows, y.flatten(), loss)
    loss(rows, y.flatten()).backward()
    whole = Part(model, lambda out: out[:, : T - shift].transpose(1, 2))
    close(measured(opt), truth(opt, loss, x, y, kind, whole))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss(reduction="sum")], ids=["mse", "bce"])
def test_flattened_elements_are_mapped_back_to_samples(loss, kind):
    model, x = tokens(), cases.randn(N, T, 4)
    y = cases.randn(N, T, V, seed=1).sigmoid()
    opt = optimizer(model, loss, curv_type=kind)
    loss(model(x).view(-1), y.view(-1)).backward()
    close(measured(opt), truth(opt, loss, x, y, kind))


class TimeMajor(nn.Module):
    """Returns [t, n, c] for an input [n, t, i]."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x).transpose(0, 1)


@pytest.mark.parametrize("n", [4, 6])
def test_a_time_major_output_raises_and_observe_measures_it(n):
    model, x, y, loss = TimeMajor(tokens()), cases.randn(n, T, 4), labels(n, T), nn.CrossEntropyLoss()
    opt = optimizer(model, loss)
    with pytest.raises(ValueError, match=r"observe\(output, target\)"):
        loss(model(x).permute(1, 2, 0), y).backward()
    opt.zero_grad()
    output = model(x).permute(1, 2, 0)
    opt.observe(output, y)
    loss(output, y).backward()
    close(measured(opt), truth(opt, loss, x, y, model=Part(model, lambda out: out.permute(1, 2, 0))))


@pytest.mark.parametrize("trigger", ["module", "observe"])
def test_rows_of_some_positions_are_mapped_to_their_samples(trigger):
    model, loss = tokens(), nn.CrossEntropyLoss()
    opt = optimizer(model, loss)
    kept = torch.arange(N * T) != 3
    x, y = cases.randn(N, T, 4), labels(N * T)[kept]
    rows = model(x).reshape(-1, V)[kept]
    if trigger == "observe":
        opt.observe(rows, y)
    loss(rows, y).backward()
    close(measured(opt), truth(opt, loss, x, y, model=Part(model, lambda out: out.reshape(-1, V)[kept])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("class_weight", [None, cases.CLASS_WEIGHTS], ids=["plain", "class_weight"])
def test_an_unreduced_loss_is_weighted_as_the_user_reduces_it(kind, class_weight):
    model, x, y = tokens(mix=False), cases.randn(N, T, 4), labels(N, T)
    loss, total = (
        nn.CrossEntropyLoss(class_weight, reduction="none"),
        nn.CrossEntropyLoss(class_weight, reduction="sum"),
    )
    model = nn.Sequential(model, cases.ClassFirst())
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    opt = optimizer(model, loss, curv_type=kind)
    (weights * loss(model(x), y).mean(1)).sum().backward()
    one = [weights[k] / T * truth(opt, total, x[k : k + 1], y[k : k + 1], kind) for k in range(N)]
    close(measured(opt), torch.stack(one).sum(0))


@pytest.mark.parametrize("kind", KINDS)
def test_an_unreduced_squared_error_is_weighted_element_by_element(kind):
    model, x = cases.seeded(lambda: nn.Linear(4, 2)), cases.randn(N, 4)
    y, weights = cases.randn(N, 2, seed=1), torch.tensor([3.0, 0.25], dtype=torch.float64)
    opt = optimizer(model, nn.MSELoss(reduction="none"), curv_type=kind)
    (weights * nn.MSELoss(reduction="none")(model(x), y)).mean()  # not seen: another module
    (weights * opt.engine.recorder.loss_fn(model(x), y)).mean().backward()
    J = torch.stack([torch.cat([torch.kron(torch.eye(2)[o], row), torch.eye(2)[o]]) for row in x for o in range(2)])
    residual = (model(x) - y).detach().flatten() if kind == "empirical_fisher" else torch.ones(2 * N).double()
    scale = 2 * weights.repeat(N) / (2 * N)
    rows = J * (scale.sqrt() * residual)[:, None]
    rows = rows.reshape(N, 2, -1).sum(1) if kind == "empirical_fisher" else rows
    close(measured(opt), rows.T @ rows)


def test_the_settings_of_a_loss_module_count_as_they_are_when_it_is_called():
    model, x, y, loss = tokens(), cases.randn(N, T, 4), labels(N, T), nn.CrossEntropyLoss()
    opt = optimizer(nn.Sequential(model, cases.ClassFirst()), loss)
    loss.reduction = "sum"
    loss(opt.model(x), y).backward()
    close(measured(opt), truth(opt, loss, x, y))


# ------------------------------------------------------------------------------- ignored terms, zero factors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trigger", ["module", "name", "observe"])
def test_a_batch_without_terms_adds_nothing(trigger, kind):
    model, x, y, loss = cases.seeded(lambda: nn.Linear(4, V)), cases.randn(N, 4), labels(N), nn.CrossEntropyLoss()
    opt = optimizer(model, {"module": loss, "name": "cross_entropy", "observe": None}[trigger], curv_type=kind)

    def backward(target):
        output = model(x)
        if trigger == "observe":
            opt.observe(output, target, loss)
        loss(output, target).backward()

    backward(torch.full_like(y, -100))
    assert not model.weight.grad.any()
    opt.step()  # zero gradients and no curvature: nothing to do
    assert not opt.engine.blocks[0].tensors
    opt.zero_grad()
    backward(torch.full_like(y, -100))
    backward(y)
    close(measured(opt), truth(opt, loss, x, y, kind))


@pytest.mark.parametrize("approx", ["full", "kfac", "diag"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_with_factor_zero_has_no_curvature(kind, approx):
    model, x, y, loss = cases.seeded(lambda: nn.Linear(4, V)), cases.randn(N, 4), labels(N), nn.CrossEntropyLoss()
    opt = optimizer(model, loss, curv_type=kind, approx=approx)
    (0 * loss(model(x), y)).backward()
    opt.step()
    (block,) = opt.engine.blocks
    scaling = {k for one in block.approx.statistics.values() if one.scales_with_loss for k in one.keys}
    assert scaling & block.tensors.keys()
    assert all(not block.tensors[key].any() for key in scaling & block.tensors.keys())
    assert all(torch.isfinite(value).all() for value in block.tensors.values())


# ------------------------------------------------------------------------------- names that do not fit


def backward_of(loss):
    model = cases.seeded(lambda: nn.Linear(4, V))
    x, y = cases.randn(N, 4), labels(N)
    return model, lambda: loss(model(x), y).backward()


def one_hot(y):
    return F.one_hot(y, V).double()


MISMATCHES = {
    "mse under cross_entropy": ("cross_entropy", None, lambda f, y: F.mse_loss(f, one_hot(y))),
    "bce under cross_entropy": ("cross_entropy", None, lambda f, y: F.binary_cross_entropy_with_logits(f, one_hot(y))),
    "class weights": ("cross_entropy", None, lambda f, y: F.cross_entropy(f, y, weight=cases.CLASS_WEIGHTS)),
    "dice": (
        "cross_entropy",
        None,
        lambda f, y: 1 - 2 * (f.softmax(-1) * one_hot(y)).sum() / (f.softmax(-1).sum() + len(y)),
    ),
    "advantages": ("cross_entropy", None, lambda f, y: (F.cross_entropy(f, y, reduction="none") * WEIGHTS).mean()),
}
WEIGHTS = cases.randn(N).sigmoid()


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_gradient_that_is_not_that_of_the_named_loss_raises_with_the_remedy(name):
    loss_fn, reduction, loss = MISMATCHES[name]
    model, backward = backward_of(loss)
    opt = optimizer(model, loss_fn, reduction=reduction)
    with pytest.raises(ValueError, match=r"Pass the loss module you call as loss_fn=.*observe\("):
        backward()
    opt.remove()


FACTORS = {
    "cross_entropy": nn.CrossEntropyLoss(),
    "bce_with_logits": lambda f, y: F.binary_cross_entropy_with_logits(f, one_hot(y)),
    "nll": nn.NLLLoss(),
    "half ignored": lambda f, y: F.cross_entropy(f, y.where(y > 0, -100)),
    "under another reduction": lambda f, y: F.cross_entropy(f, y, reduction="sum"),
}


@pytest.mark.parametrize("factor", [0.25, 0.01, 10.0, 65536.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FACTORS)
def test_of_hard_labels_any_factor_is_taken_from_the_gradient(name, kind, factor):
    """Of the loss by its name: accumulation, num_items_in_batch, weights, at every step another one."""
    end = nn.LogSoftmax(-1) if name == "nll" else nn.Identity()
    model, x, y = cases.seeded(lambda: nn.Sequential(nn.Linear(4, V), end)), cases.randn(N, 4), labels(N)
    opt = optimizer(model, name if name in ("bce_with_logits", "nll") else "cross_entropy", curv_type=kind)
    once = FACTORS[name](model(x), y)
    once.backward()
    expected = measured(opt)
    for own in (factor, 0.5, factor):
        opt.zero_grad()
        (own * FACTORS[name](model(x), y)).backward()
        close(measured(opt), own * expected)


@pytest.mark.parametrize("said", [0.25, lambda: 0.25])
@pytest.mark.parametrize(("name", "loss"), [
    ("mse", lambda f, y: F.mse_loss(f, one_hot(y))),
    ("cross_entropy", lambda f, y: F.cross_entropy(f, y, label_smoothing=0.3)),
])  # fmt: skip
def test_of_other_targets_the_factor_is_said(name, loss, said):
    model, x, y = cases.seeded(lambda: nn.Linear(4, V)), cases.randn(N, 4), labels(N)
    known = optimizer(model, name)
    loss(model(x), y).backward()
    expected = measured(known)
    known.remove()
    opt = optimizer(model, name, loss_factor=said)
    opt.zero_grad()
    (loss(model(x), y) / 4).backward()
    close(measured(opt), expected / 4)
    opt.remove()


@pytest.mark.parametrize("said", [0, "half", float("inf")])
def test_a_factor_that_is_none_is_refused(said):
    with pytest.raises((TypeError, ValueError), match=r"loss_factor=.*a number that is not 0, or a function"):
        optimizer(nn.Linear(4, V), "mse", loss_factor=said)


NEGATIVE = {
    "cross_entropy": (F.cross_entropy, labels),
    "cross_entropy of two": (lambda f, y: F.cross_entropy(f[:, :2], y % 2), labels),
    "nll": (lambda f, y: F.nll_loss(f, y), labels),
    "bce_with_logits": (F.binary_cross_entropy_with_logits, lambda n: (cases.randn(n, V, seed=4) > 0).double()),
}


@pytest.mark.parametrize("rows", [1, 2, 6])
@pytest.mark.parametrize("factor", [-0.01, -0.25, -1.0, -30.0])
@pytest.mark.parametrize("name", [name for name in NEGATIVE if "two" not in name])
def test_a_negative_factor_is_seen_by_a_name(name, factor, rows):
    loss, targets = NEGATIVE[name]
    make = lambda: nn.Sequential(nn.Linear(4, V), nn.LogSoftmax(-1)) if name == "nll" else nn.Linear(4, V)  # noqa: E731
    model, x, y = cases.seeded(make), cases.randn(rows, 4), targets(rows)
    opt = optimizer(model, name)
    (factor * loss(model(x), y)).backward()
    with pytest.raises(RuntimeError, match="multiplied by a negative number"):
        opt.step()
    opt.remove()
    opt = optimizer(model, name)
    opt.zero_grad()
    (-factor * loss(model(x), y)).backward()
    expected = measured(opt)
    opt.remove()
    opt = optimizer(model, name, negative="abs")
    opt.zero_grad()
    (factor * loss(model(x), y)).backward()
    close(measured(opt), expected)


def test_a_negative_factor_is_seen_by_a_name_of_two_classes():
    model, x = cases.seeded(lambda: nn.Linear(4, 2)), cases.randn(5, 4)
    opt = optimizer(model, "cross_entropy")
    (-0.3 * F.cross_entropy(model(x), labels(5) % 2)).backward()
    with pytest.raises(RuntimeError, match="multiplied by a negative number"):
        opt.step()


@pytest.mark.parametrize("factor", [0.25, -0.25])
def test_one_logit_tells_no_factor_from_a_soft_label(factor):
    model, x, y = cases.seeded(lambda: nn.Linear(4, 1)), cases.randn(1, 4), torch.ones(1, 1).double()
    opt = optimizer(model, "bce_with_logits", negative="abs")
    with pytest.raises(ValueError, match="it has one term, of which a soft label and a factor cannot be told"):
        (factor * F.binary_cross_entropy_with_logits(model(x), y)).backward()
    opt.remove()
    opt = optimizer(model, "bce_with_logits", loss_factor=factor, negative="abs")
    opt.zero_grad()
    (factor * F.binary_cross_entropy_with_logits(model(x), y)).backward()
    close(measured(opt), 0.25 * truth(opt, nn.BCEWithLogitsLoss(), x, y, "ggn"))


@pytest.mark.parametrize("soft", [True, False])
def test_one_logit_has_the_kind_of_label_that_batches_before_it_had(soft):
    model, loss = cases.seeded(lambda: nn.Linear(4, 1)), nn.BCEWithLogitsLoss()
    opt = optimizer(model, "bce_with_logits")
    for rows in (5, 1):
        x, y = cases.randn(rows, 4, seed=rows), (torch.arange(rows)[:, None] % 2).double()
        y = y * 0.8 + 0.1 if soft else y
        factor = 1.0 if soft else 0.25
        opt.zero_grad()
        (factor * loss(model(x), y)).backward()
        close(measured(opt), factor * truth(opt, loss, x, y, "ggn"))


def test_terms_of_both_signs_are_seen_by_a_name():
    model, x = cases.seeded(lambda: nn.Linear(4, V)), cases.randn(N, 4)
    opt = optimizer(model, "cross_entropy")
    weights = torch.tensor([0.5, -0.2, 0.1, -0.4], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"multiplied by weights from -.* to "):
        (F.cross_entropy(model(x), labels(N), reduction="none") * weights).mean().backward()
    opt.remove()


def test_of_squared_errors_a_negative_factor_is_said():
    model, x, y = cases.seeded(lambda: nn.Linear(4, V)), cases.randn(N, 4), one_hot(labels(N))
    opt = optimizer(model, "mse", loss_factor=-0.5)
    (-0.5 * F.mse_loss(model(x), y)).backward()
    with pytest.raises(RuntimeError, match="multiplied by a negative number"):
        opt.step()
    opt.remove()
    opt = optimizer(model, "mse", loss_factor=-0.5, negative="abs")
    opt.zero_grad()
    (-0.5 * F.mse_loss(model(x), y)).backward()
    close(measured(opt), 0.5 * truth(opt, nn.MSELoss(), x, y, "ggn"))


def test_each_backward_is_checked_against_the_name():
    """A loss that fits at first and not later: all is well until then."""
    model, x, y = cases.seeded(lambda: nn.Linear(4, V)), cases.randn(N, 4), labels(N)
    opt = optimizer(model, "cross_entropy")
    F.cross_entropy(model(x), y).backward()
    opt.step()
    opt.zero_grad()
    with pytest.raises(ValueError, match="is not that of loss_fn='cross_entropy'"):
        F.mse_loss(model(x), one_hot(y)).backward()


MATCHES = {
    "smoothed": ("cross_entropy", None, lambda f, y: F.cross_entropy(f, y, label_smoothing=0.3)),
    "soft": ("cross_entropy", None, lambda f, y: F.cross_entropy(f, (f.detach() * 2).softmax(-1))),
    "half ignored": ("cross_entropy", None, lambda f, y: F.cross_entropy(f, y.where(y > 0, -100))),
    "smoothed from uniform": (
        "cross_entropy",
        None,
        lambda f, y: F.cross_entropy(f - f.detach(), y, label_smoothing=0.3),
    ),
    "sum": ("cross_entropy", "sum", lambda f, y: F.cross_entropy(f, y, reduction="sum")),
    "nll": ("nll", None, lambda f, y: F.nll_loss(f, y)),
    "bce": ("bce_with_logits", None, lambda f, y: F.binary_cross_entropy_with_logits(f, 0.1 + 0.5 * one_hot(y))),
    "squared error with any factor": ("mse", None, lambda f, y: 7 * F.mse_loss(f, one_hot(y))),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MATCHES)
def test_a_gradient_that_may_be_that_of_the_named_loss_passes(name, dtype):
    loss_fn, reduction, loss = MATCHES[name]
    model = cases.seeded(lambda: nn.Linear(4, V)).to(dtype)
    if "uniform" in name:
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
    end = nn.LogSoftmax(-1) if loss_fn == "nll" else nn.Identity()
    opt = optimizer(nn.Sequential(model, end), loss_fn, reduction=reduction)
    y = labels(N)
    loss(opt.model(cases.randn(N, 4).to(dtype)), y).backward()
    opt.step()
    assert opt.engine.blocks[0].tensors


def test_a_named_loss_needs_a_reduction_and_a_class_dimension():
    model = tokens()
    with pytest.raises(ValueError, match=r"reduction='none'"):
        optimizer(model, "cross_entropy", reduction="none")
    opt = optimizer(nn.Sequential(model, nn.LogSoftmax(-1)), "nll")
    with pytest.raises(ValueError, match="class_dim="):  # whose gradient does not show it
        F.nll_loss(opt.model(cases.randn(N, T, 4)).transpose(1, 2), labels(N, T)).backward()
    opt.remove()


def test_a_target_that_depends_on_the_model_raises():
    model, loss = cases.seeded(lambda: nn.Linear(4, V)), nn.MSELoss()
    opt = optimizer(model, loss)
    with pytest.raises(ValueError, match="target, depends on the model"):
        loss(cases.randn(N, V), model(cases.randn(N, 4)))
    with pytest.raises(ValueError, match="target, depends on the model"):
        loss(model(cases.randn(N, 4)), model(cases.randn(N, 4, seed=1)))
    opt.remove()


def test_what_is_no_loss_is_refused():
    with pytest.raises(TypeError, match=r"loss_fn is a int; pass a loss module, a function of \(output, target\)"):
        loss_of(3)


# ------------------------------------------------------------------------------- batches that are not finite


FINITE = {"cross_entropy": nn.CrossEntropyLoss(), "bce": nn.BCEWithLogitsLoss(), "mse": nn.MSELoss()}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("by", ["module", "name"])
@pytest.mark.parametrize("kind", ["ggn", "fisher", "empirical_fisher"])
@pytest.mark.parametrize("name", FINITE)
def test_a_batch_that_is_not_finite_is_left_out_and_counted(name, kind, by, value):
    loss = FINITE[name]
    named = {"cross_entropy": "cross_entropy", "bce": "bce_with_logits", "mse": "mse"}[name]
    model, x, y = cases.seeded(lambda: nn.Linear(4, V)), cases.randn(N, 4), labels(N)
    y = y if name == "cross_entropy" else one_hot(y)
    opt = optimizer(model, loss if by == "module" else named, curv_type=kind, samples=1, ema_decay=0.9)
    loss(model(x), y).backward()
    before = measured(opt)
    bad = x.clone()
    bad[1, 2] = value
    opt.zero_grad()
    loss(model(bad), y).backward()
    for p in model.parameters():
        p.grad.nan_to_num_(0, 0, 0)
    with pytest.warns(UserWarning, match="1 curvature measurements were not finite"):
        close(measured(opt), before)
    assert opt.metrics()["skipped_measurements"] == 1


@pytest.mark.parametrize("dim", [1, 2, -1])
def test_the_class_dimension_of_a_name_is_seen_in_the_gradient(dim):
    model, x = tokens(), cases.randn(N, T, 4)
    move = cases.ClassFirst() if dim == 1 else nn.Identity()
    y = labels(N, T)
    opt = optimizer(nn.Sequential(model, move), "cross_entropy")
    f = opt.model(x)
    F.cross_entropy(f if dim == 1 else f.transpose(1, 2), y).backward()
    said = optimizer(nn.Sequential(model, move), "cross_entropy", class_dim=dim)
    expected_model = said.model
    found = measured(opt)
    opt.remove()
    said.zero_grad()
    f = expected_model(x)
    F.cross_entropy(f if dim == 1 else f.transpose(1, 2), y).backward()
    close(found, measured(said))
