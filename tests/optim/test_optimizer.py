"""The optimizer contract: what a step is for every approximation, and what users do around it; in float64."""

import math
import re
import warnings
from contextlib import nullcontext

import cases
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import vector_to_parameters
from torch.utils._python_dispatch import TorchDispatchMode

from torchcurv import Preconditioner, SecondOrderOptimizer
from torchcurv.curv.approximations.rows import JacobianRows
from torchcurv.curv.numerics import assume_accelerator

APPROXIMATIONS = cases.APPROXIMATIONS
LOSS = nn.CrossEntropyLoss()
PLAIN = {"lr": 1.0, "momentum": 0.0, "kl_clip": None, "samples": None}  # a step is minus the solution
SIZES = [6, 5, 8, 6, 7, 5]  # no input covariance has a null space of two dimensions, whose basis would be anyone's
BATCHES = [(cases.randn(n, 4, seed=t), torch.arange(n) % 3) for t, n in enumerate(SIZES)]


EACH = {"update_every": 1, "refactor_every": 1}


def make_model():
    return cases.seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors]).clone()


def backward(model, t=0, loss=LOSS):
    x, y = BATCHES[t % len(BATCHES)]
    loss(model(x), y).backward()


def train(model, optimizer, steps, loss=LOSS):
    for t in steps:
        optimizer.zero_grad()
        backward(model, t, loss)
        optimizer.step()


def close(x, truth, tol=1e-8):
    assert x.shape == truth.shape
    assert (x - truth).abs().max() <= tol * (1e-3 + truth.abs().max())


# --- the formula, for every approximation ---------------------------------------------------------------------


def mean_factors(stats):
    return stats["A"] / stats["count"], stats["B"]


class Slow:
    """One layer's curvature, as plainly as it can be written: running averages, then a dense matrix to solve with."""

    def __init__(self, approx, damping_type, module):
        self.approx, self.damping_type, self.module = approx, damping_type, module
        self.stats, self.weight, self.moment_weight = {}, 0.0, 0.0

    def average(self, key, new, weight):
        old = self.stats.get(key, torch.zeros_like(new))
        self.stats[key] = old + (new - old) / weight

    def measure(self, a, s, rho):
        self.weight = rho * self.weight + 1
        if self.approx in ("kfac", "ekfac"):
            n = len(a)
            A, B = (m[0] for m in oracles.kron_factors(a, s))
            for key, new in {"A": A * n, "count": torch.tensor(float(n)).double(), "B": B}.items():
                self.average(key, new, self.weight)
            if self.approx == "ekfac" and hasattr(self, "Q"):
                self.moment_weight = rho * self.moment_weight + 1
                block = oracles.block_from_arrays(a, s)
                self.average("moments", (self.Q.T @ block @ self.Q).diagonal(), self.moment_weight)
            return
        dense = {"unit": oracles.unit_from_arrays, "block": oracles.block_from_arrays}
        if self.approx == "diag":
            self.average("M", oracles.diag_from_arrays(a, s).diag(), self.weight)
        else:
            self.average("M", dense[self.approx](a, s), self.weight)

    def refactor(self, damping):
        self.held = damping
        if self.approx == "kfac":
            self.frozen = mean_factors(self.stats)
        elif self.approx == "ekfac":
            A, B = mean_factors(self.stats)
            (a, Q_A), (b, Q_B) = torch.linalg.eigh(A), torch.linalg.eigh(B)
            Q = torch.kron(Q_B, Q_A)
            if "moments" in self.stats:
                old = self.Q @ self.stats["moments"].diag() @ self.Q.T
                self.stats["moments"] = self.frozen = (Q.T @ old @ Q).diagonal()
            else:
                self.frozen = torch.kron(b, a)
            self.Q = Q
        else:
            self.frozen = self.stats["M"]

    def solve(self, g):
        """g in (g, o, i) order; everything in float64, one dense solve."""
        eye = torch.eye(len(g), dtype=g.dtype)
        if self.approx == "ekfac":
            values = self.stats.get("moments", self.frozen)
            return self.Q @ ((self.Q.T @ g) / (values + self.held))
        if self.approx == "diag":
            return g / (self.stats["M"].diagonal() + self.held)
        if self.approx != "kfac":
            return torch.linalg.solve(self.frozen + self.held * eye, g)
        A, B = self.frozen
        if self.damping_type == "exact":
            return torch.linalg.solve(torch.kron(B, A) + self.held * eye, g)
        pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt()
        A = A + pi * self.held**0.5 * torch.eye(len(A), dtype=g.dtype)
        B = B + self.held**0.5 / pi * torch.eye(len(B), dtype=g.dtype)
        return torch.linalg.solve(torch.kron(B, A), g)


def joined(module, weight, bias):
    return torch.cat([weight, bias[:, None]], 1).flatten()


@settings(max_examples=40, deadline=None)
@given(
    approx=st.sampled_from(["block", "unit", "kfac", "ekfac", "diag"]),
    damping_type=st.sampled_from(["factored", "exact"]),
    kind=st.sampled_from(["ggn", "empirical_fisher"]),
    ema_decay=st.sampled_from([0.0, 0.8, 1.0]),
    update_every=st.integers(1, 3),
    refactor_every=st.integers(1, 3),
)
def test_steps_of_every_approximation_are_those_of_slow_code(
    approx, damping_type, kind, ema_decay, update_every, refactor_every
):
    """Batches of different sizes; measured and factored every so many steps."""
    model, twin, damping = make_model(), make_model(), 0.05
    optimizer = SecondOrderOptimizer(
        model, approx=approx, damping_type=damping_type, curv_type=kind, damping=damping, ema_decay=ema_decay,
        update_every=update_every, refactor_every=refactor_every, **{**PLAIN, "lr": 0.5},
    )  # fmt: skip
    slow = {name: Slow(approx, damping_type, twin.get_submodule(name)) for name in ("0", "2")}
    for t, (x, y) in enumerate(BATCHES):
        grads = torch.autograd.grad(LOSS(twin(x), y), list(twin.parameters()))
        steps = []
        for name, (weight, bias) in zip(slow, (grads[:2], grads[2:]), strict=True):
            layer = slow[name]
            if t % update_every == 0:
                layer.measure(*oracles.layer_arrays(twin, LOSS, x, y, name, kind), ema_decay**update_every)
            if t % refactor_every == 0:
                layer.refactor(damping)
            v = layer.solve(joined(layer.module, weight, bias)).reshape(len(bias), -1)
            steps += [v[:, :-1], v[:, -1]]
        vector_to_parameters(flat(twin.parameters()) - 0.5 * flat(steps), twin.parameters())
        train(model, optimizer, [t])
        close(flat(model.parameters()), flat(twin.parameters()), 1e-7)


@pytest.mark.parametrize("kl_clip", [1e-5, 1e-3, 100.0])
def test_the_kl_clip_is_one_number_over_all_groups_and_leaves_plain_gradients_alone(kl_clip):
    model = cases.seeded(lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 3)))
    rates = [0.5, 0.1, 0.3, 0.2]
    groups = [{"params": model[k].parameters(), "lr": lr} for k, lr in enumerate(rates)]
    groups[3]["approx"] = None
    optimizer = SecondOrderOptimizer(model, groups, momentum=0.0, samples=None, kl_clip=kl_clip, damping=0.1)
    unclipped = cases.seeded(lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 3)))
    other = SecondOrderOptimizer(unclipped, lr=1.0, momentum=0.0, samples=None, kl_clip=None, damping=0.1)
    before = [flat(layer.parameters()) for layer in model]
    train(model, optimizer, [0])
    train(unclipped, other, [0])
    grads = [flat(p.grad for p in layer.parameters()) for layer in model]
    directions = [old - flat(layer.parameters()) for old, layer in zip(before, unclipped, strict=True)]
    total = sum(lr**2 * (v @ g) for lr, v, g in zip(rates[:3], directions, grads, strict=False))
    nu = min(1.0, math.sqrt(kl_clip / total))
    assert (nu < 1) == (kl_clip < 100)
    for k in range(3):
        close(before[k] - flat(model[k].parameters()), rates[k] * nu * directions[k])
    close(before[3] - flat(model[3].parameters()), rates[3] * grads[3])


def test_one_group_and_a_group_for_every_parameter_take_the_same_steps():
    model, other = make_model(), make_model()
    one = SecondOrderOptimizer(model, weight_decay=0.1)
    many = SecondOrderOptimizer(other, [{"params": [p]} for p in other.parameters()], weight_decay=0.1)
    for t in range(4):
        train(model, one, [t])
        train(other, many, [t])
        close(flat(other.parameters()), flat(model.parameters()), 1e-12)


@pytest.mark.parametrize("momentum_type", ["raw", "preconditioned"])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)])
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"l2": 0.1}, {"maximize": True}, {"momentum": 0.0}])
def test_without_an_approximation_it_is_torchs_sgd_bit_for_bit(options, lr, momentum_type):
    model, twin = make_model(), make_model()
    options = {"momentum": 0.5, **options}
    ours = SecondOrderOptimizer(model, approx=None, lr=lr, momentum_type=momentum_type, **options)
    renamed = {"weight_decay" if key == "l2" else key: value for key, value in options.items()}
    theirs = torch.optim.SGD(twin.parameters(), lr=lr, foreach=True, **renamed)
    for t in range(4):
        train(model, ours, [t])
        train(twin, theirs, [t])
    if isinstance(lr, float):
        assert torch.equal(flat(model.parameters()), flat(twin.parameters()))
    close(flat(model.parameters()), flat(twin.parameters()), 1e-14)  # torch reads a tensor rate as a number


def test_rows_take_the_steps_of_the_dense_matrix():
    moved = []
    for rows_limit in (1, 2048):
        model = make_model()
        optimizer = SecondOrderOptimizer(
            model, approx="full", rows_limit=rows_limit, ema_decay=0.0, damping_type="exact", **PLAIN
        )
        train(model, optimizer, range(3))
        moved.append(flat(model.parameters()))
    close(*moved, 1e-9)


# --- loops ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("approx", ["kfac", "diag", "full"])
@pytest.mark.parametrize("kind", ["ggn", "empirical_fisher"])
def test_scaled_unscaled_and_clipped_gradients_step_as_without_a_scaler(approx, kind):
    results = []
    for scale in (None, 2.0**12):
        model, scaler = make_model(), None
        if scale is not None:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = SecondOrderOptimizer(
            model, approx=approx, curv_type=kind, loss_fn=LOSS, samples=None, grad_scaler=scaler
        )
        for x, y in BATCHES:
            optimizer.zero_grad()
            loss = LOSS(model(x), y)
            if scaler is None:
                loss.backward()
            else:
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        results.append(flat(model.parameters()))
    close(*results, 1e-9)


def test_a_plateau_scheduler_changes_the_rate_and_tensor_rates_are_kept_as_tensors():
    model = make_model()
    optimizer = SecondOrderOptimizer(model, lr=torch.tensor(0.1))
    rate = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        train(model, optimizer, [0])
        schedule.step(1.0)
    assert optimizer.param_groups[0]["lr"] is rate and rate < 0.1


def test_one_cycle_moves_the_momentum():
    optimizer = SecondOrderOptimizer(make_model())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)
    seen = set()
    for t in range(8):
        train(optimizer.model, optimizer, [t])
        schedule.step()
        seen.add(optimizer.param_groups[0]["momentum"])
    assert len(seen) > 4


@pytest.mark.parametrize("make", [SecondOrderOptimizer, Preconditioner])
def test_step_hooks_fire_once(make):
    model, calls = make_model(), []
    optimizer = make(model)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, [0])
    assert calls == ["before", "after"]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_an_unused_layer_is_no_error(set_to_none):
    model = nn.ModuleDict({"used": make_model(), "unused": nn.Linear(4, 3)}).double()
    model.forward = model["used"].forward
    optimizer = SecondOrderOptimizer(model, **EACH)
    before = flat(model["unused"].parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for t in range(3):
        optimizer.zero_grad(set_to_none)
        backward(model, t)
        optimizer.step()
    assert torch.equal(flat(model["unused"].parameters()), before) and optimizer.metrics()["step"] == 3


@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_parameters_may_be_frozen_and_unfrozen_between_steps(approx):
    """From the next step on it is the optimizer that a fresh one would be, apart from what was averaged so far."""
    model, fresh = make_model(), make_model()
    optimizer = SecondOrderOptimizer(model, model.parameters(), approx=approx, ema_decay=0.0, **EACH, **PLAIN)
    for names in (["0.weight", "0.bias"], ["0.bias"], ["2.weight"], []):
        for name, p in model.named_parameters():
            p.requires_grad_(name not in names)
        train(model, optimizer, [0])
        fresh.load_state_dict(model.state_dict())
        for name, p in fresh.named_parameters():
            p.requires_grad_(name not in names)
        train(model, optimizer, [1])
        firsts = {block.params[0] for block in optimizer.engine.blocks}
        assert {p for p, state in optimizer.state.items() if "curvature" in state} == firsts
        train(
            fresh, SecondOrderOptimizer(fresh, fresh.parameters(), approx=approx, ema_decay=0.0, **EACH, **PLAIN), [1]
        )
        if approx != "ekfac":  # whose moments are measured in the basis of the step before
            close(flat(model.parameters()), flat(fresh.parameters()))


def test_a_parameter_unfrozen_between_forward_and_step_raises_by_name():
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = SecondOrderOptimizer(model, model.parameters())
    optimizer.zero_grad()
    model[0].requires_grad_(True)
    backward(model)
    with pytest.raises(RuntimeError, match=r"0\.weight, 0\.bias were frozen.*zero_grad"):
        optimizer.step()


def test_after_remove_a_step_says_why_it_cannot_go_on():
    model = make_model()
    optimizer = SecondOrderOptimizer(model, **EACH)
    train(model, optimizer, [0])
    optimizer.remove()
    with pytest.raises(RuntimeError, match=r"optimizer\.remove\(\) has taken its hooks away"):
        train(model, optimizer, [1])


def test_a_bad_row_does_not_reach_the_parameters_and_is_counted():
    model = make_model()
    optimizer = SecondOrderOptimizer(model, approx="full", rows_limit=1, damping=0.5, **PLAIN)
    before = flat(model.parameters())
    backward(model)
    optimizer.engine.blocks[0].pending.tensors["kept"][0].uses[0][0].s[0, 0] = torch.nan
    optimizer.step()
    gradient = flat(p.grad for p in model.parameters())
    close(before - flat(model.parameters()), gradient / gradient.norm().clamp_min(1))
    assert optimizer.metrics()["skipped_measurements"] == 1
    with pytest.warns(UserWarning, match="block 'full': 1 curvature measurements were not finite"):
        train(model, optimizer, [1])


def test_an_indefinite_gram_matrix_is_tried_again_in_float64_with_more_damping(monkeypatch):
    model = make_model()
    optimizer = SecondOrderOptimizer(model, approx="full", rows_limit=1, damping=0.5, **PLAIN)
    gram = JacobianRows.gram

    def indefinite(self):
        matrix = gram(self)
        matrix[0, 0] = -1.0
        return matrix

    with monkeypatch.context() as patch:
        patch.setattr(JacobianRows, "gram", indefinite)
        train(model, optimizer, [0])
    assert optimizer.metrics()["failed_factorisations"] == 1 and flat(model.parameters()).isfinite().all()
    x, y = BATCHES[1]
    ggn = oracles.ggn(model, LOSS, x, y, list(model.named_parameters()))
    before = flat(model.parameters())
    with pytest.warns(UserWarning, match="1 factorisations failed"):
        train(model, optimizer, [1])
    g = flat(p.grad for p in model.parameters())
    close(before - flat(model.parameters()), oracles.solve_dense(ggn, g, 5.0))


# --- groups ---------------------------------------------------------------------------------------------------


def test_named_parameters_and_groups_of_them():
    model, other = make_model(), make_model()
    named = SecondOrderOptimizer(model, model.named_parameters())
    groups = [{"params": other[0].named_parameters()}, {"params": other[2].named_parameters(), "lr": 0.1}]
    grouped = SecondOrderOptimizer(other, groups)
    assert named.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    train(model, named, [0])
    train(other, grouped, [0])
    close(flat(other.parameters()), flat(model.parameters()), 1e-12)


KEYS_OF_SCHEDULERS = ["initial_lr", "max_lr", "base_momentum", "swa_lr"]
KEYS_OF_USERS = ["name", "lr_scale", "no_decay", "layer"]
MISSPELT = ["dampng", "damp", "dampening", "approximation", "curvature_type", "ema", "ema_deacy", "update_freq", "lrs"]


@pytest.mark.parametrize("key", KEYS_OF_SCHEDULERS)
def test_keys_of_schedulers_may_stand_in_groups(key):
    model = make_model()
    optimizer = SecondOrderOptimizer(model, [{"params": model.parameters(), key: 1.0}])
    assert optimizer.param_groups[0][key] == 1.0


@pytest.mark.parametrize("key", [*MISSPELT, *KEYS_OF_USERS, "kl_clip", "loss_fn", "seed"])
def test_keys_that_are_no_option_of_a_group_raise(key):
    model = make_model()
    with pytest.raises(ValueError, match=key):
        SecondOrderOptimizer(model, [{"params": model.parameters(), key: 1.0}])


@pytest.mark.parametrize(
    "bad", [{"damping": -1.0}, {"dampng": 1.0}, {"approx": "kfca"}, {"lr": -1.0}, {"approx": "diag"}, {"params": None}]
)
def test_a_refused_group_leaves_the_optimizer_as_it_was(bad):
    model = make_model()
    optimizer = SecondOrderOptimizer(model, [*model[2].parameters(), model[0].weight])
    params = [make_model()[0].weight] if "params" in bad else [model[0].bias]
    with pytest.raises(ValueError):
        optimizer.add_param_group({**bad, "params": params})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, [0, 1])
    assert optimizer.metrics()["step"] == 2


def test_a_group_added_later_keeps_what_the_others_have_measured_though_their_damping_has_changed():
    model = make_model()
    optimizer = SecondOrderOptimizer(model, model[2].parameters(), update_every=5)
    train(model, optimizer, [0])
    statistics = {key: value.clone() for key, value in optimizer.engine.blocks[0].tensors.items()}
    optimizer.param_groups[0].update(damping=0.5, ema_decay=0.5)
    optimizer.add_param_group({"params": model[0].parameters(), "approx": "diag"})
    train(model, optimizer, [1])
    assert {block.name for block in optimizer.engine.blocks} == {"0", "2"}
    kept = next(block for block in optimizer.engine.blocks if block.name == "2")
    assert all(torch.equal(value, statistics[key]) for key, value in kept.tensors.items())


def test_full_joins_the_layers_of_groups_that_agree():
    model = cases.seeded(lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 3)))
    groups = [{"params": layer.parameters(), "lr": 0.1 * k} for k, layer in enumerate(model, 1)]
    groups[3]["damping"] = 1.0
    optimizer = SecondOrderOptimizer(model, groups, approx="full")
    assert [(block.name, len(block.layers)) for block in optimizer.engine.blocks] == [("full", 3), ("full:3", 1)]
    train(model, optimizer, [0, 1])


def test_rows_belong_to_one_step():
    for options in ({"update_every": 2}, {"refactor_every": 2}, {"update_every": lambda t: 1}):
        with pytest.raises(ValueError, match="update_every=1 and refactor_every=1"):
            SecondOrderOptimizer(make_model(), approx="full", rows_limit=4, **options)


@pytest.mark.parametrize(
    "options",
    [{"lr": True}, {"lr": "0.1"}, {"lr": math.inf}, {"lr": torch.ones(2)}, {"damping": True}, {"damping": math.nan},
     {"damping": torch.ones(2)}, {"samples": True}, {"samples": 1.5}, {"ema_decay": "0.9"}, {"kl_clip": "1"},
     {"kl_clip": 0.0}, {"seed": 1.0}, {"seed": True}, {"update_every": True}, {"update_every": lambda t: 0},
     {"refactor_every": 1.5}, {"nesterov": 1}, {"maximize": "no"}, {"l2": math.inf}, {"weight_decay": None},
     {"class_dim": "1"}, {"class_dim": True}, {"grad_scaler": 2.0}, {"output_fn": 3}, {"loss_fn": 3},
     {"rows_limit": True}, {"damping_type": "tikhonov"}, {"approx": "operator"}],
    ids=lambda options: re.sub(r" at 0x\w+", "", str(options)),  # the workers of xdist must agree
)  # fmt: skip
def test_a_wrong_argument_is_named_with_what_came_and_what_is_allowed(options):
    (key,) = options
    with pytest.raises((ValueError, TypeError), match=rf"{key}.*(pass|allowed|return|known)"):
        SecondOrderOptimizer(make_model(), **options)


def test_a_preconditioner_takes_no_closure():
    with pytest.raises(ValueError, match="closure"):
        Preconditioner(make_model()).step(lambda: None)


# --- what it says of itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("damping_type", ["factored", "exact"])
@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_the_summary_counts_the_bytes_that_are_held(approx, damping_type):
    model = make_model()
    optimizer = SecondOrderOptimizer(model, approx=approx, damping_type=damping_type, **EACH)
    train(model, optimizer, range(3))
    lines = optimizer.summary().splitlines()
    assert [line.split()[0] for line in lines[1:]] == [name for name, _ in model.named_parameters()]
    held = {}
    for block in optimizer.engine.blocks:
        saved = optimizer.state[block.params[0]]["curvature"]
        tensors = [*saved["tensors"].values(), *saved["factor"].values()]
        held[block.name] = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    for block in optimizer.engine.blocks:
        shown = next(line for line, p in zip(lines[1:], model.parameters(), strict=True) if p is block.params[0])
        assert int(shown.split()[-1].replace(",", "")) == sum(held[block.name].values())
    sizes = {"full": 43 * 43, "block": 25 * 25, "unit": 5 * 5 * 5}
    if damping_type == "factored" and approx in ("unit", "block", "full"):
        assert sum(held[optimizer.engine.blocks[0].name].values()) == 8 * 2 * sizes[approx]


def test_the_summary_says_what_has_no_curvature_and_why():
    model = make_model()
    model[2].bias.requires_grad_(False)
    groups = [{"params": model[0].parameters(), "approx": None}, {"params": model[2].parameters()}]
    optimizer = SecondOrderOptimizer(model, groups, samples=3)
    rows = {line.split()[0]: line for line in optimizer.summary().splitlines()}
    assert "plain gradient" in rows["0.weight"] and "frozen" in rows["2.bias"]
    assert "ggn(3)" in rows["2.weight"] and "3x5" in rows["2.weight"]


# --- accelerators ---------------------------------------------------------------------------------------------


class Syncs(TorchDispatchMode):
    """Counts what makes an accelerator wait: a value read, or a shape that depends on values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.pairwise
@pytest.mark.parametrize("momentum_type", ["raw", "preconditioned"])
@pytest.mark.parametrize("kind", ["ggn", "fisher", "empirical_fisher"])
@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_the_path_of_an_accelerator_takes_the_same_steps_and_reads_nothing_between_refreshes(
    approx, kind, momentum_type
):
    """Forward, backward and step, measuring every time; values are read when a factorisation is due."""
    options = {"approx": approx, "curv_type": kind, "refactor_every": 4, "momentum_type": momentum_type}
    options |= {"lr": torch.tensor(0.1, dtype=torch.float64), "weight_decay": 0.1, "l2": 0.1, "nesterov": True}
    results = []
    for device in (nullcontext, assume_accelerator):
        with device():
            model = make_model()
            optimizer = SecondOrderOptimizer(model, **options)
            for t in range(6):
                optimizer.zero_grad()
                with Syncs() as syncs:
                    backward(model, t)
                    optimizer.step()
                assert not syncs.found or device is nullcontext or t % 4 == 0
            results.append(flat(model.parameters()))
    close(*results, 1e-12)


@pytest.mark.parametrize("approx", ["kfac", "diag", "block"])
def test_a_refresh_reads_all_its_flags_at_once(approx, accelerator, monkeypatch):
    """However many layers there are; the eigendecomposition of torch reads its own."""
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (reads.append(self.shape), tolist(self))[1])
    model = cases.seeded(lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)), nn.Linear(4, 3)))
    optimizer = SecondOrderOptimizer(model, approx=approx, **EACH)
    train(model, optimizer, [0, 1])
    reads.clear()
    optimizer.zero_grad()
    backward(model, 2)
    with Syncs() as syncs:
        optimizer.step()
    assert len(reads) == 1 and not syncs.found


def test_adaptive_intervals_read_their_moves_at_once_and_nothing_while_they_rest(accelerator, monkeypatch):
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (reads.append(self.shape), tolist(self))[1])
    model = make_model()
    optimizer = SecondOrderOptimizer(
        model, samples=None, lr=0.0, momentum=0.0, update_every="adaptive", refactor_every="adaptive", refresh_warmup=0
    )
    for step in range(20):
        reads.clear()
        optimizer.zero_grad()
        due = sum(step >= pace.next for block in optimizer.engine.blocks for pace in block.refresh.paces.values())
        backward(model, 0)
        with Syncs() as syncs:
            optimizer.step()
        assert not syncs.found and [shape for shape in reads if len(shape) == 1] == ([(due,)] if due else [])
    assert not reads


def test_no_warning_without_a_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for approx in APPROXIMATIONS:
            model = make_model().float()
            optimizer = SecondOrderOptimizer(model, approx=approx, damping=1e-6)
            for x, y in BATCHES:
                optimizer.zero_grad()
                LOSS(model(x.float()), y).backward()
                optimizer.step()
