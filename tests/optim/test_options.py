"""Options are declared once: table, groups, bundles, and what a new one needs."""

import dataclasses
import inspect
from typing import Annotated, ClassVar, TypedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torchcurv
from torchcurv.curv import bundles
from torchcurv.curv.bundles import KFAC, AdaptiveDamping, Damping, Hessian, QuadraticModel, Refresh, flattened
from torchcurv.curv.checks import number
from torchcurv.curv.options import LIVE, OPTION_NAMES, Option, complete, table_of
from torchcurv.optim.base import CurvatureOptimizer

OPTIMIZERS = [torchcurv.SecondOrderOptimizer, torchcurv.Preconditioner, torchcurv.VIOptimizer]
OPTIMIZERS += [torchcurv.optim.CGNewton, torchcurv.optim.AdaHesScale, torchcurv.optim.DirectionalNewton]
BUNDLES = [b for _, b in inspect.getmembers(bundles, inspect.isclass) if issubclass(b, bundles.Bundle)]
BUNDLES = [b for b in BUNDLES if b is not bundles.Bundle]


def make_model():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def plain(optimizer):
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def take_step(model, optimizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(16, 4, generator=generator)), torch.arange(16) % 3).backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.__name__)
def test_every_option_of_an_optimizer_has_a_default_that_is_checked_and_a_meaning(optimizer):
    assert set(OPTION_NAMES) <= optimizer.table.keys()
    assert all(option.doc and option.scope in ("structure", "live", "optimizer") for option in optimizer.table.values())


PAIRS = [
    ({"approx": KFAC(sharing="reduce", factor_blocks=2)}, {"sharing": "reduce", "factor_blocks": 2}),
    ({"damping": Damping(0.2, type="exact")}, {"damping": 0.2, "damping_type": "exact"}),
    ({"refresh": Refresh(update_every=5, tol=0.2)}, {"update_every": 5, "refresh_tol": 0.2}),
    (
        {"curv_type": Hessian(method="exact", indefinite="clip"), "approx": "diag"},
        {"curv_type": "hessian", "hessian_method": "exact", "indefinite": "clip", "approx": "diag"},
    ),
    (
        {"step": QuadraticModel(samples=64), "damping": AdaptiveDamping(interval=3)},
        {"step_rule": "quadratic", "model_samples": 64, "damping_rule": "lm", "damping_interval": 3},
    ),
]


@pytest.mark.parametrize(("typed", "flat"), PAIRS, ids=["KFAC", "Damping", "Refresh", "Hessian", "QuadraticModel"])
def test_a_bundle_is_the_flat_options(typed, flat):
    one = torchcurv.SecondOrderOptimizer(make_model(), **typed)
    other = torchcurv.SecondOrderOptimizer(make_model(), **flat)
    assert plain(one) == plain(other) and one.settings == other.settings


def test_bundles_in_groups_and_elsewhere():
    model, data = make_model(), [(torch.randn(5, 4), torch.arange(5) % 3)]
    groups = [{"params": model.parameters(), "approx": KFAC(factor_blocks=2), "refresh": Refresh(update_every=4)}]
    optimizer = torchcurv.SecondOrderOptimizer(model, groups)
    assert optimizer.param_groups[0]["approx"] == "kfac" and optimizer.param_groups[0]["factor_blocks"] == 2
    assert optimizer.param_groups[0]["update_every"] == 4 and "refresh" not in optimizer.param_groups[0]
    loss = nn.CrossEntropyLoss()
    typed = torchcurv.curvature(model, loss, data, approx=KFAC(sharing="reduce"))
    flat = torchcurv.curvature(model, loss, data, approx="kfac", sharing="reduce")
    assert torch.equal(typed.to_dense(), flat.to_dense())
    torchcurv.laplace(model, loss, data, approx=KFAC(factor_blocks=2)).sample()


def test_a_flat_option_beside_a_bundle_that_sets_it_raises():
    with pytest.raises(ValueError, match="sharing is given twice"):
        torchcurv.SecondOrderOptimizer(make_model(), approx=KFAC(sharing="reduce"), sharing="expand")


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda b: b.__name__)
def test_the_fields_of_a_bundle_are_options(bundle):
    names = {f.metadata.get("option", f.name) for f in dataclasses.fields(bundle)} | bundle.fixed.keys()
    assert names <= torchcurv.SecondOrderOptimizer.table.keys()
    assert flattened({"x": bundle()}) == dict(bundle.fixed)


def test_unknown_options_are_refused_with_the_nearest_name():
    with pytest.raises(TypeError, match="'rnak', did you mean 'rank'"):
        torchcurv.SecondOrderOptimizer(make_model(), rnak=3)
    model = make_model()
    with pytest.raises(ValueError, match="'rnak', did you mean 'rank'"):
        torchcurv.SecondOrderOptimizer(model, [{"params": model.parameters(), "rnak": 3}])
    optimizer = torchcurv.SecondOrderOptimizer(model)
    optimizer.param_groups[0]["rnak"] = 3
    with pytest.raises(ValueError, match="unknown option 'rnak'"):
        take_step(model, optimizer)


@pytest.mark.parametrize(("key", "value"), [("refresh_cap", -3), ("refresh_tol", "x"), ("lr", -1.0), ("damping", -1)])
def test_nonsense_that_is_set_later_raises_at_the_next_step(key, value):
    model = make_model()
    optimizer = torchcurv.SecondOrderOptimizer(model)
    take_step(model, optimizer)
    optimizer.param_groups[0][key] = value
    with pytest.raises((ValueError, TypeError), match=key):
        take_step(model, optimizer)


def test_the_structure_cannot_be_changed_later():
    model = make_model()
    optimizer = torchcurv.SecondOrderOptimizer(model)
    optimizer.param_groups[0]["sharing"] = "reduce"
    with pytest.raises(ValueError, match="sharing of group 0 was changed from 'expand' to 'reduce'"):
        take_step(model, optimizer)


def measurements(tol, later=None):
    model = make_model()
    options = {"update_every": "adaptive", "refactor_every": "adaptive", "refresh_warmup": 0, "lr": 1e-3}
    optimizer = torchcurv.SecondOrderOptimizer(model, refresh_tol=tol, **options)
    if later is not None:
        optimizer.param_groups[0]["refresh_tol"] = later
    for _ in range(40):
        take_step(model, optimizer)
    return optimizer.metrics()["measurements"]


def test_the_tolerance_of_adaptive_intervals_is_read_from_the_group():
    assert measurements(0.01, later=10.0) == measurements(10.0) < measurements(0.01)


SNIPPET = """
import torchcurv
from torch import nn
model = nn.Linear(2, 2)
torchcurv.SecondOrderOptimizer(model, approx="lowrank", rank=4)
torchcurv.SecondOrderOptimizer(model, rnak=3)
torchcurv.SecondOrderOptimizer(model, rank="three")
torchcurv.KFAC(sharing=3)
"""


@pytest.mark.slow
def test_a_type_checker_sees_names_and_types(tmp_path):
    api = pytest.importorskip("mypy.api")
    file = tmp_path / "snippet.py"
    file.write_text(SNIPPET)
    out = api.run([str(file), "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")])[0]
    assert {int(line.split(":")[1]) for line in out.splitlines() if ": error:" in line} == {6, 7, 8}, out


# --- a new option: one declaration


# --8<-- [start:option]
class Extra(TypedDict, total=False):
    """A topic with one option."""

    step_cap: Annotated[float, Option(1.0, number(lambda x: x > 0, "a number > 0"), LIVE, "the longest step")]


class Capped(CurvatureOptimizer):
    """Gradient descent whose steps are never longer than step_cap."""

    table: ClassVar = {**torchcurv.SecondOrderOptimizer.table, **table_of(Extra)}

    def __init__(self, model, params=None, **options):
        options = {"damping": 0.1, "lr": 0.1, "sharing": "expand", **options}
        super().__init__(model, params, complete(self.table, options, "Capped"))

    def update_parameters(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * (group["step_cap"] / p.grad.norm()).clamp_max(1))


# --8<-- [end:option]


def test_a_new_option_is_one_declaration():
    model = make_model()
    optimizer = Capped(
        model, [{"params": model.weight}, {"params": model.bias, "step_cap": 0.5}], damping_scale="absolute"
    )
    before = model.bias.detach().clone()
    take_step(model, optimizer)
    assert (model.bias - before).norm() <= 0.5 + 1e-6
    assert [group["step_cap"] for group in optimizer.state_dict()["param_groups"]] == [1.0, 0.5]
    optimizer.param_groups[0]["step_cap"] = -1
    with pytest.raises(ValueError, match="step_cap=-1; pass a number > 0"):
        take_step(model, optimizer)
    with pytest.raises(TypeError, match="'step_cpa', did you mean 'step_cap'"):
        Capped(model, step_cpa=1.0)
