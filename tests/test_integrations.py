"""The programs with other libraries train, where these are installed."""

from importlib import import_module

import pytest

PROGRAMS = {
    "hf_trainer": ("transformers", ["--steps", "12"]),
    "hf_trainer, bf16": ("transformers", ["--steps", "12", "--bf16"]),
    "accelerate_loop": ("accelerate", ["--epochs", "4"]),
    "lightning_module": ("lightning", ["--epochs", "4"]),
    "lightning_module, step control": ("lightning", ["--epochs", "4", "--step-control"]),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", PROGRAMS)
def test_it_trains(name, capsys):
    library, arguments = PROGRAMS[name]
    pytest.importorskip(library)
    losses = import_module(f"examples.integrations.{name.split(',')[0]}").main(arguments)
    assert losses[-1] < 0.9 * losses[0]
