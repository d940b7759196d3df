"""The audit of a run: its sampled calls, computed again elsewhere, and where the first answer differs.

Bits are compared first. Where they differ and both sides name the same numerics (`isthmus.backbone.runtime.numerics`),
the answer is a lie. Where the numerics differ, or do not tell all, honest answers differ a little, too: then an answer
is a lie if its distance is over a threshold that the caller states and rounding does not explain it
(`isthmus.edge.audit.conditioning`), and undecided where no threshold is stated. The distance of two answers is the
largest of their tensors'.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from isthmus.backbone.runtime.numerics import are_complete
from isthmus.common.errors import ConnectionLostError, TranscriptError, UnsupportedCallError
from isthmus.edge.audit.conditioning import MAX_ROUNDING_RATIO, distances, rounding_ratio
from isthmus.edge.audit.replay import Replayer
from isthmus.edge.witness.audit_sample import SampledCall, read_sample, too_large
from isthmus.privacy.transcript.chain import NOTHING, Exchange, Session, adapters_digest, digest
from isthmus.privacy.transcript.detection import probability_of_catching
from isthmus.privacy.transcript.transcript_file import SessionTranscript, Transcript
from isthmus.protocol import messages as m

SHARES = (0.001, 0.01, 0.1)
"""Of calls that a cloud may have altered, for which a report says how likely it was caught."""
USUAL = 0.9
"""The quantile of honest answers' distances that is proposed as a threshold. It is chosen: few enough are above it for
a second look at each, and between draws of some hundreds it differs less than their largest distance."""
TAKEOVERS = 3
"""Times that a call is asked anew because another worker took over before its second look was done."""
Verdict = Literal["identical", "within", "explained", "undecided", "lie"]
"""Of an answer: the same bits; other bits within the threshold, or above it as far as rounding explains; other bits
that nothing is said about, as no threshold is stated; none of these."""


@dataclass(frozen=True, slots=True)
class OtherAnswer:
    """An answer that is another one elsewhere.

    Attributes:
        session: The session's id, in hexadecimal.
        exchange: Its number in the session's transcript.
        question: Forward or Backward.
        step: Of the optimizer.
        call: The call's number.
        expected: Digest of what it is elsewhere, in hexadecimal.
        found: Digest of what the cloud has answered.
        distance: Between the two; None where their shapes differ.
        rounding_ratio: How many times as far that is as changes in the last place of the input move the answer; None
            where that is not known or does not matter, as the numerics are the same.
        signed: Whether the cloud has signed that answer.
    """

    session: str
    exchange: int
    question: str
    step: int
    call: int
    expected: str
    found: str
    distance: float | None
    rounding_ratio: float | None
    signed: bool


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit has found.

    Attributes:
        calls: Calls of the run that somebody else can compute.
        too_large: How many of them were larger than the whole sample may be, and had no chance.
        replayed: How many were computed again.
        skipped: How many of the sample could not be.
        identical: Of those replayed, how many had the same bits.
        lies: Those that were others, in the order of the run.
        explained: Those above the threshold that were no lies, as rounding explains them, in the order of the run.
        undecided: How many others had other bits, from other numerics, without a threshold to judge them by.
        numerics: What the run's cloud and the replay's have said that their bits depend on, for each pair that met.
        distances: Of the answers within the threshold whose bits differ, in rising order.
        threshold: By which answers of other numerics were judged; None where none was given.
        unsigned: Exchanges of the run that the cloud has not signed.
        caught: For shares of altered calls, one call at least, how likely this audit was to meet one among those that
            it could judge: answers that are undecided, or explained by rounding, are not among these. It holds for
            alterations above the threshold that rounding does not explain, in calls that were not chosen by their
            condition. They are shares of the calls that were not too large; where calls with adapters were skipped, of
            all calls without adapters, and the figure holds if none of these was too large.
    """

    calls: int
    too_large: int
    replayed: int
    skipped: int
    identical: int
    lies: tuple[OtherAnswer, ...]
    explained: tuple[OtherAnswer, ...]
    undecided: int
    numerics: tuple[tuple[str, str], ...]
    distances: tuple[float, ...]
    threshold: float | None
    unsigned: int
    caught: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """A tree of plain values."""
        more = {"first_lie": None if self.first_lie is None else asdict(self.first_lie)}
        return {**asdict(self), **more, "usual_distance": usual(self.distances)}

    @property
    def first_lie(self) -> OtherAnswer | None:
        """The first of the lies, in the order of the run."""
        return self.lies[0] if self.lies else None

    @property
    def rounding_ratios(self) -> tuple[float, ...]:
        """Of all answers above the threshold, explained or not, where it is known."""
        others = (*self.explained, *self.lies)
        return tuple(each.rounding_ratio for each in others if each.rounding_ratio is not None)


def usual(distances: Iterable[float]) -> float:
    """The distance that a share of `USUAL` of these do not exceed; 0 where there are none."""
    rising = sorted(distances)
    return rising[math.ceil(USUAL * len(rising)) - 1] if rising else 0.0


def audit(
    transcript: Transcript, folder: Path, replayer: Replayer, calls: int | None = None, threshold: float | None = None
) -> AuditReport:
    """Have a run's sampled calls computed again.

    Args:
        transcript: The run's, checked.
        folder: Of the sample.
        replayer: Who computes.
        calls: How many at most; None for all. The sample's order is random, so any number of it is a sample.
        threshold: The distance up to which answers of other numerics are honest in any case; None to leave such answers
            undecided.

    Raises:
        ConfigError: There is no sample.
        TranscriptError: A call of the sample is not one of the transcript.
        IsthmusError: Whatever the replayer raises.
    """
    sessions = {each.session.id: each for each in transcript.sessions}
    places = {name: place for place, name in enumerate(sessions)}
    skipped = 0
    counts, judged, numerics = Counter[Verdict](), list[Exchange](), set[tuple[str, str]]()
    within, lies, explained = list[float](), list[OtherAnswer](), list[OtherAnswer]()
    for call in islice(read_sample(folder), calls):
        of = sessions.get(call.session)
        exchange = _exchange(of, call)
        session = sessions[call.session]
        try:
            found = _replayed(call, exchange, session.session, replayer, threshold)
        except UnsupportedCallError:
            skipped += 1
            continue
        numerics.add((session.session.numerics, found.numerics))
        counts[found.verdict] += 1
        if found.verdict not in ("undecided", "explained"):
            judged.append(exchange)
        if found.verdict == "within" and found.distance is not None:
            within.append(found.distance)
        if found.verdict in ("explained", "lie"):
            (lies if found.verdict == "lie" else explained).append(_other_answer(call, exchange, session, found))
    for others in (lies, explained):
        others.sort(key=lambda other: (places[bytes.fromhex(other.session)], other.exchange))
    eligible = [exchange for each in transcript.sessions for exchange in auditable(each.exchanges)]
    without_room = too_large(folder)
    if skipped:
        n, drawn = (len(_without_adapters(part)) for part in (eligible, judged))
    else:
        n, drawn = len(eligible) - without_room, len(judged)
    return AuditReport(
        len(eligible),
        without_room,
        counts.total(),
        skipped,
        counts["identical"],
        tuple(lies),
        tuple(explained),
        counts["undecided"],
        tuple(sorted(numerics)),
        tuple(sorted(within)),
        threshold,
        transcript.unsigned,
        {f"{share:g}": probability_of_catching(n, math.ceil(share * n), drawn) for share in SHARES},
    )


@dataclass(frozen=True, slots=True)
class _Replayed:
    """A call that was computed again: the answer's digest, and what is made of it; see `OtherAnswer`."""

    digest: bytes
    numerics: str
    verdict: Verdict
    distance: float | None = None
    rounding_ratio: float | None = None


def _replayed(
    call: SampledCall, exchange: Exchange, session: Session, replayer: Replayer, threshold: float | None
) -> _Replayed:
    """Have a call computed again, and with changed inputs where its answer is above the threshold.

    Raises:
        UnsupportedCallError: The replayer cannot compute it.
        ConnectionLostError: Other workers took over again and again.
        IsthmusError: Whatever else the replayer raises.
    """
    for _ in range(TAKEOVERS):
        answer = replayer.answer(call)
        told, numerics = digest(answer), replayer.numerics()
        if told == exchange.answered:
            return _Replayed(told, numerics, "identical")
        apart = distances(answer, call.answer)
        if apart is None:
            return _Replayed(told, numerics, "lie")
        farthest = max(apart, default=0.0)
        if numerics == session.numerics and are_complete(numerics):
            return _Replayed(told, numerics, "lie", farthest)
        if threshold is None:
            return _Replayed(told, numerics, "undecided", farthest)
        if farthest <= threshold:
            return _Replayed(told, numerics, "within", farthest)
        ratio = rounding_ratio(apart, threshold, call, answer, replayer, session.span_dtype)
        if replayer.numerics() == numerics:  # else the answers are not of one worker
            explained = ratio is not None and ratio <= MAX_ROUNDING_RATIO
            return _Replayed(told, numerics, "explained" if explained else "lie", farthest, ratio)
    raise ConnectionLostError(
        f"other workers took over {TAKEOVERS} times while call {exchange.call.call} was computed again: audit again "
        "when the replaying cloud is stable"
    )


def _other_answer(call: SampledCall, exchange: Exchange, session: SessionTranscript, found: _Replayed) -> OtherAnswer:
    return OtherAnswer(
        call.session.hex(),
        call.exchange,
        exchange.question,
        exchange.call.step,
        exchange.call.call,
        found.digest.hex(),
        exchange.answered.hex(),
        found.distance,
        found.rounding_ratio,
        call.exchange <= session.signed,
    )


def auditable(exchanges: Sequence[Exchange]) -> list[Exchange]:
    """The calls among a session's exchanges that somebody else can compute: those that asked about no sites."""
    asked = {each.call.call for each in exchanges if each.question == "SiteAnswer"}
    return [each for each in exchanges if each.question in ("Forward", "Backward") and each.call.call not in asked]


def _without_adapters(exchanges: Sequence[Exchange]) -> list[Exchange]:
    return [each for each in exchanges if each.adapters == NOTHING]


def _exchange(of: SessionTranscript | None, call: SampledCall) -> Exchange:
    """The exchange of a sampled call. Raises TranscriptError where the call is not what the transcript has."""
    if of is not None and 1 <= call.exchange <= len(of.exchanges):
        exchange = of.exchanges[call.exchange - 1]
        sent = {digest(call.question)}
        if isinstance(call.question, m.Backward):  # whose inputs may have been added to it
            sent.add(digest(replace(call.question, replay=None)))
        if exchange.sent in sent and exchange.answered == digest(call.answer) and exchange.adapters == _adapters(call):
            return exchange
    raise TranscriptError(
        f"the sampled call {call.exchange} of session {call.session.hex()} is not the one of the transcript: the "
        "sample or the transcript was changed, or one of them is of another run"
    )


def _adapters(call: SampledCall) -> bytes:
    if not call.question.sites:
        return NOTHING
    sites, lease = ([digest(each) for each in call.adapters if isinstance(each, kind)] for kind in (m.Sites, m.Lease))
    return adapters_digest(b"".join(sites), b"".join(lease))
