"""The queue of jobs, with workers that do what a script says."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.daemon.jobs import scripted_worker
from support.daemon.jobs.job_homes import Jobs, ended, said, until

from isthmus.common.errors import ConfigError, DiskError, UnknownModelError
from isthmus.daemon.disk_room import DiskRoom, NoRoomError
from isthmus.daemon.jobs import job_rows, job_runner, job_service
from isthmus.daemon.jobs.job_runner import Patience
from isthmus.daemon.jobs.job_service import JobService, NewJob, QueueFullError, UnknownJobError, WrongStateError
from isthmus.daemon.jobs.job_specs import adapters_of
from isthmus.daemon.state.tables import BaseModel, Job, Model, Owner, StoredFile, Traffic

SUCCEEDS = ({"result": "step\n"}, {"end": {"outcome": "succeeded"}})
WAITS = ({"wait": True},)
AWAY = {"end": {"outcome": "failed", "code": 40, "message": "It is away.", "passing": True}}
QUICK = Patience(first=0.05, longest=0.1, in_all=3600)


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a script stand for each worker."""

    def started(words: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return popen([sys.executable, scripted_worker.__file__, words[-1]], **options)

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(job_runner, "TICK", 0.02)


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return jobs_in(tmp_path)


def jobs_in(folder: Path, **settings: Any) -> Jobs:
    texts = folder / "texts.jsonl"
    texts.write_text("")
    return Jobs(folder / "home", ("isthmus://localhost:1#SHA256:0", folder / "key"), texts, **settings)


def does(jobs: Jobs, *lines: dict[str, Any], name: str = "script", **values: Any) -> NewJob:
    """A job whose worker does this."""
    script = jobs.home.path / f"{name}.jsonl"
    script.write_text("".join(json.dumps(line) + "\n" for line in lines))
    jobs.upload(f"file-{name}", script)
    return NewJob("train", "tiny", {"data": f"file-{name}"}, **values)


def progress(step: int, **values: int) -> dict[str, Any]:
    crossed = dict.fromkeys(("bytes_up", "bytes_down", "calls", "retries"), 0) | values
    return {"report": {"kind": "progress", "step": step, "total": 10, "speed": 0.5, **crossed}}


def checkpoint(step: int) -> list[dict[str, Any]]:
    return [
        {"model": f"ftckpt-JOB-{step}"},
        {"report": {"kind": "checkpoint", "id": f"ftckpt-JOB-{step}", "step": step, "metrics": {"step": step}}},
    ]


# The way it should go -------------------------------------------------------------------------------------------------


def test_a_job_that_succeeds_leaves_a_model_a_file_and_events(jobs: Jobs) -> None:
    with jobs.service() as service:
        made = service.create("one", does(jobs, progress(3), *SUCCEEDS, suffix="My Desk!"))
        job = ended(service, made.id)
        assert (job.status, job.step, job.total, job.speed, job.error) == ("succeeded", 3, 10, 0.5, None)
        assert said(service, made.id)[0] == f"Created fine-tuning job: {made.id}"
        assert said(service, made.id)[-1] == "The job has successfully completed"
    with jobs.database.reading() as session:
        (model,) = session.query(Model).all()
        assert model.name == f"ft:tiny::my-desk:{made.id[6:18]}"
        assert (model.step, model.owner, model.base) == (None, "one", "tiny")
        stored = session.get_one(StoredFile, job.results[0])
        assert (stored.purpose, stored.owner, stored.size) == ("fine-tune-results", "one", 5)
    assert jobs.home.file(stored.id).read_text() == "step\n"
    assert not (jobs.home.job(made.id) / "inputs").exists()


def test_jobs_run_by_priority_and_then_by_age(jobs: Jobs) -> None:
    service = JobService(jobs.settings, jobs.home, jobs.database, jobs.room)
    wanted = does(jobs, *SUCCEEDS)
    made = [service.create("one", NewJob(wanted.kind, "tiny", wanted.spec, priority=n)).id for n in (0, 0, 7, -1)]
    with jobs.service() as service:
        for job_id in made:
            ended(service, job_id)
    order = (jobs.home.path / "jobs" / "order").read_text().split()
    assert order == [made[2], made[0], made[1], made[3]]


@pytest.mark.parametrize("at_once", [1, 2])
def test_no_more_jobs_run_at_once_than_the_settings_say(tmp_path: Path, at_once: int) -> None:
    jobs = jobs_in(tmp_path, jobs_at_once=at_once)
    with jobs.service() as service:
        wanted = does(jobs, *WAITS)
        made = [service.create("one", wanted).id for _ in range(3)]
        until(service, made[at_once - 1], lambda job: job.status == "running")
        time.sleep(0.3)
        assert [service.get("one", one).status for one in made].count("running") == at_once


def test_reports_become_checkpoints_events_and_traffic(tmp_path: Path) -> None:
    jobs = jobs_in(tmp_path, checkpoints_per_job=2)
    metrics = {"report": {"kind": "metrics", "message": "Step 1/10: loss", "data": {"step": 1, "train_loss": 2.5}}}
    lines = [progress(1, bytes_up=5, calls=1), metrics, {"half": '{"kind": "pro'}, {"half": "\n"}]
    lines += [line for step in (2, 4, 6) for line in checkpoint(step)]
    with jobs.service() as service:
        made = service.create("one", does(jobs, *lines, progress(6, bytes_up=7, calls=2), metrics, *SUCCEEDS))
        ended(service, made.id)
        found, more = service.checkpoints("one", made.id, limit=1)
        assert more
        (last,) = found
        (first,), more = service.checkpoints("one", made.id, after=last.id)
        assert not more
        assert [(one.step, one.metrics) for one in (last, first)] == [(6, {"step": 6}), (4, {"step": 4})]
        events, _ = service.events("one", made.id, limit=100)
        assert [event.data for event in events if event.kind == "metrics"] == [{"step": 1, "train_loss": 2.5}]
        newest, more = service.events("one", made.id, limit=1)
        assert more
        older, _ = service.events("one", made.id, after=f"ftevent-{newest[0].number}", limit=100)
        assert [*newest, *older][0].number == max(event.number for event in events)
        assert len(older) == len(events) - 1
    folders = {path.name for path in (jobs.home.path / "models").iterdir()}
    assert folders == {f"ftckpt-{made.id[6:]}-{step}" for step in (4, 6)} | {f"ftmodel-{made.id[6:]}"}
    with jobs.database.reading() as session:
        (traffic,) = session.query(Traffic).all()
        assert (traffic.cloud, traffic.bytes_up, traffic.calls) == ("main", 12, 3)
        assert session.query(Model).filter(Model.deleted.is_(True)).one().step == 2


@pytest.mark.parametrize(
    ("spec", "place"),
    [
        ({"sites": "none", "leased": "none"}, "here"),
        ({"learning_rate": 1e-3}, "here"),
        ({"sites": "all"}, "seen"),
        ({"sites": "all", "leased": "all"}, "leased"),
        ({"sites": "all", "leased": [2]}, "leased"),
        ({"sites": "all", "lend_dead": True, "site_policy": "kill-revive"}, "leased"),
        ({"plugged": True}, "leased"),
    ],
)
def test_where_its_adapters_are_is_noted_when_a_job_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any], place: str
) -> None:
    monkeypatch.setattr(job_service, "MOST_JOBS", 1)
    jobs = jobs_in(tmp_path)

    def places() -> dict[str, str]:
        with jobs.database.reading() as session:
            return {owner.id: owner.adapters for owner in session.query(Owner)}

    wanted = does(jobs, *SUCCEEDS)
    service = JobService(jobs.settings, jobs.home, jobs.database, jobs.room)
    made = service.create("one", NewJob("train", "tiny", {**wanted.spec, **spec}))
    assert places() == {"one": "here", "two": "here"}
    with jobs.service() as service:
        ended(service, made.id)
        assert places() == {"one": place, "two": "here"}
        ended(service, service.create("one", wanted).id)
        with pytest.raises(UnknownJobError):
            service.get("one", made.id)  # the job is forgotten, and the fact is not
    assert places() == {"one": place, "two": "here"}


def test_a_job_over_an_adapter_in_the_clouds_layers_is_noted(jobs: Jobs, tmp_path: Path) -> None:
    for layer, place in ((1, "here"), (3, "seen")):
        save_file({f"model.layers.{layer}.q.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
        base = BaseModel(name="tiny", cloud="main", facts={"plan": "2:2", "n_layers": 6}, seen_at=0.0)
        assert adapters_of({"adapter": str(tmp_path)}, base) == place
        assert adapters_of({"adapter": str(tmp_path), "leased": "all"}, base) == "leased"


def test_events_of_a_job_are_bounded(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_rows, "MOST_EVENTS", 5)
    lines = [{"report": {"kind": "metrics", "message": f"Step {n}", "data": {}}} for n in range(20)]
    with jobs.service() as service:
        made = service.create("one", does(jobs, *lines, *SUCCEEDS))
        ended(service, made.id)
        assert len(said(service, made.id)) == 5
        assert said(service, made.id)[0] == "Step 17"


# What a person asks for -----------------------------------------------------------------------------------------------


def test_pause_resume_cancel_and_retry_change_a_job_that_runs(jobs: Jobs) -> None:
    with jobs.service() as service:
        made = service.create("one", does(jobs, *WAITS)).id
        for ask, status in (
            (service.pause, "paused"),
            (service.resume, "running"),
            (service.cancel, "cancelled"),
            (service.retry, "running"),
        ):
            until(service, made, lambda job: job.status in ("running", "paused", "cancelled") and job.wanted == "run")
            ask("one", made)
            until(service, made, lambda job, status=status: job.status == status)  # type: ignore[misc]
        assert service.get("one", made).error is None
        assert service.get("one", made).attempts == 3


def test_a_pause_that_is_taken_back_lets_the_job_go_on(jobs: Jobs) -> None:
    with jobs.service() as service:
        made = service.create("one", does(jobs, {"kill": "first"}, *WAITS)).id
        until(service, made, lambda job: job.attempts == 2)
        service.pause("one", made)
        service.resume("one", made)
        until(service, made, lambda job: job.attempts == 3 and job.status == "running")


def test_a_waiting_job_is_paused_and_cancelled_at_once(jobs: Jobs) -> None:
    service = JobService(jobs.settings, jobs.home, jobs.database, jobs.room)
    made = service.create("one", does(jobs, *SUCCEEDS)).id
    assert service.pause("one", made).status == "paused"
    assert service.resume("one", made).status == "queued"
    job = service.cancel("one", made)
    assert (job.status, job.finished_at is None) == ("cancelled", False)


@pytest.mark.parametrize(("ask", "status"), [("cancel", "cancelled"), ("pause", "paused")])
def test_a_job_that_a_stop_has_left_needs_no_place_to_end(tmp_path: Path, ask: str, status: str) -> None:
    jobs = jobs_in(tmp_path, jobs_at_once=2)
    with jobs.service() as service:
        wanted = does(jobs, *WAITS)
        made = [service.create("one", wanted).id for _ in range(2)]
        for one in made:
            until(service, one, lambda job: job.status == "running")
    jobs.settings = jobs.settings.model_copy(update={"jobs_at_once": 1})
    with jobs.service() as service:
        first, second = made
        until(service, first, lambda job: job.attempts == 2)
        assert (service.get("one", second).status, service.get("one", second).attempts) == ("running", 1)
        getattr(service, ask)("one", second)
        until(service, second, lambda job: job.status == status)
        assert service.get("one", first).status == "running"


@pytest.mark.parametrize("status", ["queued", "running", "paused", "succeeded", "failed", "cancelled"])
def test_what_a_state_does_not_allow_is_refused(jobs: Jobs, status: str) -> None:
    allowed = {
        "pause": ("queued", "running"),
        "resume": ("paused",),
        "cancel": ("queued", "running", "paused"),
        "retry": ("failed", "cancelled"),
    }
    service = JobService(jobs.settings, jobs.home, jobs.database, jobs.room)
    made = service.create("one", does(jobs, *SUCCEEDS)).id
    for action, states in allowed.items():
        with jobs.database.session() as session:
            session.get_one(Job, made).status = status
        ask = getattr(service, action)
        if status in states:
            ask("one", made)
            with jobs.database.session() as session:
                session.get_one(Job, made).wanted = "run"
        else:
            with pytest.raises(WrongStateError, match=rf"{made} is {status} and cannot be"):
                ask("one", made)


def test_the_same_request_within_a_minute_is_the_same_job(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    service = JobService(jobs.settings, jobs.home, jobs.database, jobs.room)
    wanted = does(jobs, *SUCCEEDS, request={"model": "tiny"})
    first = service.create("one", wanted)
    assert service.create("one", wanted).id == first.id
    other = does(jobs, *SUCCEEDS, request={"model": "tiny", "seed": 1})
    assert service.create("one", other).id != first.id
    service.cancel("one", first.id)
    again = service.create("one", wanted)
    assert again.id != first.id
    monkeypatch.setattr(job_service, "SAME_SECONDS", 0.0)
    assert service.create("one", wanted).id != again.id


# What goes wrong ------------------------------------------------------------------------------------------------------


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


# Who may ask, and for what --------------------------------------------------------------------------------------------


def test_another_owner_sees_nothing(jobs: Jobs) -> None:
    service = JobService(jobs.settings, jobs.home, jobs.database, jobs.room)
    wanted = does(jobs, *SUCCEEDS)
    made = service.create("one", wanted).id
    asks: list[Callable[[str, str], Any]] = [
        service.get, service.cancel, service.pause, service.resume, service.retry, service.events,
        service.checkpoints, service.steps,
    ]  # fmt: skip
    for ask in asks:
        with pytest.raises(UnknownJobError, match=made):
            ask("two", made)
    assert service.list("two") == ([], False)
    with pytest.raises(ConfigError, match="there is no such file"):
        service.create("two", wanted)
    assert [job.id for job in service.list("one")[0]] == [made]


def test_lists_go_by_pages_and_by_labels(jobs: Jobs) -> None:
    service = JobService(jobs.settings, jobs.home, jobs.database, jobs.room)
    labels = [{"a": "1"}, {}, {"a": "1", "b": "2"}, {"a": "2"}]
    made = [service.create("one", does(jobs, *SUCCEEDS, labels=each)).id for each in labels][::-1]
    found: list[str] = []
    more = True
    while more:
        page, more = service.list("one", after=found[-1] if found else None, limit=3)
        found += [job.id for job in page]
    assert found == made
    assert [job.id for job in service.list("one", labels={"a": "1"})[0]] == [made[1], made[3]]
    assert [job.id for job in service.list("one", labels={})[0]] == [made[2]]
    assert service.list("one", labels={"a": "1"}, limit=1)[1]
    assert service.list("one", kinds=["tune"]) == ([], False)
    with pytest.raises(UnknownJobError):
        service.list("one", after="ftjob-0")


@pytest.mark.parametrize(
    ("kind", "model", "spec", "error", "text"),
    [
        ("trian", "tiny", {}, ConfigError, "'trian' is no kind of job"),
        ("train", "huge", {"data": "file-texts"}, UnknownModelError, "no cloud serves the model 'huge'.*tiny"),
        ("train", "tiny", {}, ConfigError, "'data' is missing"),
        ("train", "tiny", {"data": "file-other"}, ConfigError, "'file-other': there is no such file"),
        ("train", "tiny", {"data": "texts.jsonl"}, ConfigError, "neither an id nor an absolute path"),
        ("train", "tiny", {"data": 3}, ConfigError, "data = 3 is no text"),
        ("train", "tiny", {"data": "HOME/files/file-texts"}, ConfigError, "inside the daemon's home"),
        ("train", "tiny", {"data": "file-texts", "rnak": 3}, ConfigError, "did you mean 'rank'"),
        ("train", "tiny", {"data": "file-texts", "steps": 0}, ConfigError, "steps = 0"),
        ("train", "tiny", {"data": "file-texts", "out": "/x"}, ConfigError, "'out' is the daemon's to decide"),
        ("train", "tiny", {"data": "file-texts", "cloud": "x"}, ConfigError, "'cloud' is the daemon's to decide"),
        ("train", "tiny", {"data": "file-texts", "draft": "/x"}, ConfigError, "'draft' is not offered in jobs"),
        ("train", "tiny", {"data": "file-texts", "steps": 1, "epochs": 1}, ConfigError, "exclude each other"),
        ("evaluate", "tiny", {"data": "file-texts", "adapter": "ft:x"}, ConfigError, "there is no such model"),
        ("generate", "tiny", {}, ConfigError, "'prompts' is missing"),
        ("tune", "tiny", {"data": "file-texts"}, ConfigError, "'package' is missing"),
        ("train", "tiny", {"data": "file-texts", "text_column": "x" * 70_000}, ConfigError, "more than 65536 bytes"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(
    jobs: Jobs, kind: str, model: str, spec: dict[str, Any], error: type[Exception], text: str
) -> None:
    service = JobService(jobs.settings, jobs.home, jobs.database, jobs.room)
    spec = {
        name: value.replace("HOME", str(jobs.home.path)) if isinstance(value, str) else value
        for name, value in spec.items()
    }
    with pytest.raises(error, match=text) as refused:
        service.create("one", NewJob(kind, model, spec))
    assert "\n" not in str(refused.value)
    assert list((jobs.home.path / "jobs").iterdir()) == []
    service.create("one", NewJob("train", "tiny", {"data": "file-texts"}))


def test_waiting_jobs_are_bounded(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_service, "MOST_WAITING", 2)
    service = JobService(jobs.settings, jobs.home, jobs.database, jobs.room)
    wanted = does(jobs, *SUCCEEDS)
    made = [service.create("one", wanted).id for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 jobs wait already"):
        service.create("one", wanted)
    service.cancel("one", made[0])
    service.create("one", wanted)


def test_the_oldest_jobs_that_have_ended_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_service, "MOST_JOBS", 3)
    jobs = jobs_in(tmp_path, jobs_at_once=2)
    with jobs.service() as service:
        waits = service.create("one", does(jobs, *WAITS, name="waits")).id
        made = []
        for _ in range(3):
            made.append(service.create("one", does(jobs, *checkpoint(1), *SUCCEEDS)).id)
            ended(service, made[-1])
        assert [job.id for job in service.list("one")[0]] == [made[2], made[1], waits]
        with pytest.raises(UnknownJobError):
            service.get("one", made[0])
    assert not jobs.home.job(made[0]).exists()
    with jobs.database.reading() as session:
        assert session.query(Model).filter(Model.job.is_(None)).count() == 2  # they can still be talked to


def test_an_adapter_that_no_row_knows_goes_with_its_job(jobs: Jobs) -> None:
    lines = [{"model": "ftckpt-JOB-7"}, *checkpoint(2), *SUCCEEDS]
    with jobs.service() as service:
        made = service.create("one", does(jobs, *lines)).id
        ended(service, made)
    deadline = time.monotonic() + 10
    while len(kept := {path.name for path in (jobs.home.path / "models").iterdir()}) > 2:
        assert time.monotonic() < deadline
    assert kept == {f"ftckpt-{made[6:]}-2", f"ftmodel-{made[6:]}"}


def test_requests_that_come_at_the_same_time_are_one_job(jobs: Jobs) -> None:
    service = JobService(jobs.settings, jobs.home, jobs.database, jobs.room)
    wanted = does(jobs, *SUCCEEDS, request={"model": "tiny"})
    threads = [threading.Thread(target=service.create, args=("one", wanted)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(service.list("one")[0]) == 1


def test_a_job_keeps_its_data_when_the_file_is_deleted(jobs: Jobs) -> None:
    service = JobService(jobs.settings, jobs.home, jobs.database, jobs.room)
    made = service.create("one", does(jobs, *SUCCEEDS)).id
    jobs.home.file("file-script").unlink()
    with jobs.service() as service:
        assert ended(service, made).status == "succeeded"


def test_a_long_log_is_put_aside(jobs: Jobs) -> None:
    with jobs.service() as service:
        made = service.create("one", does(jobs, {"log": 3 << 20}, {"log": 10}, *SUCCEEDS)).id
        ended(service, made)
    sizes = {path.name: path.stat().st_size for path in jobs.home.job(made).glob("worker.log*")}
    assert sizes["worker.log.1"] == job_runner.MOST_LOG
    assert sizes["worker.log"] <= 10


def test_what_another_part_has_taken_is_no_room_for_a_job(jobs: Jobs) -> None:
    room = DiskRoom(jobs.home.path, 32 / 1024)
    service = JobService(jobs.settings, jobs.home, jobs.database, room)
    wanted = does(jobs, *SUCCEEDS)
    with room.growing() as take:
        take(24 << 20)
        with pytest.raises(NoRoomError):
            service.create("one", wanted)
    assert service.create("one", wanted).status == "queued"
