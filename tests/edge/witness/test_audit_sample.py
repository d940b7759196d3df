"""The sample of calls: within its budget, equally likely for each call, private, and read back as it was."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from support.protocol.example_messages import tensor

from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.common.errors import ConfigError, TranscriptError
from isthmus.edge.witness.audit_sample import AuditSample, packed, read_sample, too_large
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import codec_id

SESSION = bytes(range(16))
FP32 = codec_id("fp32")


def call(number: int, rows: int = 1, sites: int = 0) -> tuple[m.Forward, m.ForwardReply]:
    name, hidden = m.CallId(0, number), tensor(shape=(rows, 2, 3))
    return m.Forward(name, False, hidden, None, None, FP32, sites), m.ForwardReply(name, hidden, 1, 2, 3)


def offer(sample: AuditSample, number: int, sites: m.Sites | None = None, rows: int = 1) -> None:
    sent = call(number, rows, 0 if sites is None else sites.number)
    sample.offer(SESSION, number, *sent, lambda message: message, [] if sites is None else [packed(sites)])


def kept(folder: Path) -> list[int]:
    return [each.exchange for each in read_sample(folder)]


def test_calls_come_back_as_they_were_with_their_adapters(tmp_path: Path) -> None:
    sample = AuditSample(tmp_path / "audit", 1 << 20)
    sites = m.Sites(4, (SiteSpec(1, "a", Placement.LEASED),))
    offer(sample, 1, sites)
    offer(sample, 2)
    found = {each.exchange: each for each in read_sample(tmp_path / "audit")}
    assert (found[1].session, found[1].adapters) == (SESSION, (sites,))
    assert (found[1].question, found[1].answer) == call(1, sites=4)
    assert found[2].adapters == ()


def test_what_holds_activations_is_private_and_a_decode_call_is_not_kept(tmp_path: Path) -> None:
    sample = AuditSample(tmp_path / "audit", 1 << 20)
    offer(sample, 1)
    decode = m.Decode(m.CallId(0, 2), 0, 0, (), (), tensor(), None, None, FP32)
    sample.offer(SESSION, 2, decode, call(2)[1], lambda message: message)
    assert kept(tmp_path / "audit") == [1]
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "audit").iterdir()] == [0o600] * 2


def test_the_budget_holds_and_the_lowest_numbers_stay(tmp_path: Path) -> None:
    """Once a call has been dropped, none with a higher number comes in, also where it would fit."""
    numbers = iter([5, 9, 3, 8, 4])
    size = 217
    sample = AuditSample(tmp_path / "a", 2 * size, random=lambda count: next(numbers).to_bytes(count))
    for number in range(1, 6):
        offer(sample, number)
        used = sum(path.stat().st_size for path in (tmp_path / "a").glob("*.call"))
        assert used <= 2 * size
    assert kept(tmp_path / "a") == [3, 5]  # by number: 3 and 4
    again = AuditSample(tmp_path / "a", 10 * size, resume=True, random=lambda count: (7).to_bytes(count))
    offer(again, 6)  # 7 is over 5, which was dropped
    assert kept(tmp_path / "a") == [3, 5]
    fresh = AuditSample(tmp_path / "a", 10 * size, random=lambda count: (7).to_bytes(count))
    offer(fresh, 7)
    assert kept(tmp_path / "a") == [7]


def test_each_call_is_kept_equally_often(tmp_path: Path) -> None:
    counts: Counter[int] = Counter()
    draws = iter(range(10**6))

    def random(count: int) -> bytes:  # well mixed, and the same at each run of the test
        return (next(draws) * 0x9E3779B97F4A7C15 % (1 << 64)).to_bytes(count)

    for trial in range(60):
        sample = AuditSample(tmp_path / f"{trial}", 700, random=random)
        for number in range(1, 7):
            offer(sample, number)
        counts.update(kept(tmp_path / f"{trial}"))
    expected = counts.total() / 6
    assert all(abs(counts[number] - expected) < 0.45 * expected for number in range(1, 7)), counts


def test_a_large_call_is_kept_as_often_as_a_small_one(tmp_path: Path) -> None:
    """Were room what decides, a cloud that lies in its largest calls alone would be met far too seldom."""
    counts: Counter[bool] = Counter()
    drawn = random.Random(1)  # noqa: S311  # is no secret, and the same at each run of the test
    for trial in range(40):
        folder = tmp_path / f"{trial}"
        sample = AuditSample(folder, 20_000, random=drawn.randbytes)
        for number in range(1, 41):
            offer(sample, number, rows=100 if number % 4 == 0 else 1)  # 4.9 kB, and 0.2
        assert sum(path.stat().st_size for path in folder.glob("*.call")) <= 20_000
        counts.update(number % 4 == 0 for number in kept(folder))
    assert counts.total() == 40 * 4
    assert counts[True] / counts.total() == pytest.approx(0.25, abs=0.09)


def test_a_call_larger_than_the_budget_is_counted_and_ends_no_sample(tmp_path: Path) -> None:
    sample = AuditSample(tmp_path / "audit", 1000)
    offer(sample, 1)
    offer(sample, 2, rows=100)
    assert (kept(tmp_path / "audit"), too_large(tmp_path / "audit")) == ([1], 1)
    again = AuditSample(tmp_path / "audit", 1000, resume=True)
    offer(again, 3, rows=100)
    offer(again, 4)
    assert (sorted(kept(tmp_path / "audit")), too_large(tmp_path / "audit")) == ([1, 4], 2)


def test_a_file_that_is_no_call_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--audit-sample"):
        list(read_sample(tmp_path))
    (tmp_path / f"{0:016x}-{SESSION.hex()}-1.call").write_bytes(b"no call at all")
    with pytest.raises(TranscriptError, match="no sampled call"):
        list(read_sample(tmp_path))


@pytest.mark.parametrize(
    ("name", "text"), [("mine.call", ""), ("sample.json", "all"), ("sample.json", '{"limit": -1}')]
)
def test_a_file_that_is_none_of_a_sample_is_named_on_a_resume(tmp_path: Path, name: str, text: str) -> None:
    AuditSample(tmp_path / "audit", 1 << 20)
    (tmp_path / "audit" / name).write_text(text)
    with pytest.raises(TranscriptError, match=rf"{name} is none of a sample of calls: remove it"):
        AuditSample(tmp_path / "audit", 1 << 20, resume=True)


def test_messages_that_are_no_call_and_its_answer_are_refused(tmp_path: Path) -> None:
    sent, answered = (packed(each) for each in call(1))
    name = f"{0:016x}-{SESSION.hex()}-1.call"
    for data in (sent, sent + sent, answered + sent, answered + sent + answered):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(TranscriptError, match="is no sampled call"):
            list(read_sample(tmp_path))
    (tmp_path / name).write_bytes(sent + answered)
    assert kept(tmp_path) == [1]
    (tmp_path / name).rename(tmp_path / "notes.call")
    with pytest.raises(TranscriptError, match=r"notes\.call is no sampled call"):
        list(read_sample(tmp_path))
