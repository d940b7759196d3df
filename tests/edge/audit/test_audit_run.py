"""An audit of a real run: honest clouds pass, each kind of lie is found at the call where it was told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.cloud.clouds import ThreadServer
from support.cloud.other_numerics import Elsewhere
from support.cloud.train_runs import Runs, interrupted
from support.commands import in_process, refused
from support.models.tiny import tiny_checkpoint

from isthmus.common.errors import CheckpointError, ConfigError, TranscriptError
from isthmus.edge.audit import replay as replay_module
from isthmus.edge.audit.audit_command import lines, run_audit
from isthmus.edge.audit.audit_run import AuditReport, audit, usual
from isthmus.edge.audit.replay import LocalReplayer
from isthmus.edge.cloud_link import open_link
from isthmus.edge.config.audit_config import AuditCommandConfig
from isthmus.edge.split_run import train_over
from isthmus.edge.witness.audit_sample import SampledCall
from isthmus.experiments.rigs.lying.lies import KINDS, LyingExecutor
from isthmus.privacy.transcript.transcript_file import TRANSCRIPT_FILE, read_transcript
from isthmus.privacy.transcript.verified_run import verify_run
from isthmus.protocol import messages as m

SITES = {"sites": "all", "leased": "all", "target_modules": "q_proj"}


def audited(runs: Runs, run: Path, **values: object) -> AuditReport:
    where = {} if "model" in values else {"cloud": runs.server.address, "key": runs.server.home.key_file}
    return run_audit(run, AuditCommandConfig.model_validate({**where, **values}))


def lied_to(runs: Runs, out: Path, kind: str, share: float) -> LyingExecutor:
    """Train into `out` at a lying cloud with the honest one's keys."""
    served = runs.server.served
    liar = LyingExecutor(served.executor, kind, share)
    with ThreadServer(dataclasses.replace(served, executor=liar), runs.server.home) as server:
        sites = SITES if kind == "stale_adapter" else {}
        Runs(server, runs.model, runs.texts).train(out, audit_sample=64, **sites)
    return liar


def test_an_honest_run_passes(runs: Runs, honest_run: Path) -> None:
    for found in (audited(runs, honest_run), audited(runs, honest_run, model=runs.model, threads=1)):
        assert (found.lies, found.skipped, found.unsigned) == ((), 0, 0)
        assert found.identical == found.replayed == found.calls == 20
        assert found.caught == {"0.001": 1.0, "0.01": 1.0, "0.1": 1.0}
    five = audited(runs, honest_run, calls=5)
    assert five.replayed == 5
    assert [five.caught["0.01"], five.caught["0.1"]] == pytest.approx([0.25, 1 - 15 * 14 / 380])
    assert "5 of 20 calls" in lines(five)
    assert all(len(line) <= 80 for line in lines(five).splitlines())


def test_the_transcript_and_the_certificate_verify(
    runs: Runs, honest_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = verify_run(honest_run, runs.server.home.pin)
    assert (found.unsigned, found.adapter, found.root) == (0, True, str(runs.server.home.pin))
    done = in_process(capsys, "audit", "verify", honest_run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{honest_run / TRANSCRIPT_FILE} verifies\n")
    assert "the one of the certificate" in done.stdout
    written = (honest_run / TRANSCRIPT_FILE).read_text().splitlines(keepends=True)
    cut = tmp_path / TRANSCRIPT_FILE
    cut.write_text("".join(written[:-3]))  # chains and signatures are good, and the end is gone
    assert verify_run(cut).unsigned > 0
    (tmp_path / "certificate.json").write_bytes((honest_run / "certificate.json").read_bytes())
    with pytest.raises(TranscriptError, match="one was cut or changed"):
        verify_run(cut)
    cut.write_text("".join([*written[:2], *written[3:]]))
    with pytest.raises(TranscriptError, match="line 3"):
        verify_run(cut)


@pytest.mark.parametrize("kind", KINDS)
def test_each_lie_is_found_where_it_was_told(runs: Runs, tmp_path: Path, kind: str) -> None:
    liar = lied_to(runs, tmp_path / "run", kind, 0.5)
    found = audited(runs, tmp_path / "run")
    sessions = read_transcript(tmp_path / "run" / TRANSCRIPT_FILE).sessions
    told = {(session.hex(), call, question) for session, call, question in liar.altered}
    crossed = {(each.session.id.hex(), line.call.call, line.question) for each in sessions for line in each.exchanges}
    assert {(lie.session, lie.call, lie.question) for lie in found.lies} == told & crossed
    assert found.replayed == found.calls
    assert found.first_lie is not None
    assert found.first_lie.signed
    assert 0 < len(found.lies) < found.calls


def test_a_liar_that_lies_to_nobody_is_not_accused(runs: Runs, tmp_path: Path) -> None:
    liar = lied_to(runs, tmp_path / "run", "noise", 0.0)
    assert (liar.altered, audited(runs, tmp_path / "run").lies) == (set(), ())


def test_calls_that_cannot_be_replayed_here_are_not_counted_as_looked_at(runs: Runs, tmp_path: Path) -> None:
    """A cloud that alters calls with leased adapters alone is not met by a replay without adapters."""
    out = tmp_path / "run"
    runs.train(out, audit_sample=64, **SITES)
    whole, here = audited(runs, out), audited(runs, out, model=runs.model, threads=1)
    assert (whole.skipped, whole.replayed, set(whole.caught.values())) == (0, whole.calls, {1.0})
    assert here.skipped + here.replayed == here.calls == whole.calls
    assert here.skipped > 0
    assert set(here.caught.values()) == ({1.0} if here.replayed else {0.0})  # of calls without adapters it has them all
    assert "of the calls without adapters: " in lines(here)
    assert "without adapters" not in lines(whole)


def test_the_command_ends_with_its_code_and_says_where(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lied_to(runs, tmp_path / "run", "layer_skipped", 1.0)
    words = ("edge", "audit", "--run", tmp_path / "run", "--model", runs.model, "--threads", 1)
    done = in_process(capsys, *words)
    refused(done, 71, "first call 1 of step 0")
    assert "first lie: forward call 1, step 0, signed by the cloud" in done.stdout


def test_what_cannot_be_compared_is_refused(runs: Runs, honest_run: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint("llama", tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="replay at one with the former"):
        audited(runs, honest_run, model=other)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / TRANSCRIPT_FILE).write_bytes((honest_run / TRANSCRIPT_FILE).read_bytes())
    with pytest.raises(ConfigError, match="--audit-sample"):
        audited(runs, bare)
    for both in ({"model": runs.model, "cloud": runs.server.address}, {}):
        with pytest.raises(ValueError, match="say who replays"):
            AuditCommandConfig.model_validate(both)


class Fixed:
    """Has one answer."""

    def __init__(self, answer: m.Message) -> None:
        self._answer = answer

    def numerics(self) -> str:
        return ""

    def answer(self, call: SampledCall) -> m.Message:
        return self._answer


def test_answers_of_other_numerics_are_judged_by_a_threshold(runs: Runs, honest_run: Path) -> None:
    """The same numerics have to give the same bits, whatever the threshold is."""
    transcript = read_transcript(honest_run / TRANSCRIPT_FILE)
    local = LocalReplayer(runs.model, transcript.sessions[0].session, 1)

    def found(numerics: str, threshold: float | None) -> AuditReport:
        return audit(transcript, honest_run / "audit", Elsewhere(local, numerics, 1e-4), threshold=threshold)

    assert found("elsewhere", 1e-3).lies == ()
    assert usual(found("elsewhere", 1e-3).distances) == pytest.approx(1e-4, rel=1e-2)
    assert len(found("elsewhere", 1e-5).lies) == found("elsewhere", 1e-5).replayed
    assert len(found(local.numerics(), 1e-3).lies) == found(local.numerics(), 1e-3).replayed
    undecided = found("elsewhere", None)
    assert (undecided.lies, undecided.undecided) == ((), undecided.replayed)
    assert undecided.numerics == ((transcript.sessions[0].session.numerics, "elsewhere"),)
    assert "no --threshold is given" in lines(undecided)
    assert all(len(line) <= 80 for line in lines(undecided).splitlines())


def test_a_session_that_broke_before_it_was_signed_is_judged_like_the_others(
    runs: Runs, honest_run: Path, tmp_path: Path
) -> None:
    """What bits depend on is said before the first call: a cloud that cuts the session afterwards hides nothing."""
    lied_to(runs, tmp_path / "run", "layer_skipped", 1.0)
    path = tmp_path / "run" / TRANSCRIPT_FILE
    written = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in written if '"head"' not in line))
    (tmp_path / "run" / "certificate.json").unlink()
    found = audited(runs, tmp_path / "run")
    assert (len(found.lies), found.undecided, found.unsigned) == (found.replayed, 0, found.calls)
    assert found.first_lie is not None
    assert not found.first_lie.signed


def test_bits_that_nobody_can_judge_hide_no_lie_and_end_the_command_with_its_code(
    runs: Runs, honest_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cloud may say that its bits vary: then its calls are undecided, and others are still compared."""
    monkeypatch.setattr(replay_module, "numerics", lambda *_: "elsewhere")
    words = ("--model", runs.model, "--threads", 1)
    monkeypatch.setattr(LocalReplayer, "answer", lambda self, call: dataclasses.replace(call.answer, id=call.answer.id))
    assert (
        in_process(capsys, "edge", "audit", "--run", honest_run, *words).returncode == 0
    )  # the same bits are the same
    real = LocalReplayer.answer
    monkeypatch.setattr(
        LocalReplayer, "answer", lambda self, call: Elsewhere(Fixed(real(self, call)), "", 1e-4).answer(call)
    )
    refused(in_process(capsys, "edge", "audit", "--run", honest_run, *words), 10, "state a distance with --threshold")
    lied = (*words, "--threshold", 1e-6)
    refused(in_process(capsys, "edge", "audit", "--run", honest_run, *lied), 71, "are others elsewhere")


def test_a_sample_of_another_run_is_no_evidence(runs: Runs, honest_run: Path, tmp_path: Path) -> None:
    runs.train(tmp_path / "run", audit_sample=64)
    mine, *_ = (tmp_path / "run" / "audit").glob("*.call")
    exchange = mine.stem.rpartition("-")[2]  # both runs send the same in their calls of one number
    theirs = (path for path in (honest_run / "audit").glob("*.call") if path.stem.rpartition("-")[2] != exchange)
    mine.write_bytes(next(theirs).read_bytes())
    with pytest.raises(TranscriptError, match="not the one of the transcript"):
        audited(runs, tmp_path / "run")


@pytest.mark.parametrize(
    ("begun", "said"),
    [
        ({"transcript": False}, "transcript was False and is now True"),
        ({}, "whether audit_sample was given was False and is now True"),
    ],
)
def test_a_run_is_noted_from_its_first_call_or_not_at_all(
    runs: Runs, tmp_path: Path, begun: dict[str, bool], said: str
) -> None:
    """Else the certificate would leave calls out that made the adapter, and the sample those of before."""
    interrupted(runs, tmp_path, 2, **begun)
    sampled = {} if begun else {"audit_sample": 1}
    with pytest.raises(CheckpointError, match=said):
        runs.train(tmp_path, resume=True, **sampled)
    runs.train(tmp_path, resume=True, **begun)
    assert (tmp_path / "certificate.json").exists() == (not begun)


def test_a_run_that_goes_on_has_no_certificate_of_what_there_was_before(runs: Runs, tmp_path: Path) -> None:
    """It would accuse an honest run of a transcript that was changed."""
    runs.train(tmp_path, steps=2, schedule="constant")
    assert verify_run(tmp_path).edge is not None
    interrupted(runs, tmp_path, 3, steps=5, schedule="constant", resume=True)
    assert verify_run(tmp_path).edge is None
    runs.train(tmp_path, steps=5, schedule="constant", resume=True)
    assert verify_run(tmp_path).edge is not None


def test_a_certificate_is_made_with_the_key_as_it_was_when_the_run_began(runs: Runs, tmp_path: Path) -> None:
    """Its passphrase may be on a stick that is gone at the end."""
    key = tmp_path / "id"
    key.write_bytes(runs.server.home.key_file.read_bytes())
    key.chmod(0o600)
    config = runs.config(tmp_path / "run", key=key)

    def observe(question: str, phase: str) -> None:
        if question == "forward":
            key.unlink(missing_ok=True)

    with open_link(config) as link:
        link.observer = observe
        train_over(link, config)
    assert not key.exists()
    assert verify_run(config.out).edge is not None
