"""The page about models that people bring, written from what they do now.

PYTHONPATH=.:tests/support python tests/support/models_page.py --write
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from hugging_face import MODELS, trained

PAGE = Path(__file__).parents[2] / "docs" / "results" / "models.md"
HEAD = """# Models as they come

Command: `PYTHONPATH=.:tests/support python tests/support/models_page.py --write`, with the extra `integrations`.

Small models of the transformers library, made from configurations, and two with the adapters of peft. Each is trained
by the call that nobody has to think about, `optimizer = SecondOrderOptimizer(model)`, on one batch, with the loss
that the model computes itself. Coverage is the share of its trainable parameters that have a curvature; "elements" is
the share whose curvature is taken element by element, because they are not used as a layer uses its weight. The
losses are those of the first and the eighth step. `tests/test_hugging_face.py` holds fourteen of them against the
exact diagonal of the Gauss-Newton matrix. The models are untrained, so that an adapter alone can lower the loss only
a little.

| model | parameters | coverage | elements | first loss | eighth loss |
|---|---|---|---|---|---|
"""


def row(name: str) -> str:
    model, optimizer, losses = trained(name)
    blocks = optimizer.blocks.values()
    alone = sum(block.size for block in blocks if all(layer.sites[0].bare for layer in block.layers))
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = f"{100 * optimizer.coverage():.0f} %", f"{100 * alone / total:.0f} %"
    return f"| {name} | {total:,} | {share[0]} | {share[1]} | {losses[0]:.2f} | {losses[-1]:.2f} |"


def page() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HEAD + "\n".join(map(row, MODELS)) + "\n"


if __name__ == "__main__":
    text = page()
    print(text)
    if "--write" in sys.argv:
        PAGE.write_text(text)
