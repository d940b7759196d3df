"""What the APIs ask of jobs. Every method names the owner who asks; another's job is not found."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.home import Home
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import Event, Job, Model


class UnknownJobError(LookupError):
    """There is no such job, or it is another owner's."""


class WrongStateError(ValueError):
    """A job's state does not allow what is asked of it; the message names the state and what is possible."""


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a job is made of; see `isthmus.daemon.state.tables.Job`."""

    kind: str
    model: str
    spec: Mapping[str, Any]
    request: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    suffix: str = ""


class JobService:
    """Jobs of all owners. Its methods may be called by several threads; `start` and `stop` by one."""

    def __init__(self, settings: DaemonSettings, home: Home, database: Database) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Begin to work: jobs that a crash has left are taken up again."""

    def stop(self) -> None:
        """Pause the running jobs at their next micro-batch, so that the next start goes on with them."""

    def create(self, owner: str, new: NewJob) -> Job:
        """Put a job into the queue. The same `request` of the same owner within a minute is the same job.

        Raises:
            ConfigError: The spec does not make sense.
            UnknownModelError: No cloud serves the model.
            DiskError: The home is as full as it may be.
        """
        raise NotImplementedError

    def get(self, owner: str, job_id: str) -> Job:
        """A job. Raises UnknownJobError."""
        raise NotImplementedError

    def list(
        self,
        owner: str,
        *,
        after: str | None = None,
        limit: int = 20,
        labels: Mapping[str, str] | None = None,
        kinds: Collection[str] | None = None,
    ) -> tuple[Sequence[Job], bool]:
        """Jobs, the newest first, from behind `after` on; and whether there are more.

        Args:
            owner: Whose.
            after: The id of the job before the first one; None for the newest.
            limit: So many at most.
            labels: Only jobs that have all of these, perhaps among others; an empty mapping is for those without any.
            kinds: Only jobs of these kinds.

        Raises:
            UnknownJobError: There is no job `after`.
        """
        raise NotImplementedError

    def cancel(self, owner: str, job_id: str) -> Job:
        """Raises UnknownJobError, WrongStateError."""
        raise NotImplementedError

    def pause(self, owner: str, job_id: str) -> Job:
        """Raises UnknownJobError, WrongStateError."""
        raise NotImplementedError

    def resume(self, owner: str, job_id: str) -> Job:
        """Raises UnknownJobError, WrongStateError."""
        raise NotImplementedError

    def retry(self, owner: str, job_id: str) -> Job:
        """Go on with a failed or cancelled job from its newest checkpoint. Raises UnknownJobError, WrongStateError."""
        raise NotImplementedError

    def events(
        self, owner: str, job_id: str, *, after: str | None = None, limit: int = 20
    ) -> tuple[Sequence[Event], bool]:
        """Events, the newest first, as `list`. An event's id is "ftevent-<number>". Raises UnknownJobError."""
        raise NotImplementedError

    def checkpoints(
        self, owner: str, job_id: str, *, after: str | None = None, limit: int = 10
    ) -> tuple[Sequence[Model], bool]:
        """Checkpoints that can be talked to, the newest first, as `list`. Raises UnknownJobError."""
        raise NotImplementedError

    def steps(self, owner: str, job_id: str, *, after: int = 0, limit: int = 10_000) -> Sequence[Mapping[str, Any]]:
        """Lines of the run's log after step `after`, the oldest first: `step`, `loss`, … Raises UnknownJobError."""
        raise NotImplementedError
