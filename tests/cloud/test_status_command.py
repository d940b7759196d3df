"""`isthmus cloud status --watch`, with a cloud and a clock of the test's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isthmus.cloud import commands, state


def test_watching_goes_on_until_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []

    def read(home: Path) -> dict[str, Any]:
        assert home == tmp_path
        return {"state": "serving", "look": len(pauses), "workers": []}

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(state, "read_status", read)
    monkeypatch.setattr(commands.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        commands.status(tmp_path, as_json=True, watch=True, every=2.0)
    assert [json.loads(line)["look"] for line in capsys.readouterr().out.splitlines()] == [0, 1, 2]
    assert pauses == [2.0] * 3
    pauses.clear()
    with pytest.raises(KeyboardInterrupt):
        commands.status(tmp_path, as_json=False, watch=True, every=1.0)
    assert "serving" in capsys.readouterr().out
