"""State: a resumed run is the uninterrupted one, bit for bit; copies work in pairs."""

import copy
import io
import pickle

import cases
import pytest
import torch
from torch import nn

from torchcurv import Preconditioner, SecondOrderOptimizer

APPROXIMATIONS = cases.APPROXIMATIONS
KINDS = ["ggn", "fisher", "empirical_fisher"]


def make_model(dtype=torch.float32):
    return cases.seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).to(dtype)


def batch(t, dtype=torch.float32):
    return cases.randn(6, 4, seed=t).to(dtype), torch.randint(3, (6,), generator=torch.Generator().manual_seed(t))


def train(model, optimizer, steps):
    dtype = next(model.parameters()).dtype
    for t in steps:
        optimizer.zero_grad()
        x, y = batch(t, dtype)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(options, stop, dtype, end=12):
    """(parameters of the uninterrupted run, of the one that was saved after `stop` steps and resumed)."""
    model, other = make_model(dtype), make_model(dtype)
    optimizer = SecondOrderOptimizer(model, **options)
    train(model, optimizer, range(stop))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(stop, end))
    other.load_state_dict(saved["model"])
    again = SecondOrderOptimizer(other, **{**options, "lr": 0.7})
    again.load_state_dict(saved["optimizer"])
    train(other, again, range(stop, end))
    return list(model.parameters()), list(other.parameters())


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_resuming_in_the_middle_of_an_interval_changes_no_bit(approx, kind, dtype):
    options = {"approx": approx, "curv_type": kind, "lr": 0.05, "update_every": 3, "refactor_every": 5}
    for stop in (1, 4, 7):
        ours, theirs = resumed(options, stop, dtype)
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("indefinite", ["abs", "clip", "shift"])
@pytest.mark.parametrize("approx", ["block", "unit", "kfac", "diag", "lowrank"])
def test_resuming_with_the_hessian(approx, indefinite):
    options = {"approx": approx, "curv_type": "hessian", "indefinite": indefinite, "lr": 0.05, "rank": 4}
    ours, theirs = resumed({**options, "update_every": 3, "refactor_every": 5}, 4, torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("damping_type", ["factored", "exact"])
@pytest.mark.parametrize("momentum_type", ["raw", "preconditioned"])
def test_resuming_with_schedules_given_again(damping_type, momentum_type):
    options = {"damping_type": damping_type, "momentum_type": momentum_type, "update_every": lambda t: 1 + t // 4}
    ours, theirs = resumed({**options, "lr": 0.05, "refactor_every": lambda t: 2}, 5, torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_rows_resume_where_every_step_has_its_own():
    ours, theirs = resumed({"approx": "full", "rows_limit": 4, "lr": 0.05}, 5, torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def leaves(value):
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    else:
        yield value


@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_state_is_tensors_numbers_and_dicts_of_them_and_statistics_stay_float32(approx):
    model = make_model(torch.bfloat16)
    optimizer = SecondOrderOptimizer(model, approx=approx)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()["state"]
    assert all(isinstance(leaf, torch.Tensor | int | float) for leaf in leaves(state))
    fresh = SecondOrderOptimizer(make_model(torch.bfloat16), approx=approx)
    fresh.load_state_dict(state_dict := optimizer.state_dict())
    for one, other in zip(leaves(state), leaves(fresh.state_dict()["state"]), strict=True):
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype != torch.bfloat16
            assert one.data_ptr() != other.data_ptr()
    assert state_dict["param_groups"][0]["approx"] == approx


@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_a_copied_pair_goes_on_like_the_original_and_apart_from_it(approx):
    model = make_model()
    optimizer = SecondOrderOptimizer(model, approx=approx, update_every=2, refactor_every=3)
    train(model, optimizer, range(4))
    other, copied = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(4, 9))
    train(other, copied, range(4, 9))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_an_optimizer_copied_alone_keeps_its_state_and_says_so_when_stepped(duplicate):
    model = make_model()
    optimizer = SecondOrderOptimizer(model)
    train(model, optimizer, range(2))
    alone = duplicate(optimizer)
    assert alone.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    with pytest.raises(RuntimeError, match="without its model"):
        alone.step()


def test_a_checkpoint_library_may_step_a_fresh_optimizer():
    model = make_model()
    optimizer = SecondOrderOptimizer(model, lr=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p in optimizer.state for p in model.parameters())
    optimizer.zero_grad()
    train(model, optimizer, range(2))


def test_a_step_without_gradients_is_none():
    model = make_model()
    optimizer = SecondOrderOptimizer(model)
    optimizer.step()
    assert not optimizer.state and optimizer.metrics()["step"] == 0


def test_preconditioner_resumes():
    runs = []
    for interrupt in (False, True):
        model = make_model()
        precond = Preconditioner(model, update_every=3, refactor_every=4)
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        for t in range(8):
            if interrupt and t == 5:
                saved = through_a_file(precond.state_dict())
                precond.remove()
                precond = Preconditioner(model, update_every=3, refactor_every=4)
                precond.load_state_dict(saved)
            sgd.zero_grad()
            x, y = batch(t)
            nn.functional.cross_entropy(model(x), y).backward()
            precond.step()
            sgd.step()
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))
