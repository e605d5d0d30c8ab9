"""Fixtures that several test files share."""

from collections.abc import Iterator

import pytest

from torchcurv.curv.numerics import assume_accelerator


@pytest.fixture
def accelerator() -> Iterator[None]:
    """The test takes the paths of an accelerator."""
    with assume_accelerator():
        yield
