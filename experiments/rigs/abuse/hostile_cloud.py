"""A cloud that attacks the edges that have pinned it: a server on threads of this process, without a model.

It keeps to the protocol, and answers honestly but for what a trick says. Without one it offers its files, and cannot
compute.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc
import torch

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.cloud.session.file_store import FileStore
from isthmus.common.errors import RemoteProtocolError
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import ConnectionString, Tenant
from isthmus.protocol.limits import GIB, MIB
from isthmus.protocol.secure.keys import Fingerprint, load_worker
from isthmus.protocol.service import SERVER_CODING, SERVICE, stream_options
from isthmus.protocol.session import CloudSession, Received
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS, Role, encode

ANSWER_BYTES: Final = 256 * MIB
"""Of an answer that is far larger than asked for: the cloud says in the handshake that its messages may be so large."""
TEMPLATE: Final = "chat_template.jinja"
LOOP: Final = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LIST: Final = (
    "{% set ns = namespace(t=[]) %}{% for i in range(99999) %}{% set ns.t = ns.t + ['a' * 65536 ~ i] %}{% endfor %}"
)
"""It grows by 64 KiB at a time, slowly enough for the growth to be seen."""

Trick = Callable[["HostileCloud", m.Message, m.Forward | None], m.Message | None]
"""What the cloud answers to a message, after the last forward call of the session; None for the honest answer."""


def _large_answer(cloud: HostileCloud, message: m.Message, _last: m.Forward | None) -> m.Message | None:
    """Hidden states of `ANSWER_BYTES`."""
    if not isinstance(message, m.Forward):
        return None
    rows = torch.zeros(1, ANSWER_BYTES // 4 // cloud.info.hidden_size, cloud.info.hidden_size)
    return m.ForwardReply(message.id, encode(rows, "fp32", Role.ACTIVATION), 0, 0, 0)


def _endless_questions(cloud: HostileCloud, message: m.Message, last: m.Forward | None) -> m.Message | None:
    """The question at the first site, again after each answer."""
    call = message if isinstance(message, m.Forward) else last
    if call is None or not isinstance(message, m.Forward | m.SiteAnswer):
        return None
    payload = encode(torch.zeros(*call.hidden.shape), "fp32", Role.ACTIVATION)
    return m.SiteQuestion(call.id, m.SitePhase.FORWARD, (0,), (payload,), 0, 0, 0)


def _listed(name: str, size: int) -> Trick:
    """A list of files in which one has another size."""

    def trick(cloud: HostileCloud, message: m.Message, last: m.Forward | None) -> m.Message | None:
        return cloud.listing(m.FileEntry(name, size, bytes(32))) if isinstance(message, m.FetchList) else None

    return trick


def _template(text: str) -> Trick:
    """A chat template."""
    raw = text.encode()
    digest = hashlib.sha256(raw).digest()

    def trick(cloud: HostileCloud, message: m.Message, last: m.Forward | None) -> m.Message | None:
        if isinstance(message, m.FetchList):
            return cloud.listing(m.FileEntry(TEMPLATE, len(raw), digest))
        if isinstance(message, m.Fetch) and message.name == TEMPLATE:
            return m.Blob(TEMPLATE, message.offset, len(raw), digest, raw[message.offset :])
        return None

    return trick


TRICKS: Final[dict[str, Trick]] = {
    "large_answer": _large_answer,
    "endless_questions": _endless_questions,
    "large_file": _listed("config.json", 1 << 40),
    "many_bytes": _listed("edge.safetensors", 1 << 50),
    "endless_template": _template(LOOP),
    "exploding_template": _template(LIST),
}


class HostileCloud:
    """The server, on the loopback; a context manager.

    Args:
        home: Folder with the worker's key and its certificate.
        parts: Folder of an edge's parts, as `isthmus.cloud.control.worker_setup.make_parts` writes it.

    Attributes:
        trick: What it does instead of answering honestly: a name of `TRICKS`, or the empty string.
    """

    def __init__(self, home: Path, parts: Path, plan: str) -> None:
        checkpoint = Checkpoint(parts, "model")
        config = checkpoint.config
        self.trick = ""
        self.connection = ""
        self.info = m.SessionInfo(
            session_id="",
            model="model",
            digest=hashlib.sha256(b"a model that nobody has").hexdigest(),
            family=config.model_type,
            n_layers=config.num_hidden_layers,
            plan=str(SplitPlan.parse(plan, config.num_hidden_layers)),
            hidden_size=config.hidden_size,
            attn_implementation=family_of(config).attention(None),
            span_dtype="fp32",
            codecs=ACTIVATION_CODECS,
            limits=m.SpanLimits(1 << 20, 4 * GIB, GIB),
            server_version="0",
            numerics="none",
        )
        self._files = FileStore(parts, m.FileSet.PARTS)
        self._identity = load_worker(home, time.time)
        self._server = grpc.server(ThreadPoolExecutor(8), options=stream_options(MIB))
        handler = grpc.stream_stream_rpc_method_handler(self._session, **SERVER_CODING)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Session": handler}),))

    def listing(self, other: m.FileEntry) -> m.FileList:
        """Its files, one of them replaced or added."""
        honest = self._files.listing().entries
        return m.FileList((*(entry for entry in honest if entry.name != other.name), other))

    def __enter__(self) -> HostileCloud:
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        self.connection = str(ConnectionString("127.0.0.1", port, self._identity.pin))
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def _session(self, frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        context.send_initial_metadata(())  # the edge waits for it
        session = CloudSession(
            identity=self._identity,
            authorize=lambda key: Tenant("edge", Fingerprint.of(key)),
            info=lambda _, session_id: dataclasses.replace(self.info, session_id=session_id.hex()),
        )
        last: m.Forward | None = None
        with contextlib.suppress(RemoteProtocolError, grpc.RpcError):  # an edge that has gone
            for frame in frames:
                event = session.receive(frame)
                yield from event.frames
                if not isinstance(event, Received):
                    continue
                if isinstance(event.message, m.Forward):
                    last = event.message
                answer = self._answer(event.message, last)
                if answer is None:
                    return
                yield from session.send(answer)

    def _answer(self, message: m.Message, last: m.Forward | None) -> m.Message | None:
        """None for the end of the session."""
        trick = TRICKS.get(self.trick)
        answer = None if trick is None else trick(self, message, last)
        if answer is not None:
            return answer
        match message:
            case m.Attach() | m.Sites():
                return m.Status(m.StatusCode.OK, None, "")
            case m.FetchList():
                return self._files.listing()
            case m.Fetch():
                return self._files.read(message.name, message.offset)
            case m.Goodbye():
                return None
            case _:
                return m.Status(m.StatusCode.BAD_REQUEST, None, "this cloud computes nothing")
