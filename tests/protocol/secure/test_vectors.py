"""Known answers: the handshake and the record layer give exactly the frozen vectors of `tests/vectors`.

So does an implementation that knows nothing of this one, `support.protocol.reference`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature, InvalidTag
from support import replay
from support.protocol import reference, vectors
from support.protocol.make_vectors import found_in_renewal

from isthmus.common import errors
from isthmus.common.errors import IsthmusError

HANDSHAKE: dict[str, Any] = vectors.read("handshake.json")
RENEWAL: dict[str, Any] = vectors.read("renewal.json")
RECORDS: dict[str, Any] = vectors.read("records.json")
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in RECORDS["cases"]}
NOTICED = (AssertionError, IsthmusError, InvalidSignature, InvalidTag, ValueError)
"""What a wrong vector may lead to."""


def named(entries: list[dict[str, Any]]) -> Any:
    ids = [" ".join(str(entry[key]) for key in ("to", "flight", "name") if key in entry) for entry in entries]
    return pytest.mark.parametrize("entry", entries, ids=ids)


def notices(check: Callable[[dict[str, Any]], None], changed: dict[str, Any]) -> bool:
    try:
        check(changed)
    except NOTICED:
        return True
    return False


# The handshake --------------------------------------------------------------------------------------------------------


def check_handshake(handshake: dict[str, Any]) -> None:
    replay.replay_handshake(handshake)
    assert reference.handshake(handshake["inputs"], handshake["flights"]) == handshake["derived"]


def test_the_handshake_is_the_frozen_one() -> None:
    check_handshake(HANDSHAKE)


@named(HANDSHAKE["refused"])
def test_a_flight_that_is_not_the_right_one_is_refused(entry: dict[str, Any]) -> None:
    flights = HANDSHAKE["flights"]
    arrived = vectors.delivered([flights[entry.get("replaced_by", entry["flight"])]], {**entry, "frame": 0})
    with pytest.raises(IsthmusError) as caught:
        replay.replay_refusal(HANDSHAKE, entry["to"], entry["flight"], arrived, entry.get("now"))
    assert type(caught.value) is getattr(errors, entry["error"])


def test_flights_that_are_refused_when_changed_are_taken_as_they_are() -> None:
    for to, flight in {(entry["to"], entry["flight"]) for entry in HANDSHAKE["refused"]}:
        replay.replay_refusal(HANDSHAKE, to, flight, HANDSHAKE["flights"][flight], None)


@pytest.mark.parametrize("part", ["inputs", "derived", "flights"])
def test_a_flipped_bit_anywhere_in_the_handshake_is_noticed(part: str) -> None:
    found = {
        place: notices(check_handshake, {**HANDSHAKE, part: changed})
        for place, changed in vectors.flipped(HANDSHAKE[part])
    }
    assert len(found) >= 5
    assert all(found.values()), found


# The record layer -----------------------------------------------------------------------------------------------------


def check_records(case: dict[str, Any]) -> None:
    """What `support.protocol.reference` finds in the frames of a case, and what the project makes of the inputs."""
    frames = replay.replay_records(case)
    found = reference.open_records(case, frames)
    expected = [{"header": s["header"], "body": replay.body_of(s)} for s in case["steps"] if "header" in s]
    assert found["messages"] == expected
    assert found["epochs"] == case["epochs"]
    assert found["pieces"] == case.get("pieces", found["pieces"])


@named(RECORDS["cases"])
def test_frames_are_the_frozen_ones(entry: dict[str, Any]) -> None:
    check_records(entry)


def test_the_cases_have_what_a_second_implementation_needs() -> None:
    """Chunks, key changes, both directions, and the secrets that the handshake ends in."""
    pieces = [piece["piece"] for case in CASES.values() for piece in case.get("pieces", ())]
    assert set(pieces) == {"header", "chunk", "rekey"}
    assert max(epoch["epoch"] for case in CASES.values() for epoch in case["epochs"]) >= 3
    assert {case["direction"] for case in CASES.values()} == {1, 2}
    for way in ("edge_to_cloud", "cloud_to_edge"):
        case = CASES[f"a session to its end, {way}"]
        assert case["secret"] == HANDSHAKE["derived"][f"traffic_secret_{way}"]
        assert case["session_id"] == HANDSHAKE["inputs"]["verdict"]["session_id"]
        assert case["steps"][-1]["header"] == b"goodbye"


@named(RECORDS["cases"])
def test_a_flipped_bit_anywhere_in_a_case_is_noticed(entry: dict[str, Any]) -> None:
    found = {place: notices(check_records, changed) for place, changed in vectors.flipped(entry)}
    assert len(found) >= 5
    assert all(found.values()), found


def frames_of(case: dict[str, Any]) -> list[bytes]:
    return [frame for step in case["steps"] for frame in step["frames"]]


@named(RECORDS["refused"])
def test_a_frame_that_is_not_the_next_one_is_refused(entry: dict[str, Any]) -> None:
    case = CASES[entry["of"]]
    opener = replay.new_opener({**case, **entry["instead"]})
    arriving = [vectors.delivered(frames_of(case), change) for change in entry["deliver"]]
    assert entry["accepted"] + 1 == len(arriving) or entry["name"] == "a body over the limit"
    for frame in arriving[: entry["accepted"]]:
        opener.open(frame)
    with pytest.raises(IsthmusError) as caught:
        opener.open(arriving[entry["accepted"]])
    assert type(caught.value) is getattr(errors, entry["error"])
    with pytest.raises(errors.LocalProtocolError):  # and none after it
        opener.open(arriving[0])


@named(RECORDS["unfinished"])
def test_a_message_that_did_not_come_whole_is_not_given(entry: dict[str, Any]) -> None:
    case = CASES[entry["of"]]
    opener = replay.new_opener(case)
    opened = [opener.open(frame) for frame in frames_of(case)[: entry["frames"]]]
    assert sum(message is not None for message in opened) == entry["messages"]


# Renewal --------------------------------------------------------------------------------------------------------------


def check_renewal(renewal: dict[str, Any]) -> None:
    assert replay.renewal(renewal["inputs"], renewal["derived"]) == renewal["frames"]
    found = found_in_renewal(renewal["inputs"], renewal["frames"])
    assert {name: renewal[name] for name in found} == found


def test_a_renewal_is_the_frozen_one() -> None:
    check_renewal(RENEWAL)
    pieces = [[each["piece"] for each in RENEWAL[way]["pieces"]] for way in ("edge_to_cloud", "cloud_to_edge")]
    assert pieces == [["offer", "header", "chunk", "switch", "header", "chunk"], ["answer", "header", "chunk"]]
    assert RENEWAL["inputs"]["session_id"] == HANDSHAKE["inputs"]["verdict"]["session_id"]


def test_a_flipped_bit_anywhere_in_a_renewal_is_noticed() -> None:
    found = {place: notices(check_renewal, changed) for place, changed in vectors.flipped(RENEWAL)}
    assert len(found) >= 50
    assert all(found.values()), found


def test_the_second_implementation_shares_nothing_with_the_first() -> None:
    tree = ast.parse(Path(reference.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside = {name.split(".")[0] for name in imported}
    assert outside == {"__future__", "hashlib", "hmac", "struct", "typing", "cryptography"}
