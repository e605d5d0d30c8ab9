"""Factors that each process makes some of are those that all would make."""

import warnings
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from processes import STEPS, network, part, together, weights, wide
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchcurv import SecondOrderOptimizer, VIOptimizer
from torchcurv.curv.approximations.kronecker import Kronecker
from torchcurv.curv.distributed import Ranks
from torchcurv.curv.numerics import assume_accelerator
from torchcurv.optim.engine import placement
from torchcurv.optim.engine.placement import is_shared, owners_of

CE = nn.CrossEntropyLoss()
EVERY = {"update_every": 1, "refactor_every": 1, "lr": 0.1}
EXACT = {**EVERY, "samples": None}
POSTERIOR = {**EVERY, "dataset_size": 100, "lr": 0.02}
CASES = {
    **{a: (SecondOrderOptimizer, {**EXACT, "approx": a}) for a in ("kfac", "ekfac", "block", "unit", "full")},
    "in blocks": (SecondOrderOptimizer, {**EXACT, "factor_blocks": 2}),
    "exact": (SecondOrderOptimizer, {**EXACT, "damping_type": "exact"}),
    "relative": (SecondOrderOptimizer, {**EXACT, "damping_scale": "relative"}),
    "input": (SecondOrderOptimizer, {**EVERY, "curv_type": "input", "lr": 0.01}),
    "at intervals": (SecondOrderOptimizer, {**EXACT, "update_every": 2, "refactor_every": 2}),
    "adaptive": (SecondOrderOptimizer, {**EXACT, "update_every": "adaptive", "refactor_every": "adaptive"}),
    "draws": (VIOptimizer, {**POSTERIOR, "approx": "kfac"}),
    "draws, ekfac": (VIOptimizer, {**POSTERIOR, "approx": "ekfac"}),
    "draws apart": (VIOptimizer, {**POSTERIOR, "damping_type": "factored", "damping": 0.01}),
    "as on an accelerator": (SecondOrderOptimizer, EXACT),
    "nan": (SecondOrderOptimizer, EXACT),
    "failed": (SecondOrderOptimizer, EXACT),
}
ALONE = {"lowrank": {"approx": "lowrank"}, "diag": {"approx": "diag"}, "rows": {"approx": "full", "rows_limit": 1}}


def failing(self, tensors, *args):
    """K-FAC factors as they are, but that those of the first layer do not succeed."""
    factor, ok = Kronecker.made(self, tensors, *args)
    return factor, ok & (tensors["A"].shape[-1] != 5)


def reading(self, tensors, *args):
    """K-FAC factors by a rule that reads numbers."""
    assert tensors["A"].isfinite().all()
    return Kronecker.made(self, tensors, *args)


def run(name, rank, where):
    """Weights, what the optimizer counts, and the blocks that this process has factored."""
    make, options = CASES[name]
    model, made, original = wide() if name == "input" else network(), [], placement.factors_of
    called = DistributedDataParallel(model)
    opt = make(model, loss_fn=CE, **options, factor_placement=where)

    def noted(block, *args):
        made.append(block.name)
        return original(block, *args)

    def step(k):
        x, y = part(k, rank)
        x = x / 0 if name == "nan" and k == rank == 1 else x
        fails = mock.patch.object(Kronecker, "factor", failing) if name == "failed" and k == 1 else mock.MagicMock()
        with fails:
            opt.step(lambda: backward(called, opt, x, y))

    with (
        mock.patch.object(placement, "factors_of", noted),
        mock.patch.object(Kronecker, "made", Kronecker.factor, create=True),
        assume_accelerator() if name == "as on an accelerator" else nullcontext(),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        for k in range(STEPS):
            step(k)
    numbers = opt.metrics()
    counts = {key: numbers[key] for key in ("factorisations", "skipped_measurements", "failed_factorisations")}
    warned = sorted(str(one.message) for one in said if "block" in str(one.message))
    return weights(model), counts, warned, made


def backward(called, opt, x, y):
    opt.zero_grad()
    loss = CE(called(x), y)
    loss.backward()
    return loss


def all_runs(rank):
    return {name: [run(name, rank, where) for where in ("replicated", "shared")] for name in CASES}


def test_shared_factors_are_those_that_all_would_make():
    first, second = together(all_runs)
    for name in CASES:
        (expected, counts, warned, _), (found, counts_too, warned_too, own) = first[name]
        assert torch.equal(found, second[name][1][0]), name  # bit for bit
        assert torch.equal(expected, second[name][0][0]), name
        assert found.isfinite().all() and (found - expected).norm() <= 1e-10 * expected.norm(), name
        assert counts == counts_too == second[name][1][1] and warned == warned_too, name
        others = second[name][1][3]
        assert not set(own) & set(others) and len(own) + len(others) == counts["factorisations"], (name, own, others)
    assert first["nan"][1][1]["skipped_measurements"] == 2
    assert first["failed"][1][1]["failed_factorisations"] == 1 and first["failed"][1][2]


def odd_ends(rank):
    found = {}

    def steps(model, count=1, **options):
        opt = SecondOrderOptimizer(model, loss_fn=CE, **{**EXACT, "factor_placement": "shared", **options})
        called, sent = DistributedDataParallel(model), []
        original = Ranks.spread_

        def noted(self, tensors, owners):
            sent[-1] += [(owner, x.numel()) for x, owner in zip(tensors, owners, strict=True)]
            original(self, tensors, owners)

        try:
            with mock.patch.object(Ranks, "spread_", noted):
                for k in range(count):
                    sent.append([])
                    opt.step(lambda k=k: backward(called, opt, *part(k, rank)))
        except (RuntimeError, ArithmeticError) as error:
            return f"{type(error).__name__}: {error}"
        return sent

    found["messages"] = steps(network(), 6, update_every=3, refactor_every=3)
    found["auto"] = steps(network(), factor_placement="auto")
    with mock.patch.object(placement, "PAYS", 1):
        found["auto, where it pays"] = steps(network(), factor_placement="auto")
    for name, options in ALONE.items():
        found[name] = steps(network(), **options)
    with (
        mock.patch.object(Kronecker, "made", Kronecker.factor, create=True),
        mock.patch.object(Kronecker, "factor", reading),
    ):
        found["reading"] = steps(network())
    found["unlike"] = steps(network(), factor_placement=("shared", "replicated")[rank])
    raising = mock.Mock(side_effect=ArithmeticError("no memory"))
    with mock.patch.object(placement, "factors_of", raising) if rank else mock.MagicMock():
        found["raised"] = steps(network())
    return found


def test_what_is_sent_and_when():
    first, second = together(odd_ends)
    sizes = [(1, 15), (1, 21), (1, 1), (0, 28), (0, 6), (0, 1)]  # triangles of 5 and 6, of 7 and 3, and whether each is
    assert sorted(first["messages"][0]) == sorted(sizes) and first["messages"] == second["messages"]
    assert [len(step) for step in first["messages"]] == [6, 0, 0, 6, 0, 0]
    assert first["auto"] == [[]] and first["auto, where it pays"] == [first["messages"][0]]
    assert all(first[name] == [[]] for name in (*ALONE, "reading"))
    assert "factor_placement= is 'shared' in process 0 and 'replicated' in process 1" in first["unlike"]
    assert first["unlike"] == second["unlike"]
    assert second["raised"] == "ArithmeticError: no memory"
    assert "another process could not make its factors, so that none steps: ArithmeticError" in first["raised"]


def test_the_most_expensive_go_first_to_whoever_has_least_to_do():
    assert owners_of([1, 8, 5, 4, 1], 2) == [0, 0, 1, 1, 0]
    assert owners_of([3, 3, 3], 8) == [0, 1, 2]
    assert owners_of([1, 9, 1, 1], 8) == [1, 0, 1, 1]  # no more messages than it takes
    assert owners_of([], 2) == []
    assert is_shared("shared", [1], [0]) and not is_shared("replicated", [1e12, 1e12], [0, 1])
    assert is_shared("auto", [1e12, 1e12], [0, 1]) and not is_shared("auto", [1e12], [0])


def test_other_placements_are_refused():
    with pytest.raises(ValueError, match="factor_placement"):
        SecondOrderOptimizer(network(), factor_placement="everywhere")
