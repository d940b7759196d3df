"""What goes wrong with jobs, whose workers do what a script says."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from support.daemon.jobs.job_homes import Jobs, ended, said, until
from support.daemon.jobs.scripted_jobs import AWAY, QUICK, SUCCEEDS, WAITS, does, jobs_in, progress

from isthmus.common.errors import ConnectionLostError, DiskError, OverQuotaError, UnreachableError
from isthmus.common.readable import moment
from isthmus.daemon.jobs import job_runner
from isthmus.daemon.jobs.job_runner import Patience, Waiting
from isthmus.daemon.jobs.job_service import JobService, WrongStateError
from isthmus.daemon.state.tables import Job, Traffic

pytestmark = pytest.mark.usefixtures("scripted")


def test_a_worker_that_dies_is_begun_again_and_reports_are_not_counted_twice(jobs: Jobs) -> None:
    lines = [progress(2, bytes_up=4), {"half": '{"kind":'}, {"kill": "first"}, {"half": "\n"}, progress(3, bytes_up=6)]
    with jobs.service() as service:
        made = service.create("one", does(jobs, *lines, *SUCCEEDS))
        job = ended(service, made.id)
        assert (job.status, job.attempts, job.step) == ("succeeded", 2, 3)
        assert any("ended by signal 9 after step 2" in message for message in said(service, made.id))
    with jobs.database.reading() as session:
        assert session.query(Traffic).one().bytes_up == 4 + 4 + 6


def test_a_worker_that_dies_again_and_again_fails_the_job(jobs: Jobs) -> None:
    with jobs.service() as service:
        made = service.create("one", does(jobs, {"exit": -9}))
        job = ended(service, made.id)
        assert (job.status, job.attempts) == ("failed", 3)
        assert job.error is not None
        assert job.error["code"] == 62
        assert "3 times in a row" in job.error["message"]


@pytest.mark.parametrize("how", [-15, 130])
def test_a_worker_that_was_asked_to_stop_is_begun_again_as_often_as_it_is(jobs: Jobs, how: int) -> None:
    with jobs.service() as service:
        made = service.create("one", does(jobs, {"exit": how})).id
        until(service, made, lambda job: job.attempts > 3)
        assert service.get("one", made).status == "running"
        service.cancel("one", made)
        ended(service, made)


def test_an_error_that_stays_fails_the_job_at_once(jobs: Jobs) -> None:
    error = {"end": {"outcome": "failed", "code": 11, "message": "The data are empty.", "passing": False}}
    with jobs.service() as service:
        made = service.create("one", does(jobs, error, {"exit": 11}))
        job = ended(service, made.id)
        assert (job.status, job.attempts) == ("failed", 1)
        assert job.error == {"code": 11, "message": "The data are empty."}


def test_a_cloud_that_is_away_is_tried_again_for_so_long(jobs: Jobs) -> None:
    with jobs.service(QUICK) as service:
        made = service.create("one", does(jobs, AWAY, {"exit": 40})).id
        until(service, made, lambda job: job.attempts >= 3)
        assert any("The next attempt is in" in message for message in said(service, made))
        assert service.get("one", made).status in ("queued", "running")
        service.cancel("one", made)
        ended(service, made)
    with jobs.service(Patience(first=0.05, longest=0.1, in_all=0.2)) as service:
        service.retry("one", made)
        job = ended(service, made)
        assert job.status == "failed"
        assert job.error is not None
        assert job.error["code"] == 40
        assert "retry the job when the cloud is back" in job.error["message"]


def test_a_cloud_that_is_waited_for_is_told_until_it_answers(jobs: Jobs) -> None:
    wait = {"kind": "waiting", "since": 1000.0, "until": 1600.0, "reason": "the stream broke"}
    again = dict.fromkeys(wait) | {"kind": "waiting"}
    lines = ({"report": again}, {"report": wait}, {"wait": "first"}, {"report": again}, {"wait": "second"})
    with jobs.service() as service:
        made = service.create("one", does(jobs, *lines)).id
        warning = f"The cloud main does not answer (the stream broke). The job waits for it until {moment(1600)}"
        until(service, made, lambda _: warning in said(service, made))
        assert service.waiting(service.get("one", made)) == Waiting("main", 1000.0, 1600.0, "the stream broke")
        service.pause("one", made)
        until(service, made, lambda job: job.status == "paused")
        assert service.waiting(service.get("one", made)) is None
        service.resume("one", made)  # it begins with the same lines, and goes on to the answer
        until(service, made, lambda job: "The cloud main answers again" in said(service, made))
        assert service.waiting(service.get("one", made)) is None
        service.cancel("one", made)
        ended(service, made)
        assert said(service, made).count("The cloud main answers again") == 1


def test_a_wait_goes_on_in_the_queue_from_when_it_began(jobs: Jobs) -> None:
    wait = {"kind": "waiting", "since": 1000.0, "until": 1600.0, "reason": "the stream broke"}
    with jobs.service(Patience(first=3600)) as service:
        made = service.create("one", does(jobs, {"report": wait}, AWAY, {"exit": 40})).id
        other = service.create("one", does(jobs, *SUCCEEDS, name="other")).id
        job = until(service, made, lambda job: job.status == "queued" and job.attempts == 1)
        waiting = service.waiting(job)
        assert waiting is not None
        assert (waiting.cloud, waiting.since, waiting.reason) == ("main", 1000.0, "It is away.")
        assert waiting.until - time.time() == pytest.approx(86_400, abs=600)
        assert service.waiting(ended(service, other)) is None
        service.cancel("one", made)
        assert service.waiting(service.get("one", made)) is None


@pytest.mark.parametrize(
    ("code", "waits"),
    [(UnreachableError.exit_code, True), (ConnectionLostError.exit_code, True), (OverQuotaError.exit_code, False)],
)
def test_only_a_cloud_that_does_not_answer_is_waited_for(jobs: Jobs, code: int, waits: bool) -> None:
    service = JobService(jobs.settings, jobs.home, jobs.database, jobs.room)
    made, runner = service.create("one", does(jobs, *SUCCEEDS)).id, service._runner
    runner._waiting[made] = before = Waiting("main", 1000.0, 1600.0, "the stream broke")
    with jobs.database.session() as session:
        runner._rest(session, session.get_one(Job, made), {"code": code, "message": "Not now."}, "main")
    assert (service.waiting(service.get("one", made)) is not None) == waits
    runner._waiting[made] = before
    with jobs.database.session() as session:
        runner._count_death(session, session.get_one(Job, made), -9)
    assert service.waiting(service.get("one", made)) is None


def test_a_job_that_cannot_be_settled_stops_no_other_one(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    damaged: set[str] = set()
    read_end = job_runner.read_end

    def reads(folder: Path, attempt: int) -> Any:
        if folder.name in damaged:
            raise OSError("it cannot be read")
        return read_end(folder, attempt)

    monkeypatch.setattr(job_runner, "read_end", reads)
    monkeypatch.setattr(job_runner, "DEFECT_PAUSE", 0.05)
    with jobs.service() as service:
        first = service.create("one", does(jobs, *WAITS, name="first")).id
        until(service, first, lambda job: job.status == "running")
        damaged.add(first)
        service.cancel("one", first)
        second = service.create("one", does(jobs, *SUCCEEDS)).id
        assert ended(service, second).status == "succeeded"
        until(service, first, lambda _: f"job {first} met a defect" in caplog.text)
        assert service.get("one", first).status == "running"
        damaged.clear()
        assert ended(service, first).status == "cancelled"  # the control: it is settled once it can be


def test_another_job_runs_while_a_cloud_is_away(jobs: Jobs) -> None:
    with jobs.service(Patience(first=3600)) as service:
        away = service.create("one", does(jobs, AWAY, {"exit": 40}, name="away")).id
        here = service.create("one", does(jobs, *SUCCEEDS)).id
        assert ended(service, here).status == "succeeded"
        assert service.get("one", away).status == "queued"


def test_what_ended_while_there_was_no_daemon_is_settled_at_the_next_start(jobs: Jobs) -> None:
    with jobs.service() as service:
        made = service.create("one", does(jobs, *WAITS)).id
        until(service, made, lambda job: job.status == "running")
    assert service.get("one", made).status == "running"
    folder = jobs.home.job(made)
    (folder / "step_metrics.csv").write_text("step\n")
    (folder / "end.json").write_text(json.dumps({"attempt": 1, "outcome": "succeeded"}))
    with jobs.service() as service:
        job = ended(service, made)
        assert (job.status, job.attempts) == ("succeeded", 1)


def test_a_full_home_ends_jobs_and_takes_no_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_in(tmp_path, disk_gib=0.1)
    with jobs.service() as service:
        made = service.create("one", does(jobs, *WAITS)).id
        until(service, made, lambda job: job.status == "running")
        monkeypatch.setattr("isthmus.daemon.disk_room.taken", lambda path: 1 << 30)
        monkeypatch.setattr("isthmus.daemon.disk_room.COUNT_EVERY", 0.0)
        job = ended(service, made)
        assert job.error is not None
        assert (job.status, job.error["code"]) == ("failed", DiskError.exit_code)
        assert job.error["message"] == (
            "the daemon's disk is full: delete files, models or jobs of yours, and retry the job"
        )
        with pytest.raises(DiskError):
            service.create("one", does(jobs, *SUCCEEDS))


def test_folders_of_jobs_that_ended_long_ago_are_removed(tmp_path: Path) -> None:
    jobs = jobs_in(tmp_path, keep_days=1.0)
    service = JobService(jobs.settings, jobs.home, jobs.database, jobs.room)
    made = [service.create("one", does(jobs, *SUCCEEDS)).id for _ in range(2)]
    for job_id, age in zip(made, (2, 0.5), strict=True):
        service.cancel("one", job_id)
        with jobs.database.session() as session:
            session.get_one(Job, job_id).finished_at = time.time() - age * 86_400
    with jobs.service() as service:
        deadline = time.monotonic() + 10
        while jobs.home.job(made[0]).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [jobs.home.job(one).exists() for one in made] == [False, True]
        with pytest.raises(WrongStateError, match="its folder is gone"):
            service.retry("one", made[0])
