"""A real cloud, `isthmus cloud serve` with its Ray, as a place to look for canaries in."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from isthmus.cloud.home.home_lock import LOCK_FILE
from isthmus.cloud.telemetry.logs import log_file
from isthmus.cloud.telemetry.metrics import Metrics, serve_metrics
from isthmus.common.errors import UnreachableError
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.experiments.rigs.secrets.memory_scan import WINDOW
from isthmus.experiments.rigs.secrets.ray_object import ray_object
from isthmus.experiments.rigs.secrets.remains import (
    CACHE,
    CONTROL_STORE,
    ENVIRONMENTS,
    FILES,
    HOME,
    LOGS,
    METRICS,
    OBJECT,
    SESSIONS,
    TEMPORARY,
    TENANT,
    Place,
    new_name,
)
from isthmus.experiments.rigs.secrets.text_controls import Planted
from isthmus.protocol.enrolment import Quota

_ADDRESS = "--gcs-address="
_VARIABLE = "BENCH_CONTROL"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the processes around a cloud have for themselves, so that all of it can be looked through.

    Attributes:
        temporary: Their folder for temporary files.
        cache: The cache of the edge.
        planted: What is in their environment.
    """

    temporary: Path
    cache: Path
    planted: Planted


@contextlib.contextmanager
def own_surroundings(folder: Path) -> Iterator[Surroundings]:
    """Give this process, and all that it starts inside the context, new folders below one, and a control."""
    made = Surroundings(folder / "t", folder / "cache", Planted(ENVIRONMENTS, as_it_is=False))
    for each in (made.temporary, made.cache):
        each.mkdir(parents=True, mode=0o700)
    variables = {
        "TMPDIR": str(made.temporary),
        "ISTHMUS_CACHE": str(made.cache),
        _VARIABLE: "\n".join(made.planted.texts.values()),
    }
    before = {name: os.environ.get(name) for name in variables}
    chosen, tempfile.tempdir = tempfile.tempdir, None  # which the module chooses once
    os.environ.update(variables)
    try:
        yield made
    finally:
        tempfile.tempdir = chosen
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def looked_at(cloud: LocalCloud, around: Surroundings) -> Iterator[Place]:
    """A running cloud as a place, with a tenant of its own, an object in its Ray, and controls wherever text is."""
    tenant, content = new_name(), os.urandom(WINDOW)
    key = cloud.home.parent / "looking"
    cloud.enroll(tenant, key, Quota(max_sessions=SESSIONS))
    ray_folder = Path(json.loads((cloud.home / LOCK_FILE).read_text())["ray_folder"])
    path = str(cloud.home).encode()
    files = [cloud.home.parent, *([] if around.temporary in ray_folder.parents else [ray_folder])]
    planted = {name: Planted(name) for name in (LOGS, FILES, TEMPORARY, CACHE, CONTROL_STORE)}
    planted |= {METRICS: Planted(METRICS, as_it_is=False), ENVIRONMENTS: around.planted}
    _write_controls(cloud, around, planted)
    serving = json.loads((cloud.home / "serving.json").read_text())
    with ray_object(_control_store(cloud), cloud.home, content) as held, _page_of(planted[METRICS]) as page:
        held.answer()
        held.ask(planted[CONTROL_STORE].lines.hex())
        yield Place(
            address=cloud.connection,
            key=key,
            worker=cloud.worker(),
            busy=lambda: _busy(cloud),
            folders={FILES: files, TEMPORARY: [around.temporary], CACHE: [around.cache]},
            said=lambda: [_said(where, name) for where in (serving["metrics"], page) for name in ("metrics", "status")],
            others=lambda: _processes(cloud),
            controls={tenant.encode()[:WINDOW]: TENANT, path[-WINDOW:]: HOME, content: OBJECT},
            planted=planted,
        )


def _write_controls(cloud: LocalCloud, around: Surroundings, planted: dict[str, Planted]) -> None:
    """Write the controls of logs, inside of a copy of the worker's, and those of each place with files."""
    log = log_file(cloud.home, "worker").read_bytes()
    (cloud.home / "controls.log").write_bytes(log + planted[LOGS].log_lines + log)
    for name, folder in ((FILES, cloud.home), (TEMPORARY, around.temporary), (CACHE, around.cache)):
        (folder / "controls.txt").write_bytes(planted[name].lines)


@contextlib.contextmanager
def _page_of(planted: Planted) -> Iterator[str]:
    """Host and port of metrics like a worker's, with controls as their labels."""
    metrics = Metrics()
    for text in planted.texts.values():
        metrics.refused.labels(text)
    server = serve_metrics("127.0.0.1", 0, metrics.text, dict)
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _busy(cloud: LocalCloud) -> int:
    """Sessions, requests that wait, and bytes of kept states: sessions are counted no longer before they are closed."""
    status = cloud.status()
    return int(sum(status["sessions"].values()) + status["queue_depth"] + status["stash_bytes"])


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


def _said(where: str, page: str) -> bytes:
    with urllib.request.urlopen(f"http://{where}/{page}", timeout=10) as response:
        return bytes(response.read())
