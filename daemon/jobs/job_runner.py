"""Which job runs when: a thread that starts workers, listens to them, and settles how they ended.

The rows are the truth. A job of the status "running" that has no worker is begun (again), so whatever dies, and in
whatever order, the next turn of the loop goes on.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from isthmus.common.errors import ConnectionLostError, DiskError, IsthmusError, UnreachableError, WorkerDiedError
from isthmus.common.readable import moment
from isthmus.common.shutdown import INTERRUPTED
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.disk_room import DiskRoom, taken
from isthmus.daemon.home import Home
from isthmus.daemon.jobs.job_rows import ENDED, end, hear, keep_result, orphans, succeed, tell
from isthmus.daemon.jobs.job_specs import INPUTS, adapters_of, cloud_for, configuration, fit_of, links_in, with_links
from isthmus.daemon.jobs.kinds import PACKAGE, RUN, Work
from isthmus.daemon.jobs.reports import REPORTS, read_end, read_reports
from isthmus.daemon.state.crossings import note_adapters
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import BaseModel, Job
from isthmus.protocol.limits import GIB

MODULE = "isthmus.daemon.jobs.job_worker"
LOG = "worker.log"
MOST_LOG = 1 << 20
"""Bytes of a worker's log, after which it begins anew; the part before it is kept once."""
MOST_DEATHS = 3
"""Of a job's workers in a row, without a step between them, after which the job has failed."""
TICK = 0.2
"""Seconds between looks at workers."""
DEFECT_PAUSE = 5.0
"""Seconds until a job that met a defect is looked at again."""
IDLE = 30.0
"""Seconds between looks at the queue when nobody asks for one."""
TIDY = 3600.0
"""Seconds between looks for what has been kept long enough."""
STOP_SECONDS = 130.0
"""How long a daemon that stops waits for its workers; somewhat longer than they allow themselves."""
_AWAY = (UnreachableError.exit_code, ConnectionLostError.exit_code)
"""The codes of a cloud that does not answer. One that refuses for now (a quota, say) does."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How a job waits for a cloud that is away.

    Attributes:
        first: Seconds before the first further attempt; each wait is twice the one before.
        longest: Seconds of a wait at most.
        in_all: Seconds without a single step, after which the job has failed.
    """

    first: float = 5.0
    longest: float = 300.0
    in_all: float = 86_400.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """A cloud that a job waits for. Times are seconds since 1970.

    Attributes:
        cloud: Its name in daemon.toml.
        since: When it failed first.
        until: When a job that runs goes back into the queue, and one that is queued has failed.
        reason: What is wrong, in a line.
    """

    cloud: str
    since: float
    until: float
    reason: str


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    cloud: str = ""
    asked: bool = False
    refused: str | None = None

    @property
    def was_stopped(self) -> bool:
        """Whether the process was asked to stop, by the daemon or by somebody else's signal."""
        return self.asked or self.process.returncode in (INTERRUPTED, -signal.SIGTERM)

    def ask_to_stop(self) -> None:
        """By the end of its standard input."""
        self.asked = True
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()


@dataclass
class _Trouble:
    """What has gone wrong since the last step: how often, and when it began and may be tried again (monotonic)."""

    step: int
    since: float
    deaths: int = 0
    waits: int = 0
    until: float = 0.0


@dataclass
class JobRunner:
    """Runs jobs. `start` and `stop` are for one thread; the others' changes of rows happen under `lock`.

    Attributes:
        lock: Held by whoever changes the status of a job.
    """

    settings: DaemonSettings
    home: Home
    database: Database
    room: DiskRoom
    patience: Patience
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self._running: dict[str, _Running] = {}
        self._trouble: dict[str, _Trouble] = {}
        self._waiting: dict[str, Waiting] = {}
        self._defects: dict[str, float] = {}  # when a job that met a defect is looked at again (monotonic)
        self._woken = threading.Event()
        self._ending = False
        self._tidied = 0.0
        self._thread = threading.Thread(target=self._loop, name="jobs", daemon=True)

    def start(self) -> None:
        """Settle what a crash has left, and begin."""
        self._adopt()
        self._thread.start()

    def stop(self) -> None:
        """Ask all workers to stop, and wait for them; their jobs stay "running", and the next start goes on."""
        self._ending = True
        self.wake()
        if self._thread.is_alive():
            self._thread.join()
        for running in self._running.values():
            running.ask_to_stop()
        deadline = time.monotonic() + STOP_SECONDS
        for job_id, running in list(self._running.items()):
            try:
                running.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
            self._guarded(job_id, self._settle)

    def wake(self) -> None:
        """Look at the queue now."""
        self._woken.set()

    def ask_to_stop(self, job_id: str) -> None:
        """Ask a job's worker to stop, if it has one. What becomes of the job is in its `wanted`."""
        with self.lock:
            if job_id in self._running:
                self._running[job_id].ask_to_stop()

    def waiting(self, job_id: str) -> Waiting | None:
        """The cloud that a job waits for; None for none."""
        return self._waiting.get(job_id)

    def forgive(self, job_id: str) -> None:
        """Forget what has gone wrong with a job."""
        with self.lock:
            for noted in (self._trouble, self._waiting, self._defects):
                noted.pop(job_id, None)

    # The loop ---------------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while not self._ending:
            pause = IDLE
            try:
                for job_id in list(self._running):
                    self._guarded(job_id, self._watch)
                self._check_room()
                pause = self._begin_jobs()
                self._tidy()
            except Exception:  # noqa: BLE001  # it is logged, and the next turn tries again: the disk was full, say
                _log.exception("the jobs' loop met a defect, and goes on")
                pause = DEFECT_PAUSE
            self._woken.wait(TICK if self._running else pause)
            self._woken.clear()

    def _guarded(self, job_id: str, step: Callable[[str], None]) -> None:
        """Do something for a job. A defect is logged, and stops no other job; this one is looked at again later."""
        if not self._ending and time.monotonic() < self._defects.get(job_id, 0.0):
            return
        try:
            step(job_id)
        except Exception:  # noqa: BLE001  # it is logged, and tried again: the disk was full, say
            _log.exception("job %s met a defect; the others go on", job_id)
            self._defects[job_id] = time.monotonic() + DEFECT_PAUSE
        else:
            self._defects.pop(job_id, None)

    def _adopt(self) -> None:
        """Settle the jobs whose workers ended while there was no daemon."""
        with self.database.reading() as session:
            left = session.scalars(select(Job).where(Job.status == "running")).all()
        for job in left:
            if read_end(self.home.job(job.id), job.attempts) is not None or job.wanted != "run":
                self._guarded(job.id, self._settle)

    def _watch(self, job_id: str) -> None:
        running = self._running[job_id]
        over = running.process.poll() is not None
        self._hear(job_id)
        self._bound_log(self.home.job(job_id) / LOG)
        if over:
            self._settle(job_id)

    def _hear(self, job_id: str) -> None:
        """Put all reports that there are into the database."""
        with self.database.reading() as session:
            heard = session.get_one(Job, job_id).heard
        while True:
            start = heard
            reports, heard = read_reports(self.home.job(job_id), start)
            if heard == start:
                return
            with self.lock, self.database.session() as session:
                job = session.get_one(Job, job_id)
                obsolete = hear(session, job, self.home, reports, self.settings.checkpoints_per_job)
                job.heard = heard
                for report in reports:
                    if report["kind"] == "waiting":
                        self._hear_wait(session, job, report)
            for folder in obsolete:
                shutil.rmtree(folder, ignore_errors=True)

    def _hear_wait(self, session: Session, job: Job, report: Mapping[str, Any]) -> None:
        known = self._waiting.get(job.id)
        running = self._running.get(job.id)
        if report["since"] is None:
            if known is not None:
                tell(session, job, report["reason"] or f"The cloud {known.cloud} answers again")
                del self._waiting[job.id]
        elif running is not None:
            since = report["since"] if known is None else known.since
            self._waiting[job.id] = Waiting(running.cloud, since, report["until"], report["reason"])
            message = f"The cloud {running.cloud} does not answer ({report['reason']}). The job waits for it until "
            tell(session, job, message + moment(report["until"]), level="warn")

    def _begin_jobs(self) -> float:
        """Begin jobs while there is room; returns the seconds until one may be tried again."""
        pause = IDLE
        waiting = select(Job).where(Job.status.in_(("running", "queued")))
        with self.database.reading() as session:
            # "running" comes after "queued": what a crash has left goes first.
            jobs = session.scalars(
                waiting.order_by(Job.status.desc(), Job.priority.desc(), Job.created_at, Job.id)
            ).all()
        for job in jobs:
            if job.id in self._running:
                continue
            rest = self._trouble[job.id].until - time.monotonic() if job.id in self._trouble else 0.0
            if job.wanted != "run":
                self._guarded(job.id, self._settle)  # its worker ended, and somebody wants no other one
            elif self._taken() >= self.settings.jobs_at_once:
                continue  # one behind it may be cancelled, and needs no place for that
            elif rest > 0:
                pause = min(pause, rest)
            else:
                self._guarded(job.id, self._begin)
            if job.id in self._defects:
                pause = min(pause, DEFECT_PAUSE)
        return pause

    def _taken(self) -> int:
        """Places that are taken: not by a job whose process is over, and which cannot be settled now."""
        over = (job_id in self._defects and each.process.poll() is not None for job_id, each in self._running.items())
        return len(self._running) - sum(over)

    def _begin(self, job_id: str) -> None:
        folder = self.home.job(job_id)
        with self.lock:
            with self.database.session() as session:
                job = session.get_one(Job, job_id)
                if job.status not in ("running", "queued"):
                    return  # somebody has changed it meanwhile
                again = job.attempts > 0
                job.status, job.attempts = "running", job.attempts + 1
                job.started_at = job.started_at or time.time()
                try:
                    self._write_work(session, job, folder)
                except IsthmusError as error:
                    _fail(session, job, error.exit_code, str(error))
                    return
                base = session.get(BaseModel, job.model)
                tell(session, job, "The job goes on" if again else "The job has begun")
            with (folder / LOG).open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", MODULE, str(folder)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C at a terminal is the daemon's alone
                )
            self._running[job_id] = _Running(process, "" if base is None else base.cloud)

    def _write_work(self, session: Session, job: Job, folder: Path) -> None:
        cloud = cloud_for(job.kind, job.model, job.spec, session, self.settings)
        spec = with_links(job.spec, links_in(folder), folder)
        config, more = configuration(job.kind, spec, cloud, self.settings, folder)
        values = config.model_dump(mode="json", exclude_unset=True)
        models = str(self.home.path / "models")
        base = session.get(BaseModel, job.model)
        offers = fit = None
        if job.kind == "tune" and cloud is not None and base is not None:
            name = spec.get(PACKAGE)
            kept = self.home.package(base.cloud, name)
            own = sum(map(taken, (kept, kept.with_name(f"{kept.name}.part"))))  # what comes lies there, or replaces it
            room = (max(1, self.room.most - self.room.used()) + own) / GIB
            asked = cloud.model_copy(update={"max_fetch_gib": min(cloud.max_fetch_gib, room)})
            offers = asked.model_dump(mode="json", exclude_unset=True), name, str(kept)
            fit = fit_of(config, spec, cloud)
        adapter, prompts = more.get("adapter"), more.get("prompts")
        Work(job.id, job.attempts, job.kind, job.model, values, models, adapter, prompts, offers, fit).write(folder)
        note_adapters(session, job.owner, adapters_of(spec, base))

    # How a worker ended -----------------------------------------------------------------------------------------------

    def _settle(self, job_id: str) -> None:
        """Take over how a job's worker ended, which is no more."""
        self._hear(job_id)
        folder = self.home.job(job_id)
        with self.database.reading() as session:
            job = session.get_one(Job, job_id)
        found = read_end(folder, job.attempts)
        result = keep_result(job, self.home) if found is not None and found["outcome"] == "succeeded" else None
        with self.lock:
            running = self._running.get(job_id)
            with self.database.session() as session:
                job = session.get_one(Job, job_id)
                if result is not None:
                    succeed(session, job, self.home, result)
                elif job.wanted == "cancel":
                    end(session, job, "cancelled", "The job was cancelled")
                elif running is not None and running.refused is not None:
                    _fail(session, job, DiskError.exit_code, running.refused)
                elif found is not None and found["outcome"] == "failed" and not found["passing"]:
                    _fail(session, job, found["code"], found["message"])
                elif job.wanted == "pause":
                    job.status, job.wanted = "paused", "run"
                    tell(session, job, f"The job is paused after step {job.step}")
                elif found is not None and found["outcome"] == "failed":
                    self._rest(session, job, found, "" if running is None else running.cloud)
                elif found is None and running is not None and not running.was_stopped:
                    self._count_death(session, job, running.process.returncode)
            if running is not None:
                running.ask_to_stop()  # which closes the pipe
                del self._running[job_id]
            if job.status in ENDED:
                self._trouble.pop(job_id, None)
            if job.status in (*ENDED, "paused"):
                self._waiting.pop(job_id, None)
        obsolete = [] if result is None else _of_a_run(folder)
        if job.status in ENDED:
            with self.database.reading() as session:
                obsolete += orphans(session, job, self.home)
        for path in obsolete:
            shutil.rmtree(path, ignore_errors=True)

    def _rest(self, session: Session, job: Job, found: Mapping[str, Any], cloud: str) -> None:
        """A cloud is away, or refuses for now: the job goes back into the queue, for a while."""
        trouble = self._trouble_of(job)
        now = time.monotonic()
        wait = min(self.patience.longest, self.patience.first * 2**trouble.waits)
        if now + wait > trouble.since + self.patience.in_all:
            hours = self.patience.in_all / 3600
            message = f"{found['message']} It was tried for {hours:.4g} hours: retry the job when the cloud is back."
            _fail(session, job, found["code"], message)
            return
        trouble.waits, trouble.until = trouble.waits + 1, now + wait
        before = self._waiting.pop(job.id, None)
        if found["code"] in _AWAY:
            since = time.time() if before is None else before.since
            until = time.time() + trouble.since + self.patience.in_all - now
            self._waiting[job.id] = Waiting(cloud, since, until, found["message"])
        job.status = "queued"
        tell(session, job, f"{found['message']} The next attempt is in {wait:.0f} s.", level="warn")

    def _count_death(self, session: Session, job: Job, code: int) -> None:
        """A worker was killed, or died: it is begun again from the newest checkpoint, a few times."""
        self._waiting.pop(job.id, None)
        trouble = self._trouble_of(job)
        trouble.deaths += 1
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        message = f"The job's process ended {how} after step {job.step}"
        if trouble.deaths < MOST_DEATHS:
            tell(session, job, f"{message}; it goes on from the newest checkpoint", level="warn")
            return
        message = f"{message}, {MOST_DEATHS} times in a row without a step: see {self.home.job(job.id) / LOG}"
        _fail(session, job, WorkerDiedError.exit_code, message)

    def _trouble_of(self, job: Job) -> _Trouble:
        trouble = self._trouble.get(job.id)
        if trouble is None or job.step > trouble.step:
            trouble = self._trouble[job.id] = _Trouble(job.step, time.monotonic())
        return trouble

    # Disk -------------------------------------------------------------------------------------------------------------

    def _check_room(self) -> None:
        """End the jobs that run if the home takes more than it may."""
        if not self._running:
            return
        try:
            self.room.room_for(0)
        except DiskError as error:
            for running in self._running.values():
                running.refused = f"{error}, and retry the job"
                running.ask_to_stop()

    def _bound_log(self, log: Path) -> None:
        """Begin a log anew that is long; its writer appends to wherever the end is."""
        if log.exists() and log.stat().st_size > MOST_LOG:
            with log.open("r+b") as file:
                file.seek(-MOST_LOG, os.SEEK_END)
                log.with_name(f"{LOG}.1").write_bytes(file.read(MOST_LOG))
                file.truncate(0)

    def _tidy(self) -> None:
        """Remove the folders of jobs that ended long ago."""
        if time.monotonic() < self._tidied + TIDY and self._tidied:
            return
        self._tidied = time.monotonic()
        before = time.time() - self.settings.keep_days * 86_400
        with self.database.reading() as session:
            old = session.scalars(select(Job.id).where(Job.status.in_(ENDED), Job.finished_at < before)).all()
        for job_id in old:
            shutil.rmtree(self.home.job(job_id), ignore_errors=True)


def _fail(session: Session, job: Job, code: int, message: str) -> None:
    end(session, job, "failed", f"The job has failed: {message}", {"code": code, "message": message})


def _of_a_run(folder: Path) -> list[Path]:
    """What nobody needs of a job that has succeeded: what to go on from, and what was linked or copied elsewhere."""
    run = folder / RUN
    (folder / REPORTS).unlink(missing_ok=True)
    return [
        *run.glob("checkpoint-*"),
        run / "adapter",
        run / "span-cache",
        folder / INPUTS,
        *folder.glob(f"{PACKAGE}*"),
    ]
