"""An approximation of the user's own with a factor of its own: what is not said is refused, what is said holds."""

from dataclasses import dataclass
from typing import ClassVar

import cases
import pytest
import torch
from torch import Tensor, nn

import torchcurv
from torchcurv.curv.approximations.factor import Factor
from torchcurv.curv.approximations.table import APPROXIMATIONS
from torchcurv.curv.block.reading import draw_from

X, Y = cases.randn(6, 4), torch.arange(6) % 2
CE = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class OwnDiagonal(Factor):
    """diag(d), with a name of its own for the tensor of its state."""

    d: Tensor
    damping: Tensor | None = None

    def solve(self, x, damping=None):
        return x / (self.d + (self.damping if damping is None else damping))


@dataclass(frozen=True)
class Squares(torchcurv.Approximation):
    """The diagonal; its factor shares memory with the running average."""

    statistics: ClassVar = {"": torchcurv.Statistic(("m",), scales_with_loss=True, needs_signals=True)}

    def measure(self, stats, basis=None, due=("",)):
        return {"m": stats.squares()}

    def empty(self, layers, like):
        return {"m": like.new_zeros(layers[0].shape)}

    def product(self, tensors, x):
        return tensors["m"] * x

    def trace(self, tensors):
        return tensors["m"].sum()

    def factor(self, tensors, damping, damping_type, basis=None):
        lam = torch.as_tensor(damping, dtype=tensors["m"].dtype)
        return OwnDiagonal(tensors["m"], lam), torch.isfinite(tensors["m"].sum())


@dataclass(frozen=True)
class TwoStatistics(Squares):
    """The same in two halves, whose names are none of K-FAC's."""

    statistics: ClassVar = {
        "first": torchcurv.Statistic(("m",), scales_with_loss=True, needs_signals=True),
        "second": torchcurv.Statistic(("n", "rows"), scales_with_loss=True, needs_signals=True),
    }

    def measure(self, stats, basis=None, due=("first", "second")):
        half = stats.squares() / 2
        first = {"m": half} if "first" in due else {}
        return {**first, "n": half.clone(), "rows": half.new_ones(())} if "second" in due else first

    def empty(self, layers, like):
        return {"m": like.new_zeros(layers[0].shape), "n": like.new_zeros(layers[0].shape), "rows": like.new_zeros(())}

    def factor(self, tensors, damping, damping_type, basis=None):
        return super().factor({"m": tensors["m"] + tensors["n"]}, damping, damping_type)


class Forgetful(Squares):
    """One of its keys is in no statistic."""

    def measure(self, stats, basis=None, due=("",)):
        return {"m": stats.squares(), "other": stats.squares()}


@dataclass(frozen=True)
class Silent(Squares):
    statistics = torchcurv.Approximation.statistics


@pytest.fixture(autouse=True)
def registered():
    held = dict(APPROXIMATIONS)
    for name, entry in {
        "squares": Squares, "two_statistics": TwoStatistics, "forgetful": Forgetful, "silent": Silent
    }.items():  # fmt: skip
        torchcurv.register_approximation(name, lambda options, layers, entry=entry: entry())
    yield
    APPROXIMATIONS.clear()
    APPROXIMATIONS.update(held)


def make(approx, **options):
    model = cases.seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    options = {"update_every": 1, "refactor_every": 1, "momentum": 0.0, "kl_clip": None, "damping": 0.1, **options}
    return model, torchcurv.SecondOrderOptimizer(model, approx=approx, samples=None, **options)


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        CE(model(X), Y).backward()
        optimizer.step()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("approx", ["squares", "two_statistics"])
def test_steps_are_those_of_the_diagonal(approx):
    (model, optimizer), (other, known) = make(approx), make("diag")
    train(model, optimizer, 4)
    train(other, known, 4)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"update_every": 3, "refactor_every": 4}, {"update_every": "adaptive"}])
@pytest.mark.parametrize("approx", ["squares", "two_statistics"])
def test_a_resumed_run_is_the_uninterrupted_one(approx, options):
    (model, optimizer), (other, again) = make(approx, **options), make(approx, **options)
    train(model, optimizer, 5)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    assert {type(block.factor) for block in again.engine.blocks} == {OwnDiagonal}
    train(model, optimizer, 6)
    train(other, again, 6)
    assert torch.equal(weights(model), weights(other))


def test_a_factor_does_not_move_with_the_average_that_it_was_made_of():
    model, optimizer = make("squares", refactor_every=50)
    train(model, optimizer, 2)
    block = optimizer.engine.blocks[0]
    factor, average = block.factor.d.clone(), block.tensors["m"].clone()
    train(model, optimizer, 2)
    assert block.health.factorisations == 1 and not torch.equal(block.tensors["m"], average)
    assert torch.equal(block.factor.d, factor)


def test_a_key_of_no_statistic_is_refused():
    model, optimizer = make("forgetful")
    with pytest.raises(NotImplementedError, match="Forgetful measures 'other', which is none of the keys"):
        train(model, optimizer, 1)


def test_an_entry_without_statistics_is_refused():
    with pytest.raises(NotImplementedError, match="Silent does not say what it keeps: define `statistics`"):
        make("silent")


def test_what_the_factor_does_not_answer_is_refused():
    model, optimizer = make("squares")
    train(model, optimizer, 1)
    with pytest.raises(NotImplementedError, match="OwnDiagonal does not answer 'sample'"):
        draw_from(optimizer.engine.blocks[0], 0.1)


def test_a_state_of_another_form_is_refused():
    model, optimizer = make("squares")
    train(model, optimizer, 1)
    block = optimizer.engine.blocks[0]
    saved = block.state()
    saved["factor"] = {"values": saved["factor"]["d"]}
    with pytest.raises(
        ValueError, match=r"has a factor of \['values'\], and Squares .* makes one of \['d', 'damping'\]"
    ):
        block.load_state(saved)


def test_it_may_join_layers_into_one_block():
    """The two layers' blocks are one, which is asked for its sizes."""

    class Joined(Squares):
        def measure(self, stats, basis=None, due=("",)):
            rows = torch.cat(list(stats.row_chunks()))
            return {"m": rows.square().sum(0)[None, None] * stats.scale}

        def empty(self, layers, like):
            return {"m": like.new_zeros(1, 1, sum(torch.Size(layer.shape).numel() for layer in layers))}

    torchcurv.register_approximation("joined", lambda options, layers: Joined(), joins=True)
    (model, optimizer), (other, known) = make("joined"), make("diag")
    assert len(optimizer.engine.blocks) == 1
    train(model, optimizer, 3)
    train(other, known, 3)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-9, atol=1e-12)
    _, apart = make("joined", partition="layer")
    assert len(apart.engine.blocks) == 2
