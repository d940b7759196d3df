"""The tables of `isthmus cloud status`."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from isthmus.cloud.status_view import view


def shown(status: dict[str, Any], width: int) -> str:
    text = StringIO()
    Console(file=text, width=width).print(view(status))
    return text.getvalue()


def test_each_worker_has_a_line_and_one_that_is_away_has_little_in_it() -> None:
    mib = 1 << 20
    status = {
        **{"connection": "isthmus://h:7443#SHA256:x", "state": "serving", "sessions": {"alice": 2, "bob": 1}},
        "workers": [
            {
                **{"worker": 0, "state": "serving", "address": "cloud.example:7443", "span": "2:28"},
                **{"sessions": {"bob": 1}, "tokens_per_s": 1234.5, "queue_depth": 3, "restarts": 2},
                **{"stash_bytes": mib // 2, "stash_budget_bytes": 64 * mib},
            },
            {"worker": 1, "state": "restarting", "address": "cloud.example:7444", "restarts": 1},
        ],
    }
    text = shown(status, 120)
    assert "alice 2, bob 1" in text
    lines = [line for line in text.splitlines() if "cloud.example" in line]
    assert len(lines) == 2
    assert all(part in lines[0] for part in ("serving", "2:28", "bob 1", "1234"))
    assert "restarting" in lines[1]
    narrow = shown(status, 80)
    assert "cloud.example:7443" in narrow
    assert "cloud.example:7444" in narrow
