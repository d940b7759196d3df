"""The ledger's JSON and its table: rows are compared with the undefended one of their plan and task."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.experiments.leak.leak_table import WIDTH, table
from isthmus.experiments.leak.ledger_json import ledger


def row(name: str, loss: float, seconds: float, tokens: float | None, **about: Any) -> dict[str, Any]:
    """A finished row of two held-out texts, with one attack."""
    settings = {
        "edge_layers": "2:2",
        "data": "e2e",
        "mode": "split",
        "codec": "fp32",
        "defence": [],
        "steps": 9,
        **about,
    }
    entry = {
        "row": name,
        "attack": None if tokens is None else "matching",
        "mode": settings["mode"],
        "codec": settings["codec"],
        "data": settings["data"],
        "defence": " + ".join(settings["defence"]) or "none",
        "token_accuracy": tokens,
        "token_accuracy_interval": None if tokens is None else [tokens, tokens],
        "prior_accuracy": 0.2,
        "prior_free_accuracy": 0.1,
    }
    task = {
        "losses": {"right": [loss, 3 * loss], "of": [1.0, 3.0]},
        "hits": {"right": [1.0, 1.0], "of": [1.0, 3.0]},
    }
    return {
        "settings": {"row": settings},
        "seconds": 10.0,
        "runs": [entry],
        "task": {settings["codec"]: task},
        "task_without_defence": {**task, "losses": WITHOUT} if settings["defence"] else None,
        "task_zero_shot": ZERO_SHOT,
        "step_seconds": [seconds, 3 * seconds],
    }


WITHOUT = {"right": [5.0, 15.0], "of": [1.0, 3.0]}
ZERO_SHOT = {"losses": {"right": [4.0, 12.0], "of": [1.0, 3.0]}, "hits": {"right": [0.0, 0.0], "of": [1.0, 3.0]}}


def test_rows_are_compared_with_the_undefended_one_of_their_plan_and_task() -> None:
    rows = [
        row("noise", 3.0, 2.0, 0.9, defence=["gaussian:clip=1,sigma=1"]),
        row("plain", 2.0, 1.0, 1.0),
        row("top", 2.5, 0.5, 1.0, mode="top-only"),
        row("deeper", 2.0, 1.0, 1.0, edge_layers="4:2", defence=["mixing"]),
        row("other", 2.0, 1.0, 1.0, data="sst2", mode="emulator"),
        row("longer", 2.0, 1.0, 1.0, steps=10, defence=["mixing"]),
    ]
    result = ledger(rows, {"model": "tiny"})
    found = {run["row"]: run for run in result["runs"]}
    assert (result["model"], result["seconds"], result["data"]) == ("tiny", 60.0, ["e2e", "sst2"])
    assert found["noise"]["task_loss"] == pytest.approx(3.0)
    assert found["noise"]["task_accuracy"] == pytest.approx(0.5)
    assert found["noise"]["task_loss_ratio"] == pytest.approx(1.5)
    assert found["noise"]["task_loss_ratio_interval"] == pytest.approx([1.5, 1.5])
    assert found["noise"]["loss_ratio_without_defence"] == pytest.approx(2.5)
    assert found["plain"]["loss_ratio_without_defence"] is None
    assert found["noise"]["step_ratio"] == pytest.approx(2.0)
    assert found["noise"]["step_ratio_interval"] == pytest.approx([2.0, 2.0])  # twice the time in each step
    assert found["plain"]["task_loss_ratio"] == 1
    assert found["top"]["task_loss_ratio"] == pytest.approx(1.25)
    assert found["top"]["zero_shot_loss_ratio"] == pytest.approx(2.0)
    for name in ("deeper", "other", "longer"):
        assert found[name]["task_loss_ratio"] is found[name]["zero_shot_loss_ratio"] is None
        assert found[name]["step_ratio"] is found[name]["step_ratio_interval"] is None


def test_the_table_fits_a_terminal_and_ends_with_the_frontier() -> None:
    rows = [
        row("plain", 2.0, 1.0, 1.0),
        row("a row whose name is longer than a terminal's share of it is wide", 300.0, 123.45, 0.8, defence=["mixing"]),
        row("emulator", 2.2, 0.5, None, mode="emulator", codec="none"),
    ]
    rows[1]["runs"][0] |= {"epsilon": 8.0, "delta": 1e-5, "unit": "of everything " * 9, "real_row_found": 0.61}
    lines = table(ledger(rows, {}))
    assert max(map(len, lines)) <= WIDTH
    assert "matching picks the real one of a text and its decoys in 61\N{NO-BREAK SPACE}%" in " ".join(lines)
    assert "epsilon 8 at delta 1e-05" in " ".join(lines)
    assert "80\N{NO-BREAK SPACE}%" in lines[2]
    assert "without training has 2.00" in " ".join(lines[-4:])
