"""The programs under examples/ run, and draw what they say."""

from importlib import import_module
from pathlib import Path

import pytest
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent.parent / "examples"
TINY = {
    "classify": ["--images", "200", "--batch", "32", "--steps", "4"],
    "uncertainty": ["--points", "12", "--width", "4", "--steps", "6", "--draws", "3"],
    "laplace_posterior": ["--points", "12", "--width", "3", "--steps", "5", "--rounds", "1"],
    "spectrum": ["--images", "20", "--width", "2", "--steps", "3", "--probes", "1", "--lanczos", "4"],
    "poisson_1d": ["--points", "8", "--width", "4", "--steps", "2"],
}


def test_every_example_is_tried():
    assert {path.stem for path in FOLDER.glob("*.py")} - {"__init__"} == set(TINY)


@pytest.mark.parametrize("name", TINY)
def test_an_example_writes_its_figure(name, tmp_path, capsys):
    figure = import_module(f"examples.{name}").main([*TINY[name], "--out", str(tmp_path / "figures" / "one.png")])
    assert isinstance(figure, Figure) and figure.axes and all(axes.has_data() for axes in figure.axes)
    assert (tmp_path / "figures" / "one.png").stat().st_size > 0
    assert capsys.readouterr().out
    lines = (FOLDER / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 80, "an example is one short program"
