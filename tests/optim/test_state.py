"""Saving, loading and copying, beyond plain resuming: other dtypes, other libraries, hooks, failures on the way."""

import copy
import pickle
import warnings

import cases
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from torchcurv import Preconditioner, SecondOrderOptimizer

APPROXIMATIONS = cases.APPROXIMATIONS


def make_model(dtype=torch.float32):
    return cases.seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).to(dtype)


def train(model, optimizer, steps, loss=nn.functional.cross_entropy):
    for t in steps:
        optimizer.zero_grad()
        x = cases.randn(6, 4, seed=t).to(next(model.parameters()))
        loss(model(x), torch.arange(6) % 3).backward()
        optimizer.step()


def equal(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def tensors(value, path=()):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, (*path, key))
    elif isinstance(value, torch.Tensor):
        yield path, value


# --- distributed checkpoint -----------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed.checkpoint", "ignore::FutureWarning")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("approx", [*APPROXIMATIONS, None])
def test_distributed_checkpoint_resumes_bit_for_bit(approx, steps, flatten, in_place, tmp_path):
    """in_place: the way that asks a fresh optimizer for the keys and shapes of what is to be read."""
    options = {"approx": approx, "update_every": 3, "refactor_every": 2}
    model, other, how = make_model(), make_model(), StateDictOptions(flatten_optimizer_state_dict=flatten)
    optimizer = SecondOrderOptimizer(model, **options)
    train(model, optimizer, range(steps))
    weights = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))
    again = SecondOrderOptimizer(other, **options)
    if in_place:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no process group: one process
            dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
            saved = get_optimizer_state_dict(other, again, options=how)
            dcp.load(saved, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other, again, saved, options=how)
    other.load_state_dict(weights)
    train(model, optimizer, range(steps, 10))
    train(other, again, range(steps, 10))
    assert equal(model, other)


@pytest.mark.parametrize("make", [SecondOrderOptimizer, Preconditioner])
@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_asking_a_fresh_optimizer_for_its_state_changes_nothing(approx, make):
    """The library steps it with zero gradients and rate 0; what is trained afterwards is as if it had not."""
    results = []
    for asked in (False, True):
        model = make_model()
        optimizer = make(model, approx=approx, **({"l2": 0.1} if make is SecondOrderOptimizer else {}))
        if asked:
            before = copy.deepcopy(model)
            state = get_optimizer_state_dict(model, optimizer)["state"]
            assert equal(model, before) and all(p.grad is None for p in model.parameters())
            assert state.keys() == dict(model.named_parameters()).keys()
            optimizer.load_state_dict(optimizer.state_dict())
            assert not any(block.average or block.factors["step"].ready for block in optimizer.engine.blocks)
        for t in range(3):
            train(model, optimizer, [t])
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.01 * p.grad
        results.append(model)
        assert optimizer.metrics()["step"] == 3
    assert equal(*results)


@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_the_keys_and_shapes_of_the_state_are_the_same_at_every_step(approx):
    model = make_model()
    optimizer = SecondOrderOptimizer(model, approx=approx)
    get_optimizer_state_dict(model, optimizer)
    shapes = []
    for t in range(4):
        shapes.append([(path, t.shape, t.dtype) for path, t in tensors(optimizer.state_dict()["state"])])
        train(model, optimizer, [t])
    assert all(sorted(shape, key=str) == sorted(shapes[0], key=str) for shape in shapes)


# --- loading --------------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_a_state_goes_into_a_model_of_another_dtype(approx, source, target):
    model, other = make_model(source), make_model(target)
    optimizer = SecondOrderOptimizer(model, approx=approx, update_every=2, refactor_every=3)
    train(model, optimizer, range(2))
    again = SecondOrderOptimizer(other)
    again.load_state_dict(optimizer.state_dict())
    train(other, again, range(2, 6))
    wanted = torch.promote_types(target, torch.float32)
    for path, t in tensors(again.state_dict()["state"]):
        assert t.dtype == wanted or not t.is_floating_point(), path
    assert all(p.dtype == target and p.isfinite().all() for p in other.parameters())


def test_loading_an_early_state_forgets_what_came_later():
    model = make_model()
    optimizer = SecondOrderOptimizer(model, update_every=3)
    fresh, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, range(5))
    first = copy.deepcopy(model)
    model.load_state_dict(weights)
    optimizer.load_state_dict(fresh)
    train(model, optimizer, range(5))
    assert equal(model, first) and optimizer.metrics()["step"] == 5


def test_what_is_loaded_is_not_shared_with_what_it_came_from():
    model, other = make_model(), make_model()
    optimizer = SecondOrderOptimizer(model)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    again = SecondOrderOptimizer(other)
    again.load_state_dict(state)
    train(other, again, range(3))
    for (path, one), (_, kept) in zip(tensors(state["state"]), tensors(before["state"]), strict=True):
        assert torch.equal(one, kept), path


def test_the_users_load_hooks_see_and_change_what_is_loaded():
    model, other, seen = make_model(), make_model(), []
    optimizer = SecondOrderOptimizer(model)
    train(model, optimizer, range(3))
    again = SecondOrderOptimizer(other)

    def double(_, state_dict):
        changed = copy.deepcopy(state_dict)
        for state in changed["state"].values():
            state["momentum_buffer"] *= 2
        return changed

    again.register_load_state_dict_pre_hook(double)
    again.register_load_state_dict_post_hook(lambda o: seen.append([dict(s) for s in o.state.values()]))
    again.load_state_dict(optimizer.state_dict())
    for p, q, state in zip(model.parameters(), other.parameters(), seen[0], strict=True):
        assert torch.equal(again.state[q]["momentum_buffer"], 2 * optimizer.state[p]["momentum_buffer"])
        assert state["momentum_buffer"] is again.state[q]["momentum_buffer"] and state["step"] == 3
    assert len(again._optimizer_load_state_dict_pre_hooks) == 1


def test_options_come_from_the_checkpoint_as_in_torch_and_missing_ones_from_here():
    model, other = make_model(), make_model()
    optimizer = SecondOrderOptimizer(model, approx="diag", lr=0.01, damping=0.5)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    del state["param_groups"][0]["ema_decay"]
    again = SecondOrderOptimizer(other, ema_decay=0.5)
    again.load_state_dict(state)
    group = again.param_groups[0]
    assert (group["approx"], group["lr"], group["damping"], group["ema_decay"]) == ("diag", 0.01, 0.5, 0.5)
    assert [block.options.approx for block in again.engine.blocks] == ["diag", "diag"]


def test_the_state_of_torchs_sgd_can_be_continued_from():
    model = make_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    train(model, sgd, range(2))
    optimizer = SecondOrderOptimizer(model)
    optimizer.load_state_dict(sgd.state_dict())
    p = next(model.parameters())
    assert torch.equal(optimizer.state[p]["momentum_buffer"], sgd.state[p]["momentum_buffer"])
    train(model, optimizer, range(2))
    assert optimizer.param_groups[0]["approx"] == "kfac"


def test_a_state_of_other_blocks_raises():
    model, other = make_model(), make_model()
    optimizer = SecondOrderOptimizer(model)
    train(model, optimizer, range(2))
    other[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="block '0' was saved with 25 parameters and has 20 now"):
        SecondOrderOptimizer(other, other.parameters()).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("approx", ["kfac", "block"])
def test_a_failure_before_saving_is_retried_and_counted_after_resuming(approx):
    model, other = make_model(), make_model()
    options = {"approx": approx, "update_every": 100, "refactor_every": 1, "damping": 0.5}
    optimizer = SecondOrderOptimizer(model, **options)
    train(model, optimizer, [0])
    name = "B" if approx == "kfac" else "matrix"
    for block in optimizer.engine.blocks:
        value = block.tensors[name]
        value.sub_(2 * torch.eye(value.shape[-1]))
    train(model, optimizer, [1])
    other.load_state_dict(model.state_dict())
    again = SecondOrderOptimizer(other, **options)
    again.load_state_dict(optimizer.state_dict())
    for m, o in ((model, optimizer), (other, again)):
        with pytest.warns(UserWarning, match="1 factorisations failed"):
            train(m, o, [2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(m, o, [3, 4])
    assert equal(model, other) and optimizer.metrics() == again.metrics()


def test_a_failure_on_an_accelerator_keeps_its_count_through_a_state(accelerator):
    model, other = make_model(), make_model()
    optimizer = SecondOrderOptimizer(model, update_every=1, refactor_every=100)
    train(model, optimizer, [0])
    x = torch.full((6, 4), 1e30)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), torch.arange(6) % 3).backward()
    optimizer.step()
    assert optimizer.metrics()["skipped_measurements"] >= 1
    again = SecondOrderOptimizer(other)
    again.load_state_dict(optimizer.state_dict())
    counts = ("step", "measurements", "factorisations", "skipped_measurements", "failed_factorisations")
    assert all(again.metrics()[key] == optimizer.metrics()[key] for key in counts)


# --- copies ---------------------------------------------------------------------------------------------------


def test_a_copied_pair_takes_its_copied_loss_module_along():
    model, loss = make_model(), nn.CrossEntropyLoss()
    optimizer = SecondOrderOptimizer(model, loss_fn=loss)
    train(model, optimizer, range(2), loss)
    other, other_loss, copied = copy.deepcopy((model, loss, optimizer))
    train(model, optimizer, range(2, 5), loss)
    train(other, copied, range(2, 5), other_loss)
    assert equal(model, other)


def test_two_pairs_may_share_a_loss_module():
    model, loss = make_model(), nn.CrossEntropyLoss()
    optimizer = SecondOrderOptimizer(model, loss_fn=loss)
    other, copied = copy.deepcopy((model, optimizer))
    for t in range(3):
        train(model, optimizer, [t], loss)
        train(other, copied, [t], loss)
    assert equal(model, other)


def test_a_copy_feeds_only_itself():
    model = make_model()
    optimizer = SecondOrderOptimizer(model, update_every=2)
    train(model, optimizer, range(3))
    other, copied = copy.deepcopy({"model": model, "optimizer": optimizer}).values()
    before = copy.deepcopy(optimizer.state_dict())
    train(other, copied, range(3, 6))
    for (path, one), (_, kept) in zip(tensors(optimizer.state_dict()), tensors(before), strict=True):
        assert torch.equal(one, kept), path
    assert not any(block.pending for block in optimizer.engine.blocks)


def test_the_optimizer_before_its_model_keeps_its_state_only_and_says_what_to_write():
    model = make_model()
    optimizer = SecondOrderOptimizer(model)
    train(model, optimizer, range(2))
    alone, other = copy.deepcopy((optimizer, model))
    assert list(alone.state) == list(other.parameters())
    for use in (alone.step, alone.summary, alone.metrics, lambda: alone.observe(torch.ones(1), torch.ones(1))):
        for p in other.parameters():
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match=r"deepcopy the pair \(model, optimizer\)"):
            use()
    with pytest.raises(RuntimeError, match=r"\(model, optimizer\)"):
        alone.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    alone.zero_grad()
    alone.remove()
    again = SecondOrderOptimizer(other)
    again.load_state_dict(alone.state_dict())
    train(model, optimizer, range(2, 4))
    train(other, again, range(2, 4))
    assert equal(model, other)


def test_schedules_do_not_stand_in_the_way_of_pickling():
    model = make_model()
    optimizer = SecondOrderOptimizer(model, update_every=lambda t: 1 + t // 2, refactor_every=lambda t: 2)
    train(model, optimizer, range(4))
    alone = pickle.loads(pickle.dumps(optimizer))
    assert alone.param_groups[0]["update_every"] == optimizer.param_groups[0]["update_every"]
    other, copied = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(4, 12))
    train(other, copied, range(4, 12))
    assert equal(model, other)


def test_a_schedule_given_as_the_default_holds_for_groups_added_later_and_after_copying():
    model = make_model()
    optimizer = SecondOrderOptimizer(model, model[0].parameters(), update_every=lambda t: 2)
    other, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (other, copied)):
        o.add_param_group({"params": m[2].parameters()})
        train(m, o, range(5))
        assert [block.refresh.next_update for block in o.engine.blocks] == [6, 6]
    assert equal(model, other)
