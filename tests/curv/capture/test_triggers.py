"""What starts a curvature pass, what it measures, what it leaves alone: the curvature kept is that of the function
whose gradient lies in `.grad`, for every loop that torch allows."""

import collections
import copy
import dataclasses
import gc
import io
import os
import weakref
from contextlib import nullcontext

import cases
import oracles
import pytest
import torch
from measured import KINDS, TRUTH, Part, close, covered, dense, measured, optimizer, same_random_state, truth
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchcurv import Preconditioner, SecondOrderOptimizer, curvature

N, V = 4, cases.CLASSES
CE = nn.CrossEntropyLoss()
TRIGGERS = ["module", "name", "observe"]


def mlp(dtype=torch.float64):
    return cases.seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, V))).to(dtype)


def batch(n=N, seed=0, dtype=torch.float64):
    y = torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed))
    return cases.randn(n, 4, seed=seed).to(dtype), y


def made(trigger, model, loss=CE, **options):
    return optimizer(model, {"module": loss, "name": "cross_entropy", "observe": None}[trigger], **options)


def lost(opt, trigger, output, y, loss=CE, weight=1.0):
    """The loss, noted in the way of the trigger."""
    if trigger == "observe":
        opt.observe(output, y, loss, weight)
    return weight * loss(output, y)


# ------------------------------------------------------------------------------------- sums of losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("trigger", ["module", "observe"])
def test_accumulation_adds_the_curvature_that_the_gradient_adds(trigger, divided, kind):
    opt = made(trigger, mlp(), curv_type=kind)
    batches, c = [batch(seed=k, n=3 + k) for k in range(3)], 1 / 3 if divided else 1.0
    for x, y in batches:
        lost(opt, trigger, opt.model(x), y, weight=c).backward()
    close(measured(opt), sum(c * truth(opt, CE, x, y, kind) for x, y in batches))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_losses_of_several_forward_passes_in_one_backward_add(trigger, kind):
    opt = made(trigger, mlp(), curv_type=kind)
    batches = [batch(seed=k, n=3 + k) for k in range(3)]
    sum(lost(opt, trigger, opt.model(x), y) for x, y in batches).backward()
    close(measured(opt), sum(truth(opt, CE, x, y, kind) for x, y in batches))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trigger", ["module", "observe"])
def test_weighted_losses_of_one_output_add_with_their_weights(trigger, kind):
    opt = made(trigger, mlp(), curv_type=kind)
    (x, y), (_, other), smooth = batch(), batch(seed=1), nn.CrossEntropyLoss(label_smoothing=0.2)
    output = opt.model(x)
    second = smooth if trigger == "observe" else CE
    (lost(opt, trigger, output, y, weight=0.3) + lost(opt, trigger, output, other, second, 2.0)).backward()
    close(measured(opt), 0.3 * truth(opt, CE, x, y, kind) + 2 * truth(opt, second, x, other, kind))


class TwoHeads(nn.Module):
    """A trunk with two heads; `pack` decides how both are returned."""

    def __init__(self, pack=lambda a, b: (a, b)):
        super().__init__()
        self.trunk, self.a, self.b, self.pack = nn.Linear(4, 5), nn.Linear(5, V), nn.Linear(5, 2), pack

    def forward(self, x):
        z = self.trunk(x).tanh()
        return self.pack(self.a(z), self.b(z))


@dataclasses.dataclass
class Outputs:
    logits: torch.Tensor
    values: torch.Tensor


PACKS = {
    "tuple": (lambda a, b: (a, b), lambda out: (out[0], out[1])),
    "nested": (lambda a, b: [{"x": a}, (b,)], lambda out: (out[0]["x"], out[1][0])),
    "dict": (
        lambda a, b: collections.OrderedDict(loss=a.sum(), logits=a, values=b),
        lambda out: (out["logits"], out["values"]),
    ),
    "object": (Outputs, lambda out: (out.logits, out.values)),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trigger", ["module", "observe", "both"])
@pytest.mark.parametrize("pack", PACKS)
def test_losses_of_two_outputs_add_with_their_weights(pack, trigger, kind):
    make, read = PACKS[pack]
    model, mse = cases.seeded(lambda: TwoHeads(make)), nn.MSELoss()
    opt = optimizer(model, None if trigger == "observe" else CE, curv_type=kind)
    (x, y), target = batch(), cases.randn(N, 2, seed=5)
    loss = CE if trigger == "module" else mse
    for _ in range(2):  # the second step is like the first
        opt.zero_grad()
        a, b = read(model(x))
        if trigger == "observe":
            opt.observe(a, y, CE)
        second = b if trigger != "module" else torch.cat([b, b[:, :1]], 1)
        if trigger != "module":
            opt.observe(b, target, mse, weight=0.5)
        (CE(a, y) + 0.5 * loss(second, target if trigger != "module" else y)).backward()
        got = measured(opt)
    of_a = truth(opt, CE, x, y, kind, Part(model, lambda out: read(out)[0]))
    widened = Part(model, lambda out: torch.cat([read(out)[1], read(out)[1][:, :1]], 1))
    of_b = truth(opt, loss, x, target, kind, Part(model, lambda out: read(out)[1])) if trigger != "module" else None
    of_b = truth(opt, CE, x, y, kind, widened) if of_b is None else of_b
    close(got, of_a + 0.5 * of_b)


@pytest.mark.parametrize("kind", KINDS)
def test_output_fn_names_the_output_that_a_named_loss_is_of(kind):
    model, (x, y) = cases.seeded(lambda: TwoHeads(Outputs)), batch()
    opt = optimizer(model, "cross_entropy", curv_type=kind)
    with pytest.raises(ValueError, match="returned 2 tensors: pass output_fn="):
        model(x)
    opt = optimizer(model, "cross_entropy", output_fn=lambda out: out.logits, curv_type=kind)
    out = model(x)
    CE(out.logits, y).backward()
    opt.zero_grad(set_to_none=True)
    CE(model(x).logits, y).backward()
    opt.step()
    first = truth(opt, CE, x, y, kind, Part(model, lambda out: out.logits))
    opt.zero_grad()
    CE(model(x).logits, y).backward()
    close(measured(opt), first)


def test_output_fn_must_pick_a_tensor_of_the_output():
    for pick, got in ((lambda out: 2 * out, "a new tensor"), (lambda out: {"x": out}, "a dict")):
        opt = optimizer(mlp(), "cross_entropy", output_fn=pick)
        with pytest.raises(ValueError, match=f"output_fn returned {got}; it must pick"):
            opt.model(batch()[0])


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_an_empty_batch_adds_nothing(trigger):
    opt, (x, y) = made(trigger, mlp()), batch()
    total = nn.CrossEntropyLoss(reduction="sum")
    (0 * lost(opt, trigger, opt.model(x[:0]), y[:0], total).nan_to_num()).backward()
    lost(opt, trigger, opt.model(x), y).backward()
    close(measured(opt), truth(opt, CE, x, y))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_taken_inside_the_forward_and_on_hidden_outputs_count(kind):
    class DeeplySupervised(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.early, self.two = nn.Linear(4, 5), nn.Linear(5, V), nn.Linear(5, V)

        def outputs(self, x):
            z = self.one(x).tanh()
            early = self.early(z)
            return early, self.two(z + early.sum(1, keepdim=True))

        def forward(self, x, y=None):
            early, late = self.outputs(x)
            return 0.5 * CE(early, y) + CE(late, y)

    model, (x, y) = cases.seeded(DeeplySupervised), batch()
    opt = optimizer(model, CE, curv_type=kind)
    model(x, y).backward()
    got = measured(opt)
    views = [Part(model, None) for _ in range(2)]
    for k, view in enumerate(views):
        view.forward = lambda x, k=k: model.outputs(x)[k]
    early, late = (truth(opt, CE, x, y, kind, view) for view in views)
    close(got, 0.5 * early + late)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trigger", ["module", "observe"])
def test_layers_called_outside_the_models_forward_count(trigger, kind):
    opt = made(trigger, mlp(), curv_type=kind)
    (x, y), (x2, y2), model = batch(), batch(seed=1), opt.model
    model[0](x)  # leads nowhere
    z, z2 = model[0](x).tanh(), model[0](x2).tanh()
    model(x)  # a forward pass in between, unused
    first = lost(opt, trigger, model[2](z), y)
    (first + lost(opt, trigger, model[2](z2), y2)).backward()
    close(measured(opt), truth(opt, CE, x, y, kind) + truth(opt, CE, x2, y2, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trigger", ["module", "observe"])
def test_a_layer_on_top_of_the_models_output_counts_with_it(trigger, kind):
    class Extra(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, V)

        def forward(self, x):
            return self.body(x).tanh()

    model, (x, y) = cases.seeded(Extra), batch()
    opt = optimizer(model, CE if trigger == "module" else "cross_entropy", curv_type=kind)
    lost(opt, trigger, model.head(model(x)), y).backward()
    whole = Part(model, None)
    whole.forward = lambda x: model.head(model(x))
    close(measured(opt), truth(opt, CE, x, y, kind, whole))


def test_one_loss_of_two_forward_passes_raises():
    opt, (x, y) = optimizer(mlp(), CE), batch()
    with pytest.raises(ValueError, match="joins the outputs of several forward passes"):
        CE(torch.cat([opt.model(x), opt.model(x)]), torch.cat([y, y]))


def test_an_observed_output_is_counted_by_no_other_trigger():
    for loss_fn in (CE, "cross_entropy"):
        opt, (x, y) = optimizer(mlp(), loss_fn), batch()
        output = opt.model(x)
        opt.observe(output, y, weight=3.0)
        (3 * CE(output, y)).backward()
        close(measured(opt), 3 * truth(opt, CE, x, y))


@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("kinds", [("ggn", "empirical_fisher"), ("empirical_fisher", "ggn")])
def test_kinds_of_several_groups_are_measured_in_one_backward(kinds, trigger):
    class HeadFirst(nn.Module):
        """Blocks come in the order of definition: passes for the second go through the layer of the first."""

        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(5, V), nn.Linear(4, 5)

        def forward(self, x):
            return 2 * self.head(self.body(x).tanh())

    model, (x, y) = cases.seeded(HeadFirst), batch()
    layers = (model.head, model.body)
    groups = [{"params": m.parameters(), "curv_type": kind} for m, kind in zip(layers, kinds, strict=True)]
    opt = made(trigger, model, params=groups, approx="block")
    lost(opt, trigger, model(x), y).backward()
    opt.step()
    named = list(model.named_parameters())
    for block, kind in zip(opt.engine.blocks, kinds, strict=True):
        whole = truth_of(model, x, y, kind=TRUTH[kind])
        names = [name for name, _ in named if name.startswith(block.name)]
        close(dense(opt, "tensors", block), oracles.sub_block(whole, named, names))


# ------------------------------------------------------------------------------------ scales and dtypes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c", [1e-4, 17.0])
def test_a_factor_on_the_loss_is_a_factor_on_its_curvature(c, kind):
    opt, (x, y) = optimizer(mlp(), CE, curv_type=kind), batch()
    (c * CE(opt.model(x), y)).backward()
    close(measured(opt), c * truth(opt, CE, x, y, kind))


class Scale:
    def __init__(self, scale):
        self.scale = scale

    def get_scale(self):
        return self.scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_the_scale_of_a_scaler_is_divided_out_and_other_factors_stay(trigger, kind):
    scaler, (x, y) = Scale(2.0**13), batch()
    opt = made(trigger, mlp(), curv_type=kind, grad_scaler=scaler)
    c = 1.0 if trigger == "name" else 0.25
    (scaler.scale * lost(opt, trigger, opt.model(x), y, weight=c)).backward()
    close(measured(opt), c * truth(opt, CE, x, y, kind))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_a_grad_scaler_skips_leaves_nothing_behind(kind, set_to_none):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    opt = optimizer(mlp(), CE, curv_type=kind, grad_scaler=scaler)
    (x, y), (other, z) = batch(), batch(seed=1)
    for bad, inputs, labels in ((True, other, z), (False, x, y)):
        opt.zero_grad(set_to_none)
        scaler.scale(CE(opt.model(inputs), labels)).backward()
        if bad:
            opt.model[0].weight.grad[0, 0] = float("inf")
        scaler.step(opt)
        scaler.update()
        assert bool(opt.engine.blocks[0].tensors) != bad
    block = opt.engine.blocks[0]
    close(block.tensors["matrix"][0].trace(), truth(opt, CE, x, y, kind).trace())


@pytest.mark.parametrize("approx", ["full", "kfac", "diag"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_bfloat16_measure_nearly_the_same_in_float32(kind, approx):
    found = {}
    for name, dtype in (("float32", torch.float32), ("autocast", torch.float32), ("bfloat16", torch.bfloat16)):
        x, y = batch(64, dtype=dtype)
        opt = optimizer(mlp(dtype), CE, curv_type=kind, approx=approx)
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
            CE(opt.model(x), y).backward()  # the pass starts inside the region
        opt.step()
        found[name] = [tensor for block in opt.engine.blocks for tensor in block.tensors.values()]
    for name in ("autocast", "bfloat16"):
        assert all(tensor.dtype == torch.float32 for tensor in found[name])
        for got, expected in zip(found[name], found["float32"], strict=True):
            assert (got - expected).norm() < 0.03 * expected.norm()


def test_an_input_edited_in_place_after_autocast_has_copied_it_raises():
    class Editing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, V)

        def forward(self, x):
            x = x * 1
            x += self.a(x)
            return self.b(x)

    x, y = batch(dtype=torch.float32)
    opt = optimizer(cases.seeded(Editing).float(), CE)
    with torch.autocast("cpu", torch.bfloat16):
        loss = CE(opt.model(x), y)
    with pytest.raises(RuntimeError, match="the input of layer 'a' was edited in place"):
        loss.backward()


# ------------------------------------------------------------- only a backward that accumulates into .grad


def toward_inputs(opt, trigger, x, y):
    x = x.clone().requires_grad_()
    torch.autograd.grad(lost(opt, trigger, opt.model(x), y), x)


def toward_parameters(opt, trigger, x, y):
    torch.autograd.grad(lost(opt, trigger, opt.model(x), y), list(opt.model.parameters()))


def penalty_of_the_input_gradient(opt, trigger, x, y):
    x = x.clone().requires_grad_()
    torch.autograd.grad(lost(opt, trigger, opt.model(x), y), x, create_graph=True)[0].square().sum()


def backward_into_inputs(opt, trigger, x, y):
    x = x.clone().requires_grad_()
    lost(opt, trigger, opt.model(x), y).backward(inputs=[x])


def an_evaluation(opt, trigger, x, y):
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            CE(opt.model.eval()(x), y)
    opt.model.train()
    CE(opt.model(x), y)  # with gradients, but without a backward


def function_transforms(opt, trigger, x, y):
    params = dict(opt.model.named_parameters())
    call = lambda params, x: torch.func.functional_call(opt.model, params, x)  # noqa: E731
    torch.func.vmap(opt.model)(x)
    torch.func.grad(lambda params: CE(call(params, x), y))(params)
    torch.func.jacrev(call)(params, x)
    fast = {name: (p + 1).detach().requires_grad_() for name, p in params.items()}
    CE(call(fast, x), y).backward()


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize(
    "other",
    [
        toward_inputs,
        toward_parameters,
        penalty_of_the_input_gradient,
        backward_into_inputs,
        an_evaluation,
        function_transforms,
    ],
)
def test_what_adds_nothing_to_grad_adds_no_curvature(other, trigger, kind):
    opt, (x, y) = made(trigger, mlp(), curv_type=kind), batch()
    other(opt, trigger, *batch(seed=1))
    assert not opt.engine.blocks[0].pending
    loss = lost(opt, trigger, opt.model(x), y)
    other(opt, trigger, *batch(seed=2))
    loss.backward()
    other(opt, trigger, *batch(seed=3))
    close(measured(opt), truth(opt, CE, x, y, kind))


@pytest.mark.parametrize("trigger", ["module", "observe"])
def test_a_gradient_penalty_in_the_loss_leaves_the_curvature_of_the_loss(trigger):
    opt, (x, y) = made(trigger, mlp()), batch()
    x.requires_grad_()
    output = opt.model(x)
    (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    (lost(opt, trigger, output, y) + slope.square().sum()).backward()
    said = pytest.warns(UserWarning, match="ResidualNewton") if trigger == "module" else nullcontext()
    with said:
        close(measured(opt), truth(opt, CE, x.detach(), y))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_the_adversarial_example_before_the_step_does_not_count(trigger, kind):
    opt, (x, y) = made(trigger, mlp(), curv_type=kind), batch()
    attacked = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(lost(opt, trigger, opt.model(attacked), y), attacked)
    x = x + 0.1 * slope.sign()
    lost(opt, trigger, opt.model(x), y).backward()
    close(measured(opt), truth(opt, CE, x, y, kind))


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_only_the_blocks_that_a_partial_backward_reaches_are_fed(trigger):
    opt, (x, y) = made(trigger, mlp(), approx="diag"), batch()
    head = list(opt.model[2].parameters())
    loss = lost(opt, trigger, opt.model(x), y)
    loss.backward(inputs=head, retain_graph=True)
    assert [bool(block.pending) for block in opt.engine.blocks] == [False, True]
    loss.backward(inputs=list(opt.model[0].parameters()))
    opt.step()
    expected = truth_of(opt.model, x, y).diag()
    got = torch.cat(
        [part.flatten() for block in opt.engine.blocks for part in block.layout.split([block.tensors["diag"]])]
    )
    close(got, expected)


def truth_of(model, x, y, loss=CE, kind=oracles.ggn):
    return kind(model, loss, x, y, list(model.named_parameters()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_one_output_counts_as_often_as_its_gradient_and_again_for_new_gradients(trigger, kind):
    opt, (x, y) = made(trigger, nn.Sequential(mlp()[0], mlp()[2]), curv_type=kind), batch()
    loss = lost(opt, trigger, opt.model(x), y)
    expected = truth(opt, CE, x, y, kind)
    loss.backward(retain_graph=True)
    close(dense(opt, "pending"), expected)
    loss.backward(retain_graph=True)
    close(dense(opt, "pending"), 2 * expected)
    for forget in (opt.zero_grad, opt.model.zero_grad):
        forget()
        loss.backward(retain_graph=True)
        close(dense(opt, "pending"), expected)
    close(measured(opt), expected)


# ------------------------------------------------------------------------------- how long captures live


@pytest.mark.pairwise
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("by", ["optimizer", "model"])
@pytest.mark.parametrize("when", ["before forward", "before backward"])
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_gradients_that_are_zeroed_take_their_curvature_along(trigger, when, by, set_to_none):
    opt, (x, y) = made(trigger, mlp()), batch()
    if by == "model" and not set_to_none:
        pytest.skip("nothing tells zeros by model.zero_grad(set_to_none=False) from a gradient of zero")
    zero = opt.zero_grad if by == "optimizer" else opt.model.zero_grad
    lost(opt, trigger, opt.model(batch(seed=1)[0]), batch(seed=1)[1]).backward()
    if when == "before forward":
        zero(set_to_none=set_to_none)
    loss = lost(opt, trigger, opt.model(x), y)
    if when == "before backward":
        zero(set_to_none=set_to_none)
    loss.backward()
    close(measured(opt), truth(opt, CE, x, y))


def test_eval_mode_with_gradients_counts():
    model = nn.Sequential(mlp(), nn.Dropout(0.5)).eval()
    opt, (x, y) = optimizer(model, "cross_entropy"), batch()
    CE(model(x), y).backward()
    close(measured(opt), truth(opt, CE, x, y))


@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("inside", [True, False])
def test_an_output_without_a_backward_frees_what_was_captured(trigger, inside):
    opt, (x, y) = made(trigger, mlp()), batch()
    kept = []
    handle = opt.model[2].register_forward_pre_hook(lambda module, args: kept.append(weakref.ref(args[0])))
    gc.disable()
    try:
        output = opt.model(x) if inside else opt.model[2](opt.model[0](x).tanh())
        if inside or trigger != "name":
            loss = lost(opt, trigger, output, y)
            del loss
        kept.append(weakref.ref(output))
        del output
        assert [ref() for ref in kept] == [None, None]
    finally:
        gc.enable()
        handle.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_a_step_frees_what_was_captured(trigger, kind):
    opt, (x, y) = made(trigger, mlp(), curv_type=kind, approx="kfac"), batch()
    kept = []
    handle = opt.model[2].register_forward_pre_hook(lambda module, args: kept.append(weakref.ref(args[0])))
    gc.disable()
    try:
        loss = lost(opt, trigger, opt.model(x), y)
        loss.backward()
        opt.step()
        del loss
        assert kept[0]() is None
    finally:
        gc.enable()
        handle.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_a_backward_that_fails_halfway_frees_what_was_captured(trigger, kind):
    opt, (x, y) = made(trigger, mlp(), curv_type=kind, approx="kfac"), batch()
    kept = []
    lost(opt, trigger, opt.model(x), y).backward()
    handles = [
        opt.model[2].register_forward_pre_hook(lambda module, args: kept.append(weakref.ref(args[0]))),
        opt.model[1].register_forward_hook(lambda *args: args[-1].register_hook(lambda g: 1 / 0) and None),
    ]
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError):
            lost(opt, trigger, opt.model(x), y).backward()
        assert kept[0]() is None
    finally:
        gc.enable()
    for handle in handles:
        handle.remove()
    opt.zero_grad()
    lost(opt, trigger, opt.model(x), y).backward()
    opt.step()


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_two_outputs_of_one_pass_free_what_was_captured(trigger):
    model, (x, y) = cases.seeded(TwoHeads), batch()
    opt = made(trigger, model, **({"output_fn": lambda out: out[0]} if trigger == "name" else {}))
    gc.disable()
    try:
        a, b = model(x)
        loss = lost(opt, trigger, a, y)
        refs = [weakref.ref(t) for t in (a, b)]
        nodes = [t.grad_fn.metadata for t in (a, b)]
        assert any(nodes)
        alive = weakref.ref(next(iter(nodes[0].values()))[0].capture)
        del a, b, loss, nodes
        assert [ref() for ref in refs] == [None, None] and alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_nothing_is_recorded_while_nothing_is_due(trigger, monkeypatch):
    opt, (x, y) = made(trigger, mlp(), update_every=3), batch()
    seen = []
    for step in range(7):
        opt.zero_grad()
        output = opt.model(x)
        noted = [key for key in output.grad_fn.metadata if "torchcurv" in str(key)]
        loss = lost(opt, trigger, output, y)
        loss.backward()
        seen.append((bool(noted), bool(opt.engine.blocks[0].pending)))
        opt.step()
        assert (step % 3 == 0) == seen[-1][0] == seen[-1][1]


def test_an_exception_in_the_forward_leaves_nothing_behind():
    opt, (x, y) = optimizer(mlp(), "cross_entropy"), batch()
    for bad in (cases.randn(N, 3), None):
        with pytest.raises((RuntimeError, TypeError)):
            opt.model(bad)
    handle = opt.model[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opt.model(x)
    handle.remove()
    assert not opt.engine.recorder.forward._calls and not opt.engine.recorder.forward._depth
    CE(opt.model(x), y).backward()
    close(measured(opt), truth(opt, CE, x, y))


# ---------------------------------------------------------------------------------------------- models


class Repeated(nn.Module):
    """One layer called three times, by position and by keyword."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(4, 4), nn.Linear(4, V)

    def forward(self, x):
        z = self.cell(x).tanh()
        z = self.cell(input=z).tanh()
        return self.head(input=self.cell(z).tanh())


class Tied(nn.Module):
    """Two modules that share their parameters, and a third that shares nothing."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, V)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x):
        return self.head(self.b(self.a(x).tanh()).tanh())


class PartlyUnused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle, self.dropped = nn.Linear(4, V), nn.Linear(4, V), nn.Linear(4, V)

    def forward(self, x):
        self.dropped(x)
        return self.used(x)


class FusedRelu(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class Subclass(nn.Linear):
    """A low-rank addition: the signal at the output is still that of the inherited product."""

    def forward(self, x):
        return super().forward(x) + 0.1 * x.sum(-1, keepdim=True)


class Padded(nn.Linear):
    """Returns a view of a part of what it computes."""

    def forward(self, x):
        return F.linear(x, F.pad(self.weight, (0, 0, 1, 2)), F.pad(self.bias, (1, 2)))[..., 1:-2]


class EditedOutput(nn.Module):
    """The layer's output is edited through views and in place before it is used."""

    def __init__(self, tokens):
        super().__init__()
        self.body, self.head, self.tokens = nn.Linear(4, 5), nn.Linear(5, V), tokens

    def forward(self, x):
        if self.tokens:
            x = x.unsqueeze(1).expand(-1, 3, -1)
        z = self.body(x)
        z.mul_(0.7)
        z[..., :2] = z[..., 1:3].clone()
        z += 1
        z = z.tanh()
        return self.head(z.mean(1) if self.tokens else z)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, V)

    def forward(self, x):
        body = lambda x: F.relu_(self.b(self.a(x).tanh()))  # noqa: E731
        return self.c(body(x) if transformed() else checkpoint(body, x, use_reentrant=False))


def transformed():
    """Inside a transform of torch.func, where the truths are computed and checkpointing does not work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class Grid(nn.Module):
    """Linear on three-dimensional inputs followed by an in-place activation."""

    def __init__(self, bias):
        super().__init__()
        self.a, self.b = nn.Linear(2, 5, bias=bias), nn.Linear(5, V, bias=bias)

    def forward(self, x):
        return F.relu_(self.b(F.relu_(self.a(x.view(-1, 2, 2))))).sum(1)


class Image(nn.Module):
    def __init__(self, channels_last, linear_first=True):
        super().__init__()
        self.channels_last = channels_last
        self.lift, self.conv = nn.Linear(4, 24), nn.Conv2d(2, 3, 2, padding=1)
        self.group, self.head = nn.Conv2d(3, 3, 2, groups=3), nn.Linear(36, V)

    def forward(self, x):
        z = self.lift(x).view(-1, 2, 3, 4)
        if self.channels_last:
            z = z.contiguous(memory_format=torch.channels_last)
        z = F.elu_(self.group(F.relu_(self.conv(z))))
        return self.head(z.flatten(1))


class Containers(nn.Module):
    """Takes a dict and a tuple, calls a nested module that is not its own child's forward."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 5), nn.Tanh()), "b": nn.Linear(5, V)})

    def forward(self, x):
        return self.read({"x": x}, (1.0, x))

    def read(self, by_name, pair):
        return self.inner["b"](self.inner["a"][1](self.inner["a"][0](by_name["x"] * pair[0])))


def frozen(model, *names):
    for name, p in model.named_parameters():
        p.requires_grad_(name not in names)
    return model


def relu_mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 5), nn.ELU(inplace=True), nn.Linear(5, V))


MODELS = {
    "in-place activations": relu_mlp,
    "in-place activations of views": lambda: Grid(True),
    "in-place activations of products": lambda: Grid(False),
    "in-place activations of convolutions": lambda: Image(False),
    "channels last": lambda: Image(True),
    "repeated and keyword calls": Repeated,
    "tied layers": Tied,
    "unused layers": PartlyUnused,
    "frozen weight": lambda: frozen(relu_mlp(), "0.weight", "2.weight"),
    "frozen bias": lambda: frozen(relu_mlp(), "0.bias", "4.bias"),
    "frozen layer in the middle": lambda: frozen(relu_mlp(), "2.weight", "2.bias"),
    "frozen first and last": lambda: frozen(relu_mlp(), "0.weight", "0.bias", "4.weight", "4.bias"),
    "a layer that is more than its type": lambda: nn.Sequential(FusedRelu(4, 5), nn.Linear(5, V)),
    "subclass": lambda: nn.Sequential(Subclass(4, 5), nn.Tanh(), Subclass(5, V)),
    "views of parts edited in place": lambda: nn.Sequential(Padded(4, 5), nn.ELU(inplace=True), Padded(5, V)),
    "edited output": lambda: EditedOutput(False),
    "edited view": lambda: EditedOutput(True),
    "checkpoint": Checkpointed,
    "one layer": lambda: nn.Linear(4, V),
    "dicts and tuples": Containers,
    "output through a view": lambda: nn.Sequential(nn.Linear(4, 2 * V), nn.Unflatten(1, (2, V)), cases.MeanPool()),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("name", MODELS)
def test_models_are_measured_exactly(name, trigger, kind):
    opt, (x, y) = made(trigger, cases.seeded(MODELS[name]), curv_type=kind), batch()
    gradients = torch.autograd.grad(CE(opt.model(x), y), [p for _, p in covered(opt)], allow_unused=True)
    with same_random_state():
        lost(opt, trigger, opt.model(x), y).backward()
    for (_, p), g in zip(covered(opt), gradients, strict=True):
        assert (p.grad is None and g is None) or torch.allclose(p.grad, g)
    close(measured(opt), truth(opt, CE, x, y, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trigger", ["module", "observe"])
def test_an_output_edited_in_place_before_the_loss_is_read_when_the_loss_is(trigger, kind):
    opt, (x, y) = made(trigger, mlp(), curv_type=kind), batch()
    output = opt.model(x)
    output.mul_(2.0)
    lost(opt, trigger, output, y).backward()
    close(measured(opt), truth(opt, CE, x, y, kind, Part(opt.model, lambda out: 2 * out)))


@pytest.mark.parametrize("trigger", ["name", "observe"])
def test_an_output_edited_in_place_after_it_was_noted_raises(trigger):
    opt, (x, y) = made(trigger, mlp()), batch()
    output = opt.model(x)
    if trigger == "observe":
        opt.observe(output, y, CE)
    output.mul_(2.0)
    with pytest.raises(RuntimeError, match="edited in place before the loss: apply that operation out of place"):
        CE(output, y).backward()


def test_reentrant_checkpoints_raise():
    class Reentrant(Checkpointed):
        def forward(self, x):
            return self.c(checkpoint(lambda z: self.b(z).tanh(), self.a(x), use_reentrant=True))

    opt, (x, y) = SecondOrderOptimizer(cases.seeded(Reentrant), approx="diag"), batch()
    with pytest.raises(RuntimeError, match="use_reentrant"):
        CE(opt.model(x), y).backward()


NON_LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@NON_LEAF
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("built_on", ["model", "compiled"])
def test_a_compiled_model_is_measured_exactly(built_on, kind):
    torch._dynamo.reset()
    model, (x, y) = mlp(), batch()
    compiled = torch.compile(model, backend="eager")
    opt = optimizer(model if built_on == "model" else compiled, CE, curv_type=kind)
    for _ in range(3):
        opt.zero_grad()
        CE(compiled(x), y).backward()
        got = measured(opt)
    close(got, truth_of(model, x, y, kind=TRUTH[kind]))
    torch._dynamo.reset()


@NON_LEAF
def test_hooks_that_came_after_the_first_compiled_call_are_missed_with_a_message():
    torch._dynamo.reset()
    model, (x, y) = mlp(), batch()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    opt = SecondOrderOptimizer(model)
    CE(compiled(x), y).backward()
    if any(block.pending for block in opt.engine.blocks):
        opt.step()
    else:
        with pytest.raises(RuntimeError, match=r"before torch.compile's first call"):
            opt.step()
    torch._dynamo.reset()


# --------------------------------------------------------------------------------- hooks come and go


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.mark.parametrize("make", [SecondOrderOptimizer, Preconditioner])
def test_hooks_go_with_remove_and_with_the_optimizer(make):
    model, loss = mlp(), nn.CrossEntropyLoss()
    opt = make(model, loss_fn=loss)
    assert hook_count(model) == 4 and hook_count(loss) == 1
    opt.remove()
    assert hook_count(model) == hook_count(loss) == 0
    opt = make(model, loss_fn=loss)
    CE(model(batch()[0].double()), batch()[1]).backward()
    del opt
    assert hook_count(model) == hook_count(loss) == 0
    curvature(model, loss, [batch()])
    assert hook_count(model) == hook_count(loss) == 0


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, pickled])
def test_the_hooks_of_a_copied_model_are_inert(copy_of):
    opt, (x, y) = optimizer(mlp(), "cross_entropy"), batch()
    other = copy_of(opt.model)
    CE(other(x), y).backward()
    assert not opt.engine.blocks[0].pending
    assert all("torchcurv" not in str(module.__dict__.keys()) for module in opt.model.modules())
    CE(opt.model(x), y).backward()
    CE(other(x), y).backward()
    close(measured(opt), truth(opt, CE, x, y))


@pytest.mark.parametrize("make", [SecondOrderOptimizer, Preconditioner])
def test_nothing_is_hung_on_the_users_modules(make):
    model = mlp()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    opt = make(model)
    CE(model(batch()[0]), batch()[1]).backward()
    assert before == {name: set(module.__dict__) for name, module in model.named_modules()}
    opt.remove()


# ------------------------------------------------------------------------------------------- draws


def drawn(curv_type="ggn", seed=0, steps=1, micro=1):
    opt = optimizer(mlp(), CE, curv_type=curv_type, samples=1, seed=seed)
    (x, y), found = batch(16), []
    for _ in range(steps):
        for _ in range(micro):
            CE(opt.model(x), y).backward()
            found.append(opt.engine.blocks[0].pending.tensors["matrix"].clone())
        opt.step()
        opt.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["ggn", "fisher"])
def test_draws_repeat_for_the_same_seed_step_and_micro_batch_and_differ_otherwise(kind):
    with same_random_state():
        one, again = drawn(kind, steps=2, micro=2), drawn(kind, steps=2, micro=2)
        other = drawn(kind, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    each = [one[0], one[1] - one[0], one[2], one[3] - one[2], other[0]]
    for k, a in enumerate(each):
        assert all(not torch.allclose(a, b) for b in each[k + 1 :])


@pytest.mark.parametrize("kind", ["ggn", "fisher"])
@pytest.mark.parametrize("name", ["ce", "mse", "bce"])
def test_draws_converge_to_the_exact_curvature_as_one_over_the_root_of_their_number(name, kind):
    model, (x, y) = mlp(), batch()
    loss = {"ce": CE, "mse": nn.MSELoss(), "bce": nn.BCEWithLogitsLoss()}[name]
    y = y if name == "ce" else cases.randn(N, V, seed=1).sigmoid()
    exact = truth_of(model, x, y, loss)
    errors = []
    for samples in (16, 1024):
        runs = [
            curvature(model, loss, [(x, y)], curv_type=kind, approx="full", samples=samples, seed=k) for k in range(8)
        ]
        errors.append(sum(float((run.to_dense() - exact).norm() / exact.norm()) ** 2 for run in runs) ** 0.5)
    assert 0.7 < errors[0] / errors[1] / 8 < 1.4


# ------------------------------------------------------------------------------------------- errors


class Functional(nn.Module):
    """Uses a weight besides calling its layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, V)

    def forward(self, x):
        return self.b(self.a(x).tanh() + F.linear(x, self.a.weight))


class OnlyFunctional(Functional):
    def forward(self, x):
        return self.b(F.linear(x, self.a.weight, self.a.bias))


EXPLAINED_NOT = {
    "functional use": (Functional, "a.weight"),
    "a weight shared with a function of another type": (lambda: Embedded(), "head.weight"),
}


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.mix = nn.Linear(4, V, bias=False), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.mix(nn.functional.embedding(torch.arange(len(x)) % V, self.head.weight)).tanh())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("name", EXPLAINED_NOT)
def test_a_gradient_that_the_recorded_calls_do_not_explain_raises_and_names_the_parameter(name, trigger, kind):
    make, parameter = EXPLAINED_NOT[name]
    opt, (x, y) = made(trigger, cases.seeded(make), curv_type=kind, approx="diag"), batch()
    with pytest.raises(RuntimeError, match=rf"the gradient of {parameter}[ ,].*approx=None.*unsupported="):
        lost(opt, trigger, opt.model(x), y).backward()


@pytest.mark.parametrize("name", EXPLAINED_NOT)
def test_such_a_gradient_is_taken_plainly_if_the_user_says_so(name):
    make, parameter = EXPLAINED_NOT[name]
    (x, y), options = batch(), {"lr": 0.1, "momentum": 0.0, "kl_clip": None}
    opt = SecondOrderOptimizer(cases.seeded(make), loss_fn=CE, approx="diag", unsupported="gradient", **options)
    for _ in range(2):
        opt.zero_grad()
        CE(opt.model(x), y).backward()
        p = opt.model.get_parameter(parameter)
        expected = p.detach() - 0.1 * p.grad
        opt.step()
        assert torch.allclose(p, expected)
    assert opt.engine.blocks[-1].tensors


def test_a_gradient_penalty_or_weight_decay_in_the_loss_is_no_other_use():
    opt, (x, y) = optimizer(mlp(), CE), batch()
    (CE(opt.model(x), y) + 0.1 * sum(p.square().sum() for p in opt.model.parameters())).backward()
    close(measured(opt), truth(opt, CE, x, y))


def test_a_bias_before_a_batch_norm_whose_gradient_is_rounding_passes():
    layers = [nn.Conv2d(1, 5, 2), nn.BatchNorm2d(5, affine=False), nn.Tanh(), nn.Flatten(), nn.Linear(45, V)]
    model = cases.seeded(lambda: nn.Sequential(*layers)).float()
    model[0].weight.requires_grad_(False)
    x, y = cases.randn(512, 1, 4, 4).float(), torch.arange(512) % V
    opt = optimizer(model, CE, approx="diag")
    CE(model(x), y).backward()
    assert all(block.pending for block in opt.engine.blocks)


def test_weights_put_in_for_one_call_are_not_ours():
    opt, (x, y) = optimizer(mlp(), CE), batch()
    doubled = {name: 2 * p for name, p in opt.model.named_parameters()}
    CE(torch.func.functional_call(opt.model, doubled, x), y).backward()
    with pytest.raises(RuntimeError, match="no curvature was captured"):
        opt.step()


def test_hooks_on_parameters_do_not_run_more_often_than_the_backward():
    opt, (x, y) = optimizer(mlp(), CE), batch()
    calls = []
    opt.model[0].weight.register_hook(lambda g: calls.append(1) or g * 0.5)
    CE(opt.model(x), y).backward()
    assert len(calls) == 1
    close(measured(opt), truth(opt, CE, x, y))


NOT_FIRED = {
    "module": ("the loss module given as loss_fn= was not called", lambda opt, x, y: F.cross_entropy(opt.model(x), y)),
    "name": ("no backward", lambda opt, x, y: CE(opt.model[2](opt.model[0](x)), y)),
    "observe": (r"optimizer\.observe\(output, target, loss_fn\) was not called", lambda opt, x, y: CE(opt.model(x), y)),
}


@pytest.mark.parametrize("make", [SecondOrderOptimizer, Preconditioner])
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_gradients_without_any_curvature_raise_and_name_the_trigger_that_did_not_fire(trigger, make):
    message, loss = NOT_FIRED[trigger]
    opt = make(mlp(), loss_fn={"module": CE, "name": "cross_entropy", "observe": None}[trigger])
    loss(opt, *batch()).backward()
    with pytest.raises(RuntimeError, match=message):
        opt.step()


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_a_layer_whose_forward_is_not_called_is_measured_by_its_elements_from_the_next_step_on(trigger):
    model, (x, y) = cases.seeded(OnlyFunctional), batch()
    opt = made(trigger, model, approx="diag", ema_decay=0.0, lr=1e-30, update_every=1)
    for _ in range(2):
        opt.zero_grad()
        lost(opt, trigger, model(x), y).backward()
        opt.step()
    assert set(opt.blocks) == {"a.weight", "a.bias", "b"}
    for name in ("a.weight", "a.bias"):
        p = model.get_parameter(name)
        expected = oracles.ggn(model, CE, x, y, [(name, p)]).diag()
        close(opt.blocks[name].factor.diag().flatten(), expected)


def test_observing_something_else_raises():
    opt, (x, y) = optimizer(mlp(), None), batch()
    with pytest.raises(ValueError, match="does not come from a forward pass of the model"):
        opt.observe(mlp()(x), y, CE)
    with pytest.raises(ValueError, match="no loss is known; pass loss_fn="):
        opt.observe(opt.model(x), y)
    with pytest.raises(ValueError, match="got the loss, a number"):
        opt.observe(CE(opt.model(x), y), y, CE)
    with pytest.raises(ValueError, match="got a tuple"):
        opt.observe((opt.model(x),), y, CE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_is_called_once_for_all_samples(kind):
    class PerPosition(nn.Module):
        def __init__(self):
            super().__init__()
            self.position, self.head = nn.Linear(2, 4), nn.Linear(4, V)

        def forward(self, x):
            return self.head(x + self.position(cases.randn(3, 2)).sum(0))

    opt, (x, y) = optimizer(cases.seeded(PerPosition), CE, curv_type=kind), batch()
    CE(opt.model(x), y).backward()
    close(measured(opt), truth(opt, CE, x, y, kind))


# -------------------------------------------------------------------------------------- Preconditioner


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_a_preconditioner_solves_with_what_was_captured(trigger):
    model, (x, y) = mlp(), batch()
    exact = {"approx": "full", "samples": None, "damping": 0.3, "damping_type": "exact"}
    opt = Preconditioner(model, loss_fn={"module": CE, "name": "cross_entropy", "observe": None}[trigger], **exact)
    lost(opt, trigger, model(x), y).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    opt.step()
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    close(got, oracles.solve_dense(truth_of(model, x, y), g, 0.3), 1e-8)


# --------------------------------------------------------------------------------- distributed data parallel


def in_process(rank, path, kind, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = mlp()
    parallel = nn.parallel.DistributedDataParallel(model)
    opt = optimizer(model, CE, curv_type=kind)
    (x, y), local = batch(8), slice(4 * rank, 4 * rank + 4)
    CE(parallel(x[local]), y[local]).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    results[rank] = (measured(opt).numpy(), [g.numpy() for g in grads])
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_under_distributed_data_parallel_each_rank_has_the_mean_of_the_parts(kind, tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        arguments = (os.fspath(tmp_path / "rendezvous"), kind, results)
        torch.multiprocessing.start_processes(in_process, arguments, nprocs=2, start_method="spawn")
        results = dict(results)
    x, y = batch(8)
    model = mlp()
    parts = [
        truth_of(model, x[4 * rank : 4 * rank + 4], y[4 * rank : 4 * rank + 4], kind=TRUTH[kind]) for rank in (0, 1)
    ]
    for rank in range(2):
        close(torch.from_numpy(results[rank][0]), sum(parts) / 2)
        whole = torch.autograd.grad(CE(model(x), y), list(model.parameters()))
        assert all(torch.allclose(torch.from_numpy(a), b) for a, b in zip(results[rank][1], whole, strict=True))
