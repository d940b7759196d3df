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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import typer

from isthmus.common.errors import IsthmusError
from isthmus.common.files import sha256_of
from isthmus.common.readable import size
from isthmus.experiments.daemon.daemon_load import MODULE
from isthmus.experiments.daemon.local_daemon import LocalDaemon
from isthmus.experiments.harness.bench_settings import DaemonSettings
from isthmus.experiments.harness.launch import LocalCloud, stderr_progress
from isthmus.experiments.harness.processes import TaskProcess
from isthmus.experiments.harness.prose import write_jsonl
from isthmus.experiments.harness.tickets import make_tickets

UNDISTURBED = "undisturbed"
CASES = ("polling", "slow", "bodies", "tokens")
PROBE_SECONDS = 0.2
"""Between requests for the status, whose times are measured: some hundreds in a run, for the slowest hundredth."""
POLL_SECONDS = 0.5
"""Between looks at whether the job has ended: little against how long it takes, and no load."""


@dataclass(frozen=True, slots=True)
class Run:
    """A job, and what came of the requests meanwhile.

    Attributes:
        load: What the clients say at their end (`isthmus.experiments.daemon.daemon_load`); empty without clients.
        probes: Seconds that each request for the status took.
        rss_growth: Bytes that the daemon's process had at most, over those before.
        daemon_cpu_s: Seconds of a processor that it took.
        tokens_per_s: Of the job's steps.
        adapter: SHA-256 of its weights.
    """

    case: str
    load: Mapping[str, Any]
    probes: Sequence[float]
    rss_growth: int
    daemon_cpu_s: float
    tokens_per_s: float
    adapter: str


def run_daemon(settings: DaemonSettings, folder: Path) -> dict[str, Any]:
    """Measure; see the module.

    Returns:
        `runs`, for each case `case`; of the clients `requests`, `statuses`, `errors_5xx`, `closed` (by the daemon,
        without an answer), `timeouts` (given up by the client) and `most_open` (connections at the same time);
        `p99_s` and `p50_s` of a request for the status; `rss_growth_bytes` of the daemon; `daemon_cpu_s` and
        `clients_cpu_s`, seconds of a processor; and `job_throughput_ratio`, over the mean of the two undisturbed runs
        beside it. Then `adapters_identical`, whether all jobs ended with the same bits, and `no_errors_5xx`.
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
        statuses = run.load["statuses"]
        rows.append(
            {
                "case": run.case,
                "requests": sum(statuses.values()) + run.load["closed"] + run.load["timeouts"],
                "errors_5xx": sum(count for status, count in statuses.items() if status.startswith("5")),
                **{name: run.load[name] for name in ("statuses", "closed", "timeouts", "most_open")},
                "p50_s": cuts[49],
                "p99_s": cuts[98],
                "rss_growth_bytes": run.rss_growth,
                "daemon_cpu_s": run.daemon_cpu_s,
                "clients_cpu_s": run.load["cpu_s"],
                "job_throughput_ratio": run.tokens_per_s / base,
            }
        )
    undisturbed = [probe for run in runs[::2] for probe in run.probes]
    return {
        "runs": rows,
        "undisturbed_p99_s": statistics.quantiles(undisturbed, n=100, method="inclusive")[98],
        "undisturbed_tokens_per_s": [run.tokens_per_s for run in runs[::2]],
        "adapters_identical": len({run.adapter for run in runs}) == 1,
        "no_errors_5xx": not any(row["errors_5xx"] for row in rows),
        **asdict(settings),
    }


def show(result: dict[str, Any]) -> None:
    """Print a line for each case."""
    names = ("requests", "errors_5xx", "closed", "timeouts", "most_open")
    typer.echo(f"{'case':8}{''.join(f'{name:>11}' for name in names)}{'p99':>9}{'memory':>12}{'job':>8}")
    for row in result["runs"]:
        typer.echo(
            f"{row['case']:8}{''.join(f'{row[name]:>11}' for name in names)}{row['p99_s']:>7.3f} s"
            f"{size(row['rss_growth_bytes']):>12}{row['job_throughput_ratio']:>7.2f}x"
        )
    typer.echo(f"adapters identical: {result['adapters_identical']}")


def _run(daemon: LocalDaemon, settings: DaemonSettings, data: Path, case: str) -> Run:
    process = psutil.Process(daemon.pid)
    before, cpu = process.memory_info().rss, _cpu_seconds(process)
    load: dict[str, Any] = {}
    host, port = daemon.address
    whom = {"host": host, "port": port, "token": daemon.token, "model": daemon.model}
    probes = Probes(daemon, process)
    if case == UNDISTURBED:
        with probes:
            job = _job(daemon, settings, data, settings.steps)
    else:
        task = {"case": case, **whom, "clients": settings.clients}
        with TaskProcess(f"clients ({case})", MODULE, task, patience=120.0) as clients:
            clients.answer()
            with probes:
                job = _job(daemon, settings, data, settings.steps)
            load = clients.ask("enough")
    growth, cpu = max(probes.resident) - before, _cpu_seconds(process) - cpu
    report = json.loads((daemon.home / "jobs" / job["id"] / "run" / "report.json").read_text())
    adapter = sha256_of(Path(job["adapter"]) / "adapter_model.safetensors").hex()
    return Run(case, load, probes.seconds, growth, cpu, report["tokens_per_s"], adapter)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _job(daemon: LocalDaemon, settings: DaemonSettings, data: Path, steps: int) -> dict[str, Any]:
    """Have a job done. Raises IsthmusError where it does not succeed."""
    spec = {"data": str(data), "steps": steps, "validation_split": 0.0, "threads": settings.threads}
    body = {"kind": "train", "model": daemon.model, "spec": {**spec, "seed": 0}, "labels": {"run": str(time.time())}}
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
        resident: Bytes of the daemon's process after it.
    """

    def __init__(self, daemon: LocalDaemon, process: psutil.Process) -> None:
        self.seconds: list[float] = []
        self.resident: list[int] = []
        self._process = process
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
            self.resident.append(self._process.memory_info().rss)

    def _status(self) -> None:
        """One request on a connection of its own, at the address that all clients use."""
        connection = http.client.HTTPConnection(*self._daemon.address, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/isthmus/v1/status", headers={"Authorization": f"Bearer {self._daemon.token}"})
            response = connection.getresponse()
            response.read()
        if response.status != 200:
            raise IsthmusError(f"the daemon answers {response.status} to a request for its status")
