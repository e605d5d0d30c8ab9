"""The benchmark of one plain call: equal time in steps, tuning trials, what is stored is not run again, its page."""

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import pays, pays_problems, pays_report, pays_runs
from benchmarks.pays_runs import Contender


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Runs the program, quickly; one thread, and no SOAP, which is not among the packages of the tests."""
    soap = replace(pays.OPTIMIZERS["SOAP"], package=("not_installed_anywhere", "pytorch-optimizer"))
    monkeypatch.setitem(pays.OPTIMIZERS, "SOAP", soap)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    folder, page = tmp_path / "results" / "pays", tmp_path / "results" / "pays.md"
    common = ["--quick", "--problems", "mlp", "pinn", "--seeds", "0", "--results", str(folder), "--page", str(page)]
    return lambda *more: (pays.main([*common, *more]), folder, page)[1:]


def test_two_problems_run_are_kept_and_shown(quick, tmp_path, monkeypatch, capsys):
    folder, page = quick("--ours", "small clip: kl_clip=0.001")
    stored = json.loads((folder / "mlp.json").read_text())
    runs = {(run["name"], run["seed"]): run for run in stored["runs"]}
    assert set(runs) == {
        ("AdamW", 10), ("Muon", 10), ("AdamW", 0), ("Muon", 0), ("ours", 0), ("small clip", 0),
    }  # fmt: skip
    assert runs["small clip", 0]["options"] == {"kl_clip": 0.001} and runs["ours", 0]["options"] == {}
    assert runs["ours", 0]["rows"][0][0] == 0 and runs["ours", 0]["rows"][-1][0] == runs["ours", 0]["steps"]
    text = page.read_text()
    assert "| MLP, small digits (64) |" in text and "| differential equation (64) |" in text
    assert "| ahead on so many problems |" in text and "| small clip | 1 of 1 |" in text
    assert all((tmp_path / "images" / f"pays-{part}.png").exists() for part in ("test", "train"))
    monkeypatch.setattr(pays_runs, "train", None)  # all that is asked for now is in the results
    page.write_text(f"before\n{pays_report.START}\nold\n{pays_report.END}\nafter\n")
    quick("--ours", "small clip: kl_clip=0.001")
    assert "not installed" in capsys.readouterr().out
    shown = page.read_text()
    assert shown.startswith("before\n") and shown.endswith("after\n") and "\nold\n" not in shown


@pytest.mark.parametrize("name", pays_problems.PROBLEMS)
def test_every_problem_has_a_model_for_its_data(name):
    problem = pays_problems.PROBLEMS[name]
    training = pays_runs.Training(problem, Contender("AdamW", {"lr": 1e-3}), 0, 40)
    before = [p.clone() for p in training.model.parameters()]
    training.step()
    assert any(not torch.equal(p, q) for p, q in zip(before, training.model.parameters(), strict=True))
    found = training.look()
    assert all(value is None or math.isfinite(value) for value in found)
    assert (found[3] is None) == (not problem.labels) and training.model.training
    again = problem.model(0)
    assert all(torch.equal(p, q) for p, q in zip(before, again.parameters(), strict=True))


def test_the_text_is_read_once_and_then_ends():
    data = pays_problems.source_text(300)  # 50 of them to train on
    problem = replace(pays_problems.PROBLEMS["gpt"], data=lambda: data)
    batches = problem.batches(0)
    seen = [x for x, _ in (next(batches) for _ in range(3))]
    assert len({tuple(row.tolist()) for x in seen for row in x}) == 48
    with pytest.raises(RuntimeError, match="more steps than the text has windows"):
        next(batches)


def test_the_solution_of_the_equation_leaves_no_residual():
    equation = pays_problems.Equation(pays_problems.Equation.solution)
    found = equation.residuals(*next(pays_problems.points(0)))
    assert found["inside"].abs().max() < 1e-4 and found["border"].abs().max() < 1e-6 and equation.error() == 0


def test_the_same_time_is_counted_in_steps(tmp_path):
    store = pays_runs.Store(tmp_path, replace(pays_problems.PROBLEMS["mlp"], steps=1020))
    store.content["costs"] = {
        "AdamW": {"first": 20.0, "later": 1.0},
        "ours": {"first": 120.0, "later": 2.0},
        "very dear": {"first": 2000.0, "later": 9.0},
    }
    assert [store.steps(name) for name in store.content["costs"]] == [1020, 20 + (1020 - 120) // 2, 20]
    assert store.cost("ours") == pytest.approx(1020 / 470)


@pytest.mark.parametrize("best", [1e-4, 1e-3, 3e-3, 3e-2, 1e-1])
def test_rates_are_tried_towards_the_better_ones(best):
    tried = []
    found = pays.climb(lambda lr: tried.append(lr) or abs(math.log(lr / best)), pays.STARTS, 5)
    assert found == best and len(tried) == len(set(tried)) <= 5 and tried[:3] == pays.STARTS
    assert pays.climb(lambda lr: abs(math.log(lr / best)), [3e-3, 1e-2], 3) in (1e-3, 3e-3, 1e-2, 3e-2)


def test_rates_rise_and_then_fall_to_nothing():
    for schedule in ("linear", "cosine"):
        factors = [pays_runs.rate_factor(schedule, k, 100) for k in range(100)]
        assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and 0 < factors[-1] < 0.02
        assert factors[5:] == sorted(factors[5:], reverse=True)


def test_the_clip_follows_the_rate_where_that_is_asked_for():
    problem = pays_problems.PROBLEMS["mlp"]
    training = pays_runs.Training(problem, Contender("other", {"clip_follows": True, "kl_clip": 0.04}), 0, 40)
    training.step()  # the warm-up has two steps
    assert training.optimizer.settings["kl_clip"] == pytest.approx(0.04 / 4)
    training.close()


def test_a_run_that_diverges_is_stored_as_such(tmp_path):
    problem = pays_problems.shorter(pays_problems.PROBLEMS["targets"], 60)
    run = pays_runs.train(problem, Contender("AdamW", {"lr": 1e30}), 0, 60, 3)
    assert pays_runs.diverged(run) and pays_runs.final(run) == math.inf and len(run["rows"]) < 4
    json.dumps(run, allow_nan=False)


@pytest.mark.parametrize("text", ["no colon", "AdamW: lr=1", "ours: lr=1", ": lr=1"])
def test_what_is_no_setting_is_refused(text):
    with pytest.raises(ValueError, match="is no setting"):
        pays.settings([text])


@pytest.mark.parametrize("more", [["--seeds", "10"], ["--quick"]])
def test_no_results_from_the_tuning_seed_or_a_quick_run(more, capsys):
    with pytest.raises(SystemExit):
        pays.arguments(more)
    assert "tuning" in capsys.readouterr().err or more == ["--quick"]
