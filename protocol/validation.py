"""Checks: what must be true of a message beyond the types of its fields, on both sides alike.

`check` names every message, those too of which nothing more must be true: a new one that it does not name is an error
of the type checker.
"""

from __future__ import annotations

import math
import re
from typing import assert_never

from isthmus.common.errors import MessageError
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import TENANT_NAME
from isthmus.protocol.limits import MAX_WORKERS
from isthmus.protocol.tensor_codecs import CODECS, Payload, Role, codec_by_id

MAX_RANK = (1 << 16) - 1
"""The largest rank of a site, or width of a tap."""
MAX_INFO_TEXT = 256

_PART = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_ADDRESS = re.compile(r"([A-Za-z0-9_.\-]+|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9_.\-]+)?\]):[0-9]{1,5}")
_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,127}")
_INFO_PATTERNS = {
    "session_id": re.compile(r"[0-9a-f]{32}"),
    "digest": re.compile(r"[0-9a-f]{64}"),
    "plan": re.compile(r"[0-9]{1,6}:[0-9]{1,6}"),
}


def check(message: m.Message) -> None:
    """Check what the fields of a message say together, before it is sent and after it was read.

    Raises:
        MessageError: they do not fit each other, or one is over its limit.
    """
    match message:
        case m.Forward():
            _check_inputs(message.inputs)
            _check_call(message)
        case m.ForwardReply():
            _check_hidden(message.hidden, Role.ACTIVATION)
            _check_taps(message)
        case m.Backward():
            _check_hidden(message.gradient, Role.GRADIENT)
            _check_call(message)
            if message.replay is not None:
                _check_inputs(message.replay)
                if message.replay.hidden.shape != message.gradient.shape:
                    raise MessageError(
                        f"gradient {list(message.gradient.shape)} and hidden states "
                        f"{list(message.replay.hidden.shape)} differ in shape"
                    )
        case m.BackwardReply():
            if message.gradient is not None:
                _check_hidden(message.gradient, Role.GRADIENT)
            _check_leased_gradients(message)
        case m.Sites():
            _check_sites(message)
        case m.Lease():
            _check_lease(message)
        case m.SiteQuestion():
            _check_question(message)
        case m.SiteAnswer():
            if len(message.tensors) > m.MAX_GROUP:
                raise MessageError(
                    f"an answer of {len(message.tensors)} tensors is refused: {m.MAX_GROUP} are accepted"
                )
            for tensor in message.tensors:
                _check_hidden(tensor, message.tensors[0].role)
        case m.Fetch():
            _check_name(message.name)
        case m.PutReply():
            _check_file(message)
        case m.Blob() | m.Put():
            _check_chunk(message)
        case m.FileList():
            _check_files(message.entries)
        case m.PlugIn():
            if not 1 <= len(message.entries) <= m.MAX_PUT_FILES:
                raise MessageError(
                    f"an adapter of {len(message.entries)} files is refused: 1 to {m.MAX_PUT_FILES} are accepted"
                )
            _check_files(message.entries)
        case m.Workers():
            _check_workers(message)
        case m.Attach():
            if len(message.link) != m.LINK_BYTES:
                raise MessageError(f"a link of {len(message.link)} bytes is refused: {m.LINK_BYTES} are needed")
            if message.account is not None:
                _check_account(message.account)
        case m.Status():
            _check_text(message.message, m.MAX_TEXT)
        case m.Goodbye():
            _check_text(message.reason, m.MAX_TEXT)
        case m.FetchList() | m.Ping() | m.Pong():
            pass  # the types of their fields say it all
        case _:
            assert_never(message)


def check_info(info: m.SessionInfo) -> None:
    """Check a session's information. Digest, plan and session id name files and sessions on the edge, so nothing but
    digits gets through.

    Raises:
        MessageError: a text is malformed.
    """
    for name, pattern in _INFO_PATTERNS.items():
        value: str = getattr(info, name)
        if not pattern.fullmatch(value):
            raise MessageError(f"session information has {name} = {value[:80]!r}, which is malformed")
    texts = (info.model, info.family, info.attn_implementation, info.span_dtype, *info.codecs, info.server_version)
    for text in texts:
        if len(text) > MAX_INFO_TEXT or not text.isprintable():
            raise MessageError(
                f"session information has the text {text[:80]!r}: at most {MAX_INFO_TEXT} printable characters are "
                "accepted"
            )


def _check_text(text: str, most: int) -> None:
    if (size := len(text.encode())) > most:
        raise MessageError(f"a text of {size} bytes is refused: {most} are accepted")


def _check_call(message: m.Forward | m.Backward) -> None:
    if not codec_by_id(message.reply_codec).activation:
        raise MessageError(f"codec id {message.reply_codec} is not one for activations")
    if message.lease and not message.sites:
        raise MessageError(f"a call with lease {message.lease} and no list of sites is refused: a lease is of a list")


def _check_account(account: m.Account) -> None:
    if not TENANT_NAME.fullmatch(account.tenant) or account.weight < 1:
        raise MessageError(
            f"the account of {account.tenant!r} with weight {account.weight} is refused: a tenant's name and a weight "
            "of 1 or more are needed"
        )


def _check_workers(message: m.Workers) -> None:
    addresses = message.addresses
    if not 1 <= len(addresses) <= MAX_WORKERS or len(set(addresses)) != len(addresses):
        raise MessageError(
            f"a list of {len(addresses)} workers is refused: 1 to {MAX_WORKERS} different ones are accepted"
        )
    for address in addresses:
        if len(address) > m.MAX_NAME or not _ADDRESS.fullmatch(address):
            raise MessageError(f"the worker's address {address[: m.MAX_NAME]!r} is refused: host:port is needed")
    if message.go_to and message.go_to not in addresses:
        raise MessageError(
            f"{message.go_to[: m.MAX_NAME]!r} is refused: the edge is sent to a worker that is not listed"
        )


def _check_sites(message: m.Sites) -> None:
    if not 1 <= len(message.entries) <= m.MAX_SITES or not message.number:
        raise MessageError(
            f"list {message.number} of {len(message.entries)} sites is refused: 1 to {m.MAX_SITES} sites and a number "
            "of 1 or more are accepted"
        )
    for entry in message.entries:
        if entry.part and (len(entry.part) > m.MAX_NAME or not _PART.fullmatch(entry.part)):
            raise MessageError(f"site {entry.part[: m.MAX_NAME]!r} is refused: a dotted name of a module is needed")
        if entry.rank > MAX_RANK:
            raise MessageError(f"site {entry} of rank {entry.rank} is refused: {MAX_RANK} is accepted")


def _check_lease(message: m.Lease) -> None:
    if message.number < 1 or message.sites < 1 or not 1 <= len(message.weights) <= m.MAX_SITES:
        raise MessageError(
            f"lease {message.number} of {len(message.weights)} weights for list {message.sites} is refused: 1 to "
            f"{m.MAX_SITES} weights and numbers of 1 or more are accepted"
        )
    for each in message.weights:
        _check_pair(each.down, each.up, Role.ACTIVATION)
        if not math.isfinite(each.scale):
            raise MessageError(f"leased matrices with the scale {each.scale} are refused: a finite one is needed")


def _check_leased_gradients(message: m.BackwardReply) -> None:
    leased = message.leased
    if len(leased) > 2 * m.MAX_SITES or len(leased) % 2:
        raise MessageError(
            f"{len(leased)} gradients of leased matrices are refused: two for each of at most {m.MAX_SITES} sites are "
            "accepted"
        )
    for down, up in zip(leased[::2], leased[1::2], strict=True):
        _check_pair(down, up, Role.GRADIENT)


def _check_pair(down: Payload, up: Payload, role: Role) -> None:
    """Check the two matrices of a LoRA, or their gradients: `[r, in]` and `[out, r]`."""
    fits = len(down.shape) == len(up.shape) == 2 and up.shape[1] == down.shape[0]
    if not fits or not all(each.role == role and each.codec == CODECS["fp32"].id for each in (down, up)):
        raise MessageError(
            f"matrices of shapes {list(down.shape)} and {list(up.shape)}, roles {down.role.name} and {up.role.name}, "
            f"codec ids {down.codec} and {up.codec} are refused: [r, in] and [out, r] of role {role.name} in fp32 are "
            "needed"
        )


def _check_taps(message: m.ForwardReply) -> None:
    if len(message.taps) > m.MAX_SITES:
        raise MessageError(f"an answer with {len(message.taps)} taps is refused: {m.MAX_SITES} are accepted")
    for tap in message.taps:
        _check_hidden(tap, Role.ACTIVATION)
        if tap.shape[:2] != message.hidden.shape[:2]:
            raise MessageError(
                f"a tap of shape {list(tap.shape)} does not fit hidden states of shape {list(message.hidden.shape)}"
            )


def _check_question(message: m.SiteQuestion) -> None:
    if not 1 <= len(message.sites) <= m.MAX_GROUP or len(set(message.sites)) != len(message.sites):
        raise MessageError(f"a question about {len(message.sites)} sites is refused: 1 to {m.MAX_GROUP} different ones")
    if max(message.sites) >= m.MAX_SITES:
        raise MessageError(f"a question about site {max(message.sites)} is refused: a list has {m.MAX_SITES} at most")
    backward = message.phase in (m.SitePhase.BACKWARD, m.SitePhase.BACKWARD_ONLY)
    most = 0 if message.phase == m.SitePhase.AGAIN else len(message.sites)
    # Sites that share their input share its tensor on the way forward.
    least = {m.SitePhase.FORWARD: 1}.get(message.phase, most)
    if not least <= len(message.tensors) <= most:
        raise MessageError(
            f"a question of phase {message.phase.name} about {len(message.sites)} sites has {len(message.tensors)} "
            "tensors, which do not fit it"
        )
    for tensor in message.tensors:
        _check_hidden(tensor, Role.GRADIENT if backward else Role.ACTIVATION)


def _check_files(entries: tuple[m.FileEntry, ...]) -> None:
    for entry in entries:
        _check_file(entry)
    if len({entry.name for entry in entries}) != len(entries):
        raise MessageError("a list of files names one file twice")


def _check_chunk(message: m.Blob | m.Put) -> None:
    _check_file(message)
    if len(message.data) > m.MAX_FILE_CHUNK:
        raise MessageError(f"a chunk of {len(message.data)} bytes is refused: {m.MAX_FILE_CHUNK} are accepted")
    if message.offset + len(message.data) > message.total:
        raise MessageError(f"a chunk of {message.name!r} ends behind the file's {message.total} bytes")


def _check_file(file: m.FileEntry | m.Blob | m.Put | m.PutReply) -> None:
    _check_name(file.name)
    if len(file.sha256) != m.DIGEST_BYTES:
        raise MessageError(
            f"the SHA-256 of {file.name!r} with {len(file.sha256)} bytes is refused: {m.DIGEST_BYTES} are needed"
        )


def _check_name(name: str) -> None:
    # No separators, no leading dot, and therefore no "..": a name is safe to join to a folder.
    if not _NAME.fullmatch(name):
        raise MessageError(
            f"file name {name[: m.MAX_NAME]!r} is refused: 1 to {m.MAX_NAME} of letters, digits, '_', '-' and '.' are "
            "accepted"
        )


def _check_hidden(payload: Payload, role: Role) -> None:
    if (
        len(payload.shape) != 3
        or payload.role != role
        or role == Role.INDEX
        or not codec_by_id(payload.codec).activation
    ):
        raise MessageError(
            f"a tensor of shape {list(payload.shape)}, role {payload.role.name}, codec id {payload.codec} is refused: "
            f"[batch, length, hidden] of role {role.name} is needed"
        )


def _check_inputs(inputs: m.SpanInputs) -> None:
    _check_hidden(inputs.hidden, Role.ACTIVATION)
    batch, length, _ = inputs.hidden.shape
    for name, payload, codec, batches in (
        ("attention mask", inputs.attention_mask, CODECS["mask"].id, (batch,)),
        ("position ids", inputs.position_ids, CODECS["int32"].id, (1, batch)),
    ):
        if payload is None:
            continue
        fits = len(payload.shape) == 2 and payload.shape[0] in batches and payload.shape[1] == length
        if not fits or payload.codec != codec or payload.role != Role.INDEX:
            raise MessageError(
                f"{name} of shape {list(payload.shape)}, codec id {payload.codec} do not fit hidden states of shape "
                f"{list(inputs.hidden.shape)}"
            )
