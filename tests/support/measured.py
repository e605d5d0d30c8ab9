"""What an optimizer measured in one step, as dense matrices to hold against the truths of oracles.py."""

import contextlib

import oracles
import torch
from torch import Tensor, nn

from torchcurv import SecondOrderOptimizer

KINDS = ["ggn", "empirical_fisher"]
TRUTH = {"ggn": oracles.ggn, "empirical_fisher": oracles.empirical_fisher}


def optimizer(model: nn.Module, loss_fn="cross_entropy", **options) -> SecondOrderOptimizer:
    """One that measures everything exactly and does not move: one dense block, no memory, a negligible lr."""
    exact = {"approx": "full", "samples": None, "ema_decay": 0.0, "damping": 1.0, "damping_type": "exact"}
    still = {"lr": 1e-30, "momentum": 0.0, "kl_clip": None}
    return SecondOrderOptimizer(model, loss_fn=loss_fn, **{**exact, **still, **options})


def covered(opt) -> list[tuple[str, Tensor]]:
    """(name, parameter) of the dense block, in its order."""
    (block,) = opt.engine.blocks
    names = {p: name for name, p in opt.model.named_parameters()}
    return [(names[p], p) for p in block.params]


def measured(opt) -> Tensor:
    """step(), and the matrix it measured, in the order of `covered`."""
    opt.step()
    return dense(opt, "tensors")


def dense(opt, which: str, block=None) -> Tensor:
    """The matrix in the "tensors" of the last step or in the "pending" ones of the next, in the order of `covered`."""
    block = opt.engine.blocks[0] if block is None else block
    places = torch.arange(block.size, dtype=torch.float64)
    joined = [part.reshape(layer.shape) for part, layer in zip(_split(places, block), block.layers, strict=True)]
    order = torch.cat([part.flatten() for part in block.layout.split(joined)]).long()
    tensors = block.tensors if which == "tensors" else block.pending.tensors
    return tensors["matrix"][0][order][:, order]


def _split(flat: Tensor, block) -> tuple[Tensor, ...]:
    return flat.split([torch.Size(layer.shape).numel() for layer in block.layers])


def truth(opt, loss: nn.Module, x, y, kind: str = "ggn", model: nn.Module | None = None) -> Tensor:
    """The truth over the covered parameters; model: a module around opt.model, when the output is a part of it."""
    named = covered(opt)
    if model is None:
        return TRUTH[kind](opt.model, loss, x, y, named)
    outer = {p: name for name, p in model.named_parameters()}
    return TRUTH[kind](model, loss, x, y, [(outer[p], p) for _, p in named])


def close(x: Tensor, expected: Tensor, tol: float = 1e-10) -> None:
    assert x.shape == expected.shape
    assert expected.abs().max() > 0
    assert (x - expected).abs().max() <= tol * expected.abs().max()


class Part(nn.Module):
    """f(model(x)): a model seen through one of its outputs."""

    def __init__(self, model: nn.Module, f) -> None:
        super().__init__()
        self.model, self.f = model, f

    def forward(self, *args) -> Tensor:
        return self.f(self.model(*args))


@contextlib.contextmanager
def same_random_state():
    """The global generator is the same at the end as at the start."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())
