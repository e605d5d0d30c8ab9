"""What a Gaussian over the parameters of a model can be asked, by the names of the parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from torchcurv.curv.checks import check_count
from torchcurv.curv.posterior.draws import outputs_under
from torchcurv.curv.posterior.gaussian import Gaussian, GaussianBlock, Number, kl_of_block, sum_of_terms

PriorTerm = tuple[GaussianBlock, Number, Number]  # a block, the precision of its prior, the weight of its divergence


class WeightPosterior(ABC):
    """A distribution over parameters, whose owner says four things: the Gaussian, the names, the prior, how to draw."""

    model: nn.Module | None

    @property
    @abstractmethod
    def gaussian(self) -> Gaussian:
        """The distribution by parameter, as it is now. Its mean has every parameter that is named."""

    @abstractmethod
    def named_parameters(self) -> dict[str, Tensor]:
        """The parameters by name."""

    @abstractmethod
    def prior_terms(self) -> Iterable[PriorTerm]:
        """What `kl` adds up."""

    @abstractmethod
    def drawn_params(self, generator: torch.Generator | None) -> AbstractContextManager[None]:
        """The parameters hold a draw to look at."""

    @property
    def mean(self) -> dict[str, Tensor]:
        """The mean by name, in float32 or better."""
        mean = self.gaussian.mean
        return {name: mean[p].clone() for name, p in self.named_parameters().items()}

    @torch.no_grad()
    def variances(self) -> dict[str, Tensor]:
        """The diagonal of Σ by name, of the parameters that are random."""
        found = self.gaussian.variances()
        return {name: found[p] for name, p in self.named_parameters().items() if p in found}

    @torch.no_grad()
    def log_prob(self, params: dict[str, Tensor] | None = None) -> Tensor:
        """log density of parameters by name (leading dimensions are a batch), or of the weights as they are."""
        own = self.named_parameters()
        given = own if params is None else params
        missing = [name for name in own if name not in given]
        if missing:
            raise ValueError(f"log_prob: values are missing for {', '.join(missing)}; pass what `sample()` returns")
        return self.gaussian.log_prob({p: given[name].detach() for name, p in own.items()})

    @torch.no_grad()
    def entropy(self) -> Tensor:
        """In nats, over the parameters that are random."""
        return self.gaussian.entropy()

    @torch.no_grad()
    def kl(self) -> Tensor:
        """KL(posterior || prior) in nats, over the parameters that are random."""
        mean = self.gaussian.mean
        return sum_of_terms([kl_of_block(block, mean, delta) for block, delta, _ in self.prior_terms()])

    def predict(self, inputs: Any, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """The model's raw outputs under `num_samples` draws [num_samples, ...], without gradients.

        inputs: what the model is called with (a tensor, a tuple of positional or a dict of keyword arguments), or a
            function without arguments that returns a tensor. The mode of the model (train, eval) is left as it is.
        """
        check_count("num_samples", num_samples)
        assert self.model is not None
        return outputs_under((self.drawn_params(generator) for _ in range(num_samples)), self.model, inputs)
