"""The frontier: the table's engine at several ratios, and a figure that is one."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from support.scoring import table_settings, task_folder
from support.tiny import tiny_checkpoint

from isthmus.experiments.frontier import draw, run_frontier

pytest.importorskip("matplotlib")

PNG = b"\x89PNG\r\n\x1a\n"


def test_each_method_is_measured_at_each_ratio(tmp_path: Path) -> None:
    model, data = tiny_checkpoint("llama", tmp_path / "model"), task_folder(tmp_path / "data")
    settings = table_settings(model, data, tmp_path / "out", methods=("uniform", "crash"), keeps=(0.5, 1.0), seeds=1)
    figure = tmp_path / "figures" / "frontier.png"
    result = run_frontier(settings, figure, console=Console(file=io.StringIO()))
    wanted = {("uniform", 0.5), ("uniform", 1.0), ("crash", 0.5), ("crash", 1.0)}
    assert {(row["method"], row["keep"]) for row in result["runs"]} == wanted
    assert {(point["method"], point["keep"]) for point in result["points"]} == wanted
    assert all(row["full_fine_tuned"] is None for row in result["runs"])
    whole = next(point for point in result["points"] if point["keep"] == 1)
    assert whole["plug_in_recovery"] == 1
    assert figure.read_bytes().startswith(PNG)


def test_a_figure_without_a_point_is_a_figure(tmp_path: Path) -> None:
    draw([], tmp_path / "empty.png", "nothing")
    assert (tmp_path / "empty.png").read_bytes().startswith(PNG)
