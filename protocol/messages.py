"""Messages: what the two sides of a session say to each other.

Theory of operation
    op  message       from   body                                     answered by
     1  Forward       edge   hidden, mask, positions                  ForwardReply or Status
     2  ForwardReply  cloud  hidden
     3  Backward      edge   gradient, then hidden, mask, positions   BackwardReply or Status
     4  BackwardReply cloud  gradient
     5  Fetch         edge   -                                        Blob or Status
     6  Blob          cloud  bytes of a file
     7  FetchList     edge   -                                        FileList or Status
     8  FileList      cloud  -
     9  Status        cloud  -
    10  Ping          edge   -                                        Pong
    11  Pong          cloud  -
    12  Goodbye       both   -
    13  Attach        edge   -                                        Status or Workers
    14  Put           edge   bytes of a file                          PutReply or Status
    15  PutReply      cloud  -
    16  PlugIn        edge   -                                        Status
    17  Sites         edge   -                                        Status
    18  SiteQuestion  cloud  tensors                                  SiteAnswer
    19  SiteAnswer    edge   tensors                                  as the call that it goes on with, or SiteQuestion
    20  Lease         edge   matrices                                 Status
    21  Workers       cloud  -

    Files lie on shelves. An edge reads those of a shelf piece by piece (FetchList, then Fetch until it has all), and
    brings an adapter the same way (Put until the cloud holds all, then PlugIn with the list of its files). Both go on
    where they were interrupted.

    An edge may have adapters at sites inside the span. It says once in a session where they are (Sites), and names
    that list in its calls. Such a call may pause: instead of its reply the cloud sends a SiteQuestion, and goes on when
    it has the SiteAnswer. Whatever an adapter's placement, a pause has this one form. What is lent goes before the call
    (Lease), and its gradients come with the BackwardReply; what is tapped comes with the ForwardReply.

    A cloud of several workers answers Attach with their addresses (Workers), and may send the edge to one of them. The
    edge's pin stays the same, so that can only be a worker of the same root key.

    A call is named by (step, call, attempt). `call` grows with every new call of an edge and stays the same when the
    call is repeated with a higher `attempt`. How messages become bytes is told in `isthmus.protocol.encoding`.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from isthmus.common.errors import MessageError
from isthmus.protocol.limits import Buffer
from isthmus.protocol.site_messages import (
    MAX_GROUP as MAX_GROUP,
    MAX_LISTS as MAX_LISTS,
    MAX_SITES as MAX_SITES,
    CallId as CallId,
    Lease as Lease,
    LentWeights as LentWeights,
    SiteAnswer as SiteAnswer,
    SitePhase as SitePhase,
    SiteQuestion as SiteQuestion,
    Sites as Sites,
)
from isthmus.protocol.tensor_codecs import Payload

MAX_NAME = 128
MAX_TEXT = 1024
MAX_PIECE = 8 << 20
"""Most bytes of a file in one message."""
MAX_PUT_FILES = 8
"""Most files of an adapter."""
LINK_BYTES = 16
DIGEST_BYTES = 32


class StatusCode(enum.IntEnum):
    """Why a call or a session was not served (or, in the handshake's last message, that it was)."""

    OK = 0
    DRAINING = 1
    """The worker finishes its calls and takes no new session: connect again."""
    STASH_LOST = 2
    """The forward state of a backward call is gone: send the call again with its replay inputs."""
    BAD_REQUEST = 3
    OVER_QUOTA = 4
    NON_FINITE = 5
    """What the call brought, or the span's output or gradient, has NaN or infinite values."""
    INTERNAL = 7
    NOT_ENROLLED = 8
    TOO_LATE = 9
    """The call could not be computed within the session's deadline, and was not begun."""


@dataclass(frozen=True, slots=True)
class SpanInputs:
    """The span's inputs: hidden states `[B, S, h]`, mask `[B, S]` or None, position ids `[B or 1, S]` or None."""

    hidden: Payload
    attention_mask: Payload | None = None
    position_ids: Payload | None = None


@dataclass(frozen=True, slots=True)
class Forward:
    """Run the span forward. `keep`: a backward call follows, so the forward state is stashed. `reply_codec`: an id.

    `sites`: the number of the list of sites that the call visits; 0 for none. `wanted`: whether the backward will want
    the gradient of the span's input. `lease`: the number of what is lent for it; 0 for nothing.
    """

    op: ClassVar[int] = 1
    id: CallId
    keep: bool
    hidden: Payload
    attention_mask: Payload | None
    position_ids: Payload | None
    reply_codec: int
    sites: int = 0
    wanted: bool = True
    lease: int = 0

    @property
    def inputs(self) -> SpanInputs:
        """The three inputs of the span together."""
        return SpanInputs(self.hidden, self.attention_mask, self.position_ids)


@dataclass(frozen=True, slots=True)
class ForwardReply:
    """The span's output `[B, S, h]`, and where the cloud's time went (nanoseconds).

    `taps`: what has come out of the taps of its list, in their order.
    """

    op: ClassVar[int] = 2
    id: CallId
    hidden: Payload
    compute_ns: int
    crypto_ns: int
    queue_ns: int
    taps: tuple[Payload, ...] = ()


@dataclass(frozen=True, slots=True)
class Backward:
    """Run the span backward. `id` is that of its forward call (with its own attempt).

    `gradient` is that of the span's output, `[B, S, h]`. `replay` carries the forward's inputs again, after the stash
    was lost. `sites`, `wanted` and `lease` as in the forward.
    """

    op: ClassVar[int] = 3
    id: CallId
    gradient: Payload
    replay: SpanInputs | None
    reply_codec: int
    sites: int = 0
    wanted: bool = True
    lease: int = 0


@dataclass(frozen=True, slots=True)
class BackwardReply:
    """The gradient of the span's input `[B, S, h]`, None unless it was wanted.

    `recomputed`: the forward was run again, as the stash was gone. `lent`: the gradients of what was lent, A and B of
    each site in turn.
    """

    op: ClassVar[int] = 4
    id: CallId
    gradient: Payload | None
    compute_ns: int
    crypto_ns: int
    queue_ns: int
    recomputed: bool
    lent: tuple[Payload, ...] = ()


class Shelf(enum.IntEnum):
    """What an edge may fetch the files of."""

    PARTS = 1
    """The edge's parts of the model."""
    EMULATOR = 2
    """The package with an emulator of the middle layers, if the cloud offers one."""
    ADAPTER = 3
    """The adapter that this edge's own tenant has plugged in, if it has."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask for a file of a shelf, from `offset` on."""

    op: ClassVar[int] = 5
    shelf: Shelf
    name: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Blob:
    """A piece of a file: `data` stands at `offset` of `total` bytes; `sha256` is that of the whole file."""

    op: ClassVar[int] = 6
    name: str
    offset: int
    total: int
    sha256: bytes
    data: Buffer = field(repr=False)


@dataclass(frozen=True, slots=True)
class FetchList:
    """Ask which files are on a shelf."""

    op: ClassVar[int] = 7
    shelf: Shelf


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: its name, its size in bytes, and the SHA-256 of its contents."""

    name: str
    size: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class FileList:
    """The files of a shelf."""

    op: ClassVar[int] = 8
    entries: tuple[FileEntry, ...]


@dataclass(frozen=True, slots=True)
class Status:
    """The cloud's answer without a result: `id` names the call, None means the session. `message` is for people."""

    op: ClassVar[int] = 9
    code: StatusCode
    id: CallId | None
    message: str

    @classmethod
    def saying(cls, code: StatusCode, id: CallId | None, text: str) -> Status:
        """A status whose text is cut to what a message carries, `MAX_TEXT` bytes of UTF-8."""
        return cls(code, id, text.encode(errors="replace")[:MAX_TEXT].decode(errors="ignore"))


@dataclass(frozen=True, slots=True)
class Ping:
    """Ask for a sign of life."""

    op: ClassVar[int] = 10
    nonce: int


@dataclass(frozen=True, slots=True)
class Pong:
    """The sign of life, with the ping's number.

    `peak_bytes`: the cloud's estimate of what the largest call of this session so far takes while it is computed; 0
    before the first. It says nothing of other tenants.
    """

    op: ClassVar[int] = 11
    nonce: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Goodbye:
    """This side ends the session on purpose. A stream that ends without it was cut."""

    op: ClassVar[int] = 12
    reason: str


@dataclass(frozen=True, slots=True)
class Account:
    """Whose work a pipeline's stage passes on: the edge's tenant, and its weight against the others', 1 or more."""

    tenant: str
    weight: int


@dataclass(frozen=True, slots=True)
class Attach:
    """The edge's first message: which of its links this is (16 random bytes, the same after every reconnect).

    The cloud ends an older session of the same edge and link, and counts the session against the tenant's quota.
    `interactive`: whether somebody waits for the session's calls, which then come before training. `deadline_ms`:
    within how many milliseconds a call without sites has to be computed, or else not to be begun; 0 for no deadline.
    `settled`: the edge was sent here, or cannot reach where it was sent, and is not to be sent elsewhere. `account`:
    the tenant that a pipeline's stage attaches for; nobody but a stage may name one.
    """

    op: ClassVar[int] = 13
    link: bytes
    interactive: bool = False
    deadline_ms: int = 0
    settled: bool = False
    account: Account | None = None


@dataclass(frozen=True, slots=True)
class Workers:
    """The workers of this cloud, `host:port` each, any of which may take the edge's sessions.

    `go_to`: the one to go to instead, as it has fewer sessions; the session ends. Empty where the edge is
    attached here.
    """

    op: ClassVar[int] = 21
    addresses: tuple[str, ...]
    go_to: str = ""


@dataclass(frozen=True, slots=True)
class Put:
    """A piece of a file of an adapter: `data` stands at `offset` of `total` bytes; `sha256` is the whole file's.

    Without data it asks how much of the file the cloud holds.
    """

    op: ClassVar[int] = 14
    name: str
    offset: int
    total: int
    sha256: bytes
    data: Buffer = field(repr=False)


@dataclass(frozen=True, slots=True)
class PutReply:
    """How many bytes of a file the cloud holds now, from its beginning on: the next piece stands there."""

    op: ClassVar[int] = 15
    name: str
    sha256: bytes
    held: int


@dataclass(frozen=True, slots=True)
class PlugIn:
    """Plug in the adapter that these files are, which the cloud holds whole. It takes the place of an older one."""

    op: ClassVar[int] = 16
    entries: tuple[FileEntry, ...]


Message = (
    Forward
    | ForwardReply
    | Backward
    | BackwardReply
    | Fetch
    | Blob
    | FetchList
    | FileList
    | Status
    | Ping
    | Pong
    | Goodbye
    | Attach
    | Put
    | PutReply
    | PlugIn
    | Sites
    | SiteQuestion
    | SiteAnswer
    | Lease
    | Workers
)

Timed = ForwardReply | BackwardReply | SiteQuestion
"""What tells where the cloud's time went."""

EDGE_SENDS: tuple[type[Message], ...] = (
    Forward,
    Backward,
    Fetch,
    FetchList,
    Ping,
    Goodbye,
    Attach,
    Put,
    PlugIn,
    Sites,
    SiteAnswer,
    Lease,
)
CLOUD_SENDS: tuple[type[Message], ...] = (
    ForwardReply,
    BackwardReply,
    Blob,
    FileList,
    Status,
    Pong,
    Goodbye,
    PutReply,
    SiteQuestion,
    Workers,
)


MAX_INFO = 16 * 1024
MAX_INFO_TEXT = 256
_PATTERNS = {
    "session_id": re.compile(r"[0-9a-f]{32}"),
    "digest": re.compile(r"[0-9a-f]{64}"),
    "plan": re.compile(r"[0-9]{1,6}:[0-9]{1,6}"),
}


@dataclass(frozen=True, slots=True)
class SpanLimits:
    """What the cloud accepts of one tenant."""

    max_tokens_per_call: int
    max_message_bytes: int
    stash_bytes: int


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What the cloud tells an edge in the handshake's last message.

    Attributes:
        session_id: 16 random bytes in hexadecimal.
        model: the name that the cloud serves the backbone under.
        digest: SHA-256 of the backbone's checkpoint, in hexadecimal.
        family: the architecture, as in `isthmus.backbone.families`.
        n_layers: decoder layers of the whole model.
        plan: the split plan, for example "2:2".
        hidden_size: width of the hidden states.
        attn_implementation: the attention implementation that both sides use.
        span_dtype: the dtype that the span computes in, "fp32" or "bf16", and how its weights are held where they are
            quantized, as in "bf16+nf4".
        codecs: names of the codecs that the cloud accepts and sends.
        limits: what the cloud accepts of this edge.
        server_version: the cloud's version of Isthmus.
    """

    session_id: str
    model: str
    digest: str
    family: str
    n_layers: int
    plan: str
    hidden_size: int
    attn_implementation: str
    span_dtype: str
    codecs: tuple[str, ...]
    limits: SpanLimits
    server_version: str

    def to_json(self) -> bytes:
        """Write the information as UTF-8 JSON."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, raw: Buffer) -> SessionInfo:
        """Read the information, strictly: no key may be missing, unknown, of another type, or malformed.

        Digest, plan and session id name files and sessions on the edge, so nothing but digits gets through.

        Raises:
            MessageError: it is malformed.
        """
        if len(raw) > MAX_INFO:
            raise MessageError(f"session information of {len(raw)} bytes is refused: {MAX_INFO} are accepted")
        try:
            data = json.loads(bytes(raw).decode())
        except (ValueError, RecursionError) as error:
            raise MessageError(f"session information is not JSON: {error}") from error
        values = _strict(cls, data)
        for name, pattern in _PATTERNS.items():
            if not pattern.fullmatch(values[name]):
                raise MessageError(f"session information has {name} = {values[name][:80]!r}, which is malformed")
        for text in (*(value for value in values.values() if isinstance(value, str)), *values["codecs"]):
            if len(text) > MAX_INFO_TEXT or not text.isprintable():
                raise MessageError(
                    f"session information has the text {text[:80]!r}: at most {MAX_INFO_TEXT} printable characters "
                    "are accepted"
                )
        limits = SpanLimits(**_strict(SpanLimits, values["limits"]))
        return cls(**{**values, "codecs": tuple(values["codecs"]), "limits": limits})


_JSON_TYPES: dict[str, type] = {"str": str, "int": int, "tuple[str, ...]": list, "SpanLimits": dict}


def _strict(cls: type[SessionInfo] | type[SpanLimits], data: object) -> Mapping[str, Any]:
    """Check that a JSON object has exactly the fields of a class, each of its type."""
    names = {entry.name: _JSON_TYPES[str(entry.type)] for entry in fields(cls)}
    if not isinstance(data, dict) or set(data) != set(names):
        got = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise MessageError(f"session information needs the keys {sorted(names)}, not {got}")
    for name, kind in names.items():
        value = data[name]
        fits = type(value) is kind and not (type(value) is int and value < 0)
        if not fits or (kind is list and not all(type(item) is str for item in value)):
            raise MessageError(
                f"session information has {name} = {str(value)[:80]!r}, which does not fit {kind.__name__}"
            )
    return data
