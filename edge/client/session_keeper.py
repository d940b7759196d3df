"""One session after another with a cloud, and questions that are asked again until there is an answer.

A broken stream, a draining worker, a frame that was changed on its way: each ends one session. The next one has new
keys, and the same question goes out with a higher attempt. It also goes out again, a few times, where the cloud says
that it failed. What cannot be helped by asking again (a refusal, another model behind the same address, a server that
is not the pinned one) is raised; for the first session, once each place of the connection string was tried.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.common.errors import (
    CheckpointError,
    CloudFailedError,
    ConfigError,
    ConnectionLostError,
    FingerprintError,
    IsthmusError,
    LocalProtocolError,
    RefusedError,
    RemoteProtocolError,
    UnreachableError,
    VersionError,
)
from isthmus.edge.client.endpoints import Endpoints
from isthmus.edge.client.questions import Asked, Attempt, Question, in_session, refusal
from isthmus.edge.witness.session_witness import Witness
from isthmus.protocol import messages as m
from isthmus.protocol.limits import DEFAULT_LIMITS, Limits
from isthmus.protocol.secure.keys import Fingerprint
from isthmus.rpc.secure_stream import Observer, RedirectedError, SecureStream, Traffic
from isthmus.rpc.transport import CHECK_SECONDS, Check, pauses, run

LONGEST_PAUSE = 5.0
"""Seconds between two attempts to reach the cloud."""
SIGN_SECONDS = 10.0
"""For the last signature of a session, which it can do without."""
PROTOCOL_FAULTS = 5
"""In a row: bad luck ends, an attacker or a defect does not."""
MAX_DEADLINE = 86_400
"""Seconds."""
LATE = 2.0
"""Seconds without an answer, after which a wait is told: a connection that breaks is often mended before."""

R = TypeVar("R", bound=m.Message)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How long an edge waits, and what it says of its calls.

    Attributes:
        name: the cloud's name in messages.
        give_up_after: seconds that the cloud may stay away.
        call_timeout: seconds that one call may take.
        interactive: whether somebody waits for the calls, which the cloud then computes before those of training.
        deadline: seconds within which a call has to begin in the cloud, or else is refused; None for no deadline.
        limits: what a session accepts, and when it changes and renews its keys.

    Raises:
        ConfigError: The deadline is no length of time.
    """

    name: str
    give_up_after: float = 600.0
    call_timeout: float = 600.0
    interactive: bool = False
    deadline: float | None = None
    limits: Limits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        if self.deadline is not None and not 0 < self.deadline <= MAX_DEADLINE:
            raise ConfigError(
                f"a deadline of {self.deadline} s does not make sense: give more than 0 and at most {MAX_DEADLINE}"
            )


@dataclass(frozen=True, slots=True)
class Wait:
    """A cloud that does not answer, and how long it is waited for. Times are seconds since 1970.

    Attributes:
        since: When it failed first.
        until: When the wait is given up.
        reason: How it failed last, in a line.
    """

    since: float
    until: float
    reason: str


class SessionKeeper:
    """Keeps a session with a cloud. Threads that ask at a time wait for each other.

    It is *new* until a first session stands, then *open* or *broken*, which the next question mends, and at last
    *closed*.

    Args:
        endpoints: where the cloud's workers are.
        pin: fingerprint of the cloud's root key.
        key: the edge's key.
        options: see there.
        accept: called with what the cloud says of each new session; what it raises ends the session.

    Attributes:
        traffic: what has crossed so far.
        observer: called at each phase of each question, see `isthmus.rpc.secure_stream.Observer`; may be replaced.
        check: called a few times a second during a wait; what it raises ends the wait. May be replaced.
        witness: notes what crosses; None for nobody.
        wait: for a cloud that does not answer; None once there is a session again. It may be read by any thread.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        pin: Fingerprint,
        key: Ed25519PrivateKey,
        options: SessionOptions,
        accept: Callable[[m.SessionInfo], None] = lambda info: None,
    ) -> None:
        self.traffic = Traffic()
        self.observer: Observer = lambda question, phase: None
        self.check: Check = lambda: None
        self.witness: Witness | None = None
        self.wait: Wait | None = None
        self._endpoints = endpoints
        self._pin = pin
        self._key = key
        self._options = options
        self._accept = accept
        self._link_id = os.urandom(m.LINK_BYTES)
        self._info: m.SessionInfo | None = None
        self._stream: SecureStream | None = None
        self._closed = False
        self._lock = threading.RLock()
        self._jitter = random.Random()  # noqa: S311 - spreads reconnects, is no secret

    @property
    def info(self) -> m.SessionInfo:
        """What the cloud serves: the model's name and digest, the plan, limits."""
        if self._info is None:
            raise UnreachableError(f"the link to {self._options.name} has never been open: call open()")
        return self._info

    def open(self, timeout: float) -> None:
        """Open the first session, within `timeout` seconds, with whichever place of the connection string gives one.

        Raises:
            FingerprintError, RefusedError, VersionError, RemoteProtocolError: what a place said, the first that said
                anything, where none gave a session.
            NotEnrolledError: a place said so. The others have the same list, and are not asked.
            UnreachableError: nobody answered.
        """
        with self._lock:
            self._repeated(lambda attempt: self._session(), timeout, since=time.monotonic())

    def close(self) -> None:
        """Say goodbye and close."""
        with self._lock:
            self._closed = True
            try:
                self.sign()
            finally:
                run(self._end(SecureStream.close))
                run(self._endpoints.close())

    def sign(self) -> None:
        """Have the cloud sign what it has not yet signed of the session; it stays unsigned where the session is gone.

        Raises:
            TranscriptError: the cloud signs another transcript, or none.
        """
        with self._lock:
            stream = self._stream
            if self.witness is None or stream is None:
                return
            try:
                # Without `check`: an interrupted run is ended by what it says about going on, not by this.
                self.witness.sign(lambda said: in_session(run(stream.ask(said, SIGN_SECONDS, 0)).message))
            except (ConnectionLostError, RemoteProtocolError, RefusedError, FingerprintError):
                self.drop()

    def be_witnessed(self, witness: Witness) -> None:
        """Have what crosses noted by a witness. Its transcripts are of whole sessions, so the present one ends."""
        with self._lock:
            run(self._end(SecureStream.close))
            self.witness = witness

    def drop(self) -> None:
        """Abandon the session, if there is one; the next question opens another."""
        with self._lock:
            run(self._end(SecureStream.abandon))

    def ask(self, kind: type[R], message: m.Message, *, answer_bytes: int = 0) -> R:
        """Ask until there is an answer of this kind, whose body has at most `answer_bytes`; raises what `call` does."""
        return self.call(Question(kind, lambda attempt: message, answer_bytes))

    def call(self, question: Question[R]) -> R:
        """Ask until there is an answer.

        Raises:
            UnreachableError: the cloud has stayed away for too long.
            ActivationsLostError: the cloud has forgotten the forward that is asked about.
            IsthmusError: of whatever kind fits what the cloud answered.
        """
        patience = self._options.give_up_after if question.patience is None else question.patience
        with self._lock:
            start = time.perf_counter_ns()
            try:
                answer = self._repeated(lambda attempt: self._once(question, attempt), patience)
            finally:
                self.traffic.asking_ns += time.perf_counter_ns() - start
            self.traffic.calls += 1
            return answer

    # Below: one attempt, and what follows when it fails ---------------------------------------------------------------

    def _once(self, question: Question[R], number: int) -> R:
        timeout = self._options.call_timeout if question.timeout is None else question.timeout
        stream = self._session()
        # Whatever interrupts this may leave a question half sent or an answer unread, which spoils the session.
        try:
            attempt = Attempt(number, self.traffic.sessions, lambda said: self._ask(stream, said, timeout, 0))

            def sign(said: m.Message) -> m.Message:
                return in_session(attempt.ask(said))

            message = question.message(attempt)
            answer = self._ask(stream, message, timeout, question.answer_bytes)
            answerer, asked = question.answerer, list[Asked]()
            while answerer is not None and isinstance(answer, m.SiteQuestion) and _same_call(answer, message):
                if len(asked) == answerer.questions:
                    raise RemoteProtocolError(f"the cloud asks about sites more than {len(asked)} times in one call")
                asked.append(Asked(answer.phase, tuple(answer.sites)))
                if self.witness is not None:
                    self.witness.sign_when_due(sign)
                begun = time.perf_counter_ns()
                reply = answerer.answer(answer)
                self.traffic.sites_ns += time.perf_counter_ns() - begun
                answer = self._ask(stream, reply, timeout, question.answer_bytes)
            if answerer is not None and isinstance(answer, m.ForwardReply | m.BackwardReply):
                answerer.check_asked(answer, asked)
            if self.witness is not None:
                self.witness.settle(sign, message, answer, question.whole, asked_sites=bool(asked))
        except BaseException:
            self.drop()
            raise
        if isinstance(answer, m.Status) and not (question.kind is m.Status and answer.code == m.StatusCode.OK):
            raise refusal(answer)
        if not isinstance(answer, question.kind) or not _same_call(answer, message):
            raise RemoteProtocolError(f"the cloud answered {type(message).__name__} with {type(answer).__name__}")
        return answer

    def _repeated(self, work: Callable[[int], T], patience: float, since: float | None = None) -> T:
        """Do `work` until it succeeds, for `patience` seconds from the first failure (or from `since`) on.

        Before there has been a session, each place of the connection string has its turn, and then counts what the
        first one said that said anything: it tells more than a connection that was lost.
        """
        name = self._options.name
        if self._closed:
            raise LocalProtocolError(f"the link to {name} is closed: use its model inside `with connect(…) as link:`")
        deadline = None if since is None else since + patience
        said: IsthmusError | None = None
        faults = 0
        for attempt, pause in enumerate(pauses(LONGEST_PAUSE, self._jitter)):
            try:
                return work(attempt)
            except ConnectionLostError as error:
                reason, faults = str(error), 0
            except (RemoteProtocolError, FingerprintError, VersionError, RefusedError) as error:
                reason, faults = str(error), faults + 1
                if faults == PROTOCOL_FAULTS or not self._may_pass(error):
                    if self._info is not None:
                        raise
                    said, faults = said or error, 0
            now = time.monotonic()
            self.drop()
            deadline = deadline or now + patience
            since = time.time() if self.wait is None else self.wait.since
            self.wait = Wait(since, time.time() + deadline - now, reason)
            if now >= deadline:
                break
            had_turn = self._info is None and not faults
            # A place that has not been asked yet needs no pause.
            if not (had_turn and run(self._endpoints.go_on())):
                if had_turn and said is not None:
                    break
                self._pause(min(pause, deadline - now))
            self.traffic.retries += 1
        if said is not None and self._info is None:
            raise said
        raise UnreachableError(
            f"the cloud at {name} stayed away for {patience:.0f} s ({reason}): check that it runs and can be reached"
        )

    def _may_pass(self, error: IsthmusError) -> bool:
        """Whether asking the same place again may help."""
        # Once a cloud has been reached, a hello that does not fit may as well be one that was changed on its way;
        # before, it is most likely another server's, or of another version.
        if self._info is None:
            return isinstance(error, RemoteProtocolError)
        return isinstance(error, CloudFailedError) or not isinstance(error, RefusedError)

    def _pause(self, seconds: float) -> None:
        """Sleep, and check now and then whether there is still something to wait for."""
        while seconds > 0:
            self.check()
            time.sleep(min(seconds, CHECK_SECONDS))
            seconds -= CHECK_SECONDS
        self.check()

    def _session(self) -> SecureStream:
        """The open session, or a new one."""
        if self._stream is not None:
            return self._stream
        try:
            return run(self._open(), self.check)
        except BaseException:  # an interrupt: the session may stand all the same
            self.drop()
            raise

    async def _open(self) -> SecureStream:
        stream = await self._attached()
        try:
            self._check_identity(stream.info)
            self._accept(stream.info)
            if self.witness is not None:
                self.witness.opened(stream.info)
        except BaseException:
            await stream.close()
            raise
        self._info, self._stream, self.wait = stream.info, stream, None
        return stream

    async def _end(self, end: Callable[[SecureStream], Awaitable[None]]) -> None:
        """End the session, if there is one. On the event loop, which has then ended an opening that was interrupted."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await end(stream)

    async def _attached(self) -> SecureStream:
        """A new session with the chosen worker, or with the one where that sends us."""
        endpoints, options = self._endpoints, self._options
        milliseconds = 0 if options.deadline is None else max(1, round(options.deadline * 1000))
        wanted = self.witness is not None
        while True:
            attach = m.Attach(self._link_id, options.interactive, milliseconds, endpoints.settled, transcript=wanted)
            try:
                stream = await SecureStream.open(
                    await endpoints.open(),
                    self._pin,
                    self._key,
                    attach,
                    limits=options.limits,
                    traffic=self.traffic,
                    observer=self._observe,
                )
            except RedirectedError as sent:
                if endpoints.settled:
                    raise RemoteProtocolError("the cloud sends the edge on from where it has sent it") from None
                endpoints.learn(sent.workers.addresses)
                await endpoints.send_to(sent.workers.go_to)
            except RefusedError as error:
                await endpoints.failed()
                if self._info is None and not endpoints.settled:
                    raise
                # It took us before, and may again: a worker that drains, say. Or another one has sent us there.
                raise ConnectionLostError(str(error)) from None
            except (ConnectionLostError, FingerprintError):
                await endpoints.failed()
                raise
            else:
                endpoints.attached()
                if stream.workers:
                    endpoints.learn(stream.workers)
                return stream

    def _check_identity(self, info: m.SessionInfo) -> None:
        if self._info is not None and _identity(info) != _identity(self._info):
            raise CheckpointError(
                f"the cloud at {self._options.name} now serves {_described(info)}, another model than "
                f"{_described(self._info)} before: start the run anew, or serve the old model again"
            )

    def _ask(self, stream: SecureStream, message: m.Message, timeout: float, answer_bytes: int) -> m.Message:
        answer = run(stream.ask(message, timeout, answer_bytes), self.check).message
        if self.witness is not None:
            self.witness.exchanged(message, answer)
        return answer

    def _observe(self, question: str, phase: str) -> None:
        self.observer(question, phase)  # looked up each time: it may be replaced while a session is open


def _same_call(answer: m.Message, message: m.Message) -> bool:
    return getattr(answer, "id", None) == getattr(message, "id", None)


def _identity(info: m.SessionInfo) -> tuple[str, ...]:
    """What has to stay the same for the span to give the same numbers."""
    return info.digest, info.plan, info.span_dtype, info.attn_implementation


def _described(info: m.SessionInfo) -> str:
    return (
        f"{info.model} (digest {info.digest[:16]}) split {info.plan} in {info.span_dtype} with "
        f"{info.attn_implementation} attention"
    )
