"""Random sequences of calls: nothing that is not finite, no raw error, and harmless calls that change nothing."""

import copy
import re

import cases
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

from torchcurv import SecondOrderOptimizer

CE = nn.CrossEntropyLoss()
CHOICES = [
    {"approx": "kfac"},
    {"approx": "ekfac", "update_every": 2, "refactor_every": 2},
    {"approx": "diag", "curv_type": "empirical_fisher"},
    {"approx": "block", "momentum": 0.0},
    {"approx": "full", "rows_limit": 4},
    {"approx": "unit", "update_every": "adaptive"},
    {"approx": "lowrank", "rank": 3},
    {"approx": "kfac", "curv_type": "fisher", "damping_type": "exact"},
    {"approx": "kfac", "curv_type": "input"},
    {"approx": "kfac", "loss_fn": "cross_entropy"},
    {"approx": "diag", "loss_fn": None},
    {"approx": "kfac", "curv_type": "hessian"},
    {"approx": "full", "curv_type": "hessian"},
    {"approx": "ekfac", "curv_type": "empirical_fisher", "nesterov": True},
    {"approx": "block", "curv_type": "fisher", "momentum_type": "raw"},
]
# What a sequence may be told, each with what to do about it.
SENTENCES = (
    r"there are gradients but no curvature was captured",
    r"were frozen when the curvature blocks were built",
    r"have gradients but their curvature was not captured",
    r"damping=0; pass a number > 0",
)


def make_model():
    return cases.seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))).float()


class Calls(RuleBasedStateMachine):
    """A run, and a twin that makes the calls which count, and none of the harmless ones."""

    @initialize(choice=st.sampled_from(CHOICES), later=st.sampled_from([False, False, True]))
    def start(self, choice, later):
        self.options = {"loss_fn": CE, **choice}
        self.pairs, self.later = [], later  # whether the last layer is still to be added
        for _ in range(2):
            model = make_model()
            first = model[0].parameters() if later else model.parameters()
            self.pairs.append((model, SecondOrderOptimizer(model, first, **self.options)))
        self.joined = not later
        self.seed, self.steps, self.passes = 0, 0, False  # whether there was a backward since the last step

    def both(self, call):
        """Make a call on the run and on its twin; both are told the same."""
        told = []
        for k, (model, optimizer) in enumerate(self.pairs):
            try:
                call(k, model, optimizer)
                told.append(None)
            except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
                told.append(str(error))
        assert told[0] == told[1]
        assert told[0] is None or any(re.search(text, told[0]) for text in SENTENCES), told[0]

    def lost(self, model, optimizer, n, seed, spoilt=False):
        x, y = cases.randn(n, 4, seed=seed).float(), torch.arange(n) % 3
        if spoilt:
            x[0, 0] = torch.nan
        f = model(x)
        if self.options["loss_fn"] is None and f.requires_grad:
            optimizer.observe(f, y, CE)
        return CE(f, y)

    # ------------------------------------------------------------------------- calls that count

    @rule(n=st.sampled_from([1, 3, 6]), scale=st.sampled_from([1.0, 0.25, 20.0]), times=st.sampled_from([1, 1, 2]))
    def backward(self, n, scale, times):
        self.seed += 1

        self.passes = True

        def call(k, model, optimizer):
            loss = scale * self.lost(model, optimizer, n, self.seed)
            if loss.requires_grad:
                for left in range(times - 1, -1, -1):
                    loss.backward(retain_graph=left > 0)

        self.both(call)

    @rule()
    def backward_of_a_batch_that_is_not_finite(self):
        self.passes = True

        def call(k, model, optimizer):
            loss = self.lost(model, optimizer, 3, 1, spoilt=True)
            if loss.requires_grad:
                loss.backward()
                optimizer.zero_grad()

        self.both(call)

    @rule()
    def step(self):
        self.both(lambda k, model, optimizer: optimizer.step())
        self.passes = self.passes and self.pairs[0][1].engine.step == self.steps
        self.steps = self.pairs[0][1].engine.step

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none):
        self.both(lambda k, model, optimizer: optimizer.zero_grad(set_to_none))

    @rule()
    def step_by_a_closure(self):
        self.seed += 1

        def call(k, model, optimizer):
            def closure():
                optimizer.zero_grad()
                loss = self.lost(model, optimizer, 4, self.seed)
                if loss.requires_grad:
                    loss.backward()
                return loss

            optimizer.step(closure)

        self.both(call)
        self.steps = self.pairs[0][1].engine.step

    @rule(key=st.sampled_from(["lr", "damping", "ema_decay"]), value=st.sampled_from([0.01, 0.3, 0.9]))
    def change_an_option(self, key, value):
        def call(k, model, optimizer):
            optimizer.param_groups[0][key] = value

        self.both(call)

    @precondition(lambda self: self.later)
    @rule()
    def add_the_last_layer(self):
        self.later = False

        def call(k, model, optimizer):
            model.zero_grad()
            optimizer.add_param_group({"params": list(model[2].parameters()), "damping": 0.1})

        self.both(call)

    @rule(value=st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    def spoil_a_gradient(self, value):
        """Of the first layer, which is in the optimizer; the step must not take it."""

        def call(k, model, optimizer):
            if model[0].weight.grad is not None:
                model[0].weight.grad[0, 0] = value

        self.both(call)

    @rule(factor=st.sampled_from([0.1, 3.0]))
    def edit_gradients(self, factor):
        def call(k, model, optimizer):
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.mul_(factor)

        self.both(call)

    @rule()
    def two_losses_in_one_backward(self):
        self.seed, self.passes = self.seed + 1, True

        def call(k, model, optimizer):
            total = self.lost(model, optimizer, 3, self.seed) + 0.5 * self.lost(model, optimizer, 2, -self.seed - 1)
            if total.requires_grad:
                total.backward()

        self.both(call)

    @rule(layer=st.sampled_from([0, 2]), flag=st.booleans())
    def freeze(self, layer, flag):
        def call(k, model, optimizer):
            model[layer].requires_grad_(flag)
            optimizer.zero_grad()

        self.both(call)

    @rule(flag=st.booleans())
    def train_or_eval(self, flag):
        self.both(lambda k, model, optimizer: model.train(flag))

    # ---------------------------------------------------------------------------- harmless calls

    @rule()
    def look(self):
        _, optimizer = self.pairs[0]
        assert optimizer.summary()
        assert all(value == value for key, value in optimizer.metrics().items() if key == "step")

    @rule()
    def forward_without_gradients(self):
        model, _ = self.pairs[0]
        with torch.no_grad():
            model(cases.randn(5, 4, seed=9).float())

    @rule()
    def a_forward_and_no_backward(self):
        model, _ = self.pairs[0]
        CE(model(cases.randn(2, 4, seed=7).float()), torch.arange(2))

    @rule()
    def look_at_gradients(self):
        model = self.pairs[0][0]
        params = [p for p in model.parameters() if p.requires_grad]
        if params:
            x, y = cases.randn(3, 4, seed=8).float(), torch.arange(3)
            torch.autograd.grad(CE(model(x), y), params)

    @precondition(lambda self: all(p.grad is None for p in self.pairs[0][0].parameters()))
    @rule()
    def copy_both(self):
        model, optimizer = self.pairs[0]
        optimizer.remove()
        self.pairs[0] = copy.deepcopy((model, optimizer))

    @precondition(
        lambda self: self.joined and not self.passes and all(p.grad is None for p in self.pairs[0][0].parameters())
    )
    @rule()
    def save_and_load(self):
        model, optimizer = self.pairs[0]
        other = SecondOrderOptimizer(model, model.parameters(), **self.options)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.remove()
        self.pairs[0] = model, other

    # --------------------------------------------------------------------------------- what holds

    @invariant()
    def parameters_are_finite_and_those_of_the_twin(self):
        if not hasattr(self, "pairs"):
            return
        for p, q in zip(*(model.parameters() for model, _ in self.pairs), strict=True):
            assert p.isfinite().all()
            assert torch.equal(p, q)

    def teardown(self):
        for _, optimizer in getattr(self, "pairs", ()):
            optimizer.remove()


def run(sequences):
    run_state_machine_as_test(
        Calls,
        settings=settings(
            max_examples=sequences,
            stateful_step_count=15,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_sequences_of_calls():
    run(500)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_many_random_sequences_of_calls():
    run(10_000)
