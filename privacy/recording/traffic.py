"""Traffic: a recording as tensors, which is what attacks take.

A call that came more than once, as an edge repeats what was not answered, is there once: the last time that it was
answered, in the place of the first. Calls are in the order in which they came, of all sessions together; `Traffic.of`
takes those of one session or one tenant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.common.errors import DataError, NonFiniteError, RemoteProtocolError
from isthmus.privacy.recording.file_names import PATTERN
from isthmus.privacy.recording.recording_file import UNLIMITED, Entry, Opened, fault, read_entries
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import Payload, codec_by_id, decode


@dataclass(frozen=True, slots=True, kw_only=True)
class OfSession:
    """What is a session's.

    Attributes:
        session: the session's id, in hexadecimal.
        tenant: the name of its tenant.
    """

    session: str = ""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Forward(OfSession):
    """A forward of the span, as the cloud computed it.

    Attributes:
        call: the call's number.
        step: the optimizer step that it belongs to.
        hidden: `[batch, seq, hidden]`, fp32, decoded.
        mask: `[batch, seq]`, bool; None where there is none.
        positions: `[batch or 1, seq]`, int64; None where there are none.
        codec: the name of the codec of `hidden`.
        output: `[batch, seq, hidden]`, fp32, what the span gave back, as the edge decodes it; None where nothing was
            given back.
        kept: whether a backward was to follow.
        plan: the split plan of an offered package, whose middle was run in the span's place, as `emulator fit` asks for
            it; None for the span. Its hidden states come out of that plan's layers below.
    """

    call: int
    step: int
    hidden: Tensor
    mask: Tensor | None
    positions: Tensor | None
    codec: str
    output: Tensor | None
    kept: bool
    plan: str | None = None


@dataclass(frozen=True, slots=True)
class Backward(OfSession):
    """A backward of the span.

    Attributes:
        call: the number of the forward's call.
        step: its optimizer step.
        gradient: `[batch, seq, hidden]`, fp32: of the loss by the span's output, as the edge sent it.
        codec: the name of the codec of `gradient`.
        returned: `[batch, seq, hidden]`, fp32: the gradient of the span's input; None where none was given back.
    """

    call: int
    step: int
    gradient: Tensor
    codec: str
    returned: Tensor | None


@dataclass(frozen=True, slots=True)
class Decode(OfSession):
    """A decode call: the next tokens of texts that are generated, or a prompt.

    Attributes:
        call: the call's number.
        step: as in a forward.
        cache: the number of the session's cache of keys and values.
        start: positions before this call.
        rows: the cache's rows that go on, in this order; none for all as they are.
        hidden: of the tokens, `[batch, seq, hidden]`, fp32.
        mask: `[batch, start + seq]`, bool; None where there is none.
        positions: `[batch or 1, seq]`, int64; None where there are none.
        codec: the name of the codec of `hidden`.
        output: `[batch, seq, hidden]`, fp32; None where nothing was given back.
    """

    call: int
    step: int
    cache: int
    start: int
    rows: tuple[int, ...]
    hidden: Tensor
    mask: Tensor | None
    positions: Tensor | None
    codec: str
    output: Tensor | None


@dataclass(frozen=True, slots=True)
class Asked(OfSession):
    """What the cloud asked an edge in the middle of a call, at sites that read one input, and the answer.

    Attributes:
        call: the call's number.
        step: its optimizer step.
        phase: what was asked.
        sites: the sites that it was about.
        question: the inputs `[batch, seq, in]`, or the gradients `[batch, seq, out]` of the sites' contributions, fp32.
        answer: the contributions `[batch, seq, out]`, or the gradients `[batch, seq, in]`, fp32.
    """

    call: int
    step: int
    phase: m.SitePhase
    sites: tuple[SiteSpec, ...]
    question: tuple[Tensor, ...]
    answer: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Leased(OfSession):
    """Adapters that an edge sent for the cloud to run.

    Attributes:
        sites: where they act.
        weights: of each of them `down` `[r, in]`, `up` `[out, r]`, both fp32, and the scale of their product.
    """

    sites: tuple[SiteSpec, ...]
    weights: tuple[tuple[Tensor, Tensor, float], ...]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a cloud has of its sessions.

    Attributes:
        model: the digest of the backbone.
        plan: the split plan, bottom:top.
        forwards, backwards, decodes: the calls.
        asked: the pauses of calls with sites.
        leased: the adapters that the cloud runs.
    """

    model: str
    plan: str
    forwards: tuple[Forward, ...] = ()
    backwards: tuple[Backward, ...] = ()
    decodes: tuple[Decode, ...] = ()
    asked: tuple[Asked, ...] = ()
    leased: tuple[Leased, ...] = ()

    @property
    def tenants(self) -> tuple[str, ...]:
        """The names of the tenants, in the order of their first messages with tensors."""
        return tuple(dict.fromkeys(each.tenant for each in self._all()))

    @property
    def sessions(self) -> tuple[str, ...]:
        """The ids of the sessions, in the order of their first messages with tensors."""
        return tuple(dict.fromkeys(each.session for each in self._all()))

    def of(self, *, session: str | None = None, tenant: str | None = None) -> Traffic:
        """The traffic of one session, or of one tenant alone."""

        def mine(entries: tuple[T, ...]) -> tuple[T, ...]:
            return tuple(each for each in entries if session in (None, each.session) and tenant in (None, each.tenant))

        return Traffic(
            self.model,
            self.plan,
            mine(self.forwards),
            mine(self.backwards),
            mine(self.decodes),
            mine(self.asked),
            mine(self.leased),
        )

    def _all(self) -> Iterable[OfSession]:
        return (*self.forwards, *self.backwards, *self.decodes, *self.asked, *self.leased)


T = TypeVar("T", bound=OfSession)
Call = Forward | Backward | Decode


def read_traffic(folder: Path, wanted: Callable[[int], bool] = lambda step: True) -> Traffic:
    """Read a recording, all of whose tensors have to fit into memory, decoded.

    Args:
        folder: what `isthmus cloud serve --record` was given.
        wanted: whether the calls of an optimizer step are read; step 0 is before the first.

    Raises:
        DataError: there is none, it has no session, or several models' or plans', or a file of it is damaged or cut
            off; the message names the file and the offset of the first entry that is not whole.
    """
    files = sorted(folder.glob(PATTERN), key=lambda path: (len(path.name), path.name))  # as they were begun
    if not files:
        raise DataError(f"{folder} has no recording: give the folder of `isthmus cloud serve --record`")
    reader = _Reader(wanted)
    for file in files:
        for entry in read_entries(file):
            reader.take(file, entry)
    return reader.traffic(folder)


@dataclass(slots=True)
class _Session:
    """What is known of a session so far."""

    name: str
    tenant: str
    opened: Opened
    lists: dict[int, tuple[SiteSpec, ...]] = field(default_factory=dict)
    list_of: dict[int, int] = field(default_factory=dict)  # the list of sites of a call, by the call's number
    waiting: dict[m.CallId, Call] = field(default_factory=dict)  # for their answers
    questions: dict[m.CallId, m.SiteQuestion] = field(default_factory=dict)  # that wait for theirs


@dataclass(slots=True)
class _Reader:
    """Puts the entries of a recording together."""

    wanted: Callable[[int], bool]
    sessions: dict[bytes, _Session] = field(default_factory=dict)
    calls: dict[tuple[type[Call], bytes, int], Call] = field(default_factory=dict)  # by link and number
    asked: list[Asked] = field(default_factory=list)
    leased: list[Leased] = field(default_factory=list)

    def take(self, file: Path, entry: Entry) -> None:
        """Take the next entry. Raises DataError where its session was not opened, or a tensor cannot be decoded."""
        if isinstance(entry.content, Opened):
            account, name = entry.content.attach.account, entry.session.hex()
            self.sessions[entry.session] = _Session(name, "" if account is None else account.tenant, entry.content)
            return
        known = self.sessions.get(entry.session)
        if known is None:
            raise fault(file, entry.offset, f"is of session {entry.session.hex()}, which was not opened")
        try:
            self._message(known, entry.content)
        except NonFiniteError:
            pass  # the cloud refuses such numbers, and nobody learns from them
        except RemoteProtocolError as error:
            raise fault(file, entry.offset, f"cannot be decoded: {error}") from error

    def traffic(self, folder: Path) -> Traffic:
        """All that was taken. Raises DataError where it is no session's, or several models'."""
        served = {(each.opened.info.digest, each.opened.info.plan) for each in self.sessions.values()}
        if len(served) != 1:
            what = "no session" if not served else "sessions of several models or split plans"
            raise DataError(f"the recording in {folder} has {what}: record one model's, with an edge at work")
        ((model, plan),) = served
        calls = self.calls.values()
        return Traffic(
            model,
            plan,
            tuple(each for each in calls if isinstance(each, Forward)),
            tuple(each for each in calls if isinstance(each, Backward)),
            tuple(each for each in calls if isinstance(each, Decode)),
            tuple(self.asked),
            tuple(self.leased),
        )

    def _message(self, session: _Session, message: m.Message) -> None:
        whose = {"session": session.name, "tenant": session.tenant}
        match message:
            case m.Sites():
                session.lists[message.number] = message.entries
            case m.Lease():
                weights = tuple((_tensor(each.down), _tensor(each.up), each.scale) for each in message.weights)
                self.leased.append(Leased(session.lists.get(message.sites, ()), weights, **whose))
            case m.Forward() | m.Backward() | m.Decode():
                if not self.wanted(message.id.step):
                    return
                session.list_of[message.id.call] = message.sites
                call = _call(message, whose)
                session.waiting[message.id] = call
                self.calls.setdefault(_key(session, call), call)  # what was answered before stays
            case m.ForwardReply() | m.BackwardReply():
                waited = session.waiting.pop(message.id, None)
                if waited is not None:
                    self.calls[_key(session, waited)] = _answered(waited, message)
            case m.SiteQuestion():
                if self.wanted(message.id.step):
                    session.questions[message.id] = message
            case m.SiteAnswer():
                question = session.questions.pop(message.id, None)
                if question is not None:
                    entries = session.lists.get(session.list_of.get(question.id.call, 0), ())
                    sites = tuple(entries[at] for at in question.sites if at < len(entries))
                    asked, given = (tuple(map(_tensor, each.tensors)) for each in (question, message))
                    named = question.id
                    self.asked.append(Asked(named.call, named.step, question.phase, sites, asked, given, **whose))


def _call(message: m.Forward | m.Backward | m.Decode, whose: dict[str, str]) -> Call:
    """A call that has no answer yet."""
    names: dict[str, Any] = {"call": message.id.call, "step": message.id.step, **whose}
    if isinstance(message, m.Backward):
        gradient = message.gradient
        return Backward(gradient=_tensor(gradient), codec=codec_by_id(gradient.codec).name, returned=None, **names)
    inputs: dict[str, Any] = {
        "hidden": _tensor(message.hidden),
        "mask": None if message.attention_mask is None else _tensor(message.attention_mask).bool(),
        "positions": None if message.position_ids is None else _tensor(message.position_ids),
        "codec": codec_by_id(message.hidden.codec).name,
        "output": None,
    }
    if isinstance(message, m.Forward):
        return Forward(kept=message.keep, plan=message.plan, **inputs, **names)
    return Decode(cache=message.cache, start=message.start, rows=message.rows, **inputs, **names)


def _answered(call: Call, reply: m.ForwardReply | m.BackwardReply) -> Call:
    """A call with what was given back."""
    if isinstance(call, Backward) and isinstance(reply, m.BackwardReply):
        return call if reply.gradient is None else replace(call, returned=_tensor(reply.gradient))
    if isinstance(call, Forward | Decode) and isinstance(reply, m.ForwardReply):
        return replace(call, output=_tensor(reply.hidden))
    return call


def _key(session: _Session, call: Call) -> tuple[type[Call], bytes, int]:
    """What names a call, in the session that it is repeated in as well: a link's calls have one count."""
    return type(call), session.opened.attach.link, call.call


def _tensor(payload: Payload) -> Tensor:
    return decode(payload, limits=UNLIMITED)
