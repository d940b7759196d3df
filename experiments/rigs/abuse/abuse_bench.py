"""The rows of `isthmus bench abuse`.

Each attack on a worker is made twice: alone, while the kernel counts what the worker takes, and beside a tenant that
behaves, whose latency is compared with that before the attack. An attack of a cloud on an edge is made once, and the
edge must end it with the error that it documents. An attack of an owner on a daemon is made once, beside another owner,
whose slowest answer has a ceiling, too. Then servers with a planted weakness, and edges without a bound, are
measured in the same way; a measurement that finds nothing wrong with them would be worth nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import grpc

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.backbone.plan import SplitPlan
from isthmus.cloud.control.worker_setup import make_parts
from isthmus.common.errors import IsthmusError
from isthmus.experiments.daemon.local_daemon import LocalDaemon
from isthmus.experiments.harness.bench_flags import names_of
from isthmus.experiments.harness.launch import LocalCloud, stderr_progress
from isthmus.experiments.harness.processes import TaskProcess
from isthmus.experiments.harness.rig_settings import AbuseSettings
from isthmus.experiments.rigs.abuse.attacked_edge import EDGE_ATTACKS, LIFTED, Edge
from isthmus.experiments.rigs.abuse.attacks import ATTACKS, attacker_process
from isthmus.experiments.rigs.abuse.bare_server import PLANTED, BareServer, Weakness
from isthmus.experiments.rigs.abuse.ceilings import (
    CACHE_BYTES,
    CEILINGS,
    COMPUTE_BYTES,
    PLANTED_CEILING,
    STASH_BYTES,
    Ceiling,
)
from isthmus.experiments.rigs.abuse.daemon_attacks import DAEMON_ATTACKS, WeakDaemon, attacked
from isthmus.experiments.rigs.abuse.gauge import Gauge, Taken
from isthmus.experiments.rigs.abuse.honest import CALM_SECONDS, Honest
from isthmus.experiments.rigs.abuse.hostile_cloud import HostileCloud
from isthmus.experiments.rigs.abuse.stranger import NEWCOMERS
from isthmus.protocol.service import CLIENT_CODING, METHOD

LOG: Final = "attacks.log"
SETTLE_SECONDS = 60.0
"""After an attack, for the worker to end its sessions, before the next one is measured."""
FRAMES, FRAME_BYTES = 160, 1 << 20
"""Sent to each server with a planted weakness, which does to every one of them what none should."""

ALL: Final = (*ATTACKS, *EDGE_ATTACKS, *DAEMON_ATTACKS)
"""The names of all attacks, by strangers, tenants, clouds and owners of a daemon's tokens."""


def run_abuse(settings: AbuseSettings, folder: Path) -> dict[str, Any]:
    """Attack a cloud and an edge; see the module.

    Returns:
        `runs`: one row for each attack and each thing that has a ceiling, with `attack`, `by`, `measured`, `ceiling`,
        `unit`, `held`, `latency_ratio`, which is a tenant's latency during the attack over its calm one, and
        `computed`, the calls that the worker has computed for the attack, the less of the two times, where it is made
        of such calls, or the requests that a daemon was sent: none of its rows is held without one. The last two are
        None for an attack on an edge. `planted`:
        one row for each planted weakness. `held` and `planted_caught` sum them up.

    Raises:
        ConfigError: There is no such attack.
        IsthmusError: The cloud did not start, an attack could not be made, or an edge did not end one as it must.
    """
    attacks = names_of(settings.attacks, "attacks", ALL)
    with stderr_progress("attacks", len(attacks) + len(PLANTED) + len(LIFTED)) as advance:
        return _run(settings, attacks, folder, advance)


def _run(settings: AbuseSettings, attacks: Sequence[str], folder: Path, advance: Callable[[], None]) -> dict[str, Any]:
    checkpoint = resolve(settings.model)
    parts = folder / "parts"
    make_parts(checkpoint, SplitPlan.parse(settings.edge_layers, checkpoint.config.num_hidden_layers), parts)
    cloud = LocalCloud(
        folder,
        str(checkpoint.folder),
        *("--edge-layers", settings.edge_layers, "--threads", str(settings.threads)),
        *("--stash-bytes", str(STASH_BYTES), "--compute-bytes", str(COMPUTE_BYTES)),
        *("--cache-bytes", str(CACHE_BYTES)),
    )
    on_edge = [name for name in attacks if name in EDGE_ATTACKS]
    runs: list[dict[str, Any]] = []
    planted: list[dict[str, Any]] = []
    if len(on_edge) < len(attacks):
        key = folder / "hostile"
        cloud.enroll("hostile", key)
        with attacker_process(key, folder / LOG) as attacker, cloud:
            if on_worker := [name for name in attacks if name in ATTACKS]:
                runs += _on_worker(settings, on_worker, cloud, attacker, advance)
            if on_daemon := [name for name in attacks if name in DAEMON_ATTACKS]:
                with LocalDaemon(folder, cloud) as daemon:
                    for name in on_daemon:
                        runs += daemon_rows(name, attacker, daemon, settings.seconds)
                        advance()
                planted.append(weak_daemon_row(cloud, attacker, folder / "weak", settings.seconds))
    with BareServer(checkpoint.folder, parts, cloud.home, folder / LOG) as server:
        for weakness in PLANTED:
            planted.append(planted_row(server, weakness))
            advance()
    with (
        HostileCloud(cloud.home, parts, settings.edge_layers) as hostile,
        Edge(cloud.edge_key, folder, folder / LOG) as edge,
    ):
        for name in on_edge:
            taken = edge.attacked(name, hostile)
            runs += rows(taken, CEILINGS[name], attack=name, by="cloud", latency_ratio=None)
            advance()
        for name in LIFTED:
            planted.append(lifted_row(edge, hostile, name))
            advance()
    return {
        "held": all(row["held"] for row in runs),
        "planted_caught": all(row["caught"] for row in planted),
        "runs": runs,
        "planted": planted,
        "seconds": settings.seconds,
        "model": settings.model,
    }


def _on_worker(
    settings: AbuseSettings,
    attacks: Sequence[str],
    cloud: LocalCloud,
    attacker: TaskProcess,
    advance: Callable[[], None],
) -> Iterator[dict[str, Any]]:
    """The rows of the attacks on a worker."""
    pid = cloud.status()["pid"]
    with Honest(cloud.connection, cloud.edge_key) as honest:
        honest.latency_s(time.monotonic())  # the first calls warm both sides up
    for name in attacks:
        taken, alone = attack_alone(attacker, name, pid, cloud.connection, settings.seconds)
        _settle(cloud)
        ratio, beside = _latency_ratio(attacker, name, cloud, settings.seconds)
        _settle(cloud)
        attack = ATTACKS[name]
        computed = min(alone, beside) if attack.is_computed else None
        yield from rows(taken, CEILINGS[name], computed, attack=name, by=attack.by, latency_ratio=ratio)
        advance()


def daemon_rows(name: str, attacker: TaskProcess, daemon: LocalDaemon, seconds: float) -> list[dict[str, Any]]:
    """Attack a daemon; what it took, and how much slower another owner was served, against the ceilings."""
    taken, sent, slower = attacked(name, attacker, daemon, seconds)
    return rows(taken, CEILINGS[name], sent, slower, attack=name, by="owner", latency_ratio=round(slower["answers"], 2))


def show(result: dict[str, Any]) -> None:
    """Print the rows as tables of at most 80 columns."""
    line = "{:28} {:>10} {:>9} {:12} {:8} {:>8}".format
    print(line("attack", "measured", "ceiling", "unit", "held", "slower"))
    for row in result["runs"]:
        held = "NOT MADE" if row["computed"] == 0 else "yes" if row["held"] else "NO"
        slower = "-" if row["latency_ratio"] is None else f"{row['latency_ratio']} x"
        print(line(row["attack"], row["measured"], row["ceiling"], row["unit"], held, slower))
    print()
    print(line("planted weakness", "measured", "ceiling", "unit", "", "caught"))
    for row in result["planted"]:
        caught = "yes" if row["caught"] else "NO"
        print(line(row["weakness"], row["measured"], row["ceiling"], row["unit"], "", caught))


def _settle(cloud: LocalCloud) -> None:
    """Wait until the worker has ended the last attack's sessions, which count against its tenant's quota."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while cloud.status()["sessions"]:
        if time.monotonic() > deadline:
            raise IsthmusError(f"the worker still has an attack's sessions after {SETTLE_SECONDS:.0f} s")
        time.sleep(0.1)


UNIT_OF: Final = {
    "memory": "MiB",
    "descriptors": "descriptors",
    "processor": "processor s",
    "threads": "threads",
    "answers": "x answers",
    "health": "x healthz",
}


def rows(
    taken: Taken,
    ceiling: Ceiling,
    computed: int | None = None,
    slower: Mapping[str, float] | None = None,
    **about: object,
) -> list[dict[str, Any]]:
    """What was measured of an attack, against its ceilings.

    Args:
        computed: Calls that were computed for an attack that is made of such calls, or requests that were sent: where
            there were none, it was not made, and has held to nothing.
        slower: How many times as long as before the slowest of each kind of another owner's requests took.
        about: What else is said in each row.
    """
    measured = [
        ("memory", taken.memory_mib, ceiling.memory_mib),
        ("descriptors", taken.descriptors, ceiling.descriptors),
        ("processor", taken.processor_s, ceiling.processor_s),
        ("threads", taken.threads, ceiling.threads),
        *((kind, ratio, getattr(ceiling, kind)) for kind, ratio in (slower or {}).items()),
    ]
    return [
        {
            **about,
            "computed": computed,
            "measured": round(value, 2) or 0,
            "ceiling": most,
            "unit": UNIT_OF[kind],
            "held": value <= most and computed != 0,
        }
        for kind, value, most in measured
        if most is not None
    ]


def planted_row(server: BareServer, weakness: Weakness) -> dict[str, Any]:
    """Plant a weakness in a server, and send it `FRAMES` frames of noise, one a stream; the row where it must show."""
    server.plant(weakness)
    noise = os.urandom(FRAME_BYTES)
    with Gauge(server.pid) as gauge, grpc.insecure_channel(server.address) as channel:
        session = channel.stream_stream(METHOD, **CLIENT_CODING)
        for _ in range(FRAMES):
            with contextlib.suppress(grpc.RpcError):
                list(session(iter([noise]), timeout=60))
    row = next(row for row in rows(gauge.taken, PLANTED_CEILING) if row["unit"] == UNIT_OF[weakness])
    return {"weakness": weakness, **row, "caught": not row["held"]}


def lifted_row(edge: Edge, hostile: HostileCloud, name: str) -> dict[str, Any]:
    """Attack an edge without the bound that holds the attack back; the row where it must show."""
    taken = edge.attacked(name, hostile, lifted=True)
    row = next(row for row in rows(taken, CEILINGS[name]) if row["unit"] == UNIT_OF["memory"])
    return {"weakness": f"no bound: {name}", **row, "caught": not row["held"]}


def weak_daemon_row(cloud: LocalCloud, attacker: TaskProcess, folder: Path, seconds: float) -> dict[str, Any]:
    """Attack a daemon that does not count the values of bodies; the row where it must show."""
    folder.mkdir()
    with WeakDaemon(folder, cloud) as daemon:
        found = daemon_rows("deep_json", attacker, daemon, seconds)
    row = next(row for row in found if row["unit"] == UNIT_OF["health"])
    return {"weakness": "no count: deep_json", **row, "caught": not row["held"]}


def attack_alone(attacker: TaskProcess, name: str, pid: int, where: str, seconds: float) -> tuple[Taken, int]:
    """Make an attack on the worker of a connection string while nobody else asks for anything.

    Returns what the worker took, and the calls that it has computed for the attack.

    Raises IsthmusError where the attack could not be made, or has ended the worker.
    """
    with Gauge(pid) as gauge:
        computed: int = attacker.ask([name, seconds, where])
    return gauge.taken, computed


def _latency_ratio(attacker: TaskProcess, name: str, cloud: LocalCloud, seconds: float) -> tuple[float, int]:
    """A tenant's median latency during an attack, over that just before, and the calls computed for the attack.

    Where an attack is one on newcomers, the tenant comes anew for each call: the bench fails if it does not get in.
    """
    with Honest(cloud.connection, cloud.edge_key, anew=name in NEWCOMERS) as honest:
        begun = time.monotonic()
        time.sleep(CALM_SECONDS)
        calm = honest.latency_s(begun)
        begun = time.monotonic()
        computed: int = attacker.ask([name, seconds, cloud.connection])
        return round(honest.latency_s(begun) / calm, 2), computed
