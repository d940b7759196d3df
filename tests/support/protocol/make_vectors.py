"""Makes the frozen vectors anew: `make vectors`. See tests/vectors/README.md for when.

The inputs follow from their names, but for the ciphertext of the client's secret: the library draws the random bytes of
ML-KEM and of the ephemeral key itself, so each run gives another one, and other flights behind it.
"""

from __future__ import annotations

import hashlib
from typing import Any

from support import replay
from support.protocol import reference, vectors

from isthmus.protocol.secure.framing import VERSION, Direction
from isthmus.protocol.secure.handshake import SUITE, version_refusal


def drawn(name: str, count: int) -> bytes:
    """Bytes that follow from a name."""
    return hashlib.shake_256(b"isthmus vectors: " + name.encode()).digest(count)


def make_handshake() -> dict[str, Any]:
    """A handshake that is accepted, the same one refused, and flights that are refused."""
    inputs: dict[str, Any] = {
        "version": VERSION,
        "suite": SUITE,
        **{f"{who}_private_key": drawn(f"{who} key", 32) for who in ("root", "worker", "edge")},
        "now": 1_700_000_000,
        "not_after": 1_800_000_000,
        "client_nonce": drawn("client nonce", 32),
        "server_nonce": drawn("server nonce", 32),
        "mlkem_seed": drawn("mlkem seed", 64),
        "x25519_private_key": drawn("x25519 key", 32),
        "client_secret": drawn("client secret", 32),
        "verdict": {"code": 0, "session_id": drawn("session id", 16), "body": b"information of the session"},
        "verdict_refused": {"code": 8, "session_id": bytes(16), "body": b"not enrolled"},
    }
    flights = {}
    for ending, word in (("server_done", "verdict"), ("server_done_refused", "verdict_refused")):
        edge, cloud = replay.client(inputs), replay.server(inputs)
        flights["client_hello"] = edge.start()
        flights["server_hello"] = cloud.answer(flights["client_hello"])
        if "client_auth" not in flights:
            flights["client_auth"] = edge.answer(flights["server_hello"])
        cloud.identify(flights["client_auth"])
        flights[ending], _ = cloud.finish(replay.verdict(inputs[word]))
    flights["version_refused"] = version_refusal()
    return {
        "about": "See README.md. Bytes are hexadecimal. Derived values are in the order of their use.",
        "inputs": inputs,
        "derived": reference.handshake(inputs, flights),
        "flights": flights,
        "refused": [
            refused("server", "client_hello", "magic", "FrameError", at=0),
            refused("server", "client_hello", "kind", "FrameError", at=4),
            refused("server", "client_hello", "version", "VersionError", at=5),
            refused("server", "client_hello", "suite", "VersionError", at=7),
            refused("server", "client_hello", "cut", "FrameError", cut_to=37),
            refused("server", "client_hello", "longer", "FrameError", append=b"\0"),
            refused("client", "server_hello", "nonce", "FingerprintError", at=6),
            refused("client", "server_hello", "ML-KEM key", "FingerprintError", at=38),
            refused("client", "server_hello", "X25519 key", "FingerprintError", at=1222),
            refused("client", "server_hello", "root key is not the pinned one", "FingerprintError", at=1254),
            refused("client", "server_hello", "worker key", "FingerprintError", at=1286),
            refused("client", "server_hello", "expiry", "FingerprintError", at=1325),
            refused("client", "server_hello", "root's signature", "FingerprintError", at=1326),
            refused("client", "server_hello", "worker's signature", "FingerprintError", at=1390),
            refused("client", "server_hello", "cut", "FrameError", cut_to=1453),
            refused("client", "server_hello", "certificate has expired", "FingerprintError", now=1_800_000_000),
            refused("client", "server_hello", "reflected", "FrameError", replaced_by="client_hello"),
            refused("client", "server_hello", "version refused", "VersionError", replaced_by="version_refused"),
            refused("server", "client_auth", "ML-KEM ciphertext", "FrameError", at=6),
            refused("server", "client_auth", "X25519 ephemeral key", "FrameError", at=1094),
            refused("server", "client_auth", "sealed secret", "FrameError", at=1126),
            refused("server", "client_auth", "sealed edge key", "FrameError", at=1174),
            refused("server", "client_auth", "tag", "FrameError", at=1285),
            refused("server", "client_auth", "cut", "FrameError", cut_to=1285),
            refused("server", "client_auth", "a hello sent again", "FrameError", replaced_by="client_hello"),
            refused("client", "server_done", "code", "FrameError", at=6),
            refused("client", "server_done", "tag", "FrameError", at=-1 + len(flights["server_done"])),
            refused("client", "server_done", "cut", "FrameError", cut_to=21),
            refused("client", "server_done", "reflected", "FrameError", replaced_by="client_auth"),
        ],
    }


def refused(to: str, flight: str, name: str, error: str, at: int | None = None, **change: Any) -> dict[str, Any]:
    """A flight of which one bit is another, or that is changed as `change` says."""
    xor = {} if at is None else {"xor": {"at": at, "with": b"\1"}}
    return {"name": name, "to": to, "flight": flight, **xor, **change, "error": error}


SECRET, SESSION = drawn("traffic secret", 32), drawn("record session", 16)
SMALL = {"version": VERSION, "session_id": SESSION, "secret": SECRET, "chunk_bytes": 64}


def case(name: str, *steps: dict[str, Any], hashed: bool = False, **values: Any) -> dict[str, Any]:
    """A direction of a session: its steps, and what comes of them."""
    made: dict[str, Any] = {"name": name, **SMALL, "direction": int(Direction.EDGE_TO_CLOUD), **values}
    made["steps"] = [dict(step) for step in steps]
    frames = []
    for step, sealed in zip(made["steps"], replay.seal(made), strict=True):
        step["frames_sha256" if hashed else "frames"] = (
            [hashlib.sha256(frame).digest() for frame in sealed] if hashed else sealed
        )
        frames += sealed
    found = reference.open_records(made, frames)
    made["epochs"] = found["epochs"]
    if not hashed:
        made["pieces"] = found["pieces"]
    return made


def message(header: str, size: int) -> dict[str, Any]:
    """A message with an opaque header."""
    return {"header": header.encode(), "body": drawn(f"body of {header}", size)}


REKEY: dict[str, Any] = {"rekey": True}


def make_records(derived: dict[str, Any], session_id: bytes) -> dict[str, Any]:
    """Cases of the record layer, and deliveries that are refused."""
    three = case("three messages", message("a", 10), message("b", 150), message("c", 3))
    changed = case("key changes", message("a", 10), REKEY, message("b", 150), REKEY, REKEY, message("c", 0))
    ways = (("edge_to_cloud", Direction.EDGE_TO_CLOUD), ("cloud_to_edge", Direction.CLOUD_TO_EDGE))
    return {
        "about": "See README.md. Bytes are hexadecimal. Headers are opaque here.",
        "cases": [
            case("one message in one frame", message("header", 20)),
            case("a header alone", message("header", 0)),
            case("a body of exactly one chunk", message("header", 64)),
            case("a body of exactly two chunks", message("header", 128)),
            case("a body of chunks and a rest", message("header", 200)),
            three,
            changed,
            case("a key change that is due", message("a", 100), message("b", 1), message("c", 1), rekey_bytes=100),
            *(
                case(
                    f"a session to its end, {name}",
                    message("first", 70),
                    REKEY,
                    message("goodbye", 0),
                    secret=derived[f"traffic_secret_{name}"],
                    session_id=session_id,
                    direction=int(way),
                )
                for name, way in ways
            ),
            case(
                "chunks of a mebibyte, as sessions use them",
                {"header": b"header", "body_counting_to": (1 << 20) + 10},
                chunk_bytes=1 << 20,
                hashed=True,
            ),
        ],
        # "three messages" has the frames 0; 1, 2, 3; 4. "key changes" has 0; 1 (rekey); 2, 3, 4; 5, 6 (rekeys); 7.
        "refused": [
            *(
                delivery(f"{name} changed", "three messages", [0, {"frame": 1, "xor": {"at": at, "with": b"\1"}}], 1)
                for name, at in (
                    ("magic", 0), ("kind", 4), ("version", 5), ("epoch", 9), ("counter", 17), ("header bytes", 21),
                    ("chunk", 23), ("chunks", 25), ("body bytes", 33), ("sealed header", 34), ("header's tag", 36),
                    ("sealed chunk", 60), ("chunk's tag", 34 + 17 + 64 + 15),
                )
            ),
            delivery("cut by a byte", "three messages", [0, {"frame": 1, "cut_to": 34 + 17 + 64 + 15}], 1),
            delivery("cut within the prefix", "three messages", [0, {"frame": 1, "cut_to": 20}], 1),
            delivery("longer by a byte", "three messages", [0, {"frame": 1, "append": b"\0"}], 1),
            delivery("replayed", "three messages", [0, 0], 1),
            delivery("a message replayed", "three messages", [0, 1, 2, 3, 1], 4),
            delivery("chunks reordered", "three messages", [0, 1, 3], 2),
            delivery("messages reordered", "three messages", [1], 0),
            delivery("a chunk dropped", "three messages", [0, 1, 3], 2),
            delivery("a message begun within another", "three messages", [0, 1, 4], 2),
            delivery("a frame of the old key behind a key change", "key changes", [0, 1, 0], 2),
            delivery("a key change dropped", "key changes", [0, 2], 1),
            delivery("a key change replayed", "key changes", [0, 1, 1], 2),
            delivery("a key change altered", "key changes", [0, {"frame": 1, "xor": {"at": 40, "with": b"\1"}}], 1),
            delivery("a key change within a message", "key changes", [0, 1, 2, 5], 3),
            delivery("reflected", "three messages", [0], 0, direction=int(Direction.CLOUD_TO_EDGE)),
            delivery("of another session", "three messages", [0], 0, session_id=drawn("another session", 16)),
            delivery("under another secret", "three messages", [0], 0, secret=drawn("another secret", 32)),
            delivery("a body over the limit", "three messages", [0, 1], 1, "LimitError", max_message_bytes=149),
            delivery("a header over the limit", "one message in one frame", [0], 0, "LimitError", max_header_bytes=5),
        ],
        "unfinished": [
            {"name": "the stream ends within a message", "of": "three messages", "frames": 3, "messages": 1},
            {"name": "the stream ends behind a message", "of": "three messages", "frames": 4, "messages": 2},
        ],
    }  # fmt: skip


def delivery(
    name: str, of: str, frames: list[Any], accepted: int, error: str = "FrameError", **instead: Any
) -> dict[str, Any]:
    """Frames of a case as they arrive; the one behind the first `accepted` is refused. `instead`: the receiver's."""
    arriving = [{"frame": each} if isinstance(each, int) else each for each in frames]
    return {"name": name, "of": of, "deliver": arriving, "accepted": accepted, "instead": instead, "error": error}


def make_renewal(derived: dict[str, Any], session_id: bytes) -> dict[str, Any]:
    """A renewal of the keys of the handshake's session: a message of each side, and one behind it."""
    inputs: dict[str, Any] = {
        "version": VERSION,
        "session_id": session_id,
        **{f"traffic_secret_{way}": derived[f"traffic_secret_{way}"] for way in WAYS},
        "mlkem_seed": drawn("renewal mlkem seed", 64),
        "x25519_private_key": drawn("renewal x25519 key", 32),
        "cloud_secret": drawn("cloud secret", 32),
        "body": drawn("body around a renewal", 20),
    }
    frames = replay.renewal(inputs)
    about = "See README.md. Bytes are hexadecimal. Headers are opaque here."
    return {"about": about, "inputs": inputs, "frames": frames, **found_in_renewal(inputs, frames)}


WAYS = {"edge_to_cloud": Direction.EDGE_TO_CLOUD, "cloud_to_edge": Direction.CLOUD_TO_EDGE}


def found_in_renewal(inputs: dict[str, Any], frames: dict[str, list[bytes]]) -> dict[str, Any]:
    """What the second implementation derives from a renewal, and the records of each direction."""
    shared = {key: inputs[key] for key in ("version", "session_id")}
    case = {**shared, "chunk_bytes": 1 << 20, "fresh": {"secret": inputs["cloud_secret"], "transcript": b""}}

    def opened(way: str, frames: list[bytes]) -> dict[str, Any]:
        own = {"secret": inputs[f"traffic_secret_{way}"], "direction": int(WAYS[way])}
        return reference.open_records({**case, **own}, frames)

    offer, answer = (opened(way, frames[way][:1])["pieces"][0]["plaintext"] for way in WAYS)
    derived = reference.renewal(inputs, offer, answer)
    case["fresh"]["transcript"] = derived["th2"]
    return {"derived": derived, **{way: opened(way, frames[way]) for way in WAYS}}


def main() -> None:
    """Write the files."""
    handshake = make_handshake()
    vectors.write("handshake.json", handshake)
    of_session = handshake["derived"], handshake["inputs"]["verdict"]["session_id"]
    vectors.write("records.json", make_records(*of_session))
    vectors.write("renewal.json", make_renewal(*of_session))


if __name__ == "__main__":
    main()
