"""The programs with other libraries train, where these are installed."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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


TORCHRUN = (  # by which `accelerate launch` starts processes as well, but for processors alone
    "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m",
)  # fmt: skip


ABORT = "terminate called without an active exception"  # of gloo's threads at the end of a process, by plain torch too


def launched(*command):
    """What a program prints that starts two processes; again, where torch aborts one after its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
        )
        if ABORT not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("epoch ", "loss "))]
    return [float(number) for line in lines for number in re.findall(r"\d+\.\d+", line)]


def test_two_processes_of_torchrun():
    losses = launched(*TORCHRUN, "examples.integrations.data_parallel", "--epochs", "4")
    assert losses[-1] < 0.7 * losses[0]


def test_two_processes_of_accelerate():
    pytest.importorskip("accelerate")
    losses = launched(*TORCHRUN, "examples.integrations.accelerate_loop", "--epochs", "4", "--processes", "2")
    assert losses[-1] < 0.9 * losses[0]


def test_two_processes_of_lightning():
    pytest.importorskip("lightning")
    losses = launched("examples.integrations.lightning_module", "--epochs", "4", "--processes", "2")
    assert losses[-1] < 0.9 * losses[0]
