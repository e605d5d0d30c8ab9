"""Processes that do not train alike say so, all of them, before their models part or they wait for one another."""

import copy
from unittest import mock

import torch
from processes import network, part, together
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from torchcurv import SecondOrderOptimizer


def step_of(rank, opt, called, step):
    opt.zero_grad()
    x, y = part(step, rank)
    F.cross_entropy(called(x), y).backward()
    opt.step()


def sentence(rank, options, steps=1, change=lambda opt, step: None):
    """What is said; "" where all goes well. options: of each process."""
    model = network()
    opt = SecondOrderOptimizer(model, loss_fn="cross_entropy", **options[rank])
    called = DistributedDataParallel(model)
    try:
        for step in range(steps):
            change(opt, step)
            step_of(rank, opt, called, step)
    except RuntimeError as error:
        return str(error)
    return ""


def of_other_models(rank):
    """Gradients would be averaged by hand here, so that nothing else compares the models."""
    model = nn.Sequential(nn.Linear(4, 5 + rank), nn.Tanh(), nn.Linear(5 + rank, 3)).double()
    group = torch.distributed.group.WORLD
    opt = SecondOrderOptimizer(model, loss_fn="cross_entropy", process_group=group)
    try:
        step_of(rank, opt, model, 0)
    except RuntimeError as error:
        return str(error)


def of_a_checkpoint(rank):
    """That is loaded in one process, where nothing is due for a while."""
    model = network()
    called = DistributedDataParallel(model)
    options = {"loss_fn": "cross_entropy", "update_every": 5, "refactor_every": 5}
    opt = SecondOrderOptimizer(model, **options)
    for step in range(2):
        step_of(rank, opt, called, step)
    saved = copy.deepcopy(opt.state_dict())
    opt.remove()
    fresh = SecondOrderOptimizer(model, **options)
    if rank == 0:
        fresh.load_state_dict(saved)
    try:
        step_of(rank, fresh, called, 2)
    except RuntimeError as error:
        return str(error)


def halved_in_one(rank):
    def change(opt, step):
        opt.param_groups[0]["lr"] *= 0.5 if rank == 1 and step == 2 else 1.0

    return change


def halved(opt, step):
    opt.param_groups[0]["lr"] *= 0.5


def messages(rank):
    """The sizes of what is sent in each of some steps in which the learning rate changes, but for gradients."""
    sent, steps = [], []
    original = torch.distributed.all_reduce

    def noted(tensor, *args, **kwargs):
        sent.append((str(tensor.dtype), tensor.numel()))
        return original(tensor, *args, **kwargs)

    def change(opt, step):
        halved(opt, step)
        steps.append(list(sent))
        sent.clear()

    with mock.patch("torch.distributed.all_reduce", noted):
        options = {"update_every": 2, "refactor_every": 2, "lr": 0.1, "samples": None}
        assert not sentence(rank, (options, options), 6, change)
    return steps


def all_said(rank):
    base = {"lr": 0.1}
    return {
        "same": sentence(rank, (base, base), 3),
        "same, changed": sentence(rank, (base, base), 3, halved),
        "lr": sentence(rank, (base, {"lr": 0.2})),
        "damping": sentence(rank, ({**base, "damping": 0.1}, {**base, "damping": 0.2})),
        "intervals": sentence(rank, ({**base, "update_every": 2}, {**base, "update_every": 3})),
        "approximation": sentence(rank, (base, {**base, "approx": "lowrank"})),
        "changed in one": sentence(rank, (base, base), 4, halved_in_one(rank)),
        "model": of_other_models(rank),
        "checkpoint": of_a_checkpoint(rank),
        "messages": messages(rank),
    }


def test_processes_that_do_not_train_alike_say_so():
    first, second = together(all_said)
    assert first == second
    assert not first["same"] and not first["same, changed"]
    for name, words in {
        "lr": "lr= of group 0 is 0.1 in process 0 and 0.2 in process 1",
        "damping": "damping= of group 0 is 0.1 in process 0 and 0.2 in process 1",
        "intervals": "update_every= of group 0 is 2 in process 0 and 3 in process 1",
        "approximation": "approx= of group 0 is 'kfac' in process 0 and 'lowrank' in process 1",
        "changed in one": "lr= of group 0 is 0.1 in process 0 and 0.05 in process 1",
        "model": "(5, 4), (5,), due in process 0 and",
        "checkpoint": "the number of steps taken is 2 in process 0 and 0 in process 1",
    }.items():
        assert words in first[name] and "Build the same model" in first[name], (name, first[name])
    # of a due step one small message and the statistics, whatever has changed; of others, none
    due = first["messages"][1:]
    assert [len(step) for step in due] == [2, 0, 2, 0, 2]
    assert all(step[0] == ("torch.int64", 10) for step in due if step)
