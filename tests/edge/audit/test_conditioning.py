"""What rounding explains of an answer of other numerics: as much as a change in the last place of the input does."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

import pytest
import torch
from support.cloud.other_numerics import Elsewhere
from support.cloud.train_runs import Runs

from isthmus.common.errors import ConnectionLostError
from isthmus.edge.audit.audit_command import lines
from isthmus.edge.audit.audit_run import TAKEOVERS, AuditReport, audit, usual
from isthmus.edge.audit.conditioning import MAX_ROUNDING_RATIO, distances, perturbed, rounding_ratio
from isthmus.edge.audit.replay import CloudReplayer, LocalReplayer, Replayer
from isthmus.edge.cloud_link import open_link
from isthmus.edge.config.audit_config import AuditCommandConfig
from isthmus.edge.witness.audit_sample import SampledCall, read_sample
from isthmus.privacy.transcript.chain import digest
from isthmus.privacy.transcript.transcript_file import TRANSCRIPT_FILE, TranscriptLog, read_transcript
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import Payload, Role, decode, encode


class Shaky:
    """Computes calls so ill-conditioned that each change of the input moves the answer by a share of its norm."""

    def __init__(self, inner: Replayer, error: float) -> None:
        self._inner, self._error = inner, error

    def numerics(self) -> str:
        return "elsewhere"

    def answer(self, call: SampledCall) -> m.Message:
        name = int.from_bytes(digest(call.question)[:4])
        return Elsewhere(self._inner, "", self._error * (name / (1 << 32) - 0.5)).answer(call)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_an_answer_is_accused_where_rounding_does_not_explain_it(
    runs: Runs, honest_run: Path, tmp_path: Path, codec: str
) -> None:
    """Where a change in the last place of the input moves the answer as far as it is off, nobody has lied."""
    run = honest_run
    if codec != "fp32":
        run = tmp_path / "run"
        runs.train(run, audit_sample=64, codec=codec)
    transcript = read_transcript(run / TRANSCRIPT_FILE)
    config = AuditCommandConfig.model_validate({"cloud": runs.server.address, "key": runs.server.home.key_file})
    with open_link(config) as link:
        link.keep_transcript(TranscriptLog(tmp_path / "audit-transcript.jsonl"))
        cloud = CloudReplayer(link, transcript.sessions[0].session)

        def found(replayer: Replayer) -> AuditReport:
            return audit(transcript, run / "audit", replayer, threshold=1e-6)

        shaky, lied = found(Shaky(cloud, 1e-1)), found(Elsewhere(cloud, "elsewhere", 5e-2))
    # A lie is as far off wherever the input lies. A coarse codec loses changes in the last place: nothing is explained.
    assert (len(lied.lies), lied.explained) == (lied.replayed, ())
    if codec != "fp32":
        assert (len(shaky.lies), shaky.explained) == (shaky.replayed, ())
        assert {each.rounding_ratio for each in shaky.lies} == {None}
        return
    assert all(each.rounding_ratio is not None and each.rounding_ratio > MAX_ROUNDING_RATIO for each in lied.lies)
    assert "times what its input's last place does" in lines(lied)
    assert set(lied.caught.values()) == {1.0}
    assert (shaky.lies, len(shaky.explained), shaky.distances) == ((), shaky.replayed, ())
    assert all(1e-3 < (each.distance or 0) < 1e-1 for each in shaky.explained)
    assert 0 < max(shaky.rounding_ratios) <= MAX_ROUNDING_RATIO
    assert set(shaky.caught.values()) == {0.0}  # they are not judged
    assert "are above it, and explained by rounding" in lines(shaky)
    assert all(len(line) <= 80 for report in (shaky, lied) for line in lines(report).splitlines())


def test_one_call_that_is_farther_apart_makes_no_threshold(runs: Runs, honest_run: Path) -> None:
    transcript = read_transcript(honest_run / TRANSCRIPT_FILE)
    local = LocalReplayer(runs.model, transcript.sessions[0].session, 1)
    far = digest(next(iter(read_sample(honest_run / "audit"))).question)

    class OneFar(Elsewhere):
        def answer(self, call: SampledCall) -> m.Message:
            return Elsewhere(local, "", 0.1 if digest(call.question) == far else 1e-4).answer(call)

    found = audit(transcript, honest_run / "audit", OneFar(local, "elsewhere", 0), threshold=1.0)
    assert (found.replayed, found.lies, found.explained) == (20, (), ())
    assert usual(found.distances) == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize(("times", "explained"), [(9, True), (11, False)])
def test_rounding_explains_ten_times_what_a_changed_input_does(
    runs: Runs, honest_run: Path, times: int, explained: bool
) -> None:
    transcript = read_transcript(honest_run / TRANSCRIPT_FILE)
    local = LocalReplayer(runs.model, transcript.sessions[0].session, 1)
    asked = {digest(call.question) for call in read_sample(honest_run / "audit")}

    class Near(Elsewhere):
        """Off by so many thousandths, and by one more where the input has changed."""

        def answer(self, call: SampledCall) -> m.Message:
            changed = digest(call.question) not in asked
            return Elsewhere(local, "", 1e-3 * (times + changed)).answer(call)

    found = audit(transcript, honest_run / "audit", Near(local, "elsewhere", 0), threshold=1e-6)
    assert (len(found.explained), len(found.lies)) == ((found.replayed, 0) if explained else (0, found.replayed))
    assert all(each.rounding_ratio == pytest.approx(times, rel=0.05) for each in (*found.explained, *found.lies))


def hidden_states(call: SampledCall) -> Payload:
    inputs = call.question.inputs if isinstance(call.question, m.Forward) else call.question.replay
    assert inputs is not None
    return inputs.hidden


def test_a_change_in_the_last_place_is_no_more_and_no_less(honest_run: Path) -> None:
    for call in read_sample(honest_run / "audit"):
        for dtype, least, most in (("fp32", 2**-24, 2**-22), ("bf16+int8", 2**-8, 2**-6)):
            changed = perturbed(call, dtype, 0)
            before, after = (decode(hidden_states(each)) for each in (call, changed))
            moved = ((after - before) / before).abs()
            assert least <= moved.min() <= moved.max() <= most
        assert digest(perturbed(call, "fp32", 0).question) != digest(perturbed(call, "fp32", 1).question)
        assert changed.answer == call.answer


class Moved:
    """Gives one answer to a call as it was, and another to the first that it sees with a changed input."""

    def __init__(self, call: SampledCall, changed: m.Message) -> None:
        self._call, self._changed = call, changed
        self._first = b""

    def numerics(self) -> str:
        return "elsewhere"

    def answer(self, call: SampledCall) -> m.Message:
        asked = digest(call.question)
        if asked != digest(self._call.question):
            self._first = self._first or asked
        return self._changed if asked == self._first else self._call.answer


def tensors(*values: float) -> tuple[m.ForwardReply, SampledCall]:
    """An answer with a tensor of each value, and the call that it is the answer to."""
    first, *taps = (encode(torch.full((1, 2, 4), each), "fp32", Role.ACTIVATION) for each in values)
    forward = m.Forward(m.CallId(0, 1, 1), False, first, None, None, first.codec)
    answer = m.ForwardReply(forward.id, first, 0, 0, 0, taps=tuple(taps))
    return answer, SampledCall(b"", 1, (), forward, answer)


@pytest.mark.parametrize(
    ("run", "changed", "ratio"),
    [
        ((1.0, 1.9), (1.0, 1.1), 9),
        ((1.0, 2.1), (1.0, 1.1), 11),
        ((1.2, 1.2), (1.1, 1.05), 4),  # the worse of two
        ((1.2, 1.0), (1.0, 1.1), None),  # a tensor that is ill-conditioned does not excuse another
        ((1.2, 1.2), (1.0, 1.1), None),
    ],
)
def test_each_tensor_is_judged_by_its_own_condition(
    run: tuple[float, float], changed: tuple[float, float], ratio: float | None
) -> None:
    answer, call = tensors(1.0, 1.0)
    apart = distances(answer, tensors(*run)[0])
    assert apart is not None
    moved = tensors(*changed)[0]
    wanted = None if ratio is None else pytest.approx(ratio, rel=1e-4)
    assert rounding_ratio(apart, 1e-6, call, answer, Moved(call, moved), "fp32") == wanted


class TakenOver:
    """So many times, once a call was computed as it was, another worker takes over, which is farther off by 0.5."""

    def __init__(self, inner: Replayer, asked: Set[bytes], takeovers: int) -> None:
        self._inner, self._asked, self._takeovers, self._worker, self._next = inner, asked, takeovers, 0, 0

    def numerics(self) -> str:
        return f"worker {self._worker}"

    def answer(self, call: SampledCall) -> m.Message:
        if digest(call.question) in self._asked:
            self._next = min(self._worker + 1, self._takeovers)
        else:
            self._worker = self._next
        return Elsewhere(self._inner, "", 0.5 * self._worker + 1e-3).answer(call)


def test_answers_of_two_workers_explain_nothing(runs: Runs, honest_run: Path) -> None:
    transcript = read_transcript(honest_run / TRANSCRIPT_FILE)
    local = LocalReplayer(runs.model, transcript.sessions[0].session, 1)
    asked = {digest(call.question) for call in read_sample(honest_run / "audit")}

    def found(takeovers: int) -> AuditReport:
        replayer = TakenOver(local, asked, takeovers)
        return audit(transcript, honest_run / "audit", replayer, calls=1, threshold=1e-6)

    for takeovers in (0, TAKEOVERS - 1):  # the worker of the end is off, whatever its predecessors answered
        report = found(takeovers)
        assert (len(report.lies), report.explained) == (1, ())
        assert report.numerics[0][1] == f"worker {takeovers}"
        (lie,) = report.lies
        assert lie.distance == pytest.approx(1 - 1 / (1 + 0.5 * takeovers + 1e-3), rel=1e-3)
    with pytest.raises(ConnectionLostError, match="audit again when the replaying cloud is stable"):
        found(TAKEOVERS)
