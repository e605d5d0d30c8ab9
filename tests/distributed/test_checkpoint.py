"""A checkpoint of two processes goes on in one, and in four, as if nothing had happened: keys are by parameter."""

import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import network, part, together, weights
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from torchcurv import SecondOrderOptimizer
from torchcurv.optim import CGNewton

BEFORE, AFTER = 3, 3  # steps
EXACT = {"loss_fn": "cross_entropy", "samples": None, "lr": 0.1}
ADAPTIVE = {"update_every": "adaptive", "refactor_every": "adaptive", "refresh_warmup": 1}
CASES = {
    "kfac": (SecondOrderOptimizer, EXACT),
    "intervals": (SecondOrderOptimizer, {**EXACT, "update_every": 3, "refactor_every": 2, "momentum": 0.9}),
    "adaptive": (SecondOrderOptimizer, {**EXACT, **ADAPTIVE, "approx": "ekfac"}),
    "full": (SecondOrderOptimizer, {**EXACT, "approx": "full"}),
    "low rank": (SecondOrderOptimizer, {**EXACT, "approx": "lowrank"}),
    "CG": (CGNewton, {"loss_fn": "cross_entropy", "cg_maxiter": 5, "cg_tol": 0.0, "samples": None}),
}


def made(name, parallel):
    model = network()
    called = DistributedDataParallel(model) if parallel else model
    make, options = CASES[name]
    return called, make(model, **options)


def train(called, optimizer, steps, ranks, share=1.0):
    for step in steps:
        optimizer.zero_grad()
        for rank in ranks:
            x, y = part(step, rank)
            (nn.functional.cross_entropy(called(x), y) * share).backward()
        optimizer.step()


def saved(rank, folder):
    for name in CASES:
        called, optimizer = made(name, True)
        train(called, optimizer, range(BEFORE), [rank])
        state = {"model": get_model_state_dict(called), "optimizer": get_optimizer_state_dict(called, optimizer)}
        dcp.save(state, checkpoint_id=f"{folder}/{name}")


def resumed(rank, folder):
    """rank: None for one process."""
    found = {}
    for name in CASES:
        called, optimizer = made(name, rank is not None)
        state = {"model": get_model_state_dict(called), "optimizer": get_optimizer_state_dict(called, optimizer)}
        dcp.load(state, checkpoint_id=f"{folder}/{name}", no_dist=rank is None)
        set_model_state_dict(called, state["model"])
        set_optimizer_state_dict(called, optimizer, state["optimizer"])
        train(called, optimizer, range(BEFORE, BEFORE + AFTER), [0 if rank is None else rank])
        found[name] = weights(called).tolist()
    return found


def quietly(job, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own, of what it will change
        return job(*arguments)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed.checkpoint", "ignore::FutureWarning")
def test_a_checkpoint_of_two_processes_goes_on_in_one_and_in_four(tmp_path):
    assert not distributed.is_initialized()
    together(saved, str(tmp_path))
    found = {1: [quietly(resumed, None, str(tmp_path))], 4: together(resumed, str(tmp_path), world=4)}
    for name in CASES:
        for world, each in found.items():
            assert all(own[name] == each[0][name] for own in each), (name, world)
            called, optimizer = made(name, False)
            train(called, optimizer, range(BEFORE), [0, 1], 1 / 2)
            train(called, optimizer, range(BEFORE, BEFORE + AFTER), range(world), 1 / world)
            truth, own = weights(called), torch.tensor(each[0][name], dtype=torch.float64)
            assert (own - truth).norm() <= 1e-10 * truth.norm(), (name, world, (own - truth).norm())
