"""A worker's key and certificate that are renewed while it serves."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from support.cloud.clouds import Home, ThreadServer
from support.cloud.sessions import channel

from isthmus.cloud.home import identity as identity_module
from isthmus.cloud.home.expiry import DAY, ExpiryWatch, expiry
from isthmus.cloud.home.identity import IdentityFiles
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import FingerprintError, KeyFileError
from isthmus.protocol.secure.keys import generate_root, issue_worker


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is logged about the identity: the event, and the error or the date."""
    seen: list[tuple[str, str]] = []

    def log(event: str, level: int = logging.INFO, **fields: object) -> None:
        seen.append((event, str(next(iter(fields.values())))))

    monkeypatch.setattr(identity_module, "log", log)
    return seen


def test_a_renewed_certificate_and_then_a_new_key_are_taken_up(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    home = Home(tmp_path, days=1).folder
    identity = IdentityFiles(home)
    first = identity()
    assert identity() is first
    renewed = issue_worker(home, days=90)
    assert identity().certificate == renewed
    assert identity().key.public_key() == first.key.public_key()
    (home / "worker_key").unlink()
    assert identity().certificate == renewed  # a key that is away for a moment is no reason to stop
    replaced = issue_worker(home, days=30)
    assert identity().certificate == replaced
    assert identity().key.public_key() != first.key.public_key()
    told = [event.removeprefix("worker_identity_") for event, _ in events]
    assert told == ["renewed", "unusable", "renewed"]


def test_files_that_cannot_be_used_keep_the_last_good_pair_and_are_logged_once(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    home = Home(tmp_path).folder
    identity = IdentityFiles(home)
    good, whole = identity(), (home / "worker_cert").read_text()
    other = Home(tmp_path / "other").folder

    def put(text: str) -> None:
        (home / "worker_cert").write_text(text)
        for _ in range(3):
            assert identity() is good

    put("{")
    put((other / "worker_cert").read_text())  # for another key
    put(whole.replace('"not_after": ', '"not_after": 1'))  # which the root has not signed
    (home / "worker_cert").unlink()
    assert identity() is good
    (home / "worker_cert").write_text(whole)
    (home / "worker_key").chmod(0o644)
    assert identity() is good
    errors = [error for event, error in events if event == "worker_identity_unusable"]
    expected = ["not a worker's certificate", "another key", "not signed by the key", "does not exist", "chmod 600"]
    assert [wanted in error for wanted, error in zip(expected, errors, strict=True)] == [True] * 5


def test_a_certificate_of_another_root_is_not_taken_up(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    home = Home(tmp_path).folder
    identity = IdentityFiles(home)
    good = identity()
    (home / "root_key").unlink()
    generate_root(home)
    issue_worker(home, days=90)
    assert identity() is good
    assert [event for event, _ in events] == ["worker_identity_unusable"]
    assert "edges have pinned" in events[0][1]


def test_a_worker_that_starts_has_nothing_to_fall_back_on(tmp_path: Path) -> None:
    home = Home(tmp_path, days=-1).folder
    with pytest.raises(KeyFileError, match="expired"):
        IdentityFiles(home)


def test_an_edge_meets_the_renewed_certificate_without_a_restart(cloud: Served, tmp_path: Path) -> None:
    home = Home(tmp_path, days=-1)  # the tests' server takes it all the same
    with ThreadServer(cloud, home) as server:
        with pytest.raises(FingerprintError, match="expired"):
            channel(server)
        before = server.server.status()["certificate_not_after"]
        renewed = issue_worker(home.folder, days=5)
        channel(server).abandon()
        assert before < server.server.status()["certificate_not_after"] == renewed.not_after
        metric = server.server.metrics.registry.get_sample_value("isthmus_certificate_not_after_seconds")
        assert metric == renewed.not_after


# Before it expires ----------------------------------------------------------------------------------------------------


def test_the_operator_is_warned_from_14_days_before_on_once_a_day() -> None:
    said: list[str] = []
    clock, not_after = [0.0], [30 * DAY]
    watch = ExpiryWatch(lambda: not_after[0], said.append, lambda: clock[0])
    for hour in range(24 * 32):
        clock[0] = hour * 3600.0
        watch.check()
    assert len(said) == 14 + 2
    assert said[0] == (
        "the worker's certificate expires on 1970-01-31 00:00 UTC, in 14 days: renew it with `isthmus cloud keygen`"
    )
    assert "expired on 1970-01-31 00:00 UTC" in said[-1]
    not_after[0] = 60 * DAY
    watch.check()
    assert len(said) == 16
    not_after[0] = 33 * DAY
    watch.check()
    assert len(said) == 17


def test_a_certificate_that_is_good_for_long_asks_for_nothing() -> None:
    assert expiry(40 * DAY, 10 * DAY) == "expires on 1970-02-10 00:00 UTC, in 30 days"
    assert expiry(12 * DAY, 10.5 * DAY).startswith("expires on 1970-01-13 00:00 UTC, in 1 day:")
