"""A fence around what users see: what is recorded of it, and how. The tests are in test_fence.py.

Names, arguments, groups, keys and shapes of the state, and numbers lie in fence.json. Whoever means to move any of it
records it anew from the root of the repository, and the diff of that file then says what has moved:

    PYTHONPATH=. python tests/support/fence.py --record

Checkpoints under data/ are of older versions and are never written again, and the options of their cases stay as they
are; `--checkpoint NAME ...` adds those of today's version, by the name of their cases.
"""

import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import torchcurv
from torchcurv import curvature, directions, laplace
from torchcurv.optim.directional import above, constant, from_noise, top_k

RECORDED, DATA = Path(__file__).with_name("fence.json"), Path(__file__).with_name("data")
STEPS, SAVED_AFTER = 5, 3
RTOL = 1e-5
REQUIRED = "<required>"

# --- models, batches, and ways to make a step ------------------------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.GroupNorm(1, 2), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(2, 3)
    )


def bag():
    return nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(8, 3))


SHAPES = {mlp: (4,), cnn: (1, 4, 4), bag: (2,)}


def made(make, dtype=torch.float64):
    """A model whose weights are drawn here, whatever torch draws."""
    model, generator = make().to(dtype), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
    return model


def batch(make, t, loss="cross_entropy"):
    generator = torch.Generator().manual_seed(100 + t)
    x = torch.randn(8, *SHAPES[make], generator=generator, dtype=torch.float64)
    if make is bag:
        x = (x.abs() * 3).long().clamp_max(5)
    if loss == "mse":
        return x, torch.randn(8, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (8,), generator=generator)
    return (x, F.one_hot(labels, 3).double()) if loss == "bce_with_logits" else (x, labels)


LOSSES = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}


class Task(NamedTuple):
    """What one step is made of."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    loss_name: str

    def output(self):
        return self.model(self.x)

    def loss_of(self, f):
        return LOSSES[self.loss_name](f, self.y)

    def loss(self):
        return self.loss_of(self.output())


def by_backward(optimizer, task):
    optimizer.zero_grad()
    task.loss().backward()
    optimizer.step()


def by_halves(optimizer, task):
    optimizer.zero_grad()
    for half in (slice(4), slice(4, None)):
        task._replace(x=task.x[half], y=task.y[half]).loss().backward()
    optimizer.step()


def by_observing(optimizer, task):
    optimizer.zero_grad()
    f = task.output()
    optimizer.observe(f, task.y, task.loss_name)
    task.loss_of(f).backward()
    optimizer.step()


def by_draws(optimizer, task, count=2):
    optimizer.zero_grad()
    for _ in range(count):
        with optimizer.sampled_params():
            task.loss().backward()
    optimizer.step()


def by_one_draw(optimizer, task):
    by_draws(optimizer, task, 1)


def by_loss(optimizer, task):
    optimizer.step(task.loss)


def by_loss_and_output(optimizer, task):
    def closure():
        f = task.output()
        return task.loss_of(f), f

    optimizer.step(closure)


def by_closure(optimizer, task):
    def closure():
        optimizer.zero_grad()
        loss = task.loss()
        loss.backward()
        return loss

    optimizer.step(closure)


def with_sgd(optimizer, task):
    by_backward(optimizer, task)
    with torch.no_grad():
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=0.1)


# --- what is trained -------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """An optimizer by name, its options, how a step is made, and the model."""

    name: str
    options: dict[str, Any] = {}  # noqa: RUF012
    step: Callable[..., None] = by_backward
    model: Callable[[], nn.Module] = mlp


def two_groups(model):
    return [
        {"params": model[0].parameters(), "approx": "diag", "lr": 0.05, "damping": 0.2, "momentum": 0.5},
        {"params": model[2].parameters(), "approx": None, "lr": 0.01},
    ]


def split_groups(model):
    return [
        {"params": [model[0].weight, model[2].weight], "weight_decay": 0.1},
        {"params": [model[0].bias, model[2].bias], "lr": 0.2},
    ]


NEWTON = "SecondOrderOptimizer"
EVERY = {"update_every": 2, "refactor_every": 2, "lr": 0.05}
ADAPTIVE = {"update_every": "adaptive", "refactor_every": "adaptive", "refresh_warmup": 1, "refresh_tol": 0.5}
HESSIAN = {"curv_type": "hessian", "damping": 0.3, "lr": 0.05}
CONTROL = {"step_rule": "quadratic", "damping_rule": "lm", "damping_interval": 2}
DIRECTIONS = {"criterion": top_k(3), "damping": constant(0.1)}
PRICE = {**HESSIAN, "approx": "diag", "hessian_method": "price", "damping": 0.0, "init_precision": 300.0}
# Factored, since draws in a space of equal eigenvalues are as arbitrary as its basis.
FULL = {"approx": "full", "damping_type": "factored", "num_samples": 2, "kl_warmup": 3}

CASES = {
    "plain": Case(NEWTON),
    "kfac": Case(NEWTON, {**EVERY, "refactor_every": 4, "momentum": 0.9, "kl_clip": 0.1}),
    "kfac exact": Case(NEWTON, {**EVERY, "damping_type": "exact", "samples": None}),
    "kfac adaptive": Case(NEWTON, {**ADAPTIVE, "lr": 0.05}),
    "kfac schedules": Case(NEWTON, {"damping": lambda t: 0.1 / (1 + t), "update_every": lambda t: 1 + t // 2}),
    "kfac blocks": Case(NEWTON, {"factor_blocks": 2, "curv_type": "fisher", "l2": 0.01, "weight_decay": 0.1}),
    "kfac raw momentum": Case(NEWTON, {"momentum_type": "raw", "nesterov": True, "damping_scale": "relative"}),
    "kfac lars": Case(NEWTON, {"trust_ratio": True, "normalize_weights": True, "maximize": True, "kl_clip": None}),
    "kfac tensor lr": Case(NEWTON, {"lr": torch.tensor(0.05), "curvature_warmup": 2}),
    "kfac mse": Case(NEWTON, {"loss_fn": "mse", "lr": 0.02, "damping": 0.2}),
    "kfac bce": Case(NEWTON, {"loss_fn": "bce_with_logits", "lr": 0.02, "samples": 2}),
    "kfac cnn": Case(NEWTON, {"lr": 0.05, "approx": "kfac", "samples": None}, model=cnn),
    "kfac reduce": Case(NEWTON, {"lr": 0.05, "sharing": "reduce", "damping": 0.2}, model=cnn),
    "kfac whole": Case(NEWTON, {"lr": 0.05, "sharing": "whole", "damping": 0.2}, model=cnn),
    "kfac embedding": Case(NEWTON, {"lr": 0.05, "damping": 0.2}, model=bag),
    "ekfac": Case(NEWTON, {**EVERY, "approx": "ekfac"}),
    "ekfac cnn": Case(NEWTON, {**EVERY, "approx": "ekfac", "curv_type": "empirical_fisher"}, model=cnn),
    "diag": Case(NEWTON, {**EVERY, "approx": "diag", "curv_type": "empirical_fisher", "damping": 0.2}),
    "diag adaptive": Case(NEWTON, {**ADAPTIVE, "approx": "diag", "lr": 0.05}),
    "unit": Case(NEWTON, {**EVERY, "approx": "unit", "ema_decay": 0.5}),
    "block": Case(NEWTON, {"lr": 0.05, "approx": "block", "samples": None}),
    "block rows": Case(NEWTON, {"lr": 0.05, "approx": "block", "rows_limit": 4}),
    "full": Case(NEWTON, {"lr": 0.05, "approx": "full", "damping": 0.1}),
    "full rows": Case(NEWTON, {"lr": 0.05, "approx": "full", "rows_limit": 4, "curv_type": "empirical_fisher"}),
    "full by parameter": Case(NEWTON, {"lr": 0.05, "approx": "full", "partition": "parameter"}),
    "lowrank": Case(NEWTON, {**EVERY, "approx": "lowrank", "rank": 4}),
    "gradient": Case(NEWTON, {"approx": None}),
    "two groups": Case(NEWTON, {"params": two_groups}),
    "split groups": Case(NEWTON, {"params": split_groups, "momentum": 0.0}),
    "hessian diag": Case(NEWTON, {**HESSIAN, "approx": "diag"}),
    "hessian kfac": Case(NEWTON, {**HESSIAN, "approx": "kfac", "residual": "clip"}),
    "hessian block": Case(NEWTON, {**HESSIAN, "approx": "block", "indefinite": "clip"}),
    "hessian hutchinson": Case(NEWTON, {**HESSIAN, "approx": "diag", "hessian_method": "hutchinson"}),
    "hessian lowrank": Case(NEWTON, {**HESSIAN, "approx": "lowrank", "rank": 4}),
    "input": Case(NEWTON, {"curv_type": "input", "lr": 0.05, "damping": 0.5}),
    "input rows": Case(NEWTON, {"curv_type": "input", "lr": 0.05, "damping": 0.5, "ema_decay": 0.0}),
    "quadratic": Case(NEWTON, {"step_rule": "quadratic", "damping": 0.1}, by_loss_and_output),
    "quadratic lm": Case(NEWTON, {**CONTROL}, by_loss_and_output),
    "quadratic lm part": Case(NEWTON, {**CONTROL, "model_samples": 4, "approx": "ekfac"}, by_loss_and_output),
    "lm": Case(NEWTON, {"damping_rule": "lm", "damping_interval": 2, "damping": 1.0}, by_loss),
    "closure": Case(NEWTON, {"lr": 0.05}, by_closure),
    "halves": Case(NEWTON, {"lr": 0.05}, by_halves),
    "observed": Case(NEWTON, {"lr": 0.05, "loss_fn": None}, by_observing),
    "vi plain": Case("VIOptimizer"),
    "vi kfac": Case(
        "VIOptimizer",
        {"antithetic": True, "shared_noise": True, "update_every": 2, "refactor_every": 2, "init_precision": 300.0},
        by_one_draw,
    ),
    "vi kfac factored": Case("VIOptimizer", {"damping_type": "factored", "damping": 0.1, "momentum": 0.9}, by_draws),
    "vi diag": Case("VIOptimizer", {"approx": "diag", "antithetic": True, "init_precision": 300.0}, by_one_draw),
    "vi ekfac": Case("VIOptimizer", {"approx": "ekfac", "shared_noise": True, "temperature": 0.1}, by_draws),
    "vi full": Case("VIOptimizer", FULL, by_closure),
    "vi lowrank": Case("VIOptimizer", {"approx": "lowrank", "rank": 4, "init_precision": 300.0}, by_draws),
    "vi mse": Case("VIOptimizer", {"loss_fn": "mse", "noise_variance": 0.5, "init_precision": 300.0}, by_draws),
    "vi price": Case("VIOptimizer", PRICE, by_draws),
    "vogn": Case("VOGN", {"init_precision": 300.0}, by_draws),
    "noisy kfac": Case("NoisyKFAC", {"init_precision": 300.0}, by_draws),
    "preconditioner": Case("Preconditioner", {}, with_sgd),
    "preconditioner ekfac": Case("Preconditioner", {"approx": "ekfac", "update_every": 2}, with_sgd),
    "cg plain": Case("CGNewton"),
    "cg full": Case("CGNewton", {"approx": "full", "alpha": 0.1, "warm_start": True}),
    "cg kfac": Case("CGNewton", {"approx": "kfac", "alpha": 0.1, "ema_decay": 0.5}),
    "cg operator": Case("CGNewton", {"approx": "operator", "alpha": 0.1}, by_loss_and_output),
    "adahesscale plain": Case("AdaHesScale"),
    "adahesscale": Case("AdaHesScale", {"lr": 0.01, "delta": 1e-4, "residual": "zero"}),
    "directional": Case("DirectionalNewton", DIRECTIONS),
    "directional by layer": Case("DirectionalNewton", {**DIRECTIONS, "damping": from_noise(0.1), "partition": "layer"}),
}
# Statistics, and means of posteriors, are wider than such parameters.
IN_BFLOAT16 = ("kfac", "ekfac", "diag", "vi kfac", "vi diag", "adahesscale")
PLAIN = {"SecondOrderOptimizer": "plain", "VIOptimizer": "vi plain", "VOGN": "vogn", "NoisyKFAC": "noisy kfac"}
PLAIN |= {"Preconditioner": "preconditioner", "CGNewton": "cg plain", "AdaHesScale": "adahesscale plain"}
PLAIN |= {"DirectionalNewton": "directional"}
SIZES = {"VIOptimizer": (96,), "VOGN": (96,), "NoisyKFAC": (96,)}  # the data set's


def optimizer_of(case, model, **options):
    options = {**case.options, **options}
    params = options.pop("params", None)
    if callable(params):
        params = params(model)
    return getattr(torchcurv.optim, case.name)(model, *SIZES.get(case.name, ()), params, **options)


def train(case, model, optimizer, steps):
    name = case.options.get("loss_fn") or "cross_entropy"
    for t in steps:
        x, y = batch(case.model, t, name)
        dtype = next(model.parameters()).dtype
        x, y = (t.to(dtype) if t.is_floating_point() else t for t in (x, y))
        case.step(optimizer, Task(model, x, y, name))


# --- what is recorded of it ------------------------------------------------------------------------------------


def plain(value):
    """As JSON has it."""
    if isinstance(value, torch.Tensor):
        return {"tensor": value.tolist()}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else f"<{type(value).__name__}>"


def groups_of(optimizer):
    return [{key: plain(x) for key, x in group.items() if key != "params"} for group in optimizer.param_groups]


def layout_of(value):
    """A state with "type[shape]" in place of each leaf."""
    if isinstance(value, dict):
        return {str(key): layout_of(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{','.join(map(str, value.shape))}]"
    return type(value).__name__


def fingerprint(tensors):
    """[sum, sum of squares] of each."""
    return [[float(t.sum()), float(t.square().sum())] for t in (t.detach().double() for t in tensors)]


def unlike_plain(name):
    """The groups of a case as what differs from the group of a plain call; itself for the plain call."""
    case = CASES[name]
    groups, usual = observed(name)["groups"], observed(PLAIN[case.name])["groups"][0]
    if name == PLAIN[case.name]:
        return groups
    assert all(group.keys() == usual.keys() for group in groups)
    return [{key: x for key, x in group.items() if x != usual[key]} for group in groups]


def twin_of(name):
    """The first case whose state has the same layout."""
    return next(other for other in CASES if observed(other)["state"] == observed(name)["state"])


def expected_layout(name):
    """The recorded layout of the state of a case; where that is the one of another case, its name is recorded."""
    layout = recorded()["cases"][name]["state"]
    return recorded()["cases"][layout]["state"] if isinstance(layout, str) else layout


def expected_groups(name):
    """The recorded groups of a case, in full."""
    of_plain = PLAIN[CASES[name].name]
    usual = recorded()["cases"][of_plain]["groups"][0]
    return [{**usual, **group} for group in recorded()["cases"][name]["groups"]]


def moved(case, model):
    """The fingerprint of how far each parameter has come."""
    start = made(case.model)
    return fingerprint([p.detach() - q for p, q in zip(model.parameters(), start.parameters(), strict=True)])


@cache
def observed(name):
    """What a case looks like now."""
    case = CASES[name]
    model = made(case.model)
    optimizer = optimizer_of(case, model)
    groups = groups_of(optimizer)
    train(case, model, optimizer, range(SAVED_AFTER))
    layout = layout_of(optimizer.state_dict()["state"])
    train(case, model, optimizer, range(SAVED_AFTER, STEPS))
    return {"groups": groups, "state": layout, "moved": moved(case, model), "metrics": sorted(optimizer.metrics())}


def layout_in_bfloat16(name):
    """The layout of the state, for parameters of that type."""
    case, model = CASES[name], made(CASES[name].model, torch.bfloat16)
    optimizer = optimizer_of(case, model)
    train(case, model, optimizer, range(SAVED_AFTER))
    return layout_of(optimizer.state_dict()["state"])


def resumed(name):
    """The fingerprint of a run that was saved, and goes on in a new optimizer."""
    case = CASES[name]
    model, again = made(case.model), made(case.model)
    optimizer = optimizer_of(case, model)
    train(case, model, optimizer, range(SAVED_AFTER))
    again.load_state_dict(model.state_dict())
    other = optimizer_of(case, again)
    other.load_state_dict(optimizer.state_dict())
    train(case, again, other, range(SAVED_AFTER, STEPS))
    return moved(case, again)


# --- curvature that is looked at -------------------------------------------------------------------------------

KINDS_SEEN = {
    "ggn": ("kfac", "ekfac", "diag", "unit", "block", "full", "lowrank"),
    "fisher": ("kfac", "full"),
    "empirical_fisher": ("kfac", "ekfac", "full"),
    "hessian": ("kfac", "diag", "block", "full"),
    "input": ("kfac",),
}


def data_of(make):
    return [batch(make, t) for t in range(2)]


def look_at_set(kind, approx, make=mlp):
    model = made(make)
    C = curvature(model, "cross_entropy", data_of(make), curv_type=kind, approx=approx)
    v = torch.linspace(-1, 1, C.size, dtype=torch.float64)
    numbers = [C.matvec(v), C.diag(), C.trace()]
    if kind != "hessian":
        numbers += [C.solve(v, 0.1), C.logdet(0.1)]
    return fingerprint([*numbers, C.norm("spectral"), *C.eigvalsh_by_block().values()])


def look_at_operator(kind):
    C = curvature(made(mlp), "cross_entropy", data_of(mlp), curv_type=kind, approx="operator")
    v = torch.linspace(-1, 1, C.size, dtype=torch.float64)
    density = C.spectral_density(2, 8, width=0.1, grid=5)
    return fingerprint([C.matvec(v), *C.trace(20), *C.diag(20), C.norm().value, C.eigh(2).values, density.density])


def look_at_directions():
    found = directions(made(mlp), "cross_entropy", data_of(mlp), criterion=above(1e-3), partition="layer")
    return fingerprint([x for d in found.values() for x in (d.evals, d.gammas, d.lambdas, *d.newton(constant(0.1)))])


def look_at_posterior(approx, loss="cross_entropy"):
    data = [batch(mlp, t, loss) for t in range(2)]
    model = made(mlp).eval()
    posterior = laplace(model, loss, data, approx=approx, prior_precision=0.5)
    x = data[0][0][:3]
    outputs = posterior.predict_probit(x) if loss == "cross_entropy" else posterior.predict_regression(x).covariance
    drawn = () if approx == "full" else posterior.sample().values()  # see FULL
    return fingerprint([posterior.log_marginal_likelihood(), outputs, *posterior.variances().values(), *drawn])


LOOKS: dict[str, Callable[[], Any]] = {
    **{
        f"{kind} {approx}": lambda kind=kind, approx=approx: look_at_set(kind, approx)
        for kind, approximations in KINDS_SEEN.items()
        for approx in approximations
    },
    **{f"cnn {approx}": lambda approx=approx: look_at_set("ggn", approx, cnn) for approx in ("kfac", "ekfac", "full")},
    **{f"operator {kind}": lambda kind=kind: look_at_operator(kind) for kind in ("ggn", "hessian", "empirical_fisher")},
    "directions": look_at_directions,
    **{f"laplace {approx}": lambda approx=approx: look_at_posterior(approx) for approx in ("kfac", "diag", "full")},
    "laplace mse": lambda: look_at_posterior("kfac", "mse"),
}

# --- names and arguments ---------------------------------------------------------------------------------------

NAMES = {
    "torchcurv": torchcurv.__all__,
    "torchcurv.optim": torchcurv.optim.__all__,
    "torchcurv.optim.directional": ["above", "constant", "from_noise", "top_k"],
    "torchcurv.nn": ["ISAACLinear"],
    "torchcurv.plot": ["plot_layers", "plot_spectrum"],
}
MADE_BY_FUNCTIONS = ("CurvatureSet", "CurvatureOperator", "LaplacePosterior")  # whose constructors nobody calls
PARTS = {"Directions": ("block", "rows"), "Gaussian": ("blocks", "deviation", "draws")}  # not for users


def named(path):
    """What "module.name" stands for."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def functions():
    """What users call, by its path."""
    paths = [f"{module}.{name}" for module, names in NAMES.items() for name in names if name not in MADE_BY_FUNCTIONS]
    return [path for path in paths if callable(named(path))]


@cache
def instances():
    """One object of each type that users hold, by the name of its type."""
    data = data_of(mlp)
    blocks = curvature(made(mlp), "cross_entropy", data)
    operator = curvature(made(mlp), "cross_entropy", data, approx="operator")
    posterior = laplace(made(mlp).eval(), "cross_entropy", data)
    found = [blocks, operator, posterior, *directions(made(mlp), "cross_entropy", data).values()]
    found += [operator.trace(10), operator.eigh(1), blocks.spectral_density(), posterior.glm(data[0][0])]
    found += [optimizer_of(CASES[name], made(mlp)) for name in PLAIN.values()]
    found += [posterior.gaussian, torchcurv.optim.ResidualNewton(made(mlp))]
    return {type(x).__name__: x for x in found}


def members_of(thing):
    """Public methods and attributes -> the arguments, None for what is no method; without those of torch."""
    own = [c for c in type(thing).__mro__ if c.__module__.startswith("torchcurv")]
    names = {name for c in own for name in vars(c)} | set(getattr(thing, "__dict__", ()))
    names -= set(PARTS.get(type(thing).__name__, ()))
    found = {}
    for name in sorted(name for name in names if not name.startswith("_")):
        method = getattr(type(thing), name, None)
        found[name] = arguments_of(method, bound=True) if inspect.isfunction(method) else None
    return found


def arguments_of(function, bound=False):
    """{"positional": names in order, "defaults": name -> default}; bound: without the first."""
    parameters = list(inspect.signature(function).parameters.values())[bound:]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {
        "positional": [p.name for p in named if p.kind != p.KEYWORD_ONLY],
        "defaults": {p.name: REQUIRED if p.default is p.empty else plain(p.default) for p in named},
    }


def is_open(function):
    return any(p.kind == p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def missing_arguments(function, before, bound=False):
    """What a call as before may no longer find; a keyword may have gone into **options."""
    now = arguments_of(function, bound)
    lost = [] if now["positional"][: len(before["positional"])] == before["positional"] else before["positional"]
    for name, default in before["defaults"].items():
        if name not in now["defaults"]:
            lost = lost if is_open(function) and default != REQUIRED else [*lost, name]
        elif now["defaults"][name] != default:
            lost = [*lost, f"{name}={default!r} is now {now['defaults'][name]!r}"]
    return lost


def recorded_now(name):
    twin = twin_of(name)
    return {**observed(name), "groups": unlike_plain(name)} | ({} if twin == name else {"state": twin})


def fence():
    return {
        "names": {module: sorted(names) for module, names in NAMES.items()},
        "arguments": {path: arguments_of(named(path)) for path in functions()},
        "members": {name: members_of(thing) for name, thing in instances().items()},
        "cases": {name: recorded_now(name) for name in CASES},
        "bfloat16": {name: layout_in_bfloat16(name) for name in IN_BFLOAT16},
        "looks": {name: look() for name, look in LOOKS.items()},
    }


# --- what was recorded------------------------------------------------------------------------------------------


@cache
def recorded():
    return json.loads(RECORDED.read_text()) if RECORDED.exists() else {}


def differences(ours, theirs):
    """Where two lists of [sum, sum of squares] differ; a sum may be a difference of large terms."""
    assert len(ours) == len(theirs)
    found = []
    for k, ((a, c), (b, d)) in enumerate(zip(ours, theirs, strict=True)):
        sums = math.isclose(a, b, rel_tol=RTOL, abs_tol=RTOL * math.sqrt(d))
        if not (sums and math.isclose(c, d, rel_tol=RTOL, abs_tol=1e-20)):
            found.append({"of": k, "now": [a, c], "recorded": [b, d]})
    return found


def given_explicitly(name):
    """The recorded keywords of a function with their defaults, to be passed one and all."""
    before = recorded()["arguments"][name]
    keywords = {key: x for key, x in before["defaults"].items() if x != REQUIRED and key != "params"}
    return {key: tuple(x) if isinstance(x, list) else x for key, x in keywords.items()}


# --- old checkpoints -------------------------------------------------------------------------------------------


def checkpoint_of(name):
    """A run of a case as it is saved, and its parameters three steps later."""
    case = CASES[name]
    model = made(case.model)
    optimizer = optimizer_of(case, model)
    train(case, model, optimizer, range(SAVED_AFTER))
    # copied: what is saved would share its tensors with the run that goes on
    saved = {"case": name, "model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    torch.save(saved, path := DATA / f"checkpoint_{name.replace(' ', '_')}.pt")
    saved = torch.load(path, weights_only=True)
    train(case, model, optimizer, range(SAVED_AFTER, SAVED_AFTER + 3))
    torch.save({**saved, "after": [p.detach() for p in model.parameters()]}, path)


def written(value, depth=0):
    """JSON with a line per entry down to the third level, so that diffs are short."""
    if isinstance(value, dict) and depth < 3:
        lines = [f"{json.dumps(key)}: {written(item, depth + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + "\n}"
    return json.dumps(value, separators=(",", ":"))


if __name__ == "__main__":
    print("of", torchcurv.__file__)
    if "--record" in sys.argv:
        RECORDED.write_text(written(fence()) + "\n")
    for name in sys.argv[sys.argv.index("--checkpoint") + 1 :] if "--checkpoint" in sys.argv else ():
        checkpoint_of(name)
