"""Models of transformers and the adapters of peft train with nothing but the model; curvature is that of the logits."""

import pytest
import torch
from torch import nn

from torchcurv import SecondOrderOptimizer

pytest.importorskip("transformers")
pytest.importorskip("peft")
from full_step import error_of_full
from hugging_face import MODELS, counted, trained, two_of

RENAMED = "ignore:`past_key_values` is deprecated:FutureWarning"  # which peft still writes
TWICE = "ignore:.*cannot be differentiated twice:UserWarning"  # CTC, which says so


@pytest.mark.filterwarnings(TWICE, RENAMED)
@pytest.mark.parametrize("name", MODELS)
def test_it_trains_untouched(name):
    model, optimizer, losses = trained(name)
    assert losses[-1] < losses[0] and all(p.isfinite().all() for p in model.parameters())
    covered = {p for block in optimizer.blocks.values() if block.factor is not None for p in block.params}
    reached = {p for p in model.parameters() if p.grad is not None and p.grad.any()}
    assert reached <= covered


EXACT = [
    "gpt2", "opt", "gemma2", "mamba", "bert", "deberta v2", "xlnet", "t5", "bart", "vit", "beit", "swin v2",
    "convnext", "perceiver",
]  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_the_diagonal_is_that_of_the_logits(name):
    """diag(J^T H J) over the rows that count, for two parameters of each kind of module, in float64; the losses inside
    of causal language models are computed in float32."""
    model, batch = two_of(name)
    optimizer = SecondOrderOptimizer(
        model, approx="diag", samples=None, ema_decay=0.0, lr=0.0, weight_decay=0.0, update_every=1, refactor_every=1
    )
    for _ in range(3):  # a loss in the model is seen from the second pass on, odd uses of parameters from the next
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    found, chosen, seen = {}, {}, {}
    for block in optimizer.blocks.values():
        if not any(p.grad is not None and p.grad.any() for p in block.params):
            continue
        parts = block.layout.split(block.layout.unflatten(block.factor.diag()))
        found |= dict(zip(block.params, parts, strict=True))
        kind = type(block.layers[0].sites[0].module).__name__
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= 2:
            chosen |= dict.fromkeys(block.params, kind)
    logits = counted(name, model, batch)
    count = len(logits)
    probabilities = logits.detach().softmax(-1)
    expected = {p: torch.zeros_like(p) for p in chosen}
    for row in range(len(logits)):
        root = probabilities[row].diag().sqrt() - probabilities[row][:, None] * probabilities[row].sqrt()[None]
        for column in root.T:
            grads = torch.autograd.grad(
                logits[row], list(chosen), column, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for p, g in zip(chosen, grads, strict=True):
                expected[p] += g.square() / count
    for p, kind in chosen.items():
        assert (found[p] - expected[p]).norm() <= 1e-6 * expected[p].norm() + 1e-9, kind


FULL = [
    "gpt2", "gpt neox", "opt", "llama", "qwen3", "bloom", "mamba", "bert", "albert", "deberta v2", "xlnet", "t5",
    "llama4", "bart", "whisper", "vit", "dinov2", "swin v2", "convnext", "perceiver", "gpt2, LoRA", "gpt2, IA3",
    "gpt2, prefixes", "llama, DoRA", "llama, prompts",
]  # fmt: skip


@pytest.mark.filterwarnings(RENAMED)
@pytest.mark.parametrize("name", FULL)
def test_a_step_of_full_is_the_dense_one(name):
    """In float64, but for the losses of causal language models, which are computed in float32."""
    model, batch = two_of(name)
    assert error_of_full(model, lambda: model(**batch).loss, lambda: counted(name, model, batch)) <= 1e-6


def test_a_loss_of_ones_own_beside_logits():
    model, batch = MODELS["bert"]()
    loss_fn = nn.CrossEntropyLoss()
    optimizer = SecondOrderOptimizer(model.train(), loss_fn=loss_fn)
    labels, first = batch.pop("labels"), None
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_fn(model(**batch).logits, labels)
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < first
