"""The cover of a grid of cases has every pair, few rows, and is always the same."""

import itertools

import pytest
from cover import cover, pairwise
from hypothesis import given
from hypothesis import strategies as st


def pairs(rows):
    return {pair for row in rows for pair in itertools.combinations(enumerate(row), 2)}


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_every_pair_of_values_occurs(sizes):
    lists = [[f"{k}{value}" for value in range(size)] for k, size in enumerate(sizes)]
    chosen, product = pairwise(*lists), list(itertools.product(*lists))
    assert pairs(chosen) == pairs(product)
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(product)


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), max_size=30, unique=True))
def test_every_pair_of_an_incomplete_grid_occurs(rows):
    assert pairs(rows[k] for k in cover(rows)) == pairs(rows)


@pytest.mark.parametrize(
    ("sizes", "most"), [((5,), 5), ((4, 3), 12), ((2, 2, 2), 5), ((7, 3, 3, 3), 30), ((100, 3, 3), 300)]
)
def test_the_cover_is_small(sizes, most):
    assert len(pairwise(*map(range, sizes))) <= most


def test_the_cover_is_always_the_same():
    assert pairwise("ab", "cd", "ef") == pairwise("ab", "cd", "ef")


def test_other_cases_of_a_marked_test_are_slow(pytester, request):
    pytester.makeconftest((request.config.rootpath / "tests" / "conftest.py").read_text())
    pytester.makepyfile("""
        import pytest
        @pytest.mark.pairwise
        @pytest.mark.parametrize("a", [0, 1, 2])
        @pytest.mark.parametrize("b, c", [(0, 0), (1, 1)])
        @pytest.mark.parametrize("d", [0, 1])
        def test_all(a, b, c, d): ...
        @pytest.mark.pairwise
        @pytest.mark.parametrize("a", [0, pytest.param(1, marks=pytest.mark.slow)])
        def test_one(a): ...
    """)
    pytester.makeini("[pytest]\nmarkers = [slow, pairwise]")
