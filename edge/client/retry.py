"""What makes a link last: sessions that come and go, and questions that are asked again until there is an answer.

A broken stream, a draining worker, a frame that was changed on its way: each ends one session. The next one has new
keys, and the same question goes out with a higher attempt. So it does, a few times, where the cloud says that it
failed. What cannot be helped by asking again (a refusal, another model behind the same address, a server that is not
the pinned one) is raised.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import Self, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.common.errors import (
    CheckpointError,
    CloudFailedError,
    ConfigError,
    ConnectionLostError,
    FingerprintError,
    LocalProtocolError,
    NonFiniteError,
    OverQuotaError,
    RefusedError,
    RemoteProtocolError,
    TooLateError,
    UnreachableError,
    VersionError,
)
from isthmus.common.shutdown import Interrupted
from isthmus.common.terminal import printable
from isthmus.edge.client.worker_address import Route
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.protocol import messages as m
from isthmus.protocol.secure.keys import Fingerprint
from isthmus.rpc.secure_stream import LOOK_SECONDS, Channel, Check, Observer, RedirectedError, Traffic
from isthmus.rpc.transport import Transport

BACKOFF_FIRST, BACKOFF_FACTOR, BACKOFF_MOST = 0.1, 1.7, 5.0  # seconds
PROTOCOL_FAULTS = 5  # in a row: bad luck ends, an attacker or a defect does not

MAX_ATTEMPT = (1 << 16) - 1
MAX_DEADLINE = 86_400  # seconds

R = TypeVar("R", bound=m.Message)
T = TypeVar("T")


class LastingLink:
    """The end of a link that opens sessions and repeats questions; `isthmus.edge.client.link.Link` says what is asked.

    Args:
        transport: opens streams to the cloud.
        pin: fingerprint of the cloud's root key.
        key: the edge's key.
        name: the cloud's name in messages.
        codecs: how activations and gradients cross the strip; None for fp32.
        give_up_after: seconds that the cloud may stay away.
        call_timeout: seconds that one call may take.
        observer: told of each phase of each question; for tests and benchmarks.
        interactive: whether somebody waits for the calls, which the cloud then computes before those of training.
        deadline: seconds within which the cloud has to compute a call, or else not to begin it; None for no deadline.
        reach: makes a transport to another worker of the cloud; None stays with the one of `transport`.

    Raises:
        ConfigError: The deadline is no length of time.
    """

    def __init__(
        self,
        transport: Transport,
        pin: Fingerprint,
        key: Ed25519PrivateKey,
        *,
        name: str,
        codecs: WireCodecs | None = None,
        give_up_after: float = 600.0,
        call_timeout: float = 600.0,
        observer: Observer = lambda question, phase: None,
        interactive: bool = False,
        deadline: float | None = None,
        reach: Callable[[str], Transport] | None = None,
    ) -> None:
        if deadline is not None and not 0 < deadline <= MAX_DEADLINE:
            raise ConfigError(
                f"a deadline of {deadline} s does not make sense: give more than 0 and at most {MAX_DEADLINE}"
            )
        self.traffic = Traffic()
        self.observer = observer
        self._route = Route(transport, name, reach)
        self._pin = pin
        self._key = key
        self._name = name
        self.codecs = codecs or WireCodecs()
        self._give_up_after = give_up_after
        self._call_timeout = call_timeout
        self._interactive = interactive
        self._deadline = deadline
        self._link_id = os.urandom(16)
        self._channel: Channel | None = None
        self._info: m.SessionInfo | None = None
        self._lock = threading.RLock()
        self._closed = False
        self._check: Check = lambda: None
        self._jitter = random.Random()  # noqa: S311 - spreads reconnects, is no secret

    @property
    def info(self) -> m.SessionInfo:
        """What the cloud serves: the model's name and digest, the plan, limits."""
        if self._info is None:
            raise UnreachableError(f"the link to {self._name} has never been open: call open()")
        return self._info

    def open(self, timeout: float) -> None:
        """Open the first session, within `timeout` seconds."""
        with self._lock:
            self._retrying(timeout, lambda attempt: self._session(), since=time.monotonic())

    def watch(self, check: Check) -> None:
        """Have `check` called a few times a second while the link waits; what it raises ends the wait.

        Without it only an exception, a KeyboardInterrupt say, ends a wait before its time.
        """
        self._check = check

    def close(self) -> None:
        """Say goodbye and close."""
        with self._lock:
            if self._channel is not None:
                self._channel.close()
                self._channel = None
            self._route.close()
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Below: one call, and what to do when it breaks -------------------------------------------------------------------

    def _call(
        self,
        kind: type[R],
        question: Callable[[int], m.Message],
        *,
        prepare: Callable[[Channel], None] = lambda channel: None,
        visit: Callable[[m.SiteQuestion], m.SiteAnswer] | None = None,
        questions: int = 0,
        answer_bytes: int = 0,
        patience: float | None = None,
        timeout: float | None = None,
    ) -> R:
        """Ask until there is an answer of this kind.

        Each attempt begins with `prepare`; `visit` answers what the cloud asks in the middle of a call, `questions`
        times at most. The body of an answer, or of a question, has at most `answer_bytes`.
        """
        if timeout is None:
            timeout = self._call_timeout
        if patience is None:
            patience = self._give_up_after

        def once(attempt: int) -> R:
            channel = self._session()
            prepare(channel)
            asked = question(attempt)
            answer = channel.ask(asked, timeout, answer_bytes)
            left = questions
            while visit is not None and isinstance(answer, m.SiteQuestion) and answer.id == getattr(asked, "id", None):
                if not left:
                    raise RemoteProtocolError(f"the cloud asks about sites more than {questions} times in one call")
                left -= 1
                self._count(answer)
                answer = self._answered(answer, visit, channel, timeout, answer_bytes)
            if isinstance(answer, m.Status) and not (kind is m.Status and answer.code == m.StatusCode.OK):
                raise _error(answer)
            if not isinstance(answer, kind) or getattr(answer, "id", None) != getattr(asked, "id", None):
                raise RemoteProtocolError(f"the cloud answered {type(asked).__name__} with {type(answer).__name__}")
            return answer

        start = time.perf_counter_ns()
        try:
            answer = self._retrying(patience, once)
        finally:
            self.traffic.asking_ns += time.perf_counter_ns() - start
        self.traffic.calls += 1
        self._count(answer)
        return answer

    def _answered(
        self,
        question: m.SiteQuestion,
        visit: Callable[[m.SiteQuestion], m.SiteAnswer],
        channel: Channel,
        timeout: float,
        answer_bytes: int,
    ) -> m.Message:
        """Answer a question of the cloud; returns what it says then."""
        try:
            before = time.perf_counter_ns()
            answer = visit(question)
            self.traffic.sites_ns += time.perf_counter_ns() - before
            return channel.ask(answer, timeout, answer_bytes)
        except BaseException:
            self._drop()  # the cloud would wait for an answer that does not come
            raise

    def _count(self, answer: m.Message) -> None:
        if isinstance(answer, m.Timed):
            self.traffic.compute_ns += answer.compute_ns
            self.traffic.queue_ns += answer.queue_ns
            self.traffic.crypto_ns += answer.crypto_ns

    def _retrying(self, patience: float, work: Callable[[int], T], since: float | None = None) -> T:
        """Do `work` until it succeeds, for `patience` seconds from the first failure (or from `since`) on."""
        if self._closed:
            raise LocalProtocolError(
                f"the link to {self._name} is closed: use its model inside `with connect(…) as link:`"
            )
        attempt = faults = 0
        pause = BACKOFF_FIRST
        deadline = None if since is None else since + patience
        while True:
            try:
                return work(attempt)
            except ConnectionLostError as error:
                reason = str(error)
                faults = 0
            except (RemoteProtocolError, FingerprintError, VersionError, CloudFailedError) as error:
                # Once a cloud has been reached, a hello that does not fit may as well be one that was changed on its
                # way; before, it is most likely another server's, or of another version.
                if self._info is None and not isinstance(error, RemoteProtocolError):
                    raise
                reason = str(error)
                faults += 1
                if faults == PROTOCOL_FAULTS:
                    raise
            except (Interrupted, KeyboardInterrupt):
                self._drop()  # a question may be half sent, or its answer half received
                raise
            self._drop()
            now = time.monotonic()
            deadline = deadline or now + patience
            if now >= deadline:
                raise UnreachableError(
                    f"the cloud at {self._name} stayed away for {patience:.0f} s ({reason}): "
                    "check that it runs and can be reached"
                )
            self._pause(min(pause * self._jitter.uniform(0.5, 1.0), deadline - now))
            pause = min(pause * BACKOFF_FACTOR, BACKOFF_MOST)
            attempt = min(attempt + 1, MAX_ATTEMPT)
            self.traffic.retries += 1

    def _pause(self, seconds: float) -> None:
        """Sleep, and look now and then whether there is still something to wait for."""
        while seconds > 0:
            self._check()
            time.sleep(min(seconds, LOOK_SECONDS))
            seconds -= LOOK_SECONDS
        self._check()

    def _session(self) -> Channel:
        """The open channel, or a new one."""
        if self._channel is not None:
            return self._channel
        try:
            channel = self._opened()
        except RefusedError as error:
            self._route.failed()
            if self._info is None and not self._route.settled:
                raise
            # It took us before, and may again: a worker that drains, say. Or another one has sent us there.
            raise ConnectionLostError(str(error)) from None
        except (ConnectionLostError, FingerprintError):
            self._route.failed()
            raise
        self._route.attached()
        if channel.workers:
            self._route.learn(channel.workers)
        if self._info is not None and _identity(channel.info) != _identity(self._info):
            channel.close()
            raise CheckpointError(
                f"the cloud at {self._name} now serves {_described(channel.info)}, another model than "
                f"{_described(self._info)} before: start the run anew, or serve the old model again"
            )
        try:
            self.codecs.check(channel.info.codecs)
        except ConfigError:
            channel.close()
            raise
        self._info = channel.info
        self._channel = channel
        return channel

    def _opened(self) -> Channel:
        """A new channel, to the worker of the route or to where that one sends us."""
        while True:
            try:
                return Channel(
                    self._route.open(), self._pin, self._key, self._link_id, self.traffic, self._observe,
                    self._still_wanted, interactive=self._interactive, deadline=self._deadline,
                    settled=self._route.settled,
                )  # fmt: skip
            except RedirectedError as sent:
                if self._route.settled:
                    raise RemoteProtocolError("the cloud sends the edge on from where it has sent it") from None
                self._route.learn(sent.workers.addresses)
                self._route.send_to(sent.workers.go_to)

    def _still_wanted(self) -> None:
        self._check()  # looked up each time, as the observer is

    def _observe(self, question: str, phase: str) -> None:
        self.observer(question, phase)  # looked up each time: it may be replaced while a channel is open

    def _drop(self) -> None:
        if self._channel is not None:
            self._channel.abandon()
            self._channel = None


class StashLostError(Exception):
    """The cloud has forgotten a forward: its input has to go along with the backward."""


def _identity(info: m.SessionInfo) -> tuple[str, ...]:
    """What has to stay the same for the span to give the same numbers."""
    return info.digest, info.plan, info.span_dtype, info.attn_implementation


def _described(info: m.SessionInfo) -> str:
    return (
        f"{info.model} (digest {info.digest[:16]}) split {info.plan} in {info.span_dtype} with "
        f"{info.attn_implementation} attention"
    )


def _error(status: m.Status) -> Exception:
    said = printable(status.message)
    match status.code:
        case m.StatusCode.ACTIVATIONS_LOST:
            return StashLostError()
        case m.StatusCode.NON_FINITE:
            return NonFiniteError(f"the cloud refused the call (not finite): {said}")
        case m.StatusCode.DRAINING:
            return ConnectionLostError(said)
        case m.StatusCode.OVER_QUOTA:
            return OverQuotaError(f"the cloud refused the call (over quota): {said}")
        case m.StatusCode.TOO_LATE:
            return TooLateError(f"the cloud refused the call (too late): {said}")
        case code:
            kind = CloudFailedError if code == m.StatusCode.INTERNAL else RefusedError
            return kind(f"the cloud refused the call ({code.name.lower().replace('_', ' ')}): {said}")
