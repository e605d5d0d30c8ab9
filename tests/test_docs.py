"""The documentation: its code runs, its reference is complete, and the errors it explains exist.

Every ```python block of README.md and docs/**/*.md runs, the blocks of a page in order and in one namespace. What a
page leaves out (a model, a loader) stands in a comment that readers do not see,

    <!-- test setup:
    model = nn.Linear(4, 3)
    -->

and a block that cannot run is marked by `<!-- not run: the reason -->` on the line before it.
"""

import ast
import inspect
import re
from pathlib import Path

import options_page
import pytest
import torch

import torchcurv

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: .+ -->")


def blocks(text):
    """(line number, code) of everything that runs, in order; a block that is not run gives no code."""
    lines, found, k = text.splitlines(), [], 0
    while k < len(lines):
        start, line = k, lines[k].strip()
        k += 1
        if line == "<!-- test setup:":
            while lines[k].strip() != "-->":
                k += 1
        elif line.startswith("```"):
            while lines[k].strip() != "```":
                k += 1
            if not re.fullmatch(r"```python( .*)?", line) or (start and NOT_RUN.fullmatch(lines[start - 1].strip())):
                k += 1
                continue
        else:
            continue
        body = lines[start + 1 : k]
        indent = min((len(x) - len(x.lstrip()) for x in body if x.strip()), default=0)
        found.append((start + 1, "\n".join(x[indent:] for x in body)))
        k += 1
    return found


RUN = {str(page.relative_to(ROOT)): found for page in PAGES if (found := blocks(page.read_text()))}


@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, own_tables):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("matplotlib").use("Agg")
    torch.manual_seed(0)
    namespace = {"__name__": "__docs__"}
    for line, code in RUN[page]:
        exec(compile("\n" * line + code, str(ROOT / page), "exec"), namespace)
    plots = namespace.get("plt")
    if plots is not None:
        plots.close("all")


def test_blocks_are_found_hidden_or_left_out():
    text = (
        "<!-- test setup:\na = 1\n-->\n```python\nb = a\n```\n<!-- not run: slow -->\n```python\nc\n```\n```\nd\n```\n"
    )
    assert blocks(text) == [(1, "a = 1"), (4, "b = a")]


# ------------------------------------------------------------------------------------- reference

REFERENCE = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
PUBLIC = [
    *(f"torchcurv.{name}" for name in torchcurv.__all__ if name not in ("nn", "optim")),
    *(f"torchcurv.optim.{name}" for name in torchcurv.optim.__all__ if name not in torchcurv.__all__),
    *("torchcurv.nn.ISAACLinear", "torchcurv.plot.plot_spectrum", "torchcurv.plot.plot_layers"),
]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_in_the_reference(name):
    assert re.search(rf"^::: {re.escape(name)}$", REFERENCE, re.M), f"docs/reference has no `::: {name}`"


@pytest.mark.parametrize("name", ["SecondOrderOptimizer", "Preconditioner", "VIOptimizer"])
def test_every_option_is_explained(name):
    page = (ROOT / "docs" / "reference" / "options.md").read_text()
    optimizer = getattr(torchcurv, name)
    named = inspect.signature(optimizer).parameters.keys() - {"model", "params", "dataset_size", "options"}
    options = named | optimizer.table.keys()
    missing = sorted(option for option in options if f"`{option}`" not in page)
    assert not missing, f"docs/reference/options.md says nothing of {', '.join(missing)}"


def test_the_tables_of_options_are_those_of_the_declarations():
    page = (ROOT / "docs" / "reference" / "options.md").read_text()
    assert page == options_page.with_tables(page), "run PYTHONPATH=. python tests/support/options_page.py --write"


# ------------------------------------------------------------------------------------------- FAQ


def strings_of(path):
    """Every literal of a file; of an f-string what is fixed in it."""
    tree = ast.parse(path.read_text())
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_the_errors_of_the_faq_exist():
    said = [text for path in (ROOT / "torchcurv").rglob("*.py") for text in strings_of(path)]
    quoted = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "faq.md").read_text(), re.M)
    assert len(quoted) > 10
    gone = [message for message in quoted if not any(part in text for part in [message.strip(".… ")] for text in said)]
    assert not gone, f"docs/faq.md explains errors that nothing raises: {gone}"


# ----------------------------------------------------------------------------------------- prose


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_short(page):
    """But for those of tables."""
    lines = enumerate(page.read_text().splitlines(), 1)
    assert not [k for k, line in lines if len(line) > 120 and not line.lstrip().startswith("|")]
