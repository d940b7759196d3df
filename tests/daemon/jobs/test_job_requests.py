"""Who may ask for jobs, for what, and for how many."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.daemon.jobs.job_homes import Jobs, ended
from support.daemon.jobs.scripted_jobs import SUCCEEDS, WAITS, checkpoint, does, jobs_in

from isthmus.common.errors import ConfigError, UnknownModelError
from isthmus.daemon.disk_room import DiskRoom, NoRoomError, taken
from isthmus.daemon.jobs import job_runner, job_service
from isthmus.daemon.jobs.job_runner import JobRunner, Patience
from isthmus.daemon.jobs.job_service import JobService, NewJob, QueueFullError, UnknownJobError, WrongStateError
from isthmus.daemon.jobs.kinds import Work
from isthmus.daemon.state.tables import BaseModel, Job, Model, StoredFile
from isthmus.protocol.limits import GIB

pytestmark = pytest.mark.usefixtures("scripted")


def test_another_owner_sees_nothing(jobs: Jobs) -> None:
    service = JobService(jobs.settings, jobs.home, jobs.database, jobs.room)
    wanted = does(jobs, *SUCCEEDS)
    made = service.create("one", wanted).id
    asks: list[Callable[[str, str], Any]] = [
        service.get, service.cancel, service.pause, service.resume, service.retry, service.events,
        service.checkpoints, service.steps, service.delete,
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
    ("name", "most", "fact"), [("rank", 32, "hidden_size"), ("max_length", 64, "longest"), ("taps", 6, "n_layers")]
)
def test_numbers_beyond_the_models_own_are_refused(jobs: Jobs, name: str, most: int, fact: str) -> None:
    service = JobService(jobs.settings, jobs.home, jobs.database, jobs.room)
    with jobs.database.session() as session:
        facts = {"hidden_size": 32, "longest": 64, "n_layers": 6}
        session.merge(BaseModel(name="tiny", cloud="main", facts=facts, seen_at=0.0))
    with pytest.raises(ConfigError, match=f"^{name} = {most + 1}: the model's {fact} is {most}, give {most} at most$"):
        service.create("one", NewJob("train", "tiny", {"data": "file-texts", name: most + 1}))
    with pytest.raises(ConfigError, match="cores, and more threads than cores only wait"):
        service.create("one", NewJob("train", "tiny", {"data": "file-texts", "threads": 100_000}))
    service.create("one", NewJob("train", "tiny", {"data": "file-texts", name: most, "threads": 1}))
    service.create("one", NewJob("train", "tiny", {"data": "file-texts"}))  # what is by default is no mistake


@pytest.mark.parametrize(
    ("kind", "model", "spec", "error", "text"),
    [
        ("trian", "tiny", {}, ConfigError, "'trian' is no kind of job"),
        ("train", "huge", {"data": "file-texts"}, UnknownModelError, "no cloud serves the model 'huge'.*tiny"),
        ("train", "tny", {"data": "file-texts"}, UnknownModelError, "no cloud serves .*; did you mean 'tiny'"),
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
        ("tune", "huge", {"data": "file-texts"}, UnknownModelError, "no cloud serves the model 'huge'"),
        ("tune", "tiny", {"data": "file-texts", "signer": "/x"}, ConfigError, "'signer' is the daemon's to decide"),
        ("tune", "tiny", {"data": "file-texts", "signer": "x", "package": "near"}, ConfigError, "'signer' is the dae"),
        (
            "tune",
            "tiny",
            {"data": "file-texts", "package": ".near"},
            ConfigError,
            "package = '.near': a package's name",
        ),
        ("tune", "tiny", {"data": "file-texts", "public_tokens": 3}, ConfigError, "'public' is missing"),
        ("tune", "tiny", {"data": "file-texts", "public": "file-0"}, ConfigError, "'file-0': there is no such file"),
        (
            *("tune", "tiny", {"data": "file-texts", "public": "file-texts", "public_tokens": 1}),
            *(ConfigError, "public: tokens = 1"),
        ),
        (
            *("tune", "tiny", {"data": "file-texts", "public": "file-texts", "package": "/a/package"}),
            *(ConfigError, "for a package that the cloud offers: for one of this machine, `isthmus emulator fit`"),
        ),
        ("tune", "tiny", {"data": "file-texts", "sites": "all"}, ConfigError, "'sites' is of split training alone"),
        ("tune", "tiny", {"data": "file-texts", "defence_key": "/x"}, ConfigError, "not offered .* emulator tune"),
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


def test_jobs_that_have_ended_can_be_deleted_and_the_oldest_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        with pytest.raises(WrongStateError, match="and cannot be deleted"):
            service.delete("one", waits)
        (result,) = service.get("one", made[2]).results
        service.delete("one", made[2])
        assert [job.id for job in service.list("one")[0]] == [made[1], waits]
    assert not jobs.home.job(made[0]).exists()
    with jobs.database.reading() as session:
        kept = session.query(Model).filter(Model.job.is_(None), Model.deleted.is_(False)).all()
        assert len(kept) == 2  # those of the oldest can still be talked to
        assert session.get(StoredFile, result) is None
    # Of what was deleted nothing is on the disk, but for what was uploaded.
    assert [path.name for path in jobs.home.path.rglob("*") if made[2].removeprefix("ftjob-") in path.name] == []
    assert not jobs.home.file(result).exists()


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


@pytest.mark.parametrize(
    ("there", "name"), [(None, None), ("main", None), ("main.part", None), (None, "near"), ("main=near", "near")]
)
def test_a_package_is_fetched_within_the_room_that_the_home_has(
    jobs: Jobs, there: str | None, name: str | None
) -> None:
    own, asked = 0, {} if name is None else {"package": name}
    if there is not None:  # what is kept, or half fetched, takes no room from itself
        (jobs.home.path / "packages" / there).mkdir()
        (jobs.home.path / "packages" / there / "edge.safetensors").write_bytes(bytes(300_000))
        own = taken(jobs.home.path / "packages" / there)
        assert own >= 300_000
    service = JobService(jobs.settings, jobs.home, jobs.database, jobs.room)
    made = service.create("one", NewJob("tune", "tiny", {"data": "file-texts", **asked})).id
    named = service.create("one", NewJob("tune", "tiny", {"data": "file-texts", "package": "/a/package"})).id
    jobs.room.most = jobs.room.used() + GIB // 2
    runner = JobRunner(jobs.settings, jobs.home, jobs.database, jobs.room, Patience())
    for job_id in (made, named):
        with jobs.database.session() as session:
            runner._write_work(session, session.get_one(Job, job_id), jobs.home.job(job_id))
    offers = Work.read(jobs.home.job(made)).offers
    assert offers is not None
    assert offers[0]["max_fetch_gib"] == 0.5 + own / GIB
    assert offers[1:] == [name, str(jobs.home.path / "packages" / ("main" if name is None else "main=near"))]
    assert Work.read(jobs.home.job(named)).offers is None
