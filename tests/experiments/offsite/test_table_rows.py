"""The frontier: a figure of a table's methods."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from isthmus.experiments.offsite.table_rows import draw_frontier

# Found without being imported: that takes a while, in each process that collects.
pytestmark = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")

PNG = b"\x89PNG\r\n\x1a\n"


def entry(method: str, keep: float, plug_in: float | None, thief: float | None) -> dict[str, object]:
    recoveries = {"plug_in_recovery": plug_in, "emulator_tuned_recovery": thief, "thief_recovery": thief}
    return {"method": method, "keep": keep, **recoveries}


def test_each_emulator_is_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda _figure: None)
    methods = [entry("uniform", 0.75, 0.7, 0.6), entry("uniform", 0.5, 0.3, 0.5), entry("crash", 0.5, None, None)]
    draw_frontier(methods, tmp_path / "new" / "frontier.png", "tiny")
    assert (tmp_path / "new" / "frontier.png").read_bytes().startswith(PNG)
    (line,) = [line for line in pyplot.gcf().axes[0].lines if line.get_label() == "uniform"]
    assert line.get_xydata().tolist() == [[50.0, 30.0], [60.0, 70.0]]
    assert "crash" not in [line.get_label() for line in pyplot.gcf().axes[0].lines]


def test_a_figure_without_a_point_is_a_figure(tmp_path: Path) -> None:
    draw_frontier([], tmp_path / "empty.png", "nothing")
    assert (tmp_path / "empty.png").read_bytes().startswith(PNG)
