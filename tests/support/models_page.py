"""The page about models that people bring, written from what they do now.

PYTHONPATH=.:tests/support python tests/support/models_page.py --write
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hugging_face
import timm_models
from full_step import error_of_full
from torch import nn

PAGE = Path(__file__).parents[2] / "docs" / "results" / "models.md"
HEAD = """# Models as they come

Command: `PYTHONPATH=.:tests/support python tests/support/models_page.py --write`, with the extra `integrations`.

Small models of the transformers library, made from configurations, two with the adapters of peft, and small ones of
timm. Each is trained by the call that nobody has to think about, on one batch: `SecondOrderOptimizer(model)` with the
loss that a model of transformers computes itself, `SecondOrderOptimizer(model, loss_fn=loss_fn)` with those of timm.
Coverage is the share of its trainable parameters that have a curvature; "elements" is
the share whose curvature is taken element by element, because they are not used as a layer uses its weight. The
losses are those of the first and the eighth step. "Full step" is the relative error of one step of `approx="full"`
with damping 0.1 against the dense -(J^T H J + λ)^-1 g by autograd, in float64 (`tests/support/full_step.py`); 1e-8 is
what is left by losses that are computed in float32, 1e-5 at DeiT by an eigenvalue 9e10 times the damping; "-" where
the loss is none of cross entropies or the model does not run in float64. Tests hold forty of them, and fourteen against
the exact diagonal. The models are untrained, so that an adapter alone can lower the loss only a little.

| model | parameters | coverage | elements | first loss | eighth loss | full step |
|---|---|---|---|---|---|---|
"""


def full_of_transformers(name: str) -> float | None:
    if name in ("clip", "wav2vec2, ctc"):
        return None
    model, batch = hugging_face.two_of(name)
    return error_of_full(model, lambda: model(**batch).loss, lambda: hugging_face.counted(name, model, batch))


def full_of_timm(name: str) -> float | None:
    model, x, y = timm_models.made(name)
    model, x, loss_fn = model.double().eval(), x.double(), nn.CrossEntropyLoss()
    return error_of_full(model, lambda: loss_fn(model(x), y), lambda: model(x), loss_fn=loss_fn)


def row(name: str, library: Any, full: Callable[[str], float | None]) -> str:
    model, optimizer, losses = library.trained(name)
    blocks = optimizer.blocks.values()
    alone = sum(block.size for block in blocks if all(layer.sites[0].bare for layer in block.layers))
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = f"{100 * optimizer.coverage():.0f} %", f"{100 * alone / total:.0f} %"
    try:
        error = full(name)
    except RuntimeError as refused:
        if "Double" not in str(refused):
            raise
        error = None
    shown = "-" if error is None else f"{error:.0e}"
    ends = f"{losses[0]:.2f} | {losses[-1]:.2f}"
    return f"| {name} | {total:,} | {share[0]} | {share[1]} | {ends} | {shown} |"


def page() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [row(name, hugging_face, full_of_transformers) for name in hugging_face.MODELS]
        rows += [row(name, timm_models, full_of_timm) for name in timm_models.MODELS]
        return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    text = page()
    print(text)
    if "--write" in sys.argv:
        PAGE.write_text(text)
