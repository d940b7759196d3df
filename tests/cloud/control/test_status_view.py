"""The tables of `isthmus cloud status`."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from isthmus.cloud.control.status_view import view


def shown(status: dict[str, Any], width: int, now: float | None = None) -> str:
    text = StringIO()
    Console(file=text, width=width).print(view(status, now))
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


def test_a_person_reads_units_and_dates_in_80_columns_and_loses_nothing() -> None:
    pin = "SHA256:4rSmJSELlYTewYUQ0FqTUsvELVKApfGI8/gb13xDN4Y"
    status = {
        **{"connection": f"isthmus://[fe80::1]:7443#{pin}", "state": "serving", "span_bytes": 368170240},
        **{"uptime_s": 567.4981725215912, "certificate_not_after": 1_800_000_000, "tokens_per_s": 12.3456},
        **{"stash_bytes": 3 << 19, "stash_budget_bytes": 2 << 30, "deadlines_missed": 0.0123, "peak_bytes": 3 << 30},
        **{"news_s": 1.737586259841919, "deadlines": {"met": 8, "late": 1}},
        "workers": [
            {
                **{"worker": 0, "state": "restarting", "address": "[fe80::1]:7443", "span": "12:28", "restarts": 12},
                **{"sessions": {"alice@hospital": 4, "bob": 12}, "tokens_per_s": 12345.6, "queue_depth": 123},
                **{"stash_bytes": 518 << 20, "stash_budget_bytes": 2 << 30},
            }
        ],
    }
    text = shown(status, 80, now=1_800_000_000 - 20 * 86_400)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert not [raw for raw in ("368170240", "737586", "567.49") if raw in text]
    lines = {" ".join(line.split()) for line in text.splitlines()}
    expected = {
        *("up for 9.5 minutes", "span's weights 351.1 MiB", "stash 1.5 MiB of 2.0 GiB", "tokens/s 12"),
        *("certificate expires on 2027-01-15 08:00 UTC, in 20 days", "deadlines missed 1.2%", "peak 3.0 GiB"),
        *("news 1.7 s", "deadlines late 1, met 8"),
    }
    assert expected <= lines
    assert pin in "".join(text.split())
    for part in ("restarting", "[fe80::1]:7443", "12:28", "12346", "123", "518.0 MiB", "bob 12"):
        assert part in text
    late = shown(status, 80, now=1_800_000_001.0)
    assert "expired on 2027-01-15 08:00 UTC, edges refuse this cloud" in " ".join(late.split())
