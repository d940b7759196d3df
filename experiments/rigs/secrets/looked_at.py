"""A real cloud, `isthmus cloud serve` with its Ray, as a place to look for canaries in."""

from __future__ import annotations

import contextlib
import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from isthmus.cloud.home.home_lock import LOCK_FILE
from isthmus.common.errors import UnreachableError
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.experiments.rigs.secrets.memory_scan import WINDOW
from isthmus.experiments.rigs.secrets.ray_object import ray_object
from isthmus.experiments.rigs.secrets.remains import CONTROL_STORE, HOME, OBJECT, SESSIONS, TENANT, Place, new_name
from isthmus.protocol.enrolment import Quota

_ADDRESS = "--gcs-address="


@contextlib.contextmanager
def looked_at(cloud: LocalCloud) -> Iterator[Place]:
    """A running cloud as a place, with a tenant of its own and an object in its Ray."""
    tenant, content = new_name(), os.urandom(WINDOW)
    key = cloud.home.parent / "looking"
    cloud.enroll(tenant, key, Quota(max_sessions=SESSIONS))
    lock = json.loads((cloud.home / LOCK_FILE).read_text())
    path = str(cloud.home).encode()
    with ray_object(_control_store(cloud), cloud.home, content) as held:
        held.answer()
        yield Place(
            address=cloud.connection,
            key=key,
            worker=cloud.worker(),
            sessions=lambda: sum(cloud.status()["sessions"].values()),
            folders=(cloud.home.parent, Path(lock["ray_folder"])),
            said=lambda: _said(cloud),
            others=lambda: _processes(cloud),
            controls={tenant.encode()[:WINDOW]: TENANT, path[-WINDOW:]: HOME, content: OBJECT},
        )


def _processes(cloud: LocalCloud) -> dict[str, int]:
    """The cloud's processes but the first worker, and Ray's, by name."""
    serve = psutil.Process(json.loads((cloud.home / "serving.json").read_text())["pid"])
    found = {"serve": serve.pid}
    for process in serve.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            if process.pid != cloud.worker() and process.status() != psutil.STATUS_ZOMBIE:
                is_store = Path(process.cmdline()[0]).name == "gcs_server"
                found[CONTROL_STORE if is_store else f"ray {process.pid}"] = process.pid
    return found


def _control_store(cloud: LocalCloud) -> str:
    """Host and port of Ray's control store, as its other processes are told it. Raises UnreachableError."""
    for pid in _processes(cloud).values():
        for word in psutil.Process(pid).cmdline():
            if word.startswith(_ADDRESS):
                return str(word).removeprefix(_ADDRESS)
    raise UnreachableError(f"no process of Ray was started with {_ADDRESS}: another version of Ray?")


def _said(cloud: LocalCloud) -> list[bytes]:
    where = json.loads((cloud.home / "serving.json").read_text())["metrics"]
    said = []
    for page in ("metrics", "status"):
        with urllib.request.urlopen(f"http://{where}/{page}", timeout=10) as response:
            said.append(response.read())
    return said
