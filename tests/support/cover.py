"""Pairwise covers: a few of the many combinations of some lists, with every pair of values in at least one of them."""

import itertools
import random
from collections.abc import Hashable, Sequence


def cover(rows: Sequence[tuple[Hashable, ...]]) -> list[int]:
    """Places of some of the rows, in order, such that every pair of values that occurs in a row occurs in one of them.

    A pair is two values of two different columns; rows of one column are covered by every value. The rows need not be a
    full product. The choice is greedy and depends on the rows alone: of the rows in a fixed random order, first those
    that bring as many new pairs as a row can, then those that bring one less, and so on.
    """
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    pairs = [_pairs(row) for row in rows]
    missing, chosen = set().union(*pairs), []
    for gain in range(max(map(len, pairs), default=0), 0, -1):
        for k in order:
            if len(pairs[k] & missing) >= gain:
                missing -= pairs[k]
                chosen.append(k)
    return sorted(chosen)


def _pairs(row: tuple[Hashable, ...]) -> set:
    cells = list(enumerate(row))
    return set(itertools.combinations(cells, 2)) if len(cells) > 1 else set(cells)


def pairwise(*lists: Sequence) -> list[tuple]:
    """Tuples of one value of each list: every pair of values of any two lists occurs in at least one tuple."""
    places = list(itertools.product(*(range(len(values)) for values in lists)))
    return [tuple(values[k] for values, k in zip(lists, places[row], strict=True)) for row in cover(places)]
