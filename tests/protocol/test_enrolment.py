"""Authorized edges, enrolment, quotas, sizes and connection strings."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings, strategies as st
from support.protocol.wire import PIN

from isthmus.common.errors import ConfigError, KeyFileError, NotEnrolledError
from isthmus.protocol.enrolment import AuthorizedEdges, ConnectionString, Quota, add_line, parse_size
from isthmus.protocol.secure.keys import Fingerprint, format_public_key, parse_public_key


def line(seed: int, name: str) -> str:
    key = Ed25519PrivateKey.from_private_bytes(bytes((seed,)) * 32)
    return format_public_key(key.public_key().public_bytes_raw(), name)


def raw(text: str) -> bytes:
    return parse_public_key(text)[0]


def test_authorized_edges() -> None:
    text = "\n".join(
        [
            "# the hospitals",
            "",
            line(1, "hospital-a"),
            "  max-sessions=2,max-bytes-in-flight=64MiB " + line(2, "hospital-b"),
            "max-sessions=9 " + line(3, "c@d") + "\r",
            "weight=3,max-tokens-per-second=500,max-tokens=9 " + line(6, "f"),
            "stage " + line(7, "g"),
            "stage,max-sessions=9 " + line(8, "h"),
        ]
    )
    edges = AuthorizedEdges.parse(text)
    assert len(edges) == 6
    tenant = edges.find(raw(line(1, "x")))
    assert tenant is not None
    assert (tenant.name, tenant.quota) == ("hospital-a", Quota())
    assert tenant.fingerprint == Fingerprint.of(raw(line(1, "x")))
    assert edges.require(raw(line(2, "x"))).quota == Quota(2, 64 << 20)
    assert edges.require(raw(line(3, "x"))).quota == Quota(9, 1 << 30)
    assert edges.require(raw(line(6, "x"))).quota == Quota(weight=3, max_tokens_per_second=500, max_tokens=9)
    assert [edges.require(raw(line(number, "x"))).stage for number in (1, 6, 7, 8)] == [False, False, True, True]
    assert [edges.require(raw(line(number, "x"))).quota for number in (7, 8)] == [Quota(), Quota(9)]
    assert Quota.parse(Quota(2, 5, 3, 500, 9).format()) == Quota(2, 5, 3, 500, 9)
    assert Quota().format() == ""
    assert edges.find(raw(line(4, "x"))) is None
    with pytest.raises(NotEnrolledError, match=r"SHA256:.*isthmus cloud enroll"):
        edges.require(raw(line(4, "x")))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("hello", "unknown option"),
        ("ssh-rsa AAAA name", "not an Ed25519"),
        ("ssh-ed25519", "not an Ed25519"),
        ("ssh-ed25519 !!!! name", "not base64"),
        ("ssh-ed25519 AAAAé name", "not base64"),
        ("ssh-ed25519 AAAA name", "encoding"),
        (line(5, ""), "cannot name an edge"),
        (line(5, "two words"), "cannot name an edge"),
        (line(5, "x" * 65), "cannot name an edge"),
        ("max-sessions=0 " + line(5, "e"), "at least 1"),
        ("max-sessions=two " + line(5, "e"), "not a number"),
        ("weight=0 " + line(5, "e"), "at least 1"),
        ("max-tokens-per-second=0 " + line(5, "e"), "at least 1"),
        ("max-tokens=0 " + line(5, "e"), "at least 1"),
        ("max-sessions=1,max-sessions=2 " + line(5, "e"), "twice"),
        ("max-bytes-in-flight=64MB " + line(5, "e"), "not a size"),
        ("command=ls " + line(5, "e"), "unknown option 'command'"),
        ("stage=1 " + line(5, "e"), "unknown option 'stage'"),
        ("stage, " + line(5, "e"), "unknown option ''"),
        ("stage,stage " + line(5, "e"), "unknown option 'stage'"),
        ("max-sessions=9,stage " + line(5, "e"), "unknown option 'stage'"),
        (line(1, "other"), "already on line 1"),
        (line(5, "hospital-a"), "already on line 1"),
    ],
)
def test_malformed_lines_are_named_by_number(bad: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"authorized_edges, line 3: .*{message}"):
        AuthorizedEdges.parse("\n".join([line(1, "hospital-a"), "# comment", bad]))


def test_enrolment_appends_and_refuses_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "cloud" / "authorized_edges"
    first = add_line(path, line(1, "hospital-a") + "\n")
    assert first.name == "hospital-a"
    path.write_text(path.read_text().rstrip("\n"))  # as an editor may leave it
    second = add_line(path, line(2, "ignored"), "hospital-b", Quota(2, 64 << 20))
    edges = AuthorizedEdges.load(path)
    assert edges.find(raw(line(1, "x"))) == first
    assert edges.find(raw(line(2, "x"))) == second
    assert second.quota == Quota(2, 64 << 20)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="already on line 1"):
        add_line(path, line(1, "again"))
    with pytest.raises(ConfigError, match="already on line 2"):
        add_line(path, line(3, "hospital-b"))
    with pytest.raises(ConfigError, match="give a name"):
        add_line(path, line(3, ""))
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["authorized_edges"]
    path.write_bytes(b"\xff")
    with pytest.raises(KeyFileError, match="UTF-8"):
        AuthorizedEdges.load(path)
    with pytest.raises(KeyFileError, match="cannot be read"):
        add_line(path, line(3, "c"))
    with pytest.raises(KeyFileError, match="isthmus cloud enroll"):
        AuthorizedEdges.load(tmp_path / "none")


@pytest.mark.parametrize("quota", [None, Quota(9, 64 << 20)])
def test_a_stage_is_enrolled_as_one(tmp_path: Path, quota: Quota | None) -> None:
    path = tmp_path / "authorized_edges"
    stage = add_line(path, line(1, "stage-0"), quota=quota, stage=True)
    edge = add_line(path, line(2, "hospital-a"), quota=quota)
    assert (stage.stage, stage.quota, edge.stage) == (True, quota or Quota(), False)
    assert [AuthorizedEdges.load(path).find(raw(line(number, "x"))) for number in (1, 2)] == [stage, edge]


def test_edges_are_joined_with_workers_and_a_workers_line_goes_first(tmp_path: Path) -> None:
    edges, workers = tmp_path / "edges", tmp_path / "workers"
    alice, both = add_line(edges, line(1, "alice")), add_line(edges, line(2, "bob"))
    worker = add_line(workers, line(2, "worker-1"), stage=True)
    joined = AuthorizedEdges.load(edges).joined(AuthorizedEdges.load(workers))
    assert [joined.find(raw(line(number, "x"))) for number in (1, 2, 3)] == [alice, worker, None]
    assert AuthorizedEdges.load(edges).find(raw(line(2, "x"))) == both


def test_sizes() -> None:
    assert [parse_size(text) for text in ("7", "7B", "2KiB", "64MiB", "1GiB")] == [7, 7, 2048, 64 << 20, 1 << 30]
    for bad in ("", "MiB", "-1", "1.5GiB", "1 GiB", "1TB"):
        with pytest.raises(ConfigError, match="not a size"):
            parse_size(bad)


@pytest.mark.parametrize("scheme", ["isthmus", "isthmus+tls"])
@pytest.mark.parametrize("host", ["cloud.example", "127.0.0.1", "[::1]", "[fe80::1]"])
def test_connection_strings(scheme: str, host: str) -> None:
    text = f"{scheme}://{host}:7443#{PIN}"
    parsed = ConnectionString.parse(text + "\n")
    assert str(parsed) == text
    assert (parsed.port, parsed.pin, parsed.tls) == (7443, PIN, scheme == "isthmus+tls")
    assert parsed.address == f"{host}:7443"
    assert "[" not in parsed.host


def test_a_connection_string_may_name_several_places() -> None:
    text = f"isthmus://a.example:7443,[::1]:7444,10.0.0.3:7443#{PIN}"
    parsed = ConnectionString.parse(text)
    assert str(parsed) == text
    assert parsed.addresses == ("a.example:7443", "[::1]:7444", "10.0.0.3:7443")
    assert ConnectionString("a.example", 7443, PIN, others=("[::1]:7444", "10.0.0.3:7443")) == parsed
    for bad in ("a:1,,b:1", "a:1,b", ",".join(f"h{number}:1" for number in range(17))):
        with pytest.raises(ConfigError, match="is not a connection string"):
            ConnectionString.parse(f"isthmus://{bad}#{PIN}")


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "cloud.example:7443",
        f"https://h:1#{PIN}",
        f"isthmus://h#{PIN}",
        f"isthmus://h:0#{PIN}",
        f"isthmus://h:99999#{PIN}",
        f"isthmus://h:x#{PIN}",
        f"isthmus://:1#{PIN}",
        f"isthmus://u@h:1#{PIN}",
        f"isthmus://h:1/path#{PIN}",
        f"isthmus://h:1?q#{PIN}",
        f"isthmus://::1:7443#{PIN}",
        f"isthmus://[::1:7443#{PIN}",
        "isthmus://h:1",
        "isthmus://h:1#SHA256:short",
    ],
)
def test_malformed_connection_strings(bad: str) -> None:
    with pytest.raises(ConfigError, match="is not a connection string"):
        ConnectionString.parse(bad)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_arbitrary_text_gives_a_typed_error(text: str) -> None:
    for parse in (ConnectionString.parse, Fingerprint.parse, parse_public_key, Quota.parse, parse_size):
        with contextlib.suppress(ConfigError):
            parse(text)
