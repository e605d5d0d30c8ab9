"""The count of what processes send, and its table in a page."""

import pytest
import torch
from torch import nn

from benchmarks import communication
from benchmarks.communication import Speeds, counted, main, rows_of
from torchcurv import SecondOrderOptimizer


def layers():
    return nn.Sequential(nn.Linear(9, 20), nn.Tanh(), nn.Linear(20, 3, bias=False))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(communication, "MODELS", {"small": (layers, lambda: torch.zeros(5, 9), "5 samples")})


def test_bytes_messages_and_work_are_those_of_the_formulas():
    with torch.device("meta"):
        blocks = list(SecondOrderOptimizer(layers()).blocks.values())
    sides, numbers = (10, 20, 20, 3), 4  # bytes of a number; counts, marks and flags are numbers too
    triangles, squares = sum(n * (n + 1) // 2 for n in sides), sum(n * n for n in sides)
    alone, shared = (counted(blocks, 8, where) for where in ("replicated", "shared"))
    assert 0 <= alone.summed - numbers * triangles <= 8 * numbers and alone.summed == shared.summed
    assert alone.spread == 0 and shared.spread == numbers * (triangles + 2)
    assert 0 <= alone.held - 2 * numbers * squares <= 8 * numbers
    assert (alone.messages, shared.messages) == (2, 5)
    assert alone.work == 10**3 + 20**3 + 20**3 + 3**3 and shared.work == 10**3 + 20**3
    assert shared.seconds(100.0, 8, Speeds()) < alone.seconds(100.0, 8, Speeds(factorisations=1e-6))


def test_a_run_writes_its_table_between_the_marks(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- counted -->\n<!-- end -->\n\nafter\n")
    for _ in range(2):  # the second replaces the first
        main(["--processes", "2", "64", "--models", "small", "--markdown", str(page)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and text.count("| small |") == 4
    assert "What processes send" in capsys.readouterr().out
    assert [row[:3] for row in rows_of("small", [8], Speeds())] == [
        ["small", "8", "replicated"],
        ["small", "8", "shared"],
    ]


def test_models_have_the_sizes_of_their_names():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in make().parameters()) for make in (communication.resnet50, communication.GPT)]
    assert sizes[0] == 25_557_032 and 1.0e9 < sizes[1] < 1.05e9


def test_two_processes_are_timed():
    lines = communication.measured(1, 16)
    assert [line[0] for line in lines] == ["replicated", "shared"] and all(float(line[1]) > 0 for line in lines)
