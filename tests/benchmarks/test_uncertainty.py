"""benchmarks/uncertainty.py: its measures on probabilities whose values are known, and the program on few images."""

import math
import sys

import pytest
import torch

from benchmarks import uncertainty
from benchmarks.data import Labelled

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch, of forward mode


def test_measures_of_known_probabilities():
    labels = torch.tensor([0, 0, 0, 1])
    probabilities = torch.tensor([[0.75, 0.25]]).expand(4, 2)
    assert uncertainty.nll(probabilities, labels) == pytest.approx(-(3 * math.log(0.75) + math.log(0.25)) / 4)
    assert uncertainty.reliability(probabilities, labels).ece == pytest.approx(0)
    sure = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    assert uncertainty.reliability(sure, labels).ece == pytest.approx(0.25)
    torch.testing.assert_close(uncertainty.entropy(probabilities[:1]), torch.tensor([0.5623351446], dtype=torch.double))


def test_expected_calibration_error_of_every_bin_alone():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(300, 4, generator=generator).mul(2).softmax(1)
    labels = torch.randint(4, (300,), generator=generator)
    confidence, predicted = probabilities.max(1)
    total = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            hits = (predicted[inside] == labels[inside]).double().mean()
            total += float((hits - confidence[inside].double().mean()).abs() * inside.double().mean())
    assert uncertainty.reliability(probabilities, labels).ece == pytest.approx(total)


def test_auroc_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    negatives, positives = (
        torch.randint(9, (50,), generator=generator),
        torch.randint(3, 12, (40,), generator=generator),
    )
    pairs = (positives[:, None] > negatives).double() + 0.5 * (positives[:, None] == negatives).double()
    assert uncertainty.auroc(negatives, positives) == pytest.approx(float(pairs.mean()))


def test_rotation_turns_every_image():
    image = torch.arange(9.0)
    expected = torch.rot90(image.view(3, 3)).flatten()
    torch.testing.assert_close(uncertainty.rotated(torch.stack([image, 2 * image]))[1], 2 * expected)


def test_linearised_predictions_are_those_of_the_glm():
    """Of many draws, against the covariance J Σ J^T of the outputs."""
    from torchcurv import laplace

    generator = torch.Generator().manual_seed(0)
    data = Labelled(torch.rand(60, 4, generator=generator), torch.randint(3, (60,), generator=generator))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    ours = uncertainty.linearised(model, data, 1.0, 0, draws=400)(data.images)
    posterior = laplace(model, uncertainty.LOSS, [tuple(data)])
    posterior.optimize_prior(per_block=True)
    glm = posterior.glm(data.images)
    noise = torch.randn(2000, 60, 3, 1, generator=generator)
    draws = glm.mean + (torch.linalg.cholesky(glm.covariance) @ noise)[..., 0]
    torch.testing.assert_close(ours, draws.softmax(-1).mean(0), rtol=0, atol=0.06)


def test_every_method_learns_and_is_drawn(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (300,), generator=generator)
    centres = torch.rand(10, 1, 4, 4, generator=generator).repeat_interleave(7, 2).repeat_interleave(7, 3).flatten(1)
    images = (centres[labels] + 0.1 * torch.randn(300, 784, generator=generator)).clamp(0, 1)
    data, test = Labelled(images[:200], labels[:200]), Labelled(images[200:], labels[200:])
    names = [name for name in uncertainty.available() if name != "Laplace, K-FAC"]
    outcomes = uncertainty.compare(names, data, test, [0], epochs=8, draws=2)
    assert list(outcomes) == names
    for name, outcome in outcomes.items():
        assert all(math.isfinite(values[0]) for values in outcome.values.values()), name
    assert outcomes["AdamW"].values["accuracy %"][0] > 30
    uncertainty.draw_reliability(outcomes, tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").stat().st_size > 1000
    assert uncertainty.report(outcomes, {"step": {"SGD": 1.0}, "step, wide": {}}, "").row_count == len(names)


def test_the_grids_have_one_size():
    sizes = {name: math.prod(len(values) for values in grid.values()) for name, grid in uncertainty.GRIDS.items()}
    assert set(sizes) == set(uncertainty.MAKERS) and set(sizes.values()) == {6}
    for name, options in uncertainty.TUNED.items():
        assert all(options[key] in values for key, values in uncertainty.GRIDS[name].items()), name


def test_a_missing_package_leaves_its_row_out(monkeypatch):
    monkeypatch.setattr(uncertainty.importlib.util, "find_spec", lambda name: None)
    assert "IVON" not in uncertainty.available() and "VOGN" in uncertainty.available()


def test_the_gap_is_drawn(tmp_path, monkeypatch):
    found = uncertainty.gap_posteriors(steps=3)
    assert set(found) == {*uncertainty.GAP_OPTIONS, "Laplace, K-FAC"}
    uncertainty.draw_gap(found, tmp_path / "gap.png")
    assert (tmp_path / "gap.png").stat().st_size > 1000


def test_the_table_of_costs_begins_with_the_methods_asked_for(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["uncertainty", "--methods", "SGD", "VOGN"])
    names = uncertainty.arguments().methods
    small = uncertainty.costs(names, uncertainty.dense_network, 20, rounds=1)
    assert list(small) == names and all(value > 0 for value in small.values())
