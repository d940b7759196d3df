"""Checks: what must be true of a message beyond the form of its single fields, on both sides alike.

`check` names every message, those too of which nothing more must be true: a new one that it does not name is an error
of the type checker.
"""

from __future__ import annotations

import math
import re
from typing import assert_never

from isthmus.common.errors import MessageError
from isthmus.protocol.enrolment import TENANT_NAME
from isthmus.protocol.limits import MAX_WORKERS
from isthmus.protocol.messages import (
    MAX_GROUP,
    MAX_NAME,
    MAX_PIECE,
    MAX_PUT_FILES,
    MAX_SITES,
    Account,
    Attach,
    Backward,
    BackwardReply,
    Blob,
    Fetch,
    FetchList,
    FileEntry,
    FileList,
    Forward,
    ForwardReply,
    Goodbye,
    Lease,
    Message,
    Ping,
    PlugIn,
    Pong,
    Put,
    PutReply,
    SiteAnswer,
    SitePhase,
    SiteQuestion,
    Sites,
    SpanInputs,
    Status,
    Workers,
)
from isthmus.protocol.tensor_codecs import CODECS, Payload, Role, codec_by_id

_PART = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_ADDRESS = re.compile(r"([A-Za-z0-9_.\-]+|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9_.\-]+)?\]):[0-9]{1,5}")
_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,127}")


def check(message: Message) -> None:
    """Check what the fields of a message say together, before it is sent and after it was read.

    Raises:
        MessageError: they do not fit each other, or one is over its limit.
    """
    match message:
        case Forward():
            _check_inputs(message.inputs)
            _check_call(message)
        case ForwardReply():
            _check_hidden(message.hidden, Role.ACTIVATION)
            _check_taps(message)
        case Backward():
            _check_hidden(message.gradient, Role.GRADIENT)
            _check_call(message)
            if message.replay is not None:
                _check_inputs(message.replay)
                if message.replay.hidden.shape != message.gradient.shape:
                    raise MessageError(
                        f"gradient {list(message.gradient.shape)} and hidden states "
                        f"{list(message.replay.hidden.shape)} differ in shape"
                    )
        case BackwardReply():
            if message.gradient is not None:
                _check_hidden(message.gradient, Role.GRADIENT)
            _check_lent_gradients(message)
        case Sites():
            _check_sites(message)
        case Lease():
            _check_lease(message)
        case SiteQuestion():
            _check_question(message)
        case SiteAnswer():
            if len(message.tensors) > MAX_GROUP:
                raise MessageError(f"an answer of {len(message.tensors)} tensors is refused: {MAX_GROUP} are accepted")
            for tensor in message.tensors:
                _check_hidden(tensor, message.tensors[0].role)
        case Fetch() | PutReply():
            _check_name(message.name)
        case Blob() | Put():
            _check_name(message.name)
            if len(message.data) > MAX_PIECE:
                raise MessageError(f"a piece of {len(message.data)} bytes is refused: {MAX_PIECE} are accepted")
            if message.offset + len(message.data) > message.total:
                raise MessageError(f"a piece of {message.name!r} ends behind the file's {message.total} bytes")
        case FileList():
            _check_files(message.entries)
        case PlugIn():
            if not 1 <= len(message.entries) <= MAX_PUT_FILES:
                raise MessageError(
                    f"an adapter of {len(message.entries)} files is refused: 1 to {MAX_PUT_FILES} are accepted"
                )
            _check_files(message.entries)
        case Workers():
            _check_workers(message)
        case Attach():
            if message.account is not None:
                _check_account(message.account)
        case FetchList() | Status() | Ping() | Pong() | Goodbye():
            pass  # their fields alone say it all
        case _:
            assert_never(message)


def _check_call(message: Forward | Backward) -> None:
    if not codec_by_id(message.reply_codec).activation:
        raise MessageError(f"codec id {message.reply_codec} is not one for activations")
    if message.lease and not message.sites:
        raise MessageError(f"a call with lease {message.lease} and no list of sites is refused: a lease is of a list")


def _check_account(account: Account) -> None:
    if not TENANT_NAME.fullmatch(account.tenant) or account.weight < 1:
        raise MessageError(
            f"the account of {account.tenant!r} with weight {account.weight} is refused: a tenant's name and a weight "
            "of 1 or more are needed"
        )


def _check_workers(message: Workers) -> None:
    addresses = message.addresses
    if not 1 <= len(addresses) <= MAX_WORKERS or len(set(addresses)) != len(addresses):
        raise MessageError(
            f"a list of {len(addresses)} workers is refused: 1 to {MAX_WORKERS} different ones are accepted"
        )
    for address in addresses:
        if not _ADDRESS.fullmatch(address):
            raise MessageError(f"the worker's address {address[:MAX_NAME]!r} is refused: host:port is needed")
    if message.go_to and message.go_to not in addresses:
        raise MessageError(f"{message.go_to[:MAX_NAME]!r} is refused: the edge is sent to a worker that is not listed")


def _check_sites(message: Sites) -> None:
    if not 1 <= len(message.entries) <= MAX_SITES or not message.number:
        raise MessageError(
            f"list {message.number} of {len(message.entries)} sites is refused: 1 to {MAX_SITES} sites and a number of "
            "1 or more are accepted"
        )
    for entry in message.entries:
        if entry.part and not _PART.fullmatch(entry.part):
            raise MessageError(f"site {entry.part[:MAX_NAME]!r} is refused: a dotted name of a module is needed")


def _check_lease(message: Lease) -> None:
    if message.number < 1 or message.sites < 1 or not 1 <= len(message.weights) <= MAX_SITES:
        raise MessageError(
            f"lease {message.number} of {len(message.weights)} weights for list {message.sites} is refused: 1 to "
            f"{MAX_SITES} weights and numbers of 1 or more are accepted"
        )
    for lent in message.weights:
        _check_pair(lent.down, lent.up, Role.ACTIVATION)
        if not math.isfinite(lent.scale):
            raise MessageError(f"lent matrices with the scale {lent.scale} are refused: a finite one is needed")


def _check_lent_gradients(message: BackwardReply) -> None:
    lent = message.lent
    if len(lent) > 2 * MAX_SITES or len(lent) % 2:
        raise MessageError(
            f"{len(lent)} gradients of lent matrices are refused: two for each of at most {MAX_SITES} sites are "
            "accepted"
        )
    for down, up in zip(lent[::2], lent[1::2], strict=True):
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


def _check_taps(message: ForwardReply) -> None:
    if len(message.taps) > MAX_SITES:
        raise MessageError(f"an answer with {len(message.taps)} taps is refused: {MAX_SITES} are accepted")
    for tap in message.taps:
        _check_hidden(tap, Role.ACTIVATION)
        if tap.shape[:2] != message.hidden.shape[:2]:
            raise MessageError(
                f"a tap of shape {list(tap.shape)} does not fit hidden states of shape {list(message.hidden.shape)}"
            )


def _check_question(message: SiteQuestion) -> None:
    if not 1 <= len(message.sites) <= MAX_GROUP or len(set(message.sites)) != len(message.sites):
        raise MessageError(f"a question about {len(message.sites)} sites is refused: 1 to {MAX_GROUP} different ones")
    backward = message.phase in (SitePhase.BACKWARD, SitePhase.BACKWARD_ONLY)
    most = 0 if message.phase == SitePhase.AGAIN else len(message.sites)
    # Sites that share their input share its tensor on the way forward.
    least = {SitePhase.FORWARD: 1}.get(message.phase, most)
    if not least <= len(message.tensors) <= most:
        raise MessageError(
            f"a question of phase {message.phase.name} about {len(message.sites)} sites has {len(message.tensors)} "
            "tensors, which do not fit it"
        )
    for tensor in message.tensors:
        _check_hidden(tensor, Role.GRADIENT if backward else Role.ACTIVATION)


def _check_files(entries: tuple[FileEntry, ...]) -> None:
    names = [entry.name for entry in entries]
    for name in names:
        _check_name(name)
    if len(set(names)) != len(names):
        raise MessageError("a list of files names one file twice")


def _check_name(name: str) -> None:
    # No separators, no leading dot, and therefore no "..": a name is safe to join to a folder.
    if not _NAME.fullmatch(name):
        raise MessageError(
            f"file name {name[:MAX_NAME]!r} is refused: 1 to {MAX_NAME} of letters, digits, '_', '-', '.' are accepted"
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


def _check_inputs(inputs: SpanInputs) -> None:
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
