"""What users see stays: names, arguments, groups, keys of the state, numbers, and checkpoints of older versions.

What fails here has changed for them. Where that is meant, fence.py says how to record it anew.
"""

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

from torchcurv import curvature, directions, laplace

_spec = importlib.util.spec_from_file_location("fence", Path(__file__).parent / "support" / "fence.py")
fence = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fence)


def test_what_is_recorded_is_what_is_tested():
    assert fence.recorded()["cases"].keys() == fence.CASES.keys()
    assert fence.recorded()["looks"].keys() == fence.LOOKS.keys()


@pytest.mark.parametrize("module", fence.recorded().get("names", ()))
def test_public_names_stay(module):
    here = importlib.import_module(module)
    assert not [name for name in fence.recorded()["names"][module] if not hasattr(here, name)]
    assert set(fence.recorded()["names"][module]) <= set(getattr(here, "__all__", fence.recorded()["names"][module]))


@pytest.mark.parametrize("path", fence.recorded().get("arguments", ()))
def test_arguments_and_their_defaults_stay(path):
    assert not fence.missing_arguments(fence.named(path), fence.recorded()["arguments"][path])


@pytest.mark.parametrize("name", fence.recorded().get("members", ()))
def test_public_methods_and_attributes_stay(name):
    thing = fence.instances()[name]
    for member, arguments in fence.recorded()["members"][name].items():
        if arguments is None:
            assert hasattr(thing, member), member
        else:
            assert not fence.missing_arguments(getattr(type(thing), member), arguments, bound=True), member


@pytest.mark.parametrize("name", fence.PLAIN)
def test_an_optimizer_takes_every_keyword_and_its_default_is_that_of_a_plain_call(name):
    keywords = fence.given_explicitly(f"torchcurv.optim.{name}")
    case = fence.Case(name, fence.DIRECTIONS if name == "DirectionalNewton" else {})
    optimizer = fence.optimizer_of(case, fence.made(fence.mlp))
    given = fence.optimizer_of(case, fence.made(fence.mlp), **keywords)
    assert fence.groups_of(given) == fence.groups_of(optimizer)
    assert fence.plain(given.defaults) == fence.plain(optimizer.defaults)


@pytest.mark.parametrize("name", fence.PLAIN)
def test_an_optimizer_refuses_an_unknown_keyword(name):
    case = fence.Case(name, fence.DIRECTIONS if name == "DirectionalNewton" else {})
    with pytest.raises(TypeError, match="rnak"):
        fence.optimizer_of(case, fence.made(fence.mlp), rnak=3)


@pytest.mark.parametrize("function", [curvature, laplace, directions])
def test_a_function_takes_every_keyword_and_its_default_is_that_of_a_plain_call(function):
    keywords = fence.given_explicitly(f"torchcurv.{function.__name__}")
    assert keywords
    numbers = []
    for options in ({}, keywords):
        found = function(fence.made(fence.mlp).eval(), "cross_entropy", fence.data_of(fence.mlp), **options)
        if function is directions:
            numbers.append(fence.fingerprint([d.lambdas for d in found.values()]))
        else:
            numbers.append(fence.fingerprint([found.diag()] if function is curvature else found.variances().values()))
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("name", fence.CASES)
def test_groups_stay(name):
    now, before = fence.observed(name)["groups"], fence.expected_groups(name)
    assert len(now) == len(before)
    for ours, theirs in zip(now, before, strict=True):
        assert {key: ours.get(key, "<missing>") for key in theirs} == theirs


@pytest.mark.parametrize("name", fence.CASES)
def test_keys_and_shapes_of_the_state_stay(name):
    assert fence.observed(name)["state"] == fence.expected_layout(name)


@pytest.mark.parametrize("name", fence.IN_BFLOAT16)
def test_keys_and_shapes_of_a_bfloat16_model_stay(name):
    assert fence.layout_in_bfloat16(name) == fence.recorded()["bfloat16"][name]


@pytest.mark.parametrize("name", fence.CASES)
def test_metrics_stay(name):
    assert set(fence.recorded()["cases"][name]["metrics"]) <= set(fence.observed(name)["metrics"])


@pytest.mark.parametrize("name", fence.CASES)
def test_numbers_stay(name):
    assert not fence.differences(fence.observed(name)["moved"], fence.recorded()["cases"][name]["moved"])


@pytest.mark.parametrize("name", fence.CASES)
def test_a_saved_state_goes_on_to_the_same_numbers(name):
    assert not fence.differences(fence.resumed(name), fence.recorded()["cases"][name]["moved"])


@pytest.mark.parametrize("name", fence.LOOKS)
def test_numbers_that_are_looked_at_stay(name):
    assert not fence.differences(fence.LOOKS[name](), fence.recorded()["looks"][name])


@pytest.mark.parametrize("path", sorted(fence.DATA.glob("checkpoint_*.pt")), ids=lambda path: path.stem)
def test_an_old_checkpoint_goes_on_to_the_same_numbers(path):
    saved = torch.load(path, weights_only=True)
    case = fence.CASES[saved["case"]]
    model = fence.made(case.model)
    optimizer = fence.optimizer_of(case, model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    fence.train(case, model, optimizer, range(fence.SAVED_AFTER, fence.SAVED_AFTER + 3))
    for p, expected in zip(model.parameters(), saved["after"], strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-9)
