"""A cloud's note in the control store, beside what `test_attached.py` says of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.cloud.cluster.cloud_records import CloudNote, read_note, write_note


@pytest.fixture
def values() -> dict[str, bytes]:
    return {}


@pytest.fixture
def cluster(values: dict[str, bytes]) -> Any:
    return SimpleNamespace(keep=values.__setitem__, kept=values.get)


def test_each_cloud_has_a_note_of_its_own(cluster: Any) -> None:
    one, other = CloudNote("/home/one", "SHA256:1", autoscaled=True), CloudNote("/home/two", stopped=True)
    write_note(cluster, "one", one)
    write_note(cluster, "two", other)
    assert (read_note(cluster, "one"), read_note(cluster, "two")) == (one, other)


@pytest.mark.parametrize("kept", [b"", b"nonsense", b"[]", b'{"of_another_version": 1}', None])
def test_what_is_no_note_is_none(cluster: Any, values: dict[str, bytes], kept: bytes | None) -> None:
    write_note(cluster, "one", CloudNote())
    (name,) = values
    assert read_note(cluster, "one") == CloudNote()
    values.pop(name)
    if kept is not None:
        values[name] = kept
    assert read_note(cluster, "one") is None
