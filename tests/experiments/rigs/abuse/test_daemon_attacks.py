"""The attacks of `isthmus bench abuse` on a daemon: what they send, and how they are judged."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
from support.daemon.served import serving

from isthmus.common.errors import IsthmusError
from isthmus.experiments.rigs.abuse.abuse_bench import UNIT_OF, rows
from isthmus.experiments.rigs.abuse.ceilings import CEILINGS
from isthmus.experiments.rigs.abuse.daemon_attacks import BODY, DAEMON_ATTACKS, Asked, attack_daemon
from isthmus.experiments.rigs.abuse.gauge import Gauge, Taken
from isthmus.experiments.rigs.abuse.honest import Calls

NOBODY = Asked("127.0.0.1", 1, "tml-token", "tiny")
LATENCIES = {UNIT_OF["answers"], UNIT_OF["health"]}


@pytest.mark.parametrize(("name", "count"), [("deep_json", 8), ("many_streams", 90), ("unfinished_bodies", 600)])
def test_clients_send_what_they_say(name: str, count: int) -> None:
    requests = DAEMON_ATTACKS[name][0](NOBODY)
    assert len(requests) == count
    for request in requests:
        head, _, body = request.partition(b"\r\n\r\n")
        said = int(head.rpartition(b"Content-Length: ")[2])
        assert said <= BODY
        assert len(body) < said if name == "unfinished_bodies" else len(body) == said
        assert b"Bearer tml-token" in head


@pytest.mark.parametrize(("status", "is_right"), [(400, True), (200, False)])
def test_an_answer_that_no_attack_may_get_is_an_error(status: int, is_right: bool) -> None:
    async def app(scope: Any, _receive: Any, send: Any) -> None:
        has_token = any(name == b"authorization" for name, _ in scope["headers"])
        await send({"type": "http.response.start", "status": status if has_token else 401, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    with serving(app) as url:
        asked = Asked("127.0.0.1", int(url.rpartition(":")[2]), "tml-token", "tiny")
        if is_right:
            attack_daemon("deep_json", asked, 1.0)
        else:
            with pytest.raises(IsthmusError, match="'deep_json' with 200"):
                attack_daemon("deep_json", asked, 120.0)


def test_what_an_owner_waits_for_has_a_ceiling() -> None:
    ceiling = CEILINGS["deep_json"]
    assert ceiling.answers is not None
    assert ceiling.health is not None
    within = rows(Taken(0, 0, 0), ceiling, 1, {"answers": ceiling.answers, "health": ceiling.health})
    assert [(row["unit"], row["held"]) for row in within if row["unit"] in LATENCIES] == [
        (UNIT_OF["answers"], True),
        (UNIT_OF["health"], True),
    ]
    beyond = rows(Taken(0, 0, 0, 1000), ceiling, 1, {"answers": ceiling.answers, "health": ceiling.health + 1})
    assert {row["unit"] for row in beyond if not row["held"]} == {UNIT_OF["health"], UNIT_OF["threads"]}
    assert not any(row["held"] for row in rows(Taken(0, 0, 0), ceiling, 0, {"answers": 1.0, "health": 1.0}))


def test_the_longest_call_between_two_moments_counts() -> None:
    calls = Calls(lambda: None)
    calls._ended_at, calls._took = [1.0, 2.0, 7.0, 8.0, 9.0], [3.0, 1.0, 5.0, 1.0, 9.0]
    assert calls.longest_s(1.5, 3.0) == 9.0  # it has begun at 0
    calls._took[-1] = 0.5
    assert calls.longest_s(1.5, 1.9) == 1.0
    assert calls.longest_s(1.5, 3.0) == 5.0


def test_a_call_that_fails_is_told() -> None:
    def fail() -> None:
        raise IsthmusError("no")

    with Calls(fail) as calls, pytest.raises(IsthmusError, match="who behaves failed: no"):
        calls.longest_s(0.0, time.monotonic())


def test_threads_are_counted() -> None:
    over = threading.Event()
    with Gauge(os.getpid()) as gauge:
        threads = [threading.Thread(target=over.wait, args=(60,)) for _ in range(5)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while gauge._most_threads < gauge._threads + 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        over.set()
    assert gauge.taken.threads >= 5
