"""Evaluation: the loss of one batch, what it is elsewhere, and its curvature along directions.

The quadratic model of a loss L(f(θ)) around θ, with J = df/dθ and H_L the Hessian of L with respect to f,

    L(θ + d) ≈ L(θ) + g·d + ½ d^T C d,    C = J^T H_L J,    d_i^T C d_j = (J d_i)^T H_L (J d_j)

needs one product J d per direction, by differentiating a forward pass in forward mode, and none with J^T. What runs
again runs as it did the first time: with the same draws of torch's global generators (those of fused attention on an
accelerator excepted), and without an effect on the buffers of the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call

from torchcurv.curv.distributed import Ranks
from torchcurv.curv.graph import buffers_of, tree_leaves, tree_map, version_of
from torchcurv.curv.layers.normalization import BATCH_NORMS, uses_batch_statistics
from torchcurv.curv.layers.recurrent import unfused
from torchcurv.curv.losses.autograd import hessian_times
from torchcurv.curv.numerics import at_least_float32
from torchcurv.optim.update import inner

Vector = dict[Tensor, Tensor]  # by parameter


class Evaluation:
    """The loss of one batch as a closure computes it.

    closure: returns the loss, a 0-d tensor, or (loss, output), without calling backward(). output: f, of which the
        loss is a function; by default what the model returned last.
    samples: so many of a larger batch, drawn at random, are its part: what runs again runs on these, and stands for
        all. None: the part is all of the batch. Every tensor argument of the model that is as long as the output counts
        as a batch. It is all as well where fewer would be another function: where the closure does more than to call
        the model on its output, where random numbers are drawn, where batch norms normalise with the batch, and where
        the model does not return for a part of its arguments the same part of what it returns for all.
    products: whether `curvature` will be asked for, for which the graph is kept.
    seed: of the draw of the part. known: which arguments can be cut, by their shapes; filled here.
    ranks: the processes over which the loss is a mean: `value`, and all that is said of the loss, is that of all.
    """

    def __init__(
        self,
        model: nn.Module,
        closure: Callable[[], Any],
        samples: int | None = None,
        products: bool = True,
        seed: int = 0,
        known: dict[Any, bool] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = Ranks(None) if ranks is None else ranks
        self.model, self._closure, self._products = model, _Closure(model, closure), products
        self._devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
        self._draws = self._generators()
        with torch.enable_grad():
            self.loss, self.output, calls = self._closure()
        self._call: _Call | None = None
        drawn = any(not torch.equal(x, y) for x, y in zip(self._draws, self._generators(), strict=True))
        if len(calls) == 1 and calls[0].is_all(self.output) and not drawn:
            self._call = calls[0]
        self._order, self.part = self._part(samples, seed, {} if known is None else known)
        self._slope = self._at_output() if products else torch.zeros(())

    def _part(self, samples: int | None, seed: int, known: dict[Any, bool]) -> tuple[Tensor | None, Tensor | None]:
        """(the samples in the order in which they are drawn, those of the part), None where it is all."""
        n = len(self.output)
        together = any(isinstance(m, BATCH_NORMS) and uses_batch_statistics(m) for m in self.model.modules())
        if self._call is None or samples is None or samples >= n or together:
            return None, None
        order = sample_order(n, seed).to(self.output.device)
        part = order[:samples]
        key = samples, *(x.shape for x in tree_leaves((self._call.args, self._call.kwargs)) if isinstance(x, Tensor))
        if key not in known:
            known[key] = self._can_be_cut(part)
        return (order, part) if known[key] else (None, None)

    @torch.no_grad()
    def _can_be_cut(self, part: Tensor) -> bool:
        """Whether the model returns the part of its output for the part of its arguments. Reads numbers."""
        expected = self.output.detach()[part]
        try:
            found = self.output_of(part)
        except Exception:  # whatever a model says to a batch that it was not written for
            return False
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return False
        # Rounding alone: another batch size may take other kernels. Batch statistics of a part differ by per cents.
        gap, size = at_least_float32(found - expected).norm(), at_least_float32(expected).norm()
        return bool(gap <= max(1e-3, 32 * torch.finfo(found.dtype).eps) * size) or not bool(torch.isfinite(size))

    def _at_output(self) -> Tensor:
        """dL/df, which can be differentiated."""
        with _without_backward():
            slope = torch.autograd.grad(self.loss, self.output, create_graph=True, allow_unused=True)[0]
        if slope is None:
            raise ValueError(
                "the loss does not depend on what the model returned last: return (loss, output) from the closure, "
                "with the tensor that the loss is computed from"
            )
        return slope

    def backward(self, measured: bool = True) -> None:
        """Gradients into `.grad`; the graph of the loss stays for `curvature`.

        measured: whether hooks wait for the gradient at the loss. If not, only the graph below the output is run, and
        freed, where there is no other.
        """
        with _without_backward():
            if self._products and not measured and self._by_output_alone:
                self.output.backward(self._slope.detach())
            else:
                self.loss.backward(retain_graph=self._products)

    @cached_property
    def _by_output_alone(self) -> bool:
        """Whether the loss has a gradient with respect to nothing but by the model's output."""
        return self._call is not None and not _reaches(self.loss, self.output)

    @cached_property
    def value(self) -> Tensor:
        """The loss, a number."""
        return self._ranks.mean(self.loss.detach())

    @cached_property
    def num_outputs(self) -> float:
        """How many numbers the loss is a function of."""
        if self._ranks.count == 1:
            return float(self.output.numel())
        return float(self._ranks.mean(self.loss.new_tensor(float(self.output.numel())))) * self._ranks.count

    @cached_property
    def rounding(self) -> Tensor:
        """What rounding makes of the difference of two losses, eight units in the last place of each."""
        eps = 8 * torch.finfo(self.loss.dtype).eps
        return self._ranks.mean(self.loss.detach().abs() * (eps / self.share))

    @cached_property
    def _by_part(self) -> bool:
        """Whether the part stands for the batch in a change of the loss, in every process."""
        own = self.part is not None and self._by_output_alone
        return own if self._ranks.count == 1 else bool(self._ranks.mean(self.loss.new_tensor(float(own))) == 1)

    @property
    def share(self) -> float:
        """The part of the batch, as a share of it."""
        return 1.0 if self.part is None else len(self.part) / len(self.output)

    def drawn(self, count: int) -> Tensor:
        """So many samples, of which the part has been drawn or is drawn first; not where the part is all."""
        assert self._order is not None
        return self._order[:count]

    def output_of(self, samples: Tensor) -> Tensor:
        """f of some of the samples, as a forward pass of their own computes it."""
        assert self._call is not None
        args, kwargs = self._call.of(samples)
        with self._again():
            return self.model(*args, **kwargs)

    @torch.no_grad()
    def loss_now(self) -> Tensor:
        """The loss of this batch at what the parameters hold now."""
        with self._again():
            return self._ranks.mean(self._closure()[0])

    def curvature(self, directions: list[Vector], at: Vector) -> Tensor:
        """[k, k] of d_i^T C d_j; at: all parameters, as they were when the loss was computed."""
        return self._gram([self._along(d, at) for d in directions])

    @torch.no_grad()
    def actual_change(self, d: Vector, at: Vector, slope: Tensor) -> tuple[Tensor, Tensor]:
        """(d^T C d, L(at + d) - L(at)), with the parameters at + d now. slope: g·d.

        The part stands for the batch in all but the first order g·d of the change, where there is no other way from
        the parameters to the loss than by the output.
        """
        tangent = self._along(d, at)
        product = self._gram([tangent])[0, 0]
        if not self._by_part:
            return product, self.loss_now() - self.value
        assert self.part is not None
        with self._again(), self._in_place_of_all(self.part):
            change = self._closure()[0] - self.loss - inner(self._slope[self.part], tangent)
        return product, slope + self._ranks.mean(change / self.share)

    @contextmanager
    def _in_place_of_all(self, part: Tensor) -> Iterator[None]:
        """The model runs on the part, and returns what it did before of the other samples."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return _some((args, kwargs), len(self.output), part)

        def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return self.output.index_copy(0, part, output)

        hooks = [self.model.register_forward_pre_hook(before, prepend=True, with_kwargs=True)]
        hooks.append(self.model.register_forward_hook(after))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _gram(self, tangents: list[Tensor]) -> Tensor:
        """[k, k] of t_i^T H_L t_j, for t_i = J d_i."""
        products = [self._hessian_times(t) for t in tangents]
        gram = torch.stack([torch.stack([inner(t, x) for x in products]) for t in tangents]) / self.share
        return self._ranks.mean(gram)

    @torch.no_grad()
    def _along(self, direction: Vector, at: Vector) -> Tensor:
        """J d, for the part, in float32 or better."""
        _load_forward_mode()
        try:
            return at_least_float32(self._differentiated(direction, at))
        except NotImplementedError as error:
            raise NotImplementedError(
                f"the model cannot be differentiated in forward mode, as a model of its loss needs: {error}. Take "
                'step_rule="fixed" and damping_rule="fixed"'
            ) from error

    def _differentiated(self, direction: Vector, at: Vector) -> Tensor:
        with self._again(), forward_ad.dual_level(), unfused():
            values = {
                p: forward_ad.make_dual(x, direction[p].to(x.dtype)) if p in direction else x for p, x in at.items()
            }
            names = self._closure.names
            if self._call is None:
                output = functional_call(self._closure, {f"model.{names[p]}": x for p, x in values.items()}, ())[1]
            else:
                own = {names[p]: x for p, x in values.items()}
                output = functional_call(self.model, own, *self._call.of(self.part))
            tangent = forward_ad.unpack_dual(output).tangent
        return torch.zeros_like(output) if tangent is None else tangent

    def _hessian_times(self, v: Tensor) -> Tensor:
        """H_L v, of the samples that v is about."""
        if self.part is None:
            return hessian_times(self._slope, self.output, v.to(self._slope.dtype)).to(v.dtype)
        whole = torch.zeros_like(self._slope).index_copy_(0, self.part, v.to(self._slope.dtype))
        return hessian_times(self._slope, self.output, whole)[self.part].to(v.dtype)

    @contextmanager
    def _again(self) -> Iterator[None]:
        """With the draws of the first time, and copies of the buffers, which a graph may still need as they are;
        afterwards generators and buffers are as before.
        """
        holders = [(held, name) for module in self.model.modules() for held in [buffers_of(module)] for name in held]
        buffers = [(held, name, b) for held, name in holders if (b := held[name]) is not None]
        copies = {id(b): b.clone() for _, _, b in buffers}
        for held, name, buffer in buffers:
            held[name] = copies[id(buffer)]
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._draws[0])
            for device, state in zip(self._devices, self._draws[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            try:
                yield
            finally:
                for held, name, buffer in buffers:
                    held[name] = buffer

    def _generators(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]


@contextmanager
def _without_backward() -> Iterator[None]:
    """What is said of a loss whose graph is gone, or never was."""
    try:
        yield
    except RuntimeError as error:
        if "second time" not in str(error) and "does not require grad" not in str(error):
            raise
        raise RuntimeError(
            "the closure must return the loss as it was computed, with gradients enabled and without calling backward()"
        ) from error


class _Call(NamedTuple):
    """One call of a model: version: of what it returned, which an edit in place changes."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    version: int
    autocast: bool

    def is_all(self, output: Tensor) -> bool:
        """Whether the model alone makes the output, without the closure's help."""
        return self.output is output and version_of(output) == self.version and not self.autocast

    def of(self, samples: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, for some of the samples, or all."""
        given = self.args, self.kwargs
        return given if samples is None else _some(given, len(self.output), samples)


class _Closure(nn.Module):
    """A closure as a function of the parameters of the model that it calls: (loss, output, calls of the model)."""

    def __init__(self, model: nn.Module, closure: Callable[[], Any]) -> None:
        super().__init__()
        self.model, self.closure = model, closure
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}

    def forward(self) -> tuple[Tensor, Tensor, list[_Call]]:
        calls: list[_Call] = []
        given: list[tuple[Any, Any]] = []  # to the calls that run, before other hooks change it

        def start(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.append((args, kwargs))

        def end(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
            calls.append(_Call(*given.pop(), output, version_of(output), autocast))

        hooks = [self.model.register_forward_pre_hook(start, prepend=True, with_kwargs=True)]
        hooks.append(self.model.register_forward_hook(end))
        try:
            result = self.closure()
        finally:
            for hook in hooks:
                hook.remove()
        if isinstance(result, tuple) and len(result) != 2:
            raise TypeError(f"the closure returned {len(result)} values; return the loss, or (loss, output)")
        if not isinstance(result, tuple) and len(calls) > 1:
            raise TypeError(
                f"the closure called the model {len(calls)} times: return (loss, output) from it, with one tensor of "
                "all that the loss is computed from, such as the outputs of all micro-batches concatenated"
            )
        loss, output = result if isinstance(result, tuple) else (result, calls[-1].output if calls else None)
        if not isinstance(loss, Tensor) or loss.dim():
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TypeError(f"the closure returned {what} as the loss; return a 0-d tensor, or (loss, output)")
        if not isinstance(output, Tensor) or not output.dim():
            raise TypeError(
                "the model returned no tensor [batch, ...] in the closure: return (loss, output) from it, with the "
                "tensor that the loss is computed from"
            )
        return loss, output, calls


def sample_order(n: int, seed: int) -> Tensor:
    """The order in which samples are drawn from a batch of n."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _some(tree: Any, n: int, samples: Tensor) -> Any:
    """Every tensor in it that is n long, cut to some of the samples."""

    def cut(x: Any) -> Any:
        return x[samples.to(x.device)] if isinstance(x, Tensor) and x.dim() and len(x) == n else x

    return tree_map(cut, tree)


def _reaches(loss: Tensor, output: Tensor) -> bool:
    """Whether a gradient of the loss reaches any leaf otherwise than by the output."""
    seen: set[Any] = {tuple(get_gradient_edge(output)[:2])}
    todo: list[Any] = [tuple(get_gradient_edge(loss)[:2])]
    while todo:
        edge = todo.pop()
        if edge[0] is None or edge in seen:
            continue
        seen.add(edge)
        if hasattr(edge[0], "variable"):
            return True
        todo += edge[0].next_functions
    return False


@cache
def _load_forward_mode() -> None:
    """What torch imports at the first dual number, with a warning about its own use of torch.jit.script."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))
