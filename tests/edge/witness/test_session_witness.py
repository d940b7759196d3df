"""A link's transcript: what the cloud signs is what crossed, and a cloud that signs anything else is noticed."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from support.cloud.memory_cloud import MemoryCloud, messages, new_link
from support.cloud.span_calls import MASK, POSITIONS, hidden, three_calls
from support.protocol.example_messages import MESSAGES
from support.protocol.wire import NOW, PIN

from isthmus.common.errors import ConnectionLostError, FingerprintError, TranscriptError, UnsignedError
from isthmus.edge.client.link import Link
from isthmus.edge.witness.audit_sample import AuditSample
from isthmus.privacy.transcript import transcript_file
from isthmus.privacy.transcript.transcript_file import TranscriptLog, may_be_unsigned, read_transcript
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import pack
from isthmus.protocol.limits import MAX_UNSIGNED

SITES, LEASE = (next(each for each in MESSAGES if isinstance(each, kind)) for kind in (m.Sites, m.Lease))


def witnessed(cloud: MemoryCloud, path: Path, *, resume: bool = False) -> Link:
    link = new_link(cloud)
    link.keep_transcript(TranscriptLog(path, resume=resume))
    return link


def forward(link: Link, seed: int = 1) -> torch.Tensor:
    return link.forward_span(hidden(seed), MASK, POSITIONS, keep=False)[0]


def test_every_exchange_is_noted_and_signed(
    cloud: MemoryCloud, undisturbed_calls: list[torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "transcript.jsonl"
    link = witnessed(cloud, path)
    results = three_calls(link)
    link.close()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, undisturbed_calls, strict=True))
    found = read_transcript(path, PIN)
    assert [each.question for each in found.sessions[0].exchanges] == ["Forward"] * 2 + ["Backward"] * 2
    assert (found.exchanges, found.unsigned, found.root) == (4, 0, PIN)
    assert path.stat().st_mode & 0o777 == 0o600
    assert found.sessions[0].session.model == cloud.served.info.digest


def test_a_link_without_a_transcript_asks_for_no_signature(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    three_calls(link)
    link.close()
    assert not messages(cloud, m.SignTranscript)
    assert [each.transcript for each in messages(cloud, m.Attach)] == [False]


def test_the_same_call_has_the_same_digests_in_another_session(cloud: MemoryCloud, tmp_path: Path) -> None:
    """What differs between two computations of one call (times, names, attempts) is not in the digest."""
    path = tmp_path / "transcript.jsonl"
    link = witnessed(cloud, path)
    for seed in (1, 1, 2):
        forward(link, seed)
        link.sign_transcript()
        link.drop()
    first, again, other = (each.exchanges[0] for each in read_transcript(path).sessions)
    assert (first.sent, first.answered) == (again.sent, again.answered)
    assert first.sent != other.sent
    assert first.answered != other.answered


def test_signatures_come_at_intervals(cloud: MemoryCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcript_file, "SIGN_EVERY", 2)
    link = witnessed(cloud, tmp_path / "t.jsonl")
    for seed in range(5):
        forward(link, seed)
    assert [each.exchanges for each in messages(cloud, m.SignTranscript)] == [2, 4]
    link.drop()  # a broken session leaves its last exchange without a signature
    forward(link)
    link.close()
    found = read_transcript(tmp_path / "t.jsonl")
    assert (found.exchanges, found.unsigned) == (6, 1)


@dataclasses.dataclass
class Breaker:
    """What a cloud that breaks off does with signatures: of each `cycle` that it is asked for, it sends `kept`."""

    kept: int = 0
    cycle: int = 1
    asked: int = 0

    def __call__(self, signed: m.Message) -> m.Message:
        self.asked += 1
        if (self.asked - 1) % self.cycle < self.kept:
            return signed
        raise ConnectionLostError("broke off")


def calls_until_stopped(link: Link, most: int = 400) -> int:
    """How many calls are answered before the link stops."""
    for count in range(most):
        try:
            link.forward_span(hidden(1), MASK, POSITIONS, keep=False)
        except UnsignedError:
            return count
    return most


@pytest.mark.parametrize("kept_of", [(0, 1), (1, 2)])
def test_a_cloud_that_breaks_off_at_signing_is_given_up(
    cloud: MemoryCloud, tmp_path: Path, kept_of: tuple[int, int]
) -> None:
    """It never signs, or signs one exchange of many so that never many in a row are unsigned."""
    path = tmp_path / "t.jsonl"
    link = witnessed(cloud, path)
    cloud.signs = Breaker(*kept_of)
    assert calls_until_stopped(link) < 2 * MAX_UNSIGNED
    found = read_transcript(path)
    signed = found.exchanges - found.unsigned
    assert MAX_UNSIGNED < found.unsigned <= may_be_unsigned(signed) + 1
    cloud.signs = lambda said: said
    with pytest.raises(UnsignedError, match="larger --max-unsigned"):  # a resumed run counts on
        TranscriptLog(path, resume=True)
    TranscriptLog(path, resume=True, max_unsigned=MAX_UNSIGNED + 1)


def break_often(log: TranscriptLog, before: int) -> None:
    """A thousand times, a session's first signature comes, and the session breaks `before` its second one is due."""
    for _ in range(1000):
        log.gain(log.sign_every)
        log.lose(log.sign_every - before)


def test_an_honest_cloud_whose_sessions_break_all_the_time_is_not_given_up(tmp_path: Path) -> None:
    """Signatures are asked for more and more often."""
    log = TranscriptLog(tmp_path / "t.jsonl")
    break_often(log, before=1)
    assert log.sign_every == 1
    with pytest.raises(UnsignedError):  # the control: it breaks at each second signature
        break_often(log, before=0)


def test_links_of_a_run_share_what_may_be_unsigned(cloud: MemoryCloud, tmp_path: Path) -> None:
    log = TranscriptLog(tmp_path / "t.jsonl")
    links = [new_link(cloud) for _ in range(4)]
    assert log.sign_every == 32
    for link in links:
        link.keep_transcript(log)
    assert log.sign_every == 8  # so that a cloud that restarts loses less than half of 64


def test_a_cloud_that_signs_other_answers_than_it_gave_is_noticed(cloud: MemoryCloud, tmp_path: Path) -> None:
    link = witnessed(cloud, tmp_path / "t.jsonl")
    cloud.signs = lambda signed: dataclasses.replace(signed, head=bytes(32)) if hasattr(signed, "head") else signed
    forward(link)
    with pytest.raises(TranscriptError, match="does not verify"):
        link.sign_transcript()


def test_a_signature_under_an_expired_certificate_is_not_kept_and_the_run_goes_on(
    cloud: MemoryCloud, tmp_path: Path
) -> None:
    """It proves nothing, and a transcript that holds it could never be read again."""
    path = tmp_path / "t.jsonl"
    link = witnessed(cloud, path)
    forward(link)
    good, cloud.not_after = cloud.not_after, NOW
    stream = cloud.streams[-1]
    assert stream._transcript is not None
    with pytest.raises(FingerprintError, match="expired"):
        link._keeper.witness.sign(lambda said: stream._transcript.sign(said, time.time()))  # type: ignore[union-attr]
    link.sign_transcript()  # at a run's end: its calls stay without a word of the cloud's
    cloud.not_after = good
    forward(link, 2)
    link.close()
    found = read_transcript(path, PIN)
    assert (found.exchanges, found.unsigned) == (2, 1)


def test_a_session_that_was_ended_is_no_refusal_to_sign(cloud: MemoryCloud, tmp_path: Path) -> None:
    link = witnessed(cloud, tmp_path / "t.jsonl")
    forward(link)
    over = m.Status(m.StatusCode.OVER_QUOTA, None, "too many sessions")
    cloud.signs = lambda signed: over
    link.sign_transcript()
    assert read_transcript(tmp_path / "t.jsonl").unsigned == 1
    cloud.signs = lambda signed: m.Status(m.StatusCode.BAD_REQUEST, None, "I sign nothing")
    forward(link)
    with pytest.raises(TranscriptError, match="does not sign"):
        link.sign_transcript()


@pytest.mark.parametrize("ahead", [-1e6, 1e6])
def test_a_cloud_that_signs_for_another_time_is_noticed(cloud: MemoryCloud, tmp_path: Path, ahead: float) -> None:
    """Whoever has a key that expired long ago signs for the time when it was good."""
    link = witnessed(cloud, tmp_path / "t.jsonl")
    forward(link)
    cloud.ahead = ahead
    with pytest.raises(TranscriptError, match="set the clock that is wrong"):
        link.sign_transcript()
    assert read_transcript(tmp_path / "t.jsonl").unsigned == 1
    cloud.ahead = ahead / 1000
    forward(link, 2)
    link.sign_transcript()
    assert read_transcript(tmp_path / "t.jsonl").unsigned == 0


def test_a_cloud_whose_transcript_leaves_a_call_out_is_noticed(cloud: MemoryCloud, tmp_path: Path) -> None:
    link = witnessed(cloud, tmp_path / "t.jsonl")
    forward(link)
    stream = cloud.streams[-1]
    kept, stream._transcript = stream._transcript, None
    forward(link, 2)
    stream._transcript = kept
    with pytest.raises(TranscriptError, match="counts 2 exchanges in this session, and the cloud 1"):
        link.sign_transcript()


def test_a_cloud_that_chains_another_answer_is_noticed(cloud: MemoryCloud, tmp_path: Path) -> None:
    """It signs in good form: only the edge's own chain tells that it is of something else."""
    link = witnessed(cloud, tmp_path / "t.jsonl")
    forward(link)
    transcript = cloud.streams[-1]._transcript
    assert transcript is not None
    transcript._chain.head = bytes(32)
    with pytest.raises(TranscriptError, match="not what was sent or answered"):
        link.sign_transcript()
    last = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[-1])
    assert last["head"] == bytes(32).hex()  # the cloud's own word is kept
    with pytest.raises(TranscriptError, match="line 3"):
        read_transcript(tmp_path / "t.jsonl")


def test_a_resumed_run_goes_on_in_its_file(cloud: MemoryCloud, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    for resume in (False, True):
        link = witnessed(cloud, path, resume=resume)
        forward(link)
        link.close()
        with path.open("ab") as file:
            file.write(b'{"cut')  # by a crash, which a resumed run repairs
    with pytest.raises(TranscriptError, match="middle of a line"):
        read_transcript(path)
    TranscriptLog(path, resume=True)
    assert len(read_transcript(path).sessions) == 2
    TranscriptLog(path)
    assert read_transcript(path).sessions == ()


def test_adapters_that_are_kept_for_a_sample_are_as_many_as_the_cloud_keeps(cloud: MemoryCloud, tmp_path: Path) -> None:
    link = new_link(cloud)
    link.keep_transcript(TranscriptLog(tmp_path / "t.jsonl"), AuditSample(tmp_path / "audit", 1 << 20))
    forward(link)
    witness = link._keeper.witness
    assert witness is not None
    taken = m.Status(m.StatusCode.OK, None, "")
    for number in range(1, 3 * m.MAX_LISTS):
        witness.exchanged(dataclasses.replace(SITES, number=number), taken)
        witness.exchanged(dataclasses.replace(LEASE, number=number), taken)
    kept = [number for kind, number in witness._adapters if kind is m.Sites]
    assert kept == list(range(2 * m.MAX_LISTS, 3 * m.MAX_LISTS))
    assert [number for kind, number in witness._adapters if kind is m.Lease] == [3 * m.MAX_LISTS - 1]


def test_a_signature_is_no_larger_than_it_has_to_be(cloud: MemoryCloud, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    link = witnessed(cloud, path)
    forward(link)
    seen: list[m.SignedTranscript] = []
    cloud.signs = lambda signed: seen.append(signed) or signed  # type: ignore[func-returns-value,arg-type]
    link.sign_transcript()
    header, body = pack(seen[0])
    assert (len(header) <= 400, body) == (True, [])
    assert path.stat().st_size < 3 * 1024  # the session, an exchange, a signature
