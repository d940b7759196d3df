"""The queue of jobs, with workers that do what a script says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.daemon.jobs.job_homes import Jobs, ended, said, until
from support.daemon.jobs.scripted_jobs import SUCCEEDS, WAITS, checkpoint, does, jobs_in, progress

from isthmus.daemon.jobs import job_rows, job_service
from isthmus.daemon.jobs.job_service import JobService, NewJob, UnknownJobError, WrongStateError
from isthmus.daemon.jobs.job_specs import adapters_of
from isthmus.daemon.state.tables import BaseModel, Job, Model, Owner, StoredFile, Traffic

pytestmark = pytest.mark.usefixtures("scripted")


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
