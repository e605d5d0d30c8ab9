"""How far predicted probabilities can be trusted: VIOptimizer and Laplace next to SGD, AdamW and IVON.

    python -m benchmarks.uncertainty                 # five seeds, step costs, both figures
    python -m benchmarks.uncertainty --quick         # one seed, few epochs
    python -m benchmarks.uncertainty --tune          # the grids that OPTIONS were chosen from
    pip install ivon-opt                             # for the row of IVON

Digits: 1,000 of the 5,000 MNIST images of benchmarks/data.py are for training and 4,000 for testing, always the same.
A convolutional network (`lenet` of benchmarks/problems.py, 117,000 parameters); batches of 100, 60 epochs, and a
learning rate that falls along a cosine for every method. A seed is that of the initial weights, the order of the
batches and the draws. A training step of VIOptimizer and IVON makes one draw. Predictions: of SGD and AdamW those of
their weights; of VIOptimizer and IVON the mean softmax of 32 draws; of Laplace (K-FAC of the exact GGN, after SGD, the
prior precision of every layer by its marginal likelihood) the mean softmax of 32 draws of the outputs linearised in the
weights. Where VIOptimizer measures curvature (GGN of one draw, or the empirical Fisher, whose diagonal is VOGN) it does
so every 10 steps, and in each of the first 10, where it changes fast; Price's estimate needs no measurement.

Reported on the test digits: negative log likelihood (NLL), expected calibration error (ECE, 15 bins of equal width),
accuracy, and the area under the ROC curve (AUROC) of the predictive entropy telling test digits rotated by 90 degrees
from those as they are. Means and standard errors over the seeds, which see the same images.

Options come from a grid of 6 for every method (`GRIDS`), by the NLL of 200 of the 1,000 training images when trained
on the other 800: the mean over two splits with seeds of their own (100, 101). The ranges of the grids were found by
trial on the same splits: 5 trials for SGD, AdamW, Laplace and Price's estimate, 18 of IVON (temperatures of 0.02 to
0.3 among them, which are worse), 20 to 30 of each measured diagonal, 40 of K-FAC with the GGN and 15 with the empirical
Fisher. Some of the best options lie at an edge. 200 images choose coarsely: other draws change a score by about 0.03,
as much as most options do. Nothing is chosen on test digits or on the reported seeds.

Costs are those of a training step with one draw in SGD steps of the same network and batch: processor time, blocks of
ten steps (a whole cycle of the curvature) taking turns, ratio of the medians. For this network, for a small dense one
(784-100-100-10) at the same batch, and for the wide one of benchmarks/step_time.py (784-1024-1024-10, batch 512).
Laplace costs SGD's, and what follows the training. K-FAC has lines of its own for the costs with factored damping, with
cheap draws (antithetic pairs that share noise) beside that, and with these and factors in two blocks.

The second figure is a regression in one dimension with a gap in its inputs, network 1-50-50-1 with tanh, known noise
variance: mean, one and two standard deviations of the predicted targets.
"""

import argparse
import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from benchmarks.data import Labelled, held_out
from benchmarks.others import Step
from benchmarks.problems import dense, initialise, lenet, wide_mlp
from torchcurv import VIOptimizer, laplace

RESULTS = Path(__file__).parent / "results"
TEST_IMAGES, BATCH, EPOCHS = 4000, 100, 60
VALIDATION_SEEDS, VALIDATION_IMAGES = (100, 101), 200
BINS, DRAWS = 15, 32
EVERY = 10  # the interval of the curvature that "auto" stands for

Options = dict[str, Any]
Predict = Callable[[Tensor], Tensor]  # images to class probabilities
LOSS = nn.CrossEntropyLoss()


# ------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Training:
    """An optimizer, what a gradient is computed within, and how predictions are made of it."""

    optimizer: torch.optim.Optimizer
    drawn: Callable[[], Any]
    predict: Callable[[Tensor, int], Tensor]  # (images, draws) to logits [draws, N, 10]
    temperature: float | None = None  # of the Laplace posterior that predicts instead

    def step(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        """One draw."""
        self.optimizer.zero_grad()
        with self.drawn():
            LOSS(model(x), y).backward()
        self.optimizer.step()


def point_estimate(optimizer: torch.optim.Optimizer, model: nn.Module) -> Training:
    return Training(optimizer, nullcontext, lambda x, draws: model(x)[None])


def sgd_training(model: nn.Module, images: int, seed: int, lr: float, weight_decay: float) -> Training:
    return point_estimate(torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=weight_decay), model)


def adamw_training(model: nn.Module, images: int, seed: int, lr: float, weight_decay: float) -> Training:
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)
    return point_estimate(optimizer, model)


def laplace_training(
    model: nn.Module, images: int, seed: int, lr: float, weight_decay: float, temperature: float
) -> Training:
    return replace(sgd_training(model, images, seed, lr, weight_decay), temperature=temperature)


def ivon_training(
    model: nn.Module, images: int, seed: int, lr: float, prior_precision: float, hess_init: float, beta2: float,
    temperature: float,
) -> Training:  # fmt: skip
    from ivon import IVON

    torch.manual_seed(seed)  # its draws come from the global generator
    optimizer = IVON(
        model.parameters(), lr, ess=images / temperature, weight_decay=prior_precision / images,
        hess_init=hess_init, beta2=beta2,
    )  # fmt: skip

    def predict(x: Tensor, draws: int) -> Tensor:
        outputs = []
        for _ in range(draws):
            with optimizer.sampled_params():
                outputs.append(model(x))
        return torch.stack(outputs)

    return Training(optimizer, lambda: optimizer.sampled_params(train=True), predict)


def vi_training(model: nn.Module, images: int, seed: int, **options: Any) -> Training:
    optimizer = VIOptimizer(model, images, loss_fn=LOSS, seed=seed, **options)
    return Training(optimizer, optimizer.sampled_params, optimizer.predict)


def price_training(
    model: nn.Module, images: int, seed: int, lr: float, prior_precision: float, hess_init: float, **options: Any
) -> Training:
    """The learning rate is relative to the first precision and the weight of a gradient in the momentum, as IVON's."""
    damped = hess_init + prior_precision / images
    return vi_training(
        model, images, seed, lr=lr * (1 - options["momentum"]) * damped, prior_precision=prior_precision,
        init_precision=images * damped, **options,
    )  # fmt: skip


MAKERS: dict[str, Callable[..., Training]] = {
    "SGD": sgd_training,
    "AdamW": adamw_training,
    "Laplace, K-FAC": laplace_training,
    "IVON": ivon_training,
    "VI, diagonal, Price": price_training,
    "VI, diagonal, GGN": vi_training,
    "VOGN": vi_training,
    "VI, K-FAC, GGN": vi_training,
    "VI, K-FAC, emp. Fisher": vi_training,
}
MEASURED: Options = {  # where the curvature is measured; the damping is that of the step, not of the posterior
    "momentum": 0.9, "damping": 0.1, "init_precision": 1e4, "update_every": "auto",
    "refactor_every": "auto", "ema_decay": 0.99, "kl_clip": 0.01,
}  # fmt: skip
KFAC: Options = {"approx": "kfac", **MEASURED}
FIXED: dict[str, Options] = {
    "IVON": {"beta2": 0.999, "temperature": 1.0},
    "VI, diagonal, Price": {
        "curv_type": "hessian", "hessian_method": "price", "approx": "diag", "momentum": 0.9, "ema_decay": 0.999,
    },
    "VI, diagonal, GGN": {"curv_type": "ggn", "approx": "diag", **MEASURED},
    "VOGN": {"curv_type": "empirical_fisher", "approx": "diag", **MEASURED},
    "VI, K-FAC, GGN": {"curv_type": "ggn", **KFAC},
    "VI, K-FAC, emp. Fisher": {"curv_type": "empirical_fisher", **KFAC},
}  # fmt: skip
IVON_GRID = {"lr": (0.3,), "hess_init": (0.5, 1.0, 3.0), "prior_precision": (10.0, 20.0)}
DIAGONAL_GRID = {"lr": (0.02,), "prior_precision": (100.0, 200.0), "temperature": (0.01, 0.02, 0.05)}
KFAC_GRID = {"lr": (0.1, 0.2), "prior_precision": (100.0,), "temperature": (0.02, 0.05, 0.1)}
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {  # 6 of each
    "SGD": {"lr": (0.1, 0.2), "weight_decay": (1e-2, 2e-2, 3e-2)},
    "AdamW": {"lr": (1e-3, 3e-3), "weight_decay": (1.0, 3.0, 10.0)},
    "Laplace, K-FAC": {"lr": (0.1,), "weight_decay": (1e-2, 2e-2), "temperature": (0.1, 0.03, 0.01)},
    "IVON": IVON_GRID,
    "VI, diagonal, Price": IVON_GRID,
    "VI, diagonal, GGN": DIAGONAL_GRID,
    "VOGN": DIAGONAL_GRID,
    "VI, K-FAC, GGN": KFAC_GRID,
    "VI, K-FAC, emp. Fisher": KFAC_GRID,
}
TUNED: dict[str, Options] = {  # the best of each
    "SGD": {"lr": 0.1, "weight_decay": 2e-2},
    "AdamW": {"lr": 3e-3, "weight_decay": 3.0},
    "Laplace, K-FAC": {"lr": 0.1, "weight_decay": 2e-2, "temperature": 0.01},
    "IVON": {"lr": 0.3, "hess_init": 3.0, "prior_precision": 20.0},
    "VI, diagonal, Price": {"lr": 0.3, "hess_init": 1.0, "prior_precision": 10.0},
    "VI, diagonal, GGN": {"lr": 0.02, "prior_precision": 100.0, "temperature": 0.02},
    "VOGN": {"lr": 0.02, "prior_precision": 200.0, "temperature": 0.02},
    "VI, K-FAC, GGN": {"lr": 0.2, "prior_precision": 100.0, "temperature": 0.05},
    "VI, K-FAC, emp. Fisher": {"lr": 0.2, "prior_precision": 100.0, "temperature": 0.05},
}
OPTIONS = {name: {**FIXED.get(name, {}), **TUNED[name]} for name in MAKERS}
FACTORED: Options = {"damping_type": "factored"}
CHEAP: Options = {**FACTORED, "antithetic": True, "shared_noise": True}
VARIANTS: dict[str | None, dict[str, Options]] = {  # whose costs are measured too
    "kfac": {"factored": FACTORED, "cheap draws": CHEAP, "cheap draws, 2 blocks": {**CHEAP, "factor_blocks": 2}},
}
GAP_PRIOR = 1.0
GAP_OPTIONS: dict[str, Options] = {
    "VI, diagonal": {"curv_type": "ggn", "approx": "diag", "lr": 0.003},
    "VI, K-FAC": {"curv_type": "ggn", "approx": "kfac", "lr": 0.003},
}


def dense_network() -> nn.Module:
    return initialise(dense((784, 100, 100, 10), nn.ReLU), 0, "relu")


def batches(data: Labelled, seed: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole batches; every epoch is a seeded permutation."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(data.images), generator=generator).split(BATCH):
            if len(index) == BATCH:
                yield data.images[index], data.labels[index]


def trained(name: str, options: Options, data: Labelled, seed: int, epochs: int) -> tuple[nn.Module, Training]:
    model = lenet(seed)
    training = MAKERS[name](model, len(data.images), seed, **options)
    schedule = CosineAnnealingLR(training.optimizer, epochs * (len(data.images) // BATCH))
    for x, y in batches(data, seed, epochs):
        training.step(model, x, y)
        schedule.step()
    return model, training


def predictor(model: nn.Module, training: Training, data: Labelled, seed: int, draws: int = DRAWS) -> Predict:
    """The mean softmax over draws."""
    if training.temperature is not None:
        return linearised(model, data, training.temperature, seed, draws)

    @torch.no_grad()
    def predict(x: Tensor) -> Tensor:
        return training.predict(x, draws).softmax(-1).mean(0)

    return predict


def linearised(model: nn.Module, data: Labelled, temperature: float, seed: int, draws: int) -> Predict:
    """Of Laplace: draws of the outputs linearised in the weights, each a product with the Jacobian."""
    posterior = laplace(model, LOSS, [(data.images, data.labels)], temperature=temperature, seed=seed)
    posterior.optimize_prior(per_block=True)
    mean = posterior.mean

    def predict(x: Tensor) -> Tensor:
        total = torch.zeros(())
        for _ in range(draws):
            change = {name: value - mean[name] for name, value in posterior.sample().items()}
            outputs = jvp(lambda params: functional_call(model, params, x), (mean,), (change,))
            total = total + torch.add(*outputs).detach().softmax(-1) / draws
        return total

    return predict


# ------------------------------------------------------------------------------------------- measures


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """Mean negative log probability of the labels."""
    return float(F.nll_loss(probabilities.double().clamp_min(1e-12).log(), labels))


@dataclass(frozen=True)
class Reliability:
    """Predictions by confidence, in bins of equal width: their share, mean confidence and accuracy."""

    share: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean gap of confidence and accuracy, weighted by share."""
        gaps = (self.confidence - self.accuracy).abs() * self.share
        return float(gaps[self.share > 0].sum())


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Reliability:
    confidence, predicted = probabilities.double().max(1)
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1

    def summed(x: Tensor) -> Tensor:
        return torch.zeros(bins, dtype=torch.float64).index_add_(0, index, x.double())

    count = summed(torch.ones_like(confidence))
    return Reliability(count / len(labels), summed(confidence) / count, summed(predicted == labels) / count)


def entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities.double()).sum(1)


def auroc(negatives: Tensor, positives: Tensor) -> float:
    """The probability that a positive scores higher than a negative, ties counting one half."""
    ordered = negatives.sort().values
    below = torch.searchsorted(ordered, positives, right=False)
    up_to = torch.searchsorted(ordered, positives, right=True)
    return float((below + up_to).double().mean() / (2 * len(negatives)))


def rotated(images: Tensor) -> Tensor:
    """Square images [N, pixels] turned by 90 degrees."""
    side = math.isqrt(images.shape[1])
    return torch.rot90(images.unflatten(1, (side, side)), 1, (1, 2)).flatten(1)


MEASURES = {"NLL": 4, "ECE %": 2, "accuracy %": 2, "AUROC %": 2}


def measured(predict: Predict, test: Labelled) -> tuple[dict[str, float], Reliability]:
    probabilities = predict(test.images)
    bins = reliability(probabilities, test.labels)
    values = {
        "NLL": nll(probabilities, test.labels),
        "ECE %": 100 * bins.ece,
        "accuracy %": 100 * float((probabilities.argmax(1) == test.labels).double().mean()),
        "AUROC %": 100 * auroc(entropy(probabilities), entropy(predict(rotated(test.images)))),
    }
    return values, bins


@dataclass
class Outcome:
    """What one method reached, by seed."""

    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in MEASURES})
    bins: list[Reliability] = field(default_factory=list)

    def add(self, values: dict[str, float], bins: Reliability) -> None:
        for name, value in values.items():
            self.values[name].append(value)
        self.bins.append(bins)

    def pooled(self) -> Reliability:
        """The bins of all seeds together."""
        shares = torch.stack([bins.share for bins in self.bins])
        share = shares.sum(0)

        def mean(name: str) -> Tensor:
            each = torch.stack([getattr(bins, name) for bins in self.bins])
            return (each.nan_to_num() * shares).sum(0) / share

        return Reliability(share / len(self.bins), mean("confidence"), mean("accuracy"))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error, which is NaN for one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def compare(
    names: list[str], train: Labelled, test: Labelled, seeds: list[int], epochs: int, draws: int = DRAWS
) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    with tqdm(total=len(names) * len(seeds), leave=False) as bar:
        for seed, name in itertools.product(seeds, names):
            bar.set_description(f"{name}, seed {seed}")
            model, training = trained(name, OPTIONS[name], train, seed, epochs)
            outcomes.setdefault(name, Outcome()).add(*measured(predictor(model, training, train, seed, draws), test))
            bar.update()
    return outcomes


def tune(name: str, train: Labelled, epochs: int) -> list[tuple[float, Options]]:
    """(negative log likelihood of validation, options) of a method's grid, the best first."""
    rows = []
    for values in tqdm(list(itertools.product(*GRIDS[name].values())), desc=name, leave=False):
        chosen = dict(zip(GRIDS[name], values, strict=True))
        rows.append((_validated(name, {**FIXED.get(name, {}), **chosen}, train, epochs), chosen))
    return sorted(rows, key=lambda row: (math.isnan(row[0]), row[0]))


def _validated(name: str, options: Options, train: Labelled, epochs: int) -> float:
    scores = []
    for seed in VALIDATION_SEEDS:
        order = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(seed))
        held, rest = (
            Labelled(train.images[part], train.labels[part])
            for part in (order[:VALIDATION_IMAGES], order[VALIDATION_IMAGES:])
        )
        model, training = trained(name, options, rest, seed, epochs)
        scores.append(nll(predictor(model, training, rest, seed)(held.images), held.labels))
    return statistics.fmean(scores)


# ---------------------------------------------------------------------------------------------- costs

STEPS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # (model, batch, rounds)
    "step": (lenet, BATCH, 10),
    "step, dense": (dense_network, BATCH, 15),
    "step, wide": (wide_mlp, 512, 5),
}


def costs(names: list[str], make_model: Callable[[], nn.Module], batch: int, rounds: int) -> dict[str, float]:
    """A training step of each method in SGD steps, by the processor's time."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(batch, 784, generator=generator), torch.randint(10, (batch,), generator=generator)
    base = "the step of SGD"
    steps = {base: _stepping("SGD", OPTIONS["SGD"], make_model(), x, y)}
    for name in names:
        steps[name] = _stepping(name, OPTIONS[name], make_model(), x, y)
        for variant, changes in VARIANTS.get(OPTIONS[name].get("approx"), {}).items():
            steps[f"{name}, {variant}"] = _stepping(name, {**OPTIONS[name], **changes}, make_model(), x, y)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in tqdm(range(rounds + 1), desc=f"step costs, batch {batch}", leave=False):
        for name, step in steps.items():
            start = time.process_time()
            for _ in range(EVERY):  # a whole cycle of the curvature
                step()
            if turn:  # the first finds cold caches
                times[name].append(time.process_time() - start)
    unit = statistics.median(times.pop(base))
    return {name: statistics.median(each) / unit for name, each in times.items()}


def _stepping(name: str, options: Options, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    training = MAKERS[name](model, len(x), 0, **{**options, "lr": 1e-5})
    return lambda: training.step(model, x, y)


# --------------------------------------------------------------------------------- a gap in the inputs


def gap_data(seed: int = 0, count: int = 120, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """x in [-1, -0.4] and [0.3, 1] and a noisy sine, [count, 1] each."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.rand(count // 2, 1, generator=generator) * 0.6 - 1
    right = torch.rand(count - count // 2, 1, generator=generator) * 0.7 + 0.3
    x = torch.cat([left, right])
    return x, gap_function(x) + noise * torch.randn(x.shape, generator=generator)


def gap_function(x: Tensor) -> Tensor:
    return torch.sin(4 * x) * 0.8 + 0.3 * x


def gap_posteriors(steps: int, noise: float = 0.1) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """(x, mean, standard deviation) of the targets by method, over [-1.6, 1.6]."""
    data, grid, loss = gap_data(noise=noise), torch.linspace(-1.6, 1.6, 161)[:, None], nn.MSELoss()
    found = {}
    for name, options in GAP_OPTIONS.items():
        model = initialise(dense((1, 50, 50, 1), nn.Tanh), 0, "tanh")
        optimizer = VIOptimizer(
            model, len(data[0]), loss_fn=loss, noise_variance=noise**2, momentum=0.9, prior_precision=GAP_PRIOR,
            init_precision=1e4, ema_decay=0.95, **options,
        )  # fmt: skip
        schedule = CosineAnnealingLR(optimizer, steps)
        for _ in tqdm(range(steps), desc=f"regression, {name}", leave=False):
            optimizer.zero_grad()
            with optimizer.sampled_params():
                loss(model(data[0]), data[1]).backward()
            optimizer.step()
            schedule.step()
        outputs = optimizer.predict(grid, 500)
        found[name] = (grid, outputs.mean(0), (outputs.var(0) + noise**2).sqrt())
    model = initialise(dense((1, 50, 50, 1), nn.Tanh), 0, "tanh")
    _to_the_mode(model, data, noise, steps)
    posterior = laplace(model, loss, [data], prior_precision=GAP_PRIOR, noise_variance=noise**2)
    mean, covariance = posterior.predict_regression(grid)
    found["Laplace, K-FAC"] = (grid, mean, covariance[:, :, 0].sqrt())
    return found


def _to_the_mode(model: nn.Module, data: tuple[Tensor, Tensor], noise: float, steps: int) -> None:
    """The maximum of the posterior, by L-BFGS."""
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=min(steps, 500), history_size=30, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        prior = sum(p.square().sum() for p in model.parameters()) * GAP_PRIOR / 2
        energy = (model(data[0]) - data[1]).square().sum() / (2 * noise**2) + prior
        energy.backward()
        return energy

    optimizer.step(closure)


# ------------------------------------------------------------------------------------------- figures


def draw_reliability(outcomes: dict[str, Outcome], path: Path) -> None:
    """Accuracy against confidence, a panel per method, all seeds together."""
    columns = min(4, len(outcomes))
    rows = -(-len(outcomes) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(3.2 * columns, 3.4 * rows),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axes in grid.flat[len(outcomes) :]:
        axes.set_axis_off()
    for axes, (name, outcome) in zip(grid.flat, outcomes.items(), strict=False):
        _reliability(axes, outcome.pooled())
        means = {key: mean_and_error(outcome.values[key])[0] for key in ("NLL", "ECE %")}
        axes.set_title(f"{name}\nECE {means['ECE %']:.1f} %, NLL {means['NLL']:.3f}", fontsize=10)
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy")
    for column in range(columns):
        filled = (len(outcomes) - column - 1) // columns
        grid[filled, column].set_xlabel("confidence")
        grid[filled, column].tick_params(labelbottom=True)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    _save(figure, path)


def _reliability(axes: Axes, bins: Reliability) -> None:
    count = len(bins.share)
    width, kept = 1 / count, bins.share > 1e-3  # fewer predictions say nothing
    left = (torch.arange(count)[kept] * width).tolist()
    accuracy, confidence = bins.accuracy[kept], bins.confidence[kept]
    axes.bar(left, bins.share[kept].tolist(), width, align="edge", color="0.85", label="share of the predictions")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="calibrated")
    axes.plot(confidence, accuracy, color="tab:blue", marker="o", markersize=3.5, label="accuracy in the bin")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.grid(True, alpha=0.25)


def draw_gap(found: dict[str, tuple[Tensor, Tensor, Tensor]], path: Path) -> None:
    """The predictive distributions, side by side."""
    x, y = gap_data()
    figure, row = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.6), sharey=True, layout="constrained")
    for axes, (name, (grid, mean, deviation)) in zip(row, found.items(), strict=True):
        at, m, s = grid[:, 0], mean[:, 0], deviation[:, 0]
        for factor, alpha in ((2, 0.2), (1, 0.3)):
            label = f"{factor} standard deviation{'s' if factor > 1 else ''}"
            axes.fill_between(
                at, m - factor * s, m + factor * s, color="tab:blue", alpha=alpha, linewidth=0, label=label
            )
        axes.plot(at, gap_function(at), color="black", linestyle=":", linewidth=1.2, label="truth")
        axes.plot(at, m, color="tab:blue", linewidth=1.8, label="predictive mean")
        axes.plot(x, y, ".", color="tab:red", markersize=4, label="data")
        axes.set(title=name, xlabel="x", xlim=(-1.6, 1.6), ylim=(-3, 3))
        axes.grid(True, alpha=0.25)
    row[0].set_ylabel("y")
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ------------------------------------------------------------------------------------------- program


def available() -> list[str]:
    """The methods whose packages are installed."""
    return [name for name in MAKERS if name != "IVON" or importlib.util.find_spec("ivon") is not None]


def report(outcomes: dict[str, Outcome], steps: dict[str, dict[str, float]], caption: str) -> Table:
    """A row per method; steps: by column, what a step of each costs."""
    table = Table(title="MNIST digits, 1,000 training images", caption=caption, box=box.SIMPLE)
    table.add_column("method", no_wrap=True)
    for name in (*MEASURES, *steps):
        table.add_column(name, justify="right", no_wrap=True)
    nothing = [""] * len(MEASURES)
    for name in dict.fromkeys([*outcomes, *(name for each in steps.values() for name in each)]):
        shown = cells(outcomes[name]) if name in outcomes else nothing
        table.add_row(name, *shown, *(f"{each[name]:.2f}" if name in each else "" for each in steps.values()))
    return table


def cells(outcome: Outcome) -> list[str]:
    shown = []
    for name, digits in MEASURES.items():
        mean, error = mean_and_error(outcome.values[name])
        shown.append(f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}"))
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Calibration of VIOptimizer, Laplace, SGD, AdamW and IVON.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--methods", nargs="+", choices=list(MAKERS), help="default: all that are installed")
    parser.add_argument("--quick", action="store_true", help="one seed, 10 epochs, short measurements")
    parser.add_argument("--tune", action="store_true", help="go over the grids on validation images and stop")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures")
    return parser.parse_args()


def main() -> None:
    args, console = arguments(), Console(width=150)
    torch.set_num_threads(1)
    names = args.methods or available()
    train, test = held_out(count=TEST_IMAGES)
    if args.tune:
        for name in names:
            for score, options in tune(name, train, args.epochs):
                console.print(f"{name}: {score:.4f} {options}", markup=False, highlight=False, soft_wrap=True)
        return
    seeds, epochs = (args.seeds[:1], 10) if args.quick else (args.seeds, args.epochs)
    outcomes = compare(names, train, test, seeds, epochs)
    steps = {}
    for name, (make, batch, rounds) in [*STEPS.items()][: 1 if args.quick else None]:
        steps[name] = costs(names, make, batch, 2 if args.quick else rounds)
    caption = f"seeds {seeds}, {epochs} epochs; mean ± standard error; steps in SGD steps; torch {torch.__version__}"
    console.print(report(outcomes, steps, caption))
    if "IVON" not in available():
        console.print("IVON is not installed. To compare: pip install ivon-opt", markup=False)
    paths = args.results / "reliability.png", args.results / "gap.png"
    draw_reliability(outcomes, paths[0])
    draw_gap(gap_posteriors(200 if args.quick else 1500), paths[1])
    console.print(*paths)


if __name__ == "__main__":
    main()
