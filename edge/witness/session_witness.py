"""The edge's own transcript of the sessions of a link, which the cloud's signatures are held against."""

from __future__ import annotations

import time
from collections.abc import Callable

from isthmus.common.errors import TranscriptError
from isthmus.common.readable import moment
from isthmus.common.terminal import printable
from isthmus.edge.witness.audit_sample import AuditSample, packed
from isthmus.privacy.transcript.chain import ADAPTERS, QUESTIONS, Chain, Session, digest
from isthmus.privacy.transcript.transcript_file import TranscriptLog, check_head, check_signature
from isthmus.protocol import messages as m
from isthmus.protocol.secure.keys import Fingerprint

CLOCK_SECONDS = 3600
"""Between the time that a cloud signs for and the edge's. Clocks of strangers' machines differ, and certificates last
hours at least, so an hour tells a key that is in use from one that has expired long ago."""

Ask = Callable[[m.Message], m.Message]
"""Asks something in the session; raises what ends the session. Other statuses it returns."""


class Witness:
    """Notes what crosses in the sessions of one link.

    Args:
        log: Where it is written.
        root: Fingerprint of the cloud's root key.
        sample: Which calls are kept whole; None for none.
        clock: Unix seconds.
    """

    def __init__(
        self,
        log: TranscriptLog,
        root: Fingerprint,
        sample: AuditSample | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._log, self._root, self._sample, self._clock = log, root, sample, clock
        log.links += 1
        self._chain: Chain | None = None
        self._signed = 0  # exchanges of the session that are signed
        self._adapters: dict[tuple[type, int], bytes] = {}  # what crossed of sites and the newest lease, for the sample

    def opened(self, info: m.SessionInfo) -> None:
        """A session was opened: the one before it is over.

        Raises:
            UnsignedError: It has left too many exchanges unsigned, with those of earlier ones.
        """
        before, self._chain = self._chain, None
        if before is not None:
            self._log.lose(before.exchanges - self._signed)
        session = Session.of(info)
        self._chain, self._signed = Chain(session), 0
        self._adapters.clear()
        self._log.begin(session)

    def exchanged(self, question: m.Message, answer: m.Message) -> None:
        """A question was answered."""
        chain = self._chain
        if chain is None or not isinstance(question, QUESTIONS + ADAPTERS):
            return
        exchange = chain.add(question, digest(question), answer)
        if exchange is not None:
            self._log.exchange(chain.session, chain.exchanges, exchange)
        elif self._sample is not None and isinstance(question, ADAPTERS):
            kind = type(question)
            known = [key for key in self._adapters if key[0] is kind]
            if len(known) >= (1 if kind is m.Lease else m.MAX_LISTS):  # as many as the cloud keeps
                del self._adapters[known[0]]
            self._adapters[kind, question.number] = packed(question)  # its weights change in their places

    def settle(
        self,
        ask: Ask,
        call: m.Message,
        answer: m.Message,
        whole: Callable[[m.Message], m.Message],
        *,
        asked_sites: bool = False,
    ) -> None:
        """A call was answered: sample it, and have the cloud sign where it is time.

        Args:
            ask: Asks something in the session.
            call: What was asked first.
            answer: What came back in the end.
            whole: Makes of the call one that needs nothing of its session.
            asked_sites: Whether the cloud has asked about sites in between.

        Raises:
            TranscriptError: The cloud signs another transcript, or none.
        """
        chain = self._chain
        if chain is None:
            return
        # A call that asks about sites is no function of what it brought: it cannot be asked of somebody else.
        if self._sample is not None and not asked_sites and isinstance(call, m.Forward | m.Backward):
            keys = ((m.Sites, call.sites), (m.Lease, call.lease))
            adapters = [self._adapters[key] for key in keys if key in self._adapters]
            if isinstance(answer, m.ForwardReply | m.BackwardReply):
                self._sample.offer(chain.session.id, chain.exchanges, call, answer, whole, adapters)
        self.sign_when_due(ask)

    def sign_when_due(self, ask: Ask) -> None:
        """Have the cloud sign where it is time; raises what `sign` raises."""
        if self._chain is not None and self._chain.exchanges - self._signed >= self._log.sign_every:
            self.sign(ask)

    def sign(self, ask: Ask) -> None:
        """Have the cloud sign what is not signed yet.

        Raises:
            TranscriptError: It signs another transcript, or none, or at another time.
            FingerprintError: The certificate under its signature does not verify, or has expired.
        """
        chain = self._chain
        if chain is None or chain.exchanges == self._signed:
            return
        signed = ask(m.SignTranscript(chain.exchanges))
        if not isinstance(signed, m.SignedTranscript):
            said = printable(signed.message) if isinstance(signed, m.Status) else type(signed).__name__
            raise TranscriptError(
                f"the cloud does not sign the {chain.exchanges} exchanges of session {chain.session.id.hex()} ({said})"
            )
        statement = check_signature(chain.session, signed, self._root)
        if abs(statement.signed_at - self._clock()) > CLOCK_SECONDS:  # a stolen key signs for the time it was good
            raise TranscriptError(
                f"the cloud signs for {moment(statement.signed_at)}, and here it is {moment(self._clock())}: set the "
                "clock that is wrong"
            )
        self._log.signature(chain.session, signed)  # whatever it is of: what the cloud has signed is its own word
        check_head(statement, chain.exchanges, chain.head)
        self._log.gain(chain.exchanges - self._signed)
        self._signed = chain.exchanges
