"""The race on a differential equation: residuals vanish at the solution, and both optimizers reach their targets."""

import math

import pytest
import torch

from benchmarks import poisson


@pytest.mark.parametrize("name", poisson.PROBLEMS)
def test_the_residuals_of_the_solution_are_zero(name):
    problem = poisson.Poisson(name, 0)
    problem.model = lambda x: sum(a * torch.sin(k * math.pi * x) for k, a in problem.waves.items())
    found = problem.residuals()
    assert found["inside"].abs().max() < 1e-10 and found["ends"].abs().max() < 1e-10
    assert problem.error() < 1e-12


def test_both_reach_their_targets_on_the_easier_problem():
    adam = poisson.adam("one", 0, lr=0.03, length=300, weight=100.0)
    newton = poisson.newton("one", 0, weight=10.0)
    assert math.isfinite(adam.first_at(poisson.ADAM_TARGET)[0]) and newton.first_at(poisson.NEWTON_TARGET)[0] < 40
    assert newton.first_at(0.0) == (math.inf, math.inf)


def test_the_table_has_a_row_for_each(monkeypatch):
    monkeypatch.setattr(poisson, "RATES", (0.03,))
    monkeypatch.setattr(poisson, "LENGTHS", (20,))
    monkeypatch.setattr(poisson, "WEIGHTS", (10.0,))
    assert poisson.race("one", [0], [1], rounds=1).row_count == 3
