"""Where a daemon's files are.

token            the first owner's token, mode 0600
daemon.toml      the settings, where there are any
daemon.sock      the Unix socket
daemon.lock      held by the daemon that runs
daemon.json      its process, address and start, while it runs
daemon.log       what it says, and daemon.log.1, …
serving.log      what the process that answers says
state.db         the database
files/ID         uploaded files, and results
jobs/ID/         a job: `spec.json`, `run/` (the run's folder, as `isthmus edge train` leaves it), `worker.log`
packages/CLOUD/  the emulator package that a cloud offers, as it was fetched last; CLOUD=NAME/ one that was named
models/ID/       adapters that can be talked to
tmp/             uploads on their way
tinker/          models in training (`models/ID/`), saved weights (`weights/ID/`) and data that wait (`requests/ID`)
set-aside/TIME/  what the start at TIME found in these folders that the database does not know
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

from isthmus.common.errors import OwnershipError
from isthmus.common.files import disk_errors
from isthmus.common.ownership import private_folder

SET_ASIDE = "set-aside"

_FOLDERS = (
    ("files",),
    ("jobs",),
    ("models",),
    ("packages",),
    ("tinker", "models"),
    ("tinker", "requests"),
    ("tinker", "weights"),
    ("tmp",),
)


@dataclass(frozen=True, slots=True)
class Home:
    """A daemon's folder. Nobody else may enter it.

    Args:
        path: The folder, absolute.
    """

    path: Path

    @classmethod
    def make(cls, path: Path) -> Home:
        """The home at `path`, made where it is missing.

        Raises:
            DiskError: It cannot be made.
            OwnershipError: It is another user's, or others may write to it or enter it.
        """
        path = path.expanduser().absolute()
        with disk_errors(path):
            mode = stat.S_IMODE(private_folder(path).stat().st_mode)
            if mode & 0o077:
                raise OwnershipError(
                    f"others may enter {path} (mode {mode:04o}), which keeps prompts and data: run `chmod 700 {path}`, "
                    "or give another --home"
                )
            for names in _FOLDERS:
                private_folder(path, *names)
        return cls(path)

    @property
    def token(self) -> Path:
        """The first owner's token."""
        return self.path / "token"

    @property
    def socket(self) -> Path:
        """The Unix socket."""
        return self.path / "daemon.sock"

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.path / "state.db"

    @property
    def running(self) -> Path:
        """What the running daemon says of itself."""
        return self.path / "daemon.json"

    @property
    def lock(self) -> Path:
        """The lock of the running daemon."""
        return self.path / "daemon.lock"

    @property
    def log(self) -> Path:
        """What the daemon says."""
        return self.path / "daemon.log"

    @property
    def serving_log(self) -> Path:
        """What the process that answers says."""
        return self.path / "serving.log"

    def file(self, file_id: str) -> Path:
        """The bytes of a `StoredFile`."""
        return self.path / "files" / file_id

    @property
    def uploads(self) -> Path:
        """What is being uploaded; the daemon's own temporary folder, emptied at its start."""
        return self.path / "tmp"

    def job(self, job_id: str) -> Path:
        """A job's folder."""
        return self.path / "jobs" / job_id

    def package(self, cloud: str, name: str | None = None) -> Path:
        """The package of this name, or the only one, that a cloud of daemon.toml offers."""
        return self.path / "packages" / (cloud if name is None else f"{cloud}={name}")

    def model(self, model_id: str) -> Path:
        """An adapter's folder."""
        return self.path / "models" / model_id

    @property
    def trainer_log(self) -> Path:
        """What the process that trains for Tinker's API says."""
        return self.path / "tinker" / "worker.log"

    def tinker_model(self, model_id: str) -> Path:
        """The newest state of a model in training."""
        return self.path / "tinker" / "models" / model_id.replace(":", "-")

    def tinker_request(self, promise_id: str) -> Path:
        """The data of a promise."""
        return self.path / "tinker" / "requests" / promise_id

    def tinker_weights(self, promise_id: str) -> Path:
        """The weights that a promise saves."""
        return self.path / "tinker" / "weights" / promise_id

    @property
    def set_aside(self) -> Path:
        """What starts have found that the database does not know; made when it is needed."""
        return self.path / SET_ASIDE
