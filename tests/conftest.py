"""Fixtures that several test files share."""

from collections.abc import Iterator

import pytest

from torchcurv.curv.kinds.table import KINDS
from torchcurv.curv.losses.table import FORMULAS, MODULES
from torchcurv.curv.numerics import assume_accelerator


@pytest.fixture
def accelerator() -> Iterator[None]:
    """The test takes the paths of an accelerator."""
    with assume_accelerator():
        yield


@pytest.fixture
def own_tables() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    tables = (FORMULAS, MODULES, KINDS)
    before = [dict(table) for table in tables]
    yield
    for table, held in zip(tables, before, strict=True):
        table.clear()
        table.update(held)
