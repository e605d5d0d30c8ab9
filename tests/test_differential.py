"""One step of approx="full" of random networks, losses and loops, against the dense solve: right, or refused."""

import re

import differential
import pytest

# Refusals that a person may meet in what is drawn, and how many in a hundred there may be.
REFUSED = (r"samples meet in the loss", r"is not a sum over samples", r"samples=")
SHARE = 0.05
CHUNK = 20


def refused_in(seeds):
    found = {seed: differential.outcome(seed) for seed in seeds}
    refused = {seed: why for seed, why in found.items() if why != "right"}
    unlisted = {seed: why for seed, why in refused.items() if not any(re.search(text, why) for text in REFUSED)}
    assert not unlisted, f"refused with a sentence that is not listed: {unlisted}"
    return refused


def chunks(first, last):
    return [range(start, start + CHUNK) for start in range(first, last, CHUNK)]


@pytest.mark.parametrize("seeds", chunks(0, 200), ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_no_step_is_wrong_in_silence(seeds):
    assert len(refused_in(seeds)) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("seeds", chunks(200, 2200), ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_no_step_of_many_is_wrong_in_silence(seeds):
    refused_in(seeds)


@pytest.mark.slow
def test_few_are_refused():
    assert len(refused_in(range(1000))) <= SHARE * 1000
