"""Draws of VIOptimizer: the parameters at a draw from the posterior, and what its gradients leave behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.distributed import running
from torchcurv.curv.posterior.gaussian import Gaussian, GaussianBlock
from torchcurv.optim.draw_records import (
    AntitheticDraw,
    CovarianceVersion,
    SharedNoise,
    gradient_versions,
    gradients_changed,
    holds_its_mean,
    mean_of,
)
from torchcurv.optim.engine.companion import Companion, Group
from torchcurv.optim.price import Products, add_products, is_priced, products_of_draw

TRAINING, LOOKING = "training_draws", "other_draws"  # streams of draws, and under which keys the state counts them
NOISE = "shared_noise"  # the stream of noise that draws share; the state has the draw it was made for, or 0
STREAMS = {LOOKING: 0, TRAINING: 1, NOISE: 2}  # what a stream adds to the seed

Draw = tuple[dict[Tensor, Tensor], float]  # (x, sign) with θ - μ = sign x, by parameter


class PosteriorDraws(Companion):
    """Draws from the posterior of an optimizer, whose options `antithetic` and `shared_noise` are in its settings."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.held: dict[Tensor, Tensor] | None = None  # the means, while the parameters hold a draw
        self.made = 0  # draws since the last step whose gradients are in `.grad`
        self.products: Products = {}  # their sum of (θ - μ) g, for hessian_method="price"
        self._first: AntitheticDraw | None = (
            None  # with antithetic=True, the last draw, until its mirror image is drawn
        )
        self._shared: SharedNoise | None = None  # with shared_noise=True, what the draws share
        self._version: CovarianceVersion | None = None  # of the covariance before the step that is being made

    def mean(self, p: Tensor) -> Tensor:
        """μ of a parameter, in float32 or better: itself, or its master copy."""
        if self.held is not None and p in self.held:
            return self.held[p]
        if holds_its_mean(p):
            return p.detach()
        state = self.optimizer.state[p]
        master = state.get("mean")
        if master is None:
            master = p.detach().float()
        else:  # what was written into the parameter since the last step counts
            master = torch.where(master.to(p.dtype) == p.detach(), master, p.detach().float())
        state["mean"] = master
        return master

    # -------------------------------------------------------------------------------------- noise

    @property
    def _counts(self) -> dict[str, Any]:
        """The state of the first parameter, which has what is about all of them."""
        return self.optimizer.state[next(self.optimizer.engine.params())]

    def _next(self, stream: str) -> tuple[int, float]:
        """(which noise the next draw of a stream has, its sign); the state counts the draws."""
        state = self._counts
        count = state[stream] = int(state.get(stream, 0)) + 1
        if self.optimizer.settings["antithetic"] and stream == TRAINING:
            return (count + 1) // 2, 1.0 if count % 2 else -1.0
        return count, 1.0

    def generator(self, stream: str, index: int, device: torch.device) -> torch.Generator:
        """That of the noise of one draw of a stream."""
        # Price's estimate multiplies a draw with its own gradient, which is an average over the ranks
        same = self._priced() or self.optimizer.settings["draws"] == "same"
        rank = 0 if same or not running() else torch.distributed.get_rank()
        seed = hash((self.optimizer.engine.recording["seed"], STREAMS[stream], index, rank, 0x5EED)) & (2**63 - 1)
        return torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def draw(self, stream: str, generator: torch.Generator | None) -> Draw:
        """The next draw of a stream. The second of a pair has the noise of the first, and is made from it unless the
        optimizer was loaded, or Σ edited, in between.
        """
        if self.held is not None:
            raise RuntimeError("the weights are drawn already: leave the `with` of sampled_params() first")
        blocks = self._blocks()
        posterior = Gaussian({}, blocks)
        if generator is not None or not blocks:
            return posterior.deviation(generator), 1.0
        index, sign = self._next(stream)
        training = stream == TRAINING
        if training:
            first, self._first = self._first, None
            if sign < 0 and first is not None and first.noise == index and first.version.is_of(blocks):
                return first.deviation, sign
        generator = self.generator(stream, index, blocks[0].block.params[0].device)
        shares = training and self.optimizer.settings["shared_noise"]
        deviation = self._sharing(index, posterior)(generator) if shares else posterior.deviation(generator)
        if training and self.optimizer.settings["antithetic"] and sign > 0:
            self._first = AntitheticDraw(index, deviation, CovarianceVersion(blocks))
        return deviation, sign

    def _sharing(self, index: int, posterior: Gaussian) -> Callable[[torch.Generator | None], dict[Tensor, Tensor]]:
        """What makes draws of the noise that they share; index: of the next draw.

        A resumed run, or one whose Σ was edited, has the same noise.
        """
        state, blocks = self._counts, posterior.blocks
        noise = state[NOISE] = int(state.get(NOISE, 0)) or index
        if self._shared is None or self._shared.noise != noise or not self._shared.version.is_of(blocks):
            generator = self.generator(NOISE, noise, blocks[0].block.params[0].device)
            self._shared = SharedNoise(noise, posterior.draws(generator), CovarianceVersion(blocks))
        return self._shared.make

    def _blocks(self) -> list[GaussianBlock]:
        return [block for block, _ in self.optimizer.gaussian_blocks()]

    # --------------------------------------------------------------------------------- at a draw

    @contextmanager
    def at(self, draw: Draw) -> Iterator[None]:
        """The parameters at μ + sign * deviation; the bits they had come back."""
        deviation, sign = draw
        params = list(deviation)
        with torch.no_grad():
            before = [p.detach().clone() for p in params]
            means = [x if holds_its_mean(p) else self.mean(p) for p, x in zip(params, before, strict=True)]
        try:
            with torch.no_grad():
                for p, mean in zip(params, means, strict=True):
                    if holds_its_mean(p):
                        p.add_(deviation[p], alpha=sign)
                    else:
                        p.copy_(mean.add(deviation[p], alpha=sign))
            self.held = dict(zip(params, means, strict=True))
            yield
        finally:
            self.held = None
            with torch.no_grad():
                if params:
                    torch._foreach_copy_(params, before)

    @contextmanager
    def at_next(self, generator: torch.Generator | None = None) -> Iterator[None]:
        """The parameters at the next draw for training, whose gradients are counted."""
        params = self.optimizer.engine.params
        with self.at(self.draw(TRAINING, generator)):
            versions = gradient_versions(params())
            if not versions:
                self.gradients_gone()
            priced = self._priced()
            before = {p: p.grad.clone() for p in priced if p.grad is not None}
            yield
            if gradients_changed(params(), versions):
                self.made += 1
                kept = {p: x for p, x in before.items() if versions[p][0]() is p.grad}
                add_products(self.products, products_of_draw(priced, self.mean, kept))

    def _priced(self) -> list[Tensor]:
        return [p for block in self.optimizer.engine.blocks if is_priced(block) for p in block.params]

    def run(self, closure: Callable[[], Any], count: int) -> Any:
        """The closure under so many draws; gradients and curvatures are put aside between them."""
        aside, losses = DrawAccumulator(), []
        for left in reversed(range(count)):
            with torch.enable_grad(), self.at_next():
                losses.append(closure())
            if left:
                aside.take(self)
        if count > 1:
            aside.give_back(self)
        return mean_of(losses)

    # --------------------------------------------------------------------------------- as a companion

    def step_begins(self) -> None:
        """Remember the covariance, to see whether the step changes it."""
        shares = self.optimizer.settings["antithetic"] or self.optimizer.settings["shared_noise"]
        self._version = CovarianceVersion(self._blocks()) if shares else None

    def step_ended(self) -> None:
        """Where Σ has changed, the next draw is no mirror image, and has noise of its own."""
        version, self._version = self._version, None
        if version is None or version.is_of(self._blocks()):
            return
        self._first = self._shared = None
        counts = self._counts
        if self.optimizer.settings["antithetic"]:
            counts[TRAINING] = counts.get(TRAINING, 0) + counts.get(TRAINING, 0) % 2
        counts[NOISE] = 0

    def gradients_gone(self) -> None:
        self.made, self.products = 0, {}

    def loaded(self, state: dict[Any, dict[str, Any]]) -> None:
        self.gradients_gone()
        self._first = self._shared = None

    def save(self, state: dict[str, Any], p: Tensor, group: Group) -> None:
        if not holds_its_mean(p):
            self.mean(p)
        if p is next(self.optimizer.engine.params()):
            for stream in STREAMS:
                state.setdefault(stream, 0)

    def hint(self) -> str | None:
        if self._priced() and not self.made:
            return (
                'hessian_method="price" estimates the curvature from draws, and no backward() was called inside of '
                "sampled_params() (or by step(closure))"
            )
        return None


class DrawAccumulator:
    """Gradients and measurements of earlier draws, while a closure that may call zero_grad() makes the next."""

    def __init__(self) -> None:
        self.grads: dict[Tensor, Tensor] = {}
        self.measured: list[tuple[Curvature, dict[str, Any]]] = []
        self.products: Products = {}
        self.made = 0
        self.summed: list[Tensor | float] = []

    def take(self, draws: PosteriorDraws) -> None:
        """Move what the last draw left."""
        engine = draws.optimizer.engine
        self._take_grads(engine.params())
        for block in engine.blocks:
            self.measured.append((block, block.pending.take()[0]))
        self.made += draws.made
        add_products(self.products, draws.products)
        self.summed += [] if engine.recorder.summed is None else [engine.recorder.summed]
        engine.recorder.summed = None
        draws.gradients_gone()

    def give_back(self, draws: PosteriorDraws) -> None:
        """The sums over all draws, the last one included."""
        self.take(draws)
        for p, total in self.grads.items():
            p.grad = total
        for block, measured in self.measured:
            if measured:
                block.pending.add(measured)
        draws.made, draws.products = self.made, self.products
        draws.optimizer.engine.recorder.summed = sum(self.summed) if self.summed else None

    @torch.no_grad()
    def _take_grads(self, params: Iterator[Tensor]) -> None:
        for p in params:
            if p.grad is not None:
                self.grads[p] = self.grads[p].add_(p.grad) if p in self.grads else p.grad
                p.grad = None
