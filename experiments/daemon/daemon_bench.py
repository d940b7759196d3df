"""What a job loses while clients load the daemon, and whether the daemon stays within its bounds.

The same job runs once for each case, and without clients before, between and after, so that a case's throughput is
compared with that of its two undisturbed neighbours. Status is asked a few times a second beside the load, by a process
that does not give way.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from isthmus.common.errors import IsthmusError
from isthmus.common.files import sha256_of
from isthmus.common.readable import size
from isthmus.experiments.daemon.daemon_load import MODULE
from isthmus.experiments.daemon.local_daemon import LocalDaemon
from isthmus.experiments.harness.bench_settings import DaemonSettings
from isthmus.experiments.harness.launch import LocalCloud, stderr_progress
from isthmus.experiments.harness.process_memory import memory_bytes
from isthmus.experiments.harness.processes import TaskProcess
from isthmus.experiments.harness.prose import write_jsonl
from isthmus.experiments.harness.tickets import make_tickets

UNDISTURBED = "undisturbed"
CASES = ("polling", "slow", "bodies", "tokens")
PROBE_SECONDS = 0.2
"""Between requests for the status, whose times are measured."""
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Run:
    """A job, and what came of the requests meanwhile.

    Attributes:
        statuses: How many requests of the clients ended with each of HTTP's statuses; 0 for a closed connection.
        probes: Seconds that each request for the status took.
        rss_growth: Bytes of the daemon's process.
        tokens_per_s: Of the job's steps.
        adapter: SHA-256 of its weights.
    """

    case: str
    statuses: dict[str, int]
    probes: Sequence[float]
    rss_growth: int
    tokens_per_s: float
    adapter: str


def run_daemon(settings: DaemonSettings, folder: Path) -> dict[str, Any]:
    """Measure; see the module.

    Returns:
        `runs`, for each case `case`, `requests`, `errors_5xx`, `closed` (connections without an answer), `statuses`,
        `p99_s` and `p50_s` of a request for the status, `rss_growth_bytes` and `job_throughput_ratio`, over the mean
        of the two undisturbed runs beside it; and `adapters_identical`, whether all jobs ended with the same bits.
    """
    order = [UNDISTURBED, *(name for case in CASES for name in (case, UNDISTURBED))]
    data = folder / "tickets.jsonl"
    write_jsonl(data, [asdict(ticket) for ticket in make_tickets(4 * settings.steps)])
    options = ("--edge-layers", settings.edge_layers, "--threads", str(settings.threads))
    with LocalCloud(folder, settings.model, *options) as cloud, LocalDaemon(folder, cloud) as daemon:
        _job(daemon, settings, data, steps=2)  # what is loaded once is loaded then
        with stderr_progress("runs", len(order)) as advance:
            runs = []
            for case in order:
                runs.append(_run(daemon, settings, data, case))
                advance()
    return figures(runs, settings)


def figures(runs: Sequence[Run], settings: DaemonSettings) -> dict[str, Any]:
    """What `run_daemon` returns, of runs of which every other one is undisturbed."""
    rows = []
    for before, run, after in zip(runs[::2], runs[1::2], runs[2::2], strict=False):
        base = statistics.mean([before.tokens_per_s, after.tokens_per_s])
        cuts = statistics.quantiles(run.probes, n=100, method="inclusive")
        rows.append(
            {
                "case": run.case,
                "requests": sum(run.statuses.values()),
                "errors_5xx": sum(count for status, count in run.statuses.items() if status.startswith("5")),
                "closed": run.statuses.get("0", 0),
                "statuses": run.statuses,
                "p50_s": cuts[49],
                "p99_s": cuts[98],
                "rss_growth_bytes": run.rss_growth,
                "job_throughput_ratio": run.tokens_per_s / base,
            }
        )
    undisturbed = [probe for run in runs[::2] for probe in run.probes]
    return {
        "runs": rows,
        "undisturbed_p99_s": statistics.quantiles(undisturbed, n=100, method="inclusive")[98],
        "undisturbed_tokens_per_s": [run.tokens_per_s for run in runs[::2]],
        "adapters_identical": len({run.adapter for run in runs}) == 1,
        **asdict(settings),
    }


def show(result: dict[str, Any]) -> None:
    """Print a line for each case."""
    typer.echo(f"{'case':10}{'requests':>10}{'5xx':>6}{'closed':>8}{'p99':>10}{'memory':>12}{'job':>8}")
    for row in result["runs"]:
        typer.echo(
            f"{row['case']:10}{row['requests']:>10}{row['errors_5xx']:>6}{row['closed']:>8}{row['p99_s']:>8.3f} s"
            f"{size(row['rss_growth_bytes']):>12}{row['job_throughput_ratio']:>7.2f}x"
        )
    typer.echo(f"adapters identical: {result['adapters_identical']}")


def _run(daemon: LocalDaemon, settings: DaemonSettings, data: Path, case: str) -> Run:
    before = memory_bytes(daemon.pid, "status", "VmRSS")
    statuses: dict[str, int] = {}
    host, port = daemon.address
    task = {"case": case, "host": host, "port": port, "token": daemon.token, "clients": settings.clients}
    probes = Probes(daemon)
    if case == UNDISTURBED:
        with probes:
            job = _job(daemon, settings, data, settings.steps)
    else:
        with TaskProcess(f"clients ({case})", MODULE, task, patience=120.0) as clients:
            clients.answer()
            with probes:
                job = _job(daemon, settings, data, settings.steps)
            statuses = clients.ask("enough")
    growth = memory_bytes(daemon.pid, "status", "VmRSS") - before
    report = json.loads((daemon.home.path / "jobs" / job["id"] / "run" / "report.json").read_text())
    adapter = sha256_of(Path(job["adapter"]) / "adapter_model.safetensors").hex()
    return Run(case, statuses, probes.seconds, growth, report["tokens_per_s"], adapter)


def _job(daemon: LocalDaemon, settings: DaemonSettings, data: Path, steps: int) -> dict[str, Any]:
    """Have a job done. Raises IsthmusError where it does not succeed."""
    spec = {"data": str(data), "steps": steps, "validation_split": 0.0, "threads": settings.threads}
    body = {"kind": "train", "model": settings.model, "spec": {**spec, "seed": 0}, "labels": {"run": str(time.time())}}
    job: dict[str, Any] = daemon.client.post("/isthmus/v1/jobs", body)
    while job["status"] in ("queued", "running"):
        time.sleep(POLL_SECONDS)
        job = daemon.client.get(f"/isthmus/v1/jobs/{job['id']}")
    if job["status"] != "succeeded":
        raise IsthmusError(f"the job ended as {job['status']}: {job['error']}")
    return job


class Probes:
    """Asks for the status again and again while the block runs.

    Attributes:
        seconds: That each request took.
    """

    def __init__(self, daemon: LocalDaemon) -> None:
        self.seconds: list[float] = []
        self._daemon, self._over = daemon, threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._over.wait(PROBE_SECONDS):
            begun = time.perf_counter()
            self._status()
            self.seconds.append(time.perf_counter() - begun)

    def _status(self) -> None:
        """One request on a connection of its own, at the address that all clients use."""
        connection = http.client.HTTPConnection(*self._daemon.address, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/isthmus/v1/status", headers={"Authorization": f"Bearer {self._daemon.token}"})
            response = connection.getresponse()
            response.read()
        if response.status != 200:
            raise IsthmusError(f"the daemon answers {response.status} to a request for its status")
