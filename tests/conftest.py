"""Fixtures that several test files share, and `@pytest.mark.pairwise`.

Of all combinations of the parameters of a test with that mark a pairwise cover runs; the others are slow.
"""

from collections import defaultdict
from collections.abc import Iterator

import pytest
from cover import cover

from torchcurv.curv.kinds.table import KINDS
from torchcurv.curv.losses.table import FORMULAS, MODULES
from torchcurv.curv.numerics import assume_accelerator


@pytest.fixture
def accelerator() -> Iterator[None]:
    """The test takes the paths of an accelerator."""
    with assume_accelerator():
        yield


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` picks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    grids = defaultdict(list)
    for item in items:
        if item.get_closest_marker("pairwise") and not item.get_closest_marker("slow"):
            grids[item.nodeid.partition("[")[0]].append(item)
    for grid in grids.values():
        kept = set(cover([_row(item) for item in grid]))
        for k, item in enumerate(grid):
            if k not in kept:
                item.add_marker(pytest.mark.slow)


def _row(item: pytest.Item) -> tuple:
    """The values of a case: those that are equal, or the same object; a value with `axes` is itself made of several."""
    row = []
    for _, value in sorted(item.callspec.params.items()):
        row.extend(getattr(value, "axes", (value if isinstance(value, str | int | float | None) else id(value),)))
    return tuple(row)


@pytest.fixture
def own_tables() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    tables = (FORMULAS, MODULES, KINDS)
    before = [dict(table) for table in tables]
    yield
    for table, held in zip(tables, before, strict=True):
        table.clear()
        table.update(held)
