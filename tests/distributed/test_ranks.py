"""Several processes train one model: they stay equal, and equal one process that accumulates their parts."""

from unittest import mock

import pytest
import torch
from processes import NETWORKS, STEPS, WORLD, N, network, part, together, weights
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from torchcurv import Preconditioner, SecondOrderOptimizer, VIOptimizer
from torchcurv.curv.approximations.low_rank import LowRank
from torchcurv.curv.numerics import assume_accelerator
from torchcurv.optim import AdaHesScale, CGNewton

OPTIONS = {
    **{f"{a}": {"approx": a} for a in ("kfac", "ekfac", "diag", "unit", "block", "full", None)},
    "kfac, empirical": {"curv_type": "empirical_fisher"},
    "kfac, hessian": {"curv_type": "hessian", "approx": "diag"},
    "input": {"curv_type": "input", "lr": 0.01},
    "kfac, adaptive": {"update_every": "adaptive", "refactor_every": "adaptive"},
    "kfac, at intervals": {"update_every": 2, "refactor_every": 2},
    "drawn signals": {"samples": 1},
    "drawn labels": {"samples": 2, "curv_type": "fisher"},
    "drawn, by elements": {"samples": 1, "approx": "diag"},
    "Hutchinson": {"samples": 1, "curv_type": "hessian", "approx": "diag", "hessian_method": "hutchinson"},
}


def trained(rank, name, options, network, wrap):
    model = NETWORKS[network]()
    exact = {} if options.get("curv_type") in ("input", "hessian", "empirical_fisher") else {"samples": None}
    every = {"update_every": 1, "refactor_every": 1, "lr": 0.1, "momentum": 0.9, **exact, **options}
    called = DistributedDataParallel(model) if wrap else model
    opt = SecondOrderOptimizer(model, loss_fn="cross_entropy", **every)
    for step in range(STEPS):
        opt.zero_grad()
        for r in [rank] if wrap else range(WORLD):
            x, y = part(step, r)
            loss = F.cross_entropy(called(x), y)
            (loss if wrap else loss / WORLD).backward()
        opt.step()
    return weights(model).tolist()


def static(rank):
    """Of a wrapper whose first gradients are averaged by a callback, and of one that is none; by modules and names."""
    found = []
    for loss_fn in (nn.CrossEntropyLoss(), "cross_entropy"):
        for options in ({}, {"static_graph": True}):
            model = network()
            wrapped = DistributedDataParallel(model, **options)
            opt = SecondOrderOptimizer(model, loss_fn=loss_fn, update_every=2, refactor_every=2)
            for step in range(STEPS):
                opt.zero_grad()
                x, y = part(step, rank)
                (loss_fn if isinstance(loss_fn, nn.Module) else F.cross_entropy)(wrapped(x), y).backward()
                opt.step()
            found.append(weights(model).tolist())
    return found


def test_a_static_graph_averages_its_gradients():
    first, second = together(static)
    assert first == second
    assert first[0] == first[1] and first[2] == first[3]


CONTROLLED = {
    "all": {"model_samples": None},
    "a part": {"model_samples": 3},
    "relative": {"model_samples": None, "damping_scale": "relative"},
    "checked at each step": {"model_samples": None, "damping_interval": 1},
    "model alone": {"model_samples": None, "damping_rule": "fixed"},
    "damping alone": {"model_samples": None, "step_rule": "fixed"},
}


def controlled(rank, wrap=True):
    """Automatic step control on parts of equal size; at its third step the loss of all is a hundred times as large."""
    return {name: controlled_by(options, rank, wrap) for name, options in CONTROLLED.items()}


def controlled_by(options, rank, wrap):
    model, loss_fn = network(), nn.CrossEntropyLoss()
    called = DistributedDataParallel(model) if wrap else model
    own = {"step_rule": "quadratic", "damping_rule": "lm", "samples": None, "sharing": "expand", **options}
    opt = SecondOrderOptimizer(model, loss_fn=loss_fn, update_every=1, refactor_every=1, **own)
    for step in range(7):
        parts = [part(step, 0), part(step + 100, 0)]
        x, y = (torch.cat(a) for a in zip(*(parts[rank : rank + 1] if wrap else parts), strict=True))
        x = x * (100 if step == 3 else 1)
        opt.step(lambda x=x, y=y: loss_fn(called(x), y))
    known = opt.metrics()
    return [*weights(model).tolist(), opt.param_groups[0]["damping"], known.get("rejected_steps", 0.0)]


def test_step_control_decides_alike():
    first, second = together(controlled)
    assert first == second
    alone = controlled(0, wrap=False)
    for name in CONTROLLED:
        if name != "a part":  # which is another part
            found, expected = (torch.tensor(x[name], dtype=torch.float64) for x in (first, alone))
            assert (found - expected).norm() <= 1e-9 * expected.norm(), (name, found, expected)


POSTERIORS = {
    "diag": {"approx": "diag"},
    "kfac": {"approx": "kfac"},
    "pairs": {"approx": "kfac", "antithetic": True, "shared_noise": True, "update_every": 2},
    "several draws": {"approx": "diag", "num_samples": 3},
    "sums": {"approx": "diag", "loss_fn": nn.CrossEntropyLoss(reduction="sum")},
    "same draws": {"approx": "kfac", "draws": "same", "samples": None},
    "price": {"approx": "diag", "curv_type": "hessian", "hessian_method": "price", "init_precision": 20.0},
}


def posterior(options, rank, wrap=True):
    """Without a wrapper one process with the parts of all, at the same draw."""
    model = network()
    wrapped = DistributedDataParallel(model) if wrap else model
    loss_fn = options.get("loss_fn", nn.CrossEntropyLoss())
    given = {"dataset_size": 2 * N, "loss_fn": loss_fn, "lr": 0.02, "update_every": 1, "refactor_every": 1}
    opt = VIOptimizer(model, **{**given, **options})
    for step in range(STEPS):

        def closure(step=step):
            opt.zero_grad()
            parts = [part(step, r) for r in ([rank] if wrap else range(WORLD))]
            losses = [loss_fn(wrapped(x), y) / len(parts) for x, y in parts]
            for loss in losses:
                loss.backward()
            return sum(losses)

        opt.step(closure)
    kept = [x.flatten() for block in opt.blocks.values() for x in block.tensors.values() if x.dim()]
    return [*weights(model).tolist(), *torch.cat(kept).tolist()]


def all_posteriors(rank):
    return {name: posterior(options, rank) for name, options in POSTERIORS.items()}


def test_posteriors_stay_equal():
    first, second = together(all_posteriors)
    assert first == second
    assert all(torch.tensor(found).isfinite().all() for found in first.values())
    assert len({tuple(found[:10]) for found in first.values()}) == len(POSTERIORS)
    name = "same draws"
    alone, found = (torch.tensor(x, dtype=torch.float64) for x in (posterior(POSTERIORS[name], 0, False), first[name]))
    assert (found - alone).norm() <= 1e-10 * alone.norm()


SOLVED = {
    "rows": {"approx": "block"},
    "one block": {"approx": "full"},
    "hessian": {"approx": "block", "curv_type": "hessian", "indefinite": "clip"},
    "warm": {"approx": "block", "warm_start": True, "cg_maxiter": 3},
    "operator": {"approx": "operator", "curv_type": "ggn"},
}


def solved(options, rank, wrap):
    model, loss_fn = network(), nn.CrossEntropyLoss()
    called = DistributedDataParallel(model) if wrap else model
    exact = {"cg_tol": 1e-13, "cg_maxiter": 200, "alpha": 0.1}
    opt = CGNewton(model, loss_fn=loss_fn, lr=0.1, **{**exact, **options})
    for step in range(3):
        opt.zero_grad()
        parts = [part(step, 0), part(step + 100, 0)]
        x, y = (torch.cat(a) for a in zip(*(parts[rank : rank + 1] if wrap else parts), strict=True))
        if options["approx"] == "operator":
            opt.step(lambda x=x, y=y: (loss_fn(f := called(x), y), f))
        else:
            loss_fn(called(x), y).backward()
            opt.step()
    return weights(model).tolist()


def all_solved(rank, wrap=True):
    return {name: solved(options, rank, wrap) for name, options in SOLVED.items()}


def test_conjugate_gradients_equal_those_of_the_whole_batch():
    first, second = together(all_solved)
    assert first == second
    for name, expected in all_solved(0, False).items():
        found, expected = (torch.tensor(x, dtype=torch.float64) for x in (first[name], expected))
        assert (found - expected).norm() <= 1e-8 * expected.norm(), (name, (found - expected).norm())


def all_trained(rank, network):
    """Of every set of options; in one pair of processes, since starting them takes longer than training."""
    return {name: trained(rank, name, options, network, True) for name, options in OPTIONS.items()}


@pytest.mark.parametrize("network", NETWORKS)
def test_processes_are_equal_and_equal_micro_batches(network):
    first, second = together(all_trained, network)
    assert first == second  # bit for bit
    for name, options in OPTIONS.items():
        expected = torch.tensor(trained(0, name, options, network, False), dtype=torch.float64)
        found = torch.tensor(first[name], dtype=torch.float64)
        assert (found - expected).norm() <= 1e-10 * expected.norm(), name


def odd_ends(rank):
    """Sentences, and what becomes of batches without a measurement, of NaN, and of accumulation under no_sync."""
    said, x, y = {}, *part(0, rank)

    def attempt(name, make, called=None):
        model = network()
        try:
            opt = make(model)
            wrapped = (called or DistributedDataParallel)(model)  # which must live until backward()
            F.cross_entropy(wrapped(x), y).backward()
            opt.step()
            said[name] = weights(model).tolist()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"

    def by_name(model, **options):
        return SecondOrderOptimizer(model, loss_fn="cross_entropy", **options)

    attempt("not wrapped", by_name, lambda model: model)
    attempt("each for itself", lambda m: by_name(m, process_group=None), lambda model: model)
    attempt("own group", lambda m: by_name(m, process_group=torch.distributed.group.WORLD))
    attempt("preconditioner", lambda m: Preconditioner(m, loss_fn="cross_entropy"))

    attempt("adahesscale", lambda m: AdaHesScale(m, loss_fn="cross_entropy", lr=0.1))

    def loop(change, sync=True, loss_fn=None):
        model = network()
        wrapped, loss_fn = DistributedDataParallel(model), loss_fn or nn.CrossEntropyLoss()
        opt = SecondOrderOptimizer(model, loss_fn=loss_fn, update_every=1, refactor_every=1, samples=None)
        for step in range(3):
            opt.zero_grad()
            x, y = part(step, rank)
            x, y = change(step, x, y)
            if not sync:
                with wrapped.no_sync():
                    loss_fn(wrapped(x), y).backward()
            loss_fn(wrapped(x), y).backward()
            opt.step()
        return weights(model).tolist(), opt.metrics()["skipped_measurements"]

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = (nn.Linear(4, 4).double() for _ in range(3))

        def forward(self, x):
            return self.head((self.first if rank else self.second)(x).tanh())

    def by_branches():
        torch.manual_seed(0)
        model = Branches()
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        opt = by_name(model, update_every=1, refactor_every=1, samples=None)
        for step in range(3):
            opt.zero_grad()
            x, y = part(step, rank)
            F.cross_entropy(wrapped(x), y).backward()
            opt.step()
        return weights(model).tolist()

    def objecting(make=SecondOrderOptimizer, edited=False):
        """What is said where one process negates its loss, which on an accelerator is read in `step` alone, or edits
        its batch."""
        model, loss_fn = network(), nn.CrossEntropyLoss()
        opt, wrapped = make(model, loss_fn=loss_fn), DistributedDataParallel(model)
        x, y = part(0, rank)
        (loss_fn(wrapped(x), y) * (-1 if bad and not edited else 1)).backward()
        x.mul_(2) if bad and edited else None
        try:
            opt.step()
        except RuntimeError as error:
            return str(error)

    bad = rank == 1
    said["a layer of one process"] = by_branches()
    said["negative"] = objecting()
    said["negative, rows that stay"] = objecting(CGNewton)
    said["edited"] = objecting(lambda m, loss_fn: by_name(m, approx="full", rows_limit=1), edited=True)
    with mock.patch.object(LowRank, "gathered", ()):
        attempt("unknown", lambda m: by_name(m, approx="lowrank"))
    with assume_accelerator():
        said["negative, read late"] = objecting()
        said["negative, rows that stay, read late"] = objecting(CGNewton)
        said["agreed, read late"] = loop(lambda step, x, y: (x, y))
    said["nan"] = loop(lambda step, x, y: (x / 0 if bad and step == 1 else x, y))
    said["nothing counts"] = loop(
        lambda step, x, y: (x, torch.full_like(y, -100) if bad and step == 1 else y),
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
    )
    said["no_sync"] = loop(lambda step, x, y: (x, y), sync=False)
    return said


def test_sentences_and_odd_ends():
    first, second = together(odd_ends)
    for name in ("own group", "preconditioner", "adahesscale", "nan", "nothing counts", "no_sync", "agreed, read late"):
        assert first[name] == second[name], name
        assert not isinstance(first[name], str), (name, first[name])
    assert all(torch.tensor(first[name][0]).isfinite().all() for name in ("nan", "nothing counts", "no_sync"))
    assert first["a layer of one process"] == second["a layer of one process"]
    for name in (name for name in first if name.startswith("negative") or name == "edited"):
        assert first[name] == f"another process refuses what it measured, so that none steps: {second[name]}", name
        assert ("edited in place" if name == "edited" else "negative=") in second[name]
    assert first["nan"][1] == 2  # of two blocks
    assert first["each for itself"] != second["each for itself"]
    for said in (first, second):
        assert "LowRank does not say what several processes make of it: return zeros" in said["unknown"]
        assert "wrap the model in DistributedDataParallel, or pass process_group=" in said["not wrapped"]


def moved(rank):
    """To double precision after a step, with a process that has no data in the next."""
    model = network().float()
    called = DistributedDataParallel(model)
    opt = SecondOrderOptimizer(model, loss_fn=nn.CrossEntropyLoss(reduction="sum"), update_every=1, refactor_every=1)
    for step in range(3):
        if step == 1:
            model.double()
            called = DistributedDataParallel(model)
        opt.zero_grad()
        x, y = part(step, rank)
        y = torch.full_like(y, -100) if rank == step == 1 else y
        opt.loss_fn(called(x.to(next(model.parameters()))), y).backward()
        opt.step()
    return weights(model).tolist()


def test_models_that_move_to_another_precision_stay_equal():
    first, second = together(moved)
    assert first == second and torch.tensor(first).isfinite().all()


ADDITIVE = {
    **{a: {"approx": a, "samples": None} for a in ("kfac", "diag", "unit", "block", "full")},
    "fisher": {"curv_type": "fisher", "samples": None},
    "empirical": {"curv_type": "empirical_fisher", "approx": "block"},
    "hessian": {"curv_type": "hessian", "approx": "full"},
    "input": {"curv_type": "input", "lr": 0.01},
}


def of_equal_parts(name, layers, rank):
    model = NETWORKS[layers]()
    called = model if rank is None else DistributedDataParallel(model)
    every = {"update_every": 1, "refactor_every": 1, "lr": 0.1, "sharing": "expand", **ADDITIVE[name]}
    opt = SecondOrderOptimizer(model, loss_fn="cross_entropy", **every)
    for step in range(STEPS):
        parts = [part(step + 100 * r, 0) for r in (range(WORLD) if rank is None else [rank])]
        x, y = (torch.cat(both) for both in zip(*parts, strict=True))
        opt.zero_grad()
        F.cross_entropy(called(x), y).backward()
        opt.step()
    return weights(model).tolist()


def all_of_equal_parts(rank):
    return {(name, layers): of_equal_parts(name, layers, rank) for name in ADDITIVE for layers in NETWORKS}


def test_equal_parts_equal_the_whole_batch():
    """Where what is measured of a batch is a sum over its samples."""
    first, second = together(all_of_equal_parts)
    for (name, layers), own in first.items():
        assert own == second[name, layers]
        found, truth = (torch.tensor(x, dtype=torch.float64) for x in (own, of_equal_parts(name, layers, None)))
        assert (found - truth).norm() <= 1e-10 * truth.norm(), (name, layers, (found - truth).norm())
