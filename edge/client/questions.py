"""Questions that an edge asks until there is an answer, and what it means where a cloud refuses one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from isthmus.common.errors import (
    CloudFailedError,
    ConnectionLostError,
    IsthmusError,
    NonFiniteError,
    OverQuotaError,
    RefusedError,
    TooLateError,
)
from isthmus.common.terminal import printable
from isthmus.protocol import messages as m

R = TypeVar("R", bound=m.Message)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the cloud has asked about: in which phase, and which sites."""

    phase: m.SitePhase
    sites: tuple[int, ...]


class Answerer(Protocol):
    """Answers what the cloud asks in the middle of a call."""

    @property
    def questions(self) -> int:
        """How often it may ask."""

    def answer(self, question: m.SiteQuestion) -> m.SiteAnswer:
        """The answer."""

    def check_asked(self, reply: m.ForwardReply | m.BackwardReply, asked: Sequence[Asked]) -> None:
        """Raises RemoteProtocolError where the cloud has left out a site that the reply depends on."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a question.

    Attributes:
        number: from 0.
        session: the number of the session, from 1. A new one knows nothing of what was said in those before.
        ask: asks something else first, whose answer has no body.
    """

    number: int
    session: int
    ask: Callable[[m.Message], m.Message]


@dataclass(frozen=True, slots=True)
class Question(Generic[R]):
    """What is asked until there is an answer.

    Attributes:
        kind: of the answer, or those that it may be of.
        message: makes an attempt's message.
        answer_bytes: the most bytes of the body of an answer, or of what the cloud asks in the middle.
        answerer: answers what the cloud asks in the middle; None where it must not ask.
        timeout: seconds that an attempt may take; None for the session's own.
        patience: seconds that the cloud may stay away; None for the session's own.
        whole: makes of a message one that needs nothing of its session, to be asked of somebody else.
    """

    kind: type[R] | tuple[type[R], ...]
    message: Callable[[Attempt], m.Message]
    answer_bytes: int = 0
    answerer: Answerer | None = None
    timeout: float | None = None
    patience: float | None = None
    whole: Callable[[m.Message], m.Message] = lambda message: message


class ActivationsLostError(Exception):
    """The cloud has forgotten a forward: its input has to go along with the backward."""


_REFUSALS: dict[m.StatusCode, type[IsthmusError]] = {
    m.StatusCode.NON_FINITE: NonFiniteError,
    m.StatusCode.OVER_QUOTA: OverQuotaError,
    m.StatusCode.TOO_LATE: TooLateError,
    m.StatusCode.INTERNAL: CloudFailedError,
}


def refusal(status: m.Status) -> Exception:
    """What a status that is not OK means for the edge."""
    said = printable(status.message)
    if status.code == m.StatusCode.ACTIVATIONS_LOST:
        return ActivationsLostError()
    if status.code == m.StatusCode.DRAINING:
        return ConnectionLostError(said)
    kind = _REFUSALS.get(status.code, RefusedError)
    return kind(f"the cloud refused the call ({status.code.name.lower().replace('_', ' ')}): {said}")


def in_session(answer: m.Message) -> m.Message:
    """An answer, also a refusal of what was asked; raises what any other status means, as it ends the session."""
    if isinstance(answer, m.Status) and answer.code != m.StatusCode.BAD_REQUEST:
        raise refusal(answer)
    return answer
