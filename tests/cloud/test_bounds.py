"""The limits of a worker's data plane: the operator's options, and the allowance of pings."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from isthmus.cli.cloud_commands import app
from isthmus.cloud.bounds import Allowance, Bounds
from isthmus.cloud.control import supervisor
from isthmus.protocol.limits import TransferTimeout


def test_an_allowance_comes_back_with_time() -> None:
    pings = Allowance(3, now=0.0)
    assert [pings.take(0.0) for _ in range(4)] == [True, True, True, False]
    assert not pings.take(19.0)
    assert pings.take(40.0)
    assert [pings.take(1000.0) for _ in range(4)] == [True, True, True, False]


def test_the_bounds_are_options_of_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Bounds] = []
    monkeypatch.setattr(supervisor, "serve", lambda options, **_: given.append(options.bounds) or True)
    turned = ["--max-connections", "9", "--least-rate", "1KiB", "--stall-seconds", "3", "--max-session-age", "60"]
    for options in ([], turned):
        result = CliRunner().invoke(app, ["serve", "--model", "tiny", *options])
        assert result.exit_code == 0, result.output
    assert given[0] == Bounds()
    assert given[1] == Bounds(max_connections=9, max_session_age=60, transfer=TransferTimeout(3, 1024))
